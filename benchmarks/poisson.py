"""Seconds, iterations and memory of solvers for the pressure Poisson problem, side by side in one process.

    python benchmarks/poisson.py [--cells 32 64 128] [--threads 2] [--out FOLDER] [--methods NAME ...]

Domains and right-hand sides are not those that anything was trained on.  Every solver is set up (timed), warmed up where it
compiles, and then solves the same systems in turns, in an order that rotates, until it has used up `--seconds` or had `--rounds`
turns.  What counts as solved is the residual in float64 of what it returns, computed here.  Peers that are not installed
are left out, and named.  Cases that are in FOLDER/poisson.json already are not measured again, so a run can be interrupted.

pyamgcl comes as source: it needs a C++ compiler, pybind11 and the Boost headers (on Debian: g++, libboost-dev), then
`pip install --no-binary pyamgcl pyamgcl`.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

TOLERANCES = (1e-4, 1e-6, 1e-10)
DOMAINS = {"smoke_sphere": 0, "random_blobs": 100, "dam_break": 0}  # and their seeds
OURS = "learned cycle"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Solvers of the pressure Poisson problem, side by side.")
    parser.add_argument("--cells", type=int, nargs="+", default=[32, 64, 128], help="per axis")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", default=None, help="some of the names in poisson_methods.METHODS")
    parser.add_argument("--threads", type=int, default=2, help="cores for everything")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="after so many a method has no more turns in a case"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def measure_case(domain_name: str, n: int, names: list[str], given: argparse.Namespace, console: Any) -> dict[str, Any]:
    import numpy as np
    from measure import rotated
    from poisson_methods import METHODS, prepared

    from solvers import gallery, poisson
    from solvers.stencil import residual

    domain = gallery.DOMAINS[domain_name](n, seed=DOMAINS[domain_name])
    b = np.asarray(gallery.plume(domain, 1))
    a = poisson.laplacian(domain)
    size = float(np.linalg.norm(b))
    rows: dict[str, Any] = {}
    ready = {}
    for name in [name for name in names if n <= METHODS[name].most]:
        try:
            ready[name], setup = prepared(METHODS[name], domain)
        except ImportError as error:
            console.log(f"{name}: left out ({error})")
            continue
        kept = ready[name].kept / int(domain.fluid.sum())
        rows[name] = {"setup": setup, "bytes per unknown": kept, "threads": METHODS[name].threads, "tolerances": {}}
        if METHODS[name].compiled:
            ready[name].solve(b, 1e-2)
    for tolerance in TOLERANCES:
        took: dict[str, list[float]] = {}
        for turn in range(given.rounds):
            for name in rotated(list(ready), turn):
                seconds = took.setdefault(name, [])
                if sum(seconds) > given.seconds or (name.endswith("float32") and tolerance < 1e-5):
                    continue
                start = time.perf_counter()
                solved = ready[name].solve(b, tolerance)
                seconds.append(time.perf_counter() - start)
                if turn == 0:
                    left = float(np.linalg.norm(residual(a, np.asarray(solved.x, np.float64), b))) / size
                    work = METHODS[name].work
                    rows[name]["tolerances"][f"{tolerance:g}"] = {
                        "iterations": solved.iterations,
                        "residual": left,
                        "reached": left <= tolerance * 1.01,
                        "products": None if work is None else work * solved.iterations,
                        "residuals": [float(f"{x:.4g}") for x in solved.residuals[:60]],
                    }
                    console.log(f"{name}, {tolerance:g}: {solved.iterations} in {seconds[-1]:.3f} s")
        for name, seconds in took.items():
            if seconds:
                rows[name]["tolerances"][f"{tolerance:g}"]["seconds"] = seconds
    return {"cells": n, "domain": domain_name, "unknowns": int(domain.fluid.sum()), "methods": rows}


def ratio(case: dict[str, Any], name: str, tolerance: str, setup: bool) -> tuple[float, float, float] | None:
    """Median and range over the turns of the seconds of a method over ours, set-up included or not."""
    import numpy as np

    rows = case["methods"]
    if tolerance not in rows[name]["tolerances"]:
        return None
    theirs, mine = (np.asarray(rows[k]["tolerances"][tolerance]["seconds"]) for k in (name, OURS))
    k = min(len(theirs), len(mine))
    extra = (rows[name]["setup"], rows[OURS]["setup"]) if setup else (0, 0)
    values = (theirs[:k] + extra[0]) / (mine[:k] + extra[1])
    return float(np.median(values)), float(values.min()), float(values.max())


def show(case: dict[str, Any], console: Any) -> None:
    import numpy as np
    from rich.table import Table

    table = Table(title=f"{case['domain']}, {case['cells']}³ cells, {case['unknowns']} unknowns")
    table.add_column("method", no_wrap=True)
    iterations = [f"{t:g}: it. · s" for t in TOLERANCES]
    for column in ("set-up s", "B/unknown", *iterations, "products", "1e-6: s / ours", "with set-up"):
        table.add_column(column, no_wrap=True)
    for name, row in case["methods"].items():
        cells = []
        for t in TOLERANCES:
            at = row["tolerances"].get(f"{t:g}")
            cells.append(
                ""
                if at is None
                else f"{at['iterations']} · {np.median(at['seconds']):.3f}{'' if at['reached'] else ' (missed)'}"
            )
        products = row["tolerances"].get("1e-06", {}).get("products")  # work at 1e-6, in products with A
        cells.append("" if products is None else f"{products:.0f}")
        ratios = [ratio(case, name, "1e-06", setup) for setup in (False, True)]
        shown = ["" if r is None else f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" for r in ratios]
        label = name if row.get("threads", "all") == "all" else f"{name} (one core)"
        table.add_row(label, f"{row['setup']:.3f}", f"{row['bytes per unknown']:.0f}", *cells, *shown)
    console.print(table)


def figure(cases: list[dict[str, Any]]) -> Any:
    """Left: residual against seconds on the largest smoke domain.  Right: seconds per unknown at 1e-6 against the grid."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    smoke = [c for c in cases if c["domain"] == "smoke_sphere"] or cases
    largest = max(smoke, key=lambda c: c["cells"])
    for number, (name, row) in enumerate(largest["methods"].items()):
        style = {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--", "marker": "o", "ms": 4, "label": name}
        style["lw"] = 2.4 if name == OURS else 1.2
        points = [(np.median(v["seconds"]), v["residual"]) for v in row["tolerances"].values() if "seconds" in v]
        if points:
            left.plot(*zip(*points, strict=True), **style)
        line = [
            (c["cells"], np.median(c["methods"][name]["tolerances"]["1e-06"]["seconds"]) / c["unknowns"] * 1e9)
            for c in smoke
            if name in c["methods"] and "1e-06" in c["methods"][name]["tolerances"]
        ]
        if line:
            right.plot(*zip(*sorted(line), strict=True), **style)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="seconds, set-up not counted",
        ylabel="residual, float64",
        title=f"smoke around a ball, {largest['cells']}³",
    )
    right.set(xscale="log", yscale="log", xlabel="cells per axis", ylabel="nanoseconds per unknown", title="to 1e-6")
    right.set_xticks([c["cells"] for c in smoke], [str(c["cells"]) for c in smoke])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return fig


def main() -> None:
    given = arguments()
    # Before anything starts threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    import jax
    from measure import about, write_result
    from poisson_methods import METHODS
    from rich.console import Console

    jax.config.update("jax_enable_x64", True)
    console = Console(width=160)
    names = list(METHODS) if given.methods is None else given.methods
    if unknown := set(names) - set(METHODS):
        raise SystemExit(f"--methods: {sorted(unknown)} are unknown; there are {list(METHODS)}")
    target = given.out / ("poisson.json" if given.threads > 1 else "poisson_one_thread.json")
    head = {**about("jax", "scipy", "pyamg", "pyamgcl"), "threads": given.threads}
    cases: list[dict[str, Any]] = []
    if target.exists():
        before = json.loads(target.read_text())
        cases = before["cases"] if {k: before[k] for k in head} == head else []
    for n in given.cells:
        for name in given.domains:
            if not any(c["cells"] == n and c["domain"] == name for c in cases):
                console.rule(f"{name}, {n}")
                cases.append(measure_case(name, n, names, given, console))
                write_result(target, {**head, "cases": cases}, figure(cases))
    for case in cases:
        show(case, console)
    console.print(f"written: {target}, and the figure beside it")


if __name__ == "__main__":
    main()
