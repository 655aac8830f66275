"""Command line: `paper-checks list | run | report | show | table`, or `python -m paper_checks ...`.

Exit status: 0 everything came out as recorded; 1 something did not; 2 wrong usage or an unusable folder or device;
130 interrupted (finished claims are kept, `--resume` continues).
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from paper_checks.harness import readme, registry, report
from paper_checks.harness.claim import ACCEPTED, EFFORT, Claim, ClaimError, Kind, Verdict
from paper_checks.harness.numerics import DeviceError, claim_platform, find_device
from paper_checks.harness.runner import Result, Settings, Store, document, run_claim

DEFAULT_FOLDER = Path("reports")
STYLE = {
    "refuted": "red",
    "not reproduced": "red",
    "error": "bold red",
    "inconclusive": "yellow",
    "not checkable": "dim",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    out, errors = _console(), _console(stderr=True)
    try:
        return int(options.command(options, out))
    except (registry.UnknownClaimError, ClaimError, DeviceError, ValueError) as problem:
        errors.print(Text(f"paper-checks: {problem}", style="red"))
        return 2
    except OSError as problem:
        words = problem.strerror or str(problem)
        what = f"{problem.filename}: {words}" if problem.filename else words
        errors.print(Text(f"paper-checks: {what}", style="red"))
        return 2
    except KeyboardInterrupt:
        errors.print("paper-checks: interrupted")
        return 130


def _console(stderr: bool = False) -> Console:
    """The terminal as it is; in a pipe or file wide enough for every table and line."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(stderr=stderr, width=wide, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paper-checks", description="Check what papers state, claim by claim.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="list | run | report | show | table")

    one = commands.add_parser("list", help="the papers and their claims")
    _add_selection(one)
    one.add_argument("--json", action="store_true", help="print the list as JSON")
    one.set_defaults(command=_list)

    one = commands.add_parser("run", help="check claims, with progress, a summary and a report")
    _add_selection(one)
    one.add_argument("--budget", default="quick", choices=list(EFFORT), help="how hard to search and sample")
    one.add_argument("--seed", default=0, type=int, help="seed of every random stream")
    one.add_argument("--device", default=None, choices=["cpu", "gpu"], help="where checks run (default: JAX's choice)")
    one.add_argument("--suite-alpha", default=1e-3, type=float, help="false-alarm probability of the whole run (0.001)")
    one.add_argument(
        "--report", default=DEFAULT_FOLDER, type=Path, metavar="DIR", help="folder of the report (reports)"
    )
    one.add_argument("--json", default=None, type=Path, metavar="FILE", help="write the JSON document there too")
    one.add_argument("--resume", action="store_true", help="keep runs that an earlier, interrupted call finished")
    one.set_defaults(command=_run)

    one = commands.add_parser("report", help="make one HTML page from JSON documents, merging them")
    one.add_argument("documents", nargs="+", type=Path, metavar="JSON", help="documents that `run` wrote")
    one.add_argument("--out", default=DEFAULT_FOLDER, type=Path, metavar="DIR", help="folder of the page (reports)")
    one.add_argument("--previous", default=None, type=Path, metavar="JSON", help="an earlier document to compare with")
    one.set_defaults(command=_report)

    one = commands.add_parser("show", help="one claim: statement, code, last result")
    one.add_argument("claim", metavar="CLAIM", help="paper:number")
    one.add_argument("--report", default=DEFAULT_FOLDER, type=Path, metavar="DIR", help="where the last result lies")
    one.set_defaults(command=_show)

    one = commands.add_parser("table", help="the table of papers for the README")
    one.add_argument("--check", type=Path, metavar="FILE", help="fail if the table in FILE is not current")
    one.add_argument("--write", type=Path, metavar="FILE", help="bring the table in FILE up to date")
    one.set_defaults(command=_table)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="a paper, or paper:number; everything without")
    parser.add_argument("--kind", action="append", default=[], choices=list(get_args(Kind)), help="only this kind")


# -- list -----------------------------------------------------------------------------------------------------------


def describe(claim: Claim) -> dict[str, Any]:
    """What `list --json` says of a claim."""
    return {
        "id": claim.id,
        "paper": claim.paper,
        "number": claim.number,
        "title": claim.title,
        "statement": claim.statement,
        "kind": claim.kind,
        "regime": claim.regime,
        "source": claim.source,
        "controls": dict(claim.controls),
        "repairs": dict(claim.repairs),
        "expect": claim.expect,
        "needs": list(claim.needs),
        "budget": claim.budget,
        "checkable": claim.checkable,
        "reason": claim.reason,
    }


def _list(options: argparse.Namespace, out: Console) -> int:
    claims = registry.select(options.names, options.kind)
    if options.json:
        print(json.dumps([describe(c) for c in claims], indent=1, ensure_ascii=False))
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("claim", "kind", "what it says", "controls", "expected"):
        table.add_column(column, overflow="fold")
    for c in claims:
        expected = c.expect if c.checkable else "not checkable"
        table.add_row(c.id, c.kind, c.title, ", ".join(c.controls), expected)
    out.print(table)
    out.print(f"{len(claims)} claims of {len({c.paper for c in claims})} papers")
    return 0


# -- run ------------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, out: Console) -> int:
    claim_platform(options.device)
    device = find_device(options.device)
    claims = registry.select(options.names, options.kind)
    if not claims:
        raise ValueError(f"no claim is of kind {', '.join(options.kind)} in {', '.join(options.names) or 'any paper'}")
    settings = Settings(
        options.budget, options.seed, options.suite_alpha, options.device, max(1, sum(c.on_ledger for c in claims))
    )
    report.ensure_writable(options.report)
    if options.json is not None:
        _check_file(options.json)
    store = Store(options.report, settings)
    out.print(
        f"{len(claims)} claims, budget {settings.budget}, seed {settings.seed}, device {device.platform}, "
        f"false-alarm level {settings.suite_alpha:g} for the run ({settings.alpha:.1g} for each random claim)"
    )
    results: list[Result] = []
    interrupted = False
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=out, transient=True) as progress:
            task = progress.add_task("", total=sum(len(c.items()) for c in claims))
            for claim in claims:
                progress.update(task, description=claim.id)
                result = run_claim(claim, settings, store, options.resume, step=lambda: progress.advance(task))
                results.append(result)
                progress.console.print(_line(result))
    except KeyboardInterrupt:
        interrupted = True
    if results:
        out.print(_summary(results))
    if interrupted:
        out.print(
            f"[yellow]interrupted after {len(results)} of {len(claims)} claims; repeat with --resume to continue[/]"
        )
    bad = [r for r in results if not r.ok]
    for r in bad:
        out.print(Text(f"{r.claim.id}: {r.reason}", style="red"))
        for run in r.runs:
            if run.error:
                out.print(Text(textwrap.indent(run.error.rstrip(), "    "), style="dim"))
    if not results:
        out.print("no claim was finished, so no report was written")
        return 130
    shown = _write(document(results, settings, complete=not interrupted), options, [c.id for c in claims], out)
    if interrupted:
        return 130
    return 0 if shown and not bad else 1


def _check_file(path: Path) -> None:
    """Raise OSError if `--json path` cannot be written, before anything runs."""
    if not path.parent.is_dir():
        what = "is not a folder" if path.parent.exists() else "does not exist; create it first"
        raise NotADirectoryError(f"--json {path}: the folder {path.parent} {what}")
    if path.exists() and not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a regular file"
        raise OSError(f"--json {path} {what}; give the name of a file")
    report.ensure_writable(path.parent)


def _write(made: report.Document, options: argparse.Namespace, selected: Sequence[str], out: Console) -> bool:
    """Write the documents and the page and say where; False if the page could not be made."""
    if options.json is not None:
        report.write_json(made, options.json)
    whole, sentence = report.joined(made, options.report, selected)
    if sentence:
        out.print(Text(sentence))
    try:
        out.print(f"report: {report.write_report(whole, options.report)}")
    except ValueError as problem:
        out.print(Text(f"no page could be made: {problem}", style="red"))
        out.print(Text(f"{options.report / 'report.json'} holds the results as they are; report.html was not written"))
        return False
    return True


def _line(result: Result) -> Text:
    o = result.outcome
    measured = "" if o is None else f"margin {o.margin + 0.0:+.2e}"  # + 0.0: no "-0"
    if o is not None and o.tightness is not None:
        measured += f"  tightness {o.tightness:.4f}"
    if o is None and result.verdict is not Verdict.ERROR:
        measured = result.reason
    line = Text(f"{result.claim.id:22} ")
    line.append(f"{result.verdict:14} ", style=_style(result))
    line.append(f"{measured:38} {result.seconds:6.1f} s", style="dim")
    return line


def _style(result: Result) -> str:
    if result.ok and result.claim.expect == "refuted":
        return "magenta"
    if result.verdict in ACCEPTED:
        return "green"
    return STYLE.get(str(result.verdict), "")


def _summary(results: Sequence[Result]) -> Table:
    table = Table(title="Summary", title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("paper")
    verdicts = [v for v in Verdict if any(r.verdict is v for r in results)]
    for v in verdicts:
        table.add_column(str(v), justify="right")
    table.add_column("controls caught", justify="right")
    table.add_column("as recorded", justify="right")
    table.add_column("seconds", justify="right")
    for stem in dict.fromkeys(r.claim.paper for r in results):
        own = [r for r in results if r.claim.paper == stem]
        controls = [c for r in own for c in r.controls.values() if c.caught is not None]
        table.add_row(
            stem,
            *(str(sum(r.verdict is v for r in own)) for v in verdicts),
            f"{sum(bool(c.caught) for c in controls)}/{len(controls)}",
            f"{sum(r.ok for r in own)}/{len(own)}",
            f"{sum(r.seconds for r in own):.0f}",
        )
    return table


# -- report, show, table ------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace, out: Console) -> int:
    merged = report.merge([report.read_json(path) for path in options.documents])
    previous = report.read_json(options.previous) if options.previous else None
    report.ensure_writable(options.out)
    out.print(f"report: {report.write_report(merged, options.out, previous=previous)}")
    return 0


def _show(options: argparse.Namespace, out: Console) -> int:
    claim = registry.find(options.claim)
    out.print(Text(f"{claim.id}  {claim.title}", style="bold"))
    out.print(Text(claim.statement))
    for label, words in (("kind", claim.kind), ("regime", claim.regime), ("source", claim.source)):
        out.print(Text(f"{label}: {words}", style="dim"))
    if claim.blind_spot:
        out.print(Text(f"cannot see: {claim.blind_spot}", style="dim"))
    for name, words in {**claim.controls, **claim.repairs}.items():
        role = "control" if name in claim.controls else "repair"
        out.print(Text(f"{role} {name}: {words}", style="dim"))
    if claim.check is None:
        out.print(f"not checkable: {claim.reason}")
        return 0
    out.print(Syntax(inspect.getsource(claim.check), "python", background_color="default"))
    last = options.report / "report.json"
    if not last.exists():
        out.print(f"no result yet in {options.report}; run: paper-checks run {claim.id}")
        return 0
    entry = next((c for c in report.read_json(last)["claims"] if c["id"] == claim.id), None)
    if entry is None:
        out.print(f"not part of the last run in {options.report}; run: paper-checks run {claim.id}")
        return 0
    out.print(f"last result ({options.report}): {entry['verdict']}: {entry['reason']}")
    for run in entry["runs"]:
        outcome = run["outcome"] or {}
        margin = outcome.get("margin")
        measured = "" if margin is None else f"margin {margin + 0.0:+.3g}"
        out.print(f"  {run['name'] or 'the claim':20} {run['verdict']:14} {measured}")
        if run["role"] == "claim" and outcome.get("counterexample"):
            out.print(Syntax(outcome["counterexample"], "python", background_color="default"))
    return 0


def _table(options: argparse.Namespace, out: Console) -> int:
    made = readme.table()
    if options.write:
        readme.write(options.write, made)
        out.print(f"wrote the table of papers to {options.write}")
        return 0
    if options.check:
        if readme.current(options.check, made):
            out.print(f"the table of papers in {options.check} is current")
            return 0
        out.print(f"the table of papers in {options.check} is stale; run: paper-checks table --write {options.check}")
        return 1
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
