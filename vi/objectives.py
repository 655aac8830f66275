"""Objectives of variational inference, each written in the public language of the package so that it can be copied.

A model p is a program called as model(theta, *data), a guide q one called as guide(phi, *data); x is what the model
observes, z what the guide draws.  Every function here returns an expectation E: E(key, theta, phi, *data) is an unbiased
estimate of the objective, and so is its jax.grad of the objective's gradient, whatever estimators the guide states.
If a program has `numpyro.param` sites, phi can be their values: `lambda phi, x: handlers.substitute(guide, data=phi)(x)`.

Whether an objective is to be maximised or minimised is said in the first line of its description.  `scale` multiplies the
observations and factors of the model: M/m if the data are m out of M (a subsampled numpyro.plate does so by itself).
Formulas: Becker et al., "Probabilistic Programming with Programmable Variational Inference", PLDI 2024, unless said.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jax.nn import logsumexp
from jaxtyping import Array, Float

from vi.errors import AddressError
from vi.expectation import Expectation, expectation, random_key, vmap
from vi.families import innermost
from vi.genjax_programs import is_generative_function
from vi.inference import bind, importance, marginal, normalize
from vi.programs import (
    Program,
    Site,
    Trace,
    WeightedProgram,
    fix_subsamples,
    log_density,
    scale_observations,
    sim,
    sites,
)
from vi.strategies import reinforce, reparam


def elbo(
    model: Program, guide: Program, *, stl: bool = False, analytic_kl: bool = False, scale: Any = 1.0
) -> Expectation:
    """Maximise E_q[log p(x, z) - log q(z)] = log p(x) - KL(q ‖ p(·|x)).

    stl          leave out the score of q, whose expectation is zero ("sticking the landing", Roeder et al. 2017): at
                 q = p(·|x) the gradient of reparameterised choices then has no variance
    analytic_kl  E_q[log p(x | z)] - Σ_a KL(q_a ‖ p_a), with KL(q_a ‖ p_a) by numpyro.distributions.kl_divergence at
                 every address a, given the choices before it

    Raises TypeError if a density has to be recomputed (stl, analytic_kl) and is an estimate; with analytic_kl
    NotImplementedError where NumPyro has no formula, AddressError if model and guide draw in different orders.
    """
    model = _scaled(model, scale)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        trace, log_q = sim(guide)(phi, *data)
        if stl:
            log_q = log_density(guide)(trace, _detach(phi), *data)
        return log_density(model)(trace, theta, *data) - log_q

    def value_with_kl(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        trace, _ = sim(guide)(phi, *data)
        p, q = sites(model)(trace, theta, *data), sites(guide)(trace, phi, *data)
        return _observed(p) - _observed(q) - _kl(q, p)

    if stl and analytic_kl:
        raise ValueError("elbo: stl and analytic_kl exclude each other; the analytic KL has no score to leave out")
    if stl and isinstance(guide, WeightedProgram):
        raise TypeError("elbo: stl needs a guide with an exact density; this one's is an estimate")
    return expectation(value_with_kl if analytic_kl else value)


def iwelbo(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Maximise E[log (1/n) Σ_i p(x, z_i)/q(z_i)], z_i ~ q: at most log p(x), and it increases to it with n."""
    weight = _log_weight(_scaled(model, scale), guide)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        return _log_mean_exp(vmap(lambda: weight(theta, phi, *data), axis_size=n)())

    _check_n("iwelbo", n, 1)
    return expectation(value)


def renyi(model: Program, guide: Program, n: int, alpha: float, *, scale: Any = 1.0) -> Expectation:
    """Maximise E[1/(1-α) log (1/n) Σ_i (p(x, z_i)/q(z_i))^(1-α)]: the ELBO at α = 1, the IWELBO at α = 0.

    Source: Li and Turner 2016, "Rényi divergence variational inference".
    """
    weight = _log_weight(_scaled(model, scale), guide)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        log_w = vmap(lambda: weight(theta, phi, *data), axis_size=n)()
        return log_w.mean() if alpha == 1.0 else _log_mean_exp((1.0 - alpha) * log_w) / (1.0 - alpha)

    _check_n("renyi", n, 1)
    return expectation(value)


def vimco(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Maximise the IWELBO of n ≥ 2 particles, with score functions and a baseline from the other particles.

    Particle i's baseline is the objective with log w_i replaced by the mean of the others' log weights.  Every choice of
    the guide (a NumPyro program) uses it, whatever estimator the guide states.
    Source: Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives".
    """
    model = _scaled(model, scale)

    def weight(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        trace, log_q = sim(guide, strategy=lambda d: reinforce(d, baseline="leave_one_out"))(phi, *data)
        return log_density(model)(trace, theta, *data) - log_q

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        return _log_mean_exp(vmap(lambda: weight(theta, phi, *data), axis_size=n)())

    _check_n("vimco", n, 2)
    return expectation(value)


def dreg_iwelbo(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Maximise the IWELBO, with the doubly reparameterised gradient: Σ_i ŵ_i² ∂ log w_i/∂z_i ∂z_i/∂φ, ŵ = w/Σw.

    Unlike the plain gradient's, its signal-to-noise ratio does not vanish as n grows.  Every choice of the guide (a NumPyro
    program) is reparameterised.  The gradient in θ is that of `iwelbo`.  The model's density must be known, not estimated
    (TypeError): the two factors log w_i and ŵ_i are of the same minibatch of a subsampled plate.
    Source: Tucker et al. 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives".
    """
    model = _scaled(model, scale)

    def log_w(key: Any, trace: Trace, theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        target = model if is_generative_function(model) else fix_subsamples(model, key)
        return log_density(target)(trace, theta, *data) - log_density(guide)(trace, _detach(phi), *data)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        traces = vmap(lambda: sim(guide, strategy=reparam)(phi, *data)[0], axis_size=n)()
        keys = jax.random.split(random_key(), n)
        weights = jax.nn.softmax(jax.vmap(lambda k, t: log_w(k, t, theta, phi, *data))(keys, _detach(traces)))
        # Same values, but what flows back through particle i is multiplied by its weight once more.
        traces = jax.tree.map(lambda z: _scale_gradient(z, lax.stop_gradient(weights)), traces)
        return _log_mean_exp(jax.vmap(lambda k, t: log_w(k, t, theta, phi, *data))(keys, traces))

    _check_n("dreg_iwelbo", n, 1)
    return expectation(value)


def wake_theta(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Minimise E[-log p_θ(x, z)], z one of n particles of q resampled by importance, in θ alone.

    Reweighted wake-sleep (Bornschein and Bengio 2015).  The sampler is held fixed: its arguments are not differentiated.
    """
    _check_n("wake_theta", n, 1)
    model = _scaled(model, scale)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        sampler = normalize(bind(model, _detach(theta)), importance(n, bind(guide, _detach(phi))))
        trace, _ = sim(sampler)(*data)
        return -log_density(model)(trace, theta, *data)

    return expectation(value)


def wake_phi(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Minimise E[-log q_φ(z)], z one of n particles of q resampled by importance, in the scored q alone.

    Up to a constant the forward divergence KL(p(·|x) ‖ q) as n → ∞; its gradient is biased by O(1/n), and zero for n = 1.
    Reweighted wake-sleep (Bornschein and Bengio 2015).
    """
    _check_n("wake_phi", n, 1)
    model = _scaled(model, scale)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        sampler = normalize(bind(model, _detach(theta)), importance(n, bind(guide, _detach(phi))))
        trace, _ = sim(sampler)(*data)
        return -log_density(guide)(trace, phi, *data)

    return expectation(value)


def sleep(model: Program, guide: Program, observed: tuple[str, ...] | str) -> Expectation:
    """Minimise E_{(z, x) ~ p}[-log q_φ(z; x)] in φ: amortised inference, unbiased, without data.

    observed: the addresses of the data in the model, in the order of its arguments.  The model is run with None for each, so
    that it has to draw them; the guide is scored with the values drawn.  The expectation is called (key, theta, phi).
    """
    names = (observed,) if isinstance(observed, str) else tuple(observed)

    def value(theta: Any, phi: Any) -> Float[Array, ""]:
        trace, _ = sim(model)(_detach(theta), *(None for _ in names))
        if lacking := [a for a in names if a not in trace]:
            raise AddressError(
                f"sleep: the model does not draw {lacking} when its data are None; it draws {sorted(trace)}"
            )
        return -log_density(guide)(trace.select(lambda a: a not in names), phi, *(trace[a] for a in names))

    return expectation(value)


def forward_kl(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Minimise an estimate of KL(p(·|x) ‖ q) = E_{p(z|x)}[log p(z | x) - log q(z)].

    z and log p(z|x) come from `normalize` with n particles of q, held fixed in φ; exact as n → ∞.
    """
    _check_n("forward_kl", n, 1)
    model = _scaled(model, scale)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        posterior = normalize(bind(model, theta), importance(n, bind(guide, _detach(phi))))
        trace, log_p = sim(posterior)(*data)
        return log_p - log_density(guide)(trace, phi, *data)

    return expectation(value)


def symmetric_kl(model: Program, guide: Program, n: int, *, scale: Any = 1.0) -> Expectation:
    """Minimise KL(q ‖ p(·|x)) + KL(p(·|x) ‖ q), in which log p(x) cancels; the second expectation as in `forward_kl`."""
    _check_n("symmetric_kl", n, 1)
    model = _scaled(model, scale)

    def value(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        z, log_q = sim(guide)(phi, *data)
        posterior = normalize(bind(model, theta), importance(n, bind(guide, _detach(phi))))
        y, _ = sim(posterior)(*data)
        log_ratio = [log_density(model)(t, theta, *data) for t in (z, y)]
        return (log_q - log_ratio[0]) + (log_ratio[1] - log_density(guide)(y, phi, *data))

    return expectation(value)


def hvi(
    model: Program, guide: Program, keep: str | tuple[str, ...], proposal: Program | None = None, *, scale: Any = 1.0
) -> Expectation:
    """Maximise E[log p(x, y) + log r(u; y) - log q(y, u)] for a guide with auxiliary choices u; keep: the addresses y.

    Hierarchical variational inference: `iwhvi` with m = 1.  proposal: r, called (trace of y, phi, *data); None for the
    guide's own law of u.
    """
    return iwhvi(model, guide, keep, 1, proposal, scale=scale)


def iwhvi(
    model: Program,
    guide: Program,
    keep: str | tuple[str, ...],
    m: int,
    proposal: Program | None = None,
    *,
    scale: Any = 1.0,
) -> Expectation:
    """Maximise E[log p(x, y) - log (1/m) Σ_j q(y, u_j)/r(u_j; y)], u_1 the true one; increases with m to the ELBO of q(y)."""
    return elbo(model, marginal(guide, keep, importance(m, proposal)), scale=scale)


def diwhvi(
    model: Program,
    guide: Program,
    keep: str | tuple[str, ...],
    n: int,
    m: int,
    proposal: Program | None = None,
    *,
    scale: Any = 1.0,
) -> Expectation:
    """Maximise the IWELBO of n particles y_i, each with q(y_i) estimated from m auxiliary ones; increases with n and m."""
    return iwelbo(model, marginal(guide, keep, importance(m, proposal)), n, scale=scale)


# ---- shared ------------------------------------------------------------------------------------------------------------


def _log_weight(model: Program, guide: Program) -> Any:
    def weight(theta: Any, phi: Any, *data: Any) -> Float[Array, ""]:
        trace, log_q = sim(guide)(phi, *data)
        return log_density(model)(trace, theta, *data) - log_q

    return weight


def _log_mean_exp(log_w: Float[Array, " n"]) -> Float[Array, ""]:
    return logsumexp(log_w) - jnp.log(log_w.shape[0])


def _detach(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def _scale_gradient(z: Float[Array, "n ..."], factor: Float[Array, " n"]) -> Float[Array, "n ..."]:
    if not jnp.issubdtype(z.dtype, jnp.inexact):
        return z
    fixed = lax.stop_gradient(z)
    return fixed + factor.reshape(-1, *(1,) * (z.ndim - 1)).astype(z.dtype) * (z - fixed)


def _scaled(model: Program, scale: Any) -> Program:
    return model if isinstance(scale, float | int) and scale == 1 else scale_observations(model, scale)


def _observed(found: dict[str, Site]) -> Float[Array, ""]:
    return sum((site.log_prob for site in found.values() if site.is_observed), start=jnp.zeros(()))


def _kl(q: dict[str, Site], p: dict[str, Site]) -> Float[Array, ""]:
    """Σ_a KL(q_a ‖ p_a) over the latent addresses a."""
    orders = [[a for a, site in found.items() if not site.is_observed] for found in (q, p)]
    if orders[0] != orders[1]:
        raise AddressError(
            f"elbo: analytic_kl needs model and guide to draw in the same order; the guide draws {orders[0]}, "
            f"the model {orders[1]}"
        )
    total = jnp.zeros(())
    for a in orders[0]:
        d_q, d_p = q[a].distribution, p[a].distribution
        if d_q is None or d_p is None:
            raise TypeError(
                f"elbo: analytic_kl needs the distributions at '{a}'; it is in a loop or branch, or estimated"
            )
        try:
            divergence = dist.kl_divergence(d_q, d_p)
        except NotImplementedError as error:
            families = " to ".join(type(innermost(d)).__name__ for d in (d_q, d_p))
            raise NotImplementedError(
                f"elbo: NumPyro has no analytic KL divergence from {families} at '{a}'"
            ) from error
        if q[a].scale is not p[a].scale and q[a].scale != p[a].scale:
            raise ValueError(
                f"elbo: analytic_kl needs equal scales at '{a}', the guide has {q[a].scale}, the model {p[a].scale}"
            )
        total += jnp.sum(divergence if q[a].scale is None else q[a].scale * divergence)
    return total


def _check_n(caller: str, n: Any, least: int) -> None:
    if not isinstance(n, int) or n < least:
        raise ValueError(f"{caller}: n is {n!r}, expected an integer of at least {least}")
