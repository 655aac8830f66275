"""Marks on distributions: they change nothing but the name they carry, survive every rewriting, and refuse misuse."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

from vi import strategies
from vi.errors import StrategyError
from vi.strategies import Strategy, Tagged, enum, implicit, mvd, reinforce, reparam, split

pytestmark = pytest.mark.usefixtures("quick_compilation")

MARKED = [
    (reparam, dist.Normal(jnp.array([0.1, 0.2]), 1.5)),
    (implicit, dist.Gamma(jnp.array([1.1, 2.0]), 1.5)),
    (reinforce, dist.Poisson(jnp.array([1.0, 2.0]))),
    (enum, dist.Bernoulli(jnp.array([0.3, 0.6]))),
    (mvd, dist.Categorical(logits=jnp.zeros((2, 3)))),
    (reparam, dist.MultivariateNormal(jnp.zeros((2, 3)), jnp.eye(3))),
]
each = pytest.mark.parametrize(("mark", "base"), MARKED, ids=[f"{m.__name__}-{type(d).__name__}" for m, d in MARKED])


def assert_same_law(marked, base):
    """Shapes, draws and densities agree, and the mark is outermost."""
    assert isinstance(marked, Tagged)
    assert (marked.batch_shape, marked.event_shape) == (base.batch_shape, base.event_shape)
    value = base.sample(jax.random.key(0), (3,))
    np.testing.assert_array_equal(marked.sample(jax.random.key(0), (3,)), value)
    np.testing.assert_array_equal(marked.log_prob(value), base.log_prob(value))


@each
def test_behaves_as_its_base(mark, base):
    marked = mark(base)
    assert_same_law(marked, base)
    assert isinstance(marked, dist.Distribution)
    assert (marked.has_rsample, marked.has_enumerate_support) == (base.has_rsample, base.has_enumerate_support)
    assert (marked.is_discrete, marked.event_dim, marked.shape((4,))) == (
        base.is_discrete,
        base.event_dim,
        base.shape((4,)),
    )
    assert type(marked.support) is type(base.support)
    assert marked.reparametrized_params == base.reparametrized_params
    np.testing.assert_array_equal(marked.mean, base.mean)
    np.testing.assert_array_equal(marked.variance, base.variance)
    np.testing.assert_array_equal(marked(rng_key=jax.random.key(1)), base(rng_key=jax.random.key(1)))
    value, intermediates = marked.sample_with_intermediates(jax.random.key(0), (3,))
    np.testing.assert_array_equal(marked.log_prob(value, intermediates), base.log_prob(value))
    if base.has_rsample:
        np.testing.assert_array_equal(marked.rsample(jax.random.key(1)), base.rsample(jax.random.key(1)))
    if base.has_enumerate_support:
        np.testing.assert_array_equal(marked.enumerate_support(), base.enumerate_support())


def test_cdf_quantile_entropy_and_parameters_are_the_base_s():
    base = dist.Normal(jnp.array([0.1, 0.2]), 1.5)
    marked = reparam(base)
    np.testing.assert_array_equal(marked.cdf(0.3), base.cdf(0.3))
    np.testing.assert_array_equal(marked.icdf(0.3), base.icdf(0.3))
    np.testing.assert_array_equal(marked.entropy(), base.entropy())
    np.testing.assert_array_equal(marked.loc, base.loc)
    assert marked.get_args().keys() == base.get_args().keys()
    with pytest.raises(AttributeError):
        _ = marked.probs
    with pytest.raises(NotImplementedError):
        dist.Distribution.cdf(reinforce(dist.Bernoulli(0.3)).base_dist, 0)


REWRITINGS = {
    "expand": lambda d: d.expand((3, 2)),
    "expand a list": lambda d: d.expand([3, 2]),
    "expand_by": lambda d: d.expand_by((3,)),
    "to_event": lambda d: d.to_event(1),
    "to_event of all": lambda d: d.to_event(),
    "mask": lambda d: d.mask(jnp.array([True, False])),
    "mask with a bool": lambda d: d.mask(False),
    "mask and to_event": lambda d: d.mask(jnp.array([True, False])).to_event(1).expand((4,)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "tree_map": lambda d: jax.tree.map(lambda x: x, d),
    "flatten": lambda d: jax.tree.unflatten(jax.tree.structure(d), jax.tree.leaves(d)),
    "jit": lambda d: jax.jit(lambda e: e)(d),
}


@each
@pytest.mark.parametrize("name", REWRITINGS)
def test_survives(mark, base, name):
    rewrite = REWRITINGS[name]
    marked = rewrite(mark(base))
    assert_same_law(marked, rewrite(base))
    plain, strategy, baseline = split(marked)
    assert not isinstance(plain, Tagged) and strategy == Strategy(mark.__name__) and baseline is None


@each
def test_survives_vmap(mark, base):
    """Out of vmap NumPyro's distributions keep the batch shape of one lane; its own repair and axes know the mark."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), base)
    out = jax.vmap(lambda d: mark(d))(stacked)
    assert isinstance(out, Tagged) and out.strategy.name == mark.__name__
    value = jax.vmap(lambda d, k: d.sample(k))(out, jax.random.split(jax.random.key(0)))
    assert value.shape == (2, *base.shape())
    expected = jax.vmap(lambda v: base.log_prob(v))(value)
    np.testing.assert_allclose(jax.vmap(lambda d, v: d.log_prob(v))(out, value), expected, rtol=1e-6)


def test_promotion_and_axes_of_numpyro():
    locs = jnp.arange(3.0)
    out = jax.vmap(lambda loc: reparam(dist.Normal(loc, 1.0)))(locs)
    assert promote_batch_shape(out).batch_shape == (3,)
    assert isinstance(promote_batch_shape(out), Tagged)
    d = reparam(dist.Normal(locs, jnp.ones(3)))
    axes = vmap_over(d, loc=0, scale=0)
    np.testing.assert_array_equal(jax.vmap(lambda e: e.log_prob(0.5), in_axes=(axes,))(d), d.log_prob(0.5))


def test_baselines_are_children_and_strategies_static():
    d = reinforce(dist.Bernoulli(jnp.full(3, 0.4)).to_event(1), baseline=jnp.arange(3.0))
    doubled = jax.tree.map(lambda x: 2 * x, d)
    np.testing.assert_array_equal(split(doubled)[2], [0, 2, 4])
    grads = jax.grad(lambda e: (split(e)[2] ** 2).sum())(d)
    np.testing.assert_array_equal(grads.baseline, [0, 2, 4])
    assert split(reinforce(dist.Bernoulli(0.3), "leave_one_out"))[1:] == (Strategy("reinforce", True), None)
    assert jax.tree.structure(reinforce(dist.Poisson(1.0))) != jax.tree.structure(mvd(dist.Poisson(1.0)))
    assert hash(Strategy("enum")) == hash(Strategy("enum"))
    assert split(reinforce(dist.Poisson(1.0), 3.0).expand([2]))[2] == 3.0


def test_programs_see_the_distribution():
    def program(mark):
        numpyro.sample("w", mark(dist.Normal(0.0, 1.0)))
        with numpyro.plate("data", 3), handlers.scale(scale=2.0), handlers.mask(mask=jnp.array([True, False, True])):
            numpyro.sample("z", mark(dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(1)))
        with numpyro.plate("more", 4):
            numpyro.sample("x", mark(dist.Normal(0.0, 1.0)))

    def trace(mark):
        return handlers.trace(handlers.seed(program, jax.random.key(0))).get_trace(mark)

    marked, plain = trace(reparam), trace(lambda d: d)
    for name, site in marked.items():
        if site["type"] != "sample":
            continue
        assert isinstance(site["fn"], Tagged)
        assert site["fn"].batch_shape == plain[name]["fn"].batch_shape
        assert site["scale"] == plain[name]["scale"]
        np.testing.assert_array_equal(site["value"], plain[name]["value"])
        value = site["value"]
        np.testing.assert_array_equal(site["fn"].log_prob(value), plain[name]["fn"].log_prob(value))


NESTED = {
    "Independent": lambda d: dist.Independent(d, 1),
    "Masked": lambda d: dist.MaskedDistribution(d, jnp.array([True, False])),
    "Expanded": lambda d: dist.ExpandedDistribution(d, (3, 2)),
    "Transformed": lambda d: dist.TransformedDistribution(d, transforms.ExpTransform()),
    "all": lambda d: dist.Independent(dist.ExpandedDistribution(dist.MaskedDistribution(d, False), (3, 2)), 2),
    "Tagged": lambda d: dist.Independent(d.to_event(0).expand([3, 2]), 1).mask(False),
}


@pytest.mark.parametrize("name", NESTED)
def test_split_finds_the_mark_inside(name):
    base = dist.Normal(jnp.zeros(2), 1.0)
    nest = NESTED[name]
    plain, strategy, baseline = split(nest(reinforce(base, baseline=0.5)))
    assert strategy == Strategy("reinforce") and baseline == 0.5
    expected = nest(base)
    assert type(plain) is type(expected) and not any(isinstance(x, Tagged) for x in _parts(plain))
    assert (plain.batch_shape, plain.event_shape) == (expected.batch_shape, expected.event_shape)
    value = expected.sample(jax.random.key(0))
    np.testing.assert_array_equal(plain.sample(jax.random.key(0)), value)
    np.testing.assert_array_equal(plain.log_prob(value), expected.log_prob(value))


def _parts(d):
    while isinstance(d, dist.Distribution):
        yield d
        d = getattr(d, "base_dist", None)


def test_split_of_mixtures():
    weights = dist.Categorical(logits=jnp.zeros(2))
    same = dist.MixtureSameFamily(weights, implicit(dist.Normal(jnp.zeros(2), 1.0)))
    plain, strategy, _ = split(same)
    assert strategy == Strategy("implicit") and not isinstance(plain.component_distribution, Tagged)
    general = dist.MixtureGeneral(weights, [reinforce(dist.Normal(0.0, 1.0)), reinforce(dist.Normal(1.0, 1.0))])
    plain, strategy, _ = split(general)
    assert strategy == Strategy("reinforce")
    assert not any(isinstance(c, Tagged) for c in plain.component_distributions)
    with pytest.raises(
        StrategyError, match=r"reparam is not legal for MixtureSameFamily: .*legal: implicit, reinforce"
    ):
        split(dist.MixtureSameFamily(weights, reparam(dist.Normal(jnp.zeros(2), 1.0))))
    with pytest.raises(StrategyError, match="MixtureGeneral carries two strategies, implicit, reinforce"):
        split(dist.MixtureGeneral(weights, [reinforce(dist.Normal(0.0, 1.0)), implicit(dist.Normal(1.0, 1.0))]))
    with pytest.raises(StrategyError, match="MixtureGeneral carries 2 baselines"):
        split(
            dist.MixtureGeneral(weights, [reinforce(dist.Normal(0.0, 1.0), 1.0), reinforce(dist.Normal(1.0, 1.0), 2.0)])
        )


def test_split_leaves_a_plain_distribution_alone():
    d = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    assert split(d) == (d, None, None)
    assert split(d)[0] is d


@pytest.mark.parametrize(
    ("mark", "d", "words"),
    [
        (
            reparam,
            dist.Bernoulli(0.3),
            "reparam is not legal for BernoulliProbs: its draw is not a differentiable function",
        ),
        (reparam, dist.Bernoulli(0.3), "legal: enum, mvd, reinforce"),
        (reparam, dist.VonMises(0.0, 1.0), "reparam is not legal for VonMises"),
        (implicit, dist.Poisson(1.0), "implicit is not legal for Poisson: it has no distribution function"),
        (enum, dist.Normal(0.0, 1.0), "enum is not legal for Normal: its support is not a finite list"),
        (enum, dist.Poisson(1.0), "enum is not legal for Poisson"),
        (mvd, dist.Laplace(0.0, 1.0).to_event(0), "mvd is not legal for Laplace: no decomposition"),
        (
            reinforce,
            dist.Delta(1.0),
            "reinforce is not legal for Delta: it has no log density to differentiate; legal: reparam",
        ),
        (reinforce, dist.ImproperUniform(constraints.real, (), ()), "ImproperUniform: .*; legal: none"),
        (reparam, mvd(dist.Normal(0.0, 1.0)), "reparam: Normal carries the strategy mvd already"),
        (
            enum,
            reinforce(dist.Bernoulli(0.3), "leave_one_out"),
            "carries the strategy reinforce with leave-one-out already",
        ),
        (mvd, dist.Independent(mvd(dist.Poisson(jnp.ones(2))), 1), "mvd: Independent carries the strategy mvd already"),
    ],
)
def test_what_can_never_be_is_refused_at_once(mark, d, words):
    with pytest.raises(StrategyError, match=words):
        mark(d)


def test_what_is_not_a_distribution_is_named(no_shape_checks):
    for mark in (reparam, implicit, reinforce, enum, mvd):
        with pytest.raises(
            TypeError, match=f"{mark.__name__}: d is a float; expected a numpyro.distributions.Distribution"
        ):
            mark(0.3)
        with pytest.raises(TypeError, match=f"{mark.__name__}: d is the class Normal; expected"):
            mark(dist.Normal)


def test_baselines_are_checked():
    d = dist.Bernoulli(jnp.full((2, 3), 0.3)).to_event(1)
    with pytest.raises(ValueError, match="baseline is 'loo'; expected a number, an array or 'leave_one_out'"):
        reinforce(d, "loo")
    message = "baseline has shape (4,); expected one that broadcasts to the elements (2, 3) of d"
    with pytest.raises(ValueError, match=re.escape(message)):
        reinforce(d, jnp.zeros(4))
    with pytest.raises(ValueError, match=re.escape("baseline has shape (5, 2, 3)")):
        reinforce(d, jnp.zeros((5, 2, 3)))
    for fits in (1, 0.5, jnp.zeros(3), jnp.zeros((2, 1)), np.zeros((2, 3))):
        assert split(reinforce(d, fits))[2] is fits


def test_repr_names_the_strategy():
    assert repr(enum(dist.Bernoulli(0.3))).startswith("enum(<numpyro")
    assert strategies.LEAVE_ONE_OUT == "leave_one_out"
