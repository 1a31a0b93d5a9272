"""The reward server grades as the local pool does, whatever it is sent, and its client turns no failure into a zero.

Shown with a real server process and real HTTP: CurioSFT's calls as its release writes them, answers that hang and
crash, killed workers, a full queue, bodies that are too large, tokens, a graceful stop; with scripted servers: one that
is down, slow, full, broken or another program. Not shown: throughput (tools/load_test_rewards.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from megatron_entropy.cli import serve_rewards
from megatron_entropy.cli.main import main
from megatron_entropy.config.changes import find_changes
from megatron_entropy.config.load import load
from megatron_entropy.config.schema import RewardConfig
from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.methods import load_method_config
from megatron_entropy.records import Grade
from megatron_entropy.rewards import VERIFIERS, RemoteGrader, check_grader, open_grader
from megatron_entropy.rewards.guard import Guard
from megatron_entropy.rewards.worker import call_verifier
from megatron_entropy.semantic_entropy.clusters import AnswerJudge

TESTS = Path(__file__).parent
BAD = "bad_verifiers:misbehave"
TIMEOUT = 3.0
QUEUE = 40
MAX_BODY = 200_000


@contextlib.contextmanager
def running_server(*arguments, **variables):
    """A server process; yields it and its address."""
    command = ["-m", "megatron_entropy", "serve-rewards", "--port", "0", "--workers", "2", "--timeout", str(TIMEOUT)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parents[1]}:{TESTS}", **variables}
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://[\d.]+:\d+", line)[0]
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def server():
    """The address of a server with two workers and a verifier that misbehaves on demand."""
    arguments = ("--verifier", BAD, "--queue", str(QUEUE), "--max-body", str(MAX_BODY))
    with running_server(*arguments) as (process, url):
        yield process, url


def call(url, path, content=None, *, headers=None, body=None):
    """Status and JSON (or text) of a reply."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    body = json.dumps(content).encode() if content is not None else body
    connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def item(index, sequence, truth, **fields):
    """An item as CurioSFT's reward manager sends it."""
    return {
        "i": index, "sequences_str": sequence, "ground_truth": truth, "reward_impl_version": 1, "oat_grader": True,
        "valid_response_length": 7, "enable_timeout": True, "data_source": "math", "extra_info": {"index": 3}, **fields,
    }  # fmt: skip


def test_curiosft_batch(server):
    items = [
        item(0, r"<think>\n is it \boxed{3}? </think> so </think> \boxed{\frac{1}{2}}", "0.5"),
        item(1, r"<think>\n \boxed{0.5}", "0.5"),  # thinking never ends
        item(2, r"\boxed{0.5}", "0.5", reward_impl_version=0),
        item(3, r"</think> \boxed{41}", "42"),
        item(4, r"</think> \boxed{42}", 42, oat_grader=False, data_source="codegen", valid_response_length=0),
        item(5, r"\boxed{0.5} </think> 7", "0.5"),  # oat reads all of it, math-verify the text after </think>
        item(6, r"\boxed{0.5} </think> 7", "0.5", oat_grader=False),
        item(7, r"\boxed{0.5} </think> 7", "0.5", data_source="codegen_a"),
        item(8, r"\boxed{41} 0.5", "0.5", reward_impl_version=0),
    ]
    status, reply = call(server[1], "/process_batch", {"items": items})
    assert status == 200 and reply["total_processed"] == 9 and reply["timeout_count"] == 0
    results = reply["results"]
    keys = {"i", "score", "valid_response_length", "error", "extracted_answers"}
    assert all(result.keys() == keys for result in results)
    assert [result["i"] for result in results] == list(range(9))
    assert [result["score"] for result in results] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [result["error"] for result in results] == [None] * 9
    assert [result["valid_response_length"] for result in results] == [7, 7, 7, 7, 0, 7, 7, 7, 7]
    assert [result["extracted_answers"] for result in results][:2] == [r"\frac{1}{2}", ""]


def test_curiosft_other_routes(server):
    url = server[1]
    assert call(url, "/process_batch", {"items": []}) == (400, {"error": "No items provided"})
    status, result = call(url, "/process_single", item(9, r"</think> \boxed{x^2-1}", "(x-1)(x+1)"))
    assert status == 200 and (result["i"], result["score"], result["error"]) == (9, 1.0, None)
    status, health = call(url, "/health")
    assert status == 200 and health["status"] == "healthy" and health["version"] == "2.0.0"
    assert health["pool_type"] == "ProcessPool" and abs(health["timestamp"] - time.time()) < 60
    status, result = call(url, "/process_single", item(9, "</think> 1", ""))  # no ground truth
    assert status == 200 and result["score"] == 0.0 and "ground truth" in result["error"]
    assert call(url, "/verify_response", {})[0] == 404


def test_curiosft_reinit_pool(server):
    url = server[1]
    status, reply = call(url, "/reinit_pool", {"max_workers": 2})
    assert status == 200 and reply["status"] == "success"
    status, reply = call(url, "/pool_status")
    assert (status, reply["status"], reply["max_workers"]) == (200, "active", 2)
    assert call(url, "/process_single", item(0, r"</think> \boxed{1}", "1"))[1]["score"] == 1.0
    assert call(url, "/reinit_pool", {"max_workers": 10**9})[0] == 422


def test_only_the_bad_answers_lose_their_grade(server):
    bad = {
        "hang": "timeout",
        "segfault": "crash",
        "memory": "crash",
        "raise": "ValueError: two lines x",
    }
    responses = [word for index, name in enumerate(bad) for word in (f"good {index}", name)]
    pairs = [{"response": text, "answer": text} for text in [*responses, "\ud800"]]
    status, reply = call(server[1], "/grade", {"verifier": BAD, "pairs": pairs})
    assert status == 200
    for text, grade in zip(responses, reply["grades"], strict=False):
        if text in bad:
            assert grade["correct"] is None and grade["error"].startswith(bad[text])
        else:
            assert grade == {"correct": True, "extracted": text, "error": None}
    assert reply["grades"][-1]["extracted"] == "?"  # a lone surrogate


def test_the_remote_grader_agrees_with_the_verifier(server):
    answers = (
        r"\boxed{\frac{2}{4}}",
        "the answer is 0.5",
        r"\boxed{0.51}",
        "none",
        "\ud800 0.5",
        "x" * 10**5 + r"\boxed{.5}",
    )
    pairs = [(text, truth) for text in answers for truth in ("0.5", "")] * 4
    expected = [call_verifier(VERIFIERS["math_verify"], *pair) for pair in pairs]
    with open_grader(RewardConfig(url=server[1])) as grader:
        assert isinstance(grader, RemoteGrader)
        assert grader.grade(pairs) == expected
        assert grader.grade([]) == []
    assert {grade.correct for grade in expected} == {True, False, None}


def test_answers_are_compared_on_the_server(server):
    judge = AnswerJudge(RewardConfig(url=server[1]))
    ((correct, clusters),) = judge.judge([("0.5", [r"\boxed{\frac{1}{2}}", r"\boxed{3}", r"\boxed{0.5}", "none"])])
    judge.close()
    assert correct == [True, False, True, False] and clusters == [0, 1, 0, -1]


def test_a_time_limit_of_a_request_keeps_what_is_graded(server):
    with RemoteGrader(server[1], verifier=BAD, budget=1.5, patience=1.5) as grader:
        started = time.monotonic()
        grades = grader.grade([(text, "1") for text in ["1", *["slow"] * 9]])
    assert time.monotonic() - started < 5
    assert grades[0] == Grade(True, "1") and Grade(False, "slow") in grades
    assert {grade.error for grade in grades} == {None, "budget"}


def test_a_full_queue_asks_to_retry_and_a_client_that_leaves_frees_it(server):
    url = server[1]
    content = {"verifier": BAD, "pairs": [{"response": "slow", "answer": ""}] * QUEUE}
    client = http.client.HTTPConnection(urlsplit(url).netloc)
    client.request("POST", "/grade", json.dumps(content), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 20
    while call(url, "/pool_status")[1]["queue_length"] < QUEUE - 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    content["pairs"] = [{"response": "1", "answer": "1"}] * 3
    connection.request("POST", "/grade", json.dumps(content), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 429 and int(response.getheader("Retry-After")) >= 1 and b"full" in response.read()
    connection.close()
    client.close()
    with RemoteGrader(url, verifier=BAD, budget=30.0, patience=30.0) as grader:
        assert grader.grade([("1", "1")] * 3) == [Grade(True, "1")] * 3  # after some retries
    assert call(url, "/grade", {"verifier": BAD, "pairs": [{"response": "1", "answer": "1"}] * (QUEUE + 1)})[0] == 413


def test_a_large_answer_is_an_error_of_its_own(server):
    url = server[1]
    assert call(url, "/grade", body=b"x" * (MAX_BODY + 1))[0] == 413
    pairs = [("1", "1"), ("x" * MAX_BODY, "1"), ("2", "2")]
    with RemoteGrader(url, verifier=BAD, budget=20.0, patience=20.0) as grader:
        grades = grader.grade(pairs)
    assert grades[0] == Grade(True, "1") and grades[2] == Grade(True, "2")
    assert grades[1].correct is None and "more than 200000 bytes" in (grades[1].error or "")
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    chunks = (b"x" * 50_000 for _ in range(10))
    connection.request("POST", "/grade", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"verifier": "os:system", "pairs": [{"response": "true", "answer": ""}]}, 400),
        ({"pairs": [{"response": "1"}]}, 422),
        ({"pairs": {"response": "1"}}, 422),
        ({"pairs": [], "seconds": -1}, 422),
    ],
)
def test_wrong_requests_are_refused(server, content, status):
    found, reply = call(server[1], "/grade", content)
    assert found == status and reply["error"]


def test_what_is_no_json_is_refused(server):
    for body in (b"\x80\x04\x95", b"[" * 100_000, b"{", b'{"pairs": NaN}'):
        assert call(server[1], "/grade", body=body)[0] in (400, 422)
    assert call(server[1], "/grade", body=b"{}", headers={"Content-Type": "application/x-pickle"})[0] == 422


def test_a_killed_worker_costs_no_grade(server):
    process, url = server
    before = metric(url, "worker_restarts_total")

    def kill():
        time.sleep(0.4)
        for child in psutil.Process(process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    _, reply = call(url, "/grade", {"verifier": BAD, "pairs": [{"response": "slow", "answer": "slow"}] * 2})
    killer.join()
    assert [grade["correct"] for grade in reply["grades"]] == [True, True]
    assert metric(url, "worker_restarts_total") >= before + 2


def metric(url, name):
    """Sum of the series of a metric."""
    lines = call(url, "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"megatron_entropy_reward_{name}"))


def test_metrics_count_answers_by_verdict(server):
    url = server[1]
    names = ("correct", "wrong", "error")
    before = [metric(url, f'answers_total{{verdict="{name}"') for name in names]
    pairs = [{"response": text, "answer": "1"} for text in ("1", "2", "3", "raise")]
    call(url, "/grade", {"verifier": BAD, "pairs": pairs})
    after = [metric(url, f'answers_total{{verdict="{name}"') for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 2, 1]
    assert metric(url, "queue_length") == 0 and metric(url, "answer_seconds_count") >= 4
    assert metric(url, 'requests_total{route="other"') >= 0


def test_it_listens_on_loopback_only(server):
    process, url = server
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    listening = [c for one in family for c in one.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", urlsplit(url).port)]


def test_token_and_graceful_stop(monkeypatch):
    """In one server, since a start costs seconds."""
    with running_server("--workers", "1", "--verifier", BAD, MEGATRON_ENTROPY_REWARD_TOKEN="secret") as (process, url):
        config = RewardConfig(url=url, verifier=BAD)
        monkeypatch.delenv("MEGATRON_ENTROPY_REWARD_TOKEN", raising=False)
        with pytest.raises(ConfigError, match="MEGATRON_ENTROPY_REWARD_TOKEN"):
            check_grader(config)
        monkeypatch.setenv("MEGATRON_ENTROPY_REWARD_TOKEN", "secret")
        check_grader(config)
        with pytest.raises(ConfigError, match="serve-rewards --verifier"):
            check_grader(RewardConfig(url=url, verifier="other:one"))
        children = psutil.Process(process.pid).children()
        replies, threads, headers = [], [], {"Authorization": "Bearer secret"}
        for text in ("slow", "1"):
            content = {"verifier": BAD, "pairs": [{"response": text, "answer": text}]}
            send = lambda content=content: replies.append(call(url, "/grade", content, headers=headers))  # noqa: E731
            threads.append(threading.Thread(target=send))
            threads[-1].start()
            deadline = time.monotonic() + 10
            while call(url, "/pool_status", headers=headers)[1]["queue_length"] != (text == "1"):
                assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        by_status = dict(replies)
        assert by_status.keys() == {200, 503}  # what was begun is finished, what waited is refused
        assert [grade["correct"] for grade in by_status[200]["grades"]] == [True]
        assert not psutil.wait_procs(children, timeout=5)[1]
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("authorization", "path", "status"),
    [
        (None, "/grade", 401),
        (b"Bearer wrong", "/grade", 401),
        (b"secret", "/grade", 401),
        (b"Bearer secr\xe9t", "/metrics", 401),
        (b"Bearer secret", "/grade", 200),
        (None, "/health", 200),
    ],
)
def test_token_of_a_request(authorization, path, status):
    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent, counted = [], []

    async def send(message):
        sent.append(message)

    guard = Guard(application, token="secret", max_body=9, on_response=lambda *response: counted.append(response))
    headers = [(b"authorization", authorization)] if authorization else []
    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, None, send))
    assert sent[0]["status"] == status and counted == [(path, status)]


def run_command(capsys, *arguments):
    code = main(["serve-rewards", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = run_command(capsys, "--port", str(taken.getsockname()[1]))
    assert code == 2 and not out and err.count("\n") == 1
    assert "is in use" in err and "choose another port" in err


def test_unknown_hosts_and_verifiers_are_one_line(capsys):
    assert "cannot listen there" in run_command(capsys, "--host", "203.0.113.7")[2]
    assert "cannot be imported" in run_command(capsys, "--verifier", "no_such_module:grade")[2]


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr(serve_rewards, "PACKAGES", ("json", "no_such_package"))
    assert run_command(capsys) == (
        2, "", "error: serve-rewards needs no-such-package: pip install 'megatron-entropy[eval]'\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("host", "token", "warns"), [("0.0.0.0", "", True), ("0.0.0.0", "x", False), ("::1", "", False)]
)
def test_other_machines_without_a_token_are_warned_of(capsys, monkeypatch, host, token, warns):
    monkeypatch.setattr("megatron_entropy.rewards.server.serve", lambda settings, listener: listener.close())
    code, out, err = run_command(capsys, "--host", host, "--port", "0", "--token", token)
    assert code == 0 and out.count("\n") == 1 and ("set a token" in err) is warns


class Script(http.server.BaseHTTPRequestHandler):
    """Answers each request as the next entry of `replies` says; the last one is repeated."""

    replies: list
    requests: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((dict(self.headers), json.loads(body)))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if reply == "drop":
            return
        if reply == "hang":
            time.sleep(1.5)
            return
        status, headers, content = reply
        if content == "grade":
            content = {
                "grades": [{"correct": True, "extracted": None, "error": None}] * len(self.requests[-1][1]["pairs"])
            }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *unused):
        """Be silent."""


@contextlib.contextmanager
def scripted(*replies):
    """A server that replies as scripted; yields its address and the requests it gets."""
    handler = type("Handler", (Script,), {"replies": list(replies), "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


OK = (200, {}, "grade")
FULL = (429, {"Retry-After": "1"}, {"error": "the queue is full"})


def remote(url, budget=20.0, patience=20.0):
    return RemoteGrader(url, verifier="boxed", budget=budget, patience=patience)


def test_passing_failures_cost_no_grade():
    with scripted((503, {}, {"error": "stopping"}), "drop", FULL, (500, {}, {}), OK) as (url, requests):
        started = time.monotonic()
        assert remote(url).grade([("1", "1")]) == [Grade(True)]
        assert time.monotonic() - started > 1.0  # Retry-After
    assert len(requests) == 5 and all(sent["pairs"] == [{"response": "1", "answer": "1"}] for _, sent in requests)
    assert "Authorization" not in requests[0][0]


@pytest.mark.parametrize("reply", ["drop", "hang", FULL, (500, {}, {"error": "Process pool not initialized"})])
def test_a_server_that_grades_nothing_ends_the_run(reply, monkeypatch):
    monkeypatch.setattr("megatron_entropy.rewards.client.REPLY_SLACK", 0.0)
    with scripted(reply) as (url, _):
        started = time.monotonic()
        with pytest.raises(Fault, match=r"reward\.url=http.*serve-rewards.*--resume") as caught:
            remote(url, budget=0.7, patience=0.7).grade([("1", "1")] * 100)
        assert time.monotonic() - started < 3 and "\n" not in str(caught.value)


def test_closing_ends_a_call_in_progress():
    with scripted("hang") as (url, requests):
        grader = remote(url, budget=60.0, patience=60.0)
        closed = []

        def close():
            while not requests:
                time.sleep(0.01)
            closed.append(time.monotonic())
            grader.close()

        threading.Thread(target=close, daemon=True).start()
        with pytest.raises(Fault):
            grader.grade([("1", "1")])
        assert time.monotonic() - closed[0] < 1.0 and len(requests) == 1  # the server would take 1.5 s


@pytest.mark.parametrize("url", ["http://a..b", "http://no such host", "http://[::1]:9"])
def test_an_address_that_does_not_exist_is_one_line(url):
    with pytest.raises(ConfigError, match=r"^reward\.url=http.*grades nothing"):
        check_grader(RewardConfig(url=url))


def test_a_server_that_is_down_ends_the_run_even_without_a_budget():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Fault, match="Connection refused"):
        remote(url, budget=float("inf"), patience=0.5).grade([("1", "1")])
    with pytest.raises(ConfigError, match=r"reward\.url=.*Connection refused.*serve-rewards"):
        check_grader(RewardConfig(url=url))


def test_what_a_lost_server_has_not_graded_counts_as_errors(caplog):
    with scripted(OK, (500, {}, {"error": "out of order"})) as (url, _):
        with caplog.at_level(logging.WARNING, logger="megatron_entropy"):
            grades = remote(url, budget=1.0, patience=1.0).grade([("1", "1")] * 100)
    assert (
        sorted(grades, key=lambda grade: grade.correct is None)
        == [Grade(True)] * 32 + [Grade(None, error="server")] * 68
    )
    (record,) = caplog.records
    assert (
        "68 of 100" in record.message and "reward/error_server" in record.message and "out of order" in record.message
    )


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, {}, {}), "is it a reward server"),
        ((302, {"Location": "http://127.0.0.1:1/"}, {}), "status 302"),
        ((200, {}, {"grades": []}), "does not hold 1 grades"),
        ((200, {}, {"grades": [{"correct": "yes", "extracted": None, "error": None}]}), "does not hold"),
        ((200, {}, [[]]), "does not hold"),
    ],
)
def test_another_program_at_the_address_ends_the_run(reply, message):
    with scripted(reply) as (url, _):
        with pytest.raises(Fault, match=message):
            remote(url).grade([("1", "1")])


def test_a_request_that_is_too_large_is_split(monkeypatch):
    too_large = (413, {}, {"error": "too large"})
    with scripted(too_large, OK, too_large, too_large, OK, OK) as (url, requests):
        grades = remote(url).grade([(str(index), "") for index in range(4)])
    assert grades == [Grade(True), Grade(True), Grade(None, error="server: too large"), Grade(True)]
    assert [len(sent["pairs"]) for _, sent in requests] == [4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:19876", "http://HOST:PORT"),
        ("ftp://127.0.0.1", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://host:99999", "[Pp]ort"),
        ("http://host/?token=1", "http://HOST:PORT"),
        ("http://user:secret@host", "MEGATRON_ENTROPY_REWARD_TOKEN"),
    ],
)
def test_addresses_are_checked(url, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(url=url)


def test_a_resumed_run_may_grade_elsewhere(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('steps = 1\n[method]\nname = "grpo"\n')
    (here,) = load(file, [], load_method_config)
    (there,) = load(file, ["--reward.url=http://127.0.0.1:19876"], load_method_config)
    (change,) = find_changes(there, here.model_dump(mode="json"))
    assert change.key == "reward.url" and change.is_free and here.fingerprint() == there.fingerprint()
