"""The command line. Exit status: 0 done, 2 wrong input (one line), 1 anything else, 130/143 stopped by a signal."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vrpo.config import Config, SftConfig, load, to_yaml
from vrpo.errors import INPUT_ERRORS, ConfigError, VrpoError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Base of typer's errors about the command line itself, which it exports under no name of its own."""


def folder_option(help: str) -> Any:
    """An option for a folder to write to; of "", such as of a variable that is not set, Path would make the working folder."""

    def path(text: str) -> Path:
        if not text:
            raise typer.BadParameter('"" names nothing; give a folder, or "." for this one')
        return Path(text)

    return typer.Option(parser=path, metavar="<path>", help=help)


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a recipe folder with a config.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
]


@app.command("train")
def train_command(  # noqa: PLR0917 (typer reads the options off the parameters)
    config: ConfigPath,
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        folder_option(
            "Run folder. Default: runs/<recipe>-<algorithm>-s<seed>; with --resume, CONFIG if that is a run folder."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from where it stopped.")
    ] = False,
    checkpoint: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="With --resume: go on from this one and delete later ones."),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --resume: whatever setting or data has changed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and print the resolved configuration and plan; train nothing."),
    ] = False,
) -> None:
    """Train what CONFIG describes."""
    settings = load(Config, config, set_ or [])
    if dry_run:
        from vrpo.train.preflight import check_files

        if resume or checkpoint is not None or allow_changes:
            raise ConfigError(
                "--dry-run checks a configuration, not what a run goes on from; leave --resume, --checkpoint and --allow-changes out"
            )

        check_files(settings)
        console.print(to_yaml(settings), markup=False, soft_wrap=True)
        _print_batch_plan(settings)
        console.print("dry run: the configuration is valid; nothing was trained")
        return
    from vrpo.train.api import train
    from vrpo.train.closing import print_end

    _print_batch_plan(settings)
    default = Path("runs") / f"{_recipe_name(config)}-{settings.algorithm.type}-s{settings.train.seed}"
    folder = out or (config if resume and (config / "run.json").is_file() else default)
    summary = train(settings, out=folder, resume=resume, checkpoint=checkpoint, allow_changes=allow_changes)
    print_end(console, summary, settings)
    console.print(f"run folder: {folder}   its page: vrpo report {folder}", markup=False)


@app.command("eval")
def eval_command(  # noqa: PLR0917 (typer reads the options off the parameters)
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run folder, or a model folder or hub name (with --config)."
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="Task and rewards to evaluate a MODEL on.")] = None,
    set_: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="STEP|best", help="Checkpoint of a RUN. Default: the newest."),
    ] = None,
    denoiser: Annotated[
        bool, typer.Option("--denoiser", help="Of a RUN the denoiser's model, sampled as a policy.")
    ] = False,
    completions: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Also write every completion with its verdict, one a line."),
    ] = None,
) -> None:
    """Clean accuracy of a checkpoint or model on held-out prompts."""
    from vrpo.train.files import check_output_file
    from vrpo.train.target import open_target, write_completions

    if not target:  # such as of a variable that is not set
        raise ConfigError('RUN|MODEL is ""; give a run folder, or a model folder or hub name')
    if completions is not None:
        check_output_file("--completions", completions)
    opened = open_target(target, config_path=config, overrides=set_ or [], step=checkpoint, denoiser=denoiser)
    result = opened.evaluate()
    several = result.samples > 1
    best = [f"best of {result.samples}"] * several
    table = Table("model", "step", "prompts", "judged", "greedy", "sampled", *best, "entropy", "missing")
    accuracies = (result.greedy, result.sampled, *[result.best_sampled] * several, result.entropy)
    step = "-" if opened.step is None else str(opened.step)
    counts = (step, str(result.prompts), str(result.judged))
    table.add_row(Text(target), *counts, *(f"{number:.3f}" for number in accuracies), str(result.missing))
    console.print(table)
    if completions is not None:
        write_completions(completions, result)
        console.print(f"completions: {completions}", markup=False)


@app.command("sft")
def sft_command(
    config: ConfigPath,
    out: Annotated[Path, folder_option("Folder for the warm-started model.")],
    set_: Overrides = None,
) -> None:
    """Warm-start a model by imitation, until accuracy leaves room for RL."""
    from vrpo.train.sft import sft

    settings = load(SftConfig, config, set_ or [])
    sft(settings, out=out, console=console)
    console.print(f"model folder: {out}", markup=False)


@app.command("study")
def study_command(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A YAML file, or a recipe folder with a study.yaml.")
    ],
    out: Annotated[Path, folder_option("Folder for the runs, study.html, summary.json and the figures.")],
    set_: Overrides = None,
    record_to: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="FILE", help="Also write a short record: numbers, seeds, commit, machine."
        ),
    ] = None,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Tables and page of the cells that are finished; runs none."),
    ] = False,
) -> None:
    """Run methods x noise x seeds: tables, figures and one HTML page. Finished cells are not run again, failed ones are."""
    from vrpo.study.run import run_study
    from vrpo.study.runner import StudyError
    from vrpo.train.signals import exit_on_signals

    try:
        with exit_on_signals():
            run_study(
                study,
                _recipe_name(study),
                out=out,
                overrides=set_ or [],
                record_to=record_to,
                report_only=report_only,
                console=console,
            )
    except SystemExit as stopped:
        _fail(
            "the study was stopped, and its runs with it; run the same command again to go on", stopped.code
        )
    except StudyError as error:
        for failure in error.failures:
            print(f"failed: {failure}", file=sys.stderr)
        _fail(str(error), error.exit_code)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file. Default: report.html in the run folder; of several runs it is needed."),
    ] = None,
) -> None:
    """Curves, warnings and what the critic saw of one or several runs, as one HTML page that needs no network."""
    from vrpo.report import write_report
    from vrpo.train.files import check_output_file

    if out is None and len(runs) > 1:
        raise ConfigError(
            f"{len(runs)} runs and no --out; say which file to write, such as --out report.html"
        )
    if out is not None:
        check_output_file("--out", out)
    page = out or runs[0] / "report.html"
    write_report(runs, page)
    console.print(f"page: {page}", markup=False)


NO_LEARNER = ("algorithm=ppo", "critic={warmup_steps: 0}", "denoiser=null")


@app.command("diagnose")
def diagnose_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|FILE.jsonl",
            help="A configuration to sample and score with, or completions that are scored already.",
        ),
    ],
    set_: Overrides = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Training prompts to sample completions for; 64 if not given.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Times each completion is scored; 2 if not given.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="A reward function you trust, as gold.")
    ] = None,
) -> None:
    """Is my reward noisy, and can anything be learned from it? Numbers with intervals, and advice."""
    from rich.text import Text

    from vrpo.train.advice import advise
    from vrpo.train.diagnosis import diagnose

    if source.suffix == ".jsonl":
        if gold is not None or set_ or prompts is not None or repeats is not None:
            raise ConfigError(
                "--prompts, --repeats, --gold and --set go with a configuration; a .jsonl file has been sampled and scored, and gold "
                "is a column of it"
            )
        if not source.is_file():
            raise ConfigError(f"there is no file {str(source)!r}; give a .jsonl file or a configuration")
        from vrpo.train.diagnosis_files import read_judged

        judged = read_judged(source)
    else:
        from vrpo.train.judging import judge_sample

        # how the policy learns is not asked here, and must not stop the question whether it can
        settings = load(Config, source, [*(set_ or []), *NO_LEARNER])
        judged = judge_sample(settings, prompts=prompts or 64, repeats=repeats or 2, gold=gold)
    found = diagnose(judged)
    table = Table("of the reward", "value", "95 % interval or count")
    for line in found.lines():
        table.add_row(*map(Text, line))  # words of completions are no markup
    console.print(table)
    for number, advice in enumerate(advise(found), 1):
        console.print(f"{number}. {advice}", markup=False)


@app.command("plan")
def plan_command(
    config: ConfigPath,
    set_: Overrides = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json with the model's shape, instead of the model's own.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt to reckon with.")] = 128,
) -> None:
    """Batch plan, memory and time estimate; trains nothing."""
    from vrpo.train import plan
    from vrpo.train.memory import memory_plan
    from vrpo.train.shape import read_shape

    settings = load(Config, config, set_ or [])
    _print_batch_plan(settings)
    shape = read_shape(settings, model_config)
    console.print(
        f"model: {shape.parameters / 1e6:,.1f} M parameters; {prompt_tokens} prompt tokens assumed (--prompt-tokens)"
    )
    memory = memory_plan(settings, shape, prompt_tokens=prompt_tokens, device=plan.computes_on(settings)[0])
    table = Table("memory in fp32", "when", "GiB")
    for when, part in (
        ("always", memory.lasting),
        ("sampling", memory.sampling),
        ("learning", memory.learning),
    ):
        for name, size in part.items():
            table.add_row(name, when, f"{size / 2**30:.3f}")
    table.add_row("peak", "", f"{memory.peak / 2**30:.3f}", style="bold")
    console.print(table)
    device, dtype = plan.computes_on(settings)
    speed = plan.matmul_speed(device, dtype)
    work = plan.work_plan(settings, shape, prompt_tokens=prompt_tokens)
    table = Table("a step, full-length responses", "TFLOP", "seconds at best")
    for name, amount in [*work.items(), ("sum", sum(work.values()))]:
        table.add_row(name, f"{amount / 1e12:.3f}", f"{amount / speed:.2f}")
    console.print(table)
    total = sum(work.values()) / speed * settings.train.steps / 3600
    console.print(
        f"at the {speed / 1e9:,.0f} GFLOP/s measured here for {plan.PRECISION[dtype]} matrix multiplication: at least {total:.2f} hours for "
        f"{settings.train.steps} steps; expect 2-5 times that"
    )


@app.command("explain")
def explain_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="KEY|METRIC",
            help="A setting such as algorithm.lam, or a metric such as val/explained_var.",
        ),
    ],
) -> None:
    """What a setting takes, or how a metric is computed and read."""
    from vrpo.train.explain import explain

    console.print(explain(name), markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns the package's errors into one line and an exit status."""
    from vrpo.train.signals import Stopped

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar is ours

    try:
        status = app(args=arguments, standalone_mode=False)
    except USAGE_ERROR as error:
        _fail(f"{error.format_message().removesuffix('.')}; `vrpo --help` lists what there is", 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except INPUT_ERRORS as error:
        _fail(str(error), 2)
    except VrpoError as error:
        _fail(str(error), 1)
    except Stopped as stopped:
        _fail(str(stopped), stopped.exit_code)
    else:
        raise SystemExit(status or 0)


def _fail(message: str, status: Any) -> NoReturn:
    print(f"vrpo: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def _recipe_name(config: Path) -> str:
    config = Path(os.path.abspath(config))  # "." has no name; a link keeps its own
    if config.name in {"config.yaml", "study.yaml"} and config.parent.name:
        return config.parent.name
    return config.name if config.is_dir() else config.stem


def _print_batch_plan(settings: Config) -> None:
    from vrpo.train.batch_plan import batch_plan

    console.print("\n".join(batch_plan(settings)), markup=False)


if __name__ == "__main__":
    main()
