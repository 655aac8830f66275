"""The paper, and the test that its claims about means share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness import means
from paper_checks.harness.claim import Outcome, Paper
from paper_checks.harness.context import Context

PAPER = Paper(
    stem="programmable_vi",
    title="Probabilistic Programming with Programmable Variational Inference",
    authors="McCoy R. Becker, Alexander K. Lew, Xiaoyan Wang, Matin Ghavami, Mathieu Huot, Martin C. Rinard, "
    "Vikash K. Mansinghka",
    year=2024,
    venue="PLDI",
    arxiv="2406.15742",
    claims=(
        *("V1", "V1b", "V2", "V3", "V3b", "V3c", "V4", "V5", "V6", "V6b", "V7", "V7b", "V8", "V8b", "V9"),
        *("V10", "V10b", "V11", "V11b", "V12", "V13", "V14", "E1"),
    ),
    note="The numbers are the project's own: the paper's text was not available, so that its theorem numbers and proofs are not "
    "claimed.  Statements are those of the authors' public code, slides and tables.  A letter marks a part of the claim of "
    "that number; V14 is a statement of the surrounding literature, E1 an experiment.",
)


class Case(NamedTuple):
    """An estimator of some figures, and what they are on average.

    estimator   key -> pytree of arrays, one draw of each figure
    exact       the same pytree, by other means
    limits      no draw is ever outside; None if there are no limits, or none are known
    more        how many times the usual number of draws
    """

    estimator: Callable[[jax.Array], Any]
    exact: Any
    limits: tuple[float, float] | None = None
    more: int = 1


def draws(estimator: Callable[[jax.Array], Any], key: jax.Array, n: int) -> dict[str, np.ndarray]:
    """n independent draws of every figure, by name."""
    keys = jax.random.split(key, n)
    found = jax.jit(jax.vmap(estimator)).lower(keys).compile(means.QUICK_TO_COMPILE)(keys)
    return _named(found, lambda x: x.reshape(n, -1).T)


def unbiased(ctx: Context, cases: Mapping[str, Case], *, n: int = 20_000) -> Outcome:
    """Every figure of every case has its exact value as its mean.

    One unit is max(1, |exact|).  Each figure is a test, and what they find is joined: if all cases have limits, the
    average of their e-values (betting; exact at every n); otherwise the smallest p-value times their number (a z-test of
    n draws; asymptotic).
    """
    wanted = {name: _named(case.exact, lambda x: x.reshape(-1)) for name, case in cases.items()}
    alpha = ctx.alpha / sum(x.size for figures in wanted.values() for x in figures.values())
    bounded = all(case.limits is not None for case in cases.values())
    figures: list[means.Figure] = []
    total = 0
    for i, (name, case) in enumerate(cases.items()):
        size = ctx.n(n * case.more)
        total += size
        found = draws(case.estimator, jax.random.fold_in(ctx.key, i), size)
        if {k: len(x) for k, x in found.items()} != {k: x.size for k, x in wanted[name].items()}:
            raise ValueError(f"{name}: figures {list(found)} are estimated, {list(wanted[name])} are exact")
        for figure, rows in found.items():
            for j, row in enumerate(rows):
                label = f"{name}: {figure}" + (f"[{j}]" if len(rows) > 1 else "")
                exact = float(wanted[name][figure][j])
                figures.append(means.figure(label, row, exact, alpha, case.limits if bounded else None))
    return means.joined(figures, total, bounded=bounded)


def _named(tree: Any, shape: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path).replace("'", "").strip("[]") or "mean": shape(np.asarray(x)) for path, x in leaves
    }


# -- densities and quadrature, for what should come out -------------------------------------------------------------------


def normal(x: Any, mean: Any, scale: Any) -> jax.Array:
    """The logarithm of the density of N(mean, scale^2)."""
    return -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def flip(b: Any, logit: Any) -> jax.Array:
    """The logarithm of the probability that a coin of this log-odds shows b."""
    return jnp.where(b == 1, jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit))


def standard_normal(nodes: int) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights of Gauss-Hermite quadrature for N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return jnp.asarray(x), jnp.asarray(w / w.sum())


def product(*axes: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Nodes of a product of quadratures, one array (rows,) an axis, and their weights (rows,)."""
    nodes = jnp.meshgrid(*(x for x, _ in axes), indexing="ij")
    weights = jnp.meshgrid(*(w for _, w in axes), indexing="ij")
    return [x.ravel() for x in nodes], jnp.prod(jnp.stack([w.ravel() for w in weights]), axis=0)


def line(low: float, high: float, nodes: int = 400) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights of Gauss-Legendre quadrature on [low, high]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return jnp.asarray(low + (high - low) * (x + 1) / 2), jnp.asarray(w * (high - low) / 2)
