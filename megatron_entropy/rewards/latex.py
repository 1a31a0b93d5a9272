r"""Reader of mathematical expressions in LaTeX, for the symbolic graders: linear time, no recursion without a bound.

The grammar is that of `sympy.parsing.latex`, on which OlympiadBench's and Qwen's graders rest, without integrals, sums
and limits. It keeps what matters for their grades: `1/2 x` is `1/(2x)`, `x^{y}^z` is `(x^y)^z`, `\sin 2x` takes the
whole product, `f(x)` is a function (or a product, see `numeric`), `2 5` is 25, a subscript belongs to the name, and `i`
is a letter. sympy's own reader takes minutes for 20 bars and returns the beginning of a text that it cannot read, so
that `(n-2)(n+5` equals `n-2`; here such a text is unreadable.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

MAX_LENGTH = 1_000  # characters of an expression
MAX_DIGITS = 400  # of one number
MAX_DEPTH = 40  # nested brackets and functions

Node = tuple
r"""An expression: `("number", Fraction)`, `("variable", name)`, or an operator and its operands, which are nodes:
add, multiply, divide, power, negate, factorial, binomial, abs, floor, ceil, conj, log (argument, base), `call` (name,
arguments) and the functions of `FUNCTIONS`. A relation is `("relation", sign, left, right)`."""

FUNCTIONS = frozenset(
    "exp sin cos tan csc sec cot arcsin arccos arctan arccsc arcsec arccot sinh cosh tanh arsinh arcosh artanh".split()
)
LOGARITHMS = frozenset(("log", "ln", "lg"))
FRACTIONS = frozenset(("frac", "dfrac", "tfrac", "cfrac"))
BINOMIALS = frozenset(("binom", "dbinom", "tbinom"))
NAMES = frozenset(("text", "mathrm", "mathbf", "mathit", "textrm", "textbf", "operatorname", "mbox"))
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BARS = {"|": "|", r"\lvert": r"\rvert", r"\vert": r"\vert"}
WRAPPERS = {r"\lfloor": "floor", r"\lceil": "ceil"}
PRODUCTS = {
    "*": "multiply",
    r"\times": "multiply",
    r"\cdot": "multiply",
    "/": "divide",
    r"\div": "divide",
    ":": "divide",
}
RELATIONS = {
    **{sign: sign for sign in "=<>"},
    **dict.fromkeys((r"\le", r"\leq", r"\leqq", r"\leqslant", "≤"), "<="),
    **dict.fromkeys((r"\ge", r"\geq", r"\geqq", r"\geqslant", "≥"), ">="),
    **dict.fromkeys((r"\ne", r"\neq", "≠"), "!="),
}
UNREAD = frozenset(r"\int \iint \oint \sum \prod \lim \partial \cup \cap \in \to \infty\infty \pm \mp".split())
SPACE = re.compile(r"\s|~|&|\\[,;:! ]|\\(?:q?quad|left|right|displaystyle|limits|thinspace|[Bb]igg?[lr]?)(?![a-zA-Z])")
NUMBER = re.compile(r"(?:(?<![_^])\d(?:\s*\d)*|\d+)(?:,\d{3}(?!\d))*(?:\.\d*)?|\.\d+")
TOKEN = re.compile(r"\\[a-zA-Z]+|\\[{}]|[a-zA-Zα-ωΑ-Ω_^+\-*/:()\[\]{}|!'=<>≤≥≠,]")
UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt "}
)
STOP = ""


class UnreadableError(ValueError):
    """A text that does not follow the grammar, or exceeds a limit."""


def read(text: str) -> Node:
    """Parse a LaTeX expression or relation.

    Raises:
        UnreadableError: the text does not follow the grammar to its end, or exceeds a limit of this module.
    """
    node = _read(text)
    if node is None:
        raise UnreadableError(f"cannot read the expression {text[:40]!r}")
    return node


def is_readable(text: str) -> bool:
    """Whether `read` reads a text."""
    return _read(text) is not None


@lru_cache(maxsize=4096)
def _read(text: str) -> Node | None:
    if len(text) > MAX_LENGTH:
        return None
    try:
        return _Parser(_tokens(text.translate(UNICODE))).parse()
    except UnreadableError:
        return None


def _tokens(text: str) -> list[str]:
    tokens = []
    position = 0
    while position < len(text):
        for pattern in (SPACE, NUMBER, TOKEN):
            match = pattern.match(text, position)
            if match is not None:
                break
        else:
            raise UnreadableError(text[position])
        if pattern is not SPACE:
            tokens.append(match[0])
        if pattern is NUMBER and len(match[0]) > MAX_DIGITS:
            raise UnreadableError("a number with too many digits")
        position = match.end()
    return tokens


class _Cursor:
    """A position in a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens, STOP]
        self.index = 0

    @property
    def token(self) -> str:
        return self.tokens[self.index]

    def take(self) -> str:
        token = self.token
        self.index += token != STOP
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UnreadableError(f"{token} is missing")

    def subscript(self) -> str:
        self.expect("_")
        if self.token == "{":
            return f"_{self.raw_braces()}"
        if self.token in (STOP, "}", ")", "]"):
            raise UnreadableError("a subscript is missing")
        token = self.take()
        return f"_{self.raw_braces()}" if token[1:] in NAMES else f"_{token}"

    def raw_braces(self) -> str:
        """The tokens of a group in braces without its commands for upright text."""
        self.expect("{")
        depth, parts = 1, []
        while depth:
            token = self.take()
            if token == STOP:
                raise UnreadableError("a brace is not closed")
            depth += (token == "{") - (token == "}")
            if token not in "{}" and token[1:] not in NAMES:
                parts.append(token)
        return "".join(parts)


class _Parser(_Cursor):
    """Recursive descent with one token of look-ahead."""

    def __init__(self, tokens: list[str]) -> None:
        super().__init__(tokens)
        self.depth = 0
        self.bars: list[str] = []  # closing bars of the open absolute values; "" in a bracket

    def parse(self) -> Node:
        node = self.sum()
        while self.token in RELATIONS:
            sign = RELATIONS[self.take()]
            node = ("relation", sign, node, self.sum())
        self.expect(STOP)
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too many nested brackets")
        terms = [self.product()]
        while self.token in ("+", "-"):
            sign = self.take()
            term = self.product()
            terms.append(term if sign == "+" else ("negate", term))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self, *, in_argument: bool = False) -> Node:
        node = self.signed(in_argument=in_argument)
        while self.token in PRODUCTS:
            operator = PRODUCTS[self.take()]
            node = (operator, node, self.signed(in_argument=in_argument))
        return node

    def signed(self, *, in_argument: bool) -> Node:
        is_negative = False
        while self.token in ("+", "-"):
            is_negative ^= self.take() == "-"
        factors = [self.postfix()]
        while self.begins_factor() and not (in_argument and self.token[1:] in FUNCTIONS | LOGARITHMS | {"sqrt"}):
            factors.append(self.postfix())
        node = factors[0] if len(factors) == 1 else ("multiply", *factors)
        return ("negate", node) if is_negative else node

    def begins_factor(self) -> bool:
        token = self.token
        if token in BARS and not (self.bars and self.bars[-1] == token):
            return True
        return token in BRACKETS or token[:1].isalnum() or token[:1] == "." or self.is_command()

    def is_command(self) -> bool:
        token = self.token
        is_sign = token in PRODUCTS or token in RELATIONS or token in BRACKETS.values() or token in BARS.values()
        return token.startswith("\\") and not is_sign

    def postfix(self) -> Node:
        node = self.factor()
        while self.token in ("^", "!"):
            node = ("factorial", node) if self.take() == "!" else ("power", node, self.exponent())
        return node

    def exponent(self) -> Node:
        is_negative = self.token == "-"
        if is_negative:
            self.take()
        node = self.bracket() if self.token == "{" else self.factor(with_call=False)
        if self.token == "_":  # `v^2_0`: the grammar of sympy drops the subscript
            self.subscript()
        return ("negate", node) if is_negative else node

    def bracket(self) -> Node:
        opening = self.take()
        self.bars.append("")
        node = self.sum()
        self.bars.pop()
        self.expect(BRACKETS[opening])
        return (WRAPPERS[opening], node) if opening in WRAPPERS else node

    def factor(self, *, with_call: bool = True) -> Node:
        token = self.token
        if token in BRACKETS:
            return self.bracket()
        if token in BARS:
            return self.absolute()
        if token[:1].isdigit() or token[:1] == ".":
            return ("number", Fraction("".join(self.take().replace(",", "").split())))
        if token[:1].isalpha():
            return self.variable(self.take(), with_call=with_call)
        if not self.is_command() or token in UNREAD:
            raise UnreadableError(f"{token} is not expected")
        return self.command(self.take()[1:], with_call=with_call)

    def absolute(self) -> Node:
        closing = BARS[self.take()]
        self.bars.append(closing)
        self.depth += 1
        node = self.sum()
        self.depth -= 1
        self.bars.pop()
        self.expect(closing)
        return ("abs", node)

    def command(self, name: str, *, with_call: bool) -> Node:
        if name in FRACTIONS:
            return ("divide", self.argument(), self.argument())
        if name in BINOMIALS:
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name == "overline":
            return ("conj", self.argument())
        if name in FUNCTIONS or name in LOGARITHMS:
            return self.function(name)
        if name in NAMES:
            return self.variable(self.raw_braces(), with_call=with_call)
        return self.variable(name, with_call=with_call)

    def argument(self) -> Node:
        r"""The argument of `\frac` and its like: a group in braces, one digit or one letter."""
        if self.token == "{":
            return self.bracket()
        if len(self.token) > 1 and self.token.isdigit():
            digit, self.tokens[self.index] = self.token[0], self.token[1:]
            return ("number", Fraction(digit))
        return self.factor(with_call=False)

    def root(self) -> Node:
        index = self.bracket() if self.token == "[" else ("number", Fraction(2))
        radicand = self.bracket() if self.token in "({" and self.token else self.argument()
        return ("power", radicand, ("divide", ("number", Fraction(1)), index))

    def function(self, name: str) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too many nested functions")
        base, power = self.scripts()
        argument = self.bracket() if self.token == "(" else self.product(in_argument=True)
        self.depth -= 1
        if name in LOGARITHMS:
            base = base or (("number", Fraction(10)) if name == "lg" else ("variable", "e"))
            node: Node = ("log", argument, base)
        elif power == ("negate", ("number", Fraction(1))) and name in ("sin", "cos", "tan", "csc", "sec", "cot"):
            return (f"arc{name}", argument)
        else:
            node = (name, argument)
        return ("power", node, power) if power else node

    def scripts(self) -> tuple[Node | None, Node | None]:
        """Subscript and superscript of a function."""
        base = power = None
        while self.token in ("_", "^"):
            if self.take() == "_":
                base = self.bracket() if self.token == "{" else self.argument()
            else:
                power = self.exponent()
        return base, power

    def variable(self, name: str, *, with_call: bool) -> Node:
        while self.token in ("_", "'"):
            name += "'" if self.token == "'" and self.take() else self.subscript()
        if with_call and self.token == "(":
            return ("call", name, *self.call_arguments())
        return ("variable", name)

    def call_arguments(self) -> list[Node]:
        self.expect("(")
        self.bars.append("")
        arguments = [self.sum()]
        while self.token == ",":
            self.take()
            arguments.append(self.sum())
        self.bars.pop()
        self.expect(")")
        return arguments
