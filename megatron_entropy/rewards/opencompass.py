r"""OpenCompass' MATHEvaluator in its version 2, the grader of SENT: string normalisation, nothing symbolic.

Source: `opencompass/datasets/math.py` (0.5.4): `math_postprocess_v2` finds the answer, `MATHEvaluator(version="v2")`
compares it. Its quirks are kept, since published numbers depend on them. Differences: an answer of more than
`LENGTH` characters counts as wrong, as normalising it may take quadratic time, and so does an empty one; a ground
truth that is empty, longer, or has a `\boxed` without content is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_entropy.records import Grade
from megatron_entropy.rewards.dapo import REMOVED, REPLACED
from megatron_entropy.rewards.math_equal import braced_fractions

LENGTH = 5_000  # characters of an answer that is compared
PHRASE = re.compile("final answer|answer is")
BRACE = re.compile("[{}]")
DOUBLE_BRACES = re.compile(r"^\{(.*)\}$")

FEET = REMOVED.index("hours")
REPLACED_V2 = (*REPLACED, (r"\le", "<"))
REMOVED_V2 = (*REMOVED[:FEET], "ft", *REMOVED[FEET:], "\n", "\r", "\f")
UNWRAPPED_V2 = (
    re.compile(r"\\text\{\((.*?)\)\}"),
    *(re.compile(rf"\\{command}\{{(.*?)\}}") for command in ("text", "textbf", "overline")),
    re.compile(r"\\boxed\{(.*)\}"),
)
LAST_PART = tuple(re.compile(p) for p in (r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$"))
SPACING = (
    *(("\\!", ""), ("\\ ", ""), ("\\\\", "\\"), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *(("\\left", ""), ("\\right", "")),
)
SYMBOLS = (
    *(
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\text", ""),
        ("x\\in", ""),
        ("\\%", ""),
        ("%", ""),
    ),
    *((" .", " 0."), ("{.", "{0."), ("\\cdot", ""), ("infinity", "\\infty")),
)
MBOX = re.compile(r"\\mbox{[^}]*}")
ZERO_DECIMALS = re.compile(r"(?<!\d)(\d+)\.0+([^\d])")  # the look-behind saves quadratic time
ZERO_DECIMALS_AT_END = re.compile(r"(?<!\d)(\d+)\.0+$")


def opencompass_v2(response: str, answer: str) -> Grade:
    r"""Grade the last `\boxed{...}`, else the first sentence with "final answer" or "answer is", else the first one.

    A sentence ends at any full stop, also at a decimal point: `the answer is 3.5` gives `3`. The ground truth is an
    answer or a solution with a `\boxed{...}`. `extracted` is the answer found, before it is normalised for comparing.
    """
    truth = _boxed(answer) if "\\boxed" in answer else answer
    if not truth or not truth.strip() or len(truth) > LENGTH:
        return Grade(None, error=f"the ground truth {answer[-40:]!r} has no answer of 1 to {LENGTH} characters")
    extracted = _find_answer(response)
    return Grade(bool(extracted) and _is_equal(extracted, truth), extracted or None)


def _find_answer(response: str) -> str | None:
    """Source: `math_postprocess_v2`. None: the answer is too long."""
    boxed = _boxed(response)
    if boxed:
        inner = DOUBLE_BRACES.match(boxed)
        boxed = inner[1] if inner else boxed
    if boxed:
        return boxed if len(boxed) <= LENGTH else None
    sentences = response.split(".")
    sentence = next((text for text in sentences if PHRASE.search(text.lower())), sentences[0])
    return _final_answer(sentence) if len(sentence) <= LENGTH else None


def _boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; a last box that is not closed, or has a blank before its brace, is none."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : brace.start()]
    return None


def _is_equal(found: str, truth: str) -> bool:
    """Source: `MATHEvaluator.is_equiv`; where a normalisation fails there, the next comparison decides."""
    try:
        left, right = _strip(found), _strip(truth)
    except ValueError:
        pass
    else:
        if left == right or _final_answer(left) == _final_answer(right):
            return True
    return _final_answer(found) == _final_answer(truth) or found == truth


def _final_answer(text: str) -> str:
    """Source: `normalize_final_answer`."""
    text = replace_all(text, REPLACED_V2)
    for word in REMOVED_V2:
        text = text.replace(word, "")
    for pattern in UNWRAPPED_V2:
        text = pattern.sub(r"\1", text)
    for pattern in LAST_PART:
        parts = pattern.findall(text)
        text = parts[-1] if parts else text
    text = text.strip()
    if "rac" in text and "\\frac" not in text:
        text = text.replace("rac", "\\frac")
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text


def _strip(text: str) -> str:
    """Source: `_strip_string_v2`.

    Raises:
        ValueError: the text has one slash, but is not a fraction of two integers.
    """
    text = replace_all(text.strip().replace("\n", "").rstrip("."), SPACING)
    text = without_final_text(text)
    text = replace_all(text, SYMBOLS)
    text = text if "\\infty" in text else text.replace("inf", "\\infty")
    text = replace_all(text, (("+\\inity", "\\infty"), ("and", ""), ("\\mathbf", "")))
    text = MBOX.sub("", text)
    text = text.replace("j", "i") if "i" not in text else text
    text = ZERO_DECIMALS.sub(r"\1\2", text)
    text = ZERO_DECIMALS_AT_END.sub(r"\1", text)
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text  # "x = 5"
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return _fraction(braced_fractions(text))


def replace_all(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the pairs (old, new) one after another."""
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def without_final_text(text: str) -> str:
    r"""Remove everything from the first `\text{` on if the text ends with a brace and begins otherwise (a unit)."""
    start = text.find("\\text{")
    return text[:start].strip() or text if start >= 0 and text.endswith("}") else text


def _fraction(text: str) -> str:
    r"""Write `3/4` as `\frac{3}{4}`."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = int(parts[0]), int(parts[1])
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
