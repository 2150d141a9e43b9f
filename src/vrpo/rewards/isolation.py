"""Calling a reward function so that it can hang, crash or eat memory without taking the run along.

`process`: a worker of its own (`rewards/worker.py`), killed with everything it started when it takes too long. It is a
plain subprocess and no pool of `multiprocessing` or `pebble`, because these import the user's main script again in the
child, and a training script without a guard would train there; because Ctrl-C must not reach it; and because what it
started itself must die with it. `thread`: a daemon thread, given up when it takes too long; it goes on in the background.
"""

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, final

from vrpo.errors import ConfigError, RewardError

Isolation = Literal["process", "thread", "none"]

FAULT_KINDS = ("raised", "timeout", "crashed", "memory", "bad_value", "http")
"""What can go wrong with one verdict."""

START_SECONDS = 300.0
"""Longest a worker may take to load its function: imports of large libraries are slow and no fault."""

LARGEST_ANSWER = 1 << 26
"""Bytes; no list of verdicts comes near it, and a longer announcement must not fill the memory of the run."""

LOOK_SECONDS = 0.2
"""How often a wait looks whether the process still lives: what it forked may keep its end of the pipe open."""

WORKER = Path(__file__).with_name("worker.py")


class Fault(Exception):
    """A verdict that could not be had, and why."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def fault_kind(line: str) -> str:
    """The kind in an error line "function: kind: detail"."""
    parts = line.split(": ", 2)
    return parts[1] if len(parts) == 3 and parts[1] in FAULT_KINDS else "raised"


@final
class InThread:
    """Calls a function in a daemon thread and waits no longer than `timeout` seconds."""

    def __init__(self, function: Callable[..., Any], *, timeout: float | None) -> None:
        self._function = function
        self._timeout = timeout

    def __call__(self, /, **arguments: Any) -> Any:
        """What the function returns or raises.

        Raises:
            Fault: of kind timeout.
        """
        result: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                result.append((True, self._function(**arguments)))
            # it is the user's code, and what it raises belongs to the caller's thread
            except BaseException as error:
                result.append((False, error))
            done.set()

        threading.Thread(target=work, daemon=True).start()
        if not done.wait(self._timeout):
            raise Fault("timeout", f"no answer within {self._timeout:g} s")
        succeeded, value = result[0]
        if succeeded:
            return value
        raise value


@final
class InWorker:
    """Calls a function in a process of its own; the process is started when first needed, and again after its death."""

    def __init__(
        self,
        *,
        file: str | None = None,
        name: str | None = None,
        function: Callable[..., Any] | None = None,
        timeout: float | None,
        memory_limit: float | None,
        concurrency: int | None = None,
    ) -> None:
        """Name what is called: `name` in the Python file `file`, or a function to be sent over.

        Raises:
            ConfigError: the function cannot be sent to another process.
        """
        self._label = f"{file}: {name}" if function is None else repr(function)[:60]
        self._timeout = timeout
        pickled = None
        if function is not None:
            import cloudpickle

            try:
                pickled = cloudpickle.dumps(function)
            except Exception as error:  # whatever its closure holds may refuse in its own way
                reason = " ".join(str(error).split())[:120]
                raise ConfigError(
                    f"reward function {self._label} cannot be sent to a process ({reason}); use isolation: thread or none"
                ) from error
        path = None if file is None else str(Path(file).resolve())
        self._task = {
            "file": path,
            "name": name,
            "pickled": pickled,
            "memory_limit": memory_limit,
            "concurrency": concurrency,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._finalizer: weakref.finalize | None = None

    def parameters(self) -> list[tuple[str, str, bool]]:
        """(name, kind, has no default) of each parameter, from a fresh worker.

        Raises:
            ConfigError: the function cannot be loaded; says why.
        """
        self.close()
        return self._start()

    def __call__(self, /, **arguments: Any) -> list[Any]:
        """One value each: None, a number, or a `Fault` in its place.

        Raises:
            Fault: the whole call failed.
            RewardError: the function returned no list, or takes arguments that no process can be sent.
        """
        if self._process is None:
            try:
                self._start()
            # it could be loaded before the run; what has changed since then is no fault of a response
            except ConfigError as error:
                raise RewardError(str(error)) from error
        try:
            message = pickle.dumps(arguments)
        except Exception as error:  # a column may hold anything
            raise RewardError(
                f"{self._label}: a column cannot be sent to a process ({' '.join(str(error).split())[:120]}); use isolation: "
                "thread or none"
            ) from error
        answer = self._ask(message, self._timeout, "no answer within")
        if "contract" in answer:
            raise RewardError(
                f"{self._label}: returned a {answer['contract']}, a list of numbers or None is needed; return one value for "
                "each completion"
            )
        if "fault" in answer:
            raise _fault(answer["fault"])
        return [_fault(value) if isinstance(value, list) else value for value in answer.get("values", ())]

    def close(self) -> None:
        """Kill the worker and everything it started; again is no error."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._connection = self._finalizer = None

    def _start(self) -> list[tuple[str, str, bool]]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            command = [sys.executable, "-P", str(WORKER), str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it prints must not end up between the lines of a result
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours)
        try:
            ready = self._ask(
                pickle.dumps(self._task | {"path": sys.path}), START_SECONDS, "not loaded within"
            )
        except Fault as fault:
            raise ConfigError(
                f"{self._label}: {fault.kind} while it was loaded ({fault}); run the file and fix that"
            ) from fault
        if "refused" in ready:
            self.close()
            told = str(ready["refused"])
            mend = (
                ""
                if told.startswith("LookupError: no function")
                else "; run the file with python and fix that"
            )
            raise ConfigError(
                f"{self._label}: {told.removeprefix('LookupError: ') if not mend else told}{mend}"
            )
        return [(str(name), str(kind), bool(required)) for name, kind, required in ready["parameters"]]

    def _ask(self, message: bytes, timeout: float | None, too_long: str) -> dict[str, Any]:
        """Send, wait, receive; whatever interrupts the wait ends the worker, which may be in any state by then."""
        assert self._connection is not None and self._process is not None, "_start comes first"
        try:
            deadline = None if timeout is None else time.monotonic() + timeout
            self._write(message, deadline)
            answer = json.loads(self._read(deadline))
            if not isinstance(answer, dict):
                raise ValueError(f"a {type(answer).__name__} is no answer")
            return answer
        except TimeoutError as error:
            self.close()
            raise Fault("timeout", f"{too_long} {timeout:g} s") from error
        except (ValueError, RecursionError) as error:
            self.close()
            raise Fault("crashed", "something else than the answer was written into its pipe") from error
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            status = self._process.returncode
            self.close()
            raise Fault("crashed", _how(status)) from error
        except BaseException:
            self.close()
            raise

    def _write(self, message: bytes, deadline: float | None) -> None:
        assert self._connection is not None, "_start comes first"
        # the frame of multiprocessing.connection, which the other side reads with
        short = len(message) < 1 << 31
        head = struct.pack("!i", len(message)) if short else struct.pack("!iQ", -1, len(message))
        for part in (head, message):
            rest = memoryview(part)
            while rest:
                self._wait(selectors.EVENT_WRITE, deadline)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._connection.send(rest) :]

    def _read(self, deadline: float | None) -> bytes:
        (size,) = struct.unpack("!i", self._read_exactly(4, deadline))
        if not 0 <= size <= LARGEST_ANSWER:
            raise ValueError(f"{size} bytes are no answer")
        return self._read_exactly(size, deadline)

    def _read_exactly(self, size: int, deadline: float | None) -> bytes:
        # Not Connection.recv_bytes: after the first byte it waits for the others without a limit.
        assert self._connection is not None, "_start comes first"
        found = bytearray()
        while len(found) < size:
            self._wait(selectors.EVENT_READ, deadline)
            with contextlib.suppress(BlockingIOError):
                piece = self._connection.recv(min(size - len(found), 1 << 20))
                if not piece:
                    raise EOFError
                found += piece
        return bytes(found)

    def _wait(self, event: int, deadline: float | None) -> None:
        """Until the pipe is ready.

        Raises:
            TimeoutError: the deadline has passed.
            EOFError: the process is dead and has left nothing to read.
        """
        assert self._connection is not None and self._process is not None, "_start comes first"
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, event)
            while True:
                left = LOOK_SECONDS if deadline is None else min(LOOK_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError
                dead = self._process.poll() is not None
                if selector.select(left):
                    return
                if dead:
                    raise EOFError


def _fault(said: Any) -> Fault:
    """[kind, detail] as the worker writes it; anything else is a bad value."""
    if isinstance(said, list) and len(said) == 2 and said[0] in FAULT_KINDS and isinstance(said[1], str):
        return Fault(said[0], said[1])
    return Fault("bad_value", f"returned {said!r:.60}, a finite number or None is needed")


def _how(status: int | None) -> str:
    if status is None:
        return "the process closed its connection"
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process exited with status {status}"


def _end(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # a process stuck in the kernel cannot be waited for
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    connection.close()
