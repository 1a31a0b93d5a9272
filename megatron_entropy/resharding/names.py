"""Names as data: which Hugging Face tensors a Megatron parameter is made of, and how they lie in it.

One `Rule` per parameter of a layer, one table per model family; a new family is one table. Functions here are pure
tensor arithmetic: `shard` cuts a rank's part out of Hugging Face tensors, `unshard` puts the ranks' parts together
again. Megatron's parameters are named with their global layer number; `{layer}` stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_entropy.architecture import ModelShape

Kind = Literal["whole", "rows", "columns", "vocabulary", "qkv", "gate_up"]
"""How a tensor is split over tensor-parallel ranks.

`whole`: not at all. `rows`: along dimension 0. `columns`: along dimension 1. `vocabulary`: rows, padded with zeros.
`qkv`: query, key and value heads fused, grouped by key/value head, then rows. `gate_up`: each rank holds its rows of
the gate above its rows of the up projection.
"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its name(s), the Hugging Face tensors it holds, how they are split.

    `aliases`: names the same parameter has under Transformer Engine's fused layers.
    """

    megatron: str
    tensors: tuple[str, ...]
    kind: Kind
    aliases: tuple[str, ...] = ()


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_DENSE = (
    Rule(
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        "whole",
        (_LAYER + "self_attention.linear_qkv.layer_norm_weight",),
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
        "qkv",
    ),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), "columns"),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        "whole",
        (_LAYER + "mlp.linear_fc1.layer_norm_weight",),
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), "columns"),
)

_QKV_BIAS = Rule(
    _LAYER + "self_attention.linear_qkv.bias", tuple(_HF_LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"), "qkv"
)
_QK_NORM = tuple(
    Rule(_LAYER + f"self_attention.{part}_layernorm.weight", (_HF_LAYER + f"self_attn.{part}_norm.weight",), "whole")
    for part in "qk"
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "llama": _ENDS + _DENSE,
    "qwen2": (*_ENDS, *_DENSE, _QKV_BIAS),
    "qwen3": _ENDS + _DENSE + _QK_NORM,
}
"""Rules of every family, end layers first."""


@dataclass(frozen=True)
class Entry:
    """A rule applied to one layer: full names, full shapes of the Hugging Face tensors."""

    megatron: str
    aliases: tuple[str, ...]
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind


def entries(shape: ModelShape) -> list[Entry]:
    """Every parameter of a model, in the order of its layers: embedding, layers, final norm, head."""
    rules = FAMILIES[shape.family]
    layered = [rule for rule in rules if "{layer}" in rule.megatron]
    embedding, final_norm, head = (rule for rule in rules if "{layer}" not in rule.megatron)
    result = [_entry(embedding, shape, 0)]
    for layer in range(shape.num_layers):
        result += [_entry(rule, shape, layer) for rule in layered]
    result.append(_entry(final_norm, shape, 0))
    return result if shape.tied_embeddings else [*result, _entry(head, shape, 0)]


def shard(entry: Entry, tensors: Sequence[Tensor], shape: ModelShape, *, rank: int, ranks: int, rows: int) -> Tensor:
    """A tensor-parallel rank's part of a parameter.

    Args:
        tensors: the full Hugging Face tensors of `entry.tensors`.
        rows: rows the rank's part has; only the padded vocabulary needs to be told.
    """
    if entry.kind == "whole":
        return tensors[0]
    if entry.kind == "columns":
        return tensors[0].chunk(ranks, dim=1)[rank]
    if entry.kind == "gate_up":
        return torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
    if entry.kind == "qkv":
        groups = shape.num_query_groups
        parts = [tensor.reshape(groups, -1, *tensor.shape[1:]).chunk(ranks)[rank] for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)
    part = tensors[0][rank * rows : (rank + 1) * rows]
    missing = rows - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


def unshard(entry: Entry, parts: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The Hugging Face tensors that the parts of all tensor-parallel ranks make up; the inverse of `shard`."""
    if entry.kind == "whole":
        return {entry.tensors[0]: parts[0]}
    if entry.kind == "columns":
        return {entry.tensors[0]: torch.cat(list(parts), dim=1)}
    if entry.kind == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(entry.tensors)}
    whole = torch.cat(list(parts))
    if entry.kind == "vocabulary":
        return {entry.tensors[0]: whole[: entry.shapes[0][0]]}
    groups = shape.num_query_groups
    grouped = whole.reshape(groups, -1, *whole.shape[1:])
    sizes = [rows[0] // groups for rows in entry.shapes]
    return {name: part.flatten(0, 1) for name, part in zip(entry.tensors, grouped.split(sizes, dim=1), strict=True)}


def match(entries_: Sequence[Entry], local: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Pair this rank's parameters with their entries, by name or alias.

    Args:
        local: this rank's parameters under global names.
    Returns:
        parameter name -> entry, in the order of `entries_`.
    """
    found = {}
    for entry in entries_:
        for name in (entry.megatron, *entry.aliases):
            if name in local:
                found[name] = entry
    unknown = set(local) - set(found)
    assert not unknown, f"parameters no rule covers: {sorted(unknown)}"
    return found


def layer_of(name: str) -> int | None:
    """The layer number in a parameter's name, or None for the end layers."""
    hit = re.search(r"layers\.(\d+)\.", name)
    return int(hit.group(1)) if hit else None


def _entry(rule: Rule, shape: ModelShape, layer: int) -> Entry:
    tensors = tuple(name.format(layer=layer) for name in rule.tensors)
    return Entry(
        megatron=rule.megatron.format(layer=layer),
        aliases=tuple(name.format(layer=layer) for name in rule.aliases),
        tensors=tensors,
        shapes=tuple(_tensor_shape(name, shape) for name in tensors),
        kind=rule.kind,
    )


def _tensor_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_query_groups * shape.head_dim
    part, field = name.split(".")[-2:]
    if part in ("q_proj", "k_proj", "v_proj"):
        rows = queries if part == "q_proj" else keys
        return (rows,) if field == "bias" else (rows, hidden)
    return {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (shape.ffn_size, hidden),
        "up_proj": (shape.ffn_size, hidden),
        "down_proj": (hidden, shape.ffn_size),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
    }.get(part, (hidden,))
