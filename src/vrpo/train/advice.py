"""What to do about a diagnosed reward: plain sentences, each from a number and a rule that is stated with it."""

from vrpo.train.diagnosis import Diagnosis

LITTLE_NOISE = 0.9
"""J from which on plain GRPO loses little in our studies (recipes/*/expected.json)."""
MANY_TIES, MUCH_MISSING, UNSTEADY = 0.5, 0.05, 0.02
LENGTH_MATTERS = 0.3
"""Spearman correlation within prompts from which on length pays."""
TOGETHER = (
    "where one response to a prompt is right, `denoiser: {one_right: true, replay: 3}` hears the verdicts on all of them together, "
    "and `algorithm.belief_coef: 0.3` with `train.epochs: 2` tells the policy what it has learned"
)
"""Better than the denoiser alone in all our studies, where errors average out and where they lean (docs/results.md)."""
MIXED_WANTED, GENERATIONS = 0.8, (2, 4, 8, 16, 32, 64)


def advise(found: Diagnosis) -> list[str]:
    """One line per finding, the gravest first."""
    return [
        *_can_anything_be_learned(found),
        *_noise(found),
        *_biases(found),
        *_generations(found),
        *_missing(found),
    ]


def _can_anything_be_learned(found: Diagnosis) -> list[str]:
    if found.spread == 0.0:
        return [
            "every completion gets the same reward: nothing can be learned; use easier or harder prompts, or a finer reward"
        ]
    j = found.informativeness
    if j is None:
        if found.gold_mean is None and found.binary:
            return [
                "there are no gold verdicts, so the noise cannot be measured: judge some 200 completions by hand or with a stronger "
                "model, put the verdict in column `gold`, and diagnose that file"
            ]
        return []
    if j.high <= 0.0:
        return [
            f"J = {j.value:.2f}, surely below 0: right completions are paid less; training would unlearn the task"
        ]
    if j.low <= 0.0:
        return [
            f"J = {j.value:.2f} [{j.low:.2f}, {j.high:.2f}] may be 0: from this sample it is not known whether anything can be "
            f"learned; about {_gold_needed(j.value)} gold verdicts would tell"
        ]
    return [f"learning is possible: J = {j.value:.2f} [{j.low:.2f}, {j.high:.2f}] is above 0"]


def _gold_needed(j: float) -> int:
    """Verdicts, half of them right, whose interval of J excludes 0 at a true J of max(j, 0.1): (1.96 / J)^2 at rates near 1/2."""
    return int(round((1.96 / max(j, 0.1)) ** 2, -1)) + 10


def _noise(found: Diagnosis) -> list[str]:
    j, up, down = found.informativeness, found.false_positive, found.false_negative
    if j is None or up is None or down is None or j.low <= 0.0:
        return []
    if j.value >= LITTLE_NOISE:
        return ["little noise: `algorithm: grpo` is the cheapest method and loses little to it"]
    rates = f"{{false_positive: {up.value:.2f}, false_negative: {down.value:.2f}}}"
    return [
        f"noise: a wrong completion is paid with {up.value:.2f}, a right one is not with {down.value:.2f}; a reward carries about "
        f"J^2 = {j.value**2:.2f} of what a clean one would; use `denoiser: {rates}` (short answers) or `algorithm: vrpo`"
    ]


def _biases(found: Diagnosis) -> list[str]:
    lines = []
    if found.repeat_share is not None and found.repeat_share > UNSTEADY:
        together = f"; {TOGETHER}" if found.binary else ""
        lines.append(
            f"the same completion gets different rewards in {found.repeat_share:.0%} of cases ({found.repeat_variance:.0%} of the "
            f"variance): averaging k scorings divides that part by k{together}"
        )
    by_length = found.length_correlation or 0.0
    if abs(by_length) > LENGTH_MATTERS:
        kind = "longer" if by_length > 0 else "shorter"
        lines.append(
            f"{kind} completions of a prompt are paid more (rank correlation {by_length:+.2f}): unless that is wanted, "
            "use `denoiser: {channel: gaussian, nuisance: length}` (short answers) or algorithm.kl_coef above 0, and watch completions/mean_length"
        )
    for word, difference in found.keywords:
        lines.append(
            f"completions with {word!r} are paid {difference:+.2f}: look whether they deserve it; if not, "
            "use `denoiser: {channel: gaussian, nuisance: tokens}` (short answers)"
        )
    if abs(by_length) > LENGTH_MATTERS or found.keywords:
        lines.append(f"the same denoiser, told more: {TOGETHER}")
    for names, correlation in found.disagreement.items():
        if correlation < LENGTH_MATTERS:
            lines.append(
                f"reward functions {names} agree little (rank correlation {correlation:+.2f}): their sum may reward neither"
            )
    return lines


def _generations(found: Diagnosis) -> list[str]:
    if found.ties > MANY_TIES and found.spread > 0.0:
        return [
            f"{found.ties:.0%} of the prompts give all {found.group} completions the same reward: group methods learn nothing from them; "
            f"use more generations (with {_enough(found.mean)} most prompts of average difficulty are mixed), other prompts, or a critic"
        ]
    if found.mixed is not None and found.mixed < 1.0 - found.ties - 0.1:
        return [
            f"noise makes dead groups look alive: {1 - found.ties:.0%} of the prompts have different rewards, {found.mixed:.0%} "
            "different gold verdicts"
        ]
    return []


def _enough(rate: float) -> int:
    """Fewest generations that mix right and wrong with MIXED_WANTED at this success rate."""
    return next((g for g in GENERATIONS if 1 - rate**g - (1 - rate) ** g >= MIXED_WANTED), GENERATIONS[-1])


def _missing(found: Diagnosis) -> list[str]:
    if found.missing <= MUCH_MISSING:
        return []
    return [
        f"{found.missing:.0%} of the rewards are missing: those completions teach nothing; look at the reward's errors"
    ]
