"""Ways to break a function: every golden check must notice each of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x * 1.01,
    "shifted": lambda x: x + 1e-3,
    "negated": lambda x: -x,
    "reversed": lambda x: x.flip(-1),
}


def assert_catches(check: Callable[[Any], None], function: Callable[..., Any], names: str) -> None:
    """`check` passes on `function` and fails on each of its broken versions (names: separated by spaces)."""
    check(function)
    for name in names.split():

        def broken(*args: Any, _mutate: Callable[[Tensor], Tensor] = MUTANTS[name], **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                return _mutate(result)
            parts = [_mutate(x) for x in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

        with pytest.raises(AssertionError):
            check(broken)


def close(actual: Tensor, expected: Any, *, atol: float = 1e-6) -> bool:
    """Same shape and equal to `atol`; NaN equals NaN."""
    expected = torch.as_tensor(expected, dtype=torch.float32)
    return actual.shape == expected.shape and torch.allclose(
        actual.float(), expected, rtol=0, atol=atol, equal_nan=True
    )
