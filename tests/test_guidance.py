"""Guidance and filling in, on normal log-data, where every conditional density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generative import guidance, losses, nets
from generative.gbm_diffusion import GeometricOrnsteinUhlenbeck, geometric

PROCESSES = {"geometric": geometric(0.2, 30.0), "OU": GeometricOrnsteinUhlenbeck(9.0)}


def normal_score(mean, variance, process):
    def log_score(y, t):
        a, v = process.scale(t), process.variance(t)
        return -(y - a * mean - process.shift(t)) / (a**2 * variance + v)

    return log_score


def test_guided_score_is_of_the_tilted_density(key):
    """p_∅ (p_c/p_∅)^w of two normal densities of one variance is normal with the mean m_∅ + w (m_c - m_∅)."""
    process, t = PROCESSES["geometric"], jnp.asarray(0.4)
    free, given = normal_score(0.2, 0.5, process), normal_score(1.0, 0.5, process)
    y = jax.random.normal(key, (5, 2))
    for w in (0.0, 0.5, 1.0, 3.0):
        expected = normal_score(0.2 + w * 0.8, 0.5, process)(y, t)
        np.testing.assert_allclose(guidance.guided(given, free, w)(y, t), expected, rtol=1e-4, atol=1e-5)


def test_it_does_not_matter_which_score_is_guided(key):
    """ξ = s_Y - 1: combining the ξ and adding one is combining the s_Y; one of each is wrong by the weight."""
    process, t, w = PROCESSES["OU"], jnp.asarray(0.4), 2.5
    free, given = normal_score(0.2, 0.5, process), normal_score(1.0, 0.3, process)
    y = jax.random.normal(key, (5, 2))
    logs = guidance.guided(given, free, w)(y, t)
    xi = guidance.guided(lambda y, t: given(y, t) - 1, lambda y, t: free(y, t) - 1, w)(y, t)
    np.testing.assert_allclose(xi + 1, logs, rtol=1e-4, atol=1e-5)
    mixed = guidance.guided(lambda y, t: given(y, t) - 1, free, w)(y, t)
    np.testing.assert_allclose(mixed - logs, np.full((5, 2), -w), rtol=1e-4)


def test_guidance_by_class_is_one_call_of_both_halves(key):
    seen = []

    def model(y, t, label):
        seen.append(np.asarray(label))
        return jnp.sin(y) * (label[:, None] + 2.0)

    y, t = jax.random.normal(key, (3, 2)), jnp.asarray(0.5)
    out = guidance.of_class(model, jnp.array([4, 0, 2]), 2.0)(y, t)
    np.testing.assert_array_equal(seen[0], [4, 0, 2, -1, -1, -1])
    given, free = jnp.sin(y) * jnp.array([[6.0], [2.0], [4.0]]), jnp.sin(y)
    np.testing.assert_allclose(out, free + 2 * (given - free), rtol=1e-6)
    np.testing.assert_allclose(guidance.of_class(model, 1)(y, t), 3 * jnp.sin(y), rtol=1e-6)
    np.testing.assert_allclose(guidance.of_class(model, 1, 0.0)(y, t), jnp.sin(y), rtol=1e-6)
    assert [len(labels) for labels in seen] == [6, 3, 6]


def test_a_label_that_is_no_class_is_refused(key):
    process = PROCESSES["OU"]
    network = nets.MLP((2,), classes=3, key=key)
    model = losses.parametrised(network, process, jnp.exp(jax.random.normal(key, (5, 2))))
    y, t = jax.random.normal(key, (2, 2)), jnp.asarray(0.5)
    for label, span in ((3, "3 .. 3"), (jnp.array([0, 7]), "0 .. 7"), (np.array([-2, 1]), "-2 .. 1")):
        with pytest.raises(ValueError, match=rf"of_class: label lies in {span}; expected 0 .. classes - 1 = 2, or -1"):
            guidance.of_class(model, label, 2.0)
    for label in (2, nets.NO_CLASS, jnp.array([nets.NO_CLASS, 0])):
        assert bool(jnp.isfinite(guidance.of_class(model, label, 2.0)(y, t)).all())
    # How many classes another function has is not known, but that there are no negative ones is.
    guidance.of_class(lambda y, t, label: y, 7)
    with pytest.raises(ValueError, match=r"of_class: label lies in -3 .. -3; expected 0 or more, or -1 for no class"):
        guidance.of_class(lambda y, t, label: y, -3)


# ---- filling in -------------------------------------------------------------------------------------------------------------

CORRELATION = 0.9


def pair_score(process):
    """log x_0 two normal numbers of variance 1, correlated."""

    def log_score(y, t):
        a, v = process.scale(t), process.variance(t)
        y = y - process.shift(t)
        diagonal, beside = a**2 + v, a**2 * CORRELATION
        return (beside * y[:, ::-1] - diagonal * y) / (diagonal**2 - beside**2)

    return log_score


def drawn(log_score, process, key, n, steps=100):
    """Backwards by the exponential integrator in log space, from t = 1 to hardly any noise, then the denoised logarithm."""
    levels = jnp.geomspace(process.level(1.0), 0.01, steps)
    noisy = process.level(1.0) * jax.random.normal(key, (n, 2))

    def step(noisy, given):
        key, before, after = given
        t = process.time(before)
        score = log_score(process.scale(t) * noisy + process.shift(t), t)
        clean = noisy + before**2 * process.scale(t) * score
        kept = (after / before) ** 2
        spread = after * jnp.sqrt(1 - kept)
        return clean + kept * (noisy - clean) + spread * jax.random.normal(key, noisy.shape), None

    keys = jax.random.split(jax.random.fold_in(key, 1), steps - 1)
    noisy, _ = jax.lax.scan(step, noisy, (keys, levels[:-1], levels[1:]))
    t = process.time(levels[-1])
    score = log_score(process.scale(t) * noisy + process.shift(t), t)
    return noisy + levels[-1] ** 2 * process.scale(t) * score


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_filling_in_keeps_what_is_known_and_uses_it(name, key):
    process, value, n = PROCESSES[name], 1.2, 4000
    known, mask = jnp.array([np.exp(value), 1.0]), jnp.array([True, False])
    errors = {}
    for pull in (0.0, 1.0):
        score = guidance.inpainting(pair_score(process), process, known, mask, pull=pull)
        y0 = jax.jit(lambda k, s=score: drawn(s, process, k, n))(key)
        np.testing.assert_allclose(y0[:, 0], value, atol=1e-4)
        errors[pull] = abs(float(y0[:, 1].mean()) - CORRELATION * value)
    # Neither is exact: measured .34 and .05, with standard errors of at most 1/sqrt(n), of which here are five.
    noise = 5 / np.sqrt(n)
    assert errors[1.0] < 0.05 + noise
    assert errors[0.0] > 0.34 - noise
    free = jax.jit(lambda k: drawn(pair_score(process), process, k, n))(key)
    assert abs(float(free[:, 1].mean())) < 0.05 + noise  # without conditioning there is nothing to see


def test_independent_entries_are_not_disturbed(key):
    """Where nothing can be learned from what is known, the others keep their score."""
    process, t = PROCESSES["OU"], jnp.asarray(0.3)
    score = normal_score(0.1, 0.4, process)
    y = jax.random.normal(key, (4, 3))
    known, mask = jnp.array([2.0, -1.0, 0.0]), jnp.array([True, False, False])  # what is not known may be anything
    for pull in (0.0, 1.0):
        found = guidance.inpainting(score, process, known, mask, pull=pull, deviation=0.6)(y, t)
        np.testing.assert_allclose(found[:, 1:], score(y, t)[:, 1:], rtol=1e-5)
        a, v = process.scale(t), process.variance(t)
        np.testing.assert_allclose(found[:, 0], (a * jnp.log(2.0) + process.shift(t) - y[:, 0]) / v, rtol=1e-5)


def test_filling_in_refuses_what_cannot_be(key, no_shape_checks):
    process = PROCESSES["OU"]
    score = normal_score(0.1, 0.4, process)
    with pytest.raises(ValueError, match=r"inpainting: known, where mask is true, holds 1 of 2 .*shift\(1.0\)"):
        guidance.inpainting(score, process, jnp.array([0.0, 1.0]), jnp.array([True, False]))
    with pytest.raises(ValueError, match=r"known has shape \(2,\) and mask \(3,\)"):
        guidance.inpainting(score, process, jnp.ones(2), jnp.ones(3, bool))
    conditioned = guidance.inpainting(score, process, jnp.ones(2), jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"y has events of shape \(3,\); expected that of known, \(2,\)"):
        conditioned(jnp.ones((4, 3)), jnp.asarray(0.5))
