"""Plots shared by reports and notebooks: each function takes data and returns a matplotlib Figure.

A figure of a claim is data (a "figure spec", see `draw`) until somebody wants to see it, so that results can be
stored as JSON and drawn elsewhere.  matplotlib is imported inside the functions; pyplot and its global state
are not used, and the user's own matplotlib settings neither matter nor change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers with any colour vision can tell apart (yellow left out: too pale for lines)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, MUTED, HAIRLINE = "#222222", "#555555", "#dddddd"
SCALES = ("linear", "log", "symlog")
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-", "linewidth": 1.6},
    "dashed": {"linestyle": (0, (5, 2)), "linewidth": 1.4},
    "step": {"linestyle": "-", "linewidth": 1.4, "drawstyle": "steps-post"},
    "points": {"linestyle": "none", "marker": "o", "markersize": 4.2, "markeredgewidth": 0.0},
}
_RC: Any = {  # Any: matplotlib types its settings key by key
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "proofstone",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.6,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,  # ticks say what they stand at
}


def draw(spec: Mapping[str, Any]) -> Figure:
    """A figure spec as a matplotlib Figure (5 by 3.1 inches).

    `spec` has `title`, `x_label`, `y_label` (text, formulas between dollar signs allowed), `x_scale` and
    `y_scale` (`"linear"`, `"log"` or `"symlog"`), `lines` (each with `label`, `x`, `y` of one length and `style`:
    `"line"`, `"points"`, `"dashed"` or `"step"`), `hlines` (each with `label` and `y`) and `bars` (None, or
    `labels` and `values` of one length).  Missing numbers (None) leave gaps.  Only the title is compulsory.
    Raises ValueError for an unknown scale or style and for lengths that differ, naming the part.
    """
    with _our_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        axes = figure.add_subplot()
        lines, bars, hlines = spec.get("lines") or [], spec.get("bars"), spec.get("hlines") or []
        if bars:
            _bars(axes, bars)
        curves = [(_line(line), line) for line in lines]
        for number, ((x, y), line) in enumerate(curves):
            style = STYLES[line.get("style") or "line"]
            color = PALETTE[(number + bool(bars)) % len(PALETTE)]
            axes.plot(x, y, color=color, label=_label(line.get("label")), **style)
        for line in hlines:
            if line.get("y") is not None:
                axes.axhline(
                    line["y"], color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)), label=_label(line.get("label"))
                )
        heights = [y for (_, y), _ in curves] + ([[_number(v) for v in bars["values"]]] if bars else [])
        heights.append([_number(line.get("y")) for line in hlines])
        _scale(axes, "x", spec.get("x_scale"), [x for (x, _), _ in curves])
        _scale(axes, "y", spec.get("y_scale"), heights)
        if not curves and not bars and not hlines:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_title(_label(spec["title"]), wrap=True)
        axes.set_xlabel(_label(spec.get("x_label")))
        axes.set_ylabel(_label(spec.get("y_label")))
        handles, labels = axes.get_legend_handles_labels()
        if handles and (len(handles) > 1 or bars):
            # below the axes: a legend inside would sooner or later cover data
            columns = len(labels) if sum(map(len, labels)) < 45 and len(labels) < 5 else 3
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        return figure


def overview(claims: Sequence[Mapping[str, Any]]) -> Figure:
    """The claims of one paper at a glance, one row per claim, in the order given.

    `claims` are claim records of the report document.  Left: tightness on an axis from 0 to 1 (a claim above 1
    is drawn at the edge with its value).  Right: margins on a symmetric logarithmic axis; the claim is a filled
    circle, a control a cross, a repair a triangle, so that controls are seen to fall on the other side of
    zero.  A grey band reaches from zero to minus the claim's tolerance, or the resolution of a random claim: what
    cannot be told from zero.  Margins within their tolerance do not count for how far the axis resolves zero.
    A claim without one of the numbers has an empty row there; if no claim has a tightness, the left side is left
    out.  Margins are in each claim's own units.
    """
    with _our_style():
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        rows, layout = range(len(claims)), ConstrainedLayoutEngine(wspace=0.06)
        figure = Figure(figsize=(9.8, 1.25 + 0.26 * max(len(claims), 1)), layout=layout)
        if any(_of(_run(claim, "claim"), "tightness") is not None for claim in claims):
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.7))
            _tightness(left, claims)
            right.tick_params(axis="y", length=0)
        else:
            left = right = figure.subplots()
        left.set_ylim(len(claims) - 0.4, -0.6)
        left.set_yticks(list(rows), [_label(str(claim["number"])) for claim in claims])
        left.tick_params(axis="y", length=0, labelcolor=INK)
        _margins(right, claims)
        handles, labels = right.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower right", ncols=4, handletextpad=0.5)
        return figure


def svg(figure: Figure, *, label: str = "", prefix: str = "") -> str:
    """`figure` as an `<svg>` element to stand inside an HTML page.

    The element takes the width it is given, up to its natural size.  `label` is what a screen reader says.
    Identifiers that are referred to get `prefix` in front, so with a prefix of its own each figure keeps to
    itself on a page with others; the other identifiers are left out.  The same figure gives the same text.
    """
    import io

    stream = io.StringIO()
    with _our_style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # matplotlib's style sheet would reach the whole page; both properties are inherited from the root instead
    body = re.sub(r"<style\b.*?</style>|<metadata\b.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in referred else "", body)
    body = re.sub(r'(url\(#|xlink:href="#)', lambda match: match[1] + prefix, body)
    body = re.sub(r"\n\s*", "\n", re.sub(r"<defs>\s*</defs>", "", body)).strip()
    width, height = figure.get_size_inches() * 72
    role = f'role="img" aria-label="{_attribute(label)}"' if label else 'aria-hidden="true"'
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" {role} style="width:100%;max-width:{width / 72 * 96:.0f}px;'
        f'height:auto;stroke-linejoin:round;stroke-linecap:butt">\n{body}\n</svg>'
    )


@contextmanager
def _our_style() -> Iterator[None]:
    """Our settings on top of matplotlib's defaults while a figure is made or written; the user's come back."""
    import matplotlib
    import numpy as np

    # over: axis margins beyond the largest float, which matplotlib then leaves out
    with matplotlib.rc_context(), np.errstate(over="ignore"):
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def _attribute(words: str) -> str:
    return words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _label(words: str | None) -> str:
    """Text for matplotlib: formulas that it cannot set are shown with their dollar signs instead."""
    words = words or ""
    if words.startswith("_"):  # matplotlib hides such labels from the legend
        words = "\u200b" + words
    if "$" not in words:
        return words
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("path").parse(words)
    except ValueError:
        return words.replace("$", r"\$")
    return words


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _line(line: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    name, style = line.get("label"), line.get("style") or "line"
    if style not in STYLES:
        raise ValueError(f"draw: line {name!r} has style {style!r}; known are {', '.join(STYLES)}")
    x, y = [_number(v) for v in line["x"]], [_number(v) for v in line["y"]]
    if len(x) != len(y):
        raise ValueError(f"draw: line {name!r} has {len(x)} values of x and {len(y)} of y")
    return x, y


def _bars(axes: Axes, bars: Mapping[str, Any]) -> None:
    labels, values = [_label(str(v)) for v in bars["labels"]], [_number(v) for v in bars["values"]]
    if len(labels) != len(values):
        raise ValueError(f"draw: bars has {len(labels)} labels and {len(values)} values")
    axes.bar(range(len(values)), values, width=0.62, color=PALETTE[0])
    crowded = sum(map(len, labels)) > 55  # characters that fit beside each other under axes of this width
    axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(axis="x", visible=False)


def _scale(axes: Axes, axis: str, scale: str | None, columns: list[list[float]]) -> None:
    scale = scale or "linear"
    if scale not in SCALES:
        raise ValueError(f"draw: {axis}_scale is {scale!r}; known are {', '.join(SCALES)}")
    values = [abs(v) for column in columns for v in column if math.isfinite(v) and v != 0.0]
    positive = any(v > 0 for column in columns for v in column)
    set_scale = axes.set_xscale if axis == "x" else axes.set_yscale
    if scale == "log" and positive:
        set_scale("log")
    elif scale == "symlog" and values:
        set_scale("symlog", linthresh=max(min(values), 1e-15 * max(values)))


def _tightness(axes: Axes, claims: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("tightness (1 = bound attained)")
    axes.grid(axis="y", visible=False)
    for row, claim in enumerate(claims):
        value = _of(_run(claim, "claim"), "tightness")
        if value is None:
            continue
        shown = min(max(value, 0.0), 1.0)
        axes.barh(row, shown, height=0.5, color=PALETTE[4])
        text = f"{value:.4g}"
        place, align = (shown - 0.015, "right") if shown > 0.3 else (shown + 0.015, "left")
        axes.text(place, row, text, va="center", ha=align, fontsize=7.5)


_BANDS = ("tolerance", "resolution")


def _margins(axes: Axes, claims: Sequence[Mapping[str, Any]]) -> None:
    kinds: tuple[tuple[str, str, dict[str, Any]], ...] = (  # role, legend, look; drawn in this order, the claim on top
        ("control", "negative control", {"marker": "x", "color": PALETTE[1], "s": 30, "linewidths": 1.5}),
        ("repair", "repair", {"marker": "^", "facecolors": "white", "edgecolors": PALETTE[2], "s": 32}),
        ("claim", "claim", {"marker": "o", "color": PALETTE[0], "s": 32}),
    )
    everything: list[float] = []
    telling: list[float] = []  # sizes that the axis must resolve
    for role, legend, look in kinds:
        points = [
            (value, row, _of(run, "tolerance") or 0.0)
            for row, claim in enumerate(claims)
            for run in claim["runs"]
            if run["role"] == role and (value := _of(run, "margin")) is not None
        ]
        if points:
            x, y, tolerances = zip(*points, strict=True)
            axes.scatter(x, y, label=legend, zorder=3, clip_on=False, **look)
            everything += x
            telling += [abs(v) for v, allowed in zip(x, tolerances, strict=True) if abs(v) > allowed]
    bands = [(_of(_run(claim, "claim"), name), row) for name in _BANDS for row, claim in enumerate(claims)]
    known = [(-width, row) for width, row in bands if width]
    if known:
        widths, rows = zip(*known, strict=True)
        axes.barh(rows, widths, height=0.56, color="#dcdcdc", label="tolerance or resolution", zorder=1)
        everything += widths
    telling += [width for claim in claims if (width := _of(_run(claim, "claim"), "resolution"))]
    axes.axvline(0.0, color=INK, linewidth=1.0, zorder=2)
    axes.set_xlabel("margin, in the claim's own units (left of zero and of any grey band: violated)")
    axes.grid(axis="y", color="#eeeeee")
    sizes = [abs(v) for v in everything if v != 0.0]
    if sizes:
        smallest = min(telling, default=max(sizes))
        _symlog_ticks(axes, smallest, max(sizes), low=min(everything) < 0, high=max(everything) > 0)


def _symlog_ticks(axes: Axes, smallest: float, largest: float, *, low: bool, high: bool) -> None:
    """A symmetric logarithmic axis that reaches down to the smallest margin, with at most four ticks a side."""
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    last = max(last, first + 1)
    axes.set_xscale("symlog", linthresh=10.0**first, linscale=0.5)
    step = max(1, math.ceil((last - first) / 3))
    powers = range(last, first - 1, -step)
    ticks = [-(10.0**p) for p in powers] * low + [0.0] + [10.0**p for p in reversed(powers)] * high
    names = [f"$-10^{{{p}}}$" for p in powers] * low + ["0"] + [f"$10^{{{p}}}$" for p in reversed(powers)] * high
    axes.set_xticks(ticks, names)
    axes.minorticks_off()
    axes.set_xlim(-(10.0**last) if low else -(10.0**first), 10.0**last if high else 10.0**first)


def _run(claim: Mapping[str, Any], role: str) -> Mapping[str, Any] | None:
    return next((run for run in claim["runs"] if run["role"] == role), None)


def _of(run: Mapping[str, Any] | None, field: str) -> float | None:
    outcome = run and run.get("outcome")
    value = outcome.get(field) if outcome else None
    return None if value is None or not math.isfinite(value) else float(value)
