"""The questions of recipes/science_cpu: facts by hand, and what may stand in which file."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes/science_cpu/questions.py"


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("questions", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("symbol", "number", "period", "group"),
    [
        ("H", 1, 1, 1),
        ("He", 2, 1, 18),
        ("Be", 4, 2, 2),
        ("Al", 13, 3, 13),
        ("Fe", 26, 4, 8),
        ("Xe", 54, 5, 18),
        ("La", 57, 6, 3),
        ("Ce", 58, 6, None),
        ("Lu", 71, 6, None),
        ("Hf", 72, 6, 4),
        ("Au", 79, 6, 11),
        ("Rn", 86, 6, 18),
    ],
)
def test_the_periodic_table_by_hand(script, symbol, number, period, group):
    assert script.symbol_of(number) == symbol
    assert (script.period(number), script.group(number)) == (period, group)
    asked = {fact.question: fact.right for fact in script.facts()}
    assert asked[f"{symbol} Z?"] == str(number) and asked[f"Z={number}?"] == symbol
    assert asked.get(f"{symbol} group?") == (None if group is None else str(group))


def test_rows_are_answerable_and_files_apart(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True, capture_output=True)
    files = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out", "known")
    }
    for row in files["train"] + files["held_out"]:
        assert row["choices"]["ABCD".index(row["answer"])] == row["text"]
        assert len(set(row["choices"])) == 4
    letters = [row["answer"] for row in files["train"]]
    assert all(0.23 < letters.count(letter) / len(letters) < 0.27 for letter in "ABCD")
    ids = {name: {row["id"] for row in rows} for name, rows in files.items()}
    assert not ids["train"] & ids["held_out"]
    assert ids["known"] < ids["train"]
    asked = {name: {row["question"] for row in rows} for name, rows in files.items()}
    assert asked["train"] == asked["held_out"] and len(asked["train"]) == 415
    assert 0.5 < len(asked["known"]) / 415 < 0.7
