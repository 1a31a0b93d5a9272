"""Symbolic equivalence by math-verify. It may hang or exhaust memory, so `RewardPool` runs it in workers."""

from __future__ import annotations

import logging

from megatron_entropy.records import Grade

EXTRACTED_LENGTH = 200  # characters of the parsed answer that are kept for the rollout dump


def math_verify(response: str, answer: str) -> Grade:
    r"""Grade whether the answer in a response equals the ground truth mathematically.

    math-verify finds the answer (a `\boxed{}` first, then other LaTeX, then plain expressions), and sympy compares it.
    Its own time limits are switched off: they use signal alarms, which work only in a main thread and do not
    interrupt compiled code. The pool kills the worker instead. A response without a mathematical answer is wrong.

    Raises:
        ValueError: math-verify finds nothing in the ground truth.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limits
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
