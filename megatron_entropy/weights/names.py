"""Names as data: which Hugging Face tensors a Megatron parameter is made of, and how they lie in it.

One `Rule` per parameter, one table per model family; a new family is one table. `pieces` says which rows (or columns)
of a Hugging Face tensor lie where in a rank's part of a parameter; everything that moves weights in either direction
follows it: `shard` and `unshard` here, the plan and the stream in the modules beside this one. Parameters are named
with their global layer and expert numbers; `{layer}` and `{expert}` stand for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import LoraConfig

Kind = Literal["whole", "columns", "vocabulary", "qkv", "gate_up"]
"""How a tensor is split over tensor-parallel ranks.

`whole`: not at all. `columns`: along dimension 1. `vocabulary`: rows, padded with zeros. `qkv`: query, key and value
heads fused, grouped by key/value head, then rows. `gate_up`: each rank holds its rows of the gate above its rows of
the up projection.
"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its name, the Hugging Face tensors it holds, how they are split.

    `aliases`: names the same parameter has under Transformer Engine's fused layers.
    """

    megatron: str
    tensors: tuple[str, ...]
    kind: Kind
    aliases: tuple[str, ...] = ()


PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module that has an adapter."""

_LAYER = "decoder.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."
_HF_LAYER = "model.layers.{layer}."
_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."

_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_ATTENTION = (
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
)
_MLP = (
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), "columns"),
)
_EXPERTS = (
    Rule(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), "whole"),
    Rule(
        _EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        "gate_up",
        (_LAYER + "mlp.experts.linear_fc1.weight{expert}",),
    ),
    Rule(
        _EXPERT + "linear_fc2.weight",
        (_HF_EXPERT + "down_proj.weight",),
        "columns",
        (_LAYER + "mlp.experts.linear_fc2.weight{expert}",),
    ),
)
_QKV_BIAS = Rule(
    _LAYER + "self_attention.linear_qkv.bias", tuple(_HF_LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"), "qkv"
)
_QK_NORM = tuple(
    Rule(_LAYER + f"self_attention.{part}_layernorm.weight", (_HF_LAYER + f"self_attn.{part}_norm.weight",), "whole")
    for part in "qk"
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "llama": _ENDS + _ATTENTION + _MLP,
    "qwen2": (*_ENDS, *_ATTENTION, *_MLP, _QKV_BIAS),
    "qwen3": _ENDS + _ATTENTION + _MLP + _QK_NORM,
    "qwen3_moe": _ENDS + _ATTENTION + _EXPERTS + _QK_NORM,
}
"""Rules of every family, end layers first."""


@dataclass(frozen=True)
class Entry:
    """A rule applied to one layer (and expert): full names, full shapes of the Hugging Face tensors."""

    megatron: str
    aliases: tuple[str, ...]
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind
    layer: int | None = None
    expert: int | None = None


class Piece(NamedTuple):
    """`length` rows (`dim` 0) or columns (1) that a rank's part of a parameter shares with a Hugging Face tensor."""

    tensor: int
    """Which of the entry's tensors."""
    dim: int
    part_start: int
    whole_start: int
    length: int


def entries(arch: ModelArchitecture) -> list[Entry]:
    """Every parameter of a model, in the order of its layers: embedding, layers, final norm, head."""
    rules = FAMILIES[arch.family]
    layered = [rule for rule in rules if "{layer}" in rule.megatron]
    embedding, final_norm, head = (rule for rule in rules if "{layer}" not in rule.megatron)
    experts = range(arch.moe.num_experts) if arch.moe else range(0)
    result = [_entry(embedding, arch, None, None)]
    for layer in range(arch.num_layers):
        result += [_entry(rule, arch, layer, None) for rule in layered if "{expert}" not in rule.megatron]
        result += [_entry(rule, arch, layer, e) for e in experts for rule in layered if "{expert}" in rule.megatron]
    result.append(_entry(final_norm, arch, None, None))
    return result if arch.tied_embeddings else [*result, _entry(head, arch, None, None)]


def adapter_entries(arch: ModelArchitecture, lora: LoraConfig) -> list[Entry]:
    """Every part of LoRA's adapters, under the names PEFT gives them; in the order of the layers.

    Megatron's fused layers have one `down` for two or three modules of Hugging Face, and PEFT one for each: it comes
    once for each of them.
    """
    linears, rank = lora.linears(arch), lora.rank
    result = []
    for entry in entries(arch):
        layer, _, parameter = entry.megatron.rpartition(".")
        if parameter != "weight" or layer.rpartition(".")[2] not in linears or entry.expert is not None:
            continue
        modules = [f"{PEFT_PREFIX}{tensor.removesuffix('.weight')}" for tensor in entry.tensors]
        by_columns = entry.kind == "columns"
        for module, (_, columns) in zip(modules, entry.shapes, strict=True):
            down: Kind = "columns" if by_columns else "whole"
            names, shapes = (f"{module}.lora_A.weight",), ((rank, columns),)
            result.append(Entry(f"{layer}_lora.down", (), names, shapes, down, entry.layer))
        names = tuple(f"{module}.lora_B.weight" for module in modules)
        shapes = tuple((rows, rank) for rows, _ in entry.shapes)
        up = "whole" if by_columns else entry.kind
        result.append(Entry(f"{layer}_lora.up", (), names, shapes, up, entry.layer))
    return result


def with_tied_head(all_entries: list[Entry], arch: ModelArchitecture) -> list[Entry]:
    """With tied embeddings the last pipeline stage holds a copy of the embedding under the head's name."""
    if not arch.tied_embeddings:
        return all_entries
    embedding = all_entries[0]
    copy = Entry("output_layer.weight", (), embedding.tensors, embedding.shapes, embedding.kind)
    return [*all_entries, copy]


def pieces(entry: Entry, arch: ModelArchitecture, *, rank: int, ranks: int) -> Iterator[Piece]:
    """What a tensor-parallel rank's part of a parameter is made of, in the order of its rows or columns.

    Together the pieces of all ranks cover every element of the Hugging Face tensors exactly once, but for `whole`,
    of which every rank holds all. Padding of the vocabulary belongs to no piece.
    """
    rows = entry.shapes[0][0]
    if entry.kind == "whole":
        yield Piece(0, 0, 0, 0, rows)
    elif entry.kind == "columns":
        width = entry.shapes[0][1] // ranks
        yield Piece(0, 1, 0, rank * width, width)
    elif entry.kind == "gate_up":
        height = rows // ranks
        for tensor in range(2):
            yield Piece(tensor, 0, tensor * height, rank * height, height)
    elif entry.kind == "vocabulary":
        height = arch.padded_vocab_size // ranks
        if (length := min(height, rows - rank * height)) > 0:
            yield Piece(0, 0, 0, rank * height, length)
    else:
        yield from _qkv_pieces(entry, arch, rank, ranks)


def _qkv_pieces(entry: Entry, arch: ModelArchitecture, rank: int, ranks: int) -> Iterator[Piece]:
    """The fused rows are cut evenly, also where ranks outnumber the key/value heads and a cut falls inside a group."""
    groups = arch.num_query_groups
    heights = [full[0] // groups for full in entry.shapes]
    height = sum(heights) * groups // ranks
    begin, end = rank * height, (rank + 1) * height
    for group in range(begin // sum(heights), -(-end // sum(heights))):
        row = group * sum(heights)
        for tensor, rows in enumerate(heights):
            first, last = max(row, begin), min(row + rows, end)
            if first < last:
                yield Piece(tensor, 0, first - begin, group * rows + first - row, last - first)
            row += rows


def part_shape(entry: Entry, arch: ModelArchitecture, *, ranks: int) -> tuple[int, ...]:
    """Shape of a tensor-parallel rank's part of a parameter."""
    first = entry.shapes[0]
    if entry.kind == "whole":
        return first
    if entry.kind == "columns":
        return (first[0], first[1] // ranks)
    rows = arch.padded_vocab_size if entry.kind == "vocabulary" else sum(full[0] for full in entry.shapes)
    return (rows // ranks, *first[1:])


def shard(entry: Entry, tensors: Sequence[Tensor], arch: ModelArchitecture, *, rank: int, ranks: int) -> Tensor:
    """A tensor-parallel rank's part of a parameter, made from the full Hugging Face tensors of `entry.tensors`."""
    part = tensors[0].new_zeros(part_shape(entry, arch, ranks=ranks))
    for piece in pieces(entry, arch, rank=rank, ranks=ranks):
        whole = tensors[piece.tensor].narrow(piece.dim, piece.whole_start, piece.length)
        part.narrow(piece.dim, piece.part_start, piece.length).copy_(whole)
    return part


def unshard(entry: Entry, parts: Sequence[Tensor], arch: ModelArchitecture) -> dict[str, Tensor]:
    """The Hugging Face tensors that the parts of all tensor-parallel ranks make up; the inverse of `shard`.

    Args:
        parts: in the order of the ranks; one is enough where the kind is `whole`.
    """
    tensors = [torch.empty(full, dtype=parts[0].dtype, device=parts[0].device) for full in entry.shapes]
    for rank, part in enumerate(parts):
        for piece in pieces(entry, arch, rank=rank, ranks=len(parts)):
            whole = tensors[piece.tensor].narrow(piece.dim, piece.whole_start, piece.length)
            whole.copy_(part.narrow(piece.dim, piece.part_start, piece.length))
    return dict(zip(entry.tensors, tensors, strict=True))


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


def _entry(rule: Rule, arch: ModelArchitecture, layer: int | None, expert: int | None) -> Entry:
    tensors = tuple(name.format(layer=layer, expert=expert) for name in rule.tensors)
    return Entry(
        megatron=rule.megatron.format(layer=layer, expert=expert),
        aliases=tuple(name.format(layer=layer, expert=expert) for name in rule.aliases),
        tensors=tensors,
        shapes=tuple(_tensor_shape(name, arch) for name in tensors),
        kind=rule.kind,
        layer=layer,
        expert=expert,
    )


def _tensor_shape(name: str, arch: ModelArchitecture) -> tuple[int, ...]:
    hidden, queries = arch.hidden_size, arch.num_heads * arch.head_dim
    keys = arch.num_query_groups * arch.head_dim
    columns = arch.moe.ffn_size if arch.moe else arch.ffn_size
    part, field = name.split(".")[-2:]
    if part in ("q_proj", "k_proj", "v_proj"):
        rows = queries if part == "q_proj" else keys
        return (rows,) if field == "bias" else (rows, hidden)
    return {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "o_proj": (hidden, queries),
        "gate": (arch.moe.num_experts if arch.moe else 0, hidden),
        "gate_proj": (columns, hidden),
        "up_proj": (columns, hidden),
        "down_proj": (hidden, columns),
        "q_norm": (arch.head_dim,),
        "k_norm": (arch.head_dim,),
    }.get(part, (hidden,))
