"""Arrays with a JSON header in one npz file: written whole or not at all, read without trust, no pickle."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

FORMAT = 1


def write(path: Path, header: Mapping[str, Any], tree: PyTree, **arrays: np.ndarray) -> None:
    """Write the leaves of `tree` and further named arrays to a temporary file of the same folder, then rename it: a reader
    finds the old state or the new one.  Raises TypeError if JSON cannot hold the header."""
    encoded = np.frombuffer(json.dumps({"format": FORMAT, **header}).encode(), np.uint8)
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, header=encoded, **leaves, **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path, owner: str, needed: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file whose header has an entry `needed`.  Raises ValueError, in the name of the function
    `owner`, if it is not such a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(arrays.pop("header").tobytes())
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{owner}: {path} is not a file of {owner} ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or needed not in header:
        raise ValueError(f"{owner}: {path} is not a file of {owner}, format {FORMAT}")
    return header, arrays


def restored(path: Path, owner: str, arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """The tree of the form `like` whose leaves `arrays` are.  Raises ValueError if they do not fit it."""
    leaves, structure = jax.tree.flatten(like)
    names = [f"leaf_{i}" for i in range(len(leaves))]
    fits = set(arrays) == set(names) and all(
        arrays[name].shape == leaf.shape and arrays[name].dtype.itemsize == leaf.dtype.itemsize
        for name, leaf in zip(names, leaves, strict=True)
    )
    if not fits:
        raise ValueError(f"{owner}: {path} is damaged: its arrays are not those that its header announces")
    # The view restores types that npz does not know, such as bfloat16.
    values = [jnp.asarray(arrays[name].view(leaf.dtype)) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)
