"""Networks: shapes, classes, independence of the rows, convolutions against XLA's, no weight that does nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generative import nets

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shaken(network, key):
    """All weights random, also those that start at zero."""
    leaves, structure = jax.tree.flatten(eqx.filter(network, eqx.is_inexact_array))
    keys = jax.random.split(key, len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, moved), network)


def small_unet(key, shape=(8, 8), classes=None):
    return nets.UNet(shape, widths=(8, 16), blocks=1, patch=2, classes=classes, key=key)


def small_mlp(key, classes=None):
    return nets.MLP((3, 2), width=16, depth=2, classes=classes, key=key)


MAKERS = {"UNet": (small_unet, (8, 8)), "MLP": (small_mlp, (3, 2))}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_new_network_returns_zeros(name, key):
    make, shape = MAKERS[name]
    u = jax.random.normal(key, (3, *shape))
    np.testing.assert_array_equal(eqx.filter_jit(make(key))(u, jnp.zeros(3)), np.zeros_like(u))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_level_and_class_matter_and_rows_are_independent(name, key):
    make, shape = MAKERS[name]
    network = eqx.filter_jit(shaken(make(key, classes=4), jax.random.fold_in(key, 1)))
    u, level, label = jax.random.normal(key, (3, *shape)), jnp.array([-1.0, 0.0, 0.8]), jnp.array([0, 3, -1])
    out = network(u, level, label)
    assert out.shape == u.shape and bool(jnp.isfinite(out).all())
    for i in range(3):
        alone = network(u.at[(i + 1) % 3].set(7.0), level.at[(i + 2) % 3].set(0.3), label.at[(i + 1) % 3].set(1))
        np.testing.assert_allclose(alone[i], out[i], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(network(u, level + 0.1, label) - out).min(tuple(range(1, u.ndim))).max()) > 1e-4
    other = network(u, level, jnp.array([1, 2, 0]))
    assert (jnp.abs(other - out).reshape(3, -1).max(1) > 1e-3).all()
    none = network(u, level, None)
    np.testing.assert_allclose(none[2], out[2], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(none[0] - out[0]).max()) > 1e-3


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_weight_does_something(name, key):
    make, shape = MAKERS[name]
    network = shaken(make(key, classes=2), jax.random.fold_in(key, 1))
    u = jax.random.normal(key, (6, *shape))
    level, label = jnp.linspace(-1, 1, 6), jnp.array([0, 1, -1, 0, 1, -1])

    @eqx.filter_jit
    def slopes(network):
        return eqx.filter_grad(lambda n: (n(u, level, label) ** 2).sum())(network)

    for path, slope in jax.tree_util.tree_leaves_with_path(slopes(network)):
        assert float(jnp.abs(slope).max()) > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("bad", [-2, 4, 5])
def test_a_label_that_is_no_class_is_refused_or_nan(name, bad, key):
    make, shape = MAKERS[name]
    network = shaken(make(key, classes=4), jax.random.fold_in(key, 1))
    u, level = jax.random.normal(key, (3, *shape)), jnp.linspace(-1, 1, 3)
    with pytest.raises(
        ValueError, match=r"network: label lies in .*; expected 0 .. classes - 1 = 3, or -1 for no class"
    ):
        network(u, level, jnp.array([0, bad, nets.NO_CLASS]))
    traced = eqx.filter_jit(network)
    out, good = (traced(u, level, jnp.array([0, middle, nets.NO_CLASS])) for middle in (bad, 3))
    assert bool(jnp.isnan(out[1]).all()) and bool(jnp.isfinite(good).all())
    np.testing.assert_array_equal(out[::2], good[::2])


def test_unsigned_labels_are_labels(key, no_shape_checks):
    """Images of digits come with labels of a byte, which know no -1."""
    network = shaken(small_mlp(key, classes=4), key)
    u, level, label = jax.random.normal(key, (3, 3, 2)), jnp.zeros(3), np.array([0, 3, 2])
    out = network(u, level, jnp.asarray(label))
    for dtype in (np.uint8, np.uint32):
        np.testing.assert_array_equal(network(u, level, label.astype(dtype)), out)
    with pytest.raises(ValueError, match=r"label lies in 0 .. 255; expected"):
        network(u, level, np.array([0, 255, 2], np.uint8))
    with pytest.raises(ValueError, match=r"label is of dtype float32; expected integers"):
        network(u, level, label.astype(np.float32))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_by_loops(size, key):
    x = np.asarray(jax.random.normal(key, (2, 4, 6, 3)))
    convolution = shaken(nets.Convolution(3, 5, size=size, key=key), key)
    around = size // 2
    padded = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    expected = np.zeros((2, 4, 6, 5))
    for i in range(4):
        for j in range(6):
            window = padded[:, i : i + size, j : j + size]
            expected[:, i, j] = np.tensordot(window, np.asarray(convolution.kernel), 3) + np.asarray(convolution.bias)
    np.testing.assert_allclose(convolution(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_by_hand(key):
    x = jax.random.normal(key, (2, 3, 5, 16)) * 4 + 1
    norm = nets.GroupNorm(16)
    assert norm.groups == 4
    out = np.asarray(norm(x)).reshape(2, 15, 4, 4)
    np.testing.assert_allclose(out.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.var((1, 3)), 1, atol=1e-4)


def test_patches_go_there_and_back(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    patched = nets._patched(x, 2)
    assert patched.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patched[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(nets._unpatched(patched, 2), x)


def test_halves_and_doubles():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(nets._halved(x)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(nets._halved(nets._doubled(x)), x)


def test_colour_images_and_more_sizes(key):
    network = shaken(nets.UNet((4, 8, 3), widths=(4, 8), blocks=2, patch=1, attention=False, key=key), key)
    u = jax.random.normal(key, (2, 4, 8, 3))
    assert eqx.filter_jit(network)(u, jnp.zeros(2)).shape == u.shape
    assert network.middle[1] is None


def test_parameters_are_counted(key):
    network = nets.MLP((2,), width=4, depth=1, key=key)
    embedding = 32 * 4 + 4 + 4 * 4 + 4
    assert nets.parameters(network) == embedding + (2 * 4 + 4) + 2 * (4 * 4 + 4) + (4 * 2 + 2)


def test_wrong_shapes_are_refused(key, no_shape_checks):
    with pytest.raises(ValueError, match=r"shape is \(10, 8\); .* divide by patch \* 2\^\(sizes - 1\) = 4"):
        small_unet(key, (10, 8))
    with pytest.raises(ValueError, match=r"MLP: u has shape \(2, 5\); expected \(batch, 3, 2\)"):
        small_mlp(key)(jnp.zeros((2, 5)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"UNet: u has shape \(2, 4, 8\); expected \(batch, 8, 8\)"):
        small_unet(key)(jnp.zeros((2, 4, 8)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"width is 0 and depth 3"):
        nets.MLP((2,), width=0, key=key)
    with pytest.raises(ValueError, match=r"a label is given to a network made without classes"):
        small_mlp(key)(jnp.zeros((1, 3, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
