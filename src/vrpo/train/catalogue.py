"""Every metric of metrics.jsonl: formula, healthy range, smell. `vrpo explain` and docs/metrics.md read this.

Names follow TRL's PPO trainer where it had one. Sums over t run over the tokens that count; V is the critic
*before* the step's update. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """What a metric counts, and how to read it."""

    formula: str
    """Definition with its unit."""
    healthy: str
    """What a good run shows."""
    smell: str
    """What a bad run shows, and where to look."""


_D = MetricDoc

METRICS: dict[str, MetricDoc] = {
    "step": _D("steps completed", "rises by 1", "a gap: the file was edited"),
    "episode": _D("responses sampled so far", "step * completions_per_step", "-"),
    "lr": _D("learning rate of the policy", "follows train.lr_schedule", "0 when the policy should learn"),
    "lr_critic": _D("learning rate of the critic", "2-5 times the policy's", "below the policy's: a critic that lags"),
    # objective
    "objective/scores": _D("mean reward as the learner sees it, noise included", "rises", "rises while objective/scores_clean does not: the noise is being learned"),
    "objective/scores_clean": _D("mean clean reward over the responses that have one (where gold covers some rows: over those alone); diagnostics only", "rises", "falls while objective/scores rises: reward hacking"),
    "objective/scores_std": _D("standard deviation of the seen reward over the step's responses", "above 0", "0: every response gets the same reward, nothing can be learned"),
    "objective/kl": _D("sum_t (log pi_t - log pi_ref_t), mean over responses, nats", "grows slowly, under 10", "jumps: learning rate too high, or kl_coef too low"),
    "objective/non_score_reward": _D("-kl_coef * objective/kl - belief_coef * denoiser/kl, reward units (a model that is not there counts 0), by k1 whatever algorithm.kl_estimator; GRPO has it in the loss", "small against objective/scores", "dominates: kl_coef or belief_coef too high"),
    "objective/rlhf_reward": _D("objective/scores + objective/non_score_reward", "rises", "falls while scores rise: the policy pays too much KL"),
    "objective/entropy": _D("-sum_t log pi_t of sampled responses, mean, nats a response", "falls slowly", "near 0: the policy has collapsed to one response"),
    # policy
    "loss/policy_avg": _D("the whole loss, mean over tokens: clipped surrogate, minus entropy_coef times the entropy, with GRPO plus its KL terms", "near 0; carries no information on progress", "large: advantages are not whitened"),
    "policy/approxkl_avg": _D("k3 estimate of KL(old || new), nats a token", "under 0.02", "above 0.1: fewer epochs or a lower learning rate"),
    "policy/clipfrac_avg": _D("share of tokens whose gradient the clip removed", "under 0.2", "above 0.3: steps too large; 0 with one minibatch per step is normal"),
    "policy/clipfrac_low": _D("clipped share with A < 0 and ratio < 1 - cliprange", "like clipfrac_high", "much larger than clipfrac_high: negative samples dominate"),
    "policy/clipfrac_high": _D("clipped share with A > 0 and ratio > 1 + cliprange_high", "like clipfrac_low", "much larger than clipfrac_low: the policy is sharpening fast"),
    "policy/entropy_avg": _D("-sum_v pi log pi, mean over tokens, nats", "falls slowly", "near 0: collapse; rises steadily: the reward carries no signal"),
    "policy/perplexity": _D("exp(-mean over sampled tokens of log pi)", "falls slowly", "near 1: the policy repeats one response"),
    "policy/grad_norm": _D("gradient norm before clipping, mean over optimizer steps", "steady", "spikes: extreme advantages or a too high learning rate"),
    "policy/skipped_updates": _D("optimizer steps not made because the gradient was not finite", "0", "above 0: look at rollouts.jsonl of that step"),
    "policy/corr_advantage_entropy": _D("Pearson correlation over tokens of |A_t| and the policy's entropy", "above 0: credit lands on undecided tokens", "near 0 for long: advantages do not depend on the token"),
    "val/ratio": _D("mean over tokens of pi_new / pi_old", "1 +- 0.02", "drifts: off-policy data or sampler mismatch"),
    "val/ratio_var": _D("variance over tokens of pi_new / pi_old", "under 0.05", "above 0.2: too many epochs"),
    # sampler
    "sampling/trainer_kl": _D("k3 KL of sampler against trainer on the first minibatch, before any update, nats a token", "under 1e-6 in fp32, under 1e-3 in bf16", "larger: sampler and trainer disagree about weights or distribution"),
    "sampling/trainer_ratio_error": _D("|mean ratio - 1| on the same tokens", "under 1e-4 in fp32", "as sampling/trainer_kl"),
    "sampling/kept_mass": _D("mean probability that top-k and top-p left to sample from", "1 without truncation", "below 0.9: the ratio is biased by the cut tail"),
    # denoiser
    "denoiser/false_positive": _D("rho+ in force: what the configuration says, or learned", "near noise/false_positive", "far from it: give the rates, or more rewards"),
    "denoiser/false_negative": _D("rho- in force", "near noise/false_negative; learned it comes out low while the model is unsure of right answers", "far above it: right answers are not believed"),
    "denoiser/informativeness": _D("J = 1 - rho+ - rho-", "above 0.1", "near 0: the reward says nothing that could be corrected"),
    "denoiser/low": _D("channel gaussian: mean reward of wrong responses, learned", "below denoiser/high", "above it: the reward speaks against the belief"),
    "denoiser/high": _D("channel gaussian: mean reward of right responses, learned", "above denoiser/low", "below it"),
    "denoiser/per_token": _D("denoiser.nuisance length or tokens: what a token more adds to the reward whatever the verdict, reward units", "steady after the first steps", "grows without end: length and verdict are not told apart"),
    "denoiser/dearest_token": _D("denoiser.nuisance tokens: what the token that moves the step's rewards most, by |slope| sqrt(p (1 - p)), p the share of responses with it, adds by occurring, reward units; summary.json names it", "steady after the first steps", "near denoiser/high - denoiser/low: the judge pays for a word what it pays for being right"),
    "denoiser/std": _D("channel gaussian: standard deviation of the reward given the verdict", "falls below denoiser/high - denoiser/low", "far above that difference: the reward says little"),
    "denoiser/accuracy": _D("share of responses whose clean verdict (P(clean = 1 | seen, belief) > 1/2) gets right; with `rewards.gold` or `rewards.noise` only", "above noise/seen_accuracy", "below it: the denoiser harms; lower denoiser.learning_rate or switch it off"),
    "denoiser/auc": _D("AUC of the belief before the reward is looked at, against the clean verdict", "rises above 0.8", "0.5: it cannot tell right from wrong responses"),
    "denoiser/corr": _D("correlation of the posterior with the clean verdict", "above denoiser/corr_seen", "below it"),
    "denoiser/corr_seen": _D("correlation of the seen reward with the clean verdict", "J for balanced verdicts", "-"),
    "denoiser/corr_siblings": _D("correlation of the posterior with the clean verdict among the samples of a prompt: both less their mean over them, for a baseline takes out the rest", "above denoiser/corr_seen_siblings", "below it, with denoiser/corr above: it knows which prompts are hard and not which answers are right"),
    "denoiser/corr_seen_siblings": _D("the same of the seen reward", "J for balanced verdicts", "-"),
    "denoiser/kl": _D("KL of the policy to the denoiser's model: sum_t (log pi_t - log q_t), mean over responses, nats", "steady, falls with algorithm.belief_coef", "grows without end: the policy leaves what past rewards say"),
    "denoiser/grad_norm": _D("gradient norm before clipping, mean over optimizer steps", "steady", "spikes: lower denoiser.learning_rate"),
    "denoiser/skipped_updates": _D("optimizer steps not made because the gradient was not finite", "0", "above 0: lower denoiser.learning_rate"),
    "loss/denoiser_avg": _D("-log P(seen reward), mean over responses, nats; channel gaussian: of its density, without log(2 pi) / 2, so it may be negative", "channel flip: falls below the entropy of the seen reward, log 2 for balanced ones; gaussian: falls", "rises: lower denoiser.learning_rate"),
    # completions
    "completions/mean_length": _D("tokens the policy chose, mean over responses", "steady", "rises without clean reward: length hacking"),
    "completions/max_length": _D("longest response, tokens", "below max_completion_length", "always the limit: raise it"),
    "completions/truncated_frac": _D("share of responses cut at the length limit", "under 0.1", "above 0.3: rewards judge unfinished answers"),
    "val/num_eos_tokens": _D("responses that ended with EOS", "near completions_per_step", "falls: the policy forgets to stop"),
    # rewards and noise
    "rewards/errors": _D("responses for which a reward function raised or returned something unusable", "0", "above 0: the lines are in rollouts.jsonl"),
    "rewards/gold_errors": _D("responses for which a gold function raised or returned something unusable; only where some did", "absent", "nothing learns from gold, but metrics and evaluations miss these; the lines are in rollouts.jsonl"),
    "rewards/errors/*": _D("of these, by kind: raised, timeout, crashed, memory, bad_value, http; only kinds that occurred", "absent", "timeout: raise rewards.functions.timeout or mend the function; the others: mend it"),
    "rewards/missing": _D("responses without a reward (errors, None, noise type missing); masked from every loss", "0", "large: the step learns from little data"),
    "rewards/*/mean": _D("mean clean value of one reward function, where it is not missing", "rises", "one rises at the cost of another: weights"),
    "noise/false_positive": _D("share of clean 0 seen as 1; with `rewards.gold` or `rewards.noise` only", "the configured rate", "far off: noise depends on content"),
    "noise/false_negative": _D("share of clean 1 seen as 0; with `rewards.gold` or `rewards.noise` only", "the configured rate", "far off: noise depends on content"),
    "noise/informativeness": _D("J = 1 - false_positive - false_negative; with `rewards.gold` or `rewards.noise` only", "above 0", "0 or less: nothing can be learned"),
    "noise/seen_accuracy": _D("share of responses whose seen reward equals the clean one; with `rewards.gold` or `rewards.noise` only", "1 minus the noise", "below val/verdict_accuracy: the critic knows better than the reward"),
    "noise/frac_zero_std_seen": _D("share of groups whose seen rewards are all equal; NaN with one response a prompt", "under 0.5", "near 1: group baselines give no gradient"),
    "noise/frac_zero_std_clean": _D("share of groups whose clean rewards are all equal", "close to the seen one", "far above the seen one: noise makes dead groups look alive"),
    # critic, before the update
    "val/explained_var": _D("1 - Var(R - V) / Var(R) over tokens; R is the critic's target, denoised where that is done", "above 0.1 after warm-up; flips bound it by the clean share of Var(R)", "below 0: the critic is worse than a constant; more warm-up or critic epochs"),
    "val/explained_var_clean": _D("the same with the clean outcome as R; where gold is 0/1 and the reward is not, the mean reward of its kind", "above val/explained_var under noise", "below val/explained_var: the critic fits the noise"),
    "val/explained_var_decile_*": _D("explained variance on seen returns within each tenth of the response", "rises towards the end", "flat at 0: the critic ignores the response"),
    "val/mean": _D("mean V over tokens, reward units", "near val/return_mean", "far off: critic learning rate too low"),
    "val/return_mean": _D("mean target R over tokens, reward units", "follows objective/scores", "-"),
    "val/coverage": _D("mean probability, over tokens, that the policy goes on as one of the siblings has (algorithm.sibling_coverage)", "above 0.3 on short answers", "near 0 on long ones: there the critic's values are used as they are"),
    "val/bias": _D("mean(V - R), reward units", "within 0.05", "one-sided: the critic lags the policy"),
    "val/calibration": _D("expected calibration error of V at the end against the clean 0/1 outcome, 10 bins; not where gold is 0/1 and the reward is not", "under 0.1 on clean rewards; flips compress V towards rho+ + J q", "rises: over-confident critic"),
    "val/auc_start": _D("P(V of a success > V of a failure) at the first token", "above 0.5: knows which prompts are hard", "0.5: does not tell prompts apart"),
    "val/auc_middle": _D("the same at the middle token", "between start and end", "below start: does not read the response"),
    "val/auc_end": _D("the same at the last token", "above 0.7", "0.5: cannot judge a finished response, so it cannot filter noise"),
    "val/sibling_accuracy": _D("share of pairs of one prompt with different clean outcomes that V at the end ranks right", "above 0.6", "0.5: knows the prompt, not the response"),
    "val/verdict_accuracy": _D("share of responses whose clean outcome `V at the end > midpoint` gets right", "above noise/seen_accuracy", "below it: the reward is a better judge than the critic"),
    # critic, the update
    "loss/value_avg": _D("1/2 mean (V - R)^2 during the update, reward units squared; with critic.regression bce or hl_gauss the cross-entropy, nats", "falls to 1/2 Var(R | s)", "rises: critic learning rate too high"),
    "val/grad_norm": _D("critic's gradient norm before clipping, mean over optimizer steps", "steady", "spikes: unscaled rewards"),
    "val/skipped_updates": _D("critic's optimizer steps not made because the gradient was not finite", "0", "above 0: look at the rewards of that step"),
    "val/bottleneck_kl": _D("KL(q(z|h) || N(0, I)), nats a token", "1-10", "under 0.3: collapsed, lower beta; over 30: not compressing, raise beta"),
    "val/bottleneck_beta": _D("weight of that KL in force", "rises over the warm-up, then follows Var(R)", "0 with a bottleneck after the warm-up: returns have no variance"),
    "loss/semantic_avg": _D("L_sem, coefficients included", "small against loss/value_avg", "comparable to it: lower the coefficients"),
    "val/selected_entropy_frac": _D("|S_H| / |M|", "near critic.semantic.fraction", "0 or 1: features drift faster than the threshold"),
    "val/selected_nll_frac": _D("|S_P| / |M|", "near critic.semantic.fraction", "0 or 1: features drift faster than the threshold"),
    "val/selected_entropy": _D("mean over S_H of what its loss lowers, nats: the entropy of p (literal), KL(p_ref || p) (kl_ref)", "falls slowly", "near 0: the features have become over-confident"),
    "val/selected_nll": _D("mean over S_P of what its loss lowers, nats: min(nll, 10) (literal), KL(p_ref || p) (kl_ref)", "falls slowly", "at 10: the features have left the language"),
    # time
    "time/*": _D("wall seconds of a phase: rollout, reward, values, critic, denoiser, policy; step is the whole", "rollout dominates", "values or critic above policy by far: microbatch too small"),
    "tokens_per_second/*": _D("completion tokens over the seconds of: rollout; update (critic + policy); step", "steady", "falls: responses get longer, or the machine is shared"),
    "memory/peak_gib": _D("most memory taken so far: of the process on a CPU, of the device on a GPU; GiB", "level after the first steps; `vrpo plan` foretells it", "rises for ever: something keeps tensors"),
}  # fmt: skip

EVALUATIONS: dict[str, MetricDoc] = {
    "clean_greedy": _D("mean clean reward of one greedy completion a held-out prompt", "rises", "falls while clean_sampled rises: the policy is sharpened and unlearns"),
    "clean_sampled": _D("the same of `train.eval_samples` completions at rollout.temperature", "rises", "compare it at equal entropy: a sharper policy has more of it without knowing more"),
    "sampled_entropy": _D("mean of -log pi over the tokens of those completions, nats a token; pi as sampled: after top-k and top-p, where these are set", "falls slowly", "near 0: the policy gives one answer"),
    "best_sampled": _D("mean over prompts of the highest clean reward among those completions; pass@k of a 0/1 reward", "above clean_sampled where train.eval_samples > 1", "falls while clean_greedy rises: the policy gives up alternatives"),
    "prompts": _D("held-out prompts of the evaluation", "train.eval_prompts, or all there are", "few: an accuracy of 64 prompts has a standard error of up to .06"),
    "judged": _D("prompts whose greedy completion has a clean reward: those that clean_greedy is the mean of", "all of them", "few: gold covers few rows"),
    "samples": _D("completions a prompt behind clean_sampled", "train.eval_samples", "-"),
    "missing": _D("completions without a clean reward, the denoiser's among them", "0", "above 0: rows without gold, or a function that fails"),
    "denoiser_greedy": _D("clean_greedy of the denoiser's model sampled as a policy", "ahead of clean_greedy under noise", "below clean_greedy by far: the denoiser learns errors by heart"),
}  # fmt: skip
"""Names in evaluations.jsonl, besides `step`."""


def explain_metric(name: str) -> tuple[str, MetricDoc] | None:
    """The catalogue entry of a metric or of a number of an evaluation: by its name, or by the pattern it falls under."""
    for found in (METRICS, EVALUATIONS):
        if name in found:
            return name, found[name]
    for pattern, doc in METRICS.items():
        if "*" in pattern and re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), name):
            return pattern, doc
    return None


def catalogue_page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "One line per step in `metrics.jsonl`. Generated by `python -m vrpo.train.catalogue > docs/metrics.md`;",
        "`vrpo explain METRIC` prints one row. V is the critic *before* the step's update, sums run over the tokens",
        "that count, nats unless said otherwise.",
        "",
        *_table(METRICS),
        "",
        "One line per evaluation in `evaluations.jsonl`, of held-out prompts and without noise:",
        "",
        *_table(EVALUATIONS),
    ]
    return "\n".join(lines) + "\n"


def _table(docs: Mapping[str, MetricDoc]) -> list[str]:
    rows = ["| metric | formula | healthy | smell |", "|---|---|---|---|"]
    for name, doc in docs.items():
        cells = [cell.replace("|", "\\|") for cell in (doc.formula, doc.healthy, doc.smell)]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    print(catalogue_page(), end="")
