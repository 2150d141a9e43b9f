"""Is this the run the folder holds? What may change when a run goes on, and what would make it another one."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from vrpo.config import Config
from vrpo.config.rewards import FunctionReward
from vrpo.errors import CheckpointError
from vrpo.models import Policy
from vrpo.rewards import NamedFunction
from vrpo.tasks import Task

MAY_CHANGE = frozenset(
    f"train.{key}"
    for key in (
        "steps",
        "eval_every",
        "eval_prompts",
        "eval_samples",
        "checkpoint_every",
        "keep_checkpoints",
        "microbatch",
        "max_tokens_per_microbatch",
        "activation_checkpointing",
        "compile",
        "threads",
    )
) | {"model.device", "rollout.batch_size", "rollout.cuda_graphs", "rewards.max_failed"}
"""Settings a resumed run may have otherwise than before: how much, where and how fast, but not what. Any other change would make it
another run. Those of memory and speed may change the last bits.

`train.steps` stretches what is a share of the run from there on: decaying learning rates and beta's warm-up.
"""

HOW_A_FUNCTION_IS_CALLED = frozenset(
    {
        "isolation",
        "timeout",
        "retries",
        "concurrency",
        "memory_limit",
        "on_error",
        "headers_env",
        "attempts",
        "batch_size",
        "request_timeout",
    }
)
"""Settings of one reward function that say how it is called, not what it says: they may change too."""

EXACT_ONLY_WITH = ("platform", "processor", "torch_threads", "gpu", "versions")
"""What of environment.json a bit-for-bit result depends on."""


def inputs_of(config: Config, policy: Policy, task: Task) -> dict[str, str]:
    """Hashes of what a configuration only names: initial weights, data, reward files."""
    return {
        "initial model": _weights_hash(policy),
        "data": task.fingerprint(),
        **reward_files(config),
    }


def reward_files(config: Config) -> dict[str, str]:
    """Hashes of the files that a configuration's reward functions are in."""
    return {
        f"reward file {function.file}": hashlib.sha256(Path(function.file).read_bytes()).hexdigest()
        for function in (*config.rewards.functions, *config.rewards.gold)
        if isinstance(function, FunctionReward)
    }


def digest_of(function: NamedFunction) -> str:
    """Hash of a reward function given in Python: weight, and source or, where there is none, code; of an object, those of its class; of a
    `functools.partial` also what it binds.

    What it has closed over is not in it.
    """
    return hashlib.sha256(f"{function.weight!r}\n{_text_of(function.source)}".encode()).hexdigest()


def _text_of(called: Any) -> str:
    if isinstance(called, partial):
        bound = (called.args, sorted(called.keywords.items()))
        return f"{_text_of(called.func)}\nbound: {bound!r}"
    code = getattr(called, "__code__", None)
    try:
        return inspect.getsource(called if code is not None or inspect.isclass(called) else type(called))
    except (OSError, TypeError):  # typed at a prompt, or built in
        if code is None:
            return type(called).__qualname__
        return repr((type(called).__qualname__, _told(code)))


def _told(code: CodeType) -> tuple[Any, ...]:
    """What a function does; a code object's own text has an address in it."""
    constants = [_told(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (old, new), for those that differ."""
    old, new = _flat(before), _flat(now)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def check_changes(
    folder: Path, changed: Mapping[str, tuple[Any, Any]], inputs: Sequence[str], *, allow_changes: bool
) -> list[str]:
    """One line per change, to be shown.

    Args:
        folder: for the message.
        changed: settings with their old and new values.
        inputs: names of inputs whose content differs.
        allow_changes: go on with anything.

    Raises:
        CheckpointError: a change that makes it another run, and it is not allowed.
    """
    harmful = [key for key in changed if not _harmless(key)]
    lines = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
    lines += [f"{name}: its content has changed" for name in inputs]
    if (harmful or inputs) and not allow_changes:
        first = (
            f"{harmful[0]}={changed[harmful[0]][0]!r}, now it is {changed[harmful[0]][1]!r}"
            if harmful
            else f"another {inputs[0]}"
        )
        count = len(harmful) + len(inputs)
        more = f" (and {count - 1} more changes)" if count > 1 else ""
        raise CheckpointError(
            f"{folder} was started with {first}{more}; resume with the run's own config.yaml and files, choose another "
            "--out, or accept another run with --allow-changes"
        )
    return lines


def not_exact_because(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of two environments after which a resumed run cannot be the uninterrupted one to the bit."""
    old, new = (_flat({key: e.get(key) for key in EXACT_ONLY_WITH}) for e in (before, now))
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in sorted(new) if old.get(key) != new[key]]


def _harmless(key: str) -> bool:
    match key.split("."):
        case ["rewards", "functions" | "gold", _, setting, *_]:  # of `headers_env` there is one key a header
            return setting in HOW_A_FUNCTION_IS_CALLED
    return key in MAY_CHANGE


def _weights_hash(policy: Policy) -> str:
    """Of shapes, what is frozen, and up to 4096 spread-out numbers a tensor: enough to tell two models apart, quick on a large one."""
    digest = hashlib.sha256()
    for name, weight in sorted(policy.named_parameters()):
        values = weight.detach().flatten()
        values = values[:: max(len(values) // 4096, 1)]
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(np.ascontiguousarray(values.float().cpu().numpy()).tobytes())
        if not (
            policy.adapter or weight.requires_grad
        ):  # with an adapter the configuration says what is frozen
            digest.update(b"frozen")
    return digest.hexdigest()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        items = {str(i): item for i, item in enumerate(value)} if _is_sections(value) else value
        flat |= _flat(items, f"{prefix}{key}.") if isinstance(items, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_sections(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
