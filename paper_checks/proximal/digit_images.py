"""Digits, and a denoiser of them that is as good as the learned proximal network and the proximal map of nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from generative import data
from solvers.proximal import matching, training
from solvers.proximal.denoisers import FreeDenoiser

FIRST, COUNT = 1500, 200  # the images before the first were trained on
NOISE = 0.1


def digits() -> np.ndarray:
    """(1797, 1, 8, 8) in [0, 1]."""
    return data.load("digits8x8")["x"].astype(np.float64)[:, None] / 16


def test_images() -> np.ndarray:
    """(COUNT, 1, 8, 8), none of which was trained on."""
    return digits()[FIRST : FIRST + COUNT]


@functools.lru_cache(maxsize=2)
def free_denoiser(seed: int) -> FreeDenoiser:
    """A dense network without any constraint, trained with the squared error for the noise of the learned network: a few
    seconds of one core."""
    make, run = jax.random.split(jax.random.key(seed))
    network = FreeDenoiser.create(make, (64,), hidden=256, layers=4)
    schedule = [matching.Stage(matching.squared, 2500, matching.Cosine(1e-3))]
    images = jnp.asarray(digits()[:FIRST].reshape(FIRST, 64), jnp.float32)
    trained, info = training.train(run, network, images, schedule, sigma=NOISE, batch=64, chunk=500)
    if info.stopped != "steps":
        raise FloatingPointError(f"the denoiser's training was {info.stopped} after {info.steps} steps")
    return trained
