"""A study: its cells, its processes, its table and figure."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from vrpo.errors import CheckpointError, ConfigError
from vrpo.study.config import read_study, slug
from vrpo.study.figure import learning_curves
from vrpo.study.results import collect, summary, table
from vrpo.study.runner import StudyError, run_cells

BASE = {
    "model": {"path": "vrpo:tiny"},
    "task": {"type": "arithmetic", "min_digits": 2},
    "rewards": {"functions": [{"type": "exact"}]},
    "rollout": {"num_generations": 2, "max_completion_length": 4},
    "train": {
        "steps": 2,
        "completions_per_step": 8,
        "minibatch": 8,
        "microbatch": 8,
        "eval_prompts": 8,
        "eval_every": 1,
    },
}
STUDY = {
    "base": "base.yaml",
    "methods": {
        "PPO": {"algorithm": "ppo", "critic": {"warmup_steps": 1}},
        "GRPO": {"algorithm": "grpo", "critic": None},
    },
    "noise": {"none": {}, "30 % flips": {"rewards": {"noise": {"type": "flip", "false_negative": 0.3}}}},
    "seeds": [0, 1],
}


@pytest.fixture
def write(tmp_path):
    def write(**changes) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
        return tmp_path

    return write


def test_cells_are_the_grid_with_settings_on_top_of_the_base(write):
    _, cells = read_study(write(), ["train.steps=3"])
    assert len(cells) == 8 and len({cell.folder for cell in cells}) == 8
    cell = next(c for c in cells if c.folder == "grpo_30-flips_s1")
    assert (cell.config.algorithm.type, cell.config.train.seed, cell.config.train.steps) == ("grpo", 1, 3)
    assert cell.config.rewards.noise[0].false_negative == 0.3 and cell.config.critic is None
    assert slug("30 % of rewards") == "30-of-rewards" and slug("%") == "none"


def test_a_seed_override_may_not_make_all_seeds_the_same(write):
    with pytest.raises(ConfigError, match=r"train\.seed=5"):
        read_study(write(), ["train.seed=5"])
    _, cells = read_study(write(seeds=[0]), ["train.seed=5"])
    assert {(c.seed, c.config.train.seed, c.folder[-3:]) for c in cells} == {(5, 5, "_s5")}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"base": "none.yaml"}, "none.yaml"),
        ({"methods": {}}, "methods"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "share the folder name"),
        ({"methods": {"GRPO": {"algorithm": "grpo", "critic": {}}}}, "grpo has no critic"),
        ({"noize": {}}, "'noise'"),
    ],
)
def test_a_mistake_is_found_before_the_first_run(write, changes, part):
    with pytest.raises(ConfigError, match=part):
        read_study(write(**changes), [])


def test_a_study_runs_resumes_and_reports(write, tmp_path):
    console, out = Console(quiet=True), tmp_path / "out"
    _, cells = read_study(write(seeds=[0], noise={"none": {}}), [])
    run_cells(cells, out, jobs=2, console=console)
    stamps = [(out / c.folder / "summary.json").stat().st_mtime_ns for c in cells]
    run_cells(cells, out, jobs=2, console=console)  # finished cells are not run again
    assert stamps == [(out / c.folder / "summary.json").stat().st_mtime_ns for c in cells]
    rows = collect(cells, out)
    assert [(row.method, row.seeds) for row in rows] == [("PPO", 1), ("GRPO", 1)]
    assert rows[0].mean["explained_var"] is not None and rows[1].mean["explained_var"] is None
    final = json.loads((out / cells[0].folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert rows[0].mean["final_greedy"] == final["clean_greedy"]
    assert json.loads(json.dumps(summary(rows, seconds=1.0)))["rows"][1]["method"] == "GRPO"
    assert table(rows).row_count == 2
    learning_curves(cells, out, out / "curves.png")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    _, other = read_study(write(seeds=[0], noise={"none": {}}), ["train.steps=3"])
    with pytest.raises(CheckpointError, match="another configuration"):
        run_cells(other, out, jobs=1, console=console)


def test_a_cell_that_fails_is_named_with_its_reason(write, tmp_path):
    _, cells = read_study(write(seeds=[0], noise={"none": {}}), ["model.path=./nowhere"])
    with pytest.raises(StudyError, match=r"ppo_none_s0 failed: .*nowhere.*log\.txt"):
        run_cells(cells, tmp_path / "out", jobs=1, console=Console(quiet=True))
