"""Files of diffusion models: there and back, what is refused, and what ships."""

import hashlib
from importlib import resources

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generative import fidelity, losses, nets, positive, weights
from generative.gbm_diffusion import geometric
from theory import checkpoint

NETWORK = ("MLP", {"shape": [3], "width": 8, "depth": 1, "classes": 2})
PROCESS = ("geometric", {"sigma_0": 0.1, "sigma_1": 10.0})


def model(key):
    network = nets.MLP(**NETWORK[1], key=key)
    network = eqx.tree_at(lambda n: n.last.weight, network, jax.random.normal(key, (8, 3)))
    return losses.Parametrised(network, geometric(**PROCESS[1]), jnp.asarray(0.25), jnp.asarray(0.5))


def saved(path, key):
    weights.save_model(path, model(key), network=NETWORK, process=PROCESS, positive=("contrast", 2.0), seed=3)


def test_a_model_comes_back_to_a_byte_a_weight(key, tmp_path):
    path = tmp_path / "model.npz"
    saved(path, key)
    found = weights.load_model(path)
    y, label = jax.random.normal(key, (4, 3)), jnp.array([0, 1, -1, 0])
    before, after = jax.tree.leaves(model(key).network), jax.tree.leaves(found.log_score.network)
    for a, b in zip(before, after, strict=True):
        # Half a step of 254 between the largest and its negative, of each output; vectors are kept as they are.
        bound = jnp.abs(a).max(tuple(range(a.ndim - 1)), keepdims=True) / 254 * 1.001 if a.ndim > 1 else 0.0
        assert bool((jnp.abs(a - b) <= bound).all())
    assert (tmp_path / "model.npz").stat().st_size < 13_000
    t = jnp.asarray(0.5)
    np.testing.assert_allclose(found.log_score(y, t, label), model(key)(y, t, label), atol=0.2)
    assert (float(found.log_score.location), float(found.log_score.deviation)) == (0.25, 0.5)
    assert found.facts == {"seed": 3}
    assert found.positive == positive.contrast(2.0)
    assert weights.load_model(str(path)).log_score.form == "denoiser"


def test_a_network_comes_back(key, tmp_path):
    made = {"shape": [8, 8], "widths": [2, 3, 4], "features": 5}
    network = fidelity.Classifier(**made, key=key)
    weights.save_network(tmp_path / "c.npz", network, made=("Classifier", made), accuracy=0.5)
    found, facts = weights.load_network(tmp_path / "c.npz")
    x = jax.random.uniform(key, (2, 8, 8))
    np.testing.assert_allclose(found.features(x), network.features(x), atol=3e-2)
    assert facts == {"accuracy": 0.5}
    with pytest.raises(ValueError, match=r"does not say its process, positive, form"):
        weights.load_model(tmp_path / "c.npz")


def test_what_is_no_model_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match=r"no model is called 'mnits'; there are \["):
        weights.load_model("mnits")
    with pytest.raises(ValueError, match=r"there is no file"):
        weights.load_model(tmp_path / "none.npz")
    path = tmp_path / "model.npz"
    saved(path, key)
    with np.load(path) as file:
        arrays = dict(file)
    header = weights._read(path, "test", ())[0]
    arrays.pop("header")
    for change, message in (
        ({"network": ["os.system", {}]}, r"network is 'os.system', expected UNet, MLP, Classifier"),
        ({"process": ["eval", {}]}, r"process is 'eval', expected geometric"),
        ({"network": ["MLP", NETWORK[1] | {"width": 9}]}, r"other shapes than its network"),
    ):
        checkpoint.write(path, header | change, arrays)
        with pytest.raises(ValueError, match=message):
            weights.load_model(path)
    infinite = eqx.tree_at(lambda m: m.network.last.weight, model(key), jnp.full((8, 3), jnp.inf))
    with pytest.raises(ValueError, match=r"24 weights are not finite"):
        weights.save_model(path, infinite, network=NETWORK, process=PROCESS, positive=("shift", 1.0))


def test_what_ships_is_what_is_listed():
    folder = resources.files("generative") / "weights"
    listed = (folder / "README.md").read_text()
    names = [f.name for f in folder.iterdir() if f.name.endswith(".npz")]
    assert names
    for name in names:
        assert name in listed
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in listed
        if name.startswith("features"):
            _, facts = weights.load_network(name.removesuffix(".npz"))
        else:
            facts = weights.load_model(name.removesuffix(".npz")).facts
        assert facts["command"].startswith("python benchmarks/gbm_images.py --data")
