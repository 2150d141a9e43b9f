"""Figures from records instead of runs: `python -m vrpo.study.redraw noise|sharpness FILE.png RECORD.json [RECORD.json ...]`.

A record is what `vrpo study --record` wrote; runs are large and need not be kept. `noise` has final accuracies under every noise kind of
all records, `sharpness` sampled accuracy over entropy. Methods are those of the first record. Each record's study is read too, from where
its command says, for what its noise kinds are: run this in the folder those commands were run in.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vrpo.errors import ConfigError
from vrpo.study.config import Cell, read_study
from vrpo.study.figure import accuracy_against_entropy, accuracy_against_noise
from vrpo.study.results import Row
from vrpo.study.statistics import Estimate

KINDS = ("noise", "sharpness")


def read_record(path: Path) -> tuple[list[Cell], list[Row]]:
    """The cells of a record's study and the record's rows.

    Raises:
        ConfigError: it is no record, its study is not there, or the study has no such method or noise kind.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if lacking := _lacking(kept):
            raise ConfigError(f"{path} {lacking}; give records of `vrpo study --record FILE`")
        words = shlex.split(kept["command"])
        study, overrides = Path(words[2]), _overrides(words[3:])
        rows = [_row(row) for row in kept["rows"]]
    except ConfigError:  # which is a ValueError too
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error!r}; give records of `vrpo study --record FILE`") from error
    _, cells = read_study(study, overrides)
    known = {(cell.method, cell.noise) for cell in cells}
    for row in rows:
        if (row.method, row.noise) not in known:
            raise ConfigError(
                f"{path} has {row.method!r} under {row.noise!r} and {study} has not; give records of studies as they are"
            )
    # a record may be of the cells that were finished
    return [cell for cell in cells if cell.noise in {row.noise for row in rows}], rows


def _lacking(kept: Mapping[str, Any]) -> str | None:
    """What a file of numbers lacks to be a study's record, such as one that was written by hand; None: nothing that is known here."""
    command = kept.get("command")
    if not isinstance(command, str) or shlex.split(command)[:2] != ["vrpo", "study"]:
        return f"says that it is of {command!r:.60}, which is no `vrpo study STUDY`"
    for row in kept["rows"]:
        if absent := [name for name in ("method", "noise", "seeds") if name not in row]:
            return f"has a row without {' and '.join(map(repr, absent))}"
        if not isinstance(row.get("final_greedy"), dict):
            return "has a row whose 'final_greedy' is no estimate over seeds"
    return None


def _overrides(words: Sequence[str]) -> list[str]:
    """What a command sets with --set."""
    return [word for option, word in pairwise(words) if option == "--set"] + [
        word.removeprefix("--set=") for word in words if word.startswith("--set=")
    ]


def figure_of(kind: str, records: Mapping[Path, tuple[Sequence[Cell], Sequence[Row]]]) -> Figure:
    """One figure of all records.

    Args:
        kind: one of `KINDS`.
        records: path -> what `read_record` gives. A noise kind that two have gets the name of its recipe's folder, and of its record
            if they are in one folder and have a method in common.

    Raises:
        ConfigError: `sharpness` of a record without temperatures.
    """
    of_first = {row.method for row in next(iter(records.values()))[1]}
    cells: list[Cell] = []
    rows: list[Row] = []
    for path, (its_cells, its_rows) in records.items():
        told = {row.noise: _told(row.noise, path, records) for row in its_rows}
        cells += [replace(c, noise=told[c.noise]) for c in its_cells if c.method in of_first]
        rows += [replace(r, noise=told[r.noise]) for r in its_rows if r.method in of_first]
    if kind == "noise":
        return accuracy_against_noise(cells, rows)
    if lacking := [row for row in rows if row.estimates.get("equal_entropy") is None]:
        raise ConfigError(
            f"{lacking[0].method} under {lacking[0].noise!r} was not sampled at several temperatures; give records of studies with "
            "`temperatures`"
        )
    return accuracy_against_entropy(rows, cells)


def _told(noise: str, path: Path, records: Mapping[Path, tuple[Sequence[Cell], Sequence[Row]]]) -> str:
    """A noise kind's name, and whose it is if other records have one of that name too.

    Records of one folder that have it for different methods belong together: they are as one.
    """

    def methods(record: Path) -> set[str]:
        return {row.method for row in records[record][1] if row.noise == noise}

    others = [
        other
        for other in records
        if other != path
        and methods(other)
        and (other.parent != path.parent or methods(other) & methods(path))
    ]
    if not others:
        return noise
    beside = any(other.parent == path.parent for other in others)
    return f"{noise}, {path.parent.name}" + f", {path.stem}" * beside


def _row(row: Mapping[str, Any]) -> Row:
    estimates = {
        name: Estimate(**value)
        for name, value in row.items()
        if isinstance(value, dict) and value.keys() == {"value", "low", "high"}
    }
    return Row(
        method=row["method"], noise=row["noise"], seeds=tuple(row["seeds"]), values={}, estimates=estimates
    )


def run(arguments: Sequence[str]) -> int:
    """The command: its exit status."""
    if len(arguments) < 3 or arguments[0] not in KINDS or not arguments[1].endswith((".png", ".svg")):
        print(
            "usage: python -m vrpo.study.redraw noise|sharpness FILE.png|FILE.svg RECORD.json [...]",
            file=sys.stderr,
        )
        return 2
    kind, out, *paths = arguments
    try:
        figure_of(kind, {Path(path): read_record(Path(path)) for path in paths}).savefig(out, dpi=150)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
