"""What a random choice can be asked for: draws, scores, supports, alternatives.

A rule is the static half of a choice; its parameters, the leaves, are arrays.  Every function here is about one choice
without lanes; `vi.surrogate` maps it over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.distributions import Distribution

from vi import families, jaxpr, strategies
from vi.strategies import Strategy

Values = tuple[jax.Array, ...]  # what one choice returns
PATHWISE = ("reparam", "implicit")


@dataclass(frozen=True, eq=False)
class DistributionRule:
    """A draw from a NumPyro distribution.  leaves: those of the distribution, then the baseline if there is one."""

    label: str
    strategy: Strategy | None
    structure: Any
    has_baseline: bool
    arrays: tuple[bool, ...]  # which leaves of the distribution are parameters; the others are in `static`
    static: tuple[Any, ...]

    def distribution(self, leaves: Values) -> Distribution:
        given, static = iter(leaves), iter(self.static)
        return jax.tree.unflatten(self.structure, [next(given) if a else next(static) for a in self.arrays])

    def legal(self, leaves: Values) -> tuple[str, ...]:
        return families.legal(self.distribution(leaves))

    def pathwise(self, strategy: str, leaves: Values, key: jax.Array) -> Values:
        draw = families.implicit_draw if strategy == "implicit" else families.pathwise
        return (draw(self.distribution(leaves), key),)

    def draw(self, leaves: Values, key: jax.Array) -> Values:
        return (lax.stop_gradient(families.draw(self.distribution(leaves), key)),)

    def score(self, leaves: Values, values: Values) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Λ = Σ log p, then for baselines b Σ b (exp(log p - sg log p) - 1), which is zero, and (number, Σ b, Σ b²)."""
        log_prob = families.log_prob(self.distribution(leaves), lax.stop_gradient(values[0]))
        if not self.has_baseline:
            return log_prob.sum(), jnp.zeros((), log_prob.dtype), jnp.zeros(3, log_prob.dtype)
        b = jnp.broadcast_to(jnp.asarray(leaves[-1], log_prob.dtype), log_prob.shape)
        control = lax.stop_gradient(b) * jnp.expm1(log_prob - lax.stop_gradient(log_prob))
        return log_prob.sum(), control.sum(), jnp.stack([jnp.asarray(b.size, b.dtype), b.sum(), (b**2).sum()])

    def support(self, leaves: Values) -> tuple[jax.Array, jax.Array]:
        return families.support(self.distribution(leaves))

    def alternatives(
        self, strategy: str, leaves: Values, values: Values, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(A, elements, event) values and (A, elements) zero-valued weights whose gradient is the signed measure's."""
        d = self.distribution(leaves)
        if strategy == "mvd":
            return families.alternatives(d, lax.stop_gradient(values[0]), key)
        support, probs = families.support(d)
        return lax.stop_gradient(support), families.zero_valued(probs, d)

    def elements(self, leaves: Values) -> tuple[int, ...]:
        return families.element_shape(self.distribution(leaves))


@dataclass(frozen=True, eq=False)
class OpaqueRule:
    """A draw of anything with a density, differentiated by the score function."""

    label: str
    draw_leaves: Callable[[Any, jax.Array], Any]
    log_prob: Callable[[Any, Any], jax.Array]
    structure: Any  # of the leaves
    outputs: Any  # of the value
    strategy: Strategy | None = None
    has_baseline: bool = False

    def legal(self, leaves: Values) -> tuple[str, ...]:
        return ("reinforce",)

    def draw(self, leaves: Values, key: jax.Array) -> Values:
        value = self.draw_leaves(jax.tree.unflatten(self.structure, leaves), key)
        return tuple(lax.stop_gradient(leaf) for leaf in jax.tree.leaves(value))

    def score(self, leaves: Values, values: Values) -> tuple[jax.Array, jax.Array, jax.Array]:
        value = jax.tree.unflatten(self.outputs, [lax.stop_gradient(v) for v in values])
        log_prob = self.log_prob(jax.tree.unflatten(self.structure, leaves), value)
        return log_prob, jnp.zeros((), log_prob.dtype), jnp.zeros(3, log_prob.dtype)


@dataclass(frozen=True, eq=False)
class KeyRule:
    """A PRNG key: randomness that no parameter reaches, so that there is nothing to differentiate."""

    label: str = "random_key"
    strategy: Strategy | None = None

    def legal(self, leaves: Values) -> tuple[str, ...]:
        return ("none",)

    def pathwise(self, strategy: str, leaves: Values, key: jax.Array) -> Values:
        return (key,)


Rule = DistributionRule | OpaqueRule | KeyRule


def sample(d: Distribution, name: str | None = None) -> jax.Array:
    """A draw from `d` inside an expectation, of shape batch_shape + event_shape.

    d     a NumPyro distribution, bare or under one of `vi.reparam`, `vi.implicit`, `vi.reinforce`, `vi.enum`, `vi.mvd`;
          bare, it gets the best estimator that is legal where it stands
    name  a label for messages and reports

    It may stand anywhere in the function: under jit, vmap, scan, cond, in a plate.  Raises TypeError if `d` is not a
    distribution, StrategyError outside an expectation, in a while loop, or where the estimator is not legal.
    """
    if not isinstance(d, Distribution):
        raise TypeError(f"sample: d is a {type(d).__name__}; expected a numpyro.distributions.Distribution")
    plain, strategy, baseline = strategies.split(d)
    leaves, structure = jax.tree.flatten(plain)
    # Integers that are known (a number of trials) stay known, as supports are listed by them.
    arrays = tuple(
        isinstance(x, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in leaves
    )
    label = name if name is not None else f"{type(families.innermost(plain)).__name__} draw"
    given = [x for x, is_array in zip(leaves, arrays, strict=True) if is_array]
    if baseline is not None:
        given.append(baseline)
    rule = DistributionRule(
        label,
        strategy,
        structure,
        baseline is not None,
        arrays,
        tuple(x for x, is_array in zip(leaves, arrays, strict=True) if not is_array),
    )
    # Only shapes and types: whatever the estimator, it returns what a plain draw returns.
    value = jax.eval_shape(lambda ls: rule.draw(ls, jax.random.key(0))[0], tuple(map(jnp.asarray, given)))
    (out,) = jaxpr.choose(given, rule, [value])
    return out


def opaque_site(
    draw: Callable[[Any, jax.Array], Any], log_prob: Callable[[Any, Any], jax.Array], leaves: Any, name: str
) -> Any:
    """A draw from anything that can be sampled and scored, differentiated by the score function.

    draw(leaves, key) returns a pytree of arrays, log_prob(leaves, value) its log density; `leaves` is a pytree of arrays.
    """
    flat, structure = jax.tree.flatten(leaves)
    arrays = tuple(map(jnp.asarray, flat))
    shape = jax.eval_shape(lambda ls: draw(jax.tree.unflatten(structure, ls), jax.random.key(0)), arrays)
    outputs, tree = jax.tree.flatten(shape)
    return jax.tree.unflatten(tree, jaxpr.choose(arrays, OpaqueRule(name, draw, log_prob, structure, tree), outputs))


def random_key() -> jax.Array:
    """A PRNG key inside an expectation, for randomness that does not depend on a parameter (a shuffle, a subsample)."""
    (key,) = jaxpr.choose((), KeyRule(), [jax.eval_shape(lambda: jax.random.key(0))])
    return key
