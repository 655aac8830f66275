"""Training data of the learned direction: Lanczos against dense eigenvectors, the paper's coefficients, pairs with A x = r."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import dense, open_laplacian, path_laplacian, positive

from solvers import direction_data as dd

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


# --- Lanczos and Ritz vectors ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-13), (jnp.float32, 1e-5)])
def test_lanczos_is_an_orthonormal_tridiagonalisation(dtype, tolerance):
    """On a grid, up to the last step, where the eigenvalues are those of the matrix; tolerances are some fifty roundings."""
    a = positive(3, 24, 1e3)
    operator = lambda v: (jnp.asarray(a, v.dtype) @ v.ravel()).reshape(v.shape)  # noqa: E731
    start = jnp.asarray(np.random.default_rng(5).standard_normal((4, 6)), dtype)
    found = jax.jit(partial(dd.lanczos, operator, steps=24))(start)
    assert found.basis.shape == (24, 4, 6)
    assert found.basis.dtype == found.diagonal.dtype == dtype
    assert found.steps == 24
    q = np.asarray(found.basis, np.float64).reshape(24, 24)
    t = np.diag(found.diagonal) + np.diag(found.off_diagonal, 1) + np.diag(found.off_diagonal, -1)
    np.testing.assert_allclose(q[0], start.ravel() / np.linalg.norm(start), rtol=0, atol=tolerance)
    np.testing.assert_allclose(q @ q.T, np.eye(24), atol=tolerance)
    np.testing.assert_allclose(q @ a @ q.T, t, atol=1e3 * tolerance)
    ritz = dd.ritz_vectors(found)
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(a), atol=1e3 * tolerance)
    v = np.asarray(ritz.vectors, np.float64).reshape(24, 24)
    np.testing.assert_allclose(a @ v.T, v.T * np.asarray(ritz.values, np.float64), atol=1e3 * tolerance)


def test_a_few_steps_find_the_ends_of_the_spectrum():
    """Ritz values interlace, and the largest converges first.

    By Kaniel and Paige its error falls with T(1 + 2γ)⁻², T the Chebyshev polynomial of degree 59 and γ = 0.035 the relative
    gap of the largest eigenvalue: below 1e-17, less than rounding.
    """
    a = positive(6, 200, 1e3)
    w, v = np.linalg.eigh(a)
    start = jnp.asarray(np.random.default_rng(6).standard_normal(200))
    ritz = dd.ritz_vectors(dd.lanczos(partial(jnp.matmul, jnp.asarray(a)), start, 60))
    assert (np.asarray(ritz.values) >= w[:60] - 1e-10).all()
    assert (np.asarray(ritz.values) <= w[-60:] + 1e-10).all()
    np.testing.assert_allclose(ritz.values[-1], w[-1], rtol=1e-12)
    assert abs(v[:, -1] @ np.asarray(ritz.vectors[-1])) > 1 - 1e-10
    np.testing.assert_allclose(np.linalg.norm(ritz.vectors, axis=1), 1, rtol=1e-12)


def test_an_exhausted_space_ends_the_recurrence():
    """Three eigenvalues: three steps; what follows stands for nothing."""
    values = jnp.repeat(jnp.asarray([1.0, 2.0, 5.0]), 4)
    operator = partial(jnp.multiply, values)
    found = dd.lanczos(operator, jnp.asarray(np.random.default_rng(7).standard_normal(12)), 8)
    assert found.steps == 3
    assert (found.basis[3:] == 0).all()
    ritz = dd.ritz_vectors(found)
    np.testing.assert_allclose(ritz.values, [0, 0, 0, 0, 0, 1, 2, 5], atol=1e-13)
    assert dd.lanczos(operator, jnp.zeros(12), 3).steps == 0


def test_lanczos_names_bad_input():
    with pytest.raises(ValueError, match="steps is 0"):
        dd.lanczos(open_laplacian, jnp.ones(4), 0)
    with pytest.raises(ValueError, match=r"makes \(3,\) of \(4,\)"):
        dd.lanczos(jnp.diff, jnp.ones(4), 2)


# --- data ---


def exact_ritz(operator, n):
    values, vectors = np.linalg.eigh(dense(operator, n))
    return dd.Ritz(jnp.asarray(values), jnp.asarray(vectors.T))


def test_coefficients_of_the_training_set(key):
    """Unit vectors whose shares in the low Ritz vectors are nine times larger, none in the null space.

    Of 16 values one is null; of the 15 others the 8 lowest count as low, by default 16//2 + 16//20.
    """
    ritz = exact_ritz(path_laplacian, 16)
    r = np.asarray(dd.training_set(key, 4000, ritz))
    assert r.shape == (4000, 16)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 1, rtol=1e-12)
    shares = r @ np.asarray(ritz.vectors).T
    assert abs(shares[:, 0]).max() < 1e-12
    assert abs(r.sum(1)).max() < 1e-12
    # Ratios to the last share are the normals' own.  The mean of log|c| has the standard error 1.11/√4000 = 0.018, the
    # difference of two 0.025; 6 of these are exceeded with probability 2e-9.
    size = np.log(abs(shares[:, 1:])).mean(0)
    np.testing.assert_allclose(size - size[-1], np.log([9.0] * 8 + [1.0] * 7), atol=0.15)
    few = np.asarray(dd.training_set(key, 4000, ritz, low=3, boost=2.0)) @ np.asarray(ritz.vectors).T
    size = np.log(abs(few[:, 1:])).mean(0)
    np.testing.assert_allclose(size - size[-1], np.log([2.0] * 3 + [1.0] * 12), atol=0.15)


def test_pairs_belong_together_however_rough_the_ritz_vectors(key):
    start = jnp.asarray(np.random.default_rng(8).standard_normal(40))
    ritz = dd.ritz_vectors(dd.lanczos(path_laplacian, path_laplacian(start), 6))
    r, x = jax.jit(partial(dd.training_pairs, count=5, ritz=ritz, operator=path_laplacian))(key)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(x) @ dense(path_laplacian, 40), r, atol=1e-12)
    # With exact eigenvectors the residuals are those of the paper.
    ritz = exact_ritz(path_laplacian, 16)
    pairs = dd.training_pairs(key, 5, ritz, path_laplacian)
    np.testing.assert_allclose(pairs.r, dd.training_set(key, 5, ritz), atol=1e-11)


def test_data_names_bad_input(key):
    ritz = exact_ritz(open_laplacian, 4)
    with pytest.raises(ValueError, match="count is 0"):
        dd.training_set(key, 0, ritz)
    with pytest.raises(ValueError, match="low 5; expected at least 1, and 0 to 4"):
        dd.training_set(key, 1, ritz, low=5)
