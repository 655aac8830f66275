"""What the trainings of `solvers` have in common: steps in chunks, between which the host looks at losses, writes the
checkpoint and calls back; a checkpoint that only its own run continues from."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree
from rich.console import Console

from solvers import array_files

Steps = Callable[[PyTree, int, int], tuple[PyTree, np.ndarray, int]]
"""(state, first, stop) -> the state after these steps, the losses of those at which all was finite, the number of others."""

Callback = Callable[[int, float, Any], bool | None]
"""(steps done, last loss, network): a true result stops."""


def checkpoint_path(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    """The file as a path, or None.  Raises ValueError if its folder does not exist."""
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"train: checkpoint is {path}; expected a file in an existing folder")
    return path


def run(
    steps: Steps,
    state: PyTree,
    ends: Sequence[int],
    *,
    chunk: int,
    path: Path | None,
    settings: Mapping[str, Any],
    network_of: Callable[[PyTree], Any],
    progress: bool | Console = False,
    callback: Callback | None = None,
) -> tuple[PyTree, np.ndarray, str]:
    """All steps: (state, losses, how it stopped: "steps", "callback" or "not finite").

    ends      numbers of steps at which a chunk ends in any case; the last is that of all steps
    path      of the checkpoint, or None.  If the file exists the run continues from it
    settings  what says that a checkpoint is of this run

    Raises ValueError for a checkpoint of another run or with more steps than this one.
    """
    total, losses = ends[-1], np.zeros(0)
    if path is not None and path.exists():
        state, losses = _resumed(path, settings, state)
        if len(losses) > total:
            raise ValueError(f"train: {path} holds {len(losses)} steps; expected at most steps = {total}")
    with _bar(progress, total, len(losses)) as show:
        while (done := len(losses)) < total:
            until = min(done + chunk, next(end for end in ends if end > done))
            state, seen, failed = steps(state, done, until)
            losses = np.concatenate([losses, seen])
            if failed:
                message = (
                    f"train: the loss, a gradient or a weight is not finite at step {len(losses)}, counted from 0; "
                )
                warnings.warn(message + "the network before it is returned", RuntimeWarning, stacklevel=3)
                return state, losses, "not finite"
            if path is not None:
                array_files.write(path, {"settings": dict(settings)}, state, losses=losses)
            show(len(losses), float(losses[-1]))
            # After the checkpoint, so that an exception raised in the callback loses nothing.
            if callback is not None and callback(len(losses), float(losses[-1]), network_of(state)):
                return state, losses, "callback"
    return state, losses, "steps"


def one_by_one(
    step: Callable[..., tuple[tuple[PyTree, Array], Array]], state: PyTree, arguments: Sequence[tuple[Any, ...]]
) -> tuple[PyTree, np.ndarray, int]:
    """step((state, good), *given) -> ((state, good), loss) for each of the arguments, with the result of `Steps`."""
    # Not a scan: in the body of a loop XLA's convolutions on CPUs are ten to twenty times slower (measured with jax 0.5 and
    # 0.12).  The host runs ahead of the device and waits for it only here, at the end.
    carry, losses, flags = (state, jnp.bool_(True)), [], []
    for given in arguments:
        carry, value = step(carry, *given)
        losses.append(value)
        flags.append(carry[1])
    finite = int(np.sum(jax.device_get(flags)))
    return carry[0], np.asarray(jax.device_get(losses), np.float64)[:finite], len(losses) - finite


def row_batches(key: Key[Array, ""], rows: int, batch: int, start: int, stop: int) -> Int[Array, "steps {batch}"]:
    """The rows of the batches of steps start to stop: every epoch in a new random order, less what fills no batch."""
    per_epoch = rows // batch
    first, last = start // per_epoch, (stop - 1) // per_epoch
    epochs = [jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(first, last + 1)]
    order = jnp.concatenate(epochs).reshape(last + 1 - first, -1)[:, : per_epoch * batch].reshape(-1, batch)
    return order[start - first * per_epoch : stop - first * per_epoch]


def digest(tree: PyTree) -> str:
    """SHA-256 of the arrays in the tree with their shapes and dtypes."""
    state = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        state.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return state.hexdigest()


def identity(key: Key[Array, ""], programs: Sequence[str], **others: Any) -> dict[str, Any]:
    """Settings of a run: its key, the text of its compiled programs, the version of JAX, and what else is given."""
    return {
        **others,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "version of JAX": [jax.__version__, jax.default_backend()],
        "program": [hashlib.sha256(program.encode()).hexdigest() for program in programs],
    }


def _resumed(path: Path, settings: Mapping[str, Any], state: PyTree) -> tuple[PyTree, np.ndarray]:
    header, arrays = array_files.read(path, "train", "settings")
    other = [name for name, value in settings.items() if header["settings"].get(name) != value]
    if other:
        raise ValueError(
            f"train: {path} was written by a run with another {', '.join(other)}; use the same settings or another file"
        )
    losses = arrays.pop("losses")
    return array_files.restored(path, "train", arrays, state), losses


@contextmanager
def _bar(progress: bool | Console, steps: int, done: int) -> Iterator[Callable[[int, float], None]]:
    if progress is False:
        yield lambda step, loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=progress if isinstance(progress, Console) else None) as bar:
        task = bar.add_task("train", total=steps, completed=done, loss="–")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4g}")
