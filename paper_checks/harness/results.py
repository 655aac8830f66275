"""What runs are asked for and what they return: settings, one run, all runs of a claim, and the conclusion from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paper_checks.harness import report
from paper_checks.harness.claim import ACCEPTED, EFFORT, REJECTED, Claim, Outcome, Role, Verdict

CONTROL_MARGIN = 10.0
"""A control must violate by at least this many times the rounding allowance, or the check could not tell."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.  `items` random claims share the false-alarm budget `suite_alpha`."""

    budget: str = "quick"
    seed: int = 0
    suite_alpha: float = 1e-3
    device: str | None = None
    items: int = 1

    def __post_init__(self) -> None:
        if self.budget not in EFFORT:
            raise ValueError(f"budget is {self.budget!r}; expected one of {', '.join(EFFORT)}")
        if not 0 < self.suite_alpha < 1:
            raise ValueError(f"suite_alpha is {self.suite_alpha}; expected a probability strictly between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected a non-negative integer")

    @property
    def alpha(self) -> float:
        """The share of one random claim (Bonferroni)."""
        return self.suite_alpha / max(1, self.items)


@dataclass(frozen=True)
class Run:
    """One execution of a check: of the claim itself, of a control, or of a repair."""

    role: Role
    name: str | None
    verdict: Verdict
    caught: bool | None
    """Controls: rejected as they must be.  Repairs: accepted as they must be.  None for the claim itself."""
    reason: str
    seconds: float
    device: str
    dtype: str
    seed: int
    budget: str
    alpha: float
    error: str | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Result:
    """A claim with everything that was run for it.  In a notebook it shows itself, figure included."""

    claim: Claim
    runs: tuple[Run, ...]

    @property
    def outcome(self) -> Outcome | None:
        return self._claim_run.outcome if self._claim_run else None

    @property
    def _claim_run(self) -> Run | None:
        return next((r for r in self.runs if r.role == "claim"), None)

    @property
    def controls(self) -> dict[str, Run]:
        return {r.name: r for r in self.runs if r.role == "control" and r.name is not None}

    @property
    def conclusion(self) -> tuple[Verdict, bool, str]:
        return conclude(self.claim, self.runs)

    @property
    def verdict(self) -> Verdict:
        return self.conclusion[0]

    @property
    def ok(self) -> bool:
        """Whether the claim came out as it is recorded, its controls included."""
        return self.conclusion[1]

    @property
    def reason(self) -> str:
        return self.conclusion[2]

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.runs)

    def figure(self, control: str | None = None) -> Any:
        """The matplotlib figure of the claim's run, or of the named control's; None if that run has no figure."""
        from paper_checks import figures

        run = self.controls[control] if control else self._claim_run
        if run is None or run.outcome is None or run.outcome.figure is None:
            return None
        return figures.draw(run.outcome.figure)

    def record(self) -> dict[str, Any]:
        """The claim's entry in the JSON document."""
        c = self.claim
        verdict, ok, reason = self.conclusion
        return {
            "id": c.id,
            "paper": c.paper,
            "number": c.number,
            "title": c.title,
            "statement": c.statement,
            "kind": c.kind,
            "regime": c.regime,
            "source": c.source,
            "blind_spot": c.blind_spot,
            "expect": c.expect,
            "needs": list(c.needs),
            "budget": c.budget,
            "controls": dict(c.controls),
            "repairs": dict(c.repairs),
            "verdict": str(verdict),
            "ok": ok,
            "reason": reason,
            "seconds": self.seconds,
            "runs": [dataclasses.asdict(r) for r in self.runs],
        }

    def _repr_html_(self) -> str:
        return report.claim_html(report.sanitize(self.record()))


def conclude(claim: Claim, runs: Sequence[Run]) -> tuple[Verdict, bool, str]:
    """The claim's final verdict, whether that is as recorded, and why, from all its runs."""
    own = next((r for r in runs if r.role == "claim"), None)
    others = {r.name: r for r in runs if r.role != "claim"}
    expected = [n for _, n in claim.items() if n is not None]
    skipped = next((r for r in runs if r.outcome is None and r.error is None), None)
    if skipped is not None:  # not checkable, a missing package, or a budget that is declared too small
        return skipped.verdict, True, skipped.reason
    if own is None:
        return Verdict.INCONCLUSIVE, all(r.caught for r in runs), "only controls were run"
    if own.verdict is Verdict.ERROR:
        return own.verdict, False, own.reason
    for r in others.values():
        if r.verdict is Verdict.ERROR:
            named = f"{r.role} {r.name!r}"
            return Verdict.ERROR, False, r.reason if named in r.reason else f"{named}: {r.reason}"
        if not r.caught:
            what = "negative control not caught" if r.role == "control" else "repaired version rejected"
            return Verdict.INCONCLUSIVE, False, f"{what}: {r.name} ({r.verdict}: {r.reason})"
    absent = [n for n in expected if n not in others]
    if absent:
        fine = own.verdict in (REJECTED if claim.expect == "refuted" else ACCEPTED)
        return Verdict.INCONCLUSIVE, fine, f"{own.verdict}, but not run: {', '.join(absent)}"
    coarse = _too_coarse(own, [others[n] for n in claim.controls])
    if coarse:
        return Verdict.INCONCLUSIVE, False, coarse
    if claim.expect == "refuted":
        if own.verdict in REJECTED:
            return own.verdict, True, f"false as printed, as recorded: {own.reason}"
        return own.verdict, False, f"recorded as false, but no longer refuted: {own.reason}"
    return own.verdict, own.verdict in ACCEPTED, own.reason


def _too_coarse(own: Run, controls: Sequence[Run]) -> str:
    """A rounding allowance near a control's violation would hide a real one."""
    tolerance = own.outcome.tolerance if own.outcome else 0.0
    for run in controls:
        if tolerance and run.outcome and -run.outcome.margin < CONTROL_MARGIN * tolerance:
            return (
                f"the tolerance {tolerance:.1g} is not well below the violation {-run.outcome.margin:.1g} of the control "
                f"{run.name!r}"
            )
    return ""
