"""Training steps and sampling beside TRL and `generate`, the same work on the same cores, in alternating rounds.

A round runs every worker once, each in a process of its own; ratios are taken within a round.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from benchmarks.speed import workload
from benchmarks.speed.table import print_table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRATCH = ROOT / "runs" / "benchmarks"
WORKERS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "trl-grpo": ("trl_grpo.py", "trl-1.16", {}),
    "trl-ppo": ("trl_ppo.py", "trl-1.12", {}),
    "hf-generate": ("hf_generate.py", "trl-1.16", {}),
    "vrpo-grpo": ("vrpo_steps.py", None, {"algorithm": "grpo"}),
    "vrpo-ppo": ("vrpo_steps.py", None, {"algorithm": "ppo"}),
    "vrpo-ppo-shared": ("vrpo_steps.py", None, {"algorithm": "ppo", "settings": {"critic.trunk": "policy"}}),
    "vrpo-vrpo": ("vrpo_steps.py", None, {"algorithm": "vrpo"}),
}
"""Name -> script, the requirements file of its environment (None: this one), what the job adds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    smollm2 = ROOT / "models" / "SmolLM2-135M-Instruct"
    parser.add_argument("--size", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--model", type=Path, default=smollm2, help="smollm2's folder")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="timed steps of a worker in a round")
    parser.add_argument("--workers", nargs="+", choices=WORKERS, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="a setting of every vrpo worker"
    )
    parser.add_argument("--json", type=Path, help="where every raw number is written")


def compare(arguments: argparse.Namespace) -> None:
    """Run the comparison, print the table, write the numbers."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    tiny = arguments.size == "tiny"
    work = workload.tiny(SCRATCH) if tiny else workload.smollm2(SCRATCH, arguments.model)
    job = {
        "model": str(work.model),
        "prompts": str(work.prompts),
        "group": workload.GROUP,
        "prompt_tokens": workload.PROMPT_TOKENS,
        "new_tokens": workload.NEW_TOKENS,
        "warmup": 1,
        "steps": arguments.steps or work.steps,
        "threads": arguments.threads,
        "scratch": str(SCRATCH),
    }
    settings = dict(setting(text) for text in arguments.set)
    names = arguments.workers or work.workers
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds or work.rounds):
        rounds.append({name: run(name, job, settings) for name in names})
        seconds = ", ".join(f"{n} {median_cpu(r):.2f} s" for n, r in rounds[-1].items())
        print(f"round {number + 1}: {seconds}", flush=True)
    print_table(rounds)
    if arguments.json is not None:
        record = {
            **provenance(),
            "job": {k: v for k, v in job.items() if k not in ("model", "prompts", "scratch")},
            "size": arguments.size,
            "settings": settings,
            "rounds": rounds,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def setting(text: str) -> tuple[str, Any]:
    """`a.b=value`, the value read as JSON where it is any."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        sys.exit(f"--set {text!r}: write section.name=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def provenance() -> dict[str, Any]:
    """Command, date, machine and commit; the workers tell their versions themselves."""
    return {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit, `-dirty` where tracked files differ from it; None outside a repository or without git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def median_cpu(result: dict[str, Any]) -> float:
    """Processor seconds of a step."""
    return statistics.median(result["cpu"])


def run(name: str, job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One worker in a process of its own; what it printed last."""
    script, requirements, extra = WORKERS[name]
    variables = dict(os.environ)
    if requirements is None:
        python = sys.executable
        extra = extra | {"settings": extra.get("settings", {}) | settings}
    else:
        given = given_python(name)
        python = given or made_python(requirements)
        if given is None:  # one that was named may find its packages on the search path
            variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(HERE / "workers" / script), json.dumps(job | extra)],
        capture_output=True,
        text=True,
        check=False,
        env=variables | {"OMP_NUM_THREADS": str(job["threads"])},
    )
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def given_python(name: str) -> str | None:
    """The interpreter that a variable names for this peer."""
    owner = "TRL_PPO" if name == "trl-ppo" else "TRL_GRPO"
    return os.environ.get(f"VRPO_BENCH_{owner}_PYTHON") or None


def made_python(requirements: str) -> str:
    """The interpreter of a peer's environment, made on first use."""
    folder = SCRATCH / "venvs" / requirements
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the environment of {requirements} ...")
        venv.create(folder, with_pip=True)
        file = HERE / "requirements" / f"{requirements}.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", file], check=True)
    return str(python)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
