"""Exact enumeration in a scan: which loops are Markov chains with additive costs, and the sums that they need.

A scan with one enumerated choice z_t per step is summed over exactly, at K² evaluations of its body per step, if what
it carries is of three kinds: what no choice reaches; the *state*, a function of z_t and of nothing else that is random;
and *sums*, to which each step adds something that depends on z_{t-1} (through the state) and z_t.  Whatever else the scan
returns per step may depend on both too.  Sums and rows leave the loop as expectations, so the result must be affine in
them; the last state leaves it with its distribution, for any use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi.jaxpr import Atom, Choice, Const, Op, Program, Scan

Kind = Literal["fixed", "state", "sum"]
LINEAR = frozenset([
    "neg", "reduce_sum", "broadcast_in_dim", "reshape", "squeeze", "transpose", "expand_dims", "slice", "rev", "copy",
    "copy_p", "real", "stop_gradient",
])  # fmt: skip
_SAME = frozenset(["copy", "copy_p"])


class Chain(NamedTuple):
    """carry: the kind of each carried value; rows: whether each output per step is random; choice: its step in the body."""

    choice: int
    carry: tuple[Kind, ...]
    rows: tuple[bool, ...]


def chain(program: Program, at: int) -> Chain | None:
    """The scan at step `at` of a program as a chain; None if it is not one, or if the result is not affine in its sums."""
    scan = program.steps[at]
    if not isinstance(scan, Scan):
        return None
    found = _classified(scan)
    if found is None:
        return None
    expected = [kind == "sum" for kind in found.carry] + list(found.rows)
    sums = {v for v, e in zip(scan.outputs, expected, strict=True) if e}
    live, not_affine = _uses(program)
    # An expectation of integers is not an integer.
    whole = {v for v in sums & live if not jnp.issubdtype(program.types[v].dtype, jnp.inexact)}
    return None if whole or sums & not_affine else found


def _classified(scan: Scan) -> Chain | None:
    body = scan.body
    choices = [j for j, step in enumerate(body.steps) if not isinstance(step, Op)]
    if len(choices) != 1 or not isinstance(body.steps[choices[0]], Choice):
        return None
    n, c = scan.n_consts, scan.n_carry
    carried = body.inputs[n : n + c]
    depends: dict[int, frozenset[int]] = {v: frozenset() for v in body.inputs}  # on carried values, and -1 for z
    depends.update({v: frozenset([k]) for k, v in enumerate(carried)})
    uses = {v: 0 for v in carried}

    def reach(atoms: tuple[Atom, ...]) -> frozenset[int]:
        return frozenset().union(*(depends[a] for a in atoms if not isinstance(a, Const)))

    for step in body.steps:
        for a in step.inputs:
            if not isinstance(a, Const) and a in uses:
                uses[a] += 1
        found = frozenset([-1]) if isinstance(step, Choice) else reach(step.inputs)
        depends.update({v: found for v in step.outputs})
    outs = [reach((a,)) for a in body.outputs]
    random = {-1}
    while True:
        grown = random | {k for k in range(c) if outs[k] & random}
        if grown == random:
            break
        random = grown
    kinds: list[Kind] = []
    for k in range(c):
        if k not in random:
            kinds.append("fixed")
        elif not outs[k] & (random - {-1}):
            kinds.append("state")
        elif uses[carried[k]] == 1 and _adds(body, body.outputs[k], carried[k], depends, k):
            kinds.append("sum")
        else:
            return None
    sums = {k for k, kind in enumerate(kinds) if kind == "sum"}
    choice = body.steps[choices[0]]
    if reach(choice.inputs) & sums or any(o & sums for o in outs[c:]):
        return None
    if any(outs[k] & (sums - {k}) for k in range(c)):
        return None
    return Chain(choices[0], tuple(kinds), tuple(bool(o & random) for o in outs[c:]))


def _adds(body: Program, out: Atom, old: int, depends: dict[int, frozenset[int]], k: int) -> bool:
    """Whether `out` is the old value of carry k plus what does not depend on it."""
    makers = {v: step for step in body.steps for v in step.outputs}
    while not isinstance(out, Const):
        if out == old:
            return True
        step = makers.get(out)
        if not isinstance(step, Op):
            return False
        through = [a for a in step.inputs if not isinstance(a, Const) and k in depends[a]]
        linear = (
            step.name in _SAME
            or keeps_floats(step, [body.types[a] for a in through])
            or step.name in ("add", "add_any")
            or (step.name == "sub" and step.inputs[0] in through)
        )
        if not linear or len(through) != 1:
            return False
        out = through[0]
    return False


def keeps_floats(step: Op, inputs: Sequence[Any]) -> bool:
    """A cast from float to float, given what is cast."""
    if step.name != "convert_element_type":
        return False
    return all(jnp.issubdtype(t, jnp.inexact) for t in (step.params["new_dtype"], *(x.dtype for x in inputs)))


def _uses(program: Program) -> tuple[set[int], set[int]]:
    """The variables that the result needs, and those in which it is not affine with coefficients free of choices."""
    random: set[int] = set()
    for step in program.steps:
        if not isinstance(step, Op) or any(not isinstance(a, Const) and a in random for a in step.inputs):
            random.update(step.outputs)
    live = {a for a in program.outputs if not isinstance(a, Const)}
    bad: set[int] = set()
    for step in reversed(program.steps):
        if not live & set(step.outputs):
            continue
        spoilt = bool(bad & set(step.outputs))
        for position, a in enumerate(step.inputs):
            if isinstance(a, Const):
                continue
            live.add(a)
            others = [b for k, b in enumerate(step.inputs) if k != position and not isinstance(b, Const)]
            if spoilt or not _affine(step, position, any(b in random for b in others), program.types[a]):
                bad.add(a)
    return live, bad


def _affine(step: Any, position: int, others_random: bool, kind: Any) -> bool:
    if not isinstance(step, Op):
        return False
    if step.name in LINEAR or step.name in ("add", "add_any", "sub"):
        return True
    if step.name == "convert_element_type":
        return keeps_floats(step, [kind])
    return not others_random and (step.name == "mul" or (step.name == "div" and position == 0))


def enumerated_scan(
    scan: Scan, found: Chain, values: list[Any], size: int, support: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[list[Any], jax.Array]:
    """The outputs of the scan (states with the K values of the last choice in front), and that choice's distribution.

    support(leaves) -> all K values of the choice with its lanes and elements, and their probabilities
    """
    n, c = scan.n_consts, scan.n_carry
    consts, init, rows = values[:n], [jnp.asarray(x) for x in values[n : n + c]], values[n + c :]
    types = [x.dtype for x in init]

    def body(carry: list[Any], row: list[Any], z: Any) -> tuple[list[Any], jax.Array]:
        env: dict[int, Any] = dict(zip(scan.body.inputs, [*consts, *carry, *row], strict=True))
        prob = jnp.ones(())
        for j, step in enumerate(scan.body.steps):
            inputs = [a.value if isinstance(a, Const) else env[a] for a in step.inputs]
            if j == found.choice:
                options, probs = support(*inputs)
                outs, prob = [lax.stop_gradient(options)[z]], probs[z]
            else:
                assert isinstance(step, Op)
                outs = step.run(*inputs)
            env.update(zip(step.outputs, outs, strict=True))
        return [a.value if isinstance(a, Const) else env[a] for a in scan.body.outputs], prob

    state_axes = [0 if kind == "state" else None for kind in found.carry]
    options = jnp.arange(size)

    def step(carry: Any, row: Any) -> Any:
        before, held = carry
        start = [jnp.zeros_like(x) if kind == "sum" else x for x, kind in zip(held, found.carry, strict=True)]
        each = jax.vmap(jax.vmap(body, (None, None, 0)), (state_axes, None, None), axis_size=size)
        outs, prob = each(start, row, options)
        joint = before[:, None] * prob

        def mean(x: Any) -> Any:
            # Whole numbers come here only where nothing uses their mean.
            return jnp.tensordot(joint.astype(jnp.promote_types(x.dtype, joint.dtype)), x, 2).astype(x.dtype)

        after = []
        for x, old, kind, dtype in zip(outs[:c], held, found.carry, types, strict=True):
            new = old + mean(x) if kind == "sum" else x[0] if kind == "state" else x[0, 0]
            after.append(new.astype(dtype))
        ys = [mean(y) if random else y[0, 0] for y, random in zip(outs[c:], found.rows, strict=True)]
        return (joint.sum(0), after), ys

    first = jnp.zeros(size).at[0].set(1.0)
    spread = [
        jnp.broadcast_to(x, (size, *x.shape)) if kind == "state" else x
        for x, kind in zip(init, found.carry, strict=True)
    ]
    (last, held), ys = lax.scan(step, (first, spread), rows, scan.length, scan.reverse)
    return [*held, *ys], last
