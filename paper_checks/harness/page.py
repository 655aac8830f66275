"""The report document as one HTML page: no script, no request, everything it needs inside.

`page` lays out the whole document, `fragment` one claim; both take documents that `report.check` has accepted.
Whatever comes from a document is escaped, by the functions of `markup` or by `mathml.text`.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from paper_checks.harness.claim import LEDGER_KINDS
from paper_checks.harness.markup import (
    CHIPS,
    chip,
    count,
    duration,
    e,
    facts,
    level,
    moment,
    number,
    quoted,
    shortened,
    slug,
    table,
    tightness_bar,
)
from paper_checks.harness.mathml import text
from paper_checks.harness.stylesheet import FRAGMENT, PAGE

Record = Mapping[str, Any]
NO_MATPLOTLIB = "Figures are left out: matplotlib is not installed where this page was written."


def page(document: Record, previous: Record | None, changes: Sequence[Any] | None, false_alarm: float) -> str:
    """The whole page.  `changes` are those since `previous`; `false_alarm` bounds the chance of a false refutation."""
    claims: Sequence[Record] = document["claims"]
    stems = dict.fromkeys([*document["papers"], *(c["paper"] for c in claims)])
    papers = {stem: document["papers"].get(stem) or _undescribed(stem) for stem in stems}
    grouped = {stem: [c for c in claims if c["paper"] == stem] for stem in stems}
    parts = [
        _header(document, false_alarm),
        "" if _can_draw() else f'<p class="notice">{NO_MATPLOTLIB}</p>',
        _summary(papers, grouped),
        _changes(document, previous, changes),
        _findings(claims),
        *(_paper(stem, papers[stem], grouped[stem]) for stem in stems if grouped[stem]),
        _unchecked(papers, grouped),
        _environment(document),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Claim report, {moment(document['created'])}</title>\n<style>\n{PAGE}\n{FRAGMENT}</style>\n</head>\n"
        f'<body class="proofstone">\n<main>\n{"".join(parts)}</main>\n</body>\n</html>\n'
    )


def fragment(claim: Record) -> str:
    """One claim with the style that it needs, to stand in a notebook."""
    return f'<div class="proofstone"><style>{FRAGMENT}</style>{_claim(claim)}</div>'


# -- parts of the page ----------------------------------------------------------------------------------------------


def _header(document: Record, false_alarm: float) -> str:
    settings, environment, claims = document["settings"], document["environment"], document["claims"]
    alarm = f"probability at most {number(false_alarm)} that any true one of the claims decided by a test is refuted"
    if false_alarm > settings["suite_alpha"] * (1 + 1e-9):  # merged parts that each spent the whole allowance
        alarm += f" ({number(settings['suite_alpha'])} in each part)"
    if loose := [c for c in claims if _asymptotic(c)]:
        alarm += f"; only asymptotically for {', '.join(_link(c) for c in loose)}"
    version = [v for v in (environment["proofstone"], environment["commit"]) if v]
    pairs = [
        ("Run", moment(document["created"])),
        ("Budget", f"{e(settings['budget'])}, seed {e(settings['seed'])}"),
        ("Device", e(environment["device"])),
        ("False alarm", alarm),
        ("Random claims", f"{e(settings['statistical_items'])}, {level(settings['alpha'])}"),
        ("Proofstone", e(", commit ".join(version))),
    ]
    papers = count(len({c["paper"] for c in claims}), "paper")
    lead = f"{count(len(claims), 'claim')} of {papers}, each checked beside falsified versions of itself."
    return (
        f'<header><h1>Claim report</h1><p class="lead">{lead}</p>{_state(document, _absent(document))}'
        f'<div class="columns">{facts(pairs)}</div></header>\n'
    )


def _state(document: Record, absent: int) -> str:
    claims = document["claims"]
    wrong = [c for c in claims if not c["ok"]]
    if wrong:
        kind, links = "bad", ", ".join(f"{_link(c)} ({e(_verdict(c))})" for c in wrong)
        words = f"<strong>✗ {count(len(wrong), 'claim')} did not come out as recorded:</strong> {links}."
    elif not claims:
        kind, words = "doubt", "<strong>? Nothing was run.</strong>"
    else:
        kind, words = "good", "<strong>✓ Every claim came out as recorded.</strong>"
    if undecided := sum(c["verdict"] in ("inconclusive", "not checkable") and c["ok"] for c in claims):
        words += f" {count(undecided, 'claim')} could not be decided here, for the reason given with each."
    if not document["complete"]:
        kind = "doubt" if kind == "good" else kind
        words += " <strong>The run was interrupted: a part of what was selected is missing.</strong>"
    elif absent and claims:
        words += f" {count(absent, 'more claim')} of the same papers: not selected, or without a check so far."
    return f'<p class="state {kind}">{words}</p>'


def _summary(papers: Record, grouped: Mapping[str, Sequence[Record]]) -> str:
    counts = {stem: _tally(papers[stem], claims) for stem, claims in grouped.items()}
    columns = [v for v in [*CHIPS, "not here"] if any(v in c for c in counts.values())]
    head = "".join(f'<th scope="col">{chip(v) if v in CHIPS else e(v)}</th>' for v in columns)
    rows = []
    for stem, tally in counts.items():
        cells = "".join(f"<td>{tally.get(v) or '<span class=nil>·</span>'}</td>" for v in columns)
        title = e(papers[stem]["title"])
        label = f'<a href="#{slug("paper", stem)}">{title}</a>' if grouped[stem] else title
        rows.append(f'<tr><th scope="row">{label}</th>{cells}<td>{sum(tally.values())}</td></tr>')
    totals = [sum(tally.get(v, 0) for tally in counts.values()) for v in columns]
    foot = "".join(f"<td>{total}</td>" for total in [*totals, sum(totals)])
    return (
        '<section><h2 id="summary">Summary</h2><div class="wide"><table class="counts">'
        f'<thead><tr><th scope="col">Paper</th>{head}<th scope="col">all</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>"
        f'<tfoot><tr><th scope="row">All papers</th>{foot}</tr></tfoot></table></div></section>\n'
    )


def _changes(document: Record, previous: Record | None, changes: Sequence[Any] | None) -> str:
    if previous is None or changes is None:
        return ""
    then, now = previous["settings"], document["settings"]
    names = [name for name in ("budget", "seed", "device") if then[name] != now[name]]
    differing = [f"{name} {then[name]} then, {now[name]} now" for name in names]
    alike = f" ({e('; '.join(differing))})." if differing else ", made with the same budget, seed and device."
    known = {c["id"]: c for c in document["claims"]}
    rows = []
    for change in changes:
        name = _link(known[change.claim]) if change.claim in known else e(change.claim)
        cells = (e(change.run), e(change.what), _then_or_now(change.before), _then_or_now(change.after))
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    body = "<p>No verdict changed, and no margin or tightness shrank noticeably.</p>"
    if rows:
        body = table(("Claim", "Run", "What", "Before", "Now"), rows)
    return (
        f'<section><h2 id="changes">Changes</h2><p>Compared with the report of {moment(previous["created"])}{alike}</p>'
        f"{body}</section>\n"
    )


def _findings(claims: Sequence[Record]) -> str:
    found = [c for c in claims if _verdict(c) == "refuted as recorded"]
    if not found:
        return ""
    entries = []
    for claim in found:
        repairs = []
        for name, words in claim["repairs"].items():
            run = _run(claim, "repair", name)
            became = f"{e(run['verdict'])}, margin {number(_outcome(run).get('margin'))}" if run else "not run"
            repairs.append(f"<li>{text(words)} ({became})</li>")
        instead = f"<h4>What holds instead</h4><ul>{''.join(repairs)}</ul>" if repairs else ""
        code = _outcome(_run(claim, "claim")).get("counterexample")
        where = f"<p>{_link(claim, 'Evidence and counterexample' if code else 'Evidence')}</p>"
        entries.append(
            f"<article><h3>{_link(claim)} {text(claim['title'])}</h3>"
            f'<p class="statement">{text(claim["statement"])}</p>{instead}{where}</article>'
        )
    does = "does" if len(found) == 1 else "do"
    return (
        f'<section><h2 id="findings">Findings</h2><p>{count(len(found), "statement")} {does} not hold as stated, '
        f"and this run confirms it.</p>{''.join(entries)}</section>\n"
    )


def _paper(stem: str, paper: Record, claims: Sequence[Record]) -> str:
    about = ", ".join(e(part) for part in (paper["authors"], paper["venue"], paper["year"]) if part)
    about += f', <span class="nobr">arXiv {e(paper["arxiv"])}</span>' if paper["arxiv"] else ""
    note = f"<p>{text(paper['note'])}</p>" if paper["note"] else ""
    rows = []
    for c in claims:
        outcome = _outcome(_run(c, "claim"))
        caught = [bool(r["caught"]) for r in c["runs"] if r["role"] == "control"]
        cells = (
            text(c["title"]),
            e(c["kind"]),
            chip(_verdict(c)),
            number(outcome.get("margin")),
            tightness_bar(outcome.get("tightness")),
            f"{sum(caught)} of {len(c['controls'])}" if caught else "–",
            duration(c["seconds"]),
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_link(c, c["number"])}</th>{row}</tr>')
    heads = ("No.", "Claim", "Kind", "Verdict", "Margin", "Tightness", "Caught", "Time")
    figure = ""
    if any(_outcome(r).get("margin") is not None for c in claims for r in c["runs"]):
        label = f"Tightness and margins of the claims of {paper['title']}, beside those of their controls"
        caption = (
            "Tightness and margin of each claim, beside the margins of its controls, which must be clearly negative. "
            "A margin in a grey band cannot be told from zero: it lies within the tolerance, or the samples are too few."
        )
        figure = _figure({"overview": claims}, slug("overview", stem), label, caption)
    return (
        f'<section class="paper"><h2 id="{slug("paper", stem)}">{e(paper["title"])}</h2>'
        f'<p class="about">{about}</p>{note}'
        f"{table(heads, rows, 'index')}{figure}{''.join(_claim(c) for c in claims)}</section>\n"
    )


def _claim(claim: Record) -> str:
    own = _run(claim, "claim")
    reason = f'<p class="reason">{e(claim["reason"])}</p>' if claim["reason"] else ""
    figure = _run_figure(claim, own, f"{claim['number']}: {claim['title']}")
    body = f'<div class="beside">{figure}{facts(_facts(claim, own))}</div>'
    again = ""
    if any(run["outcome"] or run["error"] for run in claim["runs"]):
        again = f'<p class="rerun">Run it again: <code>{e(_command(claim, own))}</code></p>'
    errors = []
    for run in claim["runs"]:
        if run["error"]:
            where = f"Error in {run['role']} {run['name']}" if run["name"] else "Error"
            errors.append(f"<h4>{e(where)}</h4><pre>{e(run['error'])}</pre>")
    return (
        f'<article class="claim" id="{slug("claim", claim["id"])}"><h3><span class="no">{e(claim["number"])}</span> '
        f'{text(claim["title"])} {chip(_verdict(claim))}</h3><p class="statement">{text(claim["statement"])}</p>'
        f"{reason}{body}{_others(claim)}{_counterexample(own)}{''.join(errors)}"
        f"{again}</article>\n"
    )


def _facts(claim: Record, own: Record | None) -> list[tuple[str, str]]:
    """What there is to say of a claim and its own run, as labels and HTML; what is absent is left out."""
    run, outcome = own or {}, _outcome(own)
    margin, tolerance, tightness = (outcome.get(name) for name in ("margin", "tolerance", "tightness"))
    why = text(outcome.get("tolerance_reason") or "")
    values = [quoted(outcome.get(name)) for name in ("paper_value", "our_value")]
    where = [e(run[name]) for name in ("device", "dtype") if run.get(name)]
    if outcome:
        where += [f"budget {e(run['budget'])}", f"seed {e(run['seed'])}", f"{duration(claim['seconds'])} with controls"]
    resolution = outcome.get("resolution")
    found = [
        ("Regime", text(claim["regime"] or "")),
        ("Kind", e(claim["kind"])),
        ("Source", text(claim["source"] or "")),
        ("Searched", _searched(outcome)),
        ("Margin", "" if margin is None else number(margin) + _sign(claim, margin, tolerance)),
        ("Tolerance", f"{number(tolerance)}{', ' if why else ''}{why}" if tolerance else ""),
        ("Tightness", "" if tightness is None else tightness_bar(tightness)),
        ("Resolution", "" if resolution is None else f"{number(resolution)} would be seen with probability 0.9"),
        ("Evidence", _evidence(claim, run, outcome)),
        ("Values", "" if values == ["–", "–"] else f"{values[0]} in the paper, {values[1]} here"),
        ("Validity", e(outcome.get("validity") or "")),
        ("Worst input", "" if outcome.get("witness") is None else shortened(outcome["witness"])),
        ("Note", text(outcome.get("note") or "")),
        ("Cannot see", text(claim["blind_spot"] or "")),
        ("Needs", e(", ".join(claim["needs"]))),
        ("Decides from", f"budget {e(claim['budget'])}" if claim["budget"] != "quick" else ""),
        ("Run on", ", ".join(where)),
    ]
    return [(label, words) for label, words in found if words]


def _sign(claim: Record, margin: float, tolerance: float | None) -> str:
    """What the sign of a margin means; for a random claim it is an estimate, and the evidence decides."""
    if claim["kind"] in LEDGER_KINDS:
        return " (estimated)"
    if margin >= 0:
        return " (not violated)"
    return " (violated)" if margin < -(tolerance or 0.0) else " (zero within the tolerance)"


def _searched(outcome: Record) -> str:
    search = outcome.get("search") or {}
    words = [count(outcome["n"], "input or sample", "inputs or samples")] if outcome.get("n") else []
    words += [count(search[name], name[:-1]) for name in ("structures", "evaluations", "restarts") if search.get(name)]
    if search.get("restarts") and search.get("agreeing") is not None:
        words[-1] += f" ({search['agreeing']} ended at the best value)"
    return ", ".join(words) + (f"; {e(search['confirmation'])}" if search.get("confirmation") else "")


def _evidence(claim: Record, run: Record, outcome: Record) -> str:
    words = []
    if outcome.get("log_e") is not None:
        bound = f" (refuted from {number(-math.log(run['alpha']))} on)" if run.get("alpha") else ""
        words.append(f"log e = {number(outcome['log_e'])} against the claim{bound}")
    if outcome.get("p") is not None:
        words.append(f"p = {number(outcome['p'])}")
    if outcome and run.get("alpha") and claim["kind"] in LEDGER_KINDS:
        words.append(level(run["alpha"]))
    return ", ".join(words)


def _others(claim: Record) -> str:
    """The controls and repairs with what became of them, then their figures."""
    rows, figures = [], []
    for role, listed in (("control", claim["controls"]), ("repair", claim["repairs"])):
        title = "negative control" if role == "control" else "repair"
        for name, words in listed.items():
            run = _run(claim, role, name)
            verdict = e(run["verdict"]) if run else "not run"
            cells = (title, text(words), verdict, number(_outcome(run).get("margin")), _passed(role, run))
            rows.append(f'<tr><th scope="row">{e(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
            figures.append(_run_figure(claim, run, f"{title.capitalize()} {name}: {words}"))
    if not rows:
        return ""
    heads = ("Name", "Role", "What is changed", "Verdict", "Margin", "As it must be")
    pictures = f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""
    return f"<h4>Controls{' and repairs' if claim['repairs'] else ''}</h4>{table(heads, rows, 'controls')}{pictures}"


def _unchecked(papers: Record, grouped: Mapping[str, Sequence[Record]]) -> str:
    rows = []
    for stem, claims in grouped.items():
        coded = {c["number"] for c in claims}
        if absent := [number for number in papers[stem]["claims"] if number not in coded]:
            rows.append(f'<tr><th scope="row">{e(papers[stem]["title"])}</th><td>{e(", ".join(absent))}</td></tr>')
    body = "<p>None: every claim of the papers above is in this report.</p>"
    if rows:
        words = "Claims of the papers above with no result in this report: without a check so far, or not selected."
        body = f"<p>{words}</p>{table(('Paper', 'Claims'), rows)}"
    return f'<section><h2 id="unchecked">Not checked here</h2>{body}</section>\n'


def _environment(document: Record) -> str:
    environment, settings = document["environment"], document["settings"]
    values = [(name, value) for name, value in environment.items() if name != "packages" and value]
    values += environment["packages"].items()
    rows = [f'<tr><th scope="row">{e(name)}</th><td>{e(value)}</td></tr>' for name, value in values]
    half = -(-len(rows) // 2)
    tables = "".join(table(("Component", "Version or value"), part) for part in (rows[:half], rows[half:]) if part)
    command = ["paper-checks", "run", *dict.fromkeys(c["paper"] for c in document["claims"])]
    command += ["--budget", settings["budget"], "--seed", str(settings["seed"]), *_device(settings["device"])]
    if settings["suite_alpha"] != 1e-3:
        command += ["--suite-alpha", f"{settings['suite_alpha']:.6g}"]
    return (
        f'<section><h2 id="environment">Environment and rerun</h2><div class="two even">{tables}</div>'
        f"<h3>Run all of it again</h3><pre>{e(shlex.join(command))}</pre></section>\n"
    )


# -- pieces -----------------------------------------------------------------------------------------------------------


def _verdict(claim: Record) -> str:
    as_recorded = claim["verdict"] == claim["expect"] == "refuted"
    return "refuted as recorded" if as_recorded else claim["verdict"]


def _run(claim: Record, role: str, name: str | None = None) -> Record | None:
    return next((r for r in claim["runs"] if r["role"] == role and r["name"] == name), None)


def _outcome(run: Record | None) -> Record:
    return (run or {}).get("outcome") or {}


def _asymptotic(claim: Record) -> bool:
    """Whether a test decided the claim at a level that holds only in the limit of many samples or small steps."""
    return claim["kind"] in LEDGER_KINDS and _outcome(_run(claim, "claim")).get("validity") == "asymptotic"


def _absent(document: Record) -> int:
    """Claims of the papers in the document that have no record in it."""
    here = {(c["paper"], c["number"]) for c in document["claims"]}
    return sum((stem, n) not in here for stem, paper in document["papers"].items() for n in paper["claims"])


def _flat(spec: Record) -> bool:
    """Whether lines are all that there is to see, and level to a billionth: less than any eye or axis resolves."""
    heights = [y for line in spec.get("lines") or [] for y in line["y"] if y is not None]
    return not spec.get("bars") and bool(heights) and max(heights) - min(heights) <= 1e-9 * max(map(abs, heights))


def _link(claim: Record, words: str | None = None) -> str:
    return f'<a href="#{slug("claim", claim["id"])}">{e(words or claim["id"])}</a>'


def _passed(role: str, run: Record | None) -> str:
    if run is None or run["caught"] is None:
        return "–"
    good, bad = ("caught", "slipped through") if role == "control" else ("accepted", "rejected")
    bad = {"error": "raised an error", "inconclusive": "not decided"}.get(run["verdict"], bad)
    return f'<b class="good">✓ {good}</b>' if run["caught"] else f'<b class="bad">✗ {bad}</b>'


def _then_or_now(value: Any) -> str:
    if value is None:
        return "none"
    return number(value) if isinstance(value, (int, float)) else e(value)


def _counterexample(run: Record | None) -> str:
    code = _outcome(run).get("counterexample")
    return f"<h4>Counterexample</h4><pre>{e(code)}</pre>" if code else ""


def _command(claim: Record, own: Record | None) -> str:
    """The command that repeats a claim's run: same budget, seed, device and, for a random claim, level."""
    run = own or (claim["runs"] or [{}])[0]
    command = ["paper-checks", "run", claim["id"], "--budget", run.get("budget") or claim["budget"]]
    command += ["--seed", str(run.get("seed") or 0)]
    if claim["kind"] in LEDGER_KINDS and run.get("alpha") and run["alpha"] != 1e-3:
        command += ["--suite-alpha", f"{run['alpha']:.6g}"]  # run alone, a claim has the whole allowance to itself
    return shlex.join([*command, *_device((run.get("device") or "").split(":")[0])])


def _device(name: str | None) -> list[str]:
    return ["--device", "gpu"] if name in ("gpu", "cuda", "rocm") else []


def _tally(paper: Record, claims: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for claim in claims:
        counts[_verdict(claim)] = counts.get(_verdict(claim), 0) + 1
    coded = {c["number"] for c in claims}
    if absent := sum(number not in coded for number in paper["claims"]):
        counts["not here"] = absent
    return counts


def _undescribed(stem: str) -> Record:
    return {"title": stem, "authors": "", "year": None, "venue": None, "arxiv": None, "claims": [], "note": None}


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _run_figure(claim: Record, run: Record | None, caption: str) -> str:
    spec = _outcome(run).get("figure")
    if not spec or run is None or _flat(spec):
        return ""
    return _figure(spec, slug("figure", f"{claim['id']}:{run['role']}:{run['name'] or ''}"), caption, caption)


def _figure(spec: Record, name: str, label: str, caption: str) -> str:
    """A figure with its caption; one that cannot be drawn costs itself, not the page."""
    if not _can_draw():
        return ""
    from paper_checks import figures

    try:
        drawn = figures.overview(spec["overview"]) if "overview" in spec else figures.draw(spec)
        picture = figures.svg(drawn, label=label.replace("$", ""), prefix=f"{name}-")
    except Exception as error:
        picture = f'<p class="notice">This figure could not be drawn: {e(error)}.</p>'
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"
