"""From records to the numbers of one line of metrics.jsonl. `train.catalogue` explains every name.

Everything about values is computed from `Batch.values`, the critic *before* its update: after it, a critic
that merely memorised the step would look perfect.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vrpo.functional import (
    auc,
    expected_calibration_error,
    explained_variance,
    explained_variance_by_position,
    frac_zero_std,
    kl_estimate,
    masked_mean,
    sibling_ranking_accuracy,
)
from vrpo.rewards import fault_kind
from vrpo.train.update import UpdateStats
from vrpo.types import Batch, Metrics, ScoredRollout

DECILES = 10


def rollout_metrics(scored: Sequence[ScoredRollout]) -> Metrics:
    """What was sampled and how it was judged."""
    lengths = torch.tensor([s.rollout.num_actions for s in scored], dtype=torch.float32)
    names = dict.fromkeys(name for s in scored for name in s.parts)
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/truncated_frac": _share(s.rollout.stop == "length" for s in scored),
        "val/num_eos_tokens": float(sum(s.rollout.stop == "eos" for s in scored)),
        "objective/entropy": float(-sum(s.rollout.policy_logprobs.sum() for s in scored) / len(scored)),
        "sampling/kept_mass": _kept_mass(scored),
        "policy/perplexity": _perplexity(scored),
        "rewards/errors": float(sum(bool(s.errors) for s in scored)),
        "rewards/missing": float(sum(s.reward is None for s in scored)),
    }
    if any(s.gold_errors for s in scored):
        metrics["rewards/gold_errors"] = float(sum(bool(s.gold_errors) for s in scored))
    kinds = Counter(kind for s in scored for kind in {fault_kind(line) for line in s.errors})
    metrics |= {f"rewards/errors/{kind}": float(count) for kind, count in sorted(kinds.items())}
    for name in names:
        values = [v for s in scored if (v := s.parts.get(name)) is not None]
        metrics[f"rewards/{name}/mean"] = _mean(values)
    return metrics


def _perplexity(scored: Sequence[ScoredRollout]) -> float:
    """exp(-mean log pi) over the sampled tokens."""
    total = sum(s.rollout.num_actions for s in scored)
    logp = sum(float(s.rollout.policy_logprobs.sum(dtype="float64")) for s in scored)
    return math.exp(min(-logp / max(total, 1), 700.0))  # beyond that it would overflow


def _kept_mass(scored: Sequence[ScoredRollout]) -> float:
    """Mean probability that top-k and top-p left to sample from: exp(policy_logprob - logprob)."""
    total = sum(s.rollout.num_actions for s in scored)
    kept = sum(
        float(
            torch.from_numpy((s.rollout.policy_logprobs - s.rollout.logprobs)[s.rollout.action_mask])
            .exp()
            .sum()
        )
        for s in scored
    )
    return kept / max(total, 1)


def mean_kl(batch: Batch, other: Tensor) -> float:
    """KL of the policy that sampled to another model: sum_t (log pi_t - other_t), mean over responses, nats; NaN where none counts.

    Args:
        batch: `old_logp` and `mask`.
        other: [B, T] log-probabilities of the same tokens under the other model.
    """
    per_token = kl_estimate(batch.old_logp, other, kind="k1")
    responses = int(batch.mask.any(dim=1).sum())
    return float(torch.where(batch.mask, per_token, 0.0).sum() / responses) if responses else math.nan


OF_NOISE = (
    "noise/false_", "noise/informativeness", "noise/seen_accuracy", "denoiser/accuracy", "denoiser/auc", "denoiser/corr"
)  # fmt: skip
"""How the names of those begin that compare the seen reward, or what the denoiser makes of it, with a clean one."""


def sampled_metrics(
    batch: Batch,
    scored: Sequence[ScoredRollout],
    denoising: Metrics,
    *,
    kl_coef: float,
    belief_coef: float,
    knows_clean: bool,
    has_gold: bool,
) -> Metrics:
    """What a step's samples say before anything learns from them.

    Args:
        batch: the samples, annotated.
        scored: the same with their text and verdicts.
        denoising: the denoiser's own.
        kl_coef: weight of the KL to the initial model in the reward.
        belief_coef: of that to the denoiser's model.
        knows_clean: False leaves out `OF_NOISE`: where the clean reward is the seen one by definition, they would call any judge perfect.
        has_gold: the clean reward is another function's: where its verdicts are 0 and 1 and the rewards are not, the units differ.
    """
    metrics = {
        **reward_metrics(batch, kl_coef=kl_coef, belief_coef=belief_coef),
        **rollout_metrics(scored),
        **critic_metrics(batch, has_gold=has_gold),
        **denoising,
    }
    return metrics if knows_clean else {k: v for k, v in metrics.items() if not k.startswith(OF_NOISE)}


def reward_metrics(batch: Batch, *, kl_coef: float, belief_coef: float) -> Metrics:
    """Seen and clean reward, the KL penalties, and how the noise behaved."""
    seen = batch.scores[batch.valid]
    known = batch.valid & ~batch.clean_scores.isnan()
    clean = batch.clean_scores[~batch.clean_scores.isnan()]
    kl = 0.0 if batch.ref_logp is None else mean_kl(batch, batch.ref_logp)
    to_belief = 0.0 if batch.belief_logp is None else mean_kl(batch, batch.belief_logp)
    metrics = {
        "objective/scores": float(seen.mean()) if len(seen) else math.nan,
        "objective/scores_clean": float(clean.mean()) if len(clean) else math.nan,
        "objective/non_score_reward": -kl_coef * kl - belief_coef * to_belief,
        "objective/scores_std": _spread(seen),
        "noise/frac_zero_std_seen": _without_difference(batch.scores, batch.group_ids, batch.valid),
        "noise/frac_zero_std_clean": _without_difference(
            batch.clean_scores.nan_to_num(), batch.group_ids, known
        ),
    }
    if batch.ref_logp is not None:
        metrics["objective/kl"] = kl
    metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    return metrics | _channel_metrics(batch.scores[known], batch.clean_scores[known])


def _spread(scores: Tensor) -> float:
    """Standard deviation; exactly 0 when all are equal."""
    if not len(scores):
        return math.nan
    return 0.0 if bool((scores == scores[0]).all()) else float(scores.double().std(correction=0))


def _without_difference(scores: Tensor, group_ids: Tensor, valid: Tensor) -> float:
    """Share of groups whose scores are all equal; NaN when no group has two to compare."""
    counted = group_ids[valid]
    if len(counted.unique()) == len(counted):
        return math.nan
    return float(frac_zero_std(scores, group_ids, valid))


def _channel_metrics(seen: Tensor, clean: Tensor) -> Metrics:
    """Live rates of the noise channel; only where both rewards are 0/1."""
    if not _binary(seen) or not _binary(clean):
        return {}
    false_positive = _mean(seen[clean == 0].tolist())
    false_negative = 1.0 - _mean(seen[clean == 1].tolist())
    return {
        "noise/false_positive": false_positive,
        "noise/false_negative": false_negative,
        "noise/informativeness": 1.0 - false_positive - false_negative,
        "noise/seen_accuracy": float((seen == clean).float().mean()) if len(seen) else math.nan,
    }


def critic_metrics(batch: Batch, *, has_gold: bool = False) -> Metrics:
    """How good the critic was on this step's data before it learned from it.

    With gold of 0 and 1 and rewards on another scale, clean outcomes are put into the rewards' units, as the mean reward of those that
    are wrong and of those that are right, and calibration, which is of probabilities, is left out.
    """
    if batch.values is None or batch.targets is None:
        return {}
    values, targets, mask = batch.values, batch.targets, batch.mask
    known = mask & ~batch.clean_scores.isnan()[:, None]
    counted = known.any(dim=1)
    clean, seen = batch.clean_scores, batch.scores[counted]
    scales = has_gold and _binary(clean[counted]) and not _binary(seen)
    if scales:
        wrong, right = _levels(seen, clean[counted])
        clean = torch.where(clean > 0.5, right, wrong)  # NaN where the other kind is missing
    clean_targets = clean.nan_to_num()[:, None].expand_as(values)
    metrics = {
        "val/explained_var": float(explained_variance(targets, values, mask)),
        "val/explained_var_clean": float(explained_variance(clean_targets, values, known)),
        "val/mean": float(masked_mean(values, mask)),
        "val/bias": float(masked_mean(values - targets, mask)),
        "val/return_mean": float(masked_mean(targets, mask)),
    }
    if batch.coverage is not None:
        metrics["val/coverage"] = float(masked_mean(batch.coverage, mask))
    by_position = explained_variance_by_position(targets, values, mask, bins=DECILES)
    metrics |= {f"val/explained_var_decile_{i}": float(x) for i, x in enumerate(by_position)}
    metrics |= _ranking_metrics(batch, values)
    if scales:
        metrics.pop("val/calibration", None)
    return metrics


def _ranking_metrics(batch: Batch, values: Tensor) -> Metrics:
    """Does V tell success from failure: at the start, middle and end of a response, and among siblings."""
    rows = batch.mask.any(dim=1) & ~batch.clean_scores.isnan()
    if not bool(rows.any()) or not _binary(batch.clean_scores[rows]):
        return {}
    values, mask, outcome = values[rows], batch.mask[rows], batch.clean_scores[rows]
    count = mask.cumsum(dim=1)
    total = count[:, -1]
    metrics: Metrics = {}
    for name, place in (("start", torch.ones_like(total)), ("middle", (total + 1) // 2), ("end", total)):
        column = (mask & (count == place[:, None])).float().argmax(dim=1, keepdim=True)
        at = values.gather(1, column).squeeze(1)
        metrics[f"val/auc_{name}"] = float(auc(at, outcome > 0.5))
        if name == "end":
            metrics["val/calibration"] = float(expected_calibration_error(at, outcome))
            metrics["val/sibling_accuracy"] = float(
                sibling_ranking_accuracy(at, outcome, batch.group_ids[rows])
            )
            metrics["val/verdict_accuracy"] = _verdict_accuracy(at, outcome, batch.scores[rows])
    return metrics


def _verdict_accuracy(end_values: Tensor, outcome: Tensor, seen: Tensor) -> float:
    """Share of responses whose clean verdict `V at the end > midpoint` gets right.

    Under flips V estimates rho+ + J q, so the midpoint is the mean of E[seen | 0] and E[seen | 1].
    """
    wrong, right = _levels(seen, outcome)
    if math.isnan(wrong + right):
        return math.nan
    midpoint = (wrong + right) / 2
    return float(((end_values > midpoint) == (outcome > 0.5)).float().mean())


def _levels(seen: Tensor, outcome: Tensor) -> tuple[float, float]:
    """Mean seen reward of wrong and of right responses; NaN where there are none."""
    return _mean(seen[outcome == 0].tolist()), _mean(seen[outcome == 1].tolist())


def policy_metrics(stats: UpdateStats) -> Metrics:
    """The policy's update; empty when it made no step, as in the critic's warm-up."""
    if stats.tokens == 0:
        return {"policy/skipped_updates": float(stats.skipped)} if stats.skipped else {}
    low, high, ratio = stats.mean("clip_low"), stats.mean("clip_high"), stats.mean("ratio")
    return {
        "loss/policy_avg": stats.mean("loss"),
        "policy/approxkl_avg": stats.mean("approx_kl"),
        "policy/clipfrac_avg": low + high,
        "policy/clipfrac_low": low,
        "policy/clipfrac_high": high,
        "policy/entropy_avg": stats.mean("entropy"),
        "policy/grad_norm": stats.grad_norm,
        "policy/skipped_updates": float(stats.skipped),
        "policy/corr_advantage_entropy": _correlation(stats),
        "val/ratio": ratio,
        "val/ratio_var": max(stats.mean("ratio_sq") - ratio**2, 0.0),
        # before the first optimizer step sampler and trainer have the same weights: any gap is a defect
        "sampling/trainer_kl": stats.first["approx_kl"],
        "sampling/trainer_ratio_error": abs(stats.first["ratio"] - 1.0),
    }


def _correlation(stats: UpdateStats) -> float:
    """Pearson correlation of |A| and entropy over tokens, from their five moments."""
    a, h = stats.mean("adv"), stats.mean("entropy")
    spread = (stats.mean("adv_sq") - a**2) * (stats.mean("entropy_sq") - h**2)
    return (stats.mean("adv_entropy") - a * h) / math.sqrt(spread) if spread > 0 else math.nan


def critic_update_metrics(stats: UpdateStats, *, beta: float, batch: Batch) -> Metrics:
    """The critic's update."""
    if stats.tokens == 0:
        return {"val/skipped_updates": float(stats.skipped)}
    metrics = {
        "loss/value_avg": stats.mean("loss"),
        "val/grad_norm": stats.grad_norm,
        "val/skipped_updates": float(stats.skipped),
        "val/bottleneck_kl": stats.mean("kl"),
        "val/bottleneck_beta": beta,
    }
    if batch.selected_entropy is not None and batch.selected_nll is not None:
        metrics["loss/semantic_avg"] = stats.mean("semantic")
        for kind in ("entropy", "nll"):
            count = stats.sums[f"selected_{kind}_count"]
            metrics[f"val/selected_{kind}"] = stats.sums[f"selected_{kind}"] / count if count else math.nan
        metrics["val/selected_entropy_frac"] = float(masked_mean(batch.selected_entropy.float(), batch.mask))
        metrics["val/selected_nll_frac"] = float(masked_mean(batch.selected_nll.float(), batch.mask))
    return metrics


def _share(flags: Iterable[bool]) -> float:
    return _mean([float(flag) for flag in flags])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else math.nan


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())
