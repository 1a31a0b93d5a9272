"""The verifiers by name.

A verifier is a function `(response, answer) -> Grade` (or a bool). To use your own, set `reward.verifier` to
`package.module:NAME`, or register it as an entry point of the group `megatron_entropy.verifiers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

from megatron_entropy.errors import ConfigError
from megatron_entropy.plugins import load_plugin
from megatron_entropy.records import Grade
from megatron_entropy.rewards.dapo import dapo
from megatron_entropy.rewards.gsm8k import gsm8k_flexible, gsm8k_strict
from megatron_entropy.rewards.math_equal import math_equal
from megatron_entropy.rewards.minerva import minerva
from megatron_entropy.rewards.multiple_choice import gpqa, multiple_choice
from megatron_entropy.rewards.oat import curiosft, curiosft_think, oat
from megatron_entropy.rewards.olympiad import olympiad
from megatron_entropy.rewards.opencompass import opencompass_v2
from megatron_entropy.rewards.reasoning_gym import reasoning_gym
from megatron_entropy.rewards.strings import boxed, cer_eval, choice, final_marker
from megatron_entropy.rewards.symbolic import math_verify

Verifier = Callable[[str, str], Grade]

VERIFIERS: dict[str, Verifier] = {
    "boxed": boxed,
    "cer_eval": cer_eval,
    "choice": choice,
    "curiosft": curiosft,
    "curiosft_think": curiosft_think,
    "dapo": dapo,
    "final_marker": final_marker,
    "gpqa": gpqa,
    "gsm8k_flexible": gsm8k_flexible,
    "gsm8k_strict": gsm8k_strict,
    "math_equal": math_equal,
    "math_verify": math_verify,
    "minerva": minerva,
    "multiple_choice": multiple_choice,
    "oat": oat,
    "olympiad": olympiad,
    "opencompass_v2": opencompass_v2,
    "reasoning_gym": reasoning_gym,
}

INLINE = frozenset(
    "boxed cer_eval choice dapo final_marker gpqa gsm8k_flexible gsm8k_strict multiple_choice opencompass_v2".split()
)
"""Verifiers that can neither hang nor crash (string scans in linear time). They run in the caller's process."""

SYMBOLIC = frozenset("curiosft curiosft_think math_equal math_verify minerva oat olympiad".split())
"""Verifiers that load sympy or mpmath with their first formula, which takes a second."""

COMPARISON = "megatron_entropy.rewards.same_answer:same_answer"
"""Compares the answers of two responses; a verifier for `semantic_entropy`, not for training."""


def load_verifier(name: str) -> Verifier:
    """Find a verifier: a name of `VERIFIERS`, an entry point of `megatron_entropy.verifiers`, or `package.module:NAME`.

    Raises:
        ConfigError: an unknown name (the known ones are listed), a failing import, or not a function of two arguments.
    """
    found = load_plugin(name, VERIFIERS, key="reward.verifier", group="megatron_entropy.verifiers")
    if not callable(found):
        raise ConfigError(f"reward.verifier: {name!r} is not a function (response, answer) -> Grade")
    try:
        inspect.signature(found).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(
            f"reward.verifier: {name!r} must be callable as (response, answer); its call fails: {error}"
        ) from error
    except ValueError:  # a compiled function without a signature
        pass
    return cast(Verifier, found)
