r"""OlympiadBench's grader: several answers in any order, tolerance, units, tuples, intervals, expressions, equations.

Source: OlympiadBench (arXiv 2402.14008), `eval/auto_scoring_judge.py` and `inference/judge.py`. As there, a number is
also right when it is 100 times as large or small (percentages), only the right side of `x=1` counts against `1`, and
two equations are equal if one is an integer multiple of the other.

Differences, each where the released judge errs: tuples of different lengths are not equal; an expression with an
unreadable end is unreadable; `5!` is not `5` and `.5` is `0.5`; `n(n-1)` is a product; braces protect commas; `{a, b}`
is a list; thousands commas, degrees, `\%` and the unit of the row are removed; a response with more than one box or
formula is judged by its last statement (`_statements`). Expressions are compared by `numeric`, not by sympy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_entropy.records import Grade

TAIL = 50_000  # only the last characters of a response are read
ANSWER_LENGTH = 5_000  # characters of a final answer
MAX_ITEMS = 100  # answers of one question
EXTRACTED_LENGTH = 200  # characters kept for the rollout dump
TOLERANCE = 1e-8
OFFSET = 1e-3  # expressions with variables are also equal if they differ by a smaller constant
SLACK = 1.01  # the released judge multiplies every tolerance with it

JSON_START = re.compile(r'\s*\{\s*(?:"|\})')
FINAL_PHRASE = re.compile(r"[Ss]o the final answer is (.*)")
ANSWER_PHRASE = re.compile(r"answer is:? (.*)")
BOX = re.compile(r"\\boxed\s*\{")
BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
FORMULA = re.compile(r"\$(.*?)\$")
DISPLAY = re.compile(r"\$\$|\\[()\[\]]")
SEPARATOR = re.compile(r"(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*\})*")
SENTENCE_END = re.compile(r"[.!?]\s|\n\s*\n")
PROSE = re.compile(r"[a-zA-Z]{3,}")
CONJUNCTION = re.compile(r"\\(?:text|mathrm|textrm)\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
CHINESE = re.compile(r"[\u4e00-\u9fff]+")
UPRIGHT = re.compile(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}")
BARE_DECIMAL = re.compile(r"(?<![\d}])\.(?=\d)")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
VARIABLE_BEFORE_INTERVAL = re.compile(r"[a-zA-Z]\s*(?=[(\[])")
STRIPPED = "\n$,.:;^_=+`@#%&*~，。 "
REPLACED = (
    *(("\\left", ""), ("\\right", ""), ("∶", ":"), ("，", ","), ("$", ""), ("\\approx", "="), ("\\simeq", "=")),
    *(("\\sim", "="), ("^\\prime", "'"), ("^{\\prime}", "'"), ("^\\circ", ""), ("^{\\circ}", ""), ("°", "")),
    *(("\\degree", ""), ("\\%", ""), ("%", ""), ("{,}", ""), ("\\!", ""), ("\\boxed", "")),
    *(("\\qquad", " "), ("\\quad", " ")),
)
UNIT_WRAPPER = r"(?:\s|~|\\[,;:! ]|\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{|\{)*"
MINUTES = ("min", "minute", "minutes")


def olympiad(response: str, answer: str) -> Grade:
    r"""Grade the final answer of a response against a ground truth of OlympiadBench.

    The final answer is the text after the last "So the final answer is", if there is one. In it, the last box counts,
    without a box the last formula of the last line, without a formula the whole text. For a question with several
    answers, all boxes or formulas of the last sentence count.

    Args:
        answer: a text, or a JSON object with `final_answer` (a list of texts) and, optionally, `is_multiple_answer`,
            `unit`, `answer_type` and `error` (tolerances, separated by commas).

    Raises:
        ValueError: the ground truth is damaged, or the response differs from it and it cannot be compared.
    """
    truth = read_truth(answer)
    statements = _statements(response[-TAIL:], is_multiple=truth.is_multiple)
    if any(_is_same_text(text, truth.text) for text in (*statements, response[-TAIL:])):
        return Grade(True, truth.text[:EXTRACTED_LENGTH])
    if truth.is_prose:
        raise ValueError(f"the ground truth {truth.text[:60]!r} is prose, which can only be compared with its own text")
    correct = any(judge(truth, statement) for statement in statements if len(statement) <= ANSWER_LENGTH)
    if not correct:
        _check_readable(truth)
    return Grade(correct, statements[0][:EXTRACTED_LENGTH] if statements else None)


@dataclass(frozen=True)
class Truth:
    """A ground truth.

    Attributes:
        text: as the data has it.
        items: the single answers, `\\pm` expanded.
        tolerances: largest absolute difference from each answer.
        is_multiple: whether a response may state its answers in several boxes.
        is_prose: whether words explain the formulas (one row of the benchmark).
        unit: that may follow the numbers, or an empty text.
    """

    text: str
    items: tuple[str, ...]
    tolerances: tuple[float, ...]
    is_multiple: bool
    is_prose: bool = False
    unit: str = ""


def read_truth(answer: str) -> Truth:
    """Read a ground truth: a text or a JSON object, see `olympiad`.

    Raises:
        ValueError: there is no answer in it, a field has the wrong type, or there are more than `MAX_ITEMS` answers.
    """
    row: dict[str, Any] = {"final_answer": [answer]}
    if JSON_START.match(answer):
        try:
            row = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the ground truth is damaged JSON: {answer[:60]!r}") from error
    texts = row.get("final_answer")
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
        raise ValueError(f"the ground truth has no `final_answer` with texts: {answer[:60]!r}")
    fields = [row.get(name) or "" for name in ("unit", "answer_type", "error")]
    if not all(isinstance(field, str) for field in fields):
        raise ValueError(f"unit, answer_type and error of a ground truth must be texts or null: {answer[:60]!r}")
    unit, answer_type, error = fields
    text = ",".join(texts)
    if len(text) > ANSWER_LENGTH:
        raise ValueError(f"the ground truth has {len(text)} characters, more than {ANSWER_LENGTH}")
    content = _clean(_truth_content(text))
    if answer_type == "Interval":
        content = VARIABLE_BEFORE_INTERVAL.sub("", content, count=1) if content[:1].isalpha() else content
    items = _split(content)
    if not items or len(items) > MAX_ITEMS:
        raise ValueError(f"the ground truth has {len(items)} answers, not 1 to {MAX_ITEMS}: {answer[:60]!r}")
    tolerances = _tolerances("" if "Tuple" in answer_type else error, len(items))
    is_multiple = bool(row.get("is_multiple_answer")) or len(items) > 1
    return Truth(text, items, tolerances, is_multiple, _is_prose(text), unit)


def judge(truth: Truth, statement: str) -> bool:
    """Whether a final answer is equal to the ground truth: as many answers, each equal to another one of its answers.

    Answers are paired one after the other with the first that is equal, as in the released judge, so the time grows
    with the square of their number at most.
    """
    text = _clean(statement)
    if text == ",".join(truth.items) or _without_units(text, truth.unit) == ",".join(truth.items):
        return True
    if len(truth.items) == 1 and THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    found = [_without_units(item, truth.unit) for item in _split(text)]
    return len(found) == len(truth.items) and _pair(truth.items, found, truth.tolerances)


def _pair(truths: Sequence[str], found: Iterable[str], tolerances: Sequence[float]) -> bool:
    """Whether each truth has an equal partner; after a match, the next but one is tried (as in the released judge)."""
    remaining, partners = list(zip(truths, tolerances, strict=True)), list(found)
    index = -1
    while remaining:
        index = (index + 1) % len(remaining)
        truth, tolerance = remaining[index]
        partner = next((item for item in partners if _is_equal(truth, item, tolerance)), None)
        if partner is None:
            return False
        del remaining[index]
        partners.remove(partner)
    return True


def _is_equal(truth: str, found: str, tolerance: float) -> bool:
    """Whether one answer is equal to one of the ground truth."""
    from megatron_entropy.rewards.latex import UnreadableError

    if truth == found:
        return bool(truth)
    for comparison in (_regions_equal, _numbers_equal, _expressions_equal, _equations_equal):
        try:
            if comparison(truth, found, tolerance):
                return True
        except UnreadableError:
            pass
    return False


def _numbers_equal(truth: str, found: str, tolerance: float) -> bool:
    """Compare decimal numbers; percentages also count as fractions and the other way round."""
    try:
        reference, value = float(truth), float(found)
    except ValueError:
        return False
    return any(abs(factor * reference - value) <= tolerance for factor in (0.01, 1, 100))


def _expressions_equal(truth: str, found: str, tolerance: float) -> bool:
    """Compare expressions; of an equation, only the right side."""
    from megatron_entropy.rewards import numeric

    if "=" in truth and "=" in found:
        return False
    left, right = (text.split("=")[1] if "=" in text else text for text in (truth, found))
    return numeric.is_equal(left, right, tolerance=tolerance, offset=OFFSET)


def _equations_equal(truth: str, found: str, _: float) -> bool:
    """Whether an equation is an integer multiple of the other one."""
    from megatron_entropy.rewards import numeric

    ratio = numeric.equation_ratio(truth, found)
    return ratio is not None and any(abs(value - round(value)) < 1e-9 and round(value) for value in (ratio, 1 / ratio))


@dataclass(frozen=True)
class _Region:
    """A tuple, an interval or a finite set, by its brackets."""

    brackets: str
    items: tuple[str, ...]


def _regions(text: str) -> list[_Region]:
    r"""The parts of a union of tuples, intervals and finite sets; none if the text is anything else."""
    regions = []
    for part in text.split("\\cup"):
        part = part.strip()
        width = 2 if part.startswith("\\{") else 1
        if part[:width] not in ("(", "[", "\\{") or not _is_one_group(part):
            return []
        regions.append(_Region(part[:width] + part[-width:], tuple(_commas(part[width:-width]))))
    return regions


def _is_one_group(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and character in ")]}":
            return index == len(text) - 1
    return False


def _regions_equal(truth: str, found: str, tolerance: float) -> bool:
    """Compare tuples, intervals and their unions."""
    left, right = _regions(truth), _regions(found)
    if not left or len(left) != len(right):
        return False
    return all(_region_equal(*pair, tolerance) for pair in zip(left, right, strict=True))


def _region_equal(truth: _Region, found: _Region, tolerance: float) -> bool:
    if truth.brackets != found.brackets or len(truth.items) != len(found.items):
        return False
    if truth.brackets == "\\{\\}":
        return _pair(truth.items, found.items, [tolerance] * len(truth.items))
    pairs = zip(truth.items, found.items, strict=True)
    return all(a == b or _expressions_equal(a, b, tolerance) for a, b in pairs)


def _check_readable(truth: Truth) -> None:
    """Raise for a ground truth to which nothing but its own text can be equal.

    Raises:
        ValueError: an answer is neither a word nor mathematics that can be read.
    """
    from megatron_entropy.rewards.latex import is_readable

    for item in truth.items:
        parts = [part for region in _regions(item) for part in region.items] or [item]
        sides = [side for part in parts for side in part.split("=")]
        if not item.isalpha() and not all(is_readable(side) for side in sides):
            raise ValueError(f"cannot read the ground truth {truth.text[:60]!r}")


def _statements(text: str, *, is_multiple: bool) -> list[str]:
    """The readings of a response's final answer, most often one.

    For several answers, all boxes of the response are a second reading, which is that of the released judge.
    """
    phrases = FINAL_PHRASE.findall(text)
    text = phrases[-1] if phrases else text
    if BOX.search(text):
        boxes = _boxes(text)
        readings = [_last_group(text, boxes, is_multiple), boxes] if boxes and is_multiple else []
        readings = readings or ([_last_group(text, boxes, is_multiple)] if boxes else [])
        return list(dict.fromkeys(",".join(span.content for span in reading) for reading in readings))
    lines = [line for line in text.strip().split("\n") if line.strip()]
    last = DISPLAY.sub("$", lines[-1]) if lines else ""
    spans = [_Span(match.start(), match.end(), match[1]) for match in FORMULA.finditer(last) if match[1].strip()]
    if spans:
        return [",".join(span.content for span in _last_group(last, spans, is_multiple))]
    phrases = ANSWER_PHRASE.findall(text)
    text = phrases[-1] if phrases else text.strip()
    return [text] if 0 < len(text) <= ANSWER_LENGTH else lines[-1:]


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Span]:
    r"""The outermost `\boxed{...}`; none if the last one is not closed, since the response was cut in its answer."""
    spans: list[_Span] = []
    opened: list[tuple[int, int] | None] = []  # of each open brace: start of the box and of its content
    open_boxes = 0
    for match in BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token.startswith("\\boxed"):
            opened.append((match.start(), match.end()))
            open_boxes += 1
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            box = opened.pop()
            open_boxes -= box is not None
            if box is not None and open_boxes == 0:
                spans.append(_Span(box[0], match.end(), text[box[1] : match.start()]))
    return [] if open_boxes else spans


def _last_group(text: str, spans: list[_Span], is_multiple: bool) -> list[_Span]:
    """The last span and those before it that belong to the same statement.

    For several answers, these are the spans of the same sentence. For one answer, they are spans with nothing but
    separators between them: a response that offers a choice of answers is wrong.
    """
    group = spans[-1:]
    for span in reversed(spans[:-1]):
        between = text[span.end : group[0].start]
        if SENTENCE_END.search(between) if is_multiple else not SEPARATOR.fullmatch(between):
            break
        group.insert(0, span)
    return group


def _truth_content(text: str) -> str:
    """The answers of a ground truth, separated by commas, without boxes and dollar signs."""
    boxes = _boxes(text)
    if boxes:
        return ",".join(box.content for box in boxes)
    formulas = FORMULA.findall(text)
    if formulas and (_is_prose(text) or SEPARATOR.fullmatch(FORMULA.sub("", text).strip(". "))):
        return ",".join(formulas)
    return text.replace("$", "")


def _is_prose(text: str) -> bool:
    """Whether words other than "and" and "or" stand between the formulas."""
    outside = CONJUNCTION.sub("", FORMULA.sub(" ", text)) if "$" in text else ""
    return text.count("$") % 2 == 0 and PROSE.search(outside) is not None


def _is_same_text(statement: str, truth: str) -> bool:
    left, right = ("".join(text.replace("$", "").split()).rstrip(".") for text in (statement, truth))
    return left == right


def _clean(text: str) -> str:
    """Remove what does not matter (dollar signs, degrees, upright text ...); source: `sepcial_symbol_replace`."""
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for old, new in REPLACED:
        text = text.replace(old, new)
    text = BARE_DECIMAL.sub("0.", text).strip(STRIPPED)
    return CHINESE.sub("", text) if CHINESE.sub("", text) else text


def _split(text: str) -> tuple[str, ...]:
    r"""Single answers: split at commas and conjunctions outside of brackets; each `\pm` gives two."""
    text = CONJUNCTION.sub(",", text).strip(STRIPPED)
    regions = _regions(text)
    if len(regions) == 1 and regions[0].brackets == "\\{\\}":
        items = regions[0].items
    else:
        items = [UPRIGHT.sub(r"\1", item) for item in _commas(text)]
    signs = [("+", "-") if "\\pm" in item else ("",) for item in items]
    return tuple(item.replace("\\pm", sign) for item, options in zip(items, signs, strict=True) for sign in options)


def _commas(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    items, start, depth = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and text[index - 1 : index] != "\\":
            items.append(text[start:index].strip())
            start = index + 1
    return [*items, text[start:].strip()] if start < len(text) else items


def _tolerances(error: str, count: int) -> tuple[float, ...]:
    """The tolerances of a row.

    Raises:
        ValueError: they are no numbers, or neither one nor as many as answers.
    """
    try:
        values = [float(part) if part.strip() else TOLERANCE for part in error.split(",")]
    except ValueError as failure:
        raise ValueError(f"the tolerance {error[:40]!r} of a ground truth is not a number") from failure
    values = values * count if len(values) == 1 else values
    if len(values) != count or not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"a ground truth has {count} answers and the tolerances {error[:40]!r}")
    return tuple(value * SLACK for value in values)


def _without_units(text: str, unit: str) -> str:
    """Remove a row's unit from the end of an answer."""
    name, _, power = unit.replace("$", "").replace("\\circ", "").strip("^{} ").partition("^")
    if not name or name == "%":
        return text
    names = MINUTES if name in MINUTES else (name, f"{name}s", name.removesuffix("s"))
    options = "|".join(re.escape(option) for option in sorted(names, key=len, reverse=True))
    end = rf"\s*\}}*\s*\^\s*\{{?{re.escape(power)}\}}*" if power else r"\s*\}*"
    return re.sub(rf"(?<=[\d}})!]){UNIT_WRAPPER}(?:{options}){end}$", "", text.strip())
