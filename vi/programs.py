"""Programs as densities: `sim` runs one and returns its choices with their density, `log_density` scores given choices.

A program is an ordinary NumPyro program, a generative function of genjax, or what `vi.marginal` and `vi.normalize`
return.  These are the transformations *sim* and *density* of "Probabilistic Programming with Programmable Variational
Inference" (Becker et al., PLDI 2024): every random choice of `sim` is a `vi.sample`, so that the gradient of an
expectation that calls it is derived from the program, and both are ordinary JAX code otherwise.

A NumPyro program is run under one effect handler of ours.  Handlers inside the program, or wrapped around it
(`handlers.condition(model, ...)`), mean what they mean in NumPyro; those in force where `sim` or `log_density` is called do
not reach into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpyro.handlers
from jaxtyping import Array, Float, Key
from numpyro.primitives import Messenger

from vi import genjax_programs
from vi.errors import AddressError
from vi.handler import Runner
from vi.jaxpr import traced_afresh
from vi.traces import Site, Strategy, Trace, WeightedProgram, WeightedSite

__all__ = [
    "Program",
    "Site",
    "Trace",
    "WeightedProgram",
    "WeightedSite",
    "complete",
    "log_density",
    "scale_observations",
    "sim",
    "sites",
]

Program = Any  # a callable with NumPyro sites, a WeightedProgram, or a generative function of genjax


# ---- the public functions ----------------------------------------------------------------------------------------------


def sim(
    program: Program, params: Mapping[str, Any] | None = None, *, strategy: Strategy | None = None
) -> Callable[..., tuple[Trace, Float[Array, ""]]]:
    """The function (*args) -> (trace, log q): one run of `program` on `args`, and the log density of its trace.

    log q counts observations and factors, with scales and masks as NumPyro does.  Call it inside `vi.expectation`.  If a
    site's density is an estimate (`vi.marginal`, `vi.normalize`), then q is one with E[1/q | trace] = 1/density.
    params: values of `numpyro.param` sites by name.  strategy: the estimator of every random choice, for example `vi.mvd`,
    in place of those that the program states.
    Raises AddressError for names used twice, missing parameters, and sites where their values would be lost.
    Source: Becker et al. 2024, transformation *sim*.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Trace, Float[Array, ""]]:
        if isinstance(program, WeightedProgram):
            _no_strategy(strategy, program)
            return program.simulate(params, *args, **kwargs)
        if genjax_programs.is_generative_function(program):
            _no_strategy(strategy, program)
            values, log_q = genjax_programs.simulate(program, args)
            return Trace(values), log_q
        done = _run(program, args, kwargs, params, {}, draw=True, strategy=strategy)
        return done.trace(), done.log_prob()

    return run


def log_density(program: Program, params: Mapping[str, Any] | None = None) -> Callable[..., Float[Array, ""]]:
    """The function (trace, *args) -> log density of `program` on `args` at the choices in `trace` (any mapping).

    Observations and factors count, with scales and masks as NumPyro does.  Indices of a subsampled plate that the trace
    lacks are drawn anew; otherwise nothing is drawn, and it is plain JAX code, for use outside an expectation as well,
    unless a site's density is an estimate: then its exponential is unbiased for the density.
    params: values of `numpyro.param` sites by name.
    Raises AddressError if addresses of the program and of the trace differ, if a value has another shape than its site,
    and as `sim` does; SupportError if `sim` drew a value from a support that is not inside the site's.
    Source: Becker et al. 2024, transformation *density*.
    """

    def score(trace: Mapping[str, Any], *args: Any, **kwargs: Any) -> Float[Array, ""]:
        _check_trace("log_density", trace)
        if isinstance(program, WeightedProgram):
            return program.estimate(params, trace, *args, **kwargs)
        if genjax_programs.is_generative_function(program):
            return genjax_programs.assess(program, trace, args)
        return _run(program, args, kwargs, params, trace, draw=False).log_prob()

    return score


def sites(program: Program, params: Mapping[str, Any] | None = None) -> Callable[..., dict[str, Site]]:
    """As `log_density` of a NumPyro program, but returns every site with its distribution, in the program's order."""

    def score(trace: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Site]:
        _check_trace("sites", trace)
        _check_numpyro("sites", program)
        return _run(program, args, kwargs, params, trace, draw=False).sites

    return score


def complete(program: Program, params: Mapping[str, Any] | None = None) -> Callable[..., tuple[Trace, dict[str, Site]]]:
    """The function (trace, *args) -> (trace, sites) that draws the choices that `trace` lacks in a NumPyro program, each
    given those before it, and returns the completed trace with every site.  Call it inside `vi.expectation`."""

    def run(trace: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Trace, dict[str, Site]]:
        _check_trace("complete", trace)
        _check_numpyro("complete", program)
        done = _run(program, args, kwargs, params, trace, draw=True)
        return done.trace(), done.sites

    return run


def scale_observations(program: Program, scale: Any) -> Program:
    """The NumPyro program with the log density of its observations and factors multiplied by `scale` (M/m for m of M data)."""

    def scaled(*args: Any, **kwargs: Any) -> Any:
        with _ScaleObservations(scale):
            return program(*args, **kwargs)

    _check_numpyro("scale_observations", program)
    scaled.__name__ = _name(program)
    return scaled


def fix_subsamples(program: Program, key: Key[Array, ""]) -> Program:
    """The NumPyro program with the subsamples of its plates drawn by this key: the same in every evaluation of its density.

    Raises TypeError if the density at a site is an estimate, which would still be another one in every evaluation.
    """

    def fixed(*args: Any, **kwargs: Any) -> Any:
        with _FixSubsamples(rng_seed=key):
            return program(*args, **kwargs)

    _check_numpyro("fix_subsamples", program)
    fixed.__name__ = _name(program)
    return fixed


# ---- running a NumPyro program -----------------------------------------------------------------------------------------


def _run(
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Mapping[str, Any] | None,
    given: Mapping[str, Any],
    *,
    draw: bool,
    strategy: Strategy | None = None,
) -> Runner:
    """Run a program to its end; choices at the addresses of `given` are read, the others drawn if `draw`."""
    _check_numpyro("sim" if draw else "log_density", program)
    runner = Runner(_name(program), params or {}, given, draw, strategy)
    try:
        with runner, traced_afresh():
            program(*args, **kwargs)
    except AddressError:
        raise
    except Exception as error:
        # It may have stumbled over a value that stands in for a missing one.
        if runner.missing and (mismatch := runner.mismatch()) is not None:
            raise mismatch from error
        raise
    if (mismatch := runner.mismatch()) is not None:
        raise mismatch
    return runner


class _ScaleObservations(Messenger):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            msg["scale"] = self.scale if msg["scale"] is None else self.scale * msg["scale"]


class _FixSubsamples(numpyro.handlers.seed):
    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and isinstance(msg["fn"], WeightedSite):
            raise TypeError(f"the density at '{msg['name']}' is an estimate; expected densities that are known")
        super().process_message(msg)


def _name(program: Any) -> str:
    while isinstance(program, Messenger) and program.fn is not None:
        program = program.fn
    return getattr(program, "__name__", type(program).__name__)


def _check_numpyro(caller: str, program: Any) -> None:
    if isinstance(program, WeightedProgram) or genjax_programs.is_generative_function(program) or not callable(program):
        raise TypeError(f"{caller}: program is a {type(program).__name__}, expected a function with NumPyro sites")


def _check_trace(caller: str, trace: Any) -> None:
    if not isinstance(trace, Mapping):
        raise TypeError(
            f"{caller}: trace is a {type(trace).__name__}, expected a mapping from address to value as the first argument"
        )


def _no_strategy(strategy: Strategy | None, program: Any) -> None:
    if strategy is not None:
        raise TypeError(f"sim: strategy applies to NumPyro programs, not to a {type(program).__name__}")
