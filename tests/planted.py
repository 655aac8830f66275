"""Planted truths for the tests of the claim harness: claims of a paper that does not exist, and sharp inequalities.

Every inequality is attained, so that its constant 1 % smaller is false, though perhaps only near equality.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import paper_checks
from paper_checks.harness.claim import Claim, Outcome, Paper, claim

PAPER = Paper("planted", "Planted claims", "Nobody", 2026, "none", "0000.00000", ("P1", "P2", "P3", "P4"))


def plant(check: Callable[[Any], Outcome], kind: Any, *, number: str = "P1", **fields: Any) -> Claim:
    """A claim of the planted paper, with one control called "wrong" unless other controls are given."""
    described: dict[str, Any] = {
        "title": number,
        "controls": {"wrong": "a wrong constant"},
        "regime": "all",
        "source": "planted",
        "resolution": 1.0 if kind == "statistical" else None,
    }
    return claim(PAPER, number, "a planted statement", kind=kind, **{**described, **fields})(check)


class Inequality(NamedTuple):
    """left <= c right with c = 1 the best constant; `violation(x, c)` is left / (c right) - 1."""

    name: str
    violation: Callable[[Any, Any], jax.Array]
    draw: Callable[..., Any]
    structure: tuple[Any, ...]
    high: Callable[[Any, Any], float] | None = None


# -- inputs ---------------------------------------------------------------------------------------------------------


def _scaled(key: jax.Array, *shape: int) -> jax.Array:
    """Normal entries at a log-uniform scale between 1/10 and 10."""
    k_x, k_s = jax.random.split(key)
    return jax.random.normal(k_x, shape) * 10 ** jax.random.uniform(k_s, minval=-1.0, maxval=1.0)


def logits_near_and_far(key: jax.Array, k: int) -> dict[str, jax.Array]:
    """Two distributions as log-weights `p` and `q` (k,), from almost equal to far apart."""
    k_p, k_d, k_s = jax.random.split(key, 3)
    p = jax.random.normal(k_p, (k,))
    return {"p": p, "q": p + jax.random.normal(k_d, (k,)) * 10 ** jax.random.uniform(k_s, minval=-3.0, maxval=0.5)}


# -- twenty sharp inequalities ----------------------------------------------------------------------------------------


def _symmetric(x: jax.Array) -> jax.Array:
    return x + x.T


def cauchy_schwarz(x: jax.Array, c: Any) -> jax.Array:
    return x[0] @ x[1] / (c * jnp.linalg.norm(x[0]) * jnp.linalg.norm(x[1])) - 1


def mean_inequality(x: jax.Array, c: Any) -> jax.Array:  # geometric <= arithmetic
    return jnp.exp(jnp.mean(x)) / (c * jnp.mean(jnp.exp(x))) - 1


def jensen(x: jax.Array, c: Any) -> jax.Array:
    return jnp.mean(x) ** 4 / (c * jnp.mean(x**4)) - 1


def hoelder(x: jax.Array, c: Any) -> jax.Array:
    a, b = jnp.abs(x)
    return a @ b / (c * jnp.sum(a**3) ** (1 / 3) * jnp.sum(b**1.5) ** (2 / 3)) - 1


def young(x: jax.Array, c: Any) -> jax.Array:
    a, b = jnp.exp(x[0]), jnp.exp(x[1])
    return a * b / (c * (a**3 / 3 + b**1.5 / 1.5)) - 1


def minkowski(x: jax.Array, c: Any) -> jax.Array:
    def norm(v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(v) ** 3) ** (1 / 3)

    return norm(x[0] + x[1]) / (c * (norm(x[0]) + norm(x[1]))) - 1


def one_norm(x: jax.Array, c: Any) -> jax.Array:
    return jnp.sum(jnp.abs(x)) / (c * jnp.sqrt(x.size) * jnp.linalg.norm(x)) - 1


def gershgorin(x: jax.Array, c: Any) -> jax.Array:
    a = _symmetric(x)
    return jnp.max(jnp.linalg.eigvalsh(a)) / (c * jnp.max(jnp.sum(jnp.abs(a), 1))) - 1


def trace_norms(x: jax.Array, c: Any) -> jax.Array:  # tr A'B <= |A|_F |B|_F, B positive semidefinite
    b = x[1] @ x[1].T
    return jnp.trace(x[0].T @ b) / (c * jnp.linalg.norm(x[0]) * jnp.linalg.norm(b)) - 1


def trace_largest(x: jax.Array, c: Any) -> jax.Array:  # tr AB <= lambda_max(A) tr B
    a, b = x[0] @ x[0].T, x[1] @ x[1].T
    return jnp.trace(a @ b) / (c * jnp.linalg.eigvalsh(a)[-1] * jnp.trace(b)) - 1


def hadamard(x: jax.Array, c: Any) -> jax.Array:
    return jnp.abs(jnp.linalg.det(x)) / (c * jnp.prod(jnp.linalg.norm(x, axis=1))) - 1


def determinant_trace(x: jax.Array, c: Any) -> jax.Array:
    a, d = x @ x.T, x.shape[0]
    return jnp.abs(jnp.linalg.det(a)) ** (1 / d) / (c * jnp.trace(a) / d) - 1


def popoviciu(x: jax.Array, c: Any) -> jax.Array:
    return jnp.var(x) / (c * (jnp.max(x) - jnp.min(x)) ** 2 / 4) - 1


def entropy(x: jax.Array, c: Any) -> jax.Array:
    logp = jax.nn.log_softmax(x)
    return -jnp.sum(jnp.exp(logp) * logp) / (c * jnp.log(x.size)) - 1


def soft_maximum(x: jax.Array, c: Any) -> jax.Array:
    return (jax.nn.logsumexp(x) - jnp.max(x)) / (c * jnp.log(x.size)) - 1


def rayleigh(x: dict[str, jax.Array], c: Any) -> jax.Array:
    a = x["a"] @ x["a"].T
    return x["v"] @ a @ x["v"] / (c * jnp.linalg.eigvalsh(a)[-1] * (x["v"] @ x["v"])) - 1


def nesbitt(x: jax.Array, c: Any) -> jax.Array:
    a = jnp.exp(x)
    return 1.5 / (c * jnp.sum(a / (jnp.sum(a) - a))) - 1


def wirtinger(x: jax.Array, c: Any) -> jax.Array:
    y = x - jnp.mean(x)
    return 4 * jnp.sin(jnp.pi / x.size) ** 2 * jnp.sum(y**2) / (c * jnp.sum((jnp.roll(y, 1) - y) ** 2)) - 1


def maclaurin(x: jax.Array, c: Any) -> jax.Array:
    a, d = jnp.exp(x), x.size
    second = (jnp.sum(a) ** 2 - jnp.sum(a**2)) / 2
    return second / (c * (d - 1) / (2 * d) * jnp.sum(a) ** 2) - 1


def pinsker(x: dict[str, jax.Array], c: Any) -> jax.Array:
    """Written naively: for p near q the divergence loses its digits by cancellation."""
    p, q = jax.nn.softmax(x["p"]), jax.nn.softmax(x["q"])
    return jnp.sum(jnp.abs(p - q)) ** 2 / (2 * c * jnp.sum(p * jnp.log(p / q))) - 1


def pinsker_in_60_digits(x: dict[str, np.ndarray], c: Any) -> float:
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(float(v))) for v in np.asarray(x[name])] for name in "pq")
        p, q = ([v / mpmath.fsum(w) for v in w] for w in (p, q))
        distance = mpmath.fsum(abs(a - b) for a, b in zip(p, q, strict=True))
        divergence = mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))
        return float(distance**2 / (2 * float(c) * divergence) - 1)


def _draw_rayleigh(key: jax.Array, d: int) -> dict[str, jax.Array]:
    k_a, k_v = jax.random.split(key)
    return {"a": _scaled(k_a, d, d), "v": _scaled(k_v, d)}


def _inequality(violation: Callable[[Any, Any], jax.Array], *shape: int) -> Inequality:
    return Inequality(violation.__name__, violation, _scaled, shape)


INEQUALITIES = (
    _inequality(cauchy_schwarz, 2, 4),
    _inequality(mean_inequality, 4),
    _inequality(jensen, 4),
    _inequality(hoelder, 2, 4),
    _inequality(young, 2),
    _inequality(minkowski, 2, 3),
    _inequality(one_norm, 4),
    _inequality(gershgorin, 3, 3),
    _inequality(trace_norms, 2, 3, 3),
    _inequality(trace_largest, 2, 3, 3),
    _inequality(hadamard, 3, 3),
    _inequality(determinant_trace, 3, 3),
    _inequality(popoviciu, 4),
    _inequality(entropy, 4),
    _inequality(soft_maximum, 4),
    Inequality("rayleigh", rayleigh, _draw_rayleigh, (3,)),
    _inequality(nesbitt, 3),
    _inequality(wirtinger, 5),
    _inequality(maclaurin, 4),
    Inequality("pinsker", pinsker, logits_near_and_far, (4,), pinsker_in_60_digits),
)


# -- a paper that can be found ----------------------------------------------------------------------------------------

HEAD = """
from paper_checks.harness.claim import Outcome, Paper, claim, not_checkable

PAPER = Paper("{stem}", "Planted claims", "Nobody", 2026, "none", "0000.00000", ("P1", "P2", "P3", "P4"))
WORDS = {{"controls": {{"wrong": "a wrong constant"}}, "regime": "all", "source": "planted"}}
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, stem: str = "planted") -> ModuleType:
    """Write a claims file and let `paper_checks` find it as the paper `stem`, for the length of one test."""
    (folder / f"{stem}.py").write_text(HEAD.format(stem=stem) + source, encoding="utf-8")
    name = f"paper_checks.{stem}"
    monkeypatch.setattr(paper_checks, "__path__", [*paper_checks.__path__, str(folder)])
    # Both are set here only so that the import below is undone with the rest.
    monkeypatch.setattr(paper_checks, stem, None, raising=False)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    del sys.modules[name]
    importlib.invalidate_caches()
    return importlib.import_module(name)
