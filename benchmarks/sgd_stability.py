"""How the stability threshold of a network scales: matrix-free against dense and Krylov methods of SciPy.

    python benchmarks/sgd_stability.py [--quick] [--out FOLDER]

A two-layer ReLU network with about 10⁵ parameters, n = 125 ... 2000 samples, batches of 1 and 8.  From the same
Gram matrix, in double precision, η* comes from

    ours    theory.sgd_stability.stability_threshold_from_gram
    krylov  N(η) as a SciPy LinearOperator, λmax by Lanczos (eigsh), log λmax(N(η)) = 0 by brentq
    dense   N(η) formed in NumPy, λmax by scipy.linalg.eigh, the same brentq
    vec     the p² × p² generalised eigenproblem, for 8 features instead of the network's 10⁵

Each method runs only at the sizes where it ends within a minute or so.  Compilation is excluded by a warm-up;
repeats of the methods alternate, so that a change of load meets all of them.  Prints tables, and writes
sgd_stability.json, .png and .svg.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.sparse.linalg import LinearOperator, eigsh

from theory import sgd_stability as sgd

DIMENSION = 100
SEED = 0
RELATIVE = 1e-9  # accuracy asked of every method


def network_gram(n: int, width: int) -> tuple[jax.Array, float]:
    """The Gram matrix of a network at its random start, and the seconds it took once compiled."""
    key_x, key_params = jax.random.split(jax.random.key(SEED))
    x = jax.random.normal(key_x, (n, DIMENSION), jnp.float32)
    x = x * (DIMENSION**0.5 / jnp.linalg.norm(x, axis=1, keepdims=True))
    params = jax.tree.map(lambda w: w.astype(jnp.float32), sgd.init_two_layer_relu(key_params, width, DIMENSION))
    gram = sgd.gram_matrix(sgd.two_layer_relu, params, x).block_until_ready()
    start = time.perf_counter()
    gram = sgd.gram_matrix(sgd.two_layer_relu, params, x).block_until_ready()
    return gram.astype(jnp.float64), time.perf_counter() - start


def eigen_coordinates(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lam, v = scipy.linalg.eigh(gram)
    keep = lam > len(lam) * np.finfo(float).eps * lam[-1]
    return v[:, keep] * np.sqrt(len(lam) * lam[keep]), lam[keep]


def root(largest: Callable[[float], float], a: np.ndarray, lam: np.ndarray, mean: float, noise: float) -> float:
    """η with λmax(N(η)) = 1: at once if N is linear in η, else by brentq between two known bounds."""
    norms = (a**2).sum(1)
    low = 2 / ((mean + noise) * norms.max())
    if mean == 0:
        return low / largest(low)
    high = min(2 * norms.mean() / (mean * (lam**2).sum() + noise * (norms**2).mean()), 2 / lam[-1] * (1 - 1e-12))
    return float(np.exp(brentq(lambda u: np.log(largest(np.exp(u))), np.log(low), np.log(high), xtol=RELATIVE)))


def krylov(gram: np.ndarray, mean: float, noise: float) -> float:
    a, lam = eigen_coordinates(gram)
    n = len(a)

    def largest(eta: float) -> float:
        weight = eta * noise / n / (np.add.outer(lam, lam) - eta * mean * np.outer(lam, lam))
        product = lambda v: ((a @ (weight * (a.T @ (v.reshape(-1, 1) * a)))) * a).sum(1)  # noqa: E731
        return eigsh(LinearOperator((n, n), product), k=1, v0=np.ones(n), tol=RELATIVE, return_eigenvectors=False)[0]

    return root(largest, a, lam, mean, noise)


def dense(gram: np.ndarray, mean: float, noise: float) -> float:
    a, lam = eigen_coordinates(gram)
    n = len(a)

    def largest(eta: float) -> float:
        weight = eta * noise / n / (np.add.outer(lam, lam) - eta * mean * np.outer(lam, lam))
        matrix = np.stack([(((a * row) @ weight) * (a * row)).sum(1) for row in a])
        return scipy.linalg.eigh(matrix, eigvals_only=True, subset_by_index=[n - 1, n - 1])[0]

    return root(largest, a, lam, mean, noise)


def vec(features: np.ndarray, mean: float, noise: float) -> float:
    n, p = features.shape
    h, eye = features.T @ features / n, np.eye(p)
    squares = (features[:, :, None] * features[:, None, :]).reshape(n, p * p)
    c = (np.kron(eye, h) + np.kron(h, eye)) / 2
    d = mean * np.kron(h, h) + noise / n * squares.T @ squares
    top = p * p - 1
    return 2 / scipy.linalg.eigh(d, c, eigvals_only=True, subset_by_index=[top, top])[0]


def alternate(methods: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every repeat and the value, the methods taking turns after one warm-up each."""
    values = {name: float(run()) for name, run in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, values


def measure(sizes: list[int], limits: dict[str, int], width: int, repeats: int, console: Console) -> list[dict]:
    rows = []
    for n in sizes:
        gram, gram_seconds = network_gram(n, width)
        host = np.asarray(gram)
        for batch in (1, 8):
            console.log(f"n = {n}, batch {batch}")
            scheme = sgd.with_replacement(batch)
            found = sgd.stability_threshold_from_gram(gram, scheme)
            ours = lambda k=gram, s=scheme: sgd.stability_threshold_from_gram(k, s).eta.block_until_ready()  # noqa: E731
            methods = {"ours": ours}
            if n <= limits["krylov"]:
                methods["krylov"] = lambda k=host, s=scheme: krylov(k, *s)
            if n <= limits["dense"]:
                methods["dense"] = lambda k=host, s=scheme: dense(k, *s)
            seconds, values = alternate(methods, repeats)
            rows.append(
                {
                    "n": n,
                    "batch": batch,
                    "gram_seconds": gram_seconds,
                    "eta": values["ours"],
                    "bracket": 1 - float(found.lower / found.eta),
                    "iterations": int(found.iterations),
                    "converged": bool(found.converged),
                    "seconds": seconds,
                    "disagreement": {m: abs(v / values["ours"] - 1) for m, v in values.items() if m != "ours"},
                }
            )
    return rows


def measure_small(repeats: int) -> list[dict]:
    """The vec form, which knows no large p: 8 random features."""
    rows = []
    for n in (30, 300):
        a = np.random.default_rng(SEED).standard_normal((n, 8))
        scheme = sgd.with_replacement(8)
        device = jnp.asarray(a)
        ours = lambda z=device, s=scheme: sgd.stability_threshold(z, s).eta.block_until_ready()  # noqa: E731
        seconds, values = alternate({"ours": ours, "vec": lambda z=a, s=scheme: vec(z, *s)}, repeats)
        disagreement = {"vec": abs(values["vec"] / values["ours"] - 1)}
        rows.append({"n": n, "p": 8, "seconds": seconds, "disagreement": disagreement})
    return rows


def ratio(seconds: dict[str, list[float]], method: str) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios method/ours, repeat by repeat."""
    pairs = np.asarray(seconds[method]) / np.asarray(seconds["ours"])
    return float(np.median(pairs)), float(pairs.min()), float(pairs.max())


def show(result: dict[str, Any]) -> list[Table]:
    def cell(seconds: dict[str, list[float]], method: str) -> str:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*ratio(seconds, method)) if method in seconds else "-"

    network = Table(title=f"Two-layer ReLU network, {result['parameters']} parameters; seconds are medians")
    for column in ("n", "B", "Gram s", "ours s", "steps", "bracket", "krylov/ours", "dense/ours", "differ"):
        network.add_column(column, justify="right", no_wrap=True)
    for row in result["network"]:
        worst = max(row["disagreement"].values(), default=None)
        network.add_row(
            f"{row['n']}",
            f"{row['batch']}",
            f"{row['gram_seconds']:.2f}",
            f"{np.median(row['seconds']['ours']):.3f}",
            f"{row['iterations']}",
            f"{row['bracket']:.0e}",
            cell(row["seconds"], "krylov"),
            cell(row["seconds"], "dense"),
            "-" if worst is None else f"{worst:.0e}",
        )
    small = Table(title="8 random features, batch 8")
    for column in ("n", "ours ms", "vec/ours", "differ"):
        small.add_column(column, justify="right", no_wrap=True)
    for row in result["small"]:
        milliseconds = 1e3 * np.median(row["seconds"]["ours"])
        differ = f"{row['disagreement']['vec']:.0e}"
        small.add_row(f"{row['n']}", f"{milliseconds:.2f}", cell(row["seconds"], "vec"), differ)
    return [network, small]


def figure(result: dict[str, Any]):
    """Seconds against n, one panel per batch size; takes the dictionary of the JSON file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    labels = {"ours": "matrix-free (ours)", "krylov": "N(η) by Lanczos + brentq", "dense": "N(η) formed + brentq"}
    fig = Figure(figsize=(9, 4), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for axis, batch in zip(axes, (1, 8), strict=True):
        rows = [r for r in result["network"] if r["batch"] == batch]
        axis.plot([r["n"] for r in rows], [r["gram_seconds"] for r in rows], "k:", label="Gram matrix (shared)")
        for method, label in labels.items():
            points = [(r["n"], r["seconds"][method]) for r in rows if method in r["seconds"]]
            if points:
                n, times = [p[0] for p in points], np.asarray([p[1] for p in points])
                middle = np.median(times, 1)
                spread = [middle - times.min(1), times.max(1) - middle]
                axis.errorbar(n, middle, spread, marker="o", capsize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel="samples n", title=f"batch {batch}")
        axis.xaxis.set_major_locator(FixedLocator([r["n"] for r in rows]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds (median, range)")
    axes[0].legend()
    fig.suptitle(f"Stability threshold of a two-layer ReLU network, {result['parameters']} parameters")
    return fig


def write(path: Path, save: Callable[[str], Any]) -> None:
    """Save under a temporary name in the same folder, then rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        save(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=110)  # a pipe has no width of its own, and 80 columns cut the table
    if options.quick:
        sizes, limits, width, repeats = [50, 100], {"krylov": 100, "dense": 100}, 50, 2
    else:
        sizes, limits, width, repeats = [125, 250, 500, 1000, 2000], {"krylov": 1000, "dense": 250}, 1000, 3
    result: dict[str, Any] = {
        "benchmark": "sgd_stability",
        "parameters": width * (DIMENSION + 1),
        "relative_accuracy": RELATIVE,
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "scipy": scipy.__version__},
        "network": measure(sizes, limits, width, repeats, console),
        "small": measure_small(20),
    }
    console.print(*show(result))
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "sgd_stability.json"
    write(target, lambda name: Path(name).write_text(json.dumps(result, indent=1) + "\n"))
    fig = figure(result)
    for suffix in (".png", ".svg"):
        write(target.with_suffix(suffix), lambda name: fig.savefig(name, dpi=150))
    console.print(f"written: {target} (and .png, .svg)")


if __name__ == "__main__":
    main()
