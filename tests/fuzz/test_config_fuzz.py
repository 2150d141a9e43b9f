"""Any configuration, however wrong: `vrpo train --dry-run` says yes, or says in one line what is wrong.

What it says yes to can be planned and written out, and is read back the same.
"""

import copy
import io
import json
import math
import os
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import currently_in_test_context, event, given
from hypothesis import strategies as st

from tests.fuzz.cases import FLOATS, INTEGERS, KEYS, TEXTS, VALUES, fuzz, one_line
from vrpo.cli import main
from vrpo.config import Config, load, to_yaml
from vrpo.config.describe import all_keys
from vrpo.errors import ModelError
from vrpo.train.batch_plan import batch_plan
from vrpo.train.memory import memory_plan
from vrpo.train.plan import work_plan
from vrpo.train.shape import ModelShape, read_shape

COMMON: dict[str, Any] = {
    "model": {"path": "vrpo:tiny"},
    "rewards": {"functions": [{"type": "exact"}], "noise": [{"type": "flip", "false_positive": 0.3}]},
    "rollout": {"num_generations": 4, "max_completion_length": 3, "stop": ["\n"]},
    "train": {"steps": 2, "completions_per_step": 8, "minibatch": 8, "microbatch": 4},
}
ARITHMETIC = {"type": "arithmetic", "operations": ["add", "sub"], "max_digits": 2, "size": 32}
ROWS = {"type": "rows", "data": "rows.jsonl", "columns": {"answer": "gold"}}
BASES = [
    COMMON | {"task": ARITHMETIC, "algorithm": {"type": "vrpo", "lam": 0.9}, "critic": {"warmup_steps": 0}},
    COMMON
    | {"task": ROWS, "algorithm": "ppo", "critic": {"warmup_steps": 1, "head": {"type": "bottleneck"}}},
    COMMON
    | {"task": ROWS, "algorithm": {"type": "grpo", "scale": "none"}}
    | {"model": {"path": "vrpo:tiny", "lora": {"rank": 2, "target_modules": ["q_proj"]}}},
    COMMON
    | {"task": ARITHMETIC, "algorithm": {"type": "grpo"}}
    | {
        "rewards": {
            "functions": {"type": "exact"},
            "noise": {"type": "source", "rates": {"a": {"false_positive": 0.1}}},
        }
    },
]
KNOWN = [tuple(doc.key.split(".")) for doc in all_keys()]
TAGS = [
    "vrpo",
    "ppo",
    "grpo",
    "scalar",
    "bottleneck",
    "arithmetic",
    "math",
    "rows",
    "choice",
    "exact",
    "function",
    "flip",
]
WORDS = [
    *TAGS,
    "gaussian",
    "missing",
    "majority",
    "literal",
    "kl_ref",
    "auto",
    "cuda",
    "mask",
    "std",
    "k3",
    "cosine",
    "all-linear",
]
PLAUSIBLE = st.one_of(
    INTEGERS,
    FLOATS,
    st.booleans(),
    st.none(),
    st.sampled_from(WORDS),
    st.sampled_from([{}, [], {"type": "bottleneck", "sample": False}, {"mode": "kl_ref"}, ["mul"]]),
)
SENSIBLE = [
    (key, value)
    for key, values in {
        "train.steps": (0, 3, 2**40),
        "train.completions_per_step": (16, 2**20),
        "train.epochs": (2, 2**62),
        "train.seed": (2**63 - 1,),
        "train.learning_rate": (1e-300, 1e300, 1),
        "train.keep_checkpoints": (None, 1),
        "train.threads": (None, 2),
        "rollout.max_completion_length": (1, 2**62),
        "rollout.temperature": (5e-324, 1e308, 2),
        "rollout.top_p": (1e-9, 1),
        "rollout.stop": ([], ["é", "\u2028", "a: b", ":smile:", "[red]"]),
        "model.lora": (None, {}, {"rank": 2**40}),
        "algorithm.kl_coef": (0.1, 1e300),
        "algorithm.cliprange": (0.5,),
        "rewards.noise": (None, [], {"type": "missing", "rate": 0.5}),
    }.items()
    for value in values
]
"""Settings that a configuration may hold, where the others are as in `BASES`."""
PATH_KEYS = [
    ("model", "path"),
    ("critic", "path"),
    ("task", "data"),
    ("task", "eval_data"),
    ("rewards", "functions", 0),
]
PATHS = st.one_of(
    st.builds(
        "{}{}".format,
        TEXTS | st.sampled_from(["~nobody/a", "..", "rows", "vrpo:tiny"]),
        st.sampled_from(["", ".jsonl", "/", ".csv"]),
    ),
    st.builds(
        lambda file: {"type": "function", "file": file, "name": "f"},
        TEXTS | st.sampled_from(["rows.jsonl", "~nobody"]),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    rows = [{"prompt": f"{n}+1=", "gold": str(n + 1)} for n in range(9)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every key path of a nested configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


def put(config: Any, path: tuple, value: Any) -> None:
    for part in path[:-1]:
        inside = config.get(part) if isinstance(config, dict) else config[part]
        if not isinstance(inside, (dict, list)):
            if not isinstance(config, dict):
                return
            inside = config[part] = {}
        if isinstance(inside, list) and not isinstance(path[path.index(part) + 1], int):
            return
        config = inside
    config[path[-1]] = copy.deepcopy(value)  # what is drawn must not change with the configuration


def take(config: Any, path: tuple) -> Any:
    for part in path[:-1]:
        config = config[part]
    return config.pop(path[-1])


@st.composite
def configurations(draw) -> dict:
    """A valid configuration with one to four changes."""
    config = copy.deepcopy(draw(st.sampled_from(BASES)))
    if draw(st.booleans()):  # half of the cases keep to values that are right each by itself
        for key, value in draw(st.lists(st.sampled_from(SENSIBLE), min_size=1, max_size=4)):
            put(config, tuple(key.split(".")), value)
        return config
    for _ in range(draw(st.integers(1, 4))):
        here = places(config)
        if not here:
            return config
        path = draw(st.sampled_from(here))
        match draw(st.sampled_from([*["known"] * 3, "wrong", "delete", "misspell", "tag", "key", "path"])):
            case "path":
                put(config, draw(st.sampled_from(PATH_KEYS)), draw(PATHS))
            case "known":
                put(config, draw(st.sampled_from(KNOWN)), draw(PLAUSIBLE))
            case "wrong":
                put(config, path, draw(VALUES))
            case "delete":
                take(config, path)
            case "misspell":
                value = take(config, path)
                name = str(path[-1])
                put(
                    config,
                    (*path[:-1], draw(st.sampled_from([name + "s", name[1:], name.upper(), f" {name}"])))
                    if not isinstance(path[-1], int)
                    else path[:-1],
                    value,
                )
            case "tag":
                put(
                    config,
                    (*path[:-1], "type") if not isinstance(path[-1], int) else path,
                    draw(st.sampled_from(TAGS) | VALUES),
                )
            case "key":
                config = (
                    {**config, draw(KEYS): copy.deepcopy(draw(VALUES))}
                    if len(path) == 1 or isinstance(path[-1], int)
                    else config
                )
                if not isinstance(path[-1], int):
                    put(config, (*path[:-1], draw(KEYS)), draw(VALUES))
    return config


@lru_cache
def shape_of(model: str) -> ModelShape | None:
    """The shape that `vrpo plan` reads; None where it says in one line that it cannot."""
    config = Config(model={"path": model}, task=ARITHMETIC, rewards={"functions": [{"type": "exact"}]})
    try:
        return read_shape(config, None)
    except ModelError as error:
        assert one_line(str(error))
        return None


def dry_run(*arguments: str) -> tuple[int, str, str]:
    """Exit status and what was printed, on streams as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main(["train", *arguments, "--dry-run"])
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return int(caught.value.code or 0), printed[0], printed[1]


def check(file: Path, *overrides: str) -> None:
    """The property that all of this file is about."""
    sets = [f"--set={item}" for item in overrides]
    status, _, error = dry_run(str(file), *sets)
    if currently_in_test_context():
        event(f"status {status}")
    if status:
        assert status == 2, error
        assert error.startswith("vrpo: ") and error.endswith("\n") and one_line(error[6:]), error
        assert "Traceback" not in error and error.strip().isprintable(), error
        return
    assert error == ""
    config = load(Config, file, list(overrides))
    text = to_yaml(config)
    text.encode()
    copied = file.with_name("again.yaml")
    copied.write_text(text, encoding="utf-8")
    assert load(Config, copied) == config
    assert all(one_line(line) for line in batch_plan(config))
    assert config.model is not None
    shape = shape_of(config.model.path)
    if shape is not None:
        memory = memory_plan(config, shape, prompt_tokens=128, device=torch.device("cpu"))
        assert math.isfinite(memory.peak)
        work = work_plan(config, shape, prompt_tokens=128)
        for plan in (memory.lasting, memory.sampling, memory.learning, work):
            assert math.isfinite(sum(plan.values()) * config.train.steps)
            assert all(math.isfinite(size) and size >= 0 for size in plan.values())


def test_the_unchanged_configurations_are_valid(folder):
    for base in BASES:
        (folder / "c.yaml").write_text(yaml.safe_dump(base))
        assert dry_run(str(folder / "c.yaml"))[0] == 0
        check(folder / "c.yaml")


@fuzz(28)
@given(configurations())
def test_a_changed_configuration(folder, config):
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    check(folder / "c.yaml")


BITS = [
    b"\t",
    b"\x00",
    b"\x1b[31m",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc2\x85",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"!!python/name:os.system ",
    b"!!binary ",
    b"!!set ",
    b"!!omap ",
    b"!x ",
    b"!!int ",
    b"!!float ",
    b"? ",
    b"- ",
    b": ",
    b"# ",
    b"'",
    b'"',
    b"[",
    b"{",
    b"}",
    b"|",
    b">",
    b"%YAML 1.3\n",
    b"---\n",
    b"...\n",
    b"\n",
    b"\r",
    b" ",
    b"1e400",
    b".nan",
    b"9" * 5000,
    b"0x_",
    b"1:2:3",
    b"2020-13-45",
    b"2020-01-01",
    b"~",
    b"null",
    b'"\\ud800"',
    b'"\\U0010ffff"',
    b'"\\Uffffffff"',
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"{a: " * 300,
    b"a: &a [*a]\n",
    b"a: &b {b: *b}\n",
    b"model: &m {path: *m}\n",
    b"algorithm: grpo\n",
    b"=",
    b"@",
    b"`",
]


@st.composite
def texts(draw) -> bytes:
    """The text of a valid configuration with one to four pieces put in, taken out or written over."""
    text = yaml.safe_dump(draw(st.sampled_from(BASES)), default_flow_style=draw(st.booleans())).encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        length = draw(st.sampled_from([0, 0, 1, 3, 30]))
        lines = [0, *(i + 1 for i, byte in enumerate(text) if byte == 10)]
        start = draw(st.sampled_from([start, max(i for i in lines if i <= start)]))
        bit = draw(st.sampled_from(BITS) | st.binary(max_size=3))
        text = text[:start] + bit + text[start + length :]
    return text


@fuzz(20)
@given(texts())
def test_a_damaged_file(folder, text):
    (folder / "c.yaml").write_bytes(text)
    check(folder / "c.yaml")


SETTINGS = st.one_of(
    st.builds("{}={}".format, st.sampled_from([".".join(key) for key in KNOWN]), PLAUSIBLE),
    st.builds("{}={}".format, st.sampled_from([".".join(key) for key in KNOWN]), TEXTS | st.text(max_size=8)),
    st.builds(
        "{}={}".format,
        st.lists(
            st.sampled_from(["train", "steps", "task", "0", "type", "", " ", "rewards", "é"]), max_size=4
        ).map(".".join),
        st.sampled_from([bit.decode(errors="surrogateescape") for bit in BITS]),
    ),
    TEXTS,
)


@fuzz(13)
@given(st.sampled_from(BASES), st.lists(SETTINGS, min_size=1, max_size=3))
def test_settings_of_the_command_line(folder, base, settings):
    (folder / "c.yaml").write_text(yaml.safe_dump(base))
    check(folder / "c.yaml", *settings)
