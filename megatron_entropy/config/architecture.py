"""Read a model's architecture from the `config.json` of its folder.

Covers the architectures of `FAMILIES`: Qwen2/Qwen2.5, Qwen3, Qwen3-MoE and Llama-3. This module imports neither torch
nor transformers, so a configuration is checked in a moment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_entropy.errors import ModelError
from megatron_entropy.files import read_json

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

MAX_EXPERTS = 2**17
"""Largest number of experts in all layers together."""


@dataclass(frozen=True)
class MoeArchitecture:
    """Sizes of the experts of each layer.

    `experts_per_token`: experts that compute each token. `ffn_size`: columns of one expert. `normalise`: whether the
    routing weights of the chosen experts are scaled to sum to 1 (`norm_topk_prob`).
    """

    num_experts: int
    experts_per_token: int
    ffn_size: int
    normalise: bool


@dataclass(frozen=True)
class ModelArchitecture:
    """Sizes and switches of a decoder.

    `num_query_groups`: key/value heads. `vocab_size`: rows of the embedding in the folder, without Megatron's padding.
    `moe`: the experts that replace every layer's feed-forward block, or None; `ffn_size` is unused with experts.
    `rope_kind`: one of `ROPE_KINDS`. `rope_scaling`: its parameters, named as in `config.json`.
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
        """Rows of the embedding in Megatron, padding included."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        attention = self.head_dim * self.hidden_size * 2 * (self.num_heads + self.num_query_groups)
        attention += self.head_dim * (self.num_heads + 2 * self.num_query_groups) if self.qkv_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        feed_forward = 3 * self.hidden_size * self.ffn_size
        if self.moe:
            feed_forward = self.moe.num_experts * self.hidden_size * (3 * self.moe.ffn_size + 1)
        layer = attention + feed_forward + 2 * self.hidden_size
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


def split_layers(num_layers: int, num_pp_stages: int) -> list[range]:
    """Split the layers over the (virtual) pipeline stages, in order and as evenly as possible.

    Surplus layers go to the middle stages first, because the first stage also holds the embedding and the last the
    head.
    """
    by_load = [*range(1, num_pp_stages - 1), 0, num_pp_stages - 1][:num_pp_stages]
    counts = [num_layers // num_pp_stages] * num_pp_stages
    for pp_stage in by_load[: num_layers % num_pp_stages]:
        counts[pp_stage] += 1
    starts = [sum(counts[:pp_stage]) for pp_stage in range(num_pp_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def read_architecture(folder: str | Path, *, key: str = "model.path") -> ModelArchitecture:
    """Read the architecture from `folder/config.json`.

    Args:
        folder: the model folder.
        key: the configuration key that names the folder, for messages.
    Raises:
        ModelError: a missing folder or key, a wrong type or size, an unknown architecture, or a feature (activation,
            sliding window, rotary scaling, quantization) that the actor does not compute; the message names the file.
    """
    if not os.path.isdir(folder):
        found = "not a folder" if os.path.exists(folder) else "no such folder"
        raise ModelError(f"{key}: {found}: {folder}")
    path = Path(folder) / "config.json"
    if not os.path.lexists(path):
        raise ModelError(f"{path}: no such file; a model folder needs config.json and safetensors files")
    try:
        return _ModelFile.model_validate(read_json(path, ModelError)).architecture()
    except ValidationError as error:
        raise ModelError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    value = first["input"]
    found = type(value).__name__ if isinstance(value, dict | list) else repr(value)
    reason = first["msg"].replace("Input should be", "must be")
    return f"{key}: {reason}, found {found if len(found) < 60 else found[:60] + '...'}"


# Bounds far beyond any known model.
_Count = Annotated[int, Field(ge=1, le=2**14)]
_Size = Annotated[int, Field(ge=1, le=2**23)]
_Length = Annotated[int, Field(ge=1, le=2**30)]
_Positive = Annotated[float, Field(gt=0, le=1e12)]


class _Keys(BaseModel):
    """Keys of a JSON object: each value has exactly the named type, other keys and null values are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in raw.items() if value is not None}


class _Rope(_Keys):
    """`rope_parameters`, or the older `rope_scaling`."""

    rope_type: str = "default"
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] | None = None
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Length | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    attention_factor: _Positive | None = None
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    partial_rotary_factor: float = 1.0
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> _Rope:
        if self.rope_type not in ROPE_KINDS:
            raise ValueError(f"rotary scaling {self.rope_type[:60]!r} is not one of {', '.join(ROPE_KINDS)}")
        needed = {
            "linear": ("factor",),
            "yarn": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        for key in needed.get(self.rope_type, ()):
            if getattr(self, key) is None:
                raise ValueError(f"rotary scaling {self.rope_type} needs the key {key!r} beside rope_type")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.rope_type == "llama3" and low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor={low} must be below high_freq_factor={high}")
        if self.partial_rotary_factor != 1:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor} is not supported, only 1")
        return self


class _ModelFile(_Keys):
    """The keys of `config.json` that are read. Bounds are far beyond any known model."""

    architectures: Annotated[list[str], Field(min_length=1)]
    model_type: str = ""
    num_hidden_layers: _Count
    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    vocab_size: _Size
    max_position_embeddings: _Length
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: list[str] = []
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: object = None
    num_experts: _Count | None = None
    num_local_experts: _Count | None = None
    num_experts_per_tok: _Count | None = None
    moe_intermediate_size: _Size | None = None
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] = []
    decoder_sparse_step: int = 1

    @property
    def family(self) -> str:
        return FAMILIES[self.architectures[0]]

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of the rotary embedding from both of its keys."""
        merged = {**(self.rope_scaling or {}), **(self.rope_parameters or {})}
        return {key: value for key, value in merged.items() if value is not None}

    @model_validator(mode="before")
    @classmethod
    def _check_architecture(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Name an unknown architecture before the keys that it lacks."""
        names = raw.get("architectures") or ["(none)"]
        if isinstance(names, list) and isinstance(names[0], str) and names[0] not in FAMILIES:
            raise ValueError(f"architecture {names[0][:60]} is not one of {', '.join(FAMILIES)}")
        return raw

    @model_validator(mode="after")
    def _check_features(self) -> _ModelFile:
        if self.model_type not in ("", self.family):
            raise ValueError(f"model_type={self.model_type[:60]} does not belong to {self.architectures[0]}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act[:60]} is not supported, only silu")
        if self.use_sliding_window and (self.sliding_window or 2**30) < self.max_position_embeddings:
            raise ValueError("use_sliding_window=true is not supported")
        if self.mlp_bias or (self.family != "qwen2" and self.attention_bias):
            raise ValueError(f"attention_bias/mlp_bias=true is not supported for {self.architectures[0]}")
        if self.quantization_config is not None:
            raise ValueError("quantization_config: quantized weights are not supported; use the original model")
        if self.family == "qwen3_moe" and (self.mlp_only_layers or self.decoder_sparse_step != 1):
            raise ValueError("mlp_only_layers/decoder_sparse_step: every layer must have experts")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> _ModelFile:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; set head_dim"
            )
        if (head_dim := self.head_dim or self.hidden_size // heads) % 2:
            raise ValueError(f"head_dim={head_dim} must be even")
        if self.family == "qwen3_moe":
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                if getattr(self, key) is None and not (key == "num_experts" and self.num_local_experts):
                    raise ValueError(f"key {key!r} is missing")
            if self.num_hidden_layers * self._num_experts > MAX_EXPERTS:
                raise ValueError(f"{self._num_experts} experts in each of {self.num_hidden_layers} layers are too many")
            if self._num_experts < (per_token := self.num_experts_per_tok or 0):
                raise ValueError(f"num_experts_per_tok={per_token} is more than the {self._num_experts} experts")
        return self

    @property
    def _num_experts(self) -> int:
        return self.num_experts or self.num_local_experts or 0

    def architecture(self) -> ModelArchitecture:
        """Return the values under the names of this project.

        Raises:
            ValidationError: wrong parameters of the rotary embedding.
        """
        rope = {"rope_theta": self.rope_theta, "rope_type": self.rope.get("type", "default"), **self.rope}
        checked = _Rope.model_validate(rope)
        moe = None
        if self.family == "qwen3_moe":
            assert self.num_experts_per_tok and self.moe_intermediate_size, "checked above"
            moe = MoeArchitecture(
                num_experts=self._num_experts,
                experts_per_token=self.num_experts_per_tok,
                ffn_size=self.moe_intermediate_size,
                normalise=self.norm_topk_prob,
            )
        return ModelArchitecture(
            architecture=self.architectures[0],
            family=self.family,
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            ffn_size=self.intermediate_size,
            num_heads=self.num_attention_heads,
            num_query_groups=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            vocab_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=checked.rope_theta or self.rope_theta,
            rope_kind=checked.rope_type,
            rope_scaling=self.rope,
            tied_embeddings=self.tie_word_embeddings,
            qkv_bias=self.family == "qwen2",
            qk_norm=self.family in ("qwen3", "qwen3_moe"),
            moe=moe,
        )
