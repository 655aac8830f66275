"""Domains and right-hand sides to try a solver on: a box, smoke around a ball, a breaking dam, random blobs, a ring made from
a mesh, a paddle that turns.

Every one is a function of the number of cells along an axis, so that the same shape can be had at any resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from solvers import geometry
from solvers.poisson import AIR, FLUID, SOLID, Domain


def _centres(n: int, ndim: int) -> list[np.ndarray]:
    """Coordinates of the cells in the unit cube."""
    return list(np.meshgrid(*[(np.arange(n) + 0.5) / n] * ndim, indexing="ij"))


def _ball(x: list[np.ndarray], centre: np.ndarray, radius: float) -> np.ndarray:
    return sum((a - c) ** 2 for a, c in zip(x, centre, strict=True)) < radius**2


def box(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Fluid in air on all sides: the problem that a sine transform solves."""
    return Domain.from_mask(np.full((n,) * ndim, FLUID), edges=AIR)


def smoke_sphere(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Walls, an open top, and a solid ball in the middle (seed 0) or somewhere (other seeds)."""
    cells = np.full((n,) * ndim, FLUID)
    rng = np.random.default_rng(seed)
    centre, radius = (np.full(ndim, 0.5), 0.18) if seed == 0 else (rng.uniform(0.3, 0.7, ndim), rng.uniform(0.1, 0.25))
    cells[_ball(_centres(n, ndim), centre, radius)] = SOLID
    return Domain.from_mask(cells, edges=[SOLID] * (ndim - 1) + [(SOLID, AIR)])


def dam_break(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Water with a wavy surface between walls, with air above and a solid column's worth of ball in it."""
    x = _centres(n, ndim)
    rng = np.random.default_rng(seed)
    phase = 0.0 if seed == 0 else rng.uniform(0, 2 * np.pi)
    surface = 0.35 + 0.1 * np.sin(3 * np.pi * x[0] + phase)
    if ndim == 3:
        surface = surface + 0.05 * np.cos(5 * np.pi * x[1] + phase)
    cells = np.where(x[-1] > surface, AIR, FLUID)
    ball = _ball(x[:2], np.array([0.6, 0.5]), 0.08) if ndim == 3 else _ball(x, np.array([0.6, 0.15]), 0.08)
    cells[ball & (cells == FLUID)] = SOLID
    return Domain.from_mask(cells)


def random_blobs(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Six solid and three airy balls at random, walls, and air behind the first axis."""
    x, rng = _centres(n, ndim), np.random.default_rng(seed)
    cells = np.full((n,) * ndim, FLUID)
    for count, low, high, code in ((6, 0.05, 0.14, SOLID), (3, 0.04, 0.10, AIR)):
        for _ in range(count):
            cells[_ball(x, rng.uniform(0.15, 0.85, ndim), rng.uniform(low, high))] = code
    return Domain.from_mask(cells, edges=[(SOLID, AIR)] + [SOLID] * (ndim - 1))


def mesh_torus(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Walls, an open top, and a solid ring, a mesh of triangles; tilted a little (seed 0) or at random.  In two dimensions the
    cut through its axis."""
    rng = np.random.default_rng(seed)
    tilt, turn = (0.5, 0.0) if seed == 0 else rng.uniform(0, np.pi, 2)
    vertices, faces = geometry.torus()
    for first, second, angle in ((2, 0, tilt), (0, 1, turn if ndim == 3 else 0.0)):
        a, b = vertices[:, first].copy(), vertices[:, second].copy()
        vertices[:, first], vertices[:, second] = (
            np.cos(angle) * a - np.sin(angle) * b,
            np.sin(angle) * a + np.cos(angle) * b,
        )
    shape, low = ((n, n, n), (-0.5,) * 3) if ndim == 3 else ((n, 1, n), (-0.5, -0.5 / n, -0.5))
    solid = geometry.rasterised(0.25 * vertices, faces, shape, origin=low, spacing=1 / n)
    cells = np.where(solid if ndim == 3 else solid[:, 0], SOLID, FLUID)
    return Domain.from_mask(cells, edges=[SOLID] * (ndim - 1) + [(SOLID, AIR)])


def paddle(n: int, ndim: int = 3, seed: int = 0) -> Domain:
    """Walls, an open top, and a solid bar that turns about the middle: the seed is the time, one turn takes 16."""
    return next(geometry.rotating_paddle(n, 1, ndim, phase=seed / 16)).domain


DOMAINS: dict[str, Callable[..., Domain]] = {
    "box": box,
    "smoke_sphere": smoke_sphere,
    "dam_break": dam_break,
    "random_blobs": random_blobs,
    "mesh_torus": mesh_torus,
    "paddle": paddle,
}


def plume(domain: Domain, seed: int = 0) -> Float[np.ndarray, "*grid"]:
    """A right-hand side of unit norm on all scales: a warm spot, six random cosine modes, and a tenth of white noise."""
    shape, rng = domain.shape, np.random.default_rng(seed)
    x = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    spot = (0.5, 0.4, 0.2)[: len(shape)]
    b = np.exp(-sum((a - c) ** 2 for a, c in zip(x, spot, strict=True)) / 0.02)
    for _ in range(6):
        modes = rng.integers(1, max(2, min(shape) // 6), len(shape))
        waves = [np.cos(np.pi * k * a + rng.uniform(0, 6)) for k, a in zip(modes, x, strict=True)]
        b = b + 0.3 * np.prod(waves, axis=0)
    b = np.where(np.asarray(domain.fluid), b + 0.1 * rng.standard_normal(shape), 0)
    return b / np.linalg.norm(b)
