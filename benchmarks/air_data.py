"""Canvases with none to a few handwritten digits at random places and sizes, the data of Attend-Infer-Repeat.

As in the multi-digit data that the literature uses, the number of digits is uniform, each digit is resized and
placed where it lies wholly inside, and a canvas whose digits overlap so far that a pixel exceeds full brightness
is drawn again, with the same number of digits.
"""

from typing import NamedTuple

import numpy as np

from generative import data


class Canvases(NamedTuple):
    """`images` float32 (n, size, size) in [0, 1]; `counts` int32 (n,), the number of digits on each."""

    images: np.ndarray
    counts: np.ndarray


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Images (n, h, w) to (n, size, size): each new pixel is the mean of the area that it covers."""

    def overlap(old: int) -> np.ndarray:
        edges = np.linspace(0, old, size + 1)
        pixel = np.arange(old)
        return np.clip(np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, 1) * size / old

    return np.einsum("ah,nhw,bw->nab", overlap(images.shape[1]), images, overlap(images.shape[2]))


def compose(
    digits: np.ndarray, rng: np.random.Generator, n: int, *, size: int, digit_sizes: tuple[int, ...], most: int = 2
) -> Canvases:
    """`n` canvases of `size` by `size` pixels with 0 to `most` of `digits` (m, h, w), values in [0, 1].

    The side of a digit is drawn from `digit_sizes`.  Raises ValueError if a digit does not fit.
    """
    if not digit_sizes or max(digit_sizes) > size or min(digit_sizes) < 1:
        raise ValueError(f"compose: digit_sizes is {digit_sizes}; expected sizes from 1 to the canvas, {size}")
    resized = {side: resize(digits, side).astype(np.float32) for side in set(digit_sizes)}
    counts = rng.integers(most + 1, size=n).astype(np.int32)
    images = np.zeros((n, size, size), np.float32)
    todo = np.arange(n)
    while len(todo):
        images[todo] = 0
        for number in range(most):
            sides = rng.choice(digit_sizes, size=len(todo))
            for side, pictures in resized.items():
                chosen = todo[(sides == side) & (counts[todo] > number)]
                drawn = pictures[rng.integers(len(pictures), size=len(chosen))]
                corner = rng.integers(size - side + 1, size=(2, len(chosen)))
                rows = corner[0][:, None, None] + np.arange(side)[None, :, None]
                columns = corner[1][:, None, None] + np.arange(side)[None, None, :]
                images[chosen[:, None, None], rows, columns] += drawn
        todo = todo[images[todo].max((1, 2)) > 1]
    return Canvases(images, counts)


def load(
    n: int, n_test: int, *, size: int, digit_sizes: tuple[int, ...], seed: int = 0
) -> tuple[Canvases, Canvases, str]:
    """Training and held-out canvases, from different MNIST digits, and a word on where the digits come from.

    Without MNIST (see `generative.data.load`) the 8x8 digits that ship with the package take its place.
    """
    try:
        train = data.load("mnist", split="train")["x"] / 255
        test = data.load("mnist", split="test")["x"] / 255
        source = "MNIST"
    except FileNotFoundError:
        small = data.load("digits8x8")["x"] / 16
        train, test = small[:1400], small[1400:]
        source = "8x8 digits, enlarged (PROOFSTONE_DATA names no folder with MNIST)"
    rng = np.random.default_rng(seed)
    shape = {"size": size, "digit_sizes": digit_sizes}
    return compose(train, rng, n, **shape), compose(test, rng, n_test, **shape), source
