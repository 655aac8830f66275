"""The statistical routines keep their level, see what they say they see, and tell orders of convergence apart.

Where a probability can be computed it is, by enumeration or a distribution of scipy; where it is simulated, the bound
on the count is the binomial quantile that a routine at its exact level exceeds with probability `RARE`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
from scipy import stats

from paper_checks.harness import statistics

RARE = 1e-4
"""Error rate of each simulated comparison in this file; there are about thirty."""

ALPHA = 0.05
N = 400
REPEATS = 1500


def most(level: float, repeats: int = REPEATS) -> int:
    """More alarms than this have probability below `RARE` at the stated level."""
    return int(stats.binom.isf(RARE, repeats, level))


def fewest(power: float, repeats: int = REPEATS) -> int:
    """Fewer detections than this have probability below `RARE` at the stated power."""
    return int(stats.binom.ppf(RARE, repeats, power))


def rejected(e: statistics.Evidence, alpha: float = ALPHA) -> bool:
    assert (e.log_e is None) != (e.p is None)
    return e.log_e >= math.log(1 / alpha) if e.log_e is not None else e.p < alpha


# -- mean -------------------------------------------------------------------------------------------------------------

BOUNDED: dict[str, tuple[float, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]]] = {
    "fair coin": (0.5, lambda rng, shape: rng.integers(0, 2, shape).astype(float)),
    "rare event": (0.001, lambda rng, shape: (rng.random(shape) < 0.001).astype(float)),
    "near certain": (0.999, lambda rng, shape: (rng.random(shape) < 0.999).astype(float)),
    "skewed": (1 / 11, lambda rng, shape: rng.beta(0.5, 5, shape)),
    "clipped normal": (0.5, lambda rng, shape: np.clip(rng.normal(0.5, 0.2, shape), 0, 1)),
    "constant": (0.25, lambda rng, shape: np.full(shape, 0.25)),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_mean_keeps_its_level_on_hard_laws(name: str):
    expected, draw = BOUNDED[name]
    samples = draw(np.random.default_rng(1), (REPEATS, N))
    both = sum(rejected(statistics.mean(x, expected, low=0, high=1, alpha=ALPHA)) for x in samples)
    one = sum(rejected(statistics.mean(x, expected, low=0, high=1, alpha=ALPHA, one_sided=True)) for x in samples)
    assert both <= most(ALPHA)
    assert one <= most(ALPHA)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize(
    ("values", "weights"),
    [([0.0, 1.0], [0.5, 0.5]), ([0.0, 1.0], [0.97, 0.03]), ([0.0, 0.3, 1.0], [0.2, 0.5, 0.3])],
    ids=["fair", "rare", "three values"],
)
def test_mean_bets_are_fair(values: list[float], weights: list[float], one_sided: bool):
    """Over all samples of six values the e-value has expectation exactly 1: what makes its level hold at every n."""
    every = list(itertools.product(range(len(values)), repeat=6))
    expected = float(np.dot(values, weights))
    total = 0.0
    for choice in every:
        x = np.array(values)[list(choice)]
        e = statistics.mean(x, expected, low=0, high=1, alpha=1e-3, one_sided=one_sided)
        total += math.prod(weights[i] for i in choice) * math.exp(e.log_e)
    assert total == pytest.approx(1, abs=1e-12)  # a sum of at most 729 terms in double precision


def shifted(name: str, rng: np.random.Generator, shape: tuple[int, int], by: float) -> np.ndarray:
    """The law with its mean moved by `by`: mass is moved to the far end of the range, or the law itself is moved."""
    expected, draw = BOUNDED[name]
    x = draw(rng, shape)
    far = 1.0 if by > 0 else 0.0
    return np.where(rng.random(shape) < by / (far - expected), far, x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["fair coin", "rare event", "skewed", "clipped normal"])
@pytest.mark.parametrize("alpha", [0.05, 1e-5])
def test_mean_sees_a_shift_of_its_resolution_in_two_stages(name: str, sign: int, alpha: float):
    expected, draw = BOUNDED[name]
    rng = np.random.default_rng(2)
    stated = statistics.mean(draw(rng, (1, N)), expected, low=0, high=1, alpha=alpha).resolution
    if sign < 0 and stated > expected:
        # A mean near the end of its range cannot fall by that much: only the excess is promised.
        assert name in ("rare event", "skewed")
        return
    repeats, found = 400, 0
    for x, y in shifted(name, rng, (2 * repeats, N), sign * stated).reshape(repeats, 2, N):
        first, again = (statistics.mean(s, expected, low=0, high=1, alpha=alpha) for s in (x, y))
        found += rejected(first, alpha) and first.log_e + again.log_e >= math.log(1 / alpha)
    assert found >= fewest(0.9, repeats)


def test_mean_resolution_is_not_idle():
    """A tenth of the resolution is not seen: the stated number is within a factor of ten of the truth."""
    e = functools.partial(statistics.mean, expected=0.5, low=0, high=1, alpha=ALPHA)
    rng = np.random.default_rng(3)
    by = e(rng.random(N)).resolution / 10
    assert sum(rejected(e(np.clip(rng.random(N) + by, 0, 1))) for _ in range(200)) <= 100


def test_one_sided_mean_ignores_what_lies_below_and_sees_what_lies_above():
    rng = np.random.default_rng(4)
    test = functools.partial(statistics.mean, expected=0.5, low=0, high=1, alpha=ALPHA, one_sided=True)
    assert not any(rejected(test(0.3 * rng.random(N))) for _ in range(50))
    stated = test(rng.random(N) < 0.5).resolution
    found = sum(rejected(test(rng.random(N) < 0.5 + stated)) for _ in range(200))
    assert found >= fewest(0.9, 200)


def test_mean_is_the_same_in_other_units():
    x = np.random.default_rng(5).random(N)
    plain = statistics.mean(x, 0.4, low=0, high=1, alpha=ALPHA)
    scaled = statistics.mean(10 * x - 3, 1.0, low=-3, high=7, alpha=ALPHA)
    # Equal but for rounding in the change of units.
    assert scaled.log_e == pytest.approx(plain.log_e, rel=1e-9)
    assert scaled.resolution == pytest.approx(10 * plain.resolution, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([0.5], {}, "x has 1 values; a statistical test needs at least 2"),
        ([0.5, 1.5], {}, r"samples span \[0.5, 1.5\], outside"),
        ([0.5, 0.5], {"expected": 1.0}, r"expected 1.0 must lie strictly inside \[low, high\] = \[0, 1\]"),
    ],
)
def test_mean_names_what_is_wrong(x: list[float], options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        statistics.mean(x, **{"expected": 0.5, "low": 0, "high": 1, "alpha": ALPHA, **options})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_an_error_everywhere(value: float):
    x = np.linspace(0.1, 0.9, 20)
    bad = np.where(np.arange(20) == 3, value, x)
    with pytest.raises(FloatingPointError, match="x has 1 non-finite of 20 values"):
        statistics.mean(bad, 0.5, low=0, high=1, alpha=ALPHA)
    with pytest.raises(FloatingPointError, match="x has 1 non-finite of 20 values"):
        statistics.law(bad, stats.uniform.cdf, alpha=ALPHA)
    with pytest.raises(FloatingPointError, match="y has non-finite values"):
        statistics.same_law(x, bad, key=jax.random.key(0), alpha=ALPHA)
    with pytest.raises(FloatingPointError, match="non-finite figure"):
        statistics.paired(bad, x, alpha=ALPHA)
    with pytest.raises(FloatingPointError, match="must be positive and finite"):
        statistics.order([1, 2, 4, 8], np.full((5, 4), value), claimed=1, alpha=ALPHA)


# -- proportion: everything by enumeration ----------------------------------------------------------------------------


@functools.cache
def rejections(n: int, expected: float, level: float) -> np.ndarray:
    """For every possible count, whether it is rejected at the level."""
    # Counts with less probability than this are rejected at every level used here.
    near = stats.binom.pmf(np.arange(n + 1), n, expected) > 1e-30
    out = np.ones(n + 1, bool)
    for k in np.flatnonzero(near):
        out[k] = statistics.proportion(int(k), n, expected, alpha=level).p < level
    return out


@pytest.mark.parametrize("level", [0.05, 1e-3])
@pytest.mark.parametrize(("n", "expected"), [(1000, 0.001), (100, 0.4), (50, 0.97)])
def test_proportion_has_its_exact_level_and_resolution(n: int, expected: float, level: float):
    counts = np.arange(n + 1)
    size = np.sum(stats.binom.pmf(counts, n, expected)[rejections(n, expected, level)])
    assert size <= level
    # Seen: rejected at the level, and again on a fresh sample at the level of the repetition.
    stated = statistics.proportion(round(n * expected), n, expected, alpha=level).resolution
    powers = []
    for q in (expected + stated, expected - stated):
        if 0 <= q <= 1:
            pmf = stats.binom.pmf(counts, n, q)
            stages = (rejections(n, expected, a) for a in (level, statistics.REPEAT_LEVEL))
            powers.append(math.prod(float(np.sum(pmf[r])) for r in stages))
    assert powers and min(powers) >= 0.9


def test_proportion_says_which_side_it_cannot_see():
    # With 1000 trials of probability 0.001 no count is too small to be believed.
    rare = statistics.proportion(1, 1000, 0.001, alpha=1e-3)
    assert "a probability below 0.001 cannot be told apart at any size with n = 1000" in rare.note
    assert not rejections(1000, 0.001, 1e-3)[0] and math.isfinite(rare.resolution)
    assert "a probability above 0.999" in statistics.proportion(999, 1000, 0.999, alpha=1e-3).note
    assert statistics.proportion(400, 1000, 0.4, alpha=1e-3).note == ""


def test_proportion_names_what_is_wrong():
    with pytest.raises(ValueError, match="expected is 1; it must lie strictly between 0 and 1"):
        statistics.proportion(3, 10, 1, alpha=ALPHA)
    with pytest.raises(ValueError, match="11 successes of 10 trials is impossible"):
        statistics.proportion(11, 10, 0.5, alpha=ALPHA)


# -- law --------------------------------------------------------------------------------------------------------------

LAWS = {
    "normal": stats.norm(3.0, 2.0),
    "lognormal(2)": stats.lognorm(2.0),
    "t3": stats.t(3),
    "uniform": stats.uniform(),
}


@pytest.mark.parametrize("name", LAWS)
def test_law_keeps_its_level_whatever_the_tails(name: str):
    samples = LAWS[name].rvs((REPEATS, N), random_state=np.random.default_rng(6))
    assert sum(rejected(statistics.law(x, LAWS[name].cdf, alpha=ALPHA)) for x in samples) <= most(ALPHA)


@pytest.mark.parametrize("n", [2, 10, 300])
def test_law_statistic_is_that_of_kolmogorov_and_its_p_value_an_upper_bound(n: int):
    for seed in range(20):
        x = np.random.default_rng(seed).standard_t(3, n)
        ours, theirs = statistics.law(x, stats.t(3).cdf, alpha=ALPHA), stats.kstest(x, stats.t(3).cdf, method="exact")
        assert ours.statistic == pytest.approx(theirs.statistic, abs=1e-12)  # rounding of numbers below 1
        assert ours.p >= theirs.pvalue - 1e-12


@pytest.mark.parametrize("alpha", [0.05, 1e-5])
def test_law_sees_an_atom_of_its_resolution_in_two_stages(alpha: float):
    # An atom at one point moves the distribution function there by its whole mass and nowhere by more.
    stated = statistics.law(np.linspace(0.01, 0.99, N), stats.uniform.cdf, alpha=alpha).resolution
    rng, repeats = np.random.default_rng(7), 500
    u = rng.random((repeats, 2, N))
    for at in (0.0, 0.5):
        x = np.where(rng.random(u.shape) < stated / max(at, 1 - at), at, u)
        found = 0
        for first, again in x:
            p, q = (statistics.law(s, stats.uniform.cdf, alpha=alpha).p for s in (first, again))
            found += p < alpha and q < statistics.REPEAT_LEVEL
        assert found >= fewest(0.9, repeats)


def test_law_refuses_what_is_no_distribution_function():
    with pytest.raises(ValueError, match=r"cdf returned values outside \[0, 1\]"):
        statistics.law(np.linspace(0, 1, 9), lambda a: 2 * a, alpha=ALPHA)
    with pytest.raises(ValueError, match=r"cdf returned values outside \[0, 1\]"):
        statistics.law(np.linspace(0, 1, 9), lambda a: a * np.nan, alpha=ALPHA)


# -- two samples ------------------------------------------------------------------------------------------------------


def two_sample_rate(draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], repeats: int) -> int:
    rng, found = np.random.default_rng(8), 0
    for i in range(repeats):
        x, y = draw(rng)
        found += rejected(statistics.same_law(x, y, key=jax.random.key(i), alpha=ALPHA))
    return found


@pytest.mark.parametrize("name", ["normal", "lognormal(2)", "t3"])
def test_same_law_keeps_its_level(name: str):
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x, y = LAWS[name].rvs((2, 120, 2), random_state=rng)
        return x, y

    assert two_sample_rate(draw, 150) <= most(ALPHA, 150)


def test_same_law_does_not_bet_on_what_it_learned_from():
    """In 20 dimensions every point is far from all others, and a witness knows the points it was learned from."""
    assert two_sample_rate(lambda rng: tuple(rng.normal(size=(2, 120, 20))), 100) <= most(ALPHA, 100)


def test_same_law_takes_ties():
    """Most values equal, or all: the sample has no median deviation to scale by."""
    assert two_sample_rate(lambda rng: tuple((rng.random((2, 200)) < 0.001).astype(float)), 150) <= most(ALPHA, 150)
    assert two_sample_rate(lambda rng: (np.zeros(200), np.zeros(200)), 1) == 0

    def rare_and_rarer(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return (rng.random(600) < 0.4).astype(float), (rng.random(600) < 0.1).astype(float)

    assert two_sample_rate(rare_and_rarer, 40) >= fewest(0.9, 40)


def correlated(rng: np.random.Generator, rho: float, n: int) -> np.ndarray:
    x, y = rng.normal(size=(2, n))
    return np.stack([x, rho * x + math.sqrt(1 - rho**2) * y], axis=1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: (rng.normal(size=600), rng.normal(0.8, 1, size=600)),
        lambda rng: (rng.normal(size=600), rng.normal(0, 2, size=600)),
        lambda rng: (correlated(rng, 0.0, 600), correlated(rng, 0.9, 600)),
    ],
    ids=["shift", "scale", "dependence"],
)
def test_same_law_sees_shift_scale_and_dependence(draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]):
    assert two_sample_rate(draw, 40) >= fewest(0.9, 40)


def test_same_law_says_its_units():
    x = np.random.default_rng(13).normal(size=(2, 100))
    found = statistics.same_law(*x, key=jax.random.key(0), alpha=ALPHA)
    assert "half the difference of the mean of a learned witness in [-1, 1]" in found.note


def test_same_law_names_what_is_wrong():
    x, key = np.zeros((9, 2)), jax.random.key(0)
    with pytest.raises(ValueError, match="x has 2 columns, y has 3"):
        statistics.same_law(x, np.zeros((9, 3)), key=key, alpha=ALPHA)
    with pytest.raises(ValueError, match=r"y has shape \(7, 2\); expected \(n,\) or \(n, d\) with n at least 8"):
        statistics.same_law(x, np.zeros((7, 2)), key=key, alpha=ALPHA)


# -- orders of convergence --------------------------------------------------------------------------------------------

STEPS = 2.0 ** -np.arange(3, 9)
ORDERS = (0.5, 1.0, 1.5, 2.0)


def power_law(q: float, seed: int = 0, replicates: int = 20, noise: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return STEPS**q * np.exp(noise * rng.normal(size=(replicates, STEPS.size)))


@pytest.mark.parametrize("true", ORDERS)
@pytest.mark.parametrize("claimed", ORDERS)
def test_orders_are_told_apart(true: float, claimed: float):
    verdicts = {statistics.order(STEPS, power_law(true, s), claimed=claimed, alpha=1e-3).verdict for s in range(20)}
    assert verdicts == ({"claimed"} if true == claimed else {"rival"})


def test_a_true_order_is_rejected_no_more_often_than_the_level():
    verdicts = [statistics.order(STEPS, power_law(1.0, s, 6), claimed=1.0, alpha=ALPHA).verdict for s in range(REPEATS)]
    assert verdicts.count("rival") <= most(ALPHA)


def test_steps_may_come_in_any_order():
    errors, mixed = power_law(1.0), np.random.default_rng(9).permutation(STEPS.size)
    first = statistics.order(STEPS, errors, claimed=1.0, alpha=1e-3)
    assert statistics.order(STEPS[mixed], errors[:, mixed], claimed=1.0, alpha=1e-3) == first


def test_what_is_not_asymptotic_yet_is_undecided():
    # Order 1/2 in the end, order 2 at coarse steps: local slopes fall from 2 towards 1/2 and are not there.
    for size, reason in ((2000, "does not exclude the neighbouring orders"), (4000, "not asymptotic yet")):
        errors = (np.sqrt(STEPS) + size * STEPS**2) * power_law(0.0, noise=0.01)
        found = statistics.order(STEPS, errors, claimed=0.5, alpha=1e-3)
        assert found.verdict == "undecided" and reason in found.reason, found.reason


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("correction", [0.3, -0.3, 1.0, 3.0])
@pytest.mark.parametrize("true", ORDERS[:2])
def test_however_precise_the_errors_a_true_order_with_a_correction_is_not_refuted(
    true: float, correction: float, noise: float
):
    """Errors h^q (1 + c sqrt(h)), as of strong schemes: the interval is far narrower than the bias that is left."""
    errors = (1 + correction * np.sqrt(STEPS)) * power_law(true, noise=noise)
    verdicts = {q: statistics.order(STEPS, errors, claimed=q, alpha=1e-3).verdict for q in ORDERS}
    assert verdicts == {q: "claimed" if q == true else "rival" for q in ORDERS}


def test_noise_that_hides_the_order_is_undecided():
    found = statistics.order(STEPS, power_law(1.0, 3, 5, noise=1.0), claimed=1.0, alpha=1e-3)
    assert found.verdict == "undecided" and "does not exclude the neighbouring orders" in found.reason


def gbm_errors(scheme: str, seed: int, replicates: int = 20, paths: int = 800) -> tuple[np.ndarray, np.ndarray]:
    """Root-mean-square strong errors at time 1 of dX = X / 2 (dt + dW), X_0 = 1, against the exact solution."""
    rng = np.random.default_rng(seed)
    finest = 512
    dw = rng.normal(0, math.sqrt(1 / finest), (finest, replicates, paths))
    exact = np.exp(0.375 + 0.5 * dw.sum(0))
    steps = 2.0 ** -np.arange(4, 10)
    errors = []
    for h in steps:
        count = round(1 / h)
        x = np.ones((replicates, paths))
        for d in dw.reshape(count, finest // count, replicates, paths).sum(1):
            x = x * (1 + 0.5 * h + 0.5 * d + (0.125 * (d**2 - h) if scheme == "milstein" else 0))
        errors.append(np.sqrt(np.mean((x - exact) ** 2, axis=1)))
    return steps, np.stack(errors, axis=1)


@pytest.mark.parametrize(("scheme", "true"), [("euler", 0.5), ("milstein", 1.0)])
def test_euler_and_milstein_have_their_orders_and_no_other(scheme: str, true: float):
    for seed in range(3):
        steps, errors = gbm_errors(scheme, seed)
        for claimed in ORDERS:
            found = statistics.order(steps, errors, claimed=claimed, alpha=1e-3)
            assert found.verdict == ("claimed" if claimed == true else "rival"), found.reason


@pytest.mark.parametrize(("replicates", "noise"), [(5, 0.003), (10, 0.01), (20, 0.05)])
@pytest.mark.parametrize("correction", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_order_sees_a_shift_of_its_resolution_in_two_stages(
    alpha: float, correction: float, replicates: int, noise: float
):
    """The resolution of one run, tried on two fresh ones, upwards and downwards in turn."""
    found, repeats = 0, 200

    def curve(by: float, seed: int) -> np.ndarray:
        return (1 + correction * np.sqrt(STEPS)) * STEPS**by * power_law(1.0, seed, replicates, noise)

    for s in range(repeats):
        stated = statistics.order(STEPS, curve(0.0, s), claimed=1.0, alpha=alpha).resolution
        if stated == math.inf:  # no promise; never the case but for the noisiest curves
            assert noise == 0.05
            found += 1
            continue
        shifted_curves = (curve(stated * (-1) ** s, seed * 1000 + s) for seed in (1, 2))
        verdicts = [statistics.order(STEPS, e, claimed=1.0, alpha=alpha).verdict for e in shifted_curves]
        found += verdicts == ["rival", "rival"]
    assert found >= fewest(0.9, repeats)


def test_order_states_a_useful_resolution_and_none_where_it_would_stay_undecided():
    for replicates, noise, smallest, largest in (
        (20, 0.01, 0.02, 0.15),
        (20, 0.05, 0.1, 0.6),
        (5, 1.0, math.inf, math.inf),
    ):
        found = statistics.order(STEPS, power_law(1.0, 1, replicates, noise), claimed=1.0, alpha=1e-3)
        assert smallest <= found.resolution <= largest
        assert found.resolution > found.reach


def test_order_names_what_is_wrong():
    for shape in ((4, 6), (5, 5), (6,)):
        with pytest.raises(ValueError, match=r"expected \(replicates >= 5, levels >= 4\)"):
            statistics.order(STEPS, np.ones(shape), claimed=1, alpha=ALPHA)
    with pytest.raises(FloatingPointError, match="positive and finite"):
        statistics.order(STEPS, -np.ones((5, 6)), claimed=1, alpha=ALPHA)
    with pytest.raises(ValueError, match="steps must differ"):
        statistics.order([1, 1, 2, 4], np.ones((5, 4)), claimed=1, alpha=ALPHA)


# -- paired -----------------------------------------------------------------------------------------------------------


def test_paired_interval_covers_and_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(10)
    missed, wide = 0, 0.0
    for _ in range(REPEATS):
        shared, own = 100 * rng.normal(size=6), rng.normal(size=(2, 6))
        a = statistics.paired(shared + 0.3 + own[0], shared + own[1], alpha=ALPHA)
        missed += not a.lower <= 0.3 <= a.upper
        wide = max(wide, a.upper - a.lower)
    assert missed <= most(ALPHA)
    assert wide < 20


def test_paired_agrees_with_scipy():
    x, y = np.random.default_rng(11).normal(size=(2, 9))
    ours, theirs = statistics.paired(x, y, alpha=0.01), stats.ttest_rel(x, y).confidence_interval(0.99)
    assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high), rel=1e-9)  # two routes to Student's t
    assert ours.n == 9


@pytest.mark.parametrize("n", [5, 8, 30])
@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_paired_sees_a_mean_at_its_resolution_on_fresh_seeds(alpha: float, n: int):
    rng, repeats, found, idle = np.random.default_rng(12), 1000, 0, 0
    for _ in range(repeats):
        stated = statistics.paired(rng.normal(size=n), np.zeros(n), alpha=alpha).resolution
        fresh = rng.normal(size=n)
        found += statistics.paired(fresh - stated, np.zeros(n), alpha=alpha).upper < 0
        idle += statistics.paired(fresh - stated / 4, np.zeros(n), alpha=alpha).upper < 0
    assert found >= fewest(0.9, repeats)
    assert idle <= repeats / 2  # a quarter of it is not seen


def test_paired_names_what_is_wrong():
    with pytest.raises(ValueError, match="4 pairs; a trained claim needs at least 5 seeds"):
        statistics.paired([1, 2, 3, 4], [0, 0, 0, 0], alpha=ALPHA)
    with pytest.raises(ValueError, match=r"ours has shape \(5,\), baseline \(1,\); one value a seed in each"):
        statistics.paired([1, 2, 3, 4, 5], [0], alpha=ALPHA)
