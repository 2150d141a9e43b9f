"""Log-probabilities and entropies of chosen tokens straight from hidden states, a chunk of rows at a time.

    hidden [N, d] ──@ weight.T (+ bias) * logit_scale, softcap, / temperature──> logits [chunk, V] ──> [N]

N tokens by V words of logits is the largest tensor of a training step, so it never exists: each chunk is
reduced at once and computed again in the backward pass. Logits and sums are fp32, entropies and
log-probabilities are in nats.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vrpo.functional.chunked_head import ChosenAndEntropy, HeadForm, rows_of_a_chunk


def linear_logprobs_and_entropy(
    hidden: Float[Tensor, "N d"],
    weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, " N"],
    *,
    temperature: float,
    chunk: int | None = None,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log p(token) and H(p) for p = softmax(logits / temperature), without an N x V tensor.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)
        logp   = logits[token] / temperature - logsumexp(logits / temperature)
        H      = -sum_v p_v log p_v

    The gradient with respect to hidden, weight and bias is exact; any of them may be frozen.

    Args:
        hidden: last hidden states, any floating dtype. N may be 0.
        weight: the language-model head.
        token_ids: the chosen tokens.
        temperature: > 0; divides the logits.
        chunk: rows whose logits exist at one time; memory is chunk * V * 4 bytes, about three times over. None: as
            many as make CHUNK_LOGITS logits.
        bias: of the head, if it has one.
        softcap: logits are squashed into (-softcap, softcap), as Gemma does; None: not.
        logit_scale: factor on the logits before the cap, as Cohere and Granite have it.
        dtype: what hidden and weight are rounded to for their product and its gradients, sums staying fp32; None: no
            rounding.

    Returns:
        logp, entropy: fp32, nats.
    """

    form = HeadForm(temperature=temperature, softcap=softcap, logit_scale=logit_scale, dtype=dtype)
    rows = chunk or rows_of_a_chunk(len(weight), weight.device.type)
    logp, entropy = ChosenAndEntropy.apply(hidden, weight, bias, token_ids.long(), form, rows)
    return logp, entropy


def linear_kl(
    hidden_p: Float[Tensor, "N dp"],
    weight_p: Float[Tensor, "V dp"],
    hidden_q: Float[Tensor, "N dq"],
    weight_q: Float[Tensor, "V dq"],
    *,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), p and q the softmaxes of two heads, without an N x V tensor.

    p is data: the gradient flows to hidden_q and weight_q only.

    Args:
        hidden_p: hidden states of the distribution that is the target.
        weight_p: its head.
        hidden_q: hidden states of the distribution that is fitted.
        weight_q: its head, over the same vocabulary.
        chunk: rows whose logits exist at one time; None: as many as make CHUNK_LOGITS logits.
        temperature: divides the logits of both.

    Returns:
        fp32, nats, >= 0 up to rounding.
    """

    form = HeadForm(temperature=temperature)

    def rows(h_p: Tensor, h_q: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = torch.log_softmax(
                form.logits(h_p, weight_p, None),
                dim=-1,
            )
        log_q = torch.log_softmax(
            form.logits(h_q, weight_q, None),
            dim=-1,
        )
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    parts = []
    chunk = chunk or rows_of_a_chunk(len(weight_q), weight_q.device.type)
    # one empty chunk when N = 0: the result stays connected to hidden_q, so that backward() works
    for start in range(0, max(len(hidden_q), 1), chunk):
        h_p, h_q = hidden_p[start : start + chunk], hidden_q[start : start + chunk]
        if torch.is_grad_enabled():
            parts.append(checkpoint(rows, h_p, h_q, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(rows(h_p, h_q))
    return torch.cat(parts)


def token_logprobs(
    logits: Float[Tensor, "*batch V"], token_ids: Int[Tensor, "*batch"], *, temperature: float
) -> Float[Tensor, "*batch"]:
    """log softmax(logits / temperature)[token]: the plain version, for short inputs and cross-checks.

    Args:
        logits: of the whole vocabulary, any floating dtype.
        token_ids: the chosen tokens.
        temperature: > 0; divides the logits.

    Returns:
        fp32, nats.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    return log_p.gather(-1, token_ids.long()[..., None]).squeeze(-1)


def token_entropy_and_nll(
    hidden: Float[Tensor, "B T d"],
    weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, "B T"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Entropy H(p_t) and negative log-likelihood -log p_t(token t), p_t = softmax(W h_t), chunked and exact.

    Args:
        hidden: h_t, the state *before* token t.
        weight: the language-model head.
        token_ids: token t.
        chunk: rows whose logits exist at one time; None: as many as make CHUNK_LOGITS logits.

    Returns:
        entropy, nll: fp32, nats; log-perplexity is another name of nll.
    """
    logp, entropy = linear_logprobs_and_entropy(
        hidden.flatten(0, 1), weight, token_ids.flatten(), temperature=1.0, chunk=chunk
    )
    return entropy.view(token_ids.shape), -logp.view(token_ids.shape)
