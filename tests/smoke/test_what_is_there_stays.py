"""Files that are not ours, and runs that are of something else: refused, not written over or mixed."""

import json
import re
from functools import partial
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
from vrpo.rewards import named
from vrpo.study.run import run_study
from vrpo.train import checkpoint
from vrpo.train.progress import Quiet, Terminal
from vrpo.train.same_run import digest_of


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


def scaled(prompts, completions, k, **columns):
    return [k * len(c) for c in completions]


def test_what_a_partial_binds_and_a_constant_without_source_are_part_of_a_reward(tmp_path):
    def digest(function):
        return digest_of(named(function))

    assert digest(partial(scaled, k=1.0)) == digest(partial(scaled, k=1.0))
    assert len({digest(f) for f in (partial(scaled, k=1.0), partial(scaled, k=-1.0), partial(always))}) == 3
    made = {}
    for name, number in (("one", 1.0), ("two", 2.0)):
        exec(f"def f(prompts, completions, **columns): return [{number} for _ in completions]", made)
        made[name] = made.pop("f")
    assert digest(made["one"]) != digest(made["two"])


def test_a_display_that_cannot_start_or_end_leaves_no_folder_locked(tmp_path):
    class Offline(Quiet):
        def start(self, *args, **settings):
            raise ConnectionError("no tracker")

    class Gone(Quiet):
        def finish(self):
            raise ConnectionError("the tracker is gone")

    settings = {"config": python_config()}
    for display in (Offline(), Gone()):
        with pytest.raises(ConnectionError):
            trainer(exact, tmp_path, **settings).train(
                display=display, resume=(tmp_path / "run.json").exists()
            )
    assert trainer(exact, tmp_path, **settings).train(resume=True, display=Quiet())["steps"] == 2


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_run_goes_on_with_the_weights_it_trained(tmp_path, frozen_first):
    def go(frozen, **more):
        model = AutoModelForCausalLM.from_pretrained(build_tiny(tmp_path / "model", seed=0))
        model.get_input_embeddings().requires_grad_(not frozen)
        config = python_config(steps=2 + bool(more))
        config = vrpo.Config(**config.model_dump() | {"algorithm": "grpo", "critic": None})
        given = {"model": model, "processing_class": tiny_tokenizer(), "config": config}
        return trainer(exact, tmp_path / "run", **given).train(display=Quiet(), **more)

    go(frozen_first)
    with pytest.raises(CheckpointError, match="another initial model"):
        go(not frozen_first, resume=True)
    with pytest.raises(CheckpointError, match="state is of other weights than those trained now"):
        go(not frozen_first, resume=True, allow_changes=True)
    go(frozen_first, resume=True)


def test_the_best_checkpoint_is_so_by_the_runs_own_schedule(tmp_path, capsys):
    trainer(exact, tmp_path / "run", config=python_config(steps=4, eval_every=1, checkpoint_every=1)).train(
        display=Quiet()
    )
    kept = checkpoint.steps_in(tmp_path / "run" / "checkpoints")
    file = tmp_path / "run" / "evaluations.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        record["clean_greedy"] = float(record["step"] == kept[0])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "model": {"path": "vrpo:tiny"},
        "task": {"type": "arithmetic"},
        "rewards": {"functions": [{"type": "exact"}]},
        "train": {"checkpoint_every": 4, "eval_prompts": 4},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    said = cli(
        capsys, "eval", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml"), "--checkpoint", "best"
    )
    assert said[0] == 0 and f" {kept[0]} " in said[1]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"output_dir": ""}, "output_dir='' names no folder"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0 is no number of tokens"),
        ({"model": None}, "model=None is no model"),
        ({"model": AutoModelForCausalLM}, "is no model; give a hub name"),
        ({"reward_weights": [0.0]}, "every reward function has weight 0"),
    ],
)
def test_what_a_trainer_cannot_use_is_one_line(tmp_path, given, part):
    with pytest.raises(ConfigError, match=re.escape(part)):
        trainer(exact, **({"out": tmp_path} | given)).train() if "output_dir" not in given else vrpo.Trainer(
            **{"model": "vrpo:tiny", "reward_funcs": exact, "train_dataset": [{"prompt": "1"}]} | given
        )


def test_a_function_called_errors_is_no_kind_of_error(tmp_path):
    def errors(prompts, completions, **columns):
        return [float(len(c)) for c in completions]

    summary = trainer(errors, tmp_path).train(display=Quiet())
    assert "mean" not in summary["reward_errors_by_kind"]
