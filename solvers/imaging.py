"""Linear operators of imaging, and the least-squares data term h(x) = w/2 ‖Ax - b‖² of a measurement b.

    A = blur(gaussian_kernel(5, 1.0), (3, 128, 128))      or inpainting, compressed_sensing, tomography.radon, from_functions
    h = LeastSquares(A, b)                                value, gradient, proximal map, Lipschitz constant

An operator maps one image (H, W) or (C, H, W); use jax.vmap for many.  A.T is its adjoint.  What all operators have, how to make
your own, the test of an adjoint and bounds of norms: `solvers.adjoint`, whose names are here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from solvers import conjugate_direction
from solvers.adjoint import (
    LinearOperator,
    NormBounds,
    as_lineax,
    check_adjoint,
    checked,
    dot_test,
    from_functions,
    from_lineax,
    norm_bounds,
    operator_norm_squared,
    positive_sides,
)

__all__ = [
    "Blur",
    "CompressedSensing",
    "Inpainting",
    "LeastSquares",
    "LinearOperator",
    "NormBounds",
    "as_lineax",
    "blur",
    "check_adjoint",
    "compressed_sensing",
    "dot_test",
    "from_functions",
    "from_lineax",
    "gaussian_kernel",
    "inpainting",
    "norm_bounds",
    "operator_norm_squared",
]

# ------------------------------------------------------------------------------------------------------- blur


def gaussian_kernel(size: int | None, sigma: float, dtype: DTypeLike | None = None) -> Float[Array, "size size"]:
    """Samples of exp(-r²/(2 sigma²)) on a square of odd side, with sum 1.

    size  None for that of Fang, Buchanan, Sulam (ICLR 2024): the larger of 5 and 3 sigma, and one more where that is even
    Raises ValueError for a size that is even or not positive, or sigma ≤ 0.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"gaussian_kernel: sigma is {sigma}, expected a positive number")
    if size is None:
        size = max(5, int(3 * sigma)) | 1
    if size < 1 or size % 2 == 0:
        raise ValueError(f"gaussian_kernel: size is {size}, expected an odd positive number")
    profile = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    kernel = np.outer(profile, profile)
    return jnp.asarray(kernel / kernel.sum(), jnp.result_type(float) if dtype is None else dtype)


class Blur(LinearOperator):
    """Convolution of each channel with a kernel, by fast Fourier transforms.  Made by `blur`.

    period  sides of the transforms; larger than the image's for the full convolution, so that nothing wraps around
    origin  which entry of the kernel stands at offset zero
    """

    kernel: Float[Array, "rows columns"]
    period: tuple[int, int] = eqx.field(static=True)
    origin: tuple[int, int] = eqx.field(static=True)

    def regularized_inverse(
        self, v: Float[Array, "*shape_in"], rho: float | Float[Array, ""]
    ) -> Float[Array, "*shape_in"] | None:
        """For periodic boundaries a division of the transform by |k|² + ρ."""
        v = checked("v", v, self.shape_in)
        if not self._periodic:
            return None
        return self._back(self._forth(v) / (jnp.abs(self._spectrum(v.dtype)) ** 2 + rho), v.dtype)

    @property
    def norm_squared(self) -> Float[Array, ""] | None:
        return self.norm_squared_bound if self._periodic else None

    @property
    def norm_squared_bound(self) -> Float[Array, ""]:
        """The largest |k|²: the full convolution is the periodic one on a larger image, restricted to a part of its images."""
        return jnp.max(jnp.abs(self._spectrum(self.kernel.dtype)) ** 2)

    @property
    def _periodic(self) -> bool:
        return self.period == self.shape_in[-2:]

    def _spectrum(self, dtype: DTypeLike) -> Array:
        rows, columns = self.kernel.shape
        wide = jnp.pad(self.kernel.astype(dtype), [(0, self.period[0] - rows), (0, self.period[1] - columns)])
        return jnp.fft.rfft2(jnp.roll(wide, (-self.origin[0], -self.origin[1]), (0, 1)))

    def _forth(self, x: Array) -> Array:
        return jnp.fft.rfft2(x, s=self.period)

    def _back(self, spectrum: Array, dtype: DTypeLike) -> Array:
        return jnp.fft.irfft2(spectrum, s=self.period).astype(dtype)

    def _apply(self, x: Array) -> Array:
        rows, columns = self.shape_out[-2:]
        return self._back(self._forth(x) * self._spectrum(x.dtype), x.dtype)[..., :rows, :columns]

    def _adjoint(self, y: Array) -> Array:
        rows, columns = self.shape_in[-2:]
        return self._back(self._forth(y) * self._spectrum(y.dtype).conj(), y.dtype)[..., :rows, :columns]


def blur(
    kernel: Float[ArrayLike, "rows columns"], shape: Sequence[int], boundary: Literal["circular", "full"] = "circular"
) -> Blur:
    """Convolution of images of that shape, (H, W) or (C, H, W), with a kernel.

    boundary  "circular": periodic, the middle entry (rows // 2, columns // 2) at offset zero, images keep their sides, and
              `regularized_inverse` is in closed form; "full": zeros beyond, images grow by rows - 1 and columns - 1
    Raises ValueError for other shapes, and a kernel that is larger than the image.
    """
    sides, kernel = positive_sides("blur", shape), jnp.asarray(kernel)
    if len(sides) not in (2, 3):
        raise ValueError(f"blur: shape is {sides}, expected (height, width) or (channels, height, width)")
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"blur: kernel is {kernel.dtype}{list(kernel.shape)}, expected real numbers (rows, columns)")
    (height, width), (rows, columns) = sides[-2:], kernel.shape
    if rows > height or columns > width:
        raise ValueError(
            f"blur: kernel has shape {kernel.shape}, expected at most that of the image, {(height, width)}"
        )
    if boundary == "circular":
        return Blur(sides, sides, kernel, (height, width), (rows // 2, columns // 2))
    if boundary != "full":
        raise ValueError(f"blur: boundary is {boundary!r}, expected 'circular' or 'full'")
    grown = (height + rows - 1, width + columns - 1)
    tall, wide = (int(scipy.fft.next_fast_len(n, real=True)) for n in grown)
    return Blur(sides, (*sides[:-2], *grown), kernel, (tall, wide), (0, 0))


# ---------------------------------------------------------------------------------------------- missing entries


class Inpainting(LinearOperator):
    """x where the mask is True, zero elsewhere.  Made by `inpainting`."""

    mask: Bool[Array, "*shape_in"]

    def regularized_inverse(self, v: Float[Array, "*shape_in"], rho: float | Float[Array, ""]) -> Array:
        return checked("v", v, self.shape_in) / (self.mask + jnp.asarray(rho, v.dtype))

    @property
    def norm_squared(self) -> Float[Array, ""]:
        return self.mask.any().astype(jnp.result_type(float))

    def _apply(self, x: Array) -> Array:
        return jnp.where(self.mask, x, 0)

    def _adjoint(self, y: Array) -> Array:
        return jnp.where(self.mask, y, 0)


def inpainting(mask: Bool[ArrayLike, "*mask"], shape: Sequence[int] | None = None) -> Inpainting:
    """Images of which only the pixels are known where the mask is True; the others are measured as zero.

    shape  of the images; None for that of the mask, which else is broadcast, (H, W) to (C, H, W) for example
    Raises ValueError for a mask that is not boolean or does not fit.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"inpainting: mask has dtype {mask.dtype}, expected booleans")
    sides = mask.shape if shape is None else positive_sides("inpainting", shape)
    try:
        whole = jnp.broadcast_to(mask, sides)
    except ValueError:
        raise ValueError(f"inpainting: mask has shape {mask.shape}, the images {sides}") from None
    return Inpainting(sides, sides, whole)


# ------------------------------------------------------------------------------------------- compressed sensing


class CompressedSensing(LinearOperator):
    """y = (F⁻¹[F(s ⊙ x) ⊙ F(a)])_Ω with orthonormal transforms of the flattened image.  Made by `compressed_sensing`.

    signs   s, ±1
    filter  a, standard normal
    kept    Ω, in ascending order
    """

    signs: Float[Array, " n"]
    filter: Float[Array, " n"]
    kept: Int[Array, " rows"]

    @property
    def norm_squared_bound(self) -> Float[Array, ""]:
        """The largest |F(a)|²: exact for all rows, several times too large for few."""
        return jnp.max(jnp.abs(self._spectrum(self.filter.dtype)) ** 2)

    def _spectrum(self, dtype: DTypeLike) -> Array:
        return jnp.fft.rfft(self.filter.astype(dtype), norm="ortho")

    def _apply(self, x: Array) -> Array:
        spread = jnp.fft.rfft(self.signs.astype(x.dtype) * x.reshape(-1)) * self._spectrum(x.dtype)
        return jnp.fft.irfft(spread, n=x.size).astype(x.dtype)[self.kept]

    def _adjoint(self, y: Array) -> Array:
        whole = jnp.zeros(self.signs.size, y.dtype).at[self.kept].set(y, indices_are_sorted=True, unique_indices=True)
        spread = jnp.fft.rfft(whole) * self._spectrum(y.dtype).conj()
        back = self.signs.astype(y.dtype) * jnp.fft.irfft(spread, n=whole.size).astype(y.dtype)
        return back.reshape(self.shape_in)


def compressed_sensing(
    key: Key[Array, ""], shape: Sequence[int], rows: int, dtype: DTypeLike | None = None
) -> CompressedSensing:
    """Random convolution (Romberg 2009), as in the experiments of Fang, Buchanan, Sulam (ICLR 2024): `rows` numbers of an image
    of any shape.  A column has an expected square of rows / n.  Raises ValueError for more rows than entries."""
    sides = positive_sides("compressed_sensing", shape)
    n, real = math.prod(sides), jnp.result_type(float) if dtype is None else dtype
    if not 1 <= rows <= n:
        raise ValueError(f"compressed_sensing: rows is {rows}, expected 1 to {n}, the entries of an image {sides}")
    for_signs, for_filter, for_rows = jax.random.split(key, 3)
    kept = jnp.sort(jax.random.permutation(for_rows, n)[:rows])
    signs = jax.random.rademacher(for_signs, (n,), real)
    return CompressedSensing(sides, (rows,), signs, jax.random.normal(for_filter, (n,), real), kept)


# --------------------------------------------------------------------------------------------------- data term


class LeastSquares(eqx.Module):
    """h(x) = w/2 ‖Ax - b‖².

    A             the operator
    b             what was measured, of shape A.shape_out
    weight        w
    norm_squared  ‖AᵀA‖ or a bound of it, from `norm_bounds` for example; None for what A says
    tolerance     of conjugate gradients, where there is no closed form, relative to ‖Aᵀb + v/(w step)‖
    max_steps     of them

    Raises ValueError for b of another shape, w ≤ 0, and where an x does not fit.
    """

    A: LinearOperator
    b: Float[Array, "*shape_out"]
    weight: float | Float[Array, ""] = 1.0
    norm_squared: float | Float[Array, ""] | None = None
    tolerance: float = eqx.field(static=True, default=1e-6)
    max_steps: int = eqx.field(static=True, default=1000)

    def __check_init__(self) -> None:
        checked("b", self.b, self.A.shape_out)
        if isinstance(self.weight, float | int) and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight: is {self.weight}, expected a positive number")

    def __call__(self, x: Float[Array, "*shape_in"]) -> Float[Array, ""]:
        """h(x)."""
        return self.weight / 2 * jnp.sum((self.A(x) - self.b) ** 2)

    def grad(self, x: Float[Array, "*shape_in"]) -> Float[Array, "*shape_in"]:
        """w Aᵀ(Ax - b)."""
        return self.weight * self.A.T(self.A(x) - self.b)

    def prox(self, v: Float[Array, "*shape_in"], step: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape_in"]:
        """argmin_x h(x) + ‖x - v‖² / (2 step) = (AᵀA + ρ)⁻¹ (Aᵀb + ρ v),  ρ = 1/(w step).

        In closed form where A has one, else by conjugate gradients from v; NaN if these did not reach the tolerance or, short
        of it, what rounding allows.
        """
        x, info = self.solve(v, step)
        if info is None:
            return x
        fine = (info.status == conjugate_direction.Status.CONVERGED) | (
            info.status == conjugate_direction.Status.PRECISION
        )
        return jnp.where(fine, x, jnp.nan)

    def solve(
        self, v: Float[Array, "*shape_in"], step: float | Float[Array, ""] = 1.0
    ) -> tuple[Float[Array, "*shape_in"], conjugate_direction.Info | None]:
        """What `prox` takes, whatever it is, and how conjugate gradients went; None for a closed form."""
        v = checked("v", v, self.A.shape_in)
        if isinstance(step, float | int) and not step > 0:
            raise ValueError(f"step: is {step}, expected a positive number")
        rho = jnp.asarray(1 / (self.weight * step), v.dtype)
        with jax.default_matmul_precision("highest"):  # GPUs else round factors to ten bits, far from the tolerance
            right = self.A.T(self.b) + rho * v
            x = self.A.regularized_inverse(right, rho)
            if x is not None:
                return x, None
            return conjugate_direction.conjugate_gradient(
                _Shifted(self.A, rho), right, x0=v, rtol=self.tolerance, max_steps=self.max_steps
            )

    @property
    def lipschitz(self) -> float | Float[Array, ""] | None:
        """L_h = w ‖AᵀA‖, or a bound of it; None if none is known."""
        known = self.A.norm_squared_bound if self.norm_squared is None else self.norm_squared
        return None if known is None else self.weight * known


class _Shifted(eqx.Module):
    """v -> AᵀA v + ρ v."""

    A: LinearOperator
    rho: Array

    def __call__(self, v: Array) -> Array:
        return self.A.T(self.A(v)) + self.rho * v
