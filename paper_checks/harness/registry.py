"""Finds papers and claims.  A paper is a module of `paper_checks` that defines `PAPER` and claims; nothing is global."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
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

    Raises ClaimError if two share a number, or one names another paper or a number that its paper does not list.
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
    order = {number: i for i, number in enumerate(paper.claims)}
    return sorted(found.values(), key=lambda c: order[c.number])


def load(stem: str) -> tuple[Paper, list[Claim]]:
    """A paper and its claims.  Raises UnknownClaimError with the nearest names."""
    if stem not in stems():
        raise UnknownClaimError(_unknown("paper", stem, stems()))
    module = importlib.import_module(f"paper_checks.{stem}")
    claims = claims_in(module)
    if module.PAPER.stem != stem:
        raise ClaimError(f"paper_checks/{stem}.py: PAPER.stem is {module.PAPER.stem!r}; it must equal the file's name")
    return module.PAPER, claims


def find(identifier: str) -> Claim:
    """The claim called "paper:number".  Raises UnknownClaimError with the nearest names."""
    stem, _, number = identifier.partition(":")
    if not number:
        everything = [c.id for s in stems() for c in load(s)[1]]
        raise UnknownClaimError(_unknown("claim", identifier, everything) + "; a claim is named paper:number")
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


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(known[:8]) or 'none'}"
    return f"no {what} called {name!r}{hint}"
