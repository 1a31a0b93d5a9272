"""Symbolic equivalence by math-verify. It may hang or exhaust memory, so `RewardPool` runs it in workers."""

from __future__ import annotations

import logging
import re

from megatron_entropy.records import Grade

TAIL = 50_000  # only the last characters of a response are read
HAS_LATEX = re.compile(r"(?<!\\)\$|\\boxed")  # of a ground truth; `\$18` is money, not LaTeX between dollar signs
EXTRACTED_LENGTH = 200  # characters of the parsed answer that are kept for the rollout dump


def math_verify(response: str, answer: str) -> Grade:
    r"""Grade whether the answer in a response equals the ground truth mathematically.

    math-verify finds the answer (a `\boxed{}` first, then other LaTeX, then plain expressions), and sympy compares it.
    Its own time limits are switched off: they use signal alarms, which work only in a main thread and do not
    interrupt compiled code. The pool kills the worker instead. A response without a mathematical answer is wrong.
    An answer with the text of the ground truth is right, even if its value is not a finite number (`12:00`).

    Raises:
        ValueError: math-verify finds nothing in the ground truth, or fails on the comparison.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limits
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    options = {"extraction_config": targets, "parsing_timeout": None, "raise_on_error": True}
    try:
        gold = parse(answer if HAS_LATEX.search(answer) else f"${answer}$", **options)
        found = parse(response[-TAIL:], **options) if gold else []
        is_same_text = bool(found) and found[-1] == gold[-1]
        correct = is_same_text or (found and verify(gold, found, timeout_seconds=None, raise_on_error=True))
        extracted = str(found[-1])[:EXTRACTED_LENGTH] if found else None
    except MemoryError:
        raise
    except Exception as error:  # whatever sympy raises
        raise ValueError(f"math-verify cannot compare the response with the ground truth {answer[:60]!r}") from error
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {answer[:60]!r}")
    return Grade(bool(correct), extracted)
