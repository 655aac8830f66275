"""Inputs of the claims: feature matrices of five families, batches and sampling schemes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from paper_checks.harness.claim import Outcome, Paper
from paper_checks.harness.context import Context
from theory import sgd_stability as ss

PAPER = Paper(
    stem="sgd_stability",
    title="The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent",
    authors="Lei Wu, Weijie J. Su",
    year=2023,
    venue="ICML",
    arxiv="2305.17490",
    claims=(
        *(
            "T0",
            "T1",
            "T2",
            "T3",
            "T3b",
            "T4",
            "T5",
            "T5b",
            "T6",
            "T7",
            "T8",
            "T8b",
            "T9",
            "T10",
            "T11",
            "T11b",
            "T11c",
        ),
        *("T12", "T12b", "T13", "T14", "T15", "T16", "T17", "E1", "E2", "E3"),
    ),
    note="The numbers are the project's own: the paper's theorem numbers, the constants of its generalisation bounds and "
    "its learning-rate grid were not available and are not claimed.  T0 and T17 are ours: the exact threshold that all "
    "bounds are compared with, and their order.  A letter marks a part of the claim of that number.",
)

FAMILIES = ("gauss", "sphere", "decay", "heavy", "relu")
SMALL, FEW, MANY = (2, 2), (4, 6), (20, 5)  # the smallest with noise; n < d; n > d
SIZES = {"quick": (SMALL, FEW, MANY), "standard": (SMALL, (2, 1), (3, 2), FEW, (6, 5), MANY, (30, 8))}
WITH_REPLACEMENT, WITHOUT_REPLACEMENT, BERNOULLI = 0, 1, 2
ALL_SCHEMES = (WITH_REPLACEMENT, WITHOUT_REPLACEMENT, BERNOULLI)
BATCHES = (1, 2, 4, 8)


# -- inputs ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Features (n, d), batch size and sampling scheme; the last two are integers and stay fixed in the search."""

    features: Any
    batch: Any
    scheme: Any


def draw_features(key: jax.Array, family: str, n: int, d: int) -> jax.Array:
    """One feature matrix (n, d) of a family, at a log-uniform scale between 1/10 and 10."""
    k_x, k_w, k_scale = jax.random.split(key, 3)
    x = jax.random.normal(k_x, (n, d))
    match family:
        case "sphere":
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True) * math.sqrt(d)
        case "decay":
            x = x / jnp.arange(1, d + 1)
        case "heavy":
            x = x / jnp.sqrt(
                jnp.mean(jax.random.normal(k_w, (3, n, d)) ** 2, axis=0)
            )  # Student t, 3 degrees of freedom
        case "relu":
            x = jax.nn.relu(jax.random.normal(k_x, (n, 5)) @ jax.random.normal(k_w, (5, d))) + 1e-3 * x
    return x * 10 ** jax.random.uniform(k_scale, minval=-1.0, maxval=1.0)


def draw_problem(key: jax.Array, family: str, size: tuple[int, int], batch: int, scheme: int) -> Problem:
    n, d = size
    fitting = max(b for b in BATCHES if b <= min(batch, n))
    return Problem(draw_features(key, family, n, d), jnp.asarray(fitting), jnp.asarray(scheme))


def sizes_of(ctx: Context) -> tuple[tuple[int, int], ...]:
    """(n, d) to draw from: each costs one compilation."""
    return SIZES.get(ctx.budget, SIZES["standard"])


def problems(
    ctx: Context,
    batches: tuple[int, ...] = (1,),
    schemes: tuple[int, ...] = (WITH_REPLACEMENT,),
    sizes: tuple[tuple[int, int], ...] = (),
) -> Any:
    """Structures of problems: family, size, batch, sampling scheme."""
    return st.tuples(
        st.sampled_from(FAMILIES),
        st.sampled_from(sizes or sizes_of(ctx)),
        st.sampled_from(batches),
        st.sampled_from(schemes),
    )


def corner(rows: list[list[float]], batch: int = 1, scheme: int = WITH_REPLACEMENT) -> Problem:
    return Problem(np.array(rows, float), np.asarray(batch), np.asarray(scheme))


CORNERS = (
    corner([[1.0, 0.0], [0.0, 1.0]]),  # orthogonal, equal norms
    corner([[1.0, 1.0], [1.0, 1.0]]),  # equal rows: no noise
    corner([[1.0, 0.0], [0.0, 1e-3]]),  # condition number 1e6
    corner([[1.0, 0.0], [10.0, 0.0]]),  # one direction, very unequal norms
    corner([[3.0, 4.0], [0.0, 0.0]]),  # one active sample
)


def sampling_of(problem: Problem) -> ss.Sampling:
    """The two numbers of the scheme, looked up in a table of the library's values: batch and scheme may be traced."""
    n = problem.features.shape[0]
    table = [
        [ss.with_replacement(b), ss.without_replacement(min(b, n), n), ss.bernoulli(min(b, n), n)] for b in BATCHES
    ]
    row = jnp.searchsorted(jnp.array(BATCHES), problem.batch)
    mean, noise = (jnp.array([[s[i] for s in entry] for entry in table], float)[row, problem.scheme] for i in (0, 1))
    return ss.Sampling(mean, noise)


def converged(found: ss.Threshold) -> jax.Array:
    """eta* where the solver says that it converged; NaN, which is an error, where it does not."""
    return jnp.where(found.converged, found.eta, jnp.nan)


def threshold(problem: Problem) -> jax.Array:
    return converged(ss.stability_threshold(problem.features, sampling_of(problem)))


class Moments(NamedTuple):
    trace: jax.Array  # Tr H
    square: jax.Array  # |H|_F^2
    fourth: jax.Array  # mean |a_i|^4
    largest: jax.Array  # max |a_i|^2
    smallest: jax.Array  # min |a_i|^2


def moments(a: jax.Array) -> Moments:
    norms = jnp.sum(a * a, axis=1)
    h = a.T @ a / a.shape[0]
    return Moments(norms.mean(), jnp.sum(h * h), jnp.mean(norms**2), norms.max(), norms.min())


def top_eigenvalue(a: jax.Array) -> jax.Array:
    """lambda_max(H), from the smaller of H and K."""
    n, d = a.shape
    return jnp.linalg.eigvalsh((a.T @ a if d <= n else a @ a.T) / n)[-1]


PASTE = """import jax
import numpy as np
from theory.sgd_stability import Sampling, stability_threshold

jax.config.update("jax_enable_x64", True)
a = np.array({rows})                       # one gradient a row
sampling = Sampling(mean={mean!r}, noise={noise!r})   # batch {batch}, {scheme}
eta = float(stability_threshold(a, sampling).eta)         # SGD is stable up to here
{lines}
"""


def paste(problem: Problem, *lines: str) -> str:
    """Code that shows a violation at the given problem; `lines` compute and assert it from a and eta."""
    s = sampling_of(problem)
    scheme = ("with replacement", "without replacement", "Bernoulli")[int(problem.scheme)]
    rows = np.asarray(problem.features, float).tolist()
    return PASTE.format(
        rows=rows,
        mean=float(s.mean),
        noise=float(s.noise),
        batch=int(problem.batch),
        scheme=scheme,
        lines="\n".join(lines),
    )


def assert_at_most(name: str, expression: str, bound: float) -> list[str]:
    return [f"{name} = float({expression})", f'assert {name} <= {bound!r}, f"{{{name}:.4f}} > {bound}"']


def bound_search(ctx: Context, violation: Any, constants: tuple[Any, ...], **options: Any) -> Outcome:
    """The common search: any features, moved by gradient ascent, corners included."""
    defaults: dict[str, Any] = {"structures": problems(ctx), "corners": CORNERS, **effort(ctx)}
    return ctx.worst(violation, draw_problem, constants=constants, **{**defaults, **options})


def effort(ctx: Context) -> dict[str, Any]:
    """Search effort: the quick budget climbs from the worst structure only, the others from two."""
    return {"points": 64, "steps": 120, "climb": 1 if ctx.budget == "quick" else 2}
