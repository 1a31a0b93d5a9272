"""Hugging Face model folders: read single tensors, write shards with an index.

Reading opens each safetensors file once and maps it; only the tensors asked for are materialised. Writing streams:
at most one shard file is held in memory, and a folder appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_entropy.errors import ModelError

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files beside the weights that an exported model takes over from the one it started from."""


class TensorFolder:
    """Tensors of a model folder by name."""

    def __init__(self, folder: str | Path) -> None:
        """Find out which file holds which tensor.

        Raises:
            ModelError: for a missing folder, no safetensors file in it, or a file that is not one.
        """
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{self.folder}: no *.safetensors file found; a model folder needs its weights in them")
        self._files = {}
        self._file_of = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: corrupt or not a safetensors file: {error}") from None
            self._files[file] = opened
            self._file_of.update({name: file for name in opened.keys()})  # noqa: SIM118 (not a mapping)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor.

        Raises:
            ModelError: when it is missing or of another shape than `config.json` implies.
        """
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: tensor {name} is missing; config.json asks for it")
        file = self._file_of[name]
        found = tuple(self._files[file].get_slice(name).get_shape())
        if found != shape:
            raise ModelError(f"{file}: tensor {name} has shape {found}, config.json implies {shape}")
        return self._files[file].get_tensor(name)


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, like: Path, max_shard_bytes: int = 4 * 2**30
) -> None:
    """Write a model folder: safetensors shards, index, and the side files of the folder `like`.

    Args:
        tensors: consumed once, one tensor alive at a time beyond the open shard.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[Path] = []
    file_of: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0
    dtype = torch.float32

    def flush() -> None:
        shards.append(partial / f"shard-{len(shards)}")
        save_file(held, shards[-1], metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        dtype = tensor.dtype
        if held and size + bytes_here > max_shard_bytes:
            flush()
            size = 0
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        file_of[name] = len(shards)
        size += bytes_here
        total += bytes_here
    flush()
    names = _shard_names(len(shards))
    for shard, name in zip(shards, names, strict=True):
        shard.rename(partial / name)
    if len(shards) > 1:
        weight_map = {name: names[index] for name, index in file_of.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for side in SIDE_FILES:
        if (like / side).exists():
            shutil.copy(like / side, partial / side)
    set_dtype(partial / "config.json", dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Make `config.json` name the data type the weights are written in, under both keys in use."""
    raw = json.loads(config.read_text())
    key = "dtype" if "dtype" in raw else "torch_dtype"
    raw[key] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(raw, indent=2) + "\n")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
