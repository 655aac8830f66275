"""Before a staged program is run: the strategy of every choice, its legality, and how many worlds it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi import legality
from vi.chains import Chain, chain
from vi.choices import PATHWISE
from vi.errors import StrategyError
from vi.jaxpr import Choice, Cond, Const, Lanes, Program, Scan, depends

Path = tuple[int, ...]  # steps and branches that lead to a choice


class Star(NamedTuple):
    """A source of alternative worlds: repeats (of loops around it) × elements × options of them, from `offset` on."""

    offset: int
    repeats: int
    elements: int
    options: int

    @property
    def worlds(self) -> int:
        return self.repeats * self.elements * self.options


@dataclass(frozen=True)
class Site:
    """A choice as it will be run.

    path       where it stands in the program
    strategy   reparam, implicit, reinforce, enum, mvd, or none for a key
    repeats    how often the loops and lanes around it run it
    elements   independent elements of one run, axes added by vmap included
    exact      enumerated with an axis of its own, or along a chain (else, if `enum`, by local expectations)
    """

    path: Path
    label: str
    strategy: str
    repeats: int
    elements: int
    exact: bool


@dataclass(frozen=True)
class Plan:
    """sites: by path; stars: sources of alternative worlds by path (of a choice, or of lanes); total: number of worlds.

    chains: scans, by their step, whose choice is summed over exactly; combinations: of all exactly enumerated choices
    """

    sites: dict[Path, Site]
    stars: dict[Path, Star]
    total: int
    chains: dict[int, Chain]
    combinations: int


class _Lane(NamedTuple):
    path: Path
    repeats: int  # of the loops around the lanes
    length: int


class _Found(NamedTuple):
    path: Path
    step: Choice
    leaves: Any  # shapes and types of the parameters of one lane
    repeats: int
    lane: _Lane | None  # the innermost `Lanes` around it


def plan(program: Program, override: dict[str, str], max_worlds: int, sampled: frozenset[int] = frozenset()) -> Plan:
    """The plan of a program.

    override    label -> strategy, instead of what the program says
    max_worlds  a choice with more combinations of values than that is not enumerated exactly
    sampled     steps at the top level that must not be enumerated exactly, as others' combinations would be too many
    Raises StrategyError, which names the choice and what is legal, for an illegal strategy.
    """
    found = _find(program, (), 1, None)
    strategies = _strategies(program, found, override)
    sites: dict[Path, Site] = {}
    stars: dict[Path, Star] = {}
    chains: dict[int, Chain] = {}
    total, combinations = 0, 1
    for f in found:
        rule, strategy = f.step.rule, strategies[f.path]
        exact, elements = False, math.prod(f.step.lanes)
        if strategy in ("enum", "mvd"):
            options, elements = _counts(f, strategy)
            if strategy == "enum" and f.path[0] not in sampled:
                if len(f.path) == 1:
                    exact = options**elements <= max_worlds
                elif len(f.path) == 2 and options ** (2 * elements) <= max_worlds:
                    linked = chain(program, f.path[0])
                    # Values that move with the parameters make no state.
                    if linked is not None and not depends(lambda *ls, rule=rule: rule.support(ls)[0], *f.leaves):
                        exact, chains[f.path[0]] = True, linked
            if exact:
                combinations *= options**elements
            else:
                stars[f.path] = Star(total, f.repeats, elements, options)
                total += stars[f.path].worlds
        if strategy == "reinforce" and leaves_one_out(rule):
            lane = _lane(f)
            if lane.path not in stars:
                stars[lane.path] = Star(total, lane.repeats, lane.length, 1)
                total += stars[lane.path].worlds
        sites[f.path] = Site(f.path, rule.label, strategy, f.repeats, elements, exact)
    return Plan(sites, stars, total, chains, combinations)


def leaves_one_out(rule: Any) -> bool:
    return rule.strategy is not None and rule.strategy.leave_one_out


def _find(program: Program, path: Path, repeats: int, lane: _Lane | None) -> list[_Found]:
    found: list[_Found] = []
    for i, step in enumerate(program.steps):
        at = (*path, i)
        if isinstance(step, Choice):
            found.append(_Found(at, step, leaf_types(step, program), repeats, lane))
        elif isinstance(step, Scan):
            found += _find(step.body, at, repeats * step.length, lane)
        elif isinstance(step, Lanes):
            found += _find(step.body, at, repeats * step.length, _Lane(at, repeats, step.length))
        elif isinstance(step, Cond):
            for b, branch in enumerate(step.branches):
                found += _find(branch, (*at, b), repeats, lane)
    return found


def leaf_types(step: Choice, program: Program, lanes: bool = False) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and types of the parameters of a choice, with the lanes that vmap added or without."""
    skip = 0 if lanes else len(step.lanes)

    def one(atom: Any) -> Any:
        full = jax.eval_shape(lambda: jnp.asarray(atom.value)) if isinstance(atom, Const) else program.types[atom]
        return jax.ShapeDtypeStruct(full.shape[skip:], full.dtype)

    return tuple(map(one, step.inputs))


def _strategies(program: Program, found: list[_Found], override: dict[str, str]) -> dict[Path, str]:
    """The strategy of every choice: overridden, as written, or the best that is legal where the choice stands."""
    unknown = override.keys() - {f.step.rule.label for f in found}
    if unknown:
        raise ValueError(f"strategies: no choice is called {', '.join(sorted(unknown))}; there are {_labels(found)}")
    strategies: dict[Path, str] = {}
    chosen: set[Path] = set()
    for f in found:
        rule = f.step.rule
        asked = override.get(rule.label, rule.strategy.name if rule.strategy is not None else None)
        legal = _legal(f)
        if asked is None:
            strategies[f.path] = legal[0]
            continue
        if asked not in legal:
            raise StrategyError(f"{rule.label}: {asked} is not legal; legal here: {', '.join(legal)}")
        strategies[f.path] = asked
        chosen.add(f.path)
    pathwise = frozenset(f.path for f in found if strategies[f.path] in PATHWISE)
    lost = legality.discontinuous(program, pathwise) if pathwise else {}
    for f in found:
        if f.path not in lost:
            continue
        others = [s for s in _legal(f) if s not in PATHWISE]
        if f.path in chosen or not others:
            raise StrategyError(
                f"{f.step.rule.label}: {strategies[f.path]} is not legal, because the value drawn reaches "
                f"{lost[f.path]}, where its derivative is lost; legal here: {', '.join(others) or 'none'} "
                "(a function that is continuous all the same can be marked with vi.continuous)"
            )
        strategies[f.path] = others[0]
    return strategies


def _labels(found: list[_Found]) -> str:
    return ", ".join(sorted({f.step.rule.label for f in found})) or "none"


def _legal(f: _Found) -> tuple[str, ...]:
    kept: list[tuple[str, ...]] = []

    def look(leaves: Any) -> tuple[()]:
        kept.append(f.step.rule.legal(leaves))
        return ()

    jax.eval_shape(look, f.leaves)
    return kept[0]


def _counts(f: _Found, strategy: str) -> tuple[int, int]:
    """(alternatives of one element, elements with the lanes of vmap)."""

    def weights(leaves: Any) -> Any:
        key, rule = jax.random.key(0), f.step.rule
        return rule.alternatives(strategy, leaves, rule.draw(leaves, jax.random.key(1)), key)[1]

    options, *elements = jax.eval_shape(weights, f.leaves).shape
    return options, math.prod(elements) * math.prod(f.step.lanes)


def _lane(f: _Found) -> _Lane:
    label = f.step.rule.label
    if f.lane is not None and f.step.lanes:
        raise StrategyError(
            f"{label}: baseline leave_one_out has a jax.vmap around its vi.vmap; use vi.vmap for both, or map the whole "
            "expectation with vi.batch"
        )
    if f.lane is None:
        raise StrategyError(f"{label}: baseline leave_one_out compares the lanes of vi.vmap; it is in none")
    if f.lane.length < 2:
        raise StrategyError(f"{label}: baseline leave_one_out needs at least 2 lanes, found {f.lane.length}")
    return f.lane
