"""Which pathwise draws lose their derivative on the way to the result.

A reparameterised draw may be used continuously only (smoothness types of Lew, Huot, Staton, Mansinghka, POPL 2023): the
derivative of E 1[x > 0] is not the expectation of a derivative of 1[x > 0].  The analysis follows, for every variable, the
pathwise draws that it depends on continuously, and those on which it depends through a comparison, rounding, index or cast.
A draw of the second kind that reaches the result, or a parameter of another choice, is reported; what is computed and
not used is not.

Taken to be harmless are comparisons inside the functions listed in `vi.jaxpr.CONTINUOUS` (relu, softplus, clip, ...) and inside
functions marked with `vi.continuous`; tests for NaN and infinity, which are true with probability zero; and conditions
of which one outcome is a constant that is infinite or NaN (a density outside its support), as long as what is computed from it
stays infinite or NaN, since that shows in the result: the exponential of minus infinity is zero and does not.

Not seen are jumps without a comparison: x / |x|, arctan(1 / x), and NaN as a test (isnan(log x) of an x of either sign).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi.chains import LINEAR
from vi.jaxpr import (
    Atom,
    Choice,
    Cond,
    Const,
    Lanes,
    Op,
    Program,
    Scan,
    scan_counts,
    subprograms,
)

Path = tuple[int, ...]

_COMPARISONS = frozenset([
    "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to", "sign", "argmax", "argmin", "reduce_argmax",
    "nextafter", "atan2",
])  # fmt: skip
_MOVED = frozenset(["broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape"])
# Of infinity they make infinity or NaN.
_KEEPS_INFINITY = (
    LINEAR
    | _MOVED
    | frozenset(
        [
            "add",
            "add_any",
            "sub",
            "mul",
            "select_n",
            "reduce_precision",
            "abs",
            "square",
            "sqrt",
            "log",
            "log1p",
            "cumsum",
            "dot_general",
        ]
    )
)
_ROUNDING = frozenset(["floor", "ceil", "round", "rem"])
_BITS = frozenset([
    "bitcast_convert_type", "reduce_and", "reduce_or", "and", "or", "not", "xor", "shift_left",
    "population_count", "clz",
])  # fmt: skip
# Inputs that are positions and not values: from the given one on.
_POSITIONS = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
_SCATTER = 1  # operand, indices, updates
_UNKNOWN = frozenset(["pure_callback", "io_callback", "custom_call", "ffi_call"])


class _Taint(NamedTuple):
    """What is known of a value.

    smooth     draws it depends on continuously
    lost       draws it depends on otherwise, with the reason
    masked     draws that decide whether it is infinite or NaN, with the reason
    undefined  a constant that is infinite or NaN
    """

    smooth: frozenset[Path]
    lost: tuple[tuple[Path, str], ...]
    masked: tuple[tuple[Path, str], ...] = ()
    undefined: bool = False

    def __or__(self, other: _Taint) -> _Taint:
        return _Taint(self.smooth | other.smooth, _both(self.lost, other.lost), _both(self.masked, other.masked))


_CLEAN = _Taint(frozenset(), ())
_Reasons = tuple[tuple[Path, str], ...]


def _both(a: _Reasons, b: _Reasons) -> _Reasons:
    mine = dict(a)
    return (*a, *((p, r) for p, r in b if p not in mine))


def _lose(taint: _Taint, reason: str) -> _Taint:
    """A discontinuous function of the value."""
    here = tuple((p, reason) for p in sorted(taint.smooth))
    return _Taint(frozenset(), _both(_both(taint.lost, taint.masked), here))


def _unmask(taint: _Taint) -> _Taint:
    """A function that may turn infinity into a number."""
    return taint._replace(lost=_both(taint.lost, taint.masked), masked=())


def discontinuous(program: Program, pathwise: frozenset[Path]) -> dict[Path, str]:
    """Path -> reason, for the choices among `pathwise` whose derivative is lost on the way to the result."""
    reached: dict[Path, str] = {}
    outs = _follow(program, [_CLEAN] * len(program.inputs), (), pathwise, reached)
    for taint in outs:
        reached.update({p: r for p, r in taint.lost if p not in reached})
    return reached


def _follow(
    program: Program, inputs: list[_Taint], path: Path, pathwise: frozenset[Path], reached: dict[Path, str]
) -> list[_Taint]:
    env: dict[int, _Taint] = dict(zip(program.inputs, inputs, strict=True))

    def read(atom: Atom) -> _Taint:
        return _constant(atom.value) if isinstance(atom, Const) else env[atom]

    for i, step in enumerate(program.steps):
        at = (*path, i)
        taints = [read(a) for a in step.inputs]
        if isinstance(step, Op):
            types = [program.types[v].dtype for v in step.outputs]
            outs = _op(step, taints, reached)
            if not (step.trusted or step.name.startswith("lu")):
                outs = [_typed(t, d) for t, d in zip(outs, types, strict=True)]
        elif isinstance(step, Choice):
            # The parameters matter to the law of the draw, whatever its estimator.
            for taint in map(_unmask, taints):
                reached.update({p: r for p, r in taint.lost if p not in reached})
            smooth = _union(taints).smooth | {at} if at in pathwise else frozenset()
            outs = [_Taint(smooth, ())] * len(step.outputs)
        elif isinstance(step, Scan | Lanes):
            carry = step.n_carry if isinstance(step, Scan) else 0
            outs = _loop(step.body, taints, step.n_consts, carry, at, pathwise, reached)
        else:
            outs = _branches(step, taints, at, pathwise, reached)
        env.update(zip(step.outputs, outs, strict=True))
    return [read(a) for a in program.outputs]


def _union(taints: list[_Taint]) -> _Taint:
    out = _CLEAN
    for taint in taints:
        out = out | taint
    return out


def _loop(
    body: Program, taints: list[_Taint], n_consts: int, n_carry: int, at: Path, pathwise: frozenset[Path], reached: dict
) -> list[_Taint]:
    """To the fixed point of what is carried."""
    consts, carry, rows = taints[:n_consts], taints[n_consts : n_consts + n_carry], taints[n_consts + n_carry :]
    while True:
        outs = _follow(body, [*consts, *carry, *rows], at, pathwise, reached)
        grown = [a | b for a, b in zip(carry, outs[:n_carry], strict=True)]
        if all(
            set(g.smooth) == set(c.smooth) and set(g.lost) == set(c.lost) and set(g.masked) == set(c.masked)
            for g, c in zip(grown, carry, strict=True)
        ):
            return outs
        carry = grown


def _branches(step: Cond, taints: list[_Taint], at: Path, pathwise: frozenset[Path], reached: dict) -> list[_Taint]:
    index = _lose(taints[0], "the condition of a cond or switch")
    outs = [_CLEAN] * len(step.outputs)
    for b, branch in enumerate(step.branches):
        found = _follow(branch, taints[1:], (*at, b), pathwise, reached)
        outs = [x | y for x, y in zip(outs, found, strict=True)]
    return [x | index for x in outs]


def _constant(value: Any) -> _Taint:
    """Of a scalar: whether it is infinite or NaN."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) or not _inexact(jnp.result_type(value)):
        return _CLEAN
    return _CLEAN._replace(undefined=not np.isfinite(float(np.real(value))))


def _typed(taint: _Taint, dtype: object) -> _Taint:
    """Nothing is a continuous function to the integers."""
    return taint if _inexact(dtype) else _lose(taint, f"a cast to {dtype}")


def _op(op: Op, taints: list[_Taint], reached: dict[Path, str]) -> list[_Taint]:
    n = len(op.outputs)
    everything = _union(taints)
    if op.trusted:
        return [everything] * n
    if op.name in _MOVED and taints[0].undefined:
        return [taints[0]]
    if op.name in ("mul", "neg") and any(t.undefined for t in taints):
        return [everything._replace(undefined=True)]
    if op.name == "select_n" and any(t.undefined for t in taints[1:]):
        others = _union([t for t in taints[1:] if not t.undefined])
        return [others._replace(masked=_both(others.masked, _lose(taints[0], "a comparison").lost))]
    if op.name not in _KEEPS_INFINITY:
        # What is divided stays infinite; what divides does not.
        taints = [t if op.name == "div" and k == 0 else _unmask(t) for k, t in enumerate(taints)]
        everything = _union(taints)
    if op.name.startswith("lu"):  # what is made of a factorisation does not depend on its pivots
        return [_Taint(everything.smooth, everything.lost)] * n
    if not everything.smooth:
        return [everything] * n
    if op.name in _COMPARISONS:
        # x != x asks for NaN.
        if (op.name in ("ne", "eq") and op.inputs[0] == op.inputs[1]) or any(t.undefined for t in taints):
            return [_Taint(frozenset(), everything.lost)] * n
        return [_lose(everything, f"a comparison ({op.name})")] * n
    if op.name == "is_finite":
        return [_Taint(frozenset(), everything.lost)] * n
    if op.name in _ROUNDING:
        return [_lose(everything, f"rounding ({op.name})")] * n
    if op.name in _BITS:
        return [_lose(everything, f"an operation on bits ({op.name})")] * n
    if op.name in _UNKNOWN:
        return [_lose(everything, f"a function that cannot be looked into ({op.name})")] * n
    if op.name in _POSITIONS or op.name.startswith("scatter"):
        first = _POSITIONS.get(op.name, _SCATTER)
        last = first + 1 if op.name != "dynamic_slice" and op.name != "dynamic_update_slice" else len(taints)
        positions = _lose(_union(taints[first:last]), f"an index ({op.name})")
        return [_union([*taints[:first], *taints[last:]]) | positions] * n
    if (op.name == "sort" and op.params.get("num_keys", 1) < len(taints)) or op.name == "top_k":
        return _order(op, taints, n)
    if op.name == "cond":
        index = _lose(taints[0], "the condition of a cond or switch")
        outs = [_CLEAN] * n
        for branch in subprograms(op):
            found = _follow(branch, taints[1:], (), frozenset(), reached)
            outs = [x | y for x, y in zip(outs, found, strict=True)]
        return [x | index for x in outs]
    if op.name == "scan":
        (body,) = subprograms(op)
        consts, carry = scan_counts(op.params)
        return _loop(body, taints, consts, carry, (), frozenset(), reached)
    if op.name == "while":
        return [_lose(everything, "a while loop")] * n
    bodies = list(subprograms(op))
    if len(bodies) == 1 and len(bodies[0].inputs) == len(taints) and len(bodies[0].outputs) == n:
        return _follow(bodies[0], taints, (), frozenset(), reached)
    return [everything] * n


def _order(op: Op, taints: list[_Taint], n: int) -> list[_Taint]:
    """Sorting moves its other operands about by comparing the keys; the sorted keys themselves are continuous."""
    if op.name == "top_k":
        return [taints[0], _lose(taints[0], "an index (top_k)")]
    keys = op.params["num_keys"]
    moved = _lose(_union(taints[:keys]), "the order in a sort")
    return [taint if k < keys == 1 else taint | moved for k, taint in enumerate(taints)]


def _inexact(dtype: object) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))  # type: ignore[arg-type]
