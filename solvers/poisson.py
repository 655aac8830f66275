"""Pressure Poisson problems on a grid of cells: fluid, solid walls (Neumann) and air (Dirichlet), in two or three dimensions.

    domain = poisson.Domain.from_mask(cells)
    pressure, info = poisson.solve(domain, rhs, rtol=1e-6)

The marker-and-cell discretisation of -∇²p = f, integrated over cells: with unit spacing A is the plain five- or seven-point
matrix, A_ii the number of neighbours that are not solid, A_ij = -1 for two fluid neighbours.  p is zero in the centres of
air cells and has no flux into solid ones.  A region of fluid that touches no air leaves its pressure undetermined up to a
constant: its right-hand side has to sum to zero, and is made to (`Info.removed` says by how much); its pressure has mean zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from solvers import conjugate_direction, multigrid, outcome
from solvers.operators import check_linear
from solvers.stencil import Stencil, apply

SOLID, FLUID, AIR = 1, 2, 3
_NAMES = {SOLID: "SOLID", FLUID: "FLUID", AIR: "AIR"}


class Domain(eqx.Module):
    """Where the fluid is.  Made by `Domain.from_mask`.

    cells    code of every cell: SOLID, FLUID or AIR
    regions  0, or the number (from 1) of the fluid region without air that the cell belongs to
    spacing  per axis the width of a cell, or the widths of all; static
    edges    per axis what lies beyond the first and the last cell; static
    closed   how many regions of fluid touch no air; static
    """

    cells: Int[Array, "*grid"]
    regions: Int[Array, "*grid"]
    spacing: tuple[float | tuple[float, ...], ...] = eqx.field(static=True)
    edges: tuple[tuple[int, int], ...] = eqx.field(static=True)
    closed: int = eqx.field(static=True)

    @staticmethod
    def from_mask(
        cells: Any,
        *,
        spacing: float | Sequence[Any] = 1.0,
        edges: int | Sequence[int | tuple[int, int]] = SOLID,
    ) -> Domain:
        """cells    integer array of codes in two or three dimensions, or booleans: True for fluid, False for solid
        spacing  width of a cell: one number, one per axis, or per axis an array with the width of each cell.  With one number
                 for all the matrix is the plain one times spacing^(dimensions - 2)
        edges    code of what lies beyond the grid: one for all sides, or per axis one or a pair (before, behind)

        Raises ValueError for other codes, dimensions, spacings that are not positive, and if there is no fluid.
        """
        codes = np.asarray(cells)
        if codes.dtype == bool:
            codes = np.where(codes, FLUID, SOLID)
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"cells: dtype is {codes.dtype}, expected integer codes or booleans")
        if codes.ndim not in (2, 3):
            raise ValueError(f"cells: has shape {codes.shape}, expected two or three dimensions")
        if unknown := sorted(set(np.unique(codes).tolist()) - _NAMES.keys()):
            raise ValueError(f"cells: has codes {unknown}, expected SOLID = 1, FLUID = 2, AIR = 3")
        if not (codes == FLUID).any():
            raise ValueError("cells: no cell is FLUID (2)")
        sides = _edges(edges, codes.ndim)
        regions, closed = _closed_regions(codes, sides)
        return Domain(jnp.asarray(codes, jnp.int8), jnp.asarray(regions), _spacing(spacing, codes.shape), sides, closed)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cells.shape

    @property
    def fluid(self) -> Array:
        """Bool[*grid]: the cells that have a pressure."""
        return self.cells == FLUID

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        closed = f", {self.closed} closed region{'s' if self.closed > 1 else ''}" if self.closed else ""
        return f"Domain({size}{closed})"


def _edges(edges: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    given = [edges] * ndim if isinstance(edges, int | np.integer) else list(edges)
    pairs = [(e, e) if isinstance(e, int | np.integer) else tuple(e) for e in given]
    if len(pairs) != ndim or any(len(p) != 2 or any(e not in (SOLID, AIR) for e in p) for p in pairs):
        raise ValueError(f"edges: got {edges}, expected SOLID (1) or AIR (3), for all sides or per axis or as pairs")
    return tuple((int(a), int(b)) for a, b in pairs)


def _spacing(spacing: Any, shape: tuple[int, ...]) -> tuple[float | tuple[float, ...], ...]:
    given = [spacing] * len(shape) if isinstance(spacing, int | float) else list(spacing)
    if len(given) != len(shape):
        raise ValueError(f"spacing: has {len(given)} entries for {len(shape)} axes")
    found: list[float | tuple[float, ...]] = []
    for axis, (h, n) in enumerate(zip(given, shape, strict=True)):
        widths = np.asarray(h, float)
        if widths.shape not in ((), (n,)) or not (np.isfinite(widths) & (widths > 0)).all():
            raise ValueError(f"spacing: axis {axis} has {h}, expected a positive width, or one for each of {n} cells")
        found.append(float(widths) if widths.ndim == 0 else tuple(widths.tolist()))
    return tuple(found)


def _surrounded(cells: np.ndarray, edges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The cells with one layer of what lies beyond around them."""
    for axis, (before, behind) in enumerate(edges):
        pad = [(0, 0)] * cells.ndim
        pad[axis] = (1, 1)
        values = [(0, 0)] * cells.ndim
        values[axis] = (before, behind)
        cells = np.pad(cells, pad, constant_values=values)
    return cells


def _closed_regions(cells: np.ndarray, edges: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, int]:
    labels, n = scipy.ndimage.label(cells == FLUID)
    wide = _surrounded(cells, edges)
    inner = tuple(slice(1, -1) for _ in range(cells.ndim))
    airy = np.zeros(cells.shape, bool)
    for axis in range(cells.ndim):
        for by in (-1, 1):
            airy |= np.roll(wide, by, axis)[inner] == AIR
    open_regions = np.unique(labels[airy & (cells == FLUID)])
    number = np.zeros(n + 1, np.int32)
    closed = [k for k in range(1, n + 1) if k not in set(open_regions.tolist())]
    number[closed] = np.arange(1, len(closed) + 1)
    return number[labels], len(closed)


def laplacian(domain: Domain, dtype: Any = None) -> Stencil:
    """The operator A = -∇² of a domain, integrated over cells: symmetric, positive definite up to closed regions.

    Called with an array on the grid it returns one, zero outside the fluid.  dtype: of its coefficients where spacing makes
    them real numbers, None for float64 where enabled, else float32.
    """
    ndim = domain.cells.ndim
    real = jnp.result_type(float) if dtype is None else dtype
    wide = jnp.pad(domain.fluid, 1)
    codes = padded(domain)
    inner = tuple(slice(1, -1) for _ in range(ndim))

    def beside(x: Array, axis: int, by: int) -> Array:
        return x[(*inner[:axis], slice(1 + by, x.shape[axis] - 1 + by), *inner[axis + 1 :])]

    plain = all(isinstance(h, float) for h in domain.spacing)
    if plain:
        volume = float(np.prod(domain.spacing))
        stiffness = tuple(volume / h**2 for h in domain.spacing)  # type: ignore[operator]
        if len(set(stiffness)) == 1 and stiffness[0] == 1.0:
            count = sum((beside(codes, axis, by) != SOLID).astype(jnp.int8) for axis in range(ndim) for by in (-1, 1))
            return Stencil(jnp.where(domain.fluid, count, 0).astype(jnp.int8), None, stiffness)
        diagonal = sum(stiffness[axis] * (beside(codes, axis, by) != SOLID) for axis in range(ndim) for by in (-1, 1))
        return Stencil(jnp.where(domain.fluid, diagonal, 0).astype(real), None, stiffness)
    diagonal, links = jnp.zeros(domain.shape, real), []
    for axis in range(ndim):
        before, behind = _face_weights(domain, axis)
        between = domain.fluid & beside(wide, axis, -1)
        links.append(jnp.where(between, jnp.asarray(before, real), 0))
        for by, w in ((-1, before), (1, behind)):
            diagonal = diagonal + jnp.where(beside(codes, axis, by) != SOLID, jnp.asarray(w, real), 0)
    return Stencil(jnp.where(domain.fluid, diagonal, 0), tuple(links))


def padded(domain: Domain) -> Int[Array, "*wider"]:
    """The codes of the cells, with one layer of what lies beyond the edges around them."""
    codes = domain.cells
    for axis, (before, behind) in enumerate(domain.edges):
        layer = [1 if k == axis else n for k, n in enumerate(codes.shape)]
        ends = [jnp.full(layer, e, codes.dtype) for e in (before, behind)]
        codes = jnp.concatenate([ends[0], codes, ends[1]], axis)
    return codes


def _face_weights(domain: Domain, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Area over distance of the faces before and behind each cell, broadcastable to the grid."""
    widths = [np.broadcast_to(np.asarray(h, float), n) for h, n in zip(domain.spacing, domain.shape, strict=True)]
    h = widths[axis]
    outer = np.concatenate([h[:1], h, h[-1:]])  # a cell beyond the edge is as wide as the last one
    distance = (outer[:-1] + outer[1:]) / 2
    area = np.ones([1] * len(widths))
    for k, w in enumerate(widths):
        if k != axis:
            area = area * w.reshape([-1 if j == k else 1 for j in range(len(widths))])
    shape = [-1 if j == axis else 1 for j in range(len(widths))]
    return area / distance[:-1].reshape(shape), area / distance[1:].reshape(shape)


def remove_means(domain: Domain, x: Float[Array, "*grid"]) -> tuple[Float[Array, "*grid"], Float[Array, " closed"]]:
    """x with its mean over each closed region taken off, and these means."""
    if not domain.closed:
        return x, jnp.zeros(0, x.dtype)
    flat, labels = x.reshape(-1), domain.regions.reshape(-1)
    sums = jax.ops.segment_sum(flat, labels, domain.closed + 1)[1:]
    counts = jax.ops.segment_sum(jnp.ones_like(flat), labels, domain.closed + 1)[1:]
    means = sums / counts
    return x - jnp.where(domain.regions > 0, jnp.concatenate([jnp.zeros(1, x.dtype), means])[domain.regions], 0), means


def sharded(x: Any, mesh: jax.sharding.Mesh, axis_names: Sequence[str | None]) -> Any:
    """x, a domain or a right-hand side, with its grids split over the devices of a mesh; `solve` then runs on all of these.

    axis_names  per axis of the grid the name of the axis of the mesh that it is split over, or None
    The answer is that of one device up to rounding, and is split in the same way.  Devices exchange one layer of cells per
    product.  Raises ValueError for an axis that does not split evenly.
    """
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis_names))

    def placed(grid: Any) -> Any:
        if not eqx.is_array(grid):
            return grid
        if len(grid.shape) != len(axis_names):
            raise ValueError(f"axis_names: are {list(axis_names)}, expected one for each axis of a grid {grid.shape}")
        for n, name in zip(grid.shape, axis_names, strict=True):
            if name is not None and n % mesh.shape[name]:
                raise ValueError(f"x: {n} cells do not split evenly over the {mesh.shape[name]} devices of {name!r}")
        return jax.device_put(grid, place)

    return jax.tree.map(placed, x)


class Info(NamedTuple):
    """steps, status, residuals, residual, converged   as in `outcome.Info`
    removed   the mean that was taken off the right-hand side in each closed region, relative to ‖rhs‖/√n
    """

    steps: Array | np.ndarray
    status: Array | np.ndarray
    residuals: Array | np.ndarray
    residual: Array | np.ndarray
    converged: Array | np.ndarray
    removed: Float[Array, " closed"]


def solve(
    domain: Domain,
    rhs: Float[ArrayLike, "*grid"],
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    preconditioner: Callable[[Array], Array] | None = None,
    x0: Float[ArrayLike, "*grid"] | None = None,
    max_steps: int = 200,
    throw: bool = False,
) -> tuple[Float[Array, "*grid"], Info]:
    """The pressure p with A p = rhs (`laplacian`), zero outside the fluid, and how it was found.

    Conjugate gradients in the dtype of rhs, preconditioned by one multigrid cycle in float32 (`solvers.multigrid`).

    rhs             on the grid; what it says outside the fluid does not matter.  In closed regions its mean is taken off
    rtol, atol      stop when ‖rhs - A p‖ ≤ max(rtol ‖rhs‖, atol), which is computed afresh before it is said
    preconditioner  r -> z, linear, symmetric and positive definite; None for the multigrid cycle.  One that was made for the
                    same domain before (`multigrid.preconditioner(laplacian(domain))`) saves its set-up
    x0              a first guess
    throw           raise RuntimeError if it did not converge (not under jit, where `Info.status` tells)

    Pure and jit-able; gradients in rhs are those of the exact solution.
    Raises ValueError for a wrong shape, for NaN in the fluid, and for an rtol that rounding puts out of reach: about
    ε n² / 8 on n cells along the longest axis.
    """
    rhs = jnp.asarray(rhs)
    if rhs.shape != domain.shape:
        raise ValueError(f"rhs: has shape {rhs.shape}, the domain {domain.shape}")
    if not jnp.issubdtype(rhs.dtype, jnp.floating):
        raise ValueError(f"rhs: has dtype {rhs.dtype}, expected real numbers")
    reach = float(jnp.finfo(rhs.dtype).eps) * max(domain.shape) ** 2 / 8
    if rtol < reach:
        hint = "; enable x64 and give rhs in float64" if rhs.dtype == jnp.float32 else ""
        raise ValueError(f"rtol: {rtol:g} is below {reach:.1g}, about what {rhs.dtype} reaches on this grid{hint}")
    traced = isinstance(rhs, jax.core.Tracer)
    # A residual in float32 is off by about as much as it can reach; the one in float64 at the end decides.
    share = 1.0 if traced or rhs.dtype == jnp.float64 else max(0.5, 1 - reach / rtol)
    if preconditioner is not None and not traced and not getattr(preconditioner, "symmetric", False):
        check_linear(preconditioner, rhs)
    if isinstance(atol, float | int) and not atol >= 0:
        raise ValueError(f"atol: is {atol}, expected a number >= 0")
    relative, absolute = (jnp.asarray(t * share, rhs.dtype) for t in (rtol, atol))  # arrays: no compilation for each
    p, b, bad, info = _pressure(domain, rhs, x0, preconditioner, relative, absolute, max_steps)
    if not traced:
        if int(bad):
            raise ValueError(f"rhs: has {int(bad)} entries in the fluid that are not finite, expected none")
        if rhs.dtype != jnp.float64:
            info = outcome.in_float64(laplacian(domain), b, p, info, rtol, atol)
        if throw:
            outcome.require_convergence("poisson.solve", info, rtol)
    return p, info


@eqx.filter_jit
def _pressure(
    domain: Domain, rhs: Array, x0: Any, preconditioner: Any, rtol: Array, atol: Array, max_steps: int
) -> tuple[Array, Array, Array, Info]:
    """The pressure, the right-hand side that it belongs to, how many entries of that were not finite, and how it was found:
    one program for all of it."""
    rhs = jnp.where(domain.fluid, rhs, 0)
    b, means = remove_means(domain, rhs)
    scale = jnp.linalg.norm(rhs.reshape(-1)) / jnp.sqrt(domain.fluid.sum())
    a = laplacian(domain)
    b = jnp.where(a.unknown, b, 0)
    m = multigrid.preconditioner(a) if preconditioner is None else preconditioner
    ours = isinstance(m, multigrid.Preconditioner)
    low = m.inverse.dtype if ours else None
    m = Partial(multigrid.cycled, m) if ours else m
    # The right-hand side and a first guess are zero outside the unknowns, and so is all that is made of them.
    x0 = None if x0 is None else jnp.where(a.unknown, x0, 0)
    p, info = conjugate_direction.conjugate_gradient(
        Partial(apply, a), b, m, x0=x0, rtol=rtol, atol=atol, max_steps=max_steps, direction_dtype=low, check=False
    )
    p, _ = remove_means(domain, jnp.where(a.unknown, p, 0))
    removed = jnp.abs(means) / jnp.where(scale > 0, scale, 1)
    return (
        p,
        b,
        jnp.sum(~jnp.isfinite(rhs)),
        Info(info.steps, info.status, info.residuals, info.residual, info.converged, removed),
    )
