"""A judge behind HTTP: one POST a block of responses, several at a time, waiting bounded.

-> {"prompts": [...], "completions": [...], <column>: [...]}        <- {"rewards": [number | null, ...]}
"""

import json
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, final

import urllib3

from vrpo.config.rewards import HttpReward
from vrpo.errors import ConfigError
from vrpo.rewards.isolation import Fault

BACKOFF_SECONDS = 0.5
"""The k-th retry of a request waits 2^k times this, at most 30 s, or as long as Retry-After says."""

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Answers that may be different next time."""


@final
class HttpJudge:
    """A reward function with TRL's signature that asks a server."""

    def __init__(self, config: HttpReward) -> None:
        """Read the headers from the environment.

        Raises:
            ConfigError: a variable named in `headers_env` is not set.
        """
        headers = {"content-type": "application/json"}
        for header, variable in config.headers_env.items():
            if variable not in os.environ:
                raise ConfigError(
                    f"rewards.functions.headers_env names {variable}, which is not set; export it before the run"
                )
            headers[header] = os.environ[variable]
        self._config = config
        self._headers = headers
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, block=True)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Any]:
        """The server's numbers; a `Fault` of kind http for each response of a block that failed."""
        size = self._config.batch_size
        given = {"prompts": prompts, "completions": completions} | {
            name: columns[name] for name in self._config.columns
        }
        blocks = [
            {name: list(values[first : first + size]) for name, values in given.items()}
            for first in range(0, len(completions), size)
        ]
        # its threads are daemons: a server that never answers cannot keep the run from ending
        with ThreadPool(self._config.concurrency) as pool:
            answers = pool.map(self._block, blocks, chunksize=1)
        return [value for answer in answers for value in answer]

    def _block(self, block: dict[str, list[Any]]) -> list[Any]:
        count = len(block["completions"])
        try:
            return self._post(block, count)
        except (urllib3.exceptions.HTTPError, Fault, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            return [Fault("http", f"{type(error).__name__}: {reason}")] * count

    def _post(self, block: dict[str, list[Any]], count: int) -> list[Any]:
        config = self._config
        retry = urllib3.Retry(
            total=config.attempts - 1,
            backoff_factor=BACKOFF_SECONDS,
            backoff_max=30.0,
            status_forcelist=TRY_AGAIN,
            allowed_methods=None,
            raise_on_status=False,
        )
        answer = self._pool.request(
            "POST",
            config.url,
            body=json.dumps(block).encode("utf-8", "backslashreplace"),
            headers=self._headers,
            retries=retry,
            timeout=urllib3.Timeout(total=config.request_timeout),
        )
        if answer.status != 200:
            raise Fault("http", f"status {answer.status} of {config.url}")
        data = json.loads(answer.data)
        rewards = data.get("rewards") if isinstance(data, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            raise Fault("http", f'the answer is not {{"rewards": [{count} numbers or null]}}')
        return rewards
