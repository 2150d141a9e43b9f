"""A study from its file to its page: cells, other temperatures, report."""

import json
import shutil
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from vrpo.errors import INPUT_ERRORS, CheckpointError, ConfigError
from vrpo.study.config import Cell, StudyConfig, read_study
from vrpo.study.report import Study, write_report
from vrpo.study.runner import StudyError, finished, run_cells
from vrpo.study.sharpness import measure, measure_cell
from vrpo.study.tables import to_rich
from vrpo.train.files import check_output_file
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
        CheckpointError: a cell's folder holds a run with another configuration, or `out` can be no folder.
        StudyError: cells failed; the others are reported on before.
        StorageError: the disk is full, or cannot be written.
    """
    if record_to is not None:
        check_output_file("--record", record_to)
    if (out / "run.json").is_file():
        raise CheckpointError(
            f"{out} holds a run, whose summary the study's would replace; choose another --out"
        )
    _check_reports(out)
    started = time.perf_counter()
    settings, cells = read_study(path, overrides)
    failures = []
    if not report_only:
        for cell in cells:
            _check_files(cell)
        ended = partial(_spare, out=out, settings=settings)
        failures = run_cells(cells, out, jobs=settings.jobs, console=console, ended=ended)
    done = _method_by_method(finished(cells, out), settings)
    if report_only and not done:
        raise ConfigError(f"--report-only: {str(out)!r} has no finished cell; run the study without it first")
    if done:
        curves = measure(done, out, settings.temperatures, console=console) if settings.temperatures else None
        on_top = [word for setting in overrides for word in ("--set", setting)]
        study = Study(
            title=title if len(done) == len(cells) else f"{title}, {len(done)} of {len(cells)} runs",
            settings=settings,
            cells=done,
            out=out,
            curves=curves,
            command=["vrpo", "study", str(path), *on_top],
            seconds=time.perf_counter() - started,
        )
        _report(study, record_to=record_to, console=console)
    if failures:
        raise StudyError.of(failures, whole=len(cells))


def _check_reports(out: Path) -> None:
    """CheckpointError where the study's page or numbers would replace those of somebody else."""
    numbers, page = out / "summary.json", out / "study.html"
    if numbers.is_file():
        try:
            ours = "rows" in dict(json.loads(numbers.read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # ours is replaced as a whole, and never damaged
            ours = False
    else:
        ours = not page.exists()
    if not ours:
        raise CheckpointError(
            f"{numbers if numbers.exists() else page} is no study's, and would be replaced; choose another --out"
        )


def _check_files(cell: Cell) -> None:
    """`check_files`, whose error says of which cell it is."""
    try:
        check_files(cell.config)
    except INPUT_ERRORS as error:
        raise type(error)(f"{cell.name}: {error}") from error


def _method_by_method(cells: list[Cell], settings: StudyConfig) -> list[Cell]:
    """As the study's file has them: where the first seed of the first method is missing, it is the first method all the same."""
    noises, methods = list(settings.noise), list(settings.methods)
    return sorted(cells, key=lambda cell: (noises.index(cell.noise), methods.index(cell.method)))


def _report(study: Study, *, record_to: Path | None, console: Console) -> None:
    out = study.out
    for plain in write_report(study, record_to=record_to):
        console.print(to_rich(plain))
    console.print(
        f"study {study.title}\npage: {out / 'study.html'}   figures: {out / 'curves.png'} and others   numbers: {out / 'summary.json'}",
        markup=False,
    )


def _spare(cell: Cell, *, out: Path, settings: StudyConfig) -> None:
    """Remove a finished cell's checkpoints, where the study does not keep them; what they are needed for comes first."""
    checkpoints = out / cell.folder / "checkpoints"
    if settings.keep_checkpoints or not checkpoints.is_dir():
        return
    measure_cell(out / cell.folder, settings.temperatures)
    shutil.rmtree(checkpoints)
