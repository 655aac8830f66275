"""Our operators and preconditioners in SciPy, pyamg and lineax, and theirs here.

    on = Unknowns.of(a)                                    a = poisson.laplacian(domain), m = multigrid.preconditioner(a)
    x, _ = scipy.sparse.linalg.cg(as_scipy(a), on.gather(rhs), M=as_scipy(m, a))
    lineax.linear_solve(as_lineax(a), rhs, ConjugateDirection(rtol=1e-6, direction=as_lineax(m, a))).value
    poisson.solve(domain, rhs, preconditioner=from_pyamg(pyamg.smoothed_aggregation_solver(to_csr(a)), a))

SciPy and pyamg see vectors of the unknowns, in row-major order of the grid: zero rows for the other cells would make the matrix
singular.  lineax sees the whole grid, and the identity in cells without an unknown.  jax.scipy.sparse.linalg.cg takes a and m
as they are.

What runs on the host is called back from JAX one right-hand side at a time, and has no derivative of its own; that of a solve is
implicit and needs none.  Each wrapper is compiled for once, so make it once for many solves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from solvers import conjugate_direction
from solvers.conjugate_direction import Status
from solvers.stencil import Stencil

# ---- SciPy and pyamg ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Unknowns:
    """Which cells of a grid have an unknown, and so how a vector is laid out on it.

    shape   of the grid
    index   flat index of the cell of each unknown, ascending
    """

    shape: tuple[int, ...]
    index: np.ndarray

    @staticmethod
    def of(a: Stencil) -> Unknowns:
        index = np.flatnonzero(np.asarray(a.unknown))
        if not index.size:
            raise ValueError("a: has no unknown, expected a positive diagonal somewhere")
        return Unknowns(a.shape, index)

    def gather(self, grid: Any) -> np.ndarray:
        """The values of the unknowns, in the dtype of the grid."""
        values = np.asarray(grid)
        if values.shape != self.shape:
            raise ValueError(f"grid: has shape {values.shape}, expected {self.shape}")
        return values.reshape(-1)[self.index]

    def scatter(self, vector: Any) -> np.ndarray:
        """The vector on the grid, zero where there is no unknown."""
        values = np.asarray(vector)
        if values.shape != self.index.shape:
            raise ValueError(f"vector: has shape {values.shape}, expected {self.index.shape}")
        grid = np.zeros(int(np.prod(self.shape)), values.dtype)
        grid[self.index] = values
        return grid.reshape(self.shape)


def to_csr(a: Stencil, dtype: DTypeLike = np.float64) -> scipy.sparse.csr_matrix:
    """The matrix on the unknowns, numbered as in `Unknowns.of(a)`.  Made on the host, in any dtype whatever JAX has."""
    on = Unknowns.of(a)
    n = on.index.size
    number = np.zeros(a.diagonal.size, np.int32 if n < 2**31 / (2 * len(a.shape) + 1) else np.int64)
    number[on.index] = np.arange(n)
    before = link_weights(a)
    behind = [np.roll(w, -1, axis) for axis, w in enumerate(before)]  # a first cell has no link to one before
    strides = [int(np.prod(a.shape[axis + 1 :])) for axis in range(len(a.shape))]
    # One column per neighbour, in the order of their numbers, so that the entries of a row come out sorted.
    steps = np.array([-k for k in strides] + [0] + strides[::-1])
    grids = [*before, a.diagonal, *behind[::-1]]
    entries = np.stack([on.gather(g).astype(dtype) for g in grids], 1)
    present = entries != 0
    entries[:, steps != 0] *= -1
    columns = number[(on.index[:, None] + steps)[present]]
    starts = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(number.dtype)
    return scipy.sparse.csr_matrix((entries[present], columns, starts), shape=(n, n))


def link_weights(a: Stencil) -> list[Float[np.ndarray, "*grid"]]:
    """Per axis the weight of the link of each cell to the one before, zero unless both have unknowns."""
    if a.links is not None:
        return [np.asarray(w) for w in a.links]
    found, unknown = [], np.asarray(a.unknown)
    for axis, k in enumerate(a.stiffness):
        both = unknown & np.roll(unknown, 1, axis)
        both[(slice(None),) * axis + (0,)] = False
        found.append(k * both)
    return found


@eqx.filter_jit
def _applied(f: Callable[[Array], Array], u: Array) -> Array:
    return f(u)


def as_scipy(f: Callable[[Array], Array], on: Stencil | None = None) -> scipy.sparse.linalg.LinearOperator:
    """A stencil, or a preconditioner r -> z of the stencil `on`, as a symmetric operator on vectors of its unknowns.

    A stencil is applied in the dtype of the vector; TypeError if JAX does not have it (float64 without x64; `to_csr` needs
    no JAX).  A preconditioner, an approximation anyway, is given its vector in float32 in that case, and answers in the dtype
    of the vector.
    """
    exact = isinstance(f, Stencil) and on is None
    if not callable(f):
        raise TypeError(f"f: is of type {type(f).__name__}, expected a Stencil or a function r -> z")
    unknowns = Unknowns.of(_stencil("as_scipy", f, on))

    def product(v: np.ndarray) -> np.ndarray:
        v = v.reshape(-1)
        dtype = v.dtype if np.issubdtype(v.dtype, np.floating) else np.dtype(np.float64)
        if exact and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(
                f"as_scipy: the vector is of dtype {dtype}, which JAX does not have without x64; enable that, give float32, "
                "or use to_csr(a)"
            )
        return unknowns.gather(_applied(f, jnp.asarray(unknowns.scatter(v)))).astype(dtype)

    n = unknowns.index.size
    return scipy.sparse.linalg.LinearOperator((n, n), product, product, dtype=np.dtype(jnp.result_type(float)))


def _stencil(caller: str, f: Any, on: Stencil | None) -> Stencil:
    if on is None and not isinstance(f, Stencil):
        raise ValueError(f"{caller}: on is missing, expected the Stencil that f preconditions")
    return f if on is None else on


class OnHost(eqx.Module):
    """r -> z, a function of NumPy arrays on the grid that JAX calls back; works under jit and vmap."""

    function: Callable[[np.ndarray], np.ndarray] = eqx.field(static=True)

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        dtype = jnp.promote_types(r.dtype, jnp.float32)
        # Handed over as bits: the call may come from another thread, where JAX makes float32 of float64 if x64 is enabled in a
        # context of the caller's thread only.
        bits = jax.lax.bitcast_convert_type(r.astype(dtype), jnp.uint32)

        def function(bits: Any) -> np.ndarray:
            given = np.ascontiguousarray(bits).view(dtype).reshape(r.shape)
            return np.ascontiguousarray(self.function(given), dtype).view(np.uint32).reshape(bits.shape)

        found = jax.pure_callback(
            function, jax.ShapeDtypeStruct(bits.shape, bits.dtype), bits, vmap_method="sequential"
        )
        return jax.lax.bitcast_convert_type(found, dtype).astype(r.dtype)


def from_scipy(operator: Any, on: Stencil) -> OnHost:
    """A matrix or LinearOperator on the unknowns of a stencil as a preconditioner r -> z here, computed on the host in
    float64, zero in the other cells."""
    unknowns = Unknowns.of(on)
    n = unknowns.index.size
    if getattr(operator, "shape", None) != (n, n):
        raise ValueError(
            f"operator: has shape {getattr(operator, 'shape', None)}, expected {(n, n)}, one row per unknown"
        )
    return OnHost(lambda r: unknowns.scatter(operator @ unknowns.gather(r).astype(np.float64)))


def from_pyamg(ml: Any, on: Stencil, cycle: str = "V") -> OnHost:
    """One cycle of a pyamg solver of `to_csr(on)` as a preconditioner.

    cycle: "V", "W", "F" or "AMLI"; conjugate gradients need the first three, with smoothers that are symmetric, as pyamg's
    defaults are.
    """
    if not hasattr(ml, "aspreconditioner"):
        raise TypeError(f"ml: is of type {type(ml).__name__}, expected a multilevel solver made by pyamg")
    return from_scipy(ml.aspreconditioner(cycle=cycle), on)


# ---- lineax ------------------------------------------------------------------------------------------------------------


class _Filled(eqx.Module):
    """f on the unknowns, the identity elsewhere."""

    f: Callable[[Array], Array]
    unknown: Array

    def __call__(self, u: Array) -> Array:
        return jnp.where(self.unknown, self.f(jnp.where(self.unknown, u, 0)), u)


def as_lineax(
    f: Callable[[Array], Array], on: Stencil | None = None, dtype: DTypeLike | None = None
) -> lineax.FunctionLinearOperator:
    """A stencil, or a preconditioner r -> z of the stencil `on`, as an operator on the grid, tagged positive semi-definite.

    On cells without an unknown it is the identity: so the operator is positive definite (up to closed regions) and any
    right-hand side, any cotangent too, has its solution.  dtype: of the vectors; None for float64 where enabled, else float32.

    lineax.CG compares entry by entry, |r_i| ≤ rtol |b_i| + atol, which a zero in b makes meaningless (with atol = 0 it stops at
    once or never).  What it should be given is `lineax.CG(rtol=0.0, atol=1e-6 * norm(b), norm=optimistix.two_norm)`.  It has no
    use for the preconditioner when it differentiates backward; `ConjugateDirection` has.
    """
    stencil = _stencil("as_lineax", f, on)
    real = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    structure = jax.ShapeDtypeStruct(stencil.shape, real)
    return lineax.FunctionLinearOperator(_Filled(f, stencil.unknown), structure, lineax.positive_semidefinite_tag)


class ConjugateDirection(lineax.AbstractLinearSolver[lineax.AbstractLinearOperator]):
    """`conjugate_direction.solve` as a solver of lineax, for operators tagged positive semi-definite.

    rtol, atol  stop when ‖b - Ax‖ ≤ max(rtol ‖b‖, atol), Euclidean norms
    direction   r -> d on what the operator takes, a function or a lineax operator; for a system made by `as_lineax` made by it
                too, as right-hand sides and cotangents need not be zero where there is no unknown.  None for
                options["preconditioner"], or the residual if there is none
    memory, fallback, max_steps   as in `conjugate_direction.solve`

    options: "preconditioner", a lineax operator (the fallback, if a direction is given), and "y0", a first guess.  Derivatives
    use the same direction.  `stats` holds what `conjugate_direction.Info` does.  Results: max_steps_reached, stagnation
    (STAGNATED, PRECISION), breakdown (NOT_POSITIVE_DEFINITE), singular (INCONSISTENT), nonfinite_input or singular (NOT_FINITE).
    """

    rtol: float = 1e-6
    atol: float = 0.0
    direction: Any = None
    memory: int | None = 2
    fallback: Any = None
    max_steps: int = 1000

    def init(self, operator: lineax.AbstractLinearOperator, options: dict[str, Any]) -> lineax.AbstractLinearOperator:
        if jax.tree.structure(operator.in_structure()) != jax.tree.structure(operator.out_structure()) or (
            operator.in_size() != operator.out_size()
        ):
            raise ValueError(
                f"operator: maps {operator.in_structure()} to {operator.out_structure()}, expected the same structure"
            )
        if not lineax.is_positive_semidefinite(operator):
            raise ValueError("operator: is not tagged, expected lineax.positive_semidefinite_tag")
        return operator

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> tuple[Any, lineax.RESULTS, dict[str, Any]]:
        given = options.get("preconditioner")
        direction, fallback = self.direction, self.fallback
        if direction is None:
            direction = conjugate_direction.residual if given is None else given
        elif given is not None:
            fallback = given
        functions, b, x0 = (state, direction, fallback), vector, options.get("y0")
        rebuilt = lambda v: v  # noqa: E731
        if not isinstance(vector, jax.Array):
            b, rebuilt = ravel_pytree(vector)
            x0 = None if x0 is None else ravel_pytree(x0)[0]
            functions = tuple(_raveled(f, rebuilt) for f in functions)
        x, info = _solve_jitted(
            functions[0],
            b,
            direction=functions[1],
            memory=self.memory,
            x0=x0,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            fallback=functions[2],
        )
        stats = {"num_steps": info.steps, "max_steps": self.max_steps, **info._asdict()}
        return rebuilt(x), _result(info.status), stats

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Symmetric; only a first guess does not carry over.
        return state, {k: v for k, v in options.items() if k != "y0"}

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return state, options

    def allow_dependent_columns(self, operator: lineax.AbstractLinearOperator) -> bool:
        return False

    def allow_dependent_rows(self, operator: lineax.AbstractLinearOperator) -> bool:
        return False

    def assume_full_rank(self) -> bool:
        """What newer versions of lineax ask in place of the last two."""
        return True


# Under jit nothing is raised that a result of lineax says.
_solve_jitted = eqx.filter_jit(conjugate_direction.solve)


def _raveled(f: Any, rebuilt: Callable[[Array], Any]) -> Any:
    """f on vectors, where it is a function of pytrees."""
    if f is None or isinstance(f, str):
        return f
    on_trees = f.mv if isinstance(f, lineax.AbstractLinearOperator) else f
    return lambda v: ravel_pytree(on_trees(rebuilt(v)))[0]


def _result(status: Array | np.ndarray) -> lineax.RESULTS:
    named = {
        Status.MAX_STEPS: lineax.RESULTS.max_steps_reached,
        Status.STAGNATED: lineax.RESULTS.stagnation,
        Status.PRECISION: lineax.RESULTS.stagnation,
        Status.NOT_POSITIVE_DEFINITE: lineax.RESULTS.breakdown,
        Status.INCONSISTENT: lineax.RESULTS.singular,
        Status.NOT_FINITE: lineax.RESULTS.singular,
    }
    result = lineax.RESULTS.successful
    for code, name in named.items():
        result = lineax.RESULTS.where(status == code, name, result)
    return result
