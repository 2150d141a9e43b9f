"""The configuration: what loads, what is refused and how it is said, and that none of it needs torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo.config import Config, SftConfig, apply_overrides, build, load, read_yaml, to_yaml
from vrpo.config.describe import all_keys, config_page, sft_keys
from vrpo.config.elsewhere import OUR_NAMES
from vrpo.config.learning import CriticConfig, DenoiserConfig, GrpoConfig, ScalarHead
from vrpo.config.rewards import FunctionReward
from vrpo.config.run import TrainConfig
from vrpo.errors import ConfigError
from vrpo.study.config import read_study
from vrpo.train.batch_plan import batch_plan
from vrpo.train.catalogue import catalogue_page
from vrpo.train.notes import notes
from vrpo.train.preflight import check_files

ROOT = Path(__file__).parent.parent
BASE = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic"},
    "rewards": {"functions": [{"type": "exact"}]},
}


def message(changes: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Config, BASE | changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"trian": {}}, ["'trian'", "did you mean 'train'"]),
        ({"train": {"stpes": 3}}, ["'train.stpes'", "did you mean 'steps'"]),
        ({"train": {"cliprange": 0.1}}, ["'train.cliprange'", "belongs under 'algorithm'"]),
        ({"train": {"steps": "many"}}, ["train.steps='many'", "integer"]),
        ({"train": {"steps": 3.5}}, ["train.steps=3.5", "integer"]),
        ({"task": {"type": "arithmetik"}}, ["arithmetik", "'arithmetic'"]),
        ({"task": {"type": "math"}}, ["task.data", "required"]),
        ({"rewards": {"functions": [{"type": "exact", "wieght": 1.0}]}}, ["functions.0.wieght", "'weight'"]),
        ({"rewards": {"noise": {"type": "flip", "false_positive": 1.3}}}, ["1.3", "less than or equal to 1"]),
        (
            {"rewards": {"noise": {"type": "flip", "false_positive": 0.5, "false_negative": 0.5}}},
            ["J =", "adversarial"],
        ),
        (
            {"rewards": {"noise": {"type": "flip", "false_positive": 0.7, "false_negative": 0.3}}},
            ["J =", "adversarial"],
        ),
        ({"rewards": {"noise": {"type": "adversarial", "false_positive": 0.1}}}, ["J =", "type: flip"]),
        ({"algorithm": "grpo", "critic": {}}, ["grpo has no critic"]),
        ({"algorithm": "ppo", "critic": None}, ["ppo needs a critic"]),
        ({"algorithm": "grpo", "rollout": {"num_generations": 1}}, ["num_generations=1", "2 or more"]),
        (
            {"algorithm": {"type": "ppo", "sibling_coverage": True}, "rollout": {"num_generations": 1}},
            ["algorithm.sibling_coverage", "num_generations=1", "2 or more"],
        ),
        (
            {"algorithm": {"type": "ppo", "lam_covered": 0.0}},
            ["lam_covered=0.0", "sibling_coverage: true", "lam_covered: null"],
        ),
        (
            {"denoiser": {"capacity": 6}, "rollout": {"num_generations": 8}},
            ["denoiser.capacity=6", "num_generations=8", "8 or more"],
        ),
        (
            {"denoiser": {"replay": 3, "capacity": 700}, "train": {"completions_per_step": 256}},
            ["denoiser.replay=3", "768 past responses", "denoiser.capacity=700", "to 768 or more"],
        ),
        (
            {"algorithm": {"type": "ppo", "kl_coef": 0.1, "kl_horizon": 99}},
            ["kl_horizon=99", "set kl_target"],
        ),
        ({"train": {"threads": 100_000}}, ["train.threads=100000", "1024"]),
        ({"rewards": {"functions": [{"type": "math", "concurrency": 4}]}}, ["concurrency", "type: function"]),
        ({"denoiser": {"nuisance": "length"}}, ["nuisance=length", "channel: gaussian"]),
        ({"critic": {"features": "belief"}}, ["features=belief", "denoiser", "uncertainty"]),
        (
            {"algorithm": {"type": "vrpo", "belief_coef": 0.1}},
            ["belief_coef=0.1", "denoiser", "belief_coef: 0"],
        ),
        (
            {"denoiser": {}, "rewards": {"noise": {"type": "length_bias", "coef": 0.3}}},
            ["channel=flip", "length_bias", "channel: gaussian"],
        ),
        ({"rewards": {"gold": {"type": "exact", "weight": 0.0}}}, ["gold function", "weight 0"]),
        ({"base": "config.yaml", "methods": {}}, ["'base'", "vrpo study"]),
        (
            {"denoiser": {"one_right": True}, "train": {"microbatch": 4}},
            ["num_generations=8", "microbatch=4", "8 or more"],
        ),
        (
            {"denoiser": {"one_right": True, "minibatch": 100}},
            ["num_generations=8", "denoiser.minibatch=100", "multiple"],
        ),
        (
            {"critic": {"regression": "bce"}, "algorithm": {"type": "vrpo", "kl_coef": 0.05}},
            ["kl_coef=0.05", "regression=bce", "mse"],
        ),
        (
            {
                "critic": {"regression": "bce"},
                "algorithm": "vrpo",
                "rewards": {"noise": {"type": "gaussian", "scale": 0.5}},
            },
            ["rewards.noise=gaussian", "regression=bce", "critic.regression: mse"],
        ),
        (
            {
                "critic": {"regression": "hl_gauss"},
                "algorithm": "vrpo",
                "rewards": {"noise": {"type": "length_bias", "coef": 0.5}},
            },
            ["rewards.noise=length_bias", "regression=hl_gauss", "critic.regression: mse"],
        ),
        (
            {
                "critic": {"regression": "bce"},
                "algorithm": {"type": "ppo", "truncation": "bootstrap"},
            },
            ["truncation=bootstrap", "regression=bce", "truncation: terminal"],
        ),
        ({"denoiser": {"capacity": 2, "replay": 0}}, ["denoiser.capacity=2", "num_generations=8"]),
        (
            {"critic": {"oracle": "answer"}, "algorithm": {"type": "ppo", "gamma": 0.5}},
            ["critic.oracle", "algorithm.gamma=0.5", "gamma: 1"],
        ),
        (
            {"critic": {"oracle": "answer"}, "algorithm": {"type": "ppo", "kl_coef": 0.1}},
            ["critic.oracle", "algorithm.kl_coef=0.1", "kl_coef: 0"],
        ),
        (
            {
                "algorithm": {"type": "ppo", "kl_coef": 0.1, "kl_target": 1.0, "kl_horizon": 50},
                "train": {"completions_per_step": 256},
            },
            ["algorithm.kl_horizon=50", "256 responses", "more than 51"],
        ),
        (
            {
                "critic": {"regression": "bce"},
                "algorithm": "vrpo",
                "denoiser": {"channel": "gaussian"},
            },
            ["denoiser.channel=gaussian", "regression=bce", "mse"],
        ),
        (
            {
                "critic": {"regression": "bce"},
                "denoiser": {},
                "algorithm": {"type": "vrpo", "belief_coef": 0.3},
            },
            ["belief_coef=0.3", "regression=bce", "belief_coef: 0"],
        ),
        ({"algorithm": "gppo"}, ["gppo", "'ppo', 'vrpo', 'grpo'"]),
        ({"train": {"minibatch": 60}}, ["completions_per_step=256", "minibatch=60", "300"]),
        ({"train": {"microbatch": 48}}, ["minibatch=64", "microbatch=48"]),
        ({"rollout": {"num_generations": 7}}, ["completions_per_step=256", "num_generations=7"]),
        ({"train": {"steps": 5}}, ["warmup_steps=10", "train.steps=5"]),
        ({"critic": {"cliprange_value": 0.2}}, ["sampled bottleneck", "head.sample: false"]),
        (
            {"critic": {"cliprange_value": 0.2, "oracle": "answer"}},
            ["oracle=answer", "cliprange_value: null"],
        ),
        ({"task": {"type": "arithmetic", "min_digits": 5}}, ["min_digits=5", "max_digits=2"]),
        ({"task": {"type": "arithmetic", "template": "?"}}, ["{problem}"]),
    ],
)
def test_a_mistake_is_one_line_with_value_and_fix(changes, parts):
    text = message(changes)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("section", ["functions", "gold"])
@pytest.mark.parametrize("schema", [Config, SftConfig])
def test_letters_of_another_column_do_not_move_with_shuffled_choices(section, schema):
    def built(column, **task):
        rewards = {"functions": {"type": "exact"}} | {section: {"type": "choice", "column": column}}
        return build(
            schema, BASE | {"task": {"type": "choice", "data": "a.jsonl", **task}, "rewards": rewards}
        )

    with pytest.raises(
        ConfigError, match=rf"task\.shuffle .*'judge', which rewards\.{section} .*shuffle: false"
    ) as e:
        built("judge", shuffle=True)
    assert "\n" not in str(e.value)
    for task, column in (({"shuffle": True}, "answer"), ({}, "judge")):
        assert built(column, **task).task.type == "choice"


def test_a_small_bonus_stays_within_the_bins_of_hl_gauss():
    def config(kind):
        noise = {"type": "keyword_bias", "phrase": "9", "bonus": 0.1}
        rewards = {"functions": [{"type": "exact"}], "noise": noise}
        return build(Config, {"critic": {"regression": kind}, "rewards": rewards})

    built = config("hl_gauss")
    assert built.critic is not None and built.critic.regression == "hl_gauss"
    with pytest.raises(ConfigError, match=r"keyword_bias takes rewards to where critic\.regression=bce"):
        config("bce")


def test_the_batch_plan_counts_every_networks_steps():
    plan = "\n".join(
        batch_plan(
            Config(
                denoiser=DenoiserConfig(replay=3, minibatch=512),
                train=TrainConfig(microbatch=256, epochs=2),
                critic=CriticConfig(epochs=1),
            )
        )
    )
    assert "4 minibatches of 64 -> 1 microbatches of 64\n" in plan
    assert "-> 8 policy + 4 critic + 2 denoiser optimizer steps a step" in plan


def test_presets_sit_under_what_the_user_wrote():
    vrpo = build(Config, BASE | {"critic": {"head": {"beta": 0.1}}})
    assert (vrpo.critic.head.type, vrpo.critic.head.beta, vrpo.critic.semantic.mode) == (
        "bottleneck",
        0.1,
        "literal",
    )
    assert build(Config, BASE | {"critic": {"head": {"type": "scalar"}}}).critic.head.type == "scalar"
    ppo = build(Config, BASE | {"algorithm": "ppo"})
    assert (ppo.critic.head.type, ppo.critic.semantic.mode) == ("scalar", "off")
    assert build(Config, BASE | {"algorithm": {"type": "grpo"}}).critic is None
    assert Config(algorithm="vrpo") == Config()


@pytest.mark.parametrize("text", ["010", "1:30", "0o10", "-07"])
def test_what_yaml_reads_as_octal_or_base_60_is_no_number(text):
    with pytest.raises(ConfigError, match=rf"train\.steps='{text}'"):
        load(Config, "recipes/arith_cpu", [f"train.steps={text}"])


def test_numbers_are_read_as_they_look():
    read = load(
        Config, "recipes/arith_cpu", ["train.steps=1_000", "train.learning_rate=.5", "train.seed=0x10"]
    ).train
    assert (read.steps, read.learning_rate, read.seed) == (1000, 0.5, 16)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("learning_rate", "belongs under 'train' or 'critic' or 'denoiser'"),
        ("train.num_train_epochs", "here that is 'train.steps'"),
        ("train.whiten_rewards", "known keys here"),
        ("critic.vf_coef", "here that is 'critic.learning_rate'"),
        ("critic.beta", "belongs under 'critic.head'"),
    ],
)
def test_a_key_in_the_wrong_place_is_sent_to_every_right_one(key, told):
    with pytest.raises(ConfigError, match=told):
        load(Config, "recipes/arith_cpu", [f"{key}=1"])


def test_off_without_quotes_is_off(tmp_path):
    """YAML 1.1 reads it as false."""
    for mode in ("off", "false"):
        assert (
            build(Config, apply_overrides(BASE, [f"critic.semantic.mode={mode}"])).critic.semantic.mode
            == "off"
        )
    path = tmp_path / "config.yaml"
    path.write_text("critic: {semantic: {mode: off}}\n")
    config = load(Config, path)
    assert config.critic.semantic.mode == "off"
    path.write_text(to_yaml(config))
    assert load(Config, path) == config
    with pytest.raises(ConfigError, match=r"critic\.semantic\.mode=True"):
        build(Config, BASE | {"critic": {"semantic": {"mode": True}}})


def test_sections_built_in_python_are_settings_on_top_of_the_preset():
    critic = Config(critic=CriticConfig(learning_rate=1e-4)).critic
    assert (critic.learning_rate, critic.head.type, critic.semantic.mode) == (1e-4, "bottleneck", "literal")
    assert Config(critic=CriticConfig(head=ScalarHead())).critic.head.type == "scalar"
    assert Config(algorithm=GrpoConfig(scale="none")).critic is None


def test_the_saved_config_is_the_config():
    for algorithm in ("vrpo", "ppo", "grpo"):
        noise = [{"type": "flip", "false_positive": 0.1}, {"type": "missing", "rate": 0.2}]
        config = build(Config, BASE | {"algorithm": algorithm, "rewards": BASE["rewards"] | {"noise": noise}})
        assert build(Config, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "-2E-3",
        "1.5e3",
        "true",
        "null",
        "12",
        "0x1f",
        "1_000",
        "-.",
        "+.",
        "-.5",
        "+.5e+3",
        "010",
        "1:30",
    ],
)
def test_text_that_looks_like_a_number_comes_back_as_text(tmp_path, text):
    data = {
        "model": {"path": text},
        "task": {"type": "arithmetic"},
        "rewards": {"functions": [{"type": "exact"}]},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(build(Config, data)))
    assert load(Config, tmp_path).model.path == text


def test_overrides_are_yaml_and_written_back():
    data = apply_overrides(
        BASE, ["train.learning_rate=1e-4", "algorithm=ppo", "algorithm.lam=1", "rewards.noise=null"]
    )
    config = build(Config, data)
    assert (config.train.learning_rate, config.algorithm.type, config.algorithm.lam) == (1e-4, "ppo", 1.0)
    assert "lam: 1.0" in to_yaml(config)


def test_an_override_reaches_an_item_of_a_list_by_its_number():
    functions = [{"type": "exact"}, {"type": "exact", "weight": 0.5}]
    data = {"rewards": {"functions": functions, "weight_of_none": []}}
    changed = apply_overrides(data, ["rewards.functions.1.weight=2", "rewards.functions.0=null"])
    assert changed["rewards"]["functions"] == [None, {"type": "exact", "weight": 2}]
    assert functions[1]["weight"] == 0.5  # what was read is left as it is
    with pytest.raises(
        ConfigError, match=r"'2' none of its items; its items are functions\.0 to functions\.1"
    ):
        apply_overrides(data, ["rewards.functions.2.weight=2"])
    with pytest.raises(ConfigError, match="it is empty"):
        apply_overrides(data, ["rewards.weight_of_none.0=2"])
    with pytest.raises(ConfigError, match="there is no list 'noise' yet; set it as a whole"):
        apply_overrides(data, ["rewards.noise.0.type=flip"])


@pytest.mark.parametrize("text", ["# Rules: be brief", "Add # of items", "[1, 2 # three\n]"])
def test_an_override_is_not_cut_at_a_comment(text):
    with pytest.raises(
        ConfigError, match=r"YAML takes what follows a # for a comment .* --set 'task\.a=\"\.\.\.\"'"
    ):
        apply_overrides({}, [f"task.a={text}"])


@pytest.mark.parametrize(
    ("text", "value"), [("'# Rules'", "# Rules"), ("a#b", "a#b"), ('"Add # of"', "Add # of")]
)
def test_a_number_sign_within_a_value_is_kept(text, value):
    assert apply_overrides({}, [f"task.a={text}"]) == {"task": {"a": value}}


def test_a_reward_file_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    function = FunctionReward(file="~/judge.py", name="judge")
    assert function.file == "/home/someone/judge.py"
    assert FunctionReward(file="judge.py", name="judge").file == "judge.py"


def test_the_home_of_nobody_is_a_file_that_is_not_there():
    data = BASE | {
        "rewards": {"functions": [{"type": "function", "file": "~nobody-here/judge.py", "name": "judge"}]}
    }
    with pytest.raises(ConfigError, match=r"^reward file '~nobody-here/judge\.py' does not exist"):
        check_files(build(Config, data))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("train.steps.x=3", "no keys"),
        ("train=[", "not valid YAML"),
    ],
)
def test_bad_overrides(override, part):
    with pytest.raises(ConfigError, match=part):
        apply_overrides({"train": {"steps": 3}}, [override])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n- 2\n", "list"),
        ("a: [1\n", "line 2"),
        ("a: 1\na: 2\n", "twice"),
        ("", "NoneType"),
        ("{1: 2, [3]: 4}", "no name"),
    ],
)
def test_bad_files(tmp_path, text, part):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        read_yaml(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "1E-6", ".000001"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"learning_rate: {text}\n")
    assert read_yaml(path) == {"learning_rate": pytest.approx(1e-6)}


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 500), st.floats(allow_nan=False), st.text(max_size=5)
)
KEYS = sorted({doc.key for doc in all_keys()})


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from(KEYS), value=SCALARS)
def test_any_value_anywhere_loads_or_is_one_line(key, value):
    top, _, rest = key.partition(".")
    data = dict(BASE)
    node = data
    parts = [part for part in (top, *rest.split(".")) if part]
    for part in parts[:-1]:
        below = node.get(part)
        node[part] = dict(below) if isinstance(below, dict) else {}
        node = node[part]
    node[parts[-1]] = value
    try:
        build(Config, data)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) > 10
    else:
        assert build(Config, data) == build(Config, data)


def test_config_loads_without_torch():
    code = (
        "import sys, vrpo, vrpo.config, vrpo.config.describe, vrpo.train.catalogue, vrpo.train.batch_plan; "
        "vrpo.Config(algorithm='vrpo'); heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_key_is_documented_and_the_page_is_current():
    assert [doc.key for doc in (*all_keys(), *sft_keys()) if not doc.doc] == []
    assert (ROOT / "docs" / "config.md").read_text() == config_page(), "run `make docs`"
    assert (ROOT / "docs" / "metrics.md").read_text() == catalogue_page(), "run `make docs`"


RECIPES = sorted(ROOT.glob("recipes/*/config.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_every_recipe_loads_and_is_complete(path):
    config = load(Config, path)
    assert config.model is not None and config.task is not None and config.rewards.functions
    assert (path.parent / "README.md").is_file()
    assert (path.parent / "expected.json").is_file()


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*/warmstart*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_warm_start_loads(path):
    assert load(SftConfig, path).sft.steps > 0


@pytest.mark.parametrize(
    "path",
    sorted(p for p in ROOT.glob("recipes/*/*.yaml") if not p.stem.startswith(("config", "warmstart"))),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_every_cell_of_every_shipped_study_is_valid(path, tmp_path):
    study = read_yaml(path)
    assert len(set(study["seeds"])) == len(study["seeds"])
    one_seed = study | {"base": str(path.parent / study["base"]), "seeds": study["seeds"][:1]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(one_seed, sort_keys=False))
    _, cells = read_study(tmp_path, [])
    # a baseline with a part of VRPO left in it would compare VRPO with itself
    for cell in cells:
        if cell.method.split()[0] in {"PPO", "GRPO"} and "with denoiser" not in cell.method:
            assert cell.config.denoiser is None
            assert cell.config.critic is None or cell.config.critic.features == "none"


@pytest.mark.parametrize(("theirs", "ours"), OUR_NAMES.items())
def test_other_libraries_names_are_answered_with_ours(theirs, ours):
    assert ours in {doc.key for doc in all_keys()}
    guide = (ROOT / "docs" / "guides" / "coming_from_trl.md").read_text()
    assert f"| `{theirs}` | `{ours}` |" in guide
    section = ours.split(".")[0]
    for place in ("train", section) if section != "critic" else ("train",):
        with pytest.raises(ConfigError, match=re.escape(f"here that is {ours!r}")):
            build(Config, BASE | {place: (BASE.get(place) or {}) | {theirs: 1}})


def test_a_name_that_stands_elsewhere_is_no_misspelling_of_one_here():
    with pytest.raises(ConfigError, match=r"'algorithm\.cliprange_value'; it belongs under 'critic'"):
        build(Config, BASE | {"algorithm": {"type": "ppo", "cliprange_value": 0.2}})
    with pytest.raises(ConfigError, match=r"a list; `vrpo explain rewards\.functions`"):
        build(Config, BASE | {"rewards": {"functions": "judge.py"}})


def test_a_warm_up_that_never_ends_is_told_of():
    train = {"steps": 30, "lr_warmup_steps": 40, "learning_rate": 1e-6}
    config = build(Config, BASE | {"algorithm": "vrpo", "critic": {"warmup_steps": 10}, "train": train})
    (line,) = notes(config, prompts=10**6)
    assert "more than the policy's 20 steps: its rate ends at 50% of" in line
    config = build(
        Config, BASE | {"algorithm": "grpo", "critic": None, "train": train | {"lr_warmup_steps": 30}}
    )
    assert not notes(config, prompts=10**6)


def test_a_denoiser_on_few_prompts_is_told_of():
    config = build(Config, BASE | {"denoiser": {}, "train": {"steps": 200, "completions_per_step": 256}})
    prompts = 200 * 256 // config.rollout.num_generations
    assert "each of the 100 prompts is drawn about" in notes(config, prompts=100)[-1]
    assert not any("by heart" in line for line in notes(config, prompts=prompts))
    assert not any("by heart" in line for line in notes(build(Config, BASE), prompts=1))
