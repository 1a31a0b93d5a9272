"""The table `actor.fp8` in megatron-core's names.

megatron-core 0.16 to 0.19 have the same names. Not run on a GPU.
"""

from __future__ import annotations

from typing import Any

from megatron_entropy.config.fp8 import AMAX_HISTORY, RECIPES, Fp8Config


def is_active(fp8: Fp8Config) -> bool:
    """Whether Transformer Engine computes in FP8; not where FP8 is emulated."""
    return bool(fp8.recipe) and not fp8.emulate


def model_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Return the FP8 settings of `TransformerConfig`; the head is no layer of it and stays in bfloat16."""
    if not is_active(fp8):
        return {}
    recipe = RECIPES[fp8.recipe]
    settings: dict[str, Any] = {}
    if fp8.first_layers_bf16 or fp8.last_layers_bf16:
        settings["first_last_layers_bf16"] = True
        settings["num_layers_at_start_in_bf16"] = fp8.first_layers_bf16
        settings["num_layers_at_end_in_bf16"] = fp8.last_layers_bf16
    if fp8.recipe == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": recipe.megatron, **settings}
    settings["fp8"] = recipe.format if fp8.format == "auto" else fp8.format
    settings["fp8_recipe"] = recipe.megatron
    settings["fp8_param"] = fp8.parameters
    if fp8.recipe == "delayed":
        settings["fp8_amax_history_len"] = AMAX_HISTORY
        settings["fp8_amax_compute_algo"] = "max"
    return settings
