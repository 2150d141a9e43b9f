"""Any rows, however wrong: either a task whose prompts are those rows, or one line that says which row is wrong."""

import csv
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz.cases import TEXTS, VALUES, fuzz, nested, one_line
from tests.stages.data.samples import char_tokenizer
from vrpo.config.tasks import ChoiceTask, MathTask, RowsTask
from vrpo.errors import DataError
from vrpo.tasks import Task, build_task, task_from_rows

PLAIN, CHAT = char_tokenizer(), char_tokenizer(chat=True)

WORDS = st.text(string.ascii_lowercase + " 1=é日\u2028", min_size=1, max_size=6)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "u\nser"])
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": ROLES, "content": WORDS | TEXTS}),
        st.fixed_dictionaries({"role": ROLES, "content": WORDS}, optional={"name": VALUES, "weight": VALUES}),
        VALUES,
    ),
    max_size=3,
)
ODD = st.one_of(
    VALUES,
    st.binary(max_size=3),
    st.complex_numbers(),
    st.just(10**5000),
    st.builds(nested, st.sampled_from([50, 1500])),
    st.sets(st.integers(), max_size=2),
    st.just("x" * 200_000),
    st.builds(object),
)
"""What rows in memory may hold; files hold less."""
PROMPTS = st.one_of(WORDS, WORDS, WORDS, MESSAGES)
IDS = st.one_of(st.integers(0, 9), st.text("ab\n\ud800", max_size=2), VALUES)


def rows_of(columns: dict[str, Any], odd: Any) -> Any:
    """Mostly right rows; every other has one or two cells missing, replaced or added."""
    good = st.fixed_dictionaries(columns, optional={"id": IDS, "extra": odd})
    keys = st.sampled_from([*columns, "id", "extra"]) | TEXTS

    @st.composite
    def bad(draw) -> Any:
        row = dict(draw(good))
        for _ in range(draw(st.integers(1, 2))):
            key = draw(keys)
            if draw(st.booleans()):
                row.pop(key, None)
            else:
                row[key] = draw(odd)
        return row

    return st.lists(st.one_of(good, good, good, bad()), min_size=0, max_size=7)


def outcome(make: Callable[[], Task]) -> Task | None:
    """The task, drawn from; None where it is refused, in one line."""
    try:
        task = make()
    except DataError as error:
        message = str(error)
        assert one_line(message), message
        assert len(message) < 2000
        event("refused")
        return None
    event("accepted")
    assert len(task.draw(seed=0, step=1, count=3)) == 3
    assert len(task.eval_prompts(2)) == min(2, task.eval_size)
    assert one_line(task.describe()) and len(task.fingerprint()) == 64
    assert all(isinstance(name, str) for name in task.columns)
    return task


def dropped(task: Task) -> int:
    """Rows that `describe` says were left out."""
    found = re.search(r"([\d,]+) dropped", task.describe())
    return int(found.group(1).replace(",", "")) if found else 0


def written(value: Any) -> str:
    """A value as text in which 1, 1.0 and True, and NaN and NaN, are what they look like."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, dict) for part in value):
        # chat messages: a null is what a data set writes for a key that this message has not
        value = [{key: text for key, text in part.items() if text is not None} for part in value]
    try:
        return repr(list(value) if isinstance(value, tuple) else value)
    except (ValueError, RecursionError):  # too long a number, too deep a list: the object itself
        return f"object {id(value)}"


def check_unchanged(task: Task, rows: list[dict], *, renamed: dict[str, str] | None = None) -> None:
    """Every prompt is one of the rows as it was, and no row is missing without being counted."""
    theirs = {name: ours for ours, name in (renamed or {}).items()}
    given_rows = Counter(
        written(sorted((theirs.get(key, key), written(value)) for key, value in row.items())) for row in rows
    )
    used = Counter(
        written(sorted((key, written(value)) for key, value in {**p.columns, "prompt": p.prompt}.items()))
        for p in (*task.train_prompts(), *task.eval_prompts(task.eval_size))
    )
    assert not used - given_rows
    assert used.total() + dropped(task) == len(rows)


ROWS_IN_MEMORY = st.one_of(
    rows_of({"prompt": PROMPTS}, ODD),
    rows_of({"prompt": WORDS, "answer": WORDS}, ODD),
    st.lists(
        st.fixed_dictionaries({"prompt": WORDS, "answer": ODD}, optional={"id": IDS}), min_size=2, max_size=7
    ),
    st.lists(
        st.dictionaries(st.one_of(st.just("prompt"), st.integers(0, 2), st.none()), ODD, max_size=3),
        max_size=3,
    ),
    st.lists(VALUES, max_size=3),
    VALUES,
)


@fuzz(12)
@given(
    ROWS_IN_MEMORY,
    st.sampled_from([PLAIN, CHAT]),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, 1, 4, 30]),
)
def test_rows_in_memory(rows, tokenizer, chat, most):
    task = outcome(
        lambda: task_from_rows(rows, None, tokenizer, holdout=0.4, chat=chat, max_prompt_tokens=most)
    )
    if task is not None:
        check_unchanged(task, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


JSON = st.one_of(VALUES, st.just("x" * 200_000), st.builds(nested, st.just(50)))
LABELS = st.lists(st.sampled_from(["A", "B", "a", "1", "2", "F"]) | VALUES, max_size=3)
CHOICES = st.one_of(
    st.lists(WORDS, min_size=2, max_size=4),
    st.lists(WORDS | VALUES, max_size=4),
    st.fixed_dictionaries({"text": st.lists(WORDS, max_size=3), "label": LABELS}),
)
SHAPES = {
    "rows": ({"prompt": PROMPTS, "gold": WORDS}, RowsTask, {"columns": {"answer": "gold"}}),
    "math": (
        {"question": WORDS, "answer": WORDS | st.integers() | st.floats()},
        MathTask,
        {"template": "{question}="},
    ),
    "choice": (
        {"question": WORDS, "choices": CHOICES, "answer": st.sampled_from(["A", "B", "1", "2", "F", "a "])},
        ChoiceTask,
        {"template": "{question}{options}"},
    ),
}
FILES = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda name: st.tuples(st.just(name), rows_of(SHAPES[name][0], JSON))
)


def answer_of(value: Any) -> str | None:
    """What a row's answer is in the columns: null is none, and no number has an exponent."""
    if value is None:
        return None
    text = f"{Decimal(repr(value)):f}" if isinstance(value, float) and "e" in repr(value) else str(value)
    return text.rpartition("####")[2].strip()


def check_shape(name: str, task: Task, rows: list[dict]) -> None:
    """What a math or choice prompt shows and asks is what its row says."""
    assert task.train_size + task.eval_size + dropped(task) == len(rows)
    for prompt in (*task.train_prompts(), *task.eval_prompts(task.eval_size)):
        columns = prompt.columns
        match = [row for row in rows if written(row["question"]) == written(columns["question"])]
        assert match
        if name == "math":
            assert prompt.prompt == f"{columns['question']}="
            assert columns["answer"] in [answer_of(row["answer"]) for row in match]
        else:
            texts = [
                row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
                for row in match
            ]
            assert columns["choices"] in texts
            if columns["answer"] is None:
                assert None in [row["answer"] for row in match]
            else:
                assert len(columns["choices"]) > ord(columns["answer"]) - 65 >= 0


def check_file(path: Any, name: str, rows: list[dict]) -> None:
    _, kind, options = SHAPES[name]
    task = outcome(lambda: build_task(kind(data=str(path), holdout=0.4, **options), CHAT))
    if task is None:
        return
    if name == "rows":
        # the file is what counts: JSON has no tuples, and no two spellings of a key
        check_unchanged(task, rows, renamed={"answer": "gold"})
    else:
        check_shape(name, task, rows)


@fuzz(7)
@given(FILES, st.sampled_from(["a.jsonl", "a.json"]))
def test_json_files(folder, case, file):
    name, rows = case
    text = json.dumps(rows) if file == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / file).write_text(text)
    check_file(folder / file, name, json.loads(json.dumps(rows)))


@fuzz(4)
@given(rows_of({"prompt": WORDS, "gold": WORDS}, TEXTS))
def test_csv_files(folder, rows):
    names = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "a.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows({key: value for key, value in row.items() if isinstance(value, str)} for row in rows)
    task = outcome(lambda: build_task(RowsTask(data=str(folder / "a.csv"), holdout=0.4), PLAIN))
    if task is not None:
        assert task.train_size + task.eval_size == len(rows)
        texts = {row.get("prompt") for row in rows}
        assert all(prompt.prompt in texts for prompt in task.train_prompts())


PIECES = st.sampled_from(
    [
        b'{"prompt": "a"}\n',
        b'{"prompt": "b", "id": 1}\n',
        b"[",
        b"{",
        b"}",
        b'"',
        b"\xff",
        b"\r",
        b"\n",
        b"\xc2\x85",
        b"\x1c",
        b",",
        b"NaN",
        b"1e400",
        b"9" * 5000,
        b"\\ud800",
        b"\x00",
        b'"prompt": "a", ',
        b"prompt,prompt\n",
        b"prompt\na\nb\n",
        b"[" * 2000,
        b"\xef\xbb\xbf",
        b"prompt,\n",
    ]
)


@fuzz(3)
@given(
    st.lists(PIECES | st.binary(max_size=4), max_size=8).map(b"".join),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"]),
)
def test_files_of_any_bytes(folder, content, file):
    (folder / file).write_bytes(content)
    outcome(lambda: build_task(RowsTask(data=str(folder / file), holdout=0.4), PLAIN))
