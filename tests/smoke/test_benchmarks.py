"""Benchmarks still run: in their short forms, which measure nothing."""

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
    ],
    ids=["long prompts", "gpu"],
)
def test_it_runs_and_prints_its_rows(arguments, rows):
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row for row in rows if row not in done.stdout] == []
