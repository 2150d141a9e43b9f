"""What the training loop asks of whatever samples responses."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vrpo.types import NextToken, Prompt, Rollout


@runtime_checkable
class OneToken(Protocol):
    """A policy that reads prompts, and then one token a row at a time, over key-value buffers that the caller owns."""

    dtype: torch.dtype
    """Of keys, values and masks."""
    kv_heads: int
    head_dim: int
    num_layers: int

    def refresh(self) -> None:
        """Take over the live weights."""
        ...

    def angles(self, length: int) -> tuple[Float[Tensor, "S d"], Float[Tensor, "S d"]]:
        """Cosines and signed sines of the rotary embedding at positions 0 ... length - 1."""
        ...

    def read(
        self,
        ids: Int[Tensor, "P W"],
        mask: Bool[Tensor, "P W"] | None,
        turn: tuple[Float[Tensor, "P W d"], Float[Tensor, "P W d"]],
    ) -> tuple[Float[Tensor, "P D"], list[Float[Tensor, "P kv2 W d"]]]:
        """States after the last tokens of prompts padded on the left, and each layer's keys and then values."""
        ...

    def states(
        self,
        tokens: Int[Tensor, " R"],
        turn: tuple[Float[Tensor, "R d"], Float[Tensor, "R d"]],
        slot: Int[Tensor, "1"],
        cache: Sequence[Float[Tensor, "R kv2 S d"]],
        bias: Float[Tensor, "R S"],
    ) -> Float[Tensor, "R D"]:
        """Final states after `tokens`, whose keys and values are written into column `slot`; nothing waits for the device."""
        ...

    def logits(self, states: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """fp32 logits of the next token."""
        ...


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

    def next_token(
        self,
        input_ids: Int[Tensor, "B L"],
        last: Int[Tensor, " B"] | None = None,
        *,
        cache: Any = None,
        **inputs: Any,
    ) -> NextToken:
        """Logits of the token after position `last` of each row (None: after the final column).

        With `cache` the model goes on from what that holds, and extends it.
        """
        ...

    @property
    def why_no_cache(self) -> str | None:
        """Why keys and values alone do not carry the model from token to token; None when they do."""
        ...

    def lean_step(self) -> Callable[[Tensor, Tensor, Any], NextToken] | None:
        """A faster way to read one more token per row; None where there is none.

        It maps tokens [R], their positions [R] and the `LookBack` on what the rows have read before, to which it adds
        them, to what comes after them.
        """
        ...

    def static_model(self) -> OneToken | None:
        """The policy as a CUDA graph can replay it; None for architectures that have no such form."""
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
        keep_states: bool = False,
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
            keep_states: also keep the hidden states that chose the tokens, where the engine has them (`Rollout.states`).
        """
        ...
