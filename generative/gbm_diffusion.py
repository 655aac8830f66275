"""Multiplicative diffusion: geometric Brownian motion forwards, its kernel, its scores, and what runs it backwards.

Shetty, Prasath, Seelamantula, "Dale meets Langevin: A Multiplicative Denoising Diffusion Model" (arXiv 2510.02730).  Positive
data x_0 are noised by factors, entry by entry:

    dX = (μ(t) + c(t) log X) X dt + σ(t) X dW,   0 <= t <= 1

with c = 0 for geometric Brownian motion.  In y = log x this is dY = (μ - σ²/2 + c Y) dt + σ dW, so that

    y_t | y_0 ~ N(a(t) y_0 + M(t), V(t)),   a' = c a,  M' = μ - σ²/2 + c M,  V' = σ² + 2 c V,   a(0) = 1, M(0) = V(0) = 0.

Three scores describe one density p_t of x:

    s = ∇ log p_t                            the Stein score, of size 1/x
    ξ = x s                                  the Hyvarinen score
    s_Y = ξ + 1 = ∇_y log p_{Y,t}(log x)     the score of log x; the 1 is from the Jacobian

What samples or evaluates takes the last, as `log_score(y, t)`: y is (batch, *event), t a scalar array, the result has the shape
of y.  Everything is pure, entry by entry where the formula is, and may be jitted, mapped and differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from generative.gbm_processes import FunctionProcess as FunctionProcess
from generative.gbm_processes import GeometricBrownianMotion as GeometricBrownianMotion
from generative.gbm_processes import GeometricOrnsteinUhlenbeck as GeometricOrnsteinUhlenbeck
from generative.gbm_processes import GeometricSchedule as GeometricSchedule
from generative.gbm_processes import Level, Process, Time
from generative.gbm_processes import edm_times as edm_times
from generative.gbm_processes import from_functions as from_functions
from generative.gbm_processes import geometric as geometric
from generative.gbm_processes import sinh_times as sinh_times
from generative.gbm_processes import uniform_times as uniform_times
from generative.positive import check_positive, exponent_limit

LogScore = Callable[[Array, Array], Array]


# ---- the kernel ---------------------------------------------------------------------------------------------------------


def perturb(
    key: Key[Array, ""], process: Process, x0: Float[Array, " batch *event"], t: Level | Float[Array, " batch"]
) -> tuple[Float[Array, " batch *event"], Float[Array, " batch *event"]]:
    """(x_t, z): a draw x_t = x_0^a exp(M + sqrt(V) z) of the kernel, and its standard normal z.

    t is one time, or one to each of the batch.
    Raises ValueError unless x0 is positive, with the map of `generative.positive` that would make it so; FloatingPointError if an
    x_t is too large or too small for its dtype.  Inside jit values are not known: there it becomes infinite or zero.
    """
    check_positive("perturb: x0", x0)
    a, shift, variance = (column(f(t), x0) for f in (process.scale, process.shift, process.variance))
    z = jax.random.normal(key, x0.shape, x0.dtype)
    y = a * jnp.log(x0) + shift + jnp.sqrt(variance) * z
    _check_exponents("perturb: x_t", y)
    return jnp.exp(y), z


def transition_log_density(
    process: Process,
    x: Float[Array, " batch *event"],
    t: Level | Float[Array, " batch"],
    x0: Float[Array, " batch *event"],
) -> Float[Array, " batch"]:
    """log p(x_t | x_0), the log-normal density, summed over the entries of an event; -∞ at x <= 0.

    Raises ValueError unless x0 and t are positive: at t = 0 there is no density.
    """
    check_positive("transition_log_density: x0", x0)
    _check_later("transition_log_density", t)
    variance = column(process.variance(t), x)
    y = jnp.log(jnp.where(x > 0, x, 1))
    each = -((y - _centre(process, t, x0)) ** 2) / (2 * variance) - jnp.log(2 * math.pi * variance) / 2 - y
    return entries(jnp.where(x > 0, each, -jnp.inf)).sum(1)


def conditional_score(
    process: Process,
    x: Float[Array, " batch *event"],
    t: Level | Float[Array, " batch"],
    x0: Float[Array, " batch *event"],
) -> Float[Array, " batch *event"]:
    """ξ(x_t | x_0) = x_t ∇ log p(x_t | x_0) = -1 - (log x_t - a log x_0 - M) / V, which is -1 - z / sqrt(V).

    The Hyvarinen score of the kernel: the target of denoising score matching.  Raises ValueError unless x, x0 and t are positive.
    """
    check_positive("conditional_score: x", x)
    check_positive("conditional_score: x0", x0)
    _check_later("conditional_score", t)
    return -1 - (jnp.log(x) - _centre(process, t, x0)) / column(process.variance(t), x)


def _centre(process: Process, t: Time, x0: Array) -> Array:
    return column(process.scale(t), x0) * jnp.log(x0) + column(process.shift(t), x0)


def _check_later(owner: str, t: Time) -> None:
    """Raises ValueError unless all of t, where it is known, are positive."""
    if isinstance(t, jax.core.Tracer):
        return
    known = np.asarray(t)
    if not (known > 0).all():
        raise ValueError(
            f"{owner}: t is {known.min():g}, expected positive times: at t = 0 all of the kernel is at x0, without a density"
        )


def _check_exponents(name: str, y: Array) -> None:
    """Raises FloatingPointError unless all of exp(y), where it is known, are normal numbers of their dtype."""
    if isinstance(y, jax.core.Tracer):
        return
    limit = exponent_limit(y.dtype)
    bad = ~(jnp.abs(y) <= limit)
    if bool(bad.any()):
        raise FloatingPointError(
            f"{name} holds {int(bad.sum())} of {y.size} entries that are too large or too small: |log x_t| is up to "
            f"{float(jnp.abs(y).max()):g}, and {y.dtype} ends at {limit:g}; expected a smaller V(t)"
        )


# ---- what the score tells of x_0 ----------------------------------------------------------------------------------------


def posterior_log_mean(
    process: Process, log_score: LogScore, y: Float[Array, " batch *event"], t: Level
) -> Float[Array, " batch *event"]:
    """E[log x_0 | x_t] = (y - M + V s_Y) / a, Tweedie's formula in log space; exp of it is the geometric mean of x_0."""
    t = jnp.asarray(t, y.dtype)
    return (y - process.shift(t) + process.variance(t) * log_score(y, t)) / process.scale(t)


def posterior_log_variance(
    process: Process, log_score: LogScore, y: Float[Array, " batch *event"], t: Level
) -> Float[Array, " batch *event"]:
    """Var[log x_0 | x_t] = (V + V² ∂s_Y/∂y) / a² of each entry.  Costs one directional derivative of the score an entry."""
    t = jnp.asarray(t, y.dtype)
    variance = process.variance(t)
    slopes = jacobian_diagonal(lambda v: log_score(v, t), y)
    return (variance + variance**2 * slopes) / process.scale(t) ** 2


def posterior_mean(
    process: Process,
    log_density: Callable[[Array], Array],
    y: Float[Array, " batch *event"],
    t: Level,
) -> Float[Array, " batch *event"]:
    """E[x_0 | x_t], the arithmetic mean: exp((y_i - M)/a + V/(2a²)) p_Y(y + V/a e_i) / p_Y(y) for entry i.

    log_density  (batch, *event) -> (batch,), log p_{Y,t} of y = log x, whose constant does not matter
    The score at one point does not determine it, hence the density at one more point an entry.
    """
    t = jnp.asarray(t, y.dtype)
    a, variance = process.scale(t), process.variance(t)
    here = log_density(y)

    def moved(direction: Array) -> Array:
        return log_density(y + variance / a * direction) - here

    gains = jax.lax.map(moved, _basis(y))
    gains = jnp.moveaxis(gains, 0, -1).reshape(y.shape)
    return jnp.exp((y - process.shift(t)) / a + variance / (2 * a**2) + gains)


# ---- backwards ----------------------------------------------------------------------------------------------------------


def reverse_drift(
    process: Process, log_score: LogScore, x: Float[Array, " batch *event"], t: Level, noise: Level = 1.0
) -> Float[Array, " batch *event"]:
    """The drift of x as t runs down: dX = [-(μ + c log X) + (1 + λ²)/2 σ² (2 + ξ)] X dτ + λ σ X dW, in the sense of Ito.

    noise  λ: 1 is Anderson's reverse equation, with (2σ² - μ) X + σ² X ξ; 0 the probability flow; all have the same marginals

    Raises ValueError unless x is positive.
    """
    check_positive("reverse_drift: x", x)
    t = jnp.asarray(t, x.dtype)
    y = jnp.log(x)
    forward = process.drift(t) + process.reversion(t) * y
    return x * (-forward + (1 + noise**2) / 2 * process.volatility(t) ** 2 * (1 + log_score(y, t)))


def reverse_log_drift(
    process: Process, log_score: LogScore, y: Float[Array, " batch *event"], t: Level, noise: Level = 1.0
) -> Float[Array, " batch *event"]:
    """The drift of y = log x as t runs down: dY = [σ²/2 - μ - c Y + (1 + λ²)/2 σ² s_Y] dτ + λ σ dW.

    With λ = noise = 1 and c = 0 it is 3/2 σ² - μ + σ² ξ: one half of σ² less than the drift in x has, which is Ito's.
    """
    t = jnp.asarray(t, y.dtype)
    return -process.log_drift(y, t) + (1 + noise**2) / 2 * process.volatility(t) ** 2 * log_score(y, t)


def probability_flow(
    process: Process, log_score: LogScore, y: Float[Array, " batch *event"], t: Level
) -> Float[Array, " batch *event"]:
    """dy/dt = μ - σ²/2 + c y - σ²/2 s_Y of the flow without noise, as t runs up."""
    return -reverse_log_drift(process, log_score, y, t, 0.0)


# ---- scores from what a network predicts --------------------------------------------------------------------------------


def log_score_from_hyvarinen(hyvarinen: LogScore) -> LogScore:
    """s_Y = ξ + 1 of ξ(y, t)."""
    return FromHyvarinen(hyvarinen)


def log_score_from_stein(stein: LogScore) -> LogScore:
    """s_Y = x s + 1 of s(x, t), which is given x = exp(y) and not y."""
    return FromStein(stein)


def log_score_from_noise(process: Process, noise: LogScore) -> LogScore:
    """s_Y = -ε / sqrt(V) of ε(y, t), the mean of the normal draw z given x_t."""
    return FromNoise(process, noise)


def log_score_from_denoiser(process: Process, denoiser: LogScore) -> LogScore:
    """s_Y = (a f + M - y) / V of f(y, t) = E[log x_0 | x_t]."""
    return FromDenoiser(process, denoiser)


class FromHyvarinen(eqx.Module):
    hyvarinen: Any

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        return self.hyvarinen(y, t) + 1


class FromStein(eqx.Module):
    stein: Any

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        x = jnp.exp(y)
        return x * self.stein(x, t) + 1


class FromNoise(eqx.Module):
    process: Process
    noise: Any

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        return -self.noise(y, t) / jnp.sqrt(self.process.variance(t))


class FromDenoiser(eqx.Module):
    process: Process
    denoiser: Any

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        centre = self.process.scale(t) * self.denoiser(y, t) + self.process.shift(t)
        return (centre - y) / self.process.variance(t)


# ---- helpers that other modules use -------------------------------------------------------------------------------------


def column(values: Array, like: Array) -> Array:
    """() or (batch,) as an array that broadcasts against (batch, *event)."""
    return values if values.ndim == 0 else values.reshape(-1, *(1,) * (like.ndim - 1))


def entries(values: Array) -> Array:
    """(batch, *event) -> (batch, entries)."""
    return values.reshape(len(values), -1)


def jacobian_diagonal(f: Callable[[Array], Array], y: Float[Array, " batch *event"]) -> Float[Array, " batch *event"]:
    """∂f_i/∂y_i of an f that treats the batch row by row, one entry after the other so that memory does not grow with them."""
    _, push = jax.linearize(f, y)

    def slope(direction: Array) -> Array:
        return (entries(push(jnp.broadcast_to(direction, y.shape))) * direction.reshape(-1)).sum(1)

    return jnp.moveaxis(jax.lax.map(slope, _basis(y)), 0, -1).reshape(y.shape)


def _basis(y: Array) -> Array:
    """(entries, *event): the unit vectors of an event."""
    size = math.prod(y.shape[1:])
    return jnp.eye(size, dtype=y.dtype).reshape(size, *y.shape[1:])
