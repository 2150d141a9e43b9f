"""The tables of a study, for the terminal and for the page."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from vrpo.study.results import Row, compare, first_method
from vrpo.study.sharpness import EQUAL, SAMPLES, names_at
from vrpo.study.statistics import FEWEST_FOR_TRIMMING, Estimate

COLUMNS = {
    "before": "first_greedy",
    "final": "final_greedy",
    "sampled": "final_sampled",
    "judged": "judged",
    "best": "best_greedy",
    "area": "area",
    "seen": "seen_reward",
    "clean": "clean_reward",
    "length": "mean_length",
    "entropy": "entropy",
    "KL": "kl",
    "EV": "explained_var",
    "EV clean": "explained_var_clean",
    "calibration": "calibration",
    "AUC": "auc_end",
    "by V": "critic_accuracy",
    "denoised": "denoised_accuracy",
    "belief": "final_denoiser",
    "s/step": "seconds_per_step",
}
"""Table heading -> number of a cell."""

ON_A_TERMINAL = ("before", "final", "sampled", "judged", "seen", "clean", "length", "entropy", "denoised")
"""Headings that fit beside a name in 100 columns; the page shows all. Sampled accuracy is not read without the entropy: a
sharper policy has more of it without knowing more."""

WITH_INTERVAL = ("final_greedy", "final_sampled", "best_greedy", "area", "final_denoiser")
CAPTION = (
    "Interquartile mean over seeds, under accuracies its 95 % bootstrap interval. before, final, best: held-out clean accuracy, "
    "greedy; sampled: the final one at the training temperature; judged: "
    "held-out prompts that final is the mean of, where some have no clean verdict; area: mean of the greedy one over the steps. seen, clean: mean "
    "reward of the last training samples with and without noise. length: tokens a response; entropy: nats a token, of those "
    "samples. KL: nats a response from the initial model: of the final policy where the study's temperatures have that of training, else where a run computes it. EV: explained variance of the critic "
    "before its update; of its values at the end of a response, against clean outcomes: calibration error, AUC, and, by V, the share "
    "of verdicts right when they are read as one. denoised: share of training samples whose clean verdict the denoised reward gets right. belief: final accuracy of the denoiser's model as a policy, greedy."
)


@dataclass(frozen=True, slots=True)
class Plain:
    """A table as text."""

    title: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def results_table(rows: Sequence[Row], headings: Collection[str] = tuple(COLUMNS)) -> Plain:
    """One line per noise and method.

    Args:
        rows: the study's.
        headings: of the columns wanted; one that no method has a number for is left out all the same.
    """
    noises = list(dict.fromkeys(row.noise for row in rows))
    shown = {
        h: name for h, name in COLUMNS.items() if h in headings and any(row.estimates[name] for row in rows)
    }
    names = ("noise", "method") if len(noises) > 1 else ("method",)
    lines = tuple(
        ((row.noise, row.method) if len(noises) > 1 else (row.method,))
        + tuple(_cell(row, name) for name in shown.values())
        for row in rows
    )
    title = seeds_of(rows) + (f", {noises[0]}" if len(noises) == 1 else "")
    return Plain(title, CAPTION, (*names, *shown), lines)


def seeds_of(rows: Sequence[Row]) -> str:
    """`8 seeds`, or `3 to 8 seeds` where some rows have fewer."""
    fewest, most = (pick(len(row.seeds) for row in rows) for pick in (min, max))
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' * (most > 1)}"


def comparison_table(rows: Sequence[Row]) -> Plain:
    """The first method against each other one."""
    first = first_method(rows)
    lines = tuple(
        (
            c.noise,
            c.other,
            c.by,
            interval(c.difference, signed=True),
            # of two pairs of runs, all better, any resampling says that all are
            interval(c.improvement) if c.apart is not None else f"{c.improvement.value:.3f}",
            {True: "yes", False: "no", None: "few seeds"}[c.apart],
        )
        for c in compare(rows)
    )
    caption = (
        f"difference: final clean accuracy of {first} minus the other's, over the seeds that both have. better: probability that a run of "
        f"{first} ends higher. apart: whether the two 95 % intervals do not touch; with "
        f"fewer than {FEWEST_FOR_TRIMMING} seeds intervals say little."
    )
    return Plain(
        f"{first} against", caption, ("noise", "other", "accuracy", "difference", "better", "apart"), lines
    )


def sharpness_table(rows: Sequence[Row], temperatures: Sequence[float]) -> Plain:
    """Accuracy and entropy at each temperature, and accuracy at an entropy that all runs of a noise reach."""
    several = len({row.noise for row in rows}) > 1
    hottest_first = sorted(set(temperatures), reverse=True)
    lines = tuple(
        ((row.noise, row.method) if several else (row.method,))
        + tuple(_at_temperature(row, t) for t in hottest_first)
        + (_at_equal_entropy(row),)
        for row in rows
    )
    caption = (
        f"Sampled clean accuracy of the final policies ({SAMPLES} answers a held-out prompt) with its 95 % interval, and entropy in nats a "
        "token. A colder policy is sharper and knows no more, so compare the last column: accuracy on the straight line between "
        "temperatures, at the largest entropy that the hottest samples of every run under this noise reach. Runs of which no temperature was "
        "cold enough are left out of it (`5 of 8 runs`; -: all)."
    )
    headings = (
        *(("noise", "method") if several else ("method",)),
        *(f"T = {t:g}" for t in hottest_first),
        "equal entropy",
    )
    return Plain("At other temperatures", caption, headings, lines)


def _at_temperature(row: Row, temperature: float) -> str:
    accuracy, entropy = (row.estimates[name] for name in names_at(temperature))
    assert accuracy is not None and entropy is not None, "every run was sampled at every temperature"
    return f"{_two_lines(accuracy)}\n{entropy.value:.2f} nats"


def _at_equal_entropy(row: Row) -> str:
    accuracy, level = row.estimates[EQUAL], row.estimates["equal_entropy"]
    assert level is not None, "it is of the noise, not of the run"
    if accuracy is None:
        return f"-\n{level.value:.2f} nats"
    runs = sum(value is not None for value in row.values[EQUAL])
    left_out = "" if runs == len(row.seeds) else f"\n{runs} of {len(row.seeds)} runs"
    return f"{_two_lines(accuracy)}\n{level.value:.2f} nats{left_out}"


def _two_lines(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f}\n{estimate.low:.3f}..{estimate.high:.3f}"


def interval(estimate: Estimate, *, signed: bool = False) -> str:
    """`.512 [.497, .526]`, on one line."""
    form = "{:+.3f}" if signed else "{:.3f}"
    if estimate.low is None or estimate.high is None:
        return form.format(estimate.value)
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _cell(row: Row, name: str) -> str:
    estimate = row.estimates[name]
    if estimate is None:
        return "-"
    value = (
        f"{estimate.value:.2f}"
        if name in ("judged", "mean_length", "seconds_per_step", "kl")
        else f"{estimate.value:.3f}"
    )
    return _two_lines(estimate) if name in WITH_INTERVAL else value


def to_rich(plain: Plain) -> Table:
    """For the terminal; names are the user's, so that a bracket in them is no markup."""
    table = Table(title=Text(plain.title), caption=Text(plain.caption))
    for number, heading in enumerate(plain.headings):
        table.add_column(
            Text(heading),
            justify="left" if number < 2 and heading in ("noise", "method", "other") else "right",
            no_wrap=True,
        )
    for line in plain.rows:
        table.add_row(*map(Text, line))
    return table
