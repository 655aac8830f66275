"""What the iterative solvers take for a linear operator, and the checks of a system before the work starts.

An operator, a direction or a preconditioner is a function v -> Av on arrays of one shape (a grid, say), a callable pytree such
as an equinox module, a dense (n, n) array, a SciPy sparse matrix or a lineax operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.tree_util import Partial
from jaxtyping import Array, Float

from solvers.stencil import Stencil, residual

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 products on a GPU would break conjugacy at the third digit
ROUNDINGS = 4
"""What is below so many units of rounding of its natural size counts as zero; the least `rtol` is as many."""

Operator = Callable[[Array], Array]


def dot(u: Array, v: Array) -> Array:
    """Σ u v.

    Added up in turn, as a CPU would, a million products lose two digits of float32: in parts, then.  And as a contraction: a
    sum of products XLA would fuse with the stencil that computes v, element by element, which takes ten times as long.
    """
    if u.ndim < 2:
        return jnp.vdot(u, v, precision=HIGHEST) if u.dtype == jnp.float64 else jnp.sum(u * v)
    return jax.lax.platform_dependent(u, v, cpu=_contracted, default=lambda u, v: jnp.sum(u * v))


def _contracted(u: Array, v: Array) -> Array:
    """The trace of a product of matrices of eight rows, which is as fast as memory although it computes eight times too much."""
    if u.size % 8:
        return jnp.sum(jnp.einsum("...i,...i->...", u, v, precision=HIGHEST))
    return jnp.trace(jnp.matmul(u.reshape(8, -1), v.reshape(8, -1).T, precision=HIGHEST))


def euclidean(u: Array) -> Array:
    return jnp.sqrt(dot(u, u))


class System(NamedTuple):
    """What the caller gave, checked; `matrix` is A on the host side, or None if A is a function or traced."""

    caller: str
    operator: Operator
    matrix: Any
    b: Array
    x0: Array | None
    rtol: Array
    atol: Array
    share: float  # of the tolerances, for the run itself: a residual in 32 bits is not exact, the last one will be


def checked(caller: str, A: Any, b: Any, x0: Any, rtol: float | Array, atol: float | Array, max_steps: int) -> System:
    at_least(caller, "max_steps", max_steps, 1)
    b = jnp.asarray(b)
    dtype = jnp.result_type(b.dtype, *(jnp.asarray(v).dtype for v in (x0,) if v is not None))
    if _is_dense(A) or scipy.sparse.issparse(A):
        dtype = jnp.result_type(dtype, jax.dtypes.canonicalize_dtype(A.dtype))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{caller}: the system is of dtype {dtype}, expected real numbers")
    dtype = jnp.promote_types(dtype, jnp.float16) if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    b = b.astype(dtype)
    if b.size == 0:
        raise ValueError(f"{caller}: b has shape {b.shape}, expected at least one entry")
    if x0 is not None:
        x0 = jnp.asarray(x0).astype(dtype)
        if x0.shape != b.shape:
            raise ValueError(f"{caller}: x0 has shape {x0.shape}, expected that of b, {b.shape}")
    least = ROUNDINGS * float(jnp.finfo(dtype).eps)
    if not (isinstance(rtol, jax.core.Tracer) or rtol > 0):
        raise ValueError(f"{caller}: rtol is {rtol}, expected a positive number")
    if not (isinstance(rtol, jax.core.Tracer) or rtol >= least):
        raise ValueError(
            f"{caller}: rtol is {rtol:g}, which {dtype} does not reach (at least {least:.2g}, and that only of a well "
            "conditioned A); ask for less, or give b in float64 with 64-bit JAX"
        )
    if not (isinstance(atol, jax.core.Tracer) or atol >= 0):
        raise ValueError(f"{caller}: atol is {atol}, expected a number >= 0")
    operator, matrix = as_operator(caller, "A", A, b)
    if matrix is not None and not isinstance(matrix, Stencil):
        _check_matrix(caller, matrix)
    share = 0.5 if matrix is not None and dtype != jnp.float64 and not isinstance(b, jax.core.Tracer) else 1.0
    tolerances = jnp.asarray(rtol * share, dtype), jnp.asarray(atol * share, dtype)
    return System(caller, operator, matrix, b, x0, *tolerances, share)


def at_least(caller: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{caller}: {name} is {value!r}, expected an integer >= {least}")


def _is_dense(A: Any) -> bool:
    return isinstance(A, jax.Array | np.ndarray)


def _dense_product(matrix: Array, v: Array) -> Array:
    return jnp.matmul(matrix, v, precision=HIGHEST)


def _sparse_product(rows: Array, columns: Array, entries: Array, v: Array) -> Array:
    return jax.ops.segment_sum(entries * v[columns], rows, v.size, indices_are_sorted=True)


def _lineax_product(operator: Any, v: Array) -> Array:
    return operator.mv(v)


def as_operator(caller: str, name: str, A: Any, b: Array) -> tuple[Operator, Any]:
    """`A` as a callable pytree, and `A` itself if it has known entries: a matrix or a stencil that is not traced."""
    matrix = None
    if _is_dense(A) or scipy.sparse.issparse(A):
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"{caller}: {name} has shape {A.shape}, expected a square matrix")
        if b.shape != (A.shape[0],):
            raise ValueError(
                f"{caller}: b has shape {b.shape}, expected ({A.shape[0]},) for {name} of shape {A.shape}; for many "
                "right-hand sides use jax.vmap, and for a grid give the operator as a function"
            )
        matrix = None if isinstance(A, jax.core.Tracer) else A
        if scipy.sparse.issparse(A):
            coo = A.tocsr().tocoo()
            parts = (jnp.asarray(coo.row), jnp.asarray(coo.col), jnp.asarray(coo.data, b.dtype))
            return Partial(_sparse_product, *parts), matrix
        return Partial(_dense_product, jnp.asarray(A, b.dtype)), matrix
    if hasattr(A, "mv") and hasattr(A, "in_structure"):
        A = Partial(_lineax_product, A)
    if not callable(A):
        raise TypeError(
            f"{caller}: {name} is of type {type(A).__name__}, expected a function v -> {name} v, a dense array, a SciPy "
            "sparse matrix or a lineax operator"
        )
    if isinstance(A, Stencil) and not isinstance(A.diagonal, jax.core.Tracer):
        matrix = A
    return A, matrix


def check_shape(caller: str, name: str, operator: Operator, b: Array) -> None:
    """Raise ValueError unless the operator maps b to an array of its shape.  To be called where it is traced anyway."""
    image = jax.eval_shape(lambda v: operator(v), b)
    if getattr(image, "shape", None) != b.shape:
        raise ValueError(
            f"{caller}: {name} maps shape {b.shape} to {getattr(image, 'shape', type(image).__name__)}, expected the same "
            "shape; for many right-hand sides use jax.vmap"
        )


def exact_residual(A: Any, b: Array, x: Array) -> Float[np.ndarray, "*shape"]:
    """b - A x in float64, on the host, for a dense or sparse matrix or a stencil."""
    if isinstance(A, Stencil):
        return residual(A, np.asarray(x), np.asarray(b))
    A = A.astype(np.float64) if scipy.sparse.issparse(A) else np.asarray(A, np.float64)
    return np.asarray(b, np.float64) - A @ np.asarray(x, np.float64)


def _check_matrix(caller: str, A: Any) -> None:
    """Symmetry, and what of positive semi-definiteness can be seen in single entries: A_ij² <= A_ii A_jj."""
    size, diagonal = float(abs(A).max()), np.asarray(A.diagonal(), float)
    if not np.isfinite(size):
        raise ValueError(f"{caller}: A has entries that are not finite, expected none")
    rounding = 100 * float(jnp.finfo(A.dtype).eps if jnp.issubdtype(A.dtype, jnp.floating) else 0) * size
    skew = float(abs(A - A.T).max())
    if skew > rounding:
        raise ValueError(
            f"{caller}: A is not symmetric: A - Aᵀ has an entry of size {skew:.3g}, A of at most {size:.3g}; expected a "
            "symmetric positive semi-definite matrix"
        )
    if diagonal.min() < -rounding:
        i = int(diagonal.argmin())
        raise ValueError(f"{caller}: A is not positive semi-definite: A[{i}, {i}] = {diagonal[i]:.3g} is negative")
    root = np.sqrt(np.maximum(diagonal, 0))
    if scipy.sparse.issparse(A):
        coo = A.tocoo()
        excess = np.abs(coo.data) - root[coo.row] * root[coo.col]
        worst = int(excess.argmax()) if excess.size else 0
        i, j, most = (coo.row[worst], coo.col[worst], excess[worst]) if excess.size else (0, 0, 0.0)
    else:
        root = root.astype(A.dtype)
        excess = abs(A) - root[:, None] * root
        i, j = divmod(int(excess.argmax()), A.shape[0])
        most = float(excess[i, j])
    if most > rounding:
        raise ValueError(
            f"{caller}: A is not positive semi-definite: |A[{i}, {j}]| is larger than the root of A[{i}, {i}] A[{j}, {j}]"
        )


def check_linear(m: Operator, b: Array) -> None:
    """Raise unless M behaves linearly and symmetrically on b and on a fixed other vector."""
    size, bent, skew, energy_b, energy_v = map(float, _tried(m, b))
    tiny = float(jnp.finfo(b.dtype).tiny)
    bent, skew = bent / max(size, tiny), skew / max(size, tiny)
    # Half of the digits of float32, in which a preconditioner may work inside a float64 iteration; what is meant to be caught
    # is at 1e-2.
    if max(bent, skew) > float(jnp.sqrt(jnp.finfo(jnp.float32).eps)):
        what = "linear" if bent >= skew else "symmetric"
        raise ValueError(
            f"conjugate_gradient: M is not {what} (relative difference {max(bent, skew):.2g}), expected a linear symmetric "
            "positive definite preconditioner; for any other use solve(A, b, direction=M)"
        )
    if energy_v <= 0 or (energy_b <= 0 and bool(jnp.any(b != 0))):
        raise ValueError("conjugate_gradient: M is not positive definite: uᵀMu <= 0 for a vector u")


@eqx.filter_jit
def _tried(m: Operator, b: Array) -> tuple[Array, ...]:
    u = b / jnp.maximum(euclidean(b), jnp.finfo(b.dtype).tiny)
    v = jnp.cos(1.0 + jnp.arange(b.size, dtype=b.dtype)).reshape(b.shape) / np.sqrt(b.size)
    mu, mv, both = jax.lax.map(m, jnp.stack([u, v, u - 2 * v]))  # in a loop: compiled once
    size = jnp.maximum(euclidean(mu), euclidean(mv))
    bent, skew = euclidean(both - mu + 2 * mv), jnp.abs(dot(u, mv) - dot(v, mu))
    return size, bent, skew, dot(u, mu), dot(v, mv)
