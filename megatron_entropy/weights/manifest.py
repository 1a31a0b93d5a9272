"""Read and write `state.json` of a checkpoint: its content, and size and checksum of every file, its own included.

The checksum is CRC-32: it finds torn writes and flipped bits, not forgery. It costs one more pass over the bytes: when
written, in the background by the rank that wrote the file; when read, by one process with a thread per core (538 MB
took 0.08 s on two cores from a warm cache).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.errors import CheckpointError
from megatron_entropy.files import fsync_path, read_json
from megatron_entropy.weights.safe_index import read_index

NAME = "state.json"
_CHUNK = 4 * 2**20
_ONLY_KNOWN = ConfigDict(extra="forbid")

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Size = Annotated[int, Field(strict=True, ge=1, le=2**53)]


@dataclass(frozen=True, config=_ONLY_KNOWN)
class FileRecord:
    """Size and CRC-32 of a file."""

    bytes: Count
    crc32: Count

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read the file once; other threads can run meanwhile."""
        buffer = memoryview(bytearray(_CHUNK))
        size = checksum = 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                checksum = zlib.crc32(buffer[:count], checksum)
                size += count
        return cls(size, checksum)


@dataclass(frozen=True, config=_ONLY_KNOWN)
class StageProgress:
    """The progress of a stage.

    `step`: steps done. `updates`: optimizer steps taken, also the position of the learning-rate schedule. `position`:
    prompts drawn. `fingerprint`: of the stage's settings. `method`: `Method.state()`. `settings`: all of the stage's.
    """

    step: Count
    updates: Count
    position: Count
    fingerprint: str
    method: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class ModelFacts(BaseModel):
    """What is said of the model beside the tensors; `vocab_size` excludes padding."""

    model_config = _ONLY_KNOWN

    architecture: str
    num_layers: Size
    hidden_size: Size
    vocab_size: Size


class Content(BaseModel):
    """What a checkpoint holds, and the layout that saved it."""

    model_config = _ONLY_KNOWN

    progress: StageProgress
    layout: ParallelConfig
    model: ModelFacts


class State(BaseModel):
    """The whole file: `files` by path relative to the checkpoint, `crc32` of all else."""

    model_config = _ONLY_KNOWN

    content: Content
    files: dict[Annotated[str, Field(pattern=r"^shards/[^/]+$")], FileRecord]
    crc32: Count


def write(folder: Path, content: Content, files: Mapping[str, FileRecord]) -> None:
    """Write `folder/state.json` and force it, the small files beside it and the folder's entries to disk.

    Args:
        content: describes the checkpoint.
        files: records by path relative to the folder.
    """
    state = State(content=content, files=dict(sorted(files.items())), crc32=0).model_dump(mode="json")
    del state["crc32"]
    (folder / NAME).write_text(json.dumps({**state, "crc32": _checksum(state)}, indent=1))
    for path in [folder / NAME, *folder.rglob("*"), folder]:
        fsync_path(path)


def read(folder: Path) -> State:
    """Read `folder/state.json`.

    Raises:
        CheckpointError: it is missing, cannot be read, was changed, or holds impossible values.
    """
    if not (folder / NAME).exists():
        raise CheckpointError(f"{NAME} is missing")
    body = read_json(folder / NAME, CheckpointError)
    try:
        state = State.model_validate(body)
        body.pop("crc32")
        checksum = _checksum(body)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        if first["type"] != "missing":
            reason += f", found {first['input']!r:.60}"
        raise CheckpointError(f"{NAME} is not a checkpoint's (torn, or of another version): {reason}") from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{NAME} is not a checkpoint's: {error}") from None
    if checksum != state.crc32:
        raise CheckpointError(f"{NAME} was changed after it was written (wrong checksum)")
    return state


def verify(folder: Path, files: Mapping[str, FileRecord], *, checksums: bool = True) -> None:
    """Compare the files with their records: first all sizes, which is quick, then all checksums.

    Raises:
        CheckpointError: naming the first file that differs and how.
    """
    for name, record in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{name} is missing") from None
        if found != record.bytes:
            raise CheckpointError(f"{name} has {found} bytes instead of {record.bytes}")
    if not checksums:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, found in zip(files, pool.map(lambda name: _record(folder / name), files), strict=True):
            if isinstance(found, OSError):
                raise CheckpointError(f"{name} cannot be read: {found.strerror}")
            if found != files[name]:
                raise CheckpointError(f"{name} was changed after it was written (wrong checksum)")


@dataclass(frozen=True)
class TensorRecord:
    """Global shape and type (as torch spells it) of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def tensors(shards: Path) -> dict[str, TensorRecord]:
    """List the tensors of a checkpoint, of a run or converted, from its index; the layers are stacked into one tensor.

    Args:
        shards: the folder with Megatron's files.
    Raises:
        CheckpointError: for a missing, damaged or forged index.
    """
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, entry in read_index(shards).state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            size = entry.size.numel() * torch.empty(0, dtype=dtype).element_size()
            found[name] = TensorRecord(tuple(entry.size), str(dtype).removeprefix("torch."), size)
    return found


def _record(path: Path) -> FileRecord | OSError:
    try:
        return FileRecord.of(path)
    except OSError as error:
        return error


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
