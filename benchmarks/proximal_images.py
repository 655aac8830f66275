"""Learned proximal networks on large images, for a GPU: training, and plug-and-play against other denoisers.

    [PROOFSTONE_DATA=FOLDER] python benchmarks/proximal_images.py --images {mnist,leaves,phantoms} [--steps STEPS] [--out FOLDER]
    python benchmarks/proximal_images.py --images leaves --smoke

mnist     the paper's network for 28 x 28, 317 056 parameters; needs PROOFSTONE_DATA.  Deblurring
leaves    grey images of discs that cover each other, radii with density r⁻³ (dead leaves), made at every step; tested on more
          of them and, with PROOFSTONE_DATA, on the photographs of images_gray.npz.  Deblurring
phantoms  slices of ellipses, made at every step.  Tomography and compressed sensing

The schedule is the paper's (`paper_images`), 40 000 steps; networks of 7 million parameters (`image128`).  Beside it, trained for
as many steps with the squared error: a gradient-step and a free denoiser; and total variation, its weight chosen from several by
the PSNR on the first image.  Each runs in plug-and-play ADMM with the paper's ρ and with one above L_h, for which it converges.
Prints a table of PSNR, of runs that converged, and of what is certified; writes proximal_images_NAME.json.

--smoke  16 x 16, eight channels, a few steps, two of the tasks: whether it runs
"""

import argparse
import os
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

from generative import data
from solvers import adjoint, imaging, plug_and_play, tomography
from solvers.proximal import matching, training, weights
from solvers.proximal.baselines import TotalVariation
from solvers.proximal.denoisers import FreeDenoiser, GradientStepDenoiser
from solvers.proximal.network import image128, mnist

SIGMA = 0.1


class Size(NamedTuple):
    """side of the images, channels of the networks, batch, steps, test images, most iterations"""

    side: int
    hidden: int
    batch: int
    steps: int
    tests: int
    iterations: int


FULL, SMOKE = Size(128, 256, 64, 40_000, 20, 200), Size(16, 8, 4, 8, 2, 5)

# ---- images -------------------------------------------------------------------------------------------------------------


class Leaves(eqx.Module):
    """(key, count) -> grey images (count, 1, side, side) in [0, 1] of discs that cover each other."""

    side: int = eqx.field(static=True)
    discs: int = eqx.field(static=True, default=300)

    def __call__(self, key: Array, count: int) -> Float[Array, "count 1 side side"]:
        return jax.vmap(self.one)(jax.random.split(key, count))

    def one(self, key: Array) -> Float[Array, "1 side side"]:
        places, sizes, greys = jax.random.split(key, 3)
        points = (jnp.arange(self.side) + 0.5) / self.side
        centres = jax.random.uniform(places, (self.discs, 2), minval=-0.2, maxval=1.2)
        low, high = 1.5 / self.side, 0.4
        # Density r⁻³ between the two, by the inverse of its distribution function.
        u = jax.random.uniform(sizes, (self.discs,))
        radii = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
        greys = jax.random.uniform(greys, (self.discs + 1,))

        def cover(image: Array, disc: tuple[Array, Array, Array]) -> tuple[Array, None]:
            centre, radius, grey = disc
            far = (points[:, None] - centre[0]) ** 2 + (points - centre[1]) ** 2
            return jnp.where(far < radius**2, grey, image), None

        start = jnp.full((self.side, self.side), greys[-1])
        return jax.lax.scan(cover, start, (centres, radii, greys[:-1]))[0][None]


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
    draw = Leaves(size.side) if name == "leaves" else Phantoms(size.side)
    tests = {name: np.asarray(draw(jax.random.key(10_000), size.tests))}
    real = photographs(size.side) if name == "leaves" else None
    return draw, tests if real is None else tests | {"photographs": real[: size.tests]}


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
                blur = imaging.blur(imaging.gaussian_kernel(None, width, jnp.float32), shape, "circular")
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
    operator: Any, b: Array, prior: Any, start: Array, norm: Array, rho: Array, iterations: int
) -> tuple[Array, Array]:
    term = imaging.LeastSquares(operator, b, norm_squared=norm)
    x, info = plug_and_play.admm(term, prior, start, rho=rho, tolerance=1e-5, max_steps=iterations)
    return x, info.converged


def restored(task: Task, norm: float, prior: Any, clean: np.ndarray, rho: float, size: Size) -> dict[str, Any]:
    """All images by ADMM, one after the other; norm is ‖AᵀA‖ or a bound of it."""
    noise = np.random.default_rng(0).normal(size=(len(clean), *task.operator.shape_out)).astype(np.float32)
    known: list[plug_and_play.Certificate] = []
    numbers = jnp.asarray(norm, jnp.float32), jnp.asarray(rho, jnp.float32)

    images, converged = [], []
    for x, v in zip(clean, noise, strict=True):
        b = task.operator(jnp.asarray(x)) + task.noise * jnp.asarray(v)
        if not known:
            term = imaging.LeastSquares(task.operator, b, norm_squared=norm)
            known.append(plug_and_play.certificate("admm", term, prior, step=rho))
        found, fine = _admm(task.operator, b, prior, task.start(b), *numbers, size.iterations)
        images.append(found)
        converged.append(bool(fine))
    values = psnr(jnp.stack(images), clean)
    finite = np.isfinite(values)
    return {
        "rho": rho,
        "PSNR": float(values[finite].mean()) if finite.any() else None,
        "diverged": int((~finite).sum()),
        "converged": float(np.mean(converged)),
        "certified": known[0].holds,
    }


# ---- the run ------------------------------------------------------------------------------------------------------------


def trained(
    name: str, size: Size, seed: int, progress: bool, folder: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The networks, and what their training took; with a folder, checkpoints lie there."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shape = (1, 28, 28) if name == "mnist" else (1, size.side, size.side)
    learned = mnist(keys[0], hidden=min(64, size.hidden)) if name == "mnist" else None
    networks: dict[str, Any] = {
        "learned proximal": learned or image128(keys[0], channels=1, side=size.side, hidden=size.hidden),
        "gradient step": GradientStepDenoiser.create(keys[1], shape, hidden=min(64, size.hidden), layers=8),
        "free": FreeDenoiser.create(keys[2], shape, hidden=min(64, size.hidden), layers=8),
    }
    draw, _ = images_of(name, size)
    plain = (matching.Stage(matching.squared, size.steps, matching.Cosine(1e-3)),)
    facts: dict[str, Any] = {}
    for number, (label, network) in enumerate(networks.items()):
        start = time.perf_counter()
        networks[label], info = training.train(
            keys[3 + number],
            network,
            draw,
            matching.paper_images(shape, steps=size.steps) if number == 0 else plain,
            sigma=SIGMA,
            batch=200 if name == "mnist" and size is FULL else size.batch,
            progress=progress,
            checkpoint=None if folder is None else folder / f"{name}_{label.replace(' ', '_')}.checkpoint.npz",
        )
        facts[label] = {
            "seconds": time.perf_counter() - start,
            "steps": info.steps,
            "stopped": info.stopped,
            "final loss": float(info.losses[-100:].mean()),
            "zeros": info.zeros,
            "kappa": [None if r is None else r.kappa for r in info.regimes],
        }
    return networks, facts


def compared(
    name: str, networks: dict[str, Any], tests: dict[str, np.ndarray], size: Size, console: Console
) -> dict[str, Any]:
    shape = next(iter(tests.values())).shape[1:]
    found: dict[str, Any] = {}
    table = Table("images", "task", "prior", "ρ", "PSNR", "converged", "certified", title="Plug-and-play ADMM")
    for kind, clean in tests.items():
        tasks = list(tasks_of(name, shape).items())
        for label, task in tasks[:: len(tasks) - 1] if size.iterations == SMOKE.iterations else tasks:
            first = clean[:1]
            norm = float(adjoint.norm_bounds(task.operator, jax.random.key(0)).upper)
            tuned = max(
                (0.3, 0.1, 0.03, 0.01, 0.003),
                key=lambda w: restored(task, norm, TotalVariation(jnp.float32(w)), first, 1.0, size)["PSNR"] or -np.inf,
            )
            runs = {("total variation", 1.0): TotalVariation(jnp.float32(tuned))}
            for network, value in networks.items():
                runs |= {(network, task.rho): value, (network, 1.05 * norm): value}
            for (prior, rho), value in runs.items():
                ran = restored(task, norm, value, clean, rho, size)
                found[f"{kind}, {label}, {prior}, rho {rho:.3g}"] = ran
                decibels = "–" if ran["PSNR"] is None else f"{ran['PSNR']:.2f}"
                table.add_row(
                    kind,
                    label,
                    prior,
                    f"{rho:.3g}",
                    decibels,
                    f"{ran['converged']:.0%}",
                    "yes" if ran["certified"] else "no",
                )
    console.print(table)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", choices=("mnist", "leaves", "phantoms"), required=True)
    parser.add_argument("--steps", type=int, help="a multiple of 8")
    parser.add_argument("--side", type=int)
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
    networks, facts = trained(given.images, size, given.seed, not given.smoke, None if given.smoke else given.out)
    weights.save(
        given.out / f"proximal_images_{given.images}.npz",
        networks["learned proximal"],
        command=f"python benchmarks/proximal_images.py --images {given.images} --steps {size.steps}",
        seed=given.seed,
        sigma=SIGMA,
        range=[0.0, 1.0],
        training=facts["learned proximal"],
    )
    noise = np.random.default_rng(1)
    denoising = {}
    for kind, clean in tests.items():
        seen = clean + SIGMA * noise.normal(size=clean.shape).astype(np.float32)
        for label, network in networks.items():
            denoising[f"{kind}, {label}"] = float(psnr(jax.vmap(network)(jnp.asarray(seen)), clean).mean())
    console.print_json(data={"training": facts, "denoising": denoising})
    result = about("jax", "equinox", "optax") | {"size": size._asdict(), "training": facts, "denoising": denoising}
    result["restored"] = compared(given.images, networks, tests, size, console)
    write_json(given.out / f"proximal_images_{given.images}.json", result)


if __name__ == "__main__":
    main()
