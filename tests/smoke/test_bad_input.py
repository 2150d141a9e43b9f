"""What a user gets wrong, and what must then be said: one line, status 2, no traceback, nothing half-made.

The other half: every option of a run changes something, every kind of noise runs, and nothing touches the
process's global random state.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vrpo
from vrpo.cli import main
from vrpo.config import Config, build
from vrpo.config.presets import merge
from vrpo.errors import INPUT_ERRORS, ConfigError, ModelError
from vrpo.models import load_tokenizer
from vrpo.train.api import _check_arguments
from vrpo.train.progress import Quiet
from vrpo.train.target import open_target

TINY = Path(vrpo.__file__).parent / "assets" / "tiny"
BASE = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic", "min_digits": 2, "max_digits": 2, "size": 32, "holdout": 0.5},
    "rewards": {"functions": [{"type": "exact"}]},
    "rollout": {"num_generations": 4, "max_completion_length": 3},
    "algorithm": {"type": "vrpo"},
    "critic": {"warmup_steps": 0, "learning_rate": 1e-3},
    "train": {
        "steps": 1,
        "completions_per_step": 8,
        "minibatch": 8,
        "microbatch": 8,
        "eval_prompts": 2,
        "eval_every": 0,
        "learning_rate": 1e-4,
    },
}
PROMPTS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]


def refused(capsys, *arguments: str) -> str:
    """The one line that the command line prints for a user's mistake."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("vrpo: ") and error.count("\n") == 1
    return error


def write(path: Path, **changes) -> str:
    path.write_text(yaml.safe_dump(merge(BASE, changes)))
    return str(path)


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- configuration ---------------------------------------------------------------------------------------

SETTINGS = {
    "train.steps=2020-13-45": ["not valid YAML"],
    "train.=3": ["KEY=VALUE"],
    "train..steps=3": ["KEY=VALUE"],
    "train.learning-rate=3": ["'train.learning-rate'", "'learning_rate'"],
    "train.learning_rate=.inf": ["train.learning_rate", "finite"],
    "rollout.temperature=.inf": ["rollout.temperature", "finite"],
    "rollout.stop=['']": ["rollout.stop.0", "at least 1 character"],
    "algorithm.scale=std": ["algorithm.scale", "type: grpo"],
    "task={}": ["task", "'arithmetic', 'math', 'choice', 'rows'"],
    "rewards.functions=[{type: exact, weight: .nan}]": ["weight", "finite"],
    "rewards.functions={type: exact, weight: 0}": ["weight 0"],
    "rewards.noise={type: length_bias, coef: .nan}": ["coef", "finite"],
    "rewards.noise=[{type: gaussian, scale: 1.0}, {type: flip, false_positive: 0.1}]": [
        "flip",
        "after gaussian",
        "put flip first",
    ],
    "rewards.noise={type: source, rates: {}}": ["rates", "at least 1"],
    "rewards.noise={type: source, rates: {web page: {false_positive: 0.9, false_negative: 0.9}}}": [
        "web page",
        "J = ",
        "type: adversarial",
    ],
}


@pytest.mark.parametrize(("setting", "parts"), SETTINGS.items(), ids=SETTINGS.keys())
def test_a_wrong_setting(capsys, tmp_path, setting, parts):
    error = refused(capsys, "train", write(tmp_path / "c.yaml"), "--dry-run", "--set", setting)
    for part in parts:
        assert part in error


FILES = {
    "train: {steps: 2020-13-45}": "cannot be read",
    "train: {steps: !!int abc}": "cannot be read",
    "a: " + "[" * 5000: "cannot be read",
    "- 1": "not a mapping",
}


@pytest.mark.parametrize(("text", "part"), FILES.items(), ids=["date", "integer", "depth", "list"])
def test_a_wrong_file(capsys, tmp_path, text, part):
    (tmp_path / "c.yaml").write_text(text)
    assert part in refused(capsys, "train", str(tmp_path / "c.yaml"), "--dry-run")


@pytest.mark.parametrize("name", ["vrpo:foo", ""])
def test_a_model_that_is_not_there_is_found_without_loading_it(capsys, tmp_path, name):
    error = refused(capsys, "train", write(tmp_path / "c.yaml"), "--dry-run", "--set", f"model.path={name!r}")
    assert "model.path" in error and ("vrpo:tiny" in error or not name)


@pytest.mark.parametrize("option", [["--resume"], ["--checkpoint", "99"], ["--allow-changes"]])
def test_a_dry_run_goes_on_from_nothing(capsys, tmp_path, option):
    assert "--dry-run" in refused(capsys, "train", write(tmp_path / "c.yaml"), "--dry-run", *option)


def test_a_dry_run_prints_the_configuration_as_it_is(capsys, tmp_path):
    texts = [":cat:", "x" * 150]
    with pytest.raises(SystemExit, match="0"):
        main(["train", write(tmp_path / "c.yaml"), "--dry-run", "--set", f"rollout.stop={texts}"])
    shown, _, _ = capsys.readouterr().out.partition("prompts x")
    assert yaml.safe_load(shown.rpartition("\n")[0])["rollout"]["stop"] == texts


@pytest.mark.parametrize("name", ["", "a folder"])
def test_completions_that_can_be_no_file_are_refused_before_the_evaluation(capsys, tmp_path, name):
    (tmp_path / "a folder").mkdir()
    where = str(tmp_path / name) if name else ""
    assert "give a file" in refused(capsys, "eval", "vrpo:tiny", "--completions", where)


def test_no_name_is_no_model_to_evaluate(capsys, tmp_path):
    error = refused(capsys, "eval", "", "--config", write(tmp_path / "c.yaml"))
    assert 'RUN|MODEL is ""; give a run folder' in error and "processing_class" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing command;"),
        (("foo",), "No such command 'foo';"),
        (("train",), "Missing argument 'CONFIG';"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(capsys, words, said):
    assert f"{said} `vrpo --help` lists what there is" in refused(capsys, *words)


def test_another_model_is_not_evaluated_by_a_setting(tmp_path):
    config = Path(write(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match=r"model\.path=vrpo:minus would not be evaluated, vrpo:tiny is"):
        open_target("vrpo:tiny", config_path=config, overrides=["model.path=vrpo:minus"])


def test_entropy_is_that_of_the_distribution_drawn_from(tmp_path):
    config = Path(write(tmp_path / "c.yaml"))
    settings = ["rollout.top_k=1", "train.eval_prompts=4"]
    result = open_target("vrpo:tiny", config_path=config, overrides=settings).evaluate()
    assert result.entropy == pytest.approx(0.0, abs=1e-6)


def test_a_file_name_that_no_file_can_have(capsys):
    assert "no configuration file" in refused(capsys, "train", "x" * 5000, "--dry-run")


def test_yaml_merge_keys_work(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  <<: &fast {steps: 3, epochs: 2}\n  steps: 4\n")
    config = vrpo.config.load(Config, tmp_path / "c.yaml", ["critic.warmup_steps=0"])
    assert (config.train.steps, config.train.epochs) == (4, 2)


# --- data ------------------------------------------------------------------------------------------------

MATH = {"type": "math", "template": "{question}="}
CHOICE = {"type": "choice", "template": "{question}{options}"}
QUESTIONS = [{"question": f"{n}", "answer": "1"} for n in range(9)]
CHOICES = [{"question": f"{n}", "choices": ["a", "b"], "answer": "A"} for n in range(9)]
DATA = {
    "number too long": ("a.jsonl", lines(PROMPTS) + '{"prompt": ' + "9" * 5000 + "}\n", {}, "line 13"),
    "nested too deep": ("a.jsonl", lines(PROMPTS) + "[" * 100_000 + "\n", {}, "line 13"),
    "half a character": (
        "a.jsonl",
        lines([*PROMPTS, {"prompt": "1\ud800", "answer": "1"}]),
        {},
        "half a char",
    ),
    "column twice": ("a.csv", "prompt,answer,prompt\n1,2,3\n4,5,6\n", {}, "'prompt' stands twice"),
    "subset of a file": ("a.jsonl", lines(PROMPTS), {"subset": "main"}, "subset='main'"),
    "split of a file": ("a.jsonl", lines(PROMPTS), {"split": "test"}, "split='test'"),
    "text as list": ("a.jsonl", lines(QUESTIONS), MATH | {"template": "{question[a]}"}, "task.template"),
    "list as mapping": ("a.jsonl", lines(CHOICES), CHOICE | {"template": "{choices[a]}"}, "task.template"),
    "not a number": ("a.jsonl", lines([{**q, "answer": float("nan")} for q in QUESTIONS]), MATH, "nan"),
}


@pytest.mark.parametrize("case", DATA.values(), ids=DATA.keys())
def test_wrong_data(capsys, tmp_path, case):
    name, text, task, part = case
    (tmp_path / name).write_text(text)
    config = write(tmp_path / "c.yaml", task={"type": "rows", "data": str(tmp_path / name)} | task)
    assert part in refused(capsys, "train", config, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name):
    text = {
        "a.jsonl": lines(PROMPTS),
        "a.json": json.dumps(PROMPTS),
        "a.csv": "prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in PROMPTS),
    }[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    from vrpo.tasks.data import read_rows

    assert read_rows(str(tmp_path / name)) == PROMPTS


# --- model -----------------------------------------------------------------------------------------------


def _edit(file: str, **values):
    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | values))

    return edit


def _replace(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


MODELS = {
    "config is a list": (_replace("config.json", "[]"), "must be a mapping"),
    "another type": (_edit("config.json", hidden_size="x"), "hidden_size"),
    "another size": (_edit("config.json", vocab_size=5), "embed_tokens"),
    "torn weights": (_replace("model.safetensors", "x" * 100), "header"),
    "tokenizer settings": (_replace("tokenizer_config.json", "[]"), "tokenizer"),
    "end is text": (_edit("generation_config.json", eos_token_id="x"), "eos_token_id"),
    "adapter is a list": (_replace("adapter_config.json", "[]"), "base model"),
    "adapter of nothing": (_replace("adapter_config.json", '{"base_model_name_or_path": null}'), "None"),
}


@pytest.mark.parametrize(("damage", "part"), MODELS.values(), ids=MODELS.keys())
def test_a_broken_model_folder(capsys, tmp_path, damage, part):
    shutil.copytree(TINY, tmp_path / "model")
    damage(tmp_path / "model")
    config = write(tmp_path / "c.yaml", model={"path": str(tmp_path / "model")})
    assert part in refused(capsys, "train", config, "--out", str(tmp_path / "run"))


def test_a_chat_template_that_fails(capsys, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    _edit("tokenizer_config.json", chat_template="{{ messages + 1 }}")(tmp_path / "model")
    config = write(tmp_path / "c.yaml", model={"path": str(tmp_path / "model")}, task={"chat": True})
    assert "chat template" in refused(capsys, "train", config, "--out", str(tmp_path / "run"))


def test_a_chat_template_is_used(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    _edit("tokenizer_config.json", chat_template=template)(tmp_path / "model")
    path = str(tmp_path / "model")
    out = run(tmp_path / "run", model={"path": path}, task={"chat": True, "template": "0+{problem}"})
    shown = json.loads((out / "rollouts.jsonl").read_text().splitlines()[0])
    assert shown["prompt"].startswith("0+")
    tokenizer = load_tokenizer(build(Config, merge(BASE, {"model": {"path": path}})).model)
    from vrpo.tasks import encode

    assert tokenizer.decode(encode(shown["prompt"], tokenizer, chat=True)) == shown["prompt"] + "="


def test_weights_that_are_nan_are_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    weights = load_file(TINY / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="logits of LlamaForCausalLM are NaN"):
        run(tmp_path / "run", model={"path": str(tmp_path / "model")})


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "backbone"], ids=["module", "backbone"])
def test_what_is_no_language_model_is_refused(model):
    from transformers import AutoModel

    from vrpo.config.run import ModelConfig
    from vrpo.models import policy_from_model

    settings = ModelConfig(path="vrpo:tiny")
    given = AutoModel.from_pretrained(TINY) if model == "backbone" else model
    with pytest.raises(ModelError, match="causal language model"):
        policy_from_model(given, load_tokenizer(settings), config=settings)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    from vrpo.config.learning import CriticConfig
    from vrpo.config.run import LoraConfig, ModelConfig
    from vrpo.models import Critic, load_policy
    from vrpo.models.weights import load_critic_weights, load_policy_weights

    def policy(rank: int):
        return load_policy(ModelConfig(path="vrpo:tiny", lora=LoraConfig(rank=rank)))

    policy(2).save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"another shape.*model\.lora"):
        load_policy_weights(policy(4), tmp_path / "policy")
    whole = load_policy(ModelConfig(path="vrpo:tiny"))
    Critic.from_policy(whole, CriticConfig(), seed=0).save_pretrained(tmp_path / "critic")
    bottleneck = Critic.from_policy(whole, CriticConfig(head={"type": "bottleneck"}), seed=0)
    with pytest.raises(ModelError, match=r"critic\.head"):
        load_critic_weights(bottleneck, tmp_path / "critic")


def test_a_folder_whose_run_was_refused_at_its_first_verdict_can_be_used_again(capsys, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def f(completions, **_):\n    return [1.0]\n")
    function = {"type": "function", "file": str(reward), "name": "f"}
    config = write(tmp_path / "c.yaml", rewards={"functions": [function]}, train={"steps": 1})
    command = ["train", config, "--out", str(tmp_path / "run")]
    refused(capsys, *command)
    reward.write_text("def f(completions, **_):\n    return [float('1' in c) for c in completions]\n")
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    assert "already holds a run" in refused(capsys, *command)


def test_a_reward_file_can_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_a_reward.py").write_text("def norm(text):\n    return text.strip()\n")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "from neighbour_of_a_reward import norm\ndef f(completions, **_):\n    return [float(norm(c) == '1') for c in completions]\n"
    )
    config = build(
        Config,
        BASE | {"rewards": {"functions": [{"type": "function", "file": str(reward), "name": "f"}]}},
    )
    assert vrpo.train(config, out=tmp_path / "run", display=Quiet())["reward_errors"] == 0


# --- rewards ---------------------------------------------------------------------------------------------

REWARDS = {
    "syntax": ("def f(:\n", "SyntaxError"),
    "exit when loaded": ("import sys\nsys.exit(0)\n", "SystemExit"),
    "exit when called": ("def f(completions, **_):\n    raise SystemExit(0)\n", "SystemExit"),
    "other name": ("def g(completions):\n    return []\n", "no function 'f'"),
    "beyond fp32": ("def f(completions, **_):\n    return [1e300] * len(completions)\n", "1e+300"),
    "half a character": ("def f(completions, **_):\n    raise ValueError('\\ud800')\n", "ud800"),
}


@pytest.mark.parametrize(("code", "part"), REWARDS.values(), ids=REWARDS.keys())
def test_a_wrong_reward_file(capsys, tmp_path, code, part):
    (tmp_path / "reward.py").write_text(code)
    function = {"type": "function", "file": str(tmp_path / "reward.py"), "name": "f"}
    config = write(tmp_path / "c.yaml", rewards={"functions": [function]})
    assert part in refused(capsys, "train", config, "--out", str(tmp_path / "run"))


@pytest.mark.parametrize(
    "given",
    [
        {"train_dataset": None},
        {"train_dataset": 5},
        {"train_dataset": ["a", "b"]},
        {"train_dataset": []},
        {"train_dataset": [{"question": "1"}, {"question": "2"}]},
        {"train_dataset": [*PROMPTS, {"prompt": None}]},
        {"eval_dataset": []},
        {"eval_dataset": [{"prompt": "1="}]},
        {"reward_funcs": []},
        {"reward_funcs": lambda completions, gold: [1.0] * len(completions)},
        {"reward_weights": [float("nan")]},
        {"model": "./nowhere"},
    ],
    ids=" ".join,
)
def test_trainer_refuses_in_one_line(tmp_path, given):
    def exact(completions, answer, **_):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    settings = {"model": "vrpo:tiny", "reward_funcs": exact, "train_dataset": PROMPTS} | given
    config = build(Config, {k: v for k, v in BASE.items() if k not in ("model", "task", "rewards")})
    with pytest.raises(INPUT_ERRORS) as caught:
        vrpo.Trainer(config=config, output_dir=tmp_path / "run", **settings).train(display=Quiet())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("functions", [None, 3, ["exact"]])
def test_what_is_no_function_is_refused_in_one_line(functions):
    with pytest.raises(ConfigError, match=r"reward_funcs=.* holds no functions"):
        _check_arguments(Config(), functions, None)
    with pytest.raises(ConfigError, match=r"gold_funcs=.* holds no functions"):
        _check_arguments(Config(), [len], None, functions)  # Trainer itself is type-checked here


# --- every option does something -------------------------------------------------------------------------


def run(out: Path, **changes) -> Path:
    vrpo.train(build(Config, merge(BASE, changes)), out=out, display=Quiet())
    return out


def result(out: Path) -> tuple:
    """What a run computed: its weights, what it sampled, how it was judged."""
    files = sorted((out / "checkpoints").rglob("model.safetensors"))
    weights = [tensor.numpy().tobytes() for file in files for _, tensor in sorted(load_file(file).items())]
    return weights, (out / "rollouts.jsonl").read_text(), (out / "evaluations.jsonl").read_text()


def finite(out: Path) -> bool:
    """No loss, gradient or objective of the run is missing (null) or was skipped."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = (
        "loss/",
        "objective/",
        "policy/grad",
        "policy/approxkl",
        "val/mean",
        "val/grad",
        "val/bottleneck",
    )
    numbers = [v for r in records for k, v in r.items() if k.startswith(names)]
    skipped = sum(r.get("policy/skipped_updates", 0) + r.get("val/skipped_updates", 0) for r in records)
    return bool(numbers) and all(isinstance(v, float) for v in numbers) and skipped == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple:
    return result(run(tmp_path_factory.mktemp("plain") / "run", **NOISY))


NOISY = {
    "rewards": {"noise": {"type": "flip", "false_positive": 0.4, "false_negative": 0.2}},
    "train": {"completions_per_step": 16, "minibatch": 8, "microbatch": 8},
}
OPTIONS = [
    {"algorithm": {"gamma": 0.9}},
    {"algorithm": {"lam": 0.5}},
    {"algorithm": {"length_adaptive_alpha": 0.5}},
    {"algorithm": {"cliprange": 1e-6}},
    {"algorithm": {"cliprange_high": 1e-6}},
    {"algorithm": {"whiten_advantages": False}},
    {"algorithm": {"truncation": "bootstrap"}},
    {"algorithm": {"truncation": "mask"}},
    {"algorithm": {"kl_coef": 0.5}, "train": {"epochs": 2}},
    {"critic": {"head": {"type": "scalar"}}},
    {"critic": {"head": {"latent_dim": 8}}},
    {"critic": {"head": {"beta": 1.0, "beta_warmup": 0.0}}},
    {"critic": {"head": {"sample": False}}},
    {"critic": {"head": {"type": "scalar"}, "cliprange_value": 1e-4}},
    {"critic": {"layers": 1}},
    {"critic": {"trunk": "policy", "semantic": {"mode": "off"}}},
    {"critic": {"semantic": {"mode": "off"}}},
    {"critic": {"semantic": {"mode": "kl_ref"}}},
    {"critic": {"semantic": {"mode": "kl_ref", "selector": "reference"}}},
    # at step 1 the value features are the reference's
    {"critic": {"semantic": {"selector": "reference"}}, "train": {"steps": 2}},
    {"critic": {"semantic": {"fraction": 0.7}}},
    {"critic": {"semantic": {"entropy_coef": 0.5}}},
    {"critic": {"semantic": {"nll_coef": 0.5}}},
    {"rollout": {"temperature": 0.5}},
    {"rollout": {"top_k": 2}},
    {"rollout": {"top_p": 0.5}},
    {"rollout": {"stop": ["1"]}},
    {"rollout": {"num_generations": 1}},
    {"rollout": {"num_generations": 16}},
    {"train": {"weight_decay": 0.5}},
    {"train": {"max_grad_norm": 1e-3}},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_an_option_changes_something_and_stays_finite(tmp_path, plain, option):
    out = run(tmp_path / "run", **merge(NOISY, option))
    assert finite(out)
    assert result(out) != plain


NOISES = [
    {"type": "prompt_flip", "rate": 0.4},
    {"type": "persistent", "false_positive": 0.4, "false_negative": 0.3},
    {"type": "wrong_label", "rate": 0.9},
    {"type": "majority", "votes": 2},
    {"type": "source", "rates": {"arithmetic": {"type": "adversarial"}}},
    {"type": "gaussian", "scale": 1.0},
    {"type": "length_bias", "coef": 0.5},
    {"type": "keyword_bias", "phrase": "1", "bonus": 0.5},
    {"type": "missing", "rate": 0.3},
    {"type": "adversarial"},
]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise["type"])
def test_every_noise_runs_and_reaches_the_learner_alone(tmp_path, noise):
    out = run(
        tmp_path / "run",
        rewards={"noise": noise},
        rollout={"max_completion_length": 6},
        train={"completions_per_step": 32, "minibatch": 32},
    )
    assert finite(out)
    shown = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert all(r["clean_reward"] in (0.0, 1.0) for r in shown)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    changed = any(r["reward"] != r["clean_reward"] for r in shown)
    assert changed or records[0]["objective/scores"] != records[0]["objective/scores_clean"]


def test_no_global_random_state_is_touched(tmp_path):
    # Python's own generator is left out: the type checker of these tests draws from it
    before = (np.random.get_state(), torch.get_rng_state())
    run(tmp_path / "run", model={"lora": {"rank": 2}}, rewards={"noise": {"type": "gaussian", "scale": 1.0}})
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_new_run_starts_from_an_earlier_critic(tmp_path):
    earlier = run(tmp_path / "a") / "checkpoints" / "step-1" / "critic"
    from vrpo.config.learning import CriticConfig
    from vrpo.models import Critic, load_policy

    settings = build(Config, merge(BASE, {"critic": {"path": str(earlier)}}))
    assert isinstance(settings.critic, CriticConfig)
    critic = Critic.from_policy(load_policy(settings.model), settings.critic, seed=0)
    saved = load_file(earlier / "value_head.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in critic.head.state_dict().items())
    assert finite(run(tmp_path / "b", critic={"path": str(earlier)}))


@pytest.mark.parametrize("command", ["train", "sft", "study"])
def test_no_folder_is_not_the_working_folder(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert "names nothing" in refused(capsys, command, write(tmp_path / "c.yaml"), "--out", "")
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_critic_with_a_shorter_context_is_refused_before_the_first_step(tmp_path, capsys):
    from transformers import GPT2Config, GPT2Model

    critic = GPT2Model(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    critic.save_pretrained(tmp_path / "critic")
    config = write(
        tmp_path / "c.yaml", critic={"path": str(tmp_path / "critic"), "semantic": {"mode": "off"}}
    )
    line = refused(
        capsys, "train", config, "--out", str(tmp_path / "run"), "--set", "rollout.max_completion_length=6"
    )
    assert "more than the critic's context of 8" in line


def test_the_plan_of_an_adapters_folder_is_of_its_base(tmp_path, capsys):
    from vrpo.config.run import LoraConfig, ModelConfig
    from vrpo.models import load_policy

    policy = load_policy(ModelConfig(path="vrpo:tiny", lora=LoraConfig(rank=2), device="cpu"))
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit) as ended:
        main(["plan", write(tmp_path / "c.yaml", model={"path": str(tmp_path / "adapter")})])
    assert not ended.value.code
    assert "0.3 M parameters" in capsys.readouterr().out


def test_a_shape_that_is_not_there_is_not_asked_of_the_hub(tmp_path, capsys):
    shape = str(tmp_path / "nope.json")
    line = refused(capsys, "plan", write(tmp_path / "c.yaml"), "--model-config", shape)
    assert "--model-config: there is no" in line


def test_a_tokenizer_of_another_model_is_refused():
    from transformers import PreTrainedTokenizerFast

    from vrpo.config.run import ModelConfig
    from vrpo.models import load_policy

    settings = ModelConfig(path="vrpo:tiny")
    larger = load_tokenizer(settings)
    assert isinstance(larger, PreTrainedTokenizerFast)
    larger.add_tokens([f"<{i}>" for i in range(9)])
    with pytest.raises(ModelError, match=r"knows 109 tokens but the model embeds 100"):
        load_policy(settings, tokenizer=larger)
    with pytest.raises(ModelError, match="is a str"):
        load_policy(settings, tokenizer="gpt2")
