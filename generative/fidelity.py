"""How near two sets of samples are: sliced Wasserstein, Frechet and kernel distances, precision and recall, in features of yours.

For images the features are those of a small classifier trained here.  Values in them rank models of one data set; they are not
comparable with those published for Inception features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int, Key

from generative.nets import Convolution, Dense


def sliced_wasserstein(
    key: Key[Array, ""], x: Float[Array, "n d"], y: Float[Array, "m d"], *, projections: int = 128
) -> Float[Array, ""]:
    """The root of the mean over random directions of the squared Wasserstein-2 distance of the projected samples.

    Two samples of one distribution are of order n^(-1/2) apart, the noise floor of any comparison.  With n ≠ m, the quantiles of
    both are compared at the middles of min(n, m) equal parts.
    """
    directions = jax.random.normal(key, (x.shape[1], projections), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0)
    one, other = (jnp.sort(_product(v, directions), 0) for v in (x, y))
    count = min(len(x), len(y))
    one, other = (_quantiles(v, count) for v in (one, other))
    return jnp.sqrt(((one - other) ** 2).mean())


def frechet_distance(x: Float[Array | np.ndarray, "n d"], y: Float[Array | np.ndarray, "m d"]) -> float:
    """‖m_x - m_y‖² + tr(C_x + C_y - 2 (C_x C_y)^½), of the means and covariances of two sets of features (Heusel et al. 2017).

    In float64 on the host.  The squared distance of Wasserstein of two normal laws; of finite samples it is too large by about
    d / n times the spread, so compare at equal numbers only.  Raises ValueError for fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"frechet_distance: x has {len(x)} rows and y {len(y)}; expected at least 2 of each")
    a, b = (np.asarray(v, np.float64) for v in (x, y))
    one, other = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (a, b))
    # tr (C_x C_y)^½ = tr (C_x^½ C_y C_x^½)^½, of a symmetric matrix: no complex root of a product that is nearly singular.
    values, vectors = scipy.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    between = np.sqrt(np.clip(scipy.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * between)


def kernel_distance(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, ""]:
    """The squared maximum mean discrepancy with the kernel (x·y/d + 1)³, without bias (KID: Binkowski et al. 2018).

    Its mean does not depend on how many samples there are, unlike that of `frechet_distance`; it may be negative.
    """

    def kernel(a: Array, b: Array) -> Array:
        return (_product(a, b.T) / a.shape[1] + 1) ** 3

    def within(a: Array) -> Array:
        values = kernel(a, a)
        return (values.sum() - jnp.trace(values)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


class PrecisionRecall(NamedTuple):
    """precision  the part of the samples that lie among the data: fidelity
    recall     the part of the data that lies among the samples: diversity
    """

    precision: Float[Array, ""]
    recall: Float[Array, ""]


def precision_recall(
    data: Float[Array, "n d"], samples: Float[Array, "m d"], *, neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A set is taken as the union of the balls around its points that reach to their `neighbours`-th nearest neighbour.  Raises
    ValueError for a set of no more points than that.
    """
    if min(len(data), len(samples)) <= neighbours or neighbours < 1:
        raise ValueError(
            f"precision_recall: data has {len(data)} rows, samples {len(samples)}, neighbours is {neighbours}; "
            "expected more rows than neighbours, and at least one neighbour"
        )
    between = _squared_distances(samples, data)
    among_data = _squared_reach(data, neighbours)
    among_samples = _squared_reach(samples, neighbours)
    precision = (between <= among_data[None, :]).any(1).mean()
    recall = (between <= among_samples[:, None]).any(0).mean()
    return PrecisionRecall(precision, recall)


# ---- a classifier, for its features -----------------------------------------------------------------------------------------


class Classifier(eqx.Module):
    """Three convolutions, the first two followed by a maximum over 2 x 2 pixels, one hidden layer of `features`, one of classes.

    shape  of an image, (height, width), with values in [0, 1]; sides that divide by 4
    """

    convolutions: tuple[Convolution, ...]
    hidden: Dense
    last: Dense
    shape: tuple[int, int] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        classes: int = 10,
        widths: Sequence[int] = (16, 32, 32),
        features: int = 64,
        key: Key[Array, ""],
    ):
        if len(shape) != 2 or shape[0] % 4 or shape[1] % 4 or len(widths) != 3:
            raise ValueError(
                f"Classifier: shape is {tuple(shape)} and widths {tuple(widths)}; expected (height, width) with sides that "
                "divide by 4, and three widths"
            )
        self.shape = int(shape[0]), int(shape[1])
        keys = jax.random.split(key, 5)
        pairs = zip((1, *widths[:2]), widths, strict=True)
        self.convolutions = tuple(Convolution(a, b, key=k) for (a, b), k in zip(pairs, keys[:3], strict=True))
        self.hidden = Dense(widths[2] * math.prod(self.shape) // 16, features, key=keys[3])
        self.last = Dense(features, classes, key=keys[4])

    def features(self, images: Float[Array, "batch height width"]) -> Float[Array, "batch features"]:
        """The hidden layer, after its ReLU."""
        h = images[..., None] - 0.5
        for number, convolution in enumerate(self.convolutions):
            h = jax.nn.relu(convolution(h))
            h = _largest(h) if number < 2 else h
        return jax.nn.relu(self.hidden(h.reshape(len(h), -1)))

    def __call__(self, images: Float[Array, "batch height width"]) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.last(self.features(images))


def cross_entropy(
    key: Key[Array, ""],
    model: Callable[[Array], Array],
    images: Float[Array, "batch height width"],
    labels: Int[Array, " batch"],
    *,
    moved: int = 2,
) -> Float[Array, ""]:
    """The loss of a classifier, in the form that `training.train` takes, of images moved at random by up to `moved` pixels."""
    if moved:
        by, size = jax.random.randint(key, (len(images), 2), 0, 2 * moved + 1), images.shape[1:]
        padded = jnp.pad(images, ((0, 0), (moved, moved), (moved, moved)))
        images = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, size))(padded, by)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(model(images)), labels[:, None], 1)
    return -chosen.mean()


def in_batches(
    function: Callable[[Array], Array], x: Float[Array, " n *event"], *, batch: int = 500
) -> Float[Array, " n *_"]:
    """function(x) by batches of rows, for what does not fit into memory at once."""
    return jnp.concatenate([function(x[i : i + batch]) for i in range(0, len(x), batch)])


def accuracy(model: Classifier, images: Float[Array, "n height width"], labels: Int[Array | np.ndarray, " n"]) -> float:
    """The part of the images whose largest logit is that of their label."""
    found = in_batches(eqx.filter_jit(model), images).argmax(1)
    return float((np.asarray(found) == np.asarray(labels)).mean())


def _largest(x: Array) -> Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _product(x: Array, y: Array) -> Array:
    # At full precision: on GPUs products are rounded to some three digits else.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _quantiles(ordered: Array, count: int) -> Array:
    """Of sorted columns, at the middles of `count` equal parts."""
    if len(ordered) == count:
        return ordered
    place = (jnp.arange(count) + 0.5) / count * len(ordered)
    return ordered[jnp.clip(place.astype(jnp.int32), 0, len(ordered) - 1)]


def _squared_distances(x: Array, y: Array) -> Array:
    middle = y.mean(0)
    x, y = x - middle, y - middle
    return jnp.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * _product(x, y.T), 0)


def _squared_reach(x: Array, neighbours: int) -> Array:
    # The nearest of all is the point itself.
    return jnp.sort(_squared_distances(x, x), 1)[:, neighbours]
