"""Learning by multiplication: exponentiated gradients, the mirror descent that they are, and Dale's law.

    w ← w exp(-η g)

A weight that is multiplied by a positive number keeps its sign, as a synapse does (Dale's law).  For w > 0 and g = ∇L(w) this is
exponentiated gradient descent (Kivinen and Warmuth 1997): mirror descent with the potential Σ w log w - w, and the proximal step
argmin_u ⟨g, u⟩ + KL(u ‖ w)/η.  For weights of both signs the exponent takes the sign of w (Cornford et al. 2024).

Which gradient?  The names say it.  `exponentiated_gradient` is given the Euclidean one, ∇L.  A noiseless step of the
Dale-Langevin sampler with μ = σ²/2 is the same formula with the gradient in log coordinates, w ∇L, of the energy
-log p_Y(log x): that is a gradient step on log w, with the metric 1/w² in place of the mirror metric 1/w.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Rate = float | Float[Array, ""]


def exponentiated_gradient(
    w: Float[Array, "*shape"], gradient: Float[Array, "*shape"], rate: Rate
) -> Float[Array, "*shape"]:
    """w exp(-η g) with the Euclidean gradient g = ∇L(w), for w > 0.  Descends only where w is positive."""
    return w * jnp.exp(-rate * gradient)


def signed_exponentiated_gradient(
    w: Float[Array, "*shape"], gradient: Float[Array, "*shape"], rate: Rate
) -> Float[Array, "*shape"]:
    """w exp(-η g sign(w)) with the Euclidean gradient: descends for both signs, keeps each, and leaves zeros where they are."""
    return w * jnp.exp(-rate * gradient * jnp.sign(w))


def log_gradient_step(
    w: Float[Array, "*shape"], gradient: Float[Array, "*shape"], rate: Rate
) -> Float[Array, "*shape"]:
    """w exp(-η w g) with the Euclidean gradient g: gradient descent on log |w|, of either sign."""
    return w * jnp.exp(-rate * w * gradient)


def log_gradient(loss: Callable[[Array], Array], w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """∇_y L(exp y) at y = log w, which is w ∇L(w); for w < 0 that of L(-exp y)."""
    return w * jax.grad(loss)(w)


def relative_entropy(u: Float[Array, "*shape"], w: Float[Array, "*shape"]) -> Float[Array, ""]:
    """KL(u ‖ w) = Σ u log(u/w) - u + w of positive numbers that need not add up to one; 0 log 0 is 0."""
    return jnp.sum(jax.scipy.special.xlogy(u, u) - jax.scipy.special.xlogy(u, w) - u + w)


def entropic_objective(
    u: Float[Array, "*shape"], w: Float[Array, "*shape"], gradient: Float[Array, "*shape"], rate: Rate
) -> Float[Array, ""]:
    """⟨g, u⟩ + KL(u ‖ w)/η, of which `exponentiated_gradient(w, g, η)` is the minimiser over u >= 0."""
    return jnp.vdot(gradient, u) + relative_entropy(u, w) / rate


def mirror_step(
    mirror: Mirror, w: Float[Array, "*shape"], gradient: Float[Array, "*shape"], rate: Rate
) -> Float[Array, "*shape"]:
    """∇φ*(∇φ(w) - η g), with the Euclidean gradient g: mirror descent (Nemirovski and Yudin 1983)."""
    return mirror.inverse(mirror.forward(w) - rate * gradient)


def signs_kept(before: Float[Array, "*shape"], after: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The part of the entries whose sign, -1, 0 or 1, is what it was: 1 is Dale's law."""
    return jnp.mean(jnp.sign(before) == jnp.sign(after))


class Mirror(eqx.Module):
    """A convex potential φ on numbers, summed over entries; its gradient maps to the dual and back."""

    @abstractmethod
    def potential(self, w: Float[Array, "*shape"]) -> Float[Array, ""]:
        """φ(w)."""

    @abstractmethod
    def forward(self, w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """∇φ(w)."""

    @abstractmethod
    def inverse(self, dual: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """∇φ*(dual), the inverse of `forward`."""

    def divergence(self, u: Float[Array, "*shape"], w: Float[Array, "*shape"]) -> Float[Array, ""]:
        """Bregman's φ(u) - φ(w) - ⟨∇φ(w), u - w⟩."""
        return self.potential(u) - self.potential(w) - jnp.vdot(self.forward(w), u - w)


class NegativeEntropy(Mirror):
    """φ = Σ w log w - w on w > 0: the dual is log w, the divergence `relative_entropy`, mirror descent exponentiated gradient."""

    def potential(self, w: Float[Array, "*shape"]) -> Float[Array, ""]:
        return jnp.sum(jax.scipy.special.xlogy(w, w) - w)

    def forward(self, w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.log(w)

    def inverse(self, dual: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.exp(dual)


class HalfSquare(Mirror):
    """φ = ‖w‖²/2: mirror descent is gradient descent, for comparison."""

    def potential(self, w: Float[Array, "*shape"]) -> Float[Array, ""]:
        return jnp.sum(w**2) / 2

    def forward(self, w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return w

    def inverse(self, dual: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return dual


def exponentiated(rate: Rate) -> optax.GradientTransformation:
    """`signed_exponentiated_gradient` as an optimiser of optax, for whole networks: no weight ever changes its sign.

    A weight that is zero stays zero, and in float32 one becomes zero where η |g| passes 17.  The update needs the parameters:
    ValueError without them.
    """

    def update(gradients: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("exponentiated: params is None, expected the parameters: update(gradients, state, params)")
        return jax.tree.map(lambda g, w: w * jnp.expm1(-rate * g * jnp.sign(w)), gradients, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
