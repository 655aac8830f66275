"""Learned proximal networks (Fang, Buchanan, Sulam; ICLR 2024, arXiv 2310.14344): the network, an exact proximal map.

    z_1 = g(H_1 y + b_1),   z_k = g(W_k z_{k-1} + H_k y + b_k),   ψ(y) = wᵀz_K + hᵀy + c + α/2 ‖y‖²      input-convex network
    f = ∇ψ                                                                                              the denoiser

g(t) = log(1 + exp(β t)) / β is convex and does not fall, and W_k, w are not negative.  So ψ is convex, and f is the proximal
map of a function R (Proposition 3.1, after Gribonval and Nikolova 2020) which `solvers.proximal.prior` evaluates.

    mlp, convolutional           networks of any size
    mnist, image128              the paper's: 317 056 parameters; 7 235 713 with three channels, 7 175 297 with one
    projected                    the network with negative weights set to zero, after a step of an optimiser
    jacobian, largest_slope      of f, at a point
    solvers.proximal.bounds      what holds everywhere, from the weights alone

α is the modulus of strong convexity.  The authors' code adds α ‖y‖², without the half: its 0.01 is our 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Key

SMALL = (-10.0, 0.1)
"""Mean and standard deviation of the logarithm of the initial weights W_k, w of the image networks (the paper's code): with
hundreds of weights of one sign to a unit, larger ones would blow the network up."""

Kept = Literal["projection", "softplus"]


class Layer(eqx.Module):
    """z -> g(W z + H y + b): dense, on flattened arrays, or a convolution.

    weight   W, (out, in) or (out, in, k, k); in the first layer, where z is y, this is H
    skip     H, likewise; y is resized to the sides `resized` for it (bilinear).  None for none
    bias     b; None for none
    padding  of a convolution, on each side
    """

    weight: Float[Array, "*_"]
    skip: Float[Array, "*_"] | None
    bias: Float[Array, " out"] | None
    stride: int = eqx.field(static=True, default=1)
    padding: int = eqx.field(static=True, default=1)
    resized: tuple[int, int] | None = eqx.field(static=True, default=None)

    def linear(self, weight: Array, z: Array) -> Array:
        """The linear map of W or H."""
        if weight.ndim == 2:
            return weight @ z.reshape(-1)
        return convolved(z, weight, self.stride, self.padding)


def convolved(
    z: Float[Array, "_ _ _"], weight: Float[Array, "_ _ _ _"], stride: int, padding: int
) -> Float[Array, "_ _ _"]:
    """Cross-correlation of (in, height, width) with (out, in, k, k).

    On a CPU as a product with all neighbourhoods: XLA's convolution there is six times slower as soon as it stands in a loop,
    as that of an iteration.
    """
    size = weight.shape[-2:]
    padded = jnp.pad(z, ((0, 0), (padding, padding), (padding, padding)))
    if jax.default_backend() != "cpu" or size == padded.shape[1:]:
        return lax.conv_general_dilated(padded[None], weight, (stride, stride), "VALID")[0]
    out = [(n - k) // stride + 1 for n, k in zip(padded.shape[1:], size, strict=True)]
    ends = [(m - 1) * stride + 1 for m in out]
    shifts = [
        lax.slice(padded, (0, i, j), (len(z), i + ends[0], j + ends[1]), (1, stride, stride))
        for i in range(size[0])
        for j in range(size[1])
    ]
    neighbourhoods = jnp.stack(shifts, 1).reshape(weight[0].size, -1)
    return (weight.reshape(len(weight), -1) @ neighbourhoods).reshape(len(weight), *out)


class LearnedProximal(eqx.Module):
    """f = ∇ψ, for signals of one shape; jax.vmap for many.

    layers       the first sees the signal alone; W of all others is not negative
    output       w, not negative; of images the mean over what is left of the sides is taken first
    output_skip  h; None for none
    constant     c; None for none
    shape        of a signal: any for dense networks, (channels, height, width) for convolutions
    beta, alpha  β and α
    kept         how W_k and w are kept from being negative: "projection" (`projected` after each step of an optimiser, as in
                 the paper), or "softplus" (what is stored is a number of any sign, whose softplus is the weight)
    box          least and largest entry of the signals that it was trained on, outside of which its prior says nothing; None
                 where that is not known, as of a network that was not loaded from a file that says so
    """

    layers: tuple[Layer, ...]
    output: Float[Array, " last"]
    output_skip: Float[Array, " n"] | None
    constant: Float[Array, ""] | None
    shape: tuple[int, ...] = eqx.field(static=True)
    beta: float = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    kept: Kept = eqx.field(static=True, default="projection")
    box: tuple[float, float] | None = eqx.field(static=True, default=None)

    def __call__(self, y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """f(y).  Raises ValueError for a signal of another shape."""
        return jax.grad(self.potential)(y)

    def potential(self, y: Float[Array, "*shape"]) -> Float[Array, ""]:
        """ψ(y)."""
        if y.shape != self.shape:
            raise ValueError(f"y: has shape {y.shape}, the network is for {self.shape}; for many signals use jax.vmap")
        z = y
        for k, layer in enumerate(self.layers):
            total = layer.linear(layer.weight if k == 0 else self.positive(layer.weight), z)
            if layer.skip is not None:
                total = total + layer.linear(layer.skip, resized(y, layer.resized))
            if layer.bias is not None:
                total = total + layer.bias.reshape(-1, *(1,) * (total.ndim - 1))
            z = jax.nn.softplus(self.beta * total) / self.beta
        value = self.positive(self.output) @ z.reshape(len(self.output), -1).mean(1) + self.alpha / 2 * jnp.sum(y**2)
        if self.output_skip is not None:
            value = value + self.output_skip @ y.reshape(-1)
        return value if self.constant is None else value + self.constant

    def positive(self, weight: Array) -> Array:
        """The weight that a stored number stands for."""
        return weight if self.kept == "projection" else jax.nn.softplus(weight)

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(self, eqx.is_array)))


def resized(y: Array, sides: tuple[int, int] | None) -> Array:
    """Bilinear with half-pixel centres and no smoothing before, as torch's `interpolate`."""
    if sides is None or y.shape[1:] == sides:
        return y
    return jax.image.resize(y, (y.shape[0], *sides), "bilinear", antialias=False)


def constrained(network: LearnedProximal) -> tuple[Any, ...]:  # `eqx.tree_at` calls it with other leaves than arrays
    """The stored numbers of W_2, ..., W_K and w."""
    return (*(layer.weight for layer in network.layers[1:]), network.output)


def projected(network: LearnedProximal) -> LearnedProximal:
    """The nearest network that is input-convex: negative entries of W_k and w set to zero.  Nothing, for kept="softplus"."""
    if network.kept == "softplus":
        return network
    return eqx.tree_at(constrained, network, tuple(jnp.maximum(w, 0) for w in constrained(network)))


def is_convex(network: LearnedProximal) -> bool | None:
    """Whether W_k and w are not negative, so that ψ is convex for any signal.  None where they are traced and not known."""
    if network.kept == "softplus":
        return True
    weights = constrained(network)
    if any(isinstance(w, jax.core.Tracer) for w in weights):
        return None
    return all(bool((np.asarray(w) >= 0).all()) for w in weights)


def mlp(
    key: Key[Array, ""],
    shape: int | Sequence[int],
    *,
    hidden: int = 50,
    layers: int = 4,
    beta: float = 10.0,
    alpha: float = 0.0,
    kept: Kept = "projection",
    dtype: DTypeLike = jnp.float32,
) -> LearnedProximal:
    """A dense network; as it stands the paper's in one dimension, 10 502 parameters.

    layers  K - 1, those with a W
    Weights are uniform on ±1/√(inputs), W_k and w by their absolute value.
    """
    sides, beta, alpha = _checked("mlp", shape, hidden, layers, beta, alpha, kept)
    n, draw = math.prod(sides), _Draws(key, kept, dtype)
    inner = [Layer(draw.free((hidden, n)), None, None)]
    for _ in range(layers):
        inner.append(Layer(draw.positive((hidden, hidden)), draw.free((hidden, n)), draw.free((hidden,), n)))
    output, skip, constant = draw.positive((hidden,)), draw.free((n,)), draw.free((), n)
    return LearnedProximal(tuple(inner), output, skip, constant, sides, beta, alpha, kept)


def convolutional(
    key: Key[Array, ""],
    shape: Sequence[int],
    *,
    hidden: int = 64,
    strides: Sequence[int] = (2, 1, 2),
    head: Literal["dense", "convolution"] = "dense",
    last: int = 64,
    beta: float = 10.0,
    alpha: float = 0.02,
    kept: Kept = "projection",
    dtype: DTypeLike = jnp.float32,
) -> LearnedProximal:
    """A convolutional network for images (channels, height, width) of any sides.

    strides  of the convolutions 3x3 after the first; each has `hidden` channels
    head     what sees the whole of what they leave: a dense layer, or a convolution as large as that
    last     units of the head
    W_k and w begin near exp(-10) (`SMALL`), all other weights uniform on ±1/√(inputs).
    """
    sides, beta, alpha = _checked("convolutional", shape, hidden, len(strides), beta, alpha, kept)
    if len(sides) != 3:
        raise ValueError(f"convolutional: shape is {sides}, expected (channels, height, width)")
    if not all(s in (1, 2) for s in strides):
        raise ValueError(f"convolutional: strides are {tuple(strides)}, expected ones and twos")
    channels, *size = sides
    draw = _Draws(key, kept, dtype)
    bias = draw.free((hidden,), 9 * channels) if head == "convolution" else None
    inner = [Layer(draw.free((hidden, channels, 3, 3)), None, bias)]
    for stride in strides:
        weight, skip = draw.small((hidden, hidden, 3, 3)), draw.free((hidden, channels, 3, 3))
        inner.append(Layer(weight, skip, draw.free((hidden,), 9 * channels), stride, 1, (size[0], size[1])))
        size = [-(-n // stride) for n in size]
    left = math.prod(size)
    if head == "dense":
        weight, skip = draw.small((last, hidden * left)), draw.free((last, channels * left))
    else:
        weight, skip = draw.small((last, hidden, *size)), draw.free((last, channels, *size))
    inner.append(Layer(weight, skip, draw.free((last,), channels * left), 1, 0, (size[0], size[1])))
    constant = draw.free((), last) if head == "convolution" else None
    return LearnedProximal(tuple(inner), draw.small((last,)), None, constant, sides, beta, alpha, kept)


def mnist(key: Key[Array, ""], *, hidden: int = 64, dtype: DTypeLike = jnp.float32) -> LearnedProximal:
    """The paper's network for images (1, 28, 28): 317 056 parameters."""
    return convolutional(key, (1, 28, 28), hidden=hidden, last=hidden, dtype=dtype)


def image128(
    key: Key[Array, ""],
    *,
    channels: int = 3,
    side: int = 128,
    hidden: int = 256,
    beta: float = 100.0,
    dtype: DTypeLike = jnp.float32,
) -> LearnedProximal:
    """The paper's network for images of 128 x 128: 7 235 713 parameters with three channels, 7 175 297 with one."""
    return convolutional(
        key,
        (channels, side, side),
        hidden=hidden,
        strides=(2, 1, 2, 1, 2),
        head="convolution",
        beta=beta,
        alpha=2e-6,
        dtype=dtype,
    )


class _Draws:
    """Initial weights, each with a key of its own."""

    def __init__(self, key: Array, kept: Kept, dtype: DTypeLike) -> None:
        self.key, self.kept, self.dtype, self.count = key, kept, jnp.dtype(dtype), 0

    def _next(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)

    def free(self, shape: tuple[int, ...], inputs: int | None = None) -> Array:
        bound = 1 / math.sqrt(math.prod(shape[1:]) if inputs is None else inputs)
        return jax.random.uniform(self._next(), shape, self.dtype, -bound, bound)

    def positive(self, shape: tuple[int, ...]) -> Array:
        return self._stored(jnp.abs(self.free(shape, shape[-1])))

    def small(self, shape: tuple[int, ...]) -> Array:
        mean, deviation = SMALL
        return self._stored(jnp.exp(mean + deviation * jax.random.normal(self._next(), shape, self.dtype)))

    def _stored(self, weight: Array) -> Array:
        if self.kept == "projection":
            return weight
        return weight + jnp.log(-jnp.expm1(-jnp.maximum(weight, 1e-12)))  # the inverse of softplus


def _checked(
    caller: str, shape: int | Sequence[int], hidden: int, layers: int, beta: float, alpha: float, kept: str
) -> tuple[tuple[int, ...], float, float]:
    sides = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if not sides or any(n < 1 for n in sides):
        raise ValueError(f"{caller}: shape is {shape}, expected positive sides")
    if hidden < 1 or layers < 1:
        raise ValueError(f"{caller}: {hidden} hidden units in {layers} layers, expected at least one of each")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"{caller}: beta is {beta}, expected a positive number")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"{caller}: alpha is {alpha}, expected a number >= 0 (a convex potential)")
    if kept not in ("projection", "softplus"):
        raise ValueError(f"{caller}: kept is {kept!r}, expected 'projection' or 'softplus'")
    return tuple(int(n) for n in sides), float(beta), float(alpha)


# -------------------------------------------------------------------------------------------------- constants


def jacobian(network: LearnedProximal, y: Float[Array, "*shape"]) -> Float[Array, "n n"]:
    """∂f/∂y = ∇²ψ on flattened signals: symmetric, no eigenvalue below α.  For small signals."""
    n = math.prod(network.shape)
    return jax.jacfwd(network)(y).reshape(n, n)


def largest_slope(
    network: LearnedProximal, y: Float[Array, "*shape"], key: Key[Array, ""], steps: int = 30
) -> Float[Array, ""]:
    """The largest eigenvalue of ∂f/∂y at y, from below, by power iteration.  The largest over many y is a lower bound of the
    Lipschitz constant of f, not a constant that holds everywhere: that is `solvers.proximal.bounds.certified`."""

    def product(v: Array) -> Array:
        return jax.jvp(network, (y,), (v,))[1]

    def step(_: Any, v: Array) -> Array:
        v = product(v)
        return v / jnp.maximum(jnp.linalg.norm(v.reshape(-1)), jnp.finfo(v.dtype).tiny)

    v = lax.fori_loop(0, steps, step, jax.random.normal(key, y.shape, y.dtype))
    return jnp.vdot(v, product(v)) / jnp.vdot(v, v)
