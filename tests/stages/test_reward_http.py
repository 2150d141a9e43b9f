"""A judge behind HTTP: retried, bounded, never a zero."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.stages.test_reward_isolation import rollouts
from vrpo.config.rewards import RewardsConfig
from vrpo.errors import ConfigError, RewardError
from vrpo.rewards import build_rewards, fault_kind, http

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


def judged(server: Server, *completions: str, **settings) -> list[tuple[float | None, str | None]]:
    function = {"type": "http", "url": f"http://127.0.0.1:{server.server_port}/judge"} | settings
    pipeline = build_rewards(RewardsConfig.model_validate({"functions": function, "max_failed": 0.6}), seed=0)
    scored = pipeline.score_clean(rollouts(*completions))
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
    with pytest.raises(RewardError, match="http: http: MaxRetryError"):
        judged(server, "4", request_timeout=0.2, attempts=1)


def test_nobody_listens(server):
    url = "http://127.0.0.1:1/"
    with pytest.raises(RewardError, match="http: http: MaxRetryError"):
        judged(server, "4", url=url, attempts=2)


def test_headers_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judged(server, "4", headers_env={"Authorization": "JUDGE_KEY"})
    assert server.headers[0]["Authorization"] == "secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY, which is not set"):
        judged(server, "4", headers_env={"Authorization": "JUDGE_KEY"})
