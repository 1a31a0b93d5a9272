r"""Minerva's quantitative problems: numbers with a tolerance and formulas, as Qwen2.5-Math's evaluation grades them.

Source: `extract_answer`, `strip_string` and `math_equal` in `evaluation/parser.py` and `evaluation/grader.py` of
Qwen2.5-Math (data set `minerva_math`). Differences, since the release reads some right answers wrongly:

- Its LaTeX parser takes `4.5e33` for 4.5 times e times 33, and `np.arcsin(10/13)` for a product of letters; here both
  are numbers, so `4.5 \times 10^{33}` and `\arcsin(10/13)` are right.
- A unit behind a number in the answer (`1.6 \mathrm{~cm}`, `300 km/s`) does not count.
- Texts of Python form are read without `eval`, and LaTeX by latex2sympy2-extended instead of three parsers in turn.
- A ground truth that cannot be read is an error, and so is a comparison that takes too long.
"""

from __future__ import annotations

import ast
import math
import re

from megatron_entropy.records import Grade
from megatron_entropy.rewards import latex, numeric
from megatron_entropy.rewards.math_equal import answer_text, box_content, braced_fractions
from megatron_entropy.rewards.opencompass import replace_all, without_final_text

TAIL = 50_000  # only the last characters of a response are read
LENGTH = 1_000  # characters of an answer; a longer one is wrong
TOLERANCE = 1e-4  # relative
PERCENT = (1.0, 0.01, 100.0)  # a plain number may be right as a percentage or as a fraction

LITERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
E_NOTATION = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)(?![\w.])", re.ASCII)
NAMES = re.compile(r"\b(?:np|numpy|math)\.")
ASSIGNED = re.compile(r"\s*[^=]{1,2}?\s*=([^=]*)")
UNIT = (
    r"(?:\\mu\s*|da|[afpnumcdkMGT])?(?:m|g|s|A|K|N|J|W|C|V|F|T|H|L|S|Hz|Pa|eV|pc|mol|erg|cal|bar|Ohm|\\Omega|\\Angstrom)s?"
    r"|\\AA|AU|min|hr|h|yr|rad|deg|arcsec|(?:degree|radian|(?:arc)?second|(?:arc)?minute|hour|day|year|magnitude)s?"
    r"|(?:kilo|centi|milli|nano)?(?:meter|metre|gram)s?"
)
LAST_UNIT = re.compile(rf"(?<=[\d\s/}})])(?:{UNIT})(?:\s*\^\s*(?:\{{\s*[+-]?\d\s*\}}|[+-]?\d))?$")

UNCHANGED = (("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge"))
SPACING = (("\\!", ""), ("tfrac", "frac"), ("dfrac", "frac"), *UNCHANGED, ("\\left", ""), ("\\right", ""))
SYMBOLS = (
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\(", ""), ("\\)", ""), ("\\%", ""), ("%", "")),
    *(("\\mathbf", ""), (" .", " 0."), ("{.", "{0.")),
)
BLANK = re.compile(r"(?<!\\)\\[,;: ]|~")
WRAPPED = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
ACCENT = re.compile(r"\\(d{1,2}ot|bar|hat|vec|tilde)(?:\s*\{\s*(\w)\s*\}|\s+(\w))(?:_(?:\{\s*(\w+)\s*\}|(\w)))?")
BRACKETS = str.maketrans("", "", "{}() ")

FUNCTIONS = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "sin", "cos", "tan", "sinh", "cosh", "tanh", "log10")},
    **{f"arc{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{"log": math.log, "abs": abs, "power": math.pow, "arctan2": math.atan2},
}
OPERATORS = {
    ast.Add: float.__add__,
    ast.Sub: float.__sub__,
    ast.Mult: float.__mul__,
    ast.Div: float.__truediv__,
    ast.Pow: math.pow,
}


def minerva(response: str, answer: str) -> Grade:
    r"""Grade a number or a formula, with a relative tolerance of 1e-4 for numbers.

    The answer of a response is `final answer is $...$. I hope`, else its last box, else what follows the last "the
    answer is" or "final answer is", else its last number. Of two plain numbers the response's may also be a hundredth
    or hundred times the ground truth (percentages). The ground truth is an answer, or a solution whose last
    `\boxed{...}` is the answer; a unit outside the box does not count.

    Raises:
        ValueError: the ground truth is empty, too long, or neither a number nor a formula.
    """
    truth = _canonical(box_content(answer) if "\\boxed" in answer else answer)
    if not truth or len(truth) > LENGTH:
        raise ValueError(f"the ground truth {answer[-40:]!r} has no answer of 1 to {LENGTH} characters")
    found = answer_text(response[-TAIL:]).partition(". I hope it is correct")[0].strip()
    if not found or len(found) > LENGTH:
        return Grade(False, found[:LENGTH] or None)
    found = _canonical(found)
    try:
        return Grade(_is_equal(found, truth), found)
    except RecursionError:  # a chain of some hundred operators
        return Grade(False, found)


def _canonical(text: str) -> str:
    """Write an answer without signs of layout. Source: `strip_string` (without its removal of units)."""
    text = replace_all(text.strip().replace("\n", "").rstrip("."), SPACING)
    text = replace_all(without_final_text(text), SYMBOLS).strip()
    text = WRAPPED.sub(r" \1 ", re.sub(r"\\mbox{[^}]*}", "", text)).strip()
    text = re.sub(r"(?<!\d)(\d+)\.0*(?=[^\d]|$)", r"\1", text)  # 2.00 and -1./3
    text = f"0{text}" if text.startswith(".") else text
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text)
    return braced_fractions(re.sub(r"\\frac\s+", r"\\frac", text)).strip()


def _is_equal(found: str, truth: str) -> bool:
    """Whether two canonical answers are equal. Source: `math_equal`."""
    if found.translate(BRACKETS).lower() == truth.translate(BRACKETS).lower():
        return True
    left, right = _literal(found), _literal(truth)
    if left is not None and right is not None:
        return any(_is_close(left, right * scale) for scale in PERCENT)
    if "=" not in truth and (assigned := ASSIGNED.fullmatch(found)):
        return _is_equal(assigned[1].strip(), truth)
    if "=" not in found and (assigned := ASSIGNED.fullmatch(truth)):
        return _is_equal(found, assigned[1].strip())
    elements = _elements(truth)
    if len(elements) > 1:
        others = _elements(found)
        return len(others) == len(elements) and all(map(_is_equal, others, elements))
    left, right = _as_latex(found), _as_latex(truth)
    latex.read(right)
    if _numbers_close(_as_latex(_without_unit(found)), right):
        return True
    if "=" in found and "=" in truth:
        return _is_same_equation(left, right)
    return latex.is_readable(left) and numeric.is_equal(left, right, tolerance=0.0)


def _numbers_close(left: str, right: str) -> bool:
    """Whether both texts are expressions of real numbers with close values; `e` is Euler's number."""
    if not latex.is_readable(left):
        return False
    values = numeric.expression_values(latex.read(left), latex.read(right))
    if len(values) != 1 or any(value.imag for value in values[0]):  # with variables there are several points
        return False
    value, truth = values[0]
    return abs(value - truth) <= TOLERANCE * max(abs(value), abs(truth))


def _is_same_equation(left: str, right: str) -> bool:
    try:
        ratio = numeric.equation_ratio(left, right)
    except latex.UnreadableError:
        return False
    return ratio is not None and math.isclose(abs(ratio), 1.0, rel_tol=numeric.AGREEMENT)


def _is_close(value: float, truth: float) -> bool:
    return math.isfinite(truth) and math.isclose(value, truth, rel_tol=TOLERANCE)


def _literal(text: str) -> float | None:
    text = text.replace(",", "").replace(" ", "")
    return float(text) if LITERAL.fullmatch(text) else None


def _elements(text: str) -> list[str]:
    """Elements of a tuple, an interval, or a list without brackets; a text without commas is one element."""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        text = text[1:-1]
    elements = [""]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _python_number(text: str) -> float | None:
    """Value of arithmetic in Python's or numpy's notation, or None; nothing else is evaluated."""
    if "\\" in text:
        return None
    try:
        return _evaluate(ast.parse(NAMES.sub("", text), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, KeyError, TypeError, RecursionError, MemoryError):
        return None  # MemoryError is the parser's word for deep nesting; the text has at most `LENGTH` characters


def _evaluate(node: ast.expr) -> float:
    """Evaluate numbers, `+ - * / **`, a sign and `FUNCTIONS`, all in float."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            return OPERATORS[type(operator)](_evaluate(left), _evaluate(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return float(FUNCTIONS[name](*map(_evaluate, arguments)))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _as_latex(text: str) -> str:
    """Write a number in Python's notation as LaTeX, and an accented letter as a letter with an index."""
    value = _python_number(text)
    if value is not None:
        return E_NOTATION.sub(r"\1 \\times 10^{\2}", repr(value))
    return ACCENT.sub(r"\2\3_{\1\4\5}", E_NOTATION.sub(r"\1 \\times 10^{\2}", text))


def _without_unit(text: str) -> str:
    """Remove the units behind a number: `300 km/s`, `9.8 m s^{-2}`."""
    number = BLANK.sub(" ", text)
    while match := LAST_UNIT.search(number):
        number = number[: match.start()].rstrip(" /")
    return number
