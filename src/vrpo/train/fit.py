"""Whether task, model and reward fit together: said before the first step, not in the middle of it."""

from vrpo.errors import DataError
from vrpo.models import Policy
from vrpo.rewards import RewardPipeline
from vrpo.tasks import Task


def check_fit(task: Task, policy: Policy, rewards: RewardPipeline, *, max_completion_length: int) -> None:
    """Prompts and responses fit the context, and the rows have the columns the rewards read.

    Raises:
        DataError: the first thing that does not fit.
    """
    if policy.context_length is not None:
        task.check_context(policy.context_length, max_completion_length)
    lacking = sorted(rewards.columns - task.columns)
    if lacking:
        row, count, whole, has = task.without(lacking[0])
        raise DataError(
            f"the reward needs column {lacking[0]!r}, and row {row} ({count} of {whole}) lacks it, where it has {', '.join(has) or 'none'}; "
            "write null in rows that have no value, rename the column (task.columns in a file), or change the reward's"
        )
