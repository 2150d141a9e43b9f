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
from vrpo.rollout.lookback import RepeatedPrompts, SharedPrompts
from vrpo.rollout.steps import CachedSteps, LeanSteps, UncachedSteps, steps_for

PROMPTS = [np.array([5, 9, 30, 7]), np.array([8]), np.array([4, 6])]


LONG = [np.arange(4, 4 + n) * 3 % 50 + 4 for n in (18, 21, 20)]
"""Long enough to be kept once for all their samples."""


def logits_of(kind, policy, prompts=PROMPTS) -> torch.Tensor:
    """Seven steps for seven rows, of which some are dropped on the way, at last all of the first two prompts."""
    steps = kind(policy, prompts, max_tokens=7)
    with torch.no_grad():
        found = [steps.start([3, 2, 2]).logits.flatten()]
        rows = 7
        for t in range(7):
            found.append(steps.advance(torch.arange(rows) * 7 % 50 + 4 + t).logits.flatten())
            if t in (1, 3, 5):
                kept = torch.arange(0, rows, 2) if t < 5 else torch.tensor([rows - 1])
                steps.keep(kept)
                rows = len(kept)
    assert rows == 1
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["repeated", "shared"])
def test_its_logits_are_those_of_the_model_and_of_whole_sequences(make_policy, name, prompts):
    policy = make_policy(name)
    assert steps_for(policy) is LeanSteps
    lean, own, whole = (logits_of(kind, policy, prompts) for kind in (LeanSteps, CachedSteps, UncachedSteps))
    torch.testing.assert_close(lean, own, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lean, whole, atol=2e-5, rtol=1e-5)


def test_prompts_that_are_kept_once_in_bfloat16(make_policy):
    policy = make_policy("llama")
    exact = logits_of(UncachedSteps, policy, LONG)
    policy.compute_dtype = torch.bfloat16
    rounded = logits_of(LeanSteps, policy, LONG)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("prompts", "repeats", "form"),
    [
        (PROMPTS, [3, 2, 2], RepeatedPrompts),
        (LONG, [3, 2, 2], SharedPrompts),
        (LONG, [1, 1, 1], RepeatedPrompts),
    ],
)
def test_long_prompts_are_kept_once_for_their_samples(make_policy, prompts, repeats, form):
    steps = LeanSteps(make_policy("llama"), prompts, max_tokens=7)
    with torch.no_grad():
        steps.start(repeats)
    assert type(steps._past) is form


def test_a_prompt_without_rows_is_let_go(make_policy):
    """And rows of prompts that have fewer rows than others stay in their places."""
    steps = LeanSteps(make_policy("qwen2"), LONG, max_tokens=7)
    with torch.no_grad():
        steps.start([3, 2, 2])
        steps.keep(torch.tensor([0, 2, 5]))
    past = steps._past
    keys, values = past._kept[0]
    assert (past._prompts, past._group, past._rows.tolist()) == (2, 2, [0, 0, 1])
    assert len(keys) == len(values) == 2 * past._kv_heads


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "granite", "cohere"])
def test_other_architectures_take_the_models_own_pass(make_policy, name):
    policy = make_policy(name)
    assert not is_lean(policy.backbone)
    assert policy.lean_step() is None
    assert steps_for(policy) is CachedSteps


def test_an_adapter_takes_the_models_own_pass():
    config = ModelConfig(path="llama", device="cpu", lora=LoraConfig(rank=2))
    policy = policy_from_model(build_model("llama"), tiny_tokenizer(), config=config)
    assert policy.adapter
    assert policy.lean_step() is None
    assert steps_for(policy) is CachedSteps


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


def test_it_reads_the_live_weights(make_policy):
    policy = make_policy("llama")
    before = logits_of(LeanSteps, policy)
    with torch.no_grad():
        policy.backbone.layers[0].mlp.down_proj.weight.add_(0.1)
    after, whole = logits_of(LeanSteps, policy), logits_of(UncachedSteps, policy)
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, whole, atol=2e-5, rtol=1e-5)
