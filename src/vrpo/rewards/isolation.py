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
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, final

from vrpo.errors import ConfigError, RewardError

Isolation = Literal["process", "thread", "none"]

FAULT_KINDS = ("raised", "timeout", "crashed", "memory", "bad_value", "http")
"""What can go wrong with one verdict."""

START_SECONDS = 300.0
"""Longest a worker may take to load its function: imports of large libraries are slow and no fault."""

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

    def __call__(self, **arguments: Any) -> Any:
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
        self._connection: Connection | None = None
        self._finalizer: weakref.finalize | None = None

    def parameters(self) -> list[tuple[str, str, bool]]:
        """(name, kind, has no default) of each parameter, from a fresh worker.

        Raises:
            ConfigError: the function cannot be loaded; says why.
        """
        self.close()
        return self._start()

    def __call__(self, **arguments: Any) -> list[Any]:
        """One value each: None, a number, or a `Fault` in its place.

        Raises:
            Fault: the whole call failed.
            RewardError: the function returned no list, or takes arguments that no process can be sent.
        """
        if self._process is None:
            self._start()
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
                f"{self._label}: returned a {answer['contract']}, a list of numbers or None is needed; use .tolist() on arrays "
                "and tensors"
            )
        if "fault" in answer:
            raise Fault(*answer["fault"])
        return [Fault(*value) if isinstance(value, list) else value for value in answer["values"]]

    def close(self) -> None:
        """Kill the worker and everything it started; again is no error."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._connection = self._finalizer = None

    def _start(self) -> list[tuple[str, str, bool]]:
        ours, theirs = Pipe()
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
            raise ConfigError(f"{self._label}: {ready['refused']}; run the file with python and fix that")
        return [(str(name), str(kind), bool(required)) for name, kind, required in ready["parameters"]]

    def _ask(self, message: bytes, timeout: float | None, too_long: str) -> dict[str, Any]:
        """Send, wait, receive; whatever interrupts the wait ends the worker, which may be in any state by then."""
        assert self._connection is not None and self._process is not None, "_start comes first"
        try:
            self._connection.send_bytes(message)
            if not self._connection.poll(timeout):
                raise Fault("timeout", f"{too_long} {timeout:g} s")
            return dict(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            status = self._process.returncode
            self.close()
            raise Fault("crashed", _how(status)) from error
        except BaseException:
            self.close()
            raise


def _how(status: int | None) -> str:
    if status is None:
        return "the process closed its connection"
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process exited with status {status}"


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
