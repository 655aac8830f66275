"""The command line: what it prints, what it leaves behind, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import jax
import planted
import pytest

from paper_checks.__main__ import main
from paper_checks.harness import readme, registry, report
from paper_checks.harness.runner import Result

NO_GPU = all(d.platform == "cpu" for d in jax.devices())
REAL = ["sgd_stability:T8", "sgd_stability:T10"]  # symbolic, about a second

CLAIMS = """
import dataclasses
import sys

HERE = sys.modules[__name__]
stop = None  # the number of the claim that is interrupted
ran = []


def check(number, own):
    def measure(ctx):
        if HERE.stop == number and ctx.control is None:
            raise KeyboardInterrupt
        ran.append(number)
        return Outcome(margin=ctx.pick(own, wrong=-1.0))

    return measure


first = claim(PAPER, "P1", "One $\\\\le$ two.", title="first", kind="bound", **WORDS)(check("P1", 1.0))
second = claim(PAPER, "P2", "s", title="second", kind="bound", **WORDS)(check("P2", 1.0))
second = dataclasses.replace(second, needs=("no_such_package",))
third = claim(PAPER, "P3", "s", title="third", kind="exact", **WORDS)(check("P3", 0.5))
fourth = claim(PAPER, "P4", "s", title="fourth", kind="bound", **WORDS)(check("P4", -0.5))
"""


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Claims of which P1 and P3 hold, P2 lacks a package and P4 is false; a terminal wide enough not to wrap."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    folder.mkdir()
    return planted.install(monkeypatch, folder, CLAIMS)


def read(path: Path) -> dict:
    made = json.loads(path.read_text(encoding="utf-8"))
    report.check(made)
    return made


# -- list -------------------------------------------------------------------------------------------------------------


def test_list_shows_every_claim(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    everything = registry.select()
    assert all(c.id in shown for c in everything)
    assert f"{len(everything)} claims of {len(registry.stems())} papers" in shown
    assert main(["list", "planted", "--kind", "exact"]) == 0
    shown = capsys.readouterr().out
    assert "planted:P3" in shown and "planted:P1" not in shown and "1 claims of 1 papers" in shown


def test_list_as_json(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["list", "planted", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [c["id"] for c in listed] == ["planted:P1", "planted:P2", "planted:P3", "planted:P4"]
    second = listed[1]
    assert second == {
        **second,
        "paper": "planted",
        "number": "P2",
        "statement": "s",
        "kind": "bound",
        "controls": {"wrong": "a wrong constant"},
        "needs": ["no_such_package"],
        "expect": "holds",
        "checkable": True,
    }
    assert main(["list", "--json"]) == 0
    assert {c["id"] for c in json.loads(capsys.readouterr().out)} == {c.id for c in registry.select()}


# -- run --------------------------------------------------------------------------------------------------------------


def test_a_run_of_shipped_claims_reports_and_can_be_resumed_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    folder, document = tmp_path / "out", tmp_path / "deep" / "run.json"
    document.parent.mkdir()
    assert main(["run", *REAL, "--report", str(folder), "--json", str(document)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("proved") >= 1 and "Summary" in shown and str(folder / "report.html") in shown
    made = read(document)
    assert made == read(folder / "report.json")
    assert made["complete"] and [c["id"] for c in made["claims"]] == REAL
    assert all(c["verdict"] in ("proved", "holds") and c["ok"] for c in made["claims"])
    assert "sgd_stability" in (folder / "report.html").read_text(encoding="utf-8")

    assert main(["run", *REAL, "--report", str(folder), "--resume"]) == 0
    again = read(folder / "report.json")
    assert [c["runs"] for c in again["claims"]] == [c["runs"] for c in made["claims"]]  # the very seconds included
    capsys.readouterr()

    assert main(["show", REAL[0], "--report", str(folder)]) == 0
    shown = capsys.readouterr().out
    claim = registry.find(REAL[0])
    assert claim.title in shown and "ctx.proved" in shown and "last result" in shown and "proved" in shown
    assert all(name in shown for name in claim.controls)


def test_exit_status_0_when_everything_is_as_recorded(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "planted:P1", "planted:P2", "planted:P3"]) == 0
    shown = capsys.readouterr().out
    assert "needs the package no_such_package" in shown
    assert (Path("reports") / "report.html").exists()
    assert [c["verdict"] for c in read(Path("reports/report.json"))["claims"]] == ["holds", "not checkable", "holds"]


def test_exit_status_1_when_a_claim_is_not_as_recorded(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "planted"]) == 1
    assert "planted:P4: violated by 0.5" in capsys.readouterr().out
    made = read(Path("reports/report.json"))
    assert {c["number"]: c["ok"] for c in made["claims"]} == {"P1": True, "P2": True, "P3": True, "P4": False}


def test_an_error_shows_its_place(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(paper, "ran", None)  # so that the check itself fails
    assert main(["run", "planted:P1"]) == 1
    shown = capsys.readouterr().out
    assert "error" in shown and "AttributeError: 'NoneType' object has no attribute 'append'" in shown
    assert "planted.py" in shown


def test_seed_budget_and_level_are_recorded(paper: ModuleType):
    options = ["--seed", "7", "--budget", "standard", "--suite-alpha", "0.01"]
    assert main(["run", "planted:P1", *options]) == 0
    settings = read(Path("reports/report.json"))["settings"]
    assert (settings["seed"], settings["budget"], settings["suite_alpha"]) == (7, "standard", 0.01)


@pytest.mark.parametrize("stop", ["P1", "P3"])
def test_an_interrupted_run_keeps_finished_claims_and_can_go_on(
    stop: str, paper: ModuleType, capsys: pytest.CaptureFixture[str]
):
    finished = {"P1": [], "P3": ["P1"]}[stop]
    names = ["planted:P1", "planted:P3"]
    paper.stop = stop
    assert main(["run", *names]) == 130
    shown = capsys.readouterr().out
    assert f"interrupted after {len(finished)} of 2 claims; repeat with --resume to continue" in shown
    if finished:
        made = read(Path("reports/report.json"))
        assert not made["complete"] and [c["number"] for c in made["claims"]] == finished
        assert Path("reports/report.html").exists()
    else:
        assert "no claim was finished, so no report was written" in shown
        assert not Path("reports/report.json").exists() and not Path("reports/report.html").exists()

    paper.stop = None
    paper.ran.clear()
    assert main(["run", *names, "--resume"]) == 0
    assert paper.ran == [n for n in ("P1", "P1", "P3", "P3") if n not in finished]
    made = read(Path("reports/report.json"))
    assert made["complete"] and [c["number"] for c in made["claims"]] == ["P1", "P3"]


def test_one_claim_joins_the_report_of_the_whole_and_other_settings_replace_it(
    paper: ModuleType, capsys: pytest.CaptureFixture[str]
):
    everything = ["P1", "P2", "P3", "P4"]
    assert main(["run", "planted"]) == 1
    capsys.readouterr()
    assert main(["run", "planted:P3", "--json", "own.json"]) == 0
    assert "which keeps 3 other claims" in capsys.readouterr().out
    made = read(Path("reports/report.json"))
    assert made["complete"] and [c["number"] for c in made["claims"]] == everything
    assert [c["number"] for c in read(Path("own.json"))["claims"]] == ["P3"]

    paper.stop = "P3"  # interrupted: what was finished is new, the rest stays
    assert main(["run", "planted"]) == 130
    made = read(Path("reports/report.json"))
    assert made["complete"] and [c["number"] for c in made["claims"]] == everything
    paper.stop = "P1"
    before = Path("reports/report.json").read_bytes()
    assert main(["run", "planted"]) == 130
    assert Path("reports/report.json").read_bytes() == before

    paper.stop = None
    capsys.readouterr()
    assert main(["run", "planted:P1", "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert "the earlier report, of" in shown and "was replaced: other seed" in shown
    assert [c["number"] for c in read(Path("reports/report.json"))["claims"]] == ["P1"]


def test_results_that_do_not_fit_the_schema_are_kept_and_said(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = Result.record
    monkeypatch.setattr(Result, "record", lambda self: {**record(self), "seconds": "long"})
    assert main(["run", "planted:P1"]) == 1
    shown = capsys.readouterr().out
    assert shown.index("Summary") < shown.index("no page could be made")
    assert "claims[0].seconds is str 'long'" in shown and "report.html was not written" in shown
    kept = json.loads(Path("reports/report.json").read_text(encoding="utf-8"))
    assert kept["claims"][0]["id"] == "planted:P1" and not Path("reports/report.html").exists()
    assert main(["run", "planted:P1"]) == 1  # and once more, over the odd one


# -- wrong usage: exit status 2, clear words, nothing left behind ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "plantd"], "no paper called 'plantd'; nearest: planted"),
        (["list", "planted:P9"], "no claim called 'planted:P9'; nearest:"),
        (["show", "planted"], "a claim is named paper:number"),
        (["run", "planted", "--kind", "rate"], "no claim is of kind rate in planted"),
        (["run", "planted", "--seed", "-1"], "seed is -1; expected a non-negative integer"),
        (["run", "planted", "--suite-alpha", "2"], "suite_alpha is 2.0; expected a probability"),
        (["report", "absent.json"], "absent.json"),
        (["table", "--check", "absent.md"], "absent.md"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("reports").exists()
    assert paper.ran == []


@pytest.mark.parametrize("arguments", [[], ["chekc"], ["run", "--budget", "huge"], ["run", "--kind", "guess"]])
def test_what_the_parser_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: paper-checks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "taken"], "cannot write to the report folder taken"),
        (["--report", "taken/inside"], "cannot write to the report folder taken/inside"),
        (["--report", "/dev/null"], "/dev/null is not a folder"),
        (["--report", "/proc/absent"], "no folder can be made in /proc"),
        (["--json", "taken/run.json"], "--json taken/run.json: the folder taken is not a folder"),
        (["--json", "absent/run.json"], "--json absent/run.json: the folder absent does not exist; create it first"),
        (["--json", "source"], "--json source is a folder; give the name of a file"),
        (["--json", "/dev/null"], "--json /dev/null is not a regular file; give the name of a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_anything_runs(
    arguments: list[str], message: str, paper: ModuleType, capsys: pytest.CaptureFixture[str]
):
    Path("taken").write_text("a file, where a folder should be")
    assert main(["run", "planted:P1", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "half-written" not in said and "Errno" not in said
    assert paper.ran == [] and not Path("absent").exists()
    assert Path("taken").read_text() == "a file, where a folder should be"


@pytest.mark.skipif(not NO_GPU, reason="a GPU is here")
def test_a_gpu_that_is_not_here(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "planted:P1", "--device", "gpu"]) == 2
    assert "--device gpu: JAX sees no such device here (it sees: cpu)" in capsys.readouterr().err
    assert paper.ran == []


# -- report, show, table ----------------------------------------------------------------------------------------------


def test_documents_merge_into_one_page(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "planted:P1", "--json", "one.json"]) == 0
    assert main(["run", "planted:P4", "--json", "two.json"]) == 1
    assert main(["report", "one.json", "two.json", "--out", "both", "--previous", "one.json"]) == 0
    assert str(Path("both/report.html")) in capsys.readouterr().out
    assert [c["number"] for c in read(Path("both/report.json"))["claims"]] == ["P1", "P4"]
    Path("broken.json").write_text("{")
    assert main(["report", "one.json", "broken.json", "--out", "other"]) == 2
    assert "broken.json" in capsys.readouterr().err
    assert not Path("other").exists()


def test_show_without_a_result_says_how_to_get_one(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "planted:P1"]) == 0
    shown = capsys.readouterr().out
    assert "control wrong: a wrong constant" in shown
    assert "no result yet in reports; run: paper-checks run planted:P1" in shown
    assert main(["run", "planted:P3"]) == 0
    assert main(["show", "planted:P1"]) == 0
    assert "not part of the last run in reports; run: paper-checks run planted:P1" in capsys.readouterr().out


def test_show_of_a_refuted_claim_shows_its_margins(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "planted:P4"]) == 1
    capsys.readouterr()
    assert main(["show", "planted:P4"]) == 0
    shown = capsys.readouterr().out
    assert "last result (reports): refuted" in shown and "margin -0.5" in shown and "margin -1" in shown


def test_the_table_of_the_readme(paper: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert main(["table"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "`planted`" in line)
    # claims, hold, refuted as printed, not checkable, not yet, negative controls
    assert row.endswith("| 4 | 4 | 0 | 0 | 0 | 4 |")

    page = Path("README.md")
    page.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    assert main(["table", "--check", "README.md"]) == 1
    assert "is stale; run: paper-checks table --write README.md" in capsys.readouterr().out
    assert main(["table", "--write", "README.md"]) == 0
    assert page.read_text() == f"# Title\n\n{readme.BEGIN}\n{printed.strip()}\n{readme.END}\n\nafter\n"
    assert main(["table", "--check", "README.md"]) == 0
    assert "is current" in capsys.readouterr().out

    page.write_text("no markers")
    for option in ("--check", "--write"):
        assert main(["table", option, "README.md"]) == 2
        assert "must contain the lines" in capsys.readouterr().err
    assert page.read_text() == "no markers"
