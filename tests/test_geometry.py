"""Rasterised meshes against formulas and a test of each centre by itself; solids that move: rigid, tight, and solvable."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import gallery, geometry, poisson
from solvers.poisson import SOLID

pytestmark = pytest.mark.usefixtures("quick_compilation")


def box_mesh(low, high):
    """Twelve triangles."""
    corners = np.array([[(low, high)[i >> k & 1][k] for k in range(3)] for i in range(8)], float)
    squares = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    return corners, np.array([t for a, b, c, d in squares for t in ((a, b, c), (a, c, d))])


def turned(points, seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return points @ q


def solid_angle(points, triangles, at):
    """The share of the sphere that a mesh covers as seen from points (Van Oosterom and Strackee 1983): 1 inside, 0 outside, up
    to sign, for triangles of one orientation."""
    a, b, c = (points[triangles[:, k]][None] - at[:, None] for k in range(3))
    lengths = [np.linalg.norm(v, axis=2) for v in (a, b, c)]
    top = np.einsum("ijk,ijk->ij", a, np.cross(b, c))
    dots = [np.einsum("ijk,ijk->ij", u, v) for u, v in ((a, b), (b, c), (c, a))]
    bottom = lengths[0] * lengths[1] * lengths[2]
    bottom += dots[0] * lengths[2] + dots[1] * lengths[0] + dots[2] * lengths[1]
    return np.arctan2(top, bottom).sum(1) / (2 * np.pi)


# ---- meshes ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-8, 40), st.integers(-8, 40)), min_size=3, max_size=3))
def test_a_box_has_the_cells_whose_centres_it_holds(sides):
    """Sides at quarters of cells: centres on a lower side are inside, on an upper one outside, and nothing gets lost where
    lines meet edges and corners."""
    low, high = (np.array(s) / 4 for s in zip(*(sorted(s) for s in sides), strict=True))
    shape = (7, 8, 9)
    x = np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij")
    expected = np.all([(a >= lo) & (a < hi) for a, lo, hi in zip(x, low, high, strict=True)], axis=0)
    np.testing.assert_array_equal(geometry.rasterised(*box_mesh(low, high), shape), expected)


@pytest.mark.parametrize("mesh", [geometry.icosphere(2), geometry.torus(0.4, 12)], ids=["sphere", "torus"])
@pytest.mark.parametrize("seed", range(3))
def test_inside_is_where_the_surface_is_seen_all_around(mesh, seed):
    points, triangles = mesh
    points = turned(points, seed) * 0.7 + 0.05
    shape, low, width = (14, 11, 12), (-1.0, -0.9, -1.1), (0.15, 0.17, 0.2)
    x = np.meshgrid(*[o + h * (np.arange(n) + 0.5) for n, o, h in zip(shape, low, width, strict=True)], indexing="ij")
    share = np.abs(solid_angle(points, triangles, np.stack(x, -1).reshape(-1, 3))).reshape(shape)
    assert (np.abs(share - 0.5) > 0.49).all() and (share > 0.5).sum() > 100  # no centre is on the surface
    np.testing.assert_array_equal(geometry.rasterised(points, triangles, shape, origin=low, spacing=width), share > 0.5)


@settings(max_examples=30)
@given(
    shift=st.tuples(*[st.integers(-5, 5)] * 3),
    seed=st.integers(0, 1000),
    size=st.floats(0.5, 4.0),
    sphere=st.booleans(),
)
def test_a_mesh_moved_by_whole_cells_moves_its_mask(shift, seed, size, sphere):
    points, triangles = geometry.icosphere(1) if sphere else geometry.torus(0.5, 8)
    points = turned(points, seed) * size + 10
    mask = geometry.rasterised(points, triangles, (20, 20, 20))
    moved = geometry.rasterised(points + np.array(shift), triangles, (20, 20, 20))
    np.testing.assert_array_equal(moved, np.roll(mask, shift, (0, 1, 2)))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(4, 40))
def test_meshes_on_a_lattice_where_lines_meet_vertices_and_edges(seed, count):
    """Random tetrahedra whose corners are centres of cells: together the pieces of a cut solid have each of its cells once."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 9, (5, 3)) + 0.5
    corners[4] = corners[:4].mean(0)  # inside
    tetrahedron = np.array([(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)])
    whole = geometry.rasterised(corners, tetrahedron, (9, 9, 9)).astype(int)
    parts = [
        geometry.rasterised(corners, np.where(tetrahedron == k, 4, tetrahedron), (9, 9, 9)).astype(int)
        for k in range(4)
    ]
    np.testing.assert_array_equal(np.sum(parts, axis=0) % 2, whole)


def test_the_volume_of_a_ball(monkeypatch):
    errors = []
    for subdivisions, n in ((2, 16), (3, 32), (4, 64)):
        points, triangles = geometry.icosphere(subdivisions)
        mask = geometry.rasterised(0.4 * points, triangles, (n, n, n), origin=-0.5, spacing=1 / n)
        errors.append(abs(mask.sum() / n**3 / (4 / 3 * np.pi * 0.4**3) - 1))
    # The mesh lacks 0.0115 · 4^(2-k) of its volume beyond what the cells of the surface round to.
    assert errors[0] < 0.05 and errors[1] < 0.015 and errors[2] < 0.005, errors
    monkeypatch.setattr(geometry, "PAIRS", 50)
    np.testing.assert_array_equal(
        geometry.rasterised(0.4 * points, triangles, (n, n, n), origin=-0.5, spacing=1 / n), mask
    )


def test_a_shell_within_a_shell_is_hollow():
    points, triangles = geometry.icosphere(2)
    both = np.concatenate([points * 8, points * 4]) + 10, np.concatenate([triangles, triangles + len(points)])
    outer, inner = (geometry.rasterised(points * r + 10, triangles, (20, 20, 20)) for r in (8, 4))
    np.testing.assert_array_equal(geometry.rasterised(*both, (20, 20, 20)), outer & ~inner)


def test_meshes_are_closed_and_of_the_size_they_say():
    for subdivisions in range(3):
        points, triangles = geometry.icosphere(subdivisions)
        assert (
            triangles.shape == (20 * 4**subdivisions, 3) and len(points) == 2 + len(triangles) // 2
        )  # Euler: a sphere
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    points, triangles = geometry.torus(0.3, 20)
    assert len(points) == len(triangles) // 2  # Euler: a ring
    np.testing.assert_allclose((np.hypot(points[:, 0], points[:, 1]) - 1) ** 2 + points[:, 2] ** 2, 0.3**2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, f: (v, f[1:]), r"faces: the mesh is not closed, 3 of 30 edges"),
        (lambda v, f: (v, np.concatenate([f, f[:1]])), r"not closed, 3 of 30 edges"),
        (lambda v, f: (v, np.where(f == f[0, 0], f[0, 1], f)), r"faces: \d+ name a vertex twice"),
        (lambda v, f: (np.where(v > 0.8, np.nan, v), f), r"vertices: not all are finite"),
        (lambda v, f: (v[:, :2], f), r"vertices: has shape \(12, 2\), expected \(vertices, 3\)"),
        (lambda v, f: (v, f.astype(float)), r"faces: has shape \(20, 3\) and dtype float64, expected .* integers"),
        (lambda v, f: (v, f[:, :2]), r"faces: has shape \(20, 2\)"),
        (lambda v, f: (v[:-1], f), r"faces: has numbers 0 to 11, expected 0 to 10"),
    ],
)
def test_bad_meshes(change, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        geometry.rasterised(*change(*geometry.icosphere(0)), (4, 4, 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(shape=(4, 4)), r"shape: got \(4, 4\), expected three"),
        (dict(shape=(4, 4, 0)), r"shape: got \(4, 4, 0\)"),
        (dict(shape=(4, 4, 4), spacing=0.0), r"spacing: got 0.0, expected positive"),
        (
            dict(shape=(4, 4, 4), origin=(0.0, 1.0)),
            r"origin: got \(0.0, 1.0\), expected a finite number or one per axis",
        ),
    ],
)
def test_bad_grids(given, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        geometry.rasterised(*geometry.icosphere(0), **given)


# ---- solids that move --------------------------------------------------------------------------------------------------

MOVING = {"ball": geometry.moving_ball, "paddle": geometry.rotating_paddle}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", MOVING)
def test_a_rigid_solid_pushes_as_much_air_as_it_leaves_room(name, ndim):
    """The flux through its staircase of faces is zero to rounding at every moment, so that closed boxes are solvable."""
    for domain, walls in MOVING[name](20, 5, ndim, turns=0.8, phase=0.03):
        solid = np.asarray(domain.cells) == SOLID
        flux = sum(np.diff(w, axis=k) for k, w in enumerate(walls))
        assert solid.any() and max(abs(w).max() for w in walls) > 10
        assert abs(flux[~solid].sum()) < 1e-10 * np.abs(flux).sum()
        for axis, w in enumerate(walls):  # only where the solid is
            wide = np.pad(solid, [(int(k == axis),) * 2 for k in range(ndim)])
            near = np.maximum(*(np.take(wide, np.arange(w.shape[axis]) + k, axis) for k in (0, 1)))
            assert (w[~near] == 0).all()


def moments(made):
    """Centre of a solid, and the angle of its long axis."""
    cells = np.asarray(next(made).domain.cells) == SOLID
    x = np.argwhere(cells) + 0.5
    c = np.cov(x.T)
    return x.mean(0), np.arctan2(2 * c[0, 1], c[0, 0] - c[1, 1]) / 2


def test_velocities_are_those_at_which_positions_change():
    """Against differences of the solids' own moments, over ±0.02 turns, which are good to 0.3 %, and to what is left of the
    rounding to cells."""
    step, n = 0.02, 256
    before, after = (moments(geometry.moving_ball(n, 1, 2, phase=0.1 + k * step)) for k in (-1, 1))
    walls = next(geometry.moving_ball(n, 1, 2, phase=0.1)).walls
    for w, x, y in zip(walls, before[0], after[0], strict=True):
        np.testing.assert_allclose(w[w != 0], (y - x) / (2 * step), rtol=0.02)
    before, after = (moments(geometry.rotating_paddle(n, 1, 2, phase=0.1 + k * step)) for k in (-1, 1))
    rate = (after[1] - before[1]) / (2 * step)
    walls = next(geometry.rotating_paddle(n, 1, 2, phase=0.1)).walls
    for axis, (w, sign) in enumerate(zip(walls, (-1, 1), strict=True)):
        at = np.argwhere(w != 0)
        across = at[:, 1 - axis] + 0.5 - n / 2
        np.testing.assert_allclose(w[w != 0], sign * rate * across, rtol=0.02)


@pytest.mark.parametrize("name", MOVING)
def test_the_solver_takes_as_many_iterations_wherever_the_solid_is(name, x64):
    steps = []
    for domain, _ in MOVING[name](24, 8):
        _, info = poisson.solve(domain, jnp.asarray(gallery.plume(domain, 1)), rtol=1e-6)
        assert bool(info.converged)
        steps.append(int(info.steps))
    assert max(steps) <= 6 and max(steps) - min(steps) <= 1, steps


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (geometry.moving_ball, dict(radius=0.3, path=0.3), r"radius, path: got 0.3, 0.3"),
        (geometry.rotating_paddle, dict(length=1.2), r"length, thickness: got 1.2, 0.1"),
        (geometry.moving_ball, dict(ndim=4), r"ndim: got 4"),
        (geometry.moving_ball, dict(duration=0.0), r"duration: got 16, 3, 0.0"),
    ],
)
def test_impossible_movements(make, given, message):
    with pytest.raises(ValueError, match=message):
        make(16, 3, **given)


def test_a_solid_smaller_than_a_cell():
    with pytest.raises(ValueError, match=r"n: got 8, expected more cells"):
        next(geometry.moving_ball(8, 1, radius=0.01))


def test_gallery_has_a_ring_and_a_paddle():
    ring = np.asarray(gallery.mesh_torus(48).cells) == SOLID
    # 2 π² R r² with R = 0.25 and r = 0.35 R; a mesh of 48² points lacks 0.4 %, cells of the surface are the rest
    assert abs(ring.sum() / 48**3 / (2 * np.pi**2 * 0.25 * 0.0875**2) - 1) < 0.02
    assert not ring[24, 24, 24]
    for make in (gallery.mesh_torus, gallery.paddle):
        assert not np.array_equal(make(24, 3, 1).cells, make(24, 3, 2).cells)
        assert make(24, 2).shape == (24, 24) and make(24, 3).closed == 0
