"""From data to positive numbers and back: what multiplicative noise needs before it can act.

Multiplicative diffusion multiplies, so zeros stay zero and signs stay.  Pixels in [0, 1] have to be mapped first:

    shift(1.0)     x = u + 1        the paper's map; log x in [0, .693]
    contrast(c)    x = exp(c u)     log x = c u: noise on log x is then noise on the data, in units of 1/c

Both are elementwise and increasing.  A log-density of x becomes one of the data by adding `log_determinant`; pixels that are
integers need `dequantise` before they have a density at all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key


class PositiveMap(eqx.Module):
    """An increasing map of numbers to positive numbers, entry by entry."""

    @abstractmethod
    def to_positive(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """x > 0.  Raises ValueError if u holds values that are mapped to zero, to a negative number or to infinity."""

    @abstractmethod
    def to_data(self, x: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """u, the inverse.  Nothing is clipped: what a sampler returns may lie outside the range of the data."""

    @abstractmethod
    def log_slope(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        """log dx/du, entry by entry."""

    def log_determinant(self, u: Float[Array | np.ndarray, " batch *event"]) -> Float[Array, " batch"]:
        """Σ log dx/du over each event: log p_U(u) = log p_X(x) + log_determinant(u)."""
        slope = self.log_slope(u)
        return slope.reshape(len(slope), -1).sum(1)


class Shift(PositiveMap):
    """x = u + by."""

    by: float | Float[Array, ""]

    def __check_init__(self) -> None:
        if isinstance(self.by, float) and not math.isfinite(self.by):
            raise ValueError(f"shift: by is {self.by}, expected a finite number")

    def to_positive(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        x = jnp.asarray(u) + self.by
        check_positive("Shift.to_positive: u + by", x)
        return x

    def to_data(self, x: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.asarray(x) - self.by

    def log_slope(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.zeros_like(jnp.asarray(u))


class Contrast(PositiveMap):
    """x = exp(scale u)."""

    scale: float | Float[Array, ""]

    def __check_init__(self) -> None:
        if isinstance(self.scale, float) and not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"contrast: scale is {self.scale}, expected a positive number")

    def to_positive(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        x = jnp.exp(self.scale * jnp.asarray(u))
        check_positive("Contrast.to_positive: exp(scale u)", x)
        return x

    def to_data(self, x: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        # NaN where an unconstrained sampler crossed zero: how many entries did, its info says.
        return jnp.log(x) / self.scale

    def log_slope(self, u: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
        u = jnp.asarray(u)
        return self.scale * u + jnp.log(jnp.asarray(self.scale, u.dtype))


def shift(by: float | Float[Array, ""] = 1.0) -> Shift:
    """x = u + by: the paper's map of pixels in [0, 1] to [1, 2]."""
    return Shift(by if isinstance(by, jax.Array) else float(by))


def contrast(scale: float | Float[Array, ""] = 1.0) -> Contrast:
    """x = exp(scale u): for data of any sign.  Raises ValueError unless scale > 0."""
    return Contrast(scale if isinstance(scale, jax.Array) else float(scale))


def check_positive(name: str, x: Float[Array | np.ndarray, "*shape"]) -> None:
    """Raises ValueError, which begins with `name` and says what to do, unless all of x is positive and finite.

    Values inside jit, vmap or grad are not known and pass.
    """
    if isinstance(x, jax.core.Tracer):
        return
    # Inside jit an array that is known, such as one that a function closes over, would be traced by the first operation on it.
    with jax.ensure_compile_time_eval():
        good = (x > 0) & jnp.isfinite(x)
        if bool(good.all()):
            return
        smallest = float(jnp.nan_to_num(jnp.asarray(x), nan=jnp.inf).min())
        bad = int((~good).sum())
    raise ValueError(
        f"{name} holds {bad} of {good.size} entries that are not positive and finite (the smallest is "
        f"{smallest:g}); expected positive numbers: positive.shift(1.0).to_positive maps data that start at 0, "
        "positive.contrast(c).to_positive data of any sign"
    )


def exponent_limit(dtype: Any) -> float:
    """The largest |y| for which exp(y) and exp(-y) are normal numbers of a dtype, rounded down to a whole number."""
    about = jnp.finfo(dtype)
    return float(math.floor(min(math.log(float(about.max)), -math.log(float(about.tiny)))))


def dequantise(
    key: Key[Array, ""], pixels: Integer[Array | np.ndarray, "*shape"], *, levels: int = 256
) -> Float[Array, "*shape"]:
    """(k + uniform) / levels in [0, 1), of integers k in 0 .. levels - 1.

    Raises ValueError for integers outside that range.
    """
    if not isinstance(pixels, jax.core.Tracer) and pixels.size:
        with jax.ensure_compile_time_eval():
            ends = int(pixels.min()), int(pixels.max())
        if not 0 <= ends[0] <= ends[1] < levels:
            raise ValueError(
                f"dequantise: pixels lie in {ends[0]} .. {ends[1]}; expected 0 .. levels - 1 = {levels - 1}"
            )
    pixels = jnp.asarray(pixels)
    u = (pixels + jax.random.uniform(key, pixels.shape)) / levels
    # Rounding may give 1, which would be the next level.
    return jnp.minimum(u, jnp.nextafter(jnp.ones((), u.dtype), jnp.zeros((), u.dtype)))


def bits_per_dimension(
    log_density: Float[Array, " batch"], dimensions: int, *, levels: int = 256
) -> Float[Array, " batch"]:
    """-log2 P(pixels) / dimensions, of the log-density (in nats) of dequantised data in [0, 1).

    A bound from above of what the best code would need (Theis, van den Oord, Bethge 2016), as uniform noise was added.
    """
    return math.log2(levels) - log_density / (dimensions * math.log(2))
