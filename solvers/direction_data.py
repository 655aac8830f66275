"""Training data of the deep conjugate direction method: residuals made of approximate eigenvectors of one matrix.

A is any function v -> A v on grids, symmetric and positive semi-definite; nothing else of it is needed.

    lanczos, ritz_vectors     approximate eigenvectors of A
    training_set              the paper's data: random combinations of Ritz vectors, weighted to the lowest
    training_pairs            the same with the solution, r = A x, from as few Ritz vectors as memory allows
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key

from solvers.direction_network import Operator


class Lanczos(NamedTuple):
    """The first m orthonormal vectors of a Krylov space, in which A is the tridiagonal matrix (diagonal, off_diagonal).

    basis         (m, *grid), zero from `steps` on
    diagonal      (m,)
    off_diagonal  (m - 1,)
    steps         int32, m, or less if the space is exhausted
    """

    basis: Float[Array, "m ..."]
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m-1"]
    steps: Int[Array, ""]


class Ritz(NamedTuple):
    """Ritz values (m,), ascending, and vectors (m, *grid) of norm 1 (0 for values that stand for nothing, which are 0)."""

    values: Float[Array, " m"]
    vectors: Float[Array, "m ..."]


class Examples(NamedTuple):
    """Residuals r of norm 1 and the x with A x = r, both (count, *grid)."""

    r: Float[Array, "count ..."]
    x: Float[Array, "count ..."]


def lanczos(operator: Operator, start: Float[ArrayLike, "..."], steps: int) -> Lanczos:
    """Lanczos' recurrence from `start` with full re-orthogonalisation, in the dtype of `start`, as one scan.

    Every vector is made orthogonal to all before it, twice: 4·steps²·n multiplications and additions for n cells, which is what
    it costs, and a basis of steps·n numbers.  The paper takes 10 000 steps from the normalised A z, z normal.
    Raises ValueError if `steps` < 1 or the operator changes the shape.
    """
    start = jnp.asarray(start)
    if steps < 1:
        raise ValueError(f"lanczos: steps is {steps}; expected at least 1")
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise TypeError(f"lanczos: start has type {start.dtype}; expected a floating type")
    image = jax.eval_shape(operator, start)
    if image.shape != start.shape:
        raise ValueError(f"lanczos: the operator makes {image.shape} of {start.shape}; expected the same shape")
    rounding = 10 * jnp.finfo(start.dtype).eps

    def step(carry: Any, j: Array) -> tuple[Any, tuple[Array, Array]]:
        basis, before, q, link, size, count = carry
        w = operator(q.reshape(start.shape)).astype(start.dtype).ravel()
        diagonal = _dot(q, w)
        w = w - diagonal * q - link * before
        for _ in range(2):  # once leaves what cancellation has magnified
            w = w - _dot(_dot(basis, w), basis)
            w = w - _dot(q, w) * q
        basis = basis.at[j].set(q)  # after its last use, so that it is not copied
        norm = jnp.sqrt(_dot(w, w))
        size = jnp.maximum(size, jnp.abs(diagonal) + norm)  # of A, as far as seen
        ended = norm <= rounding * size
        link = jnp.where(ended, 0, norm)
        following = jnp.where(ended, 0, w / jnp.where(ended, 1, norm))
        return (basis, q, following, link, size, count + (_dot(q, q) > 0)), (diagonal, link)

    length = jnp.linalg.norm(start)
    first = jnp.where(length > 0, start.ravel() / jnp.where(length > 0, length, 1), 0)
    zero = jnp.zeros((), start.dtype)
    carry = (jnp.zeros((steps, start.size), start.dtype), jnp.zeros_like(first), first, zero, zero, jnp.int32(0))
    (basis, *_, count), (diagonal, links) = lax.scan(step, carry, jnp.arange(steps))
    return Lanczos(basis.reshape(steps, *start.shape), diagonal, links[:-1], count)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def ritz_vectors(krylov: Lanczos) -> Ritz:
    """Eigenvalues of the tridiagonal matrix, and its eigenvectors as grids."""
    off = krylov.off_diagonal
    values, vectors = jnp.linalg.eigh(jnp.diag(krylov.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    m = len(values)
    grids = _dot(vectors.T, krylov.basis.reshape(m, -1))
    return Ritz(values, grids.reshape(krylov.basis.shape))


def training_set(
    key: Key[Array, ""],
    count: int,
    ritz: Ritz,
    *,
    low: int | None = None,
    boost: float = 9.0,
    null: float | None = None,
) -> Float[Array, "count ..."]:
    """The paper's residuals: Σ c_j q_j over the Ritz vectors, of norm 1, as (count, *grid).

    c_j is standard normal, times `boost` for the `low` lowest Ritz values (by default half of the m, and m/20 more; the paper
    takes 5500 of 10 000).  Values below `null` times the largest are dropped before the lowest are counted; it is 1e-8 by
    default, or 16 roundings if that is more.
    """
    return _normalized(_combine(_coefficients(key, count, ritz, low, boost, null)[0], ritz))[0]


def training_pairs(
    key: Key[Array, ""],
    count: int,
    ritz: Ritz,
    operator: Operator,
    *,
    low: int | None = None,
    boost: float = 9.0,
    null: float | None = None,
) -> Examples:
    """x = Σ (c_j/θ_j) q_j and r = A x, scaled to |r| = 1; the coefficients are those of `training_set`.

    r and x belong together however inaccurate the Ritz vectors are, so that a few of them (rather than the paper's 10 000) do.
    """
    c, keep = _coefficients(key, count, ritz, low, boost, null)
    x = _combine(c / jnp.where(keep, ritz.values, 1), ritz)
    r, norms = _normalized(jax.vmap(operator)(x))
    return Examples(r, x / norms)


def _coefficients(
    key: Array, count: int, ritz: Ritz, low: int | None, boost: float, null: float | None
) -> tuple[Array, Array]:
    m = len(ritz.values)
    low = m // 2 + m // 20 if low is None else low
    if count < 1 or not 0 <= low <= m:
        raise ValueError(f"training data: count is {count} and low {low}; expected at least 1, and 0 to {m}")
    dtype = ritz.values.dtype
    null = max(1e-8, 16 * float(jnp.finfo(dtype).eps)) if null is None else null
    keep = ritz.values > null * ritz.values[-1]
    rank = jnp.cumsum(keep) - 1
    scale = jnp.where(keep, jnp.where(rank < low, boost, 1.0), 0.0).astype(dtype)
    return jax.random.normal(key, (count, m), dtype) * scale, keep


def _combine(c: Array, ritz: Ritz) -> Array:
    return _dot(c, ritz.vectors.reshape(len(ritz.values), -1)).reshape(len(c), *ritz.vectors.shape[1:])


def _normalized(rows: Array) -> tuple[Array, Array]:
    norms = jnp.sqrt(jnp.square(rows).sum(tuple(range(1, rows.ndim)), keepdims=True))
    return rows / norms, norms
