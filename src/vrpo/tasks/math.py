"""Word problems with one final answer: GSM8K, MATH and alike."""

from collections.abc import Mapping
from typing import Any

from vrpo.errors import DataError
from vrpo.tasks.data import Row, first_line

REQUIRED = ("question", "answer")


def fill(template: str, row: Row, values: Mapping[str, Any]) -> str:
    """The prompt template with the row's columns, a null as no text; DataError when it names another or is malformed."""
    try:
        return template.format_map({name: "" if value is None else value for name, value in values.items()})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"task.template cannot be filled for {row.label} ({type(error).__name__}: {first_line(error)}); its columns are "
            f"{sorted(values)}, and a literal brace is written twice"
        ) from error


def math_prompt(row: Row, template: str) -> tuple[str, dict[str, Any]]:
    """(prompt, columns). The solution is cut off an answer such as `She sells 16 - 7 = 9. #### 18`; None, no answer, stays None."""
    answer = row.text("answer").rpartition("####")[2].strip() if row.has_answer() else None
    if answer == "":
        raise row.error("answer", row.values["answer"], "an answer after ####")
    row.text("question")
    columns = {**row.values, "answer": answer}
    return fill(template, row, columns), columns
