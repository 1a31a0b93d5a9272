"""What a model folder's `config.json` says, as numbers: the shape of a dense or mixture-of-experts decoder.

Covers the architectures of `FAMILIES`: Qwen2/Qwen2.5, Qwen3, Qwen3-MoE and Llama-3. Reads JSON only; importing this
imports no torch and no transformers, so that a configuration can be checked in a moment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_entropy.errors import ModelError

FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}
"""Hugging Face architecture name -> family."""

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary-frequency scaling that the actor reproduces."""

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this whatever the layout, so that checkpoints fit every layout."""


@dataclass(frozen=True)
class MoeArchitecture:
    """The experts of each layer: how many, how many a token visits, the columns of one.

    `normalise`: whether the weights of the chosen experts are scaled to sum to 1 (`norm_topk_prob`).
    """

    num_experts: int
    experts_per_token: int
    ffn_size: int
    normalise: bool


@dataclass(frozen=True)
class ModelArchitecture:
    """Sizes of a decoder; counts unless said otherwise.

    `num_query_groups`: key/value heads. `vocab_size`: rows of the embedding in the folder (no Megatron padding).
    `moe`: the experts that take the place of every layer's feed-forward block, or None; `ffn_size` is then unused.
    `rope_kind` is one of `ROPE_KINDS`; `rope_scaling` holds its parameters as `config.json` spells them.
    """

    architecture: str
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_kind: str
    rope_scaling: dict[str, Any] = field(hash=False)
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    moe: MoeArchitecture | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron, with padding."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones once."""
        attention = self.head_dim * self.hidden_size * 2 * (self.num_heads + self.num_query_groups)
        attention += self.head_dim * (self.num_heads + 2 * self.num_query_groups) if self.qkv_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        feed_forward = 3 * self.hidden_size * self.ffn_size
        if self.moe:
            feed_forward = self.moe.num_experts * self.hidden_size * (3 * self.moe.ffn_size + 1)
        layer = attention + feed_forward + 2 * self.hidden_size
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


def split_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each (virtual) pipeline stage, in order, as even as can be.

    What does not divide goes to the stages between the first and the last, which hold embedding and head besides.
    """
    by_burden = [*range(1, stages - 1), 0, stages - 1][:stages]
    counts = [num_layers // stages] * stages
    for stage in by_burden[: num_layers % stages]:
        counts[stage] += 1
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def read_architecture(folder: str | Path) -> ModelArchitecture:
    """Read `folder/config.json`.

    Raises:
        ModelError: naming the file, for a missing folder or key, an unknown architecture, or a feature
            (activation, sliding window, rotary scaling) that the actor does not compute.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ModelError(f"model.path: no such folder: {folder}")
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder needs config.json and safetensors files") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    architectures = raw.get("architectures") or ["(none)"]
    if architectures[0] not in FAMILIES:
        raise ModelError(f"{path}: architecture {architectures[0]} is not one of {', '.join(FAMILIES)}")
    try:
        return _shape(raw, architectures[0], path)
    except KeyError as error:
        raise ModelError(f"{path}: key {error.args[0]!r} is missing") from None


def _shape(raw: dict[str, Any], architecture: str, path: Path) -> ModelArchitecture:
    family = FAMILIES[architecture]
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act={raw['hidden_act']} is not supported, only silu")
    if (
        raw.get("use_sliding_window")
        and (raw.get("sliding_window") or raw["max_position_embeddings"]) < raw["max_position_embeddings"]
    ):
        raise ModelError(f"{path}: use_sliding_window=true is not supported")
    if raw.get("mlp_bias") or (family != "qwen2" and raw.get("attention_bias")):
        raise ModelError(f"{path}: attention_bias/mlp_bias=true is not supported for {architecture}")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(f"{path}: rotary scaling {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    if family == "qwen3_moe" and (raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1):
        raise ModelError(f"{path}: mlp_only_layers/decoder_sparse_step: only models with experts in every layer work")
    heads = raw["num_attention_heads"]
    return ModelArchitecture(
        architecture=architecture,
        family=family,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_size=raw["intermediate_size"],
        num_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        max_positions=raw["max_position_embeddings"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_kind=kind,
        rope_scaling=rope,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        moe=_moe(raw) if family == "qwen3_moe" else None,
    )


def _moe(raw: dict[str, Any]) -> MoeArchitecture:
    return MoeArchitecture(
        num_experts=raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        ffn_size=raw["moe_intermediate_size"],
        normalise=bool(raw.get("norm_topk_prob", False)),
    )
