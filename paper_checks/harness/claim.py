"""Data model of the harness: a paper, its claims, what a check measures, and the verdict.

One idea carries everything: a check computes a number that should not be negative, twice, once as the
paper says and once falsified.  The falsified run is the claim's *negative control*; the same function
serves both, and the only thing that differs is the value that `Context.pick` returns.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["symbolic", "exact", "bound", "statistical", "rate", "trained"]
Budget = Literal["quick", "standard", "deep"]
Role = Literal["claim", "control", "repair"]
Expectation = Literal["holds", "refuted"]

EFFORT: dict[str, int] = {"quick": 1, "standard": 8, "deep": 64}
"""Multiplier of sample sizes and search effort for each budget."""

LEDGER_KINDS = ("statistical", "rate", "trained")
"""Kinds that are decided by a test at a level: they share the suite's false-alarm budget.

The budget covers these tests and nothing else.  A claim of another kind that draws its inputs at random, and a trained
claim that is decided by a list of cases instead of a test, make no error of a known rate and are not covered.
"""

NEEDS = ("gpu", "arviz", "blackjax", "genjax", "hypothesis", "matplotlib", "neural_tangents", "pyamg")
"""What a claim may declare that it needs: a GPU, or an optional package by the name it is imported by."""


class Verdict(enum.StrEnum):
    PROVED = "proved"
    HOLDS = "holds"
    CONSISTENT = "consistent"
    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"
    NOT_CHECKABLE = "not checkable"
    ERROR = "error"


ACCEPTED = frozenset({Verdict.PROVED, Verdict.HOLDS, Verdict.CONSISTENT, Verdict.REPRODUCED})
REJECTED = frozenset({Verdict.REFUTED, Verdict.NOT_REPRODUCED})


class ClaimError(ValueError):
    """A claim is registered or written in a way that the harness cannot accept."""


@dataclass(frozen=True)
class Paper:
    """A paper and the numbers of all its claims, those without a check included.

    `claims` lists the numbers as the project's fact sheet counts them, so that a claim which nobody has
    coded yet stays visible in every table and report.
    """

    stem: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    claims: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run of a check measured.  A non-negative margin means that the claim held at the worst point seen."""

    margin: float
    """Signed slack in the claim's own dimensionless scale; negative: violated."""
    tolerance: float = 0.0
    """Rounding allowance: a violation counts only below `-tolerance`."""
    tolerance_reason: str = ""
    tightness: float | None = None
    """Largest left side / right side seen; 1 means that the bound is attained."""
    n: int = 0
    """Inputs or samples looked at."""
    search: Mapping[str, Any] | None = None
    """Counts of a worst-case search: structures, evaluations, restarts, agreeing, confirmation."""
    log_e: float | None = None
    """Natural log of an e-value against the claim."""
    p: float | None = None
    """Exact p-value against the claim."""
    resolution: float | None = None
    """Smallest violation that this run would have caught with probability at least 0.9."""
    validity: str = "exact"
    """How far the evidence reaches: "proof"; "exact", nothing was left to chance; "searched", the worst of what was
    looked at, and elsewhere it may be worse; "finite-sample", a test exact at every sample size; or "asymptotic"."""
    witness: Any = None
    """Worst input, simplified and printable."""
    counterexample: str | None = None
    """Python code that shows the violation; set when the claim is violated."""
    paper_value: float | None = None
    our_value: float | None = None
    note: str = ""
    undecided: str = ""
    """Why this run cannot decide (too coarse, not asymptotic, budget exhausted); empty: it can."""
    figure: Mapping[str, Any] | None = None
    """Data of one figure, drawn by `paper_checks.figures.draw`."""


@dataclass(frozen=True)
class Claim:
    """One statement of a paper with the function that checks it.  Made by `claim` and `not_checkable`."""

    paper: str
    number: str
    title: str
    statement: str
    kind: Kind
    check: Callable[[Any], Outcome] | None
    controls: Mapping[str, str]
    repairs: Mapping[str, str] = field(default_factory=dict)
    regime: str = ""
    source: str = ""
    blind_spot: str = ""
    expect: Expectation = "holds"
    needs: tuple[str, ...] = ()
    budget: Budget = "quick"
    resolution: float | None = None
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.paper}:{self.number}"

    @property
    def checkable(self) -> bool:
        return self.check is not None

    @property
    def on_ledger(self) -> bool:
        """Whether the claim takes a share of the suite's false-alarm budget; see `LEDGER_KINDS` for what it covers."""
        return self.checkable and self.kind in LEDGER_KINDS

    def items(self) -> list[tuple[Role, str | None]]:
        """Everything that must be run for a verdict: the claim, each control, each repair."""
        if not self.checkable:
            return [("claim", None)]
        runs: list[tuple[Role, str | None]] = [("claim", None)]
        runs += [("control", name) for name in self.controls]
        runs += [("repair", name) for name in self.repairs]
        return runs


def stream(name: str) -> int:
    """A name's own random stream, 32 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def claim(
    paper: Paper,
    number: str,
    statement: str,
    *,
    title: str,
    kind: Kind,
    controls: Mapping[str, str],
    repairs: Mapping[str, str] | None = None,
    regime: str,
    source: str,
    blind_spot: str = "",
    expect: Expectation = "holds",
    needs: Iterable[str] = (),
    budget: Budget = "quick",
    resolution: float | None = None,
) -> Callable[[Callable[[Any], Outcome]], Claim]:
    r"""Turn a check function into a `Claim`.

    `statement` is a sentence with LaTeX between dollar signs.  `controls` maps a name to words: each is a
    falsified version of the claim which the same check must reject, obtained by `ctx.pick(value, name=...)`.
    A claim known to be false as printed has `expect="refuted"` and at least one entry in `repairs`, a corrected
    version which the same check must accept; otherwise a check that rejects everything would look like a finding.
    `needs` lists what must be there, of `NEEDS`.  `budget` is the smallest
    budget that can decide the claim; below it the claim is inconclusive without failing the suite.
    `resolution` is the violation that the check must be able to see, in the units of its test: compulsory for
    statistical claims, optional for rates (a difference of orders) and trained ones (of the compared figure).

    Raises ClaimError if there is no negative control, a field has a value outside its list, or the resolution is missing.
    """
    repairs, needs = dict(repairs or {}), tuple(needs)
    where = f"claim {paper.stem}:{number}"
    if kind not in get_args(Kind):
        raise ClaimError(f"{where}: kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if expect not in get_args(Expectation):
        raise ClaimError(f"{where}: expect is {expect!r}; expected 'holds' or 'refuted'")
    if budget not in EFFORT:
        raise ClaimError(f"{where}: budget is {budget!r}; expected one of {', '.join(EFFORT)}")
    for need in needs:
        if need not in NEEDS:
            near = difflib.get_close_matches(need, NEEDS, n=1, cutoff=0.0)[0]
            raise ClaimError(f"{where}: needs {need!r}; expected one of {', '.join(NEEDS)} (nearest: {near})")
    if resolution is None and kind == "statistical":
        raise ClaimError(
            f"{where}: a statistical claim must say what it has to see; add resolution=..., the smallest violation that "
            "matters, in the units of its test"
        )
    if resolution is not None and (kind not in LEDGER_KINDS or not 0 < resolution < math.inf):
        raise ClaimError(
            f"{where}: resolution is {resolution!r} for kind {kind!r}; expected a positive number, for the kinds "
            f"{', '.join(LEDGER_KINDS)} only"
        )
    if not controls:
        raise ClaimError(
            f"{where} has no negative control; name at least one falsified version that its check must reject, "
            "for example controls={'constant': '2 replaced by 1.9'}, or register it with not_checkable(...)"
        )
    if expect == "refuted" and not repairs:
        raise ClaimError(
            f"{where} is recorded as false (expect='refuted') without a repair; add repairs={{name: words}} with a "
            "corrected version that the same check accepts, so that a check which rejects everything is noticed"
        )
    if overlap := set(controls) & set(repairs):
        raise ClaimError(f"{where}: {sorted(overlap)} named both as control and as repair")

    def register(check: Callable[[Any], Outcome]) -> Claim:
        return Claim(
            paper.stem,
            number,
            title,
            statement,
            kind,
            check,
            dict(controls),
            repairs,
            regime,
            source,
            blind_spot,
            expect,
            needs,
            budget,
            resolution,
        )

    return register


def not_checkable(
    paper: Paper, number: str, statement: str, *, title: str, kind: Kind, reason: str, source: str, regime: str = ""
) -> Claim:
    """Register a claim that cannot be checked here, with the compulsory reason; the gap stays visible."""
    if not reason.strip():
        raise ClaimError(f"claim {paper.stem}:{number}: not_checkable needs a reason")
    return Claim(paper.stem, number, title, statement, kind, None, {}, regime=regime, source=source, reason=reason)


def decide(claim: Claim, outcome: Outcome, alpha: float) -> tuple[Verdict, str]:
    """The verdict on one run and the reason in words.  `alpha` is this item's share of the false-alarm budget."""
    if not (math.isfinite(outcome.margin) and math.isfinite(outcome.tolerance)):
        at = "" if outcome.witness is None else f" at the input {shortened(outcome.witness)}"
        return Verdict.ERROR, f"margin {outcome.margin}, tolerance {outcome.tolerance}: not finite{at}"
    if outcome.log_e is not None and outcome.p is not None:
        return Verdict.ERROR, f"evidence is given twice: log_e {outcome.log_e}, p {outcome.p}; expected one of the two"
    if claim.kind != "statistical" and not (outcome.log_e is None and outcome.p is None):
        return (
            Verdict.ERROR,
            f"the check returned evidence (log_e {outcome.log_e}, p {outcome.p}), which does not decide a claim of kind "
            f"{claim.kind!r}; make the claim statistical, or return no evidence",
        )
    if outcome.undecided:
        return Verdict.INCONCLUSIVE, outcome.undecided
    match claim.kind:
        case "statistical":
            return _decide_statistical(claim, outcome, alpha)
        case "rate":
            accepted, rejected = Verdict.CONSISTENT, Verdict.REFUTED
        case "trained":
            accepted, rejected = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED
        case "symbolic" if outcome.validity == "proof":
            accepted, rejected = Verdict.PROVED, Verdict.REFUTED
        case _:
            accepted, rejected = Verdict.HOLDS, Verdict.REFUTED
    if outcome.margin < -outcome.tolerance:
        return rejected, f"violated by {-outcome.margin:.3g} (tolerance {outcome.tolerance:.1g})"
    if claim.resolution is not None and (blind := _blind(claim.resolution, outcome)):
        return blind
    return accepted, f"worst margin {outcome.margin:.3g} (tolerance {outcome.tolerance:.1g})"


def shortened(value: Any, most: int = 200) -> str:
    """`repr(value)`, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _decide_statistical(claim: Claim, outcome: Outcome, alpha: float) -> tuple[Verdict, str]:
    if outcome.log_e is None and outcome.p is None:
        return Verdict.ERROR, "a statistical check must return evidence: log_e or p"
    if math.isnan(outcome.log_e or 0.0) or math.isnan(outcome.p or 0.0):
        return Verdict.ERROR, f"evidence is not a number: log_e {outcome.log_e}, p {outcome.p}"
    if outcome.log_e is not None:
        rejected, evidence = outcome.log_e >= math.log(1 / alpha), f"log e = {outcome.log_e:.2f}"
    else:
        assert outcome.p is not None
        rejected, evidence = outcome.p < alpha, f"p = {outcome.p:.2g}"
    if rejected:
        return Verdict.REFUTED, f"{evidence} against the claim at level {alpha:.2g}"
    assert claim.resolution is not None
    if blind := _blind(claim.resolution, outcome):
        return blind
    return Verdict.CONSISTENT, f"{evidence}, not rejected at level {alpha:.2g}; would see {outcome.resolution:.2g}"


def _blind(asked: float, outcome: Outcome) -> tuple[Verdict, str] | None:
    """The verdict if the run could not have seen a violation of the size `asked` for; None if it could."""
    if outcome.resolution is None or math.isnan(outcome.resolution):
        return (
            Verdict.ERROR,
            f"a check that must see a violation of {asked:.2g} and does not reject must state its resolution",
        )
    if outcome.resolution > asked:
        return (
            Verdict.INCONCLUSIVE,
            f"resolution {outcome.resolution:.2g} is coarser than the {asked:.2g} asked for; use more samples",
        )
    return None
