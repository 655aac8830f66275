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
from vi.errors import StrategyError
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

    def __call__(self, key: Key[Array, ""], *args: Any, **kwargs: Any) -> Float[Array, ""]:
        return self._surrogate(key, args, kwargs).value

    def __neg__(self) -> Expectation:
        """E[-f]: what is maximised as a loss."""
        return replace(self, f=lambda *args, **kwargs: -self.f(*args, **kwargs))

    def baseline_loss(self, key: Key[Array, ""], *args: Any, **kwargs: Any) -> Float[Array, ""]:
        """Σ (result - b)² over the baselines b of `reinforce` in this run; only b is differentiated.

        Added to the loss with the same key, it trains baselines that are computed from parameters; the gradient of the
        expectation itself does not depend on them.
        """
        return self._surrogate(key, args, kwargs).baseline_loss

    def _surrogate(self, key: Key[Array, ""], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Surrogate:
        if jaxpr.is_staging():
            raise StrategyError(
                "expectation: called inside another expectation, where an estimate would pass for the value in whatever is "
                "not linear; to average over all draws together call its function, `e.f(...)` without a key"
            )
        key = _typed(key)
        program, arrays = self._staged(args, kwargs)
        return surrogate(program, arrays, key, dict(self.strategies), self.max_worlds)

    def with_strategies(self, strategies: Mapping[str, str]) -> Expectation:
        """The same expectation with other estimators for the choices of these labels (addresses, names)."""
        return replace(self, strategies={**self.strategies, **strategies})

    def sites(self, *args: Any, **kwargs: Any) -> list[Site]:
        """The random choices of f at these arguments, in the order of sampling, each with its estimator."""
        program, _ = self._staged(args, kwargs)
        return list(plan(program, dict(self.strategies), self.max_worlds).sites.values())

    def _staged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[jaxpr.Program, list[Any]]:
        traced, static = eqx.partition((args, kwargs), _is_traced)
        leaves, structure = jax.tree.flatten(traced)

        def flat(*leaves: Any) -> Any:
            args, kwargs = eqx.combine(jax.tree.unflatten(structure, leaves), static)
            return self.f(*args, **kwargs)

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
        axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
        traced, static = eqx.partition(args, _is_traced)
        size = _rows(jax.tree.leaves(traced), _by_leaf(axes, traced), in_axes)
        keys = jax.random.split(_typed(key), size)
        return jax.vmap(lambda k, *a: e(k, *eqx.combine(a, static)), in_axes=(0, *axes))(keys, *traced)

    return batched


def vmap(f: Callable[..., Any], in_axes: Any = 0, axis_size: int | None = None) -> Callable[..., Any]:
    """jax.vmap for functions that draw inside an expectation: lanes with randomness of their own.

    jax.vmap gives every lane its own randomness as well; this one also keeps the lanes apart in the program, which the
    baseline leave_one_out needs.  Outputs have the lanes first.  axis_size: number of lanes, needed if no argument has them.
    """

    def mapped(*args: Any) -> Any:
        axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
        leaves, structure = jax.tree.flatten(args)
        by_leaf = _by_leaf(axes, args)
        size = axis_size if axis_size is not None else _rows(leaves, by_leaf, in_axes)
        rows = [jnp.moveaxis(x, a, 0) for x, a in zip(leaves, by_leaf, strict=True) if a is not None]

        def lane(row: Any) -> Any:
            mine = iter(row)
            each = [x if a is None else next(mine) for x, a in zip(leaves, by_leaf, strict=True)]
            return f(*jax.tree.unflatten(structure, each))

        return jaxpr.lanes(lane, size, rows)

    return mapped


def continuous(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` marked as continuous in its array arguments, in spite of comparisons, roundings or indices inside.

    A pathwise draw may then flow through it.  The mark is a promise: of a function that jumps, the gradient is wrong.
    """
    return jaxpr.continuous(f)


def _by_leaf(axes: tuple[Any, ...], args: tuple[Any, ...]) -> list[int | None]:
    """The axis of every leaf of the arguments; an axis stands for all that is below it, as in jax.vmap."""
    if len(axes) != len(args):
        raise ValueError(f"in_axes: has {len(axes)} entries for {len(args)} arguments")

    def spread(axis: Any, x: Any) -> list[int | None]:
        tops, structure = jax.tree.flatten(axis, is_leaf=lambda a: a is None)
        return [a for a, part in zip(tops, structure.flatten_up_to(x), strict=True) for _ in jax.tree.leaves(part)]

    return [a for axis, x in zip(axes, args, strict=True) for a in spread(axis, x)]


def _rows(leaves: list[Any], axes: list[int | None], in_axes: Any) -> int:
    sizes = {jnp.shape(x)[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    if len(sizes) != 1:
        raise ValueError(f"in_axes: {in_axes} gives {sorted(sizes) or 'no'} rows; expected one number of rows")
    return sizes.pop()


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex)


def _typed(key: Any) -> jax.Array:
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype != jnp.uint32:
        raise TypeError(
            f"expectation: the first argument is a key of jax.random, got {type(key).__name__} {dtype or ''}"
        )
    return jax.random.wrap_key_data(key)
