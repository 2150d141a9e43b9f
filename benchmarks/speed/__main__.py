"""Training steps and sampling beside TRL and `generate`, the same work on the same cores, in alternating rounds.

    python -m benchmarks.speed tiny [--rounds 5] [--json benchmarks/results/speed_tiny.json]
    python -m benchmarks.speed smollm2 --model models/SmolLM2-135M-Instruct

A round runs every worker once, each in a process of its own; ratios are taken within a round.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from benchmarks.speed import workload
from benchmarks.speed.table import print_table
from vrpo.train.folder import environment

HERE = Path(__file__).parent
SCRATCH = HERE.parents[1] / "runs" / "benchmarks"
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


def main() -> None:
    """Run the comparison, print the table, write the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=["tiny", "smollm2"])
    parser.add_argument(
        "--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="smollm2's folder"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workers", nargs="+", choices=WORKERS, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    work = workload.tiny(SCRATCH) if arguments.size == "tiny" else workload.smollm2(SCRATCH, arguments.model)
    job = {
        "model": str(work.model),
        "prompts": str(work.prompts),
        "group": workload.GROUP,
        "prompt_tokens": workload.PROMPT_TOKENS,
        "new_tokens": workload.NEW_TOKENS,
        "warmup": 1,
        "steps": work.steps,
        "threads": arguments.threads,
        "scratch": str(SCRATCH),
    }
    names = arguments.workers or work.workers
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds or work.rounds):
        rounds.append({name: run(name, job) for name in names})
        print(
            f"round {number + 1}: " + ", ".join(f"{n} {median_cpu(r):.2f} s" for n, r in rounds[-1].items())
        )
    print_table(rounds)
    if arguments.json is not None:
        record = {
            "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "vrpo": {k: v for k, v in environment().items() if k in ("versions", "commit")},
            "job": {k: v for k, v in job.items() if k not in ("model", "prompts", "scratch")},
            "rounds": rounds,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def median_cpu(result: dict[str, Any]) -> float:
    """Processor seconds of a step."""
    return statistics.median(result["cpu"])


def run(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One worker in a process of its own; what it printed last."""
    script, requirements, extra = WORKERS[name]
    python = sys.executable if requirements is None else peer_python(requirements)
    done = subprocess.run(
        [python, str(HERE / "workers" / script), json.dumps(job | extra)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def peer_python(requirements: str) -> str:
    """The interpreter of a peer's environment, made on first use; VRPO_BENCH_<NAME> names one that exists."""
    given = os.environ.get("VRPO_BENCH_" + requirements.upper().replace("-", "_").replace(".", "_"))
    if given:
        return given
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


if __name__ == "__main__":
    main()
