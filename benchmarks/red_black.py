"""The compiled classical solver of the Poisson benchmark: `red_black.c`, built with the system's C compiler."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from solvers import multigrid
from solvers.stencil import Stencil, shifted

SOURCE = Path(__file__).with_name("red_black.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


class _Level(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_long * 3),
        ("s", ctypes.c_long * 2),
        ("w", ctypes.c_void_p * 3),
        *[(name, ctypes.c_void_p) for name in ("inverse", "diagonal", "x", "r")],
    ]


@cache
def library() -> ctypes.CDLL:
    """Raises RuntimeError if there is no C compiler ($CC, cc) or it fails."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("red_black: no C compiler; install one or set CC")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "red_black.so"
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(target), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"red_black: {compiler} failed:\n{done.stderr}")
        found = ctypes.CDLL(str(target))  # stays loaded when the file is gone
    found.solve.restype = ctypes.c_long
    return found


_hierarchy = jax.jit(lambda a: multigrid.hierarchy(a, jnp.float64))


def solver(a: Stencil) -> tuple[Callable[[np.ndarray, float], tuple[np.ndarray, int, np.ndarray]], int]:
    """What solves A x = b, (b, rtol) -> (x, iterations, residuals), and the bytes that it keeps.

    The levels are those of `multigrid.hierarchy` in float64.
    """
    h = _hierarchy(a)
    kept: list[np.ndarray] = []

    def padded(x: np.ndarray, dtype: type) -> np.ndarray:
        kept.append(np.pad(np.asarray(x), 1).astype(dtype))
        return kept[-1]

    levels = (_Level * len(h.levels))()
    for entry, level in zip(levels, h.levels, strict=True):
        d = np.asarray(level.diagonal, float)
        mask = level.unknown.astype(jnp.float64)
        links = level.links or [k * mask * shifted(mask, axis, 1) for axis, k in enumerate(level.stiffness)]
        entry.n[:] = level.shape
        entry.s[:] = [(level.shape[1] + 2) * (level.shape[2] + 2), level.shape[2] + 2]
        entry.w[:] = [padded(w, np.float32).ctypes.data for w in links]
        entry.inverse = padded(np.where(d > 0, 1 / np.where(d > 0, d, 1), 0), np.float32).ctypes.data
        entry.diagonal = padded(d, np.float32).ctypes.data
        if level is not h.levels[0]:
            entry.x, entry.r = (padded(0 * d, np.float64).ctypes.data for _ in range(2))
    dense = np.ascontiguousarray(h.inverse, np.float64)
    x, r, z, p, q = (padded(np.zeros(a.shape), np.float64) for _ in range(5))
    inner = tuple(slice(1, -1) for _ in a.shape)
    history = np.zeros(1000)

    def solve(b: np.ndarray, rtol: float, alive: list[np.ndarray] = kept) -> tuple[np.ndarray, int, np.ndarray]:
        del alive  # the arrays that the levels point to live as long as this function
        x[:] = 0
        r[inner] = b
        pointers = (ctypes.c_void_p(v.ctypes.data) for v in (dense, x, r, z, p, q))
        steps = library().solve(
            levels, len(h.levels), *pointers, ctypes.c_double(rtol), len(history), ctypes.c_void_p(history.ctypes.data)
        )
        return x[inner].copy(), int(steps), history[:steps].copy()

    return solve, sum(v.nbytes for v in kept)
