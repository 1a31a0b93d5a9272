"""Stream the sharded model as Hugging Face tensors, and load the shards from a folder.

`ShardedSource` has the form of vLLM's `WeightSource`: `metadata()` describes the whole model on every rank without
communication, iteration yields `(name, tensor)`. A weight sync reads slabs (some rows of a tensor) instead, so the
memory beside the model does not grow with the largest tensor. Reading is a collective: a rank that holds slices of a
slab writes them where the slab is shared memory, and sends them to rank 0 where it is not; other ranks do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.errors import ModelError
from megatron_entropy.weights import names
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.hf_folder import TensorFolder
from megatron_entropy.weights.megatron_folder import MegatronFolder
from megatron_entropy.weights.plan import Placement, plan


def load(
    folder: TensorFolder | MegatronFolder,
    arch: ModelArchitecture,
    layout: ParallelConfig,
    local: Mapping[str, Tensor],
    *,
    copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Fill this rank's parameters from a Hugging Face folder or a Megatron checkpoint.

    Args:
        local: this rank's parameters under global names; written in place.
        copy: sets a parameter, its first argument, to values of the same shape and the folder's type.
    Raises:
        ModelError: for a missing tensor, a wrong shape, or a tensor that belongs to no parameter.
    """
    all_entries = names.entries(arch)
    for name, entry in names.match(names.with_tied_head(all_entries, arch), local).items():
        tensors = [folder.read(t, s) for t, s in zip(entry.tensors, entry.shapes, strict=True)]
        ranks = layout.tp if entry.expert is None else layout.etp
        shard = names.shard(entry, tensors, arch, rank=dist.get_rank() % ranks, ranks=ranks)
        assert shard.shape == local[name].shape, f"{name}: {tuple(shard.shape)} is not {tuple(local[name].shape)}"
        with torch.no_grad():
            copy(local[name], shard)
    expected = {tensor for entry in all_entries for tensor in entry.tensors}
    tied_copy = {"lm_head.weight"} if arch.tied_embeddings else set()
    extra = [n for n in folder.names() if n not in expected | tied_copy and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ModelError(f"{folder.folder}: tensor {extra[0]} belongs to no parameter of {arch.architecture}")


class ShardedSource:
    """The actor's weights as a stream of Hugging Face tensors.

    `gather_seconds`: seconds that rank 0 has waited for slices of other ranks so far.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        layout: ParallelConfig,
        local: Mapping[str, Tensor],
        dtype: torch.dtype,
        entries: Sequence[names.Entry] | None = None,
    ) -> None:
        """Describe the stream.

        Args:
            local: this rank's parameters under global names. Each is read once per pass over the stream, so the
                mapping may compute them on access.
            dtype: type that tensors are cast to.
            entries: the parameters of the stream, of which `local` holds shards; None: the whole model.
        """
        self.arch = arch
        self.dtype = dtype
        self.gather_seconds = 0.0
        self._local = local
        self._shard: tuple[str, Tensor] | None = None
        self._device = next(iter(local.values())).device
        # Of a tied head only the embedding itself is read.
        known = names.with_tied_head(names.entries(arch), arch) if entries is None else entries
        matched = names.match(known, local)
        self._name_of = {entry.megatron: name for name, entry in matched.items()}
        self._tensors = [
            (placement, index)
            for placement in plan(arch, layout, entries)
            for index in range(len(placement.entry.tensors))
        ]

    def metadata(self) -> list[TensorMeta]:
        """Name, type and full shape of every tensor, in the order of iteration."""
        return [
            TensorMeta(placement.entry.tensors[index], self.dtype, placement.entry.shapes[index])
            for placement, index in self._tensors
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield every name with its tensor on rank 0, and with None on the others; a collective."""
        for number, (name, dtype, full) in enumerate(self.metadata()):
            tensor = torch.empty(full, dtype=dtype, device=self._device) if dist.get_rank() == 0 else None
            self.read(number, 0, full[0], tensor, in_place=False)
            yield name, tensor

    def read(self, number: int, first: int, count: int, out: Tensor | None, *, in_place: bool) -> None:
        """Read rows [first, first + count) of the stream's tensor `number`; a collective.

        Args:
            out: [count, ...] of the stream's type, which is filled. Needed on rank 0, and on all ranks with `in_place`.
            in_place: `out` is the same memory on every rank, and each rank writes its own slices. It is complete when
                every rank has returned; the caller waits for that.
        """
        placement, index = self._tensors[number]
        rank = dist.get_rank()
        slices_of = [
            (holder, slices)
            for tp_rank, holder in enumerate(placement.ranks)
            if (slices := _slices(placement, index, self.arch, tp_rank, first, count))
        ]
        finish_receiving = None
        if rank == 0 and not in_place:
            assert out is not None
            finish_receiving = self._receive([(holder, slices) for holder, slices in slices_of if holder != 0], out)
        for holder, slices in slices_of:
            if holder == rank:
                shard = self._read_shard(self._name_of[placement.entry.megatron])
                values = [cut.of_shard(shard) for cut in slices]
                if rank == 0 or in_place:
                    assert out is not None
                    for cut, value in zip(slices, values, strict=True):
                        cut.of_slab(out).copy_(value)
                else:
                    flat = [value.reshape(-1).to(self.dtype) for value in values]
                    _wait(_start(dist.isend, [(0, flat[0] if len(flat) == 1 else torch.cat(flat))]))
        if finish_receiving is not None:
            finish_receiving()
        if index == len(placement.entry.tensors) - 1 and first + count == placement.entry.shapes[index][0]:
            self._shard = None

    def _read_shard(self, name: str) -> Tensor:
        """Return this rank's shard of a parameter, which is kept until the parameter's last row has been read."""
        if self._shard is None or self._shard[0] != name:
            self._shard = None  # two are never held
            self._shard = (name, self._local[name].detach())
        return self._shard[1]

    def _receive(self, slices_of: list[tuple[int, list[_SlabSlice]]], out: Tensor) -> Callable[[], None]:
        """Start to receive the slices of other ranks; the function returned waits and writes them into `out`."""
        arriving = [_Arriving.into([cut.of_slab(out) for cut in slices], self._device) for _, slices in slices_of]
        works = _start(dist.irecv, [(holder, a.buffer) for (holder, _), a in zip(slices_of, arriving, strict=True)])

        def finish() -> None:
            begin = time.monotonic()
            _wait(works)
            self.gather_seconds += time.monotonic() - begin
            for slices in arriving:
                slices.store()

        return finish


class _Arriving(NamedTuple):
    """What another rank sends: the memory of the targets themselves, or a buffer where they are apart."""

    buffer: Tensor
    targets: list[Tensor]
    direct: bool

    @classmethod
    def into(cls, targets: list[Tensor], device: torch.device) -> _Arriving:
        """Take the targets where they are adjacent and on `device`, the sender's kind of device."""
        total = sum(target.numel() for target in targets)
        direct = _are_adjacent(targets) and targets[0].device == device
        if direct:
            return cls(targets[0].as_strided((total,), (1,)), targets, direct)
        return cls(torch.empty(total, dtype=targets[0].dtype, device=device), targets, direct)

    def store(self) -> None:
        """Copy the buffer into the targets."""
        if self.direct:
            return
        values = self.buffer.split([target.numel() for target in self.targets])
        for target, value in zip(self.targets, values, strict=True):
            target.copy_(value.view(target.shape))


def _start(operation: Callable[..., Any], transfers: list[tuple[int, Tensor]]) -> list[dist.Work]:
    """Start sending or receiving (rank, tensor); over NCCL a batch needs no communicator for each pair of ranks."""
    if not transfers:
        return []
    return dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer) for peer, tensor in transfers])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _SlabSlice(NamedTuple):
    """A block of rows and columns that a rank's shard and a slab of a tensor have in common.

    Per dimension: first index in the shard, first index in the slab, length. `columns`: None means all of them.
    """

    rows: tuple[int, int, int]
    columns: tuple[int, int, int] | None

    def of_shard(self, shard: Tensor) -> Tensor:
        """View the slice in the shard."""
        first, _, length = self.rows
        rows = shard.narrow(0, first, length)
        return rows if self.columns is None else rows.narrow(1, self.columns[0], self.columns[2])

    def of_slab(self, slab: Tensor) -> Tensor:
        """View the slice in the slab."""
        _, first, length = self.rows
        rows = slab.narrow(0, first, length)
        return rows if self.columns is None else rows.narrow(1, self.columns[1], self.columns[2])


def _slices(
    placement: Placement, index: int, arch: ModelArchitecture, tp_rank: int, first: int, count: int
) -> list[_SlabSlice]:
    """Find what a rank holds of rows [first, first + count) of the parameter's tensor `index`."""
    slices = []
    for piece in names.shard_slices(placement.entry, arch, rank=tp_rank, ranks=placement.num_shards):
        if piece.tensor != index:
            continue
        if piece.dim == 1:
            slices.append(_SlabSlice((first, 0, count), (piece.shard_start, piece.tensor_start, piece.length)))
            continue
        begin = max(first, piece.tensor_start)
        end = min(first + count, piece.tensor_start + piece.length)
        if begin < end:
            rows = (piece.shard_start + begin - piece.tensor_start, begin - first, end - begin)
            slices.append(_SlabSlice(rows, None))
    return slices


def _are_adjacent(tensors: list[Tensor]) -> bool:
    """Whether each tensor starts in memory where the one before it ends."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != end:
            return False
        end += tensor.nbytes
    return True
