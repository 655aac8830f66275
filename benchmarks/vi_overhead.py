"""What programmable variational inference costs beside a gradient written by hand.

    python benchmarks/vi_overhead.py [--quick] [--out FOLDER]

Part 1, the variational autoencoder of Becker et al. (PLDI 2024, table 1): decoder 10 -> 200 -> 784, encoder
784 -> 200 -> 2 x 10, leaky ReLU, Bernoulli pixels.  Each program computes the gradient of the mean of -ELBO over a batch:

    hand         jax.grad of the batch mean, written as matrix products
    hand/datum   the mean of jax.vmap(jax.grad) of one datum's ELBO: what the paper times, and calls hand-coded
    vi           vi.batch of an expectation, outside it the mean
    numpyro      Trace_ELBO of NumPyro with a plate
    genjax       ELBO of genjax 0.10 (its `marginal` loses the guide's density: the cosine shows it), where installed

All run in one process and take turns; ratios are formed block by block.  Part 2, what the estimators cost to trace, to
compile and to run on n coupled Bernoulli choices, in a straight line, in branches, and in a loop.

MNIST is read from the folder that PROOFSTONE_DATA names, else the 8x8 digits of the package are enlarged.  Prints tables,
and writes vi_overhead.json, .png and .svg.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from measure import about, compile_in_turns, median_interval, time_in_turns, write_json, write_result
from rich.console import Console
from rich.table import Table
from vae_programs import competitors, init

import vi
from generative import data

SEED = 0

# ---- part 1: the variational autoencoder -------------------------------------------------------------------------------


def images(n: int) -> tuple[np.ndarray, str]:
    """n flat images with pixels in [0, 1], and where they are from."""
    try:
        return (data.load("mnist", n=n)["x"] / 255).reshape(n, -1).astype(np.float32), "MNIST"
    except FileNotFoundError:
        small = np.pad(data.load("digits8x8", n=n)["x"] / 16, ((0, 0), (3, 3), (3, 3))).repeat(2, 1).repeat(2, 2)
        source = "8x8 digits, enlarged (PROOFSTONE_DATA names no folder with MNIST)"
        return small.reshape(n, -1).astype(np.float32), source


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def measure_vae(
    batches: list[int], blocks: int, repeats: int, keys: int, console: Console, only: Sequence[str] | None = None
) -> dict[str, Any]:
    programs, skipped = competitors()
    programs = {name: make for name, make in programs.items() if only is None or name in only}
    x, source = images(max(batches))
    x = jnp.asarray(x)
    params = init(jax.random.key(SEED))
    rows: list[dict[str, Any]] = []
    for batch in batches:
        console.log(f"batch {batch}")
        args = (params, jax.random.key(SEED), x[:batch])
        first = batch == batches[0]
        made = compile_in_turns(programs, args, repeats if first else 1, warm_up=first)
        draws = jax.random.split(jax.random.key(SEED + 1), 50)
        runs = {
            name: lambda i, run=made[name][-1].run, x=args[2], keys=list(draws): run(params, keys[i % 50], x)
            for name in programs
        }
        seconds = time_in_turns(runs, blocks)
        for name in programs:
            rows.append(
                {
                    "batch": batch,
                    "program": name,
                    "seconds": seconds[name].tolist(),
                    "ratio": median_interval(seconds[name] / seconds["hand"]),
                    "flops": made[name][0].flops,
                    "trace_seconds": [one.trace_seconds for one in made[name]],
                    "compile_seconds": [one.compile_seconds for one in made[name]],
                }
            )
        if first:
            cosines = directions({n: made[n][-1].run for n in programs}, args, keys)
    return {"data": source, "skipped": skipped, "rows": rows, "keys": keys, "cosine": cosines}


def directions(runs: dict[str, Callable[..., Any]], args: tuple[Any, ...], keys: int) -> dict[str, dict[str, float]]:
    """Cosine and relative length of each program's mean gradient over `keys` draws, against `hand` with other draws."""
    params, _, x = args

    def mean(run: Callable[..., Any], seed: int) -> np.ndarray:
        each = (flat(run(params, key, x)[1]) for key in jax.random.split(jax.random.key(seed), keys))
        return sum(each) / keys

    reference = mean(runs["hand"], SEED + 2)
    found = {}
    for number, (name, run) in enumerate(runs.items()):
        g = mean(run, SEED + 3 + number)
        norms = np.linalg.norm(g), np.linalg.norm(reference)
        found[name] = {"cosine": float(g @ reference / norms[0] / norms[1]), "length": float(norms[0] / norms[1])}
    return found


# ---- part 2: estimators of discrete choices ----------------------------------------------------------------------------

STRATEGIES = {"enum": vi.enum, "mvd": vi.mvd, "reinforce": vi.reinforce}


def straight(strategy: str, n: int) -> Callable[..., Any]:
    """(Σ w_i b_i)², b_i ~ Bernoulli(sigmoid(a_i)), written out; w is fixed."""
    tag = STRATEGIES[strategy]

    @vi.expectation
    def loss(logits, w):
        total = 0.0
        for i in range(n):
            total = total + w[i] * vi.sample(tag(dist.Bernoulli(logits=logits[i])), f"b{i}")
        return total**2

    return loss


def looped(strategy: str, n: int) -> Callable[..., Any]:
    """The same sum in a lax.scan."""
    tag = STRATEGIES[strategy]

    @vi.expectation
    def loss(logits, w):
        def body(total, row):
            return total + row[1] * vi.sample(tag(dist.Bernoulli(logits=row[0])), "b"), None

        return lax.scan(body, 0.0, (logits, w))[0] ** 2

    return loss


def branched(strategy: str, n: int) -> Callable[..., Any]:
    """The same sum, each term added in one branch of a lax.cond."""
    tag = STRATEGIES[strategy]

    @vi.expectation
    def loss(logits, w):
        total = jnp.zeros(())
        for i in range(n):
            b = vi.sample(tag(dist.Bernoulli(logits=logits[i])), f"b{i}")
            total = lax.cond(b > 0, lambda t, wi: t + wi, lambda t, wi: t, total, w[i])
        return total**2

    return loss


def exact_gradient(logits: np.ndarray, w: np.ndarray) -> np.ndarray:
    """∂/∂a of E (Σ w b)² = (Σ w p)² + Σ w² p (1 - p)."""
    p = 1 / (1 + np.exp(-logits))
    return (2 * w * (w @ p) + w**2 * (1 - 2 * p)) * p * (1 - p)


def measure_sites(
    programs: list[tuple[str, str, int]], blocks: int, repeats: int, draws: int, console: Console
) -> list[Any]:
    shapes = {"straight": straight, "branches": branched, "loop": looped}
    rows = []
    for shape, strategy, n in programs:
        console.log(f"{shape}, {strategy}, {n} choices")
        logits = jnp.asarray(np.linspace(-1, 1.3, n), jnp.float32)
        w = jnp.asarray(np.linspace(1, 2, n) / n, jnp.float32)

        def make(shape=shape, strategy=strategy, n=n) -> Callable[..., Any]:
            return jax.grad(shapes[shape](strategy, n), argnums=1)

        key = jax.random.key(SEED)
        characters = len(str(jax.make_jaxpr(make())(key, logits, w)))
        made = compile_in_turns({strategy: make}, (key, logits, w), repeats, warm_up=False)[strategy]
        seconds = time_in_turns({strategy: lambda i, run=made[-1].run, a=logits, w=w, k=key: run(k, a, w)}, blocks)
        many = jax.jit(lambda k, a, w, make=make: jax.lax.map(lambda k: make()(k, a, w), jax.random.split(k, draws)))
        each = np.asarray(many(key, logits, w), np.float64)
        error = each.mean(0) - exact_gradient(np.asarray(logits, np.float64), np.asarray(w, np.float64))
        rows.append(
            {
                "shape": shape,
                "strategy": strategy,
                "n": n,
                "seconds": seconds[strategy].tolist(),
                "trace_seconds": [one.trace_seconds for one in made],
                "compile_seconds": [one.compile_seconds for one in made],
                "characters": characters,
                "flops": made[0].flops,
                "error": float(np.abs(error).max()),
                "standard_error": float((each.std(0) / draws**0.5).max()),
                "variance": float(each.var(0).sum()),
            }
        )
    return rows


# ---- tables, figure, command -------------------------------------------------------------------------------------------


def total_compile(row: dict[str, Any]) -> float:
    return float(np.median(np.add(row["trace_seconds"], row["compile_seconds"])))


def show(result: dict[str, Any]) -> list[Table]:
    vae = Table(title=f"Gradient of -ELBO, autoencoder 784-200-10, {result['vae']['data']}")
    for column in (
        "batch",
        "program",
        "median ms",
        "ratio to hand [95 %]",
        "MFLOP",
        "trace s",
        "compile s",
        "cosine",
        "length",
    ):
        vae.add_column(column, justify="right", no_wrap=True)
    for row in result["vae"]["rows"]:
        first = row["batch"] == result["vae"]["rows"][0]["batch"]
        cosine = result["vae"]["cosine"][row["program"]]
        vae.add_row(
            f"{row['batch']}",
            row["program"],
            f"{1e3 * np.median(row['seconds']):.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
            "-" if row["flops"] is None else f"{row['flops'] / 1e6:.1f}",
            f"{np.median(row['trace_seconds']):.2f}",
            f"{np.median(row['compile_seconds']):.2f}",
            f"{cosine['cosine']:.4f}" if first else "",
            f"{cosine['length']:.3f}" if first else "",
            end_section=row["program"] == list(result["vae"]["cosine"])[-1],
        )
    sites = Table(title="Gradient of E (Σ w b)², n Bernoulli choices")
    for column in (
        "program",
        "estimator",
        "n",
        "median ms",
        "trace s",
        "compile s",
        "jaxpr k",
        "MFLOP",
        "variance",
        "error",
        "s.e.",
    ):
        sites.add_column(column, justify="right", no_wrap=True)
    for row in result["sites"]:
        sites.add_row(
            row["shape"],
            row["strategy"],
            f"{row['n']}",
            f"{1e3 * np.median(row['seconds']):.3f}",
            f"{np.median(row['trace_seconds']):.2f}",
            f"{np.median(row['compile_seconds']):.2f}",
            f"{row['characters'] / 1e3:.1f}",
            "-" if row["flops"] is None else f"{row['flops'] / 1e6:.3f}",
            f"{row['variance']:.1e}",
            f"{row['error']:.1e}",
            f"{row['standard_error']:.1e}",
        )
    return [vae, sites]


def figure(result: dict[str, Any]):
    """Ratio to the hand-written gradient against the batch; seconds to trace and compile against the number of choices."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    fig = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    markers = {"hand/datum": "v", "vi": "o", "numpyro": "s", "genjax": "x"}
    for name, marker in markers.items():
        rows = [row for row in result["vae"]["rows"] if row["program"] == name]
        if rows:
            middle, low, high = np.transpose([row["ratio"] for row in rows])
            batches = [row["batch"] for row in rows]
            left.errorbar(batches, middle, [middle - low, high - middle], marker=marker, capsize=3, label=name)
    left.axhline(1, color="black", linestyle=":", label="hand")
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="time / time of hand (median, 95 %)")
    left.set_title("Gradient of -ELBO, autoencoder 784-200-10")
    left.xaxis.set_major_locator(FixedLocator(sorted({row["batch"] for row in result["vae"]["rows"]})))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_major_formatter(ScalarFormatter())
    for strategy in STRATEGIES:
        for shape, style in (("straight", "o-"), ("branches", "s--"), ("loop", "^:")):
            rows = [row for row in result["sites"] if (row["shape"], row["strategy"]) == (shape, strategy)]
            if rows:
                color = f"C{list(STRATEGIES).index(strategy)}"
                points = [row["n"] for row in rows], [total_compile(row) for row in rows]
                right.plot(*points, style, color=color, label=f"{strategy}, {shape}")
    right.set(xscale="log", yscale="log", xlabel="Bernoulli choices n", ylabel="seconds")
    right.set_title("Trace and compile the gradient of E (Σ w b)²")
    right.xaxis.set_major_locator(FixedLocator(sorted({row["n"] for row in result["sites"]})))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(ScalarFormatter())
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return fig


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    options = parser.parse_args(arguments)
    console = Console(width=120)  # a pipe has no width of its own, and 80 columns cut the tables
    if options.quick:
        batches, blocks, repeats, keys, draws = [8], 3, 1, 20, 200
        lengths, in_branches, in_loop = (1, 3), (2,), (4,)
    else:
        batches, blocks, repeats, keys, draws = [64, 128, 256, 512, 1024], 30, 5, 200, 2000
        lengths, in_branches, in_loop = (1, 4, 16, 64), (4, 16), (16, 64)
    programs = [("straight", s, n) for n in lengths for s in STRATEGIES]
    programs += [("branches", s, n) for n in in_branches for s in STRATEGIES]
    programs += [("loop", s, n) for n in in_loop for s in STRATEGIES]
    start = time.perf_counter()
    target = options.out / "vi_overhead.json"
    result: dict[str, Any] = {
        "benchmark": "vi_overhead",
        **about("jax", "numpyro", "genjax"),
        "blocks": blocks,
        "vae": measure_vae(batches, blocks, repeats, keys, console),
        "sites": [],
    }
    write_json(target, result)  # part 2 takes long
    for one in programs:
        result["sites"] += measure_sites([one], blocks, min(repeats, 3), draws, console)
        write_json(target, result)
    result["seconds"] = time.perf_counter() - start
    console.print(*show(result))
    for name, reason in result["vae"]["skipped"].items():
        console.print(f"{name} left out: {reason}")
    write_result(target, result, figure(result))
    console.print(f"written: {target} (and .png, .svg)")


if __name__ == "__main__":
    main()
