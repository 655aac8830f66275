"""T1 to T7 and T16: what stability says of the Hessian, for any features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.sgd_stability.inputs import (
    ALL_SCHEMES,
    BERNOULLI,
    CORNERS,
    MANY,
    PAPER,
    SOLVER,
    Problem,
    assert_at_most,
    bound_search,
    corner,
    moments,
    oracle,
    paste,
    problems,
    sampling_of,
    threshold,
    top_eigenvalue,
)
from theory import sgd_stability as ss

# -- T1: gradient descent -----------------------------------------------------------------------------------------------


STEPS = 1 << 14


def _gd_violation(problem: Problem, constant: jax.Array, use_trace: jax.Array) -> jax.Array:
    """Growth per step at 0.999 of the claimed threshold, or decay at 1.001 of it, whichever is worse."""
    a = problem.features
    h = a.T @ a / a.shape[0]
    sharpness = jnp.where(use_trace, jnp.trace(h), top_eigenvalue(a))
    u = jnp.cos(1.0 + jnp.arange(a.shape[1]))
    start = a.T @ (a @ u)  # on range(H): nothing moves in the kernel

    def growth(eta: jax.Array) -> jax.Array:
        step = jnp.eye(a.shape[1]) - eta * h

        def double(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            power, log_scale = carry
            power = power @ power
            size = jnp.abs(power).max()
            return (power / size, 2 * log_scale + jnp.log(size)), None

        (power, log_scale), _ = jax.lax.scan(double, (step, jnp.zeros(())), length=14)
        logarithm = jnp.log(jnp.linalg.norm(power @ start) / jnp.linalg.norm(start)) + log_scale
        return jnp.maximum(logarithm / STEPS, -1.0)  # minus infinity where one step ends at the minimum

    eta = constant / sharpness
    return jnp.maximum(growth(0.999 * eta), -growth(1.001 * eta))


@claim(
    PAPER,
    "T1",
    r"A minimum is linearly stable for gradient descent if and only if $\lambda_{\max}(H) \le 2/\eta$.",
    title="Gradient descent: stable up to 2 / largest eigenvalue",
    kind="exact",
    controls={
        "constant": "2 replaced by 1.9",
        "trace": "the largest eigenvalue replaced by the trace, SGD's measure",
    },
    regime="any quadratic; for a nonlinear loss only near the minimum",
    source="Stated in the paper's abstract; derived anew.",
    blind_spot="One starting point per problem; the instability is looked for 0.1 % above the threshold.",
)
def gradient_descent(ctx: Context) -> Outcome:
    constants = (ctx.pick(2.0, constant=1.9), ctx.pick(False, trace=True))
    return bound_search(
        ctx,
        _gd_violation,
        constants,
        ratio=False,
        steps=0,
        tolerance=(1e-9, "rounding of 2^14 steps in 64 bits, per step: the growth sought is 2e-3"),
    )


# -- T2, T3: the trace bound ------------------------------------------------------------------------------------------------


def _trace_violation(problem: Problem, constant: jax.Array, batch_power: jax.Array) -> jax.Array:
    """eta* Tr H / (constant B^power) - 1."""
    return threshold(problem) * moments(problem.features).trace / (constant * problem.batch**batch_power) - 1


def _trace_exact(problem: Problem, constant: float, batch_power: float) -> float:
    a, eta = oracle(problem)
    return eta * float(np.sum(a * a)) / len(a) / (constant * float(problem.batch) ** batch_power) - 1


def _trace_paste(problem: Problem, constant: float, batch_power: float) -> str:
    bound = float(constant) * float(problem.batch) ** float(batch_power)
    return paste(problem, *assert_at_most("eta_trace", "eta * np.sum(a**2) / len(a)", bound))


@claim(
    PAPER,
    "T2",
    r"If a minimum is linearly stable for SGD with batch size 1, then $\operatorname{Tr} H \le 2/\eta$; no alignment of the "
    r"gradient noise is assumed.",
    title="Trace bound at batch size 1",
    kind="bound",
    controls={
        "constant": "2 replaced by 1.9",
        "batch_two": "the same bound claimed for batch size 2",
    },
    regime="any features, any n and p, batch size 1, sampling with replacement",
    source="Stated in the paper's abstract; derived anew by testing the second-moment operator with the identity.",
    blind_spot="The linearised dynamics only.",
)
def trace_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _trace_violation,
        (ctx.pick(2.0, constant=1.9), 0.0),
        structures=problems(ctx, (ctx.pick(1, batch_two=2),)),
        high=_trace_exact,
        paste=_trace_paste,
    )


def _batch_violation(problem: Problem, constant: jax.Array, forget_batch: jax.Array) -> jax.Array:
    s, m = sampling_of(problem), moments(problem.features)
    eta = threshold(problem)
    second = eta * (s.mean * m.square + s.noise * m.fourth) / (constant * m.trace)
    weight = jnp.where(forget_batch, 1.0, s.noise)
    return jnp.maximum(second, eta * weight * m.trace / constant) - 1


def _batch_exact(problem: Problem, constant: float, forget_batch: bool) -> float:
    a, eta = oracle(problem)
    s = sampling_of(problem)
    mean, noise = float(s.mean), float(s.noise)
    norms = np.sum(a * a, 1)
    h = a.T @ a / len(a)
    second = eta * (mean * np.sum(h * h) + noise * np.mean(norms**2)) / (constant * norms.mean())
    return max(second, eta * (1.0 if forget_batch else noise) * norms.mean() / constant) - 1


@claim(
    PAPER,
    "T3",
    r"For every sampling scheme with noise weight $q$, stability at $\eta$ implies "
    r"$(1-q)\|H\|_F^2 + q\,\frac1n\sum_i\|a_i\|^4 \le \frac{2}{\eta}\operatorname{Tr}H$, hence "
    r"$q\operatorname{Tr}H \le 2/\eta$: with replacement $\operatorname{Tr}H \le 2B/\eta$.",
    title="Trace bound at any batch size",
    kind="bound",
    controls={
        "constant": "2 replaced by 1.9",
        "batch_free": "q dropped from the trace bound: Tr H <= 2/eta at every batch size",
    },
    regime="any features; batch 1 to 8, with and without replacement, and Bernoulli sampling",
    source="Derived; the batch-dependent form of T2.",
    blind_spot="With B = n without replacement only |H|_F^2 <= (2/eta) Tr H is left, which is weak.",
)
def batch_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _batch_violation,
        (ctx.pick(2.0, constant=1.9), ctx.pick(False, batch_free=True)),
        structures=problems(ctx, (1, 2, 4, 8), ALL_SCHEMES),
        high=_batch_exact,
    )


@claim(
    PAPER,
    "T3b",
    r"If a minimum is linearly stable for SGD with any batch size $B$, then $\operatorname{Tr}H \le 2/\eta$.",
    title="Trace bound read without its batch size",
    kind="bound",
    controls={"constant": "the still stronger bound 1.9 / eta"},
    repairs={"times_batch": "Tr H <= 2 B / eta"},
    regime="batch 1 to 8, sampling with replacement",
    source="The bound of T2 without its condition on the batch size, as a summary may quote it; derived counterexample.",
    expect="refuted",
)
def batch_free_trace_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _trace_violation,
        (ctx.pick(2.0, constant=1.9), ctx.pick(0.0, times_batch=1.0)),
        structures=problems(ctx, (1, 2, 4, 8)),
        high=_trace_exact,
        paste=_trace_paste,
    )


# -- T4: loss alignment and the Frobenius norm -------------------------------------------------------------------------


def _alignment_matrix(a: jax.Array) -> jax.Array:
    """H^{-1/2} ((1/n) sum (a_i' H a_i) a_i a_i' - H^3) H^{-1/2} / |H|_F^2; its eigenvalues bound the alignment mu."""
    n = a.shape[0]
    h = a.T @ a / n
    curvature = jnp.sum((a @ h) * a, axis=1)
    chol = jnp.linalg.cholesky(h)
    inner = (a.T * curvature) @ a / n - h @ h @ h
    half = jax.scipy.linalg.solve_triangular(chol, inner, lower=True)
    return jax.scipy.linalg.solve_triangular(chol, half.T, lower=True) / jnp.sum(h * h)


ESCAPE_STEPS = 5


def _alignment_violation(problem: Problem, factor: jax.Array, use_largest: jax.Array) -> jax.Array:
    """The Frobenius bound at eta*, and the escape rate of the risk over five steps at 3 eta*."""
    a, s = problem.features, sampling_of(problem)
    mu = jnp.linalg.eigvalsh(_alignment_matrix(a))
    mu0 = jnp.maximum(jnp.where(use_largest, mu[-1], mu[0]), 0)
    frobenius = jnp.sqrt(moments(a).square)
    eta = threshold(problem)
    bound = eta * frobenius * jnp.sqrt(s.noise * mu0) / factor
    h = a.T @ a / a.shape[0]
    u = jnp.cos(1.0 + jnp.arange(a.shape[1]))

    def step(sigma: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        sigma = ss.second_moment_step(sigma, a, 3 * eta, s)
        return sigma, jnp.log(jnp.sum(h * sigma))

    sigma = jnp.outer(u, u)
    _, log_risk = jax.lax.scan(step, sigma, length=ESCAPE_STEPS)
    rate = jnp.log(jnp.maximum(9 * eta**2 * s.noise * mu0 * frobenius**2, 1e-300)) * jnp.arange(1, ESCAPE_STEPS + 1)
    escape = jnp.max(rate + jnp.log(jnp.sum(h * sigma)) - log_risk)
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
        "factor": "the bound lowered by the factor 0.8",
        "largest": "mu_0 replaced by the largest alignment instead of the smallest",
    },
    regime="full-rank H; the exact infimum mu_0 of the alignment over directions; escape at 3 eta*, five steps",
    source="Bound independent of the model size stated in the abstract of the 2022 paper (arXiv 2207.02628); constant derived.",
    blind_spot="mu_0 > 0 is needed, so rank-deficient features (n < p) are not tested.",
)
def frobenius_bound(ctx: Context) -> Outcome:
    sizes = ((5, 2), MANY) if ctx.budget == "quick" else ((5, 2), MANY, (30, 8))
    return bound_search(
        ctx,
        _alignment_violation,
        (ctx.pick(1.0, factor=0.8), ctx.pick(False, largest=True)),
        structures=problems(ctx, (1, 2, 4), ALL_SCHEMES, sizes),
        corners=(corner([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, 0.0]], batch=4),),
    )


# -- T5: Gaussian features are aligned ------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T5",
    r"For Gaussian features $x\sim N(0,S)$ and the population loss, "
    r"$\mu(u) = 1+\frac{u^\top S^3u}{u^\top Su\,\|S\|_F^2}\in[1,2]$.",
    title="Gaussian features have alignment between 1 and 2",
    kind="symbolic",
    controls={
        "sphere": "inputs uniform on the sphere (there mu = 1 - 1/d when S = I)",
        "heavy": "independent Student-t entries with 5 degrees of freedom",
    },
    regime="population; three dimensions, S diagonal without loss of generality",
    source="Derived; the 2022 paper proves lower bounds for linear and random-feature models.",
    blind_spot="Says nothing about finite samples: at n = 60, d = 8 the exact infimum is about 0.7.",
)
def gaussian_alignment(ctx: Context) -> Outcome:
    import sympy as sp

    d = 3
    s = sp.symbols(f"s1:{d + 1}", positive=True)
    u = sp.symbols(f"u1:{d + 1}", real=True)
    # Moments of one standardised coordinate: E z^4, and of two: E z_i^2 z_j^2.
    fourth, cross = ctx.pick(
        (sp.Integer(3), sp.Integer(1)),
        sphere=(sp.Rational(3 * d, d + 2), sp.Rational(d, d + 2)),
        heavy=(sp.Integer(9), sp.Integer(1)),
    )
    # E (x'Sx) x x' with x_i = sqrt(s_i) z_i: diagonal, because odd moments vanish.
    second = [s[i] * sum(s[k] ** 2 * (fourth if k == i else cross) for k in range(d)) for i in range(d)]
    norm2 = sum(v**2 for v in s)
    quadratic = sum(s[i] * u[i] ** 2 for i in range(d))
    cubic = sum(s[i] ** 3 * u[i] ** 2 for i in range(d))
    mu = (sum(second[i] * u[i] ** 2 for i in range(d)) - cubic) / (quadratic * norm2)
    # Both ends of the range as sums of non-negative terms.
    upper = sum(s[i] * u[i] ** 2 * (norm2 - s[i] ** 2) for i in range(d))
    rest = [sum(s[k] ** 2 for k in range(d) if k != i) for i in range(d)]
    return ctx.proved(
        mu - 1 - cubic / (quadratic * norm2),
        (2 - mu) * quadratic * norm2 - upper,
        upper - sum(s[i] * u[i] ** 2 * rest[i] for i in range(d)),
        note="the alignment formula, and 2 - mu as a sum of non-negative terms",
    )


# -- T6, T7: sharpness of the bounds -----------------------------------------------------------------------------------


def _two_sided_violation(problem: Problem, swapped: jax.Array, use_smallest: jax.Array) -> jax.Array:
    a = problem.features
    m, eta = moments(a), threshold(problem)
    upper = 2 * m.trace / m.fourth
    lower = 2 / jnp.where(use_smallest, m.smallest, m.largest)
    lower, upper = jnp.where(swapped, upper, lower), jnp.where(swapped, lower, upper)
    level = a / jnp.linalg.norm(a, axis=1, keepdims=True)  # equal norms: the trace bound is attained
    equality = jnp.abs(threshold(problem._replace(features=level)) * moments(level).trace / 2 - 1)
    return jnp.maximum(jnp.maximum(eta / upper, lower / eta) - 1, equality - 1e-7)


@claim(
    PAPER,
    "T6",
    r"At batch size 1, $\frac{2}{\max_i\|a_i\|^2} \le \eta^* \le \frac{2\operatorname{Tr}H}{\frac1n\sum_i\|a_i\|^4}$, "
    r"and $\eta^* = 2/\operatorname{Tr}H$ exactly when all $\|a_i\|$ are equal.",
    title="How sharp the trace bound is",
    kind="bound",
    controls={"swap": "the two sides exchanged", "smallest": "the smallest norm in the lower bound"},
    regime="any features, batch size 1",
    source="Derived.",
)
def sharpness_of_trace_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _two_sided_violation,
        (ctx.pick(False, swap=True), ctx.pick(False, smallest=True)),
        corners=CORNERS[:4],  # the others have a zero row, which no rescaling makes equal to the rest
        tolerance=SOLVER,
    )


def _gd_implied_violation(problem: Problem, converse: jax.Array) -> jax.Array:
    ratio = threshold(problem) * top_eigenvalue(problem.features) / 2
    return jnp.where(converse, 1 / ratio, ratio) - 1


@claim(
    PAPER,
    "T7",
    r"A minimum that is stable for SGD, at any batch size and sampling scheme, is stable for gradient descent: "
    r"$\eta^* \le 2/\lambda_{\max}(H)$.",
    title="SGD-stable implies GD-stable",
    kind="bound",
    controls={"converse": "GD-stable implies SGD-stable"},
    regime="any features, batch 1 to 8, three sampling schemes",
    source="Derived, by testing the second-moment operator with a rank-one matrix.",
)
def sgd_stable_implies_gd_stable(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _gd_implied_violation,
        (ctx.pick(False, converse=True),),
        structures=problems(ctx, (1, 2, 4, 8), ALL_SCHEMES),
        tolerance=SOLVER,
    )


# -- T16: a competing criterion ------------------------------------------------------------------------------------------


def _criterion_violation(problem: Problem, factor: jax.Array) -> jax.Array:
    """eta* over the rate from which the criterion says that SGD diverges, sigma scaled by `factor`."""
    a = problem.features
    n, batch = a.shape[0], problem.batch
    products = a @ a.T
    sigma = factor * jnp.linalg.eigvalsh(jnp.abs(products))[-1] / jnp.max(jnp.diagonal(products))
    noisy = jnp.where(batch < n, sigma / jnp.sqrt(jnp.maximum(n / batch - 1, 1e-12)), jnp.inf)
    return threshold(problem) * top_eigenvalue(a) / jnp.minimum(2.0, noisy) - 1


def _criterion_exact(problem: Problem, factor: float) -> float:
    a, eta = oracle(problem)
    n, batch = len(a), int(problem.batch)
    products = a @ a.T
    sigma = float(factor) * np.linalg.eigvalsh(np.abs(products))[-1] / np.diag(products).max()
    noisy = sigma / np.sqrt(n / batch - 1) if batch < n else np.inf
    return eta * np.linalg.eigvalsh(products / n)[-1] / min(2.0, noisy) - 1


@claim(
    PAPER,
    "T16",
    r"Under Bernoulli sampling SGD diverges in mean square if $\lambda_1(H) \ge 2/\eta$ or "
    r"$\lambda_1(H) > \frac{\sigma}{\eta}(\frac nB-1)^{-1/2}$ with $\sigma=\lambda_1(S)/\max_i\lambda_1(H_i)$, "
    r"$S_{ij}=|a_i^\top a_j|$: never below the exact threshold.",
    title="A competing divergence criterion",
    kind="bound",
    controls={"sigma": "sigma scaled by 0.6"},
    regime="any features, rank-one per-sample Hessians, batch 1 to 8",
    source="Dexter et al. 2024, as recalled; not a statement of this paper.",
    blind_spot="Per-sample Hessians of higher rank.",
)
def divergence_criterion(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _criterion_violation,
        (ctx.pick(1.0, sigma=0.6),),
        structures=problems(ctx, (1, 2, 5, 8), (BERNOULLI,)),
        corners=(),
        high=_criterion_exact,
    )
