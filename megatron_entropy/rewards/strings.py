"""Verifiers that compare strings: `boxed`, `cer_eval`, `choice`, `final_marker`.

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
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?|[+-]?\.\d+")
CHOICE_RESPONSE = re.compile(r"(?:(?:option|choice)\s+)?.{0,4}", re.IGNORECASE)
CHOICE_ALONE = re.compile(r"(?:(?:option|choice)\s+)?\(?([A-J])(?:[.):].*)?", re.DOTALL | re.IGNORECASE)
BRACKETS = str.maketrans("", "", "{}$")
CHOICE_PHRASE = re.compile(
    r"\b(?:[Aa](?:nswer|NSWER)|[Cc]orrect (?:option|choice))\b(?:\s+(?:is|IS)\b)?\s?:?"
    r"(?P<between>(?:[\s*_$\\({\[]|(?:option|choice|boxed|text(?:bf|rm)?|math(?:bf|rm))\b){0,12})"
    r"(?P<letter>[A-J]|(?<=\()[a-j](?=\)))(?![\w'])"
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

    There is no mathematics: `\boxed{42.0}` and `\boxed{$42$}` are not `42`. Every brace counts, also in `\left\{`, and
    `\boxed 42` without braces is no box. Source: CER's release, `cer_manager.py`; its results depend on all this.
    """
    extracted = boxed_content(response)
    return Grade(extracted is not None and extracted == answer.strip(), extracted)


def cer_eval(response: str, answer: str) -> Grade:
    r"""Grade by equality of the ground truth and the text from the last `\boxed{` to the first `}` after it.

    Without a box the whole response counts. Nothing is stripped, and `\boxed{\frac{1}{2}}` has the answer `\frac{1`.
    Source: CER's release, `src/test_transformers.py`, which its published accuracies come from; `boxed` is its reward.
    """
    _, box, rest = response.rpartition("\\boxed{")
    extracted = rest.split("}", 1)[0] if box else None
    return Grade((response if extracted is None else extracted) == answer, extracted)


def choice(response: str, answer: str) -> Grade:
    r"""Grade multiple choice, letters A to J: compare the last answer that the response states with the true letter.

    A statement is a box that contains a letter (`\boxed{C}`, `\boxed{\text{(C)}}`, `\boxed{C. 12}`), or the
    words "answer" or "correct option" followed by a capital letter ("the answer is (C)", "Answer: **C**") or by a
    letter in round brackets ("Answer: (c)"). The later of the two counts. After "answer is", a bare `A` or `I` followed
    by another word than "because", "since" or "as" is the English word, not a choice; a bare lowercase letter may be a
    variable. A response that is only a letter or "Option B" counts as well. Letters that are only discussed do not.
    This suits a reward; `multiple_choice` and `gpqa` reproduce published accuracies.
    """
    truth = _single_choice(answer)
    if truth is None:
        return Grade(None, error=f"the ground truth {answer[:40]!r} is not a letter from A to J")
    extracted = _last_choice(response)
    return Grade(extracted == truth, extracted)


def _last_choice(response: str) -> str | None:
    tail = response[-CHOICE_TAIL:]
    if CHOICE_RESPONSE.fullmatch(tail.strip()):
        return _single_choice(tail)
    position, letter = -1, None
    for match in CHOICE_PHRASE.finditer(tail):
        if not _is_word(match, tail):
            position, letter = match.start(), match["letter"].upper()
    start = _last_box(tail)
    if start is not None and start > position:
        letter = _single_choice(_until_closing_brace(tail, start) or "") or letter
    return letter


def _is_word(match: re.Match[str], text: str) -> bool:
    """Whether the "letter" of a phrase is the article "a" or the pronoun "I"."""
    bare = not match["between"].strip()
    return (
        bare
        and match["letter"] in "AI"
        and re.match(r"\s+(?!(?:because|since|as)\b)\w", text[match.end() :]) is not None
    )


def _single_choice(text: str) -> str | None:
    r"""Return the letter that a short text consists of or begins with: `C`, `(c)`, `\text{C}`, `C. 12 apples`."""
    plain = TEXT_COMMAND.sub("", text).translate(BRACKETS).strip(" \t\n*")
    match = CHOICE_ALONE.fullmatch(plain)
    return match[1].upper() if match else None


def final_marker(response: str, answer: str) -> Grade:
    r"""Compare the text after the last `#` of the response, up to the end of its line, with the ground truth.

    Examples are `#### 1,234` and `#6`. In both texts a number loses its dollar sign, thousands commas, final full
    stop and superfluous zeros (`.50` is `0.5`); other texts are compared unchanged, also `**42**` and `\boxed{42}`.
    After `####`, words behind a number do not count (`#### 72 apples`) if the ground truth is a number. A ground truth
    with a `#` (a whole GSM8K solution) is read in the same way.
    """
    truth = _plain_number(_after_marker(answer)[0] if "#" in answer else answer)
    line, is_gsm8k = _after_marker(response)
    extracted = _plain_number(line)
    if is_gsm8k and line and NUMBER.fullmatch(truth):
        first = _plain_number(line.split(maxsplit=1)[0])
        extracted = first if NUMBER.fullmatch(first) else extracted
    return Grade(bool(extracted) and extracted == truth, extracted or None)


def _after_marker(text: str) -> tuple[str, bool]:
    """The line after the last `#`, or an empty text; and whether the marker is `####`."""
    before, marker, rest = text.rpartition("#")
    return (rest.strip().partition("\n")[0] if marker else ""), before.endswith("###")


def _plain_number(text: str) -> str:
    text = text.strip()
    number = text.rstrip(".").replace("$", "").replace(",", "").strip()
    if not NUMBER.fullmatch(number):
        return text
    whole, _, decimals = number.lstrip("+-").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return f"-{value}" if number.startswith("-") and value != "0" else value
