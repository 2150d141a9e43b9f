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
    advantages, values = batch.advantages.clone(), batch.values.clone()
    values[places[0]] = batch.targets[places[0]] + 30.0  # badness 30 and the advantage
    advantages[places[1]] = -20.0  # 20 and the value's error
    values[places[2]] = float("nan")  # first
    found = worst_tokens(batch.with_(advantages=advantages, values=values), count=3)
    assert [(batch.sample_ids.index(f["sample_id"]), f["column"]) for f in found] == [
        places[2],
        places[0],
        places[1],
    ]
    assert found[0]["values"] is None and found[0]["not_finite"] == ["values"]
    assert found[1]["values"] == float(values[places[0]]) and found[1]["not_finite"] == []
    assert found[2]["advantages"] == -20.0
    assert len(worst_tokens(batch)) == len(places)


def test_every_row_has_every_name_and_what_is_unknown_is_none():
    row = worst_tokens(make_batch((1,), scores=(1.0,), groups=(0,)))[0]
    assert row["rewards"] == 1.0 and row["not_finite"] == []
    absent = {"ref_logp", "values", "advantages", "targets"}
    assert {name for name, x in row.items() if x is None} == absent
    assert row.keys() == absent | {"sample_id", "column", "token_id", "old_logp", "rewards", "not_finite"}
