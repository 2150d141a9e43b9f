"""The exact value of every state, for tasks with one right response: what a perfect critic would say.

    V(s_t) = low + (high - low) p(rest of the right response | s_t)     p is 0 once the response has left the right one

p is the policy's own probability, low and high are the mean rewards of wrong and of right responses in this step, in the units
that the policy learns from. It needs the right answers and the clean verdicts, so it is no method: it is a control that says how
much any critic could gain, and so whether one is worth improving.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vrpo.models import Policy
from vrpo.tasks import Task
from vrpo.train.sft import encode_examples
from vrpo.types import Batch, ScoredRollout


@torch.no_grad()
def exact_values(
    batch: Batch, scored: Sequence[ScoredRollout], *, policy: Policy, column: str, temperature: float
) -> Batch:
    """The batch with the exact `values`, and 0 after the last token.

    Args:
        batch: the step's samples, denoised where that is done.
        scored: what they were collated from, in the same order.
        policy: whose probabilities count, before its update.
        column: of the task, with the text of the one response that is right.
        temperature: of sampling.

    Raises:
        DataError: a row has no text in that column.
    """
    prompts = {id(one.rollout.prompt): one.rollout.prompt for one in scored}
    row_of = {key: row for row, key in enumerate(prompts)}
    encoded = encode_examples(list(prompts.values()), policy, column, setting="critic.oracle")
    ids, attention, mask = (x.to(policy.device) for x in encoded)
    logp, _ = policy.logprobs_and_entropy(ids, attention, mask, temperature=temperature)
    rest = torch.where(mask, logp.flip(1).cumsum(dim=1).flip(1).exp(), 0.0)
    prompt_of_row = torch.tensor([row_of[id(one.rollout.prompt)] for one in scored], device=policy.device)

    length = batch.input_ids.shape[1]
    right = _fit(torch.where(attention, ids, -1), length, fill=-1)[prompt_of_row]
    on_the_way = (batch.input_ids == right).cummin(dim=1).values[:, :-1]
    chance = torch.where(on_the_way, _fit(rest, length - 1, fill=0)[prompt_of_row], 0.0)
    low, high = _levels(batch)
    values = torch.where(batch.mask, low + (high - low) * chance, 0.0)
    return batch.with_(values=values, bootstrap=torch.zeros_like(batch.scores))


def check_answers(task: Task, policy: Policy, column: str) -> None:
    """Every prompt that may be drawn has a right response in `column`, and one that the model can read.

    Raises:
        DataError: one has none.
    """
    for prompt in task.checked_train_prompts():
        encode_examples([prompt], policy, column, setting="critic.oracle")


def _fit(x: Tensor, columns: int, *, fill: int) -> Tensor:
    """x [G, any] with this many columns: cut, or filled."""
    return pad(x[:, :columns], (0, max(columns - x.shape[1], 0)), value=fill)


def _levels(batch: Batch) -> tuple[float, float]:
    """Mean reward of wrong and of right responses, as the policy sees it; 0 and 1 where there is none of a kind."""
    counted, scores = batch.mask.any(dim=1), batch.policy_scores
    levels = []
    for verdict, of_kind in enumerate((batch.clean_scores <= 0.5, batch.clean_scores > 0.5)):
        rows = counted & of_kind
        levels.append(float(scores[rows].mean()) if bool(rows.any()) else float(verdict))
    return levels[0], levels[1]
