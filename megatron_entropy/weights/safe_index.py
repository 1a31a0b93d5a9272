"""Read the index of a Megatron checkpoint without running code that a forged file may contain.

torch stores the index (`.metadata`) as a pickle and small objects inside the data files as torch archives, and loads
both without restriction. Here the index is unpickled with a list of the types it consists of, and every such object is
loaded with `weights_only=True` first. After `check_checkpoint` Megatron's own loading reads known types only.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_entropy.errors import CheckpointError

INDEX = ".metadata"
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool".split()
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *(
        (_METADATA, name)
        for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "BytesIOWriteData", "WriteItem", "WriteItemType")),
    *(("torch", name) for name in _DTYPES),
}
"""Module and name of everything that an index refers to."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint index contains")
        return super().find_class(module, name)


def read_index(shards: Path) -> Any:
    """Read a checkpoint's index.

    Args:
        shards: the folder with Megatron's files.
    Returns:
        A `torch.distributed.checkpoint.metadata.Metadata`, whose files all lie in the folder.
    Raises:
        CheckpointError: for a missing, damaged or forged index.
    """
    file = shards / INDEX
    try:
        index = _Unpickler(io.BytesIO(file.read_bytes())).load()
        problem = _find_problem(index)
    except FileNotFoundError:
        raise CheckpointError(f"{shards}: not a Megatron checkpoint, {INDEX} is missing") from None
    except (MemoryError, RecursionError, Exception) as error:  # damaged bytes make the unpickler raise anything
        raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from None
    if problem:
        raise CheckpointError(f"{file}: {problem}")
    return index


def _find_problem(index: Any) -> str:
    """Say what keeps an unpickled object from being an index that can be read; an empty string for a good one."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        return "it is no index of tensors"
    if not isinstance(index.storage_data, dict) or not index.storage_data:
        return "names no data files"
    for key, stored in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not isinstance(stored, _StorageInfo):
            return f"{type(key).__name__}: {type(stored).__name__} is not the position of a tensor"
        name = stored.relative_path
        if not isinstance(name, str) or len(PurePosixPath(name).parts) != 1 or name == ".." or "\0" in name:
            return f"refers to {name!r}, which is not a file of the checkpoint's folder"
        if not _are_counts((stored.offset, stored.length)) or stored.transform_descriptors:
            return f"the position of {key.fqn} in {name} is damaged"
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str):
            return f"{name!r:.60} is not the name of a tensor"
        if isinstance(entry, BytesStorageMetadata):
            continue
        size, dtype = entry.size, entry.properties.dtype
        if not isinstance(size, torch.Size) or not isinstance(dtype, torch.dtype) or not _are_counts(size):
            return f"tensor {name} has no shape or no type"
        for chunk in entry.chunks:
            ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
            if not _are_counts((*chunk.offsets, *chunk.sizes)) or len(ends) != len(size):
                return f"a chunk of tensor {name} is damaged"
            if any(end > whole for end, whole in zip(ends, size, strict=True)):
                return f"a chunk of tensor {name} lies outside of it"
            if MetadataIndex(name, chunk.offsets) not in index.storage_data:
                return f"a chunk of tensor {name} is in no file"
    return ""


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**60 for value in values)


def check_checkpoint(shards: Path) -> None:
    """See that a checkpoint's files contain tensors and plain values only.

    Raises:
        CheckpointError: naming the file and the object that would run code, or cannot be read.
    """
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = read_index(shards)
    for key, stored in index.storage_data.items():
        if not isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            continue
        file = shards / stored.relative_path
        try:
            with file.open("rb") as opened:
                opened.seek(stored.offset)
                torch.load(io.BytesIO(opened.read(stored.length)), weights_only=True, map_location="cpu")
        except (MemoryError, RecursionError, Exception) as error:  # damaged bytes make the unpickler raise anything
            raise CheckpointError(f"{file}: {key.fqn} is not a plain value: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
