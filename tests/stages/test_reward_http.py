"""A judge behind HTTP: retried, bounded, never a zero."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.stages.test_reward_isolation import rollouts
from vrpo.config.rewards import RewardsConfig
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards import RewardPipeline, build_rewards, fault_kind, http

Behaviour = Callable[[dict, int], tuple[int, dict[str, str], bytes]]
"""(request, its number) -> status, headers, body."""


class Server(ThreadingHTTPServer):
    """Behaves as a test wants, and remembers what it was asked."""

    daemon_threads = True
    behave: Behaviour
    requests: list[dict]
    headers: list[dict]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(asked)
        self.server.headers.append(dict(self.headers))
        status, headers, body = self.server.behave(asked, len(self.server.requests))
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def right(asked: dict, number: int) -> tuple[int, dict[str, str], bytes]:
    rewards = [float(c == a) for c, a in zip(asked["completions"], asked["answer"], strict=True)]
    return 200, {}, json.dumps({"rewards": rewards}).encode()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.02)
    made = Server(("127.0.0.1", 0), Handler)
    made.behave, made.requests, made.headers = right, [], []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/judge"


def pipeline_at(url: str, **settings) -> RewardPipeline:
    function = {"type": "http", "url": url} | settings
    return build_rewards(RewardsConfig.model_validate({"functions": function, "max_failed": 0.6}), seed=0)


def pipeline_of(server: Server, **settings) -> RewardPipeline:
    return pipeline_at(settings.pop("url", address(server)), **settings)


def judged(server: Server, *completions: str, **settings) -> list[tuple[float | None, str | None]]:
    scored = pipeline_of(server, **settings).score_clean(rollouts(*completions))
    return [(s.reward, fault_kind(s.errors[0]) if s.errors else None) for s in scored]


def test_it_asks_in_blocks_and_keeps_the_order(server):
    texts = ["4", "5", "4", "6", "4"]
    assert [reward for reward, _ in judged(server, *texts, batch_size=2)] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert sorted(len(asked["completions"]) for asked in server.requests) == [1, 2, 2]
    assert all(asked["prompts"][0] == "2+2=" for asked in server.requests)


def test_what_passes_by_itself_is_tried_again(server):
    server.behave = lambda asked, number: right(asked, number) if number > 2 else (503, {}, b"busy")
    assert judged(server, "4", "5") == [(1.0, None), (0.0, None)]
    assert len(server.requests) == 3


def test_retry_after_is_respected(server):
    server.behave = lambda asked, number: (
        right(asked, number) if number > 1 else (429, {"Retry-After": "1"}, b"")
    )
    started = time.perf_counter()
    assert judged(server, "4") == [(1.0, None)]
    assert time.perf_counter() - started >= 1.0


BAD = {
    "status": (404, {}, b"{}"),
    "always busy": (500, {}, b"{}"),
    "no JSON": (200, {}, b"<html>"),
    "a list": (200, {}, b"[1.0]"),
    "wrong length": (200, {}, b'{"rewards": [1.0, 1.0]}'),
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD.keys())
def test_a_bad_answer_costs_its_block_alone(server, answer):
    server.behave = lambda asked, number: answer if "bad" in asked["completions"] else right(asked, number)
    assert judged(server, "4", "bad", "5", batch_size=1, attempts=2) == [
        (1.0, None),
        (None, "http"),
        (0.0, None),
    ]


def test_null_is_no_verdict_and_text_is_a_bad_value(server):
    server.behave = lambda asked, number: (200, {}, b'{"rewards": [null, "1", NaN, 0.5]}')
    assert judged(server, "a", "b", "c", "d") == [
        (None, None),
        (None, "bad_value"),
        (None, "bad_value"),
        (0.5, None),
    ]


def test_waiting_is_bounded(server):
    server.behave = lambda asked, number: time.sleep(3) or right(asked, number)
    started = time.perf_counter()
    with pytest.raises(RewardError, match=r"http: timeout: no answer within 0\.5 s"):
        judged(server, "4", "5", timeout=0.5)
    assert time.perf_counter() - started < 2.5
    server.behave = lambda asked, number: time.sleep(1) or right(asked, number)
    with pytest.raises(RewardError, match="http: http: no answer of"):
        judged(server, "4", request_timeout=0.2, attempts=1)


def test_a_block_without_an_answer_costs_itself_alone(server):
    server.behave = lambda asked, number: (
        time.sleep(3 if "bad" in asked["completions"] else 0) or right(asked, number)
    )
    assert judged(server, "4", "bad", "5", batch_size=1, timeout=1.0) == [
        (1.0, None),
        (None, "timeout"),
        (0.0, None),
    ]


def test_a_step_that_was_given_up_leaves_the_next_its_connections(server):
    pipeline = pipeline_of(server, timeout=0.5, concurrency=1)
    server.behave = lambda asked, number: time.sleep(3) or right(asked, number)
    with pytest.raises(RewardError, match="http: timeout"):
        pipeline.score_clean(rollouts("4"))
    server.behave = right
    assert [s.reward for s in pipeline.score_clean(rollouts("4", "5"))] == [1.0, 0.0]


def test_a_server_that_asks_for_patience_does_not_keep_the_run_from_ending(server):
    server.behave = lambda asked, number: (429, {"Retry-After": "60"}, b"")
    script = (
        "import sys; from tests.stages.test_reward_http import pipeline_at; "
        "from tests.stages.test_reward_isolation import rollouts\n"
        "try: pipeline_at(sys.argv[1], timeout=0.5).score_clean(rollouts('4'))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address(server)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "RewardError\n"


def test_a_redirect_is_not_followed_and_the_headers_stay(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.behave = lambda asked, number: (307, {"Location": f"http://localhost:{server.server_port}/"}, b"")
    with pytest.raises(RewardError, match="status 307"):
        judged(server, "4", headers_env={"X-Api-Key": "JUDGE_KEY"})
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["hunter2\n", "hunter2\r\nX-Other: 1", "hunter2\u20ac", "hunter2\0"])
def test_a_secret_that_is_no_header_is_refused_without_being_shown(server, monkeypatch, value):
    monkeypatch.setattr(http.os, "environ", {"JUDGE_KEY": value})
    with pytest.raises(ConfigError, match="JUDGE_KEY holds a line break") as caught:
        judged(server, "4", headers_env={"Authorization": "JUDGE_KEY"})
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_label_noise_on_a_column_that_is_not_sent_is_refused(server):
    settings = {"noise": {"type": "wrong_label", "rate": 0.5}}
    function = {"type": "http", "url": address(server), "columns": []}
    config = RewardsConfig.model_validate({"functions": function} | settings)
    with pytest.raises(ConfigError, match="changes column 'answer', which no reward function reads"):
        build_rewards(config, seed=0, answers=lambda column: ["1", "2"])


def test_nobody_listens(server):
    url = "http://127.0.0.1:1/"
    with pytest.raises(
        RewardError, match=r"http: http: cannot connect to http://127\.0\.0\.1:1/, in 2 attempts"
    ):
        judged(server, "4", url=url, attempts=2)


def test_an_answer_that_is_none_is_shown_and_one_that_does_not_come_is_waited_for_no_longer(server):
    for said, shown in (
        (b'{"scores": [1]}', r'\{"scores": \[1\]\}'),
        (b"<html>", "<html>"),
        (b"", "nothing"),
    ):
        server.behave = lambda asked, number, said=said: (200, {}, said)
        wanted = rf'{address(server)} must answer \{{"rewards": \[1 numbers or null\]\}}, it answered {shown}'
        with pytest.raises(RewardError, match=wanted):
            judged(server, "4")
    server.behave = lambda asked, number: time.sleep(1) or right(asked, number)
    with pytest.raises(RewardError, match=rf"no answer of {address(server)} within 0\.2 s, in 1 attempt;"):
        judged(server, "4", attempts=1, request_timeout=0.2)


def test_headers_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judged(server, "4", headers_env={"Authorization": "JUDGE_KEY"})
    assert server.headers[0]["Authorization"] == "secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY, which is not set"):
        judged(server, "4", headers_env={"Authorization": "JUDGE_KEY"})


def test_what_the_server_says_about_a_refusal_is_in_the_line(server):
    server.behave = lambda asked, number: (422, {}, b'{"detail": "field\n  answer missing"}')
    with pytest.raises(RewardError, match=r'status 422 of http://\S+: \{"detail": "field answer missing"\}'):
        judged(server, "a")
