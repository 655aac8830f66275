"""Decides whether a violation is real, and writes it down: higher precision, simplified witnesses, replay.

An adversary finds rounding errors before it finds mathematics, so that nothing is called violated before it has been
evaluated in more digits, or is at least seen in 32 and in 64 bits alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.numerics import enable_x64

ROUNDING_FACTOR = 4.0
"""Allowance per measured rounding error: twice for its sign, twice for a sample of points instead of all."""

SIMPLIFIED_SIZE = 400
"""Larger arrays are rounded as a whole only."""

OBVIOUS = 1e-6
"""Far above rounding in 64 bits: a violation of this size needs no ascent, and Hypothesis may shrink its structure."""


@functools.lru_cache(maxsize=256)
def batched(violation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`violation` over a batch of inputs; one compilation per shape, shared by a claim and its controls."""

    def evaluate(xs: Any, constants: tuple[Any, ...]) -> jax.Array:
        return jax.vmap(lambda x: violation(x, *constants))(xs)

    return jax.jit(evaluate)


class Judge:
    """Decides whether a violation is real or rounding: an adversary finds rounding errors before mathematics."""

    MOST, FEW = 12, 3
    """Candidates examined before the search settles for what is confirmed; few where violations are near rounding."""

    def __init__(
        self,
        violation: Callable[..., jax.Array],
        plain: Callable[..., jax.Array],
        constants: tuple[Any, ...],
        high: Callable[..., float] | None,
        tolerance: tuple[float, str] | None,
        near: Any,
        batch: int,
    ):
        self.violation, self.constants, self.high, self.batch = violation, constants, high, batch
        self.plain = plain  # not restricted to legal inputs: rounding to 32 bits may leave a domain by a hair
        if tolerance is not None:
            self.allowance, self.reason = tolerance
        elif high is not None:
            self.allowance = ROUNDING_FACTOR * float(np.finfo(np.float64).eps)
            self.reason = "a few units in the last place; the worst point is evaluated in higher precision"
        else:
            self.allowance, self.reason = self._measured(near)
        self.stated = tolerance is not None

    def _measured(self, near: Any) -> tuple[float, str]:
        difference = np.abs(_in_single_precision(self.plain, self.constants, near, self.batch) - self.many(near))
        difference = difference[np.isfinite(difference)]
        eps = float(np.finfo(np.float64).eps)
        measured = float(difference.max()) * eps / float(np.finfo(np.float32).eps) if difference.size else 0.0
        reason = f"{ROUNDING_FACTOR:g} x rounding measured in 32 bits on the same inputs, scaled to 64 bits"
        return ROUNDING_FACTOR * max(measured, eps), reason

    def many(self, xs: Any) -> np.ndarray:
        return evaluate(self.violation, self.constants, xs, self.batch)

    def one(self, x: Any) -> float:
        return float(self.many(jax.tree.map(lambda a: jnp.asarray(a)[None], x))[0])

    def confirm(self, x: Any, value: float) -> float | None:
        """The violation in the best precision at hand, or None where it cannot be told from rounding."""
        if self.high is not None:
            return in_high(self.high, x, self.constants)
        if self.stated:
            return value
        alone = jax.tree.map(lambda a: np.asarray(a)[None], x)
        low = float(_in_single_precision(self.plain, self.constants, alone, self.batch)[0])
        return value if abs(low - value) <= value / 2 else None

    def worst_confirmed(
        self, candidates: list[tuple[float, Any]], others: list[tuple[float, Any]]
    ) -> tuple[float, Any, str]:
        """The worst settled candidate, violated or not, and how it was settled; `others` are asked where that ends in no
        violation.

        An apparent violation that is rounding in higher precision is settled.  One that can be told from rounding neither
        way, or that was not examined, is not: the allowance rises to the largest of them, so that the claim
        "holds" to that size only and a control must violate by more.
        """
        how = "in 64 bits against the stated allowance" if self.stated else "seen in 32 and in 64 bits"
        how = "in higher precision" if self.high is not None else how
        settled: list[tuple[float, Any]] = []
        unsettled: list[float] = []
        rounding = 0
        for group in (candidates, others):
            ordered = sorted(group, key=lambda c: -c[0])
            most = self.MOST if ordered and ordered[0][0] > OBVIOUS else self.FEW
            for place, (value, x) in enumerate(ordered):
                apparent = value > self.allowance
                if apparent and place >= most:
                    unsettled.append(value)
                    continue
                real = self.confirm(x, value) if apparent or self.high is not None else value
                if real is None:
                    unsettled.append(value)
                    continue
                settled.append((real, x))
                if real > self.allowance:
                    return real, x, f"confirmed {how}"
                if not apparent:
                    break
                rounding += 1
        if not settled:
            raise FloatingPointError(
                f"violations up to {max(unsettled):.2g} cannot be told from rounding; give the check a `high` function "
                "that evaluates the violation in higher precision"
            )
        words = [f"confirmed {how}"]
        if rounding:
            words.append(f"{rounding} apparent violations were rounding")
        if unsettled:
            words.append(f"{len(unsettled)} apparent violations could not be told from rounding or were not examined")
            self.allowance = max(unsettled)
            self.reason = "the largest apparent violation that could not be told from rounding"
        value, x = max(settled, key=lambda c: c[0])
        return value, x, "; ".join(words)


def in_high(high: Callable[..., float], x: Any, constants: tuple[Any, ...]) -> float:
    """`high(x, *constants)`.  Raises FloatingPointError with the input if it is not finite."""
    value = float(high(x, *constants))
    if not math.isfinite(value):
        raise FloatingPointError(f"`high`, the violation in higher precision, is {value} at the input {printable(x)}")
    return value


def padded(xs: Any, size: int) -> Any:
    """Repeat the candidates cyclically up to `size`, so that every ascent has the same batch shape."""
    return jax.tree.map(lambda a: jnp.asarray(np.resize(a, (size, *a.shape[1:]))), xs)


def evaluate(violation: Callable[..., jax.Array], constants: tuple[Any, ...], xs: Any, batch: int) -> np.ndarray:
    """Violations of a batch of inputs, padded so that every call of a search has the same shape."""
    count = len(jax.tree.leaves(xs)[0])
    return np.asarray(batched(violation)(padded(xs, max(batch, count)), constants))[:count]


def _in_single_precision(
    violation: Callable[..., jax.Array], constants: tuple[Any, ...], xs: Any, batch: int
) -> np.ndarray:
    def lower(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: np.asarray(a, np.float32) if np.issubdtype(np.asarray(a).dtype, np.floating) else np.asarray(a),
            tree,
        )

    with enable_x64(False):
        return evaluate(violation, lower(constants), lower(xs), batch).astype(float)


def simplify(judge: Judge, x: Any, value: float) -> tuple[Any, float]:
    """Round and zero the witness as long as a good part of the violation survives."""
    floor = max(10 * judge.allowance, 0.25 * value)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, x))

    def survives(trial: list[np.ndarray]) -> bool:
        v = judge.one(jax.tree.unflatten(tree, trial))
        return math.isfinite(v) and v > floor

    for digits in (1, 2, 3, 4):
        trial = [_significant(a, digits) for a in leaves]
        if survives(trial):
            leaves = trial
            break
    for i, leaf in enumerate(leaves):
        if not np.issubdtype(leaf.dtype, np.floating) or leaf.size > SIMPLIFIED_SIZE:
            continue
        for j in range(leaf.size):
            for candidate in (0.0, float(np.round(leaves[i].flat[j]))):
                if leaves[i].flat[j] == candidate:
                    break
                trial = [a.copy() for a in leaves]
                trial[i].flat[j] = candidate
                if survives(trial):
                    leaves = trial
                    break
    simple = jax.tree.unflatten(tree, leaves)
    confirmed = judge.confirm(simple, judge.one(simple))
    return (x, value) if confirmed is None or confirmed <= judge.allowance else (simple, confirmed)


def _significant(a: np.ndarray, digits: int) -> np.ndarray:
    if not np.issubdtype(a.dtype, np.floating):
        return a
    with np.errstate(divide="ignore"):
        power = np.where(a == 0, 0, np.floor(np.log10(np.abs(a)))) - digits + 1
    # Division by a power of ten gives the nearest double to the decimal number, and so its short form; 10^-k does not.
    up, down = 10.0 ** np.maximum(-power, 0), 10.0 ** np.maximum(power, 0)
    return np.round(a / down * up) / up * down


def printable(x: Any) -> Any:
    """Plain data that pastes back into Python: nested lists for one array, {path: nested lists} for several."""
    if jax.tree_util.all_leaves([x]):
        return np.asarray(x).tolist()
    return {_path(path): np.asarray(a).tolist() for path, a in jax.tree_util.tree_flatten_with_path(x)[0]}


def restored(witness: Any, draw: Callable[..., Any], structures: Any = None) -> Any:
    """The input that `printable` made `witness` of, as NumPy arrays; inputs themselves pass through.

    Raises ValueError if `witness` lacks a part of what `draw` returns.
    """
    if structures is None:
        structure: Any = ()
    elif isinstance(structures, Sequence):
        structure = structures[0]
    else:
        import hypothesis

        structure = hypothesis.find(structures, lambda _: True, settings=hypothesis.settings(database=None))
    like = jax.eval_shape(lambda key: draw(key, *structure), jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    if jax.tree.structure(witness) == tree:
        values = jax.tree.leaves(witness)
    elif jax.tree_util.treedef_is_leaf(tree):
        values = [witness]
    else:
        names = [_path(path) for path, _ in leaves]
        if not isinstance(witness, dict) or set(names) != set(witness):
            raise ValueError(f"the witness is {witness!r}; expected a dict with the keys {', '.join(names)}")
        values = [witness[name] for name in names]
    return jax.tree.unflatten(tree, [np.asarray(v, leaf.dtype) for v, (_, leaf) in zip(values, leaves, strict=True)])


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
