"""The learned search direction of the deep conjugate direction method: network, losses, training data, training.

Ayano Kaneda, Osman Akar, Jingyu Chen, Victoria Alicia Trevino Kala, David Hyde, Joseph Teran: A Deep Conjugate Direction
Method for Iteratively Solving Linear Systems, ICML 2023, arXiv 2205.10763.

A x = b is solved by line searches along d = f(r/|r|), r = b - A x, made A-orthogonal to the directions before.  Here is f: a
convolutional network from a residual grid to a direction grid that knows nothing of the domain, trained on one matrix without
solutions.  A is any function v -> A v on grids, symmetric and positive semi-definite.

    DirectionNetwork                      the paper's network in 1, 2 or 3 dimensions; MODEL_64 and MODEL_128 are its sizes
    flops_per_cell, receptive_radius      what an application costs and how far it sees
    residual_loss                         the paper's loss |r - α A d|²
    energy_loss                           the squared factor by which the line search along d reduces the energy norm of the error
    lanczos, ritz_vectors                 approximate eigenvectors of A
    training_set                          the paper's data: random combinations of Ritz vectors, weighted to the lowest
    training_pairs                        the same with the solution, r = A x, from as few Ritz vectors as memory allows
    train, save, load, facts              optimisation in resumable chunks; weights in a file
"""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree
from rich.console import Console

Operator = Callable[[Array], Array]
Activation = Callable[[Array], Array]

MODEL_64 = (2, 3, 2)  # pairs of convolutions before, at and after the coarse level
MODEL_128 = (3, 5, 3)
# What a weights file can name.
_ACTIVATIONS: dict[str, Activation | None] = {
    "linear": None,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
_FORMAT = 1

# --- the network ---


class DirectionNetwork(eqx.Module):
    """A residual convolutional network with one coarse level, from a residual grid to a direction grid.

    Kernels 3 in every dimension, zero padding.  With C a convolution with bias and R the activation, blocks = (p, q, s):

        h = C r;  a = R(C h);  b = R(C a);  p - 1 times: a = R(C b) + a, b = R(C a)
        g = 2× average pool of b;  q times: g = R(C R(C g)) + g
        u = 2× nearest-neighbour upsampling of g, + b;  s times: u = R(C R(C u)) + u
        d = one linear map of the channels at every cell

    Weights are Glorot-uniform, biases zero.  With a bias or an activation that is not homogeneous the network depends on the
    scale of r; the paper feeds r/|r|, which is left to the caller.  Cells outside the fluid get values too.

    dimensions  1, 2 or 3
    blocks      pairs of convolutions before, at and after the coarse level: MODEL_64 (97 457 parameters in 3-D) or
                MODEL_128 (152 881)
    channels    16 in the paper
    activation  a function of arrays, None for a linear network (then, without biases, d is linear in r)
    bias        False for no biases at all
    dtype       of the weights and the work, floating (float32 or bfloat16); the result has the dtype of r
    """

    weights: tuple[Array, ...]  # (3, ..., 3, in, out), the last (16, 1)
    biases: tuple[Array, ...] | None
    dimensions: int = eqx.field(static=True)
    blocks: tuple[int, int, int] = eqx.field(static=True)
    activation: Activation | None = eqx.field(static=True)

    def __init__(
        self,
        dimensions: int = 3,
        blocks: tuple[int, int, int] = MODEL_64,
        *,
        channels: int = 16,
        activation: Activation | None = jax.nn.relu,
        bias: bool = True,
        dtype: Any = jnp.float32,
        key: Key[Array, ""],
    ):
        if dimensions not in (1, 2, 3):
            raise ValueError(f"DirectionNetwork: dimensions is {dimensions}; expected 1, 2 or 3")
        if len(blocks) != 3 or min(blocks) < 1:
            raise ValueError(f"DirectionNetwork: blocks is {blocks}; expected three numbers of pairs, each at least 1")
        if channels < 1:
            raise ValueError(f"DirectionNetwork: channels is {channels}; expected at least 1")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"DirectionNetwork: dtype is {dtype}; expected a floating type")
        kernel = (3,) * dimensions
        hidden = [(*kernel, channels, channels)] * (2 * sum(blocks))
        shapes = [(*kernel, 1, channels), *hidden, (channels, 1)]
        # Drawn in single precision, so that types of all sizes start from the same network.
        glorot = jax.nn.initializers.glorot_uniform()
        keys = jax.random.split(key, len(shapes))
        self.weights = tuple(glorot(k, s, jnp.float32).astype(dtype) for k, s in zip(keys, shapes, strict=True))
        self.biases = tuple(jnp.zeros(s[-1], dtype) for s in shapes) if bias else None
        self.dimensions = dimensions
        self.blocks = (blocks[0], blocks[1], blocks[2])
        self.activation = activation

    def __call__(self, r: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The direction for one residual grid (n1, ..., n_dimensions) of even sizes; batches by vmap.

        Raises ValueError for another number of dimensions or an odd size, TypeError if r is not floating.
        """
        r = jnp.asarray(r)
        if not jnp.issubdtype(r.dtype, jnp.floating):
            raise TypeError(f"DirectionNetwork: r has type {r.dtype}; expected a floating type")
        if r.ndim != self.dimensions:
            raise ValueError(
                f"DirectionNetwork: r has shape {r.shape}; expected {self.dimensions} dimensions, one grid (vmap over a batch)"
            )
        if any(n % 2 or n == 0 for n in r.shape):
            raise ValueError(f"DirectionNetwork: r has shape {r.shape}; expected even sizes (pad with zeros)")

        def biased(h: Array, layer: int) -> Array:
            return h if self.biases is None else h + self.biases[layer]

        def conv(h: Array) -> Array:
            layer = next(layers)
            return biased(_convolve(h, self.weights[layer]), layer)

        def active(h: Array) -> Array:
            return conv(h) if self.activation is None else self.activation(conv(h))

        layers = iter(range(len(self.weights) - 1))
        before, coarse, after = self.blocks
        a = active(conv(r.astype(self.weights[0].dtype)[..., None]))
        b = active(a)
        for _ in range(before - 1):
            a = active(b) + a
            b = active(a)
        g = _pool(b)
        for _ in range(coarse):
            g = active(active(g)) + g
        u = _upsample(g) + b
        for _ in range(after):
            u = active(active(u)) + u
        return biased(u @ self.weights[-1], -1)[..., 0].astype(r.dtype)


def _convolve(h: Array, weight: Array) -> Array:
    """Cross-correlation with zero padding; h (grid..., in), weight (3..., in, out)."""
    axes = "012"[: h.ndim - 1]
    form = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(h[None], weight, (1,) * len(axes), "SAME", dimension_numbers=form)[0]


def _pool(h: Array) -> Array:
    halves = [part for n in h.shape[:-1] for part in (n // 2, 2)]
    return h.reshape(*halves, h.shape[-1]).mean(tuple(range(1, 2 * h.ndim - 2, 2)))


def _upsample(h: Array) -> Array:
    for axis in range(h.ndim - 1):
        h = jnp.repeat(h, 2, axis)
    return h


def flops_per_cell(network: DirectionNetwork) -> float:
    """Floating-point operations per cell of one application: two per weight used, padding and biases not counted."""
    before, coarse, after = network.blocks
    hidden = network.weights[1].size
    return 2.0 * (
        network.weights[0].size
        + hidden * 2 * (before + after + coarse / 2**network.dimensions)
        + network.weights[-1].size
    )


def receptive_radius(network: DirectionNetwork) -> int:
    """How many cells away, in the maximum norm, the residual can still influence the direction."""
    before, coarse, after = network.blocks
    return (1 + 2 * before) + 2 * (2 * coarse) + 2 * after + 1  # the last for a cell that shares a coarse cell


# --- losses ---


def residual_loss(
    operator: Operator, d: Float[ArrayLike, "..."], r: Float[ArrayLike, "..."], x: Float[ArrayLike, "..."] | None = None
) -> Float[Array, ""]:
    """The paper's loss of one example: |r - α A d|² with α = (d·r)/(d·A d), the step that is best in the energy norm.

    d  the direction for the residual r, which the paper takes of norm 1.  `x` is not used.
    The value is |r|² for a direction without energy.  A small value does not mean a small error: in the energy norm the
    error can shrink by as little as √(value·κ)/|r|, κ the condition number of A.
    """
    d, r = jnp.asarray(d), jnp.asarray(r)
    image = operator(d)
    alpha = _ratio(jnp.vdot(d, r), jnp.vdot(d, image))
    return jnp.square(r - alpha * image).sum()


def energy_loss(
    operator: Operator, d: Float[ArrayLike, "..."], r: Float[ArrayLike, "..."], x: Float[ArrayLike, "..."]
) -> Float[Array, ""]:
    """1 - (r·d)² / ((d·A d)(x·r)) for r = A x: the squared sine of the angle between d and x in the energy inner product.

    It is the square of the factor by which an exact line search along d reduces the error |x|_A; scale and sign of r and d do
    not matter.  1 for a direction, or an x, without energy.
    """
    d, r, x = jnp.asarray(d), jnp.asarray(r), jnp.asarray(x)
    return 1 - _ratio(jnp.square(jnp.vdot(r, d)), jnp.vdot(d, operator(d)) * jnp.vdot(x, r))


def _ratio(a: Array, b: Array) -> Array:
    """a/b, 0 where b is 0; the gradient is 0 there too."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


# --- training data ---


class Lanczos(NamedTuple):
    """The first m orthonormal vectors of a Krylov space, in which A is the tridiagonal matrix (diagonal, off_diagonal).

    basis         (m, *grid), zero from `steps` on
    diagonal      (m,)
    off_diagonal  (m - 1,)
    steps         int32, m, or less if the space is exhausted
    """

    basis: Float[Array, "m ..."]
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m-1"]
    steps: Int[Array, ""]


class Ritz(NamedTuple):
    """Ritz values (m,), ascending, and vectors (m, *grid) of norm 1 (0 for values that stand for nothing, which are 0)."""

    values: Float[Array, " m"]
    vectors: Float[Array, "m ..."]


class Examples(NamedTuple):
    """Residuals r of norm 1 and the x with A x = r, both (count, *grid)."""

    r: Float[Array, "count ..."]
    x: Float[Array, "count ..."]


def lanczos(operator: Operator, start: Float[ArrayLike, "..."], steps: int) -> Lanczos:
    """Lanczos' recurrence from `start` with full re-orthogonalisation, in the dtype of `start`, as one scan.

    Every vector is made orthogonal to all before it, twice: 4·steps²·n multiplications and additions for n cells, which is what
    it costs, and a basis of steps·n numbers.  The paper takes 10 000 steps from the normalised A z, z normal.
    Raises ValueError if `steps` < 1 or the operator changes the shape.
    """
    start = jnp.asarray(start)
    if steps < 1:
        raise ValueError(f"lanczos: steps is {steps}; expected at least 1")
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise TypeError(f"lanczos: start has type {start.dtype}; expected a floating type")
    image = jax.eval_shape(operator, start)
    if image.shape != start.shape:
        raise ValueError(f"lanczos: the operator makes {image.shape} of {start.shape}; expected the same shape")
    rounding = 10 * jnp.finfo(start.dtype).eps

    def step(carry: Any, j: Array) -> tuple[Any, tuple[Array, Array]]:
        basis, before, q, link, size, count = carry
        basis = basis.at[j].set(q)
        w = operator(q.reshape(start.shape)).astype(start.dtype).ravel()
        diagonal = _dot(q, w)
        w = w - diagonal * q - link * before
        for _ in range(2):  # once leaves what cancellation has magnified
            w = w - _dot(_dot(basis, w), basis)
        norm = jnp.sqrt(_dot(w, w))
        size = jnp.maximum(size, jnp.abs(diagonal) + norm)  # of A, as far as seen
        ended = norm <= rounding * size
        link = jnp.where(ended, 0, norm)
        following = jnp.where(ended, 0, w / jnp.where(ended, 1, norm))
        return (basis, q, following, link, size, count + (_dot(q, q) > 0)), (diagonal, link)

    length = jnp.linalg.norm(start)
    first = jnp.where(length > 0, start.ravel() / jnp.where(length > 0, length, 1), 0)
    zero = jnp.zeros((), start.dtype)
    carry = (jnp.zeros((steps, start.size), start.dtype), jnp.zeros_like(first), first, zero, zero, jnp.int32(0))
    (basis, *_, count), (diagonal, links) = lax.scan(step, carry, jnp.arange(steps))
    return Lanczos(basis.reshape(steps, *start.shape), diagonal, links[:-1], count)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def ritz_vectors(krylov: Lanczos) -> Ritz:
    """Eigenvalues of the tridiagonal matrix, and its eigenvectors as grids."""
    off = krylov.off_diagonal
    values, vectors = jnp.linalg.eigh(jnp.diag(krylov.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    m = len(values)
    grids = _dot(vectors.T, krylov.basis.reshape(m, -1))
    return Ritz(values, grids.reshape(krylov.basis.shape))


def training_set(
    key: Key[Array, ""],
    count: int,
    ritz: Ritz,
    *,
    low: int | None = None,
    boost: float = 9.0,
    null: float | None = None,
) -> Float[Array, "count ..."]:
    """The paper's residuals: Σ c_j q_j over the Ritz vectors, of norm 1, as (count, *grid).

    c_j is standard normal, times `boost` for the `low` lowest Ritz values (by default half of the m, and m/20 more; the paper
    takes 5500 of 10 000).  Values below `null` times the largest are dropped before the lowest are counted; it is 1e-8 by
    default, or 16 roundings if that is more.
    """
    return _normalized(_combine(_coefficients(key, count, ritz, low, boost, null)[0], ritz))[0]


def training_pairs(
    key: Key[Array, ""],
    count: int,
    ritz: Ritz,
    operator: Operator,
    *,
    low: int | None = None,
    boost: float = 9.0,
    null: float | None = None,
) -> Examples:
    """x = Σ (c_j/θ_j) q_j and r = A x, scaled to |r| = 1; the coefficients are those of `training_set`.

    r and x belong together however inaccurate the Ritz vectors are, so that a few of them (rather than the paper's 10 000) do.
    """
    c, keep = _coefficients(key, count, ritz, low, boost, null)
    x = _combine(c / jnp.where(keep, ritz.values, 1), ritz)
    r, norms = _normalized(jax.vmap(operator)(x))
    return Examples(r, x / norms)


def _coefficients(
    key: Array, count: int, ritz: Ritz, low: int | None, boost: float, null: float | None
) -> tuple[Array, Array]:
    m = len(ritz.values)
    low = m // 2 + m // 20 if low is None else low
    if count < 1 or not 0 <= low <= m:
        raise ValueError(f"training data: count is {count} and low {low}; expected at least 1, and 0 to {m}")
    dtype = ritz.values.dtype
    null = max(1e-8, 16 * float(jnp.finfo(dtype).eps)) if null is None else null
    keep = ritz.values > null * ritz.values[-1]
    rank = jnp.cumsum(keep) - 1
    scale = jnp.where(keep, jnp.where(rank < low, boost, 1.0), 0.0).astype(dtype)
    return jax.random.normal(key, (count, m), dtype) * scale, keep


def _combine(c: Array, ritz: Ritz) -> Array:
    return _dot(c, ritz.vectors.reshape(len(ritz.values), -1)).reshape(len(c), *ritz.vectors.shape[1:])


def _normalized(rows: Array) -> tuple[Array, Array]:
    norms = jnp.sqrt(jnp.square(rows).sum(tuple(range(1, rows.ndim)), keepdims=True))
    return rows / norms, norms


# --- training ---


class TrainInfo(NamedTuple):
    """What happened in `train`.

    steps    steps done, those before a checkpoint was resumed included
    losses   (steps,) the mean loss of each step's batch, at the weights before the step
    stopped  "steps", "callback" or "not finite" (a loss, a gradient or a new weight; the step is not counted)
    """

    steps: int
    losses: Float[np.ndarray, " steps"]
    stopped: str


class _Run(NamedTuple):
    """What stays the same in all steps; arrays are arguments of the compiled loop, all else is part of the program."""

    loss: Callable[..., Array]
    operator: Operator
    optimizer: Any
    data: Any
    batch: int
    frame: DirectionNetwork  # without its arrays


def train(
    network: DirectionNetwork,
    operator: Operator,
    data: Any,
    *,
    key: Key[Array, ""],
    loss: Callable[..., Array] = energy_loss,
    steps: int,
    batch: int = 10,
    optimizer: optax.GradientTransformation | None = None,
    chunk: int = 100,
    progress: bool | Console = False,
    callback: Callable[[int, float, DirectionNetwork], bool | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[DirectionNetwork, TrainInfo]:
    """Minimise the mean of loss(operator, network(r), r, ...) over examples (r, ...); returns (network, TrainInfo).

    operator    v -> A v on one grid.  An equinox module or eqx.Partial hands its arrays to the compiled loop; those that a
                plain function refers to become constants of it
    data        arrays with one example per row: `training_set`, which is enough for `residual_loss`, or the pair of
                `training_pairs`.  Every epoch goes through them in a new random order, without the rows that fill no batch.
                Or a function (key, count) -> examples that makes new ones at every step, such as
                eqx.Partial(training_pairs, ritz=ritz, operator=A)
    steps       in all, those of a resumed checkpoint included
    optimizer   an optax transformation, the paper's Adam with rate 1e-4 by default
    chunk       steps between two looks of the host
    progress    True for a bar, or the rich Console that shows it
    callback    (steps done, last loss, network) after every chunk; a true result stops
    checkpoint  an npz file, written after every chunk.  If it exists, the run continues from it, with the result of an
                uninterrupted run.  It is refused if another run wrote it: another start, data, key, batch, version of JAX,
                or program (loss, operator, optimiser)

    If something is not finite the run stops with a RuntimeWarning, and the last finite network is returned.
    Raises ValueError for settings out of range and for a file that is no checkpoint of this run.
    """
    optimizer = _adam() if optimizer is None else optimizer
    if not callable(data):
        data = tuple(map(jnp.asarray, data)) if isinstance(data, tuple | list) else (jnp.asarray(data),)
        rows = len(data[0])
        if any(len(leaf) != rows for leaf in data) or not 1 <= batch <= rows:
            shapes = [leaf.shape for leaf in data]
            raise ValueError(
                f"train: data has shapes {shapes} and batch is {batch}; expected one number of rows >= batch"
            )
    if steps < 0 or chunk < 1 or batch < 1:
        raise ValueError(
            f"train: steps is {steps}, chunk {chunk}, batch {batch}; expected steps >= 0, chunk >= 1, batch >= 1"
        )
    params, frame = eqx.partition(network, eqx.is_array)
    run = _Run(loss, operator, optimizer, data, batch, frame)
    state = params, optimizer.init(params)
    losses, stopped = np.zeros(0), "steps"
    path = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {}
    if path is not None:
        if not path.parent.is_dir():
            raise ValueError(f"train: checkpoint is {path}; expected a file in an existing folder")
        settings = _settings(run, state, key)
        state, losses = _resume(path, settings, state)
        if len(losses) > steps:
            raise ValueError(f"train: {path} holds {len(losses)} steps; expected at most steps = {steps}")

    with _bar(progress, steps, len(losses)) as show:
        while (done := len(losses)) < steps:
            state, seen, failed = _chunk(run, state, _batches(data, key, batch, done, min(done + chunk, steps)))
            losses = np.concatenate([losses, seen])
            if failed:
                stopped = "not finite"
                message = (
                    f"train: the loss, a gradient or a weight is not finite at step {len(losses)}, counted from 0; "
                )
                warnings.warn(message + "the network before it is returned", RuntimeWarning, stacklevel=2)
                break
            if path is not None:
                leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
                _write(path, {"format": _FORMAT, "settings": settings}, leaves | {"losses": losses})
            show(len(losses), float(losses[-1]))
            # After the checkpoint, so that an exception raised in the callback loses nothing.
            if callback is not None and callback(len(losses), float(losses[-1]), eqx.combine(state[0], frame)):
                stopped = "callback"
                break
    return eqx.combine(state[0], frame), TrainInfo(len(losses), losses, stopped)


@cache  # one object, so that a second run does not compile anew
def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-4)


def _one_step(run: _Run, carry: tuple[PyTree, Array], at: Array) -> tuple[tuple[PyTree, Array], Array]:
    """The state after one step and whether all was finite up to it, and the loss; the state stays where it is not."""
    state, good = carry
    params, inner = state
    examples = run.data(at, run.batch) if callable(run.data) else tuple(rows[at] for rows in run.data)
    examples = examples if isinstance(examples, tuple) else (examples,)

    def mean_loss(params: PyTree) -> Array:
        network = eqx.combine(params, run.frame)
        return jax.vmap(lambda r, *rest: run.loss(run.operator, network(r), r, *rest))(*examples).mean()

    value, gradient = jax.value_and_grad(mean_loss)(params)
    updates, inner = run.optimizer.update(gradient, inner, params)
    params = optax.apply_updates(params, updates)
    for leaf in jax.tree.leaves((value, gradient, params)):
        good &= jnp.isfinite(leaf).all()
    return (jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, inner), state), good), value


_step: Any = eqx.filter_jit(_one_step)


def _chunk(run: _Run, state: PyTree, batches: Array) -> tuple[PyTree, np.ndarray, int]:
    """One step per batch: the state, the losses up to the last step at which all was finite, and the number of the others."""
    # Not a scan: in the body of a loop XLA's convolutions on CPUs are ten to twenty times slower (measured with jax 0.5 and
    # 0.12).  The host runs ahead of the device and waits for it only here, at the end.
    carry, losses, flags = (state, jnp.bool_(True)), [], []
    for i in range(len(batches)):
        carry, value = _step(run, carry, batches[i])
        losses.append(value)
        flags.append(carry[1])
    finite = int(np.sum(jax.device_get(flags)))
    return carry[0], np.asarray(jax.device_get(losses), np.float64)[:finite], len(losses) - finite


def _batches(data: Any, key: Array, batch: int, start: int, stop: int) -> Array:
    """What makes the batches of the steps start to stop: keys for a function, else rows (steps, batch) of the arrays."""
    if callable(data):
        return jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(start, stop))
    per_epoch = len(data[0]) // batch
    first, last = start // per_epoch, (stop - 1) // per_epoch
    epochs = jnp.concatenate([_epoch(key, epoch, len(data[0])) for epoch in range(first, last + 1)])
    order = epochs.reshape(last + 1 - first, -1)[:, : per_epoch * batch].reshape(-1, batch)
    return order[start - first * per_epoch : stop - first * per_epoch]


def _epoch(key: Array, epoch: int, rows: int) -> Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), rows)


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


# --- files ---


def save(path: str | os.PathLike[str], network: DirectionNetwork, **facts: Any) -> None:
    """Write the weights to `path`, an npz file with a JSON header, whole or not at all.

    facts  what should be known of them, such as command="...", seed=0; anything that JSON can hold.  The versions of Python's
           packages at work are added.
    Raises ValueError if the activation is none that a file can name (relu, leaky_relu, gelu, silu, tanh or None).
    """
    names = [name for name, activation in _ACTIVATIONS.items() if activation is network.activation]
    if not names:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"save: activation is {network.activation}; expected one that a file can name: {known}")
    header = {
        "format": _FORMAT,
        "network": {
            "dimensions": network.dimensions,
            "blocks": network.blocks,
            "channels": len(network.weights[-1]),
            "activation": names[0],
            "bias": network.biases is not None,
            "dtype": network.weights[0].dtype.name,
        },
        "versions": {name: metadata.version(name) for name in ("jax", "equinox", "optax", "numpy")},
        "facts": facts,
    }
    leaves = jax.tree.leaves(network)
    _write(Path(path), header, {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})


def load(path: str | os.PathLike[str]) -> DirectionNetwork:
    """The network that `save` wrote.  Raises ValueError if the file is not such a file."""
    header, arrays = _read(Path(path), "load", "network")
    form = header["network"]
    try:
        blank = eqx.filter_eval_shape(
            DirectionNetwork,
            form["dimensions"],
            tuple(form["blocks"]),
            channels=form["channels"],
            activation=_ACTIVATIONS[form["activation"]],
            bias=form["bias"],
            dtype=jnp.dtype(form["dtype"]),
            key=jax.random.key(0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path} announces a network that cannot be: {error!r}") from error
    return _restored(Path(path), "load", arrays, blank)


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a weights file: "network", "versions" and, under "facts", what `save` was told."""
    header, _ = _read(Path(path), "facts", "network")
    return header


def _settings(run: _Run, state: PyTree, key: Array) -> dict[str, Any]:
    program = _step.lower(run, (state, jnp.bool_(True)), _batches(run.data, key, run.batch, 0, 1)[0]).as_text()
    return {
        "start": _digest(state),
        "data": _digest(eqx.filter(run.data, eqx.is_array)),
        "operator": _digest(eqx.filter(run.operator, eqx.is_array)),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "batch": run.batch,
        "version of JAX": [jax.__version__, jax.default_backend()],
        "program": hashlib.sha256(program.encode()).hexdigest(),
    }


def _digest(tree: PyTree) -> str:
    state = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        state.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return state.hexdigest()


def _resume(path: Path, settings: Mapping[str, Any], state: PyTree) -> tuple[PyTree, np.ndarray]:
    if not path.exists():
        return state, np.zeros(0)
    header, arrays = _read(path, "train", "settings")
    other = [name for name, value in settings.items() if header["settings"].get(name) != value]
    if other:
        raise ValueError(
            f"train: {path} was written by a run with another {', '.join(other)}; use the same settings or another file"
        )
    losses = arrays.pop("losses")
    return _restored(path, "train", arrays, state), losses


def _restored(path: Path, owner: str, arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    names = [f"leaf_{i}" for i in range(len(leaves))]
    fits = set(arrays) == set(names) and all(
        arrays[name].shape == leaf.shape and arrays[name].dtype.itemsize == leaf.dtype.itemsize
        for name, leaf in zip(names, leaves, strict=True)
    )
    if not fits:
        raise ValueError(f"{owner}: {path} is damaged: its arrays are not those that its header announces")
    # The view restores types that npz does not know, such as bfloat16.
    values = [jnp.asarray(arrays[name].view(leaf.dtype)) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def _write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write to a temporary file of the same folder, then rename: a reader finds the old state or the new one."""
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, header=encoded, **dict(arrays))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path, owner: str, needed: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(arrays.pop("header").tobytes())
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{owner}: {path} is not a file of {owner} ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT or needed not in header:
        raise ValueError(f"{owner}: {path} is not a file of {owner}, format {_FORMAT}")
    return header, arrays
