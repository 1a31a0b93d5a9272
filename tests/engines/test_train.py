"""Whole runs of the real program: Megatron ranks under torchrun, a vLLM engine under Ray, checkpoints, export.

Each run is a few steps of a tiny model. Proves: log-probabilities of engine and actor agree after a weight sync at a
temperature other than 1 (more layouts: tests/engines/test_resharding.py); a run repeats bit for bit, also when its
engine is killed and replaced, when it is stopped or its rank 0 is killed, and it is resumed (random kills:
tests/engines/test_kill.py); the second stage starts from the model of the first; the result loads in transformers.
Does not prove that anything is learned (`make demo` shows that).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_entropy.monitor.metric_names import unknown_metrics
from megatron_entropy.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

CONFIG = """
output = "{run}"
seed = 3
[model]
path = "{inputs}/model"
[data]
train = ["{inputs}/train.jsonl"]
eval = ["{inputs}/eval.jsonl"]
max_prompt_tokens = 16
[reward]
verifier = "final_marker"
[rollout]
temperature = 0.8
max_response_tokens = 24
[actor]
max_tokens_per_microbatch = 256
[eval]
limit = 8
[checkpoint]
every = 2
[[stages]]
name = "sft"
steps = 2
method.name = "sft"
batch.prompts = 8
actor.parallel.dp = 2
actor.optimizer.lr = 1e-3
[[stages]]
name = "rl"
steps = 4
method.name = "grpo"
batch.prompts = 4
batch.samples = 4
batch.updates = 2
actor.parallel.tp = 2
actor.optimizer.lr = 1e-3
eval.every = 2
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    script = ROOT / "examples" / "make_arithmetic.py"
    sizes = ["--seed", "3", "--train", "64", "--eval", "16"]
    subprocess.run([sys.executable, script, "--out", folder, *sizes], check=True, env=ENVIRONMENT)
    return folder


def start(inputs: Path, run: Path, *flags: str) -> subprocess.Popen:
    run.mkdir(exist_ok=True)
    config = run / "run.toml"
    config.write_text(CONFIG.format(run=run, inputs=inputs))
    command = [sys.executable, "-m", "megatron_entropy", "train", str(config), *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=480)
    assert process.returncode == code, output[-3000:]
    return output


def rows(run: Path) -> list[dict]:
    """The metrics without wall-clock times."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("timing/", "perf/"))} for row in parsed]


def wait_for(process: subprocess.Popen, run: Path, step: int) -> None:
    """Wait until the RL stage has logged a step."""
    deadline = time.monotonic() + 400
    row = f'"stage": "rl", "step": {step},'
    while not ((run / "metrics.jsonl").exists() and row in (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def engines_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found += [child] if "VllmEngine" in " ".join(child.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    assert "Traceback" not in finish(start(inputs, run))
    return run


def mismatch(run: Path) -> float:
    """The largest difference between the engine's and the actor's log-probability of a sampled token."""
    worst = 0.0
    dumps = sorted((run / "rollouts" / "rl").glob("*.jsonl"))
    assert len(dumps) == 4
    for sample in (json.loads(line) for dump in dumps for line in dump.read_text().splitlines()):
        assert len(sample["logprobs"]) == len(sample["rollout_logprobs"]) > 0
        worst = max(worst, np.abs(np.subtract(sample["logprobs"], sample["rollout_logprobs"])).max())
    return worst


def test_a_run_writes_its_results(finished):
    assert [(row["stage"], row["step"]) for row in rows(finished)] == [
        *(("sft", step) for step in range(3)),
        *(("rl", step) for step in range(5)),
    ]
    summary = json.loads((finished / "summary.json").read_text())["stages"]
    assert [(stage["name"], stage["method"], stage["steps"]) for stage in summary] == [
        ("sft", "sft", 2),
        ("rl", "grpo", 4),
    ]
    for name in (
        "config.toml",
        "report.html",
        "plots/accuracy_rl.png",
        "hf/model.safetensors",
        "checkpoints/rl/step_000004",
    ):
        assert (finished / name).exists(), name
    assert "of the groups earned equal rewards" in (finished / "report.html").read_text()
    assert list((finished / "tensorboard" / "rl").glob("events*"))
    by_stage = {(row["stage"], row["step"]): row for row in rows(finished)}
    end, start_of_next = by_stage["sft", 2]["eval/entropy"], by_stage["rl", 0]["eval/entropy"]
    assert end == pytest.approx(start_of_next, abs=1e-6), "the second stage starts with the model of the first"


def test_every_metric_of_a_run_is_in_the_glossary(finished):
    logged = read_metrics(finished / "metrics.jsonl")
    assert unknown_metrics(logged) == []
    for row in logged:
        if row["step"]:
            assert row["perf/throughput"] > 0 and 0.1 < row["perf/memory"] < 24
            assert (row["stage"] == "rl") == (row.get("perf/generate_throughput", 0.0) > 0)


def test_the_export_is_the_model_that_was_trained(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_entropy.data.tokenizer import load_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    text = "3+5*2\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == load_tokenizer(finished / "hf").encode(text)
    model = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    evaluation = (finished / "eval" / "rl" / "step_000004.jsonl").read_text().splitlines()
    sample = json.loads(evaluation[0])
    tokens = torch.tensor([sample["tokens"]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    prompt_length = sample["prompt_length"]
    np.testing.assert_allclose(logprobs[prompt_length - 1 :].numpy(), sample["logprobs"], atol=1e-4)


def test_engine_and_actor_agree_under_tensor_parallelism(finished):
    assert mismatch(finished) <= 1e-4


def test_a_disturbed_run_ends_bit_for_bit_the_same(inputs, tmp_path, finished):
    """Its engine is killed and replaced, it is stopped and resumed, its rank 0 is killed and it is resumed."""
    run = tmp_path / "run"
    colocate = "--rollout.colocate=true"  # must change nothing on a CPU
    process = start(inputs, run, colocate)
    wait_for(process, run, step=1)
    (engine,) = engines_of(process)
    engine.kill()
    wait_for(process, run, step=2)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=128 + signal.SIGTERM)
    assert "engine 0 is restarted" in output and "Traceback" not in output
    assert not (run / "hf").exists()
    assert "already" in finish(start(inputs, run), code=2)

    process = start(inputs, run, "--resume", colocate)
    while not engines_of(process):
        assert process.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    next(rank for rank in ranks if rank.environ().get("RANK") == "0").kill()
    output = finish(process, code=1)
    assert "Traceback" not in output and re.search(r"error: rank 0 .*SIGKILL", output), output[-3000:]
    finish(start(inputs, run, "--resume", colocate))
    assert rows(run) == rows(finished)
    exported = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (run, finished)]
    assert exported[0] == exported[1]


def test_an_unknown_key_is_one_line_and_code_2(inputs, tmp_path):
    output = finish(start(inputs, tmp_path / "run", "--actor.paralel.tp=2"), code=2)
    assert output.strip() == "error: actor.paralel: unknown key; did you mean actor.parallel?"


def test_a_fault_is_one_line_and_code_1(inputs, tmp_path):
    """With NaN in the weights the loss is not finite: nothing is updated, nothing is saved."""
    import shutil

    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(inputs / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    output = finish(start(inputs, run, f"--model.path={model}", "--data.eval=[]"), code=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and "stage sft, step 1" in last and "sample(s) 0, 1" in last
    assert "Traceback" not in output
    assert not (run / "checkpoints").exists()
