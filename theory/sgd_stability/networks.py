"""Networks: features, Gram matrix, exact Hessian, sharpness, loss alignment, and all bounds in one report.

A network is a function apply(params, x_i) -> scalar with params a pytree of arrays.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, PyTree

from theory.sgd_stability.bounds import alignment_infimum_from_gram, threshold_bounds
from theory.sgd_stability.operator import HIGHEST, Sampling, as_gram, dot
from theory.sgd_stability.threshold import Threshold, stability_threshold_from_gram
from theory.training import Apply, risk

INTERPOLATION_RISK = 1e-8  # below this risk the Hessian is taken to be the Gauss-Newton matrix


class Sharpness(NamedTuple):
    """Tr G, |G|_F and λmax(G) of the Gauss-Newton matrix, which is the Hessian at interpolation."""

    trace: Float[Array, ""]
    frobenius: Float[Array, ""]
    lambda_max: Float[Array, ""]


class Alignment(NamedTuple):
    """Loss alignment μ = direction·strength (section 3)."""

    mu: Float[Array, ""]
    direction: Float[Array, ""]
    strength: Float[Array, ""]


def per_sample_gradients(apply: Apply, params: PyTree, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n p"]:
    """The features a_i = ∇_θ f(x_i; θ), leaves of `params` in the order of `jax.tree.leaves`, each flattened.

    Raises ValueError if `apply` does not return a real scalar for one input.
    """
    x = _checked_inputs(apply, params, x)
    return jnp.concatenate(_gradients(apply, params, x), axis=1)


def gram_matrix(
    apply: Apply,
    params: PyTree,
    x: Float[ArrayLike, "n ..."],
    *,
    block: int = 250,
    dtype: DTypeLike | None = None,
) -> Float[Array, "n n"]:
    """K = AAᵀ/n from gradients of at most 2·`block` samples at a time; A is never held whole.

    Only blocks on and above the diagonal are computed.  `dtype` is that of products, sums and result; by
    default it is the gradients' own.  float32 sums over 10⁵ parameters have a relative error of about 1e-6;
    dtype=float64 for float32 gradients removes it, at about four times the cost on a CPU.
    Raises ValueError if `apply` does not return a real scalar for one input.
    """
    x = _checked_inputs(apply, params, x)
    if block < 1:
        raise ValueError(f"gram_matrix: block is {block}, expected at least 1")
    return _gram_matrix(apply, params, x, min(block, x.shape[0]), dtype)


@partial(jax.jit, static_argnames=("apply", "block", "dtype"))
def _gram_matrix(apply: Apply, params: PyTree, x: Array, block: int, dtype: DTypeLike | None) -> Array:
    n = x.shape[0]
    count = -(-n // block)
    padded = jnp.concatenate([x, jnp.repeat(x[-1:], count * block - n, axis=0)]).reshape(count, block, *x.shape[1:])
    rows, columns = jnp.triu_indices(count)

    def product(pair: tuple[Array, Array]) -> Array:
        left, right = (_gradients(apply, params, padded[i]) for i in pair)
        contract = (((1,), (1,)), ((), ()))
        parts = [
            jax.lax.dot_general(a, b, contract, precision=HIGHEST, preferred_element_type=dtype)
            for a, b in zip(left, right, strict=True)
        ]
        return jnp.stack(parts).sum(0)

    blocks = jax.lax.map(product, (rows, columns))
    upper = jnp.zeros((count, count, block, block), blocks.dtype).at[rows, columns].set(blocks)
    full = upper.transpose(0, 2, 1, 3).reshape(count * block, count * block)[:n, :n]
    return (jnp.triu(full) + jnp.triu(full, 1).T) / n


def _gradients(apply: Apply, params: PyTree, x: Array) -> list[Array]:
    gradients = jax.vmap(jax.grad(apply), (None, 0))(params, x)
    return [leaf.reshape(x.shape[0], -1) for leaf in jax.tree.leaves(gradients)]


def _checked_inputs(apply: Apply, params: PyTree, inputs: ArrayLike) -> Array:
    x = jnp.asarray(inputs)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x has shape {x.shape}, expected (n, ...) with n at least 1")
    out = jax.eval_shape(apply, params, x[0])
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"apply(params, x[0]) gives {out}, expected one real scalar per sample")
    return x


def hessian_product(
    apply: Apply, params: PyTree, x: Float[ArrayLike, "n ..."], y: Float[ArrayLike, " n"], v: PyTree
) -> PyTree:
    """∇²R(θ) v for the risk R with all its terms; equals Gv at interpolation and not elsewhere.

    `v` has the structure of `params`; so has the result.
    """
    return jax.jvp(lambda theta: jax.grad(risk, argnums=1)(apply, theta, x, y), (params,), (v,))[1]


def sharpness(gram: Float[ArrayLike, "n n"]) -> Sharpness:
    """The three sharpness measures from K = AAᵀ/n, which has the non-zero spectrum of G."""
    k = as_gram(gram)
    return Sharpness(jnp.trace(k), jnp.linalg.norm(k), jnp.linalg.eigvalsh(k)[-1])


def loss_alignment(gram: Float[ArrayLike, "n n"], residuals: Float[ArrayLike, " n"]) -> Alignment:
    """μ = Tr(SG)/(2R |G|_F²) at any point, from K and the residuals e_i = f(x_i) - y_i alone (section 3).

    Sample gradients are e_i a_i, so that S = Aᵀ Q A with Q = diag(e²)/n - eeᵀ/n², hence
    Tr(SG) = Σ e_i² (K²)_ii - |Ke|²/n,  |S|_F² = n² Tr(QKQK),  2R = |e|²/n.
    0/0 at exact interpolation: raises ValueError when the residuals are concrete, NaN otherwise.
    """
    k = as_gram(gram)
    e = jnp.asarray(residuals)
    n = k.shape[0]
    if e.shape != (n,):
        raise ValueError(f"residuals has shape {e.shape}, expected ({n},) for gram of shape {k.shape}")
    loss = jnp.square(e).mean()
    if not isinstance(loss, jax.core.Tracer) and loss == 0:
        raise ValueError("residuals are all zero, where the alignment is 0/0; use alignment_infimum_from_gram")
    noise_gram = (jnp.square(e)[:, None] * k - jnp.outer(e, dot(e[None], k)[0]) / n) / n  # QK
    signal = jnp.square(e) @ jnp.square(k).sum(1) - jnp.square(dot(k, e[:, None])).sum() / n
    size_s = n * jnp.sqrt(jnp.maximum((noise_gram * noise_gram.T).sum(), 0))
    size_g = jnp.linalg.norm(k)
    return Alignment(signal / (loss * size_g**2), signal / (size_s * size_g), size_s / (loss * size_g))


class StabilityReport(NamedTuple):
    """Where a trained network stands: every entry of the middle group is <= 1 if it is stable, by its own bound.

    risk           (1/2n) Σ (f - y)²
    interpolating  risk <= 1e-8; otherwise H is not G, and the figures describe G only

    gd             η λmax/2
    frobenius      η |G|_F √(noise·μ_0)
    trace          η noise Tr G/2
    second_moment  η (mean |G|_F² + noise m4)/(2 Tr G), m4 = (1/n) Σ |a_i|⁴
    exact          η/η*: <= 1 exactly when stable
    max_norm       η (mean + noise) max |a_i|²/2: stable if <= 1
    For every sampling trace <= second_moment <= exact <= max_norm, and gd, frobenius <= exact.

    threshold, sharpness, alignment_infimum   η* with its bracket, the measures of G, and μ_0
    """

    risk: Float[Array, ""]
    interpolating: Bool[Array, ""]
    gd: Float[Array, ""]
    frobenius: Float[Array, ""]
    trace: Float[Array, ""]
    second_moment: Float[Array, ""]
    exact: Float[Array, ""]
    max_norm: Float[Array, ""]
    threshold: Threshold
    sharpness: Sharpness
    alignment_infimum: Float[Array, ""]


def stability_report(
    apply: Apply,
    params: PyTree,
    x: Float[ArrayLike, "n ..."],
    y: Float[ArrayLike, " n"],
    learning_rate: ArrayLike,
    sampling: Sampling,
    *,
    block: int = 250,
) -> StabilityReport:
    """All stability measures of a network at once, "sharp against stated" (section 7); cost O(n²p + n³).

    The spectrum is computed in the widest float that is enabled, the Gram matrix in that of the parameters.
    """
    k = gram_matrix(apply, params, x, block=block)
    k = k.astype(jnp.promote_types(k.dtype, jnp.result_type(float)))
    loss = risk(apply, params, x, y)
    threshold = stability_threshold_from_gram(k, sampling)
    bounds = threshold_bounds(k, sampling)
    rate = jnp.asarray(learning_rate, k.dtype)
    return StabilityReport(
        loss,
        loss <= INTERPOLATION_RISK,
        rate / bounds.gd,
        rate / bounds.frobenius,
        rate / bounds.trace,
        rate / bounds.second_moment,
        rate / threshold.eta,
        rate / bounds.max_norm,
        threshold,
        sharpness(k),
        alignment_infimum_from_gram(k),
    )
