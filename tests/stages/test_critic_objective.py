"""L_V: its terms, its gradient's reach, its schedules, and that no split of a step changes it."""

import pytest
import torch

from tests.batches import make_batch
from vrpo.algorithms.critic_objective import (
    CriticObjective,
    CriticState,
    Denominators,
    value_feature_uncertainty,
)
from vrpo.config.learning import BottleneckHead, CriticConfig, ScalarHead, SemanticConfig
from vrpo.functional import RewardUnits
from vrpo.models import Critic
from vrpo.train.microbatches import Splitter
from vrpo.train.values import ReferenceStates, evaluate_batch

LITERAL = SemanticConfig(mode="literal", entropy_coef=0.1, nll_coef=0.2)


def build(make_policy, *, head=None, semantic=None, **settings):
    policy = make_policy("llama_tied")
    config = CriticConfig(
        head=head or BottleneckHead(latent_dim=4), semantic=semantic or SemanticConfig(), **settings
    )
    return (
        policy,
        Critic.from_policy(policy, config, seed=0),
        CriticObjective(config, total_updates=10, seed=0),
    )


def annotated(**changes):
    batch = make_batch(**changes)
    return batch.with_(targets=torch.where(batch.mask, batch.scores[:, None], 0.0))


def selected(batch):
    first = torch.zeros_like(batch.mask)
    first[0] = batch.mask[0]
    second = torch.zeros_like(batch.mask)
    second[1] = batch.mask[1]
    return batch.with_(selected_entropy=first, selected_nll=second)


def loss_of(objective, critic, batch, **settings):
    given = {"denominators": Denominators.of(batch), "beta": 0.01, "noise_labels": (1, 0)} | settings
    return objective.loss(critic, batch, **given)


def gradients(critic):
    return {n: None if p.grad is None else p.grad.clone() for n, p in critic.named_parameters()}


def test_terms_add_up(make_policy):
    _, critic, objective = build(make_policy, semantic=LITERAL)
    batch = selected(annotated())
    loss, sums = loss_of(objective, critic, batch, beta=0.5)
    tokens = batch.num_tokens
    assert float(loss.detach()) == pytest.approx(
        (sums["loss"] + 0.5 * sums["kl"] + sums["semantic"]) / tokens, rel=1e-5
    )
    by_hand = (
        0.1 * sums["selected_entropy"] / 3 + 0.2 * sums["selected_nll"] / 2
    )  # |S_H| = 3, |S_P| = 2 tokens
    assert sums["semantic"] / tokens == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("semantic", [SemanticConfig(), LITERAL], ids=["off", "literal"])
@pytest.mark.parametrize("pieces", [(1, 3), (2, 1, 1)])
def test_gradient_does_not_depend_on_the_split(make_policy, semantic, pieces):
    _, critic, objective = build(make_policy, semantic=semantic)
    whole = selected(annotated())
    loss_of(objective, critic, whole)[0].backward()
    expected = gradients(critic)
    critic.zero_grad()
    for rows in torch.arange(4).split(list(pieces)):
        loss_of(objective, critic, whole.select(rows), denominators=Denominators.of(whole))[0].backward()
    for name, gradient in gradients(critic).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_semantic_gradient_is_zero_outside_the_subsets(make_policy):
    _, critic, objective = build(make_policy, semantic=LITERAL)
    batch = selected(annotated())
    at = torch.nn.functional.pad(batch.mask, (0, 1))
    states = critic.states_at(batch.input_ids, batch.attention_mask, at).detach().requires_grad_()
    loss, _ = objective._semantic(critic, states, batch, Denominators.of(batch), None)
    (reached,) = torch.autograd.grad(loss, states)
    inside = (batch.selected_entropy | batch.selected_nll)[batch.mask]
    assert bool((reached[~inside] == 0).all())
    assert bool((reached[inside].abs().sum(dim=-1) > 0).all())


def test_kl_ref_is_zero_at_the_initial_model_and_positive_after_a_step(make_policy):
    policy, critic, objective = build(make_policy, semantic=SemanticConfig(mode="kl_ref"))
    features = ReferenceStates(policy.reference())
    batch = selected(annotated())
    _, before = loss_of(objective, critic, batch, reference_states=features)
    with torch.no_grad():
        for weight in critic.backbone.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    _, after = loss_of(objective, critic, batch, reference_states=features)
    assert before["semantic"] == pytest.approx(0.0, abs=1e-5)
    assert after["semantic"] > 1e-4


def test_frozen_head_never_moves(make_policy):
    policy, critic, objective = build(make_policy, semantic=LITERAL)
    before = critic.frozen_head.clone()
    optimizer = torch.optim.AdamW([*critic.parameters(), *policy.parameters()], lr=0.1)
    loss_of(objective, critic, selected(annotated()))[0].backward()
    optimizer.step()
    assert torch.equal(critic.frozen_head, before)
    assert critic.frozen_head.grad is None
    # the policy's head is tied to its embedding: the frozen one must be a copy, not a view of either
    assert critic.frozen_head.data_ptr() != policy.head.weight.data_ptr()


@pytest.mark.parametrize(
    "head", [ScalarHead(), BottleneckHead(latent_dim=4, sample=False)], ids=["scalar", "mean z"]
)
def test_zero_coefficients_are_the_plain_value_loss(make_policy, head):
    zero = SemanticConfig(mode="literal", entropy_coef=0.0, nll_coef=0.0)
    _, critic, objective = build(make_policy, head=head, semantic=zero)
    batch = selected(annotated())
    loss, _ = loss_of(objective, critic, batch, beta=0.0)
    loss.backward()
    with_zeros = gradients(critic)
    critic.zero_grad()
    values = critic.values_of(critic.hidden(batch.input_ids, batch.attention_mask))[:, :-1]
    plain = 0.5 * ((values - batch.targets)[batch.mask] ** 2).mean()
    plain.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    for name, gradient in gradients(critic).items():
        if gradient is not None:
            torch.testing.assert_close(with_zeros[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_in_its_units_the_critic_learns_the_same_whatever_the_rewards(make_policy):
    """Rewards a + b r, with values in these units, give the gradient that r gives; the reported loss is in reward units."""
    _, critic, objective = build(make_policy, semantic=LITERAL)
    batch = selected(annotated())
    _, plain = loss_of(objective, critic, batch, beta=0.01)
    loss_of(objective, critic, batch, beta=0.01)[0].backward()
    expected = gradients(critic)
    critic.zero_grad()
    critic.units = RewardUnits(-30.0, 20.0)
    scaled = batch.with_(targets=torch.where(batch.mask, -30.0 + 20.0 * batch.targets, 0.0))
    loss, sums = loss_of(
        objective, critic, scaled, beta=0.01 * 20.0**2
    )  # beta follows the variance of returns
    loss.backward()
    assert sums["loss"] == pytest.approx(20.0**2 * plain["loss"], rel=1e-4)
    for name, gradient in gradients(critic).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_the_value_clip_is_in_the_units_of_the_head(make_policy):
    _, critic, objective = build(make_policy, head=ScalarHead(), cliprange_value=0.01)
    batch = annotated().with_(values=torch.zeros(annotated().mask.shape))
    _, plain = loss_of(objective, critic, batch)
    _, free = loss_of(build(make_policy, head=ScalarHead())[2], critic, batch)
    assert plain["loss"] != free["loss"]  # it clips
    critic.units = RewardUnits(-30.0, 20.0)
    in_units = {name: torch.where(batch.mask, -30.0 + 20.0 * getattr(batch, name), 0.0) for name in ("targets", "values")}  # fmt: skip
    _, scaled = loss_of(objective, critic, batch.with_(**in_units))
    assert scaled["loss"] == pytest.approx(20.0**2 * plain["loss"], rel=1e-4)


def test_latent_noise_belongs_to_the_sample_and_the_pass(make_policy):
    _, critic, objective = build(make_policy)
    batch = annotated()
    whole = objective._noise(critic, batch, (1, 0))
    last = objective._noise(critic, batch.select(torch.tensor([3])), (1, 0))
    assert torch.equal(whole[-3:], last)
    assert not torch.equal(whole, objective._noise(critic, batch, (1, 1)))


def test_beta_follows_variance_and_warm_up():
    objective = CriticObjective(
        CriticConfig(head=BottleneckHead(beta=0.015, beta_warmup=0.2)), total_updates=100, seed=0
    )
    assert objective.beta(CriticState()) == 0.0
    assert objective.beta(CriticState(return_variance=0.2, updates=10)) == pytest.approx(0.015 * 0.2 * 0.5)
    assert objective.beta(CriticState(return_variance=0.2, updates=20)) == pytest.approx(0.003)
    assert objective.beta(CriticState(return_variance=0.2, updates=90)) == pytest.approx(0.003)
    assert (
        CriticObjective(CriticConfig(), total_updates=1, seed=0).beta(CriticState(return_variance=1.0)) == 0.0
    )


def test_return_variance_is_a_running_mean():
    objective = CriticObjective(CriticConfig(head=BottleneckHead()), total_updates=1, seed=0)
    batch = make_batch((1, 1), scores=(0.0, 1.0), groups=(0, 1))
    batch = batch.with_(targets=batch.rewards, values=0.4 * batch.rewards)
    state = objective.observe_returns(batch, CriticState())
    first = state.return_variance
    assert first == pytest.approx(0.25, rel=1e-4) or first == pytest.approx(0.5, rel=1e-4)
    state = objective.observe_returns(batch.with_(targets=torch.zeros_like(batch.rewards)), state)
    assert state.return_variance == pytest.approx(0.9 * first)


def test_explained_variance_is_a_running_mean_that_equal_returns_do_not_move():
    objective = CriticObjective(CriticConfig(), total_updates=1, seed=0)
    batch = make_batch((1, 1), scores=(0.0, 1.0), groups=(0, 1))
    batch = batch.with_(targets=batch.rewards, values=0.5 * batch.rewards)
    state = objective.observe_returns(batch, CriticState())
    assert state.explained_var == pytest.approx(0.75)  # 1 - .5 ** 2
    state = objective.observe_returns(batch.with_(targets=torch.zeros_like(batch.rewards)), state)
    assert state.explained_var == pytest.approx(0.75)
    state = objective.observe_returns(batch.with_(values=torch.zeros_like(batch.rewards)), state)
    assert state.explained_var == pytest.approx(0.8 * 0.75)


def test_thresholds_select_the_share_and_remember():
    config = CriticConfig(semantic=SemanticConfig(mode="literal", fraction=0.25, threshold_decay=0.5))
    objective = CriticObjective(config, total_updates=1, seed=0)
    batch = make_batch((4, 4), scores=(1.0, 0.0), groups=(0, 1))
    entropy = torch.where(batch.mask, torch.arange(10.0).view(2, 5), float("nan"))
    chosen, state = objective.select(entropy, entropy, batch, CriticState())
    assert int(chosen.selected_entropy.sum()) == 2 and int(chosen.selected_nll.sum()) == 2
    # the next step is judged by the threshold of the steps before it, not by its own
    higher, moved = objective.select(entropy + 100.0, entropy, batch, state)
    assert int(higher.selected_entropy.sum()) == 8
    assert moved.entropy_threshold == pytest.approx(state.entropy_threshold + 50.0)
    assert not bool(chosen.selected_entropy[~batch.mask].any())


def test_reference_selector_sees_the_language_model(make_policy):
    semantic = SemanticConfig(mode="literal", selector="reference")
    policy, critic, objective = build(make_policy, semantic=semantic)
    assert objective.uses_reference and not objective.selects_by_value
    batch, state = evaluate_batch(
        make_batch(),
        reference=policy.reference(),
        critic=critic,
        objective=objective,
        state=CriticState(),
        temperature=1.0,
        split=Splitter(2, None, 1000),
    )
    _, entropy = policy.logprobs_and_entropy(
        batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
    )
    entropy = entropy.detach()
    chosen, other = entropy[batch.selected_entropy], entropy[batch.mask & ~batch.selected_entropy]
    assert state.entropy_threshold is not None and len(chosen) >= 1
    assert float(chosen.min()) > float(other.max())


def test_value_features_start_as_the_language_model(make_policy):
    policy, critic, _ = build(make_policy, semantic=LITERAL)
    batch = make_batch()
    hidden = critic.hidden(batch.input_ids, batch.attention_mask)
    entropy, nll = value_feature_uncertainty(critic, hidden[:, :-1][batch.mask], batch)
    logp, expected = policy.logprobs_and_entropy(
        batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
    )
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nll, -logp, atol=1e-5, rtol=1e-5)


def test_values_do_not_depend_on_the_microbatch(make_policy):
    _, critic, objective = build(make_policy, semantic=LITERAL)
    results = [
        evaluate_batch(
            make_batch(),
            reference=None,
            critic=critic,
            objective=objective,
            state=CriticState(),
            temperature=1.0,
            split=Splitter(m, None, 1000),
        )[0]
        for m in (1, 3, 4)
    ]
    for other in results[1:]:
        mask = results[0].mask
        torch.testing.assert_close(other.values[mask], results[0].values[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.bootstrap, results[0].bootstrap, atol=1e-5, rtol=1e-5)
        # siblings tie at their first token, and rounding may settle a tie at the threshold either way
        first = torch.arange(mask.shape[1]) == 1
        chosen, expected = other.selected_entropy & ~first, results[0].selected_entropy & ~first
        assert torch.equal(chosen, expected)
        assert bool(expected.any())


@pytest.mark.parametrize("regression", ["bce", "hl_gauss"])
def test_a_cross_entropy_does_not_depend_on_the_split_and_learns(make_policy, regression):
    _, critic, objective = build(make_policy, regression=regression, features="uncertainty")
    whole = annotated().with_(features=torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(1)))
    loss_of(objective, critic, whole)[0].backward()
    expected = gradients(critic)
    critic.zero_grad()
    for rows in torch.arange(4).split([1, 3]):
        part = whole.select(rows)
        loss_of(objective, critic, part, denominators=Denominators.of(whole))[0].backward()
    for name, gradient in gradients(critic).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, sums = loss_of(objective, critic, whole)
        losses.append(sums["loss"])
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_reference_feeds_the_uncertainty_branch(make_policy):
    policy, critic, objective = build(make_policy, features="uncertainty")
    assert objective.uses_reference
    batch, reference = make_batch(), policy.reference()
    both = [
        evaluate_batch(
            batch, reference=reference, critic=critic, objective=objective, state=CriticState(), temperature=1.0,
            split=Splitter(size, None, 0), features="uncertainty",
        )[0]
        for size in (4, 1)
    ]  # fmt: skip
    torch.testing.assert_close(both[0].features, both[1].features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[0].values, both[1].values, rtol=1e-4, atol=1e-5)
    last = batch.attention_mask.sum(dim=1) - 1
    surprise = torch.where(batch.mask, -both[0].ref_logp, 0.0).sum(dim=1)
    torch.testing.assert_close(
        torch.expm1(both[0].features[torch.arange(4), last, 1]), surprise, rtol=1e-4, atol=1e-4
    )


def test_the_denoisers_model_feeds_the_branch_in_the_references_place(make_policy):
    policy, critic, objective = build(make_policy, features="belief")
    assert not objective.uses_reference
    believer = policy.trainable_copy()
    with torch.no_grad():
        believer.backbone.norm.weight.mul_(1.5)  # no longer the policy
    batch = make_batch()

    def read(*, reference, features):
        return evaluate_batch(
            batch, reference=reference, critic=critic, objective=objective, state=CriticState(), temperature=1.0,
            split=Splitter(3, None, 0), believer=believer, features=features,
        )[0]  # fmt: skip

    found = read(reference=None, features="belief")
    logp, _ = believer.logprobs_and_entropy(
        batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
    )
    torch.testing.assert_close(found.belief_logp, logp, rtol=1e-4, atol=1e-4)
    last = batch.attention_mask.sum(dim=1) - 1
    surprise = torch.expm1(found.features[torch.arange(4), last, 1])
    torch.testing.assert_close(surprise, -logp.sum(dim=1), rtol=1e-4, atol=1e-4)
    other = read(reference=policy.reference(), features="uncertainty")
    assert torch.equal(other.belief_logp, found.belief_logp)
    assert not torch.allclose(other.features, found.features, atol=1e-2)


def test_a_borrowed_trunk_is_read_once_a_step(make_policy, monkeypatch):
    _, critic, objective = build(make_policy, trunk="policy")
    batch, _ = evaluate_batch(
        annotated(),
        reference=None,
        critic=critic,
        objective=objective,
        state=CriticState(),
        temperature=1.0,
        split=Splitter(3, None, 1000),
    )
    short = torch.tensor([1, 2])  # trimmed to the longest of them
    minibatch = batch.select(short)
    read, _ = loss_of(objective, critic, minibatch.with_(trunk_states=None))
    read.backward()
    expected = gradients(critic)
    critic.zero_grad()
    monkeypatch.setattr(Critic, "states_at", None)
    kept, _ = loss_of(objective, critic, minibatch)
    kept.backward()
    torch.testing.assert_close(kept, read, atol=1e-6, rtol=1e-5)
    for name, grad in gradients(critic).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("features", ["none", "uncertainty"])
def test_values_of_the_samplers_states_are_those_of_the_trunk(make_policy, monkeypatch, features):
    policy, critic, objective = build(make_policy, trunk="policy", features=features)
    batch = annotated()

    def read(batch):
        return evaluate_batch(
            batch, reference=policy.reference() if features == "uncertainty" else None, critic=critic, objective=objective,
            state=CriticState(), temperature=1.0, split=Splitter(3, None, 1000), features=features,
        )[0]  # fmt: skip

    expected = read(batch)
    at = torch.nn.functional.pad(batch.mask, (0, 1))
    states = torch.where(at[..., None], policy.hidden(batch.input_ids, batch.attention_mask), 0.0).detach()
    monkeypatch.setattr(critic, "states_at", None)
    found = read(batch.with_(trunk_states=states))
    assert float(expected.values.abs().max()) > 0
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.bootstrap, torch.zeros(len(batch)))
    assert torch.equal(found.trunk_states, states)
