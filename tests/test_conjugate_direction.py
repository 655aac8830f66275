"""The deep conjugate direction method: against dense solves and SciPy, its safeguards, its derivatives, its refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import conjugate_direction as cd
from solvers import gallery, multigrid, poisson
from solvers.conjugate_direction import Status
from solvers.operators import dot
from solvers.stencil import residual

DIRECTIONS = {
    "residual": lambda r: r,
    "opposite": lambda r: -r,
    "smooth": lambda r: r + 0.3 * jnp.tanh(3 * r) * jnp.max(jnp.abs(r)),
    "biased": lambda r: 5 * r + 0.1 * jnp.cos(jnp.arange(r.size, dtype=r.dtype)),
}
EPS = float(np.finfo(np.float64).eps)


def system(n: int, seed: int, kappa: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    q, _ = np.linalg.qr(draw.standard_normal((n, n)))
    a = (q * np.geomspace(1 / kappa, 1, n)) @ q.T
    return (a + a.T) / 2, draw.standard_normal(n)


def line(n: int, neumann: bool = False) -> scipy.sparse.csr_matrix:
    a = scipy.sparse.diags([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], [-1, 0, 1]).tolil()
    if neumann:
        a[0, 0] = a[n - 1, n - 1] = 1
    return a.tocsr()


def relative(a: np.ndarray, b: np.ndarray, x: object) -> float:
    return float(np.linalg.norm(b - a @ np.asarray(x, np.float64)) / np.linalg.norm(b))


# ------------------------------------------------------------------------------------------------ the solution


@pytest.mark.slow
@given(st.sampled_from([1, 2, 12]), st.sampled_from(sorted(DIRECTIONS)), st.integers(0, 2**31), st.integers(-30, 30))
@settings(max_examples=20)
def test_the_solution_is_that_of_a_dense_solve(x64, n, name, seed, decade):
    a, b = system(n, seed)
    b = b * 10.0**decade
    x, info = cd.solve(a, b, direction=DIRECTIONS[name], rtol=1e-10, fallback="residual")
    assert info.converged and Status(int(info.status)) == Status.CONVERGED
    assert float(info.residual) <= 1e-10
    assert relative(a, b, x) <= 1e-10 * (1 + 1e-3)  # the same sum in another order
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=0, atol=1e-7 * np.abs(x).max())  # κ = 100


def test_conjugate_gradients_take_the_steps_of_scipy(x64):
    a, b = system(60, 0, 20.0)
    count = []
    scipy.sparse.linalg.cg(a, b, rtol=1e-8, callback=lambda _: count.append(1))
    for x, info in (cd.solve(a, b, rtol=1e-8), cd.conjugate_gradient(a, b, rtol=1e-8)):
        assert abs(int(info.steps) - len(count)) <= 1  # rounding: few enough steps for conjugacy to last
        assert relative(a, b, x) <= 1.001e-8


def test_the_preconditioned_recursion_takes_the_steps_of_scipy(x64):
    a, b = system(60, 1, 20.0)
    scale = np.exp(np.linspace(0, 4, 60))
    a, m = scale[:, None] * a * scale, np.diag(1 / (scale**2 * np.diag(a)))
    count = []
    scipy.sparse.linalg.cg(a, b, M=m, rtol=1e-8, maxiter=2000, callback=lambda _: count.append(1))
    _, two_term = cd.conjugate_gradient(a, b, M=m, rtol=1e-8, max_steps=2000)
    _, stored = cd.solve(a, b, direction=m, memory=1, rtol=1e-8, max_steps=2000)
    for info in (two_term, stored):
        assert info.converged and abs(int(info.steps) - len(count)) <= 2  # rounding


@pytest.mark.parametrize("kind", ["dense", "sparse", "lineax", "function", "module"])
def test_every_form_of_an_operator(x64, kind):
    a, b = line(20).toarray(), np.ones(20)

    class Scaled(eqx.Module):
        matrix: jax.Array

        def __call__(self, v):
            return self.matrix @ v

    forms = {
        "dense": a,
        "sparse": line(20),
        "lineax": lx.MatrixLinearOperator(jnp.asarray(a), lx.positive_semidefinite_tag),
        "function": lambda v: jnp.asarray(a) @ v,
        "module": Scaled(jnp.asarray(a)),
    }
    x, info = cd.solve(forms[kind], b, rtol=1e-9)
    assert info.converged and relative(a, b, x) <= 1.001e-9


def test_grids_and_histories(x64):
    def laplacian(v):
        w = jnp.pad(v, 1)
        return 4 * v - w[2:, 1:-1] - w[:-2, 1:-1] - w[1:-1, 2:] - w[1:-1, :-2]

    b = np.random.default_rng(0).standard_normal((6, 7))
    x, info = cd.solve(laplacian, b, rtol=1e-8, max_steps=80, recompute_every=3)
    steps = int(info.steps)
    assert x.shape == b.shape and info.residuals.shape == (81,)
    assert np.isfinite(info.residuals[: steps + 1]).all() and np.isnan(info.residuals[steps + 1 :]).all()
    assert float(info.residuals[0]) == pytest.approx(1.0) and float(info.residuals[steps]) == float(info.residual)


def test_a_start_is_used_and_zero_has_the_solution_zero(x64):
    a, b = system(12, 3)
    exact = np.linalg.solve(a, b)
    assert int(cd.solve(a, b, x0=exact, rtol=1e-6)[1].steps) == 0
    x, info = cd.solve(a, 0 * b, x0=exact)
    assert info.converged and not np.any(x)


def test_iterates_are_those_of_solve_and_can_be_trained_through(x64):
    a, b = system(12, 4)
    found = cd.iterates(a, b, 5, direction=DIRECTIONS["biased"])
    x, _ = cd.solve(a, b, direction=DIRECTIONS["biased"], rtol=1e-15, max_steps=5)
    np.testing.assert_allclose(found.x[-1], x, rtol=1e-10)

    def left(weight):
        e = np.linalg.solve(a, b) - cd.iterates(a, b, 3, direction=lambda r: r + weight * jnp.tanh(3 * r)).x[-1]
        return e @ a @ e

    slope = (left(0.5 + 1e-6) - left(0.5 - 1e-6)) / 2e-6
    assert float(jax.grad(left)(0.5)) == pytest.approx(float(slope), rel=1e-5)  # central differences: 1e-10/1e-6


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_stagnation_is_named_and_the_fallback_helps(x64):
    a, b = system(30, 5)
    _, info = cd.solve(a, b, direction=jnp.ones_like)
    assert Status(int(info.status)) == Status.STAGNATED and not info.converged
    x, info = cd.solve(a, b, direction=jnp.ones_like, fallback="residual", rtol=1e-9)
    assert info.converged and int(info.fallback_steps) > 0 and relative(a, b, x) <= 1.001e-9


def test_a_direction_of_nan_is_named_and_the_fallback_helps(x64):
    a, b = system(30, 6)
    assert Status(int(cd.solve(a, b, direction=lambda r: r * jnp.nan)[1].status)) == Status.NOT_FINITE
    x, info = cd.solve(a, b, direction=lambda r: jnp.where(jnp.max(jnp.abs(r)) > 0.35, r, jnp.nan), fallback=np.eye(30))
    assert info.converged and relative(a, b, x) <= 1.001e-6


def test_negative_curvature_is_named_and_no_fallback_hides_it(x64):
    a, b = system(30, 7)
    shifted = lambda v: jnp.asarray(a) @ v - 0.5 * v  # noqa: E731
    for fallback in (None, "residual"):
        assert Status(int(cd.solve(shifted, b, fallback=fallback)[1].status)) == Status.NOT_POSITIVE_DEFINITE


def test_a_singular_system_is_solved_if_it_can_be(x64):
    a, b = line(20, neumann=True), np.random.default_rng(8).standard_normal(20)
    x, info = cd.solve(a, b - b.mean(), rtol=1e-9)
    assert info.converged and relative(a, b - b.mean(), x) <= 1.001e-9
    _, info = cd.solve(a, b)
    assert not info.converged and float(info.residual) >= abs(b.mean()) * np.sqrt(20) / np.linalg.norm(b) * 0.99
    assert Status(int(info.status)) in (Status.INCONSISTENT, Status.STAGNATED, Status.PRECISION)


def test_single_precision_does_not_claim_what_it_has_not(x64):
    a, b = system(60, 9, 1e6)
    _, info = cd.solve(a.astype(np.float32), b.astype(np.float32), rtol=1e-6, max_steps=3000)
    assert info.residual.dtype == np.float64
    assert bool(info.converged) == (float(info.residual) <= 1e-6)
    assert not info.converged  # κ ε = 0.1


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_low_precision_directions_reach_high_precision(x64, name):
    a, b = system(40, 10)
    inverse = jnp.linalg.inv(jnp.asarray(a)).astype(name)
    x, info = cd.solve(a, b, direction=lambda r: inverse @ r, direction_dtype=name, rtol=1e-10)
    assert info.converged and relative(a, b, x) <= 1.001e-10
    assert int(info.steps) <= 12


@pytest.mark.parametrize("rtol", [1e-6, 1e-12])
def test_a_recursion_in_float32_reaches_float64(x64, rtol):
    """As κ = 16 000 is far above what float32 could solve to 1e-6, x and the residual that decides are not in it."""
    domain = gallery.smoke_sphere(24, seed=3)
    a = poisson.laplacian(domain)
    m = multigrid.preconditioner(a)
    b = jnp.where(a.unknown, 1.0 + jax.random.normal(jax.random.key(1), domain.shape, jnp.float64), 0)
    x, info = cd.conjugate_gradient(a, b, m, rtol=rtol, direction_dtype=jnp.float32)
    assert info.converged and x.dtype == np.float64
    left = np.linalg.norm(residual(a, np.asarray(x), np.asarray(b))) / np.linalg.norm(b)
    assert left <= 1.01 * rtol
    np.testing.assert_allclose(info.residual, left, rtol=1e-3, atol=1e-13)  # two ways of rounding in float64
    _, full = cd.conjugate_gradient(a, b, m, rtol=rtol)
    assert int(info.steps) <= int(full.steps) + 1


def test_derivatives_through_a_recursion_in_float32(x64):
    domain = gallery.smoke_sphere(10, 2)
    a = poisson.laplacian(domain)
    m = multigrid.preconditioner(a)
    b, u = (jnp.where(a.unknown, v, 0) for v in jax.random.normal(jax.random.key(2), (2, *domain.shape), jnp.float64))

    def solved(b, low):
        return jnp.vdot(u, cd.conjugate_gradient(a, b, m, rtol=1e-10, direction_dtype=low, check=False)[0])

    np.testing.assert_allclose(jax.grad(solved)(b, jnp.float32), jax.grad(solved)(b, None), atol=1e-8)


def test_the_dtype_of_a_recursion_is_checked(x64):
    with pytest.raises(ValueError, match="direction_dtype is bfloat16, expected float32 or that of b, float64"):
        cd.conjugate_gradient(2 * np.eye(4), np.ones(4), direction_dtype=jnp.bfloat16)


@pytest.mark.parametrize("shape", [(64, 256, 128), (63, 129, 127), (1 << 21,)])
def test_a_product_of_a_million_terms_keeps_the_digits_of_float32(shape):
    draw = np.random.default_rng(5)
    u, v = (draw.uniform(0, 1, shape).astype(np.float32) for _ in range(2))
    # Added up in turn, 2e6 terms are off by up to 2e6 roundings, and by 5e-4 for these; in parts by a few.
    np.testing.assert_allclose(jax.jit(dot)(u, v), np.sum(u.astype(float) * v), rtol=2e-6)


def test_without_64_bits():
    a, b = system(30, 11, 10.0)
    x, info = cd.solve(a, b, rtol=1e-5)
    assert x.dtype == np.float32 and info.residual.dtype == np.float64 and info.converged
    with pytest.raises(ValueError, match="rtol is 1e-10, which float32 does not reach"):
        cd.solve(a, b, rtol=1e-10)


# ------------------------------------------------------------------------------------------- transformations


def test_many_right_hand_sides(x64):
    a, _ = system(12, 12)
    b = np.random.default_rng(12).standard_normal((4, 12))
    x, info = jax.jit(jax.vmap(lambda b: cd.solve(a, b, rtol=1e-9, fallback="residual")))(b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b.T).T, atol=1e-6)
    assert info.converged.all() and info.residuals.shape == (4, 1001)


def test_derivatives_are_those_of_the_inverse(x64):
    a, b = system(8, 13)
    x = np.linalg.solve(a, b)
    weight = np.cos(np.arange(8))
    back = np.linalg.solve(a, weight)
    loss = lambda a, b: jnp.sum(weight * cd.solve(a, b, rtol=1e-12)[0])  # noqa: E731
    for transform in (lambda f: f, jax.jit):
        d_a, d_b = transform(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(d_b, back, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(d_a, -np.outer(back, x), rtol=1e-6, atol=1e-6)
    closed = lambda t: cd.solve(lambda v: jnp.asarray(a) @ v + t * v, b, rtol=1e-12)[0] @ weight  # noqa: E731
    assert float(jax.grad(closed)(0.0)) == pytest.approx(-float(back @ x), rel=1e-7)
    _, forward = jax.jvp(lambda b: cd.solve(a, b, rtol=1e-12)[0], (jnp.asarray(b),), (jnp.asarray(weight),))
    np.testing.assert_allclose(forward, back, rtol=1e-7, atol=1e-8)


def test_a_failed_cotangent_run_is_nan_and_not_wrong(x64):
    a, b = system(12, 14)
    slope = jax.grad(lambda b: jnp.sum(cd.solve(a, b, max_steps=2)[0]))(jnp.asarray(b))
    assert np.isnan(slope).all()


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": np.ones((3, 4))}, ValueError, r"A has shape \(3, 4\), expected a square matrix"),
        ({"b": np.ones(5)}, ValueError, r"b has shape \(5,\), expected \(4,\)"),
        ({"b": np.ones((4, 2))}, ValueError, r"for many right-hand sides use jax.vmap"),
        ({"b": np.array([1, np.nan, 1, 1])}, ValueError, "b has 1 entries that are not finite"),
        ({"b": np.ones(4) * 1j}, ValueError, "expected real numbers"),
        ({"A": np.triu(np.ones((4, 4)))}, ValueError, "A is not symmetric"),
        ({"A": -np.eye(4)}, ValueError, r"not positive semi-definite: A\[0, 0\] = -1 is negative"),
        ({"A": np.ones((4, 4)) - np.eye(4)}, ValueError, r"not positive semi-definite: \|A\["),
        ({"A": "matrix"}, TypeError, "expected a function"),
        ({"A": lambda v: v[:2]}, ValueError, r"A maps shape \(4,\) to \(2,\)"),
        ({"direction": lambda r: r[:2]}, ValueError, r"direction maps shape"),
        ({"fallback": "cg"}, ValueError, "fallback is 'cg'"),
        ({"x0": np.ones(3)}, ValueError, r"x0 has shape \(3,\)"),
        ({"rtol": 0}, ValueError, "rtol is 0, expected a positive number"),
        ({"rtol": 1e-17}, ValueError, "float64 does not reach"),
        ({"atol": -1.0}, ValueError, "atol is -1.0"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"memory": -1}, ValueError, "memory is -1"),
        ({"direction_dtype": "int32"}, ValueError, "direction_dtype is int32"),
    ],
)
def test_bad_input_is_named(x64, no_shape_checks, change, error, message):
    given = {"A": 2 * np.eye(4), "b": np.ones(4), **change}
    with pytest.raises(error, match=message):
        cd.solve(given.pop("A"), given.pop("b"), **given)


def test_throwing(x64):
    a, b = system(30, 15)
    with pytest.raises(RuntimeError, match=r"not converged after 3 steps.*MAX_STEPS, max_steps were taken"):
        cd.solve(a, b, max_steps=3, throw=True)
    cd.solve(a, b, throw=True)


def test_the_recursion_refuses_what_is_no_fixed_preconditioner(x64):
    a, b = system(30, 16)
    turn = np.triu(np.ones((30, 30)), 1)
    with pytest.raises(ValueError, match=r"M is not linear.*direction=M"):
        cd.conjugate_gradient(a, b, M=lambda r: r + 0.3 * jnp.abs(r))
    with pytest.raises(ValueError, match="M is not symmetric"):
        cd.conjugate_gradient(a, b, M=np.eye(30) + 0.1 * (turn - turn.T))
    with pytest.raises(ValueError, match="M is not positive definite"):
        cd.conjugate_gradient(a, b, M=-np.eye(30))


def test_the_short_recursion_looks_into_a_step_that_is_suspicious(x64):
    n = 40
    singular = scipy.sparse.csr_matrix(line(n, neumann=True))
    b = np.sin(np.arange(n)) + 0.3  # with a part outside the range
    _, info = cd.conjugate_gradient(singular, b, rtol=1e-10)
    assert Status(int(info.status)) in (Status.INCONSISTENT, Status.PRECISION) and not info.converged
    indefinite = np.diag(np.r_[np.ones(n - 1), -1e-3])
    _, info = cd.conjugate_gradient(jax.tree_util.Partial(jnp.matmul, jnp.asarray(indefinite)), np.ones(n), rtol=1e-10)
    assert Status(int(info.status)) == Status.NOT_POSITIVE_DEFINITE
    _, info = cd.conjugate_gradient(lambda v: v * jnp.where(v > 0.5, jnp.nan, 1), np.ones(n), rtol=1e-10)
    assert Status(int(info.status)) == Status.NOT_FINITE


def test_a_preconditioner_that_says_it_is_symmetric_is_not_tried(x64):
    class Bent(eqx.Module):
        symmetric: bool = eqx.field(static=True)

        def __call__(self, r):
            return r + r**3

    a, b = system(12, 3)
    with pytest.raises(ValueError, match="not linear"):
        cd.conjugate_gradient(a, b, M=Bent(False))
    cd.conjugate_gradient(a, b, M=Bent(True))


def test_a_shipped_direction_solves_on_a_stencil_what_is_zero_outside_the_fluid(x64):
    domain = gallery.smoke_sphere(16)
    a = poisson.laplacian(domain)
    outside = ~np.asarray(domain.fluid)
    b = jnp.asarray(np.where(outside, 7.0, gallery.plume(domain)))  # there it does not matter
    x, info = cd.solve(a, b, direction=cd.load("poisson3d"), rtol=1e-6, max_steps=100, direction_dtype=jnp.float32)
    _, plain = cd.solve(a, b, rtol=1e-6)
    assert bool(info.converged) and not np.asarray(x)[outside].any()
    assert int(info.steps) < 0.5 * int(plain.steps)  # a fifth was measured
    assert np.linalg.norm(residual(a, np.asarray(x), np.asarray(b))) <= 1.001e-6 * np.linalg.norm(gallery.plume(domain))
    with pytest.raises(ValueError, match=r"there are \['poisson2d', 'poisson3d'\]"):
        cd.load("poisson4d")
