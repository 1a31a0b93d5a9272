"""`megatron-entropy eval` with real engines: killed, gone on with, graded again.

Proves: after SIGKILL the same command draws the missing samples only, also with another number of engines; every sample
has the entropy of each token; no engine is left; grading again changes nothing. Rows and errors: see
tests/unit/test_eval_run.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
QUESTIONS, SAMPLES, TOKENS = 12, 4, 48
SUITE = """
[[benchmarks]]
name = "sums"
data = "{data}"
graders = ["final_marker", "math_verify"]
prompt = "{{question}}"
"""


@pytest.fixture
def inputs(tmp_path):
    command = [sys.executable, ROOT / "examples" / "make_arithmetic.py", "--out", tmp_path, "--train", "10", "--eval"]
    subprocess.run([*command, str(QUESTIONS)], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    (tmp_path / "suite.toml").write_text(SUITE.format(data=tmp_path / "eval.jsonl"))
    return tmp_path


def evaluate(inputs, *options):
    command = [sys.executable, "-m", "megatron_entropy", "eval", inputs / "model", "--suite", inputs / "suite.toml"]
    command += ["--preset", "sent", "--k", str(SAMPLES), "--max-tokens", str(TOKENS), "--out", inputs / "out", *options]
    return subprocess.Popen(map(str, command), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    said = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, said[-3000:]
    return said


def rows_of(inputs):
    path = inputs / "out" / "sums.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.timeout(900)
def test_a_killed_evaluation_goes_on(inputs):
    process = evaluate(inputs, "--max-num-seqs", "2")
    while len(rows_of(inputs)) < 6:
        assert process.poll() is None, process.communicate()[0].decode()[-3000:]
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    children = [child for child in children if "Agent" not in child.name()]  # Ray's agents end a minute later
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = rows_of(inputs)
    assert len(before) < QUESTIONS * SAMPLES
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

    said = finish(evaluate(inputs, "--engines", "2"))
    after = rows_of(inputs)
    assert after[: len(before)] == before
    keys = [(row["question"], row["sample"]) for row in after]
    assert len(set(keys)) == len(keys) == QUESTIONS * SAMPLES
    assert len({row["seed"] for row in after}) == len(after)
    for row in after:
        assert len(row["entropy"]) == row["length"] and 0 < max(row["entropy"])
        assert set(row["grades"]) == {"final_marker", "math_verify"}
    assert "report.html: written" in said

    files = ("sums.jsonl", "summary.json")
    content = [(inputs / "out" / name).read_bytes() for name in files]
    said = finish(evaluate(inputs, "--regrade"))
    assert "grades that differ: none" in said
    assert content == [(inputs / "out" / name).read_bytes() for name in files]
