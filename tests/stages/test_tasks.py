"""The Task class, generated arithmetic, and encoding."""

import copy
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tests.stages.data.samples import char_tokenizer, text_of
from vrpo.config.rewards import ExactReward, RewardsConfig
from vrpo.config.tasks import ArithmeticTask
from vrpo.errors import DataError
from vrpo.rewards import build_rewards
from vrpo.rng import stream
from vrpo.tasks import build_task, encode, task_from_rows
from vrpo.tasks.arithmetic import Problem, draw_problem
from vrpo.train.fit import check_fit

TOKENIZER = char_tokenizer()
CHAT_TOKENIZER = char_tokenizer(chat=True)


def rows_task(count=20, **options):
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(count)]
    return task_from_rows(
        rows, [{"prompt": "e0", "answer": "0"}, {"prompt": "e1", "answer": "1"}], TOKENIZER, **options
    )


# --- the stream ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 100), size=st.integers(1, 30), count=st.integers(1, 12))
def test_every_epoch_visits_every_row_once(seed, size, count):
    task = rows_task(size)
    steps = -(-3 * size // count)
    ids = [p.prompt_id for step in range(steps) for p in task.draw(seed=seed, step=step, count=count)]
    everything = {f"train/{i}" for i in range(size)}
    for epoch in range(3):
        assert set(ids[epoch * size : (epoch + 1) * size]) == everything


def test_draw_depends_on_seed_step_and_count_alone():
    a, b = rows_task(), rows_task()
    a.draw(seed=0, step=17, count=4)  # what was drawn before must not matter
    a.eval_prompts(2)
    ids = [p.prompt_id for p in a.draw(seed=3, step=5, count=6)]
    assert ids == [p.prompt_id for p in b.draw(seed=3, step=5, count=6)]
    assert ids != [p.prompt_id for p in b.draw(seed=4, step=5, count=6)]
    # positions 30..35 are also steps 10 and 11 of three prompts each
    halves = b.draw(seed=3, step=10, count=3) + b.draw(seed=3, step=11, count=3)
    assert ids == [p.prompt_id for p in halves]


def test_epochs_have_orders_of_their_own():
    task = rows_task(20)
    first, second = ([p.prompt_id for p in task.draw(seed=0, step=s, count=20)] for s in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_evaluation_order_is_fixed_and_short_sets_give_what_they_have():
    task = task_from_rows([{"prompt": f"p{i}"} for i in range(50)], None, TOKENIZER, holdout=0.5)
    order = [p.prompt_id for p in task.eval_prompts(1000)]
    assert len(order) == task.eval_size == len(set(order))
    assert [p.prompt_id for p in task.eval_prompts(5)] == order[:5]
    assert all(name.startswith("eval/") for name in order)


def test_context_check_names_prompt_length_rule_and_fix():
    task = rows_task()  # longest prompts: "p10" .. "p19", 3 tokens
    task.check_context(13, 10)
    with pytest.raises(
        DataError,
        match=r"train/10 has 3 tokens.*max_completion_length=10.*context of 12.*max_prompt_tokens .*to 2",
    ):
        task.check_context(12, 10)
    arithmetic = build_task(ArithmeticTask(), TOKENIZER)
    arithmetic.check_context(16, 10)  # "12+34=" has 6
    with pytest.raises(DataError, match=r"shorten task.template"):
        arithmetic.check_context(15, 10)


def test_columns_and_answers():
    rows = [{"prompt": f"p{i}", "answer": i % 3, "extra": [i % 2]} for i in range(12)] + [
        {"prompt": "q", "answer": 2}
    ]
    task = task_from_rows(rows, rows[:1], TOKENIZER)
    assert task.columns == {"answer"}  # one row lacks extra
    assert sorted(task.answers("answer")) == [0, 1, 2]
    with pytest.raises(DataError, match="no column 'gold'"):
        task.answers("gold")
    assert task.first_with(("prompts", "stops")) is None
    assert task.first_with(("stops", "extra", "answer")) == ("train/0", "extra")
    assert build_task(ArithmeticTask(), TOKENIZER).columns == {
        "answer",
        "work",
        "problem",
        "operation",
        "source",
    }
    assert len(list(task.train_prompts())) == 13


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_is_no_answer_to_take(null):
    rows = [{"prompt": f"p{i}", "answer": (null, "1", "2")[i % 3], "gold": null} for i in range(9)]
    task = task_from_rows(rows, rows[:1], TOKENIZER)
    assert sorted(task.answers("answer")) == ["1", "2"]
    with pytest.raises(DataError, match=r"column 'gold' is null in all of the first 9 training rows"):
        task.answers("gold")


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids", "stops"])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_column_named_as_an_argument_of_reward_functions_is_refused_before_sampling(
    make_policy, column, where
):
    plain, odd = [{"prompt": "a", "answer": "1"}], [{"prompt": "b", "answer": "1", column: "x"}]
    policy = make_policy("llama")
    rewards = build_rewards(RewardsConfig(functions=(ExactReward(),)), seed=0)
    task = task_from_rows(*((odd, plain) if where == "train" else (plain, odd)), TOKENIZER)
    with pytest.raises(
        DataError, match=rf"row {where}/0 has a column '{column}', .*task\.columns: "
    ) as caught:
        check_fit(task, policy, rewards, max_completion_length=1)
    assert "\n" not in str(caught.value)
    check_fit(task_from_rows(plain, plain, TOKENIZER), policy, rewards, max_completion_length=1)


# --- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "operands", "text", "answer"),
    [
        ("add", (12, 34), "12+34", "46"),
        ("add", (3, 4, 5), "3+4+5", "12"),
        ("sub", (3, 4), "3-4", "-1"),
        ("sub", (9, 4, 3), "9-4-3", "2"),  # left to right; the other way round it is 9 - (4 - 3) = 8
        ("mul", (2, 3, 4), "2*3*4", "24"),
        ("mod", (17, 5), "mod(17,5)", "2"),
        ("mod", (17, 10, 4), "mod(17,10,4)", "3"),  # (17 mod 10) mod 4 = 7 mod 4
        ("gcd", (12, 18), "gcd(12,18)", "6"),
        ("gcd", (0, 0), "gcd(0,0)", "0"),
        ("max", (4, 9, 2), "max(4,9,2)", "9"),
    ],
)
def test_problems_by_hand(operation, operands, text, answer):
    problem = Problem(operation, operands)
    assert (problem.text, problem.answer) == (text, answer)


@settings(deadline=None, max_examples=25)
@given(
    operations=st.sets(st.sampled_from(["add", "sub", "mul"]), min_size=1),
    terms=st.integers(2, 8),
    digits=st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_infix_answers_are_what_python_says(operations, terms, digits, seed):
    config = ArithmeticTask(
        operations=tuple(operations), terms=terms, min_digits=digits[0], max_digits=digits[1]
    )
    problem = draw_problem(config, stream(seed))
    assert str(eval(problem.text)) == problem.answer
    assert len(problem.operands) == terms
    assert all(digits[0] <= len(str(operand)) <= digits[1] for operand in problem.operands)


def test_mod_never_divides_by_zero_and_lengths_are_uniform():
    config = ArithmeticTask(operations=("mod",), max_digits=2)
    drawn = [draw_problem(config, stream(0, i)) for i in range(2000)]
    assert all(p.operands[1] > 0 for p in drawn)
    # Each operand has one digit with probability 1/2: 2000 draws, standard deviation 22, five of them are 112.
    assert abs(sum(p.operands[0] < 10 for p in drawn) - 1000) < 112


@pytest.mark.parametrize("operations", [("add",), ("sub",), ("mul", "gcd", "max"), ("mod",)])
def test_held_out_problems_never_occur_in_training_in_any_order(operations):
    task = build_task(ArithmeticTask(operations=operations, size=3000, holdout=0.3), TOKENIZER)

    def key(prompt):
        text = prompt.columns["problem"]
        operation = prompt.columns["operation"]
        if operation in ("sub", "mod"):
            return text
        return operation, tuple(
            sorted(int(x) for x in text.strip("gcdmax()").replace("*", ",").replace("+", ",").split(","))
        )

    train = {key(p) for p in islice(task.train_prompts(), 3000)}
    held_out = [key(p) for p in task.eval_prompts(10_000)]
    assert len(held_out) == len(set(held_out)) > 100
    assert not train & set(held_out)


def test_tiny_space_has_both_sides_or_says_why_not():
    task = build_task(ArithmeticTask(max_digits=1), TOKENIZER)
    assert 1 <= task.eval_size <= 55  # unordered pairs of 0..9
    assert task.draw(seed=0, step=0, count=8)
    with pytest.raises(DataError, match=r"holds out none.*raise task.holdout"):
        build_task(ArithmeticTask(max_digits=1, holdout=0.001), TOKENIZER)
    with pytest.raises(DataError, match="leaves no problem to train on"):
        build_task(ArithmeticTask(max_digits=1, holdout=0.999), TOKENIZER)


def test_problem_set_does_not_depend_on_the_training_seed():
    task = build_task(ArithmeticTask(size=50), TOKENIZER)
    drawn = [Counter(p.prompt_id for p in task.draw(seed=s, step=0, count=50)) for s in (0, 1)]
    assert drawn[0] == drawn[1]
    again = build_task(ArithmeticTask(size=100), TOKENIZER)  # a larger set begins with the smaller one
    assert [p.prompt_id for p in task.train_prompts()] == [
        p.prompt_id for p in islice(again.train_prompts(), 50)
    ]


def test_same_problem_has_the_same_id():
    task = build_task(ArithmeticTask(max_digits=1, size=500), TOKENIZER)
    by_id = {}
    for prompt in task.train_prompts():
        by_id.setdefault(prompt.prompt_id, prompt.prompt)
        assert by_id[prompt.prompt_id] == prompt.prompt
    assert len(by_id) <= 100


def test_problems_with_spaces_are_the_same_problems():
    plain = next(build_task(ArithmeticTask(size=1), TOKENIZER).train_prompts())
    spaced = next(build_task(ArithmeticTask(size=1, spaces=True), TOKENIZER).train_prompts())
    assert spaced.prompt == plain.prompt.replace("+", " + ") != plain.prompt
    assert (spaced.prompt_id, spaced.columns) == (plain.prompt_id, plain.columns)
    assert Problem("gcd", (12, 18)).written(spaces=True) == "gcd(12, 18)"
    assert Problem("mul", (1, 2, 3)).written(spaces=True) == "1 * 2 * 3"


def test_arithmetic_prompt_template_and_chat():
    config = ArithmeticTask(template="{1+1=2} 1+1=2\n{problem}=", size=3)
    prompt = next(build_task(config, TOKENIZER).train_prompts())
    assert prompt.prompt == "{1+1=2} 1+1=2\n" + prompt.columns["problem"] + "="
    assert text_of(TOKENIZER, prompt.token_ids) == prompt.prompt
    assert str(eval(prompt.columns["problem"])) == prompt.columns["answer"]
    chat = next(build_task(ArithmeticTask(chat=True), CHAT_TOKENIZER).train_prompts())
    assert text_of(CHAT_TOKENIZER, chat.token_ids) == f"<user>{chat.prompt}\n<assistant>"
    with pytest.raises(DataError, match="no chat template"):
        build_task(ArithmeticTask(chat=True), TOKENIZER)


def test_describe():
    assert build_task(ArithmeticTask(), TOKENIZER).describe().startswith("arithmetic: 1,000,000 train rows, ")
    task = rows_task(20, max_prompt_tokens=2)  # p10 .. p19 have three characters
    assert task.describe() == "rows: 10 train rows, 2 held out, 10 dropped (more than 2 prompt tokens)"


# --- encoding -----------------------------------------------------------------------------------


def test_text_is_tokenised_as_it_is():
    ids = encode("ab", TOKENIZER, chat=None)
    # space is id 3, so a = 3 + 97 - 32 = 68
    assert ids.tolist() == [68, 69] and ids.dtype == np.int64


@pytest.mark.parametrize(
    ("prompt", "chat", "system", "expected"),
    [
        ("hi", None, None, "<user>hi\n<assistant>"),
        ("hi", True, "be brief", "<system>be brief\n<user>hi\n<assistant>"),
        ("hi", False, None, "hi"),
        ([{"role": "user", "content": "a"}], None, "s", "<system>s\n<user>a\n<assistant>"),
        (
            [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}],
            True,
            "s",
            "<system>own\n<user>a\n<assistant>",
        ),
    ],
)
def test_chat_encoding(prompt, chat, system, expected):
    assert (
        text_of(CHAT_TOKENIZER, encode(prompt, CHAT_TOKENIZER, chat=chat, system_prompt=system)) == expected
    )


def test_a_chat_that_ends_with_the_assistant_is_gone_on_with():
    asked = [{"role": "user", "content": "12+34="}]
    begun = [*asked, {"role": "assistant", "content": "sum"}]
    told, gone_on = (
        text_of(CHAT_TOKENIZER, encode(chat, CHAT_TOKENIZER, chat=None)) for chat in (asked, begun)
    )
    assert gone_on == told + "sum"


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "options", "message"),
    [
        ("", TOKENIZER, {"chat": None}, "empty"),
        ([], CHAT_TOKENIZER, {"chat": None}, "empty"),
        ("hi", TOKENIZER, {"chat": True}, "no chat template.*chat: false"),
        ([{"role": "user", "content": "a"}], TOKENIZER, {"chat": None}, "no chat template"),
        ([{"role": "user", "content": "a"}], CHAT_TOKENIZER, {"chat": False}, "chat=False"),
        ("hi", CHAT_TOKENIZER, {"chat": False, "system_prompt": "s"}, "system_prompt needs a chat"),
        ([{"role": "robot", "content": "a"}], CHAT_TOKENIZER, {"chat": None}, "robot"),
        ("hi", TOKENIZER, {"chat": None, "chat_template_kwargs": {"a": 1}}, "kwargs needs a chat"),
        (
            "hi",
            CHAT_TOKENIZER,
            {"chat": None, "chat_template_kwargs": {"enable_thinking": False}},
            "'enable_thinking', which this model's chat template does not read",
        ),
        (
            "hi",
            CHAT_TOKENIZER,
            {"chat": None, "chat_template_kwargs": {"add_generation_prompt": False}},
            "'add_generation_prompt', which is set already",
        ),
    ],
)
def test_what_cannot_be_encoded_is_one_line(prompt, tokenizer, options, message):
    with pytest.raises(DataError, match=message) as caught:
        encode(prompt, tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_a_chat_template_is_told_what_the_user_says():
    tokenizer = copy.deepcopy(CHAT_TOKENIZER)
    tokenizer.chat_template += "{% if enable_thinking is false %}<no>{% endif %}"
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    assert text_of(tokenizer, encode("hi", tokenizer, chat=None, **told)) == "<user>hi\n<assistant><no>"
    prompts = [
        next(build_task(ArithmeticTask(chat=True, **told), tokenizer).train_prompts()),
        next(task_from_rows([{"prompt": "a"}], [{"prompt": "b"}], tokenizer, **told).train_prompts()),
    ]
    assert all(text_of(tokenizer, p.token_ids).endswith("<assistant><no>") for p in prompts)


def test_a_role_that_no_template_names_is_told():
    tokenizer = copy.deepcopy(CHAT_TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"

    def described(role):
        rows = [{"prompt": [{"role": role, "content": "hi"}]}]
        return task_from_rows(rows, [{"prompt": [{"role": "user", "content": "ho"}]}], tokenizer).describe()

    assert "messages with unusual roles ('usr')" in described("usr")
    assert "unusual" not in described("user")
    tokenizer.chat_template += "{# critic #}"
    assert "unusual" not in described("critic")


def test_prompts_with_text_that_the_tokenizer_does_not_know_are_counted():
    rows = [{"prompt": "a\N{BULLET}b"}, {"prompt": "abd"}]
    note = "1 prompts with text that the tokenizer does not know (<unk>)"
    assert note in task_from_rows(rows, [{"prompt": "x"}], TOKENIZER).describe()
    assert "does not know" not in task_from_rows(rows[1:], [{"prompt": "x"}], TOKENIZER).describe()
    ends = copy.deepcopy(TOKENIZER)
    ends.unk_token = ends.eos_token
    assert "does not know" not in task_from_rows(rows, [{"prompt": "x"}], ends).describe()


def test_a_prompt_rendered_beforehand_has_one_bos():
    tokenizer = char_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    messages = [{"role": "user", "content": "a"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = encode(messages, tokenizer, chat=None).tolist()
    assert encode(rendered, tokenizer, chat=False).tolist() == asked
    assert asked.count(tokenizer.bos_token_id) == 1
    # other text gets its BOS as before
    assert encode("a<bos>", tokenizer, chat=False).tolist() == [
        tokenizer.bos_token_id,
        68,
        tokenizer.bos_token_id,
    ]


def test_encoding_leaves_messages_alone():
    messages = ({"role": "user", "content": "a"},)
    before = json.dumps(messages)
    encode(messages, CHAT_TOKENIZER, chat=None, system_prompt="s")
    assert json.dumps(messages) == before


def test_work_is_every_result_on_the_way():
    assert Problem("add", (7, 58, 3, 41)).work == "65,68,109"
    assert Problem("sub", (5, 9)).work == "-4" == Problem("sub", (5, 9)).answer
    assert Problem("mod", (17, 10, 4)).work == "7,3" and Problem("max", (3, 9, 5)).work == "9,9"


def test_a_column_that_one_row_lacks_names_the_row():
    task = task_from_rows(
        [{"prompt": f"p{i}", "answer": "1"} | ({} if i else {"level": 2}) for i in range(9)],
        [{"prompt": "q"}],
        TOKENIZER,
    )
    assert task.without("answer") == ("eval/0", 1, 10, [])
    assert task.without("level") == ("train/1", 9, 10, ["answer"])


def test_held_out_prompts_that_are_trained_on_are_counted():
    rows = [{"prompt": "abc"}, {"prompt": "abd"}]
    assert "held-out prompts" not in task_from_rows(rows, [{"prompt": "x"}], TOKENIZER).describe()
    described = task_from_rows(rows, [{"prompt": "abd"}, {"prompt": "x"}], TOKENIZER).describe()
    assert described.endswith("1 of the held-out prompts also in the training rows")


def test_a_tokenizer_that_ends_prompts_is_refused():
    """As tokenizers do that were saved with add_eos_token after a warm start."""
    tokenizer = char_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    with pytest.raises(DataError, match=r"row 0: the tokenizer ends the prompt with .*add_eos_token"):
        task_from_rows([{"prompt": "abc"}], [{"prompt": "x"}], tokenizer)
