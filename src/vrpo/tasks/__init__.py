"""Stage 1: where prompts come from. One class, `Task`, whatever the source.

arithmetic.py           generated problems
data.py                 files and the hub -> rows
math.py choice.py rows.py   row -> prompt text and columns
encode.py               prompt text -> token ids
task.py                 the endless training stream and the fixed evaluation set
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vrpo.config.tasks import ArithmeticTask, ChoiceTask, DataTask, MathTask, RowsTask, TaskConfig
from vrpo.errors import DataError
from vrpo.tasks import choice, math, rows
from vrpo.tasks.arithmetic import arithmetic_task
from vrpo.tasks.data import Row, hold_out, is_file, name_rows, read_rows
from vrpo.tasks.encode import encode
from vrpo.tasks.task import Prompts, Task
from vrpo.types import Message, Prompt

__all__ = ["Prompts", "Task", "build_task", "encode", "task_from_rows"]

Shape = Callable[[Row], tuple[str | tuple[Message, ...], dict[str, Any]]]
"""Row -> (prompt, columns)."""

COMMON_ROLES = {"system", "developer", "user", "assistant", "tool"}
"""Of chat messages."""


def build_task(config: TaskConfig, tokenizer: Any) -> Task:
    """The task of a configuration.

    Args:
        config: the `task:` section.
        tokenizer: the policy's Hugging Face tokenizer.

    Raises:
        DataError: missing file or column, malformed row, no rows, chat without a chat template.
    """
    shape: Shape
    required: tuple[str, ...]
    match config:
        case ArithmeticTask():
            return arithmetic_task(config, tokenizer)
        case MathTask(template=template):
            required, shape = math.REQUIRED, lambda row: math.math_prompt(row, template)
        case ChoiceTask(template=template, shuffle=shuffle):
            required, shape = (
                choice.REQUIRED,
                lambda row: choice.choice_prompt(row, template, shuffle=shuffle),
            )
        case RowsTask():
            required, shape = rows.REQUIRED, rows.rows_prompt
    train, evaluation = _read(config, required)
    return _assemble(
        config.type,
        train,
        evaluation,
        tokenizer,
        shape=shape,
        chat=config.chat,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        max_prompt_tokens=config.max_prompt_tokens,
        holdout=config.holdout if config.eval_data is None and config.eval_split is None else None,
    )


def task_from_rows(
    train_rows: Any,
    eval_rows: Any,
    tokenizer: Any,
    *,
    holdout: float = 0.1,
    chat: bool | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
) -> Task:
    """A task from rows in memory: a list of dicts or a `datasets.Dataset`, with a column `prompt`.

    Args:
        train_rows: rows to train on. Anything may come in here; what is no iterable of mappings is refused.
        eval_rows: held-out rows; None holds out a share of `train_rows`.
        tokenizer: the policy's Hugging Face tokenizer.
        holdout: that share, chosen by a hash of the prompt.
        chat: use the chat template for text prompts; None decides by whether there is one.
        system_prompt: first message of a chat prompt.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
        max_prompt_tokens: rows with longer prompts are dropped and counted.
    """
    train = name_rows(train_rows, columns={}, required=rows.REQUIRED, source="train rows")
    if eval_rows is None:
        train, evaluation = hold_out(train, holdout=holdout, key="prompt", source="train rows")
    else:
        evaluation = name_rows(eval_rows, columns={}, required=rows.REQUIRED, source="eval rows")
    return _assemble(
        "rows",
        train,
        evaluation,
        tokenizer,
        shape=rows.rows_prompt,
        chat=chat,
        system_prompt=system_prompt,
        chat_template_kwargs=chat_template_kwargs,
        max_prompt_tokens=max_prompt_tokens,
        holdout=holdout if eval_rows is None else None,
    )


def _read(config: DataTask, required: Sequence[str]) -> tuple[list[Row], list[Row]]:
    if is_file(config.data) and (config.subset is not None or config.split != "train"):
        raise DataError(
            f"task.subset={config.subset!r} and task.split={config.split!r}, but {config.data} is a file, which has neither; "
            "remove them"
        )

    def read(source: str, split: str) -> list[Row]:
        found = read_rows(source, subset=config.subset, split=split)
        return name_rows(found, columns=config.columns, required=required, source=source)

    train = read(config.data, config.split)
    if config.eval_data is None and config.eval_split is None:
        return hold_out(train, holdout=config.holdout, key=required[0], source=config.data)
    source = config.eval_data or config.data
    if config.eval_split is not None and is_file(source):
        raise DataError(
            f"eval_split={config.eval_split!r}, but {source} is a file and files have no splits; name the file of "
            "held-out rows in task.eval_data and remove task.eval_split"
        )
    return train, read(source, config.eval_split or config.split)


def _assemble(
    name: str,
    train: Sequence[Row],
    evaluation: Sequence[Row],
    tokenizer: Any,
    *,
    shape: Shape,
    chat: bool | None,
    system_prompt: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    max_prompt_tokens: int | None,
    holdout: float | None,
) -> Task:
    def make(row: Row, split: str) -> Prompt:
        prompt, columns = shape(row)
        try:
            token_ids = encode(
                prompt,
                tokenizer,
                chat=chat,
                system_prompt=system_prompt,
                chat_template_kwargs=chat_template_kwargs,
            )
        except DataError as error:
            raise DataError(f"{row.label}: {error}") from error
        return Prompt(prompt_id=f"{split}/{row.row_id}", prompt=prompt, token_ids=token_ids, columns=columns)

    kept = []
    dropped = 0
    for split, found in (("train", train), ("eval", evaluation)):
        prompts = [make(row, split) for row in found]
        short = [p for p in prompts if max_prompt_tokens is None or len(p.token_ids) <= max_prompt_tokens]
        if not short:
            shortest = min(len(p.token_ids) for p in prompts)
            raise DataError(
                f"{name}: all {len(prompts)} {split} rows are longer than max_prompt_tokens={max_prompt_tokens} (the "
                f"shortest has {shortest}); raise max_prompt_tokens (task.max_prompt_tokens in a file)"
            )
        dropped += len(prompts) - len(short)
        kept.append(short)
    note = f", {dropped:,} dropped (more than {max_prompt_tokens} prompt tokens)" if dropped else ""
    total = len(train) + len(evaluation)
    if holdout is not None and len(evaluation) > 2 * holdout * total:
        note += f", which is {len(evaluation):,} of {total:,} rows, more than twice holdout={holdout:g}, which counts distinct questions"
    trained = {prompt.token_ids.tobytes() for prompt in kept[0]}
    if known := sum(prompt.token_ids.tobytes() in trained for prompt in kept[1]):
        note += f", {known:,} of the held-out prompts also in the training rows"
    if strange := _with_unknown_text([*kept[0], *kept[1]], tokenizer):
        note += f", {strange:,} prompts with text that the tokenizer does not know ({tokenizer.unk_token})"
    if foreign := _unusual_roles([*kept[0], *kept[1]], tokenizer):
        note += f", messages with unusual roles ({', '.join(map(repr, foreign))})"
    return Task(name, kept[0], kept[1], note=note)


def _unusual_roles(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Roles of messages that are neither common nor named in the chat template; many templates write any role, a misspelt one too."""
    template = str(tokenizer.chat_template)
    roles = {m["role"] for p in prompts if not isinstance(p.prompt, str) for m in p.prompt}
    return sorted(role for role in roles - COMMON_ROLES if role not in template)


def _with_unknown_text(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """Prompts that hold the unknown token, unless it has another task too, as GPT-2's has."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0
    return sum(bool((prompt.token_ids == unknown).any()) for prompt in prompts)
