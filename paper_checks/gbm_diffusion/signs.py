"""T4, T14 and T15: which sampler keeps the sign, and which gradient descent it is."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from generative import exponentiated, gbm_diffusion, samplers
from paper_checks.gbm_diffusion.common import MU, PAPER, SIGMA
from paper_checks.gbm_diffusion.flow import target
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context


def _given(score: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """Any numbers at all for a score."""
    del t
    return jnp.broadcast_to(score, y.shape)


@functools.lru_cache(maxsize=256)
def one_step(method: str, sigma: float, delta: float, sign: float, seed: int, n: int) -> tuple[np.ndarray, int]:
    """x after one step of length `delta` in time from entries of that sign, with wild scores; how many had to be clipped."""
    process = gbm_diffusion.GeometricBrownianMotion(sigma**2 / 2, sigma)
    draw, spread, noise = jax.random.split(jax.random.key(seed), 3)
    x = sign * jnp.exp(2 * jax.random.normal(draw, (n, 1)))
    score = jax.tree_util.Partial(_given, 3 * jax.random.normal(spread, (n, 1)))
    times = jnp.array([1.0, 1.0 - delta])
    found, info = samplers.sample(noise, score, process, x, times, method=method, last="step", throw=False)
    return np.asarray(found), int(info.overflowed)


CROSSING = {0.1: 2.3e-5, 0.25: 3.5e-3, 0.5: 2.0e-2, 1.0: 4.9e-2}


@functools.lru_cache(maxsize=8)
def crossed(delta: float, seed: int, n: int) -> float:
    """How many of n steps of the unconstrained sampler cross zero where ξ = -1, which is a score in log x of zero."""
    process = gbm_diffusion.GeometricBrownianMotion(MU, SIGMA)
    flat = jax.tree_util.Partial(_given, jnp.zeros((n, 1)))
    times = jnp.array([1.0, 1.0 - delta])
    _, info = samplers.sample(
        jax.random.key(seed), flat, process, jnp.ones((n, 1)), times, method="ums", last="step", throw=False
    )
    return float(info.negative)


@claim(
    PAPER,
    "T4",
    r"Every step of the Dale-Langevin sampler keeps every entry positive, whatever the step size, the score and the noise.  At "
    r"$\sigma=.8$, $\xi=-1$ one of the unconstrained sampler crosses zero with the probability "
    r"$\Phi(-(1+\delta\sigma^2-\delta\mu)/\sigma\sqrt\delta)$: $2.3\cdot10^{-5}$, $3.5\cdot10^{-3}$, $.020$, $.049$ for "
    r"$\delta=.1$, $.25$, $.5$, $1$.",
    title="DLS keeps the sign, for every step",
    kind="bound",
    controls={
        "ums": "the unconstrained multiplicative sampler",
        "divergence": r"$1-\delta\mu$ for $1+\delta\sigma^2-\delta\mu$: half of the divergence of the diffusion",
        "deviation": r"$\sigma^2\sqrt\delta$ for $\sigma\sqrt\delta$",
    },
    regime="σ from .001 to 50 and δ from 1e-6 to 1, so that σ²δ goes up to 2500; scores and starts of any size; where exp would "
    "overflow the exponent is clipped and counted.  Crossings among 100 000 steps of the library's sampler, six standard "
    "deviations either way, which fewer than one run in 10^7 leaves",
    source="The abstract; the update is a product with an exponential.",
    blind_spot="At the paper's own step, 1e-3, no sampler crosses zero.",
)
def positive(ctx: Context) -> Outcome:
    method = ctx.pick("dls", ums="ums")
    slack, clipped = {}, 0
    seed = int(jax.random.bits(ctx.key)) % 2**31
    for sigma in (1e-3, 0.8, 5.0, 50.0):
        for delta in (1e-6, 0.1, 0.5, 1.0):
            x, over = one_step(method, sigma, delta, 1.0, seed, ctx.n(1000))
            slack[f"σ = {sigma}, δ = {delta}"] = -float(1 - (np.isfinite(x) & (x > 0)).mean())
            clipped += over
    shown = []
    for delta, figure in CROSSING.items():
        drift = ctx.pick(1.0, divergence=0.0) * SIGMA**2 - MU
        deviation = SIGMA ** ctx.pick(1, deviation=2) * math.sqrt(delta)
        chance = float(special.ndtr(-(1 + delta * drift) / deviation))
        slack[f"crossing, δ = {delta}"] = 0.03 - abs(chance / figure - 1)  # half of the last digit
        if delta > 0.1:  # else it is too rare to be counted
            seen = crossed(delta, seed, 100_000)
            away = (seen - chance) / math.sqrt(chance * (1 - chance) / 100_000)
            slack[f"crossing, δ = {delta}, seen"] = 1 - abs(away) / 6
            shown.append(f"{chance:.2e} ({seen:.2e})")
    return ctx.cases(
        slack,
        note=f"{clipped} exponents clipped; a step of UMS with δ = .25, .5, 1 crosses zero with the probability (and in so many "
        f"of 100 000 cases): {', '.join(shown)}",
    )


@claim(
    PAPER,
    "T15",
    r"On negative data the Dale-Langevin sampler is the mirror image of itself: it maps $x<0$ to $x<0$.",
    title="Negative data stay negative",
    kind="bound",
    controls={"ums": "the unconstrained multiplicative sampler, which changes signs"},
    regime="one step of δ = .5 and 1 at σ = .8 from negative entries; with the same noise |x| is that from |x_T|",
    source="Derived.",
)
def mirrored(ctx: Context) -> Outcome:
    method, slack = ctx.pick("dls", ums="ums"), {}
    seed = int(jax.random.bits(ctx.key)) % 2**31
    for delta in (0.5, 1.0):
        below, _ = one_step(method, SIGMA, delta, -1.0, seed, ctx.n(4000))
        above, _ = one_step(method, SIGMA, delta, 1.0, seed, ctx.n(4000))
        slack[f"sign kept, δ = {delta}"] = -float((below >= 0).mean())
        slack[f"mirror image, δ = {delta}"] = -float(np.abs(below + above).max())
    return ctx.cases(slack)


@claim(
    PAPER,
    "T14",
    r"$w\circ e^{-\eta g}$ is mirror descent with $\phi=\sum w\log w-w$, and the proximal step of "
    r"$\langle g,\cdot\rangle$ with the relative entropy.  A noiseless step of the Dale-Langevin sampler is this with "
    r"the gradient of $-\log p_Y$ in log coordinates.",
    title="Exponentiated gradient, by three names",
    kind="exact",
    controls={
        "euclidean": r"the Euclidean gradient for that in log coordinates",
        "squares": r"the proximal step with $\tfrac12\|u-w\|^2$",
    },
    regime="random positive weights and gradients; the mixture on the line at t = .37, μ = σ²/2",
    source="Kivinen and Warmuth (1997); Hsieh et al. (2018); derived.",
)
def three_names(ctx: Context) -> Outcome:
    euclidean, squares = ctx.pick(False, euclidean=True), ctx.pick(False, squares=True)
    first, second = jax.random.split(ctx.key)
    w = jnp.exp(jax.random.normal(first, (5,)))
    g = jax.random.normal(second, (5,))
    rate = 0.3
    step = exponentiated.exponentiated_gradient(w, g, rate)
    mirror = exponentiated.mirror_step(exponentiated.NegativeEntropy(), w, g, rate)
    slack = {"mirror descent": 1e-12 - float(jnp.abs(step - mirror).max())}

    def objective(u: np.ndarray, i: int) -> float:
        away = 0.5 * (u - w[i]) ** 2 if squares else u * np.log(u / w[i]) - u + w[i]
        return float(g[i] * u + away / rate)

    found = [
        optimize.minimize_scalar(
            objective, args=(i,), method="bounded", bounds=(1e-6, 50.0), options={"xatol": 1e-10}
        ).x
        for i in range(5)
    ]
    slack["proximal step"] = 1e-6 - float(np.abs(np.asarray(found) - np.asarray(step)).max())

    process, t, delta = gbm_diffusion.GeometricBrownianMotion(), jnp.asarray(0.37), 0.2
    law = target().at(process, t)
    x = jnp.exp(jnp.linspace(-1.5, 1.5, 11))[:, None]
    drift = gbm_diffusion.reverse_log_drift(process, target().log_score(process), jnp.log(x), t)

    def energy(x: jax.Array) -> jax.Array:
        return -law.log_prob_of_log(jnp.log(x)).sum()

    gradient = jax.grad(energy)(x) if euclidean else exponentiated.log_gradient(energy, x)
    noiseless = x * jnp.exp(delta * drift)
    away = jnp.abs(noiseless - exponentiated.exponentiated_gradient(x, gradient, delta * SIGMA**2))
    slack["Dale-Langevin without noise"] = 1e-12 - float(away.max())
    return ctx.cases(slack, note="the minimiser of the proximal step is searched for, to 1e-6")
