"""The prior that a learned proximal network has learned: R with f = prox_R, its value at a signal, its proximal map for any step.

    R(x) = ⟨x, z⟩ - ‖x‖²/2 - ψ(z),  f(z) = x                               the network inverted (Section 3)
    z = argmin ψ(z) - ⟨x, z⟩                                               how: this is convex, strongly for α > 0

For any z at all, the right-hand side is at most R(x), and the difference at most ‖f(z) - x‖² / (2α): what an inexact inversion
gives is a lower bound with a known error, up to the rounding of the right-hand side, which is bounded too.

    prox_{lam R}(v) = f(z),  z = argmin (1 - lam) ψ(z) + lam/2 ‖z‖² - ⟨v, z⟩,   0 < lam ≤ 1, and a little beyond

lam = 1 is the network itself.  Both problems are solved in float64 where JAX has it, by Levenberg-Marquardt steps (optimistix)
on small signals and Anderson acceleration on large ones; derivatives of all orders are those of the exact solution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Bool, Float

from solvers.proximal.bounds import certified, rounding
from solvers.proximal.functional import Regularizer
from solvers.proximal.network import LearnedProximal, is_convex

DENSE = 16
"""Signals of up to so many entries are inverted with the whole Jacobian."""

MEMORY = 10
"""Differences that larger ones are inverted with."""


class Evaluation(NamedTuple):
    """value        ⟨x, z⟩ - ‖x‖²/2 - ψ(z): at most R(x) + rounding
    inverse      z
    residual     ‖f(z) - x‖
    error_bound  R(x) is at most value + error_bound, what rounding does included; infinite for α = 0, where R(x) may be infinite
                 and the residual still vanish
    converged    the residual is below the tolerance, and x within the range of the training signals
    rounding     value - rounding is at most R(x), whatever z is: what rounding can do to the value, 2e-4 for the digits of 8 x 8
                 in float32 and 1e-12 in float64; ten to sixty times the most that it was seen to do
    """

    value: Float[Array, ""]
    inverse: Float[Array, "*shape"]
    residual: Float[Array, ""]
    error_bound: Float[Array, ""]
    converged: Bool[Array, ""]
    rounding: Float[Array, ""]


class LearnedRegularizer(Regularizer):
    """R of a network.  Values, gradients and maps come in the dtype of the argument; NaN where a problem was not solved.

    tolerance  on ‖f(z) - x‖, relative to the larger of ‖x‖ and 1
    box        least and largest entry of the signals that the network was trained on.  R and ∇R of others say nothing, as the
               network saturates there, and are refused; maps and envelopes take any signal.  None: anything goes
    """

    network: LearnedProximal
    tolerance: float = eqx.field(static=True, default=1e-8)
    max_steps: int = eqx.field(static=True, default=1000)
    box: tuple[float, float] | None = eqx.field(static=True, default=None)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """R(x), up to a constant.  Raises ValueError, outside of jit, for an x that is not in the box or not reached."""
        found = self._found(x)
        return jnp.where(found.converged, found.value, jnp.nan).astype(x.dtype)

    def evaluate(self, x: Float[Array, "*shape"]) -> Evaluation:
        """R(x) with its certificate; raises nothing but for a wrong shape."""
        _check_shape(self.network, "x", x)
        value, z, residual, bound, rounded = _evaluated(self.network, _in_double(x), self.tolerance, self.max_steps)
        reached = residual <= _allowed(_in_double(x), self.tolerance)
        return Evaluation(value, z, residual, bound, reached & self._inside(x), rounded)

    def grad(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """∇R(x) = f⁻¹(x) - x."""
        found = self._found(x)
        return jnp.where(found.converged, found.inverse - x, jnp.nan).astype(x.dtype)

    def prox(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
        """The proximal map of lam R.  Raises ValueError for lam ≤ 0, and for a lam > 1 unless lam (1 - 1/L) < 1 with the
        certified L of the network: beyond, R + ‖·‖²/(2 lam) need not be convex; under jit, it gives NaN."""
        z, network, fine = self._scaled(v, lam)
        return jnp.where(fine, _applied(network, z), jnp.nan).astype(v.dtype)

    def moreau_envelope(self, v: Float[Array, "*shape"], lam: float | Float[Array, ""] = 1.0) -> Float[Array, ""]:
        """For lam = 1 it is ‖v‖²/2 - ψ(v); in general R(f(z)) is known from z, without an inversion."""
        z, network, fine = self._scaled(v, lam)
        with jax.default_matmul_precision("highest"):
            wide, x = _in_double(v), network(z)
            value = jnp.vdot(x, z) - jnp.vdot(x, x) / 2 - network.potential(z)
        return jnp.where(fine, value + jnp.sum((x - wide) ** 2) / (2 * lam), jnp.nan).astype(v.dtype)

    @property
    def weak_convexity(self) -> float:
        """1 - 1/L, with the certified L of the network, at least 0; under jit 1, which holds for every network."""
        constant = self.lipschitz
        return 1.0 if constant is None else max(0.0, 1 - 1 / constant)

    @property
    def lipschitz(self) -> float | None:
        return certified(self.network).lipschitz if is_convex(self.network) and not _traced(self.network) else None

    def _found(self, x: Array) -> Evaluation:
        found = self.evaluate(x)
        if not isinstance(found.converged, jax.core.Tracer) and not bool(found.converged):
            if not bool(self._inside(x)):
                raise ValueError(
                    f"x: has entries from {float(x.min()):.3g} to {float(x.max()):.3g}, the network was trained on signals "
                    f"from {self.box[0]:g} to {self.box[1]:g}, and its prior says nothing of others; "  # type: ignore[index]
                    "clip x, or give `regularizer` another box, None for any"
                )
            raise ValueError(
                f"x: the network was not inverted, ‖f(z) - x‖ = {float(found.residual):.2g} (allowed "
                f"{float(_allowed(x, self.tolerance)):.2g}): x may lie outside of the range of the network "
                f"(α = {self.network.alpha:g}), or more steps or a larger tolerance may be needed; `evaluate` gives a lower bound"
            )
        return found

    def _inside(self, x: Array) -> Array:
        if self.box is None:
            return jnp.isfinite(x).all()
        low, high = self.box
        slack = 1e-6 * (high - low)
        return jnp.all((x >= low - slack) & (x <= high + slack))

    def _scaled(self, v: Array, lam: float | Array) -> tuple[Array, LearnedProximal, Array]:
        """z with prox_{lam R}(v) = f(z), the network in double precision, and whether this is so."""
        _check_shape(self.network, "v", v)
        wide, network = _in_double(v), _double(self.network)
        if isinstance(lam, jax.core.Tracer):
            allowed = (lam > 0) & (lam <= 1)
        elif lam == 1:
            return wide, network, jnp.asarray(True)
        else:
            allowed = jnp.asarray(self._checked(float(lam)))
        step = jnp.asarray(lam, wide.dtype)
        z = _argmin(network, wide, step, self.tolerance, self.max_steps)
        left = _slope(z, (network, wide, step))
        fine = jnp.linalg.norm(left.reshape(-1)) <= _allowed(wide, self.tolerance)
        return z, network, fine & allowed

    def _checked(self, lam: float) -> bool:
        """Whether the minimiser is known to be unique; False, where that cannot be decided under jit."""
        if not lam > 0:
            raise ValueError(f"lam: is {lam:g}, expected a positive step")
        if lam <= 1 or _traced(self.network):
            return lam <= 1
        if not lam * self.weak_convexity < 1:
            raise ValueError(
                f"lam: is {lam:g}, expected at most 1, or below L/(L-1) = {1 / self.weak_convexity:.6g} of the certified L: "
                "beyond, the minimiser need not be unique"
            )
        return True


def regularizer(
    network: LearnedProximal,
    *,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
    box: tuple[float, float] | Literal["trained"] | None = "trained",
) -> LearnedRegularizer:
    """The function of which a network is the proximal map; see `LearnedRegularizer`.

    box  "trained" for the range that the network was trained on, where it is known (`LearnedProximal.box`: of the networks that
         come with the package it is); None for no such refusal
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance: is {tolerance}, expected a positive number")
    if isinstance(box, str):
        if box != "trained":
            raise ValueError(
                f"box: is {box!r}, expected 'trained', (least, largest) entry of a training signal, or None"
            )
        box = network.box
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"box: is {box}, expected (least, largest) entry of a training signal")
    return LearnedRegularizer(network, tolerance, max_steps, None if box is None else (float(box[0]), float(box[1])))


@eqx.filter_jit
def _applied(network: LearnedProximal, z: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return network(z)


def _allowed(x: Array, tolerance: float) -> Array:
    # Rounding of f, a sum of many terms: a hundred units cover what was seen of shipped and random networks twelvefold.
    least = 100 * float(jnp.finfo(x.dtype).eps)
    return max(tolerance, least) * jnp.maximum(1.0, jnp.linalg.norm(x.reshape(-1)))


def _check_shape(network: LearnedProximal, name: str, x: Array) -> None:
    if x.shape != network.shape:
        raise ValueError(
            f"{name}: has shape {x.shape}, the network is for {network.shape}; for many signals use jax.vmap"
        )


def _traced(network: LearnedProximal) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(network))


def _in_double(x: Array) -> Array:
    return x.astype(jnp.result_type(float))


def _double(network: LearnedProximal) -> LearnedProximal:
    return jax.tree.map(lambda leaf: _in_double(leaf) if eqx.is_inexact_array(leaf) else leaf, network)


@eqx.filter_jit
def _evaluated(
    network: LearnedProximal, x: Array, tolerance: float, max_steps: int
) -> tuple[Array, Array, Array, Array, Array]:
    network = _double(network)
    with jax.default_matmul_precision("highest"):  # GPUs else round the factors to ten bits, and no bound in eps holds
        z = _argmin(network, x, jnp.zeros((), x.dtype), tolerance, max_steps)
        residual = jnp.linalg.norm((network(z) - x).reshape(-1))
        value = jnp.vdot(x, z) - jnp.vdot(x, x) / 2 - network.potential(z)
        rounded = _rounded(*lax.stop_gradient((network, x, z)))
    if network.alpha > 0:
        bound = (residual + lax.stop_gradient(_allowed(x, 0.0))) ** 2 / (2 * network.alpha) + rounded
    else:
        bound = jnp.full_like(residual, jnp.inf)
    return value, z, residual, bound, rounded


def _rounded(network: LearnedProximal, x: Array, z: Array) -> Array:
    """What rounding can do to ⟨x, z⟩ - ‖x‖²/2 - ψ(z): √n eps the sizes of the terms of both products, as in `rounding`, and one
    for the differences, each of which rounds to half a unit of numbers no larger than the three parts together."""
    products = jnp.sum(jnp.abs(x * z)) + jnp.vdot(x, x) / 2
    off = (math.sqrt(x.size) + 1) * products + rounding(network, z) + jnp.abs(network.potential(z))
    return float(jnp.finfo(x.dtype).eps) * off


def _slope(z: Array, given: tuple[LearnedProximal, Array, Array]) -> Array:
    network, x, lam = given
    with jax.default_matmul_precision("highest"):
        return (1 - lam) * network(z) + lam * z - x


@eqx.filter_jit
def _argmin(network: LearnedProximal, x: Array, lam: Array, tolerance: float, max_steps: int) -> Array:
    """argmin_z (1 - lam) ψ(z) + lam/2 ‖z‖² - ⟨x, z⟩, whatever came out after max_steps."""
    given = (network, x, lam)
    if x.size <= DENSE:
        precision = max(tolerance * 1e-2, 10 * float(jnp.finfo(x.dtype).eps))
        levenberg: Any = optx.LevenbergMarquardt(precision, precision)
        return optx.root_find(_slope, levenberg, x, given, max_steps=max_steps, throw=False).value
    allowed = 0.5 * _allowed(x, tolerance)
    solve = functools.partial(_mixed, allowed=allowed, max_steps=10 * max_steps)
    with jax.default_matmul_precision("highest"):
        return lax.custom_root(lambda z: _slope(z, given), x, solve, _solve_symmetric)


class _Mixing(NamedTuple):
    z: Array
    gradient: Array  # there
    moves: Array  # (MEMORY, ...) the last differences of z
    changes: Array  # and of the gradient
    slope: Array  # the largest that was seen of the gradient, so that its inverse is a step
    best: Array  # the smallest norm of a gradient
    since: Array  # steps since then
    steps: Array


def _mixed(gradient: Callable[[Array], Array], start: Array, allowed: Array, max_steps: int) -> Array:
    """Anderson acceleration of gradient steps for a convex problem, until the gradient is small.

    Each step is from the combination of the last points whose gradient is smallest, as if the gradient were linear (Walker and Ni
    2011); on a quadratic it is GMRES.  By gradients alone, as values of ψ in float32 do not tell points apart long before
    gradients are small; that is where a quasi-Newton method with a line search stalls.  Where the gradient grows, or has not
    fallen for long, the memory is lost and a plain step with a safe slope follows, which does not make it grow.
    """
    one = jnp.ones((), start.dtype)
    tiny = jnp.finfo(start.dtype).tiny

    def size(v: Array) -> Array:
        return jnp.linalg.norm(v.reshape(-1))

    def more(s: _Mixing) -> Array:
        return (size(s.gradient) > allowed) & (s.steps < max_steps)

    def step(s: _Mixing) -> _Mixing:
        rows = s.changes.reshape(MEMORY, -1)
        # Scaled to unit rows, so that old and large differences do not hide the recent ones; zero rows get no weight.
        scale = 1 / jnp.maximum(jnp.linalg.norm(rows, axis=1), tiny)
        rows = rows * scale[:, None]
        normal = rows @ rows.T + 100 * jnp.finfo(start.dtype).eps * jnp.eye(MEMORY, dtype=start.dtype)
        weights = scale * jnp.linalg.solve(normal, rows @ s.gradient.reshape(-1))
        left = s.gradient - jnp.tensordot(weights, s.changes, 1)
        z = s.z - jnp.tensordot(weights, s.moves, 1) - left / s.slope
        at = gradient(z)
        moved, norm = size(z - s.z), size(at)
        seen = size(at - s.gradient) / jnp.where(moved > 0, moved, 1)
        slope = jnp.maximum(s.slope, jnp.where(jnp.isfinite(seen), 1.05 * seen, s.slope))
        good = (norm <= 2 * s.best) & (s.since < 2 * MEMORY)
        k = s.steps % MEMORY
        moves = jnp.where(good, s.moves.at[k].set(z - s.z), 0)
        changes = jnp.where(good, s.changes.at[k].set(at - s.gradient), 0)
        better = norm < s.best
        take = good | better
        return _Mixing(
            jnp.where(take, z, s.z),
            jnp.where(take, at, s.gradient),
            moves,
            changes,
            slope,
            jnp.where(better, norm, s.best),
            jnp.where(better | ~good, 0, s.since + 1),
            s.steps + 1,
        )

    first, empty = gradient(start), jnp.zeros((MEMORY, *start.shape), start.dtype)
    begin = _Mixing(start, first, empty, empty, one, size(first), jnp.int32(0), jnp.int32(0))
    return lax.stop_gradient(lax.while_loop(more, step, begin).z)  # newer versions of jax would differentiate it


def _solve_symmetric(matvec: Callable[[Array], Array], y: Array) -> Array:
    """The tangent of the inverse; NaN where conjugate gradients did not find it."""

    def solve(matvec: Callable[[Array], Array], y: Array) -> Array:
        eps = float(jnp.finfo(y.dtype).eps)
        v, _ = jax.scipy.sparse.linalg.cg(matvec, y, tol=10 * eps, maxiter=2000)
        left = jnp.sum((matvec(v) - y) ** 2)
        return jnp.where(left <= eps * jnp.sum(y**2), v, jnp.nan)  # half of the digits

    return lax.custom_linear_solve(matvec, y, solve, symmetric=True)
