"""The learned direction: the paper's network against SciPy, its losses against line searches, files."""

import json
from functools import partial
from importlib import resources

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import open_laplacian, path_laplacian, positive
from scipy.ndimage import correlate

from solvers import conjugate_direction as cd
from solvers import direction_network as dn
from solvers import direction_training as dt
from solvers import gallery, poisson

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

TINY = {"dimensions": 1, "blocks": (1, 1, 1), "channels": 4}


def with_random_biases(network, key):
    keys = jax.random.split(key, len(network.biases))
    biases = tuple(0.3 * jax.random.normal(k, b.shape, b.dtype) for k, b in zip(keys, network.biases, strict=True))
    return eqx.tree_at(lambda n: n.biases, network, biases)


# --- the network ---


@pytest.mark.parametrize(
    ("dimensions", "blocks", "parameters", "flops"),
    [
        (3, dn.MODEL_64, 97_457, 121_856),
        (3, dn.MODEL_128, 152_881, 184_064),
        # 14 hidden layers of 9·16·16 + 16, the first of 9·16 + 16, the last of 17; 8 fine and 6 coarse hidden layers
        (2, dn.MODEL_64, 32_657, 2 * (9 * 16 + 9 * 256 * (8 + 6 / 4) + 16)),
    ],
)
def test_the_papers_sizes(key, dimensions, blocks, parameters, flops):
    network = dn.DirectionNetwork(dimensions, blocks, key=key)
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == parameters
    assert dn.flops_per_cell(network) == flops


def by_scipy(network, r):
    """The layers as the paper lists them, one channel at a time."""
    activation = (lambda h: h) if network.activation is None else (lambda h: np.maximum(h, 0))
    biases = network.biases or [np.zeros(w.shape[-1]) for w in network.weights]
    stack = [(np.asarray(w), np.asarray(b)) for w, b in zip(network.weights, biases, strict=True)]
    output = stack.pop()
    axes = tuple(range(1, r.ndim + 1))

    def conv(h):
        w, b = stack.pop(0)
        return np.stack(
            [sum(correlate(h[i], w[..., i, o], mode="constant") for i in range(len(h))) + b[o] for o in range(len(b))]
        )

    def cr(h):
        return activation(conv(h))

    before, coarse, after = network.blocks
    h = conv(r[None])
    a = cr(h)
    b = cr(a)
    for _ in range(before - 1):
        a = cr(b) + a
        b = cr(a)
    g = b
    for axis in axes:
        g = (np.take(g, range(0, g.shape[axis], 2), axis) + np.take(g, range(1, g.shape[axis], 2), axis)) / 2
    for _ in range(coarse):
        t = cr(g)
        g = cr(t) + g
    u = np.kron(g, np.ones((1,) + (2,) * r.ndim)) + b
    for _ in range(after):
        t = cr(u)
        u = cr(t) + u
    assert not stack
    return np.tensordot(output[0][:, 0], u, 1) + output[1][0]


@pytest.mark.parametrize(
    ("shape", "blocks", "bias", "activation"),
    [
        ((8, 6), (2, 2, 1), True, jax.nn.relu),
        ((4, 2, 6), (1, 1, 2), True, jax.nn.relu),
        ((10,), (3, 1, 1), False, jax.nn.relu),
        ((6, 8), (1, 2, 1), True, None),
    ],
)
def test_the_layers_against_scipy(key, shape, blocks, bias, activation):
    make, draw, biases = jax.random.split(key, 3)
    network = dn.DirectionNetwork(
        len(shape), blocks, channels=3, activation=activation, bias=bias, dtype=jnp.float64, key=make
    )
    if bias:
        network = with_random_biases(network, biases)
    r = jax.random.normal(draw, shape)
    # Sums of some hundred terms, ten layers deep, in double precision.
    np.testing.assert_allclose(eqx.filter_jit(network)(r), by_scipy(network, np.asarray(r)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("channels", "out"), [(2, 3), (1, 4)])
def test_plane_by_plane_is_the_same_convolution(key, channels, out):
    """What runs on CPUs in three dimensions, with its derivatives, against XLA's convolution."""
    draws = jax.random.split(key, 3)
    h, weight = jax.random.normal(draws[0], (4, 3, 5, channels)), jax.random.normal(draws[1], (3, 3, 3, channels, out))
    along = jax.random.normal(draws[2], (4, 3, 5, out))

    def by_xla(h, weight):
        return jax.lax.conv_general_dilated(
            h[None], weight, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )[0]

    ours, pull = jax.vjp(dn._convolve_by_planes, h, weight)
    theirs, pull_theirs = jax.vjp(by_xla, h, weight)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)  # sums of at most 60 products
    for found, expected in zip(pull(along), pull_theirs(along), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_weights_are_glorot_uniform_and_biases_zero(key):
    network = dn.DirectionNetwork(3, key=key)
    assert all((b == 0).all() for b in network.biases)
    fans = [27 * (1 + 16), *[27 * 32] * 14, 16 + 1]
    scaled = [np.asarray(w) / np.sqrt(6 / fan) for w, fan in zip(network.weights, fans, strict=True)]
    assert max(abs(w).max() for w in scaled) <= 1 + 1e-6
    # Uniform on [-1, 1]: Kolmogorov's distance exceeds 2.5/√n with probability 7e-6, at each of 15 layers with n > 400.
    for w in scaled[:-1]:
        ordered = np.sort(w.ravel())
        assert abs((ordered + 1) / 2 - (np.arange(ordered.size) + 0.5) / ordered.size).max() < 2.5 / ordered.size**0.5
    assert len({float(w.ravel()[0]) for w in network.weights}) == len(fans)


@pytest.mark.parametrize(
    ("activation", "bias", "linear"), [(None, False, True), (None, True, False), (jax.nn.relu, False, False)]
)
def test_linear_without_biases_only(key, activation, bias, linear):
    make, first, second, biases = jax.random.split(key, 4)
    network = dn.DirectionNetwork(**TINY, activation=activation, bias=bias, dtype=jnp.float64, key=make)
    network = with_random_biases(network, biases) if bias else network
    r, s = jax.random.normal(first, (12,)), jax.random.normal(second, (12,))
    both, one, other = jax.jit(jax.vmap(network))(jnp.stack([2 * r - 3 * s, r, s]))
    defect = jnp.abs(both - 2 * one + 3 * other).max()
    assert (defect < 1e-12) == linear
    assert (defect > 1e-3) != linear


@pytest.mark.parametrize(("blocks", "right", "left"), [(dn.MODEL_64, 22, 21), (dn.MODEL_128, 34, 33)])
def test_impulse_response(key, blocks, right, left):
    """A cell of even number is the first of its pair: one side of the impulse sees one cell more, and mirrored for odd ones."""
    network = dn.DirectionNetwork(1, blocks, channels=2, activation=None, bias=False, dtype=jnp.float64, key=key)
    assert dn.receptive_radius(network) == right
    impulses = jnp.eye(128)[jnp.asarray([64, 65])]
    even, odd = (np.flatnonzero(d) for d in np.asarray(jax.jit(jax.vmap(network))(impulses)))
    assert (64 - even[0], even[-1] - 64) == (right, left)
    assert (65 - odd[0], odd[-1] - 65) == (left, right)


def test_it_passes_through_jit_vmap_and_grad(key):
    make, draw, along = jax.random.split(key, 3)
    module = dn.DirectionNetwork(2, (1, 1, 1), channels=3, activation=jnp.tanh, dtype=jnp.float64, key=make)
    network = jax.jit(module.__call__)
    r, u = jax.random.normal(draw, (3, 4, 6)), jax.random.normal(along, (4, 6))
    batch = jax.jit(jax.vmap(network))(r)
    np.testing.assert_allclose(batch, np.stack([network(one) for one in r]), rtol=1e-12, atol=1e-13)
    slope = jax.jit(lambda r: jax.jvp(network, (r,), (u,))[1])(r[0])
    h = 1e-5  # central differences: h² of a third derivative of order 1, and 1e-16/h of rounding
    np.testing.assert_allclose(slope, (network(r[0] + h * u) - network(r[0] - h * u)) / (2 * h), atol=1e-8)
    back = jax.grad(lambda r: jnp.vdot(network(r), u))(r[0])
    np.testing.assert_allclose(jnp.vdot(back, u), jnp.vdot(slope, u), rtol=1e-10)


def test_rescaled_residuals_have_entries_of_order_one(key):
    make, draw, biases = jax.random.split(key, 3)
    network = with_random_biases(dn.DirectionNetwork(**TINY, dtype=jnp.float64, key=make), biases)
    rescaled = eqx.tree_at(
        lambda n: (n.weights, n.biases),
        dn.DirectionNetwork(**TINY, rescaled=True, dtype=jnp.float64, key=make),
        (network.weights, network.biases),
    )
    r = jax.random.normal(draw, (16,))
    np.testing.assert_allclose(rescaled(r), network(4 * r), rtol=1e-14)
    assert jnp.abs(rescaled(r) - network(r)).max() > 1e-2


@pytest.mark.parametrize("shape", [(5, 8), (6, 6), (7, 3)])
def test_a_masked_direction_stays_in_its_domain(key, shape):
    make, draw, where = jax.random.split(key, 3)
    network = dn.DirectionNetwork(2, (1, 1, 1), channels=3, dtype=jnp.float64, key=make)
    mask = jax.random.bernoulli(where, 0.7, shape)
    r = jax.random.normal(draw, shape)
    d = eqx.filter_jit(dn.MaskedDirection(network, mask))(r)
    assert d.shape == shape
    assert (d[~mask] == 0).all()
    assert (d[mask] != 0).all()
    np.testing.assert_array_equal(d, eqx.filter_jit(dn.MaskedDirection(network, mask))(jnp.where(mask, r, 7.0)))
    filled = np.zeros([n + n % 2 for n in shape])
    filled[: shape[0], : shape[1]] = np.where(mask, r, 0)
    np.testing.assert_allclose(d[mask], by_scipy(network, filled)[: shape[0], : shape[1]][mask], rtol=1e-12)


def test_types(key):
    single = dn.DirectionNetwork(2, (1, 1, 1), channels=4, key=key)
    half = dn.DirectionNetwork(2, (1, 1, 1), channels=4, dtype=jnp.bfloat16, key=key)
    double = dn.DirectionNetwork(2, (1, 1, 1), channels=4, dtype=jnp.float64, key=key)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    r = jax.random.normal(jax.random.key(1), (6, 8))
    exact = eqx.filter_jit(double)(r)
    size = jnp.abs(exact).max()
    # Eight layers' roundings of relative size 2^-8 and 2^-24, with a factor of 4 for their sum.
    for network, rounding in ((single, 2**-24), (half, 2**-8)):
        found = eqx.filter_jit(network)(r)
        assert found.dtype == r.dtype
        assert 0 < jnp.abs(found - exact).max() < 32 * rounding * size
    assert jax.eval_shape(single, r.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (np.ones((4, 5)), ValueError, r"r has shape \(4, 5\); expected even sizes"),
        (np.ones(4), ValueError, r"r has shape \(4,\); expected 2 dimensions, one grid \(vmap"),
        (np.ones((2, 4, 4)), ValueError, "expected 2 dimensions"),
        (np.ones((4, 4), int), TypeError, "r has type int64; expected a floating"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_a_wrong_grid_is_named(key, r, error, message):
    with pytest.raises(error, match=message):
        dn.DirectionNetwork(2, (1, 1, 1), channels=2, key=key)(r)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": 4}, "dimensions is 4"),
        ({"blocks": (1, 0, 1)}, r"blocks is \(1, 0, 1\)"),
        ({"channels": 0}, "channels is 0"),
        ({"dtype": jnp.int32}, "expected a floating type"),
    ],
)
def test_a_wrong_setting_is_named(key, change, message):
    with pytest.raises(ValueError, match=message):
        dn.DirectionNetwork(**(TINY | change), key=key)


# --- losses ---


def line_search(a, r, d, shift=0.0):
    """The error e = A⁻¹ r before and after a step along d; `shift` is added to the step."""
    e = np.linalg.solve(a, r)
    alpha = (d @ r) / (d @ a @ d) + shift
    return e, e - alpha * d, alpha


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_the_line_search(seed):
    rng = np.random.default_rng(seed)
    a = positive(seed, 12)
    r, d = rng.standard_normal((2, 12))
    e, after, alpha = line_search(a, r, d)
    operator = partial(jnp.matmul, jnp.asarray(a))
    # Condition 50 and a dozen terms: rounding of 1e-14 at most.
    np.testing.assert_allclose(dn.residual_loss(operator, d, r), ((r - alpha * (a @ d)) ** 2).sum(), rtol=1e-12)
    squared = (after @ a @ after) / (e @ a @ e)
    np.testing.assert_allclose(dn.energy_loss(operator, d, r, e), squared, rtol=1e-12)
    # Only the step without shift is best in the energy norm, and it is not the one that is best for the residual.
    for shift in (-0.1, 0.1):
        _, worse, _ = line_search(a, r, d, shift * alpha)
        assert worse @ a @ worse > after @ a @ after
    least = ((r - (d @ a @ r) / (d @ a @ a @ d) * (a @ d)) ** 2).sum()
    assert dn.residual_loss(operator, d, r) > least * (1 + 1e-6)


def test_energy_loss_does_not_depend_on_scale_and_sign():
    a = positive(1, 10)
    operator = partial(jnp.matmul, jnp.asarray(a))
    x, d = np.random.default_rng(2).standard_normal((2, 10))
    once = dn.energy_loss(operator, d, a @ x, x)
    np.testing.assert_allclose(dn.energy_loss(operator, -1e3 * d, 1e-4 * a @ x, 1e-4 * x), once, rtol=1e-10)
    np.testing.assert_allclose(
        dn.energy_loss(operator, x, a @ x, x), 0, atol=1e-12
    )  # the error itself: solved in one step


def test_a_direction_without_energy_makes_no_step():
    r = jnp.asarray([1.0, 2.0, -3.0, 0.0])
    residual = jax.jit(jax.value_and_grad(partial(dn.residual_loss, path_laplacian)))
    energy = jax.jit(jax.value_and_grad(partial(dn.energy_loss, path_laplacian)))
    for d in (jnp.zeros(4), jnp.ones(4)):  # the constants carry no energy: A d = 0
        value, slope = residual(d, r)
        assert value == 14
        assert np.isfinite(slope).all()
        value, slope = energy(d, r, r)
        assert value == 1
        assert (slope == 0).all()


def test_a_small_residual_loss_can_leave_the_error():
    """r along the highest eigenvector, the defect along the lowest: |r - αAd| is small, the energy error is not reduced."""
    values = jnp.asarray([1e-4, 1.0])
    r = jnp.asarray([0.01, 1.0])
    d = jnp.asarray([0.0, 1.0])
    operator = partial(jnp.multiply, values)
    assert dn.residual_loss(operator, d, r) < 1.1e-4
    assert dn.energy_loss(operator, d, r, r / values) > 0.49


@pytest.mark.parametrize("loss", [dn.residual_loss, dn.energy_loss])
def test_the_gradient_of_the_losses(loss):
    """With α inside: against central differences."""
    x, d, u = np.random.default_rng(4).standard_normal((3, 12))
    value = partial(loss, open_laplacian, r=open_laplacian(jnp.asarray(x)), x=jnp.asarray(x))
    h = 1e-5
    numeric = (value(jnp.asarray(d + h * u)) - value(jnp.asarray(d - h * u))) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(jnp.asarray(d)), u), numeric, rtol=1e-6, atol=1e-8)


# --- files ---


def same(a, b):
    return bool(eqx.tree_equal(a, b))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": None, "bias": False},
        {"rescaled": True},
        {"dtype": jnp.bfloat16, "activation": jnp.tanh},
        {"dtype": jnp.float64, "channels": 3, "blocks": (2, 1, 3), "dimensions": 2},
    ],
)
def test_a_saved_network_comes_back(key, tmp_path, options):
    network = dn.DirectionNetwork(**(TINY | options), key=key)
    path = tmp_path / "weights.npz"
    dn.save(path, network, command="train it", seed=3)
    back = dn.load(path)
    assert same(network, back)
    assert back.activation is network.activation
    assert (back.dimensions, back.blocks) == (network.dimensions, network.blocks)
    assert back.rescaled == network.rescaled
    header = dn.facts(path)
    assert header["facts"] == {"command": "train it", "seed": 3}
    assert header["versions"]["jax"] == jax.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_files_of_another_kind_are_refused(key, tmp_path):
    network = dn.DirectionNetwork(**TINY, key=key)
    path = tmp_path / "weights.npz"
    with pytest.raises(ValueError, match="one that a file can name: linear, relu"):
        dn.save(path, dn.DirectionNetwork(**TINY, activation=jnp.sin, key=key))
    with pytest.raises(TypeError, match="JSON"):
        dn.save(path, network, seed=object())
    assert list(tmp_path.iterdir()) == []
    path.write_text("weights")
    with pytest.raises(ValueError, match="not a file of load"):
        dn.load(path)
    np.savez(path, header=np.asarray([{"format": 1}], object))
    with pytest.raises(ValueError, match="not a file of load"):  # a pickle inside is not opened
        dn.load(path)
    dn.save(path, network)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    np.savez(path, **(arrays | {"leaf_0": arrays["leaf_0"][..., :2]}))
    with pytest.raises(ValueError, match="damaged"):
        dn.load(path)
    for change, message in (({"format": 99}, "format 1"), ({"network": {"dimensions": 1}}, "cannot be")):
        encoded = np.frombuffer(json.dumps(header | change).encode(), np.uint8)
        np.savez(path, **(arrays | {"header": encoded}))
        with pytest.raises(ValueError, match=message):
            dn.load(path)
    with pytest.raises(FileNotFoundError):
        dn.load(tmp_path / "absent.npz")


# --- the weights that come with the package ---


@pytest.mark.parametrize(("name", "cells", "most"), [("poisson2d", 32, 0.35), ("poisson3d", 16, 0.35)])
def test_shipped_weights_save_most_iterations(name, cells, most):
    """On the domain they were trained on, with a right-hand side that no training data are made of; a part of what
    conjugate gradients take."""
    network = dn.shipped(name)
    domain = dt.training_domain(cells, network.dimensions)
    a, b = poisson.laplacian(domain), jnp.asarray(gallery.plume(domain, 5))
    direction = dn.MaskedDirection(network, domain.fluid)
    x, info = cd.solve(a, b, direction=direction, rtol=1e-6, max_steps=200)
    _, plain = cd.conjugate_gradient(a, b, rtol=1e-6, max_steps=400)
    assert info.converged
    assert plain.converged
    assert int(info.steps) <= most * int(plain.steps)
    assert np.linalg.norm(np.where(domain.fluid, b - a(x), 0)) <= 1.001e-6 * np.linalg.norm(b)
    assert (x[~domain.fluid] == 0).all()


@pytest.mark.parametrize("name", ["poisson2d", "poisson3d"])
def test_shipped_weights_say_how_they_were_made(name):
    with resources.as_file(dn._shipped_file(name)) as path:
        header, size = dn.facts(path), path.stat().st_size
    assert size < 500_000
    facts = header["facts"]
    assert f"--name {name}" in facts["command"]
    assert facts["seed"] == 0
    assert [dt.Stage(**stage) for stage in facts["stages"]] == list(dt.STAGES[name])
    assert all(0 < loss < 0.2 for loss in facts["final_loss"])
    assert {"jax", "equinox", "optax", "numpy"} <= header["versions"].keys()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no network is called 'stokes'; there are \['poisson2d', 'poisson3d'\]"):
        dn.shipped("stokes")
