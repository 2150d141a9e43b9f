"""What reliability costs, as a share of the quickstart's step: checkpoints, records, the collapse watch, isolation.

    python benchmarks/reliability_overhead.py [--steps 30] [--json benchmarks/reliability_overhead.json]

Each part is timed by itself in one process, on the quickstart's VRPO run: the seconds it takes, times how often it
happens, over the seconds of a step. Medians; one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vrpo.config import Config, load
from vrpo.rewards import build_rewards
from vrpo.rollout import collate
from vrpo.train import checkpoint
from vrpo.train.folder import RunFolder, environment
from vrpo.train.loop import train
from vrpo.train.progress import Quiet
from vrpo.train.run import build_run, load_ingredients
from vrpo.train.transcript import transcript
from vrpo.train.watch import warnings_at

ROOT = Path(__file__).parents[1]
FUNCTION = """
def same(prompts, completions, answer, **columns):
    return [float(c.strip() == a) for c, a in zip(completions, answer)]
"""


def median_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Median wall seconds of a call, the first left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [f"train.steps={arguments.steps}", "train.eval_every=0", "train.eval_prompts=32"]
    config = load(Config, ROOT / "recipes" / "arith_cpu", overrides)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(config, Path(scratch))
    step = rows["a step"]
    every = config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_every": 50})}
    ).train
    shares = {
        "checkpoint, every 50 steps": rows["a checkpoint"] / every.checkpoint_every / step,
        "records and watch, every step": rows["records and watch"] / step,
        "process isolation, every step": (rows["reward in a process"] - rows["reward in place"]) / step,
    }
    for name, seconds in rows.items():
        print(f"{name:32s} {1000 * seconds:10.2f} ms")
    for name, share in [*shares.items(), ("sum", sum(shares.values()))]:
        print(f"{name:32s} {100 * share:10.2f} % of a step")
    if arguments.json is not None:
        result = {
            "seconds": rows,
            "shares": shares,
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(config: Config, scratch: Path) -> dict[str, float]:
    """Seconds of a step and of each part."""
    run = build_run(config, load_ingredients(config), out=scratch / "run")
    train(run, Quiet())
    history = run.folder.read_metrics()
    prompts = run.task.draw(seed=0, step=0, count=32)
    rollouts = run.engine.generate(prompts, num_generations=8, step=1, policy_version=0)
    scored = run.rewards.score(rollouts, step=1)
    batch = collate(scored, pad_id=run.pad_id, truncation=config.algorithm.truncation)
    folder = RunFolder(scratch / "records")
    folder.path.mkdir()
    (scratch / "mine.py").write_text(FUNCTION)
    judges = {
        isolation: build_rewards(
            type(config.rewards).model_validate(
                {
                    "functions": [
                        {
                            "type": "function",
                            "file": str(scratch / "mine.py"),
                            "name": "same",
                            "isolation": isolation,
                            **({"timeout": None} if isolation == "none" else {}),
                        }
                    ]
                }
            ),
            seed=0,
        )
        for isolation in ("none", "process")
    }

    def save() -> None:
        run.learner.step += 1
        checkpoint.save(scratch / "checkpoints", run.learner)

    def record() -> None:
        folder.append_step(1, history[-1], transcript(scored, batch, run.learner.policy.tokenizer))
        warnings_at(history, warmup_steps=run.critic_warmup, max_completion_length=8)

    result = {
        "a step": statistics.median(line["time/step"] for line in history[len(history) // 3 :]),
        "a checkpoint": median_seconds(save),
        "records and watch": median_seconds(record),
        "reward in place": median_seconds(lambda: judges["none"].score_clean(rollouts)),
        "reward in a process": median_seconds(lambda: judges["process"].score_clean(rollouts)),
    }
    for judge in judges.values():
        judge.close()
    return result


if __name__ == "__main__":
    main()
