"""Whole runs without engines (SFT): a run folder has one run at a time, and a resumed run continues what was trained.

Proves: a stage is extended past a damaged newest checkpoint to the numbers of an undisturbed run; other settings than
those it was trained with are refused, and `config.toml` keeps what was trained; a living run keeps its folder; no rank
outlives a launcher that is killed; no weight that is not finite is saved or exported. tests/unit/test_resume_plan.py
has more cases of settings.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

CONFIG = """
output = "{run}"
name = "sft"
steps = 2
model.path = "{inputs}/model"
data.train = ["{inputs}/train.jsonl"]
data.max_prompt_tokens = 16
method.name = "sft"
batch.prompts = 8
rollout.max_response_tokens = 24
checkpoint.every = 1
log.tensorboard = false
actor.max_tokens_per_microbatch = 256
actor.optimizer.lr = 1e-3
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    command = [sys.executable, ROOT / "examples" / "make_arithmetic.py", "--out", folder]
    subprocess.run([*command, "--seed", "3", "--train", "64", "--eval", "16"], check=True, env=ENVIRONMENT)
    return folder


def start(inputs: Path, run: Path, *flags: str) -> subprocess.Popen:
    run.mkdir(exist_ok=True)
    (run / "run.toml").write_text(CONFIG.format(run=run, inputs=inputs))
    command = [sys.executable, "-m", "megatron_entropy", "train", str(run / "run.toml"), *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(inputs: Path, run: Path, *flags: str, code: int = 0) -> str:
    output, _ = (process := start(inputs, run, *flags)).communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output, output[-3000:]
    return output


def refuse(inputs: Path, run: Path, *flags: str) -> str:
    """The one line of a refused run, which changes nothing."""
    before = (run / "config.toml").read_text(), (run / "metrics.jsonl").read_text()
    output = train(inputs, run, *flags, code=2)
    assert ((run / "config.toml").read_text(), (run / "metrics.jsonl").read_text()) == before
    return output.strip().splitlines()[-1]


def results(run: Path) -> tuple[bytes, list[dict]]:
    """The exported weights, and the metrics without wall-clock times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith(("timing/", "perf/"))} for row in rows]
    return (run / "hf" / "model.safetensors").read_bytes(), rows


def trained_steps(run: Path) -> int:
    return tomllib.loads((run / "config.toml").read_text())["stages"][0]["steps"]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not ((run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def three_steps(inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(inputs, run, "--steps=3")
    return run


def test_a_finished_stage_is_extended_or_left_alone(inputs, tmp_path, three_steps):
    run = tmp_path / "run"
    train(inputs, run)
    assert refuse(inputs, run, "--resume", "--actor.optimizer.lr=0.1") == (
        "error: actor.optimizer.lr: stage sft was trained with 0.001, the configuration has 0.1; set it back, or "
        "choose another output"
    )
    assert "every stage is finished" in train(inputs, run, "--resume", "--checkpoint.every=7")
    assert trained_steps(run) == 2

    # The newest checkpoint is damaged: its step is trained and saved again, and the next one.
    newest = run / "checkpoints" / "sft" / "step_000002"
    data = newest / "shards" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    assert "step_000002 is damaged and skipped" in train(inputs, run, "--resume", "--steps=3")
    assert results(run) == results(three_steps)
    assert trained_steps(run) == 3
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_000002", "step_000003"]
    assert json.loads((run / "summary.json").read_text())["stages"][0]["steps"] == 3


def test_a_living_run_keeps_its_folder_and_ends_with_its_launcher(inputs, tmp_path):
    run = tmp_path / "run"
    process = start(inputs, run, "--steps=2000", "--checkpoint.every=0")
    wait_for_step(process, run, 2)
    for flag in ("--overwrite", "--resume"):
        (line,) = train(inputs, run, flag, code=2).splitlines()
        assert re.match(rf"error: output={run} is in use by a running process \(on \S+, pid \d+, since 20", line)
    wait_for_step(process, run, 5 + (run / "metrics.jsonl").read_text().count("\n"))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert family and not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    process.communicate()


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(inputs, tmp_path):
    """NaN in the embedding of the padding token, which no loss and no gradient sees."""
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][0] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    last = train(inputs, run, f"--model.path={model}", "--steps=1", code=1).strip().splitlines()[-1]
    assert re.match(r"error: .*tensor embedding.word_embeddings.weight holds values that are not finite", last), last
    assert not (run / "hf").exists() and list((run / "checkpoints" / "sft").iterdir()) == []
