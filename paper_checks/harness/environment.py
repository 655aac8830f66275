"""The JSON document of a run, and what it says of the machine and the packages."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_checks.harness import report
from paper_checks.harness.numerics import find_device
from paper_checks.harness.registry import load
from paper_checks.harness.results import Result, Settings

# fmt: off
LISTED_PACKAGES = (
    "jax", "jaxlib", "numpy", "scipy", "equinox", "optax", "jaxtyping", "numpyro", "sympy", "diffrax",
    "lineax", "optimistix", "hypothesis", "pytest", "genjax", "neural-tangents", "matplotlib",
    "latex2mathml",
)
# fmt: on


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
