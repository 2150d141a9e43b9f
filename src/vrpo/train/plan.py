"""What a configuration will do: batch sizes, memory, work. Trains nothing.

Estimates are arithmetic over the model's shape, stated with their assumptions; only the machine's matrix
multiplication speed is measured.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vrpo.config import Config
from vrpo.config.learning import PpoConfig
from vrpo.errors import ModelError
from vrpo.models import resolve_path

FP32 = 4
"""Bytes of a number."""
LOGIT_ROWS = 1024
"""Rows of logits alive at once: the chunk of `functional.linear_logprobs_and_entropy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory and time depend on."""

    parameters: int
    embedding: int
    """Vocabulary x hidden size: one head's weights."""
    layers: int
    hidden: int
    vocabulary: int
    kv_width: int
    """Numbers a token adds to each of K and V, per layer."""


def read_shape(config: Config, model_config: Path | None) -> ModelShape:
    """The model's shape from its config.json, without its weights.

    Raises:
        ModelError: the config.json cannot be read, or is of no causal language model with attention.
    """
    if model_config is None and config.model is None:
        raise ModelError("the configuration names no model; add model.path, or give --model-config FILE")
    source = str(model_config) if model_config or config.model is None else resolve_path(config.model.path)
    try:
        hf: Any = AutoConfig.from_pretrained(source).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf)
        heads = hf.num_attention_heads
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{source} does not describe an attention language model ({str(error).splitlines()[0]}); give --model-config FILE"
        ) from error
    kv_heads = getattr(hf, "num_key_value_heads", None) or heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=hf.vocab_size * hf.hidden_size,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        vocabulary=hf.vocab_size,
        kv_width=kv_heads * head_dim,
    )


def memory_plan(config: Config, shape: ModelShape, *, prompt_tokens: int) -> dict[str, float]:
    """Bytes by purpose, fp32.

    Weights, gradients and two AdamW moments take 16 bytes a trained parameter. Activations are counted as 16
    hidden-sized numbers a layer and token of the micro-batch; logits as three copies of one chunk.
    """
    length = prompt_tokens + config.rollout.max_completion_length
    lora = config.model.lora if config.model else None
    # an adapter adds rank * (in + out) to each of about seven linear layers of width ~hidden
    trained = shape.parameters if lora is None else 14 * lora.rank * shape.hidden * shape.layers
    plan = {"policy weights": FP32 * shape.parameters, "policy gradients and moments": 3 * FP32 * trained}
    if config.critic is not None:
        plan["critic weights"] = FP32 * shape.parameters
        plan["critic gradients and moments"] = 3 * FP32 * trained
        if config.critic.semantic.mode != "off":
            plan["frozen language-model head"] = FP32 * shape.embedding
    if _uses_reference(config) and lora is None:
        plan["reference weights"] = FP32 * shape.parameters
    tokens = config.train.microbatch * length
    plan["activations of a microbatch"] = 16 * FP32 * shape.hidden * shape.layers * tokens
    plan["logits of a chunk"] = 3 * FP32 * min(LOGIT_ROWS, tokens) * shape.vocabulary
    rows = min(config.rollout.batch_size, config.train.completions_per_step)
    plan["KV cache"] = 2 * FP32 * shape.layers * shape.kv_width * rows * length
    return {name: float(size) for name, size in plan.items()}


def work_plan(config: Config, shape: ModelShape, *, prompt_tokens: int) -> dict[str, float]:
    """Floating-point operations of one step by phase: 2 a parameter and token forward, 6 with backward."""
    count, group = config.train.completions_per_step, config.rollout.num_generations
    new = count * config.rollout.max_completion_length
    whole = new + count * prompt_tokens
    forward = 2.0 * shape.parameters
    plan = {"rollout": forward * (new + count // group * prompt_tokens)}
    passes = float(config.critic is not None) + float(_uses_reference(config))
    if passes:
        plan["values"] = passes * forward * whole
    if config.critic is not None:
        plan["critic"] = config.critic.epochs * 3 * forward * whole
    plan["policy"] = config.train.epochs * 3 * forward * whole
    return plan


def matmul_speed(device: torch.device, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Measured floating-point operations per second of fp32 matrix multiplication."""
    a = torch.ones(size, size, device=device)
    a @ a  # the first call pays for set-up
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count * 2 * size**3 / (time.perf_counter() - start)


def _uses_reference(config: Config) -> bool:
    semantic = config.critic.semantic if config.critic is not None else None
    by_critic = semantic is not None and (
        semantic.mode == "kl_ref" or (semantic.mode == "literal" and semantic.selector == "reference")
    )
    return config.algorithm.kl_coef > 0 or (isinstance(config.algorithm, PpoConfig) and by_critic)
