"""The outer iteration of deep conjugate directions (`solvers.conjugate_direction`, whose formulas it follows) and of
preconditioned conjugate gradients: one step of each, the loop around them, and the turns of direction and fallback."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from solvers.operators import ROUNDINGS, Operator, dot, euclidean
from solvers.outcome import Info, Status

UNROLLED = 4
"""Up to so many directions are projected out by straight code, which has a derivative in reverse mode."""

LOST_DIGITS = 1e-6
"""Once a residual in float32 has fallen by so much, it is computed afresh."""

RUNNING = -1
"""The status of a run that goes on."""


class Plan(NamedTuple):
    """What is fixed at compile time."""

    scheme: Literal["gram-schmidt", "fletcher-reeves"]
    memory: int
    max_steps: int
    passes: int
    normalize: bool
    recompute_every: int
    patience: int
    low: str | None


class State(NamedTuple):
    x: Array
    r: Array
    norm: Array  # ‖r‖
    exact: Array  # ‖r‖ when it was last computed afresh
    top: Array  # largest ‖Ap‖/‖p‖ seen, the scale of A
    residuals: Array
    steps: Array
    status: Array


class Memory(NamedTuple):
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


def _conjugate(d: Array, memory: Memory, plan: Plan) -> Array:
    """p_k: `d` made A-orthogonal to the directions in memory."""
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


def _remember(memory: Memory, p: Array, image: Array, curvature: Array, plan: Plan) -> Memory:
    if plan.memory == 0:
        return memory
    j = memory.stored % plan.memory
    return Memory(
        memory.stored + 1, memory.p.at[j].set(p), memory.image.at[j].set(image), memory.curvature.at[j].set(curvature)
    )


def empty(b: Array, plan: Plan) -> Any:  # the memory that the step of the plan takes
    if plan.scheme == "fletcher-reeves":
        infinite = jnp.asarray(jnp.inf, _working(b, plan))  # makes the first β zero, and the first step suspicious
        return _Previous(jnp.zeros_like(b, infinite.dtype), infinite, infinite)
    kept = jnp.zeros((plan.memory, *b.shape), b.dtype)
    return Memory(jnp.int32(0), kept, kept, jnp.ones(plan.memory, b.dtype))


def step(s: State, memory: Memory, operator: Operator, direction: Operator, plan: Plan) -> tuple[State, Memory, Array]:
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
    s: State, before: _Previous, operator: Operator, preconditioner: Operator, plan: Plan
) -> tuple[State, _Previous, Array]:
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
        lambda: (jnp.int32(RUNNING), s.top),
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
    s: State, d: Array, q: Array, image: Array, curvature: Array, slope: Array
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
        RUNNING,
    ).astype(jnp.int32)
    return status, jnp.where(status == RUNNING, top, s.top)


def _moved(s: State, q: Array, image: Array, curvature: Array, slope: Array, status: Array, top: Array) -> State:
    """The state after the exact line search along q, if there is a step."""
    go = status == RUNNING
    alpha = jnp.where(go, slope / jnp.where(go, curvature, 1), 0)
    # The same α q in x and, through A, in r: what a product in a lower precision rounds off would be in x alone.
    moved = s.x + alpha.astype(s.x.dtype) * q.astype(s.x.dtype)
    x, r = (jnp.where(go, new, old) for new, old in ((moved, s.x), (s.r - alpha * image, s.r)))
    steps, norm = s.steps + go, euclidean(r).astype(s.x.dtype)
    return State(x, r, norm, s.exact, top, s.residuals.at[steps].set(norm), steps, status)


def begin(operator: Operator, b: Array, x0: Array | None, plan: Plan) -> State:
    x = jnp.zeros_like(b) if x0 is None else jnp.where(jnp.any(b != 0), x0, 0)  # the solution of Ax = 0 is zero
    r = (b if x0 is None else b - operator(x)).astype(_working(b, plan))
    norm = euclidean(r).astype(b.dtype)
    # Conjugate gradients look at their first step in any case.
    seen = euclidean(operator(r)) if plan.scheme == "gram-schmidt" else jnp.zeros_like(norm)
    top = seen / jnp.where(norm > 0, norm, 1)
    residuals = jnp.full(plan.max_steps + 1, jnp.nan, b.dtype).at[0].set(norm)
    return State(x, r, norm, norm, top, residuals, jnp.int32(0), jnp.int32(RUNNING))


def _working(b: Array, plan: Plan) -> Any:
    """The dtype of residuals and directions: the paper's steps only hand theirs to the direction in a lower one."""
    return jnp.dtype(plan.low) if plan.low is not None and plan.scheme == "fletcher-reeves" else b.dtype


def iterate(
    operator: Operator,
    b: Array,
    x0: Array | None,
    direction: Operator,
    fallback: Operator | None,
    rtol: Array,
    atol: Array,
    plan: Plan,
) -> tuple[Array, Info]:
    """The whole run.  b is scaled to entries of at most one, so that no norm can overflow or vanish."""
    scale = jnp.maximum(jnp.max(b, initial=0), -jnp.min(b, initial=0))
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    b, atol = b / scale, atol / scale
    start = begin(operator, b, None if x0 is None else x0 / scale, plan)
    size = start.norm if x0 is None else euclidean(b)
    unit = jnp.where(size > 0, size, 1)
    target = jnp.maximum(rtol * size, atol)
    status = jnp.where(start.norm <= target, Status.CONVERGED, RUNNING)
    start = start._replace(status=jnp.where(jnp.isfinite(start.norm), status, Status.NOT_FINITE).astype(jnp.int32))

    def afresh(s: State) -> State:
        """The state with its residual recomputed, and with the verdict that only this permits."""
        r = _once(lambda x: b - operator(x), s.x, s.steps) if plan.scheme == "fletcher-reeves" else b - operator(s.x)
        norm, drift = euclidean(r), euclidean(r - s.r)
        # Rounding has taken over when the two residuals have little in common and the true one has ceased to fall.
        floor = (drift > 0.5 * norm) & (norm > 0.5 * s.exact) & (s.status == RUNNING)
        status = jnp.where(norm <= target, Status.CONVERGED, jnp.where(floor, Status.PRECISION, s.status))
        status = jnp.where(jnp.isfinite(norm), status, Status.NOT_FINITE).astype(jnp.int32)
        residuals = s.residuals.at[s.steps].set(norm)
        return s._replace(r=r.astype(s.r.dtype), norm=norm, exact=norm, status=status, residuals=residuals)

    def run(s: State, f: Operator, plan: Plan, goal: Array, extended: Callable[[State], Array] | None = None) -> State:
        """Steps along f until `goal`, which `extended` may move once it is reached."""

        advance = _two_term_step if plan.scheme == "fletcher-reeves" else step

        def sweep(carry: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
            s, memory, goal = carry
            until = jnp.minimum(goal, s.steps + plan.recompute_every)

            # In a lower precision the recursion knows the residual to about 1e-7 of where it began.
            enough = target if start.r.dtype == b.dtype else jnp.maximum(target, LOST_DIGITS * s.exact)

            def more(c: tuple[State, Any]) -> Array:
                return (c[0].status == RUNNING) & (c[0].steps < until) & (c[0].norm > enough)

            s, memory = jax.lax.while_loop(more, lambda c: advance(*c, operator, f, plan)[:2], (s, memory))
            s = afresh(s)
            return s, memory, goal if extended is None else jnp.where(s.steps >= goal, extended(s), goal)

        def unfinished(carry: tuple[State, Any, Array]) -> Array:
            return (carry[0].status == RUNNING) & (carry[0].steps < carry[2])

        return jax.lax.while_loop(unfinished, sweep, (s, empty(b, plan), goal))[0]

    if fallback is None:
        end, helped = run(start, as_called(direction, plan), plan, jnp.int32(plan.max_steps)), jnp.int32(0)
    else:
        end, helped = _guarded(start, run, direction, fallback, plan, target)
    # A run that was stopped by its limit is the one that is still running.
    status = jnp.where(end.status == RUNNING, Status.MAX_STEPS, end.status).astype(jnp.int32)
    info = Info(end.steps, status, end.residuals / unit, end.norm / unit, status == Status.CONVERGED, helped)
    return end.x * scale, info


def _guarded(
    start: State, run: Callable[..., State], direction: Operator, fallback: Operator, plan: Plan, target: Array
) -> tuple[State, Array]:
    """Direction and fallback in turns on the same x, until one has converged or the fallback stays; see `solve`."""
    fixed = plan._replace(memory=1, passes=1, normalize=True, low=None)  # one direction kept: conjugate gradients
    blamed = jnp.array([Status.STAGNATED, Status.INCONSISTENT, Status.NOT_FINITE])
    limit = jnp.int32(plan.max_steps)

    def rate(old: State, new: State) -> Array:
        return jnp.log(new.norm / old.norm) / jnp.maximum(new.steps - old.steps, 1)

    def turn(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        s, window, helped = carry
        goal = jnp.minimum(s.steps + window, limit)

        def nearly_done(now: State) -> Array:
            """One more `patience` for a direction that would converge within it, at the rate it had so far."""
            near = jnp.log(target / now.norm) >= plan.patience * jnp.minimum(rate(s, now), 0)
            return jnp.where(near & (now.steps == goal), jnp.minimum(goal + plan.patience, limit), now.steps)

        tried = run(s, as_called(direction, plan), plan, goal, nearly_done)
        failed = jnp.any(tried.status == blamed)
        tried = tried._replace(status=jnp.where(failed, RUNNING, tried.status))

        def stays(now: State) -> Array:
            """To the end, unless the direction was twice as fast as this, which gathers speed later, and gained a digit."""
            better = rate(s, tried) < jnp.minimum(2 * rate(tried, now), -np.log(10) / plan.patience)
            return jnp.where(better, now.steps, limit)

        goal = jnp.where(failed, limit, jnp.minimum(tried.steps + plan.patience, limit))
        end = run(tried, as_called(fallback, fixed), fixed, goal, stays)
        return end, 2 * window, helped + end.steps - tried.steps

    def unfinished(carry: tuple[State, Array, Array]) -> Array:
        return (carry[0].status == RUNNING) & (carry[0].steps < limit)

    end, _, helped = jax.lax.while_loop(unfinished, turn, (start, jnp.int32(plan.patience), jnp.int32(0)))
    return end, helped


def as_called(direction: Operator, plan: Plan) -> Operator:
    """The direction as the iteration calls it: unit norm in, entries of at most one out, in the dtype it asks for."""
    if plan.scheme == "fletcher-reeves":
        return direction

    def scaled(r: Array) -> Array:
        given = r / euclidean(r) if plan.normalize else r
        d = direction(given if plan.low is None else given.astype(plan.low)).astype(r.dtype)
        largest = jnp.max(jnp.abs(d), initial=0)
        return d / jnp.where(largest > 0, largest, 1)  # NaN stays NaN

    return scaled
