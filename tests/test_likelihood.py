"""The likelihood by the probability flow against the density of a mixture, which is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generative import gbm_diffusion as gbm
from generative.likelihood import log_likelihood, transport
from generative.lognormal import LogNormal, LogNormalMixture

pytestmark = pytest.mark.usefixtures("quick_compilation")

W = np.array([0.2, 0.3, 0.5])
M = np.array([[-1.0, -0.6], [0.9, -0.4], [0.1, 1.0]])
C = np.array([[0.3, 0.4], [0.35, 0.3], [0.3, 0.5]]) ** 2

every_process = pytest.mark.parametrize(
    "process",
    [gbm.GeometricBrownianMotion(), gbm.geometric(0.3, 1.5, 0.4), gbm.GeometricOrnsteinUhlenbeck(3.0)],
    ids=["gbm", "geometric", "ou"],
)


def case(process, n=40):
    law = LogNormalMixture(W, M, C)
    x = law.sample(jax.random.key(0), n)
    return law.log_score(process), x, law.at(process, 1.0), law.log_prob(x)


@every_process
def test_fixed_steps_find_the_density(process, x64):
    score, x, prior, exact = case(process)
    found, info = log_likelihood(score, process, x, prior, steps=80)
    np.testing.assert_allclose(found, exact, atol=1e-4)
    assert info.evaluations == 320 and bool(info.converged)
    np.testing.assert_allclose(prior.log_prob_of_log(info.log_end) + info.change - jnp.log(x).sum(1), found, rtol=1e-12)
    if not process.reverting:
        by_hand, _ = log_likelihood(score, process, x, prior, steps=np.linspace(0, 1, 11), loop="host")
        scanned, _ = log_likelihood(score, process, x, prior, steps=10)
        np.testing.assert_allclose(by_hand, scanned, rtol=1e-9)


@every_process
def test_adaptive_steps_keep_the_tolerance(process, x64):
    score, x, prior, exact = case(process)
    errors = {}
    for tolerance in (1e-3, 1e-7):
        found, info = log_likelihood(score, process, x, prior, rtol=tolerance, atol=tolerance)
        errors[tolerance] = float(jnp.abs(found - exact).max())
        assert bool(info.converged)
    assert errors[1e-3] < 3e-2 and errors[1e-7] < 1e-5, errors


def test_the_error_falls_with_the_fourth_power(x64):
    process = gbm.GeometricBrownianMotion()
    score, x, prior, exact = case(process)
    errors = [float(jnp.abs(log_likelihood(score, process, x, prior, steps=n)[0] - exact).max()) for n in (40, 80)]
    assert np.log2(errors[0] / errors[1]) > 3.4, errors


def test_random_signs_are_right_in_the_mean(x64, key):
    """One x, 4000 sign vectors: the mean within four standard errors, which are small and not zero."""
    process = gbm.GeometricBrownianMotion()
    score, _, prior, _ = case(process)
    x = jnp.array([[1.2, 0.9]])
    exact, _ = log_likelihood(score, process, x, prior, steps=20)
    found, _ = log_likelihood(score, process, jnp.repeat(x, 4000, 0), prior, divergence="hutchinson", key=key, steps=20)
    error = float(found.std()) / np.sqrt(4000)
    assert 0 < error < 0.05
    assert abs(float(found.mean() - exact[0])) < 4 * error


def test_signs_are_exact_where_the_jacobian_is_diagonal(key):
    process = gbm.GeometricOrnsteinUhlenbeck(3.0)
    law = LogNormalMixture(np.ones(1), np.zeros((1, 2)), np.array([[0.2, 0.5]]))
    x = law.sample(key, 5)
    found, _ = log_likelihood(
        law.log_score(process), process, x, law.at(process, 1.0), divergence="hutchinson", key=key, steps=30
    )
    np.testing.assert_allclose(found, law.log_prob(x), atol=1e-3)


def test_a_start_after_zero_is_the_density_there(x64):
    process = gbm.GeometricBrownianMotion()
    score, x, prior, _ = case(process)
    found, _ = log_likelihood(score, process, x, prior, steps=100, start=0.2)
    np.testing.assert_allclose(found, LogNormalMixture(W, M, C).at(process, 0.2).log_prob(x), atol=1e-5)


def test_events_of_any_shape():
    process = gbm.GeometricBrownianMotion()
    law = LogNormalMixture(W, M.reshape(3, 1, 2, 1), C.reshape(3, 1, 2, 1))
    x = law.sample(jax.random.key(0), 3)
    found, _ = log_likelihood(law.log_score(process), process, x, law.at(process, 1.0), steps=60)
    np.testing.assert_allclose(found, law.log_prob(x), atol=2e-3)


def test_a_log_normal_prior_gives_the_density_of_the_model(x64):
    """With the flow of one law and its exact prior, as `LogNormal` and under jit."""
    process = gbm.GeometricBrownianMotion(0.5, 0.9)
    law = LogNormalMixture(np.ones(1), M[:1], C[:1])
    x = law.sample(jax.random.key(0), 4)
    end = law.at(process, 1.0)
    prior = LogNormal(end.means[0], end.variances[0])
    found = jax.jit(lambda x: log_likelihood(law.log_score(process), process, x, prior, steps=60)[0])(x)
    np.testing.assert_allclose(found, law.log_prob(x), atol=1e-5)


def test_transport_follows_the_flow_of_one_law_and_back(x64):
    """Of one normal law the flow keeps (u - m) / sqrt(c + L²) in u = (y - M)/a."""
    process = gbm.GeometricOrnsteinUhlenbeck(3.0)
    law = LogNormalMixture(np.ones(1), M[:1], C[:1])
    score, x = law.log_score(process), jnp.array([[0.5, 1.0], [2.0, 0.7]])
    kept = []
    end, info = transport(score, process, x, 1.0, 0.05, rtol=1e-8, atol=1e-8)
    for t, at in ((1.0, x), (0.05, end)):
        u = np.log(at) / float(process.scale(t))
        kept.append((u - M[0]) / np.sqrt(C[0] + float(process.level(t)) ** 2))
    np.testing.assert_allclose(kept[1], kept[0], rtol=1e-5)
    assert bool(info.converged)
    back, _ = transport(score, process, end, 0.05, 1.0, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(back, x, rtol=1e-6)
    with pytest.raises(
        FloatingPointError, match=r"transport: the result is not finite or the tolerances were not met in 3"
    ):
        transport(score, process, x, 1.0, 0.05, rtol=1e-8, atol=1e-8, max_steps=3)


def usual():
    score, x, prior, _ = case(gbm.GeometricBrownianMotion(), 2)
    return {"log_score": score, "process": gbm.GeometricBrownianMotion(), "x": x, "prior": prior}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"divergence": "none"}, ValueError, "divergence is 'none', expected 'exact' or 'hutchinson'"),
        ({"divergence": "hutchinson"}, ValueError, "divergence is 'hutchinson' and key is None"),
        ({"key": jax.random.key(0)}, ValueError, "divergence is 'exact' and key is given"),
        ({"steps": 0}, ValueError, "steps is 0, expected at least 1"),
        ({"steps": np.array([1.0, 0.0])}, ValueError, "expected a number or two or more increasing times"),
        ({"steps": 3, "loop": "while"}, ValueError, "loop is 'while', expected 'scan' or 'host'"),
        ({"start": 1.0}, ValueError, "start is 1.0, expected 0 <= start < 1"),
        ({"x": jnp.zeros((2, 2))}, ValueError, "log_likelihood: x holds 4 of 4 entries that are not positive"),
        ({"steps": 5, "log_score": lambda y, t: -y / t}, FloatingPointError, "pass start=1e-5"),
        ({"max_steps": 2, "rtol": 1e-6, "atol": 1e-6}, FloatingPointError, "the tolerances were not met in 2 steps"),
    ],
)
def test_errors_say_what_is_wrong(given, error, message):
    with pytest.raises(error) as raised:
        log_likelihood(**(usual() | given))
    assert message in str(raised.value)


def test_without_throw_the_failure_is_in_the_diagnostics():
    found, info = log_likelihood(**usual(), max_steps=2, rtol=1e-6, atol=1e-6, throw=False)
    assert not bool(info.converged)
    found, info = log_likelihood(**(usual() | {"log_score": lambda y, t: -y / t}), steps=5, throw=False)
    assert not bool(info.converged) and not np.isfinite(found).any()
