"""Imports run downward only: every module has a floor, and no module imports one above its own.

Proved by parsing, so that imports inside functions and under TYPE_CHECKING count too. A new module needs an entry in
`FLOORS` (a package's entry covers its modules).
"""

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"megatron_entropy": ROOT / "megatron_entropy", "entropy_kernels": ROOT / "kernels" / "entropy_kernels"}

FLOORS = {
    0: ("entropy_kernels",),
    1: ("architecture", "config", "cpu", "errors", "manifest", "parallel", "records", "run_folder"),
    2: ("data", "links", "log", "packing", "rewards", "transport"),
    3: ("actor", "methods", "resharding", "rollout"),
    4: ("checkpoint", "evaluation", "plots", "report", "sampler", "trainer"),
    5: ("__main__", "cli", "doctor", "launch", "train"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
ENGINES = {"megatron", "ray", "torch", "vllm"}
VLLM_ADAPTERS = {"megatron_entropy.rollout.vllm_engine", "megatron_entropy.rollout.vllm_receiver"}


@dataclass(frozen=True)
class Import:
    """`module` is imported at `line`; `typing_only`: under TYPE_CHECKING."""

    module: str
    line: int
    typing_only: bool


def modules():
    """Dotted name -> file of every module of ours."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


@cache
def imports_of(path):
    """Imports of a file, relative ones resolved; `from package import module` counts as the module."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = next(name for name, file in modules().items() if file == path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        found += [Import(name, node.lineno, id(node) in typing_only) for name in names]
    return found


def fraction_to_count(module):
    """The entry of `FLOORS` a module of ours belongs to; None for the bare package."""
    package, _, rest = module.partition(".")
    return package if package == "entropy_kernels" else rest.partition(".")[0] or None


def ours(path):
    """Imports of our own modules, each with its part."""
    own = [found for found in imports_of(path) if found.module.partition(".")[0] in SOURCES]
    return [(found, part) for found in own if (part := fraction_to_count(found.module))]


def where(path, found):
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"


def test_every_module_has_a_floor():
    unknown = sorted({fraction_to_count(name) for name in modules()} - set(FLOOR_OF) - {None})
    assert not unknown, f"give these a floor in FLOORS: {unknown}"


@pytest.mark.parametrize("name", modules())
def test_imports_run_downward(name):
    part = fraction_to_count(name)
    floor = FLOOR_OF.get(part, 0)
    up = [where(modules()[name], found) for found, other in ours(modules()[name]) if FLOOR_OF.get(other, 99) > floor]
    assert not up, f"floor {floor}: {up}"


@pytest.mark.parametrize("part", FLOORS[3])
def test_packages_of_floor_3_do_not_import_one_another(part):
    siblings = set(FLOORS[3]) - {part}
    across = [
        where(path, found)
        for name, path in modules().items()
        if fraction_to_count(name) == part
        for found, other in ours(path)
        if other in siblings
    ]
    assert not across


def test_methods_import_no_engine_and_no_torch_at_run_time():
    wrong = [
        where(path, found)
        for name, path in modules().items()
        if fraction_to_count(name) == "methods"
        for found in imports_of(path)
        if found.module.partition(".")[0] in ENGINES - {"torch"}
        or found.module.startswith("torch.distributed")
        or (found.module.partition(".")[0] in {"torch", "entropy_kernels"} and not found.typing_only)
    ]
    assert not wrong


def test_kernels_need_torch_and_triton_only():
    allowed = {"entropy_kernels", "numpy", "torch", "triton"} | set(sys.stdlib_module_names)
    wrong = [
        where(path, found)
        for name, path in modules().items()
        if fraction_to_count(name) == "entropy_kernels"
        for found in imports_of(path)
        if found.module.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_vllm_is_imported_by_its_adapters_only():
    wrong = [
        where(path, found)
        for name, path in modules().items()
        if name not in VLLM_ADAPTERS
        for found in imports_of(path)
        if found.module.partition(".")[0] == "vllm"
    ]
    assert not wrong


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_setup_lists_every_package():
    text = (ROOT / "setup.py").read_text()
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    missing = sorted(name for name in packages if f'"{name}"' not in text)
    assert not missing, f"add to packages= in setup.py: {missing}"
