"""What a step of a configuration will compute. Trains nothing.

Arithmetic over the model's shape; only the machine's matrix multiplication speed is measured.
"""

import time

import torch

from vrpo.config import Config
from vrpo.train.shape import ModelShape, uses_reference


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
        values += critic
        # a borrowed trunk is read, not trained
        plan["critic"] = config.critic.epochs * (1 if borrowed else 3) * critic * whole
    if config.denoiser is not None:
        values += forward
        plan["denoiser"] = (1 + config.denoiser.replay) * 3 * forward * whole
    if values:
        plan["values"] = values * whole
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
