"""Runs the tests again with the Triton kernels, and compiles the kernels for Hopper without one.

The same files with the same bodies, in a process of their own: in Triton's interpreter, which
executes the kernels in numpy and shows what they compute, not how fast; and on a GPU where there
is one. The interpreter is chosen by an environment variable that Triton reads once, so it must not
reach the other tests. The compilation shows that the kernels are legal for a device and that the
16-bit products become wgmma instructions fed by TMA; it says nothing about speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
ONE_RANK = ("test_exactness.py", "test_precision.py", "test_awkward.py", "test_options.py")


def run_python(arguments: list[str], tmp_path: Path, **variables: str) -> str:
    """Standard output of a fresh Python process; fails with its errors."""
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parents[1] / 'kernels'}{os.pathsep}{HERE}",
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(files: tuple[str, ...], tmp_path: Path, interpret: bool) -> None:
    """Run test files with impl="triton"."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in files)]
    variables = {"ENTROPY_KERNELS_TEST_IMPL": "triton", "TRITON_INTERPRET": "1" if interpret else "0"}
    assert re.search(r"\d+ passed", run_python(arguments, tmp_path, **variables))


def test_same_tests_in_the_interpreter(tmp_path: Path) -> None:
    run_tests((*ONE_RANK, "test_vocab_parallel.py"), tmp_path, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_tests_on_a_gpu(tmp_path: Path) -> None:
    run_tests(ONE_RANK, tmp_path, interpret=False)


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    output = run_python([str(HERE / "compile_for_hopper.py")], tmp_path, TRITON_INTERPRET="0")
    lines = [line.split() for line in output.splitlines() if line.startswith("kernel")]
    assert len(lines) == 3
    for _, name, wgmma, bulk_copies, shared in lines:
        assert int(wgmma) > 0 and int(bulk_copies) > 0, name
        assert int(shared) <= 227 * 1024, f"{name} needs more shared memory than a Hopper SM has"
