"""A Deep Conjugate Direction Method for Iteratively Solving Linear Systems (Kaneda, Akar, Chen, Trevino Kala, Hyde, Teran;
ICML 2023, arXiv 2205.10763): the outer iteration, for any positive semi-definite operator and any direction.

    d_k = f(r_k/‖r_k‖)                                                  the direction, a network or any other function
    p_k = d_k - Σ_j (d_kᵀA p_j / p_jᵀA p_j) p_j,  j = k-1, ..., k-m      A-orthogonal to the last m directions
    x_{k+1} = x_k + α_k p_k,  α_k = p_kᵀr_k / p_kᵀA p_k                  exact line search

This is flexible conjugate gradients FCG(m) (Notay 2000).  The energy norm of the error never grows, whatever f does; it is
conjugate gradients for f(r) = r and preconditioned conjugate gradients for f(r) = Mr with M symmetric positive definite,
m >= 1.  How fast it is depends on f alone, which is what `fallback` is for.

Three things differ from the paper.  The paper orthogonalises once by classical Gram-Schmidt, here it is modified
Gram-Schmidt, `passes` times.  The paper recomputes r = b - Ax after each step at the price of a second product with A
(`recompute_every=1`); here the residual follows the recursion in between and is recomputed before anything is called
converged.  And what can go wrong (`Status`) is looked for.

The steps themselves: `solvers.conjugate_iteration`.  How a run ends: `solvers.outcome`.  What counts as an operator, a
direction or a preconditioner: `solvers.operators`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int

from solvers.conjugate_iteration import RUNNING, Memory, Plan, State, as_called, begin, empty, iterate, step
from solvers.direction_network import DirectionNetwork, MaskedDirection, shipped
from solvers.operators import Operator, System, as_operator, at_least, check_linear, check_shape, checked
from solvers.outcome import Info, Status, in_float64, require_convergence
from solvers.stencil import Stencil

__all__ = ["Info", "Iterates", "Status", "conjugate_gradient", "iterates", "load", "residual", "solve"]


def residual(r: Array) -> Array:
    """The direction that makes the method conjugate gradients: the residual itself."""
    return r


def load(name: str) -> DirectionNetwork:
    """The trained direction of that name that comes with the package: "poisson2d" or "poisson3d".

    `solve` applies it to the unknowns of a stencil; for any other operator give what masks it (`direction_network`).
    """
    return shipped(name)


def solve(
    A: Any,
    b: Float[ArrayLike, "*shape"],
    *,
    direction: Any = residual,
    memory: int | None = 2,
    x0: Float[ArrayLike, "*shape"] | None = None,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
    max_steps: int = 1000,
    fallback: Any = None,
    passes: int = 1,
    normalize: bool = True,
    direction_dtype: DTypeLike | None = None,
    recompute_every: int = 50,
    patience: int = 16,
    throw: bool = False,
) -> tuple[Float[Array, "*shape"], Info]:
    """Solve Ax = b for a symmetric positive (semi-)definite A along the given directions, until ‖b - Ax‖ <=
    max(rtol ‖b‖, atol).

    direction        r -> d, any function; network weights and the like get no gradient.  Default: conjugate gradients
    memory           how many previous directions a new one is made A-orthogonal to; None: all, max_steps arrays
    fallback         "residual" or a fixed symmetric positive definite preconditioner.  It takes over at once when the
                     direction fails.  Otherwise, after `patience` steps of the direction, as many of (preconditioned)
                     conjugate gradients follow from there, and stay if they reduce the residual as fast per step; else
                     the direction has twice as many steps as before, and so on.
    passes           how often to orthogonalise; two keep all of many directions A-orthogonal
    normalize        give r/‖r‖ to the direction (the paper), not r
    direction_dtype  floating dtype in which the direction works, such as bfloat16; the rest keeps its own
    recompute_every  steps between two residuals computed afresh; 1 is the paper

    The dtype is that of the inputs.  Of the dense and sparse matrices the final residual is computed in float64 even if JAX
    has only 32 bits, on the host, unless under a transformation; functions are applied in the dtype of x.

    For many right-hand sides use jax.vmap; jax.jit works.  Derivatives with respect to b and to the arrays in A, forward
    and backward, are those of A⁻¹b, by a second run of this method; NaN if that run fails.  Compiled once per shape and per
    function object, so give the same function and no new lambda.

    Raises ValueError for wrong shapes, b that is not finite, an explicit A that is not symmetric or plainly not positive
    semi-definite, and tolerances out of reach of the dtype; TypeError for what is no operator; with `throw`, RuntimeError
    if the run did not converge (not under jit or vmap, where only the status tells).
    """
    system = checked("solve", A, b, x0, rtol, atol, max_steps)
    for name, value, least in (
        ("passes", passes, 1),
        ("recompute_every", recompute_every, 1),
        ("patience", patience, 1),
    ):
        at_least("solve", name, value, least)
    if memory is not None:
        at_least("solve", "memory", memory, 0)
    if isinstance(fallback, str) and fallback != "residual":
        raise ValueError(f"solve: fallback is {fallback!r}, expected 'residual' or a preconditioner")
    low = None if direction_dtype is None else jnp.dtype(direction_dtype)
    if low is not None and not jnp.issubdtype(low, jnp.floating):
        raise ValueError(f"solve: direction_dtype is {low}, expected a floating dtype such as bfloat16")
    plan = Plan(
        "gram-schmidt",
        max_steps if memory is None else min(memory, max_steps),
        max_steps,
        passes,
        normalize,
        recompute_every,
        patience,
        None if low is None else low.name,
    )
    if isinstance(direction, DirectionNetwork) and isinstance(A, Stencil):
        direction = MaskedDirection(direction, A.unknown)
    d, _ = as_operator("solve", "direction", direction, system.b)
    m, _ = (
        (None, None)
        if fallback is None
        else as_operator("solve", "fallback", residual if isinstance(fallback, str) else fallback, system.b)
    )
    return _finish(
        system,
        *_compiled(system.caller, system.operator, system.b, system.x0, d, m, system.rtol, system.atol, plan),
        throw,
    )


def conjugate_gradient(
    A: Any,
    b: Float[ArrayLike, "*shape"],
    M: Any = None,
    *,
    x0: Float[ArrayLike, "*shape"] | None = None,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
    max_steps: int = 1000,
    direction_dtype: DTypeLike | None = None,
    recompute_every: int = 50,
    check: bool = True,
    throw: bool = False,
) -> tuple[Float[Array, "*shape"], Info]:
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952, Fletcher-Reeves β), everything else as in `solve`.

    Three scalar products a step: what can go wrong is looked into when the Rayleigh quotient of the step is suspicious.

    direction_dtype  jnp.float32 with b in float64: residuals, directions and M in float32, which halves what a step moves
                     through memory; x, products with A and the residual that decides stay in float64.  The residual is
                     computed afresh whenever it has lost six digits.  For an M so good that few steps are needed:
                     directions in float32 stay A-orthogonal to fewer of those before

    M is a linear symmetric positive definite approximation of A⁻¹.  With any other the two-term recursion loses more than
    `solve(..., direction=M, memory=0)` gains, so `check` tries linearity and symmetry on two vectors (three applications,
    not under a transformation, nor for what says `symmetric = True` of itself) and raises ValueError; for such M use `solve`.
    """
    system = checked("conjugate_gradient", A, b, x0, rtol, atol, max_steps)
    at_least("conjugate_gradient", "recompute_every", recompute_every, 1)
    m, _ = as_operator("conjugate_gradient", "M", residual if M is None else M, system.b)
    if check and M is not None and not getattr(M, "symmetric", False) and not isinstance(system.b, jax.core.Tracer):
        check_linear(m, system.b)
    low = None if direction_dtype is None else jnp.dtype(direction_dtype)
    if low not in (None, jnp.float32, system.b.dtype):
        raise ValueError(
            f"conjugate_gradient: direction_dtype is {low}, expected float32 or that of b, {system.b.dtype}"
        )
    low = None if low == system.b.dtype else low
    plan = Plan("fletcher-reeves", 0, max_steps, 1, False, recompute_every, 1, None if low is None else low.name)
    return _finish(
        system,
        *_compiled(system.caller, system.operator, system.b, system.x0, m, None, system.rtol, system.atol, plan),
        throw,
    )


class Iterates(NamedTuple):
    """x_0, ..., x_K and the directions p_0, ..., p_{K-1} of K steps; after a failed step x stays and p is zero."""

    x: Float[Array, "steps+1 *shape"]
    p: Float[Array, "steps *shape"]
    status: Int[Array, ""]


def iterates(
    A: Any,
    b: Float[ArrayLike, "*shape"],
    steps: int,
    *,
    direction: Any = residual,
    memory: int | None = 2,
    x0: Float[ArrayLike, "*shape"] | None = None,
    passes: int = 1,
    normalize: bool = True,
) -> Iterates:
    """The first `steps` iterates of `solve`, kept, without a stopping rule: to look at, or to train a direction through.

    Arguments as for `solve`.  Unlike there, the derivative is that of the steps themselves, in everything, the weights of
    the direction included; in reverse mode for memory <= 4.  `status` is that of a failed step, else MAX_STEPS.
    """
    system = checked("iterates", A, b, x0, 1.0, 0.0, steps)
    d, _ = as_operator("iterates", "direction", direction, system.b)
    kept = steps if memory is None else min(memory, steps)
    plan = Plan("gram-schmidt", kept, steps, passes, normalize, steps, 1, None)
    return _kept(system.operator, system.b, system.x0, d, plan)


@eqx.filter_jit
def _kept(operator: Operator, b: Array, x0: Array | None, direction: Operator, plan: Plan) -> Iterates:
    start = begin(operator, b, x0, plan)

    def one(carry: tuple[State, Memory], _: None) -> tuple[tuple[State, Memory], tuple[Array, Array]]:
        s, memory = carry
        new, after, p = step(s, memory, operator, as_called(direction, plan), plan)
        new = jax.tree.map(lambda a, b: jnp.where(s.status == RUNNING, a, b), new, s)
        return (new, after), (new.x, jnp.where(new.steps > s.steps, p, 0))

    (end, _), (x, p) = jax.lax.scan(one, (start, empty(b, plan)), length=plan.max_steps)
    status = jnp.where(end.status == RUNNING, Status.MAX_STEPS, end.status).astype(jnp.int32)
    return Iterates(jnp.concatenate([start.x[None], x]), p, status)


@eqx.filter_jit
def _compiled(
    caller: str,
    operator: Any,
    b: Array,
    x0: Array | None,
    direction: Any,
    fallback: Any,
    rtol: Array,
    atol: Array,
    plan: Plan,
) -> tuple[Array, Info]:
    names = ("A", "M" if plan.scheme == "fletcher-reeves" else "direction", "fallback")
    for name, f in zip(names, (operator, direction, fallback), strict=True):
        if f is not None:
            check_shape(caller, name, f, b)
    if isinstance(operator, Stencil):  # what they say of other cells does not matter
        b = jnp.where(operator.unknown, b, 0)
        x0 = None if x0 is None else jnp.where(operator.unknown, x0, 0)
    # Arrays that the functions close over, tracers included, become visible and so can have derivatives.
    operator = eqx.filter_closure_convert(operator, b)
    low = b if plan.low is None else b.astype(plan.low)
    direction = eqx.filter_closure_convert(direction, low)
    fallback = None if fallback is None else eqx.filter_closure_convert(fallback, b)
    rest = _constant((x0, direction, fallback, rtol, atol))
    return _implicit(operator, b, rest=rest, plan=plan)


@eqx.filter_custom_jvp
def _implicit(operator: Operator, b: Array, *, rest: Any, plan: Plan) -> tuple[Array, Info]:
    x0, direction, fallback, rtol, atol = rest
    return iterate(operator, b, x0, direction, fallback, rtol, atol, plan)


@_implicit.def_jvp
def _implicit_jvp(primals: Any, tangents: Any, *, rest: Any, plan: Plan) -> Any:
    """A dx = db - dA x, symmetric, so that transposing it is the same run."""
    operator, b = primals
    d_operator, d_b = tangents
    x, info = _implicit(operator, b, rest=rest, plan=plan)
    right = jnp.zeros_like(b) if d_b is None else d_b
    varied, fixed = eqx.partition(operator, eqx.is_inexact_array)
    d_varied = jax.tree.map(
        lambda v, t: jnp.zeros_like(v) if t is None else t, varied, eqx.filter(d_operator, eqx.is_array)
    )
    if jax.tree.leaves(d_operator):
        _, d_image = jax.jvp(lambda v: eqx.combine(v, fixed)(x), (varied,), (d_varied,))
        right = right - d_image
    _, direction, fallback, rtol, _ = rest

    def run(_: Operator, right: Array) -> Array:
        # From zero, to the same relative tolerance; the absolute one is in the units of b.
        dx, info = iterate(operator, right, None, direction, fallback, rtol, jnp.zeros_like(rtol), plan)
        return jnp.where((info.status == Status.CONVERGED) | (info.status == Status.PRECISION), dx, jnp.nan)

    dx = jax.lax.custom_linear_solve(operator, right, run, symmetric=True)
    return (x, info), (dx, jax.tree.map(lambda _: None, info))


def _constant(tree: Any) -> Any:
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(jax.lax.stop_gradient, arrays), rest)


def _finish(system: System, x: Array, info: Info, throw: bool) -> tuple[Array, Info]:
    """Outside transformations: the residual of an explicit matrix in float64, and the exception."""
    if isinstance(x, jax.core.Tracer):
        return x, info
    if int(info.status) == Status.NOT_FINITE and int(info.steps) == 0 and (bad := int((~jnp.isfinite(system.b)).sum())):
        raise ValueError(f"{system.caller}: b has {bad} entries that are not finite, expected none")
    if system.matrix is not None and x.dtype != jnp.float64:
        info = in_float64(
            system.matrix, system.b, x, info, float(system.rtol) / system.share, float(system.atol) / system.share
        )
    if throw:
        require_convergence(system.caller, info, float(system.rtol) / system.share)
    return x, info
