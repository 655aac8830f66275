"""Linear operators from arrays of one shape to arrays of another: their adjoints, the test of these, bounds of their norms.

    A(x), A.T(y)                     A x and Aᵀy, in the dtype of the argument, for one array; use jax.vmap for many
    check_adjoint(A, key)            raises ValueError if ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ
    norm_bounds(A, key)              lower ≤ ‖AᵀA‖ ≤ upper

What is special about an operator is used where it is cheap: (AᵀA + ρ)⁻¹ in closed form, its norm.  Operators of your own come by
`from_functions` and `from_lineax`; square ones for the iterative solvers are in `solvers.operators`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from solvers.operators import dot, euclidean


class LinearOperator(eqx.Module):
    """Subclasses give `_apply` and `_adjoint`; the rest where it is known.  Raises ValueError for an array of another shape."""

    shape_in: tuple[int, ...] = eqx.field(static=True)
    shape_out: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape_in"]) -> Float[Array, "*shape_out"]:
        """A x."""
        return self._apply(checked("x", x, self.shape_in))

    @property
    def T(self) -> LinearOperator:
        """The adjoint, y -> Aᵀy."""
        return Adjoint(self.shape_out, self.shape_in, self)

    def regularized_inverse(
        self, v: Float[Array, "*shape_in"], rho: float | Float[Array, ""]
    ) -> Float[Array, "*shape_in"] | None:
        """(AᵀA + ρ)⁻¹ v where there is a closed form, else None."""
        return None

    @property
    def norm_squared(self) -> Float[Array, ""] | None:
        """‖AᵀA‖, the square of the largest singular value, where it is known exactly, else None."""
        return None

    @property
    def norm_squared_bound(self) -> Float[Array, ""] | None:
        """A number that ‖AᵀA‖ does not exceed, where one is known, else None."""
        return self.norm_squared

    @abstractmethod
    def _apply(self, x: Array) -> Array: ...

    @abstractmethod
    def _adjoint(self, y: Array) -> Array: ...


class Adjoint(LinearOperator):
    """y -> Aᵀy.  Made by A.T."""

    base: LinearOperator

    @property
    def T(self) -> LinearOperator:
        return self.base

    @property
    def norm_squared(self) -> Float[Array, ""] | None:
        return self.base.norm_squared

    @property
    def norm_squared_bound(self) -> Float[Array, ""] | None:
        return self.base.norm_squared_bound

    def _apply(self, x: Array) -> Array:
        return self.base._adjoint(x)

    def _adjoint(self, y: Array) -> Array:
        return self.base._apply(y)


def checked(name: str, x: Any, shape: tuple[int, ...]) -> Array:
    x = jnp.asarray(x)
    if x.shape != shape:
        hint = "for many images use jax.vmap"
        if len(shape) == 3 and x.shape[1:] == shape[1:]:
            hint = f"{x.shape[0]} channels where {shape[0]} are expected"
        raise ValueError(f"{name}: has shape {x.shape}, the operator is for {shape}; {hint}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: has dtype {x.dtype}, expected real numbers")
    return x


def positive_sides(caller: str, shape: Sequence[int]) -> tuple[int, ...]:
    sides = tuple(int(n) for n in shape)
    if not sides or any(n < 1 for n in sides):
        raise ValueError(f"{caller}: shape is {tuple(shape)}, expected positive sides")
    return sides


# ------------------------------------------------------------------------------------------- operators of others


class FunctionOperator(LinearOperator):
    """A pair of functions.  Made by `from_functions`, `from_lineax`."""

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array] | None

    def _apply(self, x: Array) -> Array:
        return self.forward(x)

    def _adjoint(self, y: Array) -> Array:
        if self.backward is not None:
            return self.backward(y)
        return jax.linear_transpose(self.forward, jax.ShapeDtypeStruct(self.shape_in, y.dtype))(y)[0]


def from_functions(
    apply: Callable[[Array], Array],
    adjoint: Callable[[Array], Array] | None,
    shape_in: Sequence[int],
    *,
    check: bool = True,
) -> FunctionOperator:
    """The operator of two functions, x -> Ax and y -> Aᵀy; adjoint None: the transpose of the first, by JAX.

    check  try by `check_adjoint`, on four pairs of arrays, whether they are adjoint, to the precision of what they return.  Not
           under a transformation.  False for functions that are slow or round more than their dtype does, or do not go through
           jax.vmap

    Raises ValueError for shapes and dtypes that do not fit, and for functions that are not adjoint.
    """
    sides = positive_sides("from_functions", shape_in)
    real = jnp.result_type(float)
    image = jax.eval_shape(lambda x: apply(x), jax.ShapeDtypeStruct(sides, real))
    if not hasattr(image, "shape"):
        raise ValueError(f"from_functions: apply returns {type(image).__name__}, expected an array")
    if adjoint is None:
        return FunctionOperator(sides, image.shape, _as_tree(apply), None)
    back = jax.eval_shape(lambda y: adjoint(y), jax.ShapeDtypeStruct(image.shape, real))
    if getattr(back, "shape", None) != sides:
        found = getattr(back, "shape", type(back).__name__)
        raise ValueError(f"from_functions: adjoint maps {image.shape} to {found}, expected {sides}")
    made = FunctionOperator(sides, image.shape, _as_tree(apply), _as_tree(adjoint))
    if check:
        _check_pair(made, (image.dtype, back.dtype))
    return made


def _check_pair(A: FunctionOperator, dtypes: Sequence[Any]) -> None:
    """`check_adjoint` with the precision of the coarsest of what the functions take and return, where there are numbers."""
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"from_functions: apply or adjoint returns {dtype}, expected real numbers")
    real = jnp.result_type(float)
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # all arrays are traced within jit: spare it the products
        return
    mismatch = dot_test(A, jax.random.key(0), dtype=real)
    if not isinstance(mismatch, jax.core.Tracer):  # as it is where the functions close over a traced array
        _refuse(mismatch, 1000 * max(float(jnp.finfo(d).eps) for d in (*dtypes, real)))


def _as_tree(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """f as a pytree, as plain functions are no arguments of jax.jit."""
    return f if isinstance(f, eqx.Module | Partial) else Partial(f)


def from_lineax(operator: lineax.AbstractLinearOperator) -> FunctionOperator:
    """A lineax operator, from one array to one array.  Raises ValueError for others."""
    for name, structure in (("in", operator.in_structure()), ("out", operator.out_structure())):
        if not isinstance(structure, jax.ShapeDtypeStruct):
            raise ValueError(
                f"from_lineax: the {name}_structure of operator is {structure}, expected that of one array"
            )
    shapes = operator.in_structure().shape, operator.out_structure().shape
    return FunctionOperator(*shapes, Partial(_product, operator), Partial(_transposed_product, operator))


def _product(operator: Any, x: Array) -> Array:
    return operator.mv(x)


def _transposed_product(operator: Any, y: Array) -> Array:
    return operator.transpose().mv(y)


def as_lineax(A: LinearOperator, dtype: DTypeLike | None = None) -> lineax.FunctionLinearOperator:
    """A for lineax, which transposes it by JAX.  dtype: of x; None for float64 where enabled, else float32."""
    real = jnp.result_type(float) if dtype is None else dtype
    return lineax.FunctionLinearOperator(A, jax.ShapeDtypeStruct(A.shape_in, real))


# ------------------------------------------------------------------------------------------------ adjoint, norm


def dot_test(
    A: LinearOperator, key: Key[Array, ""], *, probes: int = 4, dtype: DTypeLike | None = None
) -> Float[Array, ""]:
    """How far ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ, for normal x and y: the root of the mean square over `probes` pairs, relative to
    the standard deviation of these numbers.  Rounding for an adjoint pair; about √2 for two unrelated operators."""
    real = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)

    def pair(key: Array) -> tuple[Array, Array]:
        for_x, for_y = jax.random.split(key)
        x, y = jax.random.normal(for_x, A.shape_in, real), jax.random.normal(for_y, A.shape_out, real)
        image, back = A(x), A.T(y)
        return dot(image, y) - dot(x, back), dot(image, image) + dot(back, back)

    with jax.default_matmul_precision("highest"):  # GPUs else round factors to ten bits, which is no fault of the pair
        difference, size = jax.vmap(pair)(jax.random.split(key, probes))
    return jnp.sqrt(2 * jnp.mean(difference**2) / jnp.maximum(jnp.mean(size), jnp.finfo(real).tiny))


def check_adjoint(
    A: LinearOperator, key: Key[Array, ""], *, tolerance: float | None = None, dtype: DTypeLike | None = None
) -> None:
    """Raise ValueError if `dot_test` is above the tolerance (None: a thousand units of rounding) or not finite.

    Four pairs: of a pair that is off by δ, this misses about (tolerance/δ)⁴ of the draws.
    """
    real = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    allowed = 1000 * float(jnp.finfo(real).eps) if tolerance is None else tolerance
    _refuse(dot_test(A, key, dtype=real), allowed)


def _refuse(mismatch: Array, allowed: float) -> None:
    if not float(mismatch) <= allowed:
        raise ValueError(
            f"A: A.T is not the adjoint of A, ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by {float(mismatch):.2g} of their size (allowed: "
            f"{allowed:.2g}); correct one of them, or give adjoint=None to `from_functions`"
        )


class NormBounds(NamedTuple):
    """lower ≤ ‖AᵀA‖ ≤ upper; both exact, up to rounding, where the norm is known."""

    lower: Float[Array, ""]
    upper: Float[Array, ""]


def norm_bounds(
    A: LinearOperator,
    key: Key[Array, ""],
    steps: int = 50,
    *,
    failure: float = 1e-9,
    dtype: DTypeLike | None = None,
) -> NormBounds:
    """Bounds of ‖AᵀA‖ by so many steps of the Lanczos method from a random start.

    The largest Ritz value is at most the norm.  The upper bound is wrong with a probability of at most `failure`: the Ritz
    value is below (1 - ε) ‖AᵀA‖ with at most 1.648 √n exp(-√ε (2 steps - 1)) (Kuczyński and Woźniakowski 1992, Theorem 4.2).
    Or it is that of the operator itself, if smaller.  Raises ValueError for steps < 1 or a failure outside (0, 1).
    """
    if steps < 1:
        raise ValueError(f"norm_bounds: steps is {steps}, expected an integer >= 1")
    if not 0 < failure < 1:
        raise ValueError(f"norm_bounds: failure is {failure}, expected a probability between 0 and 1")
    if (known := A.norm_squared) is not None:
        return NormBounds(known, known)
    n, real = math.prod(A.shape_in), jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    ritz = _ritz(A, jax.random.normal(key, A.shape_in, real), min(steps, n))
    share = (math.log(1.648 * math.sqrt(n) / failure) / (2 * min(steps, n) - 1)) ** 2
    rounding = 1 + 100 * float(jnp.finfo(real).eps)
    upper = ritz * rounding / (1 - share) if share < 1 else jnp.full_like(ritz, jnp.inf)
    bound = A.norm_squared_bound
    return NormBounds(ritz, upper if bound is None else jnp.minimum(upper, bound))


def operator_norm_squared(A: LinearOperator, key: Key[Array, ""], steps: int = 50) -> Float[Array, ""]:
    """‖AᵀA‖: exact where it is known, else the lower one of `norm_bounds`, which is close after some tens of steps."""
    return norm_bounds(A, key, steps).lower


@eqx.filter_jit
def _ritz(A: LinearOperator, start: Array, steps: int) -> Array:
    """The largest eigenvalue of the tridiagonal matrix of the Lanczos method.  Without reorthogonalisation, which extreme Ritz
    values do not need: what rounding does is repeat them."""

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        before, v, beta = carry
        # The upper bound allows for the rounding of the dtype, not for that of factors on a GPU.
        with jax.default_matmul_precision("highest"):
            w = A.T(A(v))
        alpha = dot(v, w)
        w = w - alpha * v - beta * before
        left = euclidean(w)
        goes_on = left > 10 * jnp.finfo(w.dtype).eps * (
            jnp.abs(alpha) + beta
        )  # else all that the start reaches is seen
        left = jnp.where(goes_on, left, 0)
        return (v, jnp.where(goes_on, w / jnp.where(goes_on, left, 1), 0), left), (alpha, left)

    first = start / euclidean(start)
    carry = (jnp.zeros_like(first), first, jnp.zeros((), first.dtype))
    _, (alpha, beta) = jax.lax.scan(step, carry, length=steps)
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))[-1]
