"""What a regulariser is, with one meaning everywhere: its value, its proximal map with any step, its gradient, its envelope.

    prox(v, lam) = argmin_x  R(x) + ‖x - v‖² / (2 lam)
    moreau_envelope(v, lam) = min_x  R(x) + ‖x - v‖² / (2 lam)

A step is never ignored: R.prox(v, lam) is the proximal map of lam R.  All take one signal, of any shape; use jax.vmap for many.
"""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Regularizer(eqx.Module):
    """Subclasses give the value and the proximal map; the rest follows where it is not known in closed form."""

    @abstractmethod
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """R(x), up to a constant; infinite where x is not allowed."""

    @abstractmethod
    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """argmin_x R(x) + ‖x - v‖² / (2 lam)."""

    def grad(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """∇R(x); where R has a kink, one of its subgradients."""
        return jax.grad(lambda x: self(x))(x)

    def moreau_envelope(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, ""]:
        """min_x R(x) + ‖x - v‖² / (2 lam), whose gradient is (v - prox(v, lam)) / lam."""
        x = self.prox(v, lam)
        return self(x) + jnp.sum((x - v) ** 2) / (2 * lam)

    @property
    def weak_convexity(self) -> float | None:
        """A c >= 0 for which R + c/2 ‖·‖² is convex, 0 for a convex R; None if none is known."""
        return None

    @property
    def lipschitz(self) -> float | None:
        """A Lipschitz constant of prox(·, 1); None if none is known."""
        c = self.weak_convexity
        return None if c is None or c >= 1 else 1 / (1 - c)
