"""How much of what it gains with clean rewards a method keeps under noise: `python -m vrpo.study.kept NOISY.json CLEAN.json`.

Both are records that `vrpo study --record` wrote, of methods with equal names; of the second its first noise kind counts. Where
their seeds are the same, these are drawn again together for the interval.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrpo.errors import ConfigError
from vrpo.study.statistics import interquartile_mean, share_kept

Row = Mapping[str, Any]
"""Of a record: one method under one noise kind."""


def of_both(noisy: Sequence[Row], clean: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of the first record, each with the one of its method in the other.

    Args:
        noisy: the rows of a record.
        clean: those of another, of one noise kind; methods that it lacks are left out.

    Raises:
        ConfigError: they have no method in common, or did not start from one model and task.
    """
    of_clean = {row["method"]: row for row in clean}
    pairs = [(row, of_clean[row["method"]]) for row in noisy if row["method"] in of_clean]
    if not pairs:
        here, there = (", ".join(dict.fromkeys(row["method"] for row in rows)) for rows in (noisy, clean))
        raise ConfigError(
            f"one record is of {here}, the other of {there}; give two that have a method in common"
        )
    for row, other in pairs:
        first, second = row["first_greedy"]["value"], other["first_greedy"]["value"]
        if first != second:
            raise ConfigError(
                f"{row['method']} starts at accuracy {first:g} in one record and {second:g} in the other, so that model or task is "
                "not the same; give two records with one base"
            )
    return pairs


def main(noisy: Path, clean: Path) -> None:
    """Print a line for every noise kind and method whose method both records have.

    Raises:
        ConfigError: the records do not go together, or a method gained nothing with clean rewards; the others are printed before.
    """
    rows, of_clean = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in (noisy, clean))
    nothing: dict[str, str] = {}
    for row, other in of_both(rows, [one for one in of_clean if one["noise"] == of_clean[0]["noise"]]):
        method, before = row["method"], row["first_greedy"]["value"]
        ours, theirs = row["final_greedy_by_seed"], other["final_greedy_by_seed"]
        after = interquartile_mean(theirs).value
        if after <= before:
            nothing[method] = f"{method} gained {after - before:+.3f} (from {before:.3f} to {after:.3f})"
            continue
        kept = share_kept(ours, theirs, before=before, paired=row["seeds"] == other["seeds"])
        interval = "" if kept.low is None or kept.high is None else f" ({kept.low:.0%}-{kept.high:.0%})"
        print(f"{row['noise']}, {method}: {kept.value:.0%}{interval} of the gain with clean rewards kept")
    if nothing:
        raise ConfigError(
            f"with clean rewards {', '.join(nothing.values())}: a share is of a gain above 0; give a record of runs that learned"
        )


def run(arguments: Sequence[str]) -> int:
    """The command: its exit status."""
    if len(arguments) != 2:
        print("usage: python -m vrpo.study.kept NOISY.json CLEAN.json", file=sys.stderr)
        return 2
    try:
        main(Path(arguments[0]), Path(arguments[1]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        print(
            f"{' '.join(arguments)}: {error!r}; give two records of `vrpo study --record FILE`",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
