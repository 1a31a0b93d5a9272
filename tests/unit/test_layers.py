"""The shape of the code: imports run downward, never in a circle; files and classes stay small.

Proved by parsing, so that imports inside functions and under TYPE_CHECKING count too. A new module or package needs an
entry in `FLOORS` (the entry of a package covers its modules).
"""

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"megatron_entropy": ROOT / "megatron_entropy", "entropy_kernels": ROOT / "kernels" / "entropy_kernels"}

FLOORS = (
    ("entropy_kernels", "errors"),
    ("files", "imports", "packages", "plugins", "procedural", "records"),
    ("config",),
    ("distributed",),
    ("data", "monitor", "rewards", "weights"),
    ("actor", "methods", "rollout"),
    ("checkpoint",),
    ("benchmarks", "evaluation", "explorer", "precision_report", "semantic_entropy", "trainer"),
    ("launch",),
    ("__main__", "cli"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
NEIGHBOURS_ALLOWED = {
    ("weights", "monitor"),
    ("trainer", "evaluation"),
    ("semantic_entropy", "trainer"),
    ("precision_report", "trainer"),
    ("benchmarks", "trainer"),
    ("benchmarks", "evaluation"),
    ("__main__", "cli"),
    ("monitor", "data"),
}
"""Imports between two packages of one floor, in this direction only."""

ENGINES = {"megatron", "ray", "torch", "vllm"}
VLLM_ADAPTERS = {
    f"megatron_entropy.rollout.{name}"
    for name in ("vllm_core", "vllm_engine", "vllm_entropy", "vllm_entropy_v2", "vllm_receiver")
}
MAX_FILE_LINES = 450
MAX_METHODS = 19


@dataclass(frozen=True)
class Import:
    """`module` is imported at `line`; `typing_only`: under TYPE_CHECKING; `lazy`: inside a function."""

    module: str
    line: int
    typing_only: bool
    lazy: bool


@cache
def modules():
    """Dotted name -> file of every module of ours."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def product_files():
    """Every Python file of the product: package, tools and examples."""
    return sorted(
        path
        for folder in ("megatron_entropy", "kernels", "tools", "examples")
        for path in (ROOT / folder).rglob("*.py")
    )


@cache
def imports_of(path):
    """Imports of a file, relative ones resolved; `from package import module` counts as the module."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only, lazy = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if isinstance(node, ast.FunctionDef):
            lazy |= {id(inner) for inner in ast.walk(node)}
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
        found += [Import(name, node.lineno, id(node) in typing_only, id(node) in lazy) for name in names]
    return found


def part_of(module):
    """The entry of `FLOORS` that a module of ours belongs to; None for the bare package."""
    package, _, rest = module.partition(".")
    return package if package == "entropy_kernels" else rest.partition(".")[0] or None


def ours(path):
    """Imports of our own modules, each with its part."""
    own = [found for found in imports_of(path) if found.module.partition(".")[0] in SOURCES]
    return [(found, part) for found in own if (part := part_of(found.module))]


def where(path, found):
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"


def circles(graph):
    """Sets of more than one node that reach one another (Tarjan), and nodes that reach themselves directly."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"a"}}) == [["a"]] and circles({"a": {"b"}, "b": set()}) == []


def test_no_module_imports_itself_through_others():
    graph = {
        name: {found.module for found, _ in ours(path) if found.module in modules() and found.module != name}
        for name, path in modules().items()
    }
    assert circles(graph) == []


def test_every_module_has_a_floor():
    unknown = sorted({part_of(name) for name in modules()} - set(FLOOR_OF) - {None})
    assert not unknown, f"give these a floor in FLOORS: {unknown}"


@pytest.mark.parametrize("name", modules())
def test_imports_run_downward(name):
    part = part_of(name)

    def is_allowed(other):
        below = FLOOR_OF.get(other, 99) < FLOOR_OF.get(part, 0)
        return below or other == part or (part, other) in NEIGHBOURS_ALLOWED

    up = [where(modules()[name], found) for found, other in ours(modules()[name]) if not is_allowed(other)]
    assert not up


def test_methods_import_no_engine_and_no_torch_when_they_load():
    wrong = [
        where(path, found)
        for name, path in modules().items()
        if part_of(name) == "methods"
        for found in imports_of(path)
        if found.module.partition(".")[0] in ENGINES - {"torch"}
        or found.module.startswith("torch.distributed")
        or (found.module.partition(".")[0] in {"torch", "entropy_kernels"} and not (found.typing_only or found.lazy))
    ]
    assert not wrong


def test_kernels_need_torch_and_triton_only():
    allowed = {"entropy_kernels", "numpy", "torch", "triton"} | set(sys.stdlib_module_names)
    wrong = [
        where(path, found)
        for name, path in modules().items()
        if part_of(name) == "entropy_kernels"
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


def test_files_and_classes_stay_small():
    too_long = []
    for path in product_files():
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(item, ast.FunctionDef) for item in node.body)
                if methods > MAX_METHODS:
                    too_long.append(
                        f"{path.relative_to(ROOT)}: {node.name} has {methods} methods, at most {MAX_METHODS}"
                    )
    assert not too_long


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by name, so that `pytest` without a folder would refuse the second."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
