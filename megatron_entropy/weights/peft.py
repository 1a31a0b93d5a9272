"""Write LoRA adapters in PEFT's format from the actor's shards, and merge them into their base model.

Both ways one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ActorConfig, LoraConfig
from megatron_entropy.errors import ModelError
from megatron_entropy.weights import names
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.convert import ProgressBar, check_target, silent
from megatron_entropy.weights.hf_folder import (
    MAX_SHARD_BYTES,
    TensorFolder,
    atomic_model_folder,
    write_file,
    write_folder,
)
from megatron_entropy.weights.source import ShardedSource

ADAPTER_FILE = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_INERT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Options of an adapter that do not change what it adds to the base; of `init_lora_weights` see `_PLAIN_INITS`."""
_READ = {"lora_alpha", "peft_type", "r", "target_modules", "use_rslora"}
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model unchanged."""


@dataclass(frozen=True)
class _Adapter:
    """Names of an adapter's tensors `down` [r, in] and `up` [out, r]; `scale * up @ down` is added to a weight."""

    down: str
    up: str


def write_adapter(
    folder: Path,
    arch: ModelArchitecture,
    config: ActorConfig,
    local: Mapping[str, Tensor],
    *,
    base: str,
    dtype: torch.dtype,
) -> None:
    """Write the adapters as a folder that PEFT, vLLM and `merge` read; a collective.

    Args:
        local: `Actor.adapter_shards()` of this rank.
        base: path of the base model's folder.
        dtype: type of the tensors.
    Raises:
        ModelError: on rank 0, when the folder cannot be written; nothing of it is left then.
    """
    source = ShardedSource(arch, config.parallel, local, dtype, names.adapter_entries(arch, config.lora))
    if dist.get_rank() != 0:
        for _ in source:
            pass
        return
    with atomic_model_folder(folder) as partial:
        tensors = ((name, tensor) for name, tensor in source if tensor is not None)
        write_file(partial / ADAPTER_FILE, source.metadata(), tensors)
        (partial / _CONFIG).write_text(json.dumps(_config(arch, config.lora, base), indent=2) + "\n")


def _config(arch: ModelArchitecture, lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # vLLM needs an integer
        "target_modules": [module for linear in names.lora_linears(lora, arch) for module in names.LINEARS[linear]],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: ProgressBar = silent,
) -> int:
    """Merge an adapter into its base model; sums are computed in fp32 and cast to the types of the base.

    Returns:
        Number of tensors that the adapter changed.
    Raises:
        ModelError: naming file and tensor, for an adapter with unknown options or one that does not fit the base, or a
            target that exists or cannot be written.
    """
    check_target(target, base, adapter, overwrite=overwrite)
    for folder in (base, adapter):
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder")
    if not (base / "config.json").exists():
        raise ModelError(f"{base / 'config.json'}: no such file; a model folder needs it")
    rank, scale, targets = _read_config(adapter / _CONFIG)
    weights, updates = TensorFolder(base), TensorFolder(adapter)
    pairs = _pair(updates)
    _check(weights, updates, pairs, rank)
    _check_targets(adapter / _CONFIG, targets, pairs)
    metadata = [TensorMeta(name, weights.dtype(name), weights.shape(name)) for name in weights.names()]
    with progress("merging", sum(meta.num_bytes for meta in metadata)) as advance:

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name in weights.names():
                tensor = weights.read(name)
                if name in pairs:
                    up, down = (updates.read(factor).float() for factor in (pairs[name].up, pairs[name].down))
                    tensor = torch.addmm(tensor.float(), up, down, alpha=scale).to(tensor.dtype)
                advance(tensor.nbytes)
                yield name, tensor

        write_folder(target, metadata, stream(), like=base, max_shard_bytes=max_shard_bytes)
    return len(pairs)


def _read_config(file: Path) -> tuple[int, float, list[str]]:
    """Read rank, scale and target modules (empty where they are a pattern)."""
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; an adapter folder needs it and {ADAPTER_FILE}") from None
    except KeyError as error:
        raise ModelError(f"{file}: key {error.args[0]!r} is missing") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: not an adapter's configuration: {error}") from None
    if raw.get("peft_type", "LORA") != "LORA" or rank < 1:
        raise ModelError(
            f"{file}: peft_type={raw.get('peft_type')}, r={rank}: only LORA of rank 1 and more is supported"
        )
    for key, value in raw.items():
        if key not in _INERT | _READ and value not in (None, False, "none", {}, []):
            raise ModelError(f"{file}: {key}={value} is not supported")
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        raise ModelError(f"{file}: init_lora_weights={raw['init_lora_weights']} is not supported: it changes the base")
    targets = raw.get("target_modules")
    listed = targets if isinstance(targets, list) else []
    return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank), listed


def _pair(updates: TensorFolder) -> dict[str, _Adapter]:
    """Find the adapter of each base tensor, by the base tensor's name."""
    found: dict[str, dict[str, str]] = {}
    for name in updates.names():
        module, _, factor = name.removeprefix(names.PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(names.PEFT_PREFIX) or factor not in ("lora_A", "lora_B"):
            expected = f"{names.PEFT_PREFIX}<module>.lora_A/B.weight"
            raise ModelError(f"{updates.file(name)}: tensor {name} {updates.shape(name)} is no {expected}")
        found.setdefault(f"{module}.weight", {})[factor] = name
    for factors in found.values():
        if len(factors) == 1:
            (factor, name), other = *factors.items(), {"lora_A": "lora_B", "lora_B": "lora_A"}
            raise ModelError(f"{updates.file(name)}: tensor {name} has no {other[factor]} beside it")
    return {name: _Adapter(factors["lora_A"], factors["lora_B"]) for name, factors in found.items()}


def _check(weights: TensorFolder, updates: TensorFolder, pairs: dict[str, _Adapter], rank: int) -> None:
    for name in weights.names():
        weights.dtype(name)
    for name, pair in pairs.items():
        if name not in weights:
            raise ModelError(
                f"{updates.file(pair.down)}: tensor {pair.down} {updates.shape(pair.down)} changes {name}, "
                f"which is not in {weights.folder}"
            )
        size = weights.shape(name)
        for factor, fits in ((pair.down, (rank, *size[1:])), (pair.up, (*size[:1], rank))):
            updates.dtype(factor)
            if len(size) != 2 or updates.shape(factor) != fits:
                raise ModelError(
                    f"{updates.file(factor)}: tensor {factor} has shape {updates.shape(factor)}, "
                    f"r={rank} and {name} {size} of {weights.file(name)} imply {fits}"
                )


def _check_targets(file: Path, targets: list[str], pairs: dict[str, _Adapter]) -> None:
    for target in targets:
        if not any(f".{name}".endswith(f".{target}.weight") for name in pairs):
            raise ModelError(f"{file}: target module {target} matches no tensor of the adapter")
