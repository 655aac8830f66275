"""Every stated bound as an executable claim.

    from paper_checks import run
    run("sgd_stability:T2")          # verdict, margin, tightness, controls and figure of one claim

Papers are the modules of this package; the harness that checks them is `paper_checks.harness`.  The same checks run
as `pytest paper_checks` and as `paper-checks run`.
"""

from paper_checks.harness import report
from paper_checks.harness.claim import Claim, ClaimError, Outcome, Paper, Verdict, claim, not_checkable
from paper_checks.harness.registry import UnknownClaimError, find, load, select, stems
from paper_checks.harness.runner import Result, replay, run

__all__ = [
    "Claim",
    "ClaimError",
    "Outcome",
    "Paper",
    "Result",
    "UnknownClaimError",
    "Verdict",
    "claim",
    "find",
    "load",
    "not_checkable",
    "replay",
    "report",
    "run",
    "select",
    "stems",
]
