"""The policy: which token a column describes, what the chunked head computes, what is frozen, what is saved."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ARCHITECTURES, build_model
from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.errors import ModelError
from vrpo.models import frozen_head, policy_from_model
from vrpo.models.backbone import compile_blocks
from vrpo.models.loading import seeded
from vrpo.models.weights import load_policy_weights


def padded():
    """Two sequences of 6 and 4 tokens; the response is the last three and the last two."""
    input_ids = torch.tensor([[9, 4, 8, 11, 30, 2], [7, 5, 60, 2, 0, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    return input_ids, attention_mask, mask


def slow_logprobs(policy, input_ids, mask, *, temperature):
    """Token by token from the model's own logits on the unpadded prefix: written to be obviously right."""
    logp, entropy = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for b, t in mask.nonzero().tolist():
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=input_ids[b : b + 1, : t + 1]).logits[0, -1] / temperature
        p = torch.softmax(logits.double(), dim=-1)
        logp[b, t] = p[input_ids[b, t + 1]].log()
        entropy[b, t] = -(p * p.log()).sum()
    return logp, entropy


def check_logprobs(policy, compute):
    input_ids, attention_mask, mask = padded()
    for temperature in (1.0, 0.7):
        got = compute(input_ids, attention_mask, mask, temperature=temperature)
        for ours, slow in zip(
            got, slow_logprobs(policy, input_ids, mask, temperature=temperature), strict=True
        ):
            torch.testing.assert_close(ours.detach(), slow, atol=1e-5, rtol=1e-5)
            assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_and_entropy_are_the_models_own(make_policy, name):
    policy = make_policy(name)
    assert policy.runs_head_alone
    check_logprobs(policy, policy.logprobs_and_entropy)


MUTANTS = {
    "one column late": lambda x: x.roll(1, dims=1),
    "one column early": lambda x: x.roll(-1, dims=1),
    "negated": lambda x: -x,
    "scaled": lambda x: x * 1.001,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_can_fail(make_policy, name):
    policy = make_policy("llama")

    def broken(*args, **kwargs):
        return tuple(MUTANTS[name](x) for x in policy.logprobs_and_entropy(*args, **kwargs))

    with pytest.raises(AssertionError):
        check_logprobs(policy, broken)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_gradients_equal_those_of_full_logits(make_policy, name):
    policy = make_policy(name)
    input_ids, attention_mask, mask = padded()
    logp, entropy = policy.logprobs_and_entropy(input_ids, attention_mask, mask, temperature=1.0)
    (logp.sum() + 0.1 * entropy.sum()).backward()
    ours = {k: p.grad.clone() for k, p in policy.named_parameters()}
    policy.zero_grad()
    logits = policy.causal_lm(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    log_p = torch.log_softmax(logits, dim=-1)
    chosen = log_p.gather(2, input_ids[:, 1:, None]).squeeze(2)
    full_entropy = -(log_p.exp() * log_p).sum(dim=-1)
    (chosen[mask].sum() + 0.1 * full_entropy[mask].sum()).backward()
    for key, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, atol=1e-4, rtol=1e-4)
        assert ours[key].abs().sum() > 0


def test_an_empty_mask_gives_zeros_and_a_backward_pass(make_policy):
    policy = make_policy("llama")
    input_ids, attention_mask, mask = padded()
    logp, _ = policy.logprobs_and_entropy(input_ids, attention_mask, torch.zeros_like(mask), temperature=1.0)
    logp.sum().backward()
    assert (logp == 0).all()


def test_a_head_that_cannot_run_alone_takes_the_slow_path_with_one_warning(caplog, tokenizer):
    model = build_model("llama")

    class Doubled(torch.nn.Linear):
        """An output layer whose weight does not tell all."""

        def forward(self, x):
            return 2 * super().forward(x)

    with seeded(1):
        model.lm_head = Doubled(16, model.config.vocab_size, bias=False)
    with caplog.at_level(logging.WARNING, logger="vrpo"):
        policy = policy_from_model(model, tokenizer, config=ModelConfig(path="x", device="cpu"))
    assert [r.levelname for r in caplog.records if r.name.startswith("vrpo")] == ["WARNING"]
    assert "slower path" in caplog.text
    assert not policy.runs_head_alone
    check_logprobs(policy, policy.logprobs_and_entropy)


def test_the_probe_refuses_a_wrong_scale(make_policy):
    policy = make_policy("cohere")
    policy.causal_lm.config.logit_scale = 0.5  # the model object keeps its 0.25
    assert not policy._probe()


def test_dropout_stays_off_in_training(tokenizer):
    model = build_model("gpt2")
    assert model.config.resid_pdrop > 0
    policy = policy_from_model(model, tokenizer, config=ModelConfig(path="x", device="cpu")).train()
    first, again = (policy.hidden(*padded()[:2]) for _ in range(2))
    assert policy.training
    assert torch.equal(first, again)


def train_once(policy):
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    logp, _ = policy.logprobs_and_entropy(*padded(), temperature=1.0)
    logp.sum().backward()
    optimizer.step()


def warm_started(tokenizer, config):
    """A policy around an adapter that was trained before this run."""
    first = policy_from_model(
        build_model("llama"), tokenizer, config=config.model_copy(update={"lora": LoraConfig(rank=2)})
    )
    for _ in range(2):
        train_once(first)
    return policy_from_model(first.model, tokenizer, config=config)


@pytest.mark.parametrize("kind", ["full", "fresh adapter", "trained adapter"])
def test_the_reference_does_not_follow_the_policy(tokenizer, kind):
    lora = LoraConfig(rank=2) if kind == "fresh adapter" else None
    config = ModelConfig(path="x", device="cpu", lora=lora)
    if kind == "trained adapter":
        policy = warm_started(tokenizer, config)
    else:
        policy = policy_from_model(build_model("llama"), tokenizer, config=config)
    assert policy.base_is_initial == (kind == "fresh adapter")
    before = policy.logprobs_and_entropy(*padded(), temperature=1.0)[0].detach()
    reference = policy.reference()
    weight = reference.head_weight.clone()
    for _ in range(2):  # an adapter's first step moves only one of its two factors
        train_once(policy)
    after = policy.logprobs_and_entropy(*padded(), temperature=1.0)[0].detach()
    frozen, _ = reference.logprobs_and_entropy(*padded(), temperature=1.0)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(frozen, before, atol=1e-6, rtol=0)
    assert not frozen.requires_grad
    assert torch.equal(reference.head_weight, weight)
    # the adapter is on again, and still trainable
    assert torch.equal(policy.logprobs_and_entropy(*padded(), temperature=1.0)[0].detach(), after)
    assert any(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_frozen_head_is_a_copy(make_policy, name):
    policy = make_policy(name)
    frozen = frozen_head(policy)
    before = frozen.clone()
    train_once(policy)
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)
    assert not torch.equal(frozen, policy.head.weight)


def test_the_frozen_head_holds_the_logit_scale(make_policy):
    policy = make_policy("granite")
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hidden @ frozen_head(policy).T, policy.head.logits(hidden))
    torch.testing.assert_close(hidden @ policy.reference().head_weight.T, policy.head.logits(hidden))


def test_a_saved_policy_opens_as_an_ordinary_folder(make_policy, tmp_path: Path):
    policy = make_policy("llama_tied")
    train_once(policy)
    policy.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = padded()[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, policy.causal_lm(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("12+34=").input_ids == policy.tokenizer("12+34=").input_ids
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen3_moe"])
def test_saved_weights_come_back_bit_for_bit(make_policy, tmp_path, name):
    policy, other = make_policy(name), make_policy(name)
    train_once(policy)
    policy.save_pretrained(tmp_path)
    load_policy_weights(other, tmp_path)
    saved, loaded = policy.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(saved[k], loaded[k]) for k in saved)
    with pytest.raises(ModelError, match="another model"):
        load_policy_weights(make_policy("qwen2"), tmp_path)


def test_norms_and_feed_forward_blocks_are_what_is_compiled(make_policy, monkeypatch):
    """What the compiled ones compute is for `tests/gpu`: to compile takes half a minute."""
    policy = make_policy("qwen2")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    compile_blocks(policy.causal_lm)
    layers = policy.backbone.layers
    wanted = [policy.backbone.norm]
    for layer in layers:
        wanted += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    assert {id(module) for module in compiled} == {id(module) for module in wanted}
    assert len(compiled) == 3 * len(layers) + 1
