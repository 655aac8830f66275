"""The Radon transform against closed forms and its own matrix, filtered back-projection, phantoms."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import imaging, tomography
from solvers.tomography import Ellipses

pytestmark = pytest.mark.usefixtures("quick_compilation")


def even(n):
    return np.arange(n) * np.pi / n


def joseph(sides, angles, detectors, spacing):
    """The matrix, ray by ray and line by line: interpolation between the two pixels that the ray passes between."""
    height, width = sides
    a = np.zeros((len(angles), detectors, height, width))
    for k, angle in enumerate(angles):
        cos, sin = np.cos(angle), np.sin(angle)
        for d in range(detectors):
            t = (d - (detectors - 1) / 2) * spacing
            steep = abs(cos) >= abs(sin)
            for line in range(height if steep else width):
                if steep:
                    place = (t - ((height - 1) / 2 - line) * sin) / cos + (width - 1) / 2
                else:
                    place = (height - 1) / 2 - (t - (line - (width - 1) / 2) * cos) / sin
                low = math.floor(place)
                for at, part in ((low, 1 - (place - low)), (low + 1, place - low)):
                    if 0 <= at < (width if steep else height):
                        a[(k, d, line, at) if steep else (k, d, at, line)] += part / max(abs(cos), abs(sin))
    return a.reshape(len(angles) * detectors, -1)


def matrix(a):
    n = math.prod(a.shape_in)
    return np.asarray(jax.jit(jax.vmap(a))(jnp.eye(n).reshape(n, *a.shape_in))).reshape(n, -1).T


@settings(max_examples=6)
@given(
    problem=st.sampled_from([((4, 4), 6, 1.0), ((3, 5), 4, 0.6), ((5, 2), 5, 1.7), ((1, 4), 9, 0.3)]),
    turn=st.floats(0, 2 * np.pi),
)
def test_both_directions_are_josephs_matrix(problem, turn, x64):
    sides, detectors, spacing = problem
    angles = turn + np.array([0.0, 0.3, 1.1, 2.0])
    a = tomography.radon(sides, angles, detectors, spacing=spacing)
    exact = joseph(sides, angles, detectors, spacing)
    np.testing.assert_allclose(matrix(a), exact, atol=1e-10)
    np.testing.assert_allclose(matrix(a.T), exact.T, atol=1e-10)


def test_the_adjoint_passes_its_test_in_single_precision(key):
    a = tomography.radon((24, 31), even(19).astype(np.float32))
    assert float(imaging.dot_test(a, key)) < 2e-5
    imaging.check_adjoint(a, key)


def test_views_along_the_axes_are_sums(key):
    """θ = 0 looks along the columns, θ = π/2 along the rows, from the bottom up."""
    x = jax.random.normal(key, (5, 5))
    views = tomography.radon((5, 5), np.array([0, np.pi / 2], np.float32), 5, spacing=1.0)(x)
    np.testing.assert_allclose(views, [x.sum(0), x.sum(1)[::-1]], atol=1e-5)


def test_the_transform_approaches_the_line_integrals():
    phantom, errors = tomography.shepp_logan(), []
    for side in (24, 48, 96):
        a = tomography.radon((side, side), even(20).astype(np.float32))
        exact = phantom.sinogram(a)
        errors.append(float(jnp.linalg.norm(a(phantom.image(side)) - exact) / jnp.linalg.norm(exact)))
    # Of first order in the pixel: the edges of the ellipses are jumps.
    assert errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1] and errors[2] < 0.045


def test_line_integrals_of_a_turned_ellipse_by_quadrature(x64):
    ellipse = Ellipses(*map(jnp.asarray, ([[0.2, -0.3]], [[0.5, 0.2]], [0.7], [1.5])))
    a = tomography.radon((10, 10), np.array([0.4, 2.1]), 7, spacing=1.3)
    along = np.linspace(-10, 10, 200_001)
    for view, angle in zip(ellipse.sinogram(a), np.asarray(a.angles), strict=True):
        for value, t in zip(view, a.positions, strict=True):
            x, y = (t * np.cos(angle) - along * np.sin(angle)) / 5, (t * np.sin(angle) + along * np.cos(angle)) / 5
            u = np.cos(0.7) * (x - 0.2) + np.sin(0.7) * (y + 0.3)
            v = np.cos(0.7) * (y + 0.3) - np.sin(0.7) * (x - 0.2)
            inside = (u / 0.5) ** 2 + (v / 0.2) ** 2 <= 1
            assert abs(float(value) - 1.5 * inside.sum() * (along[1] - along[0])) < 1e-3


def test_the_image_of_an_ellipse_has_its_area_and_place():
    image = Ellipses(*map(jnp.asarray, ([[0.5, 0.25]], [[0.3, 0.1]], [0.0], [2.0]))).image(40, oversampling=8)
    assert float(image.sum()) == pytest.approx(2 * np.pi * 0.3 * 0.1 * 400, rel=0.01)
    rows, columns = np.nonzero(np.asarray(image) > 0)
    assert (rows.mean(), columns.mean()) == pytest.approx((19.5 - 5, 19.5 + 10), abs=0.1)  # y is upward


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("filter", ["ramp", "hann"])
def test_back_projection_of_exact_line_integrals_gives_the_phantom(filter, turns):
    """Over half or whole turns; the error falls with the size, also of coarser detectors, and mean values are kept."""
    phantom, errors = tomography.shepp_logan(), []
    for side in (32, 96):
        angles = even(2 * side * turns).astype(np.float32) * turns
        a = tomography.radon((side, side), angles)
        image, exact = tomography.fbp(a, phantom.sinogram(a), filter), phantom.image(side)
        errors.append(float(jnp.sqrt(jnp.mean((image - exact) ** 2))))
        assert float(image.mean()) == pytest.approx(float(exact.mean()), rel=1e-2)
    # The window blurs the thin skull, which at these sizes is as wide as two pixels.
    assert errors[1] < (0.75 if filter == "ramp" else 0.9) * errors[0] and errors[1] < (
        0.045 if filter == "ramp" else 0.075
    )


def test_back_projection_of_a_disk_is_flat_inside_whatever_the_spacing():
    disk = Ellipses(*map(jnp.asarray, ([[0.0, 0.0]], [[0.7, 0.7]], [0.0], [1.0])))
    for spacing in (0.7, 1.0, 1.5):
        a = tomography.radon((64, 64), even(128).astype(np.float32), int(92 / spacing), spacing=spacing)
        inner = tomography.fbp(a, disk.sinogram(a))[24:40, 24:40]
        np.testing.assert_allclose(inner, 1, atol=0.02)


def test_hann_takes_less_noise(key):
    a = tomography.radon((48, 48), even(60).astype(np.float32))
    noise = jax.random.normal(key, a.shape_out)
    ramp, hann = (float(tomography.fbp(a, noise, f).std()) for f in ("ramp", "hann"))
    assert hann < 0.6 * ramp


def test_transformations_and_channels(key):
    a = tomography.radon((2, 6, 7), even(5).astype(np.float32))
    one = tomography.radon((6, 7), even(5).astype(np.float32))
    x = jax.random.normal(key, (3, 2, 6, 7))
    views = jax.jit(jax.vmap(lambda x: a(x)))(x)
    np.testing.assert_allclose(views[1, 1], one(x[1, 1]), atol=1e-5)
    loss = lambda x: jnp.sum(a(x) ** 2) / 2  # noqa: E731
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(x)[2], a.T(a(x[2])), rtol=1e-5, atol=1e-4)
    tangent = jax.jvp(jax.grad(loss), (x[0],), (x[1],))[1]
    np.testing.assert_allclose(tangent, a.T(a(x[1])), rtol=1e-5, atol=1e-4)
    lineax = imaging.as_lineax(one)
    y = jax.random.normal(key, one.shape_out)
    np.testing.assert_allclose(lineax.transpose().mv(y), one.T(y), atol=1e-5)
    back = tomography.fbp(a, views[0])
    np.testing.assert_allclose(back[1], tomography.fbp(one, views[0, 1]), atol=1e-5)


def test_no_derivative_makes_a_scatter():
    """That of the gathers, ten times as slow, is not made: the backward pass is the operator's own."""
    a = tomography.radon((6, 7), even(5).astype(np.float32))
    program = jax.jit(jax.grad(lambda x: jnp.sum(a(x) ** 2))).lower(jnp.ones((6, 7))).as_text()
    assert "gather" in program and "scatter" not in program


def test_the_norm_is_bounded(key):
    a = tomography.radon((12, 12), even(9).astype(np.float32))
    exact = np.linalg.norm(matrix(a), 2) ** 2
    assert exact < float(a.norm_squared_bound) < 1.4 * exact
    lower, upper = imaging.norm_bounds(a, key, 100)
    assert float(lower) == pytest.approx(exact, rel=1e-4) and exact <= float(upper) < 1.1 * exact


def test_random_phantoms_lie_inside_the_image(key):
    phantom = tomography.random_ellipses(key)
    image = phantom.image(32)
    assert phantom.intensities.shape == (13,) and (np.asarray(image)[[0, -1]] == 0).all()
    assert not np.array_equal(image, tomography.random_ellipses(jax.random.fold_in(key, 1)).image(32))
    many = eqx.filter_vmap(lambda k: tomography.random_ellipses(k).image(16))(jax.random.split(key, 3))
    assert many.shape == (3, 16, 16)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tomography.radon((4,), even(3)), r"shape is \(4,\), expected \(height, width\)"),
        (lambda: tomography.radon((4, 4), np.arange(3)), r"angles are int32\[3\], expected a row of real numbers"),
        (lambda: tomography.radon((4, 4), np.zeros(0)), "angles are .*, expected a row"),
        (lambda: tomography.radon((4, 4), even(3), 0), "detectors is 0, expected at least one"),
        (lambda: tomography.radon((4, 4), even(3), spacing=0.0), "spacing is 0.0, expected a positive number"),
        (lambda: tomography.radon((1, 4, 4), even(3))(jnp.ones((3, 4, 4))), "3 channels where 1 are expected"),
        (lambda: tomography.fbp(tomography.radon((4, 4), even(3)), jnp.ones((3, 5))), r"sinogram: has shape \(3, 5\)"),
        (lambda: tomography.fbp(tomography.radon((4, 4), even(3)), jnp.ones((3, 6)), "hamming"), "filter is 'hamming'"),
        (lambda: tomography.shepp_logan().image(0), "side is 0 and oversampling 4, expected at least one"),
        (lambda: tomography.shepp_logan().sinogram(tomography.radon((4, 5), even(3))), "expected a square image"),
        (lambda: tomography.random_ellipses(jax.random.key(0), -1), "count is -1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
