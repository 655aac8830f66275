"""The sharp threshold η* without any large matrix: the minimum of the quotient (*) of the package."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int

from theory.sgd_stability.operator import (
    HIGHEST,
    Coordinates,
    Sampling,
    as_features,
    as_gram,
    coordinates_of_features,
    coordinates_of_gram,
    dot,
    quadratic_forms,
    quotient,
    resolvent,
)

_CERTIFICATE_STEPS = 10  # at most; networks need one or two


class Threshold(NamedTuple):
    """The stability threshold and how well it is known.

    eta         η*: the quotient (*) at the Σ that was found, hence an upper bound up to rounding
    lower       Collatz-Wielandt lower bound: SGD is stable at `lower`, up to rounding
    iterations  steps of the eigenvalue iteration, one application of D each
    converged   whether `residual` fell below the tolerance
    residual    of the eigenvalue problem, relative to κ = 2/η; `eta` has about its square as relative error,
                divided by the relative gap to the next eigenvalue
    """

    eta: Float[Array, ""]
    lower: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    residual: Float[Array, ""]

    @property
    def upper(self) -> Float[Array, ""]:
        """Upper bound of η* up to rounding: every value of the quotient (*) is one."""
        return self.eta


def stability_threshold(
    features: Float[ArrayLike, "n p"],
    sampling: Sampling,
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Threshold:
    """η* of the features of an interpolating minimum, for any n and p: O(n min(n, p)²) per iteration.

    Minimises the quotient (*) in eigen-coordinates of H (p <= n) or K (n < p) by a locally optimal
    block-free Davidson (preconditioned conjugate gradient) iteration.  `tolerance` bounds the relative
    residual and defaults to the square root of the machine epsilon, because the value is quadratically
    more accurate.  Not converging within `max_iterations` is reported by `converged`, never hidden.

    `eta` is differentiable once in the features and in `sampling`, also where eigenvalues of H coincide:
    by the envelope theorem, the gradient is that of the quotient at the minimising Σ.  jit and vmap work.
    Raises ValueError if `features` is not a matrix, or (when concrete) holds a value that is not finite.
    """
    a = as_features(features)
    if a.shape[0] < a.shape[1]:
        return stability_threshold_from_gram(
            dot(a, a.T) / a.shape[0], sampling, tolerance=tolerance, max_iterations=max_iterations
        )
    return _threshold(a, sampling, tolerance, max_iterations, False)


def stability_threshold_from_gram(
    gram: Float[ArrayLike, "n n"],
    sampling: Sampling,
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Threshold:
    """η* from the Gram matrix K = AAᵀ/n alone, O(n³) per iteration; everything else as `stability_threshold`.

    The gradient is taken with respect to a symmetric matrix.  Raises ValueError if `gram` is not square
    or (when concrete) holds a value that is not finite.
    """
    return _threshold(as_gram(gram), sampling, tolerance, max_iterations, True)


def worst_second_moment(
    features: Float[ArrayLike, "n p"],
    sampling: Sampling,
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Float[Array, "p p"]:
    """The Σ that attains the minimum (*), of trace one: the second moment that neither grows nor shrinks at η*.

    Positive semi-definite up to the tolerance.  Arguments as for `stability_threshold`; holds p² numbers.
    """
    a = as_features(features)
    n, p = a.shape
    matrix = a if p <= n else dot(a, a.T) / n
    co, sigma, _ = _solve(matrix, _weights(sampling, a.dtype), _tolerance(tolerance, a.dtype), max_iterations, p > n)
    basis = dot(a.T, co.a) * jnp.where(co.keep, 1 / (n * jnp.where(co.keep, co.lam, 1)), 0)
    worst = dot(dot(basis, sigma), basis.T)
    return worst / jnp.trace(worst)


class _Solution(NamedTuple):
    coordinates: Coordinates
    sigma: Float[Array, "r r"]
    threshold: Threshold


class _State(NamedTuple):
    """Search directions (current, preconditioned residual, previous) and their images under D."""

    y: Float[Array, "3 r r"]
    dy: Float[Array, "3 r r"]
    iterations: Int[Array, ""]
    residual: Float[Array, ""]


@partial(jax.jit, static_argnames=("max_iterations", "from_gram"))
def _solve(
    matrix: Float[Array, "n m"],
    sampling: Sampling,
    tolerance: ArrayLike,
    max_iterations: int,
    from_gram: bool,
) -> _Solution:
    """Largest eigenvalue κ = 2/η* of C^{-1/2} D C^{-1/2} on symmetric matrices Y = C^{1/2} Σ.

    In eigen-coordinates C is the entrywise product with c_kl = (λ_k + λ_l)/2, so that the operator is
    mean·h∘Y + noise·(...), h_kl = λ_k λ_l / c_kl.  Its first part is diagonal; κ - mean·h is therefore a
    positive preconditioner, and applying it to the residual gives the power step of N(η) at η = 2/κ.
    """
    co = coordinates_of_gram(matrix) if from_gram else coordinates_of_features(matrix)
    n = co.a.shape[0]
    mean, noise = sampling
    tiny = jnp.finfo(co.a.dtype).tiny
    c = jnp.where(co.mask > 0, jnp.add.outer(co.lam, co.lam) / 2, 1)
    shrink = co.mask / jnp.sqrt(c)
    h = jnp.outer(co.lam, co.lam) / c

    def apply(y: Float[Array, "r r"]) -> Float[Array, "r r"]:
        s = quadratic_forms(co.a, y * shrink)
        return mean * h * y + noise / n * shrink * dot(co.a.T * s, co.a)

    gd_kappa = (mean + noise) * co.lam[-1]  # κ is at least this (Σ = vvᵀ), so the preconditioner is positive
    gap_floor = jnp.finfo(co.a.dtype).eps * gd_kappa + tiny

    def residual_of(y: Float[Array, "r r"], dy: Float[Array, "r r"]) -> tuple[Array, Array]:
        kappa = jnp.vdot(y, dy, precision=HIGHEST)
        return kappa, dy - kappa * y

    def step(state: _State) -> _State:
        y, p, dp = state.y[0], state.y[2], state.dy[2]
        kappa, res = residual_of(y, state.dy[0])
        w = res / jnp.maximum(jnp.maximum(kappa, gd_kappa) - mean * h, gap_floor)
        w, _ = _orthonormal(w, w, [(y, y)])
        w, _ = _orthonormal(w, w, [(y, y)])
        dw = apply(w)
        p, dp = _orthonormal(p, dp, [(y, state.dy[0]), (w, dw)])
        basis, images = jnp.stack([y, w, p]), jnp.stack([state.dy[0], dw, dp])
        ritz = jnp.einsum("ikl,jkl->ij", basis, images, precision=HIGHEST)
        z = jnp.linalg.eigh((ritz + ritz.T) / 2)[1][:, -1]
        move = z.at[0].set(0)
        combine = jnp.stack([z, move, move])
        y_new, dy_new = (jnp.einsum("ji,ikl->jkl", combine, x, precision=HIGHEST) for x in (basis, images))
        scale = jnp.linalg.norm(y_new[0])
        y_new, dy_new = y_new.at[0].divide(scale), dy_new.at[0].divide(scale)
        kappa, res = residual_of(y_new[0], dy_new[0])
        return _State(y_new, dy_new, state.iterations + 1, jnp.linalg.norm(res) / (kappa + tiny))

    def unfinished(state: _State) -> Array:
        return (state.residual > tolerance) & (state.iterations < max_iterations)

    # Σ = I: it meets every positive semi-definite minimiser, so the iteration cannot miss it.
    y = jnp.diag(jnp.sqrt(co.lam)) / jnp.sqrt(co.lam.sum() + tiny)
    dy = apply(y)
    kappa, res = residual_of(y, dy)
    zero = jnp.zeros_like(y)
    start = _State(
        jnp.stack([y, zero, zero]),
        jnp.stack([dy, zero, zero]),
        jnp.asarray(0, jnp.int32),
        jnp.linalg.norm(res) / (kappa + tiny),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    y = end.y[0]
    sigma = y * shrink * jnp.sign(jnp.trace(y))
    kappa = jnp.vdot(y, apply(y), precision=HIGHEST)  # afresh: the stored images carry the rounding of all steps
    eta = jnp.minimum(2 * jnp.vdot(y, y, precision=HIGHEST) / jnp.where(kappa == 0, 1, kappa), 2 / gd_kappa)
    eta = jnp.where(kappa == 0, jnp.inf, eta)
    lower = _lower_bound(co, sigma, eta, mean, noise, 10 * tolerance)
    threshold = Threshold(eta, lower, end.iterations, end.residual <= tolerance, end.residual)
    return _Solution(co, sigma, threshold)


def _orthonormal(
    x: Float[Array, "r r"], image: Float[Array, "r r"], basis: list[tuple[Array, Array]]
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """`x` made orthogonal to the basis and of norm one, `image` moved along; zero stays zero."""
    for b, b_image in basis:
        along = jnp.vdot(b, x, precision=HIGHEST)
        x, image = x - along * b, image - along * b_image
    size = jnp.linalg.norm(x)
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    return x * inverse, image * inverse


def _lower_bound(
    co: Coordinates,
    sigma: Float[Array, "r r"],
    eta: Float[Array, ""],
    mean: ArrayLike,
    noise: ArrayLike,
    tolerance: ArrayLike,
) -> Float[Array, ""]:
    """Collatz-Wielandt: λmax(N(η)) <= s := max_i (Nv)_i / v_i for every positive v.

    N has a power series in η with non-negative coefficients, starting with η¹; so N(η/s) <= N(η)/s for
    s >= 1, and SGD is stable at η/max(s, 1).  Samples without gradient (a_i = 0) have no part in N.
    """
    poles = resolvent(co, eta, mean)  # zero only for noise = 0, where N = 0
    weight = eta * noise / co.a.shape[0] * jnp.where(poles > 0, co.mask / jnp.where(poles > 0, poles, 1), 0)
    active = jnp.square(co.a).sum(1) > 0

    def apply_n(v: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.where(active, quadratic_forms(co.a, weight * dot(co.a.T * v, co.a)), 0)

    def ratio(v: Float[Array, " n"], nv: Float[Array, " n"]) -> Float[Array, ""]:
        return jnp.where(active, nv / jnp.where(v > 0, v, 1), 0).max()

    def power_step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, v, count = state
        return v, apply_n(v), count + 1

    def loose(state: tuple[Array, Array, Array]) -> Array:
        return (ratio(*state[:2]) > 1 + tolerance) & (state[2] < _CERTIFICATE_STEPS)

    # Every positive v is valid; the floor makes it so.  The residual leaves the same error in all entries;
    # power steps, under which the ratio never rises, give the small ones the relative accuracy of the large.
    v = quadratic_forms(co.a, sigma)
    v = jnp.where(active, jnp.maximum(v, jnp.finfo(v.dtype).eps * v.max()), 0)
    v, nv, _ = jax.lax.while_loop(loose, power_step, (v, apply_n(v), jnp.asarray(0, jnp.int32)))
    return eta / jnp.maximum(ratio(v, nv), 1)


def _threshold(
    matrix: Float[Array, "n m"],
    sampling: Sampling,
    tolerance: float | None,
    max_iterations: int,
    from_gram: bool,
) -> Threshold:
    weights = _weights(sampling, matrix.dtype)
    fixed = jax.lax.stop_gradient((matrix, weights, _tolerance(tolerance, matrix.dtype)))
    co, sigma, threshold = _solve(*fixed, max_iterations, from_gram)
    return threshold._replace(eta=_differentiable_eta(from_gram, (matrix, weights), co, sigma, threshold.eta))


def _weights(sampling: Sampling, dtype: DTypeLike) -> Sampling:
    return Sampling(*(jnp.asarray(weight, dtype) for weight in sampling))


def _tolerance(tolerance: float | None, dtype: DTypeLike) -> ArrayLike:
    return jnp.sqrt(jnp.finfo(dtype).eps) if tolerance is None else tolerance


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_eta(
    from_gram: bool, inputs: tuple[Array, Sampling], co: Coordinates, sigma: Float[Array, "r r"], eta: Array
) -> Float[Array, ""]:
    return eta


@_differentiable_eta.defjvp
def _envelope(from_gram: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """d η* is the differential of the quotient (*) at the fixed minimiser; eigh is not differentiated."""
    inputs, co, sigma, eta = primals
    co, sigma = _first_order_only(inputs, (co, sigma))
    (_, sampling), (d_matrix, d_sampling) = inputs, tangents[0]
    da = dot(d_matrix, co.basis)
    if from_gram:
        # Features that move K by d_matrix: dA = (dK - P dK/2) K⁺ A, P the projector on range(K).
        da = da - dot(jnp.where(co.keep, co.basis, 0), dot(co.basis.T, da)) / 2
        da = da * jnp.where(co.keep, jnp.sqrt(co.a.shape[0] / jnp.where(co.keep, co.lam, 1)), 0)
    _, d_eta = jax.jvp(lambda a, weights: quotient(a, sigma, *weights), (co.a, sampling), (da, d_sampling))
    return eta, d_eta


@jax.custom_jvp
def _first_order_only(inputs: Any, value: Any) -> Any:
    return value


@_first_order_only.defjvp
def _no_second_order(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    raise NotImplementedError(
        "stability_threshold has first derivatives only (the second needs that of the minimising Σ); "
        "for small p differentiate threshold_vec"
    )
