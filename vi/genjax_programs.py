"""Generative functions of genjax, as programs: one choice each, of all their addresses at once.

Both programs of that name are understood, release 0.10 (for jax 0.5) and 1.0, a rewrite (for jax 0.11); genjax is imported
only where one of its functions is used.  Addresses of calls inside calls are joined by "/".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vi.errors import AddressError
from vi.expectation import opaque_site

Choices = dict[str, Any]


def is_generative_function(program: Any) -> bool:
    """Whether `program` is a generative function of genjax (a function under `genjax.gen`, or built from such)."""
    return (
        type(program).__module__.split(".")[0] == "genjax"
        and hasattr(program, "assess")
        and hasattr(program, "simulate")
    )


def simulate(program: Any, args: tuple[Any, ...]) -> tuple[Choices, Float[Array, ""]]:
    """(choices by address, log density) of one run inside an expectation, differentiated by the score function."""
    leaves, structure = jax.tree.flatten(args)

    def draw(leaves: Any, key: Key[Array, ""]) -> Choices:
        return _flat(_run(program, jax.tree.unflatten(structure, leaves), key))

    def score(leaves: Any, values: Choices) -> Float[Array, ""]:
        return _assess(program, jax.tree.unflatten(structure, leaves), values)

    # What is not an array (functions, integers that shapes depend on) is part of the choice, not of its parameters.
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def whole(arrays: Any) -> list[Any]:
        given = iter(arrays)
        return [next(given) if _is_array(leaf) else leaf for leaf in leaves]

    values = opaque_site(
        lambda a, key: draw(whole(a), key), lambda a, v: score(whole(a), v), arrays, name=_name(program)
    )
    return values, score(leaves, values)


def assess(program: Any, trace: Mapping[str, Any], args: tuple[Any, ...]) -> Float[Array, ""]:
    """The log density of all choices of a generative function.  Raises AddressError if the trace has other addresses."""
    expected = jax.eval_shape(lambda: _flat(_run(program, args, jax.random.key(0))))
    missing, extra = [a for a in expected if a not in trace], [a for a in trace if a not in expected]
    parts = []
    if missing:
        parts.append(
            f"drawn by the program but missing from the trace: {', '.join(map(repr, missing))} (is its observation missing?)"
        )
    if extra:
        parts.append(f"in the trace but not drawn by the program: {', '.join(map(repr, extra))}")
    parts += [
        f"the trace has a value of shape {jnp.shape(trace[a])} at '{a}', expected {s.shape}"
        for a, s in expected.items()
        if a in trace and jnp.shape(trace[a]) != s.shape
    ]
    if parts:
        raise AddressError(f"{_name(program)}: " + "; ".join(parts))
    return _assess(program, args, dict(trace))


def _run(program: Any, args: tuple[Any, ...], key: Key[Array, ""]) -> Any:
    """The choices of one run, nested dicts."""
    if _before_1(program):
        return _by_name(program.simulate(key, args).get_choices())
    import genjax

    return genjax.seed(program.simulate)(key, *args).get_choices()


def _assess(program: Any, args: tuple[Any, ...], values: Choices) -> Float[Array, ""]:
    nested = _nested(values)
    if _before_1(program):
        import genjax

        return program.assess(genjax.ChoiceMap.d(nested), args)[0]
    return program.assess(nested, *args)[0]


def _before_1(program: Any) -> bool:
    """Whether it is of release 0.10, whose arguments come in a tuple and whose choices are ChoiceMaps."""
    import genjax

    return not hasattr(genjax, "seed")


def _by_name(choice_map: Any) -> Any:
    """A ChoiceMap of genjax 0.10 as nested dicts."""
    choices: dict[str, Any] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(choice_map)[0]:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        # A value has field v, a map by name has field mapping; every other kind of map has more.
        if len(names) + len(fields) != len(path) or set(fields) - {"mapping", "v"}:
            raise AddressError(f"genjax: the choice at {jax.tree_util.keystr(path)} is not addressed by names alone")
        inner: Any = choices
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        if not names:
            return value
        inner[names[-1]] = value
    return choices


def _flat(choices: Any, prefix: str = "") -> Choices:
    if not isinstance(choices, dict):
        raise AddressError("genjax: a distribution alone has no address; put it into a function under genjax.gen")
    flat: Choices = {}
    for name, value in choices.items():
        if not isinstance(name, str):
            raise AddressError(f"genjax: address {name!r} is not a string")
        flat.update(_flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _nested(values: Choices) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for address, value in values.items():
        *outer, name = address.split("/")
        inner = nested
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return nested


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, float) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))


def _name(program: Any) -> str:
    source = getattr(program, "source", program)
    source = getattr(source, "fn", source)  # 0.10 keeps the function in a closure
    return getattr(source, "__name__", type(program).__name__)
