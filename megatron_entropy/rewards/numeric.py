r"""Comparison of expressions by their values, in bounded time and memory, for the symbolic graders.

Expressions are not expanded or simplified, since nothing bounds the time that takes. They are evaluated with 30 digits
at points with positive and negative coordinates, the same in every process. Two expressions are equal if they have the
same value wherever both have one: `\sqrt{x^2}` is not `x`, and `\lfloor n/2 \rfloor` is not `\frac{n-1}{2}`. What
could become large has no value: numbers beyond 2^(10^5), exponents beyond 10^6, factorials beyond 16,000.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mpmath

from megatron_entropy.rewards.latex import Node, UnreadableError, read

DIGITS = 30  # of an evaluation
MAX_EXTRA_DIGITS = 1_000  # that large numbers get in addition
POINTS = 6
AGREEMENT = 1e-12  # largest relative difference of equal values
MAX_BITS = 100_000  # of a value before or behind the point
MAX_EXPONENT_BITS = 20
MAX_FACTORIAL_BITS = 14
MAX_ANGLE_BITS = 1_000
ANGLES = frozenset(("sin", "cos", "tan", "csc", "sec", "cot"))
GROWING = frozenset(("exp", "sinh", "cosh", "tanh"))
MPMATH_NAMES = {
    **{f"arc{name}": f"a{name}" for name in ANGLES},
    **{"arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh"},
}
CONSTANTS: dict[str, Callable[[], Any]] = {"pi": lambda: +mpmath.pi, "e": lambda: +mpmath.e}
NO_VALUE = (ArithmeticError, ValueError, TypeError, NotImplementedError)


def is_equal(left: str, right: str, *, tolerance: float, offset: float = 0.0) -> bool:
    """Whether two LaTeX expressions are equal, or two relations of the same kind with equal sides.

    Args:
        tolerance: largest absolute difference of two expressions without variables.
        offset: a constant difference of two expressions with variables must be below this.

    Returns:
        False also for expressions without a value (see the module).

    Raises:
        UnreadableError: one of them cannot be read.
    """
    return _nodes_equal(read(left), read(right), tolerance, offset)


def is_close(left: str, right: str, *, relative: float) -> bool:
    """Whether two real expressions of numbers, without letters, differ by at most a relative tolerance.

    Raises:
        UnreadableError: one of them cannot be read.
    """
    a, b = read(left), read(right)
    if any(node[0] == "relation" or has_letters(node) for node in (a, b)):
        return False
    values = expression_values(a, b)
    return any(not x.imag and not y.imag and abs(x - y) <= relative * max(abs(x), abs(y)) for x, y in values)


def equation_ratio(left: str, right: str) -> float | None:
    """Return the ratio of the differences `lhs - rhs` of two equations if it is a constant other than 0, else None.

    Raises:
        UnreadableError: a text is not an equation with one `=`, or one of its sides cannot be read.
    """
    if left.count("=") != 1 or right.count("=") != 1:
        raise UnreadableError(f"not two equations: {left[:40]!r} and {right[:40]!r}")
    sides = [read(side) for side in (*left.split("="), *right.split("="))]
    differences = [(a - b, c - d) for a, b, c, d in expression_values(*sides)]
    ratios = [above / below for above, below in differences if above and below]
    if len(ratios) < max(2, len(differences)):
        return None
    if any(abs(ratio - ratios[0]) > AGREEMENT * abs(ratio) for ratio in ratios):
        return None
    return float(ratios[0].real) if abs(ratios[0].imag) <= AGREEMENT * abs(ratios[0]) else None


def has_letters(node: Node) -> bool:
    """Whether an expression has variables, constants or functions without a definition."""
    return node[0] in ("variable", "call") or any(has_letters(child) for child in node if isinstance(child, tuple))


def expression_values(*nodes: Node) -> list[tuple[Any, ...]]:
    """Values of expressions, as mpmath numbers, at the points at which all of them have a finite one."""
    names = sorted(set().union(*(_names(node) for node in nodes)))
    values = [row for point in _points(names) if (row := _row(nodes, point, DIGITS)) is not None]
    bits = max((mpmath.mag(value) for row in values for value in row if value), default=0)
    if not names and values and bits > 60:
        row = _row(nodes, {}, DIGITS + min(int(0.302 * bits), MAX_EXTRA_DIGITS))
        values = [] if row is None else [row]
    return values


def _nodes_equal(left: Node, right: Node, tolerance: float, offset: float) -> bool:
    if left == right:
        return True
    if left[0] == "relation" or right[0] == "relation":
        return any(_relations_equal(left, other, tolerance, offset) for other in (right, _reversed(right)))
    has_variables = _has_variables(left)
    if has_variables != _has_variables(right):
        return False
    values = expression_values(left, right)
    if has_variables:
        return _is_identity(values, offset)
    return any(abs(x - y) <= tolerance for x, y in values)


def _relations_equal(left: Node, right: Node, tolerance: float, offset: float) -> bool:
    if left[0] != right[0] or left[1] != right[1]:
        return False
    return all(_nodes_equal(a, b, tolerance, offset) for a, b in zip(left[2:], right[2:], strict=True))


def _reversed(node: Node) -> Node:
    """A relation read from right to left."""
    if node[0] != "relation":
        return node
    _, sign, left, right = node
    return ("relation", {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign), right, left)


def _is_identity(values: list[tuple[Any, ...]], offset: float) -> bool:
    """Whether two expressions agree at all points, or differ by the same small constant at all of them."""
    if len(values) < 2:
        return False
    if all(abs(x - y) <= AGREEMENT * max(abs(x), abs(y)) for x, y in values):
        return True
    difference = values[0][0] - values[0][1]
    return abs(difference) < offset and all(abs(x - y - difference) <= AGREEMENT * abs(difference) for x, y in values)


def _has_variables(node: Node) -> bool:
    if node[0] in ("variable", "call") and node[1] not in CONSTANTS:
        return True
    return any(_has_variables(child) for child in node if isinstance(child, tuple))


def _names(node: Node) -> set[str]:
    if node[0] == "variable":
        return {node[1]} - CONSTANTS.keys()
    return set().union(*(_names(child) for child in node if isinstance(child, tuple)))


def _points(names: list[str]) -> Iterator[dict[str, Any]]:
    """The points of evaluation: all coordinates of the first are positive; without names there is one point."""
    generator = random.Random(0)
    for index in range(POINTS if names else 1):
        point = {}
        for name in names:
            value = generator.uniform(0.4, 2.9)
            point[name] = mpmath.mpf(-value if index and generator.random() < 0.5 else value)
        yield point


def _row(nodes: tuple[Node, ...], point: Mapping[str, Any], digits: int) -> tuple[Any, ...] | None:
    with mpmath.workdps(digits):
        try:
            return tuple(mpmath.mpmathify(_value(node, dict(point))) for node in nodes)
        except NO_VALUE:
            return None


def _value(node: Node, point: dict[str, Any]) -> Any:
    """Evaluate one node.

    Raises:
        ArithmeticError, ValueError: it has no finite value, or could become too large.
    """
    operator, *operands = node
    if operator == "number":
        result = mpmath.mpf(operands[0].numerator) / operands[0].denominator
    elif operator == "variable":
        result = CONSTANTS[operands[0]]() if operands[0] in CONSTANTS else point[operands[0]]
    elif operator == "call":
        result = _call(operands[0], operands[1:], point)
    elif operator in ("factorial", "power") and _is_product(operands[0], point):  # `n(n+1)^2` is n times a square
        _, name, argument = operands[0]
        result = _value(("multiply", ("variable", name), (operator, argument, *operands[1:])), point)
    elif operator == "relation":
        raise ValueError("a relation has no value")
    else:
        result = _apply(operator, [_value(operand, point) for operand in operands])
    if result and not (mpmath.isfinite(result) and abs(mpmath.mag(result)) <= MAX_BITS):
        raise OverflowError("a value is infinite or too large")
    return result


def _is_product(node: Node, point: Mapping[str, Any]) -> bool:
    """Whether a node is like `n(n+1)`, a call whose name is also a variable or a constant."""
    return node[0] == "call" and len(node) == 3 and (node[1] in point or node[1] in CONSTANTS)


def _call(name: str, arguments: list[Node], point: dict[str, Any]) -> Any:
    """The value of a call: of a product (`_is_product`), or a random number for an undefined function.

    The same call has the same value in all expressions that are compared, since its value is derived from its text.
    """
    if _is_product(("call", name, *arguments), point):
        return _value(("multiply", ("variable", name), arguments[0]), point)
    values = [mpmath.nstr(_value(argument, point), 12) for argument in arguments]
    return mpmath.mpf(random.Random(f"{name}{values}").uniform(0.4, 2.9))


def _apply(operator: str, values: list[Any]) -> Any:
    if operator == "add":
        return sum(values[1:], values[0])
    if operator == "multiply":
        return mpmath.fprod(values)
    if operator == "divide":
        return values[0] / values[1]
    if operator == "negate":
        return -values[0]
    if operator == "power":
        return mpmath.power(values[0], _limited(values[1], MAX_EXPONENT_BITS))
    if operator in ("factorial", "binomial"):
        return getattr(mpmath, operator)(*(_limited(value, MAX_FACTORIAL_BITS) for value in values))
    if operator == "abs":
        return abs(values[0])
    if operator == "log":
        return mpmath.log(*values)
    if operator in ANGLES:
        return getattr(mpmath, operator)(_limited(values[0], MAX_ANGLE_BITS))
    if operator in GROWING:
        return getattr(mpmath, operator)(_limited(values[0], MAX_EXPONENT_BITS))
    return getattr(mpmath, MPMATH_NAMES.get(operator, operator))(values[0])


def _limited(value: Any, bits: int) -> Any:
    if value and mpmath.mag(value) > bits:
        raise OverflowError("an operand is too large")
    return value
