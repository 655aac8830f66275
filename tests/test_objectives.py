"""Objectives against sums over all values of tiny discrete programs, and against closed forms of Gaussians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax

from vi import enum, mvd, reinforce, reparam
from vi import objectives as vi
from vi.errors import AddressError, StrategyError
from vi.inference import marginal

pytestmark = pytest.mark.usefixtures("quick_compilation")

RARE = 6e-7
"""Error rate of each z-test: a normal variable beyond 5 standard deviations.  There are about seventy figures tested so."""

X = 0.7
THETA, PHI = 0.3, 0.4


def estimates(objective, key, *args, argnums=(1, 2), n=4000):
    """n values, and n gradients in theta and phi."""
    run = jax.jit(jax.vmap(lambda k: jax.value_and_grad(objective, argnums)(k, *args)))
    values, gradients = run(jax.random.split(key, n))
    return np.asarray(values, float), [np.asarray(g, float) for g in gradients]


def assert_mean(draws, truth, what=""):
    # The floor is for estimates without variance, in float32.
    error = draws.std(axis=0) / np.sqrt(len(draws)) + 1e-5 * (1 + np.abs(truth))
    assert np.all(np.abs(draws.mean(axis=0) - truth) <= 5 * error), (
        f"{what} {draws.mean(axis=0)} ± {error}, expected {truth}"
    )


# ---- a Bernoulli and a Gaussian observation of it ----------------------------------------------------------------------


def model(theta, x):
    b = numpyro.sample("b", dist.Bernoulli(theta))
    numpyro.sample("x", dist.Normal(2.0 * b - 1, 1.0), obs=x)


def guide_by(strategy):
    def guide(phi, x):
        numpyro.sample("b", strategy(dist.Bernoulli(phi)))

    return guide


def log_p(theta, b, x=X):
    return jnp.log(theta if b else 1 - theta) - (x - (2 * b - 1)) ** 2 / 2 - jnp.log(2 * jnp.pi) / 2


def log_q(phi, b):
    return jnp.log(phi if b else 1 - phi)


def log_mean(terms):
    return jax.nn.logsumexp(jnp.stack(terms)) - jnp.log(len(terms))


def over_particles(theta, phi, n, f):
    """Σ over n particles of their probability times f(particles); only what f and the probability depend on is live."""
    total = 0.0
    for bs in itertools.product((0, 1), repeat=n):
        total += jnp.exp(sum(log_q(phi, b) for b in bs)) * f(bs)
    return total


def elbo(theta, phi):
    return over_particles(theta, phi, 1, lambda bs: log_p(theta, bs[0]) - log_q(phi, bs[0]))


def renyi(theta, phi, n=2, alpha=0.0):
    def f(bs):
        return log_mean([(1 - alpha) * (log_p(theta, b) - log_q(phi, b)) for b in bs]) / (1 - alpha)

    return over_particles(theta, phi, n, f)


def resampled(theta, phi, cost, n=2):
    """E of cost(z, log density of z) for z resampled from n particles of q at phi; cost is averaged over the index."""

    def f(bs):
        log_w = jnp.stack([log_p(theta, b) - log_q(phi, b) for b in bs])
        log_z = log_mean(list(log_w))
        return sum(jax.nn.softmax(log_w)[i] * cost(b, log_p(theta, b) - log_z) for i, b in enumerate(bs))

    return over_particles(theta, phi, n, f)


def held(x):
    return lax.stop_gradient(x)


def symmetric(theta, phi):
    return -elbo(theta, phi) + resampled(theta, held(phi), lambda b, _: log_p(theta, b) - log_q(phi, b))


# objective made from (model, guide), and its truth
TABLE = {
    "elbo": (vi.elbo, elbo),
    "iwelbo": (lambda m, g: vi.iwelbo(m, g, 2), renyi),
    "renyi": (lambda m, g: vi.renyi(m, g, 2, 0.5), lambda t, f: renyi(t, f, alpha=0.5)),
    "renyi at 1": (lambda m, g: vi.renyi(m, g, 2, 1.0), elbo),
    "vimco": (lambda m, g: vi.vimco(m, g, 2), renyi),
    "wake_theta": (
        lambda m, g: vi.wake_theta(m, g, 2),
        lambda t, f: resampled(held(t), held(f), lambda b, _: -log_p(t, b)),
    ),
    "wake_phi": (
        lambda m, g: vi.wake_phi(m, g, 2),
        lambda t, f: resampled(held(t), held(f), lambda b, _: -log_q(f, b)),
    ),
    "forward_kl": (
        lambda m, g: vi.forward_kl(m, g, 2),
        lambda t, f: resampled(t, held(f), lambda b, log_posterior: log_posterior - log_q(f, b)),
    ),
    "symmetric_kl": (lambda m, g: vi.symmetric_kl(m, g, 2), symmetric),
    "stl": (lambda m, g: vi.elbo(m, g, stl=True), elbo),
}
CASES = [(name, reinforce) for name in TABLE] + [
    (name, strategy) for name in ("elbo", "iwelbo", "symmetric_kl") for strategy in (enum, mvd)
]


@pytest.mark.parametrize(("name", "strategy"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_value_and_gradient_are_unbiased(name, strategy, key):
    """V3, and V9 for the wake phases, whose truths hold the sampler fixed."""
    make, truth = TABLE[name]
    values, gradients = estimates(make(model, guide_by(strategy)), key, THETA, PHI, X)
    assert_mean(values, float(truth(THETA, PHI)), "value")
    for which, gradient, exact in zip(("theta", "phi"), gradients, jax.grad(truth, (0, 1))(THETA, PHI), strict=True):
        assert_mean(gradient, float(exact), which)
    if (name, strategy) == ("elbo", enum):
        assert values.std() < 1e-5 and gradients[1].std() < 1e-5


def test_the_oracles_agree_with_known_figures():
    """Losses of this program at (.3, .4), computed by enumeration elsewhere."""
    assert np.isclose(-elbo(THETA, PHI), 1.826521, atol=2e-6)
    assert np.isclose(-jax.grad(elbo, 1)(THETA, PHI), -0.958167, atol=2e-6)
    assert np.isclose(-renyi(THETA, PHI, 5), 1.737178, atol=2e-6)
    assert np.isclose(-jax.grad(renyi, 1)(THETA, PHI, 5), -0.226060, atol=2e-6)


def test_vimco_has_less_variance_than_the_score_function(key):
    """At n = 5 its standard deviation is .85, by the score function alone 2.2 and more."""
    _, (_, plain) = estimates(vi.iwelbo(model, guide_by(reinforce), 5), key, THETA, PHI, X)
    _, (_, better) = estimates(vi.vimco(model, guide_by(reinforce), 5), key, THETA, PHI, X)
    assert abs(better.std() - 0.85) < 0.1  # the standard error of a standard deviation from 4000 draws is about .02
    assert better.std() < plain.std() / 2


@pytest.mark.slow
def test_hierarchical_guides(key):
    """HVI, IWHVI and DIWHVI: a guide with an auxiliary choice u, summed over all values."""

    def guide(phi, x):
        u = numpyro.sample("u", reinforce(dist.Bernoulli(phi)))
        numpyro.sample("b", reinforce(dist.Bernoulli(0.2 + 0.6 * u)))

    def p_b(u, b):
        return 0.2 + 0.6 * u if b else 0.8 - 0.6 * u

    def truth(theta, phi, n, m):
        total = 0.0
        # n times: the true u, the kept b, and m - 1 fresh u
        for row in itertools.product((0, 1), repeat=n * (m + 1)):
            lanes = [row[i * (m + 1) : (i + 1) * (m + 1)] for i in range(n)]
            log_prob = sum(log_q(phi, u) for u, b, *us in lanes) + sum(log_q(phi, v) for _, _, *us in lanes for v in us)
            prob = jnp.exp(log_prob) * np.prod([p_b(u, b) for u, b, *_ in lanes])
            weights = [log_p(theta, b) - jnp.log(sum(p_b(v, b) for v in (u, *us)) / m) for u, b, *us in lanes]
            total += prob * log_mean(weights)
        return total

    made = {
        (1, 1): vi.hvi(model, guide, "b"),
        (1, 3): vi.iwhvi(model, guide, "b", 3),
        (2, 2): vi.diwhvi(model, guide, "b", 2, 2),
    }
    exact = {}
    for (n, m), objective in made.items():
        exact[n, m] = float(truth(THETA, PHI, n, m))
        values, gradients = estimates(objective, key, THETA, PHI, X)
        assert_mean(values, exact[n, m], (n, m))
        slopes = jax.jit(jax.grad(lambda t, f, n=n, m=m: truth(t, f, n, m), (0, 1)))(THETA, PHI)
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert_mean(gradient, float(slope), (n, m))
    evidence = float(jax.nn.logsumexp(jnp.stack([log_p(THETA, b) for b in (0, 1)])))
    assert exact[1, 1] < exact[1, 3] < evidence and exact[1, 1] < exact[2, 2] < evidence  # V7


def test_sleep(key):
    def joint(theta, x=None):
        b = numpyro.sample("b", dist.Bernoulli(theta))
        numpyro.sample("x", dist.Bernoulli(0.2 + 0.5 * b), obs=x)

    def recognition(phi, x):
        numpyro.sample("b", dist.Bernoulli(phi[x]))

    def truth(phi):
        rows = [(THETA if b else 1 - THETA, 0.2 + 0.5 * b, b) for b in (0, 1)]
        return -sum(p * (r if x else 1 - r) * log_q(phi[x], b) for p, r, b in rows for x in (0, 1))

    phi = jnp.array([0.4, 0.6])
    values, (slopes,) = estimates(vi.sleep(joint, recognition, "x"), key, THETA, phi, argnums=(2,))
    assert_mean(values, float(truth(phi)))
    assert_mean(slopes, np.asarray(jax.grad(truth)(phi)))
    with pytest.raises(AddressError, match=r"sleep: the model does not draw \['y'\] when its data are None; it draws"):
        vi.sleep(joint, recognition, "y")(key, THETA, phi)


def test_mixed_estimators(key):
    """The worked example: a flip decides the law of x, and x² is observed; closed form by moments of the normal."""

    def squares(theta, y):
        v = numpyro.sample("v", dist.Bernoulli(0.8))
        x = numpyro.sample("x", dist.Normal(jnp.where(v == 1, 2.0, 3.0), jnp.where(v == 1, 1.0, 0.5)))
        numpyro.sample("y", dist.Normal(x**2, 0.1), obs=y)

    def guide(phi, y):
        v = numpyro.sample("v", enum(dist.Bernoulli(phi[0])))
        numpyro.sample("x", reparam(dist.Normal(jnp.where(v == 1, phi[1], phi[2]), 1.0)))

    phi = jnp.array([0.3, 1.5, 2.5])
    values, (slopes,) = estimates(vi.elbo(squares, guide), key, 0.0, phi, 4.0, argnums=(2,), n=20000)
    assert_mean(values, -1488.276)
    assert_mean(slopes, np.array([1303.415, -112.350, -1836.100]))


# ---- Gaussians ---------------------------------------------------------------------------------------------------------


def gaussian(theta, x):
    z = numpyro.sample("z", dist.Normal(theta, 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gaussian_guide(phi, x):
    numpyro.sample("z", reparam(dist.Normal(phi[0], jnp.exp(phi[1]))))


def gaussian_elbo(theta, phi, x):
    """log p(x) - KL(q ‖ posterior), V10; the posterior is N((theta + x)/2, 1/2)."""
    s = jnp.exp(phi[1])
    kl = jnp.log(0.5**0.5 / s) + (s**2 + (phi[0] - (theta + x) / 2) ** 2) - 0.5
    return -((x - theta) ** 2) / 4 - jnp.log(4 * jnp.pi) / 2 - kl


OPTIMUM = jnp.array([0.9, jnp.log(0.5) / 2])  # the posterior at theta = .3, x = 1.5


@pytest.mark.parametrize("option", ["plain", "stl", "analytic_kl", "one particle"])
def test_elbo_of_gaussians(option, key):
    objective = {
        "plain": vi.elbo(gaussian, gaussian_guide),
        "stl": vi.elbo(gaussian, gaussian_guide, stl=True),
        "analytic_kl": vi.elbo(gaussian, gaussian_guide, analytic_kl=True),
        "one particle": vi.iwelbo(gaussian, gaussian_guide, 1),
    }[option]
    phi = jnp.array([0.2, -0.3])
    values, gradients = estimates(objective, key, 0.3, phi, 1.5)
    assert_mean(values, float(gaussian_elbo(0.3, phi, 1.5)))
    for gradient, exact in zip(gradients, jax.grad(gaussian_elbo, (0, 1))(0.3, phi, 1.5), strict=True):
        assert_mean(gradient, np.asarray(exact))


def test_sticking_the_landing_has_no_variance_at_the_posterior(key):
    _, (_, sticking) = estimates(vi.elbo(gaussian, gaussian_guide, stl=True), key, 0.3, OPTIMUM, 1.5, n=100)
    _, (_, plain) = estimates(vi.elbo(gaussian, gaussian_guide), key, 0.3, OPTIMUM, 1.5, n=100)
    assert np.abs(sticking).max() < 1e-5 < 0.1 < plain.std()


def test_doubly_reparameterised_gradient(key):
    """The same gradient as the plain one's, with less variance in phi; by differences with common random numbers."""
    phi = jnp.array([0.2, -0.3])
    _, plain = estimates(vi.iwelbo(gaussian, gaussian_guide, 5), key, 0.3, phi, 1.5, n=10000)
    _, doubly = estimates(vi.dreg_iwelbo(gaussian, gaussian_guide, 5), key, 0.3, phi, 1.5, n=10000)
    for a, b in zip(plain, doubly, strict=True):
        assert_mean(a - b, np.zeros(a.shape[1:]))
    assert (doubly[1].std(axis=0) < 0.7 * plain[1].std(axis=0)).all()
    with pytest.raises(StrategyError):
        vi.dreg_iwelbo(model, guide_by(reinforce), 2)(key, THETA, PHI, X)


@pytest.mark.parametrize(("n", "truth"), [(1, 0.0), (2, None), (50, -0.75)])
def test_wake_phi_tends_to_the_forward_divergence(n, truth, key):
    """V8: at posterior N(.75, 1/2) and q = N(0, 1) the gradient of KL(p ‖ q) is -.75, of wake_phi at n = 1 it is 0."""

    def unit_guide(phi, x):
        numpyro.sample("z", reparam(dist.Normal(phi, 1.0)))

    _, (slopes,) = estimates(vi.wake_phi(gaussian, unit_guide, n), key, 0.0, 0.0, 1.5, argnums=(2,))
    if truth is None:
        # By quadrature over both particles: -E[Σ w_i z_i / Σ w_i], w = exp(-(1.5 - z)²/2).
        z, weight = np.polynomial.hermite_e.hermegauss(60)
        w = np.exp(-((1.5 - z) ** 2) / 2)
        a, b = np.meshgrid(z, z)
        wa, wb = np.meshgrid(w, w)
        pair = np.outer(weight, weight) / weight.sum() ** 2
        truth = -(pair * (wa * a + wb * b) / (wa + wb)).sum()
    bias = 0.02 if n == 50 else 0.0  # O(1/n): at n = 20 it is .022
    assert abs(slopes.mean() - truth) <= bias + 5 * slopes.std() / np.sqrt(len(slopes))


# ---- minibatches -------------------------------------------------------------------------------------------------------

DATA = jnp.array([0.3, -0.5, 1.2, 0.8, 0.1, -1.0])


def test_minibatches_are_unbiased(key):
    """By `scale`, and by NumPyro's plate: both average to the ELBO of all data."""

    def given(theta, x):
        z = numpyro.sample("z", dist.Normal(theta, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def subsampled(theta, x):
        z = numpyro.sample("z", dist.Normal(theta, 1.0))
        with numpyro.plate("n", 6, subsample_size=2) as i:
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    phi = jnp.array([0.2, -0.3])
    s2 = float(jnp.exp(2 * phi[1]))
    truth = -0.5 * (s2 + (0.2 - 0.3) ** 2) + 0.5 * (1 + np.log(s2))
    truth += float((-0.5 * ((DATA - 0.2) ** 2 + s2) - 0.5 * jnp.log(2 * jnp.pi)).sum())
    values, _ = estimates(vi.elbo(subsampled, gaussian_guide), key, 0.3, phi, DATA)
    assert_mean(values, truth)
    halves = [
        estimates(vi.elbo(given, gaussian_guide, scale=3.0), key, 0.3, phi, DATA[i : i + 2])[0] for i in (0, 2, 4)
    ]
    assert_mean(np.mean(halves, axis=0), truth)


# ---- errors ------------------------------------------------------------------------------------------------------------


def test_bad_arguments(key, no_shape_checks):
    guide = guide_by(enum)
    with pytest.raises(ValueError, match="iwelbo: n is 0, expected an integer of at least 1"):
        vi.iwelbo(model, guide, 0)
    with pytest.raises(ValueError, match="vimco: n is 1, expected an integer of at least 2"):
        vi.vimco(model, guide, 1)
    with pytest.raises(ValueError, match="stl and analytic_kl exclude each other"):
        vi.elbo(model, guide, stl=True, analytic_kl=True)
    with pytest.raises(TypeError, match="stl needs a guide with an exact density"):
        vi.elbo(model, marginal(guide, "b"), stl=True)


def test_analytic_kl_says_where_it_does_not_exist(key):
    def two(theta, x):
        a = numpyro.sample("a", dist.Normal(theta, 1.0))
        numpyro.sample("b", dist.Normal(a, 1.0))

    def reversed_guide(phi, x):
        b = numpyro.sample("b", dist.Normal(phi, 1.0))
        numpyro.sample("a", dist.Normal(b, 1.0))

    with pytest.raises(
        AddressError, match=r"draw in the same order; the guide draws \['b', 'a'\], the model \['a', 'b'\]"
    ):
        vi.elbo(two, reversed_guide, analytic_kl=True)(key, 0.3, 0.4, X)

    def laplace(phi, x):
        numpyro.sample("z", dist.Laplace(phi, 1.0))

    with pytest.raises(NotImplementedError, match="no analytic KL divergence from Laplace to Normal at 'z'"):
        vi.elbo(gaussian, laplace, analytic_kl=True)(key, 0.3, 0.4, X)


def test_dreg_weighs_each_particle_by_the_minibatch_of_its_term(key):
    """The model subsamples a plate that the guide lacks; the gradient in φ is that of the plain bound."""
    data = jnp.array([-2.0, -0.5, 0.3, 1.0, 2.5, 3.0])

    def model(theta):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", len(data), subsample_size=2) as i:
            numpyro.sample("x", dist.Normal(z + theta, 1.5), obs=data[i])

    def guide(phi):
        numpyro.sample("z", reparam(dist.Normal(phi, 0.7)))

    plain, doubly = (
        estimates(make(model, guide, 3), jax.random.fold_in(key, k), 0.1, 0.2, n=20_000)[1]
        for k, make in enumerate((vi.iwelbo, vi.dreg_iwelbo))
    )
    for a, b in zip(plain, doubly, strict=True):
        error = np.sqrt((a.var() + b.var()) / len(a))
        assert abs(a.mean() - b.mean()) < 5 * error


def test_dreg_needs_a_density_that_is_known():
    def model(theta):
        numpyro.sample("z", marginal(lambda t: pair(t), ("z",))(theta))

    def pair(t):
        u = numpyro.sample("u", reinforce(dist.Bernoulli(0.3)))
        numpyro.sample("z", reparam(dist.Normal(t + u, 1.0)))

    def guide(phi):
        numpyro.sample("z", reparam(dist.Normal(phi, 0.7)))

    with pytest.raises(TypeError, match="'z' is an estimate"):
        vi.dreg_iwelbo(model, guide, 3)(jax.random.key(0), 0.1, 0.2)
