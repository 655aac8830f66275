"""Classical preconditioners and direct solvers, against dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from solvers import baselines, gallery, multigrid, poisson
from solvers.adapters import Unknowns, as_scipy, to_csr
from solvers.baselines import PRECONDITIONERS, incomplete_cholesky, sine_transform, tensor_product
from solvers.conjugate_direction import Status
from solvers.poisson import AIR, SOLID, Domain, laplacian
from solvers.stencil import dense

pytestmark = pytest.mark.usefixtures("quick_compilation")


def steps_of(a, rhs, m, rtol=1e-6):
    """Iterations of SciPy's conjugate gradients, which has a true residual at the end."""
    A, b, steps = to_csr(a), Unknowns.of(a).gather(rhs), []
    x, code = scipy.sparse.linalg.cg(A, b, M=as_scipy(m, a), rtol=rtol, callback=lambda x: steps.append(1))
    assert code == 0 and np.linalg.norm(A @ x - b) <= 1.01 * rtol * np.linalg.norm(b)  # SciPy's is the recursion's
    return len(steps)


def as_matrix(m, a):
    """The dense matrix of a preconditioner on the unknowns, and what it makes outside of them."""
    on = Unknowns.of(a)
    units = jnp.asarray(np.eye(a.diagonal.size)[on.index].reshape(-1, *a.shape))
    columns = np.asarray(eqx.filter_jit(lambda m, u: jax.vmap(m)(u))(m, units)).reshape(on.index.size, -1)
    return columns[:, on.index].T, np.delete(columns, on.index, 1)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("domain", [gallery.random_blobs(10, 2, 1), gallery.dam_break(6, 3)], ids=["2-D", "3-D"])
def test_all_are_symmetric_positive_definite_and_zero_outside(name, domain, x64):
    a = laplacian(domain)
    matrix, outside = as_matrix(PRECONDITIONERS[name](a), a)
    rounding = 1e-6 * np.abs(matrix).max()  # of a float32 cycle
    assert np.abs(matrix - matrix.T).max() < rounding and not outside.any()
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2)[0] > 0.02  # 1/12 for Jacobi, nothing near zero


def test_each_saves_iterations_over_the_one_before(x64):
    domain = gallery.smoke_sphere(20)
    a, rhs = laplacian(domain), gallery.plume(domain)
    steps = {name: steps_of(a, rhs, make(a)) for name, make in PRECONDITIONERS.items()}
    assert steps["jacobi"] <= 1.05 * steps["cg"]
    assert steps["incomplete_cholesky"] <= 0.5 * steps["cg"]
    assert steps["modified_incomplete_cholesky"] <= 0.75 * steps["incomplete_cholesky"]
    assert steps["red_black_multigrid"] <= 16 and steps["chebyshev_multigrid"] <= 7


def test_jacobi_divides_by_the_diagonal(x64):
    a = laplacian(gallery.random_blobs(10, 2, 1))
    matrix, _ = as_matrix(baselines.jacobi(a), a)
    np.testing.assert_allclose(matrix, np.diag(1 / to_csr(a).diagonal()), rtol=1e-15)


def test_chebyshev_is_the_cycle_set_by_hand():
    a = laplacian(gallery.random_blobs(10, 2, 1))
    assert eqx.tree_equal(baselines.chebyshev_multigrid(a), multigrid.preconditioner(a, multigrid.chebyshev()))


@pytest.mark.parametrize("ndim", [2, 3])
def test_red_black_is_gauss_seidel_on_a_grid_without_a_coarser_one(ndim, x64):
    """Two levels: sweep, exact coarse solve of P'AP with links halved, sweep back; with SciPy's matrices."""
    n = {2: 12, 3: 6}[ndim]
    a = laplacian(gallery.random_blobs(n, ndim, 1))
    h = multigrid.hierarchy(a, jnp.float64)
    assert len(h.levels) == 2
    on, below, A = Unknowns.of(a), Unknowns.of(h.levels[1]), to_csr(a).toarray()
    colour = np.indices(a.shape).sum(0).reshape(-1)[on.index] % 2
    blocks = np.ravel_multi_index(np.unravel_index(on.index, a.shape) // np.array(2), h.levels[1].shape)
    P = (blocks[:, None] == below.index[None, :]).astype(float)

    def sweep(x, r, colours):
        for c in colours:
            x = np.where(colour[:, None] == c, x + (r - A @ x) / np.diag(A)[:, None], x)
        return x

    r = np.eye(len(A))
    x = sweep(np.zeros_like(r), r, (0, 1))
    x = sweep(x + P @ np.linalg.solve(to_csr(h.levels[1]).toarray(), P.T @ (r - A @ x)), r, (1, 0))
    matrix, _ = as_matrix(baselines.red_black_multigrid(a, jnp.float64), a)
    np.testing.assert_allclose(matrix, x, atol=1e-12)


# ---- incomplete Cholesky -----------------------------------------------------------------------------------------------


def textbook_factor(A, relaxation):
    """Cholesky's algorithm that drops what falls outside the pattern of A, or takes a share of it from both diagonals."""
    A, pattern = A.copy(), A != 0
    for k in range(len(A)):
        A[k, k] = np.sqrt(A[k, k])
        A[k + 1 :, k] /= A[k, k]
        for j in range(k + 1, len(A)):
            for i in range(j, len(A)):
                fill = A[i, k] * A[j, k]
                if pattern[i, j]:
                    A[i, j] -= fill
                elif fill:
                    A[i, i] -= relaxation * fill
                    A[j, j] -= relaxation * fill
    return np.tril(np.where(pattern, A, 0))


@settings(max_examples=20)
@given(
    cells=st.sampled_from([(5, 4), (3, 4, 2)]).flatmap(
        lambda shape: hnp.arrays(np.int8, shape, elements=st.sampled_from([1, 2, 2, 3]))
    ),
    relaxation=st.sampled_from([0.0, 0.5, 0.97]),
    varied=st.booleans(),
)
def test_incomplete_cholesky_is_the_textbook_one(cells, relaxation, varied, x64):
    cells.flat[0] = 2
    spacing = [np.linspace(1, 2, n) for n in cells.shape] if varied else 1.0
    a = laplacian(Domain.from_mask(cells, edges=AIR, spacing=spacing))
    factor = textbook_factor(to_csr(a).toarray(), relaxation)
    matrix, outside = as_matrix(incomplete_cholesky(a, relaxation, jnp.float64), a)
    np.testing.assert_allclose(matrix @ (factor @ factor.T), np.eye(len(factor)), atol=1e-10)
    assert not outside.any()


def test_modified_factors_keep_row_sums_and_a_closed_region_is_no_obstacle(x64):
    open_one = laplacian(gallery.random_blobs(10, 2, 1))
    factor = np.linalg.inv(as_matrix(incomplete_cholesky(open_one, 1.0, jnp.float64), open_one)[0])
    np.testing.assert_allclose(factor.sum(1), np.asarray(to_csr(open_one).sum(1)).ravel(), atol=1e-9)
    # A row of cells between walls: the factorisation is exact, and so the last pivot zero.
    closed = Domain.from_mask(np.full((1, 9), 2))
    rhs = jnp.linspace(-1, 1, 9)[None]
    _, info = poisson.solve(closed, rhs, rtol=1e-10, preconditioner=incomplete_cholesky(laplacian(closed)))
    assert info.status == Status.CONVERGED
    with pytest.raises(ValueError, match=r"relaxation: is 1\.5, expected"):
        incomplete_cholesky(open_one, 1.5)


def test_our_iteration_takes_incomplete_cholesky(x64):
    domain = gallery.smoke_sphere(20, 2)
    a, rhs = laplacian(domain), gallery.plume(domain)
    m = incomplete_cholesky(a)
    x, info = poisson.solve(domain, jnp.asarray(rhs), preconditioner=m)
    A, b = to_csr(a), Unknowns.of(a).gather(rhs)
    assert np.linalg.norm(A @ Unknowns.of(a).gather(x) - b) <= 1e-6 * np.linalg.norm(b)
    assert abs(steps_of(a, rhs, m) - int(info.steps)) <= 1


# ---- direct solvers of a box -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "widths"), [((1, 5), 1.0), ((4, 7), [1.0, 3.0]), ((3, 4, 5), [1.0, 2.0, 0.5])])
def test_the_sine_transform_is_the_inverse_of_a_box_in_air(shape, widths, x64):
    domain = Domain.from_mask(np.full(shape, 2), edges=AIR, spacing=widths)
    a = laplacian(domain)
    r = np.random.default_rng(0).standard_normal(shape)
    truth = np.linalg.solve(np.asarray(dense(a, jnp.float64)), r.reshape(-1)).reshape(shape)
    for solver in (sine_transform(domain), tensor_product(domain)):
        found = eqx.filter_jit(solver)(jnp.asarray(r))
        np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-13)
    assert sine_transform(domain)(jnp.asarray(r, jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("closed", [False, True])
def test_tensor_products_take_walls_and_widths_that_vary(closed, x64):
    shape = (3, 4, 5)
    edges = SOLID if closed else [SOLID, (SOLID, AIR), (AIR, AIR)]
    domain = Domain.from_mask(np.full(shape, 2), edges=edges, spacing=[np.linspace(1, 2, n) ** 2 for n in shape])
    r = np.random.default_rng(0).standard_normal(shape)
    truth = np.linalg.pinv(np.asarray(dense(laplacian(domain), jnp.float64)), rcond=1e-12, hermitian=True)
    found = tensor_product(domain)(jnp.asarray(r - r.mean() * closed))
    expected = (truth @ (r - r.mean() * closed).reshape(-1)).reshape(shape)
    shift = np.mean(np.asarray(found) - expected) if closed else 0.0  # its mean is zero by width, not by cell
    np.testing.assert_allclose(found - shift, expected, rtol=1e-10, atol=1e-11)


def test_a_constant_in_a_closed_box_has_no_pressure(x64):
    """The eigenvalue zero is found as a rounding error of either sign, by which nothing must be divided."""
    for n in range(2, 12):
        solver = tensor_product(Domain.from_mask(np.full((n, n + 1), 2), spacing=0.1))
        assert float(jnp.abs(solver(jnp.ones((n, n + 1)))).max()) < 1e-10


def test_a_direct_solver_is_a_preconditioner_that_needs_one_step(x64):
    domain = gallery.box(16, 2)
    rhs = jnp.asarray(gallery.plume(domain))
    for solver in (sine_transform(domain), tensor_product(domain)):
        found, info = poisson.solve(domain, rhs, rtol=1e-10, preconditioner=solver)
        assert info.converged and info.steps == 1
        np.testing.assert_allclose(found, solver(rhs), atol=1e-12 * float(jnp.abs(found).max()))


def test_what_is_not_a_box_is_named():
    hole = np.full((4, 5), 2)
    hole[2, 3] = 1
    for solver in (sine_transform, tensor_product):
        with pytest.raises(ValueError, match=r"1 cells that are not fluid, the first at \(2, 3\) with code 1"):
            solver(Domain.from_mask(hole, edges=AIR))
    with pytest.raises(ValueError, match=r"beyond axis 1 lie \(1, 3\), expected air"):
        sine_transform(Domain.from_mask(np.full((4, 5), 2), edges=[AIR, (SOLID, AIR)]))
    with pytest.raises(ValueError, match="widths along axis 0 vary"):
        sine_transform(Domain.from_mask(np.full((2, 2), 2), edges=AIR, spacing=[[1.0, 2.0], 1.0]))
