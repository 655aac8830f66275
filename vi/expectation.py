"""Expectations as functions of their parameters, with unbiased values and unbiased derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from vi import jaxpr
from vi.choices import opaque_site, random_key, sample
from vi.planning import Site, plan
from vi.surrogate import Surrogate, surrogate

__all__ = ["Expectation", "batch", "continuous", "expectation", "opaque_site", "random_key", "sample", "vmap"]

MAX_WORLDS = 1024


@dataclass(frozen=True, eq=False)
class Expectation:
    """E[f(*args)]: called with a key and the arguments, an unbiased estimate whose derivative is unbiased too.

    Made by `expectation`.  f: what is averaged; strategies: label of a choice -> estimator, instead of what f says;
    max_worlds: how many combinations of values enumeration may hold at a time.
    """

    f: Callable[..., Any]
    strategies: Mapping[str, str] = field(default_factory=dict)
    max_worlds: int = MAX_WORLDS

    def __call__(self, key: Key[Array, ""], *args: Any) -> Float[Array, ""]:
        return self._surrogate(key, *args).value

    def baseline_loss(self, key: Key[Array, ""], *args: Any) -> Float[Array, ""]:
        """Σ (result - b)² over the baselines b of `reinforce` in this run; only b is differentiated.

        Added to the loss with the same key, it trains baselines that are computed from parameters; the gradient of the
        expectation itself does not depend on them.
        """
        return self._surrogate(key, *args).baseline_loss

    def _surrogate(self, key: Key[Array, ""], *args: Any) -> Surrogate:
        program, arrays = self._staged(*args)
        return surrogate(program, arrays, _typed(key), dict(self.strategies), self.max_worlds)

    def with_strategies(self, strategies: Mapping[str, str]) -> Expectation:
        """The same expectation with other estimators for the choices of these labels (addresses, names)."""
        return replace(self, strategies={**self.strategies, **strategies})

    def sites(self, *args: Any) -> list[Site]:
        """The random choices of f at these arguments, in the order of sampling, each with its estimator."""
        program, _ = self._staged(*args)
        return list(plan(program, dict(self.strategies), self.max_worlds).sites.values())

    def _staged(self, *args: Any) -> tuple[jaxpr.Program, list[Any]]:
        traced, static = eqx.partition(args, _is_traced)
        leaves, structure = jax.tree.flatten(traced)

        def flat(*leaves: Any) -> Any:
            return self.f(*eqx.combine(jax.tree.unflatten(structure, leaves), static))

        program, out = jaxpr.stage(flat, *leaves)
        if not (isinstance(out, jax.ShapeDtypeStruct) and out.shape == () and jnp.issubdtype(out.dtype, jnp.floating)):
            found = jax.tree.map(lambda o: f"{o.dtype}{list(o.shape)}", out)
            raise ValueError(f"expectation: the function returns {found}; expected one real scalar")
        return program, [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]


@overload
def expectation(f: Callable[..., Any], *, max_worlds: int = ...) -> Expectation: ...
@overload
def expectation(f: None = None, *, max_worlds: int = ...) -> Callable[[Callable[..., Any]], Expectation]: ...
def expectation(
    f: Callable[..., Any] | None = None, *, max_worlds: int = MAX_WORLDS
) -> Expectation | Callable[[Callable[..., Any]], Expectation]:
    """The function (key, *args) -> scalar whose value estimates E[f(*args)] and whose jax.grad estimates the gradient.

    f           draws with `sample` (or `sim`, which does) and returns a real scalar.  Array leaves of its arguments, and
                Python floats, are traced and can be differentiated; other leaves (functions, strings, ints) are static
    max_worlds  enumerated choices are summed over exactly as long as no value needs more combinations than that at a time;
                beyond, each is enumerated with the others as sampled (unbiased too, but no longer without variance)

    Both the value and the gradient are unbiased under every choice's estimator, in one run.  The function is pure, for use
    under jit, vmap, grad and scan; every estimator but leave_one_out's and mvd's can be differentiated again.  Raises
    StrategyError if an estimator is not legal where it stands, and ValueError if f does not return a real scalar.

    Usable as a decorator: `@expectation` or `@expectation(max_worlds=64)`.
    """
    if f is None:
        return lambda g: expectation(g, max_worlds=max_worlds)
    if not callable(f):
        raise TypeError(f"expectation: f is a {type(f).__name__}; expected a function")
    return Expectation(f, max_worlds=max_worlds)


def batch(e: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    """(key, *args) -> one value per row: `e` for every row, with a key of its own.

    in_axes is that of jax.vmap for the arguments after the key: one number or None for all, or a tuple.  Averaging after
    `batch` keeps the estimators of the rows apart; one expectation over all rows multiplies every score with every cost.
    """

    def batched(key: Key[Array, ""], *args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        traced, static = eqx.partition(args, _is_traced)
        size = _rows(traced, axes)
        keys = jax.random.split(_typed(key), size)
        return jax.vmap(lambda k, *a: e(k, *eqx.combine(a, static)), in_axes=(0, *axes))(keys, *traced)

    return batched


def vmap(f: Callable[..., Any], in_axes: Any = 0, axis_size: int | None = None) -> Callable[..., Any]:
    """jax.vmap for functions that draw inside an expectation: lanes with randomness of their own.

    jax.vmap gives every lane its own randomness as well; this one also keeps the lanes apart in the program, which the
    baseline leave_one_out needs.  Outputs have the lanes first.  axis_size: number of lanes, needed if no argument has them.
    """

    def mapped(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        size = axis_size if axis_size is not None else _rows(args, axes)
        shared = [None if a is not None else x for x, a in zip(args, axes, strict=True)]
        rows = [None if a is None else _lanes_first(x, a) for x, a in zip(args, axes, strict=True)]

        def lane(row: Any) -> Any:
            return f(*(s if a is None else r for s, r, a in zip(shared, row, axes, strict=True)))

        return jaxpr.lanes(lane, size, rows)

    return mapped


def continuous(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` marked as continuous in its array arguments, in spite of comparisons, roundings or indices inside.

    A pathwise draw may then flow through it.  The mark is a promise: of a function that jumps, the gradient is wrong.
    """
    return jaxpr.continuous(f)


def _lanes_first(x: Any, axis: Any) -> Any:
    if isinstance(axis, int):
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), x)
    return jax.tree.map(lambda a, leaf: jnp.moveaxis(leaf, a, 0), axis, x)


def _rows(args: Any, axes: tuple[Any, ...]) -> int:
    sizes = set()
    for x, axis in zip(args, axes, strict=True):
        if axis is not None:
            found = _lanes_first(x, axis)
            sizes |= {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(found)}
    if len(sizes) != 1:
        raise ValueError(f"in_axes: {axes} gives {sorted(sizes) or 'no'} rows; expected one number of rows")
    return sizes.pop()


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex)


def _typed(key: Any) -> jax.Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
