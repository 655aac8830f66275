"""Masked five- and seven-point stencils, and the coarse ones that a multigrid hierarchy makes of them.

A u at cell i is d_i u_i - Σ w_ij u_j over the neighbours j of i.  Where the diagonal d is zero there is no unknown: u is taken
to be zero there, and so is the result.  One pass over memory: the diagonal of a plain Laplacian is a count, and is kept as an
int8, so that a float32 application reads and writes nine bytes a cell.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num


class Stencil(eqx.Module):
    """diagonal   zero where there is no unknown
    links      one array per axis: the weight of the link of each cell to the one before it along that axis, zero unless
               both have unknowns; None where all links of an axis are alike
    stiffness  in that case the weight of the links, per axis; static
    """

    diagonal: Num[Array, "*grid"]
    links: tuple[Float[Array, "*grid"], ...] | None
    stiffness: tuple[float, ...] = eqx.field(static=True, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.diagonal.shape

    @property
    def unknown(self) -> Array:
        """Bool[*grid]: the cells with an unknown."""
        return self.diagonal > 0

    def __call__(self, u: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        """A u; values of u outside the unknowns do not matter."""
        return apply(self, jnp.where(self.unknown, u, 0))


def apply(a: Stencil, u: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
    """A u of a u that is zero outside the unknowns."""
    return jnp.where(a.unknown, a.diagonal.astype(u.dtype) * u - neighbours(a, u), 0)


def neighbours(a: Stencil, u: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
    """Σ_j w_ij u_j, also at cells without an unknown, where it means nothing."""
    total = jnp.zeros((), u.dtype)
    if a.links is None:
        for axis, k in enumerate(a.stiffness):
            both = shifted(u, axis, 1) + shifted(u, axis, -1)
            total = total + (both if k == 1.0 else k * both)
        return total
    for axis, w in enumerate(a.links):
        w = w.astype(u.dtype)
        total = total + w * shifted(u, axis, 1) + shifted(w * u, axis, -1)
    return total


def residual(a: Stencil, u: np.ndarray, b: np.ndarray) -> np.ndarray:
    """b - A u in float64 on the host, whatever JAX computes in; zero outside the unknowns."""
    unknown = np.asarray(a.diagonal) > 0
    u, rest = np.where(unknown, u, 0).astype(np.float64), np.where(unknown, b, 0).astype(np.float64)
    rest -= np.asarray(a.diagonal, np.float64) * u
    for axis in range(u.ndim):
        before, behind = ((slice(None),) * axis + (s,) for s in (slice(None, -1), slice(1, None)))
        w = a.stiffness[axis] if a.links is None else np.asarray(a.links[axis], np.float64)[behind]
        rest[behind] += w * u[before]
        rest[before] += w * u[behind]
    return np.where(unknown, rest, 0)


def shifted(u: Array, axis: int, by: int) -> Array:
    """u moved along the axis by 1 or -1 cells, with zeros moved in."""
    padding = [(0, 0, 0)] * u.ndim
    padding[axis] = (by, -by, 0)
    return lax.pad(u, jnp.zeros((), u.dtype), padding)


def inverse_diagonal(a: Stencil, dtype: DTypeLike) -> Float[Array, "*grid"]:
    """1/d, and 0 where there is no unknown."""
    d = a.diagonal.astype(dtype)
    return jnp.where(a.unknown, 1 / jnp.where(a.unknown, d, 1), 0)


def factors(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many cells of each axis make one of the next coarser grid: 2, or 1 for axes that are short already."""
    return tuple(2 if n > 2 else 1 for n in shape)


def aggregated(x: Array, by: tuple[int, ...]) -> Array:
    """Sums over blocks of cells; the grid is filled up with zeros to whole blocks."""
    # By a window and not by reshaping: XLA would fuse that sum with what computes x, and then takes five times as long.
    return lax.reduce_window(x, 0.0, lax.add, by, by, [(0, -n % f) for n, f in zip(x.shape, by, strict=True)])


def repeated(x: Array, by: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The value of a block at each of its cells: the transpose of `aggregated`."""
    spread = [k for n, f in zip(x.shape, by, strict=True) for k in (n, f)]
    wide = jnp.broadcast_to(x.reshape([k for n in x.shape for k in (n, 1)]), spread)
    wide = wide.reshape([n * f for n, f in zip(x.shape, by, strict=True)])
    return wide[tuple(slice(0, n) for n in shape)]


def coarsened(a: Stencil, dtype: DTypeLike) -> Stencil:
    """The stencil on blocks of two cells per axis.

    Unsmoothed aggregation, P'AP, with each link divided by the ratio of the distances that it spans: a link that is not
    halved would be twice as stiff as the operator that it stands for, at every level.
    """
    by = factors(a.shape)
    mask = a.unknown.astype(dtype)
    if a.links is None:
        links = tuple(k * mask * shifted(mask, axis, 1) for axis, k in enumerate(a.stiffness))
    else:
        links = tuple(w.astype(dtype) for w in a.links)
    both = sum(w + shifted(w, axis, -1) for axis, w in enumerate(links))
    dirichlet = aggregated(jnp.where(a.unknown, a.diagonal.astype(dtype) - both, 0), by)
    diagonal = dirichlet / max(by)
    weights = []
    for axis, w in enumerate(links):
        first = (jnp.arange(w.shape[axis]) % by[axis]) == 0  # links that cross from one block to the next
        crossing = jnp.where(jnp.expand_dims(first, [k for k in range(w.ndim) if k != axis]), w, 0)
        coarse = aggregated(crossing, by) / by[axis]
        weights.append(coarse)
        diagonal = diagonal + coarse + shifted(coarse, axis, -1)
    # What is left of a difference of equal numbers is no unknown.
    return Stencil(jnp.where(diagonal > 1e-6 * diagonal.max(), diagonal, 0), tuple(weights))


def dense(a: Stencil, dtype: DTypeLike) -> Float[Array, "n n"]:
    """The matrix on all cells, in row-major order; for small grids."""
    n = math.prod(a.shape)
    columns = jax.vmap(lambda e: apply(a, jnp.where(a.unknown, e.reshape(a.shape), 0)).reshape(-1))
    return columns(jnp.eye(n, dtype=dtype)).T
