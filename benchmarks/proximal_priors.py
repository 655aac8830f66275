"""How near learned proximal networks come to what their losses aim at, on distributions in one and two dimensions.

    python benchmarks/proximal_priors.py --train FOLDER [--share SHARE] [--seed SEED]      the networks on the line
    python benchmarks/proximal_priors.py [--networks FOLDER] [--out FOLDER] [--share SHARE]  the table, the picture, the plane

Line: Laplace distribution of scale 1, noise 1; squared and absolute loss and matching with γ = 0.5, 0.4, 0.3, 0.2, 0.1, each
network going on from the one before.  A loss is minimal at each y by itself, so that y may have any distribution: here it is
uniform, and x has its conditional distribution.  With y = x + v the tails, where the error is sought too, would hold few of the
samples.
Plane: y = x + σ v with fresh samples, and for the rotated Laplace distribution some as on the line.

--share  this part of the steps, for a quick look
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jaxtyping import Array, Float
from measure import about, write_result
from rich.console import Console
from rich.table import Table

from solvers.proximal import matching, training, weights
from solvers.proximal.distributions import Laplace
from solvers.proximal.matching import Cosine, Stage
from solvers.proximal.network import LearnedProximal, constrained, mlp
from solvers.proximal.prior import regularizer

GAMMAS = (0.5, 0.4, 0.3, 0.2, 0.1)
BATCH, EMA, HALF = 1024, 0.99, 5.0

# ---- samples ------------------------------------------------------------------------------------------------------------


def lattice(key: Array, count: int, dimensions: int) -> Float[Array, "count dimensions"]:
    """Points that fill (0, 1)^dimensions evenly, each uniform there: multiples of a golden ratio from a random start."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    multiples = np.mod(np.arange(count)[:, None] * ratio ** -np.arange(1.0, dimensions + 1), 1)
    points = jnp.mod(multiples.astype(np.float32) + jax.random.uniform(key, (dimensions,)), 1)
    return jnp.clip(points, 1e-6, 1 - 1e-6)


def laplace_pairs(
    key: Array, count: int, half: float = HALF
) -> tuple[Float[Array, "count 1"], Float[Array, "count 1"]]:
    """y uniform on ±half, and x with its distribution given y: below and above zero a cut normal one, around y + 1 and y - 1."""
    points = lattice(key, count, 2)
    y, share = half * (2 * points[:, 0] - 1), points[:, 1]
    below = jax.nn.sigmoid(2 * y + log_ndtr(-y - 1) - log_ndtr(y - 1))
    low = share < below
    left = (y + 1) + ndtri(jnp.where(low, share / below, 0.5) * ndtr(-(y + 1)))
    right = (y - 1) - ndtri(jnp.where(low, 0.5, (1 - share) / (1 - below)) * ndtr(y - 1))
    return y[:, None], jnp.where(low, left, right)[:, None]


class Rotated(eqx.Module):
    """Independent Laplace distributions of scale 1 along two axes that are turned by an angle: R(x) = ‖Q x‖₁."""

    turn: Float[Array, "2 2"]
    sigma: float = eqx.field(static=True, default=1.0)
    gamma: float = eqx.field(static=True, default=0.5)
    batch: int = eqx.field(static=True, default=2 * BATCH)

    def __call__(self, key: Array, count: int) -> tuple[Float[Array, "count 2"], Float[Array, "count 2"]]:
        """Three quarters as they come; the others as on the line, along both axes, on ±8, where all but one in a thousand are."""
        first, second, third = jax.random.split(key, 3)
        wide = count // 4
        pairs = [laplace_pairs(k, wide, 8.0) for k in jax.random.split(first)]
        y, x = (jnp.concatenate(both, 1) @ self.turn for both in zip(*pairs, strict=True))
        plain = self.sample(second, count - wide)
        seen = plain + self.sigma * jax.random.normal(third, plain.shape)
        return jnp.concatenate([y, seen]), jnp.concatenate([x, plain])

    def sample(self, key: Array, count: int) -> Float[Array, "count 2"]:
        return jax.random.laplace(key, (count, 2)) @ self.turn

    def matched(self, y: Float[Array, "count 2"]) -> Float[Array, "count 2"]:
        return Laplace(1.0).matched(y @ self.turn.T, self.sigma, self.gamma) @ self.turn

    def value(self, y: Float[Array, "count 2"]) -> Float[Array, " count"]:
        """R_γ at f_γ(y)."""
        exact = Laplace(1.0).matched_regularizer(self.sigma, self.gamma)
        return jax.vmap(exact)(self.matched(y) @ self.turn.T)


class Normals(eqx.Module):
    """Round normal distributions of one width in the plane, with equal weights."""

    means: Float[Array, "k 2"]
    scale: float = eqx.field(static=True)
    sigma: float = eqx.field(static=True)
    gamma: float = eqx.field(static=True)
    batch: int = eqx.field(static=True, default=BATCH)

    def __call__(self, key: Array, count: int) -> Float[Array, "count 2"]:
        first, second = jax.random.split(key)
        chosen = jax.random.randint(first, (count,), 0, len(self.means))
        return self.means[chosen] + self.scale * jax.random.normal(second, (count, 2))

    sample = __call__

    def posterior(self, y: Float[Array, "2"]) -> tuple[Array, Array, float]:
        """Means and logarithms of the weights, not normalised, of the normal parts of p(x | y) * N(0, γ²/2); their variance."""
        both = self.scale**2 + self.sigma**2
        means = (self.scale**2 * y + self.sigma**2 * self.means) / both
        logs = -jnp.sum((y - self.means) ** 2, -1) / (2 * both)
        return means, logs, self.scale**2 * self.sigma**2 / both + self.gamma**2 / 2

    def _mode(self, y: Float[Array, "2"]) -> tuple[Array, Array]:
        """The mode, by mean shift from each part, and log(p(y) times the density there) up to a constant."""
        means, logs, variance = self.posterior(y)

        def density(c: Array) -> Array:
            return jax.nn.logsumexp(logs - jnp.sum((c - means) ** 2, -1) / (2 * variance))

        def shifted(_: int, c: Array) -> Array:
            return jax.nn.softmax(logs - jnp.sum((c - means) ** 2, -1) / (2 * variance)) @ means

        found = jax.vmap(lambda c: jax.lax.fori_loop(0, 500, shifted, c))(means)
        values = jax.vmap(density)(found)
        best = jnp.argmax(values)
        return found[best], values[best]

    def matched(self, y: Float[Array, "count 2"]) -> Float[Array, "count 2"]:
        return jax.lax.map(lambda y: self._mode(y)[0], y)

    def value(self, y: Float[Array, "count 2"]) -> Float[Array, " count"]:
        """R_γ at f_γ(y), up to a constant: ⟨x, y⟩ - ‖x‖²/2 - ψ_γ(y)."""

        def one(y: Array) -> Array:
            x, log = self._mode(y)
            return x @ y - x @ x / 2 - y @ y / 2 - self.sigma**2 * log

        return jax.lax.map(one, y)


def on_circle(count: int, radius: float) -> Float[Array, "count 2"]:
    angle = 2 * np.pi * np.arange(count) / count
    return jnp.asarray(radius * np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)


def planes() -> dict[str, Any]:
    c, s = np.cos(0.5), np.sin(0.5)
    return {
        "rotated Laplace": Rotated(jnp.asarray([[c, s], [-s, c]], jnp.float32)),
        "three normals": Normals(on_circle(3, 1.2), 0.6, 0.6, 0.5),
        "ring": Normals(on_circle(16, 1.5), 0.3, 0.5, 0.5),
    }


# ---- training -----------------------------------------------------------------------------------------------------------


def evened(network: LearnedProximal) -> LearnedProximal:
    """The network with W_k and w scaled so that a row has the sum 1 in the mean: each layer then passes on about what it gets.
    Without it a layer of n weights of one sign multiplies by √n/2, and all later steps are coarse."""
    return eqx.tree_at(constrained, network, tuple(w / w.sum(-1).mean() for w in constrained(network)))


def laplace_schedules(share: float) -> dict[str, tuple[Stage, ...]]:
    """Of the networks, each of which starts where the one before ends, that with the absolute loss where the squared one does."""

    def steps(n: int) -> int:
        return max(2, round(share * n))

    found = {
        "squared": (Stage(matching.squared, steps(800), Cosine(5e-3, 5e-5)),),
        "absolute": (Stage(matching.absolute, steps(500), Cosine(1e-3, 5e-5)),),
    }
    rates = {0.5: 1e-3, 0.4: 5e-4, 0.3: 5e-4, 0.2: 5e-4}
    for gamma, rate in rates.items():
        found[f"{gamma:g}"] = (Stage(matching.matching(gamma), steps(500), Cosine(rate, 5e-5)),)
    found["0.1"] = (
        Stage(matching.matching(0.14), steps(600), 2e-4),
        Stage(matching.matching(0.1), steps(4000), Cosine(2e-4)),
    )
    return found


def file_of(name: str) -> str:
    return "proximal_laplace.npz" if name == "0.1" else f"proximal_laplace_{name}.npz"


def train_laplace(folder: Path, seed: int, share: float, batch: int = BATCH, progress: bool = False) -> None:
    """The networks of `laplace_schedules`, written to a folder."""
    make, run = jax.random.split(jax.random.key(seed))
    network = evened(mlp(make, 1, hidden=50, layers=4, beta=10.0, alpha=0.01))
    command = " ".join(["python benchmarks/proximal_priors.py", *sys.argv[1:]])
    for number, (name, schedule) in enumerate(laplace_schedules(share).items()):
        network, info = training.train(
            jax.random.fold_in(run, number),
            network,
            laplace_pairs,
            schedule,
            sigma=1.0,
            batch=batch,
            ema=EMA,
            prior=Laplace(1.0),
            progress=progress,
        )
        if name == "0.1":
            network, info = polished(jax.random.fold_in(run, 100), network, share, batch, progress)
        if info.stopped != "steps" or info.distance is None:
            raise FloatingPointError(f"{name}: not written, training was {info.stopped}")
        weights.save(
            folder / file_of(name),
            network,
            command=command,
            seed=seed,
            sigma=1.0,
            schedule=[matching.described(stage) for stage in schedule],
            batch=batch,
            ema=EMA,
            final_loss=float(info.losses[-100:].mean()),
            distance=info.distance._asdict(),
            zeros=info.zeros,
            polished={"steps": len(info.losses), "batch": 8 * batch, "rate": [1e-4, 0.0]} if name == "0.1" else None,
            data=f"Laplace(1), y uniform on ±{HALF:g} and x given y",
            range=[-4.0, 4.0],
        )


def polished(
    key: Array, network: LearnedProximal, share: float, batch: int, progress: bool
) -> tuple[LearnedProximal, training.TrainingInfo]:
    """The last network in batches eight times as large: few samples lie within 0.1 of the target, and their noise is what is
    left of the error."""
    schedule = (Stage(matching.matching(0.1), max(2, round(1500 * share)), Cosine(1e-4)),)
    return training.train(
        key,
        network,
        laplace_pairs,
        schedule,
        sigma=1.0,
        batch=8 * batch,
        ema=EMA,
        prior=Laplace(1.0),
        progress=progress,
    )


def train_plane(
    prior: Any, seed: int, share: float, progress: bool = False, checkpoint: Path | None = None
) -> tuple[LearnedProximal, float]:
    """A network for a distribution in the plane, and the part of its weights that are zero."""
    make, run = jax.random.split(jax.random.key(seed))
    network = evened(mlp(make, 2, hidden=64, layers=3, beta=10.0, alpha=0.01))
    schedule = (
        Stage(matching.squared, max(2, round(1000 * share)), Cosine(5e-3, 1e-3)),
        Stage(matching.matching(2 * prior.gamma), max(2, round(500 * share)), 1e-3),
        Stage(matching.matching(prior.gamma), max(2, round(2500 * share)), Cosine(1e-3)),
    )
    network, info = training.train(
        run,
        network,
        prior,
        schedule,
        sigma=prior.sigma,
        batch=prior.batch,
        ema=EMA,
        progress=progress,
        checkpoint=checkpoint,
    )
    return network, float(info.zeros or 0.0)


# ---- what came out ------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """sup and rms of f - f_γ, relative rms; rms error of R and its part of the range of R; and, on the line, sup |R - |x||."""

    sup: float
    rms: float
    relative: float
    prior: float
    prior_share: float
    from_modulus: float | None = None


def line_errors(network: LearnedProximal, loss: matching.Loss) -> tuple[Errors, dict[str, np.ndarray]]:
    """On y in [-4, 4] and x in [-3.5, 3.5], R zero at zero, against the exact minimiser of the loss and its R."""
    exact = Laplace(1.0)
    y = jnp.linspace(-4, 4, 801)
    f, target = jax.vmap(network)(y[:, None])[:, 0], matching.minimiser(exact, loss, 1.0)(y)
    x = np.linspace(-3.5, 3.5, 141)
    r = _prior_on_line(network, x)
    # R of any f = prox_R on the line: R' = f⁻¹ - x, by the trapezoidal rule on a fine grid.
    fine = jnp.linspace(-6, 6, 2401)
    g = np.asarray(matching.minimiser(exact, loss, 1.0)(fine))
    steps = np.diff(g) * ((np.asarray(fine) - g)[1:] + (np.asarray(fine) - g)[:-1]) / 2
    true = np.interp(x, g, np.concatenate([[0.0], np.cumsum(steps)]))
    true = true - true[len(true) // 2]
    away = np.asarray(f - target)
    rms = float(np.sqrt(np.mean(away**2)))
    error = float(np.sqrt(np.mean((r - true) ** 2)))
    found = Errors(
        float(np.abs(away).max()),
        rms,
        rms / float(jnp.sqrt(jnp.mean(target**2))),
        error,
        error / float(np.ptp(true)),
        float(np.abs(r - np.abs(x)).max()),
    )
    return found, {"y": np.asarray(y), "f": np.asarray(f), "target": np.asarray(target), "x": x, "R": r}


def _prior_on_line(network: LearnedProximal, x: np.ndarray) -> np.ndarray:
    """R at x, zero at zero, without an inversion: R(f(y)) = y f(y) - f(y)²/2 - ψ(y)."""
    y = jnp.linspace(-7, 7, 7001)[:, None]
    f, psi = jax.jit(jax.vmap(network))(y)[:, 0], jax.jit(jax.vmap(network.potential))(y)
    values = np.interp(np.append(x, 0.0), np.asarray(f), np.asarray(y[:, 0] * f - f**2 / 2 - psi))
    return values[:-1] - values[-1]


def plane_errors(network: LearnedProximal, prior: Any, key: Array, count: int = 2000) -> Errors:
    """Over fresh y; R at f_γ(y), without those whose f_γ the network does not reach, up to its mean difference."""
    first, second = jax.random.split(key)
    y = prior.sample(first, count) + prior.sigma * jax.random.normal(second, (count, 2))
    target = prior.matched(y)
    f = jax.vmap(network)(y)
    norms = jnp.linalg.norm(f - target, axis=1)
    learned = regularizer(network)
    found = jax.jit(jax.vmap(learned.evaluate))(target)
    r, true = np.asarray(found.value), np.asarray(prior.value(y))
    kept = np.asarray(found.converged)
    difference = (r - true)[kept]
    error = float(np.std(difference))
    rms = float(jnp.sqrt(jnp.mean(norms**2)))
    return Errors(
        float(norms.max()),
        rms,
        rms / float(jnp.sqrt(jnp.mean(jnp.sum(target**2, 1)))),
        error,
        error / float(np.ptp(true[kept])),
    )


def loss_of(name: str) -> matching.Loss:
    known: dict[str, matching.Loss] = {"squared": matching.squared, "absolute": matching.absolute}
    return known.get(name) or matching.matching(float(name))


def figure(curves: dict[str, dict[str, np.ndarray]]) -> Any:
    """f and R of the networks of the Laplace distribution, beside soft thresholding and |x|."""
    import matplotlib.figure

    fig = matplotlib.figure.Figure((9, 3.6), layout="constrained")
    maps, priors = fig.subplots(1, 2)
    labels = {"squared": "squared loss", "absolute": "absolute loss"}
    y, x = np.linspace(-4, 4, 801), np.linspace(-3.5, 3.5, 141)
    maps.plot(y, np.sign(y) * np.maximum(np.abs(y) - 1, 0), "k--", linewidth=1, label="soft threshold")
    priors.plot(x, np.abs(x), "k--", linewidth=1, label="|x|")
    for name, curve in curves.items():
        label = labels.get(name, f"matching, γ = {name}")
        maps.plot(curve["y"], curve["f"], linewidth=1.2, label=label)
        priors.plot(curve["x"], curve["R"], linewidth=1.2, label=label)
    maps.set(xlabel="y", ylabel="f(y)", title="The learned proximal map")
    priors.set(xlabel="x", ylabel="R(x)", title="Its prior, zero at zero")
    priors.legend(fontsize=7)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="train the networks on the line and write them")
    parser.add_argument("--networks", type=Path, metavar="FOLDER", help="of the line; without, those of the package")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    given = parser.parse_args()
    console = Console()
    if given.train is not None:
        train_laplace(given.train, given.seed, given.share, given.batch, True)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    learned, checkpoints = {}, []
    for number, (name, prior) in enumerate(planes().items()):
        console.print(f"training: {name}")
        checkpoints.append(given.out / f"proximal_{name.replace(' ', '_')}.checkpoint.npz")
        trained = train_plane(prior, given.seed + number, given.share, progress=True, checkpoint=checkpoints[-1])
        learned[name] = (prior, *trained)
    jax.config.update("jax_enable_x64", True)
    table = Table(
        "distribution", "loss", *(f.replace("_", " ") for f in Errors._fields), title="Distances to exact minimisers"
    )
    rows: dict[str, Any] = {}
    curves = {}
    for name in ("squared", "absolute", *(f"{g:g}" for g in GAMMAS)):
        short = "laplace" if name == "0.1" else f"laplace_{name}"
        network = weights.load(short if given.networks is None else given.networks / file_of(name))
        errors, curves[name] = line_errors(network, loss_of(name))
        rows[f"Laplace, {name}"] = errors._asdict()
        table.add_row("Laplace", name, *(f"{v:.3g}" for v in errors if v is not None))
    for name, (prior, network, zeros) in learned.items():
        wide: Callable[[Any], Any] = lambda v: v.astype(jnp.float64) if eqx.is_inexact_array(v) else v  # noqa: E731
        errors = plane_errors(jax.tree.map(wide, network), jax.tree.map(wide, prior), jax.random.key(given.seed + 100))
        rows[name] = errors._asdict() | {"sigma": prior.sigma, "gamma": prior.gamma, "zeros": zeros}
        table.add_row(name, f"{prior.gamma:g}", *(f"{v:.3g}" for v in errors if v is not None))
    console.print(table)
    result = about("jax", "equinox", "optax") | {"share": given.share, "seed": given.seed, "errors": rows}
    write_result(given.out / "proximal_priors.json", result, figure(curves))
    for file in checkpoints:
        file.unlink()


if __name__ == "__main__":
    main()
