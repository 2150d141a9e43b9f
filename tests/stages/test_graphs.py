"""What a CUDA graph replays, run without one: the model's own logits, from buffers that outlive a batch."""

import numpy as np
import peft
import pytest
import torch

from tests.conftest import build_model
from vrpo.config.run import LoraConfig, ModelConfig, RolloutConfig
from vrpo.models import policy_from_model
from vrpo.models.static import is_static
from vrpo.models.tiny import tiny_tokenizer
from vrpo.rollout import TorchEngine, steps
from vrpo.rollout.graphs import GraphDecoder, bucket
from vrpo.rollout.steps import UncachedSteps, steps_for
from vrpo.types import Prompt

PROMPTS = [np.array([5, 9, 30, 7]), np.array([8]), np.array([4, 6])]
LONGER = [np.arange(4, 34), np.arange(4, 24), np.array([9, 9, 9])]
KNOWN = ["llama", "llama_tied", "qwen2", "qwen3"]


@torch.no_grad()
def logits_of(make, policy, prompts, repeats=(3, 2, 2), tokens: int = 6) -> torch.Tensor:
    """A few steps, some rows dropped on the way."""
    batch = make(policy, prompts, max_tokens=tokens)
    found = [batch.start(list(repeats)).logits.flatten()]
    rows = sum(repeats)
    for t in range(tokens):
        found.append(batch.advance(torch.arange(rows) * 7 % 50 + 4 + t).logits.flatten())
        if t in (1, 3):
            kept = torch.arange((rows + 1) % 2, rows, 2)
            batch.keep(kept)
            rows = len(kept)
    return torch.cat(found)


def decoder_of(policy) -> GraphDecoder:
    model = policy.static_model()
    assert model is not None
    return GraphDecoder(model)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_an_adapter_on_the_embedding_is_not_left_out():
    lora = LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens"))
    policy = policy_from_model(
        build_model("llama"), tiny_tokenizer(), config=ModelConfig(path="x", device="cpu", lora=lora)
    )
    assert policy.static_model() is None


@pytest.mark.parametrize("name", KNOWN)
def test_its_logits_are_those_of_whole_sequences(make_policy, name):
    policy = make_policy(name)
    assert_close(logits_of(decoder_of(policy), policy, PROMPTS), logits_of(UncachedSteps, policy, PROMPTS))


def test_nothing_of_a_batch_reaches_the_next(make_policy):
    """Longer and shorter prompts, more and fewer rows: the buffers grow, and then hold what others have left."""
    policy = make_policy("qwen2")
    decoder = decoder_of(policy)
    for prompts, repeats, tokens in (
        (LONGER, (4, 4, 3), 40),
        (PROMPTS, (1, 1, 1), 6),
        (LONGER, (20, 1, 1), 8),
        (PROMPTS, (3, 2, 2), 6),
    ):
        found = logits_of(decoder, policy, prompts, repeats, tokens)
        assert_close(found, logits_of(UncachedSteps, policy, prompts, repeats, tokens))


def test_it_reads_the_weights_of_the_moment(make_policy):
    policy = make_policy("llama")
    decoder = decoder_of(policy)
    before = logits_of(decoder, policy, PROMPTS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    after = logits_of(decoder, policy, PROMPTS)
    assert (before - after).abs().max() > 1e-3
    assert_close(after, logits_of(UncachedSteps, policy, PROMPTS))


def test_an_adapter_is_merged_into_the_copies():
    config = ModelConfig(path="llama", device="cpu", lora=LoraConfig(rank=2))
    policy = policy_from_model(build_model("llama"), tiny_tokenizer(), config=config)
    plain = logits_of(UncachedSteps, policy, PROMPTS)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found = logits_of(decoder_of(policy), policy, PROMPTS)
    assert_close(found, logits_of(UncachedSteps, policy, PROMPTS))
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "granite", "cohere"])
def test_other_architectures_have_no_such_form(make_policy, name):
    policy = make_policy(name)
    assert not is_static(policy.backbone)
    assert policy.static_model() is None


def test_windows_and_other_activations_are_refused(make_policy):
    policy = make_policy("qwen2")
    policy.backbone.config.layer_types = ["sliding_attention"] * len(policy.backbone.layers)
    assert not is_static(policy.backbone)
    policy = make_policy("llama")
    policy.backbone.config.hidden_act = "gelu"
    assert not is_static(policy.backbone)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft reads it
@pytest.mark.parametrize("form", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_are_more_than_a_product_are_refused(form):
    settings = {"r": 2, "target_modules": ["q_proj"]}
    config = ModelConfig(path="qwen2", device="cpu")
    for extra, static in (({}, True), (form, False)):
        model = peft.get_peft_model(build_model("qwen2"), peft.LoraConfig(**settings, **extra))
        policy = policy_from_model(model, tiny_tokenizer(), config=config)
        assert is_static(policy.backbone) == static


@pytest.mark.parametrize("look_every", [1, 3, 8])
def test_the_engine_samples_the_same_responses(make_policy, monkeypatch, look_every):
    """Whatever way the logits come, and however seldom finished rows are looked for."""
    policy = make_policy("llama")
    config = RolloutConfig(num_generations=4, max_completion_length=16, temperature=1.3, batch_size=8)
    prompts = [
        Prompt(prompt_id=f"train/{i}", prompt="-", token_ids=ids, columns={}) for i, ids in enumerate(PROMPTS)
    ]
    drawn = []
    for graphs in (False, True):
        engine = TorchEngine(policy, policy.tokenizer, config, seed=3)
        if graphs:
            engine._steps = decoder_of(policy)
            monkeypatch.setattr("vrpo.rollout.decoding.LOOK_EVERY", {"cpu": look_every})
        drawn.append(engine.generate(prompts, num_generations=4, step=1, policy_version=0))
    assert len({len(rollout.token_ids) for rollout in drawn[0]}) > 3
    for a, b in zip(*drawn, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert (a.stop, a.completion) == (b.stop, b.completion)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_on_a_cpu_there_are_none(make_policy):
    assert steps_for(make_policy("llama"), cuda_graphs=True) is steps.LeanSteps


def test_sizes_are_few_and_hold_what_they_are_asked_for():
    assert [bucket(n, 64) for n in (1, 64, 65, 96, 97, 129, 193, 2049)] == [
        64,
        64,
        96,
        96,
        128,
        192,
        256,
        3072,
    ]
    sizes = {bucket(n, 8) for n in range(1, 1025)}
    assert all(bucket(n, 8) >= n for n in range(1, 1025))
    assert len(sizes) <= 15
