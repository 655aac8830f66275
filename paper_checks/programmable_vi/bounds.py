"""V7 and V8: the order of the bounds, on tiny models and on the noisy cone, and the bias of the wake phase."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.nn import logsumexp

import vi
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.harness.numerics import enable_x64
from paper_checks.programmable_vi import models
from paper_checks.programmable_vi.common import (
    PAPER,
    Case,
    draws,
    line,
    normal,
    product,
    standard_normal,
    unbiased,
)

SOURCE = "The authors' public code and tables; figures re-derived.  The paper's own numbering is unverified."

# -- V7: the order on a model of two flips --------------------------------------------------------------------------------


def _draw_parameters(key: jax.Array) -> Any:
    k_theta, k_phi = jax.random.split(key)
    return {"theta": jax.random.normal(k_theta, (3,)), "phi": 2 * jax.random.normal(k_phi, (3,))}


def _order_violation(x: Any, fresh: Any, forgotten: Any) -> jax.Array:
    """The largest excess in nats; fresh: only fresh auxiliary choices; forgotten: times log N, missing in the mean."""
    theta, phi = x["theta"], x["phi"]
    table = models.coins.table(theta, phi, phi)
    log_z = logsumexp(table.log_p)
    iw = [models.iwelbo(table, n) + forgotten * math.log(n) for n in (1, 2, 3)]

    def auxiliary(m: int) -> models.Table:
        legal, only_fresh = (models.coins.auxiliary(theta, phi, m, fresh=f) for f in (False, True))
        # The rows of the one are the rows of the other with one more auxiliary choice.
        log_q = jnp.where(fresh, only_fresh.log_q, jnp.repeat(legal.log_q, 2))
        return models.Table(only_fresh.prob, only_fresh.log_p, log_q)

    tables = {m: auxiliary(m) for m in (1, 2)}
    hierarchical = [models.elbo(tables[m]) for m in (1, 2)]
    # The limit m -> infinity: q(y) itself.
    y = jnp.array([0.0, 1.0])
    log_q = jax.nn.log_sigmoid(jnp.where(y[:, None] == 1, 1, -1) * jnp.stack([phi[2], phi[1]]))
    log_q = logsumexp(log_q + jax.nn.log_sigmoid(jnp.stack([-phi[0], phi[0]])), axis=1)
    log_p = jax.nn.log_sigmoid(jnp.where(y == 1, 1, -1) * theta[0])
    log_p = log_p + normal(models.OBSERVED, theta[1] * y + theta[2], 1.0)
    marginal = models.Table(jnp.exp(log_q), log_p, log_q)
    doubly = {(n, m): models.iwelbo(tables[m], n) for n, m in ((1, 2), (2, 1), (2, 2))}
    scored = models.coins.auxiliary(theta, phi, 2, fresh=True)
    rising = [*iw, log_z], [*hierarchical, models.elbo(marginal), logsumexp(log_p)]
    pairs = [(low, high) for chain in rising for low, high in itertools.pairwise(chain)]
    pairs += [(doubly[1, 2], doubly[2, 2]), (doubly[2, 1], doubly[2, 2]), (doubly[2, 2], models.iwelbo(marginal, 2))]
    pairs += [(scored.prob @ scored.log_q, marginal.prob @ log_q)]
    return jnp.max(jnp.stack([low - high for low, high in pairs]))


FRESH = "only fresh auxiliary choices in the weight, the one that was drawn left out"


@claim(
    PAPER,
    "V7",
    r"$\mathbb{E}\log w_{est}\le\log q\le\mathbb{E}\log w_{sim}$; $\mathrm{IWELBO}_N\le\mathrm{IWELBO}_{N+1}\le\log Z$; "
    r"IWHVI rises in $m$, DIWHVI in $n$ and $m$.",
    title="The order of the bounds",
    kind="bound",
    controls={"fresh": FRESH, "forgotten": "the sum of the weights in place of their mean"},
    regime="two flips, all parameters; N = 1, 2, 3, m = 1, 2, (n, m) = (1, 2), (2, 1), (2, 2)",
    source=SOURCE,
    blind_spot="Of the objectives' exact values, by enumeration; that `vi` estimates these values is V12.",
)
def order_of_bounds(ctx: Context) -> Outcome:
    constants = ctx.pick(0.0, fresh=1.0), ctx.pick(0.0, forgotten=1.0)
    return ctx.worst(
        _order_violation,
        _draw_parameters,
        constants=constants,
        ratio=False,
        points=128,
        tolerance=(1e-9, "sums of at most 64 terms of size up to about 100 in 64 bits"),
    )


# -- V7b: the noisy cone ----------------------------------------------------------------------------------------------------

NAIVE = (2.219, 0.0, -3.387, -1.276)
DATUM = 5.0


def _cone(theta: Any) -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    y = numpyro.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=jnp.array(DATUM))


def _naive(phi: Any) -> None:
    numpyro.sample("x", vi.reparam(dist.Normal(phi[0], jnp.exp(phi[2]))))
    numpyro.sample("y", vi.reparam(dist.Normal(phi[1], jnp.exp(phi[3]))))


def _circle(scale: Any) -> None:
    u = numpyro.sample("u", vi.reparam(dist.Uniform(0.0, 1.0)))
    angle = 2 * math.pi * u
    numpyro.sample("x", vi.reparam(dist.Normal(math.sqrt(DATUM) * jnp.cos(angle), scale)))
    numpyro.sample("y", vi.reparam(dist.Normal(math.sqrt(DATUM) * jnp.sin(angle), scale)))


def _cone_log_p(x: Any, y: Any) -> jax.Array:
    r = x**2 + y**2
    return normal(x, 0.0, 10.0) + normal(y, 0.0, 10.0) + normal(DATUM, r, 0.1 + r / 100)


def _cone_evidence() -> float:
    """r is exponential with mean 200, and the integrand is negligible outside [0, 10]."""
    r, weights = line(0.0, 10.0)
    return float(jnp.log(weights @ jnp.exp(-r / 200 - math.log(200) + normal(DATUM, r, 0.1 + r / 100))))


def _naive_exact(n: int, nodes: int) -> float:
    """The naive guide's IWELBO of n = 1 or 2 particles by Gauss-Hermite quadrature."""
    (a, b), weights = product(*[standard_normal(nodes)] * 2)
    m1, m2, l1, l2 = NAIVE
    log_w = (
        _cone_log_p(m1 + math.exp(l1) * a, m2 + math.exp(l2) * b) - normal(a, 0.0, 1.0) - normal(b, 0.0, 1.0) + l1 + l2
    )
    return float(models.iwelbo(models.Table(weights, log_w, jnp.zeros_like(log_w)), n))


def _fresh_only(key: jax.Array, scale: float, m: int) -> jax.Array:
    """An IWHVI whose estimate of q(x, y) uses m fresh angles and not the one that was drawn."""
    k_u, k_e = jax.random.split(key)
    angle = 2 * math.pi * jax.random.uniform(k_u, (m + 1,))
    at = math.sqrt(DATUM) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    x, y = at[:, 0] + scale * jax.random.normal(k_e, (2,))
    log_q = logsumexp(normal(x, at[0, 1:], scale) + normal(y, at[1, 1:], scale)) - math.log(m)
    return _cone_log_p(x, y) - log_q


NARROW, WIDE = 0.047, 0.13


@claim(
    PAPER,
    "V7b",
    r"Noisy cone, at the optimum of the naive ELBO: IWELBO for $N=1,2,5,20$ is $-8.075,-7.943,-7.846,-7.740$; on the circle "
    r"HVI $-9.747$, IWHVI$_5$ $-8.179$, DIWHVI$_{5,5}$ $-7.309$; all below $\log Z=-5.32323$.",
    title="The noisy cone's bounds",
    kind="bound",
    controls={
        "fresh": FRESH + ": above log Z for m = 50, by far for m = 5",
        "forgotten": "the sum of the weights in place of their mean",
    },
    regime="figures within 0.03, for N = 1, 2 of a quadrature and else as listed; each bound rises by at least 0.05",
    source="The cone of Table 4 and the authors' artifact; optima re-derived.",
    blind_spot="Standard errors are 0.003 to 0.015; the listed figures for N = 5, 20, HVI, IWHVI, DIWHVI are Monte Carlo "
    "estimates too.",
)
def cone(ctx: Context) -> Outcome:
    log_z = _cone_evidence()
    n = ctx.n(40_000)
    naive, nothing = jnp.array(NAIVE), jnp.zeros(())
    forgotten = ctx.pick(0.0, forgotten=1.0)
    aux = functools.partial(vi.marginal, _circle, ("x", "y"))

    def value(e: vi.Expectation, phi: Any, key: jax.Array) -> jax.Array:
        return e(key, nothing, phi)

    if ctx.pick(False, fresh=True):
        exceeding = {
            m: float(draws(functools.partial(_fresh_only, scale=NARROW, m=m), ctx.key, n)["mean"].mean())
            for m in (5, 50)
        }
        return ctx.cases(
            {f"fresh only, m = {m}: {mean:.4g} below log Z": log_z - mean for m, mean in exceeding.items()}, n=n
        )
    listed = {1: _naive_exact(1, 30), 2: _naive_exact(2, 30), 5: -7.846, 20: -7.740}
    iw = {f"IWELBO {c}": (vi.iwelbo(_cone, _naive, c), naive, figure, c) for c, figure in listed.items()}
    circle = {
        "HVI": (vi.elbo(_cone, aux(vi.importance(1))), jnp.array(NARROW), -9.747, 1),
        "IWHVI 5": (vi.elbo(_cone, aux(vi.importance(5))), jnp.array(NARROW), -8.179, 1),
        "DIWHVI 5, 5": (vi.iwelbo(_cone, aux(vi.importance(5)), 5), jnp.array(WIDE), -7.309, 5),
    }
    runs = ctx.pick({**iw, **circle}, forgotten={name: iw[name] for name in ("IWELBO 1", "IWELBO 20")})
    means: dict[str, float] = {}
    slacks, notes = {"log Z is -5.32323": 1e-4 - abs(log_z + 5.32323)}, []
    for i, (name, (e, phi, figure, count)) in enumerate(runs.items()):
        found = draws(functools.partial(value, e, phi), jax.random.fold_in(ctx.key, i), n)["mean"]
        means[name] = float(found.mean()) + forgotten * math.log(count)
        slacks[f"{name} as listed"] = 0.03 - abs(means[name] - figure)
        slacks[f"{name} below log Z"] = log_z - means[name]
        notes.append(f"{name}: {means[name]:.3f} ± {found.std() / math.sqrt(n):.3f} ({figure:.3f})")
    for low, high in [*itertools.pairwise(iw), ("HVI", "IWHVI 5")]:
        if low in means and high in means:
            slacks[f"{low} to {high} rises"] = means[high] - means[low] - 0.05
    return ctx.cases(slacks, note="; ".join(notes), n=n * len(runs))


# -- V8: the bias of the wake phase -------------------------------------------------------------------------------------------

OBSERVED, TRUTH = 1.5, -0.75  # posterior N(3/4, 1/2); the gradient of the forward KL in m at m = 0


def _conjugate(theta: Any, x: Any) -> None:
    z = numpyro.sample("z", dist.Normal(theta, 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _unit_guide(phi: Any, x: Any) -> None:
    numpyro.sample("z", vi.reparam(dist.Normal(phi, 1.0)))


def wake_gradient(n: int) -> float:
    """-E[Σ w z / Σ w] over n draws z ~ N(0, 1), by 1 / s = ∫ exp(-t s) dt: -n ∫ E[w z exp(-t w)] E[exp(-t w)]^(n-1) dt."""
    z = np.linspace(-12.0, 12.0, 6001)
    q = np.exp(-0.5 * z**2)
    q /= q.sum()
    w = np.exp(-0.5 * (OBSERVED - z) ** 2)
    log_t = np.linspace(-25.0, 60.0, 3401)
    values = []
    for chunk in np.array_split(np.exp(log_t), 20):
        decay = np.exp(-chunk[:, None] * w)
        values.append(chunk * (decay @ (q * w * z)) * (decay @ q) ** (n - 1))
    return float(-n * np.concatenate(values).sum() * (log_t[1] - log_t[0]))


def _wake(n: int, through: bool = False) -> Any:
    """key -> the gradient of the wake phase in m at m = 0; through: the sampler's argument is differentiated too."""

    def value(phi: Any, x: Any) -> jax.Array:
        sampler = vi.normalize(
            functools.partial(_conjugate, jnp.zeros(())), vi.importance(n, functools.partial(_unit_guide, phi))
        )
        trace, _ = vi.sim(sampler)(x)
        return -vi.log_density(_unit_guide)(trace, phi, x)

    e = vi.expectation(value)
    wake = vi.wake_phi(_conjugate, _unit_guide, n)
    m, theta, x = jnp.zeros(()), jnp.zeros(()), jnp.array(OBSERVED)
    return lambda key: jax.grad(e, 1)(key, m, x) if through else jax.grad(wake, 2)(key, theta, m, x)


@claim(
    PAPER,
    "V8",
    r"The wake-$\phi$ gradient has mean $-\mathbb{E}[\sum wz/\sum w]$, which is $\mathbb{E}_q\nabla\log q=0$ for $N=1$ and "
    r"tends to that of the forward KL, $-.75$: $-.402$, $-.641$, $-.728$ for $N=2,5,20$.",
    title="The bias of the wake phase",
    kind="statistical",
    controls={"through": "the arguments of the sampler are differentiated"},
    resolution=0.05,
    regime="posterior N(.75, 1/2), q = N(m, 1) at m = 0",
    source=SOURCE,
)
def wake_bias(ctx: Context) -> Outcome:
    through, counts = ctx.pick((False, (1, 2, 5, 20)), through=(True, (2, 5)))
    return unbiased(ctx, {f"N = {n}": Case(_wake(n, through), wake_gradient(n)) for n in counts})


def _unweighted(n: int) -> Any:
    """The particle is chosen without regard to its weight; the score of N(0, 1) in its mean is z."""
    return lambda key: -jax.random.normal(key, (n,)).mean()


@claim(
    PAPER,
    "V8b",
    r"The bias of the wake-$\phi$ gradient is $O(1/N)$.",
    title="The order of the bias",
    kind="rate",
    controls={"unweighted": "particles are resampled without their weights"},
    regime="as in V8, N = 2, 8, 32, 128",
    source=SOURCE,
)
def wake_order(ctx: Context) -> Outcome:
    counts, replicates, n = (2, 8, 32, 128), 32, ctx.n(9_000)
    make = ctx.pick(_wake, unweighted=_unweighted)
    errors = []
    with enable_x64(False):  # rounding, 1e-7, is far below the smallest bias, 3e-3
        for i, count in enumerate(counts):
            keys = jax.random.split(jax.random.fold_in(ctx.key, i), (replicates, n))
            one = jax.jit(jax.vmap(make(count)))
            errors.append([abs(float(np.mean(one(row), dtype=float)) - TRUTH) for row in keys])
    return ctx.order([1 / count for count in counts], np.array(errors).T, claimed=1.0)
