"""The paper, and what several of its claims use."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from paper_checks.harness.claim import Paper
from solvers.proximal.distributions import Gaussian, Laplace, Mixture, StudentT, Uniform
from solvers.proximal.exact import Distribution

PAPER = Paper(
    stem="proximal",
    title="What's in a Prior? Learned Proximal Networks for Inverse Problems",
    authors="Zhenghan Fang, Sam Buchanan, Jeremias Sulam",
    year=2024,
    venue="ICLR",
    arxiv="2310.14344",
    claims=(
        *("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P7'", "P8", "P9", "P10", "P11", "P12", "P13", "P14"),
        *("T1", "T1b", "T1c", "T1d", "T1e", "T1f", "T1g", "T1h", "T1i", "T1j", "T2", "T2b", "T2c"),
        *("T3", "T3b", "T3c", "T3d", "T4", "T4b", "E1", "E2", "E3", "E4"),
    ),
    note="The numbers are the project's own: the paper's text was not available, so that its statements are those of its "
    "public code, its reviews and later work, and its theorem numbers are recalled.  P: input-convex networks and their "
    "priors; T1, T2: proximal matching and what it aims at; T3, T4: plug-and-play iterations; E: experiments.  What is "
    "marked as derived is worked out here and not claimed of the paper.",
)


# -- distributions, by sums ------------------------------------------------------------------------------------------------

PRIORS: dict[str, Distribution] = {
    "Laplace": Laplace(1.0),
    "Gaussian": Gaussian(0.4, 0.7),
    "mixture": Mixture([-2.0, 2.0], [0.6, 0.6], [0.5, 0.5]),
    "uniform": Uniform(-1.0, 2.0),
    "Student-t": StudentT(3.0),
}


class Sums(NamedTuple):
    """A distribution as points and weights: integrals are sums over Gauss-Legendre nodes in pieces that end at its kinks.
    They share nothing with the formulas of the library but the densities, which are written out here."""

    x: np.ndarray
    weight: np.ndarray

    def posterior(self, y: float, sigma: float) -> np.ndarray:
        p = self.weight * np.exp(-((self.x - y) ** 2) / (2 * sigma**2))
        return p / p.sum()

    def mean(self, y: float, sigma: float) -> float:
        return float(self.posterior(y, sigma) @ self.x)

    def median(self, y: float, sigma: float) -> float:
        """By interpolation of the distribution function between nodes."""
        p = self.posterior(y, sigma)
        return float(np.interp(0.5, np.cumsum(p) - p / 2, self.x))

    def third_moment(self, y: float, sigma: float) -> float:
        p = self.posterior(y, sigma)
        return float(p @ (self.x - p @ self.x) ** 3)

    def matched(self, y: float, sigma: float, gamma: float) -> float:
        """The c with the least matching loss: the best of a grid, then the average under the kernel until it stays."""
        p = self.posterior(y, sigma)
        grid = np.linspace(min(-5.0, y), max(5.0, y), 2001)
        c = float(grid[np.argmax(np.exp(-((grid[:, None] - self.x) ** 2) / gamma**2) @ p)])
        for _ in range(100_000):
            kernel = p * np.exp(-((c - self.x) ** 2) / gamma**2)
            before, c = c, float(kernel @ self.x / kernel.sum())
            if abs(c - before) < 1e-13:
                break
        return c


@functools.cache
def sums(name: str) -> Sums:
    density = {
        "Laplace": lambda x: np.exp(-np.abs(x)) / 2,
        "Gaussian": lambda x: np.exp(-((x - 0.4) ** 2) / 0.98) / np.sqrt(0.98 * np.pi),
        "mixture": lambda x: (
            (np.exp(-((x - 2) ** 2) / 0.72) + np.exp(-((x + 2) ** 2) / 0.72)) / 2 / np.sqrt(0.72 * np.pi)
        ),
        "uniform": lambda x: np.full_like(x, 1 / 3),
        "Student-t": lambda x: 2 / (np.pi * np.sqrt(3)) / (1 + x**2 / 3) ** 2,
    }[name]
    ends = np.linspace(-1, 2, 13) if name == "uniform" else np.linspace(-18, 18, 73)
    t, w = np.polynomial.legendre.leggauss(24)
    half = np.diff(ends) / 2
    x = ((ends[:-1] + half)[:, None] + half[:, None] * t).ravel()
    return Sums(x, (half[:, None] * w).ravel() * density(x))


@functools.cache
def searched(name: str, y: float, sigma: float, gamma: float) -> float:
    """`Sums.matched`, once for a claim and its controls."""
    return sums(name).matched(y, sigma, gamma)
