"""Stage 6 of a step: the critic's passes over the data, the denoiser's, then the policy's.

All can be paused between two micro-batches and gone on with: `Prepared.critic`, `.denoiser` and `.policy` say how
far they are. Nothing else of the learner than weights and optimizer moments changes here.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from vrpo.algorithms.base import Sums
from vrpo.algorithms.critic_objective import Denominators
from vrpo.train.denoising import Denoiser
from vrpo.train.metrics import critic_update_metrics
from vrpo.train.optim import schedule, set_learning_rate
from vrpo.train.prepared import Prepared
from vrpo.train.run import Run
from vrpo.train.update import update
from vrpo.types import Batch, Metrics


def update_critic(run: Run, prepared: Prepared, *, pause: Callable[[], bool]) -> Metrics:
    """`critic.epochs` passes of the value model over the step's data."""
    learner, objective, section = run.learner, run.objective, run.config.critic
    if objective is None or section is None or learner.critic is None or learner.critic_optimizer is None:
        return {}
    critic, train, batch, step = learner.critic, run.config.train, prepared.batch, prepared.step
    critic.choose_units(_rewards_of(batch))
    beta = objective.beta(learner.critic_state)
    set_learning_rate(learner.critic_optimizer, section.learning_rate * schedule(train, step=step - 1))
    stats = update(
        learner.critic_optimizer,
        batch,
        lambda micro, whole, epoch: objective.loss(
            critic,
            micro,
            denominators=Denominators.of(whole),
            beta=beta,
            noise_labels=(step, epoch),
            reference_states=run.reference_states,
        ),
        epochs=section.epochs,
        minibatch=train.minibatch,
        split=run.splitter,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        labels=("critic", step),
        stats=prepared.critic,
        pause=pause,
    )
    return critic_update_metrics(stats, beta=beta, batch=batch)


def _rewards_of(batch: Batch) -> Tensor:
    """[N] What the responses that count are worth to policy and critic, without penalties."""
    rewards = batch.scores if batch.denoised is None else batch.denoised
    return rewards[batch.mask.any(dim=1)]


def update_denoiser(
    run: Run, denoiser: Denoiser, prepared: Prepared, *, pause: Callable[[], bool]
) -> Metrics:
    """One pass of the denoiser over the step's responses and earlier ones, once its channel has started."""
    if not denoiser.channel.started:
        return {
            "loss/denoiser_avg": math.nan,
            "denoiser/grad_norm": math.nan,
            "denoiser/skipped_updates": 0.0,
        }
    train, step = run.config.train, prepared.step
    denoiser.set_learning_rate(denoiser.config.learning_rate * schedule(train, step=step - 1))

    def loss(micro: Batch, whole: Batch, epoch: int) -> tuple[Tensor, Sums]:
        return denoiser.loss(micro, responses=int(whole.mask.any(dim=1).sum()))

    stats = update(
        denoiser.optimizer,
        denoiser.lesson(prepared.batch, step=step),
        loss,
        epochs=1,
        minibatch=denoiser.config.minibatch or train.minibatch,
        split=replace(run.splitter, whole_prompts=denoiser.config.one_right),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        labels=("denoiser", step),
        stats=prepared.denoiser,
        pause=pause,
    )
    responses = stats.sums["responses"]
    return {
        "loss/denoiser_avg": stats.sums["nll"] / responses if responses else math.nan,
        "denoiser/grad_norm": stats.grad_norm,
        "denoiser/skipped_updates": float(stats.skipped),
    }


def update_policy(run: Run, prepared: Prepared, *, pause: Callable[[], bool]) -> None:
    """`train.epochs` passes of the policy, once the critic is warm."""
    learner, train, step = run.learner, run.config.train, prepared.step
    if step <= run.critic_warmup:
        set_learning_rate(learner.policy_optimizer, 0.0)
        return
    rate = train.learning_rate * schedule(train, step=step - 1, start=run.critic_warmup)
    set_learning_rate(learner.policy_optimizer, rate)

    def loss(micro: Batch, whole: Batch, epoch: int) -> tuple[Tensor, Sums]:
        logp, entropy = learner.policy.logprobs_and_entropy(
            micro.input_ids,
            micro.attention_mask,
            micro.mask,
            temperature=run.config.rollout.temperature,
            prompts=micro.shared_prompts,
        )
        return run.algorithm.loss(logp, entropy, micro, num_tokens=whole.num_tokens)

    update(
        learner.policy_optimizer,
        prepared.batch.with_(trunk_states=None),  # the critic's; cutting them up for the policy would cost
        loss,
        epochs=train.epochs,
        minibatch=train.minibatch,
        split=run.splitter,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        labels=("policy", step),
        stats=prepared.policy,
        pause=pause,
    )
