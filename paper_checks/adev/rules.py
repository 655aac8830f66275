"""The paper's rules written out by hand, as formulas with constants: right, and falsified in the controls.

Nothing here uses `vi`.  Every function makes an estimator (key, parameters) -> (value, gradient).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paper_checks.adev.common import Estimator

sg = lax.stop_gradient


@functools.lru_cache(maxsize=64)
def score_function(draw: Callable[..., Any], log_p: Callable[..., Any], f: Callable[..., Any]) -> Estimator:
    """v ~ draw(key, *parameters); f(v, *parameters) and its derivative plus f times that of log_p(v, *parameters)."""

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        v = sg(draw(key, *theta))
        value, grad = jax.value_and_grad(lambda t: f(v, *t))(theta)
        return jnp.concatenate([value[None], grad + value * jax.grad(lambda t: log_p(v, *t))(theta)])

    return estimator


@functools.lru_cache(maxsize=64)
def pathwise(draw: Callable[..., Any], f: Callable[..., Any]) -> Estimator:
    """f(x, *parameters) with x = draw(key, *parameters), and what ordinary AD makes of it."""

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        value, grad = jax.value_and_grad(lambda t: f(draw(key, *t), *t))(theta)
        return jnp.concatenate([value[None], grad])

    return estimator


WEIBULL_SCALE, WEIBULL_FACTOR, THIRD_DEGREE = math.sqrt(2), 1 / math.sqrt(2 * math.pi), 1.0


@functools.lru_cache(maxsize=64)
def mvd_normal(f: Callable[..., Any]) -> Estimator:
    """f(x, share), x ~ N(mu, sigma), at (mu, sigma, share, and the three constants of the rule): (value, three derivatives).

    In mu [f(mu + sigma w) - f(mu - sigma w)] WEIBULL_FACTOR / sigma, with w Weibull of shape 2 and scale WEIBULL_SCALE; in
    sigma [f(mu + sigma m) - f(x)] / sigma, m with a fair sign and m^2 of the chi-square law, of three degrees of freedom
    if THIRD_DEGREE is 1 and of two if it is 0.
    """

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        k_x, k_w, k_m, k_s = jax.random.split(key, 4)
        mu, sigma, share, scale, factor, third = theta
        x = mu + sigma * jax.random.normal(k_x)
        w = scale * jnp.sqrt(-jnp.log1p(-jax.random.uniform(k_w)))
        m = jnp.linalg.norm(jax.random.normal(k_m, (3,)) * jnp.stack([1.0, 1.0, third]))
        m = m * jax.random.rademacher(k_s, (), float)
        value, by_share = jax.value_and_grad(lambda s: f(x, s))(share)
        by_mu = (f(mu + sigma * w, share) - f(mu - sigma * w, share)) * factor / sigma
        return jnp.stack([value, by_mu, (f(mu + sigma * m, share) - value) / sigma, by_share])

    return estimator


@functools.lru_cache(maxsize=64)
def mvd_flips(scales: tuple[float, ...], f: Callable[[jax.Array], jax.Array], sign: float = 1.0) -> Estimator:
    """f(b) for independent flips b_i ~ flip(p c_i): per flip, (f with b_i flipped - f) · sign · (-1)^b_i · c_i."""

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        c = jnp.array(scales)
        b = (jax.random.uniform(key, c.shape) < theta[0] * c).astype(float)
        value = f(b)
        each = jnp.eye(len(scales))
        others = jax.vmap(lambda e: f(jnp.where(e == 1, 1 - b, b)))(each)
        return jnp.stack([value, jnp.sum((others - value) * sign * (1 - 2 * b) * c)])

    return estimator


@functools.lru_cache(maxsize=64)
def self_included(m: int) -> Estimator:
    """10 + flip(p), m draws, each with the mean of all m losses as the baseline, its own among them."""

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        p, offset = theta
        b = (jax.random.uniform(key, (m,)) < p).astype(float)
        loss = offset + b
        score = jnp.where(b == 1, 1 / p, -1 / (1 - p))
        by_p = jnp.mean((loss - loss.mean()) * score)
        return jnp.stack([loss.mean(), by_p, jnp.ones(())])

    return estimator
