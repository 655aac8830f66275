"""Text with LaTeX formulas as HTML with MathML, made when the page is written and needing nothing to be read.

latex2mathml does the translation.  Its serialiser undoes XML escaping (text inside ``\\text{...}`` could become
markup), so its element tree is cleaned here and serialised anew: only known elements and attributes survive.
The cleaning also repairs what MathML Core, which browsers implement, does not know: letter styles
(``mathvariant``) become the Unicode letters themselves, and relations marked as identifiers become operators.
"""

import html
import re
import unicodedata
from collections.abc import Iterator
from xml.etree.ElementTree import Element, tostring

# $...$ and $$...$$, where \$ is a dollar sign; the text between comes out as it is
_SEGMENT = re.compile(r"(?<!\\)\$\$(?P<display>.+?)(?<!\\)\$\$|(?<!\\)\$(?P<inline>.+?)(?<!\\)\$", re.DOTALL)
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_RELATIONS = frozenset(
    {"=", "<", ">", r"\le", r"\leq", r"\ge", r"\geq", r"\approx", r"\Rightarrow", r"\implies", r"\iff", r"\to",
     r"\Leftrightarrow", r"\quad", r"\qquad", r"\propto"}
)  # fmt: skip
_ELEMENTS = frozenset(
    {"math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup",
     "munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose"}
)  # fmt: skip
_ATTRIBUTES = frozenset(
    {"display", "displaystyle", "scriptlevel", "stretchy", "fence", "form", "minsize", "maxsize", "lspace", "rspace",
     "movablelimits", "accent", "linethickness", "columnalign", "columnspacing", "rowspacing", "width", "notation"}
)  # fmt: skip
_LETTER_STYLES = {
    "double-struck": ("DOUBLE-STRUCK",),
    "bold": ("BOLD",),
    "bold-italic": ("BOLD ITALIC", "BOLD"),  # digits have no bold italic form
    "script": ("SCRIPT",),
    "fraktur": ("FRAKTUR", "BLACK-LETTER"),
    "sans-serif": ("SANS-SERIF",),
    "monospace": ("MONOSPACE",),
}
# a sized bracket with an exponent would shrink; a stretched pair is a group and keeps its size
_SIZED = re.compile(r"\\[bB]igg?(l|r)(?![a-zA-Z])")
_SYNONYMS = (  # what latex2mathml does not know, in words that it does
    (r"\operatorname*{arg\,min}", r"\argmin "),
    (r"\operatorname*{arg\,max}", r"\argmax "),
    (r"\operatorname*", r"\operatorname"),
    (r"\mathds", r"\mathbb"),
    (r"\not=", r"\ne "),
    ("{aligned}", "{align*}"),
)
_LONG = 48  # characters of LaTeX above which a formula may be broken before a relation


def text(words: str) -> str:
    """`words` as HTML: formulas between dollar signs as MathML, everything else escaped (<= and >= as one sign).

    A formula that cannot be translated is shown as its LaTeX source; nothing here raises.
    """
    out, end = [], 0
    for match in _SEGMENT.finditer(words):
        out.append(_plain(words[end : match.start()]))
        display = match["display"] is not None
        out.append(formula(match["display"] if display else match["inline"], display=display))
        end = match.end()
    return "".join([*out, _plain(words[end:])])


def formula(latex: str, *, display: bool = False) -> str:
    """One LaTeX formula, without its dollar signs, as MathML (or as escaped source if it cannot be translated)."""
    source = _SIZED.sub(lambda match: r"\left" if match[1] == "l" else r"\right", latex)
    for command, known in _SYNONYMS:
        source = source.replace(command, known)
    for attempt in ([source] if display else list(_pieces(source)), [source], [latex]):
        try:
            return "<wbr>".join(_mathml(piece, display) for piece in attempt)
        except _Untranslatable:
            continue
    sign = "$$" if display else "$"
    return f'<code class="latex">{html.escape(sign + latex.strip() + sign)}</code>'


class _Untranslatable(ValueError):
    """latex2mathml failed, or left something in its output that is not mathematics."""


def _plain(words: str) -> str:
    return html.escape(words.replace(r"\$", "$").replace("<=", "≤").replace(">=", "≥"))


def _pieces(latex: str) -> Iterator[str]:
    """Cut a long formula before its outermost relations, so that the line can break there."""
    if len(latex) <= _LONG:
        yield latex
        return
    depth, piece = 0, ""
    for token in _TOKEN.findall(latex):
        if token in ("{", "(", "[", r"\left", r"\begin", r"\{"):
            depth += 1
        elif token in ("}", ")", "]", r"\right", r"\end", r"\}"):
            depth -= 1
        elif depth == 0 and token in _RELATIONS and piece.strip() and not piece.rstrip().endswith(("^", "_")):
            yield piece
            piece = ""
        piece += token
    yield piece


def _mathml(latex: str, display: bool) -> str:
    try:
        from latex2mathml.converter import convert_to_element

        tree = convert_to_element(latex, display="block" if display else "inline")
        _clean(tree)
    except Exception as error:  # whatever latex2mathml raises, its absence included: the report goes on
        raise _Untranslatable(latex) from error
    tree.set("alttext", latex.strip())
    return tostring(tree, encoding="unicode", short_empty_elements=False)


def _clean(element: Element) -> None:
    if element.tag not in _ELEMENTS:
        element.tag = "mrow"
    style = element.get("mathvariant", "")
    element.text = _letters(html.unescape(element.text or ""), style)
    if element.tag in ("mi", "mo", "mn") and (element.text == "&" or "\\" in element.text):
        raise _Untranslatable(element.text)  # an unknown command or a stray alignment mark
    keep = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES}
    if element.tag == "mi" and style == "normal":
        keep["mathvariant"] = "normal"  # the one letter style that browsers know
    if keep.get("width") == "negativethinmathspace":
        keep["width"] = "-0.1667em"
    element.attrib.clear()
    element.attrib.update(keep)
    _spacing(element)
    for child in element:
        _clean(child)
        child.tail = None
    _scripts(element)


def _letters(words: str, style: str) -> str:
    """The letters of `words` as the Unicode letters of that style, where there are such letters."""
    for name in _LETTER_STYLES.get(style, ()):
        words = "".join(_letter(character, name) for character in words)
    return words


def _letter(character: str, style: str) -> str:
    name = unicodedata.name(character, "")
    short = re.sub(r"^(LATIN|GREEK) | LETTER\b", "", name)  # CAPITAL E, SMALL THETA, DIGIT ONE
    if not short.startswith(("CAPITAL ", "SMALL ", "DIGIT ")):
        return character
    for candidate in (f"MATHEMATICAL {style} {short}", f"{style} {short}"):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return character


def _spacing(element: Element) -> None:
    """Operators marked as identifiers and the other way round get the right role, hence the right spacing."""
    words = element.text or ""
    if element.tag in ("mi", "mo") and len(words) == 1 and unicodedata.category(words) in ("Ps", "Pe"):
        element.set("form", "prefix" if unicodedata.category(words) == "Ps" else "postfix")
    if element.tag == "mo" and words in ("∞", "⊤", "∅", "′", "″"):
        element.tag = "mi"
    elif element.tag == "mi" and len(words) == 1 and unicodedata.category(words) in ("Sm", "Ps", "Pe", "Po"):
        if words not in "∞⊤∅∂′″…":
            element.tag = "mo"
            element.text = "∼" if words == "~" else words
        if words in "⌊⌋⌈⌉:":  # without these browsers would stretch or set a gap
            element.set("stretchy", "false")
    elif words in ("|", "‖"):  # absolute values and norms; the "given" of probability is another character
        element.attrib |= {"lspace": "0", "rspace": "0", "stretchy": element.get("stretchy", "false")}
    elif element.tag in ("mi", "mo") and len(words) > 1 and words[0].isalpha():  # max, tr, log
        element.tag = "mo"
        element.attrib |= {"lspace": "0.1em", "rspace": "0.1em"}


def _scripts(element: Element) -> None:
    """Signs in scripts take no room beside them; accents sit on their letter."""
    if element.tag in ("msub", "msup", "msubsup"):
        for script in list(element)[1:]:
            lone = script[0] if script.tag == "mrow" and len(script) == 1 else script
            if lone.tag == "mo":  # x^* is one sign, not a product waiting for its factors
                lone.attrib |= {"lspace": "0", "rspace": "0"}
    elif element.tag == "mover" and len(element) == 2 and element[1].tag == "mo":
        if element[1].text in ("^", "~", "―", "¯", "‾", "→", "˙", "¨"):
            element.set("accent", "true")
        if element[1].text == "―":
            element[1].text = "‾"
