"""Where every element of a Hugging Face model lies in a layout: pure arithmetic, no process group needed.

`plan` places each parameter's parts on global ranks, `transfers` lists which slice of which rank's part is which slice
of which Hugging Face tensor. Of replicas (data parallel, or `whole` tensors on tensor-parallel ranks) the first is
taken, so every element comes from exactly one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_entropy.config.architecture import ModelArchitecture, split_layers
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.errors import ConfigError
from megatron_entropy.weights.names import Entry, entries, pieces


@dataclass(frozen=True)
class Placement:
    """One parameter and the global ranks that hold its parts, in tensor-parallel order (`whole`: the first alone)."""

    entry: Entry
    ranks: tuple[int, ...]
    parts: int
    """Tensor-parallel ranks the parameter is split over."""


class Transfer(NamedTuple):
    """`length` rows (`dim` 0) or columns (1) of `tensor` from `whole_start`, held by `rank` from `part_start`."""

    rank: int
    parameter: str
    tensor: str
    dim: int
    part_start: int
    whole_start: int
    length: int


def plan(arch: ModelArchitecture, layout: ParallelConfig, placed: Sequence[Entry] | None = None) -> list[Placement]:
    """Place every parameter of a model.

    Args:
        placed: what to place instead of all `names.entries`.
    Returns:
        In the order of the entries, which is the order of a stream.
    Raises:
        ConfigError: naming the tensor and the key, when the layout cannot split it evenly.
    """
    stage_of = _stages(arch, layout)
    stage_size = layout.tp * layout.cp * layout.dp
    placements = []
    checked = set()
    for entry in entries(arch) if placed is None else placed:
        key, parts = ("tp", layout.tp) if entry.expert is None else ("etp", layout.etp)
        if (entry.kind, key) not in checked:
            _check_even(entry, arch, parts, key)
            checked.add((entry.kind, key))
        first = stage_size * _stage(entry, stage_of, layout)
        if entry.expert is not None and arch.moe is not None:
            first += layout.etp * (entry.expert // (arch.moe.num_experts // layout.ep))
        count = 1 if entry.kind == "whole" else parts
        placements.append(Placement(entry, tuple(range(first, first + count)), parts))
    return placements


def transfers(placements: Sequence[Placement], arch: ModelArchitecture) -> Iterator[Transfer]:
    """Every slice that has to move to put the Hugging Face tensors together."""
    for placement in placements:
        entry = placement.entry
        for index, rank in enumerate(placement.ranks):
            for piece in pieces(entry, arch, rank=index, ranks=placement.parts):
                yield Transfer(
                    rank, entry.megatron, entry.tensors[piece.tensor],
                    piece.dim, piece.part_start, piece.whole_start, piece.length,
                )  # fmt: skip


def _stages(arch: ModelArchitecture, layout: ParallelConfig) -> list[int]:
    """Pipeline rank of every layer; chunk c of rank p is virtual stage c * pp + p."""
    return [
        stage % layout.pp
        for stage, layers in enumerate(split_layers(arch.num_layers, layout.pp * layout.vpp))
        for _ in layers
    ]


def _stage(entry: Entry, stage_of: list[int], layout: ParallelConfig) -> int:
    if entry.layer is not None:
        return stage_of[entry.layer]
    return 0 if entry.megatron.startswith("embedding.") else layout.pp - 1


def _check_even(entry: Entry, arch: ModelArchitecture, parts: int, key: str) -> None:
    if entry.kind == "whole":
        return
    dim = 1 if entry.kind == "columns" else 0
    size = entry.shapes[0][dim]
    if entry.kind == "vocabulary":
        size = arch.padded_vocab_size
    elif entry.kind == "qkv":
        size = sum(full[0] for full in entry.shapes)
    if size % parts:
        raise ConfigError(
            f"actor.parallel.{key}={parts} does not divide the {size} rows or columns of {entry.megatron}"
        )
