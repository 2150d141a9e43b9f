"""PPO and GRPO arithmetic written to be obviously right: loops over tokens, one number at a time.

Same contracts as the functions of the same name in `vrpo.functional`, on numpy arrays in fp64. Imports
nothing from `vrpo`; slow on purpose. The parity tests compare the two.
"""

import math

import numpy as np

LOG_RATIO_LIMIT = 20.0


def gae_one(rewards, values, bootstrap, mask, *, gamma, lam):
    """GAE of one sequence, lam a number for each state: keep only the tokens the policy chose, then walk back from the end."""
    chosen = [t for t in range(len(mask)) if mask[t]]
    advantages, targets = np.zeros(len(mask)), np.zeros(len(mask))
    value_next, advantage_next, lam_next = float(bootstrap), 0.0, 0.0
    for t in reversed(chosen):
        delta = rewards[t] + gamma * value_next - values[t]
        advantages[t] = delta + gamma * lam_next * advantage_next
        targets[t] = advantages[t] + values[t]
        value_next, advantage_next, lam_next = values[t], advantages[t], lam[t]
    return advantages, targets


def gae(rewards, values, bootstrap, mask, *, gamma, lam):
    """GAE of [B, T] arrays; lam is one number, one per sequence, or one per state."""
    lams = np.broadcast_to(np.reshape(lam, np.shape(lam) + (1,) * (2 - np.ndim(lam))), np.shape(mask))
    rows = [
        gae_one(rewards[b], values[b], bootstrap[b], mask[b], gamma=gamma, lam=lams[b])
        for b in range(len(mask))
    ]
    return np.array([a for a, _ in rows]), np.array([r for _, r in rows])


def discounted_returns(rewards, bootstrap, mask, *, gamma):
    """Monte-Carlo returns of [B, T] arrays, straight from the definition: a sum for every token."""
    returns = np.zeros(np.shape(mask))
    for b in range(len(mask)):
        chosen = [t for t in range(len(mask[b])) if mask[b][t]]
        for i, t in enumerate(chosen):
            later = sum(gamma**k * rewards[b][s] for k, s in enumerate(chosen[i:]))
            returns[b, t] = later + gamma ** (len(chosen) - i) * bootstrap[b]
    return returns


def group_advantages(rewards, group_ids, *, scale, valid):
    """Reward minus the mean of the valid rewards of its group, maybe over (sample std + 1e-4)."""
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        group = [rewards[j] for j in range(len(rewards)) if valid[j] and group_ids[j] == group_ids[i]]
        if not valid[i] or all(x == group[0] for x in group):
            continue
        mean = math.fsum(group) / len(group)
        out[i] = rewards[i] - mean
        if scale == "std":
            variance = math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1)
            out[i] /= math.sqrt(variance) + 1e-4
    return out


def ppo_clip_loss(logp, old_logp, advantages, mask, *, clip_low, clip_high, num_tokens):
    """Loss and sums as a dict, token by token."""
    out = dict.fromkeys(
        ("loss", "clip_low_count", "clip_high_count", "approx_kl_sum", "ratio_sum", "ratio_sq_sum"), 0.0
    )
    for b, t in np.ndindex(np.shape(mask)):
        if not mask[b][t]:
            continue
        log_ratio = min(max(logp[b][t] - old_logp[b][t], -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
        ratio, a = math.exp(log_ratio), advantages[b][t]
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        out["loss"] -= min(ratio * a, clipped * a) / num_tokens
        out["clip_low_count"] += a < 0 and ratio < 1 - clip_low
        out["clip_high_count"] += a > 0 and ratio > 1 + clip_high
        out["approx_kl_sum"] += ratio - 1 - log_ratio
        out["ratio_sum"] += ratio
        out["ratio_sq_sum"] += ratio**2
    return out


def value_mse_loss(values, targets, mask, *, num_tokens, old_values=None, clip=None):
    """Half the squared error summed over tokens that count, over num_tokens."""
    total = 0.0
    for b, t in np.ndindex(np.shape(mask)):
        if mask[b][t]:
            error = (values[b][t] - targets[b][t]) ** 2
            if clip is not None:
                step = min(max(values[b][t] - old_values[b][t], -clip), clip)
                error = max(error, (old_values[b][t] + step - targets[b][t]) ** 2)
            total += error / 2
    return total / num_tokens


def kl_estimate(logp, ref_logp, *, kind):
    """Schulman's estimators of one token's KL(policy || reference)."""
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    d = min(max(d, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
    return math.exp(-d) - 1 + d


def explained_variance(targets, predictions):
    """1 - Var(R - V) / Var(R) of two lists; NaN when R does not vary."""
    spread = np.var(targets)
    return (
        math.nan if min(targets) == max(targets) else 1 - np.var(np.subtract(targets, predictions)) / spread
    )


def auc(scores, labels):
    """Share of (positive, negative) pairs in the right order; a tie is half right."""
    wins, pairs = 0.0, 0
    for s, positive in zip(scores, labels, strict=True):
        for q, other in zip(scores, labels, strict=True):
            if positive and not other:
                pairs += 1
                wins += 1.0 if s > q else 0.5 if s == q else 0.0
    return wins / pairs if pairs else math.nan


def sample_token(logits, uniform, *, temperature, top_k, top_p):
    """One draw: cut, renormalise, walk along the vocabulary until the mass passed exceeds `uniform`.

    Returns (token, its log-probability after the cuts, its log-probability before them).
    """
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    p = [w / math.fsum(weights) for w in weights]
    ranked = sorted(range(len(p)), key=lambda v: (-logits[v], v))
    if top_k > 0:
        ranked = ranked[:top_k]
    mass = math.fsum(p[v] for v in ranked)
    kept, held = [], 0.0
    for v in ranked:
        if kept and held >= top_p:
            break
        kept.append(v)
        held += p[v] / mass
    kept_mass = math.fsum(p[v] for v in kept)
    possible = [v for v in sorted(kept) if p[v] > 0]
    passed, token = 0.0, possible[-1]
    for v in possible:
        passed += p[v]
        if passed > uniform * kept_mass:
            token = v
            break
    return token, math.log(p[token] / kept_mass), math.log(p[token])
