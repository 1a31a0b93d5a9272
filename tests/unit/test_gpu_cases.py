"""The GPU cases on a CPU: bodies run on a tiny model, every case is collected with a reason, the table is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_cases
import gpu_report
import pytest
import torch
from local_ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def test_both_forms_of_the_kernel_are_asked_for():
    asked = []
    figures = gpu_cases.kernel_forms(
        torch.device("cpu"), tokens=4, hidden=8, vocab=20, setting=lambda name, value: asked.append(value)
    )
    assert asked == ["0", "1", "auto"] and figures["largest difference"] == 0, "a CPU has one form"
    assert min(figures[f"{name} ms"] for name in ("plain", "specialized", "timed")) > 0


def bodies(folder: str) -> tuple[dict, dict, dict]:
    cpu, small = torch.device("cpu"), {"count": 2, "length": 32}
    model = gpu_cases.write_model(Path(folder), gpu_cases.TINY, cpu)
    return (
        gpu_cases.actor_error(model, **small),
        gpu_cases.training_curve(model, dtype="float32", recipe="", steps=4, device=cpu, **small),
        gpu_cases.score_cost(model, dtype="float32", device=cpu, **small),
    )


def test_the_bodies_measure_what_they_say(tmp_path):
    error, curve, cost = run_on_ranks(bodies, 1, str(tmp_path))[0]
    assert 0 < error["logprob sd"] < 0.1 and error["entropy sd"] == error["entropy sd of plain bfloat16"]
    assert len(curve["losses"]) == 4 and curve["losses"][-1] < curve["losses"][0] < 6
    assert curve["tokens/s"] > 0 and curve["MFU"] is None and curve["peak GB"] is None, "no figure without a GPU"
    assert cost["largest difference of entropy"] < 1e-5


def test_flops_are_those_of_the_matrices_and_attention(tmp_path):
    from megatron_entropy.config.architecture import read_architecture

    (tmp_path / "config.json").write_text(json.dumps(gpu_cases.QWEN_05B))
    flops = gpu_cases.flops_per_token(read_architecture(tmp_path), 1024)
    attention = 12 * 24 * 896 * 512
    assert flops == pytest.approx(6 * 494e6 + attention, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="make test-gpu runs them")
def test_every_case_is_collected_and_skipped_with_its_reason(tmp_path):
    environment = {**os.environ, "GPU_RESULTS": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cases"]) >= 15 and results["machine"]["gpus"] == ["none"]
    assert {case["status"] for case in results["cases"]} == {"skipped"}
    assert {case["reason"] for case in results["cases"]} == {"needs a CUDA device, and this machine has none"}


def test_the_table_shows_figures_reasons_and_versions():
    machine = {"date": "today", "gpus": ["H"], "cuda": "13.0", "python": "3.12.3", "versions": {"torch": "2.11.0"}}
    outcomes = [
        gpu_report.Outcome("curve", "passed", 1.25, figures={"losses": [1.0, 0.5], "MFU": None, "tokens/s": 12345.6}),
        gpu_report.Outcome("kernels", "failed", 0.5, reason="a | b\nc"),
    ]
    table = gpu_report.to_markdown(machine, outcomes)
    assert "GPU: H. CUDA 13.0, Python 3.12.3, torch 2.11.0." in table
    assert "| curve | passed | 1.2 | losses: 1 0.5; MFU: not measured; tokens/s: 1.235e+04 |" in table
    assert "| kernels | failed | 0.5 | a \\| b c |" in table


def test_gpu_code_of_other_architectures_is_blanked():
    import struct

    import strip_fatbin

    def entry(architecture: int, payload: bytes) -> bytes:
        header = struct.pack("<HHIQ", 2, 1, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", architecture)
        return header.ljust(64, b"\0") + payload

    entries = entry(90, b"hopper!!") + entry(100, b"other!!!")
    before = b"elf" + struct.pack("<I", 0xBA55ED50) + b"no header" + bytes(16)
    code = bytearray(before + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries + b"tail")
    size = len(code)
    assert strip_fatbin.strip(code, {90}) == {90: 8, 100: 8}
    assert b"hopper!!" in code and b"other!!!" not in code and len(code) == size and code.endswith(b"tail")
