"""Bounds of the threshold η*: from sharpness measures, loss alignment and competing criteria."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from theory.sgd_stability.operator import (
    Coordinates,
    Sampling,
    as_features,
    as_gram,
    check_batch,
    coordinates_of_features,
    coordinates_of_gram,
    dot,
)


def alignment_infimum(features: Float[ArrayLike, "n p"]) -> Float[Array, ""]:
    """μ_0, the smallest loss alignment over range(H) of the quadratic with these features (section 3).

    λmin(H^{-1/2} ((1/n) Σ (a_iᵀHa_i) a_i a_iᵀ - H³) H^{-1/2}) / |H|_F².  Non-negative; it can vanish when
    n < p.  Directions whose eigenvalue is of the size of rounding are excluded.
    """
    a = as_features(features)
    if a.shape[0] < a.shape[1]:
        return alignment_infimum_from_gram(dot(a, a.T) / a.shape[0])
    return _alignment_infimum(coordinates_of_features(a))


def alignment_infimum_from_gram(gram: Float[ArrayLike, "n n"]) -> Float[Array, ""]:
    """μ_0 from the Gram matrix: λmin on range(K) of diag(n (K²)_ii) - K², over |K|_F²."""
    return _alignment_infimum(coordinates_of_gram(as_gram(gram)))


def _alignment_infimum(co: Coordinates) -> Float[Array, ""]:
    white = co.a * jnp.where(co.keep, 1 / jnp.sqrt(jnp.where(co.keep, co.lam, 1)), 0)
    curvature = jnp.square(co.a) @ co.lam  # a_iᵀ H a_i
    matrix = dot(white.T * curvature, white) / co.a.shape[0] - jnp.diag(co.lam**2)
    outside = jnp.where(co.keep, 0, jnp.linalg.norm(matrix) + 1)  # the kernel must not give the minimum
    smallest = jnp.linalg.eigvalsh(matrix + jnp.diag(outside))[0]
    return jnp.maximum(smallest, 0) / jnp.square(co.lam).sum()


class ThresholdBounds(NamedTuple):
    """Bounds of η*; all but the last from above.

    gd             2/λmax(H): gradient descent is stable up to here (T1, T7)
    frobenius      1/(|H|_F √(noise·μ_0)), from the loss alignment (T4)
    trace          2/(noise·Tr H) (T2, T3)
    second_moment  2 Tr H/(mean·|H|_F² + noise·m4), m4 = (1/n) Σ |a_i|⁴: the quotient at Σ = I (T3, T6)
    max_norm       2/((mean + noise)·max |a_i|²), from below (T6)
    """

    gd: Float[Array, ""]
    frobenius: Float[Array, ""]
    trace: Float[Array, ""]
    second_moment: Float[Array, ""]
    max_norm: Float[Array, ""]


def threshold_bounds(gram: Float[ArrayLike, "n n"], sampling: Sampling) -> ThresholdBounds:
    """The bounds of η* that need only K: max_norm <= η* <= second_moment <= trace, and η* <= gd, frobenius.

    Infinite where a bound is empty (noise = 0, or no alignment).  Raises ValueError if `gram` is not square.
    """
    k = as_gram(gram)
    mean, noise = (jnp.asarray(s, k.dtype) for s in sampling)
    norms = jnp.diagonal(k) * k.shape[0]
    trace, square, fourth = jnp.trace(k), jnp.square(k).sum(), jnp.square(norms).mean()
    return ThresholdBounds(
        gd=2 / jnp.linalg.eigvalsh(k)[-1],
        frobenius=1 / jnp.sqrt(square * noise * alignment_infimum_from_gram(k)),
        trace=2 / (noise * trace),
        second_moment=2 * trace / (mean * square + noise * fourth),
        max_norm=2 / ((mean + noise) * norms.max()),
    )


def dexter_threshold(features: Float[ArrayLike, "n p"], batch: int) -> Float[Array, ""]:
    """Rate above which the criterion of Dexter et al. (2024) says that SGD diverges (T16).

    Bernoulli sampling; λmax(H) >= 2/η or λmax(H) > (σ/η) (n/B - 1)^{-1/2}, where σ is
    λmax(|a_iᵀa_j|)/max |a_i|².  Never below η*.  Raises ValueError unless 1 <= batch <= n.
    """
    a = as_features(features)
    n = a.shape[0]
    check_batch("dexter_threshold", batch, n)
    products = dot(a, a.T)
    top = jnp.linalg.eigvalsh(products)[-1] / n
    sigma = jnp.linalg.eigvalsh(jnp.abs(products))[-1] / jnp.diagonal(products).max()
    noisy = sigma / jnp.sqrt(n / batch - 1) if batch < n else jnp.inf
    return jnp.minimum(2.0, noisy) / top
