"""The two networks of the paper, their sharpness in closed form, and the norms that it controls (T8 to T12, T15)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from theory.sgd_stability.networks import Sharpness
from theory.sgd_stability.operator import dot

# λmax(G) >= PATH_NORM_CONSTANT · path norm for every two-layer ReLU network (T11).
PATH_NORM_CONSTANT = 1 / (2 * math.sqrt(2 * math.pi))

# ---------------------------------------------------------------------------------- diagonal linear networks


def diagonal_linear(params: tuple[Float[Array, " d"], Float[Array, " d"]], x: Float[Array, " d"]) -> Float[Array, ""]:
    """f(x; a, b) = <a∘b, x> for one input."""
    a, b = params
    return jnp.vdot(a * b, x)


def init_diagonal_linear(key: Key[Array, ""], d: int) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """a_j, b_j ~ N(0, 1): the large initialisation of experiment E1."""
    a, b = jax.random.normal(key, (2, d))
    return a, b


def init_unbalanced(
    key: Key[Array, ""], d: int, ratio: float, variance: float = 0.1
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """a_j ~ N(0, variance), b_j = ±c a_j with c = r + √(r² - 1): balancedness exactly r = `ratio` (E3).

    Raises ValueError if ratio < 1, which no network has.
    """
    if ratio < 1:
        raise ValueError(f"init_unbalanced: ratio is {ratio}, expected at least 1")
    key_a, key_sign = jax.random.split(key)
    a = jax.random.normal(key_a, (d,)) * math.sqrt(variance)
    return a, (ratio + math.sqrt(ratio**2 - 1)) * jax.random.rademacher(key_sign, (d,), a.dtype) * a


def balancedness(a: Float[Array, " d"], b: Float[Array, " d"]) -> Float[Array, ""]:
    """r = Σ (a_j² + b_j²) / (2 Σ |a_j b_j|) >= 1, with equality exactly when |a_j| = |b_j| for all j."""
    return (a**2 + b**2).sum() / (2 * jnp.abs(a * b).sum())


def balanced_factors(beta: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """The factors a∘b = β with |a| = |b|; they minimise all three sharpness measures (T8)."""
    root = jnp.sqrt(jnp.abs(beta))
    return root, jnp.sign(beta) * root


def diagonal_sharpness(a: Float[Array, " d"], b: Float[Array, " d"]) -> Sharpness:
    """Sharpness of the population G for E xxᵀ = I (T8): with s_j = a_j² + b_j², |s|_1, |s|_2 and |s|_∞.

    At least 2|β|_1, 2|β|_2, 2|β|_∞ for β = a∘b, attained by `balanced_factors`.
    """
    s = a**2 + b**2
    return Sharpness(s.sum(), jnp.linalg.norm(s), s.max())


# ----------------------------------------------------------------------------------- two-layer ReLU networks


def two_layer_relu(params: tuple[Float[Array, " m"], Float[Array, "m d"]], x: Float[Array, " d"]) -> Float[Array, ""]:
    """f(x; a, w) = Σ_j a_j max(w_jᵀx, 0) for one input; the derivative at a kink is 0."""
    a, w = params
    return a @ jax.nn.relu(w @ x)


def init_two_layer_relu(key: Key[Array, ""], m: int, d: int) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
    """a_j ~ N(0, 1), w_j ~ N(0, I/√d), as in experiment E2."""
    key_a, key_w = jax.random.split(key)
    return jax.random.normal(key_a, (m,)), jax.random.normal(key_w, (m, d)) / d**0.25


def path_norm(a: Float[Array, " m"], w: Float[Array, "m d"]) -> Float[Array, ""]:
    """Σ_j |a_j| |w_j|_2."""
    return (jnp.abs(a) * jnp.linalg.norm(w, axis=1)).sum()


def relu_trace_population(a: Float[Array, " m"], w: Float[Array, "m d"]) -> Float[Array, ""]:
    """Tr G = ½ Σ_j (|w_j|² + d a_j²) for x uniform on the sphere of radius √d or N(0, I) (T10).

    At least √d times the path norm, with equality exactly when |w_j| = √d |a_j| for all j.
    """
    return (jnp.square(w).sum() + w.shape[1] * jnp.square(a).sum()) / 2


def relu_lambda_max_lower(a: Float[Array, " m"], w: Float[Array, "m d"]) -> Float[Array, ""]:
    """max(Σ|w_j|²/2π, Σ a_j²/4) <= λmax(G) for x ~ N(0, I) (T11; on the sphere up to O(1/d)).

    It is at least `PATH_NORM_CONSTANT` times the path norm.
    """
    return jnp.maximum(jnp.square(w).sum() / (2 * jnp.pi), jnp.square(a).sum() / 4)


# -------------------------------------------------------------------------- Rademacher averages of norm balls


def rademacher_bound_l1(x: Float[ArrayLike, "n d"], radius: float) -> Float[Array, ""]:
    """Q max|x_ij| √(2 ln(2d)/n), an upper bound for linear functions with |β|_1 <= Q = `radius` (T12)."""
    x = jnp.asarray(x)
    n, d = x.shape
    return radius * jnp.abs(x).max() * math.sqrt(2 * math.log(2 * d) / n)


def rademacher_bound_path(x: Float[ArrayLike, "n d"], radius: float) -> Float[Array, ""]:
    """2 Q max|x_i|_2 / √n, an upper bound for two-layer ReLU networks with path norm <= Q = `radius` (T12)."""
    x = jnp.asarray(x)
    return 2 * radius * jnp.linalg.norm(x, axis=1).max() / math.sqrt(x.shape[0])


def rademacher_l1_draws(
    key: Key[Array, ""], x: Float[ArrayLike, "n d"], radius: float, draws: int
) -> Float[Array, " draws"]:
    """Independent draws of Q |(1/n) Σ ε_i x_i|_∞, the supremum over the l1 ball; their mean is its average."""
    x = jnp.asarray(x)
    signs = jax.random.rademacher(key, (draws, x.shape[0]), x.dtype)
    return radius * jnp.abs(dot(signs, x)).max(1) / x.shape[0]


def rademacher_path_draws(
    key: Key[Array, ""], x: Float[ArrayLike, "n d"], radius: float, draws: int, *, starts: int = 8, steps: int = 100
) -> Float[Array, " draws"]:
    """Draws of a lower bound of the supremum over the path-norm ball, Q max_{|w|=1} |(1/n) Σ ε_i σ(wᵀx_i)|.

    Projected gradient ascent on the sphere from `starts` directions; the step shrinks as 1/√t.
    """
    x = jnp.asarray(x)
    n, d = x.shape
    key_sign, key_start = jax.random.split(key)
    signs = jax.random.rademacher(key_sign, (draws, 1, n), x.dtype)
    directions = jax.random.normal(key_start, (draws, starts, d), x.dtype)

    def normalise(w: Float[Array, "draws starts d"]) -> Float[Array, "draws starts d"]:
        return w / jnp.linalg.norm(w, axis=-1, keepdims=True)

    def value(w: Float[Array, "draws starts d"]) -> Float[Array, "draws starts"]:
        return jnp.abs((signs * jax.nn.relu(w @ x.T)).mean(-1))

    def ascend(w: Float[Array, "draws starts d"], t: Float[Array, ""]) -> tuple[Array, Array]:
        g = jax.grad(lambda v: value(v).sum())(w)
        size = jnp.linalg.norm(g, axis=-1, keepdims=True)
        w = normalise(w + g / jnp.maximum(size, jnp.finfo(x.dtype).tiny) / jnp.sqrt(t))
        return w, value(w).max(-1)

    _, values = jax.lax.scan(ascend, normalise(directions), jnp.arange(1, steps + 1, dtype=x.dtype))
    return radius * values.max(0)
