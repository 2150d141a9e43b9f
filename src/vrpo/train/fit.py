"""Whether task, model and reward fit together: said before the first step, not in the middle of it."""

from vrpo.errors import DataError
from vrpo.models import Policy
from vrpo.rewards import RewardPipeline
from vrpo.rewards.user import PROVIDED
from vrpo.tasks import Task

NOT_PASSED = "is not passed here; take the parameter out, or give it a default"
NO_COLUMNS = {
    "trainer_state": NOT_PASSED,
    "log_extra": NOT_PASSED,
    "log_metric": NOT_PASSED,
    "prompt": "is called 'prompts', a list with one entry per response; rename the parameter",
    "completion": "is called 'completions', a list with one entry per response; rename the parameter",
}
"""Parameters of a reward function that are hardly meant as columns -> what to do."""


def check_fit(task: Task, policy: Policy, rewards: RewardPipeline, *, max_completion_length: int) -> None:
    """Prompts and responses fit the context, and the rows have the columns the rewards read, and none of an argument's name.

    Raises:
        DataError: the first thing that does not fit.
    """
    if policy.context_length is not None:
        task.check_context(policy.context_length, max_completion_length)
    if (clash := task.first_with(PROVIDED)) is not None:
        row, column = clash
        raise DataError(
            f"row {row} has a column {column!r}, which is an argument of every reward function; rename it (task.columns: "
            f"{{<name>: {column}}} in a file)"
        )
    needs = rewards.columns
    lacking = sorted(needs.keys() - task.columns)
    if lacking:
        column = lacking[0]
        if (mend := NO_COLUMNS.get(column)) is not None:
            raise DataError(f"{needs[column]} has a parameter {column!r}, which {mend}")
        row, count, whole, has = task.without(column)
        raise DataError(
            f"{needs[column]} needs column {column!r}, and row {row} ({count} of {whole}) lacks it, where it has {', '.join(has) or 'none'}; "
            "write null in rows that have no value, rename the column (task.columns in a file), or change the reward's"
        )
