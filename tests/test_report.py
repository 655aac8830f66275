"""The report document and its page: nothing lost, nothing half-written, nothing that a browser would execute."""

import copy
import errno
import html.parser
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paper_checks import figures
from paper_checks.harness import markup, mathml, page, report
from paper_checks.harness.claim import LEDGER_KINDS

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "wbr", "br", "img", "link", "hr", "input"}
ROOT = Path(__file__).parents[1]


# -- a realistic document -------------------------------------------------------------------------------------------


def figure(title: str, **parts: Any) -> dict[str, Any]:
    blank = {
        "x_label": "",
        "y_label": "",
        "x_scale": "linear",
        "y_scale": "linear",
        "lines": [],
        "hlines": [],
        "bars": None,
    }
    return {"title": title, **blank, **parts}


def outcome(margin: float | None, **parts: Any) -> dict[str, Any]:
    blank = {
        "margin": margin,
        "tolerance": 0.0,
        "tolerance_reason": "",
        "tightness": None,
        "n": 0,
        "search": None,
        "log_e": None,
        "p": None,
        "resolution": None,
        "validity": "exact",
        "witness": None,
        "counterexample": None,
        "paper_value": None,
        "our_value": None,
        "note": "",
        "undecided": "",
        "figure": None,
    }
    return {**blank, **parts}


def run(role: str, name: str | None, verdict: str, result: dict[str, Any] | None, **parts: Any) -> dict[str, Any]:
    good = {"control": verdict in ("refuted", "not reproduced"), "repair": verdict in ("holds", "proved", "consistent")}
    blank = {
        "role": role,
        "name": name,
        "verdict": verdict,
        "caught": good.get(role),
        "reason": "",
        "seconds": 0.8,
        "device": "cpu: cpu",
        "dtype": "float64",
        "seed": 0,
        "budget": "quick",
        "alpha": 2.5e-4,
        "error": None,
        "outcome": result,
    }
    return {**blank, **parts}


def claim(
    paper: str, number: str, title: str, statement: str, kind: str, runs: list[Any], **parts: Any
) -> dict[str, Any]:
    own = next((r for r in runs if r["role"] == "claim"), None)
    verdict = own["verdict"] if own else "inconclusive"
    blank = {
        "id": f"{paper}:{number}",
        "paper": paper,
        "number": number,
        "title": title,
        "statement": statement,
        "kind": kind,
        "regime": "",
        "source": "",
        "blind_spot": "",
        "expect": "holds",
        "needs": [],
        "budget": "quick",
        "controls": {},
        "repairs": {},
        "verdict": verdict,
        "ok": verdict in ("proved", "holds", "consistent", "reproduced", "not checkable"),
        "reason": "",
        "seconds": math.fsum(r["seconds"] for r in runs),
        "runs": runs,
    }
    return {**blank, **parts}


def sharpness(factor: float) -> dict[str, Any]:
    """Growth of the second moment against the step, for a threshold that is off by `factor`."""
    eta = np.linspace(0.05, 1.15, 60)
    growth = (1 - eta) ** 2 + 0.4 * eta**2
    return figure(
        f"Second moment per step, threshold {factor:g} × the paper's",
        x_label=r"step $\eta\lambda/2$",
        y_label=r"$\mathbb{E}|x_{t+1}|^2/|x_t|^2$",
        lines=[
            {"label": "measured", "x": eta[::4].tolist(), "y": growth[::4].tolist(), "style": "points"},
            {"label": "claimed", "x": eta.tolist(), "y": (growth * factor).tolist(), "style": "line"},
        ],
        hlines=[{"label": "stable below", "y": 1.0}],
    )


def law(shift: float) -> dict[str, Any]:
    x = np.linspace(-3, 3, 80)
    cdf = 1 / (1 + np.exp(-1.7 * x))
    samples = 1 / (1 + np.exp(-1.7 * (x - shift)))
    return figure(
        "Distribution function of the log return",
        x_label=r"$\log X_T$",
        y_label="P(X ≤ x)",
        lines=[
            {"label": "samples", "x": x.tolist(), "y": samples.tolist(), "style": "step"},
            {"label": "claimed", "x": x.tolist(), "y": cdf.tolist(), "style": "dashed"},
        ],
    )


def order() -> dict[str, Any]:
    h = 2.0 ** -np.arange(3, 9)
    lines = [{"label": "measured", "x": h.tolist(), "y": (0.4 * h**0.97).tolist(), "style": "points"}]
    for q, style in ((1.0, "line"), (0.5, "dashed"), (1.5, "dashed")):
        curve = (0.4 * h[-1] ** 0.97 * (h / h[-1]) ** q).tolist()
        lines.append({"label": f"order {q:g}", "x": h.tolist(), "y": curve, "style": style})
    return figure("Strong order", x_label="step $h$", y_label="error", x_scale="log", y_scale="log", lines=lines)


def sample() -> dict[str, Any]:
    """Three papers, every kind and every verdict, controls caught and missed, numbers missing, text of all sorts."""
    search = {
        "structures": 40,
        "evaluations": 1_250_000,
        "restarts": 32,
        "agreeing": 30,
        "confirmation": "confirmed with 50 digits",
    }
    sgd = [
        claim(
            "sgd_stability",
            "T1",
            "Mean-square stability threshold",
            r"For step $\eta$ and batch size $b$, SGD on a quadratic is stable in mean square if and only if "
            r"$\eta\le\frac{2}{\lambda_{\max}(H)}\Bigl(1+\frac{1}{b}\bigl(\tfrac{n-b}{n-1}\bigr)\frac{s^2}{\lambda_{\max}(H)^2}"
            r"\Bigr)^{-1}$, where $s^2=\mathbb{E}\lVert H_i-H\rVert^2$.",
            "bound",
            [
                run(
                    "claim",
                    None,
                    "holds",
                    outcome(
                        3.2e-6,
                        tolerance=1.1e-13,
                        tolerance_reason="measured rounding, doubled",
                        tightness=0.99968,
                        n=1_250_000,
                        search=search,
                        witness={"n": 2, "b": 1, "eta": 0.5},
                        figure=sharpness(1.0),
                    ),
                    seconds=2.1,
                ),
                run(
                    "control",
                    "two",
                    "refuted",
                    outcome(-0.031, n=40_000, counterexample="print(1)", figure=sharpness(1.25)),
                ),
                run("control", "unbiased", "refuted", outcome(-4.1e-4, n=40_000)),
            ],
            regime=r"quadratic loss, sampling without replacement, $1\le b\le n$",
            source="Theorem 1, equation (7)",
            blind_spot="dimensions above 16",
            controls={"two": r"$2$ replaced by $2.5$", "unbiased": "$n-1$ replaced by $n$"},
        ),
        claim(
            "sgd_stability",
            "T2'",
            "Gershgorin form",
            r"The matrix $A(\eta)=\mathbb{E}[(I-\eta H_i)\otimes(I-\eta H_i)]$ satisfies "
            r"$\rho(A)\ge\max_i(1-\eta\lambda_i)^2$.",
            "symbolic",
            [
                run("claim", None, "proved", outcome(0.0, validity="proof", note="reduced to zero by factoring")),
                run("control", "minus", "refuted", outcome(-2.0)),
            ],
            source="Proposition 2",
            controls={"minus": r"$\otimes$ replaced by the entrywise product $\odot$"},
        ),
        claim(
            "sgd_stability",
            "T3",
            "Constant of the descent bound",
            r"With $\beta=\tfrac12$: $f(x_{t+1})\le f(x_t)-\eta\,\beta\,\|\nabla f(x_t)\|^2$ for all $\eta\le 2/L$.",
            "bound",
            [
                run(
                    "claim",
                    None,
                    "refuted",
                    outcome(
                        -0.25,
                        tolerance=1e-14,
                        tightness=1.5,
                        n=900,
                        search=search,
                        witness={"x": 1.0, "eta": 2.0},
                        counterexample="x, L, eta = 1.0, 1.0, 2.0\ndescent = eta * 0.5 * (L * x) ** 2\n"
                        "assert (x - eta * L * x) ** 2 / 2 <= x**2 / 2 - descent  # 0.5 <= -0.5",
                    ),
                ),
                run("control", "quarter", "refuted", outcome(-0.4)),
                run("repair", "step", "holds", outcome(0.0, tolerance=1e-14, tightness=1.0)),
            ],
            expect="refuted",
            ok=True,
            reason="false as printed, as recorded: violated by 0.25 at step 2/L",
            source="Lemma 4",
            controls={"quarter": "claimed with 3/4 in place of 1/2"},
            repairs={"step": r"for all $\eta\le 1/L$ only"},
        ),
        claim(
            "sgd_stability",
            "E1",
            "Sharpness of trained networks",
            r"ResNet-18 trained with batch 8 ends at sharpness below $2/\eta$.",
            "trained",
            [run("claim", None, "not checkable", None, seconds=0.0, device="", dtype="", reason="needs CIFAR-10")],
            reason="needs CIFAR-10 and days of GPU time; the quadratic claims cover the mechanism",
        ),
    ]
    gbm = [
        claim(
            "gbm_diffusion",
            "T3",
            "Drift of the reverse process — Kolmogorov’s équation",
            r"In log space the reverse SDE has drift $\tfrac32\sigma^2\nabla\log p_t$; started from $p_T$ it ends with "
            r"$X_0\sim p_0$.",
            "statistical",
            [
                run(
                    "claim",
                    None,
                    "consistent",
                    outcome(
                        0.011,
                        log_e=-1.9,
                        n=20_000,
                        resolution=0.021,
                        validity="finite-sample",
                        paper_value=1.5,
                        our_value=1.496,
                        figure=law(0.0),
                    ),
                ),
                run("control", "half", "refuted", outcome(-0.4, log_e=812.0, n=20_000, figure=law(1.0))),
                run("control", "two", "refuted", outcome(-0.07, log_e=44.0, n=20_000, figure=law(-0.4))),
            ],
            source="Section 3.2, equation (12)",
            controls={"half": "factor 1/2", "two": "factor 2"},
        ),
        claim(
            "gbm_diffusion",
            "R1",
            "Strong order of the Milstein scheme",
            r"$\mathbb{E}|X_T-X_T^h|=\mathcal{O}(h)$ as $h\to0$.",
            "rate",
            [
                run(
                    "claim",
                    None,
                    "inconclusive",
                    outcome(
                        0.02,
                        resolution=0.6,
                        validity="asymptotic",
                        paper_value=1.0,
                        our_value=0.97,
                        undecided="the coarse steps are not asymptotic",
                        figure=order(),
                    ),
                ),
                run("control", "euler", "refuted", outcome(-0.5)),
            ],
            ok=False,
            reason="order 0.97 ± 0.60 does not exclude order 1/2",
            controls={"euler": "Euler's scheme"},
            budget="standard",
        ),
        claim(
            "gbm_diffusion",
            "T9",
            "Crash of the check",
            r"A formula that cannot be set: $\frac{1}{$ and $\unknowncommand{x}$.",
            "exact",
            [
                run(
                    "claim",
                    None,
                    "error",
                    None,
                    error='Traceback (most recent call last):\n  File "gbm.py", line 3\nValueError: <σ>',
                ),
                run("control", "half", "refuted", outcome(-0.1)),
            ],
            ok=False,
            reason="ValueError: <σ>",
            controls={"half": "half"},
        ),
    ]
    distill = [
        claim(
            "f_distill",
            "T5",
            f"Hostile {HOSTILE}",
            rf"Text {HOSTILE} & $\text{{{HOSTILE}}}$ costs \$5.",
            "exact",
            [
                run(
                    "claim",
                    None,
                    "refuted",
                    outcome(
                        -0.2,
                        n=10,
                        counterexample=HOSTILE,
                        witness=HOSTILE,
                        figure=figure(HOSTILE, bars={"labels": [HOSTILE, "b"], "values": [1.0, None]}),
                    ),
                ),
                run("control", HOSTILE, "holds", outcome(0.1), reason=HOSTILE),
            ],
            regime=HOSTILE,
            source=HOSTILE,
            blind_spot=HOSTILE,
            reason=HOSTILE,
            needs=[HOSTILE],
            controls={HOSTILE: HOSTILE},
        ),
        claim(
            "f_distill",
            "E2",
            "Distilled generator beats its baseline",
            "On two moons the FID-like distance is 0.12 against 0.31.",
            "trained",
            [
                run(
                    "claim",
                    None,
                    "reproduced",
                    outcome(
                        0.15,
                        n=5,
                        paper_value=0.12,
                        our_value=0.14,
                        figure=figure(
                            "Distance per seed",
                            y_label="distance",
                            bars={"labels": ["0", "1", "2", "3", "4"], "values": [0.13, 0.15, 0.12, 0.14, 0.16]},
                            hlines=[{"label": "baseline", "y": 0.31}],
                        ),
                    ),
                ),
                run("control", "untrained", "not reproduced", outcome(-0.9, n=5)),
            ],
            controls={"untrained": "generator left untrained"},
            needs=["gpu"],
            budget="standard",
        ),
        claim(
            "f_distill",
            "E3",
            "Larger teacher",
            "A larger teacher helps.",
            "trained",
            [run("claim", None, "not reproduced", outcome(-0.01, n=5))],
            ok=False,
            controls={"none": "no teacher"},
        ),
    ]
    papers = {
        "sgd_stability": {
            "title": "On the Dynamical Stability of SGD",
            "authors": "A. Müller, B. Çelik and 陈晨",
            "year": 2024,
            "venue": "NeurIPS",
            "arxiv": "2401.01234",
            "claims": ["T1", "T2'", "T3", "T4", "T5", "E1"],
            "note": "Numbers as in the second version.",
        },
        "gbm_diffusion": {
            "title": "Geometric Brownian Diffusion",
            "authors": "D. Ito",
            "year": 2025,
            "venue": "ICLR",
            "arxiv": "2502.00001",
            "claims": ["T3", "R1", "T9"],
            "note": "",
        },
        "f_distill": {
            "title": "One-Step Distillation by f-Divergences",
            "authors": "E. Author",
            "year": None,
            "venue": None,
            "arxiv": None,
            "claims": ["T5", "E2", "E3", "E4"],
            "note": None,
        },
    }
    return {
        "schema": "proofstone-report",
        "version": 1,
        "created": "2026-03-01T14:05:09+00:00",
        "complete": True,
        "settings": {
            "budget": "quick",
            "seed": 0,
            "suite_alpha": 1e-3,
            "statistical_items": 4,
            "alpha": 2.5e-4,
            "device": "default",
        },
        "environment": {
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "device": "cpu: cpu",
            "proofstone": "0.1.0",
            "commit": "0123456789ab",
            "packages": {"jax": "0.5.3", "numpy": "1.26.4", "matplotlib": "3.9.2"},
        },
        "papers": papers,
        "claims": [*sgd, *gbm, *distill],
    }


def ids(document: dict[str, Any]) -> list[str]:
    return [c["id"] for c in document["claims"]]


def half(document: dict[str, Any], papers: set[str], created: str) -> dict[str, Any]:
    part = copy.deepcopy(document)
    part["claims"] = [c for c in part["claims"] if c["paper"] in papers]
    part["papers"] = {stem: p for stem, p in part["papers"].items() if stem in papers}
    part["created"] = created
    return part


class Reader(html.parser.HTMLParser):
    """Collects what a browser would see and fails on elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page_text: str) -> Reader:
    reader = Reader()
    reader.feed(page_text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def rendered() -> str:
    pytest.importorskip("matplotlib")
    pytest.importorskip("latex2mathml")
    return report.to_html(sample())


# -- the document ---------------------------------------------------------------------------------------------------


def test_sample_fits_the_published_schema_and_a_broken_one_does_not():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(report.__file__).parent / "report_schema_v1.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert list(validator.iter_errors(sample())) == []
    broken = sample()
    del broken["claims"][0]["runs"][0]["verdict"]
    assert not validator.is_valid(broken)


def test_every_field_of_the_schema_is_documented():
    schema = json.loads((Path(report.__file__).parent / "report_schema_v1.json").read_text(encoding="utf-8"))
    words = (ROOT / "docs" / "report_schema.md").read_text(encoding="utf-8")
    named = [name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", ())]
    named += schema["$defs"]["verdict"]["enum"]
    assert len(named) > 60 and not [name for name in named if f"`{name}`" not in words]


def spoil(rng: random.Random, value: Any) -> None:
    """Delete or replace one entry somewhere in a document."""
    while True:
        inner = [v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, dict | list) and v]
        if not inner or rng.random() < 0.2:
            break
        value = rng.choice(inner)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and rng.random() < 0.3:
        del value[place]
    else:
        value[place] = rng.choice([None, True, 3, 2.5, "words", [], {}, ["words"], {"a": 1}, "holds"])


def test_our_check_and_an_independent_validator_agree_on_damaged_documents():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(report.__file__).parent / "report_schema_v1.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    rng, refused = random.Random(1), 0
    for _ in range(150):
        damaged = sample()
        spoil(rng, damaged)
        valid = validator.is_valid(damaged)
        refused += not valid
        if valid:
            report.check(damaged)
        else:
            with pytest.raises(ValueError, match=r"document (does not fit|is not a Proofstone|has report version)"):
                report.check(damaged)
    assert 0 < refused < 150


def test_check_names_the_place():
    document = sample()
    document["claims"][1]["runs"][0]["outcome"]["margin"] = "much"
    with pytest.raises(
        ValueError, match=r"claims\[1\]\.runs\[0\]\.outcome\.margin is str 'much', expected number or null"
    ):
        report.check(document)
    with pytest.raises(ValueError, match=r"claims\[0\]\.verdict is 'fine', expected one of proved, holds"):
        report.check({**sample(), "claims": [{**sample()["claims"][0], "verdict": "fine"}]})


def test_sanitize_makes_numbers_that_are_not_finite_null_and_says_so():
    document = sample()
    own = document["claims"][0]["runs"][0]
    own["outcome"] |= {"margin": math.nan, "tightness": np.float32(np.inf), "n": np.int64(7)}
    own["outcome"]["figure"]["lines"][0]["y"] = np.array([1.0, np.nan, -np.inf, np.nan, np.inf])
    document["claims"][0]["seconds"] = math.inf
    plain = report.sanitize(document)
    clean = plain["claims"][0]["runs"][0]
    assert clean["outcome"]["margin"] is None and clean["outcome"]["tightness"] is None
    assert type(clean["outcome"]["n"]) is int
    assert clean["outcome"]["figure"]["lines"][0]["y"] == [1.0, None, None, None, None]
    assert "outcome.margin (nan)" in clean["reason"] and "outcome.tightness (inf)" in clean["reason"]
    assert "2 more in outcome.figure.lines[0].y" in clean["reason"]
    assert "seconds (inf)" in plain["claims"][0]["reason"] and "margin" not in plain["claims"][0]["reason"]
    assert math.isnan(own["outcome"]["margin"]), "the original is left alone"
    json.dumps(plain, allow_nan=False)
    assert report.sanitize(plain) == plain


def test_sanitize_does_not_repeat_itself_when_a_stored_run_comes_back():
    once = report.sanitize({"reason": "fine", "outcome": {"margin": math.nan}})
    assert report.sanitize({**once, "outcome": {"margin": math.nan}}) == once


def test_a_document_survives_a_round_trip(tmp_path):
    document = sample()
    document["claims"][0]["reason"] = "odd file name \udcff, line\u2028separator, naïve 🙂"
    path = report.write_json(document, tmp_path / "r.json")
    assert report.read_json(path) == document
    assert report.write_json(report.read_json(path), tmp_path / "s.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "proofstone-report", "ver', "is not a JSON document"),
        ("[]", "its schema is 'list'"),
        ('{"schema": "other"}', "its schema is 'other', expected 'proofstone-report'"),
        ('{"schema": "proofstone-report", "version": 2}', "has report version 2; this release reads version 1"),
        ('{"schema": "proofstone-report", "version": 1}', "created is missing"),
        ('{"schema": "proofstone-report", "version": NaN}', "contains NaN"),
    ],
)
def test_read_json_refuses_what_is_not_a_report(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json.*{message}"):
        report.read_json(tmp_path / "x.json")


# -- merging and comparing ------------------------------------------------------------------------------------------


def test_halves_merge_to_the_whole_in_either_order():
    whole = report.merge([sample()])
    one = half(sample(), {"sgd_stability"}, "2026-03-01T10:00:00+00:00")
    two = half(sample(), {"gbm_diffusion", "f_distill"}, whole["created"])
    assert report.merge([one, two]) == whole == report.merge([two, one])
    assert sorted(ids(whole)) == sorted(ids(sample()))


def test_claims_of_one_paper_from_two_halves_stand_in_the_papers_order():
    one, two = sample(), sample()
    one["claims"], two["claims"] = one["claims"][1:3], [one["claims"][0], one["claims"][3]]
    assert ids(report.merge([one, two])) == [f"sgd_stability:{n}" for n in ("T1", "T2'", "T3", "E1")]


def test_of_a_claim_checked_twice_the_later_result_stays():
    old, new = sample(), half(sample(), {"sgd_stability"}, "2026-03-02T00:00:00+00:00")
    new["claims"][0]["reason"] = "newer"
    for order_ in ([old, new], [new, old]):
        merged = report.merge(order_)
        assert next(c for c in merged["claims"] if c["id"] == "sgd_stability:T1")["reason"] == "newer"
        assert merged["created"] == new["created"]


def test_merge_keeps_both_machines_and_incompleteness():
    one, two = sample(), half(sample(), {"f_distill"}, "2026-03-02T00:00:00+00:00")
    two["environment"] = {**two["environment"], "device": "gpu: H100", "packages": {"jax": "0.11.0", "numpy": "1.26.4"}}
    two["complete"] = False
    merged = report.merge([one, two])
    assert merged["environment"]["device"] == "cpu: cpu / gpu: H100"
    assert merged["environment"]["packages"] == {"jax": "0.5.3 / 0.11.0", "numpy": "1.26.4", "matplotlib": "3.9.2"}
    assert merged["complete"] is False
    assert report.merge([merged, one]) == merged


def test_merge_refuses_settings_that_differ_and_names_them():
    other = sample()
    other["settings"] |= {"seed": 5, "budget": "deep"}
    with pytest.raises(ValueError, match=r"different settings \(budget: 'deep', 'quick'; seed: 0, 5\)"):
        report.merge([sample(), other])
    with pytest.raises(ValueError, match="no documents"):
        report.merge([])


def test_parts_that_each_spent_the_whole_allowance_say_so():
    one = half(sample(), {"gbm_diffusion"}, "2026-03-01T00:00:00+00:00")
    two = half(sample(), {"f_distill"}, "2026-03-02T00:00:00+00:00")
    for part, level in ((one, 1e-3), (two, 5e-4)):
        part["settings"] |= {"alpha": level, "statistical_items": round(1e-3 / level)}
        for c in part["claims"]:
            for r in c["runs"]:
                r["alpha"] = level
    merged = report.merge([one, two])
    # two random claims in either half came to a result
    assert merged["settings"]["alpha"] is None and merged["settings"]["statistical_items"] == 4
    assert report.false_alarm_bound(merged) == pytest.approx(2 * 1e-3 + 2 * 5e-4, rel=1e-12)
    assert "0.001 in each part" in report.to_html(merged)
    assert report.merge([merged, two]) == merged


def test_compare_reports_what_changed_and_nothing_else():
    before, after = sample(), sample()
    assert report.compare(after, before) == []
    after["claims"][0]["runs"][0]["outcome"] |= {"margin": 1e-9, "tightness": 0.98}
    after["claims"][1]["verdict"] = "error"
    after["claims"][4]["runs"][1]["verdict"] = "consistent"
    after["claims"][4]["runs"][0]["outcome"]["margin"] = 0.009  # was 0.011: no news
    before["claims"].append({**before["claims"][5], "id": "gbm_diffusion:R2", "number": "R2"})
    assert report.compare(after, before) == [
        ("sgd_stability:T1", "claim", "margin", 3.2e-6, 1e-9),
        ("sgd_stability:T1", "claim", "tightness", 0.99968, 0.98),
        ("sgd_stability:T2'", "claim", "verdict", "proved", "error"),
        ("gbm_diffusion:T3", "control half", "verdict", "refuted", "consistent"),
        ("gbm_diffusion:R2", "claim", "verdict", "inconclusive", None),
    ]


def test_a_margin_that_moves_within_its_tolerance_or_resolution_is_no_news():
    before, after = sample(), sample()
    before["claims"][0]["runs"][0]["outcome"]["margin"] = 1e-13
    after["claims"][0]["runs"][0]["outcome"]["margin"] = 2e-14
    after["claims"][4]["runs"][0]["outcome"]["margin"] = -0.009  # was 0.011, resolution 0.021
    assert report.compare(after, before) == []


# -- files ----------------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_trouble_while_writing_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, trouble, step):
    target = tmp_path / "report.html"
    report.write_atomically(target, "earlier")

    def fail(*_: Any) -> None:
        raise trouble

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(trouble)) as caught:
        report.write_atomically(target, "later")
    assert target.read_text() == "earlier" and leftovers(tmp_path) == ["report.html"]
    if isinstance(trouble, OSError):
        assert "report.html" in str(caught.value) and caught.value.errno == errno.ENOSPC


def test_a_file_system_that_takes_no_more_bytes_leaves_the_earlier_file(tmp_path):
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_FSIZE is not None
    script = f"""
        import resource, signal
        from paper_checks.harness import report
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        report.write_atomically({str(tmp_path / "a")!r}, "earlier")
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            report.write_atomically({str(tmp_path / "a")!r}, "x" * 1_000_000)
        except OSError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "cannot write" in done.stdout
    assert (tmp_path / "a").read_text() == "earlier" and leftovers(tmp_path) == ["a"]


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path):
    target = tmp_path / "a.json"
    script = f"""
        import json, itertools
        from paper_checks.harness import report
        texts = [json.dumps([digit] * 400_000) for digit in (1, 2)]
        for text in itertools.cycle(texts):
            report.write_atomically({str(target)!r}, text)
            print("written", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(json.loads(target.read_text())) == 400_000


def test_a_link_stays_a_link_and_permissions_follow_the_umask(tmp_path):
    (tmp_path / "real").write_text("earlier")
    (tmp_path / "link").symlink_to("real")
    report.write_atomically(tmp_path / "link", "later")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "later"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_ensure_writable(tmp_path):
    folder = report.ensure_writable(tmp_path / "new" / "deep")
    assert folder.is_dir() and leftovers(folder) == []
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write to the report folder .*file.*choose another"):
            report.ensure_writable(taken)


def test_ensure_writable_in_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root, as whom tests may run, is never refused by the system
    with pytest.raises(PermissionError, match=r"cannot write to the report folder .* \(Permission denied\)"):
        report.ensure_writable(tmp_path)


@pytest.mark.slow
def test_write_report_writes_both_files(tmp_path):
    pytest.importorskip("matplotlib")
    where = report.write_report(sample(), tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["report.html", "report.json"]
    assert where == tmp_path / "out" / "report.html"
    assert report.to_html(report.read_json(tmp_path / "out" / "report.json")) == where.read_text(encoding="utf-8")


# -- a report where another one lies --------------------------------------------------------------------------------


def part(numbers: list[str], created: str = "2027-01-01T00:00:00+00:00", **parts: Any) -> dict[str, Any]:
    """The sample's claims of those ids, run again later and all in 7 seconds."""
    document = sample()
    claims = [{**c, "seconds": 7.0} for c in document["claims"] if c["id"] in numbers]
    return {**document, "created": created, "claims": claims, **parts}


def test_a_part_made_alike_renews_its_claims_and_keeps_the_rest(tmp_path):
    assert report.joined(part([]), tmp_path, []) == (part([]), "")
    report.write_json(sample(), tmp_path / "report.json")
    first, *others = ids(sample())
    whole, sentence = report.joined(part([first]), tmp_path, [first])
    assert sorted(ids(whole)) == sorted(ids(sample())) and whole["complete"]
    assert [c["id"] for c in whole["claims"] if c["seconds"] == 7.0] == [first]
    assert f"keeps {len(others)} other claims" in sentence
    stopped = part([first], complete=False)
    assert report.joined(stopped, tmp_path, ["sgd_stability:new"])[0]["complete"] is False


def test_a_claim_of_which_a_part_ran_well_does_not_take_the_place_of_the_whole(tmp_path):
    report.write_json(sample(), tmp_path / "report.json")
    name = next(c["id"] for c in sample()["claims"] if c["ok"] and c["controls"] and len(c["runs"]) > 1)
    for ok in (True, False):
        partial = part([name])
        partial["claims"][0] |= {"ok": ok, "runs": partial["claims"][0]["runs"][:1]}
        whole = report.joined(partial, tmp_path, [name])[0]
        assert next(c["seconds"] == 7.0 for c in whole["claims"] if c["id"] == name) is not ok


@pytest.mark.parametrize(
    ("earlier", "why"),
    [
        ({"settings": {**sample()["settings"], "seed": 5}}, "other seed"),
        ({"environment": {**sample()["environment"], "python": "3.14.0"}}, "other environment"),
        ({"complete": False}, "it was interrupted"),
        ({"version": 99}, "has report version 99"),
    ],
)
def test_a_report_made_otherwise_is_replaced_and_that_is_said(tmp_path, earlier, why):
    (tmp_path / "report.json").write_text(json.dumps(report.sanitize({**sample(), **earlier})), encoding="utf-8")
    new = report.sanitize(part(ids(sample())[:1]))
    written, sentence = report.joined(new, tmp_path, ids(new))
    assert written == new and "the earlier report" in sentence and "was replaced" in sentence and why in sentence


def test_a_device_is_never_replaced_by_a_file():
    with pytest.raises(OSError, match="not a regular file"):
        report.write_atomically("/dev/null", "text")
    assert not Path("/dev/null").is_file()


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_asks_for_nothing(rendered):
    reader = read(rendered)
    assert reader.tags[0] == ("html", {"lang": "en"})
    active = {"script", "link", "iframe", "img", "object", "embed", "form", "base", "image"}
    assert not active & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "src" not in attributes
    assert not re.search(r"url\((?!#)|@import", rendered)
    # the only address is the name of the MathML language, which nothing fetches
    assert set(re.findall(r"https?://[^\"<\s]+", rendered)) <= {"http://www.w3.org/1998/Math/MathML"}


def test_everything_that_came_from_outside_is_escaped(rendered):
    assert "<script" not in rendered
    assert rendered.count("&lt;script&gt;") > 10


def test_identifiers_are_unique_and_every_reference_has_its_target(rendered):
    reader = read(rendered)
    names = [a["id"] for _, a in reader.tags if a.get("id")]
    assert len(names) == len(set(names))
    references = re.findall(r'href="#([^"]+)"', rendered) + re.findall(r"url\(#([^)]+)\)", rendered)
    assert references and set(references) <= set(names)


def test_headings_descend_one_step_at_a_time_and_tables_have_heads(rendered):
    reader = read(rendered)
    assert reader.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False))
    assert all(a.get("scope") in ("col", "row") for tag, a in reader.tags if tag == "th")
    pictures = [a for tag, a in reader.tags if tag == "svg"]
    assert len(pictures) > 8 and all(a.get("aria-label") for a in pictures)


def test_every_claim_shows_its_verdict_controls_and_rerun_command(rendered):
    for c in sample()["claims"]:
        start = rendered.index(f'id="claim-{page.slug("x", c["id"])[2:]}"')
        section = rendered[start : rendered.index("</article>", start)]
        shown = "refuted as recorded" if c["expect"] == "refuted" else c["verdict"]
        assert re.search(rf'class="chip [a-z]+"><span aria-hidden="true">.</span> {shown}<', section)
        for name in (*c["controls"], *c["repairs"]):
            assert page.e(name) in section
        if any(r["outcome"] for r in c["runs"]):
            assert "paper-checks run" in section and "--budget quick --seed 0" in section
    assert "paper-checks run sgd_stability:T3 --budget quick --seed 0<" in rendered
    assert "paper-checks run gbm_diffusion:T3 --budget quick --seed 0 --suite-alpha 0.00025<" in rendered
    assert "slipped through" in rendered


def test_findings_errors_and_missing_claims_are_shown(rendered):
    words = " ".join(read(rendered).text)
    findings = rendered[rendered.index('id="findings"') : rendered.index("</section>", rendered.index('id="findings"'))]
    assert "What holds instead" in findings and "f_distill" not in findings
    assert 'href="#claim-sgd_stability.3a.T3">Evidence and counterexample' in findings
    assert rendered.count("descent = eta * 0.5") == 1
    assert "ValueError: <σ>" in words
    assert "4 claims did not come out as recorded" in words
    unchecked = rendered[rendered.index('id="unchecked"') :]
    assert "T4, T5" in unchecked and "E4" in unchecked


def test_formulas_are_mathml_and_those_that_cannot_be_are_source(rendered):
    assert rendered.count("<math") > 15
    assert r'<code class="latex">$\frac{1}{$</code>' in rendered
    assert r'<code class="latex">$\unknowncommand{x}$</code>' in rendered
    assert "costs $5" in rendered


def test_a_negative_margin_is_called_violated_only_where_it_is():
    pytest.importorskip("matplotlib")
    shown = {}
    for kind, margin, tolerance in (("bound", -1e-3, 1e-9), ("bound", -1e-10, 1e-9), ("statistical", -1e-3, 0.0)):
        own = run("claim", None, "holds", outcome(margin, tolerance=tolerance))
        record = claim("p", "T1", "t", "s", kind, [own])
        words = re.search(r"<dt>Margin</dt><dd>.*?\((.*?)\)</dd>", report.claim_html(record))
        assert words is not None
        shown[kind, margin] = words[1]
    assert list(shown.values()) == ["violated", "zero within the tolerance", "estimated"]


@pytest.mark.slow
def test_an_interrupted_run_a_selection_and_an_empty_one_say_so():
    def state(**parts: Any) -> str:
        shown = report.to_html({**sample(), **parts})
        return shown[shown.index('<p class="state') :].split("</p>")[0]

    assert "interrupted" in state(complete=False, claims=[])
    assert "interrupted" in state(complete=False) and "not selected" not in state(complete=False)
    absent = sum(len(p["claims"]) for p in sample()["papers"].values()) - len(sample()["claims"])
    assert f"{absent} more claims of the same papers: not selected" in state() and "interrupted" not in state()
    every = {s: {**p, "claims": [c["number"] for c in sample()["claims"] if c["paper"] == s]}
             for s, p in sample()["papers"].items()}  # fmt: skip
    assert "not selected" not in state(papers=every)
    empty = read(report.to_html({**sample(), "claims": [], "papers": {}}))
    assert "Nothing was run" in " ".join(empty.text)


def test_minus_zero_is_zero():
    assert markup.number(-0.0) == "0" and markup.quoted(-0.0) == "0" and markup.number(-0.5) == "−0.5"


@pytest.mark.slow
def test_the_false_alarm_promise_is_of_tested_claims_and_names_asymptotic_ones(rendered):
    def promise(shown: str) -> str:
        return shown[shown.index("<dt>False alarm</dt>") :].split("</div>")[0]

    document = sample()
    for c in document["claims"]:
        for r in c["runs"]:
            if r["outcome"]:
                r["outcome"]["validity"] = "exact"
    assert "any true one of the claims decided by a test" in promise(rendered)
    assert "asymptotic" not in promise(report.to_html(document))
    loose = next(c for c in document["claims"] if c["kind"] in LEDGER_KINDS and c["runs"][0]["outcome"])
    loose["runs"][0]["outcome"]["validity"] = "asymptotic"
    shown = promise(report.to_html(document))
    assert re.search(rf"only asymptotically for <a [^>]*>{loose['id']}<", shown)


def test_what_became_of_a_control_is_said_as_it_is():
    failed = run("control", "broken", "error", None, caught=False, error="ValueError")
    vague = run("control", "vague", "inconclusive", outcome(0.1), caught=False)
    own = run("claim", None, "holds", outcome(0.1))
    words = {"broken": r"$\eta$ halved", "vague": "B <= 2", "absent": "c"}
    shown = report.claim_html(claim("p", "T1", "t", "s", "bound", [own, failed, vague], controls=words))
    assert "✗ raised an error" in shown and "✗ not decided" in shown and "slipped through" not in shown
    assert "<math" in shown and "B ≤ 2" in shown


def test_a_search_without_range_has_no_figure():
    pytest.importorskip("matplotlib")
    shown = []
    for top in (1 + 1e-12, 1.2):
        line = {"label": "worst so far", "x": [1, 9], "y": [1.0, top], "style": "step"}
        own = run("claim", None, "holds", outcome(0.0, figure=figure("Search", lines=[line])))
        shown.append("<svg" in report.claim_html(claim("p", "T1", "t", "s", "bound", [own])))
    assert shown == [False, True]


def test_changes_since_an_earlier_report_are_listed(rendered):
    before = sample()
    before["claims"][0]["runs"][0]["outcome"]["margin"] = 0.5
    before["settings"]["seed"] = 9
    shown = report.to_html(sample(), before)
    assert "seed 9 then, 0 now" in shown and "<td>margin</td><td>0.5</td>" in shown
    assert 'id="changes"' not in rendered


def test_the_same_document_gives_the_same_page(rendered):
    assert report.to_html(sample()) == rendered


def test_without_matplotlib_and_latex2mathml_the_page_still_comes(monkeypatch):
    for name in ("matplotlib", "latex2mathml", "latex2mathml.converter"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(page, "_can_draw", lambda: False)
    shown = report.to_html(sample())
    assert shown.count("matplotlib is not installed") == 1 and "<svg" not in shown and "<math" not in shown
    assert '<code class="latex">$2/\\eta$</code>' in shown
    read(shown)


def test_a_figure_that_cannot_be_drawn_costs_only_itself():
    pytest.importorskip("matplotlib")
    document = sample()
    document["claims"][0]["runs"][0]["outcome"]["figure"]["lines"][0]["x"] = [1.0]
    shown = report.to_html(document)
    assert (
        shown.count("This figure could not be drawn: draw: line &#x27;measured&#x27; has 1 values of x and 15 of y")
        == 1
    )


def test_one_claim_as_a_fragment_keeps_its_style_to_itself():
    pytest.importorskip("matplotlib")
    shown = report.claim_html(sample()["claims"][0])
    read(shown)
    style = re.search(r"<style>(.*?)</style>", shown, re.DOTALL)
    assert style is not None
    selectors = re.sub(r"\{[^{}]*\}", "{}", re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style[1], flags=re.DOTALL))
    assert all(s.strip().startswith(".proofstone") for s in re.split(r"\{\}|,", selectors) if s.strip())


# -- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latex", [r"\text{<b onclick=x>}", r"\href{javascript:x}{y}", r"\style{a:url(b)}{c}", r"\class{d}{e}"]
)
def test_formulas_cannot_carry_markup(latex):
    pytest.importorskip("latex2mathml")
    for tag, attributes in read(mathml.formula(latex)).tags:
        assert tag in {"math", "mrow", "mi", "mo", "mn", "mtext"}
        assert not {"href", "style", "class", "onclick"} & set(attributes)


def test_letters_that_browsers_do_not_style_come_as_unicode():
    pytest.importorskip("latex2mathml")
    shown = mathml.formula(r"\mathbb E \boldsymbol\theta \mathfrak C \mathscr L \mathbb{1}")
    assert all(letter in shown for letter in "𝔼𝜽ℭℒ𝟙")


def test_long_formulas_can_break_before_relations_only_outside_brackets():
    pytest.importorskip("latex2mathml")
    shown = mathml.formula(r"\sum_{i=1}^{n} f(x_i = y_i) \le \Bigl( a = b \Bigr)^2 + \max_{k=1,\dots,n} g_k = 0")
    assert shown.count("<wbr>") == 2
    assert mathml.formula("a = b").count("<wbr>") == 0


# -- figures --------------------------------------------------------------------------------------------------------


def test_draw_says_what_is_wrong_with_a_spec():
    pytest.importorskip("matplotlib")
    line = {"label": "a", "x": [1], "y": [1]}
    for spec, message in [
        ({"title": "t", "x_scale": "cubic"}, "x_scale is 'cubic'; known are linear, log, symlog"),
        ({"title": "t", "lines": [{**line, "style": "wavy"}]}, "line 'a' has style 'wavy'"),
        ({"title": "t", "bars": {"labels": ["a"], "values": [1, 2]}}, "bars has 1 labels and 2 values"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            figures.draw(spec)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
@pytest.mark.parametrize("values", [[], [None, None, None], [0.0, -1.0, None], [1e-300, 1e300, 3.0], [2.0, 2.0, 2.0]])
def test_draw_takes_any_numbers_on_any_scale(scale, values):
    pytest.importorskip("matplotlib")
    lines = [{"label": r"$\frac{", "x": values, "y": values, "style": style} for style in figures.STYLES]
    spec = {
        "title": "$unfinished",
        "x_scale": scale,
        "y_scale": scale,
        "lines": lines,
        "hlines": [{"label": "_h", "y": None}],
    }
    assert figures.svg(figures.draw(spec)).startswith("<svg")


def test_draw_shows_the_data_it_is_given():
    pytest.importorskip("matplotlib")
    (axes,) = figures.draw(sharpness(1.25)).axes
    measured, claimed = axes.lines[:2]
    spec = sharpness(1.25)["lines"]
    np.testing.assert_array_equal(measured.get_ydata(), spec[0]["y"])
    np.testing.assert_array_equal(claimed.get_ydata(), spec[1]["y"])
    assert axes.get_xlabel() == r"step $\eta\lambda/2$"


def test_overview_puts_controls_and_claims_at_their_margins():
    pytest.importorskip("matplotlib")
    tight, margins = figures.overview(sample()["claims"][:4]).axes
    assert [b.get_width() for b in tight.patches] == [0.99968, 1.0]
    shown = {c.get_label(): sorted(map(tuple, np.asarray(c.get_offsets()).tolist())) for c in margins.collections}
    assert shown["claim"] == [(-0.25, 2.0), (0.0, 1.0), (3.2e-6, 0.0)]
    assert shown["negative control"] == [(-2.0, 1.0), (-0.4, 2.0), (-0.031, 0.0), (-4.1e-4, 0.0)]
    assert margins.get_xscale() == "symlog"
    (alone,) = figures.overview(sample()["claims"][4:5]).axes  # no tightness: the margins have the width to themselves
    assert [(b.get_x(), b.get_width()) for b in alone.patches] == [(0.0, -0.021)]


def test_overview_shows_the_tolerance_and_does_not_resolve_what_is_below_it():
    pytest.importorskip("matplotlib")
    own = run("claim", None, "holds", outcome(-4e-16, tolerance=1e-7))
    wrong = run("control", "wrong", "refuted", outcome(-0.05, tolerance=1e-7), caught=True)
    (margins,) = figures.overview([claim("p", "T1", "t", "s", "bound", [own, wrong])]).axes
    assert [(b.get_x(), b.get_width()) for b in margins.patches] == [(0.0, -1e-7)]
    assert margins.xaxis.get_transform().linthresh == pytest.approx(0.01)  # so -4e-16 stands at zero
    assert "any grey band" in margins.get_xlabel()


def test_ticks_have_no_offset():
    pytest.importorskip("matplotlib")
    drawn = figures.draw(figure("t", lines=[{"label": "a", "x": [0, 1], "y": [1.0, 1.0 + 1e-7], "style": "line"}]))
    figures.svg(drawn)
    assert drawn.axes[0].yaxis.get_offset_text().get_text() == ""


def test_figures_leave_matplotlib_settings_and_pyplot_alone():
    matplotlib = pytest.importorskip("matplotlib")
    loaded = "matplotlib.pyplot" in sys.modules
    settings = [name for name in matplotlib.rcParams if name != "backend"]  # to read "backend" is to choose one
    before = [matplotlib.rcParams[name] for name in settings]
    with matplotlib.rc_context({"font.size": 31, "axes.grid": False}):
        mine = figures.svg(figures.draw(law(0.0)))
        assert matplotlib.rcParams["font.size"] == 31
    assert [matplotlib.rcParams[name] for name in settings] == before
    assert mine == figures.svg(figures.draw(law(0.0)))
    assert ("matplotlib.pyplot" in sys.modules) is loaded


def test_two_figures_on_one_page_do_not_share_identifiers():
    pytest.importorskip("matplotlib")
    one, two = (figures.svg(figures.draw(law(0.0)), prefix=prefix) for prefix in ("a-", "b-"))
    names = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert names[0] and not names[0] & names[1]
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', one)) == names[0]
    assert "<?xml" not in one and "<style" not in one and "http" not in one


def test_nothing_heavy_is_imported_until_it_is_needed():
    script = "import sys; from paper_checks import figures; from paper_checks.harness import report, page; "
    script += "print(sorted({'matplotlib', 'latex2mathml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
