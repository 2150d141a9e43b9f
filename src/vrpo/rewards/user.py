"""Calling a reward function with TRL's signature: f(prompts, completions, **columns) -> list[float | None].

Functions may be plain or async, and get only the keyword arguments they accept. Everything that breaks
the contract for a whole step is a RewardError; what breaks for one sample is the pipeline's business.
"""

import asyncio
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from vrpo.errors import ConfigError, RewardError
from vrpo.types import Rollout

PROVIDED = ("prompts", "completions", "completion_ids")
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
) -> NamedFunction:
    """Wrap a reward function; which columns it needs is read off its signature.

    Args:
        function: plain or async, TRL's signature. Anything may come in here; what cannot be called is refused.
        weight: factor in the weighted sum.
        name: key in the metrics; None takes the function's own name.
        needs: columns it takes out of its **columns.
    """
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
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ConfigError(f"reward function {function!r:.60} has positional-only arguments; remove the `/`")
    keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = {p.name for p in keywords if p.default is p.empty} | set(needs)
    return NamedFunction(
        name=name or _own_name(function),
        function=function,
        weight=weight,
        needs=frozenset(required.difference(PROVIDED)),
        accepts=None if takes_any else frozenset(p.name for p in keywords),
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
        raise ConfigError(
            f"{file}: no such file; correct rewards.functions.file (it is relative to the working directory)"
        )
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
            f"{function.name}: needs column {missing[0]!r}, the data has {sorted(arguments)}; rename it with "
            "task.columns or give the parameter a default"
        )
    arguments |= {
        "prompts": [_written(rollout.prompt.prompt) for rollout in rollouts],
        "completions": [_completion(rollout) for rollout in rollouts],
        "completion_ids": [rollout.token_ids[rollout.action_mask].tolist() for rollout in rollouts],
    }
    if function.accepts is not None:
        arguments = {name: value for name, value in arguments.items() if name in function.accepts}
    values = _call(function.function, arguments)
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"{function.name}: returned a {type(values).__name__}, a list of {len(rollouts)} numbers or None is needed; "
            "use .tolist() on arrays and tensors"
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
            f"the data has a column {clash[0]!r}, which is an argument of every reward function; rename it with "
            "task.columns"
        )
    return {name: [r.prompt.columns.get(name) for r in rollouts] for name in names} | {
        name: list(values) for name, values in replaced.items()
    }


def _written(prompt: Any) -> Any:
    # Fresh objects: a function that edits its arguments must not edit the data set.
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _completion(rollout: Rollout) -> Any:
    if isinstance(rollout.prompt.prompt, str):
        return rollout.completion
    return [{"role": "assistant", "content": rollout.completion}]


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    result = function(**arguments)
    return _finish(result) if inspect.isawaitable(result) else result


def _finish(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook's loop already runs in this thread and cannot be entered twice.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, wait()).result()
