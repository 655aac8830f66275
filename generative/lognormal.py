"""Log-normal distributions and their mixtures: targets whose every score is known, and where a sampler starts.

log x of a mixture is a mixture of normal distributions, with independent entries in each part.  A multiplicative diffusion keeps
the family: part j of p_t has log-mean a m_j + M and log-variance a² c_j + V.  So the score is exact at all t, in any dimension.

log_prob(x) is the density of x; log_prob_of_log(y) that of y = log x, larger by Σ log x.
"""

from __future__ import annotations

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from generative.gbm_diffusion import LogScore, Process, entries
from generative.positive import check_positive


class LogNormal(eqx.Module):
    """log x_i ~ N(mean_i, variance_i), independent.

    Raises ValueError unless both have one shape, that of an event, and the variances are positive.
    """

    mean: Float[Array, "*event"]
    variance: Float[Array, "*event"]

    def __check_init__(self) -> None:
        if self.mean.shape != self.variance.shape:
            raise ValueError(
                f"LogNormal: mean has shape {self.mean.shape} and variance {self.variance.shape}, expected the same"
            )
        _check_variances("LogNormal: variance", self.variance)

    def log_prob(self, x: Float[Array, " batch *event"]) -> Float[Array, " batch"]:
        """The log-density of x; -∞ unless all of it is positive."""
        y, correction = _logs(x)
        return self.log_prob_of_log(y) + correction

    def log_prob_of_log(self, y: Float[Array, " batch *event"]) -> Float[Array, " batch"]:
        """The log-density of log x at y."""
        return entries(_log_normal(y - self.mean, self.variance)).sum(1)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, " n *event"]:
        """n independent draws of x."""
        z = jax.random.normal(key, (n, *self.mean.shape), self.mean.dtype)
        return jnp.exp(self.mean + jnp.sqrt(self.variance) * z)


class LogNormalMixture(eqx.Module):
    """Σ_j weights_j of log-normal distributions with independent entries.

    weights    (k,), positive with sum 1
    means      (k, *event), of log x
    variances  (k, *event), of log x

    Raises ValueError unless the lengths and shapes agree, the variances are positive and the weights a distribution.
    """

    weights: Float[Array, " k"]
    means: Float[Array, " k *event"]
    variances: Float[Array, " k *event"]

    def __init__(
        self,
        weights: Float[Array | np.ndarray, " k"],
        means: Float[Array | np.ndarray, " k *event"],
        variances: Float[Array | np.ndarray, " k *event"],
    ):
        self.weights, self.means, self.variances = (jnp.asarray(v) for v in (weights, means, variances))
        shapes = [v.shape for v in (self.weights, self.means, self.variances)]
        if len(shapes[0]) != 1 or shapes[1][:1] != shapes[0] or shapes[1] != shapes[2]:
            raise ValueError(
                f"LogNormalMixture: weights, means, variances have shapes {shapes}, expected (k,), (k, *event), (k, *event)"
            )
        _check_variances("LogNormalMixture: variances", self.variances)
        if not isinstance(self.weights, jax.core.Tracer):
            w = np.asarray(self.weights, float)
            if not (w > 0).all() or abs(w.sum() - 1) > 1e-5:
                raise ValueError(f"LogNormalMixture: weights are {w}, expected positive numbers of sum 1")

    def at(self, process: Process, t: float | Float[Array, ""]) -> LogNormalMixture:
        """The mixture that p_t is when p_0 is this one."""
        t = jnp.asarray(t, self.means.dtype)
        a = process.scale(t)
        return LogNormalMixture(
            self.weights, a * self.means + process.shift(t), a**2 * self.variances + process.variance(t)
        )

    def log_prob(self, x: Float[Array, " batch *event"]) -> Float[Array, " batch"]:
        """The log-density of x; -∞ unless all of it is positive."""
        y, correction = _logs(x)
        return self.log_prob_of_log(y) + correction

    def log_prob_of_log(self, y: Float[Array, " batch *event"]) -> Float[Array, " batch"]:
        """The log-density of log x at y."""
        return jax.nn.logsumexp(self._log_parts(y), 1)

    def score_of_log(self, y: Float[Array, " batch *event"]) -> Float[Array, " batch *event"]:
        """s_Y = ∇_y log p_Y(y)."""
        shares = jax.nn.softmax(self._log_parts(y), 1)
        slopes = (self.means - y[:, None]) / self.variances
        return jnp.einsum("bk,bk...->b...", shares, slopes, precision="highest")

    def hyvarinen(self, x: Float[Array, " batch *event"]) -> Float[Array, " batch *event"]:
        """ξ = x ∇ log p(x) = s_Y(log x) - 1.  Raises ValueError unless x is positive."""
        check_positive("LogNormalMixture.hyvarinen: x", x)
        return self.score_of_log(jnp.log(x)) - 1

    def log_score(self, process: Process) -> LogScore:
        """s_Y(y, t) of p_t, exact: what samplers and likelihoods take, when p_0 is this mixture."""
        return MixtureScore(self, process)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, " n *event"]:
        """n independent draws of x."""
        first, second = jax.random.split(key)
        part = jax.random.categorical(first, jnp.log(self.weights), shape=(n,))
        z = jax.random.normal(second, (n, *self.means.shape[1:]), self.means.dtype)
        return jnp.exp(self.means[part] + jnp.sqrt(self.variances[part]) * z)

    def _log_parts(self, y: Array) -> Array:
        """(batch, k): log of weight times density."""
        each = _log_normal(y[:, None] - self.means, self.variances)
        return jnp.log(self.weights) + each.reshape(*each.shape[:2], -1).sum(2)


class MixtureScore(eqx.Module):
    """s_Y(y, t) of the mixture that `start` has become at t.  A value, so that jit knows it again."""

    start: LogNormalMixture
    process: Process

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        return self.start.at(self.process, t).score_of_log(y)


def fitted_prior(
    process: Process, x0: Float[Array, " n *event"], per: Literal["pixel", "channel", "all"] = "pixel"
) -> LogNormal:
    """The log-normal distribution with the mean and variance of log x_1, where samples start: from data x0.

    Mean a E[log x_0] + M and variance a² Var[log x_0] + V at t = 1.
    per  "pixel": every entry its own; "channel": one to each index of the first axis of an event, as (channels, height, width);
         "all": one for all

    p_1 is log-normal only if p_0 is: what is lost falls with V.  Raises ValueError for x0 that is not positive, or an unknown
    `per`.
    """
    axes: dict[str, tuple[int, ...]] = {
        "pixel": (0,),
        "channel": (0, *range(2, x0.ndim)),
        "all": tuple(range(x0.ndim)),
    }
    if per not in axes:
        raise ValueError(f"fitted_prior: per is {per!r}, expected {', '.join(map(repr, axes))}")
    check_positive("fitted_prior: x0", x0)
    logs = jnp.log(x0)
    a, shift, variance = (f(jnp.ones((), x0.dtype)) for f in (process.scale, process.shift, process.variance))
    mean = a * logs.mean(axes[per], keepdims=True) + shift
    spread = a**2 * logs.var(axes[per], keepdims=True) + variance
    return LogNormal(*(jnp.broadcast_to(v, (1, *x0.shape[1:]))[0] for v in (mean, spread)))


def _logs(x: Array) -> tuple[Array, Array]:
    """log x, and what turns the density of log x into that of x: -Σ log x, or -∞ where x is not positive."""
    good = x > 0
    y = jnp.log(jnp.where(good, x, 1))
    return y, jnp.where(entries(good).all(1), -entries(y).sum(1), -jnp.inf)


def _log_normal(x: Array, variance: Array) -> Array:
    return -(x**2) / (2 * variance) - jnp.log(2 * math.pi * variance) / 2


def _check_variances(name: str, variances: Array) -> None:
    if isinstance(variances, jax.core.Tracer):
        return
    known = np.asarray(variances)
    if not (known > 0).all():
        raise ValueError(f"{name} has the smallest entry {known.min():g}, expected positive numbers")
