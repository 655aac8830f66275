"""One scalar whose value and whose derivative are unbiased: a staged program, run with every choice's estimator.

For a program that returns y, with choices x_1, x_2, ... in the order of sampling, the surrogate S satisfies E[S] = E[y] and
E[∂S] = ∂E[y].  (Lew, Huot, Staton and Mansinghka, POPL 2023, define it as a transformation in continuation-passing style;
here it is one function for reverse mode.)  What each strategy does:

    reparam, implicit   the draw itself is differentiable
    reinforce           what depends on the draw is multiplied by exp(Λ - sg Λ), Λ = log p, which is 1 and differentiable
                        again and again; b (Λ - sg Λ) is subtracted for a baseline b
    enum                the draw is an axis that holds all K values, and only what depends on the draw has it
    mvd                 everything is run once more in all *alternative worlds*, in each of which one element of one choice has
                        another value: S = y + Σ_k sg(y_k - y) w_k, with weights w_k of value zero whose derivative is that of the
                        signed measure.  `enum` in loops does the same, with all K values as alternatives, and the
                        leave-one-out baseline too, its worlds being those in which one lane's results are replaced

Inside loops and branches (`_inner`) values are plain arrays.  At the top level a value is a `World`: the array with one
leading axis per enumerated choice on which it depends, and its values in all alternative worlds if these differ.  Sums of
terms with different axes stay lists of terms, so that each term has the axes it needs and no more.  At the end (`_take_out`)
the choices are removed in the reverse order of sampling, each by its expectation given the earlier ones: a chain of n choices
of K values with local costs takes n K² work, not K^n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi.choices import PATHWISE, Values
from vi.jaxpr import Choice, Cond, Const, Lanes, Op, Program, Scan, depends
from vi.planning import Path, Plan, Star, leaves_one_out, plan

sg = lax.stop_gradient


class TooManyWorlds(Exception):
    """A value needs all combinations of these choices, which are too many."""

    def __init__(self, choices: frozenset[int]) -> None:
        super().__init__(choices)
        self.choices = choices


class Baseline(NamedTuple):
    """A choice's label, the part of the result that its draw reaches, and the baseline subtracted from it."""

    label: str
    signal: jax.Array
    baseline: jax.Array


def surrogate(
    program: Program, args: Sequence[Any], key: jax.Array, override: dict[str, str], max_worlds: int
) -> jax.Array:
    """The surrogate of a staged program with one scalar output."""
    sampled: frozenset[int] = frozenset()
    while True:
        layout = plan(program, override, max_worlds, sampled)
        try:
            return _Run(layout, max_worlds).top(program, args, key)
        except TooManyWorlds as too_many:
            sampled |= too_many.choices


# ---- one choice --------------------------------------------------------------------------------------------------------


def _over(lanes: Sequence[int], f: Callable[..., Any], out_axes: int = 0) -> Callable[..., Any]:
    for _ in lanes:
        f = jax.vmap(f, out_axes=out_axes)
    return f


def _keys(key: jax.Array, number: int, lanes: tuple[int, ...]) -> jax.Array:
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, lanes) if lanes else key


def _draw(step: Choice, strategy: str, leaves: Values, key: jax.Array) -> Values:
    def one(key: jax.Array, *leaves: jax.Array) -> Values:
        if strategy in (*PATHWISE, "none"):
            return step.rule.pathwise(strategy, leaves, key)
        return step.rule.draw(leaves, key)

    return _over(step.lanes, one)(_keys(key, 0, step.lanes), *leaves)


def _score(step: Choice, leaves: Values, values: Values) -> tuple[jax.Array, jax.Array]:
    """Λ and the baseline's part b (Λ - sg Λ), which is zero, summed over elements and lanes."""
    n = len(leaves)
    score, control = _over(step.lanes, lambda *a: step.rule.score(a[:n], a[n:]))(*leaves, *values)
    return _float(score.sum()), _float(control.sum())


def _alternatives(step: Choice, strategy: str, leaves: Values, values: Values, key: jax.Array) -> tuple[Any, Any]:
    """(options, lanes, elements, event) values and (options, lanes, elements) weights."""
    n = len(leaves)

    def one(key: jax.Array, *a: jax.Array) -> Any:
        return step.rule.alternatives(strategy, a[:n], a[n:], key)

    return _over(step.lanes, one, out_axes=1)(_keys(key, 1, step.lanes), *leaves, *values)


def _star(
    step: Choice, strategy: str, star: Star, leaves: Values, key: jax.Array, number: Any
) -> tuple[Values, jax.Array]:
    """The choice in one world, and the weights of all its worlds, (elements · options,).

    number: which of them, counted element by element; out of range for a world in which the choice is as sampled.
    """
    (value,) = values = _draw(step, strategy, leaves, key)
    options, weights = _alternatives(step, strategy, leaves, values, key)
    event = value.shape[weights.ndim - 1 :]
    options = options.reshape(star.options, star.elements, *event).astype(value.dtype)
    chosen = options[jnp.clip(number % star.options, 0, star.options - 1)]
    inside = (number >= 0) & (number < star.elements * star.options)
    hit = (jnp.arange(star.elements) == number // star.options) & inside
    flat = value.reshape(star.elements, *event)
    flat = jnp.where(hit.reshape(-1, *(1 for _ in event)), chosen, flat)
    return (flat.reshape(value.shape),), _float(weights.reshape(star.options, star.elements).T.reshape(-1))


def _combinations(support: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All joint values of the elements of a choice, (K^E, elements, event), and their log probabilities, (K^E,)."""
    k, elements = log_probs.shape[0], log_probs.shape[1:]
    n = math.prod(elements)
    event = support.shape[log_probs.ndim :]
    digits = (jnp.arange(k**n)[:, None] // k ** jnp.arange(n)[None, :]) % k
    each = jnp.arange(n)[None, :]
    values = support.reshape(k, n, *event)[digits, each].reshape(-1, *elements, *event)
    return values, log_probs.reshape(k, n)[digits, each].sum(-1)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.result_type(float))


# ---- inside loops and branches -----------------------------------------------------------------------------------------


class _Effects(NamedTuple):
    """What the choices inside left.

    score, control  sums of Λ and of b (Λ - sg Λ)
    lane            Λ of the choices that have the leave-one-out baseline, for the lanes around them
    weights         path -> weights of the worlds of that source, flat, loops first
    """

    score: jax.Array
    control: jax.Array
    lane: jax.Array
    weights: dict[Path, jax.Array]


def _nothing() -> _Effects:
    zero = jnp.zeros((), jnp.result_type(float))
    return _Effects(zero, zero, zero, {})


def _add(a: _Effects, b: _Effects) -> _Effects:
    return _Effects(a.score + b.score, a.control + b.control, a.lane + b.lane, {**a.weights, **b.weights})


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
        env = dict(zip(program.inputs, values, strict=True))
        effects = _nothing()
        for i, step in enumerate(program.steps):
            inputs = [a.value if isinstance(a, Const) else env[a] for a in step.inputs]
            if isinstance(step, Op):
                outs = step.run(*inputs)
            else:
                here = jax.random.fold_in(key, i)
                outs, left = self.step(step, inputs, here, world, (*path, i), repeat, outer)
                effects = _add(effects, left)
            env.update(zip(step.outputs, outs, strict=True))
        return [a.value if isinstance(a, Const) else env[a] for a in program.outputs], effects

    def step(
        self, step: Any, inputs: list[Any], key: jax.Array, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
        if isinstance(step, Choice):
            return self.choice(step, inputs, key, world, at, repeat)
        if isinstance(step, Scan):
            return self.scan(step, inputs, key, world, at, repeat, outer)
        if isinstance(step, Lanes):
            return self.lanes(step, inputs, key, world, at, repeat, outer)
        return self.cond(step, inputs, key, world, at, repeat, outer)

    def number(self, at: Path, world: Any, repeat: Any) -> Any:
        """Which alternative of the source at `at` this world is in this run of the loops; out of range if none."""
        star = self.plan.stars[at]
        return world - star.offset - repeat * (star.elements * star.options)

    def choice(
        self, step: Choice, leaves: list[Any], key: jax.Array, world: Any, at: Path, repeat: Any
    ) -> tuple[Values, _Effects]:
        strategy = self.plan.sites[at].strategy
        nothing = _nothing()
        if at in self.plan.stars:
            number = self.number(at, world, repeat)
            values, weights = _star(step, strategy, self.plan.stars[at], tuple(leaves), key, number)
            return values, nothing._replace(weights={at: weights})
        values = _draw(step, strategy, tuple(leaves), key)
        if strategy != "reinforce":
            return values, nothing
        score, control = _score(step, tuple(leaves), values)
        if leaves_one_out(step.rule):
            return values, nothing._replace(lane=score)
        return values, nothing._replace(score=score, control=control)

    def scan(
        self, step: Scan, inputs: list[Any], key: jax.Array, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
        n, c = step.n_consts, step.n_carry
        consts, init, rows = inputs[:n], inputs[n : n + c], inputs[n + c :]
        types = [jnp.result_type(x) for x in init]

        def body(carry: Any, row: Any) -> Any:
            t, *row = row
            here = jax.random.fold_in(key, t)
            outs, left = self.inner(
                step.body, [*consts, *carry, *row], here, world, at, repeat * step.length + t, outer * step.length
            )
            return [o.astype(d) for o, d in zip(outs[:c], types, strict=True)], (outs[c:], left)

        times = jnp.arange(step.length)
        carry, (ys, left) = lax.scan(body, list(map(jnp.asarray, init)), [times, *rows], step.length, step.reverse)
        return [*carry, *ys], _summed(left)

    def lanes(
        self, step: Lanes, inputs: list[Any], key: jax.Array, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
        consts, rows = inputs[: step.n_consts], inputs[step.n_consts :]

        def body(lane: Any, *row: Any) -> Any:
            here = jax.random.fold_in(key, lane)
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
        self, step: Cond, inputs: list[Any], key: jax.Array, world: Any, at: Path, repeat: Any, outer: int
    ) -> tuple[Sequence[Any], _Effects]:
        sources = {p: s for p, s in self.plan.stars.items() if p[: len(at)] == at and len(p) > len(at)}

        def branch(b: int) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                outs, left = self.inner(step.branches[b], operands, key, world, (*at, b), repeat, outer)
                outs = [jnp.asarray(o).astype(d) for o, d in zip(outs, types, strict=True)]
                zeros = {p: jnp.zeros(s.count // outer, left.score.dtype) for p, s in sources.items()}
                return outs, left._replace(weights={**zeros, **left.weights})

            return run

        first = step.branches[0]
        types = [jnp.result_type(a.value) if isinstance(a, Const) else first.types[a].dtype for a in first.outputs]
        index, *operands = inputs
        return lax.switch(index, [branch(b) for b in range(len(step.branches))], *operands)

    # ---- at the top level ----------------------------------------------------------------------------------------------

    def top(self, program: Program, args: Sequence[Any], key: jax.Array) -> jax.Array:
        env: dict[int, tuple[World, ...]] = {v: (_plain(x),) for v, x in zip(program.inputs, args, strict=True)}

        def read(atom: Any) -> tuple[World, ...]:
            return (_plain(atom.value),) if isinstance(atom, Const) else env[atom]

        factors: list[_Factor] = []
        for i, step in enumerate(program.steps):
            inputs = list(map(read, step.inputs))
            if isinstance(step, Op):
                env.update(zip(step.outputs, self.op(step, inputs), strict=True))
                continue
            outs, factor = self.factor(step, list(map(_merged, inputs)), jax.random.fold_in(key, i), i)
            env.update(zip(step.outputs, ((o,) for o in outs), strict=True))
            factors.append(factor)
        (output,) = program.outputs
        return self.take_out(list(read(output)), factors)

    def lift(
        self, f: Callable[..., Any], inputs: Sequence[World], reach: frozenset[int] = frozenset(), source: bool = False
    ) -> tuple[Any, Any, tuple[int, ...], frozenset[int]]:
        """f(world, *values) in the sampled world and in the alternative ones, for all values on the axes of the inputs."""
        axes = tuple(sorted(set().union(*(w.axes for w in inputs)))) if inputs else ()
        if math.prod(self.sizes[a] for a in axes) > self.max_worlds:
            raise TooManyWorlds(frozenset(axes))
        reach = reach.union(*(w.reach for w in inputs)) if inputs else reach
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

    def op(self, step: Op, inputs: list[tuple[World, ...]]) -> list[tuple[World, ...]]:
        """A computation without choices; sums and what is linear in a sum keep its terms apart."""
        if all(len(ws) == 1 and ws[0].is_plain for ws in inputs):
            return [(_plain(x),) for x in step.run(*(ws[0].value for ws in inputs))]
        terms = _linear(step, inputs)
        if terms is not None:
            return [_collected([self.apply(step, t)[0] for t in terms])]
        return [(w,) for w in self.apply(step, list(map(_merged, inputs)))]

    def apply(self, step: Op, inputs: Sequence[World]) -> list[World]:
        outs, others, axes, reach = self.lift(lambda _, *v: step.run(*v), inputs)
        return [World(x, axes, None if others is None else others[k], reach) for k, x in enumerate(outs)]

    def factor(self, step: Any, inputs: list[World], key: jax.Array, i: int) -> tuple[list[World], _Factor]:
        """The values of a choice, loop or branch, and what is to be done when it is taken out."""
        if isinstance(step, Choice) and self.plan.sites[(i,)].exact:
            return self.enumerated(step, inputs, key, i)
        sources = {p: s for p, s in self.plan.stars.items() if p[0] == i}

        def run(world: Any, *values: Any) -> Any:
            return self.step(step, list(values), key, world, (i,), 0, 1)

        (outs, left), others, axes, reach = self.lift(run, inputs, source=bool(sources))
        mine = reach | {i}
        worlds = [World(x, axes, None if others is None else others[0][k], mine) for k, x in enumerate(outs)]
        scored = any(s.strategy == "reinforce" for p, s in self.plan.sites.items() if p[0] == i)
        score = World(left.score, axes, None, reach) if scored else None
        control = World(-left.control, axes, None, reach)
        weights = [(sources[p], World(w, axes, None, reach)) for p, w in left.weights.items()]
        return worlds, _Factor(i, None, score, control, weights, any(map(_has_baseline, _rules(step))))

    def enumerated(self, step: Choice, inputs: list[World], key: jax.Array, i: int) -> tuple[list[World], _Factor]:
        def support(*leaves: Any) -> Any:
            values, log_probs = _over(step.lanes, lambda *ls: step.rule.support(ls), out_axes=1)(*leaves)
            return _combinations(values, log_probs)

        (values, log_probs), others, axes, reach = self.lift(lambda _, *leaves: support(*leaves), inputs)
        self.sizes[i] = log_probs.shape[-1]
        if math.prod(self.sizes[a] for a in (*axes, i)) > self.max_worlds:
            raise TooManyWorlds(frozenset((*axes, i)))
        probs = World(
            jnp.exp(log_probs), (*axes, i), None if others is None else jnp.exp(others[1]), reach
        )
        # Values that do not depend on the parameters are the same on all other axes, and need none of them.
        first = [w.value[(0,) * len(w.axes)] for w in inputs]
        if not depends(lambda *leaves: support(*leaves)[0], *first):
            return [World(support(*map(sg, first))[0], (i,), None, frozenset())], _Factor(i, probs, None, _plain(0.0), [], False)
        value = World(sg(values), (*axes, i), None if others is None else others[0], reach)
        return [value], _Factor(i, probs, None, _plain(0.0), [], False)

    def take_out(self, terms: list[World], factors: list[_Factor]) -> jax.Array:
        """The expectation of the sum of the terms, choice by choice, the last one first."""
        for factor in reversed(factors):
            i = factor.step
            touched = [t for t in terms if i in t.axes or i in t.reach]
            if not touched:
                continue
            # A baseline is compared with the whole result, not only with the terms that the draw reaches.
            rest = [] if factor.has_baseline else [t for t in terms if i not in t.axes and i not in t.reach]
            touched = terms if factor.has_baseline else touched
            terms = rest
            if factor.probs is not None:
                terms += [_expected(t, factor.probs, i) for t in touched]
            else:
                terms += [_weighted(t, factor) for t in touched]
                if factor.has_baseline:
                    terms.append(factor.control)
            terms = list(_collected(terms))
        return sum((t.value for t in terms[1:]), terms[0].value)


def _summed(left: _Effects) -> _Effects:
    """Effects of a loop: sums over its steps; weights with the loop in front."""
    weights = {p: w.reshape(-1) for p, w in left.weights.items()}
    return _Effects(left.score.sum(), left.control.sum(), left.lane.sum(), weights)


def _row(number: Any, x: jax.Array) -> jax.Array:
    return (jnp.arange(x.shape[0]) == number).reshape(-1, *(1 for _ in x.shape[1:]))


def _from_others(x: jax.Array) -> jax.Array:
    """For every lane something that does not depend on it: the mean of the others, for integers the next one's value."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return (x.sum(0, keepdims=True) - x) / (x.shape[0] - 1)
    return jnp.roll(x, 1, axis=0)


# ---- values in many worlds ---------------------------------------------------------------------------------------------


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


class _Factor(NamedTuple):
    """step: of the choice; probs: if enumerated; score, control: Λ and -b (Λ - sg Λ); weights: of its worlds."""

    step: int
    probs: World | None
    score: World | None
    control: World
    weights: list[tuple[Star, World]]
    has_baseline: bool


def _rules(step: Any) -> list[Any]:
    """The rules of all choices of a step."""
    if isinstance(step, Choice):
        return [step.rule]
    programs = step.branches if isinstance(step, Cond) else () if isinstance(step, Op) else (step.body,)
    return [rule for program in programs for inner in program.steps for rule in _rules(inner)]


def _has_baseline(rule: Any) -> bool:
    return getattr(rule, "has_baseline", False)


def _plain(x: Any) -> World:
    return World(x, (), None, frozenset())


def _aligned(x: Any, axes: tuple[int, ...], union: tuple[int, ...], lead: int = 0) -> Any:
    """Insert axes of length one, so that `x` has all axes of `union` after `lead` leading ones."""
    shape = list(jnp.shape(x))
    for k, a in enumerate(union):
        if a not in axes:
            shape.insert(lead + k, 1)
    return jnp.reshape(x, shape)


def _plus(a: World, b: World) -> World:
    union = tuple(sorted({*a.axes, *b.axes}))
    value = _aligned(a.value, a.axes, union) + _aligned(b.value, b.axes, union)
    others = None
    if a.others is not None or b.others is not None:
        x, y = (
            _aligned(sg(w.value), w.axes, union)[None] if w.others is None else _aligned(w.others, w.axes, union, 1)
            for w in (a, b)
        )
        others = x + y
    return World(value, union, others, a.reach | b.reach)


def _merged(terms: tuple[World, ...]) -> World:
    """The sum of the terms as one value with all their axes."""
    total = terms[0]
    for t in terms[1:]:
        total = _plus(total, t)
    return total


def _collected(terms: Sequence[World]) -> tuple[World, ...]:
    """Terms that depend on the same choices, added up."""
    groups: dict[Any, World] = {}
    for t in terms:
        alike = (t.axes, t.reach, t.others is None)
        groups[alike] = _plus(groups[alike], t) if alike in groups else t
    return tuple(groups.values())


_LINEAR = frozenset(
    "neg reduce_sum broadcast_in_dim reshape squeeze transpose expand_dims slice rev copy copy_p real "
    "convert_element_type reduce_precision stop_gradient".split()
)


def _linear(step: Op, inputs: list[tuple[World, ...]]) -> list[list[World]] | None:
    """The inputs of each term of the result, if the op is linear in the input that is a sum; None if it is not."""
    if step.name in _LINEAR and len(inputs) == 1:
        if step.name == "convert_element_type" and not _both_float(step, inputs[0][0]):
            return None
        return [[t] for t in inputs[0]]
    if step.name in ("add", "add_any", "sub") and len(inputs) == 2:
        zero = [_plain(jnp.zeros_like(ws[0].value[(0,) * len(ws[0].axes)])) for ws in inputs]
        if all(len(ws) == 1 for ws in inputs) and _alike(inputs[0][0], inputs[1][0]):
            return [[inputs[0][0], inputs[1][0]]]
        return [[t, zero[1]] for t in inputs[0]] + [[zero[0], t] for t in inputs[1]]
    if step.name in ("mul", "div") and len(inputs) == 2:
        a, b = inputs
        if len(b) == 1 and b[0].is_plain:
            return [[t, b[0]] for t in a]
        if step.name == "mul" and len(a) == 1 and a[0].is_plain:
            return [[a[0], t] for t in b]
    return None


def _both_float(step: Op, w: World) -> bool:
    return bool(jnp.issubdtype(step.params["new_dtype"], jnp.inexact) and jnp.issubdtype(w.value.dtype, jnp.inexact))


def _alike(a: World, b: World) -> bool:
    return a.axes == b.axes and a.reach == b.reach and (a.others is None) == (b.others is None)


def _expected(t: World, probs: World, i: int) -> World:
    """Σ over the values of choice i of p t."""
    union = tuple(sorted({*t.axes, *probs.axes}))
    at = union.index(i)
    value = (_aligned(t.value, t.axes, union) * _aligned(probs.value, probs.axes, union)).sum(at)
    others = None
    if t.others is not None or probs.others is not None:
        x, p = (
            _aligned(sg(w.value), w.axes, union)[None] if w.others is None else _aligned(w.others, w.axes, union, 1)
            for w in (t, probs)
        )
        others = sg((x * p).sum(1 + at))
    return World(value, union[:at] + union[at + 1 :], others, t.reach | probs.reach)


def _weighted(t: World, factor: _Factor) -> World:
    """The term with the score and the alternative worlds of a choice accounted for."""
    parts = [w for w in (factor.score, *(w for _, w in factor.weights)) if w is not None]
    union = tuple(sorted({*t.axes, *(a for w in parts for a in w.axes)}))
    reach = (t.reach - {factor.step}).union(*(w.reach for w in parts))
    value = sampled = _aligned(t.value, t.axes, union)
    if factor.score is not None:
        score = _aligned(factor.score.value, factor.score.axes, union)
        value = value * jnp.exp(score - sg(score)).astype(value.dtype)
    if t.others is not None:
        others = _aligned(t.others, t.axes, union, 1)
        for star, weights in factor.weights:
            w = jnp.moveaxis(weights.value, -1, 0)
            w = _aligned(w, weights.axes, union, 1).astype(value.dtype)
            gain = others[star.offset : star.offset + star.count] - sampled[None]
            value = value + (sg(gain) * w).sum(0)
    return World(value, union, t.others if union == t.axes else _wide(t, union), reach)


def _wide(t: World, union: tuple[int, ...]) -> Any:
    return None if t.others is None else _aligned(t.others, t.axes, union, 1)
