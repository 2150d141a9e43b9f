"""The terminal denoiser: what the verdict on a response most likely was before the noise.

    q(x, y)   = prod_t p_v(y_t | x, y_<t)                        belief: a second language model's likelihood of the response
    P(seen)   = q P(seen | clean 1) + (1 - q) P(seen | clean 0)  what it is trained on, with the channel (`verdict_nll`;
                                                                 with `one_right` of all verdicts on a prompt)
    denoised  = low + (high - low) P(clean = 1 | seen, q)        what the policy learns from, in the seen reward's units

The channel (`train.channels`) says how a clean verdict becomes a seen reward; low and high are its mean rewards of wrong and
of right responses, for flips rho+ and 1 - rho-.

The second model starts as a copy of the policy and does not depend on what the policy becomes, so every past reward goes
on teaching it (replay). It always predicts before it learns: a reward never explains itself away. That q is a
distribution over responses is what a plain value head lacks: not everything can be right at once, so a response gains by
others' losing, and the channel can be told apart from the belief.

Ours; the paper's value model scores tokens, not whole responses (docs/algorithms/denoiser.md).
"""

from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vrpo.algorithms.base import Sums, read_sums
from vrpo.config.learning import DenoiserConfig
from vrpo.functional import (
    auc,
    equal_responses,
    group_advantages,
    joint_posterior_rewards,
    joint_verdict_nll,
    masked_correlation,
    posterior_rewards,
    verdict_nll,
)
from vrpo.models.policy import Policy
from vrpo.models.weights import load_policy_weights
from vrpo.rng import stream
from vrpo.train.channels import FlipChannel, GaussianChannel, build_channel
from vrpo.train.metrics import mean_kl
from vrpo.train.nuisance import WEIGHT_DECAY as SLOPES_WEIGHT_DECAY
from vrpo.train.optim import adamw, load_optimizer_tensors, optimizer_tensors, parameters_of
from vrpo.types import SAMPLED, Batch, Metrics, join, to_device

CHANNEL_LEARNING_RATE = 0.02
"""Of what the channel learns; a rate moves from 0.1 to 0.3 in some 60 optimizer steps."""
MODEL, STATE = "model", "state.safetensors"
"""What `Denoiser.save` writes into its folder."""


@final
class Denoiser:
    """The second language model, the channel, their optimizer, and the replay.

    Args:
        config: the denoiser section.
        policy: the initial policy; a copy of it is made.
        weight_decay: as for policy and critic.
        seed: the run's seed, root of the stream "denoiser-replay".
    """

    def __init__(self, config: DenoiserConfig, policy: Policy, *, weight_decay: float, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.model = policy.trainable_copy()
        self.channel = build_channel(config, policy.device, vocabulary=policy.vocabulary)
        self.optimizer = adamw(self.model, learning_rate=config.learning_rate, weight_decay=weight_decay)
        for name, learned in self.channel.named_parameters():
            decay = 0.0 if name == "numbers" else SLOPES_WEIGHT_DECAY
            group = {"params": [learned], "lr": CHANNEL_LEARNING_RATE, "weight_decay": decay}
            self.optimizer.add_param_group(group)
        self.past: Batch | None = None
        """Scored responses of earlier steps, the newest prompts with at most `capacity` of them, on the CPU; None before the first step."""

    def set_learning_rate(self, rate: float) -> None:
        """The model's; that of the channel stays."""
        of_channel = {id(learned) for learned in self.channel.parameters()}
        for group in self.optimizer.param_groups:
            if id(group["params"][0]) not in of_channel:
                group["lr"] = rate

    def denoise(self, batch: Batch) -> tuple[Batch, Metrics]:
        """The batch with `denoised`, and how good it is. Changes nothing, except that the first rewards start the channel; until some
        differ, rewards are passed on as they are.

        `batch.belief_logp` comes first (`train.values`).

        Raises:
            RewardError: the channel is for rewards that are 0 or 1, and one is neither.
        """
        assert batch.belief_logp is not None, "stage 4 reads the denoiser's model first"
        with torch.no_grad():
            belief = batch.belief_logp.sum(dim=1).exp()
            self.channel.start(batch)
            if not self.channel.started:
                return batch.with_(denoised=batch.scores), self.channel.metrics(batch)
            belief = belief.clamp(self.channel.LEAST_BELIEF, 1.0 - self.channel.LEAST_BELIEF)
            posterior = self._posterior(batch, belief)
        low, high = self.channel.levels()
        metrics = self.channel.metrics(batch) | _quality(batch, belief, posterior)
        metrics["denoiser/kl"] = mean_kl(batch, batch.belief_logp)
        return batch.with_(denoised=low + (high - low) * posterior), metrics

    def _posterior(self, batch: Batch, belief: Tensor) -> Tensor:
        """[B] P(clean = 1) after the verdicts: each response's own, or with `one_right` all those on its prompt."""
        if_right, if_wrong = self.channel.log_likelihoods(batch)
        if not self.config.one_right:
            return posterior_rewards(belief, if_right, if_wrong)
        heard = batch.mask.any(dim=1)  # a response whose reward is missing has no part in it
        together = joint_posterior_rewards(
            *(x[heard] for x in (belief, if_right, if_wrong)),
            **_whose(batch, heard),
            least=self.channel.LEAST_BELIEF,
        )
        return torch.zeros_like(belief).masked_scatter(heard, together)

    def lesson(self, batch: Batch, *, step: int) -> Batch:
        """What the model learns from in a step: the step's own responses and, `replay` times as many, earlier ones.

        Earlier ones are drawn prompt by prompt from the stream ("denoiser-replay", step), so that siblings stay together.
        """
        if self.past is None or self.config.replay == 0:
            return batch
        prompts = self.past.group_ids.unique()
        wanted = self.config.replay * len(batch.group_ids.unique())
        drawn = stream(self.seed, "denoiser-replay", step).permutation(len(prompts))[:wanted]
        rows = torch.isin(self.past.group_ids, prompts[torch.from_numpy(drawn)]).nonzero().squeeze(1)
        return join([batch, to_device(self.past.select(rows), batch.input_ids.device)])

    def loss(self, batch: Batch, *, responses: int) -> tuple[Tensor, Sums]:
        """`verdict_nll`, with `one_right` `joint_verdict_nll`, summed and divided by responses: a micro-batch's share of an optimizer step.

        Args:
            batch: micro-batch; one without any response that counts must not come here. With `one_right` it should have whole
                prompts: siblings in another micro-batch say nothing here.
            responses: that count in the whole optimizer step.
        """
        counted = batch.mask.any(dim=1)
        log_belief, (if_right, if_wrong) = self._log_belief(batch), self.channel.log_likelihoods(batch)
        if self.config.one_right:
            heard = (x[counted] for x in (log_belief, if_right, if_wrong))
            total = joint_verdict_nll(*heard, **_whose(batch, counted))
        else:
            total = torch.where(counted, verdict_nll(log_belief, if_right, if_wrong), 0.0).sum()
        loss = total / responses
        sums = read_sums({"nll": loss, "responses": counted.sum()})
        sums["nll"] *= responses
        return loss, sums

    def remember(self, batch: Batch) -> None:
        """Add a step's responses to the past; prompts leave it whole, so that siblings stay together. A channel sees on which scale they lie."""
        if isinstance(self.channel, GaussianChannel):
            self.channel.watch_scale(batch)
        fresh = to_device(join([batch]), torch.device("cpu"))
        past = fresh if self.past is None else join([self.past, fresh])
        if (extra := len(past) - self.config.capacity) > 0:
            leaving = torch.isin(past.group_ids, past.group_ids[:extra])
            past = past.select((~leaving).nonzero().squeeze(1))
        self.past = past

    def _log_belief(self, batch: Batch) -> Tensor:
        """[B] log q."""
        logp, _ = self.model.logprobs_and_entropy(
            batch.input_ids,
            batch.attention_mask,
            batch.mask,
            temperature=1.0,
            prompts=batch.shared_prompts,
        )
        return logp.sum(dim=1)

    def judge_pays_for(self, count: int = 5) -> dict[str, Any]:
        """What moves the reward whatever the verdict, in its units: {} without a nuisance, else "a_token_more", and as "occurring" the
        `count` tokens that moved past rewards most, text -> reward."""
        if isinstance(self.channel, FlipChannel) or self.channel.nuisance == "none" or self.past is None:
            return {}
        past = to_device(self.past, self.model.device)
        occurring: dict[str, float] = {}
        for token, slope in self.channel.pays_for(past, count):
            text = self.model.tokenizer.decode([token])
            # bytes that are no character by themselves all read the same
            occurring[f"{text} (token {token})" if text in occurring else text] = slope
        return {"a_token_more": float(self.channel.per_token().detach()), "occurring": occurring}

    def save(self, folder: Path) -> None:
        """Everything that learning changes."""
        self.model.save_pretrained(folder / MODEL)
        state = {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        state |= {f"channel.{k}": v.cpu().clone() for k, v in self.channel.state_dict().items()}
        if self.past is not None:
            state |= {
                f"past.{name}": getattr(self.past, name).contiguous() for name in ("group_ids", *SAMPLED)
            }
        save_file(state, folder / STATE)

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""
        load_policy_weights(self.model, folder / MODEL)
        state = load_file(folder / STATE)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        # the channel's parameters come last: rates that are given now have no moments
        count = sum(1 for _ in parameters_of(self.optimizer))
        moments = {k: v for k, v in part("optimizer.").items() if int(k.split(".")[0]) < count}
        load_optimizer_tensors(self.optimizer, moments)
        # rates that are given now stand, and those that no longer are start anew
        channel, saved = self.channel.state_dict(), part("channel.")
        if isinstance(self.channel, GaussianChannel) and not channel.keys() - {"off"} <= saved.keys():
            saved["first"] = torch.zeros_like(
                channel["first"]
            )  # a nuisance that is new starts with the next rewards
        self.channel.load_state_dict(channel | {k: v for k, v in saved.items() if k in channel})
        past: dict[str, Any] = part("past.")
        # nothing reads the names of past samples
        names = tuple(f"past/{row}" for row in range(len(past.get("group_ids", ()))))
        self.past = Batch(sample_ids=names, **past) if past else None


def _whose(batch: Batch, heard: Tensor) -> dict[str, Tensor]:
    """Of the rows that are heard: equal numbers for equal responses, and for the same prompt."""
    answers = equal_responses(batch.input_ids, batch.mask, batch.group_ids)
    return {"answers": answers[heard], "group_ids": batch.group_ids[heard]}


def _quality(batch: Batch, belief: Tensor, posterior: Tensor) -> Metrics:
    """How well q [B] and P(clean = 1 | seen, q) [B] tell clean verdicts, where these are known and 0/1."""
    clean = batch.clean_scores
    known = batch.mask.any(dim=1) & ((clean == 0) | (clean == 1))
    if not bool(known.any()):
        return {}
    right = clean[known] > 0.5
    return {
        "denoiser/accuracy": float(((posterior[known] > 0.5) == right).float().mean()),
        "denoiser/auc": float(auc(belief[known], right)),
        "denoiser/corr": float(masked_correlation(posterior, clean.nan_to_num(), known)),
        "denoiser/corr_seen": float(masked_correlation(batch.scores, clean.nan_to_num(), known)),
        "denoiser/corr_siblings": _among_siblings(posterior, clean, batch, known),
        "denoiser/corr_seen_siblings": _among_siblings(batch.scores, clean, batch, known),
    }


def _among_siblings(x: Tensor, clean: Tensor, batch: Batch, known: Tensor) -> float:
    """Correlation of x [B] with the clean verdict [B], both less their mean over the samples of a prompt."""
    x, clean = (
        group_advantages(numbers.nan_to_num(), batch.group_ids, scale="none", valid=known)
        for numbers in (x, clean)
    )
    return float(masked_correlation(x, clean, known))
