"""The built-in functions: exact, choice, math; and answers for a vote."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.stages.data.samples import make_rollout
from vrpo.config.rewards import ChoiceReward, ExactReward, FunctionReward, MathReward, RewardsConfig
from vrpo.errors import RewardError
from vrpo.rewards import answer_extractor, build_rewards, majority_label, math_answers

GSM8K = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "gsm8k.jsonl").read_text().splitlines()
]

IN_PLACE = MathReward(isolation="none", timeout=None)


def score(config, pairs, **columns):
    """Clean rewards of (completion, answer) pairs."""
    pipeline = build_rewards(RewardsConfig(functions=(config,)), seed=0)
    rollouts = [make_rollout(c, prompt_index=i, answer=a, **columns) for i, (c, a) in enumerate(pairs)]
    return pipeline.score_clean(rollouts)


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (29.0, "29", 1.0),  # a column of integers with a gap is read as floats
        (29.0, "29.0", 1.0),
        (29.0, "30", 0.0),
        (29.5, "29.5", 1.0),
        (float("nan"), "nan", None),
        (float("inf"), "inf", 1.0),
    ],
)
def test_numbers_in_a_column_of_floats(answer, completion, expected):
    first, _ = score(ExactReward(), [(completion, answer), ("1", "1")])
    assert first.clean_reward == expected
    assert not first.errors


def value(config, completion, answer, **columns):
    return score(config, [(completion, answer)], **columns)[0].clean_reward


@pytest.mark.parametrize(
    ("completion", "answer", "prefix", "expected"),
    [
        ("46", "46", False, 1.0),
        (" 46\n", "46", False, 1.0),
        ("46", 46, False, 1.0),
        ("46 apples", "46", False, 0.0),
        ("046", "46", False, 0.0),
        ("", "46", False, 0.0),
        ("46 apples\n47", "46", True, 1.0),
        ("46\n12+1=13", "46", True, 1.0),
        ("4 6", "46", True, 0.0),
        ("", "46", True, 0.0),
    ],
)
def test_exact(completion, answer, prefix, expected):
    assert value(ExactReward(prefix=prefix), completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("B", "B", 1.0),
        ("b", "B", 1.0),
        ("(b).", "B", 1.0),
        (" B. iron", "B", 1.0),
        ("The answer is (B).", "B", 1.0),
        ("\\boxed{B}", "B", 1.0),
        ("**B**", "B", 1.0),
        ("Answer:B", "B", 1.0),
        ("I think B", "B", 1.0),  # I is no choice among four
        ("C, not B", "B", 0.0),  # the first letter counts
        ("Because of B-cells", "B", 1.0),
        ("BASALT", "B", 0.0),
        ("a basalt", "A", 0.0),  # a lower-case letter inside a sentence is no answer
        ("", "B", 0.0),
        ("B", "(b)", 1.0),
    ],
)
def test_choice(completion, answer, expected):
    assert value(ChoiceReward(), completion, answer, choices=["w", "x", "y", "z"]) == expected


def test_choice_letters_are_bounded_by_the_choices():
    assert value(ChoiceReward(), "E B", "B", choices=["x", "y", "z"]) == 1.0
    assert value(ChoiceReward(), "E B", "B") == 0.0
    assert value(ChoiceReward(), "I", "I", choices=list("123456789")) == 1.0
    assert value(ChoiceReward(), "J", "J") == 1.0  # the answer itself shows that there is a J


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("The answer is \\boxed{18}.", "18", 1.0),
        ("so she makes 18", "18", 1.0),
        ("18.0", "18", 1.0),
        ("\\boxed{1,234}", "1234", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("$\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("\\boxed{x+1}", "1+x", 1.0),
        ("\\boxed{1+x}", "$x+1$", 1.0),
        ("it costs \\boxed{36} dollars", "\\$36", 1.0),
        ("\\boxed{17}", "18", 0.0),
        ("no idea", "18", 0.0),
        ("", "18", 0.0),
        ("\\boxed{", "18", 0.0),
    ],
)
def test_math(completion, answer, expected):
    assert value(IN_PLACE, completion, answer) == expected


def test_gsm8k_solutions_verify_and_others_do_not():
    # Rows of openai/grade-school-math, MIT.
    own = [(row["solution"].replace("####", "The answer is"), row["answer"]) for row in GSM8K]
    assert [item.clean_reward for item in score(IN_PLACE, own)] == [1.0] * len(GSM8K)
    wrong = [(completion, str(int(answer) + 1)) for completion, answer in own]
    assert [item.clean_reward for item in score(IN_PLACE, wrong)] == [0.0] * len(GSM8K)


@pytest.mark.parametrize(
    ("config", "bad", "message"),
    [
        (ExactReward(), "  ", "exact: raised: ValueError: column 'answer' is empty"),
        (
            ChoiceReward(),
            "iron",
            "choice: raised: ValueError: column 'answer' holds 'iron', a letter is needed",
        ),
        (IN_PLACE, "", "math: raised: ValueError: column 'answer' is empty"),
    ],
)
def test_a_bad_reference_is_missing_for_its_sample_alone(config, bad, message):
    scored = score(config, [("1 A", "1" if config.type != "choice" else "A"), ("1 A", bad)])
    assert scored[0].clean_reward is not None and not scored[0].errors
    assert scored[1].clean_reward is None and scored[1].errors == (message,)


@pytest.mark.parametrize("config", [ExactReward(), ChoiceReward(), IN_PLACE])
@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_row_whose_answer_is_null_has_no_verdict_and_no_error(config, null):
    scored = score(config, [("1 A", "1" if config.type != "choice" else "A"), ("1 A", null)])
    assert [item.clean_reward is None for item in scored] == [False, True]
    assert not any(item.errors for item in scored)


def test_a_missing_reference_column_is_named():
    with pytest.raises(RewardError, match=r"exact: needs column 'gold', the data has \['answer'\]"):
        value(ExactReward(column="gold"), "1", "1")


def test_math_gives_up_on_what_never_ends(monkeypatch):
    monkeypatch.setattr(math_answers, "MATH_SECONDS", 1)
    scored = score(IN_PLACE, [("\\boxed{3}", "3"), ("\\boxed{9^{9^{9}}}", "3")])
    assert scored[0].clean_reward == 1.0
    assert scored[1].clean_reward is None
    assert scored[1].errors[0].startswith("math: raised: TimeoutError: gave up after 1 s")


def test_math_works_off_the_main_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(value(IN_PLACE, "\\boxed{3}", "3")))
    thread.start()
    thread.join()
    assert result == [1.0]


def test_built_ins_read_chat_completions():
    pipeline = build_rewards(RewardsConfig(functions=(ExactReward(),)), seed=0)
    rollout = make_rollout("46", prompt=({"role": "user", "content": "12+34"},), answer="46")
    assert pipeline.score_clean([rollout])[0].clean_reward == 1.0


@pytest.mark.parametrize(
    ("config", "completion", "expected"),
    [
        (ExactReward(), " 46 x\n", "46 x"),
        (ExactReward(prefix=True), " 46 x\n", "46"),
        (ExactReward(), "  ", None),
        (ChoiceReward(), "I say (C)", "C"),
        (ChoiceReward(), "none", None),
        (IN_PLACE, "so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        (IN_PLACE, "no idea", None),
        (FunctionReward(file="f.py", name="f"), " x ", "x"),
    ],
)
def test_answers_for_a_vote(config, completion, expected):
    assert answer_extractor(config)(completion) == expected


def test_an_answer_may_be_any_of_the_rows_choices():
    ten = {"choices": [str(i) for i in range(10)]}
    assert answer_extractor(ChoiceReward(), ten)("The answer is J.") == "J"
    assert (
        answer_extractor(ChoiceReward(), {"choices": ["a", "b", "c", "d"]})("The answer is J. or B.") == "B"
    )


def test_majority_by_hand():
    extract = answer_extractor(ExactReward(prefix=True))
    assert majority_label(["4 a", "5", "4"], extract) == "4"
    assert majority_label(["5", "4", "4", "5"], extract) == "5"  # a draw: the one given first
    assert majority_label(["", " ", "4"], extract) == "4"  # no answer is no vote
    assert majority_label(["", " "], extract) is None
    assert majority_label([], extract) is None


@pytest.mark.parametrize(
    ("config", "completion"),
    [(ExactReward(), " 46 "), (ChoiceReward(), "It is (C)."), (IN_PLACE, "so \\boxed{\\frac{1}{2}}")],
)
def test_a_label_is_judged_right_for_the_answer_it_came_from(config, completion):
    label = majority_label([completion], answer_extractor(config))
    assert value(config, completion, label) == 1.0


def test_math_in_a_process_of_its_own_judges_alike():
    pairs = [("\\boxed{3}", "3"), ("\\boxed{4}", "3"), ("no idea", "3"), ("\\boxed{3}", None)]
    found = [(item.clean_reward, item.errors) for item in score(MathReward(), pairs)]
    assert found == [(item.clean_reward, item.errors) for item in score(IN_PLACE, pairs)]
    assert [reward for reward, _ in found] == [1.0, 0.0, 0.0, None]


def test_a_chat_that_has_begun_to_answer_is_judged_with_its_beginning():
    seen = {}

    def judge(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions)
        columns["tags"][0].append("mine")
        return [1.0] * len(completions)

    chat = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is "})
    rollout = make_rollout("4", prompt=chat, tags=["a"])
    build_rewards(RewardsConfig(), seed=0, extra_functions=[judge]).score_clean([rollout])
    assert seen["prompts"] == [[{"role": "user", "content": "2+2?"}]]
    assert seen["completions"] == [[{"role": "assistant", "content": "It is 4"}]]
    assert rollout.prompt.columns["tags"] == ["a"]  # the data stays as it is


def test_a_column_may_be_called_as_it_likes():
    judge = build_rewards(RewardsConfig(functions=[ExactReward()]), seed=0)
    rollout = make_rollout("4", **{"answer": "4", "self": "x"})
    assert [item.reward for item in judge.score_clean([rollout])] == [1.0]


@pytest.mark.parametrize(("kind", "expected"), [("exact", 1.0), ("choice", 1.0), ("math", 1.0)])
def test_built_in_rewards_judge_a_continued_chat(kind, expected):
    """Its first words are not part of an exact answer, and letters in them are no choice; a box may begin in them."""
    start, completion, answer = {
        "exact": ("Sum: ", "7", "7"),
        "choice": ("Among A, B, C, D I choose ", "B", "B"),
        "math": ("It is \\boxed{", "7}", "7"),
    }[kind]
    rollout = make_rollout(completion, answer=answer)
    chat = ({"role": "user", "content": "?"}, {"role": "assistant", "content": start})
    rollout = replace(rollout, prompt=replace(rollout.prompt, prompt=chat))
    pipeline = build_rewards(RewardsConfig.model_validate({"functions": [{"type": kind}]}), seed=0)
    assert pipeline.score_clean([rollout])[0].clean_reward == expected


RIGHT = [
    ("18 eggs", r"\boxed{18}"), ("18 eggs", "I count 18 eggs"), ("18", r"\boxed{18 eggs}"), ("5 dollars", r"\boxed{5}"),
    ("3/4 cup", r"\boxed{\frac{3}{4}}"), ("1 1/2 cups", r"\boxed{1.5}"), ("90°", r"\boxed{90^\circ}"), ("€5", r"\boxed{5}"),
    ("5.", r"\boxed{5}"), ("12 000", r"\boxed{12,000}"), ("100 km/h", r"\boxed{100}"), ("50%", r"\boxed{0.5}"),
    ("1e-05", r"\boxed{10^{-5}}"), ("6.02e23", r"\boxed{6.02 \times 10^{23}}"), ("3.0e8 m/s", r"\boxed{3e8}"),
    ("no", r"\boxed{\text{No}}"), ("listen", r"\boxed{Listen}"), ("2024-01-05", r"\boxed{2024-01-05}"),
    ("2 hours 30 minutes", r"\boxed{2 hours 30 minutes}"), ("2xy", r"\boxed{2yx}"), ("2x+3y", r"\boxed{3y+2x}"),
    ("4 and 5", r"\boxed{5, 4}"), ("(1,2)", r"\boxed{(1,2)}"), ("x=5", r"\boxed{5}"),
]  # fmt: skip
WRONG = [
    ("12 000", r"\boxed{0}"), ("no", r"\boxed{on}"), ("listen", r"\boxed{silent}"), ("2024-01-05", r"\boxed{2018}"),
    ("18 eggs", r"\boxed{19}"), ("18", r"\boxed{19 eggs}"), ("1e-05", r"\boxed{1}"), ("2xy", r"\boxed{2}"), ("2 x/y", r"\boxed{2}"),
    ("3 sin x", r"\boxed{3}"), ("no", "I have no idea"), ("2 hours 30 minutes", r"\boxed{30}"), ("18 eggs", "eggs {"),
    ("1", r"both \boxed{-2} and \boxed{1}"), (r"\text{M}_1", r"\boxed{\text{m}_2}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "completion", "expected"), [(*p, True) for p in RIGHT] + [(*p, False) for p in WRONG]
)
def test_math_answers_with_units_words_and_powers_of_ten(answer, completion, expected):
    assert math_answers.is_same_answer(answer, completion) is expected


@pytest.mark.parametrize("number", [1e-05, 1e16, 0.1, 29.0, -2.5])
def test_floats_are_references_as_they_are_written_out(number):
    written = np.format_float_positional(number, trim="-")
    assert value(ExactReward(), written, number) == 1.0
    assert value(ExactReward(), str(number), number) == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("New York", 1.0), ("New York, of course", 0.0), ("New  York is it", 1.0), ("New", 0.0)],
)
def test_a_prefix_is_as_many_words_as_the_answer(completion, expected):
    assert value(ExactReward(prefix=True), completion, "New York") == expected
