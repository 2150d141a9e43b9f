"""What a GPU can do at most, measured, and how work on it is timed."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 20


@dataclass(frozen=True, slots=True)
class Peaks:
    """Medians of REPEATS calls."""

    flops: float
    """bf16 matrix product of two square matrices of normal numbers, 2 n^3 over its seconds."""
    bytes_per_second: float
    """Copy from device to device: what is read and what is written, over its seconds."""


def wait(device: torch.device) -> None:
    """Return once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, *, repeats: int, limit: float) -> list[float]:
    """Wall seconds of each call, the device's work included; no further call once `limit` seconds are spent."""
    found: list[float] = []
    while len(found) < repeats and (not found or sum(found) < limit):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def measure(device: torch.device, *, quick: bool) -> Peaks:
    """Both peaks: products of 8192 x 8192 matrices, copies of 4 GiB; small ones with `quick`."""
    size, count = (512, 2**24) if quick else (8192, 2**32)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    best = statistics.median(_events(lambda: torch.mm(a, b, out=product), device))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = statistics.median(_events(lambda: target.copy_(source), device))
    return Peaks(2 * size**3 / best, 2 * count / copied)


def _events(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each of REPEATS calls between two events of the device; on the CPU wall seconds."""
    for _ in range(5):
        work()
    if device.type != "cuda":
        return seconds(work, device, repeats=REPEATS, limit=float("inf"))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    wait(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
