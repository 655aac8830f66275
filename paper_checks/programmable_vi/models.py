"""Two tiny models with guides, as programs for `vi` and as tables of all their outcomes.

In `coins` everything is a flip, so that its table is complete; in `line` everything is normal, and the table holds the
nodes of a Gauss-Hermite quadrature.  Each has two latent choices u and y, and a second model that knows y alone, for guides with
an auxiliary choice.  An objective is a sum over one or two rows of a table; nothing in the tables uses `vi`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.nn import logsumexp

from paper_checks.programmable_vi.common import flip, normal, product, standard_normal

sg = lax.stop_gradient
Strategy = Callable[[Any], Any]

OBSERVED = 0.7


class Table(NamedTuple):
    """All outcomes of a guide: their probabilities, and what model and guide say of each, all (rows,)."""

    prob: jax.Array
    log_p: jax.Array
    log_q: jax.Array

    @property
    def log_w(self) -> jax.Array:
        return self.log_p - self.log_q


class World(NamedTuple):
    """A model of (u, y), one of y alone, and a guide of (u, y) as a function of the strategies of u and y.

    table       (theta, phi that draws, phi that scores) -> Table of (u, y)
    auxiliary   m, which w -> (theta, phi) -> Table of y with its estimated density: m particles of u, among them the true
                one; with `fresh` only fresh ones
    """

    model: Callable[..., Any]
    model_of_y: Callable[..., Any]
    guide: Callable[[Strategy, Strategy], Callable[..., Any]]
    table: Callable[[Any, Any, Any], Table]
    auxiliary: Callable[..., Table]


# -- coins ------------------------------------------------------------------------------------------------------------


def _coins_model(theta: Any, x: Any) -> None:
    u = numpyro.sample("u", dist.Bernoulli(logits=theta[0]))
    y = numpyro.sample("y", dist.Bernoulli(logits=jnp.where(u == 1, theta[1], theta[2])))
    numpyro.sample("x", dist.Normal(2.0 * y + 0.5 * u + -1.0, 1.0), obs=x)


def _coins_model_of_y(theta: Any, x: Any) -> None:
    y = numpyro.sample("y", dist.Bernoulli(logits=theta[0]))
    numpyro.sample("x", dist.Normal(theta[1] * y + theta[2], 1.0), obs=x)


def _coins_guide(of_u: Strategy, of_y: Strategy) -> Callable[..., Any]:
    def guide(phi: Any, x: Any) -> None:
        u = numpyro.sample("u", of_u(dist.Bernoulli(logits=phi[0])))
        numpyro.sample("y", of_y(dist.Bernoulli(logits=jnp.where(u == 1, phi[1], phi[2]))))

    return guide


def _sides(count: int) -> list[jax.Array]:
    return [x.ravel() for x in jnp.meshgrid(*[jnp.array([0.0, 1.0])] * count, indexing="ij")]


def _coins_table(theta: Any, drawing: Any, scored: Any) -> Table:
    u, y = _sides(2)

    def log_q(phi: Any) -> jax.Array:
        return flip(u, phi[0]) + flip(y, jnp.where(u == 1, phi[1], phi[2]))

    log_p = flip(u, theta[0]) + flip(y, jnp.where(u == 1, theta[1], theta[2]))
    return Table(jnp.exp(log_q(drawing)), log_p + normal(OBSERVED, 2 * y + u / 2 - 1, 1.0), log_q(scored))


def _coins_auxiliary(theta: Any, phi: Any, m: int, fresh: bool = False) -> Table:
    y, *u = _sides(1 + m + fresh)

    def given(u: Any) -> jax.Array:
        return flip(y, jnp.where(u == 1, phi[1], phi[2]))

    prob = jnp.exp(given(u[0]) + sum(flip(each, phi[0]) for each in u))
    log_q = logsumexp(jnp.stack([given(each) for each in u[fresh:]]), axis=0) - jnp.log(m)
    return Table(prob, flip(y, theta[0]) + normal(OBSERVED, theta[1] * y + theta[2], 1.0), log_q)


coins = World(_coins_model, _coins_model_of_y, _coins_guide, _coins_table, _coins_auxiliary)


# -- normals ----------------------------------------------------------------------------------------------------------


def _line_model(theta: Any, x: Any) -> None:
    u = numpyro.sample("u", dist.Normal(theta[0], 1.0))
    y = numpyro.sample("y", dist.Normal(theta[1] * u, 1.0))
    numpyro.sample("x", dist.Normal(y, jnp.exp(theta[2])), obs=x)


def _line_model_of_y(theta: Any, x: Any) -> None:
    y = numpyro.sample("y", dist.Normal(theta[0], jnp.exp(theta[1])))
    numpyro.sample("x", dist.Normal(y, jnp.exp(theta[2])), obs=x)


def _line_guide(of_u: Strategy, of_y: Strategy) -> Callable[..., Any]:
    def guide(phi: Any, x: Any) -> None:
        u = numpyro.sample("u", of_u(dist.Normal(phi[0], jnp.exp(phi[1]))))
        numpyro.sample("y", of_y(dist.Normal(phi[2] + u / 2, jnp.exp(phi[1]))))

    return guide


NODES = {2: 14, 3: 10}
"""Nodes an axis by number of axes; two rows of a table together have twice as many axes."""


def _line_table(theta: Any, drawing: Any, scored: Any) -> Table:
    (a, b), weights = product(*[standard_normal(NODES[2])] * 2)
    u = drawing[0] + jnp.exp(drawing[1]) * a
    y = drawing[2] + u / 2 + jnp.exp(drawing[1]) * b
    log_p = normal(u, theta[0], 1.0) + normal(y, theta[1] * u, 1.0) + normal(OBSERVED, y, jnp.exp(theta[2]))
    scale = jnp.exp(scored[1])
    return Table(weights, log_p, normal(u, scored[0], scale) + normal(y, scored[2] + u / 2, scale))


def _line_auxiliary(theta: Any, phi: Any, m: int, fresh: bool = False) -> Table:
    axes = 1 + m + fresh
    (b, *noise), weights = product(*[standard_normal(NODES[axes])] * axes)
    scale = jnp.exp(phi[1])
    u = [phi[0] + scale * a for a in noise]
    y = phi[2] + u[0] / 2 + scale * b
    log_q = logsumexp(jnp.stack([normal(y, phi[2] + each / 2, scale) for each in u[fresh:]]), axis=0) - jnp.log(m)
    return Table(weights, normal(y, theta[0], jnp.exp(theta[1])) + normal(OBSERVED, y, jnp.exp(theta[2])), log_q)


line = World(_line_model, _line_model_of_y, _line_guide, _line_table, _line_auxiliary)


# -- objectives as sums -----------------------------------------------------------------------------------------------


def elbo(t: Table) -> jax.Array:
    return t.prob @ t.log_w


def iwelbo(t: Table, n: int) -> jax.Array:
    """E log (1/n) Σ w over n independent rows."""
    log_w, prob = t.log_w, t.prob
    for _ in range(n - 1):
        log_w = jnp.logaddexp(log_w[:, None], t.log_w).ravel()
        prob = (prob[:, None] * t.prob).ravel()
    return prob @ (log_w - jnp.log(n))


def resampled(t: Table, f: jax.Array) -> jax.Array:
    """E f(z), z one of two independent rows, chosen with probability in proportion to its weight."""
    first = jax.nn.sigmoid(t.log_w[:, None] - t.log_w)
    return jnp.sum(t.prob[:, None] * t.prob * (first * f[:, None] + (1 - first) * f))


def exact_objectives(world: World) -> dict[str, Callable[[Any, Any], jax.Array]]:
    """(theta, phi) -> the objectives of the grid, whatever is held fixed in them held fixed here by stop_gradient."""
    table, auxiliary = world.table, world.auxiliary

    def symmetric(theta: Any, phi: Any) -> jax.Array:
        sampler, scored = table(theta, sg(phi), sg(phi)), table(theta, sg(phi), phi)
        return resampled(sampler, scored.log_w) - elbo(table(theta, phi, phi))

    return {
        "ELBO": lambda theta, phi: elbo(table(theta, phi, phi)),
        "IWELBO 2": lambda theta, phi: iwelbo(table(theta, phi, phi), 2),
        "HVI": lambda theta, phi: elbo(auxiliary(theta, phi, 1)),
        "IWHVI 2": lambda theta, phi: elbo(auxiliary(theta, phi, 2)),
        "DIWHVI 2, 2": lambda theta, phi: iwelbo(auxiliary(theta, phi, 2), 2),
        "wake theta 2": lambda theta, phi: resampled(
            table(sg(theta), sg(phi), sg(phi)), -table(theta, sg(phi), phi).log_p
        ),
        "wake phi 2": lambda theta, phi: resampled(
            table(sg(theta), sg(phi), sg(phi)), -table(theta, sg(phi), phi).log_q
        ),
        "symmetric KL 2": symmetric,
    }
