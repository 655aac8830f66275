"""One step of each sampler of a multiplicative diffusion, as a formula.

In the coordinate u = (y - M)/a of y = log x every process is one of exploding variance: u_t | u_0 ~ N(u_0, L²) with the level
L = sqrt(V)/a.  So all but the paper's second sampler are written there, with û_0 = E[log x_0 | x_t] from Tweedie's formula.
`generative.samplers` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

# With equal steps in s the weights of three add up to 3.7 times those of one; on uneven grids, and in a last step from levels
# that decrease like sqrt(t), to some ten times.  Beyond, a step would reach far from what it extrapolates.
AMPLIFIED = 20.0


class Place(NamedTuple):
    """A time with its scale, shift and level."""

    t: Array
    a: Array
    shift: Array
    level: Array


class Interval(NamedTuple):
    """A step from `now` to `then`; the weights of û_0 here and at the two steps before, of a method with several steps; whether
    it is the last."""

    now: Place
    then: Place
    weights: Array  # (3,)
    end: Array


class Step(NamedTuple):
    """What a method is given: the places it goes between, û_0 here and at the two steps before, and its noise."""

    interval: Interval
    now: Array
    before: tuple[Array, ...]
    noise: Array  # (draws, batch, *event)


class Method(NamedTuple):
    """advance     (u or x, Step) -> the next one
    correct     None, or (u, next u, û_0 there, Step, corrector) -> a better next one, which the last step is not given
    weights     None, or (levels, width) -> the weights of all steps, (steps, 3), where the last level may be 0
    draws       of noise, each of the shape of x
    ambient     whether the state is x, and not u
    unit_scale  whether a has to be 1
    """

    advance: Callable[[Array, Step], Array]
    correct: Callable[[Array, Array, Array, Step, Array], Array] | None = None
    weights: Callable[[Array, Array], Array] | None = None
    draws: int = 0
    ambient: bool = False
    unit_scale: bool = False


def _dls(u: Array, step: Step) -> Array:
    w, v = _variances(step)
    return u + (1 - v / w) * (step.now - u) + jnp.sqrt(w - v) * step.noise[0]


def _ancestral(u: Array, step: Step) -> Array:
    w, v = _variances(step)
    return step.now + v / w * (u - step.now) + jnp.sqrt(v * (w - v) / w) * step.noise[0]


def _ddim(u: Array, step: Step) -> Array:
    return step.now + step.interval.then.level / step.interval.now.level * (u - step.now)


def _heun(u: Array, euler: Array, there: Array, step: Step, corrector: Array) -> Array:
    now, then = step.interval.now.level, step.interval.then.level
    return u + (then - now) / 2 * ((u - step.now) / now + (euler - there) / then)


def _multistep(u: Array, step: Step) -> Array:
    """The exponential integrator: the flow is exact but for û_0, which is a polynomial through its last values."""
    kept = step.interval.then.level / step.interval.now.level * u
    values = (step.now, *step.before)
    return kept + sum(step.interval.weights[k] * values[k] for k in range(len(values)))


def _dpm2m_weights(levels: Array, width: Array) -> Array:
    """û_0 linear in log L, as at the middle of the step; constant in the first step and in one to level 0."""
    now, then, before = levels[:-1], levels[1:], jnp.concatenate([levels[:1], levels[:-2]])
    usable = (jnp.arange(len(now)) > 0) & (then > 0)
    length, one = jnp.log(now / jnp.where(usable, then, now)), jnp.log(jnp.where(usable, before / now, jnp.e))
    ratio, moved = length / (2 * one), 1 - then / now
    return jnp.stack([moved * (1 + ratio), -moved * ratio, jnp.zeros_like(moved)], 1)


def _multistep3_weights(levels: Array, width: Array) -> Array:
    """û_0 quadratic in s = sqrt(L² + d²) with d = width; constant in the first step, linear in the second and where steps grow.

    The integral of the polynomial against L' dL / L² from L' to L, by Newton's divided differences: of s - s_0 it is
    s' - s_0 + L' (asinh(L/d) - asinh(L'/d)), of (s - s_0)² it is -(L - L')² less 2 s_0 times that.
    """
    now, then = levels[:-1], levels[1:]
    s = jnp.sqrt(levels**2 + width**2)
    angle = jnp.arcsinh(levels / width)

    def apart(i: Array, j: Array) -> Array:
        """s_i - s_j without the difference of equal numbers; 1 where i = j."""
        return jnp.where(i == j, 1, (levels[i] - levels[j]) * (levels[i] + levels[j]) / (s[i] + s[j]))

    here = jnp.arange(len(now))
    one, two = jnp.maximum(here - 1, 0), jnp.maximum(here - 2, 0)
    first = apart(here + 1, here) + then * (angle[:-1] - angle[1:])
    second = -((now - then) ** 2) - 2 * s[:-1] * first + apart(here, one) * first
    # û_0 + (û_0 - û_1)/(s_0 - s_1) first + [(û_0 - û_1)/(s_0 - s_1) - (û_1 - û_2)/(s_1 - s_2)]/(s_0 - s_2) second
    second = second / apart(here, two)
    near, far, zero = (first + second) / apart(here, one), second / apart(one, two), jnp.zeros_like(first)
    moved, line = 1 - then / now, first / apart(here, one)
    quadratic, linear = jnp.stack([near, -near - far, far], 1), jnp.stack([line, -line, zero], 1)
    plain = jnp.stack([moved, zero, zero], 1)
    return _tamed(plain, (here > 0)[:, None] * linear, (here > 1)[:, None] * quadratic)


def _tamed(plain: Array, *more: Array) -> Array:
    """The last of these weights, each in addition to the plain ones, that magnifies errors of û_0 at most AMPLIFIED times."""
    chosen = plain
    for extra in more:
        weights = plain + extra
        known = (extra != 0).any(1) & (jnp.abs(weights).sum(1) <= AMPLIFIED * plain.sum(1))
        chosen = jnp.where(known[:, None], weights, chosen)
    return chosen


def _langevin(u: Array, predicted: Array, there: Array, step: Step, corrector: Array) -> Array:
    """u + ε/2 s_U + sqrt(ε) z with ε = corrector L²: half of the score, which leaves p_t in place."""
    return (
        predicted + corrector / 2 * (there - predicted) + jnp.sqrt(corrector) * step.interval.then.level * step.noise[1]
    )


def _ums(x: Array, step: Step) -> Array:
    return _ambient(x, step, step.noise[0], 0.0)


def _milstein(x: Array, step: Step) -> Array:
    z = step.noise[0]
    return _ambient(x, step, z, (z**2 - 1) / 2)


def _ambient(x: Array, step: Step, z: Array, second: Array | float) -> Array:
    """x (1 + 2 ΔV - ∫μ + ΔV ξ + sqrt(ΔV) z), with ξ = s_Y - 1 and ∫μ = ΔM + ΔV/2; and ΔV times `second`."""
    w, v = _variances(step)
    now = step.interval.now
    score = (step.now - (jnp.log(jnp.abs(x)) - now.shift)) / w
    drift = (w - v) * (0.5 + score) - (now.shift - step.interval.then.shift)
    return x * (1 + drift + jnp.sqrt(w - v) * z + (w - v) * second)


METHODS: dict[str, Method] = {
    "dls": Method(_dls, draws=1, unit_scale=True),
    "ums": Method(_ums, draws=1, ambient=True, unit_scale=True),
    "milstein": Method(_milstein, draws=1, ambient=True, unit_scale=True),
    "ancestral": Method(_ancestral, draws=1),
    "ddim": Method(_ddim),
    "heun": Method(_ddim, _heun),
    "dpm2m": Method(_multistep, weights=_dpm2m_weights),
    "multistep3": Method(_multistep, weights=_multistep3_weights),
    "predictor_corrector": Method(_ancestral, _langevin, draws=2),
}


def _variances(step: Step) -> tuple[Array, Array]:
    return step.interval.now.level**2, step.interval.then.level**2
