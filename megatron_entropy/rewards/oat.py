r"""The boxed grader of oat with `fast=False`, and CurioSFT's reward, the better one of it and math-verify.

Source: `oat/utils/math_grader.py` of sail-sg/oat (`boxed_reward_fn`, from sail-sg/understand-r1-zero). An answer is
right if its text equals the ground truth after Hendrycks' or PRM800K's normalisation, if a simple expression of at most
two letters is equal (an integer only to an integer, a fraction only to the same fraction), or if math-verify says so.

Differences: expressions are compared by `numeric` instead of sympy's `parse_expr`, which calls `eval`; LaTeX becomes
plain text by the rules of `_plain_text` instead of the package pylatexenc; answers of more than `LENGTH` characters
are wrong, in place of the test for repetitions; math-verify runs without its alarms (see `math_verify`).
"""

from __future__ import annotations

import logging
import re
from itertools import accumulate
from typing import Any

from megatron_entropy.records import Grade
from megatron_entropy.rewards.math_equal import braced_fractions, remove_units, slash_fraction
from megatron_entropy.rewards.strings import boxed_content
from megatron_entropy.rewards.symbolic import math_verify

TAIL = 50_000  # only the last characters of a response are read
LENGTH = 1_000  # characters of an answer that is compared
MAX_DEPTH = 15  # nested brackets that math-verify gets; its time multiplies with each
EXTRACTED_LENGTH = 200  # characters kept for the rollout dump
ONLY_TEXT = re.compile(r"^\\text\{(.+?)\}$")
FINAL_TEXT = re.compile(r"\\text{.*?}$")
ARRAY_BEGIN = re.compile(r"\\begin\{array\}\{.*?\}")
SHORT_ROOT = re.compile(r"\\sqrt([^{])")
COMMANDS = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("\\end{array}", "\\end{pmatrix}"), ("bmatrix", "pmatrix")),
    *(("tfrac", "frac"), ("dfrac", "frac"), ("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge")),
    *(("\\left", ""), ("\\right", "")),
)
SIGNS = (("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""))
NUMBERS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))
WORDS = (
    *(("\\%", "%"), ("\\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , ")),
    *(("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12")),
)
UNIT_NAMES = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard".split()
UNITS = tuple(re.compile(rf"{unit}(es)?(s)? *(\^[0-9]+)?") for unit in UNIT_NAMES)
DEGREES = re.compile(r"\^ *\\circ")
THOUSANDS = re.compile(r"(\d),(\d\d\d)(?!\d)")
FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
GROUP = r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
FRAC = re.compile(rf"\\frac{GROUP}(?:{GROUP}|(\w))")
SIMPLE_ABOVE = re.compile(r"\s*-?[^-+/]*")
SIMPLE_BELOW = re.compile(r"\s*(?:\\?\w+|√\([^()]*\))\s*")
ROOT = re.compile(rf"\\sqrt(?:{GROUP}|\s*([^\s{{\\\[]))")
WRAPPED = re.compile(rf"\\(?:text|mathrm|mathbf|textbf|operatorname|overline){GROUP}")
MBOX = re.compile(rf"\\mbox{GROUP}")
SPACING = re.compile(r"\\[,;:!]|\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])")
HARD_POWER = re.compile(r"\^\{|\^\(|\^[0-9]+\^|\^[0-9][0-9]+")
PLAIN_TOKEN = re.compile(r"sqrt|pi|[a-z]|\d+\.?\d*|\.\d+|\S")
FIRST_OF_FACTOR = re.compile(r"[a-z\d.(]")
SYMBOLS = {
    **{"pi": "π", "infty": "∞", "cup": "∪", "cdot": "·", "times": "×", "theta": "θ", "alpha": "α", "beta": "β"},
    **{"le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "in": "∈", "pm": "±", "cap": "∩"},
    **{"ldots": "...", "dots": "...", "cdots": "⋯", "emptyset": "∅", "to": "→", "div": "÷", "circ": "∘"},
}
PLAIN = (("√", "sqrt"), ("π", "pi"), ("∞", "inf"), ("∪", "U"), ("·", "*"), ("×", "*"))


def oat(response: str, answer: str) -> Grade:
    r"""Grade the last `\boxed{...}` of a response as oat's `boxed_reward_fn` does.

    Args:
        answer: an answer, or a solution with a `\boxed{...}`.

    Raises:
        ValueError: the ground truth is empty or longer than `LENGTH`.
    """
    truth = boxed_content(answer) if "\\boxed" in answer else answer
    if not truth or not truth.strip() or len(truth) > LENGTH:
        raise ValueError(f"the ground truth {answer[-60:]!r} has no answer of 1 to {LENGTH} characters")
    found = boxed_content(response[-TAIL:]) if "\\boxed" in response[-TAIL:] else None
    if found is None or len(found) > LENGTH:
        return Grade(False, None if found is None else found[:EXTRACTED_LENGTH])
    correct = _hendrycks(found) == _hendrycks(truth) or _prm800k_equal(found, truth) or _verified(found, truth)
    return Grade(correct, found[:EXTRACTED_LENGTH])


def curiosft(response: str, answer: str) -> Grade:
    """Grade as CurioSFT does: a response is right if `math_verify` or `oat` finds it right.

    Source: CurioSFT's reward server, `max(math_verify, oat with fast=False)`, on the whole response.

    Raises:
        ValueError: neither finds it right, and one of them cannot read the ground truth.
    """
    grade = oat(response, answer)
    return grade if grade.correct else math_verify(response, answer)


def curiosft_think(response: str, answer: str) -> Grade:
    """Grade as CurioSFT's RL does: as `curiosft`, but math-verify reads only the text after the last `</think>`.

    A response without `</think>` is wrong. Source: the reward server with `reward_impl_version` 1.

    Raises:
        ValueError: as `curiosft`.
    """
    _, end, solution = response.rpartition("</think>")
    if not end:
        return Grade(False)
    grade = oat(response, answer)
    return grade if grade.correct else math_verify(solution, answer)


def _hendrycks(text: str) -> str:
    """Source: `mathd_normalize_answer`; where it fails there, the text stays as it is."""
    text = text.strip()
    inner = ONLY_TEXT.search(text)
    text = inner[1].strip() if inner else text
    try:
        return _strip(text)
    except IndexError:
        return text


def _strip(text: str) -> str:
    r"""Source: `_strip_string`.

    Raises:
        IndexError: a `\frac` or `\sqrt` has no argument, or there is more than one text with a leading blank.
    """
    text = ARRAY_BEGIN.sub(r"\\begin{pmatrix}", text)
    for old, new in COMMANDS:
        text = text.replace(old, new)
    text = remove_units(FINAL_TEXT.sub("", text).strip() or text)
    for old, new in SIGNS:
        text = text.replace(old, new)
    value, *unit = text.split("\\text{ ")
    if len(unit) > 1 or text.endswith(("\\frac", "\\sqrt")) or "\\frac\\frac" in text or "\\sqrt\\sqrt" in text:
        raise IndexError(text)
    for old, new in NUMBERS:
        value = value.replace(old, new)
    value = f"0{value}" if value.startswith(".") else value
    sides = value.split("=")
    value = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else value  # "k = 5"
    value = braced_fractions(SHORT_ROOT.sub(r"\\sqrt{\1}", value).replace(" ", ""))
    return slash_fraction("\\frac{1}{2}" if value == "0.5" else value, with_roots=False)


def _prm800k_equal(found: str, truth: str) -> bool:
    """Source: `grade_answer_sympy`."""
    left, right = _normalise(truth), _normalise(found)
    if left == right:
        return True
    if not right:
        return False
    truths, items = _elements(left), _elements(right)
    has_other_brackets = len(truths) > 1 and (left[0], left[-1]) != (right[0], right[-1])
    if has_other_brackets or len(truths) != len(items):
        return False
    return all(_elements_equal(*pair) for pair in zip(truths, items, strict=True))


def _elements_equal(truth: str, found: str) -> bool:
    if FRACTION.fullmatch(truth) and FRACTION.fullmatch(found):
        return truth == found
    if _is_integer(truth) != _is_integer(found):
        return False
    return _simple_equal(truth, found)


def _normalise(text: str) -> str:
    """Source: `_normalize`."""
    inner = ONLY_TEXT.search(text)
    text = inner[1] if inner else text
    for old, new in WORDS:
        text = text.replace(old, new)
    for unit in UNITS:
        text = unit.sub("", text)
    text = DEGREES.sub("", text)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if _is_integer(text, with_commas=False):
        text = str(round(float(text)))
    if "\\" in text:
        text = _plain_text(text)
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", re.sub("- *", "-", text))  # 7 3/4 is 7+3/4
    text = re.sub(r"[ {}]", "", text).lower()
    return str(int(float(text.replace(",", "")))) if _is_integer(text) else text


def _plain_text(text: str) -> str:
    r"""Write LaTeX as plain text: `\frac{1}{2}` as 1/2, `\sqrt{3}` as sqrt(3); source: `_parse_latex`, pylatexenc.

    A sum above and a product below keep their brackets, and a command without a plain form its name. There,
    `\frac{1-p}{3}` is 1-p/3 and `\sqrt[3]{4}` is sqrt(4).
    """
    text = braced_fractions(re.sub(r"\\[dt]?frac\s*", r"\\frac", text)).replace("\\frac", " \\frac")
    text = SPACING.sub("", text)
    for _ in range(5):  # from the inside to the outside of nested commands
        text = FRAC.sub(_slash, text)
        text = ROOT.sub(lambda match: f"√({match[1] or match[2]})", text)
        text = WRAPPED.sub(r"\1", MBOX.sub("", text))
    text = re.sub(r"\\([a-zA-Z]+) ?", lambda match: SYMBOLS.get(match[1], match[1]), text)
    text = re.sub(r"\\(.)", r"\1", text)
    for old, new in PLAIN:
        text = text.replace(old, new)
    return text.strip()


def _slash(fraction: re.Match[str]) -> str:
    above, below = fraction[1], fraction[2] or fraction[3] or ""
    above = above if SIMPLE_ABOVE.fullmatch(above) else f"({above})"
    return f"{above}/{below if SIMPLE_BELOW.fullmatch(below) else f'({below})'}"


def _is_integer(text: str, *, with_commas: bool = True) -> bool:
    try:
        value = float(THOUSANDS.sub(r"\1\2", text) if with_commas else text)
        return abs(value - round(value)) <= 1e-7
    except (OverflowError, ValueError):
        return False


def _elements(text: str) -> list[str]:
    """The elements of a tuple or an interval, else the text itself."""
    text = THOUSANDS.sub(r"\1\2", text)
    inner = text[1:-1]
    if len(text) > 2 and text[0] in "()[]" and text[-1] in "()[]" and not re.search(r"[()\[\]]", inner):
        return inner.split(",")
    return [text] if text else []


def _simple_equal(truth: str, found: str) -> bool:
    """Compare expressions of at most two letters, without powers beyond 9; source: `are_equal_under_sympy`."""
    from megatron_entropy.rewards import numeric
    from megatron_entropy.rewards.latex import UnreadableError

    both = f"({truth})-({found})"
    letters = {letter for letter in both.replace("sqrt", "").replace("frac", "") if letter.isalpha()}
    if len(letters) > 2 or HARD_POWER.search(both):
        return False
    try:
        return numeric.is_equal(_as_latex(truth), _as_latex(found), tolerance=1e-12)
    except UnreadableError:
        return False


def _as_latex(text: str) -> str:
    r"""Write plain text in the grammar of `latex`: `2xsqrt(3)/4y` is `2*x*\sqrt(3)/4*y`."""
    parts: list[str] = []
    for token in PLAIN_TOKEN.findall(text.replace("**", "^")):
        if parts and re.search(r"[a-z\d.)]$", parts[-1]) and FIRST_OF_FACTOR.match(token) and parts[-1] != "\\sqrt":
            parts.append("*")
        parts.append(f"\\{token}" if token in ("sqrt", "pi") else token)
    return "".join(parts).replace("\\pi", "\\pi ")


def _depth(text: str) -> int:
    return max(accumulate(((c in "([{") - (c in ")]}") for c in text), initial=0))


def _verified(found: str, truth: str) -> bool:
    """Whether math-verify finds the text of a box equal; source: `is_latex_equal`."""
    if max(_depth(found), _depth(truth)) > MAX_DEPTH:
        return False
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limits
    options: dict[str, Any] = {
        "extraction_config": (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()),
        "fallback_mode": "no_fallback",
        "extraction_mode": "first_match",
        "parsing_timeout": None,
    }
    texts = [text if "$" in text else f"${text}$" for text in (truth, found)]
    parsed = [parse(text, **options) for text in texts]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))
