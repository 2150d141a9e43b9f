"""What happens between steps: evaluations, the collapse watch, checkpoints, and the record of a failure."""

from collections.abc import Mapping, Sequence
from typing import Any

from vrpo.errors import NumericsError, RewardError
from vrpo.train import checkpoint
from vrpo.train.numerics import worst_tokens
from vrpo.train.progress import Display
from vrpo.train.run import Run
from vrpo.train.signals import StopRequest
from vrpo.train.summary import accuracy_on_schedule
from vrpo.train.watch import warnings_at


def evaluate_if_due(run: Run, display: Display, stop: StopRequest) -> None:
    """Clean accuracy of the weights as they are now, if it is due and not on record."""
    step, config = run.learner.step, run.config.train
    if (
        run.paused is not None
    ):  # a part of the next step's updates is in these weights; the evaluation came before them
        return
    wanted = step in (0, config.steps) or due(step, config.eval_every)
    if not wanted or any(e["step"] == step for e in run.folder.read_evaluations()):
        return
    try:
        with stop.abandonable():
            result = run.evaluate()
    except RewardError as error:
        error.args = (f"in the evaluation at step {step}: {error}", *error.args[1:])
        raise
    display.evaluation(step, result)
    run.folder.append_evaluation(step, result)


def watch(run: Run, history: Sequence[Mapping[str, Any]], display: Display) -> None:
    """Say what looks like a collapse."""
    warned = warnings_at(
        history,
        warmup_steps=run.critic_warmup,
        max_completion_length=run.config.rollout.max_completion_length,
    )
    for warning in warned:
        run.folder.append_warning(warning.step, warning.kind, warning.message)
        display.warning(warning.step, warning.message)


def save_whole_step(run: Run) -> None:
    """A checkpoint of the last whole step, unless there is one; older ones than are kept go."""
    folder, checkpoints = run.folder, run.folder.checkpoints
    if run.learner.step not in checkpoint.steps_in(checkpoints):
        folder.flush()
        checkpoint.save(checkpoints, run.learner)
    config = run.config.train
    checkpoint.prune(checkpoints, keep=config.keep_checkpoints, accuracy=accuracy_on_schedule(folder, config))


def save_pause(run: Run) -> None:
    """A checkpoint in the middle of a step."""
    run.folder.flush()
    checkpoint.save(run.folder.checkpoints, run.learner, paused=run.paused)


def write_worst_tokens(run: Run, error: NumericsError) -> None:
    """What a person needs to find out why the numbers went bad."""
    if error.batch is not None:
        tokens = worst_tokens(error.batch)
        record = {"step": run.learner.step + 1, "error": str(error), "tokens": tokens}
        run.folder.write_json("worst_tokens.json", record)


def due(step: int, every: int) -> bool:
    """Whether what happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0
