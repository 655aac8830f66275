"""T2 to T2c: what other losses aim at, the exact targets of simple priors, and the one prior that tells nothing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import sympy as sp

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.proximal.common import PAPER, PRIORS, searched, sums
from paper_checks.proximal.matching import POINTS, at
from solvers.proximal.atoms import Atoms
from solvers.proximal.distributions import Laplace, Mixture, StudentT

# -- T2: squared and absolute errors ----------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T2",
    r"$\ell_2\to$ the posterior mean, $f=y+\sigma^2(\log p_Y)'$, with $R(f(y))=-\tfrac12\|y-f\|^2-\sigma^2\log p_Y(y)+c$; "
    r"$\ell_1\to$ the posterior median of each coordinate; neither is $\operatorname{prox}_{-\sigma^2\log p}$ unless the prior "
    "is Gaussian.",
    title="What squared and absolute errors aim at",
    kind="exact",
    controls={
        "swapped": "mean and median swapped",
        "mode": "both said to be the mode",
        "half": r"$\sigma^2/2$ for $\sigma^2$ in R",
    },
    regime="five priors, three y, σ = 1; against sums; R of the mean by integration over its inverse, for Laplace",
    source="Standard (recalled).",
)
def other_losses(ctx: Context) -> Outcome:
    mean, median = ctx.pick(("mean", "median"), swapped=("median", "mean"), mode=("mode", "mode"))
    factor = ctx.pick(1.0, half=0.5)
    slack: dict[str, float] = {}
    for name, prior in PRIORS.items():
        for y in POINTS:
            slack[f"{name}, mean, y = {y}"] = 1 - abs(at(getattr(prior, mean), y, 1.0) - sums(name).mean(y, 1.0)) / 1e-8
            # Interpolation between nodes that are up to .03 apart.
            apart = abs(at(getattr(prior, median), y, 1.0) - sums(name).median(y, 1.0))
            slack[f"{name}, median, y = {y}"] = 1 - apart / 2e-3
        for f in (prior.mean, prior.median) if name != "Gaussian" else ():
            apart = max(abs(at(f, y, 1.0) - at(prior.mode, y, 1.0)) for y in POINTS)
            slack[f"{name}, {f.__name__} is not the mode"] = apart - 0.01
    prior = Laplace(1.0)
    grid = np.linspace(0, 6, 30_001)
    values = np.asarray(prior.mean(jnp.asarray(grid), 1.0))
    rest = grid - values
    rise = np.concatenate([[0.0], np.cumsum((rest[1:] + rest[:-1]) / 2 * np.diff(values))])
    claimed = -(rest**2) / 2 - factor * np.asarray(prior.log_smoothed(jnp.asarray(grid), 1.0))
    apart = float(np.abs(claimed - claimed[0] - rise).max())
    slack["R of the mean"] = 1 - apart / 1e-6
    shown = ", ".join(f"{at(f, 1.0, 1.0):.3f}" for f in (prior.mean, prior.median, prior.mode))
    return ctx.cases(
        slack, note=f"f(1) of mean, median and mode for Laplace: {shown}; R of the mean is met to {apart:.0e}"
    )


# -- T2b: exact targets -------------------------------------------------------------------------------------------------------


def student_curvature(shift: float) -> sp.Expr:
    """What is left of the largest value of (log p)'' for Student's t minus (ν+shift)/(8ν)."""
    x, nu = sp.symbols("x nu", positive=True)
    log_p = -(nu + 1) / 2 * sp.log(1 + x**2 / nu)
    largest = sp.simplify(sp.diff(log_p, x, 2).subs(x, sp.sqrt(3 * nu)))
    assert sp.simplify(sp.diff(log_p, x, 3).subs(x, sp.sqrt(3 * nu))) == 0
    return sp.simplify(largest - (nu + shift) / (8 * nu))


@claim(
    PAPER,
    "T2b",
    r"Proximal maps: Laplace, the soft threshold at $\sigma^2/b$; uniform, the projection; Student-t, the best root of "
    r"$c^3-yc^2+(\nu+\sigma^2(\nu+1))c-\nu y$, with $-\sigma^2\log p$ $\sigma^2\tfrac{\nu+1}{8\nu}$-weakly convex; the mixture "
    r"$\pm2$, $s=.6$, jumps from $-1.471$ to $1.471$ at 0, where the mean has slope 2.427; atoms: the weighted nearest one.",
    title="Exact targets",
    kind="exact",
    controls={
        "threshold": r"soft threshold at $\sigma/b$",
        "constant": r"$\sigma^2\tfrac{\nu}{8\nu}$-weakly convex",
        "unweighted": "the nearest atom whatever its weight",
    },
    regime="σ = .7, y in [-6, 6], against the least energy on a grid of 240 001 points; ν = 1, 3, 8; ten atoms in the plane",
    source="Derived.",
)
def exact_targets(ctx: Context) -> Outcome:
    power, shift, weighted = ctx.pick(2, threshold=1), ctx.pick(1, constant=0), ctx.pick(True, unweighted=False)
    sigma, b = 0.7, 1.3
    grid, y = np.linspace(-6, 6, 240_001), np.linspace(-6, 6, 25) + 1e-3
    slack: dict[str, float] = {}

    def least(log_p: np.ndarray, at: np.ndarray = grid) -> np.ndarray:
        return np.array([at[np.argmin(-(sigma**2) * log_p + (at - v) ** 2 / 2)] for v in y])

    threshold = sigma**power / b
    soft = np.sign(y) * np.maximum(np.abs(y) - threshold, 0)
    slack["soft threshold"] = 1e-4 - float(np.abs(soft - least(-np.abs(grid) / b)).max())
    slack["Laplace"] = 1e-4 - float(np.abs(Laplace(b).mode(jnp.asarray(y), sigma) - soft).max())
    inside = grid[(grid >= -1) & (grid <= 2)]
    clip = np.asarray(PRIORS["uniform"].mode(jnp.asarray(y), sigma))
    slack["uniform"] = 1e-4 - float(np.abs(clip - least(np.zeros_like(inside), inside)).max())
    for nu in (1.0, 3.0, 8.0):
        found = np.asarray(StudentT(nu).mode(jnp.asarray(y), sigma))
        best = least(-(nu + 1) / 2 * np.log1p(grid**2 / nu))
        slack[f"Student, ν = {nu:g}"] = 1e-4 - float(np.abs(found - best).max())
        cubic = found**3 - y * found**2 + (nu + sigma**2 * (nu + 1)) * found - nu * y
        slack[f"cubic, ν = {nu:g}"] = 1e-9 - float(np.abs(cubic).max())
    slack["weak convexity of Student"] = 0.0 if student_curvature(shift) == 0 else -1.0
    mixture = Mixture([-2.0, 2.0], [0.6, 0.6], [0.5, 0.5])
    left, right = (at(mixture.mode, v, 1.0) for v in (-1e-9, 1e-9))
    slope = float(jax.grad(lambda y: mixture.mean(y[None], 1.0)[0])(jnp.array(0.0)))
    slack["jump"] = 5e-4 - max(abs(left + 1.471), abs(right - 1.471))
    slack["slope of the mean"] = 5e-4 - abs(slope - 2.427)
    k_points, k_weights, k_y = jax.random.split(ctx.key, 3)
    points = np.asarray(jax.random.normal(k_points, (10, 2), jnp.float64))
    weights = np.asarray(jax.nn.softmax(2 * jax.random.normal(k_weights, (10,), jnp.float64)))
    signals = jax.random.normal(k_y, (ctx.n(40), 2), jnp.float64)
    matched = np.asarray(Atoms(points, weights).matched(signals, sigma, 0.02))
    log_w = np.log(weights) if weighted else 0.0
    energy = ((np.asarray(signals)[:, None] - points) ** 2).sum(-1) / (2 * sigma**2) - log_w
    slack["atoms"] = 1e-2 - float(np.abs(matched - points[energy.argmin(1)]).max())
    note = f"jump from {left:.3f} to {right:.3f}, slope of the mean {slope:.3f}; atoms with γ = .02"
    return ctx.cases(slack, note=note, validity="searched")


# -- T2c: the degenerate test --------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T2c",
    r"For a Gaussian prior $N(\mu,s^2)$ mean, median, mode and $f_\gamma$ are $(s^2y+\sigma^2\mu)/(s^2+\sigma^2)$ for every "
    r"$\gamma$: a test with it says nothing of proximal matching.",
    title="The Gaussian prior tells nothing",
    kind="exact",
    controls={"Laplace": "a Laplace prior, which a test can use", "noise": r"$(\sigma^2y+s^2\mu)/(s^2+\sigma^2)$"},
    regime="three y, σ = 1 and .6, γ = .1, 1 and 10; by search over sums and by the library",
    source="Standard.",
)
def gaussian(ctx: Context) -> Outcome:
    name, noise = ctx.pick("Gaussian", Laplace="Laplace"), ctx.pick(False, noise=True)
    prior, table = PRIORS[name], sums(name)
    # The parameters of the table, or of a normal distribution with the variance of the Laplace one.
    location, scale = (0.4, 0.7) if name == "Gaussian" else (0.0, math.sqrt(2.0))
    slack: dict[str, float] = {}
    for sigma in (1.0, 0.6):
        a, b = (sigma**2, scale**2) if noise else (scale**2, sigma**2)
        for y in POINTS:
            wanted = (a * y + b * location) / (a + b)
            found = [
                table.mean(y, sigma),
                at(prior.mean, y, sigma),
                at(prior.median, y, sigma),
                at(prior.mode, y, sigma),
            ]
            for gamma in (0.1, 1.0, 10.0):
                found += [searched(name, y, sigma, gamma), at(prior.matched, y, sigma, gamma)]
            slack[f"σ = {sigma}, y = {y}"] = -max(abs(v - wanted) for v in found)
    return ctx.cases(slack, tolerance=1e-8, tolerance_reason="what the search over sums leaves")
