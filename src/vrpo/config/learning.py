"""`algorithm:` and `critic:` the learning rule and the value model."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vrpo.config.base import Strict
from vrpo.config.rewards import NO_INFORMATION

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Truncation = Literal["terminal", "bootstrap", "mask"]


class PpoConfig(Strict):
    """PPO-clip on GAE advantages. `vrpo` is the same rule; its preset makes the critic robust."""

    type: Literal["ppo", "vrpo"] = "ppo"
    gamma: float = Field(1.0, gt=0.0, le=1.0)
    """Discount per token."""
    lam: UnitInterval = 0.95
    """GAE lambda of the advantages: 0 trusts the critic (one-step TD), 1 trusts the reward (Monte Carlo)."""
    lam_value: UnitInterval = 1.0
    """GAE lambda of the critic's targets; 1 with gamma 1 is the Monte-Carlo return whatever V says."""
    length_adaptive_alpha: float | None = Field(None, gt=0.0)
    """When set, lam is 1 - 1 / (alpha * length) per response (VAPO) and `lam` is not used."""
    lam_covered: UnitInterval | None = None
    """When set, lambda of a state is this as far as siblings cover it (`sibling_coverage`) and lam for the rest: 0 believes values
    where siblings know them, and rewards elsewhere."""
    critic_trust: Literal["full", "gate", "soft"] = "full"
    """How far advantages rely on the critic. `gate`: not at all while its explained variance, a running mean over about five steps, is
    not above 0 (EVPO), the mean return is the baseline then; `soft`: in proportion to it, and lam rises to 1 as it falls to 0."""
    sibling_correction: bool = False
    """Move the values of a response by what its siblings' returns say the critic got wrong about their prompt, shrunk as far as the
    critic is right (`functional.sibling_correction`): a cold critic's baseline is then the group's mean, a good one's is its own."""
    cliprange: float = Field(0.2, gt=0.0, lt=1.0)
    """Lower clip: the ratio's gradient stops below 1 - cliprange."""
    cliprange_high: float = Field(0.28, gt=0.0)
    """Upper clip: the ratio's gradient stops above 1 + cliprange_high."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, mean over tokens, subtracted from the loss: above 0 it keeps exploring, below 0 it sharpens."""
    kl_coef: float = Field(0.0, ge=0.0)
    """Weight of the KL to the initial model, subtracted from the reward token by token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of that KL."""
    kl_target: float | None = Field(None, gt=0.0)
    """When set, kl_coef is only where an adaptive controller starts that steers objective/kl, nats a response, to this."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which that controller may change the weight by a fifth of itself."""
    belief_coef: float = Field(0.0, ge=0.0)
    """Weight of the KL to the denoiser's model, subtracted from the reward token by token, by the same estimator: every token is told what
    all past rewards say of it, also where no sample was right."""
    sibling_coverage: bool = False
    """Where siblings have sampled how the policy goes on, take their returns weighted by its probabilities, and the critic's value for
    the rest only (`functional.covered_values`): nearly exact for short answers, the critic alone for long ones."""
    whiten_advantages: bool = True
    """Centre and scale the advantages over the step's valid tokens."""
    truncation: Truncation = "terminal"
    """A response cut at the length limit: `terminal` ends it with its reward; `bootstrap` adds V after the last
    token; `mask` leaves it out of every loss."""

    @property
    def asks_siblings(self) -> tuple[str, ...]:
        """Names of the settings in force that need several responses to a prompt."""
        in_force = {
            "sibling_correction": self.sibling_correction,
            "sibling_coverage": self.sibling_coverage,
        }
        return tuple(name for name, on in in_force.items() if on)

    @model_validator(mode="after")
    def _covered_by_siblings(self) -> "PpoConfig":
        if self.lam_covered is not None and not self.sibling_coverage:
            raise ValueError(
                f"lam_covered={self.lam_covered} is for states that siblings cover, and nobody asks them; set sibling_coverage: true "
                "or lam_covered: null"
            )
        return self

    @model_validator(mode="after")
    def _a_target_needs_a_start(self) -> "PpoConfig":
        if self.kl_target is not None and self.kl_coef == 0.0:
            raise ValueError(
                f"kl_target={self.kl_target} with kl_coef=0.0 steers nothing, since 0 times anything is 0; set kl_coef to the "
                "weight to start with, such as 0.05"
            )
        if self.kl_target is None and self.kl_horizon != type(self).model_fields["kl_horizon"].default:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} is how slowly kl_target is followed, and there is none; set kl_target, or leave it out"
            )
        return self


class GrpoConfig(Strict):
    """Group-relative policy optimisation: no critic, the group mean is the baseline."""

    type: Literal["grpo"] = "grpo"
    scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation (GRPO) or not (Dr. GRPO)."""
    cliprange: float = Field(0.2, gt=0.0, lt=1.0)
    """Lower clip: the ratio's gradient stops below 1 - cliprange."""
    cliprange_high: float = Field(0.28, gt=0.0)
    """Upper clip: the ratio's gradient stops above 1 + cliprange_high."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, mean over tokens, subtracted from the loss: above 0 it keeps exploring, below 0 it sharpens."""
    kl_coef: float = Field(0.0, ge=0.0)
    """Weight of the KL to the initial model, added to the loss token by token."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Per-token estimator of that KL. k1, which belongs in a reward, has no gradient on average in a loss."""
    belief_coef: float = Field(0.0, ge=0.0)
    """Weight of the KL to the denoiser's model, added to the loss token by token, by the same estimator."""
    truncation: Literal["terminal", "mask"] = "terminal"
    """A response cut at the length limit counts with its reward (`terminal`) or not at all (`mask`)."""


AlgorithmConfig = Annotated[PpoConfig | GrpoConfig, Field(discriminator="type")]


class ScalarHead(Strict):
    """V(s) = w . h + b: the plain PPO critic."""

    type: Literal["scalar"] = "scalar"


class BottleneckHead(Strict):
    """Variational information bottleneck: h -> Gaussian z -> MLP -> V."""

    type: Literal["bottleneck"] = "bottleneck"
    latent_dim: int | None = Field(None, ge=1)
    """K, dimensions of z. null: an eighth of the hidden size, between 16 and 256."""
    beta: float = Field(0.015, ge=0.0)
    """Weight of KL(q(z|h) || N(0, I)) in nats a token, as a multiple of the running variance of returns."""
    beta_warmup: UnitInterval = 0.2
    """Share of all critic updates over which beta rises linearly from 0."""
    sample: bool = True
    """Draw z in the loss. false: the mean everywhere (the sigma -> 0 limit)."""


HeadConfig = Annotated[ScalarHead | BottleneckHead, Field(discriminator="type")]


class SemanticConfig(Strict):
    """Auxiliary losses that keep the value features readable by the frozen language-model head."""

    mode: Literal["off", "literal", "kl_ref"] = "off"
    """`literal`: lower entropy and log-perplexity on the selected tokens; `kl_ref`: KL(p_ref || p) there instead."""
    selector: Literal["value", "reference"] = "value"
    """Whose entropy and perplexity choose the tokens: the value features' or the frozen language model's."""
    fraction: float = Field(0.2, gt=0.0, le=1.0)
    """Share of tokens each threshold aims at."""
    threshold_decay: UnitInterval = 0.9
    """Decay of the running threshold over steps. 1: it stays where the first step put it."""
    entropy_coef: float = Field(0.003, ge=0.0)
    """lam_H, on the entropy term (mode literal) or on the KL over the high-entropy tokens (kl_ref)."""
    nll_coef: float = Field(0.003, ge=0.0)
    """lam_P, on the negative log-likelihood term (literal) or on the KL over the high-perplexity tokens (kl_ref)."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: object) -> object:
        return "off" if value is False else value


class CriticConfig(Strict):
    """The value model: its own copy of the backbone, a head, and its own optimizer."""

    trunk: Literal["own", "policy"] = "own"
    """`own`: a backbone that the critic trains. `policy`: the policy's hidden states, detached; only the head learns: no
    second backbone in memory, and a shorter step."""
    layers: int | None = Field(None, ge=1)
    """Layers the critic's own backbone keeps, from the bottom. null: all."""
    path: str | None = None
    """Start from this critic folder of an earlier run, or this model. null: a copy of the policy's initial model."""
    head: HeadConfig = ScalarHead()
    semantic: SemanticConfig = SemanticConfig()
    regression: Literal["mse", "bce", "hl_gauss"] = "mse"
    """How the value is regressed on returns: squared error; binary cross-entropy, for returns in [0, 1]; or cross-entropy
    with a Gaussian over 51 bins of [-1.2, 1.2]."""
    features: Literal["none", "uncertainty", "belief"] = "none"
    """What the head reads besides its hidden state, of the response so far: the surprisals and entropies of the frozen model
    (`uncertainty`), or those of the denoiser's model, which says how likely the right answer begins like this (`belief`)."""
    oracle: str | None = None
    """Control, no method: the task's column with the one right response, such as `answer`. Advantages are then made from the exact
    value of every state, which says how much any critic could gain, and `val/*` describe these; the critic learns beside, and
    nothing reads it."""
    warmup_steps: int = Field(10, ge=0)
    """Steps at the start in which only the critic learns: a cold critic must not be trusted."""
    epochs: int = Field(1, ge=1)
    """Passes of the critic over each step's data."""
    learning_rate: float = Field(5e-6, gt=0.0)
    """Peak learning rate; 2-5 times the policy's is usual."""
    cliprange_value: float | None = Field(None, gt=0.0)
    """Clip the new value to within this of the old one in the loss, in the head's units: those of the reward, for rewards near 0 and 1.
    null: off."""

    @model_validator(mode="after")
    def _a_borrowed_trunk_is_as_it_is(self) -> "CriticConfig":
        if self.trunk == "policy":
            for name, value, unset in (
                ("path", self.path, "null"),
                ("layers", self.layers, "null"),
                ("semantic.mode", self.semantic.mode, "off"),
            ):
                if value not in (None, "off"):
                    raise ValueError(
                        f"{name}={value} changes the critic's own backbone, and trunk=policy has none; set {name}: {unset} or "
                        "trunk: own"
                    )
        return self

    @model_validator(mode="after")
    def _clip_needs_means(self) -> "CriticConfig":
        if self.cliprange_value is not None and self.oracle is not None:
            raise ValueError(
                f"cliprange_value={self.cliprange_value} would clip around the exact values of oracle={self.oracle}, which are not the "
                "critic's; set cliprange_value: null or oracle: null"
            )
        if self.cliprange_value is not None and self.regression != "mse":
            raise ValueError(
                f"cliprange_value clips a squared error, and regression={self.regression} has none; set cliprange_value: null or "
                "regression: mse"
            )
        if self.cliprange_value is not None and isinstance(self.head, BottleneckHead) and self.head.sample:
            raise ValueError(
                "cliprange_value with a sampled bottleneck takes sampling noise for an update; "
                "set head.sample: false or cliprange_value: null"
            )
        return self


Nuisance = Literal["none", "length", "tokens"]
"""What besides the verdict moves a reward."""


class DenoiserConfig(Strict):
    """Terminal denoiser: the policy learns from the posterior of the clean verdict instead of the seen one.

    A second language model, a copy of the initial policy, learns from all past rewards how likely each response is
    the right one; what it believes and what was seen together make the reward."""

    channel: Literal["flip", "gaussian"] = "flip"
    """How clean verdicts become rewards. `flip`: 0/1 rewards, inverted with two rates. `gaussian`: any real-valued reward, as
    one level for wrong and one for right responses plus noise, all three learned."""
    nuisance: Nuisance = "none"
    """What besides the verdict may move a real-valued reward, in straight lines that are learned along. `length`: the number of tokens,
    for a judge that likes long answers, or short ones. `tokens`: that, and which tokens occur, for a judge that likes words."""
    one_right: bool = False
    """Judge the responses to a prompt together: verdicts on equal ones add up, and of different ones at most one is right
    (`functional.joint_posterior_rewards`, and `functional.joint_verdict_nll` to learn from). For tasks with one right response, and errors
    that are drawn anew for every response."""
    false_positive: UnitInterval | None = None
    """rho+ = P(seen 1 | clean 0), if you know it. null: learned with the model."""
    false_negative: UnitInterval | None = None
    """rho- = P(seen 0 | clean 1), if you know it. null: learned with the model."""
    learning_rate: float = Field(1e-6, gt=0.0)
    """Peak learning rate of the second language model; it follows the critic's schedule, which does not wait for `critic.warmup_steps`."""
    replay: int = Field(1, ge=0)
    """Past responses it learns from in a step, as a multiple of the step's own."""
    capacity: int = Field(16_384, ge=1)
    """Past responses that are kept, the newest."""
    minibatch: int | None = Field(None, ge=1)
    """Responses, earlier ones among them, of one of its optimizer steps: the more, the less a noisy reward moves it. null: train.minibatch."""

    @model_validator(mode="after")
    def _verdicts_have_no_slope(self) -> "DenoiserConfig":
        if self.channel == "flip" and self.nuisance != "none":
            raise ValueError(
                f"nuisance={self.nuisance} is a slope of real-valued rewards, and channel=flip has 0/1 ones; set channel: gaussian or "
                "nuisance: none"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_of_flips(self) -> "DenoiserConfig":
        if self.channel != "flip" and self.false_positive is not None:
            raise ValueError(
                f"false_positive={self.false_positive} is a rate of flips, and channel={self.channel} has none; leave the rates out "
                "or set channel: flip"
            )
        return self

    @model_validator(mode="after")
    def _rates_belong_together(self) -> "DenoiserConfig":
        if (self.false_positive is None) != (self.false_negative is None):
            raise ValueError(
                f"false_positive={self.false_positive} and false_negative={self.false_negative}: one rate alone cannot be used; "
                "give both, or neither to have them learned"
            )
        if self.false_positive is not None and self.false_negative is not None:
            informativeness = 1.0 - self.false_positive - self.false_negative
            if informativeness <= NO_INFORMATION:
                raise ValueError(
                    f"J = 1 - {self.false_positive:g} - {self.false_negative:g} = {informativeness:.2g}, and nothing can be learned "
                    "from a reward with J <= 0; correct the rates or set `denoiser: null`"
                )
        return self
