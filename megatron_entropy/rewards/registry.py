"""The verifiers by name. To add one: a function `(response, answer) -> Grade` and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_entropy.errors import ConfigError
from megatron_entropy.records import Grade
from megatron_entropy.rewards.dapo import dapo
from megatron_entropy.rewards.strings import boxed, choice, final_marker
from megatron_entropy.rewards.symbolic import math_verify

Verifier = Callable[[str, str], Grade]

VERIFIERS: dict[str, Verifier] = {
    "boxed": boxed,
    "choice": choice,
    "dapo": dapo,
    "final_marker": final_marker,
    "math_verify": math_verify,
}

INLINE = frozenset({"boxed", "choice", "dapo", "final_marker"})
"""Verifiers that can neither hang nor crash: string scans of linear time, a thousand answers in milliseconds."""


def load_verifier(name: str) -> Verifier:
    """The verifier of this name, or the user's own one written as `package.module:function`.

    Raises:
        ConfigError: an unknown name (the known ones are listed), or a module or function that cannot be imported.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(sorted(VERIFIERS))
        raise ConfigError(f"unknown verifier {name!r}: use one of {known}, or package.module:function")
    try:
        found: Verifier = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"verifier {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"verifier {name!r} is not a function (response, answer) -> Grade")
    return found
