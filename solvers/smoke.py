"""A small smoke simulation: where the right-hand sides of pressure problems come from.

    for domain, state, info in smoke.run(geometry.still(domain, 120), smoke.warm_spot(domain)): ...

Warm smoke rises in air without friction (Boussinesq: its density matters for its weight only), on a staggered grid: velocities
sit on the faces of the cells, smoke and temperature in their centres.  One time step (`step`) is

    everything is carried along by the velocity        semi-Lagrangian: the value is that at the point where a path of the
                                                       second order back in time ends (Stam 1999; Bridson 2015, chapter 3)
    the source gives smoke and heat, heat gives lift   u ← u + Δt (lift · temperature - weight · density)
    the velocity loses its divergence                  A p = -div u, u ← u - grad p: `project`, with `poisson.solve`

p is Δt times the pressure over the density.  Lengths are in cells, so that A is the plain matrix.  On faces of solid cells the
velocity is that of the solid, which is zero or given (`walls`): a solid moves, or a wall lets air in.  Faces between fluid and
air, where p is zero, let air in and out; beyond there is no smoke.  Air sticks to solids inside the grid, and slides along
the edges of the grid.  The last axis points up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Float

from solvers import geometry, multigrid, outcome, poisson
from solvers.poisson import FLUID, SOLID, Domain

DT = 1 / 20
"""Smoke takes about four units of time from the floor to the top of a domain."""
UNMET = 1e-3
"""A right-hand side in a closed region whose mean is more than this share of its size is not for rounding to explain."""
Velocity = tuple[Any, ...]
"""Per axis an array on the faces across it: one more than there are cells along the axis."""


class State(NamedTuple):
    """velocity     per axis on the faces of the grid, in cells per unit of time
    density      of smoke, in the cells
    temperature  above that of the air around
    """

    velocity: tuple[Float[Array, "*_"], ...]  # of one grid of faces each
    density: Float[Array, "*grid"]
    temperature: Float[Array, "*grid"]


class Scene(NamedTuple):
    """source   in every step smoke and temperature become at least this
    lift     upward acceleration per unit of temperature, in cells per unit of time squared
    weight   downward acceleration per unit of smoke
    cooling  share of the temperature that is lost per unit of time
    """

    source: Float[Array, "*grid"]
    lift: float | Float[Array, ""]
    weight: float | Float[Array, ""] = 0.0
    cooling: float | Float[Array, ""] = 0.0


class Info(NamedTuple):
    """rhs       minus the divergence before the projection, integrated over cells: the right-hand side
    pressure  what made the velocity free of divergence
    solve     how it was found: `poisson.Info`
    """

    rhs: Float[Array, "*grid"]
    pressure: Float[Array, "*grid"]
    solve: poisson.Info


def rest(domain: Domain, dtype: Any = None) -> State:
    """Clean air that does not move.  dtype: None for float64 where enabled, else float32."""
    zero = jnp.zeros(domain.shape, dtype)
    return State(tuple(jnp.zeros(s, dtype) for s in _face_shapes(domain)), zero, zero)


def warm_spot(domain: Domain, seed: int = 0, *, lift: float | None = None) -> Scene:
    """A scene for any domain: a warm ball near the floor.

    seed  0 puts it under the middle, others somewhere and with another size
    lift  None: a domain's height per unit of time squared
    Raises ValueError if there is no fluid.
    """
    rng = np.random.default_rng(seed)
    ndim, height = len(domain.shape), domain.shape[-1]
    place = np.array([0.5] * (ndim - 1) + [0.12])
    radius = 0.09
    if seed != 0:
        place, radius = np.append(rng.uniform(0.25, 0.75, ndim - 1), rng.uniform(0.1, 0.3)), rng.uniform(0.06, 0.12)
    x = np.meshgrid(*[np.arange(m) + 0.5 for m in domain.shape], indexing="ij")
    away = np.sqrt(sum((a - c * m) ** 2 for a, c, m in zip(x, place, domain.shape, strict=True)))
    # Uneven, so that a plume does not stay symmetric.
    uneven = scipy.ndimage.zoom(rng.uniform(0.6, 1.0, (6,) * ndim), [m / 6 for m in domain.shape], order=1)
    source = np.where(np.asarray(domain.fluid), np.clip(radius * height - away + 0.5, 0, 1) * uneven, 0)
    if not source.any():
        raise ValueError(
            f"domain: no fluid within {radius:.2f} of its height around {place.round(2)}, where the source is"
        )
    return Scene(jnp.asarray(source, jnp.result_type(float)), float(height) if lift is None else lift)


# ---- one step ----------------------------------------------------------------------------------------------------------


def step(
    state: State,
    domain: Domain,
    scene: Scene,
    dt: float | Float[Array, ""],
    *,
    walls: Velocity | None = None,
    preconditioner: Any = None,
    rtol: float | None = None,
) -> tuple[State, Info]:
    """The state a time dt later.  Pure and jit-able: whether the solver converged says `Info.solve`.

    walls, preconditioner, rtol   as for `project`
    Raises ValueError for wrong shapes, and what `project` raises.
    """
    for name, cells in (("scene.source", scene.source), ("state.density", state.density)):
        if cells.shape != domain.shape:
            raise ValueError(f"{name}: has shape {cells.shape}, the domain {domain.shape}")
    dtype = state.density.dtype
    source, lift, weight, cooling, dt = (jnp.asarray(x, dtype) for x in (*scene, dt))
    velocity, density, temperature = advected(state, domain, dt)
    source = jnp.where(domain.fluid, source, 0)
    density = jnp.maximum(density, source)
    temperature = jnp.maximum(temperature * jnp.exp(-cooling * dt), source)
    up = dt * (lift * temperature - weight * density)
    up = jnp.pad(up, [(0, 0)] * (up.ndim - 1) + [(1, 1)], mode="edge")
    velocity = (*velocity[:-1], velocity[-1] + (up[..., 1:] + up[..., :-1]) / 2)
    velocity, info = project(velocity, domain, walls, preconditioner=preconditioner, rtol=rtol)
    return State(velocity, density, temperature), info


def project(
    velocity: Velocity,
    domain: Domain,
    walls: Velocity | None = None,
    *,
    preconditioner: Any = None,
    rtol: float | None = None,
) -> tuple[tuple[Float[Array, "*_"], ...], Info]:
    """The nearest velocity that has no divergence in the fluid, and that of the walls on the faces of solids.

    walls           velocity of solids on all faces (what it says on others does not matter); None: they do not move
    preconditioner  as for `poisson.solve`: one made before for the same domain saves its set-up
    rtol            for `poisson.solve`; None: 1e-6, or in low precision twice what it reaches

    Between two cells of air the velocity is zero.  Pure and jit-able.
    Raises ValueError for wrong shapes, cells that are not 1 wide, and an rtol out of reach.
    """
    _check("velocity", velocity, domain)
    if walls is not None:
        _check("walls", walls, domain)
    if set(domain.spacing) != {1.0}:
        raise ValueError(f"domain: has spacing {domain.spacing}, expected cells of width 1 on all axes")
    dtype = velocity[0].dtype
    rtol = _rtol(domain, dtype) if rtol is None else rtol
    sides = _sides(domain)
    bounded = []
    for axis, (u, (before, behind)) in enumerate(zip(velocity, sides, strict=True)):
        wall = 0 if walls is None else jnp.asarray(walls[axis], dtype)
        u = jnp.where((before == FLUID) | (behind == FLUID), u, 0)
        bounded.append(jnp.where((before == SOLID) | (behind == SOLID), wall, u))
    rhs = -divergence(tuple(bounded), domain)
    p, solve = poisson.solve(domain, rhs, rtol=rtol, preconditioner=preconditioner)
    free = []
    for axis, (u, (before, behind)) in enumerate(zip(bounded, sides, strict=True)):
        wide = jnp.pad(p, [(int(k == axis),) * 2 for k in range(p.ndim)])
        inside = ((before == FLUID) | (behind == FLUID)) & (before != SOLID) & (behind != SOLID)
        free.append(u - jnp.where(inside, jnp.diff(wide, axis=axis), 0))
    return tuple(free), Info(rhs, p, solve)


def divergence(velocity: Velocity, domain: Domain) -> Float[Array, "*grid"]:
    """What flows out of each cell of fluid per unit of time; zero in other cells."""
    _check("velocity", velocity, domain)
    return jnp.where(domain.fluid, sum(jnp.diff(u, axis=k) for k, u in enumerate(velocity)), 0)


def advected(state: State, domain: Domain, dt: float | Float[Array, ""]) -> State:
    """The state carried along by its own velocity for a time dt, and nothing else.

    Smoke and temperature are interpolated between the cells that are not solid; they are zero in solid cells and in air.
    A path does not see a solid that it crosses within one step.
    """
    _check("state.velocity", state.velocity, domain)
    velocity = tuple(_on_faces(u, axis, _departures(state.velocity, axis, dt)) for axis, u in enumerate(state.velocity))
    ends = [x + 0.5 for x in _departures(state.velocity, None, dt)]  # in the grid with what lies beyond its edges
    weights = (poisson.padded(domain) != SOLID).astype(state.density.dtype)
    total = _interpolated(weights, ends)

    def carried(values: Array) -> Array:
        inside = jnp.where(domain.fluid, values, 0)
        found = _interpolated(jnp.pad(inside, 1), ends) / jnp.where(total > 0, total, 1)
        # A path that ends between solid cells has left the fluid.
        return jnp.where(domain.fluid, jnp.where(total > 1e-3, found, values), 0)

    return State(velocity, carried(state.density), carried(state.temperature))


def _departures(velocity: Velocity, axis: int | None, dt: Any) -> list[Array]:
    """Where what is on the faces across an axis (None: in the centres of cells) after a step was before: the midpoint rule."""
    now = [_averaged(u, k, axis) for k, u in enumerate(velocity)]
    along = [jnp.arange(m, dtype=now[0].dtype) + (0.0 if k == axis else 0.5) for k, m in enumerate(now[0].shape)]
    points = jnp.meshgrid(*along, indexing="ij")
    middle = [x - dt / 2 * v for x, v in zip(points, now, strict=True)]
    return [x - dt * _on_faces(u, k, middle) for k, (x, u) in enumerate(zip(points, velocity, strict=True))]


def _averaged(u: Array, own: int, axis: int | None) -> Array:
    """A velocity on the faces across `own` at those across `axis`, or in the centres; constant beyond the grid."""
    if own == axis:
        return u
    u = (u[_cut(u.ndim, own, slice(None, -1))] + u[_cut(u.ndim, own, slice(1, None))]) / 2
    if axis is None:
        return u
    u = jnp.pad(u, [(int(k == axis),) * 2 for k in range(u.ndim)], mode="edge")
    return (u[_cut(u.ndim, axis, slice(None, -1))] + u[_cut(u.ndim, axis, slice(1, None))]) / 2


def _cut(ndim: int, axis: int, part: slice) -> tuple[slice, ...]:
    return tuple(part if k == axis else slice(None) for k in range(ndim))


def _on_faces(u: Array, axis: int, points: list[Array]) -> Array:
    return _interpolated(u, [x if k == axis else x - 0.5 for k, x in enumerate(points)])


def _interpolated(values: Array, indices: list[Array]) -> Array:
    """Linear between the entries of an array, constant beyond them."""
    first, shares = jnp.uint32(0), []
    strides: list[int] = []
    for x, m in zip(indices, values.shape, strict=True):
        x = jnp.clip(x, 0, m - 1)
        low = jnp.minimum(jnp.floor(x), max(m - 2, 0))
        shares.append(x - low)
        first = first * m + low.astype(jnp.uint32)
        strides = [k * m for k in strides] + [1 if m > 1 else 0]
    flat = values.reshape(-1)
    corners = [
        jnp.take(flat, first + np.uint32(sum(itertools.compress(strides, at))), mode="clip")
        for at in itertools.product((0, 1), repeat=values.ndim)
    ]
    for share in shares:  # the first axis halves the list, and so on
        half = len(corners) // 2
        corners = [a + share * (b - a) for a, b in zip(corners[:half], corners[half:], strict=True)]
    return corners[0]


def _sides(domain: Domain) -> list[tuple[Array, Array]]:
    """Per axis the codes of the cells before and behind each face."""
    codes, ndim = poisson.padded(domain), domain.cells.ndim
    cut = lambda axis, s: codes[tuple(s if k == axis else slice(1, -1) for k in range(ndim))]  # noqa: E731
    return [(cut(axis, slice(None, -1)), cut(axis, slice(1, None))) for axis in range(ndim)]


def _face_shapes(domain: Domain) -> list[tuple[int, ...]]:
    return [tuple(m + (k == axis) for k, m in enumerate(domain.shape)) for axis in range(len(domain.shape))]


def _rtol(domain: Domain, dtype: Any) -> float:
    return max(1e-6, float(jnp.finfo(dtype).eps) * max(domain.shape) ** 2 / 4)


def _check(name: str, velocity: Velocity, domain: Domain) -> None:
    shapes, expected = [np.shape(u) for u in velocity], _face_shapes(domain)
    if shapes != expected:
        raise ValueError(
            f"{name}: has arrays of shapes {shapes}, expected one more than the cells per axis: {expected}"
        )


# ---- runs --------------------------------------------------------------------------------------------------------------


def run(
    places: Iterable[geometry.Moved],
    scene: Scene,
    dt: float = DT,
    *,
    state: State | None = None,
    rtol: float | None = None,
) -> Iterator[tuple[Domain, State, Info]]:
    """One time step for each of the places of the solids: `geometry.still(domain, frames)` if they do not move.

    state  to start from; None: air at rest
    Raises RuntimeError if the pressure of a frame was not found, or if walls push air into a region that it cannot leave.
    """
    before, m = None, None
    scene, time = jax.tree.map(jnp.asarray, (scene, dt))  # a number would be part of the program
    for frame, (domain, walls) in enumerate(places):
        state = rest(domain) if state is None else state
        if domain is not before:
            before, m = domain, _prepared(domain)
        moving = tuple(jnp.asarray(w, state.density.dtype) for w in walls)
        state, info = _step(state, domain, scene, time, walls=moving, preconditioner=m, rtol=rtol)
        asked = _rtol(domain, state.density.dtype) if rtol is None else rtol
        outcome.require_convergence(f"run: frame {frame}", info.solve, asked)
        if (info.solve.removed > UNMET).any():
            raise RuntimeError(
                f"run: frame {frame}: walls push air into a closed region or out of it, {float(info.solve.removed.max()):.1g} "
                "of the right-hand side cannot be met"
            )
        yield domain, state, info


@eqx.filter_jit
def _step(state: State, domain: Domain, scene: Scene, dt: Array, **given: Any) -> tuple[State, Info]:
    return step(state, domain, scene, dt, **given)


@eqx.filter_jit
def _prepared(domain: Domain) -> multigrid.Preconditioner:
    return multigrid.preconditioner(poisson.laplacian(domain))


def right_hand_sides(
    domain: Domain, frames: int, dt: float = DT, *, seed: int = 0, every: int = 1, rtol: float | None = None
) -> Float[np.ndarray, "kept ..."]:
    """Right-hand sides of the pressure problems of a run with `warm_spot(domain, seed)`, to train on or to test with.

    every  keep one of so many frames: those that follow each other are much alike
    Raises as `run` and `warm_spot` do.
    """
    if not 1 <= every <= frames:
        raise ValueError(f"every, frames: got {every}, {frames}, expected 1 <= every <= frames")
    kept = []
    for frame, (_, _, info) in enumerate(
        run(geometry.still(domain, frames), warm_spot(domain, seed), dt, rtol=rtol), 1
    ):
        if frame % every == 0:
            kept.append(np.asarray(info.rhs))
    return np.stack(kept)
