"""What to do about a diagnosed reward: plain sentences, each from a number and a rule that is stated with it.

What is prescribed is what docs/guides/noise.md measured: against noise the paper's critic alone does nothing, a denoiser does on short
answers, and for long ones nothing is known.
"""

import math

from vrpo.train.diagnosis import Diagnosis
from vrpo.train.diagnosis_channel import Rate

LITTLE_NOISE = 0.9
"""J, or 2 AUC - 1, from which on plain GRPO loses little in our studies (recipes/*/expected.json)."""
TOO_WEAK = 0.05
"""J, or 2 AUC - 1, below which next to nothing could be learned if it were known to be above 0."""
MANY_TIES, MUCH_MISSING, UNSTEADY = 0.5, 0.05, 0.02
LENGTH_MATTERS = 0.3
"""Spearman correlation from which on length pays."""
DENOISED = "GRPO with denoiser"
LISTENING = "`algorithm: {type: grpo, belief_coef: 0.3}` and `train: {epochs: 2}`"
LONG_ANSWERS = "for long answers nothing better is known here than a smaller train.learning_rate, more rollout.num_generations, or algorithm.kl_coef above 0"
MEASURED = {
    ("length_bias", "GRPO"): 0.470,
    ("phrase_bias", "GRPO"): 0.467,
    ("phrase_bias", "GRPO with denoiser"): 0.683,
    ("flips", "GRPO"): 0.535,
    ("flips", "GRPO with denoiser"): 0.609,
    ("flips_clean", "GRPO"): 0.636,
    ("flips_clean", "VRPO"): 0.666,
    ("hard_noise", "GRPO"): 0.530,
    ("hard_noise", "GRPO with denoiser"): 0.597,
    ("few_prompts", "GRPO"): 0.427,
    ("few_prompts_listening", "GRPO with denoiser"): 0.351,
}
"""(Study of recipes/arith_cpu, method) -> final greedy clean accuracy under the first noise in its record; a test compares."""
MIXED_WANTED, GENERATIONS = 0.8, (2, 4, 8, 16, 32, 64)


def advise(found: Diagnosis) -> list[str]:
    """One line per finding, the gravest first."""
    return [
        *_can_anything_be_learned(found),
        *_noise(found),
        *_unsteady(found),
        *_biases(found),
        *_remedy(found),
        *_generations(found),
        *_missing(found),
    ]


def _can_anything_be_learned(found: Diagnosis) -> list[str]:
    if found.spread == 0.0:
        return [
            "every completion gets the same reward: nothing can be learned; use easier or harder prompts, or a finer reward"
        ]
    if found.informativeness is not None:
        return [_learnable("J", found.informativeness, 0.0, "")]
    if found.auc is not None:
        where = " on prompts with right and wrong completions" if found.auc_of_siblings else ""
        return [_learnable("AUC", found.auc, 0.5, where)]
    if found.gold_mean is None:
        ask = (
            "there are no gold verdicts, so the noise cannot be measured: judge some 200 completions by hand or with a stronger "
            "model, put the verdict in column `gold`, and diagnose that file"
        )
        return [ask] if found.no_gold is None else [found.no_gold, ask]
    kind, other = ("right", "wrong") if found.gold_mean > 0.5 else ("wrong", "right")
    return [
        f"every completion with a gold verdict is {kind}, so it is not known whether {other} ones are paid otherwise: judge some of them"
    ]


def _learnable(name: str, rate: Rate, nothing: float, where: str) -> str:
    """Whether J is above 0, or AUC above 1/2; `where` says which verdicts count."""
    is_ = f"{name} = {rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"
    if rate.high <= nothing:
        return f"{is_}, surely below {nothing:g}: right completions are paid less; training would unlearn the task"
    if rate.low > nothing:
        return f"learning is possible: {is_} is above {nothing:g}"
    return (
        f"{is_} may be {nothing:g}, where nothing can be learned: from this sample it is not known whether anything can be; "
        + _more_gold(name, rate, nothing, where)
    )


def _more_gold(name: str, rate: Rate, nothing: float, where: str) -> str:
    """How many verdicts would make the interval exclude `nothing` at this value; its width goes with 1 / sqrt(their number)."""
    distance = abs(rate.value - nothing)
    if distance < TOO_WEAK * (1.0 - nothing):
        return (
            f"at this {name} it cannot be told apart from {nothing:g} by any number of verdicts worth judging, and a reward so close "
            "to it teaches next to nothing"
        )
    towards = rate.value - rate.low if rate.value > nothing else rate.high - rate.value
    needed = math.ceil(rate.of * (towards / distance) ** 2 / 10 + 1) * 10
    return (
        f"about {needed} gold verdicts{where} in all, {rate.of} so far, would tell if {name} stays as it is"
    )


def _strength(found: Diagnosis) -> float | None:
    """J, or 2 AUC - 1, which is J for a 0/1 reward; None where nothing is known to be learnable."""
    if found.informativeness is not None and found.informativeness.low > 0.0:
        return found.informativeness.value
    return 2 * found.auc.value - 1 if found.auc is not None and found.auc.low > 0.5 else None


def _noise(found: Diagnosis) -> list[str]:
    strength = _strength(found)
    if strength is None:
        return []
    if strength >= LITTLE_NOISE and _leans(found):
        return [
            "right completions are nearly always paid more than wrong ones, but what else is paid for moves a policy too: on sums GRPO alone "
            f"ended at {_accuracy('length_bias')} where length paid, at {_accuracy('phrase_bias')} where a 9 did, at "
            f"{_accuracy('flips_clean')} under a judge that never errs (docs/guides/noise.md)"
        ]
    if strength >= LITTLE_NOISE:
        short = (
            "; on short answers of which one is right VRPO with a denoiser that it listens to is ahead even without noise "
            f"({_accuracy('flips_clean', 'VRPO')}, GRPO alone {_accuracy('flips_clean')}; docs/guides/noise.md)"
        )
        return [
            "little noise: `algorithm: grpo` is the cheapest method and loses little to it"
            + short * found.short
        ]
    up, down = found.false_positive, found.false_negative
    if up is not None and down is not None:
        return [
            f"noise: a wrong completion is paid with {up.value:.2f}, a right one is not with {down.value:.2f}; a reward carries about "
            f"J^2 = {strength**2:.2f} of what a clean one would"
        ]
    wrong, right = found.mean_if or (math.nan, math.nan)
    return [
        f"noise: a wrong completion gets {wrong:.2f} on average, a right one {right:.2f}, and of one of each the wrong one gets more with "
        f"{(1 - strength) / 2:.2f}"
    ]


def _unsteady(found: Diagnosis) -> list[str]:
    if found.repeat_share is None or found.repeat_share <= UNSTEADY:
        return []
    return [
        f"the same completion gets different rewards in {found.repeat_share:.0%} of cases ({found.repeat_variance:.0%} of the "
        "variance): averaging k scorings divides that part by k"
    ]


def _length_pays(found: Diagnosis) -> bool:
    return not found.length_by_chance and abs(found.length_correlation or 0.0) > LENGTH_MATTERS


def _leans(found: Diagnosis) -> bool:
    return _length_pays(found) or bool(found.keywords)


def _undeserved(found: Diagnosis) -> str:
    """Among equally right completions nothing deserves to be paid for; without gold it may be what is right."""
    return "" if found.equally_right else "if they do not deserve it: "


def _biases(found: Diagnosis) -> list[str]:
    lines = []
    among = "completions of a prompt" if not found.equally_right else "equally right completions of a prompt"
    if _length_pays(found):
        by_length = found.length_correlation or 0.0
        lines.append(
            f"of {among} the {'longer' if by_length > 0 else 'shorter'} ones are paid more (rank correlation {by_length:+.2f}): see "
            "whether that is wanted, and watch completions/mean_length"
        )
    if found.keywords:
        paid = ", ".join(f"{difference:+.2f} for {word!r}" for word, difference in found.keywords)
        deserved = "" if found.equally_right else ": look whether they deserve it"
        lines.append(f"of {among} those with certain words are paid more or less, {paid}{deserved}")
    if _leans(found) and found.binary:
        lines.append(
            f"{_undeserved(found)}nothing here takes a liking out of rewards that are 0 or 1: let the judge give a score, which `channel: gaussian` can take it "
            "out of, or tell it what not to pay for; algorithm.kl_coef above 0 slows the drift towards it"
        )
    for names, correlation in found.disagreement.items():
        if correlation < LENGTH_MATTERS:
            lines.append(
                f"reward functions {names} agree little (rank correlation {correlation:+.2f}): their sum may reward neither"
            )
    return lines


def _accuracy(study: str, method: str = "GRPO") -> str:
    return f"{MEASURED[study, method]:.2f}"


def _gain(study: str) -> str:
    return f"accuracy {_accuracy(study, DENOISED)}, GRPO alone {_accuracy(study)}"


def _remedy(found: Diagnosis) -> list[str]:
    """The one setting for what was found, unless nothing may be learnable."""
    strength = _strength(found)
    measured = found.informativeness is not None or found.auc is not None
    noisy = strength is not None and strength < LITTLE_NOISE
    # of real-valued rewards that are only unsteady nothing is known that is better than averaging; of long answers that are
    # nearly always judged right GRPO loses little
    unsteady = (
        found.binary
        and found.repeat_share is not None
        and found.repeat_share > UNSTEADY
        and (strength is None or noisy or found.short)
    )
    leans = not found.binary and _leans(found)
    if not (noisy or unsteady or leans) or (measured and strength is None) or found.spread == 0.0:
        return []
    if not found.short:
        return [f"{LONG_ANSWERS}; `algorithm: vrpo` alone, without a denoiser, is no better than PPO"]
    if not found.binary:
        settings = ["channel: gaussian", "nuisance: tokens"]
        gain = f"a judge that a 9 impresses: {_gain('phrase_bias')}; measured on vocabularies of 100 tokens"
    else:
        up, down = found.false_positive, found.false_negative
        settings = []
        if noisy and up is not None and down is not None:
            settings = [f"false_positive: {up.value:.2f}", f"false_negative: {down.value:.2f}"]
        gain = f"30 % flips: {_gain('flips')}"
    start = "" if noisy or unsteady else _undeserved(found)
    lines = [
        f"{start}for short answers of which one is right use `denoiser: {{{', '.join([*settings, 'one_right: true', 'replay: 3'])}}}` with "
        f"{LISTENING} ({gain}; learning rates: docs/guides/noise.md); `algorithm: vrpo` alone, without a denoiser, is no better than PPO"
    ]
    if found.binary and found.repeat_share == 0.0:
        lines.append(
            "no verdict changed when scored again, so errors may stay with a text: with many prompts the same setting helps "
            f"({_gain('hard_noise')}), with few prompts seen often it learns the errors by heart "
            f"({_accuracy('few_prompts_listening', DENOISED)}, GRPO alone {_accuracy('few_prompts')})"
        )
    return lines


def _generations(found: Diagnosis) -> list[str]:
    if found.ties is not None and found.ties > MANY_TIES and found.spread > 0.0:
        return [
            f"{found.ties:.0%} of the {found.several:,} prompts with several rewards give all completions the same: group methods learn nothing from them; "
            + _more_generations(found)
        ]
    if found.mixed is not None and found.different is not None and found.mixed < found.different - 0.1:
        shares = f"{found.different:.0%} of the prompts have different rewards, {found.mixed:.0%} different gold verdicts"
        if found.binary or found.repeat_share:
            return [f"noise makes dead groups look alive: {shares}"]
        return [
            f"the reward also orders completions that gold calls equally right: {shares}; see whether it should"
        ]
    return []


def _more_generations(found: Diagnosis) -> str:
    """What to do about groups with equal rewards; more generations only where they would help."""
    if not found.binary:
        return "use more generations, other prompts, or a critic"
    enough = _enough(found.mean)
    if enough <= found.group:
        return "most are too easy or too hard for the model: use other prompts, or a critic"
    return f"use more generations (with {enough} most prompts of average difficulty are mixed), other prompts, or a critic"


def _enough(rate: float) -> int:
    """Fewest generations that mix right and wrong with MIXED_WANTED at this success rate."""
    return next((g for g in GENERATIONS if 1 - rate**g - (1 - rate) ** g >= MIXED_WANTED), GENERATIONS[-1])


def _missing(found: Diagnosis) -> list[str]:
    if found.missing <= MUCH_MISSING:
        return []
    return [
        f"{found.missing:.0%} of the rewards are missing: those completions teach nothing; look at the reward's errors, and where it returns "
        "None (with several functions `rewards.combine: answered` sums those that answer)"
    ]
