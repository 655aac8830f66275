"""The probability flow of a multiplicative diffusion: exact likelihood, and transport between data and noise.

    dy/dt = μ - σ²/2 + c y - σ²/2 s_Y(y, t)                    y = log x, from the data at t = 0 up to t = 1
    d log p_Y / dt = -∇ · (dy/dt) = σ²/2 ∇ · s_Y - dimensions c
    log p_X(x) = log p_Y(log x) - Σ log x

An ordinary equation: no term of Ito enters.  The change of log p_Y is integrated with y (Chen et al. 2018; Song et al. 2021).
`generative.positive.bits_per_dimension` turns the result into bits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from generative.gbm_diffusion import LogScore, Process, entries, probability_flow
from generative.positive import check_positive

Divergence = Literal["exact", "hutchinson"]


@runtime_checkable
class Prior(Protocol):
    """A law of x_1, as `generative.lognormal` has them."""

    def log_prob_of_log(self, y: Array) -> Array:
        """(batch, *event) -> (batch,): the log-density of log x_1."""


class LikelihoodInfo(NamedTuple):
    """log_end    log x_1: where the flow took the data
    change       log p_Y(log x_0) - log p_{Y,1}(log x_1), what was integrated, (batch,)
    evaluations  of the flow; each also takes the divergence
    converged    whether the tolerances were met; with fixed steps, whether everything is finite
    """

    log_end: Float[Array, " batch *event"]
    change: Float[Array, " batch"]
    evaluations: Array | int
    converged: Array


def log_likelihood(
    log_score: LogScore,
    process: Process,
    x: Float[Array, " batch *event"],
    prior: Prior,
    *,
    divergence: Divergence = "exact",
    key: Key[Array, ""] | None = None,
    steps: int | Float[Array | np.ndarray, " points"] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    start: float = 0.0,
    max_steps: int = 4096,
    loop: Literal["scan", "host"] = "scan",
    throw: bool = True,
) -> tuple[Float[Array, " batch"], LikelihoodInfo]:
    """log p_X(x) in nats, and how it was found.

    log_score   (y, t) -> s_Y, which treats the batch row by row
    prior       the law of x_1: a `LogNormal`, or any law with `log_prob_of_log`
    divergence  "exact": one directional derivative of the score an entry.  "hutchinson": one in all, along a random sign vector
                for each row that stays along the path: unbiased, needs `key`
    steps       of the classical Runge-Kutta method, equally long, or the increasing times between them; four evaluations each.
                None: Tsitouras' 5(4) method with steps that adapt (diffrax) to the row with the largest error
    rtol, atol  of the latter: errors of y and of log p a step, in the root mean square over a row
    start       where t begins.  A score that is not defined at t = 0, as most networks are not, needs it positive: what is
                returned is the density of x_start, at 1e-5 that of the data with log x blurred by a variance of V(1e-5)
    max_steps   when to give up
    loop        for fixed steps: "host" is one program a step, for convolutions on a CPU

    Raises ValueError for x that is not positive, steps below 1 or times that do not increase, an unknown divergence, or a missing
    key; FloatingPointError, if `throw`, if the result is not finite or the tolerances were not met.
    """
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"log_likelihood: divergence is {divergence!r}, expected 'exact' or 'hutchinson'")
    if (divergence == "hutchinson") != (key is not None):
        raise ValueError(
            f"log_likelihood: divergence is {divergence!r} and key is {'given' if key is not None else 'None'}; expected a key "
            "for 'hutchinson' and for that only"
        )
    if loop not in ("scan", "host"):
        raise ValueError(f"log_likelihood: loop is {loop!r}, expected 'scan' or 'host'")
    if not 0 <= start < 1:
        raise ValueError(f"log_likelihood: start is {start}, expected 0 <= start < 1")
    check_positive("log_likelihood: x", x)
    y = jnp.log(x)
    signs = None if key is None else jax.random.rademacher(key, y.shape, y.dtype)
    state = y, jnp.zeros(len(y), y.dtype)
    if steps is None:
        tolerances = jnp.asarray(rtol, y.dtype), jnp.asarray(atol, y.dtype)
        ends = jnp.asarray([start, 1], y.dtype)
        (end, change), evaluations, converged = _adaptive(log_score, process, state, signs, ends, tolerances, max_steps)
    else:
        times = _fixed_times(steps, start).astype(y.dtype)
        if loop == "scan":
            end, change = _fixed(log_score, process, state, signs, times)
        else:
            for k in range(len(times) - 1):
                state = _one_step(log_score, process, state, signs, times[k : k + 2])
            end, change = state
        evaluations = 4 * (len(times) - 1)
        converged = jnp.isfinite(change).all()
    found = prior.log_prob_of_log(end) + change - entries(y).sum(1)
    info = LikelihoodInfo(end, change, evaluations, converged & jnp.isfinite(found).all())
    if throw and not isinstance(info.converged, jax.core.Tracer) and not bool(info.converged):
        _complain(found, max_steps, start)
    return found, info


class TransportInfo(NamedTuple):
    """evaluations  of the score
    converged    whether the tolerances were met and the result is finite
    """

    evaluations: Array
    converged: Array


def transport(
    log_score: LogScore,
    process: Process,
    x: Float[Array, " batch *event"],
    start: float | Float[Array, ""],
    end: float | Float[Array, ""],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_steps: int = 4096,
    throw: bool = True,
) -> tuple[Float[Array, " batch *event"], TransportInfo]:
    """x at `end` of what is x at `start`, along the probability flow, with steps that adapt as those of `log_likelihood` do.

    From 1 down it samples, from 0 up it encodes.  The score has to be defined at both ends.

    Raises ValueError for x that is not positive; FloatingPointError, if `throw`, if the result is not finite or the tolerances
    were not met.
    """
    check_positive("transport: x", x)
    y = jnp.log(x)
    ends, tolerances = jnp.stack([jnp.asarray(v, y.dtype) for v in (start, end)]), jnp.asarray([rtol, atol], y.dtype)
    y, evaluations, converged = _carried(log_score, process, y, ends, tolerances, max_steps)
    found = jnp.exp(y)
    info = TransportInfo(evaluations, converged & jnp.isfinite(found).all())
    if throw and not isinstance(info.converged, jax.core.Tracer) and not bool(info.converged):
        raise FloatingPointError(
            f"transport: the result is not finite or the tolerances were not met in {max_steps} steps; expected a score that is "
            "defined at both ends, larger rtol and atol, or more max_steps"
        )
    return found, info


def _flow(log_score: LogScore, process: Process, signs: Array | None) -> Any:
    """(t, (y, gained)) -> their rates, where gained is log p_Y at the start less log p_Y here."""

    def rates(t: Array, state: tuple[Array, Array], args: Any = None) -> tuple[Array, Array]:
        y = state[0]
        # TF32 products on a GPU have three digits, fewer than the tolerances ask for.
        with jax.default_matmul_precision("highest"):
            velocity, push = jax.linearize(lambda v: probability_flow(process, log_score, v, t), y)
        velocity = velocity.astype(y.dtype)
        if signs is not None:
            return velocity, entries(signs * push(signs)).sum(1).astype(y.dtype)
        size = math.prod(y.shape[1:])

        def add(total: Array, i: Array) -> tuple[Array, None]:
            # The basis is counted, so that memory does not grow with the square of the number of entries.
            direction = (jnp.arange(size) == i).astype(y.dtype).reshape(y.shape[1:])
            return total + entries(push(jnp.broadcast_to(direction, y.shape)))[:, i].astype(y.dtype), None

        return velocity, jax.lax.scan(add, jnp.zeros(len(y), y.dtype), jnp.arange(size))[0]

    return rates


def _runge_kutta(rates: Any, state: tuple[Array, Array], ends: Array) -> tuple[Array, Array]:
    t, h = ends[0], ends[1] - ends[0]

    def moved(by: Array, slope: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + by * slope[0], state[1] + by * slope[1]

    first = rates(t, state)
    second = rates(t + h / 2, moved(h / 2, first))
    third = rates(t + h / 2, moved(h / 2, second))
    fourth = rates(ends[1], moved(h, third))
    mean = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(first, second, third, fourth, strict=True)]
    return moved(h, (mean[0], mean[1]))


@eqx.filter_jit
def _one_step(log_score: LogScore, process: Process, state: Any, signs: Array | None, ends: Array) -> Any:
    return _runge_kutta(_flow(log_score, process, signs), state, ends)


@eqx.filter_jit
def _fixed(log_score: LogScore, process: Process, state: Any, signs: Array | None, times: Array) -> Any:
    rates = _flow(log_score, process, signs)

    def body(state: Any, ends: Array) -> tuple[Any, None]:
        return _runge_kutta(rates, state, ends), None

    return jax.lax.scan(body, state, jnp.stack([times[:-1], times[1:]], 1))[0]


@eqx.filter_jit
def _adaptive(
    log_score: LogScore, process: Process, state: Any, signs: Array | None, ends: Array, tolerances: Any, max_steps: int
) -> Any:
    return _solved(_flow(log_score, process, signs), state, ends, tolerances, max_steps)


@eqx.filter_jit
def _carried(log_score: LogScore, process: Process, y: Array, ends: Array, tolerances: Any, max_steps: int) -> Any:
    def velocity(t: Array, y: Array, args: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return probability_flow(process, log_score, y, t).astype(y.dtype)

    return _solved(velocity, y, ends, tolerances, max_steps)


def _solved(rates: Any, state: Any, ends: Array, tolerances: Any, max_steps: int) -> Any:
    """The state at the end, evaluations, and whether the tolerances were met."""

    def worst(error: Any) -> Array:
        """The largest root mean square of a row: no row hides behind the others."""
        rows = [jnp.sqrt(jnp.mean(entries(v) ** 2, 1)).max() for v in jax.tree.leaves(error)]
        return jnp.stack(rows).max()

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Tsit5(),
        t0=ends[0],
        t1=ends[1],
        dt0=None,
        y0=state,
        stepsize_controller=diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1], norm=worst),
        max_steps=max_steps,
        throw=False,
    )
    # Six a step, as the last stage is the first of the next; one at the start, and one to choose the first step.
    evaluations = 6 * solution.stats["num_steps"] + 2
    end = jax.tree.map(lambda v: v[0], solution.ys)
    return end, evaluations, solution.result == diffrax.RESULTS.successful


def _fixed_times(steps: int | Array | np.ndarray, start: float) -> Array:
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"log_likelihood: steps is {steps}, expected at least 1")
        return jnp.asarray(np.linspace(start, 1, steps + 1))
    times = jnp.asarray(steps)
    known = not isinstance(times, jax.core.Tracer)
    if times.ndim != 1 or len(times) < 2 or (known and not (np.diff(np.asarray(times)) > 0).all()):
        raise ValueError(
            f"log_likelihood: steps has shape {times.shape}, expected a number or two or more increasing times"
        )
    return times


def _complain(found: Array, max_steps: int, start: float) -> None:
    bad = int((~jnp.isfinite(found)).sum())
    if bad:
        hint = " (the score may not be defined at t = 0: pass start=1e-5)" if start == 0 else ""
        raise FloatingPointError(
            f"log_likelihood: {bad} of {len(found)} values are not finite, expected finite ones{hint}; throw=False returns them"
        )
    raise FloatingPointError(
        f"log_likelihood: the tolerances were not met in {max_steps} steps; expected larger rtol and atol, or more max_steps"
    )
