"""What the training loop asks of whatever samples responses."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from vrpo.types import Prompt, Rollout


@runtime_checkable
class Engine(Protocol):
    """Prompts -> sampled responses."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        step: int,
        policy_version: int,
        greedy: bool = False,
        stream: str = "sample",
    ) -> list[Rollout]:
        """`num_generations` responses to each prompt, prompt by prompt: p0k0, p0k1, ..., p1k0, ...

        A response is a function of the weights, its prompt and the random stream (seed, stream, sample_id);
        it does not depend on what else is sampled beside it.

        Args:
            prompts: the questions; the same one may stand there twice.
            num_generations: responses per prompt.
            step: names the samples: sample_id = "s<step>/p<prompt>/k<sample>".
            policy_version: copied into the records.
            greedy: take the likeliest token instead of drawing one.
            stream: first label of the random streams, so that evaluation never shares draws with training.
        """
        ...
