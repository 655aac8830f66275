"""The processes of multiplicative diffusion, each by the normal kernel of the logarithm, and grids of times for them.

    y_t | y_0 ~ N(a(t) y_0 + M(t), V(t)),   y = log x, entry by entry, 0 <= t <= 1

`generative.gbm_diffusion` says what they are used for, and names them all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Level = float | Float[Array, ""]
Time = float | Float[Array, "*times"]


class Process(eqx.Module):
    """y_t | y_0 ~ N(a(t) y_0 + M(t), V(t)) of y = log x, entry by entry.

    All methods take t in [0, 1], a number or an array of any shape, and return an array of that shape.  A subclass gives V and,
    unless they are those of μ = σ²/2, what else differs; `scale` and `reversion` go together.
    """

    @abstractmethod
    def variance(self, t: Time) -> Float[Array, "*times"]:
        """V(t)."""

    def scale(self, t: Time) -> Float[Array, "*times"]:
        """a(t); 1 for geometric Brownian motion."""
        return jnp.ones_like(_floating(t))

    def shift(self, t: Time) -> Float[Array, "*times"]:
        """M(t)."""
        return jnp.zeros_like(_floating(t))

    def volatility(self, t: Time) -> Float[Array, "*times"]:
        """σ(t)."""
        return jnp.sqrt(_slope(self.variance, t))

    def drift(self, t: Time) -> Float[Array, "*times"]:
        """μ(t)."""
        return _slope(self.shift, t) + self.volatility(t) ** 2 / 2

    def reversion(self, t: Time) -> Float[Array, "*times"]:
        """c(t) = a'/a; 0 for geometric Brownian motion."""
        return jnp.zeros_like(_floating(t))

    @property
    def reverting(self) -> bool:
        """Whether a(t) is not 1 throughout.  The paper's samplers need a = 1."""
        return False

    def log_drift(self, y: Float[Array, "*shape"], t: Time) -> Float[Array, "*shape"]:
        """μ - σ²/2 + c y: the drift of y as t runs up."""
        return self.drift(t) - self.volatility(t) ** 2 / 2 + self.reversion(t) * y

    def level(self, t: Time) -> Float[Array, "*times"]:
        """sqrt(V)/a: the standard deviation of the noise in the coordinate (y - M)/a, in which log x_0 keeps its place."""
        return jnp.sqrt(self.variance(t)) / self.scale(t)

    def time(self, level: Time) -> Float[Array, "*times"]:
        """The t in [0, 1] with level(t) = level, by bisection; 1 where there is none."""
        level = _floating(level)

        def halved(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            above = self.level(middle) > level
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        # 2^-40 is 1e-12, far below the times of any grid.
        return jax.lax.fori_loop(0, 40, halved, (jnp.zeros_like(level), jnp.ones_like(level)))[1]


class GeometricBrownianMotion(Process):
    """Constant μ and σ: V = σ² t, M = (μ - σ²/2) t.

    mu     None for σ²/2, which makes M = 0: a variance-exploding diffusion of log x
    sigma  the default is the paper's, with μ = .32

    Raises ValueError unless sigma is positive.
    """

    mu: Level | None = None
    sigma: Level = 0.8

    def __check_init__(self) -> None:
        _check_positive("GeometricBrownianMotion", sigma=self.sigma)

    def variance(self, t: Time) -> Float[Array, "*times"]:
        return self.sigma**2 * _floating(t)

    def shift(self, t: Time) -> Float[Array, "*times"]:
        t = _floating(t)
        return jnp.zeros_like(t) if self.mu is None else (self.mu - self.sigma**2 / 2) * t

    def volatility(self, t: Time) -> Float[Array, "*times"]:
        return self.sigma * jnp.ones_like(_floating(t))

    def drift(self, t: Time) -> Float[Array, "*times"]:
        mu = self.sigma**2 / 2 if self.mu is None else self.mu
        return mu * jnp.ones_like(_floating(t))

    def time(self, level: Time) -> Float[Array, "*times"]:
        return jnp.minimum(_floating(level) ** 2 / self.sigma**2, 1)


class GeometricSchedule(Process):
    """σ(t) = σ_0 (σ_1/σ_0)^t with constant μ, or μ = σ²/2 for None: V = σ_0² (e^{2ct} - 1) / (2c) with c = log(σ_1/σ_0).

    Raises ValueError unless both are positive.
    """

    sigma_0: Level
    sigma_1: Level
    mu: Level | None = None

    def __check_init__(self) -> None:
        _check_positive("geometric", sigma_0=self.sigma_0, sigma_1=self.sigma_1)

    def variance(self, t: Time) -> Float[Array, "*times"]:
        t, twice = _floating(t), self._rate
        return self.sigma_0**2 * t * _relative_growth(twice * t)

    def shift(self, t: Time) -> Float[Array, "*times"]:
        t = _floating(t)
        return jnp.zeros_like(t) if self.mu is None else self.mu * t - self.variance(t) / 2

    def volatility(self, t: Time) -> Float[Array, "*times"]:
        return self.sigma_0 * jnp.exp(self._rate / 2 * _floating(t))

    def drift(self, t: Time) -> Float[Array, "*times"]:
        return self.volatility(t) ** 2 / 2 if self.mu is None else self.mu * jnp.ones_like(_floating(t))

    def time(self, level: Time) -> Float[Array, "*times"]:
        # e^{2ct} - 1 = 2c r with r = level²/σ_0², whose limit at c = 0 is t = r.
        r = _floating(level) ** 2 / self.sigma_0**2
        grown = self._rate * r
        small, beyond = jnp.abs(grown) < 1e-4, grown <= -1
        safe = jnp.where(small | beyond, 1, grown)
        t = r * jnp.where(small, 1 - grown / 2, jnp.log1p(safe) / safe)
        return jnp.where(beyond, 1, jnp.minimum(t, 1))

    @property
    def _rate(self) -> Array:
        """2c."""
        return 2 * jnp.log(self.sigma_1 / jnp.asarray(self.sigma_0))


class FunctionProcess(Process):
    """M(t) and V(t) as given: two functions that JAX can differentiate, from which μ and σ follow.

    The functions are static: the same process for jit only if they are the same objects.  Raises ValueError unless both are
    finite, M(0) = V(0) = 0 and V grows, on a grid of t.
    """

    shift_function: Callable[[Array], Array] = eqx.field(static=True)
    variance_function: Callable[[Array], Array] = eqx.field(static=True)

    def __check_init__(self) -> None:
        t = jnp.linspace(0, 1, 65)
        found = [jax.vmap(f)(t) for f in (self.shift_function, self.variance_function)]
        if any(isinstance(v, jax.core.Tracer) for v in found):
            return
        shift, variance = (np.asarray(v, float) for v in found)
        if not (np.isfinite(shift).all() and np.isfinite(variance).all()):
            raise ValueError("from_functions: shift or variance is not finite on [0, 1]; expected finite M(t) and V(t)")
        if abs(shift[0]) > 1e-6 or abs(variance[0]) > 1e-6 * variance.max():
            raise ValueError(
                f"from_functions: shift(0) is {shift[0]:g} and variance(0) is {variance[0]:g}, expected 0: no noise at t = 0"
            )
        if (np.diff(variance) <= 0).any():
            k = int(np.argmax(np.diff(variance) <= 0))
            raise ValueError(
                f"from_functions: variance is {variance[k]:g} at t = {t[k]:g} and {variance[k + 1]:g} at t = {t[k + 1]:g}, "
                "expected it to grow"
            )

    def variance(self, t: Time) -> Float[Array, "*times"]:
        return self.variance_function(_floating(t))

    def shift(self, t: Time) -> Float[Array, "*times"]:
        # The sum gives a constant the shape of t.
        return self.shift_function(_floating(t)) + jnp.zeros_like(_floating(t))


class GeometricOrnsteinUhlenbeck(Process):
    """dX = β/2 (1 - log X) X dt + sqrt(β) X dW: log x is the variance-preserving diffusion with the constant rate β.

    a = exp(-β t / 2), M = 0, V = 1 - a².  At large β x_1 is log-normal with parameters 0 and 1, whatever x_0 is.
    Raises ValueError unless beta is positive.
    """

    beta: Level = 6.0

    def __check_init__(self) -> None:
        _check_positive("GeometricOrnsteinUhlenbeck", beta=self.beta)

    def variance(self, t: Time) -> Float[Array, "*times"]:
        return -jnp.expm1(-self.beta * _floating(t))

    def scale(self, t: Time) -> Float[Array, "*times"]:
        return jnp.exp(-self.beta / 2 * _floating(t))

    def volatility(self, t: Time) -> Float[Array, "*times"]:
        t = _floating(t)
        return jnp.sqrt(jnp.asarray(self.beta, t.dtype)) * jnp.ones_like(t)

    def drift(self, t: Time) -> Float[Array, "*times"]:
        return self.beta / 2 * jnp.ones_like(_floating(t))

    def reversion(self, t: Time) -> Float[Array, "*times"]:
        return -self.beta / 2 * jnp.ones_like(_floating(t))

    @property
    def reverting(self) -> bool:
        return True

    def time(self, level: Time) -> Float[Array, "*times"]:
        return jnp.minimum(jnp.log1p(_floating(level) ** 2) / self.beta, 1)


def geometric(sigma_0: Level, sigma_1: Level, mu: Level | None = None) -> GeometricSchedule:
    """The process whose volatility runs geometrically from sigma_0 to sigma_1."""
    return GeometricSchedule(sigma_0, sigma_1, mu)


def from_functions(shift: Callable[[Array], Array], variance: Callable[[Array], Array]) -> FunctionProcess:
    """The process with M = shift and V = variance, functions of t that work entry by entry."""
    return FunctionProcess(shift, variance)


# ---- times --------------------------------------------------------------------------------------------------------------


def uniform_times(process: Process, steps: int) -> Float[Array, " points"]:
    """1, 1 - 1/steps, ..., 0: the paper's."""
    _check_steps("uniform_times", steps)
    return jnp.asarray(np.linspace(1, 0, steps + 1))


def edm_times(
    process: Process, steps: int, rho: float = 7.0, smallest: float = 0.002, largest: float | None = None
) -> Float[Array, " points"]:
    """Times at which the level sqrt(V)/a follows the grid of Karras et al. 2022 (EDM, equation 5), and 0 at the end.

    rho       the levels are equidistant in their power 1/rho; math.inf makes them equidistant in their logarithm
    smallest  the last level that is not zero
    largest   the first one; that of t = 1 by default

    Raises ValueError unless steps >= 1, rho > 0 and smallest lies below the largest level.
    """
    _check_steps("edm_times", steps)
    if not rho > 0:
        raise ValueError(f"edm_times: rho is {rho}, expected a positive number")
    top = process.level(1.0) if largest is None else jnp.asarray(largest)
    if not isinstance(top, jax.core.Tracer) and not 0 < smallest < float(top):
        raise ValueError(
            f"edm_times: smallest is {smallest}, expected a level between 0 and {float(top):g}, that of t = 1"
        )
    share = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    if math.isinf(rho):
        levels = top * (smallest / top) ** share
    else:
        levels = (top ** (1 / rho) + share * (smallest ** (1 / rho) - top ** (1 / rho))) ** rho
    times = process.time(levels)
    # The first time is 1 itself and not what rounding makes of it.
    first = jnp.ones_like(times[:1]) if largest is None else times[:1]
    return jnp.concatenate([first, times[1:], jnp.zeros_like(first)])


def sinh_times(process: Process, steps: int, width: float = 0.3) -> Float[Array, " points"]:
    """Times at which asinh(level / width) is equidistant, from t = 1 to 0: the levels are so where they are small against the
    width, their logarithms where they are large.

    width  about the standard deviation of the finest modes of log x_0, from whose level on a denoiser is close to linear

    The grid on which few steps of the samplers without noise went furthest, over several processes and laws of x_0.  Raises
    ValueError unless steps >= 1 and width > 0.
    """
    _check_steps("sinh_times", steps)
    if not width > 0:
        raise ValueError(f"sinh_times: width is {width}, expected a positive number")
    share = np.linspace(1, 0, steps + 1)[1:-1]
    times = process.time(width * jnp.sinh(share * jnp.arcsinh(process.level(1.0) / width)))
    # The ends are 1 and 0 themselves and not what rounding makes of them.
    return jnp.pad(jnp.pad(times, (1, 0), constant_values=1), (0, 1))


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{name}: steps is {steps}, expected at least 1")


# ---- helpers -----------------------------------------------------------------------------------------------------------


def _floating(t: Time) -> Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)


def _slope(f: Callable[[Array], Array], t: Time) -> Array:
    t = _floating(t)
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def _relative_growth(r: Array) -> Array:
    """(e^r - 1) / r, with its value and derivatives at r = 0."""
    small = jnp.abs(r) < 1e-3
    safe = jnp.where(small, 1, r)
    return jnp.where(small, 1 + r / 2 + r**2 / 6 + r**3 / 24, jnp.expm1(safe) / safe)


def _check_positive(owner: str, **given: Level) -> None:
    for name, value in given.items():
        if not isinstance(value, jax.core.Tracer) and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} is {value}, expected a positive number")
