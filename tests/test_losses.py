"""Losses and parametrisations against log-normal data, for which the score is known, and against formulas in x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generative import losses, nets
from generative.gbm_diffusion import GeometricBrownianMotion, GeometricOrnsteinUhlenbeck, geometric

PROCESSES = {
    "constant": GeometricBrownianMotion(0.1, 0.8),
    "geometric": geometric(0.1, 8.0),
    "OU": GeometricOrnsteinUhlenbeck(6.0),
}
MEAN, VARIANCE = 0.4, 0.3  # of log x_0


def nothing(u, level, label=None):
    return jnp.zeros_like(u)


def model(process, network=nothing, form="denoiser"):
    return losses.Parametrised(network, process, jnp.asarray(MEAN), jnp.sqrt(jnp.asarray(VARIANCE)), form)


def exact(process):
    """The score of log x_t for log x_0 ~ N(MEAN, VARIANCE)."""

    def log_score(y, t):
        a, v = process.scale(t), process.variance(t)
        return -(y - a * MEAN - process.shift(t)) / (a**2 * VARIANCE + v)

    return log_score


# ---- parametrisations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_a_new_denoiser_is_the_score_of_a_lognormal(name, key):
    process = PROCESSES[name]
    y = 3 * jax.random.normal(key, (4, 3))
    for t in (0.01, 0.3, 1.0):
        np.testing.assert_allclose(
            model(process)(y, jnp.asarray(t)), exact(process)(y, jnp.asarray(t)), rtol=2e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_output_of_a_denoiser_is_the_posterior_mean(name, key):
    """With D as in table 1 of Karras et al. 2022, s_Y = (a D + M - y) / V."""
    process, t = PROCESSES[name], jnp.asarray(0.4)
    y, out = jax.random.normal(key, (4, 3)), jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)
    a, shift, v = process.scale(t), process.shift(t), process.variance(t)
    d, sigma, noisy = np.sqrt(VARIANCE), jnp.sqrt(v) / a, (y - shift) / a - MEAN
    skip, gain = d**2 / (sigma**2 + d**2), sigma * d / jnp.sqrt(sigma**2 + d**2)
    seen = []

    def network(u, level, label):
        seen.append((u, level))
        return out

    score = model(process, network)(y, t)
    np.testing.assert_allclose(score, (a * (MEAN + skip * noisy + gain * out) + shift - y) / v, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(seen[0][0], noisy / jnp.sqrt(sigma**2 + d**2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[0][1], np.full(4, np.log(sigma) / 4), rtol=1e-4, atol=1e-5)


def test_noise_and_hyvarinen_forms(key):
    process, t = PROCESSES["constant"], jnp.asarray(0.5)
    y = jax.random.normal(key, (4, 3))

    def network(u, level, label):
        return jnp.full_like(u, 0.7)

    np.testing.assert_allclose(model(process, network, "noise")(y, t), np.full((4, 3), -0.7 / np.sqrt(0.32)), rtol=1e-5)
    np.testing.assert_allclose(model(process, network, "hyvarinen")(y, t), np.full((4, 3), 1.7), rtol=1e-6)


def test_each_of_a_batch_may_have_its_time(key):
    process = PROCESSES["geometric"]
    y, times = jax.random.normal(key, (3, 2, 2)), jnp.array([0.1, 0.5, 1.0])
    together = model(process)(y, times)
    for i, t in enumerate(times):
        np.testing.assert_allclose(together[i], model(process)(y, t)[i], rtol=1e-6)


def test_one_network_serves_every_process(key):
    """It depends on t through sqrt(V)/a alone: equal levels, equal denoised logarithms."""

    def network(u, level, label):
        return jnp.sin(3 * u + level[:, None])

    found = []
    for process in PROCESSES.values():
        t = process.time(jnp.asarray(0.5))
        a, shift, v = process.scale(t), process.shift(t), process.variance(t)
        noisy = jax.random.normal(key, (4, 3))  # of (y - M)/a
        score = model(process, network)(a * noisy + shift, t)
        found.append(noisy + v * score / a)
    np.testing.assert_allclose(found[1], found[0], atol=2e-4)
    np.testing.assert_allclose(found[2], found[0], atol=2e-4)


def test_scales_are_those_of_the_data(key):
    logs = jax.random.normal(key, (500, 3)) * 0.5 + jnp.array([1.0, 2.0, 3.0])
    whole = losses.parametrised(nothing, PROCESSES["OU"], jnp.exp(logs))
    np.testing.assert_allclose(whole.location, np.asarray(logs).mean(), rtol=1e-5)
    np.testing.assert_allclose(whole.deviation, np.asarray(logs).std(), rtol=1e-4)
    each = losses.parametrised(nothing, PROCESSES["OU"], jnp.exp(logs), per="entry")
    np.testing.assert_allclose(each.location, np.asarray(logs).mean(0), rtol=1e-5)
    np.testing.assert_allclose(each.deviation, 0.5, rtol=0.1)


def test_wrong_settings_are_refused(key, no_shape_checks):
    with pytest.raises(ValueError, match=r"form is 'x0', expected one of 'denoiser', 'noise', 'hyvarinen'"):
        model(PROCESSES["OU"], form="x0")
    with pytest.raises(ValueError, match=r"parametrised: x0 holds 1 of 2"):
        losses.parametrised(nothing, PROCESSES["OU"], jnp.array([[1.0], [0.0]]))
    with pytest.raises(ValueError, match=r"weight is 'papre', expected 'paper', 'noise', 'none'"):
        losses.denoising(key, exact(PROCESSES["OU"]), PROCESSES["OU"], jnp.ones((2, 1)), weight="papre")
    with pytest.raises(ValueError, match=r"denoising: x0 holds 2 of 2 .*shift\(1.0\)"):
        losses.denoising(key, exact(PROCESSES["OU"]), PROCESSES["OU"], jnp.zeros((2, 1)))


# ---- times ------------------------------------------------------------------------------------------------------------------


def test_lognormal_times_have_lognormal_levels(key):
    process = geometric(0.001, 100.0)
    t = losses.lognormal(process, 0.5)(key, 20_000)
    levels = np.log(np.asarray(jnp.sqrt(process.variance(t))) / 0.5)
    # Standard errors of the mean and of the deviation; five of them, false once in two million.
    assert abs(levels.mean() + 0.5) < 5 * 1.2 / np.sqrt(len(levels))
    assert abs(levels.std() - 1.2) < 5 * 1.2 / np.sqrt(2 * len(levels))


def test_uniform_times_stay_off_zero(key):
    t = losses.uniform(0.25)(key, 5000)
    assert (
        float(t.min()) >= 0.25 and float(t.max()) <= 1 and abs(float(t.mean()) - 0.625) < 5 * 0.75 / np.sqrt(12 * 5000)
    )


# ---- losses -----------------------------------------------------------------------------------------------------------------


def at(t):
    return lambda key, n: jnp.full(n, t)


def wrong(y, t):
    return jnp.sin(2 * y) - 0.3 * y


@pytest.mark.parametrize("name", ["constant", "OU"])
def test_denoising_is_explicit_plus_a_known_constant(name, key):
    """For log-normal data ½ E‖ξ(x | x_0)‖² - ½ E‖ξ‖² = D/2 (1/V - 1/(a² c + V)), c the variance of log x_0."""
    process, t, size = PROCESSES[name], 0.15, 4000
    a, v = float(process.scale(t)), float(process.variance(t))
    constant = 2 / 2 * (1 / v - 1 / (a**2 * VARIANCE + v))

    @jax.jit
    def gap(key):
        first, second, third = jax.random.split(key, 3)
        x0 = jnp.exp(MEAN + np.sqrt(VARIANCE) * jax.random.normal(first, (size, 2)))
        noise = np.sqrt(v) * jax.random.normal(second, x0.shape)
        x = x0**a * jnp.exp(process.shift(t) + noise)
        return losses.denoising(third, wrong, process, x0, times=at(t), weight="none") - losses.explicit(
            wrong, exact(process), process, x, jnp.asarray(t)
        )

    gaps = np.asarray(jax.lax.map(gap, jax.random.split(key, 64)))
    error = gaps.std(ddof=1) / np.sqrt(len(gaps))
    assert error < 0.02 * constant  # else the next line says little
    assert abs(gaps.mean() - constant) < 5 * error


def test_explicit_by_hand(key):
    process, t = PROCESSES["constant"], jnp.asarray(0.5)
    x = jnp.exp(jax.random.normal(key, (5, 3)))
    by_hand = 0.5 * ((np.asarray(wrong(jnp.log(x), t)) - np.asarray(exact(process)(jnp.log(x), t))) ** 2).sum(1).mean()
    assert float(losses.explicit(wrong, exact(process), process, x, t)) == pytest.approx(by_hand, rel=1e-5)
    weighted = losses.explicit(wrong, exact(process), process, x, t, weight="paper")
    assert float(weighted) == pytest.approx(0.32**2 * by_hand, rel=1e-5)


def test_implicit_is_hyvarinens_loss_in_x(key, x64):
    """½ x² ψ² + 2 x ψ + x² ∂ψ/∂x with ψ = ξ/x, its derivative by central differences."""
    x = jnp.exp(jax.random.normal(key, (6, 2)))
    t = jnp.asarray(0.5)

    def psi(x):
        return (np.asarray(wrong(jnp.log(x), t)) - 1) / np.asarray(x)

    step = 1e-5
    slope = (psi(x + step) - psi(x - step)) / (2 * step)
    by_hand = (0.5 * x**2 * psi(x) ** 2 + 2 * x * psi(x) + x**2 * slope).sum(1).mean()
    assert float(losses.implicit(wrong, x, t)) == pytest.approx(float(by_hand), rel=1e-7)


def test_implicit_finds_the_score_of_a_lognormal(key, x64):
    """Among s = b (m - y) the loss is least at the b of the data; with samples whose moments are exact it is exactly there."""
    z = jax.random.normal(key, (400, 1))
    z = (z - z.mean()) / z.std()
    x = jnp.exp(MEAN + np.sqrt(VARIANCE) * z)

    def loss(b):
        return losses.implicit(lambda y, t: b * (MEAN - y), x, jnp.asarray(0.5))

    assert float(jax.grad(loss)(1 / VARIANCE)) == pytest.approx(0, abs=1e-10)
    # Equal to ordinary score matching of log x less D/2, here with D = 1.
    b = 2.0
    assert float(loss(b)) == pytest.approx(b**2 * VARIANCE / 2 - b - 0.5, rel=1e-10)


def test_random_divergence_is_unbiased(key):
    """A coupled score, whose estimate is not exact."""
    x = jnp.exp(jax.random.normal(key, (1, 3)))
    mix = jnp.array([[1.0, 0.5, 0.0], [-1.0, 2.0, 0.3], [0.7, 0.0, -1.0]])

    def score(y, t):
        return jnp.tanh(y @ mix)

    t = jnp.asarray(0.1)
    keys = jax.random.split(key, 4000)
    found = np.asarray(jax.vmap(lambda k: losses.implicit(score, x, t, key=k))(keys))
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert error > 0
    assert abs(found.mean() - float(losses.implicit(score, x, t))) < 5 * error


def test_weights_are_what_they_say(key):
    process, t = PROCESSES["OU"], 0.3
    v, a = float(process.variance(t)), float(process.scale(t))
    x0 = jnp.exp(jax.random.normal(key, (8, 2)))

    def loss(weight):
        return float(losses.denoising(key, wrong, process, x0, times=at(t), weight=weight))

    assert loss("noise") == pytest.approx(v * loss("none"), rel=1e-5)
    assert loss("paper") == pytest.approx(v**2 * loss("none"), rel=1e-5)
    assert loss(lambda process, t: 3 * t) == pytest.approx(0.9 * loss("none"), rel=1e-5)
    assert loss(losses.edm(0.5)) == pytest.approx(v * (1 + v / a**2 / 0.25) * loss("none"), rel=1e-5)


@pytest.mark.parametrize("name", ["geometric", "OU"])
def test_edm_weight_is_uniform_on_the_output(name, key):
    """½ ‖F - target‖² with the target of Karras et al. 2022, (log x_0 - c_skip noisy) / c_out, at any time."""
    process, out = PROCESSES[name], 0.7
    d = np.sqrt(VARIANCE)
    x0 = jnp.exp(MEAN + 0.5 * jax.random.normal(key, (6, 2)))
    times = jnp.array([0.05, 0.1, 0.3, 0.5, 0.8, 1.0])
    seen = []

    def score(y, t):
        seen.append(y)
        return model(process, lambda u, level, label: jnp.full_like(u, out))(y, t)

    found = losses.denoising(key, score, process, x0, times=lambda key, n: times, weight=losses.edm(d))
    a, shift, v = (
        np.asarray(f(times))[:, None] * np.ones((6, 2)) for f in (process.scale, process.shift, process.variance)
    )
    sigma, noisy = np.sqrt(v) / a, (np.asarray(seen[0]) - shift) / a - MEAN
    skip, gain = d**2 / (sigma**2 + d**2), sigma * d / np.sqrt(sigma**2 + d**2)
    target = (np.log(np.asarray(x0)) - MEAN - skip * noisy) / gain
    assert float(found) == pytest.approx(((out - target) ** 2).sum(1).mean() / 2, rel=1e-3)


def test_labels_reach_the_model(key):
    x0, labels = jnp.ones((3, 2)), jnp.array([2, 0, 1])
    seen = []

    def score(y, t, label):
        seen.append(label)
        return -y

    losses.denoising(key, score, PROCESSES["OU"], x0, label=labels)
    np.testing.assert_array_equal(seen[0], labels)


def test_labels_that_are_no_class_are_refused(key):
    process, x0, labels = PROCESSES["OU"], jnp.ones((3, 2)), jnp.array([0, 3, -1])
    for classes, found in ((4, True), (3, False)):
        trained = model(process, nets.MLP((2,), width=4, depth=1, classes=classes, key=key))
        # Where labels are not known nothing can be raised, but the loss does not pass for one.
        assert bool(jnp.isfinite(jax.jit(lambda label, m=trained: loss_of(key, m, x0, label))(labels))) == found
    with pytest.raises(ValueError, match=r"denoising: label lies in -1 .. 3; expected 0 .. classes - 1 = 2, or -1"):
        loss_of(key, trained, x0, labels)
    with pytest.raises(ValueError, match=r"denoising: label lies in -2 .. 0; expected 0 or more, or -1 for no class"):
        losses.denoising(key, lambda y, t, label: -y, process, x0, label=jnp.array([0, -2, 0]))


def loss_of(key, model, x0, label):
    return losses.denoising(key, model, model.process, x0, label=label)


def test_some_labels_are_left_out(key):
    labels = jnp.arange(10).repeat(500)
    found = np.asarray(losses.without_class(key, labels, share=0.2))
    left_out = found == -1
    assert (found[~left_out] == np.asarray(labels)[~left_out]).all()
    assert abs(left_out.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 5000)
