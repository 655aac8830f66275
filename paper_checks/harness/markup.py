"""Values as small pieces of HTML: verdicts, numbers, tables.  Text is escaped unless said otherwise."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# verdict: (class, sign); the sign says in black and white what the colour says
CHIPS = {
    "proved": ("proved", "■"),
    "holds": ("good", "✓"),
    "consistent": ("good", "✓"),
    "reproduced": ("good", "✓"),
    "refuted as recorded": ("finding", "◆"),
    "refuted": ("bad", "✗"),
    "not reproduced": ("doubt", "≠"),
    "inconclusive": ("doubt", "?"),
    "not checkable": ("none", "–"),
    "error": ("error", "!"),
}


def e(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(str(value))


def chip(verdict: str) -> str:
    """A verdict as a coloured label; `verdict` is a key of `CHIPS`."""
    kind, sign = CHIPS[verdict]
    return f'<span class="chip {kind}"><span aria-hidden="true">{sign}</span> {e(verdict)}</span>'


def table(heads: Iterable[str], rows: Sequence[str], kind: str = "") -> str:
    """A table with headed columns; `rows` are HTML already."""
    head = "".join(f'<th scope="col">{e(words)}</th>' for words in heads)
    body = "".join(rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Labels and what they label as a list; the second of each pair is HTML already."""
    body = "".join(f"<div><dt>{e(label)}</dt><dd>{words}</dd></div>" for label, words in pairs)
    return f'<dl class="facts">{body}</dl>'


def slug(kind: str, name: str) -> str:
    """An identifier that is one-to-one with the name and fit for addresses."""
    return f"{kind}-" + re.sub(r"[^A-Za-z0-9_-]", lambda match: f".{ord(match[0]):x}.", name)


def count(n: int, one: str, many: str | None = None) -> str:
    """`n` with its noun in the right number: 1 claim, 12 000 claims."""
    noun = one if n == 1 else many or f"{one}s"
    return f"{n:,} {noun}".replace(",", "\u202f")


def number(value: float | None) -> str:
    """A number to three digits with a real minus sign and powers of ten (-0 is 0); a dash if there is none."""
    if value is None:
        return "–"
    mantissa, _, power = f"{value + 0.0:.3g}".replace("-", "−").partition("e")
    if not power:
        return mantissa
    exponent = str(int(power.replace("−", "-"))).replace("-", "−")
    return f'<span class="nobr">{mantissa} × 10<sup>{exponent}</sup></span>'


def quoted(value: Any) -> str:
    """A value beside the paper's: numbers to six digits, text as it is."""
    if isinstance(value, (int, float)):
        return f"{value + 0.0:.6g}".replace("-", "−")
    return "–" if value is None else e(value)


def level(alpha: float | None) -> str:
    """The significance level of one random claim; None where claims of one report have different ones."""
    return "levels differ, see each claim" if alpha is None else f"level α = {number(alpha)}"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where those are many; a dash for what was not run."""
    if not seconds:
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def tightness_bar(tightness: float | None) -> str:
    """Tightness as a number with a bar from 0 to 1; close to 1 the distance from 1 is what matters."""
    if tightness is None:
        return "–"
    gap = 1.0 - tightness
    words = f"1 − {number(gap)}" if 0.0 < gap < 1e-3 else f"{tightness:.4g}".replace("-", "−")
    share = 100 * min(max(tightness, 0.0), 1.0)
    bar = f'<span class="bar" aria-hidden="true"><i style="width:{share:.4g}%"></i></span>'
    return f'<span class="tight">{words}{bar}</span>'


def shortened(value: Any, limit: int = 300) -> str:
    """A value as code on one line, cut where it gets long."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    rest = "" if len(words) <= limit else f" … ({len(words)} characters in the JSON document)"
    return f"<code>{e(words[:limit])}</code>{rest}"


def moment(created: str) -> str:
    """An ISO moment as it is read: 2026-03-01 14:05 UTC."""
    readable = re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:00)$", r"\1 \2 UTC", created)
    return e(readable)
