"""Iterations of conjugate gradients with the multigrid cycle set by hand, and with the learned one of the same cost.

    python benchmarks/poisson_iterations.py [--cells 32 64 128] [--out FILE]

The hand-set cycle is the best of a grid on the training domains (`solvers.cycle_training.best_chebyshev`); domains and
right-hand sides here are others, but for "trained on": two of those domains, to see what unseen ones cost.  The ring and the
paddle are of kinds that training had nothing of.  Iterations are interpolated between whole ones, log-linearly in the residual.
A second table has whole iterations on right-hand sides of a smoke simulation, up to 64 cells.
"""

import argparse
import json
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import about, write_json
from rich.console import Console
from rich.table import Table

from solvers import gallery, multigrid, poisson, smoke
from solvers.cycle_training import spread, training_domains

DOMAINS = {"smoke_sphere": 0, "random_blobs": 100, "dam_break": 0, "mesh_torus": 0, "paddle": 3}  # and their seeds
SIMULATED = ("smoke_sphere", "random_blobs", "mesh_torus")
TOLERANCES = (1e-4, 1e-6, 1e-10)


def by_hand(ndim: int) -> multigrid.Cycle:
    """The control that training started from, as its file has it."""
    text = (resources.files("solvers") / "weights" / f"poisson{ndim}d.json").read_text(encoding="utf-8")
    hand = json.loads(text)["hand"]
    nothing = jnp.zeros((1, multigrid.FEATURES))
    return spread(multigrid.Cycle(jnp.asarray(hand["smoother"]), jnp.asarray(hand["coarse"]), nothing, nothing))


def crossing(residuals: np.ndarray, tolerance: float) -> float:
    """Where the residuals, one per iteration, cross the tolerance."""
    k = int(np.argmax(residuals <= tolerance))
    before, after = residuals[k - 1], residuals[k]
    return float(k - 1 + np.log(before / tolerance) / np.log(before / after))


def measure(cells: list[int], ndim: int, console: Console) -> list[dict]:
    cycles = {"by hand": by_hand(ndim), "learned": multigrid.load(f"poisson{ndim}d")}
    rows = []
    for n in cells:
        domains = {name: gallery.DOMAINS[name](n, ndim, seed=seed) for name, seed in DOMAINS.items()}
        domains |= {f"trained on, {k + 1}": d for k, d in enumerate(training_domains(n, ndim, 0)[:2])}
        for name, domain in domains.items():
            console.log(f"{name}, {n} cells per axis")
            rhs = jnp.asarray(gallery.plume(domain, 1))
            hierarchy = multigrid.hierarchy(poisson.laplacian(domain))
            row: dict = {"cells": n, "domain": name}
            for label, cycle in cycles.items():
                m = multigrid.preconditioner(hierarchy, cycle)
                _, info = poisson.solve(domain, rhs, rtol=min(TOLERANCES), preconditioner=m, throw=True)
                row[label] = [crossing(np.asarray(info.residuals), t) for t in TOLERANCES]
            rows.append(row)
    return rows


def simulated(cells: list[int], ndim: int, console: Console) -> list[dict]:
    """Iterations to 1e-6 on every eighth of 40 frames."""
    rows = []
    for n in [n for n in cells if n <= 64]:
        for name in SIMULATED:
            console.log(f"smoke, {name}, {n} cells per axis")
            domain = gallery.DOMAINS[name](n, ndim, seed=DOMAINS[name])
            m = multigrid.preconditioner(poisson.laplacian(domain))
            steps = [
                int(poisson.solve(domain, jnp.asarray(b), rtol=1e-6, preconditioner=m, throw=True)[1].steps)
                for b in smoke.right_hand_sides(domain, 40, every=8)
            ]
            rows.append({"cells": n, "domain": name, "steps": steps})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Iterations with the hand-set and with the learned multigrid cycle.")
    parser.add_argument("--cells", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--dimensions", type=int, default=3, choices=[2, 3])
    parser.add_argument("--out", type=Path, default=None, help="a JSON file")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console()
    rows, frames = (f(given.cells, given.dimensions, console) for f in (measure, simulated))
    table = Table(
        "cells", "domain", "by hand", "learned", title="Iterations to " + ", ".join(f"{t:g}" for t in TOLERANCES)
    )
    for row in rows:
        figures = ["  ".join(f"{x:.1f}" for x in row[label]) for label in ("by hand", "learned")]
        table.add_row(str(row["cells"]), row["domain"], *figures)
    console.print(table)
    table = Table("cells", "domain", "iterations", title="Iterations to 1e-6 on frames of a smoke simulation")
    for row in frames:
        table.add_row(str(row["cells"]), row["domain"], " ".join(map(str, row["steps"])))
    console.print(table)
    if given.out is not None:
        write_json(given.out, {**about("jax"), "dimensions": given.dimensions, "rows": rows, "frames": frames})
        console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
