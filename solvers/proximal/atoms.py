"""Estimators for a distribution of signals that is a list of points with weights: a finite training set, or a grid of the plane.

What `solvers.proximal.exact` says of mean, median, mode and matched holds here with sums for integrals.  For a training set the
matched map with γ → 0 is the (weighted) nearest signal: what a network without limits would learn by heart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from solvers.proximal.exact import Level, NegativeLog, check_positive, check_weights, share_of


class Atoms(eqx.Module):
    """P(x = points_i) = weights_i, for points (k, n).  The last axis of y is that of the entries of a signal.

    Raises ValueError unless there is a weight for each point and the weights are a distribution.  `matched` climbs from every
    point, at the cost of k² distances per signal.
    """

    points: Any
    weights: Any

    def __init__(self, points: Any, weights: Any):
        self.points, self.weights = (
            v if isinstance(v, jax.Array) else np.asarray(v, np.float64) for v in (points, weights)
        )
        shapes = (self.points.shape, self.weights.shape)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or not shapes[0][0]:
            raise ValueError(f"Atoms: points and weights have shapes {shapes}, expected (k, n) and (k,)")
        check_weights("Atoms", self.weights)

    def log_density(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
        """The logarithm of the weight of the points that are exactly x, -∞ if there are none."""
        points, log_weights = self._parts(x)
        same = jnp.all(x[..., None, :] == points, -1)
        return jax.nn.logsumexp(jnp.where(same, log_weights, -jnp.inf), -1)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_ n"]:
        total = jnp.cumsum(jnp.asarray(self.weights, jnp.result_type(float)))
        u = total[-1] * jax.random.uniform(key, shape)
        return jnp.asarray(self.points, u.dtype)[jnp.searchsorted(total, u)]

    def mean(self, y: Float[Array, "*batch n"], sigma: Level) -> Float[Array, "*batch n"]:
        """E[x | y].  Raises ValueError unless σ > 0."""
        check_positive("mean", sigma=sigma)
        return self._each(y, lambda y, points, log_weights: _average(points, _given(y, sigma, points, log_weights)))

    def mode(self, y: Float[Array, "*batch n"], sigma: Level) -> Float[Array, "*batch n"]:
        """The point with the largest weight exp(-‖y - x‖²/(2σ²)).  Raises ValueError unless σ > 0."""
        check_positive("mode", sigma=sigma)
        return self._each(y, lambda y, points, log_weights: points[jnp.argmax(_given(y, sigma, points, log_weights))])

    def median(self, y: Float[Array, "*batch n"], sigma: Level) -> Float[Array, "*batch n"]:
        """Of each entry; of two medians the lower.  Raises ValueError unless σ > 0."""
        check_positive("median", sigma=sigma)

        def one(y: Array, points: Array, log_weights: Array) -> Array:
            posterior = jax.nn.softmax(_given(y, sigma, points, log_weights))
            order = jnp.argsort(points, axis=0)
            total = jnp.cumsum(posterior[order], axis=0)
            first = jnp.argmax(total >= 0.5 * (1 - 4 * jnp.finfo(y.dtype).eps), axis=0)
            return jnp.take_along_axis(points, jnp.take_along_axis(order, first[None], 0), 0)[0]

        return self._each(y, one)

    def matched(self, y: Float[Array, "*batch n"], sigma: Level, gamma: Level) -> Float[Array, "*batch n"]:
        """f_γ(y), the c for which Σ_i weights_i exp(-‖y - x_i‖²/(2σ²) - ‖c - x_i‖²/γ²) is largest.

        Raises ValueError unless σ > 0 and γ > 0.
        """
        check_positive("matched", sigma=sigma, gamma=gamma)

        def one(y: Array, points: Array, log_weights: Array) -> Array:
            given = _given(y, sigma, points, log_weights)

            def rest(c: Array) -> Array:
                return _average(points, given - jnp.sum((c - points) ** 2, -1) / gamma**2) - c

            def search(*_: Any) -> Array:
                starts = self._starts(given, gamma, points)
                return lax.stop_gradient(_best(starts, given, gamma, points))

            return lax.custom_root(rest, y, search, lambda g, b: jnp.linalg.solve(jax.jacfwd(g)(b), b))

        return self._each(y, one)

    def matched_prior(
        self, x: Float[Array, "*batch n"], sigma: Level, gamma: Level, max_steps: int = 200
    ) -> Float[Array, "*batch"]:
        """R_γ(x), up to a constant: -σ² log p_τ(m) - ‖m - x‖²/(2w) with x = E[x | m] at noise τ.  It is finite inside the convex
        hull of the points only; NaN where no m was found."""
        check_positive("matched_prior", sigma=sigma, gamma=gamma)
        share = share_of(sigma, gamma)

        def one(x: Array, points: Array, log_weights: Array) -> Array:
            variance = sigma**2 * share
            m, left = _inverse_mean(x, variance, points, log_weights, max_steps)
            smoothed = jax.nn.logsumexp(log_weights - jnp.sum((m - points) ** 2, -1) / (2 * variance))
            size = jnp.ptp(points, axis=0).max()
            value = -(sigma**2) * smoothed - jnp.sum((m - x) ** 2) / (2 * share)
            return jnp.where(left <= 1e4 * jnp.finfo(x.dtype).eps * size, value, jnp.nan)

        return self._each(x, one)

    def regularizer(self, sigma: Level) -> NegativeLog:
        """-σ² log of the weight at the points, infinite elsewhere; one signal (n,) at a time.  Raises ValueError unless σ > 0."""
        check_positive("regularizer", sigma=sigma)
        return NegativeLog(self, sigma)

    @property
    def concavity_gap(self) -> float | None:
        return None

    def _starts(self, given: Array, gamma: Level, points: Array) -> Array:
        return points

    def _each(self, y: Array, f: Callable[..., Array]) -> Array:
        """f(y, points, log_weights) for each signal in turn."""
        if y.shape[-1:] != self.points.shape[1:]:
            raise ValueError(f"y: has shape {y.shape}, expected (..., {self.points.shape[1]}) as that of the points")
        parts = self._parts(y)
        if y.ndim == 1:
            return f(y, *parts)
        found = lax.map(lambda y: f(y, *parts), y.reshape(-1, y.shape[-1]))
        return found.reshape(*y.shape[:-1], *found.shape[1:])

    def _parts(self, x: Array) -> tuple[Array, Array]:
        return jnp.asarray(self.points, x.dtype), jnp.log(jnp.asarray(self.weights, x.dtype))


class Planar(Atoms):
    """A density of the plane by its values at the points of a square grid, so that integrals become sums.

    These are as good as the trapezoidal rule: to rounding for smooth densities that vanish at the borders, as long as the step of
    the grid is less than about .6 times the narrowest of σ, τ, γ/√2 and the features of the density; to second order in the step
    where it has kinks.  `planar` makes one of a function.
    """

    axis: Any = None

    def __init__(self, axis: Any, log_density: Any):
        """log_density  (k, k) its values, up to a constant, at (axis_i, axis_j)"""
        a, values = np.asarray(axis, np.float64), np.asarray(log_density, np.float64)
        if values.shape != (a.size, a.size) or not np.isfinite(values.max()):
            raise ValueError(
                f"Planar: log_density has shape {values.shape} and the largest value {values.max()}, expected "
                f"{(a.size, a.size)} and a finite one"
            )
        # Far below what any sum of positive terms can see; a weight of zero would be no distribution on all points.
        weights = np.exp(np.maximum(values - values.max(), -700.0)).reshape(-1)
        points = np.stack(np.meshgrid(a, a, indexing="ij"), -1).reshape(-1, 2)
        super().__init__(points, weights / weights.sum())
        self.axis = a

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_ n"]:
        """A point of the grid, moved within its cell."""
        which, where = jax.random.split(key)
        x = super().sample(which, shape)
        step = jnp.asarray(self.axis[1] - self.axis[0], x.dtype)
        return x + step * (jax.random.uniform(where, x.shape, x.dtype) - 0.5)

    def _starts(self, given: Array, gamma: Level, points: Array) -> Array:
        """The best point of the grid."""
        axis = jnp.asarray(self.axis, points.dtype)
        posterior = jax.nn.softmax(given).reshape(len(axis), len(axis))
        kernel = jnp.exp(-((axis[:, None] - axis) ** 2) / gamma**2)
        return points[jnp.argmax((kernel @ posterior @ kernel).reshape(-1))][None]


def planar(log_density: Callable[[Array], Array], low: float, high: float, count: int = 201) -> Planar:
    """The distribution of the plane with this density, a function of one point (2,), on the square [low, high]², outside of which
    it should vanish."""
    axis = np.linspace(low, high, count)
    points = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1))
    return Planar(axis, jax.vmap(jax.vmap(log_density))(points))


def _given(y: Array, sigma: Level, points: Array, log_weights: Array) -> Array:
    return log_weights - jnp.sum((y - points) ** 2, -1) / (2 * sigma**2)


def _average(points: Array, logits: Array) -> Array:
    return jax.nn.softmax(logits) @ points


def _best(starts: Array, given: Array, gamma: Level, points: Array) -> Array:
    """The highest of the maxima that are reached from the starts (s, n): by a Newton step where it climbs, else by the average
    under the kernel, which always does."""
    eps = float(jnp.finfo(points.dtype).eps)
    size = jnp.max(jnp.abs(points))

    def height(c: Array) -> Array:
        return jax.nn.logsumexp(given - jnp.sum((c - points) ** 2, -1) / gamma**2)

    def better(c: Array) -> Array:
        p = jax.nn.softmax(given - jnp.sum((c - points) ** 2, -1) / gamma**2)
        mean = p @ points
        spread = (p[:, None] * (points - mean)).T @ (points - mean)
        newton = c + jnp.linalg.solve(jnp.eye(len(c), dtype=c.dtype) - 2 / gamma**2 * spread, mean - c)
        slack = 8 * eps * (1 + jnp.abs(height(mean)))
        return jnp.where(height(newton) >= height(mean) - slack, newton, mean)

    def going(state: Any) -> Array:
        _, moved, taken = state
        return (taken < 500) & jnp.any(moved > 16 * eps * size)

    def body(state: Any) -> Any:
        c, _, taken = state
        new = jax.vmap(better)(c)
        return new, jnp.abs(new - c), taken + 1

    found, _, _ = lax.while_loop(going, body, (starts, jnp.full_like(starts, jnp.inf), jnp.zeros((), jnp.int32)))
    return found[jnp.argmax(jax.vmap(height)(found))]


def _inverse_mean(x: Array, variance: Level, points: Array, log_weights: Array, max_steps: int) -> tuple[Array, Array]:
    """m with E[x | m] = x at noise of this variance τ², where the convex ‖m‖²/2 + τ² log p_τ(m) - ⟨m, x⟩ is least; and the
    largest entry of what is left."""

    def parts(m: Array) -> tuple[Array, Array, Array]:
        logits = log_weights + (points @ m - jnp.sum(points**2, -1) / 2) / variance
        p = jax.nn.softmax(logits)
        mean = p @ points
        spread = (p[:, None] * (points - mean)).T @ (points - mean)
        return variance * jax.nn.logsumexp(logits) - m @ x, mean - x, spread / variance

    def going(state: Any) -> Array:
        m, taken = state
        left = jnp.abs(parts(m)[1]).max()
        return (taken < max_steps) & (left > 64 * jnp.finfo(x.dtype).eps * jnp.abs(points).max())

    def body(state: Any) -> Any:
        m, taken = state
        value, slope, curvature = parts(m)
        ridge = 1e-12 * jnp.trace(curvature) + jnp.finfo(x.dtype).tiny
        step = -jnp.linalg.solve(curvature + ridge * jnp.eye(len(m), dtype=m.dtype), slope)
        # Backtracking: the first of these lengths with a sufficient fall.
        lengths = 0.5 ** jnp.arange(30, dtype=m.dtype)
        values = jax.vmap(lambda t: parts(m + t * step)[0])(lengths)
        slack = 8 * jnp.finfo(x.dtype).eps * (1 + jnp.abs(value))
        enough = values <= value + 1e-4 * lengths * (slope @ step) + slack
        return m + lengths[jnp.argmax(enough)] * step, taken + 1

    m, _ = lax.while_loop(going, body, (x, jnp.zeros((), jnp.int32)))
    return m, jnp.abs(parts(m)[1]).max()
