"""Runs claims and their controls, and replays single inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import jax

from paper_checks.harness import report
from paper_checks.harness.claim import (
    ACCEPTED,
    EFFORT,
    LEDGER_KINDS,
    REJECTED,
    Claim,
    ClaimError,
    Outcome,
    Role,
    Verdict,
    decide,
    stream,
)
from paper_checks.harness.context import Context, Replayed
from paper_checks.harness.environment import document, environment, version
from paper_checks.harness.numerics import DeviceError, find_device, numerics
from paper_checks.harness.outcomes import normalized
from paper_checks.harness.registry import find
from paper_checks.harness.results import Result, Run, Settings, conclude
from paper_checks.harness.statistics import REPEAT_LEVEL
from paper_checks.harness.store import Store, run_from

__all__ = [
    "Result",
    "Run",
    "Settings",
    "Store",
    "conclude",
    "document",
    "environment",
    "missing",
    "replay",
    "run",
    "run_claim",
    "run_from",
    "run_item",
    "version",
]

SMALLEST_CONTROL = 1e-9
"""Violations are dimensionless: a falsification that moves the margin by less is rounding noise, and rejecting it shows
nothing of what the check can see.  Statistical claims are exempt, being decided by their evidence instead."""

FRESH_TRIES = 6
"""Repetitions with fresh keys before evidence that never changes is called independent of the randomness.  Counts coincide
by chance, with probability below 0.1 where twenty trials are expected to hit: six in a row below 1e-6."""


# -- one run ------------------------------------------------------------------------------------------------------


def run_item(claim: Claim, role: Role, name: str | None, settings: Settings) -> Run:
    """Run the claim (`name` None) or one of its controls or repairs.  Never raises for what a check does wrong."""
    blank: dict[str, Any] = {
        "role": role,
        "name": name,
        "seed": settings.seed,
        "budget": settings.budget,
        "alpha": settings.alpha,
    }
    still: dict[str, Any] = {"seconds": 0.0, "device": "", "dtype": "", "caught": None}
    if not claim.checkable:
        return Run(**blank, **still, verdict=Verdict.NOT_CHECKABLE, reason=claim.reason)
    if lacking := missing(claim.needs):
        return Run(**blank, **still, verdict=Verdict.NOT_CHECKABLE, reason=f"needs {lacking}, which is not here")
    if EFFORT[settings.budget] < EFFORT[claim.budget]:
        return Run(**blank, **still, verdict=Verdict.INCONCLUSIVE, reason=f"needs --budget {claim.budget}")
    start = time.perf_counter()
    outcome, error = None, None
    with numerics(settings.device) as device:
        try:
            outcome, verdict, reason = _attempt(claim, name, settings)
        except (Exception, SystemExit) as problem:
            which = f"{role} {name!r}, " if name is not None else ""
            verdict, reason = Verdict.ERROR, f"{type(problem).__name__}: {problem} ({which}seed {settings.seed})"
            error = "".join(traceback.format_exception(problem)[-3:])
    caught = None
    if role == "control":
        caught = verdict in REJECTED
        if caught and claim.kind != "statistical" and outcome is not None and -outcome.margin < SMALLEST_CONTROL:
            caught, reason = (
                False,
                f"{reason}; violations below {SMALLEST_CONTROL:g} show nothing of what a check can see",
            )
    elif role == "repair":
        caught = verdict in ACCEPTED
    done = Run(
        **blank,
        verdict=verdict,
        caught=caught,
        reason=reason,
        seconds=time.perf_counter() - start,
        device=f"{device.platform}: {device.device_kind}",
        dtype="float64",
        error=error,
        outcome=outcome,
    )
    if problem_found := _unreportable(claim, done):
        return dataclasses.replace(
            done,
            verdict=Verdict.ERROR,
            caught=None if role == "claim" else False,
            reason=f"the outcome does not fit a report: {problem_found}",
            error=problem_found,
            outcome=None,
        )
    return done


def _unreportable(claim: Claim, run: Run) -> str:
    """What of a run a report cannot hold; empty if nothing.  One odd figure must not cost all other results."""
    one = {**dataclasses.asdict(Settings()), "statistical_items": 1, "alpha": None, "device": None}
    here: dict[str, Any] = dict.fromkeys(("python", "platform", "device", "proofstone"), "") | {
        "commit": None,
        "packages": {},
    }
    try:
        report.check(
            report.sanitize(
                {
                    "schema": report.SCHEMA,
                    "version": report.VERSION,
                    "created": "while running",
                    "complete": True,
                    "settings": one,
                    "environment": here,
                    "papers": {},
                    "claims": [Result(claim, (run,)).record()],
                }
            )
        )
    except ValueError as problem:
        return str(problem).partition("claims[0].runs[0].")[2] or str(problem)
    return ""


def _keys(claim: Claim, seed: int) -> tuple[jax.Array, jax.Array]:
    """Streams of the claim and of its paper: independent of order, selection and parallelism."""
    root = jax.random.key(seed)
    return jax.random.fold_in(root, stream(claim.id)), jax.random.fold_in(root, stream(claim.paper))


def _attempt(claim: Claim, name: str | None, settings: Settings) -> tuple[Outcome, Verdict, str]:
    key, paper_key = _keys(claim, settings.seed)
    context = Context(claim, key, paper_key, settings.budget, settings.alpha, name, seed=settings.seed)  # type: ignore[arg-type]
    outcome = _measure(claim, context)
    if name is not None and name not in context.picked:
        raise ClaimError(f"the check never asks ctx.pick for {name!r}, so this run did not falsify anything")
    verdict, reason = decide(claim, outcome, settings.alpha)
    if verdict is Verdict.REFUTED and claim.kind in ("statistical", "rate"):
        # A refutation must survive fresh randomness: true claims recover, false ones only gain evidence.
        again = _fresh(claim, context, outcome)
        outcome, verdict, reason = _combine(claim, outcome, again, settings.alpha)
    if verdict in REJECTED and outcome.counterexample is None and claim.kind in LEDGER_KINDS:
        outcome = dataclasses.replace(outcome, counterexample=context.run_code())
    return outcome, verdict, reason


def _measure(claim: Claim, context: Context) -> Outcome:
    assert claim.check is not None
    outcome = claim.check(context)
    if not isinstance(outcome, Outcome):
        raise ClaimError(f"the check returned {type(outcome).__name__}, not an Outcome")
    return normalized(outcome)


def _fresh(claim: Claim, context: Context, first: Outcome) -> Outcome:
    """What the check measures on fresh randomness.  Raises ClaimError if that is always what it measured before."""
    for turn in range(1, FRESH_TRIES + 1):
        key, paper_key = (jax.random.fold_in(k, turn) for k in (context.key, context.paper_key))
        again = _measure(claim, dataclasses.replace(context, key=key, paper_key=paper_key))
        # As text, in which a NaN equals a NaN.
        if repr(again) != repr(first):
            return again
    raise ClaimError(
        f"the evidence is the same with {FRESH_TRIES} fresh keys, so repeating the check confirms nothing; draw everything "
        "random from ctx.key or ctx.paper_key, or choose the kind exact or bound if nothing is random"
    )


def _combine(claim: Claim, first: Outcome, again: Outcome, alpha: float) -> tuple[Outcome, Verdict, str]:
    """The verdict on a refutation and its repetition: evidence adds up, a p-value must fall below `REPEAT_LEVEL`."""
    if (first.p is None) != (again.p is None):
        raise ClaimError(
            f"the check returned p = {first.p} first and p = {again.p} on a fresh sample; expected one kind"
        )
    verdict, reason = decide(claim, again, alpha if first.p is None else REPEAT_LEVEL)
    if verdict is Verdict.ERROR or again.undecided:
        return again, verdict, f"on fresh randomness: {reason}"
    if first.log_e is not None and again.log_e is not None:
        both = dataclasses.replace(first, log_e=first.log_e + again.log_e, n=first.n + again.n)
        verdict, reason = decide(claim, both, alpha)
        return both, verdict, f"{reason}; a fresh sample gave log e = {again.log_e:.2f}"
    if first.p is not None and verdict is Verdict.REFUTED:
        return first, verdict, f"p = {first.p:.2g}, on a fresh sample p = {again.p:.2g}"
    if first.p is not None:
        return again, verdict, f"p = {first.p:.2g} was not confirmed on a fresh sample: {reason}"
    return (first, verdict, reason) if verdict is Verdict.REFUTED else (again, verdict, reason)


def missing(needs: Iterable[str]) -> str:
    """What of `needs` (package names, "gpu") this machine lacks; empty if nothing."""
    lacking = []
    for need in needs:
        if need == "gpu":
            try:
                find_device("gpu")
            except DeviceError:
                lacking.append("a GPU")
        elif importlib.util.find_spec(need) is None:
            lacking.append(f"the package {need}")
    return " and ".join(lacking)


# -- many runs ------------------------------------------------------------------------------------------------------


def run_claim(
    claim: Claim,
    settings: Settings,
    store: Store | None = None,
    resume: bool = False,
    step: Callable[[], None] | None = None,
) -> Result:
    """Run a claim with its controls and repairs; `step` is called after each."""
    runs = []
    for role, name in claim.items():
        run = store.get(claim, name) if store is not None and resume else None
        if run is None:
            run = run_item(claim, role, name, settings)
            if store is not None:
                store.put(claim, run)
        runs.append(run)
        if step is not None:
            step()
    return Result(claim, tuple(runs))


def run(
    claim: str | Claim, *, budget: str = "quick", seed: int = 0, device: str | None = None, suite_alpha: float = 1e-3
) -> Result:
    """Check one claim, given as "paper:number", with its negative controls.

    The result knows its `verdict`, `outcome`, `controls` and `figure()`, and shows itself in a notebook.
    Raises UnknownClaimError with the nearest names, DeviceError if the device is not there.
    """
    chosen = find(claim) if isinstance(claim, str) else claim
    find_device(device)
    return run_claim(chosen, Settings(budget, seed, suite_alpha, device))


def replay(
    claim: str | Claim, witness: Any, *, control: str | None = None, budget: str = "quick", seed: int = 0
) -> float:
    """The violation of a claim at a given input, the `witness` of a report; positive means violated.

    A check is run up to the place where it would search, with the `budget` and `seed` that its numbers may depend on.
    For a list of cases it is run anew and the violation of the case that the witness names is returned; for symbolic
    claims it is run anew and the witness is not looked at.
    Raises ValueError if the witness is no input, or no case, of the claim.
    """
    settings = Settings(budget, seed)
    chosen = find(claim) if isinstance(claim, str) else claim
    if chosen.check is None:
        raise ValueError(f"{chosen.id} is not checkable: {chosen.reason}")
    if control is not None and control not in {**chosen.controls, **chosen.repairs}:
        raise ValueError(f"{chosen.id} has no control {control!r}; it has {', '.join(chosen.controls)}")
    with numerics():
        try:
            keys = _keys(chosen, seed)
            context = Context(chosen, *keys, budget, settings.alpha, control, replay=witness, seed=seed)  # type: ignore[arg-type]
            outcome = chosen.check(context)
        except Replayed as found:
            return found.violation
    return -outcome.margin
