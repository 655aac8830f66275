"""Baselines: proximal maps against quadratic programs, closed forms and optimality; wavelets against what defines them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import imaging, plug_and_play
from solvers.proximal import baselines
from solvers.proximal.baselines import FreeDenoiser, GradientStepDenoiser, TotalVariation, WaveletSoftThreshold

pytestmark = pytest.mark.usefixtures("quick_compilation")

# --------------------------------------------------------------------------------------------- total variation


def differences(shape):
    """The matrix of all differences to the next pixel along the last two axes, one block of rows per axis, zero at the end."""
    n, blocks = int(np.prod(shape)), []
    for axis in range(max(0, len(shape) - 2), len(shape)):
        d = np.zeros((n, n))
        for at in np.ndindex(*shape):
            if at[axis] + 1 < shape[axis]:
                other = tuple(k + (j == axis) for j, k in enumerate(at))
                i = np.ravel_multi_index(at, shape)
                d[i, i], d[i, np.ravel_multi_index(other, shape)] = -1, 1
        blocks.append(d)
    return np.stack(blocks)


def total_variation(x, isotropic):
    slopes = differences(x.shape) @ np.asarray(x, float).reshape(-1)
    return np.sqrt((slopes**2).sum(0)).sum() if isotropic else np.abs(slopes).sum()


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4), (1, 1, 5)])
def test_value_of_total_variation(shape, isotropic, key):
    x = jax.random.normal(key, shape)
    assert float(TotalVariation(0.7, isotropic)(x)) == pytest.approx(0.7 * total_variation(x, isotropic), rel=1e-5)


@pytest.mark.parametrize("shape", [(9,), (3, 4), (2, 2, 3)])
def test_anisotropic_map_is_the_quadratic_program(shape, key, x64):
    """min ‖v - t Gᵀp‖² over the box |p| ≤ 1, by SciPy's bounded least squares."""
    v, t = jax.random.normal(key, shape), 0.4
    g = differences(shape).reshape(-1, v.size)
    p = scipy.optimize.lsq_linear(t * g.T, np.asarray(v).reshape(-1), (-1, 1), tol=1e-14).x
    exact = np.asarray(v).reshape(-1) - t * g.T @ p
    x, info = TotalVariation(0.2, False, tolerance=1e-7).solve(v, 2.0)
    assert bool(info.converged)
    assert np.linalg.norm(x.reshape(-1) - exact) <= 1.01e-7 * np.linalg.norm(v)


@settings(max_examples=8)
@given(seed=st.integers(0, 99), weight=st.sampled_from([0.05, 0.3, 2.0]), tolerance=st.sampled_from([1e-2, 1e-3, 1e-5]))
def test_the_stated_accuracy_holds(seed, weight, tolerance, x64):
    """Isotropic: x + t Gᵀp = v and |p| ≤ 1 solve the dual; here with p by many plain projected gradient steps."""
    v = np.random.default_rng(seed).normal(size=(4, 4)) + np.linspace(0, 3, 4)
    g = differences(v.shape)
    p = np.zeros((2, v.size))
    for _ in range(6000):
        p = p + 0.12 / weight * (g @ (v.reshape(-1) - weight * np.einsum("kij,ki->j", g, p)))
        p /= np.maximum(np.sqrt((p**2).sum(0)), 1)
    exact = v.reshape(-1) - weight * np.einsum("kij,ki->j", g, p)
    x, info = TotalVariation(weight, tolerance=tolerance).solve(jnp.asarray(v))
    error = np.linalg.norm(x.reshape(-1) - exact) / np.linalg.norm(v)
    assert bool(info.converged) and float(info.error_bound) <= tolerance
    assert error <= float(info.error_bound) + 1e-6  # of the reference


def test_large_weights_leave_the_mean_and_channels_apart(key):
    v = jax.random.normal(key, (2, 6, 6))
    x, info = TotalVariation(50.0).solve(v)
    assert bool(info.converged) and 1e-3 < float(info.error_bound) < 1e-2  # what float32 allows
    mean = np.broadcast_to(np.asarray(v).mean((1, 2), keepdims=True), v.shape)
    assert np.linalg.norm(x - mean) <= float(info.error_bound) * np.linalg.norm(v)
    one = TotalVariation(0.3, tolerance=1e-4)
    np.testing.assert_allclose(one.prox(v)[1], one.prox(v[1]), atol=5e-4)


def test_a_map_that_was_not_computed_is_nan(key):
    v = jax.random.normal(key, (8, 8))
    r = TotalVariation(1.0, max_steps=3)
    assert np.isnan(r.prox(v)).all()
    x, info = r.solve(v)
    assert np.isfinite(x).all() and not bool(info.converged) and int(info.steps) == 3


@pytest.mark.parametrize("isotropic", [True, False])
def test_derivatives_of_the_map(isotropic, key, x64):
    """In v, the step and the weight, forward and backward, against differences."""
    keys = jax.random.split(key, 3)
    v, along, weights = (jax.random.normal(k, (4, 4)) for k in keys)

    @jax.jit
    def f(v, lam, weight):
        r = TotalVariation(weight, isotropic, tolerance=1e-7, max_steps=100_000)
        return jnp.vdot(weights, r.prox(v, lam))

    point, tangent, s = (v, jnp.asarray(0.5), jnp.asarray(0.6)), (along, jnp.asarray(0.4), jnp.asarray(-0.7)), 1e-3
    plus, minus = ([p + d * s * t for p, t in zip(point, tangent, strict=True)] for d in (1, -1))
    numeric = (f(*plus) - f(*minus)) / (2 * s)
    forward = jax.jvp(f, point, tangent)[1]
    backward = sum(jnp.vdot(g, t) for g, t in zip(jax.grad(f, (0, 1, 2))(*point), tangent, strict=True))
    # Values are good to 1e-7 ‖v‖ ‖weights‖ / s = 2e-3.
    np.testing.assert_allclose([forward, backward], [numeric] * 2, atol=4e-3)


def test_gradient_of_total_variation_has_no_nan_where_it_has_a_kink():
    x = jnp.zeros((3, 3)).at[1, 1].set(1.0)
    assert np.isfinite(TotalVariation(1.0).grad(x)).all()
    np.testing.assert_allclose(TotalVariation(1.0, False).grad(x)[1, 1], 4)


# --------------------------------------------------------------------------------------------------- wavelets


@pytest.mark.parametrize("moments", range(1, 11))
def test_daubechies_filters_have_their_defining_properties(moments):
    """Σ h = √2, orthogonal to their even shifts, and as many vanishing moments of the other filter."""
    h = baselines.daubechies(moments)
    assert h.shape == (2 * moments,)
    assert h.sum() == pytest.approx(np.sqrt(2), abs=1e-12)
    for k in range(moments):
        assert h[2 * k :] @ h[: 2 * moments - 2 * k] == pytest.approx(float(k == 0), abs=1e-6)
    place = np.arange(2 * moments) / (2 * moments)
    for power in range(moments):
        assert (h[::-1] * (-1) ** np.arange(2 * moments)) @ place**power == pytest.approx(0, abs=1e-6)


def test_the_filter_of_two_moments_in_closed_form():
    r = np.sqrt(3)
    exact = np.array([1 + r, 3 + r, 3 - r, 1 - r]) / (4 * np.sqrt(2))
    got = baselines.daubechies(2)
    assert min(np.abs(got - exact).max(), np.abs(got - exact[::-1]).max()) < 1e-12


def test_details_are_those_of_pywavelets(key):
    pywt = pytest.importorskip("pywt")
    x = np.asarray(jax.random.normal(key, (16,)))
    _, details = WaveletSoftThreshold(1.0, 2, levels=1).transform(jnp.asarray(x))
    there = pywt.dwt(x, "db2", mode="periodization")[1]
    np.testing.assert_allclose(np.sort(np.abs(details[0])), np.sort(np.abs(there)), atol=1e-5)


@settings(max_examples=10)
@given(
    problem=st.sampled_from([((8,), 1, None), ((8, 12), 2, 2), ((2, 8, 8), 4, 1), ((28, 28), 3, None)]),
    seed=st.integers(0, 99),
)
def test_the_transform_is_orthogonal_and_inverted(problem, seed, x64):
    shape, moments, levels = problem
    r = WaveletSoftThreshold(0.3, moments, levels)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=shape))
    averages, details = r.transform(x)
    energy = jnp.sum(averages**2) + sum(jnp.sum(d**2) for d in details)
    assert float(energy) == pytest.approx(float(jnp.sum(x**2)), rel=1e-6)
    assert averages.size + sum(d.size for d in details) == x.size
    np.testing.assert_allclose(r.inverse(averages, details), x, atol=1e-7)


def test_smooth_signals_have_no_details(x64):
    """A line, away from where it wraps around; two vanishing moments, not one."""
    x = jnp.arange(32.0)
    for moments, most in ((2, 1e-9), (1, np.inf)):
        details = WaveletSoftThreshold(1.0, moments, levels=1).transform(x)[1][0]
        assert np.sort(np.abs(details))[-3] < most
    assert np.abs(WaveletSoftThreshold(1.0, 1, levels=1).transform(x)[1][0]).min() > 0.1


def test_haar_map_in_closed_form():
    """One level of two pixels: their mean stays, their difference is made smaller by the threshold."""
    r = WaveletSoftThreshold(0.5, 1, levels=1)
    np.testing.assert_allclose(
        r.prox(jnp.array([3.0, 1.0])), [2.5 + 0.5 - 0.5 / np.sqrt(2), 1 + 0.5 / np.sqrt(2)], atol=1e-6
    )
    np.testing.assert_allclose(r.prox(jnp.array([3.0, 1.0]), 10.0), [2, 2], atol=1e-6)
    assert float(r(jnp.array([3.0, 1.0]))) == pytest.approx(0.5 * np.sqrt(2))


@pytest.mark.parametrize(
    "make", [lambda: WaveletSoftThreshold(0.2), lambda: TotalVariation(0.2, tolerance=1e-6, max_steps=50_000)]
)
def test_maps_are_optimal_with_any_step_and_the_envelope_has_their_gradient(make, key, x64):
    """No point nearby is better; ∇M = (v - prox)/lam, by differences."""
    r, lam = make(), 0.7
    keys = jax.random.split(key, 3)
    v = jax.random.normal(keys[0], (8, 8))
    x = r.prox(v, lam)
    objective = jax.jit(jax.vmap(lambda x: r(x) + jnp.sum((x - v) ** 2) / (2 * lam)))
    near = x + 0.03 * jax.random.normal(keys[1], (200, 8, 8))
    # Strong convexity: everything else is above by at least ‖·‖²/(2 lam).
    margin = jnp.sum((near - x) ** 2, (1, 2)) / (2 * lam)
    assert (objective(near) - objective(x[None]) >= margin - 1e-3).all()
    along = jax.random.normal(keys[2], (8, 8))
    numeric = (r.moreau_envelope(v + 1e-4 * along, lam) - r.moreau_envelope(v - 1e-4 * along, lam)) / 2e-4
    assert float(numeric) == pytest.approx(float(jnp.vdot(along, v - x)) / lam, abs=1e-3)
    assert r.weak_convexity == 0 and r.lipschitz == 1


@pytest.mark.parametrize("r", [WaveletSoftThreshold(0.01, 1), TotalVariation(0.01)])
def test_they_reconstruct_by_plug_and_play(r, key):
    """A square, blurred: certified, converged, and closer than what was measured."""
    x = jnp.zeros((16, 16)).at[4:12, 4:12].set(1.0)
    a = imaging.blur(imaging.gaussian_kernel(5, 1.0), x.shape)
    b = a(x) + 0.02 * jax.random.normal(key, x.shape)
    got, info = plug_and_play.pgd(imaging.LeastSquares(a, b), r, b, eta=1.5, lam=1.5, tolerance=1e-4, max_steps=300)
    assert bool(info.converged) and info.certificate.holds
    assert float(jnp.linalg.norm(got - x)) < 0.8 * float(jnp.linalg.norm(b - x))


# --------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", [GradientStepDenoiser, FreeDenoiser])
@pytest.mark.parametrize("shape", [(2, 6, 5), 7, (3, 4)])
def test_denoisers_begin_near_the_identity_and_can_be_trained(kind, shape, key):
    sides = (shape,) if isinstance(shape, int) else shape
    net = kind.create(key, shape, hidden=8, layers=3)
    y = jax.random.normal(jax.random.fold_in(key, 1), (16, *sides))
    before = jax.vmap(net)(y)
    assert before.shape == y.shape and float(jnp.mean((before - y) ** 2)) < 0.2 * float(jnp.mean(y**2))
    np.testing.assert_array_equal(net.denoise(y[0]), net(y[0]))
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda net: jnp.mean((jax.vmap(net)(y) - y / 2) ** 2)))
    optimiser = optax.adam(1e-2)
    state = optimiser.init(eqx.filter(net, eqx.is_array))
    first = float(loss(net)[0])
    for _ in range(60):
        updates, state = optimiser.update(loss(net)[1], state)
        net = eqx.apply_updates(net, updates)
    assert float(loss(net)[0]) < 0.5 * first


def test_a_gradient_step_is_a_gradient_and_a_free_denoiser_is_not(key, x64):
    y = jax.random.normal(key, (6,))
    skew = {}
    for kind in (GradientStepDenoiser, FreeDenoiser):
        net = kind.create(key, 6, hidden=12, layers=3, dtype=jnp.float64)
        jacobian = jax.jacfwd(net)(y)
        skew[kind] = float(jnp.abs(jacobian - jacobian.T).max())
    assert skew[GradientStepDenoiser] < 1e-12 and skew[FreeDenoiser] > 1e-2
    net = GradientStepDenoiser.create(key, 6, hidden=12, layers=3, dtype=jnp.float64)
    np.testing.assert_allclose(jax.grad(net.potential)(y), net(y), atol=1e-12)
    assert net.weak_convexity is None and net.lipschitz is None


def test_value_of_the_regulariser_of_a_gradient_step(key, x64):
    """Where ∇g is a contraction, D = prox φ: ∇φ(D(y)) = y - D(y), along curves of y."""
    net = GradientStepDenoiser.create(key, 5, hidden=10, layers=3, dtype=jnp.float64)
    y, along = jax.random.normal(key, (2, 5))
    assert float(jnp.abs(jnp.linalg.eigvalsh(jax.jacfwd(jax.grad(net.energy))(y))).max()) < 1
    moved = jax.jvp(net, (y,), (along,))[1]
    numeric = (net.value_at(y + 1e-5 * along) - net.value_at(y - 1e-5 * along)) / 2e-5
    assert float(numeric) == pytest.approx(float(jnp.vdot(y - net(y), moved)), abs=1e-8)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TotalVariation(0.0), "weight: is 0.0, expected a positive number"),
        (lambda: TotalVariation(1.0, tolerance=-1.0), "tolerance: is -1.0, expected a positive number"),
        (lambda: TotalVariation(1.0).prox(jnp.ones((3, 3)), 0.0), "lam: is 0.0, expected a positive number"),
        (lambda: WaveletSoftThreshold(-1.0), "weight: is -1.0"),
        (lambda: WaveletSoftThreshold(1.0, 11), "moments is 11, expected 1 to 10"),
        (lambda: WaveletSoftThreshold(1.0, levels=0), "levels: is 0, expected an integer >= 1"),
        (lambda: WaveletSoftThreshold(1.0)(jnp.ones((7, 8))), r"x: has shape \(7, 8\), expected sides that can be halved 1 "),
        (lambda: WaveletSoftThreshold(1.0, levels=3).prox(jnp.ones((28, 28))), "can be halved 3 times; pad or crop it"),
        (lambda: FreeDenoiser.create(jax.random.key(0), (1, 4, 4))(jnp.ones((3, 4, 4))), r"y: has shape \(3, 4, 4\)"),
        (lambda: FreeDenoiser.create(jax.random.key(0), (0, 4, 4)), "expected positive sides"),
        (lambda: FreeDenoiser.create(jax.random.key(0), 4, layers=1), "32 hidden units in 1 layers, expected at least"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
