"""Inputs of the claims: random spectra, Poisson problems with random face weights, directions of all sorts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.claim import Paper
from solvers import conjugate_direction as cd

PAPER = Paper(
    stem="conjugate_direction",
    title="A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
    authors="Ayano Kaneda, Osman Akar, Jingyu Chen, Victoria Alicia Trevino Kala, David Hyde, Joseph Teran",
    year=2023,
    venue="ICML",
    arxiv="2205.10763",
    claims=(
        *("D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "D9", "D10", "D10b", "D11", "D12", "D13", "D14"),
        *("P1", "P2", "E1", "E1b", "E1c", "E2", "E2b", "E3", "E3b"),
    ),
    note="The numbers are the project's own.  D: what follows from the algorithm for any direction whatever, derived here; "
    "P and E: what the paper states and measures.  The full text was not available: its tables, its theorem numbers and its "
    "trained networks are not quoted and not claimed.  Ours are D10b, the library's safeguard, E1b, what conjugate gradients "
    "do with the size of the grid, and E1c, E2b and E3b, about a network of the paper's kind that was trained here.",
)

Function = Callable[[jax.Array], jax.Array]

# Much is compiled here and little computed: without the costly optimisations most of these claims take half the time.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


# -- directions ---------------------------------------------------------------------------------------------------------

KINDS = ("relu", "tanh", "sign", "cube", "opposite", "sine", "tilted")


def direction(kind: jax.Array, weights: jax.Array) -> Function:
    """One of KINDS, nonlinear and none of them a preconditioner, with random weights (n, n)."""
    bias = weights[0]
    branches: list[Function] = [
        lambda r: jax.nn.relu(weights @ r) + 0.1 * bias,
        lambda r: jnp.tanh(3 * weights @ r + 0.1 * bias),
        lambda r: jnp.sign(r),
        lambda r: r**3,
        lambda r: -r,
        lambda r: jnp.sin(30 * weights @ r),
        lambda r: r + 0.3 * weights @ jnp.abs(r),
    ]
    return lambda r: jax.lax.switch(kind, branches, r)


# -- problems -----------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A of any spectrum and eigenbasis, a solution, and a direction; every real number is legal."""

    log_spectrum: Any
    basis: Any
    solution: Any
    weights: Any
    kind: Any


def draw_problem(key: jax.Array, n: int, kinds: jax.Array, count: Any, decades: Any) -> Problem:
    """The kind is one of the first `count` of the kinds."""
    k_spectrum, k_basis, k_solution, k_weights, k_kind = jax.random.split(key, 5)
    log_spectrum = decades * np.log(10) * jax.random.uniform(k_spectrum, (n,))
    return Problem(
        log_spectrum,
        jax.random.normal(k_basis, (n, n)),
        jax.random.normal(k_solution, (n,)),
        jax.random.normal(k_weights, (n, n)) / np.sqrt(n),
        kinds[jax.random.randint(k_kind, (), 0, count)],
    )


def matrix(problem: Problem) -> jax.Array:
    """Q diag(exp(log spectrum)) Qᵀ, the spectrum clipped to 6 decades, symmetric to the last bit."""
    q, _ = jnp.linalg.qr(problem.basis)
    log = problem.log_spectrum - jnp.max(problem.log_spectrum)
    a = (q * jnp.exp(jnp.maximum(log, -6 * np.log(10)))) @ q.T
    return (a + a.T) / 2


@functools.lru_cache(maxsize=8)
def _incidence(m: int) -> np.ndarray:
    """Differences over all faces of an m × m grid whose outer faces lie on the boundary: (faces, m²)."""
    index = np.arange(m * m).reshape(m, m)
    rows = []
    for cells in (index, index.T):
        for line in cells:
            for left, right in zip([-1, *line], [*line, -1], strict=True):
                row = np.zeros(m * m)
                row[[c for c in (left, right) if c >= 0]] = [-1.0, 1.0] if left >= 0 <= right else [1.0]
                rows.append(row)
    return np.array(rows)


class Grid(NamedTuple):
    """A Poisson problem with Dirichlet boundary and conductivities exp(log_faces), and its solution."""

    log_faces: Any
    solution: Any


def draw_grid(key: jax.Array, m: int, spread: float = 0.3) -> Grid:
    k_faces, k_solution = jax.random.split(key)
    return Grid(spread * jax.random.normal(k_faces, (2 * m * (m + 1),)), jax.random.normal(k_solution, (m * m,)))


@functools.partial(compiled, static_argnames=("count", "m"))
def draw_grids(key: jax.Array, count: int, m: int, spread: Any = 0.3) -> Grid:
    return jax.vmap(lambda k: draw_grid(k, m, spread))(jax.random.split(key, count))


def grid_matrix(grid: Grid) -> jax.Array:
    difference = jnp.asarray(_incidence(round(np.sqrt(grid.solution.size))))
    return difference.T @ (jnp.exp(grid.log_faces)[:, None] * difference)


def symmetric_gauss_seidel(a: jax.Array) -> jax.Array:
    """M = (D + L)⁻ᵀ D (D + L)⁻¹ as a matrix: one sweep forward, one backward."""
    diagonal = jnp.diag(a)
    half = jax.scipy.linalg.solve_triangular(jnp.tril(a) / jnp.sqrt(diagonal), jnp.eye(len(a)), lower=True)
    m = half.T @ half
    return (m + m.T) / 2


# -- runs -----------------------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Many runs on the host: matrices (k, n, n), solutions (k, n), iterates (k, steps + 1, n), directions (k, steps, n)."""

    a: np.ndarray
    solution: np.ndarray
    x: np.ndarray
    p: np.ndarray

    @property
    def energy(self) -> np.ndarray:
        """‖e‖_A² (k, steps + 1), from differences and so free of cancellation."""
        return quadratic(self.a, self.solution[:, None] - self.x)

    @property
    def r(self) -> np.ndarray:
        return (self.solution[:, None] - self.x) @ self.a


N, STEPS, MANY = 24, 20, 48


@functools.partial(compiled, static_argnames=("memory", "normalize"))
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None))
def _trajectory(problem: Problem, scale: Any, stretch: Any, smooth: Any, memory: int | None, normalize: bool) -> Any:
    a = matrix(problem)
    solution = jnp.where(smooth > 0, jnp.linalg.solve(a, problem.solution), problem.solution)
    f = direction(problem.kind, problem.weights)
    b = scale * (a @ solution)
    found = cd.iterates(
        lambda v: a @ v, b, STEPS, direction=lambda r: stretch * f(r), memory=memory, normalize=normalize
    )
    return a, solution, found.x, found.p


def trajectories(
    key: jax.Array,
    memory: int | None,
    kinds: tuple[str, ...] = KINDS,
    decades: float = 3.0,
    scale: float = 1.0,
    stretch: float = 1.0,
    normalize: bool = True,
    count: int = MANY,
    smooth: float = 0.0,
) -> Runs:
    """Runs for (scale b, stretch f) on `count` random problems; `smooth=1`: with a random right-hand side.

    Everything but memory and normalize shares a compilation.
    """
    problems = draw_problems(jax.random.split(key, count), kinds, decades)
    return Runs(*(np.asarray(v) for v in _trajectory(problems, scale, stretch, smooth, memory, normalize)))


def draw_problems(keys: jax.Array, kinds: tuple[str, ...], decades: float) -> Problem:
    # Filled up to one length, so that all choices of kinds share a compilation.
    numbers = np.resize([KINDS.index(kind) for kind in kinds], len(KINDS))
    return _drawn_problems(keys, numbers, len(kinds), decades)


@compiled
def _drawn_problems(keys: jax.Array, kinds: jax.Array, count: Any, decades: Any) -> Problem:
    return jax.vmap(lambda key: draw_problem(key, N, kinds, count, decades))(keys)


def quadratic(a: np.ndarray, v: np.ndarray) -> np.ndarray:
    """vᵀAv for matrices (k, n, n) and vectors (k, m, n)."""
    return np.einsum("kmi,kmi->km", v @ a, v)
