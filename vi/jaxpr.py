"""Staging a function with random choices into a small program; the only file that touches JAX internals.

`choose` leaves a random choice in the program as one equation of a primitive of ours, which has no meaning of its own: whoever
runs the program decides what becomes of it.  It keeps its identity under jit, scan and cond, and under vmap it becomes
a choice with one more leading axis of *lanes*, each with randomness of its own, also where none of its parameters
differs between the lanes.

`stage` turns a function into a `Program`: a list of steps

    Op      any computation without a random choice in it
    Choice  a random choice
    Scan    lax.scan whose body has a random choice
    Cond    lax.cond or lax.switch with a random choice in some branch
    Lanes   `lanes`: a function that has random choices, evaluated for every lane

Calls of jitted functions are written out; what comes from a function of `CONTINUOUS` is marked for `vi.legality`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from vi.errors import StrategyError

CONTINUOUS_MARK = "vi_continuous_"
_LANES = "vi_lanes"
_STAGING = ContextVar("staging", default=False)
_JITS = ("pjit", "jit")

_HOME = str(Path(jax.__file__).parent)  # a function of the user's that has such a name is not trusted for it

# Functions of JAX that compare, round or index inside and are continuous all the same, under the names of their calls.
CONTINUOUS = frozenset([
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "hard_tanh", "hard_sigmoid",
    "hard_silu", "softplus", "log_sigmoid", "squareplus", "sparse_plus", "logaddexp", "logaddexp2", "logsumexp",
    "softmax", "log_softmax", "clip", "xlogy", "xlog1py", "entr", "kl_div", "rel_entr", "sinc", "hypot", "norm",
    "logit", "expit", "sigmoid", "gammaln", "betaln", "erf_inv", "ndtri", "log_ndtr",
])  # fmt: skip


@dataclass(frozen=True, eq=False)
class Const:
    """A value that is known when the program is staged."""

    value: Any


Atom = int | Const  # a variable of the program, or a constant


@dataclass(frozen=True, eq=False)
class Op:
    """name: JAX's name of the primitive; run: values -> list of values; trusted: part of a continuous function."""

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    run: Callable[..., list[Any]]
    params: dict[str, Any]
    bodies: tuple[Any, ...]  # jaxprs inside, for `subprograms`
    trusted: bool


@dataclass(frozen=True, eq=False)
class Choice:
    """rule: what `choose` was given; lanes: the leading axes that vmap added."""

    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    rule: Any
    lanes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scan:
    """inputs: constants of the body, then its carry, then what it scans over."""

    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    body: Program
    n_consts: int
    n_carry: int
    length: int
    reverse: bool


@dataclass(frozen=True, eq=False)
class Cond:
    """inputs: the index of the branch, then the operands."""

    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    branches: tuple[Program, ...]


@dataclass(frozen=True, eq=False)
class Lanes:
    """inputs: what all lanes share, then what has one row per lane."""

    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    body: Program
    n_consts: int
    length: int


Step = Op | Choice | Scan | Cond | Lanes


@dataclass(frozen=True, eq=False)
class Program:
    """inputs and outputs as the staged function's, flattened; types: shape and type of every variable."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Atom, ...]
    types: dict[int, jax.ShapeDtypeStruct]


# ---- the primitive -----------------------------------------------------------------------------------------------------

_choice_p = core.Primitive("random_choice")
_choice_p.multiple_results = True


def choose(leaves: Sequence[Any], rule: Any, outputs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """A random choice with parameters `leaves`, outputs of the given shapes and types; `rule` says the rest."""
    avals = tuple(jax.core.ShapedArray(o.shape, o.dtype) for o in outputs)
    return _choice_p.bind(*map(jnp.asarray, leaves), rule=rule, avals=avals, lanes=())


def _outside(rule: Any) -> StrategyError:
    return StrategyError(
        f"{rule.label}: a random choice outside an expectation; put the function that draws it under vi.expectation"
    )


def _choice_impl(*_leaves: Any, rule: Any, avals: Any, lanes: Any) -> Any:
    raise _outside(rule)


def _choice_lowering(_ctx: Any, *_leaves: Any, rule: Any, avals: Any, lanes: Any) -> Any:
    raise _outside(rule)


def _choice_abstract(*_leaves: Any, rule: Any, avals: Any, lanes: Any) -> Any:
    return [jax.core.ShapedArray((*lanes, *a.shape), a.dtype) for a in avals]


def _choice_jvp(_primals: Any, _tangents: Any, *, rule: Any, avals: Any, lanes: Any) -> Any:
    raise StrategyError(
        f"{rule.label}: differentiated inside its expectation; take jax.grad of the expectation, not of a part of it"
    )


def _choice_batch(axis_data: Any, leaves: Any, dims: Any, *, rule: Any, avals: Any, lanes: Any) -> Any:
    """One more axis of lanes, in front; called also when no parameter is batched."""
    size = axis_data.size
    rows = [
        jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))) if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    outs = _choice_p.bind(*rows, rule=rule, avals=avals, lanes=(size, *lanes))
    return outs, [0] * len(outs)


_choice_p.def_impl(_choice_impl)
_choice_p.def_abstract_eval(_choice_abstract)
ad.primitive_jvps[_choice_p] = _choice_jvp
batching.fancy_primitive_batchers[_choice_p] = _choice_batch
mlir.register_lowering(_choice_p, _choice_lowering)


# ---- what else the package needs to know of JAX ------------------------------------------------------------------------


def trace_state() -> Any:
    """What identifies the transformation that is being traced; equal (==) as long as none is entered or left."""
    where = core if hasattr(core, "get_opaque_trace_state") else jax.core  # it moved
    return where.get_opaque_trace_state(convention="flax")


def traced_afresh() -> AbstractContextManager[Any]:
    """Inside, functions that were jitted and run outside are traced anew: their effects on Python (sites of NumPyro) are seen.

    The mark is part of the key under which JAX keeps traces, and means nothing to the compiler.
    """
    return set_xla_metadata(vi_program="")


def continuous(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` under a name that `vi.legality` takes as a promise of continuity, and that tells how many arrays it returns."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            return f(*args, **kwargs)

        out = jax.tree.leaves(jax.eval_shape(f, *args, **kwargs))
        for leaf in out:
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise StrategyError(f"continuous: the function returns {leaf.dtype}; expected real numbers")
        marked.__name__ = marked.__qualname__ = f"{CONTINUOUS_MARK}{len(out)}_{getattr(f, '__name__', 'function')}"
        return jax.jit(marked)(*args, **kwargs)

    return call


def lanes(f: Callable[..., Any], length: int, rows: Any) -> Any:
    """`f` of every row of the arrays in `rows` (`length` of them), stacked; staged as a `Lanes` step if f draws.

    What the program holds is a scan under a name of ours, so that JAX can batch and transform it like any other.
    """
    leaves, structure = jax.tree.flatten(rows)
    row = [jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) for x in leaves]
    closed, shape = jax.make_jaxpr(lambda *xs: f(jax.tree.unflatten(structure, xs)), return_shape=True)(*row)
    lane = core.jaxpr_as_fun(closed)
    if not _draws(_open(closed)[0]):
        outs = jax.vmap(lane, axis_size=length)(*leaves)
    else:

        def vi_lanes(*leaves: Any) -> Any:
            return jax.lax.scan(lambda _, xs: (None, lane(*xs)), None, leaves, length=length)[1]

        vi_lanes.__name__ = vi_lanes.__qualname__ = _LANES
        outs = jax.jit(vi_lanes)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def is_staging() -> bool:
    """Whether a program is being staged, so that what runs now is a part of it."""
    return _STAGING.get()


def depends(f: Callable[..., Any], *args: Any) -> bool:
    """Whether an output of `f` depends on the values of its arguments and not on their shapes alone."""
    jaxpr, _ = _open(jax.make_jaxpr(f)(*args))
    known = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, core.Literal) and v in known for v in eqn.invars):
            known.update(eqn.outvars)
    return any(not isinstance(v, core.Literal) and v in known for v in jaxpr.outvars)


# ---- staging -----------------------------------------------------------------------------------------------------------


def stage(f: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of `f`, and the structure of what it returns (jax.ShapeDtypeStruct leaves)."""
    before = _STAGING.set(True)
    try:
        closed, structure = jax.make_jaxpr(f, return_shape=True)(*args)
    finally:
        _STAGING.reset(before)
    return _program(*_open(closed)), structure


def subprograms(op: Op) -> Iterator[Program]:
    """The programs inside an op (bodies of loops, branches, functions with a derivative of their own)."""
    for body in op.bodies:
        yield _program(*_open(body))


def _open(closed: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, constants) of a closed jaxpr, of an open one, or of jax 0.12's jaxpr that holds its constants."""
    jaxpr = getattr(closed, "jaxpr", closed)
    return jaxpr, getattr(closed, "consts", None) or ()


def _bodies(eqn: Any) -> list[Any]:
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                found.append(item)
    return found


def _draws(jaxpr: Any) -> bool:
    return any(e.primitive is _choice_p or any(_draws(_open(b)[0]) for b in _bodies(e)) for e in jaxpr.eqns)


def _called(eqn: Any) -> str:
    """The name of the function that an equation calls, "" if it calls none that has a name."""
    if eqn.primitive.name == "custom_jvp_call":
        return _source(eqn.params["call_jaxpr"]).split(" ")[0]
    return str(eqn.params.get("name", ""))


def _source(body: Any) -> str:
    """Name of a traced function, and where it is defined."""
    return str(getattr(getattr(_open(body)[0], "debug_info", None), "func_src_info", ""))


def _is_continuous(label: str, bodies: Sequence[Any], outputs: int) -> bool:
    """Whether an equation calls a function that is listed or marked as continuous, and not its derivative.

    JAX keeps the name when it differentiates a call.  But then the call returns more than the function does: a tangent, or
    what the derivative needs, comparisons among it.  Those that are listed return one array.  `jit(grad(relu))` is called
    relu as well, and does more than to call relu.
    """
    if label.startswith(CONTINUOUS_MARK):
        return outputs == int(label.removeprefix(CONTINUOUS_MARK).split("_")[0])
    if outputs != 1 or label not in CONTINUOUS:
        return False
    inside = [[_called(e) for e in _open(b)[0].eqns] for b in bodies]
    derived = any(label in names and len(names) > 1 for names in inside)
    return not derived and any(f" at {_HOME}" in _source(b) for b in bodies)


def _run(eqn: Any) -> Callable[..., list[Any]]:
    def run(*values: Any) -> list[Any]:
        params = eqn.primitive.get_bind_params(eqn.params)
        functions, params = params if isinstance(params, tuple) else ([], params)
        # Of the context only the kind of computation matters; the mark of `traced_afresh` is not to reach the compiler.
        elsewhere = getattr(eqn.ctx, "compute_type", None) is not None
        with eqn.ctx.manager if elsewhere else nullcontext():
            out = eqn.primitive.bind(*functions, *values, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    return run


def _program(jaxpr: Any, consts: Sequence[Any]) -> Program:
    types: dict[int, jax.ShapeDtypeStruct] = {}

    def fresh(v: Any) -> int:
        types[len(types)] = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        return len(types) - 1

    steps: list[Step] = []

    def walk(
        jaxpr: Any, consts: Sequence[Any], args: Sequence[Atom], in_lanes: bool = False, trusted: bool = False
    ) -> list[Atom]:
        """Append the steps of a jaxpr; variables get numbers of their own each time, as one jaxpr may be called twice."""
        names: dict[Any, Atom] = {}
        names.update(zip(jaxpr.constvars, map(Const, consts), strict=True))
        names.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Atom:
            return Const(v.val) if isinstance(v, core.Literal) else names[v]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            name, params = eqn.primitive.name, eqn.params
            bodies = _bodies(eqn)
            label = _called(eqn)
            drawn = eqn.primitive is _choice_p or any(_draws(_open(b)[0]) for b in bodies)
            known = trusted or _is_continuous(label, bodies, len(eqn.outvars))
            if name in _JITS:
                names.update(zip(eqn.outvars, walk(*_open(bodies[0]), inputs, label == _LANES, known), strict=True))
                continue
            if drawn and name in ("remat", "remat2", "checkpoint"):
                names.update(zip(eqn.outvars, walk(*_open(bodies[0]), inputs), strict=True))
                continue
            outputs = tuple(map(fresh, eqn.outvars))
            names.update(zip(eqn.outvars, outputs, strict=True))
            if not drawn:
                steps.append(Op(name, inputs, outputs, _run(eqn), params, tuple(bodies), known))
            elif eqn.primitive is _choice_p:
                steps.append(Choice(inputs, outputs, params["rule"], params["lanes"]))
            elif name == "scan":
                n_consts, n_carry = scan_counts(params)
                body = _program(*_open(params["jaxpr"]))
                if in_lanes and not n_carry:
                    steps.append(Lanes(inputs, outputs, body, n_consts, params["length"]))
                else:
                    steps.append(Scan(inputs, outputs, body, n_consts, n_carry, params["length"], params["reverse"]))
            elif name == "cond":
                steps.append(Cond(inputs, outputs, tuple(_program(*_open(b)) for b in params["branches"])))
            else:
                raise StrategyError(_nowhere(name, list(_labels([_open(b)[0] for b in bodies]))))
        return [read(v) for v in jaxpr.outvars]

    arguments = tuple(map(fresh, jaxpr.invars))
    outputs = walk(jaxpr, consts, arguments)
    return Program(arguments, tuple(steps), tuple(outputs), types)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(list(constants)), len(list(carry))


def _labels(jaxprs: Sequence[Any]) -> Iterator[str]:
    for jaxpr in jaxprs:
        for eqn in jaxpr.eqns:
            if eqn.primitive is _choice_p:
                yield eqn.params["rule"].label
            yield from _labels([_open(b)[0] for b in _bodies(eqn)])


def _nowhere(primitive: str, labels: list[str]) -> str:
    where = {
        "while": ("a while loop, whose number of steps is not fixed", "use lax.scan, or lax.fori_loop with fixed ends"),
        "custom_jvp_call": ("a function with a derivative of its own", "draw outside it and pass the value in"),
        "custom_vjp_call": ("a function with a derivative of its own", "draw outside it and pass the value in"),
        "custom_vjp_call_jaxpr": ("a function with a derivative of its own", "draw outside it and pass the value in"),
    }
    place, remedy = where.get(primitive, (f"the JAX primitive {primitive}", "draw outside it and pass the value in"))
    return f"{', '.join(labels)}: a random choice inside {place} has no gradient; {remedy}"
