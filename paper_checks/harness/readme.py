"""The README's table of papers, generated from the registered claims.

The suite fails when a verdict differs from what is recorded, so that the table, made from the records, is what
the last green run found.
"""

from __future__ import annotations

from pathlib import Path

from paper_checks.harness.registry import load, stems
from paper_checks.harness.report import write_atomically

BEGIN, END = "<!-- papers: begin -->", "<!-- papers: end -->"


def table() -> str:
    """Markdown: one row a paper; claims that hold, are recorded as false, cannot be checked, have no check yet."""
    rows = [
        "| paper | claims | hold | recorded as false | not checkable | not yet | negative controls |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stem in stems():
        paper, claims = load(stem)
        checked = [c for c in claims if c.checkable]
        counts = (
            len(paper.claims),
            sum(c.expect == "holds" for c in checked),
            sum(c.expect == "refuted" for c in checked),
            len(claims) - len(checked),
            len(paper.claims) - len(claims),
            sum(len(c.controls) for c in checked),
        )
        name = f"{paper.title} ({paper.authors}, {paper.venue} {paper.year}, arXiv {paper.arxiv}): `{stem}`"
        rows.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(rows)


def _split(path: Path) -> tuple[str, str, str]:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must contain the lines {BEGIN} and {END} exactly once, around the table")
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside.strip(), after


def current(path: Path, made: str) -> bool:
    """Whether the table that stands in the file is the one that the claims give."""
    return _split(path)[1] == made.strip()


def write(path: Path, made: str) -> None:
    """Replace the table in the file, atomically."""
    before, _, after = _split(path)
    write_atomically(path, f"{before}{BEGIN}\n{made.strip()}\n{END}{after}")
