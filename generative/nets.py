"""Two networks for diffusion: a multilayer perceptron for a few dimensions, and a small U-Net for images.

Both are called (u, level, label) -> array of the shape of u: u is (batch, *event); level (batch,) says how much noise there is, a
number of order one such as ¼ log σ; label is int (batch,), 0 to classes - 1 or NO_CLASS = -1, or None for no class at all.  Any
other label raises ValueError where it is known, and makes its row NaN inside jit.  What the output means is for
`generative.losses.Parametrised` to say.  A new network returns zeros, as its last layer is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

NO_CLASS = -1  # the label of a row without a class
_FREQUENCIES = 16  # of the Fourier features of the level


class Dense(eqx.Module):
    """x -> x W + b over the last axis."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False, key: Key[Array, ""]):
        self.weight = jnp.zeros((inputs, outputs)) if zero else _normal(key, (inputs, outputs), inputs)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return x @ self.weight + self.bias


class Embedding(eqx.Module):
    """The level of noise and the class as one vector.

    classes  one row for each class and a last one, for NO_CLASS; None for a network without classes
    """

    first: Dense
    second: Dense
    classes: Float[Array, "rows width"] | None

    def __init__(self, width: int, classes: int | None, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 3)
        self.first = Dense(2 * _FREQUENCIES, width, key=keys[0])
        self.second = Dense(width, width, key=keys[1])
        self.classes = None if classes is None else jax.random.normal(keys[2], (classes + 1, width))

    def __call__(
        self, level: Float[Array, " batch"], label: Int[Array, " batch"] | None
    ) -> Float[Array, "batch width"]:
        # Periods of ⅛ to 10: ¼ log σ runs over some two units from hardly any noise to nothing but noise.
        angles = 2 * math.pi * level[:, None] * jnp.asarray(np.geomspace(0.1, 8, _FREQUENCIES), level.dtype)
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)
        out = self.second(jax.nn.silu(self.first(features)))
        if self.classes is None:
            if label is not None:
                raise ValueError("network: a label is given to a network made without classes; expected label=None")
            return out
        return out + self._of_class(self.classes, jnp.full(level.shape, NO_CLASS) if label is None else label)

    @staticmethod
    def _of_class(rows: Array, label: Array) -> Array:
        none = len(rows) - 1
        check_labels("network: label", label, none)
        label = jnp.asarray(label).astype(jnp.result_type(label, jnp.int32))  # bytes have no -1
        known = (label >= NO_CLASS) & (label < none)
        # What is traced cannot raise, and indexing would take the nearest row for the right one.
        return jnp.where(known[:, None], rows[jnp.where(label == NO_CLASS, none, label)], jnp.nan)


class MLP(eqx.Module):
    """Residual perceptron on flattened events.

    shape    of an event
    width    of the hidden layers
    depth    how many of them
    classes  number of classes, None for none
    """

    embedding: Embedding
    first: Dense
    hidden: tuple[tuple[Dense, Dense], ...]
    last: Dense
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 128,
        depth: int = 3,
        classes: int | None = None,
        key: Key[Array, ""],
    ):
        if depth < 1 or width < 1:
            raise ValueError(f"MLP: width is {width} and depth {depth}; expected at least 1 of each")
        self.shape = tuple(shape)
        size = math.prod(self.shape)
        keys = iter(jax.random.split(key, 3 + 2 * depth))
        self.embedding = Embedding(width, classes, key=next(keys))
        self.first = Dense(size, width, key=next(keys))
        self.hidden = tuple(
            (Dense(width, width, key=next(keys)), Dense(width, width, key=next(keys))) for _ in range(depth)
        )
        self.last = Dense(width, size, zero=True, key=next(keys))

    def __call__(
        self, u: Float[Array, " batch *event"], level: Float[Array, " batch"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, " batch *event"]:
        _check_event("MLP", u, self.shape)
        condition = jax.nn.silu(self.embedding(level, label))
        h = self.first(u.reshape(len(u), -1))
        for inner, modulation in self.hidden:
            h = h + jax.nn.silu(inner(h) + modulation(condition))
        return self.last(h).reshape(u.shape)


class Convolution(eqx.Module):
    """Cross-correlation of (batch, height, width, in) with a k x k kernel, k odd, zeros around; the size stays."""

    kernel: Float[Array, "k k inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, size: int = 3, zero: bool = False, key: Key[Array, ""]):
        shape = (size, size, inputs, outputs)
        self.kernel = jnp.zeros(shape) if zero else _normal(key, shape, size * size * inputs)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch height width outputs"]:
        # Channels last: in this layout XLA's convolution on a CPU keeps its speed inside the loop of a sampler.
        out = lax.conv_general_dilated(x, self.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return out + self.bias


class GroupNorm(eqx.Module):
    """Mean zero and variance one over the pixels and the channels of each group; then a scale and a shift per channel."""

    scale: Float[Array, " channels"]
    offset: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int):
        self.scale, self.offset = jnp.ones(channels), jnp.zeros(channels)
        # At least four channels to a group: of a single one, the bias of the convolution before would be lost.
        self.groups = math.gcd(channels, max(1, min(8, channels // 4)))

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        grouped = x.reshape(len(x), -1, self.groups, x.shape[-1] // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = ((grouped - mean) ** 2).mean((1, 3), keepdims=True)
        return ((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * self.scale + self.offset


class Residual(eqx.Module):
    """Norm, SiLU, convolution, norm, scaled and shifted by the embedding, SiLU, convolution; plus the input."""

    norms: tuple[GroupNorm, GroupNorm]
    convolutions: tuple[Convolution, Convolution]
    modulation: Dense
    beside: Dense | None

    def __init__(self, inputs: int, outputs: int, embedding: int, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        self.norms = GroupNorm(inputs), GroupNorm(outputs)
        self.convolutions = (
            Convolution(inputs, outputs, key=keys[0]),
            Convolution(outputs, outputs, zero=True, key=keys[1]),
        )
        self.modulation = Dense(embedding, 2 * outputs, zero=True, key=keys[2])
        self.beside = None if inputs == outputs else Dense(inputs, outputs, key=keys[3])

    def __call__(
        self, x: Float[Array, "batch height width inputs"], condition: Float[Array, "batch embedding"]
    ) -> Float[Array, "batch height width outputs"]:
        scale, offset = jnp.split(self.modulation(condition)[:, None, None], 2, -1)
        h = self.convolutions[0](jax.nn.silu(self.norms[0](x)))
        h = self.convolutions[1](jax.nn.silu(self.norms[1](h) * (1 + scale) + offset))
        return h + (x if self.beside is None else self.beside(x))


class Attention(eqx.Module):
    """Self-attention over the pixels, one head."""

    norm: GroupNorm
    inward: Dense
    outward: Dense

    def __init__(self, channels: int, *, key: Key[Array, ""]):
        first, second = jax.random.split(key)
        self.norm = GroupNorm(channels)
        self.inward = Dense(channels, 3 * channels, key=first)
        self.outward = Dense(channels, channels, zero=True, key=second)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        query, key, value = jnp.split(self.inward(self.norm(x)).reshape(batch, height * width, -1), 3, -1)
        weights = jax.nn.softmax(query @ key.swapaxes(1, 2) / math.sqrt(channels), -1)
        return x + self.outward(weights @ value).reshape(x.shape)


class UNet(eqx.Module):
    """Residual blocks on ever smaller images and back, joined across at each size (Ronneberger et al. 2015, Ho et al. 2020).

    shape      of an event, (height, width) or (height, width, channels)
    widths     channels at each size, each half the one before
    blocks     residual blocks at each size, on the way down and on the way up
    patch      pixels patch x patch are taken as channels of one: 2 makes the first size half the image, four times cheaper
    classes    number of classes, None for none
    attention  at the smallest size

    Raises ValueError if height or width does not divide by patch * 2^(len(widths) - 1).
    """

    embedding: Embedding
    first: Convolution
    down: tuple[tuple[Residual, ...], ...]
    middle: tuple[Residual, Attention | None, Residual]
    up: tuple[tuple[Residual, ...], ...]
    norm: GroupNorm
    last: Convolution
    shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        classes: int | None = None,
        attention: bool = True,
        key: Key[Array, ""],
    ):
        self.shape, self.patch = tuple(shape), patch
        smallest = patch * 2 ** (len(widths) - 1)
        if len(self.shape) not in (2, 3) or not widths or any(n % smallest or n < 1 for n in self.shape[:2]):
            raise ValueError(
                f"UNet: shape is {self.shape}; expected (height, width) or (height, width, channels) with sides that divide by "
                f"patch * 2^(sizes - 1) = {smallest}"
            )
        channels = (1 if len(self.shape) == 2 else self.shape[2]) * patch**2
        wide = 4 * widths[0]
        keys = iter(jax.random.split(key, 6 + 2 * len(widths) * blocks))
        self.embedding = Embedding(wide, classes, key=next(keys))
        self.first = Convolution(channels, widths[0], key=next(keys))
        befores = (widths[0], *widths[:-1])
        self.down = tuple(
            tuple(Residual(before if i == 0 else w, w, wide, key=next(keys)) for i in range(blocks))
            for before, w in zip(befores, widths, strict=True)
        )
        bottom = widths[-1]
        self.middle = (
            Residual(bottom, bottom, wide, key=next(keys)),
            Attention(bottom, key=next(keys)) if attention else None,
            Residual(bottom, bottom, wide, key=next(keys)),
        )
        belows = (*widths[1:], bottom)
        self.up = tuple(
            tuple(Residual(below + w if i == 0 else w, w, wide, key=next(keys)) for i in range(blocks))
            for below, w in zip(belows, widths, strict=True)
        )
        self.norm = GroupNorm(widths[0])
        self.last = Convolution(widths[0], channels, zero=True, key=next(keys))

    def __call__(
        self, u: Float[Array, " batch *event"], level: Float[Array, " batch"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, " batch *event"]:
        _check_event("UNet", u, self.shape)
        condition = jax.nn.silu(self.embedding(level, label))
        h = self.first(_patched(u.reshape(*u.shape[:3], -1), self.patch))
        across = []
        for size, blocks in enumerate(self.down):
            h = _halved(h) if size else h
            for block in blocks:
                h = block(h, condition)
            across.append(h)
        before, attention, after = self.middle
        h = before(h, condition)
        h = h if attention is None else attention(h)
        h = after(h, condition)
        for size in reversed(range(len(self.up))):
            h = jnp.concatenate([h, across[size]], -1)
            for block in self.up[size]:
                h = block(h, condition)
            h = _doubled(h) if size else h
        out = self.last(jax.nn.silu(self.norm(h)))
        return _unpatched(out, self.patch).reshape(u.shape)


def classes_of(model: Any) -> int | None:
    """The number of classes of one of these networks, or of a model that has it as `network`; None where there is none."""
    embedding = getattr(getattr(model, "network", model), "embedding", None)
    rows = embedding.classes if isinstance(embedding, Embedding) else None
    return None if rows is None else len(rows) - 1


def check_labels(name: str, label: int | Array | np.ndarray, classes: int | None) -> None:
    """Raises ValueError, which begins with `name`, unless label holds integers from NO_CLASS = -1 to classes - 1.

    classes  None where nothing is known of it: then there is no largest label
    Values inside jit, vmap or grad are not known and pass.
    """
    if isinstance(label, jax.core.Tracer):
        return
    found = np.asarray(label)
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} is of dtype {found.dtype}; expected integers")
    if not found.size or (found.min() >= NO_CLASS and (classes is None or found.max() < classes)):
        return
    wanted = "0 or more" if classes is None else f"0 .. classes - 1 = {classes - 1}"
    raise ValueError(f"{name} lies in {found.min()} .. {found.max()}; expected {wanted}, or {NO_CLASS} for no class")


def parameters(network: eqx.Module) -> int:
    """How many numbers there are to train."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))


def _normal(key: Array, shape: tuple[int, ...], inputs: int) -> Array:
    return jax.random.normal(key, shape) / math.sqrt(inputs)


def _check_event(name: str, u: Array, shape: tuple[int, ...]) -> None:
    if u.shape[1:] != shape:
        raise ValueError(f"{name}: u has shape {u.shape}; expected (batch, {', '.join(map(str, shape))})")


def _patched(x: Array, patch: int) -> Array:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)


def _unpatched(x: Array, patch: int) -> Array:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, patch, patch, channels // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * patch, width * patch, -1)


def _halved(x: Array) -> Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _doubled(x: Array) -> Array:
    return x.repeat(2, 1).repeat(2, 2)
