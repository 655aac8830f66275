"""V12 and V13: every objective under every estimator, and estimators mixed choice by choice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax

import vi
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.programmable_vi import models
from paper_checks.programmable_vi.common import (
    PAPER,
    Case,
    normal,
    product,
    standard_normal,
    unbiased,
)
from paper_checks.programmable_vi.gradients import NO_SCORE, SOURCE, derivatives, exactly, undifferentiated
from paper_checks.programmable_vi.models import OBSERVED, Strategy, World

sg = lax.stop_gradient


# -- V12: the grid ----------------------------------------------------------------------------------------------------------


def grid(world: World, of_u: Strategy, of_y: Strategy) -> dict[str, vi.Expectation]:
    guide = world.guide(of_u, of_y)
    return {
        "ELBO": vi.elbo(world.model, guide),
        "IWELBO 2": vi.iwelbo(world.model, guide, 2),
        "HVI": vi.hvi(world.model_of_y, guide, "y"),
        "IWHVI 2": vi.iwhvi(world.model_of_y, guide, "y", 2),
        "DIWHVI 2, 2": vi.diwhvi(world.model_of_y, guide, "y", 2, 2),
        "wake theta 2": vi.wake_theta(world.model, guide, 2),
        "wake phi 2": vi.wake_phi(world.model, guide, 2),
        "symmetric KL 2": vi.symmetric_kl(world.model, guide, 2),
    }


GRID: dict[str, tuple[World, Strategy, Strategy]] = {
    "REPARAM": (models.line, vi.reparam, vi.reparam),
    "REINFORCE": (models.coins, vi.reinforce, vi.reinforce),
    "ENUM": (models.coins, vi.enum, vi.enum),
    "MVD": (models.coins, vi.mvd, vi.mvd),
    "hybrid": (models.coins, vi.mvd, vi.enum),
}


ALSO_QUICK = {(objective, "REPARAM") for objective in ("IWELBO 2", "DIWHVI 2, 2", "wake phi 2")}


def _through_sampler(world: World, n: int) -> vi.Expectation:
    """A wake phase that forgets to hold its sampler fixed."""
    guide = world.guide(vi.reinforce, vi.reinforce)

    def value(theta: Any, phi: Any, x: Any) -> jax.Array:
        target = functools.partial(world.model, theta)
        sampler = vi.normalize(target, vi.importance(n, functools.partial(guide, phi)))
        trace, _ = vi.sim(sampler)(x)
        return -vi.log_density(guide)(trace, phi, x)

    return vi.expectation(value)


@claim(
    PAPER,
    "V12",
    "ELBO, IWELBO, HVI, IWHVI, DIWHVI, both wake phases and the symmetric KL run under REPARAM, REINFORCE, ENUM, MVD and a "
    "mixture of them, and each gradient is that of its objective.",
    title="Every objective under every strategy",
    kind="statistical",
    controls={
        "no_score": NO_SCORE,
        "through": "a wake phase that differentiates through its sampler",
        "joint_entropy": "HVI whose log q(y) is that of y and the auxiliary choice together",
    },
    resolution=0.4,
    regime="eight objectives, five strategies (at the quick budget the mixture for each, all five for the ELBO, REPARAM "
    "for four): two flips against enumeration, two normals (REPARAM) against Gauss-Hermite quadrature; parameters drawn; "
    "two particles of each kind; in units of max(1, |figure|)",
    source=SOURCE,
    blind_spot="A quadrature of 14 and 10 nodes an axis stands for the normals' truth; its error is below 1e-3.",
)
def supported_grid(ctx: Context) -> Outcome:
    k_theta, k_phi = jax.random.split(jax.random.fold_in(ctx.key, 1))
    theta = 0.4 * jax.random.normal(k_theta, (3,))
    phi = jnp.array([0.2, -0.5, 0.3]) + 0.2 * jax.random.normal(k_phi, (3,))
    datum = jnp.array(OBSERVED)

    @functools.cache
    def exact(world: World, objective: str) -> Any:
        return exactly(models.exact_objectives(world)[objective], theta, phi)

    def case(e: vi.Expectation, world: World, objective: str, more: int = 1) -> Case:
        return Case(derivatives(e, theta, phi, datum), exact(world, objective), more=more)

    def ours() -> dict[str, Case]:
        return {
            f"{objective}, {name}": case(e, world, objective, 2 if name == "REINFORCE" else 1)
            for name, (world, of_u, of_y) in GRID.items()
            for objective, e in grid(world, of_u, of_y).items()
            if ctx.budget != "quick" or name == "hybrid" or objective == "ELBO" or (objective, name) in ALSO_QUICK
        }

    coins = models.coins
    guide = coins.guide(vi.reinforce, vi.reinforce)

    def model_of_both(theta: Any, x: Any) -> None:
        numpyro.sample("u", dist.Bernoulli(probs=0.5).mask(False))
        coins.model_of_y(theta, x)

    cases = ctx.pick(
        ours,
        no_score=lambda: {"ELBO": case(undifferentiated(coins.model, guide), coins, "ELBO")},
        through=lambda: {"wake phi 2": case(_through_sampler(coins, 2), coins, "wake phi 2")},
        joint_entropy=lambda: {"HVI": case(vi.elbo(model_of_both, guide), coins, "HVI")},
    )
    return unbiased(ctx, cases(), n=10_000)


# -- V13: strategies mixed site by site ---------------------------------------------------------------------------------------

STEPS = 3
STRATEGIES = (vi.mvd, vi.mvd, vi.enum)  # those of z_pres in "attend, infer, repeat"


def _scene_model(theta: Any) -> None:
    present, total = jnp.ones(()), jnp.zeros(())
    for t in range(STEPS):
        present = numpyro.sample(f"present {t}", dist.Bernoulli(probs=0.1 + 0.6 * theta * present))
        total = total + present * (1 + numpyro.sample(f"where {t}", dist.Normal(0.0, 1.0)))
    numpyro.sample("image", dist.Normal(total, 0.7), obs=jnp.array(1.8))


def _scene_guide(strategies: Sequence[Strategy]) -> Callable[..., None]:
    def guide(phi: Any) -> None:
        present = jnp.ones(())
        for t, strategy in enumerate(strategies):
            present = numpyro.sample(f"present {t}", strategy(dist.Bernoulli(probs=0.1 + 0.8 * phi[0] * present)))
            numpyro.sample(f"where {t}", vi.reparam(dist.Normal(phi[1] * present, jnp.exp(phi[2]))))

    return guide


def _scene_exact(theta: Any, phi: Any) -> jax.Array:
    noise, weights = product(*[standard_normal(8)] * STEPS)
    scale = jnp.exp(phi[2])

    def given(flips: jax.Array) -> jax.Array:
        """The part of one result of the flips, times its probability."""
        before = jnp.concatenate([jnp.ones(1), flips[:-1]])
        q, p = (jnp.where(flips == 1, r, 1 - r) for r in (0.1 + 0.8 * phi[0] * before, 0.1 + 0.6 * theta * before))
        where = phi[1] * flips[:, None] + scale * jnp.stack(noise)
        log_w = jnp.sum(normal(where, 0.0, 1.0) - normal(where, phi[1] * flips[:, None], scale), axis=0)
        image = normal(1.8, flips @ (1 + where), 0.7)
        return jnp.prod(q) * (jnp.sum(jnp.log(p / q)) + weights @ (log_w + image))

    return jax.vmap(given)(jnp.array(list(itertools.product((0.0, 1.0), repeat=STEPS)))).sum()


@claim(
    PAPER,
    "V13",
    "Strategies may be mixed site by site: three flips by MVD, MVD and ENUM, each followed by a REPARAM normal.",
    title="A hybrid of strategies is unbiased",
    kind="statistical",
    controls={
        "no_score": "the flips' probability is not differentiated in their draws",
        "no_path": "the normals' parameters are not differentiated in their draws",
    },
    resolution=0.3,
    regime="a chain of three flips and normals as in 'attend, infer, repeat'; ELBO and its gradient at drawn parameters",
    source=SOURCE,
    blind_spot="Of AIR itself only the mixture of strategies; see E1.",
)
def hybrid(ctx: Context) -> Outcome:
    key = jax.random.fold_in(ctx.key, 1)
    theta, phi = jnp.array(0.7), jnp.array([0.5, 0.3, -0.3]) + 0.1 * jax.random.normal(key, (3,))
    trained = ctx.pick((0, 1, 2), no_score=(1, 2), no_path=(0,))
    held = jnp.array([i not in trained for i in range(3)])
    if ctx.control is None:
        e = vi.elbo(_scene_model, _scene_guide(STRATEGIES))
    else:
        guide = _scene_guide([vi.reinforce] * STEPS)
        e = undifferentiated(_scene_model, guide, lambda phi: jnp.where(held, sg(phi), phi))
    return unbiased(ctx, {"ELBO": Case(derivatives(e, theta, phi), exactly(_scene_exact, theta, phi))}, n=40_000)
