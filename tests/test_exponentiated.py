"""Exponentiated gradients against SciPy's minimiser, mirror maps and gradients in log coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar

from generative import exponentiated as eg
from generative import samplers
from generative.gbm_diffusion import GeometricBrownianMotion
from generative.lognormal import LogNormalMixture

POSITIVE = hnp.arrays(np.float32, 4, elements=st.floats(0.0625, 8, width=32))
GRADIENT = hnp.arrays(np.float32, 4, elements=st.floats(-4, 4, width=32))
RATE = st.floats(0.01, 2.0)


@given(POSITIVE, GRADIENT, RATE)
def test_it_is_mirror_descent_with_the_negative_entropy(w, g, rate):
    found = eg.exponentiated_gradient(jnp.asarray(w), jnp.asarray(g), rate)
    np.testing.assert_allclose(
        found, eg.mirror_step(eg.NegativeEntropy(), jnp.asarray(w), jnp.asarray(g), rate), rtol=2e-6
    )
    assert (np.asarray(found) > 0).all()


@pytest.mark.parametrize(("w", "g", "rate"), [(0.5, 1.3, 0.7), (2.0, -0.4, 1.5), (1e-3, 5.0, 0.1)])
def test_it_is_the_minimiser_of_the_entropic_objective(w, g, rate, x64):
    w, g = jnp.array([w]), jnp.array([g])
    objective = jax.jit(lambda u: eg.entropic_objective(u.reshape(1), w, g, rate))
    best = minimize_scalar(
        lambda u: float(objective(jnp.asarray(u))),
        bounds=(0, 10 * float(w[0])),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert float(eg.exponentiated_gradient(w, g, rate)[0]) == pytest.approx(best.x, rel=1e-5)


@given(POSITIVE, POSITIVE)
def test_relative_entropy_is_the_divergence_of_the_negative_entropy(u, w):
    found = float(eg.relative_entropy(jnp.asarray(u), jnp.asarray(w)))
    exact = float((u.astype(float) * np.log(u.astype(float) / w) - u + w).sum())
    assert found == pytest.approx(exact, abs=2e-5)
    assert float(eg.NegativeEntropy().divergence(jnp.asarray(u), jnp.asarray(w))) == pytest.approx(exact, abs=1e-4)


def test_relative_entropy_of_zeros():
    found = eg.relative_entropy(jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]))
    assert float(found) == 2.0


@given(hnp.arrays(np.float32, 4, elements=st.sampled_from((-2.0, -0.5, 0.0, 0.25, 3.0))), GRADIENT, RATE)
def test_the_signed_step_keeps_signs_and_descends(w, g, rate):
    found = np.asarray(eg.signed_exponentiated_gradient(jnp.asarray(w), jnp.asarray(g), rate))
    assert float(eg.signs_kept(jnp.asarray(w), jnp.asarray(found))) == 1
    assert ((found - w) * g <= 0).all()
    np.testing.assert_allclose(
        found, -np.asarray(eg.signed_exponentiated_gradient(-jnp.asarray(w), -jnp.asarray(g), rate))
    )


def test_signs_kept_sees_a_flip():
    assert float(eg.signs_kept(jnp.array([1.0, -1.0, 0.0, 2.0]), jnp.array([1.0, 1.0, 0.0, -2.0]))) == 0.5


def test_mirror_descent_with_the_half_square_is_gradient_descent():
    w, g = jnp.array([0.1, 2.0]), jnp.array([1.0, -1.0])
    np.testing.assert_allclose(eg.mirror_step(eg.HalfSquare(), w, g, 0.5), [-0.4, 2.5])
    assert float(eg.HalfSquare().divergence(w, g)) == pytest.approx(float(((w - g) ** 2).sum() / 2))


def loss(w):
    return jnp.sum(jnp.sin(w) + w**3 / 5)


def test_log_gradient_is_the_gradient_in_the_logarithm(x64):
    w = jnp.array([0.3, 1.2, 4.0])
    np.testing.assert_allclose(eg.log_gradient(loss, w), jax.grad(lambda y: loss(jnp.exp(y)))(jnp.log(w)), rtol=1e-12)
    np.testing.assert_allclose(eg.log_gradient(loss, -w), jax.grad(lambda y: loss(-jnp.exp(y)))(jnp.log(w)), rtol=1e-12)


def test_the_step_on_the_log_gradient_is_gradient_descent_on_the_logarithm(x64):
    w, g = jnp.array([0.3, -1.2, 4.0]), jax.grad(loss)(jnp.array([0.3, -1.2, 4.0]))
    found = eg.log_gradient_step(w, g, 0.1)
    np.testing.assert_allclose(
        jnp.log(jnp.abs(found)), jnp.log(jnp.abs(w)) - 0.1 * eg.log_gradient(loss, w), rtol=1e-10
    )
    other = eg.signed_exponentiated_gradient(w, g, 0.1)  # another metric, another step
    assert np.abs(np.asarray(other / found) - 1).max() > 0.1


def test_a_step_of_dale_langevin_without_noise_is_the_log_gradient_step(x64):
    """Of the energy -log p_Y(log x): its gradient in x, times x, is -s_Y.  The last step of the sampler is without noise."""
    law, process = (
        LogNormalMixture(jnp.array([0.4, 0.6]), jnp.array([[-1.0], [0.7]]), jnp.array([[0.1], [0.2]])),
        GeometricBrownianMotion(),
    )
    x, t = jnp.array([[0.3], [1.0], [2.5]]), 0.25
    at = law.at(process, t)
    gradient = jax.grad(lambda x: -at.log_prob_of_log(jnp.log(x)).sum())(x)
    step, _ = samplers.sample(jax.random.key(0), law.log_score(process), process, x, jnp.array([t, 0.0]), method="dls")
    rate = 0.8**2 * t
    np.testing.assert_allclose(step, eg.log_gradient_step(x, gradient, rate), rtol=1e-12)
    assert np.abs(np.asarray(step / eg.exponentiated_gradient(x, gradient, rate)) - 1).max() > 0.05


def test_the_optimiser_learns_without_changing_a_sign(key):
    """Least squares whose solution has the signs of the start; then one whose solution has not."""
    features = jax.random.normal(key, (40, 3))
    start = jnp.array([1.0, -1.0, 1.0])

    def trained(solution):
        optimiser = eg.exponentiated(0.1)

        @jax.jit
        def step(w, state):
            g = jax.grad(lambda w: jnp.mean((features @ (w - solution)) ** 2))(w)
            updates, state = optimiser.update(g, state, w)
            return optax.apply_updates(w, updates), state

        w, state = start, optimiser.init(start)
        for _ in range(300):
            w, state = step(w, state)
        return w

    solution = jnp.array([2.0, -0.5, 0.3])
    np.testing.assert_allclose(trained(solution), solution, atol=1e-3)
    other = trained(jnp.array([2.0, 0.5, 0.3]))
    assert float(eg.signs_kept(start, other)) == 1
    one = eg.exponentiated(0.1).update({"w": start}, optax.EmptyState(), {"w": start})[0]["w"]
    np.testing.assert_allclose(start + one, eg.signed_exponentiated_gradient(start, start, 0.1), rtol=1e-6)


def test_the_optimiser_needs_the_parameters():
    with pytest.raises(ValueError, match=r"params is None, expected the parameters"):
        eg.exponentiated(0.1).update(jnp.ones(2), optax.EmptyState())
