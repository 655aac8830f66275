"""Grids of images as PNG files, without a plotting library: what a training writes while it runs."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8


def grid(
    images: Float[np.ndarray | jax.Array, "n height width *colour"], *, columns: int | None = None, magnified: int = 1
) -> UInt8[np.ndarray, "rows width_of_all *colour"]:
    """Images in [0, 1] side by side, one grey pixel between them; what lies outside [0, 1] is cut off.

    columns    by default about as many as rows
    magnified  pixels of the grid to each of an image
    Raises ValueError for entries that are not finite.
    """
    x = np.asarray(images)
    if not np.isfinite(x).all():
        raise ValueError(f"grid: {int((~np.isfinite(x)).sum())} entries of images are not finite, expected none")
    count, height, width = x.shape[:3]
    columns = max(1, round(np.sqrt(count))) if columns is None else columns
    rows = -(-count // columns)
    step_down, step_right = height + 1, width + 1
    out = np.full((rows * step_down - 1, columns * step_right - 1, *x.shape[3:]), 128, np.uint8)
    for i, image in enumerate(np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)):
        top, left = i // columns * step_down, i % columns * step_right
        out[top : top + height, left : left + width] = image
    return out.repeat(magnified, 0).repeat(magnified, 1)


def write_png(
    path: str | os.PathLike[str],
    images: Float[np.ndarray | jax.Array, "n height width *colour"],
    *,
    columns: int | None = None,
    magnified: int = 2,
) -> None:
    """The `grid` of images as a PNG file, grey or, with three colours last, RGB; written whole or not at all."""
    pixels = grid(images, columns=columns, magnified=magnified)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
        raise ValueError(f"write_png: images has {pixels.shape[2]} colours, expected 1 or 3")
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_png(pixels))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _png(pixels: np.ndarray) -> bytes:
    """The PNG specification's smallest file: a header, the rows each after a byte 0 (no filter), an end."""
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 and pixels.shape[2] == 3 else 0
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + part(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + part(b"IEND", b"")
    )
