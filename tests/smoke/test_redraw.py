"""Figures drawn from the records beside the recipes."""

import json
from pathlib import Path

import pytest

from vrpo.errors import ConfigError
from vrpo.study.redraw import figure_of, read_record, run

ARITH = Path("recipes/arith_cpu")
RATES = [ARITH / name for name in ("rates.json", "flips.json", "flips_clean.json")]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def drawn(kind, *paths):
    return figure_of(kind, {path: read_record(path) for path in paths})


def test_flip_rates_of_three_records_are_one_axis():
    figure = drawn("noise", *RATES)
    assert figure.axes[-1].get_xlabel() == "share of rewards flipped"
    lines = {c.get_label(): c.lines[0] for c in figure.axes[0].containers}
    assert list(lines) == ["VRPO", "GRPO with denoiser", "PPO", "GRPO"]  # the first record's alone
    (_, rows), (_, at_30), (_, clean) = (read_record(path) for path in RATES)
    told = {r.noise: r.estimates["final_greedy"].value for r in [*rows, *at_30, *clean] if r.method == "VRPO"}
    order = ("clean rewards", "10 % flipped", "20 % flipped", "30 % flipped", "40 % flipped")
    assert lines["VRPO"].get_xdata() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.01)
    assert list(lines["VRPO"].get_ydata()) == [told[noise] for noise in order]
    assert len(lines["GRPO with denoiser"].get_xdata()) == 4  # its clean rewards are in a record of their own
    beside = drawn("noise", *RATES, ARITH / "flips_clean_denoiser.json").axes[0].containers[1].lines[0]
    assert (
        len(beside.get_xdata()) == 5
    )  # which belongs to the others of its folder, since its method is in none of them


def test_a_noise_kind_of_two_tasks_is_named_by_its_recipe():
    figure = drawn(
        "noise", ARITH / "flips.json", Path("recipes/minus_cpu/flips.json"), ARITH / "hard_noise.json"
    )
    labels = [label.get_text().replace("\n", " ") for label in figure.axes[-1].get_xticklabels()]
    assert labels == [
        "30 % flipped, arith_cpu",
        "30 % flipped, minus_cpu",
        "20 % persistent",
        "20 % of prompts inverted",
    ]


def test_sharpness_goes_through_the_temperatures():
    figure = drawn("sharpness", ARITH / "flips.json")
    vrpo = next(row for row in read_record(ARITH / "flips.json")[1] if row.method == "VRPO")
    line = figure.axes[0].containers[0].lines[0]
    assert list(line.get_xdata()) == [vrpo.estimates[f"entropy_at_{t}"].value for t in ("1", "0.5", "0.25")]
    with pytest.raises(ConfigError, match="was not sampled at several temperatures"):
        drawn("sharpness", Path("recipes/minus_cpu/clean.json"))


def test_the_command(tmp_path, capsys):
    out = tmp_path / "x.png"
    assert run(["noise", str(out), str(RATES[1])]) == 0
    assert out.stat().st_size > 10_000
    (tmp_path / "other.json").write_text('{"command": "vrpo train x.yaml"}', encoding="utf-8")
    for wrong, said in (
        (["noise", str(out)], "usage"),
        (["curves", str(out), str(RATES[0])], "usage"),
        (["noise", str(out), str(tmp_path / "none.json")], "none.json"),
        (["noise", str(out), str(tmp_path / "other.json")], "give records of `vrpo study --record FILE`"),
        (["noise", str(tmp_path / "no" / "x.png"), str(RATES[0])], "No such file or directory"),
    ):
        capsys.readouterr()
        assert run(wrong) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("arith_cpu/tuning.json", "has a row without 'seeds'; give records"),
        ("chain_cpu/tuning.json", "has a row without 'noise' and 'seeds'; give records"),
        (
            "quickstart/expected.json",
            "says that it is of 'make quickstart', which is no `vrpo study STUDY`; give",
        ),
    ],
)
def test_numbers_written_by_hand_are_no_record_and_told_what_they_lack(record, said, tmp_path, capsys):
    assert run(["noise", str(tmp_path / "x.png"), f"recipes/{record}"]) == 2
    assert f"recipes/{record} {said}" in capsys.readouterr().err


def test_accuracies_without_seeds_are_no_record(tmp_path):
    kept = json.loads(RATES[0].read_text(encoding="utf-8"))
    kept["rows"][0]["final_greedy"] = 0.5
    (tmp_path / "bare.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"bare\.json has a row whose 'final_greedy' is no estimate over seeds"
    ):
        read_record(tmp_path / "bare.json")


def test_a_record_of_an_unfinished_study_is_drawn_without_what_it_lacks(tmp_path):
    kept = json.loads(RATES[0].read_text(encoding="utf-8"))
    kept["rows"] = [row for row in kept["rows"] if row["noise"] != "40 % flipped"]
    (tmp_path / "partial.json").write_text(json.dumps(kept), encoding="utf-8")
    line = drawn("noise", tmp_path / "partial.json").axes[0].containers[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.1, 0.2], abs=0.01)


def test_what_the_command_of_a_record_sets_is_what_is_drawn(tmp_path):
    kept = json.loads(RATES[1].read_text(encoding="utf-8"))
    kept["command"] += " --set rewards.noise.false_positive=0.1 --set=rewards.noise.false_negative=0.1"
    (tmp_path / "set.json").write_text(json.dumps(kept), encoding="utf-8")
    (noise,) = read_record(tmp_path / "set.json")[0][0].config.rewards.noise
    assert (noise.false_positive, noise.false_negative) == (0.1, 0.1)


def test_a_noise_kind_of_two_records_of_one_folder_is_named_by_both():
    figure = drawn("noise", *(ARITH / f"{name}.json" for name in ("flips", "flips_passes", "flips_400")))
    labels = [label.get_text().replace("\n", " ") for label in figure.axes[-1].get_xticklabels()]
    assert len(set(labels)) == len(labels) == 3
    assert "30 % flipped, arith_cpu, flips_passes" in labels
