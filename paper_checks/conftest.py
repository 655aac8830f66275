"""pytest glue: every claim and every control of it is one item.

`pytest paper_checks -k T2`, `-m bound`, `-m sgd_stability`, `-n 2` and the like work as anywhere; the options added here are
`--claim`, `--budget`, `--device`, `--seed`, `--suite-alpha` and `--report`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from paper_checks.harness import registry, report
from paper_checks.harness.claim import ACCEPTED, EFFORT, REJECTED, Claim, Kind, Role, Verdict
from paper_checks.harness.numerics import DeviceError, claim_platform, find_device
from paper_checks.harness.runner import Result, Run, Settings, Store, document, run_from, run_item

HERE = Path(__file__).parent
RESULTS = pytest.StashKey["Results"]()
SETTINGS = pytest.StashKey[Settings]()
CHOSEN = pytest.StashKey[frozenset[str]]()
"""Ids of the claims named by `--claim`; empty: all of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("paper checks")
    group.addoption(
        "--claim",
        action="append",
        default=[],
        metavar="NAME",
        help="only this claim, paper:number, or paper (repeatable)",
    )
    group.addoption("--budget", default="quick", choices=list(EFFORT), help="how hard to search and sample")
    group.addoption("--seed", default=0, type=int, help="seed of every random stream of the suite")
    group.addoption("--device", default=None, choices=["cpu", "gpu"], help="where checks run (default: JAX's choice)")
    group.addoption(
        "--suite-alpha", default=1e-3, type=float, help="probability of a false alarm of the whole run (default 0.001)"
    )
    group.addoption("--report", default=None, metavar="DIR", help="write report.html and report.json to this folder")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config)
    config.pluginmanager.register(config.stash[RESULTS], "paper-check-results")
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
        names = config.getoption("claim")
        config.stash[CHOSEN] = frozenset(c.id for c in registry.select(names)) if names else frozenset()
        if config.getoption("report"):
            report.ensure_writable(Path(config.getoption("report")))
    except OSError as error:
        raise pytest.UsageError(error.strerror or str(error)) from error
    except (ValueError, DeviceError, registry.UnknownClaimError) as error:
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
            try:
                Store(Path(folder), settings).put(self.claim, run)
            except OSError as problem:  # found usable at the start; a disk may fill up meanwhile
                self.user_properties.append(("unusable folder", problem.strerror or str(problem)))
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
            "control": f"NEGATIVE CONTROL {_became(run, 'NOT CAUGHT')} ({self.claim.controls.get(self.control or '')})",
            "repair": f"REPAIRED VERSION {_became(run, 'REJECTED')} ({self.claim.repairs.get(self.control or '')})",
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


def _became(run: Run, otherwise: str) -> str:
    """What became of a control or repair that did not end as it must."""
    return {Verdict.ERROR: "RAISED AN ERROR", Verdict.INCONCLUSIVE: "NOT DECIDED"}.get(run.verdict, otherwise)


def _as_recorded(claim: Claim, run: Run) -> bool:
    if run.role != "claim":
        return bool(run.caught)
    return run.verdict in (REJECTED if claim.expect == "refuted" else ACCEPTED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen := config.stash[CHOSEN]:
        kept = [i for i in items if isinstance(i, ClaimItem) and i.claim.id in chosen]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
        items[:] = kept


def pytest_report_header(config: pytest.Config) -> str:
    s = config.stash[SETTINGS]
    return (
        f"paper checks: budget {s.budget}, seed {s.seed}, suite alpha {s.suite_alpha:g}, device {s.device or 'default'}"
    )


class Results:
    """The plugin that keeps what items found, in the process that shows it, and draws the conclusions at the end."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.worker = hasattr(config, "workerinput")  # of pytest-xdist: it sees a part, its controller the whole
        self.selected: dict[str, str] = {}  # nodes of claims, controls and repairs: the claim's id
        self.finished: set[str] = set()
        self.runs: dict[str, dict[str | None, Run]] = {}
        self.items: dict[str, tuple[str, tuple[str, int | None, str]]] = {}
        self.failed: set[str] = set()
        self.said: list[str] = []
        self.unusable = ""

    def select(self, identifiers: Iterable[str]) -> None:
        """Keep which items of claims are to be run."""
        for identifier in identifiers:
            path, _, name = identifier.partition("::")
            stem = _stem(self.config.rootpath / path)
            if stem in registry.stems():
                self.selected[identifier] = f"{stem}:{name.split('[')[0]}"

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.select(ids)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # After deselection: fewer selected claims share the same false-alarm budget.
        random = sum(isinstance(i, ClaimItem) and i.role == "claim" and i.claim.on_ledger for i in items)
        self.config.stash[SETTINGS] = dataclasses.replace(self.config.stash[SETTINGS], items=max(1, random))
        self.select(i.nodeid for i in items if isinstance(i, ClaimItem))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == "claim" and isinstance(value, dict):
                run = run_from(value["run"])
                self.runs.setdefault(value["id"], {})[run.name] = run
                self.finished.add(report.nodeid)
                if report.failed:
                    self.failed.add(value["id"])
                if run.role == "claim" or value["id"] not in self.items:
                    self.items[value["id"]] = report.nodeid, report.location
            elif name == "unusable folder":
                self.unusable = str(value)

    def results(self) -> list[Result]:
        """What was found of each claim, in the order of papers and numbers."""
        made = [Result(registry.find(identifier), tuple(runs.values())) for identifier, runs in self.runs.items()]
        return sorted(
            made, key=lambda r: (r.claim.paper, [int(d) for d in re.findall(r"\d+", r.claim.number)], r.claim.number)
        )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        results = self.results()
        if self.worker or not results:
            return
        # What no single item can see, a tolerance too close to a control's violation for example, fails the run too,
        # as a failure of the claim's own item, so that whatever counts or lists failures has it.
        for r in results:
            if not r.ok and r.claim.id not in self.failed:
                where, location = self.items[r.claim.id]
                words = f"{r.claim.id}: {r.reason}\n(seen in the claim and its controls together)"
                made = pytest.TestReport(where, location, {}, "failed", words, "call")
                self.config.hook.pytest_runtest_logreport(report=made)
                if session.exitstatus == pytest.ExitCode.OK:
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
        folder = self.config.getoption("report")
        if folder and not self.unusable:
            self._write(results, Path(folder))
        if self.unusable:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def _write(self, results: list[Result], folder: Path) -> None:
        settings = self.config.stash[SETTINGS]
        level = results[0].runs[0].alpha  # the controller of parallel workers does not know how many claims share it
        settings = dataclasses.replace(settings, items=round(settings.suite_alpha / level))
        made = document(results, settings, complete=self.finished.issuperset(self.selected))
        try:
            whole, sentence = report.joined(made, folder, set(self.selected.values()))
            self.said += [sentence] if sentence else []
            self.said.append(f"report: {report.write_report(whole, folder)}")
        except OSError as problem:
            self.unusable = problem.strerror or str(problem)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[RESULTS]
    results = found.results()
    if not results or found.worker:
        return
    terminalreporter.section("paper claims")
    for r in results:
        o = r.outcome
        measured = "" if o is None else f"margin {o.margin + 0.0:+.2e}"  # + 0.0: no "-0"
        tight = "" if o is None or o.tightness is None else f"tightness {o.tightness:.4f}"
        controls = f"{sum(bool(c.caught) for c in r.controls.values())}/{len(r.claim.controls)} controls caught"
        if r.verdict in (Verdict.NOT_CHECKABLE, Verdict.INCONCLUSIVE) and o is None:
            measured, controls = r.reason, ""
        line = f"{r.claim.id:24s} {r.claim.kind:11s} {r.verdict:14s} {measured:18s} {tight:17s} {controls} {r.seconds:.1f}s"
        terminalreporter.write_line(line, red=not r.ok, green=r.ok and o is not None)
    for r in results:
        if not r.ok:
            terminalreporter.write_line(f"FAILED {r.claim.id}: {r.reason}", red=True)
    for sentence in found.said:
        terminalreporter.write_line(sentence)
    if found.unusable:
        terminalreporter.write_line(f"the report folder is unusable: {found.unusable}; choose another one", red=True)
