"""Other libraries that results are compared with: how to import them, and one interface over their versions.

neural-tangents   kernels of infinitely wide networks, and empirical ones        `neural_tangents`
genjax            generative functions: densities and simulation                 `genjax`, `simulate`, `assess`

Both are optional, and only comparisons need them.  The interface to genjax covers both programs of that name, release 0.10
(for jax 0.5) and 1.0, a rewrite (for jax 0.11).  Other peers need no adapter and are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, ArrayLike, Float, Key

Choices = dict[str, Any] | ArrayLike
"""Values of the random choices by address, nested as the calls are; of a single distribution the value itself."""

_GET_NEURAL_TANGENTS = "pip install --no-deps neural-tangents frozendict (TensorFlow is not needed)"
_GET_GENJAX = 'it is in the extra "peers": pip install "proofstone[peers]"'


class Simulation(NamedTuple):
    """One run of a generative function: its choices, their log density, and what the function returned."""

    choices: Choices
    log_density: Float[Array, ""]
    value: Any


def neural_tangents() -> ModuleType:
    """The module neural_tangents, imported without TensorFlow where that is absent.

    Only the sub-package `neural_tangents.experimental` uses TensorFlow (and tf2jax), but the package imports it.  If one
    of the two is missing, an empty module stands in for it during the import; importing the sub-package afterwards says
    what is missing.  With jax 0.5.3, `empirical_ntk_fn` fails for structured derivatives; its other implementations work.
    Raises ImportError if neural-tangents is not installed, or if it cannot be imported with this jax: release 0.6.5
    reads names that jax moved in 0.6.
    """
    name = "neural_tangents"
    placeholder = f"{name}.experimental"
    lacking = any(importlib.util.find_spec(needed) is None for needed in ("tensorflow", "tf2jax"))
    if name in sys.modules or not lacking:
        return _peer(name, "neural-tangents", _GET_NEURAL_TANGENTS, "it needs jax 0.5")
    sys.modules[placeholder] = ModuleType(placeholder)
    try:
        return _peer(name, "neural-tangents", _GET_NEURAL_TANGENTS, "it needs jax 0.5")
    finally:
        # Left there, it would hide the true reason from whoever imports the sub-package.
        del sys.modules[placeholder]


def genjax() -> ModuleType:
    """The module genjax.  Raises ImportError if it is not installed or cannot be imported with this jax."""
    return _peer("genjax", "genjax", _GET_GENJAX, "genjax 0.10 needs jax 0.5, genjax 1.0 needs jax 0.11")


def genjax_version() -> tuple[int, ...]:
    """The version of the installed genjax, (0, 10, 3) for example.  Raises ImportError if there is none."""
    try:
        version = metadata.version("genjax")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"genjax is not installed: {_GET_GENJAX}") from error
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def simulate(key: Key[Array, ""], generative_function: Any, args: tuple[Any, ...]) -> Simulation:
    """Run a generative function (a program under `genjax.gen`, or a distribution of genjax) on `args`.

    The density is that of all choices, with respect to the product of the Lebesgue and counting measures.  jit and vmap
    over `key` work.  Raises ImportError as `genjax` does, TypeError if `generative_function` or `args` is something
    else, and with genjax 0.10 ValueError if it depends on a value which choices are made (`or_else` for example).
    """
    module = genjax()
    _check("simulate", generative_function, args)
    if genjax_version() < (1,):
        trace = generative_function.simulate(key, args)
        return Simulation(_by_name(trace.get_choices()), trace.get_score(), trace.get_retval())
    trace = module.seed(generative_function.simulate)(key, *args)
    # Since 1.0 the score is the logarithm of the inverse density.
    return Simulation(trace.get_choices(), -trace.get_score(), trace.get_retval())


def assess(generative_function: Any, args: tuple[Any, ...], choices: Choices) -> Float[Array, ""]:
    """The log density of all random choices of a generative function, run on `args`; measure as in `simulate`.

    A missing choice is genjax's KeyError or MissingAddress; one at an address that the function does not visit is
    ignored by genjax.  Its distributions compute in float32 unless an array among their arguments is wider.  jit, vmap
    and grad work.  Raises ImportError and TypeError as `simulate` does.
    """
    module = genjax()
    _check("assess", generative_function, args)
    if genjax_version() < (1,):
        by_name = isinstance(choices, dict)
        choice_map = module.ChoiceMap.d(choices) if by_name else module.ChoiceMap.choice(choices)
        return generative_function.assess(choice_map, args)[0]
    return generative_function.assess(choices, *args)[0]


def _peer(name: str, distribution: str, install: str, needs: str) -> ModuleType:
    """Import a peer, or say how to get it, or which jax it needs."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise ImportError(f"{distribution} is not installed: {install}", name=name) from error
        version = metadata.version(distribution)
        raise ImportError(
            f"{distribution} {version} cannot be imported with jax {jax.__version__} ({needs}): {error}", name=name
        ) from error


def _check(caller: str, generative_function: Any, args: Any) -> None:
    if not (hasattr(generative_function, "assess") and hasattr(generative_function, "simulate")):
        given = type(generative_function).__name__
        raise TypeError(f"{caller}: generative_function is a {given}, expected a generative function (genjax.gen)")
    if not isinstance(args, tuple):
        raise TypeError(f"{caller}: args is a {type(args).__name__}, expected the tuple of its arguments")


def _by_name(choice_map: Any) -> Choices:
    """A choice map of genjax 0.10 as nested dicts."""
    leaves = jax.tree_util.tree_flatten_with_path(choice_map)[0]
    choices: dict[str, Any] = {}
    for path, value in leaves:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        # A value has field v, a map by name has field mapping; every other kind of map has more.
        if len(names) + len(fields) != len(path) or set(fields) - {"mapping", "v"}:
            address = jax.tree_util.keystr(path)
            raise ValueError(f"simulate: the choice at {address} is not addressed by names alone")
        if not names:
            return value
        inner = choices
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
    return choices
