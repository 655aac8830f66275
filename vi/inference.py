"""Distributions without a density formula: `marginal` removes choices of a program, `normalize` conditions one.

Both are programs again, for `vi.sim`, `vi.log_density`, for each other, and (called with arguments) as a site of a NumPyro
program: `numpyro.sample("y", marginal(program, "y")(*args))`.  Their densities are estimates with two contracts
(Becker et al. 2024, "stochastic probability interface"), where ρ is the true density:

    log_density   log w with E[w] = ρ(trace),              so that E[log w] ≤ log ρ
    sim           log w with E[1/w | trace] = 1/ρ(trace),  so that E[log w] ≥ log ρ

An ELBO with log p replaced by the former or log q by the latter is still a lower bound.  Weights are logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.nn import logsumexp
from jaxtyping import Array, Float

from vi.errors import AddressError
from vi.expectation import sample, vmap
from vi.genjax_programs import is_generative_function
from vi.programs import Program, Site, Trace, WeightedProgram, complete, log_density, sim, sites
from vi.strategies import enum

Params = Mapping[str, Any] | None
LogWeight = Float[Array, ""]


@dataclass(frozen=True)
class importance:
    """Importance sampling with n particles from `proposal`.

    proposal: a program that draws what is to be inferred, None for its prior, that is each choice given those before it.
    In `marginal` its arguments are (trace of the kept choices, *args), in `normalize` they are *args.
    Raises ValueError if n is not a positive integer.
    """

    n: int
    proposal: Program | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"importance: n is {self.n!r}, expected a positive integer")


@dataclass(frozen=True, eq=False)
class Marginal(WeightedProgram):
    """The law of the choices at the addresses `keep` of a program.  Made by `marginal`."""

    program: Program
    keep: tuple[str, ...]
    algorithm: importance

    def simulate(self, params: Params, *args: Any) -> tuple[Trace, LogWeight]:
        proposal = self.algorithm.proposal
        if proposal is None:
            full, found = complete(self.program, params)({}, *args)
            kept, _ = self._parts(full)
            true = _total(found, lambda a, site: site.is_observed or self._is_kept(a))
        else:
            full, log_joint = sim(self.program, params)(*args)
            kept, rest = self._parts(full)
            true = log_joint - log_density(proposal, params)(rest, kept, *args)
        # 1/w is unbiased for 1/ρ only with the choices that really were made among the particles.
        return kept, _log_mean_exp(true, self._fresh(params, kept, args, self.algorithm.n - 1))

    def estimate(self, params: Params, trace: Mapping[str, Any], *args: Any) -> LogWeight:
        if set(trace) != set(self.keep):
            raise AddressError(f"marginal: the trace has addresses {sorted(trace)}, expected {sorted(self.keep)}")
        return _log_mean_exp(None, self._fresh(params, trace, args, self.algorithm.n))

    def addresses(self, params: Params, *args: Any) -> tuple[str, ...]:
        return self.keep

    def _fresh(
        self, params: Params, kept: Mapping[str, Any], args: tuple[Any, ...], n: int
    ) -> Float[Array, " n"] | None:
        """Log weights of n particles of the other choices, given the kept ones."""
        proposal = self.algorithm.proposal

        def weight() -> LogWeight:
            if proposal is None:
                _, found = complete(self.program, params)(kept, *args)
                return _total(found, lambda a, site: site.is_observed or self._is_kept(a))
            rest, log_r = sim(proposal, params)(kept, *args)
            return log_density(self.program, params)(Trace(kept) | rest, *args) - log_r

        return vmap(weight, axis_size=n)() if n else None

    def _is_kept(self, address: str) -> bool:
        return any(a == address or a.startswith(f"{address}/") for a in self.keep)

    def _parts(self, full: Trace) -> tuple[Trace, Trace]:
        if unknown := [a for a in self.keep if a not in full]:
            raise AddressError(f"marginal: keep has {unknown}, but the program draws {sorted(full)}")
        return full.select(lambda a: a in self.keep), full.select(lambda a: a not in self.keep)


def marginal(
    program: Program, keep: str | tuple[str, ...] | list[str], algorithm: importance = importance(1)
) -> Marginal:
    """The program that runs `program` and keeps the choices at the addresses `keep`; the others, u, are integrated out.

    log_density(y)   log (1/m) Σ_i p(y, u_i)/r(u_i; y)  with u_i ~ r(·; y), m = algorithm.n
    sim              the same with the u that came with y in place of u_1

    r is the algorithm's proposal; without one, each choice of u is drawn given those before it in the program, so that
    p/r is the density of the kept choices and observations.
    Raises AddressError if the program lacks an address of `keep`, TypeError if there is no proposal and the program is not a
    NumPyro program.  Source: Becker et al. 2024, `marginal`.
    """
    _check_algorithm("marginal", program, algorithm)
    names = (keep,) if isinstance(keep, str) else tuple(keep)
    if not names or len(set(names)) != len(names) or not all(isinstance(a, str) for a in names):
        raise ValueError(f"marginal: keep is {keep!r}, expected an address or different addresses")
    return Marginal(program, names, algorithm)


@dataclass(frozen=True, eq=False)
class Normalized(WeightedProgram):
    """The law of the choices of a program given its observations, approximately.  Made by `normalize`."""

    target: Program
    algorithm: importance

    def simulate(self, params: Params, *args: Any) -> tuple[Trace, LogWeight]:
        n = self.algorithm.n
        traces, log_targets, log_weights = vmap(lambda: self.particle(params, args), axis_size=n)()
        chosen = 0 if n == 1 else sample(enum(dist.Categorical(logits=log_weights)), name="resampled particle")
        trace = jax.tree.map(lambda rows: rows[chosen], traces)
        return trace, log_targets[chosen] - _log_mean_exp(None, log_weights)

    def estimate(self, params: Params, trace: Mapping[str, Any], *args: Any) -> LogWeight:
        proposal, n = self.algorithm.proposal, self.algorithm.n
        if proposal is None:
            found = sites(self.target, params)(trace, *args)
            log_target, own = _total(found), _total(found, lambda _, site: site.is_observed)
        else:
            log_target = log_density(self.target, params)(trace, *args)
            own = log_target - log_density(proposal, params)(trace, *args)
        fresh = vmap(lambda: self.particle(params, args)[2], axis_size=n - 1)() if n > 1 else None
        return log_target - _log_mean_exp(own, fresh)

    def particle(self, params: Params, args: tuple[Any, ...]) -> tuple[Trace, LogWeight, LogWeight]:
        """(trace, log density of the target, log weight) of one draw from the proposal."""
        if self.algorithm.proposal is None:
            trace, found = complete(self.target, params)({}, *args)
            return trace, _total(found), _total(found, lambda _, site: site.is_observed)
        trace, log_q = sim(self.algorithm.proposal, params)(*args)
        log_target = log_density(self.target, params)(trace, *args)
        return trace, log_target, log_target - log_q


def normalize(target: Program, algorithm: importance) -> Normalized:
    """The program that approximates the law of the choices z of `target` given its observations and factors, by sampling
    importance resampling: of N = algorithm.n particles with weights w_i = p̃(z_i)/q(z_i) one is kept with probability ∝ w.

    sim              (z_J, log p̃(z_J) - log (1/N) Σ w_i); the index J is enumerated, so gradients through it are exact
    log_density(z)   the same with z as the first particle and N - 1 fresh ones

    q is the algorithm's proposal, called with the arguments of the target, or the target's prior.
    Raises TypeError as `marginal` does.  Source: Becker et al. 2024, `normalize` with SIR.
    """
    _check_algorithm("normalize", target, algorithm)
    return Normalized(target, algorithm)


def log_normalizer(target: Program, algorithm: importance, params: Params = None) -> Callable[..., LogWeight]:
    """The function (*args) -> log (1/N) Σ w_i whose exponential is unbiased for the integral of the target's density (the
    evidence, if the target is a model with its data), with fresh particles as in `normalize`."""
    made = normalize(target, algorithm)

    def estimate(*args: Any) -> LogWeight:
        return _log_mean_exp(None, vmap(lambda: made.particle(params, args)[2], axis_size=algorithm.n)())

    return estimate


@dataclass(frozen=True, eq=False)
class Bound(WeightedProgram):
    """A program with its first arguments given.  Made by `bind`."""

    program: Program
    first: tuple[Any, ...]

    def simulate(self, params: Params, *args: Any) -> tuple[Trace, LogWeight]:
        return sim(self.program, params)(*self.first, *args)

    def estimate(self, params: Params, trace: Mapping[str, Any], *args: Any) -> LogWeight:
        return log_density(self.program, params)(trace, *self.first, *args)


def bind(program: Program, *first: Any) -> Program:
    """`program` with its first arguments given, as functools.partial does for functions, for any kind of program."""
    return Bound(program, first)


def _log_mean_exp(first: LogWeight | None, others: Float[Array, " n"] | None) -> LogWeight:
    """log of the mean of the exponentials of all log weights; of a single one exactly that one."""
    parts = [jnp.reshape(part, (-1,)) for part in (first, others) if part is not None]
    log_weights = jnp.concatenate(parts)
    n = log_weights.shape[0]
    return log_weights[0] if n == 1 else logsumexp(log_weights) - jnp.log(n)


def _total(found: Mapping[str, Site], keep: Any = lambda address, site: True) -> LogWeight:
    terms = [site.log_prob for address, site in found.items() if keep(address, site)]
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros(())


def _check_algorithm(caller: str, program: Any, algorithm: Any) -> None:
    if not isinstance(algorithm, importance):
        raise TypeError(f"{caller}: algorithm is a {type(algorithm).__name__}, expected importance(n, proposal)")
    if algorithm.proposal is None and (isinstance(program, WeightedProgram) or is_generative_function(program)):
        raise TypeError(
            f"{caller}: a {type(program).__name__} has no prior to propose from; give importance a proposal"
        )
