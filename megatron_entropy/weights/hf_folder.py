"""Hugging Face model folders: read single tensors, write shards with an index.

Reading maps a safetensors file only as long as the tensor read from it lives, so that a walk over a large model does
not keep its pages. Writing streams one tensor after another, and a folder appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that weights may have, by their names in safetensors files."""
MAX_SHARD_BYTES = 4 * 2**30

Meta = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, type and shape of a tensor."""


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    kind: str


class TensorFolder:
    """Tensors of a model folder by name."""

    def __init__(self, folder: str | Path) -> None:
        """Find out which file holds which tensor: the files that the index names, or all where there is none.

        Raises:
            ModelError: for a missing folder, no safetensors file in it, a file that is not one, or a tensor in two.
        """
        self.folder = Path(folder)
        self._stored: dict[str, _Stored] = {}
        for file in _weight_files(self.folder):
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in self._stored:
                        raise ModelError(f"{file}: tensor {name} is in {self._stored[name].file.name} too")
                    part = opened.get_slice(name)
                    self._stored[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype())

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._stored)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            ModelError: when it is missing or its type is none that weights may have.
        """
        stored = self._find(name)
        if stored.kind not in DTYPES:
            raise ModelError(f"{stored.file}: tensor {name} has type {stored.kind}, not one of {', '.join(DTYPES)}")
        return DTYPES[stored.kind]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """See that a tensor is there and can be used.

        Raises:
            ModelError: when it is missing, of another shape than `config.json` implies, or of a type weights cannot
                have.
        """
        if (found := self.shape(name)) != shape:
            raise ModelError(f"{self.file(name)}: tensor {name} has shape {found}, config.json implies {shape}")
        self.dtype(name)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor, mapped from its file.

        Args:
            shape: what `config.json` implies; None: any.
        Raises:
            ModelError: as `check` does.
        """
        self.check(name, self.shape(name) if shape is None else shape)
        with _open(self.file(name)) as opened:
            return opened.get_tensor(name)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise ModelError(f"{self.folder}: tensor {name} is missing; config.json asks for it")
        return self._stored[name]


def write_folder(
    folder: Path,
    metadata: Sequence[Meta],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder: safetensors shards, index, and the side files of the folder `like`.

    `config.json` is made to name the type of the tensors, where they have one.

    Args:
        metadata: of the tensors, in their order.
        tensors: consumed once, each written before the next is asked for.
    Raises:
        ModelError: when it cannot be written; nothing is left behind then.
    """
    shards = _split(metadata, max_shard_bytes)
    names = _shard_names(len(shards))
    with replacing(folder) as partial:
        stream = iter(tensors)
        for name, shard in zip(names, shards, strict=True):
            write_file(partial / name, shard, stream)
        assert next(stream, None) is None, "more tensors than metadata"
        if len(shards) > 1:
            weight_map = {meta[0]: name for name, shard in zip(names, shards, strict=True) for meta in shard}
            index = {"metadata": {"total_size": sum(map(_num_bytes, metadata))}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_side_files(like, partial)
        dtypes = {dtype for _, dtype, _ in metadata}
        if len(dtypes) == 1:
            set_dtype(partial / "config.json", *dtypes)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all: what is written to the path yielded takes its place at the end.

    Raises:
        ModelError: when it cannot be written (a full disk, no permission); nothing is left behind then.
    """
    folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: configuration and tokenizer."""
    for side in SIDE_FILES:
        if (source / side).exists():
            shutil.copyfile(source / side, target / side)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Make `config.json` name the data type the weights are written in, under whichever key it uses."""
    raw = json.loads(config.read_text())
    key = "dtype" if "dtype" in raw else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if raw.get(key) != name:
        config.write_text(json.dumps({**raw, key: name}, indent=2) + "\n")


def _split(metadata: Sequence[Meta], max_bytes: int) -> list[list[Meta]]:
    shards: list[list[Meta]] = [[]]
    size = 0
    for meta in metadata:
        if shards[-1] and size + _num_bytes(meta) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(meta)
        size += _num_bytes(meta)
    return shards


def write_file(file: Path, shard: Sequence[Meta], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants them all at once.

    Args:
        shard: the file's tensors, in their order; so many are taken from `tensors`.
    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    end = 0
    for meta in shard:
        name, dtype, shape = meta
        start, end = end, end + _num_bytes(meta)
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in shard:
            found, tensor = next(tensors)
            assert (found, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape), f"{found} is not {name}"
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _num_bytes(meta: Meta) -> int:
    return math.prod(meta[2]) * meta[1].itemsize


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder}: no *.safetensors file found; a model folder needs its weights in them")
        return files
    try:
        files = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from None
    for file in files:
        if not file.exists():
            raise ModelError(f"{file}: no such file, but {INDEX} names it")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: corrupt or not a safetensors file: {error}") from None
