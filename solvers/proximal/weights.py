"""Files of learned proximal networks, and those that come with the package."""

from __future__ import annotations

import os
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp

from solvers import array_files
from solvers.proximal.network import Layer, LearnedProximal


def save(path: str | os.PathLike[str], network: LearnedProximal, **facts: Any) -> None:
    """Write a network to an npz file with a JSON header, whole or not at all.

    facts  what should be known of it, such as command="...", seed=0, range=[0, 1]; anything that JSON can hold.  The versions of
           Python's packages at work are added.  range, least and largest entry of the training signals, is what `load` takes for
           the network's `box`; if not given, it is that of the network, if it has one.
    Raises ValueError for another range than two numbers.
    """
    if "range" not in facts and network.box is not None:
        facts["range"] = list(network.box)
    if _box(facts) is False:
        raise ValueError(f"save: range is {facts['range']!r}, expected [least, largest] entry of a training signal")
    layers = [
        {
            "weight": list(layer.weight.shape),
            "skip": None if layer.skip is None else list(layer.skip.shape),
            "bias": None if layer.bias is None else list(layer.bias.shape),
            "stride": layer.stride,
            "padding": layer.padding,
            "resized": layer.resized,
        }
        for layer in network.layers
    ]
    form = {
        "layers": layers,
        "output": len(network.output),
        "output_skip": None if network.output_skip is None else len(network.output_skip),
        "constant": network.constant is not None,
        "shape": list(network.shape),
        "beta": network.beta,
        "alpha": network.alpha,
        "kept": network.kept,
        "dtype": network.output.dtype.name,
    }
    versions = {name: metadata.version(name) for name in ("jax", "equinox", "optax", "numpy")}
    array_files.write(Path(path), {"proximal network": form, "versions": versions, "facts": facts}, network)


def load(name: str | os.PathLike[str]) -> LearnedProximal:
    """A network that comes with the package ("laplace", "digits8x8", "mnist"), or that `save` wrote.  Its `box` is the range of
    its training signals, where the file has that: `regularizer` refuses others.

    name  one of these, or the path of a file: a path object, or a string that ends in ".npz"
    Raises ValueError, with the names there are, for another name, and if the file is not such a file.
    """
    path = _path(name)
    header, arrays = array_files.read(path, "load", "proximal network")
    form = header["proximal network"]
    box = _box(header.get("facts", {}))
    if box is False:
        raise ValueError(f"load: {path} has another range of signals than two numbers: {header['facts']['range']!r}")
    try:
        blank = eqx.filter_eval_shape(_blank, form, box)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path} announces a network that cannot be: {error!r}") from error
    return array_files.restored(path, "load", arrays, blank)


def facts(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of the file of a network: "proximal network", "versions" and, under "facts", what `save` was told."""
    header, _ = array_files.read(_path(name), "facts", "proximal network")
    return header


def _box(facts: dict[str, Any]) -> tuple[float, float] | Literal[False] | None:
    """The range of training signals among the facts; None where it is not said, False where it is no range."""
    given = facts.get("range")
    if given is None:
        return None
    try:
        low, high = (float(v) for v in given)
    except (TypeError, ValueError):
        return False
    return (low, high) if low < high else False


def _blank(form: dict[str, Any], box: tuple[float, float] | None) -> LearnedProximal:
    def zeros(shape: list[int] | None) -> Any:
        return None if shape is None else jnp.zeros(shape, jnp.dtype(form["dtype"]))

    layers = tuple(
        Layer(
            zeros(layer["weight"]),
            zeros(layer["skip"]),
            zeros(layer["bias"]),
            layer["stride"],
            layer["padding"],
            None if layer["resized"] is None else (layer["resized"][0], layer["resized"][1]),
        )
        for layer in form["layers"]
    )
    skip = None if form["output_skip"] is None else zeros([form["output_skip"]])
    constant = zeros([]) if form["constant"] else None
    shape, beta, alpha = tuple(form["shape"]), form["beta"], form["alpha"]
    return LearnedProximal(layers, zeros([form["output"]]), skip, constant, shape, beta, alpha, form["kept"], box)


def _path(name: str | os.PathLike[str]) -> Path:
    if not isinstance(name, str) or name.endswith(".npz"):
        return Path(name)
    folder = resources.files("solvers") / "weights"
    file = folder / f"proximal_{name}.npz"
    if not file.is_file():
        files = [f.name for f in folder.iterdir() if f.name.startswith("proximal_") and f.name.endswith(".npz")]
        known = sorted(f.removeprefix("proximal_").removesuffix(".npz") for f in files)
        raise ValueError(f"load: no network is called {name!r}; there are {known}, and files *.npz")
    return Path(str(file))
