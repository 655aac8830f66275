"""How a run of an iterative solver ended: its status, its diagnostics, and the residual in 64 bits that they rest on."""

import enum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from solvers.operators import exact_residual
from solvers.stencil import Stencil


class Status(enum.IntEnum):
    """How a run ended.  `message` says it in words."""

    CONVERGED = 0
    MAX_STEPS = 1
    STAGNATED = 2
    NOT_POSITIVE_DEFINITE = 3
    INCONSISTENT = 4
    NOT_FINITE = 5
    PRECISION = 6

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the recomputed residual is below the tolerance",
    Status.MAX_STEPS: "max_steps were taken; take more, or a better direction or preconditioner",
    Status.STAGNATED: "the direction is orthogonal to the residual or lies in the span of the last directions, so that no "
    "step along it helps; use another direction, or fallback='residual'",
    Status.NOT_POSITIVE_DEFINITE: "negative curvature, pᵀAp < 0: A is not positive semi-definite; for -A with b solve "
    "with the sign of both turned",
    Status.INCONSISTENT: "Ap = 0 along a direction p with pᵀr ≠ 0: A is singular and b has a part outside its range; take "
    "that part (for a Poisson problem without open boundary: the mean) out of b",
    Status.NOT_FINITE: "the direction or the operator returned NaN or infinity",
    Status.PRECISION: "the true residual does not fall any more although the recursion does: rounding; ask for a larger "
    "rtol, or compute in 64 bits",
}


class Info(NamedTuple):
    """Diagnostics of a run, arrays only; norms are Euclidean and relative to ‖b‖ (absolute if b is zero).

    steps           steps taken, those of the fallback included
    status          a `Status`
    residuals       residual norm before the first and after every step; NaN after the last
    residual        of the answer, recomputed; its dtype says in which precision
    converged       whether that is below max(rtol, atol/‖b‖)
    fallback_steps  how many of the steps were the fallback's
    """

    steps: Int[Array | np.ndarray, "..."]
    status: Int[Array | np.ndarray, "..."]
    residuals: Float[Array | np.ndarray, "... steps+1"]
    residual: Float[Array | np.ndarray, "..."]
    converged: Bool[Array | np.ndarray, "..."]
    fallback_steps: Int[Array | np.ndarray, "..."]


def in_float64(A: Any, b: Array, x: Array, info: Any, rtol: float, atol: float) -> Any:
    """`info` with residual and verdict by a residual that is computed in float64 on the host.

    A is a dense or sparse matrix or a stencil; info has the fields of `Info` that are concerned.
    """
    inside = np.asarray(A.unknown) if isinstance(A, Stencil) else True
    size = float(np.linalg.norm(np.where(inside, np.asarray(b, np.float64), 0)))
    norm = float(np.linalg.norm(exact_residual(A, b, x)))
    met = norm <= max(rtol * size, atol)
    status = Status.CONVERGED if met else Status.PRECISION if info.converged else Status(int(info.status))
    return info._replace(
        residual=np.array(norm / (size or 1)), converged=np.array(met), status=np.array(status, np.int32)
    )


def require_convergence(caller: str, info: Any, rtol: float) -> None:
    """Raise RuntimeError, which says how the run ended, unless it converged."""
    if not bool(info.converged):
        end = Status(int(info.status))
        raise RuntimeError(
            f"{caller}: not converged after {int(info.steps)} steps, relative residual {float(info.residual):.2e} "
            f"(rtol {rtol:g}): {end.name}, {end.message}"
        )
