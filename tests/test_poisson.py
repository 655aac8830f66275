"""Poisson problems: what a domain is, the solution against a sparse direct solver, closed regions, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from solvers import gallery, multigrid, poisson, stencil
from solvers.poisson import AIR, FLUID, SOLID, Domain

pytestmark = pytest.mark.usefixtures("quick_compilation")


def direct(domain, rhs):
    """The solution by SciPy's sparse LU, of the matrix assembled from the codes."""
    cells = np.asarray(domain.cells)
    wide = np.pad(cells, 1)
    for axis, (before, behind) in enumerate(domain.edges):
        lead = [slice(None)] * cells.ndim
        for at, code in ((0, before), (-1, behind)):
            lead[axis] = at
            wide[tuple(lead)] = code
    number = -np.ones(wide.shape, int)
    fluid = np.argwhere(cells == FLUID) + 1
    number[tuple(fluid.T)] = np.arange(len(fluid))
    rows, columns, values = [], [], []
    for i, cell in enumerate(fluid):
        for axis in range(cells.ndim):
            for by in (-1, 1):
                other = cell.copy()
                other[axis] += by
                code = wide[tuple(other)]
                if code != SOLID:
                    rows.append(i), columns.append(i), values.append(1.0)
                if code == FLUID:
                    rows.append(i), columns.append(number[tuple(other)]), values.append(-1.0)
    a = scipy.sparse.csc_matrix((values, (rows, columns)), shape=(len(fluid), len(fluid)))
    x = np.zeros(cells.shape)
    x[cells == FLUID] = scipy.sparse.linalg.spsolve(a, np.asarray(rhs)[cells == FLUID])
    return x


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", gallery.DOMAINS)
def test_solution_is_that_of_a_direct_solver(name, ndim, x64):
    domain = gallery.DOMAINS[name](12, ndim, seed=4)
    rhs = gallery.plume(domain, seed=1)
    p, info = poisson.solve(domain, jnp.asarray(rhs), rtol=1e-10)
    assert bool(info.converged) and int(info.steps) <= 15
    np.testing.assert_allclose(p, direct(domain, rhs), atol=1e-8)
    residual = rhs - np.asarray(poisson.laplacian(domain)(p))
    # The residual is itself known to rounding of A p: 1e-16 of the largest terms, over 1e-11.
    np.testing.assert_allclose(info.residual, np.linalg.norm(residual) / np.linalg.norm(rhs), rtol=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_iterations_do_not_grow_with_the_grid(ndim, x64):
    steps = {}
    for n in (16, 32) if ndim == 3 else (32, 64, 128):
        domain = gallery.random_blobs(n, ndim, seed=4)
        steps[n] = int(poisson.solve(domain, jnp.asarray(gallery.plume(domain)))[1].steps)
    assert max(steps.values()) <= 7 and max(steps.values()) - min(steps.values()) <= 1, steps


def test_a_polynomial_solution_on_cells_of_different_widths(x64):
    """p = x (3 - x) / 2 has flux differences that finite volumes get exactly, where the centres of cells are halfway."""
    n = 20
    domain = Domain.from_mask(
        np.full((n, 3), FLUID), edges=[(AIR, AIR), (SOLID, SOLID)], spacing=[0.15, np.array([0.1, 0.3, 0.2])]
    )
    x = 0.15 * (np.arange(n) + 1)
    exact = x * (0.15 * (n + 1) - x) / 2
    volume = 0.15 * np.array([0.1, 0.3, 0.2])
    p, info = poisson.solve(domain, jnp.asarray(np.broadcast_to(volume, (n, 3))), rtol=1e-12)
    assert bool(info.converged)
    np.testing.assert_allclose(p, np.broadcast_to(exact[:, None], (n, 3)), rtol=1e-9)


# ---- regions without air -----------------------------------------------------------------------------------------------


def two_rooms():
    cells = np.full((9, 8), FLUID)
    cells[4] = SOLID
    cells[0, 0] = AIR
    return Domain.from_mask(cells)


def test_a_region_without_air_is_solved_up_to_its_mean(x64):
    domain = two_rooms()
    assert domain.closed == 1 and set(np.unique(domain.regions)) == {0, 1}
    assert (np.asarray(domain.regions)[5:] == 1).all() and (np.asarray(domain.regions)[:5] == 0).all()
    rng = np.random.default_rng(0)
    rhs = np.where(np.asarray(domain.fluid), rng.standard_normal((9, 8)), 0)
    p, info = poisson.solve(domain, jnp.asarray(rhs), rtol=1e-10)
    assert bool(info.converged)
    mean = rhs[5:].mean()
    np.testing.assert_allclose(
        info.removed, abs(mean) / np.sqrt((rhs**2).sum() / np.asarray(domain.fluid).sum()), rtol=1e-9
    )
    left = rhs - np.asarray(poisson.laplacian(domain)(p))
    np.testing.assert_allclose(left[5:], mean, atol=1e-9)
    np.testing.assert_allclose(left[:4], 0, atol=1e-9)
    assert abs(float(p[5:].mean())) < 1e-12


def test_all_walls_and_a_cell_that_is_walled_in(x64):
    cells = np.full((8, 8), FLUID)
    cells[2:5, 2:5] = SOLID
    cells[3, 3] = FLUID
    domain = Domain.from_mask(cells)
    assert domain.closed == 2
    rhs = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)))
    p, info = poisson.solve(domain, rhs, rtol=1e-10)
    assert bool(info.converged) and float(p[3, 3]) == 0
    assert float(poisson.solve(domain, jnp.zeros((8, 8)))[1].steps) == 0


# ---- transformations ---------------------------------------------------------------------------------------------------


def test_jit_vmap_and_grad(x64):
    domain = gallery.smoke_sphere(10, 2)
    rhs = jnp.asarray(np.stack([gallery.plume(domain, s) for s in range(3)]))
    one = lambda b: poisson.solve(domain, b, rtol=1e-10)[0]  # noqa: E731
    together = jax.jit(jax.vmap(one))(rhs)
    for k in range(3):
        np.testing.assert_allclose(together[k], one(rhs[k]), atol=1e-9)
    # p = A⁻¹ b, so that the gradient of ⟨c, p⟩ is A⁻¹ c.
    gradient = jax.grad(lambda b: jnp.vdot(rhs[1], one(b)))(rhs[0])
    np.testing.assert_allclose(gradient, one(rhs[1]), atol=1e-8)


def test_a_preconditioner_made_before_gives_the_same(x64):
    domain = gallery.random_blobs(16, 2)
    rhs = jnp.asarray(gallery.plume(domain))
    m = multigrid.preconditioner(poisson.laplacian(domain))
    np.testing.assert_array_equal(poisson.solve(domain, rhs)[0], poisson.solve(domain, rhs, preconditioner=m)[0])
    with pytest.raises(ValueError, match="not symmetric"):
        poisson.solve(domain, rhs, preconditioner=lambda r: r + jnp.roll(r, 1, 0))
    plain = poisson.solve(domain, rhs, preconditioner=lambda r: r)[1]
    assert bool(plain.converged) and int(plain.steps) > 30


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "words", "options"),
    [
        (np.zeros((3, 3)), "dtype is float64", {}),
        (np.full(4, FLUID), r"shape \(4,\)", {}),
        (np.array([[2, 7]]), r"codes \[7\]", {}),
        (np.array([[SOLID, AIR]]), "no cell is FLUID", {}),
        (np.array([[FLUID, AIR]]), "edges", {"edges": FLUID}),
        (np.array([[FLUID, AIR]]), "edges", {"edges": [SOLID]}),
        (np.array([[FLUID, AIR]]), "spacing: axis 1 has", {"spacing": [1.0, -1.0]}),
        (np.array([[FLUID, AIR]]), "spacing: has 3 entries", {"spacing": [1.0] * 3}),
        (np.array([[FLUID, AIR]]), "one for each of 2 cells", {"spacing": [1.0, np.ones(3)]}),
    ],
)
def test_bad_domains(cells, words, options):
    with pytest.raises(ValueError, match=words):
        Domain.from_mask(cells, **options)


def test_bad_right_hand_sides(no_shape_checks):
    domain = gallery.smoke_sphere(8, 2)
    with pytest.raises(ValueError, match=r"shape \(8,\), the domain \(8, 8\)"):
        poisson.solve(domain, jnp.zeros(8), rtol=1e-3)
    with pytest.raises(ValueError, match="int32"):
        poisson.solve(domain, jnp.zeros((8, 8), jnp.int32), rtol=1e-3)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        poisson.solve(domain, jnp.zeros((8, 8)).at[0, 0].set(jnp.nan), rtol=1e-3)
    with pytest.raises(ValueError, match="enable x64"):
        poisson.solve(domain, jnp.zeros((8, 8)), rtol=1e-8)


def test_booleans_are_fluid_and_solid():
    domain = Domain.from_mask(np.array([[True, False], [True, True]]), edges=AIR)
    np.testing.assert_array_equal(domain.cells, [[FLUID, SOLID], [FLUID, FLUID]])
    assert "2 x 2" in repr(domain)


def test_in_32_bits_the_verdict_is_by_a_residual_in_64_on_the_host():
    domain = gallery.smoke_sphere(16)
    rhs = jnp.asarray(gallery.plume(domain), jnp.float32)
    pressure, info = poisson.solve(domain, rhs, rtol=1e-4)
    a = np.asarray(stencil.dense(poisson.laplacian(domain), jnp.float32), np.float64)
    left = np.linalg.norm(np.asarray(rhs, np.float64).ravel() - a @ np.asarray(pressure, np.float64).ravel())
    assert info.residual.dtype == np.float64
    assert bool(info.converged) and float(info.residual) <= 1e-4
    # Two sums of a few thousand terms in float64.
    np.testing.assert_allclose(float(info.residual), left / np.linalg.norm(np.asarray(rhs, np.float64)), rtol=1e-9)


def test_another_tolerance_is_no_other_program(x64):
    domain = gallery.smoke_sphere(8)
    rhs = jnp.asarray(gallery.plume(domain))
    traced = []

    def preconditioner(r):
        traced.append(1)
        return r

    for rtol, atol in ((1e-3, 0.0), (1e-5, 1e-9)):
        poisson.solve(domain, rhs, rtol=rtol, atol=atol, preconditioner=preconditioner)
        first = len(traced) if rtol == 1e-3 else first
    assert 0 < first == len(traced)
