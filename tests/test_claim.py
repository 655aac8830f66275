"""Claims say what they are at registration, and `decide` follows its table."""

from __future__ import annotations

import math
from typing import Any

import jax
import planted
import pytest

from paper_checks.harness.claim import Claim, ClaimError, Outcome, Verdict, decide, not_checkable, stream
from paper_checks.harness.context import Context


def check(ctx: Any) -> Outcome:
    return Outcome(margin=float(ctx.pick(1, wrong=-1)))


def test_a_claim_knows_its_items_and_its_stream():
    c = planted.plant(check, "bound", repairs={"mended": "a right constant"}, expect="refuted")
    assert c.id == "planted:P1"
    assert c.items() == [("claim", None), ("control", "wrong"), ("repair", "mended")]
    assert c.checkable and not c.on_ledger
    assert (
        stream(c.id)
        == stream(planted.plant(check, "exact").id)
        != stream(planted.plant(check, "bound", number="P2").id)
    )
    assert 0 <= stream(c.id) < 2**32
    assert [planted.plant(check, kind).on_ledger for kind in ("statistical", "rate", "trained", "bound")] == [
        *(True, True, True, False)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"controls": {}}, "has no negative control; name at least one falsified version"),
        ({"kind": "guess"}, "kind is 'guess'; expected one of symbolic, exact, bound, statistical, rate, trained"),
        ({"budget": "huge"}, "budget is 'huge'; expected one of quick, standard, deep"),
        ({"expect": "false"}, "expect is 'false'; expected 'holds' or 'refuted'"),
        ({"expect": "refuted"}, r"recorded as false \(expect='refuted'\) without a repair"),
        ({"repairs": {"wrong": "right"}}, r"\['wrong'\] named both as control and as repair"),
        ({"needs": ["gpu", "genjx"]}, r"needs 'genjx'; expected one of gpu, .* \(nearest: genjax\)"),
        ({"needs": ["neural-tangents"]}, r"\(nearest: neural_tangents\)"),
        ({"kind": "statistical", "resolution": None}, "a statistical claim must say what it has to see"),
        ({"kind": "statistical", "resolution": 0.0}, "resolution is 0.0 for kind 'statistical'; expected a positive"),
        ({"kind": "rate", "resolution": math.nan}, "resolution is nan for kind 'rate'; expected a positive number"),
        (
            {"kind": "bound", "resolution": 0.1},
            "resolution is 0.1 for kind 'bound'; expected .* statistical, rate, trained",
        ),
    ],
)
def test_registration_refuses(fields: dict[str, Any], message: str):
    with pytest.raises(ClaimError, match=f"claim planted:P1.*{message}"):
        planted.plant(check, **{"kind": "bound", **fields})


def test_a_claim_that_cannot_be_checked_needs_a_reason():
    fields: dict[str, Any] = {"title": "t", "kind": "trained", "source": "s"}
    with pytest.raises(ClaimError, match="planted:P1: not_checkable needs a reason"):
        not_checkable(planted.PAPER, "P1", "statement", reason="  ", **fields)
    c = not_checkable(planted.PAPER, "P1", "statement", reason="needs the paper's data", **fields)
    assert not c.checkable and not c.on_ledger
    assert c.items() == [("claim", None)]


# -- decisions --------------------------------------------------------------------------------------------------------

ALPHA = 0.01
THRESHOLD = math.log(1 / ALPHA)


def decided(kind: str, **measured: Any) -> Verdict:
    return decide(planted.plant(check, kind), Outcome(**measured), ALPHA)[0]


@pytest.mark.parametrize(
    ("kind", "accepted", "rejected"),
    [
        ("bound", Verdict.HOLDS, Verdict.REFUTED),
        ("exact", Verdict.HOLDS, Verdict.REFUTED),
        ("symbolic", Verdict.HOLDS, Verdict.REFUTED),
        ("rate", Verdict.CONSISTENT, Verdict.REFUTED),
        ("trained", Verdict.REPRODUCED, Verdict.NOT_REPRODUCED),
    ],
)
def test_the_margin_decides(kind: str, accepted: Verdict, rejected: Verdict):
    for margin, tolerance, verdict in [
        (1.0, 0.0, accepted),
        (0.0, 0.0, accepted),
        (-1e-9, 1e-9, accepted),  # at the allowance, not below it
        (-1.01e-9, 1e-9, rejected),
        (-1.0, 0.0, rejected),
    ]:
        assert decided(kind, margin=margin, tolerance=tolerance) is verdict
    assert decided(kind, margin=1.0, undecided="too coarse") is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("kind", ["bound", "exact", "symbolic", "rate", "trained", "statistical"])
@pytest.mark.parametrize(
    "bad", [{"margin": math.nan}, {"margin": math.inf}, {"margin": 1.0, "tolerance": math.nan}], ids=str
)
def test_a_number_that_is_not_finite_is_an_error(kind: str, bad: dict[str, float]):
    evidence = {"log_e": 0.0, "resolution": 0.1} if kind == "statistical" else {}
    verdict, reason = decide(planted.plant(check, kind), Outcome(**evidence, **bad, witness=list(range(999))), ALPHA)
    assert verdict is Verdict.ERROR
    # The witness is shown, as far as it fits a line.
    assert "not finite at the input [0, 1, 2, 3" in reason and len(reason) < 300


def test_only_a_symbolic_check_with_a_proof_proves():
    assert decided("symbolic", margin=0.0, validity="proof") is Verdict.PROVED
    assert decided("symbolic", margin=-1.0, validity="proof") is Verdict.REFUTED
    assert decided("bound", margin=0.0, validity="proof") is Verdict.HOLDS


@pytest.mark.parametrize(
    ("measured", "asked", "verdict"),
    [
        ({"log_e": THRESHOLD + 1e-9, "resolution": 0.1}, None, Verdict.REFUTED),
        ({"log_e": THRESHOLD - 1e-9, "resolution": 0.1}, None, Verdict.CONSISTENT),
        ({"log_e": math.inf, "resolution": 0.1}, None, Verdict.REFUTED),
        ({"p": ALPHA, "resolution": 0.1}, None, Verdict.CONSISTENT),
        ({"p": ALPHA * 0.999, "resolution": 0.1}, None, Verdict.REFUTED),
        ({"p": 0.0, "resolution": 0.1}, None, Verdict.REFUTED),
        ({"p": 0.5, "resolution": 0.1}, 0.1, Verdict.CONSISTENT),
        ({"p": 0.5, "resolution": 0.1}, 0.09, Verdict.INCONCLUSIVE),
        ({"p": 0.0, "resolution": 0.1}, 0.09, Verdict.REFUTED),
        ({"p": 0.5}, None, Verdict.ERROR),
        ({"p": 0.5, "resolution": math.nan}, None, Verdict.ERROR),
        ({"p": 0.5, "resolution": math.inf}, None, Verdict.INCONCLUSIVE),
        ({"log_e": math.nan, "resolution": 0.1}, None, Verdict.ERROR),
        ({"p": math.nan, "resolution": 0.1}, None, Verdict.ERROR),
        ({"resolution": 0.1}, None, Verdict.ERROR),
    ],
    ids=str,
)
def test_evidence_decides_statistical_claims(measured: dict[str, float], asked: float | None, verdict: Verdict):
    # The margin of a statistical check is a distance, which never decides.
    fields = {k: v for k, v in measured.items() if k != "resolution"}
    outcome = Outcome(margin=-0.3, resolution=measured.get("resolution"), **fields)
    assert decide(planted.plant(check, "statistical", resolution=asked or 1.0), outcome, ALPHA)[0] is verdict


@pytest.mark.parametrize(("kind", "accepted"), [("rate", Verdict.CONSISTENT), ("trained", Verdict.REPRODUCED)])
def test_a_resolution_asked_of_rates_and_trained_claims_is_asked_for(kind: str, accepted: Verdict):
    c = planted.plant(check, kind, resolution=0.1)
    for stated, verdict in ((0.1, accepted), (0.11, Verdict.INCONCLUSIVE), (math.inf, Verdict.INCONCLUSIVE)):
        assert decide(c, Outcome(margin=1.0, resolution=stated), ALPHA)[0] is verdict
    assert decide(c, Outcome(margin=1.0), ALPHA)[0] is Verdict.ERROR
    # What is seen needs no resolution.
    assert decide(c, Outcome(margin=-1.0), ALPHA)[0] not in (accepted, Verdict.ERROR)


@pytest.mark.parametrize("kind", ["bound", "exact", "symbolic", "rate", "trained"])
@pytest.mark.parametrize("evidence", [{"p": 1e-30}, {"log_e": 100.0}], ids=str)
def test_evidence_that_would_not_decide_is_an_error(kind: str, evidence: dict[str, float]):
    verdict, reason = decide(planted.plant(check, kind), Outcome(margin=1.0, **evidence), ALPHA)
    assert verdict is Verdict.ERROR
    assert f"does not decide a claim of kind '{kind}'" in reason


def test_evidence_given_twice_is_an_error():
    verdict, reason = decide(planted.plant(check, "statistical"), Outcome(1.0, p=0.5, log_e=0.0, resolution=0.1), ALPHA)
    assert (verdict, "evidence is given twice" in reason) == (Verdict.ERROR, True)


# -- what a check receives --------------------------------------------------------------------------------------------


def context(c: Claim, **fields: Any) -> Context:
    keys = {"key": jax.random.key(0), "paper_key": jax.random.key(1)}
    return Context(c, **{**keys, "budget": "quick", "alpha": ALPHA, **fields})


def test_pick_gives_the_papers_value_or_the_falsified_one_and_remembers_what_was_asked():
    c = planted.plant(check, "bound", controls={"low": "", "high": ""}, repairs={"mended": ""})
    own = context(c)
    assert own.pick(1.0, low=0.5, high=2.0) == 1.0
    assert own.picked == {"low", "high"}
    assert context(c, control="high").pick(1.0, low=0.5, high=2.0) == 2.0
    assert context(c, control="high").pick(1.0, low=0.5) == 1.0
    assert context(c, control="mended").pick(1.0, low=0.5, mended=3.0) == 3.0
    with pytest.raises(
        ClaimError, match=r"ctx.pick names \['hihg'\], which are no controls: \['high', 'low', 'mended'\]"
    ):
        own.pick(1.0, hihg=2.0)


@pytest.mark.parametrize(("budget", "factor"), [("quick", 1), ("standard", 8), ("deep", 64)])
def test_sample_sizes_grow_with_the_budget(budget: str, factor: int):
    assert context(planted.plant(check, "bound"), budget=budget).n(100) == 100 * factor


def test_cases_report_the_worst_by_name():
    ctx = context(planted.plant(check, "bound"))
    found = ctx.cases({"easy": 2.0, "hard": -0.5, "tight": 0.0})
    assert (found.margin, found.n, found.witness) == (-0.5, 3, {"case": "hard", "slack": -0.5})
    assert found.counterexample is not None and "hard" in found.counterexample
    assert ctx.cases({"tight": -1e-12}, tolerance=1e-9, tolerance_reason="rounding").counterexample is None
    with pytest.raises(ClaimError, match="at least one case"):
        ctx.cases({})
    with pytest.raises(ClaimError, match=r"planted:P1: ctx\.cases has the tolerance 1e-09 without a tolerance_reason"):
        ctx.cases({"tight": 1.0}, tolerance=1e-9)
    with pytest.raises(FloatingPointError, match="slack is NaN in the case 'odd'"):
        ctx.cases({"fine": 1.0, "odd": math.nan})


@pytest.mark.parametrize(("kind", "validity"), [("exact", "exact"), ("bound", "searched"), ("trained", "searched")])
def test_cases_are_called_exact_only_where_nothing_is_sampled(kind: str, validity: str):
    ctx = context(planted.plant(check, kind))
    assert ctx.cases({"only": 1.0}).validity == validity
    assert ctx.cases({"only": 1.0}, validity="exact").validity == "exact"


def test_code_repeats_a_run_with_its_budget_and_seed():
    c = planted.plant(check, "bound", repairs={"mended": ""})
    plain = context(c).cases({"hard": -1.0}).counterexample
    assert plain is not None and "replay('planted:P1', witness)" in plain and "witness = {'case': 'hard'}" in plain
    far = context(c, control="wrong", budget="deep", seed=7).cases({"hard": -1.0}).counterexample
    assert far is not None and "replay('planted:P1', witness, control='wrong', budget='deep', seed=7)" in far
    for control, found in ((None, ".runs[0]"), ("wrong", ".controls['wrong']"), ("mended", ".runs[2]")):
        code = context(c, control=control, seed=3).run_code()
        assert "run('planted:P1', budget='quick', seed=3, suite_alpha=0.01)" in code and f"result{found}\n" in code


def test_equal_measures_the_absolute_difference(x64: None):
    def difference(x: Any, c: Any) -> Any:
        return c - 1 + 0 * x[0]

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (2,))

    for constant in (0.9, 1.1):
        found = context(planted.plant(check, "exact")).equal(
            difference, draw, constants=(constant,), tolerance=(1e-9, "r")
        )
        assert found.margin == pytest.approx(-0.1, rel=1e-12)
        assert (found.tolerance, found.tolerance_reason, found.tightness) == (1e-9, "r", None)
        assert found.validity == "searched"


@pytest.mark.parametrize(
    ("shift", "verdict"), [(1.0, Verdict.REPRODUCED), (-1.0, Verdict.NOT_REPRODUCED), (0.0, Verdict.INCONCLUSIVE)]
)
def test_better_needs_the_whole_interval(shift: float, verdict: Verdict):
    noise = [0.1, -0.1, 0.05, -0.05, 0.0, 0.02]
    outcome = context(planted.plant(check, "trained")).better([shift + 0.2 + v for v in noise], [0.2] * 6)
    assert decide(planted.plant(check, "trained"), outcome, ALPHA)[0] is verdict


def test_better_by_a_stated_amount():
    ours = [1.0, 1.1, 0.9, 1.05, 0.95]
    for by, verdict in ((0.5, Verdict.REPRODUCED), (1.5, Verdict.NOT_REPRODUCED), (1.0, Verdict.INCONCLUSIVE)):
        outcome = context(planted.plant(check, "trained")).better(ours, [0.0] * 5, by=by)
        assert decide(planted.plant(check, "trained"), outcome, ALPHA)[0] is verdict


def test_at_most_states_its_slack():
    found = context(planted.plant(check, "statistical")).at_most([0.1, 0.3] * 50, 0.5, low=0, high=1)
    assert found.margin == pytest.approx(0.3)
    assert found.tightness == pytest.approx(0.4)
    assert found.log_e is not None and found.log_e < 0
