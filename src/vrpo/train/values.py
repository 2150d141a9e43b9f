"""Stage 4: what the frozen reference and the critic, before its update, say about the sampled tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.algorithms.critic_objective import CriticObjective, CriticState, value_feature_uncertainty
from vrpo.errors import NumericsError
from vrpo.models.critic import Critic
from vrpo.models.policy import Reference
from vrpo.train.update import split
from vrpo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """Per-token columns of a batch, filled micro-batch by micro-batch."""

    columns: dict[str, Tensor]

    def put(self, name: str, rows: slice, piece: Tensor, like: Tensor) -> None:
        """Write [b, t] into rows of the [B, T] column `name`."""
        column = self.columns.setdefault(name, torch.zeros_like(like))
        column[rows, : piece.shape[1]] = piece


@torch.no_grad()
def evaluate_batch(
    batch: Batch,
    *,
    reference: Reference | None,
    critic: Critic | None,
    objective: CriticObjective | None,
    state: CriticState,
    temperature: float,
    microbatch: int,
) -> tuple[Batch, CriticState]:
    """The batch with ref_logp, values, bootstrap and the semantic selection, as far as anything needs them."""
    pieces = _Pieces(columns={})
    bootstrap = torch.zeros_like(batch.scores)
    for number, micro in enumerate(split(batch, microbatch)):
        rows = slice(number * microbatch, number * microbatch + len(micro))
        if reference is not None:
            _read_reference(
                reference, micro, pieces, rows, batch, temperature=temperature, objective=objective
            )
        if critic is not None:
            hidden = critic.hidden(micro.input_ids, micro.attention_mask)
            values = critic.values_of(hidden)
            _check_finite(values, micro)
            pieces.put("values", rows, values[:, :-1], batch.old_logp)
            last = micro.attention_mask.sum(dim=1) - 1
            bootstrap[rows] = values.gather(1, last[:, None]).squeeze(1)
            if objective is not None and objective.selects_by_value:
                for name, piece in zip(
                    ("entropy", "nll"), value_feature_uncertainty(critic, hidden, micro), strict=True
                ):
                    pieces.put(name, rows, piece, batch.old_logp)
    columns = pieces.columns
    batch = batch.with_(ref_logp=columns.get("ref_logp"), values=columns.get("values"))
    if critic is not None:
        batch = batch.with_(bootstrap=bootstrap)
    if objective is not None and "entropy" in columns:
        batch, state = objective.select(columns["entropy"], columns["nll"], batch, state)
    return batch, state


def _check_finite(values: Tensor, micro: Batch) -> None:
    """Raise NumericsError when the critic's values are not numbers any more."""
    bad = ~values.isfinite() & micro.attention_mask
    if bool(bad.any()):
        row = int(bad.any(dim=1).nonzero()[0])
        raise NumericsError(
            f"the critic's value of sample {micro.sample_ids[row]} is not finite; start again with a lower "
            "critic.learning_rate",
            batch=micro,
        )


def _read_reference(
    reference: Reference,
    micro: Batch,
    pieces: _Pieces,
    rows: slice,
    batch: Batch,
    *,
    temperature: float,
    objective: CriticObjective | None,
) -> None:
    logp, entropy = reference.logprobs_and_entropy(
        micro.input_ids, micro.attention_mask, micro.mask, temperature=temperature
    )
    pieces.put("ref_logp", rows, logp, batch.old_logp)
    if objective is not None and objective.selects_by_reference:
        pieces.put("entropy", rows, entropy, batch.old_logp)
        pieces.put("nll", rows, -logp, batch.old_logp)


@dataclass(frozen=True, slots=True)
class ReferenceFeatures:
    """The frozen model's hidden states [B, L, d] and head weight [V, d], for KL(p_ref || p_t)."""

    reference: Reference

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.reference.hidden(batch.input_ids, batch.attention_mask), self.reference.head_weight
