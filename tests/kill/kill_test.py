"""Kills real runs at random points, resumes them, and compares the end with a run that was never killed.

    python -m tests.kill.kill_test --kills 100 [--seed 0] [--signal kill|stop|mixed] [--case NAME] [--json FILE]

The parent imports everything once and forks a child for each life of a run, so that a kill costs a second and not five.
`kill` is SIGKILL at a random moment, or at a random entry of one place of the code (inside a checkpoint, between two
records, while resuming, ...). `stop` is SIGTERM or SIGINT, sometimes followed by a second one.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import vrpo.train
from vrpo.config import Config, build
from vrpo.config.presets import merge
from vrpo.train import checkpoint, folder, loop, run
from vrpo.train.files import read_lines
from vrpo.train.folder import environment
from vrpo.train.progress import Quiet
from vrpo.train.signals import Stopped

WALL_CLOCK = ("time/", "tokens_per_second/", "memory/")
STUCK_SECONDS = 120.0
STEPS = 8
BASE = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic", "min_digits": 2, "max_digits": 2},
    "rewards": {
        "functions": [{"type": "exact"}],
        "noise": [{"type": "flip", "false_positive": 0.3, "false_negative": 0.2}],
    },
    "rollout": {"num_generations": 4, "max_completion_length": 6},
    "critic": {"warmup_steps": 2, "epochs": 2, "learning_rate": 5e-4},
    "train": {
        "steps": STEPS,
        "completions_per_step": 32,
        "minibatch": 16,
        "microbatch": 8,
        "epochs": 2,
        "learning_rate": 1e-4,
        "lr_schedule": "cosine",
        "eval_prompts": 8,
        "eval_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "threads": 1,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "vrpo": {
        "algorithm": {"type": "vrpo", "kl_coef": 0.05, "kl_target": 0.5, "kl_horizon": 64},
        "critic": {"semantic": {"mode": "kl_ref"}},
    },
    "lora": {"model": {"lora": {"rank": 4}}, "train": {"checkpoint_every": 3}},
    # 12 rows, 8 prompts a step: an epoch ends in every second step
    "rows": {
        "algorithm": "ppo",
        "task": {"type": "rows", "data": "{rows}"},
        "rewards": {
            "noise": [
                {"type": "persistent", "false_positive": 0.2, "false_negative": 0.2},
                {"type": "gaussian", "scale": 0.5},
            ]
        },
    },
    # 48 of 256 responses are kept: old ones leave the replay
    "denoiser": {
        "algorithm": "vrpo",
        "critic": {"features": "uncertainty", "regression": "hl_gauss"},
        "denoiser": {"learning_rate": 1e-3, "capacity": 48},
    },
    "grpo": {"algorithm": "grpo", "rewards": {"noise": [{"type": "missing", "rate": 0.2}]}},
}
PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (vrpo.rollout.TorchEngine, "generate"),
    "reward": (vrpo.rewards.RewardPipeline, "score"),
    "values": (loop, "evaluate_batch"),
    "critic": (loop, "update_critic"),
    "denoiser": (loop, "update_denoiser"),
    "optimizer": (torch.optim.AdamW, "step"),
    "records": (folder.RunFolder, "append_step"),
    "evaluation": (folder.RunFolder, "append_evaluation"),
    "one record": (folder, "append_line"),
    "checkpoint": (checkpoint, "save"),
    "tensors": (checkpoint, "save_file"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "replace": (Path, "replace"),
    "delete": (checkpoint, "_remove"),
    "restore": (run.checkpoint, "restore"),
    "forget": (folder.RunFolder, "forget_after"),
    "summary": (loop, "summarise"),
}
"""Place -> where the function is looked up."""


@dataclass
class Tally:
    """What happened to one case."""

    lives: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """Place -> kills that hit."""
    finished: int = 0
    problems: list[str] = field(default_factory=list)


def case_config(name: str, work: Path) -> Config:
    """A case's configuration; writes its rows."""
    rows = work / "rows.jsonl"
    if not rows.exists():
        data = [{"prompt": f"{n}+{n + 3}=", "answer": str(2 * n + 3)} for n in range(10, 24)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in data))
    data = merge(BASE, CASES[name])
    if name == "rows":
        data["task"] = {"type": "rows", "data": str(rows), "holdout": 0.15}
    if name == "grpo":
        data.pop("critic")
    return build(Config, data)


def live(config: Config, out: Path, prepare: Callable[[], None]) -> int:
    """A child process that trains or goes on; its process id."""
    assert threading.active_count() == 1, "forking with threads is asking for a deadlock"
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        vrpo.train(config, out=out, resume=(out / "config.yaml").exists(), display=Quiet())
        status = 0
    except Stopped as stopped:
        status = stopped.exit_code
    except (
        KeyboardInterrupt
    ):  # before the run listens to signals, or after: nothing is at stake, and the command line says 130 too
        status = 130
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def end_of(pid: int, deadline: float) -> int | None:
    """Exit status as a shell has it (128 + signal); None when the child had to be killed as stuck."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def trap(place: str, entry: int, delay: float, signum: int) -> Callable[[], None]:
    """Sends `signum` at the given entry of a place: before it runs, or `delay` seconds later while it does."""

    def prepare() -> None:
        owner, name = PLACES[place]
        real, count = getattr(owner, name), [0]

        def trapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == entry and delay:
                threading.Timer(delay, os.kill, (os.getpid(), signum)).start()
            elif count[0] == entry:
                os.kill(os.getpid(), signum)
            return real(*args, **kwargs)

        setattr(owner, name, trapped)

    return prepare


def one_run(  # noqa: PLR0917
    name: str,
    config: Config,
    work: Path,
    whole: Path,
    seconds: float,
    rng: random.Random,
    how: str,
    most: int,
    broken: bool,
) -> Tally:
    """A run that is killed up to `most` times, then left to finish, then compared."""
    tally, out = Tally(), work / f"{name}-{rng.randrange(10**9)}"
    while True:
        tally.lives += 1
        hits = sum(tally.kills.values())
        stop = how == "stop" or (how == "mixed" and rng.random() < 0.4)
        signum = rng.choice([signal.SIGTERM, signal.SIGINT]) if stop else signal.SIGKILL
        place = rng.choice(["time", *PLACES]) if rng.random() < 0.7 else "time"
        prepare: Callable[[], None] = untouched
        if hits < most and place != "time":
            prepare = trap(place, rng.randint(1, 6), rng.choice([0.0, 0.02 * rng.random()]), signum)
        if hits >= most and broken:
            prepare = break_resume
        started = time.monotonic()
        pid = live(config, out, prepare)
        if hits < most and place == "time":
            time.sleep(seconds * rng.random() * 0.8)
            send(pid, signum)
            if stop and rng.random() < 0.3:
                time.sleep(0.3 * rng.random())
                send(pid, signum)
        status = end_of(pid, started + STUCK_SECONDS)
        if status is None:
            tally.problems.append(f"{place}: the child was stuck")
            return tally
        tally.problems += [f"after {place}: {problem}" for problem in damage(out)]
        if status == 0:
            break
        if status not in (128 + signum,) or hits >= most:
            log = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-3:]
            tally.problems.append(f"{place}: exit status {status}: {' / '.join(log)}")
            return tally
        tally.kills[f"{place} ({'stop' if stop else 'kill'})"] += 1
    tally.finished = 1
    tally.problems += differences(whole, out)
    if not tally.problems:
        shutil.rmtree(out)
    return tally


def untouched() -> None:
    """What a child does first when no place is trapped."""


def send(pid: int, signum: int) -> None:
    """A signal to a child that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def break_resume() -> None:
    """For the self-test: the resumed run starts with one weight a little off."""
    restore = checkpoint.restore

    def wrong(path: Path, learner: checkpoint.Learner) -> Any:
        result = restore(path, learner)
        with torch.no_grad():
            next(learner.policy.parameters()).view(-1)[0] += 1e-6
        return result

    checkpoint.restore = wrong


def damage(out: Path) -> list[str]:
    """What must not be, whenever a run ends: a step twice, a damaged checkpoint under a plain name."""
    found = []
    if (out / "metrics.jsonl").exists():
        steps = [record["step"] for record, _ in read_lines(out / "metrics.jsonl")]
        if steps != list(range(1, len(steps) + 1)):
            found.append(f"metrics.jsonl has steps {steps}")
    for path in (out / "checkpoints").glob("[!.]*"):
        try:
            checkpoint.verify(path)
        except vrpo.errors.CheckpointError as error:
            found.append(str(error))
    return found


def differences(whole: Path, out: Path) -> list[str]:
    """The first thing in each file that is not as in the uninterrupted run."""
    found = []
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "warnings.jsonl"):
        theirs, ours = (
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith(WALL_CLOCK)}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (whole, out)
        )
        if theirs != ours:
            found.append(f"{name} differs")
    a, b = (json.loads((f / "summary.json").read_text()) for f in (whole, out))
    found += [
        f"summary.json: {key} is {b.get(key)}, was {a[key]}"
        for key in a
        if key not in ("seconds", "tokens_per_second", "seconds_per_step") and a[key] != b.get(key)
    ]
    last = f"checkpoints/step-{STEPS}"
    for path in sorted((whole / last).rglob("*.safetensors")):
        other = out / path.relative_to(whole)
        theirs, ours = safetensors.torch.load_file(path), safetensors.torch.load_file(other)
        wrong = [n for n in theirs if n not in ours or not torch.equal(theirs[n], ours[n])]
        found += [f"{path.relative_to(whole)}: {wrong[0]} differs"] if wrong else []
    if (whole / last / "state.json").read_text() != (out / last / "state.json").read_text():
        found.append("state.json differs")
    return found


def main() -> int:
    """Run, print a table; 1 when anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["kill", "stop", "mixed"], default="mixed")
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--break-resume", action="store_true", help="self-test: must end with status 1")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started, rng = time.time(), random.Random(given.seed)
    names = given.case or list(CASES)
    tallies = {name: Tally() for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        references: dict[str, tuple[Config, Path, float]] = {}
        for name in names:
            config, begun = case_config(name, work), time.monotonic()
            status = end_of(live(config, work / name, untouched), begun + STUCK_SECONDS)
            if status != 0:
                print((work / name).with_suffix(".log").read_text())
                return 1
            references[name] = config, work / name, time.monotonic() - begun
        while sum(sum(t.kills.values()) for t in tallies.values()) < given.kills:
            name = min(names, key=lambda n: sum(tallies[n].kills.values()))
            left = given.kills - sum(sum(t.kills.values()) for t in tallies.values())
            config, whole, seconds = references[name]
            result = one_run(
                name,
                config,
                work,
                whole,
                seconds,
                rng,
                given.signal,
                min(left, 6),
                given.break_resume,
            )
            total = tallies[name]
            total.lives += result.lives
            total.kills += result.kills
            total.finished += result.finished
            total.problems += result.problems
            for problem in result.problems:
                print(f"{name}: {problem}", flush=True)
            if result.problems and given.break_resume:
                break
    return report(tallies, seconds=time.time() - started, path=given.json)


def report(tallies: dict[str, Tally], *, seconds: float, path: Path | None) -> int:
    """The table, the JSON, the exit status."""
    print(f"{'case':8s}{'processes':>10s}{'kills':>8s}{'runs compared':>15s}{'problems':>10s}")
    for name, t in tallies.items():
        print(f"{name:8s}{t.lives:10d}{sum(t.kills.values()):8d}{t.finished:15d}{len(t.problems):10d}")
    places = sum((t.kills for t in tallies.values()), Counter())
    print("hits: " + ", ".join(f"{place} {count}" for place, count in places.most_common()))
    print(f"{sum(places.values())} kills in {seconds:.0f} s")
    if path is not None:
        cases = {
            n: {"processes": t.lives, "runs_compared": t.finished, "problems": t.problems}
            for n, t in tallies.items()
        }
        data = {"kills": sum(places.values()), "places": places, "cases": cases, "seconds": seconds}
        path.write_text(
            json.dumps(data | {"environment": environment(), "date": time.strftime("%Y-%m-%d")}, indent=2)
            + "\n"
        )
    return int(any(t.problems for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
