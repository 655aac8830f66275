"""Denoising networks that are not proximal maps by construction: a gradient step, and a free map.  Plain modules y -> D(y), for
signals of one shape, to be trained by `solvers.proximal.training`; jax.vmap for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class Network(eqx.Module):
    """A small network x -> N(x) of one shape: convolutions 3x3 on images (C, H, W), dense layers on anything else.

    smooth  softplus between the layers, which has a derivative of any order, else the positive part
    """

    weights: tuple[Float[Array, "*_"], ...]
    biases: tuple[Float[Array, " _"], ...]
    shape: tuple[int, ...] = eqx.field(static=True)
    smooth: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """N(x).  Raises ValueError for a signal of another shape."""
        if x.shape != self.shape:
            raise ValueError(f"y: has shape {x.shape}, the network is for {self.shape}; for many signals use jax.vmap")
        images = self.weights[0].ndim == 4
        z = x if images else x.reshape(-1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if k:
                z = jax.nn.softplus(10 * z) / 10 if self.smooth else jax.nn.relu(z)
            if images:
                z = lax.conv_general_dilated(z[None], weight, (1, 1), "SAME")[0] + bias[:, None, None]
            else:
                z = weight @ z + bias
        return z.reshape(self.shape)


def _network(
    key: Array, shape: int | Sequence[int], hidden: int, layers: int, smooth: bool, dtype: DTypeLike
) -> Network:
    """He's initial weights, the last layer a tenth of these: the denoiser begins near the identity."""
    sides = (shape,) if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)
    if not sides or any(n < 1 for n in sides):
        raise ValueError(f"create: shape is {shape}, expected positive sides")
    if hidden < 1 or layers < 2:
        raise ValueError(f"create: {hidden} hidden units in {layers} layers, expected at least one in two")
    ends, window = (sides[0], (3, 3)) if len(sides) == 3 else (math.prod(sides), ())
    widths = (ends, *(hidden,) * (layers - 1), ends)
    weights = []
    for k, (a, b) in enumerate(pairwise(widths)):
        scale = math.sqrt(2 / (a * math.prod(window))) * (0.1 if k == layers - 1 else 1)
        weights.append(scale * jax.random.normal(jax.random.fold_in(key, k), (b, a, *window), dtype))
    return Network(tuple(weights), tuple(jnp.zeros(b, dtype) for b in widths[1:]), sides, smooth)


class GradientStepDenoiser(eqx.Module):
    """D = 1 - ∇g, g(x) = ‖x - N(x)‖²/2: a gradient, D = ∇ψ with ψ(y) = ‖y‖²/2 - g(y).

    If ∇g has a Lipschitz constant below one, ψ is convex and D the proximal map of a function φ (Hurault, Leclaire, Papadakis;
    ICML 2022), φ(D(y)) = g(y) - ‖∇g(y)‖²/2.  A trained network promises no such constant: `lipschitz` is None.

    residual  x -> N(x) - x, of any architecture; `create` makes a plain one
    """

    residual: Callable[[Array], Array]

    @staticmethod
    def create(
        key: Key[Array, ""],
        shape: int | Sequence[int],
        *,
        hidden: int = 32,
        layers: int = 5,
        dtype: DTypeLike = jnp.float32,
    ) -> GradientStepDenoiser:
        """Convolutions for images (C, H, W), dense layers for other shapes.  Raises ValueError for sizes below one."""
        return GradientStepDenoiser(_network(key, shape, hidden, layers, True, dtype))

    def __call__(self, y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """D(y)."""
        return y - jax.grad(self.energy)(y)

    def denoise(self, v: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """D(v)."""
        return self(v)

    def energy(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """g(x), the regulariser of gradient-step methods."""
        return jnp.sum(self.residual(x) ** 2) / 2

    def potential(self, y: Float[Array, "*shape"]) -> Float[Array, ""]:
        """ψ(y), whose gradient is D; convex or not."""
        return jnp.sum(y**2) / 2 - self.energy(y)

    def value_at(self, y: Float[Array, "*shape"]) -> Float[Array, ""]:
        """φ(D(y)), up to a constant: the regulariser of which D is the proximal map, if it is one, at the denoised signal."""
        energy, slope = jax.value_and_grad(self.energy)(y)
        return energy - jnp.sum(slope**2) / 2

    @property
    def weak_convexity(self) -> None:
        """Not known."""
        return None

    @property
    def lipschitz(self) -> None:
        """Not known."""
        return None


class FreeDenoiser(eqx.Module):
    """D(y) = y - N(y) with no constraint: in general the proximal map of no function.  The common choice of plug-and-play.

    noise  x -> N(x), of any architecture; `create` makes a plain one
    """

    noise: Callable[[Array], Array]

    @staticmethod
    def create(
        key: Key[Array, ""],
        shape: int | Sequence[int],
        *,
        hidden: int = 32,
        layers: int = 5,
        dtype: DTypeLike = jnp.float32,
    ) -> FreeDenoiser:
        """As `GradientStepDenoiser.create`."""
        return FreeDenoiser(_network(key, shape, hidden, layers, False, dtype))

    def __call__(self, y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """D(y)."""
        return y - self.noise(y)

    def denoise(self, v: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """D(v)."""
        return self(v)
