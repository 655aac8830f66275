"""T4 and T5: the alignment of the gradient noise, and the Frobenius bound that follows from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.sgd_stability.inputs import (
    ALL_SCHEMES,
    MANY,
    PAPER,
    Problem,
    bound_search,
    corner,
    effort,
    moments,
    problems,
    sampling_of,
    threshold,
)
from theory import sgd_stability as ss

# -- T4: loss alignment and the Frobenius norm -------------------------------------------------------------------------


def _alignment_matrix(a: jax.Array) -> jax.Array:
    """H^{-1/2} ((1/n) sum (a_i' H a_i) a_i a_i' - H^3) H^{-1/2} / |H|_F^2; its eigenvalues are the alignments mu."""
    n = a.shape[0]
    h = a.T @ a / n
    curvature = jnp.sum((a @ h) * a, axis=1)
    chol = jnp.linalg.cholesky(h)
    inner = (a.T * curvature) @ a / n - h @ h @ h
    half = jax.scipy.linalg.solve_triangular(chol, inner, lower=True)
    return jax.scipy.linalg.solve_triangular(chol, half.T, lower=True) / jnp.sum(h * h)


ESCAPE_STEPS = 5


def _alignment_violation(
    problem: Problem, factor: jax.Array, use_average: jax.Array, rate_factor: jax.Array
) -> jax.Array:
    """The Frobenius bound at eta*, and the escape rate of the risk over five steps at 1.5 times the bound."""
    a, s = problem.features, sampling_of(problem)
    mu = jnp.linalg.eigvalsh(_alignment_matrix(a))
    mu0 = jnp.maximum(jnp.where(use_average, mu.mean(), mu[0]), 0)
    frobenius = jnp.sqrt(moments(a).square)
    root = frobenius * jnp.sqrt(s.noise * mu0)
    bound = threshold(problem) * root / factor
    rate = 1.5 / jnp.maximum(root, 1e-6 * frobenius)
    h = a.T @ a / a.shape[0]
    u = jnp.cos(1.0 + jnp.arange(a.shape[1]))

    def step(sigma: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        sigma = ss.second_moment_step(sigma, a, rate, s)
        return sigma, jnp.log(jnp.sum(h * sigma))

    start = jnp.outer(u, u)
    _, log_risk = jax.lax.scan(step, start, length=ESCAPE_STEPS)
    promised = jnp.log(jnp.maximum(rate_factor * (rate * root) ** 2, 1e-300)) * jnp.arange(1, ESCAPE_STEPS + 1)
    escape = jnp.max(promised + jnp.log(jnp.sum(h * start)) - log_risk)
    return jnp.maximum(bound - 1, jnp.expm1(jnp.clip(escape, -5.0, 5.0)))


@claim(
    PAPER,
    "T4",
    r"If the loss alignment satisfies $\mu \ge \mu_0 > 0$ near a minimum that is stable for SGD, then "
    r"$\|H\|_F \le \frac{1}{\eta\sqrt{q\mu_0}}$ (with replacement $\frac1\eta\sqrt{B/\mu_0}$); otherwise SGD escapes, "
    r"$\mathbb{E}\hat R(\theta_t) \ge (\eta^2 q\mu_0\|H\|_F^2)^t\,\hat R(\theta_0)$.",
    title="Frobenius bound under loss alignment, and exponential escape",
    kind="bound",
    controls={
        "factor": "the bound lowered by the factor 0.95",
        "average": "mu_0 replaced by the average of the alignment over directions",
        "rate": "the escape rate doubled",
    },
    regime="full-rank H; the exact infimum mu_0 over directions; escape at 1.5 times the bound, five steps, one start",
    source="Bound independent of the model size stated in the abstract of the 2022 paper (arXiv 2207.02628); constant derived.",
    blind_spot="mu_0 > 0 is needed, so rank-deficient features (n < p) are not tested.",
)
def frobenius_bound(ctx: Context) -> Outcome:
    sizes = ((5, 2), MANY) if ctx.budget == "quick" else ((5, 2), MANY, (30, 8))
    return bound_search(
        ctx,
        _alignment_violation,
        (ctx.pick(1.0, factor=0.95), ctx.pick(False, average=True), ctx.pick(1.0, rate=2.0)),
        structures=problems(ctx, (1, 2, 4), ALL_SCHEMES, sizes),
        corners=(corner([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, 0.0]], batch=4),),
    )


# -- T5: Gaussian features are aligned ------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T5",
    r"For Gaussian features $x\sim N(0,S)$ in three dimensions and the population loss, "
    r"$\mu(u) = 1+\frac{u^\top S^3u}{u^\top Su\,\|S\|_F^2}\in[1,2]$.",
    title="Gaussian features: the alignment in closed form",
    kind="symbolic",
    controls={"sphere": "inputs uniform on the sphere, where mu = 1 - 1/d for S = I"},
    regime="population; three dimensions, S diagonal without loss of generality",
    source="Derived; the 2022 paper proves lower bounds for linear and random-feature models.",
    blind_spot="Says nothing about finite samples: at n = 60, d = 8 the exact infimum is about 0.7.",
)
def gaussian_alignment(ctx: Context) -> Outcome:
    import sympy as sp

    d = 3
    s = sp.symbols(f"s1:{d + 1}", positive=True)
    u = sp.symbols(f"u1:{d + 1}", real=True)
    # Moments of standardised coordinates: E z_i^4 and E z_i^2 z_j^2.
    fourth, cross = ctx.pick((sp.Integer(3), sp.Integer(1)), sphere=(sp.Rational(3 * d, d + 2), sp.Rational(d, d + 2)))
    # E (x'Sx) x x' with x_i = sqrt(s_i) z_i: diagonal, because odd moments vanish.
    second = [s[i] * sum(s[k] ** 2 * (fourth if k == i else cross) for k in range(d)) for i in range(d)]
    norm2 = sum(v**2 for v in s)
    quadratic = sum(s[i] * u[i] ** 2 for i in range(d))
    cubic = sum(s[i] ** 3 * u[i] ** 2 for i in range(d))
    mu = (sum(second[i] * u[i] ** 2 for i in range(d)) - cubic) / (quadratic * norm2)
    # Both ends of the range as sums of non-negative terms.
    others = sum(s[i] * u[i] ** 2 * sum(s[k] ** 2 for k in range(d) if k != i) for i in range(d))
    return ctx.proved(
        mu - 1 - cubic / (quadratic * norm2),
        (2 - mu) * quadratic * norm2 - others,
        note="the formula, whose excess over 1 is non-negative, and 2 - mu as a sum of non-negative terms",
    )


def _draw_moments(key: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """Log-scales of S and a direction u, both (d,)."""
    k_s, k_u = jax.random.split(key)
    return jax.random.normal(k_s, (d,)), jax.random.normal(k_u, (d,))


def _range_violation(x: tuple[jax.Array, jax.Array], fourth: jax.Array, cross: jax.Array) -> jax.Array:
    """max(1 - mu, mu - 2) for independent-looking coordinates with these moments."""
    s, u = jnp.exp(x[0]), x[1]
    weights = s * u**2
    norm2 = jnp.sum(s**2)
    moment = cross * norm2 + (fourth - cross) * s**2 - s**2  # of E (x'Sx) x x' - S^3, over s
    mu = jnp.sum(weights * moment) / (jnp.sum(weights) * norm2)
    return jnp.maximum(1 - mu, mu - 2)


@claim(
    PAPER,
    "T5b",
    r"The population alignment of Gaussian features lies in $[1,2]$ in any dimension and direction; both ends are "
    r"approached.",
    title="Gaussian features have alignment between 1 and 2",
    kind="bound",
    controls={
        "sphere": "inputs uniform on the sphere: below 1",
        "heavy": "independent Student-t entries with 5 degrees of freedom: above 2",
    },
    regime="population, dimensions 2 to 20; S diagonal without loss of generality",
    source="Derived.",
)
def gaussian_range(ctx: Context) -> Outcome:
    d = 5.0  # of the sphere's moments
    fourth, cross = ctx.pick((3.0, 1.0), sphere=(3 * d / (d + 2), d / (d + 2)), heavy=(9.0, 1.0))
    return ctx.worst(
        _range_violation,
        _draw_moments,
        constants=(fourth, cross),
        structures=[(2,), (5,), (20,)],
        ratio=False,
        tolerance=(1e-12, "cancellation of moments that differ by many orders of magnitude, in 64 bits"),
        **effort(ctx),
    )
