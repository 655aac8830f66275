"""The learned direction: the paper's network against SciPy, its losses against line searches, Lanczos, data, training, files."""

import io
import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from scipy.ndimage import correlate

from solvers import direction_network as dn

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

TINY = {"dimensions": 1, "blocks": (1, 1, 1), "channels": 4}


def path_laplacian(v):
    """The chain of cells with a wall at both ends: singular, the constants are its null space."""
    steps = jnp.diff(v)
    return jnp.pad(steps, (1, 0)) - jnp.pad(steps, (0, 1))


def open_laplacian(v):
    """The chain with zero pressure beyond both ends."""
    padded = jnp.pad(v, 1)
    return 2 * v - padded[2:] - padded[:-2]


def dense(operator, n):
    return np.asarray(jax.vmap(operator)(jnp.eye(n)))


def positive(seed, n, condition=50.0):
    """A random symmetric matrix with eigenvalues from 1 to `condition`."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    a = (q * np.geomspace(1, condition, n)) @ q.T
    return (a + a.T) / 2


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


# --- Lanczos and Ritz vectors ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-13), (jnp.float32, 1e-5)])
def test_lanczos_is_an_orthonormal_tridiagonalisation(dtype, tolerance):
    """On a grid, up to the last step, where the eigenvalues are those of the matrix; tolerances are some fifty roundings."""
    a = positive(3, 24, 1e3)
    operator = lambda v: (jnp.asarray(a, v.dtype) @ v.ravel()).reshape(v.shape)  # noqa: E731
    start = jnp.asarray(np.random.default_rng(5).standard_normal((4, 6)), dtype)
    found = jax.jit(partial(dn.lanczos, operator, steps=24))(start)
    assert found.basis.shape == (24, 4, 6)
    assert found.basis.dtype == found.diagonal.dtype == dtype
    assert found.steps == 24
    q = np.asarray(found.basis, np.float64).reshape(24, 24)
    t = np.diag(found.diagonal) + np.diag(found.off_diagonal, 1) + np.diag(found.off_diagonal, -1)
    np.testing.assert_allclose(q[0], start.ravel() / np.linalg.norm(start), rtol=0, atol=tolerance)
    np.testing.assert_allclose(q @ q.T, np.eye(24), atol=tolerance)
    np.testing.assert_allclose(q @ a @ q.T, t, atol=1e3 * tolerance)
    ritz = dn.ritz_vectors(found)
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(a), atol=1e3 * tolerance)
    v = np.asarray(ritz.vectors, np.float64).reshape(24, 24)
    np.testing.assert_allclose(a @ v.T, v.T * np.asarray(ritz.values, np.float64), atol=1e3 * tolerance)


def test_a_few_steps_find_the_ends_of_the_spectrum():
    """Ritz values interlace, and the largest converges first.

    By Kaniel and Paige its error falls with T(1 + 2γ)⁻², T the Chebyshev polynomial of degree 59 and γ = 0.035 the relative
    gap of the largest eigenvalue: below 1e-17, less than rounding.
    """
    a = positive(6, 200, 1e3)
    w, v = np.linalg.eigh(a)
    start = jnp.asarray(np.random.default_rng(6).standard_normal(200))
    ritz = dn.ritz_vectors(dn.lanczos(partial(jnp.matmul, jnp.asarray(a)), start, 60))
    assert (np.asarray(ritz.values) >= w[:60] - 1e-10).all()
    assert (np.asarray(ritz.values) <= w[-60:] + 1e-10).all()
    np.testing.assert_allclose(ritz.values[-1], w[-1], rtol=1e-12)
    assert abs(v[:, -1] @ np.asarray(ritz.vectors[-1])) > 1 - 1e-10
    np.testing.assert_allclose(np.linalg.norm(ritz.vectors, axis=1), 1, rtol=1e-12)


def test_an_exhausted_space_ends_the_recurrence():
    """Three eigenvalues: three steps; what follows stands for nothing."""
    values = jnp.repeat(jnp.asarray([1.0, 2.0, 5.0]), 4)
    operator = partial(jnp.multiply, values)
    found = dn.lanczos(operator, jnp.asarray(np.random.default_rng(7).standard_normal(12)), 8)
    assert found.steps == 3
    assert (found.basis[3:] == 0).all()
    ritz = dn.ritz_vectors(found)
    np.testing.assert_allclose(ritz.values, [0, 0, 0, 0, 0, 1, 2, 5], atol=1e-13)
    assert dn.lanczos(operator, jnp.zeros(12), 3).steps == 0


def test_lanczos_names_bad_input():
    with pytest.raises(ValueError, match="steps is 0"):
        dn.lanczos(open_laplacian, jnp.ones(4), 0)
    with pytest.raises(ValueError, match=r"makes \(3,\) of \(4,\)"):
        dn.lanczos(jnp.diff, jnp.ones(4), 2)


# --- data ---


def exact_ritz(operator, n):
    values, vectors = np.linalg.eigh(dense(operator, n))
    return dn.Ritz(jnp.asarray(values), jnp.asarray(vectors.T))


def test_coefficients_of_the_training_set(key):
    """Unit vectors whose shares in the low Ritz vectors are nine times larger, none in the null space.

    Of 16 values one is null; of the 15 others the 8 lowest count as low, by default 16//2 + 16//20.
    """
    ritz = exact_ritz(path_laplacian, 16)
    r = np.asarray(dn.training_set(key, 4000, ritz))
    assert r.shape == (4000, 16)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 1, rtol=1e-12)
    shares = r @ np.asarray(ritz.vectors).T
    assert abs(shares[:, 0]).max() < 1e-12
    assert abs(r.sum(1)).max() < 1e-12
    # Ratios to the last share are the normals' own.  The mean of log|c| has the standard error 1.11/√4000 = 0.018, the
    # difference of two 0.025; 6 of these are exceeded with probability 2e-9.
    size = np.log(abs(shares[:, 1:])).mean(0)
    np.testing.assert_allclose(size - size[-1], np.log([9.0] * 8 + [1.0] * 7), atol=0.15)
    few = np.asarray(dn.training_set(key, 4000, ritz, low=3, boost=2.0)) @ np.asarray(ritz.vectors).T
    size = np.log(abs(few[:, 1:])).mean(0)
    np.testing.assert_allclose(size - size[-1], np.log([2.0] * 3 + [1.0] * 12), atol=0.15)


def test_pairs_belong_together_however_rough_the_ritz_vectors(key):
    start = jnp.asarray(np.random.default_rng(8).standard_normal(40))
    ritz = dn.ritz_vectors(dn.lanczos(path_laplacian, path_laplacian(start), 6))
    r, x = jax.jit(partial(dn.training_pairs, count=5, ritz=ritz, operator=path_laplacian))(key)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(x) @ dense(path_laplacian, 40), r, atol=1e-12)
    # With exact eigenvectors the residuals are those of the paper.
    ritz = exact_ritz(path_laplacian, 16)
    pairs = dn.training_pairs(key, 5, ritz, path_laplacian)
    np.testing.assert_allclose(pairs.r, dn.training_set(key, 5, ritz), atol=1e-11)


def test_data_names_bad_input(key):
    ritz = exact_ritz(open_laplacian, 4)
    with pytest.raises(ValueError, match="count is 0"):
        dn.training_set(key, 0, ritz)
    with pytest.raises(ValueError, match="low 5; expected at least 1, and 0 to 4"):
        dn.training_set(key, 1, ritz, low=5)


# --- training ---


@pytest.fixture
def problem():
    network = dn.DirectionNetwork(**TINY, key=jax.random.key(1))
    data = dn.training_pairs(jax.random.key(2), 12, exact_ritz(open_laplacian, 16), open_laplacian)
    return network, dn.Examples(*(rows.astype(jnp.float32) for rows in data))


def same(a, b):
    return bool(eqx.tree_equal(a, b))


@pytest.mark.parametrize("loss", [dn.energy_loss, dn.residual_loss])
def test_training_reduces_the_loss(problem, loss):
    network, data = problem
    settings = {"loss": loss, "steps": 50, "batch": 12, "optimizer": optax.adam(1e-2)}
    found, info = dn.train(network, open_laplacian, data, key=jax.random.key(0), **settings)

    @eqx.filter_jit
    def mean(network):
        return jax.vmap(lambda r, x: loss(open_laplacian, network(r), r, x))(*data).mean()

    assert (info.steps, info.stopped, info.losses.shape) == (50, "steps", (50,))
    np.testing.assert_allclose(info.losses[0], mean(network), rtol=1e-5)  # single precision
    assert info.losses[-1] < 0.7 * info.losses[0]
    assert mean(found) < 0.7 * info.losses[0]
    assert network.weights[0].dtype == found.weights[0].dtype


def test_an_epoch_takes_every_row_once(problem):
    network, _ = problem
    rows = jnp.arange(10.0)[:, None] * jnp.ones(16)
    loss = lambda operator, d, r: r.mean() + 0 * d.sum()  # noqa: E731
    settings = {"loss": loss, "steps": 25, "batch": 1, "chunk": 7}
    _, info = dn.train(network, open_laplacian, rows, key=jax.random.key(3), **settings)
    epochs = info.losses[:20].astype(int).reshape(2, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()
    assert len(set(info.losses[20:])) == 5


def test_data_can_be_made_at_every_step(problem):
    network, _ = problem
    ritz = exact_ritz(open_laplacian, 16)
    make = eqx.Partial(dn.training_pairs, ritz=ritz, operator=open_laplacian)
    loss = lambda operator, d, r, x: r[0] + 0 * d.sum()  # noqa: E731
    _, info = dn.train(network, open_laplacian, make, key=jax.random.key(3), loss=loss, steps=4, batch=2)
    assert len(set(info.losses)) == 4
    only = partial(dn.training_set, ritz=ritz)
    loss = lambda operator, d, r: r[0] + 0 * d.sum()  # noqa: E731
    _, alone = dn.train(network, open_laplacian, only, key=jax.random.key(3), loss=loss, steps=4, batch=2)
    np.testing.assert_allclose(alone.losses, info.losses, rtol=1e-10)  # the same coefficients of exact eigenvectors


def test_a_step_that_is_not_finite_stops(problem):
    network, data = problem
    poisoned = dn.Examples(data.r.at[7].set(jnp.nan), data.x)
    settings = {"key": jax.random.key(4), "batch": 1, "chunk": 5}
    with pytest.warns(RuntimeWarning, match="not finite at step"):
        found, info = dn.train(network, open_laplacian, poisoned, steps=24, **settings)
    assert info.stopped == "not finite"
    assert info.steps == len(info.losses) < 12
    assert np.isfinite(info.losses).all()
    kept, _ = dn.train(network, open_laplacian, data, steps=info.steps, **settings)
    assert same(found, kept)


class Interrupt(Exception):
    pass


def test_a_resumed_run_is_bit_identical(problem, tmp_path):
    network, data = problem
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 17))
    run = partial(
        dn.train, network, open_laplacian, data, key=jax.random.key(5), steps=17, batch=5, chunk=4, optimizer=optimizer
    )
    whole, info = run()
    path = tmp_path / "run.npz"

    def interrupt(step, loss, network):
        if step == 8:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(checkpoint=path, callback=interrupt)
    steps = []
    resumed, again = run(checkpoint=path, callback=lambda step, loss, network: steps.append(step))
    assert steps == [12, 16, 17]
    assert same(whole, resumed)
    assert again.losses.tolist() == info.losses.tolist()
    finished, third = run(checkpoint=path)
    assert same(whole, finished)
    assert third.steps == 17
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    with pytest.raises(ValueError, match="holds 17 steps"):
        run(checkpoint=path, steps=16)
    for change, name in (
        ({"key": jax.random.key(6)}, "key"),
        ({"batch": 4}, "batch"),
        ({"optimizer": optax.adam(1e-2)}, "program"),
        ({"loss": dn.residual_loss}, "program"),
    ):
        with pytest.raises(ValueError, match=f"another .*{name}"):
            run(checkpoint=path, **change)
    for arguments, name in (
        ((network, path_laplacian, data), "program"),
        ((network, open_laplacian, dn.Examples(data.r, -data.x)), "data"),
        ((dn.DirectionNetwork(**TINY, key=jax.random.key(7)), open_laplacian, data), "start"),
    ):
        with pytest.raises(ValueError, match=f"another .*{name}"):
            dn.train(*arguments, checkpoint=path, **run.keywords)
    with pytest.raises(ValueError, match="existing folder"):
        run(checkpoint=tmp_path / "absent" / "run.npz")


def test_half_precision_trains_and_resumes(problem, tmp_path):
    _, data = problem
    network = dn.DirectionNetwork(**TINY, dtype=jnp.bfloat16, key=jax.random.key(8))
    run = partial(dn.train, network, open_laplacian, data, key=jax.random.key(5), checkpoint=tmp_path / "run.npz")
    first, _ = run(steps=3)
    again, info = run(steps=3)
    assert first.weights[1].dtype == jnp.bfloat16
    assert same(first, again)
    assert np.isfinite(info.losses).all()


def test_callback_and_progress(problem):
    network, data = problem
    seen = []
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    settings = {"key": jax.random.key(9), "steps": 9, "chunk": 3, "progress": console}
    found, info = dn.train(
        network, open_laplacian, data, callback=lambda *now: seen.append(now) or now[0] == 6, **settings
    )
    assert (info.steps, info.stopped) == (6, "callback")
    assert [(step, loss) for step, loss, _ in seen] == [(3, info.losses[2]), (6, info.losses[5])]
    assert same(seen[-1][2], found)
    assert "6/9" in console.export_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"chunk": 0}, "chunk 0"),
        ({"batch": 13}, "batch is 13"),
        ({"batch": 0}, "batch is 0"),
        ({"data": (jnp.ones((3, 16)), jnp.ones((4, 16)))}, r"shapes \[\(3, 16\), \(4, 16\)\]"),
    ],
)
def test_training_names_bad_input(problem, change, message):
    network, data = problem
    arguments = {"data": data, "key": jax.random.key(0), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        dn.train(network, open_laplacian, **arguments)


# --- files ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": None, "bias": False},
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
