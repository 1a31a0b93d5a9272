"""The first hour on a GPU: what a CPU cannot prove. `make test-gpu` runs it and writes `build/gpu/results.md`.

Every case is collected everywhere; where something is missing it is skipped with the reason. README.md beside this file
says which of them have run. Needs no network; made for one H100 and 25 minutes.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_cases
import pytest
import torch

from megatron_entropy.config.fp8 import RECIPES, STORED
from megatron_entropy.launch.fp8 import recipe_problem
from megatron_entropy.packages import installed_versions

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
COUNT, LENGTH, STEPS = 16, 1024, 20
"""Sequences of a step, tokens of each, steps of a curve."""


def missing(thing: str) -> str:
    """Why a case cannot run here; empty if it can."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return "needs a CUDA device, and this machine has none"
    if thing == "two GPUs":
        return "" if gpus > 1 else "needs two GPUs: NCCL connects no two processes on one"
    if thing == "Hopper" and torch.cuda.get_device_capability()[0] != 9:
        return f"needs a GPU of the Hopper generation, this is {torch.cuda.get_device_name()}"
    if thing in RECIPES:
        devices = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(gpus)]
        engine = installed_versions(["transformer-engine"]).get("transformer-engine")
        return recipe_problem(thing, devices, torch.version.cuda, engine)
    if thing == "engines":
        absent = [name for name in ("vllm", "ray") if importlib.util.find_spec(name) is None]
        return f"needs {' and '.join(absent)}, not installed" if absent else ""
    if thing == "Transformer Engine" and importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine, which is not installed"
    return ""


def needs(*things: str):
    """Skip with the first reason."""
    reason = next((reason for thing in ("a GPU", *things) if (reason := missing(thing))), "")
    return pytest.mark.skipif(bool(reason), reason=reason or "everything is here")


def run(*command: str | Path, seconds: float = 400) -> str:
    """Run a command of the project and return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


@needs()
def test_kernels_are_exact(record_property):
    """The bodies of the CPU tests, on the GPU's Triton kernels."""
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_triton.py", "-k", "on_a_gpu")
    record_property("result", re.findall(r"\d+ passed", output)[-1])


@needs()
@pytest.mark.parametrize("vocab, hidden", [(151936, 896), (151936, 4096)])
def test_kernel_benchmark_with_peers(record_property, tmp_path, vocab, hidden):
    size = ["--tokens", "8192", "--hidden", str(hidden), "--vocab", str(vocab), "--repeats", "5"]
    run("kernels/benchmark.py", "--device", "cuda", *size, "--json", tmp_path / "out.json")
    measured = json.loads((tmp_path / "out.json").read_text())
    for row in measured["rows"]:
        name, values = row["case"]["implementation"], row["values"]
        record_property(f"{name} ms", 1000 * values["median_s"])
        record_property(f"{name} peak MiB", values["peak_mib"])
    record_property("not run", "; ".join(f"{name} ({reason})" for name, reason in measured["not_run"].items()))


@needs("Hopper")
@pytest.mark.parametrize("hidden", [896, 4096])
def test_forms_of_the_forward_kernel(record_property, monkeypatch, device, hidden):
    figures = gpu_cases.kernel_forms(device, tokens=8192, hidden=hidden, vocab=151936, setting=monkeypatch.setenv)
    for name, value in figures.items():
        record_property(name, value)
    assert figures["largest difference"] < 2e-5


@needs("Transformer Engine")
def test_actor_on_transformer_engine_agrees_with_the_plain_layers(record_property, half_billion):
    figures = gpu_cases.actor_error(half_billion, count=4, length=512)
    for name, value in figures.items():
        record_property(name, value)
    for name in ("logprob", "entropy"):
        assert figures[f"{name} sd"] < 2 * figures[f"{name} sd of plain bfloat16"], name
        assert abs(figures[f"{name} bias"]) < figures[f"{name} sd"], name


CURVES: dict[str, list[float]] = {}
"""Losses of the curves, for comparison with bfloat16's."""


@pytest.mark.parametrize("recipe, parameters", [pytest.param("", False, marks=needs(), id="bfloat16")] + [
    pytest.param(recipe, False, marks=needs("Transformer Engine", recipe), id=recipe) for recipe in RECIPES] + [
    pytest.param(recipe, True, marks=needs("Transformer Engine", recipe), id=f"{recipe}, FP8 weights")
    for recipe in STORED])  # fmt: skip
def test_training_curve(record_property, half_billion, device, recipe, parameters):
    found = gpu_cases.training_curve(
        half_billion, dtype="bfloat16", recipe=recipe, parameters=parameters, steps=STEPS, count=COUNT, length=LENGTH,
        device=device,
    )  # fmt: skip
    for name, value in found.items():
        record_property(name, value)
    losses = CURVES[recipe] = found["losses"]
    assert losses[-1] < losses[0]
    if recipe and "" in CURVES:
        distance = max(abs(a - b) / b for a, b in zip(losses, CURVES[""], strict=True))
        record_property("largest relative distance to bfloat16", distance)
        assert distance < 0.05


@needs()
def test_score_with_and_without_the_kernel(record_property, half_billion, device):
    figures = gpu_cases.score_cost(half_billion, dtype="bfloat16", count=8, length=1024, device=device)
    for name, value in figures.items():
        record_property(name, value)
    assert figures["largest difference of entropy"] < 0.05
    assert figures["kernel peak GB"] < figures["logits peak GB"]


RUN = """
output = "{folder}/run"
model.path = "{folder}/model"
data.train = ["{folder}/train.jsonl"]
data.eval = ["{folder}/eval.jsonl"]
data.max_prompt_tokens = 16
reward.verifier = "final_marker"
batch = {{ prompts = 4, samples = 4 }}
eval.limit = 8
actor.max_tokens_per_microbatch = 1024
actor.optimizer.lr = 1e-4
checkpoint.every = 2
[[stages]]
name = "rl"
steps = 3
method.name = "grpo"
[stages.rollout]
max_response_tokens = 24
gpu_memory_utilization = 0.3
verify_weights = true
{rollout}
"""


def train(folder: Path, rollout: str) -> list[dict]:
    """Train three steps of the arithmetic example with real engines; returns the rows of metrics."""
    run("examples/make_arithmetic.py", "--out", folder, "--train", "64", "--eval", "16")
    (folder / "run.toml").write_text(RUN.format(folder=folder, rollout=rollout))
    run("-m", "megatron_entropy", "train", folder / "run.toml")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def record_run(record_property, rows: list[dict]) -> None:
    last = rows[-1]
    for name in ("policy/rollout_kl", "timing/weight_sync", "timing/generate", "timing/update", "perf/memory"):
        record_property(name, last.get(name))
    assert last["policy/rollout_kl"] < 0.01, "engine and actor have the same weights"


@needs("engines")
def test_engines_and_actor_take_turns_on_one_gpu(record_property, tmp_path):
    """Sleep and wake of vLLM, offload of the actor, weights over shared memory with checksums."""
    record_run(record_property, train(tmp_path, "colocate = true"))


@needs("engines")
def test_weights_over_cuda_ipc(record_property, tmp_path):
    """As above, but the weights stay in GPU memory."""
    record_run(record_property, train(tmp_path, 'colocate = true\nweight_transfer = "cuda_ipc"'))


@needs("engines", "two GPUs")
def test_weights_over_nccl(record_property, tmp_path):
    record_run(record_property, train(tmp_path, 'weight_transfer = "nccl"'))


@needs("engines")
def test_entropies_of_the_v2_sampler_are_the_trainers(record_property, tmp_path):
    rows = train(tmp_path, "colocate = true\nentropy = true\nentropy_check_every = 1")
    for name in ("rollout/entropy_diff", "rollout/entropy_diff_max"):
        record_property(name, rows[-1][name])
    assert rows[-1]["rollout/entropy_diff"] < 0.02


@needs("Transformer Engine", "current")
def test_fp8_report_has_real_rows_beside_emulated_ones(record_property, tmp_path):
    run("examples/make_arithmetic.py", "--out", tmp_path, "--train", "64", "--eval", "16")
    gpu_cases.write_responses(tmp_path / "responses.jsonl", tmp_path / "model", count=16, length=64)
    report = ["fp8-report", tmp_path / "model", "--responses", tmp_path / "responses.jsonl", "--out", tmp_path / "page"]
    run("-m", "megatron_entropy", *report)
    rows = {row["name"]: row for row in json.loads((tmp_path / "page" / "report.json").read_text())["rows"]}
    real = [name.removesuffix(", real") for name in rows if name.endswith(", real")]
    assert "current" in real
    for recipe in real:
        ours, theirs = (rows[f"{recipe}, {kind}"]["logprob"]["sd"]["value"] for kind in ("emulated", "real"))
        record_property(f"{recipe}: sd of log-probs, emulated", ours)
        record_property(f"{recipe}: sd of log-probs, real", theirs)
        assert ours / 2 < theirs < 2 * ours, recipe
