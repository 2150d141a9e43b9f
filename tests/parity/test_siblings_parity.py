"""What siblings add to a value model against the slow, obviously right version."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import siblings_numpy as slow
from vrpo import functional as fast

SEEDS = st.integers(0, 1_000_000)
FEW = settings(deadline=None, max_examples=40)


def same(actual: torch.Tensor, expected) -> bool:
    """Equal up to fp32 rounding."""
    return np.allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


@FEW
@given(seed=SEEDS, batch=st.integers(1, 12))
def test_sibling_correction(seed, batch):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(batch).astype(np.float32)
    groups, valid = rng.integers(0, 3, batch), rng.random(batch) < 0.8
    ours = fast.sibling_correction(
        torch.tensor(np.where(valid, x, np.nan)), torch.tensor(groups), valid=torch.tensor(valid)
    )
    assert same(ours, slow.sibling_correction(x.astype(np.float64), groups, valid=valid))


@FEW
@given(seed=SEEDS, batch=st.integers(1, 8), length=st.integers(1, 5), turns=st.booleans())
def test_covered_values(seed, batch, length, turns):
    """Two tokens in the vocabulary, so that responses coincide; with `turns`, some tokens are the environment's."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 2, batch)
    ids = rng.integers(0, 2, (batch, length + 1))
    ids[:, 0] = groups
    ends = rng.integers(0, length + 1, batch)  # 0: its reward is missing
    mask = np.arange(length) < ends[:, None]
    if turns:
        mask &= rng.random(length) < 0.7
    values, returns = rng.standard_normal((2, batch, length)).astype(np.float32)
    # a language model's: what comes next depends on what was read, so that equal beginnings have equal chances
    chance = np.random.default_rng(1).uniform(0.1, 0.9, 2 ** (length + 1))
    logp = np.zeros((batch, length))
    for i in range(batch):
        for t in range(length):
            heads = chance[int("".join(map(str, ids[i, : t + 1])), 2) + 2**t - 1]
            logp[i, t] = np.log(heads if ids[i, t + 1] else 1.0 - heads)
    ours = fast.covered_values(
        torch.tensor(np.where(mask, values, np.nan)),
        torch.tensor(np.where(mask, returns, np.nan)),
        torch.tensor(np.where(mask, logp, np.nan), dtype=torch.float32),
        torch.tensor(ids),
        torch.tensor(mask),
        group_ids=torch.tensor(groups),
    )
    exact = slow.covered_values(values, returns, logp, ids, mask, group_ids=groups)
    assert same(ours[0], exact[0])
    assert same(ours[1], exact[1])
