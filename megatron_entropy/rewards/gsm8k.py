r"""GSM8K as lm-evaluation-harness scores it: `gsm8k_strict` and `gsm8k_flexible`, which are two different scores.

Source: `lm_eval/tasks/gsm8k/gsm8k.yaml` (version 3) and `lm_eval/filters/extraction.py`. The strict pattern comes from
the release of GSM8K (`grade_school_math/dataset.py`). Numbers are compared as texts after their normalisation, so
`18.00` is not `18`. Differences: a ground truth without a number is an error (the harness compares any text); text
before the ground truth's `####` may have any form.
"""

from __future__ import annotations

import re

from megatron_entropy.records import Grade

MARKED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
TRUTH = re.compile(r"-?(\d+(\.\d*)?|\.\d+)", re.ASCII)


def gsm8k_strict(response: str, answer: str) -> Grade:
    """Grade the first `#### NUMBER` of a response (strict-match).

    Exactly one blank stands between marker and number, as in the training solutions: `####18` and `#### $18` are no
    answers. The ground truth is a number or a whole solution that ends in `#### NUMBER`.
    """
    found = MARKED_NUMBER.search(response)
    return _grade(found[1] if found else None, answer)


def gsm8k_flexible(response: str, answer: str) -> Grade:
    """Grade the last number of a response (flexible-extract).

    A "number" may also consist of dollar signs, commas and full stops only: `... is 18 $$` has the last number `$$`.
    """
    number = None
    for found in ANY_NUMBER.finditer(response):
        number = found[0]
    return _grade(number, answer)


def _grade(number: str | None, answer: str) -> Grade:
    truth = _normalise(answer.replace("$", "").rpartition("#### ")[2].strip())
    if not TRUTH.fullmatch(truth):
        return Grade(None, error=f"the ground truth {answer[-40:]!r} is not a number and does not end in '#### NUMBER'")
    extracted = _normalise(number) if number else ""
    return Grade(extracted == truth, extracted or None)


def _normalise(number: str) -> str:
    """Remove commas, dollar signs and one final full stop (`regexes_to_ignore`)."""
    return number.replace(",", "").replace("$", "").removesuffix(".")
