"""`pytest paper_checks`: every claim and control is an item, in parallel too, and a failure says what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import planted
import pytest

import paper_checks
from paper_checks.harness import registry, report

ROOT = Path(paper_checks.__file__).parents[1]
NO_GPU = all(d.platform == "cpu" for d in jax.devices())
TWO = ["--claim", "sgd_stability:T8", "--claim", "sgd_stability:T10"]  # quick
PASSED = {"T8", "T8[constant]", "T10", "T10[constant]", "T10[factor]"}


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder whose `paper_checks`, if there is one, takes precedence over the repository's."""
    environment = {
        # With CI set pytest repeats whole messages in its last section.
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k not in ("CI", "BUILD_NUMBER")},
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "200",
    }
    verbose = [] if "no:terminal" in arguments else ["-v"]  # an option of the terminal reporter
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *verbose, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def passed(output: str) -> set[str]:
    """Names of the items that passed; parallel workers print them the other way round."""
    return {a or b for a, b in re.findall(r"::(\S+) PASSED|PASSED \S+::(\S+)", output)}


def verdicts(folder: Path) -> dict[str, object]:
    """The report without what depends on the clock."""
    made = report.read_json(folder / "report.json")
    for claim in made["claims"]:
        for one in (claim, *claim["runs"]):
            one["seconds"] = 0
        claim["runs"].sort(key=lambda r: r["name"] or "")
    return {k: made[k] for k in ("claims", "papers", "settings", "complete")}


@pytest.mark.slow
def test_two_workers_give_the_same_report_as_one(tmp_path: Path):
    pytest.importorskip("xdist")
    single = run_pytest(ROOT, "paper_checks", *TWO, "--report", str(tmp_path / "one"))
    double = run_pytest(ROOT, "paper_checks", *TWO, "--report", str(tmp_path / "two"), "-n", "2")
    for done in (single, double):
        assert done.returncode == 0, done.stdout + done.stderr
        assert passed(done.stdout) == PASSED
        assert re.search(r"sgd_stability:T8 +symbolic +proved .* 1/1 controls caught", done.stdout)
        assert re.search(r"sgd_stability:T10 +\w+ +(proved|holds) .* 2/2 controls caught", done.stdout)
    first = verdicts(tmp_path / "one")
    assert first == verdicts(tmp_path / "two")
    assert first["complete"] and [c["number"] for c in first["claims"]] == ["T8", "T10"]
    for name in ("one", "two"):
        assert "sgd_stability" in (tmp_path / name / "report.html").read_text(encoding="utf-8")


def test_markers_select_by_kind_and_paper():
    done = run_pytest(ROOT, "paper_checks", "-m", "symbolic and not control and sgd_stability", "--collect-only", "-qq")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}
    assert listed == {c.number for c in registry.load("sgd_stability")[1] if c.kind == "symbolic"}


# -- a claims file with every kind of trouble -------------------------------------------------------------------------

TROUBLE = """
import jax


def planted_claim(number, statement, kind="bound", **words):
    return claim(PAPER, number, statement, title=number, kind=kind, **{**WORDS, **words})


@planted_claim("P1", "The planted sum is at most one.")
def violated(ctx):
    return ctx.cases({"small sum": 1.0, "large sum": ctx.pick(-0.25, wrong=-0.5)})


@planted_claim("P2", "The check of this one is blunt.", controls={"subtle": "a constant 1 % off", "wrong": "far off"})
def blunt(ctx):
    return Outcome(margin=ctx.pick(1.0, subtle=0.9, wrong=-1.0))


@planted_claim("P3", "The coin is fair.", kind="statistical", resolution=0.2)
def unfair(ctx):
    ctx.pick(0, wrong=1)
    return Outcome(margin=-0.5, p=1e-9 * float(jax.random.uniform(ctx.key)), resolution=0.1)


gap = not_checkable(PAPER, "P4", "Out of reach.", title="gap", kind="bound", source="s", reason="its data is private")
"""

COARSE = """
@claim(PAPER, "P1", "A tolerance as large as the violation of its control.", title="coarse", kind="bound", **WORDS)
def coarse(ctx):
    return Outcome(margin=ctx.pick(0.0, wrong=-2e-6), tolerance=1e-6)
"""


def copied(folder: Path, source: str) -> Path:
    """The package without its papers, and a planted one."""
    papers = shutil.ignore_patterns(
        "__pycache__", ".ruff_cache", *registry.stems(), *(f"{s}.py" for s in registry.stems())
    )
    shutil.copytree(ROOT / "paper_checks", folder / "paper_checks", ignore=papers)
    text = planted.HEAD.format(stem="planted") + source
    (folder / "paper_checks" / "planted.py").write_text(text, encoding="utf-8")
    return folder


def test_failures_say_what_failed_and_how_to_repeat_it(tmp_path: Path):
    folder = copied(tmp_path, TROUBLE)
    done = run_pytest(folder, "paper_checks", "--seed", "3", "--report", "out")
    text = done.stdout
    assert done.returncode == 1, text + done.stderr
    assert passed(text) == {"P1[wrong]", "P2", "P2[wrong]", "P3[wrong]"}

    assert "planted:P1 expected holds, found refuted" in text
    assert "statement: The planted sum is at most one." in text
    assert "witness {'case': 'large sum', 'slack': -0.25}" in text
    assert "replay('planted:P1', witness" in text
    assert "planted:P2 NEGATIVE CONTROL NOT CAUGHT (a constant 1 % off)" in text
    assert re.search(r"planted:P2 .* inconclusive .* 1/2 controls caught", text)
    assert "negative control not caught: subtle" in text
    assert re.search(r"planted:P4 .* not checkable +its data is private", text)

    repeats = [shlex.split(line) for line in re.findall(r"rerun: pytest (.*)", text)]
    file = "paper_checks/planted.py"
    assert repeats == [
        [f"{file}::P1", "--budget", "quick", "--seed", "3"],
        [f"{file}::P2[subtle]", "--budget", "quick", "--seed", "3"],
        [f"{file}::P3", "--budget", "quick", "--seed", "3", "--suite-alpha", "0.001"],
    ]
    again = run_pytest(folder, *repeats[1])
    assert again.returncode == 1 and "1 failed" in again.stdout and "collected 1 item" in again.stdout

    made = report.read_json(folder / "out" / "report.json")
    report.check(made)
    assert {c["number"]: (c["verdict"], c["ok"]) for c in made["claims"]} == {
        "P1": ("refuted", False),
        "P2": ("inconclusive", False),
        "P3": ("refuted", False),
        "P4": ("not checkable", True),
    }
    stored = json.loads((folder / "out" / "runs" / "planted" / "P2--subtle.json").read_text())
    assert stored["run"]["caught"] is False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_what_no_single_item_can_see_fails_the_run_too(tmp_path: Path, workers: list[str]):
    if workers:
        pytest.importorskip("xdist")
    done = run_pytest(copied(tmp_path, COARSE), "paper_checks", *workers)
    reason = "the tolerance 1e-06 is not well below the violation 2e-06 of the control 'wrong'"
    assert passed(done.stdout) == {"P1", "P1[wrong]"}
    assert f"FAILED planted:P1: {reason}" in done.stdout
    assert "FAILED paper_checks/planted.py::P1" in done.stdout and "1 failed, 2 passed" in done.stdout
    assert done.returncode == 1


def test_the_run_fails_and_reports_without_a_terminal_too(tmp_path: Path):
    done = run_pytest(copied(tmp_path, COARSE), "paper_checks", "-p", "no:terminal", "--report", "out")
    assert done.returncode == 1, done.stdout + done.stderr
    assert report.read_json(tmp_path / "out" / "report.json")["claims"][0]["verdict"] == "inconclusive"


RAISING = """
@claim(PAPER, "P1", "The check of this one fails where it should reject.", title="t", kind="bound", **WORDS)
def raising(ctx):
    return Outcome(margin=1.0 / ctx.pick(1.0, wrong=0.0))
"""


def test_a_control_that_raised_is_not_called_uncaught(tmp_path: Path):
    done = run_pytest(copied(tmp_path, RAISING), "paper_checks")
    assert "planted:P1 NEGATIVE CONTROL RAISED AN ERROR (a wrong constant)" in done.stdout
    assert "ZeroDivisionError" in done.stdout and "NOT CAUGHT" not in done.stdout


ELEVEN = """
def holding(ctx):
    return Outcome(margin=ctx.pick(1.0, wrong=-1.0))


first = claim(PAPER, "P1", "s", title="first", kind="bound", **WORDS)(holding)
tenth = claim(PAPER, "P10", "s", title="tenth", kind="bound", **WORDS)(holding)
eleventh = claim(PAPER, "P11", "s", title="eleventh", kind="bound", **WORDS)(holding)
"""


def twelve(folder: Path, source: str) -> Path:
    copied(folder, source)
    file = folder / "paper_checks" / "planted.py"
    numbers = str(tuple(f"P{i}" for i in range(1, 13)))
    file.write_text(re.sub(r"\(\s*\"P1\", \"P2\", \"P3\", \"P4\"\s*\)", numbers, file.read_text(encoding="utf-8")))
    return folder


@pytest.mark.slow
def test_claims_are_chosen_exactly(tmp_path: Path):
    folder = twelve(tmp_path, ELEVEN)
    one = run_pytest(folder, "paper_checks", "--claim", "planted:P1")
    assert one.returncode == 0 and passed(one.stdout) == {"P1", "P1[wrong]"}, one.stdout + one.stderr
    assert "4 deselected" in one.stdout
    two = run_pytest(folder, "paper_checks", "--claim", "planted:P1", "--claim", "planted:P11")
    assert passed(two.stdout) == {"P1", "P1[wrong]", "P11", "P11[wrong]"}
    wrong = run_pytest(folder, "paper_checks", "--claim", "planted:P13")
    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.search("no claim called 'planted:P13'; nearest: planted:P1", wrong.stdout + wrong.stderr)


STOPPED = (
    ELEVEN
    + """

@claim(PAPER, "P2", "s", title="false", kind="bound", **WORDS)
def false(ctx):
    return Outcome(margin=ctx.pick(-0.5, wrong=-1.0))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_run_that_stops_early_is_incomplete_and_a_selection_is_not(tmp_path: Path, workers: list[str]):
    if workers:
        pytest.importorskip("xdist")
    folder = twelve(tmp_path, STOPPED)
    run_pytest(folder, "paper_checks", "-x", "--report", "stopped", *workers)
    stopped = report.read_json(folder / "stopped" / "report.json")
    assert not stopped["complete"] and {c["number"] for c in stopped["claims"]} >= {"P1", "P2"}
    assert "P11" not in {c["number"] for c in stopped["claims"]}
    run_pytest(folder, "paper_checks", "-k", "P1 and not control", "--report", "selected", *workers)
    selected = report.read_json(folder / "selected" / "report.json")
    assert selected["complete"] and {c["number"] for c in selected["claims"]} == {"P1", "P10", "P11"}


@pytest.mark.slow
def test_a_part_joins_the_report_of_the_whole(tmp_path: Path):
    folder = twelve(tmp_path, ELEVEN)
    run_pytest(folder, "paper_checks", "--report", "out")
    done = run_pytest(folder, "paper_checks", "--claim", "planted:P10", "--report", "out")
    assert "which keeps 2 other claims" in done.stdout
    made = report.read_json(folder / "out" / "report.json")
    assert made["complete"] and [c["number"] for c in made["claims"]] == ["P1", "P10", "P11"]


FILLING = """
from pathlib import Path


@claim(PAPER, "P1", "The folder of the runs is spoiled meanwhile.", title="t", kind="bound", **WORDS)
def spoiling(ctx):
    Path("out/runs").write_text("a file")
    return Outcome(margin=ctx.pick(1.0, wrong=-1.0))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_folder_that_becomes_unusable_is_no_failure_of_a_claim(tmp_path: Path, workers: list[str]):
    if workers:
        pytest.importorskip("xdist")
    done = run_pytest(copied(tmp_path, FILLING), "paper_checks", "--report", "out", *workers)
    assert passed(done.stdout) == {"P1", "P1[wrong]"}
    assert "the report folder is unusable: " in done.stdout and "FAILED" not in done.stdout
    assert done.returncode == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--device", "gpu"],
            "JAX sees no such device here",
            marks=pytest.mark.skipif(not NO_GPU, reason="a GPU is here"),
        ),
        (["--report", "README"], "cannot write to the report folder"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(arguments: list[str], message: str, tmp_path: Path):
    (tmp_path / "README").write_text("a file")
    done = run_pytest(copied(tmp_path, TROUBLE), "paper_checks", *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stdout + done.stderr
    assert "PASSED" not in done.stdout
