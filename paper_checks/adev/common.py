"""The paper, and the one test that all its claims about unbiasedness use."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import vi
from paper_checks.harness import means
from paper_checks.harness.claim import Outcome, Paper
from paper_checks.harness.context import Context

PAPER = Paper(
    stem="adev",
    title="ADEV: Sound Automatic Differentiation of Expected Values of Probabilistic Programs",
    authors="Alexander K. Lew, Mathieu Huot, Sam Staton, Vikash K. Mansinghka",
    year=2023,
    venue="POPL",
    arxiv="2212.06386",
    claims=(
        *("A1", "A2", "A3", "A4", "A4b", "A5", "A6", "A6b", "A6c", "A7", "A8", "A9", "A10", "A11", "A12"),
        *("A13", "A14", "A15", "E1", "E2", "E3", "E4", "E5", "E6"),
    ),
    note="The numbers are the project's own: the paper's text was not available, so that its theorem numbers, its proofs and "
    "the exact form of its static analysis are not claimed.  The rules are those of the authors' public implementations "
    "in Haskell and Julia.  A letter marks a part of the claim of that number; E1 to E6 are examples of those programs.",
)

RULE = "Rule as in the authors' public implementations; the paper's numbering is unverified."

Estimator = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, parameters (k,)) -> (figures,), one draw of each."""

CHUNK = 10_000
"""Draws at a time; XLA folds constants of this many rows while it compiles."""


class Case(NamedTuple):
    """An estimator, and what its figures are on average, at some parameters.

    exact   parameters (k,) -> (figures,), by other means than the estimator
    points  (points, k)
    bound   no figure is ever larger in absolute value; None if there is no bound, or none is known
    kept    which figures are looked at; None for all
    square  whether the squares of the estimator's figures are meant: their means are the second moments
    """

    name: str
    estimator: Estimator
    exact: Callable[[jax.Array], jax.Array]
    points: jax.Array
    bound: float | None = None
    kept: tuple[int, ...] | None = None
    square: bool = False


# -- estimators and points ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def by_vi(program: Callable[..., Any], strategies: tuple[tuple[str, str], ...] = ()) -> Estimator:
    """Value and gradient of E[program(*parameters)], with these strategies for the choices of these names."""
    return value_and_grad(vi.expectation(program).with_strategies(dict(strategies)))


def value_and_grad(e: Callable[..., jax.Array]) -> Estimator:
    """(value, gradient) of a function (key, *parameters) -> scalar, as one vector."""

    def estimator(key: jax.Array, theta: jax.Array) -> jax.Array:
        value, grad = jax.value_and_grad(lambda t: e(key, *t))(theta)
        return jnp.concatenate([value[None], grad])

    return estimator


@functools.lru_cache(maxsize=256)
def figures_of(f: Callable[..., Any], order: int = 1) -> Callable[[jax.Array], jax.Array]:
    """f(*parameters), its gradient, and with order 2 its Hessian, as one vector: the exact side."""

    def exact(theta: jax.Array) -> jax.Array:
        g = lambda t: jnp.asarray(f(*t), float)  # noqa: E731
        parts = [g(theta)[None], jax.grad(g)(theta)]
        if order == 2:
            parts.append(jax.hessian(g)(theta).ravel())
        return jnp.concatenate(parts)

    return exact


def points(
    ctx: Context, salt: int, boxes: Sequence[tuple[float, float]], *first: Sequence[float], drawn: int = 3
) -> jax.Array:
    """The parameters `first`, then some drawn in the box."""
    low, high = jnp.array(boxes, float).T
    u = jax.random.uniform(jax.random.fold_in(ctx.key, salt), (drawn, len(boxes)))
    rows = low + u * (high - low)
    return jnp.concatenate([jnp.array(first, float), rows]) if first else rows


def outcomes(n: int) -> np.ndarray:
    """All 2^n results of n flips, (2^n, n)."""
    return np.array(list(itertools.product((0.0, 1.0), repeat=n)))


def chances(flips: Any, probs: Any) -> jax.Array:
    """Probabilities of the rows of `flips` (outcomes, n) for independent flips, or given the earlier ones."""
    return jnp.prod(jnp.where(flips == 1, probs, 1 - jnp.asarray(probs)), axis=1)


def flip(p: Any, name: str) -> jax.Array:
    """A flip as a real number; its strategy is given from outside, by its name."""
    return vi.sample(dist.Bernoulli(probs=p), name).astype(float)


def standard_normal(nodes: int = 80) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights of Gauss-Hermite quadrature for N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return jnp.asarray(x), jnp.asarray(w / w.sum())


# -- the test ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _compiled(estimator: Estimator) -> Callable[..., jax.Array]:
    over_draws = jax.vmap(estimator, (0, None))
    return jax.jit(jax.vmap(over_draws), compiler_options=means.QUICK_TO_COMPILE)


@functools.lru_cache(maxsize=256)
def _compiled_exact(exact: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(exact), compiler_options=means.QUICK_TO_COMPILE)


def draws(estimator: Estimator, key: jax.Array, at: jax.Array, n: int) -> np.ndarray:
    """(points, n, figures) independent draws, n a multiple of `CHUNK`."""
    keys = jax.random.split(key, (n // CHUNK, len(at), CHUNK))
    return np.concatenate([np.asarray(_compiled(estimator)(k, at)) for k in keys], axis=1)


def _kept(case: Case, figures: np.ndarray) -> np.ndarray:
    return figures if case.kept is None else figures[..., list(case.kept)]


def unbiased(ctx: Context, cases: Sequence[Case], *, n: int = 50_000) -> Outcome:
    """Every figure of every case has its exact value as its mean.

    One unit is max(1, |exact|).  Each figure at each point is a test, and what they find is joined: if all cases have a
    bound, the average of their e-values (betting; exact at every n); otherwise the smallest p-value times their
    number (a z-test of n draws; asymptotic).
    """
    exact = [_kept(c, np.asarray(_compiled_exact(c.exact)(c.points))) for c in cases]
    alpha = ctx.alpha / sum(e.size for e in exact)
    bounded = all(c.bound is not None for c in cases)
    figures: list[means.Figure] = []
    for i, (case, wanted) in enumerate(zip(cases, exact, strict=True)):
        found = _kept(case, draws(case.estimator, jax.random.fold_in(ctx.key, i), case.points, ctx.n(n)))
        found = found**2 if case.square else found
        if found.shape[2] != wanted.shape[1]:
            raise ValueError(f"{case.name}: {found.shape[2]} figures estimated, {wanted.shape[1]} exact ones")
        limits = (-case.bound, case.bound) if bounded and case.bound is not None else None
        for p, f in itertools.product(range(len(wanted)), range(wanted.shape[1])):
            at = ", ".join(f"{x:.4g}" for x in np.asarray(case.points[p]))
            name = f"{case.name}, figure {f} at ({at})"
            figures.append(means.figure(name, found[p, :, f], float(wanted[p, f]), alpha, limits))
    return means.joined(figures, ctx.n(n) * sum(len(c.points) for c in cases), bounded=bounded)
