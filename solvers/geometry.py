"""Solids as cells of a grid: triangle meshes rasterised to masks, and solids that move.

A mesh is an array of vertices (points in space) and one of faces (three vertex numbers each).  A cell is inside where a line
from below to its centre goes through the surface an odd number of times.  Positions are in units of the spacing of the grid,
cell i reaching from i to i + 1 along its axis, unless told otherwise.

A solid that moves is a sequence of `Moved`, one per frame: the domain, and on each face of the grid the velocity at which a
solid there moves along the axis of the face.  `solvers.smoke` takes them as the velocity of its walls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from solvers.poisson import AIR, FLUID, SOLID, Domain

PAIRS = 1 << 20
"""So many crossings of triangles and columns are worked on at once, some 100 bytes each."""


# ---- meshes ------------------------------------------------------------------------------------------------------------


def rasterised(
    vertices: Float[np.ndarray, "vertices 3"] | Sequence[Any],
    faces: Int[np.ndarray, "faces 3"] | Sequence[Any],
    shape: tuple[int, int, int],
    *,
    origin: float | Sequence[float] = 0.0,
    spacing: float | Sequence[float] = 1.0,
) -> Bool[np.ndarray, "*grid"]:
    """The cells of a grid whose centres are inside a closed triangle mesh.

    shape    of the grid
    origin   its low corner: one number, or one per axis
    spacing  width of a cell: one number, or one per axis

    A centre on a surface counts as inside where the solid lies ahead along the axis, and as outside where it lies behind, so
    that solids that touch share no cell and leave none out.  Shells within each other are hollow; the order of a face's
    vertices does not matter.

    Surface and column meet by two interpolations, first along the edges of a triangle to the plane of the column, then along
    the segment between them.  What is found on an edge depends on the edge alone, not on the triangle, so that no line slips
    through between two triangles or counts both, whatever the rounding.

    Raises ValueError for wrong shapes, numbers that are not finite, faces that name no vertex or one twice, and a mesh that is
    not closed: one with an edge that is not in exactly two faces.
    """
    points, triangles = _mesh(vertices, faces)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: got {tuple(shape)}, expected three positive numbers of cells")
    low, width = (_per_axis(name, given) for name, given in (("origin", origin), ("spacing", spacing)))
    if (width <= 0).any():
        raise ValueError(f"spacing: got {spacing}, expected positive widths")
    centres = [o + h * (np.arange(n) + 0.5) for o, h, n in zip(low, width, shape, strict=True)]
    crossings = np.zeros(shape[0] * shape[1] * (shape[2] + 1), np.int8)
    for some in _chunks(points, triangles, centres):
        np.bitwise_xor.at(crossings, _crossed(points, some, centres), 1)
    return np.bitwise_xor.accumulate(crossings.reshape(*shape[:2], -1), axis=2)[..., :-1].astype(bool)


def _mesh(vertices: Any, faces: Any) -> tuple[np.ndarray, np.ndarray]:
    points, triangles = np.asarray(vertices, float), np.asarray(faces)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"vertices: has shape {points.shape}, expected (vertices, 3)")
    if not np.isfinite(points).all():
        raise ValueError("vertices: not all are finite")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or not np.issubdtype(triangles.dtype, np.integer):
        raise ValueError(
            f"faces: has shape {triangles.shape} and dtype {triangles.dtype}, expected (faces, 3) and integers"
        )
    if triangles.size and (triangles.min() < 0 or triangles.max() >= len(points)):
        raise ValueError(f"faces: has numbers {triangles.min()} to {triangles.max()}, expected 0 to {len(points) - 1}")
    # In one order, so that both triangles of an edge compute the same numbers on it.
    triangles = np.sort(triangles.astype(np.int64), axis=1)
    if twice := int((triangles[:, 1:] == triangles[:, :-1]).any(1).sum()):
        raise ValueError(f"faces: {twice} name a vertex twice, expected three different ones")
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [0, 2]], triangles[:, [1, 2]]])
    _, counts = np.unique(edges, axis=0, return_counts=True)
    if bad := int((counts != 2).sum()):
        raise ValueError(f"faces: the mesh is not closed, {bad} of {len(counts)} edges are not in exactly two faces")
    return points, triangles


def _per_axis(name: str, given: Any) -> np.ndarray:
    values = np.asarray(given, float)
    if values.shape not in ((), (3,)) or not np.isfinite(values).all():
        raise ValueError(f"{name}: got {given}, expected a finite number or one per axis")
    return np.broadcast_to(values, (3,))


def _chunks(points: np.ndarray, triangles: np.ndarray, centres: list[np.ndarray]) -> list[np.ndarray]:
    """The triangles in groups that meet at most about PAIRS columns, by their bounding boxes."""
    corners = [np.searchsorted(c, points[:, k])[triangles] for k, c in enumerate(centres[:2])]
    columns = np.prod([1 + r.max(1) - r.min(1) for r in corners], axis=0)
    ends = np.searchsorted(np.cumsum(columns), np.arange(PAIRS, columns.sum(), PAIRS))
    return np.split(triangles, np.unique(ends))


def _crossed(points: np.ndarray, triangles: np.ndarray, centres: list[np.ndarray]) -> np.ndarray:
    """Where lines along the last axis cross triangles: the flat number of the first cell whose centre is not below, in a grid
    with one more layer above."""
    x, y, z = centres
    behind = np.searchsorted(x, points[:, 0])[triangles]  # the planes before a vertex are those with smaller numbers
    triangle, plane = _spread(behind.min(1), behind.max(1))
    # In a plane that separates its vertices a triangle has two edges with an end on each side.
    before = behind[triangle] <= plane[:, None]
    alone = np.where(before.sum(1) == 1, before.argmax(1), (~before).argmax(1))  # the vertex both edges share
    ends = [_on_edge(points, triangles[triangle], alone, by, x[plane]) for by in (1, 2)]
    rows = np.stack([np.searchsorted(y, e[:, 0]) for e in ends])
    segment, column = _spread(rows.min(0), rows.max(0))
    (y1, z1), (y2, z2) = (e[segment].T for e in ends)
    height = z1 + (y[column] - y1) / (y2 - y1) * (z2 - z1)
    return (plane[segment] * len(y) + column) * (len(z) + 1) + np.searchsorted(z, height)


def _spread(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For all k and start[k] ≤ i < stop[k]: the k, and the i."""
    number = stop - start
    which = np.repeat(np.arange(len(number)), number)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number) + start[which]


def _on_edge(points: np.ndarray, triangles: np.ndarray, alone: np.ndarray, by: int, x: np.ndarray) -> np.ndarray:
    """(y, z) at x on the edge from a triangle's vertex `alone` to the one `by` places on."""
    pair = np.sort(np.stack([alone, (alone + by) % 3]), axis=0)
    a, b = (points[np.take_along_axis(triangles, k[:, None], 1)[:, 0]] for k in pair)
    share = (x - a[:, 0]) / (b[:, 0] - a[:, 0])
    return a[:, 1:] + share[:, None] * (b[:, 1:] - a[:, 1:])


def icosphere(subdivisions: int) -> tuple[Float[np.ndarray, "vertices 3"], Int[np.ndarray, "faces 3"]]:
    """A mesh of the unit sphere: an icosahedron with each face cut in four, so many times, its vertices on the sphere.
    Seen from outside the vertices of a face are in counterclockwise order."""
    if subdivisions < 0:
        raise ValueError(f"subdivisions: got {subdivisions}, expected 0 or more")
    golden = (1 + np.sqrt(5)) / 2
    rectangle = np.array([[0, i, j * golden] for i in (-1, 1) for j in (-1, 1)])
    points = np.concatenate([np.roll(rectangle, k, axis=1) for k in range(3)])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    near = np.isclose(distance, 2)
    i, j, k = np.nonzero(near[:, :, None] & near[:, None, :] & near[None, :, :])
    outwards = np.linalg.det(points[np.stack([i, j, k], axis=1)]) > 0
    triangles = np.stack([i, j, k], axis=1)[(i < j) & (i < k) & outwards]
    for _ in range(subdivisions):
        edges = np.sort(np.stack([triangles, np.roll(triangles, -1, axis=1)], axis=2), axis=2)
        pairs, middle = np.unique(edges.reshape(-1, 2), axis=0, return_inverse=True)
        middle = middle.reshape(-1, 3) + len(points)
        points = np.concatenate([points, points[pairs].mean(1)])
        outer = np.stack([triangles, middle, np.roll(middle, 1, axis=1)], axis=2).reshape(-1, 3)
        triangles = np.concatenate([outer, middle])
    return points / np.linalg.norm(points, axis=1, keepdims=True), triangles


def torus(
    minor: float = 0.35, segments: int = 48
) -> tuple[Float[np.ndarray, "vertices 3"], Int[np.ndarray, "faces 3"]]:
    """A mesh of a ring: a circle of radius 1 in the plane of the first two axes, as thick as a circle of radius `minor`."""
    if not 0 < minor < 1 or segments < 3:
        raise ValueError(f"minor, segments: got {minor}, {segments}, expected 0 < minor < 1 and at least 3 segments")
    angle = 2 * np.pi * np.arange(segments) / segments
    around, across = np.meshgrid(angle, angle, indexing="ij")
    out = 1 + minor * np.cos(across)
    points = np.stack([out * np.cos(around), out * np.sin(around), minor * np.sin(across)], axis=2).reshape(-1, 3)
    number = np.arange(segments**2).reshape(segments, segments)
    right, above = np.roll(number, -1, 0), np.roll(number, -1, 1)
    corner = np.roll(right, -1, 1)
    return points, np.concatenate(
        [np.stack(t, 2).reshape(-1, 3) for t in ((number, right, corner), (number, corner, above))]
    )


# ---- solids that move --------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """domain  where the solid is at one time
    walls   per axis the velocity of solids on the faces of the grid, which are one more than the cells along the axis: that
            of the moving solid on its own faces, zero elsewhere
    """

    domain: Domain
    walls: tuple[Float[np.ndarray, "*_"], ...]  # of one grid of faces each


def still(domain: Domain, frames: int) -> Iterator[Moved]:
    """A domain in which nothing moves, so many times."""
    walls = tuple(np.zeros([m + (k == axis) for k, m in enumerate(domain.shape)]) for axis in range(len(domain.shape)))
    return itertools.repeat(Moved(domain, walls), frames)


def moving_ball(
    n: int,
    frames: int,
    ndim: int = 3,
    *,
    radius: float = 0.12,
    path: float = 0.22,
    turns: float = 1.0,
    phase: float = 0.0,
    duration: float = 1.0,
    open_top: bool = True,
) -> Iterator[Moved]:
    """A ball that goes round in the middle of a box of n cells per axis, in the plane of the first and the last axis.

    radius, path  of the ball and of its way, as shares of the box
    turns, phase  how often it goes round in all frames, and where it starts, in turns
    duration      of all frames: velocities are in cells per unit of time
    open_top      air beyond the end of the last axis, instead of a wall
    """
    _frames(n, frames, ndim, duration)
    if not (radius > 0 and path >= 0 and radius + path < 0.5):
        raise ValueError(f"radius, path: got {radius}, {path}, expected a ball that stays inside the box")
    rate = 2 * np.pi * turns / duration

    def at(time: float) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
        turn = 2 * np.pi * phase + rate * time
        centre = np.full(ndim, n / 2)
        centre[[0, -1]] += path * n * np.array([np.cos(turn), np.sin(turn)])
        velocity = np.zeros(ndim)
        velocity[[0, -1]] = path * n * rate * np.array([-np.sin(turn), np.cos(turn)])
        inside = lambda *x: sum((a - c) ** 2 for a, c in zip(x, centre, strict=True)) < (radius * n) ** 2  # noqa: E731
        return inside, lambda axis, *x: np.full(x[0].shape, velocity[axis])

    return (_moved(n, ndim, *at(duration * k / frames), open_top) for k in range(frames))


def rotating_paddle(
    n: int,
    frames: int,
    ndim: int = 3,
    *,
    length: float = 0.6,
    thickness: float = 0.1,
    turns: float = 1.0,
    phase: float = 0.0,
    duration: float = 1.0,
    open_top: bool = True,
) -> Iterator[Moved]:
    """A bar that turns about the middle of a box of n cells per axis, in the plane of the first and the last axis.

    length, thickness  of the bar, as shares of the box; in three dimensions it is half as broad as long
    turns, phase       how often it turns in all frames, and where it starts, in turns
    duration           of all frames: velocities are in cells per unit of time
    open_top           air beyond the end of the last axis, instead of a wall
    """
    _frames(n, frames, ndim, duration)
    if not (0 < thickness <= length and np.hypot(length, thickness) < 1):
        raise ValueError(
            f"length, thickness: got {length}, {thickness}, expected 0 < thickness <= length, to turn in the box"
        )
    rate = 2 * np.pi * turns / duration

    def at(time: float) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
        turn = 2 * np.pi * phase + rate * time
        along, up = np.cos(turn), np.sin(turn)

        def inside(*x: np.ndarray) -> np.ndarray:
            a, b = x[0] - n / 2, x[-1] - n / 2
            bar = (abs(along * a + up * b) < length * n / 2) & (abs(along * b - up * a) < thickness * n / 2)
            return bar & (abs(x[1] - n / 2) < length * n / 4) if ndim == 3 else bar

        def velocity(axis: int, *x: np.ndarray) -> np.ndarray:
            if axis == 0:
                return -rate * (x[-1] - n / 2)
            return rate * (x[0] - n / 2) if axis == ndim - 1 else np.zeros(x[0].shape)

        return inside, velocity

    return (_moved(n, ndim, *at(duration * k / frames), open_top) for k in range(frames))


def _frames(n: int, frames: int, ndim: int, duration: float) -> None:
    if ndim not in (2, 3):
        raise ValueError(f"ndim: got {ndim}, expected 2 or 3")
    if n < 8 or frames < 1 or not duration > 0:
        raise ValueError(
            f"n, frames, duration: got {n}, {frames}, {duration}, expected n >= 8, frames >= 1, duration > 0"
        )


def _moved(
    n: int, ndim: int, inside: Callable[..., np.ndarray], velocity: Callable[..., np.ndarray], open_top: bool
) -> Moved:
    solid = inside(*_positions([n] * ndim, [0.5] * ndim))
    if not solid.any():
        raise ValueError(f"n: got {n}, expected more cells: the solid is so small that the centre of no cell is inside")
    walls = []
    for axis in range(ndim):
        x = _positions([n + (k == axis) for k in range(ndim)], [0.0 if k == axis else 0.5 for k in range(ndim)])
        padded = np.pad(solid, [(int(k == axis),) * 2 for k in range(ndim)])
        first, second = (np.moveaxis(np.moveaxis(padded, axis, 0)[s], 0, axis) for s in (slice(-1), slice(1, None)))
        walls.append(np.where(first | second, velocity(axis, *x), 0.0))
    edges = [(SOLID, SOLID)] * (ndim - 1) + [(SOLID, AIR if open_top else SOLID)]
    return Moved(Domain.from_mask(np.where(solid, SOLID, FLUID), edges=edges), tuple(walls))


def _positions(counts: list[int], offsets: list[float]) -> list[np.ndarray]:
    return list(np.meshgrid(*[np.arange(m) + o for m, o in zip(counts, offsets, strict=True)], indexing="ij"))
