"""The batch plan every run starts with. Imports no torch."""

from vrpo.config import Config


def batch_plan(config: Config) -> list[str]:
    """How many completions go where, in the three units every batch size is counted in."""
    train, group = config.train, config.rollout.num_generations
    minibatches = train.completions_per_step // train.minibatch
    micro = max(train.minibatch // train.microbatch, 1)
    limit = train.max_tokens_per_microbatch
    tokens = "" if limit is None else f", cut further where they exceed {limit:,} tokens"
    lines = [
        f"{train.completions_per_step // group} prompts x {group} generations = {train.completions_per_step} completions a step",
        f"-> {minibatches} minibatches of {train.minibatch} -> {micro} microbatches of {train.minibatch // micro}{tokens}",
    ]
    updates = f"-> {train.epochs * minibatches} policy"
    if config.critic is not None:
        updates += f" + {config.critic.epochs * minibatches} critic"
    if (denoiser := config.denoiser) is not None:
        heard = train.completions_per_step * (1 + denoiser.replay)
        updates += f" + {-(-heard // (denoiser.minibatch or train.minibatch))} denoiser"
    lines.append(f"{updates} optimizer steps a step")
    total = f"{train.steps} steps = {train.steps * train.completions_per_step:,} completions"
    if config.critic is not None and config.critic.warmup_steps:
        total += f"; the policy stands still for the first {config.critic.warmup_steps}"
    return [*lines, total]
