"""Random models of known shapes for the GPU benchmark, in full and small."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.speed.scaling import Words
from vrpo.models import Policy

ENDLESS: dict[str, Any] = {"tie_word_embeddings": True, "bos_token_id": None, "pad_token_id": 0}


def sampled(*, quick: bool) -> LlamaConfig:
    """SmolLM2-135M's shape."""
    if quick:
        return LlamaConfig(
            vocab_size=1024,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            eos_token_id=1,
            **ENDLESS,
        )
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        eos_token_id=1,
        **ENDLESS,
    )


def trained(*, quick: bool) -> Qwen2Config:
    """Qwen2-0.5B's shape."""
    if quick:
        return Qwen2Config(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            eos_token_id=1,
            **ENDLESS,
        )
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        eos_token_id=1,
        **ENDLESS,
    )


def random_model(config: Any, device: torch.device) -> Any:
    """A model of this shape, drawn on the device, that no token stops."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to(device)
    model.generation_config.eos_token_id = None
    return model


def policy_of(model: Any) -> Policy:
    """The model as a policy: fp32 weights, bf16 passes."""
    return Policy(model, Words(), compute_dtype=torch.bfloat16, adapter=False)


def parameters(model: Any) -> tuple[int, int]:
    """Parameters, and those of them in the embedding, which is also the head."""
    count = sum(p.numel() for p in model.parameters())
    return count, model.get_input_embeddings().weight.numel()
