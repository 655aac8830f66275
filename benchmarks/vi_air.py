"""Attend, infer, repeat (Eslami et al. 2016), with the gradient estimator of every choice changed by a word.

    python benchmarks/vi_air.py [--full | --quick] [--methods mvd,enum,...] [--seeds 0,1,2] [--steps N] [--out FOLDER]

Canvases hold none to two MNIST digits.  In each of three steps the guide, a recurrent network, decides whether there is one
more object (z_pres, discrete), where it is (z_where) and what it looks like (z_what); the model decodes the objects and pastes
them.  Both are NumPyro programs; z_where and z_what are reparameterised, z_pres has one of

    reinforce  enum  mvd       the same estimator in all steps
    hybrid                     mvd, mvd, enum
    iw2-mvd ...                the objective is IWELBO with 2 particles instead of ELBO
    hand                       no vi: the ELBO with z_pres summed out by hand, all 8 combinations written out

`--full` has the sizes and settings of Becker et al. (PLDI 2024): 50x50 canvases, Adam 1e-4, 41 epochs of 60 000.  The default
is a small version for a CPU, 24x24.  Reported is how often the guide finds the number of digits on held-out canvases, one
draw per canvas, and the ELBO there.  Runs can be interrupted, or killed, and started again: they go on from the last checkpoint,
which is kept in the output folder, and end with the figures of an uninterrupted run, bit for bit but for the times.  Prints a
table, and writes vi_air.json, .png and .svg.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import air_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from air_model import FULL, QUICK, SMALL, Params, Setting, describe, elbo_by_hand, init, objective
from measure import about, write, write_result
from rich.console import Console
from rich.table import Table

import vi

TARGET = 0.9  # share of held-out canvases whose digits are counted right


# ---- training ----------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Training and held-out canvases, on the device as bytes, and where the digits are from."""

    train: jax.Array
    test: jax.Array
    counts: jax.Array
    source: str


def load(setting: Setting, seed: int = 0) -> Data:
    train, test, source = air_data.load(
        setting.images, setting.held_out, size=setting.canvas, digit_sizes=setting.digit_sizes, seed=seed
    )
    byte = lambda x: jnp.asarray(np.rint(255 * x).astype(np.uint8))  # noqa: E731
    return Data(byte(train.images), byte(test.images), jnp.asarray(test.counts), source)


Loss = Callable[[jax.Array, Params, jax.Array], jax.Array]
Judge = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]


def loss_of(setting: Setting, method: str) -> Loss:
    """(key, params, images as bytes) -> minus the objective, averaged over the images."""
    each = vi.batch(objective(setting, method), in_axes=(None, 0))
    return lambda key, params, images: -each(key, params, images / 255.0).mean()


def judge(setting: Setting, data: Data) -> Judge:
    """(params, key) -> whether the count is right on each held-out canvas, and the mean ELBO of the first 500, by hand."""

    @jax.jit
    def judged(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(data.test))
        runs = lambda pair: describe(params, pair[0], pair[1] / 255.0, setting)["pres"].sum()  # noqa: E731
        found = jax.lax.map(runs, (keys, data.test), batch_size=250)
        elbo = lambda pair: elbo_by_hand(setting, pair[0], params, pair[1] / 255.0)  # noqa: E731
        return found == data.counts, jax.lax.map(elbo, (keys[:500], data.test[:500]), batch_size=100).mean()

    return judged


def train(
    setting: Setting,
    name: str,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    seed: int,
    data: Data,
    judged: Judge,
    every: int,
    state: Path,
    console: Console,
) -> tuple[list[dict[str, float]], Params]:
    """One run, judged every `every` steps; the seconds are those of training alone.

    It continues where an interrupted one stopped: `state` is the folder of its checkpoint and of what was judged so far.
    """
    checkpoint = state / f"{name}-{seed}.npz"
    record = checkpoint.with_suffix(".json")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.exists()
    curve = json.loads(record.read_text()) if resumed and record.exists() else []
    judged_before = len(curve)
    key_init, key_train, key_judge = jax.random.split(jax.random.key(seed), 3)
    clock = time.perf_counter()

    def last() -> int:
        return curve[-1]["step"] if curve else 0

    def look(step: int, value: float, params: Params) -> None:
        nonlocal clock
        point = {"step": step, "chunk_seconds": time.perf_counter() - clock, "first": len(curve) == judged_before}
        right, elbo = judged(params, jax.random.fold_in(key_judge, step))
        curve.append(point | {"loss": value, "elbo": float(elbo), "accuracy": float(right.mean())})
        write(record, lambda name: Path(name).write_text(json.dumps(curve)))
        console.log(
            f"{name}, seed {seed}, step {step}: {point['chunk_seconds']:.1f} s, ELBO {elbo:.1f}, counts {right.mean():.3f}"
        )
        clock = time.perf_counter()

    # A process that was killed may have saved a chunk without having judged it.  With the next step to be judged as the limit,
    # `fit` returns the parameters there in either case: it loads them, or takes the steps.
    limits = {min(last() + every, setting.steps), setting.steps} if resumed else {setting.steps}
    for limit in sorted(limits):
        params, info = vi.fit(
            loss,
            init(setting, key_init),
            optimizer,
            key_train,
            steps=limit,
            data=data.train,
            batch_size=setting.batch,
            chunk=every,
            checkpoint=checkpoint,
            callback=look,
        )
        if info.steps > last():  # saved, and not judged: so does Ctrl-C end the run, too
            look(info.steps, float(info.losses[-1]), params)
        if info.stopped != "steps":
            raise SystemExit(f"{name}, seed {seed}: {info.message}")
    return curve, params


def summary(name: str, seed: int, curve: list[dict[str, float]], right: jax.Array, counts: jax.Array) -> dict[str, Any]:
    """What is reported of a run.  Its first chunk may compile: the time beyond that of a usual one is the compilation.

    The first chunk after an interruption compiles too, or was trained by a process that did not live to tell the time: for
    the first chunks the usual time stands.
    """
    chunks, first = (np.array([point[name] for point in curve]) for name in ("chunk_seconds", "first"))
    usual = float(np.median(chunks if first.all() else chunks[~first]))
    training = np.where(first, usual, chunks).cumsum()
    reached = [t for t, point in zip(training, curve, strict=True) if point["accuracy"] >= TARGET]
    return {
        "method": name,
        "seed": seed,
        "step_seconds": usual * len(curve) / curve[-1]["step"],
        "compile_seconds": max(float(chunks[0]) - usual, 0.0),
        "seconds_to_target": float(reached[0]) if reached else None,
        "accuracy": float(right.mean()),
        "by_count": [float(right[counts == n].mean()) for n in range(3)],
        "elbo": curve[-1]["elbo"],
        "curve": [{**point, "seconds": float(t)} for t, point in zip(training, curve, strict=True)],
    }


# ---- table, figure, command --------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> Table:
    size = result["setting"]["canvas"]
    table = Table(
        title=f"Attend, infer, repeat: {size}x{size} canvases, {result['data']}, {result['setting']['steps']} steps"
    )
    columns = (
        "method",
        "seed",
        "ms/step",
        "compile s",
        f"s to {TARGET}",
        "counts right",
        "of 0",
        "of 1",
        "of 2",
        "ELBO",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run in result["runs"]:
        reached = run["seconds_to_target"]
        table.add_row(
            run["method"],
            f"{run['seed']}",
            f"{1e3 * run['step_seconds']:.1f}",
            f"{run['compile_seconds']:.1f}",
            "-" if reached is None else f"{reached:.0f}",
            f"{run['accuracy']:.3f}",
            *(f"{share:.3f}" for share in run["by_count"]),
            f"{run['elbo']:.1f}",
        )
    return table


def examples(setting: Setting, params: Params, data: Data) -> list[dict[str, Any]]:
    """A few held-out canvases with no, one and two digits, and what one run of the guide finds on each."""
    counts, wanted = np.asarray(data.counts), {0: 1, 1: 2, 2: 3}
    chosen = [int(i) for count, n in wanted.items() for i in np.flatnonzero(counts == count)[:n]]
    n = len(chosen)
    look = jax.jit(jax.vmap(lambda key, image: describe(params, key, image / 255.0, setting)))
    found = look(jax.random.split(jax.random.key(0), n), data.test[jnp.array(chosen)])
    return [
        {
            "image": np.asarray(data.test[i]).tolist(),
            "drawn": np.rint(255 * np.asarray(found["canvas"][k])).tolist(),
            "where": [np.asarray(w).tolist() for w, on in zip(found["where"][k], found["pres"][k], strict=True) if on],
        }
        for k, i in enumerate(chosen)
    ]


def figure(result: dict[str, Any], shown: list[dict[str, Any]]):
    """Held-out accuracy and ELBO against seconds of training, above canvases with the windows found, and the model's drawing."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    fig = Figure(figsize=(10, 7), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=[1.3, 1])
    axes = above.subplots(1, 2)
    methods = list(dict.fromkeys(run["method"] for run in result["runs"]))
    for run in result["runs"]:
        number = methods.index(run["method"])
        label = (
            run["method"]
            if run["seed"] == min(r["seed"] for r in result["runs"] if r["method"] == run["method"])
            else None
        )
        for axis, quantity in zip(axes, ("accuracy", "elbo"), strict=True):
            points = [p["seconds"] for p in run["curve"]], [p[quantity] for p in run["curve"]]
            axis.plot(*points, color=f"C{number}", alpha=0.8, linewidth=1.3, label=label)
    axes[0].axhline(TARGET, color="black", linestyle=":", linewidth=1)
    axes[0].set(xlabel="seconds of training", ylabel="held-out canvases counted right", ylim=(0, 1.02))
    axes[1].set(xlabel="seconds of training", ylabel="held-out ELBO per canvas")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    pictures = below.subplots(2, len(shown))
    for column, example in zip(pictures.T, shown, strict=True):
        size = len(example["image"])
        for axis, picture in zip(column, ("image", "drawn"), strict=True):
            axis.imshow(example[picture], cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        for number, (s, x, y) in enumerate(example["where"]):
            corner = [((-1 - shift) / s + 1) * size / 2 - 0.5 for shift in (x, y)]
            column[0].add_patch(
                Rectangle(corner, size / s, size / s, fill=False, edgecolor=f"C{number + 1}", linewidth=1.5)
            )
    pictures[0, 0].set_ylabel("seen, windows")
    pictures[1, 0].set_ylabel("drawn")
    return fig


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the files")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the paper's sizes and settings; wants a GPU")
    size.add_argument("--quick", action="store_true", help="tiny canvases, seconds; reaches nothing")
    parser.add_argument("--methods", default="mvd,enum,hybrid,reinforce,iw2-mvd,hand", help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--steps", type=int, help="steps of each run, instead of the setting's")
    options = parser.parse_args(arguments)
    setting = FULL if options.full else QUICK if options.quick else SMALL
    setting = setting._replace(steps=options.steps or setting.steps)
    every = min(937 if options.full else 250, max(1, setting.steps // 2))
    console = Console(width=110)  # a pipe has no width of its own, and 80 columns cut the table
    name = "vi_air_full" if options.full else "vi_air"
    state = options.out / f"{name}_state"
    data = load(setting)
    judged = judge(setting, data)
    optimizer = optax.adam(setting.learning_rate)
    runs, shown = [], None
    for method in options.methods.split(","):
        loss = loss_of(setting, method)  # one for all seeds, as the optimizer is, so that they are compiled once
        for seed in map(int, options.seeds.split(",")):
            curve, params = train(setting, method, loss, optimizer, seed, data, judged, every, state, console)
            right, _ = judged(params, jax.random.key(1000 + seed))
            runs.append(summary(method, seed, curve, right, data.counts))
            shown = params if shown is None else shown
    flag = ["--full"] if options.full else ["--quick"] if options.quick else []
    steps = ["--steps", f"{options.steps}"] if options.steps else []
    chosen = [*flag, "--methods", options.methods, "--seeds", options.seeds, *steps]
    result: dict[str, Any] = {
        "benchmark": name,
        "command": " ".join(["python benchmarks/vi_air.py", *chosen]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **about("jax", "numpyro", "equinox", "optax"),
        "data": data.source,
        "setting": setting._asdict(),
        "runs": runs,
    }
    console.print(show(result))
    target = options.out / f"{name}.json"
    write_result(target, result, figure(result, examples(setting, shown, data)))
    shutil.rmtree(state)  # all runs are done
    console.print(f"written: {target} (and .png, .svg)")


if __name__ == "__main__":
    main()
