"""Files that are not ours, and runs that are of something else: refused, not written over or mixed."""

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

import vrpo
from tests.smoke.test_runs import cli, exact, lines, python_config, run, small, trainer
from vrpo.errors import CheckpointError, ConfigError, ModelError, StorageError
from vrpo.models.tiny import build_tiny, tiny_tokenizer
from vrpo.study.run import run_study
from vrpo.train import checkpoint
from vrpo.train.progress import Quiet, Terminal


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "environment.json"])
def test_a_folder_with_a_file_of_ours_that_is_no_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine: true\n")
    with pytest.raises(
        CheckpointError, match=rf"holds '{name}', which is no run's and would be written over"
    ):
        run(small(algorithm="grpo"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine: true\n"


def test_a_folder_with_other_files_may_take_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(lines(tmp_path)) == 1


def write_study(folder: Path, seeds: list[int], judge: str) -> Path:
    (folder / "judge.py").write_text(judge)
    base = {
        "model": {"path": "vrpo:tiny"},
        "task": {"type": "arithmetic", "min_digits": 2},
        "rewards": {"functions": [{"type": "function", "file": str(folder / "judge.py"), "name": "f"}]},
        "algorithm": "grpo",
        "rollout": {"num_generations": 2, "max_completion_length": 4},
        "train": {"steps": 1, "completions_per_step": 8, "minibatch": 8, "microbatch": 8, "eval_every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(base))
    study = {
        "base": "config.yaml",
        "methods": {"GRPO": {}},
        "noise": {"as it is": {}},
        "seeds": seeds,
        "jobs": 1,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def test_a_study_is_of_one_reward_file_and_takes_over_no_run(tmp_path):
    def go(out="out"):
        run_study(
            tmp_path / "study.yaml",
            "study",
            out=tmp_path / out,
            overrides=[],
            record_to=None,
            report_only=False,
            console=Console(quiet=True),
        )

    right = "def f(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    write_study(tmp_path, [0], right)
    go()
    summary = (tmp_path / "out" / "summary.json").read_bytes()
    write_study(tmp_path, [0, 1], right.replace("float(len(c))", "-float(len(c))"))
    with pytest.raises(CheckpointError, match=r"reward file .*judge\.py has changed since .*_s0 was run"):
        go()
    assert (tmp_path / "out" / "summary.json").read_bytes() == summary
    assert not (tmp_path / "out" / "grpo_as-it-is_s1").exists()
    # and cells that were run with different ones are not put together
    (cell,) = (p for p in (tmp_path / "out").iterdir() if p.is_dir())
    write_study(tmp_path, [0, 1], right)
    go()
    other = json.loads((cell / "run.json").read_text())
    other["inputs"] = {k: "0" * 64 if "data" in k else v for k, v in other["inputs"].items()}
    (cell / "run.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="data is another in"):
        go()
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path / "run")
    kept = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds a run, whose summary the study's would replace"):
        go("run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == kept


def always(prompts, completions, **columns):
    return [9.0] * len(completions)


def test_a_trainer_goes_on_with_the_reward_it_started_with(tmp_path):
    trainer(exact, tmp_path).train(display=Quiet())
    for other in (
        {"reward": always},
        {"reward": exact, "reward_weights": [-3.0]},
        {"reward": [exact, always]},
        {"reward": exact, "gold_funcs": always},
    ):
        settings = {"config": python_config(steps=3), **other}
        with pytest.raises(CheckpointError, match=r"function .* from Python"):
            trainer(settings.pop("reward"), tmp_path, **settings).train(resume=True, display=Quiet())
    trainer(exact, tmp_path, config=python_config(steps=3)).train(resume=True, display=Quiet())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    trainer([exact, always], tmp_path / "two").train(display=Quiet())
    fewer = trainer(exact, tmp_path / "two", config=python_config(steps=3))
    with pytest.raises(CheckpointError, match="function always from Python"):
        fewer.train(resume=True, display=Quiet())


def test_a_display_that_fails_takes_no_finished_step_with_it(tmp_path):
    class Down(Quiet):
        def step(self, step, metrics):
            if step == 2:
                raise ConnectionError("the tracker is down")

    with pytest.raises(ConnectionError):
        trainer(exact, tmp_path, config=python_config(steps=3, checkpoint_every=0)).train(display=Down())
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2]
    trainer(exact, tmp_path, config=python_config(steps=3, checkpoint_every=0)).train(
        resume=True, display=Quiet()
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_model_is_saved_or_the_place_named(tmp_path):
    done = trainer(exact, tmp_path / "run", config=python_config(checkpoint_every=0))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file: .*choose a place that can be written"):
        done.save_model(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    done.save_model(tmp_path / "new" / "model")
    assert (tmp_path / "new" / "model" / "config.json").is_file()


def test_overrides_are_of_files(tmp_path):
    with pytest.raises(ConfigError, match="are for a file"):
        vrpo.train(small(), out=tmp_path, overrides=["train.steps=1"])
    with pytest.raises(ConfigError, match="is one text"):
        vrpo.train("recipes/arith_cpu", out=tmp_path, overrides="train.steps=1")


def test_a_parameter_that_is_no_column_is_explained(tmp_path):
    def porting(completions, trainer_state):
        return [0.0] * len(completions)

    def singular(prompt, completions):
        return [0.0] * len(completions)

    with pytest.raises(
        vrpo.errors.DataError, match="reward function porting has a parameter 'trainer_state'"
    ):
        trainer(porting, tmp_path).train(display=Quiet())
    with pytest.raises(vrpo.errors.DataError, match="which is called 'prompts'"):
        trainer(singular, tmp_path).train(display=Quiet())


def test_a_report_goes_into_a_file(capsys, tmp_path):
    run(small(algorithm="grpo", train={"steps": 1}), tmp_path / "run")
    status, _, error = cli(capsys, "report", str(tmp_path / "run"), "--out", str(tmp_path))
    assert status == 2 and "is a folder" in error


def test_a_line_of_a_log_is_one_line():
    console = Console(file=StringIO(), width=40)
    display = Terminal(console)
    display.start("a-run-with-a-name", first=0, steps=1, note="what is trained on, [in brackets], " * 4)
    display.warning(1, "what the watch has seen in the last hundred steps, and what to do about it")
    assert console.file.getvalue().count("\n") == 2 and "[in brackets]" in console.file.getvalue()


def test_a_model_of_which_nothing_may_be_trained_is_refused(tmp_path):
    frozen = AutoModelForCausalLM.from_pretrained(build_tiny(tmp_path / "tiny", seed=0)).requires_grad_(False)
    with pytest.raises(ModelError, match="may be trained; set requires_grad"):
        trainer(exact, tmp_path, model=frozen, processing_class=tiny_tokenizer())
