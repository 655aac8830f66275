"""Functions of one number, entry by entry: the normal distribution in logarithms, roots and maxima with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Function = Callable[[Array], Array]

HALF_LOG_2_PI = math.log(2 * math.pi) / 2


def log_normal(x: Float[Array, "*s"], variance: float | Float[Array, "*_"]) -> Float[Array, "*s"]:
    """The logarithm of the density of N(0, variance)."""
    return -(x**2) / (2 * variance) - jnp.log(variance) / 2 - HALF_LOG_2_PI


@jax.custom_jvp
def log_cdf(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log Φ(x) to a few units of the last place at every x, and derivatives alike."""
    return _normal(x)[0]


@jax.custom_jvp
def _hazard(x: Array) -> Array:
    """φ(x)/Φ(x), the derivative of log Φ."""
    return _normal(x)[1]


FAR = 10.0


def _normal(x: Array) -> tuple[Array, Array, Array]:
    """log Φ(x), h = φ(x)/Φ(x), and h + x without the difference of large numbers."""
    # Below -FAR by Mills' continued fraction z + 1/(z + 2/(z + ...)) for z = -x, as erfc underflows, and as the asymptotic
    # series of jax.scipy is right to 4e-9 only.
    tail = x < -FAR
    z, u = jnp.where(tail, -x, FAR), jnp.where(tail, 0.0, x)
    fraction = z
    for k in range(7, 1, -1):
        fraction = z + k / fraction
    rest = 1 / fraction
    half = jax.scipy.special.erfc(jnp.abs(u) / math.sqrt(2)) / 2
    right = u > 0
    logarithm = jnp.where(right, jnp.log1p(-half), jnp.log(half))
    ratio = jnp.exp(-(u**2) / 2 - HALF_LOG_2_PI) / jnp.where(right, 1 - half, half)
    return (
        jnp.where(tail, -(z**2) / 2 - HALF_LOG_2_PI - jnp.log(z + rest), logarithm),
        jnp.where(tail, z + rest, ratio),
        jnp.where(tail, rest, ratio + u),
    )


@log_cdf.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return log_cdf(*primals), _hazard(*primals) * tangents[0]


@_hazard.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    _, h, excess = _normal(*primals)
    return h, -h * excess * tangents[0]


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
    return lax.custom_root(f, like, lambda *_: lax.stop_gradient(search()), lambda g, b: b / g(jnp.ones_like(b)))


def root(f: Function, low: Float[Array, "*s"], high: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The root of f in [low, high] where f falls from positive to negative: Newton's steps, bisection where they lead astray."""
    like = (low + high) / 2
    return implicit(f, lambda: bracketed(f, low, high), like)


def bracketed(f: Function, low: Float[Array, "*s"], high: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`root` without derivatives.  Where f does not change sign it comes to the end that f points to."""
    eps = float(jnp.finfo(low.dtype).eps)
    floor = eps**2 * jnp.maximum(jnp.abs(low), jnp.abs(high))

    def going(state: Any) -> Array:
        *_, x, step, taken = state
        # A step that is NaN ends the search of its entry.
        return (taken < 200) & jnp.any(step > 16 * eps * jnp.abs(x) + floor)

    def body(state: Any) -> Any:
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
