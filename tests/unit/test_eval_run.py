"""`megatron-entropy eval`: rows, stops and resumes, damaged files, full disks, grading again, one line per mistake.

Proves, with engines that are made up here: a sample's seed and the set of samples do not depend on stops; no finished
sample is drawn twice; other settings are refused. Real engines: tests/engines/test_eval.py.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_cli import MODEL, write_model

from megatron_entropy.benchmarks import grading, report
from megatron_entropy.benchmarks import run as running
from megatron_entropy.benchmarks.folder import EvalFolder, fingerprint_model, read_record
from megatron_entropy.benchmarks.samples import append_rows, read_rows, repair_rows, write_rows
from megatron_entropy.cli import main as cli
from megatron_entropy.errors import Fault
from megatron_entropy.launch.lock import RunLock
from megatron_entropy.rollout.engine import Completion, Request

NUM_QUESTIONS = 6
SETTINGS = {**MODEL, "max_position_embeddings": 512}


class FakeService:
    """Answers that depend on the request's seed alone, two at a time; stops where it is told to."""

    def __init__(self) -> None:
        self.drawn: list[Request] = []
        self.stops_after = 1000

    def generate(
        self,
        requests: Sequence[Request],
        *,
        description: str,
        file: Path,
        on_finished: Callable[[Sequence[Completion]], None],
    ) -> list[Completion]:
        answers = [self._answer(request) for request in requests]
        for start in range(0, len(answers), 2):
            if len(self.drawn) >= self.stops_after:
                raise KeyboardInterrupt
            self.drawn += requests[start : start + 2]
            on_finished(answers[start : start + 2])
        return answers

    def _answer(self, request: Request) -> Completion:
        text = f"so {request.seed % 3}" if request.seed % 4 else "no"
        tokens = np.array([*self.tokenizer.encode(text), self.tokenizer.eos_ids[0]], np.int32)
        entropy = np.linspace(0, 1 / 3, len(tokens), dtype=np.float32)
        return Completion(request.key, tokens, -entropy, "stop", entropy)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService()

    @contextmanager
    def open_fake(config, arch, tokenizer) -> Iterator[FakeService]:
        fake.tokenizer = tokenizer
        yield fake

    monkeypatch.setattr(running, "open_service", open_fake)
    return fake


@pytest.fixture
def quick(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """Without the page, whose plots take most of the time."""
    monkeypatch.setattr(report, "write_report", lambda folder, summary: None)
    return service


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", SETTINGS)
    rows = [{"question": f"1 + {i} =", "answer": f"#### {i % 3}"} for i in range(NUM_QUESTIONS)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(inputs: Path, out: Path, *options: str) -> int:
    command = [str(inputs / "model"), "--suite", "gsm8k", "--preset", "cure", "--data", str(inputs), "--out", str(out)]
    graders = () if "--graders" in options else ("--graders", "gsm8k_flexible,boxed")
    sampling = () if "--max-tokens" in options else ("--max-tokens", "30")
    numbers = () if "--k" in options else ("--k", "4")
    return cli.main(["eval", *command, *graders, *sampling, *numbers, *options])


def rows_of(out: Path) -> dict:
    return {row.key: row for row in read_rows(out / "gsm8k.jsonl").rows}


def test_rows_record_and_pages(inputs, service, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(inputs, out) == 0
    rows = rows_of(out)
    assert set(rows) == {(str(question), sample) for question in range(NUM_QUESTIONS) for sample in range(4)}
    assert {row.seed for row in rows.values()} == {request.seed for request in service.drawn}
    assert len({row.seed for row in rows.values()}) == len(rows)
    for row in rows.values():
        assert row.grades["gsm8k_flexible"].correct == row.response.endswith(row.answer)
        assert row.length == len(row.entropy) > 2 and row.entropy[-1] == 0.3333
    record = read_record(EvalFolder(out))
    assert record.finished and record.settings["temperature"] == 0.6 and record.settings["max_tokens"] == 30
    assert record.benchmarks["gsm8k"].num_samples == 24
    assert str(tmp_path) not in (out / "eval.json").read_text()
    said = capsys.readouterr()
    assert "gsm8k" in said.out and "report.html: written" in said.out and "no chat template" in said.err
    assert (out / "report.html").stat().st_size > 1000 and json.loads((out / "summary.json").read_text())


def test_a_stopped_evaluation_goes_on(inputs, quick, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert evaluate(inputs, whole) == 0
    quick.drawn, quick.stops_after = [], 10
    assert evaluate(inputs, out) == 130
    path = out / "gsm8k.jsonl"
    assert len(read_rows(path).rows) == 10 and read_record(EvalFolder(out)).finished is None
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:40] + b"\0\0\n"
    path.write_bytes(b"".join(lines)[:-20])  # the last line was being written
    quick.drawn, quick.stops_after = [], 1000
    capsys.readouterr()
    assert evaluate(inputs, out) == 0
    assert len(quick.drawn) == 24 - 8
    assert "damaged lines: 1 (gsm8k.jsonl:4: Invalid JSON" in capsys.readouterr().err
    assert rows_of(out) == rows_of(whole)
    assert (out / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    quick.drawn = []
    assert evaluate(inputs, out) == 0 and quick.drawn == []


def test_an_evaluation_grows(inputs, quick, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert evaluate(inputs, whole) == 0
    assert evaluate(inputs, out, "--limit", "3", "--k", "2") == 0
    quick.drawn = []
    assert evaluate(inputs, out) == 0
    assert len(quick.drawn) == 24 - 6 and rows_of(out) == rows_of(whole)
    assert evaluate(inputs, out, "--k", "2") == 2
    assert "gsm8k: samples = 4, this one has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options,message",
    [
        (["--temperature", "0.5"], "temperature = 0.6, this one has 0.5"),
        (["--seed", "2"], "seed = 1, this one has 2"),
        (["--no-entropy"], "entropy = True, this one has False"),
        (["--max-tokens", "20"], "max_tokens = 30, this one has 20"),
        (["--preset", "sent"], "preset = cure, this one has sent"),
        (["--limit", "2"], "gsm8k: questions = 6, this one has 2"),
    ],
)
def test_other_settings_are_refused(inputs, quick, tmp_path, capsys, options, message):
    assert evaluate(inputs, tmp_path) == 0
    before = (tmp_path / "gsm8k.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluate(inputs, tmp_path, *options) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and message in said[0]
    assert (tmp_path / "gsm8k.jsonl").read_bytes() == before


def test_other_questions_and_weights_are_refused(inputs, quick, tmp_path, capsys):
    assert evaluate(inputs, tmp_path / "out") == 0
    (tmp_path / "gsm8k.jsonl").write_text((inputs / "gsm8k.jsonl").read_text().replace("1 + 2", "2 + 2"))
    assert evaluate(inputs, tmp_path / "out", "--data", str(tmp_path)) == 2
    assert "gsm8k: questions = " in capsys.readouterr().err
    write_model(tmp_path / "model", SETTINGS)
    weights = tmp_path / "model" / "model.safetensors"
    before = fingerprint_model(tmp_path / "model")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint_model(tmp_path / "model") != before == fingerprint_model(inputs / "model")
    assert evaluate(inputs, tmp_path / "out", "--overwrite", "--seed", "3") == 0
    assert read_record(EvalFolder(tmp_path / "out")).settings["seed"] == 3


def test_grading_again(inputs, quick, tmp_path, capsys, monkeypatch):
    assert evaluate(inputs, tmp_path) == 0
    monkeypatch.setattr(running, "open_service", None)
    path = tmp_path / "gsm8k.jsonl"
    before, summary = path.read_bytes(), (tmp_path / "summary.json").read_bytes()
    assert cli.main(["eval", str(tmp_path), "--regrade"]) == 0
    assert "24 samples graded again, grades that differ: none" in capsys.readouterr().out
    assert path.read_bytes() == before and (tmp_path / "summary.json").read_bytes() == summary
    path.write_bytes(before.replace(b'"correct": false', b'"correct": true', 2))
    assert cli.main(["eval", "--out", str(tmp_path), "--regrade"]) == 0
    assert "grades that differ: 1 by gsm8k_flexible, 1 by boxed" in capsys.readouterr().out
    assert path.read_bytes() == before and (tmp_path / "summary.json").read_bytes() == summary
    assert cli.main(["eval", str(tmp_path), "--regrade", "--graders", "choice"]) == 0
    assert {name for row in rows_of(tmp_path).values() for name in row.grades} == {"choice"}
    assert read_record(EvalFolder(tmp_path)).benchmarks["gsm8k"].graders == ("choice",)


def test_answers_are_kept_when_grading_fails(inputs, quick, tmp_path, capsys, monkeypatch):
    """The server of the graders dies: the answers are on disk without grades, and the next call grades them."""

    def fail(self, wanted):
        raise Fault("no response was graded")

    with monkeypatch.context() as patch:
        patch.setattr(grading.Graders, "grade", fail)
        assert evaluate(inputs, tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no response was graded"
    drawn = len(quick.drawn)
    assert len(rows_of(tmp_path)) == drawn > 0 and not any(row.grades for row in rows_of(tmp_path).values())
    assert evaluate(inputs, tmp_path) == 0
    assert len(quick.drawn) == 24 and all(len(row.grades) == 2 for row in rows_of(tmp_path).values())


def test_a_full_disk_costs_no_row(inputs, quick, tmp_path, capsys):
    """The limit of a file's size stands for the disk: the write takes a part of a line and then fails."""
    assert evaluate(inputs, tmp_path) == 0
    path = tmp_path / "gsm8k.jsonl"
    rows = read_rows(path).rows
    write_rows(path, rows[:5])
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with pytest.raises(Fault, match=r"gsm8k.jsonl: cannot be written: .* repeat the command"):
            append_rows(path, rows[5:6])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size and read_rows(path).rows == rows[:5]
    append_rows(path, rows[5:])
    assert read_rows(path).rows == rows


def test_damaged_rows_are_found(inputs, quick, tmp_path):
    assert evaluate(inputs, tmp_path, "--k", "1") == 0
    path = tmp_path / "gsm8k.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    cut = good[1][:50]
    wrong_type = good[2].replace(b'"length": ', b'"length": "7", "n": ')
    path.write_bytes(b"".join([good[0], b"\n", wrong_type, b"\xff\xfe\n", good[0], good[3], cut]))
    stored = repair_rows(path)
    assert [row.question for row in stored.rows] == [json.loads(good[0])["question"], json.loads(good[3])["question"]]
    assert [line.split(": ")[0] for line in stored.damaged] == [f"gsm8k.jsonl:{n}" for n in (2, 3, 4, 5)]
    assert path.read_bytes() == good[0] + good[3]


def test_prompts_that_are_too_long_are_counted(inputs, quick, tmp_path, capsys):
    rows = [{"question": f"1 + {i} =" + " 1" * 40 * (i == 1), "answer": "#### 1"} for i in range(3)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(tmp_path), "--preset", "curiosft"]
    assert evaluate(inputs, tmp_path / "out", *options) == 0
    length = next(len(request.tokens) for request in quick.drawn if len(request.tokens) > 80)
    assert evaluate(inputs, tmp_path / "out2", *options, "--max-tokens", "506") == 2
    assert (
        f"the longest prompt ({length} tokens) and an answer of 506 tokens do not fit into the model's 512 positions; "
        f"lower --max-tokens to at most {512 - length}, or skip questions with a longer prompt: --max-prompt-tokens 6"
    ) in capsys.readouterr().err
    assert evaluate(inputs, tmp_path / "out3", *options, "--max-prompt-tokens", "80") == 0
    assert "gsm8k: 1 questions skipped: prompt over 80 tokens" in capsys.readouterr().err
    assert read_record(EvalFolder(tmp_path / "out3")).benchmarks["gsm8k"].skipped == {"prompt over 80 tokens": ["1"]}
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{model}", "--preset", "cure"], "--suite is missing"),
        (["{model}", "--suite", "gsm8k"], "--preset is missing"),
        (["org/name", "--suite", "gsm8k", "--preset", "cure"], "hf download org/name --local-dir name"),
        (["{run}", "--suite", "gsm8k", "--preset", "cure"], "the run has no exported model (hf/) yet"),
        (["{model}", "--suite", "gsm8", "--preset", "cure"], "--suite gsm8: no such suite"),
        (["{model}", "--suite", "gsm8k", "--preset", "cur"], "--preset cur: no such preset"),
        (["{model}", "--suite", "aime24", "--preset", "cure", "--graders", "boxt"], "unknown name 'boxt'"),
        (["{model}", "--suite", "gsm8k", "--preset", "cure", "--max-tokens", "900"], "model's 512 positions; lower"),
        (["{model}", "--suite", "gsm8k", "--preset", "cure", "--tensor-parallel", "3"], "4 attention heads"),
        (["{model}", "--suite", "gsm8k", "--preset", "cure", "--reward-url", "ftp://x"], "--reward-url: "),
        (["{run}", "--regrade"], "no eval.json here"),
        (["--regrade"], "--regrade needs the folder of an evaluation"),
        (["--compare", "{run}", "{run}"], "no eval.json here"),
    ],
)
def test_mistakes_are_one_line(inputs, quick, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    (inputs / "aime24.jsonl").write_text('{"problem": "1 + 1 =", "answer": "025"}\n')
    places = {"model": inputs / "model", "run": run}
    data = [] if "--regrade" in arguments or "--compare" in arguments else ["--data", str(inputs)]
    assert cli.main(["eval", *[text.format(**places) for text in arguments], *data]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert quick.drawn == [] and not (tmp_path / "evals").exists()


def test_two_evaluations_cannot_share_a_folder(inputs, quick, tmp_path):
    assert evaluate(inputs, tmp_path, "--k", "1") == 0
    lock = RunLock(tmp_path)
    try:
        command = [sys.executable, "-m", "megatron_entropy", "eval", str(tmp_path), "--regrade"]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        lock.close()
    assert done.returncode == 2 and "is in use by a running process" in done.stderr
