"""A Deep Conjugate Direction Method for Iteratively Solving Linear Systems (Kaneda, Akar, Chen, Trevino Kala, Hyde, Teran;
ICML 2023, arXiv 2205.10763): the outer iteration, for any positive semi-definite operator and any direction.

    d_k = f(r_k/‖r_k‖)                                                  the direction, a network or any other function
    p_k = d_k - Σ_j (d_kᵀA p_j / p_jᵀA p_j) p_j,  j = k-1, ..., k-m      A-orthogonal to the last m directions: `_conjugate`
    x_{k+1} = x_k + α_k p_k,  α_k = p_kᵀr_k / p_kᵀA p_k                  exact line search: `_step`

This is flexible conjugate gradients FCG(m) (Notay 2000).  The energy norm of the error never grows, whatever f does; it is
conjugate gradients for f(r) = r and preconditioned conjugate gradients for f(r) = Mr with M symmetric positive definite,
m >= 1.  How fast it is depends on f alone, which is what `fallback` is for.

Three things differ from the paper.  The paper orthogonalises once by classical Gram-Schmidt, here it is modified
Gram-Schmidt, `passes` times.  The paper recomputes r = b - Ax after each step at the price of a second product with A
(`recompute_every=1`); here the residual follows the recursion in between and is recomputed before anything is called
converged.  And what can go wrong (`Status`) is looked for.

What counts as an operator, a direction or a preconditioner: `solvers.operators`.
"""

import enum
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int

from solvers.direction_network import DirectionNetwork, MaskedDirection, shipped
from solvers.operators import (
    ROUNDINGS,
    Operator,
    System,
    as_operator,
    at_least,
    check_linear,
    check_shape,
    checked,
    dot,
    euclidean,
    exact_residual,
)
from solvers.stencil import Stencil

UNROLLED = 4
"""Up to so many directions are projected out by straight code, which has a derivative in reverse mode."""

LOST_DIGITS = 1e-6
"""Once a residual in float32 has fallen by so much, it is computed afresh."""


class Status(enum.IntEnum):
    """How a run ended.  `message` says it in words."""

    CONVERGED = 0
    MAX_STEPS = 1
    STAGNATED = 2
    NOT_POSITIVE_DEFINITE = 3
    INCONSISTENT = 4
    NOT_FINITE = 5
    PRECISION = 6

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_RUNNING = -1
_MESSAGES = {
    Status.CONVERGED: "the recomputed residual is below the tolerance",
    Status.MAX_STEPS: "max_steps were taken; take more, or a better direction or preconditioner",
    Status.STAGNATED: "the direction is orthogonal to the residual or lies in the span of the last directions, so that no "
    "step along it helps; use another direction, or fallback='residual'",
    Status.NOT_POSITIVE_DEFINITE: "negative curvature, pᵀAp < 0: A is not positive semi-definite; for -A with b solve "
    "with the sign of both turned",
    Status.INCONSISTENT: "Ap = 0 along a direction p with pᵀr ≠ 0: A is singular and b has a part outside its range; take "
    "that part (for a Poisson problem without open boundary: the mean) out of b",
    Status.NOT_FINITE: "the direction or the operator returned NaN or infinity",
    Status.PRECISION: "the true residual does not fall any more although the recursion does: rounding; ask for a larger "
    "rtol, or compute in 64 bits",
}


class Info(NamedTuple):
    """Diagnostics of a run, arrays only; norms are Euclidean and relative to ‖b‖ (absolute if b is zero).

    steps           steps taken, those of the fallback included
    status          a `Status`
    residuals       residual norm before the first and after every step; NaN after the last
    residual        of the answer, recomputed; its dtype says in which precision
    converged       whether that is below max(rtol, atol/‖b‖)
    fallback_steps  how many of the steps were the fallback's
    """

    steps: Int[Array | np.ndarray, "..."]
    status: Int[Array | np.ndarray, "..."]
    residuals: Float[Array | np.ndarray, "... steps+1"]
    residual: Float[Array | np.ndarray, "..."]
    converged: Bool[Array | np.ndarray, "..."]
    fallback_steps: Int[Array | np.ndarray, "..."]


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
    plan = _Plan(
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
    plan = _Plan("fletcher-reeves", 0, max_steps, 1, False, recompute_every, 1, None if low is None else low.name)
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
    plan = _Plan("gram-schmidt", kept, steps, passes, normalize, steps, 1, None)
    return _kept(system.operator, system.b, system.x0, d, plan)


@eqx.filter_jit
def _kept(operator: Operator, b: Array, x0: Array | None, direction: Operator, plan: "_Plan") -> Iterates:
    start = _start(operator, b, x0, plan)

    def step(carry: tuple[_State, _Memory], _: None) -> tuple[tuple[_State, _Memory], tuple[Array, Array]]:
        s, memory = carry
        new, after, p = _step(s, memory, operator, _unit(direction, plan), plan)
        new = jax.tree.map(lambda a, b: jnp.where(s.status == _RUNNING, a, b), new, s)
        return (new, after), (new.x, jnp.where(new.steps > s.steps, p, 0))

    (end, _), (x, p) = jax.lax.scan(step, (start, _empty(b, plan)), length=plan.max_steps)
    status = jnp.where(end.status == _RUNNING, Status.MAX_STEPS, end.status).astype(jnp.int32)
    return Iterates(jnp.concatenate([start.x[None], x]), p, status)


# ---------------------------------------------------------------------------------------------- the iteration


class _Plan(NamedTuple):
    """What is fixed at compile time."""

    scheme: Literal["gram-schmidt", "fletcher-reeves"]
    memory: int
    max_steps: int
    passes: int
    normalize: bool
    recompute_every: int
    patience: int
    low: str | None


class _State(NamedTuple):
    x: Array
    r: Array
    norm: Array  # ‖r‖
    exact: Array  # ‖r‖ when it was last computed afresh
    top: Array  # largest ‖Ap‖/‖p‖ seen, the scale of A
    residuals: Array
    steps: Array
    status: Array


class _Memory(NamedTuple):
    """The last directions in a ring, with their images and pᵀAp."""

    stored: Array
    p: Array
    image: Array
    curvature: Array


class _Previous(NamedTuple):
    """What conjugate gradients keep: the last direction, its rᵀz, and the largest quotient pᵀAp/rᵀz so far."""

    p: Array
    slope: Array
    largest: Array


def _conjugate(d: Array, memory: _Memory, plan: _Plan) -> Array:
    """`d` made A-orthogonal to the directions in memory."""
    if plan.memory == 0:
        return d

    def project(i: Array, q: Array) -> Array:
        j = (memory.stored - 1 - i) % plan.memory
        return q - dot(memory.image[j], q) / memory.curvature[j] * memory.p[j]

    for _ in range(plan.passes):
        if plan.memory <= UNROLLED:  # what is still empty is zero and projects nothing out
            for i in range(plan.memory):
                d = project(jnp.int32(i), d)
        else:
            d = jax.lax.fori_loop(0, jnp.minimum(memory.stored, plan.memory), project, d)
    return d


def _remember(memory: _Memory, p: Array, image: Array, curvature: Array, plan: _Plan) -> _Memory:
    if plan.memory == 0:
        return memory
    j = memory.stored % plan.memory
    return _Memory(
        memory.stored + 1, memory.p.at[j].set(p), memory.image.at[j].set(image), memory.curvature.at[j].set(curvature)
    )


def _empty(b: Array, plan: _Plan) -> Any:  # the memory that the step of the plan takes
    if plan.scheme == "fletcher-reeves":
        infinite = jnp.asarray(jnp.inf, _working(b, plan))  # makes the first β zero, and the first step suspicious
        return _Previous(jnp.zeros_like(b, infinite.dtype), infinite, infinite)
    kept = jnp.zeros((plan.memory, *b.shape), b.dtype)
    return _Memory(jnp.int32(0), kept, kept, jnp.ones(plan.memory, b.dtype))


def _step(
    s: _State, memory: _Memory, operator: Operator, direction: Operator, plan: _Plan
) -> tuple[_State, _Memory, Array]:
    """One step of the paper, or the reason why there is none; also the direction p."""
    d = direction(s.r)
    q = _conjugate(d, memory, plan)
    image = operator(q)
    curvature, slope = dot(q, image), dot(q, s.r)
    status, top = _verdict(s, d, q, image, curvature, slope)
    return (
        _moved(s, q, image, curvature, slope, status, top),
        _remember(memory, q, image, curvature, plan),
        q,
    )


def _two_term_step(
    s: _State, before: _Previous, operator: Operator, preconditioner: Operator, plan: _Plan
) -> tuple[_State, _Previous, Array]:
    """One step of conjugate gradients, where pᵀr = rᵀz; memory and normalisation have no meaning here."""
    operator, preconditioner = _varying(s.steps, (operator, preconditioner))
    z = preconditioner(s.r).astype(s.r.dtype)
    slope = dot(s.r, z)
    p = z + slope / before.slope * before.p
    image = _once(lambda v: operator(v.astype(s.x.dtype)).astype(v.dtype), p, s.steps)
    curvature = dot(p, image)
    # Between the extreme eigenvalues of MA, unless something is wrong: far below what it was before, it is worth a look.
    quotient = curvature / slope
    sound = (slope > 0) & (quotient > np.sqrt(jnp.finfo(p.dtype).eps) * before.largest) & jnp.isfinite(quotient)
    status, top = jax.lax.cond(
        sound,
        lambda: (jnp.int32(_RUNNING), s.top),
        lambda: _verdict(s, z, p, image, curvature, slope),
    )
    first = jnp.isinf(before.largest)
    largest = jnp.where(first, quotient, jnp.maximum(before.largest, quotient))
    return _moved(s, p, image, curvature, slope, status, top), _Previous(p, slope, largest), p


def _varying(steps: Array, tree: Any) -> Any:
    """The tree with integer arrays that XLA cannot take for constants of the loop.  It would make reals of them outside, and
    the loop would move four or eight times the bytes that a stencil with an int8 diagonal needs."""
    return jax.tree.map(
        lambda v: jnp.where(steps >= 0, v, 0) if eqx.is_array(v) and jnp.issubdtype(v.dtype, jnp.integer) else v, tree
    )


def _once(f: Operator, v: Array, steps: Array) -> Array:
    """f(v) behind a loop of one turn, a number that XLA cannot know: on CPUs it would else compute a stencil anew for each
    use of its values.  Has no derivative in reverse mode."""
    return jax.lax.fori_loop(0, (steps >= 0).astype(jnp.int32), lambda _, __: f(v), v)


def _verdict(
    s: _State, d: Array, q: Array, image: Array, curvature: Array, slope: Array
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Whether there is a step along q, made of d, or why not; and the scale of A as far as seen."""
    zero = ROUNDINGS * jnp.finfo(q.dtype).eps
    size = euclidean(q)
    top = jnp.maximum(s.top, euclidean(image) / jnp.where(size > 0, size, 1))
    flat = zero * top * size**2
    status = jnp.select(
        [
            ~jnp.isfinite(curvature) | ~jnp.isfinite(slope),
            curvature < -flat,
            (size <= zero * euclidean(d)) | (jnp.abs(slope) <= zero * size * s.norm),
            curvature <= flat,
        ],
        [Status.NOT_FINITE, Status.NOT_POSITIVE_DEFINITE, Status.STAGNATED, Status.INCONSISTENT],
        _RUNNING,
    ).astype(jnp.int32)
    return status, jnp.where(status == _RUNNING, top, s.top)


def _moved(s: _State, q: Array, image: Array, curvature: Array, slope: Array, status: Array, top: Array) -> _State:
    """The state after the exact line search along q, if there is a step."""
    go = status == _RUNNING
    alpha = jnp.where(go, slope / jnp.where(go, curvature, 1), 0)
    # The same α q in x and, through A, in r: what a product in a lower precision rounds off would be in x alone.
    moved = s.x + alpha.astype(s.x.dtype) * q.astype(s.x.dtype)
    x, r = (jnp.where(go, new, old) for new, old in ((moved, s.x), (s.r - alpha * image, s.r)))
    steps, norm = s.steps + go, euclidean(r).astype(s.x.dtype)
    return _State(x, r, norm, s.exact, top, s.residuals.at[steps].set(norm), steps, status)


def _start(operator: Operator, b: Array, x0: Array | None, plan: _Plan) -> _State:
    x = jnp.zeros_like(b) if x0 is None else jnp.where(jnp.any(b != 0), x0, 0)  # the solution of Ax = 0 is zero
    r = (b if x0 is None else b - operator(x)).astype(_working(b, plan))
    norm = euclidean(r).astype(b.dtype)
    # Conjugate gradients look at their first step in any case.
    seen = euclidean(operator(r)) if plan.scheme == "gram-schmidt" else jnp.zeros_like(norm)
    top = seen / jnp.where(norm > 0, norm, 1)
    residuals = jnp.full(plan.max_steps + 1, jnp.nan, b.dtype).at[0].set(norm)
    return _State(x, r, norm, norm, top, residuals, jnp.int32(0), jnp.int32(_RUNNING))


def _working(b: Array, plan: _Plan) -> Any:
    """The dtype of residuals and directions: the paper's steps only hand theirs to the direction in a lower one."""
    return jnp.dtype(plan.low) if plan.low is not None and plan.scheme == "fletcher-reeves" else b.dtype


def _iterate(
    operator: Operator,
    b: Array,
    x0: Array | None,
    direction: Operator,
    fallback: Operator | None,
    rtol: Array,
    atol: Array,
    plan: _Plan,
) -> tuple[Array, Info]:
    """The whole run.  b is scaled to entries of at most one, so that no norm can overflow or vanish."""
    scale = jnp.maximum(jnp.max(b, initial=0), -jnp.min(b, initial=0))
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    b, atol = b / scale, atol / scale
    start = _start(operator, b, None if x0 is None else x0 / scale, plan)
    size = start.norm if x0 is None else euclidean(b)
    unit = jnp.where(size > 0, size, 1)
    target = jnp.maximum(rtol * size, atol)
    status = jnp.where(start.norm <= target, Status.CONVERGED, _RUNNING)
    start = start._replace(status=jnp.where(jnp.isfinite(start.norm), status, Status.NOT_FINITE).astype(jnp.int32))

    def afresh(s: _State) -> _State:
        """The state with its residual recomputed, and with the verdict that only this permits."""
        r = _once(lambda x: b - operator(x), s.x, s.steps) if plan.scheme == "fletcher-reeves" else b - operator(s.x)
        norm, drift = euclidean(r), euclidean(r - s.r)
        # Rounding has taken over when the two residuals have little in common and the true one has ceased to fall.
        floor = (drift > 0.5 * norm) & (norm > 0.5 * s.exact) & (s.status == _RUNNING)
        status = jnp.where(norm <= target, Status.CONVERGED, jnp.where(floor, Status.PRECISION, s.status))
        status = jnp.where(jnp.isfinite(norm), status, Status.NOT_FINITE).astype(jnp.int32)
        residuals = s.residuals.at[s.steps].set(norm)
        return s._replace(r=r.astype(s.r.dtype), norm=norm, exact=norm, status=status, residuals=residuals)

    def run(
        s: _State, f: Operator, plan: _Plan, goal: Array, extended: Callable[[_State], Array] | None = None
    ) -> _State:
        """Steps along f until `goal`, which `extended` may move once it is reached."""

        step = _two_term_step if plan.scheme == "fletcher-reeves" else _step

        def sweep(carry: tuple[_State, Any, Array]) -> tuple[_State, Any, Array]:
            s, memory, goal = carry
            until = jnp.minimum(goal, s.steps + plan.recompute_every)

            # In a lower precision the recursion knows the residual to about 1e-7 of where it began.
            enough = target if start.r.dtype == b.dtype else jnp.maximum(target, LOST_DIGITS * s.exact)

            def more(c: tuple[_State, Any]) -> Array:
                return (c[0].status == _RUNNING) & (c[0].steps < until) & (c[0].norm > enough)

            s, memory = jax.lax.while_loop(more, lambda c: step(*c, operator, f, plan)[:2], (s, memory))
            s = afresh(s)
            return s, memory, goal if extended is None else jnp.where(s.steps >= goal, extended(s), goal)

        def unfinished(carry: tuple[_State, Any, Array]) -> Array:
            return (carry[0].status == _RUNNING) & (carry[0].steps < carry[2])

        return jax.lax.while_loop(unfinished, sweep, (s, _empty(b, plan), goal))[0]

    if fallback is None:
        end, helped = run(start, _unit(direction, plan), plan, jnp.int32(plan.max_steps)), jnp.int32(0)
    else:
        end, helped = _guarded(start, run, direction, fallback, plan, target)
    # A run that was stopped by its limit is the one that is still running.
    status = jnp.where(end.status == _RUNNING, Status.MAX_STEPS, end.status).astype(jnp.int32)
    info = Info(end.steps, status, end.residuals / unit, end.norm / unit, status == Status.CONVERGED, helped)
    return end.x * scale, info


def _guarded(
    start: _State, run: Callable[..., _State], direction: Operator, fallback: Operator, plan: _Plan, target: Array
) -> tuple[_State, Array]:
    """Direction and fallback in turns on the same x, until one has converged or the fallback stays; see `solve`."""
    fixed = plan._replace(memory=1, passes=1, normalize=True, low=None)  # one direction kept: conjugate gradients
    blamed = jnp.array([Status.STAGNATED, Status.INCONSISTENT, Status.NOT_FINITE])
    limit = jnp.int32(plan.max_steps)

    def rate(old: _State, new: _State) -> Array:
        return jnp.log(new.norm / old.norm) / jnp.maximum(new.steps - old.steps, 1)

    def turn(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        s, window, helped = carry
        goal = jnp.minimum(s.steps + window, limit)

        def nearly_done(now: _State) -> Array:
            """One more `patience` for a direction that would converge within it, at the rate it had so far."""
            near = jnp.log(target / now.norm) >= plan.patience * jnp.minimum(rate(s, now), 0)
            return jnp.where(near & (now.steps == goal), jnp.minimum(goal + plan.patience, limit), now.steps)

        tried = run(s, _unit(direction, plan), plan, goal, nearly_done)
        failed = jnp.any(tried.status == blamed)
        tried = tried._replace(status=jnp.where(failed, _RUNNING, tried.status))

        def stays(now: _State) -> Array:
            """To the end, unless the direction was twice as fast as this, which gathers speed later, and gained a digit."""
            better = rate(s, tried) < jnp.minimum(2 * rate(tried, now), -np.log(10) / plan.patience)
            return jnp.where(better, now.steps, limit)

        goal = jnp.where(failed, limit, jnp.minimum(tried.steps + plan.patience, limit))
        end = run(tried, _unit(fallback, fixed), fixed, goal, stays)
        return end, 2 * window, helped + end.steps - tried.steps

    def unfinished(carry: tuple[_State, Array, Array]) -> Array:
        return (carry[0].status == _RUNNING) & (carry[0].steps < limit)

    end, _, helped = jax.lax.while_loop(unfinished, turn, (start, jnp.int32(plan.patience), jnp.int32(0)))
    return end, helped


def _unit(direction: Operator, plan: _Plan) -> Operator:
    """The direction as the iteration calls it: unit norm in, entries of at most one out, in the dtype it asks for."""
    if plan.scheme == "fletcher-reeves":
        return direction

    def scaled(r: Array) -> Array:
        given = r / euclidean(r) if plan.normalize else r
        d = direction(given if plan.low is None else given.astype(plan.low)).astype(r.dtype)
        largest = jnp.max(jnp.abs(d), initial=0)
        return d / jnp.where(largest > 0, largest, 1)  # NaN stays NaN

    return scaled


# ------------------------------------------------------------------------------------- implicit differentiation


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
    plan: _Plan,
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
def _implicit(operator: Operator, b: Array, *, rest: Any, plan: _Plan) -> tuple[Array, Info]:
    x0, direction, fallback, rtol, atol = rest
    return _iterate(operator, b, x0, direction, fallback, rtol, atol, plan)


@_implicit.def_jvp
def _implicit_jvp(primals: Any, tangents: Any, *, rest: Any, plan: _Plan) -> Any:
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
        dx, info = _iterate(operator, right, None, direction, fallback, rtol, jnp.zeros_like(rtol), plan)
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


def in_float64(A: Any, b: Array, x: Array, info: Any, rtol: float, atol: float) -> Any:
    """`info` with residual and verdict by a residual that is computed in float64 on the host.

    A is a dense or sparse matrix or a stencil; info has the fields of `Info` that are concerned.
    """
    inside = np.asarray(A.unknown) if isinstance(A, Stencil) else True
    size = float(np.linalg.norm(np.where(inside, np.asarray(b, np.float64), 0)))
    norm = float(np.linalg.norm(exact_residual(A, b, x)))
    met = norm <= max(rtol * size, atol)
    status = Status.CONVERGED if met else Status.PRECISION if info.converged else Status(int(info.status))
    return info._replace(
        residual=np.array(norm / (size or 1)), converged=np.array(met), status=np.array(status, np.int32)
    )


def require_convergence(caller: str, info: Any, rtol: float) -> None:
    """Raise RuntimeError, which says how the run ended, unless it converged."""
    if not bool(info.converged):
        end = Status(int(info.status))
        raise RuntimeError(
            f"{caller}: not converged after {int(info.steps)} steps, relative residual {float(info.residual):.2e} "
            f"(rtol {rtol:g}): {end.name}, {end.message}"
        )
