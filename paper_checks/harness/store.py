"""Keeps finished runs in a folder, so that a rerun with the same settings and code resumes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax

from paper_checks.harness import report
from paper_checks.harness.claim import Claim, Outcome, Verdict
from paper_checks.harness.results import Run, Settings


class Store:
    """Finished runs in a folder, one file a run, written atomically; a rerun with the same settings and code reuses them."""

    def __init__(self, directory: Path, settings: Settings):
        self.directory, self.settings = directory / "runs", settings
        s = settings
        self._shared = f"{s.budget} {s.seed} {s.device}\n{jax.__version__}"

    def _path(self, claim: Claim, name: str | None) -> Path:
        return self.directory / claim.paper / f"{claim.number}{f'--{name}' if name else ''}.json"

    def _stamp(self, claim: Claim) -> str:
        # The level, which depends on what else was selected, matters to claims that are decided at it only.
        level = self.settings.alpha if claim.on_ledger else None
        return hashlib.sha256(f"{self._shared}\n{level}\n{_code()}".encode()).hexdigest()

    def get(self, claim: Claim, name: str | None) -> Run | None:
        try:
            kept = json.loads(self._path(claim, name).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("stamp") != self._stamp(claim):
            return None
        run = dataclasses.replace(run_from(kept["run"]), alpha=self.settings.alpha)
        # What was skipped or raised an error is tried again: a missing package may be there by now.
        return run if run.outcome is not None else None

    def put(self, claim: Claim, run: Run) -> None:
        path = self._path(claim, run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"stamp": self._stamp(claim), "run": report.sanitize(dataclasses.asdict(run))}
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
