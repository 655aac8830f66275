"""T1 to T3: the transition kernel, and the equation that runs it backwards."""

from __future__ import annotations

import sympy as sp

from paper_checks.gbm_diffusion.common import PAPER
from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context

X, X0, T = sp.symbols("x x_0 t", positive=True)
MU, SIGMA = sp.Function("mu")(T), sp.Function("sigma")(T)


def fokker_planck(drift: sp.Expr, noise: sp.Expr, density: sp.Expr) -> sp.Expr:
    """What ∂p/∂t is for dX = drift dt + noise dW."""
    return -sp.diff(drift * density, X) + sp.diff(noise**2 * density, X, 2) / 2


def plain(expression: sp.Expr) -> sp.Expr:
    """With symbols for unknown functions and their derivatives, so that numbers can be put in for them."""
    for kind in (sp.Derivative, sp.core.function.AppliedUndef):
        found = sorted(expression.atoms(kind), key=lambda e: (-getattr(e, "derivative_count", 0), str(e)))
        expression = expression.subs(
            {e: sp.Symbol(f"f_{i}_{kind.__name__}", positive=True) for i, e in enumerate(found)}
        )
    return expression


@claim(
    PAPER,
    "T1",
    r"For any $\mu(t)$, $\sigma(t)$ the log-normal kernel with $M=\int\mu-\tfrac12\sigma^2$ and $V=\int\sigma^2$ solves the "
    r"Fokker-Planck equation of $dX=\mu X\,dt+\sigma X\,dW$.",
    title="The transition kernel is log-normal",
    kind="symbolic",
    controls={"ito": r"$M=\int\mu$, without the term of Itô", "variance": r"$V=\tfrac12\int\sigma^2$"},
    regime="x, x_0 > 0 and V > 0; coordinates are independent, so that one is enough",
    source="Derived; the released code trains with this kernel.",
)
def kernel(ctx: Context) -> Outcome:
    half = ctx.pick(sp.Rational(1, 2), ito=sp.Integer(0))
    part = ctx.pick(sp.Integer(1), variance=sp.Rational(1, 2))
    shift, variance = sp.Function("M")(T), sp.Function("V", positive=True)(T)
    density = sp.exp(-((sp.log(X / X0) - shift) ** 2) / (2 * variance)) / (X * sp.sqrt(2 * sp.pi * variance))
    rates = {sp.diff(shift, T): MU - half * SIGMA**2, sp.diff(variance, T): part * SIGMA**2}
    residual = (sp.diff(density, T).subs(rates) - fokker_planck(MU * X, SIGMA * X, density)) / density
    return ctx.proved(plain(sp.simplify(residual)), note="for functions μ and σ")


@claim(
    PAPER,
    "T2",
    r"$dX=[(2\sigma^2-\mu)X+\sigma^2X\circ\xi]\,d\tau+\sigma X\circ d\bar W$ runs the marginals backwards, as does, for every "
    r"$\lambda\ge0$, $dX=[-\mu X+\tfrac{1+\lambda^2}2(2\sigma^2X+\sigma^2X\circ\xi)]\,d\tau+\lambda\sigma X\circ d\bar W$.",
    title="The reverse equation, and its family",
    kind="symbolic",
    controls={
        "one": r"$\sigma^2-\mu$ for $2\sigma^2-\mu$: half of the divergence of the diffusion",
        "flow": r"$\lambda$ in place of $\tfrac{1+\lambda^2}2$",
    },
    regime="a density p(x, t) that is any solution of the forward equation, twice differentiable",
    source="Anderson's formula with a diffusion that depends on the state; derived.",
)
def reverse(ctx: Context) -> Outcome:
    divergence, share = ctx.pick(2, one=1), ctx.pick(None, flow=True)
    p = sp.Function("p", positive=True)(X, T)
    hyvarinen = X * sp.diff(sp.log(p), X)
    lam = sp.Symbol("lambda", nonnegative=True)
    backwards = -fokker_planck(MU * X, SIGMA * X, p)  # of p at T - τ, as a function of τ
    residuals = []
    for scale in (sp.Integer(1), sp.Integer(0), lam):
        part = scale if share else (1 + scale**2) / 2
        drift = -MU * X + part * (divergence * SIGMA**2 * X + SIGMA**2 * X * hyvarinen)
        residuals.append(plain(sp.expand(sp.simplify(backwards - fokker_planck(drift, scale * SIGMA * X, p)))))
    return ctx.proved(*residuals, note="λ = 1, 0 and a symbol; p not given")


@claim(
    PAPER,
    "T7",
    r"Hyvärinen's loss for non-negative data, $\tfrac12x^2\psi^2+2x\psi+x^2\psi'$, is his loss for the real line, of $\log x$, "
    r"less one half per coordinate.",
    title="Non-negative score matching is score matching of log x",
    kind="symbolic",
    controls={"single": r"$x\psi$ for $2x\psi$", "constant": "less one"},
    regime="any differentiable ψ on x > 0",
    source="Hyvärinen (2005, 2007); derived.",
)
def log_space_loss(ctx: Context) -> Outcome:
    twice, less = ctx.pick(2, single=1), ctx.pick(sp.Rational(1, 2), constant=1)
    psi = sp.Function("psi")(X)
    here = X**2 * psi**2 / 2 + twice * X * psi + X**2 * sp.diff(psi, X)
    score = X * psi + 1  # in log coordinates, the one from the Jacobian
    slope = X * sp.diff(score, X)  # d/dy = x d/dx
    return ctx.proved(plain(sp.expand(here - (score**2 / 2 + slope) + less)))
