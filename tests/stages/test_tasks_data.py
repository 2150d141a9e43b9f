"""Tasks read from files: formats, columns, ids, splits, and every way a row can be wrong."""

import csv
import gzip
import json
from datetime import date
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from tests.stages.data.samples import char_tokenizer, text_of
from vrpo.config.rewards import ChoiceReward, ExactReward, MathReward
from vrpo.config.tasks import ChoiceTask, MathTask, RowsTask
from vrpo.errors import DataError
from vrpo.rewards.functions import Builtin
from vrpo.rng import stream_seed
from vrpo.tasks import build_task, task_from_rows
from vrpo.tasks.data import FILE_SUFFIXES, Row, hold_out, name_rows, read_rows

TOKENIZER = char_tokenizer()
CHAT_TOKENIZER = char_tokenizer(chat=True)
MATH = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(10)]


def write(path, rows):
    name = path.name
    if name.endswith(".parquet"):
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(map(json.dumps, rows)) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def test_a_csv_cell_may_be_as_long_as_a_document(tmp_path):
    rows = [{"prompt": "a" * 200_000, "answer": "b"}] * 2
    before = csv.field_size_limit()
    assert read_rows(write(tmp_path / "long.csv", rows)) == rows and csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", FILE_SUFFIXES)
def test_the_home_folder_and_capitals_in_a_file_name(tmp_path, monkeypatch, suffix):
    write(tmp_path / f"d{suffix}", MATH)
    (tmp_path / f"d{suffix}").rename(tmp_path / f"D{suffix.upper()}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_rows(f"~/D{suffix.upper()}") == MATH
    with pytest.raises(DataError, match=r"~/none.*no such file"):
        read_rows(f"~/none{suffix}")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.parquet"])
def test_every_format_gives_the_same_task(tmp_path, name):
    path = write(tmp_path / name, MATH)
    assert read_rows(path) == MATH
    task = build_task(MathTask(data=path, holdout=0.3), TOKENIZER)
    assert task.train_size + task.eval_size == 10
    prompt = next(task.train_prompts())
    assert prompt.prompt.startswith(prompt.columns["question"] + "\nThink step by step")
    assert prompt.prompt.endswith("\\boxed{}.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "no rows"),
        ("bad.jsonl", '{"question": 1}\n\n{oops\n', "line 3: not JSON"),
        ("list.jsonl", "[1, 2]\n", "line 1: .* is not an object"),
        ("object.json", '{"a": 1}', "not a list of objects"),
        ("bad.json", '[{"a": 1},\n oops]', "line 2: not JSON"),
        ("bytes.jsonl", b"\xff\xfe\xff", "cannot be read"),
        ("bytes.jsonl.gz", b"no gzip", "cannot be read"),
        ("bytes.parquet", b"no parquet", "not a parquet file"),
        ("cells.csv", "a,b\n1,2,3\n", "line 2: more cells"),
        ("few.csv", "a,b\n1,2\n3\n", "line 3: fewer cells"),
        ("quote.csv", 'a,b\n1,2\n"3,4\n5,6\n', "no CSV .* close every quote"),
        ("what.txt", "hello", "neither a data file nor a hub name"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(path))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_hub_failure_is_one_line(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"some/data: cannot load split 'test' .*ConnectionError: no network\)"
    ) as caught:
        read_rows("some/data", split="test")
    assert "\n" not in str(caught.value)


def test_hub_arguments(monkeypatch):
    import datasets

    calls = []

    def load(name, subset, *, split):
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(MATH)

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = MathTask(data="openai/gsm8k", subset="main", split="train", eval_split="test")
    assert build_task(config, TOKENIZER).eval_size == 10
    build_task(MathTask(data="openai/gsm8k", eval_data="other/data"), TOKENIZER)
    assert calls == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", None, "train"),
        ("other/data", None, "train"),
    ]


def test_eval_data_and_eval_split(tmp_path):
    train, held = write(tmp_path / "a.jsonl", MATH), write(tmp_path / "b.jsonl", MATH[:3])
    task = build_task(MathTask(data=train, eval_data=held), TOKENIZER)
    assert (task.train_size, task.eval_size) == (10, 3)
    with pytest.raises(DataError, match=r"eval_split='test'.*files have no splits"):
        build_task(MathTask(data=train, eval_split="test"), TOKENIZER)


def test_columns_are_renamed_and_missing_ones_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": r["question"], "gold": r["answer"]} for r in MATH])
    with pytest.raises(
        DataError, match=r"no column 'question', there is \['q', 'gold'\].*columns: \{question: <name>\}"
    ):
        build_task(MathTask(data=path), TOKENIZER)
    with pytest.raises(DataError, match=r"task\.columns: \{question: nope\} names no column; there is"):
        build_task(MathTask(data=path, columns={"question": "nope"}), TOKENIZER)
    task = build_task(MathTask(data=path, columns={"question": "q", "answer": "gold"}), TOKENIZER)
    assert task.columns == {"question", "answer"}


def test_a_column_that_the_task_needs_cannot_be_renamed_away(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "gold": str(i)} for i in range(10)])
    with pytest.raises(
        DataError,
        match=r"task\.columns: \{question: prompt\} renames column 'prompt', which .* or add .*\{prompt: <name>\}",
    ):
        build_task(RowsTask(data=path, columns={"question": "prompt"}), TOKENIZER)
    both = build_task(RowsTask(data=path, columns={"question": "prompt", "prompt": "prompt"}), TOKENIZER)
    assert both.columns == {"question", "gold"}
    swapped = build_task(RowsTask(data=path, columns={"gold": "prompt", "prompt": "gold"}), TOKENIZER)
    assert all(p.columns["gold"] == f"p{p.prompt}" for p in swapped.train_prompts())


def test_a_row_without_the_renamed_column_lacks_it(tmp_path):
    rows = [{"question": f"Q{i}", "gold": "1"} for i in range(10)] + [
        {"id": "x7", "question": "q", "answer": "2"}
    ]
    with pytest.raises(DataError, match="row 10: no column 'answer'; write null"):
        build_task(MathTask(data=write(tmp_path / "a.jsonl", rows), columns={"answer": "gold"}), TOKENIZER)


def test_rows_that_are_no_mappings_are_refused():
    with pytest.raises(DataError, match="list of dicts"):
        name_rows(["text"], columns={}, required=(), source="x")


def test_ids_are_kept_when_unique():
    def ids(rows):
        return [row.row_id for row in name_rows(rows, columns={}, required=(), source="x")]

    assert ids([{"id": "a"}, {"id": "b"}]) == ["a", "b"]
    assert ids([{"id": 7}, {"id": 8}]) == ["7", "8"]
    assert ids([{"id": "a"}, {"id": "a"}]) == ["0", "1"]
    assert ids([{"id": "1"}, {"id": 1}]) == ["0", "1"]  # the same text
    assert ids([{"id": "a"}, {}]) == ["0", "1"]


def test_hold_out_keeps_equal_questions_together():
    rows = [Row(str(i), {"q": f"q{i // 4}"}) for i in range(800)]
    train, held = hold_out(rows, holdout=0.25, key="q", source="x")
    assert len(train) + len(held) == 800
    assert not {r.values["q"] for r in train} & {r.values["q"] for r in held}
    # 200 questions, each held out with probability 1/4: 50, standard deviation 6.1
    assert abs(len(held) / 4 - 50) < 30


def test_a_hold_out_of_far_more_rows_than_asked_is_told():
    def described(many):
        """`many` of 100 rows ask the question that comes first by its hash, so that it is held out."""
        first = min((f"q{i}" for i in range(20)), key=lambda q: stream_seed(0, "holdout", repr(q)))
        others = [f"q{i}" for i in range(20) if f"q{i}" != first]
        rows = [first] * many + [others[i % len(others)] for i in range(100 - many)]
        return task_from_rows([{"prompt": q} for q in rows], None, TOKENIZER, holdout=0.01).describe()

    note = (
        "95 held out, which is 95 of 100 rows, more than twice holdout=0.01, which counts distinct questions"
    )
    assert note in described(95)
    assert "more than twice" not in described(2)
    given = task_from_rows([{"prompt": "a"}], [{"prompt": "b"}] * 9, TOKENIZER, holdout=0.01)
    assert "more than twice" not in given.describe()


@pytest.mark.parametrize("holdout", [0.001, 0.5, 0.999])
def test_both_sides_get_a_row_even_of_two(holdout):
    train, held = hold_out([Row("0", {"q": "a"}), Row("1", {"q": "b"})], holdout=holdout, key="q", source="x")
    assert (len(train), len(held)) == (1, 1)
    with pytest.raises(DataError, match="1 distinct row"):
        hold_out([Row("0", {"q": "a"}), Row("1", {"q": "a"})], holdout=holdout, key="q", source="x")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("18", "18"),
        (18, "18"),
        ("She sells 16 - 7 = 9. 9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234 ", "1,234"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        (0.5, "0.5"),
        (5.0, "5.0"),
        (-1e-05, "-0.00001"),
        (1.5e16, "15000000000000000"),
        (None, None),
    ],
)
def test_math_answers(tmp_path, answer, expected):
    rows = [{"question": f"Q{i}", "answer": answer} for i in range(3)]
    task = build_task(MathTask(data=write(tmp_path / "a.jsonl", rows)), TOKENIZER)
    assert next(task.train_prompts()).columns["answer"] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x7", "question": None, "answer": "1"}, "row x7: column 'question' holds None"),
        ({"id": "x7", "question": "q"}, "row x7: no column 'answer'; write null"),
        ({"id": "x7", "question": "  ", "answer": "1"}, "row x7: column 'question'"),
        ({"id": "x7", "question": ["q"], "answer": "1"}, "row x7: column 'question'"),
        ({"id": "x7", "question": "q", "answer": True}, "row x7: column 'answer' holds True"),
        ({"id": "x7", "question": "q", "answer": "so ####"}, "row x7: column 'answer'.*after ####"),
    ],
)
def test_malformed_math_rows(tmp_path, row, message):
    rows = [{"id": f"ok{i}", **r} for i, r in enumerate(MATH)] + [row]
    with pytest.raises(DataError, match=message):
        build_task(MathTask(data=write(tmp_path / "a.jsonl", rows)), TOKENIZER)


@pytest.mark.parametrize("template", ["{question} {nope}", "{question} {", "{question} {}", "{question.x}"])
def test_bad_templates(tmp_path, template):
    with pytest.raises(DataError, match=r"task.template cannot be filled for row"):
        build_task(MathTask(data=write(tmp_path / "a.jsonl", MATH), template=template), TOKENIZER)


CHOICES = ["basalt", "iron", "magma", "quartz"]


def choice_task(tmp_path, *, answer="B", choices=CHOICES, count=3, **options):
    rows = [
        {"id": f"r{i}", "question": f"Core {i}?", "choices": choices, "answer": answer} for i in range(count)
    ]
    return build_task(ChoiceTask(data=write(tmp_path / "a.jsonl", rows), **options), TOKENIZER)


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("B", CHOICES),
        ("b ", CHOICES),
        ("2", CHOICES),
        ("B", {"text": CHOICES, "label": ["A", "B", "C", "D"]}),
        ("2", {"text": CHOICES, "label": ["1", "2", "3", "4"]}),
        ("2", {"text": CHOICES, "label": [1, 2, 3, 4]}),
        ("B", {"text": CHOICES, "label": ["1", "2", "3", "4"]}),
        ("G", {"text": CHOICES, "label": ["F", "G", "H", "J"]}),
    ],
)
def test_choice_forms(tmp_path, answer, choices):
    prompt = next(choice_task(tmp_path, answer=answer, choices=choices).train_prompts())
    assert prompt.columns["answer"] == "B" and prompt.columns["choices"] == CHOICES
    assert "?\nA. basalt\nB. iron\nC. magma\nD. quartz\nAnswer with" in prompt.prompt


@pytest.mark.parametrize(
    ("answer", "choices", "message"),
    [
        (
            "2",
            ["2", "3", "4", "1"],
            r"answer '2' names choice B, '3', and is the text of choice A, .*write B or A$",
        ),
        (
            "a",
            ["b", "a", "c"],
            r"answer 'a' names choice A, 'b', .* of choice B, .*\{text: \[\.\.\.\], label: ",
        ),
        ("B", ["AB", "A", "B", "O"], r"answer 'B' names choice B, 'A', and is the text of choice C"),
        ("2", {"text": ["2", "3"], "label": ["A", "B"]}, r"names choice B, .* of choice A, .*write B or A$"),
        ("B", {"text": ["A", "C", "B"], "label": ["1", "2", "3"]}, r"names choice 2, .* of choice 3"),
    ],
)
def test_an_answer_that_names_one_choice_and_is_the_text_of_another_is_refused(
    tmp_path, answer, choices, message
):
    with pytest.raises(DataError, match=rf"row r\d: .*{message}") as caught:
        choice_task(tmp_path, answer=answer, choices=choices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("B", ["2", "3", "4", "1"]),
        ("2", ["1", "2", "3", "4"]),  # both readings are the same
        ("B", ["A", "B", "AB", "O"]),
        ("B", ["b", "a"]),  # a capital letter is the letter
        ("2", {"text": ["2", "3", "4", "1"], "label": ["1", "2", "3", "4"]}),  # as in ARC: a label
        ("B", {"text": ["AB", "A", "B", "O"], "label": ["A", "B", "C", "D"]}),
    ],
)
def test_an_answer_with_one_reading_is_taken(tmp_path, answer, choices):
    prompt = next(choice_task(tmp_path, answer=answer, choices=choices).train_prompts())
    assert prompt.columns["answer"] == "B"


def test_a_null_answer_passes_and_its_choices_are_shuffled(tmp_path):
    answered, unknown = (
        list(choice_task(tmp_path, answer=answer, count=20, shuffle=True).train_prompts())
        for answer in ("B", None)
    )
    assert {p.columns["answer"] for p in unknown} == {None}
    assert [p.columns["choices"] for p in unknown] == [p.columns["choices"] for p in answered]
    assert [p.prompt for p in unknown] == [p.prompt for p in answered]


@pytest.mark.parametrize("kind", ["exact", "math", "choice"])
def test_null_answers_have_no_verdict(tmp_path, kind):
    rows = [{"question": f"Q{i}", "choices": CHOICES, "answer": (None, "B")[i % 2]} for i in range(12)]
    path = write(tmp_path / "a.jsonl", rows)
    config = ChoiceTask(data=path) if kind == "choice" else MathTask(data=path)
    prompts = build_task(config, TOKENIZER).train_prompts()
    reward = Builtin({"exact": ExactReward, "math": MathReward, "choice": ChoiceReward}[kind]())
    answers = [prompt.columns["answer"] for prompt in prompts]
    verdicts = reward(
        prompts=None,
        completions=["$B$" if kind == "math" else "B"] * len(answers),
        answer=answers,
        choices=[CHOICES] * len(answers),
    )
    assert None in verdicts and 1.0 in verdicts
    assert verdicts == [None if answer is None else 1.0 for answer in answers]


def test_an_empty_cell_of_a_csv_file_is_null(tmp_path):
    path = write(
        tmp_path / "a.csv",
        [{"question": f"Q{i}", "context": "", "answer": ("", "1")[i % 2]} for i in range(12)],
    )
    assert read_rows(path)[:2] == [
        {"question": "Q0", "context": None, "answer": None},
        {"question": "Q1", "context": None, "answer": "1"},
    ]
    task = build_task(MathTask(data=path, template="{context}{question}="), TOKENIZER)
    assert {p.columns["answer"] for p in task.train_prompts()} == {None, "1"}
    assert all(p.prompt == f"{p.columns['question']}=" for p in task.train_prompts())
    with pytest.raises(DataError, match=r"row 1: column 'question' holds None, text is needed"):
        build_task(
            MathTask(data=write(tmp_path / "b.csv", [{"question": q, "answer": "1"} for q in ("a", "")])),
            TOKENIZER,
        )
    with pytest.raises(DataError, match=r"row 0: column 'prompt' holds None, text or a list"):
        build_task(
            RowsTask(data=write(tmp_path / "c.csv", [{"prompt": p, "answer": "1"} for p in ("", "a")])),
            TOKENIZER,
        )


def test_shuffled_choices_take_the_letter_along(tmp_path):
    task = choice_task(tmp_path, count=200, shuffle=True)
    letters = [p.columns["answer"] for p in task.train_prompts()]
    for prompt in task.train_prompts():
        right = prompt.columns["choices"]["ABCD".index(prompt.columns["answer"])]
        assert right == "iron" and f"\n{prompt.columns['answer']}. iron" in prompt.prompt
    # Uniform over four letters: about 180 rows, expected 45 each, standard deviation 5.8
    assert all(abs(letters.count(letter) - len(letters) / 4) < 30 for letter in "ABCD")
    again = choice_task(tmp_path, count=200, shuffle=True)
    assert letters == [p.columns["answer"] for p in again.train_prompts()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "E"}, "column 'answer' holds 'E', one of the labels"),
        ({"answer": 1}, "column 'answer' holds 1"),
        ({"answer": "5"}, "column 'answer' holds '5'"),
        ({"choices": "a b"}, "column 'choices'"),
        ({"choices": ["one"]}, "column 'choices'"),
        ({"choices": ["one", None]}, "column 'choices'"),
        ({"choices": {"text": CHOICES, "label": ["A"]}}, "column 'choices'"),
    ],
)
def test_malformed_choice_rows(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        choice_task(tmp_path, **options)


def test_rows_with_text_and_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": messages, "level": 1}, {"prompt": "text", "level": 2}]
    path = write(tmp_path / "a.jsonl", rows)
    task = build_task(RowsTask(data=path, eval_data=path, system_prompt="s"), CHAT_TOKENIZER)
    first, second = task.train_prompts()
    assert first.prompt == tuple(messages) and second.prompt == "text"
    assert text_of(CHAT_TOKENIZER, first.token_ids) == "<system>s\n<user>hi\n<assistant>"
    assert text_of(CHAT_TOKENIZER, second.token_ids) == "<system>s\n<user>text\n<assistant>"
    assert dict(first.columns) == {"level": 1}


@pytest.mark.parametrize(
    "prompt", [None, "", 3.5j, [], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]]
)
def test_malformed_prompts(prompt):
    with pytest.raises(DataError, match="row 1: column 'prompt'"):
        task_from_rows([{"prompt": "ok"}, {"prompt": prompt}], [{"prompt": "e"}], TOKENIZER)


def test_encoding_errors_name_the_row():
    with pytest.raises(DataError, match="row 0: the prompt is a chat"):
        task_from_rows([{"prompt": [{"role": "user", "content": "a"}]}], [{"prompt": "e"}], TOKENIZER)


@pytest.mark.parametrize(("rows", "message"), [([], "list of dicts"), ([{"q": 1}], "no column 'prompt'")])
def test_rows_in_memory_are_checked(rows, message):
    with pytest.raises(DataError, match=message):
        task_from_rows(rows, [{"prompt": "e"}], TOKENIZER)


def test_datasets_work_as_rows():
    import datasets

    dataset = datasets.Dataset.from_list([{"prompt": f"p{i}", "answer": i} for i in range(30)])
    task = task_from_rows(dataset, None, TOKENIZER, holdout=0.2)
    assert task.train_size + task.eval_size == 30 and task.columns == {"answer"}


def test_everything_too_long_is_an_error():
    with pytest.raises(
        DataError, match=r"all 1 train rows are longer than max_prompt_tokens=2 .the shortest has 5"
    ):
        task_from_rows([{"prompt": "abcde"}], [{"prompt": "e"}], TOKENIZER, max_prompt_tokens=2)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([], "list without any"),
        (5, "int;"),
        ("rows.jsonl", "str of str"),
        ({"train": [{"prompt": "1"}]}, "dict of str"),
        (pd.DataFrame({"prompt": ["1"]}), "DataFrame of str"),
        ([{"prompt": "1"}, None], "list of NoneType"),
    ],
)
def test_what_came_in_place_of_rows_is_named(rows, kind):
    with pytest.raises(
        DataError, match=f"train rows: a list of dicts is needed, at least one, and this is {kind}"
    ):
        task_from_rows(rows, None, TOKENIZER)


def test_numbers_of_numpy_are_pythons_and_what_pandas_has_not_is_none():
    na = type("NAType", (), {})()
    rows = [
        {"prompt": f"p{i}", "id": np.int64(7 + i), "answer": np.float32(46.0), "note": na} for i in range(2)
    ]
    found = name_rows(rows, columns={}, required=("prompt",), source="rows")
    assert [row.row_id for row in found] == ["7", "8"]
    assert type(found[0].values["answer"]) is float and found[0].values["note"] is None
    chat = np.array([{"role": "user", "content": "a"}], dtype=object)  # as pandas reads a list of messages
    (row,) = name_rows([{"prompt": chat}], columns={}, required=("prompt",), source="rows")
    assert row.values["prompt"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (np.array([1, 2]), np.array([1, 3])),
        (Decimal("1.5"), Decimal("2.5")),
        (date(2026, 1, 1), date(2026, 1, 2)),
        ({"a"}, {"b"}),
    ],
)
def test_a_fingerprint_sees_what_objects_hold(value, other):
    def fingerprint(x):
        return task_from_rows([{"prompt": "a", "x": x}], [{"prompt": "b", "x": x}], TOKENIZER).fingerprint()

    assert fingerprint(value) == fingerprint(value) != fingerprint(other)
