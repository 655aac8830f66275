"""Worst-case search: maximise the violation of a bound; `confirm` then decides whether it is real.

The violation is a scalar function of an input, positive where the claim fails, dimensionless and free of
cancellation (for a bound, left side / right side - 1).  Hypothesis draws the *structure* of inputs (sizes,
families), JAX draws their numbers, thousands per structure, and climbs the gradient of the violation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.confirm import OBVIOUS, Judge, evaluate, padded, printable, simplify

CHUNK = 2048
"""Inputs evaluated in one call; bounds memory."""


PLAIN = 1e-2
"""A violation that a reader sees at once; the smallest structure that has it makes the counterexample."""

AGREE = 1e-3
"""Restarts whose final violations differ by less than this (absolute) are said to agree."""


class Found(NamedTuple):
    """The worst input of a search."""

    violation: float
    x: Any
    tolerance: float
    tolerance_reason: str
    evaluations: int
    structures: int
    restarts: int
    agreeing: int
    confirmation: str
    trace: list[tuple[int, float]]


class Violated(Exception):
    """Raised inside Hypothesis so that it shrinks the structure."""


@functools.lru_cache(maxsize=256)
def _climber(violation: Callable[..., jax.Array], steps: int) -> Callable[..., Any]:
    """Adam on the violation from a batch of starts with a cosine-decayed step, then a pattern-search polish.

    The polish tries every coordinate of the best point in both directions and halves its step on failure, so it
    needs no derivative and ends at a kink as well as at a smooth maximum.
    """

    def run(xs: Any, constants: tuple[Any, ...], rate: jax.Array) -> Any:
        moving, fixed = eqx.partition(xs, eqx.is_inexact_array)

        def value(one: Any, rest: Any) -> jax.Array:
            return violation(eqx.combine(one, rest), *constants)

        value_and_grad = jax.vmap(jax.value_and_grad(value))

        def step(carry: Any, t: jax.Array) -> Any:
            x, m, s, best, best_x = carry
            v, g = value_and_grad(x, fixed)
            v = jnp.where(jnp.isfinite(v), v, -jnp.inf)
            g = jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0), g)
            better = v > best

            def keep(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

            best_x = jax.tree.map(keep, x, best_x)
            best = jnp.where(better, v, best)
            m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
            s = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b * b, s, g)
            lr = rate * 0.5 * (1 + jnp.cos(jnp.pi * t / steps)) + rate * 1e-3

            def move(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
                return a + lr * (b / (1 - 0.9 ** (t + 1))) / (jnp.sqrt(c / (1 - 0.99 ** (t + 1))) + 1e-12)

            return (jax.tree.map(move, x, m, s), m, s, best, best_x), best.max()

        zero = jax.tree.map(jnp.zeros_like, moving)
        start = jax.tree.leaves(xs)[0].shape[0]
        first = jnp.full((start,), -jnp.inf, jax.tree.leaves(moving)[0].dtype)
        times = jnp.arange(steps, dtype=first.dtype)
        (_, _, _, best, best_x), trace = jax.lax.scan(step, (moving, zero, zero, first, moving), times)

        top = jnp.argmax(best)
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda a: a[top], best_x))
        rest = jax.tree.map(lambda a: a[top], fixed)
        scale = jnp.maximum(jnp.abs(flat), 1e-2 * jnp.max(jnp.abs(flat)) + 1e-12)
        directions = jnp.concatenate([jnp.diag(scale), -jnp.diag(scale)])

        def polish(carry: Any, _: Any) -> Any:
            x, v, h = carry
            trials = jax.vmap(lambda d: value(unravel(x + h * d), rest))(directions)
            trials = jnp.where(jnp.isfinite(trials), trials, -jnp.inf)
            i = jnp.argmax(trials)
            better = trials[i] > v
            return (
                jnp.where(better, x + h * directions[i], x),
                jnp.maximum(v, trials[i]),
                jnp.where(better, h, h / 2),
            ), v

        (flat, value_at, _), _ = jax.lax.scan(polish, (flat, best[top], jnp.asarray(0.1, flat.dtype)), length=40)
        return best, eqx.combine(best_x, fixed), trace, value_at, eqx.combine(unravel(flat), rest)

    return jax.jit(run)


class _Pool:
    """Candidates seen so far: the best few inputs per structure, and how much was looked at."""

    def __init__(self, violation: Callable[..., jax.Array], constants: tuple[Any, ...], keep: int, batch: int):
        self.violation, self.constants, self.keep, self.batch = violation, constants, keep, batch
        self.best: dict[Any, tuple[np.ndarray, Any]] = {}
        self.evaluations = 0
        self.trace: list[tuple[int, float]] = []
        self.top = -np.inf
        self.bad_value = 0.0
        self.bad_input: Any = None

    def look(self, structure: Any, xs: Any) -> float:
        values = evaluate(self.violation, self.constants, xs, self.batch)
        bad = np.isnan(values) | (values == np.inf)
        if bad.any() and self.bad_input is None:
            self.bad_value = values[bad.argmax()]
            self.bad_input = jax.tree.map(lambda a: np.asarray(a)[int(bad.argmax())], xs)
        values = np.where(np.isfinite(values), values, -np.inf)
        order = np.argsort(-values)[: self.keep]
        self.note(len(values), float(values[order[0]]))
        picked = jax.tree.map(lambda a: np.asarray(a)[order], xs)
        if structure in self.best:
            old_values, old = self.best[structure]
            joined = np.concatenate([old_values, values[order]])
            again = np.argsort(-joined)[: self.keep]
            picked = jax.tree.map(lambda a, b: np.concatenate([a, b])[again], old, picked)
            self.best[structure] = (joined[again], picked)
        else:
            self.best[structure] = (values[order], picked)
        return float(values[order[0]])

    def note(self, evaluations: int, value: float) -> None:
        self.evaluations += evaluations
        if value > self.top or not self.trace:
            self.top = max(self.top, value)
        self.trace.append((self.evaluations, float(self.top)))

    def valid(self, valid: Callable[[Any], jax.Array], structure: Any) -> bool:
        """Whether any of the inputs kept for a structure is legal."""
        return bool(np.any(np.isfinite(self.best[structure][0])) or np.any(jax.vmap(valid)(self.best[structure][1])))

    def ranked(self) -> list[Any]:
        """Structures, worst case first; where the claim is plainly violated, the smallest clear violation first."""

        def rank(structure: Any) -> tuple[float, float]:
            values, xs = self.best[structure]
            size = float(sum(a[0].size for a in jax.tree.leaves(xs)))
            if self.top > OBVIOUS and values[0] > min(0.25 * self.top, PLAIN):
                return -math.inf, size
            return -float(values[0]), size

        return sorted(self.best, key=rank)


def worst(
    violation: Callable[..., jax.Array],
    draw: Callable[..., Any],
    key: jax.Array,
    *,
    constants: tuple[Any, ...] = (),
    structures: Any = None,
    corners: Iterable[Any] = (),
    points: int = 256,
    examples: int = 12,
    restarts: int = 32,
    steps: int = 200,
    rate: float = 0.05,
    climb: int = 2,
    high: Callable[..., float] | None = None,
    tolerance: tuple[float, str] | None = None,
    valid: Callable[[Any], jax.Array] | None = None,
) -> Found:
    """Maximise `violation(x, *constants)` over inputs `x = draw(key, *structure)`.

    violation: differentiable scalar function of a pytree `x`; integer leaves of `x` are held fixed.  Use a
        module-level function, so that a claim and its controls share one compilation per shape.
    structures: a Hypothesis strategy of tuples, or a sequence of tuples; None means one structure without parameters.
    corners: inputs looked at before anything is drawn (zeros, equal rows, extremes, one sample).
    points, examples: random inputs per structure and structures that Hypothesis draws.
    restarts, steps, rate, climb: the gradient ascent runs from the best `restarts` inputs of the `climb` worst
        structures; `steps=0` leaves it out, which suits violations that measure rounding.
    high: the violation on the host in higher precision, `high(x, *constants)`.  The worst point is re-evaluated
        with it and its difference is the measured rounding error.
    tolerance: `(allowance, reason)` where the rounding is known otherwise.  Without both, the rounding is measured by
        evaluating the worst points in 32 bits and scaling the difference by the ratio of the precisions.
    valid: `valid(x)`, a traceable predicate: which inputs are legal.  Ascent, polish and simplification move the
        floating leaves freely, so without it every real value of them must be legal; a module-level function, too.
    Raises FloatingPointError with the input if the violation is NaN or +inf at an input that was drawn or `high` is not
    finite, ValueError if there is nothing to draw or nothing of it is legal.
    The tolerance of the result covers every apparent violation that was looked at and could be settled neither way.
    """
    plain = violation
    if valid is not None:
        violation = _restricted(violation, valid)
    listed: Sequence[Any] | None = None
    if structures is None:
        listed = [()]
    elif isinstance(structures, Sequence):
        listed = list(structures)
    batch = min(points, CHUNK)
    pool = _Pool(violation, constants, restarts, batch)

    def visit(structure: Any) -> float:
        k = jax.random.fold_in(key, _fingerprint(structure))
        top = -math.inf
        for start in range(0, points, CHUNK):
            size = min(CHUNK, points - start)
            keys = jax.random.split(jax.random.fold_in(k, start), size)
            # Not compiled as a whole: structures are many, and their single operations are shared.
            top = max(top, pool.look(structure, jax.vmap(lambda one: draw(one, *structure))(keys)))
        return top

    for x in corners:
        pool.look(("corner", _shapes(x)), jax.tree.map(lambda a: jnp.asarray(a)[None], x))
    if listed is not None:
        for structure in listed:
            visit(structure)
    else:
        _explore(structures, visit, examples, int(jax.random.key_data(key)[-1]))
    if pool.bad_input is not None:
        raise FloatingPointError(f"the violation is {pool.bad_value} at the input {printable(pool.bad_input)}")
    if not pool.best:
        raise ValueError("worst: there is no input to look at; give structures and points, or corners")
    if valid is not None and not any(pool.valid(valid, structure) for structure in pool.best):
        raise ValueError("worst: `valid` is false at every input that was drawn; draw legal inputs")

    structures_ranked = pool.ranked()
    candidates: list[tuple[float, Any]] = []
    agreeing = runs = 0
    if steps and pool.top <= OBVIOUS:
        for structure in structures_ranked[:climb]:
            starts = padded(pool.best[structure][1], restarts)
            finals, xs, trace, top, at = _climber(violation, steps)(starts, constants, jnp.asarray(rate))
            finals, stride = np.asarray(finals), max(1, steps // 20)
            for v in np.asarray(trace)[::stride]:
                pool.note(restarts * stride, float(v))
            pool.note(0, float(top))
            if float(top) >= max((v for v, _ in candidates), default=-math.inf):
                runs, agreeing = restarts, int(np.sum(finals > finals.max() - AGREE))
            candidates.append((float(top), jax.tree.map(np.asarray, at)))
            candidates += [(float(v), jax.tree.map(lambda a, i=i: np.asarray(a)[i], xs)) for i, v in enumerate(finals)]
    first_values, first_xs = pool.best[structures_ranked[0]]
    drawn = [(float(v), jax.tree.map(lambda a, i=i: a[i], first_xs)) for i, v in enumerate(first_values)]
    candidates = [c for c in candidates + drawn if math.isfinite(c[0])]
    if not candidates:
        raise FloatingPointError("the violation is finite at none of the inputs looked at")
    near = padded(first_xs, restarts)
    judge = Judge(violation, plain, constants, high, tolerance, near, batch)
    others = [
        (float(v), jax.tree.map(lambda a, i=i: a[i], xs))
        for structure in structures_ranked[1:]
        for values, xs in [pool.best[structure]]
        for i, v in enumerate(values)
        if v > judge.allowance
    ]
    value, x, confirmation = judge.worst_confirmed(candidates, others)
    if value > judge.allowance:
        x, value = simplify(judge, x, value)
        confirmation += "; simplified"
    return Found(
        value,
        x,
        judge.allowance,
        judge.reason,
        pool.evaluations,
        len(pool.best),
        runs,
        agreeing,
        confirmation,
        _thin(pool.trace),
    )


@functools.lru_cache(maxsize=256)
def _restricted(violation: Callable[..., jax.Array], valid: Callable[[Any], jax.Array]) -> Callable[..., jax.Array]:
    """`violation` where the input is legal, -inf elsewhere; the same object every time, so that compilations are shared."""
    return lambda x, *constants: jnp.where(valid(x), violation(x, *constants), -jnp.inf)


def _fingerprint(structure: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(structure).encode()).digest()[:4], "big")


def _shapes(x: Any) -> tuple[Any, ...]:
    return tuple(np.shape(a) for a in jax.tree.leaves(x))


def _explore(strategy: Any, visit: Callable[[Any], float], examples: int, seed: int) -> None:
    """Let Hypothesis draw structures; where one is violated, let it shrink to the smallest violated structure."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(strategy)
    def structures(structure: Any) -> None:
        if memory.setdefault(structure, None) is None:
            memory[structure] = visit(structure)
        if (memory[structure] or 0.0) > OBVIOUS:
            raise Violated

    memory: dict[Any, float | None] = {}
    with contextlib.suppress(Violated):
        structures()


def _thin(trace: list[tuple[int, float]], most: int = 60) -> list[tuple[int, float]]:
    stride = max(1, -(-len(trace) // most))
    return trace[::stride] + ([trace[-1]] if (len(trace) - 1) % stride else [])
