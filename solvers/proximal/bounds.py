"""What is known of a learned proximal network from its weights: constants that hold everywhere, and how far rounding moves it."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from solvers.proximal.network import LearnedProximal, is_convex, resized


class Certified(NamedTuple):
    """lipschitz  L: ‖f(a) - f(b)‖ ≤ L ‖a - b‖ for all a, b
    spread     C: ‖f(y) - α y‖ ≤ C for all y
    """

    lipschitz: float
    spread: float


def certified(network: LearnedProximal) -> Certified:
    """Constants that hold for all signals, by recursion over the layers; 40 to 50 times what is found on samples.

    Of a unit j of layer k, G_k[j] bounds the gradient and S_k[j] the second derivative:
    A_k = W_k G_{k-1} + ‖H_k[j]‖,  S_k = β/4 A_k² + W_k S_{k-1},  G_k = A_k.  Of a convolution it is one number per channel.
    Raises ValueError for negative W_k or w, with which none of this holds.
    """
    if is_convex(network) is False:
        raise ValueError(
            "certified: W_k or w has negative entries, expected none: projected(network) sets them to zero, which is needed "
            "after each step of an optimiser"
        )
    gradient = second = np.zeros(0)
    for k, layer in enumerate(network.layers):
        weight = np.asarray(layer.weight if k == 0 else network.positive(layer.weight), float)
        rows = np.zeros(len(weight))
        below = (0.0, 0.0)
        if k == 0:
            rows = np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(1))
        else:
            matrix = weight.reshape(len(weight), len(gradient), -1).sum(2)
            below = matrix @ gradient, matrix @ second
        if layer.skip is not None:
            skip = np.asarray(layer.skip, float).reshape(len(weight), -1)
            rows = np.sqrt((skip**2).sum(1)) * _resizing_norm(network.shape, layer.resized)
        gradient = below[0] + rows
        second = network.beta / 4 * gradient**2 + below[1]
    output = np.asarray(network.positive(network.output), float)
    free = 0.0 if network.output_skip is None else float(np.linalg.norm(np.asarray(network.output_skip, float)))
    return Certified(network.alpha + float(output @ second), float(output @ gradient) + free)


def rounding(network: LearnedProximal, y: Float[Array, "*shape"]) -> Float[Array, ""]:
    """How far rounding can move ψ(y) as it is computed, in units of eps of the dtype.

    A sum of n products is off by at most n/2 eps times the sum of their sizes, and by about √n/2 where the roundings are
    independent (Higham and Mary 2019); taken is √n.  The rest is first order: with t_k = W_k z_{k-1} + H_k y + b_k, n terms, the
    error of z_k = g(t_k) is that of t_k times the slope of g, and no more than 4 eps z_k for exp, log1p and the factors β,

        e_k = g'(t_k) (W_k e_{k-1} + √n (W_k z_{k-1} + |H_k| |y| + |b_k|)) + 4 z_k

    Errors of the units of a layer are added with one sign, as if they were not independent: that makes the bound a safe one.
    """
    z, error = y, jnp.zeros_like(y)
    for k, layer in enumerate(network.layers):
        weight = layer.weight if k == 0 else network.positive(layer.weight)
        terms = math.prod(weight.shape[1:])
        total, size = layer.linear(weight, z), layer.linear(jnp.abs(weight), jnp.abs(z))
        error = layer.linear(jnp.abs(weight), error)
        if layer.skip is not None:
            seen = resized(y, layer.resized)
            total, size = (
                total + layer.linear(layer.skip, seen),
                size + layer.linear(jnp.abs(layer.skip), jnp.abs(seen)),
            )
            terms += math.prod(layer.skip.shape[1:])
        if layer.bias is not None:
            bias = layer.bias.reshape(-1, *(1,) * (total.ndim - 1))
            total, size, terms = total + bias, size + jnp.abs(bias), terms + 1
        z = jax.nn.softplus(network.beta * total) / network.beta
        error = jax.nn.sigmoid(network.beta * total) * (error + math.sqrt(terms) * size) + 4 * z
    weight, units = network.positive(network.output), z.reshape(len(network.output), -1)
    found = jnp.abs(weight) @ (error.reshape(units.shape) + math.sqrt(z.size) * units).mean(1)
    found = found + math.sqrt(y.size) * network.alpha / 2 * jnp.sum(y**2)
    if network.output_skip is not None:
        found = found + math.sqrt(y.size) * jnp.abs(network.output_skip) @ jnp.abs(y.reshape(-1))
    return found if network.constant is None else found + jnp.abs(network.constant)


def _resizing_norm(shape: tuple[int, ...], sides: tuple[int, int] | None) -> float:
    """Spectral norm of the resizing of one channel, the product of those along the two axes."""
    if sides is None:
        return 1.0
    with jax.ensure_compile_time_eval():  # the sizes are known under jit too
        norms = [
            np.linalg.norm(np.asarray(jax.image.resize(jnp.eye(n), (m, n), "bilinear", antialias=False)), 2)
            for n, m in zip(shape[1:], sides, strict=True)
        ]
    return float(np.prod(norms))
