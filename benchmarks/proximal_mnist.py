"""What a learned proximal network says of handwritten digits: its prior under noise, blur and mixing.

    PROOFSTONE_DATA=FOLDER python benchmarks/proximal_mnist.py [--out FOLDER] [--images N] [--network NETWORK]
    PROOFSTONE_DATA=FOLDER python benchmarks/proximal_mnist.py --train FILE [--steps STEPS] [--hidden WIDTH] [--seed SEED]

The first form evaluates the network that comes with the package and writes proximal_mnist.json and pictures; the second trains
one, of the paper's architecture at another width, on 28 x 28 images of MNIST in [0, 1] with noise of 0.1.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from measure import about, write, write_result
from rich.console import Console

from generative import data
from solvers.proximal import matching, training, weights
from solvers.proximal.network import LearnedProximal, mnist
from solvers.proximal.prior import regularizer

TRAINING, STEPS, HIDDEN, BATCH, SIGMA = 25_000, 4000, 16, 64, 0.1


def images(split: str, n: int) -> np.ndarray:
    """The first n images (n, 1, 28, 28) of a split, in [0, 1]."""
    return data.load("mnist", split=split, n=n)["x"].astype(np.float32)[:, None] / 255


def train(
    seed: int,
    clean: np.ndarray,
    steps: int = STEPS,
    hidden: int = HIDDEN,
    progress: bool = False,
    checkpoint: Path | None = None,
) -> tuple[LearnedProximal, training.TrainingInfo]:
    make, run = jax.random.split(jax.random.key(seed))
    return training.train(
        run,
        mnist(make, hidden=hidden),
        clean,
        matching.our_images((1, 28, 28), steps=steps),
        sigma=SIGMA,
        batch=min(BATCH, len(clean)),
        ema=0.99,
        chunk=50,
        progress=progress,
        checkpoint=checkpoint,
    )


# ---- the prior ----------------------------------------------------------------------------------------------------------

NOISES, BLURS, MIXES = (0.0, 0.05, 0.1, 0.2, 0.3), (0.0, 0.5, 1.0, 2.0, 4.0), (0.0, 0.25, 0.5, 0.75, 1.0)


def changed(clean: np.ndarray, seed: int = 0) -> dict[str, dict[float, np.ndarray]]:
    """Images with noise (and cut to [0, 1]), blurred, and mixed with those of the list read backwards; by how much."""
    noise = np.random.default_rng(seed).normal(size=clean.shape)
    return {
        "noise": {s: np.clip(clean + s * noise, 0, 1).astype(np.float32) for s in NOISES},
        "blur": {s: scipy.ndimage.gaussian_filter(clean, (0, 0, s, s)) for s in BLURS},
        "mixing": {s: ((1 - s) * clean + s * clean[::-1]).astype(np.float32) for s in MIXES},
    }


class Priors(NamedTuple):
    """values    of each kind of change and how much of it: R of each image, less the smallest of all
    error_bound  the largest
    """

    values: dict[str, dict[float, np.ndarray]]
    error_bound: float


def priors(network: LearnedProximal, sets: dict[str, dict[float, np.ndarray]]) -> Priors:
    found: dict[str, dict[float, np.ndarray]] = {}
    worst, least = 0.0, np.inf
    evaluate = jax.jit(jax.vmap(regularizer(network, tolerance=1e-4).evaluate))
    for kind, by in sets.items():
        found[kind] = {}
        for amount, x in by.items():
            here = evaluate(jnp.asarray(x))
            if not bool(here.converged.all()):
                raise FloatingPointError(f"{kind} {amount:g}: {int((~here.converged).sum())} images were not inverted")
            found[kind][amount] = np.asarray(here.value)
            worst, least = max(worst, float(here.error_bound.max())), min(least, float(here.value.min()))
    return Priors({kind: {k: v - least for k, v in by.items()} for kind, by in found.items()}, worst)


def summary(values: dict[str, dict[float, np.ndarray]]) -> dict[str, float]:
    """Parts of the images whose R rises with the noise, and with the blur, at every level; of the pairs whose R in the middle
    lies above the chord, those of an image with itself left out; and by what the mean R grows."""
    noise, blur, mixing = (np.stack(list(values[kind].values())) for kind in ("noise", "blur", "mixing"))
    pairs = np.ones(mixing.shape[1], bool)
    if len(pairs) % 2:
        pairs[len(pairs) // 2] = False
    return {
        "rises with noise": float((np.diff(noise, axis=0) > 0).all(0).mean()),
        "rises with blur": float((np.diff(blur, axis=0) > 0).all(0).mean()),
        "above the chord": float((mixing[2] > (mixing[0] + mixing[-1]) / 2)[pairs].mean()),
        "growth with noise": float(noise[-1].mean() / noise[0].mean()),
    }


def figure(values: dict[str, dict[float, np.ndarray]]) -> Any:
    """R of all images against how much they are changed, a violin for each."""
    import matplotlib.figure

    fig = matplotlib.figure.Figure((10, 3.2), layout="constrained")
    labels = {"noise": "deviation of the noise", "blur": "width of the blur", "mixing": "share of the other image"}
    for axes, (kind, by) in zip(fig.subplots(1, 3), values.items(), strict=True):
        places = np.arange(len(by))
        axes.violinplot(list(by.values()), places, showmedians=True, widths=0.8)
        axes.set_xticks(places, [f"{amount:g}" for amount in by])
        axes.set(xlabel=labels[kind], title=f"The prior under {kind}")
    fig.axes[0].set_ylabel("R, above the smallest")
    return fig


def pictures(
    sets: dict[str, dict[float, np.ndarray]], values: dict[str, dict[float, np.ndarray]], image: int = 0
) -> Any:
    """One image, changed more and more, with its R."""
    import matplotlib.figure

    columns = max(len(by) for by in sets.values())
    fig = matplotlib.figure.Figure((1.5 * columns, 1.75 * len(sets)), layout="constrained")
    grid = fig.subplots(len(sets), columns, squeeze=False)
    for row, (kind, by) in zip(grid, sets.items(), strict=True):
        for axes, (amount, x) in zip(row, by.items(), strict=False):
            axes.imshow(x[image, 0], cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{kind} {amount:g}: R = {values[kind][amount][image]:.2f}", fontsize=7)
        for axes in row:
            axes.axis("off")
    return fig


def evaluate(network: LearnedProximal, clean: np.ndarray, out: Path, console: Console) -> dict[str, Any]:
    sets = changed(clean)
    start = time.perf_counter()
    found = priors(network, sets)
    seconds = time.perf_counter() - start
    noise = np.random.default_rng(1).normal(size=clean.shape).astype(np.float32)
    denoised = np.asarray(jax.vmap(network)(jnp.asarray(clean + SIGMA * noise)))
    psnr = -10 * np.log10(np.mean((denoised - clean).reshape(len(clean), -1) ** 2, 1))
    means = {kind: {f"{k:g}": float(v.mean()) for k, v in by.items()} for kind, by in found.values.items()}
    result = about("jax", "equinox") | {
        "images": len(clean),
        "summary": summary(found.values),
        "mean R": means,
        "error bound of R": found.error_bound,
        "seconds": seconds,
        "PSNR at noise 0.1": float(psnr.mean()),
    }
    write_result(out / "proximal_mnist.json", result, figure(found.values))
    fig = pictures(sets, found.values)
    write(out / "proximal_mnist_images.png", lambda name: fig.savefig(name, dpi=110))
    console.print_json(data=result["summary"] | {"PSNR": float(psnr.mean())})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, metavar="FILE", help="train a network and write it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="channels; the paper has 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="mnist", help="a name, or a file *.npz")
    parser.add_argument("--images", type=int, default=100, help="of the test set")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    console = Console()
    if given.train is None:
        evaluate(weights.load(given.network), images("test", given.images), given.out, console)
        return
    clean = images("train", TRAINING)
    checkpoint = given.train.with_suffix(".checkpoint.npz")
    network, info = train(given.seed, clean, given.steps, given.hidden, True, checkpoint)
    if info.stopped != "steps":
        raise FloatingPointError(f"{given.train}: not written, training was {info.stopped}")
    weights.save(
        given.train,
        network,
        command=" ".join(["python benchmarks/proximal_mnist.py", *sys.argv[1:]]),
        seed=given.seed,
        sigma=SIGMA,
        schedule=[matching.described(stage) for stage in matching.our_images((1, 28, 28), steps=given.steps)],
        batch=BATCH,
        ema=0.99,
        final_loss=float(info.losses[-100:].mean()),
        data=f"MNIST, the first {TRAINING} images, divided by 255",
        range=[0.0, 1.0],
    )
    checkpoint.unlink()
    console.print(f"loss {float(info.losses[-100:].mean()):.4g}, written: {given.train}")


if __name__ == "__main__":
    main()
