"""The suite's false-alarm budget and its stated resolution, measured.

Ten true claims, one for each way of testing and for the distributions that break naive tests, are run as a suite with
many seeds at `suite_alpha = 0.05`: 300, and 1000 with `--budget standard` or `deep`.  The number of suites that raise an
alarm is binomial with probability at most 0.05; at most as many are allowed as are exceeded with probability 5e-4 under
that (29 of 300, 74 of 1000).  In the same runs each claim is falsified by its own stated resolution and must be found with
probability at least 0.9.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from scipy import stats

from paper_checks.harness.claim import REJECTED, Claim, Outcome, Paper, Verdict, claim
from paper_checks.harness.context import Context
from paper_checks.harness.runner import Settings, run_item

SEEDS = {"quick": 300, "standard": 1000, "deep": 1000}
N = 1000

PAPER = Paper("planted", "True claims", "nobody", 2026, "none", "0000.00000", ())


def planted(number: str, check) -> Claim:
    """A true claim whose control is false by `size`, filled in with the resolution that the claim states."""

    def measured(ctx: Context, size: float = 0.0) -> Outcome:
        return check(ctx, ctx.pick(0.0, planted=size))

    return claim(
        PAPER,
        number,
        "planted",
        title=number,
        kind=KINDS.get(check.__name__, "statistical"),
        resolution=10.0,
        controls={"planted": "false by the stated resolution"},
        regime="",
        source="",
    )(measured)


# Each check draws its sample, shifted by `by` when it is planted, and tests the unshifted statement.


@functools.partial(jax.jit, static_argnames=("n",))
def _uniform(key: jax.Array, n: int) -> jax.Array:
    return jax.random.uniform(key, (n,))


@functools.partial(jax.jit, static_argnames=("n",))
def _normal(key: jax.Array, n: int) -> jax.Array:
    return jax.random.normal(key, (n,))


def bernoulli_half(ctx: Context, by: float) -> Outcome:
    return ctx.mean(np.asarray(_uniform(ctx.key, N)) < 0.5 + by, 0.5, low=0, high=1)


def bernoulli_rare_mean(ctx: Context, by: float) -> Outcome:
    return ctx.mean(np.asarray(_uniform(ctx.key, N)) < 0.02 + by, 0.02, low=0, high=1)


def skewed_mean(ctx: Context, by: float) -> Outcome:
    u = np.asarray(_uniform(ctx.key, N))
    # u^9 has mean 1/10; a mixture with ones moves the mean by `by`.
    x = np.where(np.asarray(_uniform(jax.random.fold_in(ctx.key, 1), N)) < by / 0.9, 1.0, u**9)
    return ctx.mean(x, 0.1, low=0, high=1)


def at_most(ctx: Context, by: float) -> Outcome:
    return ctx.at_most(np.asarray(_uniform(ctx.key, N)) < 0.3 + by, 0.3, low=0, high=1)


def rare_event(ctx: Context, by: float) -> Outcome:
    hits = int(np.sum(np.asarray(_uniform(ctx.key, N)) < 0.001 + by))
    return ctx.proportion(hits, N, 0.001)


def common_event(ctx: Context, by: float) -> Outcome:
    return ctx.proportion(int(np.sum(np.asarray(_uniform(ctx.key, N)) < 0.4 + by)), N, 0.4)


def lognormal_law(ctx: Context, by: float) -> Outcome:
    # Shifting a normal by m moves its distribution function by 2 Phi(m / 2) - 1 at most.
    shift = 2 * stats.norm.ppf((1 + by) / 2)
    x = np.exp(2 * (np.asarray(_normal(ctx.key, N)) + shift))
    return ctx.law(x, lambda a: stats.norm.cdf(np.log(a) / 2))


def two_samples(ctx: Context, by: float) -> Outcome:
    # Its resolution is in units of a witness that it learns.  Where `FAR` of one sample lies six deviations off, that
    # witness separates the samples by less than the resolution, which the fixture below makes sure of.
    x, y = (np.asarray(_normal(jax.random.fold_in(ctx.key, i), 400)) for i in (6, 7))
    far = np.asarray(_uniform(jax.random.fold_in(ctx.key, 8), 400)) < FAR
    return ctx.same_law(x + 6 * far if by else x, y)


def order(ctx: Context, by: float) -> Outcome:
    steps = 2.0 ** -np.arange(3, 9)
    noise = np.exp(0.01 * np.asarray(_normal(ctx.key, 60)).reshape(10, 6))
    return ctx.order(steps, steps ** (0.5 + by) * noise, 0.5)


def better_than_zero(ctx: Context, by: float) -> Outcome:
    # Least favourable: the advantage is exactly what is claimed to be exceeded.
    return ctx.better(np.asarray(_normal(ctx.key, 8)) - by, np.zeros(8))


CHECKS = [
    bernoulli_half,
    bernoulli_rare_mean,
    skewed_mean,
    at_most,
    rare_event,
    common_event,
    lognormal_law,
    two_samples,
    order,
    better_than_zero,
]
KINDS = {"order": "rate", "better_than_zero": "trained"}
FAR = 0.52


class Measured(NamedTuple):
    """Number of suites, how many of them raised an alarm, and how often each planted claim was found."""

    suites: int
    alarmed: int
    found: dict[str, int]


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Measured:
    # The option is there when the paper checks are run with these tests.
    seeds = SEEDS[request.config.getoption("--budget", default="quick")]
    settings = [Settings(seed=s, suite_alpha=0.05, items=len(CHECKS)) for s in range(seeds)]
    claims = [planted(f.__name__, f) for f in CHECKS]
    alarmed = np.zeros(seeds, bool)
    found = dict.fromkeys((c.number for c in claims), 0)
    for c in claims:
        truth = c.check
        assert truth is not None
        sizes = []
        for s, setting in enumerate(settings):
            run = run_item(c, "claim", None, setting)
            assert run.verdict is not Verdict.ERROR, run.reason
            alarmed[s] |= run.verdict in REJECTED
            assert run.outcome is not None and run.outcome.resolution is not None
            sizes.append(run.outcome.resolution)
        seen: list[float] = []
        # The resolution depends a little on the sample; what is promised is what the run itself states.
        for setting, size in zip(settings, sizes, strict=True):
            false = planted(c.number, CHECKS[claims.index(c)])
            object.__setattr__(false, "check", functools.partial(truth, size=size))
            wrong = run_item(false, "control", "planted", setting)
            found[c.number] += wrong.verdict in REJECTED
            assert wrong.outcome is not None and wrong.outcome.our_value is not None
            seen.append(abs(wrong.outcome.our_value))
        if c.number == "two_samples":
            assert 0.8 * np.mean(sizes) < np.mean(seen) < np.mean(sizes)
    return Measured(seeds, int(alarmed.sum()), found)


@pytest.mark.slow
def test_suite_raises_no_more_alarms_than_its_budget(measured: Measured) -> None:
    assert measured.alarmed <= stats.binom.isf(5e-4, measured.suites, 0.05)


@pytest.mark.parametrize("name", [f.__name__ for f in CHECKS])
def test_planted_violation_at_the_stated_resolution_is_found(measured: Measured, name: str) -> None:
    assert measured.found[name] >= 0.9 * measured.suites
