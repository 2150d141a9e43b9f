"""A judge behind HTTP: one POST a block of responses, several at a time, waiting bounded.

-> {"prompts": [...], "completions": [...], <column>: [...]}        <- {"rewards": [number | null, ...]}
"""

import json
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, final

import urllib3

from vrpo.config.rewards import HttpReward
from vrpo.errors import ConfigError
from vrpo.rewards.isolation import Fault

BACKOFF_SECONDS = 0.5
"""The first retry of a request does not wait; the k-th after it waits 2^k times this, at most 30 s, or as long as Retry-After says."""

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Answers that may be different next time."""


@final
class HttpJudge:
    """A reward function with TRL's signature that asks a server."""

    def __init__(self, config: HttpReward) -> None:
        """Read the headers from the environment.

        Raises:
            ConfigError: a variable named in `headers_env` is not set, or cannot be a header.
        """
        headers = {"content-type": "application/json"}
        for header, variable in config.headers_env.items():
            if variable not in os.environ:
                raise ConfigError(
                    f"rewards.functions.headers_env names {variable}, which is not set; export it before the run"
                )
            value = os.environ[variable]
            # http.client would refuse it with the value in its message, which ends up in rollouts.jsonl
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(
                    f"rewards.functions.headers_env: {variable} holds a line break or another character that no header may "
                    "have; export it without"
                )
            headers[header] = value
        self._config = config
        self._headers = headers
        self._pool = urllib3.PoolManager(maxsize=config.concurrency)

    def __call__(self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Any]:
        """The server's numbers; a `Fault` of kind http or timeout for each response of a block that has none."""
        size = self._config.batch_size
        given = {"prompts": prompts, "completions": completions} | {
            name: columns[name] for name in self._config.columns
        }
        blocks = [
            {name: list(values[first : first + size]) for name, values in given.items()}
            for first in range(0, len(completions), size)
        ]
        late = Fault("timeout", f"no answer within {self._config.timeout:g} s")
        answers = [[late] * len(block["completions"]) for block in blocks]
        for index, answer in self._ask(blocks):
            answers[index] = answer
        return [value for answer in answers for value in answer]

    def _ask(self, blocks: Sequence[dict[str, list[Any]]]) -> list[tuple[int, list[Any]]]:
        """(number, answer) of the blocks that were answered in time.

        The threads are daemons and no pool's: a pool waits for its threads or for all of its answers, and a server may
        make one wait for as long as it likes.
        """
        deadline = time.monotonic() + self._config.timeout
        todo, done = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, list[Any]]]()
        over = threading.Event()
        pool = self._pool

        def work() -> None:
            while not over.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                done.put((index, self._block(blocks[index], pool)))

        for index in range(len(blocks)):
            todo.put(index)
        for _ in range(min(self._config.concurrency, len(blocks))):
            threading.Thread(target=work, daemon=True).start()
        answers: list[tuple[int, list[Any]]] = []
        try:
            while len(answers) < len(blocks):
                answers.append(done.get(timeout=max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            # the next step must not wait for connections that are still held by this one's threads
            self._pool = urllib3.PoolManager(maxsize=self._config.concurrency)
        finally:
            over.set()
        return answers

    def _block(self, block: dict[str, list[Any]], pool: urllib3.PoolManager) -> list[Any]:
        count = len(block["completions"])
        try:
            return self._post(block, count, pool)
        except Fault as fault:
            return [fault] * count
        # whatever a server makes the libraries raise is the fault of its answer
        except Exception as error:
            return [Fault("http", self._unreachable(error))] * count

    def _post(self, block: dict[str, list[Any]], count: int, pool: urllib3.PoolManager) -> list[Any]:
        config = self._config
        retry = urllib3.Retry(
            total=config.attempts - 1,
            backoff_factor=BACKOFF_SECONDS,
            backoff_max=30.0,
            status_forcelist=TRY_AGAIN,
            allowed_methods=None,
            raise_on_status=False,
        )
        answer = pool.request(
            "POST",
            config.url,
            body=json.dumps(block).encode("utf-8", "backslashreplace"),
            headers=self._headers,
            retries=retry,
            redirect=False,  # another host must not get the headers
            timeout=urllib3.Timeout(total=config.request_timeout),
        )
        if answer.status != 200:
            told = f": {_beginning(answer.data)}" if answer.data else ""
            raise Fault("http", f"status {answer.status} of {config.url}{told}")
        try:
            data = json.loads(answer.data)
        except (ValueError, RecursionError):
            data = None
        rewards = data.get("rewards") if isinstance(data, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            wanted = f'{{"rewards": [{count} numbers or null]}}'
            raise Fault("http", f"{config.url} must answer {wanted}, it answered {_beginning(answer.data)}")
        return rewards

    def _unreachable(self, error: Exception) -> str:
        """Why there was no answer, in the user's words where they are known."""
        config = self._config
        reason = getattr(error, "reason", None) or error
        tries = f"in {config.attempts} attempt{'s' * (config.attempts > 1)}"
        match reason:
            case urllib3.exceptions.ReadTimeoutError():
                return f"no answer of {config.url} within {config.request_timeout:g} s, {tries}"
            case urllib3.exceptions.ConnectTimeoutError() | urllib3.exceptions.NewConnectionError():
                return f"cannot connect to {config.url}, {tries}"
            case _:
                said = " ".join(str(reason).split())[:200]
                return f"{config.url}: {type(reason).__name__}: {said}"


def _beginning(data: bytes) -> str:
    """The first words of an answer, on one line."""
    return " ".join(data[:200].decode("utf-8", "replace").split()) or "nothing"
