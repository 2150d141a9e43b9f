"""What can go wrong from outside: kills, signals, full disks, damaged and hostile files, two runs in one folder."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vrpo
from tests.smoke.test_runs import SMALL, cli, lines, python_config, rows, run, same, small, weights
from vrpo.config import Config
from vrpo.config.presets import merge
from vrpo.errors import CheckpointError, ConfigError, ModelError, NumericsError, RewardError, StorageError
from vrpo.train import checkpoint, files, prepared
from vrpo.train.folder import RunFolder, _commit
from vrpo.train.lock import RunLock
from vrpo.train.microbatches import Splitter
from vrpo.train.progress import Quiet
from vrpo.train.same_run import _harmless
from vrpo.train.signals import Stopped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals, locks and limits")

STEPPED = {"train": {"epochs": 2, "steps": 2, "checkpoint_every": 1}, "critic": {"warmup_steps": 0}}
"""Per step: 2 passes of 2 minibatches of 2 micro-batches for critic and for policy, 16 micro-batches in all."""


def records(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def assert_same_run(a: Path, b: Path, step: int) -> None:
    assert lines(a) == lines(b)
    for name in ("rollouts.jsonl", "evaluations.jsonl", "warnings.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert same(weights(a, step), weights(b, step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(small(**STEPPED), out / "run")
    return out / "run"


# signals


def stop_in_update(monkeypatch, microbatch: int) -> list[int]:
    """SIGTERM before the micro-batch of that number, counted over the run; returns those seen so far."""
    seen: list[int] = []
    accumulate, split = vrpo.train.update._accumulate, Splitter.__call__

    def counting(self, batch):
        for piece in split(self, batch):
            seen.append(len(seen))
            if len(seen) == microbatch:
                signal.raise_signal(signal.SIGTERM)
            yield piece

    def in_an_update(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Splitter, "__call__", counting)
            return accumulate(*args, **kwargs)

    monkeypatch.setattr(vrpo.train.update, "_accumulate", in_an_update)
    return seen


@pytest.mark.parametrize("microbatch", [1, 2, 6, 9, 15])
def test_a_signal_in_an_update_stops_before_the_next_microbatch_and_nothing_is_lost(
    tmp_path, whole, monkeypatch, microbatch
):
    """SIGTERM at one of the 16 micro-batches of step 2: `paused` holds the step, and the resumed run is the whole one."""
    seen = stop_in_update(monkeypatch, 16 + microbatch)
    with pytest.raises(Stopped) as caught:
        run(small(**STEPPED), tmp_path / "run")
    monkeypatch.undo()
    assert caught.value.exit_code == 143
    assert len(seen) == 16 + microbatch
    assert (tmp_path / "run" / "checkpoints" / "paused" / prepared.BATCH_FILE).is_file()
    assert [m["step"] for m in lines(tmp_path / "run")] == [1]
    run(small(**STEPPED), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole, 2)
    assert not (tmp_path / "run" / "checkpoints" / "paused").exists()


def test_a_pause_is_of_its_step_whatever_the_schedule_becomes(tmp_path, whole, monkeypatch):
    """Its weights are half a step's: none are evaluated as the last whole step's, and no run ends with them."""
    stop_in_update(monkeypatch, 20)
    with pytest.raises(Stopped):
        run(small(**STEPPED), tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"is past train\.steps=1"):
        run(small(**merge(STEPPED, {"train": {"steps": 1}})), tmp_path / "run", resume=True)
    assert [e["step"] for e in records(tmp_path / "run", "evaluations.jsonl")] == [0]
    run(small(**merge(STEPPED, {"train": {"eval_every": 1}})), tmp_path / "run", resume=True)
    assert [e["step"] for e in records(tmp_path / "run", "evaluations.jsonl")] == [0, 2]
    assert same(weights(tmp_path / "run", 2), weights(whole, 2))


def test_a_pause_before_the_gaussian_channel_has_started_is_saved(tmp_path, monkeypatch):
    """Until rewards differ nothing is denoised: the batch has one tensor under two names."""
    rewards = {"functions": [{"type": "exact", "column": "source"}], "noise": []}  # 0 for every response
    data = {
        "algorithm": "grpo",
        "rewards": rewards,
        "train": {"steps": 1},
        "denoiser": {"channel": "gaussian"},
    }
    run(small(**data), tmp_path / "whole")
    stop_in_update(monkeypatch, 2)
    with pytest.raises(Stopped):
        run(small(**data), tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoints" / "paused").is_dir()
    run(small(**data), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 1)


@pytest.mark.parametrize("fails_at", ["step 3", "the evaluation after step 2"])
def test_a_judge_that_is_gone_takes_no_finished_step_with_it(tmp_path, fails_at):
    calls = []
    last_good = {"step 3": 4, "the evaluation after step 2": 3}[
        fails_at
    ]  # the start has two calls, each step one

    def judge(prompts, completions, **columns):
        calls.append(len(completions))
        return [float(len(c)) for c in completions] if len(calls) <= last_good + 2 * healthy else "gone"

    def trainer(steps: int) -> vrpo.Trainer:
        every = 0 if fails_at == "step 3" else 2
        config = python_config(steps=steps, checkpoint_every=0, eval_every=every)
        return vrpo.Trainer(
            model="vrpo:tiny",
            reward_funcs=judge,
            train_dataset=rows(),
            config=config,
            output_dir=tmp_path / "run",
        )

    healthy = 0
    with pytest.raises(RewardError):
        trainer(4).train(display=Quiet())
    (done,) = checkpoint.steps_in(tmp_path / "run" / "checkpoints")
    assert done == len(lines(tmp_path / "run")) > 0
    healthy = 100
    trainer(4).train(resume=True, display=Quiet())
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("regression", ["bce", "hl_gauss"])
def test_a_reward_no_critic_can_read_takes_no_finished_step_with_it(tmp_path, regression):
    calls = []

    def judge(prompts, completions, **columns):
        calls.append(len(completions))
        return [3.0 if len(calls) > 4 else float(len(c) % 2) for c in completions]

    config = python_config(steps=4, checkpoint_every=0, eval_every=0)
    config = config.model_copy(
        update={"critic": config.critic.model_copy(update={"regression": regression, "warmup_steps": 0})}
    )
    trainer = vrpo.Trainer("vrpo:tiny", judge, rows(), config=config, output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"critic\.regression={regression} got the return"):
        trainer.train(display=Quiet())
    (done,) = checkpoint.steps_in(tmp_path / "run" / "checkpoints")
    assert done == len(lines(tmp_path / "run")) > 0


def test_a_signal_while_a_reward_function_is_stuck_stops_at_once(tmp_path):
    """The second step's reward sleeps for a minute and swallows every Exception."""
    calls = []

    def stuck(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) == 4:  # two evaluations (greedy, sampled), step 1, step 2
            try:
                time.sleep(60)
            except Exception:
                return [0.0] * len(completions)
        return [float(len(c)) for c in completions]

    def trainer(out: Path) -> vrpo.Trainer:
        return vrpo.Trainer(
            model="vrpo:tiny",
            reward_funcs=stuck,
            train_dataset=rows(),
            config=python_config(),
            output_dir=out,
        )

    timer = threading.Timer(8.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(Stopped) as caught:
        trainer(tmp_path / "run").train(display=Quiet())
    timer.cancel()
    assert caught.value.exit_code == 130
    assert time.perf_counter() - started < 30
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [1]
    trainer(tmp_path / "run").train(resume=True, display=Quiet())
    calls[:] = [0] * 4  # never stuck again
    trainer(tmp_path / "whole").train(display=Quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole", 2)


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(
        "import signal, time\n"
        "from vrpo.train.signals import stop_requested\n"
        "with stop_requested() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        "        if stop():\n"
        "            print('asked', flush=True)\n"
        "            time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM


def test_an_evaluation_that_was_given_up_is_made_when_the_run_goes_on(tmp_path):
    class Interrupt(Quiet):
        def step(self, step, metrics):
            if step == 2:
                signal.raise_signal(signal.SIGINT)

    config = small(algorithm="grpo", train={"steps": 3})
    run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        vrpo.train(config, out=tmp_path / "run", display=Interrupt())
    assert [e["step"] for e in records(tmp_path / "run", "evaluations.jsonl")] == [0]
    run(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 3)


def test_an_adaptive_kl_weight_and_skipped_updates_survive_a_resume(tmp_path):
    algorithm = {"type": "ppo", "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 64}
    config = small(algorithm=algorithm, train={"checkpoint_every": 2, "steps": 4})
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    run(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 4)
    paid = [-m["objective/non_score_reward"] / m["objective/kl"] for m in lines(tmp_path / "run")[2:]]
    assert paid[0] != pytest.approx(0.1) and paid[1] != pytest.approx(paid[0])  # it does move


def test_an_adaptive_kl_weight_waits_until_the_policy_moves(tmp_path):
    algorithm = {"type": "ppo", "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 64}
    data = {
        "algorithm": algorithm,
        "critic": {"warmup_steps": 3},
        "train": {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": None},
    }
    run(small(**data), tmp_path)
    steps = sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: path.name)
    weight = [json.loads((step / "state.json").read_text())["kl_coef"] for step in steps]
    assert weight[:3] == [0.1] * 3 and weight[3] < 0.1


def test_a_kl_weight_that_is_set_anew_counts_from_the_resume_on(tmp_path):
    steered = {"type": "ppo", "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 64}
    for number, (before, now) in enumerate(
        [
            ({"type": "ppo"}, {"type": "ppo", "kl_coef": 0.5}),
            (steered, steered | {"kl_coef": 0.5}),
            (steered, {"type": "ppo", "kl_coef": 0.1}),
        ]
    ):
        folder = tmp_path / str(number)
        critic = {"warmup_steps": 0, "epochs": 1}
        run(small(algorithm=before, critic=critic, train={"steps": 1}), folder)
        config = small(algorithm=now, critic=critic, train={"steps": 2})
        vrpo.train(config, out=folder, resume=True, allow_changes=True, display=Quiet())
        last = lines(folder)[-1]
        assert -last["objective/non_score_reward"] / last["objective/kl"] == pytest.approx(now["kl_coef"])


def test_a_change_that_a_checkpoint_cannot_follow_says_what_to_do(tmp_path):
    run(small(algorithm="ppo", train={"steps": 2}), tmp_path)
    with pytest.raises(ModelError, match=r"make critic\.head agree"):
        vrpo.train(small(algorithm="vrpo"), out=tmp_path, resume=True, allow_changes=True, display=Quiet())


# the folder


def test_a_second_run_on_a_folder_is_refused_and_a_dead_owner_is_not_in_the_way(tmp_path):
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib; from vrpo.train.lock import RunLock; lock = RunLock(pathlib.Path(sys.argv[1])); "
            "print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on "):
            run(small(algorithm="grpo", train={"steps": 2}), tmp_path, resume=True)
        holder.kill()
        holder.wait()
    run(small(algorithm="grpo", train={"steps": 2}), tmp_path, resume=True)
    assert not (tmp_path / "owner.json").exists()


def test_a_refused_run_leaves_no_lock(tmp_path):
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path)
    with pytest.raises(CheckpointError):
        run(small(algorithm="grpo", train={"steps": 1, "seed": 5}), tmp_path, resume=True)
    RunLock(tmp_path).release()


def test_changes_are_shown_and_harmful_ones_need_to_be_allowed(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    settings = merge(SMALL, {"train": {"steps": 1, "eval_every": 0}, "critic": {"warmup_steps": 0}})
    recipe.write_text(yaml.safe_dump(settings))
    out = str(tmp_path / "run")
    assert cli(capsys, "train", str(recipe), "--out", out)[0] == 0
    command = ["train", str(recipe), "--out", out, "--resume", "--set", "train.steps=2"]
    status, text, _ = cli(capsys, *command)
    assert status == 0 and "changed: train.steps: 1 -> 2" in text
    status, _, error = cli(capsys, *command, "--set", "train.learning_rate=0.1", "--set", "algorithm.lam=0.5")
    assert (
        status == 2
        and "algorithm.lam=0.95, now it is 0.5 (and 1 more" in error
        and "--allow-changes" in error
    )
    changed = [*command[:-1], "train.steps=3", "--set", "algorithm.lam=0.5"]
    status, text, _ = cli(capsys, *changed, "--allow-changes")
    assert status == 0 and "changed: algorithm.lam: 0.95 -> 0.5" in text
    sessions = records(tmp_path / "run", "sessions.jsonl")
    assert [len(s["changes"]) for s in sessions] == [0, 1, 2]
    status, _, error = cli(capsys, "train", str(recipe), "--out", str(tmp_path / "new"), "--allow-changes")
    assert status == 2 and "--resume" in error


def test_a_refused_resume_changes_nothing(tmp_path):
    config = small(algorithm="grpo", train={"steps": 2, "checkpoint_every": 1})
    run(config, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = small(algorithm="grpo", train={"steps": 1, "eval_every": 1})
    torn = tmp_path / "checkpoints" / "step-2" / "state.json"
    for refused, settings in (
        (other, {}),
        (config, {"checkpoint": 7}),
        (small(algorithm="grpo", train={"seed": 5}), {}),
    ):
        with pytest.raises(CheckpointError):
            run(refused, tmp_path, resume=True, **settings)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    torn.write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        run(small(algorithm="grpo", train={"steps": 3}), tmp_path, resume=True)
    torn.write_bytes(before[torn])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_end_of_a_run_that_goes_on_is_no_end_any_more(tmp_path, monkeypatch):
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path)
    (tmp_path / "temperatures.json").write_text("{}")
    stop_in_update(monkeypatch, 2)
    with pytest.raises(Stopped):
        run(small(algorithm="grpo", train={"steps": 2}), tmp_path, resume=True)
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "temperatures.json").exists()
    monkeypatch.undo()
    run(small(algorithm="grpo", train={"steps": 2}), tmp_path, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="has ended and its checkpoints are gone"):
        run(small(algorithm="grpo", train={"steps": 3}), tmp_path, resume=True)
    assert len(lines(tmp_path)) == 2


def test_how_a_reward_function_is_called_may_change_and_what_it_says_may_not():
    assert all(
        map(
            _harmless,
            ["rewards.functions.0.timeout", "rewards.gold.1.headers_env.Authorization", "train.steps"],
        )
    )
    assert not any(
        map(
            _harmless,
            ["rewards.functions.0.column", "rewards.noise.0.timeout", "rewards.functions", "algorithm.lam"],
        )
    )


def test_the_commit_on_record_is_of_this_source_and_of_no_tree_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
        return subprocess.run(
            ["git", *settings, *arguments], check=True, capture_output=True, text=True
        ).stdout

    source = tmp_path / "folder.py"
    source.write_text("")
    monkeypatch.setattr(vrpo.train.folder, "__file__", str(source))
    git("init")
    git("commit", "--allow-empty", "-m", "someone else's")
    assert _commit() is None
    git("add", "folder.py")
    git("commit", "-m", "ours")
    assert _commit() == git("rev-parse", "HEAD").strip()


def test_other_data_and_another_reward_file_are_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, reward = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    reward.write_text("def mine(prompts, completions, **_):\n    return [1.0 for _ in completions]\n")
    changes = {
        "algorithm": "grpo",
        "task": {"type": "rows", "data": "rows.jsonl", "holdout": 0.2},
        "rewards": {"functions": [{"type": "function", "file": "mine.py", "name": "mine"}], "noise": []},
        "train": {"steps": 1, "completions_per_step": 16, "eval_every": 0},
    }
    data_dict = merge(SMALL, changes)
    data_dict.pop("critic")
    data_dict["task"] = changes["task"]
    config = Config(**data_dict)
    run(config, tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    kept = data.read_text()
    data.write_text(kept.replace("10+13=", "10+14="))
    with pytest.raises(CheckpointError, match="another data"):
        run(config, tmp_path / "run", resume=True)
    data.write_text(kept)
    reward.write_text(reward.read_text() + "# another\n")
    with pytest.raises(CheckpointError, match=r"another reward file mine\.py"):
        run(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("written", [None, '{"format": 99, "inputs": {}}', "{"])
def test_a_folder_of_another_version_is_refused_by_name(tmp_path, written):
    run(small(algorithm="grpo", train={"steps": 0}), tmp_path)
    (tmp_path / "run.json").unlink() if written is None else (tmp_path / "run.json").write_text(written)
    expected = {None: "format 1, .* format 2", "{": "damaged"}.get(written, "format 99, .* format 2")
    with pytest.raises(CheckpointError, match=expected):
        run(small(algorithm="grpo", train={"steps": 1}), tmp_path, resume=True)


def test_a_gap_in_the_metrics_is_refused(tmp_path):
    run(small(algorithm="grpo", train={"steps": 3}), tmp_path)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([kept[0], kept[2]]))
    with pytest.raises(CheckpointError, match=r"no step 2 in its place"):
        run(small(algorithm="grpo"), tmp_path, resume=True)


# checkpoints


def test_a_damaged_checkpoint_names_the_newest_good_one_and_the_run_goes_on_from_it(tmp_path, capsys):
    config = small(algorithm="grpo", train={"checkpoint_every": 1})
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (4, 3):
        path = tmp_path / "run" / "checkpoints" / f"step-{step}" / "policy_optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    arguments = ("train", str(tmp_path / "run"), "--out", str(tmp_path / "run"), "--resume")
    status, _, error = cli(capsys, *arguments)
    assert (
        status == 2 and "step-4/policy_optimizer.safetensors differs" in error and "--checkpoint 2 " in error
    )
    status, _, error = cli(capsys, *arguments, "--checkpoint", "7")
    assert status == 2 and "no checkpoint of step 7" in error
    assert cli(capsys, *arguments, "--checkpoint", "2")[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", 4)


def test_the_best_checkpoint_outlives_the_newest(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "manifest.json").write_text("{}")
    checkpoint.prune(tmp_path, keep=2, accuracy={1: 0.3, 2: 0.5, 3: 0.5, 5: 0.4})
    assert checkpoint.steps_in(tmp_path) == [2, 4, 5]
    checkpoint.prune(tmp_path, keep=None, accuracy={})
    assert checkpoint.steps_in(tmp_path) == [2, 4, 5]


def test_what_a_kill_leaves_behind_is_swept_up(tmp_path):
    config = small(algorithm="grpo", train={"checkpoint_every": 1})
    run(config, tmp_path)
    left = tmp_path / "checkpoints" / f"{checkpoint.SCRATCH}new-step-5"
    shutil.copytree(tmp_path / "checkpoints" / "step-4", left)
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1] == 4
    run(small(algorithm="grpo", train={"checkpoint_every": 1, "steps": 5}), tmp_path, resume=True)
    assert not left.exists()


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("place", ["optimizer", "weights", "bin", "state"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, place):
    """Also when its manifest has been made to agree."""
    config = small(algorithm="grpo", train={"steps": 1})
    run(config, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-1"
    evil = pickle.dumps(Hostile(tmp_path / "touched"))
    targets = {
        "optimizer": step / "policy_optimizer.safetensors",
        "weights": step / "policy" / "model.safetensors",
        "bin": step / "policy" / "pytorch_model.bin",
        "state": step / "state.json",
    }
    if place == "bin":
        (step / "policy" / "model.safetensors").unlink()
    targets[place].write_bytes(evil)
    found = [p for p in step.rglob("*") if p.is_file() and p.name != "manifest.json"]
    manifest = {str(p.relative_to(step)): checkpoint._sha256(p) for p in found}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(vrpo.errors.VrpoError) as caught:
        run(small(algorithm="grpo", train={"steps": 2}), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()
    pickle.loads(evil)
    assert (tmp_path / "touched").exists()  # it would have


# disks


def test_a_full_disk_stops_the_run_with_the_last_good_state(tmp_path, monkeypatch):
    """Every second checkpoint does not fit; the run says so, and goes on once there is room."""
    config = small(algorithm="grpo", train={"checkpoint_every": 1})
    run(config, tmp_path / "whole")
    saved = []

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"step-2: No space left on device; .* --resume"):
        run(config, tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    run(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 4)


def test_a_full_disk_is_exit_status_1_and_one_line(tmp_path, capsys, monkeypatch):
    def full(path, record):
        with files.storing(path):
            raise OSError(28, "No space left on device")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(merge(SMALL, {"train": {"steps": 1, "eval_every": 0}, "critic": {"warmup_steps": 0}}))
    )
    monkeypatch.setattr("vrpo.train.folder.append_line", full)
    status, _, error = cli(capsys, "train", str(recipe), "--out", str(tmp_path / "run"))
    assert status == 1 and error.count("\n") == 1 and "No space left on device" in error


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, {"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]) if len(data) > 5 else _no_space())
    with pytest.raises(StorageError):
        files.append_line(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'


def _no_space() -> int:
    raise OSError(28, "No space left on device")


def test_replacing_a_file_keeps_the_old_one_when_there_is_no_room(tmp_path, monkeypatch):
    files.replace_file(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: _no_space())
    with pytest.raises(StorageError):
        files.replace_file(tmp_path / "a", "new")
    monkeypatch.undo()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_torn_last_line_is_skipped_and_half_a_character_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    files.append_line(folder.metrics, {"step": 1, "text": "\ud83d", "x": float("nan")})
    with folder.metrics.open("ab") as file:
        file.write('{"step": 2, "text": "ä'.encode()[:-1])
    assert folder.read_metrics() == [{"step": 1, "text": "\ud83d", "x": None}]


def test_a_checkpoint_is_for_runs_that_go_on(tmp_path):
    with pytest.raises(ConfigError, match="--resume"):
        vrpo.train(small(algorithm="grpo"), out=tmp_path / "run", checkpoint=2, display=Quiet())


GUEST = """
import random, signal, sys
import numpy as np
import rich.markup  # draws the ids of links from `random` when it is imported
import torch

def state():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return numbers, torch.get_num_threads(), handlers

torch.set_num_threads(1)
before = state()
import vrpo
from vrpo.config import load
from vrpo.errors import CheckpointError
from vrpo.train.progress import Quiet
config = load(vrpo.Config, sys.argv[1], ["train.threads=2"])
vrpo.train(config, out=sys.argv[2], display=Quiet())
assert state() == before, "a run left something behind"
try:
    vrpo.train(config, out=sys.argv[2], display=Quiet())
except CheckpointError:
    assert state() == before, "a refused run left something behind"
    print("as before")
"""


def test_the_library_is_a_guest_in_the_process(tmp_path):
    """Global random states, thread count and signal handlers; in a process of its own, since type checkers draw numbers."""
    recipe = tmp_path / "recipe.yaml"
    changes = {"train": {"steps": 1, "eval_every": 0}, "critic": {"warmup_steps": 0}}
    recipe.write_text(yaml.safe_dump(merge(SMALL, changes)))
    done = subprocess.run(
        [sys.executable, "-c", GUEST, str(recipe), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "as before\n", done.stderr


def test_a_signal_ends_a_run_whose_isolated_reward_is_stuck_and_python_functions_can_be_isolated(tmp_path):
    """The function hangs in a process of its own, with no time limit; SIGTERM comes while it does."""
    mark = tmp_path / "stuck"

    def stuck(prompts, completions, answer, **columns):
        import time

        if len(completions) == 16 and columns.get("go") is None:  # a training step; evaluations are smaller
            mark.write_text("now")
            time.sleep(60)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def when_stuck() -> None:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    judge = vrpo.rewards.named(stuck, isolation="process")
    given = {
        "model": "vrpo:tiny",
        "train_dataset": rows(),
        "config": python_config(),
        "output_dir": tmp_path / "run",
    }
    threading.Thread(target=when_stuck, daemon=True).start()
    started = time.perf_counter()
    with pytest.raises(Stopped) as caught:
        vrpo.Trainer(reward_funcs=judge, **given).train(display=Quiet())
    assert caught.value.exit_code == 143 and time.perf_counter() - started < 40
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [0]
    with pytest.raises(ConfigError, match="have their own"):
        vrpo.Trainer(reward_funcs=[judge], reward_weights=[2.0], **given)


def test_an_evaluation_after_training_leaves_no_process(tmp_path):
    def judge(prompts, completions, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def children() -> list[str]:
        status = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat")]
        return [line for line in status if line.rpartition(")")[2].split()[1] == str(os.getpid())]

    before = len(children())
    trainer = vrpo.Trainer(
        model="vrpo:tiny",
        reward_funcs=vrpo.rewards.named(judge, isolation="process"),
        train_dataset=rows(),
        config=python_config(eval_every=0),
        output_dir=tmp_path,
    )
    trainer.train(display=Quiet())
    trainer.evaluate()
    assert len(children()) == before


def test_rewards_at_the_edge_of_fp32_move_no_weight_stop_the_run_and_leave_the_worst_tokens(tmp_path):
    """A squared error of 9e76 is infinite: every critic update is skipped, and the eighth in a row ends the run."""

    def extreme(prompts, completions, **columns):
        return [3e38 if index % 2 else -3e38 for index in range(len(completions))]

    config = small(train={"steps": 4, "eval_every": 0, "checkpoint_every": 1})
    config = config.model_copy(
        update={"task": None, "rewards": config.rewards.model_copy(update={"functions": (), "noise": ()})}
    )
    given = {"model": "vrpo:tiny", "train_dataset": rows(), "config": config, "output_dir": tmp_path}
    with pytest.raises(NumericsError, match="8 losses or gradients of the critic in a row were not finite"):
        vrpo.Trainer(reward_funcs=extreme, **given).train(display=Quiet())
    worst = json.loads((tmp_path / "worst_tokens.json").read_text())
    assert worst["step"] == 2 and len(worst["tokens"]) == 20
    assert abs(worst["tokens"][0]["targets"]) == pytest.approx(3e38)
    assert [m["val/skipped_updates"] for m in lines(tmp_path)] == [4.0]
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [1]
    kept, initial = weights(tmp_path, 1), Path(vrpo.__file__).parent / "assets" / "tiny" / "model.safetensors"
    for name, tensor in load_file(initial).items():
        assert torch.equal(kept[f"policy/model.safetensors:{name}"], tensor)
