"""Programs as densities: `sim` and `log_density` against NumPyro's own scoring, enumeration, and loops written out."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density as numpyro_log_density

from vi import enum, expectation, mvd, random_key, reinforce, reparam, vmap
from vi.errors import AddressError, StrategyError, SupportError
from vi.programs import Trace, complete, log_density, scale_observations, sim, sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = 2e-5
"""Relative error allowed where both sides add the same float32 terms, up to about 100 of them, in another order."""

RARE = 6e-7
"""Error rate of each z-test: a normal variable beyond 5 standard deviations.  There are five figures tested so."""


def average(f, key, *args, n=1):
    """n draws of the estimate of E[f(*args)]."""
    return jax.jit(jax.vmap(lambda k: expectation(f)(k, *args)))(jax.random.split(key, n))


def assert_mean(draws, truth):
    error = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - truth) <= 5 * error + FLOAT32 * abs(truth), f"{draws.mean()} ± {error}, expected {truth}"


def by_numpyro(program, values, *args):
    """NumPyro's log density: an oracle that shares no code with ours."""
    return numpyro_log_density(handlers.seed(program, 0), args, {}, dict(values))[0]


# ---- sim and density agree, and with NumPyro ---------------------------------------------------------------------------

# One site each, given its name and a real number that depends on the sites before; returns such a number.
MENU = (
    lambda a, x: numpyro.sample(a, dist.Normal(x, 1.3)),
    lambda a, x: numpyro.sample(a, reparam(dist.Gamma(2.0, jnp.exp(x / 4)))),
    lambda a, x: numpyro.sample(a, reinforce(dist.LogNormal(x / 4, 0.5))),
    lambda a, x: numpyro.sample(a, enum(dist.Bernoulli(0.5 + 0.4 * jnp.tanh(x)))).astype(float),
    lambda a, x: numpyro.sample(a, mvd(dist.Poisson(1 + jnp.tanh(x) ** 2))).astype(float),
    lambda a, x: numpyro.sample(a, dist.Categorical(jnp.array([0.2, 0.5, 0.3]))) - 1.0,
    lambda a, x: numpyro.sample(a, dist.Normal(x, jnp.ones(2)).to_event(1)).sum(),
    lambda a, x: numpyro.sample(a, dist.MultivariateNormal(x * jnp.ones(2), jnp.eye(2))).sum(),
    lambda a, x: x + 0 * jnp.sum(numpyro.sample(a, dist.Normal(x, 1), obs=jnp.array([0.3, -0.2, 0.5]))),
    lambda a, x: numpyro.factor(a, 1 + jnp.sin(x) ** 2) or x,
)


def wrapped(kind, site):
    def run(a, x):
        if kind == "plate":
            with numpyro.plate(f"{a} plate", 3):
                return jnp.mean(site(a, x))
        if kind == "scale":
            with handlers.scale(scale=2.5):
                return site(a, x)
        if kind == "mask":
            with handlers.mask(mask=jnp.array(False)):
                return site(a, x)
        return site(a, x)

    return run


@st.composite
def programs(draw):
    names = draw(st.integers(1, 4))
    chosen = [
        wrapped(draw(st.sampled_from(["none", "none", "plate", "scale", "mask"])), MENU[draw(st.integers(0, 7))])
        for _ in range(names)
    ] + [MENU[draw(st.integers(8, 9))]]

    def program(x, skip=()):
        for i, site in enumerate(chosen):
            if i not in skip:
                x = site(f"site {i}", x)

    return program


@pytest.mark.slow
@settings(max_examples=6)
@given(program=programs(), x=st.floats(-2, 2))
def test_sim_returns_the_density_of_its_trace(program, x):
    """Also by NumPyro's scoring, with an observation or a factor in it that counts."""

    def compare(x):
        # By score functions: NumPyro's masks and range checks compare values, which a pathwise draw may not reach.
        trace, log_q = sim(program, strategy=reinforce)(x)
        truth = by_numpyro(program, dict(trace), x)
        same = jnp.maximum(jnp.abs(log_q - log_density(program)(trace, x)), jnp.abs(log_q - truth)) / (
            1 + jnp.abs(truth)
        )
        last = [site for site in sites(program)(trace, x).values() if site.is_observed]
        return jnp.where(jnp.abs(last[-1].log_prob) > 0, same, jnp.inf)

    assert expectation(compare)(jax.random.key(0), x) < FLOAT32


def model(x):
    z = numpyro.sample("z", dist.Normal(x, 2.0))
    with numpyro.plate("n", 3):
        w = numpyro.sample("w", dist.Gamma(2.0, 1.5))
    numpyro.deterministic("twice", 2 * z)
    numpyro.sample("y", dist.Normal(z, w), obs=jnp.array([0.1, 0.2, -0.4]))
    numpyro.factor("f", -(z**2))


W = jnp.array([0.5, 1.0, 1.5])
HANDLED = {
    "plain": (model, {"z": 0.3, "w": W}),
    "scale": (handlers.scale(model, scale=3.0), {"z": 0.3, "w": W}),
    "mask": (handlers.mask(model, mask=False), {"z": 0.3, "w": W}),
    "condition": (handlers.condition(model, data={"w": W}), {"z": 0.3}),
    "substitute": (handlers.substitute(model, data={"w": W}), {"z": 0.3}),
    "block": (handlers.block(model, hide=["y"]), {"z": 0.3, "w": W}),
    "reparam": (handlers.reparam(model, config={"z": LocScaleReparam(0.0)}), {"z_decentered": 0.3, "w": W}),
    "scope": (handlers.scope(model, prefix="a"), {"a/z": 0.3, "a/w": W}),
    "do": (handlers.do(model, data={"z": jnp.array(1.0)}), {"z": 0.3, "w": W}),
    "lift": (
        handlers.lift(
            lambda x: numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), 1.0)), {"m": dist.Normal(0.5, 1.0)}
        ),
        {"z": 0.3, "m": 0.2},
    ),
    "obs_mask": (
        lambda x: numpyro.sample(
            "z", dist.Normal(jnp.zeros(2), 1.0), obs=jnp.ones(2), obs_mask=jnp.array([True, False])
        ),
        {"z_unobserved": jnp.array([0.3, 0.4])},
    ),
    "sample_shape": (
        lambda x: numpyro.sample("z", dist.Normal(jnp.zeros(2), x), sample_shape=(3,)),
        {"z": jnp.ones((3, 2))},
    ),
}


@pytest.mark.parametrize("name", HANDLED)
def test_handlers_mean_what_they_mean_in_numpyro(name):
    """Around a program, and inside one; and `sim` draws exactly the addresses that NumPyro calls latent."""
    program, values = HANDLED[name]
    truth = by_numpyro(program, values, 0.7)
    assert jnp.allclose(log_density(program)(values, 0.7), truth, rtol=FLOAT32)
    assert jnp.allclose(log_density(lambda x: program(x))(Trace(values), 0.7), truth, rtol=FLOAT32)
    drawn = []

    def run(x):
        trace, log_q = sim(program)(x)
        drawn.extend(trace)
        return log_q - log_density(program)({a: v for a, v in trace.items() if a in values}, x)

    assert jnp.abs(expectation(run)(jax.random.key(1), 0.7)) < 1e-4  # terms of size 10 in float32
    # A value that a handler substitutes is part of the trace, as in NumPyro, but cannot come from two sides.
    assert set(drawn) - {"w"} == set(values) - {"w"}


def test_outer_handlers_do_not_reach_in():
    with handlers.scale(scale=5.0), handlers.seed(rng_seed=0):
        inside = log_density(model)({"z": 0.3, "w": W}, 0.7)
    assert jnp.allclose(inside, log_density(model)({"z": 0.3, "w": W}, 0.7))


def test_log_density_is_plain_code_outside_an_expectation():
    values = {"z": jnp.array(0.3), "w": W}
    gradient = jax.jit(jax.grad(lambda z: log_density(model)(values | {"z": z}, 0.7)))(0.3)
    assert jnp.allclose(gradient, jax.grad(lambda z: by_numpyro(model, values | {"z": z}, 0.7))(0.3), rtol=FLOAT32)
    with pytest.raises(StrategyError, match="outside an expectation"):
        sim(model)(0.7)


def test_density_sums_to_one():
    """Over all traces of a program without observations; with one it sums to the evidence."""

    def program(y=None):
        a = numpyro.sample("a", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Categorical(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[a]))
        _, c = scan(lambda s, _: (t := numpyro.sample("c", dist.Bernoulli(0.2 + 0.5 * s)), t), a, None, 2)
        numpyro.sample("y", dist.Bernoulli(0.1 + 0.2 * b + 0.1 * c.sum()), obs=y)

    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, (2, 3, 2, 2, 2)), indexing="ij"), -1).reshape(-1, 5)

    def score(row, observed):
        a, b, c, y = row[0], row[1], row[2:4], row[4]
        choices = {"a": a, "b": b, "c": c}
        return log_density(program)(choices, y) if observed else log_density(program)(choices | {"y": y})

    full = jnp.exp(jax.vmap(lambda row: score(row, False))(grid))
    evidence = jnp.exp(jax.vmap(lambda row: score(row, True))(grid))
    assert jnp.allclose(full.sum(), 1.0, rtol=1e-5)
    assert jnp.allclose(full, evidence, rtol=1e-6)
    assert jnp.allclose(evidence[grid[:, 4] == 1].sum() + evidence[grid[:, 4] == 0].sum(), 1.0, rtol=1e-5)


# ---- loops, branches, plates -------------------------------------------------------------------------------------------


def chain(x, reverse=False):
    def step(c, y):
        z = numpyro.sample("z", dist.Normal(c, 1.0))
        with numpyro.plate("n", 2), handlers.scale(scale=0.5):
            numpyro.sample("b", reinforce(dist.Bernoulli(0.5 + 0.3 * jnp.tanh(z))))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        return z, None

    last, _ = scan(step, x, jnp.arange(4.0), reverse=reverse)
    numpyro.sample("end", dist.Normal(last, 1.0))


def chain_by_hand(values, x, order):
    total, c = 0.0, x
    for t in order:
        total += dist.Normal(c, 1.0).log_prob(values["z"][t])
        c = values["z"][t]
        total += 0.5 * dist.Bernoulli(0.5 + 0.3 * jnp.tanh(c)).log_prob(values["b"][t]).sum()
        total += dist.Normal(c, 1.0).log_prob(1.0 * t)
    return total + dist.Normal(c, 1.0).log_prob(values["end"])


CHAIN = {"z": jnp.array([0.1, 0.5, -0.3, 2.0]), "b": jnp.array([[0, 1], [1, 1], [0, 0], [1, 0]]), "end": jnp.array(1.0)}


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_stacks_its_values_along_time(reverse, key):
    """In the order of the data, also in reverse, where NumPyro's own substitution reads them in the order of the steps."""
    order = range(3, -1, -1) if reverse else range(4)
    truth = chain_by_hand(CHAIN, 0.4, order)
    assert jnp.allclose(log_density(chain)(CHAIN, 0.4, reverse=reverse), truth, rtol=FLOAT32)
    if not reverse:
        assert jnp.allclose(by_numpyro(chain, CHAIN, 0.4), truth, rtol=FLOAT32)

    def run(x):
        trace, log_q = sim(chain)(x, reverse=reverse)
        assert {a: jnp.shape(v) for a, v in trace.items()} == {a: v.shape for a, v in CHAIN.items()}
        return log_q - jax.lax.stop_gradient(chain_by_hand(trace, x, order))

    assert jnp.abs(average(run, key, 0.4, n=8)).max() < 1e-4  # 20 terms of size 5 in float32


def test_handlers_around_a_scan_reach_its_sites():
    for around in (lambda f: handlers.scale(f, scale=2.0), lambda f: handlers.mask(f, mask=False)):
        program = around(chain)
        assert jnp.allclose(log_density(program)(CHAIN, 0.4), by_numpyro(program, CHAIN, 0.4), rtol=FLOAT32)
    scoped = {f"a/{name}": value for name, value in CHAIN.items()}
    truth = log_density(chain)(CHAIN, 0.4)
    assert jnp.allclose(log_density(handlers.scope(chain, prefix="a"))(scoped, 0.4), truth)
    fixed = handlers.condition(chain, data={"z": CHAIN["z"]})
    assert jnp.allclose(log_density(fixed)({"b": CHAIN["b"], "end": CHAIN["end"]}, 0.4), truth, rtol=FLOAT32)


def test_scans_nest(key):
    def nested(x):
        def outer(c, _):
            z = numpyro.sample("z", dist.Normal(c, 1.0))
            with handlers.scope(prefix="b"):
                s, _ = scan(lambda c, _: (t := numpyro.sample("y", dist.Normal(c, 2.0)), t), z, None, 3)
            return z + s, None

        with handlers.scope(prefix="a"):
            scan(outer, x, None, 2)

    values = {"a/z": jnp.array([0.1, 0.2]), "a/b/y": jnp.array([[0.3, 0.4, 0.5], [0.6, 0.7, 0.8]])}
    total, c = 0.0, 0.5
    for z, ys in zip(*values.values(), strict=True):
        total += dist.Normal(c, 1.0).log_prob(z) + dist.Normal(jnp.array([z, *ys[:-1]]), 2.0).log_prob(ys).sum()
        c = z + ys[-1]
    assert jnp.allclose(log_density(nested)(values, 0.5), total, rtol=FLOAT32)

    def run(x):
        trace, log_q = sim(nested)(x)
        assert trace["a/b/y"].shape == (2, 3)
        return log_q - log_density(nested)(trace, x)

    assert jnp.abs(average(run, key, 0.5, n=4)).max() < 1e-4


def branches(p):
    b = numpyro.sample("b", enum(dist.Bernoulli(p)))
    x = cond(
        b == 1,
        lambda m: numpyro.sample("x", reparam(dist.Normal(m, 1.0))),
        lambda m: numpyro.sample("x", reparam(dist.Laplace(m + 1, 2.0))),
        p,
    )
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


def test_branches_may_differ_in_family(key):
    for b, d in ((1, dist.Normal(0.3, 1.0)), (0, dist.Laplace(1.3, 2.0))):
        truth = dist.Bernoulli(0.3).log_prob(b) + d.log_prob(0.7) + dist.Normal(0.7, 1.0).log_prob(1.0)
        assert jnp.allclose(log_density(branches)({"b": b, "x": 0.7}, 0.3), truth, rtol=FLOAT32)

    def mean(p):
        return sim(branches)(p)[0]["x"]

    values, slopes = jax.jit(jax.vmap(lambda k: jax.value_and_grad(expectation(mean), 1)(k, jnp.array(0.3))))(
        jax.random.split(key, 4000)
    )
    # E x = p p + (1-p)(p+1) = 1 at every p
    assert_mean(values, 1.0)
    assert_mean(slopes, 0.0)


def test_subsampled_plates_share_their_indices(key):
    data = jnp.arange(20.0)

    def guide(m):
        with numpyro.plate("n", 20, subsample_size=5) as i:
            numpyro.sample("z", dist.Normal(m + data[i], 1.0))

    def target(m):
        with numpyro.plate("n", 20, subsample_size=5) as i:
            z = numpyro.sample("z", dist.Normal(m + data[i], 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def run(m):
        trace, log_q = sim(guide)(m)
        likelihood = 4 * dist.Normal(trace["z"], 1.0).log_prob(data[trace["n"]]).sum()
        return log_density(target)(trace, m) - log_q - likelihood

    assert jnp.abs(average(run, key, 0.5, n=8)).max() < 1e-3  # sums of size 100 in float32


def test_a_plate_of_the_model_alone_is_subsampled_without_bias(key):
    data = jnp.arange(10.0) / 5

    def target(z):
        with numpyro.plate("n", 10, subsample_size=2) as i:
            numpyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    assert_mean(
        average(lambda z: log_density(target)({}, z), key, 0.5, n=4000), dist.Normal(0.5, 1.0).log_prob(data).sum()
    )


# ---- traces, transforms, parameters ------------------------------------------------------------------------------------


def test_trace_is_a_mapping_and_a_pytree():
    trace = Trace({"b": jnp.ones(2), "a": jnp.array(3.0)}, {"a": dist.constraints.positive})
    more = trace | {"x": jnp.array(1.0)}
    assert dict(more).keys() == {"a", "b", "x"} and "x" not in trace
    assert more.supports == {"a": dist.constraints.positive} and (trace | {"a": 2.0}).supports == {}
    assert isinstance({"x": 1.0} | trace, Trace)
    assert jax.jit(lambda t: t)(trace).supports == trace.supports
    assert jax.vmap(lambda s: trace | {"a": s})(jnp.ones(3))["b"].shape == (3, 2)
    other = Trace({"a": jnp.array(1.0), "b": jnp.zeros(2)}, {"a": dist.constraints.real})
    assert jax.lax.cond(True, lambda: trace, lambda: other)["a"] == 3.0
    stacked = jax.lax.scan(lambda c, _: (c, c), trace, None, length=2)[1]
    assert stacked["b"].shape == (2, 2)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trace)] == ["['a']", "['b']"]
    with pytest.raises(TypeError):
        trace["a"] = 1.0


class OneWay(dist.transforms.AffineTransform):
    """A transform without an inverse, like a flow for fast sampling."""

    def _inverse(self, y):
        raise NotImplementedError


@pytest.mark.parametrize("in_plate", [False, True])
def test_a_flow_needs_no_inverse(in_plate, key):
    def guide(m):
        flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [OneWay(m, 2.0), dist.transforms.ExpTransform()])
        if in_plate:
            with numpyro.plate("n", 3):
                return numpyro.sample("z", reparam(flow))
        return numpyro.sample("z", reparam(flow))

    def run(m):
        trace, log_q = sim(guide)(m)
        return jnp.abs(log_q - jax.lax.stop_gradient(dist.LogNormal(m, 2.0).log_prob(trace["z"]).sum()))

    assert average(run, key, 0.3, n=8).max() < 1e-4


def test_strategy_overrules_the_program(key):
    def guide(p):
        numpyro.sample("b", enum(dist.Bernoulli(p)))

    def run(p):
        return sim(guide, strategy=reinforce)(p)[0]["b"].astype(float)

    assert set(np.unique(average(run, key, 0.3, n=100))) == {0.0, 1.0}  # enumerated, every value would be 0.3
    assert jnp.allclose(average(lambda p: sim(guide)(p)[0]["b"].astype(float), key, 0.3, n=3), 0.3)


def test_parameters_come_from_params():
    def program(x):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Normal(loc, scale))

    value = log_density(program, {"loc": 1.0, "scale": 2.0, "unused": 3.0})({"z": 0.5}, 0.0)
    assert jnp.allclose(value, dist.Normal(1.0, 2.0).log_prob(0.5))
    with pytest.raises(AddressError, match="no value for parameter 'scale'; given are 'loc'"):
        log_density(program, {"loc": 1.0})({"z": 0.5}, 0.0)
    with pytest.raises(ValueError, match=r"parameter 'scale' is -2.0, outside its constraint"):
        log_density(program, {"loc": 1.0, "scale": -2.0})({"z": 0.5}, 0.0)


def test_networks_of_numpyro_come_from_params():
    from jax.example_libraries import stax

    init, apply = stax.Dense(2)
    weights = init(jax.random.key(0), (3,))[1]

    def program(x):
        net = numpyro.module("net", (init, apply), (3,))
        numpyro.sample("z", dist.Normal(net(x), 1.0))

    x = jnp.ones(3)
    value = log_density(program, {"net$params": weights})({"z": jnp.zeros(2)}, x)
    assert jnp.allclose(value, dist.Normal(apply(weights, x), 1.0).log_prob(0.0).sum())


def test_keys_are_drawn_in_an_expectation(key):
    def noisy(x):
        keep = jax.random.bernoulli(numpyro.prng_key(), 0.25)
        numpyro.sample("y", dist.Normal(jnp.where(keep, x, 0.0), 1.0), obs=1.0)

    log_prob = dist.Normal(jnp.array([2.0, 0.0]), 1.0).log_prob(1.0)
    draws = average(lambda x: log_density(noisy)({}, x) + 0 * jax.random.normal(random_key()), key, 2.5, n=4000)
    truth = 0.25 * dist.Normal(2.5, 1.0).log_prob(1.0) + 0.75 * log_prob[1]
    assert_mean(draws, truth)


def test_complete_draws_what_the_trace_lacks(key):
    def run(x):
        trace, found = complete(model)({"z": jnp.array(0.3)}, x)
        own = [a for a, site in found.items() if not site.is_observed and a != "z"]
        assert set(trace) == {"z", "w"} and own == ["w"]
        return sum(site.log_prob for site in found.values()) - log_density(model)(trace, x)

    assert jnp.abs(average(run, key, 0.7, n=4)).max() < 1e-4


def test_observations_are_scaled():
    values = {"z": 0.3, "w": W}
    found = sites(model)(values, 0.7)
    data = sum(site.log_prob for site in found.values() if site.is_observed)
    scaled = log_density(scale_observations(model, 3.0))(values, 0.7)
    assert jnp.allclose(scaled, log_density(model)(values, 0.7) + 2 * data, rtol=FLOAT32)
    looped = log_density(scale_observations(chain, 3.0))(CHAIN, 0.4)
    data = dist.Normal(CHAIN["z"], 1.0).log_prob(jnp.arange(4.0)).sum()
    assert jnp.allclose(looped, log_density(chain)(CHAIN, 0.4) + 2 * data, rtol=FLOAT32)


def test_lanes_of_programs(key):
    """sim under vi.vmap: a trace with one row per lane, each drawn on its own."""

    def run(m):
        traces, log_q = vmap(lambda m: sim(two_sites)())(m)
        assert traces["z"].shape == (5,)
        different = jnp.abs(jnp.diff(jnp.sort(traces["z"]))).min() > 0
        return jnp.where(different, jnp.abs(log_q - jax.vmap(log_density(two_sites))(traces)).max(), jnp.inf)

    assert average(lambda m: jax.lax.stop_gradient(run(m)), key, jnp.zeros(5), n=2).max() < 1e-4


# ---- errors ------------------------------------------------------------------------------------------------------------


def two_sites(x=None):
    z = numpyro.sample("z", reinforce(dist.Normal(0.0, 1.0)))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("trace", "x", "message"),
    [
        (
            {"z": 0.1},
            None,
            r"two_sites: drawn by the program but missing from the trace: 'x' \(is its observation missing",
        ),
        ({"q": 1.0}, None, r"missing from the trace: 'z', 'x' .*; in the trace but not drawn by the program: 'q'"),
        ({"z": 0.1, "x": 1.0}, 1.0, r"in the trace although the program has a value for it: 'x'"),
        ({"z": jnp.ones(3)}, 1.0, r"value of shape \(3,\) at 'z', expected \(\)"),
    ],
)
def test_addresses_that_do_not_fit(trace, x, message):
    with pytest.raises(AddressError, match=message):
        log_density(two_sites)(trace, x)


def test_a_value_cannot_come_from_two_sides():
    with pytest.raises(AddressError, match="although the program has a value for it: 'z'"):
        log_density(handlers.substitute(two_sites, data={"z": 0.5}))({"z": 0.1}, 1.0)


def test_missing_addresses_are_named_even_if_the_program_then_fails():
    def program():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        if z == 0.0:  # what stands in for it
            raise ZeroDivisionError

    with pytest.raises(AddressError, match="missing from the trace: 'z'"):
        log_density(program)({})


def draw_z(m):
    return numpyro.sample("z", dist.Normal(m, 1.0))


LOST = {
    "vmap": lambda m: jax.vmap(draw_z)(jnp.ones(3)),
    "lax.scan": lambda m: jax.lax.scan(lambda c, a: (c, draw_z(a)), 0.0, jnp.ones(3)),
    "jit": jax.jit(draw_z),
    "checkpoint": jax.checkpoint(draw_z),
    "inside a body": lambda m: scan(lambda c, _: (jax.jit(draw_z)(c), None), m, None, 2),
}


@pytest.mark.parametrize("where", LOST)
def test_sites_where_their_values_would_be_lost(where, key):
    with pytest.raises(
        AddressError, match=r"site 'z' is inside a JAX transformation .* use numpyro.plate, scan or cond of"
    ):
        expectation(lambda m: sim(LOST[where])(m)[1])(key, 0.5)
    with pytest.raises(AddressError, match="site 'z' is inside a JAX transformation"):
        log_density(LOST[where])({"z": 0.1}, 0.5)


def with_subsample_in_a_loop(m):
    def step(c, _):
        with numpyro.plate("n", 10, subsample_size=2):
            numpyro.sample("z", dist.Normal(c, 1.0))
        return c, None

    scan(step, m, None, 3)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda m: (draw_z(m), draw_z(m)), "address 'z' is used twice"),
        (
            lambda m: scan(lambda c, _: ((draw_z(c), draw_z(c))[0], None), m, None, 2),
            "'z' is used twice in a loop or branch",
        ),
        (lambda m: handlers.block(draw_z)(m), "inside numpyro.handlers.block is missing from the density"),
        (lambda m: handlers.block(chain)(m), "inside numpyro.handlers.block is missing from the density"),
        (lambda m: numpyro.param("a", 1.0), "no value for parameter 'a'; none are given"),
        (
            lambda m: cond(m > 0, draw_z, lambda m: numpyro.sample("y", dist.Normal(m, 1.0)), m),
            r"branches of a cond must have the same addresses.*\('z' of shape \(\)\) and \('y' of shape \(\)\)",
        ),
        (
            lambda m: cond(m > 0, draw_z, lambda m: numpyro.sample("z", dist.Normal(m, jnp.ones(2))).sum(), m),
            r"with equal shapes; they have \('z' of shape \(\)\) and \('z' of shape \(2,\)\)",
        ),
        (with_subsample_in_a_loop, "plate 'n' is subsampled inside a loop or branch"),
    ],
)
def test_programs_without_a_density(program, message, key):
    with pytest.raises(AddressError, match=message):
        expectation(lambda m: sim(program)(m)[1])(key, 0.5)


def test_things_that_are_no_programs_or_traces(no_shape_checks):
    with pytest.raises(TypeError, match="program is a int, expected a function with NumPyro sites"):
        log_density(3)({}, 0.5)
    with pytest.raises(TypeError, match="trace is a float, expected a mapping from address to value as the first"):
        log_density(model)(0.5, {"z": 0.1})


R3 = jnp.ones(3)
SUPPORTS = [  # drawn, taken, whether it fits
    (dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 1.0), True),
    (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), False),
    (dist.LogNormal(0.0, 1.0), dist.Normal(0.0, 1.0), True),
    (dist.HalfNormal(1.0), dist.Gamma(1.0, 1.0), True),
    (dist.Normal(0.0, 1.0), dist.Uniform(-1e5, 1e5), False),
    (dist.Beta(1.0, 1.0), dist.Uniform(0.0, 1.0), True),
    (dist.Uniform(0.0, 1.0), dist.Beta(1.0, 1.0), True),
    (dist.Uniform(0.0, 2.0), dist.Beta(1.0, 1.0), False),
    (dist.Gamma(1.0, 1.0), dist.Beta(1.0, 1.0), False),
    (dist.Bernoulli(0.3), dist.Poisson(1.0), True),
    (dist.Poisson(1.0), dist.Bernoulli(0.3), False),
    (dist.Categorical(R3 / 3), dist.Categorical(jnp.ones(4) / 4), True),
    (dist.Categorical(jnp.ones(4) / 4), dist.Categorical(R3 / 3), False),
    (dist.Bernoulli(0.3), dist.Normal(0.0, 1.0), False),
    (dist.Normal(0.0, 1.0), dist.Poisson(1.0), False),
    (dist.Normal(R3, 1.0).to_event(1), dist.Dirichlet(R3), False),
    (dist.Dirichlet(R3), dist.Dirichlet(2 * R3), True),
    (dist.Dirichlet(R3), dist.Beta(R3, 1.0).to_event(1), True),
    (dist.MultivariateNormal(R3, jnp.eye(3)), dist.Normal(R3, 1.0).to_event(1), True),
    (dist.LogNormal(R3, 1.0).to_event(1), dist.HalfCauchy(R3).to_event(1), True),
    (dist.Uniform(R3 - 1, R3), dist.Uniform(R3 - 1, jnp.array([1.0, 1.0, 0.5])), False),
    (dist.Delta(2.0), dist.HalfNormal(1.0), True),
]


@pytest.mark.parametrize(("drawn", "taken", "fits"), SUPPORTS, ids=lambda d: type(d).__name__)
def test_supports(drawn, taken, fits):
    support = sim_support(drawn)
    value = jnp.zeros(drawn.shape(), int if taken.support.is_discrete else float)
    trace = Trace({"z": value}, {} if support is None else {"z": support})
    score = log_density(lambda: numpyro.sample("z", taken))
    if fits:
        score(trace)
    else:
        with pytest.raises(SupportError, match="'z': the guide draws"):
            score(trace)
    score(trace | {"z": value})  # a value from elsewhere is not held to a guide's support


def sim_support(d):
    """The support that sim remembers for a draw from `d`."""
    found = {}

    def run():
        found.update(sim(lambda: numpyro.sample("z", d))()[0].supports)
        return jnp.zeros(())

    expectation(run)(jax.random.key(0))
    return found.get("z")


def test_supports_are_checked_through_lanes_and_jit(key):
    def run(m):
        traces = vmap(lambda: sim(draw_z)(m)[0], axis_size=3)()
        first = jax.jit(lambda t: jax.tree.map(lambda v: v[0], t))(traces)
        return log_density(lambda: numpyro.sample("z", dist.HalfNormal(1.0)))(first)

    with pytest.raises(SupportError, match=r"draws from Real\(\), the model's support is Positive"):
        expectation(run)(key, 0.5)


# ---- genjax ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def genjax():
    if importlib.util.find_spec("genjax") is None:
        pytest.skip("genjax is not installed")
    import genjax

    return genjax


def test_generative_functions_are_programs(genjax, key):
    flip, normal = (genjax.flip, genjax.normal)

    @genjax.gen
    def inner(b):
        return normal(2.0 * b, 1.0) @ "x"

    @genjax.gen
    def guide(p):
        b = flip(p) @ "b"
        inner(b) @ "sub"

    def numpyro_model(p):
        b = numpyro.sample("b", dist.Bernoulli(p))
        with handlers.scope(prefix="sub"):
            numpyro.sample("x", dist.Normal(2.0 * b, 1.0))

    def difference(p):
        trace, log_q = sim(guide)(p)
        assert set(trace) == {"b", "sub/x"}
        return jnp.abs(log_q - log_density(numpyro_model)(trace, p)) + jnp.abs(log_q - log_density(guide)(trace, p))

    assert average(difference, key, jnp.array(0.3), n=8).max() < 1e-4
    # E[(b + x)] = 3 p, by the score function
    slopes = jax.jit(
        jax.vmap(
            lambda k: jax.grad(expectation(lambda p: (t := sim(guide)(p)[0])["b"] + t["sub/x"]), 1)(k, jnp.array(0.3))
        )
    )(jax.random.split(key, 4000))
    assert_mean(slopes, 3.0)
    with pytest.raises(AddressError, match=r"guide: drawn by the program but missing from the trace: 'sub/x'"):
        log_density(guide)({"b": jnp.array(True)}, 0.3)
    with pytest.raises(AddressError, match=r"in the trace but not drawn by the program: 'y'"):
        log_density(guide)({"b": jnp.array(True), "sub/x": jnp.array(0.0), "y": jnp.array(0.0)}, 0.3)


def test_a_helper_that_numpyro_has_run_before_is_refused_too(key):
    """JAX keeps its trace, in which the site is gone; `sim` and `log_density` must not take it for a program without one."""
    helper = jax.jit(lambda mean: numpyro.sample("z", dist.Normal(mean, 1.0)))
    with numpyro.handlers.seed(rng_seed=0):
        helper(1.0)
    for _ in range(2):
        with pytest.raises(AddressError, match="'z'"):
            expectation(lambda mean: sim(helper)(mean)[1])(key, 1.0)
        with pytest.raises(AddressError, match="'z'"):
            log_density(helper)({"z": 0.0}, 1.0)
