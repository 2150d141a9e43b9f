"""What is written of a study when its cells are done: numbers, figures, page, and the short record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vrpo.study.config import Cell, StudyConfig
from vrpo.study.figure import draw_all
from vrpo.study.page import write_page
from vrpo.study.record import write_record
from vrpo.study.results import collect, summary
from vrpo.study.sharpness import Curve
from vrpo.study.tables import ON_A_TERMINAL, Plain, comparison_table, results_table, sharpness_table
from vrpo.train.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study that has run, or as much of it as has."""

    title: str
    settings: StudyConfig
    cells: Sequence[Cell]
    """Those that are finished."""
    out: Path
    curves: dict[str, Curve] | None
    """Of `sharpness.measure`; None where the study names no temperatures."""
    command: Sequence[str]
    seconds: float


def write_report(study: Study, *, record_to: Path | None) -> list[Plain]:
    """summary.json, figures and study.html into the study's folder, and the record where it is wanted.

    Returns:
        The tables for a terminal.
    """
    rows = collect(study.cells, study.out, study.curves)
    RunFolder(study.out).write_json("summary.json", summary(rows, seconds=study.seconds))
    further: list[Plain] = []
    if len({cell.method for cell in study.cells}) > 1 and len({cell.seed for cell in study.cells}) > 1:
        compared = comparison_table(rows)
        further += [compared] if compared.rows else []
    if study.curves is not None:
        further.append(sharpness_table(rows, study.settings.temperatures))
    figures = draw_all(study.cells, rows, study.out)
    page = study.out / "study.html"
    tables = [results_table(rows), *further]
    write_page(page, title=study.title, tables=tables, figures=figures, cells=study.cells)
    if record_to is not None:
        write_record(record_to, study.cells, rows, study.out, command=study.command, jobs=study.settings.jobs)
    return [results_table(rows, ON_A_TERMINAL), *further]
