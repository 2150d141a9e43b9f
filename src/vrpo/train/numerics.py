"""Which tokens to look at when the numbers went bad."""

import math
from typing import Any

import torch
from torch import Tensor

from vrpo.types import Batch

PER_TOKEN = ("old_logp", "ref_logp", "values", "rewards", "advantages", "targets")
"""Columns of a batch that a loss or a metric computes with."""


def not_finite(batch: Batch) -> str | None:
    """The first column that holds NaN or infinity where a token counts, with the sample it stands in; None: all is well."""
    for name in PER_TOKEN:
        column = getattr(batch, name)
        if column is None:
            continue
        bad = ~column.isfinite() & batch.mask
        if bool(bad.any()):
            row, place = (int(i) for i in bad.nonzero()[0])
            return f"{name}={float(column[row, place])} of sample {batch.sample_ids[row]} is not finite"
    if batch.bootstrap is not None:
        bad = ~batch.bootstrap.isfinite() & batch.mask.any(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            return f"bootstrap={float(batch.bootstrap[row])} of sample {batch.sample_ids[row]} is not finite"
    return None


def worst_tokens(batch: Batch, *, count: int = 20) -> list[dict[str, Any]]:
    """The tokens that count with the largest |advantage| + |value - target|, not finite ones first.

    Args:
        batch: a minibatch.
        count: at most so many.

    Returns:
        One mapping a token: sample, column of the batch, token, and every number; one that is absent is None, one that is
        not finite is None too and named under "not_finite".
    """
    columns: dict[str, Tensor] = {
        name: column for name in PER_TOKEN if (column := getattr(batch, name)) is not None
    }
    badness = torch.zeros_like(batch.old_logp)
    if "advantages" in columns:
        badness = badness + columns["advantages"].abs()
    if "values" in columns and "targets" in columns:
        badness = badness + (columns["values"] - columns["targets"]).abs()
    for column in columns.values():
        badness = torch.where(column.isfinite(), badness, math.inf)
    badness = badness.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~batch.mask, -1.0).flatten()
    order = badness.argsort(descending=True, stable=True)[: min(count, batch.num_tokens)]
    return [_row(batch, columns, *divmod(int(i), batch.mask.shape[1])) for i in order]


def _row(batch: Batch, columns: dict[str, Tensor], row: int, place: int) -> dict[str, Any]:
    numbers = {name: float(column[row, place]) for name, column in columns.items()}
    return {
        "sample_id": batch.sample_ids[row],
        "column": place,
        "token_id": int(batch.input_ids[row, place + 1]),
        **dict.fromkeys(PER_TOKEN),
        **{name: x if math.isfinite(x) else None for name, x in numbers.items()},
        "not_finite": [name for name, x in numbers.items() if not math.isfinite(x)],
    }
