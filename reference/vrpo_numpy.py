"""VRPO's critic terms and reward noise written to be obviously right: loops, one number at a time.

Same contracts as the functions of the same name in `vrpo.functional`, on numpy arrays in fp64. Imports
nothing from `vrpo`; slow on purpose. The parity tests compare the two.
"""

import math

import numpy as np


def gaussian_kl_one(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) of one latent vector, nats, summed over dimensions."""
    total = 0.0
    for m, v in zip(mean, logvar, strict=True):
        total += 0.5 * (m * m + math.exp(v) - 1 - v)
    return total


def reparameterise_one(mean, logvar, noise):
    """A sample of one latent vector: mean + standard deviation * noise."""
    return [m + math.sqrt(math.exp(v)) * e for m, v, e in zip(mean, logvar, noise, strict=True)]


def softmax(logits):
    """Probabilities of one row of logits."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def logprob_and_entropy(hidden, weight, token, *, temperature, bias=None, softcap=None, logit_scale=1.0):
    """log p(token) and entropy of one state, by writing out the whole vocabulary."""
    logits = []
    for v in range(len(weight)):
        x = sum(float(h) * float(w) for h, w in zip(hidden, weight[v], strict=True))
        x = (x + (0.0 if bias is None else float(bias[v]))) * logit_scale
        if softcap is not None:
            x = softcap * math.tanh(x / softcap)
        logits.append(x / temperature)
    p = softmax(logits)
    return math.log(p[token]), -math.fsum(q * math.log(q) for q in p if q > 0)


def token_entropy_and_nll(hidden, weight, token_ids):
    """Entropy and negative log-likelihood of every token, [B, T] each."""
    entropy, nll = np.zeros(np.shape(token_ids)), np.zeros(np.shape(token_ids))
    for b, t in np.ndindex(np.shape(token_ids)):
        logp, h = logprob_and_entropy(hidden[b][t], weight, token_ids[b][t], temperature=1.0)
        entropy[b, t], nll[b, t] = h, -logp
    return entropy, nll


def categorical_kl(logits_p, logits_q):
    """KL(p || q) of two rows of logits."""
    p, q = softmax(logits_p), softmax(logits_q)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def uncertain_tokens(scores, mask, *, fraction, threshold=None):
    """True where the score is strictly above the threshold, by default the (1 - fraction)-quantile."""
    counted = [scores[i] for i in np.ndindex(np.shape(mask)) if mask[i]]
    if not counted:
        return np.zeros(np.shape(mask), dtype=bool)
    tau = np.quantile(counted, 1 - fraction) if threshold is None else threshold
    tau = np.float32(tau)  # scores are fp32: a threshold closer to one of them than that is that score
    chosen = np.zeros(np.shape(mask), dtype=bool)
    for i in np.ndindex(np.shape(mask)):
        chosen[i] = mask[i] and scores[i] > tau
    return chosen


def flip_rewards(rewards, *, false_positive, false_negative, uniforms):
    """Each 0/1 reward inverted when its uniform is below the rate of its class."""
    seen = []
    for r, u in zip(rewards, uniforms, strict=True):
        rate = false_negative if r == 1 else false_positive
        seen.append(1 - r if u < rate else r)
    return seen


def debias_rewards(rewards, *, false_positive, false_negative):
    """(seen - rho+) / J."""
    return [(r - false_positive) / (1 - false_positive - false_negative) for r in rewards]
