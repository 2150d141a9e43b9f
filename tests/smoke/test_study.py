"""A study: its cells, its processes, its table and figure."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from vrpo.cli import main
from vrpo.errors import CheckpointError, ConfigError, StorageError
from vrpo.study.config import read_study, slug
from vrpo.study.figure import (
    SMOOTHING,
    STYLE,
    Look,
    _accuracy,
    _explained_variance,
    _line,
    _looks,
    _several_seeds,
    accuracy_against_noise,
    draw_all,
    new_figure,
)
from vrpo.study.kept import run as kept
from vrpo.study.page import write_page
from vrpo.study.record import record, write_record
from vrpo.study.report import Study, write_report
from vrpo.study.results import Row, area_under_curve, cell_numbers, collect, compare, summary
from vrpo.study.run import _method_by_method
from vrpo.study.runner import TAIL, Failure, StudyError, _last_line, run_cells
from vrpo.study.sharpness import Sampled, accuracy_at, common_entropy, initial_model, measure
from vrpo.study.statistics import Estimate, interquartile_mean
from vrpo.study.tables import comparison_table, results_table, seeds_of, sharpness_table, to_rich
from vrpo.train.folder import RunFolder
from vrpo.train.target import open_target

PYTHON = sys.executable
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


def test_an_algorithm_named_in_the_base_stays_under_settings_of_a_method_or_noise(write):
    folder = write(
        methods={
            "a": {},
            "b": {"algorithm": {"kl_coef": 0.1}},
            "c": {"algorithm": "ppo", "critic": {"warmup_steps": 1}},
        },
        noise={"none": {}, "pulled": {"algorithm": {"kl_coef": 0.2}}},
        seeds=[0],
    )
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE | {"algorithm": "grpo"}))
    _, cells = read_study(folder, [])
    found = {(c.method, c.noise): (c.config.algorithm.type, c.config.algorithm.kl_coef) for c in cells}
    assert found[("b", "none")] == ("grpo", 0.1) and found[("b", "pulled")] == ("grpo", 0.2)
    assert found[("a", "pulled")] == ("grpo", 0.2) and found[("c", "pulled")] == ("ppo", 0.2)


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
        ({"temperatures": [1.0, 0.0]}, r"temperatures.*0\.0"),
        (
            {"noise": {"m": {"type": "flip", "false_negative": 0.3}}},
            r"^noise\.m=\{'type': 'flip', 'false_negative': 0\.3\}: an entry holds settings of a run; write it such as "
            r"`m: \{rewards: \{noise: \{type: flip, ",
        ),
        ({"noise": {"type": "flip"}}, r"^noise\.type='flip': .*`a name: \{rewards: "),
        ({"noise": {"clean": None}}, r"^noise\.clean=None: .*`clean: \{\}` for those of the base"),
        ({"methods": {"PPO": {"type": "ppo"}}}, r"^methods\.PPO=\{'type': 'ppo'\}: .*`PPO: \{algorithm: ppo"),
        ({"methods": {"_PPO": {}}}, r"^methods\._PPO: figures leave names out that begin with an underscore"),
        ({"noise": {}}, r"^noise is required; add it: `noise: \{as it is: \{\}\}`"),
        ({"methods": {"A": {"train": None}}}, r"^method A: train=None holds no settings"),
        ({"noise": {"n": {"train": {"seed": 5}}}}, r"noise n: train\.seed=5 is the study's to set"),
        (
            {"methods": {"A" * 300: {"algorithm": "grpo", "critic": None}}},
            r"make a folder name of 3\d\d bytes",
        ),
    ],
)
def test_a_mistake_is_found_before_the_first_run(write, changes, part):
    with pytest.raises(ConfigError, match=part):
        read_study(write(**changes), [])


def test_an_empty_train_in_the_base_is_no_place_for_defaults(write):
    folder = write()
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE | {"train": None}))
    with pytest.raises(ConfigError, match="train=None holds no settings"):
        read_study(folder, [])


@pytest.mark.parametrize("override", ["seeds=[1]", "base=x.yaml", "methods.PPO.algorithm=grpo"])
def test_an_override_of_the_study_itself_says_where_it_belongs(write, override):
    key = override.split("=")[0].split(".")[0]
    with pytest.raises(ConfigError, match=f"^--set {key}: .*'{key}' belongs in the study's file"):
        read_study(write(), [override])


def test_a_missing_noise_and_the_file_of_one_run_are_told_apart(write):
    folder = write()
    with pytest.raises(
        ConfigError,
        match=r"base\.yaml has model, task, .* one run, for `vrpo train`; a study has base, methods, noise, seeds",
    ):
        read_study(folder / "base.yaml", [])
    (folder / "sft.yaml").write_text("model: {path: a}\nsft: {steps: 1}\n")
    with pytest.raises(ConfigError, match="for `vrpo sft`"):
        read_study(folder / "sft.yaml", [])
    (folder / "study.yaml").write_text("base: base.yaml\nmethods: {PPO: {}}\nseeds: [0]\n")
    with pytest.raises(
        ConfigError, match=r"^noise is required; add it: `noise: \{as it is: \{\}\}` .* noisy one of your own"
    ):
        read_study(folder, [])
    (folder / "study.yaml").write_text("base: base.yaml\n")
    with pytest.raises(ConfigError, match=r"^methods, noise, seeds are required; add them: "):
        read_study(folder, [])


@pytest.mark.parametrize(
    ("changes", "setting", "start"),
    [
        ({}, "train.steps=1", r"method PPO: critic\.warmup_steps=1 leaves the policy none"),
        (
            {"methods": {"GRPO": STUDY["methods"]["GRPO"], "PPO": {"critic": {"warmup_steps": 2}}}},
            "train.steps=2",
            "method PPO: ",
        ),
        (
            {"methods": {"a": {}, "b": {}, "GRPO": {"algorithm": "grpo"}}},
            "critic.warmup_steps=2",
            "methods a, b: ",
        ),
        ({}, "train.stepz=1", "every method: unknown key"),
        (
            {"noise": {"none": {}, "more": {"rewards": {"noise": {"type": "flip", "rate": 1}}}}},
            "train.steps=3",
            "noise more: unknown",
        ),
        (
            {"noise": {"none": {}, "more": {"train": {"steps": 1}}}},
            "train.eval_prompts=4",
            "method PPO, noise more: critic",
        ),
        ({}, "train.steps", "--set 'train.steps' is not KEY=VALUE"),
    ],
)
def test_a_mistake_is_told_with_the_methods_and_noise_that_make_it(write, changes, setting, start):
    with pytest.raises(ConfigError, match=f"^{start}"):
        read_study(write(**changes), [setting])


def test_a_study_runs_resumes_and_reports(write, tmp_path):
    console, out = Console(quiet=True), tmp_path / "out"
    _, cells = read_study(write(seeds=[0], noise={"none": {}}), [])
    run_cells(cells, out, jobs=2, console=console)
    stamps = [(out / c.folder / "summary.json").stat().st_mtime_ns for c in cells]
    run_cells(cells, out, jobs=2, console=console)  # finished cells are not run again
    assert stamps == [(out / c.folder / "summary.json").stat().st_mtime_ns for c in cells]
    curves = measure(cells, out, [0.5, 1.0], console=console)
    assert curves == measure(cells, out, [0.5, 1.0], console=console)
    rows = collect(cells, out, curves)
    assert [(row.method, row.seeds) for row in rows] == [("PPO", (0,)), ("GRPO", (0,))]
    assert rows[0].estimates["explained_var"] is not None and rows[1].estimates["explained_var"] is None
    final = json.loads((out / cells[0].folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert rows[0].values["final_greedy"] == (final["clean_greedy"],)
    steps = RunFolder(out / cells[0].folder).read_metrics()
    known = [line["val/calibration"] for line in steps if line["val/calibration"] is not None]
    assert rows[0].values["calibration"] == (pytest.approx(sum(known) / len(known)),)
    assert rows[1].values["calibration"] == (None,), "GRPO has no critic"
    for answers in ("greedy", "sampled"):
        assert _accuracy(cells[:1], answers=answers, out=out)[1][0, -1] == final[f"clean_{answers}"]
    assert json.loads(json.dumps(summary(rows, seconds=1.0)))["rows"][1]["method"] == "GRPO"
    tables = [results_table(rows), comparison_table(rows), sharpness_table(rows, [0.5, 1.0])]
    assert [len(t.rows) for t in tables] == [2, 3, 2] and to_rich(tables[0]).row_count == 2
    figures = draw_all(cells, rows, out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    write_page(out / "study.html", title="a <study>", tables=tables, figures=figures, cells=cells)
    page = (out / "study.html").read_text()
    assert (
        page.count("<svg") == len(figures)
        and "a &lt;study&gt;" in page
        and "https://"
        not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", page).replace(
            "https://matplotlib.org/", ""
        )
    )
    write_record(tmp_path / "expected.json", cells, rows, out, command=["vrpo", "study", "a file"], jobs=2)
    kept = json.loads((tmp_path / "expected.json").read_text())
    assert kept["command"] == "vrpo study 'a file'" and kept["machine"]["runs_at_a_time"] == 2
    assert kept["rows"][1]["final_greedy_by_seed"] == [round(rows[1].values["final_greedy"][0], 4)]
    assert {c["by"] for c in kept["comparisons"]} >= {"greedy", "sampled"} and len(kept["commits"]) == 1
    environment = out / cells[1].folder / "environment.json"
    told = json.loads(environment.read_text())
    environment.write_text(json.dumps(told | {"commit": "another"}))
    later = record(cells, rows, out, command=["vrpo"], jobs=2)
    assert [row["commits"] for row in later["rows"]] == [[told["commit"]], ["another"]]
    assert set(later["commits"]) == {told["commit"], "another"}
    _, other = read_study(write(seeds=[0], noise={"none": {}}), ["train.steps=3"])
    with pytest.raises(CheckpointError, match=r"another configuration: train\.steps=2, now it is 3; take"):
        run_cells(other, out, jobs=1, console=console)
    # a version that did not have a setting yet has written the same run
    saved = out / cells[0].folder / "config.yaml"
    lines = [line for line in saved.read_text().splitlines() if "weight_decay" not in line]
    saved.write_text("\n".join(lines))
    run_cells(cells, out, jobs=1, console=console)
    saved.write_text("unknown: 1\n")
    with pytest.raises(CheckpointError, match="another configuration"):
        run_cells(cells, out, jobs=1, console=console)


def test_a_stopped_study_has_whole_seeds_and_reports_on_them(write, tmp_path, capsys):
    folder, out = write(noise={"none": {}}, seeds=[3, 4]), tmp_path / "out"
    _, cells = read_study(folder, [])
    assert [(c.seed, c.method) for c in cells] == [(3, "PPO"), (3, "GRPO"), (4, "PPO"), (4, "GRPO")]
    command = ["study", str(folder), "--out", str(out), "--report-only"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "has no finished cell" in capsys.readouterr().err
    run_cells(cells[:3], out, jobs=2, console=Console(quiet=True))  # as if stopped before the last one
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "3 of 4 runs" in capsys.readouterr().out
    assert not (out / cells[3].folder).exists()
    page = (out / "study.html").read_text()
    assert "3 of 4 runs" in page and cells[2].folder in page and cells[3].folder not in page
    numbers = json.loads((out / "summary.json").read_text())
    assert [row["seeds"] for row in numbers["rows"]] == [[3, 4], [3]]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--set", "train.steps=3"])
    assert "another configuration" in capsys.readouterr().err


def test_what_comes_after_a_cell_fails_for_that_cell_alone(write, runs, tmp_path):
    _, cells = read_study(write(), [])

    def ended(cell):
        if cell.method == "PPO" and cell.seed == 0:
            raise {"none": CheckpointError, "30 % flips": StorageError}[cell.noise]("no room")

    started = runs("")
    for _ in range(2):  # cells that have just ended, then cells that had ended before
        failures = run_cells(cells, tmp_path / "out", jobs=2, console=Console(quiet=True), ended=ended)
        assert sorted((f.cell.folder, f.status, f.cause) for f in failures) == [
            ("ppo_30-flips_s0", 1, "no room"),
            ("ppo_none_s0", 2, "no room"),
        ]
    assert len(started.read_text().split()) == len(cells)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_study_alone_which_asks_its_cells_to_stop(write, runs, tmp_path, sent):
    """A terminal sends it to every process of the foreground group; a cell hears one signal all the same, SIGTERM."""
    heard = tmp_path / "heard"
    runs(
        f"trap 'echo INT >> {heard}' INT; trap 'echo HUP >> {heard}' HUP; trap 'echo TERM >> {heard}; exit 143' TERM\n"
        f"echo ready >> {heard}; for i in $(seq 200); do sleep .1; done"
    )
    script = tmp_path / "study.py"
    script.write_text(
        f"import sys\nfrom vrpo.cli import main\nsys.executable = {sys.executable!r}\nmain(sys.argv[1:])\n"
    )
    command = [PYTHON, str(script), "study", str(write(seeds=[0])), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not heard.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, sent)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + sent and told.startswith("vrpo: the study was stopped")
    assert heard.read_text().split() == ["ready", "TERM"]


@pytest.mark.slow  # half a minute of starting processes
def test_a_study_that_keeps_no_checkpoints_has_sampled_before_they_go(write, tmp_path, capsys):
    folder, out = (
        write(noise={"none": {}}, seeds=[0], keep_checkpoints=False, temperatures=[1.0]),
        tmp_path / "out",
    )
    command = ["study", str(folder), "--out", str(out)]
    for _ in range(2):  # the second time everything is there already
        with pytest.raises(SystemExit, match="0"):
            main(command)
    assert len(list(out.glob("*/temperatures.json"))) == 2 and not list(out.glob("*/checkpoints"))
    write(noise={"none": {}}, seeds=[0], keep_checkpoints=False, temperatures=[1.0, 0.5])
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "keeps no checkpoint to sample at temperature 0.5" in capsys.readouterr().err


def test_a_policy_is_sampled_at_other_temperatures_once(write, tmp_path):
    _, cells = read_study(write(seeds=[0], noise={"none": {}}), [])
    run_cells(cells[:1], tmp_path, jobs=1, console=Console(quiet=True))
    kept = tmp_path / cells[0].folder / "temperatures.json"
    hot, cold = measure(cells[:1], tmp_path, [0.5, 1.0], console=Console(quiet=True))[cells[0].folder]
    assert (hot.temperature, cold.temperature) == (1.0, 0.5) and cold.entropy < 0.8 * hot.entropy
    # the KL to the initial model, one response after the other
    final = open_target(str(tmp_path / cells[0].folder))
    result, initial = final.evaluate(samples=4), initial_model(final)
    assert hot.kl == pytest.approx(final.kl_to(initial, result), abs=1e-6) and cold.kl is None
    with torch.no_grad():  # two steps have moved next to nothing: another model that is far enough away
        for parameter in initial.model.parameters():
            parameter.mul_(0.9)
    paid = []
    for one in (scored.rollout for scored in result.sampled_completions):
        ids, mask = torch.from_numpy(one.token_ids)[None], torch.from_numpy(one.action_mask)[None, 1:]
        with torch.no_grad():
            logp, _ = initial.logprobs_and_entropy(ids, torch.ones_like(ids).bool(), mask, temperature=1.0)
        paid.append(one.policy_logprobs.sum() - float(logp.sum()))
    assert final.kl_to(initial, result) == pytest.approx(np.mean(paid), rel=1e-3) and np.mean(paid) > 0.01
    # what is there is not sampled again: a mark in it stays
    kept.write_text(kept.read_text().replace(str(cold.accuracy), "0.12345", 1))
    marked = measure(cells[:1], tmp_path, [0.5, 1.0, 0.25], console=Console(quiet=True))[cells[0].folder]
    assert 0.12345 in [one.accuracy for one in marked] and [one.temperature for one in marked] == [
        1.0,
        0.5,
        0.25,
    ]


def test_accuracy_at_equal_entropy_lies_between_the_temperatures_and_never_outside():
    sharp = (
        Sampled(temperature=1.0, accuracy=0.5, entropy=0.2),
        Sampled(temperature=0.5, accuracy=0.6, entropy=0.1),
    )
    flat = (
        Sampled(temperature=1.0, accuracy=0.3, entropy=0.6),
        Sampled(temperature=0.5, accuracy=0.5, entropy=0.15),
    )
    assert common_entropy([sharp, flat]) == 0.2
    assert accuracy_at(sharp, 0.2) == 0.5
    assert accuracy_at(flat, 0.2) == pytest.approx(0.5 - 0.2 * 0.05 / 0.45)
    assert accuracy_at(flat, 0.1) is None


def test_names_with_brackets_stay_as_they_are():
    row = Row(method="GRPO [std]", noise="[/x]", seeds=(0,), values={}, estimates=defaultdict(lambda: None))
    console = Console(record=True, width=200, file=StringIO())
    console.print(to_rich(results_table([row])))
    assert "GRPO [std]" in console.export_text(clear=False) and "[/x]" in console.export_text()


def test_runs_left_out_of_equal_entropy_are_counted():
    half = Estimate(value=0.5, low=0.4, high=0.6)
    estimates = dict.fromkeys(
        ["sampled_at_1", "entropy_at_1", "equal_entropy", "sampled_at_equal_entropy"], half
    )
    cells = {}
    for name, values in (("all", (0.5, 0.5)), ("one", (0.5, None)), ("none", (None, None))):
        known = estimates | ({} if name != "none" else {"sampled_at_equal_entropy": None})
        row = Row(
            method=name, noise="x", seeds=(0, 1), values={"sampled_at_equal_entropy": values}, estimates=known
        )
        cells[name] = sharpness_table([row], [1.0]).rows[0][-1]
    assert [text.split("\n")[-1] for text in cells.values()] == ["0.50 nats", "1 of 2 runs", "0.50 nats"]
    assert cells["none"].startswith("-")


def test_a_legend_says_over_how_many_seeds_its_bands_are():
    assert _several_seeds([1, 1]) is None
    assert _several_seeds([8, 8]) == "interquartile mean and\n95 % interval, 8 seeds"
    assert "narrow with few seeds), 1 to 3 seeds" in _several_seeds([1, 3])


def rows_of(cells, value=0.5, **more) -> list[Row]:
    """What a study of these cells found, without interval."""
    estimates = defaultdict(lambda: None, {"final_greedy": Estimate(value=value, low=None, high=None)})
    return [
        Row(method=c.method, noise=c.noise, seeds=(c.seed,), values={}, estimates=estimates)
        for c in {(c.method, c.noise): c for c in cells}.values()
    ]


FLIP = {"type": "flip", "false_positive": 0.3, "false_negative": 0.3}


@pytest.mark.parametrize(
    ("noise", "along_rates"),
    [
        ({"a": {"rewards": {"noise": None}}, "b": {"rewards": {"noise": FLIP}}}, True),
        ({"a": {"rewards": {"noise": FLIP}}, "b": {"rewards": {"noise": FLIP}}}, False),
        ({"a": {"rewards": {"noise": None}}, "b": {"rewards": {"noise": FLIP}, "task": {"size": 64}}}, False),
        (
            {
                "a": {"rewards": {"noise": None}},
                "b": {"rewards": {"noise": FLIP, "functions": [{"type": "exact", "weight": 2.0}]}},
            },
            False,
        ),
    ],
)
def test_the_axis_is_the_flip_rate_only_where_nothing_else_differs(write, noise, along_rates):
    _, cells = read_study(write(seeds=[0], noise=noise), [])
    figure = accuracy_against_noise(cells, rows_of(cells))
    assert (figure.axes[-1].get_xlabel() == "share of rewards flipped") is along_rates


@pytest.mark.filterwarnings("ignore:Glyph")  # a PNG has no font for them
def test_names_are_drawn_as_they_are(write, tmp_path):
    """No formula between two dollars, no word cut off, text that a browser can show in any script."""
    names = ["cost $a_$b", "准确率", "a " * 60]
    _, cells = read_study(
        write(
            seeds=[0], methods={name: {"algorithm": "grpo"} for name in names}, noise={"100 %$, 50 %$": {}}
        ),
        [],
    )
    figure = accuracy_against_noise(cells, rows_of(cells))
    with mpl.rc_context(STYLE):
        figure.savefig(tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "cost $a_$b" in drawn and "准确率" in drawn
    assert all(len(text.get_text().split("\n")[0]) <= 36 for text in figure.legends[0].get_texts())


def test_many_methods_look_different_and_stand_at_their_noise(write):
    _, cells = read_study(
        write(
            seeds=[0],
            methods={f"m{i}": {"algorithm": "grpo"} for i in range(30)},
            noise={"a": {}, "b": {"task": {"size": 64}}},
        ),
        [],
    )
    assert len(set(_looks(cells).values())) == 30
    figure = accuracy_against_noise(cells, rows_of(cells))
    at = [c.lines[0].get_xdata() for c in figure.axes[0].containers]
    assert all(abs(x - place) < 0.5 for xs in at for x, place in zip(xs, (0.0, 1.0), strict=True))
    assert figure.get_size_inches()[1] > 6  # the legend has room


def test_a_gap_in_one_run_is_a_gap_in_the_line():
    figure = new_figure(4.0)
    panel = figure.subplots()
    numbers = np.array([[0.1, np.nan, 0.5], [0.3, 0.4, 0.5]])
    _line(panel, np.array([10, 20, 30]), numbers, look=Look("#000000", "-", "o"), label="x")
    assert np.isnan(panel.lines[0].get_ydata()).tolist() == [False, True, False]
    assert panel.lines[0].get_ydata()[0] == pytest.approx(0.2)


def test_one_run_has_no_bar_and_unequal_seeds_are_said(write):
    _, cells = read_study(write(seeds=[0]), [])
    figure = accuracy_against_noise(cells, rows_of(cells))
    (bars,) = figure.axes[0].containers[0].lines[2]
    assert all(len(points) == 0 for points in bars.get_segments())
    rows = rows_of(cells)
    assert seeds_of(rows) == "1 seed"
    assert seeds_of([replace(rows[0], seeds=(0, 1, 2)), rows[1]]) == "1 to 3 seeds"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that do what a line of shell says: by default they end well at once. `$cell` is a run's folder name."""
    python = tmp_path / "python"

    def write(line: str) -> Path:
        python.write_text(
            f'#!/bin/sh\ncell=$(basename "$6")\necho $cell >> {tmp_path}/started\n{line}\necho "{{}}" > "$6/summary.json"\n'
        )
        python.chmod(0o755)
        (tmp_path / "started").write_text("")
        return tmp_path / "started"

    monkeypatch.setattr(sys, "executable", str(python))
    return write


FAILING = """
case $cell in
ppo_none_s0) echo 'vrpo: the data is wrong'; echo 'a warning'; exit 2;;
grpo_none_s0) echo "Traceback (most recent call last):\n  File\n\n    line\nKeyError: 'x'\nof two lines"; exit 1;;
ppo_none_s1) kill -9 $$;;
grpo_none_s1) exit 3;;
esac"""


def test_a_cell_that_fails_keeps_no_other_from_running_and_is_tried_again(write, runs, tmp_path):
    _, cells = read_study(write(), [])
    out, started = tmp_path / "out", runs(FAILING)
    failures = run_cells(cells, out, jobs=2, console=Console(quiet=True))
    assert sorted(started.read_text().split()) == sorted(cell.folder for cell in cells)
    told = {f.cell.name: (f.status, f.cause) for f in failures}
    assert told == {
        "PPO · none · seed 0": (2, "the data is wrong"),
        "GRPO · none · seed 0": (1, "KeyError: 'x'"),
        "PPO · none · seed 1": (-9, "ended by signal 9 (Killed); the system does that where memory runs out"),
        "GRPO · none · seed 1": (3, "exit status 3 and no output"),
    }
    assert str(failures[0]).endswith(f"(log: {out / failures[0].cell.folder / 'log.txt'})")
    started = runs("[ $cell != ppo_none_s0 ] || exit 1")
    (failure,) = run_cells(cells, out, jobs=2, console=Console(quiet=True))
    assert sorted(started.read_text().split()) == sorted(f.cell.folder for f in failures)
    assert failure.cause == "exit status 1 and no output", "what the log has is of the first try"


def test_the_exit_status_is_2_only_where_all_that_failed_had_wrong_input(write):
    _, cells = read_study(write(), [])
    wrong, broken = (Failure(cell=cells[0], status=s, cause="", log=Path("log.txt")) for s in (2, -9))
    assert StudyError.of([wrong, wrong], whole=8).exit_code == 2
    assert StudyError.of([wrong, broken], whole=8).exit_code == 1


@pytest.mark.parametrize(("end", "status"), [("exit 130", 130), ("kill -TERM $$", 143)])
def test_a_cell_that_is_told_to_stop_ends_the_study(write, runs, tmp_path, end, status):
    _, cells = read_study(write(), [])
    started = runs(f"[ $cell != {cells[1].folder} ] || {end}")
    with pytest.raises(StudyError, match=f"^{cells[1].name} was stopped, and the study with it") as stopped:
        run_cells(cells, tmp_path / "out", jobs=1, console=Console(quiet=True))
    assert stopped.value.exit_code == status
    assert started.read_text().split() == [cell.folder for cell in cells[:2]]


@pytest.mark.slow  # half a minute of starting processes; what run_cells does with a failure is tested above
def test_a_study_reports_what_is_finished_and_then_what_failed(write, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "1+1="}\n')
    own = {"type": "math", "data": str(rows), "template": "{question}"}
    grpo = {**STUDY["methods"]["GRPO"], "task": own}
    folder = write(methods={"GRPO": grpo, "PPO": STUDY["methods"]["PPO"]}, noise={"none": {}}, seeds=[0])
    command = ["study", str(folder), "--out", str(out)]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    told = capsys.readouterr()
    failed, last = told.err.strip().splitlines()[-2:]
    assert failed.startswith("failed: GRPO · none · seed 0: ") and "'answer'" in failed
    assert failed.endswith(f"(log: {out / 'grpo_none_s0' / 'log.txt'})")
    assert last.startswith("vrpo: 1 of 2 runs failed; mend the cause, then run the same command again")
    assert "GRPO · none · seed 0: 0 steps, failed" in told.out and "1 of 2 runs\npage: " in told.out
    assert [row["method"] for row in json.loads((out / "summary.json").read_text())["rows"]] == ["PPO"]
    stamp = (out / "ppo_none_s0" / "summary.json").stat().st_mtime_ns
    rows.write_text("".join(f'{{"question": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(1, 9)) * 4)
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert (out / "ppo_none_s0" / "summary.json").stat().st_mtime_ns == stamp
    assert [row["method"] for row in json.loads((out / "summary.json").read_text())["rows"]] == [
        "GRPO",
        "PPO",
    ]


def test_a_study_of_which_every_cell_fails_lists_them_and_has_no_table(write, runs, tmp_path, capsys):
    runs("echo 'vrpo: loss is nan'; exit 1")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):
        main(["study", str(write()), "--out", str(out)])
    told = capsys.readouterr()
    assert told.err.count(": loss is nan (log: ") == 8 and "8 of 8 runs failed" in told.err
    assert "page:" not in told.out and not (out / "study.html").exists()


def test_a_report_has_the_methods_in_order_and_takes_a_gap(write, tmp_path):
    """The first method has no run under one noise, and not the first seed under the other."""
    settings, cells = read_study(write(), [])
    run_cells(cells[:1], tmp_path, jobs=1, console=Console(quiet=True))
    there = [c for c in cells if (c.method, c.noise) != ("PPO", "none") and c.folder != "ppo_30-flips_s0"]
    for cell in there:
        shutil.copytree(tmp_path / cells[0].folder, tmp_path / cell.folder)
    study = Study(
        title="with gaps",
        settings=settings,
        cells=_method_by_method(there, settings),
        out=tmp_path,
        curves=None,
        command=["vrpo"],
        seconds=1.0,
    )
    results, compared = write_report(study, record_to=tmp_path / "record.json")
    assert [line[:2] for line in results.rows] == [
        ("none", "GRPO"),
        ("30 % flips", "PPO"),
        ("30 % flips", "GRPO"),
    ]
    assert compared.title == "PPO against" and {line[:2] for line in compared.rows} == {
        ("30 % flips", "GRPO")
    }
    assert "PPO" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc/nope"])
def test_an_out_that_can_be_no_folder_is_one_line(write, tmp_path, capsys, name):
    (tmp_path / "a file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(write()), "--out", str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vrpo: cannot make the folder ") and line.endswith("; choose another --out")


def test_unknown_explained_variance_is_a_gap_and_not_0(write, tmp_path):
    _, cells = read_study(write(seeds=[0], noise={"none": {}}), [])
    folder = tmp_path / cells[0].folder
    folder.mkdir()
    known = [None] * SMOOTHING + [0.5, None] * (SMOOTHING // 2)
    lines = [{"step": n, "val/explained_var_clean": x} for n, x in enumerate(known)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, numbers = _explained_variance(cells[:1], out=tmp_path)
    assert steps.tolist() == [SMOOTHING, 2 * SMOOTHING]
    assert math.isnan(numbers[0, 0]) and numbers[0, 1] == 0.5


def test_a_record_in_no_folder_is_refused_before_the_first_run(write, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "nowhere" / "a.json"
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(write() / "study.yaml"), "--out", str(out), "--record", str(record)])
    assert "nowhere" in " ".join(capsys.readouterr().err.split()) and not out.exists()


@pytest.mark.parametrize("name", ["", "a folder"])
def test_a_record_that_can_be_no_file_is_refused_before_the_first_run(write, tmp_path, capsys, name):
    (tmp_path / "a folder").mkdir()
    record = str(tmp_path / name) if name else ""
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(write()), "--out", str(tmp_path / "out"), "--record", record])
    assert "is a folder; give a file" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("summary.json", "{}"), ("summary.json", "3"), ("summary.json", "{"), ("study.html", "{}")],
)
def test_what_is_no_studys_is_not_replaced(write, tmp_path, capsys, name, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(write()), "--out", str(out), "--report-only"])
    assert f"{name} is no study's" in capsys.readouterr().err and (out / name).read_text() == text


def test_a_damaged_file_of_a_cell_is_one_line(tmp_path):
    (tmp_path / "summary.json").write_text('{"clean_acc')
    with pytest.raises(CheckpointError, match=r"summary\.json is missing or damaged"):
        cell_numbers(tmp_path)


def row_of(method: str, finals: list[float]) -> Row:
    values = {name: tuple(finals) for name in ("final_greedy", "final_sampled")}
    return Row(
        method=method,
        noise="none",
        seeds=tuple(range(len(finals))),
        values=values,
        estimates={name: interquartile_mean(column) for name, column in values.items()},
    )


def test_the_first_method_is_compared_with_each_other_by_seed():
    ours, theirs = row_of("ours", [0.6, 0.5, 0.7, 0.8]), row_of("theirs", [0.5, 0.4, 0.6, 0.7])
    found, sampled = compare([ours, theirs])
    assert (found.by, sampled.by) == ("greedy", "sampled") and found.difference == sampled.difference
    assert found.difference.value == pytest.approx(0.1) and found.difference.low == pytest.approx(0.1)
    assert not found.apart and found.improvement.value == pytest.approx((10 + 0.5 * 3) / 16)
    apart, _ = compare([row_of("a", [0.9, 0.91, 0.92, 0.93]), theirs])
    assert apart.apart and apart.improvement.value == 1.0


@pytest.mark.parametrize(("seeds", "apart"), [(3, None), (4, True)])
def test_too_few_seeds_are_never_apart(seeds, apart):
    rows = [row_of("VRPO", [0.9] * seeds), row_of("PPO", [0.1] * seeds)]
    assert {c.apart for c in compare(rows)} == {apart}
    assert comparison_table(rows).rows[0][-1] == {None: "few seeds", True: "yes"}[apart]


def test_area_under_the_curve_weighs_evaluations_by_their_distance():
    points = [
        {"step": 0, "clean_greedy": 0.0},
        {"step": 10, "clean_greedy": 1.0},
        {"step": 40, "clean_greedy": 1.0},
    ]
    assert area_under_curve(points) == pytest.approx((5 + 30) / 40)
    assert area_under_curve(points[:1]) == 0.0


def record_of(path: Path, **finals: list[float]) -> str:
    rows = [
        {
            "noise": "any",
            "method": method,
            "seeds": [0, 1],
            "first_greedy": {"value": before},
            "final_greedy_by_seed": after,
        }
        for method, (before, *after) in finals.items()
    ]
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


def test_shares_kept_are_refused_for_records_that_do_not_go_together(tmp_path, capsys):
    noisy = record_of(tmp_path / "noisy.json", VRPO=[0.4, 0.5, 0.5], PPO=[0.4, 0.5, 0.5])
    other = record_of(tmp_path / "other.json", VRPO=[0.3, 0.6, 0.6])
    assert kept([noisy, other]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("VRPO starts at accuracy 0.4 in one record and 0.3 in the other")
    assert kept([noisy, record_of(tmp_path / "third.json", GRPO=[0.4, 0.5, 0.5])]) == 2
    assert capsys.readouterr().err.startswith("one record is of VRPO, PPO, the other of GRPO; ")
    assert kept([noisy, str(tmp_path / "none.json")]) == 2
    assert "none.json: FileNotFoundError" in capsys.readouterr().err


def test_a_method_that_gained_nothing_has_no_share_and_is_told(tmp_path, capsys):
    noisy = record_of(tmp_path / "noisy.json", VRPO=[0.4, 0.5, 0.5], PPO=[0.4, 0.5, 0.5])
    clean = record_of(tmp_path / "clean.json", VRPO=[0.4, 0.6, 0.6], PPO=[0.4, 0.3, 0.2])
    assert kept([noisy, clean]) == 2
    told = capsys.readouterr()
    assert told.out == "any, VRPO: 50% (50%-50%) of the gain with clean rewards kept\n"
    assert told.err.startswith("with clean rewards PPO gained -0.150 (from 0.400 to 0.250): ")
    assert told.err.count("\n") == 1


def test_the_last_whole_line_is_read_from_the_end_of_a_long_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert _last_line(path) == {}
    path.write_text('{"step": 1', encoding="utf-8")
    assert _last_line(path) == {}
    line = '{"step": %d, "more": "' + "\u00e9" * 500 + '"}\n'
    path.write_text("".join(line % step for step in range(1, 201)) + '{"step": 201', encoding="utf-8")
    assert path.stat().st_size > 2 * TAIL
    assert _last_line(path)["step"] == 200
