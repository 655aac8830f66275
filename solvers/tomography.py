"""Parallel-beam tomography: the Radon transform with its exact adjoint, filtered back-projection, phantoms of ellipses.

    A = radon((128, 128), angles, 185)             image -> sinogram (angles, detectors), a `LinearOperator`
    fbp(A, sinogram, filter="hann")                 an image
    Ellipses(...).image(side), .sinogram(A)         a phantom, and its line integrals in closed form

A pixel (i, j) lies at x = j - (W - 1)/2, y = (H - 1)/2 - i, so that lengths are in pixels.  The ray of an angle θ and a
detector at t is x cos θ + y sin θ = t.  It is followed line by line, along the axis that it is closer to, with linear
interpolation (Joseph 1982).  So the weight of a pixel whose centre has the coordinate t' is hat((t - t')/c)/c, with
c = max(|cos θ|, |sin θ|) and hat(r) = max(0, 1 - |r|), and from this one formula both directions follow as gathers: rays gather
from pixels, pixels from rays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Key

from solvers.adjoint import LinearOperator, checked, positive_sides


class Radon(LinearOperator):
    """Images (H, W) or (C, H, W) to sinograms (angles, detectors), of each channel.  Made by `radon`.

    spacing  distance of two detectors, in pixels; the middle of them lies at t = 0
    """

    angles: Float[Array, " angles"]
    spacing: float = eqx.field(static=True)

    def _apply(self, x: Array) -> Array:
        return self._of_each_channel(_with_adjoint, x, self.shape_out)

    def _adjoint(self, y: Array) -> Array:
        return self._of_each_channel(lambda A, y: _with_adjoint(A, y, adjoint=True), y, self.shape_in)

    def _of_each_channel(self, f: Callable[..., Array], x: Array, shape: tuple[int, ...]) -> Array:
        flat = x.reshape(-1, *x.shape[-2:])
        return jax.vmap(lambda channel: f(self, channel))(flat).reshape(shape)

    @property
    def positions(self) -> Float[np.ndarray, " detectors"]:
        """t of the detectors."""
        return _centred(self.shape_out[-1]) * self.spacing

    @property
    def norm_squared_bound(self) -> Float[Array, ""]:
        """The largest row sum of AᵀA, which has no negative entry: about a fifth above the norm, if the
        whole image is seen (`norm_bounds` comes closer).  Costs two products."""
        image = jnp.ones(self.shape_in[-2:], self.angles.dtype)
        return _backward(self, _forward(self, image)).max()


def radon(
    shape: Sequence[int],
    angles: Float[ArrayLike, " angles"],
    detectors: int | None = None,
    *,
    spacing: float | None = None,
) -> Radon:
    """The Radon transform of images of that shape, (H, W) or (C, H, W).

    angles     θ, in radians
    detectors  how many; None: one for each pixel of the diagonal
    spacing    their distance in pixels; None: as much as makes them cover the diagonal

    Raises ValueError for other shapes, no angles or detectors, spacing ≤ 0.
    """
    sides, angles = positive_sides("radon", shape), jnp.asarray(angles)
    if len(sides) not in (2, 3):
        raise ValueError(f"radon: shape is {sides}, expected (height, width) or (channels, height, width)")
    if angles.ndim != 1 or angles.size == 0 or not jnp.issubdtype(angles.dtype, jnp.floating):
        raise ValueError(f"radon: angles are {angles.dtype}{list(angles.shape)}, expected a row of real numbers")
    diagonal = math.hypot(*sides[-2:])
    detectors = math.ceil(diagonal) if detectors is None else detectors
    if detectors < 1:
        raise ValueError(f"radon: detectors is {detectors}, expected at least one")
    spacing = diagonal / detectors if spacing is None else spacing
    if not (spacing > 0 and math.isfinite(spacing)):
        raise ValueError(f"radon: spacing is {spacing}, expected a positive number")
    return Radon(sides, (*sides[:-2], angles.size, detectors), angles, float(spacing))


def _centred(n: int) -> np.ndarray:
    return np.arange(n) - (n - 1) / 2


def _weight(distance: Array, c: Array) -> Array:
    return jnp.maximum(1 - jnp.abs(distance) / c, 0) / c


def _forward(A: Radon, image: Array) -> Array:
    """(angles, detectors) of one channel."""
    (height, width), dtype, flat = image.shape, image.dtype, image.reshape(-1)
    t = jnp.asarray(A.positions, dtype)
    line = jnp.arange(max(height, width))[:, None]

    def view(angle: Array) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        steep = jnp.abs(cos) >= jnp.abs(sin)  # the ray crosses every row; else every column
        c = jnp.where(steep, jnp.abs(cos), jnp.abs(sin))
        lines, across = jnp.where(steep, height, width), jnp.where(steep, width, height)
        middle = (across - 1).astype(dtype) / 2
        # t' = base + slope (place - middle) for the pixels of a line.
        y, x = (height - 1) / 2 - line.astype(dtype), line.astype(dtype) - (width - 1) / 2
        base, slope = jnp.where(steep, y * sin, x * cos), jnp.where(steep, cos, -sin)
        first = jnp.floor((t - base) / slope + middle)
        total = jnp.zeros((), dtype)
        for place in (first, first + 1):
            weight = _weight(t - (base + slope * (place - middle)), c)
            inside = (place >= 0) & (place < across) & (line < lines)
            at = jnp.clip(place, 0, across - 1).astype(jnp.int32)
            pixel = jnp.where(steep, line * width + at, at * width + line)
            total = total + jnp.where(inside, weight * jnp.take(flat, pixel, mode="clip"), 0)
        return total.sum(0)

    return lax.map(view, A.angles.astype(dtype))


def _backward(A: Radon, sinogram: Array, weight: Callable[[Array, Array], Array] = _weight) -> Array:
    """(H, W) of one channel: Σ over angles and detectors of weight(t - t', c) times what was measured there."""
    (height, width), dtype, detectors = A.shape_in[-2:], sinogram.dtype, sinogram.shape[-1]
    x, y = jnp.asarray(_centred(width), dtype), jnp.asarray(-_centred(height)[:, None], dtype)
    middle, reach = (detectors - 1) / 2, math.ceil(2 / A.spacing) if weight is _weight else 2

    def add(total: Array, view: tuple[Array, Array]) -> tuple[Array, None]:
        angle, row = view
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        c = jnp.maximum(jnp.abs(cos), jnp.abs(sin))
        mine = x * cos + y * sin
        half = c / A.spacing if weight is _weight else jnp.ones((), dtype)
        first = jnp.floor(mine / A.spacing + middle - half) + 1
        for k in range(reach):  # as many detectors as can see the pixel
            at = first + k
            seen = weight((at - middle) * A.spacing - mine, c)
            inside = (at >= 0) & (at < detectors)
            read = jnp.take(row, jnp.clip(at, 0, detectors - 1).astype(jnp.int32), mode="clip")
            total = total + jnp.where(inside, seen * read, 0)
        return total, None

    return lax.scan(add, jnp.zeros((height, width), dtype), (A.angles.astype(dtype), sinogram))[0]


@eqx.filter_jit
def _with_adjoint(A: Radon, x: Array, adjoint: bool = False) -> Array:
    """A x or Aᵀx, of which JAX knows that they are each other's transposes: of a gather it would make a scatter, which takes
    ten times as long.

    The only linear map with a known transpose that takes all transformations is the solution of a linear system.  So both are
    made to be one symmetric "solution", (image, sinogram) -> (Aᵀ sinogram, A image), half of which the compiler drops.
    """
    shapes = A.shape_in[-2:], A.shape_out[-2:]
    n, m = (math.prod(s) for s in shapes)

    def both(_: Callable[[Array], Array], z: Array) -> Array:
        image, sinogram = z[:n].reshape(shapes[0]), z[n:].reshape(shapes[1])
        return jnp.concatenate([_backward(A, sinogram).reshape(-1), _forward(A, image).reshape(-1)])

    padding = (n, 0) if adjoint else (0, m)
    z = lax.custom_linear_solve(lambda z: z, jnp.pad(x.reshape(-1), padding), both, symmetric=True)
    return z[:n].reshape(shapes[0]) if adjoint else z[n:].reshape(shapes[1])


# ------------------------------------------------------------------------------------- filtered back-projection


@eqx.filter_jit
def fbp(
    A: Radon, sinogram: Float[Array, "*shape_out"], filter: Literal["ramp", "hann"] = "ramp"
) -> Float[Array, "*shape_in"]:
    """Filtered back-projection, for angles that are spread evenly over [0, π) or over [0, 2π).

    filter  "ramp": |frequency| (as the transform of its band-limited kernel, so that a constant is kept: Kak and Slaney 1988,
            chapter 3); "hann": times a window that is zero at the highest frequency, for noisy sinograms
    Raises ValueError for another filter or shape.  Linear in the sinogram.
    """
    if filter not in ("ramp", "hann"):
        raise ValueError(f"fbp: filter is {filter!r}, expected 'ramp' or 'hann'")
    sinogram = checked("sinogram", sinogram, A.shape_out)
    detectors, dtype = A.shape_out[-1], sinogram.dtype
    length = int(scipy.fft.next_fast_len(2 * detectors, real=True))
    lag = np.minimum(np.arange(length), length - np.arange(length))
    kernel = np.where(lag % 2 == 1, -1 / (np.pi * np.maximum(lag, 1)) ** 2, 0.0)
    kernel[0] = 1 / 4
    response = np.fft.rfft(kernel).real / A.spacing
    if filter == "hann":
        response = response * (1 + np.cos(2 * np.pi * np.arange(len(response)) / length)) / 2
    filtered = jnp.fft.irfft(jnp.fft.rfft(sinogram, length) * response.astype(dtype), length)[..., :detectors]

    def interpolated(distance: Array, _: Array) -> Array:
        return jnp.maximum(1 - jnp.abs(distance) / A.spacing, 0)

    flat = filtered.astype(dtype).reshape(-1, *A.shape_out[-2:])
    images = jax.vmap(lambda channel: _backward(A, channel, interpolated))(flat)
    return (np.pi / A.shape_out[-2] * images).astype(dtype).reshape(A.shape_in)


# ---------------------------------------------------------------------------------------------------- phantoms


class Ellipses(eqx.Module):
    """A sum of ellipses, in units of half the side of the image: the image covers [-1, 1]².

    centres      (x, y), y upward
    axes         half-axes
    angles       of the first axis to the x axis
    intensities  what each adds inside
    """

    centres: Float[Array, "count 2"]
    axes: Float[Array, "count 2"]
    angles: Float[Array, " count"]
    intensities: Float[Array, " count"]

    def image(self, side: int, *, oversampling: int = 4) -> Float[Array, "side side"]:
        """Means over the pixels, by oversampling² points in each.  Raises ValueError for sizes below one."""
        if side < 1 or oversampling < 1:
            raise ValueError(f"image: side is {side} and oversampling {oversampling}, expected at least one")
        points = jnp.asarray(_centred(side * oversampling) * 2 / (side * oversampling), self.axes.dtype)

        def add(total: Array, ellipse: Ellipses) -> tuple[Array, None]:
            x, y = points - ellipse.centres[0], -points[:, None] - ellipse.centres[1]
            cos, sin = jnp.cos(ellipse.angles), jnp.sin(ellipse.angles)
            inside = ((x * cos + y * sin) / ellipse.axes[0]) ** 2 + ((y * cos - x * sin) / ellipse.axes[1]) ** 2 <= 1
            return total + jnp.where(inside, ellipse.intensities, 0), None

        fine = lax.scan(add, jnp.zeros((len(points),) * 2, self.axes.dtype), self)[0]
        return fine.reshape(side, oversampling, side, oversampling).mean((1, 3))

    def sinogram(self, A: Radon) -> Float[Array, "angles detectors"]:
        """The exact line integrals for the rays of an operator on square images of one channel, in pixels.

        Of one ellipse 2 I a b √(s² - t²)/s², s² = a² cos²(θ - φ) + b² sin²(θ - φ), t from its centre (Kak and Slaney 1988,
        chapter 3).  Raises ValueError for images that are not square.
        """
        if len(A.shape_in) != 2 or A.shape_in[0] != A.shape_in[1]:
            raise ValueError(f"sinogram: the operator is for {A.shape_in}, expected a square image of one channel")
        half, angles = A.shape_in[0] / 2, A.angles.astype(self.axes.dtype)[:, None]
        positions = jnp.asarray(A.positions, self.axes.dtype)

        def add(total: Array, ellipse: Ellipses) -> tuple[Array, None]:
            (a, b), (x, y) = half * ellipse.axes, half * ellipse.centres
            t = positions - x * jnp.cos(angles) - y * jnp.sin(angles)
            s2 = (a * jnp.cos(angles - ellipse.angles)) ** 2 + (b * jnp.sin(angles - ellipse.angles)) ** 2
            return total + 2 * ellipse.intensities * a * b * jnp.sqrt(jnp.maximum(s2 - t**2, 0)) / s2, None

        return lax.scan(add, jnp.zeros((len(A.angles), len(positions)), self.axes.dtype), self)[0]


def random_ellipses(key: Key[Array, ""], count: int = 12, dtype: DTypeLike = jnp.float32) -> Ellipses:
    """A body, and `count` ellipses of either sign inside it: a slice as of computed tomography.  Clip the image to [0, 1].

    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"random_ellipses: count is {count}, expected a number >= 0")
    for_body, for_radius, for_phase, for_axes, for_angle, for_sign = jax.random.split(key, 6)
    body = jax.random.uniform(for_body, (2,), dtype, 0.65, 0.9)
    radius = 0.7 * jnp.sqrt(jax.random.uniform(for_radius, (count,), dtype))  # even over the area
    phase = jax.random.uniform(for_phase, (count,), dtype, 0, 2 * np.pi)
    centres = body * jnp.stack([radius * jnp.cos(phase), radius * jnp.sin(phase)], 1)
    axes = jnp.exp(jax.random.uniform(for_axes, (count, 2), dtype, math.log(0.03), math.log(0.3)))
    angles = jax.random.uniform(for_angle, (count,), dtype, 0, np.pi)
    intensities = jax.random.uniform(for_sign, (count,), dtype, -0.3, 0.3)
    return Ellipses(
        jnp.concatenate([jnp.zeros((1, 2), dtype), centres]),
        jnp.concatenate([body[None], axes]),
        jnp.concatenate([jnp.zeros(1, dtype), angles]),
        jnp.concatenate([jnp.full(1, 0.5, dtype), intensities]),
    )


def shepp_logan(dtype: DTypeLike = jnp.float32) -> Ellipses:
    """The head of Shepp and Logan (1974), with the stronger contrasts of Toft (1996): values from 0 to 1."""
    rows = np.array(
        [  # x, y, half-axes, degrees, intensity
            (0.00, 0.0000, 0.6900, 0.920, 0.0, 1.0),
            (0.00, -0.0184, 0.6624, 0.874, 0.0, -0.8),
            (0.22, 0.0000, 0.1100, 0.310, -18.0, -0.2),
            (-0.22, 0.0000, 0.1600, 0.410, 18.0, -0.2),
            (0.00, 0.3500, 0.2100, 0.250, 0.0, 0.1),
            (0.00, 0.1000, 0.0460, 0.046, 0.0, 0.1),
            (0.00, -0.1000, 0.0460, 0.046, 0.0, 0.1),
            (-0.08, -0.6050, 0.0460, 0.023, 0.0, 0.1),
            (0.00, -0.6060, 0.0230, 0.023, 0.0, 0.1),
            (0.06, -0.6050, 0.0230, 0.046, 0.0, 0.1),
        ]
    )
    angles, intensities = np.deg2rad(rows[:, 4]), rows[:, 5]
    return Ellipses(*(jnp.asarray(part, dtype) for part in (rows[:, :2], rows[:, 2:4], angles, intensities)))
