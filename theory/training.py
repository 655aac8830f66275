"""Minibatch SGD and gradient descent for the squared loss of scalar-output networks.

The risk is (1/2n) Σ (f(x_i; θ) - y_i)²; a step follows the gradient of the same mean over a batch drawn with
replacement (or over all samples).  No momentum, no schedule: what stability theory is about.

`run_steps` is the pure inner function, to be vmapped over rates and seeds; `train` runs it in chunks, with
history, early stop, callback and checkpoint.  The batches of chunk c = 1, 2, ... come from fold_in(key, c), so
that a run resumed from a checkpoint repeats an uninterrupted one bit by bit.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from theory import checkpoint as files

Apply = Callable[[Any, Array], Array]  # (params, one input) -> scalar
_FORMAT = 1


class TrainInfo(NamedTuple):
    """What happened in `train`.

    steps       steps done
    risk_steps  (k,) the steps at which the risk was taken: 0 and the end of every chunk
    risks       (k,) the full risk there
    stopped     "steps", "risk_below", "callback" or "diverged" (the risk is not finite)
    """

    steps: int
    risk_steps: np.ndarray
    risks: np.ndarray
    stopped: str


def risk(apply: Apply, params: PyTree, x: Float[ArrayLike, "n ..."], y: Float[ArrayLike, " n"]) -> Float[Array, ""]:
    """The empirical risk (1/2n) Σ (f(x_i) - y_i)²."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    outputs = jax.vmap(apply, (None, 0))(params, x)
    if outputs.shape != y.shape:
        raise ValueError(f"risk: apply gives shape {outputs.shape} for y of shape {y.shape}; one scalar per sample")
    return jnp.square(outputs - y).mean() / 2


def run_steps(
    apply: Apply,
    params: PyTree,
    x: Float[ArrayLike, "n ..."],
    y: Float[ArrayLike, " n"],
    key: Key[Array, ""],
    learning_rate: ArrayLike,
    *,
    steps: int,
    batch: int | None = 1,
    clip: ArrayLike | None = None,
) -> PyTree:
    """Parameters after `steps` steps; pure, for use under jit and vmap (over rates, keys, data, parameters).

    `batch` samples are drawn with replacement at each step; None takes all of them and leaves `key` unused.
    `clip` bounds the norm of the gradient: g · min(1, clip/|g|).
    """

    x, y = jnp.asarray(x), jnp.asarray(y)

    def update(theta: PyTree, g: PyTree) -> PyTree:
        rate = jnp.asarray(learning_rate)
        if clip is not None:
            norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(g)))
            rate = rate * jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda t, gt: t - rate.astype(t.dtype) * gt, theta, g)

    def step(theta: PyTree, index: Array | None) -> tuple[PyTree, None]:
        if index is None:
            g = jax.grad(risk, argnums=1)(apply, theta, x, y)
        elif batch == 1:  # without the batch axis XLA has matrix-vector products at most
            i = index[0]
            g = jax.grad(lambda t: jnp.square(apply(t, x[i]) - y[i]) / 2)(theta)
        else:
            g = jax.grad(risk, argnums=1)(apply, theta, x[index], y[index])
        return update(theta, g), None

    indices = None if batch is None else jax.random.randint(key, (steps, batch), 0, x.shape[0])
    return jax.lax.scan(step, params, indices, length=steps)[0]


@partial(jax.jit, static_argnames=("apply", "steps", "batch"))
def _chunk(
    apply: Apply,
    params: PyTree,
    x: Array,
    y: Array,
    key: Array,
    learning_rate: ArrayLike,
    clip: ArrayLike | None,
    *,
    steps: int,
    batch: int | None,
) -> tuple[PyTree, Array]:
    params = run_steps(apply, params, x, y, key, learning_rate, steps=steps, batch=batch, clip=clip)
    return params, risk(apply, params, x, y)


def train(
    apply: Apply,
    params: PyTree,
    x: Float[ArrayLike, "n ..."],
    y: Float[ArrayLike, " n"],
    *,
    key: Key[Array, ""],
    learning_rate: float,
    steps: int,
    batch: int | None = 1,
    clip: float | None = None,
    stop_risk: float | None = None,
    chunk: int = 10_000,
    callback: Callable[[int, float], bool | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[PyTree, TrainInfo]:
    """SGD (batch drawn with replacement) or gradient descent (`batch=None`) at a constant rate.

    After every `chunk` steps the full risk is taken; then training stops if it is not finite ("diverged"), is
    below `stop_risk`, or if `callback(step, risk)` returns True, and otherwise the state is written to
    `checkpoint` (an npz file).  If that file exists, the run continues from it, with the same result bit by bit.
    `apply(params, x_i)` returns a scalar; pass the same function object again to avoid compiling anew.

    Raises ValueError for sizes that do not fit, settings out of range, and a checkpoint of another run.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    params = jax.tree.map(jnp.asarray, params)
    _check(x, y, learning_rate=learning_rate, steps=steps, batch=batch, clip=clip, chunk=chunk)
    settings = {
        "learning_rate": float(learning_rate),
        "steps": steps,
        "batch": batch,
        "clip": clip,
        "stop_risk": stop_risk,
        "chunk": chunk,
        "start": files.digest(params),
        "data": files.digest((x, y)),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"train: checkpoint is {checkpoint}, expected a file in an existing folder")
    saved = _load(Path(checkpoint), settings, params) if checkpoint is not None else None
    if saved is None:
        saved = params, [0], [float(risk(apply, params, x, y))], None
    params, risk_steps, risks, stopped = saved
    if not np.isfinite(risks[-1]):
        stopped = "diverged"
    while stopped is None:
        done = risk_steps[-1]
        length = min(chunk, steps - done)
        if length == 0:
            stopped = "steps"
            break
        chunk_key = jax.random.fold_in(key, len(risks))
        params, value = _chunk(apply, params, x, y, chunk_key, learning_rate, clip, steps=length, batch=batch)
        risk_steps.append(done + length)
        risks.append(float(value))
        if not np.isfinite(risks[-1]):
            stopped = "diverged"
        elif stop_risk is not None and risks[-1] < stop_risk:
            stopped = "risk_below"
        elif done + length == steps:
            stopped = "steps"
        if checkpoint is not None:
            _save(Path(checkpoint), settings, params, risk_steps, risks, stopped)
        # After the checkpoint, so that an exception raised in the callback loses nothing.
        if callback is not None and callback(risk_steps[-1], risks[-1]) and stopped is None:
            stopped = "callback"
    return params, TrainInfo(risk_steps[-1], np.asarray(risk_steps), np.asarray(risks), stopped)


def _check(
    x: Array,
    y: Array,
    *,
    learning_rate: float,
    steps: int,
    batch: int | None,
    clip: float | None,
    chunk: int,
) -> None:
    if x.ndim == 0 or y.ndim != 1 or x.shape[0] != y.shape[0] or y.size == 0:
        raise ValueError(f"train: x has shape {x.shape} and y {y.shape}, expected (n, ...) and (n,) with n >= 1")
    if not learning_rate > 0:
        raise ValueError(f"train: learning_rate is {learning_rate}, expected a positive number")
    if steps < 0 or chunk < 1:
        raise ValueError(f"train: steps is {steps} and chunk {chunk}, expected steps >= 0 and chunk >= 1")
    if batch is not None and batch < 1:
        raise ValueError(f"train: batch is {batch}, expected at least 1, or None for all samples")
    if clip is not None and not clip > 0:
        raise ValueError(f"train: clip is {clip}, expected a positive number or None")


def _save(
    path: Path, settings: dict[str, Any], params: PyTree, steps: list[int], risks: list[float], stopped: str | None
) -> None:
    arrays = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))}
    arrays |= {"risk_steps": np.asarray(steps), "risks": np.asarray(risks)}
    files.write(path, {"format": _FORMAT, "settings": settings, "stopped": stopped}, arrays)


def _load(
    path: Path, settings: dict[str, Any], params: PyTree
) -> tuple[PyTree, list[int], list[float], str | None] | None:
    saved = files.read(path, "train", _FORMAT, settings)
    if saved is None:
        return None
    header, arrays = saved
    leaves, structure = jax.tree.flatten(params)
    # The view restores types that npz does not know, such as bfloat16.
    restored = [jnp.asarray(arrays[f"leaf_{i}"].view(leaf.dtype)) for i, leaf in enumerate(leaves)]
    return (
        jax.tree.unflatten(structure, restored),
        arrays["risk_steps"].tolist(),
        arrays["risks"].tolist(),
        header["stopped"],
    )
