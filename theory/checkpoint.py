"""Checkpoints of training loops: npz files with a JSON header, written whole or not at all, never pickled."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def digest(tree: PyTree) -> str:
    """A fingerprint of a pytree of arrays: its structure, types, shapes and values."""
    state = hashlib.sha256()
    leaves, structure = jax.tree.flatten(tree)
    state.update(str(structure).encode())
    for leaf in map(np.asarray, leaves):
        state.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return state.hexdigest()


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write to a temporary file of the same folder, then rename: a reader finds the old state or the new one."""
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, header=encoded, **dict(arrays))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(
    path: Path, owner: str, form: int, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The header and the arrays of `path`, None if there is no such file.

    The header must hold "format", equal to `form`, and "settings", equal to `settings`.  Raises ValueError, beginning
    with `owner`, if the file is not a checkpoint, of another format, or of other settings, which it names.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{owner}: {path} is not a checkpoint of {owner} ({error})") from error
    if "header" not in arrays:
        raise ValueError(f"{owner}: {path} is not a checkpoint of {owner} (it has no header)")
    header = json.loads(arrays.pop("header").tobytes())
    if header["format"] != form:
        raise ValueError(f"{owner}: {path} has format {header['format']}, expected {form}")
    differing = [name for name, value in settings.items() if header["settings"].get(name) != value]
    if differing:
        raise ValueError(
            f"{owner}: {path} was written by a run with other {', '.join(differing)}; "
            "use the same settings or another file"
        )
    return header, arrays
