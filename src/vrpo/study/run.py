"""A study from its file to its page: cells, other temperatures, report."""

import shutil
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from vrpo.errors import ConfigError
from vrpo.study.config import Cell, StudyConfig, read_study
from vrpo.study.report import Study, write_report
from vrpo.study.runner import finished, run_cells
from vrpo.study.sharpness import measure, measure_cell
from vrpo.study.tables import to_rich
from vrpo.train.preflight import check_files


def run_study(
    path: Path,
    title: str,
    *,
    out: Path,
    overrides: list[str],
    record_to: Path | None,
    report_only: bool,
    console: Console,
) -> None:
    """Run what is not finished, then write and print tables, figures and page.

    Args:
        path: STUDY.yaml, or a folder with a study.yaml.
        title: what the page is called.
        out: folder for the runs and the report.
        overrides: `"a.b=value"` settings on top of every cell.
        record_to: where a short record is wanted.
        report_only: run nothing, and report on the cells that are finished.
        console: for progress and tables.

    Raises:
        ConfigError: the study is wrong, a file it names is missing, or there is nothing to report on.
        CheckpointError: a cell's folder holds a run with another configuration.
        StudyError: a cell failed.
    """
    if record_to is not None and not record_to.parent.is_dir():
        raise ConfigError(f"--record: there is no folder {str(record_to.parent)!r}; make it first")
    started = time.perf_counter()
    settings, cells = read_study(path, overrides)
    if report_only:
        whole, cells = len(cells), finished(cells, out)
        if not cells:
            raise ConfigError(
                f"--report-only: {str(out)!r} has no finished cell; run the study without it first"
            )
        title = f"{title}, {len(cells)} of {whole} runs"
    else:
        for cell in cells:
            check_files(cell.config)
        run_cells(
            cells, out, jobs=settings.jobs, console=console, ended=partial(_spare, out=out, settings=settings)
        )
    curves = measure(cells, out, settings.temperatures, console=console) if settings.temperatures else None
    on_top = [word for setting in overrides for word in ("--set", setting)]
    study = Study(
        title=title,
        settings=settings,
        cells=cells,
        out=out,
        curves=curves,
        command=["vrpo", "study", str(path), *on_top],
        seconds=time.perf_counter() - started,
    )
    for plain in write_report(study, record_to=record_to):
        console.print(to_rich(plain))
    console.print(
        f"{title}\npage: {out / 'study.html'}   figures: {out / 'curves.png'} and others   numbers: {out / 'summary.json'}",
        markup=False,
    )


def _spare(cell: Cell, *, out: Path, settings: StudyConfig) -> None:
    """Remove a finished cell's checkpoints, where the study does not keep them; what they are needed for comes first."""
    checkpoints = out / cell.folder / "checkpoints"
    if settings.keep_checkpoints or not checkpoints.is_dir():
        return
    measure_cell(out / cell.folder, settings.temperatures)
    shutil.rmtree(checkpoints)
