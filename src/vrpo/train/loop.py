"""The training loop, as numbered prose.

    tasks ──Prompt──> engine ──Rollout──> rewards ──ScoredRollout──> collate ──Batch──> algorithm
                        ^ live weights                                 ^ critic, reference   │ + advantages
                        └──────────────── next step <── optimizers <── losses <──────────────┘

Nothing here runs beside anything else: a step's samples come from the weights the last step left, and are
used once. The loop knows no algorithm by name and does no arithmetic on tensors.
"""

import time

from vrpo.rollout import collate
from vrpo.train import checkpoint
from vrpo.train.clock import Clock
from vrpo.train.learning import update_critic, update_policy
from vrpo.train.metrics import critic_metrics, policy_metrics, reward_metrics, rollout_metrics
from vrpo.train.progress import Display
from vrpo.train.run import Run
from vrpo.train.signals import stop_requested
from vrpo.train.summary import summarise
from vrpo.train.values import evaluate_batch
from vrpo.types import Metrics, to_device


def train(run: Run, display: Display) -> dict[str, object]:
    """Train to the last step, recording everything in the run folder; the run's summary.

    Raises:
        vrpo.train.signals.Stopped: SIGINT or SIGTERM came; a checkpoint of the last whole step is on disk.
    """
    config, learner = run.config.train, run.learner
    started = time.perf_counter()
    display.start(run.name, first=learner.step, steps=config.steps, note=run.task.describe())
    try:
        with stop_requested() as stop:
            if not run.folder.read_evaluations():
                _evaluate(run, display)
            while learner.step < config.steps and stop.signal is None:
                step = learner.step + 1
                metrics = _step(run, step)
                learner.step = step
                run.folder.append(run.folder.metrics, {"step": step, **metrics})
                display.step(step, metrics)
                if step == config.steps or _due(step, config.eval_every):
                    _evaluate(run, display)
                if _due(step, config.checkpoint_every):
                    checkpoint.save(run.folder.checkpoints, learner, keep=config.keep_checkpoints)
            if learner.step not in checkpoint.steps_in(run.folder.checkpoints):
                checkpoint.save(run.folder.checkpoints, learner, keep=config.keep_checkpoints)
            stop.leave_if_asked(run.folder.path)
    finally:
        display.finish()
    summary = summarise(run.folder, run.config, seconds=time.perf_counter() - started)
    run.folder.write_json("summary.json", summary)
    return summary


def _step(run: Run, step: int) -> Metrics:
    """One step: from prompts to new weights and the line that describes it."""
    config, clock = run.config, Clock()

    # 1 prompts: a function of the seed and the step alone
    count = config.train.completions_per_step // config.rollout.num_generations
    prompts = run.task.draw(seed=config.train.seed, step=step - 1, count=count)

    # 2 rollout: sample responses with the live policy; log-probabilities come from the sampler
    with clock.phase("rollout"):
        rollouts = run.engine.generate(
            prompts,
            num_generations=config.rollout.num_generations,
            step=step,
            policy_version=run.learner.policy_version,
        )

    # 3 reward: the clean verdict, and what noise makes of it
    with clock.phase("reward"):
        scored = run.rewards.score(rollouts, step=step)
    batch = to_device(collate(scored, pad_id=run.pad_id, truncation=config.algorithm.truncation), run.device)

    # 4 values: the frozen reference and the critic read the sampled tokens, before any update
    with clock.phase("values"):
        batch, run.learner.critic_state = evaluate_batch(
            batch,
            reference=run.reference if run.reads_reference else None,
            critic=run.learner.critic,
            objective=run.objective,
            state=run.learner.critic_state,
            temperature=config.rollout.temperature,
            microbatch=config.train.microbatch,
        )

    # 5 advantages and value targets
    batch = run.algorithm.annotate(batch)

    # 6 losses and optimizer steps: the critic first, then the policy unless the critic is still warming up
    with clock.phase("critic"):
        learned = update_critic(run, batch, step)
    with clock.phase("policy"):
        policy_stats = update_policy(run, batch, step)

    # 7 metrics: what the critic knew before the update, what the updates did, what the noise did
    tokens = sum(s.rollout.num_actions for s in scored)
    run.folder.append_rollouts(step, scored)
    return {
        "episode": float(step * config.train.completions_per_step),
        **reward_metrics(batch, kl_coef=config.algorithm.kl_coef),
        **rollout_metrics(scored),
        **critic_metrics(batch),
        **learned,
        **policy_metrics(policy_stats),
        **run.learning_rates(),
        **clock.metrics(completion_tokens=tokens),
    }


def _evaluate(run: Run, display: Display) -> None:
    """Clean accuracy of the weights as they are now."""
    result = run.evaluate()
    display.evaluation(run.learner.step, result)
    run.folder.append_evaluation(run.learner.step, result)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
