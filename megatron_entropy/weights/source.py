"""The sharded model as a stream of Hugging Face tensors, and the way back from a folder into the shards.

`ShardedSource` has the form of vLLM's `WeightSource`: `metadata()` describes the whole model on every rank without
moving anything, iteration yields `(name, tensor)`. For a push it is read in slabs (some rows of a tensor) instead, so
that what is held beside the model does not grow with the largest tensor. Reading is a collective: the ranks that the
plan names put their slices in place themselves, where they see it, or send them straight to rank 0, which does; other
ranks pass through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    folder: TensorFolder | MegatronFolder, arch: ModelArchitecture, layout: ParallelConfig, local: Mapping[str, Tensor]
) -> None:
    """Fill this rank's parameters from a Hugging Face folder or a Megatron checkpoint.

    Args:
        local: this rank's parameters under global names; written in place.
    Raises:
        ModelError: for a missing tensor, a wrong shape, or a tensor no parameter takes.
    """
    all_entries = names.entries(arch)
    for name, entry in names.match(names.with_tied_head(all_entries, arch), local).items():
        tensors = [folder.read(t, s) for t, s in zip(entry.tensors, entry.shapes, strict=True)]
        ranks = layout.tp if entry.expert is None else layout.etp
        part = names.shard(entry, tensors, arch, rank=dist.get_rank() % ranks, ranks=ranks)
        assert part.shape == local[name].shape, f"{name}: {tuple(part.shape)} does not fit {tuple(local[name].shape)}"
        with torch.no_grad():
            local[name].copy_(part)
    expected = {tensor for entry in all_entries for tensor in entry.tensors}
    tied_copy = {"lm_head.weight"} if arch.tied_embeddings else set()
    extra = [n for n in folder.names() if n not in expected | tied_copy and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ModelError(f"{folder.folder}: tensor {extra[0]} belongs to no parameter of {arch.architecture}")


class ShardedSource:
    """The actor's weights as a stream of Hugging Face tensors; see the module's text."""

    def __init__(
        self,
        arch: ModelArchitecture,
        layout: ParallelConfig,
        local: Mapping[str, Tensor],
        dtype: torch.dtype,
        streamed: Sequence[names.Entry] | None = None,
    ) -> None:
        """Describe the stream.

        Args:
            local: this rank's parameters under global names; read whenever the stream is, each once for all slabs that
                follow one another (it may be computed when it is asked for).
            dtype: type tensors are cast to before they are sent.
            streamed: what the stream consists of and `local` holds a part of, instead of the whole model.
        """
        self.arch = arch
        self.dtype = dtype
        self.gather_seconds = 0.0
        """Spent so far on rank 0 waiting for what other ranks hold."""
        self._local = local
        self._part: tuple[str, Tensor] | None = None
        self._device = next(iter(local.values())).device
        # Of a tied head only the embedding itself is read.
        known = names.with_tied_head(names.entries(arch), arch) if streamed is None else streamed
        matched = names.match(known, local)
        self._name_of = {entry.megatron: name for name, entry in matched.items()}
        self._tensors = [
            (placement, index)
            for placement in plan(arch, layout, streamed)
            for index in range(len(placement.entry.tensors))
        ]

    def metadata(self) -> list[TensorMeta]:
        """Name, type and full shape of every tensor, in the order of iteration."""
        return [
            TensorMeta(placement.entry.tensors[index], self.dtype, placement.entry.shapes[index])
            for placement, index in self._tensors
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every tensor with its name: whole on rank 0, None elsewhere; a collective."""
        for number, (name, dtype, full) in enumerate(self.metadata()):
            tensor = torch.empty(full, dtype=dtype, device=self._device) if dist.get_rank() == 0 else None
            self.read(number, 0, full[0], tensor, in_place=False)
            yield name, tensor

    def read(self, number: int, first: int, count: int, out: Tensor | None, *, in_place: bool) -> None:
        """Rows [first, first + count) of the stream's tensor `number`; a collective.

        Args:
            out: [count, ...] of the stream's type, which is filled; on rank 0, or everywhere with `in_place`.
            in_place: `out` is the same memory on every rank, and each writes what it holds. It is filled when every
                rank has returned, which is for the caller to wait for.
        """
        placement, index = self._tensors[number]
        rank = dist.get_rank()
        shares = [
            (holder, slices)
            for part, holder in enumerate(placement.ranks)
            if (slices := list(_slices(placement, index, self.arch, part, first, count)))
        ]
        coming = []
        if rank == 0 and not in_place:
            assert out is not None
            coming = [self._receive(holder, slices, first, out) for holder, slices in shares if holder != 0]
        for holder, slices in shares:
            if holder == rank:
                mine = self._read_part(self._name_of[placement.entry.megatron])
                rows = [_cut(mine, piece.part_start, piece, span) for piece, span in slices]
                if rank == 0 or in_place:
                    _place(out, slices, first, rows)
                else:
                    parts = [r.reshape(-1).to(self.dtype) for r in rows]
                    dist.send(parts[0] if len(parts) == 1 else torch.cat(parts), dst=0)
        for place in coming:
            place()
        if index == len(placement.entry.tensors) - 1 and first + count == placement.entry.shapes[index][0]:
            self._part = None

    def _read_part(self, name: str) -> Tensor:
        """This rank's part of a parameter, kept until the parameter's last row has been read."""
        if self._part is None or self._part[0] != name:
            self._part = None  # two are never held
            self._part = (name, self._local[name].detach())
        return self._part[1]

    def _receive(self, holder: int, slices: list[tuple[names.Piece, Rows]], first: int, out: Tensor) -> Callable:
        """Begin to take a rank's slices; what is returned waits for them and puts them in place."""
        targets = [_target(out, first, piece, span) for piece, span in slices]
        total = sum(target.numel() for target in targets)
        straight = _in_one_piece(targets) and out.device == self._device
        # `received` must be of the sender's kind.
        received = (
            targets[0].as_strided((total,), (1,))
            if straight
            else torch.empty(total, dtype=self.dtype, device=self._device)
        )
        work = dist.irecv(received, src=holder)
        assert work is not None

        def place() -> None:
            begin = time.monotonic()
            work.wait()
            self.gather_seconds += time.monotonic() - begin
            if not straight:
                parts = received.split([target.numel() for target in targets])
                for target, part in zip(targets, parts, strict=True):
                    target.copy_(part.view(target.shape))

        return place


Rows = tuple[int, int]
"""First row within a piece (or of it, where the piece is columns) and number of rows."""


def _slices(
    placement: Placement, index: int, arch: ModelArchitecture, part: int, first: int, count: int
) -> Iterator[tuple[names.Piece, Rows]]:
    """A rank's pieces of tensor `index`, each cut to rows [first, first + count) of the tensor."""
    for piece in names.pieces(placement.entry, arch, rank=part, ranks=placement.parts):
        if piece.tensor != index:
            continue
        if piece.dim == 1:
            yield piece, (first, count)
            continue
        begin = max(first, piece.whole_start)
        end = min(first + count, piece.whole_start + piece.length)
        if begin < end:
            yield piece, (begin - piece.whole_start, end - begin)


def _cut(part: Tensor, start: int, piece: names.Piece, rows: Rows) -> Tensor:
    """The slice of a rank's part."""
    if piece.dim == 1:
        return part.narrow(0, *rows).narrow(1, start, piece.length)
    return part.narrow(0, start + rows[0], rows[1])


def _target(out: Tensor, first: int, piece: names.Piece, rows: Rows) -> Tensor:
    """The same slice of the rows asked for."""
    if piece.dim == 1:
        return out.narrow(1, piece.whole_start, piece.length)
    return out.narrow(0, piece.whole_start + rows[0] - first, rows[1])


def _place(out: Tensor | None, slices: list[tuple[names.Piece, Rows]], first: int, rows: list[Tensor]) -> None:
    assert out is not None
    for (piece, span), values in zip(slices, rows, strict=True):
        _target(out, first, piece, span).copy_(values)


def _in_one_piece(tensors: list[Tensor]) -> bool:
    """Whether tensors lie in memory one right behind the other."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != end:
            return False
        end += tensor.nbytes
    return True
