"""The learned search direction of the deep conjugate direction method: the paper's network, its losses, its weights in a file.

Ayano Kaneda, Osman Akar, Jingyu Chen, Victoria Alicia Trevino Kala, David Hyde, Joseph Teran: A Deep Conjugate Direction
Method for Iteratively Solving Linear Systems, ICML 2023, arXiv 2205.10763.

A x = b is solved by line searches along d = f(r/|r|), r = b - A x, made A-orthogonal to the directions before.  Here is f: a
convolutional network from a residual grid to a direction grid that knows nothing of the domain, trained on one matrix without
solutions (`solvers.direction_data`, `solvers.direction_training`).  A is any function v -> A v on grids, symmetric and positive
semi-definite.

    DirectionNetwork                      the paper's network in 1, 2 or 3 dimensions; MODEL_64 and MODEL_128 are its sizes
    MaskedDirection                       a network on a domain of any size, zero outside the fluid
    flops_per_cell, receptive_radius      what an application costs and how far it sees
    residual_loss                         the paper's loss |r - α A d|²
    energy_loss                           the squared factor by which the line search along d reduces the energy norm of the error
    save, load, facts                     weights in a file
    shipped                               the weights that come with the package
"""

import itertools
import os
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from solvers import array_files

Operator = Callable[[Array], Array]
Activation = Callable[[Array], Array]

MODEL_64 = (2, 3, 2)  # pairs of convolutions before, at and after the coarse level
MODEL_128 = (3, 5, 3)
# What a weights file can name.
_ACTIVATIONS: dict[str, Activation | None] = {
    "linear": None,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

# --- the network ---


class DirectionNetwork(eqx.Module):
    """A residual convolutional network with one coarse level, from a residual grid to a direction grid.

    Kernels 3 in every dimension, zero padding.  With C a convolution with bias and R the activation, blocks = (p, q, s):

        h = C r;  a = R(C h);  b = R(C a);  p - 1 times: a = R(C b) + a, b = R(C a)
        g = 2× average pool of b;  q times: g = R(C R(C g)) + g
        u = 2× nearest-neighbour upsampling of g, + b;  s times: u = R(C R(C u)) + u
        d = one linear map of the channels at every cell

    Weights are Glorot-uniform, biases zero.  With a bias or an activation that is not homogeneous the network depends on the
    scale of r; the paper feeds r/|r|, which is left to the caller.  Cells outside the fluid get values too (`MaskedDirection`).

    dimensions  1, 2 or 3
    blocks      pairs of convolutions before, at and after the coarse level: MODEL_64 (97 457 parameters in 3-D) or
                MODEL_128 (152 881)
    channels    16 in the paper
    activation  a function of arrays, None for a linear network (then, without biases, d is linear in r)
    bias        False for no biases at all
    rescaled    True to multiply r by the root of the number of cells first: entries of a residual of norm 1 are then of order
                1 on grids of all sizes, where the paper's fall with the size
    dtype       of the weights and the work, floating (float32 or bfloat16); the result has the dtype of r
    """

    weights: tuple[Array, ...]  # (3, ..., 3, in, out), the last (16, 1)
    biases: tuple[Array, ...] | None
    dimensions: int = eqx.field(static=True)
    blocks: tuple[int, int, int] = eqx.field(static=True)
    activation: Activation | None = eqx.field(static=True)
    rescaled: bool = eqx.field(static=True)

    def __init__(
        self,
        dimensions: int = 3,
        blocks: tuple[int, int, int] = MODEL_64,
        *,
        channels: int = 16,
        activation: Activation | None = jax.nn.relu,
        bias: bool = True,
        rescaled: bool = False,
        dtype: Any = jnp.float32,
        key: Key[Array, ""],
    ):
        if dimensions not in (1, 2, 3):
            raise ValueError(f"DirectionNetwork: dimensions is {dimensions}; expected 1, 2 or 3")
        if len(blocks) != 3 or min(blocks) < 1:
            raise ValueError(f"DirectionNetwork: blocks is {blocks}; expected three numbers of pairs, each at least 1")
        if channels < 1:
            raise ValueError(f"DirectionNetwork: channels is {channels}; expected at least 1")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"DirectionNetwork: dtype is {dtype}; expected a floating type")
        kernel = (3,) * dimensions
        hidden = [(*kernel, channels, channels)] * (2 * sum(blocks))
        shapes = [(*kernel, 1, channels), *hidden, (channels, 1)]
        # Drawn in single precision, so that types of all sizes start from the same network.
        glorot = jax.nn.initializers.glorot_uniform()
        keys = jax.random.split(key, len(shapes))
        self.weights = tuple(glorot(k, s, jnp.float32).astype(dtype) for k, s in zip(keys, shapes, strict=True))
        self.biases = tuple(jnp.zeros(s[-1], dtype) for s in shapes) if bias else None
        self.dimensions = dimensions
        self.blocks = (blocks[0], blocks[1], blocks[2])
        self.activation = activation
        self.rescaled = rescaled

    def __call__(self, r: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The direction for one residual grid (n1, ..., n_dimensions) of even sizes; batches by vmap.

        Raises ValueError for another number of dimensions or an odd size, TypeError if r is not floating.
        """
        r = jnp.asarray(r)
        if not jnp.issubdtype(r.dtype, jnp.floating):
            raise TypeError(f"DirectionNetwork: r has type {r.dtype}; expected a floating type")
        if r.ndim != self.dimensions:
            raise ValueError(
                f"DirectionNetwork: r has shape {r.shape}; expected {self.dimensions} dimensions, one grid (vmap over a batch)"
            )
        if any(n % 2 or n == 0 for n in r.shape):
            raise ValueError(f"DirectionNetwork: r has shape {r.shape}; expected even sizes (pad with zeros)")

        def biased(h: Array, layer: int) -> Array:
            return h if self.biases is None else h + self.biases[layer]

        def conv(h: Array) -> Array:
            layer = next(layers)
            return biased(_convolve(h, self.weights[layer]), layer)

        def active(h: Array) -> Array:
            return conv(h) if self.activation is None else self.activation(conv(h))

        layers = iter(range(len(self.weights) - 1))
        before, coarse, after = self.blocks
        scaled = r * float(r.size) ** 0.5 if self.rescaled else r
        a = active(conv(scaled.astype(self.weights[0].dtype)[..., None]))
        b = active(a)
        for _ in range(before - 1):
            a = active(b) + a
            b = active(a)
        g = _pool(b)
        for _ in range(coarse):
            g = active(active(g)) + g
        u = _upsample(g) + b
        for _ in range(after):
            u = active(active(u)) + u
        return biased(u @ self.weights[-1], -1)[..., 0].astype(r.dtype)


def _convolve(h: Array, weight: Array) -> Array:
    """Cross-correlation with zero padding; h (grid..., in), weight (3..., in, out)."""
    if h.ndim == 4 and jax.default_backend() == "cpu":
        return _convolve_by_planes(h, weight)
    axes = "012"[: h.ndim - 1]
    form = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(h[None], weight, (1,) * len(axes), "SAME", dimension_numbers=form)[0]


def _convolve_by_planes(h: Array, weight: Array) -> Array:
    """The same in three dimensions, as one matrix product per plane: XLA's convolution on CPUs is five to ten times slower.

    A plane's neighbourhoods in the last two axes are gathered; the product makes of each what it contributes to the plane
    behind, the plane itself and the one before, which are added up.  One plane fits the cache, all planes do not.
    """
    _, width, depth, channels = h.shape
    out = weight.shape[-1]
    matrix = jnp.moveaxis(weight, 0, -2).reshape(9 * channels, 3 * out)

    @jax.checkpoint  # gathered anew for the gradient: cheaper than to store nine planes
    def contributions(plane: Array) -> Array:
        padded = jnp.pad(plane, ((1, 1), (1, 1), (0, 0)))
        shifts = itertools.product(range(3), repeat=2)
        return jnp.concatenate([padded[i : i + width, j : j + depth] for i, j in shifts], -1) @ matrix

    behind, same, before = jnp.split(lax.map(contributions, h), 3, -1)
    aside = ((0, 0),) * 3
    return same + jnp.pad(behind[:-1], ((1, 0), *aside)) + jnp.pad(before[1:], ((0, 1), *aside))


def _pool(h: Array) -> Array:
    halves = [part for n in h.shape[:-1] for part in (n // 2, 2)]
    return h.reshape(*halves, h.shape[-1]).mean(tuple(range(1, 2 * h.ndim - 2, 2)))


def _upsample(h: Array) -> Array:
    for axis in range(h.ndim - 1):
        h = jnp.repeat(h, 2, axis)
    return h


class MaskedDirection(eqx.Module):
    """A direction r -> d from a network, on a grid of any size: zero outside a mask, r filled up with zeros to even sizes."""

    network: DirectionNetwork
    mask: Bool[Array, "..."]

    def __call__(self, r: Float[Array, "..."]) -> Float[Array, "..."]:
        """d for r of the shape of the mask; values of r outside the mask do not matter."""
        inside = jnp.where(self.mask, r, 0)
        d = self.network(jnp.pad(inside, [(0, n % 2) for n in r.shape]))
        return jnp.where(self.mask, d[tuple(slice(n) for n in r.shape)], 0)


def flops_per_cell(network: DirectionNetwork) -> float:
    """Floating-point operations per cell of one application: two per weight used, padding and biases not counted."""
    before, coarse, after = network.blocks
    hidden = network.weights[1].size
    return 2.0 * (
        network.weights[0].size
        + hidden * 2 * (before + after + coarse / 2**network.dimensions)
        + network.weights[-1].size
    )


def receptive_radius(network: DirectionNetwork) -> int:
    """How many cells away, in the maximum norm, the residual can still influence the direction."""
    before, coarse, after = network.blocks
    return (1 + 2 * before) + 2 * (2 * coarse) + 2 * after + 1  # the last for a cell that shares a coarse cell


# --- losses ---


def residual_loss(
    operator: Operator, d: Float[ArrayLike, "..."], r: Float[ArrayLike, "..."], x: Float[ArrayLike, "..."] | None = None
) -> Float[Array, ""]:
    """The paper's loss of one example: |r - α A d|² with α = (d·r)/(d·A d), the step that is best in the energy norm.

    d  the direction for the residual r, which the paper takes of norm 1.  `x` is not used.
    The value is |r|² for a direction without energy.  A small value does not mean a small error: in the energy norm the
    error can shrink by as little as √(value·κ)/|r|, κ the condition number of A.
    """
    d, r = jnp.asarray(d), jnp.asarray(r)
    image = operator(d)
    alpha = _ratio(jnp.vdot(d, r), jnp.vdot(d, image))
    return jnp.square(r - alpha * image).sum()


def energy_loss(
    operator: Operator, d: Float[ArrayLike, "..."], r: Float[ArrayLike, "..."], x: Float[ArrayLike, "..."]
) -> Float[Array, ""]:
    """1 - (r·d)² / ((d·A d)(x·r)) for r = A x: the squared sine of the angle between d and x in the energy inner product.

    It is the square of the factor by which an exact line search along d reduces the error |x|_A; scale and sign of r and d do
    not matter.  1 for a direction, or an x, without energy.
    """
    d, r, x = jnp.asarray(d), jnp.asarray(r), jnp.asarray(x)
    return 1 - _ratio(jnp.square(jnp.vdot(r, d)), jnp.vdot(d, operator(d)) * jnp.vdot(x, r))


def _ratio(a: Array, b: Array) -> Array:
    """a/b, 0 where b is 0; the gradient is 0 there too."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


# --- files ---


def save(path: str | os.PathLike[str], network: DirectionNetwork, **facts: Any) -> None:
    """Write the weights to `path`, an npz file with a JSON header, whole or not at all.

    facts  what should be known of them, such as command="...", seed=0; anything that JSON can hold.  The versions of Python's
           packages at work are added.
    Raises ValueError if the activation is none that a file can name (relu, leaky_relu, gelu, silu, tanh or None).
    """
    names = [name for name, activation in _ACTIVATIONS.items() if activation is network.activation]
    if not names:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"save: activation is {network.activation}; expected one that a file can name: {known}")
    header = {
        "network": {
            "dimensions": network.dimensions,
            "blocks": network.blocks,
            "channels": len(network.weights[-1]),
            "activation": names[0],
            "bias": network.biases is not None,
            "rescaled": network.rescaled,
            "dtype": network.weights[0].dtype.name,
        },
        "versions": {name: metadata.version(name) for name in ("jax", "equinox", "optax", "numpy")},
        "facts": facts,
    }
    array_files.write(Path(path), header, network)


def load(path: str | os.PathLike[str]) -> DirectionNetwork:
    """The network that `save` wrote.  Raises ValueError if the file is not such a file."""
    header, arrays = array_files.read(Path(path), "load", "network")
    form = header["network"]
    try:
        blank = eqx.filter_eval_shape(
            DirectionNetwork,
            form["dimensions"],
            tuple(form["blocks"]),
            channels=form["channels"],
            activation=_ACTIVATIONS[form["activation"]],
            bias=form["bias"],
            rescaled=form["rescaled"],
            dtype=jnp.dtype(form["dtype"]),
            key=jax.random.key(0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path} announces a network that cannot be: {error!r}") from error
    return array_files.restored(Path(path), "load", arrays, blank)


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a weights file: "network", "versions" and, under "facts", what `save` was told."""
    header, _ = array_files.read(Path(path), "facts", "network")
    return header


def shipped(name: str) -> DirectionNetwork:
    """A network that comes with the package: "poisson2d" or "poisson3d".  `facts` of its file says how it was made.

    Raises ValueError, with the names there are, for another name.
    """
    with resources.as_file(_shipped_file(name)) as path:
        return load(path)


def _shipped_file(name: str) -> Any:
    folder = resources.files("solvers") / "weights"
    file = folder / f"direction_{name}.npz"
    if not file.is_file():
        files = [f.name for f in folder.iterdir() if f.name.startswith("direction_") and f.name.endswith(".npz")]
        known = sorted(f.removeprefix("direction_").removesuffix(".npz") for f in files)
        raise ValueError(f"load: no network is called {name!r}; there are {known}")
    return file
