"""Imaging operators against SciPy's convolutions and dense matrices, bounds of norms, and the data term they make."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import imaging, plug_and_play
from solvers.imaging import LeastSquares
from solvers.proximal.functional import Regularizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNEL = jnp.asarray([[0.1, 0.3, -0.1], [0.2, 0.5, 0.1], [0.0, 0.2, 0.4]])  # no symmetry that could hide a flip


def matrix(a):
    """The matrix of an operator on flattened arrays, column by column, in float64."""
    n = math.prod(a.shape_in)
    columns = jax.jit(jax.vmap(a))(jnp.eye(n).reshape(n, *a.shape_in))
    return np.asarray(columns, float).reshape(n, -1).T


def product(matrix, x):
    return jnp.matmul(matrix, x, precision="highest")  # on a GPU factors are else rounded to ten bits


def operators(key, sides=(5, 6)):
    mask = jax.random.bernoulli(key, 0.5, sides)
    dense = jax.random.normal(key, (4, math.prod(sides)))
    return {
        "circular": imaging.blur(KERNEL, sides),
        "full": imaging.blur(KERNEL, sides, boundary="full"),
        "inpainting": imaging.inpainting(mask),
        "sensing": imaging.compressed_sensing(key, sides, 7),
        "functions": imaging.from_functions(
            lambda x: product(dense, x.reshape(-1)), lambda y: product(dense.T, y).reshape(sides), sides
        ),
        "transposed": imaging.from_functions(lambda x: product(dense, x.reshape(-1)), None, sides),
        "lineax": imaging.from_lineax(lineax.MatrixLinearOperator(dense[:, :5])),
    }


NAMES = ("circular", "full", "inpainting", "sensing", "functions", "transposed", "lineax")

# ------------------------------------------------------------------------------------------------------- operators


@settings(max_examples=15)
@given(
    problem=st.sampled_from([((7, 8), (3, 3)), ((2, 5, 4), (2, 3)), ((3, 3), (1, 2)), ((3, 3), (3, 3))]),
    seed=st.integers(0, 99),
)
def test_blur_is_the_convolution_of_scipy(problem, seed):
    sides, size = problem
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=sides).astype(np.float32), rng.normal(size=size).astype(np.float32)
    flat = x.reshape(-1, *sides[-2:])
    full = np.stack([scipy.signal.convolve2d(c, kernel) for c in flat])
    got = imaging.blur(kernel, sides, boundary="full")(jnp.asarray(x))
    np.testing.assert_allclose(got, full.reshape(got.shape), atol=1e-5)
    # SciPy's correlation centres a kernel at size // 2; its convolution, a kernel of even side one further on.
    around = np.stack(
        [
            scipy.ndimage.correlate(np.pad(c, 3, "wrap"), kernel[::-1, ::-1], origin=[-(1 - n % 2) for n in size])
            for c in flat
        ]
    )
    got = imaging.blur(kernel, sides)(jnp.asarray(x))
    np.testing.assert_allclose(got, around[:, 3:-3, 3:-3].reshape(sides), atol=1e-5)


def test_sizes_of_gaussian_kernels():
    assert [imaging.gaussian_kernel(None, s).shape[0] for s in (1.0, 2.0, 3.0)] == [5, 7, 9]
    kernel = np.asarray(imaging.gaussian_kernel(5, 0.7))
    r2 = np.add.outer(np.arange(-2, 3) ** 2, np.arange(-2, 3) ** 2)
    np.testing.assert_allclose(np.log(kernel / kernel[2, 2]), -r2 / (2 * 0.49), rtol=1e-5, atol=1e-6)
    assert abs(kernel.sum() - 1) < 1e-6


def test_inpainting_keeps_the_known_pixels(key):
    mask = jnp.asarray([[True, False], [False, True]])
    a, x = imaging.inpainting(mask, (3, 2, 2)), jax.random.normal(key, (3, 2, 2))
    np.testing.assert_array_equal(a(x), np.where(np.asarray(mask), x, 0))


def test_compressed_sensing_is_its_formula(key, x64):
    a, x = imaging.compressed_sensing(key, (3, 4, 5), 11), jax.random.normal(key, (3, 4, 5))
    n, signs, filter = 60, np.asarray(a.signs), np.asarray(a.filter)
    assert set(signs) == {-1.0, 1.0} and len(set(np.asarray(a.kept).tolist())) == 11
    # F⁻¹[F(u) F(a)] with orthonormal transforms is the sum over all shifts, divided by √n.
    spread = signs * np.asarray(x).reshape(-1)
    whole = [sum(filter[(i - j) % n] * spread[j] for j in range(n)) / np.sqrt(n) for i in range(n)]
    np.testing.assert_allclose(a(x), np.asarray(whole)[np.asarray(a.kept)], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_is_the_transposed_matrix(name, key):
    a = operators(key)[name]
    assert a.T.shape_in == a.shape_out and a.T.shape_out == a.shape_in and a.T.T is a
    np.testing.assert_allclose(matrix(a.T), matrix(a).T, atol=2e-5)
    imaging.check_adjoint(a, key)
    imaging.check_adjoint(a.T, key)


def test_a_pair_that_is_not_adjoint_is_found(key):
    """Blurs of the right size that are shifted, flipped, scaled or barely changed: off by 1e-3 still shows."""
    right = imaging.blur(KERNEL, (8, 9))
    for kernel in (KERNEL, KERNEL[::-1, ::-1] * 1.001, jnp.roll(KERNEL[::-1, ::-1], 1, 0)):
        wrong = imaging.blur(kernel, (8, 9))
        pair = imaging.from_functions(right, wrong, (8, 9), check=False)
        mismatch = float(imaging.dot_test(pair, key))
        dense = matrix(right) - matrix(wrong).T
        size = np.sqrt((np.linalg.norm(matrix(right)) ** 2 + np.linalg.norm(matrix(wrong)) ** 2) / 2)
        # Four normal numbers of that deviation: outside of a factor of five with 1e-5, and of 2.5 above with 2e-5.
        assert 0.04 < mismatch / (np.linalg.norm(dense) / size) < 2.6
        with pytest.raises(ValueError, match=r"A\.T is not the adjoint of A, .* differ by [0-9.e-]+ of their size"):
            imaging.check_adjoint(pair, key)
        with pytest.raises(ValueError, match=r"A\.T is not the adjoint of A"):
            imaging.from_functions(right, wrong, (8, 9))
    imaging.check_adjoint(imaging.from_functions(right, imaging.blur(KERNEL[::-1, ::-1], (8, 9)), (8, 9)), key)
    with pytest.raises(ValueError, match="differ by nan"):
        imaging.from_functions(lambda x: x * jnp.nan, lambda y: y, (3,))


def test_a_pair_is_tried_where_there_are_numbers(x64, key):
    """Not in transformations; to the precision of what the functions return; neither affine nor complex ones pass."""

    def slope(build):
        return jax.grad(lambda s: build(s)(jnp.ones(3)).sum())(2.0)

    def wrong(scale):
        return imaging.from_functions(lambda x: scale * x, lambda y: 2 * scale * y, (3,))

    with pytest.raises(ValueError, match=r"A\.T is not the adjoint of A"):
        wrong(2.0)
    assert slope(wrong) == 3.0
    assert (jax.jit(lambda x: wrong(2.0)(x))(jnp.ones(3)) == 2.0).all()
    assert (jax.vmap(lambda s: wrong(s)(jnp.ones(3)))(jnp.arange(2.0)) == jnp.array([[0.0], [1.0]])).all()
    matrix = jax.random.normal(key, (4, 3), jnp.float32)
    imaging.from_functions(lambda x: matrix @ x.astype(jnp.float32), lambda y: matrix.T @ y.astype(jnp.float32), (3,))
    with pytest.raises(ValueError, match=r"A\.T is not the adjoint of A"):
        imaging.from_functions(lambda x: x + 1, lambda y: y, (3,))
    with pytest.raises(ValueError, match="returns complex128, expected real numbers"):
        imaging.from_functions(lambda x: x + 0j, lambda y: y, (3,))


@pytest.mark.parametrize("name", NAMES)
def test_operators_go_through_jit_vmap_and_derivatives(name, key):
    a = operators(key)[name]
    many = jax.random.normal(key, (3, *a.shape_in))
    dense = np.asarray(matrix(a))  # in NumPy, as products on a GPU round factors to ten bits
    one_by_one = np.asarray(many).reshape(3, -1) @ dense.T
    one_by_one = one_by_one.reshape(3, *a.shape_out)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda a, x: a(x), (None, 0)))(a, many), one_by_one, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(a(x) ** 2) / 2))(many[0])
    np.testing.assert_allclose(gradient.reshape(-1), dense.T @ dense @ np.asarray(many[0]).reshape(-1), atol=3e-5)


def test_results_keep_the_dtype_of_the_image(key, x64):
    for name, a in operators(key).items():
        if name in ("circular", "full", "inpainting", "sensing"):
            for dtype in (jnp.float32, jnp.float64):
                image = jax.eval_shape(a, jax.ShapeDtypeStruct(a.shape_in, dtype))
                assert image.dtype == dtype and jax.eval_shape(a.T, image).dtype == dtype, name


def test_the_kernel_has_a_derivative(key, x64):
    x, b = jax.random.normal(key, (6, 5)), jax.random.normal(key, (8, 7))

    def h(kernel):
        return LeastSquares(imaging.blur(kernel, (6, 5), boundary="full"), b)(x)

    kernel = KERNEL.astype(jnp.float64)
    along = jax.random.normal(jax.random.fold_in(key, 1), kernel.shape)
    forward, (gradient,), (plus, minus) = _derivatives(h, (kernel,), (along,), 1e-5)
    np.testing.assert_allclose([forward, jnp.vdot(gradient, along)], [(plus - minus) / 2e-5] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["full", "sensing", "functions", "lineax"])
def test_lineax_sees_the_same_matrix(name, key):
    a = operators(key)[name]
    there = imaging.as_lineax(a)
    n = math.prod(a.shape_in)
    # lineax flattens neither side: its matrix is indexed by both shapes.
    np.testing.assert_allclose(there.as_matrix().reshape(-1, n), matrix(a), atol=1e-5)
    y = jax.random.normal(key, a.shape_out)
    np.testing.assert_allclose(there.transpose().mv(y), a.T(y), atol=2e-5)
    back = imaging.from_lineax(there)
    imaging.check_adjoint(back, key)
    np.testing.assert_allclose(matrix(back), matrix(a), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_bounded_from_both_sides(name, key):
    a = operators(key)[name]
    exact = np.linalg.norm(matrix(a), 2) ** 2
    lower, upper = imaging.norm_bounds(a, key)
    assert exact * (1 - 1e-4) <= float(lower) <= exact * (1 + 1e-5)
    assert exact * (1 - 1e-5) <= float(upper)
    assert float(imaging.operator_norm_squared(a, key)) == float(lower)
    assert float(imaging.operator_norm_squared(a.T, key)) == pytest.approx(exact, rel=1e-4)
    bound = a.norm_squared_bound
    assert bound is None or float(bound) >= exact * (1 - 1e-5)
    assert (bound is None) == (name in ("functions", "transposed", "lineax"))
    assert (a.norm_squared is not None) == (name in ("circular", "inpainting"))


def test_the_bound_from_above_needs_few_steps_and_is_wrong_as_rarely_as_it_says(key):
    """A spectrum dense at its end, where the Ritz value is off by more than a per cent after ten steps."""
    values = jnp.sqrt(jnp.linspace(0.0, 1.0, 400))
    a = imaging.from_functions(lambda x: values * x, lambda y: values * y, (400,))
    bounds = jax.vmap(lambda k: imaging.norm_bounds(a, k, 10, failure=0.5))(jax.random.split(key, 200))
    assert float(bounds.lower.max()) < 0.999
    # The theorem allows half of them to be below one; it is not sharp, and with none at all it still is a bound.
    assert float((bounds.upper < 1).mean()) <= 0.5
    assert float(imaging.norm_bounds(a, key, 2).upper) == np.inf
    tight = imaging.norm_bounds(a, key, 100)
    assert 1 <= float(tight.upper) < 1.03


@pytest.mark.parametrize(("sigma", "size"), [(1.0, 5), (2.0, 7)])
def test_the_norm_of_a_full_blur_is_that_of_its_profile(sigma, size, key):
    """Squared, as a Gaussian is a product; below the bound 1, the square of the sum of the kernel."""
    profile = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    narrow = scipy.linalg.toeplitz(np.r_[profile / profile.sum(), np.zeros(47)], np.zeros(48))
    exact = np.linalg.norm(narrow, 2) ** 4
    a = imaging.blur(imaging.gaussian_kernel(size, sigma), (48, 48), "full")
    assert float(imaging.operator_norm_squared(a, key)) == pytest.approx(exact, rel=1e-4)
    assert exact < float(a.norm_squared_bound) == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------------------- data term


@pytest.mark.parametrize("name", ["circular", "full", "inpainting", "sensing", "functions"])
def test_data_term_is_least_squares(name, key, x64):
    a = operators(key)[name]
    m, n = matrix(a), math.prod(a.shape_in)
    keys = jax.random.split(key, 2)
    b, v = jax.random.normal(keys[0], a.shape_out), jax.random.normal(keys[1], a.shape_in)
    h = LeastSquares(a, b, weight=0.7, tolerance=1e-10)
    flat_b, flat_v = np.asarray(b).reshape(-1), np.asarray(v).reshape(-1)
    assert float(h(v)) == pytest.approx(0.35 * np.sum((m @ flat_v - flat_b) ** 2), rel=1e-9)
    np.testing.assert_allclose(h.grad(v).reshape(-1), 0.7 * m.T @ (m @ flat_v - flat_b), atol=1e-9)
    step = 3.0
    exact = np.linalg.solve(0.7 * m.T @ m + np.eye(n) / step, 0.7 * m.T @ flat_b + flat_v / step)
    np.testing.assert_allclose(jax.jit(lambda h, v: h.prox(v, step))(h, v).reshape(-1), exact, atol=1e-8)
    assert (a.regularized_inverse(v, 1.0) is not None) == (name in ("circular", "inpainting"))
    if h.lipschitz is not None:
        assert float(h.lipschitz) >= 0.7 * np.linalg.norm(m, 2) ** 2 * (1 - 1e-6)
    else:
        assert name == "functions"
        assert LeastSquares(a, b, weight=0.5, norm_squared=4.0).lipschitz == 2.0


def _derivatives(f, point, along, step):
    """Forward along a direction, backward, and the two values that a difference needs, in one program."""

    @jax.jit
    def run(point, along):
        ends = [f(*(p + s * t for p, t in zip(point, along, strict=True))) for s in (step, -step)]
        return jax.jvp(f, point, along)[1], jax.grad(f, tuple(range(len(point))))(*point), ends

    return run(point, along)


@pytest.mark.parametrize("name", ["circular", "sensing"])
def test_derivatives_of_the_proximal_map(name, key, x64):
    """In b, v and the step, closed form or conjugate gradients, batched too."""
    a = operators(key)[name]
    keys = jax.random.split(key, 5)
    point = jax.random.normal(keys[0], a.shape_out), jax.random.normal(keys[1], a.shape_in), jnp.asarray(0.7)
    along = jax.random.normal(keys[2], a.shape_out), jax.random.normal(keys[3], a.shape_in), jnp.asarray(0.3)
    weights = jax.random.normal(keys[4], a.shape_in)

    def f(b, v, step):
        return jnp.vdot(weights, LeastSquares(a, b, tolerance=1e-12).prox(v, step))

    forward, gradients, (plus, minus) = _derivatives(f, point, along, 1e-5)
    backward = sum(jnp.vdot(g, t) for g, t in zip(gradients, along, strict=True))
    np.testing.assert_allclose([forward, backward], [(plus - minus) / 2e-5] * 2, rtol=1e-6)
    many = jnp.stack([point[1], along[1]])
    h = LeastSquares(a, point[0], tolerance=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda v: h.prox(v)))(many)[1], h.prox(many[1]), atol=1e-9)


def test_a_map_that_was_not_solved_is_nan(key):
    a = operators(key)["sensing"]
    h = LeastSquares(a, jnp.ones(7), max_steps=1)
    assert np.isnan(h.prox(jnp.ones(a.shape_in), 100.0)).all()
    x, info = h.solve(jnp.ones(a.shape_in), 100.0)
    assert np.isfinite(x).all() and not bool(info.converged)


class Absolute(Regularizer):
    """.05 Σ|x|."""

    def __call__(self, x):
        return 0.05 * jnp.abs(x).sum()

    def prox(self, v, lam=1.0):
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.05 * lam, 0)

    @property
    def weak_convexity(self):
        return 0.0


@pytest.mark.parametrize("name", ["circular", "sensing"])
def test_it_is_a_data_term_for_plug_and_play(name, key):
    """ADMM with conjugate gradients inside and proximal gradient descent meet at a point where 0 ∈ ∇h + ∂R."""
    a = operators(key)[name]
    b = a(jax.random.normal(key, a.shape_in))
    h = LeastSquares(a, b, norm_squared=imaging.norm_bounds(a, key).upper)
    z, info = plug_and_play.admm(h, Absolute(), jnp.zeros(a.shape_in), rho=0.3, lam=1 / 0.3, max_steps=3000)
    eta = 1 / float(h.lipschitz)
    x, there = plug_and_play.pgd(h, Absolute(), jnp.zeros(a.shape_in), eta=eta, lam=eta, tolerance=1e-6, max_steps=5000)
    assert bool(info.converged) and bool(there.converged) and there.certificate.holds
    np.testing.assert_allclose(h(z) + Absolute()(z), h(x) + Absolute()(x), rtol=1e-4)
    slope = np.asarray(h.grad(x))
    assert (np.abs(slope) <= 0.05 * 1.01).all()
    np.testing.assert_allclose(slope[np.asarray(x) != 0], -0.05 * np.sign(np.asarray(x)[np.asarray(x) != 0]), atol=2e-3)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: imaging.blur(KERNEL, (1, 8, 8))(jnp.ones((3, 8, 8))), r"x: has shape \(3, 8, 8\), .* 3 channels where 1"),
        (lambda: imaging.blur(KERNEL, (8, 8))(jnp.ones((5, 8, 8))), r"the operator is for \(8, 8\); for many images use"),
        (lambda: imaging.blur(KERNEL, (8, 8), "full").T(jnp.ones((8, 8))), r"x: has shape \(8, 8\), .* \(10, 10\)"),
        (lambda: imaging.blur(KERNEL, (8, 8))(jnp.ones((8, 8), int)), "x: has dtype int32, expected real numbers"),
        (lambda: imaging.blur(KERNEL, (8,)), r"shape is \(8,\), expected \(height, width\)"),
        (lambda: imaging.blur(KERNEL, (0, 8)), "expected positive sides"),
        (lambda: imaging.blur(KERNEL, (2, 8)), r"kernel has shape \(3, 3\), expected at most that of the image, \(2, 8\)"),
        (lambda: imaging.blur(KERNEL[0], (8, 8)), r"kernel is float32\[3\], expected real numbers"),
        (lambda: imaging.blur(KERNEL, (8, 8), "same"), "boundary is 'same', expected 'circular' or 'full'"),
        (lambda: imaging.gaussian_kernel(4, 1.0), "size is 4, expected an odd positive number"),
        (lambda: imaging.gaussian_kernel(5, 0.0), "sigma is 0.0, expected a positive number"),
        (lambda: imaging.inpainting(jnp.ones((3, 3))), "mask has dtype float32, expected booleans"),
        (lambda: imaging.inpainting(jnp.ones((3, 3), bool), (1, 4, 4)), r"mask has shape \(3, 3\), the images \(1, 4, 4\)"),
        (lambda: imaging.compressed_sensing(jax.random.key(0), (3, 3), 10), "rows is 10, expected 1 to 9"),
        (lambda: imaging.from_functions(lambda x: (x, x), None, (3,)), "apply returns tuple, expected an array"),
        (lambda: imaging.from_functions(lambda x: x[:2], lambda y: y, (3,)), r"adjoint maps \(2,\) to \(2,\), expected \(3,\)"),
        (lambda: imaging.from_lineax(lineax.IdentityLinearOperator((jax.eval_shape(lambda: jnp.ones(2)),) * 2)), "in_structure"),
        (lambda: imaging.norm_bounds(imaging.blur(KERNEL, (3, 3)), jax.random.key(0), 0), "steps is 0"),
        (lambda: imaging.norm_bounds(imaging.blur(KERNEL, (3, 3)), jax.random.key(0), failure=1.0), "failure is 1.0"),
        (lambda: LeastSquares(imaging.blur(KERNEL, (8, 8)), jnp.ones((9, 8))), r"b: has shape \(9, 8\)"),
        (lambda: LeastSquares(imaging.blur(KERNEL, (3, 3)), jnp.ones((3, 3)), weight=0.0), "weight: is 0.0"),
        (lambda: LeastSquares(imaging.blur(KERNEL, (3, 3)), jnp.ones((3, 3))).prox(jnp.ones((4, 3))), r"v: has shape \(4, 3\)"),
        (lambda: LeastSquares(imaging.blur(KERNEL, (3, 3)), jnp.ones((3, 3))).prox(jnp.ones((3, 3)), 0.0), "step: is 0.0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_operator_compiles_once_per_shape(key):
    """Other kernels and masks of the same shape are data, not code."""
    traced = []

    @eqx.filter_jit
    def apply(a, x):
        traced.append(0)
        return a(x)

    for k in jax.random.split(key, 3):
        apply(imaging.blur(jax.random.normal(k, (3, 3)), (6, 6)), jnp.ones((6, 6)))
    assert len(traced) == 1
