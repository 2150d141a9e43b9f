"""What is said when a run has ended: its accuracies, what did not count, what the judge pays for."""

from typing import Any

from rich.console import Console
from rich.table import Table

from vrpo.config import Config

MUCH_MISSING = 0.1
"""Share of the responses without a reward from which on it is said why."""


def name_of_clean(*means: float) -> str:
    """What a mean of clean rewards is called: no accuracy where it cannot be a share."""
    return "clean accuracy" if all(0.0 <= mean <= 1.0 for mean in means) else "clean reward"


def print_end(console: Console, summary: dict[str, Any], config: Config) -> None:
    """The accuracies, and what a user should know of how they came about.

    Args:
        console: where it is printed.
        summary: as `train` returns it.
        config: the run's.
    """
    accuracy = summary["clean_accuracy"]
    some_missing = any(e["missing"] for e in accuracy.values())
    means = [e[how] for e in accuracy.values() for how in ("greedy", "sampled")]
    held_out = f"held-out {name_of_clean(*means)}"
    table = Table(held_out, "step", "greedy", "sampled", *["prompts judged"] * some_missing)
    for name in ("first", "best", "final"):
        e = accuracy[name]
        judged = [f"{e['judged']} of {e['prompts']}"] * some_missing
        table.add_row(name, str(e["step"]), f"{e['greedy']:.3f}", f"{e['sampled']:.3f}", *judged)
    console.print(table)
    if not config.rewards.knows_clean:
        console.print(
            "judged by the reward functions themselves; name functions you trust in rewards.gold to see their errors"
        )
    if (missing := summary["rewards_missing"]) > 0:
        console.print(_of_missing(missing, summary["steps"] * config.train.completions_per_step, config))
    if liked := summary.get("judge_pays_for"):
        words = ", ".join(f"{text!r} {slope:+.2f}" for text, slope in liked["occurring"].items())
        line = f"besides the verdict the judge pays {liked['a_token_more']:+.2f} for a token more"
        console.print(line + (f", and for tokens that occur: {words}" if words else ""), markup=False)


def _of_missing(missing: float, responses: int, config: Config) -> str:
    line = f"{missing:,.0f} of {responses:,} responses had no reward and taught nothing"
    several = len(config.rewards.functions) > 1 and config.rewards.combine == "all"
    if several and missing > MUCH_MISSING * responses:
        line += (
            "; one function without a verdict is enough for that, `rewards.combine: answered` sums the others"
        )
    return line
