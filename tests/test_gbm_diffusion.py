"""Multiplicative diffusion against closed forms written out with NumPy, SciPy, and derivatives of densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from generative import gbm_diffusion as gbm
from generative.lognormal import LogNormalMixture

pytestmark = pytest.mark.usefixtures("quick_compilation")


def processes():
    return {
        "paper": gbm.GeometricBrownianMotion(),
        "drifting": gbm.GeometricBrownianMotion(0.7, 1.3),
        "geometric": gbm.geometric(0.1, 3.0),
        "geometric, drifting": gbm.geometric(2.0, 0.5, 0.4),
        "functions": gbm.from_functions(lambda t: 0.3 * jnp.sin(3 * t), lambda t: t + t**3),
        "reverting": gbm.GeometricOrnsteinUhlenbeck(5.0),
    }


every_process = pytest.mark.parametrize("process", processes().values(), ids=processes().keys())
SOME = ("drifting", "functions", "reverting")
some_processes = pytest.mark.parametrize("process", [processes()[name] for name in SOME], ids=SOME)

W, M, C = np.array([0.2, 0.3, 0.5]), np.array([[-1.0, -0.6], [0.9, -0.4], [0.1, 1.0]]), np.array([0.15, 0.25, 0.2]) ** 2


def mixture():
    return LogNormalMixture(W, M, np.stack([C, 2 * C], 1))


def slope(f, t):
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


@every_process
def test_kernel_solves_the_equations_of_its_moments(process, x64):
    t = jnp.linspace(0.001, 1, 9)
    mu, sigma, c = process.drift(t), process.volatility(t), process.reversion(t)
    a, shift, variance = process.scale(t), process.shift(t), process.variance(t)
    np.testing.assert_allclose(slope(process.scale, t), c * a, atol=1e-12)
    np.testing.assert_allclose(slope(process.shift, t), mu - sigma**2 / 2 + c * shift, atol=1e-12)
    np.testing.assert_allclose(slope(process.variance, t), sigma**2 + 2 * c * variance, rtol=1e-10)
    start = [float(f(0.0)) for f in (process.scale, process.shift, process.variance)]
    np.testing.assert_allclose(start, [1, 0, 0], atol=1e-14)
    assert process.reverting == (not np.allclose(a, 1))
    for f in (process.scale, process.shift, process.variance, process.drift, process.volatility, process.reversion):
        assert f(t).shape == (9,) and f(t).dtype == t.dtype and f(t[3]).shape == ()


@settings(max_examples=25)
@given(st.floats(0.05, 4), st.floats(0.05, 4))
def test_geometric_variance_is_the_integral(first, last):
    t = np.linspace(0, 1, 2001)
    sigma = first * (last / first) ** t
    expected = np.sum((sigma[1:] ** 2 + sigma[:-1] ** 2) / 2 * np.diff(t))
    assert float(gbm.geometric(first, last).variance(1.0)) == pytest.approx(expected, rel=1e-4)


def test_equal_ends_are_the_constant_process_with_derivatives():
    t = jnp.linspace(0, 1, 5)
    constant, flat = gbm.GeometricBrownianMotion(0.2, 0.8), gbm.geometric(0.8, 0.8, 0.2)
    np.testing.assert_allclose(flat.variance(t), constant.variance(t), rtol=1e-6)
    np.testing.assert_allclose(flat.shift(t), constant.shift(t), atol=1e-6)
    # d/dσ_1 of ∫ σ_0² (σ_1/σ_0)^2t at σ_1 = σ_0 is σ_0 of 2 ∫ t
    grad = jax.grad(lambda s: gbm.GeometricSchedule(0.8, s).variance(1.0))(jnp.asarray(0.8))
    assert float(grad) == pytest.approx(0.8, rel=1e-5)


@every_process
def test_time_of_a_level(process, x64):
    """2e-12 is what the bisection leaves, where there is no formula."""
    t = jnp.array([1e-6, 1e-3, 0.2, 0.77, 1.0])
    np.testing.assert_allclose(process.time(process.level(t)), t, rtol=1e-5, atol=2e-12)
    np.testing.assert_array_equal(process.time(2 * process.level(jnp.ones(1))), [1.0])


def test_draws_follow_the_kernel(key):
    """KS of 4000 z: a false alarm in 10 000."""
    process = gbm.GeometricOrnsteinUhlenbeck(2.0)
    x0 = jnp.exp(jax.random.normal(key, (2000, 2)))
    t = jnp.linspace(0.01, 1, 2000)
    x, z = gbm.perturb(jax.random.fold_in(key, 1), process, x0, t)
    v = 1 - np.exp(-2 * np.asarray(t))[:, None]
    expected = np.sqrt(1 - v) * np.log(x0) + np.sqrt(v) * np.asarray(z)
    np.testing.assert_allclose(np.log(x), expected, atol=1e-5)
    assert stats.kstest(np.ravel(z), "norm").pvalue > 1e-4


@some_processes
def test_transition_density_is_the_log_normal_one(process, x64):
    x0, x = jnp.array([[0.3, 2.0], [1.0, 5.0]]), jnp.array([[0.7, 1.0], [3.0, 0.2]])
    for t in (0.05, 1.0):
        a, shift, v = (float(f(t)) for f in (process.scale, process.shift, process.variance))
        law = stats.lognorm(np.sqrt(v), scale=np.asarray(x0) ** a * np.exp(shift))
        np.testing.assert_allclose(gbm.transition_log_density(process, x, t, x0), law.logpdf(x).sum(1), rtol=1e-12)
    assert gbm.transition_log_density(process, x.at[0, 1].set(-1.0), 1.0, x0)[0] == -jnp.inf


@some_processes
def test_conditional_score_is_x_times_the_gradient(process, x64, key):
    x0 = jnp.array([[0.3, 2.0], [1.0, 5.0]])
    t = jnp.array([0.1, 0.9])
    x, z = gbm.perturb(key, process, x0, t)
    xi = gbm.conditional_score(process, x, t, x0)
    gradient = jax.grad(lambda x: gbm.transition_log_density(process, x, t, x0).sum())(x)
    np.testing.assert_allclose(xi, x * gradient, rtol=1e-9)
    np.testing.assert_allclose(xi, -1 - z / np.sqrt(process.variance(t))[:, None], rtol=1e-9)


def test_noise_is_refused_by_data_that_are_not_positive(key):
    with pytest.raises(ValueError, match=r"perturb: x0 holds 1 of 2 .*the smallest is 0.*shift\(1.0\)"):
        gbm.perturb(key, gbm.GeometricBrownianMotion(), jnp.array([[0.0, 1.0]]), 0.5)


@pytest.mark.parametrize("bad", [0.0, -2.0, np.nan, np.inf])
def test_formulas_of_log_x_refuse_what_has_no_logarithm(bad):
    process, good = gbm.GeometricBrownianMotion(), jnp.array([[1.0, 2.0]])
    x = good.at[0, 1].set(bad)
    score = mixture().log_score(process)
    calls = {
        "conditional_score: x ": lambda x: gbm.conditional_score(process, x, 0.5, good),
        "conditional_score: x0 ": lambda x: gbm.conditional_score(process, good, 0.5, x),
        "transition_log_density: x0 ": lambda x: gbm.transition_log_density(process, good, 0.5, x),
        "reverse_drift: x ": lambda x: gbm.reverse_drift(process, score, x, 0.5),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}holds 1 of 2 .*shift\(1.0\)"):
            call(x)
        jax.jit(call)(x)  # not known there
        assert bool(jnp.isfinite(jax.jit(call)(good)).all())


@pytest.mark.parametrize("function", [gbm.conditional_score, gbm.transition_log_density])
def test_at_time_zero_there_is_no_density(function):
    process, x = gbm.GeometricBrownianMotion(), jnp.ones((2, 1))
    for t, least in ((0.0, "0"), (jnp.array([0.5, 0.0]), "0"), (-0.5, "-0.5"), (jnp.asarray(np.nan), "nan")):
        with pytest.raises(ValueError, match=rf"{function.__name__}: t is {least}, expected positive times: at t = 0 "):
            function(process, x, t, x)
    with pytest.raises(ValueError, match="expected positive times"):
        jax.jit(lambda x: function(process, x, 0.0, x))(x)
    assert bool(jnp.isfinite(function(process, x, jnp.array([0.5, 1e-3]), x)).all())


@pytest.mark.parametrize("sigma", [60.0, 1e15])
def test_noise_that_overflows_is_an_error(sigma, key):
    """Of numbers with deviation 60 one in seven is beyond ±87, where exp is infinite, or zero."""
    process, x0 = gbm.GeometricBrownianMotion(sigma=sigma), jnp.ones((100, 1))
    with pytest.raises(
        FloatingPointError, match=r"perturb: x_t holds \d+ of 100 .* float32 ends at 87; expected a smaller"
    ):
        gbm.perturb(key, process, x0, 1.0)
    jax.jit(lambda x0: gbm.perturb(key, process, x0, 1.0))(x0)  # not known there
    x, _ = gbm.perturb(key, process, x0, 0.0)
    np.testing.assert_array_equal(x, x0)


def posterior(process, y, t):
    """Weights (batch, k), means and variances (batch, k, 2) of y_0 given y_t = y under `mixture`."""
    a, shift, v = (float(f(t)) for f in (process.scale, process.shift, process.variance))
    c = np.stack([C, 2 * C], 1)
    away = y[:, None] - a * M - shift
    logs = np.log(W) + stats.norm.logpdf(away, scale=np.sqrt(a**2 * c + v)).sum(2)
    weights = np.exp(logs - logs.max(1, keepdims=True))
    gain = a * c / (a**2 * c + v)
    return weights / weights.sum(1, keepdims=True), M + gain * away, c - gain * a * c


@some_processes
@pytest.mark.parametrize("t", [0.05, 1.0])
def test_denoisers_are_posterior_moments(process, t, x64):
    y = np.array([[0.0, 0.5], [-1.0, -0.6], [1.5, -1.5]]) + float(process.shift(t))
    weights, means, variances = posterior(process, y, t)
    first = np.einsum("bk,bkd->bd", weights, means)
    second = np.einsum("bk,bkd->bd", weights, variances + means**2)
    arithmetic = np.einsum("bk,bkd->bd", weights, np.exp(means + variances / 2))
    score, law = mixture().log_score(process), mixture().at(process, t)
    np.testing.assert_allclose(gbm.posterior_log_mean(process, score, jnp.asarray(y), t), first, atol=1e-11)
    found = gbm.posterior_log_variance(process, score, jnp.asarray(y), t)
    np.testing.assert_allclose(found, second - first**2, atol=1e-10)
    found = gbm.posterior_mean(process, law.log_prob_of_log, jnp.asarray(y), t)
    np.testing.assert_allclose(found, arithmetic, rtol=1e-9)
    assert np.abs(arithmetic / np.exp(first) - 1).max() > 1e-4  # the geometric mean is another number


@some_processes
def test_reverse_equations_run_the_densities_backwards(process, x64):
    """The Fokker-Planck residuals of the exact density of one coordinate, in y and in x."""
    law = LogNormalMixture(W, M[:, :1], C[:, None])
    score = law.log_score(process)
    t = jnp.asarray(0.4)
    sigma = process.volatility(t)

    def residual(density, drift, spread, at):
        flux = jax.grad(lambda v: drift(v) * density(v, t))(at)
        spread = jax.grad(jax.grad(lambda v: spread(v) ** 2 * density(v, t) / 2))(at)
        return (-jax.grad(density, 1)(at, t) + flux - spread) / (jnp.abs(flux) + jnp.abs(spread))

    def of_log(y, t):
        return jnp.exp(law.at(process, t).log_prob_of_log(y.reshape(1, 1))[0])

    def of_x(x, t):
        return jnp.exp(law.at(process, t).log_prob(x.reshape(1, 1))[0])

    @jax.jit
    @jax.vmap
    def residuals(y, noise):
        def drift_y(y):
            return gbm.reverse_log_drift(process, score, y.reshape(1, 1), t, noise)[0, 0]

        def drift_x(x):
            return gbm.reverse_drift(process, score, x.reshape(1, 1), t, noise)[0, 0]

        in_log = residual(of_log, drift_y, lambda v: noise * sigma, y)
        return in_log, residual(of_x, drift_x, lambda v: noise * sigma * v, jnp.exp(y))

    y, noise = (v.ravel() for v in np.meshgrid([-1.0, 0.2, 1.1], [0.0, 0.6, 1.0]))
    for found in residuals(jnp.asarray(y), jnp.asarray(noise)):
        assert np.abs(found).max() < 1e-9


@some_processes
def test_probability_flow_is_the_reverse_equation_without_noise(process):
    y, score = jnp.array([[0.1, -0.4]]), mixture().log_score(process)
    flow = gbm.probability_flow(process, score, y, 0.5)
    mu, sigma, c = (f(0.5) for f in (process.drift, process.volatility, process.reversion))
    expected = mu - sigma**2 / 2 + c * y - sigma**2 / 2 * score(y, jnp.asarray(0.5))
    np.testing.assert_allclose(flow, expected, rtol=1e-5)


def test_scores_from_predictions_agree(x64):
    process, t, y = gbm.GeometricOrnsteinUhlenbeck(3.0), jnp.asarray(0.3), jnp.array([[0.1, -0.4], [1.0, 1.0]])
    true = mixture().log_score(process)
    law = mixture().at(process, t)

    def stein(x, t):
        return jax.grad(lambda x: law.log_prob(x).sum())(x)

    found = {
        "hyvarinen": gbm.log_score_from_hyvarinen(lambda y, t: law.hyvarinen(jnp.exp(y))),
        "stein": gbm.log_score_from_stein(stein),
        "noise": gbm.log_score_from_noise(process, lambda y, t: -jnp.sqrt(process.variance(t)) * true(y, t)),
        "denoiser": gbm.log_score_from_denoiser(process, lambda y, t: gbm.posterior_log_mean(process, true, y, t)),
    }
    for name, score in found.items():
        np.testing.assert_allclose(score(y, t), true(y, t), rtol=1e-9, err_msg=name)


@some_processes
@pytest.mark.parametrize("rho", [7.0, 2.0, np.inf])
def test_edm_times_have_the_levels_of_edm(process, rho, x64):
    times = np.asarray(gbm.edm_times(process, 6, rho=rho, smallest=0.01))
    assert times.shape == (7,) and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    levels = np.asarray(process.level(jnp.asarray(times[:-1])))
    warped = np.log(levels) if np.isinf(rho) else levels ** (1 / rho)
    np.testing.assert_allclose(np.diff(warped), np.diff(warped).mean(), rtol=1e-6)
    assert levels[-1] == pytest.approx(0.01, rel=1e-6)


@some_processes
def test_sinh_times_are_linear_below_and_logarithmic_above(process, x64):
    top = float(process.level(1.0))
    for width in (1e3 * top, 1e-3 * top):
        times = np.asarray(gbm.sinh_times(process, 6, width))
        levels = np.asarray(process.level(jnp.asarray(times)))
        assert times.shape == (7,) and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
        np.testing.assert_allclose(np.diff(np.arcsinh(levels / width)), -np.arcsinh(top / width) / 6, rtol=1e-5)
    np.testing.assert_allclose(levels[:3] / levels[1:4], levels[0] / levels[1], rtol=0.01)


def test_uniform_times():
    np.testing.assert_allclose(gbm.uniform_times(gbm.GeometricBrownianMotion(), 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(gbm.edm_times(gbm.GeometricBrownianMotion(), 1), [1, 0])


def test_processes_are_mapped_and_differentiated():
    sigma = jnp.array([0.5, 1.0])
    variances = jax.vmap(lambda s: gbm.GeometricBrownianMotion(sigma=s).variance(0.5))(sigma)
    np.testing.assert_allclose(variances, sigma**2 / 2)
    beta = jnp.asarray(2.0)
    slope = jax.jit(jax.grad(lambda b: gbm.GeometricOrnsteinUhlenbeck(b).variance(0.5)))(beta)
    assert float(slope) == pytest.approx(0.5 * np.exp(-1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gbm.GeometricBrownianMotion(0.1, -1.0), "GeometricBrownianMotion: sigma is -1.0, expected a positive"),
        (lambda: gbm.geometric(0.0, 1.0), "geometric: sigma_0 is 0.0, expected a positive number"),
        (lambda: gbm.GeometricOrnsteinUhlenbeck(float("nan")), "beta is nan"),
        (lambda: gbm.from_functions(lambda t: 0 * t, lambda t: t + 1), "variance(0) is 1, expected 0"),
        (lambda: gbm.from_functions(lambda t: 0 * t, lambda t: t * (1 - t)), "expected it to grow"),
        (lambda: gbm.from_functions(lambda t: 1 / (t - 1), lambda t: t), "not finite"),
        (lambda: gbm.uniform_times(gbm.GeometricBrownianMotion(), 0), "uniform_times: steps is 0, expected at least 1"),
        (lambda: gbm.edm_times(gbm.GeometricBrownianMotion(), 3, smallest=1.0), "smallest is 1.0, expected a level"),
        (lambda: gbm.edm_times(gbm.GeometricBrownianMotion(), 3, rho=0.0), "edm_times: rho is 0.0"),
        (lambda: gbm.sinh_times(gbm.GeometricBrownianMotion(), 0), "sinh_times: steps is 0, expected at least 1"),
        (lambda: gbm.sinh_times(gbm.GeometricBrownianMotion(), 3, -1.0), "sinh_times: width is -1.0"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
