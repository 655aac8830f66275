"""V3, V9 and V10: values and gradients of objectives are unbiased, whatever the estimators of the choices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.nn import logsumexp
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

import vi
from paper_checks.harness import means
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.programmable_vi.common import (
    PAPER,
    Case,
    normal,
    unbiased,
)
from paper_checks.programmable_vi.models import OBSERVED, Strategy

SOURCE = "The authors' public code and slides; figures re-derived.  The paper's own numbering is unverified."
NO_SCORE = "the draw is not differentiated at all: the score term is missing"
sg = lax.stop_gradient
Estimator = Callable[[jax.Array], Any]


def derivatives(e: Callable[..., jax.Array], theta: Any, phi: Any, *data: Any) -> Estimator:
    """key -> the value of E(key, theta, phi, *data) and its gradient in both."""

    def estimator(key: jax.Array) -> Any:
        value, (by_theta, by_phi) = jax.value_and_grad(e, (1, 2))(key, theta, phi, *data)
        return {"value": value, "d theta": by_theta, "d phi": by_phi}

    return estimator


def exactly(f: Callable[[Any, Any], jax.Array], theta: Any, phi: Any) -> Any:
    compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(theta, phi).compile(means.QUICK_TO_COMPILE)
    value, (by_theta, by_phi) = compiled(theta, phi)
    return {"value": value, "d theta": by_theta, "d phi": by_phi}


def undifferentiated(model: Any, guide: Any, draws_with: Callable[[Any], Any] = sg) -> vi.Expectation:
    """An ELBO that takes the derivative of the densities but not of the draws."""

    def value(theta: Any, phi: Any, *data: Any) -> jax.Array:
        trace, _ = vi.sim(guide)(draws_with(phi), *data)
        return vi.log_density(model)(trace, theta, *data) - vi.log_density(guide)(trace, phi, *data)

    return vi.expectation(value)


# -- V3: the slides' example ------------------------------------------------------------------------------------------------


def _slides_model(prior: Any) -> None:
    v = numpyro.sample("v", dist.Bernoulli(probs=prior))
    x = numpyro.sample("x", dist.Normal(jnp.where(v == 1, 2.0, 3.0), jnp.where(v == 1, 1.0, 0.5)))
    numpyro.sample("observed", dist.Normal(x**2, 0.1), obs=jnp.array(4.0))


def _slides_guide(strategy: Strategy) -> Callable[..., None]:
    def guide(phi: Any) -> None:
        v = numpyro.sample("v", strategy(dist.Bernoulli(probs=phi[0])))
        numpyro.sample("x", vi.reparam(dist.Normal(jnp.where(v == 1, phi[1], phi[2]), 1.0)))

    return guide


def _slides_exact(prior: Any, phi: Any) -> jax.Array:
    """By the moments E x^2 = r^2 + 1 and E x^4 = r^4 + 6 r^2 + 3 of x ~ N(r, 1)."""

    def given(r: Any, mean: float, scale: float) -> jax.Array:
        second, fourth = r**2 + 1, r**4 + 6 * r**2 + 3
        model = -((r - mean) ** 2 + 1) / (2 * scale**2) - math.log(scale)
        observation = -(16 - 8 * second + fourth) / (2 * 0.01) - math.log(0.1)
        return model + observation + 0.5 - 0.5 * math.log(2 * math.pi)

    heads = jnp.log(prior) - jnp.log(phi[0]) + given(phi[1], 2.0, 1.0)
    tails = jnp.log1p(-prior) - jnp.log1p(-phi[0]) + given(phi[2], 3.0, 0.5)
    return phi[0] * heads + (1 - phi[0]) * tails


@claim(
    PAPER,
    "V3",
    r"For every objective built from sim, density and $\mathbb{E}$ over legal choices, "
    r"$\mathbb{E}[\hat\nabla]=\nabla$: the slides' example under ENUM, REINFORCE and MVD.",
    title="Gradients are unbiased: the worked example",
    kind="statistical",
    controls={"no_score": NO_SCORE},
    resolution=0.5,
    regime="flip and REPARAM normal at (p, mu1, mu2) = (.3, 1.5, 2.5): ELBO -1488.276, gradient (1303.4, -112.35, -1836.1); "
    "in units of max(1, |figure|)",
    source=SOURCE,
    blind_spot="The integrand has fourth powers times 50, so that a standard error is one to three per cent of a figure.",
)
def worked_example(ctx: Context) -> Outcome:
    prior, phi = jnp.array(0.8), jnp.array([0.3, 1.5, 2.5])
    exact = exactly(_slides_exact, prior, phi)
    strategies = {"ENUM": vi.enum, "REINFORCE": vi.reinforce, "MVD": vi.mvd}
    ours = {name: vi.elbo(_slides_model, _slides_guide(s)) for name, s in strategies.items()}
    wrong = {"not differentiated": undifferentiated(_slides_model, _slides_guide(vi.reinforce))}
    chosen = ctx.pick(ours, no_score=wrong)
    return unbiased(ctx, {name: Case(derivatives(e, prior, phi), exact) for name, e in chosen.items()}, n=40_000)


# -- V3b: Bernoulli and normal ------------------------------------------------------------------------------------------------


def _mixed_model(theta: Any) -> None:
    b = numpyro.sample("b", dist.Bernoulli(probs=theta))
    numpyro.sample("x", dist.Normal(2.0 * b - 1.0, 1.0), obs=jnp.array(OBSERVED))


def _mixed_guide(strategy: Strategy) -> Callable[..., None]:
    def guide(phi: Any) -> None:
        numpyro.sample("b", strategy(dist.Bernoulli(probs=phi)))

    return guide


def _mixed_exact(theta: Any, phi: Any, n: int) -> jax.Array:
    """E log (1/n) Σ w over all 2^n results of n flips."""
    log_w = jnp.stack([jnp.log1p(-theta), jnp.log(theta)]) - jnp.stack([jnp.log1p(-phi), jnp.log(phi)])
    log_w = log_w + normal(OBSERVED, jnp.array([-1.0, 1.0]), 1.0)
    heads = jnp.array(list(itertools.product((0, 1), repeat=n)))
    prob = jnp.prod(jnp.where(heads == 1, phi, 1 - phi), axis=1)
    return prob @ (logsumexp(log_w[heads], axis=1) - math.log(n))


def _mixed_in_numpyro(loss: Any) -> Estimator:
    """NumPyro's own estimate of minus the objective, and its derivative in p."""

    def model() -> None:
        _mixed_model(jnp.array(0.3))

    def guide() -> None:
        numpyro.sample("b", dist.Bernoulli(probs=numpyro.param("p")))

    def estimator(key: jax.Array) -> Any:
        value, by_p = jax.value_and_grad(lambda p: loss.loss(key, {"p": p}, model, guide))(jnp.array(0.4))
        return {"value": -value, "d phi": -by_p}

    return estimator


def _straight_through(key: jax.Array) -> Any:
    """The draw passed on as if it were its own probability."""

    def value(phi: Any) -> jax.Array:
        b = phi + sg((jax.random.uniform(key) < phi) - phi)
        log_p = b * math.log(0.3) + (1 - b) * math.log(0.7) + normal(OBSERVED, 2 * b - 1, 1.0)
        return log_p - b * jnp.log(phi) - (1 - b) * jnp.log1p(-phi)

    found, by_phi = jax.value_and_grad(value)(jnp.array(0.4))
    return {"value": found, "d phi": by_phi}


@claim(
    PAPER,
    "V3b",
    r"Headline, discrete guide: $b\sim\mathrm{Bern}(.3)$, $x\sim N(2b-1,1)=.7$, $q=\mathrm{Bern}(.4)$: "
    r"$\partial_p$ of $-$ELBO is $-.958167$ and of $-$IWELBO$_5$ is $-.226060$, under every strategy.",
    title="Gradients are unbiased: a discrete guide",
    kind="statistical",
    controls={
        "numpyro_elbo": "NumPyro's Trace_ELBO on the same programs: no score term, without an error",
        "numpyro_renyi": "NumPyro's RenyiELBO(alpha = 0, 5 particles): the wrong sign, without an error",
        "straight_through": "the draw is passed on as if it were its own probability",
        "no_score": NO_SCORE,
    },
    resolution=0.3,
    regime="ELBO and IWELBO of five particles, REINFORCE, ENUM and MVD, VIMCO, NumPyro's TraceGraph_ELBO (which is right)",
    source=SOURCE,
)
def discrete_guide(ctx: Context) -> Outcome:
    theta, phi = jnp.array(0.3), jnp.array(0.4)
    exact = {n: exactly(functools.partial(_mixed_exact, n=n), theta, phi) for n in (1, 5)}
    in_numpyro = {n: {name: exact[n][name] for name in ("value", "d phi")} for n in (1, 5)}

    def case(e: Callable[..., Any], n: int, more: int = 1) -> Case:
        return Case(derivatives(e, theta, phi), exact[n], more=more)

    def ours() -> dict[str, Case]:
        cases = {}
        for name, s in {"REINFORCE": vi.reinforce, "ENUM": vi.enum, "MVD": vi.mvd}.items():
            more = 4 if s is vi.reinforce else 1
            cases[f"ELBO, {name}"] = case(vi.elbo(_mixed_model, _mixed_guide(s)), 1, more)
            cases[f"IWELBO 5, {name}"] = case(vi.iwelbo(_mixed_model, _mixed_guide(s), 5), 5, more)
        cases["VIMCO 5"] = case(vi.vimco(_mixed_model, _mixed_guide(vi.reinforce), 5), 5)
        cases["TraceGraph_ELBO"] = Case(_mixed_in_numpyro(TraceGraph_ELBO()), in_numpyro[1], more=4)
        return cases

    no_score = undifferentiated(_mixed_model, _mixed_guide(vi.reinforce))
    cases = ctx.pick(
        ours,
        numpyro_elbo=lambda: {"Trace_ELBO": Case(_mixed_in_numpyro(Trace_ELBO()), in_numpyro[1])},
        numpyro_renyi=lambda: {
            "RenyiELBO": Case(_mixed_in_numpyro(RenyiELBO(alpha=0.0, num_particles=5)), in_numpyro[5])
        },
        straight_through=lambda: {"straight-through": Case(_straight_through, in_numpyro[1])},
        no_score=lambda: {"not differentiated": case(no_score, 1)},
    )
    return unbiased(ctx, cases())


# -- V3c: entropy and independent noise -----------------------------------------------------------------------------------


def _two_sites(_: Any) -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    y = numpyro.sample("y", dist.Normal(0.0, 1.0))
    numpyro.sample("o", dist.Normal(x + y, 1.0), obs=jnp.array(0.0))


def _two_guides(strategy: Strategy) -> Callable[..., None]:
    def guide(log_s: Any) -> None:
        for name in ("x", "y"):
            numpyro.sample(name, strategy(dist.Normal(0.0, jnp.exp(log_s))))

    return guide


def _two_sites_exact(_: Any, log_s: Any) -> jax.Array:
    """The loss: 2 s^2 - 2 log s and constants, with derivative 4 s^2 - 2 in log s."""
    return 2 * jnp.exp(2 * log_s) - 2 * log_s - 1 + 0.5 * math.log(2 * math.pi)


def _two_sites_by_hand(key: jax.Array, log_s: Any, entropy: float, shared: bool) -> jax.Array:
    noise = jax.random.normal(key, (2,))
    x, y = jnp.exp(log_s) * (noise[jnp.array([0, 0])] if shared else noise)
    log_p = normal(x, 0.0, 1.0) + normal(y, 0.0, 1.0) + normal(0.0, x + y, 1.0)
    return entropy * (normal(x, 0.0, jnp.exp(log_s)) + normal(y, 0.0, jnp.exp(log_s))) - log_p


@claim(
    PAPER,
    "V3c",
    r"Headline, two sites: $x,y\sim N(0,1)$, $o\sim N(x+y,1)=0$, $q=N(0,s)^2$: $\partial_{\log s}(-\mathrm{ELBO})=4s^2-2$.",
    title="The entropy counts, and sites have noise of their own",
    kind="statistical",
    controls={
        "no_entropy": "log q is left out, as by marginal() in genjax 0.10.3: 4 instead of 2 at s = 1",
        "shared": "both sites share their noise, as REPARAM sites do in genjax 0.10.3",
        "both": "both mistakes: 6 instead of 2",
    },
    resolution=0.2,
    regime="REPARAM, REINFORCE and MVD at s = 1 and at a drawn s",
    source=SOURCE,
)
def entropy_and_noise(ctx: Context) -> Outcome:
    scales = jnp.stack([jnp.zeros(()), jax.random.uniform(ctx.key, minval=-0.5, maxval=0.3)])
    exact = jax.vmap(lambda log_s: jax.grad(_two_sites_exact, 1)(0.0, log_s))(scales)
    values = jax.vmap(lambda log_s: _two_sites_exact(0.0, log_s))(scales)

    def case(loss: Callable[[jax.Array, Any], jax.Array], more: int = 1) -> Case:
        def estimator(key: jax.Array) -> Any:
            found = jax.vmap(lambda log_s: jax.value_and_grad(loss, 1)(key, log_s))(scales)
            return dict(zip(("value", "d log s"), found, strict=True))

        return Case(estimator, {"value": values, "d log s": exact}, more=more)

    def negative(e: vi.Expectation, key: jax.Array, log_s: Any) -> jax.Array:
        return -e(key, jnp.zeros(()), log_s)

    def ours() -> dict[str, Case]:
        found = {}
        for name, s in {"REPARAM": vi.reparam, "REINFORCE": vi.reinforce, "MVD": vi.mvd}.items():
            loss = functools.partial(negative, vi.elbo(_two_sites, _two_guides(s)))
            found[name] = case(loss, 8 if s is vi.reinforce else 1)
        return found

    def by_hand(entropy: float, shared: bool) -> Callable[[], dict[str, Case]]:
        return lambda: {"by hand": case(functools.partial(_two_sites_by_hand, entropy=entropy, shared=shared))}

    cases = ctx.pick(ours, no_entropy=by_hand(0.0, False), shared=by_hand(1.0, True), both=by_hand(0.0, True))
    return unbiased(ctx, cases())


# -- V9: wake phases do not differentiate the sampler -----------------------------------------------------------------------

WAKE_PARTICLES = 3


def _probed_model(theta: Any, x: Any) -> None:
    z = numpyro.sample("z", dist.Normal(theta[0], 1.0))
    numpyro.factor("probe", theta[1] * z)
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _probed_guide(phi: Any, x: Any) -> None:
    z = numpyro.sample("z", vi.reparam(dist.Normal(phi[0], jnp.exp(phi[1]))))
    numpyro.factor("probe", phi[2] * z + phi[3] * z**2)


def _differentiated(scored: str) -> vi.Expectation:
    """A wake phase that forgets to hold its sampler fixed."""

    def value(theta: Any, phi: Any, x: Any) -> jax.Array:
        target, proposal = functools.partial(_probed_model, theta), functools.partial(_probed_guide, phi)
        trace, _ = vi.sim(vi.normalize(target, vi.importance(WAKE_PARTICLES, proposal)))(x)
        program, parameters = {"model": (_probed_model, theta), "guide": (_probed_guide, phi)}[scored]
        return -vi.log_density(program)(trace, parameters, x)

    return vi.expectation(value)


WAKES: dict[str, dict[str, vi.Expectation]] = {
    "paper": {
        "model": vi.wake_theta(_probed_model, _probed_guide, WAKE_PARTICLES),
        "guide": vi.wake_phi(_probed_model, _probed_guide, WAKE_PARTICLES),
    },
    "through": {scored: _differentiated(scored) for scored in ("model", "guide")},
}


def _draw_wake(key: jax.Array) -> Any:
    k, k_seed = jax.random.split(key)
    return {"free": 0.5 * jax.random.normal(k, (3,)), "seed": jax.random.bits(k_seed, dtype=jnp.uint32)}


def _more_than_the_score(which: str) -> Callable[[Any], jax.Array]:
    """The largest relative error in what the components of one draw's gradients have to do with each other."""

    def violation(x: Any) -> jax.Array:
        a, m, log_s = x["free"]
        # The probes are off: they change nothing, but their derivatives read off the means of z and z^2.
        theta, phi = jnp.stack([a, jnp.zeros(())]), jnp.stack([m, log_s, jnp.zeros(()), jnp.zeros(())])
        args = jax.random.key(x["seed"]), theta, phi, jnp.array(OBSERVED)
        of_model, by_phi = jax.grad(WAKES[which]["model"], (1, 2))(*args)
        by_theta, of_guide = jax.grad(WAKES[which]["guide"], (1, 2))(*args)
        z = -of_model[1]
        errors = [(of_model[0] + z - a) / (1 + jnp.abs(z)), *by_phi, *by_theta]
        z, square, variance = -of_guide[2], -of_guide[3], jnp.exp(2 * log_s)
        size = 1 + (square + m**2) / variance
        errors += [(of_guide[0] + (z - m) / variance) / size]
        errors += [(of_guide[1] - 1 + (square - 2 * m * z + m**2) / variance) / size]
        return jnp.max(jnp.abs(jnp.stack(errors)))

    return violation


MORE_THAN_THE_SCORE = {which: _more_than_the_score(which) for which in WAKES}


@claim(
    PAPER,
    "V9",
    r"Wake phases: the gradient has the term of the scored program alone; the sampler's arguments are not differentiated.",
    title="Wake phases hold their sampler fixed",
    kind="exact",
    controls={"through": "the sampler's arguments are differentiated"},
    regime="normal model and guide, three particles, any parameters and keys.  Terms c z and c' z^2 at c = c' = 0 in the scored "
    "program give the means of z and z^2 in every draw, and with them the score; the other program's gradient vanishes",
    source=SOURCE,
)
def wake_fixed(ctx: Context) -> Outcome:
    return ctx.equal(
        MORE_THAN_THE_SCORE[ctx.pick("paper", through="through")],
        _draw_wake,
        tolerance=(1e-9, "scores of size up to about 1e6, relative, in 64 bits"),
        points=16,
    )


# -- V10: the identity of the ELBO ------------------------------------------------------------------------------------------


def _conjugate_model(theta: Any, x: Any) -> None:
    z = numpyro.sample("z", dist.Normal(theta[0], 1.0))
    numpyro.sample("x", dist.Normal(z, jnp.exp(theta[1])), obs=x)


def _normal_guide(strategy: Strategy) -> Callable[..., None]:
    def guide(phi: Any, x: Any) -> None:
        numpyro.sample("z", strategy(dist.Normal(phi[0], jnp.exp(phi[1]))))

    return guide


def _posterior(theta: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance of z given x, and log p(x)."""
    noise = jnp.exp(2 * theta[1])
    variance = 1 / (1 + 1 / noise)
    mean = variance * (theta[0] + OBSERVED / noise)
    return mean, variance, normal(OBSERVED, theta[0], jnp.sqrt(1 + noise))


def _kl(m1: Any, v1: Any, m2: Any, v2: Any) -> jax.Array:
    return 0.5 * (jnp.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)


@claim(
    PAPER,
    "V10",
    r"$\mathrm{ELBO}=\log Z-\mathrm{KL}(q\,\|\,p(\cdot\mid x))$.",
    title="The identity of the ELBO",
    kind="statistical",
    controls={"reversed": "KL(p || q) in place of KL(q || p)"},
    resolution=0.3,
    regime="conjugate normal model, parameters drawn; value and gradients under REPARAM, REINFORCE and MVD",
    source=SOURCE,
)
def elbo_identity(ctx: Context) -> Outcome:
    k_theta, k_phi = jax.random.split(jax.random.fold_in(ctx.key, 1))
    theta = 0.3 * jax.random.normal(k_theta, (2,))
    phi = jnp.array([0.3, -0.8]) + 0.1 * jax.random.normal(k_phi, (2,))

    def identity(theta: Any, phi: Any) -> jax.Array:
        mean, variance, log_z = _posterior(theta)
        q, p = (phi[0], jnp.exp(2 * phi[1])), (mean, variance)
        return log_z - (_kl(*q, *p) if straight else _kl(*p, *q))

    straight = ctx.pick(True, reversed=False)
    exact = exactly(identity, theta, phi)
    cases, strategies = {}, {"REPARAM": vi.reparam, "REINFORCE": vi.reinforce, "MVD": vi.mvd}
    for name, s in strategies.items() if straight else [("REPARAM", vi.reparam)]:
        e = vi.elbo(_conjugate_model, _normal_guide(s))
        cases[name] = Case(derivatives(e, theta, phi, jnp.array(OBSERVED)), exact, more=2)
    return unbiased(ctx, cases)


def _draw_conjugate(key: jax.Array) -> Any:
    k_theta, k_seed = jax.random.split(key)
    return {"theta": jax.random.normal(k_theta, (2,)), "seed": jax.random.bits(k_seed, dtype=jnp.uint32)}


def _estimate_less_evidence(x: Any, wider: Any) -> jax.Array:
    """At the posterior, its standard deviation times `wider`: how far single draws are from log Z, and gradients from 0."""
    theta, key, datum = x["theta"], jax.random.key(x["seed"]), jnp.array(OBSERVED)
    mean, variance, log_z = _posterior(theta)
    phi = jnp.stack([mean, 0.5 * jnp.log(variance) + jnp.log(wider)])
    guide = _normal_guide(vi.reparam)
    values = [
        vi.elbo(_conjugate_model, guide)(key, theta, phi, datum),
        vi.iwelbo(_conjugate_model, guide, 3)(key, theta, phi, datum),
        vi.renyi(_conjugate_model, guide, 3, 0.5)(key, theta, phi, datum),
    ]
    gradients = [
        jax.grad(vi.elbo(_conjugate_model, guide, stl=True), 2)(key, theta, phi, datum),
        jax.grad(vi.dreg_iwelbo(_conjugate_model, guide, 3), 2)(key, theta, phi, datum),
    ]
    off = jnp.abs(jnp.stack(values) - log_z) / (1 + jnp.abs(log_z))
    return jnp.maximum(off.max(), jnp.abs(jnp.stack(gradients)).max())


@claim(
    PAPER,
    "V10b",
    r"At $q=p(\cdot\mid x)$ every draw of ELBO, IWELBO and the Rényi bound equals $\log Z$, and the gradients without the "
    r"score of $q$ vanish.",
    title="At the posterior estimates do not vary",
    kind="exact",
    controls={"wider": "a guide one per cent too wide"},
    regime="conjugate normal model, any parameters and keys; three particles; sticking-the-landing and doubly "
    "reparameterised gradients",
    source="A consequence of V10; Roeder et al. 2017, Tucker et al. 2019.",
)
def exact_at_posterior(ctx: Context) -> Outcome:
    return ctx.equal(
        _estimate_less_evidence,
        _draw_conjugate,
        constants=(ctx.pick(1.0, wider=1.01),),
        tolerance=(1e-9, "log densities of size up to 1e4 (noise far smaller than the prior) in 64 bits"),
    )
