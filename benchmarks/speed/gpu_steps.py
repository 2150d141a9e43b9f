"""Whole training steps on a GPU: our GRPO, PPO and VRPO beside TRL's GRPO without vLLM, in alternating rounds.

The workers of `compare`, told the device: fp32 weights, bf16 passes, one optimizer step of all sequences a step.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.speed import compare, gpu_models, workload
from benchmarks.speed.table import generating, spread

WORKERS = ("trl-grpo", "vrpo-grpo", "vrpo-ppo", "vrpo-vrpo")
RATIOS = [
    ("GRPO step, TRL / vrpo", "trl-grpo", "vrpo-grpo"),
    ("VRPO step / PPO step", "vrpo-vrpo", "vrpo-ppo"),
    ("PPO step / GRPO step", "vrpo-ppo", "vrpo-grpo"),
]
"""Title, and the two whose seconds are divided."""


def measure(
    device: torch.device, *, quick: bool, rounds: int, steps: int, scratch: Path
) -> dict[str, list[Any]]:
    """Rounds of all workers; one that fails is left out of the rounds after it, and what it said is kept."""
    prompts = 2 if quick else 32
    folder = scratch / f"gpu-{'quick' if quick else 'full'}"
    texts = workload.random_weights(folder, gpu_models.sampled(quick=quick), prompts=prompts)
    job = {
        "device": device.type,
        "model": str(folder),
        "prompts": str(texts),
        "group": workload.GROUP,
        "prompt_tokens": workload.PROMPT_TOKENS,
        "new_tokens": workload.NEW_TOKENS,
        "warmup": 1,
        "steps": steps,
        "threads": min(8, max(1, (os.cpu_count() or 2) // 2)),
        "scratch": str(scratch),
    }
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    names = list(WORKERS)
    for number in range(rounds):
        found.append({})
        for name in list(names):
            try:
                found[-1][name] = compare.run(name, job, {})
            except SystemExit as error:  # how `compare.run` says that a worker failed
                names.remove(name)
                failed.append(str(error))
                print(error, file=sys.stderr, flush=True)
        said = ", ".join(f"{n} {seconds(r):.2f} s" for n, r in found[-1].items())
        print(f"round {number + 1}: {said}", flush=True)
    return {"rounds": found, "failed": failed}


def seconds(result: dict[str, Any]) -> float:
    """Wall seconds of the median step."""
    return statistics.median(result["wall"])


def tables(found: dict[str, list[Any]]) -> list[Table]:
    """Medians over rounds with the range: workers, then ratios within rounds."""
    workers = Table("worker", "tokens / second", "seconds a step", "of it sampling", "peak GiB, allocated")
    for name in WORKERS:
        results = [r[name] for r in found["rounds"] if name in r]
        if results:
            workers.add_row(
                name,
                spread([r["tokens"] / seconds(r) for r in results], "{:,.0f}"),
                spread([seconds(r) for r in results], "{:.3f}"),
                spread([generating(r) for r in results], "{:.3f}"),
                spread([r["peak_bytes"] / 2**30 for r in results], "{:.2f}"),
            )
    ratios = Table("ratio of seconds", "median (range) over rounds")
    for title, a, b in RATIOS:
        values = [seconds(r[a]) / seconds(r[b]) for r in found["rounds"] if a in r and b in r]
        if values:
            ratios.add_row(title, spread(values, "{:.2f}"))
    return [workers, ratios]
