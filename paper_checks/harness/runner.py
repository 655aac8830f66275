"""Runs claims and their controls, draws the conclusion, and keeps finished runs so that a rerun resumes."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from paper_checks.harness import report
from paper_checks.harness.claim import (
    ACCEPTED,
    EFFORT,
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
from paper_checks.harness.numerics import find_device, numerics
from paper_checks.harness.registry import find, load
from paper_checks.harness.statistics import REPEAT_LEVEL

CONTROL_MARGIN = 10.0
"""A control must violate by at least this many times the rounding allowance, or the check could not tell."""

# fmt: off
LISTED_PACKAGES = (
    "jax", "jaxlib", "numpy", "scipy", "equinox", "optax", "jaxtyping", "numpyro", "sympy", "diffrax",
    "lineax", "optimistix", "hypothesis", "pytest", "genjax", "neural-tangents", "matplotlib",
    "latex2mathml",
)
# fmt: on


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
        except Exception as problem:
            verdict, reason = Verdict.ERROR, f"{type(problem).__name__}: {problem}"
            error = "".join(traceback.format_exception(problem)[-3:])
    caught = None
    if role == "control":
        caught = verdict in REJECTED
    elif role == "repair":
        caught = verdict in ACCEPTED
    return Run(
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


def _keys(claim: Claim, seed: int) -> tuple[jax.Array, jax.Array]:
    """Streams of the claim and of its paper: independent of order, selection and parallelism."""
    root = jax.random.key(seed)
    return jax.random.fold_in(root, stream(claim.id)), jax.random.fold_in(root, stream(claim.paper))


def _attempt(claim: Claim, name: str | None, settings: Settings) -> tuple[Outcome, Verdict, str]:
    key, paper_key = _keys(claim, settings.seed)
    context = Context(claim, key, paper_key, settings.budget, settings.alpha, name)  # type: ignore[arg-type]
    outcome = _measure(claim, context)
    if name is not None and name not in context.picked:
        raise ClaimError(f"the check never asks ctx.pick for {name!r}, so this run did not falsify anything")
    verdict, reason = decide(claim, outcome, settings.alpha)
    if verdict is Verdict.REFUTED and claim.kind in ("statistical", "rate"):
        # A refutation must survive fresh randomness: true claims recover, false ones only gain evidence.
        again = _measure(claim, dataclasses.replace(context, key=jax.random.fold_in(key, 1)))
        outcome, verdict, reason = _combine(claim, outcome, again, settings.alpha)
    return outcome, verdict, reason


def _measure(claim: Claim, context: Context) -> Outcome:
    assert claim.check is not None
    outcome = claim.check(context)
    if not isinstance(outcome, Outcome):
        raise ClaimError(f"the check returned {type(outcome).__name__}, not an Outcome")
    return outcome


def _combine(claim: Claim, first: Outcome, again: Outcome, alpha: float) -> tuple[Outcome, Verdict, str]:
    if first.log_e is not None and again.log_e is not None:
        both = dataclasses.replace(first, log_e=first.log_e + again.log_e, n=first.n + again.n)
        verdict, reason = decide(claim, both, alpha)
        return both, verdict, f"{reason}; a fresh sample gave log e = {again.log_e:.2f}"
    if first.p is not None and again.p is not None:
        if again.p < REPEAT_LEVEL:
            return first, Verdict.REFUTED, f"p = {first.p:.2g}, on a fresh sample p = {again.p:.2g}"
        return again, Verdict.CONSISTENT, f"p = {first.p:.2g} was not confirmed on a fresh sample: p = {again.p:.2g}"
    verdict, reason = decide(claim, again, alpha)
    return (first, verdict, reason) if verdict is Verdict.REFUTED else (again, verdict, reason)


def missing(needs: Iterable[str]) -> str:
    """What of `needs` (package names, "gpu") this machine lacks; empty if nothing."""
    lacking = []
    for need in needs:
        if need == "gpu":
            if all(d.platform == "cpu" for d in jax.devices()):
                lacking.append("a GPU")
        elif importlib.util.find_spec(need) is None:
            lacking.append(f"the package {need}")
    return " and ".join(lacking)


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
            return Verdict.ERROR, False, f"{r.role} {r.name!r}: {r.reason}"
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


# -- many runs ------------------------------------------------------------------------------------------------------


class Store:
    """Finished runs in a folder, one file a run, written atomically; a rerun with the same settings and code reuses them."""

    def __init__(self, directory: Path, settings: Settings):
        self.directory, self.settings = directory / "runs", settings

    def _path(self, claim: Claim, name: str | None) -> Path:
        return self.directory / claim.paper / f"{claim.number}{f'--{name}' if name else ''}.json"

    @functools.cached_property
    def _stamp(self) -> str:
        return hashlib.sha256(f"{self.settings}\n{jax.__version__}\n{_code()}".encode()).hexdigest()

    def get(self, claim: Claim, name: str | None) -> Run | None:
        try:
            kept = json.loads(self._path(claim, name).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("stamp") != self._stamp:
            return None
        run = run_from(kept["run"])
        # What was skipped or raised an error is tried again: a missing package may be there by now.
        return run if run.outcome is not None else None

    def put(self, claim: Claim, run: Run) -> None:
        path = self._path(claim, run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"stamp": self._stamp, "run": report.sanitize(dataclasses.asdict(run))}
        report.write_atomically(path, json.dumps(kept))


@functools.cache
def _code() -> str:
    """Hash of the code that results depend on: every source file of the packages."""
    digest = hashlib.sha256()
    for package in ("theory", "vi", "generative", "solvers", "paper_checks"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for source in sorted(Path(folder).rglob("*.py")):
                digest.update(source.read_bytes())
    return digest.hexdigest()


def run_from(record: dict[str, Any]) -> Run:
    """The Run that a JSON record describes."""
    outcome = record["outcome"]
    if outcome is not None:
        margin = math.nan if outcome["margin"] is None else outcome["margin"]
        outcome = Outcome(**{**outcome, "margin": margin})
    return Run(**{**record, "verdict": Verdict(record["verdict"]), "outcome": outcome})


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


def replay(claim: str | Claim, witness: Any, *, control: str | None = None) -> float:
    """The violation of a claim at a given input, the `witness` of a report; positive means violated.

    For symbolic claims and lists of cases the check is run anew and the worst violation is returned.
    """
    chosen = find(claim) if isinstance(claim, str) else claim
    if chosen.check is None:
        raise ValueError(f"{chosen.id} is not checkable: {chosen.reason}")
    if control is not None and control not in {**chosen.controls, **chosen.repairs}:
        raise ValueError(f"{chosen.id} has no control {control!r}; it has {', '.join(chosen.controls)}")
    with numerics():
        try:
            outcome = chosen.check(Context(chosen, *_keys(chosen, 0), "quick", 1e-3, control, replay=witness))
        except Replayed as found:
            return found.violation
    return -outcome.margin


def document(results: Sequence[Result], settings: Settings, *, complete: bool = True) -> dict[str, Any]:
    """The JSON document of a run (schema version 1)."""
    papers = {r.claim.paper for r in results}
    described = {}
    for stem in sorted(papers):
        paper = dataclasses.asdict(load(stem)[0])
        paper.pop("stem")
        described[stem] = {**paper, "claims": list(paper["claims"])}
    return {
        "schema": report.SCHEMA,
        "version": report.VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "settings": {
            "budget": settings.budget,
            "seed": settings.seed,
            "suite_alpha": settings.suite_alpha,
            "statistical_items": settings.items,
            "alpha": settings.alpha,
            "device": settings.device or "default",
        },
        "environment": environment(settings.device),
        "papers": described,
        "claims": [r.record() for r in results],
    }


def environment(device: str | None = None) -> dict[str, Any]:
    chosen = find_device(device)
    packages = {name: version(name) for name in LISTED_PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{chosen.platform}: {chosen.device_kind}",
        "proofstone": version("proofstone") or "from a checkout",
        "commit": _commit(),
        "packages": {name: v for name, v in packages.items() if v},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
