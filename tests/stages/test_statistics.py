"""Numbers over seeds: known values, and intervals that cover what they should."""

import json

import numpy as np
import pytest

from vrpo.study.kept import main
from vrpo.study.statistics import (
    Estimate,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    share_kept,
)


def test_interquartile_mean_drops_a_quarter_at_each_end():
    assert interquartile_mean([0.0, 1.0, 2.0, 100.0]).value == 1.5
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0]).value == 3.5
    assert interquartile_mean([1.0, 5.0, 3.0]).value == 3.0  # three are too few to drop any


def test_one_seed_has_no_interval_and_equal_seeds_have_none_to_speak_of():
    assert interquartile_mean([0.4]) == Estimate(value=0.4, low=None, high=None)
    assert interquartile_mean([0.5, 0.5, 0.5]) == Estimate(value=0.5, low=0.5, high=0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(1)
    runs = [interquartile_mean(draw.normal(0.5, 0.02, size=8).tolist()) for _ in range(120)]
    covered = np.mean([run.low <= 0.5 <= run.high for run in runs])
    assert 0.8 < covered <= 1.0  # eight seeds: a percentile bootstrap covers somewhat less than 95 %


def test_paired_differences_remove_what_seeds_share():
    seeds = np.linspace(0.3, 0.7, 8)
    paired = paired_difference((seeds + 0.01).tolist(), seeds.tolist())
    assert paired.low == pytest.approx(0.01) and paired.high == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([1.0, 3.0], [2.0], 0.5),
    ],
)
def test_probability_of_improvement(ours, theirs, expected):
    assert probability_of_improvement(ours, theirs).value == expected


def test_intervals_apart():
    low, high = Estimate(value=0.2, low=0.1, high=0.3), Estimate(value=0.5, low=0.31, high=0.6)
    assert low.apart_from(high) and high.apart_from(low)
    assert not low.apart_from(Estimate(value=0.5, low=0.3, high=0.6))
    assert not low.apart_from(Estimate(value=0.9, low=None, high=None))


def test_share_kept_is_the_gain_under_noise_over_the_gain_without():
    assert share_kept([0.5], [0.6], before=0.4, paired=True).value == pytest.approx(0.5)
    # a shift that both share: drawn together the share is sure, drawn apart it is not
    noisy, clean = [0.5, 0.6, 0.7, 0.8, 0.9], [0.6, 0.8, 1.0, 1.2, 1.4]
    together, alone = (share_kept(noisy, clean, before=0.4, paired=paired) for paired in (True, False))
    assert together.value == alone.value == pytest.approx(0.5)
    assert together.high - together.low < 1e-6
    assert alone.high - alone.low > 0.2
    unsure = share_kept([0.5, 0.45, 0.43], [0.6, 0.41, 0.38], before=0.4, paired=True)
    assert unsure.value == pytest.approx(0.06 / 0.19 * 3) and unsure.low is unsure.high is None
    with pytest.raises(ValueError, match="nothing was gained"):
        share_kept(noisy, [0.3] * 5, before=0.4, paired=True)


def test_shares_kept_are_of_methods_that_both_records_have(tmp_path, capsys):
    def row(method, seeds, *accuracies):
        return {
            "noise": "any",
            "method": method,
            "seeds": seeds,
            "first_greedy": {"value": 0.4},
            "final_greedy_by_seed": list(accuracies),
        }

    noisy = [row("VRPO", [1, 2], 0.5, 0.6), row("GRPO with denoiser", [1, 2], 0.5, 0.6)]
    noisy += [row("VRPO", [1, 2], 0.45, 0.5) | {"noise": "more"}]
    clean = [row("VRPO", [1, 2], 0.6, 0.8), row("VRPO", [3], 0.0) | {"noise": "another"}]
    for name, rows in (("noisy", noisy), ("clean", clean)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    main(tmp_path / "noisy.json", tmp_path / "clean.json")
    assert capsys.readouterr().out.splitlines() == [
        "any, VRPO: 50% (50%-50%) of the gain with clean rewards kept",
        "more, VRPO: 25% (25%-25%) of the gain with clean rewards kept",
    ]
