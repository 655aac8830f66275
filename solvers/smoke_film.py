"""Pictures and films of smoke that rises around solids.

python -m solvers.smoke_film --cells 64 --dimensions 3 --frames 120 --out FOLDER
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import Progress, TextColumn

from solvers import array_files, geometry
from solvers.poisson import SOLID
from solvers.smoke import DT, State, rest, run, warm_spot

SOLIDS = ("still", "ball", "paddle")
COLOURS = "bone"

# ---- pictures ----------------------------------------------------------------------------------------------------------


def rendered(
    density: Float[np.ndarray, "*grid"], solid: Bool[np.ndarray, "*grid"]
) -> Float[np.ndarray, "height width"]:
    """How bright smoke and solids look, 0 to 1, rows from top to bottom.

    In three dimensions one looks along the second axis, and light comes from the left, along the first; smoke weakens both,
    solids stop the one and weaken the other.
    """
    fine = max(1, round(128 / density.shape[0]))
    soft = scipy.ndimage.gaussian_filter(np.asarray(solid, np.float32), 1.0, mode="nearest")
    smoke, body = (
        scipy.ndimage.zoom(np.asarray(x, np.float32), fine, order=1, mode="nearest", grid_mode=True)
        for x in (density, soft)
    )
    body = np.clip(3 * body - 1, 0, 1)
    if smoke.ndim == 2:
        return np.clip(0.95 * smoke * (1 - body) + 0.35 * body, 0, 1).T[::-1]
    cell = 64 / smoke.shape[1]  # in 64ths of the depth: a picture looks alike at all resolutions
    depth = cell * (0.22 * smoke + 4.0 * body)
    seen = np.exp(depth - np.cumsum(depth, axis=1)) * (1 - np.exp(-depth))
    lit = np.exp(-0.5 * cell * np.cumsum(0.22 * smoke + 0.4 * body, axis=0))
    light = 1.15 * (0.15 + lit) * np.where(body > 0.02, 0.5, 1.0)
    return np.clip((light * seen).sum(1), 0, 1).T[::-1]


def figure(images: Sequence[np.ndarray], titles: Sequence[str]) -> Any:
    """A matplotlib Figure of pictures side by side, of brightnesses 0 to 255."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(2.2 * len(images), 2.45), layout="constrained")
    for axes, image, title in zip(np.atleast_1d(found.subplots(1, len(images))), images, titles, strict=True):
        axes.imshow(image, cmap=COLOURS, vmin=0, vmax=255, interpolation="bicubic")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return found


def gif(images: Sequence[np.ndarray], width: int = 200, milliseconds: int = 60) -> bytes:
    """An animation of such pictures, in 64 colours."""
    import matplotlib
    from PIL import Image

    colours = (matplotlib.colormaps[COLOURS](np.linspace(0, 1, 64))[:, :3] * 255).astype(np.uint8)
    frames = []
    for image in images:
        size = width, width * image.shape[0] // image.shape[1]
        frame = Image.fromarray(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) // 4)
        frame.putpalette(colours.tobytes())
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file.getvalue()


# ---- the command -------------------------------------------------------------------------------------------------------


def places(cells: int, dimensions: int, frames: int, solids: str) -> Iterator[geometry.Moved]:
    """A ball that rests in the middle ("still"), one that goes round twice ("ball"), or a paddle that turns twice ("paddle")."""
    if solids == "still":
        return geometry.still(next(geometry.moving_ball(cells, 1, dimensions, path=0.0)).domain, frames)
    if solids not in SOLIDS:
        raise ValueError(f"solids: got {solids!r}, expected one of {SOLIDS}")
    make = geometry.moving_ball if solids == "ball" else geometry.rotating_paddle
    return make(cells, frames, dimensions, turns=2.0, duration=frames * DT)


def film(
    folder: Path,
    *,
    cells: int,
    dimensions: int,
    frames: int,
    solids: str = "still",
    seed: int = 0,
    every: int = 10,
    console: Console | None = None,
) -> tuple[Path, Path]:
    """Run, render, and write `smoke.png` and `smoke.gif` into a folder; the paths of both.

    After each `every` frames the state is written there too: the same call goes on from it after an interruption, and ends
    with the same files.

    Raises ValueError if the folder holds the state of another run, ImportError without matplotlib, and what `run` raises.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:  # before the work, not after it
        raise ImportError("film: pictures are drawn with matplotlib; pip install 'proofstone[bench]'") from error
    first = next(places(cells, dimensions, frames, solids)).domain
    scene, state = warm_spot(first, seed), rest(first)
    setting: dict[str, Any] = dict(cells=cells, dimensions=dimensions, frames=frames, solids=solids, seed=seed)
    setting["dtype"] = str(state.density.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "state.npz"
    state, images = _resumed(checkpoint, setting, state)
    left = itertools.islice(places(cells, dimensions, frames, solids), len(images), None)
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[said]}"), console=console) as bar:
        task = bar.add_task("smoke", total=frames, completed=len(images), said="")
        for domain, now, info in run(left, scene, state=state):
            bright = rendered(np.asarray(now.density), np.asarray(domain.cells) == SOLID)
            images.append(np.round(255 * bright).astype(np.uint8))
            bar.update(task, completed=len(images), said=f"{int(info.solve.steps)} iterations")
            if len(images) % every == 0 or len(images) == frames:
                array_files.write(checkpoint, {"film": setting}, now, images=np.stack(images))
    shown = np.unique(np.linspace(0, frames - 1, 6).astype(int)[1:])
    file = io.BytesIO()
    figure([images[k] for k in shown], [f"frame {k + 1}" for k in shown]).savefig(file, format="png", dpi=100)
    made = folder / "smoke.png", folder / "smoke.gif"
    _write(made[0], file.getvalue())
    _write(made[1], gif(images[:: 1 + frames // 90]))
    return made


def _resumed(path: Path, setting: dict[str, Any], fresh: State) -> tuple[State, list[np.ndarray]]:
    if not path.exists():
        return fresh, []
    header, arrays = array_files.read(path, "film", "film")
    if header["film"] != setting:
        raise ValueError(f"film: {path} is of a run with {header['film']}, expected {setting}; give another folder")
    images = list(arrays.pop("images"))
    return array_files.restored(path, "film", arrays, fresh), images


def _write(path: Path, content: bytes) -> None:
    """To a temporary file first: a reader finds the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Smoke rises around solids: a picture and an animation.")
    parser.add_argument("--cells", type=int, default=64, help="per axis")
    parser.add_argument("--dimensions", type=int, default=3, choices=[2, 3])
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--solids", choices=SOLIDS, default="still", help="a ball that rests or moves, or a paddle")
    parser.add_argument("--seed", type=int, default=0, help="of the source")
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder; the same command goes on after an interruption"
    )
    given = vars(parser.parse_args())
    console = Console()
    try:
        made = film(given.pop("out"), **given, console=console)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last state written") from None
    console.print("written:", *map(str, made))


if __name__ == "__main__":
    main()
