"""Runs triton_cases in a process of its own, and compiles the kernels for Hopper without one.

The interpreter is chosen by an environment variable that Triton reads once, so it must not reach
the other tests. The compilation shows that the kernels are legal for a device and that the 16-bit
products become wgmma instructions fed by TMA; it says nothing about speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent


def run_python(arguments: list[str], tmp_path: Path, interpret: bool) -> str:
    """Standard output of a fresh interpreter; fails with its errors."""
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parents[1] / 'kernels'}{os.pathsep}{HERE}",
        "TRITON_INTERPRET": "1" if interpret else "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_equal_reference(tmp_path: Path) -> None:
    run_python(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")],
        tmp_path,
        interpret=not torch.cuda.is_available(),
    )


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    output = run_python([str(HERE / "compile_for_hopper.py")], tmp_path, interpret=False)
    lines = [line.split() for line in output.splitlines() if line.startswith("kernel")]
    assert len(lines) == 3
    for _, name, wgmma, bulk_copies, shared in lines:
        assert int(wgmma) > 0 and int(bulk_copies) > 0, name
        assert int(shared) <= 227 * 1024, f"{name} needs more shared memory than a Hopper SM has"
