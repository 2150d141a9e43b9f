"""What a noisy verdict says of the clean one, given how noisy it is and what was believed before.

Clean verdict r in {0, 1}, seen reward r~. A channel is a pair of log-likelihoods

    log L1 = log P(r~ | r = 1),   log L0 = log P(r~ | r = 0)

and everything else follows by Bayes' rule, whatever the channel.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

LOG_TINY = -30.0
"""Least log-probability of a channel: without noise what was seen is as good as certain, and its logarithm finite."""

FARTHEST = 1e8
"""Standard deviations beyond which a reward counts as equally far from both levels: the square of more is infinite in fp32."""
MOST_CERTAIN = -1e-6
"""Largest log-belief: log(1 - q) stays finite."""


def flip_log_likelihoods(
    seen: Num[Tensor, " N"], *, false_positive: Float[Tensor, ""], false_negative: Float[Tensor, ""]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(log L1, log L0) of the binary channel with rates rho+ and rho-.

        L1 = 1 - rho- if r~ = 1 else rho-        L0 = rho+ if r~ = 1 else 1 - rho+

    Args:
        seen: r~, each 0 or 1 (`require_verdicts` refuses others).
        false_positive: rho+, may take a gradient.
        false_negative: rho-, may take a gradient.
    """
    one = seen > 0.5
    if_right = torch.where(one, 1.0 - false_negative, false_negative)
    if_wrong = torch.where(one, false_positive, 1.0 - false_positive)
    least = math.exp(LOG_TINY)
    return if_right.clamp(min=least).log(), if_wrong.clamp(min=least).log()


def gaussian_log_likelihoods(
    seen: Num[Tensor, " N"], *, low: Float[Tensor, ""], high: Float[Tensor, ""], std: Float[Tensor, ""]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(log L1, log L0) of the channel r~ = low + (high - low) r + N(0, std^2), without the constant both share.

        log L1 = -(r~ - high)^2 / (2 std^2) - log std,   log L0 with `low` in place of `high`

    Args:
        seen: r~, any real numbers.
        low: mean reward of wrong responses; may take a gradient, as the others.
        high: mean reward of right responses.
        std: standard deviation of the noise, above 0.
    """
    z_right, z_wrong = (((seen - level) / std).clamp(-FARTHEST, FARTHEST) for level in (high, low))
    return -0.5 * z_right**2 - std.log(), -0.5 * z_wrong**2 - std.log()


def verdict_nll(
    log_belief: Float[Tensor, " N"], if_right: Float[Tensor, " N"], if_wrong: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """-log P(r~) when the clean verdict is right with probability q and then goes through the channel.

        -log(q L1 + (1 - q) L0)

    For flips P(r~ = 1) = rho+ + J q, J = 1 - rho+ - rho-, and the gradient with respect to log q is
    -J q / (rho+ + J q) for r~ = 1: at most 1, and near 0 where q is, so that a flipped reward cannot make an unlikely
    response likely. Source of the form: forward correction, Patrini et al. 2017, arXiv:1609.03683, for a probability q
    of any origin.

    Args:
        log_belief: log q, at most 0.
        if_right: log L1.
        if_wrong: log L0.

    Returns:
        fp32 nats; for the Gaussian channel up to a constant.
    """
    log_q = log_belief.clamp(max=MOST_CERTAIN)
    log_not_q = (-torch.expm1(log_q)).log()
    return -torch.logaddexp(log_q + if_right, log_not_q + if_wrong)


def posterior_rewards(
    belief: Float[Tensor, " N"], if_right: Float[Tensor, " N"], if_wrong: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """P(r = 1 | r~): what a noisy verdict and a prior belief say together.

        q L1 / (q L1 + (1 - q) L0) = sigmoid(logit q + log L1 - log L0)

    Its mean over the noise is q, for flips that of the debiased reward (r~ - rho+) / J, at less variance; without
    noise it is the clean reward itself.

    Args:
        belief: q, strictly between 0 and 1.
        if_right: log L1.
        if_wrong: log L0.

    Returns:
        fp32 in [0, 1].
    """
    return F.sigmoid(torch.logit(belief.float()) + if_right - if_wrong)


def joint_posterior_rewards(
    belief: Float[Tensor, " N"],
    if_right: Float[Tensor, " N"],
    if_wrong: Float[Tensor, " N"],
    *,
    answers: Int[Tensor, " N"],
    group_ids: Int[Tensor, " N"],
    least: float,
) -> Float[Tensor, " N"]:
    """P(r = 1 | all verdicts on the responses to a prompt), where one response at most is right, however often it was sampled.

        w_y = q_y prod_{i says y} L1_i / L0_i        P(y is right | all) = w_y / (w_0 + sum_z w_z)        w_0 = 1 - sum_z q_z

    y and z run over the different responses to the prompt; w_0 stands for a right one that nobody has sampled. Verdicts on equal
    responses add up, and one that speaks for a response speaks against its siblings. For a prompt with one response it is
    `posterior_rewards`. Source: Bayes' rule; the verdicts of a channel are independent given which response is right.

    Args:
        belief: q, strictly between 0 and 1, the same for equal responses.
        if_right: log L1.
        if_wrong: log L0.
        answers: equal numbers are equal responses to one prompt (`functional.equal_responses`).
        group_ids: equal numbers answer the same prompt.
        least: of w_0, above 0.

    Returns:
        fp32 in (0, 1), the same for equal responses.
    """
    which = _Hypotheses(belief.double().log(), if_right - if_wrong, answers, group_ids, least=least)
    return (which.log_weight - which.log_total[which.prompt_of]).exp()[which.answer_of].float()


def joint_verdict_nll(
    log_belief: Float[Tensor, " N"],
    if_right: Float[Tensor, " N"],
    if_wrong: Float[Tensor, " N"],
    *,
    answers: Int[Tensor, " N"],
    group_ids: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """-log P(all verdicts), summed over prompts, where one response to a prompt at most is right, however often it was sampled.

        sum_prompts -log(w_0 + sum_y w_y) - sum_i log L0_i        w as in `joint_posterior_rewards`

    The gradient on log q_y is P(no sampled one is right | all) q_y / w_0 - P(y is right | all): what `verdict_nll` has for one response, with
    everything that was said of its siblings in it. Equal responses are one response here, whose verdicts tell the rates of a channel
    from a weak belief, which they hardly do one by one. For prompts with one response each it is the sum of `verdict_nll`.

    Args:
        log_belief: log q, at most 0, the same for equal responses.
        if_right: log L1.
        if_wrong: log L0.
        answers: equal numbers are equal responses to one prompt (`functional.equal_responses`).
        group_ids: equal numbers answer the same prompt; responses to a prompt that are not here are taken not to have been judged.

    Returns:
        fp32 nats.
    """
    log_q = log_belief.clamp(max=MOST_CERTAIN)
    which = _Hypotheses(log_q, if_right - if_wrong, answers, group_ids, least=-math.expm1(MOST_CERTAIN))
    return -(which.log_total.sum() + if_wrong.double().sum()).float()


class _Hypotheses:
    """Which of the different responses to a prompt is the right one, or none that was sampled: weights in fp64.

    answer_of [N]     the answer of each row
    prompt_of [A]     the prompt of each answer
    log_weight [A]    log w_y
    log_total [P]     log(w_0 + sum_y w_y)
    """

    def __init__(
        self, log_q: Tensor, said: Tensor, answers: Tensor, group_ids: Tensor, *, least: float
    ) -> None:
        names, self.answer_of = answers.unique(return_inverse=True)
        # the last row of each answer: a plain scatter leaves any of them on a GPU
        rows = torch.arange(len(answers), device=answers.device)
        row_of = torch.zeros_like(names).scatter_reduce(0, self.answer_of, rows, "amax")
        prompts, self.prompt_of = group_ids[row_of].unique(return_inverse=True)
        log_q = log_q.double()[row_of]
        self.log_weight = log_q.index_add(0, self.answer_of, said.double())
        q_of_prompt = log_q.new_zeros(len(prompts)).index_add(0, self.prompt_of, log_q.exp())
        unseen = (1.0 - q_of_prompt).clamp(min=least).log()
        most = unseen.scatter_reduce(0, self.prompt_of, self.log_weight, "amax").detach()
        total = (
            (unseen - most).exp().index_add(0, self.prompt_of, (self.log_weight - most[self.prompt_of]).exp())
        )
        self.log_total = total.log() + most
