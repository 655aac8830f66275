"""Learned proximal networks on large images, for a GPU: training, and plug-and-play against other denoisers.

    [PROOFSTONE_DATA=FOLDER] python benchmarks/proximal_images.py --images {mnist,leaves,phantoms} [--steps STEPS] [--out FOLDER]
    python benchmarks/proximal_images.py --images leaves --smoke

mnist     the paper's network for 28 x 28, 317 056 parameters; needs PROOFSTONE_DATA.  Deblurring
leaves    images of discs that cover each other, radii with density r⁻³ (dead leaves), in colour, made at every step; tested on
          more of them and, with PROOFSTONE_DATA, on the photographs of images_gray.npz.  Deblurring
phantoms  slices of ellipses, made at every step.  Tomography and compressed sensing

The schedule is the paper's (`paper_images`), 40 000 steps, or with --short `our_images`, which needs fewer; networks of 7 million
parameters (`image128`).  Beside it, U-Nets of
as many weights, trained for as many steps with the squared error: one whose step along a gradient denoises, and one that is
free; and total variation, its weight chosen from several by the PSNR on the first image.  Each runs in plug-and-play ADMM with
the paper's ρ, and with one above L_h, as the theorem wants it; the learned proximal network there also with the λ that keeps
the weight ρ λ of the prior.  Prints a table of PSNR, of runs that converged or diverged, and of what is certified, and which
targets are met; writes proximal_images_NAME.json.  Training leaves checkpoints in FOLDER, from which a run that was
interrupted goes on.

--smoke  16 x 16, eight channels, a few steps, two of the tasks: whether it runs
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from measure import about, write_json
from rich.console import Console
from rich.table import Table

from generative import data, nets
from solvers import adjoint, imaging, plug_and_play, tomography
from solvers.proximal import matching, training, weights
from solvers.proximal.baselines import TotalVariation
from solvers.proximal.denoisers import FreeDenoiser, GradientStepDenoiser
from solvers.proximal.network import image128, mnist
from solvers.proximal.prior import regularizer

WEIGHTS = (0.3, 0.1, 0.03, 0.01, 0.003)  # of total variation, to choose from


class Size(NamedTuple):
    """side of the images, their colours (of leaves), channels of the networks, batch, steps, noise of the training, test images,
    most iterations"""

    side: int
    channels: int
    hidden: int
    batch: int
    steps: int
    sigma: float
    tests: int
    iterations: int


FULL, SMOKE = Size(128, 3, 256, 64, 40_000, 0.1, 20, 200), Size(16, 1, 8, 4, 8, 0.1, 2, 5)

# ---- images -------------------------------------------------------------------------------------------------------------


class Leaves(eqx.Module):
    """(key, count) -> images (count, channels, side, side) in [0, 1] of discs that cover each other."""

    side: int = eqx.field(static=True)
    channels: int = eqx.field(static=True, default=1)
    discs: int = eqx.field(static=True, default=300)

    def __call__(self, key: Array, count: int) -> Float[Array, "count channels side side"]:
        return jax.vmap(self.one)(jax.random.split(key, count))

    def one(self, key: Array) -> Float[Array, "channels side side"]:
        places, sizes, colours = jax.random.split(key, 3)
        points = (jnp.arange(self.side) + 0.5) / self.side
        centres = jax.random.uniform(places, (self.discs, 2), minval=-0.2, maxval=1.2)
        low, high = 1.5 / self.side, 0.4
        # Density r⁻³ between the two, by the inverse of its distribution function.
        u = jax.random.uniform(sizes, (self.discs,))
        radii = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
        colours = jax.random.uniform(colours, (self.discs + 1, self.channels))

        def cover(image: Array, disc: tuple[Array, Array, Array]) -> tuple[Array, None]:
            centre, radius, colour = disc
            far = (points[:, None] - centre[0]) ** 2 + (points - centre[1]) ** 2
            return jnp.where(far < radius**2, colour[:, None, None], image), None

        start = jnp.broadcast_to(colours[-1][:, None, None], (self.channels, self.side, self.side))
        return jax.lax.scan(cover, start, (centres, radii, colours[:-1]))[0]


class Phantoms(eqx.Module):
    """(key, count) -> slices (count, 1, side, side) in [0, 1]."""

    side: int = eqx.field(static=True)

    def __call__(self, key: Array, count: int) -> Float[Array, "count 1 side side"]:
        def one(key: Array) -> Array:
            return jnp.clip(tomography.random_ellipses(key).image(self.side, oversampling=2), 0, 1)[None]

        return jax.vmap(one)(jax.random.split(key, count))


def photographs(side: int) -> np.ndarray | None:
    """The middle (n, 1, side, side) of the photographs in the folder of data; None without one."""
    folder = os.environ.get(data.ENVIRONMENT)
    path = Path(folder) / "images_gray.npz" if folder else None
    if path is None or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        images = file["images"].astype(np.float32) / 255
    first = (images.shape[1] - side) // 2
    return images[:, None, first : first + side, first : first + side]


def images_of(name: str, size: Size) -> tuple[Any, dict[str, np.ndarray]]:
    """What to train on, and sets to test on."""
    if name == "mnist":
        clean = {split: data.load("mnist", split=split)["x"][:, None] for split in ("train", "test")}
        train, test = (x.astype(np.float32) / 255 for x in clean.values())
        return jnp.asarray(train), {"digits": test[: size.tests]}
    draw = Leaves(size.side, size.channels) if name == "leaves" else Phantoms(size.side)
    tests = {name: np.asarray(draw(jax.random.key(10_000), size.tests))}
    real = photographs(size.side) if name == "leaves" else None
    if real is not None:
        # Grey ones: the same in all colours.
        tests["photographs"] = np.repeat(real[: size.tests], size.channels, 1)
    return draw, tests


# ---- tasks --------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """The operator, the noise of what is measured, the paper's ρ, and how a first image is made of it."""

    operator: Any
    noise: float
    rho: float
    start: Callable[[Array], Array]


def tasks_of(name: str, shape: tuple[int, int, int]) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    if name != "phantoms":
        for width in (1.0, 2.0):
            for noise in (0.02, 0.04):
                # All of one size, that one program does for all; the paper's kernel of width 1 has 5 x 5.
                blur = imaging.blur(imaging.gaussian_kernel(7, width, jnp.float32), shape, "full")
                tasks[f"blur {width:g}, noise {noise:g}"] = Task(blur, noise, 0.1, blur.T)
        return tasks
    side = shape[-1]
    for views in (60, 200):
        angles = jnp.arange(views, dtype=jnp.float32) * np.pi / views
        radon = tomography.radon(shape, angles, 2 * side)
        # Divided by its norm, so that ρ means the same for all operators.
        scale = float(jnp.sqrt(radon.norm_squared_bound))
        scaled = adjoint.from_functions(
            lambda x, A=radon, s=scale: A(x) / s, lambda y, A=radon, s=scale: A.T(y) / s, shape
        )
        tasks[f"{views} views"] = Task(
            scaled, 0.01, 0.05, lambda y, A=radon, s=scale: jnp.clip(tomography.fbp(A, y * s), 0, 1)
        )
    for part in (4, 16):
        sensing = imaging.compressed_sensing(jax.random.key(part), shape, side**2 // part)
        tasks[f"compressed sensing 1/{part}"] = Task(sensing, 1e-3, 0.05, sensing.T)
    return tasks


def psnr(found: Array, clean: Array) -> np.ndarray:
    error = np.mean((np.asarray(found) - np.asarray(clean)).reshape(len(clean), -1) ** 2, 1)
    return -10 * np.log10(error)


@eqx.filter_jit
def _admm(
    operator: Any, b: Array, prior: Any, start: Array, norm: Array, rho: Array, lam: Array | None, iterations: int
) -> tuple[Array, Array]:
    """Of many images at once: x, and whether it converged."""

    def one(b: Array, start: Array) -> tuple[Array, Array]:
        term = imaging.LeastSquares(operator, b, norm_squared=norm)
        weight = 1.0 if lam is None else lam
        x, info = plug_and_play.admm(term, prior, start, rho=rho, lam=weight, tolerance=1e-5, max_steps=iterations)
        return x, info.converged

    return jax.vmap(one)(b, start)


def restored(
    task: Task, norm: float, prior: Any, clean: np.ndarray, size: Size, rho: float, lam: float | None = None
) -> dict[str, Any]:
    """All images by ADMM; norm is ‖AᵀA‖ or a bound of it; lam None for a prior that has one map only."""
    noise = np.random.default_rng(0).normal(size=(len(clean), *task.operator.shape_out)).astype(np.float32)
    begun = time.perf_counter()
    b = jax.vmap(task.operator)(jnp.asarray(clean)) + task.noise * jnp.asarray(noise)
    term = imaging.LeastSquares(task.operator, b[0], norm_squared=norm)
    known = plug_and_play.certificate("admm", term, prior, step=rho, lam=1.0 if lam is None else lam)
    numbers = [None if v is None else jnp.asarray(v, jnp.float32) for v in (norm, rho, lam)]
    found, fine = _admm(task.operator, b, prior, jax.vmap(task.start)(b), *numbers, size.iterations)
    values = psnr(found, clean)
    lost = ~(values > -10)  # an error of ten times the energy of a white image, or no number
    return {
        "rho": rho,
        "lam": 1.0 if lam is None else lam,
        "PSNR": None if lost.all() else float(values[~lost].mean()),
        "diverged": int(lost.sum()),
        "converged": float(np.mean(fine)),
        "certified": known.holds,
        "seconds": time.perf_counter() - begun,
    }


# ---- the run ------------------------------------------------------------------------------------------------------------


class Unet(eqx.Module):
    """x -> N(x) of images (channels, height, width), with no level of noise to see."""

    network: nets.UNet

    def __init__(self, key: Array, shape: tuple[int, int, int], width: int):
        channels, *sides = shape
        widths = (width, 2 * width, 4 * width)
        first, last = jax.random.split(key)
        network = nets.UNet((*sides, channels), widths=widths, patch=1, attention=False, key=first)
        # As made it returns zeros, at which the gradient step has no gradient to learn by.
        kernel = network.last.kernel
        small = 0.1 * jax.random.normal(last, kernel.shape) / np.sqrt(kernel[..., 0].size)
        self.network = eqx.tree_at(lambda n: n.last.kernel, network, small)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        return jnp.moveaxis(self.network(jnp.moveaxis(x, 0, -1)[None], jnp.zeros(1, x.dtype))[0], -1, 0)


def width_of(shape: tuple[int, int, int], weights: int) -> int:
    """With which the U-Net has as many weights as can be had."""

    def far(width: int) -> int:
        made = eqx.filter_eval_shape(lambda: Unet(jax.random.key(0), shape, width))
        return abs(sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(made)) - weights)

    return min(range(4, 129, 4), key=far)


LEARNED, STEP, FREE = "learned proximal", "gradient step", "free"


def networks_of(name: str, size: Size, key: Array) -> dict[str, Any]:
    keys = jax.random.split(key, 3)
    shape = (1, 28, 28) if name == "mnist" else (size.channels if name == "leaves" else 1, size.side, size.side)
    if name == "mnist":
        learned = mnist(keys[0], hidden=min(64, size.hidden))
    else:
        learned = image128(keys[0], channels=shape[0], side=size.side, hidden=size.hidden)
    width = width_of(shape, learned.parameters)
    return {
        LEARNED: learned,
        STEP: GradientStepDenoiser(Unet(keys[1], shape, width)),
        FREE: FreeDenoiser(Unet(keys[2], shape, width)),
    }


def trained(
    name: str, size: Size, seed: int, progress: bool, folder: Path | None, short: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The networks, and what their training took; with a folder, checkpoints lie there."""
    first, *keys = jax.random.split(jax.random.key(seed), 4)
    networks = networks_of(name, size, first)
    draw, tests = images_of(name, size)
    shape = next(iter(tests.values())).shape[1:]
    # Adam moves each weight by the rate, all of a unit upwards at first: twice this rate and 256 channels do not come back.
    rate = min(1e-2, 0.25 / size.hidden)
    schedule = (
        matching.our_images(shape, steps=size.steps, rate=rate)
        if short
        else matching.paper_images(shape, steps=size.steps)
    )
    plain = (matching.Stage(matching.squared, size.steps, matching.Cosine(1e-3)),)
    facts: dict[str, Any] = {}
    for (label, network), key in zip(list(networks.items()), keys, strict=True):
        start = time.perf_counter()
        checkpoint = None if folder is None else folder / f"{name}_{label.replace(' ', '_')}.checkpoint.npz"
        fresh = checkpoint is None or not checkpoint.exists()
        networks[label], info = training.train(
            key,
            network,
            draw,
            schedule if label == LEARNED else plain,
            sigma=size.sigma,
            batch=200 if name == "mnist" and size.batch == FULL.batch else size.batch,
            progress=progress,
            checkpoint=checkpoint,
        )
        facts[label] = {
            "weights": nets.parameters(networks[label]),
            "seconds": time.perf_counter() - start if fresh else None,  # of a run that was resumed not known
            "steps": info.steps,
            "stopped": info.stopped,
            "final loss": float(info.losses[-100:].mean()),
            "zeros": info.zeros,
            "kappa": [None if r is None else r.kappa for r in info.regimes],
        }
    return networks, facts


def runs_of(
    task: Task, norm: float, networks: dict[str, Any], tuned: float
) -> list[tuple[str, Any, float, float | None]]:
    """Prior, its map, ρ and λ."""
    safe = 1.05 * norm
    runs: list[tuple[str, Any, float, float | None]] = [
        ("total variation", TotalVariation(jnp.float32(tuned)), 1.0, None)
    ]
    runs += [(label, network, rho, None) for label, network in networks.items() for rho in (task.rho, safe)]
    prior = regularizer(networks[LEARNED], tolerance=1e-5)
    return [*runs, (LEARNED, prior, safe, task.rho / safe)]


def compared(
    name: str,
    networks: dict[str, Any],
    tests: dict[str, np.ndarray],
    size: Size,
    console: Console,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Rows of the table; `keep` gets those so far after each task."""
    shape = next(iter(tests.values())).shape[1:]
    found: dict[str, Any] = {}
    table = Table("images", "task", "prior", "ρ", "λ", "PSNR", "converged", "diverged", "certified", title="ADMM")
    for kind, clean in tests.items():
        tasks = list(tasks_of(name, shape).items())
        for label, task in tasks[:: len(tasks) - 1] if size.iterations == SMOKE.iterations else tasks:
            norm = float(adjoint.norm_bounds(task.operator, jax.random.key(0)).upper)
            tried = {
                w: restored(task, norm, TotalVariation(jnp.float32(w)), clean[:1], size, 1.0)["PSNR"] for w in WEIGHTS
            }
            tuned = max(tried, key=lambda w: -np.inf if tried[w] is None else tried[w])
            for prior, value, rho, lam in runs_of(task, norm, networks, tuned):
                ran = restored(task, norm, value, clean, size, rho, lam)
                weight = "" if lam is None else f", lam {lam:.3g}"
                found[f"{kind}, {label}, {prior}, rho {rho:.3g}{weight}"] = ran | {
                    "images": kind,
                    "task": label,
                    "prior": prior,
                }
                cells = ("–" if ran["PSNR"] is None else f"{ran['PSNR']:.2f}", f"{ran['converged']:.0%}")
                rest = (str(ran["diverged"]), "yes" if ran["certified"] else "no")
                table.add_row(kind, label, prior, f"{rho:.3g}", f"{ran['lam']:.3g}", *cells, *rest)
                console.print(f"{kind}, {label}, {prior}, ρ {rho:.3g}{weight}: {cells[0]} dB, {ran['seconds']:.1f} s")
            keep(found)
    console.print(table)
    return found


def targets(found: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """What the paper's comparison leads one to expect, of each set of images; means over the tasks, each prior at its best ρ."""
    rows = list(found.values())
    out: list[dict[str, Any]] = []

    def best(kind: str, task: str, prior: str, certified: bool = False) -> float:
        values = [
            row["PSNR"] if row["PSNR"] is not None else -np.inf
            for row in rows
            if (row["images"], row["task"], row["prior"]) == (kind, task, prior) and (row["certified"] or not certified)
        ]
        return max(values)

    def ahead(kind: str, other: str, certified: bool = False) -> float:
        tasks = dict.fromkeys(row["task"] for row in rows if row["images"] == kind)
        return float(np.mean([best(kind, t, LEARNED, certified) - best(kind, t, other) for t in tasks]))

    for kind in dict.fromkeys(row["images"] for row in rows):
        lost = sum(row["diverged"] for row in rows if row["images"] == kind and row["prior"] == LEARNED)
        for what, value, least in (
            ("dB ahead of the gradient step, at least -0.2", ahead(kind, STEP), -0.2),
            ("the same at certified settings", ahead(kind, STEP, True), -0.2),
            ("dB ahead of total variation, at least 1", ahead(kind, "total variation"), 1.0),
            ("that at certified settings", ahead(kind, "total variation", True), 1.0),
            ("runs of the learned network that diverged, none", lost, 0),
        ):
            met = value == 0 if least == 0 else value >= least
            out.append({"images": kind, "target": what, "value": value, "met": bool(met)})
    table = Table("images", "learned proximal network", "found", "met", title="Targets")
    for row in out:
        table.add_row(row["images"], row["target"], f"{row['value']:.2f}", "yes" if row["met"] else "no")
    console.print(table)
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", choices=("mnist", "leaves", "phantoms"), required=True)
    parser.add_argument("--steps", type=int, help="a multiple of 8")
    parser.add_argument("--short", action="store_true", help="our schedule, for fewer steps than the paper's 40 000")
    parser.add_argument("--side", type=int)
    parser.add_argument("--channels", type=int, choices=(1, 3), help="of leaves: grey or colour")
    parser.add_argument("--sigma", type=float, help="noise of the training; the paper has networks of 0.05 and 0.1")
    parser.add_argument("--tests", type=int, help="images to test on")
    parser.add_argument("--iterations", type=int, help="of ADMM, at most")
    parser.add_argument("--hidden", type=int, help="channels of the learned proximal network")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--smoke", action="store_true", help="tiny: whether it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args(arguments)
    size = SMOKE if given.smoke else FULL
    size = size._replace(**{k: v for k, v in vars(given).items() if k in Size._fields and v is not None})
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    # Found out before hours of training.
    _, tests = images_of(given.images, size)
    networks, facts = trained(
        given.images, size, given.seed, not given.smoke, None if given.smoke else given.out, given.short
    )
    weights.save(
        given.out / f"proximal_images_{given.images}.npz",
        networks["learned proximal"],
        command=" ".join(["python benchmarks/proximal_images.py", *(sys.argv[1:] if arguments is None else arguments)]),
        seed=given.seed,
        sigma=size.sigma,
        range=[0.0, 1.0],
        training=facts["learned proximal"],
    )
    noise = np.random.default_rng(1)
    denoising = {}
    for kind, clean in tests.items():
        seen = clean + size.sigma * noise.normal(size=clean.shape).astype(np.float32)
        for label, network in networks.items():
            denoising[f"{kind}, {label}"] = float(psnr(jax.vmap(network)(jnp.asarray(seen)), clean).mean())
    console.print_json(data={"training": facts, "denoising": denoising})
    result = about("jax", "equinox", "optax") | {"size": size._asdict(), "training": facts, "denoising": denoising}
    path = given.out / f"proximal_images_{given.images}.json"
    write_json(path, result)  # what the training gave is kept, should the rest be interrupted
    result["restored"] = compared(
        given.images, networks, tests, size, console, lambda found: write_json(path, result | {"restored": found})
    )
    result["targets"] = targets(result["restored"], console)
    write_json(path, result)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
