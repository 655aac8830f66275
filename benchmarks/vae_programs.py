"""The gradient of -ELBO of one variational autoencoder, written in several ways; `vi_overhead.py` times them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import vi

PIXELS, HIDDEN, LATENT = 784, 200, 10


class Layers(NamedTuple):
    """Two dense layers: `inner` and `outer` are pairs (weights (in, out), bias)."""

    inner: tuple[jax.Array, jax.Array]
    outer: tuple[jax.Array, jax.Array]


def init(key: jax.Array) -> tuple[Layers, Layers]:
    """Decoder and encoder."""

    def layer(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
        return jax.random.normal(key, (inputs, outputs)) / inputs**0.5, jnp.zeros(outputs)

    k = jax.random.split(key, 4)
    return (
        Layers(layer(k[0], LATENT, HIDDEN), layer(k[1], HIDDEN, PIXELS)),
        Layers(layer(k[2], PIXELS, HIDDEN), layer(k[3], HIDDEN, 2 * LATENT)),
    )


def dense(layers: Layers, x: jax.Array) -> jax.Array:
    (w, b), (v, c) = layers
    return jax.nn.leaky_relu(x @ w + b) @ v + c


def encode(encoder: Layers, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loc, raw = jnp.split(dense(encoder, x), 2, axis=-1)
    return loc, jax.nn.softplus(raw)


def elbo_by_hand(decoder: Layers, encoder: Layers, x: jax.Array, noise: jax.Array) -> jax.Array:
    """One draw per row of x and of noise: log p(z, x) - log q(z)."""
    loc, scale = encode(encoder, x)
    z = loc + scale * noise
    logits = dense(decoder, z)
    log_p = -0.5 * (z**2).sum(-1) - (jax.nn.softplus(logits) - x * logits).sum(-1)
    return log_p + (0.5 * ((z - loc) / scale) ** 2 + jnp.log(scale)).sum(-1)


def hand() -> Callable[..., Any]:
    def loss(params, key, x):
        return -elbo_by_hand(*params, x, jax.random.normal(key, (len(x), LATENT))).mean()

    return jax.value_and_grad(loss)


def hand_per_datum() -> Callable[..., Any]:
    def loss(params, key, x):
        return -elbo_by_hand(*params, x, jax.random.normal(key, (LATENT,)))

    def mean(params, key, x):
        each = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, jax.random.split(key, len(x)), x)
        return jax.tree.map(lambda g: g.mean(0), each)

    return mean


def model(decoder: Layers, x: jax.Array) -> None:
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
    numpyro.sample("x", dist.Bernoulli(logits=dense(decoder, z), validate_args=False).to_event(1), obs=x)


def guide(encoder: Layers, x: jax.Array) -> None:
    numpyro.sample("z", vi.reparam(dist.Normal(*encode(encoder, x)).to_event(1)))


def programmable() -> Callable[..., Any]:
    @vi.expectation
    def elbo(decoder, encoder, x):
        trace, log_q = vi.sim(guide)(encoder, x)
        return vi.log_density(model)(trace, decoder, x) - log_q

    def loss(params, key, x):
        return -vi.batch(elbo, in_axes=(None, None, 0))(key, *params, x).mean()

    return jax.value_and_grad(loss)


def numpyro_svi() -> Callable[..., Any]:
    def model(params, x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=dense(params[0], z), validate_args=False).to_event(1), obs=x)

    def guide(params, x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(*encode(params[1], x)).to_event(1))

    # Pixels are grey, which the Bernoulli density takes as it does in the other programs if it is not told to validate.
    def loss(params, key, x):
        with numpyro.validation_enabled(False):
            return Trace_ELBO().loss(key, {}, model, guide, params, x) / len(x)

    return jax.value_and_grad(loss)


def genjax_elbo() -> Callable[..., Any]:
    """Raises ImportError where genjax 0.10 is not installed."""
    import genjax
    from genjax.inference.vi import ELBO, mv_normal_diag_reparam

    @genjax.gen
    def model(decoder):
        z = genjax.mv_normal_diag(jnp.zeros(LATENT), jnp.ones(LATENT)) @ "z"
        genjax.bernoulli(logits=dense(decoder, z)) @ "x"

    @genjax.marginal()
    @genjax.gen
    def guide(target):
        loc, scale = encode(target.args[1], target["x"])
        mv_normal_diag_reparam(loc, scale) @ "z"

    @genjax.gen
    def closed(decoder, encoder):
        return model.inline(decoder)

    def mean(params, key, x):
        leaves, structure = jax.tree.flatten(params)

        def one(key, x):
            def target(*leaves):
                return genjax.Target(closed, jax.tree.unflatten(structure, leaves), genjax.ChoiceMap.kw(x=x))

            return ELBO(guide, target)(key, tuple(leaves))

        found = jax.vmap(one)(jax.random.split(key, len(x)), x)
        return jnp.nan, jax.tree.unflatten(structure, [g.mean(0) for g in found])

    return mean


def competitors() -> tuple[dict[str, Callable[[], Callable[..., Any]]], dict[str, str]]:
    """The programs, by name, and the reason for each that cannot run here."""
    programs = {"hand": hand, "hand/datum": hand_per_datum, "vi": programmable, "numpyro": numpyro_svi}
    try:
        genjax_elbo()
    except (ImportError, AttributeError) as error:
        return programs, {"genjax": f"genjax 0.10 cannot be used here: {error}"}
    return {**programs, "genjax": genjax_elbo}, {}
