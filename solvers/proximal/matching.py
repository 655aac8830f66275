"""Proximal matching (Fang, Buchanan, Sulam; ICLR 2024, arXiv 2310.14344): losses, their schedules as data, and what they aim at.

    y = x + σ v,  v ~ N(0, 1)                      what the network is given
    squared     E ‖f(y) - x‖² / n                  its minimiser is the posterior mean
    absolute    E ‖f(y) - x‖₁ / n                  the median of each entry
    matching    E [1 - exp(-‖f(y) - x‖² / γ²)]      as γ → 0 the mode, prox of -σ² log p (Theorem 3.2)

The gradient of the last vanishes far from the target, so that it needs a start near it and a γ that falls in stages:
`paper_laplace`, `paper_images`, `our_images`, `annealed`.  With γ far above σ its minimiser is close to the posterior mean again:
`regime`.
`solvers.proximal.training` follows a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from solvers.proximal.network import LearnedProximal, constrained

Loss = Callable[[Any, Array, Array], Array]
"""(network, y, x) -> a number, for batches y and x of signals, one per row."""

# ------------------------------------------------------------------------------------------------------ losses


def squared(network: Any, y: Float[Array, "*signals"], x: Float[Array, "*signals"]) -> Float[Array, ""]:
    """Mean squared error of an entry."""
    return jnp.mean((jax.vmap(network)(y) - x) ** 2)


def absolute(network: Any, y: Float[Array, "*signals"], x: Float[Array, "*signals"]) -> Float[Array, ""]:
    """Mean absolute error of an entry."""
    return jnp.mean(jnp.abs(jax.vmap(network)(y) - x))


class Matching(eqx.Module):
    """The mean of 1 - exp(-t²/γ²), t = ‖f(y) - x‖.  Without the factor (π γ²)^(-n/2) of the paper, which no float holds for an
    image and which moves no minimiser."""

    gamma: float | Float[Array, ""]

    def __call__(self, network: Any, y: Float[Array, "*signals"], x: Float[Array, "*signals"]) -> Float[Array, ""]:
        # Never t itself: the gradient of a square root is NaN where f(y) = x.
        t2 = jnp.sum((jax.vmap(network)(y) - x).reshape(len(y), -1) ** 2, 1)
        return jnp.mean(-jnp.expm1(-t2 / self.gamma**2))


def matching(gamma: float) -> Matching:
    """The proximal matching loss of width γ, a distance in all entries together.  Raises ValueError unless γ > 0."""
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"matching: gamma is {gamma}, expected a positive number")
    return Matching(float(gamma))


# --------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Cosine:
    """A rate that falls from `start` to `end` along half a cosine over its stage."""

    start: float
    end: float = 0.0


@dataclass(frozen=True)
class Stage:
    """So many steps with a loss and a rate; the optimiser's state goes on from one stage to the next."""

    loss: Loss
    steps: int
    rate: float | Cosine

    def rates(self, first: int, last: int) -> np.ndarray:
        """(last - first,) the rates of its steps first, ..., last - 1."""
        if not isinstance(self.rate, Cosine):
            return np.full(last - first, float(self.rate))
        share = (1 + np.cos(np.pi * np.arange(first, last) / self.steps)) / 2
        return share * self.rate.start + (1 - share) * self.rate.end


def paper_laplace() -> tuple[Stage, ...]:
    """The paper's schedule for a Laplace distribution of scale 1 with σ = 1, in batches of 2000 fresh samples.  Its first two
    stages are all of the run with the absolute loss, and with `squared` in them all of that run."""
    return (
        Stage(absolute, 10_000, 1e-3),
        Stage(absolute, 10_000, 1e-4),
        Stage(matching(0.5), 2000, 1e-3),
        Stage(matching(0.5), 2000, 1e-4),
        Stage(matching(0.4), 4000, 1e-4),
        Stage(matching(0.3), 4000, 1e-4),
        Stage(matching(0.2), 4000, 1e-5),
        Stage(matching(0.1), 4000, 1e-5),
        Stage(matching(0.1), 4000, 1e-6),
    )


def paper_images(shape: Sequence[int], *, steps: int = 40_000, gamma: float = 0.08) -> tuple[Stage, ...]:
    """The paper's schedule for images of n entries: half of the steps with the absolute loss, then four stages whose γ are
    8, 4, 2 and 1 times `gamma` √n.  Batches of 200 (MNIST, σ = 0.1) and 64 (128 x 128, σ = 0.05 or 0.1)."""
    if steps < 8 or steps % 8:
        raise ValueError(f"paper_images: steps is {steps}, expected a multiple of 8")
    smallest = gamma * math.sqrt(math.prod(shape))
    return (
        Stage(absolute, steps // 2, 1e-3),
        *(Stage(matching(smallest * 2 ** (3 - k)), steps // 8, 1e-4) for k in range(4)),
    )


def our_images(shape: Sequence[int], *, steps: int, gamma: float = 0.08, rate: float = 1e-2) -> tuple[Stage, ...]:
    """Ours for images of n entries, for a tenth of the paper's steps: squared error at a rate that falls from `rate` to a tenth,
    then the paper's four widths in three eighths of the steps, at a tenth of the rate and in the end zero."""
    if steps < 32:
        raise ValueError(f"our_images: steps is {steps}, expected at least 32")
    smallest, each = gamma * math.sqrt(math.prod(shape)), steps * 3 // 32
    return (
        Stage(squared, steps - 4 * each, Cosine(rate, rate / 10)),
        *(Stage(matching(smallest * k), each, rate / 10) for k in (8, 4, 2)),
        Stage(matching(smallest), each, Cosine(rate / 10)),
    )


def annealed(
    gammas: Sequence[float], *, first: Loss = squared, steps: int, rate: float, each: int, last: int, low: float
) -> tuple[Stage, ...]:
    """Ours: every stage ends with a rate of zero or nearly, so that its noise does not stay in the weights.

    gammas  of the stages after the first, falling
    first   the loss of the first stage
    steps   of the first stage, from the rate `rate` to a tenth of it
    each    steps of the stages between, at a constant rate `low`
    last    of the last, from `low` to zero
    """
    if not gammas:
        raise ValueError("annealed: gammas is empty, expected at least one width")
    return (
        Stage(first, steps, Cosine(rate, rate / 10)),
        *(Stage(matching(gamma), each, low) for gamma in gammas[:-1]),
        Stage(matching(gammas[-1]), last, Cosine(low)),
    )


def described(stage: Stage) -> dict[str, Any]:
    """A stage in words and numbers that JSON can hold."""
    rate = stage.rate
    return {
        "loss": getattr(stage.loss, "__name__", type(stage.loss).__name__.lower()),
        **({"gamma": float(stage.loss.gamma)} if isinstance(stage.loss, Matching) else {}),
        "steps": stage.steps,
        "rate": [float(rate.start), float(rate.end)] if isinstance(rate, Cosine) else float(rate),
    }


# ------------------------------------------------------------------------------------------------- diagnostics


class Regime(NamedTuple):
    """kappa  κ = 1 + γ²/(2σ²)
    share  max(1, slope)/κ: the minimiser of the matching loss is the posterior mean up to about this factor
    mean   whether that is below a tenth: what is learned is then a posterior mean, and its R no log-density
    """

    kappa: float
    share: float
    mean: bool


def regime(gamma: float, sigma: float, *, slope: float = 1.0) -> Regime:
    """Whether a width γ still tells the mode from the mean, at noise σ.

    slope  the largest eigenvalue of Cov(x | y)/σ², which is the largest slope of the posterior mean
    Follows from the exact minimiser, y + κ (prox_{σ²/κ · -log p_τ}(y) - y) with p_τ the density blurred by τ² = γ²/(2κ).
    """
    if not (gamma > 0 and sigma > 0):
        raise ValueError(f"regime: gamma is {gamma} and sigma {sigma}, expected positive numbers")
    kappa = 1 + gamma**2 / (2 * sigma**2)
    share = min(1.0, max(1.0, slope) / kappa)
    return Regime(kappa, share, share < 0.1)


class Distance(NamedTuple):
    """Over given signals: the largest norm of a difference, the root of its mean square, and that relative to the target's."""

    sup: float
    rms: float
    relative: float


def distance(network: Any, target: Callable[[Array], Array], y: Float[Array, "*signals"]) -> Distance:
    """How far f is from another map, given for batches, over the rows of y."""
    exact = target(y)
    norms = jnp.linalg.norm((jax.vmap(network)(y) - exact).reshape(len(y), -1), axis=1)
    sizes = jnp.linalg.norm(exact.reshape(len(y), -1), axis=1)
    rms = float(jnp.sqrt(jnp.mean(norms**2)))
    return Distance(float(norms.max()), rms, rms / float(jnp.sqrt(jnp.mean(sizes**2))))


@runtime_checkable
class Prior(Protocol):
    """A distribution whose estimators are known: the yardsticks of a training."""

    def mean(self, y: Array, sigma: float) -> Array: ...

    def median(self, y: Array, sigma: float) -> Array: ...

    def matched(self, y: Array, sigma: float, gamma: float) -> Array: ...


def minimiser(prior: Prior, loss: Loss, sigma: float) -> Callable[[Array], Array]:
    """What a loss is minimal for among all maps: the posterior mean, the median, or f_γ.  Raises ValueError for others."""
    if isinstance(loss, Matching):
        return lambda y: prior.matched(y, sigma, float(loss.gamma))
    for known, estimator in ((squared, prior.mean), (absolute, prior.median)):
        if loss is known:  # not by equality: a module with arrays has none
            return lambda y, estimator=estimator: estimator(y, sigma)  # type: ignore[misc]
    raise ValueError(f"minimiser: loss is {loss}, expected squared, absolute or matching(gamma)")


def zero_fraction(network: Any) -> float | None:
    """The part of the weights W_k and w that are exactly zero.  Such a weight gets no gradient through others that are zero, and
    may stay: a part near 1 is a dead network.  None for networks that are not kept by projection."""
    if not isinstance(network, LearnedProximal) or network.kept != "projection":
        return None
    weights = constrained(network)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)
