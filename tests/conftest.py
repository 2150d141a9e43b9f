"""Shared small models: built once a session, copied where a test trains them."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from vrpo.config.run import ModelConfig
from vrpo.models.loading import policy_from_model, seeded
from vrpo.models.policy import Policy
from vrpo.models.tiny import build_tiny, tiny_tokenizer
from vrpo.types import Prompt

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
GROUPED = SMALL | {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
ARCHITECTURES = {
    "llama": lambda **k: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False, **k),
    "llama_tied": lambda **k: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True, **k),
    "qwen2": lambda **k: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True, **k),
    "qwen3": lambda **k: transformers.Qwen3Config(**GROUPED, tie_word_embeddings=False, **k),
    # softcap on the logits, and a window of 4 tokens in the first layer
    "gemma3": lambda **k: transformers.Gemma3TextConfig(
        **GROUPED,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=0.5,
        **k,
    ),
    "gpt2": lambda **k: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **k),
    # experts that lie in the folder one by one and in the model as one tensor
    "qwen3_moe": lambda **k: transformers.Qwen3MoeConfig(
        **GROUPED,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        **k,
    ),
    "granite": lambda **k: transformers.GraniteConfig(**GROUPED, logits_scaling=3.0, **k),
    "cohere": lambda **k: transformers.CohereConfig(**GROUPED, logit_scale=0.25, **k),
}
"""Random-weight configurations that differ in head, positions, attention and cache."""


def build_model(name: str) -> transformers.PreTrainedModel:
    """A random model over the tiny tokenizer's vocabulary; logits spread enough that samples vary."""
    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = ARCHITECTURES[name](vocab_size=len(tokenizer), initializer_range=0.3, **ids)
    with seeded(7):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 0.34 M parameter model, untrained, as a folder."""
    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def _policies() -> dict[str, Policy]:
    return {}


@pytest.fixture
def make_policy(_policies: dict[str, Policy]) -> Callable[[str], Policy]:
    """A fresh policy of two layers and width 16 by architecture name; the test may train it."""

    def make(name: str) -> Policy:
        if name not in _policies:
            config = ModelConfig(path=name, device="cpu")
            _policies[name] = policy_from_model(build_model(name), tiny_tokenizer(), config=config)
        return copy.deepcopy(_policies[name])

    return make


@pytest.fixture
def make_prompts(tokenizer: transformers.PreTrainedTokenizerFast) -> Callable[..., list[Prompt]]:
    """Prompts from texts."""

    def make(*texts: str) -> list[Prompt]:
        return [
            Prompt(
                prompt_id=f"test/{i}", prompt=text, token_ids=np.array(tokenizer(text).input_ids), columns={}
            )
            for i, text in enumerate(texts)
        ]

    return make
