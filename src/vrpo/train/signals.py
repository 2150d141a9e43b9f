"""SIGINT and SIGTERM: stop soon, lose nothing, exit 130 or 143. A second signal ends the process at once.

Work that changes no state (sampling, judging, evaluating) is given up where it stands; an update is left between
two micro-batches. What the loop then writes is what a resumed run needs to end at the same bits.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vrpo.errors import INPUT_ERRORS


def how_to_continue(folder: Path) -> str:
    """What a user does next with a run that has stopped."""
    return f"continue with --out {folder} --resume (in Python a new Trainer's train(resume=True))"


def add_what_is_kept(error: Exception, steps: int, folder: Path) -> None:
    """The same at the end of an error of the user's input, which took none of the run's whole steps."""
    if isinstance(error, INPUT_ERRORS):
        kept = f"{steps} whole step{'s are' if steps > 1 else ' is'} kept, {how_to_continue(folder)}"
        error.args = (f"{error}; {kept}", *error.args[1:])


class Stopped(Exception):
    """A signal ended the run after a checkpoint."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {how_to_continue(folder)}")
        self.exit_code = 128 + signum


class GivenUp(BaseException):
    """Unwinds work that changes no state. No Exception: a reward function's `except` must not swallow it."""


class StopRequest:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._may_unwind = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Inside, a signal raises `GivenUp` wherever the main thread is, in a stuck reward function too.

        Raises:
            GivenUp: a signal comes inside, or has come before.
        """
        self._may_unwind = True
        try:
            if self():
                raise GivenUp
            yield
        finally:
            self._may_unwind = False

    def leave_if_asked(self, folder: Path) -> None:
        """Raise `Stopped` when a signal has come."""
        if self.signal is not None:
            raise Stopped(self.signal, folder)

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler: remember the first signal; let the second one kill the process."""
        self.signal = signum
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if self._may_unwind:
            self._may_unwind = False
            raise GivenUp


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Listen for signals inside; the handlers from before are put back.

    Only the main thread may install handlers: elsewhere the request never becomes true.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {each: signal.signal(each, request.note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `SystemExit(128 + signum)`, so that whoever has started processes can end them. A signal
    that is ignored, as `nohup` does with SIGHUP, stays ignored.

    Raises:
        SystemExit: such a signal came.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {}
    for each in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(each) is not signal.SIG_IGN:
            before[each] = signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
