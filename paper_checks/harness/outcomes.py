"""Brings what a check returned into plain Python, so that one odd field costs its own claim and not the whole report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from paper_checks.harness.claim import ClaimError, Outcome, shortened

NUMBERS = ("margin", "tolerance")
OPTIONAL_NUMBERS = ("tightness", "log_e", "p", "resolution", "paper_value", "our_value")
TEXTS = ("tolerance_reason", "validity", "note", "undecided")
MAPPINGS = ("search", "figure")


def normalized(outcome: Outcome) -> Outcome:
    """The same outcome with Python numbers, and lists for arrays; whole floats serve as counts.

    Raises ClaimError naming the field if a value is of a kind that a report cannot hold.
    """
    fields: dict[str, Any] = {name: _number(name, getattr(outcome, name)) for name in NUMBERS}
    for name in OPTIONAL_NUMBERS:
        value = getattr(outcome, name)
        fields[name] = None if value is None else _number(name, value)
    for name in TEXTS:
        fields[name] = _text(name, getattr(outcome, name))
    if outcome.counterexample is not None:
        fields["counterexample"] = _text("counterexample", outcome.counterexample)
    for name in MAPPINGS:
        value = getattr(outcome, name)
        if not (value is None or isinstance(value, Mapping)):
            raise _odd(name, value, "None or a dict")
        fields[name] = plain(name, value)
    return dataclasses.replace(outcome, n=_count(outcome.n), witness=plain("witness", outcome.witness), **fields)


def plain(name: str, value: Any) -> Any:
    """`value` as nested lists and dicts of Python's own scalars; `name` is the field, for the error."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind in "biufU" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            return array.tolist()
    raise _odd(name, value, "numbers, text, lists, dicts or arrays of them")


def _number(name: str, value: Any) -> float:
    """A number from a Python, NumPy, JAX or sympy scalar."""
    if isinstance(value, str):  # which `float` would read
        raise _odd(name, value, "a number")
    try:
        return float(np.asarray(value).item() if hasattr(value, "__array__") else value)
    except (TypeError, ValueError) as error:
        raise _odd(name, value, "a number") from error


def _count(value: Any) -> int:
    number = _number("n", value)
    if not math.isfinite(number) or number != int(number) or number < 0:
        raise _odd("n", value, "a whole number, how many inputs were looked at")
    return int(number)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _odd(name, value, "text")
    return value


def _odd(name: str, value: Any, expected: str) -> ClaimError:
    return ClaimError(f"Outcome.{name} is {shortened(value, 100)} ({type(value).__name__}); expected {expected}")
