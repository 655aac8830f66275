"""The second-moment operator, the threshold and its bounds, and the networks, against dense and exact oracles."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import sgd_stability as sgd
from theory import training

pytestmark = pytest.mark.usefixtures("x64")

FAMILIES = ("gauss", "sphere", "decay", "heavy", "relu")
SHAPES = ((1, 3), (6, 5), (20, 5), (4, 8))  # few: every shape compiles once
SCHEMES = ("with", "without", "bernoulli")


def features(family: str, n: int, p: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if family == "heavy":
        return rng.standard_t(3, size=(n, p))
    a = rng.standard_normal((n, p))
    if family == "sphere":
        return a / np.linalg.norm(a, axis=1, keepdims=True) * np.sqrt(p)
    if family == "decay":
        return a / np.arange(1, p + 1)
    if family == "relu":
        return np.maximum(rng.standard_normal((n, 5)) @ rng.standard_normal((5, p)), 0) + 1e-3 * a
    return a


def sampling(scheme: str, batch: int, n: int) -> sgd.Sampling:
    if scheme == "with":
        return sgd.with_replacement(batch)
    return (sgd.without_replacement if scheme == "without" else sgd.bernoulli)(batch, n)


def dense_threshold(a: np.ndarray, mean: float, noise: float) -> float:
    """η* from Kronecker products and SciPy's generalised eigenvalues on the range: no code shared."""
    n = a.shape[0]
    basis = scipy.linalg.orth(a.T, rcond=1e-10)
    b = a @ basis
    h = b.T @ b / n
    eye = np.eye(len(h))
    c = (np.kron(eye, h) + np.kron(h, eye)) / 2
    d = mean * np.kron(h, h) + noise / n * sum(np.kron(np.outer(v, v), np.outer(v, v)) for v in b)
    return 2 / scipy.linalg.eigh(d, c, eigvals_only=True)[-1]


problems = st.tuples(
    st.sampled_from(FAMILIES),
    st.sampled_from(SHAPES),
    st.sampled_from(SCHEMES),
    st.integers(1, 4),
    st.integers(0, 2**31),
)


def make(problem) -> tuple[np.ndarray, sgd.Sampling]:
    family, (n, p), scheme, batch, seed = problem
    return features(family, n, p, seed), sampling(scheme, min(batch, n), n)


# --------------------------------------------------------------------------------------- sampling and operator


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_two_numbers_of_a_sampling_scheme_match_full_enumeration(scheme, batch):
    n = 4
    a = features("gauss", n, 3, 0)
    root = features("gauss", 3, 3, 1)
    sigma = root + root.T
    if scheme == "with":
        draws = [(i, 1 / n**batch) for i in itertools.product(range(n), repeat=batch)]
    elif scheme == "without":
        draws = [(i, 1 / math.comb(n, batch)) for i in itertools.combinations(range(n), batch)]
    else:
        q = batch / n
        subsets = [s for k in range(n + 1) for s in itertools.combinations(range(n), k)]
        draws = [(s, q ** len(s) * (1 - q) ** (n - len(s))) for s in subsets]
    expected = np.zeros((3, 3))
    for index, probability in draws:
        a_i = sum((np.outer(a[i], a[i]) for i in index), np.zeros((3, 3))) / batch
        expected += probability * a_i @ sigma @ a_i
    h = a.T @ a / n
    eta = 0.3
    step = sgd.second_moment_step(sigma, a, eta, sampling(scheme, batch, n))
    np.testing.assert_allclose(step, sigma - eta * (h @ sigma + sigma @ h) + eta**2 * expected, rtol=1e-12, atol=1e-12)


def test_full_batch_is_the_limit_of_the_subset_schemes():
    assert sgd.without_replacement(7, 7) == sgd.bernoulli(7, 7) == sgd.full_batch()
    assert sgd.without_replacement(1, 1) == sgd.full_batch()


@jax.jit
def growth(a, rate, scheme):
    """Growth of the second moment in one step, after 600 steps; it rises towards ρ(T)."""

    def step(sigma, _):
        new = sgd.second_moment_step(sigma, a, rate, scheme)
        size = jnp.linalg.norm(new)
        return new / size, size

    start = jnp.eye(a.shape[1]) / math.sqrt(a.shape[1])
    return jax.lax.scan(step, start, length=600)[1][-1]


@settings(max_examples=15)
@given(problems)
def test_power_iteration_of_the_operator_changes_side_at_the_threshold(problem):
    a, scheme = make(problem)
    eta = float(sgd.stability_threshold(a, scheme).eta)
    on_range = a @ scipy.linalg.orth(a.T, rcond=1e-10)  # the kernel, where T is the identity, would win
    assert growth(on_range, 0.99 * eta, scheme) < 1 < growth(on_range, 1.01 * eta, scheme)
    assert sgd.spectral_radius(a, eta, scheme) == pytest.approx(1, abs=1e-9)
    assert sgd.spectral_radius(a, 0.99 * eta, scheme) < 1 < sgd.spectral_radius(a, 1.01 * eta, scheme)


# -------------------------------------------------------------------------------------------------- threshold


@pytest.mark.slow
@settings(max_examples=40)
@given(problems)
def test_all_forms_of_the_threshold_agree(problem):
    a, scheme = make(problem)
    exact = dense_threshold(a, *scheme)
    # The residual bound of 1.5e-8 enters the value squared over the gap; 1e-9 leaves room for small gaps.
    assert sgd.threshold_vec(a, scheme) == pytest.approx(exact, rel=1e-9)
    for found in (
        sgd.stability_threshold(a, scheme),
        sgd.stability_threshold_from_gram(a @ a.T / len(a), scheme),
    ):
        assert found.converged
        assert found.eta == pytest.approx(exact, rel=1e-9)
        assert found.lower <= exact * (1 + 1e-12)
        assert found.upper >= exact * (1 - 1e-12)
        # The certificate is 1e-7 wide, but loose for samples that are almost zero (5e-5 seen in 7200 problems).
        assert found.lower == pytest.approx(exact, rel=1e-3)
    if scheme.noise > 0:
        assert np.linalg.eigvalsh(sgd.n_form(a, exact, scheme))[-1] == pytest.approx(1, rel=1e-7)
        assert np.linalg.eigvalsh(sgd.n_form(a, 0.99 * exact, scheme))[-1] < 0.99 * (1 + 1e-7)


@settings(max_examples=20)
@given(problems, st.booleans())
def test_every_quotient_is_an_upper_bound(problem, definite):
    a, scheme = make(problem)
    root = features("gauss", a.shape[1], a.shape[1], problem[-1] + 1)
    sigma = root @ root.T if definite else root + root.T
    assert sgd.stability_quotient(a, sigma, scheme) >= dense_threshold(a, *scheme) * (1 - 1e-10)


@settings(max_examples=25)
@given(problems)
def test_bounds_are_ordered_around_the_threshold(problem):
    a, scheme = make(problem)
    exact = dense_threshold(a, *scheme)
    bounds = sgd.threshold_bounds(a @ a.T / len(a), scheme)
    slack = 1 + 1e-9
    assert bounds.max_norm <= exact * slack
    assert exact <= bounds.second_moment * slack
    assert bounds.second_moment <= bounds.trace * slack
    assert exact <= min(bounds.gd, bounds.frobenius) * slack
    identity = sgd.stability_quotient(a, np.eye(a.shape[1]), scheme)
    assert bounds.second_moment == pytest.approx(float(identity), rel=1e-12)


@pytest.mark.parametrize(("n", "p"), [(6, 5), (4, 8)])
def test_the_worst_second_moment_attains_the_minimum(n, p):
    a = features("gauss", n, p, 2)
    scheme = sgd.with_replacement(2)
    exact = dense_threshold(a, *scheme)
    worst = sgd.worst_second_moment(a, scheme)
    assert sgd.stability_quotient(a, worst, scheme) == pytest.approx(exact, rel=1e-10)
    step = sgd.second_moment_step(worst, a, exact, scheme)
    # A fixed point to the accuracy of the eigenvector, which is that of the residual, 1.5e-8.
    np.testing.assert_allclose(step, worst, atol=1e-6)
    assert jnp.trace(worst) == pytest.approx(1)
    assert jnp.linalg.eigvalsh(worst)[0] > -1e-7


@pytest.mark.parametrize(("n", "p"), [(20, 5), (4, 8)])
def test_equal_norms_make_the_trace_bound_sharp(n, p):
    a = features("sphere", n, p, 3)
    found = sgd.stability_threshold(a, sgd.with_replacement(1))
    assert found.eta == pytest.approx(2 / p, rel=1e-12)
    assert found.lower == pytest.approx(2 / p, rel=1e-12)
    uneven = features("gauss", n, p, 3)
    assert sgd.stability_threshold(uneven, sgd.with_replacement(1)).eta < 0.95 * 2 * n / (uneven**2).sum()


@pytest.mark.parametrize(("n", "p"), [(20, 5), (4, 8)])
def test_gradient_descent_has_the_largest_eigenvalue(n, p):
    a = features("gauss", n, p, 4)
    top = np.linalg.svd(a, compute_uv=False)[0] ** 2 / n
    found = sgd.stability_threshold(a, sgd.full_batch())
    assert found.eta == pytest.approx(2 / top, rel=1e-12)
    assert found.converged


def test_groups_without_common_direction_do_not_trap_the_iteration():
    """vvᵀ of the largest eigenvalue is then an exact eigenvector of the operator, but not the top one."""
    a = np.zeros((8, 6))
    a[1:, 1:] = features("gauss", 7, 5, 5)
    a[1] *= 2
    for size in (0.5, 1.5, 3.0, 6.0):
        a[0, 0] = size
        for batch in (1, 3):
            scheme = sgd.with_replacement(batch)
            assert sgd.stability_threshold(a, scheme).eta == pytest.approx(dense_threshold(a, *scheme), rel=1e-9)


def test_nothing_to_learn_from_is_stable_at_every_rate_and_zero_rows_do_no_harm():
    assert sgd.stability_threshold(np.zeros((3, 2)), sgd.with_replacement(1)).eta == np.inf
    a = features("gauss", 6, 5, 6)
    a[2] = 0
    found = sgd.stability_threshold(a, sgd.with_replacement(2))
    assert found.lower == pytest.approx(dense_threshold(a, 0.5, 0.5), rel=1e-5)


def test_too_few_iterations_are_reported_and_still_bracket():
    a = features("heavy", 20, 5, 7)
    scheme = sgd.with_replacement(2)
    exact = dense_threshold(a, *scheme)
    found = sgd.stability_threshold(a, scheme, max_iterations=1)
    assert not found.converged
    assert found.iterations == 1
    assert found.residual > 1e-4
    assert found.lower < exact < found.eta


@pytest.mark.parametrize("batch", [1, 4])
def test_single_precision(batch):
    # Rounding of eigh and of sums over n·r terms: 40 eps; the largest error of 600 such problems was 2.4e-6.
    for seed in range(3):
        a = features("heavy", 20, 5, seed)
        scheme = sgd.with_replacement(batch)
        found = sgd.stability_threshold(a.astype(np.float32), scheme)
        assert found.eta.dtype == jnp.float32
        assert found.converged
        assert found.eta == pytest.approx(dense_threshold(a, *scheme), rel=5e-6)


def test_jit_and_vmap_give_the_same_threshold():
    stack = np.stack([features("gauss", 6, 5, s) for s in range(3)])
    noise = jnp.asarray([1.0, 0.5, 0.25])
    found = jax.jit(jax.vmap(lambda a, q: sgd.stability_threshold(a, sgd.Sampling(1 - q, q)).eta))(stack, noise)
    expected = [dense_threshold(a, 1 - float(q), float(q)) for a, q in zip(stack, noise, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_nan_is_refused_when_concrete_and_shows_under_jit():
    bad = np.full((3, 2), np.nan)
    with pytest.raises(ValueError, match="features holds 6 values that are not finite"):
        sgd.stability_threshold(bad, sgd.full_batch())
    found = jax.jit(lambda a: sgd.stability_threshold(a, sgd.with_replacement(1)))(bad)
    assert np.isnan(found.eta)
    assert not found.converged


# --------------------------------------------------------------------------------------------------- gradients


@jax.jit
def feature_gradient(a, scheme):
    return jax.grad(lambda z, s: sgd.stability_threshold(z, s, tolerance=1e-10).eta, argnums=(0, 1))(a, scheme)


@jax.jit
def gram_gradient(k, scheme):
    return jax.grad(lambda z: sgd.stability_threshold_from_gram(z, scheme, tolerance=1e-10).eta)(k)


def tight_frame() -> np.ndarray:
    """Rows of different norms with H = I: all eigenvalues of H coincide, the worst Σ is unique."""
    return np.linalg.qr(features("gauss", 20, 5, 8))[0] * np.sqrt(20)


@pytest.mark.parametrize("kind", ["gauss", "wide", "frame", "kernel"])
def test_gradient_against_finite_differences(kind):
    a = {
        "gauss": lambda: features("gauss", 20, 5, 9),
        "wide": lambda: features("gauss", 4, 8, 9),
        "frame": tight_frame,
        "kernel": lambda: features("gauss", 6, 2, 9) @ features("gauss", 2, 5, 10),
    }[kind]()
    n = a.shape[0]
    direction = features("gauss", *a.shape, 11)
    if kind == "kernel":  # keep the range: with a new direction the oracle's rank would jump
        direction = direction @ np.linalg.pinv(a) @ a
    h = 1e-5
    for scheme in (sgd.with_replacement(1), sgd.bernoulli(2, n)):
        up, down = (dense_threshold(a + t * direction, *scheme) for t in (h, -h))
        # Central differences: error h² times the third derivative plus 1e-16/h, about 1e-9 relative here.
        expected = pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-8)
        assert (feature_gradient(a, scheme)[0] * direction).sum() == expected
        along = (direction @ a.T + a @ direction.T) / n  # the same direction for the Gram matrix
        assert (gram_gradient(a @ a.T / n, scheme) * along).sum() == expected


def test_gradient_in_the_sampling():
    a = features("gauss", 20, 5, 12)
    h = 1e-5
    found = feature_gradient(a, sgd.Sampling(0.5, 0.5))[1]
    for name, (mean, noise) in {"mean": (h, 0), "noise": (0, h)}.items():
        up, down = (dense_threshold(a, 0.5 + t * mean, 0.5 + t * noise) for t in (1, -1))
        assert getattr(found, name) == pytest.approx((up - down) / (2 * h), rel=1e-6)


def test_second_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(lambda z: sgd.stability_threshold(z, sgd.full_batch()).eta)(features("gauss", 6, 5, 12))


def test_dense_oracle_is_differentiable_where_eigenvalues_are_simple():
    a = features("gauss", 20, 5, 13)
    scheme = sgd.with_replacement(2)
    dense = jax.jit(jax.grad(lambda z: sgd.threshold_vec(z, scheme)))(a)
    np.testing.assert_allclose(dense, feature_gradient(a, scheme)[0], rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------- alignment and bounds


@settings(max_examples=20)
@given(problems)
def test_alignment_infimum_against_the_dense_formula(problem):
    a, _ = make(problem)
    n = a.shape[0]
    basis = scipy.linalg.orth(a.T, rcond=1e-10)
    b = a @ basis
    h = b.T @ b / n
    moment = (b.T * np.einsum("ik,kl,il->i", b, h, b)) @ b / n
    expected = scipy.linalg.eigh(moment - h @ h @ h, h, eigvals_only=True)[0] / (h**2).sum()
    # Whitening amplifies rounding by the condition number, at most 1e5 for these families.
    assert sgd.alignment_infimum(a) == pytest.approx(max(expected, 0), rel=1e-7, abs=1e-10)
    assert sgd.alignment_infimum_from_gram(a @ a.T / n) == pytest.approx(max(expected, 0), rel=1e-7, abs=1e-10)


@settings(max_examples=20)
@given(problems)
def test_dexter_criterion_is_never_below_the_threshold(problem):
    a, _ = make(problem)
    n = a.shape[0]
    batch = min(problem[3], n)
    assert sgd.dexter_threshold(a, batch) >= dense_threshold(a, *sgd.bernoulli(batch, n)) * (1 - 1e-9)


def test_dexter_criterion_by_hand():
    # K = diag(1, 4)/2: λmax(H) = 2, |a_iᵀa_j| = diag(1, 4), σ = 1, n/B - 1 = 1.
    assert sgd.dexter_threshold(np.diag([1.0, 2.0]), 1) == pytest.approx(1 / 2)
    assert sgd.dexter_threshold(np.diag([1.0, 2.0]), 2) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- networks


def mlp(params, x):
    """Leaves of several shapes, curvature in the parameters."""
    return jnp.tanh(params["w"] @ x + params["b"]) @ params["v"] * params["scale"]


def mlp_problem(key, n=11):
    keys = jax.random.split(key, 5)
    params = {
        "w": jax.random.normal(keys[0], (4, 3)),
        "b": jax.random.normal(keys[1], (4,)),
        "v": jax.random.normal(keys[2], (4,)),
        "scale": jnp.asarray(0.7),
    }
    return params, jax.random.normal(keys[3], (n, 3)), jax.random.normal(keys[4], (n,))


@pytest.mark.parametrize("block", [1, 4, 250])
def test_gram_matrix_against_the_features(key, block):
    params, x, _ = mlp_problem(key)
    a = sgd.per_sample_gradients(mlp, params, x)
    assert a.shape == (11, 4 * 3 + 4 + 4 + 1)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacrev(lambda f: jax.vmap(mlp, (None, 0))(unravel(f), x))(flat)
    np.testing.assert_allclose(a, jacobian, rtol=1e-12)
    np.testing.assert_allclose(sgd.gram_matrix(mlp, params, x, block=block), a @ a.T / 11, rtol=1e-11, atol=1e-13)


def test_gram_matrix_accumulates_in_the_asked_precision(key):
    params, x, _ = jax.tree.map(lambda z: z.astype(jnp.float32), mlp_problem(key))
    a = np.asarray(sgd.per_sample_gradients(mlp, params, x), np.float64)
    assert sgd.gram_matrix(mlp, params, x).dtype == jnp.float32
    wide = sgd.gram_matrix(mlp, params, x, dtype=jnp.float64)
    # The float32 gradients are the same numbers up to compilation; sums are exact to 1e-15.
    np.testing.assert_allclose(wide, a @ a.T / 11, rtol=1e-6, atol=1e-7)
    assert wide.dtype == jnp.float64


def test_hessian_is_gauss_newton_at_interpolation_and_only_there(key):
    params, x, y = mlp_problem(key)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    v = unravel(jax.random.normal(key, flat.shape))
    a = sgd.per_sample_gradients(mlp, params, x)
    gauss_newton = a.T @ (a @ jax.flatten_util.ravel_pytree(v)[0]) / 11
    fitted = jax.vmap(mlp, (None, 0))(params, x)
    at_minimum = jax.flatten_util.ravel_pytree(sgd.hessian_product(mlp, params, x, fitted, v))[0]
    np.testing.assert_allclose(at_minimum, gauss_newton, rtol=1e-10, atol=1e-12)
    elsewhere = jax.flatten_util.ravel_pytree(sgd.hessian_product(mlp, params, x, y, v))[0]
    dense = jax.hessian(lambda f: jnp.square(jax.vmap(mlp, (None, 0))(unravel(f), x) - y).mean() / 2)(flat)
    np.testing.assert_allclose(elsewhere, dense @ jax.flatten_util.ravel_pytree(v)[0], rtol=1e-10, atol=1e-12)
    assert jnp.linalg.norm(elsewhere - gauss_newton) > 0.1 * jnp.linalg.norm(gauss_newton)


def test_alignment_and_sharpness_against_dense_matrices():
    a, e = features("gauss", 9, 5, 14), features("gauss", 9, 1, 15)[:, 0]
    n = 9
    gradients = e[:, None] * a
    g = gradients.mean(0)
    s = gradients.T @ gradients / n - np.outer(g, g)
    fisher = a.T @ a / n
    found = sgd.loss_alignment(a @ a.T / n, e)
    trace, loss = np.trace(s @ fisher), (e**2).mean() / 2
    size_s, size_g = np.linalg.norm(s), np.linalg.norm(fisher)
    assert found.mu == pytest.approx(trace / (2 * loss * size_g**2), rel=1e-12)
    assert found.direction == pytest.approx(trace / (size_s * size_g), rel=1e-12)
    assert found.strength == pytest.approx(size_s / (2 * loss * size_g), rel=1e-12)
    measures = sgd.sharpness(a @ a.T / n)
    expected = (np.trace(fisher), size_g, np.linalg.eigvalsh(fisher)[-1])
    np.testing.assert_allclose(measures, expected, rtol=1e-12)
    # For residuals of the quadratic, e = A u, the infimum is a lower bound.
    for seed in range(20):
        u = features("gauss", 5, 1, seed)[:, 0]
        assert sgd.loss_alignment(a @ a.T / n, a @ u).mu >= sgd.alignment_infimum(a)


def test_report_agrees_with_its_parts(key):
    params, x, y = mlp_problem(key)
    fitted = jax.vmap(mlp, (None, 0))(params, x)
    rate = 0.05
    for scheme in (sgd.with_replacement(1), sgd.bernoulli(3, 11)):
        report = sgd.stability_report(mlp, params, x, fitted, rate, scheme)
        a = np.asarray(sgd.per_sample_gradients(mlp, params, x))
        k = a @ a.T / 11
        norms = (a**2).sum(1)
        mean, noise = scheme
        assert report.interpolating
        assert report.exact == pytest.approx(rate / dense_threshold(a, mean, noise), rel=1e-8)
        assert report.trace == pytest.approx(rate * noise * np.trace(k) / 2, rel=1e-12)
        growth = mean * (k**2).sum() + noise * (norms**2).mean()
        assert report.second_moment == pytest.approx(rate * growth / (2 * np.trace(k)), rel=1e-12)
        assert report.gd == pytest.approx(rate * np.linalg.eigvalsh(k)[-1] / 2, rel=1e-12)
        assert report.max_norm == pytest.approx(rate * (mean + noise) * norms.max() / 2, rel=1e-12)
        infimum = float(report.alignment_infimum)
        assert report.frobenius == pytest.approx(rate * np.linalg.norm(k) * math.sqrt(noise * infimum), rel=1e-12)
        assert report.trace <= report.second_moment <= report.exact <= report.max_norm
        assert max(report.gd, report.frobenius) <= report.exact
    away = sgd.stability_report(mlp, params, x, y, rate, scheme)
    assert not away.interpolating
    assert away.risk == pytest.approx(float(training.risk(mlp, params, x, y)))


# --------------------------------------------------------------------------------------- models and their norms


def hypercube(d: int) -> np.ndarray:
    """All sign vectors: E xxᵀ = I, |x|² = d and symmetry hold exactly."""
    return np.asarray(list(itertools.product((-1.0, 1.0), repeat=d)))


def test_diagonal_network_sharpness_is_exact_on_the_hypercube(key):
    a, b = sgd.init_diagonal_linear(key, 5)
    measured = sgd.sharpness(sgd.gram_matrix(sgd.diagonal_linear, (a, b), hypercube(5)))
    np.testing.assert_allclose(measured, sgd.diagonal_sharpness(a, b), rtol=1e-12)
    beta = a * b
    balanced = sgd.balanced_factors(beta)
    np.testing.assert_allclose(balanced[0] * balanced[1], beta, rtol=1e-14)
    norms = [2 * np.linalg.norm(beta, order) for order in (1, 2, np.inf)]
    np.testing.assert_allclose(sgd.diagonal_sharpness(*balanced), norms, rtol=1e-14)
    assert sgd.balancedness(*balanced) == pytest.approx(1, rel=1e-14)
    for scale in np.exp(features("gauss", 20, 5, 16)):
        moved = sgd.diagonal_sharpness(a * scale, b / scale)
        assert all(m >= v * (1 - 1e-12) for m, v in zip(moved, norms, strict=True))


def test_unbalanced_start_has_the_ratio_asked_for(key):
    for ratio in (1.0, 2.0, 16.0):
        a, b = sgd.init_unbalanced(key, 50, ratio)
        assert sgd.balancedness(a, b) == pytest.approx(ratio, rel=1e-12)
        assert 0 < (a * b > 0).sum() < 50
    with pytest.raises(ValueError, match=r"ratio is 0\.5"):
        sgd.init_unbalanced(key, 5, 0.5)


def test_relu_trace_is_exact_on_the_hypercube(key):
    a, w = sgd.init_two_layer_relu(key, 7, 6)
    k = sgd.gram_matrix(sgd.two_layer_relu, (a, w), hypercube(6))
    trace = sgd.relu_trace_population(a, w)
    assert jnp.trace(k) == pytest.approx(float(trace), rel=1e-12)
    assert trace >= math.sqrt(6) * sgd.path_norm(a, w)
    even = jnp.abs(a)[:, None] * w / jnp.linalg.norm(w, axis=1, keepdims=True) * math.sqrt(6)
    assert sgd.relu_trace_population(a, even) == pytest.approx(float(math.sqrt(6) * sgd.path_norm(a, even)), rel=1e-12)


def test_relu_largest_eigenvalue_bound(key):
    a, w = sgd.init_two_layer_relu(key, 6, 4)
    lower = float(sgd.relu_lambda_max_lower(a, w))
    features_of_x = sgd.per_sample_gradients(sgd.two_layer_relu, (a, w), jax.random.normal(key, (2000, 4)))
    # λmax of the sample matrix exceeds the population one on average; its own fluctuation is about 1/√2000.
    assert jnp.linalg.eigvalsh(features_of_x.T @ features_of_x / 2000)[-1] >= 0.9 * lower
    assert lower >= sgd.PATH_NORM_CONSTANT * sgd.path_norm(a, w)
    # Equality of the last inequality where the two sums balance neuron by neuron.
    even = jnp.abs(a)[:, None] * w / jnp.linalg.norm(w, axis=1, keepdims=True) * math.sqrt(math.pi / 2)
    expected = sgd.PATH_NORM_CONSTANT * sgd.path_norm(a, even)
    assert sgd.relu_lambda_max_lower(a, even) == pytest.approx(float(expected), rel=1e-12)


def test_rademacher_averages(key):
    x = features("gauss", 8, 3, 17)
    signs = hypercube(8)
    exact = 2.0 * np.abs(signs @ x).max(1).mean() / 8
    assert exact <= sgd.rademacher_bound_l1(x, 2.0)
    draws = np.asarray(sgd.rademacher_l1_draws(key, x, 2.0, 4000))
    # Five standard errors of a mean of 4000 bounded draws: false alarm about 6e-7 for this fixed key.
    assert draws.mean() == pytest.approx(exact, abs=5 * draws.std() / math.sqrt(4000))
    # In one dimension the sphere is two points, so the supremum of each draw is known.
    line = features("gauss", 4, 1, 18)
    outputs = np.maximum(np.concatenate([line, -line], 1), 0)
    possible = np.abs(hypercube(4) @ outputs).max(1) * 3.0 / 4
    found = np.asarray(sgd.rademacher_path_draws(key, line, 3.0, 40, starts=32))
    assert np.abs(found[:, None] - possible).min(1).max() < 1e-12
    assert found.max() <= sgd.rademacher_bound_path(line, 3.0)
    # More ascent cannot lower the maximum over the path.
    plane = features("gauss", 20, 6, 19)
    short, long = (sgd.rademacher_path_draws(key, plane, 1.0, 10, steps=s) for s in (1, 100))
    assert (long >= short).all()
    assert long.mean() > 1.05 * short.mean()


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.with_replacement(0), "with_replacement: batch is 0"),
        (lambda: sgd.without_replacement(5, 4), "without_replacement: batch is 5, expected 1 <= batch <= n = 4"),
        (lambda: sgd.bernoulli(0, 4), "bernoulli: batch is 0"),
        (lambda: sgd.dexter_threshold(np.ones((2, 2)), 3), "dexter_threshold: batch is 3"),
        (lambda: sgd.threshold_vec(np.ones((2, 33)), sgd.full_batch()), "p is 33, expected at most 32"),
        (lambda: sgd.spectral_radius(np.ones((2, 33)), 0.1, sgd.full_batch()), "p is 33, expected at most 32"),
        (lambda: sgd.n_form(np.eye(2), 4.1, sgd.full_batch()), "expected < 2"),
        (lambda: sgd.stability_threshold_from_gram(np.full((2, 2), np.inf), sgd.full_batch()), "gram holds"),
        (lambda: sgd.loss_alignment(np.eye(2), np.zeros(2)), "residuals are all zero"),
        (lambda: sgd.gram_matrix(lambda p, x: p * x, jnp.ones(2), jnp.ones((3, 2))), "one real scalar per sample"),
        (lambda: sgd.gram_matrix(lambda p, x: p @ x, jnp.ones(2), jnp.ones((3, 2)), block=0), "block is 0"),
        (lambda: sgd.per_sample_gradients(lambda p, x: p @ x, jnp.ones(2), jnp.ones((0, 2))), "n at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
