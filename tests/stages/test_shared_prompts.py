"""Prompts read once for all their responses: the same states and gradients as reading every row whole."""

import logging
from functools import partial

import pytest
import torch
import transformers

from tests.batches import make_batch
from tests.conftest import SMALL, build_model
from vrpo.config.run import LoraConfig, ModelConfig
from vrpo.models import backbone as backbone_module
from vrpo.models import policy_from_model
from vrpo.models.backbone import recompute_activations, shared_limit, states_at, within
from vrpo.models.loading import seeded
from vrpo.models.tiny import tiny_tokenizer
from vrpo.train.microbatches import Splitter
from vrpo.types import Batch, SharedPrompts

NAMES = ["llama", "qwen2", "qwen3", "granite", "cohere", "gpt2", "gemma3"]


def ragged(prompts=(5, 5, 2, 2, 2, 1), responses=(3, 6, 1, 4, 2, 5), groups=(0, 0, 1, 1, 1, 2)) -> Batch:
    """Three prompts of 5, 2 and 1 tokens with 2, 3 and 1 responses of 1 to 6 tokens, or others."""
    g = torch.Generator().manual_seed(1)
    lengths = dict(zip(groups, prompts, strict=True))
    questions = {group: torch.randint(3, 60, (n,), generator=g) for group, n in lengths.items()}
    rows = [
        torch.cat([questions[group], torch.randint(3, 60, (length,), generator=g)])
        for group, length in zip(groups, responses, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    totals = torch.tensor(prompts) + torch.tensor(responses)
    attention = torch.arange(ids.shape[1]) < totals[:, None]
    columns = torch.arange(ids.shape[1] - 1)
    mask = (columns >= torch.tensor(prompts)[:, None] - 1) & (columns < totals[:, None] - 1)
    plain = make_batch(responses, prompt=1, scores=[1.0] * len(groups), groups=groups)
    return plain.with_(
        rewards=torch.zeros(mask.shape),
        input_ids=ids,
        attention_mask=attention,
        mask=mask,
        prompt_lengths=torch.tensor(prompts),
        old_logp=mask * -1.0,
    )


def model_of(name: str):
    """A random model; Gemma's window is wide enough for the batch."""
    if name != "gemma3":
        return build_model(name)
    torch.manual_seed(3)
    config = transformers.Gemma3TextConfig(
        **SMALL,
        vocab_size=100,
        num_key_value_heads=1,
        intermediate_size=24,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [slice(0, 6), slice(0, 2), slice(2, 5)], ids=["ragged", "two", "one prompt"])
def test_states_and_gradients_are_those_of_whole_rows(name, rows):
    model = model_of(name).eval()
    batch = ragged().select(torch.arange(6)[rows])
    last = batch.attention_mask.sum(dim=1, keepdim=True) - 1
    at = torch.nn.functional.pad(batch.mask, (0, 1)).scatter(1, last, True)
    results = []
    for prompts in (None, batch.shared_prompts):
        model.zero_grad()
        states = states_at(
            model.base_model,
            batch.input_ids,
            batch.attention_mask,
            at,
            compute_dtype=torch.float32,
            prompts=prompts,
        )
        weights = torch.linspace(-1, 1, states.numel()).view(states.shape)
        (states * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.base_model.named_parameters() if p.grad is not None}
        results.append((states.detach(), gradients))
    (whole, expected), (shared, found) = results
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-4, rtol=1e-4, msg=parameter)


def test_a_prompt_of_another_row_changes_the_states():
    """The comparison can fail: row 1 read after row 0's prompt where theirs differ."""
    batch, model = ragged(), build_model("llama").eval()
    wrong = SharedPrompts(
        first=torch.tensor([0, 2, 5]),
        of_row=torch.tensor([0, 0, 1, 1, 1, 1]),
        lengths=torch.tensor([5, 2, 1]),
    )
    at = torch.nn.functional.pad(batch.mask, (0, 1))
    at[5, 0] = False  # column 1 of a prompt of two is where the reading begins
    whole, mixed = (
        states_at(
            model.base_model,
            batch.input_ids,
            batch.attention_mask,
            at,
            compute_dtype=torch.float32,
            prompts=p,
        )
        for p in (None, wrong)
    )
    assert (whole - mixed).abs().max() > 0.01


def test_rows_that_stand_alone_are_not_shared():
    assert SharedPrompts.of(torch.tensor([4, 2, 7]), torch.tensor([3, 3, 3])) is None
    shared = SharedPrompts.of(torch.tensor([4, 2, 4]), torch.tensor([3, 5, 3]))
    assert shared.first.tolist() == [1, 0]
    assert shared.of_row.tolist() == [1, 0, 1]
    assert shared.lengths.tolist() == [5, 3]


def test_a_sliding_window_limits_the_length():
    assert shared_limit(model_of("gemma3").eval().base_model, vocabulary=100) == 19
    assert shared_limit(build_model("llama").eval().base_model, vocabulary=100) > 1_000_000


def test_a_window_that_is_a_mask_inside_the_layers_limits_the_length_too():
    config = transformers.GPTNeoConfig(
        vocab_size=100, hidden_size=16, num_layers=2, num_heads=2, window_size=6, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert shared_limit(model.base_model, vocabulary=100) == 5


def test_a_model_with_other_memory_reads_whole_rows_and_says_so(caplog):
    config = transformers.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, logger="vrpo"):
        assert shared_limit(model.base_model, vocabulary=100) == 0
    assert "every prompt with each response" in caplog.text


def assert_same_either_way(policy, batch):
    arguments = (batch.input_ids, batch.attention_mask, batch.mask)
    whole = policy.logprobs_and_entropy(*arguments, temperature=0.7)
    shared = policy.logprobs_and_entropy(*arguments, temperature=0.7, prompts=batch.shared_prompts)
    for a, b in zip(whole, shared, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_policy_says_the_same_either_way(make_policy, name):
    assert_same_either_way(make_policy(name), ragged())


def test_what_pads_a_short_prompt_pushes_nothing_out_of_a_window(monkeypatch):
    """No row is longer than 19, but the longest prompt and the longest response are 29 columns."""
    monkeypatch.setitem(backbone_module.SMALL_BUCKET, "cpu", 4096)  # all responses in one bucket
    policy = policy_from_model(
        model_of("gemma3"), tiny_tokenizer(), config=ModelConfig(path="gemma3", device="cpu")
    )
    assert policy.shared_limit == 19
    assert_same_either_way(policy, ragged((15, 15, 2, 2), (2, 2, 14, 14), (0, 0, 1, 1)))
    batch = ragged((4, 4, 2, 2), (2, 2, 14, 14), (0, 0, 1, 1))  # 18 columns
    assert within(batch.shared_prompts, batch.attention_mask, 19) is not None
    assert_same_either_way(policy, batch)
    wide = ragged((15, 15, 2, 2), (2, 2, 14, 14), (0, 0, 1, 1))
    for limit, shares in ((19, False), (29, True), (28, False)):
        (_, piece), *_ = Splitter(8, None, limit)(wide)
        assert piece.share_prompts == shares
        assert (within(wide.shared_prompts, wide.attention_mask, limit) is not None) == shares


def test_what_pads_a_short_response_has_no_position_beyond_the_context(make_policy):
    policy = make_policy("gpt2")
    assert policy.context_length == 64
    assert_same_either_way(policy, ragged((50, 50, 5, 5), (10, 9, 59, 8), (0, 0, 1, 1)))


def test_prompts_are_not_read_twice(make_policy):
    """What it is for: tokens that enter the embedding."""
    policy, batch = make_policy("llama"), ragged()
    read = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: read.append(ids[0].numel())
    )
    policy.logprobs_and_entropy(
        batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0, prompts=batch.shared_prompts
    )
    assert read == [3 * 5, 6 * 6]


def count(kept: list[int], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_computing_activations_again_changes_no_gradient_and_keeps_less(make_policy, name):
    policy, batch = make_policy(name), ragged()
    results = []
    for again in (False, True):
        if again:
            recompute_activations(policy.causal_lm)
        policy.zero_grad()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(count, kept), lambda t: t):
            logp, _ = policy.logprobs_and_entropy(
                batch.input_ids,
                batch.attention_mask,
                batch.mask,
                temperature=1.0,
                prompts=batch.shared_prompts,
            )
            logp.sum().backward()
        results.append((logp.detach(), {n: p.grad.clone() for n, p in policy.named_parameters()}, sum(kept)))
    (whole, expected, much), (again, found, little) = results
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-4, rtol=1e-4, msg=parameter)
    assert little < 0.7 * much
    assert not any(module.training for module in policy.causal_lm.modules())


def test_activations_are_computed_again_where_the_head_cannot_run_alone():
    lora = LoraConfig(rank=2, target_modules=("q_proj", "lm_head"))
    policy = policy_from_model(
        build_model("llama"), tiny_tokenizer(), config=ModelConfig(path="llama", device="cpu", lora=lora)
    )
    assert not policy.runs_head_alone
    batch, passes = ragged(), []
    policy.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    found = []
    for expected in (1, 3):  # the second time once more in the backward pass
        logp, _ = policy.logprobs_and_entropy(
            batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
        )
        logp.sum().backward()
        found.append(logp.detach())
        assert len(passes) == expected
        recompute_activations(policy.causal_lm)
    torch.testing.assert_close(*found)


def test_layers_that_compute_again_drop_nothing(tokenizer):
    """OPT's layers drop by themselves, in the training mode in which they compute again."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        dropout=0.5,
        **ids,
    )
    with seeded(0):
        model = transformers.OPTForCausalLM(config)
    policy = policy_from_model(model, tokenizer, config=ModelConfig(path="opt", device="cpu"))
    recompute_activations(policy.causal_lm)
    batch = ragged()
    first, again = (
        policy.logprobs_and_entropy(batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0)[0]
        for _ in range(2)
    )
    assert first.requires_grad and torch.equal(first, again)
    with torch.no_grad():
        read = policy.logprobs_and_entropy(
            batch.input_ids, batch.attention_mask, batch.mask, temperature=1.0
        )[0]
    torch.testing.assert_close(first.detach(), read)
