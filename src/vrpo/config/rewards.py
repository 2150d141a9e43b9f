"""`rewards:` the functions that judge a completion, and the noise put on their verdict."""

import os
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from vrpo.config.base import Strict

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Combine = Literal["all", "answered"]


class ExactReward(Strict):
    """1 when the completion, stripped, equals the answer column, else 0."""

    type: Literal["exact"] = "exact"
    weight: float = 1.0
    """Factor in the weighted sum of functions."""
    column: str = "answer"
    """Column that holds the right answer."""
    prefix: bool = False
    """Compare only the first words of the completion, as many as the answer has; for models that go on talking."""


class ChoiceReward(Strict):
    """1 when the first choice letter in the completion is the answer column's letter, else 0."""

    type: Literal["choice"] = "choice"
    weight: float = 1.0
    """Factor in the weighted sum of functions."""
    column: str = "answer"
    """Column that holds the right answer."""


class CallConfig(Strict):
    """How a reward function is called, and what becomes of its failures."""

    isolation: Literal["process", "thread", "none"] = "process"
    """`process`: in a process of its own, which is killed when it takes too long and may crash; `thread`: given up when it
    takes too long; `none`: in place, trusted."""
    timeout: float | None = Field(300.0, gt=0.0)
    """Seconds a call may take: one for all responses of a step, and one for each response asked again. null: no limit."""
    retries: int = Field(0, ge=0)
    """How often a response whose verdict failed is asked again, after all have been asked."""
    on_error: Literal["mask", "raise"] = "mask"
    """A response whose verdict failed in the end: it has no reward (`mask`), or the run stops (`raise`)."""
    memory_limit: float | None = Field(None, gt=0.0)
    """GiB of address space of its process. null: no limit."""

    @model_validator(mode="after")
    def _limits_need_something_to_limit(self) -> "CallConfig":
        if self.isolation == "none" and self.timeout is not None:
            raise ValueError(
                f"timeout={self.timeout} cannot be kept with isolation: none; set timeout: null, or isolation: process or thread"
            )
        if self.isolation != "process" and self.memory_limit is not None:
            raise ValueError(
                f"memory_limit={self.memory_limit} needs isolation: process; set memory_limit: null or that"
            )
        return self


class MathReward(CallConfig):
    """1 when `math-verify` finds the completion's final answer equal to the answer column, else 0.

    Units after a number are dropped, and an answer in words is compared as text (`docs/guides/own_data.md`).
    """

    type: Literal["math"] = "math"
    weight: float = 1.0
    """Factor in the weighted sum of functions."""
    column: str = "answer"
    """Column that holds the right answer."""
    timeout: float | None = Field(60.0, gt=0.0)
    """Seconds a call may take, for all responses of a step or for one; a comparison that takes longer than five is given
    up by itself, except inside one huge power. null: no limit."""


class FunctionCallConfig(CallConfig):
    """The same of a user's function, which may be async."""

    concurrency: int | None = Field(None, ge=1)
    """Async functions only: call once per response, with lists of one, at most this many at a time. null: one call for all."""


class FunctionReward(FunctionCallConfig):
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list[float | None]."""

    type: Literal["function"] = "function"
    file: str
    """Python file, relative to the working directory. It is executed: use only files you trust."""
    name: str
    """Function in that file; plain or async."""
    weight: float = 1.0
    """Factor in the weighted sum of functions."""

    @field_validator("file")
    @classmethod
    def _of_home(cls, file: str) -> str:
        return os.path.expanduser(file)  # not `Path.expanduser`, which raises for the home of nobody


class HttpReward(Strict):
    """A server that is asked by POST: {"prompts": [...], "completions": [...], ...} -> {"rewards": [number | null, ...]}."""

    type: Literal["http"] = "http"
    url: str = Field(pattern=r"^https?://")
    """Where to post."""
    weight: float = 1.0
    """Factor in the weighted sum of functions."""
    columns: tuple[str, ...] = Field(("answer",), strict=False)
    """Columns that are sent along."""
    headers_env: dict[str, str] = Field({})
    """Header -> environment variable that holds its value, so that no secret stands in a configuration."""
    batch_size: int = Field(32, ge=1)
    """Responses per request."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at the same time."""
    attempts: int = Field(4, ge=1)
    """Tries per request: connection errors, 429 and 5xx are tried again at once, then after 1, 2, 4, ... s, or as Retry-After says."""
    request_timeout: float = Field(60.0, gt=0.0)
    """Seconds one try may take."""
    timeout: float = Field(300.0, gt=0.0)
    """Seconds a step's requests may take together, tries and pauses included; then its responses have no reward."""
    on_error: Literal["mask", "raise"] = "mask"
    """A response whose verdict failed: it has no reward (`mask`), or the run stops (`raise`)."""


RewardFunctionConfig = Annotated[
    ExactReward | MathReward | ChoiceReward | FunctionReward | HttpReward, Field(discriminator="type")
]


NO_INFORMATION = 1e-12
"""J up to this counts as 0: 1 - 0.7 - 0.3 is 6e-17 in floating point."""


class FlipRates(Strict):
    """Rates of a binary channel: r in {0, 1} is seen as r~."""

    false_positive: Rate = 0.0
    """rho+ = P(r~ = 1 | r = 0)."""
    false_negative: Rate = 0.0
    """rho- = P(r~ = 0 | r = 1)."""

    @property
    def informativeness(self) -> float:
        """J = 1 - rho+ - rho-; learning needs J > 0."""
        return 1.0 - self.false_positive - self.false_negative


class _InformativeRates(FlipRates):
    @model_validator(mode="after")
    def _must_inform(self) -> "_InformativeRates":
        if self.informativeness <= NO_INFORMATION:
            raise ValueError(
                f"J = 1 - {self.false_positive} - {self.false_negative} = {self.informativeness:.2g} <= 0, nothing can be "
                "learned from this reward; lower the rates, or say `type: adversarial` if that is the experiment"
            )
        return self


class FlipNoise(_InformativeRates):
    """One draw per rollout flips its 0/1 reward."""

    type: Literal["flip"] = "flip"


class PromptFlipNoise(Strict):
    """One draw per prompt and step inverts the 0/1 rewards of its whole group."""

    type: Literal["prompt_flip"] = "prompt_flip"
    rate: float = Field(ge=0.0, lt=0.5)
    """Share of prompts inverted; J = 1 - 2 rate."""


class PersistentNoise(_InformativeRates):
    """A hash of prompt and completion decides the flip: sampling the same answer again never averages it out."""

    type: Literal["persistent"] = "persistent"


class WrongLabelNoise(Strict):
    """A fixed share of prompts is judged against a wrong reference answer."""

    type: Literal["wrong_label"] = "wrong_label"
    rate: Rate
    """Share of prompts, chosen by a hash of the prompt id, whose answer column is another prompt's."""
    column: str = "answer"
    """Column that holds the reference answer."""


class MajorityNoise(Strict):
    """Reference answers are the initial model's majority vote: pseudo-labels, wrong where the model is."""

    type: Literal["majority"] = "majority"
    votes: int = Field(8, ge=1)
    """Completions the initial model gives per prompt, sampled as in `rollout`."""
    column: str = "answer"
    """Column that holds the reference answer."""


class GaussianNoise(Strict):
    """r + N(0, scale * std(r)), the standard deviation taken over the step's clean rewards."""

    type: Literal["gaussian"] = "gaussian"
    scale: float = Field(gt=0.0)
    """Standard deviation of the noise, in standard deviations of the step's clean rewards."""


class LengthBiasNoise(Strict):
    """r + coef * zscore(response length in tokens), z-scored over the step."""

    type: Literal["length_bias"] = "length_bias"
    coef: float
    """Reward per standard deviation of length; negative favours short responses."""


class KeywordBiasNoise(Strict):
    """r + bonus when the completion contains the phrase."""

    type: Literal["keyword_bias"] = "keyword_bias"
    phrase: str = Field(min_length=1)
    """Text that pays; compared as it is, upper and lower case differ."""
    bonus: float
    """Reward added when the phrase occurs."""


ADDED_NOISE = (GaussianNoise, LengthBiasNoise, KeywordBiasNoise)
"""Noise that is added to the reward, which may then be any number."""


class MissingNoise(Strict):
    """The reward is missing altogether, with a rate per rollout; missing is never zero."""

    type: Literal["missing"] = "missing"
    rate: float = Field(ge=0.0, lt=1.0)
    """Share of rollouts without a reward."""


class AdversarialNoise(FlipRates):
    """Flips with J <= 0: a sanity case, in which a right method must not learn (0) or must anti-learn (< 0)."""

    type: Literal["adversarial"] = "adversarial"
    false_positive: Rate = 0.5
    """rho+ = P(r~ = 1 | r = 0)."""
    false_negative: Rate = 0.5
    """rho- = P(r~ = 0 | r = 1)."""

    @model_validator(mode="after")
    def _must_not_inform(self) -> "AdversarialNoise":
        if self.informativeness > NO_INFORMATION:
            raise ValueError(
                f"J = {self.informativeness:.2g} > 0 can be learned from; use `type: flip` for it"
            )
        return self


def _flip_type(rates: object) -> str:
    kind = rates.get("type", "flip") if isinstance(rates, dict) else getattr(rates, "type", "flip")
    return str(kind)


class SourceNoise(Strict):
    """Flip rates that differ by data source."""

    type: Literal["source"] = "source"
    column: str = "source"
    """Column that names the source of a row."""
    rates: dict[
        str,
        Annotated[
            Annotated[FlipNoise, Tag("flip")] | Annotated[AdversarialNoise, Tag("adversarial")],
            Discriminator(_flip_type),
        ],
    ] = Field(min_length=1)
    """Source -> rates; a source that is not listed is an error, write 0 rates for clean ones. A source with J <= 0
    says `type: adversarial`."""


NoiseConfig = Annotated[
    FlipNoise
    | PromptFlipNoise
    | PersistentNoise
    | WrongLabelNoise
    | MajorityNoise
    | SourceNoise
    | GaussianNoise
    | LengthBiasNoise
    | KeywordBiasNoise
    | MissingNoise
    | AdversarialNoise,
    Field(discriminator="type"),
]


class RewardsConfig(Strict):
    """How completions are judged: the policy learns from the functions with the noise, evaluation is by gold, or without it by the functions
    without the noise."""

    functions: tuple[RewardFunctionConfig, ...] = Field((), strict=False)
    """The reward is the weighted sum of these. One mapping or a list of them."""
    combine: Combine = "all"
    """What a sum of several functions, of gold too, makes of a None. `all`: it is missing as soon as one of them is. `answered`: it is of
    those that returned a number, for functions with a part in some rows only, as in TRL; missing where none did, or one failed."""
    gold: tuple[RewardFunctionConfig, ...] = Field((), strict=False)
    """Functions you trust, where you do not trust `functions`: the clean reward of evaluations and of every metric that tells how noisy the
    reward is. Nothing learns from them; where they return None nothing is claimed. None given: the clean reward is that of `functions`
    before the noise."""
    max_failed: Rate = 0.5
    """Share of a step's responses that a function may fail on; beyond it the run stops and says why."""
    noise: tuple[NoiseConfig, ...] = Field((), strict=False)
    """Applied in order, each to the output of the one before. One mapping or a list of them."""

    @property
    def knows_clean(self) -> bool:
        """Whether the clean reward may be another than the seen one: with gold, or noise that does more than withhold it."""
        return bool(self.gold) or any(not isinstance(noise, MissingNoise) for noise in self.noise)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if data.get("noise", ()) is None:
            data = {**data, "noise": ()}
        alone = {
            name: (data[name],) for name in ("functions", "gold", "noise") if isinstance(data.get(name), dict)
        }
        return {**data, **alone}

    @model_validator(mode="after")
    def _some_function_counts(self) -> "RewardsConfig":
        for name, functions in (("function", self.functions), ("gold function", self.gold)):
            if functions and not any(function.weight for function in functions):
                raise ValueError(
                    f"every {name} has weight 0, the reward would always be 0; give at least one another weight"
                )
        return self

    @model_validator(mode="after")
    def _flips_come_before_additions(self) -> "RewardsConfig":
        added: str | None = None
        for noise in self.noise:
            if isinstance(noise, ADDED_NOISE):
                added = noise.type
            elif added is not None and not isinstance(noise, MissingNoise):
                raise ValueError(
                    f"{noise.type} noise stands after {added} noise, but needs the 0/1 reward that {added} no longer "
                    f"leaves; put {noise.type} first"
                )
        return self
