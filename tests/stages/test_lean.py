"""The lean one-token step: the model's own logits, and only where it is known to give them."""

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import SMALL, build_model
from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.models import policy_from_model
from vrpo.models.lean import is_lean
from vrpo.models.tiny import tiny_tokenizer
from vrpo.rollout.steps import CachedSteps, UncachedSteps, steps_for

PROMPTS = [np.array([5, 9, 30, 7]), np.array([8]), np.array([4, 6])]


def logits_of(kind, policy, *, lean: bool, monkeypatch) -> torch.Tensor:
    """Six steps for seven rows, of which some are dropped on the way."""
    if not lean:
        monkeypatch.setattr(type(policy), "lean_step", lambda self, cache: None)
    steps = kind(policy, PROMPTS, max_tokens=6)
    monkeypatch.undo()
    assert getattr(steps, "_step", None) is None or lean
    with torch.no_grad():
        found = [steps.start([3, 2, 2]).logits.flatten()]
        rows = 7
        for t in range(6):
            found.append(steps.advance(torch.arange(rows) * 7 % 50 + 4 + t).logits.flatten())
            if t in (1, 3):
                kept = torch.arange(0, rows, 2)
                steps.keep(kept)
                rows = len(kept)
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_its_logits_are_those_of_the_model_and_of_whole_sequences(make_policy, monkeypatch, name):
    policy = make_policy(name)
    assert is_lean(policy.backbone)
    lean = logits_of(CachedSteps, policy, lean=True, monkeypatch=monkeypatch)
    own = logits_of(CachedSteps, policy, lean=False, monkeypatch=monkeypatch)
    whole = logits_of(UncachedSteps, policy, lean=False, monkeypatch=monkeypatch)
    torch.testing.assert_close(lean, own, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lean, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "granite", "cohere"])
def test_other_architectures_take_the_models_own_pass(make_policy, name):
    policy = make_policy(name)
    assert not is_lean(policy.backbone)
    assert policy.lean_step(cache=None) is None


def test_an_adapter_takes_the_models_own_pass():
    config = ModelConfig(path="llama", device="cpu", lora=LoraConfig(rank=2))
    policy = policy_from_model(build_model("llama"), tiny_tokenizer(), config=config)
    assert policy.adapter
    assert policy.lean_step(cache=None) is None


@pytest.mark.parametrize(
    "settings",
    [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {"hidden_act": "gelu"}],
    ids=["windows", "another activation"],
)
def test_layers_it_does_not_know_take_the_models_own_pass(settings):
    words = len(tiny_tokenizer())
    config = transformers.Qwen2Config(
        **SMALL,
        num_key_value_heads=1,
        vocab_size=words,
        intermediate_size=24,
        initializer_range=0.3,
        **settings,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    policy = policy_from_model(model, tiny_tokenizer(), config=ModelConfig(path="qwen2", device="cpu"))
    assert not is_lean(policy.backbone)
    assert steps_for(policy) is CachedSteps  # which its trial has found to be right


def test_it_reads_the_live_weights(make_policy, monkeypatch):
    policy = make_policy("llama")
    before = logits_of(CachedSteps, policy, lean=True, monkeypatch=monkeypatch)
    with torch.no_grad():
        policy.backbone.layers[0].mlp.down_proj.weight.add_(0.1)
    after = logits_of(CachedSteps, policy, lean=True, monkeypatch=monkeypatch)
    whole = logits_of(UncachedSteps, policy, lean=False, monkeypatch=monkeypatch)
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, whole, atol=2e-5, rtol=1e-5)
