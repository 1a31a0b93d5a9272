"""Rotary frequencies as `config.json` defines them: default, linear, llama3 and yarn scaling."""

from __future__ import annotations

import math

import torch

from megatron_entropy.config.architecture import ModelArchitecture


def rotary_frequencies(arch: ModelArchitecture) -> tuple[torch.Tensor, float]:
    """Compute the inverse frequencies of the rotary embedding and the scale of its sines and cosines.

    Args:
        arch: `rope_kind` and `rope_scaling` choose and parametrise the scaling.
    Returns:
        `[head_dim / 2]` float32 inverse frequencies (radians per position), and the attention factor: scores are
        multiplied by its square.
    Source:
        Su et al. 2021 (default); Chen et al. 2023 (linear); Llama 3.1's release (llama3); Peng et al. 2023, eq. 17-24
        (yarn). Checked against transformers' `ROPE_INIT_FUNCTIONS`.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / arch.rope_theta**exponents
    scaling = arch.rope_scaling
    if arch.rope_kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if arch.rope_kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if arch.rope_kind == "yarn":
        return _yarn(frequencies, arch)
    return frequencies, 1.0


def _llama3(frequencies: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """Stretch long waves by `factor`, keep short ones, interpolate between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep)


def _yarn(frequencies: torch.Tensor, arch: ModelArchitecture) -> tuple[torch.Tensor, float]:
    """Stretch by `factor`, less for dimensions that turn more often within the original context."""
    scaling = arch.rope_scaling
    original = scaling.get("original_max_position_embeddings") or arch.max_positions
    factor = scaling["factor"]

    def dimension_of(turns: float) -> float:
        return arch.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.head_dim - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or _yarn_attention_factor(scaling, factor)
    return frequencies * keep + frequencies / factor * (1 - keep), attention_factor


def _yarn_attention_factor(scaling: dict[str, float], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
