"""What a step of a configuration will compute. Trains nothing.

Arithmetic over the model's shape; only the machine's matrix multiplication speed is measured.
"""

import time

import torch

from vrpo.config import Config
from vrpo.train.clock import wait_for_device
from vrpo.train.shape import ModelShape, sampler_reads_trunk, uses_reference

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""What `computes_on` may say, in short."""


def work_plan(config: Config, shape: ModelShape, *, prompt_tokens: int) -> dict[str, float]:
    """Floating-point operations of one step by phase: 2 a parameter and token forward, 6 with backward.

    A prompt is read once for all its responses.
    """
    count, group = config.train.completions_per_step, config.rollout.num_generations
    whole = count * config.rollout.max_completion_length + count // group * prompt_tokens
    forward = 2.0 * shape.parameters
    plan = {"rollout": forward * whole}
    values = forward * uses_reference(config)
    if config.critic is not None:
        borrowed = config.critic.trunk == "policy"
        critic = 2.0 * (shape.of_depth(None if borrowed else config.critic.layers) - shape.embedding)
        if not (sampler_reads_trunk(config) and computes_on(config)[0].type == "cpu"):
            values += critic
        # of a borrowed trunk the head alone is trained, on states that were read before
        plan["critic"] = 0.0 if borrowed else config.critic.epochs * 3 * critic * whole
    if config.denoiser is not None:
        values += forward
        plan["denoiser"] = (1 + config.denoiser.replay) * 3 * forward * whole
    if values:
        plan["values"] = values * whole
    plan["policy"] = config.train.epochs * 3 * forward * whole
    return plan


def computes_on(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where the forward passes of a run would run on this machine, and in which precision; on a CPU fp32 is what is measured."""
    model = config.model
    if not torch.cuda.is_available() or (model is not None and model.device == "cpu"):
        return torch.device("cpu"), torch.float32
    exact = model is not None and model.dtype == "float32"
    return torch.device("cuda"), torch.float32 if exact else torch.bfloat16


def matmul_speed(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Measured floating-point operations per second of matrix multiplication."""
    size = 1024 if device.type == "cpu" else 4096  # a GPU is not filled by less
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a  # the first call pays for set-up
    wait_for_device()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        wait_for_device()  # each time: a queue of products would hide the end of the time
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)
