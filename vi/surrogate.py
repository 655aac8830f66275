"""One scalar whose value and whose derivative are unbiased: a staged program, run with every choice's estimator.

For a program that returns y, with choices x_1, x_2, ... in the order of sampling, the surrogate S satisfies E[S] = E[y] and
E[∂S] = ∂E[y].  (Lew, Huot, Staton and Mansinghka, POPL 2023, define it as a transformation in continuation-passing style;
here it is one function for reverse mode.)  What each strategy does:

    reparam, implicit   the draw itself is differentiable
    reinforce           what depends on the draw is multiplied by exp(Λ - sg Λ), Λ = log p, which is 1 and differentiable
                        again and again; b (exp(Λ - sg Λ) - 1) is subtracted for a baseline b
    enum                the draw is an axis that holds all K values, and only what depends on the draw has it
    mvd                 everything is run once more in all *alternative worlds*, in each of which one element of one choice has
                        another value: S = y + Σ_k sg(y_k - y) w_k, with weights w_k of value zero whose derivative is that of the
                        signed measure.  `enum` in loops does the same, with all K values as alternatives, and the
                        leave-one-out baseline too, its worlds being those in which one lane's results are replaced

Inside loops and branches (`inner`) values are plain arrays.  At the top level a value is a `World`: the array with one
leading axis per enumerated choice on which it depends, and its values in all alternative worlds if these differ.  Sums of
terms with different axes stay lists of terms, so that each term has the axes it needs and no more.  At the end (`take_out`)
the choices are removed in the reverse order of sampling, each by its expectation given the earlier ones: a chain of n choices
of K values with local costs takes n K² work, not K^n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi.chains import enumerated_scan
from vi.choices import PATHWISE, Values
from vi.jaxpr import Choice, Cond, Const, Lanes, Op, Program, Scan, depends
from vi.planning import Path, Plan, Star, leaf_types, leaves_one_out, plan
from vi.worlds import Factor, World, collected, expected, linear, merged, plain, squared_error, summed, weighted

sg = lax.stop_gradient


class TooManyWorlds(Exception):
    """A value needs all combinations of these choices, which are too many."""

    def __init__(self, choices: frozenset[int]) -> None:
        super().__init__(choices)
        self.choices = choices


class Surrogate(NamedTuple):
    """value: the surrogate; baseline_loss: Σ (sg y - b)² over the baselines b, whose derivative reaches only these."""

    value: jax.Array
    baseline_loss: jax.Array


def surrogate(
    program: Program, args: Sequence[Any], key: jax.Array, override: dict[str, str], max_worlds: int
) -> Surrogate:
    """The surrogate of a staged program with one scalar output; the arguments are those of `vi.planning.plan`."""
    layout = plan(program, override, max_worlds)
    sampled: frozenset[int] = frozenset()
    while layout.combinations > max_worlds:
        run = _Run(layout, max_worlds)
        try:
            jax.eval_shape(lambda run=run: run.top(program, args, key))
            break
        except TooManyWorlds as too_many:
            # At the second time all of them, so that the program is never tried over and over.
            enumerated = frozenset(p[0] for p, site in layout.sites.items() if site.exact)
            sampled = enumerated if sampled else too_many.choices
            layout = plan(program, override, max_worlds, sampled)
    return _Run(layout, max_worlds).top(program, args, key)


# ---- one choice --------------------------------------------------------------------------------------------------------


def _over(lanes: Sequence[int], f: Callable[..., Any], out_axes: int = 0) -> Callable[..., Any]:
    for _ in lanes:
        f = jax.vmap(f, out_axes=out_axes)
    return f


class _Source(NamedTuple):
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


def _draw(step: Choice, strategy: str, leaves: Values, source: _Source) -> Values:
    def one(key: jax.Array, *leaves: jax.Array) -> Values:
        if strategy in (*PATHWISE, "none"):
            return step.rule.pathwise(strategy, leaves, key)
        return step.rule.draw(leaves, key)

    return _over(step.lanes, one)(_split(source.draw(), step.lanes), *leaves)


def _score(step: Choice, leaves: Values, values: Values) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Λ, Σ b (exp(Λ - sg Λ) - 1) and the moments of the baselines b, over elements and lanes."""
    n = len(leaves)
    score, control, moments = _over(step.lanes, lambda *a: step.rule.score(a[:n], a[n:]))(*leaves, *values)
    return _float(score.sum()), _float(control.sum()), _float(moments.reshape(-1, 3).sum(0))


def _alternatives(step: Choice, strategy: str, leaves: Values, values: Values, source: _Source) -> tuple[Any, Any]:
    """(options, lanes, elements, event) values and (options, lanes, elements) weights."""
    n = len(leaves)

    def one(key: jax.Array, *a: jax.Array) -> Any:
        return step.rule.alternatives(strategy, a[:n], a[n:], key)

    return _over(step.lanes, one, out_axes=1)(_split(source.alternatives(), step.lanes), *leaves, *values)


def _star(
    step: Choice, strategy: str, star: Star, leaves: Values, source: _Source, number: Any
) -> tuple[Values, jax.Array]:
    """The choice in one world, and the weights of all its worlds, (elements · options,).

    number: which of them, counted element by element; out of range for a world in which the choice is as sampled.
    """
    (value,) = values = _draw(step, strategy, leaves, source)
    options, weights = _alternatives(step, strategy, leaves, values, source)
    event = value.shape[weights.ndim - 1 :]
    options = options.reshape(star.options, star.elements, *event).astype(value.dtype)
    chosen = options[jnp.clip(number % star.options, 0, star.options - 1)]
    inside = (number >= 0) & (number < star.elements * star.options)
    hit = (jnp.arange(star.elements) == number // star.options) & inside
    flat = value.reshape(star.elements, *event)
    flat = jnp.where(hit.reshape(-1, *(1 for _ in event)), chosen, flat)
    return (flat.reshape(value.shape),), _float(weights.reshape(star.options, star.elements).T.reshape(-1))


def _each_alone(value: jax.Array, options: jax.Array, star: Star, event: tuple[int, ...]) -> jax.Array:
    """The value with one element replaced by one of its options, (elements · options, *value), element by element."""
    options = options.astype(value.dtype)
    if star.elements == 1:
        return options.reshape(star.options, *value.shape)
    here = jnp.eye(star.elements, dtype=bool).reshape(star.elements, 1, star.elements, *(1 for _ in event))
    flat = value.reshape(1, 1, star.elements, *event)
    replaced = jnp.where(here, options.reshape(1, star.options, star.elements, *event), flat)
    return replaced.reshape(star.elements * star.options, *value.shape)


def _combinations(support: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All joint values of the elements of a choice, (K^E, elements, event), and their log probabilities, (K^E,)."""
    k, elements = log_probs.shape[0], log_probs.shape[1:]
    n = math.prod(elements)
    event = support.shape[log_probs.ndim :]
    digits = (jnp.arange(k**n)[:, None] // k ** jnp.arange(n)[None, :]) % k
    each = jnp.arange(n)[None, :]
    values = support.reshape(k, n, *event)[digits, each].reshape(-1, *elements, *event)
    return values, log_probs.reshape(k, n)[digits, each].sum(-1)


def _support(step: Choice, *leaves: Any) -> tuple[jax.Array, jax.Array]:
    """All joint values of the elements and lanes of a choice, and their log probabilities."""
    values, log_probs = _over(step.lanes, lambda *ls: step.rule.support(ls), out_axes=1)(*leaves)
    return _combinations(values, log_probs)


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _array(w: World) -> World:
    return w._replace(value=_as_array(w.value))


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.result_type(float))


# ---- inside loops and branches -----------------------------------------------------------------------------------------


class _Effects(NamedTuple):
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


def _nothing() -> _Effects:
    zero = jnp.zeros((), jnp.result_type(float))
    return _Effects(zero, zero, jnp.zeros(3, zero.dtype), zero, {})


def _add(a: _Effects, b: _Effects) -> _Effects:
    score, control, moments, lane = (x + y for x, y in zip(a[:-1], b[:-1], strict=True))
    return _Effects(score, control, moments, lane, {**a.weights, **b.weights})


class _Run:
    """One evaluation under one plan."""

    def __init__(self, layout: Plan, max_worlds: int) -> None:
        self.plan = layout
        self.max_worlds = max_worlds
        self.sizes: dict[int, int] = {}  # step -> number of values on its axis

    def inner(
        self, program: Program, values: Sequence[Any], key: jax.Array, world: Any, path: Path, repeat: Any, outer: int
    ) -> tuple[list[Any], _Effects]:
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
                    step, list(map(_as_array, inputs)), _Source(key, i), world, (*path, i), repeat, outer
                )
                effects = _add(effects, left)
            env.update(zip(step.outputs, outs, strict=True))
        return [a.value if isinstance(a, Const) else env[a] for a in program.outputs], effects

    def step(
        self, step: Any, inputs: list[Any], source: _Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
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
        self, step: Choice, leaves: list[Any], source: _Source, world: Any, at: Path, repeat: Any
    ) -> tuple[Values, _Effects]:
        strategy = self.plan.sites[at].strategy
        nothing = _nothing()
        if at in self.plan.stars:
            number = self.number(at, world, repeat)
            values, weights = _star(step, strategy, self.plan.stars[at], tuple(leaves), source, number)
            return values, nothing._replace(weights={at: weights})
        values = _draw(step, strategy, tuple(leaves), source)
        if strategy != "reinforce":
            return values, nothing
        score, control, moments = _score(step, tuple(leaves), values)
        if leaves_one_out(step.rule):
            return values, nothing._replace(lane=score)
        return values, nothing._replace(score=score, control=control, moments=moments)

    def scan(
        self, step: Scan, inputs: list[Any], source: _Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
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
        self, step: Lanes, inputs: list[Any], source: _Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
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
        self, step: Cond, inputs: list[Any], source: _Source, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
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

    # ---- at the top level ----------------------------------------------------------------------------------------------

    def top(self, program: Program, args: Sequence[Any], key: jax.Array) -> Surrogate:
        env: dict[int, tuple[World, ...]] = {v: (plain(x),) for v, x in zip(program.inputs, args, strict=True)}

        def read(atom: Any) -> tuple[World, ...]:
            return (plain(atom.value),) if isinstance(atom, Const) else env[atom]

        alone = self.plan.total == 0 and sum(not isinstance(step, Op) for step in program.steps) == 1
        factors: list[Factor] = []
        for i, step in enumerate(program.steps):
            inputs = list(map(read, step.inputs))
            if isinstance(step, Op):
                env.update(zip(step.outputs, self.op(step, inputs, program.types), strict=True))
                continue
            outs, factor = self.factor(step, [_array(merged(ws)) for ws in inputs], _Source(key, i, alone), i)
            env.update(zip(step.outputs, ((o,) for o in outs), strict=True))
            factors.append(factor)
        (output,) = program.outputs
        return self.take_out(list(read(output)), factors)

    def lift(
        self, f: Callable[..., Any], inputs: Sequence[World], source: bool = False
    ) -> tuple[Any, Any, tuple[int, ...], frozenset[int]]:
        """f(world, *values) in the sampled world and in the alternative ones, for all values on the axes of the inputs."""
        axes = tuple(sorted(set().union(*(w.axes for w in inputs))))
        if math.prod(self.sizes[a] for a in axes) > self.max_worlds:
            raise TooManyWorlds(frozenset(axes))
        reach: frozenset[int] = frozenset().union(*(w.reach for w in inputs))
        here = jnp.int32(-1)

        def over_axes(world: Any, *values: Any) -> Any:
            g = lambda *v: f(world, *v)  # noqa: E731
            for a in reversed(axes):
                g = jax.vmap(g, in_axes=tuple(0 if a in w.axes else None for w in inputs))
            return g(*values)

        out = over_axes(here, *(w.value for w in inputs))
        if not source and all(w.others is None for w in inputs):
            return out, None, axes, reach
        values = [sg(w.value if w.others is None else w.others) for w in inputs]
        dims = tuple(None if w.others is None else 0 for w in inputs)
        numbers = jnp.arange(self.plan.total, dtype=jnp.int32)
        others = jax.vmap(over_axes, in_axes=(0, *dims))(numbers, *values)
        return out, jax.tree.map(sg, others), axes, reach

    def op(self, step: Op, inputs: list[tuple[World, ...]], types: dict[int, Any]) -> list[tuple[World, ...]]:
        """A computation without choices; sums and what is linear in a sum keep its terms apart."""
        if all(len(ws) == 1 and ws[0].is_plain for ws in inputs):
            return [(plain(x),) for x in step.run(*(ws[0].value for ws in inputs))]
        terms = summed(step, inputs, types)
        if terms is not None:
            return [collected(terms)]
        parts = linear(step, inputs)
        if parts is not None:
            return [collected([self.apply(step, t)[0] for t in parts])]
        return [(w,) for w in self.apply(step, list(map(merged, inputs)))]

    def apply(self, step: Op, inputs: Sequence[World]) -> list[World]:
        outs, others, axes, reach = self.lift(lambda _, *v: step.run(*v), inputs)
        return [World(x, axes, None if others is None else others[k], reach) for k, x in enumerate(outs)]

    def factor(self, step: Any, inputs: list[World], source: _Source, i: int) -> tuple[list[World], Factor]:
        """The values of a choice, loop or branch, and what is to be done when it is taken out."""
        if isinstance(step, Choice) and self.plan.sites[(i,)].exact:
            return self.enumerated(step, inputs, i)
        if i in self.plan.chains:
            return self.chain(step, inputs, i)
        if (i,) in self.plan.stars and isinstance(step, Choice):
            return self.starred(step, inputs, source, i)
        sources = {p: s for p, s in self.plan.stars.items() if p[0] == i}

        def run(world: Any, *values: Any) -> Any:
            return self.step(step, list(values), source, world, (i,), 0, 1)

        (outs, left), others, axes, reach = self.lift(run, inputs, source=bool(sources))
        mine = reach | {i}
        worlds = [World(x, axes, None if others is None else others[0][k], mine) for k, x in enumerate(outs)]
        scored = any(s.strategy == "reinforce" for p, s in self.plan.sites.items() if p[0] == i)
        score = World(left.score, axes, None, reach) if scored else None
        baselines = any(map(_has_baseline, _rules(step)))
        control = World(left.control, axes, None, reach) if baselines else None
        moments = World(left.moments, axes, None, reach) if baselines else None
        weights = [(sources[p], World(w, axes, None, reach)) for p, w in left.weights.items()]
        return worlds, Factor(i, None, score, control, weights, moments)

    def starred(self, step: Choice, inputs: list[World], source: _Source, i: int) -> tuple[list[World], Factor]:
        """A choice with alternative worlds: in its own ones it has its alternatives, in the others it is as sampled there."""
        star, strategy = self.plan.stars[(i,)], self.plan.sites[(i,)].strategy

        def draw(_: Any, *leaves: Any) -> jax.Array:
            return _draw(step, strategy, leaves, source)[0]

        def alternatives(_: Any, *leaves: Any) -> tuple[jax.Array, jax.Array]:
            value = draw(_, *leaves)
            options, weights = _alternatives(step, strategy, leaves, (value,), source)
            alone = _each_alone(value, options, star, value.shape[weights.ndim - 1 :])
            return sg(alone), _float(weights.reshape(star.options, star.elements).T.reshape(-1))

        value, others, axes, reach = self.lift(draw, inputs)
        (options, weights), _, _, _ = self.lift(alternatives, [w._replace(others=None) for w in inputs])
        if others is None:
            others = jnp.broadcast_to(sg(value), (self.plan.total, *value.shape))
        others = others.at[star.offset : star.offset + star.worlds].set(jnp.moveaxis(options, len(axes), 0))
        weight = World(weights, axes, None, reach)
        return [World(value, axes, others, reach | {i})], Factor(i, None, None, None, [(star, weight)], None)

    def enumerated(self, step: Choice, inputs: list[World], i: int) -> tuple[list[World], Factor]:
        support = partial(_support, step)
        (values, log_probs), others, axes, reach = self.lift(lambda _, *leaves: support(*leaves), inputs)
        self.sizes[i] = log_probs.shape[-1]
        if math.prod(self.sizes[a] for a in (*axes, i)) > self.max_worlds:
            raise TooManyWorlds(frozenset((*axes, i)))
        probs = World(jnp.exp(log_probs), (*axes, i), None if others is None else jnp.exp(others[1]), reach)
        # Values that do not depend on the parameters are the same on all other axes, and need none of them.
        first = [w.value[(0,) * len(w.axes)] for w in inputs]
        if not depends(lambda *leaves: support(*leaves)[0], *first):
            return [World(support(*map(sg, first))[0], (i,), None, frozenset())], Factor(i, probs, None, None, [], None)
        value = World(sg(values), (*axes, i), None if others is None else others[0], reach)
        return [value], Factor(i, probs, None, None, [], None)

    def chain(self, step: Scan, inputs: list[World], i: int) -> tuple[list[World], Factor]:
        """A scan whose choice is summed over step by step; its last state has the values of the last choice as an axis."""
        found = self.plan.chains[i]
        choice = step.body.steps[found.choice]
        assert isinstance(choice, Choice)
        types = leaf_types(choice, step.body, lanes=True)
        size = jax.eval_shape(partial(_support, choice), *types)[1].shape[0]

        def run(_: Any, *values: Any) -> Any:
            return enumerated_scan(step, found, list(values), size, partial(_support, choice))

        (outs, last), others, axes, reach = self.lift(run, inputs)
        self.sizes[i] = size
        if math.prod(self.sizes[a] for a in (*axes, i)) > self.max_worlds:
            raise TooManyWorlds(frozenset((*axes, i)))
        kinds = [*found.carry, *("row" for _ in found.rows)]
        worlds = [
            World(x, (*axes, i) if kind == "state" else axes, None if others is None else others[0][k], reach)
            for k, (x, kind) in enumerate(zip(outs, kinds, strict=True))
        ]
        probs = World(last, (*axes, i), None if others is None else others[1], reach)
        return worlds, Factor(i, probs, None, None, [], None)

    def take_out(self, terms: list[World], factors: list[Factor]) -> Surrogate:
        """The expectation of the sum of the terms, choice by choice, the last one first."""
        errors: list[World] = []
        for factor in reversed(factors):
            i = factor.step
            touched = [t for t in terms if i in t.axes or i in t.reach]
            if touched:
                # A baseline is compared with the whole result, not only with the terms that the draw reaches.
                whole = factor.moments is not None
                rest = [] if whole else [t for t in terms if i not in t.axes and i not in t.reach]
                if factor.control is not None and factor.moments is not None:
                    errors.append(squared_error(merged(tuple(terms)), factor.moments))
                    rest.append(factor.control._replace(value=-factor.control.value))
                if factor.probs is not None:
                    rest += [expected(t, factor.probs, i) for t in touched]
                else:
                    rest += [weighted(t, factor) for t in (terms if whole else touched)]
                terms = list(collected(rest))
            if factor.probs is not None:
                errors = [expected(e, factor.probs, i) if i in e.axes else e for e in errors]
        value = jnp.asarray(sum((t.value for t in terms[1:]), terms[0].value))
        return Surrogate(value, sum((e.value for e in errors), jnp.zeros((), value.dtype)))


def _summed(left: _Effects) -> _Effects:
    """Effects of a loop: sums over its steps; weights with the loop in front."""
    weights = {p: w.reshape(-1) for p, w in left.weights.items()}
    return _Effects(left.score.sum(), left.control.sum(), left.moments.sum(0), left.lane.sum(), weights)


def _row(number: Any, x: jax.Array) -> jax.Array:
    return (jnp.arange(x.shape[0]) == number).reshape(-1, *(1 for _ in x.shape[1:]))


def _from_others(x: jax.Array) -> jax.Array:
    """For every lane something that does not depend on it: the mean of the others, for integers the next one's value."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return (x.sum(0, keepdims=True) - x) / (x.shape[0] - 1)
    return jnp.roll(x, 1, axis=0)


def _rules(step: Any) -> list[Any]:
    """The rules of all choices of a step."""
    if isinstance(step, Choice):
        return [step.rule]
    programs = step.branches if isinstance(step, Cond) else () if isinstance(step, Op) else (step.body,)
    return [rule for program in programs for inner in program.steps for rule in _rules(inner)]


def _has_baseline(rule: Any) -> bool:
    return getattr(rule, "has_baseline", False)
