"""`marginal`, `normalize`: the two contracts of estimated densities, nesting, and exactness where it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from vi import enum, expectation, reinforce, reparam
from vi.errors import AddressError
from vi.inference import bind, importance, log_normalizer, marginal, normalize
from vi.programs import log_density, sim

pytestmark = pytest.mark.usefixtures("quick_compilation")

RARE = 6e-7
"""Error rate of each z-test: a normal variable beyond 5 standard deviations.  There are about thirty figures tested so."""

WEIGHTS, MEANS = np.array([0.2, 0.5, 0.3]), np.array([-2.0, 0.0, 1.5])


def bump(y):
    """A function that the reciprocal contract is tested with: E[bump(y)/w] is its integral, √(2π)."""
    return jnp.exp(-(y**2) / 2)


def average(f, key, *args, n=10000):
    return np.asarray(jax.jit(jax.vmap(lambda k: expectation(f)(k, *args)))(jax.random.split(key, n)), float)


def z_score(draws, truth):
    return (draws.mean() - truth) / (draws.std() / np.sqrt(len(draws)))


def assert_mean(draws, truth):
    assert abs(z_score(draws, truth)) <= 5, f"{draws.mean()} ± {draws.std() / np.sqrt(len(draws))}, expected {truth}"


def mixture():
    u = numpyro.sample("u", reinforce(dist.Categorical(jnp.array(WEIGHTS))))
    numpyro.sample("y", dist.Normal(jnp.array(MEANS)[u], 1.0))


def mixture_density(y):
    return (WEIGHTS * np.exp(-((y - MEANS) ** 2) / 2)).sum() / np.sqrt(2 * np.pi)


def uniform_proposal(kept):
    numpyro.sample("u", reinforce(dist.Categorical(jnp.ones(3) / 3)))


GRID = np.linspace(-12, 12, 4001)
ROOT = np.sqrt(2 * np.pi)


# ---- contracts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", [importance(1), importance(3), importance(3, uniform_proposal)], ids=["1", "3", "q"]
)
def test_contracts_of_marginal(algorithm, key):
    """V4, V5 and, as control, the weight of `sim` in the place of the other (V5's control)."""
    program = marginal(mixture, "y", algorithm)

    def reciprocal():
        trace, log_w = sim(program)()
        return bump(trace["y"]) * jnp.exp(-log_w)

    def density(y):
        return jnp.exp(log_density(program)({"y": y}))

    def swapped():
        trace, log_w = sim(program)()
        return bump(trace["y"]) * jnp.exp(log_w)

    assert_mean(average(reciprocal, key), ROOT)
    assert_mean(average(density, key, jnp.array(0.5)), mixture_density(0.5))
    square = np.array([mixture_density(y) ** 2 for y in GRID])
    exact = (
        np.trapezoid(np.exp(-(GRID**2) / 2) * square, GRID)
        if hasattr(np, "trapezoid")
        else np.trapz(np.exp(-(GRID**2) / 2) * square, GRID)
    )
    assert z_score(average(swapped, key), exact) > 5  # E[w_sim] > density


def posterior(x):
    z = numpyro.sample("z", reparam(dist.Normal(0.0, 1.0)))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def off_centre(x):
    numpyro.sample("z", reparam(dist.Normal(x, 1.5)))


@pytest.mark.parametrize("n", [1, 3, 10])
def test_reciprocal_contract_of_normalize(n, key):
    """V6, N(0,1) prior and N(z,1) likelihood at x = 1.5.  Control: with Ẑ from fresh particles it is far from √(2π)."""
    program = normalize(posterior, importance(n, off_centre))

    def reciprocal(x):
        trace, log_w = sim(program)(x)
        return bump(trace["z"]) * jnp.exp(-log_w)

    assert_mean(average(reciprocal, key, jnp.array(1.5)), ROOT)


def test_density_of_normalize_integrates_to_one(key):
    """V6 with N = 4; and with z left out of Ẑ it does not."""
    program = normalize(posterior, importance(4, off_centre))
    wide = dist.Normal(0.75, 2.0)

    def integral(x, u):
        z = 0.75 + 2 * u
        return jnp.exp(log_density(program)({"z": z}, x) - wide.log_prob(z))

    def without(x, u):
        z = 0.75 + 2 * u
        fresh = log_normalizer(posterior, importance(4, off_centre))(x)
        return jnp.exp(log_density(posterior)({"z": z}, x) - fresh - wide.log_prob(z))

    noise = jax.random.normal(key, 20000)
    for f, right in ((integral, True), (without, False)):
        rows = jax.vmap(lambda k, u, f=f: expectation(f)(k, jnp.array(1.5), u))
        draws = np.asarray(jax.jit(rows)(jax.random.split(key, 20000), noise), float)
        if right:
            assert_mean(draws, 1.0)
        else:  # of infinite variance: cut off, it is above 1 all the more surely
            assert z_score(np.minimum(draws, 20.0), 1.0) > 5, draws.mean()


def test_bound_order(key):
    """V7: E log w_est ≤ log ρ ≤ E log w_sim, and both close in as m grows."""
    log_rho = np.log(mixture_density(0.5))
    below = [
        average(lambda m=m: log_density(marginal(mixture, "y", importance(m)))({"y": jnp.array(0.5)}), key)
        for m in (1, 4)
    ]
    assert z_score(below[0], log_rho) < -5 and z_score(below[1], log_rho) < -5
    assert below[1].mean() > below[0].mean()

    def gap(m):
        trace, log_w = sim(marginal(mixture, "y", importance(m)))()
        terms = jnp.log(jnp.array(WEIGHTS)) + dist.Normal(jnp.array(MEANS), 1.0).log_prob(trace["y"])
        return log_w - jax.nn.logsumexp(terms)

    above = [average(lambda m=m: gap(m), key) for m in (1, 4)]
    assert z_score(above[0], 0.0) > 5 and z_score(above[1], 0.0) > 5
    assert above[1].mean() < above[0].mean()


def test_normalizer_is_unbiased(key):
    truth = np.exp(-(1.5**2) / 4) / np.sqrt(4 * np.pi)
    for algorithm in (importance(3), importance(3, off_centre)):
        draws = average(lambda x, a=algorithm: jnp.exp(log_normalizer(posterior, a)(x)), key, jnp.array(1.5))
        assert_mean(draws, truth)


# ---- exactness ---------------------------------------------------------------------------------------------------------


def chain():
    u = numpyro.sample("u", reparam(dist.Normal(0.0, 1.0)))
    numpyro.sample("y", reparam(dist.Normal(u, 1.0)))


@pytest.mark.parametrize("n", [1, 3])
def test_the_exact_proposal_gives_the_exact_density(n, key):
    """Every draw has the exact weight: u | y is N(y/2, 1/2), y is N(0, 2)."""
    program = marginal(
        chain, "y", importance(n, lambda kept: numpyro.sample("u", dist.Normal(kept["y"] / 2, 0.5**0.5)))
    )

    def error():
        trace, log_w = sim(program)()
        truth = dist.Normal(0.0, 2**0.5).log_prob(trace["y"])
        return jnp.maximum(jnp.abs(log_w - truth), jnp.abs(log_density(program)(trace) - truth))

    # A maximum is no place for pathwise draws; no gradient is asked for.
    assert average(lambda: jax.lax.stop_gradient(error()) ** 2, key, n=8).max() < 1e-8


def test_the_exact_posterior_normalizes_without_error(key):
    exact = normalize(posterior, importance(3, lambda x: numpyro.sample("z", reparam(dist.Normal(x / 2, 0.5**0.5)))))

    def error(x):
        trace, log_w = sim(exact)(x)
        return (log_w - dist.Normal(x / 2, 0.5**0.5).log_prob(trace["z"])) ** 2

    assert average(error, key, jnp.array(1.5), n=8).max() < 1e-8


def test_one_particle_of_normalize_is_its_proposal(key):
    program = normalize(posterior, importance(1, off_centre))

    def error(x):
        trace, log_w = sim(program)(x)
        return (log_w - log_density(off_centre)(trace, x)) ** 2 + (log_density(program)(trace, x) - log_w) ** 2

    assert average(error, key, jnp.array(1.5), n=8).max() < 1e-8


def test_gradients_through_normalize_are_unbiased(key):
    """E[z] under SIR of a Bernoulli: the index is enumerated, particles by score functions; truth by summing over all."""
    lik = np.array([0.2, 0.9])

    def target():
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        numpyro.factor("f", jnp.log(jnp.array(lik))[b])

    def mean(p):
        proposal = lambda: numpyro.sample("b", reinforce(dist.Bernoulli(p)))  # noqa: E731
        return sim(normalize(target, importance(2, proposal)))()[0]["b"].astype(float)

    def truth(p):
        total, q, joint = 0.0, [1 - p, p], [0.7 * lik[0], 0.3 * lik[1]]
        for a in range(2):
            for b in range(2):
                w = joint[a] / q[a], joint[b] / q[b]
                total = total + q[a] * q[b] * (w[0] * a + w[1] * b) / (w[0] + w[1])
        return total

    both = jax.jit(jax.vmap(lambda k: jax.value_and_grad(expectation(mean), 1)(k, jnp.array(0.4))))
    values, slopes = (np.asarray(v, float) for v in both(jax.random.split(key, 10000)))
    assert_mean(values, float(truth(0.4)))
    assert_mean(slopes, float(jax.grad(truth)(0.4)))


# ---- as sites, and in each other ---------------------------------------------------------------------------------------


def test_a_marginal_as_a_site(key):
    inner = marginal(mixture, "y", importance(2))

    def outer():
        y = numpyro.sample("y", inner())
        numpyro.sample("w", dist.Normal(y, 1.0))

    def density(w):
        return jnp.exp(log_density(outer)({"y": jnp.array(0.5), "w": w}))

    assert_mean(average(density, key, jnp.array(0.2)), mixture_density(0.5) * np.exp(-(0.3**2) / 2) / ROOT)

    def reciprocal():
        trace, log_w = sim(outer)()
        assert set(trace) == {"y", "w"}
        return bump(trace["y"]) * bump(trace["w"]) * jnp.exp(-log_w)

    assert_mean(average(reciprocal, key), 2 * np.pi)
    observed = average(lambda: jnp.exp(log_density(lambda: numpyro.sample("y", inner(), obs=jnp.array(0.5)))({})), key)
    assert_mean(observed, mixture_density(0.5))


def test_a_site_with_several_addresses(key):
    def pair(p):
        u = numpyro.sample("u", enum(dist.Bernoulli(p)))
        numpyro.sample("a", enum(dist.Bernoulli(0.2 + 0.6 * u)))
        numpyro.sample("b", enum(dist.Bernoulli(0.5 - 0.2 * u)))

    seen = set()

    def outer(p):
        value = numpyro.sample("y", marginal(pair, ("a", "b"))(p))
        numpyro.sample("c", enum(dist.Bernoulli(0.1 + 0.4 * value["a"] + 0.3 * value["b"])))

    def total(p):
        trace, _ = sim(outer)(p)
        seen.update(trace)
        return (trace["y/a"] + 10 * trace["y/b"] + 100 * trace["c"]).astype(float)

    a, b = 0.7 * 0.2 + 0.3 * 0.8, 0.7 * 0.5 + 0.3 * 0.3
    value = expectation(total)(key, jnp.array(0.3))
    assert jnp.allclose(value, a + 10 * b + 100 * (0.1 + 0.4 * a + 0.3 * b), rtol=1e-5)  # enumerated: exact in float32
    assert seen == {"y/a", "y/b", "c"}
    choices = {"y/a": jnp.array(1), "y/b": jnp.array(0), "c": jnp.array(1)}
    density = average(lambda p: jnp.exp(log_density(outer)(choices, p)), key, jnp.array(0.3))
    assert_mean(density, (0.7 * 0.2 * 0.5 + 0.3 * 0.8 * 0.7) * 0.5)
    with pytest.raises(AddressError, match="missing from the trace: 'y/b'"):
        expectation(lambda: log_density(outer)({"y/a": jnp.array(1), "c": jnp.array(1)}, 0.3))(key)


def test_inference_inside_inference(key):
    """A marginal whose proposal is itself normalized: both contracts still hold."""

    def given_u(kept):
        u = numpyro.sample("u", reinforce(dist.Categorical(jnp.array(WEIGHTS))))
        numpyro.sample("y", dist.Normal(jnp.array(MEANS)[u], 1.0), obs=kept["y"])

    program = marginal(mixture, "y", importance(2, normalize(given_u, importance(2))))

    def reciprocal():
        trace, log_w = sim(program)()
        return bump(trace["y"]) * jnp.exp(-log_w)

    assert_mean(average(reciprocal, key), ROOT)
    assert_mean(average(lambda y: jnp.exp(log_density(program)({"y": y})), key, jnp.array(0.5)), mixture_density(0.5))


def test_bind_gives_first_arguments(key):
    error = average(
        lambda: log_density(bind(posterior, 1.5))({"z": 0.2}) - log_density(posterior)({"z": 0.2}, 1.5), key, n=1
    )
    assert error == 0.0


# ---- errors ------------------------------------------------------------------------------------------------------------


def test_bad_arguments(key, no_shape_checks):
    for n in (0, 2.5):
        with pytest.raises(ValueError, match=rf"n is {n}, expected a positive integer"):
            importance(n)
    with pytest.raises(ValueError, match="keep is"):
        marginal(mixture, ())
    with pytest.raises(TypeError, match="algorithm is a int"):
        marginal(mixture, "y", 3)
    with pytest.raises(TypeError, match="a Marginal has no prior to propose from; give importance a proposal"):
        normalize(marginal(mixture, "y"), importance(3))
    with pytest.raises(AddressError, match=r"keep has \['q'\], but the program draws \['u', 'y'\]"):
        expectation(lambda: sim(marginal(mixture, "q"))()[1])(key)
    with pytest.raises(AddressError, match=r"the trace has addresses \['q'\], expected \['y'\]"):
        expectation(lambda: log_density(marginal(mixture, "y"))({"q": 1.0}))(key)

    def in_plate():
        with numpyro.plate("n", 3):
            numpyro.sample("y", marginal(mixture, "y")())

    with pytest.raises(AddressError, match="put the plate into its program"):
        expectation(lambda: sim(in_plate)()[1])(key)
