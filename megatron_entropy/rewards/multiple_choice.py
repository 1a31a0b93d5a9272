r"""Multiple choice as published evaluators score it: `multiple_choice` (MMLU-Pro) and `gpqa` (simple-evals).

They reproduce published numbers. `choice` (in `strings`) is stricter: it takes only letters that the response states
as its answer, which suits a reward; use these two to compare with other papers.
"""

from __future__ import annotations

import re

from megatron_entropy.records import Grade

ANSWER_IS = re.compile(r"answer is \(?([A-J])\)?")
ANSWER_COLON = re.compile(r"(?=[aA]nswer:\s*([A-J]))")  # a lookahead: in "answer: Answer: B" matches overlap
LETTER = re.compile(r"\b[A-J]\b")
ANSWER_LINE = re.compile(r"Answer[ \t]*:[ \t]*\$?([A-D])\$?", re.IGNORECASE)
TRUTH = re.compile(r"\(?([A-J])\)?\.?", re.IGNORECASE)


def multiple_choice(response: str, answer: str) -> Grade:
    r"""Grade a letter A to J by MMLU-Pro's three stages.

    The first stage that finds a letter decides: (1) the first `answer is (X)`, brackets optional; (2) in the first
    line with `Answer: X` or `answer: X`, the last of them; (3) the last capital letter A to J that stands alone. The
    third stage also takes the words "A" and "I", and the second one the first letter of a word (`Answer: Because`).

    Source: MMLU-Pro (arXiv 2406.01574), `evaluate_from_local.py` and `compute_accuracy.py` of its release, from the
    version on whose third stage asks for word boundaries. Differences: the release guesses at random if no stage finds
    a letter, which is wrong here (`extracted=None`); stages 2 and 3 take linear time. The release's API scripts remove
    `**` from a response beforehand; this function, like `evaluate_from_local.py`, does not.
    """
    return _grade(_mmlu_pro_letter(response), answer)


def gpqa(response: str, answer: str) -> Grade:
    """Grade the first `Answer: X` of a response, letters A to D, as simple-evals does for GPQA and MMLU.

    Case and blanks around the colon do not matter, the case of the letter does. Source: simple-evals, `common.py`
    (`ANSWER_PATTERN_MULTICHOICE`) and `gpqa_eval.py`.
    """
    found = ANSWER_LINE.search(response)
    return _grade(found[1] if found else None, answer)


def _grade(extracted: str | None, answer: str) -> Grade:
    truth = TRUTH.fullmatch(answer.strip())
    if truth is None:
        return Grade(None, error=f"the ground truth {answer[:40]!r} is not a letter from A to J")
    return Grade(extracted == truth[1].upper(), extracted)


def _mmlu_pro_letter(response: str) -> str | None:
    stated = ANSWER_IS.search(response)
    if stated:
        return stated[1]
    letter = None
    line_end = -1
    for found in ANSWER_COLON.finditer(response):  # the release searches `.*[aA]nswer:\s*([A-J])`
        if letter is None:
            line_end = response.find("\n", found.start())
        elif -1 < line_end < found.start():
            break
        letter = found[1]
    return letter or _last_letter(response)


def _last_letter(response: str) -> str | None:
    letter = None
    for found in LETTER.finditer(response):
        letter = found[0]
    return letter
