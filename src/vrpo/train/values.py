"""Stage 4: what the frozen reference, the denoiser's model and the critic, before their update, say about the sampled tokens."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vrpo.algorithms.critic_objective import CriticObjective, CriticState, value_feature_uncertainty
from vrpo.errors import NumericsError
from vrpo.functional import uncertainty_features
from vrpo.models.backbone import spread
from vrpo.models.critic import Critic
from vrpo.models.policy import Policy, Reference
from vrpo.train.update import Split
from vrpo.types import OF_POSITIONS, Batch


@torch.no_grad()
def evaluate_batch(
    batch: Batch,
    *,
    reference: Reference | None,
    critic: Critic | None,
    objective: CriticObjective | None,
    state: CriticState,
    temperature: float,
    split: Split,
    believer: Policy | None = None,
    features: Literal["none", "uncertainty", "belief"] = "none",
) -> tuple[Batch, CriticState]:
    """The batch with ref_logp, belief_logp, values, bootstrap, uncertainty features and the semantic selection, as far as
    anything needs them.

    Args:
        batch: the step's samples.
        reference: the frozen model, where its log-probabilities or entropies are needed.
        critic: the value model, before its update.
        objective: chooses the tokens of the semantic losses.
        state: what the objective remembers.
        temperature: of the reference's log-probabilities.
        split: cuts the batch into forward passes; memory and time only.
        believer: the denoiser's model, before its update.
        features: whose uncertainty the critic reads: the reference's or the believer's.
    """
    columns: dict[str, Tensor] = {}
    for rows, micro in split(batch):
        found: dict[str, Tensor] = {}
        if reference is not None:
            found["ref_logp"], found["ref_entropy"] = _read(reference, micro, temperature=temperature)
        if believer is not None:
            found["belief_logp"], found["belief_entropy"] = _read(believer, micro, temperature=1.0)
        if features != "none":
            of = "ref" if features == "uncertainty" else "belief"
            doubts = uncertainty_features(found[f"{of}_entropy"], -found[f"{of}_logp"], micro.mask)
            # behind its end a short response would otherwise depend on how long its neighbours are
            doubts = torch.where(micro.attention_mask[..., None], doubts, 0.0)
            micro = micro.with_(features=doubts)  # noqa: PLW2901 (the same rows, with one field more)
            found["features"] = doubts
        if critic is not None:
            found |= _read_critic(critic, micro, objective)
        for name, piece in found.items():
            _write(columns, name, piece, rows, batch)
    chosen_by = columns.get("entropy"), columns.get("nll")
    if objective is not None and objective.selects_by_reference:
        chosen_by = columns["ref_entropy"], -columns["ref_logp"]
    batch = batch.with_(
        ref_logp=columns.get("ref_logp"),
        belief_logp=columns.get("belief_logp"),
        values=columns.get("values"),
        bootstrap=columns.get("bootstrap"),
        features=columns.get("features"),
        trunk_states=columns.get("trunk_states", batch.trunk_states),
    )
    entropy, nll = chosen_by
    if objective is not None and entropy is not None and nll is not None:
        batch, state = objective.select(entropy, nll, batch, state)
    return batch, state


def _write(columns: dict[str, Tensor], name: str, piece: Tensor, rows: Tensor, batch: Batch) -> None:
    """Put what was found for some rows, trimmed to the longest of them, where it belongs in the whole batch."""
    if name not in columns:
        whole = batch.input_ids if name in OF_POSITIONS else batch.mask
        widest = () if name == "bootstrap" else whole.shape[1:]
        columns[name] = piece.new_zeros(len(batch), *widest, *piece.shape[1 + len(widest) :])
    if piece.dim() == 1:
        columns[name][rows] = piece
    else:
        columns[name][rows, : piece.shape[1]] = piece


def _read_critic(critic: Critic, micro: Batch, objective: CriticObjective | None) -> dict[str, Tensor]:
    """V before each token that counts [b, t], V after the last token [b] (0 where only the sampler has read), and the value features'
    uncertainty."""
    last = micro.attention_mask.sum(dim=1, keepdim=True) - 1
    before = at = pad(micro.mask, (0, 1))
    if micro.trunk_states is None:
        at = before.scatter(1, last, True)
        states = critic.states_at(micro.input_ids, micro.attention_mask, at, micro.shared_prompts)
    else:  # the sampler has read all but the last token, after which nothing asks for a value
        states = micro.trunk_states[at]
    flat = critic.forward_tokens(states, None, None if micro.features is None else micro.features[at]).values
    values = torch.zeros(at.shape, device=flat.device).masked_scatter(at, flat)
    _check_finite(values, micro)
    found = {
        "values": torch.where(micro.mask, values[:, :-1], 0.0),
        "bootstrap": values.gather(1, last).squeeze(1),
    }
    if critic.borrowed and micro.trunk_states is None:
        found["trunk_states"] = spread(states, at)
    if objective is not None and objective.selects_by_value:
        counting = states.index_select(0, before[at].nonzero().squeeze(1))
        found["entropy"], found["nll"] = value_feature_uncertainty(critic, counting, micro)
    return found


def _check_finite(values: Tensor, micro: Batch) -> None:
    """Raise NumericsError when the critic's values are not numbers any more."""
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.any(dim=1).nonzero()[0])
        raise NumericsError(
            f"the critic's value of sample {micro.sample_ids[row]} is not finite; start again with a lower "
            "critic.learning_rate",
            batch=micro,
        )


def _read(model: Reference | Policy, micro: Batch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """A language model's log-probabilities and entropies of the tokens that count [b, t]."""
    return model.logprobs_and_entropy(
        micro.input_ids,
        micro.attention_mask,
        micro.mask,
        temperature=temperature,
        prompts=micro.shared_prompts,
    )


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """The frozen model's states [N, d] at chosen positions and its head weight [V, d], for KL(p_ref || p_t)."""

    reference: Reference

    def __call__(self, batch: Batch, at: Tensor) -> tuple[Tensor, Tensor]:
        states = self.reference.states_at(batch.input_ids, batch.attention_mask, at, batch.shared_prompts)
        return states, self.reference.head_weight
