"""Choices inside loops, branches and lanes: values are plain arrays, in the sampled world or in one alternative world.

What the choices leave for the top level is summed up in `Effects`; `vi.surrogate` says what it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi.choices import PATHWISE, Values
from vi.jaxpr import Choice, Cond, Const, Lanes, Op, Program, Scan
from vi.planning import Path, Plan, Star, leaves_one_out

sg = lax.stop_gradient


# ---- one choice --------------------------------------------------------------------------------------------------------


def over(lanes: Sequence[int], f: Callable[..., Any], out_axes: int = 0) -> Callable[..., Any]:
    """`f` mapped over the lanes that vmap added to a choice."""
    for _ in lanes:
        f = jax.vmap(f, out_axes=out_axes)
    return f


class Source(NamedTuple):
    """Randomness of one step: `key` of the program around it, and the step's number there.

    alone: no other step draws, and this one only once, so that it can have the key itself
    """

    key: jax.Array
    number: int
    alone: bool = False

    def draw(self) -> jax.Array:
        return self.key if self.alone else jax.random.fold_in(self.key, 2 * self.number)

    def alternatives(self) -> jax.Array:
        return jax.random.fold_in(self.key, 2 * self.number + 1)


def _split(key: jax.Array, lanes: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, lanes) if lanes else key


def drawn(step: Choice, strategy: str, leaves: Values, source: Source) -> Values:
    """The value of a choice, differentiable in the parameters if the strategy is pathwise."""

    def one(key: jax.Array, *leaves: jax.Array) -> Values:
        if strategy in (*PATHWISE, "none"):
            return step.rule.pathwise(strategy, leaves, key)
        return step.rule.draw(leaves, key)

    return over(step.lanes, one)(_split(source.draw(), step.lanes), *leaves)


def _score(step: Choice, leaves: Values, values: Values) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Λ, Σ b (exp(Λ - sg Λ) - 1) and the moments of the baselines b, over elements and lanes."""
    n = len(leaves)
    score, control, moments = over(step.lanes, lambda *a: step.rule.score(a[:n], a[n:]))(*leaves, *values)
    return as_float(score.sum()), as_float(control.sum()), as_float(moments.reshape(-1, 3).sum(0))


def alternatives_of(step: Choice, strategy: str, leaves: Values, values: Values, source: Source) -> tuple[Any, Any]:
    """(options, lanes, elements, event) values and (options, lanes, elements) weights."""
    n = len(leaves)

    def one(key: jax.Array, *a: jax.Array) -> Any:
        return step.rule.alternatives(strategy, a[:n], a[n:], key)

    return over(step.lanes, one, out_axes=1)(_split(source.alternatives(), step.lanes), *leaves, *values)


def _star(
    step: Choice, strategy: str, star: Star, leaves: Values, source: Source, number: Any
) -> tuple[Values, jax.Array]:
    """The choice in one world, and the weights of all its worlds, (elements · options,).

    number: which of them, counted element by element; out of range for a world in which the choice is as sampled.
    """
    (value,) = values = drawn(step, strategy, leaves, source)
    options, weights = alternatives_of(step, strategy, leaves, values, source)
    event = value.shape[weights.ndim - 1 :]
    options = options.reshape(star.options, star.elements, *event).astype(value.dtype)
    chosen = options[jnp.clip(number % star.options, 0, star.options - 1)]
    inside = (number >= 0) & (number < star.elements * star.options)
    hit = (jnp.arange(star.elements) == number // star.options) & inside
    flat = value.reshape(star.elements, *event)
    flat = jnp.where(hit.reshape(-1, *(1 for _ in event)), chosen, flat)
    return (flat.reshape(value.shape),), as_float(weights.reshape(star.options, star.elements).T.reshape(-1))


def each_alone(value: jax.Array, options: jax.Array, star: Star, event: tuple[int, ...]) -> jax.Array:
    """The value with one element replaced by one of its options, (elements · options, *value), element by element."""
    options = options.astype(value.dtype)
    if star.elements == 1:
        return options.reshape(star.options, *value.shape)
    here = jnp.eye(star.elements, dtype=bool).reshape(star.elements, 1, star.elements, *(1 for _ in event))
    flat = value.reshape(1, 1, star.elements, *event)
    replaced = jnp.where(here, options.reshape(1, star.options, star.elements, *event), flat)
    return replaced.reshape(star.elements * star.options, *value.shape)


def _combinations(support: jax.Array, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All joint values of the elements of a choice, (K^E, elements, event), and their probabilities, (K^E,)."""
    k, elements = probs.shape[0], probs.shape[1:]
    n = math.prod(elements)
    event = support.shape[probs.ndim :]
    digits = (jnp.arange(k**n)[:, None] // k ** jnp.arange(n)[None, :]) % k
    each = jnp.arange(n)[None, :]
    values = support.reshape(k, n, *event)[digits, each].reshape(-1, *elements, *event)
    return values, probs.reshape(k, n)[digits, each].prod(-1)


def joint_support(step: Choice, *leaves: Any) -> tuple[jax.Array, jax.Array]:
    """All joint values of the elements and lanes of a choice, and their probabilities."""
    values, probs = over(step.lanes, lambda *ls: step.rule.support(ls), out_axes=1)(*leaves)
    return _combinations(values, probs)


def as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def as_float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.result_type(float))


# ---- inside loops and branches -----------------------------------------------------------------------------------------


class Effects(NamedTuple):
    """What the choices inside left.

    score, control  sums of Λ and of b (exp(Λ - sg Λ) - 1)
    moments         number of the baselines b, Σ b and Σ b²
    lane            Λ of the choices that have the leave-one-out baseline, for the lanes around them
    weights         path -> weights of the worlds of that source, flat, loops first
    """

    score: jax.Array
    control: jax.Array
    moments: jax.Array
    lane: jax.Array
    weights: dict[Path, jax.Array]


def _nothing() -> Effects:
    zero = jnp.zeros((), jnp.result_type(float))
    return Effects(zero, zero, jnp.zeros(3, zero.dtype), zero, {})


def _add(a: Effects, b: Effects) -> Effects:
    score, control, moments, lane = (x + y for x, y in zip(a[:-1], b[:-1], strict=True))
    return Effects(score, control, moments, lane, {**a.weights, **b.weights})


class Inner:
    """Runs what is inside loops and branches, in one world, under one plan."""

    def __init__(self, layout: Plan) -> None:
        self.plan = layout

    def inner(
        self, program: Program, values: Sequence[Any], key: jax.Array, world: Any, path: Path, repeat: Any, outer: int
    ) -> tuple[list[Any], Effects]:
        """Outputs and effects of a program in one world.

        repeat, outer: which run of the loops around this is, of how many
        """
        env: dict[int, Any] = dict(zip(program.inputs, values, strict=True))
        outs: Sequence[Any]
        effects = _nothing()
        for i, step in enumerate(program.steps):
            inputs = [a.value if isinstance(a, Const) else env[a] for a in step.inputs]
            if isinstance(step, Op):
                outs = step.run(*inputs)
            else:
                outs, left = self.step(
                    step, list(map(as_array, inputs)), Source(key, i), world, (*path, i), repeat, outer
                )
                effects = _add(effects, left)
            env.update(zip(step.outputs, outs, strict=True))
        return [a.value if isinstance(a, Const) else env[a] for a in program.outputs], effects

    def step(
        self, step: Any, inputs: list[Any], source: Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], Effects]:
        if isinstance(step, Choice):
            return self.choice(step, inputs, source, world, at, repeat)
        if isinstance(step, Scan):
            return self.scan(step, inputs, source, world, at, repeat, outer)
        if isinstance(step, Lanes):
            return self.lanes(step, inputs, source, world, at, repeat, outer)
        return self.cond(step, inputs, source, world, at, repeat, outer)

    def number(self, at: Path, world: Any, repeat: Any) -> Any:
        """Which alternative of the source at `at` this world is in this run of the loops; out of range if none."""
        star = self.plan.stars[at]
        return world - star.offset - repeat * (star.elements * star.options)

    def choice(
        self, step: Choice, leaves: list[Any], source: Source, world: Any, at: Path, repeat: Any
    ) -> tuple[Values, Effects]:
        strategy = self.plan.sites[at].strategy
        nothing = _nothing()
        if at in self.plan.stars:
            number = self.number(at, world, repeat)
            values, weights = _star(step, strategy, self.plan.stars[at], tuple(leaves), source, number)
            return values, nothing._replace(weights={at: weights})
        values = drawn(step, strategy, tuple(leaves), source)
        if strategy != "reinforce":
            return values, nothing
        score, control, moments = _score(step, tuple(leaves), values)
        if leaves_one_out(step.rule):
            return values, nothing._replace(lane=score)
        return values, nothing._replace(score=score, control=control, moments=moments)

    def scan(
        self, step: Scan, inputs: list[Any], source: Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], Effects]:
        n, c = step.n_consts, step.n_carry
        consts, init, rows = inputs[:n], inputs[n : n + c], inputs[n + c :]
        types = [jnp.result_type(x) for x in init]

        def body(carry: Any, row: Any) -> Any:
            t, *row = row
            here = jax.random.fold_in(source.draw(), t)
            outs, left = self.inner(
                step.body, [*consts, *carry, *row], here, world, at, repeat * step.length + t, outer * step.length
            )
            return [o.astype(d) for o, d in zip(outs[:c], types, strict=True)], (outs[c:], left)

        times = jnp.arange(step.length)
        carry, (ys, left) = lax.scan(body, list(map(jnp.asarray, init)), [times, *rows], step.length, step.reverse)
        return [*carry, *ys], _summed(left)

    def lanes(
        self, step: Lanes, inputs: list[Any], source: Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], Effects]:
        consts, rows = inputs[: step.n_consts], inputs[step.n_consts :]

        def body(lane: Any, *row: Any) -> Any:
            here = jax.random.fold_in(source.draw(), lane)
            return self.inner(
                step.body, [*consts, *row], here, world, at, repeat * step.length + lane, outer * step.length
            )

        outs, left = jax.vmap(body)(jnp.arange(step.length), *rows)
        effects = _summed(left)._replace(lane=jnp.zeros((), left.lane.dtype))
        if at in self.plan.stars:
            # The world's result is the baseline: S gains sg(y - y_k) (Λ_k - sg Λ_k).
            effects.weights[at] = sg(left.lane) - left.lane
            number = self.number(at, world, repeat)
            outs = [jnp.where(_row(number, x), _from_others(x), x) for x in outs]
        return outs, effects

    def cond(
        self, step: Cond, inputs: list[Any], source: Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], Effects]:
        sources = {p: s for p, s in self.plan.stars.items() if p[: len(at)] == at and len(p) > len(at)}

        def branch(b: int) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                here = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(source.key))
                outs, left = self.inner(step.branches[b], operands, here, world, (*at, b), repeat, outer)
                outs = [jnp.asarray(o).astype(d) for o, d in zip(outs, types, strict=True)]
                zeros = {p: jnp.zeros(s.worlds // outer, left.score.dtype) for p, s in sources.items()}
                return outs, left._replace(weights={**zeros, **left.weights})

            return run

        # As bits: where the index is batched both branches run, and one key would be seen to be used by both.
        bits = jax.random.key_data(source.draw())
        first = step.branches[0]
        types = [jnp.result_type(a.value) if isinstance(a, Const) else first.types[a].dtype for a in first.outputs]
        index, *operands = inputs
        return lax.switch(index, [branch(b) for b in range(len(step.branches))], *operands)


def _summed(left: Effects) -> Effects:
    """Effects of a loop: sums over its steps; weights with the loop in front."""
    weights = {p: w.reshape(-1) for p, w in left.weights.items()}
    return Effects(left.score.sum(), left.control.sum(), left.moments.sum(0), left.lane.sum(), weights)


def _row(number: Any, x: jax.Array) -> jax.Array:
    return (jnp.arange(x.shape[0]) == number).reshape(-1, *(1 for _ in x.shape[1:]))


def _from_others(x: jax.Array) -> jax.Array:
    """For every lane something that does not depend on it: the mean of the others, for integers the next one's value."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return (x.sum(0, keepdims=True) - x) / (x.shape[0] - 1)
    return jnp.roll(x, 1, axis=0)
