"""What the estimators of x from y = x + σ v, v ~ N(0, 1), are for a known distribution p of x, and the functions of which they
are proximal maps.

    mean       E[x | y] = y + σ² (log p_σ)'(y), where p_s = p * N(0, s²)                      minimal for squared errors
    median     of p(x | y)                                                                   for absolute errors
    mode       argmax p(x | y) = prox of -σ² log p                                           what proximal matching aims at
    matched    f_γ(y) = argmin_c E[1 - exp(-(c - x)²/γ²) | y] = mode of p(x | y) * N(0, γ²/2)     and what it reaches

With w = γ²/(2σ² + γ²) and τ² = w σ² the last is the c that maximises log p_τ(m) - (1-w) (c - y)²/(2σ²) at m = w y + (1-w) c, a
root of c = y + σ² (log p_τ)'(m).  It lies between the mode (γ → 0) and the mean (γ → ∞), and is the proximal map of

    R_γ = R_τ / w,   where R_τ(x) = -τ² log p_τ(m) - (m - x)²/2 with x = m + τ² (log p_τ)'(m)

is the function of which the posterior mean at noise τ is the proximal map.  Proof, for all y and any dimension: -τ² log p_τ is
the Moreau envelope of R_τ, so that maximising over c is minimising R_τ(x)/w + (x - m)²/(2w) + (m - y)²/(2 (1-w)) over m and x,
and the least over m is R_τ(x)/w + (x - y)²/2.

Derived; the paper (Fang, Buchanan, Sulam; ICLR 2024) proves the limit γ → 0 (Theorem 3.2).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from solvers.proximal import scalar
from solvers.proximal.functional import Regularizer

Level = float | Float[Array, ""]
Real = Float[Array, "*shape"]


def check_weights(name: str, weights: Any) -> None:
    """Raises ValueError unless they are positive and sum to 1; traced ones pass."""
    if isinstance(weights, jax.core.Tracer):
        return
    w = np.asarray(weights, float)
    if not ((w > 0).all() and abs(w.sum() - 1) <= 1e-5):
        raise ValueError(f"{name}: weights are {weights}, expected positive numbers with the sum 1, not {w.sum():g}")


def check_positive(name: str, **given: Any) -> None:
    for what, value in given.items():
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name}: {what} is {float(value):g}, expected a positive number")


def share_of(sigma: Level, gamma: Level) -> Level:
    """w = γ²/(2σ² + γ²), in a form that an infinite γ can have."""
    return 1 / (1 + 2 * (sigma / gamma) ** 2)


class Distribution(eqx.Module):
    """Subclasses give the density, its convolution with a normal one, the mode and the median."""

    @abstractmethod
    def log_density(self, x: Real) -> Real:
        """log p(x)."""

    @abstractmethod
    def log_smoothed(self, x: Real, tau: Level) -> Real:
        """log p_τ(x), the density of x + τ v."""

    @abstractmethod
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*_"]:
        """Independent draws."""

    @abstractmethod
    def _mode(self, y: Array, sigma: Level) -> Array:
        """See `mode`."""

    @abstractmethod
    def _median(self, y: Array, sigma: Level) -> Array:
        """See `median`."""

    @property
    @abstractmethod
    def middle(self) -> tuple[Level, Level]:
        """An interval before which p rises, and behind which it falls."""

    @property
    def log_concave(self) -> bool:
        return True

    @property
    def concavity_gap(self) -> float | None:
        """A bound on (log p)'' from above, 0 for log-concave densities; None if none is known."""
        return 0.0

    def score(self, x: Real, tau: Level) -> Real:
        """(log p_τ)'(x)."""
        return scalar.derivative(lambda x: self.log_smoothed(x, tau), x)

    def mean(self, y: Real, sigma: Level) -> Real:
        """E[x | y].  Raises ValueError unless σ > 0."""
        check_positive("mean", sigma=sigma)
        return compiled(self, "_mean", y, sigma)

    def median(self, y: Real, sigma: Level) -> Real:
        """The median of p(x | y).  Raises ValueError unless σ > 0."""
        check_positive("median", sigma=sigma)
        return compiled(self, "_median", y, sigma)

    def mode(self, y: Real, sigma: Level) -> Real:
        """argmax p(x | y), the proximal map of -σ² log p; where there are two, either.  Raises ValueError unless σ > 0."""
        check_positive("mode", sigma=sigma)
        return compiled(self, "_mode", y, sigma)

    def matched(self, y: Real, sigma: Level, gamma: Level) -> Real:
        """f_γ(y), the minimiser of the proximal matching loss of width γ.  Raises ValueError unless σ > 0 and γ > 0."""
        check_positive("matched", sigma=sigma, gamma=gamma)
        return compiled(self, "_matched", y, sigma, share_of(sigma, gamma))

    def regularizer(self, sigma: Level) -> NegativeLog:
        """-σ² log p, of which `mode` is the proximal map.  Raises ValueError unless σ > 0."""
        check_positive("regularizer", sigma=sigma)
        return NegativeLog(self, sigma)

    def matched_regularizer(self, sigma: Level, gamma: Level) -> MatchedPrior:
        """R_γ, of which `matched` is the proximal map.  Raises ValueError unless σ > 0 and γ > 0."""
        check_positive("matched_regularizer", sigma=sigma, gamma=gamma)
        return MatchedPrior(self, sigma, share_of(sigma, gamma))

    def _mean(self, y: Array, sigma: Level) -> Array:
        return y + sigma**2 * self.score(y, sigma)

    def _matched(self, y: Array, sigma: Level, share: Level) -> Array:
        """The mode of p(x | y) * N(0, γ²/2) in terms of w."""
        tau = sigma * jnp.sqrt(jnp.asarray(share, y.dtype))

        def slope(c: Array) -> Array:
            return y - c + sigma**2 * self.score(share * y + (1 - share) * c, tau)

        low, high = self.middle
        low, high = jnp.minimum(y, low), jnp.maximum(y, high)
        if self.log_concave:
            return scalar.root(slope, low, high)

        def value(c: Array) -> Array:
            return self.log_smoothed(share * y + (1 - share) * c, tau) - (1 - share) * (c - y) ** 2 / (2 * sigma**2)

        def search() -> Array:
            # The variance of the kernel, γ²/2 = w σ²/(1 - w).
            return scalar.maximum(value, slope, *self._points(y, sigma, tau**2 / (1 - share)))

        return scalar.implicit(slope, search, y)

    def _points(self, y: Array, sigma: Level, more: Array) -> tuple[Array, int]:
        """Numbers, sorted along a new first axis, between which the maxima of the posterior with `more` variance lie, and how
        many of these there may be; for densities that are not log-concave."""
        raise NotImplementedError


class NegativeLog(Regularizer):
    """-σ² Σ log p(x_i) over the entries; its proximal map with step λ is the mode at noise √λ σ."""

    distribution: Any
    sigma: Level

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        return -jnp.sum(self.sigma**2 * self.distribution.log_density(x))

    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """Raises ValueError unless lam > 0."""
        check_positive("prox", lam=lam)
        return self.distribution.mode(v, self.sigma * lam**0.5)

    @property
    def weak_convexity(self) -> float | None:
        gap = self.distribution.concavity_gap
        return None if gap is None or isinstance(self.sigma, jax.core.Tracer) else float(self.sigma**2 * gap)


class MatchedPrior(Regularizer):
    """R_γ, summed over the entries: R_τ/w in the notation of the module.

    The value is infinite outside of the range of f_γ, as at entries that a uniform distribution does not have.
    """

    distribution: Distribution
    sigma: Level
    share: Level

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        return compiled(self, "_value", x)

    def grad(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """(m - x)/w; NaN where R_γ is infinite."""
        return compiled(self, "_grad", x)

    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """For lam > w the map matched at noise √lam σ with the same τ.  For less, D(m) with lam/w m + (1 - lam/w) D(m) = v, which
        has one root m, as D(m) = m + τ² (log p_τ)'(m) increases.  Raises ValueError unless lam > 0."""
        check_positive("prox", lam=lam)
        return compiled(self, "_prox", v, lam)

    @property
    def tau(self) -> Float[Array, ""]:
        return self.sigma * jnp.sqrt(self.share)

    @property
    def weak_convexity(self) -> float | None:
        """0 for log-concave densities; in general 1/w, which is more than 1."""
        if self.distribution.log_concave:
            return 0.0
        return None if isinstance(self.share, jax.core.Tracer) else float(1 / self.share)

    def _value(self, x: Array) -> Array:
        m, inside = self._inverse(x)
        value = -(self.sigma**2) * self.distribution.log_smoothed(m, self.tau) - (m - x) ** 2 / (2 * self.share)
        return jnp.sum(jnp.where(inside, value, jnp.inf))

    def _grad(self, x: Array) -> Array:
        m, inside = self._inverse(x)
        return jnp.where(inside, (m - x) / self.share, jnp.nan)

    def _prox(self, v: Array, lam: Array) -> Array:
        p, tau = self.distribution, self.tau
        ratio = lam / self.share
        far, near = jnp.maximum(ratio, 1.0), jnp.minimum(ratio, 1.0)
        above = p._matched(v, self.sigma * jnp.sqrt(self.share * far), 1 / far)
        m = scalar.inverse(lambda m: m + (1 - near) * tau**2 * p.score(m, tau), v, tau)
        return jnp.where(ratio > 1, above, m + tau**2 * p.score(m, tau))

    def _inverse(self, x: Array) -> tuple[Array, Array]:
        """m with x = m + τ² (log p_τ)'(m), and whether there is one."""

        def mean(m: Array) -> Array:
            return m + self.tau**2 * self.distribution.score(m, self.tau)

        m = scalar.inverse(mean, x, self.tau)
        slack = 1e3 * float(jnp.finfo(x.dtype).eps) * (jnp.abs(m) + jnp.abs(x) + self.tau)
        return m, jnp.abs(mean(m) - x) <= slack


def compiled(module: eqx.Module, what: str, y: Array, *levels: Level) -> Array:
    """A method, compiled once for all parameters and levels of noise; else its searches would be compiled at every call."""

    def traced(v: Any) -> Any:
        return jnp.asarray(v, y.dtype) if isinstance(v, float | int | np.ndarray) else v

    return _compiled(jax.tree.map(traced, module), what, y, *(jnp.asarray(v, y.dtype) for v in levels))


@eqx.filter_jit
def _compiled(module: eqx.Module, what: str, y: Array, *levels: Array) -> Array:
    return getattr(module, what)(y, *levels)
