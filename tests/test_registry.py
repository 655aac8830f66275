"""Papers and claims are found by name, and what is wrong in a claims file is said."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest

from paper_checks.harness import registry
from paper_checks.harness.claim import ClaimError

TWO = """
@claim(PAPER, "P2", "second", title="second", kind="symbolic", **WORDS)
def second(ctx):
    return Outcome(margin=ctx.pick(1.0, wrong=-1.0))


@claim(PAPER, "P1", "first", title="first", kind="bound", **WORDS)
def first(ctx):
    return Outcome(margin=ctx.pick(1.0, wrong=-1.0))


also_first = first  # a second name for the same claim is no second claim
"""


def test_claims_come_in_the_order_of_the_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    planted.install(monkeypatch, tmp_path, TWO)
    assert "planted" in registry.stems()
    paper, claims = registry.load("planted")
    assert paper.stem == "planted"
    assert [c.number for c in claims] == ["P1", "P2"]
    assert registry.find("planted:P2").title == registry.find("planted:p2").title == "second"
    assert [c.id for c in registry.select(["planted"])] == ["planted:P1", "planted:P2"]
    assert [c.id for c in registry.select(["planted:P2", "planted", "planted:P2"])] == ["planted:P2", "planted:P1"]
    assert [c.id for c in registry.select(["planted"], ["bound"])] == ["planted:P1"]
    assert registry.select(["planted"], ["rate"]) == []
    assert {c.paper for c in registry.select()} == set(registry.stems())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plantd:P1", "no paper called 'plantd'; nearest: planted"),
        ("planted:P9", "no claim called 'planted:P9'; nearest: planted:P1, planted:P2|nearest: planted:P2, planted:P1"),
        ("P2", "no claim called 'P2'; nearest: .*planted:P2.*; a claim is named paper:number"),
        ("planted", "no claim called 'planted'; .*a claim is named paper:number"),
        ("", "a claim is named paper:number"),
        (":P1", "no paper called ''"),
        ("quite something else:1", "no paper called 'quite something else'; known: .*planted"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    planted.install(monkeypatch, tmp_path, TWO)
    with pytest.raises(registry.UnknownClaimError, match=message):
        registry.find(name)


def test_a_number_without_its_paper_is_answered_with_the_whole_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    planted.install(monkeypatch, tmp_path, TWO)
    with pytest.raises(registry.UnknownClaimError, match=r"no paper called 'p2'; nearest: .*planted:P2"):
        registry.select(["p2"])


def test_what_is_no_paper_is_not_listed():
    assert not registry.NOT_PAPERS & set(registry.stems())
    with pytest.raises(registry.UnknownClaimError, match="no paper called 'harness'"):
        registry.load("harness")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TWO.replace('"P2"', '"P1"'), "two claims are numbered planted:P1"),
        (TWO.replace('"P2"', '"P7"'), r"claim planted:P7: 'P7' is not among PAPER.claims \('P1', 'P2', 'P3', 'P4'\)"),
        (TWO + "PAPER = None\n", "defines no PAPER"),
        (
            TWO.replace("PAPER,", 'Paper("other", "", "", 1, "", "", ()),'),
            "claim other:P2 stands in the file of planted",
        ),
        (TWO.replace("first", "second"), "two claims are bound to the name 'second', which hides the first"),
        (TWO.split('@claim(PAPER, "P1"')[0] * 2, "two claims are bound to the name 'second'"),
        (
            TWO + "first = not_checkable(PAPER, 'P3', 's', title='t', kind='bound', reason='r', source='s')",
            "name 'first'",
        ),
        (TWO + "first = claim(PAPER, 'P3', 's', title='t', kind='bound', **WORDS)(len)", "name 'first'"),
    ],
    ids=["duplicate", "unlisted", "no paper", "another paper", "one name", "same again", "assigned", "called"],
)
def test_a_faulty_claims_file_is_refused(source: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    planted.install(monkeypatch, tmp_path, source)
    with pytest.raises(ClaimError, match=message):
        registry.load("planted")


def test_the_stem_is_the_name_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    planted.install(monkeypatch, tmp_path, "import dataclasses\nPAPER = dataclasses.replace(PAPER, stem='other')\n")
    with pytest.raises(ClaimError, match=r"PAPER\.stem is 'other'; it must equal the file's name"):
        registry.load("planted")


def test_shipped_claims_files_are_in_order():
    for stem in registry.stems():
        paper, claims = registry.load(stem)
        assert len({c.number for c in claims}) == len(claims)
        assert len(set(paper.claims)) == len(paper.claims)
