"""The solvers that the Poisson benchmark compares, each as a function of a domain.

A method prepares itself for a domain and gives back what solves A x = b for it, and the bytes that it keeps besides the vectors
of the iteration.  Everything that a user would have to do before the first solve is preparation, compilation excepted.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import red_black
import scipy.sparse.linalg
from poisson_iterations import by_hand

from solvers import adapters, baselines, conjugate_direction, multigrid, poisson
from solvers.stencil import Stencil


class Solved(NamedTuple):
    """x on the grid; iterations taken, and the relative residuals after each as the method sees them, if it tells."""

    x: Any
    iterations: int
    residuals: np.ndarray


class Prepared(NamedTuple):
    solve: Callable[[Any, float], Solved]
    kept: int


class Method(NamedTuple):
    """prepare   domain -> Prepared
    work      floating-point work of an iteration, in products with A on the finest grid; None if it is not known
    threads   "all" cores or one
    compiled  whether the first call for a shape compiles, which is not counted
    most      cells per axis, above which it would take minutes
    """

    prepare: Callable[[poisson.Domain], Prepared]
    work: float | None
    threads: str
    compiled: bool = False
    most: int = 10**6


MOST = 5000  # iterations


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


_laplacian = eqx.filter_jit(poisson.laplacian)


def ours(make: Callable[[Stencil], Any], dtype: Any = jnp.float64) -> Callable[[poisson.Domain], Prepared]:
    """Conjugate gradients of this package with a preconditioner of this package."""
    made = eqx.filter_jit(make)

    def prepare(domain: poisson.Domain) -> Prepared:
        a = _laplacian(domain)
        return iterated(a, jax.block_until_ready(made(a)), dtype)

    return prepare


def multigrid_pcg(cycle: multigrid.Cycle | None) -> Callable[[poisson.Domain], Prepared]:
    """What `poisson.solve` does, with its cycle prepared."""

    def prepare(domain: poisson.Domain) -> Prepared:
        a = _laplacian(domain)
        m = jax.block_until_ready(multigrid.preconditioner(a, cycle))

        def solve(b: np.ndarray, rtol: float) -> Solved:
            x, info = poisson.solve(domain, jnp.asarray(b), rtol=rtol, preconditioner=m, max_steps=MOST)
            steps = int(info.steps)
            return Solved(jax.block_until_ready(x), steps, np.asarray(info.residuals)[1 : steps + 1])

        return Prepared(solve, size((a, m)))

    return prepare


def iterated(a: Stencil, m: Any, dtype: Any = jnp.float64) -> Prepared:
    def solve(b: np.ndarray, rtol: float) -> Solved:
        x, info = conjugate_direction.conjugate_gradient(
            a, jnp.asarray(b, dtype), m, rtol=rtol, max_steps=MOST, check=False
        )
        jax.block_until_ready(x)
        steps = int(info.steps)
        return Solved(x, steps, np.asarray(info.residuals)[1 : steps + 1])

    return Prepared(solve, size((a, m)))


def paper_network(domain: poisson.Domain) -> Prepared:
    """The deep conjugate direction method: the network in float32, directions A-orthogonal to the last two."""
    a = _laplacian(domain)
    network = conjugate_direction.load("poisson3d")

    def solve(b: np.ndarray, rtol: float) -> Solved:
        x, info = conjugate_direction.solve(
            a, jnp.asarray(b), direction=network, rtol=rtol, max_steps=300, direction_dtype=jnp.float32
        )
        steps = int(info.steps)
        return Solved(jax.block_until_ready(x), steps, np.asarray(info.residuals)[1 : steps + 1])

    return Prepared(solve, size((a, network)))


def incomplete(relaxation: float) -> Callable[[poisson.Domain], Prepared]:
    """Incomplete Cholesky, whose set-up is the host's."""

    def prepare(domain: poisson.Domain) -> Prepared:
        a = _laplacian(domain)
        return iterated(a, baselines.incomplete_cholesky(a, relaxation))

    return prepare


def red_black_c(domain: poisson.Domain) -> Prepared:
    run, kept = red_black.solver(_laplacian(domain))
    return Prepared(lambda b, rtol: Solved(*run(b, rtol)), kept)


def scipy_cg(domain: poisson.Domain) -> Prepared:
    a = _laplacian(domain)
    matrix, on = adapters.to_csr(a), adapters.Unknowns.of(a)

    def solve(b: np.ndarray, rtol: float) -> Solved:
        steps = []
        x, _ = scipy.sparse.linalg.cg(matrix, on.gather(b), rtol=rtol, maxiter=MOST, callback=lambda _: steps.append(1))
        return Solved(on.scatter(x), len(steps), np.zeros(0))

    return Prepared(solve, _csr_bytes(matrix))


def cupy_cg(domain: poisson.Domain) -> Prepared:
    """On a GPU, with the matrix in CSR format."""
    import cupy
    import cupyx.scipy.sparse
    import cupyx.scipy.sparse.linalg

    cg = cupyx.scipy.sparse.linalg.cg
    tolerance = "rtol" if "rtol" in inspect.signature(cg).parameters else "tol"  # renamed in version 14
    a = _laplacian(domain)
    on, host = adapters.Unknowns.of(a), adapters.to_csr(a)
    matrix = cupyx.scipy.sparse.csr_matrix(host)

    def solve(b: np.ndarray, rtol: float) -> Solved:
        steps: list[int] = []
        rhs = cupy.asarray(on.gather(b))
        x, _ = cg(matrix, rhs, **{tolerance: rtol}, maxiter=MOST, callback=lambda _: steps.append(1))
        return Solved(on.scatter(cupy.asnumpy(x)), len(steps), np.zeros(0))

    return Prepared(solve, _csr_bytes(host))


def pyamg_cg(kind: str) -> Callable[[poisson.Domain], Prepared]:
    def prepare(domain: poisson.Domain) -> Prepared:
        import pyamg

        a = _laplacian(domain)
        matrix, on = adapters.to_csr(a), adapters.Unknowns.of(a)
        build = {"sa": pyamg.smoothed_aggregation_solver, "rs": pyamg.ruge_stuben_solver}[kind]
        ml = build(matrix, max_coarse=100)

        def solve(b: np.ndarray, rtol: float) -> Solved:
            residuals: list[float] = []
            rhs = on.gather(b)
            x = ml.solve(rhs, tol=rtol, accel="cg", maxiter=MOST, residuals=residuals)
            return Solved(on.scatter(x), len(residuals) - 1, np.asarray(residuals[1:]) / np.linalg.norm(rhs))

        kept = sum(_csr_bytes(m) for level in ml.levels for m in (level.A, *(getattr(level, k, None) for k in "PR")))
        return Prepared(solve, kept)

    return prepare


def pyamgcl_cg(domain: poisson.Domain) -> Prepared:
    """Smoothed aggregation with SPAI-0 smoothing of AMGCL, OpenMP."""
    import pyamgcl

    a = _laplacian(domain)
    matrix, on = adapters.to_csr(a), adapters.Unknowns.of(a)
    levels = pyamgcl.amg(matrix, {"coarsening.type": "smoothed_aggregation", "relax.type": "spai0"})

    def solve(b: np.ndarray, rtol: float) -> Solved:
        run = pyamgcl.solver(levels, {"type": "cg", "tol": rtol, "maxiter": MOST})
        x = run(on.gather(b))
        return Solved(on.scatter(x), int(run.iters), np.zeros(0))

    return Prepared(solve, _csr_bytes(matrix))


def _csr_bytes(m: Any) -> int:
    return 0 if m is None else sum(getattr(m, k).nbytes for k in ("data", "indices", "indptr"))


def cycle_work(steps: int, visits: int) -> float:
    """Of an iteration with our cycle: A p, and per visit of a level 2 steps - 1 smoothing steps and a residual, one more product
    per visit of the level below; a level has an eighth of the cells."""
    return (
        1 + 2 * steps * sum((visits / 8) ** k for k in range(8)) + visits * sum((visits / 8) ** k for k in range(7)) / 8
    )


CYCLE = cycle_work(3, 2)
METHODS: dict[str, Method] = {
    "learned cycle": Method(multigrid_pcg(None), CYCLE, "all", True),
    "hand-set cycle": Method(multigrid_pcg(by_hand(3)), CYCLE, "all", True),
    "learned cycle, float32": Method(ours(multigrid.preconditioner, jnp.float32), CYCLE, "all", True),
    "red-black multigrid, C": Method(red_black_c, 1 + 3.5 * 8 / 7, "all", True),
    "pyamg Ruge-Stuben": Method(pyamg_cg("rs"), None, "one"),
    "pyamg smoothed aggregation": Method(pyamg_cg("sa"), None, "one"),
    "pyamgcl smoothed aggregation": Method(pyamgcl_cg, None, "all"),
    "modified incomplete Cholesky": Method(incomplete(0.97), 2, "all", True),
    "incomplete Cholesky": Method(incomplete(0.0), 2, "all", True),
    "Jacobi": Method(ours(baselines.jacobi), 1, "all", True),
    "conjugate gradients": Method(ours(lambda a: conjugate_direction.residual), 1, "all", True),
    "SciPy cg": Method(scipy_cg, 1, "one"),
    "cupy cg": Method(cupy_cg, 1, "all"),
    "the paper's network": Method(paper_network, None, "all", True, 64),
}


def prepared(method: Method, domain: poisson.Domain) -> tuple[Prepared, float]:
    """The method for the domain, and the seconds of its preparation; that of what compiles is timed when it has."""
    if method.compiled:
        method.prepare(domain)
    start = time.perf_counter()
    ready = method.prepare(domain)
    return ready, time.perf_counter() - start
