"""Reward functions that misbehave, in real processes: what they cost is one reward, never the run, and nothing becomes 0."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from tests.stages.data.samples import make_rollout
from vrpo.config.rewards import CallConfig, RewardsConfig
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards import RewardPipeline, build_rewards, fault_kind, isolation, named
from vrpo.rewards.isolation import Fault
from vrpo.rewards.score import HANGS_IN_A_ROW
from vrpo.types import Prompt, Rollout

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups")

# By name, every new worker would import this module, and torch with it: seconds instead of a tenth.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def rollouts(*completions: str) -> list[Rollout]:
    return [
        Rollout(
            sample_id=f"s1/p{i}/k0",
            prompt=Prompt(
                prompt_id=f"train/{i}", prompt="2+2=", token_ids=np.array([1]), columns={"answer": "4"}
            ),
            token_ids=np.array([1, 2]),
            action_mask=np.array([False, True]),
            logprobs=np.zeros(2, np.float32),
            policy_logprobs=np.zeros(2, np.float32),
            completion=text,
            stop="eos",
            policy_version=0,
        )
        for i, text in enumerate(completions)
    ]


def judged(
    function, *completions: str, max_failed: float = 0.5, **settings
) -> list[tuple[float | None, str | None]]:
    """Reward and kind of error of each completion."""
    given = {"isolation": "process", "timeout": 20.0} | settings
    pipeline = RewardPipeline([named(function, name="mine", **given)], seed=0, max_failed=max_failed)
    try:
        scored = pipeline.score_clean(rollouts(*completions))
    finally:
        pipeline.close()
    return [(s.reward, fault_kind(s.errors[0]) if s.errors else None) for s in scored]


def test_an_array_is_a_list_of_values_there_too():
    def lengths(completions, **_):
        import numpy

        return numpy.array([len(text) for text in completions])

    assert judged(lengths, "a", "abc") == [(1.0, None), (3.0, None)]


def each(do):
    """A function that does `do` to every completion; what `do` returns is the verdict."""

    def reward(prompts, completions, **columns):
        return [do(completion) for completion in completions]

    return reward


def misbehave(text):
    import ctypes
    import os
    import sys
    import time

    def chew():
        return b"x" * (8 << 30)

    def busy():
        while True:
            pass

    acts = {
        "sleep": lambda: time.sleep(60),
        "busy": busy,
        "segfault": lambda: ctypes.string_at(0),
        "exit0": lambda: os._exit(0),
        "sys.exit": lambda: sys.exit(0),
        "chew": chew,
        "raise": lambda: 1 / 0,
        "nan": lambda: float("nan"),
        "inf": lambda: float("-inf"),
        "text": lambda: "1",
        "list": lambda: [1.0],
        "huge": lambda: 10**60,
        "none": lambda: None,
        "true": lambda: True,
        "print": lambda: print("PRINTED", flush=True) or 0.5,
    }
    return acts[text]() if text in acts else 1.0


KINDS = {
    "sleep": "timeout",
    "busy": "timeout",
    "segfault": "crashed",
    "exit0": "crashed",
    "sys.exit": "raised",
    "chew": "memory",
    "raise": "raised",
    "nan": "bad_value",
    "inf": "bad_value",
    "text": "bad_value",
    "list": "bad_value",
    "huge": "bad_value",
}


@pytest.mark.parametrize(("act", "kind"), KINDS.items(), ids=KINDS.keys())
def test_one_bad_sample_costs_itself_alone(act, kind):
    settings = {"memory_limit": 2.0} if act == "chew" else {}
    timeout = 1.0 if kind == "timeout" else 20.0
    found = judged(each(misbehave), "a", act, "b", "c", timeout=timeout, **settings)
    assert found == [(1.0, None), (None, kind), (1.0, None), (1.0, None)]


def test_none_and_truth_are_verdicts_and_printing_breaks_nothing(capfd):
    assert judged(each(misbehave), "none", "true", "print") == [(None, None), (1.0, None), (0.5, None)]
    printed = capfd.readouterr()
    assert "PRINTED" in printed.err and printed.out == ""


@pytest.mark.parametrize("how", ["process", "thread"])
def test_async_functions_and_scalars_of_numpy(how):
    async def reward(prompts, completions, answer, **columns):
        import asyncio

        import numpy as np

        await asyncio.sleep(0.01)
        return [np.float32(float(c == a)) for c, a in zip(completions, answer, strict=True)]

    assert judged(reward, "4", "5", isolation=how) == [(1.0, None), (0.0, None)]


def test_a_thread_is_given_up_and_does_not_keep_the_process_alive(tmp_path):
    assert judged(each(misbehave), "a", "sleep", "b", isolation="thread", timeout=0.3) == [
        (1.0, None),
        (None, "timeout"),
        (1.0, None),
    ]
    script = (
        "import time; from vrpo.rewards.isolation import InThread, Fault\n"
        "try: InThread(lambda: time.sleep(60), timeout=0.1)()\n"
        "except Fault as fault: print(fault.kind)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=40, check=True
    )
    assert done.stdout == "timeout\n"


def test_a_function_that_always_hangs_is_not_waited_for_once_a_response():
    started = time.perf_counter()
    with pytest.raises(
        RewardError, match=r"5 of 8 verdicts failed, and rewards\.max_failed is 0\.5; mine: timeout"
    ):
        judged(each(misbehave), *["sleep"] * 8, timeout=0.3)
    assert time.perf_counter() - started < 15


def test_a_function_that_hangs_ten_times_in_a_row_is_not_asked_again(monkeypatch):
    waited = []

    def stuck(function, rollouts, columns):
        waited.append(len(rollouts))
        raise Fault("timeout", "no answer")

    monkeypatch.setattr("vrpo.rewards.score.call", stuck)
    with pytest.raises(
        RewardError, match="none of 40 completions could be judged; first cause: mine: timeout"
    ):
        judged(each(misbehave), *["sleep"] * 40, max_failed=1.0, timeout=300.0)
    assert waited == [40] + [1] * HANGS_IN_A_ROW


def test_on_error_raise_stops_at_the_first():
    with pytest.raises(
        RewardError, match=r"1 of 3 verdicts failed, and on_error: raise; mine: raised: ZeroDiv"
    ):
        judged(each(misbehave), "a", "raise", "b", on_error="raise")
    assert judged(each(misbehave), "a", "b", on_error="raise") == [(1.0, None)] * 2


@pytest.mark.parametrize(
    ("retries", "expected"), [(0, (None, "raised")), (1, (None, "raised")), (2, (1.0, None))]
)
def test_retries_ask_the_failed_response_again(tmp_path, retries, expected):
    """The function fails on "late" until its fourth call: all, late alone, first retry, second retry."""
    count = tmp_path / "calls"

    def reward(prompts, completions, **columns):
        seen = len(count.read_text()) + 1 if count.exists() else 1
        count.write_text("x" * seen)
        return [1.0 if c != "late" or seen >= 5 else 1 / 0 for c in completions]

    assert judged(reward, "a", "late", retries=retries) == [(1.0, None), expected]


def write_into_the_pipe(data: bytes):
    """A function that writes `data` where its answers go, and sleeps if asked to."""

    def reward(prompts, completions, **columns):
        import os
        import stat
        import time

        for descriptor in range(3, 30):
            try:
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.write(descriptor, data)
            except OSError:
                pass
        time.sleep(60 if "sleep" in completions else 0)
        return [1.0] * len(completions)

    return reward


def test_half_an_answer_is_not_waited_for_beyond_the_timeout():
    # a frame of 256 bytes is announced and one byte comes
    started = time.perf_counter()
    with pytest.raises(RewardError, match="mine: timeout: no answer within 1 s"):
        judged(write_into_the_pipe(b"\0\0\1\0x"), "sleep", timeout=1.0)
    assert time.perf_counter() - started < 8


ANSWERS = {
    "no JSON": b"\0\0\0\3abc",
    "a list": b"\0\0\0\2[]",
    "deep": b"\0\1\0\0" + b"[" * 65536,
    "negative size": b"\xff\xff\xff\xfe",
    "2 GiB announced": b"\x7f\xff\xff\xff",
}


@pytest.mark.parametrize("data", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_no_answer_is_a_fault_of_its_call(data):
    with pytest.raises(RewardError, match="mine: crashed: something else than the answer"):
        judged(write_into_the_pipe(data), "a")


def test_a_crash_is_seen_although_a_fork_of_it_lives():
    """The fork holds the worker's end of the pipe open, so that its death alone closes nothing."""

    def reward(prompts, completions, **columns):
        import ctypes
        import os
        import time

        if "bad" in completions:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            ctypes.string_at(0)
        return [1.0] * len(completions)

    started = time.perf_counter()
    assert judged(reward, "a", "bad", "b", timeout=30.0) == [(1.0, None), (None, "crashed"), (1.0, None)]
    assert time.perf_counter() - started < 20


def test_arguments_larger_than_the_pipe_arrive_whole():
    found = judged(each(lambda text: float(len(text))), "a" * 5_000_000, "b")
    assert found == [(5_000_000.0, None), (1.0, None)]


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


def test_a_column_that_the_worker_cannot_read_is_a_fault_and_not_a_crash():
    given = rollouts("a", "b", "c")
    given[1].prompt.columns["answer"] = Unreadable()
    pipeline = RewardPipeline(
        [named(each(misbehave), name="mine", isolation="process", timeout=20.0)], seed=0
    )
    try:
        scored = pipeline.score_clean(given)
    finally:
        pipeline.close()
    assert [s.reward for s in scored] == [1.0, None, 1.0]
    assert scored[1].errors[0].startswith("mine: raised: ValueError: invalid literal")


@pytest.mark.parametrize("how", ["process", "thread", "none"])
def test_a_cancelled_coroutine_costs_its_response_and_not_the_run(how):
    async def reward(prompts, completions, **columns):
        import asyncio

        if "bad" in completions:
            raise asyncio.CancelledError
        return [1.0] * len(completions)

    settings = {"isolation": how} | ({"timeout": None} if how == "none" else {})
    assert judged(reward, "a", "bad", "b", **settings) == [(1.0, None), (None, "raised"), (1.0, None)]


def test_a_sum_beyond_fp32_is_missing_and_not_infinite():
    functions = [named(each(lambda c: 3e38 if c == "big" else 1.0), name=name) for name in ("a", "b")]
    big, small = RewardPipeline(functions, seed=0).score_clean(rollouts("big", "small"))
    assert big.reward is None and big.errors == ("sum: bad_value: the weighted sum 6e+38 is beyond fp32",)
    assert small.reward == 2.0


def busy_judge(path: Path, seconds: float = 0.2):
    """Writes how many of its calls were under way at the start of each."""

    async def reward(prompts, completions, **columns):
        import asyncio

        reward.under_way = getattr(reward, "under_way", 0) + 1
        with path.open("a") as file:
            file.write(f"{len(completions)} {reward.under_way}\n")
        await asyncio.sleep(seconds)
        reward.under_way -= 1
        if "bad" in completions:
            raise ValueError("bad")
        return [1.0] * len(completions)

    return reward


@pytest.mark.parametrize("how", ["process", "thread", "none"])
def test_an_async_function_is_asked_so_many_responses_at_a_time(tmp_path, how):
    settings = {"isolation": how, "concurrency": 3} | ({"timeout": None} if how == "none" else {})
    found = judged(busy_judge(tmp_path / "calls"), "a", "bad", "b", "c", "d", **settings)
    assert found == [(1.0, None), (None, "raised"), (1.0, None), (1.0, None), (1.0, None)]
    calls = [tuple(map(int, line.split())) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {size for size, _ in calls} == {1} and max(under_way for _, under_way in calls) == 3


def test_concurrency_is_for_async_functions():
    with pytest.raises(ConfigError, match="concurrency=2 is for async functions"):
        named(each(misbehave), concurrency=2)


# files, executed in the worker alone


def from_file(tmp_path: Path, text: str, **settings) -> RewardPipeline:
    (tmp_path / "mine.py").write_text(text)
    function = {"type": "function", "file": str(tmp_path / "mine.py"), "name": "mine"} | settings
    return build_rewards(RewardsConfig.model_validate({"functions": [function]}), seed=0)


def test_a_file_is_executed_in_the_worker_alone_and_slow_imports_do_not_count(tmp_path):
    text = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(1.5)\n"
        "def mine(prompts, completions, answer, extra=None):\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    pipeline = from_file(tmp_path, text, timeout=1.0)
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert set(pipeline.columns) == {"answer"}
    assert [s.reward for s in pipeline.score_clean(rollouts("4", "5"))] == [1.0, 0.0]
    pipeline.close()


def test_a_file_that_can_no_longer_be_loaded_stops_the_run(tmp_path):
    text = "import os\ndef mine(prompts, completions):\n    os._exit(3)\n"
    pipeline = from_file(tmp_path, text)
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(RewardError, match=r"mine\.py: mine: ZeroDivisionError.*fix that") as caught:
        pipeline.score_clean(rollouts(*"abcd"))
    assert "\n" not in str(caught.value) and "verdicts failed" not in str(caught.value)


IMPORTS = {
    "raises": ("raise KeyError('here')", "KeyError"),
    "exits": ("import os; os._exit(3)", "crashed while it was loaded .*exited with status 3"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "crashed while it was loaded .*SIGSEGV"),
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit"),
    "hangs": ("import time; time.sleep(60)", "timeout while it was loaded .*not loaded within 1 s"),
    "lacks it": (
        "def other(completions): ...",
        r"no function 'mine'; it defines \['other'\]; correct the name in rewards\.functions, rewards\.gold or --gold$",
    ),
    "is no function": ("mine = 3", "no function 'mine'"),
}


@pytest.mark.parametrize(("text", "message"), IMPORTS.values(), ids=IMPORTS.keys())
def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch, text, message):
    if "sleep" in text:
        monkeypatch.setattr(isolation, "START_SECONDS", 1.0)
    with pytest.raises(ConfigError, match=message) as caught:
        from_file(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_sent_is_refused_in_one_line():
    lock = threading.Lock()

    def reward(prompts, completions, **columns):
        with lock:
            return [1.0] * len(completions)

    with pytest.raises(ConfigError, match=r"cannot be sent to a process .* use isolation: thread or none"):
        named(reward, isolation="process")
    assert judged(reward, "a", isolation="thread") == [(1.0, None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"isolation": "none"}, "timeout=300.0 cannot be kept"),
        ({"isolation": "thread", "memory_limit": 1.0}, "memory_limit=1.0 needs isolation: process"),
    ],
)
def test_settings_that_could_not_do_anything_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CallConfig(**settings)


# processes


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def report_pids(path: Path):
    def reward(prompts, completions, **columns):
        import json
        import os
        import subprocess
        import time

        child = subprocess.Popen(["sleep", "60"])
        path.write_text(json.dumps([os.getpid(), child.pid]))
        if "sleep" in completions:
            time.sleep(60)
        return [1.0] * len(completions)

    return reward


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_what_a_function_started_dies_with_it(tmp_path):
    assert judged(report_pids(tmp_path / "pids"), "a") == [(1.0, None)]
    assert all(gone(pid) for pid in json.loads((tmp_path / "pids").read_text()))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_worker_notices_that_the_run_was_killed(tmp_path):
    script = (
        "import sys, pathlib; from tests.stages.test_reward_isolation import judged, report_pids\n"
        "judged(report_pids(pathlib.Path(sys.argv[1])), 'sleep', timeout=60.0)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "pids")], cwd=Path(__file__).parents[2]
    )
    end = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.1)
    worker, child = json.loads((tmp_path / "pids").read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone(worker) and gone(child)


def test_an_exception_in_the_main_thread_ends_the_wait_and_the_worker():
    class Now(BaseException):
        pass

    def handler(signum, frame):
        raise Now

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    started = time.perf_counter()
    try:
        with pytest.raises(Now):
            judged(each(misbehave), "sleep", timeout=60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_column_may_be_called_self(isolation):
    def reward(completions, **columns):
        return [float(name == "ours") for name in columns["self"]]

    function = named(reward, isolation=isolation)
    rollouts = [make_rollout("1", answer="1", **{"self": "ours"})]
    pipeline = RewardPipeline([function], seed=0)
    try:
        assert [s.clean_reward for s in pipeline.score_clean(rollouts)] == [1.0]
    finally:
        pipeline.close()
