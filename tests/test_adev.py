"""Expectations and their derivatives: figures known in closed form, illegal uses, and defects known of other libraries.

Statistical tests are z-tests of means; each fails by chance with probability `RARE`, and there are fewer than a hundred.
"""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from scipy import stats

import vi

pytestmark = pytest.mark.usefixtures("quick_compilation")

RARE = 1e-6
LIMIT = stats.norm.isf(RARE / 2)
BY = {"reparam": vi.reparam, "implicit": vi.implicit, "reinforce": vi.reinforce, "enum": vi.enum, "mvd": vi.mvd}
DISCRETE = ("enum", "reinforce", "mvd")


# Compiling takes longer than running here, and most of that is optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def draws(e, keys, args):
    """(value, gradient) of every key."""
    over = jax.value_and_grad(lambda a, key: e(key, *a))
    return jax.vmap(over, (None, 0))(args, keys)


def off(found, exact):
    """How far the mean of (n, ...) draws is from its exact value, in standard errors; rounding counts as spread."""
    x = np.asarray(found, float)
    error = np.maximum(x.std(axis=0, ddof=1) / np.sqrt(len(x)), 1e-6 * np.maximum(1, np.abs(exact)))
    return np.max(np.abs(x.mean(axis=0) - exact) / error)


def check(program, args, value, *gradient, key, n=20_000):
    """The program's mean, and its derivatives in as many of its arguments as are given."""
    e = program if isinstance(program, vi.Expectation) else vi.expectation(program)
    args = tuple(jnp.asarray(a, float) for a in args)
    values, gradients = draws(e, jax.random.split(key, n), args)
    assert off(values, value) < LIMIT
    for found, exact in zip(gradients, gradient, strict=False):
        assert off(found, exact) < LIMIT


def flip(p, strategy):
    return vi.sample(BY[strategy](dist.Bernoulli(probs=p)), "b").astype(float)


def normal(mu, sigma, strategy):
    return vi.sample(BY[strategy](dist.Normal(mu, sigma)), "x")


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("strategy", DISCRETE)
def test_running_example(strategy, key):
    program = lambda theta: jnp.where(flip(theta, strategy) == 1, 0.0, -theta / 2)  # noqa: E731
    check(program, (0.4,), -0.12, -0.1, key=key)


@pytest.mark.parametrize("strategy", ["reparam", "reinforce", "mvd"])
def test_powers_of_a_normal_draw(strategy, key):
    """E x² and E x³ at (0.5, 1.3), by a share that is 0 and 1: their own derivatives, and the difference of their means."""
    program = lambda mu, sigma, share: (1 - share) * normal(mu, sigma, strategy) ** 2  # noqa: E731
    check(program, (0.5, 1.3, 0.0), 1.94, 1.0, 2.6, -1.94, key=key)
    cubed = lambda mu, sigma: normal(mu, sigma, strategy) ** 3  # noqa: E731
    check(cubed, (0.5, 1.3), 2.66, 5.82, 3.9, key=key)


@pytest.mark.parametrize("strategy", ["reinforce", "mvd", None])
def test_an_indicator_has_its_derivative(strategy, key):
    mark = BY[strategy] if strategy else lambda d: d
    program = lambda t: jnp.where(vi.sample(mark(dist.Normal(t, 1.0))) > 3, t - 5, 0.0)  # noqa: E731
    exact = float(stats.norm.sf(2.0) - 4 * stats.norm.pdf(2.0))  # -0.19321
    assert abs(exact + 0.19321) < 1e-5
    check(program, (1.0,), -4 * stats.norm.sf(2.0), exact, key=key)


@pytest.mark.parametrize("strategy", DISCRETE)
def test_three_flips(strategy, key):
    program = lambda p: sum(flip(p * c, strategy) for c in (1.0, 1.2, 1.4)) ** 3  # noqa: E731
    check(program, (0.3,), 3.66336, 21.7296, key=key)


@pytest.mark.parametrize(
    ("program", "at", "value", "slope"),
    [
        (lambda p: vi.sample(vi.reinforce(dist.Geometric(probs=p))).astype(float), 0.4, 1.5, -6.25),
        (lambda p: vi.sample(vi.mvd(dist.Geometric(probs=p))).astype(float), 0.4, 1.5, -6.25),
        (lambda r: vi.sample(vi.reinforce(dist.Poisson(r))).astype(float) ** 2, 2.5, 8.75, 6.0),
        (lambda r: vi.sample(vi.mvd(dist.Poisson(r))).astype(float) ** 2, 2.5, 8.75, 6.0),
        (lambda a: vi.sample(vi.implicit(dist.Gamma(a))) ** 2, 1.7, 4.59, 4.4),
    ],
    ids=["geometric reinforce", "geometric mvd", "poisson reinforce", "poisson mvd", "gamma implicit"],
)
def test_other_families(program, at, value, slope, key):
    check(program, (at,), value, slope, key=key, n=10_000)


def test_all_strategies_in_one_program(key):
    def program(p, mu):
        b = flip(p, "enum")
        x = normal(mu * b, 1.0, "reparam")
        c = flip(jax.nn.sigmoid(x), "mvd")
        k = vi.sample(vi.reinforce(dist.Categorical(logits=jnp.stack([x, mu, 0.0 * mu]))))
        return x * c + k * b

    # 80-point Gauss-Hermite quadrature
    check(program, (0.3, 0.8), 0.5858131, 1.2639643, 0.1680173, key=key, n=50_000)


def _shifted(p, baseline):
    """10 + flip(p), all of which depends on the draw."""
    return jnp.where(vi.sample(vi.reinforce(dist.Bernoulli(probs=p), baseline=baseline)) == 1, 11.0, 10.0)


@pytest.mark.parametrize(("baseline", "spread"), [(None, 10.82), (10.0, 0.612), ("leave_one_out", 0.456)])
def test_baselines_and_their_spread_over_four_draws(baseline, spread, key):
    """Standard deviations of the slope: closed forms, and by enumeration for leave-one-out."""
    if baseline == "leave_one_out":
        lanes = vi.expectation(lambda p: jnp.mean(vi.vmap(lambda: _shifted(p, baseline), axis_size=4)()))
    else:
        four = vi.batch(vi.expectation(lambda p, _: _shifted(p, baseline)), in_axes=(None, 0))
        lanes = lambda key, p: jnp.mean(four(key, p, jnp.zeros(4)))  # noqa: E731
    values, (slopes,) = draws(lanes, jax.random.split(key, 20_000), (jnp.asarray(0.4),))
    assert off(values, 10.4) < LIMIT
    assert off(slopes, 1.0) < LIMIT
    # At 20 000 draws a standard deviation is good to one percent; 6 % is more than five of its standard errors.
    np.testing.assert_allclose(slopes.std(), spread, rtol=0.06)


def test_value_and_gradient_come_from_one_run_without_variance_under_enumeration(x64, key):
    program = vi.expectation(lambda p: sum(flip(p * c, "enum") for c in (1.0, 1.2, 1.4)) ** 3)
    values, (slopes,) = draws(program, jax.random.split(key, 8), (jnp.asarray(0.3),))
    # 64 bits, sums of eight terms
    np.testing.assert_allclose(values, 3.66336, rtol=1e-13)
    np.testing.assert_allclose(slopes, 21.7296, rtol=1e-13)


def test_one_last_flip_has_no_variance_under_mvd(x64, key):
    program = vi.expectation(lambda p: jnp.where(flip(p, "mvd") == 1, 5.0, 2.0))
    _, (slopes,) = draws(program, jax.random.split(key, 100), (jnp.asarray(0.3),))
    np.testing.assert_allclose(slopes, 3.0, rtol=1e-14)


def test_hessian_of_the_score_function(key):
    e = vi.expectation(lambda p: flip(p, "reinforce") * flip(p, "reinforce"))
    hessians = jit(jax.vmap(lambda k: jax.hessian(lambda p: e(k, p))(0.4)))(jax.random.split(key, 20_000))
    assert off(hessians, 2.0) < LIMIT


@pytest.mark.parametrize("baseline", [False, True])
def test_what_can_be_differentiated_once_never_gives_a_wrong_hessian(baseline, key):
    """MVD and leave-one-out: an error, or the right Hessian; the exact one is 2."""

    def one(p):
        if not baseline:
            return flip(p, "mvd") * flip(p, "mvd")
        d = lambda: vi.sample(vi.reinforce(dist.Bernoulli(probs=p), baseline="leave_one_out")).astype(float)  # noqa: E731
        return jnp.mean(vi.vmap(lambda: d() * d(), axis_size=2)())

    e = vi.expectation(one)
    try:
        hessians = jit(jax.vmap(lambda k: jax.hessian(lambda p: e(k, p))(0.4)))(jax.random.split(key, 20_000))
    except vi.StrategyError:
        return
    assert off(hessians, 2.0) < LIMIT


# ------------------------------------------------------------------------------------- loops, lanes, branches


def _chain(p, strategy):
    def body(c, i):
        b = flip(p * (0.5 + 0.5 * c), strategy)
        return b, b * (i + 1)

    return jnp.sum(lax.scan(body, 1.0, jnp.arange(4.0))[1]) ** 2


def _lanes(p, strategy, over):
    return jnp.sum(over(lambda q: flip(q, strategy))(p * jnp.array([1.0, 0.5, 0.8]))) ** 2


def _branch(p, strategy):
    a = flip(p, strategy)
    return lax.cond(a == 1, lambda p: 3 * flip(p * p, strategy) + 1, lambda p: p, p)


def _switch(p, strategy):
    k = vi.sample(BY[strategy](dist.Categorical(probs=jnp.stack([p / 2, 1 - p, p / 2]))))
    return lax.switch(k, [lambda p: p * p, lambda p: 3 * flip(p * p, strategy) + 1, lambda p: -p], p)


def _helper(p, strategy, wrap):
    helper = wrap(lambda q: flip(q, strategy) * (1 + q))
    return 3 * helper(p) + helper(p * p)


STRUCTURES = {
    "scan": (_chain, 32.28240, 108.68600),
    "jax.vmap": (functools.partial(_lanes, over=jax.vmap), 2.604, 6.38),
    "vi.vmap": (functools.partial(_lanes, over=vi.vmap), 2.604, 6.38),
    "batch shape": (functools.partial(_lanes, over=lambda f: f), 2.604, 6.38),
    "cond": (_branch, 1.488, 4.04),
    "switch": (_switch, 0.3 * 0.36 + 0.4 * 2.08 - 0.3 * 0.6, 3 * 0.36 / 2 - 3 * 0.36 - 1 + 0.4 * 3.6 - 0.6),
    "jit": (functools.partial(_helper, wrap=jax.jit), 3.3696, 8.664),
    "checkpoint": (functools.partial(_helper, wrap=jax.checkpoint), 3.3696, 8.664),
}


@pytest.mark.parametrize("strategy", DISCRETE)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_choices_in_loops_lanes_branches_and_helpers(structure, strategy, key):
    program, value, slope = STRUCTURES[structure]
    check(functools.partial(program, strategy=strategy), (0.6,), value, slope, key=key, n=5_000)


# ----------------------------------------------------------------------------- defects known of other libraries


def test_two_choices_do_not_share_their_noise(key):
    """genjax 0.10.3 returns exactly 0 for both derivatives."""
    program = lambda mu, nu: 0.5 * mu * (normal(mu, 1.0, "reparam") - normal(nu, 1.0, "reparam")) ** 2  # noqa: E731
    check(program, (0.7, 0.7), 0.7, 1.0, 0.0, key=key)


def test_lanes_with_equal_arguments_do_not_share_their_noise(key):
    for over in (jax.vmap, vi.vmap):

        def program(mu, over=over):
            return jnp.mean(over(lambda i: normal(mu, 1.0, "reparam"))(jnp.arange(5))) ** 2

        check(program, (0.5,), 0.45, 1.0, key=key, n=5_000)


def test_a_pathwise_draw_in_a_loop_is_fresh_in_every_turn_and_for_every_key(key):
    """genjax 1.0.13 returns one frozen number."""

    def program(mu):
        step = lambda c, _: (c + normal(mu, 1.0, "reparam"), None)  # noqa: E731
        return lax.scan(step, 0.0, None, length=3)[0] ** 2

    check(program, (0.8,), 3 + (3 * 0.8) ** 2, 18 * 0.8, key=key)


def test_the_categorical_is_differentiated_in_what_it_is_drawn_from(x64, key):
    """genjax 0.10.3 draws from the probabilities and differentiates their softmax."""
    payoff = jnp.array([1.0, 2.0, 5.0])
    e = vi.expectation(lambda p: payoff[vi.sample(vi.enum(dist.Categorical(probs=p)))])
    p = jnp.array([0.5, 0.3, 0.2])
    value, slope = jax.value_and_grad(lambda p: e(key, p))(p)
    # Only directions in the simplex count: off it, NumPyro may normalise or not.
    np.testing.assert_allclose([value, *(slope - slope[0])], [2.1, *(payoff - payoff[0])], rtol=1e-13)


def test_a_multivariate_normal_is_differentiated(x64, key):
    """genjax 0.10.3 gives 0 where 2 is right."""
    e = vi.expectation(lambda m: jnp.sum(vi.sample(vi.reparam(dist.MultivariateNormal(m, jnp.eye(2))))))
    np.testing.assert_allclose(jax.grad(lambda m: e(key, m * jnp.ones(2)))(0.3), 2.0, rtol=1e-13)


@pytest.mark.parametrize("strategy", DISCRETE)
def test_a_constant_has_its_own_value_whatever_the_lanes(strategy, key):
    """One artifact weights the combinations of lanes so that the constant 1 gives their number."""
    e = vi.expectation(lambda p: 1.0 + 0.0 * jnp.sum(flip(p * jnp.ones(4), strategy)))
    value, slope = jax.value_and_grad(lambda p: e(key, p))(0.4)
    np.testing.assert_allclose([value, slope], [1.0, 0.0], atol=1e-6)


def test_enumeration_of_lanes_is_exact(x64, key):
    """genjax 1.0.13 samples them."""
    e = vi.expectation(lambda p: jnp.sum(flip(p * jnp.array([1.0, 0.5, 0.8]), "enum")) ** 2)
    np.testing.assert_allclose(jax.value_and_grad(lambda p: e(key, p))(0.6), [2.604, 6.38], rtol=1e-13)


def test_arguments_and_gradients_are_pytrees(key):
    e = vi.expectation(lambda t, scale: scale * jnp.sum(flip(t["p"], "enum")) + normal(*t["n"], "reparam"))
    theta = {"p": jnp.array([0.2, 0.3]), "n": (0.1, 1.0)}
    gradient = jax.grad(lambda t: e(key, t, 2.0))(theta)
    assert jax.tree.structure(gradient) == jax.tree.structure(theta)
    np.testing.assert_allclose(gradient["p"], [2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(gradient["n"][0], 1.0, rtol=1e-6)


def test_batch_keeps_rows_apart(key):
    """The joint score of all rows times their joint loss has a variance that grows with their number."""
    n = 32
    e = vi.expectation(lambda p: flip(p, "reinforce"))
    together = vi.expectation(lambda p: jnp.sum(flip(p, "reinforce")) ** 2 / n)
    p = jnp.full(n, 0.4)
    apart = lambda p, k: vi.batch(e)(k, p).mean()  # noqa: E731
    keys = jax.random.split(key, 2000)
    spread = jit(jax.vmap(jax.grad(apart), (None, 0)))(p, keys).var(0).sum()
    joint = jit(jax.vmap(jax.grad(lambda p, k: together(k, p)), (None, 0)))(p, keys).var(0).sum()
    assert n * spread < joint / 10


# -------------------------------------------------------------------------------------------------- illegal uses

JUMPS = {
    "a comparison": (lambda x: jnp.where(x > 3, 1.0, 0.0), "comparison"),
    "floor": (jnp.floor, "rounding"),
    "round": (jnp.round, "rounding"),
    "sign": (jnp.sign, "comparison"),
    "an integer cast": (lambda x: x.astype(int) * 1.0, "cast"),
    "an index": (lambda x: jnp.arange(5.0)[x.astype(int)], "cast"),
    "argmax": (lambda x: jnp.argmax(jnp.stack([x, 0.5 * x + 1])) * 1.0, "argmax"),
    "a branch": (lambda x: lax.cond(x > 0, lambda: 1.0, lambda: 0.0), "comparison"),
    "a scan": (lambda x: lax.scan(lambda c, _: (jnp.floor(c), None), x, None, length=2)[0], "rounding"),
    "a helper": (lambda x: jax.jit(jnp.floor)(x), "rounding"),
}
SMOOTH = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "clip": lambda x: jnp.clip(x, -1, 1),
    "logsumexp": lambda x: jax.nn.logsumexp(jnp.stack([x, 0.0])),
    "log_softmax": lambda x: jax.nn.log_softmax(jnp.stack([x, 0.0]))[0],
    "maximum": lambda x: jnp.maximum(x, 0.5),
    "abs": jnp.abs,
    "sort": lambda x: jnp.sort(jnp.stack([x, 0.5]))[0],
    "a promise": vi.continuous(lambda x: jnp.where(x > 0, x, 2 * x)),
    "unused": lambda x: x + 0.0 * jnp.sum(jnp.zeros(3)),
}


def _use(f, strategy):
    e = vi.expectation(lambda mu: f(normal(mu, 1.0, strategy)))
    return jax.eval_shape(jax.grad(lambda mu, key: e(key, mu)), 0.3, jax.random.key(0))


@pytest.mark.parametrize("name", JUMPS)
def test_a_pathwise_draw_may_not_be_used_discontinuously(name):
    f, reason = JUMPS[name]
    with pytest.raises(vi.StrategyError, match=rf"^x: reparam is not legal.*{reason}.*legal here: .*reinforce"):
        _use(f, "reparam")
    _use(f, "reinforce")
    _use(f, "mvd")


@pytest.mark.parametrize("name", SMOOTH)
def test_a_pathwise_draw_may_be_used_continuously(name):
    _use(SMOOTH[name], "reparam")


def test_a_bare_draw_gets_a_legal_strategy():
    jump = vi.expectation(lambda mu: jnp.where(vi.sample(dist.Normal(mu, 1.0), "x") > 0, 1.0, 0.0))
    smooth = vi.expectation(lambda mu: vi.sample(dist.Normal(mu, 1.0), "x") ** 2)
    assert [s.strategy for s in smooth.sites(0.3)] == ["reparam"]
    assert next(s.strategy for s in jump.sites(0.3)) in ("mvd", "reinforce")


def test_a_draw_that_decides_a_later_probability_is_used_discontinuously():
    step = lambda x: vi.sample(dist.Bernoulli(probs=jnp.where(x > 0, 0.8, 0.2))).astype(float)  # noqa: E731
    with pytest.raises(vi.StrategyError, match="comparison"):
        _use(step, "reparam")
    _use(step, "reinforce")
    scaled = lambda x: vi.sample(dist.Bernoulli(probs=0.2 + 0.6 * (x > 0))).astype(float)  # noqa: E731
    _use(scaled, "reinforce")


def test_a_strategy_that_a_family_does_not_have():
    with pytest.raises(vi.StrategyError, match="reparam is not legal for BernoulliProbs"):
        vi.reparam(dist.Bernoulli(probs=0.3))
    with pytest.raises(vi.StrategyError, match="enum is not legal for Poisson"):
        vi.enum(dist.Poisson(2.0))
    with pytest.raises(vi.StrategyError, match="b: reparam is not legal"):
        vi.expectation(lambda p: flip(p, "enum")).with_strategies({"b": "reparam"})(jax.random.key(0), 0.3)


def test_a_moving_support_has_no_score():
    e = vi.expectation(lambda t: vi.sample(vi.reinforce(dist.Uniform(0.0, t))))
    e(jax.random.key(0), 1.0)
    with pytest.raises(vi.StrategyError, match="high"):
        jax.grad(lambda t: e(jax.random.key(0), t))(1.0)


def test_a_choice_outside_an_expectation(key):
    with pytest.raises(vi.StrategyError):
        vi.sample(dist.Normal(0.0, 1.0))
    with pytest.raises(vi.StrategyError):
        jax.jit(lambda mu: vi.sample(dist.Normal(mu, 1.0)))(0.0)


def test_a_choice_in_a_while_loop(key):
    def program(p):
        return lax.while_loop(lambda c: c < 3, lambda c: c + flip(p, "reinforce"), 0.0)

    with pytest.raises(vi.StrategyError, match="while"):
        vi.expectation(program)(key, 0.5)


def test_a_choice_that_is_differentiated_inside(key):
    with pytest.raises(vi.StrategyError):
        vi.expectation(lambda mu: jax.grad(lambda m: normal(m, 1.0, "reparam") ** 2)(mu))(key, 0.5)


def test_leave_one_out_needs_lanes(key):
    d = vi.reinforce(dist.Bernoulli(probs=0.4), baseline="leave_one_out")
    with pytest.raises(vi.StrategyError, match="lanes"):
        vi.expectation(lambda p: p * vi.sample(d))(key, 0.4)
    with pytest.raises(vi.StrategyError, match="at least 2 lanes"):
        vi.expectation(lambda p: p * vi.vmap(lambda: vi.sample(d), axis_size=1)().sum())(key, 0.4)


def test_results_that_are_no_real_scalar(key):
    with pytest.raises(ValueError, match="one real scalar"):
        vi.expectation(lambda p: flip(p * jnp.ones(2), "enum"))(key, 0.4)
    with pytest.raises(TypeError, match="Distribution"):
        vi.expectation(lambda p: vi.sample(p))(key, 0.4)


# ------------------------------------------------------------------------------------------- transformations of JAX


def everything(theta, x):
    """Every strategy, a loop, lanes and a branch."""
    b = flip(jax.nn.sigmoid(theta), "enum")
    z = normal(theta * b, 1.0, "reparam")
    c = jnp.sum(vi.vmap(lambda q: flip(q, "mvd"))(jnp.array([0.2, 0.7])))
    s = lax.scan(lambda s, i: (s + flip(0.3, "reinforce") * i, None), 0.0, jnp.arange(3.0))[0]
    r = lax.cond(b == 1, lambda: flip(0.5, "mvd"), lambda: jnp.zeros(()))
    return z * x + c + s * theta + r * x


EVERYTHING = vi.expectation(everything)


def test_no_key_is_used_twice(key):
    loss = lambda t, key: vi.batch(EVERYTHING, in_axes=(None, 0))(key, t, jnp.arange(3.0)).sum()  # noqa: E731
    with jax.debug_key_reuse(True):
        value, slope = jit(jax.value_and_grad(loss))(0.3, key)
    assert np.isfinite([value, slope]).all()


@pytest.mark.parametrize("double", [False, True])
def test_precision_is_that_of_jax(double):
    from paper_checks.harness.numerics import enable_x64

    with enable_x64(double):
        value, slope = jit(jax.value_and_grad(lambda t, key: EVERYTHING(key, t, 0.5)))(0.3, jax.random.key(3))
        assert value.dtype == slope.dtype == (jnp.float64 if double else jnp.float32)
        assert np.isfinite([value, slope]).all()


@pytest.mark.slow
def test_a_pure_function_of_key_and_arguments(x64, key):
    """The same under jit, vmap over keys and arguments, and in a scan; other keys give other draws."""
    grad = jax.value_and_grad(lambda t, k, x: EVERYTHING(k, t, x))
    keys, x = jax.random.split(key, 3), jnp.array([0.5, 1.0, 2.0])
    alone = jit(grad)
    one_by_one = np.array([alone(0.3, k, xi) for k, xi in zip(keys, x, strict=True)])
    over = np.stack(jit(jax.vmap(grad, (None, 0, 0)))(0.3, keys, x), axis=1)
    looped = np.stack(jit(lambda rows: lax.scan(lambda c, a: (c, grad(0.3, *a)), 0, rows)[1])((keys, x)), axis=1)
    np.testing.assert_allclose(over, one_by_one, rtol=1e-12)
    np.testing.assert_allclose(looped, one_by_one, rtol=1e-12)
    assert len(np.unique(one_by_one[:, 0])) == 3
    # A batch's rows are those of the keys that it splits.
    rows = jit(vi.batch(EVERYTHING, in_axes=(None, 0)))(key, 0.3, x)
    np.testing.assert_allclose(rows, one_by_one[:, 0], rtol=1e-12)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist, vi
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8

@vi.expectation
def e(theta, x):
    b = vi.sample(vi.mvd(dist.Bernoulli(logits=theta * x))).astype(float)
    z = vi.sample(vi.reparam(dist.Normal(theta * b, 1.0)))
    k = vi.sample(vi.enum(dist.Bernoulli(logits=z))).astype(float)
    return (z - x) ** 2 + k * x

loss = lambda theta, x, key: vi.batch(e, in_axes=(None, 0))(key, theta, x).mean()
x, key = jnp.linspace(-1.0, 1.0, 16), jax.random.key(0)
alone = jax.jit(jax.value_and_grad(loss))(0.3, x, key)
placed = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data")))
spread = jax.jit(jax.value_and_grad(loss))(0.3, placed, key)
np.testing.assert_allclose(spread, alone, rtol=1e-5)  # 32 bits, sums of 16 in another order
print("agree")
"""


def test_data_sharded_over_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(vi.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "agree"


# ------------------------------------------------------------------------------------------------ long programs


def test_a_chain_with_local_costs_is_summed_without_all_its_paths(x64, key):
    """Eight flips, of which each cost sees two: matrix products, not 2^8 worlds, of which there may be 16."""
    n = 8

    def program(p):
        z, total = jnp.zeros(()), 0.0
        for _ in range(n):
            after = flip(p * (0.3 + 0.5 * z), "enum")
            total, z = total + (after - 2 * z) ** 2 * p, after
        return total

    def exact(p):
        law, total = jnp.array([1.0, 0.0]), 0.0
        q = p * jnp.array([0.3, 0.8])
        step = jnp.stack([1 - q, q], axis=1)
        cost = jnp.array([[0.0, 1.0], [4.0, 1.0]]) * p
        for _ in range(n):
            total, law = total + jnp.sum(law[:, None] * step * cost), law @ step
        return total

    e = vi.expectation(program, max_worlds=16)
    found = jit(jax.value_and_grad(lambda p: e(key, p)))(0.6)
    np.testing.assert_allclose(found, jax.value_and_grad(exact)(0.6), rtol=1e-12)


def test_dependent_choices_of_all_strategies_against_enumeration(key):
    laws = lambda p, a, b, c: (p, 0.2 + 0.5 * a * p, 0.1 + 0.3 * b + 0.2 * a, 0.1 + 0.4 * c * p)  # noqa: E731
    loss = lambda p, a, b, c, d: (a + 2 * b + 3 * c * d + d) ** 2 * p  # noqa: E731

    def program(p):
        drawn = [0.0, 0.0, 0.0]
        for i, strategy in enumerate(("mvd", "enum", "mvd")):
            drawn[i] = flip(laws(p, *drawn)[i], strategy)
        return loss(p, *drawn, flip(laws(p, *drawn)[3], "reinforce"))

    def exact(p):
        total = 0.0
        for row in itertools.product((0.0, 1.0), repeat=4):
            chance = 1.0
            for x, q in zip(row, laws(p, *row[:3]), strict=True):
                chance = chance * (q if x else 1 - q)
            total = total + chance * loss(p, *row)
        return total

    value, slope = jax.value_and_grad(exact)(0.6)
    check(program, (0.6,), float(value), float(slope), key=key)


@pytest.mark.parametrize(
    "jump",
    [
        lambda x: jnp.exp(jnp.where(x > 0, -jnp.inf, 0.0)),
        lambda x: jax.nn.logsumexp(jnp.stack([jnp.where(x > 0, -jnp.inf, x), x])),
        jax.jit(lambda x: jnp.where(x > 0, 1.0, 0.0)),
    ],
    ids=["exp", "logsumexp", "named clip"],
)
def test_a_jump_is_seen_behind_infinity_and_behind_a_trusted_name(key, jump):
    """exp(-inf) is zero and hides that it came from a comparison; a user's function called clip is not JAX's."""

    def clip(x):
        return jump(x)

    with pytest.raises(vi.StrategyError, match="comparison"):
        vi.expectation(lambda m: jax.jit(clip)(vi.sample(vi.reparam(dist.Normal(m, 1.0)))))(key, 0.3)


def test_a_density_outside_its_support_shows_and_is_no_error(key):
    loss = vi.expectation(lambda m: jnp.where(vi.sample(vi.reparam(dist.Normal(m, 1.0))) > 50, -jnp.inf, m) * 2)
    assert jax.value_and_grad(loss, 1)(key, 0.3) == (jnp.float32(0.6), 2.0)


def test_lanes_without_a_draw_are_a_plain_vmap(key):
    squares = vi.vmap(lambda x: x**2)
    np.testing.assert_array_equal(squares(jnp.arange(3.0)), [0.0, 1.0, 4.0])
    assert "scan" not in str(jax.make_jaxpr(squares)(jnp.arange(3.0)))
