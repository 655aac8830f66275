"""Tests of stochastic claims that return evidence *and* resolution.

Each routine is exact at every sample size unless it says "asymptotic".  `resolution` is the smallest violation that
the run would have caught with probability at least 0.9, the repetition on fresh randomness that precedes every
refutation included; hence every stage is dimensioned for power `STAGE_POWER`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy import optimize, stats

STAGE_POWER = 0.955
"""Power of one stage; two independent stages give 0.91."""

REPEAT_LEVEL = 0.01
"""A p-value counts as confirmed when a fresh sample falls below this level too."""


class Evidence(NamedTuple):
    """What a statistical test found.  Exactly one of `log_e` and `p` is set."""

    statistic: float
    expected: float
    resolution: float
    n: int
    log_e: float | None = None
    p: float | None = None
    validity: str = "finite-sample"
    note: str = ""
    """What `resolution` does not say by itself: its units, or a side that cannot be seen."""


def _sample(x: object, name: str) -> np.ndarray:
    a = np.asarray(x, float).ravel()
    if a.size < 2:
        raise ValueError(f"{name} has {a.size} values; a statistical test needs at least 2")
    if not np.all(np.isfinite(a)):
        raise FloatingPointError(f"{name} has {int((~np.isfinite(a)).sum())} non-finite of {a.size} values")
    return a


def mean(x: object, expected: float, *, low: float, high: float, alpha: float, one_sided: bool = False) -> Evidence:
    """E[x] = expected for x in [low, high], by betting (Waudby-Smith and Ramdas 2024): exact at every n.

    Two gamblers bet on "above" and "below" with predictable plug-in stakes; the average of their capitals is
    an e-value.  With `one_sided` only "above" is bet on, which tests E[x] <= expected.
    Resolution is a shift of the mean, in the units of x.
    Raises ValueError if the range does not contain `expected` or a sample lies outside it.
    """
    a = _sample(x, "x")
    if not low < expected < high:
        raise ValueError(f"mean: expected {expected} must lie strictly inside [low, high] = [{low}, {high}]")
    if a.min() < low or a.max() > high:
        raise ValueError(f"mean: samples span [{a.min()}, {a.max()}], outside [low, high] = [{low}, {high}]")
    width = high - low
    y, m = (a - low) / width, (expected - low) / width
    n = y.size
    count = np.arange(1, n + 1)
    running = (0.5 + np.cumsum(y)) / (count + 1)
    variance = (0.25 + np.cumsum((y - running) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    budget = math.log((1 if one_sided else 2) / alpha)
    stake = np.sqrt(2 * budget / (n * before))
    above = np.sum(np.log1p(np.minimum(stake, 0.5 / m) * (y - m)))
    below = np.sum(np.log1p(-np.minimum(stake, 0.5 / (1 - m)) * (y - m)))
    log_e = float(above) if one_sided else float(np.logaddexp(above, below) - math.log(2))
    # With stake sqrt(2 L / n) / sigma the log capital after a shift d is about (d sqrt(n) / sigma) sqrt(2 L) - L with
    # standard deviation sqrt(2 L), and it must reach L: d = k sigma.  The shift that is hardest to see moves mass to the
    # far end of the range, which adds d w to the variance; 1.1 pays for the regularised early stakes.
    k = 1.1 * (math.sqrt(2 * budget) + float(stats.norm.ppf(STAGE_POWER))) / math.sqrt(n)
    w = max(m, 1 - m)
    resolution = width * (k * k * w + math.sqrt((k * k * w) ** 2 + 4 * k * k * float(y.var()))) / 2
    return Evidence(float(a.mean()), expected, resolution, n, log_e=log_e)


def proportion(successes: int, n: int, expected: float, *, alpha: float) -> Evidence:
    """P(success) = expected, exact two-sided binomial test.  Resolution is a shift of the probability.

    Where one side cannot be seen (the deficit of an event that is rare among n trials), the resolution is that of the
    other side and the note says so.
    """
    if not 0 < expected < 1:
        raise ValueError(f"proportion: expected is {expected}; it must lie strictly between 0 and 1")
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"proportion: {successes} successes of {n} trials is impossible")
    p = float(stats.binomtest(int(successes), int(n), expected).pvalue)
    # Acceptance region of the equal-tailed test at alpha, which contains that of the exact one up to one count.
    inner = min(alpha, REPEAT_LEVEL)
    lower, upper = stats.binom.ppf(inner / 2, n, expected) - 1, stats.binom.isf(inner / 2, n, expected) + 1

    def missed_above(q: float) -> float:
        return stats.binom.cdf(upper, n, q) - (1 - STAGE_POWER)

    def missed_below(q: float) -> float:
        return stats.binom.sf(lower - 1, n, q) - (1 - STAGE_POWER)

    up = optimize.brentq(missed_above, expected, 1 - 1e-12) - expected if missed_above(1 - 1e-12) < 0 else math.inf
    down = expected - optimize.brentq(missed_below, 1e-15, expected) if missed_below(1e-15) < 0 else math.inf
    # Rare events: a deficit may be invisible at any size while an excess is not; the resolution names what can be seen.
    resolution = max(s for s in (up, down) if math.isfinite(s)) if min(up, down) < math.inf else math.inf
    note = ""
    if math.isfinite(resolution) and not (math.isfinite(up) and math.isfinite(down)):
        side, other = ("above", "below") if math.isfinite(down) else ("below", "above")
        note = f"a probability {side} {expected:g} cannot be told apart at any size with n = {n}; the resolution is for {other}"
    return Evidence(successes / n, expected, float(resolution), n, p=p, note=note)


def law(x: object, cdf: Callable[[np.ndarray], np.ndarray], *, alpha: float) -> Evidence:
    """x has the continuous distribution function `cdf`, by the Dvoretzky-Kiefer-Wolfowitz-Massart bound.

    Statistic and resolution are sup-distances between distribution functions.
    """
    a = np.sort(_sample(x, "x"))
    n = a.size
    u = np.asarray(cdf(a), float)
    if np.any((u < -1e-12) | (u > 1 + 1e-12)) or np.any(~np.isfinite(u)):
        raise ValueError("law: cdf returned values outside [0, 1]")
    k = np.arange(1, n + 1)
    distance = float(max(np.max(k / n - u), np.max(u - (k - 1) / n)))
    p = min(1.0, 2 * math.exp(-2 * n * distance**2))
    return Evidence(distance, 0.0, _dkw_resolution(n, alpha), n, p=p)


def _dkw_resolution(n: float, alpha: float) -> float:
    # Triangle inequality: seen whenever the true distance exceeds threshold + fluctuation.  At the point of greatest
    # distance the fluctuation is one binomial, at most N(0, 1/4n).
    threshold = math.sqrt(math.log(2 / min(alpha, REPEAT_LEVEL)) / (2 * n))
    return threshold + float(stats.norm.ppf(STAGE_POWER)) / (2 * math.sqrt(n))


def same_law(x: object, y: object, *, key: jax.Array, alpha: float) -> Evidence:
    """x and y (n, d) have the same distribution, by betting on a learned witness function: exact at every level.

    The first half of the samples learns where x and y differ (an MMD witness with Gaussian kernels of five
    widths, squashed to [-1, 1]); the second half bets that the witness has the same mean under both.  A
    permutation test, the usual choice, has no p-value below 1/(B+1) and would need millions of permutations at the
    levels of a shared false-alarm budget.  Statistic and resolution are half the difference of the mean of that witness
    between the two laws, a number in [-1, 1]: the power 0.9 is for laws that the learned witness separates by so much, and
    says nothing of laws that it does not separate, however different they are.
    """
    a, b = _points(x, "x"), _points(y, "y")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"same_law: x has {a.shape[1]} columns, y has {b.shape[1]}")
    n = min(len(a), len(b))
    order = np.asarray(jax.random.permutation(key, n))
    a, b = a[order], b[order]
    half = n // 2
    learn_a, learn_b = a[: min(half, 500)], b[: min(half, 500)]
    joint = np.concatenate([learn_a, learn_b])
    widths = np.median(np.abs(joint - np.median(joint, axis=0)), axis=0)
    # Where more than half of the values are tied the median deviation is 0; a constant column has no width at all.
    widths = np.where(widths > 0, widths, joint.std(axis=0))
    widths = np.where(widths > 0, widths, 1.0)
    scaled = (joint / widths, a[half:] / widths, b[half:] / widths)
    sign = np.concatenate([np.full(len(learn_a), 1 / len(learn_a)), np.full(len(learn_b), -1 / len(learn_b))])

    def witness(points: np.ndarray) -> np.ndarray:
        d2 = np.sum(points**2, 1)[:, None] + np.sum(scaled[0] ** 2, 1)[None] - 2 * points @ scaled[0].T
        d2 = np.maximum(d2, 0) / a.shape[1]
        return sum(np.exp(-d2 / (2 * s * s)) @ sign for s in (0.25, 0.5, 1.0, 2.0, 4.0))

    fa, fb = witness(scaled[1]), witness(scaled[2])
    reference = witness(scaled[0])
    spread = 3 * float(reference.std()) + 1e-300
    centre = float(reference.mean())
    difference = (np.tanh((fa - centre) / spread) - np.tanh((fb - centre) / spread)) / 2
    found = mean(difference, 0.0, low=-1.0, high=1.0, alpha=alpha)
    units = "half the difference of the mean of a learned witness in [-1, 1]"
    return found._replace(n=n, note=f"statistic and resolution are {units}")


def _points(x: object, name: str) -> np.ndarray:
    a = np.asarray(x, float)
    a = a[:, None] if a.ndim == 1 else a
    if a.ndim != 2 or len(a) < 8:
        raise ValueError(f"same_law: {name} has shape {np.asarray(x).shape}; expected (n,) or (n, d) with n at least 8")
    if not np.all(np.isfinite(a)):
        raise FloatingPointError(f"same_law: {name} has non-finite values")
    return a


NOT_ASYMPTOTIC = 0.25
"""Half width and drift of the local slopes, half the distance of neighbouring orders: above it a curve that moves towards
the claimed order is undecided instead of rejected."""


class Slope(NamedTuple):
    """The order of convergence seen in errors on a grid of steps."""

    order: float
    half_width: float
    drift: float
    reach: float
    """How far from `order` the asymptotic order may lie: half width and what the drift may still add."""
    resolution: float
    """Smallest d such that errors multiplied by steps^d or steps^-d, on fresh randomness, are rejected with probability
    0.9, the repetition included; infinite where such errors would still pass for not asymptotic."""
    local: tuple[float, ...]
    verdict: str
    """ "claimed", "rival" (a neighbouring order fits and the claimed one does not) or "undecided"."""
    reason: str


def order(
    steps: Sequence[float], errors: object, *, claimed: float, alpha: float, rivals: Sequence[float] | None = None
) -> Slope:
    """Choose between a claimed order of convergence and its neighbours.

    errors: (replicates, levels) positive errors, independent replicates of the whole curve, at the steps
        of the same length.  At least 5 replicates and 4 levels.
    The estimate is the local slope on the finest levels.  Its interval is Student's t at level `alpha` widened by
    what is left of the drift (from the last change of the local slopes), because steps are not yet asymptotic and a bare
    confidence interval refutes true orders.  The claimed order is accepted if the interval contains it and excludes the
    rivals (default: claimed +- 1/2); rejected if it excludes the claimed order, unless the local slopes change fast and
    move towards the claimed order.
    """
    e = np.asarray(errors, float)
    h = np.asarray(steps, float)
    if e.ndim != 2 or e.shape[1] != h.size or e.shape[0] < 5 or h.size < 4:
        raise ValueError(
            f"order: errors have shape {e.shape} for {h.size} steps; expected (replicates >= 5, levels >= 4) with one "
            "column a step"
        )
    if np.any(~np.isfinite(e)) or np.any(e <= 0) or np.any(h <= 0):
        raise FloatingPointError("order: errors and steps must be positive and finite")
    if np.unique(h).size != h.size:
        raise ValueError(f"order: steps must differ; they are {h.tolist()}")
    rivals = (claimed - 0.5, claimed + 0.5) if rivals is None else tuple(rivals)
    fine_first = np.argsort(h)
    log_h, log_e = np.log(h[fine_first]), np.log(e[:, fine_first])
    local = np.diff(log_e, axis=1) / np.diff(log_h)  # finest first
    finest = local[:, :2].mean(1)
    centre = float(finest.mean())
    replicates = len(e)
    half = float(stats.t.isf(alpha / 2, replicates - 1) * finest.std(ddof=1) / math.sqrt(replicates))
    averages = local.mean(0)
    changes = (local[:, 0] - local[:, 2]) / 2
    drift = float(abs(changes.mean()))
    uncertain = drift + 2 * float(changes.std(ddof=1)) / math.sqrt(replicates)
    # Strong errors of order q are h^q (c + O(sqrt h)): a bias that shrinks by sqrt(ratio) a level has 1 / (sqrt(ratio) - 1)
    # of its last change still to go.  Half as much again, for the terms beyond the first.
    ratio = float(np.exp(np.min(np.diff(log_h))))
    reach = half + 1.5 * uncertain / (math.sqrt(ratio) - 1)
    resolution = _order_resolution(abs(centre - claimed), reach, half, drift, finest, changes, float(ratio))
    contains = abs(centre - claimed) <= reach
    excluded = all(abs(centre - r) > reach for r in rivals)
    approaching = abs(averages[0] - claimed) < abs(averages[-1] - claimed) - 1e-12
    shown = tuple(float(a) for a in averages)
    words = f"order {centre:.3f} +- {half:.3f} (drift {drift:.3f}), local slopes {', '.join(f'{a:.2f}' for a in shown)}"
    found = functools.partial(Slope, centre, half, drift, reach, resolution, shown)
    if contains and excluded:
        return found("claimed", words)
    if contains:
        return found("undecided", f"{words}: does not exclude the neighbouring orders")
    if approaching and half + 2 * drift > NOT_ASYMPTOTIC:
        return found("undecided", f"{words}: not asymptotic yet")
    return found("rival", f"{words}: excludes {claimed:g}")


def _order_resolution(
    off: float, reach: float, half: float, drift: float, finest: np.ndarray, changes: np.ndarray, ratio: float
) -> float:
    """Shift of the order that a fresh set of replicates would show: past `reach`, from where the curve stands now.

    Beyond `off` and `reach` themselves the shift must cover how much this run and a fresh one differ: in the centre, in the
    half width and standard error (whose ratio squared is an F variable), and in the drift.  Independent parts add in
    squares.
    """
    n = len(finest)
    z = math.sqrt(2) * float(stats.t.isf(1 - STAGE_POWER, n - 1))
    wider = math.sqrt(float(stats.f.isf(1 - STAGE_POWER, n - 1, n - 1))) - 1
    per_drift = 1.5 / (math.sqrt(ratio) - 1)
    error, of_change = finest.std(ddof=1) / math.sqrt(n), changes.std(ddof=1) / math.sqrt(n)
    widths = wider * half + per_drift * 2 * wider * of_change
    spread = math.sqrt((z * error) ** 2 + widths**2 + (per_drift * z * of_change) ** 2)
    if (1 + wider) * (half + 2 * z * of_change) + 2 * drift > NOT_ASYMPTOTIC:
        return math.inf
    return float(off + reach + spread)


class Advantage(NamedTuple):
    """Paired comparison over seeds: mean difference with its interval."""

    mean: float
    lower: float
    upper: float
    resolution: float
    """Smallest distance of the true mean from a stated value that fresh seeds would put outside their interval with
    probability 0.9; asymptotic, as the interval is."""
    n: int


def paired(ours: Sequence[float], baseline: Sequence[float], *, alpha: float) -> Advantage:
    """Interval of the mean of ours - baseline, paired by seed (Student's t at level alpha: asymptotic)."""
    if np.shape(ours) != np.shape(baseline):
        raise ValueError(
            f"paired: ours has shape {np.shape(ours)}, baseline {np.shape(baseline)}; one value a seed in each"
        )
    d = np.asarray(ours, float) - np.asarray(baseline, float)
    if d.ndim != 1 or d.size < 5:
        raise ValueError(f"paired: {d.size} pairs; a trained claim needs at least 5 seeds")
    if not np.all(np.isfinite(d)):
        raise FloatingPointError("paired: a run ended with a non-finite figure")
    half = float(stats.t.isf(alpha / 2, d.size - 1) * d.std(ddof=1) / math.sqrt(d.size))
    # As far as the interval reaches, more where fresh seeds vary more than these (ratio of variances: F), and their noise.
    wider = math.sqrt(float(stats.f.isf(1 - STAGE_POWER, d.size - 1, d.size - 1))) - 1
    noise = float(stats.t.isf(1 - STAGE_POWER, d.size - 1) * d.std(ddof=1) / math.sqrt(d.size))
    resolution = half + math.hypot(wider * half, noise)
    return Advantage(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, resolution, int(d.size))
