"""The stencil against its matrix, written out entry by entry with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import stencil
from solvers.poisson import AIR, FLUID, SOLID, Domain, laplacian

pytestmark = pytest.mark.usefixtures("quick_compilation")

CODES = (SOLID, FLUID, AIR)


SHAPES = ((4, 5), (1, 6), (3, 2, 4), (5, 1, 3))  # a few, as each is compiled for


@st.composite
def domains(draw, unit=True):
    """(cells, edges, spacing) of two or three dimensions."""
    shape = draw(st.sampled_from(SHAPES))
    cells = np.array(draw(st.lists(st.sampled_from(CODES), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    cells = cells.reshape(shape)
    cells[tuple(0 for _ in shape)] = FLUID
    edges = [(draw(st.sampled_from((SOLID, AIR))), draw(st.sampled_from((SOLID, AIR)))) for _ in shape]
    if unit:
        return cells, edges, 1.0
    widths = [[draw(st.sampled_from((0.5, 1.0, 2.0))) for _ in range(n)] for n in shape]
    return cells, edges, widths


def matrix(cells, edges, spacing):
    """A on all cells, from its definition: area / distance for each face between a fluid cell and one that is not solid."""
    shape, n = cells.shape, cells.size
    widths = [
        np.full(m, spacing) if isinstance(spacing, float) else np.asarray(spacing[k]) for k, m in enumerate(shape)
    ]
    a = np.zeros((n, n))
    for cell in np.argwhere(cells == FLUID):
        i = np.ravel_multi_index(cell, shape)
        for axis in range(len(shape)):
            area = np.prod([widths[k][cell[k]] for k in range(len(shape)) if k != axis])
            for side in (-1, 1):
                other = cell.copy()
                other[axis] += side
                inside = 0 <= other[axis] < shape[axis]
                code = cells[tuple(other)] if inside else edges[axis][(side + 1) // 2]
                mine = widths[axis][cell[axis]]
                weight = area / ((mine + (widths[axis][other[axis]] if inside else mine)) / 2)
                if code != SOLID:
                    a[i, i] += weight
                if code == FLUID:
                    a[i, np.ravel_multi_index(other, shape)] -= weight
    return a


@settings(max_examples=40)
@given(domains())
def test_plain_laplacian_is_its_matrix(problem):
    cells, edges, _ = problem
    a = laplacian(Domain.from_mask(cells, edges=edges))
    assert a.diagonal.dtype == jnp.int8
    np.testing.assert_array_equal(stencil.dense(a, jnp.float32), matrix(cells, edges, 1.0))


@settings(max_examples=40)
@given(domains(unit=False))
def test_laplacian_with_cells_of_different_widths_is_its_matrix(problem):
    cells, edges, widths = problem
    a = laplacian(Domain.from_mask(cells, edges=edges, spacing=widths))
    np.testing.assert_allclose(stencil.dense(a, jnp.float32), matrix(cells, edges, widths), rtol=1e-6)


@pytest.mark.parametrize("spacing", [0.5, (0.5, 2.0, 1.0)])
def test_one_width_per_axis(spacing):
    cells = np.random.default_rng(0).choice(CODES, (4, 3, 5))
    a = laplacian(Domain.from_mask(cells, spacing=spacing))
    widths = [np.full(n, h) for n, h in zip(cells.shape, np.broadcast_to(spacing, 3), strict=True)]
    np.testing.assert_allclose(stencil.dense(a, jnp.float32), matrix(cells, [(SOLID, SOLID)] * 3, widths), rtol=1e-6)


def test_values_outside_the_fluid_do_not_matter(key):
    cells = np.random.default_rng(1).choice(CODES, (6, 7))
    a = laplacian(Domain.from_mask(cells))
    u = jax.random.normal(key, cells.shape)
    inside = jnp.where(cells == FLUID, u, 0)
    np.testing.assert_array_equal(a(u), a(inside))
    np.testing.assert_array_equal(a(u), stencil.apply(a, inside))
    assert (a(u)[cells != FLUID] == 0).all()


@settings(max_examples=40)
@given(domains())
def test_a_coarse_stencil_is_the_scaled_product(problem):
    """Links and air of P'AP over the ratio of distances: over two for axes that are halved."""
    cells, edges, _ = problem
    a = laplacian(Domain.from_mask(cells, edges=edges))
    by = stencil.factors(a.shape)
    coarse = stencil.coarsened(a, jnp.float32)
    assert coarse.shape == tuple(-(-n // f) for n, f in zip(a.shape, by, strict=True))
    blocks = np.ravel_multi_index([i // f for i, f in zip(np.indices(a.shape), by, strict=True)], coarse.shape).reshape(
        -1
    )
    p = np.eye(coarse.diagonal.size)[blocks] * (cells == FLUID).reshape(-1, 1)
    full = p.T @ matrix(cells, edges, 1.0) @ p
    got = np.asarray(stencil.dense(coarse, jnp.float32), float)
    off = ~np.eye(len(full), dtype=bool)
    ratio = np.ones_like(full)
    for axis, f in enumerate(by):
        place = np.indices(coarse.shape)[axis].reshape(-1)
        ratio[place[:, None] != place[None, :]] = f
    np.testing.assert_allclose(np.where(off, got, 0), np.where(off, full / ratio, 0), atol=1e-6)
    air = full.sum(1) / max(by)
    np.testing.assert_allclose(got.sum(1), air, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4), (3, 6, 2), (7, 1, 2)])
def test_aggregated_sums_over_blocks(shape, key):
    x = np.asarray(jax.random.normal(key, shape))
    by = stencil.factors(shape)
    for axis, f in enumerate(by):
        x = np.add.reduceat(x, np.arange(0, x.shape[axis], f), axis)
    np.testing.assert_allclose(stencil.aggregated(jax.random.normal(key, shape), by), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4), (3, 6, 2), (7, 1, 2)])
def test_repeated_is_the_transpose_of_aggregated(shape, key):
    by = stencil.factors(shape)
    x = jax.random.normal(key, shape)
    y = jax.random.normal(jax.random.fold_in(key, 1), stencil.aggregated(x, by).shape)
    np.testing.assert_allclose(
        jnp.vdot(stencil.aggregated(x, by), y), jnp.vdot(x, stencil.repeated(y, by, shape)), rtol=1e-5
    )
