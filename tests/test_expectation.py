"""Expectations at the edges: whole numbers in loops, values that never happen, derivatives of derivatives, calls.

What is exact is compared in float32; what is drawn is compared with its exact value within 5 standard errors, below 1e-6
for each figure by chance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax

import vi
from vi.errors import StrategyError

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = 1e-5  # sums of at most a hundred terms
SIGMAS = 5.0


def draws(f, p, n=4000, seed=0):
    """Values and gradients in p of n runs."""
    run = jax.vmap(jax.value_and_grad(vi.expectation(f), 1), (0, None))
    value, gradient = jax.jit(run)(jax.random.split(jax.random.key(seed), n), p)
    return np.asarray(value, float), np.asarray(gradient, float)


def assert_mean(x, truth):
    error = x.std(0) / len(x) ** 0.5 + FLOAT32 * (1 + np.abs(truth))
    assert np.all(np.abs(x.mean(0) - truth) <= SIGMAS * error), f"{x.mean(0)} ± {error}, expected {truth}"


def coin(p):
    return vi.sample(vi.enum(dist.Bernoulli(p)))


# ---- loops -------------------------------------------------------------------------------------------------------------


def path(p, kind):
    """E of the number of heads of three coins, each with twice the chance after heads, started after heads."""

    def step(z, _):
        z = coin(p * (0.5 + 0.5 * z)).astype(kind)
        return z, z

    return 1.0 * lax.scan(step, jnp.ones((), kind), None, length=3)[1].sum()


def path_by_hand(p):
    chance, total = 1.0, 0.0
    for _ in range(3):
        chance = p * (0.5 + 0.5 * chance)
        total += chance
    return total


@pytest.mark.parametrize("kind", [jnp.int32, jnp.float32])
def test_a_state_of_whole_numbers_is_not_averaged_as_one(kind):
    value, gradient = draws(lambda p: path(p, kind), 0.6)
    assert_mean(value, path_by_hand(0.6))
    assert_mean(gradient, jax.grad(path_by_hand)(0.6))
    if kind == jnp.float32:
        assert value.std() < FLOAT32  # summed over exactly


LOOPS = {
    "carried": lambda p: lax.scan(lambda s, _: (s + 1.0 * coin(p), None), 0.0, None, length=3)[0],
    "carried as an integer": lambda p: 1.0 * lax.scan(lambda s, _: (s + coin(p), None), 0, None, length=3)[0],
    "rows": lambda p: lax.scan(lambda s, _: (s, 1.0 * coin(p)), 0.0, None, length=3)[1].sum(),
    "fori_loop": lambda p: lax.fori_loop(0, 3, lambda i, s: s + 1.0 * coin(p), 0.0),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_sum_in_a_loop_without_a_state(name):
    value, gradient = draws(LOOPS[name], 0.6)
    assert_mean(value, 1.8)
    assert_mean(gradient, 3.0)


def test_a_cast_that_rounds_what_a_loop_adds_up_is_not_summed_through():
    def halves(p):  # only the second coin survives the cast
        step = lambda s, _: (s.astype(jnp.int32).astype(jnp.float32) + 0.5 * coin(p), None)  # noqa: E731
        return lax.scan(step, jnp.float32(0), None, length=2)[0]

    value, gradient = draws(halves, 0.5)
    assert_mean(value, 0.25)
    assert_mean(gradient, 0.5)


def test_a_division_of_whole_numbers_is_not_split_into_terms():
    def f(p):
        return 1.0 * lax.div(coin(p) + coin(p), 2)

    value, gradient = draws(f, 0.4, n=2)
    np.testing.assert_allclose(value, 0.16, rtol=FLOAT32)
    np.testing.assert_allclose(gradient, 0.8, rtol=FLOAT32)


# ---- values that never happen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [vi.enum, vi.mvd])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_certain_coin_has_a_derivative(strategy, p):
    value, gradient = draws(lambda p: 3.0 * vi.sample(strategy(dist.Bernoulli(p))), p, n=2)
    np.testing.assert_allclose(value, 3 * p)
    np.testing.assert_allclose(gradient, 3.0)


@pytest.mark.parametrize("strategy", [vi.enum, vi.mvd])
def test_a_certain_category_has_a_derivative_in_all_probabilities(strategy):
    f = lambda p: jnp.array([1.0, 5.0, 7.0])[vi.sample(strategy(dist.Categorical(p)))]  # noqa: E731
    value, gradient = draws(f, jnp.array([1.0, 0.0, 0.0]), n=2)
    np.testing.assert_allclose(value, 1.0)
    # Only differences count on the simplex.
    np.testing.assert_allclose(gradient - gradient[:, :1], np.array([[0, 4, 6]] * 2), rtol=FLOAT32)


@pytest.mark.parametrize("strategy", [vi.enum, vi.mvd, vi.reinforce])
def test_a_category_that_is_masked_out_spoils_nothing(strategy):
    mask = jnp.array([0.0, 0.0, -jnp.inf])

    def elbo(logits):
        q = dist.Categorical(logits=logits + mask)
        z = vi.sample(strategy(q))
        return dist.Categorical(logits=jnp.array([0.3, 0.1, 1.0])).log_prob(z) - q.log_prob(z)

    logits = jnp.array([0.2, 0.5, 0.1])
    log_p, q = jax.nn.log_softmax(jnp.array([0.3, 0.1, 1.0])), jax.nn.softmax(logits + mask)
    cost = np.array(log_p[:2] - jnp.log(q[:2]))
    value, gradient = draws(elbo, logits)
    assert_mean(value, float(q[:2] @ cost))
    assert_mean(gradient, np.array([*(q[:2] * (cost - q[:2] @ cost)), 0.0]))


def test_an_alternative_at_which_the_result_is_infinite_leaves_the_value_alone():
    value, gradient = draws(lambda h: jnp.log(vi.sample(vi.mvd(dist.Uniform(0.0, h)))), 2.0, n=10_000)
    assert_mean(value, np.log(2) - 1)
    assert_mean(gradient, 0.5)


def test_particles_that_break_a_hard_constraint_are_never_chosen():
    def target(m):
        z = numpyro.sample("z", dist.Normal(m, 1))
        numpyro.factor("positive", jnp.where(z > 0, 0.0, -jnp.inf))

    def proposal(m):
        numpyro.sample("z", vi.reinforce(dist.Normal(m, 1)))

    def f(m):
        trace, log_w = vi.sim(vi.normalize(target, vi.importance(8, proposal)))(m)
        return vi.log_density(target)(trace, m) - log_w

    value, _ = draws(f, 0.5)
    # All eight are on the wrong side with probability 5.4e-5 per run.
    assert np.isnan(value).mean() < 3e-3
    assert np.nanmax(value) < 2 and np.nanmin(value) > -4  # near log P(z > 0) = -0.37


# ---- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law",
    [
        lambda m: dist.Normal(m, 1.0),
        lambda m: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(m + jnp.array([-1.0, 1.0]), 1.0)
        ),
    ],
    ids=["normal", "mixture"],
)
def test_second_derivatives_of_implicit_draws(law):
    second = jax.hessian(vi.expectation(lambda m: vi.sample(vi.implicit(law(m))) ** 2), 1)
    x = jax.jit(jax.vmap(second, (0, None)))(jax.random.split(jax.random.key(1), 200), 0.3)
    np.testing.assert_allclose(x, 2.0, rtol=1e-3)  # one location moves all of it; the cdf is good to 1e-4 in the tails


@pytest.mark.parametrize(
    "f",
    [
        jax.nn.relu,
        jax.nn.leaky_relu,
        lambda x: jnp.clip(x, 0.0, 10.0),
        vi.continuous(lambda x: jnp.where(x > 0, x, 0.0)),
        vi.continuous(lambda x: (jnp.where(x > 0, x, 0.0), x)[0]),
    ],
    ids=["relu", "leaky_relu", "clip", "marked", "marked, two branches"],
)
def test_the_derivative_of_a_continuous_function_is_not_taken_to_be_one(f):
    forward = vi.expectation(lambda m: f(vi.sample(vi.reparam(dist.Normal(m, 1.0)))))
    jax.grad(forward, 1)(jax.random.key(0), 0.3)
    for derivative in (jax.grad(f), lambda x: jax.jvp(f, (x,), (1.0,))[1], jax.jit(jax.grad(f))):
        slope = vi.expectation(lambda m, g=derivative: g(vi.sample(vi.reparam(dist.Normal(m, 1.0)))))
        with pytest.raises(StrategyError, match=r"reparam is not legal.*mvd"):
            jax.grad(slope, 1)(jax.random.key(0), 0.3)


@pytest.mark.parametrize("f", [jax.nn.softplus, jax.nn.silu, jnp.tanh, lambda x: jnp.logaddexp(x, 1.0)])
def test_smooth_functions_may_be_differentiated_inside(f):
    e = vi.expectation(lambda m: jax.grad(f)(vi.sample(vi.reparam(dist.Normal(m, 1.0)))))
    gradient = jax.vmap(jax.grad(e, 1), (0, None))(jax.random.split(jax.random.key(0), 4000), 0.3)
    x, w = np.polynomial.hermite_e.hermegauss(60)
    truth = np.asarray(jax.vmap(jax.grad(jax.grad(f)))(jnp.asarray(0.3 + x, jnp.float32)), float)
    assert_mean(np.asarray(gradient, float), float(truth @ w / w.sum()))


def test_an_angle_jumps():
    e = vi.expectation(lambda m: jnp.arctan2(vi.sample(vi.reparam(dist.Normal(m, 1.0))), -1.0))
    with pytest.raises(StrategyError, match="atan2"):
        jax.grad(e, 1)(jax.random.key(0), 0.3)


# ---- calls -------------------------------------------------------------------------------------------------------------


def scaled(m, scale=1.0):
    return scale * vi.sample(vi.reparam(dist.Normal(m, 1.0)))


def test_keyword_arguments_and_sign():
    e, key = vi.expectation(scaled), jax.random.key(0)
    assert e(key, 0.5, scale=2.0) == 2 * e(key, 0.5)
    assert (-e)(key, 0.5) == -e(key, 0.5) and isinstance(-e, vi.Expectation)
    assert [site.strategy for site in e.sites(0.5, scale=2.0)] == ["reparam"]


def test_a_key_comes_first(no_shape_checks):
    with pytest.raises(TypeError, match="first argument is a key"):
        vi.expectation(scaled)(0.5, 0.5)


def test_an_expectation_inside_another_is_refused():
    inner = vi.expectation(lambda m: vi.sample(vi.reinforce(dist.Normal(m, 1.0))) ** 2 + 1)
    nested = vi.expectation(lambda m: jnp.log(inner(vi.random_key(), m)))
    with pytest.raises(StrategyError, match="inside another expectation"):
        nested(jax.random.key(0), 0.5)
    together = vi.expectation(lambda m: jnp.log(inner.f(m)))
    gradient = jax.vmap(jax.grad(together, 1), (0, None))(jax.random.split(jax.random.key(0), 10_000), 0.5)
    x, w = np.polynomial.hermite_e.hermegauss(80)
    truth = (2 * (0.5 + x) / ((0.5 + x) ** 2 + 1)) @ w / w.sum()
    assert_mean(np.asarray(gradient, float), truth)


@pytest.mark.parametrize("in_axes", [({"a": 0, "b": None},), [{"a": 0, "b": None}]])
def test_axes_by_leaf_as_in_vmap(in_axes):
    x = {"a": jnp.arange(3.0), "b": jnp.array(10.0)}
    f = lambda x: x["a"] + x["b"] + vi.sample(vi.reparam(dist.Normal(0.0, 1e-6)))  # noqa: E731
    batched = vi.batch(vi.expectation(f), in_axes=in_axes)(jax.random.key(0), x)
    np.testing.assert_allclose(batched, [10, 11, 12], atol=1e-4)
    total = vi.expectation(lambda x: vi.vmap(f, in_axes=in_axes)(x).sum())
    np.testing.assert_allclose(total(jax.random.key(0), x), 33, atol=1e-3)


def test_lanes_of_leave_one_out_inside_those_of_jax_are_refused_by_name():
    def one(q):
        return vi.vmap(
            lambda: 1.0 * vi.sample(vi.reinforce(dist.Bernoulli(q), baseline="leave_one_out")), axis_size=3
        )()

    e = vi.expectation(lambda q: jax.vmap(one)(jnp.stack([q, q])).sum())
    with pytest.raises(StrategyError, match=r"jax\.vmap around its vi\.vmap"):
        jax.grad(e, 1)(jax.random.key(0), 0.4)
