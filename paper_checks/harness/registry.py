"""Finds papers and claims.  A paper is a module of `paper_checks` that defines `PAPER` and claims; nothing is global."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType

from paper_checks.harness.claim import Claim, ClaimError, Paper

NOT_PAPERS = frozenset({"__main__", "conftest", "figures", "harness", "peers"})


class UnknownClaimError(LookupError):
    """No paper or claim of that name; the message lists the nearest ones."""


def stems() -> list[str]:
    """Stems of all papers that have a claims file, in alphabetical order."""
    import paper_checks

    return sorted(m.name for m in pkgutil.iter_modules(paper_checks.__path__) if m.name not in NOT_PAPERS)


def claims_in(module: ModuleType) -> list[Claim]:
    """The claims that a module defines, in the order of its source.

    Raises ClaimError if two share a number or a Python name (the second would hide the first), or one names another
    paper or a number that its paper does not list.
    """
    paper = getattr(module, "PAPER", None)
    if not isinstance(paper, Paper):
        raise ClaimError(f"{module.__name__} defines no PAPER = Paper(...), which every claims file must")
    found: dict[str, Claim] = {}
    for claim in vars(module).values():
        if not isinstance(claim, Claim):
            continue
        if claim.paper != paper.stem:
            raise ClaimError(f"claim {claim.id} stands in the file of {paper.stem}")
        if claim.number not in paper.claims:
            raise ClaimError(f"claim {claim.id}: {claim.number!r} is not among PAPER.claims {paper.claims}")
        if found.setdefault(claim.number, claim) is not claim:
            raise ClaimError(f"two claims are numbered {claim.id}")
    for name in dict.fromkeys([module.__name__, *(c.check.__module__ for c in found.values() if c.check is not None)]):
        if repeated := _bound_twice(name):
            raise ClaimError(
                f"{name}: two claims are bound to the name {repeated!r}, which hides the first; rename one"
            )
    order = {number: i for i, number in enumerate(paper.claims)}
    return sorted(found.values(), key=lambda c: order[c.number])


def _bound_twice(name: str) -> str | None:
    """A top-level Python name of a module to which its source binds claims more than once."""
    try:
        source = inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # typed in a notebook, or its source is not here
        return None
    return _repeated(source)


@functools.lru_cache(maxsize=64)
def _repeated(source: str) -> str | None:
    bound: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any(_makes_claim(d) for d in node.decorator_list):
            names = [node.name]
        elif isinstance(node, ast.Assign) and _makes_claim(node.value):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        if again := bound.intersection(names):
            return again.pop()
        bound.update(names)
    return None


def _makes_claim(node: ast.expr) -> bool:
    """Whether an expression is `claim(...)`, `claim(...)(check)` or `not_checkable(...)`."""
    while isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in ("claim", "not_checkable")


def load(stem: str) -> tuple[Paper, list[Claim]]:
    """A paper and its claims.  Raises UnknownClaimError with the nearest names."""
    if stem not in stems():
        numbered = [c.id for s in stems() for c in load(s)[1] if c.number.lower() == stem.lower()]
        raise UnknownClaimError(_unknown("paper", stem, stems(), numbered))
    module = importlib.import_module(f"paper_checks.{stem}")
    claims = claims_in(module)
    if module.PAPER.stem != stem:
        raise ClaimError(f"paper_checks/{stem}.py: PAPER.stem is {module.PAPER.stem!r}; it must equal the file's name")
    return module.PAPER, claims


def find(identifier: str) -> Claim:
    """The claim called "paper:number".  Raises UnknownClaimError with the nearest names."""
    stem, _, number = identifier.partition(":")
    if not number:
        everything = [c for s in stems() for c in load(s)[1]]
        numbered = [c.id for c in everything if c.number.lower() == identifier.lower()]
        message = _unknown("claim", identifier, [c.id for c in everything], numbered)
        raise UnknownClaimError(f"{message}; a claim is named paper:number")
    _, claims = load(stem)
    for claim in claims:
        if claim.number.lower() == number.lower():
            return claim
    raise UnknownClaimError(_unknown("claim", identifier, [c.id for c in claims]))


def select(names: Iterable[str] = (), kinds: Iterable[str] = ()) -> list[Claim]:
    """Claims of the named papers ("sgd_stability") and claims ("sgd_stability:T2"); all of them without names."""
    names, kinds = list(names), set(kinds)
    chosen: dict[str, Claim] = {}
    for name in names or stems():
        for claim in [find(name)] if ":" in name else load(name)[1]:
            if not kinds or claim.kind in kinds:
                chosen.setdefault(claim.id, claim)
    return list(chosen.values())


def _unknown(what: str, name: str, known: list[str], first: Iterable[str] = ()) -> str:
    near = list(dict.fromkeys([*first, *difflib.get_close_matches(name, known, n=3, cutoff=0.4)]))[:3]
    hint = f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(known[:8]) or 'none'}"
    return f"no {what} called {name!r}{hint}"
