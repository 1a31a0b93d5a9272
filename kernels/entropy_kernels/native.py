"""bfloat16 products with a float32 result on a CPU, which torch does not offer there.

Torch rounds the result of a CPU bfloat16 product to bfloat16, which costs log-probs three digits;
widening the operands keeps the digits but runs at float32 speed, less than half. On a CPU with
AVX512-BF16 or AMX-BF16 and a C compiler this module builds bf16_product.c once (about a second,
cached under $XDG_CACHE_HOME/entropy_kernels) and calls it; elsewhere, or with
ENTROPY_KERNELS_NATIVE=0, the callers widen, with the same results to float32 rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("bf16_product.c")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-fopenmp", "-shared")
AMX_FLAGS = ("-mamx-tile", "-mamx-bf16")
LOG = logging.getLogger(__name__)


def cpu_flags() -> set[str]:
    """The features of this CPU by Linux's names; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


@functools.lru_cache(maxsize=1)
def kernel() -> Callable[..., int] | None:
    """The compiled function, built on first use; None where it cannot be had."""
    features = cpu_flags()
    if os.environ.get("ENTROPY_KERNELS_NATIVE", "1") == "0" or "avx512_bf16" not in features:
        return None
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        LOG.warning("no C compiler: bfloat16 logits on this CPU are computed at float32 speed")
        return None
    amx = AMX_FLAGS if {"amx_tile", "amx_bf16"} <= features and _accepts(compiler, AMX_FLAGS) else ()
    try:
        function = ctypes.CDLL(str(_build(compiler, (*FLAGS, *amx)))).bf16_product
    except (OSError, subprocess.SubprocessError) as error:
        LOG.warning("bf16_product.c was not built, logits run at float32 speed: %s", error)
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [
        pointer, size, pointer, size, number, pointer, size, size, size, size, number, number,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    command = [compiler, *flags, "-E", "-x", "c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def _build(compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library for this source, compiler and flags; written once, atomically."""
    text = SOURCE.read_bytes() + " ".join((compiler, *flags)).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entropy_kernels"
    library = cache / f"bf16_product-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / library.name
        command = [compiler, *flags, "-fPIC", "-o", str(fresh), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        fresh.replace(library)
    return library


def serves(*operands: Tensor) -> bool:
    """Whether `product` can take these operands."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in operands) and (kernel() is not None)


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """`left [m, k] @ right [k, n]` into float32 `out [m, n]`, or added to it.

    `right` may be a transposed view; no operand is widened or rounded.
    """
    function = kernel()
    assert function is not None and out.stride(1) == 1 and out.dtype == torch.float32
    if left.stride(1) != 1:
        left = left.contiguous()
    along = right.stride(0) == 1
    if not along and right.stride(1) != 1:
        right = right.contiguous()
    failed = function(
        left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(1 if along else 0), along,
        out.data_ptr(), out.stride(0), out.shape[0], out.shape[1], left.shape[1], add,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("bf16_product could not allocate its panel")
    return out
