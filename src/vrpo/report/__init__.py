"""Run folders as one HTML page that needs no network: `vrpo report RUN [RUN ...]`.

read.py     run folder -> what is drawn
curves.py   a panel for each question, a line for each run
tokens.py   responses, each token coloured by what the critic expected there
"""

import html
from collections.abc import Sequence
from pathlib import Path

from vrpo.report.curves import draw
from vrpo.report.read import Record, read_run
from vrpo.report.tokens import STYLE, transcripts
from vrpo.study.figure import SMOOTHING
from vrpo.study.page import figure_html, page_html, table_html
from vrpo.study.tables import Plain
from vrpo.train.files import replace_file

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page: final numbers, curves, warnings, and what the critic saw in the responses.

    Args:
        runs: run folders, finished or not; names are shortened to what tells them apart.
        out: the HTML file.

    Raises:
        CheckpointError: a folder holds no run, or a damaged one.
        StorageError: the page cannot be written.
    """
    records = [read_run(path, name) for path, name in zip(runs, _names(runs), strict=True)]
    smoothed = f"<p class=caption>Numbers of steps are means over the last {SMOOTHING}; evaluations are as they are.</p>"
    parts = [table_html(_numbers(records)), figure_html(draw(records)), smoothed]
    for record in records:
        parts += [*_warnings(record), *transcripts(record)]
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    replace_file(out, page_html(title, parts, style=STYLE))


def _names(runs: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many of those around it as tell all apart."""
    paths = [path.resolve() for path in runs]
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _numbers(records: Sequence[Record]) -> Plain:
    headings = (
        "run",
        "method",
        "seed",
        "steps",
        "before",
        "final",
        "best",
        "sampled",
        "seen",
        "clean",
        "length",
        "entropy",
    )
    caption = (
        "before, final, best: held-out clean accuracy, greedy; sampled: the final one at the training temperature. seen, clean: mean reward "
        "of the last step's samples with and without noise; length: tokens a response; entropy: nats a token. `vrpo explain METRIC` says "
        "how a number is computed."
    )
    return Plain("Numbers", caption, headings, tuple(_row(record) for record in records))


def _row(record: Record) -> tuple[str, ...]:
    evaluations, last = record.evaluations, record.metrics[-1] if record.metrics else {}
    greedy = [e["clean_greedy"] for e in evaluations]
    accuracies = (
        (greedy[0], greedy[-1], max(greedy), evaluations[-1]["clean_sampled"]) if greedy else (None,) * 4
    )
    names = ("objective/scores", "objective/scores_clean", "completions/mean_length", "policy/entropy_avg")
    done = f"{len(record.metrics)} of {record.steps}"
    numbers = ("-" if x is None else f"{x:.3f}" for x in (*accuracies, *(last.get(name) for name in names)))
    return (record.name, record.method, str(record.seed), done, *numbers)


def _warnings(record: Record) -> list[str]:
    if not record.warnings:
        return []
    lines = (f"<li>step {w['step']}: {html.escape(w['message'])}</li>" for w in record.warnings)
    return [f"<h2>Warnings, {html.escape(record.name)}</h2>\n<ul>{''.join(lines)}</ul>"]
