"""One statistical test for many figures: each has a known value as its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from paper_checks.harness import statistics
from paper_checks.harness.claim import Outcome

ROUNDING = 1e-9
"""For figures computed in 64 bits from numbers below 10^4: a standard error below this is one of rounding."""

QUICK_TO_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""For programs that are large for the little that they compute: most of the time would go into compiling them well."""

SHOWN = 12
"""Figures written out in the note of an outcome."""


class Figure(NamedTuple):
    """What the draws of one figure say; one unit is max(1, |exact|).

    error       standard error of the mean
    off         |mean - exact| in units
    log_e, p    evidence against the mean being exact: the first if there are limits, else the second
    resolution  in units
    """

    name: str
    mean: float
    exact: float
    error: float
    off: float
    log_e: float
    p: float
    resolution: float


def figure(name: str, x: np.ndarray, exact: float, alpha: float, limits: tuple[float, float] | None) -> Figure:
    """Test n draws x (n,) of one figure at the level alpha, which is that of this test alone.

    limits: no draw is ever outside; a betting test then, exact at every n, else a z-test.  Raises FloatingPointError if a
    draw is not finite.
    """
    if not np.all(np.isfinite(x)):
        raise FloatingPointError(f"{name}: {int((~np.isfinite(x)).sum())} of {x.size} draws are not finite")
    unit = max(1.0, abs(exact))
    off, error = abs(float(x.mean()) - exact) / unit, float(x.std(ddof=1) / math.sqrt(x.size)) / unit
    log_e, p = 0.0, 1.0
    if limits is not None:
        found = statistics.mean(x, exact, low=limits[0], high=limits[1], alpha=alpha)
        assert found.log_e is not None
        log_e, resolution = found.log_e, found.resolution / unit
    else:
        p = float(2 * stats.norm.sf(off / max(error, ROUNDING)))
        reach = stats.norm.isf(min(alpha, statistics.REPEAT_LEVEL) / 2) + stats.norm.ppf(statistics.STAGE_POWER)
        resolution = float(reach) * max(error, ROUNDING)
    return Figure(name, float(x.mean()), exact, error * unit, off, log_e, p, resolution)


def joined(figures: Sequence[Figure], n: int, *, bounded: bool) -> Outcome:
    """The outcome of all figures, n draws in all.

    If all were tested within limits (bounded) the evidence is the average of their e-values, exact at every n; otherwise
    the smallest p-value times their number, asymptotic.
    """
    worst = max(figures, key=(lambda f: f.log_e) if bounded else (lambda f: f.off / max(f.error, ROUNDING)))
    log_e = float(np.logaddexp.reduce([f.log_e for f in figures])) - math.log(len(figures))
    return Outcome(
        margin=-worst.off,
        n=n,
        log_e=log_e if bounded else None,
        p=None if bounded else min(1.0, min(f.p for f in figures) * len(figures)),
        resolution=max(f.resolution for f in figures),
        validity="finite-sample" if bounded else "asymptotic",
        our_value=worst.mean,
        paper_value=worst.exact,
        witness={"figure": worst.name, "mean": worst.mean, "exact": worst.exact, "standard error": worst.error},
        note="; ".join(f"{f.name}: {f.mean:.4g} ± {f.error:.2g} (exact {f.exact:.4g})" for f in figures[:SHOWN])
        + (f"; and {len(figures) - SHOWN} more" if len(figures) > SHOWN else ""),
        figure={
            "title": "Mean less exact value",
            "x_label": "figure",
            "y_label": "standard errors",
            "x_scale": "linear",
            "y_scale": "linear",
            "lines": [
                {
                    "label": "figures",
                    "x": list(range(1, len(figures) + 1)),
                    "y": [float(np.clip((f.mean - f.exact) / max(f.error, ROUNDING), -50, 50)) for f in figures],
                    "style": "points",
                }
            ],
            "hlines": [{"label": "unbiased", "y": 0.0}],
            "bars": None,
        },
    )
