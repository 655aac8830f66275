"""A learned conjugate direction on a 32² Poisson problem with obstacles: which loss, which network, and does it transfer?

    python benchmarks/conjugate_direction_2d.py [--quick] [--reuse] [--out FOLDER] [--seed SEED]

Domain: 32² cells, walls on three sides and open air on the fourth, six solid and three air discs; the five-point Laplacian with
Neumann data at solids and zero pressure in air.  Four networks, the deep conjugate direction paper's layers in two dimensions,
are trained on one matrix (Ritz vectors of 400 Lanczos steps, batches of 10, Adam with a cosine rate from 2e-3), then applied with
memory 2 in double precision to that matrix and to two others.  Right-hand sides, none of them in the training data: a plume with
random waves and white noise.  The table gives the median iterations over them, the JSON file all of them.

CG, and PyAMG's smoothed aggregation and Ruge-Stüben as preconditioners of CG if it is installed, are what a solver has to beat.
Prints the table, writes conjugate_direction_2d.json and the networks.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Float
from measure import about, write_json
from rich.console import Console
from rich.table import Table

from solvers import direction_data as dd
from solvers import direction_network as dn
from solvers import direction_training as dt
from solvers.conjugate_direction import solve

FLUID, SOLID, AIR = 0, 1, 2
SIDE, LANCZOS, LOW, ROWS = 32, 400, 220, 20_000
TOLERANCES = (1e-4, 1e-6, 1e-10)
MOST = 150  # iterations of the networks; CG gets more
DOMAINS = {"training matrix": 0, "new geometry A": 1, "new geometry B": 2}  # seeds of the discs
RIGHT_HAND_SIDES = range(1, 6)


class Trial(NamedTuple):
    """A network to train."""

    loss: Callable[..., Array]
    linear: bool
    steps: int


TRIALS = {
    "ReLU, L2 loss": Trial(dn.residual_loss, False, 2500),
    "linear, L2 loss": Trial(dn.residual_loss, True, 3000),
    "ReLU, A-norm loss": Trial(dn.energy_loss, False, 4000),
    "linear, A-norm loss": Trial(dn.energy_loss, True, 4000),
}

# ---- problems ----------------------------------------------------------------------------------------------------------


class Laplacian(eqx.Module):
    """v -> A v on a grid; rows and columns of cells without fluid are zero."""

    diagonal: Float[Array, "n m"]
    fluid: Float[Array, "n m"]

    def __call__(self, v: Float[Array, "n m"]) -> Float[Array, "n m"]:
        padded = jnp.pad(self.fluid.astype(v.dtype) * v, 1)
        around = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
        return self.fluid.astype(v.dtype) * (self.diagonal.astype(v.dtype) * v - around)


def laplacian(seed: int) -> Laplacian:
    rng = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE] * 2, indexing="ij"), -1)
    cells = np.full((SIDE, SIDE), FLUID)
    for kind, count, low, high in ((SOLID, 6, 0.05, 0.14), (AIR, 3, 0.04, 0.10)):
        for _ in range(count):
            center, radius = rng.uniform(0.15, 0.85, 2), rng.uniform(low, high)
            cells[np.square(place - center).sum(-1) < radius**2] = kind
    walled = np.pad(cells, 1, constant_values=SOLID)
    walled[-1] = AIR
    open_sides = sum((np.roll(walled, shift, axis) != SOLID).astype(float) for axis in (0, 1) for shift in (1, -1))
    fluid = (cells == FLUID).astype(float)
    return Laplacian(jnp.asarray(open_sides[1:-1, 1:-1] * fluid), jnp.asarray(fluid))


def matrix(operator: Laplacian) -> np.ndarray:
    """The dense matrix of the fluid cells."""
    columns = jax.vmap(lambda e: operator(e.reshape(SIDE, SIDE)).ravel())(jnp.eye(SIDE**2))
    keep = np.asarray(operator.fluid).ravel() > 0
    return np.asarray(columns)[np.ix_(keep, keep)]


def right_hand_side(operator: Laplacian, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE] * 2, indexing="ij")
    b = np.exp(-((x - 0.5) ** 2 + (y - 0.4) ** 2) / 0.02)
    for _ in range(6):
        k, phase = rng.integers(1, SIDE // 6, 2), rng.uniform(0, 6, 2)
        b += 0.3 * np.cos(np.pi * k[0] * x + phase[0]) * np.cos(np.pi * k[1] * y + phase[1])
    b = (b + 0.1 * rng.standard_normal(b.shape)) * np.asarray(operator.fluid)
    return jnp.asarray(b / np.linalg.norm(b))


# ---- solving -----------------------------------------------------------------------------------------------------------


class Direction(eqx.Module):
    """A network, its work in solids and air undone."""

    network: dn.DirectionNetwork
    fluid: Float[Array, "n m"]

    def __call__(self, r: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return self.fluid * self.network(r)


def learned(network: dn.DirectionNetwork, operator: Laplacian, b: Array) -> list[int | None]:
    direction = Direction(network, operator.fluid)
    _, info = solve(operator, b, direction=direction, memory=2, rtol=TOLERANCES[-1], max_steps=MOST, recompute_every=1)
    return iterations(np.asarray(info.residuals))


def conjugate_gradients(operator: Laplacian, b: Array) -> list[int | None]:
    _, info = solve(operator, b, memory=1, rtol=TOLERANCES[-1], max_steps=2 * MOST, recompute_every=1)
    return iterations(np.asarray(info.residuals))


def iterations(history: np.ndarray) -> list[int | None]:
    """For each tolerance the first iteration that meets it, None if none does."""
    below = [np.flatnonzero(np.asarray(history) <= tolerance) for tolerance in TOLERANCES]
    return [int(found[0]) if len(found) else None for found in below]


def multigrid(kind: str, operator: Laplacian, b: Array) -> list[int | None]:
    """CG preconditioned by PyAMG, "smoothed aggregation" or "Ruge-Stüben"."""
    import pyamg

    a, right = scipy.sparse.csr_matrix(matrix(operator)), np.asarray(b)[np.asarray(operator.fluid) > 0]
    make = pyamg.smoothed_aggregation_solver if kind == "smoothed aggregation" else pyamg.ruge_stuben_solver
    history = [1.0]
    scipy.sparse.linalg.cg(
        a,
        right,
        rtol=TOLERANCES[-1] / 10,
        maxiter=MOST,
        M=make(a).aspreconditioner(),
        callback=lambda x: history.append(float(np.linalg.norm(right - a @ x) / np.linalg.norm(right))),
    )
    return iterations(np.asarray(history))


# ---- training and the table --------------------------------------------------------------------------------------------


def training_data(operator: Laplacian, seed: int) -> dd.Examples:
    start, draw = jax.random.split(jax.random.key(seed + 1000))
    noise = operator(jax.random.normal(start, (SIDE, SIDE), jnp.float64))
    ritz = dd.ritz_vectors(jax.jit(partial(dd.lanczos, steps=LANCZOS))(operator, noise))
    data = dd.training_pairs(draw, ROWS, ritz, operator, low=LOW)
    return dd.Examples(*(rows.astype(jnp.float32) for rows in data))


def train(trial: Trial, operator: Laplacian, data: dd.Examples, steps: int, seed: int, file: Path) -> None:
    """Train, and save the network with what it took."""
    make, run = jax.random.split(jax.random.key(seed))
    activation = None if trial.linear else jax.nn.relu
    network = dn.DirectionNetwork(2, activation=activation, bias=not trial.linear, key=make)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    cpu, wall = time.process_time(), time.perf_counter()
    network, info = dt.train(
        network, operator, data, key=run, loss=trial.loss, steps=steps, optimizer=optimizer, progress=True
    )
    dn.save(
        file,
        network,
        command="benchmarks/conjugate_direction_2d.py",
        seed=seed,
        steps=info.steps,
        stopped=info.stopped,
        final_loss=float(info.losses[-max(1, steps // 20) :].mean()),
        cpu_seconds=time.process_time() - cpu,
        seconds=time.perf_counter() - wall,
    )


def middle(found: list[list[int | None]]) -> str:
    """The medians over the right-hand sides, – for those that do not arrive."""
    medians = [np.median([np.inf if n is None else n for n in column]) for column in zip(*found, strict=True)]
    return " · ".join(f"{m:g}" if np.isfinite(m) else "–" for m in medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps; the figures mean nothing")
    parser.add_argument("--reuse", action="store_true", help="take the networks that are in FOLDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0, help="of the training data and the networks")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)

    operators = {name: laplacian(seed) for name, seed in DOMAINS.items()}
    domains = {}
    for name, operator in operators.items():
        spectrum = np.linalg.eigvalsh(matrix(operator))
        domains[name] = {"unknowns": len(spectrum), "condition": float(spectrum[-1] / spectrum[0])}

    solvers: dict[str, Callable[[Laplacian, Array], list[int | None]]] = {}
    networks: dict[str, Any] = {}
    data = None
    for name, trial in TRIALS.items():
        file = arguments.out / f"conjugate_direction_2d_{name.replace(',', '').replace(' ', '_')}.npz"
        if not (arguments.reuse and file.exists()):
            console.print(f"training: {name}")
            data = training_data(operators["training matrix"], arguments.seed) if data is None else data
            steps = trial.steps // 20 if arguments.quick else trial.steps
            train(trial, operators["training matrix"], data, steps, arguments.seed, file)
        networks[name] = dn.facts(file)["facts"]
        solvers[name] = partial(learned, dn.load(file))
    solvers["CG"] = conjugate_gradients
    result: dict[str, Any] = about("jax", "equinox", "optax", "scipy", "pyamg")
    if result["versions"]["pyamg"]:
        solvers |= {f"PyAMG {kind} CG": partial(multigrid, kind) for kind in ("smoothed aggregation", "Ruge-Stüben")}

    heads = [f"{name}\n{d['unknowns']} unknowns, κ {d['condition']:.0f}" for name, d in domains.items()]
    goals = " · ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
    title = f"Iterations to {goals} (– if not in {MOST}; median of {len(RIGHT_HAND_SIDES)} right-hand sides)"
    table = Table("direction", "final loss", *heads, title=title)
    counts: dict[str, Any] = {}
    for name, run in solvers.items():
        counts[name] = {
            domain: [run(operator, right_hand_side(operator, seed)) for seed in RIGHT_HAND_SIDES]
            for domain, operator in operators.items()
        }
        loss = f"{networks[name]['final_loss']:.2g}" if name in networks else ""
        table.add_row(name, loss, *map(middle, counts[name].values()))
    console.print(table)
    result |= {"quick": arguments.quick, "tolerances": TOLERANCES, "most": MOST, "domains": domains}
    write_json(arguments.out / "conjugate_direction_2d.json", result | {"networks": networks, "iterations": counts})


if __name__ == "__main__":
    main()
