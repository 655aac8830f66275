"""Denoising and deblurring of 8 x 8 digits with a learned proximal network, beside what else one could take.

    python benchmarks/proximal_digits.py [--out FOLDER] [--images N] [--seeds N] [--network NETWORK]
    python benchmarks/proximal_digits.py --train FILE [--steps STEPS] [--sigma SIGMA] [--seed SEED]

Data: the 1797 digits that come with the package, divided by 16; the first 1500 for training, the last 297 for the tests.  PSNR is
the mean over the test images of 10 log10(1 / mean squared error), nothing clipped.

The first form evaluates a network that comes with the package, with fresh noise for each seed, and writes proximal_digits.json
and a picture.  The second trains one: squared error, then proximal matching with the paper's widths 0.08 √64 (8, 4, 2, 1).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from measure import about, write_result
from rich.console import Console

from generative import data
from solvers import imaging, plug_and_play
from solvers.proximal import matching, training, weights
from solvers.proximal.network import LearnedProximal, convolutional
from solvers.proximal.prior import regularizer

TRAINING = 1500
STEPS = 12_800


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 1, 8, 8) in [0, 1]: those of training and of the tests."""
    images = data.load("digits8x8")["x"].astype(np.float32)[:, None] / 16
    return images[:TRAINING], images[TRAINING:]


def train(
    seed: int, steps: int = STEPS, sigma: float = 0.1, progress: bool = False, checkpoint: Path | None = None
) -> tuple[LearnedProximal, training.TrainingInfo]:
    make, run = jax.random.split(jax.random.key(seed))
    network = convolutional(make, (1, 8, 8), hidden=32, strides=(1, 2), last=64, beta=10.0, alpha=0.01)
    images, _ = digits()
    return training.train(
        run,
        network,
        images,
        matching.our_images((1, 8, 8), steps=steps),
        sigma=sigma,
        batch=64,
        ema=0.99,
        chunk=50,
        progress=progress,
        checkpoint=checkpoint,
    )


def psnr(found: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Decibels of each image."""
    return -10 * np.log10(np.mean((np.asarray(found) - clean).reshape(len(clean), -1) ** 2, 1))


def noisy(clean: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    return clean + (sigma * np.random.default_rng(seed).normal(size=clean.shape)).astype(np.float32)


def wiener(noisy: np.ndarray, train: np.ndarray, sigma: float) -> np.ndarray:
    """The best affine map, for the mean and the covariance of the training images."""
    flat = train.reshape(len(train), -1)
    mean, covariance = flat.mean(0), np.cov(flat.T)
    gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(mean)))
    return ((noisy.reshape(len(noisy), -1) - mean) @ gain.T + mean).reshape(noisy.shape)


# ---- restoring --------------------------------------------------------------------------------------------------------------

BLUR_NOISE, SLOPE, INNER, CHANGE, MOST = 0.05, 2.0, 3, 1e-5, 2000
EXACT = 297  # images that are restored a second time
WEIGHT = 0.25  # ρ λ, the best of 0.1, 0.15, 0.2, 0.25, 0.35 on training images


class Restored(NamedTuple):
    """images     z of each
    steps      until its relative change was below CHANGE; the most that were allowed if it never was
    converged  whether it was
    residual   the largest of the scaled proximal map: ‖(1 - λ) f(w) + λ w - v‖ relative to ‖v‖, at the last step of each
    """

    images: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    residual: float


@eqx.filter_jit
def _iterate(denoise: Any, operator: Any, state: Any, b: Array, rho: Array, lam: Array | None) -> Any:
    z, u, w = state

    def norms(x: Array) -> Array:
        return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)

    x = jax.vmap(lambda b, v: operator.regularized_inverse(operator.T(b) + rho * v, rho))(b, z - u)
    u = u + x - z
    v, f = u + x, jax.vmap(denoise)
    if lam is None:
        new, residual = f(v), jnp.zeros(len(v), v.dtype)
        return (new, u, v), norms(new - z) / norms(z), residual
    for _ in range(INNER):
        w = w - 2 / ((1 - lam) * SLOPE + 2 * lam) * ((1 - lam) * f(w) + lam * w - v)
    new = f(w)
    residual = norms((1 - lam) * new + lam * w - v) / norms(v)
    return (new, u, w), norms(new - z) / norms(z), residual


def restore(
    denoise: Any,
    operator: Any,
    b: np.ndarray,
    rho: float,
    lam: float = 1.0,
    *,
    start: np.ndarray | None = None,
    most: int = MOST,
) -> Restored:
    """`plug_and_play.admm` for all images at once, as a loop of the host (in XLA's own loops convolutions on CPUs are slow).

    denoise  a module y -> D(y), for λ ≠ 1 a learned proximal network
    start    the first images; None for Aᵀb
    The proximal map of λ R is f(w) with (1 - λ) f(w) + λ w = v; w goes on from one iteration to the next by a few gradient steps,
    so that both problems are solved together.
    """
    data_now = jnp.asarray(b)
    first_images = jax.vmap(operator.T)(data_now) if start is None else jnp.asarray(start)
    images, steps, converged, worst = np.array(first_images), np.full(len(b), most), np.zeros(len(b), bool), 0.0
    left = np.arange(len(b))
    state = (first_images, jnp.zeros_like(first_images), first_images)
    numbers = jnp.asarray(rho, jnp.float32), None if lam == 1 else jnp.asarray(lam, jnp.float32)
    for step in range(1, most + 1):
        state, change, residual = _iterate(denoise, operator, state, data_now, *numbers)
        first = (np.asarray(change) <= CHANGE) & ~converged[left]
        images[left[first]], steps[left[first]] = np.asarray(state[0])[first], step
        converged[left[first]] = True
        if first.any():
            worst = max(worst, float(np.asarray(residual)[first].max()))
        open_ = ~converged[left]
        if not open_.any():
            break
        if open_.sum() <= len(left) // 2:  # half as many: worth a compilation
            left, data_now = left[open_], data_now[open_]
            state = tuple(v[open_] for v in state)
    images[left[~converged[left]]] = np.asarray(state[0])[~converged[left]]
    return Restored(images, steps, converged, worst)


@eqx.filter_jit
def _exactly(prior: Any, operator: Any, b: Array, rho: float, lam: float) -> tuple[Array, Array]:
    def one(b: Array) -> tuple[Array, Array]:
        term = imaging.LeastSquares(operator, b)
        x, info = plug_and_play.admm(term, prior, operator.T(b), rho=rho, lam=lam, tolerance=CHANGE, max_steps=MOST)
        return x, info.converged

    return jax.vmap(one)(b)


def beside_exact(
    network: LearnedProximal, operator: Any, b: np.ndarray, clean: np.ndarray, ran: Restored, rho: float, lam: float
) -> dict[str, float]:
    """The first images by `plug_and_play.admm`, whose proximal map is solved to 1e-5 in each iteration, as the theorem wants it,
    and how far what `restore` found is from that."""
    n = min(EXACT, len(b))
    found, converged = _exactly(regularizer(network, tolerance=1e-5), operator, jnp.asarray(b[:n]), rho, lam)
    change = psnr(ran.images[:n], clean[:n]) - psnr(np.asarray(found), clean[:n])
    return {
        "images": n,
        "converged": float(np.mean(converged)),
        "PSNR, exact less inexact": -float(change.mean()),
        "largest difference of PSNR": float(np.abs(change).max()),
        "largest difference of a pixel": float(np.abs(np.asarray(found) - ran.images[:n]).max()),
    }


def evaluate(
    network: LearnedProximal, sigma: float, count: int, out: Path, console: Console, seeds: int = 3
) -> dict[str, Any]:
    training_set, test = digits()
    test = test[:count]
    result: dict[str, Any] = about("jax", "equinox") | {"images": len(test), "sigma": sigma, "seeds": seeds}
    result["weights"] = network.parameters
    # Even and odd: the noise of denoising is not that of deblurring.
    seen = [noisy(test, sigma, 2 * seed) for seed in range(seeds)]
    found = [np.asarray(jax.vmap(network)(jnp.asarray(y))) for y in seen]
    result["denoising"] = {
        "noisy": over_seeds([psnr(y, test) for y in seen]),
        "affine": over_seeds([psnr(wiener(y, training_set, sigma), test) for y in seen]),
        "learned": over_seeds([psnr(x, test) for x in found]),
    }
    blur = imaging.blur(imaging.gaussian_kernel(3, 0.8, jnp.float32), (1, 8, 8))
    sharp = np.asarray(jax.vmap(blur)(jnp.asarray(test)))
    blurred = [noisy(sharp, BLUR_NOISE, 2 * seed + 1) for seed in range(seeds)]
    result["deblurring"] = {"measured": over_seeds([psnr(b, test) for b in blurred])}
    pictures = {"clean": test, "noisy": seen[0], "denoised": found[0], "blurred": blurred[0]}
    for rho, lam in ((1.05, WEIGHT / 1.05), (WEIGHT, 1.0)):
        known = plug_and_play.certificate(
            "admm", imaging.LeastSquares(blur, jnp.asarray(blurred[0][0])), regularizer(network), step=rho, lam=lam
        )
        console.print(str(known))
        start = time.perf_counter()
        runs = [restore(network, blur, b, rho, lam) for b in blurred]
        pictures[f"deblurred, λ = {lam:.3g}"] = runs[0].images
        steps = np.stack([ran.steps for ran in runs])
        result["deblurring"][f"rho {rho:g}, lam {lam:.4g}"] = {
            "certified": known.holds,
            "PSNR": over_seeds([psnr(ran.images, test) for ran in runs]),
            "converged": float(np.mean([ran.converged for ran in runs])),
            "most steps": int(steps.max()),
            "median steps": float(np.median(steps)),
            "inner residual": max(ran.residual for ran in runs),
            "seconds": time.perf_counter() - start,
        }
        if lam != 1:
            exact = beside_exact(network, blur, blurred[0], test, runs[0], rho, lam)
            result["deblurring"][f"rho {rho:g}, lam {lam:.4g}"]["with the exact proximal map"] = exact
    evaluate = jax.jit(jax.vmap(regularizer(network, tolerance=1e-3).evaluate))
    values = [
        np.asarray(evaluate(jnp.asarray(np.clip(noisy(test, s, 2), 0, 1))).value) for s in (0.0, 0.05, 0.1, 0.2, 0.3)
    ]
    result["R rises with noise"] = float((np.diff(values, axis=0) > 0).all(0).mean())
    console.print_json(data=result)
    write_result(out / "proximal_digits.json", result, figure(pictures))
    return result


def over_seeds(values: list[np.ndarray]) -> dict[str, Any]:
    """Mean over the images: of all seeds, and of each."""
    each = [float(v.mean()) for v in values]
    return {"mean": float(np.mean(each)), "of each seed": each}


def figure(pictures: dict[str, np.ndarray], columns: int = 10) -> Any:
    """The first images, a row for each stage."""
    import matplotlib.figure

    columns = min(columns, len(next(iter(pictures.values()))))
    fig = matplotlib.figure.Figure((1.0 * columns + 1.6, 1.0 * len(pictures)), layout="constrained")
    grid = fig.subplots(len(pictures), columns, squeeze=False)
    for row, (name, images) in zip(grid, pictures.items(), strict=True):
        for axes, image in zip(row, images, strict=False):
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, metavar="FILE", help="train a network and write it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sigma", type=float, default=0.1, help="noise of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--network", default="digits8x8", help="a name, or a file *.npz")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--images", type=int, default=297, help="of the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    console = Console()
    if given.train is None:
        evaluate(weights.load(given.network), given.sigma, given.images, given.out, console, given.seeds)
        return
    checkpoint = given.train.with_suffix(".checkpoint.npz")
    network, info = train(given.seed, given.steps, given.sigma, True, checkpoint)
    if info.stopped != "steps":
        raise FloatingPointError(f"{given.train}: not written, training was {info.stopped}")
    _, test = digits()
    reached = float(psnr(jax.vmap(network)(jnp.asarray(noisy(test, given.sigma))), test).mean())
    weights.save(
        given.train,
        network,
        command=" ".join(["python benchmarks/proximal_digits.py", *sys.argv[1:]]),
        seed=given.seed,
        sigma=given.sigma,
        schedule=[matching.described(stage) for stage in matching.our_images((1, 8, 8), steps=given.steps)],
        batch=64,
        ema=0.99,
        final_loss=float(info.losses[-100:].mean()),
        data="digits8x8, the first 1500, divided by 16",
        range=[0.0, 1.0],
        psnr=reached,
    )
    checkpoint.unlink()
    console.print(f"PSNR {reached:.2f} dB at noise {given.sigma:g}, written: {given.train}")


if __name__ == "__main__":
    main()
