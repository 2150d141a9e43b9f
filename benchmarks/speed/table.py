"""The comparison as a table: tokens a second, and ratios within rounds."""

import statistics
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Round = dict[str, dict[str, Any]]

RATIOS = [
    ("GRPO, tokens per CPU-second, vrpo / TRL", "vrpo-grpo", "trl-grpo", True),
    ("PPO, tokens per CPU-second, vrpo / TRL", "vrpo-ppo", "trl-ppo", True),
    ("PPO with the policy's trunk / TRL PPO", "vrpo-ppo-shared", "trl-ppo", True),
    ("VRPO step / PPO step, seconds", "vrpo-vrpo", "vrpo-ppo", False),
    ("PPO step / GRPO step, seconds", "vrpo-ppo", "vrpo-grpo", False),
]
"""Title, ours, the other, whether more is better (then speeds are divided, else seconds)."""


def print_table(rounds: list[Round]) -> None:
    """Medians over rounds of the median step, with the range."""
    console = Console(width=110)
    table = Table(
        "worker",
        "tokens / CPU-second",
        "tokens / second",
        "CPU-seconds a step",
        "of it generating",
        "peak GiB",
    )
    for name in rounds[0]:
        table.add_row(
            name,
            spread([r[name]["tokens"] / cpu(r[name]) for r in rounds], "{:,.0f}"),
            spread([r[name]["tokens"] / statistics.median(r[name]["wall"]) for r in rounds], "{:,.0f}"),
            spread([cpu(r[name]) for r in rounds], "{:.2f}"),
            spread([generating(r[name]) for r in rounds], "{:.2f}"),
            spread([r[name]["peak_bytes"] / 2**30 for r in rounds], "{:.2f}"),
        )
    console.print(table)
    ratios = Table("ratio", "median (range) over rounds")
    for title, ours, other, faster in RATIOS:
        if ours in rounds[0] and other in rounds[0]:
            seconds = [cpu(r[ours]) / cpu(r[other]) for r in rounds]
            ratios.add_row(title, spread([1 / s if faster else s for s in seconds], "{:.2f}"))
    if {"hf-generate", "vrpo-grpo"} <= rounds[0].keys():
        gains = [cpu(r["hf-generate"]) / generating(r["vrpo-grpo"]) for r in rounds]
        ratios.add_row(
            "sampling, generate of transformers / ours with log-probabilities", spread(gains, "{:.2f}")
        )
    console.print(ratios)


def cpu(result: dict[str, Any]) -> float:
    """Processor seconds of the median step."""
    return statistics.median(result["cpu"])


def generating(result: dict[str, Any]) -> float:
    """Seconds of the median step spent sampling; all of it where nothing else is done."""
    parts = [phases.get("generate", phases.get("rollout")) for phases in result["phases"]]
    return cpu(result) if None in parts else statistics.median(parts)


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    show: Callable[[float], str] = form.format
    return f"{show(statistics.median(values))} ({show(min(values))}-{show(max(values))})"
