"""Plug-and-play iterations: a worked example whose thresholds are known, optimality, certificates, derivatives."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import imaging, plug_and_play, proximal
from solvers.plug_and_play import Status
from solvers.proximal.functional import Regularizer


class Quadratic(NamedTuple):
    """h(x) = ‖A x - b‖²/2 with a dense matrix."""

    matrix: jax.Array
    b: jax.Array

    @property
    def lipschitz(self):
        return jnp.linalg.norm(self.matrix, 2) ** 2

    def grad(self, x):
        return self.matrix.T @ (self.matrix @ x - self.b)

    def prox(self, v, step):
        n = self.matrix.shape[1]
        return jnp.linalg.solve(self.matrix.T @ self.matrix + jnp.eye(n) / step, self.matrix.T @ self.b + v / step)


class Absolute(Regularizer):
    """Σ|x|, convex."""

    def __call__(self, x):
        return jnp.abs(x).sum()

    def prox(self, v, lam=1.0):
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - lam, 0)

    @property
    def weak_convexity(self):
        return 0.0


def steep(y):
    """.1 y + 2 s(8 y) - 1, s the logistic: a proximal map with slope 4.1 at its fixed point 0."""
    return 0.1 * y + 2 * jax.nn.sigmoid(8 * y) - 1


def one(b=0.0):
    return Quadratic(jnp.eye(1), jnp.full(1, b))


def random_problem(key, n=5):
    a = jax.random.normal(key, (n, n), jnp.float64) / np.sqrt(n)
    return Quadratic(a, jax.random.normal(jax.random.fold_in(key, 1), (n,), jnp.float64))


def net(key, n=5, alpha=0.2):
    made = proximal.mlp(key, n, hidden=10, layers=2, beta=5.0, alpha=alpha, dtype=jnp.float64)
    return eqx.tree_at(lambda m: m.output, made, 0.2 * jnp.ones(10))


START = jnp.full(1, 0.4)


@pytest.mark.parametrize(("rho", "converges"), [(0.3, False), (0.4, False), (0.43, True), (0.9, True), (1.5, True)])
def test_admm_converges_from_the_known_threshold_on(rho, converges, x64):
    """With slope d = 4.1 and A = 1 the multiplier at 0 is (1 + d (ρ - 1)) / (ρ + 1), above -1 for ρ > .4118."""
    _, info = plug_and_play.admm(one(), steep, START, rho=rho, max_steps=3000)
    assert bool(info.converged) == converges
    assert int(info.status) == (Status.CONVERGED if converges else Status.MAX_STEPS)


@pytest.mark.parametrize(("eta", "converges"), [(1.2, True), (1.25, False)])
def test_pgd_converges_up_to_the_known_threshold(eta, converges, x64):
    """The multiplier at 0 is d (1 - η), above -1 for η < 1.2439."""
    _, info = plug_and_play.pgd(one(), steep, START, eta=eta, max_steps=3000)
    assert bool(info.converged) == converges


def test_the_two_forms_of_douglas_rachford_are_one(x64, key):
    data, f = random_problem(key), net(key)
    x0 = jax.random.normal(key, (5,), jnp.float64)
    for steps in (1, 7):
        a, _ = plug_and_play.admm(data, f, x0, rho=3.0, max_steps=steps, tolerance=1e-300)
        d, _ = plug_and_play.drs(data, f, x0, rho=3.0, max_steps=steps, tolerance=1e-300)
        np.testing.assert_allclose(a, d, rtol=1e-10)


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("method", ["admm", "drs", "pgd"])
def test_the_answer_is_stationary_with_the_stated_weight(method, lam, x64, key):
    data = random_problem(key)
    prior = proximal.regularizer(net(key))
    large = float(data.lipschitz)
    step = {"eta": 0.9 / large} if method == "pgd" else {"rho": 1.1 * large}
    x, info = getattr(plug_and_play, method)(
        data, prior, jnp.zeros(5), **step, lam=lam, tolerance=1e-12, max_steps=5000
    )
    assert info.converged and info.certificate.holds
    weight = lam / step["eta"] if method == "pgd" else lam * step["rho"]
    np.testing.assert_allclose(data.grad(x) + weight * prior.grad(x), 0, atol=1e-6)


def test_half_quadratic_splitting_minimises_what_it_says(x64, key):
    data = random_problem(key)
    prior = proximal.regularizer(net(key))
    rho = 0.3  # below L_h: it converges for every ρ
    z, info = plug_and_play.hqs(data, prior, jnp.zeros(5), rho=rho, tolerance=1e-12, max_steps=5000)
    assert info.converged and info.certificate.holds
    np.testing.assert_allclose(prior.grad(z) + z - data.prox(z, 1 / rho), 0, atol=1e-7)


def test_a_convex_prior_needs_no_small_step(x64, key):
    data = random_problem(key)
    x, info = plug_and_play.admm(data, Absolute(), jnp.zeros(5), rho=0.5, lam=0.4, tolerance=1e-12, max_steps=20_000)
    assert info.converged and info.certificate.holds
    gradient = np.asarray(data.grad(x))  # optimality of h + 0.2 Σ|x|
    np.testing.assert_allclose(gradient[np.abs(x) > 1e-9], -0.2 * np.sign(x)[np.abs(x) > 1e-9], atol=1e-7)
    assert np.abs(gradient).max() <= 0.2 + 1e-7
    assert plug_and_play.certificate("pgd", data, Absolute(), step=1.9 / float(data.lipschitz)).holds
    assert not plug_and_play.certificate("pgd", data, Absolute(), step=2.1 / float(data.lipschitz)).holds


def test_a_network_with_negative_weights_is_not_certified(x64, key):
    """As after a step of an optimiser that was not followed by `projected`: its Jacobian has negative eigenvalues."""
    good = net(key)
    bad = eqx.tree_at(lambda n: n.output, good, -good.output)
    data = Quadratic(jnp.eye(5) * 2, jnp.ones(5))
    for prior in (bad, proximal.regularizer(bad)):
        known = plug_and_play.certificate("admm", data, prior, step=4.1)
        assert (
            not known.holds and "violated: the denoiser is the proximal map" in str(known) and "projected" in str(known)
        )
    with pytest.raises(ValueError, match="certified: W_k or w has negative entries"):
        proximal.certified(bad)
    seen = []
    jax.jit(lambda n: seen.append(plug_and_play.certificate("admm", data, n, step=4.1)) or 0)(
        eqx.filter(good, eqx.is_array)
    )
    assert not seen[0].holds and "unknown: the denoiser is the proximal map" in str(seen[0])


def test_certificates_name_what_is_violated_and_what_to_do(x64, key):
    data = Quadratic(jnp.eye(5) * 2, jnp.ones(5))
    good = proximal.regularizer(net(key))
    assert plug_and_play.certificate("admm", data, good, step=4.1).holds
    text = str(plug_and_play.certificate("admm", data, good, step=0.1))
    assert "not certified" in text and "violated: ρ > L_h = ‖AᵀA‖: ρ = 0.1, L_h = 4" in text
    assert "take ρ = 4.2, and λ = 0.02381 to keep the weight" in text
    for alpha, words in ((0.0, "finite only on the range"), (1.5, "falls without end")):
        known = plug_and_play.certificate("pgd", data, net(key, alpha=alpha), step=0.1)
        assert not known.holds and words in str(known)
    unknown = plug_and_play.certificate("hqs", data, lambda v: 0.5 * v, step=1.0)
    assert not unknown.holds and "unknown: the denoiser is the proximal map" in str(unknown)
    assert "violated: η < 1/L_h: η = 0.3, L_h = 4; take η < 0.25" in str(
        plug_and_play.certificate("pgd", data, good, step=0.3)
    )


def test_divergence_is_reported(x64):
    _, info = plug_and_play.pgd(one(1.0), lambda v: 3 * v, jnp.ones(1), eta=0.1, max_steps=5000)
    assert int(info.status) == Status.NOT_FINITE and not info.converged
    assert int(info.steps) < 5000 and np.isfinite(np.asarray(info.changes)[: int(info.steps) - 1]).all()


@pytest.mark.parametrize("method", ["admm", "drs"])
def test_divergence_is_reported_with_conjugate_gradients_inside(method, key):
    """Which refuse a right-hand side that is not finite, outside of jit."""
    sensing = imaging.compressed_sensing(key, (4, 4), 6)
    data, run = imaging.LeastSquares(sensing, jnp.ones(6)), getattr(plug_and_play, method)

    def one(data):
        return run(data, lambda v: -3 * v, jnp.ones((4, 4)), rho=0.5, max_steps=500)

    missing = imaging.LeastSquares(sensing, jnp.ones(6).at[2].set(jnp.nan))
    for given, call in ((data, one), (data, eqx.filter_jit(one)), (missing, one)):
        x, info = call(given)
        assert int(info.status) == Status.NOT_FINITE and not info.converged
        assert x.shape == (4, 4) and jnp.isnan(x).all()


@pytest.mark.parametrize("jit", [False, True])
def test_a_multiplier_that_overflows_is_reported(jit):
    """Behind a denoiser that is bounded, and so goes on."""

    def run(b):
        data = Quadratic(jnp.eye(1), b)
        return plug_and_play.admm(data, lambda v: 1e-3 * jnp.tanh(v), jnp.zeros(1), rho=1e-3, max_steps=40)

    x, info = (jax.jit(run) if jit else run)(jnp.full(1, 3e38))
    assert int(info.status) == Status.NOT_FINITE and jnp.isnan(x).all()


def test_the_derivative_of_a_run_that_is_not_finite_is_nan(x64):
    def value(b):
        return plug_and_play.drs(one()._replace(b=b), lambda v: -5 * v, START, rho=0.3, max_steps=5000)[0].sum()

    assert jnp.isnan(jax.grad(value)(jnp.ones(1))).all()


def test_histories(x64, key):
    data, f = random_problem(key), net(key)
    _, info = plug_and_play.hqs(data, f, jnp.ones(5), rho=1.0, tolerance=1e-8, max_steps=500)
    k = int(info.steps)
    assert info.converged and k < 500
    changes = np.asarray(info.changes)
    assert np.isnan(changes[k:]).all() and changes[k - 1] <= 1e-8 < changes[k - 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["admm", "drs", "pgd", "hqs"])
def test_derivatives_are_those_of_the_fixed_point(method, x64, key):
    data, f = random_problem(key), net(key)
    large = float(data.lipschitz)

    def value(b, scale, step):
        named = {"eta" if method == "pgd" else "rho": step}
        prior = proximal.regularizer(eqx.tree_at(lambda m: m.output, f, scale * f.output))
        x, _ = getattr(plug_and_play, method)(
            data._replace(b=b), prior, jnp.zeros(5), **named, lam=0.7, tolerance=1e-13, max_steps=20_000
        )
        return jnp.sum(jnp.sin(x))

    step = jnp.asarray(0.8 / large if method == "pgd" else 1.2 * large)
    at = (data.b, jnp.asarray(1.0), step)
    found = jax.jit(jax.grad(value, (0, 1, 2)))(*at)
    run = jax.jit(value)
    e = 1e-4
    for k, direction in ((0, jnp.eye(5)[2]), (1, 1.0), (2, 1.0)):
        up, down = ([*at[:k], at[k] + s * e * direction, *at[k + 1 :]] for s in (1, -1))
        np.testing.assert_allclose(
            jnp.sum(found[k] * direction), (run(*up) - run(*down)) / (2 * e), rtol=1e-4, atol=1e-7
        )


def test_the_derivative_of_a_run_that_did_not_converge_is_nan(x64):
    def value(b):
        return plug_and_play.admm(one()._replace(b=b), steep, START, rho=0.3, max_steps=50)[0].sum()

    assert jnp.isnan(jax.grad(value)(jnp.zeros(1))).all()


def test_many_signals(x64, key):
    data, f = random_problem(key), net(key)
    b = jax.random.normal(key, (3, 5), jnp.float64)

    def run(b):
        return plug_and_play.admm(data._replace(b=b), f, jnp.zeros(5), rho=5.0, tolerance=1e-10, max_steps=2000)

    many, info = jax.vmap(run)(b)
    assert info.converged.all()
    np.testing.assert_allclose(many[1], run(b[1])[0], atol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, f: plug_and_play.admm(d, f, jnp.zeros(5), rho=0.0), ValueError, "admm: rho is 0.0"),
        (lambda d, f: plug_and_play.pgd(d, f, jnp.zeros(5), eta=-1.0), ValueError, "pgd: eta is -1.0"),
        (
            lambda d, f: plug_and_play.hqs(d, f, jnp.zeros(5), rho=1.0, lam=0.5),
            ValueError,
            r"lam is 0.5.*regularizer\(network\)",
        ),
        (lambda d, f: plug_and_play.drs(d, 3, jnp.zeros(5), rho=1.0), TypeError, "prior is of type int"),
        (lambda d, f: plug_and_play.drs(d, f, jnp.zeros(5), rho=1.0, max_steps=0), ValueError, "max_steps: is 0"),
        (lambda d, f: plug_and_play.certificate("sgd", d, f, step=1.0), ValueError, "method: is 'sgd'"),
    ],
)
def test_bad_input_is_named(call, error, message, x64, key, no_shape_checks):
    with pytest.raises(error, match=message):
        call(random_problem(key), net(key))
