"""What the training loop asks of whatever samples responses."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vrpo.types import Prompt, Rollout


@runtime_checkable
class LivePolicy(Protocol):
    """What a sampler needs of the policy; `vrpo.models.Policy` is one."""

    tokenizer: Any
    compute_dtype: torch.dtype
    """Precision of forward passes."""

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model."""
        ...

    @property
    def backbone(self) -> Any:
        """The model below its language-model head."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model was built for; None when it does not say."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a response."""
        ...

    def next_token_logits(
        self,
        input_ids: Int[Tensor, "B L"],
        last: Int[Tensor, " B"] | None = None,
        *,
        cache: Any = None,
        **inputs: Any,
    ) -> Float[Tensor, "B V"]:
        """fp32 logits of the token after position `last` of each row (None: after the final column).

        With `cache` the model goes on from what that holds, and extends it.
        """
        ...

    @property
    def why_no_cache(self) -> str | None:
        """Why keys and values alone do not carry the model from token to token; None when they do."""
        ...

    def lean_step(self, cache: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
        """A faster way to read one more token per row after what `cache` holds; None where there is none.

        It maps tokens [A], their positions [A] and the mask [A, S] of all cached tokens, the new one included (None: all
        real), to fp32 logits [A, V].
        """
        ...


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
