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

Inside loops and branches (`vi.inner`) values are plain arrays.  At the top level a value is a `World`: the array with one
leading axis per enumerated choice on which it depends, and its values in all alternative worlds if these differ.  Sums of
terms with different axes stay lists of terms, so that each term has the axes it needs and no more.  At the end (`take_out`)
the choices are removed in the reverse order of sampling, each by its expectation given the earlier ones: a chain of n choices
of K values with local costs takes n K² work, not K^n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi.chains import enumerated_scan
from vi.inner import Inner, Source, alternatives_of, as_array, as_float, drawn, each_alone, joint_support
from vi.jaxpr import Choice, Cond, Const, Op, Program, Scan, depends
from vi.planning import Plan, leaf_types, plan
from vi.worlds import (
    Factor,
    World,
    collected,
    expected,
    linear,
    merged,
    plain,
    squared_error,
    summed,
    weighed,
    weighted,
)

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


class _Run(Inner):
    """One evaluation under one plan, at the top level."""

    def __init__(self, layout: Plan, max_worlds: int) -> None:
        super().__init__(layout)
        self.max_worlds = max_worlds
        self.sizes: dict[int, int] = {}  # step -> number of values on its axis
        self.sums: dict[int, tuple[tuple[World, ...], World]] = {}  # terms, by identity, and their sum

    def whole(self, terms: tuple[World, ...]) -> World:
        """The sum of the terms of one value, computed once however many operations read it."""
        if len(terms) == 1:
            return terms[0]
        if id(terms) not in self.sums:
            self.sums[id(terms)] = terms, merged(terms)
        return self.sums[id(terms)][1]

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
            outs, factor = self.factor(step, [_array(self.whole(ws)) for ws in inputs], Source(key, i, alone), i)
            env.update(zip(step.outputs, ((o,) for o in outs), strict=True))
            if factor is not None:
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
        return [(w,) for w in self.apply(step, list(map(self.whole, inputs)))]

    def apply(self, step: Op, inputs: Sequence[World]) -> list[World]:
        outs, others, axes, reach = self.lift(lambda _, *v: step.run(*v), inputs)
        return [World(x, axes, None if others is None else others[k], reach) for k, x in enumerate(outs)]

    def factor(self, step: Any, inputs: list[World], source: Source, i: int) -> tuple[list[World], Factor | None]:
        """The values of a choice, loop or branch, and what is to be done when it is taken out, if anything is."""
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
        scored = any(s.strategy == "reinforce" for p, s in self.plan.sites.items() if p[0] == i)
        # What is differentiated through its draws leaves nothing to do, and values that depend on it need no mark of that.
        pathwise = not scored and not sources
        mine = reach if pathwise else reach | {i}
        worlds = [World(x, axes, None if others is None else others[0][k], mine) for k, x in enumerate(outs)]
        if pathwise:
            return worlds, None
        score = World(left.score, axes, None, reach) if scored else None
        baselines = any(map(_has_baseline, _rules(step)))
        control = World(left.control, axes, None, reach) if baselines else None
        moments = World(left.moments, axes, None, reach) if baselines else None
        weights = [(sources[p], World(w, axes, None, reach)) for p, w in left.weights.items()]
        return worlds, Factor(i, None, score, control, weights, moments)

    def starred(self, step: Choice, inputs: list[World], source: Source, i: int) -> tuple[list[World], Factor]:
        """A choice with alternative worlds: in its own ones it has its alternatives, in the others it is as sampled there."""
        star, strategy = self.plan.stars[(i,)], self.plan.sites[(i,)].strategy

        def draw(_: Any, *leaves: Any) -> jax.Array:
            return drawn(step, strategy, leaves, source)[0]

        def alternatives(_: Any, *leaves: Any) -> tuple[jax.Array, jax.Array]:
            value = draw(_, *leaves)
            options, weights = alternatives_of(step, strategy, leaves, (value,), source)
            alone = each_alone(value, options, star, value.shape[weights.ndim - 1 :])
            return sg(alone), as_float(weights.reshape(star.options, star.elements).T.reshape(-1))

        value, others, axes, reach = self.lift(draw, inputs)
        (options, weights), _, _, _ = self.lift(alternatives, [w._replace(others=None) for w in inputs])
        if others is None:
            others = jnp.broadcast_to(sg(value), (self.plan.total, *value.shape))
        others = others.at[star.offset : star.offset + star.worlds].set(jnp.moveaxis(options, len(axes), 0))
        weight = World(weights, axes, None, reach)
        return [World(value, axes, others, reach | {i})], Factor(i, None, None, None, [(star, weight)], None)

    def enumerated(self, step: Choice, inputs: list[World], i: int) -> tuple[list[World], Factor]:
        support = partial(joint_support, step)
        (values, probabilities), others, axes, reach = self.lift(lambda _, *leaves: support(*leaves), inputs)
        self.sizes[i] = probabilities.shape[-1]
        if math.prod(self.sizes[a] for a in (*axes, i)) > self.max_worlds:
            raise TooManyWorlds(frozenset((*axes, i)))
        probs = World(probabilities, (*axes, i), None if others is None else others[1], reach)
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
        size = jax.eval_shape(partial(joint_support, choice), *types)[1].shape[0]

        def run(_: Any, *values: Any) -> Any:
            return enumerated_scan(step, found, list(values), size, partial(joint_support, choice))

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
        for alike, run in groupby(reversed(factors), key=_has_worlds_only):
            if alike:
                together = list(run)
                terms = list(collected([weighed(t, _touching(t, together)) for t in terms]))
            else:
                for factor in run:
                    terms = self.taken(terms, factor, errors)
        value = jnp.asarray(sum((t.value for t in terms[1:]), terms[0].value))
        return Surrogate(value, sum((e.value for e in errors), jnp.zeros((), value.dtype)))

    def taken(self, terms: list[World], factor: Factor, errors: list[World]) -> list[World]:
        """The terms without this choice; `errors`, of baselines, are added to, and lose the choice too."""
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
            errors[:] = [expected(e, factor.probs, i) if i in e.axes else e for e in errors]
        return terms


def _has_worlds_only(factor: Factor) -> bool:
    return factor.probs is None and factor.score is None and factor.moments is None


def _touching(t: World, factors: list[Factor]) -> list[Factor]:
    """Those of the factors, the last choice first, that the term depends on, itself or through the weights of later ones."""
    reach, found = t.reach, []
    for factor in factors:
        if factor.step in reach:
            found.append(factor)
            reach = reach.union(*(w.reach for _, w in factor.weights))
    return found


def _array(w: World) -> World:
    return w._replace(value=as_array(w.value))


def _rules(step: Any) -> list[Any]:
    """The rules of all choices of a step."""
    if isinstance(step, Choice):
        return [step.rule]
    programs = step.branches if isinstance(step, Cond) else () if isinstance(step, Op) else (step.body,)
    return [rule for program in programs for inner in program.steps for rule in _rules(inner)]


def _has_baseline(rule: Any) -> bool:
    return getattr(rule, "has_baseline", False)
