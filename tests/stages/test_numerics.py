"""Bad numbers: found by name, and the worst tokens first."""

import torch

from tests.batches import make_batch
from vrpo.train.numerics import not_finite, worst_tokens


def annotated():
    batch = make_batch((2, 2), scores=(1.0, 0.0), groups=(0, 0))
    zeros = torch.zeros_like(batch.old_logp)
    return batch.with_(values=zeros, advantages=zeros.clone(), targets=zeros.clone())


def test_the_first_bad_column_is_named_and_what_does_not_count_is_not_looked_at():
    batch = annotated()
    assert not_finite(batch) is None
    row, place = (int(i) for i in batch.mask.nonzero()[-1])
    bad = batch.advantages.clone()
    bad[row, place] = float("inf")
    problem = not_finite(batch.with_(advantages=bad))
    assert problem == f"advantages=inf of sample {batch.sample_ids[row]} is not finite"
    last = batch.with_(bootstrap=torch.tensor([0.0, float("nan")]))
    assert not_finite(last) == f"bootstrap=nan of sample {batch.sample_ids[1]} is not finite"
    left_out = last.with_(mask=batch.mask & torch.tensor([[True], [False]]))
    assert not_finite(left_out) is None
    hidden = torch.where(batch.mask, batch.advantages, float("nan"))
    assert not_finite(batch.with_(advantages=hidden)) is None


def test_worst_tokens_are_ordered_and_named():
    batch = annotated()
    places = [tuple(int(i) for i in place) for place in batch.mask.nonzero()]
    logp, advantages, values = batch.old_logp.clone(), batch.advantages.clone(), batch.values.clone()
    logp[places[0]] += 3.0  # badness 3
    advantages[places[1]] = -2.0  # 2
    values[places[2]] = float("nan")  # first
    found = worst_tokens(batch.with_(advantages=advantages, values=values), logp=logp, count=3)
    assert [(batch.sample_ids.index(f["sample_id"]), f["column"]) for f in found] == [
        places[2],
        places[0],
        places[1],
    ]
    assert found[0]["values"] is None and found[0]["not_finite"] == ["values"]
    assert found[1]["log_ratio"] == 3.0 and found[1]["not_finite"] == []
    assert found[2]["advantages"] == -2.0
    assert len(worst_tokens(batch, logp=None)) == len(places)


def test_every_row_has_every_name_and_what_is_unknown_is_none():
    row = worst_tokens(make_batch((1,), scores=(1.0,), groups=(0,)), logp=None)[0]
    assert row["rewards"] == 1.0 and row["not_finite"] == []
    absent = {"ref_logp", "values", "advantages", "targets", "logp", "log_ratio"}
    assert {name for name, x in row.items() if x is None} == absent
    assert row.keys() == absent | {"sample_id", "column", "token_id", "old_logp", "rewards", "not_finite"}
