"""The short form of the kill test, and proof that it can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
ROOT = Path(__file__).parents[2]


def kill_test(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kill.kill_test", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_runs_end_as_the_uninterrupted_one():
    done = kill_test("--kills", "6", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills in" in done.stdout


def test_a_resume_that_changes_one_weight_is_caught():
    done = kill_test("--kills", "3", "--case", "grpo", "--break-resume", "--signal", "kill")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs" in done.stdout
