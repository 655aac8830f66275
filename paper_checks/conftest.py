"""pytest glue: every claim and every control of it is one item.

`pytest paper_checks -k T2`, `-m bound`, `-m sgd_stability`, `-n 2` and the like work as anywhere; the options added here are
`--budget`, `--device`, `--seed`, `--suite-alpha` and `--report`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from paper_checks.harness import registry, report
from paper_checks.harness.claim import ACCEPTED, EFFORT, REJECTED, Claim, Kind, Role, Verdict
from paper_checks.harness.numerics import DeviceError, claim_platform, find_device
from paper_checks.harness.runner import Result, Run, Settings, Store, document, run_from, run_item

HERE = Path(__file__).parent
RESULTS = pytest.StashKey[dict[str, list[Run]]]()
SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("paper checks")
    group.addoption("--budget", default="quick", choices=list(EFFORT), help="how hard to search and sample")
    group.addoption("--seed", default=0, type=int, help="seed of every random stream of the suite")
    group.addoption("--device", default=None, choices=["cpu", "gpu"], help="where checks run (default: JAX's choice)")
    group.addoption(
        "--suite-alpha", default=1e-3, type=float, help="probability of a false alarm of the whole run (default 0.001)"
    )
    group.addoption("--report", default=None, metavar="DIR", help="write report.html and report.json to this folder")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    for name in (*get_args(Kind), "control", "unchecked", *registry.stems()):
        config.addinivalue_line("markers", f"{name}: paper checks of this kind or paper")
    try:
        config.stash[SETTINGS] = Settings(
            config.getoption("budget"),
            config.getoption("seed"),
            config.getoption("suite_alpha"),
            config.getoption("device"),
        )
        claim_platform(config.getoption("device"))
        if config.getoption("device"):
            find_device(config.getoption("device"))
        if config.getoption("report"):
            report.ensure_writable(Path(config.getoption("report")))
    except (ValueError, DeviceError, OSError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix == ".py" and _stem(file_path) in registry.stems():
        return ClaimFile.from_parent(parent, path=file_path)
    return None


def _stem(path: Path) -> str | None:
    """The paper whose claims a file holds: `paper_checks/<stem>.py`, or `paper_checks/<stem>/__init__.py`."""
    if path.name == "__init__.py":
        return path.parent.name if path.parent.parent == HERE else None
    return path.stem if path.parent == HERE else None


class ClaimFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        stem = _stem(self.path)
        assert stem is not None
        _, claims = registry.load(stem)
        for claim in claims:
            for role, name in claim.items():
                label = claim.number if name is None else f"{claim.number}[{name}]"
                yield ClaimItem.from_parent(self, name=label, claim=claim, role=role, control=name)


class ClaimFailure(Exception):
    """The verdict is not the one recorded."""


class ClaimItem(pytest.Item):
    def __init__(self, *, claim: Claim, role: Role, control: str | None, **kw: Any):
        super().__init__(**kw)
        self.claim, self.role, self.control = claim, role, control
        self.add_marker(claim.paper)
        self.add_marker(claim.kind)
        if role != "claim":
            self.add_marker("control")
        if not claim.checkable:
            self.add_marker("unchecked")

    def runtest(self) -> None:
        settings = self.config.stash[SETTINGS]
        run = run_item(self.claim, self.role, self.control, settings)
        if folder := self.config.getoption("report"):
            Store(Path(folder), settings).put(self.claim, run)
        # A plain dict: with pytest-xdist it travels from the worker to the controller.
        self.user_properties.append(("claim", {"id": self.claim.id, "run": report.sanitize(dataclasses.asdict(run))}))
        if run.outcome is None and run.error is None:
            pytest.skip(f"{self.claim.id}: {run.verdict}: {run.reason}")
        if not _as_recorded(self.claim, run):
            raise ClaimFailure(run)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if not isinstance(excinfo.value, ClaimFailure):
            return super().repr_failure(excinfo, style)
        run: Run = excinfo.value.args[0]
        headline = {
            "claim": f"expected {self.claim.expect}, found {run.verdict}",
            "control": f"NEGATIVE CONTROL NOT CAUGHT ({self.claim.controls.get(self.control or '')})",
            "repair": f"REPAIRED VERSION REJECTED ({self.claim.repairs.get(self.control or '')})",
        }[self.role]
        lines = [f"{self.claim.id} {headline}", f"  statement: {self.claim.statement}", f"  why: {run.reason}"]
        if run.outcome is not None:
            o = run.outcome
            lines.append(
                f"  margin {o.margin:.3g}, tolerance {o.tolerance:.1g}, n {o.n}, witness {str(o.witness)[:400]}"
            )
            if o.counterexample:
                lines += ["  counterexample:", *(f"    {row}" for row in o.counterexample.splitlines())]
        if run.error:
            lines += run.error.splitlines()
        again = f"pytest '{self.nodeid}' --budget {run.budget} --seed {run.seed}"
        if self.claim.on_ledger:  # alone it would be tested at the level of the whole suite
            again += f" --suite-alpha {run.alpha!r}"
        return "\n".join([*lines, f"  rerun: {again}"])

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.claim.id + (f"[{self.control}]" if self.control else "")


def _as_recorded(claim: Claim, run: Run) -> bool:
    if run.role != "claim":
        return bool(run.caught)
    return run.verdict in (REJECTED if claim.expect == "refuted" else ACCEPTED)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # After deselection: fewer selected claims share the same false-alarm budget.
    random = sum(isinstance(i, ClaimItem) and i.role == "claim" and i.claim.on_ledger for i in items)
    config.stash[SETTINGS] = dataclasses.replace(config.stash[SETTINGS], items=max(1, random))


def pytest_report_header(config: pytest.Config) -> str:
    s = config.stash[SETTINGS]
    return (
        f"paper checks: budget {s.budget}, seed {s.seed}, suite alpha {s.suite_alpha:g}, device {s.device or 'default'}"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    # What no single item can see, a tolerance too close to a control's violation for example, fails the run too.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == pytest.ExitCode.OK and reporter is not None and not all(r.ok for r in _results(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _results(terminalreporter: Any) -> list[Result]:
    kept: dict[str, list[Run]] = {}
    for reports in terminalreporter.stats.values():
        for one in reports:
            if getattr(one, "when", None) in ("call", "setup"):
                for name, value in getattr(one, "user_properties", []):
                    if name == "claim":
                        kept.setdefault(value["id"], []).append(run_from(value["run"]))
    results = [Result(registry.find(identifier), tuple(runs)) for identifier, runs in kept.items()]
    return sorted(
        results, key=lambda r: (r.claim.paper, [int(d) for d in re.findall(r"\d+", r.claim.number)], r.claim.number)
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = _results(terminalreporter)
    if not results:
        return
    terminalreporter.section("paper claims")
    for r in results:
        o = r.outcome
        measured = "" if o is None else f"margin {o.margin:+.2e}"
        tight = "" if o is None or o.tightness is None else f"tightness {o.tightness:.4f}"
        controls = f"{sum(bool(c.caught) for c in r.controls.values())}/{len(r.claim.controls)} controls caught"
        if r.verdict in (Verdict.NOT_CHECKABLE, Verdict.INCONCLUSIVE) and o is None:
            measured, controls = r.reason, ""
        line = f"{r.claim.id:24s} {r.claim.kind:11s} {r.verdict:14s} {measured:18s} {tight:17s} {controls} {r.seconds:.1f}s"
        terminalreporter.write_line(line, red=not r.ok, green=r.ok and o is not None)
        if not r.ok:
            terminalreporter.write_line(f"    {r.reason}", red=True)
    folder = config.getoption("report")
    if folder and not hasattr(config, "workerinput"):
        random = sum(r.claim.on_ledger for r in results)
        settings = dataclasses.replace(config.stash[SETTINGS], items=max(1, random))
        finished = all(len(r.runs) == len(r.claim.items()) for r in results)
        where = report.write_report(document(results, settings, complete=finished), Path(folder))
        terminalreporter.write_line(f"report: {where}")
