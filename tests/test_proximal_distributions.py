"""Estimators against sums over Gauss-Legendre nodes and against searches on grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from solvers.proximal import scalar
from solvers.proximal.atoms import Atoms, Planar, planar
from solvers.proximal.distributions import Gaussian, Laplace, Mixture, StudentT, Uniform

pytestmark = pytest.mark.usefixtures("quick_compilation", "x64")

PRIORS = {
    "laplace": (Laplace(0.7), stats.laplace(scale=0.7).pdf, 0.0),
    "gaussian": (Gaussian(0.3, 0.8), stats.norm(0.3, 0.8).pdf, 0.0),
    "uniform": (Uniform(-1.0, 2.0), stats.uniform(-1, 3).pdf, 0.0),
    "mixture": (
        Mixture([-2.0, 0.5, 2.0], [0.6, 0.2, 1.0], [0.3, 0.3, 0.4]),
        lambda x: 0.3 * stats.norm.pdf(x, -2, 0.6) + 0.3 * stats.norm.pdf(x, 0.5, 0.2) + 0.4 * stats.norm.pdf(x, 2, 1),
        0.0,
    ),
    "student": (StudentT(3.0), stats.t(3).pdf, 0.0),
}
NAMES = list(PRIORS)

levels = st.tuples(
    st.floats(-4, 4), st.sampled_from((0.3, 1.0, 2.0)), st.sampled_from((0.1, 0.4, 1.0, 3.0))
)  # y, sigma, gamma


def at(f, y, *levels):
    """All tests use arrays of three, as each shape is compiled for."""
    return float(f(jnp.full(3, y), *levels)[0])


def nodes(name):
    """Points and weights on the support, in pieces that end at kinks."""
    ends = np.linspace(-1, 2, 7) if name == "uniform" else np.linspace(-18, 18, 37)
    t, w = np.polynomial.legendre.leggauss(80)
    half = np.diff(ends) / 2
    return ((ends[:-1] + half)[:, None] + half[:, None] * t).ravel(), (half[:, None] * w).ravel()


def posterior(name, y, sigma):
    x, w = nodes(name)
    p = PRIORS[name][1](x) * np.exp(-((x - y) ** 2) / (2 * sigma**2)) * w
    return x, p / p.sum()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(level=levels)
def test_mean_is_the_sum_and_median_halves_the_mass(name, level):
    y, sigma, _ = level
    x, p = posterior(name, y, sigma)
    mean, median = (at(f, y, sigma) for f in (PRIORS[name][0].mean, PRIORS[name][0].median))
    np.testing.assert_allclose(mean, np.sum(p * x), atol=1e-9)
    t, w = np.polynomial.legendre.leggauss(120)
    low, high = -1.0 if name == "uniform" else -18.0, median
    ends = np.unique(np.clip([low, *np.arange(-18, 19), *np.linspace(-1, 2, 7), high], low, high))
    half = np.diff(ends) / 2
    z = (ends[:-1] + half)[:, None] + half[:, None] * t
    x0, w0 = nodes(name)
    weight = lambda x: PRIORS[name][1](x) * np.exp(-((x - y) ** 2) / (2 * sigma**2))  # noqa: E731
    mass = np.sum(half[:, None] * w * weight(z)) / np.sum(w0 * weight(x0))
    assert abs(mass - 0.5) < 1e-8


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(level=levels)
def test_matched_is_the_best_of_all_and_stationary(name, level):
    y, sigma, gamma = level
    x, p = posterior(name, y, sigma)
    c = at(PRIORS[name][0].matched, y, sigma, gamma)

    def score(c):
        return np.exp(-((np.asarray(c)[..., None] - x) ** 2) / gamma**2) @ p

    grid = np.linspace(-6, 6, 1201)
    assert score(c) >= score(grid).max() * (1 - 1e-12)
    kernel = p * np.exp(-((c - x) ** 2) / gamma**2)
    mean = np.sum(kernel * x) / kernel.sum()
    slope = 1 - 2 / gamma**2 * np.sum(kernel * (x - mean) ** 2) / kernel.sum()
    assert abs(mean - c) <= 1e-8 * max(slope, 1e-6)  # what is left of a Newton step


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(level=levels)
def test_mode_is_the_proximal_map(name, level):
    y, sigma, _ = level
    prior, pdf, _ = PRIORS[name]
    c = at(prior.mode, y, sigma)
    grid = np.linspace(-5, 5, 20_001)

    def energy(x):
        with np.errstate(divide="ignore"):
            return -(sigma**2) * np.log(pdf(x)) + (x - y) ** 2 / 2

    assert energy(c) <= energy(grid).min() + 1e-12
    lam = 1.7
    v = jnp.array([y, -y, 0.3])
    np.testing.assert_allclose(prior.regularizer(sigma).prox(v, lam), prior.mode(v, sigma * lam**0.5), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_density_and_samples(name, key):
    prior, pdf, _ = PRIORS[name]
    x = np.linspace(-0.9, 1.9, 23)
    np.testing.assert_allclose(prior.log_density(jnp.asarray(x)), np.log(pdf(x)), rtol=1e-12, atol=1e-12)
    u, w = nodes(name)
    for tau in (0.05, 1.3):
        smoothed = [np.sum(w * pdf(u) * stats.norm.pdf(z, u, tau)) for z in x]
        np.testing.assert_allclose(prior.log_smoothed(jnp.asarray(x), tau), np.log(smoothed), atol=1e-7)
    drawn = np.asarray(prior.sample(key, (4000,)))
    cdf = {
        "laplace": stats.laplace(scale=0.7).cdf,
        "gaussian": stats.norm(0.3, 0.8).cdf,
        "uniform": stats.uniform(-1, 3).cdf,
        "student": stats.t(3).cdf,
        "mixture": lambda x: (
            0.3 * stats.norm.cdf(x, -2, 0.6) + 0.3 * stats.norm.cdf(x, 0.5, 0.2) + 0.4 * stats.norm.cdf(x, 2, 1)
        ),
    }[name]
    # Fails once in 10^5 keys.
    assert stats.kstest(drawn, cdf).pvalue > 1e-5
    assert prior.sample(key, (2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_matched_regulariser_has_the_matched_map(name):
    prior, sigma, gamma = PRIORS[name][0], 1.0, 0.5
    r = prior.matched_regularizer(sigma, gamma)
    v = jnp.array([-0.8, 0.3, 1.4])
    np.testing.assert_allclose(r.prox(v), prior.matched(v, sigma, gamma), atol=1e-10)
    x = prior.matched(v, sigma, gamma)
    np.testing.assert_allclose(r.grad(x), v - x, atol=1e-8)
    low, high = (-0.999, 1.999) if name == "uniform" else (-5.0, 5.0)
    lams = (0.05, 0.3, 0.9, 2.0)
    grid = jnp.concatenate([jnp.linspace(low, high, 801), *(r.prox(v, lam) for lam in lams)])
    values = jax.jit(jax.vmap(lambda x: r(jnp.array([x, 0.0, 0.0]))))(grid)
    for k, lam in enumerate(lams):
        energy = values[:, None] + (grid[:, None] - v) ** 2 / (2 * lam)
        own = energy[801 + 3 * k + np.arange(3), np.arange(3)]
        assert (own <= energy.min(0) + 1e-12).all(), lam
        assert (own >= energy[:801].min(0) - 1e-3).all(), lam


def test_the_gradient_of_the_matched_regulariser_is_its_derivative():
    r, x = PRIORS["laplace"][0].matched_regularizer(1.0, 0.5), jnp.array([-0.8, 0.3, 1.4])
    np.testing.assert_allclose(jax.grad(r)(x), r.grad(x), atol=1e-8)


def test_outside_of_the_range_the_regularisers_are_infinite():
    uniform = Uniform(-1.0, 2.0)
    x = jnp.array([0.0, 2.5, 1.0])
    assert uniform.regularizer(1.0)(x) == jnp.inf
    assert uniform.matched_regularizer(1.0, 0.5)(x) == jnp.inf
    assert jnp.isfinite(uniform.matched_regularizer(1.0, 0.5)(x.at[1].set(0.0)))


@pytest.mark.parametrize("name", NAMES)
def test_weak_convexity_is_what_the_density_shows(name):
    prior = PRIORS[name][0]
    x = jnp.linspace(-0.99, 1.99, 401)
    curvature = jax.vmap(jax.grad(jax.grad(prior.log_density)))(x)
    c = prior.regularizer(1.5).weak_convexity
    if name == "mixture":
        assert c is None  # the scales differ
    else:
        assert 1.5**2 * curvature.max() <= c + 1e-9
    r = prior.matched_regularizer(1.0, 0.5)
    assert r.weak_convexity == (0.0 if prior.log_concave else pytest.approx(9.0))


def test_weak_convexity_is_attained_by_student_and_by_two_equal_parts():
    x = jnp.linspace(-4, 4, 8001)
    for prior in (StudentT(3.0), Mixture([-2.0, 2.0], [0.6, 0.6], [0.5, 0.5])):
        curvature = jax.vmap(jax.grad(jax.grad(prior.log_density)))(x)
        assert prior.concavity_gap == pytest.approx(float(curvature.max()), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["mean", "median", "mode", "matched"])
def test_derivatives_are_those_of_differences(name, what):
    prior = PRIORS[name][0]
    more = (0.8, 0.6) if what == "matched" else (0.8,)
    y, h = jnp.array([-0.93, 0.21, 1.37]), 1e-5
    f = getattr(prior, what)
    given = (y, *more)
    exact = jax.jacfwd(f, argnums=tuple(range(len(given))))(y, *map(jnp.asarray, more))
    for k in range(len(given)):
        up, down = ([v + s * h if i == k else v for i, v in enumerate(given)] for s in (1, -1))
        slope = jnp.diagonal(exact[0]) if k == 0 else exact[k]
        np.testing.assert_allclose(slope, (f(*up) - f(*down)) / (2 * h), atol=1e-6)
    if what == "matched":
        np.testing.assert_allclose(jax.grad(lambda y: f(y, *more).sum())(y), jnp.diagonal(exact[0]), atol=1e-12)


def test_the_limits_of_the_width():
    y = jnp.array([-3.1, 0.6, 2.7])
    for name, (prior, _, _) in PRIORS.items():
        # atol: |f_γ - mode| is of order γ at kinks and γ √log(1/γ) at jumps.
        np.testing.assert_allclose(prior.matched(y, 1.0, 1e-4), prior.mode(y, 1.0), atol=1e-3, err_msg=name)
        np.testing.assert_allclose(prior.matched(y, 1.0, jnp.inf), prior.mean(y, 1.0), atol=1e-9, err_msg=name)


def test_single_precision_and_other_shapes():
    y = jnp.array([-2.4, 0.3, 1.9], jnp.float32)
    for name, (prior, _, _) in PRIORS.items():
        wide = prior.matched(y.astype(jnp.float64), 1.0, 0.3)
        narrow = prior.matched(y, 1.0, 0.3)
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, wide, atol=2e-4, err_msg=name)
    prior, y = Laplace(0.7), jnp.linspace(-3, 3, 6).reshape(2, 3)
    found = jax.vmap(lambda y: prior.matched(y, 1.0, 0.3))(y)
    np.testing.assert_allclose(found, jnp.stack([prior.matched(row, 1.0, 0.3) for row in y]), atol=1e-12)
    np.testing.assert_allclose(found, prior.matched(y, 1.0, 0.3), atol=1e-12)


def test_an_entry_that_is_nan_gives_nan_there_only():
    y = jnp.array([1.0, jnp.nan, -2.0])
    for prior, _, _ in PRIORS.values():
        for x in (prior.mean(y, 1.0), prior.median(y, 1.0), prior.mode(y, 1.0), prior.matched(y, 1.0, 0.5)):
            assert jnp.isnan(x).tolist() == [False, True, False]


def test_log_cdf_and_log_between():
    x = np.concatenate([-np.logspace(-3, 3, 60), [0.0], np.logspace(-3, 1, 40)])
    np.testing.assert_allclose(scalar.log_cdf(jnp.asarray(x)), special.log_ndtr(x), rtol=1e-13)
    slope = jax.vmap(jax.grad(scalar.log_cdf))(jnp.asarray(x))
    np.testing.assert_allclose(slope, np.exp(-(x**2) / 2 - special.log_ndtr(x)) / np.sqrt(2 * np.pi), rtol=1e-9)
    a, b = -12.0, -11.5
    exact = np.log(stats.norm.cdf(b) - stats.norm.cdf(a))
    np.testing.assert_allclose(scalar.log_between(jnp.asarray(a), jnp.asarray(b)), exact, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Laplace(0.0), r"Laplace: scale is 0"),
        (lambda: Gaussian(0.0, -1.0), r"Gaussian: scale is -1"),
        (lambda: StudentT(0.0), r"StudentT: df is 0"),
        (lambda: Uniform(1.0, 1.0), r"low is 1 and high 1, expected low < high"),
        (lambda: Mixture([0.0, 1.0], [1.0, 1.0], [0.5, 0.6]), r"Mixture: weights .* the sum 1, not 1\.1"),
        (lambda: Mixture([0.0, 1.0], [1.0, 1.0], [1.5, -0.5]), r"Mixture: weights .* positive"),
        (lambda: Mixture([0.0, 1.0], [1.0, 0.0], [0.5, 0.5]), r"Mixture: scales"),
        (lambda: Mixture([0.0, 1.0], [1.0], [0.5, 0.5]), r"expected one length for all three"),
        (lambda: Laplace().mode(jnp.zeros(2), 0.0), r"mode: sigma is 0, expected a positive"),
        (lambda: Laplace().mean(jnp.zeros(2), -1.0), r"mean: sigma is -1"),
        (lambda: Uniform().median(jnp.zeros(2), 0.0), r"median: sigma is 0"),
        (lambda: StudentT().matched(jnp.zeros(2), 1.0, 0.0), r"matched: gamma is 0"),
        (lambda: Laplace().matched_regularizer(1.0, jnp.nan), r"matched_regularizer: gamma is nan"),
        (lambda: Laplace().regularizer(0.0), r"regularizer: sigma is 0"),
        (lambda: Laplace().regularizer(1.0).prox(jnp.zeros(2), 0.0), r"prox: lam is 0"),
        (lambda: Laplace().matched_regularizer(1.0, 1.0).prox(jnp.zeros(2), -1.0), r"prox: lam is -1"),
        (lambda: Atoms(np.zeros((3, 2)), np.ones(2) / 2), r"Atoms: points and weights have shapes"),
        (lambda: Atoms(np.zeros((2, 2)), np.ones(2)), r"Atoms: weights .* not 2"),
        (lambda: Planar(np.arange(3.0), np.zeros((2, 2))), r"Planar: log_density has shape \(2, 2\)"),
    ],
)
def test_errors_say_what_was_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_atoms_on_a_line_are_a_mixture_without_widths(key):
    points, weights = np.array([-1.0, 0.2, 1.5]), np.array([0.2, 0.5, 0.3])
    atoms = Atoms(points[:, None], weights)
    narrow = Mixture(points, [1e-5] * 3, weights)
    y = jnp.linspace(-2.5, 2.5, 11)
    np.testing.assert_allclose(atoms.mean(y[:, None], 0.7)[:, 0], narrow.mean(y, 0.7), atol=1e-6)
    matched = jax.jit(lambda y, gamma: atoms.matched(y[:, None], 0.7, gamma)[:, 0])
    for gamma in (0.1, 0.8, 3.0):
        np.testing.assert_allclose(matched(y, gamma), narrow.matched(y, 0.7, gamma), atol=1e-6)
    np.testing.assert_array_equal(
        atoms.mode(y[:, None], 0.7)[:, 0],
        points[np.argmax(np.log(weights) - (np.asarray(y)[:, None] - points) ** 2 / (2 * 0.49), 1)],
    )
    np.testing.assert_allclose(matched(y, 0.01), atoms.mode(y[:, None], 0.7)[:, 0], atol=1e-6)
    np.testing.assert_array_equal(atoms.median(jnp.array([0.2]), 1e-2), [0.2])
    r = atoms.regularizer(0.7)
    assert r(jnp.array([0.2])) == pytest.approx(-0.49 * np.log(0.5))
    assert r(jnp.array([0.3])) == jnp.inf
    np.testing.assert_array_equal(r.prox(y[3:4], 2.0), atoms.mode(y[3:4], 0.7 * 2**0.5))
    drawn = np.asarray(atoms.sample(key, (3000,)))[:, 0]
    counts = [(drawn == point).sum() for point in points]
    assert stats.chisquare(counts, 3000 * weights).pvalue > 1e-5  # fails once in 10^5 keys


def test_the_matched_prior_of_atoms_is_that_of_a_mixture():
    points, weights = np.array([-1.0, 0.2, 1.5]), np.array([0.2, 0.5, 0.3])
    x = jnp.linspace(-0.8, 1.4, 6)
    exact = Mixture(points, [1e-4] * 3, weights).matched_regularizer(0.7, 0.6)
    values = jnp.array([exact(z[None]) for z in x])
    found = Atoms(points[:, None], weights).matched_prior(x[:, None], 0.7, 0.6)
    np.testing.assert_allclose(found - found[0], values - values[0], atol=1e-5)


@pytest.fixture(scope="module")
def turned():
    """A Laplace distribution of the plane, turned by 0.5."""
    from paper_checks.harness.numerics import enable_x64

    with enable_x64(True):
        c, s = np.cos(0.5), np.sin(0.5)
        q = jnp.array([[c, s], [-s, c]])
        # Smooth: the trapezoidal rule sees no kink.
        prior = Mixture([0.0, 0.0], [0.5, 1.4], [0.6, 0.4])
        return q, prior, planar(lambda x: prior.log_density(q @ x).sum(), -7.0, 7.0, 141)


@pytest.mark.parametrize("what", ["mean", "matched"])
def test_a_product_that_is_turned_is_a_product_in_the_plane(turned, what):
    q, prior, plane = turned
    more = (0.5,) if what == "matched" else ()
    y = jnp.array([[0.4, -1.1], [2.0, 0.3], [-0.2, 0.1]])
    exact = getattr(prior, what)(y @ q.T, 0.8, *more) @ q
    np.testing.assert_allclose(getattr(plane, what)(y, 0.8, *more), exact, atol=1e-6)


def test_the_matched_prior_in_the_plane(turned):
    q, prior, plane = turned
    x = jnp.array([[0.4, -1.1], [1.3, 0.3], [0.0, 0.0]])
    r = prior.matched_regularizer(0.8, 0.5)
    exact = jnp.array([r(q @ z) for z in x])
    found = plane.matched_prior(x, 0.8, 0.5)
    np.testing.assert_allclose(found - found[-1], exact - exact[-1], atol=1e-6)


def test_the_matched_map_in_the_plane_has_a_symmetric_jacobian():
    three = [(-1.5, -1.0), (1.5, 1.2), (1.0, -1.8)]
    plane = planar(
        lambda x: jax.nn.logsumexp(jnp.stack([-jnp.sum((x - jnp.array(p)) ** 2) / 0.5 for p in three])), -5.0, 5.0, 81
    )
    f = jax.jit(lambda y: plane.matched(y, 1.0, 0.8))
    y = jnp.array([0.3, 0.1])
    j = jax.jacfwd(f)(y)
    np.testing.assert_allclose(j, j.T, atol=1e-9)
    h = 1e-5
    columns = [(plane.matched(y + h * e, 1.0, 0.8) - plane.matched(y - h * e, 1.0, 0.8)) / (2 * h) for e in jnp.eye(2)]
    np.testing.assert_allclose(j, jnp.stack(columns, 1), atol=1e-6)
    assert float(jnp.linalg.eigvalsh(j)[0]) >= 0


def test_samples_of_the_plane(key, turned):
    q, _, plane = turned
    x = np.asarray(plane.sample(key, (4000,)) @ q.T)
    cdf = lambda x: 0.6 * stats.norm.cdf(x, 0, 0.5) + 0.4 * stats.norm.cdf(x, 0, 1.4)  # noqa: E731
    for axis in (0, 1):
        assert stats.kstest(x[:, axis], cdf).pvalue > 1e-5  # fails twice in 10^5 keys; cells blur it by .03 only


def test_a_signal_of_another_length_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match=r"y: has shape \(3,\), expected \(..., 2\)"):
        Atoms(np.zeros((2, 2)), np.ones(2) / 2).mean(jnp.zeros(3), 1.0)
