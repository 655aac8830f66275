"""D1 to D5 and D8: what exact line search and A-orthogonality give for any direction, and when it is conjugate gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.conjugate_direction.common import (
    KINDS,
    MANY,
    PAPER,
    STEPS,
    Grid,
    compiled,
    direction,
    draw_grids,
    grid_matrix,
    quadratic,
    symmetric_gauss_seidel,
    trajectories,
)
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from solvers import conjugate_direction as cd

MEMORIES = (0, 1, 2, None)


def name(memory: int | None) -> str:
    return "full memory" if memory is None else f"memory {memory}"


# -- D1: the energy identity ----------------------------------------------------------------------------------------------

SCALES = (0.5, 1.0, 1.5, 2.0, 2.5)


@claim(
    PAPER,
    "D1",
    r"For every direction and memory $\|e_k\|_A^2-\|e_{k+1}\|_A^2=\frac{(p_k^\top r_k)^2}{p_k^\top Ap_k}\ge0$: the energy "
    r"norm of the error never grows.  A step $s\alpha_k$ gains $s(2-s)$ times as much.",
    title="The energy error falls whatever the direction",
    kind="exact",
    controls={
        "overstep": "steps of 2.5 times the length",
        "backward": "steps of -0.5 times the length",
        "linear": "the gain of a step s claimed to be s times that of a whole one",
    },
    regime="any spectrum within 6 decades, 24 unknowns, seven kinds of direction, memory 0, 1, 2 and all, 20 steps",
    source="Derived; the property that makes the paper's method safe (its algorithm, line search).",
    blind_spot="Errors relative to the first: what happens below 1e-12 of it is rounding.",
)
def energy_identity(ctx: Context) -> Outcome:
    stretch, linear = ctx.pick(1.0, overstep=2.5, backward=-0.5), ctx.pick(False, linear=True)
    slack, seen = {}, 0.0
    for memory in MEMORIES:
        runs = trajectories(ctx.paper_key, memory, count=ctx.n(MANY))
        before, start = runs.energy[:, :-1], runs.energy[:, :1]
        step = np.diff(runs.x, axis=1)
        curvature = quadratic(runs.a, runs.p)
        gain = np.sum(runs.p * runs.r[:, :-1], 2) ** 2 / np.where(curvature > 0, curvature, 1)

        def after(s: float, runs: Any = runs, step: np.ndarray = step) -> np.ndarray:
            return quadratic(runs.a, runs.solution[:, None] - runs.x[:, :-1] - s * step)

        errors = [np.abs(before - after(s) - (s if linear else s * (2 - s)) * gain) / start for s in SCALES]
        growth = np.sqrt(after(stretch) / start) - np.sqrt(before / start)
        worst = max(float(np.max(errors)), float(growth.max()))
        seen = max(seen, worst)
        slack[name(memory)] = 1e-12 - worst
    return ctx.cases(slack, our_value=seen, note=f"largest deviation {seen:.1e}", validity="searched")


# -- D2: the residual is not monotone ---------------------------------------------------------------------------------------


@claim(
    PAPER,
    "D2",
    r"The Euclidean norm of the residual is not monotone: it may rise in one step by more than $\|r_0\|$.",
    title="The residual may rise",
    kind="bound",
    controls={"energy": "the same said of the energy norm of the error"},
    regime="existence: the largest rise in random problems, for f(r) = -r (conjugate gradients), sign and relu",
    source="Derived.",
    blind_spot="An existence statement; the size of the rise depends on the spectrum.",
)
def residual_rises(ctx: Context) -> Outcome:
    # A random right-hand side: the smooth part of its solution makes the error large and the residual not.
    energy = ctx.pick(False, energy=True)
    found = {}
    for kind in ("opposite", "sign", "relu"):
        runs = trajectories(ctx.paper_key, 2, (kind,), count=ctx.n(MANY), smooth=1.0)
        sizes = np.sqrt(runs.energy) if energy else np.linalg.norm(runs.r, axis=2)
        found[kind] = float((np.diff(sizes, axis=1) / sizes[:, :1]).max())
    kind = max(found, key=found.__getitem__)
    note = ", ".join(f"{k}: {100 * v:.0f} % of the first" for k, v in found.items())
    return ctx.cases({f"largest rise, {kind}": found[kind] - 1.0}, our_value=found[kind], note=note)


# -- D3: conjugate gradients --------------------------------------------------------------------------------------------------


def hestenes_stiefel(a: jax.Array, b: jax.Array, m: jax.Array, steps: int) -> jax.Array:
    """Iterates (steps + 1, n) of preconditioned conjugate gradients as in the textbook."""

    def step(carry: Any, _: None) -> Any:
        x, r, z, p = carry
        image = a @ p
        alpha = (r @ z) / (p @ image)
        x, after = x + alpha * p, r - alpha * image
        new = m @ after
        return (x, after, new, new + (after @ new) / (r @ z) * p), x

    zero = jnp.zeros_like(b)
    _, xs = jax.lax.scan(step, (zero, b, m @ b, m @ b), length=steps)
    return jnp.concatenate([zero[None], xs])


@functools.partial(compiled, static_argnames=("memory",))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _cg_difference(grid: Grid, preconditioned: jax.Array, memory: int) -> jax.Array:
    """Differences of ‖e_k‖_A to the textbook's over ‖e_0‖_A, k = 0 ... 25."""
    a = grid_matrix(grid)
    b = a @ grid.solution
    m = jnp.where(preconditioned, symmetric_gauss_seidel(a), jnp.eye(len(a)))
    ours = cd.iterates(lambda v: a @ v, b, 25, direction=lambda r: m @ r, memory=memory).x
    e = grid.solution - jnp.stack([ours, hestenes_stiefel(a, b, m, 25)])
    sizes = jnp.sqrt(jnp.einsum("...i,ij,...j", e, a, e))
    return jnp.abs(sizes[0] - sizes[1]) / sizes[0, 0]


@claim(
    PAPER,
    "D3",
    r"For $f(r)=r$ and memory $\ge1$ the method is conjugate gradients, for $f(r)=Mr$ with $M$ fixed, symmetric and positive "
    r"definite it is preconditioned conjugate gradients.",
    title="Conjugate gradients are a special case",
    kind="exact",
    controls={"steepest": "memory 0, which is steepest descent"},
    regime="Poisson problems with random conductivities, 144 unknowns, 25 steps, or 12 with M one symmetric Gauss-Seidel "
    "sweep: before rounding has destroyed conjugacy, from where on all variants differ",
    source="Derived; the paper's comparison with conjugate gradients presupposes it.",
)
def conjugate_gradients(ctx: Context) -> Outcome:
    grids = draw_grids(ctx.key, ctx.n(16), 10)
    worst = {}
    for memory in (1, 2):
        # Steps before the first Ritz value converges and rounding takes over.
        for what, preconditioned, steps in (("plain", False, 25), ("preconditioned", True, 12)):
            found = np.asarray(_cg_difference(grids, preconditioned, ctx.pick(memory, steepest=0)))
            worst[f"memory {memory}, {what}"] = float(found[:, : steps + 1].max())
    return ctx.cases(
        {what: -v for what, v in worst.items()},
        tolerance=1e-9,
        tolerance_reason="rounding grows with the loss of conjugacy; 1e-13 as a rule",
        our_value=max(worst.values()),
        validity="searched",
    )


# -- D4: termination ------------------------------------------------------------------------------------------------------------


@functools.partial(compiled, static_argnames=("memory",))
@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _terminating(key: jax.Array, kind: jax.Array, memory: int | None) -> jax.Array:
    """‖e_n‖_A and the one before, over ‖e_0‖_A, on a 5 × 5 × 5 box, with random weights and a random solution."""
    draws = jax.random.normal(key, (126, 125))
    weights, solution = draws[:125] / np.sqrt(125), draws[125]
    line = 2 * np.eye(5) - np.eye(5, k=1) - np.eye(5, k=-1)
    one = np.eye(5)
    a = jnp.asarray(
        np.kron(np.kron(line, one), one) + np.kron(np.kron(one, line), one) + np.kron(np.kron(one, one), line)
    )
    f = direction(kind, weights)
    e = solution - cd.iterates(lambda v: a @ v, a @ solution, 125, direction=f, memory=memory, passes=2).x
    sizes = jnp.sqrt(jnp.einsum("ki,ij,kj->k", e, a, e))
    return sizes[jnp.array([-1, -2])] / sizes[0]


@claim(
    PAPER,
    "D4",
    r"With full memory $e_n=0$, if the directions stay independent.",
    title="Full memory terminates",
    kind="exact",
    controls={"two": "memory 2", "ten": "memory 10"},
    regime="5 x 5 x 5 box, three smooth directions, orthogonalised twice, two draws of the weights each",
    source="Derived.",
    blind_spot="Independence is generic for smooth directions only: a relu layer whose units never switch on keeps all its "
    "directions in a subspace, and the error stays.",
)
def termination(ctx: Context) -> Outcome:
    kinds = [KINDS.index(k) for k in ("tanh", "sine", "tilted")] * ctx.n(2)
    keys = jax.random.split(ctx.paper_key, len(kinds))
    last = np.asarray(_terminating(keys, jnp.array(kinds), ctx.pick(None, two=2, ten=10)))
    slack = {f"{KINDS[k]} {i}": 1e-10 - v for i, (k, v) in enumerate(zip(kinds, last[:, 0], strict=True))}
    note = f"last error at most {last[:, 0].max():.1e} of the first, the one before at least {last[:, 1].min():.1e}"
    return ctx.cases(slack, our_value=float(last[:, 0].max()), note=note, validity="searched")


# -- D5: orthogonality ------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "D5",
    r"With memory $\mu$ the error $e_k$ is $A$-orthogonal to the last $\mu+1$ directions $p_{k-1},\dots,p_{k-1-\mu}$, for "
    r"any direction function.",
    title="One more orthogonality than is kept",
    kind="exact",
    controls={"one_more": r"orthogonal to the last $\mu+2$"},
    regime="two decades of eigenvalues, 24 unknowns, nonlinear directions, memory 0, 1 and 2, while the error is above 1e-3",
    source="Derived; the reason why two kept directions make three conjugate ones.",
)
def orthogonality(ctx: Context) -> Outcome:
    extra = ctx.pick(0, one_more=1)
    # For -r, conjugate gradients, all cosines vanish and the control would see nothing.
    kinds = ("relu", "tanh", "sign", "cube", "sine", "tilted")
    slack, seen = {}, []
    back = np.arange(STEPS + 1)[:, None] - np.arange(STEPS)[None, :]
    for memory in (0, 1, 2):
        runs = trajectories(ctx.paper_key, memory, kinds, 2.0, count=ctx.n(MANY))
        e, size = runs.solution[:, None] - runs.x, np.sqrt(runs.energy)
        length = np.sqrt(quadratic(runs.a, runs.p))
        product = e @ runs.a @ runs.p.transpose(0, 2, 1)
        cosine = np.abs(product) / np.maximum(size[:, :, None] * length[:, None, :], 1e-300)
        large = (size > 1e-3 * size[:, :1])[:, :, None]
        worst = float(np.max(np.where((back >= 1) & (back <= memory + 1 + extra) & large, cosine, 0)))
        following = float(np.median(np.max(np.where((back == memory + 2) & large, cosine, 0), axis=(1, 2))))
        seen.append(f"memory {memory}: {worst:.0e}, the next {following:.2f}")
        slack[name(memory)] = -worst
    return ctx.cases(
        slack,
        tolerance=1e-9,
        tolerance_reason="cosines of errors at 1e-3 of the first, in 64 bits",
        note="; ".join(seen),
        validity="searched",
    )


# -- D8: scale -------------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "D8",
    r"With the residual normalised, the iterates for $(cb, sf)$ are $c\,x_k$ for all $c>0$ and $s\ne0$, the sign of the "
    r"direction included.",
    title="Scale invariance",
    kind="exact",
    controls={
        "raw": "the residual not normalised, with a biased direction",
        "negative": "claimed for c < 0, where a direction that is not odd differs",
    },
    regime="c = 1e6 and 1e-6, s = -7.3 and 1e-5, ten steps, biased relu and tanh layers",
    source="Derived; the paper normalises the input of its network.",
)
def scale_invariance(ctx: Context) -> Outcome:
    sign, normalize = ctx.pick(1.0, negative=-1.0), ctx.pick(True, raw=False)
    plain, *others = (
        trajectories(ctx.paper_key, 2, ("relu", "tanh", "tilted"), 2.0, c, s, normalize, ctx.n(MANY)).x / c
        for c, s in ((1.0, 1.0), (sign * 1e6, -7.3), (sign * 1e-6, 1e-5), (sign * 1e6, 1e-5), (sign * 1e-6, -7.3))
    )
    size = np.abs(plain).max((1, 2), keepdims=True)
    worst = max(float((np.abs(x - plain) / size)[:, :11].max()) for x in others)
    return ctx.cases(
        {"largest difference": -worst},
        tolerance=1e-9,
        tolerance_reason="the scaled residual rounds differently, and relu amplifies that",
        our_value=worst,
        validity="searched",
    )
