"""Learning rules: one small module each."""

from vrpo.algorithms.base import Algorithm
from vrpo.algorithms.grpo import Grpo
from vrpo.algorithms.ppo import Ppo
from vrpo.config.learning import AlgorithmConfig, GrpoConfig, PpoConfig


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The rule for a configuration section."""
    match config:
        case PpoConfig():
            return Ppo(config)
        case GrpoConfig():
            return Grpo(config)


__all__ = ["Algorithm", "Grpo", "Ppo", "build_algorithm"]
