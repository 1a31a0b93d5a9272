"""Mathematical equality of the answers in two responses, by math-verify; it may hang, so `RewardPool` runs it."""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

from megatron_entropy.records import Grade
from megatron_entropy.rewards.symbolic import TAIL


def same_answer(left: str, right: str) -> Grade:
    """Grade whether two responses give mathematically equal answers.

    Returns:
        `correct`: whether they are equal. `extracted`: the answer in `left`, or None if there is none.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limits
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    options: dict[str, Any] = {"extraction_config": targets, "parsing_timeout": None, "raise_on_error": True}
    found = parse(left[-TAIL:], **options)
    if not found:
        return Grade(False)
    if left == right:
        return Grade(True, str(found[-1]))
    other = parse(right[-TAIL:], **options)
    limits: dict[str, Any] = {"timeout_seconds": None, "raise_on_error": True}
    # `verify` takes its first argument for the ground truth, which makes a difference for sets and relations.
    is_equal = bool(other) and (verify(found, other, **limits) or verify(other, found, **limits))
    return Grade(bool(is_equal), str(found[-1]))


if multiprocessing.parent_process() is not None:
    same_answer("$1$", "$2$")  # in a worker: imports and caches belong to its start, not to the first answer
