"""The process that runs one isolated reward function. Started by path, so it imports nothing of the package.

    parent ──pickled arguments──> worker ──JSON verdicts──> parent

Answers are JSON and nothing else: what a reward function returns can be odd, but it cannot make the training process
unpickle anything. `rewards/isolation.py` is the other side.
"""

import asyncio
import functools
import importlib.util
import inspect
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

FP32_MAX = 3.4028234663852886e38

OUT_OF_MEMORY = "the function ran out of the memory it may use"


def main(descriptor: int, parent: int) -> None:
    """Load the function, say what its signature is, then answer until the parent is gone."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    os.set_inheritable(descriptor, False)  # what the function starts must not hold the pipe open
    connection = Connection(descriptor)
    task = pickle.loads(connection.recv_bytes())
    sys.path[:] = task["path"]
    if task["memory_limit"] is not None:
        _limit_memory(task["memory_limit"])
    try:
        function = _load(task)
        facts = [
            (p.name, p.kind.name, p.default is p.empty)
            for p in inspect.signature(function).parameters.values()
        ]
        if task["concurrency"] is not None:
            function = spread(function, task["concurrency"])
    # it is the user's code: whatever it raises is the answer
    except BaseException as error:
        _answer(connection, {"refused": _one_line(error)})
        return
    _answer(connection, {"parameters": facts})
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            _leave()
        _answer(connection, _judge(function, message))


def _judge(function: Callable[..., Any], message: bytes) -> dict[str, Any]:
    try:
        values = function(**pickle.loads(message))
        if inspect.isawaitable(values):
            values = _loop().run_until_complete(_wait(values))
        if hasattr(values, "tolist"):  # an array, a tensor, a column of a table
            values = values.tolist()
    except MemoryError:
        return {"fault": ["memory", OUT_OF_MEMORY]}
    except BaseException as error:
        return {"fault": ["raised", _one_line(error)]}
    if not isinstance(values, (list, tuple)):
        return {"contract": type(values).__name__}
    return {"values": [_value(value) for value in values]}


def spread(function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """An async function that asks `function` once per response, with lists of one, at most `limit` at a time.

    A response on which it raises has the exception in its place, so that it costs no other.
    """
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
        raise TypeError(f"concurrency={limit} is for async functions, this is none; leave it out")

    async def spread_out(**arguments: Any) -> list[Any]:
        room = asyncio.Semaphore(limit)

        async def one(row: int) -> Any:
            async with room:
                (value,) = await function(**{name: [values[row]] for name, values in arguments.items()})
                return value

        count = len(next(iter(arguments.values()), []))
        return await asyncio.gather(*(one(row) for row in range(count)), return_exceptions=True)

    return spread_out


async def _wait(awaitable: Any) -> Any:
    return await awaitable


@functools.lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls: a client or lock that an async function keeps belongs to the loop it was first used in."""
    return asyncio.new_event_loop()


def _value(value: Any) -> Any:
    """None, a number, or [kind, detail] for anything else."""
    if value is None:
        return None
    if isinstance(value, MemoryError):
        return ["memory", OUT_OF_MEMORY]
    if isinstance(value, BaseException):
        return ["raised", _one_line(value)]
    try:
        if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a scalar of numpy or torch
            value = value.item()
        if isinstance(value, (bool, int, float)):
            number = float(value)
            if math.isfinite(number) and abs(number) <= FP32_MAX:
                return number
        return ["bad_value", f"returned {value!r:.60}, a finite number or None is needed"]
    except Exception as error:
        return ["bad_value", f"returned something that cannot be read ({_one_line(error)})"]


def _load(task: dict[str, Any]) -> Callable[..., Any]:
    if task["pickled"] is not None:
        return pickle.loads(task["pickled"])
    # its neighbours can be imported, as by `python FILE`
    sys.path.append(os.path.dirname(os.path.abspath(task["file"])))
    spec = importlib.util.spec_from_file_location(
        f"vrpo_reward_{os.path.basename(task['file'])[:-3]}", task["file"]
    )
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file; give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up by name
    spec.loader.exec_module(module)
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == spec.name}
    names = sorted(k for k, v in own.items() if callable(v) and not k.startswith("_"))
    if not callable(getattr(module, task["name"], None)):
        raise LookupError(
            f"no function {task['name']!r}; it defines {names}; correct the name in rewards.functions, "
            "rewards.gold or --gold"
        )
    return getattr(module, task["name"])


def _answer(connection: Connection, data: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(data).encode("utf-8", "backslashreplace"))


def _one_line(error: BaseException) -> str:
    said = str(error).encode("utf-8", "backslashreplace").decode()
    text = (said.splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _limit_memory(gibibytes: float) -> None:
    import resource

    size = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _watch(parent: int) -> None:
    """End with the parent, also while the function is busy."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _leave()


def _leave() -> NoReturn:
    """End at once, and with this process everything the function started."""
    if os.getpgrp() == os.getpid():  # a group of its own, so nobody else is in it
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
