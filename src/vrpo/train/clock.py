"""Where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vrpo.types import Metrics


def wait_for_device() -> None:
    """Return once the GPU has done what it was asked for; at once where none is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Clock:
    """Wall seconds per phase of one step."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Start; `seconds` are phases that an earlier process has timed."""
        self._seconds: dict[str, float] = defaultdict(float, seconds or {})
        self._started = time.perf_counter() - sum(self._seconds.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far."""
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, what it leaves the GPU to do included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for_device()
            self._seconds[name] += time.perf_counter() - start

    def metrics(self, *, completion_tokens: int) -> Metrics:
        """time/* in seconds and tokens_per_second/*, in completion tokens."""
        total = time.perf_counter() - self._started
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["time/step"] = total
        metrics["tokens_per_second/step"] = completion_tokens / total
        rollout = self._seconds.get("rollout", 0.0)
        if rollout > 0:
            metrics["tokens_per_second/rollout"] = completion_tokens / rollout
        learning = self._seconds.get("critic", 0.0) + self._seconds.get("policy", 0.0)
        if learning > 0:
            metrics["tokens_per_second/update"] = completion_tokens / learning
        return metrics
