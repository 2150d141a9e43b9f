"""The torch engine against HF `generate`, against a full forward pass, and against itself in other batches."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ARCHITECTURES, build_model
from vrpo import rng
from vrpo.config.run import LoraConfig, ModelConfig, RolloutConfig
from vrpo.errors import ConfigError, DataError, NumericsError
from vrpo.models import policy_from_model
from vrpo.rollout import TorchEngine
from vrpo.rollout.steps import LeanSteps, UncachedSteps
from vrpo.rollout.stopping import StopStrings
from vrpo.rollout.torch_engine import plan_batches
from vrpo.types import Prompt

TEXTS = ("12+34=", "a", "gcd(12,18)=", "12+34=", "zz")


def engine_for(policy, **settings):
    defaults = {"max_completion_length": 12, "batch_size": 64}
    return TorchEngine(policy, policy.tokenizer, RolloutConfig(**(defaults | settings)), seed=5)


def sample(engine, prompts, **more):
    return engine.generate(prompts, **({"num_generations": 2, "step": 3, "policy_version": 1} | more))


def responses(rollouts):
    return [r.token_ids[r.action_mask].tolist() for r in rollouts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_hf_generate(make_policy, make_prompts, name):
    policy, prompts = make_policy(name), make_prompts(*TEXTS)
    got = sample(engine_for(policy), prompts, greedy=True, num_generations=1)
    for rollout, prompt in zip(got, prompts, strict=True):
        ids = torch.from_numpy(prompt.token_ids)[None]
        expected = policy.causal_lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert rollout.token_ids.tolist() == expected[0].tolist()
        assert rollout.action_mask.tolist() == [False] * ids.shape[1] + [True] * (
            expected.shape[1] - ids.shape[1]
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_states_are_those_of_a_full_pass_and_change_no_token(make_policy, make_prompts, name):
    policy, prompts = make_policy(name), make_prompts(*TEXTS)
    engine = engine_for(policy, batch_size=4)
    plain, kept = sample(engine, prompts), sample(engine, prompts, keep_states=True)
    assert responses(plain) == responses(kept)
    assert all(rollout.states is None for rollout in plain)
    for rollout in kept:
        ids = torch.from_numpy(rollout.token_ids)[None]
        states = policy.hidden(ids, torch.ones_like(ids))[0, np.flatnonzero(rollout.action_mask) - 1]
        torch.testing.assert_close(torch.from_numpy(rollout.states), states.detach(), atol=2e-5, rtol=1e-4)


def test_a_model_that_gives_logits_alone_keeps_no_states(make_policy, make_prompts, monkeypatch):
    policy = make_policy("llama")
    monkeypatch.setattr(policy, "runs_head_alone", False)
    assert all(r.states is None for r in sample(engine_for(policy), make_prompts("a"), keep_states=True))


CUTS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2"])
def test_logprobs_are_those_of_a_full_forward_pass(make_policy, make_prompts, name, cut):
    policy = make_policy(name)
    for rollout in sample(engine_for(policy, **cut), make_prompts(*TEXTS)):
        ids = torch.from_numpy(rollout.token_ids)
        temperature, top_k, top_p = (
            cut.get(k, d) for k, d in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
        )
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=ids[None]).logits[0, :-1].double() / temperature
        log_p = torch.log_softmax(logits, dim=-1)
        for t in np.flatnonzero(rollout.action_mask):
            row, token = log_p[t - 1], ids[t]
            assert rollout.policy_logprobs[t] == pytest.approx(row[token].item(), abs=1e-5)
            order = row.argsort(descending=True)
            if top_k:
                order = order[:top_k]
            p = row[order].exp() / row[order].exp().sum()
            kept = order[(p.cumsum(0) - p) < top_p]
            expected = row[token] - row[kept].exp().sum().log()
            assert rollout.logprobs[t] == pytest.approx(expected.item(), abs=1e-4)
            assert token in kept
        assert (rollout.logprobs[~rollout.action_mask] == 0).all()
        assert (rollout.policy_logprobs[~rollout.action_mask] == 0).all()
        assert rollout.logprobs.dtype == rollout.policy_logprobs.dtype == np.float32


def test_sampler_and_trainer_agree(make_policy, make_prompts):
    policy = make_policy("qwen3")
    for rollout in sample(engine_for(policy, temperature=0.8), make_prompts(*TEXTS)):
        ids = torch.from_numpy(rollout.token_ids)[None]
        mask = torch.from_numpy(rollout.action_mask)[None, 1:]
        logp, _ = policy.logprobs_and_entropy(ids, torch.ones_like(ids).bool(), mask, temperature=0.8)
        np.testing.assert_allclose(logp.detach()[0], rollout.policy_logprobs[1:], atol=1e-5)


def test_tokens_are_the_inverse_cdf_of_the_samples_own_stream(make_policy, make_prompts):
    policy = make_policy("llama")
    rollout = sample(engine_for(policy), make_prompts(*TEXTS))[3]  # prompt 1, sample 1
    assert rollout.sample_id == "s3/p1/k1"
    draws = rng.stream(5, "sample", "s3/p1/k1").random(12)
    ids = torch.from_numpy(rollout.token_ids)
    with torch.no_grad():
        p = torch.softmax(policy.causal_lm(input_ids=ids[None]).logits[0].double(), dim=-1)
    for draw, t in zip(draws, np.flatnonzero(rollout.action_mask), strict=False):
        cdf = p[t - 1].cumsum(0)
        assert ids[t] == int((cdf > draw).nonzero()[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_completions_do_not_depend_on_the_batch(make_policy, make_prompts, name):
    policy, prompts = make_policy(name), make_prompts(*TEXTS)
    whole = sample(engine_for(policy), prompts)
    for batch_size in (1, 3, 4):
        split = sample(engine_for(policy, batch_size=batch_size), prompts)
        assert responses(split) == responses(whole)
        for a, b in zip(split, whole, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert responses(sample(engine_for(policy), prompts[:2])) == responses(whole)[:4]


def test_records_are_in_order_and_named(make_policy, make_prompts, tokenizer):
    prompts = make_prompts(*TEXTS)
    got = sample(engine_for(make_policy("llama"), batch_size=4), prompts, num_generations=3)
    assert [r.sample_id for r in got] == [f"s3/p{i}/k{k}" for i in range(5) for k in range(3)]
    assert [r.prompt for r in got] == [p for p in prompts for _ in range(3)]
    assert {r.policy_version for r in got} == {1}
    for r in got:
        assert r.token_ids[: len(r.prompt.token_ids)].tolist() == r.prompt.token_ids.tolist()
        assert r.token_ids.dtype == np.int64
        assert r.completion == tokenizer.decode(r.token_ids[r.action_mask], skip_special_tokens=True)


def test_streams_steps_and_seeds_draw_differently(make_policy, make_prompts):
    policy, prompts = make_policy("llama"), make_prompts(*TEXTS)
    engine = engine_for(policy)
    base = responses(sample(engine, prompts))
    assert responses(sample(engine, prompts)) == base
    assert responses(sample(engine, prompts, stream="eval")) != base
    assert responses(sample(engine, prompts, step=4)) != base
    other = TorchEngine(policy, policy.tokenizer, RolloutConfig(max_completion_length=12), seed=6)
    assert responses(sample(other, prompts)) != base


def likely(policy, token, bonus):
    """Make one token likelier in every state."""
    head = policy.causal_lm.lm_head
    bias = torch.zeros(head.weight.shape[0])
    bias[token] = bonus
    head.bias = torch.nn.Parameter(bias)
    return policy


def test_eos_ends_a_response_and_is_kept(make_policy, make_prompts):
    policy = likely(make_policy("llama"), 2, 4.0)
    got = sample(engine_for(policy, max_completion_length=30), make_prompts(*TEXTS), num_generations=6)
    ends = {r.stop for r in got}
    assert "eos" in ends
    lengths = set()
    for r in got:
        response = r.token_ids[r.action_mask].tolist()
        lengths.add(len(response))
        assert 2 not in response[:-1]
        assert (response[-1] == 2) == (r.stop == "eos")
        assert "<eos>" not in r.completion
        assert r.stop == "eos" or len(response) == 30
    assert len(lengths) > 4  # rows ended at different steps, so finished ones were dropped on the way
    uncut = TorchEngine(
        policy, policy.tokenizer, RolloutConfig(max_completion_length=30, batch_size=1), seed=5
    )
    assert responses(sample(uncut, make_prompts(*TEXTS), num_generations=6)) == responses(got)


def test_eos_as_the_last_allowed_token_is_an_end_not_a_cut(make_policy, make_prompts):
    policy = likely(make_policy("llama"), 2, 100.0)
    got = sample(engine_for(policy, max_completion_length=1), make_prompts("a"))
    assert [(r.stop, r.completion, r.num_actions) for r in got] == [("eos", "", 1)] * 2


def test_every_end_token_of_the_generation_settings_ends(make_policy, make_prompts):
    policy = likely(make_policy("llama"), 40, 100.0)
    policy.causal_lm.generation_config.eos_token_id = [2, 40]
    got = sample(engine_for(policy), make_prompts("a"))
    assert [(r.stop, r.token_ids[-1]) for r in got] == [("eos", 40)] * 2
    # 40 is an ordinary token, which decoding does not skip
    assert [r.completion for r in got] == ["", ""] and policy.tokenizer.decode([40])


def test_without_an_end_a_response_is_cut(make_policy, make_prompts):
    got = sample(engine_for(likely(make_policy("llama"), 2, -100.0)), make_prompts("a"))
    assert [(r.stop, r.num_actions) for r in got] == [("length", 12)] * 2


def test_a_stop_text_ends_a_response_and_is_cut_from_the_text(make_policy, make_prompts):
    policy, prompts = likely(make_policy("llama"), 2, -100.0), make_prompts(*TEXTS)
    free = sample(engine_for(policy), prompts)
    stop = free[0].completion[3:5]
    got = sample(engine_for(policy, stop=(stop, "never seen")), prompts)
    assert got[0].stop == "stop_string"
    for r, unstopped in zip(got, free, strict=True):
        at = unstopped.completion.find(stop)
        if at < 0:
            assert (r.completion, r.stop) == (unstopped.completion, "length")
        else:
            assert (r.completion, r.stop, r.num_actions) == (unstopped.completion[:at], "stop_string", at + 2)
            assert r.token_ids.tolist() == unstopped.token_ids[: len(r.token_ids)].tolist()


def ended(stops, ids):
    """As the sampler asks: the whole response only where its tail says that it may be worth it."""
    return stops.may_end(ids[-stops.tail :]) and stops.found(ids)


def test_stop_strings_by_hand(tokenizer):
    stops = StopStrings(tokenizer, ["##", "end"])
    ids = tokenizer("so it ends").input_ids
    assert [ended(stops, ids[:n]) for n in (1, 6, 8, 9, 10)] == [False, False, False, True, True]
    assert not stops.may_end(ids[:8])
    assert stops.cut("a ## b end") == "a "
    assert stops.cut("nothing") is None
    assert not StopStrings(tokenizer, [])


def test_a_stop_text_is_found_at_once_after_characters_of_several_tokens():
    """With byte fallback a tail that begins inside a character can decode to broken characters all through."""

    class ByteFallback:
        def decode(self, token_ids, **_):
            data = bytes(token_ids)
            try:
                return data.decode()
            except UnicodeDecodeError:  # as SentencePiece's decoder does with a run of bytes
                return "\N{REPLACEMENT CHARACTER}" * len(data)

    stops = StopStrings(ByteFallback(), ["\N{CJK UNIFIED IDEOGRAPH-7D42}"])
    ids = list(
        "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}\N{CJK UNIFIED IDEOGRAPH-7D42}".encode()
    )
    assert [n for n in range(1, len(ids) + 1) if ended(stops, ids[:n])] == [len(ids)]


def test_a_special_token_ends_a_response_as_eos_does(make_policy, make_prompts):
    policy, prompts = likely(make_policy("llama"), 2, -100.0), make_prompts(*TEXTS)
    free = sample(engine_for(policy), prompts)
    end = next(int(t) for t in free[0].token_ids[len(prompts[0].token_ids) + 2 :] if t > 3)
    text = policy.tokenizer.decode([end])
    special = copy.deepcopy(policy.tokenizer)
    special.add_special_tokens({"additional_special_tokens": [text]})
    assert special.convert_tokens_to_ids(text) == end
    config = RolloutConfig(max_completion_length=12, stop=(text,))
    got = sample(TorchEngine(policy, special, config, seed=5), prompts)
    assert got[0].stop == "eos" and got[0].token_ids[-1] == end and text not in got[0].completion
    with pytest.raises(ConfigError, match=r"rollout\.stop holds .* give .* by itself"):
        TorchEngine(policy, special, config.model_copy(update={"stop": (f"x{text}",)}), seed=0)


def test_greedy_logprobs_are_the_policys(make_policy, make_prompts):
    policy = make_policy("llama")
    rollout = sample(engine_for(policy, temperature=0.5, top_k=1), make_prompts("a"), greedy=True)[0]
    ids = torch.from_numpy(rollout.token_ids)
    with torch.no_grad():
        log_p = torch.log_softmax(policy.causal_lm(input_ids=ids[None]).logits[0, :-1] / 0.5, dim=-1)
    expected = log_p.gather(1, ids[1:, None]).squeeze(1).numpy()
    np.testing.assert_allclose(
        rollout.logprobs[1:], np.where(rollout.action_mask[1:], expected, 0), atol=1e-5
    )
    np.testing.assert_array_equal(rollout.policy_logprobs, rollout.logprobs)


def test_a_policy_with_an_adapter_samples_with_it(tokenizer, make_prompts):
    config = ModelConfig(path="x", device="cpu", lora=LoraConfig(rank=2))
    policy = policy_from_model(build_model("llama"), tokenizer, config=config)
    prompts = make_prompts(*TEXTS)
    before = responses(sample(engine_for(policy), prompts))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    after = sample(engine_for(policy), prompts)
    assert responses(after) != before
    for r in after[:3]:
        ids = torch.from_numpy(r.token_ids)[None]
        mask = torch.from_numpy(r.action_mask)[None, 1:]
        logp, _ = policy.logprobs_and_entropy(ids, torch.ones_like(ids).bool(), mask, temperature=1.0)
        np.testing.assert_allclose(logp.detach()[0], r.policy_logprobs[1:], atol=1e-5)


def recurrent_policy(tokenizer):
    import transformers

    from vrpo.models.loading import seeded

    config = transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    with seeded(7):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return policy_from_model(model, tokenizer, config=ModelConfig(path="x", device="cpu"))


def test_a_recurrent_model_takes_the_slow_path_and_is_right(tokenizer, make_prompts, caplog):
    policy = recurrent_policy(tokenizer)
    with caplog.at_level(logging.WARNING, logger="vrpo"):
        engine = engine_for(policy)
    assert engine._steps is UncachedSteps
    assert [r.levelname for r in caplog.records if r.name == "vrpo.rollout.steps"] == ["WARNING"]
    assert "slow" in caplog.text
    for rollout in sample(engine, make_prompts(*TEXTS), greedy=True, num_generations=1):
        ids = torch.from_numpy(rollout.token_ids)
        with torch.no_grad():
            best = policy.causal_lm(input_ids=ids[None], use_cache=False).logits[0, :-1].argmax(dim=-1)
        chosen = rollout.action_mask[1:]
        assert best.numpy()[chosen].tolist() == ids[1:].numpy()[chosen].tolist()


def test_both_paths_sample_the_same(make_policy, make_prompts):
    engine = engine_for(likely(make_policy("llama"), 2, 3.0))
    assert engine._steps is LeanSteps
    cached = sample(engine, make_prompts(*TEXTS), num_generations=4)
    engine._steps = UncachedSteps
    slow = sample(engine, make_prompts(*TEXTS), num_generations=4)
    assert responses(slow) == responses(cached)
    for a, b in zip(slow, cached, strict=True):
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, atol=1e-5)


def test_a_cache_that_lies_is_not_trusted(make_policy, caplog):
    policy = make_policy("llama")
    rotary = policy.backbone.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(
        x, position_ids * 0 + torch.arange(position_ids.shape[1])
    )
    with caplog.at_level(logging.WARNING, logger="vrpo"):
        assert engine_for(policy)._steps is UncachedSteps
    assert "other logits" in caplog.text


def test_prompts_that_cannot_be_answered(make_policy, make_prompts):
    engine = engine_for(make_policy("llama"))
    with pytest.raises(
        ConfigError, match=r"max_completion_length=12 after prompt 'test/0' of 60 tokens .* 64; lower it to 4"
    ):
        sample(engine, make_prompts("1" * 60))
    empty = Prompt(prompt_id="train/9", prompt="", token_ids=np.array([], dtype=np.int64), columns={})
    with pytest.raises(DataError, match="'train/9' has no tokens"):
        sample(engine, [empty])


def test_a_policy_that_diverged_is_not_sampled_from(make_policy, make_prompts):
    policy = make_policy("llama")
    sampler = engine_for(policy)
    with torch.no_grad():
        policy.head.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="logits are NaN"):
        sample(sampler, make_prompts("1+2="))


def test_sampling_leaves_the_model_trainable(make_policy, make_prompts):
    policy = make_policy("llama").train()
    sample(engine_for(policy), make_prompts("a"))
    assert policy.training
    ids = torch.arange(6)[None]
    logp, _ = policy.logprobs_and_entropy(
        ids, torch.ones(1, 6).bool(), torch.ones(1, 5).bool(), temperature=1.0
    )
    logp.sum().backward()
    assert policy.head.weight.grad is not None


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    num_generations=st.integers(1, 7),
    batch_size=st.integers(1, 12),
)
def test_a_plan_holds_every_sample_once_within_the_batch_size(lengths, num_generations, batch_size):
    plan = plan_batches(lengths, num_generations=num_generations, batch_size=batch_size)
    seen = sorted((p, k) for batch in plan for p, samples in batch for k in samples)
    assert seen == [(p, k) for p in range(len(lengths)) for k in range(num_generations)]
    assert all(sum(len(samples) for _, samples in batch) <= batch_size for batch in plan)


def test_a_plan_by_hand():
    assert plan_batches([5, 3], num_generations=2, batch_size=3) == [[(1, range(2))], [(0, range(2))]]
    assert plan_batches([5, 3], num_generations=2, batch_size=4) == [[(1, range(2)), (0, range(2))]]
    assert plan_batches([5], num_generations=3, batch_size=2) == [[(0, range(2))], [(0, range(2, 3))]]
