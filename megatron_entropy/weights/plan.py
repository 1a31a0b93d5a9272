"""Plan which global rank holds each element of each Hugging Face tensor in a layout.

This is pure arithmetic without process groups. `plan` lists the ranks that hold the shards of every parameter,
`transfers` the slices of those shards. Of replicas (data parallel ranks, and tensor-parallel ranks of `replicated`
tensors) the first one is used, so every element comes from exactly one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_entropy.config.architecture import ModelArchitecture, split_layers
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.errors import ConfigError
from megatron_entropy.weights import names
from megatron_entropy.weights.names import Entry


@dataclass(frozen=True)
class Placement:
    """One parameter and the global ranks of its shards, in tensor-parallel order (of a `replicated` one the first)."""

    entry: Entry
    ranks: tuple[int, ...]
    num_shards: int
    """Tensor-parallel ranks that the parameter is sharded over."""


class Transfer(NamedTuple):
    """`length` rows (`dim` 0) or columns (`dim` 1) of `tensor`, which `rank` holds in its shard of `parameter`."""

    rank: int
    parameter: str
    tensor: str
    dim: int
    shard_start: int
    tensor_start: int
    length: int


def plan(arch: ModelArchitecture, layout: ParallelConfig, entries: Sequence[Entry] | None = None) -> list[Placement]:
    """Find the ranks of every parameter.

    Args:
        entries: the parameters to plan for; None: all of the model.
    Returns:
        In the order of the entries, which is the order of a stream.
    Raises:
        ConfigError: naming the parameter and the key, when the layout does not divide it evenly.
    """
    pp_rank_of = _pp_ranks(arch, layout)
    ranks_per_pp_stage = layout.tp * layout.cp * layout.dp
    placements = []
    checked = set()
    for entry in names.entries(arch) if entries is None else entries:
        key, num_shards = ("tp", layout.tp) if entry.expert is None else ("etp", layout.etp)
        if (entry.kind, key) not in checked:
            _check_even(entry, arch, num_shards, key)
            checked.add((entry.kind, key))
        first = ranks_per_pp_stage * _pp_rank(entry, pp_rank_of, layout)
        if entry.expert is not None and arch.moe is not None:
            first += layout.etp * (entry.expert // (arch.moe.num_experts // layout.ep))
        count = 1 if entry.kind == "replicated" else num_shards
        placements.append(Placement(entry, tuple(range(first, first + count)), num_shards))
    return placements


def transfers(placements: Sequence[Placement], arch: ModelArchitecture) -> Iterator[Transfer]:
    """List every slice that moves when the Hugging Face tensors are gathered."""
    for placement in placements:
        entry = placement.entry
        for index, rank in enumerate(placement.ranks):
            for piece in names.shard_slices(entry, arch, rank=index, ranks=placement.num_shards):
                yield Transfer(rank, entry.megatron, entry.tensors[piece.tensor], *piece[1:])


def _pp_ranks(arch: ModelArchitecture, layout: ParallelConfig) -> list[int]:
    """Pipeline rank of every layer; chunk c of pipeline rank p is virtual stage c * pp + p."""
    return [
        vp_stage % layout.pp
        for vp_stage, layers in enumerate(split_layers(arch.num_layers, layout.pp * layout.vpp))
        for _ in layers
    ]


def _pp_rank(entry: Entry, pp_rank_of: list[int], layout: ParallelConfig) -> int:
    if entry.layer is not None:
        return pp_rank_of[entry.layer]
    return 0 if entry.megatron.startswith("embedding.") else layout.pp - 1


def _check_even(entry: Entry, arch: ModelArchitecture, num_shards: int, key: str) -> None:
    if entry.kind == "replicated":
        return
    dim = 1 if entry.kind == "columns" else 0
    size = entry.shapes[0][dim]
    if entry.kind == "vocabulary":
        size = arch.padded_vocab_size
    elif entry.kind == "qkv":
        size = sum(full[0] for full in entry.shapes)
    if size % num_shards:
        raise ConfigError(
            f"actor.parallel.{key}={num_shards} does not divide the {size} rows or columns of {entry.megatron}"
        )
