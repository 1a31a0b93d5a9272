"""Layers that Megatron-Core's local spec lacks, for packed sequences and sequence parallelism.

They are used wherever Transformer Engine is not (always on a CPU). Plain PyTorch, correct on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for Megatron: its gradient is partial under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension, statistics in fp32, as Hugging Face's Qwen and Llama do."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class Bucket(NamedTuple):
    """Pieces of sequences of similar length, which `PackedAttention` computes together.

    A piece is a whole sequence, or one chunk of it under context parallelism. Positions are those in the pack of this
    rank; valid ones are repeated as padding.
    """

    queries: Tensor  # [S, L] positions
    keys: Tensor  # [S, K] positions in the packs of all context parallel ranks, end to end
    mask: Tensor | None  # [S, 1, L, K] whether a query sees a key; None: L = K and the mask is causal
    kept: Tensor  # [m] flat indices of `queries` that are no padding
    positions: Tensor  # [m] their positions

    def to(self, device: torch.device) -> Bucket:
        """Return the bucket on a device."""
        return Bucket(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, plus the positions of each sequence for `PackedAttention`."""

    buckets: list[Bucket] = field(default_factory=list)


def describe_sequences(
    boundaries: Tensor, edges: Sequence[int], *, buckets: bool, cp_rank: int = 0, cp: int = 1
) -> PackedSequences:
    """Describe a pack to Megatron's layers.

    Args:
        boundaries: [S + 1] int32, the start of each sequence and the end of the last, in this rank's part of the pack.
        edges: the same on the host, so that no device is waited for.
        buckets: fill `buckets`, which Transformer Engine's attention does not read.
        cp_rank: this context parallel rank, out of `cp`; each holds the same number of tokens of every sequence.
    """
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    longest = cp * max(lengths)
    # Padding follows the tokens of its sequence, so the causal mask hides it: layers treat it as tokens.
    whole = boundaries * cp
    padded: Any = whole if cp > 1 else None  # Megatron's annotation lacks the None
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=[b.to(boundaries.device) for b in _buckets(edges, cp_rank, cp)] if buckets else [],
    )


def _buckets(edges: Sequence[int], cp_rank: int, cp: int) -> list[Bucket]:
    own = (cp_rank, 2 * cp - 1 - cp_rank) if cp > 1 else (0,)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, end in zip(edges, edges[1:], strict=False):
        length = (end - start) // len(own)
        for index in range(len(own)):
            found.setdefault((index, max(length - 1, 0).bit_length()), []).append((start, length))
    return [
        _bucket(*torch.tensor(members).T, second=bool(index), chunk=own[index], cp=cp, total=edges[-1])
        for (index, _), members in found.items()
    ]


def _bucket(starts: Tensor, lengths: Tensor, *, second: bool, chunk: int, cp: int, total: int) -> Bucket:
    """Describe the same chunk of some sequences.

    Args:
        starts: [S] of the sequences in this rank's part of the pack, of `total` tokens.
        lengths: [S] of a chunk of each.
        second: it is the second chunk that this rank holds of them.
        chunk: its number.
    """
    starts, lengths = starts[:, None], lengths[:, None]
    offsets = torch.arange(int(lengths.max()))
    queries = starts + second * lengths + torch.minimum(offsets, lengths - 1)
    kept = (offsets < lengths).flatten().nonzero().squeeze(1)
    positions = queries.flatten()[kept]
    if cp == 1:
        return Bucket(queries, queries, None, kept, positions)
    ends = (chunk + 1) * lengths
    visible = torch.arange(int(ends.max()))  # positions in the sequence, up to the end of the chunk
    mask = visible <= (chunk * lengths + offsets)[:, :, None]
    visible = torch.minimum(visible, ends - 1)
    chunks = visible // lengths
    is_second = chunks >= cp
    ranks = torch.where(is_second, 2 * cp - 1 - chunks, chunks)
    keys = ranks * total + starts + is_second * lengths + visible % lengths
    return Bucket(queries, keys, mask[:, None], kept, positions)


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a pack; sequences of similar length share one SDPA call.

    Lengths within a call differ by less than a factor of two, so at most half of a call is padding. Padding follows
    each sequence, so the causal mask hides it from all tokens. Context parallel ranks gather one another's keys and
    values; the backward pass adds up their gradients and gives each rank its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        assert pg_collection is not None, "from Megatron's attention layer"
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Compute causal attention within each sequence.

        Args:
            query: [T, heads, head_dim]; `key`, `value`: [T, query groups, head_dim].
            packed_seq_params: from `describe_sequences`.
        Returns:
            [T, 1, heads * head_dim].
        """
        assert packed_seq_params is not None, "the actor packs every batch"
        total, heads, dim = query.shape
        out = query.new_zeros(total, heads * dim)
        query, key, value = (x.reshape(total, -1) for x in (query, key, value))
        if query.dtype == torch.bfloat16 and not query.is_cuda:
            # On a CPU torch's backward in bfloat16 takes three times that in float32 below some hundred tokens.
            query, key, value = query.float(), key.float(), value.float()
        if self.cp_group.size() > 1:
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=self.cp_group)
            key, value = both.chunk(2, dim=1)
        for queries, keys, mask, kept, positions in packed_seq_params.buckets:
            rows = ((query, queries), (key, keys), (value, keys))
            q, k, v = (x.index_select(0, at.flatten()).view(*at.shape, -1, dim).transpose(1, 2) for x, at in rows)
            attended = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            tokens = attended.transpose(1, 2).reshape(-1, heads * dim).index_select(0, kept)
            out = out.index_copy(0, positions, tokens.to(out.dtype))
        return out.unsqueeze(1)
