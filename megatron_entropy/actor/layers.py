"""Layers that Megatron-Core's local spec lacks, for packed sequences and sequence parallelism.

They are used wherever Transformer Engine is not (always on a CPU). Plain PyTorch, correct on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
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


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, plus the positions of each sequence for `PackedAttention`.

    `buckets`: one `(padded, kept, positions)` per group of sequences of similar length: `padded` [S, L] positions in
    the pack of each sequence's tokens (a valid position is repeated as padding), `kept` [m] flat indices of `padded`
    that are tokens, `positions` [m] of these tokens in the pack.
    """

    buckets: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def describe_sequences(boundaries: Tensor, edges: Sequence[int], *, buckets: bool) -> PackedSequences:
    """Describe a pack to Megatron's layers.

    Args:
        boundaries: [S + 1] int32, the start of each sequence and the end of the last.
        edges: the same on the host, so that no device is waited for.
        buckets: fill `buckets`, which Transformer Engine's attention does not read.
    """
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    longest = max(lengths)
    by_size: dict[int, list[int]] = {}
    for index, length in enumerate(lengths if buckets else ()):
        by_size.setdefault(max(length - 1, 0).bit_length(), []).append(index)
    described = [
        _bucket(torch.tensor([edges[i] for i in members]), torch.tensor([lengths[i] for i in members]))
        for members in by_size.values()
    ]
    device = boundaries.device
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=[(padded.to(device), kept.to(device), at.to(device)) for padded, kept, at in described],
    )


def _bucket(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(int(lengths.max()))
    padded = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    kept = (offsets < lengths[:, None]).flatten().nonzero().squeeze(1)
    return padded, kept, padded.flatten()[kept]


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a pack; sequences of similar length share one SDPA call.

    Lengths within a call differ by less than a factor of two, so at most half of a call is padding. Padding follows
    each sequence, so the causal mask hides it from all tokens.
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
        assert config.context_parallel_size == 1, "checked by configuration: cp needs Transformer Engine"
        self.softmax_scale = softmax_scale

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
        if query.dtype == torch.bfloat16 and not query.is_cuda:
            # On a CPU torch's backward in bfloat16 takes three times that in float32 below some hundred tokens.
            query, key, value = query.float(), key.float(), value.float()
        for padded, kept, positions in packed_seq_params.buckets:
            rows = [x.reshape(total, -1).index_select(0, padded.flatten()) for x in (query, key, value)]
            q, k, v = (x.view(*padded.shape, -1, dim).transpose(1, 2) for x in rows)
            attended = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            tokens = attended.transpose(1, 2).reshape(-1, heads * dim).index_select(0, kept)
            out = out.index_copy(0, positions, tokens.to(out.dtype))
        return out.unsqueeze(1)
