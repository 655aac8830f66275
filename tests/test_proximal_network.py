"""Learned proximal networks: sizes, convexity, the layers against loops in NumPy, constants that hold, refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import proximal
from solvers.proximal.network import constrained, jacobian, largest_slope, resized

SHAPES = {"mlp": (3,), "image": (2, 5, 4)}

# Compiled once per kind of network, not once per example.
jacobian_of = eqx.filter_jit(jacobian)
applied = eqx.filter_jit(lambda net, y: jax.vmap(net)(y))
slopes_of = eqx.filter_jit(lambda net, y: jax.vmap(lambda y: jnp.linalg.eigvalsh(jacobian(net, y))[-1])(y))
power_of = eqx.filter_jit(lambda net, y, key: largest_slope(net, y, key, 200))


def network(kind: str, key: jax.Array, kept: str = "projection", alpha: float = 0.1) -> proximal.LearnedProximal:
    """Small, and with weights that matter: the initial ones of the image networks are next to nothing."""
    if kind == "mlp":
        return proximal.mlp(key, SHAPES[kind], hidden=6, layers=2, alpha=alpha, kept=kept, dtype=jnp.float64)
    net = proximal.convolutional(
        key, SHAPES[kind], hidden=4, strides=(2, 1), last=3, alpha=alpha, kept=kept, dtype=jnp.float64
    )
    larger = [
        w + (0.2 if kept == "projection" else 8.0) * jnp.abs(jnp.cos(jnp.arange(w.size))).reshape(w.shape)
        for w in constrained(net)
    ]
    return eqx.tree_at(constrained, net, tuple(larger))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda key: proximal.mlp(key, 1), 10_502),
        (lambda key: proximal.mnist(key), 317_056),
        (lambda key: proximal.image128(key), 7_235_713),
        (lambda key: proximal.image128(key, channels=1), 7_175_297),
    ],
)
def test_the_networks_of_the_paper_have_its_parameters(make, expected, key):
    assert make(key).parameters == expected


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(SHAPES)), kept=st.sampled_from(["projection", "softplus"]))
def test_the_jacobian_is_symmetric_and_at_least_alpha(x64, seed, kind, kept):
    key = jax.random.key(seed)
    net = network(kind, key, kept)
    j = np.asarray(jacobian_of(net, 2 * jax.random.normal(key, net.shape, jnp.float64)))
    assert np.abs(j - j.T).max() <= 1e-12 * np.abs(j).max()
    assert np.linalg.eigvalsh(j)[0] >= 0.1 - 1e-10


def test_a_negative_weight_breaks_it_and_the_projection_mends_it(x64, key):
    net = network("mlp", key, alpha=0.0)
    broken = eqx.tree_at(lambda n: n.output, net, net.output.at[0].set(-3.0))
    y = jax.random.normal(key, (50, 3), jnp.float64)
    least = lambda n: float(jnp.linalg.eigvalsh(jax.vmap(lambda y: jacobian(n, y))(y)).min())  # noqa: E731
    assert least(broken) < -0.1
    mended = proximal.projected(broken)
    assert least(mended) >= -1e-10
    assert all(float(w.min()) >= 0 for w in constrained(mended))
    assert mended.output[0] == 0 and (mended.output[1:] == net.output[1:]).all()


def test_weights_kept_by_softplus_begin_where_the_projected_ones_do(x64, key):
    one, other = (proximal.mlp(key, 2, kept=kept, dtype=jnp.float64) for kept in ("projection", "softplus"))
    y = jax.random.normal(key, (2,), jnp.float64)
    np.testing.assert_allclose(one(y), other(y), rtol=1e-9)
    assert proximal.projected(other) is other


def _by_hand(net: proximal.LearnedProximal, y: np.ndarray) -> float:
    """ψ by SciPy's correlation and loops over channels."""
    z = y
    for k, layer in enumerate(net.layers):
        weight = np.asarray(layer.weight)

        def linear(w, x, layer=layer):
            if w.ndim == 2:
                return w @ x.reshape(-1)
            x = np.pad(x, [(0, 0)] + [(layer.padding, layer.padding)] * 2)
            out = [
                sum(scipy.signal.correlate2d(x[i], w[o, i], "valid") for i in range(x.shape[0])) for o in range(len(w))
            ]
            return np.stack(out)[:, :: layer.stride, :: layer.stride]

        total = linear(weight, z)
        if layer.skip is not None:
            total = total + linear(np.asarray(layer.skip), _bilinear(y, layer.resized))
        if layer.bias is not None:
            total = total + np.asarray(layer.bias).reshape(-1, *[1] * (total.ndim - 1))
        z = np.logaddexp(net.beta * total, 0) / net.beta
        assert k == 0 or weight.min() >= 0
    value = np.asarray(net.output) @ z.reshape(len(net.output), -1).mean(1) + net.alpha / 2 * (y**2).sum()
    return value + (0 if net.constant is None else float(net.constant))


def _bilinear(y: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Half-pixel centres, coordinates clamped to the image."""
    for axis, m in zip((1, 2), sides, strict=True):
        n = y.shape[axis]
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        t = (at - low).reshape([-1 if k == axis else 1 for k in range(3)])
        y = np.take(y, low, axis) * (1 - t) + np.take(y, np.minimum(low + 1, n - 1), axis) * t
    return y


@pytest.mark.parametrize("head", ["dense", "convolution"])
def test_the_convolutional_potential_against_loops(head, x64, key):
    net = proximal.convolutional(
        key, (2, 9, 6), hidden=3, strides=(2, 1, 2), head=head, last=4, beta=3.0, alpha=0.3, dtype=jnp.float64
    )
    net = eqx.tree_at(constrained, net, tuple(w + 0.1 for w in constrained(net)))
    y = np.asarray(jax.random.normal(key, net.shape, jnp.float64))
    np.testing.assert_allclose(net.potential(jnp.asarray(y)), _by_hand(net, y), rtol=1e-12)


@pytest.mark.parametrize("sides", [(14, 14), (7, 7), (28, 28), (5, 9)])
def test_resizing(sides, x64, key):
    y = jax.random.normal(key, (2, 28, 28), jnp.float64)
    if all(28 % n == 0 for n in sides):
        np.testing.assert_allclose(resized(y, sides), _bilinear(np.asarray(y), sides), atol=1e-6)  # weights in float32
    else:
        assert resized(y, sides).shape == (2, *sides)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(SHAPES)))
def test_certified_constants_are_not_exceeded(x64, seed, kind):
    key = jax.random.key(seed)
    net = network(kind, key)
    lipschitz, spread = proximal.certified(net)
    y = 3 * jax.random.normal(key, (20, *net.shape), jnp.float64)
    slopes = slopes_of(net, y)
    far = jnp.concatenate([y, 100 * y])
    left = applied(net, far) - net.alpha * far
    sizes = jnp.linalg.norm(left.reshape(len(far), -1), axis=1)
    assert float(slopes.max()) <= lipschitz and float(sizes.max()) <= spread * (1 + 1e-9)
    assert spread <= 100 * float(sizes.max())  # and not by being infinite
    found = float(power_of(net, y[0], key))  # slow where the two largest are close, but never above
    assert 0.95 * float(slopes[0]) <= found <= float(slopes[0]) * (1 + 1e-9)


def test_many_signals_are_one_at_a_time(key):
    net = proximal.convolutional(key, (1, 8, 8), hidden=3, strides=(2,), last=3)
    y = jax.random.uniform(key, (3, 1, 8, 8))
    np.testing.assert_allclose(applied(net, y)[1:2], applied(net, y[1:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda key: proximal.mnist(key)(jnp.zeros((3, 28, 28))),
            r"y: has shape \(3, 28, 28\), the network is for \(1, 28, 28\)",
        ),
        (lambda key: proximal.mlp(key, 2, alpha=-0.1), "alpha is -0.1"),
        (lambda key: proximal.mlp(key, 2, beta=0.0), "beta is 0.0"),
        (lambda key: proximal.mlp(key, 0), "shape is 0"),
        (lambda key: proximal.mlp(key, 2, hidden=0), "0 hidden units"),
        (lambda key: proximal.mlp(key, 2, kept="clip"), "kept is 'clip'"),
        (
            lambda key: proximal.convolutional(key, (28, 28)),
            r"shape is \(28, 28\), expected \(channels, height, width\)",
        ),
        (lambda key: proximal.convolutional(key, (1, 28, 28), strides=(3,)), r"strides are \(3,\)"),
    ],
)
def test_bad_input_is_named(call, message, key, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        call(key)


def test_constants_of_a_known_network_are_known_under_jit(key):
    net = proximal.convolutional(key, (1, 6, 6), hidden=3, last=4, beta=4.0, alpha=0.2)
    eager = proximal.certified(net).lipschitz
    assert jax.jit(lambda y: y * proximal.certified(net).lipschitz)(1.0) == pytest.approx(eager)
