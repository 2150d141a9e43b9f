"""The training loop, as numbered prose.

    tasks ──Prompt──> engine ──Rollout──> rewards ──ScoredRollout──> collate ──Batch──> algorithm
                        ^ live weights                                 ^ critic, reference   │ + advantages
                        └──────────────── next step <── optimizers <── losses <──────────────┘

Nothing here runs beside anything else: a step's samples come from the weights the last step left, and are
used once. The loop knows no algorithm by name and does no arithmetic on tensors.

A step has two halves. `_prepare` changes nothing, so a signal may end it anywhere. `_learn` moves weights, and
can be left between two micro-batches and gone on with by another process.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from vrpo.errors import NumericsError, StorageError
from vrpo.rollout import collate
from vrpo.train.clock import Clock
from vrpo.train.files import finite
from vrpo.train.folder import SUMMARY
from vrpo.train.learning import update_critic, update_denoiser, update_policy
from vrpo.train.memory import peak_bytes
from vrpo.train.metrics import policy_metrics, sampled_metrics
from vrpo.train.milestones import due, evaluate_if_due, save_pause, save_whole_step, watch, write_worst_tokens
from vrpo.train.numerics import not_finite
from vrpo.train.oracle import exact_values
from vrpo.train.prepared import Prepared
from vrpo.train.progress import Display
from vrpo.train.run import Run
from vrpo.train.signals import GivenUp, StopRequest, add_what_is_kept, stop_requested
from vrpo.train.summary import summarise
from vrpo.train.transcript import transcript
from vrpo.train.update import Paused, UpdateStats
from vrpo.train.values import evaluate_batch
from vrpo.types import Batch, Metrics, ScoredRollout, to_device


def train(run: Run, display: Display) -> dict[str, object]:
    """Train to the last step, recording everything in the run folder; the run's summary.

    Raises:
        vrpo.train.signals.Stopped: SIGINT or SIGTERM came; a checkpoint that loses no update is on disk.
        NumericsError: the numbers went bad; the worst tokens are in worst_tokens.json.
    """
    started = time.perf_counter()
    try:
        display.start(run.name, first=run.learner.step, steps=run.config.train.steps, note=run.describe())
        with stop_requested() as stop:
            try:
                _steps(run, display, stop)
            except GivenUp:
                pass  # nothing has changed since the last whole step
            except Paused:
                save_pause(run)
            except NumericsError as error:
                write_worst_tokens(run, error)
                raise
            except StorageError:
                raise
            except Exception as error:
                # a judge that is gone, a reward no critic can read, a tracker that is down take nothing that was learned with them
                if run.learner.step > 0 and run.paused is None:
                    save_whole_step(run)
                    add_what_is_kept(error, run.learner.step, run.folder.path)
                raise
            if run.paused is None:
                save_whole_step(run)
            stop.leave_if_asked(run.folder.path)
        summary = summarise(run.folder, run.config, seconds=time.perf_counter() - started)
        if run.learner.denoiser is not None:
            summary["judge_pays_for"] = run.learner.denoiser.judge_pays_for()
        run.folder.write_json(SUMMARY, summary)
        return summary
    finally:
        try:
            display.finish()
        finally:  # a display that fails leaves no folder locked
            run.close()


def _steps(run: Run, display: Display, stop: StopRequest) -> None:
    """Every step that is left, each with what is due after it."""
    config, learner = run.config.train, run.learner
    history = run.folder.read_metrics()
    evaluate_if_due(run, display, stop)
    while learner.step < config.steps:
        if run.paused is None:
            with stop.abandonable():
                prepared = _prepare(run, learner.step + 1)
            learner.critic_state, run.paused = prepared.critic_state, prepared
        metrics = _learn(run, run.paused, stop)
        run.folder.append_step(learner.step, metrics, run.paused.rows)
        run.paused = None
        display.step(learner.step, metrics)
        history.append(finite(metrics))
        watch(run, history, display)
        evaluate_if_due(run, display, stop)
        if due(learner.step, config.checkpoint_every):
            save_whole_step(run)


def _prepare(run: Run, step: int) -> Prepared:
    """Stages 1 to 5: from prompts to a batch to learn from. Changes nothing."""
    config, learner, clock = run.config, run.learner, Clock()

    # 1 prompts: a function of the seed and the step alone
    count = config.train.completions_per_step // config.rollout.num_generations
    prompts = run.task.draw(seed=config.train.seed, step=step - 1, count=count)

    # 2 rollout: sample responses with the live policy; log-probabilities come from the sampler
    with clock.phase("rollout"):
        rollouts = run.sample(prompts, step=step)

    # 3 reward: the clean verdict, and what noise makes of it
    with clock.phase("reward"):
        scored = run.rewards.score(rollouts, step=step)
    batch = to_device(collate(scored, pad_id=run.pad_id, truncation=config.algorithm.truncation), run.device)

    # 4 values: the frozen reference and the critic read the sampled tokens, before any update; the denoiser asks what
    # the verdict was before the noise
    with clock.phase("values"):
        batch, critic_state = evaluate_batch(
            batch,
            reference=run.reference if run.reads_reference else None,
            critic=learner.critic,
            objective=run.objective,
            state=learner.critic_state,
            temperature=config.rollout.temperature,
            split=run.splitter,
            believer=None if learner.denoiser is None else learner.denoiser.model,
            features=run.features,
        )
        denoising: Metrics = {}
        if learner.denoiser is not None:
            batch, denoising = learner.denoiser.denoise(batch)
        batch = _oracle_if_asked(run, batch, scored)

    # 5 advantages and value targets
    explained_var = learner.critic_state.explained_var
    batch = run.algorithm.annotate(batch, kl_coef=learner.kl_coef, explained_var=explained_var)
    if (problem := not_finite(batch)) is not None:
        raise NumericsError(
            f"{problem}; nothing can be learned from this step, start again with a lower learning rate",
            batch=batch,
        )
    if run.objective is not None:
        critic_state = run.objective.observe_returns(batch, critic_state)

    weights = {"kl_coef": learner.kl_coef, "belief_coef": config.algorithm.belief_coef}
    gold, known = run.rewards.has_gold, run.rewards.knows_clean
    metrics = sampled_metrics(batch, scored, denoising, knows_clean=known, has_gold=gold, **weights)
    return Prepared(
        step=step,
        batch=batch,
        metrics={"episode": float(step * config.train.completions_per_step), **metrics},
        rows=transcript(scored, batch, learner.policy.tokenizer),
        tokens=sum(s.rollout.num_actions for s in scored),
        critic_state=critic_state,
        critic=UpdateStats(skipped_in_a_row=learner.skipped_in_a_row["critic"]),
        denoiser=UpdateStats(skipped_in_a_row=learner.skipped_in_a_row["denoiser"]),
        policy=UpdateStats(skipped_in_a_row=learner.skipped_in_a_row["policy"]),
        clock=clock,
    )


def _oracle_if_asked(run: Run, batch: Batch, scored: Sequence[ScoredRollout]) -> Batch:
    """The batch with exact values in place of the critic's, where `critic.oracle` names the right responses."""
    critic, temperature = run.config.critic, run.config.rollout.temperature
    if critic is None or critic.oracle is None:
        return batch
    policy = run.learner.policy
    return exact_values(batch, scored, policy=policy, column=critic.oracle, temperature=temperature)


def _learn(run: Run, prepared: Prepared, stop: StopRequest) -> Metrics:
    """Stages 6 and 7: new weights, and the line that describes the step.

    Raises:
        Paused: a signal came; `prepared` says how far the updates are.
    """
    learner, clock = run.learner, prepared.clock

    # 6 losses and optimizer steps: the critic first, the denoiser, then the policy unless the critic is still warming up
    with clock.phase("critic"):
        learned = update_critic(run, prepared, pause=stop)
    if learner.denoiser is not None:
        with clock.phase("denoiser"):
            learned |= update_denoiser(run, learner.denoiser, prepared, pause=stop)
    with clock.phase("policy"):
        update_policy(run, prepared, pause=stop)

    # what the next step starts from: everything but the weights changes here, at once
    learner.step = prepared.step
    if learner.denoiser is not None:
        learner.denoiser.remember(prepared.batch)
    learner.policy_version += bool(prepared.policy.grad_norms)
    learner.critic_state = replace(
        learner.critic_state, updates=learner.critic_state.updates + len(prepared.critic.grad_norms)
    )
    learner.skipped_in_a_row = {
        "critic": prepared.critic.skipped_in_a_row,
        "denoiser": prepared.denoiser.skipped_in_a_row,
        "policy": prepared.policy.skipped_in_a_row,
    }
    if prepared.step > run.critic_warmup:  # before, the KL is 0 whatever the weight
        kl, responses = prepared.metrics.get("objective/kl"), int(prepared.batch.mask.any(dim=1).sum())
        learner.kl_coef = run.algorithm.next_kl_coef(learner.kl_coef, kl=kl, responses=responses)

    # 7 metrics: what the critic knew before the update, what the updates did, what the noise did
    return {
        **prepared.metrics,
        **learned,
        **policy_metrics(prepared.policy),
        **run.learning_rates(),
        **clock.metrics(completion_tokens=prepared.tokens),
        "memory/peak_gib": peak_bytes(run.device) / 2**30,
    }
