"""Distances between sets of samples against closed forms and loops; a classifier that learns digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from generative import data, fidelity, training


def test_sliced_distance_of_a_moved_set_is_the_move(key):
    x = jax.random.normal(key, (200, 1))
    assert float(fidelity.sliced_wasserstein(key, x, x[::-1] + 0.7)) == pytest.approx(0.7, rel=1e-4)
    assert float(fidelity.sliced_wasserstein(key, x, x)) == 0


def test_sliced_distance_of_more_dimensions(key):
    """Squared, the mean over directions of (θ·v)² is |v|²/d: within a few standard errors of 4000 directions."""
    x, v = jax.random.normal(key, (50, 4)), jnp.array([1.0, -2.0, 0.5, 0.0])
    found = float(fidelity.sliced_wasserstein(key, x, x + v, projections=4000)) ** 2
    assert found == pytest.approx(float(v @ v) / 4, rel=0.1)


def test_sliced_distance_of_sets_of_different_size(key):
    """Normal samples of standard deviations 1 and 2 are 1 apart."""
    x = jax.random.normal(key, (4000, 1))
    y = 2 * jax.random.normal(jax.random.fold_in(key, 1), (1000, 1))
    assert float(fidelity.sliced_wasserstein(key, x, y)) == pytest.approx(1, abs=0.15)
    assert float(fidelity.sliced_wasserstein(key, y, x)) == pytest.approx(1, abs=0.15)


def test_frechet_distance_against_the_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(200, 5)) + 0.5
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fidelity.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert fidelity.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)
    assert fidelity.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert fidelity.frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)


def test_frechet_distance_of_features_that_are_dependent():
    """Covariances without full rank, as those of units that never fire."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(50, 2)), np.zeros((50, 3))], 1)
    y = np.concatenate([3 * rng.normal(size=(50, 2)), np.zeros((50, 3))], 1)
    assert fidelity.frechet_distance(x, y) == pytest.approx(fidelity.frechet_distance(x[:, :2], y[:, :2]), rel=1e-6)
    with pytest.raises(ValueError, match=r"x has 1 rows"):
        fidelity.frechet_distance(x[:1], y)


def test_kernel_distance_by_loops():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32) + 1

    def mean(a, b, skip):
        return np.mean(
            [(p @ q / 3 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        )

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert float(fidelity.kernel_distance(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_has_no_bias_where_frechet_has(key):
    """Of small sets of one distribution: over 200 pairs the mean is zero within five standard errors."""
    sets = jax.random.normal(key, (200, 2, 10, 4))
    found = np.asarray(jax.vmap(lambda pair: fidelity.kernel_distance(pair[0], pair[1]))(sets))
    assert abs(found.mean()) < 5 * found.std() / np.sqrt(200)
    assert np.mean([fidelity.frechet_distance(pair[0], pair[1]) for pair in sets[:20]]) > 0.3


POINTS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=12, max_size=12, unique=True)


@settings(max_examples=40)
@given(POINTS, POINTS, st.integers(1, 3))
def test_precision_and_recall_by_loops(one, other, neighbours):
    # Steps that differ keep distances from being equal, where rounding decides.
    x, y = np.array(one) * [1.0, 1.37] + [0.011, 0.0], np.array(other) * [1.11, 0.93]

    def reach(points):
        return [sorted(np.hypot(*(points - p).T))[neighbours] for p in points]

    radii = {"x": reach(x), "y": reach(y)}
    gaps = [abs(np.hypot(*(p - q)) - r) for p in x for q in y for r in (*radii["x"], *radii["y"])]
    if min(gaps) < 1e-4:
        return
    precision = np.mean([any(np.hypot(*(q - p)) <= r for p, r in zip(x, radii["x"], strict=True)) for q in y])
    recall = np.mean([any(np.hypot(*(q - p)) <= r for q, r in zip(y, radii["y"], strict=True)) for p in x])
    found = fidelity.precision_recall(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), neighbours=neighbours)
    assert (float(found.precision), float(found.recall)) == pytest.approx((precision, recall), abs=1e-6)


def test_a_missing_mode_lowers_recall_only(key):
    keys = jax.random.split(key, 3)
    near, far = jax.random.normal(keys[0], (200, 2)), 50 + jax.random.normal(keys[1], (200, 2))
    samples = jax.random.normal(keys[2], (200, 2))
    found = fidelity.precision_recall(jnp.concatenate([near, far]), samples)
    assert float(found.precision) > 0.9
    assert 0.4 < float(found.recall) <= 0.5
    with pytest.raises(ValueError, match=r"samples 3, neighbours is 3; expected more rows"):
        fidelity.precision_recall(near, samples[:3])


@pytest.mark.slow
def test_a_classifier_learns_digits(key):
    digits = data.load("digits8x8")
    images, labels = jnp.asarray(digits["x"] / 16, jnp.float32), digits["y"].astype(np.int32)
    model = fidelity.Classifier((8, 8), widths=(8, 8, 16), features=32, key=key)
    assert fidelity.accuracy(model, images[1400:], labels[1400:]) < 0.4
    trained, _ = training.train(
        key,
        model,
        lambda k, m, x, y: fidelity.cross_entropy(k, m, x, y, moved=0),
        (images[:1400], labels[:1400]),
        steps=250,
        batch=32,
        rate=5e-3,
        ema=0.9,
        chunk=250,
    )
    assert fidelity.accuracy(trained, images[1400:], labels[1400:]) > 0.9
    features = fidelity.in_batches(trained.features, images, batch=700)
    assert features.shape == (1797, 32)
    np.testing.assert_allclose(features[1500:1510], trained.features(images[1500:1510]), rtol=1e-3, atol=1e-4)


def test_moved_images_are_moved(key):
    """With a classifier that reads one pixel, the loss sees it at other places."""

    def one_pixel(images):
        return jnp.stack([images[:, 4, 4], jnp.zeros(len(images))], 1)

    images = jnp.zeros((400, 8, 8)).at[:, 4, 4].set(5.0)
    labels = jnp.zeros(400, jnp.int32)
    still = float(fidelity.cross_entropy(key, one_pixel, images, labels, moved=0))
    assert still == pytest.approx(np.log1p(np.exp(-5)), rel=1e-4)
    moved = float(fidelity.cross_entropy(key, one_pixel, images, labels, moved=2))
    share = 1 / 25  # of the images that stay in place
    assert moved == pytest.approx(share * still + (1 - share) * np.log(2), abs=5 * 0.7 * np.sqrt(share / 400))


def test_a_classifier_refuses_other_shapes(key):
    with pytest.raises(ValueError, match=r"shape is \(10, 8\) .* divide by 4"):
        fidelity.Classifier((10, 8), key=key)
