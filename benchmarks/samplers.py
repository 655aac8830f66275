"""Our samplers beside diffrax's solvers on the same trained network: images a second, and how far from the exact flow.

    python benchmarks/samplers.py [--batch 16] [--blocks 5] [--out FOLDER]

The network is the shipped model of digits.  Both integrate the probability flow of log x from the same starts: ours on
`sinh_times`, diffrax in t, with fixed steps or adaptive ones, to the smallest level of EDM's grid and a last evaluation
that denoises.  The error is the root mean square over pixels, in [0, 1], of the difference from diffrax's Dopri8 at a tolerance
of 1e-5; our stochastic samplers have none.  Runs take turns in one process; stated are the median over blocks, and the ratio
to ours with its range.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from measure import about, time_in_turns, write_result
from rich.console import Console
from rich.table import Table

from generative import data, gbm_diffusion, guidance, samplers, weights
from generative.lognormal import fitted_prior

SMALLEST = 0.002
OURS = "ours, multistep3, 10"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Samplers beside diffrax on the same network.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


class Flow(eqx.Module):
    """The probability flow of a log-score, as diffrax's solvers want it."""

    score: Any
    process: Any

    def rate(self, t: Any, y: Any, args: Any) -> Any:
        return gbm_diffusion.probability_flow(self.process, self.score, y, t)

    def denoised(self, y: Any, t: Any) -> Any:
        return gbm_diffusion.posterior_log_mean(self.process, self.score, y, t)


@eqx.filter_jit
def by_flow(model: Flow, y: Any, end: Any, solver: Any, steps: int | None, tolerance: float) -> tuple[Any, Any]:
    """log x_0 and evaluations of the network."""
    fixed = steps is not None
    controller = diffrax.ConstantStepSize() if fixed else diffrax.PIDController(rtol=tolerance, atol=tolerance)
    first = (end - 1) / steps if fixed else None
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(model.rate), solver, 1.0, end, first, y, stepsize_controller=controller, max_steps=4096
    )
    stages = {"Euler": 1, "Heun": 2, "Tsit5": 6, "Dopri5": 6, "Dopri8": 13}[type(solver).__name__]
    return model.denoised(solution.ys[-1], end), stages * solution.stats["num_steps"] + 1


def main() -> None:
    given, console = arguments(), Console()
    trained = weights.load_model("gbm_mnist")
    process = trained.log_score.process
    images = jnp.asarray(data.load("mnist_small")["x"], jnp.float32) / 255
    prior = fitted_prior(process, trained.positive.to_positive(images))
    start = prior.sample(jax.random.key(0), given.batch)
    score = guidance.of_class(trained.log_score, jnp.arange(given.batch) % 10)
    model = Flow(score, process)
    y, end = jnp.log(start), process.time(jnp.asarray(SMALLEST, jnp.float32))

    def ours(method: str, evaluations: int) -> Callable[[int], Any]:
        steps = evaluations if method != "heun" else (evaluations + 1) // 2
        times = gbm_diffusion.sinh_times(process, steps)

        def run(call: int) -> Any:
            x, info = samplers.sample(jax.random.key(call), score, process, start, times, method=method, throw=False)
            return jnp.log(x), info.evaluations

        return run

    runs: dict[str, Callable[[int], Any]] = {
        OURS: ours("multistep3", 10),
        "ours, multistep3, 20": ours("multistep3", 20),
        "ours, dpm2m, 10": ours("dpm2m", 10),
        "ours, heun, 19": ours("heun", 19),
        "ours, ancestral, 20": ours("ancestral", 20),
        "ours, dls, 200": ours("dls", 200),
        "diffrax, Euler, 20": lambda call: by_flow(model, y, end, diffrax.Euler(), 20, 0.0),
        "diffrax, Heun, 10 steps": lambda call: by_flow(model, y, end, diffrax.Heun(), 10, 0.0),
        "diffrax, Tsit5, 1e-2": lambda call: by_flow(model, y, end, diffrax.Tsit5(), None, 1e-2),
        "diffrax, Tsit5, 1e-3": lambda call: by_flow(model, y, end, diffrax.Tsit5(), None, 1e-3),
        "diffrax, Dopri5, 1e-2": lambda call: by_flow(model, y, end, diffrax.Dopri5(), None, 1e-2),
    }
    exact, needed = by_flow(model, y, end, diffrax.Dopri8(), None, 1e-5)
    console.print(f"reference: {int(needed)} evaluations")
    rows: dict[str, Any] = {}
    noisy = ("ancestral", "dls")
    for name, run in runs.items():
        found, evaluations = run(0)
        error = np.sqrt(np.mean((pixels(trained, found) - pixels(trained, exact)) ** 2))
        rows[name] = {
            "evaluations": int(evaluations),
            "error": None if any(n in name for n in noisy) else float(error),
        }
        console.print(name, rows[name])
    took = time_in_turns(runs, given.blocks, seconds=0.2)
    for name, seconds in took.items():
        ratio = seconds / took[OURS]
        rows[name] |= {
            "images a second": float(given.batch / np.median(seconds)),
            "seconds over ours": [float(np.median(ratio)), float(ratio.min()), float(ratio.max())],
        }
    result = about("jax", "diffrax", "equinox") | {
        "batch": given.batch,
        "evaluations of the reference": int(needed),
        "rows": rows,
    }
    table = Table("", "evaluations", "error", "images a second", "seconds over ours", title="Digits 28 x 28")
    for name, row in rows.items():
        median, low, high = row["seconds over ours"]
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        table.add_row(
            name,
            str(row["evaluations"]),
            error,
            f"{row['images a second']:.1f}",
            f"{median:.2f} [{low:.2f}, {high:.2f}]",
        )
    console.print(table)
    write_result(given.out / "samplers.json", result, figure(rows))
    console.print(f"written: {given.out / 'samplers.json'}")


def pixels(trained: Any, logs: Any) -> np.ndarray:
    return np.clip(np.asarray(trained.positive.to_data(jnp.exp(logs))), 0, 1)


def figure(rows: dict[str, Any]) -> Any:
    import matplotlib.figure

    fig = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axis = fig.subplots()
    for name, row in rows.items():
        if row["error"] is None:
            continue
        colour = "#0072B2" if name.startswith("ours") else "#D55E00"
        axis.plot(row["images a second"], row["error"], "o" if name.startswith("ours") else "s", color=colour)
        axis.annotate(name, (row["images a second"], row["error"]), (5, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="images a second", ylabel="rms difference from the exact flow, pixels")
    axis.grid(alpha=0.3)
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return fig


if __name__ == "__main__":
    main()
