"""E1: images, from a model that was trained here and comes with the package."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from generative import data, fidelity, guidance, samplers, weights
from generative.gbm_diffusion import edm_times
from generative.lognormal import fitted_prior
from paper_checks.gbm_diffusion.common import PAPER
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

COUNT, STEPS = 100, 30


class Shuffled(eqx.Module):
    """A score that is asked at one noise level and answers for another."""

    log_score: Any
    times: jax.Array
    others: jax.Array

    def __call__(self, y: jax.Array, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
        at = jnp.argmin(jnp.abs(self.times - jnp.max(t)))
        return self.log_score(y, jnp.broadcast_to(self.others[at], jnp.shape(t)), label)


@functools.lru_cache(maxsize=8)
def drawn(shuffled: bool, seed: int) -> np.ndarray:
    """(COUNT, 28, 28) in [0, 1] by the Dale-Langevin sampler, of the classes 0, 1, ..., 9, 0, ... in turn."""
    model = weights.load_model("gbm_mnist")
    score: Any = model.log_score
    process = model.log_score.process
    images = jnp.asarray(data.load("mnist_small")["x"], jnp.float32) / 255
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    start = fitted_prior(process, model.positive.to_positive(images)).sample(first, COUNT)
    times = edm_times(process, STEPS).astype(jnp.float32)
    if shuffled:
        score = Shuffled(score, times[:-1], jax.random.permutation(third, times[:-1]))
    guided = guidance.of_class(score, jnp.arange(COUNT) % 10, 2.0)
    x, _ = samplers.sample(second, guided, process, start, times, method="dls", loop="host", throw=False)
    return np.clip(np.nan_to_num(np.asarray(model.positive.to_data(x))), 0, 1)


@claim(
    PAPER,
    "E1",
    r"A network trained with denoising score matching of $\xi$, sampled by multiplicative steps, gives plausible and diverse "
    r"images of handwritten digits.",
    title="Digits by multiplication",
    kind="trained",
    controls={
        "shuffled": "the network is told the noise levels in another order, as the sampler goes",
        "other_class": "the next class is looked for in each image",
        "one": "the first image of each class, again and again",
    },
    regime="MNIST 28 x 28 in the map exp(c u), a network of 508 100 weights, 100 images by the Dale-Langevin sampler with 30 "
    "steps and the weight 2 for their class; 70 % are what they should be to a classifier that is 98.7 % right on real ones, and "
    "their spread in its features within a class is at least half that of real ones",
    source="The abstracts; the released code has MNIST, Fashion-MNIST and Kuzushiji-MNIST.",
    blind_spot="One network, minutes of a CPU; the paper's network, process and number of steps were not trained.",
)
def digits(ctx: Context) -> Outcome:
    images = drawn(ctx.pick(False, shuffled=True), int(jax.random.bits(ctx.key)) % 2**31)
    if ctx.pick(False, one=True):
        images = np.tile(images[:10], (COUNT // 10, 1, 1))
    classes = (np.arange(COUNT) + ctx.pick(0, other_class=1)) % 10
    classifier, _ = weights.load_network("features_mnist")
    right = fidelity.accuracy(classifier, jnp.asarray(images), classes)
    real = data.load("mnist_small")

    def spread(images: np.ndarray, labels: np.ndarray) -> float:
        features = np.asarray(classifier.features(jnp.asarray(images, jnp.float32)))
        within = [features[labels == k] - features[labels == k].mean(0) for k in range(10)]
        return float(np.mean([(v**2).sum(1).mean() for v in within]))

    ratio = spread(images, np.arange(COUNT) % 10) / spread(real["x"] / 255, real["y"])
    return ctx.cases(
        {"plausible": right - 0.7, "diverse": ratio - 0.5},
        our_value=right,
        note=f"{100 * right:.0f} % of the samples are of their class; their spread is {ratio:.2f} of that of real images",
    )
