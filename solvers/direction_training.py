"""Training of the learned conjugate direction, in chunks that can be interrupted and resumed; how the shipped weights were made.

    python -m solvers.direction_training --name poisson3d --out solvers/weights/direction_poisson3d.npz

trains on one domain at one or more sizes, small ones first: examples on a small grid cost little, and the network does not know
the size.  Checkpoints lie beside `--out` until it is written; the same command goes on from there.  `--loss residual
--unit-norm --vectors 10000 --stage 64 STEPS 10 1e-4` are the paper's settings, up to its domain and its constant rate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
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

from solvers import poisson, training_loop
from solvers.direction_data import Examples, Ritz, lanczos, ritz_vectors, training_pairs
from solvers.direction_network import DirectionNetwork, Operator, energy_loss, residual_loss, save
from solvers.stencil import Stencil


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
    at_once: int
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
    at_once: int | None = None,
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
    at_once     how many examples of a batch are computed together, a divisor of it: memory goes with it.  None for all
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
    at_once = batch if at_once is None else at_once
    if at_once < 1 or batch % at_once:
        raise ValueError(f"train: at_once is {at_once}; expected a divisor of batch = {batch}")
    if steps < 0 or chunk < 1 or batch < 1:
        raise ValueError(
            f"train: steps is {steps}, chunk {chunk}, batch {batch}; expected steps >= 0, chunk >= 1, batch >= 1"
        )
    params, frame = eqx.partition(network, eqx.is_array)
    run = _Run(loss, operator, optimizer, data, batch, at_once, frame)
    state = params, optimizer.init(params)
    losses, stopped = np.zeros(0), "steps"
    path = training_loop.checkpoint_path(checkpoint)

    def advance(state: PyTree, start: int, stop: int) -> tuple[PyTree, np.ndarray, int]:
        given = [(at,) for at in _batches(data, key, batch, start, stop)]
        return training_loop.one_by_one(eqx.Partial(_step, run), state, given)

    state, losses, stopped = training_loop.run(
        advance,
        state,
        [steps],
        chunk=chunk,
        path=path,
        settings={} if path is None else _settings(run, state, key),
        network_of=lambda state: eqx.combine(state[0], frame),
        progress=progress,
        callback=callback,
    )
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

    def mean_loss(params: PyTree, examples: tuple[Array, ...]) -> Array:
        network = eqx.combine(params, run.frame)
        return jax.vmap(lambda r, *rest: run.loss(run.operator, network(r), r, *rest))(*examples).mean()

    if run.at_once == run.batch:
        value, gradient = jax.value_and_grad(mean_loss)(params, examples)
    else:
        parts = run.batch // run.at_once
        groups = jax.tree.map(lambda v: v.reshape(parts, run.at_once, *v.shape[1:]), examples)
        each = lax.map(lambda group: jax.value_and_grad(mean_loss)(params, group), groups)
        value, gradient = jax.tree.map(lambda v: v.mean(0), each)
    updates, inner = run.optimizer.update(gradient, inner, params)
    params = optax.apply_updates(params, updates)
    for leaf in jax.tree.leaves((value, gradient, params)):
        good &= jnp.isfinite(leaf).all()
    return (jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, inner), state), good), value


_step: Any = eqx.filter_jit(_one_step)


def _batches(data: Any, key: Array, batch: int, start: int, stop: int) -> Array:
    """What makes the batches of the steps start to stop: keys for a function, else rows (steps, batch) of the arrays."""
    if callable(data):
        return jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(start, stop))
    return training_loop.row_batches(key, len(data[0]), batch, start, stop)


def _settings(run: _Run, state: PyTree, key: Array) -> dict[str, Any]:
    program = _step.lower(run, (state, jnp.bool_(True)), _batches(run.data, key, run.batch, 0, 1)[0]).as_text()
    return training_loop.identity(
        key,
        [program],
        start=training_loop.digest(state),
        data=training_loop.digest(eqx.filter(run.data, eqx.is_array)),
        operator=training_loop.digest(eqx.filter(run.operator, eqx.is_array)),
        batch=run.batch,
        at_once=run.at_once,
    )


# --- the shipped weights ---


class Stage(NamedTuple):
    """cells per axis of the grid, steps, examples a step, and the rate that Adam starts from."""

    cells: int
    steps: int
    batch: int
    rate: float


# A few minutes of one core in two dimensions, half an hour in three.  In two, what was learned on 32² serves 64² better than
# what was learned there: 48 iterations to 1e-6, and more than 150 after 800 further steps on 64².
STAGES: dict[str, tuple[Stage, ...]] = {
    "poisson2d": (Stage(32, 3000, 10, 2e-3),),
    "poisson3d": (Stage(16, 3000, 10, 2e-3), Stage(32, 600, 4, 5e-4)),
}
LOSSES = {"energy": energy_loss, "residual": residual_loss}
LANCZOS = 1000


def training_domain(cells: int, dimensions: int, seed: int = 0) -> poisson.Domain:
    """Fluid between walls, open at the top, with six solid balls at random; the same ones for every number of cells."""
    rng = np.random.default_rng([1000, seed])
    place = np.stack(np.meshgrid(*[(np.arange(cells) + 0.5) / cells] * dimensions, indexing="ij"), -1)
    codes = np.full((cells,) * dimensions, poisson.FLUID)
    for _ in range(6):
        centre, radius = rng.uniform(0.15, 0.85, dimensions), rng.uniform(0.06, 0.16)
        codes[np.square(place - centre).sum(-1) < radius**2] = poisson.SOLID
    return poisson.Domain.from_mask(codes, edges=[poisson.SOLID] * (dimensions - 1) + [(poisson.SOLID, poisson.AIR)])


class _Examples(eqx.Module):
    """(key, count) -> residuals with their solutions."""

    ritz: Ritz
    operator: Stencil

    def __call__(self, key: Array, count: int) -> Examples:
        return training_pairs(key, count, self.ritz, self.operator)


def train_stages(
    dimensions: int,
    stages: Sequence[Stage],
    *,
    loss: Callable[..., Array] = energy_loss,
    vectors: int = LANCZOS,
    rescaled: bool = True,
    progress: bool | Console = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[DirectionNetwork, list[TrainInfo]]:
    """The paper's network, trained on `training_domain` in stages, each with a cosine schedule of its own.

    vectors     Lanczos steps that the examples are made of, new ones at every step
    checkpoint  the beginning of the names of the stages' checkpoints, see `train`
    """
    make, draw, run = jax.random.split(jax.random.key(seed), 3)
    network = DirectionNetwork(dimensions, rescaled=rescaled, key=make)
    infos = []
    for number, stage in enumerate(stages):
        operator = poisson.laplacian(training_domain(stage.cells, dimensions, seed), jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(draw, number), operator.shape, jnp.float32)
        steps = min(vectors, int(operator.unknown.sum()))
        ritz = ritz_vectors(eqx.filter_jit(lanczos)(operator, operator(noise), steps))
        network, info = train(
            network,
            operator,
            _Examples(ritz, operator),
            key=jax.random.fold_in(run, number),
            loss=loss,
            steps=stage.steps,
            batch=stage.batch,
            at_once=1 if dimensions == 3 and jax.default_backend() == "cpu" else None,
            optimizer=optax.adam(optax.cosine_decay_schedule(stage.rate, stage.steps)),
            chunk=20,
            progress=progress,
            checkpoint=None if checkpoint is None else f"{checkpoint}.stage{number}",
        )
        infos.append(info)
        if info.stopped != "steps":
            break
    return network, infos


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m solvers.direction_training", description="Train the learned direction."
    )
    parser.add_argument("--name", required=True, choices=sorted(STAGES))
    parser.add_argument(
        "--stage",
        nargs=4,
        action="append",
        metavar=("CELLS", "STEPS", "BATCH", "RATE"),
        help="again for each; default: those of the shipped weights",
    )
    parser.add_argument("--loss", choices=sorted(LOSSES), default="energy", help="residual is the paper's")
    parser.add_argument(
        "--unit-norm", action="store_true", help="residuals of norm 1 into the network, as in the paper"
    )
    parser.add_argument("--vectors", type=int, default=LANCZOS, help="Lanczos steps that the examples are made of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    stages = STAGES[given.name]
    if given.stage:
        stages = tuple(Stage(int(c), int(s), int(b), float(r)) for c, s, b, r in given.stage)
    network, infos = train_stages(
        int(given.name[-2]),
        stages,
        loss=LOSSES[given.loss],
        vectors=given.vectors,
        rescaled=not given.unit_norm,
        progress=True,
        checkpoint=given.out,
        seed=given.seed,
    )
    if infos[-1].stopped != "steps":
        raise FloatingPointError(f"{given.out}: not written, training was {infos[-1].stopped}; try a smaller rate")
    final = [float(info.losses[-max(1, len(info.losses) // 20) :].mean()) for info in infos]
    save(
        given.out,
        network,
        command=" ".join(["python -m solvers.direction_training", *(sys.argv[1:] if arguments is None else arguments)]),
        stages=[stage._asdict() for stage in stages],
        loss=given.loss,
        seed=given.seed,
        vectors=given.vectors,
        final_loss=final,
    )
    for number in range(len(infos)):
        Path(f"{given.out}.stage{number}").unlink()
    print(f"loss {final[-1]:.4g} (mean of the last twentieth of the steps), written: {given.out}")


if __name__ == "__main__":
    main()
