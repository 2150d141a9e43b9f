"""How a batch is split: every row once, within the limits, with little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import make_batch
from vrpo.models.backbone import buckets
from vrpo.train.microbatches import SHARE_FROM, Sizes, Splitter


@st.composite
def sizes(draw) -> Sizes:
    groups = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    prompts = np.repeat([draw(st.integers(1, 20)) for _ in groups], groups)
    return Sizes(
        prompts,
        np.array([draw(st.integers(1, 30)) for _ in prompts]),
        np.repeat(np.arange(len(groups)), groups),
    )


@settings(deadline=None, max_examples=200)
@given(sizes=sizes(), rows=st.integers(1, 9), tokens=st.one_of(st.none(), st.integers(1, 200)))
def test_every_row_once_within_the_limits(sizes, rows, tokens):
    pieces = Splitter(rows, tokens, 1000).plan(sizes)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(sizes.groups)))
    for piece in pieces:
        assert len(piece) <= rows
        assert tokens is None or len(piece) == 1 or sizes.read(piece) <= tokens


@settings(deadline=None, max_examples=200)
@given(sizes=sizes(), rows=st.integers(1, 9), tokens=st.one_of(st.none(), st.integers(1, 200)))
def test_prompts_stay_whole_where_a_piece_can_hold_them(sizes, rows, tokens):
    splitter = Splitter(rows, tokens, 1000, whole_prompts=True)
    pieces = splitter.plan(sizes, blocks=sizes.groups)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(sizes.groups)))
    for piece in pieces:
        assert len(piece) <= rows
        one_prompt = len(np.unique(sizes.groups[piece])) == 1
        assert tokens is None or one_prompt or sizes.read(piece) <= tokens
    for group in np.unique(sizes.groups):
        members = np.flatnonzero(sizes.groups == group).tolist()
        holders = [piece for piece in pieces if set(piece) & set(members)]
        if len(members) <= rows:
            assert len(holders) == 1


def test_a_splitter_cuts_between_prompts_or_anywhere():
    batch = make_batch(lengths=(2,) * 6, scores=(0.0,) * 6, groups=(0, 0, 0, 1, 1, 1))
    by_row = [rows.tolist() for rows, _ in Splitter(4, None, 0)(batch)]
    by_prompt = [rows.tolist() for rows, _ in Splitter(4, None, 0, whole_prompts=True)(batch)]
    assert by_row == [[0, 1, 2, 3], [4, 5]] and by_prompt == [[0, 1, 2], [3, 4, 5]]


def test_tokens_read_by_hand():
    sizes = Sizes(np.array([4, 4, 2]), np.array([2, 5, 3]), np.array([0, 0, 1]))
    assert sizes.read([0, 1]) == 4 + 2 + 5
    assert sizes.read([0, 1, 2]) == 4 + 2 + 5 + 2 + 3
    assert sizes.saved == (4 + 2 + 4 + 5 + 2 + 3) / 16
    assert Splitter(9, 11, 1000).plan(sizes) == [[2, 0], [1]]
    assert Splitter(9, 10, 1000).plan(sizes) == [[2], [0], [1]]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_padding_is_below_five_percent_of_a_gsm8k_like_minibatch(make_policy, seed, share):
    """Questions of 40 to 200 tokens, answers log-normal around 120 with a factor of 1.5, a prompt sampled 8 times."""
    rng = np.random.default_rng(seed)
    questions = rng.integers(40, 200, 16)
    answers = np.exp(rng.normal(np.log(120), 0.4, 128)).astype(int).clip(10, 400)
    prompts, groups = np.repeat(questions, 8), np.repeat(np.arange(16), 8)
    lengths = torch.from_numpy(prompts + answers)
    columns = torch.arange(int(lengths.max()))
    whole = make_batch([1] * 128, prompt=1, scores=[0.0] * 128, groups=groups.tolist())
    batch = whole.with_(
        input_ids=torch.where(columns < lengths[:, None], columns % 90 + 4, 0),
        attention_mask=columns < lengths[:, None],
        mask=((columns >= torch.from_numpy(prompts)[:, None] - 1) & (columns < lengths[:, None] - 1))[:, :-1],
        prompt_lengths=torch.from_numpy(prompts),
        old_logp=torch.zeros(128, len(columns) - 1),
        rewards=torch.zeros(128, len(columns) - 1),
    )
    policy = make_policy("llama")
    read = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: read.append(ids[0].numel())
    )
    needed = 0
    splitter = Splitter(128, 4096, 1000 * share)
    for piece in splitter.plan(Sizes.of(batch, share=share)):
        needed += Sizes.of(batch, share=share).read(piece)
    for _, micro in splitter(batch):
        with torch.no_grad():
            policy.states_at(
                micro.input_ids,
                micro.attention_mask,
                torch.nn.functional.pad(micro.mask, (0, 1)),
                micro.shared_prompts if share else None,
            )
    assert needed <= sum(read) <= 1.05 * needed
    assert sum(read) < (0.45 if share else 0.75) * batch.input_ids.numel()


def test_buckets_hold_every_row_once_and_little_padding():
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 500, 300))
    found = buckets(lengths)
    assert sorted(torch.cat(found).tolist()) == list(range(300))
    for rows in found:
        read, real = int(lengths[rows].max()) * len(rows), int(lengths[rows].sum())
        assert read <= 1.05 * real or read <= 256 + int(lengths[rows].max())
    assert len(buckets(torch.full((1000,), 64))) == 1


def test_pieces_are_trimmed_and_named():
    batch = make_batch((3, 1, 2, 1), groups=(0, 0, 1, 1))
    pieces = list(Splitter(2, None, 1000)(batch))
    assert sorted(torch.cat([rows for rows, _ in pieces]).tolist()) == [0, 1, 2, 3]
    for rows, piece in pieces:
        assert piece.sample_ids == tuple(batch.sample_ids[i] for i in rows.tolist())
        assert piece.input_ids.shape[1] == int(batch.attention_mask[rows].sum(dim=1).max())


@pytest.mark.parametrize("limit", [0, 5, 1000], ids=["never shared", "longer than the window", "shared"])
def test_the_token_bound_holds_for_what_is_really_read(limit):
    """Prompts count with every row wherever the models read whole rows."""
    batch = make_batch((3, 2, 3, 1), prompt=4, groups=(0, 0, 0, 0))
    pieces = [piece for _, piece in Splitter(9, 14, limit)(batch)]
    shared = batch.input_ids.shape[1] <= limit
    for piece in pieces:
        responses = int(piece.attention_mask.sum()) - 4 * len(piece)
        assert responses + 4 * (1 if shared else len(piece)) <= 14
    assert len(pieces) == (1 if shared else 2)


@pytest.mark.parametrize(("prompt", "shared"), [(1, False), (20, True)])
def test_a_gpu_shares_prompts_only_where_that_halves_the_tokens(monkeypatch, prompt, shared):
    batch = make_batch((3, 2, 3, 1), prompt=prompt, groups=(0, 0, 0, 0))
    assert all(piece.share_prompts for _, piece in Splitter(9, 60, 1000)(batch))  # a CPU always does
    monkeypatch.setitem(SHARE_FROM, "cpu", SHARE_FROM["cuda"])
    assert (Sizes.of(batch, share=True).saved >= 2) is shared
    pieces = [piece for _, piece in Splitter(9, 60, 1000)(batch)]
    assert len(pieces) == 1 and pieces[0].share_prompts is shared
    assert (pieces[0].shared_prompts is not None) is shared
    # the token bound counts what is read: whole rows of 21 to 23 tokens do not fit twice
    monkeypatch.setitem(SHARE_FROM, "cpu", 100.0)
    assert len(list(Splitter(9, 40, 1000)(batch))) == (len(batch) if shared else 1)
