"""Functions of one number, entry by entry: the normal distribution in logarithms, roots and maxima with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Function = Callable[[Array], Array]

HALF_LOG_2_PI = math.log(2 * math.pi) / 2


def log_normal(x: Float[Array, "*s"], variance: float | Float[Array, "*_"]) -> Float[Array, "*s"]:
    """The logarithm of the density of N(0, variance)."""
    return -(x**2) / (2 * variance) - jnp.log(variance) / 2 - HALF_LOG_2_PI


def log_cdf(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log Φ(x) to a few units of the last place at every x, derivatives too."""
    # Below -3 by the continued fraction of Mills' ratio: the asymptotic series of jax.scipy is right to 4e-9 only.
    tail = x < -3
    z = jnp.where(tail, -x, 3.0)
    fraction = z
    for k in range(24, 0, -1):
        fraction = z + k / fraction
    low = -(z**2) / 2 - HALF_LOG_2_PI - jnp.log(fraction)
    u = jnp.where(tail, 0.0, x)
    half = jax.scipy.special.erfc(jnp.abs(u) / math.sqrt(2)) / 2
    # The derivative of a logarithm of zero is NaN also where it is not selected.
    right = u > 0
    return jnp.where(tail, low, jnp.where(right, jnp.log1p(-half), jnp.log(jnp.where(right, 0.5, half))))


def log_between(a: Float[Array, "*s"], b: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(Φ(b) - Φ(a)) for a < b.  Precise unless both are large and positive: turn such by symmetry."""
    below, above = log_cdf(a), log_cdf(b)
    return above + jnp.log(-jnp.expm1(below - above))


def derivative(f: Function, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """f'(x), entry by entry."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


def implicit(f: Function, search: Callable[[], Array], like: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The root of f that `search` finds, with the derivatives of the implicit function theorem; nothing is differentiated
    through the search."""
    return lax.custom_root(f, like, lambda *_: search(), lambda g, b: b / g(jnp.ones_like(b)))


def root(f: Function, low: Float[Array, "*s"], high: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The root of f in [low, high] where f falls from positive to negative: Newton's steps, bisection where they lead astray."""
    like = (low + high) / 2
    return implicit(f, lambda: bracketed(f, low, high), like)


def bracketed(f: Function, low: Float[Array, "*s"], high: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`root` without derivatives.  Where f does not change sign it comes to the end that f points to."""
    eps = float(jnp.finfo(low.dtype).eps)
    floor = eps**2 * jnp.maximum(jnp.abs(low), jnp.abs(high))

    def going(state: tuple[Array, ...]) -> Array:
        *_, x, step, taken = state
        # A step that is NaN ends the search of its entry.
        return (taken < 200) & jnp.any(step > 16 * eps * jnp.abs(x) + floor)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, x, step, taken = state
        value, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
        low, high = jnp.where(value > 0, x, low), jnp.where(value > 0, high, x)
        newton = x - value / slope
        fine = (newton >= low) & (newton <= high) & (jnp.abs(newton - x) <= step / 2)
        new = jnp.where(value == 0, x, jnp.where(fine, newton, (low + high) / 2))
        return low, high, new, jnp.abs(new - x), taken + 1

    start = (low, high, (low + high) / 2, high - low, jnp.zeros((), jnp.int32))
    return lax.while_loop(going, body, start)[2]


def maximum(value: Function, slope: Function, points: Float[Array, "*_"], count: int) -> Float[Array, "*s"]:
    """Where `value` is largest: `slope` is its derivative up to a positive factor, `points` are sorted along their first axis,
    reach from where it rises to where it falls, and have the maxima between them; `count` of these are looked at."""
    slopes = slope(points)
    tops = jnp.argsort(~((slopes[:-1] > 0) & (slopes[1:] <= 0)), axis=0, stable=True)[:count]
    low, high = (jnp.take_along_axis(points, tops + k, 0) for k in (0, 1))
    found = bracketed(slope, low, high)
    best = jnp.argmax(value(found), 0)
    return jnp.take_along_axis(found, best[None], 0)[0]


def inverse(f: Function, x: Float[Array, "*s"], step: float | Float[Array, ""]) -> Float[Array, "*s"]:
    """The m with f(m) = x of an increasing f, looked for around x in intervals that double from `step` on; where there is none
    within 40 doublings, one end of the last interval."""

    def short(m: Array) -> Array:
        return x - f(m)

    def search() -> Array:
        def wider(r: Array) -> Array:
            return jnp.where((short(x - r) < 0) | (short(x + r) > 0), 2 * r, r)

        r = lax.fori_loop(0, 40, lambda _, r: wider(r), jnp.full_like(x, step))
        return bracketed(short, x - r, x + r)

    return implicit(short, search, x)


def in_chunks(f: Function, y: Float[Array, "*s"], size: int) -> Float[Array, "*s"]:
    """f(y) of an f that works entry by entry and needs much memory for each: at most `size` entries at once."""
    if y.size <= size:
        return f(y)
    rows = jnp.pad(y.reshape(-1), (0, -y.size % size)).reshape(-1, size)
    return lax.map(f, rows).reshape(-1)[: y.size].reshape(y.shape)
