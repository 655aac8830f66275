"""A5, A6, A10 and A11: flips: enumeration, the measure-valued derivative, and baselines."""

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
    chances,
    figures_of,
    flip,
    outcomes,
    points,
    unbiased,
    value_and_grad,
)
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

# -- A5: ENUM -----------------------------------------------------------------------------------------------------------

SCALES = (1.0, 1.2, 1.4)


def _three_flips(p: Any) -> Any:
    return sum(flip(p * c, f"b{i}") for i, c in enumerate(SCALES)) ** 3


def _three_flips_exact(p: Any) -> Any:
    b = outcomes(3)
    return jnp.sum(chances(b, p * jnp.array(SCALES)) * b.sum(1) ** 3)


def _by(strategy: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"b{i}", strategy) for i in range(3))


def _coupled(p: Any, q: Any, r: Any) -> Any:
    """Three flips, and a choice of three whose law depends on them."""
    total = _three_flips(p)
    k = vi.sample(vi.enum(dist.Categorical(logits=jnp.stack([q, r, total / 9]))))
    return total * q + jnp.array([1.0, -1.0, 2.0])[k] * (1 + total)


def _coupled_exact(p: Any, q: Any, r: Any) -> Any:
    b = outcomes(3)
    total = jnp.asarray(b.sum(1) ** 3)
    weights = jnp.exp(jnp.stack([jnp.broadcast_to(q, 8), jnp.broadcast_to(r, 8), total / 9]))
    given_k = jnp.array([1.0, -1.0, 2.0]) @ weights / weights.sum(0)
    return jnp.sum(chances(b, p * jnp.array(SCALES)) * (total * q + given_k * (1 + total)))


@functools.lru_cache(maxsize=8)
def _enum_difference(strategy: str) -> Callable[..., Any]:
    estimator = by_vi(_coupled, _by(strategy))

    def difference(x: dict[str, Any]) -> Any:
        theta = _legal(x["free"])
        exact = figures_of(_coupled_exact)(theta)
        return jnp.max(jnp.abs(estimator(jax.random.key(x["seed"]), theta) - exact) / jnp.maximum(1, jnp.abs(exact)))

    return difference


def _equal_weights_difference(x: dict[str, Any]) -> Any:
    """One flip with the weights p and p: p l_1 + p l_0."""
    p, q, r = _legal(x["free"])
    wrong, exact = (figures_of(lambda p, w=w: p * (q + 2) + w(p) * r)(p[None]) for w in (lambda p: p, lambda p: 1 - p))
    return jnp.max(jnp.abs(wrong - exact))


def _legal(free: Any) -> Any:
    """Probabilities below 1/1.4, and weights, of free reals."""
    return jnp.stack([0.05 + 0.6 * jax.nn.sigmoid(free[0]), jax.nn.sigmoid(free[1]), jnp.tanh(free[2])])


def _draw_free(key: Any) -> dict[str, Any]:
    k_free, k_seed = jax.random.split(key)
    return {"free": 2 * jax.random.normal(k_free, (3,)), "seed": jax.random.bits(k_seed, dtype=jnp.uint32)}


@claim(
    PAPER,
    "A5",
    r"ENUM: $\sum_k p_k\,\kappa_D(k)$ in dual arithmetic is exact on finite supports and has no variance when all that "
    r"follows is exact.",
    title="Enumeration is exact",
    kind="exact",
    controls={"equal_weights": "the weights p and p instead of p and 1 - p", "sampled": "the score function instead"},
    regime="three flips and a choice of three whose law depends on them; value and gradient, every key",
    source=RULE,
)
def enumeration(ctx: Context) -> Outcome:
    difference = ctx.pick(
        _enum_difference("enum"), equal_weights=_equal_weights_difference, sampled=_enum_difference("reinforce")
    )
    return ctx.equal(difference, _draw_free, tolerance=(1e-11, "64 bits; sums of 24 terms below 100"))


# -- A6: MVD of flips -----------------------------------------------------------------------------------------------------


def _cube(b: Any) -> Any:
    return jnp.sum(b) ** 3


@claim(
    PAPER,
    "A6",
    r"MVD of a flip: $(-1)^b\,[\kappa(\neg b)-l]\,\dot p$ has the mean $[f(1)-f(0)]\,\dot p$.",
    title="The measure-valued derivative of flips is unbiased",
    kind="statistical",
    controls={"sign": "the sign (-1)^(1-b): f(0) - f(1)"},
    resolution=0.15,
    regime="E (b_1 + b_2 + b_3)^3 with probabilities p, 1.2 p, 1.4 p; in units of max(1, |figure|); exact bounds, so that the "
    "evidence is exact at every n",
    source=RULE,
)
def mvd_flip(ctx: Context) -> Outcome:
    at = points(ctx, 0, [(0.1, 0.6)], [0.3])
    case = functools.partial(Case, exact=figures_of(_three_flips_exact), points=at, bound=27.0 * sum(SCALES))
    ours = [
        case("three flips", by_vi(_three_flips, _by("mvd"))),
        case("three flips, by hand", rules.mvd_flips(SCALES, _cube)),
    ]
    return unbiased(ctx, ctx.pick(ours, sign=[case("sign reversed", rules.mvd_flips(SCALES, _cube, -1.0))]))


def _two_valued(p: Any, f1: Any, f0: Any) -> Any:
    return jnp.where(flip(p, "b0") == 1, f1, f0)


def _terminal_difference(strategy: str) -> Callable[..., Any]:
    estimator = by_vi(_two_valued, (("b0", strategy),))

    def difference(x: dict[str, Any]) -> Any:
        p, f1, f0 = _legal(x["free"])
        by_p = estimator(jax.random.key(x["seed"]), jnp.stack([p, f1, f0]))[1]
        return jnp.abs(by_p - (f1 - f0))

    return difference


_TERMINAL = {strategy: _terminal_difference(strategy) for strategy in ("mvd", "reinforce")}


@claim(
    PAPER,
    "A6b",
    r"For a single terminal flip the measure-valued derivative has no variance: every draw gives $f(1)-f(0)$.",
    title="MVD of one last flip is exact",
    kind="exact",
    controls={"reinforce": "the score function instead, whose draws differ"},
    regime="any p in (0.05, 0.65) and values; every key; the derivative in p (that in f has the variance of b)",
    source=RULE,
)
def terminal_flip(ctx: Context) -> Outcome:
    difference = ctx.pick(_TERMINAL["mvd"], reinforce=_TERMINAL["reinforce"])
    return ctx.equal(difference, _draw_free, tolerance=(1e-13, "64 bits; a difference of two numbers below 1"))


def _second_moment(p: Any, f1: Any, f0: Any) -> Any:
    return _at_1(f1**2 / p + f0**2 / (1 - p))


def _second_moment_naive(p: Any, f1: Any, f0: Any) -> Any:
    return _at_1(p * (1 - p) * (f1 - f0) ** 2 + (f1 - f0) ** 2)


def _at_1(figure: Any) -> Any:
    """In the place of the derivative in the first parameter."""
    return jnp.stack([jnp.zeros(()), figure])


@claim(
    PAPER,
    "A6c",
    r"For $f(b)$ the score function has the variance "
    r"$p\left(\frac{f_1}{p}\right)^2+(1-p)\left(\frac{f_0}{1-p}\right)^2-(f_1-f_0)^2$.",
    title="Variance of REINFORCE on one flip",
    kind="statistical",
    controls={"naive": "the variance p (1 - p) (f1 - f0)^2 of the loss"},
    resolution=0.1,
    regime="second moments, p in [0.2, 0.8], |f| <= 1; in units of max(1, |figure|); exact bounds",
    source="Derived from the rule.",
)
def reinforce_variance(ctx: Context) -> Outcome:
    at = points(ctx, 0, [(0.2, 0.8), (-1.0, 1.0), (-1.0, 1.0)], [0.3, 1.0, -0.5], [0.3, 1.0, 1.0])
    formula = ctx.pick(_second_moment, naive=_second_moment_naive)
    estimator = by_vi(_two_valued, (("b0", "reinforce"),))
    case = Case("second moment", estimator, lambda theta: formula(*theta), at, bound=25.0, square=True, kept=(1,))
    return unbiased(ctx, [case])


# -- A10 and A11: baselines --------------------------------------------------------------------------------------------------


def _shifted(b: Any, offset: Any) -> Any:
    """offset + b, written so that all of it depends on the draw: of a sum, `vi` scores only the terms that do."""
    return jnp.where(b == 1, offset + 1, offset)


def _with_baseline(p: Any, offset: Any) -> Any:
    b = vi.sample(vi.reinforce(dist.Bernoulli(probs=p), baseline=lax.stop_gradient(offset)))
    return _shifted(b, offset)


def _without_baseline(p: Any, offset: Any) -> Any:
    return _shifted(vi.sample(vi.reinforce(dist.Bernoulli(probs=p))), offset)


def _plain_second_moment(theta: Any) -> Any:
    p, offset = theta
    return _at_1((offset + 1) ** 2 / p + offset**2 / (1 - p))


def _sum(p: Any, offset: Any) -> Any:
    return p + offset


BASELINE_BOX = ((0.25, 0.75), (-10.0, 10.0))


@claim(
    PAPER,
    "A10",
    r"A baseline $b$ that does not depend on the draw leaves the mean of REINFORCE unchanged, "
    r"$\mathbb{E}[(l-b)\,\partial\log p]=\mathbb{E}[l\,\partial\log p]$, and changes its variance.",
    title="Baselines: no bias, another variance",
    kind="statistical",
    controls={"self_included": "the mean of a batch of four, the own loss included: (m - 1) / m = 3/4"},
    resolution=0.1,
    regime="loss c + flip(p) with the baseline c, |c| <= 10; means, and second moments of 1/p with it and "
    "(c + 1)^2 / p + c^2 / (1 - p) without; in units of max(1, |figure|); exact bounds",
    source=RULE,
)
def baseline(ctx: Context) -> Outcome:
    at = points(ctx, 0, BASELINE_BOX, (0.4, 10.0))
    mean = functools.partial(Case, exact=figures_of(_sum), points=at, bound=11.0)
    second = functools.partial(Case, points=at, square=True, kept=(1,))
    with_b, without = by_vi(_with_baseline), by_vi(_without_baseline)
    ours = [
        mean("with baseline", with_b),
        second("second moment with", with_b, lambda theta: _at_1(1 / theta[0]), bound=16.0),
        second("second moment without", without, _plain_second_moment, bound=44.0**2),
    ]
    wrong = [mean("own loss included", rules.self_included(4))]
    return unbiased(ctx, ctx.pick(ours, self_included=wrong))


@functools.lru_cache(maxsize=8)
def _lanes(m: int) -> Any:
    d = functools.partial(vi.reinforce, baseline="leave_one_out")

    def program(p: Any, offset: Any) -> Any:
        lane = lambda: offset + vi.sample(d(dist.Bernoulli(probs=p))).astype(float)  # noqa: E731
        return jnp.mean(vi.vmap(lane, axis_size=m)())

    return value_and_grad(vi.expectation(program))


@functools.lru_cache(maxsize=8)
def _lanes_second_moment(m: int) -> Any:
    def exact(theta: Any) -> Any:
        p = theta[0]
        b = jnp.asarray(outcomes(m))
        others = (b.sum(1, keepdims=True) - b) / (m - 1)
        by_p = jnp.mean((b - others) * jnp.where(b == 1, 1 / p, -1 / (1 - p)), axis=1)
        return _at_1(jnp.sum(chances(b, p) * by_p**2))

    return exact


@claim(
    PAPER,
    "A11",
    r"Leave-one-out: with $m\ge2$ lanes and $b_i=\frac{1}{m-1}\sum_{j\ne i}l_j$, "
    r"$\frac1m\sum_i[\dot l_i+(l_i-b_i)\,\partial\log p(v_i)]$ is unbiased.",
    title="The leave-one-out baseline is unbiased",
    kind="statistical",
    controls={"self_included": "the mean of all lanes, the own one included: (m - 1) / m"},
    resolution=0.1,
    regime="loss c + flip(p), |c| <= 10, m = 2 and 4: means, and second moments by enumeration of the 2^m results; in units of "
    "max(1, |figure|); exact bounds",
    source=RULE,
)
def leave_one_out(ctx: Context) -> Outcome:
    at = points(ctx, 0, BASELINE_BOX, (0.4, 10.0))
    mean = functools.partial(Case, exact=figures_of(_sum), points=at, bound=11.0)
    second = functools.partial(Case, points=at, square=True, kept=(1,), bound=16.0)
    ours = []
    for m in (2, 4):
        ours.append(mean(f"{m} lanes", _lanes(m)))
        ours.append(second(f"second moment, {m} lanes", _lanes(m), _lanes_second_moment(m)))
    return unbiased(ctx, ctx.pick(ours, self_included=[mean("own loss included", rules.self_included(4))]))
