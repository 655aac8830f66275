"""T0 to T3, T6, T7, T16 and T17: the exact threshold, and what stability says of the Hessian for any features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.sgd_stability import oracle
from paper_checks.sgd_stability.inputs import (
    ALL_SCHEMES,
    BATCHES,
    BERNOULLI,
    CORNERS,
    PAPER,
    Problem,
    assert_at_most,
    bound_search,
    converged,
    corner,
    moments,
    paste,
    problems,
    sampling_of,
    threshold,
    top_eigenvalue,
)
from paper_checks.sgd_stability.oracle import in_digits
from theory import sgd_stability as ss

# -- T0: the exact threshold -------------------------------------------------------------------------------------------


def _edge_violation(problem: Problem, noise_factor: jax.Array) -> jax.Array:
    """How far the second-moment operator is from changing sides at eta*, and N(eta*) from having eigenvalue 1."""
    a, s = problem.features, sampling_of(problem)
    eta = converged(ss.stability_threshold(a, s._replace(noise=noise_factor * s.noise)))
    inside, outside = (ss.spectral_radius(a, f * eta, s) - 1 for f in (0.99, 1.01))
    noisy = s.noise > 1e-9  # without noise N vanishes and eta* is that of gradient descent
    edge = jnp.abs(jnp.linalg.eigvalsh(ss.n_form(a, eta, s))[-1] - 1)
    # In n_form's own units a shift of eta by 1e-6 moves the eigenvalue by as much at least.
    return jnp.maximum(jnp.maximum(inside, -outside), jnp.where(noisy, edge - 1e-6, -1.0))


@claim(
    PAPER,
    "T0",
    r"SGD is linearly stable in mean square, $\rho(T)\le1$ on the range of $H$, exactly for $\eta\le\eta^*$, "
    r"$\eta^*=\min_\Sigma\frac{2\operatorname{Tr}(\Sigma H\Sigma)}{\langle\Sigma,D\Sigma\rangle}$; there "
    r"$\lambda_{\max}(N(\eta^*))=1$.",
    title="The exact threshold is the edge of mean-square stability",
    kind="exact",
    controls={"half_noise": "the noise weight halved in the threshold"},
    regime="any features, batch 1 to 8, three sampling schemes; 1 % below and above the threshold",
    source="Derived; the yardstick of every bound below.",
    blind_spot="Spectral radii are dense, so at most 8 parameters.",
)
def exact_threshold(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _edge_violation,
        (ctx.pick(1.0, half_noise=0.5),),
        structures=problems(ctx, BATCHES, ALL_SCHEMES),
        ratio=False,
        steps=0,
        tolerance=(1e-7, "spectral radii of T in 64 bits; 1 % on either side moves them by 1e-4 and more"),
    )


# -- T1: gradient descent -----------------------------------------------------------------------------------------------


STEPS = 1 << 13


def _gd_violation(problem: Problem, constant: jax.Array, use_trace: jax.Array) -> jax.Array:
    """Growth per step at 0.999 of the claimed threshold, decay at 1.001 of it, or the library's value off by more."""
    a = problem.features
    n, d = a.shape
    h = (a.T @ a if d <= n else a @ a.T) / n  # the deviation u itself, or the residuals A u
    sharpness = jnp.where(use_trace, jnp.trace(h), top_eigenvalue(a))
    start = h @ jnp.cos(1.0 + jnp.arange(h.shape[0]))  # on the range: nothing moves in the kernel
    eta = constant / sharpness

    def growth(rate: jax.Array) -> jax.Array:
        def step(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            u = u - rate * h @ u
            size = jnp.linalg.norm(u) + 1e-300
            return u / size, jnp.log(size)

        _, sizes = jax.lax.scan(step, start / jnp.linalg.norm(start), length=STEPS)
        return jnp.mean(sizes)

    library = jnp.abs(converged(ss.stability_threshold(a, ss.full_batch())) / eta - 1)
    return jnp.maximum(jnp.maximum(growth(0.999 * eta), -growth(1.001 * eta)), library - 1e-10)


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
    regime="any quadratic, simulated for 2^13 steps; for a nonlinear loss only near the minimum",
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
        tolerance=(1e-9, "rounding of 2^13 steps in 64 bits, per step: the growth sought is 2e-3"),
    )


# -- T2, T3: the trace bound ------------------------------------------------------------------------------------------------


def _trace_violation(problem: Problem, constant: jax.Array, batch_power: jax.Array) -> jax.Array:
    """eta* Tr H / (constant B^power) - 1."""
    return threshold(problem) * moments(problem.features).trace / (constant * problem.batch**batch_power) - 1


@in_digits
def _trace_exact(a: np.ndarray, mean: Any, noise: Any, batch: int, constant: Any, batch_power: Any) -> Any:
    return oracle.threshold(a, mean, noise) * np.sum(a * a) / len(a) / (constant * batch**batch_power) - 1


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


@in_digits
def _batch_exact(a: np.ndarray, mean: Any, noise: Any, batch: int, constant: Any, forget_batch: bool) -> Any:
    eta, norms, h = oracle.threshold(a, mean, noise), np.sum(a * a, 1), a.T @ a / len(a)
    trace = norms.sum() / len(a)
    second = eta * (mean * np.sum(h * h) + noise * np.sum(norms**2) / len(a)) / (constant * trace)
    return max(second, eta * (1 if forget_batch else noise) * trace / constant) - 1


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
        "batch_free": r"$q$ dropped from the trace bound: $\operatorname{Tr}H \le 2/\eta$ at every batch size",
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
        structures=problems(ctx, BATCHES, ALL_SCHEMES),
        high=_batch_exact,
    )


@claim(
    PAPER,
    "T3b",
    r"If a minimum is linearly stable for SGD with any batch size $B$, then $\operatorname{Tr}H \le 2/\eta$.",
    title="Trace bound read without its batch size",
    kind="bound",
    controls={"root": r"weakened to $\operatorname{Tr}H \le 2\sqrt{B}/\eta$, which is not weak enough"},
    repairs={"times_batch": r"$\operatorname{Tr}H \le 2B/\eta$"},
    regime="batch 1 to 8, sampling with replacement",
    source="T2 without its condition on the batch size, as a summary may quote it (the paper's own wording was not "
    "available); counterexample derived.",
    expect="refuted",
)
def batch_free_trace_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _trace_violation,
        (2.0, ctx.pick(0.0, root=0.5, times_batch=1.0)),
        structures=problems(ctx, BATCHES),
        # Orthogonal rows: eta* Tr H grows almost like B, which exposes the weakened form.
        corners=(*CORNERS, corner(np.eye(8).tolist(), batch=4)),
        high=_trace_exact,
        paste=_trace_paste,
    )


# -- T6, T7: sharpness of the bounds -----------------------------------------------------------------------------------


def _two_sided_violation(
    problem: Problem, swapped: jax.Array, use_smallest: jax.Array, any_norms: jax.Array
) -> jax.Array:
    a = problem.features
    m, eta = moments(a), threshold(problem)
    upper = 2 * m.trace / m.fourth
    lower = 2 / jnp.where(use_smallest, m.smallest, m.largest)
    lower, upper = jnp.where(swapped, upper, lower), jnp.where(swapped, lower, upper)
    # With equal norms the trace bound is attained.
    level = jnp.where(any_norms, a, a / jnp.linalg.norm(a, axis=1, keepdims=True))
    equality = jnp.abs(threshold(problem._replace(features=level)) * moments(level).trace / 2 - 1)
    return jnp.maximum(jnp.maximum(eta / upper, lower / eta) - 1, equality)


@in_digits
def _two_sided_exact(
    a: np.ndarray, mean: Any, noise: Any, batch: int, swapped: bool, use_smallest: bool, any_norms: bool
) -> Any:
    norms = np.sum(a * a, 1)
    eta = oracle.threshold(a, mean, noise)
    upper, lower = 2 * norms.sum() / np.sum(norms**2), 2 / (min(norms) if use_smallest else max(norms))
    lower, upper = (upper, lower) if swapped else (lower, upper)
    level = a if any_norms else a / np.array([v**0.5 for v in norms], object)[:, None]
    equality = abs(oracle.threshold(level, mean, noise) * np.sum(level**2) / len(a) / 2 - 1)
    return max(eta / upper - 1, lower / eta - 1, equality)


@claim(
    PAPER,
    "T6",
    r"At batch size 1, $\frac{2}{\max_i\|a_i\|^2} \le \eta^* \le \frac{2\operatorname{Tr}H}{\frac1n\sum_i\|a_i\|^4}$, "
    r"and $\eta^* = 2/\operatorname{Tr}H$ when all $\|a_i\|$ are equal.",
    title="How sharp the trace bound is",
    kind="bound",
    controls={
        "swap": "the two sides exchanged",
        "smallest": "the smallest norm in the lower bound",
        "any_norms": "the equality claimed for unequal norms",
    },
    regime="any features, batch size 1",
    source="Derived.",
)
def sharpness_of_trace_bound(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _two_sided_violation,
        (ctx.pick(False, swap=True), ctx.pick(False, smallest=True), ctx.pick(False, any_norms=True)),
        corners=CORNERS[:4],  # the others have a zero row, which no rescaling makes equal to the rest
        high=_two_sided_exact,
        tolerance=(1e-12, "equality is measured as |x - 1|, which rounding alone makes positive"),
    )


def _gd_implied_violation(problem: Problem, converse: jax.Array) -> jax.Array:
    # The dense threshold: the library's matrix-free one uses this very bound as a cap.
    ratio = ss.threshold_vec(problem.features, sampling_of(problem)) * top_eigenvalue(problem.features) / 2
    return jnp.where(converse, 1 / ratio, ratio) - 1


@in_digits
def _gd_implied_exact(a: np.ndarray, mean: Any, noise: Any, batch: int, converse: bool) -> Any:
    ratio = oracle.threshold(a, mean, noise) * oracle.top(a) / 2
    return (1 / ratio if converse else ratio) - 1


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
        structures=problems(ctx, BATCHES, ALL_SCHEMES),
        high=_gd_implied_exact,
    )


# -- T16, T17: a competing criterion, and all bounds together -----------------------------------------------------------


def _criterion_violation(problem: Problem, factor: jax.Array) -> jax.Array:
    """eta* over the rate from which the criterion says that SGD diverges, sigma scaled by `factor`; B = n/4."""
    a = problem.features
    n = a.shape[0]
    batch = max(1, n // 4)
    criterion = ss.dexter_threshold(a, batch)
    # The criterion is the smaller of GD's limit and a multiple of sigma; only the latter is scaled.
    gd = 2 / top_eigenvalue(a)
    scaled = jnp.minimum(gd, factor * jnp.where(criterion < gd, criterion, jnp.inf))
    return converged(ss.stability_threshold(a, ss.bernoulli(batch, n))) / scaled - 1


@in_digits
def _criterion_exact(a: np.ndarray, mean: Any, noise: Any, _: int, factor: Any) -> Any:
    import mpmath as mp

    n = len(a)
    batch = max(1, n // 4)
    eta = oracle.threshold(a, mp.mpf(1), mp.mpf(1) / batch - mp.mpf(1) / n)
    products = a @ a.T
    sigma = oracle.spectrum(np.abs(products))[0][-1] / max(np.diag(products))
    noisy = sigma / mp.sqrt(mp.mpf(n) / batch - 1)
    gd = 2 / oracle.top(a)
    criterion = noisy * gd / 2
    return eta / min(gd, factor * criterion if criterion < gd else gd) - 1


@claim(
    PAPER,
    "T16",
    r"Under Bernoulli sampling SGD diverges in mean square if $\lambda_1(H) \ge 2/\eta$ or "
    r"$\lambda_1(H) > \frac{\sigma}{\eta}(\frac nB-1)^{-1/2}$ with $\sigma=\lambda_1(S)/\max_i\lambda_1(H_i)$, "
    r"$S_{ij}=|a_i^\top a_j|$: never below the exact threshold.",
    title="A competing divergence criterion",
    kind="bound",
    controls={"sigma": "sigma scaled by 0.6"},
    regime="any features, rank-one per-sample Hessians, B = n/4",
    source="Dexter et al. 2024, as recalled; not a statement of this paper.",
    blind_spot="Per-sample Hessians of higher rank.",
)
def divergence_criterion(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _criterion_violation,
        (ctx.pick(1.0, sigma=0.6),),
        structures=problems(ctx, (1,), (BERNOULLI,)),
        high=_criterion_exact,
    )


def _order_violation(problem: Problem, reversed_pair: jax.Array) -> jax.Array:
    a, s = problem.features, sampling_of(problem)
    bounds = ss.threshold_bounds(a @ a.T / a.shape[0], s)
    eta = threshold(problem)
    second = jnp.where(reversed_pair, bounds.second_moment / eta, eta / bounds.second_moment)
    excess = jnp.stack([bounds.max_norm / eta, second, bounds.second_moment / bounds.trace, eta / bounds.frobenius])
    return jnp.max(excess) - 1


@claim(
    PAPER,
    "T17",
    r"For every sampling scheme the bounds are ordered: $\frac{2}{(m+q)\max\|a_i\|^2} \le \eta^* \le "
    r"\frac{2\operatorname{Tr}H}{m\|H\|_F^2+q\frac1n\sum\|a_i\|^4} \le \frac{2}{q\operatorname{Tr}H}$ and "
    r"$\eta^* \le \frac{1}{\|H\|_F\sqrt{q\mu_0}}$, with $m$ and $q$ the mean and noise weights.",
    title="All bounds in order, as the library reports them",
    kind="bound",
    controls={"reversed": "the second-moment bound taken for a lower bound"},
    regime="any features, batch 1 to 8, three sampling schemes; bounds from the Gram matrix",
    source="Derived.",
)
def order_of_bounds(ctx: Context) -> Outcome:
    return bound_search(
        ctx,
        _order_violation,
        (ctx.pick(False, reversed=True),),
        structures=problems(ctx, BATCHES, ALL_SCHEMES),
        steps=0,
        tolerance=(1e-7, "the alignment infimum is an eigenvalue after division by small eigenvalues of H"),
    )
