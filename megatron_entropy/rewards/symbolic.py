"""Symbolic equivalence by math-verify. It may hang or exhaust memory: run it through `RewardPool`."""

from __future__ import annotations

import logging

from megatron_entropy.records import Grade

EXTRACTED_LENGTH = 200  # characters of the parsed answer that are kept for the rollout dump


def math_verify(response: str, answer: str) -> Grade:
    r"""Whether the answer found in a response equals the ground truth mathematically.

    math-verify finds the answer (a `\boxed{}` first, then other LaTeX, then plain expressions), sympy compares it.
    Its own limits are signal alarms, which neither work outside a main thread nor interrupt compiled code; they are
    switched off, the pool kills the worker instead. A response without a mathematical answer is wrong.

    Raises:
        ValueError: the ground truth holds nothing that math-verify can read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    options = {"extraction_config": targets, "parsing_timeout": None, "raise_on_error": True}
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", **options)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {answer[:60]!r}")
    found = parse(response, **options)
    if not found:
        return Grade(False)
    correct = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return Grade(bool(correct), str(found[-1])[:EXTRACTED_LENGTH])
