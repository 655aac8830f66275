"""Maps to positive numbers: inverses, slopes against derivatives, densities against quadrature, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative import positive

MAPS = {
    "shift": positive.shift(1.0),
    "shift by a half": positive.shift(0.5),
    "contrast": positive.contrast(1.0),
    "contrast 3": positive.contrast(3.0),
}
NUMBERS = st.lists(st.floats(0.0, 1.0, width=32), min_size=6, max_size=6)


@given(st.sampled_from(sorted(MAPS)), NUMBERS)
def test_there_and_back(name, numbers):
    u = jnp.asarray(numbers, jnp.float32).reshape(2, 3)
    x = MAPS[name].to_positive(u)
    assert (x > 0).all() and x.shape == u.shape
    # One rounding of x, seen through the inverse, whose slope is at most 2 here.
    np.testing.assert_allclose(MAPS[name].to_data(x), u, atol=4e-7)


@given(st.sampled_from(sorted(MAPS)), NUMBERS)
def test_slope_is_the_logarithm_of_the_derivative(name, numbers):
    u = jnp.asarray(numbers, jnp.float32)
    slopes = jax.vmap(jax.grad(MAPS[name].to_positive))(u)
    np.testing.assert_allclose(MAPS[name].log_slope(u), jnp.log(slopes), atol=2e-6)


@pytest.mark.parametrize("name", sorted(MAPS))
def test_density_of_the_data_integrates_to_one(name, x64):
    """x log-normal: u = to_data(x) has the density p_X(x) exp(log_determinant)."""
    there = MAPS[name]
    ends = there.to_data(jnp.exp(jnp.array([-3.0, 3.0])))  # ten standard deviations to either side
    u = jnp.linspace(ends[0], ends[1], 20_001)[:, None]
    y = jnp.log(there.to_positive(u))[:, 0]
    log_density = -(y**2) / (2 * 0.3**2) - jnp.log(0.3 * jnp.sqrt(2 * jnp.pi)) - y + there.log_determinant(u)
    width = float(u[1, 0] - u[0, 0])
    assert float(jnp.exp(log_density).sum() * width) == pytest.approx(1, abs=1e-8)


def test_determinant_is_summed_over_events():
    u = jnp.arange(12.0).reshape(2, 3, 2) / 12
    found = positive.contrast(2.0).log_determinant(u)
    np.testing.assert_allclose(found, np.log(2) * 6 + 2 * np.asarray(u).sum((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(positive.shift(1.0).log_determinant(u), np.zeros(2))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_what_is_not_positive_is_refused_with_a_remedy(bad):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"perturb: x0 holds 1 of 12 .*shift\(1.0\).*contrast\(c\)"):
        positive.check_positive("perturb: x0", x)


def test_positive_numbers_and_traced_ones_pass():
    positive.check_positive("x", jnp.full(3, 1e-30))
    jax.jit(lambda x: positive.check_positive("x", x))(-jnp.ones(3))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_numbers_that_a_traced_function_closes_over_are_known(transform):
    good, bad = jnp.ones(3), jnp.array([1.0, 0.0, -1.0])

    def checked(x, given):
        positive.check_positive("x", given)
        return x * given.sum()

    at = jnp.ones(2) if transform is jax.vmap else jnp.asarray(1.0)
    transform(lambda x: checked(x, good))(at)
    with pytest.raises(ValueError, match=r"x holds 2 of 3 entries"):
        transform(lambda x: checked(x, bad))(at)


def test_maps_refuse_data_that_they_do_not_make_positive():
    with pytest.raises(ValueError, match=r"Shift.to_positive: u \+ by holds 1 of 2"):
        positive.shift(1.0).to_positive(jnp.array([0.0, -1.0]))
    with pytest.raises(ValueError, match=r"Contrast.to_positive: exp\(scale u\) holds 1 of 2"):
        positive.contrast(2.0).to_positive(jnp.array([0.0, 60.0], jnp.float32))
    with pytest.raises(ValueError, match=r"contrast: scale is -1.0"):
        positive.contrast(-1.0)
    with pytest.raises(ValueError, match=r"shift: by is nan"):
        positive.shift(float("nan"))


def test_scale_of_a_map_can_be_learned():
    slope = jax.grad(lambda c: positive.contrast(c).to_positive(jnp.array([0.5])).sum())(jnp.asarray(1.5))
    assert float(slope) == pytest.approx(0.5 * np.exp(0.75), rel=1e-6)


def test_dequantised_pixels_keep_their_level(key):
    pixels = np.arange(256, dtype=np.uint8).repeat(200)
    u = positive.dequantise(key, pixels)
    assert (u >= 0).all() and (u < 1).all()
    np.testing.assert_array_equal(np.floor(np.asarray(u) * 256), pixels)
    within = np.asarray(u) * 256 - pixels
    # Mean of 51 200 uniform numbers: within five standard errors, false once in two million.
    assert abs(within.mean() - 0.5) < 5 * np.sqrt(1 / 12 / within.size)


def test_dequantise_refuses_other_levels(key):
    with pytest.raises(ValueError, match=r"pixels lie in 0 .. 16; expected 0 .. levels - 1 = 15"):
        positive.dequantise(key, np.array([0, 16], np.uint8), levels=16)


def test_bits_per_dimension_of_known_densities():
    flat = jnp.zeros(2)  # uniform on [0, 1]^5
    np.testing.assert_allclose(positive.bits_per_dimension(flat, 5), [8, 8])
    certain = jnp.full(1, 5 * np.log(256.0))  # all mass on one level of each
    np.testing.assert_allclose(positive.bits_per_dimension(certain, 5), [0], atol=1e-6)
