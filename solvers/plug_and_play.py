"""Plug-and-play reconstruction: a data term h, a proximal map in place of a prior, and what is known of the convergence.

    admm   x = prox_{h/ρ}(z - u),  u ← u + x - z,  z = prox_{λR}(u + x)     minimises h + ρ λ R
    drs    p = prox_{h/ρ}(s),  q = prox_{λR}(2p - s),  s ← s + q - p        the same with s = z - u
    pgd    x ← prox_{λR}(x - η ∇h(x))                                       h + (λ/η) R
    hqs    z ← prox_{λR}(prox_{h/ρ}(z))                                     λ R plus the envelope of h, divided by ρ

admm is the main algorithm of Fang, Buchanan, Sulam (ICLR 2024, arXiv 2310.14344), whose Theorem 4.1 has it converge for a learned
proximal network with 0 < α < 1 if ρ > ‖AᵀA‖; pgd is in its appendix.  ρ and η are steps *and* weights of the prior: with λ, which
a learned prior takes exactly (`solvers.proximal.regularizer`), a step can obey the theorem and the weight be what one wants.

The prior is a `Regularizer`, a learned network (its own R, λ = 1) or any other denoiser, of which nothing is known.  The data
term has prox(v, step), grad(x) and a Lipschitz constant of its gradient, lipschitz (`solvers.imaging.LeastSquares`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from solvers.proximal.functional import Regularizer
from solvers.proximal.network import LearnedProximal, is_convex

Method = Literal["admm", "drs", "pgd", "hqs"]


@runtime_checkable
class DataTerm(Protocol):
    """h(x), as far as it is needed: grad for pgd, prox for the others."""

    @property
    def lipschitz(self) -> Any: ...

    def grad(self, x: Array) -> Array: ...

    def prox(self, v: Array, step: Any) -> Array: ...


class Status(enum.IntEnum):
    """How a run ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    NOT_FINITE = 2


@dataclass(frozen=True)
class Hypothesis:
    """One condition of a convergence theorem; holds is None where it cannot be decided."""

    condition: str
    holds: bool | None
    remedy: str = ""


@dataclass(frozen=True)
class Certificate:
    """What is known of the convergence of a method with this operator, step and prior before it runs."""

    theorem: str
    hypotheses: tuple[Hypothesis, ...]

    @property
    def holds(self) -> bool:
        """Whether all conditions are known to hold.  They are sufficient, not necessary."""
        return all(h.holds is True for h in self.hypotheses)

    def __str__(self) -> str:
        lines = [f"{self.theorem}: {'converges' if self.holds else 'not certified'}"]
        for h in self.hypotheses:
            word = {True: "holds", False: "violated", None: "unknown"}[h.holds]
            lines.append(f"  {word}: {h.condition}" + (f"; {h.remedy}" if h.remedy and h.holds is not True else ""))
        return "\n".join(lines)


class Info(eqx.Module):
    """steps      taken
    status       a `Status`
    changes      (max_steps,) of each step ‖z_{k+1} - z_k‖ over the larger of ‖z_{k+1}‖ and ‖z_1‖; NaN after the last
    converged    whether the last one is below the tolerance
    certificate  what was known beforehand; of the hypotheses that depend on traced values: unknown
    """

    steps: Int[Array, ""]
    status: Int[Array, ""]
    changes: Float[Array, " max_steps"]
    converged: Bool[Array, ""]
    certificate: Certificate = eqx.field(static=True)


def admm(
    data: DataTerm,
    prior: Any,
    x0: Float[Array, "*shape"],
    *,
    rho: float | Float[Array, ""],
    lam: float | Float[Array, ""] = 1.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> tuple[Float[Array, "*shape"], Info]:
    """The alternating direction method of multipliers in the paper's order: data, multiplier, prior.  Returns x.

    x0         z at the start, where u = 0
    rho, lam   ρ and λ; λ ≠ 1 needs a `Regularizer`
    tolerance  of the relative change of z, at which it stops

    Pure and jit-able; jax.vmap for many signals.  Derivatives with respect to all arrays in `data`, `prior`, rho and lam are
    those of the fixed point, by implicit differentiation, and NaN if the run did not converge; x0 has none.  A run whose
    numbers are not finite any more ends with `Status.NOT_FINITE`, and x is NaN.
    Raises ValueError for rho ≤ 0, lam ≤ 0, and lam ≠ 1 with a prior that has only one map.
    """
    _check_positive("admm", rho=rho, lam=lam, tolerance=tolerance)
    denoise = _proximal_map("admm", prior, lam)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        z, u = state
        x = data.prox(z - u, 1 / rho)
        u = u + x - z
        return denoise(u + x), u

    (z, u), info = _run(step, (x0, jnp.zeros_like(x0)), lambda s: s[0], tolerance, max_steps)
    return _last(data, z - u, 1 / rho), info(certificate("admm", data, prior, step=rho, lam=lam))


def drs(
    data: DataTerm,
    prior: Any,
    x0: Float[Array, "*shape"],
    *,
    rho: float | Float[Array, ""],
    lam: float | Float[Array, ""] = 1.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> tuple[Float[Array, "*shape"], Info]:
    """Douglas-Rachford splitting, the smooth function first.  x0 is s at the start; returns p.  Else as `admm`."""
    _check_positive("drs", rho=rho, lam=lam, tolerance=tolerance)
    denoise = _proximal_map("drs", prior, lam)

    def step(s: Array) -> Array:
        p = data.prox(s, 1 / rho)
        return s + denoise(2 * p - s) - p

    s, info = _run(step, x0, lambda s: s, tolerance, max_steps)
    return _last(data, s, 1 / rho), info(certificate("drs", data, prior, step=rho, lam=lam))


def pgd(
    data: DataTerm,
    prior: Any,
    x0: Float[Array, "*shape"],
    *,
    eta: float | Float[Array, ""],
    lam: float | Float[Array, ""] = 1.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> tuple[Float[Array, "*shape"], Info]:
    """Proximal gradient descent with step η.  Else as `admm`."""
    _check_positive("pgd", eta=eta, lam=lam, tolerance=tolerance)
    denoise = _proximal_map("pgd", prior, lam)
    x, info = _run(lambda x: denoise(x - eta * data.grad(x)), x0, lambda x: x, tolerance, max_steps)
    return x, info(certificate("pgd", data, prior, step=eta, lam=lam))


def hqs(
    data: DataTerm,
    prior: Any,
    x0: Float[Array, "*shape"],
    *,
    rho: float | Float[Array, ""],
    lam: float | Float[Array, ""] = 1.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> tuple[Float[Array, "*shape"], Info]:
    """Half-quadratic splitting.  Else as `admm`."""
    _check_positive("hqs", rho=rho, lam=lam, tolerance=tolerance)
    denoise = _proximal_map("hqs", prior, lam)
    z, info = _run(lambda z: denoise(data.prox(z, 1 / rho)), x0, lambda z: z, tolerance, max_steps)
    return z, info(certificate("hqs", data, prior, step=rho, lam=lam))


# ------------------------------------------------------------------------------------------------ certificate


def certificate(
    method: Method, data: DataTerm, prior: Any, *, step: float | Array, lam: float | Array = 1.0
) -> Certificate:
    """Which conditions for convergence hold.  step is ρ, of pgd η.

    admm, drs  Theorem 4.1, by the descent of Themelis and Patrinos (2020) for the smooth function first: a proximal map,
               coercive (0 < α < 1), ρ > L_h.  With a convex R: any ρ > 0
    pgd        appendix: a proximal map, coercive, η < 1/L_h.  With a convex R: η < 2/L_h
    hqs        gradient descent with step 1 on the envelope of h, whose gradient has a constant below 1: any ρ > 0
    """
    if method not in ("admm", "drs", "pgd", "hqs"):
        raise ValueError(f"method: is {method!r}, expected 'admm', 'drs', 'pgd' or 'hqs'")
    constant, size = _known(data.lipschitz), _known(step)
    convex = isinstance(prior, Regularizer) and prior.weak_convexity == 0
    conditions = [_is_proximal(prior, lam)]
    if not convex:
        conditions.append(_is_coercive(prior))
    if method == "hqs":
        conditions.append(Hypothesis("ρ > 0", None if size is None else size > 0))
    elif method == "pgd":
        most = 2.0 if convex else 1.0
        name = f"η < {most:g}/L_h" + (" (R is convex)" if convex else "")
        fits = None if size is None or constant is None else size * constant < most
        if size is not None and constant is not None:
            name += f": η = {size:.4g}, L_h = {constant:.4g}"
            remedy = f"take η < {most / constant:.4g}, and λ as many times as small to keep the weight λ/η of the prior"
        else:
            remedy = "L_h or η is not known"
        conditions.append(Hypothesis(name, fits, remedy))
    elif convex:
        conditions.append(Hypothesis("ρ > 0 (R is convex)", None if size is None else size > 0))
    else:
        fits = None if size is None or constant is None else size > constant
        name, remedy = "ρ > L_h = ‖AᵀA‖", "L_h or ρ is not known"
        if size is not None and constant is not None:
            name += f": ρ = {size:.4g}, L_h = {constant:.4g}"
            better, scale = 1.05 * constant, _known(lam)
            kept = "" if scale is None else f", and λ = {scale * size / better:.4g} to keep the weight ρ λ of the prior"
            remedy = f"take ρ = {better:.4g}{kept}"
        conditions.append(Hypothesis(name, fits, remedy))
    theorem = {"admm": "ADMM", "drs": "DRS", "pgd": "PGD", "hqs": "HQS"}[method]
    return Certificate(theorem, tuple(conditions))


def _is_proximal(prior: Any, lam: Any) -> Hypothesis:
    name, remedy = "the denoiser is the proximal map of a function", "use a learned proximal network or a Regularizer"
    exact = isinstance(prior, Regularizer | LearnedProximal)
    network = getattr(prior, "network", prior)
    if isinstance(network, LearnedProximal) and (convex := is_convex(network)) is not True:
        remedy = (
            "its weights are not known here"
            if convex is None
            else "W_k or w has negative entries: use projected(network)"
        )
        return Hypothesis(name, convex, remedy)
    if exact and not isinstance(prior, LearnedProximal) and prior.weak_convexity is None:
        return Hypothesis(name + ", single-valued", None, "the weak convexity of R is not known")
    return Hypothesis(name, True if exact else None, remedy)


def _is_coercive(prior: Any) -> Hypothesis:
    network = getattr(prior, "network", prior)
    if not isinstance(network, LearnedProximal):
        return Hypothesis("R is coercive", None, "nothing is known of this prior")
    fits = 0 < network.alpha < 1
    remedy = "train with 0 < α < 1: " + (
        "R is finite only on the range of f" if network.alpha == 0 else "R falls without end"
    )
    return Hypothesis(f"0 < α < 1, so that R is coercive: α = {network.alpha:g}", fits, remedy)


def _known(value: Any) -> float | None:
    return None if value is None or isinstance(value, jax.core.Tracer) else float(value)


# --------------------------------------------------------------------------------------------------- iteration


def _check_positive(caller: str, **given: Any) -> None:
    for name, value in given.items():
        known = _known(value)
        if known is not None and not (known > 0 and math.isfinite(known)):
            raise ValueError(f"{caller}: {name} is {known}, expected a positive number")


def _proximal_map(caller: str, prior: Any, lam: Any) -> Callable[[Array], Array]:
    if isinstance(prior, Regularizer):
        return lambda v: prior.prox(v, lam)
    if not callable(prior):
        raise TypeError(
            f"{caller}: prior is of type {type(prior).__name__}, expected a Regularizer, a network or a denoiser"
        )
    if isinstance(lam, jax.core.Tracer) or lam != 1:
        hint = "; use solvers.proximal.regularizer(network)" if isinstance(prior, LearnedProximal) else ""
        raise ValueError(f"{caller}: lam is {lam}, but this prior has one map only, for lam = 1{hint}")
    return prior  # type: ignore[no-any-return]


def _last(data: DataTerm, v: Array, step: Any) -> Array:
    """The proximal map of the data term at the end of a run, NaN after one that is not finite.  A solver inside of the term may
    refuse such a v outside of jit, where the status is to tell."""
    if not isinstance(v, jax.core.Tracer) and not bool(jnp.isfinite(v).all()):
        return jnp.full_like(v, jnp.nan)
    return data.prox(v, step)


class _Carry(NamedTuple):
    state: Any
    k: Array
    changes: Array
    status: Array
    first: Array  # ‖z_1‖


def _run(
    step: Callable[[Any], Any], start: Any, seen: Callable[[Any], Array], tolerance: float, max_steps: int
) -> tuple[Any, Callable[[Certificate], Info]]:
    """The fixed point of `step` from `start`, as far as it was reached."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps: is {max_steps!r}, expected an integer >= 1")
    # In the dtype of what a step returns, the wider one of signal and data.
    start = jax.tree.map(lambda s, new: lax.stop_gradient(s).astype(new.dtype), start, jax.eval_shape(step, start))

    def moved(state: Any) -> Any:
        return jax.tree.map(jnp.subtract, step(state), state)

    def iterate(_: Any, start: Any) -> tuple[Any, tuple[Array, Array, Array]]:
        z = seen(start)
        changes = jnp.full(max_steps, jnp.nan, z.dtype)

        def more(carry: _Carry) -> Array:
            return (carry.status < 0) & (carry.k < max_steps)

        def turn(carry: _Carry) -> _Carry:
            new = step(carry.state)
            size = jnp.linalg.norm(seen(new).reshape(-1))
            first = jnp.where(carry.k == 0, size, carry.first)
            change = jnp.linalg.norm((seen(new) - seen(carry.state)).reshape(-1))
            change = change / jnp.maximum(jnp.maximum(size, first), jnp.finfo(z.dtype).tiny)
            status = jnp.where(change <= tolerance, Status.CONVERGED, -1)
            # All of the state: a multiplier can overflow behind a denoiser that is bounded.
            fine = jnp.stack([jnp.isfinite(part).all() for part in jax.tree.leaves((change, size, new))]).all()
            status = jnp.where(fine, status, Status.NOT_FINITE).astype(jnp.int32)
            return _Carry(new, carry.k + 1, carry.changes.at[carry.k].set(change), status, first)

        begin = _Carry(start, jnp.int32(0), changes, jnp.int32(-1), jnp.zeros((), z.dtype))
        end = lax.stop_gradient(lax.while_loop(more, turn, begin))  # newer versions of jax would differentiate it
        status = jnp.where(end.status < 0, Status.MAX_STEPS, end.status)
        # As real numbers, since `custom_root` has no tangents for others.
        return end.state, (end.k.astype(z.dtype), end.changes, status.astype(z.dtype))

    # GPUs else round the factors of products to ten bits, and no run comes to a tolerance below a thousandth.
    with jax.default_matmul_precision("highest"):
        state, (steps, changes, ended) = lax.custom_root(moved, start, iterate, _solve_linear, has_aux=True)
    k, status = lax.stop_gradient(steps).astype(jnp.int32), lax.stop_gradient(ended).astype(jnp.int32)
    changes, converged = lax.stop_gradient(changes), status == Status.CONVERGED
    state = jax.tree.map(lambda s: _gated(s, converged, status == Status.NOT_FINITE), state)
    return state, lambda known: Info(k, status, changes, converged, known)


def _solve_linear(matvec: Callable[[Any], Any], y: Any) -> Any:
    """The tangent of the fixed point: (J - 1) v = y, not symmetric; NaN where it was not found."""

    def solve(matvec: Callable[[Any], Any], y: Any) -> Any:
        eps = float(jnp.finfo(jax.tree.leaves(y)[0].dtype).eps)
        v, _ = jax.scipy.sparse.linalg.gmres(matvec, y, tol=10 * eps, restart=30, maxiter=20)
        left = sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (matvec(v), y)), strict=True))
        size = sum(jnp.sum(b**2) for b in jax.tree.leaves(y))
        return jax.tree.map(lambda a: jnp.where(left <= eps * size, a, jnp.nan), v)  # half of the digits

    return lax.custom_linear_solve(matvec, y, solve, transpose_solve=solve)


@jax.custom_jvp
def _gated(x: Array, converged: Array, lost: Array) -> Array:
    """x, NaN in all entries if one was lost, whose derivative is NaN unless the run converged: it is that of a fixed point."""
    return jnp.where(lost, jnp.nan, x)


@_gated.defjvp
def _gated_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Any, Any]) -> tuple[Array, Array]:
    x, converged, lost = primals
    return _gated(x, converged, lost), jnp.where(converged, 1, jnp.nan).astype(x.dtype) * tangents[0]
