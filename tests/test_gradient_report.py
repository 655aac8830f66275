"""Reports on estimators: variances against closed forms, agreement, what is not legal, and how it is shown."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vi
from vi import expectation, mvd, random_key, reinforce, sample
from vi.gradient_report import Moments, _limit, _merged, _moments, gradient_report

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS = 4000


def rows(report):
    return {(e.label, e.strategy): e for e in report.estimates}


def close(moments, mean, variance, fourth, draws=DRAWS):
    """Mean and variance within 4.5 standard errors (a false alarm in 1.5e5 figures), or the rounding of float32.

    fourth: the fourth central moment, which the variance's own error depends on.
    """
    assert abs(moments.mean - mean) < 4.5 * np.sqrt(variance / draws) + 1e-5 * (1 + abs(mean))
    assert abs(moments.variance - variance) < 4.5 * np.sqrt((fourth - variance**2) / draws) + 1e-9
    assert moments.se == pytest.approx(np.sqrt(moments.variance / draws))


P, F1, F0 = 0.3, 2.0, -1.0


@pytest.fixture(scope="module")
def flip():
    @expectation
    def two_values(p):
        return jnp.where(sample(dist.Bernoulli(probs=p), "flip") == 1, F1, F0)

    return gradient_report(two_values, jax.random.key(11), P, draws=DRAWS)


def test_a_flip_has_the_variances_of_the_closed_forms(flip):
    """The score function gives f₁/p with probability p and -f₀/(1-p) else; the two others give f₁ - f₀ always."""
    found = rows(flip)
    assert [s for _, s in found] == ["enum", "mvd", "reinforce"]
    slope = F1 - F0
    score = np.array([F1 / P, -F0 / (1 - P)]) - slope
    variance = P * (F1 / P) ** 2 + (1 - P) * (F0 / (1 - P)) ** 2 - slope**2
    close(found["flip", "reinforce"].gradient["p"], slope, variance, np.array([P, 1 - P]) @ score**4)
    for strategy in ("enum", "mvd"):
        close(found["flip", strategy].gradient["p"], slope, 0.0, 0.0)
    values = np.array([F1, F0]) - (P * F1 + (1 - P) * F0)
    for strategy in ("mvd", "reinforce"):
        weights = np.array([P, 1 - P])
        close(found["flip", strategy].value, P * F1 + (1 - P) * F0, weights @ values**2, weights @ values**4)
    close(found["flip", "enum"].value, P * F1 + (1 - P) * F0, 0.0, 0.0)
    assert [e.as_written for e in flip.estimates] == [True, False, False]
    assert all(e.agrees for e in flip.estimates)


def test_illegal_strategies_are_listed_with_the_reason(flip):
    assert [(i.label, i.strategy) for i in flip.illegal] == [("flip", "reparam"), ("flip", "implicit")]
    assert all("not legal" in i.reason and "enum, mvd, reinforce" in i.reason for i in flip.illegal)


def test_the_table_shows_every_row(flip):
    text = str(flip)
    for word in ("enum *", "mvd", "reinforce", "∂ p", "4000 draws", "reparam is not legal"):
        assert word in text
    assert "disagrees" not in text
    assert flip.table().row_count == 3
    assert flip.__rich__().row_count == 3


def test_the_dictionary_is_json(flip):
    found = json.loads(json.dumps(flip.to_dict(), allow_nan=False))
    assert found["draws"] == DRAWS and len(found["illegal"]) == 2
    row = found["estimates"][2]
    assert row["strategy"] == "reinforce"
    assert row["gradient"]["p"]["mean"] == float(flip.estimates[2].gradient["p"].mean)
    assert row["gradient"]["p"]["mean_variance"] == row["total_variance"] == row["gradient"]["p"]["variance"]
    assert row["cost"] == row["total_variance"] * row["seconds"] > 0


def test_the_figure_has_a_point_for_every_row(flip):
    figure = flip.figure()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [line.get_marker() for line in axes.lines] == ["<", "<", "o"]
    assert axes.lines[2].get_xdata()[0] == flip.estimates[2].cost
    assert axes.lines[2].get_xdata()[0] > axes.lines[0].get_xdata()[0]
    assert [t.get_text() for t in axes.texts][:2] == ["no variance", "no variance"]


def test_a_normal_square_has_the_variances_of_the_closed_forms(key):
    """f = x², x ~ N(μ, σ), gradient in μ: 2x along the path, x² (x - μ)/σ² by the score, 4μ w/√(2π) by Rayleigh's w."""
    mean, scale = 0.7, 1.3

    @expectation
    def square(loc):
        return sample(dist.Normal(loc, scale), "x") ** 2

    report = gradient_report(square, key, mean, draws=DRAWS)
    found = rows(report)
    assert [s for _, s in found] == ["reparam", "implicit", "mvd", "reinforce"]
    for strategy in ("reparam", "implicit"):
        variance = 4 * scale**2
        close(found["x", strategy].gradient["loc"], 2 * mean, variance, 3 * variance**2)
    variance = 16 * mean**2 * (2 - np.pi / 2) / (2 * np.pi)
    kurtosis = 3 - (6 * np.pi**2 - 24 * np.pi + 16) / (4 - np.pi) ** 2
    close(found["x", "mvd"].gradient["loc"], 2 * mean, variance, kurtosis * variance**2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    score = (mean + scale * nodes) ** 2 * nodes / scale - 2 * mean  # degree 12 in its fourth power: exact
    variance = mean**4 / scale**2 + 18 * mean**2 + 15 * scale**2 - 4 * mean**2
    assert weights @ score**2 == pytest.approx(variance)
    close(found["x", "reinforce"].gradient["loc"], 2 * mean, variance, weights @ score**4)
    assert all(e.agrees for e in report.estimates)
    assert [i.strategy for i in report.illegal] == ["enum"]
    assert [e.total_variance for e in report.estimates] == [float(e.gradient["loc"].variance) for e in report.estimates]
    assert all(e.seconds > 0 for e in report.estimates)


def test_leaves_of_several_arguments_have_their_names_and_shapes(key):
    """Σ (x_i - c)², x_i ~ N(m_i, 1): the gradient has variance 4 in m_i and 4n in c."""

    @expectation
    def distance(params, centre, count):
        return ((sample(dist.Normal(params["m"], 1.0), "x") - centre) ** 2).sum() * count

    report = gradient_report(
        distance, key, {"m": jnp.arange(3.0), "f": jnp.tanh}, 0.5, jnp.asarray(1), argnums=(-2, 0),
        strategies={"x": ["reparam"]}, draws=DRAWS, chunk=300,
    )  # fmt: skip
    (row,) = report.estimates
    assert report.chunk == 300 and report.illegal == () and row.z == 0
    assert list(row.gradient) == ["params['m']", "centre"]
    for i in range(3):
        moments = row.gradient["params['m']"]
        one = Moments(*(np.asarray(x[i]) for x in (moments.mean, moments.se, moments.variance)))
        close(one, 2 * (i - 0.5), 4, 3 * 4**2)
    close(row.gradient["centre"], -3.0, 12, 3 * 12**2)
    assert row.total_variance == pytest.approx(
        row.gradient["params['m']"].variance.sum() + row.gradient["centre"].variance
    )
    assert report.to_dict()["estimates"][0]["gradient"]["params['m']"]["mean_variance"] == pytest.approx(
        row.gradient["params['m']"].variance.mean()
    )
    assert "∂ params['m']" in str(report)


def test_a_wrong_estimator_is_flagged(key):
    """A step that is promised to be continuous: the path's gradient is 0, the others' the normal density."""

    @expectation
    def step(loc):
        return vi.continuous(lambda x: jnp.where(x > 0, 1.0, 0.0))(sample(dist.Normal(loc, 1.0), "x"))

    report = gradient_report(step, key, 0.0, strategies={"x": ["reparam", "reinforce"]}, draws=1000)
    # The density is 0.4, the score's standard deviation below 1: some 13 standard errors at 1000 draws.
    assert [e.agrees for e in report.estimates] == [False, False]
    assert all(e.z > 9 for e in report.estimates)
    assert "disagrees" in str(report)
    assert any("disagrees" in t.get_text() for t in report.figure().axes[0].texts)


def test_a_parameter_without_a_rule_is_listed_not_dropped(key):
    @expectation
    def mean(high):
        return sample(dist.Uniform(0.0, high), "u")

    report = gradient_report(mean, key, 2.0, draws=50)
    refused = {i.strategy: i.reason for i in report.illegal}
    assert "support depends" in refused["reinforce"]
    assert set(refused) | {e.strategy for e in report.estimates} == {"reparam", "implicit", "enum", "mvd", "reinforce"}
    with pytest.raises(vi.StrategyError, match=r"nothing to compare: u, reinforce: .*support depends"):
        gradient_report(mean, key, 2.0, strategies={"u": ["reinforce"]}, draws=50)


def test_others_stay_as_written_and_shared_labels_are_compared_together(key):
    @expectation
    def product(p):
        random_key()
        first = sample(mvd(dist.Bernoulli(probs=p)), "b")
        return 1.0 * first * sample(reinforce(dist.Bernoulli(probs=p)), "b") + sample(dist.Bernoulli(probs=p), "c")

    report = gradient_report(product, key, 0.4, strategies={"b": ["enum"], "c": ["enum", "mvd"]}, draws=200)
    found = [(e.label, e.strategy, e.as_written) for e in report.estimates]
    assert found == [("b", "mvd + reinforce", True), ("b", "enum", False), ("c", "enum", True), ("c", "mvd", False)]
    # One and the same measurement.
    assert report.estimates[0].gradient["p"] is report.estimates[2].gradient["p"]
    exact = report.estimates[1].gradient["p"]  # E = p² + p
    assert exact.mean == pytest.approx(1.8, rel=1e-5) and exact.variance < 1e-10
    assert report.estimates[0].gradient["p"].variance > 0.1


def test_integer_parameters_are_named(key):
    @expectation
    def f(params, n):
        return sample(dist.Normal(params["w"], 1.0), "x") * n

    params = {"w": jnp.asarray(0.5), "n": jnp.asarray(3)}
    with pytest.raises(TypeError, match=r"params\['n'\] is int32\[\], which has no derivative"):
        gradient_report(f, key, params, 2)
    with pytest.raises(TypeError, match=r"gradient_report: n is int32\[\]"):
        gradient_report(f, key, {"w": 0.5}, 2, argnums=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": {"y": ["mvd"]}}, "names the choice 'y'; there are x"),
        ({"strategies": {"x": ["pathwise"]}}, "'x' are .*'pathwise'.*expected some of reparam"),
        ({"strategies": {"x": "mvd"}}, "'x' are 'mvd'"),
        ({"argnums": 1}, "argnums is 1; expected numbers of the 1 arguments"),
        ({"draws": 1}, "draws is 1"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_input_is_named(key, change, message):
    @expectation
    def f(loc):
        return sample(dist.Normal(loc, 1.0), "x")

    with pytest.raises(ValueError, match=message):
        gradient_report(f, key, 0.5, **change)


def test_only_an_expectation_is_taken(key):
    with pytest.raises(TypeError, match="objective is a function"):
        gradient_report.__wrapped__(lambda p: p, key, 0.5)


def test_more_draws_are_not_more_traces(key):
    traces = []

    @expectation
    def f(p):
        traces.append(None)
        return 1.0 * sample(dist.Bernoulli(probs=p), "b")

    counts = []
    for draws in (8, 100):
        traces.clear()
        report = gradient_report(f, key, 0.3, strategies={"b": ["mvd"]}, draws=draws, chunk=8)
        assert report.chunk == 8
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_groups_of_draws_merge_to_the_moments_of_all():
    x = np.random.default_rng(0).standard_normal((17, 3)) + 5
    state = None
    for part in (x[:8], x[8:16], x[16:]):
        state = _merged(state, len(part), [(part.mean(0), ((part - part.mean(0)) ** 2).sum(0))])
    (moments,) = _moments(*state)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, x.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(moments.se, x.std(0, ddof=1) / np.sqrt(17), rtol=1e-12)


def test_the_limit_grows_with_the_number_of_comparisons():
    assert _limit(2, 10) == _limit(5, 10) == 4.5
    # Two-sided tail of 1e-3 / (1e5 comparisons) = 1e-8: 5.73 standard errors.
    assert _limit(2, 10**5) == pytest.approx(5.73, abs=0.01)
