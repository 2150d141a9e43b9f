"""Calling a reward function with TRL's signature: f(prompts, completions, **columns) -> list[float | None].

Functions may be plain or async, and get only the keyword arguments they accept. Everything that breaks
the contract for a whole step is a RewardError; what breaks for one sample is the pipeline's business.
"""

import asyncio
import importlib.util
import inspect
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vrpo.config.load import explain_validation
from vrpo.config.rewards import CallConfig, FunctionCallConfig, FunctionReward, HttpReward
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards.http import HttpJudge
from vrpo.rewards.isolation import InThread, InWorker, Isolation
from vrpo.rewards.worker import spread
from vrpo.types import Rollout

PROVIDED = ("prompts", "completions", "completion_ids", "stops")
"""Arguments that are not columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFunction:
    """A reward function with its weight.

    Example: named(lambda completions, answer, **_: [float(c == a) for c, a in zip(completions, answer)])
    """

    name: str
    """Key in `ScoredRollout.parts`."""
    function: Callable[..., Any]
    weight: float
    """Factor in the weighted sum."""
    needs: frozenset[str]
    """Columns it cannot do without."""
    accepts: frozenset[str] | None
    """Keyword arguments it takes; None is any."""
    retries: int = 0
    """How often a response whose verdict failed is asked again."""
    on_error: Literal["mask", "raise"] = "mask"
    """What becomes of a response whose verdict failed in the end."""
    source: Any = None
    """What was given, before anything was wrapped around it; None: not known."""
    reads_start: bool = True
    """Whether a completion is handed to it with the words that the prompt began it with, as TRL does."""
    asks_again: bool = True
    """Whether a call that failed as a whole is followed by one for each response."""

    def close(self) -> None:
        """End its process, if it has one; it is started again when it is needed."""
        if isinstance(self.function, InWorker):
            self.function.close()

    def reads(self, column: str) -> bool:
        """Whether the function is given `column`."""
        return self.accepts is None or column in self.accepts

    def renamed(self, name: str) -> "NamedFunction":
        """The same function under another name."""
        return replace(self, name=name)


def named(
    function: Any,
    *,
    weight: float = 1.0,
    name: str | None = None,
    needs: Sequence[str] = (),
    isolation: Isolation = "none",
    timeout: float | None = None,
    retries: int = 0,
    concurrency: int | None = None,
    on_error: Literal["mask", "raise"] = "mask",
    memory_limit: float | None = None,
) -> NamedFunction:
    """Wrap a reward function; which columns it needs is read off its signature.

    Args:
        function: plain or async, TRL's signature. Anything may come in here; what cannot be called is refused.
        weight: factor in the weighted sum.
        name: key in the metrics; None takes the function's own name.
        needs: columns it takes out of its **columns.
        isolation: `process`: a process of its own, to which the function is sent; `thread`; `none`: in place.
        timeout: seconds a call may take; needs isolation.
        retries: how often a response whose verdict failed is asked again.
        concurrency: for async functions: one call a response, at most so many at a time; None: one call for all.
        on_error: `mask`: a response whose verdict failed has no reward; `raise`: the run stops.
        memory_limit: GiB of its process; needs isolation `process`.

    Raises:
        ConfigError: what was given cannot be called, or not in this way.
    """
    try:
        how = FunctionCallConfig(
            isolation=isolation,
            timeout=timeout,
            retries=retries,
            concurrency=concurrency,
            on_error=on_error,
            memory_limit=memory_limit,
        )
    except ValidationError as error:
        raise ConfigError(explain_validation(FunctionCallConfig, error)) from error
    if not callable(function):
        raise ConfigError(f"reward function {function!r:.60} is not callable; pass a function")
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ConfigError(f"reward function {function!r:.60} has weight {weight!r}; give a finite number")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward function {function!r:.60} has no signature ({error}); wrap it in a def"
        ) from error
    called = function
    if concurrency is not None:
        try:
            called = spread(function, concurrency)
        except TypeError as error:
            raise ConfigError(f"reward function {function!r:.60}: {error}") from error
    in_place = called
    if isolation == "thread":
        called = InThread(lambda **arguments: _call(in_place, arguments), timeout=timeout)
    if isolation == "process":
        called = InWorker(
            function=function, timeout=timeout, memory_limit=memory_limit, concurrency=concurrency
        )
    facts = [(p.name, p.kind.name, p.default is p.empty) for p in parameters]
    wrapped = _wrap(called, facts, how, name=name or _own_name(function), weight=weight, needs=needs)
    return replace(wrapped, source=function)


def isolated(config: FunctionReward) -> NamedFunction:
    """A function of a file that is executed in its own process only.

    Raises:
        ConfigError: no such file, the file fails or takes too long, no such name, not callable.
    """
    if not Path(config.file).is_file():
        raise ConfigError(
            f"{config.file}: no such file; correct the path (it is relative to the working directory)"
        )
    worker = InWorker(
        file=config.file,
        name=config.name,
        timeout=config.timeout,
        memory_limit=config.memory_limit,
        concurrency=config.concurrency,
    )
    return _wrap(worker, worker.parameters(), config, name=config.name, weight=config.weight)


def served(config: HttpReward) -> NamedFunction:
    """A judge behind HTTP.

    Raises:
        ConfigError: a header's environment variable is not set.
    """
    return NamedFunction(
        name=config.type,
        function=HttpJudge(config),
        weight=config.weight,
        needs=frozenset(config.columns),
        accepts=frozenset(("prompts", "completions", *config.columns)),
        on_error=config.on_error,
        asks_again=False,
    )


def _wrap(
    function: Callable[..., Any],
    parameters: Sequence[tuple[str, str, bool]],
    how: CallConfig,
    *,
    name: str,
    weight: float,
    needs: Sequence[str] = (),
) -> NamedFunction:
    """A function whose parameters are (name, kind, has no default) each."""
    if any(kind == "POSITIONAL_ONLY" for _, kind, _ in parameters):
        raise ConfigError(f"reward function {name} has positional-only arguments; remove the `/`")
    keywords = [p for p in parameters if p[1] in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
    takes_any = any(kind == "VAR_KEYWORD" for _, kind, _ in parameters)
    required = {key for key, _, is_required in keywords if is_required} | set(needs)
    return NamedFunction(
        name=name,
        function=function,
        weight=weight,
        needs=frozenset(required.difference(PROVIDED)),
        accepts=None if takes_any else frozenset(key for key, _, _ in keywords),
        retries=how.retries,
        on_error=how.on_error,
    )


def _own_name(function: Callable[..., Any]) -> str:
    if inspect.isroutine(function):
        return function.__name__
    return type(function).__name__


def load_function(file: str, name: str) -> Callable[..., Any]:
    """Execute a Python file and take a function out of it.

    Args:
        file: path, relative to the working directory.
        name: a function defined at the top level of the file.

    Raises:
        ConfigError: no such file, the file fails, no such name, not callable.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such file; correct the path (it is relative to the working directory)")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # last, so that nothing of ours is hidden by a file of that name
        sys.path.append(folder)
    module_name = f"vrpo_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: not a Python file; give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    # It is the user's code: anything may come out of it, and sys.exit() there must not end the run as a success.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{file}: raised {one_line(error)} while it was loaded; run it with python and fix that"
        ) from error
    functions = {
        key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    }
    if name not in vars(module):
        raise ConfigError(f"{file}: no function {name!r}; it defines {sorted(functions)}")
    if not callable(vars(module)[name]):
        raise ConfigError(
            f"{file}: {name} is {vars(module)[name]!r:.40}, not a function; name one of {sorted(functions)}"
        )
    return functions.get(name, vars(module)[name])


def one_line(error: BaseException) -> str:
    """`ValueError: what it said`, on one line."""
    # half a character may stand in what a model wrote; no file could take it
    said = str(error).encode("utf-8", "backslashreplace").decode()
    text = (said.splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def call(
    function: NamedFunction, rollouts: Sequence[Rollout], replaced: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """What the function returns for these rollouts: one unchecked value each, in their order.

    Where the prompt is chat messages, the completion is `[{"role": "assistant", "content": ...}]`, as TRL has it.

    Args:
        function: the function.
        rollouts: samples.
        replaced: columns that take the place of the data set's own.

    Raises:
        RewardError: a needed column does not exist, or the function returned something else than one
            value per sample. What the function itself raises comes through.
    """
    arguments = _columns(rollouts, replaced)
    missing = sorted(function.needs - arguments.keys())
    if missing:
        raise RewardError(
            f"{function.name}: needs column {missing[0]!r}, the data has {sorted(arguments)}; rename the "
            "column (task.columns in a file) or give the parameter a default"
        )
    arguments |= {
        "prompts": [_asked(rollout.prompt.prompt) for rollout in rollouts],
        "completions": [_completion(rollout, with_start=function.reads_start) for rollout in rollouts],
        "completion_ids": [rollout.token_ids[rollout.action_mask].tolist() for rollout in rollouts],
        "stops": [rollout.stop for rollout in rollouts],
    }
    if function.accepts is not None:
        arguments = {name: value for name, value in arguments.items() if name in function.accepts}
    values = _call(function.function, arguments)
    if hasattr(values, "tolist"):  # an array, a tensor, a column of a table
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"{function.name}: returned a {type(values).__name__}, a list of {len(rollouts)} numbers or None is needed; "
            "return one value for each completion"
        )
    if len(values) != len(rollouts):
        raise RewardError(
            f"{function.name}: returned {len(values)} values for {len(rollouts)} completions; return one for each"
        )
    return list(values)


def _columns(rollouts: Sequence[Rollout], replaced: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    names = {name: None for rollout in rollouts for name in rollout.prompt.columns}
    clash = [name for name in PROVIDED if name in names]
    if clash:
        raise RewardError(
            f"the data has a column {clash[0]!r}, which is an argument of every reward function; rename it "
            "(task.columns in a file)"
        )
    return {name: [_fresh(r.prompt.columns.get(name)) for r in rollouts] for name in names} | {
        name: list(values) for name, values in replaced.items()
    }


def _fresh(value: Any) -> Any:
    """A copy of what can be edited: a function that edits its arguments must not edit the data set."""
    return deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _begun(prompt: Any) -> bool:
    """Whether a chat ends with the assistant's first words, which the response goes on with."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _asked(prompt: Any) -> Any:
    """The prompt without the assistant's own words, as in TRL."""
    return (
        prompt if isinstance(prompt, str) else [dict(m) for m in (prompt[:-1] if _begun(prompt) else prompt)]
    )


def _completion(rollout: Rollout, *, with_start: bool) -> Any:
    prompt = rollout.prompt.prompt
    if isinstance(prompt, str):
        return rollout.completion
    start = prompt[-1]["content"] if with_start and _begun(prompt) else ""
    return [{"role": "assistant", "content": start + rollout.completion}]


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    result = function(**arguments)
    return _finish(result) if inspect.isawaitable(result) else result


def _finish(awaitable: Any) -> Any:
    async def wait() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        # SystemExit among them: raised in the loop's thread it would end the loop
        except BaseException as error:
            return None, error

    future = asyncio.run_coroutine_threadsafe(wait(), _event_loop())
    try:
        value, error = future.result()
    except BaseException:  # the run is asked to stop: nobody waits for the answer
        future.cancel()
        raise
    if error is not None:
        raise error
    return value


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop, in a thread of its own, for all calls: a client or lock that an async function keeps belongs to the loop it was first
    used in. A notebook's own loop, which cannot be entered twice, is left alone."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop
