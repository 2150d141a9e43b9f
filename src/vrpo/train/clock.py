"""Where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from vrpo.types import Metrics


class Clock:
    """Wall seconds per phase of one step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def metrics(self, *, completion_tokens: int) -> Metrics:
        """time/* in seconds and tokens_per_second/*, in completion tokens."""
        total = time.perf_counter() - self._started
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["time/step"] = total
        metrics["tokens_per_second/step"] = completion_tokens / total
        if self._seconds["rollout"] > 0:
            metrics["tokens_per_second/rollout"] = completion_tokens / self._seconds["rollout"]
        learning = self._seconds["critic"] + self._seconds["policy"]
        if learning > 0:
            metrics["tokens_per_second/update"] = completion_tokens / learning
        return metrics
