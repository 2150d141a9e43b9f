"""Benchmarks still run: in their short forms, which measure nothing. Of those that have none, that what they import is there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["benchmarks.long_prompts", "--quick"], ["0.9 M        32", "small        32"]),
        (
            [
                "benchmarks.speed",
                "gpu",
                "--device",
                "cpu",
                "--quick",
                "--parts",
                "peaks",
                "generate",
                "update",
            ],
            ["vrpo without graphs", "generate", "read once", "with each"],
        ),
        (["benchmarks.memory", "--help"], ["--new-tokens"]),
        (["benchmarks.reliability_overhead", "--help"], ["--steps"]),
    ],
    ids=["long prompts", "gpu", "memory", "reliability"],
)
def test_it_runs_and_prints_its_rows(arguments, rows):
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row for row in rows if row not in done.stdout] == []
