"""A3, A4, A7 and A8: the score function, pathwise and measure-valued derivatives of laws on the line and the integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax

import vi
from paper_checks.adev import rules
from paper_checks.adev.common import (
    PAPER,
    RULE,
    Case,
    by_vi,
    figures_of,
    points,
    standard_normal,
    unbiased,
)
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

NORMAL_BOX = ((-1.5, 1.5), (0.4, 1.6), (0.0, 1.0))
NORMAL_SHEET = ((0.5, 1.3, 0.0), (0.5, 1.3, 1.0))  # E x^2 and E x^3

# -- normal integrands x^2 and x^3 ----------------------------------------------------------------------------------------


def _powers(x: Any, share: Any) -> Any:
    return (1 - share) * x**2 + share * x**3


def _normal_program(mu: Any, sigma: Any, share: Any) -> Any:
    return _powers(vi.sample(dist.Normal(mu, sigma), "x"), share)


def _normal_exact(mu: Any, sigma: Any, share: Any) -> Any:
    return (1 - share) * (mu**2 + sigma**2) + share * (mu**3 + 3 * mu * sigma**2)


def _normal(ctx: Context, name: str, estimator: Any, salt: int = 0) -> Case:
    return Case(name, estimator, figures_of(_normal_exact), points(ctx, salt, NORMAL_BOX, *NORMAL_SHEET, drawn=2))


def _normal_by(ctx: Context, strategy: str) -> Case:
    return _normal(ctx, f"x^2 and x^3, normal by {strategy}", by_vi(_normal_program, (("x", strategy),)))


# -- A3: REINFORCE ------------------------------------------------------------------------------------------------------


def _geometric(p: Any) -> Any:
    return vi.sample(vi.reinforce(dist.Geometric(probs=p))).astype(float)


def _poisson(rate: Any, strategy: Callable[..., Any] = vi.reinforce) -> Any:
    return vi.sample(strategy(dist.Poisson(rate))).astype(float) ** 2


def _poisson_exact(rate: Any) -> Any:
    return rate + rate**2


def _draw_normal(key: Any, mu: Any, sigma: Any, share: Any) -> Any:
    return mu + sigma * jax.random.normal(key)


def _log_normal(x: Any, mu: Any, sigma: Any, share: Any) -> Any:
    return -((x - mu) ** 2) / (2 * sigma**2) - jnp.log(sigma)


def _log_normal_unnormalised(x: Any, mu: Any, sigma: Any, share: Any) -> Any:
    return -((x - mu) ** 2) / (2 * sigma**2)


def _of_normal(x: Any, mu: Any, sigma: Any, share: Any) -> Any:
    return _powers(x, share)


def _draw_uniform(key: Any, high: Any) -> Any:
    return high * jax.random.uniform(key)


def _log_uniform(x: Any, high: Any) -> Any:
    return -jnp.log(high)


def _identity(x: Any, *theta: Any) -> Any:
    return x


@claim(
    PAPER,
    "A3",
    r"REINFORCE: for $v\sim p(\cdot;\theta)$ positive and differentiable in $\theta$ on a fixed support, "
    r"$\mathbb{E}[\dot l+l\,\partial_\theta\log p(v;\theta)]=L'(\theta)$.",
    title="The score function is unbiased",
    kind="statistical",
    controls={
        "moving_support": "U(0, theta), whose support depends on the parameter: -1/2 instead of 1/2",
        "unnormalised": "the density without its normalising constant: the term -log sigma is missing",
    },
    resolution=0.6,
    regime="x^2, x^3 under N(mu, sigma), mu in [-1.5, 1.5], sigma in [0.4, 1.6]; E n of the geometric, E n^2 of the Poisson law; "
    "values and gradients in units of max(1, |figure|)",
    source=RULE,
    blind_spot="Interchange of derivative and integral is assumed; A9 shows what happens without.",
)
def reinforce(ctx: Context) -> Outcome:
    ours = [
        _normal_by(ctx, "reinforce"),
        _normal(ctx, "x^2 and x^3, by hand", rules.score_function(_draw_normal, _log_normal, _of_normal)),
        Case("geometric", by_vi(_geometric), figures_of(lambda p: (1 - p) / p), points(ctx, 1, [(0.3, 0.9)], [0.4])),
        Case("Poisson, n^2", by_vi(_poisson), figures_of(_poisson_exact), points(ctx, 2, [(0.3, 3.0)], [2.5])),
    ]
    unnormalised = rules.score_function(_draw_normal, _log_normal_unnormalised, _of_normal)
    uniform = rules.score_function(_draw_uniform, _log_uniform, _identity)
    return unbiased(
        ctx,
        ctx.pick(
            ours,
            moving_support=[Case("uniform", uniform, figures_of(lambda t: t / 2), points(ctx, 3, [(0.5, 2.0)], [1.0]))],
            unnormalised=[_normal(ctx, "x^2 and x^3", unnormalised)],
        ),
    )


# -- A4: REPARAM ----------------------------------------------------------------------------------------------------------


def _kinks(mu: Any, sigma: Any) -> Any:
    """Locally Lipschitz: |x| and the positive part of x - 1/2."""
    x = vi.sample(vi.reparam(dist.Normal(mu, sigma)))
    return jnp.abs(x) + jax.nn.relu(x - 0.5)


def _kinks_exact(mu: Any, sigma: Any) -> Any:
    phi, cdf = jax.scipy.stats.norm.pdf, jax.scipy.stats.norm.cdf

    def positive(m: Any) -> Any:  # E max(x, 0)
        return m * cdf(m / sigma) + sigma * phi(m / sigma)

    return positive(mu) + positive(-mu) + positive(mu - 0.5)


def _jump(x: Any, theta: Any) -> Any:
    return jnp.where(x > 3, theta - 5, 0.0)


def _jump_exact(theta: Any) -> Any:
    return jax.scipy.stats.norm.cdf(theta - 3) * (theta - 5)


def _draw_unit_normal(key: Any, theta: Any) -> Any:
    return theta + jax.random.normal(key)


@claim(
    PAPER,
    "A4",
    r"REPARAM: for $x=g(\varepsilon,\theta)$ with $g$ smooth and $f$ absolutely continuous and locally Lipschitz, "
    r"$\mathbb{E}[\partial_\theta f(g(\varepsilon,\theta))]=L'(\theta)$.",
    title="The pathwise derivative is unbiased for continuous integrands",
    kind="statistical",
    controls={
        "jump": "f(x) = 1[x > 3] (theta - 5) at theta = 1: the pathwise estimator gives .023, the truth is -.193"
    },
    resolution=0.4,
    regime="x^2, x^3, |x| and max(x - 1/2, 0) under N(mu, sigma); in units of max(1, |figure|)",
    source=RULE,
    blind_spot="`vi` refuses the control's program, so that the control is written by hand; A4b checks the refusal.",
)
def reparam(ctx: Context) -> Outcome:
    ours = [
        _normal_by(ctx, "reparam"),
        Case("kinks", by_vi(_kinks), figures_of(_kinks_exact), points(ctx, 1, NORMAL_BOX[:2], (0.0, 1.0))),
    ]
    by_hand = rules.pathwise(_draw_unit_normal, _jump)
    jump = [Case("indicator, pathwise", by_hand, figures_of(_jump_exact), points(ctx, 2, [(0.0, 2.0)], [1.0]))]
    return unbiased(ctx, ctx.pick(ours, jump=jump))


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a comparison": lambda x: jnp.where(x > 3, 1.0, 0.0),
    "rounding down": jnp.floor,
    "a cast to whole numbers": lambda x: x.astype(int).astype(float),
    "an index": lambda x: jnp.arange(5.0)[jnp.clip(x, 0, 4).astype(int)],
    "argmax": lambda x: jnp.argmax(jnp.stack([x, 0.5])).astype(float),
    "a branch": lambda x: lax.cond(x > 0, lambda: 1.0, lambda: 0.0),
    "the probability of a later choice": lambda x: vi.sample(dist.Bernoulli(probs=0.2 + 0.6 * (x > 0))).astype(float),
}
ALLOWED: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "clip": lambda x: jnp.clip(x, -1.0, 1.0),
    "logsumexp": lambda x: jax.nn.logsumexp(jnp.stack([x, 0.5])),
    "a promise of continuity": vi.continuous(lambda x: jnp.where(x > 0, x, 2 * x)),
    "a smooth probability": lambda x: vi.sample(dist.Bernoulli(logits=x)).astype(float),
}


@claim(
    PAPER,
    "A4b",
    r"Smoothness types: a draw of type $\mathbb{R}$ (pathwise) may not reach a comparison, a rounding, an index or a branch; a "
    r"draw of type $\mathbb{R}^*$ may be used freely.",
    title="A pathwise draw that is used discontinuously is refused",
    kind="exact",
    controls={"promise": "the user promises with vi.continuous that the jumps are none"},
    regime="seven discontinuous uses and six continuous ones; pathwise refused and accepted, REINFORCE and MVD accepted always",
    source="Type system recalled; what is legal agrees with the authors' implementations.",
    blind_spot="A list of uses; a function behind an opaque callback is refused whatever it does.",
)
def smoothness(ctx: Context) -> Outcome:
    promised = ctx.pick(False, promise=True)

    def accepted(use: Callable[[Any], Any], strategy: Callable[..., Any]) -> bool:
        e = vi.expectation(lambda mu: use(vi.sample(strategy(dist.Normal(mu, 1.0)), "x")))
        try:
            jax.eval_shape(jax.grad(lambda mu, key: e(key, mu)), 0.3, jax.random.key(0))
        except vi.StrategyError:
            return False
        return True

    sign = {True: 1.0, False: -1.0}
    slacks = {}
    for name, use in REFUSED.items():
        used = vi.continuous(use) if promised and "later" not in name else use
        slacks[f"{name}: reparam refused"] = sign[not accepted(used, vi.reparam)]
        slacks[f"{name}: reinforce accepted"] = sign[accepted(use, vi.reinforce)]
        slacks[f"{name}: mvd accepted"] = sign[accepted(use, vi.mvd)]
    for name, use in ALLOWED.items():
        slacks[f"{name}: reparam accepted"] = sign[accepted(use, vi.reparam)]
    return ctx.cases(slacks)


# -- A7: MVD of normal and Poisson laws --------------------------------------------------------------------------------------


@claim(
    PAPER,
    "A7",
    r"MVD of $N(\mu,\sigma)$: in $\mu$ $\frac{\kappa(\mu+\sigma w)-\kappa(\mu-\sigma w)}{\sigma\sqrt{2\pi}}$ with $w$ Weibull of "
    r"shape 2 and scale $\sqrt2$; in $\sigma$ $\frac{\kappa(\mu+\sigma m)-\kappa(v)}{\sigma}$ with $m$ double-sided Maxwell; of "
    r"Poisson($\lambda$) $\kappa(x+1)-\kappa(x)$.",
    title="Signed decompositions of the normal and Poisson laws",
    kind="statistical",
    controls={
        "weibull": "Weibull scale 1 instead of the square root of 2",
        "factor": "1/sqrt(2 pi) left out",
        "maxwell": "a double-sided Rayleigh law (two degrees of freedom) instead of Maxwell's (three)",
    },
    resolution=0.4,
    regime="x^2, x^3 under N(mu, sigma), n^2 under Poisson; `vi`'s couplings and the formulas above; in units of "
    "max(1, |figure|)",
    source=RULE + " The rule in sigma is derived.",
)
def mvd_normal(ctx: Context) -> Outcome:
    constants = [rules.WEIBULL_SCALE, rules.WEIBULL_FACTOR, rules.THIRD_DEGREE]
    rule = rules.mvd_normal(_powers)

    def by_hand(name: str, at: int | None = None, value: float = 1.0) -> Case:
        used = [value if i == at else c for i, c in enumerate(constants)]
        case = _normal(ctx, f"x^2 and x^3, {name}", rule)
        rows = jnp.concatenate([case.points, jnp.tile(jnp.array(used), (len(case.points), 1))], axis=1)
        return case._replace(points=rows, exact=lambda theta: figures_of(_normal_exact)(theta[:3]))

    poisson = points(ctx, 2, [(0.3, 3.0)], [2.5])
    ours = [
        _normal_by(ctx, "mvd"),
        by_hand("by hand"),
        Case("Poisson, n^2", by_vi(_poisson_by_mvd), figures_of(_poisson_exact), poisson),
    ]
    return unbiased(
        ctx,
        ctx.pick(
            ours,
            weibull=[by_hand("scale", 0, 1.0)],
            factor=[by_hand("factor", 1, 1.0)],
            maxwell=[by_hand("Rayleigh", 2, 0.0)],
        ),
    )


def _poisson_by_mvd(rate: Any) -> Any:
    return _poisson(rate, vi.mvd)


# -- A8: IMPLICIT -----------------------------------------------------------------------------------------------------------


def _gamma(a: Any) -> Any:
    return vi.sample(vi.implicit(dist.Gamma(a))) ** 2


def _mixture(weight: Any, mean: Any) -> Any:
    parts = dist.Normal(jnp.stack([mean, -1.0]), jnp.array([1.0, 0.5]))
    x = vi.sample(vi.implicit(dist.MixtureSameFamily(dist.Categorical(jnp.stack([weight, 1 - weight])), parts)))
    return jnp.sin(x) + x**2


def _mixture_exact(weight: Any, mean: Any) -> Any:
    x, w = standard_normal()
    f = lambda x: w @ (jnp.sin(x) + x**2)  # noqa: E731
    return weight * f(mean + x) + (1 - weight) * f(-1 + 0.5 * x)


@functools.lru_cache(maxsize=4)
def _exponential(density: bool = True, sign: float = -1.0) -> Any:
    """x^2 for x ~ Exponential(rate) with dx = sign · dF / p by hand, or without the density p."""

    def draw(key: jax.Array, rate: jax.Array) -> jax.Array:
        x = lax.stop_gradient(jax.random.exponential(key) / rate)
        cdf = -jnp.expm1(-rate * x)
        p = lax.stop_gradient(rate * jnp.exp(-rate * x)) if density else 1.0
        return x + sign * (cdf - lax.stop_gradient(cdf)) / p

    return rules.pathwise(draw, _square)


def _square(x: Any, *theta: Any) -> Any:
    return x**2


@claim(
    PAPER,
    "A8",
    r"IMPLICIT: $\frac{dx}{d\theta}=-\frac{\partial_\theta F(x;\theta)}{p(x;\theta)}$ gives an unbiased pathwise derivative.",
    title="Implicit reparameterisation through the distribution function",
    kind="statistical",
    controls={"minus": "the minus sign dropped", "density": "the density in the denominator left out"},
    resolution=0.2,
    regime="x^2 under Gamma(a, 1), a in [0.5, 3]; sin x + x^2 under a mixture of two normal laws; x^2 under an exponential law",
    source=RULE,
    blind_spot="Gradients in the shapes of the beta and Student distribution functions are not available in JAX.",
)
def implicit(ctx: Context) -> Outcome:
    gamma = functools.partial(
        Case, exact=figures_of(lambda a: a * (a + 1)), points=points(ctx, 0, [(0.5, 3.0)], [1.7], drawn=2)
    )
    exponential = functools.partial(
        Case, exact=figures_of(lambda r: 2 / r**2), points=points(ctx, 1, [(0.7, 2.0)], [1.0])
    )
    mixture = Case(
        "mixture", by_vi(_mixture), figures_of(_mixture_exact), points(ctx, 2, [(0.2, 0.8), (-1, 2)], [0.4, 1.0])
    )
    ours = [gamma("gamma", by_vi(_gamma)), mixture, exponential("exponential, by hand", _exponential())]
    return unbiased(
        ctx,
        ctx.pick(
            ours,
            minus=[exponential("exponential", _exponential(sign=1.0))],
            density=[exponential("exponential", _exponential(density=False))],
        ),
        n=20_000,
    )
