"""What an algorithm is: two pure steps between collated rollouts and a gradient.

    Batch (values, reference log-probs) ──annotate──> Batch + advantages, targets ──loss──> scalar, sums

The training loop calls these and never asks which algorithm it has.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vrpo.types import Batch

Sums = dict[str, float]
"""Metric name -> sum over the tokens that count; the caller divides by their number."""


def read_sums(sums: Mapping[str, Tensor]) -> Sums:
    """The numbers of 0-d tensors, in one transfer: read one by one, each would wait for the GPU."""
    numbers = torch.stack([one.detach().double() for one in sums.values()]).tolist()
    return dict(zip(sums, numbers, strict=True))


@runtime_checkable
class Algorithm(Protocol):
    """A learning rule for the policy."""

    uses_critic: bool
    """Whether `annotate` needs `batch.values`, so that a critic must be built and trained."""
    uses_reference: bool
    """Whether `annotate` or `loss` needs `batch.ref_logp`."""

    def annotate(self, batch: Batch, *, kl_coef: float, explained_var: float | None = None) -> Batch:
        """The batch with `advantages` and, with a critic, `targets`; both 0 where mask is False.

        Args:
            batch: rewards, values and reference log-probabilities are in it.
            kl_coef: weight of the KL to the reference in force, where the rule pays it in the reward.
            explained_var: running explained variance of the critic over the steps before; None in the first.
        """
        ...

    def next_kl_coef(self, kl_coef: float, *, kl: float | None, responses: int) -> float:
        """The weight of the KL in the next step.

        Args:
            kl_coef: the weight in force.
            kl: this step's KL to the reference, nats a response; None when it is not computed.
            responses: sampled in this step.
        """
        ...

    def loss(self, logp: Tensor, entropy: Tensor, batch: Batch, *, num_tokens: int) -> tuple[Tensor, Sums]:
        """Scalar loss of a micro-batch and its metric sums.

        Args:
            logp: [B, T] log-probabilities under the weights being trained, nats.
            entropy: [B, T] entropies of the same distributions, nats; `entropy_coef` times their mean is subtracted.
            batch: the annotated micro-batch.
            num_tokens: tokens that count in the *whole* optimizer step, over all its micro-batches.
        """
        ...
