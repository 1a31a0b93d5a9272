"""What setup.py declares is what the code imports, and an installed copy works outside the checkout.

Imports are found by parsing, so lazy ones count too. The versions that are allowed are not tested here.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTION_OF = {
    "megatron": "megatron-core",
    "tomli_w": "tomli-w",
    "math_verify": "math-verify",
    "prometheus_client": "prometheus-client",
    "transformer_engine": "transformer-engine",
    "grpc": "grpcio",
    "cuda": "cuda-bindings",
    "yaml": "PyYAML",
}
"""Distributions with another name than their module."""
NOT_IMPORTED = {"einops": "imported by megatron-core", "tensorboard": "imported by torch.utils.tensorboard"}
"""Declared packages that another package needs."""
OWN = {"megatron_entropy", "entropy_kernels", "compile_table"}


def imported(*folders):
    """Distributions that the code in these folders imports, without the standard library and our own modules."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    found -= set(sys.stdlib_module_names) | OWN | {path.stem for path in files}
    return {DISTRIBUTION_OF.get(name, name) for name in found}


def declared():
    """Names in `INSTALL_REQUIRES` and in each list of `EXTRAS_REQUIRE` of setup.py."""
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_REQUIRES"):
            values["install"] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS_REQUIRE":
            values |= ast.literal_eval(node.value)
    return {key: {re.match(r"[\w-]+", text)[0] for text in texts} for key, texts in values.items()}


def test_package_imports_what_is_declared():
    packages = declared()
    optional = packages["vllm"] | packages["gpu"] | packages["wandb"] | packages["eval"]
    found = imported("megatron_entropy", "kernels/entropy_kernels")
    assert found - optional == packages["install"] - set(NOT_IMPORTED)
    assert found >= {"vllm", "wandb"} | packages["eval"] and not found & set(NOT_IMPORTED)


def test_tools_examples_and_tests_import_what_is_declared():
    packages = declared()
    code = imported("tools", "examples") | imported("tests", "tools", "examples")
    assert code <= packages["install"] | packages["dev"] | packages["vllm"] | packages["gpu"]


def test_kernels_alone_need_torch_and_optionally_triton():
    project = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.11"]
    assert imported("kernels/entropy_kernels") == {"torch"} | set(project["optional-dependencies"])


def run(site, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def install(source, site):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("megatron_entropy", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.slow
def test_installed_commands_work_outside_the_checkout(source, tmp_path):
    site = tmp_path / "site"
    install(source, site)
    where = "import megatron_entropy, entropy_kernels; print(megatron_entropy.__file__, entropy_kernels.__file__)"
    assert run(site, "-c", where, cwd=tmp_path).count(str(site)) == 2
    run(site, ROOT / "examples" / "make_arithmetic.py", "--out", "inputs", "--train", 30, "--eval", 5, cwd=tmp_path)
    command = ("-m", "megatron_entropy")
    assert "written" in run(site, *command, "convert", "to-megatron", "inputs/model", "converted", cwd=tmp_path)
    assert "sizes match" in run(site, *command, "inspect", "converted", cwd=tmp_path)
    (tmp_path / "run").mkdir()
    rows = [{"stage": "rl", "step": step, "eval/accuracy": 0.5, "timing/step": 1.0} for step in range(3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(site, *command, "report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_kernels_can_be_installed_alone(source, tmp_path):
    site = tmp_path / "site"
    install(source / "kernels", site)
    assert {path.name for path in site.glob("[!_.]*") if not path.name.endswith(".dist-info")} == {"entropy_kernels"}
    code = "import entropy_kernels as ek, torch; print(ek.__file__, ek.token_stats(torch.ones(2, 4), torch.ones(8, 4), "
    code += "torch.zeros(2, dtype=torch.int64)).logprob.sum())"
    assert str(site) in run(site, "-c", code, cwd=tmp_path)
