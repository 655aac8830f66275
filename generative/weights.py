"""Files of trained diffusion models, and those that come with the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from generative import fidelity, gbm_diffusion, nets, positive
from generative.losses import Parametrised
from theory import checkpoint as files

_FORMAT = 1

# What a file may name: nothing else is ever built from one.
NETWORKS: Mapping[str, Callable[..., Any]] = {
    "UNet": nets.UNet,
    "MLP": nets.MLP,
    "Classifier": fidelity.Classifier,
}
PROCESSES: Mapping[str, Callable[..., Any]] = {
    "geometric": gbm_diffusion.geometric,
    "GeometricBrownianMotion": gbm_diffusion.GeometricBrownianMotion,
    "GeometricOrnsteinUhlenbeck": gbm_diffusion.GeometricOrnsteinUhlenbeck,
}
MAPS: Mapping[str, Callable[..., Any]] = {"shift": positive.shift, "contrast": positive.contrast}


class Model(NamedTuple):
    """log_score  (y, t, label) -> s_Y
    positive   the map between data and the positive numbers it was trained on
    facts      how it was made
    """

    log_score: Parametrised
    positive: positive.PositiveMap
    facts: dict[str, Any]


def save_model(
    path: str | os.PathLike[str],
    model: Parametrised,
    *,
    network: tuple[str, Mapping[str, Any]],
    process: tuple[str, Mapping[str, float]],
    positive: tuple[str, float],
    **facts: Any,
) -> None:
    """Write a model to an npz file with a JSON header, its matrices and kernels as bytes with a scale to each output.

    network, process, positive  names in NETWORKS, PROCESSES and MAPS and the arguments that make those of the model
    facts                       what should be known of it, such as command="...", seed=0; anything that JSON can hold
    """
    header = {
        "network": [network[0], dict(network[1])],
        "process": [process[0], dict(process[1])],
        "positive": list(positive),
        "form": model.form,
    }
    _write(Path(path), header, (model.network, model.location, model.deviation), facts)


def save_network(
    path: str | os.PathLike[str], network: Any, *, made: tuple[str, Mapping[str, Any]], **facts: Any
) -> None:
    """Write a network alone, such as a classifier: `made` is its name in NETWORKS and the arguments that make it."""
    _write(Path(path), {"network": [made[0], dict(made[1])]}, network, facts)


def load_model(name: str | os.PathLike[str]) -> Model:
    """A model that comes with the package ("gbm_mnist"), or that `save_model` wrote.

    name  one of these, or the path of a file: a path object, or a string that ends in ".npz"
    Raises ValueError for another name, and for a file that is none.
    """
    header, arrays = _read(_path(name), "load_model", ("network", "process", "positive", "form"))
    network = _blank(header)
    kind, arguments = header["process"]
    process = _known("load_model", "process", PROCESSES, kind)(**arguments)
    map_name, number = header["positive"]
    there = _known("load_model", "positive", MAPS, map_name)(number)
    blank = jax.tree.leaves(network)
    location, deviation = (jnp.asarray(a, jnp.float32) for a in arrays[len(blank) :])
    filled = _filled(_path(name), "load_model", network, arrays[: len(blank)])
    return Model(Parametrised(filled, process, location, deviation, header["form"]), there, header["facts"])


def load_network(name: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """(network, facts) of a file that `save_network` wrote, or of that name ("features_mnist").  Raises as `load_model`."""
    header, arrays = _read(_path(name), "load_network", ("network",))
    return _filled(_path(name), "load_network", _blank(header), arrays), header["facts"]


def _write(path: Path, header: dict[str, Any], tree: Any, facts: dict[str, Any]) -> None:
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]
    bad = sum(int((~np.isfinite(leaf)).sum()) for leaf in leaves)
    if bad:
        raise ValueError(f"save: {bad} weights are not finite; expected none")
    versions = {package: metadata.version(package) for package in ("jax", "equinox", "optax", "numpy")}
    whole = {"format": _FORMAT, "settings": {}, "versions": versions, "facts": facts, **header}
    arrays = {name: part for i, leaf in enumerate(leaves) for name, part in _packed(f"leaf_{i}", leaf).items()}
    files.write(path, whole, arrays)
    os.chmod(path, 0o644)


def _packed(name: str, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix or kernel as bytes and one scale to each output, all else as it is."""
    if leaf.ndim < 2:
        return {name: leaf}
    largest = np.abs(leaf).max(tuple(range(leaf.ndim - 1)))
    scale = np.where(largest > 0, largest, 1) / 127
    return {name: np.rint(leaf / scale).astype(np.int8), f"{name}_scale": scale.astype(np.float32)}


def _read(path: Path, owner: str, needed: tuple[str, ...]) -> tuple[dict[str, Any], list[np.ndarray]]:
    found = files.read(path, owner, _FORMAT, {})
    if found is None:
        raise ValueError(f"{owner}: there is no file {path}")
    header, arrays = found
    missing = [key for key in needed if key not in header]
    if missing:
        raise ValueError(f"{owner}: {path} does not say its {', '.join(missing)}; expected a file of another kind")
    names = [f"leaf_{i}" for i in range(sum(not name.endswith("_scale") for name in arrays))]
    return header, [np.asarray(arrays[n] * arrays.get(f"{n}_scale", np.float32(1))) for n in names]


def _blank(header: dict[str, Any]) -> Any:
    kind, arguments = header["network"]
    make = _known("load", "network", NETWORKS, kind)
    return eqx.filter_eval_shape(lambda key: make(**arguments, key=key), jax.random.key(0))


def _known(owner: str, what: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{owner}: {what} is {name!r}, expected {', '.join(table)}")
    return table[name]


def _filled(path: Path, owner: str, blank: Any, arrays: list[np.ndarray]) -> Any:
    leaves, structure = jax.tree.flatten(blank)
    if [leaf.shape for leaf in leaves] != [a.shape for a in arrays]:
        raise ValueError(f"{owner}: {path} holds arrays of other shapes than its network has")
    return jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in arrays])


def _path(name: str | os.PathLike[str]) -> Path:
    if not isinstance(name, str) or name.endswith(".npz"):
        return Path(name)
    folder = resources.files("generative") / "weights"
    known = (
        sorted(f.name.removesuffix(".npz") for f in folder.iterdir() if f.name.endswith(".npz"))
        if folder.is_dir()
        else []
    )
    if name not in known:
        raise ValueError(f"load: no model is called {name!r}; there are {known}, and files *.npz")
    return Path(str(folder / f"{name}.npz"))
