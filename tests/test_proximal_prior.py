"""The prior of a network: against brute force in one dimension, its certificate, its derivatives, its refusals."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paper_checks.harness.numerics import enable_x64
from solvers import imaging, plug_and_play, proximal
from solvers.proximal.network import constrained, jacobian


def line(key: jax.Array, alpha: float = 0.1) -> proximal.LearnedProximal:
    """In one dimension, with slopes from α to about two."""
    net = proximal.mlp(key, 1, hidden=8, layers=1, beta=5.0, alpha=alpha, dtype=jnp.float64)
    return eqx.tree_at(lambda n: n.output, net, 0.4 * jnp.ones(8))


def space(key: jax.Array, n: int = 4, alpha: float = 0.2) -> proximal.LearnedProximal:
    return proximal.mlp(key, n, hidden=10, layers=2, beta=5.0, alpha=alpha, dtype=jnp.float64)


def on_grid(net: proximal.LearnedProximal) -> tuple[np.ndarray, np.ndarray]:
    """x and R(x) in one dimension: along the inverse, which needs no inversion."""
    z = np.linspace(-40, 40, 400_001)
    x = np.asarray(jax.vmap(net)(z[:, None]))[:, 0]
    psi = np.asarray(jax.vmap(net.potential)(z[:, None]))
    return x, x * z - x**2 / 2 - psi


def test_values_and_maps_against_brute_force(x64, key):
    net = line(key)
    prior = proximal.regularizer(net)
    x, r = on_grid(net)
    for v in (-1.3, 0.2, 2.5):
        np.testing.assert_allclose(prior(jnp.array([v])), np.interp(v, x, r), atol=1e-6)
        for lam in (0.05, 0.5, 1.0):
            best = x[np.argmin(lam * r + (x - v) ** 2 / 2)]
            np.testing.assert_allclose(prior.prox(jnp.array([v]), lam)[0], best, atol=1e-3)  # steps of the grid
            envelope = (r + (x - v) ** 2 / (2 * lam)).min()
            np.testing.assert_allclose(prior.moreau_envelope(jnp.array([v]), lam), envelope, atol=1e-6)


def test_beyond_one_the_step_is_taken_where_the_minimiser_is_unique(x64, key):
    net = line(key)
    prior = proximal.regularizer(net)
    most = 1 / prior.weak_convexity
    lam = 1 + 0.9 * (most - 1)
    x, r = on_grid(net)
    np.testing.assert_allclose(
        prior.prox(jnp.array([0.7]), lam)[0], x[np.argmin(lam * r + (x - 0.7) ** 2 / 2)], atol=1e-3
    )
    with pytest.raises(ValueError, match=r"lam: is .* the minimiser need not be unique"):
        prior.prox(jnp.array([0.7]), 1 + 2 * (most - 1))
    assert jnp.isnan(eqx.filter_jit(prior.prox)(jnp.array([0.7]), jnp.asarray(5.0))).all()


def test_the_map_of_step_one_is_the_network_and_the_relaxed_one_is_not_a_map(x64, key):
    net, prior = space(key), proximal.regularizer(space(key))
    v = jax.random.normal(key, (4,), jnp.float64)
    np.testing.assert_allclose(prior.prox(v), net(v), rtol=1e-14)
    assert float(jnp.abs(prior.prox(v, 0.3) - (v + 0.3 * (net(v) - v))).max()) > 1e-2


def test_an_inexact_inversion_is_a_lower_bound_with_a_known_error(x64, key):
    net = space(key)
    x = net(jax.random.normal(key, (4,), jnp.float64))
    exact = proximal.regularizer(net).evaluate(x)
    assert exact.converged and float(exact.residual) <= 1e-8 * max(1, float(jnp.linalg.norm(x)))
    for steps in (1, 3):
        rough = proximal.regularizer(net, max_steps=steps).evaluate(x)
        gap = float(exact.value - rough.value)
        assert -1e-12 <= gap <= float(rough.error_bound) + 1e-12
    assert float(proximal.regularizer(net, max_steps=1).evaluate(x).residual) > 1e-6


@pytest.mark.slow
def test_large_signals_are_inverted_too(x64, key):
    net = proximal.convolutional(key, (1, 18, 18), hidden=4, strides=(2,), last=4, alpha=0.1, dtype=jnp.float64)
    net = eqx.tree_at(constrained, net, tuple(w + 0.02 for w in constrained(net)))
    z = jax.random.normal(key, net.shape, jnp.float64)
    found = eqx.filter_jit(proximal.regularizer(net).evaluate)(net(z))
    assert found.converged
    np.testing.assert_allclose(found.inverse, z, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [3, (1, 6, 6)])
def test_a_batch_is_evaluated_as_each(x64, key, shape):
    make = proximal.mlp if shape == 3 else proximal.convolutional
    size = {"hidden": 8, "layers": 1} if shape == 3 else {"hidden": 3, "last": 4}
    net = make(key, shape, **size, beta=4.0, alpha=0.2, dtype=jnp.float64)
    z = 2 * jax.random.normal(key, (5, *net.shape))
    x = jax.vmap(net)(z)
    exact = np.asarray([jnp.vdot(a, b) - jnp.vdot(a, a) / 2 - net.potential(b) for a, b in zip(x, z, strict=True)])
    found = jax.vmap(proximal.regularizer(net, tolerance=1e-6).evaluate)(x)
    assert found.converged.all()
    assert (exact - found.value <= found.error_bound + 1e-12).all()
    np.testing.assert_allclose(found.value, exact, atol=1e-9)
    np.testing.assert_allclose(found.inverse, z, atol=1e-4)
    few = jax.vmap(proximal.regularizer(net, tolerance=1e-12, max_steps=1).evaluate)(x)
    assert shape != 3 or not few.converged.all()  # ten steps are enough for the smooth convolutional network
    assert (few.value <= exact + 1e-12).all()  # a lower bound, whatever z


@pytest.mark.slow
def test_derivatives(x64, key):
    net = space(key)
    prior = proximal.regularizer(net)
    z = jax.random.normal(key, (4,), jnp.float64)
    x, j = net(z), jacobian(net, z)
    np.testing.assert_allclose(prior.grad(x), z - x, atol=1e-7)
    np.testing.assert_allclose(jax.grad(prior)(x), z - x, atol=1e-7)
    np.testing.assert_allclose(jax.hessian(prior)(x), jnp.linalg.inv(j) - jnp.eye(4), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.grad(prior.moreau_envelope)(z, 0.4), (z - prior.prox(z, 0.4)) / 0.4, atol=1e-7)

    def value(lam):
        return jnp.sum(prior.prox(z, lam) ** 2)

    slope = (value(0.5 + 1e-5) - value(0.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(0.5)), slope, rtol=1e-5)


def test_derivatives_with_respect_to_the_weights(x64, key):
    net = space(key)
    x = jax.random.normal(key, (4,), jnp.float64)

    def value(scale):
        changed = eqx.tree_at(lambda n: n.output, net, scale * net.output)
        return proximal.regularizer(changed)(x) + jnp.sum(proximal.regularizer(changed).prox(x, 0.6))

    slope = (value(jnp.asarray(1 + 1e-5)) - value(jnp.asarray(1 - 1e-5))) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(1.0)), slope, rtol=1e-5)


def test_weak_convexity_and_its_meaning(x64, key):
    prior = proximal.regularizer(space(key))
    c = prior.weak_convexity
    assert c is not None and 0 <= c < 1 and prior.lipschitz == pytest.approx(1 / (1 - c))
    a, b = jax.random.normal(key, (2, 4), jnp.float64)
    convexified = lambda x: prior(x) + c / 2 * jnp.vdot(x, x)  # noqa: E731
    assert convexified((a + b) / 2) <= (convexified(a) + convexified(b)) / 2 + 1e-10


def test_without_64_bits(key):
    net = proximal.mlp(key, 4, hidden=10, layers=2, beta=5.0, alpha=0.2)
    prior = proximal.regularizer(net)
    z = jax.random.normal(key, (4,))
    assert prior(net(z)).dtype == np.float32
    np.testing.assert_allclose(prior.grad(net(z)), z - net(z), atol=1e-3)


def shipped(name: str, key: jax.Array) -> tuple[proximal.LearnedProximal, jax.Array]:
    """A network that comes with the package, and signals of its range."""
    net = proximal.load(name)
    y = jax.random.uniform(key, (12, *net.shape), jnp.float32, *net.box)
    return net, jnp.clip(jax.vmap(net)(y), *net.box)


def small(key: jax.Array, n: int, **sizes: float) -> tuple[proximal.LearnedProximal, jax.Array]:
    net = proximal.mlp(key, n, **sizes)
    return net, jax.vmap(net)(jax.random.normal(key, (12, n), jnp.float32))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(shipped, "laplace"), marks=pytest.mark.slow),
        pytest.param(partial(shipped, "laplace_squared"), marks=pytest.mark.slow),
        pytest.param(partial(shipped, "digits8x8"), marks=pytest.mark.slow),
        pytest.param(partial(small, n=1, hidden=50, layers=4, beta=10.0, alpha=0.1), marks=pytest.mark.slow),
        pytest.param(partial(small, n=4, hidden=10, layers=2, beta=5.0, alpha=0.2), marks=pytest.mark.slow),
        partial(small, n=30, hidden=20, layers=1, beta=10.0, alpha=0.05),
    ],
)
def test_the_bounds_hold_in_float32(key, make):
    """Rounding included, by which R is off there by much more than the inversion makes it; and at most 200-fold too large."""
    net, x = make(key=key)
    rough = jax.jit(jax.vmap(proximal.regularizer(net, box=None).evaluate))(x)
    with enable_x64(True):
        exact = jax.jit(jax.vmap(proximal.regularizer(net, box=None).evaluate))(jnp.asarray(x, jnp.float64))
        assert exact.converged.all() and exact.value.dtype == np.float64
        value, known = np.asarray(exact.value), float((exact.error_bound + exact.rounding).max())
    assert rough.value.dtype == np.float32 and rough.converged.all()
    off = value - np.asarray(rough.value, np.float64)
    assert known < 1e-2 * np.abs(off).max()
    assert (off <= np.asarray(rough.error_bound) + known).all()
    assert (-off <= np.asarray(rough.rounding) + known).all()
    assert (np.asarray(rough.rounding) < np.asarray(rough.error_bound)).all()
    assert float(rough.error_bound.max()) < 200 * np.abs(off).max()


def test_rounding_in_float64_leaves_the_bound_as_it_is(x64, key):
    net = space(key)
    found = proximal.regularizer(net, max_steps=3).evaluate(net(jax.random.normal(key, (4,), jnp.float64)))
    assert found.residual > 1e-9
    np.testing.assert_allclose(found.error_bound, found.residual**2 / 0.4, rtol=1e-3)
    assert 0 < found.rounding < 1e-12


def test_what_a_network_was_trained_on_is_the_default_range():
    net = proximal.load("laplace")
    prior = proximal.regularizer(net)
    assert net.box == prior.box == (-4.0, 4.0)
    assert jnp.isfinite(prior(jnp.array([3.9])))
    for ask in (prior, prior.grad):
        with pytest.raises(ValueError, match=r"trained on signals from -4 to 4.*another box, None for any"):
            ask(jnp.array([5.0]))
        assert jnp.isnan(jax.jit(lambda x, ask=ask: ask(x))(jnp.array([5.0]))).all()
    assert not prior.evaluate(jnp.array([5.0])).converged
    free = proximal.regularizer(net, box=None)
    assert free.box is None and jnp.isfinite(free(jnp.array([5.0])))
    assert proximal.regularizer(net, box=(-6.0, 6.0)).box == (-6.0, 6.0)
    assert proximal.regularizer(proximal.mlp(jax.random.key(0), 1)).box is None
    assert proximal.projected(net).box == net.box


def test_maps_take_signals_outside_of_the_range(x64, key):
    """As a measurement is one, and what an iteration goes through."""
    net = dataclasses.replace(space(key), box=(-0.01, 0.01))
    prior, free = proximal.regularizer(net), proximal.regularizer(net, box=None)
    v = jax.random.normal(key, (4,), jnp.float64)
    for lam in (1.0, 0.25):
        np.testing.assert_array_equal(prior.prox(v, lam), free.prox(v, lam))
        assert prior.moreau_envelope(v, lam) == free.moreau_envelope(v, lam)
    data = imaging.LeastSquares(imaging.inpainting(v > 0), v)
    x, info = plug_and_play.admm(data, prior, v, rho=1.05, lam=0.25, max_steps=3)
    assert jnp.isfinite(x).all() and jnp.abs(x).max() > 0.01 and info.certificate.holds


def test_signals_outside_of_the_training_range_are_refused(x64, key):
    prior = proximal.regularizer(space(key), box=(0.0, 1.0))
    inside = jnp.full(4, 0.5)
    assert jnp.isfinite(prior(inside))
    with pytest.raises(ValueError, match=r"entries from 0.5 to 1.5, the network was trained on signals from 0 to 1"):
        prior(inside.at[2].set(1.5))
    assert jnp.isnan(jax.jit(lambda x: prior(x))(inside.at[2].set(1.5)))
    assert not prior.evaluate(inside.at[2].set(-0.5)).converged


def test_what_is_not_in_the_range_of_a_network_without_alpha_is_refused(x64, key):
    net = line(key, alpha=0.0)
    with pytest.raises(ValueError, match=r"the network was not inverted.*range of the network \(α = 0\)"):
        proximal.regularizer(net)(jnp.array([50.0]))
    assert float(proximal.regularizer(net).evaluate(net(jnp.zeros(1))).error_bound) == np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: proximal.regularizer(net)(jnp.zeros(3)), r"x: has shape \(3,\), the network is for \(4,\)"),
        (lambda net: proximal.regularizer(net).prox(jnp.zeros(5)), r"v: has shape \(5,\)"),
        (lambda net: proximal.regularizer(net).prox(jnp.zeros(4), 0.0), "lam: is 0, expected a positive step"),
        (lambda net: proximal.regularizer(net, tolerance=0.0), "tolerance: is 0.0"),
        (lambda net: proximal.regularizer(net, box=(1.0, 0.0)), "box: is"),
        (lambda net: proximal.regularizer(net, box="any"), "box: is 'any', expected 'trained'"),
    ],
)
def test_bad_input_is_named(call, message, x64, key, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        call(space(key))
