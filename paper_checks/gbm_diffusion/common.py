"""The paper, the target in one dimension, and exact propagation of its density: what several of its claims use."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import special

from paper_checks.harness.claim import Paper

PAPER = Paper(
    stem="gbm_diffusion",
    title="Dale meets Langevin: A Multiplicative Denoising Diffusion Model",
    authors="Nishanth Shetty, Madhava Prasath, Chandra Sekhar Seelamantula",
    year=2025,
    venue="arXiv",
    arxiv="2510.02730",
    claims=("T1", "T2", "T2b", *(f"T{k}" for k in range(3, 18)), "P1", "P2", "P3", "E1"),
    note="The numbers are the project's own: the abstracts and the complete training and sampling code were available, the body "
    "of the paper was not.  T: statements of the method, derived here; P: what its released code does; E: experiments.",
)

# The mixture of two log-normal distributions on the line, and the paper's process: σ = .8, μ = σ²/2, so that M = 0.
WEIGHTS, MEANS, DEVIATIONS = (np.array(v) for v in ((0.3, 0.7), (-1.0, 0.8), (0.15, 0.3)))
SIGMA, MU = 0.8, 0.32


class Mixture:
    """log x at time t as a mixture of normal distributions, written out: shares nothing with `generative`."""

    def __init__(self, variance: float, shift: float = 0.0) -> None:
        self.mean, self.deviation = MEANS + shift, np.sqrt(DEVIATIONS**2 + variance)

    def _parts(self, y: np.ndarray) -> np.ndarray:
        u = (np.asarray(y)[..., None] - self.mean) / self.deviation
        return WEIGHTS * np.exp(-(u**2) / 2) / (self.deviation * math.sqrt(2 * math.pi))

    def density(self, y: np.ndarray) -> np.ndarray:
        return self._parts(y).sum(-1)

    def cdf(self, y: np.ndarray) -> np.ndarray:
        return special.ndtr((np.asarray(y)[..., None] - self.mean) / self.deviation) @ WEIGHTS

    def score(self, y: np.ndarray) -> np.ndarray:
        """d/dy log p(y)."""
        parts = self._parts(y)
        slopes = -(np.asarray(y)[..., None] - self.mean) / self.deviation**2
        return (parts * slopes).sum(-1) / parts.sum(-1)

    def score_slope(self, y: np.ndarray) -> np.ndarray:
        """d²/dy² log p(y)."""
        parts = self._parts(y)
        slopes = -(np.asarray(y)[..., None] - self.mean) / self.deviation**2
        second = (parts * (slopes**2 - 1 / self.deviation**2)).sum(-1) / parts.sum(-1)
        return second - self.score(y) ** 2

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        which = rng.choice(len(WEIGHTS), n, p=WEIGHTS)
        return self.mean[which] + self.deviation[which] * rng.normal(size=n)

    @functools.cached_property
    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Points and weights of a Gauss-Hermite sum over this law, of 200 nodes a component."""
        u, w = np.polynomial.hermite_e.hermegauss(200)
        y = self.mean[:, None] + self.deviation[:, None] * u
        return y.ravel(), (WEIGHTS[:, None] * w / math.sqrt(2 * math.pi)).ravel()

    def posterior(self, y: float, variance: float, points: int = 40_001) -> tuple[np.ndarray, np.ndarray]:
        """log x_0 given log x_t = y, for this law of log x_0 and noise of that variance: points and their weights."""
        grid = np.linspace(-4.0, 4.0, points)
        p = self.density(grid) * np.exp(-((y - grid) ** 2) / (2 * variance))
        return grid, p / p.sum()
