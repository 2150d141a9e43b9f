"""log p(token) and entropy from hidden states and a language-model head, chunk by chunk in both directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vrpo.functional.fused import fused

CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**27}
"""Logits of a chunk, by device: 2 MiB in fp32, which stays in the cache while it is reduced and is taken from the allocator
without new pages, and 512 MiB where few rows would leave the device idle."""
FEWEST_ROWS = 128
"""Of a chunk: fewer, and reading the head's weight again for each costs more than the cache saves."""


def rows_of_a_chunk(vocabulary: int, device: str = "cpu") -> int:
    """Rows whose logits make at most CHUNK_LOGITS numbers, but no fewer than FEWEST_ROWS."""
    return max(CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // vocabulary, FEWEST_ROWS)


def head_product(
    hidden: Float[Tensor, "C d"], weight: Float[Tensor, "V d"], bias: Tensor | None = None
) -> Float[Tensor, "C V"]:
    """h W^T + b in fp32, from operands of one dtype. bf16 on a GPU: the sums leave the matrix units unrounded."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits + bias
    return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """How logits come from h W^T + b."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    dtype: torch.dtype | None = None
    """What h and W are rounded to for their product. None: nothing is rounded, the wider of the two holds. Where autocast
    would have the model's own head multiply in bf16, that is the more exact one."""

    def operands(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """h and W as they enter the product."""
        dtype = self.dtype or torch.promote_types(hidden.dtype, weight.dtype)
        return hidden.to(dtype), weight.to(dtype)

    def logits(
        self, hidden: Float[Tensor, "C d"], weight: Float[Tensor, "V d"], bias: Tensor | None
    ) -> Tensor:
        """fp32 logits [C, V] of one chunk: what the sampler draws from and the trainer differentiates."""
        logits = head_product(*self.operands(hidden, weight), bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def backward(self, grad: Float[Tensor, "C V"], logits: Float[Tensor, "C V"]) -> Tensor:
        """From d loss / d logits to d loss / d (h W^T + b); overwrites `grad`."""
        if self.softcap is not None:  # tanh' = 1 - tanh^2
            grad *= 1.0 - (logits * (self.temperature / self.softcap)) ** 2
        factor = self.logit_scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


class ChosenAndEntropy(torch.autograd.Function):
    """(hidden, W, b) -> (log p(token), H), chunk by chunk in both directions.

        d logp / d logit_v = [v = token] - p_v        d H / d logit_v = -p_v (log p_v + H)

    The backward pass computes the logits again, unless they were a single chunk. One buffer gathers the gradient
    of W over all chunks.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd hands everything over by position
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, form: HeadForm, rows: int
    ) -> tuple[Tensor, Tensor]:
        """logp [N] and H [N], fp32, from hidden [N, d], weight [V, d], bias [V] and ids [N]; `rows` a chunk."""
        count = len(hidden)
        logp, entropy, log_z = (hidden.new_empty(count, dtype=torch.float32) for _ in range(3))
        logits = None
        h, w = form.operands(hidden, weight)
        for start in range(0, count, rows):
            here = slice(start, start + rows)
            logits = form.logits(h[here], w, bias)
            logp[here], entropy[here], log_z[here] = _reduce_logits(logits, ids[here])
        ctx.form, ctx.rows = form, rows
        ctx.save_for_backward(hidden, weight, bias, ids, log_z, entropy, logits if count <= rows else None)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, where they are wanted."""
        hidden, weight, bias, ids, log_z, entropy, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        h, w = ctx.form.operands(hidden, weight)
        sums = torch.promote_types(hidden.dtype, weight.dtype)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, len(hidden), ctx.rows):
            here = slice(start, start + ctx.rows)
            logits = ctx.form.logits(h[here], w, bias) if kept is None else kept
            grads = [None if g is None else g[here] for g in (grad_logp, grad_entropy)]
            g = _grad_logits(logits, (ids[here], log_z[here], entropy[here]), grads)
            g = ctx.form.backward(g, logits).to(w.dtype)
            if grad_hidden is not None:
                grad_hidden[here] = (g @ w).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, g.T, h[here])
            if grad_bias is not None:
                grad_bias += g.sum(dim=0).to(grad_bias.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias,
            None,
            None,
            None,
        )


LEAST = torch.finfo(torch.float32).min
"""In place of a forbidden token's log p of -inf, since 0 log 0 counts as 0 and not as NaN."""


@fused
def _reduce_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(token), entropy and log Z of each row."""
    log_z = torch.logsumexp(logits, dim=-1)
    logp = logits.gather(-1, ids[:, None]).squeeze(-1) - log_z
    log_p = logits - log_z[:, None]
    p = log_p.exp()
    # the one allocates nothing, the other can be compiled into the same kernel as all above
    if logits.is_cuda:
        return logp, -(p * log_p.clamp(min=LEAST)).sum(dim=-1), log_z
    entropy = -torch.linalg.vecdot(p, log_p)
    if bool(entropy.isnan().any()):  # a forbidden token, or NaN in the logits, which stays
        entropy = -torch.linalg.vecdot(p, log_p.clamp(min=LEAST))
    return logp, entropy, log_z


@fused
def _grad_logits(
    logits: Tensor, chunk: tuple[Tensor, Tensor, Tensor], grads: Sequence[Tensor | None]
) -> Tensor:
    """d loss / d logits [C, V] of one chunk (ids, log Z, H), from those of logp and H."""
    (ids, log_z, entropy), (grad_logp, grad_entropy) = chunk, grads
    log_p = logits - log_z[:, None]
    p = log_p.exp()
    grad = torch.zeros_like(p) if grad_logp is None else p * -grad_logp[:, None]
    if grad_entropy is not None:
        grad -= p * (log_p.clamp(min=LEAST) + entropy[:, None]) * grad_entropy[:, None]
    if grad_logp is not None:
        grad.scatter_add_(1, ids[:, None], grad_logp[:, None])
    return grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b
