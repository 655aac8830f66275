"""Symbolic proofs: identities are proved, falsehoods refuted with a size, and evidence is not called a proof."""

from __future__ import annotations

from typing import Any

import planted
import pytest
import sympy as sp

from paper_checks.harness import proof
from paper_checks.harness.claim import Verdict
from paper_checks.harness.runner import Settings, run_claim, run_item

x, y = sp.symbols("x y", positive=True)
r = sp.Symbol("r", real=True)
n = sp.Symbol("n", integer=True, positive=True)


@pytest.mark.parametrize(
    "residual",
    [
        (x + y) ** 3 - (x**3 + 3 * x**2 * y + 3 * x * y**2 + y**3),
        1 / x - 1 / (x + 1) - 1 / (x * (x + 1)),
        (x**5 - 1) / (x - 1) - (x**4 + x**3 + x**2 + x + 1),
        n * (n + 1) * (2 * n + 1) / 6 - sp.summation(y**0 * sp.Symbol("k") ** 2, (sp.Symbol("k"), 1, n)),
        sp.sin(r) ** 2 + sp.cos(r) ** 2 - 1,
        sp.log(x * y) - sp.log(x) - sp.log(y),
        sp.gamma(x + 1) / sp.gamma(x) - x,
        sp.Integer(0),
        0,
    ],
    ids=str,
)
def test_identities_are_proved(residual: Any):
    assert proof.vanishes(residual) == proof.Residual(True, True, "0", 0.0)


@pytest.mark.parametrize(
    "residual",
    [
        (x + y) ** 2 - x**2 - y**2,
        sp.Rational(101, 100) * x - x,
        sp.log(x + y) - sp.log(x) - sp.log(y),
        sp.sqrt(r**2) - r,  # false for negative r only
        sp.log(r**2) - 2 * sp.log(r),  # the logarithm of a negative number is complex
        1 / (n - 5) - 1 / (n - 4),  # infinite at a point that may well be drawn
        sp.Integer(-3),
    ],
    ids=str,
)
def test_false_identities_are_refuted_with_their_size(residual: Any):
    found = proof.vanishes(residual)
    assert not found.zero
    assert found.size > 1e-6
    assert sp.sympify(found.shown) != 0


@pytest.mark.parametrize(
    "tiny",
    [sp.Rational(1, 10**45), x * sp.Rational(1, 10**60), x * sp.exp(-300), sp.Rational(1, 10**400)],
    ids=["constant", "rational", "exponential", "below every double"],
)
def test_a_tiny_residual_is_not_zero(tiny: Any):
    found = proof.vanishes(tiny)
    assert not found.zero and found.size > 0
    assert not proof.vanishes(x * y + tiny - y * x).zero


STALLED = (
    # Equal for positive x and y; simplification does not denest the root, nor know the duplication formula.
    sp.sqrt(x + y + 2 * sp.sqrt(x * y)) - sp.sqrt(x) - sp.sqrt(y),
    sp.polygamma(0, 2 * x) - (sp.polygamma(0, x) + sp.polygamma(0, x + sp.Rational(1, 2))) / 2 - sp.log(2),
)


@pytest.mark.parametrize("residual", STALLED, ids=["nested root", "duplication formula"])
def test_what_simplification_cannot_do_is_evidence_only(residual: Any):
    found = proof.vanishes(residual)
    assert found.zero and not found.proved
    assert not proof.vanishes(residual + sp.Rational(1, 10**30) * residual.args[0]).zero


@pytest.mark.parametrize("residual", [sp.nan, sp.zoo, sp.Function("f")(x) - x], ids=str)
def test_an_expression_without_values_is_an_error(residual: Any):
    with pytest.raises(FloatingPointError, match="finite at none of 20 random points"):
        proof.vanishes(residual)


def test_of_several_residuals_the_first_false_one_is_shown_and_one_without_proof_spoils_the_proof():
    assert proof.all_vanish([0, x - x]).proved
    assert proof.all_vanish([x - y, 1]).shown == "x - y"
    assert proof.all_vanish([0, STALLED[0]])[:2] == (True, False)


def test_verdicts_distinguish_proof_evidence_and_refutation():
    def check(ctx: Any) -> Any:
        return ctx.proved((x + y) ** 2 - x**2 - y**2 - ctx.pick(2, wrong=sp.Rational(199, 100)) * x * y)

    result = run_claim(planted.plant(check, "symbolic"), Settings())
    assert (result.verdict, result.ok) == (Verdict.PROVED, True)
    wrong = result.controls["wrong"]
    assert wrong.verdict is Verdict.REFUTED and wrong.outcome is not None
    assert wrong.outcome.margin < 0
    assert wrong.outcome.witness == {"residual": "x*y/100"}
    assert result.outcome is not None and result.outcome.note == "1 residuals reduced to zero"
    assert wrong.outcome.note == "a residual is not zero"

    evidence = planted.plant(lambda ctx: ctx.proved(STALLED[0] + ctx.pick(0, wrong=x)), "symbolic")
    assert run_item(evidence, "claim", None, Settings()).verdict is Verdict.HOLDS
    assert run_claim(evidence, Settings()).ok
    found = run_item(evidence, "claim", None, Settings()).outcome
    assert found is not None and found.validity == "searched"
    assert found.note == "1 residuals vanish at all points tried, which is no proof"


def test_no_residual_proves_nothing():
    result = run_claim(planted.plant(lambda ctx: (ctx.pick(0, wrong=1), ctx.proved())[1], "symbolic"), Settings())
    assert result.verdict is Verdict.ERROR and "ctx.proved needs at least one residual" in result.reason
