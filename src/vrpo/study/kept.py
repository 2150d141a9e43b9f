"""How much of what it gains with clean rewards a method keeps under noise: `python -m vrpo.study.kept NOISY.json CLEAN.json`.

Both are records that `vrpo study --record` wrote, of methods with equal names; of the second its first noise kind counts. Where
their seeds are the same, these are drawn again together for the interval.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrpo.study.statistics import Estimate, share_kept


def shares(
    noisy: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], Estimate]:
    """Noise kind and method -> share of its gain in greedy accuracy that it keeps.

    Args:
        noisy: the rows of a record.
        clean: those of another, of one noise kind; methods that it lacks are left out.
    """
    of_clean = {row["method"]: row for row in clean}
    return {
        (row["noise"], row["method"]): share_kept(
            row["final_greedy_by_seed"],
            of_clean[row["method"]]["final_greedy_by_seed"],
            before=row["first_greedy"]["value"],
            paired=row["seeds"] == of_clean[row["method"]]["seeds"],
        )
        for row in noisy
        if row["method"] in of_clean
    }


def main(noisy: Path, clean: Path) -> None:
    """Print a line for every noise kind and method whose method both records have."""
    rows = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in (noisy, clean)]
    for (noise, method), kept in shares(
        rows[0], [row for row in rows[1] if row["noise"] == rows[1][0]["noise"]]
    ).items():
        interval = "" if kept.low is None or kept.high is None else f" ({kept.low:.0%}-{kept.high:.0%})"
        print(f"{noise}, {method}: {kept.value:.0%}{interval} of the gain with clean rewards kept")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python -m vrpo.study.kept NOISY.json CLEAN.json", file=sys.stderr)
        sys.exit(2)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"{error!r}: two records of `vrpo study --record FILE` are needed", file=sys.stderr)
        sys.exit(2)
