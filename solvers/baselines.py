"""Classical preconditioners, for comparison and as fallbacks; each goes where ours does.

    pressure, info = poisson.solve(domain, rhs, preconditioner=baselines.incomplete_cholesky(poisson.laplacian(domain)))

Every function takes a stencil and returns a linear, symmetric, positive definite r -> z on its grid, zero where there is no
unknown; plain conjugate gradients have `conjugate_direction.residual`.  `sine_transform` and `tensor_product` take a domain
that is a box, and are exact: one step converges, and called on the right-hand side they are direct solvers.

All run in JAX and may be jitted; the set-up of incomplete Cholesky and of the boxes is NumPy's.  Whatever other factorisation a
library has for `adapters.to_csr(a)` comes in by `adapters.from_scipy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from solvers.adapters import link_weights
from solvers.conjugate_direction import residual
from solvers.multigrid import Preconditioner, chebyshev, hierarchy, preconditioner
from solvers.poisson import AIR, FLUID, SOLID, Domain
from solvers.stencil import Stencil, aggregated, apply, factors, inverse_diagonal, neighbours, repeated, shifted


class Jacobi(eqx.Module):
    """r -> D⁻¹ r."""

    a: Stencil

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        return inverse_diagonal(self.a, r.dtype) * r


def jacobi(a: Stencil) -> Jacobi:
    """Division by the diagonal."""
    return Jacobi(a)


# ---- multigrid ---------------------------------------------------------------------------------------------------------


def chebyshev_multigrid(a: Stencil, dtype: DTypeLike = jnp.float32) -> Preconditioner:
    """Our cycle with Chebyshev step sizes set by hand instead of learned numbers: what learning is compared with."""
    return preconditioner(a, chebyshev(), dtype)


class RedBlack(eqx.Module):
    """r -> z: a V-cycle that smooths by a half sweep of Gauss-Seidel on each colour of a chess board, reversed on the way up."""

    levels: tuple[Stencil, ...]
    inverse: Float[Array, "n n"]

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        start = jnp.where(self.levels[0].unknown, r, 0).astype(self.inverse.dtype)
        return _v_cycle(self.levels, self.inverse, start).astype(r.dtype)


def red_black_multigrid(a: Stencil, dtype: DTypeLike = jnp.float32) -> RedBlack:
    """The textbook V(1,1) cycle: one sweep of red-black Gauss-Seidel before and after, blocks of two cells per axis.

    dtype: in which the cycle is computed.
    """
    h = hierarchy(a, dtype)
    return RedBlack(h.levels, h.inverse)


def _v_cycle(levels: tuple[Stencil, ...], inverse: Array, r: Array) -> Array:
    a = levels[0]
    if len(levels) == 1:
        z = jnp.matmul(inverse, r.reshape(-1), precision=lax.Precision.HIGHEST)
        return jnp.where(a.unknown, z.reshape(r.shape), 0)
    d = inverse_diagonal(a, r.dtype)
    parity = sum(lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in range(r.ndim)) % 2

    # In a loop, as XLA would compute the first colour anew for each neighbour of the second.
    def relax(x: Array, colour: Array) -> tuple[Array, None]:
        return jnp.where(parity == colour, d * (r + neighbours(a, x)), x), None

    x, _ = lax.scan(relax, jnp.zeros_like(r), jnp.array([0, 1]))
    by = factors(a.shape)
    e = _v_cycle(levels[1:], inverse, aggregated(r - apply(a, x), by))
    x = x + jnp.where(a.unknown, repeated(e, by, a.shape), 0)
    return lax.scan(relax, x, jnp.array([1, 0]))[0]


# ---- incomplete Cholesky -----------------------------------------------------------------------------------------------


class IncompleteCholesky(eqx.Module):
    """r -> M⁻¹ r, M = (D + L) D⁻¹ (D + L)' with L the strictly lower triangle of A in row-major order.

    Both triangular solves go from one diagonal plane i + j + k = const to the next, whose cells do not depend on each other; so
    all arrays are kept by planes (`_skewed`).
    """

    inverse: Float[Array, "*planes"]  # 1/D, and 0 where there is no unknown
    links: tuple[Float[Array, "*planes"], ...] | None
    stiffness: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        dtype = self.inverse.dtype
        last = self.inverse.ndim - 2  # the axis that lies across the planes
        constants = tuple(jnp.asarray(k, dtype) for k in self.stiffness)

        def before(y: Array, axis: int) -> Array:
            return y if axis > last else shifted(y, axis, 1)

        def behind(z: Array, axis: int) -> Array:
            return z if axis > last else shifted(z, axis, -1)

        def down(y: Array, plane: Any) -> tuple[Array, Array]:
            r, inverse, links = plane
            weights = constants if links is None else links
            y = inverse * (r + sum(w * before(y, axis) for axis, w in enumerate(weights)))
            return y, y

        def up(carry: Array, plane: Any) -> tuple[Array, Array]:
            y, inverse, links = plane
            z = y + inverse * carry
            weights = constants if links is None else links
            carry = sum((behind(w * z, axis) for axis, w in enumerate(weights)), jnp.zeros_like(z))
            return carry, z

        planes = (_skewed(r.astype(dtype)), self.inverse, self.links)
        start = jnp.zeros_like(planes[0][0])
        _, y = lax.scan(down, start, planes)
        _, z = lax.scan(up, start, (y, self.inverse, self.links), reverse=True)
        return _straight(z).astype(r.dtype)


def incomplete_cholesky(a: Stencil, relaxation: float = 0.0, dtype: DTypeLike = jnp.float32) -> IncompleteCholesky:
    """The factors without fill-in, IC(0) (Meijerink, van der Vorst 1977): D such that M and A have the same diagonal.

    relaxation  share of the dropped fill-in that is taken from the diagonal: 1 for the modified factorisation MIC(0), whose rows
                sum to those of A (Gustafsson 1978); 0.97 is what fluid solvers use
    dtype       in which the factors are applied; they are made in float64 on the host

    Raises ValueError for a relaxation outside [0, 1].
    """
    if not 0 <= relaxation <= 1:
        raise ValueError(f"relaxation: is {relaxation}, expected a number in [0, 1]")
    inverse = np.where(np.asarray(a.unknown), 1 / _pivots(a, relaxation), 0)
    links = None if a.links is None else tuple(_skewed(w.astype(dtype)) for w in a.links)
    return IncompleteCholesky(_skewed(jnp.asarray(inverse, dtype)), links, a.stiffness)


def _skewed(x: Array) -> Array:
    """[i, j, k] -> [i + j + k, i, j], filled up with zeros.  By padding and reshaping, as XLA's gathers are slow."""
    for axis in range(x.ndim - 1):
        rows = jnp.moveaxis(x, axis, -2)
        n, m = rows.shape[-2:]
        flat = jnp.pad(rows, [(0, 0)] * (x.ndim - 1) + [(0, n)]).reshape(*rows.shape[:-2], n * (m + n))
        x = jnp.moveaxis(flat[..., :-n].reshape(*rows.shape[:-2], n, m + n - 1), -2, axis)
    return jnp.moveaxis(x, -1, 0)


def _straight(x: Array) -> Array:
    """The inverse of `_skewed`."""
    x = jnp.moveaxis(x, 0, -1)
    for axis in reversed(range(x.ndim - 1)):
        rows = jnp.moveaxis(x, axis, -2)
        n, m = rows.shape[-2], rows.shape[-1] - rows.shape[-2] + 1
        flat = rows.reshape(*rows.shape[:-2], n * (m + n - 1))
        flat = jnp.pad(flat, [(0, 0)] * (x.ndim - 2) + [(0, n)])
        x = jnp.moveaxis(flat.reshape(*rows.shape[:-2], n, m + n)[..., :m], -2, axis)
    return x


def _pivots(a: Stencil, relaxation: float) -> Float[np.ndarray, "*grid"]:
    """D, one diagonal plane i + j + k = const after the other, as its entries need only those of the plane before."""
    diagonal = np.asarray(a.diagonal, float).reshape(-1)
    links = [np.asarray(w, float) for w in link_weights(a)]
    ahead = np.sum([np.roll(w, -1, axis) for axis, w in enumerate(links)], 0).reshape(
        -1
    )  # a cell's links to those behind it
    links = [w.reshape(-1) for w in links]
    strides = [int(np.prod(a.shape[axis + 1 :])) for axis in range(len(a.shape))]
    plane = np.indices(a.shape).sum(0).reshape(-1)
    cells = np.flatnonzero(diagonal > 0)
    cells = cells[np.argsort(plane[cells], kind="stable")]
    pivots = np.ones_like(diagonal)
    for c in np.split(cells, np.flatnonzero(np.diff(plane[cells])) + 1):
        taken = np.zeros(c.size)
        for w, stride in zip(links, strides, strict=True):
            before = c - stride  # outside the grid where the link is zero
            taken += w[c] * (w[c] + relaxation * (ahead[before] - w[c])) / pivots[before]
        left = diagonal[c] - taken
        # A pivot may vanish in the last cell of a closed region; the diagonal in its place keeps M positive definite.
        pivots[c] = np.where(left > 1e-8 * diagonal[c], left, diagonal[c])
    return pivots.reshape(a.shape)


# ---- direct solvers of a box -------------------------------------------------------------------------------------------


class SineTransform(eqx.Module):
    """r -> A⁻¹ r on a box in air: the eigenvectors of A are products of sines."""

    stiffness: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        x, eigenvalues = r, jnp.zeros((), r.dtype)
        for axis, (n, k) in enumerate(zip(r.shape, self.stiffness, strict=True)):
            x = _sines(x, axis) * (2 / (n + 1))
            values = 2 * k * (1 - np.cos(np.pi * np.arange(1, n + 1) / (n + 1)))
            eigenvalues = eigenvalues + jnp.expand_dims(
                jnp.asarray(values, r.dtype), [i for i in range(r.ndim) if i != axis]
            )
        x = x / eigenvalues
        for axis in range(r.ndim):
            x = _sines(x, axis)
        return x


def sine_transform(domain: Domain) -> SineTransform:
    """The inverse of `laplacian(domain)` for a box of fluid with air on all sides and cells of one size, by fast Fourier
    transforms in the dtype of its argument.

    Raises ValueError for any other domain; `tensor_product` takes walls and widths that vary.
    """
    _check_box("sine_transform", domain)
    for axis, (edges, h) in enumerate(zip(domain.edges, domain.spacing, strict=True)):
        if edges != (AIR, AIR):
            raise ValueError(
                f"domain: beyond axis {axis} lie {edges}, expected air (3, 3) on both sides; tensor_product takes walls"
            )
        if not isinstance(h, float):
            raise ValueError(f"domain: the widths along axis {axis} vary, expected one; tensor_product takes these")
    volume = float(np.prod(domain.spacing))
    return SineTransform(tuple(volume / h**2 for h in domain.spacing))  # type: ignore[operator]


def _sines(x: Array, axis: int) -> Array:
    """Σ_j x_j sin(π j k / (n + 1)), j and k from 1 to n, as the imaginary part of the transform of an odd sequence."""
    n = x.shape[axis]
    edge = jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis))
    odd = jnp.concatenate([edge, x, edge, -jnp.flip(x, axis)], axis)
    return -0.5 * lax.slice_in_dim(jnp.fft.rfft(odd, axis=axis).imag, 1, n + 1, axis=axis)


class TensorProduct(eqx.Module):
    """r -> A⁺ r with A = Σ_axis K_axis ⊗ (the widths W of the other axes), K V = W V Λ and V'WV = 1 on each axis."""

    vectors: tuple[Float[Array, "_ _"], ...]
    values: tuple[Float[Array, " _"], ...]

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        x, eigenvalues = r, jnp.zeros((), r.dtype)
        for axis, (v, values) in enumerate(zip(self.vectors, self.values, strict=True)):
            x = _along(v.T.astype(r.dtype), x, axis)
            eigenvalues = eigenvalues + jnp.expand_dims(values.astype(r.dtype), [i for i in range(r.ndim) if i != axis])
        # Exactly zero only in a closed box, where `tensor_product` writes it so.
        x = jnp.where(eigenvalues > 0, x / jnp.where(eigenvalues > 0, eigenvalues, 1), 0)
        for axis, v in enumerate(self.vectors):
            x = _along(v.astype(r.dtype), x, axis)
        return x


def tensor_product(domain: Domain, dtype: Any = None) -> TensorProduct:
    """The inverse of `laplacian(domain)` for a box of fluid with walls or air on each side and any widths of cells, by a dense
    matrix of eigenvectors for each axis (Lynch, Rice, Thomas 1964); the pseudoinverse, if there are walls all round.

    dtype: of these matrices, None for float64 where enabled, else float32; the work is done in that of the argument.
    Raises ValueError for a domain that is no box.
    """
    _check_box("tensor_product", domain)
    real = jnp.result_type(float) if dtype is None else dtype
    vectors, values = [], []
    for edges, h, n in zip(domain.edges, domain.spacing, domain.shape, strict=True):
        widths = np.broadcast_to(np.asarray(h, float), n)
        around = np.concatenate([widths[:1], widths, widths[-1:]])
        links = 2 / (around[:-1] + around[1:])
        links[[0, -1]] *= [e == AIR for e in edges]
        stiffness = np.diag(links[:-1] + links[1:]) - np.diag(links[1:-1], 1) - np.diag(links[1:-1], -1)
        lam, v = scipy.linalg.eigh(stiffness, np.diag(widths))
        if SOLID == edges[0] == edges[1]:
            lam[0] = 0.0
        vectors.append(jnp.asarray(v, real))
        values.append(jnp.asarray(lam, real))
    return TensorProduct(tuple(vectors), tuple(values))


def _along(matrix: Array, x: Array, axis: int) -> Array:
    return jnp.moveaxis(jnp.tensordot(matrix, x, ((1,), (axis,)), precision=lax.Precision.HIGHEST), 0, axis)


def _check_box(caller: str, domain: Domain) -> None:
    others = np.argwhere(np.asarray(domain.cells) != FLUID)
    if len(others):
        cell = tuple(others[0].tolist())
        code = int(np.asarray(domain.cells)[cell])
        raise ValueError(
            f"{caller}: domain has {len(others)} cells that are not fluid, the first at {cell} with code {code}; expected a "
            "box of FLUID (2)"
        )


PRECONDITIONERS: dict[str, Callable[[Stencil], Callable[[Array], Array]]] = {
    "cg": lambda a: residual,
    "jacobi": jacobi,
    "incomplete_cholesky": incomplete_cholesky,
    "modified_incomplete_cholesky": lambda a: incomplete_cholesky(a, 0.97),
    "red_black_multigrid": red_black_multigrid,
    "chebyshev_multigrid": chebyshev_multigrid,
}
"""By name, what every stencil can have."""
