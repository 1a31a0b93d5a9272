"""Whether a machine can compute an FP8 recipe: the questions Transformer Engine asks, without a call of it.

Its own `is_fp8_available` and megatron-core's `get_fp8_recipe("delayed")` raise where there is no NVIDIA driver.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropy.config.fp8_recipes import RECIPES

Devices = Sequence[tuple[str, tuple[int, int]]]
"""Name and compute capability of each CUDA device."""


def recipe_problem(recipe: str, devices: Devices, cuda: str | None, transformer_engine: str | None) -> str:
    """Say in one line why this machine cannot compute a recipe and what to change; the empty text if it can.

    Args:
        recipe: one of `RECIPES`.
        devices: the CUDA devices.
        cuda: CUDA version of torch, None for a CPU build.
        transformer_engine: installed version, None if there is none.
    """
    from packaging.version import Version

    needed, setting = RECIPES[recipe], f"actor.fp8.recipe={recipe}"
    others = [name for name in RECIPES if name != recipe and not _refusing(name, devices)]
    instead = f"set it to {' or '.join(others)}" if others else "leave it out, or set actor.fp8.emulate=true"
    if transformer_engine is None:
        return f"{setting} needs the package transformer-engine, which is not installed; install it, or leave it out"
    if not devices or cuda is None:
        return f"{setting} needs a GPU, and this machine has none; leave it out, or set actor.fp8.emulate=true"
    if refusing := _refusing(recipe, devices):
        name, capability = refusing[0]
        return (
            f"{setting} needs a GPU of compute capability {_range(recipe)}, found {_dotted(capability)} ({name}); "
            f"{instead}"
        )
    if Version(transformer_engine) < Version(needed.transformer_engine):
        return (
            f"{setting} needs transformer-engine>={needed.transformer_engine}, found {transformer_engine}; "
            "update it, or leave the recipe out"
        )
    if Version(cuda) < Version(_dotted(needed.cuda)):
        newer = f"a torch for CUDA {_dotted(needed.cuda)} or newer"
        return f"{setting} needs {newer}, found {cuda}; update torch, or {instead}"
    return ""


def _refusing(recipe: str, devices: Devices) -> list[tuple[str, tuple[int, int]]]:
    needed = RECIPES[recipe]
    return [entry for entry in devices if not needed.first_capability <= entry[1] < needed.end_capability]


def _range(recipe: str) -> str:
    needed = RECIPES[recipe]
    above = f" and below {_dotted(needed.end_capability)}" if needed.end_capability < (99, 0) else ""
    return f"{_dotted(needed.first_capability)} or higher{above}"


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
