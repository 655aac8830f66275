"""The prior of many signals at once: the inversion of a network as a loop of the host over compiled steps.

`LearnedRegularizer` inverts within one compiled program, where XLA's convolutions on CPUs are slow.  This is for batches of
images.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from solvers.proximal.network import LearnedProximal
from solvers.proximal.prior import Evaluation

LOOKS = 10
"""Steps between two looks of the host."""


def evaluate_batch(
    network: LearnedProximal, x: Float[Array, "*signals"], *, tolerance: float = 1e-4, max_steps: int = 2000
) -> Evaluation:
    """R at each row of x, up to one constant, as `LearnedRegularizer.evaluate` gives it; its arrays have an axis for the rows.

    tolerance  on ‖f(z) - x‖, relative to the larger of ‖x‖ and 1.  R - value is at most the square of ‖f(z) - x‖, over 2α

    Accelerated gradient steps on ψ(z) - ⟨x, z⟩, each row with a slope of its own for f that grows with what is seen of it, and
    its momentum lost where it leads uphill.  Raises ValueError for rows of a shape that is not the network's.
    """
    if x.shape[1:] != network.shape:
        raise ValueError(f"x: has rows of shape {x.shape[1:]}, the network is for {network.shape}")
    ones = jnp.ones((len(x), *(1,) * (x.ndim - 1)), x.dtype)
    gradient = _gradient(network, x, x)
    state: tuple[Array, ...] = (x, x, ones, ones, gradient)
    allowed = tolerance * jnp.maximum(1.0, _norms(x))
    for step in range(max_steps):
        state = _step(network, x, state)
        if step % LOOKS == LOOKS - 1 and bool((_norms(_gradient(network, x, state[0])) <= allowed).all()):
            break
    value, residual = _value(network, x, state[0])
    bound = residual**2 / (2 * network.alpha) if network.alpha > 0 else jnp.full_like(residual, jnp.inf)
    return Evaluation(value, state[0], residual, bound, residual <= allowed)


def _norms(x: Array) -> Array:
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)


@eqx.filter_jit
def _gradient(network: LearnedProximal, x: Array, z: Array) -> Array:
    return jax.vmap(network)(z) - x


@eqx.filter_jit
def _step(network: LearnedProximal, x: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    """z, the point ahead of it, the momentum's number, the slope, and the gradient at the point ahead."""
    z, ahead, number, slope, gradient = state
    new = ahead - gradient / slope
    uphill = (gradient * (new - z)).reshape(len(z), -1).sum(1).reshape(number.shape) > 0
    number = jnp.where(uphill, 1.0, number)
    later = (1 + jnp.sqrt(1 + 4 * number**2)) / 2
    next_ahead = new + (number - 1) / later * (new - z)
    next_gradient = jax.vmap(network)(next_ahead) - x
    moved = _norms(next_ahead - ahead)
    seen = (_norms(next_gradient - gradient) / jnp.where(moved > 0, moved, 1)).reshape(slope.shape)
    return new, next_ahead, later, jnp.maximum(slope, jnp.where(jnp.isfinite(seen), 1.05 * seen, slope)), next_gradient


@eqx.filter_jit
def _value(network: LearnedProximal, x: Array, z: Array) -> tuple[Array, Array]:
    def one(x: Array, z: Array) -> tuple[Array, Array]:
        value = jnp.vdot(x, z) - jnp.vdot(x, x) / 2 - network.potential(z)
        return value, jnp.linalg.norm((network(z) - x).reshape(-1))

    return jax.vmap(one)(x, z)
