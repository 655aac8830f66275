"""Training of networks y -> x by a schedule of losses, in chunks that can be interrupted and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from rich.console import Console

from solvers import training_loop
from solvers.proximal.matching import (
    Cosine,
    Distance,
    Loss,
    Matching,
    Prior,
    Regime,
    Stage,
    described,
    distance,
    minimiser,
    regime,
    zero_fraction,
)
from solvers.proximal.network import LearnedProximal, projected


class TrainingInfo(NamedTuple):
    """steps     done, those before a checkpoint was resumed included
    losses    (steps,) of each step's batch, at the weights before the step; of the stages one after the other
    stopped   "steps", "callback" or "not finite" (a loss, a gradient or a new weight; the step is not counted)
    regimes   of each stage the `Regime`, None for stages without a γ and for data of unknown σ
    zeros     `zero_fraction` of the result
    distance  to the exact minimiser of the last stage's loss, on 4096 fresh y; None without a prior or for an unknown σ
    """

    steps: int
    losses: Float[np.ndarray, " steps"]
    stopped: str
    regimes: tuple[Regime | None, ...]
    zeros: float | None
    distance: Distance | None


class _Run(eqx.Module):
    """What stays the same in all steps of a stage."""

    loss: Any
    draw: Any  # None for rows
    rows: Array | None
    sigma: Array | None
    ema: Array | None
    frame: Any  # the network without its arrays
    batch: int = eqx.field(static=True)


def train(
    key: Key[Array, ""],
    network: Any,
    draw: Any,
    schedule: Sequence[Stage],
    *,
    sigma: float | None,
    batch: int,
    ema: float | None = None,
    prior: Prior | None = None,
    chunk: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Console = False,
    callback: Callable[[int, float, Any], bool | None] | None = None,
) -> tuple[Any, TrainingInfo]:
    """Train a network y -> x, any equinox module, by Adam; returns (network, TrainingInfo).

    draw        clean signals, one per row, of which every epoch takes each once in a new random order (those that fill no batch
                are left out); or a function (key, count) -> signals, or a pair (y, x), that makes new ones at every step.  An
                equinox module or eqx.Partial hands its arrays to the compiled step; those of a plain function are constants of it
    schedule    `Stage`s
    sigma       the noise added, new at every step; if draw gives pairs, the noise in them, or None where it is not known
    ema         the result has weights averaged over the steps with this decay, less in the first steps; None for the last ones
    prior       the distribution that draw draws from, for `TrainingInfo.distance`; the loss of the last stage is then one whose
                minimiser it knows: squared, absolute, matching
    chunk       steps between two looks of the host; one ends where a stage ends
    checkpoint  an npz file, written after every chunk.  If it exists the run continues from it, with the result of an
                uninterrupted run.  It is refused if another run wrote it: another start, data, key, schedule, batch, σ, average,
                version of JAX, or program
    progress    True for a bar, or the rich Console that shows it
    callback    (steps done, last loss, network as it would be returned) after every chunk; a true result stops

    A `LearnedProximal` is projected after each step.  If something is not finite the run stops with a RuntimeWarning, and the
    last finite network is returned.  Raises ValueError for settings out of range and for a file that is no
    checkpoint of this run.
    """
    schedule = tuple(schedule)
    _check(schedule, draw, sigma, batch, ema, chunk)
    target = None if prior is None or sigma is None else _target(prior, schedule[-1].loss, sigma)
    rows = None if callable(draw) else jnp.asarray(draw)
    params, frame = eqx.partition(network, eqx.is_inexact_array)
    state = params, optax.scale_by_adam().init(params), None if ema is None else params
    number, order = jax.random.split(key)
    noise = None if sigma is None else jnp.asarray(sigma, jnp.result_type(float))
    decay = None if ema is None else jnp.asarray(ema, jnp.result_type(float))
    runs = [
        _Run(_traced(stage.loss), draw if callable(draw) else None, rows, noise, decay, frame, batch)
        for stage in schedule
    ]

    def network_of(state: PyTree) -> Any:
        return eqx.combine(state[0] if ema is None else state[2], frame)

    def batches(start: int, stop: int) -> tuple[Array, Array]:
        keys = jax.vmap(lambda step: jax.random.fold_in(number, step))(jnp.arange(start, stop))
        return keys, keys if rows is None else training_loop.row_batches(order, len(rows), batch, start, stop)

    path = training_loop.checkpoint_path(checkpoint)
    ends = np.cumsum([stage.steps for stage in schedule]).tolist()

    def advance(state: PyTree, start: int, stop: int) -> tuple[PyTree, np.ndarray, int]:
        at = int(np.searchsorted(ends, start, side="right"))
        begin = ends[at] - schedule[at].steps
        rates = schedule[at].rates(start - begin, stop - begin)
        numbers = [_numbers(start + i, rate) for i, rate in enumerate(rates)]
        given = [(*number, *drawn) for number, *drawn in zip(numbers, *batches(start, stop), strict=True)]
        return training_loop.one_by_one(eqx.Partial(_step, runs[at]), state, given)

    state, losses, stopped = training_loop.run(
        advance,
        state,
        ends,
        chunk=chunk,
        path=path,
        settings={} if path is None else _settings(key, schedule, runs, state, [v[0] for v in batches(0, 1)]),
        network_of=network_of,
        progress=progress,
        callback=callback,
    )
    found = network_of(state)
    away = None
    if target is not None:
        away = distance(found, target, _fresh(runs[-1], jax.random.fold_in(number, ends[-1]), 4096))
    regimes = tuple(
        regime(float(stage.loss.gamma), sigma) if isinstance(stage.loss, Matching) and sigma is not None else None
        for stage in schedule
    )
    return found, TrainingInfo(len(losses), losses, stopped, regimes, zero_fraction(found), away)


def _check(schedule: tuple[Stage, ...], draw: Any, sigma: Any, batch: int, ema: float | None, chunk: int) -> None:
    if not schedule:
        raise ValueError("train: schedule is empty, expected at least one Stage")
    for number, stage in enumerate(schedule):
        rates = (stage.rate.start, stage.rate.end) if isinstance(stage.rate, Cosine) else (stage.rate,)
        if stage.steps < 0 or not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"train: stage {number} has {stage.steps} steps at {stage.rate}; expected both >= 0")
    if batch < 1 or chunk < 1:
        raise ValueError(f"train: batch is {batch}, chunk {chunk}; expected at least 1 of each")
    if not callable(draw) and not 1 <= batch <= len(draw):
        raise ValueError(f"train: draw has {len(draw)} rows and batch is {batch}; expected as many rows or more")
    if sigma is not None and not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"train: sigma is {sigma}, expected a positive number")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"train: ema is {ema}, expected a decay between 0 and 1")


def _target(prior: Any, loss: Loss, sigma: float) -> Callable[[Array], Array]:
    """The exact minimiser that the result is measured by, before hours are spent for a result without it."""
    if not isinstance(prior, Prior):
        raise ValueError(
            f"train: prior is of type {type(prior).__name__}, expected a distribution with mean, median and matched"
        )
    try:
        return minimiser(prior, loss, sigma)
    except ValueError as error:
        raise ValueError(
            f"train: the last stage has the loss {loss}, whose minimiser prior does not know, expected squared, absolute or "
            "matching(gamma); or give no prior"
        ) from error


def _traced(loss: Loss) -> Any:
    """The loss with its numbers as arrays: another γ is no other program."""
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.result_type(float)) if isinstance(v, float) else v, loss)


def _examples(run: _Run, key: Array, at: Array, count: int) -> tuple[Array, Array]:
    first, second = jax.random.split(key)
    x = run.draw(first, count) if run.rows is None else run.rows[at]
    if isinstance(x, tuple):
        return x
    if run.sigma is None:
        raise ValueError(
            "train: sigma is None and draw gives one array; expected the noise to add to it, or pairs (y, x)"
        )
    return x + (run.sigma * jax.random.normal(second, x.shape, x.dtype)).astype(x.dtype), x


def _fresh(run: _Run, key: Array, count: int) -> Array:
    at = jax.random.randint(key, (count,), 0, 1 if run.rows is None else len(run.rows))
    return _examples(run, key, at, count)[0]


def _one_step(run: _Run, carry: Any, step: Array, rate: Array, key: Array, at: Array) -> tuple[Any, Array]:
    """The state after one step and whether all was finite up to it, and the loss; the state stays where it is not."""
    (params, inner, average), good = carry
    y, x = _examples(run, key, at, run.batch)
    value, gradient = jax.value_and_grad(lambda p: run.loss(eqx.combine(p, run.frame), y, x))(params)
    direction, inner_after = optax.scale_by_adam().update(gradient, inner)
    after = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, direction)
    network = eqx.combine(after, run.frame)
    if isinstance(network, LearnedProximal):
        after = eqx.filter(projected(network), eqx.is_inexact_array)
    mean = None
    if average is not None and run.ema is not None:
        # Less weight to the past in the first steps: else the start would stay in the average for 1/(1 - ema) steps.
        decay = jnp.minimum(run.ema, (1 + step) / (10 + step))
        mean = jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), average, after)
    for leaf in jax.tree.leaves((value, gradient, after)):
        good &= jnp.isfinite(leaf).all()
    state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (after, inner_after, mean), (params, inner, average)
    )
    return (state, good), value


_step: Any = eqx.filter_jit(_one_step)


def _numbers(step: int, rate: float) -> tuple[Array, Array]:
    return jnp.asarray(step, jnp.int32), jnp.asarray(rate, jnp.float32)


def _settings(
    key: Array, schedule: tuple[Stage, ...], runs: list[_Run], state: PyTree, first: list[Array]
) -> dict[str, Any]:
    programs = [_step.lower(run, (state, jnp.bool_(True)), *_numbers(0, 0.0), *first).as_text() for run in runs]
    whole = runs[0]
    return training_loop.identity(
        key,
        programs,
        start=training_loop.digest(state),
        data=training_loop.digest(eqx.filter((whole.draw, whole.rows), eqx.is_array)),
        batch=whole.batch,
        schedule=[described(stage) for stage in schedule],
        **{"sigma and average": [None if v is None else float(v) for v in (whole.sigma, whole.ema)]},
    )
