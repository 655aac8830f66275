"""The report document: plain data that is written, read, merged, compared with an earlier one, and shown as HTML.

A document is what one run leaves behind (schema version 1: `report_schema_v1.json` beside this file, explained
in `docs/report_schema.md`).  Documents of runs on different machines merge into one.  Files appear whole or not
at all.  The pages themselves are laid out in `page.py`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.resources
import json
import math
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paper_checks.harness.claim import LEDGER_KINDS

SCHEMA = "proofstone-report"
VERSION = 1

Document = dict[str, Any]


class Change(NamedTuple):
    """One difference between two documents: what the earlier said of a claim (or of its control) and the later says."""

    claim: str
    run: str
    """"claim", or "control half", "repair three-halves"."""
    what: str
    """"verdict", "margin" or "tightness"."""
    before: Any
    after: Any


# -- plain data ---------------------------------------------------------------------------------------------------


def sanitize(document: Any) -> Any:
    """A copy that JSON can hold: arrays become lists, tuples lists, and numbers that are not finite null.

    What became null is said in the `reason` of the run or claim around it, so that a margin of NaN cannot pass
    for a margin that was never measured.  What is neither data nor an array (a symbolic expression, say) becomes its
    text.  Applying it twice changes nothing more.
    """
    return _plain(document, "", [])


def check(document: Any, name: str = "document") -> None:
    """Raise ValueError, naming the place, if `document` is not a report of the version that this code reads."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise ValueError(f"{name} is not a Proofstone report: its schema is {found!r}, expected {SCHEMA!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"{name} has report version {document.get('version')!r}; this release reads version {VERSION}")
    schema = _schema()
    if problem := _violation(document, schema, schema["$defs"], ""):
        raise ValueError(f"{name} does not fit report version {VERSION}: {problem}")


def merge(documents: Iterable[Document]) -> Document:
    """One document of several, for example of halves of the suite that ran on different machines.

    A claim that occurs more than once is taken from the document created last.  The merged document is complete if
    all are, and was created when the last one was.  Where environments differ, the differing values stand beside
    each other, separated by " / ".  Settings must agree, except for the two that follow from how many
    statistical claims a run selected: if those differ, `statistical_items` counts the claims of the merged document and
    `alpha` is null (each run keeps the level that it was decided at).  Raises ValueError if a document is not a
    report, if there is none, and if settings differ, naming them.
    """
    parts = [sanitize(document) for document in documents]
    if not parts:
        raise ValueError("merge: no documents were given; expected at least one")
    for number, part in enumerate(parts):
        check(part, f"document {number + 1} of {len(parts)}")
    parts.sort(key=lambda part: part["created"])  # stable: of two created together the later given wins
    papers: dict[str, Any] = {}
    claims: dict[str, Any] = {}
    for part in parts:
        for stem, paper in part["papers"].items():
            numbers = [*papers[stem]["claims"], *paper["claims"]] if stem in papers else paper["claims"]
            papers[stem] = {**paper, "claims": list(dict.fromkeys(numbers))}
        claims |= {claim["id"]: claim for claim in part["claims"]}
    papers = dict(sorted(papers.items()))

    def place(claim: Mapping[str, Any]) -> tuple[str, int, str]:
        numbers = papers[claim["paper"]]["claims"] if claim["paper"] in papers else []
        position = numbers.index(claim["number"]) if claim["number"] in numbers else len(numbers)
        return claim["paper"], position, claim["number"]

    ordered = sorted(claims.values(), key=place)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "created": parts[-1]["created"],
        "complete": all(part["complete"] for part in parts),
        "settings": _merged_settings([part["settings"] for part in parts], ordered),
        "environment": _merged_environments([part["environment"] for part in parts]),
        "papers": papers,
        "claims": ordered,
    }


def joined(document: Document, directory: str | os.PathLike[str], selected: Collection[str]) -> tuple[Document, str]:
    """The document to write to a folder, and a sentence on the report that stands there (empty: nothing to say).

    A complete report made alike (budget, seed, suite_alpha, device and environment) keeps its other claims, so that a
    run of one claim, or one that was stopped, does not cost the rest; it is complete if all `selected` claims are in it.
    Any other report is replaced, and so is the old result of a claim that ran anew, unless only a part of its controls
    ran and showed nothing wrong.
    """
    path = Path(directory) / "report.json"
    if not path.exists():
        return document, ""
    try:
        document = sanitize(document)
        check(document)
        earlier = read_json(path)
    except (OSError, ValueError) as problem:
        return document, f"the earlier report was replaced: {problem}"
    differing = [name for name in _ASKED if document["settings"][name] != earlier["settings"][name]]
    differing += ["environment"] if document["environment"] != earlier["environment"] else []
    if differing or not earlier["complete"]:
        why = f"other {', '.join(differing)}" if differing else "it was interrupted"
        ran = {claim["id"] for claim in document["claims"]}
        lost = differing or any(claim["id"] not in ran for claim in earlier["claims"])
        when = f"the earlier report, of {earlier['created']}, was replaced: {why}"
        return document, when if lost else ""
    held = {claim["id"] for claim in earlier["claims"]}
    news = [c for c in document["claims"] if c["id"] not in held or not c["ok"] or _whole(c)]
    whole = merge([{**earlier, "created": document["created"]}, {**document, "claims": news}])
    there = {claim["id"] for claim in whole["claims"] if _whole(claim)}
    whole["complete"] = document["complete"] or there.issuperset(selected)
    kept = len(whole["claims"]) - len(news)
    sentence = f"joined with the report of {earlier['created']} made alike, which keeps {kept} other claims"
    return whole, sentence if kept else ""


def compare(document: Document, previous: Document, *, factor: float = 2.0) -> list[Change]:
    """What got worse or changed since `previous`, in the order of `document`.

    Listed are verdicts that changed (of claims, controls and repairs), claims that came
    (before: None) or went (after: None), margins that are less than 1/`factor` of what they were, and tightness
    that fell so that its distance from 1 grew by `factor` (and by 0.001 at least): a looser search than before.
    A margin that moved by less than its tolerance or resolution is no news.
    """
    check(document)
    check(previous, "previous document")
    before = {claim["id"]: claim for claim in previous["claims"]}
    after = {claim["id"]: claim for claim in document["claims"]}
    changes: list[Change] = []
    for name, claim in after.items():
        if name not in before:
            changes.append(Change(name, "claim", "verdict", None, claim["verdict"]))
            continue
        if claim["verdict"] != before[name]["verdict"]:
            changes.append(Change(name, "claim", "verdict", before[name]["verdict"], claim["verdict"]))
        earlier = {(run["role"], run["name"]): run for run in before[name]["runs"]}
        for run in claim["runs"]:
            if old := earlier.get((run["role"], run["name"])):
                changes += _run_changes(name, run, old, factor)
    gone = [Change(name, "claim", "verdict", old["verdict"], None) for name, old in before.items() if name not in after]
    return changes + gone


def false_alarm_bound(document: Document) -> float:
    """Probability, at most, that a true claim of the document decided by a test is called refuted: the sum of levels."""
    levels = {
        claim["id"]: run["alpha"] or 0.0
        for claim in document["claims"]
        for run in claim["runs"]
        if claim["kind"] in LEDGER_KINDS and run["role"] == "claim" and run["outcome"] is not None
    }
    return math.fsum(levels.values())


# -- files --------------------------------------------------------------------------------------------------------


def write_json(document: Document, path: str | os.PathLike[str]) -> Path:
    """Write the document as JSON, whole or not at all; returns the path.  Raises OSError if it cannot be written."""
    plain = sanitize(document)
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA or plain.get("version") != VERSION:
        raise ValueError(f"write_json: expected a document with schema {SCHEMA!r} and version {VERSION}")
    # Not checked in full: a result of an hour's run is kept even if a field is odd.  Reading it back says so.
    write_atomically(path, json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Document:
    """The document in a JSON file.  Raises ValueError if it is not a report of this version, OSError if unreadable."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not a JSON document: {error}") from error
    check(document, str(path))
    return document


def to_html(document: Document, previous: Document | None = None) -> str:
    """The document as one self-contained HTML page; with `previous`, also what changed since.

    Needs latex2mathml for formulas and matplotlib for figures; without them formulas are shown as LaTeX source and
    figures are left out, which the page says.  Raises ValueError if a document is not a report of this version.
    """
    from paper_checks.harness import page

    plain = sanitize(document)
    check(plain)
    changes = None if previous is None else compare(plain, sanitize(previous))
    return page.page(plain, previous, changes, false_alarm_bound(plain))


def claim_html(record: Mapping[str, Any]) -> str:
    """One claim record of a document as an HTML fragment that brings its own style, for notebooks."""
    from paper_checks.harness import page

    return page.fragment(sanitize(record))


def write_html(document: Document, path: str | os.PathLike[str], previous: Document | None = None) -> Path:
    """Write `to_html(document, previous)`, whole or not at all; returns the path."""
    write_atomically(path, to_html(document, previous))
    return Path(path)


def write_report(document: Document, directory: str | os.PathLike[str], previous: Document | None = None) -> Path:
    """Write `report.json` and then `report.html` to the folder; returns the path of the page."""
    folder = ensure_writable(directory)
    write_json(document, folder / "report.json")
    return write_html(document, folder / "report.html", previous)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8 so that the file has either its earlier or its new contents, never a part.

    A temporary file in the same folder is written, forced to disk and renamed.  Whatever stops this (a full disk,
    an interrupt) removes the temporary file and leaves the earlier one as it was.  Raises OSError naming the path.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        if target.exists() and not target.is_file():  # renaming would put a file in the place of a device
            raise OSError(errno.EINVAL, "it is not a regular file")
        # "x" never follows a link that somebody put there; lone surrogates (odd file names) become \\udcXX
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            what = f"cannot write {path} ({error.strerror}); an earlier file is left as it was"
            raise OSError(error.errno or errno.EIO, what) from error
        raise


def ensure_writable(directory: str | os.PathLike[str]) -> Path:
    """Create the folder if need be and try a file in it, so that a long run does not end in vain; returns the path.

    Raises OSError (PermissionError, NotADirectoryError, ... as the case may be) that names the folder.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
        why = cause.strerror
        if not nearest.is_dir():
            why = f"{nearest} is not a folder"
        elif nearest != folder:
            why = f"no folder can be made in {nearest}: {why}"
        what = f"cannot write to the report folder {folder} ({why}); choose another one"
        raise OSError(error.errno or errno.EIO, what) from error
    return folder


# -- parts --------------------------------------------------------------------------------------------------------


def _plain(value: Any, place: str, lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        mine: list[str] = [] if "reason" in value else lost
        inside = "" if "reason" in value else place
        out = {str(k): _plain(v, f"{inside}.{k}" if inside else str(k), mine) for k, v in value.items()}
        if "reason" in value and mine:
            note = f"Not finite, shown as missing: {', '.join(mine)}."
            reason = out["reason"] or ""
            out["reason"] = reason if note in reason else f"{reason} {note}".strip()
        return out
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return _list(items, place, lost)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(f"{place} ({value})")
        return None
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value)


def _list(items: Sequence[Any], place: str, lost: list[str]) -> list[Any]:
    mine: list[str] = []
    out = [_plain(item, f"{place}[{index}]", mine) for index, item in enumerate(items)]
    lost += mine if len(mine) <= 3 else [*mine[:2], f"{len(mine) - 2} more in {place}"]
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"it contains {name}, which JSON does not have")


@functools.cache
def _schema() -> dict[str, Any]:
    source = importlib.resources.files("paper_checks.harness") / f"report_schema_v{VERSION}.json"
    return json.loads(source.read_text(encoding="utf-8"))


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}


def _violation(value: Any, rule: Any, definitions: Mapping[str, Any], place: str) -> str | None:
    """The first way in which `value` breaks a rule of the JSON Schema (of the part of that language used in ours)."""
    if rule is True:
        return None
    if "$ref" in rule:
        rule = definitions[rule["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in rule:
        # each of ours is null or one more thing: None decides which
        return None if value is None else _violation(value, rule["anyOf"][-1], definitions, place)
    if "enum" in rule and value not in rule["enum"]:
        return f"{place} is {value!r}, expected one of {', '.join(map(str, rule['enum']))}"
    if "type" in rule:
        names = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        fits = any(
            isinstance(value, _TYPES[name]) and not (isinstance(value, bool) and name in ("number", "integer"))
            for name in names
        )
        if not fits:
            found = f"{type(value).__name__} {str(value)[:40]!r}"
            return f"{place or 'the document'} is {found}, expected {' or '.join(names)}"
    if isinstance(value, dict):
        for name in rule.get("required", ()):
            if name not in value:
                return f"{f'{place}.' if place else ''}{name} is missing"
        known, other = rule.get("properties", {}), rule.get("additionalProperties", True)
        inner = [(f"{place}.{k}" if place else k, v, known.get(k, other)) for k, v in value.items()]
    elif isinstance(value, list):
        inner = [(f"{place}[{i}]", v, rule.get("items", True)) for i, v in enumerate(value)]
    else:
        return None
    return next((bad for where, v, r in inner if (bad := _violation(v, r, definitions, where))), None)


_ASKED = ("budget", "seed", "suite_alpha", "device")


def _whole(claim: Mapping[str, Any]) -> bool:
    """Whether the claim, its controls and its repairs were all run."""
    return len(claim["runs"]) >= 1 + len(claim["controls"]) + len(claim["repairs"])


def _merged_settings(settings: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shared = ("statistical_items", "alpha")
    names = dict.fromkeys(name for one in settings for name in one if name not in shared)
    if differing := [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]:
        values = [f"{name}: {', '.join(sorted({repr(one.get(name)) for one in settings}))}" for name in differing]
        raise ValueError(f"merge: the documents have different settings ({'; '.join(values)}); run the parts alike")
    merged = dict(settings[-1])
    if settings[0]["alpha"] is None or any(one[name] != settings[0][name] for one in settings for name in shared):
        random = [c for c in claims if c["kind"] in LEDGER_KINDS and any(r["outcome"] is not None for r in c["runs"])]
        merged |= {"statistical_items": len(random), "alpha": None}
    return merged


def _merged_environments(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in environments for name in one):
        values = [one[name] for one in environments if name in one]
        if all(isinstance(value, Mapping) for value in values):
            merged[name] = _merged_environments(values)
        else:
            seen = dict.fromkeys(part for value in values if value for part in str(value).split(" / "))
            merged[name] = " / ".join(seen) or None
    return merged


def _run_changes(name: str, run: Mapping[str, Any], old: Mapping[str, Any], factor: float) -> list[Change]:
    label = run["role"] if run["name"] is None else f"{run['role']} {run['name']}"
    changes = []
    if run["role"] != "claim" and run["verdict"] != old["verdict"]:
        changes.append(Change(name, label, "verdict", old["verdict"], run["verdict"]))
    new_outcome, old_outcome = run["outcome"] or {}, old["outcome"] or {}
    before, after = old_outcome.get("margin"), new_outcome.get("margin")
    if run["role"] != "control" and before is not None:
        sources = [one.get(name) or 0.0 for one in (old_outcome, new_outcome) for name in ("tolerance", "resolution")]
        if after is None or before - after > max(*sources, abs(before) * (1.0 - 1.0 / factor)):
            changes.append(Change(name, label, "margin", before, after))
    before, after = old_outcome.get("tightness"), new_outcome.get("tightness")
    if run["role"] == "claim" and before is not None:
        allowed = max(factor * (1.0 - before), 1.0 - before + 1e-3)  # below 0.001 it is the luck of the search
        if after is None or 1.0 - after > allowed:
            changes.append(Change(name, label, "tightness", before, after))
    return changes
