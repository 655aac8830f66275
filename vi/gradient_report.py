"""Which gradient estimator to take for a choice: variance, cost and agreement of all that are legal, measured.

print(vi.gradient_report(elbo, key, theta, phi, x, argnums=1))
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vi.errors import StrategyError
from vi.expectation import Expectation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRATEGIES = ("reparam", "implicit", "enum", "mvd", "reinforce")
DISAGREES = 4.5  # standard errors
_FALSE_ALARM = 1e-3  # for the whole report, where it makes more comparisons than 4.5 standard errors allow
_TIMED = 7  # chunks that are timed, after one that warms up
_FLOATS = 2**22  # gradient coordinates held at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, its standard error and the variance of one draw, coordinate by coordinate (float64)."""

    mean: Float[np.ndarray, "*shape"]
    se: Float[np.ndarray, "*shape"]
    variance: Float[np.ndarray, "*shape"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """One choice under one strategy, the other choices as written.

    as_written      whether this is what the program says (or what is chosen for it) without this report
    value           of the objective
    gradient        by parameter leaf
    total_variance  of the gradient: the sum over all coordinates of all leaves
    seconds         a gradient's share of the time of a compiled, vmapped chunk; the median over chunks after the first
    flops           of a gradient, by XLA's count (which takes the body of a loop once); None where XLA gives none
    z               the largest difference to another estimate, in standard errors, over the value and all coordinates
    agrees          z is within the report's limit
    """

    label: str
    strategy: str
    as_written: bool
    value: Moments
    gradient: Mapping[str, Moments]
    total_variance: float
    seconds: float
    flops: float | None
    z: float
    agrees: bool

    @property
    def cost(self) -> float:
        """Total variance times seconds: the time needed for a gradient of variance one.  Less is better."""
        return self.total_variance * self.seconds


@dataclass(frozen=True)
class Illegal:
    """A strategy that a choice cannot have, and why."""

    label: str
    strategy: str
    reason: str


@dataclass(frozen=True, eq=False)
class GradientReport:
    """What `gradient_report` found; prints as a table.

    draws      of every estimate
    chunk      draws computed at a time
    limit      standard errors beyond which two estimates disagree
    backend    where it ran
    estimates  in the order of the choices
    illegal    strategies that were asked for and cannot be had
    """

    draws: int
    chunk: int
    limit: float
    backend: str
    estimates: tuple[Estimate, ...]
    illegal: tuple[Illegal, ...]

    def table(self) -> Table:
        """A row for every choice and strategy, an asterisk at what the program says; below, what is not legal."""
        leaves = list(self.estimates[0].gradient)
        shown = leaves if len(leaves) <= 3 else []
        notes = [
            "* as written; Var: of one draw, for an array the mean over its coordinates; µs and kflop: of one gradient;"
        ]
        notes += ["max |z|: largest difference to another row, in standard errors"]
        notes += [f"not legal: {i.reason}" for i in self.illegal]
        table = Table(
            title=f"gradient estimators, {self.draws} draws",
            caption=Text("\n".join(notes), style="dim"),
            caption_justify="left",
        )
        for name in ("choice", "strategy", "value"):
            table.add_column(name, overflow="fold")
        table.add_column("Var", justify="right")
        for leaf in shown:
            table.add_column(escape(f"∂ {leaf}"), overflow="fold")
        for name in ("total Var ∂", "µs", "Var ∂ · s", "kflop", "max |z|"):
            table.add_column(name, justify="right")
        for above, e in zip((None, *self.estimates), self.estimates, strict=False):
            if above is not None and above.label != e.label:
                table.add_section()
            table.add_row(
                escape(e.label),
                e.strategy + (" *" if e.as_written else ""),
                _cell(e.value),
                f"{e.value.variance:.3g}",
                *(_cell(e.gradient[leaf]) for leaf in shown),
                f"{e.total_variance:.3g}",
                f"{e.seconds * 1e6:.3g}",
                f"{e.cost:.3g}",
                "–" if e.flops is None else f"{e.flops / 1e3:.3g}",
                f"{e.z:.1f}" if e.agrees else f"[bold red]{e.z:.3g} disagrees[/]",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON: arrays as lists, None for what is not finite."""
        return {
            "draws": self.draws,
            "chunk": self.chunk,
            "limit": self.limit,
            "backend": self.backend,
            "estimates": [
                {
                    "label": e.label,
                    "strategy": e.strategy,
                    "as_written": e.as_written,
                    "value": _listed(e.value),
                    "gradient": {
                        leaf: _listed(m) | {"mean_variance": _finite(m.variance.mean() if m.variance.size else 0.0)}
                        for leaf, m in e.gradient.items()
                    },
                    "total_variance": _finite(e.total_variance),
                    "seconds": e.seconds,
                    "cost": _finite(e.cost),
                    "flops": e.flops,
                    "z": _finite(e.z),
                    "agrees": e.agrees,
                }
                for e in self.estimates
            ],
            "illegal": [{"label": i.label, "strategy": i.strategy, "reason": i.reason} for i in self.illegal],
        }

    def figure(self) -> Figure:
        """Variance times cost of every choice and strategy on a logarithmic axis; less is better."""
        from matplotlib.figure import Figure

        rows = self.estimates
        exact = [not e.total_variance > _rounding(e) for e in rows]
        measured = [e.cost for e, none in zip(rows, exact, strict=True) if not none and math.isfinite(e.cost)]
        low, high = (min(measured), max(measured)) if measured else (1.0, 1.0)
        figure = Figure(figsize=(7, 1.3 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        edge = low / 30 if any(exact) else low  # where estimates without variance stand
        labels = list(dict.fromkeys(e.label for e in rows))
        for y, (e, none) in enumerate(zip(rows, exact, strict=True)):
            colour = f"C{labels.index(e.label) % 10}"
            finite = math.isfinite(e.cost)
            x = e.cost if finite and not none else edge
            axes.plot(
                [x], [y], "<" if none else "o" if finite else "x", color=colour, fillstyle="none" if none else "full"
            )
            note = f"{e.cost:.2g}" if finite else "not finite"
            note = ("no variance" if none else note) + ("" if e.agrees else ", disagrees")
            axes.annotate(note, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(edge / 3, high * 20)  # the notes stand to the right
        axes.set_yticks(
            range(len(rows)), [f"{e.label}: {e.strategy}{' (as written)' if e.as_written else ''}" for e in rows]
        )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"variance of the gradient × seconds for one ({self.backend}); less is better")
        axes.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        return figure


def gradient_report(
    objective: Expectation,
    key: Key[Array, ""],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    strategies: Mapping[str, Iterable[str]] | None = None,
    draws: int = 1000,
    chunk: int | None = None,
) -> GradientReport:
    """The gradient of `objective` at `args` under every strategy of every choice, one choice at a time.

    objective   an expectation, called as objective(key, *args)
    argnums     which of `args` to differentiate, counted without the key; their array leaves must be real floating
    strategies  label of a choice -> strategies to try.  By default all of them for all choices; those that are not legal
                are listed with the reason
    draws       for every estimate, each with its own keys, so that estimates are independent of each other
    chunk       draws computed at a time, to bound the memory; by default an eighth of them, fewer for large gradients

    Estimates agree if no two means, of the value or of a coordinate of the gradient, are further apart than 4.5 standard
    errors, or what gives a false alarm in one report of a thousand if that is more (many coordinates).  A strategy that
    disagrees with the others has a fault, or a variance that `draws` draws do not show.

    Each strategy is compiled once.  Times are those of chunks of all strategies in turn, so that a busy machine slows all
    alike.  Raises TypeError for an integer parameter, which it names, ValueError for an unknown label or strategy.
    """
    if not isinstance(objective, Expectation):
        raise TypeError(f"gradient_report: objective is a {type(objective).__name__}; expected an Expectation")
    if draws < 2:
        raise ValueError(f"gradient_report: draws is {draws}; expected at least 2")
    if chunk is not None and chunk < 1:
        raise ValueError(f"gradient_report: chunk is {chunk}; expected at least 1")
    trained, fixed, names = _parameters(objective, args, argnums)
    candidates, illegal = _candidates(objective, args, strategies)
    coordinates = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(trained))
    size = min(chunk or math.ceil(draws / (1 + _TIMED)), max(1, _FLOATS // max(1, coordinates)), draws)

    # Choices as written are one and the same estimate in every choice's rows.
    compiled: dict[tuple[str, ...], Any] = {}
    kept: list[tuple[str, str, bool, tuple[str, ...]]] = []
    for label, strategy, as_written, variant in candidates:
        program = tuple(site.strategy for site in variant.sites(*args))
        try:
            if program not in compiled:
                compiled[program] = _compile(variant, trained, fixed, size)
        except StrategyError as error:  # legal for the family, but not for this parameter of it
            illegal.append(Illegal(label, strategy, str(error)))
        else:
            kept.append((label, strategy, as_written, program))
    if not kept:
        reasons = "; ".join(f"{i.label}, {i.strategy}: {i.reason}" for i in illegal)
        raise StrategyError(f"gradient_report: there is nothing to compare: {reasons or 'no choice to differentiate'}")

    found, seconds = _measure(compiled, jax.random.split(key, len(compiled)), trained, draws, size)
    limit = _limit(len(compiled), 1 + coordinates)
    apart = _apart(found)
    estimates = []
    for label, strategy, as_written, program in kept:
        value, *gradient = found[program]
        z = apart[program]
        estimates.append(
            Estimate(
                label,
                strategy,
                as_written,
                value,
                dict(zip(names, gradient, strict=True)),
                float(sum(m.variance.sum() for m in gradient)),
                seconds[program],
                _flops(compiled[program], size),
                z,
                bool(z <= limit),  # not so for NaN
            )
        )
    return GradientReport(draws, size, limit, jax.default_backend(), tuple(estimates), tuple(illegal))


# --- what is compared ---


def _parameters(objective: Expectation, args: tuple[Any, ...], argnums: int | Sequence[int]) -> Any:
    """(the leaves to differentiate, the rest of the arguments, names of the leaves)."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or not all(-len(args) <= n < len(args) for n in numbers):
        raise ValueError(f"gradient_report: argnums is {argnums}; expected numbers of the {len(args)} arguments")
    numbers = tuple(sorted({n % len(args) for n in numbers}))
    names = _argument_names(objective, len(args))
    leaves: list[str] = []
    mask: list[PyTree] = []
    for n, arg in enumerate(args):
        if n not in numbers:
            mask.append(jax.tree.map(lambda _: False, arg))
            continue
        flags = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            name = names[n] + jax.tree_util.keystr(path)
            # Leaves that are no numbers (functions, names) have no derivative to miss.
            number = eqx.is_array_like(leaf) and not isinstance(leaf, bool)
            if number and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                kind = f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
                raise TypeError(
                    f"gradient_report: {name} is {kind}, which has no derivative; expected real floating parameters "
                    f"in the arguments {numbers} (argnums)"
                )
            flags.append(number)
            leaves += [name] if number else []
        mask.append(jax.tree.unflatten(jax.tree.structure(arg), flags))
    if not leaves:
        raise TypeError(f"gradient_report: the arguments {numbers} (argnums) hold no floating parameters")
    trained, fixed = eqx.partition(args, tuple(mask))
    return jax.tree.map(jnp.asarray, trained), fixed, leaves


def _argument_names(objective: Expectation, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(objective.f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [f"args[{n}]" for n in range(len(names), count)]


def _candidates(
    objective: Expectation, args: tuple[Any, ...], strategies: Mapping[str, Iterable[str]] | None
) -> tuple[list[tuple[str, str, bool, Expectation]], list[Illegal]]:
    """(label, strategy, as written, the expectation) of all that are legal, and those that are not."""
    sites = objective.sites(*args)
    written: dict[str, set[str]] = {}
    for site in sites:
        if site.strategy != "none":  # a key has nothing to differentiate
            written.setdefault(site.label, set()).add(site.strategy)
    asked = strategies if strategies is not None else dict.fromkeys(written, STRATEGIES)
    tried = {label: names if isinstance(names, str) else tuple(names) for label, names in asked.items()}
    for label, names in tried.items():
        if label not in written:
            there = ", ".join(written) or "none"
            raise ValueError(f"gradient_report: strategies names the choice {label!r}; there are {there}")
        unknown = [name for name in names if name not in STRATEGIES]
        if isinstance(names, str) or unknown:
            raise ValueError(
                f"gradient_report: strategies of {label!r} are {names!r}; expected some of {', '.join(STRATEGIES)}"
            )
    legal, illegal = [], []
    for label, names in tried.items():
        if len(written[label]) > 1:  # choices that share a label and not a strategy
            legal.append((label, " + ".join(sorted(written[label])), True, objective))
        for name in names:
            as_written = written[label] == {name}
            variant = objective if as_written else objective.with_strategies({label: name})
            try:
                variant.sites(*args)
            except StrategyError as error:
                illegal.append(Illegal(label, name, str(error)))
            else:
                legal.append((label, name, as_written, variant))
    return legal, illegal


# --- measuring ---


def _compile(variant: Expectation, trained: PyTree, fixed: PyTree, size: int) -> Any:
    """(size,) keys, parameters, how many of the draws count -> means and sums of squares of value and gradient."""

    def chunk(keys: Array, trained: PyTree, arrays: PyTree, count: Array) -> list[tuple[Array, Array]]:
        def one(key: Array) -> list[Array]:
            value, gradient = jax.value_and_grad(lambda t: variant(key, *eqx.combine(t, arrays, static)))(trained)
            return [value, *jax.tree.leaves(gradient)]

        counts = jnp.arange(size) < count

        def moments(draws: Array) -> tuple[Array, Array]:
            counted = counts.reshape((size,) + (1,) * (draws.ndim - 1))
            mean = jnp.where(counted, draws, 0).sum(0) / count
            return mean, jnp.where(counted, (draws - mean) ** 2, 0).sum(0)

        return [moments(draws) for draws in jax.vmap(one)(keys)]

    arrays, static = eqx.partition(fixed, eqx.is_array)
    keys = jax.random.split(jax.random.key(0), size)
    lowered = jax.jit(chunk).lower(keys, trained, arrays, jnp.int32(size))
    program = lowered.compile()
    return lambda keys, trained, count: program(keys, trained, arrays, count), program


def _measure(
    compiled: Mapping[tuple[str, ...], Any], keys: Array, trained: PyTree, draws: int, size: int
) -> tuple[dict[tuple[str, ...], list[Moments]], dict[tuple[str, ...], float]]:
    chunks = math.ceil(draws / size)
    sums: dict[tuple[str, ...], Any] = {}
    times: dict[tuple[str, ...], list[float]] = {program: [] for program in compiled}
    # If the draws are few chunks, more are run for their times alone.
    for c in range(max(chunks, 1 + _TIMED)):
        count = min(size, draws - c * size) if c < chunks else size
        for program, key in zip(compiled, keys, strict=True):
            call, _ = compiled[program]
            chunk_keys = jax.block_until_ready(jax.random.split(jax.random.fold_in(key, c), size))
            began = time.perf_counter()
            result = jax.block_until_ready(call(chunk_keys, trained, jnp.int32(count)))
            times[program].append((time.perf_counter() - began) / size)
            if c < chunks:
                sums[program] = _merged(sums.get(program), count, result)
    found = {program: _moments(n, parts) for program, (n, parts) in sums.items()}
    return found, {program: statistics.median(t[1:]) for program, t in times.items()}


def _merged(old: Any, count: int, result: Any) -> Any:
    """Means and sums of squares of two groups of draws together (Chan, Golub, LeVeque 1983), in double precision."""
    new = [(np.asarray(mean, np.float64), np.asarray(square, np.float64)) for mean, square in result]
    if old is None:
        return count, new
    n, parts = old
    total = n + count
    merged = []
    for (a, a2), (b, b2) in zip(parts, new, strict=True):
        mean, square = a + (b - a) * count / total, a2 + b2 + (b - a) ** 2 * n * count / total
        merged.append((np.asarray(mean), np.asarray(square)))  # not NumPy's scalars
    return total, merged


def _moments(n: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> list[Moments]:
    return [
        Moments(np.asarray(mean), np.asarray(np.sqrt(square / (n - 1) / n)), np.asarray(square / (n - 1)))
        for mean, square in parts
    ]


def _flops(compiled: Any, size: int) -> float | None:
    _, program = compiled
    try:
        analysis = program.cost_analysis()
    except NotImplementedError:  # the backend has none
        return None
    if isinstance(analysis, list | tuple):
        analysis = analysis[0] if analysis else None
    flops = (analysis or {}).get("flops")
    return None if flops is None or flops < 0 else float(flops) / size


# --- agreement ---


def _limit(programs: int, figures: int) -> float:
    comparisons = max(1, programs * (programs - 1) // 2 * figures)
    return max(DISAGREES, statistics.NormalDist().inv_cdf(1 - _FALSE_ALARM / (2 * comparisons)))


def _apart(found: Mapping[tuple[str, ...], list[Moments]]) -> dict[tuple[str, ...], float]:
    """The largest difference of each to another, in standard errors; NaN if something is not finite."""

    def between(a: Moments, b: Moments) -> float:
        # Means without variance differ by rounding, of the size of float32's of the terms they are made of.
        scale = max(float(np.sqrt(m.mean**2 + m.variance).max(initial=0.0)) for m in (a, b))
        with np.errstate(invalid="ignore"):
            error = np.sqrt(a.se**2 + b.se**2 + (64 * np.finfo(np.float32).eps * scale) ** 2)
            z = np.abs(a.mean - b.mean) / np.where(error == 0, 1, error)
        return float(z.max(initial=0.0))

    return {
        p: float(
            np.max([between(a, b) for q in found if q != p for a, b in zip(found[p], found[q], strict=True)] or [0.0])
        )
        for p in found
    }


def _rounding(e: Estimate) -> float:
    """Variance that the rounding of a float32 gradient of this size gives by itself; zero for a zero gradient."""
    size = sum(float((m.mean**2).sum()) for m in e.gradient.values())
    return (16 * float(np.finfo(np.float32).eps)) ** 2 * size


# --- showing ---


def _cell(m: Moments) -> str:
    if m.mean.shape == ():
        return f"{m.mean:.4g} ± {m.se:.2g}"
    return f"Var {m.variance.mean():.3g}" if m.variance.size else "empty"


def _finite(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None


def _listed(m: Moments) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        return [plain(y) for y in x] if isinstance(x, list) else _finite(x)

    return {"mean": plain(m.mean.tolist()), "se": plain(m.se.tolist()), "variance": plain(m.variance.tolist())}
