"""Inputs of the claims: feature matrices of five families, batches, sampling schemes, and the 40-digit oracle."""

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
        *("T1", "T2", "T3", "T3b", "T4", "T5", "T6", "T7", "T8", "T9", "T10", "T11", "T12", "T12b"),
        *("T13", "T14", "T15", "T16", "E1", "E2", "E3"),
    ),
    note="The numbers are the project's own: the paper's theorem numbers, the constants of its generalisation bounds and "
    "its learning-rate grid were not available and are not claimed.  T3b and T12b are parts of T3 and T12.",
)

FAMILIES = ("gauss", "sphere", "decay", "heavy", "relu")
SMALL, FEW, MANY = (2, 2), (4, 6), (20, 5)  # the smallest with noise; n < d; n > d
SIZES = {"quick": (SMALL, FEW, MANY), "standard": (SMALL, (2, 1), (3, 2), FEW, (6, 5), MANY, (30, 8))}
WITH_REPLACEMENT, WITHOUT_REPLACEMENT, BERNOULLI = 0, 1, 2
ALL_SCHEMES = (WITH_REPLACEMENT, WITHOUT_REPLACEMENT, BERNOULLI)
DIGITS = 40
SOLVER = (1e-7, "the eigenvalue iteration stops at a relative residual of 1.5e-8")
"""Rounding allowance of eta* where no exact value is at hand."""


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
    return Problem(draw_features(key, family, n, d), jnp.asarray(min(batch, n)), jnp.asarray(scheme))


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
    """The two numbers through which a scheme acts on second moments, for traced batch and scheme."""
    n, batch = problem.features.shape[0], problem.batch
    without = (n - batch) / (batch * max(n - 1, 1))
    noise = jnp.stack([1 / batch, without * 1.0, 1 / batch - 1 / n])[problem.scheme]
    mean = jnp.where(problem.scheme == BERNOULLI, 1.0, 1 - noise)
    return ss.Sampling(mean, noise)


def threshold(problem: Problem) -> jax.Array:
    return ss.stability_threshold(problem.features, sampling_of(problem)).eta


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


# -- the oracle: eta* in 40 digits ------------------------------------------------------------------------------------


def exact_threshold(a: np.ndarray, mean: float, noise: float) -> Any:
    """eta* in 40 digits: power iteration for C^{-1} D in mpmath, started from a dense solution in 64 bits.

    The value is the quotient 2 Tr(S H S) / (mean Tr(H S H S) + noise/n sum (a_i' S a_i)^2), whose error is the square of that
    of S; mean and noise are taken as exact.
    """
    import mpmath as mp

    n, d = a.shape
    with mp.workdps(DIGITS):
        exact = np.vectorize(mp.mpf, otypes=[object])(a)
        gram = (exact.T @ exact if d <= n else exact @ exact.T) / n
        values, vectors = mp.eigsy(mp.matrix(gram.tolist()))
        lam = np.array([values[i] for i in range(len(values))], object)
        keep = [i for i, v in enumerate(lam) if v > lam[-1] * mp.mpf(10) ** (-DIGITS // 2)]
        basis = np.array([[vectors[i, j] for j in keep] for i in range(len(lam))], object)
        lam = lam[keep]
        b = exact @ basis if d <= n else basis * np.array([mp.sqrt(n * v) for v in lam], object)
        c = (lam[:, None] + lam[None]) / 2
        hh = lam[:, None] * lam[None]

        def d_of(s: np.ndarray) -> np.ndarray:
            forms = ((b @ s) * b).sum(1)
            return mean * hh * s + noise * (b.T * forms) @ b / n

        s = _dense_minimiser(b.astype(float), lam.astype(float), mean, noise)
        s = np.vectorize(mp.mpf, otypes=[object])(s)
        for _ in range(12):
            s = d_of(s) / c
            s = s / np.abs(s).max()
        return 2 * (s * s * c).sum() / (s * d_of(s)).sum()


def _dense_minimiser(b: np.ndarray, lam: np.ndarray, mean: float, noise: float) -> np.ndarray:
    """The worst second moment S in eigen-coordinates, by a dense symmetric eigenproblem of size r^2 in 64 bits."""
    n, r = b.shape
    c = ((lam[:, None] + lam[None]) / 2).ravel()
    outer = (b[:, :, None] * b[:, None, :]).reshape(n, r * r)
    dense = np.diag(mean * np.outer(lam, lam).ravel()) + noise / n * outer.T @ outer
    _, vectors = np.linalg.eigh(dense / np.sqrt(np.outer(c, c)))
    return (vectors[:, -1] / np.sqrt(c)).reshape(r, r)


def oracle(problem: Problem) -> tuple[np.ndarray, float]:
    """Features and eta* of a problem, by the oracle."""
    a = np.asarray(problem.features, float)
    s = sampling_of(problem)
    return a, float(exact_threshold(a, float(s.mean), float(s.noise)))


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
