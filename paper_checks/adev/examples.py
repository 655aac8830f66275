"""E1 to E6: the examples of the authors' implementations, with the figures and the optima that they lead to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

import vi
from paper_checks.adev.common import PAPER, Case, by_vi, figures_of, flip, points, unbiased
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

sg = lax.stop_gradient
SEEDS = 5

# -- E1: the running example ---------------------------------------------------------------------------------------------


def _same(x: Any) -> Any:
    return x


def _running(theta: Any, seen: Callable[[Any], Any] = _same) -> Any:
    """b ~ flip(theta); 0 if b, otherwise -theta / 2."""
    return jnp.where(flip(seen(theta), "b") == 1, 0.0, -theta / 2)


def _running_ordinary_ad(theta: Any) -> Any:
    return _running(theta, sg)


def _running_exact(theta: Any) -> Any:
    return -(1 - theta) * theta / 2


@functools.lru_cache(maxsize=16)
def descent(program: Callable[..., Any], strategies: tuple[tuple[str, str], ...], rate: float, steps: int, draws: int):
    """(keys (seeds,), start) -> the parameters of gradient descent after every step, (seeds, steps)."""
    e = vi.expectation(program).with_strategies(dict(strategies))

    def loss(theta: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(e, (0, None))(jax.random.split(key, draws), theta))

    def run(key: jax.Array, start: jax.Array) -> jax.Array:
        def step(theta: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            theta = theta - rate * jax.grad(loss)(theta, key)
            return theta, theta

        return lax.scan(step, start, jax.random.split(key, steps))[1]

    return jax.jit(jax.vmap(run, (0, None)))


def _path(title: str, curves: dict[str, Any], wanted: float) -> dict[str, Any]:
    lines = [
        {"label": label, "x": list(range(1, len(y) + 1)), "y": np.asarray(y).tolist(), "style": "line"}
        for label, y in curves.items()
    ]
    return {
        "title": title,
        "x_label": "step",
        "y_label": "mean over seeds",
        "x_scale": "linear",
        "y_scale": "linear",
        "lines": lines,
        "hlines": [{"label": "optimum", "y": wanted}],
        "bars": None,
    }


@claim(
    PAPER,
    "E1",
    r"Running example: $b\sim\mathrm{flip}(\theta)$, 0 if $b$ and $-\theta/2$ otherwise. $L(0.4)=-0.12$ and $L'(0.4)=-0.1$.",
    title="The running example: value and derivative",
    kind="statistical",
    controls={"ordinary_ad": "ordinary AD, whose mean is -(1 - theta) / 2 = -0.3"},
    resolution=0.03,
    regime="theta = 0.4 and drawn in [0.2, 0.8], by ENUM, REINFORCE and MVD; exact bounds",
    source="Figure 2 of the paper, as in the authors' examples, whose sample run prints -0.122 and -0.10 with 1000 draws.",
)
def running_example(ctx: Context) -> Outcome:
    at = points(ctx, 0, [(0.2, 0.8)], [0.4], drawn=2)
    case = functools.partial(Case, exact=figures_of(_running_exact), points=at, bound=5.0)
    ours = [case(strategy, by_vi(_running, (("b", strategy),))) for strategy in ("enum", "reinforce", "mvd")]
    wrong = [case("ordinary AD", by_vi(_running_ordinary_ad, (("b", "enum"),)))]
    return unbiased(ctx, ctx.pick(ours, ordinary_ad=wrong))


@claim(
    PAPER,
    "E2",
    r"Stochastic gradient descent on the running example, rate 0.2 from $\theta=0.2$, ends near $\theta^*=\frac12$.",
    title="The running example: descent finds the minimum",
    kind="trained",
    controls={"ordinary_ad": "ordinary AD, which always increases theta"},
    regime="100 steps, five seeds; ENUM within 0.01, REINFORCE within 0.2",
    source="The authors' example, settings as there.",
)
def running_descent(ctx: Context) -> Outcome:
    program = ctx.pick(_running, ordinary_ad=_running_ordinary_ad)
    keys = jax.random.split(ctx.key, SEEDS)
    paths = {s: descent(program, (("b", s),), 0.2, 100, 1)(keys, jnp.asarray(0.2)) for s in ("enum", "reinforce")}
    off = {s: float(jnp.max(jnp.abs(p[:, -1] - 0.5))) for s, p in paths.items()}
    return ctx.cases(
        {"ENUM: within 0.01": 0.01 - off["enum"], "REINFORCE: within 0.2": 0.2 - off["reinforce"]},
        our_value=float(paths["reinforce"][:, -1].mean()),
        paper_value=0.5,
        figure=_path("Gradient descent on the running example", {s: p.mean(0) for s, p in paths.items()}, 0.5),
    )


# -- E3: binomial and geometric laws by recursion -----------------------------------------------------------------------------

TRIALS = 10
TURNS = 30
"""Turns of a loop that stops by itself: at a probability of 0.4 to stop it goes on longer with probability 2e-7."""


def _binomial(theta: Any, seen: Callable[[Any], Any] = _same) -> Any:
    """The number of successes, as a Python recursion; `seen` is applied to the parameter of the recursive call."""

    def count(n: int, theta: Any) -> Any:
        return jnp.zeros(()) if n == 0 else count(n - 1, seen(theta)) + flip(theta, "b")

    return count(TRIALS, theta)


def _binomial_last_only(theta: Any) -> Any:
    return _binomial(theta, sg)


def _binomial_exact(theta: Any) -> Any:
    return TRIALS * theta


def _geometric(theta: Any) -> Any:
    """Failures before the first success, as a loop whose later turns do nothing."""

    def turn(alive: Any, _: Any) -> Any:
        alive = alive * (1 - flip(theta, "b"))
        return alive, alive

    return jnp.sum(lax.scan(turn, jnp.ones(()), None, length=TURNS)[1])


def _geometric_exact(theta: Any) -> Any:
    return (1 - theta) / theta


@claim(
    PAPER,
    "E3",
    r"By recursion: the binomial law has the mean $n\theta$ with derivative $n$, the geometric law (failures) "
    r"$\frac{1-\theta}\theta$ with derivative $-\frac1{\theta^2}$.",
    title="Binomial and geometric laws by recursion",
    kind="statistical",
    controls={"last_only": "the flips of the recursive call not differentiated: 1 instead of n"},
    resolution=0.15,
    regime="n = 10; theta in [0.4, 0.8] for the geometric law, cut off after 30 turns; MVD; in units of max(1, |figure|)",
    source="The authors' Julia examples.  The one called geometric compares with the mean 1/theta though its program counts "
    "failures; the derivatives agree.",
)
def recursion(ctx: Context) -> Outcome:
    by_mvd = (("b", "mvd"),)
    at = points(ctx, 0, [(0.4, 0.8)], [0.4], drawn=1)
    ours = [
        Case("binomial", by_vi(_binomial, by_mvd), figures_of(_binomial_exact), at),
        Case("geometric", by_vi(_geometric, by_mvd), figures_of(_geometric_exact), at),
    ]
    last = [Case("binomial", by_vi(_binomial_last_only, by_mvd), figures_of(_binomial_exact), at)]
    return unbiased(ctx, ctx.pick(ours, last_only=last), n=10_000)


# -- E4: the firing squad -----------------------------------------------------------------------------------------------------


def _firing_squad(theta: Any, seen: Callable[[Any], Any] = _same) -> Any:
    """Bribe the court with probability sigmoid(theta), and nobody is shot; otherwise one gunman, and the other shoots."""
    bribed = flip(seen(jax.nn.sigmoid(theta)), "b")
    ordered = flip(0.5, "court")
    return jnp.where(bribed == 1, 0.0, ordered)


def _firing_squad_ordinary_ad(theta: Any) -> Any:
    return _firing_squad(theta, sg)


@claim(
    PAPER,
    "E4",
    r"Firing squad: descent on the probability of a death, rate 0.1 from $\theta=0.5$, learns to bribe the court always.",
    title="A policy over interventions finds the best one",
    kind="trained",
    controls={"ordinary_ad": "ordinary AD: the policy never changes"},
    regime="1000 steps, five seeds, MVD: at the end sigmoid(theta) is above 0.95 and the probability of a death below 0.025",
    source="The authors' Julia example, settings as there.",
)
def firing_squad(ctx: Context) -> Outcome:
    program = ctx.pick(_firing_squad, ordinary_ad=_firing_squad_ordinary_ad)
    run = descent(program, (("b", "mvd"), ("court", "mvd")), 0.1, 1000, 1)
    policy = jax.nn.sigmoid(run(jax.random.split(ctx.key, SEEDS), jnp.asarray(0.5)))
    worst = float(policy[:, -1].min())
    return ctx.cases(
        {"bribes the court with probability 0.95": worst - 0.95},
        our_value=float(policy[:, -1].mean()),
        paper_value=1.0,
        figure=_path("Probability of bribing the court", {"MVD": policy.mean(0)[::10]}, 1.0),
    )


# -- E5: the proposal of a rejection sampler ------------------------------------------------------------------------------------


def _rejections(theta: Any, seen: Callable[[Any], Any] = _same) -> Any:
    """Rejected proposals flip(theta) before one is accepted for the target (0.6, 0.4), with the bound M of the example."""
    theta = jnp.clip(theta, 0.05, 0.95)
    bound = 0.6 / theta + 0.4 / (1 - theta)

    def turn(alive: Any, _: Any) -> Any:
        b = flip(seen(theta), "b")
        accept = jnp.where(b == 1, 0.6 / theta, 0.4 / (1 - theta)) / bound
        alive = alive * (1 - flip(seen(accept), "accepted"))
        return alive, alive

    return jnp.sum(lax.scan(turn, jnp.ones(()), None, length=TURNS)[1])


def _rejections_ordinary_ad(theta: Any) -> Any:
    return _rejections(theta, sg) + 0 * theta


def _rejections_exact(theta: Any) -> Any:
    return 0.6 / theta + 0.4 / (1 - theta) - 1


BEST_PROPOSAL = float(np.sqrt(1.5) / (1 + np.sqrt(1.5)))


@claim(
    PAPER,
    "E5",
    r"Rejection time: descent on the expected number of rejections $M(\theta)-1$, $M=\frac{0.6}\theta+\frac{0.4}{1-\theta}$, "
    r"from $\theta=0.3$, finds the minimum $\frac\theta{1-\theta}=\sqrt{1.5}$.",
    title="The best proposal of a rejection sampler",
    kind="trained",
    controls={"ordinary_ad": "ordinary AD: the proposal never changes"},
    regime="rate 0.01, ten draws a step, 200 steps (1000 in the example), five seeds, MVD, cut off after 30 turns; the "
    "mean of the last 100 steps within 0.03 of 0.5505",
    source="The authors' Julia example; the optimum is derived.",
)
def rejection_time(ctx: Context) -> Outcome:
    program = ctx.pick(_rejections, ordinary_ad=_rejections_ordinary_ad)
    run = descent(program, (("b", "mvd"), ("accepted", "mvd")), 0.01, 200, 10)
    path = run(jax.random.split(ctx.key, SEEDS), jnp.asarray(0.3))
    ends = path[:, -100:].mean(1)
    return ctx.cases(
        {"within 0.03 of the optimum": 0.03 - float(jnp.max(jnp.abs(ends - BEST_PROPOSAL)))},
        our_value=float(ends.mean()),
        paper_value=BEST_PROPOSAL,
        figure=_path("Proposal of the rejection sampler", {"MVD": path.mean(0)}, BEST_PROPOSAL),
    )


# -- E6: the indicator --------------------------------------------------------------------------------------------------------


def _indicator(theta: Any) -> Any:
    return jnp.where(vi.sample(dist.Normal(theta, 1.0), "x") > 3, theta - 5, 0.0)


def _indicator_promised(theta: Any) -> Any:
    """The jump hidden behind a promise of continuity, so that the pathwise estimator is accepted."""
    x = vi.sample(vi.reparam(dist.Normal(theta, 1.0)))
    return vi.continuous(lambda x: jnp.where(x > 3, theta - 5, 0.0))(x)


def _indicator_exact(theta: Any) -> Any:
    return jax.scipy.stats.norm.cdf(theta - 3) * (theta - 5)


@claim(
    PAPER,
    "E6",
    r"Indicator: for $f(x)=1[x>3](\theta-5)$, $x\sim N(\theta,1)$, MVD and REINFORCE are unbiased.",
    title="An integrand that jumps",
    kind="statistical",
    controls={"promise": "the pathwise estimator, accepted because of a false promise of continuity"},
    resolution=0.2,
    regime="theta = 1, 3, 6 and drawn in [0.5, 7]; in units of max(1, |figure|)",
    source="The authors' Julia example, which sweeps theta over [-5, 8].",
    blind_spot="For smaller theta the event is too rare for a test by sampling.",
)
def indicator(ctx: Context) -> Outcome:
    at = points(ctx, 0, [(0.5, 7.0)], [1.0], [3.0], [6.0], drawn=2)
    case = functools.partial(Case, exact=figures_of(_indicator_exact), points=at)
    ours = [case(s, by_vi(_indicator, (("x", s),))) for s in ("mvd", "reinforce")]
    return unbiased(ctx, ctx.pick(ours, promise=[case("promised", by_vi(_indicator_promised))]))
