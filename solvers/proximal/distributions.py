"""Distributions of one number whose estimators under normal noise are known exactly: yardsticks for what is trained.

Laplace, Gaussian, Uniform, Mixture and StudentT work entry by entry on arrays, which makes of a distribution p the product
p(x_1) ... p(x_n).  `solvers.proximal.exact` says what the estimators are: they come in closed form, or to rounding by Newton
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from solvers.proximal import scalar
from solvers.proximal.exact import Distribution, Level, Real, check_positive, check_weights


class Laplace(Distribution):
    """exp(-|x|/b) / (2b) with b = scale: the mode is the soft threshold at σ²/b."""

    scale: Level = 1.0

    def __check_init__(self) -> None:
        check_positive("Laplace", scale=self.scale)

    def log_density(self, x: Real) -> Real:
        return -jnp.abs(x) / self.scale - jnp.log(2 * jnp.asarray(self.scale, x.dtype))

    def log_smoothed(self, x: Real, tau: Level) -> Real:
        b = self.scale
        right = -x / b + scalar.log_cdf(x / tau - tau / b)
        left = x / b + scalar.log_cdf(-x / tau - tau / b)
        return jnp.logaddexp(right, left) + (tau / b) ** 2 / 2 - jnp.log(2 * jnp.asarray(b, x.dtype))

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        return self.scale * jax.random.laplace(key, shape)

    def _mode(self, y: Array, sigma: Level) -> Array:
        return y - jnp.clip(y, -(sigma**2) / self.scale, sigma**2 / self.scale)

    def _median(self, y: Array, sigma: Level) -> Array:
        """The posterior is N(y - σ²/b, σ²) on the right and N(y + σ²/b, σ²) on the left, cut off at zero."""
        b, t = self.scale, sigma / self.scale
        u, side = _turned(y, 0.0)
        right, left = -u / b + scalar.log_cdf(u / sigma - t), u / b + scalar.log_cdf(-u / sigma - t)
        half = jnp.logaddexp(right, left) - math.log(2)

        def above(m: Array) -> Array:
            return -u / b + scalar.log_cdf((u - m) / sigma - t) - half

        return side * scalar.root(above, jnp.zeros_like(u), u)

    @property
    def middle(self) -> tuple[Level, Level]:
        return 0.0, 0.0


class Gaussian(Distribution):
    """N(mean, scale²), for which all estimators are one; the fields are called `location` and `scale`."""

    location: Level = 0.0
    scale: Level = 1.0

    def __check_init__(self) -> None:
        check_positive("Gaussian", scale=self.scale)

    def log_density(self, x: Real) -> Real:
        return scalar.log_normal(x - self.location, jnp.asarray(self.scale, x.dtype) ** 2)

    def log_smoothed(self, x: Real, tau: Level) -> Real:
        return scalar.log_normal(x - self.location, jnp.asarray(self.scale**2 + tau**2, x.dtype))

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        return self.location + self.scale * jax.random.normal(key, shape)

    def _mode(self, y: Array, sigma: Level) -> Array:
        s = self.scale**2
        return (s * y + sigma**2 * self.location) / (s + sigma**2)

    def _median(self, y: Array, sigma: Level) -> Array:
        return self._mode(y, sigma)

    def _mean(self, y: Array, sigma: Level) -> Array:
        return self._mode(y, sigma)

    def _matched(self, y: Array, sigma: Level, share: Level) -> Array:
        return self._mode(y, sigma)

    @property
    def middle(self) -> tuple[Level, Level]:
        return self.location, self.location


class Uniform(Distribution):
    """Constant on [low, high]: the mode is the nearest point of the interval."""

    low: Level = 0.0
    high: Level = 1.0

    def __check_init__(self) -> None:
        if not any(isinstance(v, jax.core.Tracer) for v in (self.low, self.high)) and not self.low < self.high:
            raise ValueError(f"Uniform: low is {self.low:g} and high {self.high:g}, expected low < high")

    def log_density(self, x: Real) -> Real:
        width = jnp.asarray(self.high - self.low, x.dtype)
        return jnp.where((x >= self.low) & (x <= self.high), -jnp.log(width), -jnp.inf)

    def log_smoothed(self, x: Real, tau: Level) -> Real:
        half = (self.high - self.low) / 2
        u, _ = _turned(x, (self.low + self.high) / 2)
        width = jnp.asarray(self.high - self.low, x.dtype)
        return scalar.log_between((-half - u) / tau, (half - u) / tau) - jnp.log(width)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        return self.low + (self.high - self.low) * jax.random.uniform(key, shape)

    def _mode(self, y: Array, sigma: Level) -> Array:
        return jnp.clip(y, self.low, self.high)

    def _median(self, y: Array, sigma: Level) -> Array:
        """Of N(y, σ²) cut off at both ends."""
        half, centre = (self.high - self.low) / 2, (self.low + self.high) / 2
        u, side = _turned(y, centre)
        least = (-half - u) / sigma
        total = scalar.log_between(least, (half - u) / sigma) - math.log(2)

        def short(m: Array) -> Array:
            # Equal to log(total/2) - log P(x < m) at the root, without the difference of equal numbers at m = -half.
            return jnp.logaddexp(total, scalar.log_cdf(least)) - scalar.log_cdf((m - u) / sigma)

        # Adding nothing keeps a NaN.
        return centre + side * scalar.root(short, 0 * u - half, 0 * u + half)

    @property
    def middle(self) -> tuple[Level, Level]:
        return self.low, self.high


class Mixture(Distribution):
    """Σ_i weights_i N(means_i, scales_i²).

    Raises ValueError unless all have one length, the scales are positive and the weights a distribution.
    """

    means: Any
    scales: Any
    weights: Any

    def __init__(
        self,
        means: Sequence[float] | Float[Array | np.ndarray, " k"],
        scales: Sequence[float] | Float[Array | np.ndarray, " k"],
        weights: Sequence[float] | Float[Array | np.ndarray, " k"],
    ):
        self.means, self.scales, self.weights = (_numbers(v) for v in (means, scales, weights))
        shapes = [v.shape for v in (self.means, self.scales, self.weights)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ValueError(f"Mixture: means, scales, weights have shapes {shapes}, expected one length for all three")
        check_weights("Mixture", self.weights)
        if not isinstance(self.scales, jax.core.Tracer) and not (np.asarray(self.scales) > 0).all():
            raise ValueError(f"Mixture: scales are {self.scales}, expected positive numbers")

    def log_density(self, x: Real) -> Real:
        return self.log_smoothed(x, 0.0)

    def log_smoothed(self, x: Real, tau: Level) -> Real:
        means, variances, log_weights = self._parts(x)
        return _log_normals(x, means, variances + tau**2, log_weights)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        which, noise = jax.random.split(key)
        v = jax.random.normal(noise, shape)
        means, variances, log_weights = self._parts(v)
        part = jax.random.categorical(which, log_weights, shape=shape)
        return means[part] + jnp.sqrt(variances)[part] * v

    def _mode(self, y: Array, sigma: Level) -> Array:
        return self._matched(y, sigma, 0.0)

    def _median(self, y: Array, sigma: Level) -> Array:
        means, variances, log_weights = self._parts(y)
        each = _means_given(y, sigma, means, variances)
        return _normals_median(y, sigma, means, variances, log_weights, each.min(-1), each.max(-1))

    @property
    def middle(self) -> tuple[Level, Level]:
        return self.means.min(), self.means.max()

    @property
    def log_concave(self) -> bool:
        return len(self.means) == 1

    @property
    def concavity_gap(self) -> float | None:
        """Attained by two of equal weights.  Known if all scales are equal, as then the scores of the parts differ by constants
        and their variance is at most a quarter of the square of the largest difference."""
        if any(isinstance(v, jax.core.Tracer) for v in (self.means, self.scales)) or np.ptp(self.scales) > 0:
            return None
        s = float(self.scales[0]) ** 2
        return max(0.0, float(np.ptp(self.means)) ** 2 / (4 * s**2) - 1 / s)

    def _points(self, y: Array, sigma: Level, more: Array) -> tuple[Array, int]:
        # The smoothed posterior is a mixture about these means, with maxima between the outermost and near all that count.
        means, variances, _ = self._parts(y)
        each = _means_given(y, sigma, means, variances)
        spread = jnp.sqrt(variances * sigma**2 / (variances + sigma**2) + more)
        spread = jnp.minimum(spread, (each.max(-1) - each.min(-1))[..., None])  # γ may be infinite
        near = each[..., None] + spread[..., None] * jnp.array([-4, -2, -1, 0, 1, 2, 4], y.dtype)
        return jnp.moveaxis(jnp.sort(near.reshape(*y.shape, -1), -1), -1, 0), 2 * len(means)

    def _parts(self, x: Array) -> tuple[Array, Array, Array]:
        """Means, variances and logarithms of the weights, in the dtype of x."""
        means, scales, weights = (jnp.asarray(v, x.dtype) for v in (self.means, self.scales, self.weights))
        return means, scales**2, jnp.log(weights)


class StudentT(Distribution):
    """Student's t with df degrees of freedom, ν.

    -σ² log p is σ² (ν+1)/(8ν)-weakly convex.  The convolution with a normal density is a mixture of normal ones over the
    precision, here of PARTS: right to 1e-10 for ν ≥ 1, |x| up to 1e3/√ν, and every τ.
    """

    df: Level = 3.0

    PARTS = 160
    CHUNK = 2048

    def __check_init__(self) -> None:
        check_positive("StudentT", df=self.df)

    def log_density(self, x: Real) -> Real:
        nu = jnp.asarray(self.df, x.dtype)
        gammas = jax.scipy.special.gammaln((nu + 1) / 2) - jax.scipy.special.gammaln(nu / 2)
        return gammas - jnp.log(nu * math.pi) / 2 - (nu + 1) / 2 * jnp.log1p(x**2 / nu)

    def log_smoothed(self, x: Real, tau: Level) -> Real:
        variances, log_weights = self._parts(x)
        return _log_normals(x, jnp.zeros_like(variances), variances + tau**2, log_weights)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        return jax.random.t(key, self.df, shape)

    def _mode(self, y: Array, sigma: Level) -> Array:
        """The best of the roots of c³ - y c² + (ν + σ² (ν+1)) c - ν y."""
        nu = self.df
        u, side = _turned(y, 0.0)
        linear = nu + sigma**2 * (nu + 1)

        def rest(c: Array) -> Array:
            return (nu + c**2) * (u - c) - sigma**2 * (nu + 1) * c

        def value(c: Array) -> Array:
            return -(sigma**2) * (nu + 1) / 2 * jnp.log1p(c**2 / nu) - (c - u) ** 2 / 2

        # Between its two turning points, if there are such, the cubic has a root that is a minimum.
        apart = jnp.sqrt(jnp.maximum(u**2 - 3 * linear, 0)) / 3
        points = jnp.stack([jnp.zeros_like(u), u / 3 - apart, u / 3 + apart, u])
        return side * scalar.implicit(rest, lambda: scalar.maximum(value, rest, points, 3), u)

    def _median(self, y: Array, sigma: Level) -> Array:

        def one(y: Array) -> Array:
            variances, log_weights = self._parts(y)
            low, high = jnp.minimum(y, 0), jnp.maximum(y, 0)
            return _normals_median(y, sigma, jnp.zeros_like(variances), variances, log_weights, low, high)

        return scalar.in_chunks(one, y, self.CHUNK)

    def _mean(self, y: Array, sigma: Level) -> Array:
        return scalar.in_chunks(lambda y: super(StudentT, self)._mean(y, sigma), y, self.CHUNK)

    def _matched(self, y: Array, sigma: Level, share: Level) -> Array:
        return scalar.in_chunks(lambda y: super(StudentT, self)._matched(y, sigma, share), y, self.CHUNK)

    @property
    def middle(self) -> tuple[Level, Level]:
        return 0.0, 0.0

    @property
    def log_concave(self) -> bool:
        return False

    @property
    def concavity_gap(self) -> float | None:
        return None if isinstance(self.df, jax.core.Tracer) else float((self.df + 1) / (8 * self.df))

    def _points(self, y: Array, sigma: Level, more: Array) -> tuple[Array, int]:
        part = jnp.linspace(0, 1, 17, dtype=y.dtype).reshape(-1, *([1] * y.ndim))
        return jnp.minimum(y, 0) + jnp.abs(y) * part, 2

    def _parts(self, x: Array) -> tuple[Array, Array]:
        """The variances 1/λ and the logarithms of the weights: λ of Γ(ν/2, ν/2), by the trapezoidal rule in log λ."""
        nu = jnp.asarray(self.df, x.dtype)
        above, below = 80 / nu, 80 / (nu + 1)  # where the integrand has fallen by exp(-40), for x = 0 and the largest x
        last = jnp.log1p(above + jnp.sqrt(above**2 + 2 * above))
        first = jnp.log((nu + 1) / (nu + 1e6 / nu)) - 1 - below
        t = first + (last - first) * jnp.arange(self.PARTS, dtype=x.dtype) / (self.PARTS - 1)
        log_weights = nu / 2 * (t - jnp.exp(t))
        return jnp.exp(-t), log_weights - jax.nn.logsumexp(log_weights)


# helpers


def _numbers(v: Any) -> Any:
    # On the host in 64 bits, so that what is written 0.6 is that, whatever JAX computes in when it is made.
    return v if isinstance(v, jax.Array) else np.asarray(v, np.float64)


def _turned(x: Array, centre: Level) -> tuple[Array, Array]:
    """|x - centre| and the sign, with derivatives of all orders at the centre too."""
    side = jnp.where(x >= centre, 1.0, -1.0).astype(x.dtype)
    return side * (x - centre), side


def _log_normals(x: Array, means: Array, variances: Array, log_weights: Array) -> Array:
    return jax.nn.logsumexp(log_weights + scalar.log_normal(x[..., None] - means, variances), -1)


def _means_given(y: Array, sigma: Level, means: Array, variances: Array) -> Array:
    """(*shape, k) the mean of each part given y."""
    return (variances * y[..., None] + sigma**2 * means) / (variances + sigma**2)


def _normals_median(
    y: Array, sigma: Level, means: Array, variances: Array, log_weights: Array, low: Array, high: Array
) -> Array:
    each = _means_given(y, sigma, means, variances)
    spread = jnp.sqrt(variances * sigma**2 / (variances + sigma**2))
    parts = jax.nn.softmax(log_weights + scalar.log_normal(y[..., None] - means, variances + sigma**2), -1)

    def above(m: Array) -> Array:
        return 0.5 - jnp.sum(parts * jax.scipy.special.ndtr((m[..., None] - each) / spread), -1)

    return scalar.root(above, low, high)
