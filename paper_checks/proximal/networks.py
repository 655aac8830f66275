"""P1 to P4: what an input-convex network is, a proximal map, and how its prior is computed."""

from __future__ import annotations

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.proximal.common import PAPER
from paper_checks.proximal.digit_images import NOISE, free_denoiser, test_images
from solvers import proximal
from solvers.proximal import weights
from solvers.proximal.bounds import Certified
from solvers.proximal.network import LearnedProximal, constrained, jacobian

SIZES = (1, 4)
MANY = 8
SIGNALS = 24

# Much is compiled here and little computed: without the costly optimisations most of these claims take half the time.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def random_network(key: jax.Array, n: int, alpha: float = 0.1) -> LearnedProximal:
    """Three layers with weights that are not small: slopes from α to about ten."""
    net = proximal.mlp(key, n, hidden=12, layers=2, beta=8.0, alpha=alpha, dtype=jnp.float64)
    first = eqx.tree_at(lambda m: m.layers[0].weight, net, net.layers[0].weight * math.sqrt(n))
    return eqx.tree_at(lambda m: m.output, first, 3 * net.output)


def networks(ctx: Context, n: int, alpha: float = 0.1) -> LearnedProximal:
    """MANY of them, stacked along a first axis."""
    keys = jax.random.split(jax.random.fold_in(ctx.key, n), ctx.n(MANY))
    return jax.vmap(lambda key: random_network(key, n, alpha))(keys)


def all_certified(nets: LearnedProximal) -> list[Certified]:
    return [proximal.certified(jax.tree.map(lambda w, k=k: w[k], nets)) for k in range(len(nets.output))]


def signals(ctx: Context, n: int, spread: float = 2.0, count: int = SIGNALS) -> jax.Array:
    return spread * jax.random.normal(jax.random.fold_in(ctx.key, 1000 + n), (count, n), jnp.float64)


def over(f: Any) -> Any:
    """f(network, y) for all networks and all signals."""
    return compiled(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))


def largest(net: LearnedProximal, y: jax.Array) -> jax.Array:
    return jnp.linalg.eigvalsh(jacobian(net, y))[-1]


def prior_at(net: LearnedProximal, z: jax.Array) -> jax.Array:
    """R(f(z)), which needs no inversion."""
    x = net(z)
    return jnp.vdot(x, z) - jnp.vdot(x, x) / 2 - net.potential(z)


# -- P1: proximal maps are gradients of convex functions --------------------------------------------------------------------


def _asymmetry_and_least(f: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    j = jax.jacfwd(f)(y)
    return jnp.abs(j - j.T).max(), jnp.linalg.eigvalsh((j + j.T) / 2)[0]


def _mixture_median(y: jax.Array) -> jax.Array:
    """The coordinate-wise posterior median of a mixture of three Gaussians in the plane under noise of deviation 1, on a grid;
    it has a derivative because the cumulative sums are interpolated."""
    axis = jnp.linspace(-6, 6, 241)
    a, b = jnp.meshgrid(axis, axis, indexing="ij")
    exponents = [-((a - p) ** 2 + (b - q) ** 2) / 0.5 for p, q in ((-1.5, -1.0), (1.5, 1.2), (1.0, -1.8))]
    posterior = jnp.exp(jax.nn.logsumexp(jnp.stack(exponents), 0) - ((a - y[0]) ** 2 + (b - y[1]) ** 2) / 2)

    def median(marginal: jax.Array) -> jax.Array:
        total = jnp.cumsum(marginal)
        return jnp.interp(0.5, (total - marginal / 2) / total[-1], axis)

    return jnp.stack([median(posterior.sum(1)), median(posterior.sum(0))])


@claim(
    PAPER,
    "P1",
    r"A continuous $f$ on an open convex set is a proximal map iff $f=\nabla\psi$ for a convex $\psi$; for $f\in C^1$ iff its "
    r"Jacobian is symmetric and positive semi-definite everywhere.",
    title="Proximal maps are gradients of convex functions",
    kind="exact",
    controls={
        "free": r"a network $B\tanh(Ay)$ of the same size",
        "median": "the coordinate-wise posterior median of a mixture in the plane",
        "trained": "a free network, trained to denoise digits as well as the learned proximal one",
    },
    regime="random input-convex networks on 1 and 4 entries, signals of deviation 2; the shipped network of 8 x 8 digits at "
    "images with noise .1",
    source="Proposition 2.1 (Gribonval and Nikolova 2020), recalled.",
    blind_spot="One direction only, as far as Jacobians at samples show it: that nothing else has an R is the theorem itself.",
)
def gradients(ctx: Context) -> Outcome:
    kind = ctx.pick("network", free="free", median="median")
    slack: dict[str, float] = {}
    for n in SIZES:
        if kind == "network":
            asymmetry, least = over(_asymmetry_and_least)(networks(ctx, n), signals(ctx, n))
        elif kind == "free":
            if n == 1:
                continue  # in one dimension every Jacobian is symmetric
            a, b = jax.random.normal(ctx.key, (2, n, 12), jnp.float64)

            def free(y: jax.Array, a: jax.Array = a, b: jax.Array = b) -> jax.Array:
                return b @ jnp.tanh(a.T @ y)

            asymmetry, least = jax.vmap(lambda y, f=free: _asymmetry_and_least(f, y))(signals(ctx, n))
        else:
            asymmetry, least = jax.vmap(lambda y: _asymmetry_and_least(_mixture_median, y))(signals(ctx, 2, 1.0))
        slack[f"symmetric, {n} entries"] = 1e-10 - float(asymmetry.max())
        slack[f"semi-definite, {n} entries"] = 1e-10 + float(least.min())
    if kind == "network":
        trained = ctx.pick(False, trained=True)
        asymmetry, least = _of_digits(free_denoiser(0) if trained else weights.load("digits8x8"), ctx.key)
        slack |= {"symmetric, digits": 1e-4 - asymmetry, "semi-definite, digits": 1e-4 + least}
    return ctx.cases(
        slack,
        note="asymmetries and negative eigenvalues up to 1e-10 are rounding in 64 bits, up to 1e-4 in 32 (slopes up to ten)",
    )


def _of_digits(f: Any, key: jax.Array, count: int = 8) -> tuple[float, float]:
    """Largest asymmetry and least eigenvalue of the Jacobian at noisy images, in the 32 bits of trained weights."""
    images = jnp.asarray(test_images()[:count].reshape(count, 64), jnp.float32)
    seen = images + NOISE * jax.random.normal(key, images.shape, jnp.float32)

    def flat(y: jax.Array) -> jax.Array:
        return f(y.reshape(f.shape)).reshape(-1) if isinstance(f, LearnedProximal) else f(y)

    found = compiled(jax.vmap(lambda y: _asymmetry_and_least(flat, y)))(seen)
    return float(found[0].max()), float(found[1].min())


# -- P2: the network is exactly proximal ------------------------------------------------------------------------------------


def _silu_potential(net: LearnedProximal, y: jax.Array) -> jax.Array:
    z = y
    for layer in net.layers:
        total = layer.weight @ z
        if layer.skip is not None and layer.bias is not None:
            total = total + layer.skip @ y + layer.bias
        z = jax.nn.silu(net.beta * total) / net.beta
    return net.output @ z + net.alpha / 2 * jnp.vdot(y, y)


@claim(
    PAPER,
    "P2",
    r"With $g$ convex, non-decreasing and $C^2$, and $W_k,w\ge0$, $f_\theta=\nabla\psi_\theta$ is exactly "
    r"$\operatorname{prox}_{R_\theta}$ for some $R_\theta$.",
    title="A learned proximal network is exactly proximal",
    kind="bound",
    controls={
        "negative": r"one entry of $w$ set to $-3$",
        "unclamped": r"$W_k$ and $w$ of both signs",
        "silu": "the activation SiLU, which is neither convex nor monotone",
    },
    regime="random networks on 1 and 4 entries: eigenvalues of the Jacobian, and the objective of the proximal map at f(y), for "
    "100 signals y, against that at 400 other values of f, of which eight are near",
    source="Proposition 3.1, recalled.",
)
def exactly_proximal(ctx: Context) -> Outcome:
    kind = ctx.pick("network", negative="negative", unclamped="unclamped", silu="silu")
    slack: dict[str, float] = {}
    for n in SIZES:
        nets, y = networks(ctx, n), signals(ctx, n)
        if kind == "negative":
            nets = eqx.tree_at(lambda m: m.output, nets, nets.output.at[:, 0].set(-3.0))
        if kind == "unclamped":
            keys = jax.random.split(ctx.key, len(constrained(nets)))
            signed = (w * jax.random.rademacher(k, w.shape) for k, w in zip(keys, constrained(nets), strict=True))
            nets = eqx.tree_at(constrained, nets, tuple(signed))
        potential = _silu_potential if kind == "silu" else LearnedProximal.potential
        f = jax.grad(potential, 1)

        def least(net: Any, y: jax.Array, f: Any = f) -> jax.Array:
            return jnp.linalg.eigvalsh(jax.jacfwd(lambda y: f(net, y))(y))[0]

        slack[f"semi-definite, {n} entries"] = 1e-10 + float(over(least)(nets, y).min())
        far, near = signals(ctx, n, 3.0, 392), signals(ctx, n, 0.05, 8)

        def gaps(
            net: Any, y: jax.Array, f: Any = f, potential: Any = potential, far: jax.Array = far, near: jax.Array = near
        ) -> jax.Array:
            def own(z: jax.Array) -> tuple[jax.Array, jax.Array]:
                """f(z) and R(f(z))."""
                x = f(net, z)
                return x, jnp.vdot(x, z) - jnp.vdot(x, x) / 2 - potential(net, z)

            def least(y: jax.Array) -> jax.Array:
                x, value = jax.vmap(own)(jnp.concatenate([y[None], y + near]))
                x, value = jnp.concatenate([x, candidates]), jnp.concatenate([value, values])
                objective = value + jnp.sum((x - y) ** 2, 1) / 2
                return objective[1:].min() - objective[0]

            candidates, values = jax.vmap(own)(far)
            return jax.vmap(least)(y)

        found = compiled(jax.vmap(gaps, (0, None)))(nets, signals(ctx, n, count=100))
        slack[f"optimal, {n} entries"] = 1e-10 + float(found.min())
    return ctx.cases(slack, note="1e-10 is rounding in 64 bits")


# -- P3: the formula of the prior -------------------------------------------------------------------------------------------


@over
def _around(net: LearnedProximal, y: jax.Array) -> tuple[jax.Array, ...]:
    """At x = f(y) and 16 points at a distance of .05: ⟨x, z⟩, ‖x‖², ψ(z), ψ(x), ‖x - y‖² and ‖f(z) - x‖."""
    turns = jnp.cos(1.0 + jnp.arange(16.0)[:, None] * (1.3 + jnp.arange(y.size)))
    turns = 0.05 * turns / jnp.linalg.norm(turns, axis=1, keepdims=True)
    prior = proximal.regularizer(net)

    def one(x: jax.Array) -> tuple[jax.Array, ...]:
        found = prior.evaluate(x)
        z = found.inverse
        psi = net.potential(z), net.potential(x)
        return jnp.vdot(x, z), jnp.vdot(x, x), *psi, jnp.sum((x - y) ** 2), found.residual

    return jax.lax.map(one, jnp.concatenate([net(y)[None], net(y) + turns]))


@claim(
    PAPER,
    "P3",
    r"$R_\theta(x)=\langle x,f^{-1}(x)\rangle-\tfrac12\|x\|^2-\psi(f^{-1}(x))$.",
    title="The prior of a network by inverting it",
    kind="exact",
    controls={
        "whole": r"$\|x\|^2$ for $\tfrac12\|x\|^2$",
        "less": r"$0.4\,\|x\|^2$ for $\tfrac12\|x\|^2$",
        "wrong_point": r"$\psi(x)$ for $\psi(f^{-1}(x))$",
        "sign": "the other sign",
    },
    regime="networks on 3 entries; f(y) must minimise R(x) + ‖x - y‖²/2 among 16 points at distance .05",
    source="Section 3, and the authors' code.",
    blind_spot="Local optimality only; far points tell wrong formulas apart less well.",
)
def formula(ctx: Context) -> Outcome:
    half = ctx.pick(0.5, whole=1.0, less=0.4)
    wrong_point, sign = ctx.pick(False, wrong_point=True), ctx.pick(1.0, sign=-1.0)
    terms = _around(networks(ctx, 3), signals(ctx, 3, 1.0, 6))
    inner, squared, at_inverse, at_point, distance, residual = (np.asarray(v) for v in terms)
    values = sign * (inner - half * squared - (at_point if wrong_point else at_inverse)) + distance / 2
    gaps = values[..., 1:].min(-1) - values[..., 0]
    return ctx.cases(
        {"optimal": 1e-9 + float(gaps.min()), "inverted": 1e-7 - float(residual.max())},
        note=f"largest ‖f(z) - x‖ {residual.max():.1g}; 1e-9 is its effect, of second order, and rounding",
    )


# -- P4: an inexact inversion -----------------------------------------------------------------------------------------------

NODES, WEIGHTS = (0.5 * v for v in np.polynomial.legendre.leggauss(40))


def _gap_and_residual(net: LearnedProximal, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x = f(z) and points w near z: R(x) - R̂(x; w) and ‖f(w) - x‖²."""
    x = net(z)
    moves = jnp.array([1e-3, 1e-2, 0.1, 1.0])[:, None] * jnp.cos(jnp.arange(4.0)[:, None] + jnp.arange(z.size))

    def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        # ψ(w) - ψ(z) - ⟨x, w - z⟩ as an integral along the way from z to w, in which nothing cancels.
        slopes = jax.vmap(lambda s: jnp.vdot(net(z + s * (w - z)) - x, w - z))(0.5 + jnp.asarray(NODES))
        return jnp.vdot(jnp.asarray(WEIGHTS), slopes), jnp.sum((net(w) - x) ** 2)

    return jax.vmap(one)(z + moves)


@claim(
    PAPER,
    "P4",
    r"For any $z$, $\hat R(x;z)=\langle x,z\rangle-\tfrac12\|x\|^2-\psi(z)$ satisfies "
    r"$0\le R(x)-\hat R\le\|f(z)-x\|^2/(2\alpha)$, and $R(x)-\hat R\ge\|f(z)-x\|^2/(2L)$ with the global $L$.",
    title="A certificate for an inexact inversion",
    kind="bound",
    controls={
        "halved": r"the upper bound with $4\alpha$ for $2\alpha$",
        "sampled": r"the lower bound with the largest slope of eight samples for $L$",
    },
    regime="networks on 1 and 4 entries; exact inverses moved by 1e-3 to 1, near the origin and where the network has "
    "saturated, so that some slopes are α",
    source="Derived: convex duality.",
)
def inexact(ctx: Context) -> Outcome:
    factor, sampled = ctx.pick(2.0, halved=4.0), ctx.pick(False, sampled=True)
    upper, lower, negative = -math.inf, -math.inf, -math.inf
    for n in SIZES:
        nets = networks(ctx, n)
        constants = np.array([c.lipschitz for c in all_certified(nets)])
        if sampled:
            constants = np.asarray(over(largest)(nets, signals(ctx, n, 3.0, 8)).max(1))
        z = jnp.concatenate([signals(ctx, n, 1.0, 40), signals(ctx, n, 60.0, 8)])
        gap, squared = (np.asarray(v) for v in over(_gap_and_residual)(nets, z))
        upper = max(upper, float((gap * factor * nets.alpha / squared).max()) - 1)
        lower = max(lower, float((squared / (2 * constants[:, None, None]) / gap).max()) - 1)
        negative = max(negative, float(-gap.min()))
    return ctx.cases(
        {"upper bound": -upper, "lower bound": -lower, "one-sided": -negative},
        tolerance=1e-7,
        tolerance_reason="quadrature with 40 nodes along a path on which the slope changes",
        tightness=1 + upper,
    )
