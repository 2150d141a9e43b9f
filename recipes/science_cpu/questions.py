"""Questions about the periodic table with four choices, as rows for `task: {type: choice}`.

    python recipes/science_cpu/questions.py data/science

writes train.jsonl, held_out.jsonl and known.jsonl, the same on every machine. All three ask the same 415 facts: what an element's
number, period or group is, which element has a number, which one comes next. A question is held out with its choices, not its
fact: a fact cannot be found out from others. known.jsonl has the rows of train.jsonl on three fifths of the facts, for a warm start
that leaves the rest to be learned from rewards.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

SYMBOLS = [
    "H",
    "He",
    "Li",
    "Be",
    "B",
    "C",
    "N",
    "O",
    "F",
    "Ne",
    "Na",
    "Mg",
    "Al",
    "Si",
    "P",
    "S",
    "Cl",
    "Ar",
    "K",
    "Ca",
    "Sc",
    "Ti",
    "V",
    "Cr",
    "Mn",
    "Fe",
    "Co",
    "Ni",
    "Cu",
    "Zn",
    "Ga",
    "Ge",
    "As",
    "Se",
    "Br",
    "Kr",
    "Rb",
    "Sr",
    "Y",
    "Zr",
    "Nb",
    "Mo",
    "Tc",
    "Ru",
    "Rh",
    "Pd",
    "Ag",
    "Cd",
    "In",
    "Sn",
    "Sb",
    "Te",
    "I",
    "Xe",
    "Cs",
    "Ba",
    "La",
    "Ce",
    "Pr",
    "Nd",
    "Pm",
    "Sm",
    "Eu",
    "Gd",
    "Tb",
    "Dy",
    "Ho",
    "Er",
    "Tm",
    "Yb",
    "Lu",
    "Hf",
    "Ta",
    "W",
    "Re",
    "Os",
    "Ir",
    "Pt",
    "Au",
    "Hg",
    "Tl",
    "Pb",
    "Bi",
    "Po",
    "At",
    "Rn",
]
"""By atomic number, from 1."""
NOBLE = (0, 2, 10, 18, 36, 54, 86)
"""The last atomic number of each period, from period 0."""
SETS, HELD_OUT = 60, 4
"""Sets of choices a fact is asked with, and how many of them are held out."""
KNOWN = 0.6
"""Share of the facts in known.jsonl."""


class Fact(NamedTuple):
    """A question, its answer, and what else may stand among the choices."""

    question: str
    right: str
    wrong: list[str]


def period(number: int) -> int:
    """Of the element with that atomic number."""
    return next(row for row, last in enumerate(NOBLE) if number <= last)


def group(number: int) -> int | None:
    """1 to 18; None for the lanthanides after lanthanum, which have none."""
    row = period(number)
    from_left, from_right = number - NOBLE[row - 1], NOBLE[row] - number
    if from_left <= 2 and symbol_of(number) != "He":
        return from_left
    if 57 < number <= 71:
        return None
    return 3 if number == 57 else 18 - from_right


def symbol_of(number: int) -> str:
    """Of the element with that atomic number."""
    return SYMBOLS[number - 1]


def facts() -> list[Fact]:
    """All of them, element by element; wrong choices are near the right one."""
    found = []
    for number, symbol in enumerate(SYMBOLS, 1):
        near = [other for other in range(number - 8, number + 9) if 0 < other <= len(SYMBOLS)]
        names = {other: symbol_of(other) for other in near}
        found.append(_fact(f"{symbol} Z?", str(number), map(str, near)))
        found.append(_fact(f"Z={number}?", symbol, names.values()))
        found.append(_fact(f"{symbol} period?", str(period(number)), map(str, range(1, 7))))
        if (column := group(number)) is not None:
            found.append(_fact(f"{symbol} group?", str(column), map(str, range(1, 19))))
        if number < len(SYMBOLS):
            found.append(_fact(f"after {symbol}?", names[number + 1], names.values()))
    return found


def _fact(question: str, right: str, choices: Iterable[str]) -> Fact:
    return Fact(question, right, [choice for choice in choices if choice != right])


def _rows(fact: Fact, rng: Random) -> list[str]:
    rows = []
    for number in range(SETS):
        choices = [fact.right, *rng.sample(fact.wrong, 3)]
        rng.shuffle(choices)
        row = {"id": f"{fact.question}{number}", "question": fact.question, "choices": choices}
        rows.append(json.dumps(row | {"answer": "ABCD"[choices.index(fact.right)], "text": fact.right}))
    return rows


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    files: dict[str, list[str]] = {"train": [], "held_out": [], "known": []}
    for fact in facts():
        rows = _rows(fact, rng)
        files["held_out"] += rows[:HELD_OUT]
        files["train"] += rows[HELD_OUT:]
        if hashlib.sha256(fact.question.encode()).digest()[0] < 256 * KNOWN:
            files["known"] += rows[HELD_OUT:]
    for name, rows in files.items():
        rng.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
