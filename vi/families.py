"""What each family of distributions can do for a gradient estimator: draws, scores, supports, signed decompositions.

Everything here takes a plain NumPyro distribution, without a strategy.  Its *elements* are its independent choices: the
batch dimensions and those that `to_event` reinterprets, seen through `expand` and `mask` (the draw of a masked
distribution follows the unmasked law).  A value has shape elements + event, with the event of the innermost family.

Estimators are legal by family (`legal`) and then by parameter: a parameter whose gradient an estimator cannot give
passes through an identity that raises `StrategyError` when it is differentiated.  Nobody who does not ask for that
gradient sees the error, and nobody who asks gets a zero.

Source: Lew, Huot, Staton, Mansinghka, ADEV (POPL 2023) for the estimators; the signed decompositions of the
exponential, gamma, geometric, binomial and uniform families are derived beside their rules.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Key, Shaped
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, PowerTransform, Transform

from vi.errors import StrategyError

ENUM_LIMIT = 16  # up to this many values a sum over the support is the first choice
WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)

Rule = Callable[[Any, Array, Array], tuple[list[Array], list[Array]]]


def _named(**table: Any) -> dict[type[Distribution], Any]:
    """The table keyed by class, without the families that the installed NumPyro does not have."""
    return {getattr(dist, name): entry for name, entry in table.items() if hasattr(dist, name)}


# Samplers that draw through jax.random.gamma, whose derivative JAX takes from the distribution function.
_IMPLICIT = _named(
    Gamma=True, Chi2=True, Beta=True, BetaProportion=True, Dirichlet=True, StudentT=True, MultivariateStudentT=True,
    LKJCholesky=True, WishartCholesky=True, InverseWishartCholesky=True,
)  # fmt: skip
# Parameters on which the support depends: the score function misses what moves with its edge.
_EDGES = _named(
    Uniform=("low", "high"),
    DiscreteUniform=("low", "high"),
    LeftTruncatedDistribution=("low",),
    RightTruncatedDistribution=("high",),
    TwoSidedTruncatedDistribution=("low", "high"),
    LeftTruncatedGamma=("low",),
    RightTruncatedGamma=("high",),
    TwoSidedTruncatedGamma=("low", "high"),
    LowerTruncatedPowerLaw=("low",),
    DoublyTruncatedPowerLaw=("low", "high"),
    Levy=("loc",),
)
# A draw from these is not a choice with a density: improper, a point, a factor, an observation's likelihood.
_NO_DENSITY = _named(
    ImproperUniform=True, Delta=True, Unit=True,
    LeftCensoredDistribution=True, RightCensoredDistribution=True, IntervalCensoredDistribution=True,
)  # fmt: skip
# An angle jumps from π to -π as its location moves, so its draw is not a continuous function of the location.
_JUMPS = _named(VonMises=True)
# Parameters in which JAX cannot differentiate the distribution function (the incomplete beta function's shapes).
_NO_CDF_GRADIENT = _named(
    Beta=("concentration1", "concentration0"), BetaProportion=("concentration1", "concentration0"), StudentT=("df",)
)  # fmt: skip
# Their cdf is that of the unfolded distribution.
_WRONG_CDF = _named(FoldedDistribution=True)

_LOGITS = _named(BernoulliLogits=True, BinomialLogits=True)
_PARAMETRIZED_BY_LOGITS = _named(BernoulliLogits=True, CategoricalLogits=True)

_WHY = {
    "reparam": "its draw is not a differentiable function of its parameters",
    "implicit": "it has no distribution function that can be differentiated",
    "enum": "its support is not a finite list of values known when the program is traced",
    "mvd": "no decomposition of its derivative into two distributions is known here",
    "reinforce": "it has no log density to differentiate",
}


def innermost(d: Distribution) -> Distribution:
    """The family inside `to_event`, `expand` and `mask`; its parameters broadcast against the elements from the right."""
    while isinstance(d, WRAPPERS):
        d = d.base_dist
    return d


def element_shape(d: Distribution) -> tuple[int, ...]:
    """The shape of the independent choices of `d`: its batch shape and the dimensions reinterpreted by `to_event`."""
    shape = tuple(d.shape())
    return shape[: len(shape) - innermost(d).event_dim]


def legal(d: Distribution) -> tuple[str, ...]:
    """The strategies that the family of `d` has, best first, before any look at how the draw is used.

    Where legality depends on the parameter (the concentration of a Gamma under "mvd", the ends of a Uniform under
    "reinforce") the strategy is listed, and the gradient in that parameter raises StrategyError.
    """
    core = innermost(d)
    kind = type(core)
    if kind is dist.Delta:
        return ("reparam",)
    if kind in _NO_DENSITY:
        return ()
    mvd = ("mvd",) if kind in _DECOMPOSITIONS else ()
    if _is_discrete(core):
        values = _enumerated(core)
        if values is None:
            return (*mvd, "reinforce")
        if len(values) <= ENUM_LIMIT:
            return ("enum", *mvd, "reinforce")
        return ("reinforce", "enum", *mvd) if kind in _BY_SUPPORT else (*mvd, "reinforce", "enum")
    path = _has_path(core)
    if path and _samples_implicitly(core):
        return ("implicit", "reparam", "reinforce", *mvd)
    cdf = ("implicit",) if _has_cdf(core) else ()
    return (*(("reparam",) if path else ()), *cdf, *mvd, "reinforce")


def require(d: Distribution, strategy: str) -> None:
    """Raises StrategyError, naming the family and what is legal for it, unless it has this strategy."""
    allowed = legal(d)
    if strategy not in allowed:
        raise StrategyError(
            f"{strategy} is not legal for {_name(innermost(d))}: {_WHY[strategy]}; legal: {', '.join(allowed) or 'none'}"
        )


def draw(d: Distribution, key: Key[Array, ""]) -> Shaped[Array, "*elements_and_event"]:
    """A draw without a gradient."""
    core = jax.tree.map(lambda x: lax.stop_gradient(x) if isinstance(x, jax.core.Tracer) else x, innermost(d))
    return lax.stop_gradient(jnp.asarray(_sample(core, d, key)))


def pathwise(d: Distribution, key: Key[Array, ""]) -> Float[Array, "*elements_and_event"]:
    """A draw that is a differentiable function of the parameters (reparameterisation).

    Raises StrategyError if the family has none; the gradient in a parameter that NumPyro does not list as
    reparameterised raises it too.
    """
    require(d, "reparam")
    return jnp.asarray(_sample(_pathwise(innermost(d), "reparam"), d, key))


def implicit_draw(d: Distribution, key: Key[Array, ""]) -> Float[Array, "*elements_and_event"]:
    """A draw x with dx/dθ = -∂F(x; θ)/∂θ / p(x; θ) (implicit reparameterisation; Figurnov, Mohamed, Mnih 2018).

    JAX's samplers do this themselves for the gamma, beta, Dirichlet and Student families; any other continuous univariate
    family with a distribution function and a density, mixtures included, is differentiated by the rule.
    """
    require(d, "implicit")
    core = innermost(d)
    if _samples_implicitly(core):
        return jnp.asarray(_sample(_pathwise(core, "implicit"), d, key))
    return _on_level_set(_guard_children(core, _NO_CDF_GRADIENT, "implicit"), draw(d, key))


@jax.custom_jvp
def _on_level_set(d: Distribution, x: Array) -> Array:
    """x as the function of the parameters of `d` along which F(x; θ) stays where it is; differentiable again and again."""
    return x


def _on_level_set_jvp(primals: Any, tangents: Any) -> Any:
    d, x = primals
    moved = _on_level_set(d, x)
    leaves, structure = jax.tree.flatten(d)
    # Some distribution functions have derivatives in a few of their parameters only.
    given = jax.tree.leaves(tangents[0], is_leaf=lambda t: isinstance(t, SymbolicZero))
    varied = {k: t for k, t in enumerate(given) if not isinstance(t, SymbolicZero)}

    def cdf(*values: Array) -> Array:
        new = dict(zip(varied, values, strict=True))
        return jax.tree.unflatten(structure, [new.get(k, leaf) for k, leaf in enumerate(leaves)]).cdf(moved)

    _, cdf_dot = jax.jvp(cdf, tuple(leaves[k] for k in varied), tuple(varied.values()))
    return moved, -cdf_dot / jnp.exp(d.log_prob(moved))


_on_level_set.defjvp(_on_level_set_jvp, symbolic_zeros=True)


def log_prob(d: Distribution, value: Shaped[Array, "*elements_and_event"]) -> Float[Array, "*elements"]:
    """The log density of each element, unmasked; differentiating it in an edge of the support raises StrategyError."""
    return jnp.broadcast_to(_log_prob(innermost(d), value), element_shape(d))


def density(d: Distribution, value: Any, *intermediates: Any) -> Array:
    """The log density as NumPyro's `log_prob` gives it, masked and summed over events, with the right derivative in logits
    that are zero.  `intermediates` are those of a transformed distribution."""
    if type(innermost(d)) not in _LOGITS:
        return d.log_prob(value, *intermediates)
    if isinstance(d, dist.Independent):
        inner = density(d.base_dist, value)
        return inner.sum(tuple(range(-d.reinterpreted_batch_ndims, 0)))
    if isinstance(d, dist.MaskedDistribution):
        return jnp.where(d._mask, density(d.base_dist, value), 0.0)
    if isinstance(d, dist.ExpandedDistribution):
        inner = density(d.base_dist, value)
        return jnp.broadcast_to(inner, jnp.broadcast_shapes(inner.shape, d.batch_shape))
    return _smooth_in_logits(d, jnp.asarray(value), d)


def support(d: Distribution) -> tuple[Shaped[Array, "K *elements_and_event"], Float[Array, "K *elements"]]:
    """All values that an element can take, and their probabilities, for families with a finite support."""
    require(d, "enum")
    core, elements = innermost(d), element_shape(d)
    listed = _enumerated(core)
    assert listed is not None
    values = listed.reshape((len(listed),) + (1,) * len(elements) + core.event_shape)
    values = jnp.broadcast_to(values, (len(listed), *elements, *core.event_shape))
    return values, jnp.broadcast_to(_probability(core, values), (len(listed), *elements))


def _probability(core: Any, value: Array) -> Array:
    """The probability of a value of a discrete family.  At probabilities of 0 and 1 the logarithm, which NumPyro clips, has
    no derivative, and the probability has."""
    if type(core) is dist.BernoulliProbs:
        return jnp.where(value == 1, core.probs, 1 - core.probs)
    if type(core) is dist.CategoricalProbs:
        shape = jnp.broadcast_shapes(value.shape, core.batch_shape)
        probs = jnp.broadcast_to(core.probs, (*shape, core.probs.shape[-1]))
        return jnp.take_along_axis(probs, jnp.broadcast_to(value, shape)[..., None], -1)[..., 0]
    return jnp.exp(_log_prob(core, value))


def alternatives(
    d: Distribution, value: Shaped[Array, "*elements_and_event"], key: Key[Array, ""]
) -> tuple[Shaped[Array, "A *elements_and_event"], Float[Array, "A *elements"]]:
    """Alternatives to each element of a draw, and their weights, for the measure-valued derivative.

    The weights are zero and carry the gradient: d/dθ E f = E Σ_a (f(alternative_a) - f(value)) dw_a/dθ.  The
    alternatives carry none.  Raises StrategyError if the family has no rule; so does the gradient in a parameter that
    the rule leaves out.
    """
    require(d, "mvd")
    core, elements = innermost(d), element_shape(d)
    value = lax.stop_gradient(value)
    values, weights = _DECOMPOSITIONS[type(core)](core, value, key)
    return (
        lax.stop_gradient(jnp.stack([jnp.broadcast_to(v, value.shape).astype(value.dtype) for v in values])),
        jnp.stack([jnp.broadcast_to(w, elements) for w in weights]),
    )


# --- signed decompositions: (values, weights) with dE f/dθ = E Σ_a (f(value_a) - f(value)) dw_a/dθ ---


def _zero(x: Array) -> Array:
    """Zero, with the gradient of x."""
    return x - lax.stop_gradient(x)


def zero_valued(probability: Array, d: Distribution) -> Array:
    """Zero, with the gradient of a probability of `d`.

    Infinite logits have no gradient.  It is taken out here, since a result that is infinite at a value that is never drawn
    would make 0 · ∞ of it.
    """
    if type(innermost(d)) not in _PARAMETRIZED_BY_LOGITS:
        return _zero(probability)
    certain = (probability == 0) | (probability == 1)
    return _zero(jnp.where(certain, lax.stop_gradient(probability), probability))


def _flip(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """f(1) - f(0) is the derivative in p, whichever was drawn."""
    probs = jnp.asarray(d.probs)
    sign = jnp.where(value == 1, -1, 1).astype(probs.dtype)
    return [1 - value], [sign * zero_valued(probs, d)]


def _by_support(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """Σ_k f(k) dp_k; the subtracted f(value) Σ_k dp_k vanishes on the simplex."""
    listed = _enumerated(d)
    assert listed is not None
    values = listed.reshape((len(listed),) + (1,) * value.ndim)
    return list(values), [zero_valued(_probability(d, jnp.broadcast_to(v, value.shape)), d) for v in values]


def _normal(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """Mean: a pair of Weibull variables w of shape 2 and scale √2, at ±w, over σ√(2π).  Scale: a double-sided Maxwell.

    With one exponential variable e, √(2e) has the Weibull law, and sign(z) √(z² + 2e) the Maxwell law (χ²₃ is χ²₁ plus
    χ²₂) for the standardised draw z: the closer the alternative is to the draw, the less f(alternative) - f(draw) varies.
    """
    loc, scale = lax.stop_gradient((d.loc, d.scale))
    excess = 2 * jax.random.exponential(key, value.shape, value.dtype)
    z = (value - loc) / scale
    weibull = jnp.sqrt(excess)
    maxwell = jnp.where(z < 0, -1, 1) * jnp.sqrt(z**2 + excess)
    by_loc = _zero(jnp.asarray(d.loc)) / (scale * jnp.sqrt(jnp.asarray(2 * jnp.pi, value.dtype)))
    return (
        [loc + scale * weibull, loc - scale * weibull, loc + scale * maxwell],
        [by_loc, -by_loc, _zero(jnp.asarray(d.scale)) / scale],
    )


def _uniform(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """(high - low) E f is an integral between the ends, so that dE f/dhigh = (f(high) - E f) / (high - low)."""
    low, high = jnp.asarray(d.low), jnp.asarray(d.high)
    width = lax.stop_gradient(high - low)
    return [low, high], [-_zero(low) / width, _zero(high) / width]


def _poisson(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """d/dλ of e^-λ λ^x / x! is the probability of x - 1 less that of x."""
    return [value + 1], [_zero(jnp.asarray(d.rate))]


def _exponential(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """d/dλ of λ e^-λx is (λ e^-λx - λ² x e^-λx) / λ: Exponential less Gamma(2), the sum of two exponentials."""
    return _longer(value, d.rate, 1, key)


def _gamma(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """d/db of b^a x^(a-1) e^-bx / Γ(a) is (a / b) (Gamma(a, b) - Gamma(a + 1, b)); the sum with Exp(b) is Gamma(a + 1, b)."""
    guarded = _guard(d, ("concentration",), "mvd")
    concentration = jnp.asarray(guarded.concentration)
    values, weights = _longer(value, d.rate, lax.stop_gradient(jnp.asarray(d.concentration)), key)
    # The concentration enters with derivative one, so that asking for its gradient meets the guard.
    return values, [w + _zero(concentration) for w in weights]


def _longer(value: Array, rate: Any, shape: Any, key: Array) -> tuple[list[Array], list[Array]]:
    rate = jnp.asarray(rate)
    more = jax.random.exponential(key, value.shape, value.dtype) / lax.stop_gradient(rate)
    return [value + more], [-shape * _zero(rate) / lax.stop_gradient(rate)]


def _geometric(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """With q = 1 - p, d/dq of p q^n is (n p² q^(n-1) - p q^n) / p, and n p² q^(n-1) is the law of value + 1 + another."""
    probs = jnp.asarray(d.probs)
    u = jax.random.uniform(key, value.shape, probs.dtype)
    p = lax.stop_gradient(probs)
    other = jnp.floor(jnp.log1p(-u) / jnp.log1p(-p)).astype(value.dtype)
    return [value + 1 + other], [-_zero(probs) / p]


def _binomial(d: Any, value: Array, key: Array) -> tuple[list[Array], list[Array]]:
    """d/dp E f = n E[f(y + 1) - f(y)] with y of n - 1 trials: drop one trial of the draw, at random or on average."""
    probs, n = jnp.asarray(d.probs), d.total_count
    # At the ends the weight is zero; the clip keeps the value inside the support.
    return (
        [jnp.maximum(value - 1, 0), jnp.minimum(value + 1, n)],
        [-value * _zero(probs), (n - value) * _zero(probs)],
    )


_DECOMPOSITIONS: dict[type[Distribution], Rule] = _named(
    BernoulliProbs=_flip,
    BernoulliLogits=_flip,
    CategoricalProbs=_by_support,
    CategoricalLogits=_by_support,
    OrderedLogistic=_by_support,
    Normal=_normal,
    Uniform=_uniform,
    Poisson=_poisson,
    Exponential=_exponential,
    Gamma=_gamma,
    GeometricProbs=_geometric,
    GeometricLogits=_geometric,
    BinomialProbs=_binomial,
    BinomialLogits=_binomial,
)
_BY_SUPPORT = frozenset(kind for kind, rule in _DECOMPOSITIONS.items() if rule is _by_support)


# --- the structure of NumPyro's distributions ---


def _name(d: Distribution) -> str:
    return type(d).__name__


def _sample(core: Distribution, d: Distribution, key: Array) -> Any:
    return core.expand(element_shape(d)).sample(key)


def fields(d: Distribution) -> dict[str, Any]:
    """What `d` holds as a pytree: parameters, transforms and distributions, by name."""
    return dict(zip(type(d).gather_pytree_data_fields(), d.tree_flatten()[0], strict=True))


def replace(d: Distribution, new: dict[str, Any]) -> Any:
    """`d` with some of its fields replaced; what it had computed from the old ones is forgotten."""
    children, static = d.tree_flatten()
    names = type(d).gather_pytree_data_fields()
    return type(d).tree_unflatten(static, tuple(new.get(n, c) for n, c in zip(names, children, strict=True)))


def map_children(d: Distribution, f: Callable[[Distribution], Any]) -> Any:
    """`d` with `f` applied to each distribution it holds; `d` itself if none changes."""
    new: dict[str, Any] = {}
    for name, field in fields(d).items():
        if isinstance(field, Distribution):
            changed = f(field)
            if changed is not field:
                new[name] = changed
        elif isinstance(field, list | tuple) and field and all(isinstance(x, Distribution) for x in field):
            mapped = [f(x) for x in field]
            if any(a is not b for a, b in zip(mapped, field, strict=True)):
                new[name] = type(field)(mapped)
    return replace(d, new) if new else d


def _barrier(x: Any, message: str) -> Any:
    """x, whose derivative raises StrategyError; what is not traced has no derivative."""
    if not isinstance(x, jax.core.Tracer) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x

    @jax.custom_jvp
    def identity(y: Array) -> Array:
        return y

    @identity.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise StrategyError(message)

    return identity(x)


def _guard(d: Distribution, names: tuple[str, ...], strategy: str) -> Any:
    """`d` with a barrier before each of these parameters."""
    held = fields(d)
    new = {}
    for name in names:
        if held.get(name) is not None:
            message = f"{strategy} has no rule for the gradient of {_name(d)} in {name}" + (
                ", on which its support depends" if name in _EDGES.get(type(d), ()) else ""
            )
            new[name] = jax.tree.map(lambda x, m=message: _barrier(x, m), held[name])
    return replace(d, new) if new else d


def _guard_children(d: Distribution, table: dict[type[Distribution], tuple[str, ...]], strategy: str) -> Any:
    """`d` with the parameters of the table behind barriers, in itself and in all that it is made of."""
    inner = map_children(d, lambda child: _guard_children(child, table, strategy))
    return _guard(inner, table.get(type(d), ()), strategy)


def _has_path(d: Distribution) -> bool:
    """Whether the sampler of `d`, and of all that it is made of, is differentiable."""
    if type(d) is dist.Delta:
        return True
    if type(d) in _JUMPS or type(d) in _NO_DENSITY:
        return False
    parts = [field for field in fields(d).values() if isinstance(field, Distribution)]
    return bool(_is_made_of_another(d) or d.reparametrized_params) and all(map(_has_path, parts))


def _pathwise(d: Distribution, strategy: str) -> Any:
    """`d` with the parameters that its sampler does not differentiate behind barriers."""
    inner = map_children(d, lambda child: _pathwise(child, strategy))
    if _is_made_of_another(d):
        return inner
    fixed = tuple(name for name in type(d).arg_constraints if name not in d.reparametrized_params)
    return _guard(inner, fixed, strategy)


def _is_made_of_another(d: Distribution) -> bool:
    return isinstance(d, (dist.TransformedDistribution, *WRAPPERS))


def _samples_implicitly(d: Distribution) -> bool:
    return _samples_implicitly(d.base_dist) if _is_made_of_another(d) else type(d) in _IMPLICIT


def _is_discrete(d: Distribution) -> bool:
    try:
        return bool(d.is_discrete)
    except NotImplementedError:  # a support that is only known from the values
        return False


def _enumerated(d: Distribution) -> Array | None:
    if not d.has_enumerate_support:
        return None
    try:
        return jnp.asarray(d.enumerate_support(expand=False))
    except (NotImplementedError, AttributeError, TypeError):  # infinite, uneven over the batch, or of a traced size
        return None


def _has_cdf(d: Distribution) -> bool:
    if d.event_dim or type(d) in _WRONG_CDF:
        return False
    try:
        shape = jax.eval_shape(d.cdf, jnp.zeros(d.batch_shape))
    except (NotImplementedError, AttributeError, TypeError):
        return False
    return shape.shape == d.batch_shape


# --- supports that move ---


def _log_prob(core: Any, value: Array) -> Array:
    return _smooth_in_logits(core, value, _scored(core))


def _smooth_in_logits(core: Any, value: Array, scored: Any) -> Array:
    """NumPyro writes log(1 + e^x) with a kink at x = 0, where the derivative that comes out is 0 and not 1/2: wrong at the
    logits that most programs start from."""
    if type(core) is dist.BernoulliLogits:
        return _bernoulli(core, value)
    log_prob = scored.log_prob(value)
    if type(core) is dist.BinomialLogits:
        smooth = value * core.logits - core.total_count * jax.nn.softplus(core.logits)
        return lax.stop_gradient(log_prob) + _zero(smooth)
    return log_prob


def _bernoulli(d: Any, value: Array) -> Array:
    """x l - log(1 + e^l) for logits l.  -|l| is written so that its slope at zero is 0, as that of max(l, 0) is 1/2."""
    known = jnp.isfinite(d.logits)
    logits = jnp.where(known, d.logits, 0.0)
    positive = jnp.maximum(logits, 0.0)
    inside = value * logits - positive - jnp.log1p(jnp.exp(logits - 2 * positive))
    certain = jnp.where((d.logits > 0) == (value > 0), 0.0, -jnp.inf)
    log_prob = jnp.where(known, inside, jnp.where(jnp.isnan(d.logits), d.logits, certain))
    return jnp.where(d.support(value), log_prob, -jnp.inf) if d._validate_args else log_prob


def _scored(d: Distribution) -> Any:
    """`d` with the parameters on which its support depends behind barriers."""
    inner = map_children(d, _scored)
    if isinstance(d, dist.TransformedDistribution):
        return replace(inner, {"transforms": _scored_transforms(inner)})
    if type(d) not in _EDGES and not type(d).__module__.startswith("numpyro.") and _is_traced(d.support):
        return _guard(inner, tuple(type(d).arg_constraints), "reinforce")
    return _guard(inner, _EDGES.get(type(d), ()), "reinforce")


def _scored_transforms(d: Any) -> list[Transform]:
    """The transforms of `d`, with barriers before the parameters that move the image of the base's support.

    All of the real line (or space) stays where it is under a bijection of it; the positive half-line stays under scaling
    and powers.  Any other set moves with every parameter.
    """
    image = _whole_or_half(d.base_dist.support)
    message = f"reinforce has no rule for the gradient of {_name(d)} in its {{}}, on which its support depends"
    guarded = []
    for t in _flat(d.transforms):
        free = image == "whole" and not _is_traced(t.codomain)
        if isinstance(t, PowerTransform) and image == "half":
            guarded.append(t)
        elif isinstance(t, AffineTransform) and image == "half":
            loc = _barrier(t.loc, message.format("AffineTransform's loc"))
            guarded.append(AffineTransform(loc, t.scale, domain=t.domain))
            image = "other"
        else:
            m = message.format(type(t).__name__)
            guarded.append(t if free else jax.tree.map(lambda x, m=m: _barrier(x, m), t))
            image = _whole_or_half(t.codomain) if image == "whole" else "other"
    return guarded


def _flat(transforms: list[Transform]) -> list[Transform]:
    return [p for t in transforms for p in (_flat(t.parts) if isinstance(t, ComposeTransform) else [t])]


def _whole_or_half(constraint: Any) -> str:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if type(constraint) is type(constraints.real):
        return "whole"
    return "half" if type(constraint) is type(constraints.positive) else "other"


def _is_traced(constraint: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(constraint))
