"""Tables of names: which Hugging Face tensors a Megatron parameter is made of, and how it is sharded.

There is one `Rule` per parameter and one table per model family; a new family is one table. `shard_slices` says which
rows or columns of a Hugging Face tensor a rank's shard of a parameter holds. Everything that moves weights uses it:
`shard` and `unshard` here, `plan.py` and `source.py`. Parameters have their global layer and expert numbers in their
names; `{layer}` and `{expert}` stand for them in the tables. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import LoraConfig
from megatron_entropy.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["replicated", "columns", "vocabulary", "qkv", "gate_up"]
"""How a tensor is sharded over tensor-parallel ranks.

`replicated`: every rank holds all of it. `columns`: along dimension 1. `vocabulary`: by rows, padded with zeros. `qkv`:
query, key and value heads fused, grouped by key/value head, then by rows. `gate_up`: each rank holds its rows of the
gate above its rows of the up projection.
"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its name, the Hugging Face tensors it is made of, how it is sharded.

    `aliases`: names of the same parameter in Transformer Engine's fused layers.
    """

    megatron: str
    tensors: tuple[str, ...]
    kind: Kind
    aliases: tuple[str, ...] = ()


PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of the names of modules with adapters."""

LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's linear layers, in their order in a layer, and the Hugging Face modules that each of them fuses."""

_LAYER = "decoder.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."
_HF_LAYER = "model.layers.{layer}."
_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."

_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_ATTENTION = (
    Rule(
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        "replicated",
        (_LAYER + "self_attention.linear_qkv.layer_norm_weight",),
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{module}_proj.weight" for module in "qkv"),
        "qkv",
    ),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), "columns"),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        "replicated",
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
    Rule(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), "replicated"),
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
    _LAYER + "self_attention.linear_qkv.bias",
    tuple(_HF_LAYER + f"self_attn.{module}_proj.bias" for module in "qkv"),
    "qkv",
)
_QK_NORM = tuple(
    Rule(
        _LAYER + f"self_attention.{module}_layernorm.weight",
        (_HF_LAYER + f"self_attn.{module}_norm.weight",),
        "replicated",
    )
    for module in "qk"
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "llama": _ENDS + _ATTENTION + _MLP,
    "qwen2": (*_ENDS, *_ATTENTION, *_MLP, _QKV_BIAS),
    "qwen3": _ENDS + _ATTENTION + _MLP + _QK_NORM,
    "qwen3_moe": _ENDS + _ATTENTION + _EXPERTS + _QK_NORM,
}
"""Rules of every family: embedding, final norm and head first."""


@dataclass(frozen=True)
class Entry:
    """A rule applied to one layer (and expert): complete names, and full shapes of the Hugging Face tensors."""

    megatron: str
    aliases: tuple[str, ...]
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind
    layer: int | None = None
    expert: int | None = None


class ShardSlice(NamedTuple):
    """`length` rows (`dim` 0) or columns (`dim` 1) that a shard and a Hugging Face tensor have in common."""

    tensor: int
    """Index of the tensor in `Entry.tensors`."""
    dim: int
    shard_start: int
    """Index of the first row or column in the shard."""
    tensor_start: int
    """Index of the first row or column in the tensor."""
    length: int


def entries(arch: ModelArchitecture) -> list[Entry]:
    """List every parameter of a model in the order of its layers: embedding, layers, final norm, head."""
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


def lora_linears(lora: LoraConfig, arch: ModelArchitecture) -> list[str]:
    """List Megatron's names of the linear layers that get adapters; none where `lora.rank` is 0.

    Raises:
        ConfigError: for a target that the model does not have or that is an expert's, and for a module that Megatron
            fuses with others that are no targets.
    """
    if not lora.rank:
        return []
    known = {linear: modules for linear, modules in LINEARS.items() if arch.moe is None or "fc" not in linear}
    if lora.targets == ["all-linear"]:
        return list(known)
    allowed = [module for modules in known.values() for module in modules]
    if wrong := [target for target in lora.targets if target not in allowed]:
        of_experts = any(wrong[0] in modules for modules in LINEARS.values())
        what = "a part of the experts, which take no adapters" if of_experts else "no linear layer of the model"
        raise ConfigError(
            f"actor.lora.targets: {wrong[0]} is {what}; known are {', '.join(allowed)}, and all-linear alone"
        )
    if not lora.targets:
        raise ConfigError("actor.lora.targets is empty; all-linear is every layer, actor.lora.rank=0 is no LoRA")
    for modules in known.values():
        missing = [module for module in modules if module not in lora.targets]
        if 0 < len(missing) < len(modules):
            raise ConfigError(
                f"actor.lora.targets: {', '.join(modules)} share an adapter, because Megatron fuses them; add "
                f"{' and '.join(missing)}"
            )
    return [linear for linear, modules in known.items() if modules[0] in lora.targets]


def adapter_entries(arch: ModelArchitecture, lora: LoraConfig) -> list[Entry]:
    """List every tensor of LoRA's adapters in the order of the layers, under PEFT's names.

    An adapter of a fused layer has one `down` in Megatron. PEFT has one per Hugging Face module, so the same parameter
    is listed once per module.
    """
    linears, rank = lora_linears(lora, arch), lora.rank
    result = []
    for entry in entries(arch):
        layer, _, parameter = entry.megatron.rpartition(".")
        if parameter != "weight" or layer.rpartition(".")[2] not in linears or entry.expert is not None:
            continue
        modules = [f"{PEFT_PREFIX}{tensor.removesuffix('.weight')}" for tensor in entry.tensors]
        by_columns = entry.kind == "columns"
        for module, (_, columns) in zip(modules, entry.shapes, strict=True):
            down: Kind = "columns" if by_columns else "replicated"
            names, shapes = (f"{module}.lora_A.weight",), ((rank, columns),)
            result.append(Entry(f"{layer}_lora.down", (), names, shapes, down, entry.layer))
        names = tuple(f"{module}.lora_B.weight" for module in modules)
        shapes = tuple((rows, rank) for rows, _ in entry.shapes)
        up = "replicated" if by_columns else entry.kind
        result.append(Entry(f"{layer}_lora.up", (), names, shapes, up, entry.layer))
    return result


def with_tied_head(all_entries: list[Entry], arch: ModelArchitecture) -> list[Entry]:
    """Add the head's copy of tied embeddings, which the last pipeline stage holds under the head's name."""
    if not arch.tied_embeddings:
        return all_entries
    embedding = all_entries[0]
    copy = Entry("output_layer.weight", (), embedding.tensors, embedding.shapes, embedding.kind)
    return [*all_entries, copy]


def shard_slices(entry: Entry, arch: ModelArchitecture, *, rank: int, ranks: int) -> Iterator[ShardSlice]:
    """List what a tensor-parallel rank's shard of a parameter is made of, in the order of its rows or columns.

    The slices of all ranks cover every element of the Hugging Face tensors exactly once; of a `replicated` tensor each
    rank's slice is all of it. Padding of the vocabulary is in no slice.
    """
    rows = entry.shapes[0][0]
    if entry.kind == "replicated":
        yield ShardSlice(0, 0, 0, 0, rows)
    elif entry.kind == "columns":
        width = entry.shapes[0][1] // ranks
        yield ShardSlice(0, 1, 0, rank * width, width)
    elif entry.kind == "gate_up":
        height = rows // ranks
        for tensor in range(2):
            yield ShardSlice(tensor, 0, tensor * height, rank * height, height)
    elif entry.kind == "vocabulary":
        height = arch.padded_vocab_size // ranks
        if (length := min(height, rows - rank * height)) > 0:
            yield ShardSlice(0, 0, 0, rank * height, length)
    else:
        yield from _qkv_slices(entry, arch, rank, ranks)


def _qkv_slices(entry: Entry, arch: ModelArchitecture, rank: int, ranks: int) -> Iterator[ShardSlice]:
    """Cut the fused rows evenly; with more ranks than key/value heads a cut is inside a group."""
    groups = arch.num_query_groups
    heights = [full[0] // groups for full in entry.shapes]
    height = sum(heights) * groups // ranks
    begin, end = rank * height, (rank + 1) * height
    for group in range(begin // sum(heights), -(-end // sum(heights))):
        row = group * sum(heights)
        for tensor, rows in enumerate(heights):
            first, last = max(row, begin), min(row + rows, end)
            if first < last:
                yield ShardSlice(tensor, 0, first - begin, group * rows + first - row, last - first)
            row += rows


def shard_shape(entry: Entry, arch: ModelArchitecture, *, ranks: int) -> tuple[int, ...]:
    """Shape of a tensor-parallel rank's shard of a parameter."""
    first = entry.shapes[0]
    if entry.kind == "replicated":
        return first
    if entry.kind == "columns":
        return (first[0], first[1] // ranks)
    rows = arch.padded_vocab_size if entry.kind == "vocabulary" else sum(full[0] for full in entry.shapes)
    return (rows // ranks, *first[1:])


def shard(entry: Entry, tensors: Sequence[Tensor], arch: ModelArchitecture, *, rank: int, ranks: int) -> Tensor:
    """Make a tensor-parallel rank's shard of a parameter from the full Hugging Face tensors `entry.tensors`."""
    result = tensors[0].new_zeros(shard_shape(entry, arch, ranks=ranks))
    for tensor, dim, shard_start, tensor_start, length in shard_slices(entry, arch, rank=rank, ranks=ranks):
        result.narrow(dim, shard_start, length).copy_(tensors[tensor].narrow(dim, tensor_start, length))
    return result


def unshard(entry: Entry, shards: Sequence[Tensor], arch: ModelArchitecture) -> dict[str, Tensor]:
    """Make the full Hugging Face tensors from the shards of all tensor-parallel ranks; the inverse of `shard`.

    Args:
        shards: in the order of the ranks; one is enough for a `replicated` tensor.
    """
    tensors = [shards[0].new_empty(full) for full in entry.shapes]
    for rank, source in enumerate(shards):
        for tensor, dim, shard_start, tensor_start, length in shard_slices(entry, arch, rank=rank, ranks=len(shards)):
            tensors[tensor].narrow(dim, tensor_start, length).copy_(source.narrow(dim, shard_start, length))
    return dict(zip(entry.tensors, tensors, strict=True))


def match(entries_: Sequence[Entry], local: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Find the entry of each of this rank's parameters, by name or alias.

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
    assert not unknown, f"parameters without a rule: {sorted(unknown)}"
    return found


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
    module, field = name.split(".")[-2:]
    if module in ("q_proj", "k_proj", "v_proj"):
        rows = queries if module == "q_proj" else keys
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
    }.get(module, (hidden,))
