"""Variational inference end to end, as a user writes it: the worked example, wrong input, and everything JAX does to it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy import stats

import vi

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
PIXELS, ROWS = 3, 4


@pytest.fixture(autouse=True)
def no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        yield


# ---- the example -------------------------------------------------------------------------------------------------------


def decode(theta, z):
    return theta["w"] @ jnp.tanh(z) + theta["b"]


def encode(phi, x):
    return phi["w"] @ x, jax.nn.softplus(phi["s"])


def model(theta, x):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("x", dist.Bernoulli(logits=decode(theta, z)).to_event(1), obs=x)


def guide(phi, x):
    numpyro.sample("z", vi.reparam(dist.Normal(*encode(phi, x)).to_event(1)))


@vi.expectation
def elbo(theta, phi, x):
    trace, log_q = vi.sim(guide)(phi, x)
    return vi.log_density(model)(trace, theta, x) - log_q


def loss(key, theta, phi, X):
    return -vi.batch(elbo, in_axes=(None, None, 0))(key, theta, phi, X).mean()


def inputs(dtype=jnp.float32):
    theta = {"w": jnp.array([[1.0], [-0.5], [2.0]], dtype), "b": jnp.array([0.1, 0.0, -0.4], dtype)}
    phi = {"w": jnp.array([[0.5, -0.3, 0.2]], dtype), "s": jnp.array([0.3], dtype)}
    X = jnp.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]], dtype)
    return theta, phi, X


def exact_loss(theta, phi, X):
    """By Gauss-Hermite quadrature over the one latent number, with the densities written out."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def row(x):
        mean, scale = encode(phi, x)
        z = mean[0] + scale[0] * nodes
        logits = jnp.tanh(z)[:, None] * theta["w"][:, 0] + theta["b"]
        log_x = jnp.sum(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits), axis=1)
        log_ratio = -0.5 * z**2 + 0.5 * nodes**2 + jnp.log(scale[0])
        return (log_x + log_ratio) @ (weights / weights.sum())

    return -jnp.mean(jnp.stack([row(x) for x in X]))


def test_the_example_and_its_gradient_are_unbiased(key):
    # Thirteen figures, each a z-test of 20 000 draws; the largest is allowed what happens by chance once in 10^6 runs.
    theta, phi, X = inputs()
    n = 20_000
    draws = jax.jit(jax.vmap(jax.value_and_grad(loss, (1, 2)), (0, None, None, None)))(
        jax.random.split(key, n), theta, phi, X
    )
    exact = jax.value_and_grad(exact_loss, (0, 1))(theta, phi, X)
    z = [
        np.ravel((d.mean(0) - e) / (d.std(0) / n**0.5 + 1e-6))  # 1e-6: rounding of float32
        for d, e in zip(jax.tree.leaves(draws), jax.tree.leaves(exact), strict=True)
    ]
    z = np.concatenate(z)
    assert len(z) == 1 + 3 + 3 + 3 + 1
    assert np.abs(z).max() < stats.norm.isf(1e-6 / (2 * len(z))), z


def test_the_example_follows_the_precision_of_its_parameters(x64, key):
    values, grads = jax.jit(jax.value_and_grad(loss, (1, 2)))(key, *inputs(jnp.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves((values, grads))} == {jnp.dtype("float64")}


def test_a_run_is_a_function_of_its_key(key):
    args = inputs()
    f = jax.jit(loss)
    one, again = f(jax.random.clone(key), *args), f(jax.random.clone(key), *args)
    assert one == again
    assert loss(jax.random.clone(key), *args) == pytest.approx(float(one), rel=1e-5)  # other sums in float32
    assert f(jax.random.fold_in(key, 1), *args) != one


def test_vmap_over_keys_and_scan_over_steps_agree_with_a_loop(key):
    args = inputs()
    keys = jax.random.split(key, 5)
    grad = jax.jit(lambda key: jax.grad(loss, 2)(key, *args)["w"])
    loop = jnp.stack([grad(k) for k in jax.random.clone(keys)])
    mapped = jax.jit(jax.vmap(grad))(jax.random.clone(keys))
    scanned = jax.lax.scan(lambda c, k: (c, grad(k)), 0, jax.random.clone(keys))[1]
    np.testing.assert_allclose(mapped, loop, rtol=1e-5, atol=1e-6)  # the same float32 terms
    np.testing.assert_allclose(scanned, loop, rtol=1e-5, atol=1e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_programmable_vi import inputs, loss

assert jax.device_count() == 8, jax.device_count()
theta, phi, X = inputs()
X = jnp.tile(X, (4, 1))
mesh = Mesh(np.array(jax.devices()), ("rows",))
rows, everywhere = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())

def descend(keys, theta, phi, X):  # five steps, each with the mean of three gradients
    def step(params, keys):
        several = jax.vmap(jax.value_and_grad(lambda p, key: loss(key, *p, X)), (None, 0))
        value, grads = jax.tree.map(lambda v: v.mean(0), several(params, keys))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value
    return jax.lax.scan(step, (theta, phi), keys)

keys = jax.random.split(jax.random.key(0), (5, 3))
alone = jax.jit(descend)(jax.random.clone(keys), theta, phi, X)
spread = jax.jit(descend, in_shardings=(everywhere, everywhere, everywhere, rows))(
    jax.random.clone(keys), *jax.device_put((theta, phi), everywhere), jax.device_put(X, rows)
)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums over rows in another order, five steps of float32
print("agree")
"""


def test_jit_vmap_scan_and_sharding_over_eight_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEBUG_KEY_REUSE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "agree", done.stderr[-2000:]


# ---- other inference on the same programs --------------------------------------------------------------------------------


def conjugate(theta, x):
    z = numpyro.sample("z", vi.reparam(dist.Normal(theta, 1.0)))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_mcmc_of_numpyro_runs_on_the_same_model(key):
    # Posterior N(3/4, 1/2).  NUTS on one normal number: 400 draws are worth a hundred at the least, so that their mean is
    # within 6 standard errors but for one run in 10^8.  NumPyro itself uses keys twice.
    with jax.debug_key_reuse(False):
        mcmc = MCMC(NUTS(conjugate), num_warmup=200, num_samples=400, progress_bar=False)
        mcmc.run(key, 0.0, 1.5)
    z = mcmc.get_samples()["z"]
    assert abs(z.mean() - 0.75) < 6 * 0.5**0.5 / 10
    assert 0.2 < z.var() < 1.2


def test_objectives_by_name_take_the_same_programs(key):
    # log p(x) = log N(1.5; 0, 2).  At the posterior every draw of every objective says so, to rounding in float32.
    def posterior(phi, x):
        numpyro.sample("z", vi.reparam(dist.Normal(phi[0], phi[1])))

    args = jnp.zeros(()), jnp.array([0.75, 0.5**0.5]), jnp.array(1.5)
    expected = stats.norm.logpdf(1.5, 0.0, 2**0.5)
    objectives = {
        vi.vimco(conjugate, posterior, 3): expected,
        vi.elbo(conjugate, vi.normalize(lambda phi, x: conjugate(0.0, x), vi.importance(3, posterior))): expected,
        vi.symmetric_kl(conjugate, posterior, 3): 0.0,
    }
    for objective, value in objectives.items():
        assert jax.jit(objective)(jax.random.clone(key), *args) == pytest.approx(value, abs=1e-5)


# ---- wrong input -----------------------------------------------------------------------------------------------------------


def positive_model(theta, x):
    z = numpyro.sample("z", dist.Gamma(2.0, theta))
    numpyro.sample("x", dist.Poisson(z), obs=x)


def elsewhere(phi, x):
    numpyro.sample("w", vi.reparam(dist.Normal(phi, 1.0)))


def plain(phi, x):
    numpyro.sample("z", vi.reparam(dist.Normal(phi, 1.0)))


def unobserved(theta, x):
    z = numpyro.sample("z", dist.Normal(theta, 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0))


@pytest.mark.parametrize(
    ("objective", "error", "words"),
    [
        (vi.elbo(conjugate, elsewhere), vi.AddressError, ["'z'", "'w'"]),
        (vi.elbo(unobserved, plain), vi.AddressError, ["'x'"]),
        (vi.elbo(positive_model, plain), vi.SupportError, ["'z'", "Positive"]),
        (
            vi.expectation(lambda t, p, x: vi.sim(plain)(p, x)[0]["z"] * jnp.ones(2)),
            ValueError,
            ["float32[2]", "scalar"],
        ),
        (vi.expectation(lambda t, p, x: vi.sim(plain)(p, x)), ValueError, ["scalar"]),
        (
            vi.expectation(lambda t, p, x: jnp.where(vi.sample(vi.reparam(dist.Normal(p, 1.0)), "z") > 0, 1.0, 0.0)),
            vi.StrategyError,
            ["z", "comparison"],
        ),
    ],
    ids=["addresses", "observation", "support", "vector", "tuple", "smoothness"],
)
def test_wrong_programs_are_named(objective, error, words, key):
    with pytest.raises(error) as caught:
        jax.grad(objective, 2)(key, jnp.ones(()), jnp.ones(()), jnp.ones(()))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_integer_parameters_have_no_gradient(key):
    with pytest.raises(TypeError, match="int32"):
        jax.grad(vi.elbo(conjugate, plain), 2)(key, jnp.ones(()), jnp.array(1), jnp.ones(()))
