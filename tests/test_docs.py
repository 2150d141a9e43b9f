"""The documentation: its example runs, and what it links to, quotes or configures exists."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import vrpo.functional
from vrpo.config import Config, SftConfig, build
from vrpo.config.describe import all_keys
from vrpo.config.presets import merge
from vrpo.errors import ConfigError
from vrpo.study.config import StudyConfig
from vrpo.train.catalogue import METRICS, catalogue_page, explain_metric

ROOT = Path(__file__).parent.parent
SKIPPED = {"runs", "models", "data", "build", "dist"}
BASE = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic"},
    "rewards": {"functions": [{"type": "exact"}]},
}
SCHEMAS = {"config": Config, "sft": SftConfig, "study": StudyConfig}
SECTIONS = tuple(dict.fromkeys([*Config.model_fields, *SftConfig.model_fields]))
METRIC_GROUPS = {name.split("/")[0] for name in METRICS if "/" in name}


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*.md"))
    return sorted(p for p in found if not any(part.startswith(".") or part in SKIPPED for part in p.parts))


def keys_of(schema: type[BaseModel]) -> set[str]:
    """Dotted settings, and every section and `type` above them."""
    known = {doc.key for doc in all_keys(schema)}
    above = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    return known | above | {f"{section}.type" for section in above}


KEYS = keys_of(Config) | keys_of(SftConfig)


# --- what a page says, one problem a line ---------------------------------------------------------


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(text)):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (folder / path).exists():
            yield f"link to {target}"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def unknown_names(text: str) -> Iterator[str]:
    """Settings, metrics, commands and tests that a page quotes and the code does not have."""
    for key in re.findall(r"--set[ =]'?([\w.]+)=", text):
        if key != "a.b" and not known_setting(key):
            yield f"--set {key}"
    for name in re.findall(r"vrpo explain ([\w./*]+)", text):
        if name not in ("KEY", "METRIC") and not known_setting(name) and explain_metric(name) is None:
            yield f"vrpo explain {name}"
    for command in re.findall(r"(?:^|`)vrpo ([a-z][\w-]*)", text, flags=re.MULTILINE):
        if command not in COMMANDS:
            yield f"vrpo {command}"
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(rf"(?:{'|'.join(SECTIONS)})(?:\.\w+)+", quoted) and not is_setting_or_file(quoted):
            yield f"setting {quoted}"
        group = quoted.split("/")[0]
        if group in METRIC_GROUPS and re.fullmatch(r"\w+/[\w*]+", quoted) and not is_metric_or_file(quoted):
            yield f"metric {quoted}"
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        path = ROOT / "tests" / file
        if not path.is_file() or f"def {test}(" not in path.read_text(encoding="utf-8"):
            yield f"test {file}::{test}"


FILE_ENDINGS = {"json", "jsonl", "md", "py", "yaml"}
COMMANDS = {"train", "eval", "report", "sft", "study", "plan", "diagnose", "explain"}


def known_setting(key: str) -> bool:
    return ".".join(part for part in key.split(".") if not part.isdigit()) in KEYS


def is_setting_or_file(name: str) -> bool:
    section, _, module = name.partition(".")
    if module in FILE_ENDINGS:
        return True
    files = (f"src/vrpo/{section}/{module}.py", f"src/vrpo/{section}.{module}")
    return known_setting(name) or any((ROOT / file).is_file() for file in files)


def is_metric_or_file(name: str) -> bool:
    return (
        name in METRICS
        or explain_metric(name) is not None
        or any(metric.startswith(name.rstrip("*")) for metric in METRICS if name.endswith("/*"))
    )


def wrong_configs(text: str) -> Iterator[str]:
    """YAML blocks marked as a configuration that do not load; a partial one stands on top of a small base."""
    for info, block in re.findall(r"^```yaml *(.*?)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        mark = re.match(r"title=(\w+)", info) or re.match(r"# (\w+)\b", block)
        if mark is None or mark.group(1) not in SCHEMAS:
            continue
        schema, data = SCHEMAS[mark.group(1)], yaml.safe_load(block)
        try:
            build(schema, merge(BASE, data) if schema is Config else data)
        except ConfigError as error:
            yield f"configuration: {error}"


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_lead_somewhere(page):
    assert list(broken_links((ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent)) == []


@pytest.mark.parametrize("page", pages(), ids=str)
def test_quoted_names_exist(page):
    assert list(unknown_names((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", pages(), ids=str)
def test_configurations_load(page):
    assert list(wrong_configs((ROOT / page).read_text(encoding="utf-8"))) == []


def test_the_checks_can_fail():
    folder = ROOT / "docs"
    assert list(broken_links("[a](index.md) [b](nowhere.md#x) [c](https://x.y) `[d](no)`", folder)) == [
        "link to nowhere.md#x"
    ]
    wrong = """`algorithm.lamb` `algorithm.lam` `val/explained` `val/auc_end` `policy/*` `train.loop`
vrpo explain train.stepz, vrpo explain train.steps, --set critic.hed=1 --set critic=null --set critic.head.type=scalar
vrpo reprot x
`test_docs.py::test_no_such` `test_docs.py::test_the_checks_can_fail`"""
    assert sorted(unknown_names(wrong)) == [
        "--set critic.hed",
        "metric val/explained",
        "setting algorithm.lamb",
        "test test_docs.py::test_no_such",
        "vrpo explain train.stepz",
        "vrpo reprot",
    ]
    blocks = "```yaml\n# config\nalgorithm: {type: gppo}\n```\n```yaml title=sft\nsteps: 3\n```\n```yaml\nany: thing\n```\n"
    assert len(list(wrong_configs(blocks))) == 2
    assert list(wrong_configs("```yaml\n# config\ntrain: {seed: 3}\n```\n")) == []


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\(([^)]+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    written = {str(p.relative_to("docs")) for p in pages() if p.parts[0] == "docs"} - {"index.md"}
    assert written - set(listed) == set()


def test_every_noise_kind_has_its_section():
    page = (ROOT / "docs" / "guides" / "noise.md").read_text(encoding="utf-8")
    kinds = {doc.section for doc in all_keys() if doc.key.startswith("rewards.noise.") and doc.section}
    assert len(kinds) >= 11
    assert {kind for kind in kinds if f"### {kind}\n" not in page} == set()


def test_the_metrics_page_is_current():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == catalogue_page(), "run `make docs`"


def run_example(name, folder):
    """What a script beside the guides prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "guides" / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs(tmp_path):
    shown = run_example("own_reward.py", tmp_path)
    assert re.search(r"first 0\.\d+, final 0\.\d+", shown), shown
    assert (tmp_path / "runs" / "own_reward" / "summary.json").is_file()


def test_the_loop_of_building_blocks_learns_from_better_verdicts_than_it_sees(tmp_path):
    shares = re.findall(r"seen (\d\.\d+), learned from (\d\.\d+)", run_example("own_loop.py", tmp_path))
    seen, learned = (sum(map(float, column)) / len(shares) for column in zip(*shares, strict=True))
    assert len(shares) == 10 and 0.75 < seen < 0.85 and learned > seen + 0.08


def test_the_page_of_building_blocks_names_functions_that_exist():
    page = (ROOT / "docs" / "guides" / "own_loop.md").read_text(encoding="utf-8").split("## What there is")[1]
    named = set(re.findall(r"`(\w+)`", page))
    assert len(named) > 30 and named <= set(vrpo.functional.__all__)
