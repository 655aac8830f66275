"""How a random choice is differentiated: a mark on its NumPyro distribution.

`reparam`, `implicit`, `reinforce`, `enum` and `mvd` return a distribution that behaves as the one they are given and
carries the name of a gradient estimator through `expand`, `to_event`, `mask`, plates, jit, vmap and tree maps.  Nothing
is differentiated here; `split` takes the mark off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions import Distribution
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

from vi import families
from vi.errors import StrategyError

LEAVE_ONE_OUT = "leave_one_out"


class Strategy(NamedTuple):
    """An estimator: its name, and whether lanes serve each other as baselines."""

    name: str
    leave_one_out: bool = False


def reparam(d: Distribution) -> Tagged:
    """`d`, differentiated through its draw, which is a smooth function of the parameters.

    Raises TypeError if `d` is not a distribution, StrategyError if its family has no such sampler or if it carries a
    strategy already; so do all the functions here.
    """
    return _tag(d, Strategy("reparam"))


def implicit(d: Distribution) -> Tagged:
    """`d`, differentiated through its draw by the distribution function: dx/dθ = -∂F/∂θ / p."""
    return _tag(d, Strategy("implicit"))


def reinforce(d: Distribution, baseline: ArrayLike | str | None = None) -> Tagged:
    """`d`, differentiated by the score function.

    baseline  subtracted from the loss that multiplies the score, so that it must not depend on the draw: a number or an
              array that broadcasts against the elements of `d`, or "leave_one_out", the mean loss of the other lanes

    Raises ValueError for any other baseline.
    """
    if isinstance(baseline, str):
        if baseline != LEAVE_ONE_OUT:
            raise ValueError(f"reinforce: baseline is {baseline!r}; expected a number, an array or {LEAVE_ONE_OUT!r}")
        return _tag(d, Strategy("reinforce", leave_one_out=True))
    tagged = _tag(d, Strategy("reinforce"), baseline)
    if baseline is not None:
        elements, shape = families.element_shape(tagged.base_dist), jnp.shape(baseline)
        try:
            fits = jnp.broadcast_shapes(shape, elements) == elements
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"reinforce: baseline has shape {shape}; expected one that broadcasts to the elements {elements} of d"
            )
    return tagged


def enum(d: Distribution) -> Tagged:
    """`d`, summed over all its values: exact, at the price of one run for each."""
    return _tag(d, Strategy("enum"))


def mvd(d: Distribution) -> Tagged:
    """`d`, differentiated by the measure-valued derivative: reruns of the program with alternative values."""
    return _tag(d, Strategy("mvd"))


def split(d: Distribution) -> tuple[Distribution, Strategy | None, ArrayLike | None]:
    """(`d` without strategies, wherever they are inside it; the strategy; its baseline), None where there is none.

    Raises StrategyError if `d` carries two different strategies or two baselines, or one inside that is not legal for the
    whole (a reparameterised component does not make a mixture reparameterised).
    """
    found: list[Tagged] = []

    def strip(part: Distribution) -> Distribution:
        if isinstance(part, Tagged):
            found.append(part)
            return strip(part.base_dist)
        return families.map_children(part, strip)

    plain = strip(d)
    if not found:
        return plain, None, None
    if len({tagged.strategy for tagged in found}) > 1:
        names = ", ".join(sorted({_describe(tagged.strategy) for tagged in found}))
        raise StrategyError(
            f"{type(plain).__name__} carries two strategies, {names}; a choice is differentiated in one way"
        )
    baselines = [tagged.baseline for tagged in found if tagged.baseline is not None]
    if len(baselines) > 1:
        raise StrategyError(f"{type(plain).__name__} carries {len(baselines)} baselines; a choice has one")
    if not isinstance(d, Tagged):
        families.require(plain, found[0].strategy.name)
    return plain, found[0].strategy, baselines[0] if baselines else None


class Tagged(Distribution):
    """A distribution that carries a strategy and behaves as `base_dist` otherwise.  Made by the functions above.

    A pytree whose children are the distribution and the baseline; the strategy is static.
    """

    base_dist: Distribution
    strategy: Strategy
    baseline: ArrayLike | None

    def __init__(self, base_dist: Distribution, strategy: Strategy, baseline: ArrayLike | None = None) -> None:
        self.base_dist = base_dist
        self.strategy = strategy
        self.baseline = baseline

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.base_dist, self.baseline), (self.strategy,)

    @classmethod
    def tree_unflatten(cls, aux_data: tuple[Any, ...], params: tuple[Any, ...]) -> Tagged:
        tagged = cls.__new__(cls)
        tagged.base_dist, tagged.baseline = params
        (tagged.strategy,) = aux_data
        return tagged

    def __getattr__(self, name: str) -> Any:
        # Parameters (loc, probs, ...).  Private names stay here: copying asks for some before there is a base_dist.
        if name.startswith("_") or name == "base_dist":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base_dist, name)

    def __repr__(self) -> str:
        return f"{_describe(self.strategy)}({self.base_dist!r})"

    def _like(self, base_dist: Distribution) -> Tagged:
        return Tagged(base_dist, self.strategy, self.baseline)

    def expand(self, batch_shape: Sequence[int]) -> Tagged:
        return self._like(self.base_dist.expand(tuple(batch_shape)))

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Tagged:
        return self._like(self.base_dist.to_event(reinterpreted_batch_ndims))

    def mask(self, mask: Any) -> Any:  # NumPyro narrows the return type to its own wrapper
        return self._like(self.base_dist.mask(mask))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base_dist.sample(key, sample_shape=sample_shape)

    def rsample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base_dist.rsample(key, sample_shape=sample_shape)

    def sample_with_intermediates(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base_dist.sample_with_intermediates(key, sample_shape=sample_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return self.base_dist.log_prob(value, intermediates) if intermediates else self.base_dist.log_prob(value)

    def enumerate_support(self, expand: bool = True) -> Any:
        return self.base_dist.enumerate_support(expand=expand)

    def entropy(self) -> Any:
        return self.base_dist.entropy()

    def cdf(self, value: Any) -> Any:
        return self.base_dist.cdf(value)

    def icdf(self, q: Any) -> Any:
        return self.base_dist.icdf(q)

    def validate_args(self, strict: bool = True) -> None:
        self.base_dist.validate_args(strict)

    def get_args(self) -> dict[str, Any]:
        return self.base_dist.get_args()


def _delegate(name: str) -> property:
    return property(lambda self: getattr(self.base_dist, name))


# Properties, and class attributes that the base may hold on the instance.
for _name in (
    "batch_shape", "event_shape", "support", "has_rsample", "has_enumerate_support", "reparametrized_params",
    "is_discrete", "mean", "variance", "mode",
):  # fmt: skip
    setattr(Tagged, _name, _delegate(_name))


@promote_batch_shape.register
def _promote(d: Tagged) -> Tagged:
    """NumPyro's repair of batch shapes after vmap, inside the mark."""
    return d._like(promote_batch_shape(d.base_dist))


@vmap_over.register
def _axes(d: Tagged, **axes: Any) -> Tagged:
    return Tagged(vmap_over(d.base_dist, **axes), d.strategy)


def _tag(d: Any, strategy: Strategy, baseline: ArrayLike | None = None) -> Tagged:
    if not isinstance(d, Distribution):
        given = f"the class {d.__name__}" if isinstance(d, type) else f"a {type(d).__name__}"
        raise TypeError(f"{strategy.name}: d is {given}; expected a numpyro.distributions.Distribution")
    plain, earlier, _ = split(d)
    if earlier is not None:
        raise StrategyError(
            f"{strategy.name}: {type(plain).__name__} carries the strategy {_describe(earlier)} already; give it one"
        )
    families.require(plain, strategy.name)
    return Tagged(plain, strategy, baseline)


def _describe(strategy: Strategy) -> str:
    return f"{strategy.name} with leave-one-out" if strategy.leave_one_out else strategy.name
