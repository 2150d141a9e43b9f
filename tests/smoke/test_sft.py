"""The supervised warm start, as `vrpo sft` runs it."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.smoke.test_runs import SMALL
from vrpo.cli import main
from vrpo.config import SftConfig, build, to_yaml
from vrpo.errors import CheckpointError, DataError, NumericsError, StorageError
from vrpo.models import load_policy
from vrpo.train import sft as warm_start
from vrpo.train.sft import encode_examples, sft
from vrpo.types import Prompt

QUIET = Console(quiet=True)
EXACT = {"type": "exact"}


def settings(*, rewards=None, rollout=SMALL["rollout"], **warm_start):
    return build(
        SftConfig,
        {
            "model": {"path": "vrpo:tiny"},
            "task": SMALL["task"],
            "rollout": rollout,
            "rewards": {"functions": [EXACT]} if rewards is None else rewards,
            "sft": {"steps": 4, "batch": 16, "eval_every": 2, "eval_prompts": 64, **warm_start},
        },
    )


def test_the_command_imitates_answers_and_leaves_a_model_to_train(tmp_path, capsys):
    config = settings(steps=60, batch=64, eval_every=20, learning_rate=1e-3)
    (tmp_path / "warm.yaml").write_text(to_yaml(config))
    command = ["sft", str(tmp_path / "warm.yaml"), "--out", str(tmp_path / "model")]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"sft step {step}/60" in shown for step in (0, 20, 40, 60))
    result = json.loads((tmp_path / "model" / "sft.json").read_text())
    losses = [float(part.split()[0]) for part in shown.split("loss ")[1:]]
    assert result["steps"] == 60 and losses[-1] < losses[0]
    assert f"sft step 0/60 held-out accuracy: greedy {result['greedy_before']:.3f}" in shown
    before, after = (
        load_policy(config.model, seed=0),
        load_policy(config.model.model_copy(update={"path": str(tmp_path / "model")}), seed=0),
    )
    assert any(not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "already holds a model" in capsys.readouterr().err


def test_it_stops_where_accuracy_leaves_room_as_gold_sees_it(tmp_path):
    """The tiny model gets about .4: above .2 for exact, and never for a judge that calls everything wrong."""
    nothing = tmp_path / "nothing.py"
    nothing.write_text("def nothing(completions, **columns):\n    return [0.0] * len(completions)\n")
    never = {"type": "function", "file": str(nothing), "name": "nothing"}
    for name, rewards, steps in (
        ("exact", {"functions": [EXACT]}, 2),
        ("gold stops it", {"functions": [never], "gold": [EXACT]}, 2),
        ("gold does not", {"functions": [EXACT], "gold": [never]}, 4),
    ):
        result = sft(settings(rewards=rewards, stop_accuracy=0.2), out=tmp_path / name, console=QUIET)
        assert result["steps"] == steps, name
        assert (result["greedy"] >= 0.2) == (steps == 2)


def test_a_row_without_the_target_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"no column 'essay', there is .*'answer'.*; set sft\.target_column"):
        sft(settings(target_column="essay"), out=tmp_path / "model", console=QUIET)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="choose another --out"):
        sft(settings(), out=tmp_path / "taken", console=QUIET)


def test_targets_that_evaluations_would_cut_are_counted_before_the_first_step(tmp_path):
    for limit, told in ((2, True), (6, False)):
        console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
        short = SMALL["rollout"] | {"max_completion_length": limit}
        sft(settings(rollout=short, steps=1, eval_prompts=8), out=tmp_path / str(limit), console=console)
        shown = console.export_text()
        assert ("targets have more than rollout.max_completion_length=2" in shown) == told


def test_nothing_is_trained_that_could_not_be_kept_and_what_is_evaluated_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="choose a place that can be written"):
        sft(settings(), out=tmp_path / "file", console=QUIET)
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # in the last step, after the evaluation of the second
            raise KeyboardInterrupt
        return step(*arguments)

    step = warm_start._sft_step
    monkeypatch.setattr(warm_start, "_sft_step", killed)
    with pytest.raises(KeyboardInterrupt):
        sft(settings(), out=tmp_path / "model", console=QUIET)
    assert json.loads((tmp_path / "model" / "sft.json").read_text())["steps"] == 2
    load_policy(settings().model.model_copy(update={"path": str(tmp_path / "model")}), seed=0)


def test_integers_are_written_out(make_policy):
    policy = make_policy("llama")
    prompt = Prompt(prompt_id="train/0", prompt="1+1=", token_ids=np.array([5, 6]), columns={"answer": 12})
    text = replace(prompt, columns={"answer": "12"})
    number, written = (encode_examples([p], policy, "answer")[0] for p in (prompt, text))
    assert torch.equal(number, written)
    with pytest.raises(DataError, match=r"but 1\.5; write it out"):
        encode_examples([replace(prompt, columns={"answer": 1.5})], policy, "answer")
    with pytest.raises(
        DataError, match=r"train/0 has 103 tokens .* sft\.target_column names, .* context of 64"
    ):
        encode_examples([replace(prompt, columns={"answer": "1" * 100})], policy, "answer")


def test_weights_that_diverge_name_the_settings_of_a_warm_start(tmp_path):
    with pytest.raises(NumericsError, match=r"lower sft\.learning_rate"):
        sft(settings(learning_rate=1e30), out=tmp_path / "model", console=QUIET)
    assert not (tmp_path / "model" / "config.json").exists()
