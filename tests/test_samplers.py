"""Samplers against recursions for one normal law, written out with NumPy, and against the law of a mixture."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from generative import gbm_diffusion as gbm
from generative import sampler_steps, samplers
from generative.lognormal import LogNormalMixture
from generative.samplers import METHODS, RECIPES, paper_annealed, sample

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEAN, VARIANCE = 0.4, 0.09
PAPERS = ("dls", "ums", "milstein")
SOME = ("ums", "multistep3", "predictor_corrector")  # of each kind of state and of step one
GRID = np.array([1.0, 0.6, 0.25, 0.07, 0.01])


def one_law():
    return LogNormalMixture(np.ones(1), np.full((1, 1), MEAN), np.full((1, 1), VARIANCE))


def mixture():
    return LogNormalMixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([[0.15**2], [0.3**2]]))


def cdf(y):
    return stats.norm.cdf(y[:, None], [-1.0, 0.8], [0.15, 0.3]) @ [0.3, 0.7]


def predicted(method, levels, u, corrector=0.1, width=0.2):
    """Mean and variance of the last u - MEAN, from a fixed first one, for the normal law: every step is linear."""
    mean, spread, before, c = u, 0.0, [], VARIANCE
    for k, (now, then) in enumerate(itertools.pairwise(levels)):
        w, v = now**2, then**2
        kept = c / (c + w)
        euler = kept + then / now * (1 - kept)
        before = [(now, kept * mean), *before[:2]]
        if method == "dls":
            factor, noise = 1 - (w - v) / (c + w), w - v
        elif method in ("ancestral", "predictor_corrector"):
            factor, noise = kept + v / w * (1 - kept), v * (w - v) / w
        elif method == "ddim":
            factor, noise = euler, 0.0
        elif method == "heun":
            corrected = k < len(levels) - 2
            factor = 1 + (then - now) / 2 * (now / (c + w) + euler * then / (c + v)) if corrected else euler
            noise = 0.0
        elif method == "dpm2m":
            ahead = kept * mean
            if k:
                ahead += np.log(now / then) / (2 * np.log(levels[k - 1] / now)) * (ahead - before[1][1])
            mean = ahead + then / now * (mean - ahead)
            continue
        else:
            mean = then / now * mean + integrated(before, now, then, width)
            continue
        mean, spread = factor * mean, factor**2 * spread + noise
        if method == "predictor_corrector" and k < len(levels) - 2:
            factor = 1 - corrector / 2 * v / (c + v)
            mean, spread = factor * mean, factor**2 * spread + corrector * v
    return mean, spread


def integrated(before, now, then, width):
    """∫ p(sqrt(L² + width²)) then dL / L² from then to now, with the polynomial p that goes through `before`, (L, value)."""
    at, values = np.array([np.hypot(level, width) for level, _ in before]), [value for _, value in before]
    p = np.polynomial.Polynomial(np.linalg.solve(np.vander(at, increasing=True), values))
    return integrate.quad(lambda level: p(np.hypot(level, width)) * then / level**2, then, now, epsabs=1e-13)[0]


CASES = {
    gbm.GeometricBrownianMotion(0.7, 0.9): tuple(m for m in METHODS if m not in ("ums", "milstein")),
    gbm.GeometricOrnsteinUhlenbeck(3.0): ("ancestral", "dpm2m", "multistep3", "predictor_corrector"),
}


@pytest.mark.parametrize(
    ("process", "method"), [(process, method) for process, methods in CASES.items() for method in methods]
)
def test_steps_of_one_normal_law(method, process, key):
    """KS of 4000 chains from one point, at 1e-4; without noise, the point."""
    levels = np.asarray(process.level(jnp.asarray(GRID)), float)
    x = jnp.full((4000, 1), 1.7)
    a, shift = (np.asarray(f(jnp.asarray(GRID)), float) for f in (process.scale, process.shift))
    mean, spread = predicted(method, levels, (np.log(1.7) - shift[0]) / a[0] - MEAN)
    found, info = sample(key, one_law().log_score(process), process, x, GRID, method=method, last="step")
    u = (np.log(np.asarray(found, float)) - shift[-1]) / a[-1] - MEAN
    if spread:
        assert stats.kstest(u.ravel(), stats.norm(mean, np.sqrt(spread)).cdf).pvalue > 1e-4
    else:
        np.testing.assert_allclose(u, mean, atol=2e-6)
    assert (int(info.overflowed), int(info.nonfinite), float(info.negative)) == (0, 0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_step_denoises(method, key, x64):
    """Over one step the result is exp E[log x_0 | x_t] whatever the method and the end of the times."""
    process = gbm.GeometricBrownianMotion(0.7, 0.9)
    x, t = jnp.array([[0.5], [2.0]]), 0.3
    score = mixture().log_score(process)
    expected = jnp.exp(gbm.posterior_log_mean(process, score, jnp.log(x), t))
    for end in (0.0, 0.1):
        found, info = sample(key, score, process, x, np.array([t, end]), method=method)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert info.evaluations == 1


def test_the_papers_steps_are_its_formulas(key, x64):
    """One step of each from the same key, and so with the same z, which is read off the first one."""
    process = gbm.GeometricBrownianMotion(0.5, 0.8)
    x = jnp.exp(jax.random.normal(key, (2000, 1)))
    score = mixture().log_score(process)
    t, delta, mu, sigma = 0.7, 0.3, 0.5, 0.8
    xi = np.asarray(mixture().at(process, t).hyvarinen(x))
    step = {
        m: np.asarray(sample(key, score, process, x, np.array([t, t - delta]), method=m, last="step")[0])
        for m in PAPERS
    }
    drift = delta * sigma**2 * xi - delta * (mu - 1.5 * sigma**2)
    z = (np.log(step["dls"] / x) - drift) / (np.sqrt(delta) * sigma)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
    ums = x * ((1 + 2 * delta * sigma**2 - delta * mu) + delta * sigma**2 * xi + np.sqrt(delta) * sigma * z)
    np.testing.assert_allclose(step["ums"], ums, rtol=1e-9)
    np.testing.assert_allclose(step["milstein"], ums + 0.5 * sigma**2 * x * delta * (z**2 - 1), rtol=1e-9)


STEPS = {
    "dls": 200,
    "ums": 200,
    "milstein": 200,
    "ancestral": 100,
    "ddim": 100,
    "heun": 30,
    "dpm2m": 30,
    "multistep3": 20,
}


@pytest.mark.parametrize("method", METHODS)
def test_all_sample_the_mixture_and_its_mirror_image(method, key):
    """KS of 3000 draws at 1e-4, from the exact law at t = 1 with every other sign turned; half of the score is seen."""
    process = gbm.GeometricBrownianMotion()
    steps = STEPS.get(method, 100)
    times = gbm.uniform_times(process, steps) if method in PAPERS else gbm.edm_times(process, steps)
    score = mixture().log_score(process)
    signs = np.where(np.arange(3000) % 2, 1, -1)[:, None]
    x = mixture().at(process, 1.0).sample(key, 3000) * signs
    found, info = sample(jax.random.fold_in(key, 1), score, process, x, times, method=method)
    assert (np.asarray(found) * signs > 0).all() and float(info.negative) == 0
    assert stats.kstest(np.log(np.asarray(found) * signs).ravel(), cdf).pvalue > 1e-4
    if method == "dls":
        half, _ = sample(key, lambda y, t: score(y, t) / 2, process, x, times, method=method)
        assert stats.kstest(np.log(np.asarray(half) * signs).ravel(), cdf).pvalue < 1e-10


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2), ("dpm2m", 2), ("multistep3", 3)])
def test_samplers_without_noise_converge_to_the_flow(method, order, x64):
    """Of one normal law, whose flow keeps (u - MEAN) / sqrt(VARIANCE + L²); the rate from 64 to 128 steps within 15 %."""
    process, end, errors = gbm.GeometricOrnsteinUhlenbeck(3.0), 0.01, []
    for steps in (64, 128):
        levels = jnp.exp(jnp.linspace(jnp.log(process.level(1.0)), jnp.log(process.level(end)), steps + 1))
        times = process.time(levels).at[0].set(1.0).at[-1].set(end)
        found, _ = sample(
            jax.random.key(0),
            one_law().log_score(process),
            process,
            jnp.array([[1.7]]),
            times,
            method=method,
            last="step",
            loop="host",
        )
        a, shift = (np.array([float(f(1.0)), float(f(end))]) for f in (process.scale, process.shift))
        w = np.array([float(process.level(1.0)), float(process.level(end))]) ** 2
        exact = MEAN + np.sqrt((VARIANCE + w[1]) / (VARIANCE + w[0])) * ((np.log(1.7) - shift[0]) / a[0] - MEAN)
        errors.append(abs((float(jnp.log(found[0, 0])) - shift[1]) / a[1] - exact))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, rel=0.15), errors


def test_three_steps_integrate_quadratics(x64):
    """In sqrt(L² + d²), to any level; at level 0 they extrapolate."""
    levels = np.array([0.9, 0.5, 0.35, 0.1, 0.02, 0.0])
    weights = np.asarray(METHODS["multistep3"].weights(jnp.asarray(levels), jnp.asarray(0.3)))
    p = np.polynomial.Polynomial([0.3, -1.2, 0.7])
    values = p(np.hypot(levels, 0.3))
    for k in range(2, 5):
        before = [(levels[i], values[i]) for i in (k, k - 1, k - 2)]
        exact = integrated(before, levels[k], levels[k + 1], 0.3) if levels[k + 1] else p(0.3)
        assert weights[k] @ values[k - 2 : k + 1][::-1] == pytest.approx(exact, rel=1e-10)
    np.testing.assert_allclose(weights.sum(1), 1 - levels[1:] / levels[:-1], rtol=1e-12)
    assert (weights[0, 1:] == 0).all() and weights[1, 2] == 0


def test_weights_of_many_small_steps_are_finite_in_float32():
    levels = jnp.concatenate([jnp.geomspace(20.0, 1e-5, 200), jnp.zeros(1)]).astype(jnp.float32)
    exact = METHODS["multistep3"].weights(jnp.asarray(levels), jnp.asarray(0.2, jnp.float32))
    # The last step is long: a quadratic through what precedes it would magnify errors a hundredfold.
    assert np.isfinite(exact).all()
    assert (np.abs(exact).sum(1) <= 1.001 * sampler_steps.AMPLIFIED * exact.sum(1)).all()
    assert np.abs(exact[50, 2]) > 0 and exact[-1, 2] == 0
    np.testing.assert_allclose(exact.sum(1), 1 - levels[1:] / levels[:-1], atol=1e-5)


def test_ancestral_steps_are_exact_for_one_point(key):
    """Data that are one number: three steps reach the law at t = .2 exactly; a step of "dls" does not.  KS of 4000 at 1e-4."""
    process = gbm.GeometricBrownianMotion()
    law = LogNormalMixture(np.ones(1), np.full((1, 1), MEAN), np.full((1, 1), 1e-10))
    x = law.at(process, 1.0).sample(key, 4000)
    times, exact = np.array([1.0, 0.7, 0.4, 0.2]), stats.norm(MEAN, 0.8 * np.sqrt(0.2)).cdf
    found = {
        m: np.log(
            np.asarray(
                sample(jax.random.fold_in(key, 1), law.log_score(process), process, x, times, method=m, last="step")[0]
            )
        ).ravel()
        for m in ("ancestral", "ddim", "dls")
    }
    assert stats.kstest(found["ancestral"], exact).pvalue > 1e-4
    assert stats.kstest(found["ddim"], exact).pvalue > 1e-4
    assert stats.kstest(found["dls"], exact).pvalue < 1e-10


def test_the_unconstrained_sampler_crosses_zero_and_says_so(key):
    """P(z < -1.65) of one step of size 1 with ξ = -1; 20 000 draws, four standard deviations.  No other sampler crosses."""
    process, x = gbm.GeometricBrownianMotion(), jnp.ones((20_000, 1))
    for method in SOME:
        found, info = sample(key, lambda y, t: 0 * y, process, x, np.array([1.0, 0.0]), method=method, last="step")
        assert float(info.negative) == float((found < 0).mean())
        share = stats.norm.cdf(-1.32 / 0.8) if method == "ums" else 0
        assert abs(float(info.negative) - share) <= 4 * np.sqrt(share / 20_000)


@pytest.mark.parametrize("method", SOME)
def test_overflow_is_clipped_and_counted(method, key):
    """Two of four chains are pushed out of float32 and end at its edges, finite and not zero; the others do not notice."""
    process, x = gbm.GeometricBrownianMotion(), jnp.array([[1.0], [2.0], [3.0], [4.0]])
    push = jnp.array([[0.0], [1e38], [0.0], [-1e38]])
    times = gbm.uniform_times(process, 3)
    found, info = sample(key, lambda y, t: push - y, process, x, times, method=method)
    quiet, before = sample(key, lambda y, t: -y, process, x, times, method=method)
    assert (int(info.overflowed), int(before.overflowed)) == (2, 0)
    assert np.isfinite(found).all() and (found != 0).all()
    np.testing.assert_array_equal(found[::2], quiet[::2])
    np.testing.assert_allclose(jnp.log(jnp.abs(found[1::2, 0])), [87.0, -87.0], atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 87), ("float64", 708), ("float16", 9), ("bfloat16", 87)])
def test_the_limit_of_exponents(dtype, limit, x64):
    assert samplers.exponent_limit(dtype) == limit
    edges = jnp.exp(jnp.array([-limit, limit], dtype))
    assert np.isfinite(np.asarray(edges, float)).all() and float(edges[0]) >= float(jnp.finfo(dtype).tiny)


@pytest.mark.parametrize("method", SOME)
def test_a_score_that_is_not_finite_is_an_error(method, key):
    process, x = gbm.GeometricBrownianMotion(), jnp.ones((3, 2))
    times = np.array([1.0, 0.5, 0.0])

    def broken(y, t):
        return jnp.where((jnp.arange(6).reshape(3, 2) == 4) & (t < 0.7), jnp.nan, -y)

    with pytest.raises(FloatingPointError, match=r"values of log_score are NaN or infinite"):
        sample(key, broken, process, x, times, method=method)
    found, info = sample(key, broken, process, x, times, method=method, throw=False)
    assert int(info.nonfinite) == (1 if METHODS[method].correct is None else 2)
    assert np.isnan(found).sum() == 1
    _, inside = jax.jit(lambda x: sample(key, broken, process, x, times, method=method))(x)
    assert int(inside.nonfinite) == int(info.nonfinite)


@pytest.mark.parametrize("method", ["milstein", "multistep3"])
def test_one_step_at_a_time_is_the_same(method, key):
    process = gbm.GeometricBrownianMotion()
    score, x = mixture().log_score(process), mixture().at(process, 1.0).sample(key, 20)
    times = gbm.uniform_times(process, 8)
    scanned, _ = sample(key, score, process, x, times, method=method)
    by_hand, _ = sample(key, score, process, x, times, method=method, loop="host")
    np.testing.assert_allclose(by_hand, scanned, rtol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_evaluations_are_counted(method, key):
    calls = []

    def counted(y, t):
        calls.append(float(t))
        return -y

    process = gbm.GeometricBrownianMotion()
    with jax.disable_jit():
        _, info = sample(
            key, counted, process, jnp.ones((2, 1)), np.array([1.0, 0.5, 0.2, 0.0]), method=method, loop="host"
        )
    assert info.evaluations == len(calls)
    assert min(calls) > 0


def test_one_compilation_for_a_score(key):
    traced = []

    def score(y, t):
        traced.append(1)
        return -y

    process, times = gbm.GeometricBrownianMotion(), np.array([1.0, 0.5, 0.0])
    sample(key, score, process, jnp.ones((2, 1)), times)
    before = len(traced)
    sample(jax.random.fold_in(key, 1), score, gbm.GeometricBrownianMotion(0.1, 2.0), 3 * jnp.ones((2, 1)), times**2)
    assert len(traced) == before


def test_it_is_mapped_and_differentiated(key):
    process, times = gbm.GeometricBrownianMotion(), gbm.edm_times(gbm.GeometricBrownianMotion(), 3)
    score, x = one_law().log_score(process), jnp.array([[1.5], [0.5]])
    keys = jax.random.split(key, 3)
    mapped = jax.vmap(lambda k: sample(k, score, process, x, times, method="predictor_corrector")[0])(keys)
    alone = [sample(k, score, process, x, times, method="predictor_corrector")[0] for k in keys]
    np.testing.assert_allclose(mapped, jnp.stack(alone), rtol=1e-5)
    slope = jax.grad(lambda x: sample(key, score, process, x, times, method="heun")[0].sum())(x)
    ends = [sample(key, score, process, x + d, times, method="heun")[0] for d in (-1e-2, 1e-2)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-2, rtol=2e-2)


def test_the_dtype_is_that_of_the_start(key, x64):
    process = gbm.GeometricBrownianMotion(sigma=jnp.asarray(0.8))
    x = jnp.ones((2, 1), jnp.float32)
    score = mixture().log_score(process)
    for method in ("ums", "predictor_corrector"):
        assert sample(key, score, process, x, GRID, method=method)[0].dtype == jnp.float32
    recipe = samplers.Recipe("ums", (samplers.Stage(2, 1e-3),))
    assert paper_annealed(key, score, process, x, recipe)[0].dtype == jnp.float32


# ---- the released recipe


def test_recipes_have_the_steps_of_the_release():
    total = {name: float(samplers.schedule(recipe)[:, 1].sum()) for name, recipe in RECIPES.items()}
    assert total["mnist dls"] == pytest.approx(0.61655)
    assert total["kmnist dls"] == pytest.approx(0.63396)
    assert total["cifar-10 dls"] == pytest.approx(1.1421e-4 * 6025)
    rows = samplers.schedule(RECIPES["staged dls"])
    assert len(rows) == 899 + 100 + 75 + 78
    assert rows[898].tolist() == [0.101, 1e-3, 1.0] and rows[899].tolist() == [0.1, 5e-4, 1.0]
    assert rows[-1, 0] == 1e-3 and rows[-1, 2] == pytest.approx(0.9995**50 * 0.9993**25 * 0.999**25)
    assert samplers.schedule(RECIPES["mnist dls"])[-1, 2] == pytest.approx(0.995**999)
    assert (samplers.schedule(RECIPES["cifar-10 ums"])[-25:, 2] == 0).all()


def test_the_released_recipe_is_off_where_the_plain_one_is_not(key):
    """W1 in log x of 4000 draws, of which exact ones have about .012."""
    process = gbm.GeometricBrownianMotion()
    score, x = mixture().log_score(process), mixture().at(process, 1.0).sample(key, 4000)
    plain = samplers.Recipe("dls", (samplers.Stage(1000, 1e-3),))

    def distance(recipe):
        found, info = paper_annealed(key, score, process, x, recipe)
        assert info.evaluations == 1000
        grid = np.linspace(-4, 4, 4001)
        empirical = np.searchsorted(np.sort(np.log(np.asarray(found)).ravel()), grid) / 4000
        return np.abs(empirical - cdf(grid)).sum() * (grid[1] - grid[0])

    assert distance(plain) < 0.025
    assert 0.03 < distance("mnist dls") < 0.06


def test_the_recipes_of_both_samplers_agree_at_small_steps(key):
    process = gbm.GeometricBrownianMotion()
    score, x = one_law().log_score(process), jnp.full((500, 1), 1.5)
    stages = (samplers.Stage(50, 1e-4, 2, 0.99),)
    found = [np.asarray(paper_annealed(key, score, process, x, samplers.Recipe(m, stages))[0]) for m in ("dls", "ums")]
    # 100 steps of δ = 1e-4, strong order 1/2: .5 σ² δ sqrt(2 · 100) of standard deviation.
    assert np.abs(np.log(found[0] / found[1])).max() < 6 * 0.5 * 0.64 * 1e-4 * np.sqrt(200)
    by_hand, _ = paper_annealed(key, score, process, x, samplers.Recipe("dls", stages), loop="host")
    np.testing.assert_allclose(by_hand, found[0], rtol=1e-5)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "euler"}, "sample: method is 'euler', expected one of 'dls', 'ums'"),
        ({"process": gbm.GeometricOrnsteinUhlenbeck(2.0), "method": "dls"}, "which needs a = 1"),
        (
            {"process": gbm.GeometricOrnsteinUhlenbeck(2.0), "method": "milstein"},
            "process is GeometricOrnsteinUhlenbeck",
        ),
        ({"loop": "while"}, "sample: loop is 'while', expected 'scan' or 'host'"),
        ({"last": "stop"}, "last is 'stop', expected 'denoise' or 'step'"),
        ({"times": np.array([0.0, 0.5, 1.0])}, "expected them to decrease strictly within [0, 1]"),
        ({"times": np.array([1.5, 0.0])}, "times run from 1.5 to 0"),
        ({"times": np.array([1.0])}, "expected (steps + 1,) with at least one step"),
        ({"x_T": jnp.array([[1.0], [0.0]])}, "x_T holds 1 entries that are zero or not finite"),
        ({"x_T": jnp.array([[jnp.nan], [1.0]])}, "expected numbers x_T ≠ 0"),
        ({"log_score": lambda y, t: y[0]}, "log_score returned shape (1,) for y of shape (2, 1)"),
    ],
)
def test_errors_say_what_is_wrong(given, message, key):
    usual = {
        "log_score": lambda y, t: -y,
        "process": gbm.GeometricBrownianMotion(),
        "x_T": jnp.ones((2, 1)),
        "times": np.array([1.0, 0.0]),
    }
    with pytest.raises(ValueError) as error:
        sample(key, **(usual | given))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mnist", "recipe is 'mnist', expected one of 'mnist dls'"),
        (samplers.Recipe("ddim", ()), "the sampler of recipe is 'ddim'"),
    ],
)
def test_errors_of_the_released_recipe(recipe, message, key):
    with pytest.raises(ValueError) as error:
        paper_annealed(key, lambda y, t: -y, gbm.GeometricBrownianMotion(), jnp.ones((2, 1)), recipe)
    assert message in str(error.value)


def test_a_start_that_a_compiled_function_closes_over(key):
    """It is known, so it is checked; what is done to check it must not be traced."""
    start, zeros = jnp.full((3, 1), 2.0), jnp.zeros((3, 1))
    target = LogNormalMixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    process = gbm.GeometricBrownianMotion()
    score, times = target.log_score(process), gbm.sinh_times(process, 3)
    x = jax.jit(lambda key: sample(key, score, process, start, times)[0])(key)
    assert x.shape == (3, 1) and bool(jnp.isfinite(x).all())
    with pytest.raises(ValueError, match="x_T holds 3 entries"):
        jax.jit(lambda key: sample(key, score, process, zeros, times)[0])(key)
