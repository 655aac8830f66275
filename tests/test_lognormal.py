"""Log-normal mixtures against SciPy, quadrature and automatic derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from generative.gbm_diffusion import GeometricBrownianMotion, GeometricOrnsteinUhlenbeck
from generative.lognormal import LogNormal, LogNormalMixture, fitted_prior

pytestmark = pytest.mark.usefixtures("quick_compilation")

W = np.array([0.3, 0.7])
M = np.array([[-1.0, 0.2, 0.4], [0.8, 0.1, -0.5]])
C = np.array([[0.1, 0.3, 0.2], [0.2, 0.5, 0.1]])


def log_density(x):
    """(batch,) of the mixture, by SciPy."""
    parts = stats.lognorm.logpdf(np.asarray(x)[:, None], np.sqrt(C), scale=np.exp(M)).sum(2)
    return np.log(np.exp(parts) @ W)


def test_density_is_that_of_scipy(x64):
    law = LogNormalMixture(W, M, C)
    x = np.exp(np.random.default_rng(0).normal(size=(5, 3)))
    np.testing.assert_allclose(law.log_prob(jnp.asarray(x)), log_density(x), rtol=1e-12)
    np.testing.assert_allclose(law.log_prob_of_log(jnp.log(x)), log_density(x) + np.log(x).sum(1), rtol=1e-11)
    single = LogNormal(jnp.asarray(M[0]), jnp.asarray(C[0]))
    expected = stats.lognorm.logpdf(x, np.sqrt(C[0]), scale=np.exp(M[0])).sum(1)
    np.testing.assert_allclose(single.log_prob(jnp.asarray(x)), expected, rtol=1e-12)


def test_there_is_no_density_where_x_is_not_positive():
    law = LogNormalMixture(W, M, C)
    x = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -2.0, 1.0]])
    assert np.isfinite(law.log_prob(x)).tolist() == [True, False, False]
    assert (law.log_prob(x)[1:] == -jnp.inf).all()
    assert np.isfinite(LogNormal(jnp.asarray(M[0]), jnp.asarray(C[0])).log_prob(x)).tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)])
def test_scores_are_gradients(shape, x64):
    law = LogNormalMixture(W, M.reshape(2, *shape), C.reshape(2, *shape))
    x = jnp.exp(jax.random.normal(jax.random.key(0), (4, *shape)))
    gradient = jax.grad(lambda x: law.log_prob(x).sum())(x)
    np.testing.assert_allclose(law.hyvarinen(x), x * gradient, rtol=1e-9)
    np.testing.assert_allclose(law.score_of_log(jnp.log(x)), x * gradient + 1, rtol=1e-9)


@pytest.mark.parametrize("process", [GeometricBrownianMotion(0.7, 0.9), GeometricOrnsteinUhlenbeck(2.0)])
def test_the_mixture_at_t_is_the_integral_over_the_kernel(process, x64):
    """One coordinate: ∫ p_0(y_0) N(y; a y_0 + M, V) dy_0 on a grid, and the score as its derivative."""
    law = LogNormalMixture(W, M[:, 0], C[:, 0])
    t, grid, y = 0.3, np.linspace(-6, 6, 20001), np.array([-1.2, 0.0, 0.7])
    a, shift, v = (float(f(t)) for f in (process.scale, process.shift, process.variance))
    start = stats.norm.pdf(grid[:, None], M[:, 0], np.sqrt(C[:, 0])) @ W
    kernel = stats.norm.pdf(y[:, None], a * grid + shift, np.sqrt(v))
    density = kernel @ start * (grid[1] - grid[0])
    np.testing.assert_allclose(law.at(process, t).log_prob_of_log(jnp.asarray(y)), np.log(density), rtol=1e-9)
    slope = (kernel * (a * grid + shift - y[:, None]) / v) @ start * (grid[1] - grid[0])
    found = law.log_score(process)(jnp.asarray(y), jnp.asarray(t))
    np.testing.assert_allclose(found, slope / density, rtol=1e-8)


def test_far_from_all_parts_the_score_is_that_of_the_nearest():
    law = LogNormalMixture(W, M[:, :1], C[:, :1])
    found = law.score_of_log(jnp.array([[60.0], [-60.0]]))
    np.testing.assert_allclose(found[:, 0], [(0.8 - 60) / 0.2, (0.8 + 60) / 0.2], rtol=1e-5)


def test_samples_have_the_law(key):
    """KS of each coordinate and of a product that tells the parts apart; four tests at 1e-4."""
    law = LogNormalMixture(W, M, C)
    logs = np.log(law.sample(key, 4000))
    directions = np.concatenate([np.eye(3), [[1.0, -1.0, 2.0]]])
    for d in directions:
        means, deviations = M @ d, np.sqrt(C @ d**2)
        cdf = lambda v, m=means, s=deviations: stats.norm.cdf(v[:, None], m, s) @ W  # noqa: E731
        assert stats.kstest(logs @ d, cdf).pvalue > 1e-4
    single = LogNormal(jnp.asarray(M[0]), jnp.asarray(C[0]))
    z = (np.log(single.sample(key, 2000)) - M[0]) / np.sqrt(C[0])
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4


@pytest.mark.parametrize(("per", "axes"), [("pixel", (0,)), ("channel", (0, 2, 3)), ("all", (0, 1, 2, 3))])
@pytest.mark.parametrize("process", [GeometricBrownianMotion(0.7, 0.9), GeometricOrnsteinUhlenbeck(2.0)])
def test_fitted_prior_has_the_moments_of_noised_data(process, per, axes):
    x0 = np.exp(np.random.default_rng(0).normal(0.3, 0.4, size=(50, 2, 3, 4))).astype(np.float32)
    prior = fitted_prior(process, jnp.asarray(x0), per)
    a, shift, v = (float(f(1.0)) for f in (process.scale, process.shift, process.variance))
    mean, variance = np.log(x0).mean(axes), np.log(x0).var(axes)
    places = tuple(k - 1 for k in axes if k)
    np.testing.assert_allclose(
        prior.mean, np.broadcast_to(np.expand_dims(a * mean + shift, places), (2, 3, 4)), rtol=1e-4
    )
    np.testing.assert_allclose(
        prior.variance, np.broadcast_to(np.expand_dims(a**2 * variance + v, places), (2, 3, 4)), rtol=1e-4
    )
    assert prior.sample(jax.random.key(0), 5).shape == (5, 2, 3, 4)


def test_a_score_is_compiled_once():
    traced = []

    @jax.jit
    def evaluated(score, y, t):
        traced.append(1)
        return score(y, t)

    for _ in range(3):
        evaluated(LogNormalMixture(W, M, C).log_score(GeometricBrownianMotion()), jnp.zeros((2, 3)), jnp.asarray(0.5))
    assert len(traced) == 1


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormalMixture(W, M[:1], C[:1]), "expected (k,), (k, *event), (k, *event)"),
        (lambda: LogNormalMixture(W, M, C[:, :2]), "expected (k,), (k, *event), (k, *event)"),
        (lambda: LogNormalMixture(2 * W, M, C), "expected positive numbers of sum 1"),
        (lambda: LogNormalMixture(W, M, -C), "LogNormalMixture: variances has the smallest entry -0.5"),
        (lambda: LogNormal(jnp.zeros(2), jnp.ones(3)), "mean has shape (2,) and variance (3,)"),
        (lambda: LogNormal(jnp.zeros(2), jnp.zeros(2)), "LogNormal: variance has the smallest entry 0"),
        (lambda: fitted_prior(GeometricBrownianMotion(), jnp.ones((2, 3)), "row"), "per is 'row', expected 'pixel'"),
        (lambda: fitted_prior(GeometricBrownianMotion(), jnp.zeros((2, 3))), "fitted_prior: x0"),
        (lambda: LogNormalMixture(W, M, C).hyvarinen(jnp.zeros((1, 3))), "LogNormalMixture.hyvarinen: x holds 3 of 3"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
