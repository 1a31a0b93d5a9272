"""Runs the tests again with the Triton kernels, and compiles the kernels without one.

The same files with the same bodies, in a process of their own: in Triton's interpreter, which
executes the kernels in numpy and shows what they compute, not how fast; and on a GPU where there
is one. The interpreter is chosen by an environment variable that Triton reads once, so it must not
reach the other tests. The compilation shows that the kernels are legal for a device, that the 16-bit
products become tensor-core instructions fed by TMA and that no register spills; nothing about speed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import compile_table  # noqa: E402 - needs no Triton, what it is compared with does

from entropy_kernels import checks, triton_engine  # noqa: E402
from entropy_kernels.tiles import HiddenTiles  # noqa: E402

HERE = Path(__file__).resolve().parent
COMMON = ("moments entropy", "moments entropy specialized", "gradient entropy")
ONE_RANK = ("test_exactness.py", "test_precision.py", "test_awkward.py", "test_options.py", "test_specialized.py")
SECOND_MODEL = ("test_guided.py", "test_distillation.py")
SOME = "dtype1-700 or impossible or fixed_temp or low_precision and dtype1 or another or 1203 and True-reverse-2"
"""What the interpreter runs of the second in a time that a test may take."""


def run_python(arguments: list[str], tmp_path: Path, **variables: str) -> str:
    """Standard output of a fresh Python process; fails with its errors."""
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parents[1] / 'kernels'}{os.pathsep}{HERE}",
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(files: tuple[str, ...], tmp_path: Path, interpret: bool, which: str = "") -> None:
    """Run test files, or the tests in them that `which` chooses, with impl="triton"."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, *(str(HERE / name) for name in files)]
    variables = {"ENTROPY_KERNELS_TEST_IMPL": "triton", "TRITON_INTERPRET": "1" if interpret else "0"}
    assert re.search(r"\d+ passed", run_python(arguments, tmp_path, **variables))


def test_same_tests_in_the_interpreter(tmp_path: Path) -> None:
    others = " or ".join(name.removesuffix(".py") for name in (*ONE_RANK, "test_vocab_parallel.py"))
    files = (*ONE_RANK, "test_vocab_parallel.py", *SECOND_MODEL)
    run_tests(files, tmp_path, interpret=True, which=f"{others} or {SOME}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_tests_on_a_gpu(tmp_path: Path) -> None:
    run_tests((*ONE_RANK, *SECOND_MODEL), tmp_path, interpret=False, which="not ranks and not layout and not autograd")


def test_common_kernels_compile_as_the_table_says(tmp_path: Path) -> None:
    tool = str(HERE.parents[1] / "kernels/compile_table.py")
    output = run_python([tool, "--targets", "sm_90a", "--only", *COMMON], tmp_path, TRITON_DEFAULT_FP_FUSION="1")
    assert output.count("sm_90a:") == len(COMMON)


def test_table_has_no_spills() -> None:
    table = json.loads(compile_table.TABLE.read_text())
    assert set(table) == {"3.6.0", "3.9.0"}
    for targets in table.values():
        assert set(targets) == set(compile_table.TARGETS)
        for target, rows in targets.items():
            assert set(rows) == {name for name in compile_table.variants() if compile_table.covered(name, target)}
            for name, facts in rows.items():
                assert compile_table.problems(name, target, facts, facts) == []
                assert facts["stack"] == facts["spills"] == 0, (name, target)


def test_page_shows_the_table() -> None:
    table, page = json.loads(compile_table.TABLE.read_text()), compile_table.PAGE.read_text()
    assert page == compile_table.page_with(page, table)


def test_growth_is_reported() -> None:
    known = {
        "registers": 168,
        "stack": 0,
        "spills": 0,
        "loop_spills": 0,
        "shared": 147480,
        "loop_products": 4,
        "tma_loads": 6,
    }
    found = known | {"stack": 8, "loop_products": 0}
    lines = compile_table.problems("moments entropy", "sm_90a", found, known)
    assert lines == [
        "moments entropy, sm_90a: stack grew from 0 to 8",
        "moments entropy, sm_90a: the loop has 0 tensor-core instructions, TMA loads 6",
    ]
    assert "--write" in compile_table.problems("moments entropy", "sm_90a", found, None)[0]


def test_instructions_are_counted_in_the_innermost_loop() -> None:
    listing = """
.L_x_1:
        /*0000*/                   LDL R1, [R2] ;
.L_x_2:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/              @!P0 STL [R1], R3 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_1) ;
"""
    operations, loops = compile_table._instructions(listing)
    assert operations == ["LDL", "HGMMA.64x256x16.F32.BF16", "STL", "BRA", "BRA"]
    assert loops == [operations[1:4], operations]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--targets", "sm_120a"], "add it to TARGETS"), (["--only", "moments top-k"], "choose from moments")],
)
def test_table_refuses_what_it_does_not_cover(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_table.py", *arguments])
    assert compile_table.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_generation_that_is_not_covered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    tiles = HiddenTiles(torch.zeros(1, 16).bfloat16(), torch.zeros(16, 16).bfloat16())
    with pytest.raises(ValueError, match=r"compute capability 12\.0 \(only for 9\.0, 10\.0\): pass impl="):
        triton_engine.choose_blocks(tiles, lambda major: triton_engine.WIDE, 64)
    for capability in (*checks.COVERED, (8, 0)):
        assert not checks.uncovered(capability)
