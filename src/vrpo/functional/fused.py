"""Elementwise work as few kernels on a GPU, and as it is written elsewhere."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """`function`, compiled by `torch.compile` where its first argument is on a GPU; elsewhere the function itself.

    What is memory-bound as separate kernels, each reading and writing its tensors, then reads and writes once. Sizes are
    dynamic: a new batch does not compile again. It needs Triton, which comes with torch on Linux; without it, or with
    TORCHDYNAMO_DISABLE=1 in the environment, the function runs as it is written.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True) if importlib.util.find_spec("triton") else function

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        return compiled()(first, *rest) if first.is_cuda else function(first, *rest)

    return cast(Function, call)
