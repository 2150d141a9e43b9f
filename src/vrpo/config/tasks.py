"""`task:` where prompts come from, and what is held out for evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vrpo.config.base import Strict

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
"""Endings that make `data` a file and not the name of a data set on the hub; upper case counts too."""

Operation = Literal["add", "sub", "mul", "mod", "gcd", "max"]


class ArithmeticTask(Strict):
    """Generated problems such as `12+34=`; needs no data. Column `answer` is the result, `work` every result on the way."""

    type: Literal["arithmetic"] = "arithmetic"
    operations: tuple[Operation, ...] = Field(("add",), min_length=1, strict=False)
    """Drawn uniformly per problem. add, sub, mul are infix; mod, gcd, max are written `gcd(12,18)`."""
    min_digits: int = Field(1, ge=1, le=9)
    """Fewest digits of an operand."""
    max_digits: int = Field(2, ge=1, le=9)
    """Most digits of an operand; the length is drawn uniformly per operand."""
    terms: int = Field(2, ge=2, le=8)
    """Operands per problem; infix operations chain (`3+4+5=`)."""
    template: str = "{problem}="
    """The prompt; {problem} is replaced. Write examples in front of it for a few-shot prompt."""
    spaces: bool = False
    """Write `12 + 34` instead of `12+34`: what models trained on text have seen more of."""
    chat: bool = False
    """Wrap the prompt as one user message with the model's chat template."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """What the chat template is told besides the messages, such as {enable_thinking: false} for Qwen 3."""
    size: int = Field(1_000_000, ge=1)
    """Number of distinct training rows the stream cycles through; small values mean prompts are revisited."""
    holdout: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of all problems, chosen by a hash of the problem, that only evaluation uses."""

    @model_validator(mode="after")
    def _digits_in_order(self) -> "ArithmeticTask":
        if self.min_digits > self.max_digits:
            raise ValueError(
                f"min_digits={self.min_digits} is above max_digits={self.max_digits}; swap them or raise max_digits"
            )
        if "{problem}" not in self.template:
            raise ValueError(f"template {self.template!r} lacks {{problem}}; put it where the problem goes")
        return self


class DataTask(Strict):
    """What every task read from files or the hub has."""

    data: str
    """A .jsonl, .jsonl.gz, .json, .csv or .parquet file, or the name of a data set on the hub."""
    subset: str | None = None
    """Configuration name of a hub data set, such as `main`."""
    split: str = "train"
    """Split of a hub data set."""
    eval_data: str | None = None
    """Held-out rows, same forms as `data`. null: hold out a share of `data`."""
    eval_split: str | None = None
    """Split of a hub data set to evaluate on; `eval_data` defaults to `data` when this is set."""
    holdout: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of rows, chosen by a hash of the row, held out when there is neither eval_data nor eval_split."""
    columns: dict[str, str] = Field({})
    """Our column name -> the data set's name, where they differ, such as {answer: ground_truth}."""
    system_prompt: str | None = None
    """First message of a chat prompt."""
    chat: bool | None = None
    """Use the model's chat template. null: yes when the tokenizer has one."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """What the chat template is told besides the messages, such as {enable_thinking: false} for Qwen 3."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Rows with longer prompts are dropped and counted. null: a prompt too long for the context is an error."""


class MathTask(DataTask):
    """Word problems with columns `question` and `answer` (GSM8K, MATH and alike)."""

    type: Literal["math"] = "math"
    template: str = "{question}\nThink step by step, and put the final answer in \\boxed{{}}."
    """The prompt, as a Python format string over the row's columns."""


class ChoiceTask(DataTask):
    """Multiple choice with columns `question`, `choices` (a list of texts) and `answer` (a letter)."""

    type: Literal["choice"] = "choice"
    template: str = "{question}\n{options}\nAnswer with the letter of the right choice.\nAnswer:"
    """The prompt, as a Python format string; {options} is one line `A. text` per choice."""
    shuffle: bool = False
    """Permute the choices of each row by a hash of its id, so that a fixed letter is worth nothing. Letters in other columns than
    `answer` do not move along."""


class RowsTask(DataTask):
    """Any rows with a `prompt` column (text or chat messages); other columns go to the reward functions."""

    type: Literal["rows"] = "rows"


TaskConfig = Annotated[ArithmeticTask | MathTask | ChoiceTask | RowsTask, Field(discriminator="type")]
