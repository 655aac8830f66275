"""From images to samples of a multiplicative diffusion, in one command: training, samplers, fidelity, bits per dimension.

    PROOFSTONE_DATA=FOLDER python benchmarks/gbm_images.py [--data NAME] [--out FOLDER] [--seeds N] [--full]
    PROOFSTONE_DATA=FOLDER python benchmarks/gbm_images.py --data NAME --ship FOLDER

NAME is mnist (the default), fashion_mnist, or digits8x8, which comes with the package.  The first form trains a classifier,
whose features measure fidelity, and U-Nets of one size and budget, then compares samplers; it writes gbm_images_NAME.json, a
figure, and grids of samples.  Training leaves checkpoints in FOLDER/gbm_images_NAME, and a run that was interrupted goes on from
them.  --full is the size for a GPU, with 1000 levels as in the paper.  The second form trains the first model and the classifier
alone and writes them as the package ships them.

The models are one network in three coordinates:

    contrast   x = exp(u): log x is the pixel u itself, so this is EDM on pixels, which is EDM on x = u + 1 too
    shift      x = u + 1, EDM on log x
    paper      x = u + 1 with the paper's loss (V² on the Hyvarinen score), process (V = .64 t) and prior

All are trained with classes, a tenth of the labels left out, and sampled with the classes in turn.  Features, Frechet and kernel
distances are of our own small classifier: they rank what is in this table and are not comparable with published ones.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from measure import about, write_result
from rich.console import Console
from rich.table import Table

from generative import data, fidelity, guidance, likelihood, losses, nets, positive, samplers, training, weights
from generative.gbm_diffusion import GeometricBrownianMotion, edm_times, geometric, uniform_times
from generative.images import write_png
from generative.lognormal import fitted_prior

CLASSES = 10
SMALLEST = 0.002  # the last level of noise of the grids, half a grey level
WIDE = ("geometric", {"sigma_0": 0.01, "sigma_1": 40.0})  # levels up to 9.8, thirty times the deviation of the data
PAPER = GeometricBrownianMotion()


class Size(NamedTuple):
    """What a run costs.  `levels` are the steps of the paper's samplers; they are run for one seed only in the small size."""

    images: int
    network: dict[str, Any]
    steps: int
    batch: int
    rate: float
    classifier_steps: int
    samples: int
    levels: int
    likelihood_images: int
    likelihood_steps: int


SIZES = {
    "small": Size(30_000, {"widths": (32, 64), "patch": 2}, 1000, 64, 4e-3, 600, 200, 200, 32, 32),
    "full": Size(
        60_000, {"widths": (64, 128, 256), "patch": 1, "blocks": 2}, 50_000, 256, 5e-4, 4000, 10_000, 1000, 256, 128
    ),
    "smoke": Size(1000, {"widths": (8, 16), "patch": 2}, 60, 32, 3e-3, 60, 40, 20, 4, 8),
}


# ---- data, classifier, models ---------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Pixels as integers in 0 .. levels - 1, and labels; of training and of the tests."""

    pixels: np.ndarray
    labels: np.ndarray
    test_pixels: np.ndarray
    test_labels: np.ndarray
    levels: int

    def unit(self, key: jax.Array, *, test: bool = False) -> jax.Array:
        """With uniform noise of one grey level, in [0, 1)."""
        return positive.dequantise(key, self.test_pixels if test else self.pixels, levels=self.levels)


def images(name: str, n: int) -> Images:
    if name == "digits8x8":
        whole = data.load(name)
        x, y = whole["x"], whole["y"].astype(np.int32)
        return Images(x[: min(n, 1400)], y[: min(n, 1400)], x[1400:], y[1400:], 17)
    train = data.load(name)
    test = data.load(name, split="test")
    y, z = (part["y"].astype(np.int32) for part in (train, test))
    return Images(train["x"][:n], y[:n], test["x"], z, 256)


def classifier(
    size: Size, known: Images, folder: Path | None, console: Console
) -> tuple[fidelity.Classifier, float, dict[str, Any]]:
    """A classifier, its accuracy on the test images, and the arguments that make it."""
    made = {"shape": list(known.pixels.shape[1:]), "widths": [16, 32, 32], "features": 64}
    key = jax.random.key(1)
    model = fidelity.Classifier(**made, key=key)
    pixels = jnp.asarray(known.pixels / (known.levels - 1), jnp.float32)
    trained, _ = training.train(
        key,
        model,
        fidelity.cross_entropy,
        (pixels, known.labels),
        steps=size.classifier_steps,
        batch=min(128, len(pixels)),
        rate=training.warm_cosine(2e-3, size.classifier_steps),
        ema=0.99,
        progress=console,
        checkpoint=None if folder is None else folder / "classifier.npz",
    )
    test = jnp.asarray(known.test_pixels / (known.levels - 1), jnp.float32)
    return trained, fidelity.accuracy(trained, test, known.test_labels), made


KINDS = ("contrast", "shift", "paper")


class Trained(NamedTuple):
    """seconds: None if training went on from a checkpoint."""

    model: losses.Parametrised
    there: positive.PositiveMap
    x0: jax.Array
    info: training.TrainingInfo
    seconds: float | None
    made: dict[str, Any]


def train(
    kind: str, size: Size, known: Images, seed: int, folder: Path | None, console: Console, pictures: Path | None = None
) -> Trained:
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    there = positive.contrast(1.0) if kind == "contrast" else positive.shift(1.0)
    x0 = there.to_positive(known.unit(first))
    made = {"shape": list(x0.shape[1:]), "classes": CLASSES, **size.network}
    network = nets.UNet(**made, key=second)
    process = PAPER if kind == "paper" else geometric(**WIDE[1])
    model = losses.parametrised(network, process, x0, form="hyvarinen" if kind == "paper" else "denoiser")
    deviation = float(model.deviation)
    times = losses.uniform() if kind == "paper" else losses.lognormal(process, deviation)
    weight: losses.Weight = "paper" if kind == "paper" else losses.edm(deviation)

    def loss(key: jax.Array, model: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        one, two = jax.random.split(key)
        given = losses.without_class(one, label)
        return losses.denoising(two, model, process, x, times=times, weight=weight, label=given)

    def grid(model: Any) -> jax.Array:
        row = Row("", "dpm2m", 20)
        return unit(there, draw(jax.random.key(0), model, row, x0[:5000], jnp.arange(64) % CLASSES)[0])

    checkpoint = None if folder is None else folder / f"{kind}_{seed}.npz"
    fresh, start = checkpoint is None or not checkpoint.exists(), time.perf_counter()
    trained, info = training.train(
        third,
        model,
        loss,
        (x0, known.labels),
        steps=size.steps,
        batch=min(size.batch, len(x0)),
        rate=training.warm_cosine(size.rate, size.steps),
        ema=0.9995 if size.steps > 10_000 else 0.99,
        progress=console,
        checkpoint=checkpoint,
        pictures=None if pictures is None else training.Pictures(pictures, grid, every=max(1, size.steps // 4)),
    )
    if info.stopped != "steps":
        raise FloatingPointError(f"{kind}: training was {info.stopped} after {info.steps} steps")
    return Trained(trained, there, x0, info, time.perf_counter() - start if fresh else None, made)


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
            *(Row(f"DPM-Solver++(2M) {k}", "dpm2m", k) for k in (5, 10, 20)),
            Row("DPM-Solver++(2M) 20, guided by 2", "dpm2m", 20, weight=2.0),
            Row("DPM-Solver++(2M) 20, no class", "dpm2m", 20, weight=0.0),
            Row("Heun 10", "heun", 10),
            Row("ancestral 20", "ancestral", 20),
            Row(f"DLS {n}", "dls", n, slow=True),
        ]
    # The paper's recipes are made for x in [1, 2], its process and its prior.
    slow = [
        Row(f"DLS {n}, paper's process", "dls", n, True, True),
        Row(f"UMS {n}, paper's process", "ums", n, True, True),
        Row(f"annealed {n} ({recipe})", "annealed", n, True, True),
        Row("DPM-Solver++(2M) 20, paper's process", "dpm2m", 20, True),
    ]
    own = [Row(f"DPM-Solver++(2M) {k}", "dpm2m", k) for k in (10, 20)]
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


def unit(there: positive.PositiveMap, x: jax.Array) -> jax.Array:
    """Samples as pixels in [0, 1]; what is darker or brighter is cut off, as in the paper."""
    low, high = (there.to_positive(jnp.asarray(v, x.dtype)) for v in (0.0, 1.0))
    return there.to_data(jnp.clip(x, low, high))


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
    """Mean and standard deviation over the seeds of what varies."""
    varies = ("frechet", "kernel", "precision", "recall")
    spread = {k: float(np.std([r[k] for r in runs], ddof=1)) if len(runs) > 1 else None for k in varies}
    mean = {k: float(np.mean([r[k] for r in runs])) for k in varies}
    return runs[0] | mean | {"spread": spread, "seeds": len(runs)}


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
    "DPM-Solver": "o",
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
    for axes, what in zip(fig.subplots(1, 2), ("frechet", "kernel"), strict=True):
        for name, row in rows.items():
            marker = next(m for part, m in MARKERS.items() if part in name)
            style = {"fmt": marker, "color": colours[name.partition(":")[0]], "capsize": 2, "label": name}
            style["mfc"] = "white" if "paper's process" in name or "annealed" in name else None
            axes.errorbar(row["evaluations"], row[what], row["spread"][what] or 0.0, **style)
        axes.axhline(floor[what], color="gray", linestyle=":", label="training images")
        axes.set(xscale="log", xlabel="evaluations of the network", ylabel=f"{what} distance")
    fig.axes[0].set_yscale("log")
    fig.axes[1].set_yscale("symlog", linthresh=0.1)
    fig.axes[1].set_ylim(bottom=min(0, *(row["kernel"] for row in rows.values())))
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
    name: str, size: Size, out: Path, console: Console, seeds: int = 3, kinds: tuple[str, ...] = KINDS
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
    result: dict[str, Any] = about("jax", "equinox", "optax") | {"data": name, "size": size._asdict()}
    result |= {"accuracy of the classifier": accuracy, "training images": floor, "models": {}, "samplers": rows}
    for kind in kinds:
        one = train(kind, size, known, 0, folder, console, folder / kind)
        kept = one.info.losses
        result["models"][kind] = {
            "parameters": nets.parameters(one.model.network),
            "seconds": one.seconds,
            "loss": [float(part.mean()) for part in np.array_split(kept, min(50, len(kept)))],
        }
        if kind != "paper":
            result["models"][kind]["likelihood"] = bits(one, size, known)
        if kind == "contrast":
            conditioned(one, known, folder)
        for row in table(size, kind, recipe):
            runs = []
            for seed in range(1 if row.slow and size.levels < 1000 else seeds):
                facts, found = sampled(row, one, size, reference, seed, recipe)
                runs.append(facts)
                if seed == 0:
                    write_png(folder / f"{kind}_{file_name(row.name)}.png", found[:100], columns=10)
            rows[f"{kind}: {row.name}"] = summary(runs)
            console.print(f"{kind}: {row.name}", {k: runs[0][k] for k in ("frechet", "kernel", "seconds")})
        result["seconds"] = time.perf_counter() - start
        write_result(out / f"gbm_images_{name}.json", result, figure(rows, floor))
    show(console, {"training images": floor | {"images": size.samples}, **rows})
    return result


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower()).strip("_")


def ship(name: str, size: Size, out: Path, folder: Path, console: Console) -> None:
    """Write the first model and the classifier as files of `generative.weights`; checkpoints are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = images(name, size.images)
    command = f"python benchmarks/gbm_images.py --data {name} --ship FOLDER"
    judge, accuracy, made = classifier(size, known, folder, console)
    facts = {"command": command, "data": f"{name}, the first {len(known.pixels)} images"}
    weights.save_network(
        out / f"features_{name}.npz", judge, made=("Classifier", made), seed=1, accuracy=accuracy, **facts
    )
    one = train("contrast", size, known, 0, folder, console)
    weights.save_model(
        out / f"gbm_{name}.npz",
        one.model,
        network=("UNet", one.made),
        process=WIDE,
        positive=("contrast", 1.0),
        seed=0,
        steps=size.steps,
        batch=size.batch,
        final_loss=float(one.info.losses[-100:].mean()),
        **facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion_mnist", "digits8x8"))
    parser.add_argument("--full", action="store_true", help="the size for a GPU")
    parser.add_argument("--smoke", action="store_true", help="a size that shows that all runs, and no more")
    parser.add_argument("--seeds", type=int, default=3, help="of the samplers")
    parser.add_argument("--ship", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    size = SIZES["full" if given.full else "smoke" if given.smoke else "small"]
    console = Console()
    if given.ship is None:
        run(given.data, size, given.out, console, given.seeds)
    else:
        ship(given.data, size, given.ship, given.out / f"gbm_images_{given.data}", console)


if __name__ == "__main__":
    main()
