"""Samplers of a multiplicative diffusion at equal evaluations of the score: how far what they draw is from the data's law.

    python benchmarks/gbm_alternatives.py [--out FOLDER] [--count COUNT] [--seeds SEEDS] [--quick]

Three log-normal modes in the plane, the paper's process (σ = .8, μ = .32), the exact score, and a start from the exact law at
t = 1: a scrambled Sobol sequence, anew for each seed and the same for all samplers.  The distance is sliced Wasserstein-2 of
log x: over 16 directions, between the projections of the draws of all seeds together and the exact quantiles of the projected
mixture.  A jackknife over the seeds takes out what the number of draws adds to its square, and gives the 95 % intervals.
Samplers with noise of their own get four times the draws.

Evaluations of the score are what a step costs: methods with two a step have half as many steps.  Grids of times: uniform, as
the paper's; EDM's with ρ = 7 and the smallest level .002; `sinh_times` as it is, and with the width .7, which is best here.  The
second table has the differences from 200 steps of the paper's first sampler on its uniform grid: on this mixture, also with
eight levels that were fitted to it, and on three others.
"""

import argparse
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from measure import about, write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import special, stats

from generative.gbm_diffusion import GeometricBrownianMotion, edm_times, sinh_times, uniform_times
from generative.lognormal import LogNormalMixture
from generative.samplers import METHODS, sample

PROCESS = GeometricBrownianMotion()
BUDGETS = (5, 8, 10, 20, 50)
LIMIT = 0.003  # what ten evaluations may be worse by
ANGLES = (np.arange(16) + 0.5) * np.pi / 16
SHARES = (np.arange(2**16) + 0.5) / 2**16
END, CELLS = 8.0, 32_000  # projections are counted in cells of width 5e-4
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)


class Run(NamedTuple):
    """A sampler, a grid of times by its name, and evaluations of the score."""

    method: str
    grid: str
    evaluations: int


REFERENCE = Run("dls", "uniform", 200)
LONG = tuple(Run(method, "uniform", 200) for method in ("dls", "ums", "ancestral"))
CANDIDATES = (
    Run("multistep3", "sinh, .7", 10),
    Run("multistep3", "sinh", 10),
    Run("dpm2m", "sinh", 10),
    Run("multistep3", "sinh, .7", 8),
    Run("multistep3", "sinh", 8),
    Run("multistep3", "fitted", 8),
)
FITTED = np.array([0.8, 0.7702, 0.629, 0.4327, 0.3512, 0.242, 0.1533, 0.0838, 0.0])  # levels
GRIDS: dict[str, Callable[[int], Float[Array, " points"]]] = {
    "uniform": lambda steps: uniform_times(PROCESS, steps),
    "EDM": lambda steps: edm_times(PROCESS, steps, rho=7.0, smallest=0.002),
    "sinh": lambda steps: sinh_times(PROCESS, steps),
    "sinh, .7": lambda steps: sinh_times(PROCESS, steps, 0.7),
    "fitted": lambda steps: PROCESS.time(jnp.asarray(FITTED)),
}
TABLED = ("uniform", "EDM", "sinh", "sinh, .7")


# ---- targets and the distance -------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Weights, log-means and log-variances of modes in the plane that are round in log x."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def law(self) -> LogNormalMixture:
        both = np.stack([self.variances, self.variances], 1)
        return LogNormalMixture(*(np.asarray(v, np.float32) for v in (self.weights, self.means, both)))

    def points(self, seed: int, n: int, t: float) -> Float[Array, "n 2"]:
        """n points of the law at t, a power of two, from a scrambled Sobol sequence: mode, then two normal numbers."""
        u = stats.qmc.Sobol(3, seed=seed).random(n)
        mode = np.minimum(np.searchsorted(np.cumsum(self.weights), u[:, 0]), len(self.weights) - 1)
        z = special.ndtri(np.clip(u[:, 1:], 1e-9, 1 - 1e-9))
        variance = self.variances + float(PROCESS.variance(t))
        logs = self.means[mode] + float(PROCESS.shift(t)) + np.sqrt(variance[mode])[:, None] * z
        return jnp.asarray(np.exp(logs), jnp.float32)

    def quantiles(self) -> list[np.ndarray]:
        """Those of the projection on each direction, at SHARES: a mixture of normal laws on the line."""
        found = []
        for direction in DIRECTIONS.astype(float):
            means, deviations = self.means @ direction, np.sqrt(self.variances)
            y = np.linspace((means - 6 * deviations).min(), (means + 6 * deviations).max(), 400_001)
            law = special.ndtr((y[:, None] - means) / deviations) @ self.weights
            found.append(np.interp(SHARES, law, y))
        return found


def three_modes() -> Target:
    means = np.array([[-1.0, -0.6], [0.9, -0.4], [0.1, 1.0]])
    return Target(np.array([0.2, 0.3, 0.5]), means, np.array([0.15, 0.25, 0.2]) ** 2)


def others() -> dict[str, Target]:
    """Targets of other shapes."""
    ring = np.arange(5) * 2 * np.pi / 5
    five = Target(np.full(5, 0.2), 0.9 * np.stack([np.cos(ring), np.sin(ring)], 1), np.full(5, 0.12**2))
    sharp = Target(np.array([0.6, 0.4]), np.array([[-0.5, 0.3], [0.7, -0.2]]), np.array([0.05, 0.1]) ** 2)
    wide = Target(np.array([0.5, 0.5]), np.array([[-0.3, 0.0], [0.6, 0.4]]), np.array([0.4, 0.6]) ** 2)
    return {"five on a ring": five, "two sharp": sharp, "two wide": wide}


def counted(y: np.ndarray) -> np.ndarray:
    """(directions, cells): how many projections of the rows of y lie in each cell."""
    cells = [np.clip((y @ d + END) * (CELLS / (2 * END)), 0, CELLS - 1).astype(np.int32) for d in DIRECTIONS]
    return np.stack([np.bincount(c, minlength=CELLS) for c in cells])


def squared_distance(counts: np.ndarray, quantiles: list[np.ndarray]) -> float:
    """The square of sliced Wasserstein-2 between draws that were counted and the law of these quantiles."""
    edges, each = np.linspace(-END, END, CELLS + 1), []
    for row, exact in zip(counts, quantiles, strict=True):
        law = np.concatenate([[0], np.cumsum(row)]) / row.sum()
        each.append(np.mean((np.interp(SHARES, law, edges) - exact) ** 2))
    return float(np.mean(each))


class Error(NamedTuple):
    """The distance, of all draws together less what their number adds; what that is; and the distances without each seed."""

    corrected: float
    noise: float
    without: np.ndarray


def error_of(counts: Sequence[np.ndarray], quantiles: list[np.ndarray]) -> Error:
    total, n = sum(counts), len(counts)
    pooled = squared_distance(np.asarray(total), quantiles)
    without = np.array([squared_distance(total - one, quantiles) for one in counts])
    excess = (n - 1) * (without.mean() - pooled)
    return Error(math.sqrt(max(pooled - excess, 0)), math.sqrt(max(excess, 0)), np.sqrt(without))


def steps_of(run: Run) -> int:
    return run.evaluations if METHODS[run.method].correct is None else max(1, run.evaluations // 2)


def drawn(target: Target, run: Run, seed: int, starts: Float[Array, "n 2"]) -> np.ndarray:
    """log x of what a sampler draws; what has crossed zero counts as its mirror image."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(repr(run).encode()))
    score = target.law().log_score(PROCESS)
    x, info = sample(key, score, PROCESS, starts, GRIDS[run.grid](steps_of(run)), method=run.method)
    if int(info.overflowed):
        raise FloatingPointError(f"{run}: {int(info.overflowed)} entries overflowed")
    return np.log(np.abs(np.asarray(x)))


def measured(
    target: Target, runs: Sequence[Run], seeds: int, n: int, tick: Callable[[], None]
) -> tuple[dict[Run, Error], Error]:
    """The errors of all runs, and that of exact draws.  Samplers with noise of their own get four times the draws."""
    quantiles = target.quantiles()
    starts = [target.points(1000 + seed, 4 * n, 1.0) for seed in range(seeds)]
    found = {}
    for run in runs:
        counts = []
        for seed in range(seeds):
            few = starts[seed][: n * (4 if METHODS[run.method].draws else 1)]
            counts.append(counted(drawn(target, run, seed, few)))
            tick()
        found[run] = error_of(counts, quantiles)
    exact = [counted(np.log(np.asarray(target.points(seed, n, 0.0)))) for seed in range(seeds)]
    return found, error_of(exact, quantiles)


def difference(one: Error, other: Error) -> tuple[float, float, float]:
    """The difference of two errors from the same seeds, and the ends of its 95 % interval."""
    n, without = len(one.without), one.without - other.without
    deviation = math.sqrt((n - 1) * without.var())
    half = stats.t.ppf(0.975, n - 1) * deviation
    middle = one.corrected - other.corrected
    return middle, middle - half, middle + half


# ---- what is shown ------------------------------------------------------------------------------------------------------


def error_table(found: Mapping[Run, Error]) -> Table:
    table = Table("sampler", "grid", *map(str, BUDGETS), "200", title="Sliced W2 of log x, by evaluations of the score")
    for method in METHODS:
        for grid in TABLED:
            cells = [found.get(Run(method, grid, n)) for n in (*BUDGETS, 200)]
            table.add_row(method, grid, *("" if v is None else f"{v.corrected:.4f}" for v in cells))
        table.add_section()
    return table


def comparison(found: Mapping[Run, Error]) -> dict[str, Any]:
    rows = {}
    for run in CANDIDATES:
        middle, low, high = difference(found[run], found[REFERENCE])
        rows[f"{run.method}, {run.grid}, {run.evaluations}"] = {
            "error": found[run].corrected,
            "difference": middle,
            "interval": [low, high],
            "within": bool(high <= LIMIT),
        }
    return {"reference": found[REFERENCE].corrected, "candidates": rows}


def figure(found: Mapping[Run, Error]) -> Any:
    """Error against evaluations, one panel for each grid."""
    import matplotlib.figure

    fig = matplotlib.figure.Figure((14, 4.2), layout="constrained")
    panels = fig.subplots(1, len(TABLED), sharey=True)
    titles = {
        "uniform": "uniform times",
        "EDM": "EDM, ρ = 7, from .002",
        "sinh": "sinh_times",
        "sinh, .7": "sinh_times, width .7",
    }
    for panel, grid in zip(panels, TABLED, strict=True):
        for k, method in enumerate(METHODS):
            style = {"linewidth": 2.5, "zorder": 3} if method == "multistep3" else {"linewidth": 1.2}
            budgets = [n for n in (*BUDGETS, 200) if Run(method, grid, n) in found]
            errors = [found[Run(method, grid, n)].corrected for n in budgets]
            panel.plot(budgets, errors, marker="osv^D<>Ph"[k], markersize=4, color=f"C{k}", label=method, **style)
        panel.axhline(found[REFERENCE].corrected, color="0.4", linestyle="--", linewidth=1, label="200 steps of dls")
        panel.set(xscale="log", yscale="log", title=titles[grid], xlabel="evaluations of the score")
        panel.set_xticks((*BUDGETS, 200) if grid == "uniform" else BUDGETS)
        panel.get_xaxis().set_major_formatter("{x:.0f}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("sliced W2 of log x from the data's law")
    panels[-1].legend(fontsize=7, loc="upper right", ncols=2)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument(
        "--count",
        type=int,
        default=2**16,
        help="draws of a sampler without noise and seed, a power of two; with noise four times as many",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=4,
        help="of the first table; the second has twice as many",
    )
    parser.add_argument("--quick", action="store_true", help="few draws and seeds, for a look")
    given = parser.parse_args()
    n, seeds = (2**12, 2) if given.quick else (given.count, given.seeds)
    runs = [Run(method, grid, budget) for method in METHODS for grid in TABLED for budget in BUDGETS]
    runs = list(dict.fromkeys([*runs, *LONG]))
    few = [REFERENCE, *CANDIDATES]
    targets = {"three modes": three_modes(), **others()}
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("samplers", total=seeds * (len(runs) + 2 * len(few) * len(targets)))

        def tick() -> None:
            progress.advance(bar)

        found, exact = measured(three_modes(), runs, seeds, n, tick)
        compared = {name: measured(target, few, 2 * seeds, n, tick)[0] for name, target in targets.items()}
    tables = {name: comparison(one) for name, one in compared.items()}
    console.print(error_table(found))
    noise = max(error.noise for error in found.values())
    console.print(
        f"exact draws: {exact.corrected:.4f}; what the number of draws adds, before it is taken out: up to {noise:.4f}"
    )
    table = Table("modes", "200 steps of dls", "sampler, grid, evaluations", "error", "difference", "95 % interval")
    for name, one in tables.items():
        for label, row in one["candidates"].items():
            ends = "{:+.4f} to {:+.4f}".format(*row["interval"])
            table.add_row(
                name, f"{one['reference']:.4f}", label, f"{row['error']:.4f}", f"{row['difference']:+.4f}", ends
            )
        table.add_section()
    console.print(table)
    result = about("jax", "numpy", "scipy") | {
        "count": n,
        "seeds": seeds,
        "errors": [
            {**run._asdict(), "steps": steps_of(run), "error": v.corrected, "noise": v.noise}
            for run, v in found.items()
        ],
        "exact draws": {"error": exact.corrected, "noise": exact.noise},
        "comparisons": {"seeds": 2 * seeds, "limit": LIMIT, "targets": tables},
    }
    write_result(given.out / "gbm_alternatives.json", result, figure(found))


if __name__ == "__main__":
    main()
