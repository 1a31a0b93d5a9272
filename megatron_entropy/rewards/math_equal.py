r"""Qwen2.5-Math's grader: its answer extraction, its string normalisation, its numerical and symbolic comparison.

Source: `evaluation/parser.py` (`extract_answer`, `strip_string`) and `evaluation/grader.py` (`math_equal` with
percentages and a relative tolerance of 1e-4) of QwenLM/Qwen2.5-Math. Its quirks are kept, since published numbers
depend on them: 0.5 equals 50, units are removed wherever they stand alone ("a", "m"), the text of a box that is not
closed counts, and without a box the last number does.

Differences: expressions are read and compared by `latex` and `numeric` instead of sympy's three parsers (one of which
calls `eval`) and `simplify`, so that an expression with an unreadable end is not equal to its beginning, and relations
are only equal with the same sign; answers of more than `LENGTH` characters are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isclose

from megatron_entropy.records import Grade

TAIL = 50_000  # only the last characters of a response are read
LENGTH = 2_000  # characters of an answer that is compared
MAX_DEPTH = 20  # nested lists
RELATIVE = 1e-4
ROUNDING = 1e-12
EXTRACTED_LENGTH = 200  # characters kept for the rollout dump
UNIT_WORDS = (
    "east,degree,mph,kmph,ft,m sqaure, m east,sq m,deg,mile,q .,monkey,prime,ratio,profit of rs,rd,o,gm,p . m,lb,tile,"
    "per,dm,lt,gain,ab,way,west,a .,b .,c .,d .,e .,f .,g .,h .,t,a,h,no change,men,soldier,pie,bc,excess,st,inches,"
    "noon,percent,by,gal,kmh,c,acre,rise,a . m,th,π r 2,sq,mark,l,toy,coin,sq . m,gallon,° f,profit,minw,yr,women,"
    "feet,am,pm,hr,cu cm,square,v â € ™,are,rupee,rounds,cubic,cc,mtr,s,ohm,number,kmph,day,hour,minute,min,second,"
    "man,woman,sec,cube,mt,sq inch,mp,∏ cm ³,hectare,more,sec,unit,cu . m,cm 2,rs .,rs,kg,g,month,km,m,cm,mm,apple,"
    "liter,loss,yard,pure,year,increase,decrease,d,less,Surface,litre,pi sq m,s .,metre,meter,inch"
).split(",")
UNITS = tuple(re.compile(rf"(^|\W){word}{end}($|\W)") for end in ("", "s") for word in UNIT_WORDS)
ARRAY_BEGIN = re.compile(r"\\begin\{array\}\{.*?\}")
FINAL_TEXT = re.compile(r"\\text{.*?}$")
TEXT = re.compile(r"\\text\{(.*?)\}")
MBOX = re.compile(r"\\mbox{.*?}")
ROOT = re.compile(r"\\sqrt(\w+)")
ZERO_DECIMALS = re.compile(r"(?<!\d)(\d+)\.0*([^\d])")  # the look-behind saves quadratic time
ZERO_DECIMALS_AT_END = re.compile(r"(?<!\d)(\d+)\.0*$")
NUMBER = re.compile(r"-?\d*\.?\d+")
LIST = re.compile(r"[(\[].+[)\]]")
CHOICE = re.compile(r"\b([A-E])\b")
MATRIX = r"\begin{pmatrix}", r"\end{pmatrix}"
ASSIGNED = ("x=", "y=", "z=", "x\\in", "y\\in", "z\\in", "x\\to", "y\\to", "z\\to")
COMMANDS = (("tfrac", "frac"), ("dfrac", "frac"), ("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge"))
BRACKETS = (("\\left", ""), ("\\right", ""), ("\\{", "{"), ("\\}", "}"))
SIGNS = (("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\(", ""), ("\\)", ""))
SETS = (("\\emptyset", "{}"), ("(-\\infty,\\infty)", "\\mathbb{R}"))
PERCENT = (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0."))
SMALL_WORDS = {
    **{word: i for i, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())},
    **{word: i for i, word in enumerate("thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(), 13)},
    **{f"{stem}ty": 10 * i for i, stem in enumerate("twen thir for fif six seven eigh nine".split(), 2)},
}
LARGE_WORDS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}


def math_equal(response: str, answer: str) -> Grade:
    r"""Grade the last `\boxed`, else what follows "the answer is" or "final answer is", else the last number.

    Args:
        answer: an answer, or a solution with a `\boxed`.

    Raises:
        ValueError: the ground truth is empty or too long.
    """
    truth = strip(find_answer(answer[-TAIL:])) if "boxed" in answer else strip(strip(answer[: LENGTH + 1]))
    if not truth or len(answer) > LENGTH and len(truth) > LENGTH // 2:
        raise ValueError(f"the ground truth {answer[:60]!r} has no answer of 1 to {LENGTH // 2} characters")
    found = strip(find_answer(response[-TAIL:]))
    return Grade(equal(found, truth), found[:EXTRACTED_LENGTH] or None)


def find_answer(text: str) -> str:
    """Return the normalised final answer of a response, or an empty text. Source: `extract_answer`, for MATH."""
    found = answer_text(text)
    return strip(found) if len(found) <= LENGTH else ""


def answer_text(text: str) -> str:
    """Return the final answer of a response as it stands there, on one line, or an empty text."""
    if "final answer is $" in text and "$. I hope" in text:
        found = text.split("final answer is $", 1)[1].split("$. I hope", 1)[0].strip()
    elif "boxed" in text:
        found = box_content(text)
    elif "he answer is" in text:
        found = text.split("he answer is")[-1].strip()
    elif "final answer is" in text:
        found = text.split("final answer is")[-1].strip()
    else:
        found = (NUMBER.findall(text.replace(",", "")) or [""])[-1]
    return re.sub(r"\n\s*", "", found).removeprefix(":").removesuffix(".").removesuffix("/")


def box_content(text: str) -> str:
    """The content of the last box; up to the end of the text if the box is not closed."""
    text = text.rpartition("boxed")[2]
    if not text.startswith("{"):
        return text.partition("$")[0].strip()
    depth = 0
    for end, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:end]
    return text[1:]


def strip(text: str) -> str:
    r"""Normalise an answer: no units, words, spaces or outer signs. Source: `strip_string`.

    An answer that is only a unit (`\text{east}`) keeps it, since the source turns it into an empty text.
    """
    return _strip(text, keep_units=False) or _strip(text, keep_units=True)


def _strip(text: str, *, keep_units: bool) -> str:
    text = text.strip().replace("\n", "").rstrip(".").replace("\\!", "")
    text = ARRAY_BEGIN.sub(r"\\begin{pmatrix}", text).replace("\\end{array}", "\\end{pmatrix}")
    text = _replace(text.replace("bmatrix", "pmatrix"), (*COMMANDS, *BRACKETS))
    text = FINAL_TEXT.sub("", text).strip() or text
    text = text if keep_units else remove_units(text)
    text = TEXT.sub(r"\1", _digits_for_words(_replace(text, SIGNS)))
    text = _replace(text, ((name, "") for name in ASSIGNED))
    text = _replace(text, (*SETS, *PERCENT)).replace("infinity", "\\infty")
    text = text if "\\infty" in text else text.replace("inf", "\\infty")
    text = MBOX.sub("", _replace(text, (("+\\inity", "\\infty"), ("and", ""), ("\\mathbf", ""))))
    text = text.replace("j", "i") if "i" not in text else text
    text = ZERO_DECIMALS_AT_END.sub(r"\1", ZERO_DECIMALS.sub(r"\1\2", text))
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text  # "k = 5"
    text = ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    return slash_fraction(braced_fractions(text))


def remove_units(text: str) -> str:
    """Remove the words of `UNITS`, which come from MathQA, where they stand alone; twice, as the source does."""
    for _ in range(2):
        for unit in UNITS:
            text = unit.sub(r"\1\2", text) or text
    return text


def _replace(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _digits_for_words(text: str) -> str:
    """The number that English words in a text name ("twenty-five ways" is 25); source: word2number.

    A text of digits loses its leading zeros; a text without such words or with a decimal point is unchanged.
    """
    if text.isascii() and text.isdigit():
        return str(int(text))
    words = [word for word in text.replace("-", " ").lower().split() if word in SMALL_WORDS or word in LARGE_WORDS]
    if not words or "point" in text:
        return text
    total = group = 0
    for word in words:
        if word in SMALL_WORDS:
            group += SMALL_WORDS[word]
        elif word == "hundred":
            group = (group or 1) * LARGE_WORDS[word]
        else:
            total, group = total + (group or 1) * LARGE_WORDS[word], 0
    return str(total + group)


def braced_fractions(text: str) -> str:
    r"""Write `\frac12` and `\frac1{2}` with braces; a text with an incomplete `\frac` is left unchanged."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part.startswith("{"):
            parts.append(part)
        elif len(part) < 2:
            return text
        else:
            parts.append(f"{{{part[0]}}}{part[1] if part[1] == '{' else f'{{{part[1]}}}'}{part[2:]}")
    return "\\frac".join(parts)


def slash_fraction(text: str, *, with_roots: bool = True) -> str:
    r"""Write `3/4` as `\frac{3}{4}`: two integers, or terms with a root."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    is_term = [re.fullmatch(r"0|-?[1-9]\d*", part) or with_roots and "sqrt" in part for part in parts]
    return f"\\frac{{{parts[0]}}}{{{parts[1]}}}" if all(is_term) else text


def equal(found: str, truth: str, depth: int = 0) -> bool:
    """Whether two normalised answers are equal. Source: `math_equal`."""
    if found.strip().lower() == truth.strip().lower():
        return True
    if truth in ("A", "B", "C", "D", "E") and _choice(found) == truth:
        return True
    if _numbers_equal(found, truth):
        return True
    found, truth = found.strip(), truth.strip()
    if not found or depth > MAX_DEPTH:
        return False
    if "pmatrix" in found and "pmatrix" not in truth:
        truth = _as_matrix(truth)
    if _same_without_brackets(found, truth):
        return True
    if LIST.match(found) and LIST.match(truth):
        return _lists_equal(found[1:-1].split(","), truth[1:-1].split(","), depth)
    if all(text.startswith(MATRIX[0]) and text.endswith(MATRIX[1]) for text in (found, truth)):
        return _lists_equal(_matrix_cells(found), _matrix_cells(truth), depth)
    return _equations_equal(found, truth, depth)


def _equations_equal(found: str, truth: str, depth: int) -> bool:
    sides, truth_sides = found.split("="), truth.split("=")
    if len(sides) == len(truth_sides) == 2:
        left, right = (f"{a.strip()} - ({b.strip()})" for a, b in (sides, truth_sides))
        return _symbolic_equal(left, right) or _symbolic_equal(f"-({left})", right)
    if len(sides) == 2 and len(sides[0].strip()) <= 2 and len(truth_sides) == 1:
        return equal(sides[1], truth, depth + 1)
    if len(truth_sides) == 2 and len(truth_sides[0].strip()) <= 2 and len(sides) == 1:
        return equal(found, truth_sides[1], depth + 1)
    return _symbolic_equal(found, truth)


def _symbolic_equal(found: str, truth: str) -> bool:
    from megatron_entropy.rewards import numeric
    from megatron_entropy.rewards.latex import UnreadableError

    left, right = (text.replace("\\\\", "\\") for text in (found, truth))
    try:
        return numeric.is_equal(left, right, tolerance=ROUNDING) or numeric.is_close(left, right, relative=RELATIVE)
    except UnreadableError:
        return False


def _choice(text: str) -> str:
    text = text.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = CHOICE.findall(text.upper())
    return letters[-1] if letters else text.strip().strip(".").rstrip("/")


def _numbers_equal(found: str, truth: str) -> bool:
    """Compare decimal numbers; percentages also count as fractions and the other way round."""
    value, reference = _number(found), _number(truth)
    if value is None or reference is None:
        return False
    return any(isclose(factor, value, rel_tol=RELATIVE) for factor in (reference / 100, reference, reference * 100))


def _number(text: str) -> float | None:
    text = text.replace(",", "")
    percent = text.endswith("%")
    try:
        return float(text.removesuffix("%").removesuffix("\\")) / 100 if percent else float(text)
    except ValueError:
        return None


def _same_without_brackets(found: str, truth: str) -> bool:
    texts = [found, truth]
    is_square, is_round = (found[0] + found[-1] == pair for pair in ("[]", "()"))
    if is_square and not _is_in(truth, "()") or is_round and not _is_in(truth, "[]"):
        texts = [text.strip("[]()") for text in texts]
    left, right = (re.sub(r"[{}()]", "", text).lower() for text in texts)
    return left == right


def _is_in(text: str, brackets: str) -> bool:
    return text.startswith(brackets[0]) and text.endswith(brackets[1])


def _lists_equal(found: list[str], truth: list[str], depth: int) -> bool:
    return len(found) == len(truth) and all(equal(a, b, depth + 1) for a, b in zip(found, truth, strict=True))


def _matrix_cells(text: str) -> list[str]:
    """The cells of a matrix, row by row; a row ends with a cell that no other text is equal to."""
    rows = [row for row in text[len(MATRIX[0]) : -len(MATRIX[1])].split("\\\\") if row.strip()]
    return [cell for row in rows for cell in (*row.strip().split("&"), "\\\\")]


def _as_matrix(text: str) -> str:
    """Write `{1,2}` as a matrix; source: `str_to_pmatrix`."""
    groups = (group.strip("{}").replace(",", "\\") for group in re.findall(r"\{.*,.*\}", text))
    return ", ".join(f"{MATRIX[0]}{group}{MATRIX[1]}" for group in groups)
