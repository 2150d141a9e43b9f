"""`vrpo report`: run folders as a page, with what the critic saw."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.smoke.test_runs import cli, run, small
from vrpo.errors import CheckpointError
from vrpo.report import _names, write_report
from vrpo.report.curves import PANELS, Panel, _curve, draw
from vrpo.report.read import STEPS_SHOWN, Record, read_run
from vrpo.report.tokens import _Scale, transcripts
from vrpo.study.figure import SMOOTHING
from vrpo.train.catalogue import EVALUATIONS, explain_metric
from vrpo.train.transcript import KEPT

DENOISED = {"denoiser": {"learning_rate": 1e-4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("vrpo", "grpo")}
    run(small(algorithm="vrpo", **DENOISED), found["vrpo"])
    missing = {"rewards": {"noise": [{"type": "missing", "rate": 0.5}]}}
    run(small(algorithm="grpo", train={"steps": 2}, **missing), found["grpo"])
    return found


def responses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_every_token_is_recorded_with_what_is_known_of_it(runs):
    for line in responses(runs["vrpo"]):
        by_token = line["by_token"]
        assert set(by_token) == {"text", "surprisal", "value", "advantage", "denoised"}
        assert all(len(by_token[name]) == line["tokens"] for name in set(by_token) - {"denoised"})
        assert "".join(by_token["text"]).startswith(line["completion"]) and min(by_token["surprisal"]) >= 0
    grpo = responses(runs["grpo"])
    assert {line["step"] for line in grpo} == {1, 2} and len(grpo) == 2 * KEPT
    assert any(line["reward"] is None for line in grpo)
    for line in grpo:
        by_token = line["by_token"]
        assert set(by_token) == {"text", "surprisal", "advantage"}
        assert len(set(by_token["advantage"])) == 1  # one advantage a response
        assert line["reward"] is not None or by_token["advantage"][0] == 0.0


def test_nothing_is_learned_from_a_response_without_a_reward(tmp_path):
    missing = {"rewards": {"noise": [{"type": "missing", "rate": 0.5}]}}
    run(small(algorithm="grpo", train={"steps": 1}, **missing, **DENOISED), tmp_path)
    found = responses(tmp_path)
    assert {line["reward"] is None for line in found} == {True, False}
    assert all(("denoised" in line["by_token"]) == (line["reward"] is not None) for line in found)


def test_values_are_those_of_the_critic_before_the_update(runs):
    """Before its first update a critic of this kind says the same of every state but for the bottleneck's features: compare prompts."""
    first = [line for line in responses(runs["vrpo"]) if line["step"] == 1]
    by_prompt: dict[str, set[float]] = {}
    for line in first:
        by_prompt.setdefault(line["prompt_id"], set()).add(line["by_token"]["value"][0])
    assert all(len(values) == 1 for values in by_prompt.values())  # one state, one value: that of the prompt


def test_a_page_of_one_run_and_of_several(runs, capsys, tmp_path):
    status, text, _ = cli(capsys, "report", str(runs["vrpo"]))
    page = (runs["vrpo"] / "report.html").read_text()
    assert status == 0 and f"page: {runs['vrpo'] / 'report.html'}" in text
    assert "<h1>vrpo</h1>" in page and "vrpo with denoiser" in page and "4 of 4" in page
    assert "What the critic saw, vrpo" in page and page.count("<h3>step ") == STEPS_SHOWN
    assert "value +" in page and "&lt;eos&gt;" in page and "<th>learned</th>" in page
    assert "http" not in re.sub(
        r"http://www\.w3\.org/\S+|http://purl\.org/\S+|http://creativecommons\.org/\S+|https://matplotlib\.org/",
        "",
        page,
    )
    both = tmp_path / "both.html"
    status, _, error = cli(capsys, "report", *map(str, runs.values()))
    assert status == 2 and "--out" in error
    assert cli(capsys, "report", *map(str, runs.values()), "--out", str(both))[0] == 0
    page = both.read_text()
    assert (
        "<h1>2 runs</h1>" in page
        and "What the critic saw, vrpo" in page
        and "What was learned from, grpo" in page
    )


def test_a_run_that_is_going_on_or_of_an_earlier_version_has_a_page_too(runs, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl", "warnings.jsonl"):
        (part / name).write_bytes((runs["vrpo"] / name).read_bytes())
    lines = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text(lines[0] + lines[1][:50])  # the second is being written
    (part / "warnings.jsonl").write_text(json.dumps({"step": 1, "kind": "kl", "message": "a < b & c"}) + "\n")
    old = [{k: v for k, v in line.items() if k != "by_token"} for line in responses(runs["vrpo"])]
    (part / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    write_report([part], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 of 4" in page and "step 1: a &lt; b &amp; c" in page and "What the critic saw" not in page
    (part / "metrics.jsonl").write_text("")
    (part / "evaluations.jsonl").write_text("")
    write_report([part], tmp_path / "page.html")
    assert "0 of 4" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_one_line(capsys, tmp_path, runs):
    status, _, error = cli(capsys, "report", str(tmp_path))
    assert status == 2 and error.startswith(f"vrpo: {tmp_path} holds no run")
    status, _, error = cli(capsys, "report", str(runs["vrpo"]), "--out", str(tmp_path / "no" / "a.html"))
    assert status == 2 and "there is no folder" in error
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "nowhere", "x")


def test_panels_draw_documented_metrics():
    for panel in PANELS:
        for name in panel.lines.values():
            assert name in EVALUATIONS if panel.evaluated else explain_metric(name) is not None


def test_axes_without_numbers_are_not_drawn():
    record = record_of([0.1, 0.2])
    record = dataclasses.replace(
        record, metrics=[{"step": n, "val/calibration": 0.1} for n in (1, 2)], evaluations=[]
    )
    assert len(re.findall(r'<g id="axes_\d+">', draw([record]))) == 1


def record_of(values: list[float | None]) -> Record:
    metrics = [{"step": n, "x": value} for n, value in enumerate(values, start=1)]
    return Record(
        name="a",
        method="ppo",
        seed=0,
        steps=9,
        metrics=metrics,
        evaluations=metrics,
        warnings=[],
        responses=[],
    )


def test_curves_are_means_of_the_last_steps_that_have_a_number():
    rng = np.random.default_rng(0)
    values = [None if rng.random() < 0.3 else float(rng.random()) for _ in range(40)]
    values[:2] = [None, None]
    steps, found = _curve(record_of(values), Panel("t", {"": "x"}), "x")
    assert steps.tolist() == list(range(1, 41))
    for n in range(40):
        known = [x for x in values[max(n + 1 - SMOOTHING, 0) : n + 1] if x is not None]
        assert np.isnan(found[n]) if not known else found[n] == pytest.approx(sum(known) / len(known))
    _, raw = _curve(record_of([0.5, None, 1.0]), Panel("t", {"": "x"}, evaluated=True), "x")
    assert raw[0] == 0.5 and np.isnan(raw[1]) and raw[2] == 1.0


def test_colours_go_from_little_over_the_middle_to_much():
    scale = _Scale([0.0, 1.0, 2.0, 3.0, 10.0])
    strengths = [
        float(re.search(r"([\d.]+)\)$", scale.css(x)).group(1)) for x in (2.0, 2.8, 10.0, 20.0, 0.0, 1.0)
    ]
    assert (
        strengths[0] == 0.0
        and 0 < strengths[1] < strengths[2] == strengths[3] == strengths[4] > strengths[5] > 0
    )
    assert scale.css(10.0)[:20] != scale.css(0.0)[:20]
    assert "0.00" in _Scale([1.0, 1.0]).css(1.0)


def test_prompts_and_tokens_are_no_markup():
    by_token = {"text": ["<b>", "\n"], "surprisal": [0.1, 0.2], "value": [0.1, 0.2], "advantage": [0.0, 0.0]}
    line = {
        "step": 1,
        "prompt": [{"role": "user", "content": "<i>" + "x" * 300}],
        "reward": None,
        "clean_reward": 1.0,
        "by_token": by_token,
    }
    record = Record(
        name="<u>", method="ppo", seed=0, steps=1, metrics=[], evaluations=[], warnings=[], responses=[line]
    )
    page = "".join(transcripts(record))
    assert "<b>" not in page and "<u>" not in page and "&lt;b&gt;" in page and "↵" in page
    assert "<td>-</td><td>1.00</td>" in page and "... xxx" in page


def test_runs_are_named_by_what_tells_them_apart():
    assert _names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert _names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert _names([Path("/a/x")]) == ["x"]
