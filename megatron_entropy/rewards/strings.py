"""Verifiers that compare strings: `boxed`, `choice`, `final_marker`.

They take time linear in the length of the response and cannot crash, so they run in the caller's process (see
`registry.INLINE`). A response without an answer is wrong (`correct=False`, `extracted=None`). A ground truth that the
verifier cannot read is an error, never a wrong answer.
"""

from __future__ import annotations

import re

from megatron_entropy.records import Grade

BOX = re.compile(r"\\boxed\s*\{")
FRAMED_BOX = re.compile(r"\\fbox\s*\{")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|rm|bf)\b")
CHOICE_TAIL = 2000  # characters of a response in which `choice` looks for its phrase
CHOICE_ALONE = re.compile(r"\(?([A-J])(?:[.):].*)?", re.DOTALL | re.IGNORECASE)
BRACKETS = str.maketrans("", "", "{}$")
CHOICE_PHRASE = re.compile(
    r"\b[Aa](?:nswer|NSWER)\b(?:\s+(?:is|IS)\b)?\s?:?"
    r"(?P<between>(?:[\s*_$\\({\[]|(?:option|choice|boxed|text(?:bf|rm)?|math(?:bf|rm))\b){0,12})"
    r"(?P<letter>[A-J])(?![\w'])"
)


def boxed_content(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` (without one, of the last `\fbox{...}`), stripped.

    Braces are matched; if the last box is not closed, there is no answer. Source: CER's accuracy reward.
    """
    start = _last_box(text)
    return None if start is None else _until_closing_brace(text, start)


def _last_box(text: str) -> int | None:
    """Index at which the content of the last box begins."""
    for pattern in (BOX, FRAMED_BOX):
        starts = [match.end() for match in pattern.finditer(text)]
        if starts:
            return starts[-1]
    return None


def _until_closing_brace(text: str, start: int) -> str | None:
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def boxed(response: str, answer: str) -> Grade:
    r"""Grade by equality of the last `\boxed{...}` and the ground truth, both stripped.

    There is no mathematics: `\boxed{42.0}` is not `42`. Source: CER's release, `cer_manager.py`.
    """
    extracted = boxed_content(response)
    return Grade(extracted is not None and extracted == answer.strip(), extracted)


def choice(response: str, answer: str) -> Grade:
    r"""Grade multiple choice, letters A to J: compare the last answer that the response states with the true letter.

    A statement is a box that contains a letter (`\boxed{C}`, `\boxed{\text{(C)}}`, `\boxed{C. 12}`), or the
    word "answer" followed by a capital letter ("the answer is (C)", "Answer: **C**"). The later of the two
    counts. After "answer is", a bare `A` or `I` followed by another word is the English word, not a choice. A
    response that is only a letter counts as well. Letters that are only discussed do not.
    """
    truth = _single_choice(answer)
    if truth is None:
        return Grade(None, error=f"the ground truth {answer[:40]!r} is not a letter from A to J")
    extracted = _last_choice(response)
    return Grade(extracted == truth, extracted)


def _last_choice(response: str) -> str | None:
    tail = response[-CHOICE_TAIL:]
    if len(tail.strip()) <= len("(C)."):
        return _single_choice(tail)
    position, letter = -1, None
    for match in CHOICE_PHRASE.finditer(tail):
        if not _is_word(match, tail):
            position, letter = match.start(), match["letter"]
    start = _last_box(tail)
    if start is not None and start > position:
        letter = _single_choice(_until_closing_brace(tail, start) or "") or letter
    return letter


def _is_word(match: re.Match[str], text: str) -> bool:
    """Whether the "letter" of a phrase is the article "a" or the pronoun "I"."""
    bare = not match["between"].strip()
    return bare and match["letter"] in "AI" and re.match(r"\s+\w", text[match.end() :]) is not None


def _single_choice(text: str) -> str | None:
    r"""Return the letter that a short text consists of or begins with: `C`, `(c)`, `\text{C}`, `C. 12 apples`."""
    plain = TEXT_COMMAND.sub("", text).translate(BRACKETS).strip(" \t\n*")
    match = CHOICE_ALONE.fullmatch(plain)
    return match[1].upper() if match else None


def final_marker(response: str, answer: str) -> Grade:
    """Compare the text after the last `#` of the response, up to the end of its line, with the ground truth.

    Examples are `#### 1,234` and `#6`. In both texts a number loses its dollar sign, thousands commas, final full
    stop and trailing zeros after the point; other texts are compared unchanged. A ground truth with a `#` (a whole
    GSM8K solution) is read in the same way.
    """
    truth = _after_marker(answer) if "#" in answer else _plain_number(answer)
    extracted = _after_marker(response)
    return Grade(bool(extracted) and extracted == truth, extracted or None)


def _after_marker(text: str) -> str:
    _, marker, rest = text.rpartition("#")
    return _plain_number(rest.strip().partition("\n")[0]) if marker else ""


def _plain_number(text: str) -> str:
    text = text.strip()
    number = text.rstrip(".").replace("$", "").replace(",", "").strip()
    if not re.fullmatch(r"[+-]?\d+(\.\d*)?|[+-]?\.\d+", number):
        return text
    number = number.removeprefix("+")
    return number.rstrip("0").rstrip(".") if "." in number else number
