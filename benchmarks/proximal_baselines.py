"""A learned proximal network on 8 x 8 digits beside what else one could put into the same iteration.

    python benchmarks/proximal_baselines.py [--out FOLDER] [--images N] [--steps STEPS] [--seeds N]

Total variation and sparse wavelet coefficients; a gradient-step and a free denoiser of as many weights as the learned network,
trained by the squared error on the same images at the same noise.  Denoising, and plug-and-play ADMM for deblurring and for
filling in half of the pixels: with the weight of the prior that is best on training images, and with ρ > ‖AᵀA‖ as the theorem
wants it.  There the learned network keeps its weight by λ; a denoiser that is no proximal map has no λ.

Writes proximal_baselines.json and a figure.  Trained denoisers are kept in FOLDER as checkpoints until the end.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from measure import about, write_result
from proximal_digits import BLUR_NOISE, Restored, digits, noisy, psnr, restore
from rich.console import Console
from rich.table import Table

from solvers import imaging
from solvers.proximal import matching, training, weights
from solvers.proximal.baselines import TotalVariation, WaveletSoftThreshold
from solvers.proximal.denoisers import FreeDenoiser, GradientStepDenoiser
from solvers.proximal.functional import Regularizer

SIGMA, SHAPE, MOST, CERTIFIED = 0.1, (1, 8, 8), 2000, 1.05
PENALTIES = (0.3, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.016, 0.01, 0.006, 0.004, 0.0025, 0.0016, 0.001)
CONVEX = 0.1  # ρ of the convex priors, which converge for any
PARAMETERS = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
TUNING, TUNING_STEPS = 60, 200  # training images and iterations with which weights are chosen


class Denoiser(eqx.Module):
    """y -> prox of a regulariser."""

    prior: Regularizer

    def __call__(self, y: jax.Array) -> jax.Array:
        return self.prior.prox(y)


class Task(NamedTuple):
    """An operator of norm one, of whose images noise of BLUR_NOISE is added; and how the first images are made."""

    operator: Any
    start: Callable[[np.ndarray], np.ndarray | None]

    def measured(self, clean: np.ndarray, seed: int) -> np.ndarray:
        return noisy(np.asarray(jax.vmap(self.operator)(jnp.asarray(clean))), BLUR_NOISE, seed)

    def restored(self, denoise: Any, b: np.ndarray, rho: float, lam: float = 1.0, most: int = MOST) -> Restored:
        return restore(denoise, self.operator, b, rho, lam, start=self.start(b), most=most)


def tasks() -> dict[str, Task]:
    kept = np.random.default_rng(0).permutation(64).reshape(SHAPE) < 32
    return {
        "deblurring": Task(imaging.blur(imaging.gaussian_kernel(3, 0.8, jnp.float32), SHAPE), lambda b: None),
        # Grey where nothing is known: black is what digits mostly are, and the iterations stay near it.
        "half of the pixels": Task(imaging.inpainting(jnp.asarray(kept)), lambda b: np.where(kept, b, np.float32(0.5))),
    }


CLASSICAL: dict[str, Callable[[float], Regularizer]] = {
    "total variation": lambda w: TotalVariation(jnp.float32(w)),
    "wavelets": lambda w: WaveletSoftThreshold(jnp.float32(w)),
}


def trained(steps: int, hidden: int, folder: Path, console: Console) -> dict[str, Any]:
    """A gradient-step and a free denoiser of `hidden` channels."""
    images, _ = digits()
    schedule = (matching.Stage(matching.squared, steps, matching.Cosine(2e-3)),)
    found = {}
    for number, kind in enumerate((GradientStepDenoiser, FreeDenoiser)):
        make, run = jax.random.split(jax.random.key(number))
        network = kind.create(make, SHAPE, hidden=hidden, layers=5)
        checkpoint = folder / f"proximal_baselines_{kind.__name__}.checkpoint.npz"
        network, info = training.train(
            run, network, images, schedule, sigma=SIGMA, batch=64, ema=0.99, checkpoint=checkpoint, progress=console
        )
        if info.stopped != "steps":
            raise FloatingPointError(f"{kind.__name__}: training was {info.stopped} after {info.steps} steps")
        found["gradient step" if kind is GradientStepDenoiser else "free"] = network
    return found


def best(score: Callable[[float], float], tried: tuple[float, ...]) -> float:
    """Of the numbers tried the one with the highest score; NaN scores below all others."""
    scores = [score(v) for v in tried]
    return tried[int(np.nanargmax(scores))]


class Setting(NamedTuple):
    """What is run: with ρ and λ.  `known`: whether convergence is known beforehand; `weight` of a convex prior."""

    label: str
    denoise: Any
    rho: float
    lam: float
    known: bool
    weight: float | None = None


def settings(task: Task, networks: dict[str, Any]) -> list[Setting]:
    """Each prior with its weight chosen on training images, and the networks at the ρ of the theorem."""
    clean = digits()[0][:TUNING]
    b = task.measured(clean, seed=10)

    def score(denoise: Any, rho: float) -> float:
        return float(psnr(task.restored(denoise, b, rho, most=TUNING_STEPS).images, clean).mean())

    found = []
    for label, prior in CLASSICAL.items():
        weight = best(lambda w, prior=prior: score(Denoiser(prior(w / CONVEX)), CONVEX), PENALTIES)
        found.append(Setting(label, Denoiser(prior(weight / CONVEX)), CONVEX, 1.0, True, weight))
    for label, network in networks.items():
        rho = best(lambda r, network=network: score(network, r), PARAMETERS)
        found.append(Setting(label, network, rho, 1.0, False))
        if label == "learned proximal":
            found.append(Setting(label, network, CERTIFIED, rho / CERTIFIED, True))
        else:
            found.append(Setting(label, network, CERTIFIED, 1.0, False))
    return found


def compared(networks: dict[str, Any], count: int, seeds: int, console: Console) -> list[dict[str, Any]]:
    """Rows of the table: PSNR over test images and seeds of the noise, without runs that diverged."""
    test = digits()[1][:count]
    rows = []
    for name, task in tasks().items():
        for setting in settings(task, networks):
            start, each = time.perf_counter(), []
            for seed in range(seeds):
                ran = task.restored(setting.denoise, task.measured(test, 1 + seed), setting.rho, setting.lam)
                each.append((psnr(ran.images, test), ran))
            # An error of ten times the energy of a white image: the run diverged.
            values = np.stack([np.nan_to_num(v, nan=-np.inf) for v, _ in each])
            lost = values < -10
            rows.append(
                {
                    "task": name,
                    "prior": setting.label,
                    "rho": setting.rho,
                    "lam": setting.lam,
                    "known": setting.known,
                    "weight": setting.weight,
                }
                | {
                    "PSNR": float(values[~lost].mean()) if (~lost).any() else None,
                    "of each seed": [
                        float(v[~away].mean()) if (~away).any() else None for v, away in zip(values, lost, strict=True)
                    ],
                    "diverged": int(lost.sum()),
                    "converged": float(np.mean([ran.converged for _, ran in each])),
                    "median steps": float(np.median([ran.steps for _, ran in each])),
                    "most steps": int(np.max([ran.steps for _, ran in each])),
                    "seconds": time.perf_counter() - start,
                }
            )
            console.print(
                {k: rows[-1][k] for k in ("task", "prior", "rho", "PSNR", "converged", "diverged", "seconds")}
            )
    return rows


def denoised(networks: dict[str, Any], count: int) -> dict[str, float]:
    """Mean PSNR at noise SIGMA."""
    train, test = digits()
    known, seen = noisy(train[:TUNING], SIGMA, 10), noisy(test[:count], SIGMA)

    def score(denoise: Any, y: np.ndarray, clean: np.ndarray) -> float:
        return float(psnr(jax.jit(jax.vmap(denoise))(jnp.asarray(y)), clean).mean())

    found = {"noisy": float(psnr(seen, test[:count]).mean())}
    for label, prior in CLASSICAL.items():
        weight = best(lambda w, prior=prior: score(Denoiser(prior(w)), known, train[:TUNING]), PENALTIES)
        found[label] = score(Denoiser(prior(weight)), seen, test[:count])
    return found | {label: score(network, seen, test[:count]) for label, network in networks.items()}


def figure(rows: list[dict[str, Any]], denoising: dict[str, float]) -> Any:
    """PSNR of each prior: filled where convergence is known beforehand, and how many runs converged."""
    import matplotlib.figure

    names = list(dict.fromkeys(row["prior"] for row in rows))
    fig = matplotlib.figure.Figure((11, 3.4), layout="constrained")
    axes = fig.subplots(1, 3, sharey=True)
    axes[0].plot([denoising[name] for name in names], range(len(names)), "o", color="black")
    axes[0].set(title=f"denoising, σ = {SIGMA:g}", yticks=range(len(names)), yticklabels=names)
    for axis, task in zip(axes[1:], dict.fromkeys(row["task"] for row in rows), strict=True):
        axis.set_title(task)
        shown = [row for row in rows if row["task"] == task and row["PSNR"] is not None]
        middle = np.mean([row["PSNR"] for row in shown])
        for row in shown:
            pair = sum(other["prior"] == row["prior"] for other in shown) > 1
            place = names.index(row["prior"]) + (0 if not pair else -0.17 if row["rho"] >= 1 else 0.17)
            colour = "C0" if row["known"] else "C1"
            axis.plot(row["PSNR"], place, "o", color=colour, mfc=colour if row["known"] else "white")
            note, left = f"ρ = {row['rho']:.3g}, {100 * row['converged']:.3g} % converged", row["PSNR"] > middle
            how = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
            axis.annotate(note, (row["PSNR"], place), fontsize=6, va="center", **how)
    for axis in axes:
        axis.set(xlabel="PSNR, dB", ylim=(len(names) - 0.5, -0.5))
        axis.margins(x=0.3)
    axes[0].plot([], [], "o", color="C0", label="known to converge")
    axes[0].plot([], [], "o", color="C1", mfc="white", label="not known")
    axes[0].legend(fontsize=7, loc="lower left")
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3200, help="of the training of each denoiser")
    parser.add_argument(
        "--hidden", type=int, default=44, help="their channels; 44 for as many weights as the learned network"
    )
    parser.add_argument("--images", type=int, default=297, help="of the tests")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise that is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    networks = {"learned proximal": weights.load("digits8x8")} | trained(given.steps, given.hidden, given.out, console)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)))
        for name, network in networks.items()
    }
    denoising = denoised(networks, given.images)
    console.print("denoising", denoising)
    rows = compared(networks, given.images, given.seeds, console)
    table = Table("task", "prior", "ρ", "λ", "known", "PSNR", "converged", "diverged", "median steps")
    for row in rows:
        decibels = "–" if row["PSNR"] is None else f"{row['PSNR']:.2f}"
        facts = (f"{row['rho']:.3g}", f"{row['lam']:.3g}", "yes" if row["known"] else "no", decibels)
        table.add_row(
            row["task"],
            row["prior"],
            *facts,
            f"{row['converged']:.1%}",
            str(row["diverged"]),
            f"{row['median steps']:.0f}",
        )
    console.print(table)
    result = about("jax", "equinox", "optax") | {"images": given.images, "seeds": given.seeds, "steps": given.steps}
    result |= {"weights": sizes, "denoising": denoising, "restoring": rows}
    write_result(given.out / "proximal_baselines.json", result, figure(rows, denoising))
    for file in given.out.glob("proximal_baselines_*.checkpoint.npz"):
        file.unlink()


if __name__ == "__main__":
    main()
