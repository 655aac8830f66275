"""Conditioning without training anew: guidance by a class, and filling in what is missing of positive data.

All return a `log_score(y, t)`, the gradient of a log-density in y = log x, for any sampler of `generative.samplers`; they are
equinox modules, which jit knows again.

Guidance combines scores with weights that sum to one.  The score s_Y of log x and the Hyvarinen score ξ = s_Y - 1 differ by a
constant, so it makes no difference which of them is combined; one of each does (everything would be off by the weight).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from generative.gbm_diffusion import LogScore, Process
from generative.nets import NO_CLASS, check_labels, classes_of
from generative.positive import check_positive


def guided(conditional: LogScore, unconditional: LogScore, weight: float | Float[Array, ""]) -> Guided:
    """s_∅ + w (s_c - s_∅): classifier-free guidance (Ho and Salimans 2021).

    weight  w: 0 ignores the condition, 1 is the conditional model, more sharpens it.  At one noise level this is the score of
            p_∅ (p_c / p_∅)^w; what a sampler draws with it is not that density, as noise and power do not commute
    """
    return Guided(conditional, unconditional, jnp.asarray(weight, float))


def of_class(
    model: Callable[..., Array],
    label: int | Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " batch"],
    weight: float | Float[Array, ""] = 1.0,
) -> OfClass:
    """The log-score of a model with classes, guided to `label` (one for all, or one for each of the batch).

    model   (y, t, labels) -> log-score, where label -1 is no class, such as `losses.Parametrised` with a network of classes
    weight  of `guided`.  Both halves are one call of twice the batch; for 1, as a Python number, there is one half

    Raises ValueError for a label that is no class of the model, as far as `nets.classes_of` knows them.
    """
    check_labels("of_class: label", label, classes_of(model))
    plain = isinstance(weight, int | float) and weight == 1
    return OfClass(model, jnp.asarray(label, jnp.int32), None if plain else jnp.asarray(weight, float))


def inpainting(
    log_score: LogScore,
    process: Process,
    known: Float[Array | np.ndarray, "*event"],
    mask: Bool[Array | np.ndarray, "*event"],
    *,
    pull: float | Float[Array, ""] = 1.0,
    deviation: float | Float[Array, ""] = 1.0,
) -> Inpainting:
    """The log-score of what is missing, given the entries of `known` where `mask` is true.

    known      positive where mask is true; anything elsewhere
    mask       true where the value is known
    pull       weight of the reconstruction guidance; 0, as a Python number, leaves it out
    deviation  d, a typical standard deviation of log x_0, used by the pull

    Known entries get the exact score of their transition kernel, so every sampler carries them from noise to `known` (in a
    last step that denoises, to rounding).  The others get the model's score at these noisy neighbours: the replacement method
    (Song et al. 2021), which knows of the known entries only what the noise has left of them and is biased for it.  With the
    pull the model's own guess of the known entries is drawn to their values: + pull ∇ log N(log known; guess, r²) with
    r² = V d² / (V + a² d²), the reconstruction guidance of Ho et al. 2022 with the variance of Song et al. 2023.  It costs the
    gradient of the model, about twice the time, and is exact only where the posterior of log x_0 is normal with variance r².

    Of two normal logarithms with correlation .9, one known to be 1.2, the mean of the other is wrong by .34 without the pull and
    by .05 with it.

    Raises ValueError for a known entry that is not positive, and for shapes that differ.
    """
    known, mask = jnp.asarray(known), jnp.asarray(mask)
    if known.shape != mask.shape:
        raise ValueError(f"inpainting: known has shape {known.shape} and mask {mask.shape}; expected the same")
    inside = jnp.where(mask, known, 1)
    check_positive("inpainting: known, where mask is true,", inside)
    without = isinstance(pull, int | float) and pull == 0
    strength = None if without else jnp.asarray(pull, known.dtype)
    return Inpainting(log_score, process, jnp.log(inside), mask, strength, jnp.asarray(deviation, known.dtype))


class Guided(eqx.Module):
    conditional: Any
    unconditional: Any
    weight: Float[Array, ""]

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        free = self.unconditional(y, t)
        return free + self.weight.astype(y.dtype) * (self.conditional(y, t) - free)


class OfClass(eqx.Module):
    """weight: None for 1, without a second half."""

    model: Any
    label: Int[Array, "*_"]
    weight: Float[Array, ""] | None

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        labels = jnp.broadcast_to(self.label, y.shape[:1])
        if self.weight is None:
            return self.model(y, t, labels)
        both = self.model(jnp.concatenate([y, y]), t, jnp.concatenate([labels, jnp.full_like(labels, NO_CLASS)]))
        given, free = jnp.split(both, 2)
        return free + self.weight.astype(y.dtype) * (given - free)


class Inpainting(eqx.Module):
    """target: log of what is known; pull: None for no reconstruction guidance."""

    log_score: Any
    process: Process
    target: Float[Array, "*event"]
    mask: Bool[Array, "*event"]
    pull: Float[Array, ""] | None
    deviation: Float[Array, ""]

    def __call__(self, y: Float[Array, " batch *event"], t: Float[Array, ""]) -> Float[Array, " batch *event"]:
        if y.shape[1:] != self.target.shape:
            raise ValueError(
                f"inpainting: y has events of shape {y.shape[1:]}; expected that of known, {self.target.shape}"
            )
        a, shift, v = self.process.scale(t), self.process.shift(t), self.process.variance(t)
        exact = (a * self.target + shift - y) / v
        if self.pull is None:
            return jnp.where(self.mask, exact, self.log_score(y, t))
        precision = (v + (a * self.deviation) ** 2) / (v * self.deviation**2)

        def misfit(y: Array) -> tuple[Array, Array]:
            score = self.log_score(y, t)
            guess = (y - shift + v * score) / a
            return -jnp.sum(jnp.where(self.mask, guess - self.target, 0) ** 2) * precision / 2, score

        drawn, score = jax.grad(misfit, has_aux=True)(y)
        return jnp.where(self.mask, exact, score + self.pull * drawn)
