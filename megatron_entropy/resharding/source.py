"""The sharded model as a stream of Hugging Face tensors, and the way back from a folder into the shards.

`ShardedSource` has the form of vLLM's `WeightSource`: `metadata()` describes the whole model on every rank without
moving anything, iteration yields `(name, tensor)` one parameter at a time. Iterating is a collective: a parameter's
parts are gathered over the tensor-parallel ranks of the pipeline stage that owns it (first data-parallel replica) and
handed to rank 0; other ranks see `None`. One parameter is in flight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_entropy.architecture import ModelShape
from megatron_entropy.errors import ModelError
from megatron_entropy.resharding import names
from megatron_entropy.resharding.folder import TensorFolder


def load(folder: TensorFolder, shape: ModelShape, local: Mapping[str, Tensor]) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Args:
        local: this rank's parameters under global names; written in place.
    Raises:
        ModelError: for a missing tensor, a wrong shape, or a tensor no parameter takes.
    """
    all_entries = names.entries(shape)
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, entry in names.match(_with_tied_head(all_entries, shape), local).items():
        tensors = [folder.read(t, s) for t, s in zip(entry.tensors, entry.shapes, strict=True)]
        target = local[name]
        part = names.shard(entry, tensors, shape, rank=rank, ranks=ranks, rows=target.shape[0])
        assert part.shape == target.shape, f"{name}: {tuple(part.shape)} does not fit {tuple(target.shape)}"
        with torch.no_grad():
            target.copy_(part)
    expected = {tensor for entry in all_entries for tensor in entry.tensors}
    tied_copy = {"lm_head.weight"} if shape.tied_embeddings else set()
    extra = [n for n in folder.names() if n not in expected | tied_copy and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ModelError(f"{folder.folder}: tensor {extra[0]} belongs to no parameter of {shape.architecture}")


class ShardedSource:
    """The actor's weights as a stream of Hugging Face tensors; see the module's text."""

    def __init__(self, shape: ModelShape, local: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Describe the stream.

        Args:
            local: this rank's parameters under global names; read at every iteration.
            dtype: type tensors are cast to before they are sent.
        """
        self.shape = shape
        self.dtype = dtype
        self._local = local
        self._entries = names.entries(shape)
        self._by_entry = {
            entry.megatron: name for name, entry in names.match(_with_tied_head(self._entries, shape), local).items()
        }
        self._owner = self._find_owners()

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and full shape of every tensor, in the order of iteration."""
        return [
            (name, self.dtype, shape)
            for entry in self._entries
            for name, shape in zip(entry.tensors, entry.shapes, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        rank = dist.get_rank()
        for entry in self._entries:
            owner = self._owner[entry.megatron]
            parts = self._gather(entry) if self._stage_owns(owner) else None
            tensors = names.unshard(entry, parts, self.shape) if parts is not None and rank == owner else {}
            for name, shape in zip(entry.tensors, entry.shapes, strict=True):
                yield name, self._hand_over(tensors.get(name), shape, owner)

    def _find_owners(self) -> dict[str, int]:
        """Global rank that assembles each parameter: tensor-parallel rank 0 of its stage's first replica."""
        first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        mine = parallel_state.get_tensor_model_parallel_rank() == 0 and first_replica
        claims: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(claims, sorted(self._by_entry) if mine else [])
        owner: dict[str, int] = {}
        for rank, claimed in enumerate(claims):
            for name in claimed:
                owner.setdefault(name, rank)
        return {entry.megatron: owner[entry.megatron] for entry in self._entries}

    def _stage_owns(self, owner: int) -> bool:
        return owner in dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())

    def _gather(self, entry: names.Entry) -> list[Tensor] | None:
        """Parts of a parameter on all ranks of its tensor-parallel group."""
        part = self._local[self._by_entry[entry.megatron]].detach().to(self.dtype).contiguous()
        group = parallel_state.get_tensor_model_parallel_group()
        if entry.kind == "whole" or group.size() == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part, group=group)
        return parts

    def _hand_over(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor | None:
        rank = dist.get_rank()
        if owner == 0:
            return tensor.contiguous() if tensor is not None else None
        if rank == owner:
            assert tensor is not None
            dist.send(tensor.contiguous(), dst=0)
        if rank != 0:
            return None
        device = next(iter(self._local.values())).device
        received = torch.empty(shape, dtype=self.dtype, device=device)
        dist.recv(received, src=owner)
        return received


def _with_tied_head(all_entries: list[names.Entry], shape: ModelShape) -> list[names.Entry]:
    """With tied embeddings the last pipeline stage holds a copy of the embedding under the head's name."""
    if not shape.tied_embeddings:
        return all_entries
    embedding = all_entries[0]
    copy = names.Entry("output_layer.weight", (), embedding.tensors, embedding.shapes, embedding.kind)
    return [*all_entries, copy]
