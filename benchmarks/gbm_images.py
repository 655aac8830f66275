"""From images to samples of a multiplicative diffusion, in one command: training, samplers, fidelity, bits per dimension.

    PROOFSTONE_DATA=FOLDER python benchmarks/gbm_images.py [--data NAME] [--out FOLDER] [--models N] [--seeds N]
    PROOFSTONE_DATA=FOLDER python benchmarks/gbm_images.py --full [--steps STEPS] [--samples N] [--slow-seeds N]
    PROOFSTONE_DATA=FOLDER python benchmarks/gbm_images.py --data NAME --ship FOLDER

NAME is mnist (the default), fashion_mnist, or digits8x8, which comes with the package.  The first form trains a classifier,
whose features measure fidelity, and U-Nets of one size and budget (`image_models`), then compares samplers; it writes
gbm_images_NAME.json, a figure, and grids of samples.  --models is how often each model is trained, --seeds how often each of
them is sampled: the deviations in the table are over both.  Training leaves checkpoints in FOLDER/gbm_images_NAME, and a run
that was interrupted goes on from them.  The second form is the size for a GPU: six million weights, 1000 levels as in the
paper.  The third trains the first model and the classifier alone and writes them as the package ships them.

Features, Frechet and kernel distances are of our own small classifier: they rank what is in this table and are not comparable
with published ones.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from image_models import (
    CLASSES,
    KINDS,
    PAPER,
    SIZES,
    SMALLEST,
    Images,
    Size,
    Trained,
    classifier,
    images,
    ship,
    train,
    unit,
)
from measure import about, write_result
from rich.console import Console
from rich.table import Table

from generative import fidelity, guidance, likelihood, losses, nets, positive, samplers
from generative.gbm_diffusion import edm_times, uniform_times
from generative.images import write_png
from generative.lognormal import fitted_prior

# ---- samplers ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A sampler.  `paper` takes the paper's process, V = .64 t, in place of the model's own; `weight` is that of guidance."""

    name: str
    method: str
    steps: int
    paper: bool = False
    slow: bool = False
    weight: float = 1.0


def table(size: Size, kind: str, recipe: str) -> list[Row]:
    n = size.levels
    if kind == "contrast":
        return [
            *(Row(f"multistep3 {k}", "multistep3", k) for k in (5, 10, 20)),
            *(Row(f"multistep3 20, guided by {w}", "multistep3", 20, weight=w) for w in (1.5, 2.0, 3.0)),
            Row("multistep3 20, no class", "multistep3", 20, weight=0.0),
            *(Row(f"DPM-Solver++(2M) {k}", "dpm2m", k) for k in (5, 10, 20)),
            Row("Heun 10", "heun", 10),
            Row("ancestral 20", "ancestral", 20),
            Row(f"DLS {n}", "dls", n, slow=True),
        ]
    # The paper's recipes are made for x in [1, 2], its process and its prior.
    slow = [
        Row(f"DLS {n}, paper's process", "dls", n, True, True),
        Row(f"UMS {n}, paper's process", "ums", n, True, True),
        Row(f"annealed {n} ({recipe})", "annealed", n, True, True),
        Row("multistep3 20, paper's process", "multistep3", 20, True),
    ]
    own = [Row(f"multistep3 {k}", "multistep3", k) for k in (10, 20)]
    return slow if kind == "paper" else [*own, *slow]


def thinned(recipe: str, levels: int) -> samplers.Recipe:
    """The paper's recipe with fewer levels, over the same total time and with the same noise at the end."""
    whole = samplers.RECIPES[recipe]
    by = sum(stage.levels for stage in whole.stages) / levels

    def longer(stage: samplers.Stage) -> samplers.Stage:
        return samplers.Stage(round(stage.levels / by), stage.delta * by, stage.inner, stage.factor**by)

    return whole._replace(stages=tuple(longer(stage) for stage in whole.stages))


def draw(
    key: jax.Array, model: losses.Parametrised, row: Row, x0: jax.Array, labels: jax.Array, recipe: str = ""
) -> tuple[jax.Array, samplers.SamplingInfo]:
    if row.paper:
        # The network sees the level of noise alone, so that it serves another process as it is.
        model = eqx.tree_at(lambda m: m.process, model, PAPER)
    process = model.process
    first, second = jax.random.split(key)
    start = fitted_prior(process, x0).sample(first, len(labels))
    # Without guidance one half of the evaluations is enough: with the class, or with none.
    given, weight = (labels, row.weight) if row.weight else (jnp.full_like(labels, -1), 1.0)
    score = guidance.of_class(model, given, weight)
    if row.method == "annealed":
        return samplers.paper_annealed(second, score, process, start, thinned(recipe, row.steps))
    even = row.method in ("dls", "ums")
    times = uniform_times(process, row.steps) if even else edm_times(process, row.steps, smallest=SMALLEST)
    return samplers.sample(second, score, process, start, times, method=row.method)


class Reference(NamedTuple):
    features: jax.Array
    extract: Any


def referred(judge: fidelity.Classifier, known: Images) -> Reference:
    """Features of the test images, in units of their mean deviation."""
    test = jnp.asarray(known.test_pixels / (known.levels - 1), jnp.float32)
    features = eqx.filter_jit(judge.features)
    found = fidelity.in_batches(features, test)
    unit = jnp.sqrt(found.var(0).mean())
    return Reference(found / unit, lambda images: features(images) / unit)


def measured(found: jax.Array, reference: Reference) -> dict[str, float]:
    """Of images in [0, 1], against test images; precision and recall against equally many of these."""
    features = fidelity.in_batches(reference.extract, found)
    both = fidelity.precision_recall(reference.features[: len(features)], features)
    return {
        "frechet": fidelity.frechet_distance(features, reference.features),
        "kernel": float(fidelity.kernel_distance(features, reference.features)),
        "precision": float(both.precision),
        "recall": float(both.recall),
    }


def sampled(
    row: Row, one: Trained, size: Size, reference: Reference, seed: int, recipe: str
) -> tuple[dict[str, Any], jax.Array]:
    n, batch = size.samples, 250
    parts, start = [], time.perf_counter()
    info = None
    for i in range(0, n, batch):
        labels = jnp.arange(i, min(n, i + batch)) % CLASSES
        x, info = draw(jax.random.fold_in(jax.random.key(seed), i), one.model, row, one.x0, labels, recipe)
        parts.append(unit(one.there, x))
    found = jnp.concatenate(parts)
    assert info is not None
    facts = {"evaluations": int(info.evaluations), "images": n, "seconds": time.perf_counter() - start}
    facts |= {"crossed zero": float(info.negative), "clipped": int(info.overflowed)}
    return facts | measured(found, reference), found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over models and seeds of what varies."""
    varies = ("frechet", "kernel", "precision", "recall")
    spread = {k: float(np.std([r[k] for r in runs], ddof=1)) if len(runs) > 1 else None for k in varies}
    mean = {k: float(np.mean([r[k] for r in runs])) for k in varies}
    return runs[0] | mean | {"spread": spread, "runs": [{k: r[k] for k in ("model", "seed", *varies)} for r in runs]}


# ---- likelihood ---------------------------------------------------------------------------------------------------------------


def bits(one: Trained, size: Size, known: Images) -> dict[str, Any]:
    """Bits per dimension of test images given their class, with Hutchinson's estimate; and how much they change with half the
    steps, for the same noise: the error of the discretisation.  The flow begins at the level of noise SMALLEST."""
    count = size.likelihood_images
    first, second = jax.random.split(jax.random.key(5))
    u = known.unit(first, test=True)[:count]
    x, score = one.there.to_positive(u), guidance.of_class(one.model, known.test_labels[:count])
    prior, dimensions = fitted_prior(one.model.process, one.x0), u[0].size
    process, found = one.model.process, {}
    start = time.perf_counter()
    for steps in (size.likelihood_steps // 2, size.likelihood_steps):
        times = process.time(jnp.geomspace(SMALLEST, process.level(1.0), steps + 1))
        log_px, _ = likelihood.log_likelihood(
            score, process, x, prior, divergence="hutchinson", key=second, steps=times
        )
        log_pu = log_px + one.there.log_determinant(u)
        found[steps] = np.asarray(positive.bits_per_dimension(log_pu, dimensions, levels=known.levels))
    half, whole = found.values()
    return {
        "bits per dimension": float(whole.mean()),
        "standard error": float(whole.std(ddof=1) / np.sqrt(count)),
        "images": count,
        "steps": size.likelihood_steps,
        "change from half the steps": float((whole - half).mean()),
        "largest change of an image": float(np.abs(whole - half).max()),
        "seconds": time.perf_counter() - start,
    }


def conditioned(one: Trained, known: Images, folder: Path) -> None:
    """Pictures: two strengths of guidance for the same noise, and test images whose lower half was filled in."""
    process = one.model.process
    first, second = jax.random.split(jax.random.key(9))
    start, times = fitted_prior(process, one.x0).sample(first, 50), edm_times(process, 20, smallest=SMALLEST)
    labels = jnp.arange(50) % CLASSES
    for weight in (1.0, 3.0):
        x, _ = samplers.sample(second, guidance.of_class(one.model, labels, weight), process, start, times)
        write_png(folder / f"contrast_guided_{weight:g}.png", unit(one.there, x), columns=10)
    whole = one.there.to_positive(known.unit(first, test=True)[:8])
    mask = jnp.broadcast_to((jnp.arange(whole.shape[1]) < whole.shape[1] // 2)[:, None], whole.shape[1:])
    rows = []
    for image, label in zip(whole, known.test_labels, strict=False):
        score = guidance.inpainting(
            guidance.of_class(one.model, int(label)), process, image, mask, deviation=one.model.deviation
        )
        x, _ = samplers.sample(second, score, process, start[:6], times, method="ancestral")
        rows += [image[None], jnp.where(mask, image, 1)[None], x]
    write_png(folder / "contrast_filled_in.png", unit(one.there, jnp.concatenate(rows)), columns=8)


# ---- output -------------------------------------------------------------------------------------------------------------------


MARKERS = {
    "guided": "*",
    "no class": "P",
    "multistep3": "o",
    "DPM-Solver": "p",
    "Heun": "s",
    "ancestral": "^",
    "DLS": "D",
    "UMS": "v",
    "annealed": "X",
}


def figure(rows: dict[str, dict[str, Any]], floor: dict[str, float]) -> Any:
    """Frechet and kernel distance against evaluations of the network."""
    import matplotlib.figure

    fig = matplotlib.figure.Figure((12, 4.4), layout="constrained")
    colours = {"contrast": "C0", "shift": "C2", "paper": "C3"}
    distances = [floor["frechet"], *(row["frechet"] for row in rows.values())]
    lowest, highest = min(distances), max(distances)
    for axes, what in zip(fig.subplots(1, 2), ("frechet", "kernel"), strict=True):
        for name, row in rows.items():
            marker = next(m for part, m in MARKERS.items() if part in name)
            style = {"fmt": marker, "color": colours[name.partition(":")[0]], "capsize": 2, "label": name}
            style["mfc"] = "white" if "paper's process" in name or "annealed" in name else None
            if "guided" in name:
                style |= {"color": "C1", "ms": 4 + 3 * float(name.rpartition(" ")[2])}
            axes.errorbar(row["evaluations"], row[what], row["spread"][what] or 0.0, **style)
        axes.axhline(floor[what], color="gray", linestyle=":", label="training images")
        axes.set(xscale="log", xlabel="evaluations of the network")
        axes.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"], minor=False)
        axes.minorticks_off()
    fig.axes[0].set(yscale="log", ylabel="Fréchet distance")
    ticks = [v for v in (0.5, 1, 1.5, 2, 3, 4, 6, 10, 15, 20, 30, 50, 100) if 0.8 * lowest < v < 1.2 * highest]
    fig.axes[0].set_yticks(ticks, [f"{v:g}" for v in ticks], minor=False)
    fig.axes[0].minorticks_off()
    fig.axes[1].set_ylabel("kernel distance")
    fig.axes[1].set_yscale("symlog", linthresh=0.1)
    kernel = [row["kernel"] for row in rows.values()]
    fig.axes[1].set_ylim(min(0, *kernel) - 0.015, 1.5 * max(0.1, *kernel))  # room for markers
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return fig


def show(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    out = Table("sampler", "evaluations", "images", "Frechet", "kernel", "precision", "recall")
    for name, row in rows.items():
        spread = row.get("spread") or {}
        cells = [
            f"{row[k]:.3f}" + (f" ± {spread[k]:.3f}" if spread.get(k) is not None else "")
            for k in ("frechet", "kernel", "precision", "recall")
        ]
        out.add_row(name, str(row.get("evaluations", "")), str(row["images"]), *cells)
    console.print(out)


def run(
    name: str,
    size: Size,
    out: Path,
    console: Console,
    seeds: int = 3,
    models: int = 1,
    slow_seeds: int = 1,
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Any]:
    start = time.perf_counter()
    folder = out / f"gbm_images_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    known = images(name, size.images)
    judge, accuracy, _ = classifier(size, known, folder, console)
    reference = referred(judge, known)
    real = jnp.asarray(known.pixels[: size.samples] / (known.levels - 1), jnp.float32)
    floor = measured(real, reference)
    recipe = "fashion-mnist dls" if name == "fashion_mnist" else "mnist dls"
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    result: dict[str, Any] = about("jax", "equinox", "optax") | {"data": name, "size": size._asdict()}
    result |= {"accuracy of the classifier": accuracy, "training images": floor, "models": {}, "samplers": rows}
    # One of each kind first: what an interrupted run leaves can be compared.
    for number, kind in ((number, kind) for number in range(models) for kind in kinds):
        first = number == 0
        one = train(kind, size, known, number, folder, console, folder / kind if first else None)
        found = {"parameters": nets.parameters(one.model.network), "seconds": one.seconds}
        found["loss"] = [float(part.mean()) for part in np.array_split(one.info.losses, min(50, size.steps))]
        if kind != "paper":
            found["likelihood"] = bits(one, size, known)
        result["models"][f"{kind} {number}"] = found
        if kind == "contrast" and first:
            conditioned(one, known, folder)
        for row in table(size, kind, recipe):
            label = f"{kind}: {row.name}"
            for seed in range(slow_seeds if row.slow else seeds):
                facts, drawn = sampled(row, one, size, reference, 1000 * number + seed, recipe)
                runs.setdefault(label, []).append(facts | {"model": number, "seed": seed})
                if first and seed == 0:
                    write_png(folder / f"{kind}_{file_name(row.name)}.png", drawn[:100], columns=10)
            rows[label] = summary(runs[label])
            console.print(label, {k: runs[label][-1][k] for k in ("frechet", "kernel", "seconds")})
        result["seconds"] = time.perf_counter() - start
        write_result(out / f"gbm_images_{name}.json", result, figure(rows, floor))
    show(console, {"training images": floor | {"images": size.samples}, **rows})
    return result


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion_mnist", "digits8x8"))
    parser.add_argument("--full", action="store_true", help="the size for a GPU")
    parser.add_argument("--smoke", action="store_true", help="a size that shows that all runs, and no more")
    parser.add_argument("--models", type=int, default=1, help="trained of each kind")
    parser.add_argument("--seeds", type=int, default=3, help="of the samplers, for each model")
    parser.add_argument("--slow-seeds", type=int, default=1, help="of those with hundreds of levels")
    parser.add_argument("--steps", type=int, help="of the training, in place of the size's")
    parser.add_argument("--rate", type=float, help="of the training, at its highest")
    parser.add_argument("--samples", type=int, help="images for each seed")
    parser.add_argument("--likelihood-images", type=int, help="images whose likelihood is taken")
    parser.add_argument("--ship", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    size = SIZES["full" if given.full else "smoke" if given.smoke else "small"]
    changed = {name: getattr(given, name) for name in ("steps", "rate", "samples", "likelihood_images")}
    size = size._replace(**{name: value for name, value in changed.items() if value is not None})
    console = Console()
    if given.ship is None:
        run(given.data, size, given.out, console, given.seeds, given.models, given.slow_seeds)
    else:
        ship(given.data, size, given.ship, given.out / f"gbm_images_{given.data}", console)


if __name__ == "__main__":
    main()
