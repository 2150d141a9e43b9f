"""The update: no split of a minibatch changes the step, bad gradients make none, schedules."""

import copy
import json

import pytest
import torch

from tests.batches import make_batch
from vrpo.algorithms import Ppo
from vrpo.config.learning import PpoConfig
from vrpo.config.run import TrainConfig
from vrpo.errors import NumericsError
from vrpo.train.microbatches import Splitter
from vrpo.train.optim import adamw, schedule
from vrpo.train.update import Paused, UpdateStats, update

ONE = Splitter(1, None, 1000)
SETTINGS = {
    "epochs": 1,
    "minibatch": 4,
    "split": Splitter(2, None, 1000),
    "max_grad_norm": 1.0,
    "seed": 0,
    "labels": ("policy", 1),
}


def policy_loss(policy, rule):
    def loss(micro, whole, epoch):
        logp, entropy = policy.logprobs_and_entropy(
            micro.input_ids, micro.attention_mask, micro.mask, temperature=1.0
        )
        return rule.loss(logp, entropy, micro, num_tokens=whole.num_tokens)

    return loss


def on_policy(policy, batch):
    with torch.no_grad():
        logp, _ = policy.logprobs_and_entropy(
            batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
        )
    advantages = torch.where(batch.mask, batch.scores[:, None] - 0.5, 0.0)
    return batch.with_(old_logp=logp, advantages=advantages)


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_the_step_does_not_depend_on_the_microbatch(make_policy, microbatch):
    start = make_policy("llama")
    batch = on_policy(start, make_batch())
    weights = []
    for size in (4, microbatch):
        policy = copy.deepcopy(start)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        stats = update(
            optimizer,
            batch,
            policy_loss(policy, Ppo(PpoConfig())),
            **SETTINGS | {"split": Splitter(size, None, 1000)},
        )
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    moved = (weights[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max()
    assert float(moved) > 1e-4
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)
    assert stats.tokens == batch.num_tokens
    assert stats.first["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_every_token_counts_once_per_pass_and_minibatches_step(make_policy):
    policy = make_policy("llama")
    batch = on_policy(policy, make_batch())
    optimizer = adamw(policy, learning_rate=1e-3, weight_decay=0.0)
    stats = update(
        optimizer, batch, policy_loss(policy, Ppo(PpoConfig())), **SETTINGS | {"epochs": 3, "minibatch": 2}
    )
    assert len(stats.grad_norms) == 6
    assert stats.tokens == 3 * batch.num_tokens


def test_order_is_drawn_anew_each_pass_and_named(make_policy):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    seen: dict[int, list[str]] = {}

    def loss(micro, whole, epoch):
        seen.setdefault(epoch, []).extend(micro.sample_ids)
        return weight * 0.0, {}

    batch = make_batch((1,) * 8, scores=(0.0,) * 8, groups=range(8))
    update(optimizer, batch, loss, **SETTINGS | {"epochs": 2, "minibatch": 1, "split": ONE})
    first = dict(seen)
    assert sorted(first[0]) == sorted(first[1]) == sorted(batch.sample_ids)
    assert first[0] != first[1]
    seen.clear()
    update(optimizer, batch, loss, **SETTINGS | {"epochs": 2, "minibatch": 1, "split": ONE})
    assert seen == first


def test_a_minibatch_without_tokens_makes_no_step(make_policy):
    policy = make_policy("llama")
    batch = on_policy(policy, make_batch())
    mask = batch.mask.clone()
    mask[:] = False
    stats = update(
        adamw(policy, learning_rate=1.0, weight_decay=0.0),
        batch.with_(mask=mask),
        policy_loss(policy, Ppo(PpoConfig())),
        **SETTINGS,
    )
    assert (stats.tokens, stats.grad_norms, stats.skipped, stats.first) == (0, [], 0, {})
    mask[3] = batch.mask[3]  # one response counts: whichever minibatch has it is the first
    stats = update(
        adamw(policy, learning_rate=1.0, weight_decay=0.0),
        batch.with_(mask=mask),
        policy_loss(policy, Ppo(PpoConfig())),
        **SETTINGS | {"minibatch": 1},
    )
    assert stats.first["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_finally_stops(make_policy):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    bad = {"s1/p0/k0"}

    def loss(micro, whole, epoch):
        return weight * (float("nan") if bad.intersection(micro.sample_ids) else 0.1), {"loss": 1.0}

    batch = make_batch()
    stats = update(optimizer, batch, loss, **SETTINGS | {"minibatch": 1, "split": ONE})
    assert (stats.skipped, len(stats.grad_norms), weight.item()) == (1, 3, pytest.approx(0.7))
    assert stats.tokens == batch.num_tokens - 3
    bad.update(batch.sample_ids)
    # seven in a row are survived, in this step or over several; the eighth is not
    earlier = UpdateStats(skipped_in_a_row=3)
    stats = update(optimizer, batch, loss, **SETTINGS | {"minibatch": 1, "split": ONE}, stats=earlier)
    assert (stats.skipped, stats.skipped_in_a_row, stats.tokens) == (4, 7, 0)
    with pytest.raises(NumericsError, match="8 losses or gradients of the policy in a row") as caught:
        update(optimizer, batch, loss, **SETTINGS | {"minibatch": 1, "split": ONE, "epochs": 5})
    assert len(caught.value.batch) == 1
    assert weight.item() == pytest.approx(0.7)


def test_a_loss_that_is_not_finite_makes_no_step_even_with_a_finite_gradient():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    stats = update(
        optimizer,
        make_batch(),
        lambda *_: (weight + float("inf"), {}),
        **SETTINGS | {"split": Splitter(4, None, 1000)},
    )
    assert (stats.skipped, weight.item()) == (1, 1.0)


@pytest.mark.parametrize("asked", range(8))
def test_an_update_paused_anywhere_goes_on_to_the_same_weights(make_policy, asked):
    start = make_policy("llama")
    batch = on_policy(start, make_batch())
    settings = SETTINGS | {"minibatch": 2, "split": ONE, "epochs": 2}
    whole, halted = copy.deepcopy(start), copy.deepcopy(start)
    rule = Ppo(PpoConfig())
    rates = {"learning_rate": 1e-2, "weight_decay": 0.0}
    expected = update(adamw(whole, **rates), batch, policy_loss(whole, rule), **settings)
    optimizer = adamw(halted, **rates)
    loss = policy_loss(halted, rule)
    calls = iter(range(100))
    stats = UpdateStats()
    with pytest.raises(Paused):
        update(optimizer, batch, loss, **settings, stats=stats, pause=lambda: next(calls) == asked)
    assert stats.minibatches == asked // 2  # two micro-batches each; the half-done one is done again
    stats = UpdateStats.from_json(json.loads(json.dumps(stats.to_json())))
    stats = update(optimizer, batch, loss, **settings, stats=stats)
    assert stats.to_json() == expected.to_json()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halted.parameters(), strict=True))


def test_matrices_decay_and_vectors_do_not(make_policy):
    policy = make_policy("llama")
    groups = adamw(policy, learning_rate=1.0, weight_decay=0.1).param_groups
    assert [
        (g["weight_decay"], min(p.dim() for p in g["params"]), max(p.dim() for p in g["params"]))
        for g in groups
    ] == [
        (0.1, 2, 2),
        (0.0, 1, 1),
    ]


def test_schedules():
    def rates(**settings):
        config = TrainConfig(steps=8, **settings)
        return [schedule(config, step=s, start=2) for s in range(2, 8)]

    assert rates() == [1.0] * 6
    assert rates(lr_schedule="linear", lr_warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = rates(lr_schedule="cosine")
    assert cosine[0] == 1.0 and cosine[3] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)
