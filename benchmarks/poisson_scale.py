"""Memory of a solve, and the share of the memory bandwidth that the multigrid cycle reaches, on whatever device JAX has.

    python benchmarks/poisson_scale.py [--cells 64 128 256 512] [--out FILE]

A grid is left out when the device says that it has less memory than the compiled program asks for.  Traffic is counted as what
each pass over a grid has to read and write at least once; the copy that it is compared with reads and writes one float32 array
of the finest grid's size.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from measure import about, write_json
from rich.console import Console
from rich.table import Table

from solvers import gallery, multigrid, poisson


def traffic(m: multigrid.Preconditioner) -> float:
    """Bytes that one cycle has to move, pass by pass: x and r are float32, the finest diagonal is a byte a cell, coarse levels
    read three links, the diagonal and its scaled inverse."""
    steps, visits = m.cycle.smoother.shape[1], m.cycle.coarse.shape[1]
    total, often = 0.0, 1.0
    for level, a in enumerate(m.levels[:-1]):
        cells, operator = a.diagonal.size, 1 if level == 0 else 20
        first = 4 + operator + 4  # r -> x
        smoothing = 4 + 4 + operator + 4  # x, r -> x
        restricting = 4 + 4 + operator + 0.5  # x, r -> a block each
        prolonging = 4 + 0.5 + operator + 4
        total += often * cells * (first + (steps - 1) * smoothing + restricting + prolonging + steps * smoothing)
        below = m.levels[level + 1].diagonal.size
        total += (
            often * visits * below * (4 + 4 + 16 + 4 + 12)
        )  # residual of the coarse problem, and the sum of corrections
        often *= visits
    return total


def best(run: Callable[[], Any], repeats: int = 7) -> float:
    jax.block_until_ready(run())
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return min(took)


def copied(x: jax.Array) -> jax.Array:
    return x + 1


def measure(n: int) -> dict[str, Any]:
    domain = gallery.smoke_sphere(n)
    rhs = jnp.asarray(gallery.plume(domain, 1))
    cells = n**3
    tolerances = (jnp.asarray(t, rhs.dtype) for t in (1e-6, 0.0))
    program = poisson._pressure.lower(domain, rhs, None, None, *tolerances, 200).compile()
    memory = program.compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    row = {"cells": n, "unknowns": int(domain.fluid.sum()), "bytes per cell": needed / cells, "gigabytes": needed / 1e9}
    if limit is not None and needed > 0.9 * limit:
        return row
    m = multigrid.preconditioner(poisson.laplacian(domain))
    apply, copy = eqx.filter_jit(lambda m, r: m(r)), jax.jit(copied)
    r = rhs.astype(jnp.float32)
    cycle, one = best(lambda: apply(m, r)), best(lambda: copy(r))
    _, info = poisson.solve(domain, rhs, preconditioner=m, throw=True)
    solve = best(lambda: poisson.solve(domain, rhs, preconditioner=m)[0], 3)
    moved = traffic(m)
    return row | {
        "iterations": int(info.steps),
        "solve seconds": solve,
        "cycle seconds": cycle,
        "cycle bytes per cell": moved / cells,
        "cycle gigabytes per second": moved / cycle / 1e9,
        "copy gigabytes per second": 8 * cells / one / 1e9,
        "share of the copy": (moved / cycle) / (8 * cells / one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and bandwidth of the Poisson solver.")
    parser.add_argument("--cells", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--out", type=Path, default=None, help="a JSON file")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=140)
    table = Table("cells", "GB", "B/cell", "iterations", "solve s", "cycle ms", "cycle GB/s", "copy GB/s", "share")
    rows = []
    for n in given.cells:
        console.log(f"{n}³")
        row = measure(n)
        rows.append(row)
        shown = [f"{row['gigabytes']:.2f}", f"{row['bytes per cell']:.0f}"]
        if "iterations" in row:
            shown += [str(row["iterations"]), f"{row['solve seconds']:.3f}", f"{row['cycle seconds'] * 1e3:.1f}"]
            shown += [f"{row[k]:.1f}" for k in ("cycle gigabytes per second", "copy gigabytes per second")]
            shown += [f"{row['share of the copy']:.0%}"]
        table.add_row(f"{n}³", *shown)
        if given.out is not None:
            write_json(given.out, {**about("jax"), "rows": rows})
    console.print(table)
    if given.out is not None:
        console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
