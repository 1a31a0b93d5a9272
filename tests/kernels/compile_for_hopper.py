"""Compiles the Triton kernels for compute capability 9.0; needs no device.

Prints one line per kernel: `kernel NAME WGMMA BULK_COPIES SHARED_BYTES`.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entropy_kernels import triton_kernels

ROWS, COLUMNS, DEPTH = 128, 256, 64
POINTERS = {
    "labels": "*i64", "beta": "*fp32", "teacher_beta": "*fp32", "saved": "*fp16",
    "maxima": "*fp32", "numbers": "*fp32", "kept": "*i64", "cap": "fp32",
}  # fmt: skip
PRODUCT = {"TMA": True, "IEEE": False, "BLOCK_M": ROWS, "BLOCK_N": COLUMNS, "BLOCK_K": DEPTH}
MOMENTS = {"FIRST": True, "SECOND": False, "SAVE": False, "HAS_CAP": False}
GRADIENT = {
    "LINEAR": True, "SQUARE": False, "TEACHER": False, "SAVED": False, "KEPT": False,
    "HAS_CAP": False,
}  # fmt: skip


def compiled(kernel: object, out: str, constants: dict[str, object]) -> str:
    """PTX facts of one specialisation."""
    types = POINTERS | {
        "h": f"tensordesc<bf16[{ROWS},{DEPTH}]>",
        "w": f"tensordesc<bf16[{COLUMNS},{DEPTH}]>",
        "out": out,
    }
    constants = constants | PRODUCT
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    result = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "num_stages": 3},
    )
    ptx = result.asm["ptx"]
    return f"{ptx.count('wgmma')} {ptx.count('cp.async.bulk')} {result.metadata.shared}"


if __name__ == "__main__":
    moments, gradient = triton_kernels.moments_kernel, triton_kernels.gradient_kernel
    print("kernel moments", compiled(moments, "*fp32", MOMENTS | {"TEACHER": False}))
    print("kernel moments+teacher", compiled(moments, "*fp32", MOMENTS | {"TEACHER": True}))
    print("kernel gradient", compiled(gradient, "*bf16", GRADIENT))
