"""Whole runs with the model in the package: they learn, resume to the bit, and say what is wrong in one line."""

import asyncio
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import vrpo
from vrpo.cli import main
from vrpo.config import Config, build, load
from vrpo.config.presets import merge
from vrpo.errors import CheckpointError, ConfigError, RewardError, VrpoError
from vrpo.models import Critic
from vrpo.models.backbone import recomputes
from vrpo.study.results import cell_numbers
from vrpo.train import checkpoint, learning
from vrpo.train.catalogue import EVALUATIONS, explain_metric
from vrpo.train.progress import Quiet
from vrpo.train.run import build_run, load_ingredients
from vrpo.train.update import update

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic", "min_digits": 2, "max_digits": 2},
    "rewards": {
        "functions": [{"type": "exact"}],
        "noise": {"type": "flip", "false_positive": 0.3, "false_negative": 0.3},
    },
    "rollout": {"num_generations": 4, "max_completion_length": 6},
    "train": {
        "steps": 4,
        "completions_per_step": 32,
        "minibatch": 16,
        "microbatch": 8,
        "learning_rate": 1e-4,
        "eval_prompts": 8,
        "eval_every": 2,
        "checkpoint_every": 2,
    },
    "critic": {"warmup_steps": 1, "epochs": 2, "learning_rate": 5e-4},
}
ALWAYS_FINITE = (
    "objective/scores",
    "objective/scores_clean",
    "val/explained_var",
    "val/bottleneck_kl",
    "val/bottleneck_beta",
    "val/selected_entropy_frac",
    "val/selected_nll_frac",
    "loss/value_avg",
    "loss/semantic_avg",
    "val/grad_norm",
)
WALL_CLOCK = ("time/", "tokens_per_second/", "memory/")


def small(**changes) -> Config:
    data = merge(SMALL, changes)
    algorithm = data.get("algorithm")
    if (algorithm["type"] if isinstance(algorithm, dict) else algorithm) == "grpo":
        data.pop("critic", None)
    return build(Config, data)


def run(config: Config, out: Path, **settings) -> dict:
    return vrpo.train(config, out=out, display=Quiet(), **settings)


def lines(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(WALL_CLOCK)} for record in records]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: policy, critic and both optimizers."""
    folder = out / "checkpoints" / f"step-{step}"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": tensor for f in files for name, tensor in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("algorithm", ["vrpo", "ppo", "grpo"])
def test_a_run_leaves_everything_a_user_expects(tmp_path, algorithm):
    summary = run(small(algorithm=algorithm), tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "evaluations.jsonl",
        "summary.json",
    }
    records = lines(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    undocumented = {name for record in records for name in record if explain_metric(name) is None}
    assert undocumented == set()
    for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines():
        assert set(json.loads(line)) - {"step"} <= set(EVALUATIONS)
    if algorithm == "vrpo":
        assert all(record[name] is not None for record in records for name in ALWAYS_FINITE)
        # none may be selected in a step of this size, but not in every step
        assert all(any(record[f"val/selected_{kind}"] for record in records) for kind in ("entropy", "nll"))
    assert summary["sampler_trainer_kl_max"] < 1e-6
    assert all(
        record["sampling/trainer_ratio_error"] < 1e-4 for record in records if "sampling/trainer_kl" in record
    )
    assert load(Config, tmp_path / "run") == small(algorithm=algorithm)
    step = tmp_path / "run" / "checkpoints" / "step-4"
    assert AutoModelForCausalLM.from_pretrained(step / "policy").num_parameters() > 300_000
    if algorithm != "grpo":
        assert AutoModel.from_pretrained(step / "critic").num_parameters() > 300_000
        assert (
            "policy/approxkl_avg" not in records[0] and "policy/approxkl_avg" in records[1]
        )  # one warm-up step
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pkl"))


CASES = {
    "vrpo": {"train": {"epochs": 2}},
    "kl_ref, adaptive lambda, KL penalty": {
        "algorithm": {"type": "vrpo", "kl_coef": 0.05, "length_adaptive_alpha": 0.5},
        "critic": {"semantic": {"mode": "kl_ref", "selector": "reference"}},
    },
    "grpo": {"algorithm": "grpo"},
    "lora": {"model": {"lora": {"rank": 4}}},
    "borrowed trunk": {"critic": {"trunk": "policy", "semantic": {"mode": "off"}}},
    "denoiser, uncertainty features, cross-entropy, soft trust": {
        "algorithm": {"type": "vrpo", "critic_trust": "soft"},
        "critic": {"features": "uncertainty", "regression": "bce"},
        "denoiser": {"learning_rate": 1e-3, "capacity": 40},
    },
    "belief as features, siblings asked": {
        "algorithm": {
            "type": "vrpo",
            "sibling_coverage": True,
            "lam_covered": 0.1,
            "sibling_correction": True,
            "belief_coef": 0.1,
        },
        "critic": {"features": "belief"},
        "denoiser": {"learning_rate": 1e-3, "one_right": True},
    },
    "rewards of 0 to 100": {"rewards": {"functions": [{"type": "exact", "weight": 100.0}], "noise": None}},
    "exact values": {"algorithm": {"type": "ppo", "lam": 0.5}, "critic": {"oracle": "answer"}},
    "grpo with a denoiser of known rates, its belief followed": {
        "algorithm": {"type": "grpo", "belief_coef": 0.1},
        "denoiser": {"learning_rate": 1e-3, "false_positive": 0.3, "false_negative": 0.3},
    },
    "a judge that likes length, and a denoiser for real-valued rewards": {
        "rewards": {"noise": {"type": "length_bias", "coef": 0.3}},
        "denoiser": {"learning_rate": 1e-3, "channel": "gaussian", "nuisance": "length"},
    },
    "a judge that likes a digit, and a slope for every token": {
        "rewards": {"noise": {"type": "keyword_bias", "phrase": "1", "bonus": 0.5}},
        "denoiser": {"learning_rate": 1e-3, "channel": "gaussian", "nuisance": "tokens"},
    },
    "two layers, activations computed again, pieces by tokens": {
        "critic": {"layers": 2},
        "train": {"activation_checkpointing": True, "max_tokens_per_microbatch": 100},
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, changes):
    config = small(**changes)
    run(config, tmp_path / "whole")
    if config.denoiser is not None:
        levels = (
            ("low", "high")
            if config.denoiser.channel == "gaussian"
            else ("false_positive", "informativeness")
        )
        assert all(line[f"denoiser/{levels[1]}"] > 0 for line in lines(tmp_path / "whole"))
        assert all(line[f"denoiser/{levels[0]}"] < 1 for line in lines(tmp_path / "whole"))
    # as if killed in step 4: a checkpoint of step 2, and records that run ahead of it with a torn last line
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-4")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "obj')
    run(config, tmp_path / "killed", resume=True)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for name in ("rollouts.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert same(weights(tmp_path / "killed", 4), weights(tmp_path / "whole", 4))
    assert not same(weights(tmp_path / "whole", 2), weights(tmp_path / "whole", 4))
    liked = [
        json.loads((tmp_path / name / "summary.json").read_text()).get("judge_pays_for")
        for name in ("whole", "killed")
    ]
    assert liked[0] == liked[1]
    assert bool(liked[0]) == (config.denoiser is not None and config.denoiser.nuisance != "none")


def test_the_unit_of_rewards_changes_nothing(tmp_path):
    """What takes 100 points learns what takes 1,000 does, and knows as much: no critic is out of its reach."""
    found = {}
    for points in (100.0, 1000.0):
        rewards = {"functions": [{"type": "exact", "weight": points}], "noise": None}
        run(small(rewards=rewards, train={"steps": 8}), tmp_path / str(points))
        found[points] = lines(tmp_path / str(points))
    few, many = found.values()
    for a, b in zip(few[1:], many[1:], strict=True):  # the first values come before the first rewards
        assert b["val/mean"] == pytest.approx(10 * a["val/mean"], rel=0.02)
        assert b["val/explained_var"] == pytest.approx(a["val/explained_var"], abs=0.02)
    # within a few steps the values are where the rewards are
    assert few[-1]["val/mean"] == pytest.approx(few[-1]["val/return_mean"], abs=25.0)


def test_vrpo_with_zero_coefficients_is_ppo(tmp_path):
    zero = {"head": {"type": "scalar"}, "semantic": {"mode": "literal", "entropy_coef": 0.0, "nll_coef": 0.0}}
    run(small(algorithm="ppo"), tmp_path / "ppo")
    run(small(algorithm="vrpo", critic=zero), tmp_path / "vrpo")
    assert same(weights(tmp_path / "ppo", 4), weights(tmp_path / "vrpo", 4))
    ours, theirs = lines(tmp_path / "vrpo"), lines(tmp_path / "ppo")
    assert all(a[name] == b[name] for a, b in zip(ours, theirs, strict=True) for name in b)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) * 7 + seed)  # the global state of the process must not matter
        run(small(train={"seed": seed, "steps": 2}, algorithm="grpo"), tmp_path / name)
    assert lines(tmp_path / "a") == lines(tmp_path / "b") != lines(tmp_path / "c")
    before = torch.get_rng_state()
    run(small(train={"steps": 1}, algorithm="grpo"), tmp_path / "d")
    assert torch.equal(before, torch.get_rng_state())


def test_missing_rewards_are_masked_and_counted(tmp_path):
    noise = [{"type": "missing", "rate": 0.5}]
    run(small(rewards={"noise": noise}, train={"steps": 2}), tmp_path / "run")
    counts = [record["rewards/missing"] for record in lines(tmp_path / "run")]
    assert all(4 <= count <= 28 for count in counts)
    seen = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {r["reward"] for r in seen if r["reward"] is None} == {None}
    assert all(r["clean_reward"] in (0.0, 1.0) for r in seen)


def test_a_short_run_learns(tmp_path):
    """Clean rewards, 25 steps: held-out accuracy of samples must rise by 5 points (it rises by about 9)."""
    train = {
        "steps": 25,
        "completions_per_step": 256,
        "minibatch": 64,
        "microbatch": 64,
        "eval_every": 0,
        "lr_warmup_steps": 5,
    }
    config = small(
        algorithm="grpo",
        rewards={"noise": []},
        rollout={"num_generations": 8},
        train=train | {"learning_rate": 1e-4, "eval_prompts": 512, "checkpoint_every": 0},
    )
    summary = run(config, tmp_path / "run")
    first, final = summary["clean_accuracy"]["first"], summary["clean_accuracy"]["final"]
    assert final["sampled"] > first["sampled"] + 0.05
    assert summary["sampler_trainer_kl_max"] < 1e-6


def rows(count: int = 24) -> list[dict]:
    return [
        {"prompt": f"{n}+{n + 3}=", "answer": str(2 * n + 3), "source": "sum"} for n in range(10, 10 + count)
    ]


def python_config(**train) -> Config:
    settings = (
        SMALL["train"] | {"steps": 2, "completions_per_step": 16, "minibatch": 16, "microbatch": 8} | train
    )
    return Config(
        algorithm="vrpo",
        rollout={"num_generations": 4, "max_completion_length": 6},
        critic={"warmup_steps": 1},
        train=settings,
    )


def trainer(reward, out: Path, **settings) -> vrpo.Trainer:
    given = {
        "model": "vrpo:tiny",
        "train_dataset": rows(),
        "config": python_config(),
        "output_dir": out,
    } | settings
    return vrpo.Trainer(reward_funcs=reward, **given)


def exact(prompts, completions, answer, **columns):
    return [1.0 if c.strip() == a else 0.0 for c, a in zip(completions, answer, strict=True)]


async def slowly(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [None if "9" in c else float(len(c) < 4) for c in completions]


def test_trainer_takes_functions_rows_and_model_objects(tmp_path):
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(ROOT / "src" / "vrpo" / "assets" / "tiny")
    before = model.get_input_embeddings().weight.detach().clone()
    ours = trainer(
        [exact, slowly],
        tmp_path / "run",
        model=model,
        train_dataset=Dataset.from_list(rows()),
        reward_weights=[1.0, 0.5],
    )
    summary = ours.train(display=Quiet())
    assert summary["steps"] == 2
    assert not torch.equal(before, model.get_input_embeddings().weight)  # trained in place
    records = lines(tmp_path / "run")
    assert {"rewards/exact/mean", "rewards/slowly/mean"} <= records[0].keys()
    assert 0.0 <= ours.evaluate().greedy <= 1.5
    with pytest.raises(ConfigError, match="trained already"):
        ours.train(resume=True)
    ours.save_model(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 300_000


def inverted(prompts, completions, answer, **columns):
    return [1.0 - value for value in exact(prompts, completions, answer)]


def test_gold_is_what_runs_are_judged_by_and_never_learned_from(tmp_path):
    def some(prompts, completions, answer, **columns):
        return [
            value if len(text) < 3 else None
            for value, text in zip(exact(prompts, completions, answer), completions, strict=True)
        ]

    runs = {
        "none": None,
        "gold": exact,
        "some": some,
        "nowhere": lambda completions, **_: [None] * len(completions),
    }
    seen, clean = {}, {}
    for name, gold in runs.items():
        ours = trainer(
            inverted, tmp_path / name, gold_funcs=gold, config=python_config(steps=2, eval_every=0)
        )
        if name == "nowhere":  # no evaluation without a verdict
            with pytest.raises(VrpoError, match="clean reward"):
                ours.train(display=Quiet())
            continue
        ours.train(display=Quiet())
        first = lines(tmp_path / name)[0]
        seen[name], clean[name] = first["objective/scores"], first["objective/scores_clean"]
        assert ("noise/seen_accuracy" in first) == (gold is not None)
        if gold is not None:
            assert first["noise/false_positive"] == 1.0 and first["noise/informativeness"] in (-1.0, None)
    assert len(set(seen.values())) == 1  # and so is everything that is learned
    assert clean["none"] == seen["none"] and clean["gold"] == pytest.approx(1.0 - seen["gold"])
    weights = [
        load_file(tmp_path / n / "checkpoints" / "step-2" / "policy" / "model.safetensors")
        for n in ("none", "gold", "some")
    ]
    assert all(torch.equal(weights[0][k], other[k]) for other in weights[1:] for k in weights[0])


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights=\[1\.0, 2\.0\] for 1"),
        ({"config": Config(task={"type": "arithmetic"})}, "remove `task`"),
        ({"train_dataset": []}, "rows"),
        ({"max_prompt_tokens": 1}, "longer than max_prompt_tokens=1"),
        ({"chat": True}, "chat template"),
        ({"holdout": 1.0}, r"holdout=1\.0 is no share between 0 and 1"),
        ({"train_dataset": [{"question": "?"}] * 4}, "prompt"),
    ],
)
def test_trainer_arguments_that_do_not_fit(tmp_path, settings, part):
    with pytest.raises(VrpoError, match=part) as caught:
        trainer(exact, tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)


def test_a_denoiser_whose_rewards_do_not_differ_learns_nothing_yet(tmp_path):
    """All are 100 in the first step, and in the second there is a scale to learn on."""
    steps = []

    def judge(completions, **columns):
        steps.append(len(completions))
        return [100.0 + (sum(steps) > 16) * (i % 2) for i in range(len(completions))]

    config = Config(
        algorithm="grpo",
        rollout={"num_generations": 4, "max_completion_length": 6},
        denoiser={"channel": "gaussian", "learning_rate": 1e-3},
        train=SMALL["train"]
        | {"steps": 2, "completions_per_step": 16, "minibatch": 16, "microbatch": 8, "eval_every": 0},
    )
    named_judge = vrpo.rewards.named(judge, isolation="none", timeout=None)
    trainer(named_judge, tmp_path / "run", config=config, gold_funcs=exact).train(display=Quiet())
    first, second = lines(tmp_path / "run")
    assert first["loss/denoiser_avg"] is None and second["loss/denoiser_avg"] is not None
    assert (first["denoiser/low"], first["denoiser/high"]) == (None, None)  # nothing is known of them
    assert second["denoiser/low"] == pytest.approx(100.0) and second["denoiser/high"] == pytest.approx(101.0)


def test_trainer_holds_out_the_share_it_is_told(tmp_path):
    held_out = [
        len(trainer(exact, tmp_path / "run", holdout=share)._ingredients.task.eval_prompts(1000))
        for share in (0.1, 0.6)
    ]
    assert held_out[0] < 0.3 * len(rows()) and held_out[1] > 0.4 * len(rows())


def sometimes(kind):
    def reward(prompts, completions, **columns):
        bad = {"nan": float("nan"), "text": "good", "list": [1.0], "inf": float("inf")}
        if kind == "raise" and any(c.startswith("4") for c in completions):
            raise ValueError("no verdict")
        return [bad[kind] if c.startswith("4") and kind in bad else 0.5 for c in completions]

    return reward


@pytest.mark.parametrize("kind", ["nan", "inf", "text", "list", "raise"])
def test_a_bad_sample_is_masked_counted_and_shown(tmp_path, kind):
    trainer(sometimes(kind), tmp_path / "run", config=python_config(completions_per_step=64)).train(
        display=Quiet()
    )
    records = lines(tmp_path / "run")
    errors = sum(record["rewards/errors"] for record in records)
    assert 0 < errors < 128
    assert errors == sum(record["rewards/missing"] for record in records)
    shown = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert sum(bool(r["errors"]) for r in shown) == errors
    assert all(r["reward"] is None for r in shown if r["errors"])


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions, **_: [1.0],
        lambda completions, **_: 1.0,
        lambda completions, **_: 1 / 0,
        lambda completions, **_: ["x"] * len(completions),
    ],
    ids=["wrong length", "no list", "always raises", "always text"],
)
def test_a_broken_contract_stops_the_run(tmp_path, reward):
    with pytest.raises(RewardError) as caught:
        trainer(reward, tmp_path / "run").train(display=Quiet())
    assert "\n" not in str(caught.value)


def cli(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


@pytest.fixture
def recipe(tmp_path) -> Path:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(SMALL, {"train": {"steps": 2, "eval_every": 0}})))
    return path


def test_the_denoisers_minibatch_is_its_own(tmp_path, monkeypatch):
    """As many optimizer steps as it says, over fresh and replayed responses."""
    steps = {}

    def counted(*args, **settings):
        stats = update(*args, **settings)
        steps.setdefault(settings["labels"][0], []).append(stats.minibatches)
        return stats

    monkeypatch.setattr(learning, "update", counted)
    per_step = SMALL["train"]["completions_per_step"]
    run(small(algorithm="grpo", denoiser={"replay": 1, "minibatch": per_step}), tmp_path / "run")
    total = SMALL["train"]["steps"]
    assert steps["denoiser"] == [1] + [2] * (total - 1)  # the first step has no past
    assert steps["policy"] == [per_step // SMALL["train"]["minibatch"]] * total


def test_what_the_judge_pays_for_is_printed(capsys, tmp_path, recipe):
    slopes = "denoiser={channel: gaussian, nuisance: tokens, learning_rate: 1.0e-3}"
    status, text, _ = cli(capsys, "train", str(recipe), "--set", slopes, "--out", str(tmp_path / "run"))
    assert status == 0 and "besides the verdict the judge pays" in text and "for tokens that occur: '" in text


def test_eval_of_the_denoisers_model(capsys, tmp_path, recipe):
    """One that has learned nothing is the initial model, whatever became of the policy."""
    out = str(tmp_path / "run")
    rates = ("--set", "denoiser={learning_rate: 1.0e-12}", "--set", "train.learning_rate=0.1")
    assert cli(capsys, "train", str(recipe), *rates, "--out", out)[0] == 0

    def numbers(*arguments):
        status, text, _ = cli(capsys, "eval", *arguments)
        assert status == 0
        return re.findall(r"\.\d{3}", text)

    initial = numbers("vrpo:tiny", "--config", str(recipe))
    assert numbers(out, "--denoiser") == initial != numbers(out)
    records = list(map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()))
    assert [f"{record['denoiser_greedy']:.3f}"[1:] for record in records] == initial[:1] * 2
    assert records[0]["clean_greedy"] == records[0]["denoiser_greedy"] != records[1]["clean_greedy"]

    without = str(tmp_path / "without")
    assert cli(capsys, "train", str(recipe), "--set", "denoiser=null", "--out", without)[0] == 0
    status, _, error = cli(capsys, "eval", without, "--denoiser")
    assert status == 2 and "has no denoiser" in error


def test_eval_of_a_checkpoint_by_name_with_its_completions(capsys, tmp_path, recipe):
    out, file = tmp_path / "run", tmp_path / "completions.jsonl"
    steps = ("--set", "train.steps=4", "--set", "train.eval_every=2", "--set", "train.checkpoint_every=2")
    assert cli(capsys, "train", str(recipe), "--out", str(out), *steps)[0] == 0
    kept = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    for record, accuracy in zip(kept, (0.9, 0.8, 0.1), strict=True):  # step 0 has no checkpoint
        record["clean_greedy"] = accuracy
    (out / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    more = ("--set", "train.eval_samples=3", "--completions", str(file))
    status, best, _ = cli(capsys, "eval", str(out), "--checkpoint", "best", *more)
    assert status == 0 and "best of 3" in best and f"completions: {file}" in best
    written = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = kept[0]["prompts"]
    assert [line["greedy"] for line in written] == [True] * prompts + [False] * 3 * prompts
    right: dict[str, float] = {}
    for line in written[prompts:]:
        right[line["prompt_id"]] = max(right.get(line["prompt_id"], 0.0), line["clean_reward"])
    means = [
        sum(line["clean_reward"] for line in written[:prompts]) / prompts,
        sum(line["clean_reward"] for line in written[prompts:]) / (3 * prompts),
        sum(right.values()) / prompts,
    ]
    numbers = re.findall(r"[01]\.\d{3}", best)
    assert numbers[:3] == [f"{mean:.3f}" for mean in means]
    of_step_2 = cli(capsys, "eval", str(out), "--checkpoint", "2")[1]
    assert re.findall(r"[01]\.\d{3}", of_step_2)[0] == numbers[0] and "best of" not in of_step_2
    for wrong, part in (("3", "there are 2, 4, and 'best'"), ("last", "no checkpoint of step last")):
        status, _, error = cli(capsys, "eval", str(out), "--checkpoint", wrong)
        assert status == 2 and part in error
    status, _, error = cli(capsys, "eval", str(out), "--completions", str(tmp_path / "no" / "a.jsonl"))
    assert status == 2 and "there is no folder" in error


def test_a_run_starts_with_what_the_model_reads_and_with_a_slow_critic(capsys, tmp_path, recipe, monkeypatch):
    still = ("--set", "train.steps=0", "--set", "critic.warmup_steps=0")
    slow = (*still, "--set", "critic.learning_rate=5.0e-6")
    status, text, _ = cli(capsys, "train", str(recipe), "--out", str(tmp_path / "a"), *slow)
    told = " ".join(text.split())
    assert status == 0 and re.search(r"a prompt, as the model reads it: '(<[a-z]+>)?\d\d\+\d\d='", told)
    assert "note: critic.learning_rate=5e-06 is below train.learning_rate=0.0001" in told
    monkeypatch.setattr("vrpo.train.run.SHOWN", 3)
    status, text, _ = cli(capsys, "train", str(recipe), "--out", str(tmp_path / "b"), *still)
    assert status == 0 and "note: critic" not in text
    assert re.search(r"as the model reads it: '.. \.\.\. .='", " ".join(text.split()))


def test_resuming_a_run_folder_goes_on_in_it(capsys, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert cli(capsys, "train", str(recipe), "--out", str(out))[0] == 0
    done = len(lines(out))
    status, text, _ = cli(capsys, "train", str(out), "--resume", "--set", f"train.steps={done + 1}")
    assert status == 0 and f"run folder: {out}" in text and len(lines(out)) == done + 1
    assert not (tmp_path / "runs").exists()


def test_an_accuracy_of_few_judged_prompts_says_so(capsys, tmp_path, recipe):
    """Gold on a part of the held-out rows: in the lines of a run, in its table and record, in `eval`, in a study."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row | {"gold": None}) + "\n" for row in rows()))
    held = tmp_path / "held.jsonl"
    held.write_text(
        "".join(
            json.dumps(r | {"gold": r["answer"] if n < 3 else None}) + "\n" for n, r in enumerate(rows()[:8])
        )
    )
    settings = {
        "task": f"{{type: rows, data: {data}, eval_data: {held}}}",
        "rewards.functions": "[{type: exact}]",
        "rewards.gold": "[{type: exact, column: gold}]",
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    status, text, error = cli(capsys, "train", str(recipe), "--out", str(out), *overrides)
    assert status == 0, error
    assert "(3 of 8 prompts judged)" in text and "3 of 8" in text.split("held-out clean accuracy")[-1]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["clean_accuracy"]["final"]["judged"], summary["clean_accuracy"]["final"]["prompts"]) == (
        3,
        8,
    )
    assert cell_numbers(out)["judged"] == 3.0
    assert cell_numbers(tmp_path / "run")["final_greedy"] == summary["clean_accuracy"]["final"]["greedy"]


def test_rewards_that_are_missing_or_no_shares_are_called_so(capsys, tmp_path, recipe):
    judges = tmp_path / "judges.py"
    judges.write_text(
        "def points(completions, answer):\n    return [100.0 * (c == a) for c, a in zip(completions, answer)]\n"
        "def shy(completions):\n    return [None if len(c) % 2 else 5.0 for c in completions]\n"
    )
    functions = (
        f"[{{type: function, file: {judges}, name: points}}, {{type: function, file: {judges}, name: shy}}]"
    )
    out = tmp_path / "run"
    status, text, error = cli(capsys, "train", str(recipe), "--out", str(out), "--set", f"rewards={{functions: {functions}, max_failed: 1.0}}")  # fmt: skip
    assert status == 0, error
    text = " ".join(text.split())
    assert " without a reward" in text and "held-out clean reward" in text and "clean accuracy" not in text
    missing = json.loads((out / "summary.json").read_text())["rewards_missing"]
    assert f"{missing:.0f} of 64 responses had no reward and taught nothing" in text
    assert ("`rewards.combine: answered` sums the others" in text) == (missing > 6.4)


def test_a_judge_that_fails_late_takes_no_step_and_the_line_says_how_to_go_on(capsys, tmp_path, recipe):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "CALLS = []\n"
        "def late(completions, answer):\n    CALLS.append(1)\n    if len(CALLS) > 3:\n        raise OSError('gone')\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    out = tmp_path / "run"
    functions = f"{{type: function, file: {judge}, name: late, isolation: none, timeout: null, retries: 0}}"
    status, _, error = cli(capsys, "train", str(recipe), "--out", str(out), "--set", f"rewards={{functions: {functions}}}")  # fmt: skip
    kept = len(lines(out))
    assert status == 2 and 0 < kept < 4
    assert "gone" in error and f"whole step{'s are' if kept > 1 else ' is'} kept, continue with --out {out} --resume" in error  # fmt: skip
    judge.write_text(judge.read_text().replace("> 3", "> 300"))
    assert cli(capsys, "train", str(recipe), "--out", str(out), "--resume", "--allow-changes")[0] == 0


def test_the_commands(capsys, tmp_path, recipe):
    out = str(tmp_path / "run")
    status, text, _ = cli(capsys, "train", str(recipe), "--out", out)
    assert (
        status == 0
        and "8 prompts x 4 generations = 32 completions" in text
        and "held-out clean accuracy" in text
    )
    status, text, _ = cli(capsys, "eval", out, "--set", "train.eval_prompts=8")
    assert status == 0 and "greedy" in text
    status, text, _ = cli(capsys, "eval", "vrpo:tiny", "--config", str(recipe))
    assert status == 0
    status, text, _ = cli(capsys, "plan", str(recipe), "--prompt-tokens", "8")
    assert status == 0 and "GiB" in text and "TFLOP" in text
    status, text, _ = cli(capsys, "explain", "algorithm.lam")
    assert status == 0 and "takes    number, >= 0.0, <= 1.0" in text and "default  0.95" in text
    status, text, _ = cli(capsys, "explain", "val/explained_var")
    assert status == 0 and "formula" in text and "smell" in text
    status, text, _ = cli(capsys, "explain", "clean_greedy")
    assert status == 0 and "greedy completion a held-out prompt" in text
    status, text, _ = cli(capsys, "explain", "sft.stop_accuracy")
    assert status == 0 and "default  None" in text
    status, text, _ = cli(
        capsys, "train", str(recipe), "--dry-run", "--set", "algorithm=grpo", "--set", "critic=null"
    )
    assert status == 0 and "type: grpo" in text and "nothing was trained" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "no configuration file"]),
        (["train", "{recipe}", "--set", "train.stepz=3"], ["train.stepz", "'steps'"]),
        (["train", "{recipe}", "--out", "{out}", "--set", "model.path=./nowhere"], ["./nowhere"]),
        (
            ["train", "{recipe}", "--dry-run", "--set", "model.path=./nowhere"],
            ["./nowhere", "no such folder"],
        ),
        (
            ["train", "{recipe}", "--out", "{out}", "--set", "rollout.max_completion_length=4000"],
            ["context of 128"],
        ),
        (
            [
                "train",
                "{recipe}",
                "--out",
                "{out}",
                "--set",
                "rewards.functions=[{type: exact, column: gold}]",
            ],
            ["'gold'", "answer"],
        ),
        (
            ["train", "{recipe}", "--out", "{out}", "--set", "task={type: rows, data: none.jsonl}"],
            ["none.jsonl"],
        ),
        (["eval", "nowhere"], ["nowhere", "--config"]),
        (["eval", "vrpo:tiny", "--config", "{recipe}", "--denoiser"], ["--denoiser needs a run folder"]),
        (["explain", "algorithm.lamb"], ["algorithm.lamb", "'algorithm.lam'"]),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(capsys, tmp_path, recipe, arguments, parts):
    filled = [a.format(recipe=recipe, out=tmp_path / "run") if a.startswith("{") else a for a in arguments]
    status, _, error = cli(capsys, *filled)
    assert status == 2
    assert error.count("\n") == 1 and error.startswith("vrpo: ")
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()  # nothing half-made is left in the way of the next try


def test_a_second_run_does_not_overwrite_the_first(capsys, tmp_path, recipe):
    out = str(tmp_path / "run")
    assert cli(capsys, "train", str(recipe), "--out", out)[0] == 0
    status, _, error = cli(capsys, "train", str(recipe), "--out", out)
    assert status == 2 and "--resume" in error


def test_resuming_with_other_settings_is_refused_but_more_steps_are_welcome(tmp_path):
    run(small(algorithm="grpo", train={"steps": 2}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"train\.learning_rate=0\.0001, now it is 0\.5"):
        run(small(algorithm="grpo", train={"steps": 2, "learning_rate": 0.5}), tmp_path / "run", resume=True)
    run(small(algorithm="grpo"), tmp_path / "run", resume=True)
    run(small(algorithm="grpo"), tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_only_the_newest_checkpoints_and_the_best_are_kept_and_step_0_is_evaluated_once(tmp_path):
    run(small(algorithm="grpo", train={"steps": 0}), tmp_path / "run")
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [0]
    config = small(algorithm="grpo", train={"checkpoint_every": 1, "keep_checkpoints": 2})
    run(config, tmp_path / "run", resume=True)
    records = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    accuracy = {e["step"]: e["clean_greedy"] for e in map(json.loads, records) if e["step"]}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == sorted({best, 3, 4})
    evaluated = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert evaluated == [0, 2, 4]


def test_the_policy_stands_still_while_the_critic_warms_up(tmp_path):
    run(small(train={"checkpoint_every": 1, "keep_checkpoints": None}), tmp_path / "run")
    rates = [record["lr"] for record in lines(tmp_path / "run")]
    assert rates[0] == 0.0 and rates[1] > 0.0
    first, second = (weights(tmp_path / "run", step) for step in (1, 2))
    initial = AutoModelForCausalLM.from_pretrained(ROOT / "src" / "vrpo" / "assets" / "tiny").state_dict()
    name = "policy/model.safetensors:model.embed_tokens.weight"
    assert torch.equal(first[name], initial["model.embed_tokens.weight"])
    assert not torch.equal(second[name], first[name])


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    run(small(train={"steps": 2}, algorithm="grpo"), tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    weights_file = newest / "policy" / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify(newest)
    weights_file.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"lacks policy/model\.safetensors, the checkpoint is damaged; there is no other",
    ):
        checkpoint.verify(newest)
    (newest / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(tmp_path):
    import signal

    from vrpo.train.signals import Stopped

    class Interrupt(Quiet):
        def step(self, step, metrics):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)

    config = small(train={"checkpoint_every": 0})
    run(config, tmp_path / "whole")
    with pytest.raises(Stopped) as caught:
        vrpo.train(config, out=tmp_path / "run", display=Interrupt())
    assert caught.value.exit_code == 143
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [1]
    run(config, tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert same(weights(tmp_path / "run", 4), weights(tmp_path / "whole", 4))


def test_what_a_denoiser_cannot_take_is_said_in_one_line(tmp_path):
    half = [{"type": "exact", "weight": 0.5}]
    with pytest.raises(RewardError, match=r"denoiser got the reward .*denoiser: null"):
        run(small(rewards={"functions": half, "noise": []}, denoiser={}), tmp_path / "run")
    with pytest.raises(ConfigError, match="give both, or neither"):
        small(denoiser={"false_positive": 0.3})
    with pytest.raises(ConfigError, match="channel=gaussian has none"):
        small(denoiser={"channel": "gaussian", "false_positive": 0.3, "false_negative": 0.3})
    with pytest.raises(ConfigError, match="J <= 0"):
        small(denoiser={"false_positive": 0.6, "false_negative": 0.5})


def test_how_passes_are_cut_and_what_they_keep_reaches_the_run(tmp_path):
    """A resumed run would equal the whole one though these settings did nothing."""
    settings = {"activation_checkpointing": True, "max_tokens_per_microbatch": 100}
    for train, again in ({}, False), (settings, True):
        config = small(train=train)
        built = build_run(config, load_ingredients(config), out=tmp_path / str(again))
        critic = built.learner.critic
        assert recomputes(built.learner.policy.backbone) is again
        assert recomputes(critic.features) is again
        assert built.splitter.tokens == train.get("max_tokens_per_microbatch")
        assert (built.splitter.shared_limit == 0) is again
        built.close()


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_trained_is_compiled_where_it_is_asked_for(tmp_path, monkeypatch, asked):
    compiled = []
    monkeypatch.setattr("vrpo.train.run.compile_blocks", compiled.append)
    settings = {"algorithm": "vrpo", "denoiser": {"learning_rate": 1e-3}}
    run(small(**settings, train={"compile": asked, "steps": 0}), tmp_path / "run")
    assert len(compiled) == (3 if asked else 0)  # policy, critic, denoiser


def test_a_borrowed_trunk_is_read_by_the_sampler_unless_the_value_after_the_end_is_asked_for(
    tmp_path, monkeypatch
):
    passes = []
    read = Critic.states_at
    monkeypatch.setattr(Critic, "states_at", lambda self, *args: passes.append(1) or read(self, *args))
    borrowed = {"train": {"steps": 2}, "critic": {"trunk": "policy", "semantic": {"mode": "off"}}}
    run(small(**borrowed), tmp_path / "terminal")
    assert passes == []
    assert all(record["val/explained_var"] is not None for record in lines(tmp_path / "terminal"))
    run(
        small(**borrowed, algorithm={"type": "vrpo", "truncation": "bootstrap"}),
        tmp_path / "cut",
    )
    assert passes
