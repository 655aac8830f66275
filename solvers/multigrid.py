"""A multigrid cycle for masked Laplacians whose few numbers per level are learned; linear and symmetric by construction.

On each level a polynomial smoother (damped Jacobi steps with step sizes ω_1 ... ω_m of their own), a coarse correction, and the
same steps in reverse.  Grids are coarsened by blocks of two cells per axis (`solvers.stencil.coarsened`); the prolongation P is
constant on a block up to a weight g > 0 of the block, the restriction is its transpose.  The coarse problem is solved by a few
cycles B of the next level, each scaled by a number c_k: e ← e + c_k B (r - A e).  That is a polynomial in B A times B, and so
symmetric if B is; with equal smoothers before and after, the whole cycle is symmetric.  Whether it is positive definite too
depends on the numbers; `spectrum` tells.

`Cycle` holds these numbers: `chebyshev` what one would set by hand, `load` what was learned (`solvers.cycle_training`).  The
weights g, and factors on the step sizes of all levels but the finest, are functions of how many links a cell lacks to solid
cells, and which share of them goes to air: on coarse grids, where they cost next to nothing, the cycle adapts to its domain.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from solvers.stencil import Stencil, aggregated, apply, coarsened, dense, factors, neighbours, repeated, shifted

COARSEST = 64  # cells: a dense inverse of at most that many unknowns
FEATURES = 4


class Hierarchy(eqx.Module):
    """Stencils from fine to coarse, features of the cells of all but the finest, and the inverse of the last (its
    pseudoinverse, if it is singular)."""

    levels: tuple[Stencil, ...]
    features: tuple[Float[Array, features * grid], ...]
    inverse: Float[Array, "n n"]


class Cycle(eqx.Module):
    """The numbers of a cycle, by level from fine to coarse; the last row serves all further levels.

    smoother  step sizes ω of the Jacobi steps, in the order of the way down
    coarse    scales c of the coarse corrections
    weight    log g of a block is linear in its features with these coefficients
    step      so is the logarithm of the factor on the step sizes of the level below
    """

    smoother: Float[Array, "levels steps"]
    coarse: Float[Array, "levels visits"]
    weight: Float[Array, "levels features"]
    step: Float[Array, "levels features"]


def chebyshev(steps: int = 3, visits: int = 2, low: float = 0.25, high: float = 2.0, scale: float = 1.0) -> Cycle:
    """What one would set by hand: the smoother that is least on eigenvalues of D⁻¹A in [low · high, high] (Chebyshev), the
    same everywhere, and corrections with one scale."""
    nodes = np.cos(np.pi * (2 * np.arange(steps) + 1) / (2 * steps))
    middle, half = high * (1 + low) / 2, high * (1 - low) / 2
    nothing = jnp.zeros((1, FEATURES))
    return Cycle(jnp.asarray(1 / (middle + half * nodes))[None], jnp.full((1, visits), scale), nothing, nothing)


def load(name: str) -> Cycle:
    """Learned numbers that come with the package: "poisson2d" or "poisson3d".  The file says how they were made."""
    folder = resources.files("solvers") / "weights"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        raise ValueError(f"load: no cycle is called {name!r}; there are {known}")
    numbers = json.loads(file.read_text(encoding="utf-8"))["cycle"]
    return Cycle(**{k: jnp.asarray(v, jnp.float32) for k, v in numbers.items()})


@eqx.filter_jit
def hierarchy(fine: Stencil, dtype: Any = jnp.float32) -> Hierarchy:
    """All coarser stencils of a stencil, down to at most 64 cells.  Compiled once per shape of the grid."""
    levels = [fine]
    while levels[-1].diagonal.size > COARSEST and max(factors(levels[-1].shape)) > 1:
        levels.append(coarsened(levels[-1], dtype))
    last = dense(levels[-1], dtype)
    # Eigenvalues below this share of the largest are rounding errors of a zero, that of a region without Dirichlet cells.
    share = last.shape[0] * float(jnp.finfo(dtype).eps)
    features = tuple(_features(a, dtype) for a in levels[1:])
    return Hierarchy(tuple(levels), features, jnp.linalg.pinv(last, rtol=share, hermitian=True))


def _features(a: Stencil, dtype: Any) -> Array:
    """Share of the diagonal that is due to air, and of the full diagonal that is lacking; and the squares of both."""
    assert a.links is not None
    d = a.diagonal.astype(dtype)
    inside = sum(w + shifted(w, axis, -1) for axis, w in enumerate(a.links))
    air = jnp.where(a.unknown, (d - inside) / jnp.where(a.unknown, d, 1), 0)
    full = jnp.max(d)
    lacking = jnp.where(a.unknown, 1 - d / jnp.where(full > 0, full, 1), 0)
    return jnp.stack([air, air**2, lacking, lacking**2])


class Preconditioner(eqx.Module):
    """r -> z ≈ A⁻¹ r: one cycle from zero, computed in the dtype of the hierarchy and returned in that of r.

    Linear, symmetric, and positive definite on the unknowns if `spectrum` says so; zero elsewhere.
    """

    levels: tuple[Stencil, ...]
    weights: tuple[Float[Array, "*_"], ...]  # of one grid each, as the next
    inverse_diagonals: tuple[Float[Array, "*_"], ...]
    inverse: Float[Array, "n n"]
    cycle: Cycle
    symmetric: ClassVar[bool] = True  # by construction: `conjugate_gradient` need not try

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        return cycled(self, jnp.where(self.levels[0].unknown, r, 0))


def cycled(m: Preconditioner, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
    """`m(r)` for an r that is zero outside the unknowns, which saves a pass over memory."""
    return _corrected(m, r.astype(m.inverse.dtype), 0).astype(r.dtype)


def preconditioner(a: Stencil | Hierarchy, cycle: Cycle | None = None, dtype: Any = jnp.float32) -> Preconditioner:
    """The cycle of a stencil.  cycle: None for the learned one.  dtype: in which it is computed."""
    ndim = len((a.levels[0] if isinstance(a, Hierarchy) else a).shape)
    return _prepared(a, load(f"poisson{ndim}d") if cycle is None else cycle, dtype)


@eqx.filter_jit
def _prepared(a: Stencil | Hierarchy, numbers: Cycle, dtype: Any) -> Preconditioner:
    h = a if isinstance(a, Hierarchy) else hierarchy(a, dtype)
    weights, inverses = [], []
    for level, (below, features) in enumerate(zip(h.levels[1:], h.features, strict=True)):
        g = jnp.tensordot(_row(numbers.weight, level, features.dtype), features, 1)
        s = jnp.tensordot(_row(numbers.step, level, features.dtype), features, 1)
        weights.append(jnp.where(below.unknown, jnp.exp(g), 0))
        inverses.append(jnp.where(below.unknown, jnp.exp(s) / _safe(below, features.dtype), 0))
    return Preconditioner(h.levels, tuple(weights), tuple(inverses), h.inverse, numbers)


def _row(numbers: Array, level: int, dtype: Any) -> Array:
    return numbers[min(level, len(numbers) - 1)].astype(dtype)


def _corrected(m: Preconditioner, r: Array, level: int) -> Array:
    a = m.levels[level]
    if level == len(m.levels) - 1:
        return jnp.where(a.unknown, (m.inverse @ r.reshape(-1)).reshape(r.shape), 0)
    below, by, weight = m.levels[level + 1], factors(a.shape), m.weights[level]
    steps, scales = (_row(x, level, r.dtype) for x in (m.cycle.smoother, m.cycle.coarse))
    # On the finest level made of the diagonal, an int8, on the others stored.
    inverse = None if level == 0 else m.inverse_diagonals[level - 1]
    x = _smoothed(a, inverse, r, _jacobi(a, inverse, steps[0], r), steps[1:])
    rest = weight * aggregated(r - apply(a, x), by)

    # In a loop although there are few, as the levels below would be compiled once more for each.
    def visit(e: Array, scale: Array) -> tuple[Array, None]:
        return e + scale * _corrected(m, rest - apply(below, e), level + 1), None

    e, _ = lax.scan(visit, jnp.zeros_like(rest), scales)
    x = x + jnp.where(a.unknown, repeated(weight * e, by, a.shape), 0)
    return _smoothed(a, inverse, r, x, steps[::-1])


def _safe(a: Stencil, dtype: Any) -> Array:
    return jnp.where(a.unknown, a.diagonal.astype(dtype), 1)


def _jacobi(a: Stencil, inverse: Array | None, w: Array, r: Array) -> Array:
    """ω D⁻¹ r."""
    return w * inverse * r if inverse is not None else jnp.where(a.unknown, w / _safe(a, r.dtype) * r, 0)


def _smoothed(a: Stencil, inverse: Array | None, r: Array, x: Array, steps: Array) -> Array:
    """Jacobi steps x ← x + ω D⁻¹ (r - A x), in a loop, as XLA would compute unrolled ones over and over inside each other."""

    def step(x: Array, w: Array) -> tuple[Array, None]:
        if inverse is not None:
            return x + w * inverse * (r - apply(a, x)), None
        # That the diagonal depends on w keeps XLA from storing it as reals outside of the loop, four times the bytes.
        d = jnp.where(jnp.isfinite(w), a.diagonal, 0)
        return jnp.where(
            d > 0, (1 - w) * x + (w / jnp.where(d > 0, d.astype(x.dtype), 1)) * (r + neighbours(a, x)), 0
        ), None

    return lax.scan(step, x, steps)[0]


def spectrum(a: Stencil, m: Any) -> Float[np.ndarray, " n"]:
    """The eigenvalues of M A on the unknowns of a small grid, ascending, zeros of closed regions included.

    M is positive definite on the range of A if all others are positive.  Raises ValueError if M is not symmetric.
    """
    inside = np.flatnonzero(np.asarray(a.unknown).reshape(-1))
    units = jnp.eye(a.diagonal.size, dtype=jnp.result_type(float))[inside]
    columns = [np.asarray(jax.lax.map(lambda e, f=f: f(e.reshape(a.shape)).reshape(-1), units), float) for f in (a, m)]
    matrix, inverse = (c[:, inside] for c in columns)
    skew = np.abs(inverse - inverse.T).max() / np.abs(inverse).max()
    if skew > 1e-4:  # a float32 cycle is symmetric up to rounding, 1e-6 of its entries
        raise ValueError(f"spectrum: m is not symmetric, entries differ by {skew:.1g} of the largest")
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    return np.linalg.eigvalsh(root.T @ ((inverse + inverse.T) / 2) @ root)
