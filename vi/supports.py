"""Whether the values that a guide draws are values that its model can take, as far as constraints tell."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from vi.errors import SupportError

_MODERATE = (-12.0, -4.0, -1.0, -0.1, 0.0, 0.1, 1.0, 4.0, 12.0)  # the sigmoid of 12 is still less than 1 in float32
_FAR = (-80.0, 80.0)  # the exponential of 80 is still finite in float32
_BEYOND = (-200.0, 200.0)


def static_support(d: dist.Distribution) -> constraints.Constraint | None:
    """The support of `d` if it is known and its bounds are not traced; None also for a point mass, which has no choice."""
    inner = d
    while isinstance(inner, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        inner = inner.base_dist
    if isinstance(inner, dist.Delta):
        return None
    try:
        support = d.support
    except NotImplementedError:
        return None
    return support if isinstance(support, constraints.Constraint) and not _traced(support) else None


def check_support(address: str, drawn: constraints.Constraint, d: dist.Distribution, shape: tuple[int, ...]) -> None:
    """Raise SupportError if some value in `drawn` is outside the support of `d`; values have this shape.

    The values tried are images of a grid of reals under the bijection to `drawn`, or its elements if it is discrete.  Where
    NumPyro knows no bijection, or bounds are traced, nothing is checked.
    """
    taken = static_support(d)
    if taken is None or _traced(drawn):
        return
    drawn, taken = _element(drawn), _element(taken)
    if drawn is taken:
        return
    try:
        kinds = drawn.is_discrete, taken.is_discrete
        if taken is constraints.real and not kinds[0]:  # the usual case, for which nothing need be computed
            return
        with jax.ensure_compile_time_eval():
            outside = None if kinds[0] != kinds[1] else _outside(drawn, taken, shape)
    except NotImplementedError:
        return
    if kinds[0] != kinds[1]:
        named = ["a discrete value" if discrete else "a continuous value" for discrete in kinds]
        raise SupportError(
            f"'{address}': the guide draws {named[0]} ({drawn}) where the model has {named[1]} ({taken}); their densities "
            "cannot be compared"
        )
    if outside is not None:
        raise SupportError(
            f"'{address}': the guide draws from {drawn}, the model's support is {taken}; {outside} is outside it"
        )


def _traced(constraint: constraints.Constraint) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(constraint))


def _element(constraint: constraints.Constraint) -> constraints.Constraint:
    while isinstance(constraint, type(constraints.independent(constraints.real, 1))) and hasattr(
        constraint, "base_constraint"
    ):
        constraint = constraint.base_constraint
    return constraint


def _outside(drawn: constraints.Constraint, taken: constraints.Constraint, shape: tuple[int, ...]) -> Any:
    """A value that `drawn` holds and `taken` does not, or None if none was found."""
    event_dim = max(drawn.event_dim, taken.event_dim)
    bounded = any(jnp.ndim(leaf) for leaf in jax.tree.leaves((drawn, taken)))
    values = (
        _discrete(drawn)
        if drawn.is_discrete
        else _continuous(drawn, shape if bounded else shape[len(shape) - event_dim :])
    )
    if values is None:
        return None
    inside = jnp.asarray(taken(values))
    if inside.all():
        return None
    rows = inside.reshape(inside.shape[0], -1).all(axis=1)
    return values[int(jnp.argmin(rows))]


def _discrete(drawn: constraints.Constraint) -> jax.Array | None:
    if drawn is constraints.boolean:
        return jnp.array([0, 1])
    lower, upper = getattr(drawn, "lower_bound", None), getattr(drawn, "upper_bound", None)
    if lower is None or drawn.event_dim:
        return None
    steps = jnp.array([0, 1, 2, 3, 10, 100, 1000])
    steps = steps.reshape(-1, *(1,) * max(jnp.ndim(lower), jnp.ndim(upper) if upper is not None else 0))
    values = lower + steps
    return (
        values
        if upper is None
        else jnp.concatenate([jnp.minimum(values, upper), jnp.minimum(upper - steps * 0, upper)])
    )


def _continuous(drawn: constraints.Constraint, shape: tuple[int, ...]) -> jax.Array:
    transform = dist.biject_to(drawn)
    inner = transform.inverse_shape(shape)
    size = 1
    for n in inner:
        size *= n
    direction = jnp.cos(jnp.arange(size)).reshape(inner)  # 1 for a scalar; not the same for all elements of a vector

    def at(points: tuple[float, ...]) -> jax.Array:
        return transform(jnp.array(points).reshape(-1, *(1,) * len(inner)) * direction)

    if drawn.event_dim:
        return at(_MODERATE[2:-2])
    values = at(_MODERATE)
    # Far out as well, unless the bijection has reached a bound there, where only rounding tells open from closed.
    far, beyond = at(_FAR), at(_BEYOND)
    moving = [row for row, last in zip(far, beyond, strict=True) if not (row == last).any()]
    if drawn is constraints.real:
        moving += [1e6 * direction, -1e6 * direction]
    return jnp.concatenate([values, jnp.stack(moving)]) if moving else values
