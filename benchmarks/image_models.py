"""The models that `gbm_images.py` compares and the classifier that judges them: images, networks, their training.

    contrast   x = exp(u): log x is the pixel u itself, so this is EDM on pixels, which is EDM on x = u + 1 too
    shift      x = u + 1, EDM on log x
    paper      x = u + 1 with the paper's loss (V² on the Hyvarinen score), process (V = .64 t) and prior

One network in three coordinates; all are trained with classes, a tenth of the labels left out.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from generative import data, fidelity, guidance, losses, nets, positive, samplers, training, weights
from generative.gbm_diffusion import GeometricBrownianMotion, edm_times, geometric
from generative.lognormal import fitted_prior

CLASSES = 10
SMALLEST = 0.002  # the last level of noise of the grids, half a grey level
WIDE = ("geometric", {"sigma_0": 0.01, "sigma_1": 40.0})  # levels up to 9.8, thirty times the deviation of the data
PAPER = GeometricBrownianMotion()


class Size(NamedTuple):
    """What a run costs.  `levels` are the steps of the paper's samplers."""

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
        60_000, {"widths": (48, 96, 192), "patch": 1, "blocks": 2}, 50_000, 256, 5e-4, 4000, 10_000, 1000, 256, 128
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

    def grid(model: losses.Parametrised) -> jax.Array:
        score, process = guidance.of_class(model, jnp.arange(64) % CLASSES), model.process
        one, two = jax.random.split(jax.random.key(0))
        start = fitted_prior(process, x0[:5000]).sample(one, 64)
        return unit(there, samplers.sample(two, score, process, start, edm_times(process, 20, smallest=SMALLEST))[0])

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


def unit(there: positive.PositiveMap, x: jax.Array) -> jax.Array:
    """Samples as pixels in [0, 1]; what is darker or brighter is cut off, as in the paper."""
    low, high = (there.to_positive(jnp.asarray(v, x.dtype)) for v in (0.0, 1.0))
    return there.to_data(jnp.clip(x, low, high))


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
