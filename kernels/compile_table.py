"""Compiles every variant of the Triton kernels, without a GPU or a driver, and guards what the compiler made.

Registers, stack bytes, spill instructions (local loads and stores, in all and in the loop over the
hidden size), tensor-core and TMA instructions and shared memory are compared with the committed
compile_table.json; growth fails. That says nothing about speed.

    python kernels/compile_table.py                      all variants and targets, installed Triton
    python kernels/compile_table.py --write              renew that Triton's part of the table and its page
    python kernels/compile_table.py --targets sm_90a --only "moments entropy" "gradient entropy"
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "compile_table.json"
PAGE = HERE.parent / "docs/kernels.md"
MARKS = ("<!-- compile table -->", "<!-- end of compile table -->")
TARGETS = {"sm_90a": 90, "sm_100a": 100}
SHARED_LIMIT = 232448
"""Bytes of shared memory that a block can have on both targets."""
MATRIX = ("HGMMA", "UTCHMMA")
"""Tensor-core instructions of Hopper and Blackwell."""
GROWS = ("registers", "stack", "spills", "loop_spills", "shared")
TYPES = {
    "labels": "*i32", "beta": "*fp32", "teacher_beta": "*fp32", "maxima": "*fp32", "numbers": "*fp32",
    "kept": "*i64", "cap": "fp32", "saved": "*fp16", "logits": "*fp32", "maximum": "*fp32", "temperature": "*fp32",
    "tops": "*fp32", "entropy": "*fp32", "low": "fp32", "high": "fp32", "pivot": "fp32", "slope": "fp32",
    "amplitude": "fp32", "floor": "fp32",
}  # fmt: skip
ALIGNED = (
    "h_stride", "w_stride", "teacher_h_stride", "teacher_w_stride", "saved_stride", "out_stride",
    "H", "teacher_H", "valid", "start", "stop",
)  # fmt: skip
"""Integers that are usually multiples of 16, which the JIT compiler notices."""
Facts = dict[str, int]
Row = dict[str, Facts]


def variants() -> dict[str, dict[str, bool]]:
    """Every combination of options that a call can ask for, by name; constants of the kernel."""
    result: dict[str, dict[str, bool]] = {}
    for first, second, teacher, save, cap in itertools.product((False, True), repeat=5):
        if first or not (second or teacher):
            words = {"entropy": first, "varentropy": second, "teacher": teacher, "save": save, "softcap": cap}
            constants = {"FIRST": first, "SECOND": second, "TEACHER": teacher, "SAVE": save, "HAS_CAP": cap}
            result[_name("moments", words)] = constants
            if not (save or cap or (second and teacher)):
                result[_name("moments", words | {"specialized": True})] = constants | {"SPECIALIZED": True}
    for linear, square, teacher, saved, cap in itertools.product((False, True), repeat=5):
        if linear or not square:
            words = {"entropy": linear, "varentropy": square, "teacher": teacher, "saved": saved, "softcap": cap}
            constants = {"LINEAR": linear, "SQUARE": square, "TEACHER": teacher, "SAVED": saved, "KEPT": saved}
            result[_name("gradient", words)] = constants | {"HAS_CAP": cap}
    for kernel, reverse in itertools.product(("distillation", "distillation gradient"), (False, True)):
        result[f"{kernel} {'reverse' if reverse else 'forward'}"] = {"REVERSE": reverse}
    return result | {"guided summary": {}, "guided temper": {}, "guided search": {}}


def covered(name: str, target: str) -> bool:
    """Whether a variant exists for a target: the warp-specialised form is Hopper's only."""
    return "specialized" not in name.split() or target == "sm_90a"


def _name(kernel: str, words: dict[str, bool]) -> str:
    return " ".join([kernel, *(word for word, present in words.items() if present)])


def compile_variant(name: str, target: str) -> Facts:
    """What the compiler made of one variant.

    Args:
        name: A key of `variants`.
        target: A key of `TARGETS`.

    Returns:
        Counts and bytes by the names of the table.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = variants()[name]
    kernel, block = _kernel(name, constants, TARGETS[target] // 10)
    part = f"{block.rows},{block.columns // block.parts}"
    types = TYPES | {
        "h": f"tensordesc<bf16[{block.rows},{block.depth}]>",
        "w": f"tensordesc<bf16[{block.columns},{block.depth}]>",
        "out": f"tensordesc<bf16[{part}]>" if "gradient" in name.split() else "*fp32",
    }
    types |= {"teacher_h": types["h"], "teacher_w": types["w"]}
    if block.specialized:
        types |= {"h": "*bf16", "w": "*bf16"}
    if constants.get("SAVE"):
        types["saved"] = f"tensordesc<fp16[{part}]>"
    shape = {"BLOCK_M": block.rows, "BLOCK_N": block.columns, "BLOCK_K": block.depth, "PARTS": block.parts}
    fixed = {"SPECIALIZED": False} | constants | shape | {"TMA": True, "IEEE": False, "TEACHER_IEEE": False}
    fixed = {n: value for n, value in fixed.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or n in ALIGNED
    }
    result = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_warps": block.warps, "num_stages": block.stages},
    )
    facts = binary_facts(result.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    if block.specialized:
        facts["setmaxnreg"] = result.asm["ptx"].count("setmaxnreg")
    return {"columns": block.columns, "shared": result.metadata.shared} | facts


def _kernel(name: str, constants: dict[str, bool], capability: int) -> tuple[Any, Any]:
    """A variant's kernel and its tile (triton_engine.Blocks) on a generation of GPUs, by its major number."""
    from entropy_kernels import triton_divergence, triton_engine, triton_guided, triton_kernels

    if name.startswith("guided"):
        return getattr(triton_guided, f"{name.split()[1]}_kernel"), triton_guided.BLOCK
    gradient = "gradient" in name.split()
    if name.startswith("distillation"):
        kernels = triton_divergence.divergence_kernel, triton_divergence.divergence_gradient_kernel
        return kernels[gradient], triton_divergence.device_blocks(capability)
    use = ("saved" if constants["SAVED"] else "gradient") if gradient else "moments"
    kernels = triton_kernels.moments_kernel, triton_kernels.gradient_kernel
    if constants.get("SPECIALIZED"):
        return triton_kernels.moments_kernel, triton_engine.SPECIALIZED
    return kernels[gradient], triton_engine.device_blocks(use, constants["HAS_CAP"], capability)


def binary_facts(cubin: bytes, tools: Path) -> Facts:
    """Facts of a GPU binary by cuobjdump and nvdisasm from `tools`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        operations, loops = _instructions(_output(tools / "nvdisasm", "-c", file.name))
    products = [loop for loop in loops if any(o.startswith(MATRIX) for o in loop)]
    loop = min(products, key=len, default=[])
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "spills": _count(operations, "STL", "LDL"),
        "loop_spills": _count(loop, "STL", "LDL"),
        "loop_products": _count(loop, *MATRIX),
        "tma_loads": _count(operations, "UTMALDG"),
        "tma_stores": _count(operations, "UTMASTG"),
        "instructions": len(operations),
    }


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def _count(operations: list[str], *names: str) -> int:
    return sum(o.startswith(names) for o in operations)


def _instructions(listing: str) -> tuple[list[str], list[list[str]]]:
    """The operations of a listing, and those between each backward branch and its target."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\S+)(.*?);", line):
            if instruction[1].startswith("BRA") and (goal := re.search(r"\((\.L_x_\d+)\)", instruction[2])):
                branches.append((len(operations), goal[1]))
            operations.append(instruction[1])
    backward = [(labels[goal], at + 1) for at, goal in branches if labels[goal] <= at]
    return operations, [operations[start:stop] for start, stop in backward]


def problems(name: str, target: str, found: Facts, known: Facts | None) -> list[str]:
    """One line per thing that is worse than the table or than a device allows."""
    where = f"{name}, {target}"
    if known is None:
        return [f"{where}: not in the table for this Triton; run kernels/compile_table.py --write"]
    lines = [f"{where}: {k} grew from {known[k]} to {found[k]}" for k in GROWS if found[k] > known[k]]
    if not {"saved", "guided"} & set(name.split()) and not (found["loop_products"] and found["tma_loads"]):
        lines.append(
            f"{where}: the loop has {found['loop_products']} tensor-core instructions, TMA loads {found['tma_loads']}"
        )
    if not found.get("setmaxnreg", True):
        lines.append(f"{where}: the compiler did not specialise the warps (no setmaxnreg)")
    if found["shared"] > SHARED_LIMIT:
        lines.append(f"{where}: {found['shared']} bytes of shared memory, a block has {SHARED_LIMIT}")
    return lines


def markdown(table: dict[str, dict[str, Row]]) -> str:
    """The table as a page shows it: columns: registers / stack bytes / spill instructions."""
    versions = list(itertools.product(table, TARGETS))
    head = ["variant", *(f"{target}, Triton {version}" for version, target in versions)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in variants():
        cells = [table[version][target].get(name) for version, target in versions]
        shown = [f"{c['columns']}: {c['registers']} / {c['stack']} / {c['spills']}" if c else "-" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def page_with(text: str, table: dict[str, dict[str, Row]]) -> str:
    """A page's text with the table between its marks."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{markdown(table)}\n{MARKS[1]}{after}"


def main() -> int:
    """Compile, compare or write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="names of variants, as the table writes them")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for kind, given, known in (("target", options.targets, TARGETS), ("variant", options.only or [], variants())):
        if unknown := [x for x in given if x not in known]:
            hint = f"choose from {', '.join(known)}" + (
                ", or add it to TARGETS and run --write" if kind == "target" else ""
            )
            print(f"error: the compile table has no {kind} {unknown[0]!r}: {hint}", file=sys.stderr)
            return 2
    if options.write and (options.only or options.targets != list(TARGETS)):
        print("error: --write renews all variants and targets: leave out --only and --targets", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known, made, bad = table.get(triton.__version__, {}), {}, []
    for target, name in itertools.product(options.targets, options.only or variants()):
        if not covered(name, target):
            continue
        facts = compile_variant(name, target)
        made.setdefault(target, {})[name] = facts
        print(f"{name}, {target}: {facts}", flush=True)
        bad += problems(name, target, facts, facts if options.write else known.get(target, {}).get(name))
    if options.write and not bad:
        table = dict(sorted((table | {triton.__version__: made}).items()))
        TABLE.write_text(dumped(table))
        PAGE.write_text(page_with(PAGE.read_text(), table))
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    return 1 if bad else 0


def dumped(table: dict[str, dict[str, Row]]) -> str:
    """JSON with a line per variant."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{([^{}]*)\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
