"""Agreement with other libraries, each test skipped with the reason where its peer is absent; and the adapters.

The adapters' own rules (what is said when a peer is missing or too old) are tested with small packages made for it, so
they are checked everywhere.
"""

import importlib
import importlib.util
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.sparse.linalg
from numpyro.infer.util import log_density
from scipy import stats

from paper_checks import peers
from theory import sgd_stability as sgd

RARE = 1e-6
"""Error rate of each of the statistical tests of this file; there are three."""


# Decided without the adapters: a defect of theirs must fail, not skip.
@pytest.fixture
def nt():
    if importlib.util.find_spec("neural_tangents") is None:
        pytest.skip("neural-tangents is not installed")
    if jax.__version_info__ >= (0, 6):
        pytest.skip(f"neural-tangents needs jax 0.5, here it is {jax.__version__}")
    return peers.neural_tangents()


@pytest.fixture
def gen():
    if importlib.util.find_spec("genjax") is None:
        pytest.skip("genjax is not installed")
    return peers.genjax()


# ---------------------------------------------------------------------------------------------- neural-tangents


def mlp(params, x):
    hidden = jnp.tanh(params["w1"] @ x + params["b1"])
    return jax.nn.softplus(params["w2"] @ hidden) @ params["w3"]


def mlp_params(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {"w1": (6, 3), "b1": (6,), "w2": (4, 6), "w3": (4,)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


@pytest.mark.parametrize("implementation", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"])
def test_gram_matrix_is_the_empirical_ntk(nt, x64, key, implementation):
    k_params, k_x = jax.random.split(key)
    n = 7
    params, x = mlp_params(k_params), jax.random.normal(k_x, (n, 3))
    kernel = nt.empirical_ntk_fn(
        jax.vmap(mlp, (None, 0)),
        trace_axes=(),
        vmap_axes=0,
        implementation=nt.NtkImplementation[implementation],
    )
    ntk = jax.jit(lambda p: kernel(x, None, p))(params)
    gram = sgd.gram_matrix(mlp, params, x, block=3)
    # Sums of 52 products: rounding is a few eps of the largest entry, in either library.
    np.testing.assert_allclose(n * gram, ntk, rtol=0, atol=1e-13 * float(jnp.abs(ntk).max()))


def test_mean_gram_matrix_of_random_relu_networks_is_the_analytic_ntk(nt, x64, key):
    """E[n K] of the random two-layer network is m times a kernel that neural-tangents has in closed form, at any width.

    With w = d^(-1/4) v the pre-activations are those of NTK parametrisation with W_std² = √d, so that the derivatives by
    a give its NNGP kernel; those by w are d^(1/4) times its derivatives, hence √d times the rest of its NTK.
    """
    n, d, neurons, widths = 4, 5, 1 << 17, (1, 512)
    k_x, k_networks = jax.random.split(key)
    x = jax.random.normal(k_x, (n, d))
    _, _, kernel = nt.stax.serial(
        nt.stax.Dense(1, W_std=d**0.25, b_std=None), nt.stax.Relu(), nt.stax.Dense(1, W_std=1.0, b_std=None)
    )
    nngp, ntk = kernel(x, None, get=("nngp", "ntk"))
    upper = np.triu_indices(n)
    expected = np.asarray(nngp + d**0.5 * (ntk - nngp))[upper]

    seen = []
    for width in widths:

        def per_neuron(k, width=width):
            params = sgd.init_two_layer_relu(k, width, d)
            return n / width * sgd.gram_matrix(sgd.two_layer_relu, params, x)[upper]

        draws = neurons // width
        keys = jax.random.split(jax.random.fold_in(k_networks, width), draws)
        values = np.asarray(jax.jit(jax.vmap(per_neuron))(keys))
        # Every mean is over 2^17 independent neurons: as good as normal.  Student's quantile is for the variance that
        # is estimated from 256 networks; the error rate is that of all entries and widths together.
        bound = stats.t.isf(RARE / (2 * expected.size * len(widths)), draws - 1)
        error = bound * values.std(axis=0, ddof=1) / draws**0.5
        assert (np.abs(values.mean(axis=0) - expected) <= error).all(), (width, values.mean(axis=0), expected, error)
        seen.append(error / np.abs(expected).max())
    # The comparison sees a tenth of the kernel's size at every width, hence would see a wrong power of d or of the width.
    assert np.max(seen) < 0.1
    assert np.abs(np.asarray(ntk)[upper] - expected).max() > 0.2 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------- genjax


def test_densities_of_genjax_are_those_of_numpyro(gen, x64, key):
    k_x, k_loc, k_scale = jax.random.split(key, 3)
    x, loc = jax.random.normal(k_x, (50,)) * 3, jax.random.normal(k_loc, (50,))
    scale = jnp.exp(jax.random.normal(k_scale, (50,)))
    # A quadratic and a logarithm in double precision: a few roundings of numbers up to about 10³.
    normal = jax.vmap(lambda m, s, v: peers.assess(gen.normal, (m, s), v))(loc, scale, x)
    np.testing.assert_allclose(normal, dist.Normal(loc, scale).log_prob(x), rtol=1e-12, atol=1e-12)
    positive = jnp.exp(x / 3)
    gamma = jax.vmap(lambda a, b, v: peers.assess(gen.gamma, (a, b), v))(scale, 1 / scale, positive)
    np.testing.assert_allclose(gamma, dist.Gamma(scale, 1 / scale).log_prob(positive), rtol=1e-12, atol=1e-12)


SHIFTS = (-1.0, 0.0, 2.5)


def numpyro_chain(loc, scale):
    x = numpyro.sample("x", dist.Normal(loc, scale))
    with numpyro.plate("lanes", len(SHIFTS)):
        numpyro.sample("y", dist.Normal(jnp.sin(x) + jnp.asarray(SHIFTS), jnp.exp(x / 4)))


def genjax_chain(gen):
    @gen.gen
    def inner(shift, x):
        return gen.normal(jnp.sin(x) + shift, jnp.exp(x / 4)) @ "y"

    @gen.gen
    def chain(loc, scale):
        x = gen.normal(loc, scale) @ "x"
        return x * (inner.vmap(in_axes=(0, None))(jnp.asarray(SHIFTS), x) @ "inner")

    return chain


def joint_of_numpyro(args, choices):
    values = {"x": choices["x"], "y": choices["inner"]["y"]}
    return log_density(numpyro_chain, args, {}, values)[0]


def test_joint_density_and_its_gradient_are_those_of_numpyro(gen, x64):
    chain, args = genjax_chain(gen), (jnp.asarray(0.5), jnp.asarray(2.0))
    choices = {"x": jnp.asarray(0.3), "inner": {"y": jnp.asarray([-1.2, 0.4, 2.0])}}
    found = jax.jit(jax.value_and_grad(lambda c: peers.assess(chain, args, c)))(choices)
    expected = jax.value_and_grad(lambda c: joint_of_numpyro(args, c))(choices)
    # Four normal densities in double precision, numbers of order one to ten.
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-13), found, expected)


def test_simulation_reports_choices_density_and_value(gen, x64, key):
    chain, args = genjax_chain(gen), (jnp.asarray(0.5), jnp.asarray(2.0))
    runs = jax.jit(jax.vmap(lambda k: peers.simulate(k, chain, args)))(jax.random.split(key, 2000))
    assert set(runs.choices) == {"x", "inner"}
    assert set(runs.choices["inner"]) == {"y"}
    x, y = np.asarray(runs.choices["x"])[:, None], np.asarray(runs.choices["inner"]["y"])
    np.testing.assert_allclose(runs.value, x * y, rtol=1e-15)
    expected = jax.jit(jax.vmap(lambda c: joint_of_numpyro(args, c)))(runs.choices)
    # Four normal densities in double precision; they may cancel, so relative to their size of one to a hundred.
    np.testing.assert_allclose(runs.log_density, expected, rtol=1e-12, atol=1e-12)
    # Both choices follow their laws and are drawn afresh for every key: Kolmogorov's test, exact at its level.
    assert stats.kstest(x[:, 0], stats.norm(0.5, 2.0).cdf).pvalue > RARE
    noise = (y - np.sin(x) - np.asarray(SHIFTS)) / np.exp(x / 4)
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > RARE
    single = peers.simulate(key, gen.normal, args)
    assert jnp.shape(single.choices) == ()
    assert single.value == single.choices
    assert peers.assess(gen.normal, args, single.choices) == pytest.approx(float(single.log_density), rel=1e-12)


def test_genjax_refuses_what_it_cannot_use(gen, key):
    chain, args = genjax_chain(gen), (0.5, 2.0)
    with pytest.raises((KeyError, getattr(gen, "MissingAddress", KeyError)), match="inner"):
        peers.assess(chain, args, {"x": 0.3})
    with pytest.raises(TypeError, match="assess: generative_function is a Normal, expected a generative function"):
        peers.assess(dist.Normal(0.0, 1.0), args, 0.3)
    with pytest.raises(TypeError, match="assess: args is a list, expected the tuple"):
        peers.assess(chain, [0.5, 2.0], {"x": 0.3})
    with pytest.raises(TypeError, match="simulate: args is a float"):
        peers.simulate(key, gen.normal, 0.5)


def test_random_addresses_of_old_genjax_are_refused(gen, key):
    if not hasattr(gen, "or_else"):
        pytest.skip("choices of genjax 1.0 are addressed by names alone")

    @gen.gen
    def left():
        return gen.normal(0.0, 1.0) @ "x"

    @gen.gen
    def right():
        return gen.normal(0.0, 1.0) @ "y"

    with pytest.raises(ValueError, match="not addressed by names alone"):
        peers.simulate(key, left.or_else(right), (True, (), ()))


# -------------------------------------------------------------------------------------------------------- scipy


@pytest.mark.parametrize(
    "scheme",
    [sgd.with_replacement(1), sgd.without_replacement(4, 30), sgd.bernoulli(3, 30), sgd.full_batch()],
    ids=["with", "without", "bernoulli", "full"],
)
def test_threshold_is_that_of_arpack(x64, scheme):
    """2/η* is the largest κ with D(Σ) = κ C(Σ), C(Σ) = (HΣ + ΣH)/2, found by ARPACK; C is inverted as a Sylvester map."""
    n, p = 30, 12
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, p)) / np.sqrt(np.arange(1, p + 1))  # condition number of H about 60
    h = a.T @ a / n
    mean, noise = scheme

    def on_matrices(f):
        return scipy.sparse.linalg.LinearOperator(
            (p * p, p * p), matvec=lambda v: f(v.reshape(p, p)).ravel(), dtype=np.float64
        )

    d = on_matrices(lambda s: mean * h @ s @ h + noise / n * (a.T * np.einsum("ij,jk,ik->i", a, s, a)) @ a)
    c = on_matrices(lambda s: (h @ s + s @ h) / 2)
    c_inverse = on_matrices(lambda s: scipy.linalg.solve_sylvester(h, h, 2 * s))
    start = np.eye(p).ravel()  # eigsh would draw it
    kappa = scipy.sparse.linalg.eigsh(d, k=1, M=c, Minv=c_inverse, which="LA", v0=start, return_eigenvectors=False)
    found = sgd.stability_threshold(a, scheme)
    assert found.converged
    # The iteration stops at a residual of 1.5e-8 and its value is quadratically better; ARPACK works to rounding.
    assert found.eta == pytest.approx(2 / kappa[0], rel=1e-11)


# ------------------------------------------------------------------------------ absent, too old, without TensorFlow


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("neural_tangents", peers.neural_tangents, r"pip install --no-deps neural-tangents frozendict"),
        ("genjax", peers.genjax, r'genjax is not installed: .* pip install "proofstone\[peers\]"'),
        ("genjax", lambda: peers.assess(None, (), 0.0), "genjax is not installed"),
        ("genjax", lambda: peers.simulate(jax.random.key(0), None, ()), "genjax is not installed"),
    ],
)
def test_an_absent_peer_is_named_with_its_cure(monkeypatch, name, call, message):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=message):
        call()


def test_version_of_genjax(monkeypatch):
    for text, expected in (("0.10.3", (0, 10, 3)), ("1.0.14", (1, 0, 14)), ("1.1.dev3+g12", (1, 1, 3))):
        monkeypatch.setattr(metadata, "version", lambda name, text=text: text)
        assert peers.genjax_version() == expected

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match="genjax is not installed"):
        peers.genjax_version()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder in front of sys.path for packages of the test's own; what was imported before comes back at the end."""
    stand_ins = ("neural_tangents", "genjax", "tensorflow", "tf2jax")

    def imported():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in stand_ins}

    before = imported()
    for name in before:
        del sys.modules[name]
    for name in ("tensorflow", "tf2jax"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1")

    def write(files: dict[str, str]) -> None:
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in imported():
        del sys.modules[name]
    sys.modules.update(before)


NEEDS_TENSORFLOW = {
    "neural_tangents/__init__.py": "from . import experimental\nfrom . import stax\n",
    "neural_tangents/experimental/__init__.py": "import tensorflow, tf2jax\nREAL = True\n",
    "neural_tangents/stax.py": "",
}


def test_neural_tangents_is_imported_without_tensorflow(packages):
    packages(NEEDS_TENSORFLOW)
    with pytest.raises(ModuleNotFoundError, match="tensorflow"):
        importlib.import_module("neural_tangents")
    module = peers.neural_tangents()
    assert module.stax.__name__ == "neural_tangents.stax"
    assert peers.neural_tangents() is module
    with pytest.raises(ModuleNotFoundError, match="tensorflow"):
        importlib.import_module("neural_tangents.experimental")


def test_neural_tangents_is_left_whole_where_tensorflow_is(packages, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.delitem(sys.modules, "tf2jax")
    packages(NEEDS_TENSORFLOW | {"tensorflow.py": "", "tf2jax.py": ""})
    assert peers.neural_tangents().experimental.REAL


@pytest.mark.parametrize(
    ("name", "call", "needs"),
    [("neural_tangents", peers.neural_tangents, "needs jax 0.5"), ("genjax", peers.genjax, "1.0 needs jax 0.11")],
)
@pytest.mark.parametrize("source", ["from jax.core import NoSuchName", "import jax\njax.NoSuchName"])
def test_a_peer_that_does_not_fit_this_jax_says_so(packages, name, call, needs, source):
    packages({f"{name}/__init__.py": source})
    with pytest.raises(ImportError, match=rf"0\.0\.1 cannot be imported with jax .*{needs}.*NoSuchName"):
        call()
    assert not [module for module in sys.modules if module.startswith(name)]


def test_neural_tangents_on_a_newer_jax_says_so():
    if importlib.util.find_spec("neural_tangents") is None or jax.__version_info__ < (0, 6):
        pytest.skip("needs neural-tangents together with jax 0.6 or newer, a combination that does not work")
    with pytest.raises(ImportError, match=r"neural-tangents .* cannot be imported with jax .* \(it needs jax 0\.5\)"):
        peers.neural_tangents()
