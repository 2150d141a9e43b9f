"""The policy: a causal language model that says how likely each sampled token was.

Time convention (vrpo.types): column t of a [B, T] tensor describes token t + 1 of `input_ids`, chosen in
the state read at position t. Sequences are padded on the right.

The language-model head runs only on the tokens that count, in chunks: logits of all positions at once
would be the largest tensor of a training step.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vrpo.errors import ModelError
from vrpo.functional import linear_logprobs_and_entropy
from vrpo.models.backbone import (
    autocast,
    context_length,
    recomputing,
    shared_limit,
    spread,
    states_at,
    why_no_cache,
    with_cache,
    within,
)
from vrpo.models.lean import LeanModel, is_lean
from vrpo.models.lm_head import LmHead, head_of
from vrpo.models.static import StaticModel, is_static
from vrpo.types import NextToken, SharedPrompts

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-4
"""Largest difference between head(backbone(x)) and the model's own logits, fp32."""


@final
class Policy(nn.Module):
    """Any `AutoModelForCausalLM`, or a `peft` model around one.

    The wrapped model always stays in eval mode: dropout would make the log-probability of a token differ
    from the one it was drawn with, and the first ratio of PPO would not be 1.

    Args:
        model: the model, fp32 weights, on its device.
        tokenizer: saved next to the weights.
        compute_dtype: precision of forward passes; weights stay fp32.
        adapter: `model` is a `PeftModel`; then only its adapter is trained and saved.
        base_is_initial: that adapter was made for this run: it changed nothing at first, so the model below it
            is the initial policy. False for an adapter that was trained before.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        compute_dtype: torch.dtype,
        adapter: bool,
        base_is_initial: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.adapter = adapter
        self.base_is_initial = base_is_initial
        self.train(False)
        self.runs_head_alone = self._probe()
        self.shared_limit = shared_limit(self.backbone, vocabulary=self.vocabulary)

    def train(self, mode: bool = True) -> "Policy":
        """Set the flag of this module; the wrapped model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model; with an adapter, the one whose layers carry it."""
        return self.model.get_base_model() if self.adapter else self.model

    @property
    def backbone(self) -> Any:
        """The model below its language-model head."""
        base = self.causal_lm.base_model
        # Llama 4 has no attribute of the name that transformers looks for, and base_model is then the whole model
        return getattr(base, "model", base) if base is self.causal_lm else base

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Number of tokens the model embeds."""
        return int(self.causal_lm.get_input_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model may read; see `vrpo.models.backbone.context_length`."""
        return context_length(self.causal_lm)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a response: the tokenizer's and those of the generation settings."""
        listed = self.causal_lm.generation_config.eos_token_id
        listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
        return frozenset([*listed, self.tokenizer.eos_token_id])

    @property
    def head(self) -> LmHead:
        """The live language-model head."""
        head = head_of(self.causal_lm)
        assert head is not None, "the model has no plain linear head"
        # fp32 products are exact and, but on a GPU, not much slower
        rounds = self.device.type == "cuda" and self.compute_dtype != torch.float32
        return dataclasses.replace(head, dtype=self.compute_dtype) if rounds else head

    def hidden(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L d"]:
        """Last hidden states after the final norm; 0 at padding."""
        real = attention_mask.bool()  # tokenizers return integers
        return spread(self.states_at(input_ids, real, real), real)

    def states_at(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        at: Bool[Tensor, "B L"],
        prompts: SharedPrompts | None = None,
    ) -> Float[Tensor, "N d"]:
        """Last hidden states after the final norm, where `at` is True; see `vrpo.models.backbone.states_at`."""
        return states_at(
            self.backbone,
            input_ids,
            attention_mask,
            at,
            compute_dtype=self.compute_dtype,
            prompts=within(prompts, attention_mask, self.shared_limit),
        )

    def logprobs_and_entropy(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        mask: Bool[Tensor, "B T"],
        *,
        temperature: float,
        prompts: SharedPrompts | None = None,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """log pi(token t + 1 | tokens up to t) and the entropy of that distribution, nats, fp32.

        Args:
            input_ids: [B, L], right padded.
            attention_mask: [B, L], True on real tokens.
            mask: [B, T = L - 1], True where a token counts; only these meet the vocabulary.
            temperature: logits are divided by it.
            prompts: rows that answer the same prompt, which is then read once for all of them.

        Returns:
            Log-probabilities and entropies, both 0 where mask is False; gradients are exact.
        """
        targets = input_ids[:, 1:][mask]
        if self.runs_head_alone:
            head = self.head
            # the state at position t chooses token t + 1; nothing is chosen after the last
            chosen = self.states_at(input_ids, attention_mask, nn.functional.pad(mask, (0, 1)), prompts)
            logp, entropy = linear_logprobs_and_entropy(
                chosen,
                head.weight,
                targets,
                temperature=temperature,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                dtype=head.dtype,
            )
        else:
            with autocast(self.device, self.compute_dtype), recomputing(self.backbone):
                logits = self.causal_lm(input_ids=input_ids, use_cache=False).logits
            log_probs = torch.log_softmax(logits[:, :-1][mask].float() / temperature, dim=-1)
            logp = log_probs.gather(1, targets[:, None]).squeeze(1)
            entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)

    def next_token(
        self,
        input_ids: Int[Tensor, "B L"],
        last: Int[Tensor, " B"] | None = None,
        *,
        cache: Any = None,
        **inputs: Any,
    ) -> NextToken:
        """Logits of the token after position `last` of each row (None: after the final column).

        Args:
            input_ids: what the model reads now.
            last: [B] column index.
            cache: what the model has read before, to be gone on with and extended; None: nothing, and nothing is kept.
            **inputs: passed on to the model (attention_mask, position_ids).
        """
        model = self.backbone if self.runs_head_alone else self.causal_lm
        inputs |= {"use_cache": False} if cache is None else with_cache(model, cache)
        with autocast(self.device, self.compute_dtype):
            if self.runs_head_alone:
                states = self.backbone(input_ids=input_ids, **inputs).last_hidden_state
            else:
                states = self.causal_lm(input_ids=input_ids, **inputs).logits
        rows = torch.arange(len(states), device=states.device)
        chosen = states[:, -1] if last is None else states[rows, last]
        return (
            NextToken(self.head.logits(chosen), chosen)
            if self.runs_head_alone
            else NextToken(chosen.float(), None)
        )

    @property
    def why_no_cache(self) -> str | None:
        """Why keys and values alone do not carry the model from token to token; None when they do."""
        return why_no_cache(self.backbone)

    def lean_step(self) -> Callable[[Tensor, Tensor, Any], NextToken] | None:
        """See `LivePolicy.lean_step`: there is one for Llama, Qwen 2 and Qwen 3 without adapters."""
        if not self.runs_head_alone or not is_lean(self.backbone):
            return None
        model = LeanModel(self.backbone)

        def step(tokens: Tensor, positions: Tensor, past: Any) -> NextToken:
            with autocast(self.device, self.compute_dtype):
                states = model(tokens, positions, past)
            return NextToken(self.head.logits(states), states)

        return step

    def static_model(self) -> StaticModel | None:
        """See `LivePolicy.static_model`: there is one for Llama, Qwen 2 and Qwen 3, with or without LoRA adapters."""
        if not self.runs_head_alone or not is_static(self.backbone):
            return None
        return StaticModel(self.backbone, self.head, self.compute_dtype)

    def reference(self) -> "Reference":
        """The frozen initial policy; call it before the policy is trained.

        A copy of the model as it is now, adapter and all; only below a fresh adapter the base model itself, which
        costs no memory.
        """
        if self.base_is_initial:
            return Reference(self, shared=True)
        frozen = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})
        return Reference(frozen.requires_grad_(False), shared=False)

    def trainable_copy(self) -> "Policy":
        """A second policy with the weights of this one as they are now, trained like it: all of it, or its adapter."""
        return copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})

    def save_pretrained(self, folder: str | Path) -> None:
        """An ordinary folder of safetensors and tokenizer files, for `AutoModelForCausalLM.from_pretrained`.

        With an adapter the folder holds the adapter in place of the weights, for
        `peft.AutoPeftModelForCausalLM.from_pretrained`.
        """
        if self.adapter:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether head(backbone(x)) is the model's own logits, on eight tokens."""
        head = head_of(self.causal_lm)
        ids = torch.arange(8, device=self.device)[None] * 7 % self.vocabulary
        own = self.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        if bool(own.isnan().any()):
            raise ModelError(
                f"the logits of {type(self.causal_lm).__name__} are NaN: its weights are damaged, or the training that made "
                "them diverged; use an earlier checkpoint or another model"
            )
        if head is not None:
            states = self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
            if states.shape[-1] == head.weight.shape[1] and torch.allclose(
                head.logits(states), own, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE
            ):
                return True
        log.warning(
            "the head of %s cannot be run apart from the model; log-probabilities take the slower path through "
            "all logits",
            type(self.causal_lm).__name__,
        )
        return False


@final
class Reference:
    """The frozen initial model: a copy made when it was asked for, or the base model below a fresh adapter.

    Args:
        policy: the frozen copy, or the live policy with its adapter.
        shared: `policy` is the live one; its adapter is switched off during each call.
    """

    def __init__(self, policy: Policy, *, shared: bool) -> None:
        self._policy = policy
        self._shared = shared

    def hidden(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L d"]:
        """Last hidden states after the final norm, without gradient; 0 at padding."""
        with torch.no_grad(), self._frozen():
            return self._policy.hidden(input_ids, attention_mask)

    def states_at(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        at: Bool[Tensor, "B L"],
        prompts: SharedPrompts | None = None,
    ) -> Float[Tensor, "N d"]:
        """`Policy.states_at` of the frozen model, without gradient."""
        with torch.no_grad(), self._frozen():
            return self._policy.states_at(input_ids, attention_mask, at, prompts)

    def logprobs_and_entropy(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        mask: Bool[Tensor, "B T"],
        *,
        temperature: float,
        prompts: SharedPrompts | None = None,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """`Policy.logprobs_and_entropy` of the frozen model, without gradient."""
        with torch.no_grad(), self._frozen():
            return self._policy.logprobs_and_entropy(
                input_ids, attention_mask, mask, temperature=temperature, prompts=prompts
            )

    @property
    def head_weight(self) -> Float[Tensor, "V d"]:
        """W of softmax(W h), the logit scale included; detached."""
        head = self._policy.head
        weight = head.weight.detach()
        return weight if head.logit_scale == 1.0 else weight * head.logit_scale

    def _frozen(self) -> AbstractContextManager[Any]:
        return self._policy.model.disable_adapter() if self._shared else nullcontext()


def frozen_head(policy: Policy) -> Float[Tensor, "V d"]:
    """A detached clone of the language-model head, the logit scale included.

    A clone, because small models tie the head to the embedding: sharing memory would let the optimizer move it.
    A bias or a soft cap is not part of it; neither changes which tokens the features are near to.
    """
    head = policy.head
    return (head.weight.detach() * head.logit_scale).clone()
