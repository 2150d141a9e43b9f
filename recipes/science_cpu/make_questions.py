"""Writes eval.jsonl, train.jsonl and warmstart.jsonl: multiple-choice questions about the periodic table.

    python recipes/science_cpu/make_questions.py

A fact (iron has atomic number 26) is asked with several sets of wrong choices. The files ask about the same facts with
other choices or in another order, so a policy is scored on what it knows, not on which letter it has seen. The warm start's
file leaves out a share of the facts, which are left for reinforcement learning to find out; it is large and not kept in
the repository.
"""

import json
from bisect import bisect_left
from math import comb, factorial
from pathlib import Path
from typing import Any

from vrpo.rng import stream

NAMES = [
    "H",
    "hydrogen",
    "He",
    "helium",
    "Li",
    "lithium",
    "Be",
    "beryllium",
    "B",
    "boron",
    "C",
    "carbon",
    "N",
    "nitrogen",
    "O",
    "oxygen",
    "F",
    "fluorine",
    "Ne",
    "neon",
    "Na",
    "sodium",
    "Mg",
    "magnesium",
    "Al",
    "aluminium",
    "Si",
    "silicon",
    "P",
    "phosphorus",
    "S",
    "sulfur",
    "Cl",
    "chlorine",
    "Ar",
    "argon",
    "K",
    "potassium",
    "Ca",
    "calcium",
    "Sc",
    "scandium",
    "Ti",
    "titanium",
    "V",
    "vanadium",
    "Cr",
    "chromium",
    "Mn",
    "manganese",
    "Fe",
    "iron",
    "Co",
    "cobalt",
    "Ni",
    "nickel",
    "Cu",
    "copper",
    "Zn",
    "zinc",
    "Ga",
    "gallium",
    "Ge",
    "germanium",
    "As",
    "arsenic",
    "Se",
    "selenium",
    "Br",
    "bromine",
    "Kr",
    "krypton",
    "Rb",
    "rubidium",
    "Sr",
    "strontium",
    "Y",
    "yttrium",
    "Zr",
    "zirconium",
    "Nb",
    "niobium",
    "Mo",
    "molybdenum",
    "Tc",
    "technetium",
    "Ru",
    "ruthenium",
    "Rh",
    "rhodium",
    "Pd",
    "palladium",
    "Ag",
    "silver",
    "Cd",
    "cadmium",
    "In",
    "indium",
    "Sn",
    "tin",
    "Sb",
    "antimony",
    "Te",
    "tellurium",
    "I",
    "iodine",
    "Xe",
    "xenon",
    "Cs",
    "caesium",
    "Ba",
    "barium",
    "La",
    "lanthanum",
    "Ce",
    "cerium",
    "Pr",
    "praseodymium",
    "Nd",
    "neodymium",
    "Pm",
    "promethium",
    "Sm",
    "samarium",
    "Eu",
    "europium",
    "Gd",
    "gadolinium",
    "Tb",
    "terbium",
    "Dy",
    "dysprosium",
    "Ho",
    "holmium",
    "Er",
    "erbium",
    "Tm",
    "thulium",
    "Yb",
    "ytterbium",
    "Lu",
    "lutetium",
    "Hf",
    "hafnium",
    "Ta",
    "tantalum",
    "W",
    "tungsten",
    "Re",
    "rhenium",
    "Os",
    "osmium",
    "Ir",
    "iridium",
    "Pt",
    "platinum",
    "Au",
    "gold",
    "Hg",
    "mercury",
    "Tl",
    "thallium",
    "Pb",
    "lead",
    "Bi",
    "bismuth",
    "Po",
    "polonium",
    "At",
    "astatine",
    "Rn",
    "radon",
    "Fr",
    "francium",
    "Ra",
    "radium",
    "Ac",
    "actinium",
    "Th",
    "thorium",
    "Pa",
    "protactinium",
    "U",
    "uranium",
    "Np",
    "neptunium",
    "Pu",
    "plutonium",
    "Am",
    "americium",
    "Cm",
    "curium",
    "Bk",
    "berkelium",
    "Cf",
    "californium",
    "Es",
    "einsteinium",
    "Fm",
    "fermium",
    "Md",
    "mendelevium",
    "No",
    "nobelium",
    "Lr",
    "lawrencium",
    "Rf",
    "rutherfordium",
    "Db",
    "dubnium",
    "Sg",
    "seaborgium",
    "Bh",
    "bohrium",
    "Hs",
    "hassium",
    "Mt",
    "meitnerium",
    "Ds",
    "darmstadtium",
    "Rg",
    "roentgenium",
    "Cn",
    "copernicium",
    "Nh",
    "nihonium",
    "Fl",
    "flerovium",
    "Mc",
    "moscovium",
    "Lv",
    "livermorium",
    "Ts",
    "tennessine",
    "Og",
    "oganesson",
]
SYMBOLS = dict(zip(NAMES[::2], NAMES[1::2], strict=True))
NOBLE = (2, 10, 18, 36, 54, 86, 118)
"""Atomic numbers that end a period."""
QUESTIONS = {"eval": 1, "train": 12, "warmstart": 120}
"""Of each fact, file by file."""
CHOICES = 4
UNTAUGHT = 0.4
"""Share of the facts that the warm start leaves out."""


def place(number: int) -> tuple[int, int | None, str]:
    """(period, group or None in the f block, block) of the element with this atomic number.

    Examples: iron, 26: (4, 8, "d"); helium, 2: (1, 18, "s"); uranium, 92: (7, None, "f").
    """
    period = bisect_left(NOBLE, number) + 1
    column = number - (NOBLE[period - 2] if period > 1 else 0)  # counted from 1 within the period
    from_end = NOBLE[period - 1] - number
    if number == 2:
        return 1, 18, "s"
    if column <= 2:
        return period, column, "s"
    if from_end < 6:
        return period, 18 - from_end, "p"
    if from_end < 16:
        return period, 18 - from_end, "d"
    return period, None, "f"


def facts() -> list[tuple[str, str, list[str]]]:
    """(question, answer, every answer such a question can have)."""
    numbers, symbols = [str(i + 1) for i in range(len(SYMBOLS))], list(SYMBOLS)
    found = []
    for number, (symbol, name) in enumerate(SYMBOLS.items(), start=1):
        period, group, block = place(number)
        near = [n for n in numbers if abs(int(n) - number) <= 10]
        found.append((f"Atomic number of {symbol}?", str(number), near))
        found.append((f"Symbol of {name}?", symbol, symbols))
        found.append((f"Period of {symbol}?", str(period), [str(i) for i in range(1, 8)]))
        found.append((f"Block of {symbol}?", block, list("spdf")))
        if group is not None:
            found.append((f"Group of {symbol}?", str(group), [str(i) for i in range(1, 19)]))
    return found


def questions(split: str, count: int, taken: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """`count` questions a fact, or half of what is left; none with choices and order that `taken` has, and added to it."""
    rows = []
    for question, answer, possible in facts():
        if split == "warmstart" and stream(0, "elements", "untaught", question).random() < UNTAUGHT:
            continue
        generator = stream(0, "elements", split, question)
        wrong = [text for text in possible if text != answer]
        used = sum(1 for other in taken if other[0] == question)
        left = comb(len(wrong), CHOICES - 1) * factorial(CHOICES) - used
        made = 0
        while made < min(count, left // 2):
            choices = [answer, *generator.choice(wrong, CHOICES - 1, replace=False).tolist()]
            choices = [choices[i] for i in generator.permutation(CHOICES)]
            if (question, *choices) in taken:
                continue
            taken.add((question, *choices))
            letter = "ABCD"[choices.index(answer)]
            row_id = f"{split}-{len(rows)}"
            columns = {"question": question, "choices": choices, "answer": letter, "text": answer}
            rows.append({"id": row_id} | columns)
            made += 1
    return rows


def main() -> None:
    """Write the files beside this one."""
    taken: set[tuple[str, ...]] = set()
    for split, count in QUESTIONS.items():
        rows = questions(split, count, taken)
        path = Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
