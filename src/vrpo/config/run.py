"""The root of a training configuration, and the rules that span sections."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from vrpo.config.base import Strict
from vrpo.config.learning import AlgorithmConfig, CriticConfig, DenoiserConfig, GrpoConfig, PpoConfig
from vrpo.config.load import explain_validation
from vrpo.config.presets import with_preset
from vrpo.config.rewards import ADDED_NOISE, ChoiceReward, RewardsConfig
from vrpo.config.tasks import ChoiceTask, TaskConfig
from vrpo.errors import ConfigError


class LoraConfig(Strict):
    """Low-rank adapters instead of full fine-tuning, for policy and critic."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(strict=False)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""


class ModelConfig(Strict):
    """The language model that is trained."""

    path: str
    """A folder, a hub name, or one of the small models in the package: `vrpo:tiny` for sums, `vrpo:chain` for long ones, `vrpo:minus` for
    differences, `vrpo:science` for the periodic table."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward passes; weights and optimizer stay fp32. auto: bfloat16 autocast on CUDA, fp32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a device, else the CPU."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights. null: all weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust."""


class RolloutConfig(Strict):
    """How responses are sampled."""

    num_generations: int = Field(8, ge=1)
    """Responses per prompt."""
    max_completion_length: int = Field(64, ge=1)
    """Tokens after which a response is cut (stop = length)."""
    temperature: float = Field(1.0, gt=0.0)
    """Logits are divided by this, in sampling and in every log-probability of the trainer."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that hold this mass."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """Texts that end a response, besides EOS. A special token by itself, such as `<|im_end|>`, ends one as EOS does."""
    batch_size: int = Field(256, ge=1)
    """Sequences decoded at once; memory only, no effect on what is sampled."""
    cuda_graphs: bool = True
    """On a GPU, sample Llama, Qwen 2 and Qwen 3 as CUDA graphs, whose keys and values keep their memory between steps.
    false: launch every kernel by itself, which takes nine times as long (135 M parameters) and gives that memory back."""


MOST_THREADS = 1024
"""torch does not refuse more, it crashes."""


class TrainConfig(Strict):
    """The loop: how much data a step has, how it is split, and how often what happens."""

    seed: int = Field(0, ge=0)
    """Root of every random stream of the run."""
    steps: int = Field(200, ge=0)
    """Steps of the loop: sample, score, update."""
    completions_per_step: int = Field(256, ge=1)
    """Responses sampled per step = prompts * num_generations."""
    minibatch: int = Field(64, ge=1)
    """Responses per optimizer step."""
    microbatch: int = Field(32, ge=1)
    """Responses per forward-backward pass, at most; memory and time only, gradients do not depend on it. More than `minibatch` speeds up
    passes that are only read (values, reference), and `denoiser.minibatch`."""
    max_tokens_per_microbatch: int | None = Field(None, ge=1)
    """Tokens a forward-backward pass reads, at most, each prompt counted once; a longer sequence goes alone, and so do the responses to a
    prompt that `denoiser.one_right` hears together. null: no limit."""
    activation_checkpointing: bool = False
    """Keep one hidden state a layer and compute the rest again in the backward pass: one more forward pass, and prompts
    are read with each response. For when even one sequence does not fit."""
    compile: bool = False
    """Compile norms and feed-forward blocks of what is trained, with `torch.compile`: a wait of some ten seconds at first, then
    (0.5 B parameters on an H200) a fifth less memory and updates shorter by a twentieth."""
    epochs: int = Field(1, ge=1)
    """Passes of the policy over each step's data."""
    learning_rate: float = Field(1e-6, gt=0.0)
    """Peak learning rate of the policy."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: hold, or decay so that 0 would be reached one step after the last. Policy, critic and denoiser alike."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which all learning rates rise from 0; the policy's count starts after the critic's warm-up."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    eval_every: int = Field(25, ge=0)
    """Steps between evaluations on held-out prompts with the clean reward; 0: only before and after."""
    eval_prompts: int = Field(256, ge=1)
    """Held-out prompts per evaluation; fewer where the task has fewer."""
    eval_samples: int = Field(1, ge=1)
    """Sampled completions per evaluation prompt, beside the greedy one."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int | None = Field(3, ge=1)
    """Newest checkpoints that are kept; older ones are deleted. null: all."""
    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    """CPU threads of torch. null: leave them as they are."""


def _letters_move_with_the_choices(task: TaskConfig | None, rewards: RewardsConfig) -> None:
    """Refuse letters that `task.shuffle` leaves where they are: only the column `answer` is known to name a choice."""
    if not isinstance(task, ChoiceTask) or not task.shuffle:
        return
    for name, functions in (("functions", rewards.functions), ("gold", rewards.gold)):
        for function in functions:
            if isinstance(function, ChoiceReward) and function.column != "answer":
                raise ValueError(
                    f"task.shuffle moves the letter in column 'answer' along with the choices, but not those in {function.column!r}, which "
                    f"rewards.{name} of type choice reads; set task.shuffle: false, or shuffle the choices in the file"
                )


class Config(Strict):
    """One training run. `model`, `task` and `rewards.functions` may be left out only in Python, where
    `vrpo.Trainer` is given a model, a data set and reward functions instead."""

    model: ModelConfig | None = None
    task: TaskConfig | None = None
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = PpoConfig(type="vrpo")
    critic: CriticConfig | None = None
    """null for algorithms without a critic."""
    denoiser: DenoiserConfig | None = None
    """null: the policy learns from the seen reward. For any algorithm."""
    train: TrainConfig = TrainConfig()

    def __init__(self, **data: Any) -> None:
        """Validate; like a file's, a mistake is a one-line ConfigError."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain_validation(type(self), error)) from error

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        return with_preset(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _batch_sizes_divide(self) -> "Config":
        for small, large in (
            ("rollout.num_generations", "train.completions_per_step"),
            ("train.minibatch", "train.completions_per_step"),
            ("train.microbatch", "train.minibatch"),
        ):
            a, b = self._at(small), self._at(large)
            holds_all = small == "train.microbatch" and a >= b
            if b % a and not holds_all:
                divisor = max(n for n in range(1, a + 1) if b % n == 0)
                raise ValueError(
                    f"{large}={b} is not a multiple of {small}={a}; use {small}={divisor}, or {large}={-(-b // a) * a}"
                )
        return self

    @model_validator(mode="after")
    def _letters_move_along(self) -> "Config":
        _letters_move_with_the_choices(self.task, self.rewards)
        return self

    @model_validator(mode="after")
    def _flips_are_of_verdicts(self) -> "Config":
        if self.denoiser is not None and self.denoiser.channel == "flip":
            for noise in self.rewards.noise:
                if isinstance(noise, ADDED_NOISE):
                    raise ValueError(
                        f"denoiser.channel=flip is for rewards that are 0 or 1, and rewards.noise of type {noise.type} adds to them; set "
                        "denoiser.channel: gaussian"
                    )
        return self

    @model_validator(mode="after")
    def _the_past_holds_a_prompt(self) -> "Config":
        group = self.rollout.num_generations
        if self.denoiser is not None and self.denoiser.capacity < group:
            raise ValueError(
                f"denoiser.capacity={self.denoiser.capacity} cannot hold the rollout.num_generations={group} responses to one prompt, which "
                f"leave the replay together; set denoiser.capacity to {group} or more"
            )
        past = 0 if self.denoiser is None else self.denoiser.replay * self.train.completions_per_step
        if self.denoiser is not None and self.denoiser.capacity < past:
            raise ValueError(
                f"denoiser.replay={self.denoiser.replay} reads {past} past responses a step, and denoiser.capacity={self.denoiser.capacity} "
                f"keeps fewer; set denoiser.capacity to {past} or more, or a lower denoiser.replay"
            )
        return self

    @model_validator(mode="after")
    def _siblings_are_heard_together(self) -> "Config":
        if self.denoiser is None or not self.denoiser.one_right:
            return self
        group = self.rollout.num_generations
        if self.train.microbatch < group:
            raise ValueError(
                f"denoiser.one_right hears the rollout.num_generations={group} responses to a prompt in one pass, and "
                f"train.microbatch={self.train.microbatch} is less; set train.microbatch to {group} or more"
            )
        name = "train.minibatch" if self.denoiser.minibatch is None else "denoiser.minibatch"
        if self._at(name) % group:
            raise ValueError(
                f"denoiser.one_right hears the rollout.num_generations={group} responses to a prompt in one optimizer step, and "
                f"{name}={self._at(name)} is no multiple of it; use a multiple"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits_critic(self) -> "Config":
        match self.algorithm:
            case GrpoConfig():
                if self.critic is not None:
                    raise ValueError(
                        "grpo has no critic; remove the critic section or use algorithm.type: ppo or vrpo"
                    )
                if self.rollout.num_generations == 1:
                    raise ValueError(
                        "rollout.num_generations=1 leaves grpo no group to compare with; use 2 or more, or ppo or vrpo"
                    )
            case PpoConfig(type=name):
                if self.critic is None:
                    raise ValueError(
                        f"{name} needs a critic; remove `critic: null` or use algorithm.type: grpo"
                    )
                asks = self.algorithm.asks_siblings
                if asks and self.rollout.num_generations == 1:
                    raise ValueError(
                        f"algorithm.{asks[0]} compares the responses to a prompt, and rollout.num_generations=1 leaves one; use 2 or "
                        f"more, or leave {asks[0]} out"
                    )
                if self.critic.warmup_steps >= self.train.steps > 0:
                    raise ValueError(
                        f"critic.warmup_steps={self.critic.warmup_steps} leaves the policy none of train.steps="
                        f"{self.train.steps}; lower the one or raise the other"
                    )
        return self

    @model_validator(mode="after")
    def _the_kl_weight_may_not_reach_0(self) -> "Config":
        rule, count = self.algorithm, self.train.completions_per_step
        if isinstance(rule, PpoConfig) and rule.kl_target is not None and 5 * rule.kl_horizon <= count:
            raise ValueError(
                f"algorithm.kl_horizon={rule.kl_horizon} lets one step of {count} responses (train.completions_per_step) set kl_coef to 0, "
                f"where it stays; give more than {count // 5}, such as {40 * count}"
            )
        return self

    @model_validator(mode="after")
    def _cross_entropy_wants_shares(self) -> "Config":
        if self.critic is None or self.critic.regression == "mse":
            return self
        kind, rule = self.critic.regression, self.algorithm
        if rule.truncation == "bootstrap":
            raise ValueError(
                f"algorithm.truncation=bootstrap adds a value to the reward of a cut response, and takes returns to where critic.regression={kind} "
                "cannot follow; set critic.regression: mse or algorithm.truncation: terminal"
            )
        added = next((noise.type for noise in self.rewards.noise if isinstance(noise, ADDED_NOISE)), None)
        if added is not None and (
            kind == "bce" or added != "keyword_bias"
        ):  # a small bonus stays within the bins
            raise ValueError(
                f"rewards.noise={added} takes rewards to where critic.regression={kind} cannot follow; set critic.regression: mse"
            )
        if kind != "bce":  # a KL may stay within its bins
            return self
        for name in ("kl_coef", "belief_coef"):
            if (weight := getattr(self.algorithm, name)) > 0:
                raise ValueError(
                    f"algorithm.{name}={weight:g} is paid in the reward, and takes returns below 0 where critic.regression=bce cannot "
                    f"follow; set critic.regression: mse or algorithm.{name}: 0"
                )
        if self.denoiser is not None and self.denoiser.channel == "gaussian":
            raise ValueError(
                "denoiser.channel=gaussian gives rewards on the judge's own scale, which may leave 0 to 1 where critic.regression=bce "
                "cannot follow; set critic.regression: mse"
            )
        return self

    @model_validator(mode="after")
    def _exact_values_are_of_verdicts(self) -> "Config":
        if self.critic is None or self.critic.oracle is None:
            return self
        asked = {"gamma": 1.0, "kl_coef": 0.0, "belief_coef": 0.0}
        for name, needed in asked.items():
            if (given := getattr(self.algorithm, name, needed)) != needed:
                raise ValueError(
                    f"critic.oracle knows what the verdict will be, without discount and penalties, and algorithm.{name}={given:g}; set "
                    f"algorithm.{name}: {needed:g} or critic.oracle: null"
                )
        return self

    @model_validator(mode="after")
    def _belief_is_the_denoisers(self) -> "Config":
        if self.critic is not None and self.critic.features == "belief" and self.denoiser is None:
            raise ValueError(
                "critic.features=belief reads the denoiser's model, and there is none; add a denoiser section or set "
                "critic.features: uncertainty"
            )
        if self.algorithm.belief_coef > 0 and self.denoiser is None:
            raise ValueError(
                f"algorithm.belief_coef={self.algorithm.belief_coef:g} is a KL to the denoiser's model, and there is none; add a denoiser "
                "section or set algorithm.belief_coef: 0"
            )
        return self

    def _at(self, key: str) -> int:
        section, field = key.split(".")
        return int(getattr(getattr(self, section), field))


class SftSettings(Strict):
    """`sft:` the supervised warm start."""

    steps: int = Field(500, ge=1)
    """Most optimizer steps."""
    batch: int = Field(64, ge=1)
    """Examples per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0.0)
    """Of AdamW; it falls in a straight line to a tenth."""
    weight_decay: float = Field(0.01, ge=0.0)
    """Of AdamW."""
    stop_accuracy: float | None = Field(None, gt=0.0, le=1.0)
    """Stop when greedy held-out accuracy reaches this, so that RL has room. null: run all steps."""
    eval_every: int = Field(50, ge=1)
    """Steps between evaluations."""
    eval_prompts: int = Field(256, ge=1)
    """Held-out prompts of an evaluation."""
    target_column: str = "answer"
    """Column with the text to imitate; EOS is appended."""


class SftConfig(Strict):
    """One supervised warm start."""

    model: ModelConfig
    task: TaskConfig
    rewards: RewardsConfig
    """Gold, or without it the functions, measure accuracy; noise is left out."""
    rollout: RolloutConfig = RolloutConfig()
    sft: SftSettings = SftSettings()
    seed: int = Field(0, ge=0)
    """Root of the order of the examples and of the evaluations' draws."""
    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    """CPU threads of torch. null: leave them as they are."""

    @model_validator(mode="after")
    def _letters_move_along(self) -> "SftConfig":
        _letters_move_with_the_choices(self.task, self.rewards)
        return self
