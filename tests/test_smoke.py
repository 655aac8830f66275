"""Smoke: the projection against dense linear algebra, advection against SciPy and formulas, steps, and runs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from solvers import gallery, geometry, poisson, smoke
from solvers.poisson import AIR, FLUID, SOLID, Domain

pytestmark = pytest.mark.usefixtures("quick_compilation")

advected = eqx.filter_jit(smoke.advected)


def step(state, domain, scene, dt, **given):
    """As in a run, compiled once for all numbers."""
    return smoke._step(state, domain, *jax.tree.map(jnp.asarray, (scene, dt)), **given)


def faces(shape):
    return [tuple(m + (k == axis) for k, m in enumerate(shape)) for axis in range(len(shape))]


def random_velocity(shape, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(size * rng.standard_normal(s)) for s in faces(shape))


def both_sides(domain):
    """Per axis and face the codes of its two cells, one by one."""
    cells = np.asarray(domain.cells)
    for axis, shape in enumerate(faces(domain.shape)):
        for at in np.ndindex(*shape):
            codes = []
            for k in (at[axis] - 1, at[axis]):
                place = (*at[:axis], k, *at[axis + 1 :])
                beyond = domain.edges[axis][int(k >= cells.shape[axis])]
                codes.append(int(cells[place]) if 0 <= k < cells.shape[axis] else beyond)
            yield axis, at, codes


def dense_projection(velocity, domain, walls):
    """The nearest velocity without divergence, by a pseudoinverse over the faces that are free to change."""
    cells = np.asarray(domain.cells)
    number = {tuple(c): i for i, c in enumerate(np.argwhere(cells == FLUID))}
    result, free, columns = [np.zeros(s) for s in faces(domain.shape)], [], []
    fixed = np.zeros(len(number))
    for axis, at, codes in both_sides(domain):
        column = np.zeros(len(number))
        for k, sign in ((at[axis] - 1, 1), (at[axis], -1)):
            if (place := (*at[:axis], k, *at[axis + 1 :])) in number:
                column[number[place]] += sign
        if SOLID in codes:
            result[axis][at] = walls[axis][at]
            fixed += column * walls[axis][at]
        elif FLUID in codes:
            free.append((axis, at)), columns.append(column)
    if free:
        b = np.array(columns).T
        u = np.array([velocity[axis][at] for axis, at in free])
        for (axis, at), value in zip(free, u - np.linalg.pinv(b) @ (b @ u + fixed), strict=True):
            result[axis][at] = value
    return result


@settings(max_examples=15)
@given(data=st.data(), ndim=st.sampled_from([2, 3]), seed=st.integers(0, 10**6))
def test_the_projection_is_the_nearest_velocity_without_divergence(data, ndim, seed, x64):
    shape = (5, 4) if ndim == 2 else (3, 2, 4)  # two shapes, so that little is compiled
    rng = np.random.default_rng(seed)
    cells = rng.choice([SOLID, FLUID, AIR], shape, p=[0.2, 0.7, 0.1])
    assume((cells == FLUID).any())
    sides = data.draw(st.sampled_from([SOLID, AIR] if ndim == 2 else [SOLID]))
    domain = Domain.from_mask(cells, edges=[SOLID] * (ndim - 1) + [(SOLID, sides)])
    assume(domain.closed <= 1)
    velocity = random_velocity(shape, seed)
    # Walls may only move where no region of fluid is closed, else they would compress it.
    walls = random_velocity(shape, seed + 1) if domain.closed == 0 else tuple(map(jnp.zeros, faces(shape)))
    found, info = smoke.project(velocity, domain, walls, rtol=1e-10)
    assert bool(info.solve.converged)
    for u, exact in zip(found, dense_projection(velocity, domain, walls), strict=True):
        np.testing.assert_allclose(u, exact, atol=1e-8)


@pytest.mark.parametrize(("name", "ndim"), [("dam_break", 2), ("random_blobs", 2), ("paddle", 2), ("smoke_sphere", 3)])
def test_projection_in_float32_leaves_no_divergence_and_adds_no_energy(name, ndim):
    domain = gallery.DOMAINS[name](16, ndim, seed=4)
    velocity = random_velocity(domain.shape, 0)
    free, info = smoke.project(velocity, domain)
    assert bool(info.solve.converged) and free[0].dtype == jnp.float32
    # The default tolerance in float32 on 16 cells is 7.7e-6 of the right-hand side.
    left = jnp.linalg.norm(smoke.divergence(free, domain))
    assert float(left) < 1e-5 * float(jnp.linalg.norm(info.rhs))
    before, after = (list(map(np.asarray, v)) for v in (velocity, free))
    energy = np.zeros(2)
    for axis, at, codes in both_sides(domain):
        if SOLID in codes or FLUID not in codes:
            assert after[axis][at] == 0
        else:
            energy += before[axis][at] ** 2, after[axis][at] ** 2
    assert energy[1] < energy[0]


def test_the_right_hand_side_is_what_flows_in(x64):
    domain = gallery.random_blobs(8, 2, seed=4)
    velocity = random_velocity(domain.shape, 3)
    _, info = smoke.project(velocity, domain)
    fluid = np.asarray(domain.fluid)
    for i, j in np.ndindex(8, 8):
        u, v = velocity
        expected = u[i, j] - u[i + 1, j] + v[i, j] - v[i, j + 1]
        if fluid[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].all() and 0 < i < 7 and 0 < j < 7:  # no wall near
            np.testing.assert_allclose(info.rhs[i, j], expected, atol=1e-12)
        if not fluid[i, j]:
            assert info.rhs[i, j] == 0
    np.testing.assert_allclose(poisson.laplacian(domain)(info.pressure), info.rhs, atol=1e-5)


# ---- advection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_the_same_everywhere_stays_so(ndim, x64):
    """Next to solids too, and in a whirl of any kind; but not where clean air comes in."""
    cells = np.pad(np.asarray(gallery.smoke_sphere(7, ndim).cells), 1, constant_values=SOLID)  # as the next in shape
    domain = Domain.from_mask(cells, edges=AIR)
    # Paths shorter than the wall is thick.
    velocity = tuple(jnp.clip(u, -1.9, 1.9) for u in random_velocity(domain.shape, 0))
    one = jnp.where(domain.fluid, 1.0, 0.0)
    moved = advected(smoke.State(velocity, one, 2 * one), domain, jnp.asarray(0.5))
    np.testing.assert_allclose(moved.density, one, atol=1e-12)
    np.testing.assert_allclose(moved.temperature, 2 * one, atol=1e-12)
    same = tuple(jnp.full(s, 0.3 * k - 0.2) for k, s in enumerate(faces(domain.shape)))
    moved = advected(smoke.State(same, one, one), domain, jnp.asarray(0.5))
    for u, v in zip(moved.velocity, same, strict=True):
        np.testing.assert_allclose(u, v, atol=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_wind_shifts_everything_as_scipy_does(ndim, x64):
    """Linear interpolation, nothing behind open edges, and the velocity of the edge beyond it."""
    n, rng, dt = 9, np.random.default_rng(0), 0.7
    domain = Domain.from_mask(np.full((n,) * ndim, FLUID), edges=AIR)
    wind = (1.3, -0.4, 0.9)[:ndim]
    density, heat = (jnp.asarray(rng.uniform(size=(n,) * ndim)) for _ in range(2))
    velocity = tuple(jnp.full(s, w) for s, w in zip(faces(domain.shape), wind, strict=True))
    moved = advected(smoke.State(velocity, density, heat), domain, jnp.asarray(dt))
    by = [w * dt for w in wind]
    for found, start in ((moved.density, density), (moved.temperature, heat)):
        expected = scipy.ndimage.shift(np.pad(start, 1), by, order=1, mode="nearest")
        np.testing.assert_allclose(found, expected[(slice(1, -1),) * ndim], atol=1e-12)


def test_paths_back_in_time_are_of_the_second_order(x64):
    """In a rigid whirl, whose velocities are interpolated exactly, a path is part of a circle."""
    n, spin = 16, 1.0
    x = [np.meshgrid(*[np.arange(m) + (0 if m > n else 0.5) for m in s], indexing="ij") for s in faces((n, n))]
    velocity = (jnp.asarray(-spin * (x[0][1] - n / 2)), jnp.asarray(spin * (x[1][0] - n / 2)))
    inner = np.hypot(*(a - n / 2 for a in np.meshgrid(*[np.arange(n) + 0.5] * 2, indexing="ij"))) < n / 3
    errors = []
    for dt in (0.2, 0.1, 0.05):
        ends = smoke._departures(velocity, None, dt)
        a, b = (c - n / 2 for c in np.meshgrid(*[np.arange(n) + 0.5] * 2, indexing="ij"))
        exact = np.cos(dt) * a + np.sin(dt) * b, -np.sin(dt) * a + np.cos(dt) * b
        errors.append(max(np.abs(e - n / 2 - f)[inner].max() for e, f in zip(ends, exact, strict=True)))
    # One step is off by dt³/6 of the radius, up to 5.3 cells, in the limit: eight times less for half the step.
    assert errors[0] < 0.2**3 and errors[0] / errors[1] > 7 and errors[1] / errors[2] > 7, errors


# ---- steps -------------------------------------------------------------------------------------------------------------


def scene_without_source(domain, lift=1.0):
    return smoke.Scene(jnp.zeros(domain.shape), lift)


def test_what_is_at_rest_stays_at_rest():
    domain = gallery.smoke_sphere(12, 2)
    *_, (_, state, info) = smoke.run(geometry.still(domain, 3), scene_without_source(domain))
    assert bool(info.solve.converged) and all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("top", [AIR, SOLID])
def test_warm_air_everywhere_is_held_by_pressure(top, x64):
    """A force that is the same everywhere moves nothing in a box: hydrostatics, with p linear in the height."""
    domain = Domain.from_mask(np.full((4, 5), FLUID), edges=[SOLID, (SOLID, top)])
    state = smoke.rest(domain)._replace(temperature=jnp.ones(domain.shape))
    for _ in range(3):
        state, info = step(state, domain, scene_without_source(domain, lift=2.0), 0.5, rtol=1e-10)
        for u in state.velocity:
            np.testing.assert_allclose(u, 0, atol=1e-8)
    height = np.broadcast_to(np.arange(5) - (5.0 if top == AIR else 2.0), (4, 5))  # zero in the air, or on average
    np.testing.assert_allclose(info.pressure, height, atol=1e-8)


def test_a_mirrored_state_stays_mirrored(x64):
    domain = gallery.smoke_sphere(12, 2)
    mirrored = lambda x: jnp.flip(x, 0)  # noqa: E731
    velocity, _ = smoke.project(random_velocity(domain.shape, 5), domain, rtol=1e-10)
    density = jnp.where(domain.fluid, jnp.asarray(np.random.default_rng(1).uniform(size=(12, 12))), 0)
    state = smoke.State(velocity, density, density**2)
    scene = scene_without_source(domain, lift=3.0)._replace(weight=1.0, cooling=0.5)

    def other(s):
        return smoke.State((-mirrored(s.velocity[0]), mirrored(s.velocity[1])), *map(mirrored, s[1:]))

    for _ in range(3):
        once, _ = step(state, domain, scene, 0.3, rtol=1e-10)
        again, _ = step(other(state), domain, scene, 0.3, rtol=1e-10)
        for a, b in zip(jax.tree.leaves(other(once)), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)
        state = once
    assert max(float(jnp.abs(u).max()) for u in state.velocity) > 0.1


def test_forces_and_cooling_of_one_step(x64):
    """One warm, smoky cell: its two faces get half of its lift each before the projection, which the rhs shows."""
    domain = Domain.from_mask(np.full((5, 6), FLUID), edges=AIR)
    spot = jnp.zeros((5, 6)).at[2, 2].set(1.0)
    state = smoke.rest(domain)._replace(temperature=3 * spot, density=spot)
    scene = smoke.Scene(jnp.zeros((5, 6)).at[0, 0].set(0.25), lift=2.0, weight=1.5, cooling=0.7)
    after, info = step(state, domain, scene, 0.5)
    cooled = 3 * np.exp(-0.35)
    force = 0.5 * (2.0 * cooled - 1.5)
    expected = np.zeros((5, 6))
    # The spot takes in and gives out alike; air gathers above and lacks below.
    expected[2, 1], expected[2, 3] = -force / 2, force / 2
    warm = 0.5 * (2.0 - 1.5) * 0.25
    expected[0, 0], expected[0, 1] = 0.0 - warm / 2 + warm, warm / 2
    np.testing.assert_allclose(np.asarray(info.rhs)[1:], expected[1:], atol=1e-12)
    np.testing.assert_allclose(info.rhs[0, 1], expected[0, 1], atol=1e-12)
    np.testing.assert_allclose([after.temperature[2, 2], after.density[2, 2]], [cooled, 1.0], atol=1e-12)
    np.testing.assert_allclose([after.temperature[0, 0], after.density[0, 0]], 0.25, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "n", "ndim", "open_top"),
    [
        (geometry.moving_ball, 8, 3, True),
        (geometry.moving_ball, 16, 2, False),
        (geometry.rotating_paddle, 16, 2, False),
    ],
)
def test_air_neither_enters_nor_leaves_a_solid_that_moves(make, n, ndim, open_top):
    made = list(make(n, 6, ndim, duration=0.3, open_top=open_top))
    scene = smoke.warm_spot(made[0].domain)
    faster = 0.0
    for (domain, state, info), (_, walls) in zip(smoke.run(made, scene), made, strict=True):
        assert int(info.solve.steps) <= 6
        left = float(jnp.linalg.norm(smoke.divergence(state.velocity, domain)))
        assert left < 2e-5 * float(jnp.linalg.norm(info.rhs))
        found = list(map(np.asarray, state.velocity))
        for axis, at, codes in both_sides(domain):
            if SOLID in codes:
                assert found[axis][at] == np.float32(walls[axis][at])
                faster = max(faster, abs(found[axis][at]))
        assert (np.asarray(state.density)[~np.asarray(domain.fluid)] == 0).all()
        for values in (state.density, state.temperature):  # interpolation makes no new extremes
            assert float(values.min()) >= 0 and float(values.max()) <= 1 + 1e-6
    assert faster > n / 2


def test_a_wind_tunnel_lets_out_what_a_wall_lets_in(x64):
    cells = np.full((24, 12), FLUID)
    cells[6:9, 5:7] = SOLID
    domain = Domain.from_mask(cells, edges=[(SOLID, AIR), SOLID])
    walls = (jnp.zeros((25, 12)).at[0].set(1.5), jnp.zeros((24, 13)))
    state = smoke.rest(domain)
    for _ in range(4):
        state, _ = step(state, domain, scene_without_source(domain), 0.3, walls=walls, rtol=1e-8)
    u, v = map(np.asarray, state.velocity)
    np.testing.assert_allclose(u.sum(1), 18.0, atol=1e-5)  # through every section
    assert (u[0] == 1.5).all() and (v[:, [0, -1]] == 0).all() and (u[6:10, 5:7] == 0).all()
    assert u[7].max() > 1.6  # faster beside the obstacle


def test_warm_smoke_rises():
    domain = gallery.smoke_sphere(12, 2)
    tops = []
    for _, state, _ in smoke.run(geometry.still(domain, 60), smoke.warm_spot(domain), 0.15):
        tops.append(np.flatnonzero(np.asarray(state.density).max(0) > 0.05).max())
    assert tops[0] < 4 and tops[-1] > 8 and (np.diff(tops) >= 0).all(), tops  # around the ball, whose top is at 8


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_right_hand_sides_of_a_run():
    domain = gallery.smoke_sphere(12, 2)
    found = smoke.right_hand_sides(domain, 6, seed=1, every=2)
    assert found.shape == (3, 12, 12) and found.dtype == np.float32
    assert all(np.linalg.norm(b) > 1e-3 for b in found) and not np.allclose(found[1], found[2], rtol=0.01)
    np.testing.assert_array_equal(found, smoke.right_hand_sides(domain, 6, seed=1, every=2))
    assert not np.allclose(found, smoke.right_hand_sides(domain, 6, seed=2, every=2))
    expected = [info.rhs for _, _, info in smoke.run(geometry.still(domain, 6), smoke.warm_spot(domain, 1))][1::2]
    np.testing.assert_array_equal(found, expected)


def test_a_pressure_that_is_not_found_stops_the_run(monkeypatch):
    monkeypatch.setattr(poisson, "solve", functools.partial(poisson.solve, max_steps=1))
    domain = gallery.smoke_sphere(13, 2)  # a shape of its own: the step is compiled with this solver
    with pytest.raises(RuntimeError, match=r"run: frame 0: not converged after 1 steps"):
        smoke.right_hand_sides(domain, 2)


def test_walls_that_compress_air_stop_the_run():
    domain = Domain.from_mask(np.full((11, 9), FLUID))
    walls = (np.zeros((12, 9)), np.zeros((11, 10)))
    walls[0][0] = 1.0
    with pytest.raises(RuntimeError, match=r"run: frame 0: walls push air into a closed region"):
        next(smoke.run([geometry.Moved(domain, walls)], scene_without_source(domain)))


def test_bad_input(no_shape_checks):
    domain = gallery.smoke_sphere(8, 2)
    good = random_velocity((8, 8), 0)
    with pytest.raises(
        ValueError, match=r"velocity: has arrays of shapes \[\(9, 8\)\], expected .*\[\(9, 8\), \(8, 9\)\]"
    ):
        smoke.project(good[:1], domain)
    with pytest.raises(ValueError, match=r"walls: has arrays of shapes"):
        smoke.project(good, domain, good[::-1])
    with pytest.raises(ValueError, match=r"domain: has spacing \(0.5, 0.5\), expected cells of width 1"):
        smoke.project(good, Domain.from_mask(np.full((8, 8), FLUID), spacing=0.5))
    with pytest.raises(ValueError, match=r"domain: no fluid within 0.09 of its height"):
        smoke.warm_spot(Domain.from_mask(np.where(np.arange(8) < 5, SOLID, FLUID) * np.ones((8, 1), int)))
    small = scene_without_source(gallery.smoke_sphere(9, 2))
    with pytest.raises(ValueError, match=r"scene.source: has shape \(9, 9\), the domain \(8, 8\)"):
        smoke.step(smoke.rest(domain), domain, small, 0.1)
    with pytest.raises(ValueError, match=r"every, frames: got 3, 2"):
        smoke.right_hand_sides(domain, 2, every=3)
    with pytest.raises(ValueError, match=r"rtol: 1e-09 is below"):
        smoke.project(good, domain, rtol=1e-9)
