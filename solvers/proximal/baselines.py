"""What learned proximal networks are compared with: total variation, sparse wavelet coefficients, and denoising networks.

    TotalVariation(weight)             R(x) = weight TV(x), convex; the proximal map to a stated accuracy
    WaveletSoftThreshold(weight)       R(x) = weight ‖details of x‖₁, convex; the proximal map is exact
    GradientStepDenoiser.create(...)   D = ∇(‖·‖²/2 - g) = 1 - ∇g, g(x) = ‖x - N(x)‖²/2 (Hurault, Leclaire, Papadakis; ICLR 2022)
    FreeDenoiser.create(...)           D(x) = x - N(x), any map: nothing is known of it

The first two are a `Regularizer`; the last two, from `solvers.proximal.denoisers`, are modules y -> D(y) to be trained, and no
proximal maps unless something more is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from solvers.operators import HIGHEST
from solvers.proximal.denoisers import FreeDenoiser, GradientStepDenoiser
from solvers.proximal.functional import Regularizer

__all__ = [
    "FreeDenoiser",
    "GradientStepDenoiser",
    "TotalVariation",
    "TotalVariationInfo",
    "WaveletSoftThreshold",
    "daubechies",
]

# --------------------------------------------------------------------------------------------- total variation


class TotalVariationInfo(NamedTuple):
    """steps        of the dual iteration
    error_bound  ‖x - prox(v)‖ is at most this, relative to ‖v‖, by the duality gap
    converged    whether that is below the tolerance, or what rounding allows
    """

    steps: Int[Array, ""]
    error_bound: Float[Array, ""]
    converged: Bool[Array, ""]


class TotalVariation(Regularizer):
    """R(x) = weight Σ |∇x|, differences to the next pixel along the last two axes (of a row of numbers: the last one), zero at
    the end.  Channels count separately.

    weight     a positive number
    isotropic  |·| is the Euclidean norm of the two differences, else the sum of their absolute values
    tolerance  of the proximal map, relative to ‖v‖, by a bound that is often ten times the error.  Rounding by ε keeps this
               bound at up to √(8 ε lam weight ‖v‖₁)/‖v‖, in float32 some 4e-4 for images and usual weights: less is not asked
    max_steps  of its iteration

    Raises ValueError for a weight or tolerance that is not positive.
    """

    weight: float | Float[Array, ""]
    isotropic: bool = eqx.field(static=True, default=True)
    tolerance: float = eqx.field(static=True, default=1e-3)
    max_steps: int = eqx.field(static=True, default=5000)

    def __check_init__(self) -> None:
        _check_positive(weight=self.weight, tolerance=self.tolerance)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """R(x)."""
        return self.weight * _lengths(_differences(x), self.isotropic).sum()

    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """The proximal map of lam R, to the tolerance or what rounding allows; NaN where max_steps do not suffice.

        Derivatives in v, lam and the weight, forward and backward: the Jacobian is symmetric, and the map homogeneous.
        """
        _check_positive(lam=lam)
        step = jnp.asarray(lam * self.weight, v.dtype)
        return _denoised(v, step, self.isotropic, self.tolerance, self.max_steps)

    def solve(
        self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0
    ) -> tuple[Float[Array, "*shape"], TotalVariationInfo]:
        """What `prox` takes, whatever it is, with its certificate.  Forward derivatives only."""
        _check_positive(lam=lam)
        x, steps, bound, allowed = _dual(
            v, jnp.asarray(lam * self.weight, v.dtype), self.isotropic, self.tolerance, self.max_steps
        )
        return x, TotalVariationInfo(steps, bound, bound <= allowed)

    @property
    def weak_convexity(self) -> float:
        return 0.0


def _check_positive(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, jax.core.Tracer) and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: is {value}, expected a positive number")


def _differences(x: Array) -> Array:
    """(1 or 2, *shape), zero at the end of an axis."""
    axes = range(max(0, x.ndim - 2), x.ndim)
    return jnp.stack([jnp.diff(x, axis=k, append=lax.slice_in_dim(x, x.shape[k] - 1, None, axis=k)) for k in axes])


def _transposed(p: Array) -> Array:
    """The transpose of `_differences`."""
    total, ndim = jnp.zeros((), p.dtype), p.ndim - 1
    for q, axis in zip(p, range(max(0, ndim - 2), ndim), strict=True):
        pads = [(0, 0, 0)] * ndim
        inner = lax.slice_in_dim(q, 0, q.shape[axis] - 1, axis=axis)
        pads[axis] = (1, 0, 0)
        behind = lax.pad(inner, jnp.zeros((), p.dtype), pads)
        pads[axis] = (0, 1, 0)
        total = total + behind - lax.pad(inner, jnp.zeros((), p.dtype), pads)
    return total


def _lengths(p: Array, isotropic: bool) -> Array:
    """|p| of each pixel, with derivative zero at zero."""
    if not isotropic:
        return jnp.abs(p).sum(0)
    squares = (p**2).sum(0)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _dual(v: Array, step: Array, isotropic: bool, tolerance: float, max_steps: int) -> tuple[Array, ...]:
    """x = v - step Gᵀp, G the differences, at the best p of Σ |p| ≤ 1: accelerated projected gradients (Beck and Teboulle 2009,
    "Fast gradient-based algorithms for constrained total variation"), started again when the momentum points uphill.

    Both problems are strongly convex in x, so that step Σ (|Gx| - Gx · p), the duality gap, is a bound of ‖x - prox‖².  Each of
    its terms is positive, so that only the rounding of Gx limits it.  Returns x, steps, the bound, and what was asked of it.
    """
    size = jnp.maximum(jnp.linalg.norm(v.reshape(-1)), jnp.finfo(v.dtype).tiny)
    rate = 1 / (4 * min(v.ndim, 2))  # 1/‖G Gᵀ‖, at most
    rounding = jnp.sqrt(8 * jnp.finfo(v.dtype).eps * step * jnp.abs(v).sum()) / size
    allowed = lax.stop_gradient(jnp.maximum(tolerance, rounding))

    def projected(p: Array) -> Array:
        if isotropic:
            return p / jnp.maximum(_lengths(p, True), 1)
        return jnp.clip(p, -1, 1)

    def bound(p: Array) -> tuple[Array, Array]:
        x = v - step * _transposed(p)
        slopes = _differences(x)
        gap = step * jnp.sum(_lengths(slopes, isotropic) - (slopes * p).sum(0))
        return x, jnp.sqrt(jnp.maximum(gap, 0)) / size

    def more(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        return (carry[4] > allowed) & (carry[3] < max_steps)

    def turn(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        p, ahead, momentum, k, _ = carry
        new = projected(ahead + rate / step * _differences(v - step * _transposed(ahead)))
        uphill = jnp.sum((ahead - new) * (new - p)) > 0
        momentum = jnp.where(uphill, 1.0, momentum)
        after = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / after * (new - p)
        return new, ahead, after, k + 1, lax.stop_gradient(bound(new)[1])

    p = jnp.zeros((min(v.ndim, 2), *v.shape), v.dtype)
    start = (p, p, jnp.ones((), v.dtype), jnp.zeros((), jnp.int32), lax.stop_gradient(bound(p)[1]))
    p, _, _, steps, _ = lax.while_loop(more, turn, start)
    x, reached = bound(p)
    return x, steps, lax.stop_gradient(reached), allowed


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _denoised(v: Array, step: Array, isotropic: bool, tolerance: float, max_steps: int) -> Array:
    x, _, bound, allowed = _dual(v, step, isotropic, tolerance, max_steps)
    return jnp.where(bound <= allowed, x, jnp.nan)


@_denoised.defjvp
def _denoised_jvp(
    isotropic: bool, tolerance: float, max_steps: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """x(v, s) is homogeneous of degree one, so that ∂x/∂s = (x - J v)/s with the Jacobian J in v."""
    (v, step), (d_v, d_step) = primals, tangents

    def jacobian(_: Any, d: Array) -> Array:
        return jax.jvp(lambda u: _dual(u, step, isotropic, tolerance, max_steps)[0], (v,), (d,))[1]

    x = _denoised(v, step, isotropic, tolerance, max_steps)
    # J (d_v - v d_s/s) + x d_s/s.  As the solution of a symmetric linear system, JAX can transpose it.
    share = d_step / step
    moved = lax.custom_linear_solve(lambda d: d, d_v - share * v, jacobian, symmetric=True)
    return x, moved + share * x


# --------------------------------------------------------------------------------------------------- wavelets


def daubechies(moments: int) -> Float[np.ndarray, " taps"]:
    """The filter of 2 `moments` taps of Daubechies (1988) with so many vanishing moments, sum √2; 1 is Haar's.

    Of the factors of its squared modulus those with zeros inside the unit circle.  Raises ValueError outside 1 to 10.
    """
    if not 1 <= moments <= 10:
        raise ValueError(f"daubechies: moments is {moments}, expected 1 to 10 (rounding spoils longer filters)")
    # |h|² = 2 cos²ᵖ(ω/2) P(sin²(ω/2)), P(y) = Σ binomial(p - 1 + k, k) yᵏ, y = (2 - z - 1/z)/4.
    filter = np.ones(1)
    for root in np.roots([math.comb(moments - 1 + k, k) for k in reversed(range(moments))]):
        both = np.roots([1, 4 * root - 2, 1])
        filter = np.convolve(filter, [1, -both[np.abs(both).argmin()]])
    for _ in range(moments):
        filter = np.convolve(filter, [1, 1])
    return filter.real * math.sqrt(2) / filter.real.sum()


@lru_cache(maxsize=64)
def _analysis(moments: int, n: int) -> np.ndarray:
    """(n, n) orthogonal: n/2 rows of averages, then n/2 of details, of a periodic signal."""
    low = daubechies(moments)
    high = low[::-1] * (-1) ** np.arange(len(low))
    matrix = np.zeros((n, n))
    for k in range(n // 2):
        for j, (a, d) in enumerate(zip(low, high, strict=True)):
            matrix[k, (2 * k + j) % n] += a
            matrix[n // 2 + k, (2 * k + j) % n] += d
    return matrix


class WaveletSoftThreshold(Regularizer):
    """R(x) = weight Σ |details|, of an orthonormal wavelet transform of the last two axes (of a row of numbers: the last one)
    with periodic boundaries.  The averages of the last level are free.

    weight   a positive number
    moments  vanishing moments of Daubechies' wavelet; 1 is Haar's
    levels   None: as many as halve all sides evenly, and no more than leave them at 4 or more

    Raises ValueError for a weight or levels that are not positive, and for sides that cannot be halved so often.
    """

    weight: float | Float[Array, ""]
    moments: int = eqx.field(static=True, default=2)
    levels: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        _check_positive(weight=self.weight)
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"levels: is {self.levels}, expected an integer >= 1")
        daubechies(self.moments)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """R(x)."""
        return self.weight * jnp.stack([jnp.abs(d).sum() for d in self.transform(x)[1]]).sum()

    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """The proximal map of lam R: soft thresholds of the details at lam weight."""
        _check_positive(lam=lam)
        averages, details = self.transform(v)
        threshold = jnp.asarray(lam * self.weight, v.dtype)
        return self.inverse(averages, [d - jnp.clip(d, -threshold, threshold) for d in details])

    def transform(self, x: Float[Array, "*shape"]) -> tuple[Float[Array, "*coarse"], list[Float[Array, "*_"]]]:
        """The averages of the last level, and the details of each level, finest first: all of that level's blocks flattened."""
        details: list[Array] = []
        for _ in range(self._depth(x.shape)):
            for axis in _last_axes(x.ndim):
                x = _along(_analysis(self.moments, x.shape[axis]), x, axis)
            corner = _corner(x.shape)
            inside = np.zeros(x.shape, bool)
            inside[corner] = True
            details.append(x[~inside])
            x = x[corner]
        return x, details

    def inverse(
        self, averages: Float[Array, "*coarse"], details: Sequence[Float[Array, "*_"]]
    ) -> Float[Array, "*shape"]:
        """The signal of these coefficients."""
        x = averages
        for detail in reversed(details):
            axes = _last_axes(x.ndim)
            shape = tuple(2 * n if k in axes else n for k, n in enumerate(x.shape))
            corner = _corner(shape)
            inside = np.zeros(shape, bool)
            inside[corner] = True
            x = jnp.zeros(shape, x.dtype).at[corner].set(x).at[~inside].set(detail)
            for axis in axes:
                x = _along(_analysis(self.moments, x.shape[axis]).T, x, axis)
        return x

    @property
    def weak_convexity(self) -> float:
        return 0.0

    def _depth(self, shape: tuple[int, ...]) -> int:
        sides = [shape[k] for k in _last_axes(len(shape))]
        even = min((n & -n).bit_length() - 1 for n in sides)
        depth = self.levels
        if depth is None:
            depth = min(even, *(max(1, int(math.log2(n / 4))) for n in sides))
        if not 1 <= depth <= even:
            raise ValueError(
                f"x: has shape {shape}, expected sides that can be halved {max(depth, 1)} times; pad or crop it"
            )
        return depth


def _last_axes(ndim: int) -> tuple[int, ...]:
    return tuple(range(max(0, ndim - 2), ndim))


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    axes = _last_axes(len(shape))
    return tuple(slice(0, n // 2 if k in axes else n) for k, n in enumerate(shape))


def _along(matrix: np.ndarray, x: Array, axis: int) -> Array:
    """matrix times x along an axis.  As a product: of sums of shifted arrays, level after level, XLA would fuse all."""
    product = jnp.tensordot(jnp.asarray(matrix, x.dtype), x, axes=((1,), (axis,)), precision=HIGHEST)
    return jnp.moveaxis(product, 0, axis)
