r"""Golds: the ground truth of a row in the form that graders read.

A reader takes a row and the name of its answer column. A gold that it cannot read raises `GoldError`, whose message
is the same for every row with this fault: such rows are counted and listed under it, and not asked.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from megatron_entropy.data.readers import RawRow
from megatron_entropy.rewards.strings import boxed_content

INTEGER = re.compile(r"(\d{1,3})(?:\.0*)?", re.ASCII)
NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)", re.ASCII)
BOX = re.compile(r"\\(?:boxed|fbox)\b")
OLYMPIAD_KEYS = ("final_answer", "is_multiple_answer", "unit", "answer_type", "error")


class GoldError(ValueError):
    """A gold that cannot be read; the message names the fault, not the row."""


GoldReader = Callable[[RawRow, str], str]


def text_gold(row: RawRow, column: str) -> str:
    r"""Return the text of an answer, or the last `\boxed{}` of a worked solution.

    A column whose name contains `solution` must have a box. Source for Minerva: Qwen2.5-Math, `parser.py`.
    """
    text = cell_text(row, column)
    if BOX.search(text):
        text = boxed_content(text) or ""
        if not text:
            raise GoldError("the last box of the answer is empty or not closed")
    elif "solution" in column:
        raise GoldError("the solution has no box")
    if not _has_balanced_braces(text):
        raise GoldError("the braces of the answer do not match")
    return text


def aime_gold(row: RawRow, column: str) -> str:
    """Return an integer from 0 to 999 without its leading zeros (`025` is 25)."""
    match = INTEGER.fullmatch(text_gold(row, column))
    if match is None:
        raise GoldError("the answer is not an integer from 0 to 999")
    return str(int(match[1]))


def number_gold(row: RawRow, column: str) -> str:
    """Return a number in decimal digits, an integer without a decimal point (`27.0` is 27)."""
    try:
        number = Decimal(text_gold(row, column))
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or abs(number.adjusted()) > 30:
        raise GoldError("the answer is not a number")
    return str(int(number)) if number == number.to_integral_value() else format(number.normalize(), "f")


def gsm8k_gold(row: RawRow, column: str) -> str:
    """Return the number after the last `####` without commas and dollar sign (`#### 1,234` is 1234).

    A text that is only a number counts as well.
    """
    number = cell_text(row, column).rpartition("####")[2].strip().replace(",", "").replace("$", "").removesuffix(".")
    if not NUMBER.fullmatch(number):
        raise GoldError("the answer does not end in '#### NUMBER'")
    return number


def olympiad_gold(row: RawRow, column: str) -> str:
    """Return OlympiadBench's gold as a JSON object for the grader `olympiad`.

    Its keys are `final_answer` (list of texts, each of which may hold several answers), `is_multiple_answer`, `unit`,
    `answer_type` and `error` (a tolerance, or several with commas between them), the last three null where the row has
    none. Source: OlympiadBench, `eval/auto_scoring_judge.py`.
    """
    answers = [answer for answer in _text_list(value_of(row, column)) if answer.strip()]
    if not answers:
        raise GoldError("the row has no final answer")
    error = _optional_text(row, "error")
    if error is not None and not all(_is_tolerance(part) for part in error.split(",")):
        raise GoldError("the error is not a number")
    multiple = row.get("is_multiple_answer")
    multiple = {"true": True, "false": False}.get(str(multiple).strip().lower(), len(answers) > 1)
    values = (answers, multiple, _optional_text(row, "unit"), _optional_text(row, "answer_type"), error)
    return json.dumps(dict(zip(OLYMPIAD_KEYS, values, strict=True)), ensure_ascii=False)


def gold_for(grader: str, answer: str) -> str:
    """Return what a grader reads: the answer, or for others than `olympiad` the texts of OlympiadBench's JSON object.

    The texts lose their dollar signs and are joined by commas.
    """
    if grader == "olympiad" or not answer.startswith('{"final_answer": ['):
        return answer
    return ", ".join(text.replace("$", "").strip() for text in json.loads(answer)["final_answer"])


GOLDS: dict[str, GoldReader] = {
    "text": text_gold,
    "aime": aime_gold,
    "number": number_gold,
    "gsm8k": gsm8k_gold,
    "olympiad": olympiad_gold,
}
"""Readers by the name that a suite file gives."""


def value_of(row: RawRow, name: str) -> object:
    """Return the value of a column, or None; `a.b` is the entry `b` of the object in column `a`."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    nested = row.get(outer) if dot else None
    return value_of(nested, inner) if isinstance(nested, dict) else None


def cell_text(row: RawRow, column: str) -> str:
    """Return the text of a cell, stripped; a finite number becomes text (`27.0` is `27`)."""
    value = value_of(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise GoldError("the row has no answer")
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GoldError("the answer is not a text or a number")
    return str(int(value)) if value == int(value) else str(value)


def _text_list(value: object) -> list[str]:
    """The texts of a list, which a CSV file writes as JSON or as Python does; another text is a list of one."""
    if isinstance(value, str) and value.startswith(("['", '["')):
        for read in (json.loads, ast.literal_eval):
            try:
                return _text_list(read(value))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if isinstance(item, str | int | float) and not isinstance(item, bool)]


def _optional_text(row: RawRow, column: str) -> str | None:
    value = row.get(column)
    return None if value is None or not str(value).strip() else str(value).strip()


def _is_tolerance(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _has_balanced_braces(text: str) -> bool:
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            return False
    return depth == 0
