"""The second-moment operator of linearised SGD: sampling schemes, eigen-coordinates, dense forms.

The dense forms are for small problems, tests and teaching; `threshold` has the matrix-free one.
Notation and derivation: the docstring of the package.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 products on a GPU would cost four digits of the threshold
_DENSE_LIMIT = 32  # the vec form has p⁴ entries and costs p⁶


class Sampling(NamedTuple):
    """How a batch is drawn, as far as second moments see it: E[A_I Σ A_I] = mean·HΣH + noise·M(Σ)."""

    mean: float | Float[Array, ""]
    noise: float | Float[Array, ""]


def check_batch(name: str, batch: int, n: int | None = None) -> None:
    if batch < 1 or (n is not None and batch > n):
        upper = "" if n is None else f" <= n = {n}"
        raise ValueError(f"{name}: batch is {batch}, expected 1 <= batch{upper}")


def with_replacement(batch: int) -> Sampling:
    """`batch` independent uniform draws: (1 - 1/B, 1/B).  Raises ValueError unless batch >= 1."""
    check_batch("with_replacement", batch)
    return Sampling(1 - 1 / batch, 1 / batch)


def without_replacement(batch: int, n: int) -> Sampling:
    """A uniform subset of `batch` of the n samples: (1 - q, q) with q = (n - B)/(B(n - 1)).

    Subsets must be independent from step to step; reshuffling by epochs is another process.
    Raises ValueError unless 1 <= batch <= n.
    """
    check_batch("without_replacement", batch, n)
    noise = (n - batch) / (batch * (n - 1)) if n > 1 else 0.0
    return Sampling(1 - noise, noise)


def bernoulli(batch: int, n: int) -> Sampling:
    """Each sample enters with probability B/n, the sum is divided by B: (1, 1/B - 1/n).

    Raises ValueError unless 1 <= batch <= n.
    """
    check_batch("bernoulli", batch, n)
    return Sampling(1.0, 1 / batch - 1 / n)


def full_batch() -> Sampling:
    """Gradient descent: (1, 0)."""
    return Sampling(1.0, 0.0)


# ------------------------------------------------------------------------------------- dense forms


def second_moment_step(
    sigma: Float[ArrayLike, "p p"], features: Float[ArrayLike, "n p"], eta: ArrayLike, sampling: Sampling
) -> Float[Array, "p p"]:
    """T(Σ), the second moment of the deviation after one step of linearised SGD (section 4).

    `sigma` is symmetric.  Cost O(n p²).
    """
    a = as_features(features)
    ha = dot(a.T, a) / a.shape[0]
    sigma = jnp.asarray(sigma)
    hs = dot(ha, sigma)
    # (HΣ)ᵀ in place of ΣH would let an antisymmetric rounding error grow when the step is iterated.
    drift = hs + dot(sigma, ha)
    noise = dot(a.T * quadratic_forms(a, sigma), a) / a.shape[0]
    return sigma - eta * drift + eta**2 * (sampling.mean * dot(hs, ha) + sampling.noise * noise)


def stability_quotient(
    features: Float[ArrayLike, "n p"], sigma: Float[ArrayLike, "p p"], sampling: Sampling
) -> Float[Array, ""]:
    """The quotient (*): an upper bound of η* for every symmetric `sigma`, equal to it at the worst one.

    Cost O(n p²).  Infinite when Σ vanishes on range(H).
    """
    return quotient(as_features(features), jnp.asarray(sigma), sampling.mean, sampling.noise)


def spectral_radius(features: Float[ArrayLike, "n p"], eta: ArrayLike, sampling: Sampling) -> Float[Array, ""]:
    """ρ(T) on range(H): at most 1 exactly when SGD with rate `eta` is mean-square stable.

    Dense, cost O(p⁶).  Raises ValueError if p > 32.
    """
    lam, keep, second = _vec_form(features, sampling, "spectral_radius")
    pair = jnp.outer(keep, keep).ravel()
    drift = jnp.add.outer(lam, lam).ravel()
    step = jnp.diag(pair * (1 - eta * drift)) + eta**2 * second
    return jnp.abs(jnp.linalg.eigvalsh(step)).max()


def threshold_vec(features: Float[ArrayLike, "n p"], sampling: Sampling) -> Float[Array, ""]:
    """η* = 2 / λmax(C^{+1/2} D C^{+1/2}) with C and D as p² × p² matrices (section 4).

    The dense oracle for small p, cost O(p⁶); raises ValueError if p > 32.  Its derivative goes through
    `eigh` and exists only where eigenvalues are simple; `stability_threshold` has no such limit.
    """
    lam, keep, second = _vec_form(features, sampling, "threshold_vec")
    pair = jnp.outer(keep, keep).ravel()
    c = jnp.add.outer(lam, lam).ravel() / 2
    scale = jnp.where(pair, 1 / jnp.sqrt(jnp.where(pair, c, 1)), 0)
    return 2 / jnp.linalg.eigvalsh(scale[:, None] * second * scale)[-1]


def n_form(features: Float[ArrayLike, "n p"], eta: ArrayLike, sampling: Sampling) -> Float[Array, "n n"]:
    """The symmetric, entrywise non-negative N(η) of section 4: stable exactly when λmax(N(η)) <= 1.

    Needs η·mean·λmax(H) < 2 and raises ValueError otherwise when the values are concrete.  It has n²
    entries and costs O(n²r²); for large n use `stability_threshold`, which never forms it.
    """
    c = coordinates_of_features(as_features(features))
    top = eta * sampling.mean * c.lam[-1]
    if not isinstance(top, jax.core.Tracer) and top >= 2:
        raise ValueError(f"n_form: eta * mean * λmax(H) is {float(top):.6g}, expected < 2 (a pole of N)")
    n = c.a.shape[0]
    weight = eta * sampling.noise / n * c.mask / resolvent(c, eta, sampling.mean)
    products = c.a[:, None, :] * c.a[None, :, :]
    return jnp.einsum("ijk,kl,ijl->ij", products, weight, products, precision=HIGHEST)


def _vec_form(
    features: Float[ArrayLike, "n p"], sampling: Sampling, caller: str
) -> tuple[Float[Array, " p"], Bool[Array, " p"], Float[Array, "pp pp"]]:
    """Eigen-coordinates of H and the p² × p² matrix of D in them."""
    a = as_features(features)
    n, p = a.shape
    if p > _DENSE_LIMIT:
        raise ValueError(f"{caller}: p is {p}, expected at most {_DENSE_LIMIT} (cost p⁶)")
    lam, u = jnp.linalg.eigh(dot(a.T, a) / n)
    keep = in_range(lam, max(n, p))
    lam = jnp.where(keep, lam, 0)
    b = jnp.where(keep, dot(a, u), 0)
    squares = (b[:, :, None] * b[:, None, :]).reshape(n, p * p)
    drift = jnp.diag(jnp.outer(lam, lam).ravel())
    second = sampling.mean * drift + sampling.noise / n * dot(squares.T, squares)
    return lam, keep, second


# --------------------------------------------------------------------------------- pieces for all of it


class Coordinates(NamedTuple):
    """Features in an eigenbasis: a (n, r) with aᵀa/n = diag(lam); basis of K (n, r) or of H (p, r)."""

    a: Float[Array, "n r"]
    lam: Float[Array, " r"]
    keep: Bool[Array, " r"]
    basis: Float[Array, "m r"]

    @property
    def mask(self) -> Float[Array, "r r"]:
        return jnp.outer(self.keep, self.keep).astype(self.a.dtype)


def in_range(lam: Float[Array, " r"], size: int) -> Bool[Array, " r"]:
    """Eigenvalues below size·eps·λmax are rounding (eigh is backward stable) and count as kernel.

    The threshold depends continuously on a direction as its eigenvalue vanishes, so the cut is not delicate.
    NaN counts as range, to come out at the other end instead of being masked away.
    """
    return ~(lam <= size * jnp.finfo(lam.dtype).eps * lam[-1])


def coordinates_of_features(a: Float[Array, "n p"]) -> Coordinates:
    lam, u = jnp.linalg.eigh(dot(a.T, a) / a.shape[0])
    keep = in_range(lam, max(a.shape))
    return Coordinates(jnp.where(keep, dot(a, u), 0), jnp.where(keep, lam, 0), keep, u)


def coordinates_of_gram(k: Float[Array, "n n"]) -> Coordinates:
    lam, v = jnp.linalg.eigh(k)
    keep = in_range(lam, k.shape[0])
    lam = jnp.where(keep, lam, 0)
    return Coordinates(v * jnp.sqrt(k.shape[0] * lam), lam, keep, v)


def resolvent(co: Coordinates, eta: ArrayLike, mean: ArrayLike) -> Float[Array, "r r"]:
    """λ_k + λ_l - η·mean·λ_k λ_l, set to 1 outside range(H)."""
    value = jnp.add.outer(co.lam, co.lam) - eta * mean * jnp.outer(co.lam, co.lam)
    return jnp.where(co.mask > 0, value, 1)


def dot(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    return jnp.matmul(a, b, precision=HIGHEST)


def quadratic_forms(a: Float[Array, "n r"], sigma: Float[Array, "r r"]) -> Float[Array, " n"]:
    return (dot(a, sigma) * a).sum(1)


def quotient(a: Float[Array, "n r"], sigma: Float[Array, "r r"], mean: ArrayLike, noise: ArrayLike) -> Array:
    hs = dot(dot(a.T, a), sigma) / a.shape[0]
    decay = 2 * (hs * sigma.T).sum()
    growth = mean * (hs * hs.T).sum() + noise * jnp.square(quadratic_forms(a, sigma)).mean()
    return jnp.where(growth == 0, jnp.inf, decay / jnp.where(growth == 0, 1, growth))


def as_features(features: ArrayLike) -> Float[Array, "n p"]:
    a = jnp.asarray(features)
    if a.ndim != 2 or a.size == 0:
        raise ValueError(f"features has shape {a.shape}, expected (n, p), not empty: one gradient per row")
    return _finite("features", a)


def as_gram(gram: ArrayLike) -> Float[Array, "n n"]:
    k = jnp.asarray(gram)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or k.size == 0:
        raise ValueError(f"gram has shape {k.shape}, expected (n, n), not empty: K = AAᵀ/n")
    return _finite("gram", k)


def _finite(name: str, x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
        count = int((~jnp.isfinite(x)).sum())
        raise ValueError(f"{name} holds {count} values that are not finite, expected none")
    return x
