"""The script from images to samples: its parts, and a reduced training with what follows it."""

import importlib
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from generative import gbm_diffusion, losses, positive, samplers, weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gbm_images")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("recipe", ["mnist dls", "fashion-mnist dls"])
def test_a_thinned_recipe_takes_the_same_time_and_fades_as_far(script, recipe):
    whole, thin = samplers.RECIPES[recipe], script.thinned(recipe, 200)
    for stages in (whole.stages, thin.stages):
        assert sum(s.levels * s.inner * s.delta for s in stages) == pytest.approx(
            whole.stages[0].delta * 1000, rel=1e-9
        )
        assert np.prod([s.factor**s.levels for s in stages]) == pytest.approx(0.995**1000, rel=1e-9)
    assert sum(s.levels for s in thin.stages) == 200


def test_samples_become_pixels(script):
    there = positive.contrast(1.0)
    x = jnp.array([-3.0, 0.5, 1.0, np.exp(0.25), np.e, 9.0], jnp.float32)  # the first as of a chain that crossed zero
    np.testing.assert_allclose(script.unit(there, x), [0, 0, 0, 0.25, 1, 1], atol=1e-6)
    np.testing.assert_allclose(script.unit(positive.shift(1.0), x), [0, 0, 0, np.exp(0.25) - 1, 1, 1], atol=1e-6)


def test_summary_has_mean_and_spread(script):
    same = {"evaluations": 5, "kernel": 0.0, "precision": 0.5, "recall": 0.25, "model": 0}
    runs = [same | {"frechet": 1.0, "seed": 0}, same | {"frechet": 3.0, "seed": 1}]
    found = script.summary(runs)
    assert (found["frechet"], found["spread"]["frechet"]) == (2.0, pytest.approx(np.sqrt(2)))
    assert [(r["seed"], r["frechet"]) for r in found["runs"]] == [(0, 1.0), (1, 3.0)]
    assert script.summary(runs[:1])["spread"]["recall"] is None


@pytest.mark.slow
def test_a_reduced_training_ships_and_samples(script, tmp_path):
    """Digits of 8 x 8: after a few steps samples of what was written are nearer to the data than noise is."""
    size = script.SIZES["smoke"]._replace(steps=60, classifier_steps=40, samples=40)
    script.ship("digits8x8", size, tmp_path, tmp_path / "checkpoints", QUIET)
    judge, facts = weights.load_network(tmp_path / "features_digits8x8.npz")
    assert facts["accuracy"] > 0.3 and facts["command"].startswith("python benchmarks/gbm_images.py")
    shipped = weights.load_model(tmp_path / "gbm_digits8x8.npz")
    known = script.images("digits8x8", size.images)
    with np.load(tmp_path / "checkpoints" / "contrast_0.npz") as checkpoint:
        seen = checkpoint["losses"]
    assert len(seen) == size.steps and seen[-10:].mean() < 0.95 * seen[:10].mean()
    x0 = shipped.positive.to_positive(known.unit(jax.random.key(0)))
    one = script.Trained(shipped.log_score, shipped.positive, x0, None, None, {})
    reference = script.referred(judge, known)
    assert float(reference.features.var(0).mean()) == pytest.approx(1, rel=1e-3)
    found, pictures = script.sampled(script.Row("", "dpm2m", 5), one, size, reference, 0, "mnist dls")
    assert pictures.shape == (40, 8, 8) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    noise = script.measured(jax.random.uniform(jax.random.key(0), pictures.shape), reference)
    assert found["frechet"] < 0.5 * noise["frechet"]
    assert (found["evaluations"], found["images"], found["clipped"]) == (5, 40, 0)


def test_bits_of_a_model_that_is_a_lognormal(script):
    """A network that returns zero makes the model one normal law of every log x, whose bits are known."""

    def nothing(u, level, label):
        return jnp.zeros_like(u)

    known, there = script.images("digits8x8", 1400), positive.contrast(1.0)
    x0 = there.to_positive(known.unit(jax.random.key(0)))
    model = losses.parametrised(nothing, gbm_diffusion.geometric(**sys.modules["image_models"].WIDE[1]), x0)
    one = script.Trained(model, there, x0, None, None, {})
    found = script.bits(one, script.SIZES["smoke"]._replace(likelihood_images=16, likelihood_steps=32), known)
    u = np.asarray(known.unit(jax.random.split(jax.random.key(5))[0], test=True))[:16]  # which is log x
    # The flow stretches about the mean, and the prior is the one fitted to each pixel.
    first, last = script.SMALLEST**2, float(model.process.variance(1.0))
    stretch = np.sqrt((float(model.deviation) ** 2 + last) / (float(model.deviation) ** 2 + first))
    end = float(model.location) + stretch * (u - float(model.location))
    logs = np.log(np.asarray(x0))
    each = scipy.stats.norm.logpdf(end, logs.mean(0), np.sqrt(logs.var(0) + last)) + np.log(stretch)
    expected = np.log2(17) - each.mean((1, 2)) / np.log(2)
    assert found["bits per dimension"] == pytest.approx(expected.mean(), abs=2e-4)
    assert found["standard error"] == pytest.approx(expected.std(ddof=1) / 4, rel=0.05)
    assert abs(found["change from half the steps"]) < 3e-3
