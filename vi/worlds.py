"""Values in many worlds at once: arrays with an axis for every enumerated choice that they depend on.

Sums of terms with different axes are kept as tuples of terms, so that each has the axes that it needs and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi.chains import LINEAR, keeps_floats
from vi.errors import StrategyError
from vi.jaxpr import Op
from vi.planning import Star

sg = lax.stop_gradient


class World(NamedTuple):
    """A value that depends on choices.

    value   the array in the sampled world; leading axes: one per enumerated choice in `axes`, in the order of sampling
    others  the same in all alternative worlds, with these as the very first axis; None if they do not differ
    reach   the other top-level choices (or loops with choices) that it depends on
    """

    value: Any
    axes: tuple[int, ...]
    others: Any
    reach: frozenset[int]

    @property
    def is_plain(self) -> bool:
        return not self.axes and self.others is None and not self.reach


class Factor(NamedTuple):
    """What is to be done with the terms that a choice (or a loop, or a branch with choices) reaches.

    probs           probabilities of its values, if it is enumerated
    score, control  Λ, and Σ b (exp(Λ - sg Λ) - 1) over the baselines b
    weights         of its alternative worlds
    moments         (number, Σ b, Σ b²) of the baselines
    """

    step: int
    probs: World | None
    score: World | None
    control: World | None
    weights: list[tuple[Star, World]]
    moments: World | None


def plain(x: Any) -> World:
    return World(x, (), None, frozenset())


def _aligned(x: Any, axes: tuple[int, ...], union: tuple[int, ...], lead: int = 0) -> Any:
    """Insert axes of length one, so that `x` has all axes of `union` after `lead` leading ones."""
    shape = list(jnp.shape(x))
    for k, a in enumerate(union):
        if a not in axes:
            shape.insert(lead + k, 1)
    return jnp.reshape(x, shape)


def _other(w: World, union: tuple[int, ...]) -> Any:
    """The value in the alternative worlds, which are the first axis; of length one if it is the same in all."""
    return _aligned(sg(w.value), w.axes, union)[None] if w.others is None else _aligned(w.others, w.axes, union, 1)


def _plus(a: World, b: World) -> World:
    union = tuple(sorted({*a.axes, *b.axes}))
    value = _aligned(a.value, a.axes, union) + _aligned(b.value, b.axes, union)
    others = None
    if a.others is not None or b.others is not None:
        others = _other(a, union) + _other(b, union)
    return World(value, union, others, a.reach | b.reach)


def merged(terms: tuple[World, ...]) -> World:
    """The sum of the terms as one value with all their axes."""
    total = terms[0]
    for t in terms[1:]:
        total = _plus(total, t)
    return total


def collected(terms: Sequence[World]) -> tuple[World, ...]:
    """Terms that depend on the same choices, added up."""
    groups: dict[Any, World] = {}
    for t in terms:
        alike = (t.axes, t.reach, t.others is None)
        groups[alike] = _plus(groups[alike], t) if alike in groups else t
    return tuple(groups.values())


def summed(step: Op, inputs: list[tuple[World, ...]], types: dict[int, Any]) -> list[World] | None:
    """The terms of a sum or difference whose parts depend on different choices; None if the op is none."""
    if step.name not in ("add", "add_any", "sub"):
        return None
    if all(len(ws) == 1 for ws in inputs) and _alike(inputs[0][0], inputs[1][0]):
        return None
    shape, dtype = types[step.outputs[0]].shape, types[step.outputs[0]].dtype

    def term(w: World, sign: int) -> World:
        value = _term(w.value, len(w.axes), shape, dtype, sign)
        return w._replace(
            value=value, others=w.others if w.others is None else _term(w.others, len(w.axes) + 1, shape, dtype, sign)
        )

    second = -1 if step.name == "sub" else 1
    return [term(w, 1) for w in inputs[0]] + [term(w, second) for w in inputs[1]]


def _term(x: Any, lead: int, shape: tuple[int, ...], dtype: Any, sign: int) -> Any:
    """x or -x, broadcast to the shape of the sum after `lead` axes of worlds."""
    x = jnp.asarray(x, dtype)
    if x.shape[lead:] != shape:
        x = jnp.broadcast_to(
            x.reshape(*x.shape[:lead], *(1,) * (len(shape) - x.ndim + lead), *x.shape[lead:]), (*x.shape[:lead], *shape)
        )
    return -x if sign < 0 else x


def linear(step: Op, inputs: list[tuple[World, ...]]) -> list[list[World]] | None:
    """The inputs of each term of the result, if the op is linear in the one input that is a sum; None if it is not."""
    if len(inputs) == 1 and (step.name in LINEAR or keeps_floats(step, [inputs[0][0].value])):
        return [[t] for t in inputs[0]]
    if step.name in ("mul", "div") and len(inputs) == 2:
        a, b = inputs
        if step.name == "div" and not jnp.issubdtype(jnp.result_type(a[0].value), jnp.inexact):
            return None  # it rounds
        if len(b) == 1 and b[0].is_plain:
            return [[t, b[0]] for t in a]
        if step.name == "mul" and len(a) == 1 and a[0].is_plain:
            return [[a[0], t] for t in b]
    return None


def _alike(a: World, b: World) -> bool:
    return a.axes == b.axes and a.reach == b.reach and (a.others is None) == (b.others is None)


def _mean(x: Any, probs: Any, axis: int) -> Any:
    """Σ p x over the axis; what is infinite or NaN where p is zero does not count."""
    never = (probs == 0) & ~jnp.isfinite(x)
    return (jnp.where(never, 0.0, x) * probs).sum(axis)


def expected(t: World, probs: World, i: int) -> World:
    """Σ over the values of choice i of p t."""
    union = tuple(sorted({*t.axes, *probs.axes}))
    at = union.index(i)
    value = _mean(_aligned(t.value, t.axes, union), _aligned(probs.value, probs.axes, union), at)
    others = None
    if t.others is not None or probs.others is not None:
        others = sg(_mean(_other(t, union), _other(probs, union), 1 + at))
    return World(value, union[:at] + union[at + 1 :], others, t.reach | probs.reach)


def weighted(t: World, factor: Factor) -> World:
    """The term with the score and the alternative worlds of a choice accounted for."""
    parts = [] if factor.score is None else [factor.score]
    union = tuple(sorted({*t.axes, *(a for w in parts for a in w.axes)}))
    if factor.score is not None:
        score = _aligned(factor.score.value, factor.score.axes, union)
        value = _aligned(t.value, t.axes, union)
        others = None if t.others is None else _aligned(t.others, t.axes, union, 1)
        reach = t.reach | factor.score.reach
        t = World(value * jnp.exp(score - sg(score)).astype(value.dtype), union, others, reach)
    return weighed(t, [factor])


def weighed(t: World, factors: Sequence[Factor]) -> World:
    """The term with the alternative worlds of these choices accounted for, in one sum over all worlds."""
    parts = [part for f in factors for part in f.weights]
    reach = (t.reach - {f.step for f in factors}).union(*(w.reach for _, w in parts))
    if t.others is None or not parts:
        return t._replace(reach=reach)
    union = tuple(sorted({*t.axes, *(a for _, w in parts for a in w.axes)}))
    value, others = _aligned(t.value, t.axes, union), _aligned(t.others, t.axes, union, 1)
    groups: dict[tuple[int, ...], list[tuple[Star, World]]] = {}
    for star, w in parts:
        groups.setdefault(w.axes, []).append((star, w))
    total = value
    for axes, group in groups.items():
        group.sort(key=lambda part: part[0].offset)
        weights = jnp.moveaxis(jnp.concatenate([w.value for _, w in group], axis=-1), -1, 0)
        weights = _aligned(weights, axes, union, 1).astype(value.dtype)
        numbers = np.concatenate([np.arange(star.offset, star.offset + star.worlds) for star, _ in group])
        first, last = numbers[0], numbers[-1] + 1
        gain = others[first:last] if last - first == len(numbers) else others[numbers]
        gain = gain - value[None]
        gain = jnp.broadcast_to(sg(gain), jnp.broadcast_shapes(gain.shape, weights.shape))
        total = total + _once(weights, gain).sum(0)
    return World(total, union, others, reach)


def squared_error(y: World, moments: World) -> World:
    """Σ (sg y - b)² over baselines with these moments (number, Σ b, Σ b²)."""
    union = tuple(sorted({*y.axes, *moments.axes}))
    signal = sg(_aligned(y.value, y.axes, union))
    number, first, second = (_aligned(moments.value[..., k], moments.axes, union) for k in range(3))
    value = sg(number) * signal**2 - 2 * signal * first + second
    return World(value, union, None, frozenset())


@jax.custom_jvp
def _once(w: jax.Array, gain: jax.Array) -> jax.Array:
    """gain · w for a w of value zero, which can be differentiated once: what would be missing after that is the derivative
    of the gain.  The value is zero whatever the gain, which may be infinite in a world that is never drawn."""
    return jnp.zeros_like(w)


@_once.defjvp
def _once_jvp(primals: Any, tangents: Any) -> Any:
    (w, gain), (w_dot, _) = primals, tangents
    return jnp.zeros_like(w), gain * _final(w) * w_dot


@jax.custom_jvp
def _final(w: jax.Array) -> jax.Array:
    return jnp.ones_like(w)


@_final.defjvp
def _final_jvp(primals: Any, tangents: Any) -> Any:
    raise StrategyError(
        "mvd, leave_one_out, and enum where it is not exact (in loops, branches, or beyond max_worlds), give first derivatives "
        "only; for second ones use reinforce, reparam or exact enum"
    )
