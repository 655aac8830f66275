"""Symbolic proof with sympy: reduce a residual to zero, or collect exact rational evidence."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

PRIME_RANGE = 10**6
"""Random rationals have numerator and denominator below this."""


class Residual(NamedTuple):
    """Outcome of one symbolic check."""

    zero: bool
    proved: bool
    shown: str
    size: float
    """Absolute value at the worst point tried when the residual is not zero; 0 otherwise."""


DIGITS = 50
"""Precision of evaluation where exact arithmetic does not reach."""

VANISHING = 1e-40
"""Below this, relative to its largest term, a value of `DIGITS` digits counts as zero."""


def vanishes(expression: Any, *, trials: int = 20, seed: int = 0) -> Residual:
    """Whether a sympy expression is identically zero under its symbols' assumptions.

    Simplification to 0 is a proof.  Where it stalls, the expression is evaluated at random rational points: where
    arithmetic is exact, a rational function that vanishes at `trials` of them is zero except with probability below
    (degree / 10^6)^trials (Schwartz and Zippel); elsewhere this is evidence only and `proved` is False.
    Raises FloatingPointError if the expression has a finite value at none of the points.
    """
    import sympy as sp

    expression = sp.sympify(expression)
    # Cheap and complete for rational functions; full simplification only where that does not settle it.
    if sp.cancel(sp.together(sp.expand(expression))) == 0 or sp.simplify(expression) == 0:
        return Residual(True, True, "0", 0.0)
    symbols = sorted(expression.free_symbols, key=lambda s: s.name)
    draw = random.Random(seed)
    values = [_value(expression, {s: _rational(draw, s) for s in symbols}) for _ in range(trials)]
    finite = [v for v in values if v is not None]
    if not finite:
        raise FloatingPointError(f"{expression} is finite at none of {trials} random points")
    if any(size > 0 for size, _ in finite):
        return Residual(False, True, str(sp.simplify(expression)), max(size for size, _ in finite))
    exact = all(rational for _, rational in finite) and expression.is_rational_function(*symbols)
    return Residual(True, bool(exact), str(expression), 0.0)


def _value(expression: Any, point: dict[Any, Any]) -> tuple[float, bool] | None:
    """Absolute value at a point, 0 if it vanishes to `DIGITS` digits, and whether it is exact; None if not finite."""
    import sympy as sp

    value = expression.subs(point)
    if value.is_Rational:
        return (max(abs(float(value)), sys.float_info.min) if value else 0.0), True
    size = sp.Abs(sp.N(value, DIGITS))
    if not size.is_finite:
        return None
    # Relative to its terms: a tiny expression is not zero.
    terms = [sp.Abs(sp.N(term.subs(point), DIGITS)) for term in sp.Add.make_args(expression)]
    largest = max((t for t in terms if t.is_finite), default=sp.Integer(1))
    return (0.0 if size <= VANISHING * largest else max(float(size), sys.float_info.min)), False


def _rational(draw: random.Random, symbol: Any) -> Any:
    import sympy as sp

    value = sp.Rational(draw.randrange(1, PRIME_RANGE), draw.randrange(1, PRIME_RANGE))
    if symbol.is_integer:
        value = sp.Integer(draw.randrange(1, 100))
    if symbol.is_positive or symbol.is_nonnegative:
        return value
    if symbol.is_negative:
        return -value
    return value if draw.random() < 0.5 else -value


def all_vanish(expressions: Iterable[Any]) -> Residual:
    """All residuals vanish; the first that does not is reported."""
    result = Residual(True, True, "0", 0.0)
    for expression in expressions:
        one = vanishes(expression)
        if not one.zero:
            return one
        result = result._replace(proved=result.proved and one.proved)
    return result
