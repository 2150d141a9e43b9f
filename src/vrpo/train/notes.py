"""What a run says of its settings before it starts, where studies have shown that they are seldom meant."""

from vrpo.config import Config

OFTEN = 10
"""Times a prompt is drawn, from which on a denoiser is seen to learn it by heart: it did at 25 (recipes/arith_cpu/few_prompts*.yaml)."""


def notes(config: Config, *, prompts: int) -> list[str]:
    """A line for each finding.

    Args:
        config: of the run.
        prompts: how many it trains on.
    """
    return [*_slow_critic(config), *_never_warm(config), *_prompts_by_heart(config, prompts)]


def _slow_critic(config: Config) -> list[str]:
    """A line where the critic learns more slowly than the policy whose returns it predicts."""
    if config.critic is None or config.critic.learning_rate >= config.train.learning_rate:
        return []
    return [
        f"note: critic.learning_rate={config.critic.learning_rate:g} is below train.learning_rate={config.train.learning_rate:g}; a critic "
        "that learns more slowly than the policy explains little: in the recipes it has two to five times the policy's rate"
    ]


def _never_warm(config: Config) -> list[str]:
    """A line where the policy's learning rate never reaches its peak."""
    train = config.train
    steps = train.steps - (config.critic.warmup_steps if config.critic is not None else 0)
    if steps < 1 or train.lr_warmup_steps <= steps:
        return []
    return [
        f"note: train.lr_warmup_steps={train.lr_warmup_steps} is more than the policy's {steps} steps: its rate ends at "
        f"{steps / train.lr_warmup_steps:.0%} of train.learning_rate, and train.lr_schedule does nothing"
    ]


def _prompts_by_heart(config: Config, prompts: int) -> list[str]:
    """A line where a denoiser would learn the prompts and their errors by heart."""
    drawn = (
        config.train.steps * config.train.completions_per_step // config.rollout.num_generations // prompts
    )
    if config.denoiser is None or drawn < OFTEN:
        return []
    return [
        f"note: each of the {prompts:,} prompts is drawn about {drawn} times, and a denoiser learns by heart what it sees so often: errors that "
        "stay with an answer count as right then; compare with denoiser: null on held-out prompts (docs/guides/noise.md)"
    ]
