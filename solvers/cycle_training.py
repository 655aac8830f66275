"""How the numbers of `solvers.multigrid.Cycle` are learned: by the error that conjugate gradients leave after a few steps.

    python -m solvers.cycle_training --dimensions 3 --seed 0 --out poisson3d.json

The loss is log ‖e_K‖_A / ‖e_0‖_A, differentiated through K steps of preconditioned conjugate gradients: what is measured is
what is trained.  Errors e_0 are white noise, or noise smoothed a random number of times; domains are random ones from
`solvers.gallery` at one small size.  Training starts from the best hand-set cycle on the same domains (`best_chebyshev`),
which is the control that any gain is to be measured against.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from solvers import gallery
from solvers.multigrid import FEATURES, Cycle, Hierarchy, chebyshev, hierarchy, preconditioner
from solvers.poisson import Domain, laplacian
from solvers.stencil import Stencil, apply, shifted

STEPS = 3  # of conjugate gradients in the loss; after more, what is left of an error is rounding in float32
LEVELS = 2  # the finest, and all coarser ones: with more, numbers learned on a small grid serve a large one no better


def contraction(cycle: Cycle, h: Hierarchy, error: Float[Array, "*grid"], steps: int = STEPS) -> Float[Array, ""]:
    """log ‖e_K‖_A / ‖e_0‖_A after K steps of conjugate gradients for A x = A e_0 from zero, preconditioned by the cycle."""
    a, m = h.levels[0], preconditioner(h, cycle)
    b = apply(a, error)

    def step(state: Any, _: None) -> Any:
        x, r, p, before = state
        z = m(r)
        now = jnp.vdot(r, z)
        p = z + jnp.where(before > 0, now / jnp.where(before > 0, before, 1), 0) * p
        q = apply(a, p)
        alpha = now / jnp.vdot(p, q)
        return (x + alpha * p, r - alpha * q, p, now), None

    zero = jnp.zeros_like(b)
    (x, *_), _ = lax.scan(step, (zero, b, zero, jnp.zeros((), b.dtype)), None, steps)
    left = error - x
    return 0.5 * jnp.log(jnp.vdot(left, apply(a, left)) / jnp.vdot(error, b))


def random_error(key: Key[Array, ""], a: Stencil, dtype: Any = jnp.float32) -> Float[Array, "*grid"]:
    """White noise on the unknowns, averaged with its neighbours 0 to 20 times (half of the draws not at all)."""
    noise, which, often = jax.random.split(key, 3)
    rounds = jnp.where(jax.random.bernoulli(which), jax.random.randint(often, (), 1, 21), 0)
    ndim = len(a.shape)

    def smooth(_: Any, x: Array) -> Array:
        near = sum(shifted(x, axis, by) for axis in range(ndim) for by in (-1, 1))
        return (x + near) / (2 * ndim + 1)

    x = jnp.where(a.unknown, jax.random.normal(noise, a.shape, dtype), 0)
    return jnp.where(a.unknown, lax.fori_loop(0, rounds, smooth, x), 0)


def training_domains(n: int, ndim: int, seed: int) -> list[Domain]:
    """Eight random ones: blobs, dams, and smoke around balls.  Those of the benchmarks have other seeds."""
    seeds = [1000 + 100 * seed + k for k in range(8)]
    made = [gallery.random_blobs, gallery.dam_break, gallery.random_blobs, gallery.smoke_sphere] * 2
    return [make(n, ndim, s) for make, s in zip(made, seeds, strict=True)]


@eqx.filter_jit
def _score(cycle: Cycle, h: Hierarchy, keys: Key[Array, " n"]) -> Array:
    return lax.map(lambda k: contraction(cycle, h, random_error(k, h.levels[0])), keys).mean()


def score(cycle: Cycle, hierarchies: list[Hierarchy], key: Key[Array, ""], draws: int = 4) -> float:
    """The mean of `contraction` over domains and random errors."""
    keys = jax.random.split(key, (len(hierarchies), draws))
    return float(np.mean([float(_score(cycle, h, k)) for h, k in zip(hierarchies, keys, strict=True)]))


def best_chebyshev(hierarchies: list[Hierarchy], key: Key[Array, ""], steps: int = 3, visits: int = 2) -> Cycle:
    """The best of a grid of hand-set cycles with as many smoothing steps and coarse corrections."""
    grid = [
        chebyshev(steps, visits, low, high, scale)
        for low in (0.12, 0.18, 0.25, 0.35)
        for high in (1.6, 1.8, 2.0)
        for scale in (0.9, 1.0, 1.1, 1.25, 1.4)
    ]
    return min(grid, key=lambda c: score(c, hierarchies, key))


def train(
    start: Cycle, hierarchies: list[Hierarchy], key: Key[Array, ""], steps: int = 2000, rate: float = 2e-2
) -> tuple[Cycle, np.ndarray]:
    """Adam with a cosine schedule, one domain and one error a step; returns the cycle and the losses.

    All hierarchies have grids of one shape, so that there is one compilation.  Raises FloatingPointError at a loss that is not
    finite.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))

    @eqx.filter_jit
    def chunk(cycle: Cycle, state: Any, h: Hierarchy, keys: Any) -> Any:
        def one(carry: Any, k: Any) -> Any:
            cycle, state = carry
            value, g = jax.value_and_grad(contraction)(cycle, h, random_error(k, h.levels[0]))
            updates, state = optimizer.update(g, state)
            return (optax.apply_updates(cycle, updates), state), value

        return lax.scan(one, (cycle, state), keys)

    state, losses = optimizer.init(start), []
    for number, k in enumerate(jax.random.split(key, -(-steps // 5))):
        (start, state), values = chunk(start, state, hierarchies[number % len(hierarchies)], jax.random.split(k, 5))
        losses.append(np.asarray(values))
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(f"train: the loss is {losses[-1]} at step {5 * number}")
    return start, np.concatenate(losses)


def spread(cycle: Cycle, levels: int = LEVELS) -> Cycle:
    """The same cycle with a row of numbers for each level."""
    rows = lambda x: jnp.broadcast_to(x[:1], (levels, x.shape[1]))  # noqa: E731
    nothing = jnp.zeros((levels, FEATURES))
    return Cycle(rows(cycle.smoother), rows(cycle.coarse), nothing, nothing)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the numbers of the multigrid cycle.")
    parser.add_argument("--dimensions", type=int, default=3, choices=[2, 3])
    parser.add_argument("--cells", type=int, default=32, help="per axis")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    made, control, fit = jax.random.split(jax.random.key(given.seed), 3)
    domains = training_domains(given.cells, given.dimensions, given.seed)
    hierarchies = [hierarchy(laplacian(d)) for d in domains]
    hand = best_chebyshev(hierarchies, control)
    cycle, _ = train(spread(hand), hierarchies, fit, given.steps)
    result = {
        "command": f"python -m solvers.cycle_training --dimensions {given.dimensions} --cells {given.cells} "
        f"--steps {given.steps} --seed {given.seed}",
        "versions": {"jax": jax.__version__},
        "contraction": {"hand": score(hand, hierarchies, made), "learned": score(cycle, hierarchies, made)},
        "hand": {k: np.asarray(getattr(hand, k), float).round(6).tolist() for k in ("smoother", "coarse")},
        "cycle": {k: np.asarray(v, float).round(6).tolist() for k, v in vars(cycle).items()},
    }
    temporary = given.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, given.out)
    print(json.dumps(result["contraction"]), "written:", given.out)


if __name__ == "__main__":
    main()
