"""P8 to P14: envelopes, inequalities, other steps and other constructions around a learned proximal network."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.proximal.common import PAPER
from paper_checks.proximal.networks import SIZES, all_certified, networks, over, prior_at, signals
from solvers import proximal
from solvers.proximal.network import LearnedProximal

# -- P8: the Moreau envelope ------------------------------------------------------------------------------------------------


@over
def _envelopes(net: LearnedProximal, y: jax.Array) -> tuple[jax.Array, ...]:
    """R(f(y)) + ‖f(y) - y‖²/2 by an inversion, ‖y‖², ψ(y), the gradient of ‖·‖²/2 - ψ, and f(y)."""
    x = net(y)
    value = proximal.regularizer(net).evaluate(x).value + jnp.sum((x - y) ** 2) / 2
    slope = jax.grad(lambda y: jnp.vdot(y, y) / 2 - net.potential(y))(y)
    return value, jnp.vdot(y, y), net.potential(y), slope, x


@claim(
    PAPER,
    "P8",
    r"The Moreau envelope of $R_\theta$ is $M_R(y)=\tfrac12\|y\|^2-\psi(y)$, with $\nabla M_R=y-f(y)$.",
    title="The Moreau envelope is known without an inversion",
    kind="exact",
    controls={"whole": r"$\|y\|^2-\psi(y)$", "offset": r"$\nabla M_R=f(y)$"},
    regime="networks on 1 and 4 entries; R(f(y)) + ‖f(y) - y‖²/2 by inverting the network at f(y)",
    source="Derived.",
)
def envelope(ctx: Context) -> Outcome:
    half, turned = ctx.pick(0.5, whole=1.0), ctx.pick(False, offset=True)
    slack = {}
    for n in SIZES:
        y = signals(ctx, n, 1.0, 8)
        value, squared, psi, slope, x = (np.asarray(v) for v in _envelopes(networks(ctx, n), y))
        slack[f"value, {n} entries"] = -float(np.abs(value - half * squared + psi).max())
        slack[f"gradient, {n} entries"] = -float(np.abs(slope - (x if turned else np.asarray(y) - x)).max())
    return ctx.cases(slack, tolerance=1e-9, tolerance_reason="rounding, and an inversion that is exact to second order")


# -- P9: inequalities -------------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P9",
    r"$\langle f(a)-f(b),a-b\rangle\ge\tfrac1L\|f(a)-f(b)\|^2$ and $\ge\alpha\|a-b\|^2$.",
    title="Cocoercivity and strong monotonicity",
    kind="bound",
    controls={
        "firm": r"firm non-expansiveness: $1$ for $1/L$",
        "doubled": r"$2\alpha$ for $\alpha$",
    },
    regime="networks on 1 and 4 entries, L certified; pairs near the origin and where the network has saturated",
    source="Derived.",
)
def inequalities(ctx: Context) -> Outcome:
    firm, share = ctx.pick(False, firm=True), ctx.pick(1.0, doubled=2.0)
    slack, tight = {}, 0.0
    for n in SIZES:
        nets = networks(ctx, n)
        constant = 1.0 if firm else np.array([c.lipschitz for c in all_certified(nets)])[:, None]
        a = jnp.concatenate([signals(ctx, n, 1.0, 100), signals(ctx, n, 100.0, 40)])

        def products(net: Any, a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            b = a + jnp.cos(3 * jnp.arange(a.size) + 100 * a[0])
            d = net(a) - net(b)
            return jnp.vdot(d, a - b), jnp.vdot(d, d), jnp.sum((a - b) ** 2)

        inner, image, squared = (np.asarray(v) for v in over(products)(nets, a))
        slack[f"cocoercive, {n} entries"] = float((1 - image / constant / inner).min())
        monotone = share * nets.alpha * squared / inner
        slack[f"monotone, {n} entries"] = float((1 - monotone).min())
        tight = max(tight, float(monotone.max()))
    return ctx.cases(
        slack, tolerance=1e-9, tolerance_reason="rounding of differences at a distance of 100", tightness=tight
    )


# -- P10: other steps -------------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P10",
    r"For $0<\lambda\le1$, and for $\lambda<L/(L-1)$ if $L>1$: $\operatorname{prox}_{\lambda R_\theta}(y)=f_\theta(z)$ with "
    r"$z=\arg\min_z(1-\lambda)\psi(z)+\tfrac\lambda2\|z\|^2-\langle y,z\rangle$.",
    title="The proximal map for other steps",
    kind="exact",
    controls={
        "relaxed": r"the relaxation $y+\lambda(f(y)-y)$",
        "ignored": r"$f(y)$ for every $\lambda$",
    },
    regime="networks in one dimension, λ = .2, .5, .9, 1 and halfway from 1 to the limit of the certified L; against the least "
    "value on a grid of 200 000 points",
    source="Derived; the step of later work on relaxed proximal maps.",
)
def scaled(ctx: Context) -> Outcome:
    kind = ctx.pick("exact", relaxed="relaxed", ignored="ignored")
    nets = networks(ctx, 1)
    z = jnp.linspace(-60, 60, 200_001)[:, None]
    slack: dict[str, float] = {}
    for k, certified in enumerate(all_certified(nets)[:3]):
        net = jax.tree.map(lambda w, k=k: w[k], nets)
        prior = proximal.regularizer(net)
        x, r = eqx.filter_jit(lambda net: jax.vmap(lambda z: (net(z)[0], prior_at(net, z)))(z))(net)
        limit = 1 + 0.5 / (certified.lipschitz - 1) if certified.lipschitz > 1 else 1.1
        for lam in (0.2, 0.5, 0.9, 1.0, limit):
            for y in (-1.1, 0.3, 2.0):
                v = jnp.array([y])
                best = float(x[jnp.argmin(lam * r + (x - y) ** 2 / 2)])
                relaxed = v + (1 if kind == "ignored" else lam) * (net(v) - v)
                found = prior.prox(v, lam) if kind == "exact" else relaxed
                slack[f"network {k}, λ = {lam:.4g}, y = {y}"] = 4e-3 - abs(float(found[0]) - best)
    return ctx.cases(
        slack, note="grid points are up to .006 apart where the slope is ten, so that 4e-3 is their resolution"
    )


# -- P11: averages of patches -----------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P11",
    r"$\sum_iP_i^\top f(P_ix)$ is the gradient of a convex function; divided by a non-uniform count $D$ of overlaps it is "
    r"proximal only in the metric of $D$: $DJ$ is symmetric, $J$ is not.  With uniform counts it is proximal.",
    title="Averages of overlapping patches",
    kind="exact",
    controls={"plain": r"$J$ itself symmetric for patches that end at the borders"},
    regime="a network on 3 entries, patches of 3 on 8 entries: ending at the borders (counts 1, 2, 3, 3, ..., 1), or around",
    source="Derived; the tomography code of the paper averages over non-uniform counts.",
)
def patches(ctx: Context) -> Outcome:
    plain = ctx.pick(False, plain=True)

    def averaged(net: Any, x: jax.Array, around: bool) -> tuple[jax.Array, jax.Array]:
        n = x.size
        places = jnp.arange(n if around else n - 2)[:, None] + jnp.arange(3)
        places = places % n
        count = jnp.zeros(n).at[places.reshape(-1)].add(1.0)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.zeros(n).at[places.reshape(-1)].add(jax.vmap(net)(x[places]).reshape(-1)) / count

        j = jax.jacfwd(mean)(x)
        weighted = j if plain else count[:, None] * j
        return jnp.abs(weighted - weighted.T).max(), jnp.abs(j - j.T).max()

    nets, x = networks(ctx, 3), signals(ctx, 8)
    weighted, unweighted = over(lambda net, x: averaged(net, x, False))(nets, x)
    around, same = over(lambda net, x: averaged(net, x, True))(nets, x)
    return ctx.cases(
        {
            "borders, in the metric of the counts": 1e-10 - float(weighted.max()),
            "around": 1e-10 - float(jnp.maximum(around, same).max()),
        },
        note=f"J itself is off symmetry by {float(unweighted.max()):.2g} with borders; 1e-10 is rounding",
    )


# -- P12: what can be represented -------------------------------------------------------------------------------------------


STEPS = 2000


@functools.partial(jax.jit, static_argnames="hidden")
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _fitted(key: jax.Array, target: jax.Array, hidden: int) -> jax.Array:
    """The largest error on [-3, 3] of a network fitted to values there."""
    y = jnp.linspace(-3, 3, target.size)[:, None]
    net = proximal.mlp(key, 1, hidden=hidden, layers=1, beta=20.0, alpha=0.0, dtype=jnp.float64)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS))

    def loss(net: LearnedProximal) -> jax.Array:
        return jnp.mean((jax.vmap(net)(y)[:, 0] - target) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        net, state = carry
        updates, state = optimizer.update(jax.grad(loss)(net), state)
        return (proximal.projected(optax.apply_updates(net, updates)), state), None

    (net, _), _ = jax.lax.scan(step, (net, optimizer.init(net)), length=STEPS)
    return jnp.abs(jax.vmap(net)(y)[:, 0] - target).max()


@claim(
    PAPER,
    "P12",
    "Gradients of input-convex networks are dense in the gradients of convex functions on compact sets, so that learned "
    "proximal networks approximate every continuous proximal map.",
    title="Every continuous proximal map can be approximated",
    kind="trained",
    controls={
        "decreasing": r"the target $-y$, which is no proximal map",
        "no_wider": "24 units for both of the widths that are compared",
    },
    regime="the soft threshold at 1 and the projection on [-1, 1], on [-3, 3]; best of two networks each of 1 and of 24 units, "
    "whose error is to be less than two thirds as large",
    source="Recalled (Huang et al. 2021).",
    blind_spot="Density is a limit: what is seen is that the error falls below .05 and with the width, in one dimension.",
)
def expressivity(ctx: Context) -> Outcome:
    y, widths = jnp.linspace(-3, 3, 121), ctx.pick((1, 24), no_wider=(24, 24))
    maps = {"soft threshold": jnp.sign(y) * jnp.maximum(jnp.abs(y) - 1, 0), "projection": jnp.clip(y, -1, 1)}
    slack: dict[str, float] = {}
    found = []
    for name, target in ctx.pick(maps, decreasing={"minus": -y}).items():
        few, many = (float(_fitted(jax.random.split(ctx.key, 2), target, hidden).min()) for hidden in widths)
        slack[f"{name}, 24 units"] = 0.05 - many
        slack[f"{name}, falls with the width"] = few - 1.5 * many
        found.append(f"{name} {few:.3f}, {many:.3f}")
    return ctx.cases(slack, note=f"largest errors with {widths[0]} and {widths[1]} units: {'; '.join(found)}")


# -- P13: the price of α ----------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P13",
    r"Any $f$ with $f-\alpha\,\mathrm{id}$ monotone has $\sup_{|y|\le T}|f(y)-\operatorname{soft}_T(y)|\ge\alpha T$.",
    title="The price of strong convexity in flat regions",
    kind="bound",
    controls={"larger": r"$1.1\,\alpha T$"},
    regime="random networks in one dimension and $f(y)=\\alpha y$, which attains it; α = .05, .3, .8, T = .5, 1, 2",
    source="Derived: f(T) - f(-T) ≥ 2αT.",
)
def floor(ctx: Context) -> Outcome:
    share = ctx.pick(1.0, larger=1.1)
    slack, least = {}, np.inf
    for alpha in (0.05, 0.3, 0.8):
        nets = networks(ctx, 1, alpha)
        linear = eqx.tree_at(
            lambda m: (m.output, m.output_skip), nets, (0 * nets.output, jnp.zeros((len(nets.output), 1)))
        )
        for threshold in (0.5, 1.0, 2.0):
            y = threshold * jnp.linspace(-1, 1, 201)[:, None]  # where the soft threshold is zero
            for name, some in (("random", nets), ("linear", linear)):
                error = np.abs(np.asarray(over(lambda net, y: net(y)[0])(some, y))).max(1)
                ratio = float((error / (share * alpha * threshold)).min())
                slack[f"{name}, α = {alpha}, T = {threshold}"] = ratio - 1
                least = min(least, ratio)
    return ctx.cases(slack, tolerance=1e-12, tolerance_reason="rounding where it is attained", tightness=1 / least)


# -- P14: α added after training --------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "P14",
    r"Adding $\tfrac\alpha2\|\cdot\|^2$ to $\psi$ after training replaces $R+\tfrac12\|\cdot\|^2=\psi^*$ by its Moreau envelope "
    r"$\min_w\psi^*(w)+\tfrac1{2\alpha}\|x-w\|^2$: a lower and smoother prior.",
    title="What adding α after training does to the prior",
    kind="exact",
    controls={"unchanged": r"$\psi^*$ itself", "wider": r"$\tfrac1{4\alpha}$ for $\tfrac1{2\alpha}$"},
    regime="networks in one dimension with α = .1, to which .3 is added; the envelope on a grid of 100 000 points",
    source="Derived.",
)
def added(ctx: Context) -> Outcome:
    kind = ctx.pick("envelope", unchanged="unchanged", wider="wider")
    more, nets = 0.3, networks(ctx, 1)
    z = jnp.linspace(-80, 80, 100_001)[:, None]
    worst = lower = 0.0
    for k in range(4):
        net = jax.tree.map(lambda w, k=k: w[k], nets)
        conjugate = eqx.filter_jit(
            lambda net: jax.vmap(lambda z: (net(z)[0], jnp.vdot(net(z), z) - net.potential(z)))(z)
        )
        w, value = conjugate(net)
        lifted = LearnedProximal(
            net.layers, net.output, net.output_skip, net.constant, net.shape, net.beta, net.alpha + more
        )
        for x in (-1.0, 0.2, 1.7):
            exact = float(proximal.regularizer(lifted)(jnp.array([x]))) + x**2 / 2
            own = float(proximal.regularizer(net)(jnp.array([x]))) + x**2 / 2
            spread = {"envelope": 2 * more, "wider": 4 * more}.get(kind)
            claimed = own if spread is None else float(jnp.min(value + (x - w) ** 2 / spread))
            worst, lower = max(worst, abs(exact - claimed)), max(lower, exact - own)
    return ctx.cases(
        {"the envelope": 2e-4 - worst, "lower": 1e-9 - lower},
        note=f"largest difference {worst:.1g}; points of the grid are up to .02 apart, which is worth up to (.01)²/.6",
    )
