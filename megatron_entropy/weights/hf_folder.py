"""Read single tensors of Hugging Face model folders, and write folders with shards and an index.

Reading maps a safetensors file only as long as the tensor lives, so a walk over a large model does not keep its pages
in memory. Writing streams one tensor after another, and a folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropy.errors import ModelError
from megatron_entropy.files import atomic_folder
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.headers import INDEX, TensorHeaders, open_weights

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
"""Files beside the weights, which a written folder copies from its base model."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that weights may have, by name in safetensors files."""
MAX_SHARD_BYTES = 4 * 2**30


class TensorFolder(TensorHeaders):
    """Tensors of a model folder by name."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            ModelError: when it is missing or has a type that weights may not have.
        """
        self.check(name, self.shape(name))
        return DTYPES[self.find(name).kind]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one tensor, mapped from its file.

        Args:
            shape: the one that `config.json` implies; None: any.
        Raises:
            ModelError: as `check`.
        """
        self.check(name, self.shape(name) if shape is None else shape)
        with open_weights(self.file(name), "pt") as opened:
            return opened.get_tensor(name)


def write_folder(
    folder: Path,
    metadata: Sequence[TensorMeta],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder: safetensors shards, index, and the side files of the folder `like`.

    `dtype` in `config.json` is set to the type of the tensors, if they all have the same.

    Args:
        metadata: of the tensors, in their order.
        tensors: iterated over once; each is written before the next one is taken.
    Raises:
        ModelError: when the folder cannot be written; nothing of it is left then.
    """
    shards = _split(metadata, max_shard_bytes)
    names = _shard_names(len(shards))
    with atomic_model_folder(folder) as partial:
        stream = iter(tensors)
        for name, shard in zip(names, shards, strict=True):
            write_file(partial / name, shard, stream)
        assert next(stream, None) is None, "more tensors than metadata"
        if len(shards) > 1:
            weight_map = {meta.name: name for name, shard in zip(names, shards, strict=True) for meta in shard}
            index = {"metadata": {"total_size": sum(meta.num_bytes for meta in metadata)}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_side_files(like, partial)
        dtypes = {meta.dtype for meta in metadata}
        if len(dtypes) == 1:
            set_dtype(partial / "config.json", *dtypes)


@contextmanager
def atomic_model_folder(folder: Path) -> Iterator[Path]:
    """Replace a folder as `atomic_folder` does, with errors for the user.

    Raises:
        ModelError: when the folder cannot be written (a full disk, no permission); nothing of it is left then.
    """
    try:
        with atomic_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error}") from error


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer, as far as they are there."""
    for side in SIDE_FILES:
        if (source / side).exists():
            shutil.copyfile(source / side, target / side)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Set the type of the weights in `config.json`, under the key that it uses."""
    raw = json.loads(config.read_text())
    key = "dtype" if "dtype" in raw else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if raw.get(key) != name:
        config.write_text(json.dumps({**raw, key: name}, indent=2) + "\n")


def _split(metadata: Sequence[TensorMeta], max_bytes: int) -> list[list[TensorMeta]]:
    shards: list[list[TensorMeta]] = [[]]
    size = 0
    for meta in metadata:
        if shards[-1] and size + meta.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(meta)
        size += meta.num_bytes
    return shards


def write_file(file: Path, shard: Sequence[TensorMeta], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer needs all of them at once.

    Args:
        shard: the file's tensors, in their order.
        tensors: as many are taken from it.
    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    end = 0
    for meta in shard:
        start, end = end, end + meta.num_bytes
        header[meta.name] = {"dtype": kinds[meta.dtype], "shape": meta.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in shard:
            found, tensor = next(tensors)
            assert (found, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape), f"{found} is not {name}"
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
