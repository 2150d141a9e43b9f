"""The records that stages hand to each other, in the order the data meets them.

    tasks ──Prompt──> rollout ──Rollout──> rewards ──ScoredRollout──> collate ──Batch──> algorithm

Records are frozen: a stage adds by making a new one, so the clean reward survives the noise and the
sampled tokens survive everything. Time convention, used everywhere: s_t is the prompt and all tokens
before token t; token t is chosen in s_t; r_t is paid for token t; v_t = V(s_t) is predicted *before*
token t exists; `bootstrap` is V after the last token. A mask is True where a position counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = Mapping[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": ...}."""

Stop = Literal["eos", "stop_string", "length"]
"""Why a response ended. "length" means it was cut off: its outcome is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question to the policy.

    Example: Prompt(prompt_id="train/17", prompt="12+34=", token_ids=array([3, 4, 12, 5, 6, 13]),
                    columns={"answer": "46"})
    """

    prompt_id: str
    """"<split>/<row>": the same question has the same id in every step; names its noise streams."""
    prompt: str | tuple[Message, ...]
    """What the user wrote: plain text, or chat messages. Reward functions see this."""
    token_ids: np.ndarray
    """[P] int64; what the model reads: the chat template and special tokens included."""
    columns: Mapping[str, Any]
    """The other columns of the data set; passed to reward functions by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response. A multi-turn dialogue is one sequence in which `action_mask` is False on
    the tokens of the prompt and of the environment.

    Example, prompt of two tokens, response of two and EOS = 2:
    Rollout(sample_id="s12/p7/k3", prompt=..., token_ids=array([9, 4, 8, 11, 2]),
            action_mask=array([0, 0, 1, 1, 1], bool), logprobs=array([0, 0, -.1, -.7, -.2]),
            policy_logprobs=array([0, 0, -.1, -.7, -.2]), completion="46", stop="eos", policy_version=11)
    """

    sample_id: str
    """"s<step>/p<prompt in step>/k<sample>"; names the random streams of this sample."""
    prompt: Prompt
    token_ids: np.ndarray
    """[L] int64: prompt, then response; the EOS token is included when stop == "eos"."""
    action_mask: np.ndarray
    """[L] bool: True where the policy chose the token."""
    logprobs: np.ndarray
    """[L] float32, nats: log-probability under the distribution the token was drawn from (after
    temperature, top-k and top-p). 0.0 where action_mask is False."""
    policy_logprobs: np.ndarray
    """[L] float32, nats: log-probability after temperature alone, which is what the trainer recomputes.
    Equal to `logprobs` unless top-k or top-p cut the distribution. 0.0 where action_mask is False."""
    completion: str
    """The response as text, without special tokens and without a stop string."""
    stop: Stop
    policy_version: int
    """Number of steps in which the sampling weights had been moved."""
    states: np.ndarray | None = None
    """[num_actions, d] float32: the policy's final hidden state that chose each token; None where nobody asked for it."""

    @property
    def num_actions(self) -> int:
        """Number of tokens the policy chose."""
        return int(self.action_mask.sum())


class NextToken(NamedTuple):
    """What a policy says of the next token of each of N rows."""

    logits: Float[Tensor, "N V"]
    """fp32."""
    states: Float[Tensor, "N d"] | None
    """The final hidden states that the logits were made from; None where the model gives logits alone."""

    def of(self, rows: Int[Tensor, " K"]) -> "NextToken":
        """The same of these rows."""
        return NextToken(self.logits[rows], None if self.states is None else self.states[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its verdict, before and after noise.

    Example: ScoredRollout(rollout=..., parts={"exact": 1.0}, clean_reward=1.0, reward=0.0)  # flipped
    """

    rollout: Rollout
    parts: Mapping[str, float | None]
    """Value of each reward function before weighting and noise; None where it was missing."""
    clean_reward: float | None
    """The verdict that is trusted: gold's, or without gold the weighted sum of `parts` before any noise; only metrics and evaluation may
    read it."""
    reward: float | None
    """What the learner sees. None is *missing*: the sample leaves every loss and every denominator."""
    errors: tuple[str, ...] = ()
    """One line per reward function that raised or returned something unusable for this sample."""
    gold_errors: tuple[str, ...] = ()
    """The same of gold functions in training, where their failure costs metrics alone."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Which rows of a batch answer the same prompt."""

    first: Int[Tensor, " P"]
    """For each prompt, a row that holds it."""
    of_row: Int[Tensor, " B"]
    """For each row, its prompt."""
    lengths: Int[Tensor, " P"]
    """Tokens of each prompt."""

    @classmethod
    def of(cls, group_ids: Int[Tensor, " B"], prompt_lengths: Int[Tensor, " B"]) -> "SharedPrompts | None":
        """Rows of equal group id share their first `prompt_lengths` tokens; None when every row stands alone."""
        groups, of_row = group_ids.unique(return_inverse=True)
        if len(groups) == len(group_ids):
            return None
        rows = torch.arange(len(group_ids), device=group_ids.device)
        first = torch.zeros_like(groups).scatter_reduce(0, of_row, rows, "amin", include_self=False)
        return cls(first, of_row, prompt_lengths[first])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scored rollouts as padded tensors, B sequences of L tokens on one device.

    Per-token fields have T = L - 1 columns: column t describes token t + 1 of `input_ids`, chosen in the
    state that the model has read at position t. So `hidden[:, :-1]`, `logits[:, :-1]` and V line up with
    `mask`, `old_logp`, `rewards` without a shift. Sequences are padded on the right.

    Example, prompt [9, 4], response [8, 2], reward 1:
        input_ids = [9, 4, 8, 2]    mask = [F, T, T]    rewards = [0, 0, 1]    values = [V(9), V(9 4), V(9 4 8)]
    """

    sample_ids: tuple[str, ...]
    group_ids: Int[Tensor, " B"]
    """Samples of one prompt share a group id."""
    prompt_lengths: Int[Tensor, " B"]
    """Tokens before the first one that the policy chose; samples of one prompt share them."""
    input_ids: Int[Tensor, "B L"]
    attention_mask: Bool[Tensor, "B L"]
    """True on real tokens, False on padding."""
    mask: Bool[Tensor, "B T"]
    """True where the policy chose the token *and* the sample counts (its reward is not missing)."""
    old_logp: Float[Tensor, "B T"]
    """`Rollout.policy_logprobs`, nats."""
    rewards: Float[Tensor, "B T"]
    """r_t in reward units: the reward seen by the learner, on the last token of the response."""
    scores: Float[Tensor, " B"]
    """The reward seen by the learner, one per sequence; 0 where it is missing (mask is False there)."""
    clean_scores: Float[Tensor, " B"]
    """The clean reward, NaN where unknown. Diagnostics only: no loss, advantage or target reads it."""
    valid: Bool[Tensor, " B"]
    """False where the reward is missing."""
    truncated: Bool[Tensor, " B"]
    """stop == "length"."""
    ref_logp: Float[Tensor, "B T"] | None = None
    """Log-probability under the frozen reference, nats; None when nothing needs it."""
    values: Float[Tensor, "B T"] | None = None
    """v_t of the critic before the update, fp32; None without a critic."""
    bootstrap: Float[Tensor, " B"] | None = None
    """V after the last token, fp32; what it is used for is the algorithm's truncation rule. 0 where that does not ask for it and the
    sampler's states are the critic's."""
    features: Float[Tensor, "B L F"] | None = None
    """What the frozen model's uncertainty says in each state (`uncertainty_features`): column t once position t is read;
    None when nothing needs it."""
    trunk_states: Float[Tensor, "B L d"] | None = None
    """The policy's hidden states from the last prompt token on, kept for a critic that borrows the policy's trunk: that does
    not move before the critic has learned. Column t once position t is read, by the sampler or, where that keeps none, before
    the update; None for a critic with a backbone of its own."""
    belief_logp: Float[Tensor, "B T"] | None = None
    """Log-probability under the denoiser's model before its update, nats, 0 where mask is False; None without a denoiser."""
    denoised: Float[Tensor, " B"] | None = None
    """The reward policy and critic learn from instead of `scores`, in the same units; None without a denoiser."""
    selected_entropy: Bool[Tensor, "B T"] | None = None
    """S_H, the tokens of the semantic entropy loss; None when it is off."""
    selected_nll: Bool[Tensor, "B T"] | None = None
    """S_P, the tokens of the semantic perplexity loss; None when it is off."""
    coverage: Float[Tensor, "B T"] | None = None
    """Probability that the policy goes on as one of the siblings has, at each token (`functional.covered_values`); None where values
    are the critic's alone."""
    advantages: Float[Tensor, "B T"] | None = None
    targets: Float[Tensor, "B T"] | None = None
    """R_t, what the critic regresses on, reward units."""
    share_prompts: bool = True
    """Whether a pass over the batch reads a prompt once for all its samples (`train.microbatches`)."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count: the denominator of a loss over this batch."""
        return int(self.mask.sum())

    @property
    def policy_scores(self) -> Tensor:
        """[B] The reward the policy learns from: denoised where that is done, else the seen one."""
        return self.scores if self.denoised is None else self.denoised

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """Which sequences answer the same prompt, to be read once; None when each has its own, or is read with each."""
        return SharedPrompts.of(self.group_ids, self.prompt_lengths) if self.share_prompts else None

    def select(self, rows: Tensor) -> "Batch":
        """The sequences `rows`, with right padding trimmed to the longest of them."""
        length = int(self.attention_mask[rows].sum(dim=1).max())
        chosen: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "sample_ids":
                chosen[name] = tuple(value[i] for i in rows.tolist())
            elif isinstance(value, Tensor):
                columns = length if name in OF_POSITIONS else length - 1
                chosen[name] = value[rows] if value.dim() == 1 else value[rows, :columns]
            else:
                chosen[name] = value
        return Batch(**chosen)

    def with_(self, **changes: Any) -> "Batch":
        """A copy with some fields set: how a later stage adds what it computed."""
        return replace(self, **changes)


def join(parts: Sequence[Batch]) -> Batch:
    """The sequences of several batches in one, padded to the longest; group ids are renumbered, part by part.

    Only what sampling and scoring gave is kept: of values, advantages and the like the parts may have different ones.
    """
    length = max(part.input_ids.shape[1] for part in parts)
    columns: dict[str, Any] = {}
    for name in SAMPLED:
        pieces = [getattr(part, name) for part in parts]
        if pieces[0].dim() == 2:
            pieces = [
                torch.nn.functional.pad(x, (0, length - part.input_ids.shape[1]))
                for x, part in zip(pieces, parts, strict=True)
            ]
        columns[name] = torch.cat(pieces)
    groups, first = [], 0
    for part in parts:
        numbers, of_row = part.group_ids.unique(return_inverse=True)
        groups.append(of_row + first)
        first += len(numbers)
    names = tuple(name for part in parts for name in part.sample_ids)
    return Batch(sample_ids=names, group_ids=torch.cat(groups), **columns)


OF_POSITIONS = ("input_ids", "attention_mask", "features", "trunk_states")
"""Fields of a batch with a column per position, L; the others that are per token have T = L - 1."""

SAMPLED = tuple(
    name
    for name, f in Batch.__dataclass_fields__.items()
    if f.default is MISSING and name not in ("sample_ids", "group_ids")
)
"""Fields of a batch that exist from collation on, one row per sequence."""

Metrics = dict[str, float]
"""Metric name -> value, as written to metrics.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Clean accuracy on held-out prompts.

    Example: EvalResult(greedy=0.41, sampled=0.36, entropy=0.52, best_sampled=0.36, prompts=256, judged=256, samples=1, missing=0)
    """

    greedy: float
    """Mean clean reward of one greedy completion per prompt."""
    sampled: float
    """Mean clean reward of `samples` completions per prompt at `rollout.temperature`."""
    entropy: float
    """Of the policy at that temperature, nats a token: mean of -log pi over the tokens of the sampled completions."""
    best_sampled: float
    """Mean over prompts of the highest clean reward among the `samples`: pass@k of a 0/1 reward, k = `samples`."""
    prompts: int
    judged: int
    """Prompts whose greedy completion has a clean reward: those that `greedy` is the mean of."""
    samples: int
    missing: int
    """Completions whose clean reward was missing, the denoiser's among them; they are left out of every mean."""
    denoiser_greedy: float | None = None
    """As `greedy`, of the denoiser's model sampled as a policy; None without a denoiser, or if none of its completions has a clean reward."""
    completions: tuple[ScoredRollout, ...] = field(default=(), repr=False)
    """The greedy ones."""
    sampled_completions: tuple[ScoredRollout, ...] = field(default=(), repr=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    moved = {
        name: value.to(device)
        for name in batch.__dataclass_fields__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    return batch.with_(**moved)
