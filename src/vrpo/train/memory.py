"""How much memory a run takes: an estimate from the model's shape, and what the process has really used.

    peak = what is there all the time + the larger of what sampling and what learning take on top

Counted for the Llama family in plain PyTorch; `benchmarks/memory.py` and `smoke/test_memory.py` compare with measured peaks.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vrpo.config import Config
from vrpo.functional.chunked_head import rows_of_a_chunk
from vrpo.rollout.lookback import shares_prompts
from vrpo.train.shape import ModelShape, adapter_parameters, uses_reference

FP32 = 4
"""Bytes of a number; weights, gradients, moments and, on a CPU, everything else."""
LOADED_LATER = 100 * 2**20
"""What a run imports and keeps besides what a plan has loaded: model code, data sets, records."""
REPLAY_BYTES = 18
"""Of a token of a response that the denoiser keeps: its number, two masks, log-probability and reward."""
LOGIT_COPIES = 7
"""Tensors of the size of a chunk's logits alive at once: logits, log p, p, gradient and what they are made of."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose."""

    lasting: dict[str, float]
    """There from the first step on."""
    sampling: dict[str, float]
    """Only while responses are sampled."""
    learning: dict[str, float]
    """Only while one of the networks is updated."""

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.lasting.values()) + max(sum(self.sampling.values()), sum(self.learning.values()))


def memory_plan(config: Config, shape: ModelShape, *, prompt_tokens: int, device: torch.device) -> MemoryPlan:
    """What a run of `config` takes, in fp32 as on a CPU; a GPU holds all but the libraries.

    Args:
        config: the run.
        shape: of its model.
        prompt_tokens: tokens of a long prompt; every response is taken to have its full length.
        device: what samples; a CPU may keep a prompt once for its samples.
    """
    critic = config.critic
    policy_trained = adapter_parameters(config, shape) or shape.parameters
    lasting = {
        "Python and its libraries": resident() + LOADED_LATER,
        "policy weights": FP32 * shape.parameters,
        "policy moments": 2 * FP32 * policy_trained,
    }
    critic_trained = 0
    if critic is not None and critic.trunk == "own":
        whole = shape.of_depth(critic.layers)
        critic_trained = adapter_parameters(config, shape) or whole
        lasting["critic weights"] = FP32 * whole
        lasting["critic moments"] = 2 * FP32 * critic_trained
        if critic.semantic.mode != "off":
            lasting["frozen language-model head"] = FP32 * shape.embedding
    if config.denoiser is not None:
        lasting["denoiser weights"] = FP32 * shape.parameters
        lasting["denoiser moments"] = 2 * FP32 * policy_trained
        lasting["denoiser replay"] = (
            REPLAY_BYTES * config.denoiser.capacity * (prompt_tokens + config.rollout.max_completion_length)
        )
    if uses_reference(config) and adapter_parameters(config, shape) is None:
        lasting["reference weights"] = FP32 * shape.parameters
    cached, rows = _cached_tokens(config, shape, prompt_tokens, device)
    sampling = {
        "KV cache": 2 * FP32 * shape.layers * shape.kv_width * cached,
        "logits of a step": FP32 * rows * shape.vocabulary,
    }
    tokens, counted = _microbatch(config, prompt_tokens)
    rows_of_logits = min(counted, rows_of_a_chunk(shape.vocabulary))
    learning = {
        "gradients": FP32 * max(policy_trained, critic_trained),
        "activations of a microbatch": FP32 * _activations(config, shape, prompt_tokens, tokens, counted),
        "logits of a chunk": LOGIT_COPIES * FP32 * rows_of_logits * shape.vocabulary,
        "gradient of the head": FP32 * shape.embedding,
    }
    if critic is not None and critic.trunk == "policy":
        learning["hidden states for the critic"] = (
            FP32
            * config.train.completions_per_step
            * (prompt_tokens + config.rollout.max_completion_length)
            * shape.hidden
        )
    return MemoryPlan(
        *({name: float(size) for name, size in part.items()} for part in (lasting, sampling, learning))
    )


def _cached_tokens(
    config: Config, shape: ModelShape, prompt_tokens: int, device: torch.device
) -> tuple[int, int]:
    """Tokens whose keys and values sampling or evaluation keeps, the larger of both, and the most rows of a batch."""
    train, rollout = config.train, config.rollout
    by_stage = []
    for decoded, samples in (
        (train.completions_per_step, rollout.num_generations),
        (train.eval_prompts * train.eval_samples, train.eval_samples),
    ):
        rows = min(rollout.batch_size, decoded)
        lean = shape.lean and adapter_parameters(config, shape) is None
        shared = lean and shares_prompts(device, float(samples), prompt_tokens)
        prompts = -(-rows // samples) if shared else rows
        by_stage.append((prompts * prompt_tokens + rows * rollout.max_completion_length, rows))
    return max(tokens for tokens, _ in by_stage), max(rows for _, rows in by_stage)


def _microbatch(config: Config, prompt_tokens: int) -> tuple[int, int]:
    """Tokens a pass with gradients reads, and how many of them are of responses."""
    train, new = config.train, config.rollout.max_completion_length
    largest = max(train.minibatch, 0 if config.denoiser is None else config.denoiser.minibatch or 0)
    rows = min(train.microbatch, largest)
    prompts = -(-rows // config.rollout.num_generations)
    tokens = prompts * prompt_tokens + rows * new
    if train.activation_checkpointing:
        tokens = rows * (prompt_tokens + new)
    limit = train.max_tokens_per_microbatch
    if limit is not None and tokens > limit:
        tokens = max(limit, prompt_tokens + new)
    return tokens, min(tokens, rows * new)


def _activations(
    config: Config, shape: ModelShape, prompt_tokens: int, tokens: int, of_responses: int
) -> float:
    """Numbers kept for the backward pass of so many tokens: norms, rotary embedding, attention, gated feed-forward."""
    wide = 4 * shape.hidden + 4 * shape.query_width + 2 * shape.kv_width
    layer = wide + 4 * shape.feed_forward
    if config.train.activation_checkpointing:
        return tokens * (shape.hidden * shape.layers + layer)
    # a prompt's keys and values are there once more for every response that reads them; per token of the responses
    prompt_share = prompt_tokens / config.rollout.max_completion_length
    shared = 2 * shape.kv_width + 2 * prompt_share * (shape.query_width + shape.kv_width)
    return shape.layers * (
        tokens * layer + (of_responses * shared if config.rollout.num_generations > 1 else 0.0)
    )


def resident() -> int:
    """Bytes of physical memory this process holds now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else 0


def peak_bytes(device: torch.device) -> int:
    """The most memory taken so far: by this process on a CPU, of the device's own on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kibibytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
