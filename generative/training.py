"""Training of a diffusion model: Adam, averaged weights, a checkpoint to resume from, and pictures on the way.

Step s draws with fold_in(key, s) and nothing else, and epochs are permutations of their number: a run resumed from a checkpoint
repeats an uninterrupted one bit by bit (on hardware whose sums are deterministic).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree
from rich.console import Console

from generative.images import write_png
from theory import checkpoint as files

_FORMAT = 1
_ORDER = np.uint32(2**32 - 1)  # folded into the key for the order of the data; no step has this number


class TrainingInfo(NamedTuple):
    """steps       done, those before a checkpoint was resumed included
    losses      (steps,) what each of them saw, at the weights before it
    stopped     "steps", "callback" or "not finite"
    checkpoint  the file that holds the state, None without one
    """

    steps: int
    losses: Float[np.ndarray, " steps"]
    stopped: str
    checkpoint: Path | None


class Pictures(NamedTuple):
    """A grid of samples written to `folder`/step_000100.png and so on, at every chunk's end that passes a multiple of `every`.

    draw  averaged model -> (n, height, width) or (n, height, width, 3), in [0, 1]; what lies outside is cut off
    """

    folder: Path
    draw: Callable[[Any], Array | np.ndarray]
    every: int = 500


class _Run(NamedTuple):
    loss: Callable[..., Array]
    optimizer: Any
    frame: PyTree  # of the model: all that is not trained
    ema: Array


def train(
    key: Key[Array, ""],
    model: Any,
    loss: Callable[..., Array],
    data: tuple[Array | np.ndarray, ...],
    *,
    steps: int,
    batch: int = 128,
    rate: float | Callable[[Any], Any] = 1e-3,
    clip: float = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    ema: float = 0.999,
    trainable: PyTree | None = None,
    chunk: int = 50,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Console = False,
    pictures: Pictures | None = None,
    callback: Callable[[int, float, Any], bool | None] | None = None,
) -> tuple[Any, TrainingInfo]:
    """Minimise loss(key, model, *rows) over the weights of a model; returns (averaged model, TrainingInfo).

    model       any equinox module; its floating arrays are trained, or those that `trainable` marks
    loss        (key, model, *rows) -> scalar, of `batch` rows of each array of `data`
    data        arrays of equally many rows.  An epoch takes each row once, in a new random order, less what fills no batch
    steps       how many in all, those of a resumed checkpoint included
    rate        of Adam; a number, or an optax schedule (`warm_cosine`)
    clip        the norm of a gradient is at most this
    optimizer   an optax transformation in place of Adam with `rate` and `clip`
    ema         the returned weights are averaged over the steps with this decay, less in the first steps; 0 for the last ones
    trainable   a function or pytree as `equinox.partition` takes; by default all floating arrays of `model.network`, if there
                is such a field, else of the model
    chunk       steps between two looks of the host
    checkpoint  an npz file, written after every chunk.  If it exists the run continues from it; it is refused if another run
                wrote it: another start, data, key, batch, average, or program (loss or optimiser)
    progress    True for a bar, or the rich Console that shows it
    pictures    a grid of samples now and then
    callback    (steps done, last loss, averaged model) after every chunk; a true result stops

    A step that is not finite stops the run with a RuntimeWarning and the last finite weights are returned.  Ctrl-C raises; what
    the last chunk wrote can be resumed.  Raises ValueError for settings out of range and for a file that is no checkpoint of
    this run.
    """
    arrays = tuple(jnp.asarray(a) for a in data)
    path = None if checkpoint is None else Path(checkpoint)
    _check(arrays, steps, batch, clip, ema, chunk, path)
    if optimizer is None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))
    params, frame = eqx.partition(model, _trainable(model) if trainable is None else trainable)
    if not jax.tree.leaves(params):
        raise ValueError("train: there is nothing to train; expected floating arrays in the model")
    params = jax.tree.map(jnp.asarray, params)
    state: PyTree = params, optimizer.init(params), params
    run = _Run(loss, optimizer, frame, jnp.asarray(ema, jnp.result_type(float)))
    losses = np.zeros(0)
    settings: dict[str, Any] = {}
    if path is not None:
        settings = _settings(key, run, state, arrays, batch)
        state, losses = _resumed(path, settings, state)
        if len(losses) > steps:
            raise ValueError(f"train: {path} holds {len(losses)} steps; expected at most steps = {steps}")

    def averaged() -> Any:
        return eqx.combine(state[2], frame)

    stopped = "steps"
    with _bar(progress, steps, len(losses)) as show:
        while (done := len(losses)) < steps:
            until = min(steps, done + chunk)
            state, seen = _advance(run, state, key, arrays, batch, done, until)
            losses = np.concatenate([losses, seen])
            if len(losses) < until:
                warnings.warn(
                    f"train: the loss, a gradient or a weight is not finite at step {len(losses)}, counted from 0; "
                    f"the model before it is returned (the step's key is fold_in(key, {len(losses)}))",
                    RuntimeWarning,
                    stacklevel=2,
                )
                stopped = "not finite"
                break
            if path is not None:
                leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
                files.write(path, {"format": _FORMAT, "settings": settings}, leaves | {"losses": losses})
            show(until, float(losses[-1]))
            if pictures is not None and (until // pictures.every > done // pictures.every or until == steps):
                pictures.folder.mkdir(parents=True, exist_ok=True)
                write_png(pictures.folder / f"step_{until:06}.png", pictures.draw(averaged()))
            # After the checkpoint, so that an exception raised in the callback loses nothing.
            if callback is not None and callback(until, float(losses[-1]), averaged()):
                stopped = "callback"
                break
    return averaged(), TrainingInfo(len(losses), losses, stopped, path)


def warm_cosine(peak: float, steps: int, *, warm: int | None = None) -> Callable[[Any], Any]:
    """Learning rates that rise to the peak over `warm` steps (a twentieth of all by default), then fall to zero as a cosine."""
    warm = max(1, steps // 20) if warm is None else warm
    return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1))


# ---- the steps ----------------------------------------------------------------------------------------------------------


def _one_step(
    run: _Run, carry: tuple[PyTree, Array], step: Array, key: Array, rows: tuple[Array, ...]
) -> tuple[tuple[PyTree, Array], Array]:
    """The state after one step and whether all was finite up to it, and the loss; the state stays where it is not."""
    (params, inner, average), good = carry

    def objective(params: PyTree) -> Array:
        return run.loss(jax.random.fold_in(key, step), eqx.combine(params, run.frame), *rows)

    value, gradient = jax.value_and_grad(objective)(params)
    updates, inner_after = run.optimizer.update(gradient, inner, params)
    after = optax.apply_updates(params, updates)
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


def _advance(
    run: _Run, state: PyTree, key: Array, arrays: tuple[Array, ...], batch: int, start: int, stop: int
) -> tuple[PyTree, np.ndarray]:
    """The state after steps start to stop, and the losses of those at which all was finite."""
    # Not a scan: in the body of a loop XLA's convolutions on CPUs are ten to twenty times slower, and the host runs ahead of the
    # device anyway; it waits only at the end.
    carry, losses, flags = (state, jnp.bool_(True)), [], []
    for step, rows in zip(range(start, stop), _batches(key, len(arrays[0]), batch, start, stop), strict=True):
        carry, value = _step(run, carry, jnp.asarray(step, jnp.int32), key, tuple(a[rows] for a in arrays))
        losses.append(value)
        flags.append(carry[1])
    finite = int(np.sum(jax.device_get(flags)))
    return carry[0], np.asarray(jax.device_get(losses), np.float64)[:finite]


def _batches(key: Array, rows: int, batch: int, start: int, stop: int) -> Int[Array, "steps {batch}"]:
    """The rows of the batches of steps start to stop."""
    per_epoch = rows // batch
    first, last = start // per_epoch, (stop - 1) // per_epoch
    order = jax.random.fold_in(key, _ORDER)
    epochs = [jax.random.permutation(jax.random.fold_in(order, epoch), rows) for epoch in range(first, last + 1)]
    table = jnp.stack(epochs)[:, : per_epoch * batch].reshape(-1, batch)
    return table[start - first * per_epoch : stop - first * per_epoch]


def _trainable(model: Any) -> PyTree:
    """Floating arrays of the network: the process and the scales of the data are not learned."""
    if not hasattr(model, "network"):
        return jax.tree.map(eqx.is_inexact_array, model)
    nothing = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda m: m.network, nothing, jax.tree.map(eqx.is_inexact_array, model.network))


def _check(
    arrays: tuple[Array, ...], steps: int, batch: int, clip: float, ema: float, chunk: int, path: Path | None
) -> None:
    rows = {len(a) if a.ndim else 0 for a in arrays}
    if len(rows) != 1:
        raise ValueError(f"train: data has arrays of shapes {[a.shape for a in arrays]}; expected equally many rows")
    if steps < 0 or chunk < 1:
        raise ValueError(f"train: steps is {steps} and chunk {chunk}; expected steps >= 0 and chunk >= 1")
    if not 1 <= batch <= min(rows):
        raise ValueError(f"train: batch is {batch}; expected 1 to {min(rows)}, the rows of data")
    if not (clip > 0 and 0 <= ema < 1):
        raise ValueError(f"train: clip is {clip} and ema {ema}; expected clip > 0 and 0 <= ema < 1")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"train: checkpoint is {path}; expected a file in an existing folder")


# ---- checkpoints, and the host between chunks -------------------------------------------------------------------------------


def _settings(key: Array, run: _Run, state: PyTree, arrays: tuple[Array, ...], batch: int) -> dict[str, Any]:
    rows = tuple(a[:batch] for a in arrays)
    program = _step.lower(run, (state, jnp.bool_(True)), jnp.asarray(0, jnp.int32), key, rows).as_text()
    plain = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves((state, run.frame))]
    return {
        "start": files.digest([np.asarray(leaf) for leaf in plain if eqx.is_array_like(leaf)]),
        "data": files.digest(arrays),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "batch": batch,
        "ema": float(run.ema),
        "version of JAX": [jax.__version__, jax.default_backend()],
        "program": hashlib.sha256(program.encode()).hexdigest(),
    }


def _resumed(path: Path, settings: dict[str, Any], state: PyTree) -> tuple[PyTree, np.ndarray]:
    found = files.read(path, "train", _FORMAT, settings)
    if found is None:
        return state, np.zeros(0)
    _, arrays = found
    losses = arrays.pop("losses")
    leaves, structure = jax.tree.flatten(state)
    stored = [arrays[f"leaf_{i}"] for i in range(len(arrays))]
    if [(a.shape, a.dtype) for a in stored] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
        raise ValueError(f"train: {path} was written by a run with another optimizer; use the same one or another file")
    return jax.tree.unflatten(structure, [jnp.asarray(a) for a in stored]), losses


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@contextmanager
def _bar(progress: bool | Console, steps: int, done: int) -> Iterator[Callable[[int, float], None]]:
    if progress is False:
        yield lambda step, loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=progress if isinstance(progress, Console) else None) as bar:
        task = bar.add_task("train", total=steps, completed=done, loss="–")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4g}" if math.isfinite(loss) else "–")
