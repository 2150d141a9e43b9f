"""What a person sees while a run goes on: a progress bar on a terminal, a line now and then elsewhere."""

from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vrpo.train.closing import name_of_clean
from vrpo.types import EvalResult, Metrics

LINES_PER_RUN = 10
"""Lines a run prints when its output is not a terminal."""


@runtime_checkable
class Display(Protocol):
    """Told about a run as it happens."""

    def start(self, name: str, *, first: int, steps: int, note: str) -> None:
        """A run begins (or goes on) with `first` of `steps` steps done; `note` describes its data."""
        ...

    def step(self, step: int, metrics: Metrics) -> None:
        """A step is complete."""
        ...

    def evaluation(self, step: int, result: EvalResult) -> None:
        """Held-out prompts were evaluated."""
        ...

    def warning(self, step: int, message: str) -> None:
        """Something looks like a collapse."""
        ...

    def finish(self) -> None:
        """The run is complete."""
        ...


class Quiet:
    """Shows nothing."""

    def start(self, name: str, *, first: int, steps: int, note: str) -> None: ...

    def step(self, step: int, metrics: Metrics) -> None: ...

    def evaluation(self, step: int, result: EvalResult) -> None: ...

    def warning(self, step: int, message: str) -> None: ...

    def finish(self) -> None: ...


class Terminal:
    """A bar with the latest numbers on a terminal; plain lines in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress: Progress | None = None
        self._clean = ""
        self._name = ""
        self._steps = 0

    def start(self, name: str, *, first: int, steps: int, note: str) -> None:
        """Say what is trained on, and open the bar."""
        self._say(escape(note))
        self._name, self._steps = name, steps
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(name, total=steps, completed=first, numbers="")

    def step(self, step: int, metrics: Metrics) -> None:
        """Move the bar, or print a line every tenth of the run."""
        numbers = f"seen {metrics['objective/scores']:.3f}"
        if "val/explained_var" in metrics:
            numbers += f"  EV {metrics['val/explained_var']:+.2f}"
        numbers += f"  {metrics['tokens_per_second/step']:,.0f} tok/s{self._clean}"
        if (silent := metrics["rewards/missing"] - metrics["rewards/errors"]) > 0:
            numbers += f"  {silent:.0f} without a reward"
        if metrics["rewards/errors"]:
            numbers += f"  [red]{metrics['rewards/errors']:.0f} rewards failed[/red]"
        if gold := metrics.get("rewards/gold_errors"):
            numbers += f"  [red]gold failed {gold:.0f} times[/red]"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step == 1 or step % max(self._steps // LINES_PER_RUN, 1) == 0:
            self._say(f"{self._name} step {step}/{self._steps}  {numbers}")

    def evaluation(self, step: int, result: EvalResult) -> None:
        """Show the clean accuracy beside the bar from here on."""
        few = (
            f" ({result.judged} of {result.prompts} prompts judged)" if result.judged < result.prompts else ""
        )
        of = f" of {result.judged}" if few else ""
        self._clean = f"  clean {result.greedy:.3f}{of} at step {step}"
        if self._progress is None:
            what = name_of_clean(result.greedy, result.sampled)
            line = f"{self._name} step {step}  {what}: greedy {result.greedy:.3f}, sampled {result.sampled:.3f}{few}"
            if result.denoiser_greedy is not None:
                line += f"; denoiser's model {result.denoiser_greedy:.3f}"
            self._say(line)

    def warning(self, step: int, message: str) -> None:
        """Print it above the bar."""
        self._say(f"[yellow]warning[/yellow] at step {step}: {escape(message)}")

    def _say(self, text: str) -> None:
        # in a log a line is a line, for whoever searches it
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def finish(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
