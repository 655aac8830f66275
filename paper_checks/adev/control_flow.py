"""A13: choices under loops, lanes, branches and helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

import vi
from paper_checks.adev.common import (
    PAPER,
    Case,
    by_vi,
    chances,
    figures_of,
    flip,
    outcomes,
    points,
    unbiased,
)
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

sg = lax.stop_gradient


def _same(x: Any) -> Any:
    return x


# -- A13: loops, lanes, branches, helpers -------------------------------------------------------------------------------------

SHARES = np.array([1.0, 0.5, 0.8])


def _scan(p: Any, seen: Callable[[Any], Any] = _same) -> Any:
    def body(c: Any, i: Any) -> Any:
        b = flip(seen(p) * (0.5 + 0.5 * c), "b")
        return b, b * (i + 1)

    _, terms = lax.scan(body, jnp.ones(()), jnp.arange(4.0))
    return jnp.sum(terms) ** 2


def _scan_exact(p: Any) -> Any:
    b = outcomes(4)
    before = np.concatenate([np.ones((16, 1)), b[:, :-1]], axis=1)
    return jnp.sum(chances(b, p * (0.5 + 0.5 * before)) * (b @ np.arange(1.0, 5.0)) ** 2)


def _jax_vmap(p: Any) -> Any:
    return jnp.sum(jax.vmap(lambda q: flip(q, "b"))(p * SHARES)) ** 2


def _vi_vmap(p: Any) -> Any:
    return jnp.sum(vi.vmap(lambda q: flip(q, "b"))(p * SHARES)) ** 2


def _batch_shape(p: Any) -> Any:
    return jnp.sum(flip(p * SHARES, "b")) ** 2


def _lanes_exact(p: Any) -> Any:
    b = outcomes(3)
    return jnp.sum(chances(b, p * SHARES) * b.sum(1) ** 2)


def _same_arguments(p: Any) -> Any:
    """Three lanes with nothing that tells them apart."""
    return jnp.sum(jax.vmap(lambda _: flip(p, "b"))(jnp.arange(3))) ** 2


def _one_for_all(p: Any) -> Any:
    return (3 * flip(p, "b")) ** 2


def _same_arguments_exact(p: Any) -> Any:
    return 3 * p * (1 - p) + 9 * p**2


def _cond(p: Any, seen: Callable[[Any], Any] = _same) -> Any:
    a = flip(seen(p), "a")
    return lax.cond(a == 1, lambda p: 3 * flip(p * p, "b") + 1, lambda p: p, p)


def _switch(p: Any) -> Any:
    k = vi.sample(dist.Categorical(probs=jnp.stack([p / 2, 1 - p, p / 2])), "a")
    return lax.switch(k, [lambda p: p * p, lambda p: 3 * flip(p * p, "b") + 1, lambda p: -flip(p / 2, "c") * p], p)


def _switch_exact(p: Any) -> Any:
    return p / 2 * p**2 + (1 - p) * (3 * p**2 + 1) - p / 2 * p / 2 * p


def _cond_exact(p: Any) -> Any:
    return p * (3 * p**2 + 1) + (1 - p) * p


def _jit(p: Any) -> Any:
    @jax.jit
    def helper(q: Any) -> Any:
        return flip(q, "b") * (1 + q)

    return helper(p) * 3 + helper(p * p)


def _checkpoint(p: Any) -> Any:
    @jax.checkpoint
    def helper(q: Any) -> Any:
        return flip(q, "b") * (1 + q)

    return helper(p) * 3 + helper(p * p)


def _helpers_exact(p: Any) -> Any:
    return 3 * p * (1 + p) + p * p * (1 + p * p)


def _nested(p: Any) -> Any:
    """Lanes in a loop in a branch."""

    def body(total: Any, i: Any) -> Any:
        b = jax.vmap(lambda q: flip(q, "b"))(p * SHARES[:2])
        return total + b[0] * (1 + i) - 2 * b[1], None

    def loop(p: Any) -> Any:
        return lax.scan(body, p, jnp.arange(2.0))[0] ** 2

    return lax.cond(flip(p, "a") == 1, loop, lambda p: jnp.ones(()), p)


def _nested_exact(p: Any) -> Any:
    b = outcomes(4)
    total = p + b @ np.array([1.0, -2.0, 2.0, -2.0])
    return p * jnp.sum(chances(b, p * np.tile(SHARES[:2], 2)) * total**2) + 1 - p


STRUCTURES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = {
    "scan": (_scan, _scan_exact, ("b",)),
    "jax.vmap": (_jax_vmap, _lanes_exact, ("b",)),
    "vi.vmap": (_vi_vmap, _lanes_exact, ("b",)),
    "batch shape": (_batch_shape, _lanes_exact, ("b",)),
    "equal lanes": (_same_arguments, _same_arguments_exact, ("b",)),
    "cond": (_cond, _cond_exact, ("a", "b")),
    "switch": (_switch, _switch_exact, ("a", "b", "c")),
    "jit": (_jit, _helpers_exact, ("b",)),
    "checkpoint": (_checkpoint, _helpers_exact, ("b",)),
    "nested": (_nested, _nested_exact, ("a", "b")),
}


def _silent_scan(p: Any) -> Any:
    return _scan(p, sg)


def _branch_only(p: Any) -> Any:
    return _cond(p, sg)


@claim(
    PAPER,
    "A13",
    r"Choices under `scan`, `vmap`, `cond`, `switch`, `jit` and `checkpoint` stay unbiased, whatever their strategies.",
    title="Loops, lanes and branches",
    kind="statistical",
    controls={
        "silent_loop": "no derivative of probabilities inside the loop, as in a public port (genjax 1.0.13)",
        "shared_noise": "one draw for all lanes",
        "branch_only": "no derivative of the probability of the branch",
    },
    resolution=0.2,
    regime="ten programs of flips, p in [0.2, 0.8]; quick: one strategy per program, drawn anew for every seed; standard: all of "
    "ENUM, REINFORCE and MVD; in units of max(1, |figure|)",
    source="Recursion and branching are the host language's in the paper; loops and lanes of JAX are ours.",
    blind_spot="A choice in a while loop, whose number of turns is not known, is refused.",
)
def control_flow(ctx: Context) -> Outcome:
    at = points(ctx, 0, [(0.2, 0.8)], [0.6], drawn=2)

    def case(name: str, strategy: str, program: Callable[..., Any] | None = None) -> Case:
        given, exact, labels = STRUCTURES[name]
        estimator = by_vi(program or given, tuple((label, strategy) for label in labels))
        return Case(f"{name}, {strategy}", estimator, figures_of(exact), at)

    every = ("enum", "reinforce", "mvd")
    rng = np.random.default_rng(int(jax.random.bits(ctx.paper_key, dtype=jnp.uint32)))
    first = int(rng.integers(3))
    ours = [
        case(name, strategy)
        for i, name in enumerate(STRUCTURES)
        for strategy in ((every[(first + i) % 3],) if ctx.budget == "quick" else every)
    ]
    shared = Case("one draw for all", by_vi(_one_for_all, (("b", "enum"),)), figures_of(_same_arguments_exact), at)
    return unbiased(
        ctx,
        ctx.pick(
            ours,
            silent_loop=[case("scan", "mvd", _silent_scan)],
            shared_noise=[shared],
            branch_only=[case("cond", "reinforce", _branch_only)],
        ),
    )
