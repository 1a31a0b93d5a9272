"""Read single Hugging Face tensors of Megatron's distributed checkpoints (format `torch_dist`), and write checkpoints.

Such a checkpoint holds every parameter by its global name and shape, whatever the layout it was saved under. The
parameters of all layers are one tensor, stacked along a first dimension (experts along a second one), and its chunks
are in several files. Everything here works with single parameters, so a model can be far larger than memory.

The norms before a linear layer are stored under the names that Transformer Engine's fused layers give them
(`linear_qkv.layer_norm_weight`); Megatron's local layers map theirs to the same names.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.errors import CheckpointError
from megatron_entropy.weights import manifest, names
from megatron_entropy.weights.hf_folder import TensorFolder
from megatron_entropy.weights.safe_index import read_index

SHARDS = "shards"
"""The folder of Megatron's files in a checkpoint."""
MAX_FILE_BYTES = 2 * 2**30

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class StoredPosition(NamedTuple):
    """The position of a parameter: index `lead` (layer, expert) of the stored tensor `key`, which has shape `size`."""

    key: str
    size: tuple[int, ...]
    lead: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The parameter as a chunk of the stored tensor."""
        inner = self.size[len(self.lead) :]
        offsets = (*self.lead, *(0 for _ in inner))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((*(1 for _ in self.lead), *inner)))


def stored_position(entry: names.Entry, arch: ModelArchitecture) -> StoredPosition:
    """Find where Megatron stores a parameter."""
    key, counts, lead = entry.megatron, [], []
    if entry.layer is not None:
        key = key.replace(f".layers.{entry.layer}.", ".layers.", 1)
        counts.append(arch.num_layers)
        lead.append(entry.layer)
    if entry.expert is not None and arch.moe is not None:
        key = key.replace(f".local_experts.{entry.expert}.", ".experts.", 1)
        counts.append(arch.moe.num_experts)
        lead.append(entry.expert)
    for plain, fused in _FUSED_NORMS.items():
        if not (arch.moe and plain.startswith("pre_mlp")):  # Transformer Engine fuses none with experts
            key = key.replace(plain, fused)
    return StoredPosition(key, (*counts, *names.shard_shape(entry, arch, ranks=1)), tuple(lead))


class MegatronFolder:
    """Tensors of a Megatron checkpoint under their Hugging Face names."""

    def __init__(self, folder: str | Path, arch: ModelArchitecture) -> None:
        """Read the checkpoint's index, and check that it holds the model and nothing else.

        Args:
            folder: of the checkpoint; Megatron's files are in its `shards/` or in itself.
        Raises:
            CheckpointError: for a folder without a checkpoint, one of another model, and truncated files.
        """
        self.folder = Path(folder)
        self._shards = self.folder / SHARDS if (self.folder / SHARDS).is_dir() else self.folder
        self._arch = arch
        self._reader = FileSystemReader(self._shards)
        self._metadata = read_index(self._shards)
        self._entries = {tensor: entry for entry in names.entries(arch) for tensor in entry.tensors}
        self._tensors = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and key.startswith(_MODEL_PREFIXES)
        }
        self._check_tensors()
        self._check_vocabulary()
        self._check_files()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._siblings: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._entries)

    def file(self, name: str) -> Path:
        """The file that holds the first chunk of a tensor."""
        position = stored_position(self._entries[name], self._arch)
        first = MetadataIndex(position.key, self._chunks_of(position)[0].offsets)
        return self._shards / self._metadata.storage_data[first].relative_path

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[stored_position(self._entries[name], self._arch).key].properties.dtype

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one tensor.

        Tensors of the same parameter (query, key and value) are read from disk once if they are read one after another.

        Raises:
            CheckpointError: when a chunk of it is missing or cannot be read.
        """
        if name not in self._siblings:
            self._siblings.clear()
            entry = self._entries[name]
            self._siblings = names.unshard(entry, [self._read(entry)], self._arch)
        return self._siblings.pop(name)

    def _read(self, entry: names.Entry) -> Tensor:
        position = stored_position(entry, self._arch)
        stored, chunks = self._tensors[position.key], self._chunks_of(position)
        target = torch.empty(position.chunk.sizes, dtype=stored.properties.dtype)
        parameter = TensorStorageMetadata(stored.properties, stored.size, chunks)
        items = create_read_items_for_chunk_list(position.key, parameter, [position.chunk])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(
                f"{self._shards}/.metadata: chunks of tensor {position.key} at {position.lead} are missing"
            )
        try:
            self._reader.read_data(LoadPlan(items), _SingleTensorPlanner(target)).wait()
        except (MemoryError, Exception) as error:  # torch raises anything for damaged bytes
            file = self.file(entry.tensors[0])
            raise CheckpointError(f"{file}: cannot read {position.key}: {_line(error)}") from None
        return target.reshape(position.size[len(position.lead) :])

    def _chunks_of(self, position: StoredPosition) -> list[ChunkStorageMetadata]:
        """Find the stored chunks that hold a parameter, without a search through those of all layers."""
        if position.key not in self._chunks:
            by_lead: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._tensors[position.key].chunks:
                spans = zip(chunk.offsets[: len(position.lead)], chunk.sizes, strict=False)
                for lead in itertools.product(*(range(start, start + size) for start, size in spans)):
                    by_lead.setdefault(lead, []).append(chunk)
            self._chunks[position.key] = by_lead
        return self._chunks[position.key].get(position.lead, [])

    def _check_tensors(self) -> None:
        file, expected = self._shards / ".metadata", set()
        for entry in names.entries(self._arch):
            key, size, _ = stored_position(entry, self._arch)
            expected.add(key)
            if key not in self._tensors:
                raise CheckpointError(f"{file}: tensor {key} is missing; config.json implies it")
            if (found := tuple(self._tensors[key].size)) != size:
                raise CheckpointError(f"{file}: tensor {key} has shape {found}, config.json implies {size}")
        if extra := sorted(self._tensors.keys() - expected):
            found = tuple(self._tensors[extra[0]].size)
            raise CheckpointError(
                f"{file}: tensor {extra[0]} {found} belongs to no parameter of {self._arch.architecture}"
            )

    def _check_vocabulary(self) -> None:
        """Compare the vocabulary with the one in the checkpoint of a run; the stored rows include padding."""
        state = self.folder / manifest.NAME
        if state.exists():
            try:
                rows = manifest.read(self.folder).content.model.vocab_size
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder}: {error}") from None
            if rows != self._arch.vocab_size:
                raise CheckpointError(
                    f"{state}: tensor embedding.word_embeddings.weight has {rows} rows without padding, "
                    f"config.json implies {self._arch.vocab_size}"
                )

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for stored in self._metadata.storage_data.values():
            end = stored.offset + stored.length
            needed[stored.relative_path] = max(end, needed.get(stored.relative_path, 0))
        for name, size in needed.items():
            file = self._shards / name
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise CheckpointError(f"{file}: {found} bytes instead of the {size} in .metadata")


def write(
    shards: Path,
    arch: ModelArchitecture,
    dtype: torch.dtype,
    make: Callable[[names.Entry], Tensor],
    max_file_bytes: int,
) -> None:
    """Write a model as a distributed checkpoint that Megatron loads under any layout.

    Args:
        shards: the folder for Megatron's files.
        make: returns a whole parameter of type `dtype`; called when it is about to be written.
        max_file_bytes: largest size of a file, unless a single parameter is larger.
    """
    entries = {
        MetadataIndex(position.key, position.chunk.offsets): (entry, position)
        for entry in names.entries(arch)
        for position in (stored_position(entry, arch),)
    }
    properties = TensorProperties(dtype=dtype)
    items = [
        WriteItem(
            index, WriteItemType.SHARD,
            tensor_data=TensorWriteData(position.chunk, properties, torch.Size(position.size)),
        )
        for index, (_, position) in entries.items()
    ]  # fmt: skip
    states = [
        WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(_NO_STATE)))
        for name in _module_states([position for _, position in entries.values()])
    ]

    def resolve(item: WriteItem) -> Tensor | io.BytesIO:
        if item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(_NO_STATE)
        entry, position = entries[item.index]
        return make(entry).reshape(position.chunk.sizes)

    # One plan per file, as if each file were written by a rank of its own.
    groups = [*_split(items, dtype.itemsize, max_file_bytes), states]
    plans, metadata = create_default_global_save_plan([SavePlan(group) for group in groups])
    writer = FileSystemWriter(shards, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    shards.mkdir()
    planner = _LazyPlanner(resolve)
    try:
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save fails a second time when it closes the file
            raise error.__context__ from None
        raise
    writer.finish(metadata, results)
    torch.save({}, shards / "common.pt")
    (shards / "metadata.json").write_text(json.dumps(_FORMAT))


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a Megatron checkpoint rather than safetensors files."""
    return (Path(folder) / SHARDS).is_dir() or (Path(folder) / ".metadata").exists()


def open_model(folder: str | Path, arch: ModelArchitecture) -> TensorFolder | MegatronFolder:
    """Open a Hugging Face folder or a Megatron checkpoint to read tensors by their Hugging Face names."""
    return MegatronFolder(folder, arch) if is_checkpoint(folder) else TensorFolder(folder)


def _serialised(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


_NO_STATE = _serialised([None])


def _module_states(positions: Sequence[StoredPosition]) -> Iterator[str]:
    """List the names of the modules' extra states, which are all empty.

    Megatron's linear layers and Transformer Engine's norms and attention expect one; other modules ignore theirs.
    """
    for key, size, lead in positions:
        number = ".".join(map(str, lead or (0,)))
        count = ".".join(map(str, size[: len(lead)] or (1,)))
        module, _, field = key.rpartition(".")
        if field == "weight":
            yield f"{module}._extra_state/shard_{number}_{count}"
        if field == "weight" and module.endswith(".linear_proj"):
            attention = module.removesuffix("linear_proj") + "core_attention"
            yield f"{attention}._extra_state/shard_{number}_{count}"


def _split(items: Sequence[WriteItem], itemsize: int, max_bytes: int) -> Iterator[list[WriteItem]]:
    group: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None
        nbytes = math.prod(item.tensor_data.chunk.sizes) * itemsize
        if group and size + nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    yield group


class _LazyPlanner(DefaultSavePlanner):
    """Makes a tensor when it is about to be written."""

    def __init__(self, resolve: Callable[[WriteItem], Any]) -> None:
        super().__init__()
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._resolve(write_item)


class _SingleTensorPlanner(DefaultLoadPlanner):
    """Reads everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
