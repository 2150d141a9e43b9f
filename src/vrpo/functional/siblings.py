"""What the other responses to a prompt add to a value model.

A value model is right about a prompt as far as it has learned; siblings, sampled from the same policy a moment ago, are right as
far as they are many. These functions put the two together; all are ours but for the statistics they use.
"""

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn.functional import pad

from vrpo.functional.groups import Groups
from vrpo.functional.masked import zero_where_false


def sibling_correction(
    residuals: Num[Tensor, " B"], group_ids: Int[Tensor, " B"], *, valid: Bool[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """What the other responses to a prompt say that the value model got wrong about it: a correction of V, shrunk.

        c_i  = w_g mean_{j in g, j != i} e_j             e_j = R_j - V(prompt)
        w_g  = (n_g - 1) tau^2 / ((n_g - 1) tau^2 + sigma^2)
        sigma^2 = pooled variance of e inside groups     tau^2 = max(0, mean_g(mean(e)_g^2 - sigma^2 / n_g))

    tau^2 is how far the value model is off, prompt by prompt, sigma^2 how much responses to one prompt differ; both are estimated
    from the step by the method of moments. A perfect value model has tau^2 = 0 and no correction, a cold one a large tau^2: V + c is
    then nearly the mean of the siblings (RLOO, arXiv:2402.14740). A response has no part in the mean that corrects it, and
    in w it is one among all of the step's, so that the bias of V + c as a baseline falls with the number of prompts. Source of
    the weight: empirical Bayes, Efron and Morris 1973.

    Args:
        residuals: e, return minus first value, reward units.
        group_ids: sequences with the same id answer the same prompt.
        valid: False where the reward is missing: no part in anything, and 0. None: all are valid.

    Returns:
        fp32, reward units; 0 for a response without valid siblings.
    """
    groups = Groups(residuals, group_ids, valid)
    seen = groups.count > 0
    off = torch.where(seen, groups.mean**2 - groups.within / groups.count.clamp(min=1), 0.0)
    between = (off.sum() / seen.sum().clamp(min=1)).clamp(min=0.0)
    others = (groups.count - 1).clamp(min=0)
    strength = others * between
    weight = torch.where(strength > 0, strength / (strength + groups.within), 0.0) / others.clamp(min=1)
    return groups.of_row(weight, times=groups.total(groups.x)[groups.index] - groups.x)


def covered_values(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    logp: Float[Tensor, "B T"],
    input_ids: Int[Tensor, "B L"],
    mask: Bool[Tensor, "B T"],
    *,
    group_ids: Int[Tensor, " B"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Values in which what the policy would do next is known as far as siblings have done it.

        V'(s_t) = sum_y p(y | s_t) R(y) + (1 - c_t) V(s_t)      c_t = sum_y p(y | s_t), at most 1

    y runs over the different responses of the group that begin with s_t, the one's own included; p is the policy's probability of
    how y goes on from there, and R(y) the mean return of those that are equal to y. Where the policy's few likely answers have all
    been sampled c_t is near 1 and V' nearly exact, whatever V says; of a long response no sibling shares more than the prompt, c_t
    is near 0, and V' is V. Environment tokens count as certain.

    Args:
        values: V before each token, reward units.
        returns: R from each token on, undiscounted by what came before.
        logp: of each token under the policy that sampled, nats.
        input_ids: prompt and response; token t + 1 is chosen in column t.
        mask: True on tokens the policy chose; a row without one takes no part.
        group_ids: sequences with the same id answer the same prompt.

    Returns:
        V' and c; fp32, 0 where mask is False.
    """
    rest = zero_where_false(logp, mask).flip(1).cumsum(dim=1).flip(1)
    known, covered = torch.zeros_like(rest), torch.zeros_like(rest)
    _, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    for members in index.argsort(stable=True).split(sizes.tolist()):
        counts = mask[members]
        chosen = pad(counts, (1, 0))
        # a response ends with the last token that was chosen: what stands behind it is padding, whatever it looks like
        ids = torch.where(chosen.flip(1).cummax(dim=1).values.flip(1), input_ids[members], -1)
        # [n, n, L] i and j are the same up to and with position t
        same = ((ids[:, None] == ids[None]) & (chosen[:, None] == chosen[None])).cummin(dim=2).values
        alive = counts.any(dim=1)
        share = same[..., :-1] & counts[:, None] & counts[None]
        equal = (same[..., -1] & alive[:, None] & alive[None]).sum(dim=1).clamp(min=1)
        weight = torch.where(share, (rest[members] - equal.log()[:, None])[None].exp(), 0.0)
        known[members] = (weight * zero_where_false(returns[members], counts)[None]).sum(dim=1)
        covered[members] = weight.sum(dim=1)
    covered = covered.clamp(max=1.0)
    mixed = known + (1.0 - covered) * zero_where_false(values, mask)
    return torch.where(mask, mixed, 0.0), torch.where(mask, covered, 0.0)
