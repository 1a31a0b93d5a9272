"""Convert whole models between Hugging Face folders and Megatron checkpoints, one parameter in memory at a time.

`to_megatron` writes a folder with Megatron's files in `shards/` and configuration and tokenizer beside it, so it can be
trained from and converted back without the folder it came from. Types are kept unless one is chosen. Outputs appear
complete or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.errors import Fault, ModelError
from megatron_entropy.weights import megatron_folder, names
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.hf_folder import (
    MAX_SHARD_BYTES,
    TensorFolder,
    atomic_model_folder,
    copy_side_files,
    set_dtype,
    write_folder,
)
from megatron_entropy.weights.megatron_folder import MAX_FILE_BYTES, SHARDS, MegatronFolder, open_model

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Takes a title and the total bytes, and returns a context manager: its value is called with the bytes of each step."""


def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The `ProgressBar` that shows nothing."""
    return nullcontext(lambda done: None)


def to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressBar = silent,
) -> None:
    """Convert a Hugging Face folder to a checkpoint that Megatron loads under any layout.

    Args:
        dtype: type to cast to; None: the type that all tensors have.
        verify: compare every tensor afterwards, bit for bit.
    Raises:
        ModelError: for a folder that cannot be converted, or a target that exists or cannot be written.
        Fault: when the comparison finds a difference.
    """
    check_target(target, source, overwrite=overwrite)
    arch = _architecture_of(source)
    tensors = TensorFolder(source)
    kind = _check(tensors, arch, dtype)
    with atomic_model_folder(target) as partial, progress("converting", _num_bytes(arch, kind)) as advance:

        def make(entry: names.Entry) -> Tensor:
            full = [tensors.read(t, s).to(kind) for t, s in zip(entry.tensors, entry.shapes, strict=True)]
            advance(sum(tensor.nbytes for tensor in full))
            return names.shard(entry, full, arch, rank=0, ranks=1)

        copy_side_files(source, partial)
        if dtype is not None:
            set_dtype(partial / "config.json", dtype)
        megatron_folder.write(partial / SHARDS, arch, kind, make, max_file_bytes)
    if verify:
        compare(source, target, dtype=dtype, progress=progress)


def to_hf(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressBar = silent,
) -> None:
    """Convert a checkpoint, of a run or converted, to a Hugging Face folder.

    Args:
        like: model folder with the configuration and tokenizer; None: the checkpoint has them.
        dtype: type to cast to; None: as stored.
        verify: compare every tensor afterwards, bit for bit.
    Raises:
        ModelError, CheckpointError: for a checkpoint that is damaged or of another model than `like`, or a target that
            exists or cannot be written.
        Fault: when the comparison finds a difference.
    """
    check_target(target, source, like, overwrite=overwrite)
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder")
    if like is None and not (source / "config.json").exists():
        raise ModelError(f"{source}: has no config.json; name the model folder it was trained from with --like")
    settings = like or source
    arch = _architecture_of(settings)
    if like is not None and (source / "config.json").exists():
        _check_same(source, like)
    tensors = MegatronFolder(source, arch)
    metadata = [TensorMeta(name, dtype or tensors.dtype(name), size) for name, size in _tensors_of(arch)]
    with progress("converting", sum(meta.num_bytes for meta in metadata)) as advance:

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, kind, _ in metadata:
                tensor = tensors.read(name).to(kind)
                advance(tensor.nbytes)
                yield name, tensor

        write_folder(target, metadata, stream(), like=settings, max_shard_bytes=max_shard_bytes)
    if verify:
        _compare(tensors, TensorFolder(target), arch, dtype, progress)


def compare(
    first: Path,
    second: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    progress: ProgressBar = silent,
) -> None:
    """Compare every tensor of two models, each a Hugging Face folder or a Megatron checkpoint, bit for bit.

    Args:
        like: model folder with the configuration; None: `first` has it.
        dtype: type to cast the tensors of `first` to.
    Raises:
        Fault: naming the first tensor that differs, its file, and both shapes or values.
        ModelError, CheckpointError: for a folder that is not of the model `config.json` describes.
    """
    arch = _architecture_of(like or first)
    _compare(open_model(first, arch), open_model(second, arch), arch, dtype, progress)


def check_target(target: Path, *sources: Path | None, overwrite: bool) -> None:
    """Check that a folder may be written.

    Raises:
        ModelError: when it exists and may not be overwritten, or contains an input.
    """
    for source in sources:
        if source is not None and source.resolve().is_relative_to(target.resolve()):
            raise ModelError(f"{target}: contains the input {source}; name another folder to write to")
    if target.exists() and (not overwrite or not target.is_dir()):
        raise ModelError(f"{target}: exists; name another folder, or pass --overwrite to replace a folder")


def _compare(
    first: TensorFolder | MegatronFolder,
    second: TensorFolder | MegatronFolder,
    arch: ModelArchitecture,
    dtype: torch.dtype | None,
    progress: ProgressBar,
) -> None:
    tensors = _tensors_of(arch)
    total = sum(math.prod(size) * first.dtype(name).itemsize for name, size in tensors)
    with progress("comparing", total) as advance:
        for name, size in tensors:
            # Reading from a checkpoint copies, from a Hugging Face folder maps the file: the copy comes first.
            found = second.read(name, size) if isinstance(second, MegatronFolder) else None
            expected = first.read(name, size)
            found = second.read(name, size) if found is None else found
            advance(expected.nbytes)
            if difference := _difference(found, expected.to(dtype or expected.dtype)):
                raise Fault(f"{second.file(name)}: tensor {name} differs from {first.file(name)}: {difference}")


def _difference(found: Tensor, expected: Tensor) -> str:
    """Describe the difference of two tensors; empty where every bit is the same."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        described = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (found, expected)]
        return f"{described[0]} instead of {described[1]}"
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    if torch.equal(found.view(bits), expected.view(bits)):
        return ""
    differs = found.view(bits) != expected.view(bits)
    at = tuple(int(i) for i in torch.unravel_index(differs.flatten().byte().argmax(), found.shape))
    count = f"{int(differs.sum())} of {found.numel()} values"
    return f"{found[at].item()} instead of {expected[at].item()} at {at} of {tuple(found.shape)}, {count} in all"


def _check(tensors: TensorFolder, arch: ModelArchitecture, dtype: torch.dtype | None) -> torch.dtype:
    """Check that the folder holds the model and nothing else.

    Returns:
        The type to convert to.
    """
    kinds: dict[torch.dtype, str] = {}
    for name, size in _tensors_of(arch):
        tensors.check(name, size)
        kinds.setdefault(tensors.dtype(name), name)
    if dtype is None and len(kinds) > 1:
        found = ", ".join(f"{name} is {str(kind).removeprefix('torch.')}" for kind, name in kinds.items())
        raise ModelError(f"{tensors.folder}: tensors of several types ({found}); choose one with --dtype")
    known = {name for name, _ in _tensors_of(arch)}
    for name in tensors.names():
        if name in known or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and arch.tied_embeddings:
            _check_tied_copy(tensors)
            continue
        raise ModelError(
            f"{tensors.file(name)}: tensor {name} {tensors.shape(name)} belongs to no parameter of {arch.architecture}"
        )
    return dtype or next(iter(kinds))


def _check_tied_copy(tensors: TensorFolder) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    difference = _difference(tensors.read(head), tensors.read(embedding))
    if difference:
        raise ModelError(
            f"{tensors.file(head)}: tensor {head} differs from {embedding}, to which config.json ties it: {difference}"
        )


def _check_same(checkpoint: Path, like: Path) -> None:
    """Check that a checkpoint's own configuration describes the same model as `like`."""
    own, other = dict(_tensors_of(_architecture_of(checkpoint))), dict(_tensors_of(_architecture_of(like)))
    for name in {**own, **other}:
        if own.get(name) != other.get(name):
            raise ModelError(
                f"{like / 'config.json'}: tensor {name} has shape {other.get(name)}, "
                f"{checkpoint / 'config.json'} implies {own.get(name)}"
            )


def _architecture_of(folder: Path) -> ModelArchitecture:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    return read_architecture(folder)


def _tensors_of(arch: ModelArchitecture) -> list[tuple[str, tuple[int, ...]]]:
    return [pair for entry in names.entries(arch) for pair in zip(entry.tensors, entry.shapes, strict=True)]


def _num_bytes(arch: ModelArchitecture, dtype: torch.dtype) -> int:
    return sum(math.prod(size) for _, size in _tensors_of(arch)) * dtype.itemsize
