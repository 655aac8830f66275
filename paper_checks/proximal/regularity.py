"""P5 to P7': what the slopes and the weights of a network say of the curvature, smoothness and growth of its prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.proximal.common import PAPER
from paper_checks.proximal.networks import (
    SIZES,
    all_certified,
    compiled,
    largest,
    networks,
    over,
    prior_at,
    signals,
)
from solvers import proximal
from solvers.proximal.bounds import Certified
from solvers.proximal.network import Layer, LearnedProximal, jacobian

# -- P5 and P6: weak convexity and smoothness -------------------------------------------------------------------------------


@compiled
def _hessians(nets: LearnedProximal, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of ∇²R at f(y), by derivatives of the inversion; and of the Jacobian of f at y, by those of f."""

    def both(net: LearnedProximal, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        second = jax.jacfwd(proximal.regularizer(net).grad)(net(y))
        return jnp.linalg.eigvalsh((second + second.T) / 2), jnp.linalg.eigvalsh(jacobian(net, y))

    return jax.vmap(lambda net: jax.lax.map(lambda y: both(net, y), y))(nets)


@claim(
    PAPER,
    "P5",
    r"$R_\theta+\tfrac12(1-\tfrac1L)\|\cdot\|^2$ is convex, and the constant is sharp; $R_\theta$ is convex iff $L\le1$.",
    title="Weak convexity of the prior",
    kind="bound",
    controls={"smaller": r"$\tfrac12(1-\tfrac1L)-0.01$"},
    regime="networks on 1 and 4 entries; L the largest slope over the sample, where the bound must be attained",
    source="Derived.",
)
def weak_convexity(ctx: Context) -> Outcome:
    less = ctx.pick(0.0, smaller=0.02)
    slack, tight = {}, 0.0
    for n in SIZES:
        second, slopes = _hessians(networks(ctx, n), signals(ctx, n, 1.0, 8))
        constant = 1 - 1 / np.asarray(slopes.max((1, 2))) - less
        least = np.asarray(second.min((1, 2)))
        slack[f"{n} entries"] = float((least + constant).min())
        tight = max(tight, float((-least / constant).max()))
    return ctx.cases(
        slack,
        tolerance=1e-6,
        tolerance_reason="the inversion stops at 1e-8; a slope of 10 and the curvature of f multiply that",
        tightness=tight,
    )


@claim(
    PAPER,
    "P6",
    r"$\nabla R_\theta=f_\theta^{-1}-\mathrm{id}$ is Lipschitz with constant $\max(\tfrac1\alpha-1,\,|1-\tfrac1L|)$.",
    title="Smoothness of the prior",
    kind="bound",
    controls={"doubled": r"$2\alpha$ for $\alpha$"},
    regime="α = .1; signals of deviation 60, where the network has saturated and its slope is α in some direction",
    source="Derived.",
)
def smoothness(ctx: Context) -> Outcome:
    share = ctx.pick(1.0, doubled=2.0)
    slack, tight = {}, 0.0
    for n in SIZES:
        nets = networks(ctx, n)
        second, slopes = _hessians(nets, signals(ctx, n, 60.0, 6))
        constant = np.maximum(1 / (share * nets.alpha) - 1, np.abs(1 - 1 / np.asarray(slopes.max((1, 2)))))
        most = np.asarray(jnp.abs(second).max((1, 2)))
        slack[f"{n} entries"] = float((1 - most / constant).min())
        tight = max(tight, float((most / constant).max()))
    return ctx.cases(slack, tolerance=1e-6, tolerance_reason="the inversion stops at 1e-8", tightness=tight)


# -- P7: range and coercivity -----------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P7",
    r"$\|f_\theta(y)-\alpha y\|\le C$ for all $y$.  So $R_\theta(x)=\tfrac12(\tfrac1\alpha-1)\|x\|^2+O(\|x\|)$: finite "
    r"everywhere iff $\alpha>0$, coercive iff $\alpha<1$.",
    title="Why the theorem asks for 0 < α < 1",
    kind="bound",
    controls={
        "always": r"coercive for $\alpha=1.5$ and $2.5$ as well",
        "without": r"a range without $\alpha$: $\|f_\theta(y)\|\le C$",
    },
    regime="α = .5, .9, 1.5, 2.5 on 3 entries, signals at distances of 10, 100, 1000",
    source="Derived; the reason for a hypothesis of Theorem 4.1.",
)
def coercivity(ctx: Context) -> Outcome:
    always, share = ctx.pick(False, always=True), ctx.pick(1.0, without=0.0)
    slack: dict[str, float] = {}
    for n in (3,):
        u = signals(ctx, n, 1.0, 6)
        u = u / jnp.linalg.norm(u, axis=1, keepdims=True)
        for alpha in (0.5, 0.9, 1.5, 2.5):
            name, nets = f"α = {alpha}, {n} entries", networks(ctx, n, alpha)
            spread = np.array([c.spread for c in all_certified(nets)])
            far = jnp.concatenate([10 * u, 100 * u, 1000 * u])
            moved = over(lambda net, y: jnp.linalg.norm(net(y) - share * net.alpha * y))(nets, far)
            slack[f"range, {name}"] = float((1 - np.asarray(moved) / spread[:, None]).min())
            ratio = np.asarray(over(lambda net, y: prior_at(net, y) / jnp.sum(net(y) ** 2))(nets, 1e5 * u))
            slack[f"parabola, {name}"] = 1e-3 - float(np.abs(ratio - (1 / alpha - 1) / 2).max())
            if alpha < 1 or always:
                slack[f"coercive, {name}"] = float(ratio.min())
            else:
                slack[f"not coercive, {name}"] = -float(ratio.max())
    return ctx.cases(
        slack, note="R/‖x‖² at a distance of 1e5 α differs from its limit by terms of first order, below 1e-3"
    )


def _single_layer(weights: jax.Array, output: jax.Array) -> LearnedProximal:
    """ψ(y) = Σ w_j g(h_j y) + α y²/2 in one dimension: its largest slope is at 0, α + β/4 Σ w_j h_j²."""
    return LearnedProximal((Layer(weights[:, None], None, None),), output, None, None, (1,), 10.0, 0.1)


@claim(
    PAPER,
    "P7'",
    r"$A_k=W_kG_{k-1}+\|H_k\|$, $S_k=\tfrac\beta4A_k^2+W_kS_{k-1}$, $G_k=A_k$ give $L\le\alpha+w^\top S_K$ and "
    r"$\|f(y)-\alpha y\|\le w^\top G_K+\|h\|$.",
    title="Constants that hold everywhere, from the weights",
    kind="bound",
    controls={
        "eighth": r"$\tfrac\beta8$ for $\tfrac\beta4$",
        "less": r"$0.9\,w^\top G_K$ for $w^\top G_K$",
    },
    regime="one layer in one dimension, where both are attained, at 0 and far away; and three layers on 1 and 4 entries",
    source="Derived.",
)
def constants(ctx: Context) -> Outcome:
    curved, share = ctx.pick(1.0, eighth=0.5), ctx.pick(1.0, less=0.9)

    def ratios(found: Certified, alpha: float, slope: float, moved: float) -> tuple[float, float]:
        return slope / (alpha + curved * (found.lipschitz - alpha)), moved / (share * found.spread)

    simple = []
    for h, w in jnp.moveaxis(jnp.abs(jax.random.normal(ctx.key, (2, 20, 8), jnp.float64)), 0, 1):
        net = _single_layer(h, w)
        slope, moved = float(jacobian(net, jnp.zeros(1))[0, 0]), float(net(jnp.array([1e3]))[0] - 100.0)
        simple.append(ratios(proximal.certified(net), net.alpha, slope, moved))
    slack = dict(zip(("one layer, slope", "one layer, range"), 1 - np.max(simple, 0), strict=True))
    loose = []
    for n in SIZES:
        nets, y = networks(ctx, n), signals(ctx, n)
        found = all_certified(nets)
        slopes = np.asarray(over(largest)(nets, y).max(1))
        far = np.asarray(over(lambda net, y: jnp.linalg.norm(net(y) - net.alpha * y))(nets, 100 * y).max(1))
        both = [ratios(c, nets.alpha, s, m) for c, s, m in zip(found, slopes, far, strict=True)]
        slack[f"slope, {n} entries"], slack[f"range, {n} entries"] = 1 - np.max(both, 0)
        loose.append(f"{np.median([c.lipschitz / s for c, s in zip(found, slopes, strict=True)]):.0f}")
    return ctx.cases(
        slack,
        tolerance=1e-9,
        tolerance_reason="rounding where the bound is attained",
        tightness=float(np.max(simple, 0).min()),
        note=f"three layers: the certified L is {', '.join(loose)} times the largest slope found, on {SIZES} entries",
    )
