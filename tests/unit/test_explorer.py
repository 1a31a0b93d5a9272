"""The explorer reads runs that are being written, damaged or hostile, loses nothing, and explains what decided.

Shown with a real server process and real HTTP, and in a real browser where Chromium is installed: clicks through all
pages at desktop and phone width. Not shown: speed (tools/benchmark_explorer.py).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlencode, urlsplit

import pytest
from benchmark_explorer import make_group, make_run
from browser import CHROMIUM, Browser

from megatron_entropy.cli.main import main
from megatron_entropy.explorer import explain, index
from megatron_entropy.explorer.index import DumpIndex, Filter, RunReader
from megatron_entropy.monitor.dump_rows import DumpRow, cut_of, describe_tokens, token_texts
from megatron_entropy.monitor.rollout_dumps import dump_rollouts

HOSTILE = (
    "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script>\u202e\x07\x1b[31m"
)


def row(**values):
    return {"question": "q", "response": "r", **values}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps with CURE's groups, and an evaluation with damaged and hostile lines."""
    folder = make_run(tmp_path_factory.mktemp("explorer") / "run", steps=3, groups=6)
    lines = [row(response=f"answer {i}", group=i // 4, sample=i % 4, correct=bool(i % 2)) for i in range(8)]
    lines[5] |= {"question": HOSTILE, "response": HOSTILE, "extracted": HOSTILE, "answer": HOSTILE, "group": 7}
    lines[5] |= {"pieces": [HOSTILE, "\x00", "\n"], "entropies": [0.5, None, 2.0], "length": 3, "entropy": 1.0}
    damaged = [b'{"question": 1', b"\xff\xfe", b'{"question": "q", "response": "r", "entropy": NaN}', b"[]"]
    write_lines(folder.evaluation("rl", 3), [lines[0], damaged[0], *lines[1:], *damaged[1:], b'{"question": "to'])
    return folder


@contextlib.contextmanager
def running(*runs):
    """A server process; yields its address."""
    command = [sys.executable, "-m", "megatron_entropy", "view", *map(str, runs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and not errors, errors


@pytest.fixture(scope="module")
def server(folder):
    with running(folder.root, folder.root) as address:
        yield address


def get(address, path, *, method="GET", host=None, **parameters):
    """Status, headers and body of an answer; JSON is read."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    query = f"{path}?{urlencode(parameters)}" if parameters else path
    connection.putrequest(method, query, skip_host=True)
    connection.putheader("Host", host or place.netloc)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    if answer.headers.get_content_type() == "application/json":
        body = json.loads(body)
    return answer.status, answer.headers, body


# ---- the index


def test_pages_follow_one_another_and_hold_every_row_once(folder):
    dump = DumpIndex(folder.rollouts("rl", 2))
    rows, start = [], 0
    while start is not None:
        page = dump.find(Filter(), start, 7)
        rows, start = rows + page.rows, page.next
    assert rows == list(range(48)) and dump.complete and not dump.damaged
    assert [len(dump.group_of(row)) for row in (0, 13, 47)] == [8, 8, 8]


def test_first_page_of_a_long_dump_reads_only_its_beginning(tmp_path):
    write_lines(tmp_path / "a.jsonl", [row(sample=i) for i in range(1000)])
    dump = DumpIndex(tmp_path / "a.jsonl")
    assert dump.find(Filter(), 0, 10).rows == list(range(10)) and len(dump.entries) <= 11 and not dump.complete


def test_a_search_stops_in_time_and_goes_on_where_it_stopped(tmp_path):
    write_lines(tmp_path / "a.jsonl", [row(response=f"number {i}") for i in range(300)])
    dump = DumpIndex(tmp_path / "a.jsonl")
    found, start, turns = [], 0, 0
    while start is not None:
        page = dump.find(Filter(text="NUMBER 29"), start, 40, seconds=0.0005)
        found, start, turns = found + page.rows, page.next, turns + 1
        assert turns < 100_000
    assert found == [29, *range(290, 300)] and turns > 1


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"verdict": "right"}, {1, 3}),
        ({"verdict": "error"}, {4}),
        ({"min_length": 2, "max_length": 3}, {2, 3}),
        ({"min_entropy": 0.25}, {3, 4}),
        ({"text": "Ä3"}, {3}),
        ({"question": index.question_digest("q1")}, {1}),
        ({"verdict": "right", "min_length": 2}, {3}),
    ],
)
def test_filters(tmp_path, wanted, expected):
    lines = [row(correct=bool(i % 2), length=i, entropy=i / 10, response=f"ä{i}", question=f"q{i}") for i in range(4)]
    write_lines(tmp_path / "a.jsonl", [*lines, row(error="timeout", entropy=1.0)])
    assert set(DumpIndex(tmp_path / "a.jsonl").find(Filter(**wanted), 0, 50).rows) == expected


def test_damaged_lines_are_counted_and_a_torn_one_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    torn = json.dumps(row(response="last")).encode()
    write_lines(path, [row(), b"", b"{}", b"\x00\xff", row(entropy=1.0), torn[:9]])
    dump = DumpIndex(path)
    assert dump.find(Filter(), 0, 9).rows == [0, 1] and dump.damaged == 2 and dump.complete
    with path.open("ab") as file:
        file.write(torn[9:] + b"\n")
    assert dump.follows() and dump.find(Filter(), 0, 9).rows == [0, 1, 2] and dump.damaged == 2
    assert dump.read([2])[0].response == "last"
    write_lines(path, [row()])
    assert not dump.follows()


def test_a_line_over_the_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MAX_LINE", 100)
    write_lines(tmp_path / "a.jsonl", [row(), row(response="x" * 1000), row(response="after"), b""])
    dump = DumpIndex(tmp_path / "a.jsonl")
    assert dump.find(Filter(), 0, 9).rows == [0, 1] and dump.damaged == 1 and dump.read([1])[0].response == "after"


def test_metrics_are_polled_by_offset_through_a_torn_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1, "x": NaN}\nnonsense\n{"stage": "a", "step": 2, "y": 1e999, "z": 1')
    run = RunReader(tmp_path)
    first = run.metrics(0, 0)
    assert first["rows"] == [{"stage": "a", "step": 1, "x": None}] and first["damaged"] == 1 and not first["reset"]
    with path.open("a") as file:
        file.write('}\n{"stage": "a", "step": "3"}\n')
    second = run.metrics(first["offset"], first["file"])
    assert second["rows"] == [{"stage": "a", "step": 2, "y": None, "z": 1}] and second["damaged"] == 1
    shutil.copy(path, tmp_path / "new")
    (tmp_path / "new").replace(path)
    third = run.metrics(second["offset"], second["file"])
    assert third["reset"] and len(third["rows"]) == 2
    path.unlink()
    assert run.metrics(third["offset"], third["file"])["reset"]


# ---- explanations


def test_token_texts_join_to_the_text():
    assert token_texts(["Ġso", "Ċ", "Ã", "¤", "<|end|>"]) == [" so", "\n", "", "ä", "<|end|>"]
    assert token_texts(["▁so", "<0xC3>", "<0xA4>", "->"]) == [" so", "", "ä", "->"]
    assert "".join(token_texts(["Ġ", "Ã", "x"])) == " \ufffdx"


def test_alternatives_are_read_as_the_tokens_are():
    values = {"pieces": ["Ġa", "b"], "alternatives": [[("Ã¤", -0.5), ("Ã", -1.0)], [("b", 0.0)]]}
    tokens = describe_tokens(DumpRow(**row(**values)))
    assert tokens["alternatives"] == [[("ä", -0.5), ("Ã", -1.0)], [("b", 0.0)]]
    assert "alternatives" not in describe_tokens(DumpRow(**row(**values | {"pieces": ["Ġa"]})))


def test_a_cut_and_its_branches_are_explained(tmp_path):
    dump_rollouts(tmp_path / "a.jsonl", [make_group(0, 12)], lambda token: f"w{token}")
    dump = DumpIndex(tmp_path / "a.jsonl")
    dump.find(Filter(), 0, 9)
    rows = dump.read(dump.group_of(0))
    cut = cut_of(rows[3], rows[0])
    assert cut["position"] == 6 and cut["text"] == rows[0].pieces[6] and cut["entropy"] == rows[0].entropies[6]
    assert cut["rank"] == sorted(rows[0].entropies, reverse=True).index(cut["entropy"]) + 1
    assert math.isclose(cut["probability"], math.exp(rows[0].rollout_logprobs[6]))
    group = dict(enumerate(rows))
    parent = " ".join(explain.sentences(rows[0], 0, group, []))
    right = sum(child.correct for child in rows if child.parent == 0)
    assert f"{right} of 3 branches are correct" in parent and "before token 7 of 12" in parent
    assert explain.sentences(rows[3], 3, group, [])[0].startswith("Branch of response 0, which was cut before token 7")


CER = {"method": {"name": "cer", "accuracy_weight": 1.0, "entropy_weight": 1.0}}
DAPO = {
    "method": {
        "name": "dapo",
        "correct_reward": 1.0,
        "wrong_reward": -1.0,
        "overlong_buffer": 4,
        "overlong_factor": 1.0,
    },
    "rollout": {"max_response_tokens": 10},
}


@pytest.mark.parametrize(
    ("stage", "values", "parts"),
    [
        (CER, {"correct": True, "entropy": 0.5, "reward": (2 + math.exp(-0.5)) / 2}, [1.0, math.exp(-0.5) / 2]),
        (CER, {"correct": False, "entropy": 0.5, "reward": 0.0}, [0.0]),
        (DAPO, {"correct": True, "length": 8, "reward": 0.5}, [1.0, -0.5]),
        (DAPO, {"correct": True, "length": 8, "reward": 0.25}, [0.25]),  # another formula: only what is known
        ({}, {"correct": True, "reward": 1.0}, [1.0]),
        (CER, {"error": "timeout"}, []),
    ],
)
def test_parts_of_the_reward_add_up(stage, values, parts):
    assert [value for _, value in explain.reward_parts(DumpRow(**row(**values)), stage)] == pytest.approx(parts)


def test_answers_form_clusters():
    rows = [DumpRow(**row(extracted=text, correct=text == "4")) for text in ("4", "5", "4", None)]
    found = explain.clusters(rows)
    assert found["answers"][0] == {"text": "4", "count": 2, "correct": True}
    assert found["entropy"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


# ---- the server


def test_routes_answer_with_what_the_folder_holds(server):
    assert [run["stages"][0]["method"] for run in get(server, "/api/runs")[2]] == ["cure", "cure"]
    assert [r["step"] for r in get(server, "/api/metrics", run=0)[2]["rows"]] == [0, 1, 2, 3]
    dumps = get(server, "/api/dumps", run=1)[2]
    assert [(d["kind"], d["step"]) for d in dumps] == [("train", 1), ("train", 2), ("eval", 3), ("train", 3)]
    page = get(server, "/api/rows", run=0, **dumps[0], count=5)[2]
    assert [r["line"] for r in page["rows"]] == [0, 1, 2, 3, 4] and page["next"] == 5
    sample = get(server, "/api/sample", run=0, **dumps[0], line=2)[2]
    assert sample["parent"] == 0 and len(sample["prefix"]["texts"]) == sample["cut"] == 6
    assert len(sample["members"]) == 8 and sample["members"][2]["cut_token"]["position"] == 6
    assert abs(sum(value for _, value in sample["parts"]) - sample["reward"]) < 1e-6


def test_damaged_and_hostile_rows_pass_through_as_text(server):
    place = {"run": 0, "kind": "eval", "stage": "rl", "step": 3}
    page = get(server, "/api/rows", **place)[2]
    assert len(page["rows"]) == 8 and page["damaged"] == 4 and page["next"] is None
    sample = get(server, "/api/sample", **place, line=5)[2]
    assert sample["response"] == HOSTILE and sample["tokens"]["texts"] == [HOSTILE, "\x00", "\n"]


@pytest.mark.parametrize(
    ("path", "parameters", "status"),
    [
        ("/static/..%2fserver.py", {}, 404),
        ("/static/../server.py", {}, 404),
        ("/../../etc/passwd", {}, 404),
        ("/api/rows", {"run": 0, "kind": "train", "stage": "../rl", "step": 1}, 404),
        ("/api/rows", {"run": 0, "kind": "train", "stage": "/etc", "step": 1}, 404),
        ("/api/rows", {"run": 0, "kind": "train", "stage": "rl\0", "step": 1}, 404),
        ("/api/rows", {"run": 0, "kind": "secret", "stage": "rl", "step": 1}, 422),
        ("/api/rows", {"run": 0, "kind": "train", "stage": "rl", "step": -1}, 422),
        ("/api/rows", {"run": 0, "kind": "train", "stage": "outside", "step": 1}, 404),
        ("/api/sample", {"run": 0, "kind": "train", "stage": "rl", "step": 1, "line": 48}, 404),
        ("/api/metrics", {"run": 2}, 404),
        ("/openapi.json", {}, 404),
    ],
)
def test_nothing_outside_the_run_is_served(server, folder, tmp_path, path, parameters, status):
    write_lines(tmp_path / "step_000001.jsonl", [row(response="secret"), b""])
    with contextlib.suppress(FileExistsError):
        folder.rollouts("outside", 1).parent.symlink_to(tmp_path)
    try:
        answer = get(server, path, **parameters)
    finally:
        folder.rollouts("outside", 1).parent.unlink()
    assert answer[0] == status and "secret" not in str(answer[2]["rows"] if "rows" in answer[2] else "")


def test_only_get_only_this_machine_and_no_foreign_script(server):
    assert get(server, "/api/runs", method="POST")[0] == 405
    for host, status in (
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("localhost:9", 200),
        ("[::1]", 200),
    ):
        assert get(server, "/api/runs", host=host)[0] == status
    _, headers, _ = get(server, "/")
    assert (
        "default-src 'none'" in headers["Content-Security-Policy"]
        and "unsafe" not in headers["Content-Security-Policy"]
    )


@pytest.mark.parametrize("runs", [["nowhere"], ["."], [".", ".", "."]])
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, capsys, runs):
    monkeypatch.chdir(tmp_path)
    assert main(["view", *runs]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_port_in_use_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["view", str(folder.root), "--port", str(taken.getsockname()[1])]) == 2
    assert re.fullmatch(r"error: --port \d+: .* in use; .*\n", capsys.readouterr().err)


# ---- the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def count(browser, selector):
    return browser.js(f"document.querySelectorAll({json.dumps(selector)}).length")


def open_sample(browser, verdict):
    browser.wait("document.querySelector('.card')")
    browser.click(f".card.{verdict}")
    browser.wait("document.querySelector('.tokens')")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_clicks_from_curves_to_a_cut(browser, folder, server, width):
    browser.resize(width, 844, mobile=width < 700)
    browser.open(server)
    assert count(browser, ".plot") >= 2 and count(browser, ".stages tbody tr") == 2
    browser.click("a.tab", 1)
    browser.wait("document.querySelectorAll('section .card').length >= 2")
    browser.js("document.querySelector('select[name=verdict]').value = 'wrong';"
               "document.querySelector('form').requestSubmit()")  # fmt: skip
    browser.wait("location.hash.includes('verdict=wrong') && !document.querySelector('.card.right')")
    browser.click("section button[aria-label='earlier step']")
    browser.wait("document.querySelector('select.step').selectedOptions[0].textContent === 'step 2'")
    browser.wait("!document.querySelector('.card.right')")
    open_sample(browser, "wrong")
    browser.click(".tree a", 2)  # the first branch of response 0
    browser.wait("document.querySelector('.t.prefix') && document.querySelector('.t.cut')")
    browser.hover(".t.cut")
    browser.wait("document.querySelector('.tokenfacts').textContent.includes('sampled again here; response 0 has')")
    facts = browser.js("document.querySelector('.tokenfacts').textContent")
    assert "log-prob, engine" in facts and "TECA so far" in facts
    assert "Branch of response 0" in browser.js("document.querySelector('.why').textContent")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.body.textContent").count("The same question in run") == 1
    assert not browser.errors


def test_a_hostile_answer_is_shown_as_text(browser, server):
    browser.open(f"{server}/#sample?" + urlencode({"run": 0, "kind": "eval", "stage": "rl", "step": 3, "line": 5}))
    browser.wait("document.querySelector('.tokens')")
    assert browser.js("document.title") == "megatron-entropy" and count(browser, "main img, main script") == 0
    shown = browser.js("document.querySelector('.tokens').textContent")
    assert "<img src=x" in shown and "␇" in shown and "⟨202e⟩" in shown and "\u202e" not in shown
    assert not browser.errors


def test_curves_follow_a_run_that_trains(browser, tmp_path):
    folder = make_run(tmp_path / "live", steps=2, groups=1)
    with running(folder.root) as address:
        browser.open(address)
        with folder.metrics.open("a") as file:
            file.write('{"stage": "rl", "step": 3, "eval/accuracy": 0.5}\n{"stage": "r')
        browser.wait("document.querySelector('.stages').textContent.includes('3 of 400')")
    browser.wait("document.body.classList.contains('lost')")
    browser.errors.clear()  # the failed request


def test_an_export_needs_no_server(browser, folder, tmp_path, capsys):
    assert main(["view", str(folder.root), "--export", str(tmp_path / "out"), "--samples", "40"]) == 0
    assert re.fullmatch(r".*index\.html: \d+ responses, [\d.]+ MB\n", capsys.readouterr().out)
    page = tmp_path / "out" / "index.html"
    assert "</script><script>document" not in page.read_text()
    browser.open(page.as_uri())
    assert count(browser, ".plot") >= 2
    browser.click("a.tab", 1)
    open_sample(browser, "right")
    assert count(browser, ".t") > 0 and not browser.errors
