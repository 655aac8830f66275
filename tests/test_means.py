"""The test of many means that share one verdict.  Draws are fixed grids, so that nothing here is random."""

import math

import numpy as np
import pytest
from scipy import stats

from paper_checks.harness import means

NORMAL = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)  # mean 0, variance 1
UNIFORM = (np.arange(20_000) + 0.5) / 10_000 - 1  # in [-1, 1]
BADLY_ORDERED = np.random.default_rng(0).permutation(UNIFORM)  # betting looks at draws one after the other


def test_a_right_mean_is_not_evidence_and_a_wrong_one_is():
    right, wrong = (means.figure("x", NORMAL, exact, 1e-3, None) for exact in (0.0, 0.1))
    assert right.p > 0.9 and wrong.p < 1e-30
    assert wrong.off == pytest.approx(0.1) and right.error == pytest.approx(1 / math.sqrt(20_000), rel=1e-2)


def test_within_limits_the_evidence_is_betting():
    right, wrong = (means.figure("x", BADLY_ORDERED, exact, 1e-3, (-1.0, 1.0)) for exact in (0.0, 0.1))
    assert right.log_e < math.log(1e3) < wrong.log_e
    assert right.p == wrong.p == 1.0


def test_units_grow_with_the_figure():
    assert means.figure("x", NORMAL + 100, 101.0, 1e-3, None).off == pytest.approx(1 / 101)


def test_one_wrong_figure_decides_and_is_the_witness():
    figures = [means.figure(name, NORMAL, exact, 1e-3, None) for name, exact in (("a", 0.0), ("b", 0.2), ("c", 0.0))]
    found = means.joined(figures, 60_000, bounded=False)
    assert found.witness["figure"] == "b" and found.margin == pytest.approx(-0.2)
    assert found.p < 1e-30 and found.log_e is None and found.validity == "asymptotic"
    fine = means.joined([figures[0], figures[2]], 40_000, bounded=False)
    assert fine.p == 1.0


def test_draws_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="x: 1 of 20000"):
        means.figure("x", np.where(NORMAL[5] == NORMAL, np.nan, NORMAL), 0.0, 1e-3, None)
