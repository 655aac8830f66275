"""Our operators in SciPy, pyamg and lineax, and theirs here, against dense matrices and true residuals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from solvers import conjugate_direction, gallery, multigrid, poisson
from solvers.adapters import ConjugateDirection, Unknowns, as_lineax, as_scipy, from_pyamg, from_scipy, to_csr
from solvers.poisson import Domain, laplacian
from solvers.stencil import Stencil, dense

pytestmark = pytest.mark.usefixtures("quick_compilation")


@st.composite
def domains(draw):
    shape = draw(st.sampled_from([(1, 4), (5, 3), (3, 2, 4)]))  # few, as each is compiled for
    ndim = len(shape)
    cells = draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([1, 2, 2, 3])))
    cells.flat[0] = 2
    edges = [draw(st.tuples(*[st.sampled_from([1, 3])] * 2)) for _ in range(ndim)]
    edges[0] = (3, edges[0][1])  # so that the first cell has an unknown
    widths = draw(st.sampled_from(["unit", "alike", "vary"]))
    spacing = {"unit": 1.0, "alike": [1.0, 2.0, 0.5][:ndim], "vary": [np.linspace(1, 2, n) for n in shape]}[widths]
    return {"cells": cells, "edges": edges, "spacing": spacing}


@pytest.fixture(scope="module")
def system():
    """Smoke around a ball in 2-D: domain, stencil, and a right-hand side in float64, zero outside the unknowns."""
    domain = gallery.smoke_sphere(24, 2)
    return domain, laplacian(domain), np.asarray(gallery.plume(domain), np.float64)


def true_residual(a, x, b):
    on = Unknowns.of(a)
    matrix, x, b = to_csr(a), np.asarray(x, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(matrix @ on.gather(x) - on.gather(b)) / np.linalg.norm(on.gather(b))


# ---- matrices ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(arguments=domains())
def test_the_sparse_matrix_is_the_dense_one(arguments, x64):
    a = laplacian(Domain.from_mask(**arguments))
    on, matrix = Unknowns.of(a), to_csr(a)
    full = np.asarray(dense(a, jnp.float64))
    np.testing.assert_array_equal(on.index, np.flatnonzero(np.diag(full) > 0))
    np.testing.assert_allclose(matrix.toarray(), full[np.ix_(on.index, on.index)], rtol=1e-15)
    assert matrix.has_sorted_indices and matrix.nnz == np.count_nonzero(full)
    v = np.linspace(-1, 1, on.index.size)
    np.testing.assert_allclose(as_scipy(a) @ v, matrix @ v, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(on.gather(on.scatter(v)), v)
    assert not on.scatter(v).reshape(-1)[np.setdiff1d(np.arange(a.diagonal.size), on.index)].any()


def test_the_matrix_of_a_coarse_stencil(x64):
    coarse = multigrid.hierarchy(laplacian(gallery.random_blobs(12, 2, 3)), jnp.float64).levels[1]
    on = Unknowns.of(coarse)
    full = np.asarray(dense(coarse, jnp.float64))[np.ix_(on.index, on.index)]
    np.testing.assert_allclose(to_csr(coarse).toarray(), full, rtol=1e-14)
    assert to_csr(coarse, np.float32).dtype == np.float32


# ---- SciPy -------------------------------------------------------------------------------------------------------------


def test_scipy_takes_the_preconditioner_unchanged(x64):
    domain = gallery.smoke_sphere(32)
    a, rhs = laplacian(domain), np.asarray(gallery.plume(domain))
    on, m, steps = Unknowns.of(a), multigrid.preconditioner(a), []
    x, code = scipy.sparse.linalg.cg(
        as_scipy(a), on.gather(rhs), M=as_scipy(m, a), rtol=1e-6, callback=lambda x: steps.append(1)
    )
    _, info = conjugate_direction.conjugate_gradient(a, jnp.asarray(on.scatter(on.gather(rhs))), m, rtol=1e-6)
    assert code == 0 and x.dtype == np.float64
    assert len(steps) <= 8 and abs(len(steps) - int(info.steps)) <= 1
    assert true_residual(a, on.scatter(x), rhs) <= 1e-6


def test_the_dtype_of_a_vector_is_kept(system):
    _, a, rhs = system
    on = Unknowns.of(a)
    assert (as_scipy(a) @ on.gather(rhs).astype(np.float32)).dtype == np.float32
    # Without x64 a product in float64 would be one in float32; of a preconditioner that is all one needs.
    with pytest.raises(TypeError, match=r"float64, which JAX does not have without x64"):
        as_scipy(a) @ on.gather(rhs)
    z = as_scipy(multigrid.preconditioner(a), a) @ on.gather(rhs)
    assert z.dtype == np.float64
    x, code = scipy.sparse.linalg.cg(
        to_csr(a), on.gather(rhs), M=as_scipy(multigrid.preconditioner(a), a), rtol=1e-10, maxiter=15
    )
    assert code == 0 and true_residual(a, on.scatter(x), rhs) <= 1e-10


def test_wrong_inputs_to_scipy_are_named(system):
    _, a, _ = system
    with pytest.raises(ValueError, match=r"as_scipy: on is missing"):
        as_scipy(multigrid.preconditioner(a))
    with pytest.raises(ValueError, match=r"operator: has shape \(3, 3\), expected"):
        from_scipy(np.eye(3), a)
    with pytest.raises(TypeError, match=r"ml: is of type ndarray"):
        from_pyamg(np.eye(3), a)
    with pytest.raises(ValueError, match=r"vector: has shape \(3,\)"):
        Unknowns.of(a).scatter(np.ones(3))
    with pytest.raises(ValueError, match=r"grid: has shape \(3,\)"):
        Unknowns.of(a).gather(np.ones(3))
    with pytest.raises(ValueError, match="no unknown"):
        Unknowns.of(Stencil(jnp.zeros((2, 2)), None, (1.0, 1.0)))


# ---- pyamg -------------------------------------------------------------------------------------------------------------


def test_a_pyamg_hierarchy_preconditions_our_iteration(system, x64):
    pyamg = pytest.importorskip("pyamg")
    domain, a, rhs = system
    ml = pyamg.smoothed_aggregation_solver(to_csr(a))
    m = from_pyamg(ml, a)
    on = Unknowns.of(a)
    z = np.asarray(m(jnp.asarray(rhs)))
    # One V-cycle from zero, as pyamg itself does it.
    by_pyamg = ml.solve(on.gather(rhs), maxiter=1, cycle="V", tol=1e-30)
    np.testing.assert_allclose(on.gather(z), by_pyamg, atol=1e-12 * np.abs(by_pyamg).max())
    assert not z[~np.asarray(a.unknown)].any()
    x, info = poisson.solve(domain, jnp.asarray(rhs), rtol=1e-8, preconditioner=m)
    assert info.converged and info.steps <= 15 and true_residual(a, x, rhs) <= 1e-8
    # And ours as the preconditioner of pyamg's own conjugate gradients.
    x, code = pyamg.krylov.cg(
        to_csr(a), on.gather(rhs), M=as_scipy(multigrid.preconditioner(a), a), tol=1e-8, maxiter=12
    )
    assert code == 0 and true_residual(a, on.scatter(x), rhs) <= 1e-8


def test_the_callback_is_jitted_and_mapped(system, x64):
    _, a, rhs = system
    on, diagonal = Unknowns.of(a), to_csr(a).diagonal()
    m = from_scipy(scipy.sparse.linalg.LinearOperator(to_csr(a).shape, lambda v: v / diagonal, dtype=float), a)
    r = jnp.stack([jnp.asarray(rhs), 2 * jnp.asarray(rhs)])
    z = jax.jit(jax.vmap(m))(r)
    np.testing.assert_allclose(on.gather(z[1]), 2 * on.gather(rhs) / diagonal, rtol=1e-14)
    assert m(r[0].astype(jnp.float32)).dtype == jnp.float32
    half = m(r[0].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, on.scatter(on.gather(rhs) / diagonal), rtol=0.02)  # two roundings of 2^-8


def test_the_callback_sees_all_digits_although_x64_is_local_to_a_thread(x64):
    """`x64` enables it for this thread; XLA calls back from others too where it has something else to do meanwhile."""
    a = laplacian(gallery.box(4, 2))
    seen = []
    m = from_scipy(scipy.sparse.linalg.LinearOperator((16, 16), lambda v: seen.append(v[0]) or v / 3, dtype=float), a)
    seen.clear()

    @jax.jit
    def busy(r):
        return jax.lax.fori_loop(0, 300, lambda i, c: (m(c[0]) + 1, jnp.sin(c[1] @ c[1])), (r, jnp.eye(100)))

    z, _ = busy(jnp.full(a.shape, 1 + 1e-12))
    assert len(seen) == 300 and seen[1] == (1 + 1e-12) / 3 + 1
    np.testing.assert_allclose(z, 1.5, rtol=1e-15)


# ---- lineax ------------------------------------------------------------------------------------------------------------


def lineax_cg(b, rtol):
    return lineax.CG(rtol=0.0, atol=rtol * float(np.linalg.norm(b)), norm=optimistix.two_norm, max_steps=100)


def test_lineax_takes_operator_and_preconditioner(system, x64):
    _, a, rhs = system
    m = as_lineax(multigrid.preconditioner(a), a)
    found = lineax.linear_solve(as_lineax(a), jnp.asarray(rhs), lineax_cg(rhs, 1e-8), options={"preconditioner": m})
    # Its criterion asks for small last steps too, one more step than ours.
    assert found.stats["num_steps"] <= 12 and true_residual(a, found.value, rhs) <= 1e-8


def test_the_lineax_operator_is_the_identity_elsewhere(x64):
    a = laplacian(gallery.dam_break(8, 2))
    on = np.asarray(a.unknown).reshape(-1)
    matrix = np.asarray(as_lineax(a).as_matrix())
    np.testing.assert_allclose(matrix, np.asarray(dense(a, jnp.float64)) + np.diag(~on), atol=0)
    assert as_lineax(a).in_structure().dtype == jnp.float64
    assert as_lineax(a, dtype=jnp.float32).in_structure().dtype == jnp.float32
    b = jnp.arange(64.0).reshape(8, 8)  # not zero outside: then x is b there
    x = lineax.linear_solve(as_lineax(a), b, ConjugateDirection(rtol=1e-10)).value
    np.testing.assert_allclose(x.reshape(-1), np.linalg.solve(matrix, np.arange(64.0)), rtol=1e-7)


def test_our_solver_in_lineax(system, x64):
    _, a, rhs = system
    m, b = multigrid.preconditioner(a), jnp.asarray(rhs)
    _, info = conjugate_direction.solve(a, b, direction=m, rtol=1e-8)
    for solver, options in (
        (ConjugateDirection(rtol=1e-8, direction=m), {}),
        (ConjugateDirection(rtol=1e-8), {"preconditioner": as_lineax(m, a)}),
        (ConjugateDirection(rtol=1e-8, direction=jnp.zeros_like), {"preconditioner": as_lineax(m, a)}),  # falls back
    ):
        found = lineax.linear_solve(as_lineax(a), b, solver, options=options)
        assert found.result == lineax.RESULTS.successful
        assert abs(int(found.stats["num_steps"]) - int(info.steps)) <= 1
        assert true_residual(a, found.value, rhs) <= 1e-8 and found.stats["residual"] <= 1e-8
    again = lineax.linear_solve(
        as_lineax(a), b, ConjugateDirection(rtol=1e-6, direction=m), options={"y0": found.value}
    )
    assert again.stats["num_steps"] == 0


def test_our_solver_under_jit_vmap_and_grad(x64):
    a = laplacian(gallery.random_blobs(8, 2, 1))
    operator = as_lineax(a)
    matrix = np.asarray(operator.as_matrix())
    solver = ConjugateDirection(rtol=1e-12, direction=as_lineax(multigrid.preconditioner(a), a))
    b = jax.random.normal(jax.random.key(0), (3, 8, 8))

    @eqx.filter_jit
    def solve(operator, b):
        return lineax.linear_solve(operator, b, solver).value

    truth = np.linalg.solve(matrix, np.asarray(b).reshape(3, -1).T).T.reshape(b.shape)
    np.testing.assert_allclose(solve(operator, b[0]), truth[0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(jax.vmap(lambda b: solve(operator, b))(b), truth, rtol=1e-8, atol=1e-9)
    # d Σ x / d b = A⁻¹ 1, and along A itself d x = -A⁻¹ dA x.
    ones = np.linalg.solve(matrix, np.ones(64)).reshape(8, 8)
    gradient = jax.jit(jax.grad(lambda b: solve(operator, b).sum()))(b[0])
    np.testing.assert_allclose(gradient, ones, rtol=1e-8, atol=1e-9)
    # Backward with the preconditioner too, as in so few steps there is no other way.
    options = {"preconditioner": solver.direction}
    short = ConjugateDirection(rtol=1e-8, max_steps=11)
    gradient = jax.grad(lambda b: lineax.linear_solve(operator, b, short, options=options).value.sum())(b[0])
    np.testing.assert_allclose(gradient, ones, rtol=1e-6, atol=1e-7)
    assert not conjugate_direction.solve(a, jnp.ones((8, 8)) * a.unknown, rtol=1e-8, max_steps=11)[1].converged

    def scaled(s):
        harder = as_lineax(Stencil(s * a.diagonal, None, (1.0, 1.0)))
        return solve(harder, b[0]).sum()

    change = -ones.reshape(-1) @ np.diag(np.asarray(a.diagonal, float).reshape(-1)) @ truth[0].reshape(-1)
    np.testing.assert_allclose(jax.grad(scaled)(1.0), change, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(scaled, (1.0,), (1.0,))[1], change, rtol=1e-6)


def test_systems_of_several_arrays(x64):
    """A pytree: x - y/2 = b_x, y - x/2 = b_y."""
    b = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([[0.0], [3.0]])}
    flip = lambda t: {"x": t["y"].reshape(2), "y": t["x"].reshape(2, 1)}  # noqa: E731
    operator = lineax.FunctionLinearOperator(
        lambda t: jax.tree.map(lambda u, v: u - v / 2, t, flip(t)),
        jax.eval_shape(lambda: b),
        lineax.positive_semidefinite_tag,
    )
    asked = []

    def direction(r):
        asked.append(r.keys())
        return r

    found = lineax.linear_solve(operator, b, ConjugateDirection(rtol=1e-12, direction=direction)).value
    np.testing.assert_allclose(found["x"], [4 / 3, 14 / 3], rtol=1e-10)
    np.testing.assert_allclose(found["y"], [[2 / 3], [16 / 3]], rtol=1e-10)
    assert asked and all(k == {"x", "y"} for k in asked)


def test_failures_have_the_results_of_lineax(x64):
    a = laplacian(gallery.smoke_sphere(8, 2))
    b = jnp.asarray(gallery.plume(gallery.smoke_sphere(8, 2)))

    def result(operator, b=b, **options):
        return lineax.linear_solve(operator, b, ConjugateDirection(**options), throw=False).result

    structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
    tagged = lambda f: lineax.FunctionLinearOperator(f, structure, lineax.positive_semidefinite_tag)  # noqa: E731
    assert result(as_lineax(a)) == lineax.RESULTS.successful
    assert result(as_lineax(a), max_steps=2) == lineax.RESULTS.max_steps_reached
    assert result(as_lineax(a), direction=lambda r: jnp.roll(r, 1) * 0) == lineax.RESULTS.stagnation
    assert result(tagged(lambda v: -v)) == lineax.RESULTS.breakdown
    assert result(tagged(lambda v: v.at[0].set(0)), jnp.ones_like(b)) == lineax.RESULTS.singular
    assert result(as_lineax(a), b.at[0, 0].set(jnp.nan)) == lineax.RESULTS.nonfinite_input
    with pytest.raises(Exception, match="maximum number of solver steps"):
        lineax.linear_solve(as_lineax(a), b, ConjugateDirection(max_steps=2))
    with pytest.raises(ValueError, match=r"operator: is not tagged"):
        result(lineax.FunctionLinearOperator(lambda v: v, structure))
    with pytest.raises(ValueError, match=r"expected the same structure"):
        result(lineax.MatrixLinearOperator(jnp.ones((2, 3))), jnp.ones(2))
    with pytest.raises(ValueError, match=r"as_lineax: on is missing"):
        as_lineax(multigrid.preconditioner(a))
