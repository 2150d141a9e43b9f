"""From a configuration to the parts of a run: the only place that knows how they are put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vrpo.algorithms import Algorithm, build_algorithm
from vrpo.algorithms.critic_objective import CriticObjective, CriticState
from vrpo.config import Config, to_yaml
from vrpo.errors import CheckpointError, ConfigError
from vrpo.models import Critic, Policy, Reference, load_policy
from vrpo.models.backbone import compile_blocks, recompute_activations
from vrpo.rewards import NamedFunction, RewardPipeline, build_rewards
from vrpo.rollout import Engine, TorchEngine
from vrpo.tasks import Task, build_task
from vrpo.train import checkpoint
from vrpo.train.checkpoint import Learner
from vrpo.train.denoising import Denoiser
from vrpo.train.evaluate import evaluate
from vrpo.train.fit import check_fit
from vrpo.train.folder import RunFolder
from vrpo.train.microbatches import Splitter
from vrpo.train.notes import notes
from vrpo.train.optim import adamw
from vrpo.train.oracle import check_answers
from vrpo.train.prepared import Prepared
from vrpo.train.pseudo_labels import check_votes, majority_labels
from vrpo.train.same_run import digest_of, inputs_of
from vrpo.train.shape import sampler_reads_trunk
from vrpo.train.values import ReferenceStates
from vrpo.types import EvalResult, Metrics, Prompt, Rollout, to_device

SHOWN = 120
"""Characters of a prompt's beginning and end that are shown before a run."""


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of one run. Only `learner` changes while it goes on."""

    config: Config
    folder: RunFolder
    task: Task
    eval_prompts: Sequence[Prompt]
    engine: Engine
    rewards: RewardPipeline
    algorithm: Algorithm
    objective: CriticObjective | None
    reference: Reference | None
    reference_states: ReferenceStates | None
    learner: Learner
    device: torch.device
    pad_id: int
    believer: Engine | None = None
    """Samples the denoiser's model in evaluations; None without one."""
    changes: Sequence[str] = ()
    """What is otherwise than when the run was started, a line each."""
    paused: Prepared | None = None
    """The step that a stop interrupted, to be gone on with."""
    threads_before: int = 1
    """torch's CPU threads in the process that this run is a guest of."""

    def close(self) -> None:
        """End worker processes, give the run folder and the thread count back; again is no error."""
        torch.set_num_threads(self.threads_before)
        self.rewards.close()
        self.folder.close()

    @property
    def name(self) -> str:
        """What a person calls this run."""
        return self.config.algorithm.type

    def describe(self) -> str:
        """What it trains on, the first prompt as the model reads it, and what has changed, a line each."""
        (prompt,) = self.task.draw(seed=self.config.train.seed, step=0, count=1)
        text = repr(
            self.learner.policy.tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False)
        )
        if len(text) > 2 * SHOWN:
            text = f"{text[:SHOWN]} ... {text[-SHOWN:]}"
        lines = [self.task.describe(), f"a prompt, as the model reads it: {text}"]
        lines += notes(self.config, prompts=self.task.train_size)
        return "\n".join([*lines, *(f"changed: {line}" for line in self.changes)])

    @property
    def reads_reference(self) -> bool:
        """Whether the reference's log-probabilities or entropies are needed, besides its hidden states."""
        return (
            self.algorithm.uses_reference
            or self.features == "uncertainty"
            or (self.objective is not None and self.objective.selects_by_reference)
        )

    @property
    def features(self) -> Literal["none", "uncertainty", "belief"]:
        """Whose uncertainty the critic's head reads."""
        return "none" if self.objective is None else self.objective.config.features

    @property
    def critic_warmup(self) -> int:
        """Steps at the start in which the policy stands still."""
        return self.config.critic.warmup_steps if self.config.critic is not None else 0

    @property
    def splitter(self) -> Splitter:
        """Cuts batches into passes of the size the configuration allows."""
        train, critic = self.config.train, self.learner.critic
        limit = min(model.shared_limit for model in (self.learner.policy, critic) if model is not None)
        # activations that are computed again take no cache, so that every row is read whole
        limit = 0 if train.activation_checkpointing else limit
        return Splitter(train.microbatch, train.max_tokens_per_microbatch, limit)

    def sample(self, prompts: Sequence[Prompt], *, step: int) -> list[Rollout]:
        """This step's responses of the live policy, and the hidden states that chose them where they are the critic's."""
        return self.engine.generate(
            prompts,
            num_generations=self.config.rollout.num_generations,
            step=step,
            policy_version=self.learner.policy_version,
            keep_states=sampler_reads_trunk(self.config),
        )

    def evaluate(self) -> EvalResult:
        """Clean accuracy of the weights as they are now on the held-out prompts."""
        return evaluate(
            self.engine,
            self.rewards,
            self.eval_prompts,
            samples=self.config.train.eval_samples,
            step=self.learner.step,
            policy_version=self.learner.policy_version,
            believer=self.believer,
        )

    def learning_rates(self) -> Metrics:
        """The rates in force."""
        rates = {"lr": float(self.learner.policy_optimizer.param_groups[0]["lr"])}
        if self.learner.critic_optimizer is not None:
            rates["lr_critic"] = float(self.learner.critic_optimizer.param_groups[0]["lr"])
        return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """How to go on with the run a folder holds."""

    step: int | None = None
    """Checkpoint to go on from; later ones are deleted. None: where the run stopped."""
    allow_changes: bool = False
    """Go on with another configuration or other data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """What a run is made from besides its configuration. From Python these may be the user's own objects."""

    policy: Policy
    task: Task
    functions: Sequence[NamedFunction] = ()
    """Reward functions besides those of the configuration."""
    gold: Sequence[NamedFunction] = ()
    """Trusted ones besides those of the configuration."""


def load_ingredients(config: Config) -> Ingredients:
    """Model and task as the configuration names them.

    Raises:
        ConfigError: the configuration names no model, task or reward function.
    """
    if config.model is None or config.task is None or not config.rewards.functions:
        lacking = [
            name
            for name, there in (
                ("model", config.model),
                ("task", config.task),
                ("rewards.functions", config.rewards.functions),
            )
            if not there
        ]
        raise ConfigError(
            f"{lacking[0]} is required; add it to the configuration (a run started from Python goes on with its Trainer)"
        )
    policy = load_policy(config.model, seed=config.train.seed)
    return Ingredients(policy=policy, task=build_task(config.task, policy.tokenizer))


def build_run(config: Config, ingredients: Ingredients, *, out: Path, resume: Resume | None = None) -> Run:
    """Put a run together and, when resuming, set it back to where it stopped.

    Args:
        config: the configuration.
        ingredients: model, task and further reward functions.
        out: the run folder; it is locked until `Run.close`.
        resume: how to go on with the run that `out` holds; None starts one.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: the user's input does not fit together.
    """
    folder, threads_before = RunFolder(out), torch.get_num_threads()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    try:
        run = _build(config, ingredients, folder, _build_rewards(config, ingredients), resume)
        run.threads_before = threads_before
        return run
    except BaseException:  # a refused run must not leave a lock behind
        torch.set_num_threads(threads_before)
        folder.close()
        raise


def _given(ingredients: Ingredients) -> dict[str, str]:
    """Hashes of the functions that come from Python, by what a message calls them."""
    named = [("reward function", f) for f in ingredients.functions]
    named += [("gold function", f) for f in ingredients.gold]
    return {f"{kind} {f.name} from Python": digest_of(f) for kind, f in named}


def _build(
    config: Config, ingredients: Ingredients, folder: RunFolder, rewards: "_Rewards", resume: Resume | None
) -> Run:
    policy, task = ingredients.policy, ingredients.task
    check_votes(config.rewards, task)
    check_fit(task, policy, rewards.pipeline, max_completion_length=config.rollout.max_completion_length)
    algorithm = build_algorithm(config.algorithm)
    engine = TorchEngine(policy, policy.tokenizer, config.rollout, seed=config.train.seed)
    critic, objective = _build_critic(config, policy, algorithm, task)
    if critic is not None and critic.context_length is not None:  # of `critic.path` it may be shorter
        task.check_context(critic.context_length, config.rollout.max_completion_length, whose="the critic's")
    denoiser = _build_denoiser(config, policy)
    uses_reference = algorithm.uses_reference or (objective is not None and objective.uses_reference)
    reference = policy.reference() if uses_reference else None
    _set_passes(config, policy, critic, denoiser)
    changes = folder.open(
        config_yaml=to_yaml(config),
        inputs=inputs_of(config, policy, task) | _given(ingredients),
        resume=resume is not None,
        allow_changes=resume is not None and resume.allow_changes,
    )
    if resume is None:
        folder.sign()
    rewards.labels.update(majority_labels(config.rewards, engine, task, folder))
    learner = Learner(
        policy=policy,
        policy_optimizer=adamw(
            policy, learning_rate=config.train.learning_rate, weight_decay=config.train.weight_decay
        ),
        critic=critic,
        critic_optimizer=None
        if critic is None or config.critic is None
        else adamw(critic, learning_rate=config.critic.learning_rate, weight_decay=config.train.weight_decay),
        critic_state=CriticState(),
        kl_coef=config.algorithm.kl_coef,
        kl_coef_set=config.algorithm.kl_coef,
        denoiser=denoiser,
    )
    run = Run(
        config=config,
        folder=folder,
        task=task,
        eval_prompts=task.eval_prompts(config.train.eval_prompts),
        engine=engine,
        rewards=rewards.pipeline,
        algorithm=algorithm,
        objective=objective,
        reference=reference,
        reference_states=None if reference is None else ReferenceStates(reference),
        learner=learner,
        device=policy.device,
        pad_id=int(policy.tokenizer.pad_token_id),
        believer=None if denoiser is None else _engine_of(denoiser, config),
        changes=changes,
    )
    if resume is not None:
        _go_on(run, resume)
        folder.sign()
    return run


@dataclass(frozen=True, slots=True)
class _Rewards:
    """The pipeline, and the votes it reads, which are counted later: a vote needs a run folder, that a sound run."""

    pipeline: RewardPipeline
    labels: dict[str, str | None]


def _build_rewards(config: Config, ingredients: Ingredients) -> _Rewards:
    labels: dict[str, str | None] = {}
    pipeline = build_rewards(
        config.rewards,
        seed=config.train.seed,
        extra_functions=ingredients.functions,
        extra_gold=ingredients.gold,
        answers=ingredients.task.answers,
        labels=labels,
    )
    return _Rewards(pipeline, labels)


def _build_critic(
    config: Config, policy: Policy, algorithm: Algorithm, task: Task
) -> tuple[Critic | None, CriticObjective | None]:
    if not algorithm.uses_critic or config.critic is None:
        return None, None
    if config.critic.oracle is not None:
        check_answers(task, policy, config.critic.oracle)
    critic = Critic.from_policy(
        policy,
        config.critic,
        seed=config.train.seed,
        lora=None if config.model is None else config.model.lora,
        trust_remote_code=config.model is not None and config.model.trust_remote_code,
    )
    minibatches = config.train.completions_per_step // config.train.minibatch
    total = config.train.steps * config.critic.epochs * minibatches
    return critic, CriticObjective(config.critic, total_updates=total, seed=config.train.seed)


def _set_passes(config: Config, policy: Policy, critic: Critic | None, denoiser: Denoiser | None) -> None:
    """How the models that are trained compute: what is kept for the backward pass, what is compiled."""
    trained = [policy.causal_lm]
    if denoiser is not None:
        trained.append(denoiser.model.causal_lm)
    if critic is not None and not critic.borrowed:
        trained.append(critic.features)
    for model in trained:
        if config.train.activation_checkpointing:
            recompute_activations(model)
        if config.train.compile:
            compile_blocks(model)


def _build_denoiser(config: Config, policy: Policy) -> Denoiser | None:
    if config.denoiser is None:
        return None
    return Denoiser(config.denoiser, policy, weight_decay=config.train.weight_decay, seed=config.train.seed)


def _engine_of(denoiser: Denoiser, config: Config) -> Engine:
    """What samples its model, now and then: graphs of it would take memory and not pay."""
    rollout = config.rollout.model_copy(update={"cuda_graphs": False})
    return TorchEngine(denoiser.model, denoiser.model.tokenizer, rollout, seed=config.train.seed)


def _go_on(run: Run, resume: Resume) -> None:
    """Weights, optimizer state and records as they were where the run is to go on."""
    checkpoints = run.folder.checkpoints
    checkpoint.clean_up(checkpoints)
    if resume.step is None:
        path = checkpoint.latest(checkpoints)
    else:
        path = checkpoints / f"step-{resume.step}"
        available = checkpoint.steps_in(checkpoints)
        if resume.step not in available:
            raise CheckpointError(
                f"{run.folder.path} has no checkpoint of step {resume.step}; there are {', '.join(map(str, available)) or 'none'}"
            )
    if path is None and run.folder.ended:
        raise CheckpointError(
            f"the run in {run.folder.path} has ended and its checkpoints are gone: there is nothing to go on from; choose another "
            "--out (output_dir)"
        )
    if path is None:
        run.folder.forget_after(-1)  # killed before its first checkpoint: from the start, with a clean record
        return
    run.paused = checkpoint.restore(path, run.learner)
    if getattr(run.config.algorithm, "kl_target", None) is None:  # nothing steers it
        run.learner.kl_coef = run.learner.kl_coef_set
    if run.paused is not None:
        run.paused.batch = to_device(run.paused.batch, run.device)
    if run.learner.step + (run.paused is not None) > run.config.train.steps:
        raise CheckpointError(
            f"{path} is past train.steps={run.config.train.steps}; raise train.steps to go on from it"
        )
    run.folder.check_record(run.learner.step)
    if resume.step is not None:
        checkpoint.forget_after(checkpoints, resume.step)
    run.folder.forget_after(run.learner.step)
