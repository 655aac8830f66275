"""Stochastic optimisation of a loss that draws: any optax optimiser, any pytree of parameters.

Steps run in chunks, each one call of one compiled loop; between chunks the host reports, saves, and can be interrupted.
Step s draws with fold_in(key, s) and nothing else, so that a run resumed from a checkpoint repeats an uninterrupted one
bit by bit (on hardware whose sums are deterministic).
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
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
from jax import lax
from jaxtyping import Array, Float, Key, PyTree
from rich.console import Console

from theory import checkpoint as files

_FORMAT = 1
_ORDER = np.uint32(2**32 - 1)  # folded into the key for the order of the data; no step has this number


class FitInfo(NamedTuple):
    """What happened in `fit`.

    steps       steps done, those before a checkpoint was resumed included
    losses      (steps,) the loss that each of them saw, at the parameters before the step
    stopped     "steps", "callback", "interrupted" or "not finite"
    message     what happened, in words; for "not finite", the step and the leaves
    checkpoint  the file that holds the state, None without one
    averaged    how many of the last parameters the returned ones are the mean of; 0 if they are simply the last
    """

    steps: int
    losses: Float[np.ndarray, " steps"]
    stopped: str
    message: str
    checkpoint: Path | None
    averaged: int


class _Order(NamedTuple):
    """Where the next minibatch begins in the endless row of epochs."""

    epoch: Array
    offset: Array
    permutation: Array


class _State(NamedTuple):
    step: Array
    params: PyTree  # the trained leaves, None elsewhere
    optimizer: PyTree
    mean: PyTree  # of the parameters since `average_from`; None if nobody asked for it
    order: _Order | None


class _Run(NamedTuple):
    """What stays the same; arrays are arguments of the compiled loop, all else is part of the program."""

    loss: Callable[..., Any]
    optimizer: Any
    fixed: PyTree  # the leaves that are not trained
    data: tuple[Any, ...]
    key: Array
    limit: Array  # the number of steps in all
    average_from: Array
    batch_size: int | None
    chunk: int


def fit(
    loss: Callable[..., Any],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    steps: int,
    data: PyTree | None = None,
    batch_size: int | None = None,
    trainable: PyTree | None = None,
    average: float = 0.0,
    chunk: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Console = False,
    callback: Callable[[int, float, PyTree], bool | None] | None = None,
) -> tuple[PyTree, FitInfo]:
    """Minimise E loss(key, params, *batch) over `params` by stochastic gradients; returns (params, FitInfo).

    loss        (key, params, *batch) -> real scalar; an `Expectation` is one.  To maximise, return the negative
    params      any pytree.  Its real floating arrays are trained; integer arrays and leaves that are no arrays (functions,
                strings, Python numbers: the rate of a dropout layer) reach the loss as they are and come back untouched
    optimizer   an optax transformation; its update is also given the value, the gradient and the function of the step
    steps       how many steps in all, those of a resumed checkpoint included, so that a run can be made longer later (not
                with `average`, whose start depends on the number)
    data        a tuple or list of pytrees, which the loss gets one by one, or a single one; all leaves have as many rows.  A
                minibatch's loss is not scaled: a sum over all data is rows / batch_size times the batch's
    batch_size  rows a step, without replacement: the data is gone through in a fresh random order every epoch, each row
                exactly once, and a batch may end one epoch and begin the next.  None: all rows at every step
    trainable   True or False for leaves or whole subtrees of `params`.  True at a leaf that cannot be trained is an error
    average     return the mean of the parameters over this last fraction of the steps, in [0, 1] (Polyak and Juditsky
                1992), instead of the last ones; 0 for the last ones.  The noise of a constant rate averages out
    chunk       steps between two looks of the host; about a second's worth is a good number
    checkpoint  an npz file, written after every chunk.  If it exists, the run continues from it; it is refused if it
                belongs to another loss, optimiser, start, data, key or setting.  (The program as compiled is compared, so
                that a new learning rate is noticed; it is not where the file comes from another version of JAX or device)
    progress    True for a bar with the rate, the last loss and the checkpoint; a rich Console to say where it goes
    callback    (steps done, last loss, params) after every chunk; a true result stops

    A loss or gradient that is not finite stops the run, with a RuntimeWarning that names the step and the leaves, and the
    last finite parameters are returned.  Ctrl-C does too, at the end of the chunk and after its checkpoint was written; a
    second one raises at once.

    Only parameters and the optimiser's state are carried from step to step.  What is learned beside the main objective
    is a parameter with a loss of its own: the baselines of an objective, numbers or networks of the data, with the term
    objective.baseline_loss(key, ...).  Other mutable state (running statistics of batch normalisation) is not carried.

    Raises ValueError for settings out of range, a loss that is no real scalar, a checkpoint that cannot be written or
    belongs to another run, and TypeError if there is nothing to train or a leaf marked as trainable cannot be.
    """
    batches = (
        () if data is None else jax.tree.map(jnp.asarray, tuple(data) if isinstance(data, tuple | list) else (data,))
    )
    _check(steps=steps, chunk=chunk, average=average, rows=_rows(batches), batch_size=batch_size)
    path = None if checkpoint is None else _writable(Path(checkpoint))
    trained, fixed = eqx.partition(params, _mask(params, trainable))
    trained = jax.tree.map(_own, trained)
    average_from = steps - round(average * steps)
    run = _Run(loss, optimizer, fixed, batches, key, jnp.int32(steps), jnp.int32(average_from), batch_size, chunk)
    # Every buffer is the state's own, as the loop writes over them.
    mean = jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p)), trained) if average > 0 else None
    state = _State(jnp.int32(0), trained, jax.tree.map(_own, optimizer.init(trained)), mean, _order(run, 0))
    losses = np.zeros(0)
    header: dict[str, Any] = {}
    if path is not None:
        header = _header(run, state, average_from if average > 0 else None)
        state, losses = _load(path, header, state, losses, run)
        if len(losses) > steps:
            raise ValueError(f"fit: {path} holds {len(losses)} steps; expected at most steps = {steps}")

    stopped, message = "steps", f"fit: {steps} steps done"
    try:
        with _interrupts() as interrupted, _bar(progress, steps, len(losses), path) as show:
            while len(losses) < steps:
                done = len(losses)
                state, seen, bad = jax.block_until_ready(_loop(run, state))
                losses = np.concatenate([losses, np.asarray(seen, losses.dtype)[: int(state.step) - done]])
                if path is not None:
                    _save(path, header, state, losses)
                if np.asarray(bad).any():
                    stopped, message = "not finite", _describe(trained, len(losses), np.asarray(bad))
                    break
                last = float(losses[-1])
                show(len(losses), last)
                if interrupted():
                    break
                # A copy, which stays valid when the next chunk writes over the state.
                if callback is not None and callback(
                    len(losses), last, eqx.combine(jax.tree.map(_own, state.params), fixed)
                ):
                    stopped, message = "callback", f"fit: the callback stopped after {len(losses)} steps"
                    break
            if interrupted() and stopped == "steps":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            raise  # a second one, while the loop was writing over the state
        stopped, message = "interrupted", f"fit: interrupted after {len(losses)} of {steps} steps"
    if stopped == "not finite":
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    averaged = max(0, len(losses) - average_from) if average > 0 else 0
    final = jax.tree.map(lambda m, p: m.astype(p.dtype), state.mean, state.params) if averaged else state.params
    return eqx.combine(final, fixed), FitInfo(len(losses), losses, stopped, message, path, averaged)


# --- the compiled loop ---


def _steps(run: _Run, state: _State) -> tuple[_State, Array, Array]:
    """Up to `chunk` steps, fewer if the last one comes or something is not finite.

    Returns the state, (chunk,) losses, and (1 + 2 leaves,) flags: the loss, the gradients, the new parameters that are not
    finite at the first step where something is not; the state is the one before that step.
    """
    optimizer = optax.with_extra_args_support(run.optimizer)
    start = state.step

    def unfinished(carry: tuple[_State, Array, Array]) -> Array:
        state, _, bad = carry
        return (state.step < jnp.minimum(run.limit, start + run.chunk)) & ~bad.any()

    def step(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        old, losses, _ = carry
        index, order = _advance(run, old.order)
        batch = run.data if index is None else jax.tree.map(lambda rows: rows[index], run.data)
        key = jax.random.fold_in(run.key, old.step)

        def objective(trained: PyTree) -> Array:
            return _scalar(run.loss(key, eqx.combine(trained, run.fixed), *batch))

        value, gradient = jax.value_and_grad(objective)(old.params)
        updates, inner = optimizer.update(
            gradient, old.optimizer, old.params, value=value, grad=gradient, value_fn=objective
        )
        params = optax.apply_updates(old.params, updates)
        bad = ~jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves((value, gradient, params))])
        count = old.step + 1 - run.average_from

        def averaged(mean: Array, new: Array) -> Array:
            return jnp.where(count > 0, mean + (new - mean) / jnp.maximum(count, 1), mean)

        mean = None if old.mean is None else jax.tree.map(averaged, old.mean, params)
        new = _State(old.step + 1, params, inner, mean, order)
        kept = jax.tree.map(lambda a, b: lax.select(bad.any(), a, b), old, new)
        return kept, losses.at[old.step - start].set(value.astype(losses.dtype)), bad

    flags = jnp.zeros(1 + 2 * len(jax.tree.leaves(state.params)), bool)
    return lax.while_loop(unfinished, step, (state, jnp.zeros(run.chunk), flags))


_loop: Any = eqx.filter_jit(_steps, donate="all-except-first")


def _scalar(value: Any) -> Array:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"fit: loss returns {dtype}{list(shape)}; expected one real scalar")
    return value


def _order(run: _Run, step: int) -> _Order | None:
    """The order of the data as it stands before a step."""
    if run.batch_size is None:
        return None
    rows = _rows(run.data)
    assert rows is not None
    epoch, offset = divmod(step * run.batch_size, rows)
    return _Order(jnp.int32(epoch), jnp.int32(offset), _permutation(run.key, epoch, rows))


def _permutation(key: Array, epoch: Any, rows: int) -> Array:
    order = jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch)
    return jax.random.permutation(order, rows).astype(jnp.int32)


def _advance(run: _Run, order: _Order | None) -> tuple[Array | None, _Order | None]:
    """The rows of the next minibatch, and the order after it."""
    if order is None or run.batch_size is None:
        return None, None
    rows = len(order.permutation)
    end = order.offset + run.batch_size
    wraps = end >= rows
    later = lax.cond(
        wraps, lambda: _permutation(run.key, order.epoch + 1, rows), lambda: order.permutation
    )  # drawn once an epoch
    place = order.offset + jnp.arange(run.batch_size, dtype=jnp.int32)
    index = jnp.where(place < rows, order.permutation[place % rows], later[place % rows])
    return index, _Order(order.epoch + wraps, jnp.where(wraps, end - rows, end), later)


# --- parameters and settings ---


def _own(leaf: Any) -> Array:
    """A copy with a type of its own (not the weak type of a Python number)."""
    leaf = jnp.asarray(leaf)
    return leaf.copy() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.array(leaf, dtype=leaf.dtype)


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _is_trained(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _mask(params: PyTree, trainable: PyTree | None) -> PyTree:
    """True at the leaves to train."""
    asked = True if trainable is None else trainable

    def below(path: Any, flag: Any, subtree: PyTree) -> PyTree:
        where = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"fit: trainable is {flag!r} for {where}; expected True or False")
        at_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(subtree))
        if flag and at_leaf and not _is_trained(subtree):
            raise TypeError(f"fit: {where} is {_kind(subtree)}; only real floating arrays can be trained")
        return jax.tree.map(lambda leaf: bool(flag) and _is_trained(leaf), subtree)

    try:
        mask = jax.tree_util.tree_map_with_path(below, asked, params)
    except ValueError as error:
        raise ValueError(f"fit: trainable is not a prefix of params: {error}") from error
    if not any(jax.tree.leaves(mask)):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        found = ", ".join(f"params{jax.tree_util.keystr(path)} is {_kind(leaf)}" for path, leaf in leaves[:5])
        raise TypeError(f"fit: there is nothing to train: {found or 'params is empty'}; expected real floating arrays")
    return mask


def _kind(leaf: Any) -> str:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"{leaf!r}, a Python {type(leaf).__name__}" if isinstance(leaf, int | float) else f"a {type(leaf).__name__}"


def _rows(data: tuple[Any, ...]) -> int | None:
    """How many rows the data has; None without data."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    if not shapes:
        return None
    if len({shape[:1] for shape in shapes}) > 1 or () in shapes or shapes[0][0] == 0:
        raise ValueError(f"fit: data has leaves of shapes {shapes}; expected one number of rows, at least 1")
    return shapes[0][0]


def _check(*, steps: int, chunk: int, average: float, rows: int | None, batch_size: int | None) -> None:
    if steps < 0 or chunk < 1:
        raise ValueError(f"fit: steps is {steps} and chunk {chunk}; expected steps >= 0 and chunk >= 1")
    if not 0 <= average <= 1:
        raise ValueError(f"fit: average is {average}; expected a fraction of the steps, in [0, 1]")
    if batch_size is not None and rows is None:
        raise ValueError(f"fit: batch_size is {batch_size}, but there is no data")
    if batch_size is not None and rows is not None and not 1 <= batch_size <= rows:
        raise ValueError(f"fit: batch_size is {batch_size}; expected 1 to {rows}, the rows of data")


def _describe(trained: PyTree, step: int, bad: np.ndarray) -> str:
    paths = [f"params{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    loss, gradients, updated = bad[0], bad[1 : 1 + len(paths)], bad[1 + len(paths) :]
    found = ["the loss"] if loss else []
    found += [f"the gradient of {p}" for p, is_bad in zip(paths, gradients, strict=True) if is_bad]
    if not found:  # the optimiser made it
        found = [f"the update of {p}" for p, is_bad in zip(paths, updated, strict=True) if is_bad]
    return (
        f"fit: at step {step}, counted from 0, {', '.join(found)} {'is' if len(found) == 1 else 'are'} not finite; "
        f"the parameters before it are returned (its key is fold_in(key, {step}))"
    )


# --- checkpoints ---


def _writable(path: Path) -> Path:
    """`path`, after a look whether a file can be made there: better now than after the first chunk."""
    reason = f"{path} is a folder" if path.is_dir() else None
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ValueError(f"fit: checkpoint {path} cannot be written: {reason}")
    return path


def _header(run: _Run, state: _State, average_from: int | None) -> dict[str, Any]:
    arrays = jax.tree.leaves(eqx.filter(run.fixed, eqx.is_array_like))
    text = _loop.lower(run, state).as_text()
    # The address of a host callback differs from run to run.
    program = np.frombuffer(re.sub(r'backend_config = "\d+"', "", text).encode(), np.uint8)
    return {
        "format": _FORMAT,
        "settings": {
            "start": files.digest([_plain(leaf) for leaf in (*jax.tree.leaves(state.params), *arrays)]),
            "data": files.digest(run.data),
            "key": _plain(run.key).tolist(),
            "batch_size": run.batch_size,
            "chunk": run.chunk,
            "start of the average": average_from,
        },
        "jax": [jax.__version__, jax.default_backend()],
        "program": files.digest(program),
    }


def _save(path: Path, header: dict[str, Any], state: _State, losses: np.ndarray) -> None:
    leaves = jax.tree.leaves((state.params, state.optimizer, state.mean))
    arrays = {f"leaf_{i}": _plain(leaf) for i, leaf in enumerate(leaves)}
    try:
        files.write(path, header, arrays | {"losses": losses})
    except OSError as error:  # a full disk should not cost the run
        warnings.warn(
            f"fit: checkpoint {path} was not written ({error}); the run goes on", RuntimeWarning, stacklevel=3
        )


def _load(
    path: Path, header: dict[str, Any], state: _State, losses: np.ndarray, run: _Run
) -> tuple[_State, np.ndarray]:
    saved = files.read(path, "fit", _FORMAT, header["settings"])
    if saved is None:
        return state, losses
    found, arrays = saved
    if found["jax"] == header["jax"] and found["program"] != header["program"]:
        raise ValueError(
            f"fit: {path} was written by a run with another loss or optimizer; use the same ones or another file"
        )
    leaves, structure = jax.tree.flatten((state.params, state.optimizer, state.mean))
    shapes = [(a.shape, a.dtype.itemsize) for a in map(_plain, leaves)]
    if shapes != [(a.shape, a.dtype.itemsize) for i in range(len(arrays) - 1) for a in [arrays[f"leaf_{i}"]]]:
        raise ValueError(f"fit: {path} was written by a run with another optimizer; use the same one or another file")
    restored = [_restored(arrays[f"leaf_{i}"], leaf) for i, leaf in enumerate(leaves)]
    params, optimizer, mean = jax.tree.unflatten(structure, restored)
    losses = arrays["losses"]
    return _State(jnp.int32(len(losses)), params, optimizer, mean, _order(run, len(losses))), losses


def _plain(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _restored(array: np.ndarray, like: Array) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return _own(array.view(like.dtype))  # the view restores types that npz does not know, such as bfloat16


# --- the host between chunks ---


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back, as one during a chunk would lose the state that the chunk is writing over.

    Yields a function that says whether there was one.  The second one has its usual effect.  Other threads, and programs
    with a handler of their own, keep what they have.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False
        return
    seen: list[int] = []

    def hold(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def _bar(progress: bool | Console, steps: int, done: int, path: Path | None) -> Iterator[Callable[[int, float], None]]:
    if progress is False:
        yield lambda step, loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} steps/s  loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[path]}", markup=False),
    )
    console = progress if isinstance(progress, Console) else None
    with Progress(*columns, console=console) as bar:
        where = "" if path is None else f"checkpoint {path}"
        task = bar.add_task("fit", total=steps, completed=done, rate="–", loss="–", path=where)

        def show(step: int, loss: float) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{(step - done) / elapsed:.4g}" if elapsed > 0 else "–"
            bar.update(task, completed=step, rate=rate, loss=f"{loss:.6g}")

        yield show
