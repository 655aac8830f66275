"""T3: when plug-and-play iterations converge, and how fast."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import sympy as sp
from jax.tree_util import Partial

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.proximal.common import PAPER
from paper_checks.proximal.digit_images import free_denoiser, test_images
from paper_checks.proximal.networks import compiled, prior_at, random_network
from solvers import imaging, plug_and_play
from solvers.plug_and_play import Status
from solvers.proximal import weights
from solvers.proximal.denoisers import FreeDenoiser
from solvers.proximal.network import Layer, LearnedProximal

N = 5
MANY = 5


class Quadratic(NamedTuple):
    """h(x) = ‖A x - b‖²/2 with a dense matrix."""

    matrix: Any
    b: Any

    @property
    def lipschitz(self) -> Any:
        return jnp.linalg.norm(self.matrix, 2) ** 2

    def value(self, x: Any) -> Any:
        return jnp.sum((self.matrix @ x - self.b) ** 2) / 2

    def grad(self, x: Any) -> Any:
        return self.matrix.T @ (self.matrix @ x - self.b)

    def prox(self, v: Any, step: Any) -> Any:
        n = self.matrix.shape[1]
        return jnp.linalg.solve(self.matrix.T @ self.matrix + jnp.eye(n) / step, self.matrix.T @ self.b + v / step)


def problems(ctx: Context) -> Quadratic:
    """MANY random ones with a third of the directions unseen and the largest eigenvalue of AᵀA equal to one."""
    keys = jax.random.split(jax.random.fold_in(ctx.key, 3), ctx.n(MANY))

    def one(key: jax.Array) -> Quadratic:
        matrix = jax.random.normal(key, (N - 2, N), jnp.float64)
        matrix = matrix / jnp.linalg.norm(matrix, 2)
        return Quadratic(matrix, jax.random.normal(jax.random.fold_in(key, 1), (N - 2,), jnp.float64))

    return jax.vmap(one)(keys)


def denoisers(ctx: Context, alpha: float = 0.1) -> LearnedProximal:
    keys = jax.random.split(jax.random.fold_in(ctx.key, 4), ctx.n(MANY))
    return jax.vmap(lambda key: random_network(key, N, alpha))(keys)


def steep() -> LearnedProximal:
    """f(y) = .1 y + 2 s(8 y) - 1, s the logistic: slope 4.1 at 0, .1 far away."""
    one = jnp.ones((1, 1))
    return LearnedProximal((Layer(one, None, None),), jnp.array([2.0]), -jnp.ones(1), None, (1,), 8.0, 0.1)


def on_the_line(b: float) -> Quadratic:
    return Quadratic(jnp.eye(1), jnp.full(1, b))


# -- T3: ADMM ---------------------------------------------------------------------------------------------------------------


def _growth(data: Quadratic, net: LearnedProximal, rho: Any, x0: jax.Array) -> jax.Array:
    """The largest relative increase in 200 steps of h(x) + ρ R(z) + ρ⟨u, x - z⟩ + ρ/2 ‖x - z‖²; R(f(v)) is known without an
    inversion."""

    def step(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        z, u = state
        x = data.prox(z - u, 1 / rho)
        u = u + x - z
        v = u + x
        z = net(v)
        value = data.value(x) + rho * (prior_at(net, v) + jnp.vdot(u, x - z) + jnp.sum((x - z) ** 2) / 2)
        return (z, u), value

    values = jax.lax.scan(step, (x0, jnp.zeros_like(x0)), length=200)[1]
    return (jnp.diff(values) / (1 + jnp.abs(values[1:]))).max()


_growth_once = compiled(_growth)
_growth_many = compiled(jax.vmap(_growth, (0, 0, None, None)))


def _ended(data: Quadratic, f: Any, rho: Any, x0: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last change, the gradient of h + ρ R at the end (which the inverse at z is known for), and the largest entry."""
    x, info = plug_and_play.admm(data, f, x0, rho=rho, tolerance=1e-12, max_steps=20_000)
    last = info.changes[info.steps - 1]
    v = x - data.grad(x) / rho  # at a fixed point x = f(x - ∇h(x)/ρ)
    return last, jnp.abs(rho * (f(v) - x)).max(), jnp.abs(x).max()


_ended_once = compiled(_ended)
_ended_many = compiled(jax.vmap(_ended, (0, 0, None, None)))


@claim(
    PAPER,
    "T3",
    r"PnP-ADMM with a learned proximal network, softplus activations, $0<\alpha<1$, linear $A$ and $\rho>\|A^\top A\|$ converges "
    r"to a fixed point, which is a critical point of $h+\rho R_\theta$.  No contractivity is needed: the augmented Lagrangian "
    r"$h(x)+\rho R_\theta(z)+\rho\langle u,x-z\rangle+\tfrac\rho2\|x-z\|^2$ never grows.",
    title="PnP-ADMM converges",
    kind="bound",
    controls={
        "small_step": r"$\rho=0.3$ with $\|A^\top A\|=1$, for a network of slope 4.1 at its fixed point",
        "half": r"$\rho=0.5$, where the iterates of that network converge, and the augmented Lagrangian grows on the way",
        "alpha": r"$\alpha=1.5$",
        "not_proximal": "an expanding rotation for the network",
        "free": "a free network, trained to denoise digits as well, for the learned one",
    },
    regime="random networks with slopes up to ten and operators of rank 3 on 5 entries, ‖AᵀA‖ = 1, ρ = 1.05 and 1.5; the "
    "network of slope 4.1 on the line, b = 0 and .2; for all of them the augmented Lagrangian along 200 steps; and digits "
    "with half of their pixels and the shipped network at ρ = 1.05, whose changes have to fall below 1e-4 in 400 steps",
    source="Theorem 4.1, recalled; its mechanism is the descent of Themelis and Patrinos (2020).",
    blind_spot="Convergence within 20 000 steps to 1e-8 on samples; a limit is not shown to be unique.",
)
def admm_converges(ctx: Context) -> Outcome:
    rhos, alpha = ctx.pick((1.05, 1.5), small_step=(0.3,), half=(0.5,)), ctx.pick(0.1, alpha=1.5)
    turned = ctx.pick(False, not_proximal=True)
    slack: dict[str, float] = {}
    growths = []
    for rho in rhos:
        for b in (0.0, 0.2):
            on, start = (on_the_line(b), steep(), jnp.asarray(rho)), jnp.full(1, 0.4)
            last, stationary, _ = _ended_once(*on, start)
            slack[f"slope 4.1, ρ = {rho}, b = {b}"] = 1e-8 - max(float(last), float(stationary))
            growths.append(float(_growth_once(*on, start)))
            slack[f"Lagrangian, slope 4.1, ρ = {rho}, b = {b}"] = 1e-9 - growths[-1]
    data, nets = problems(ctx), denoisers(ctx, alpha)
    for rho in () if turned else rhos:
        growths.append(float(_growth_many(data, nets, jnp.asarray(rho), jnp.ones(N)).max()))
        slack[f"Lagrangian, random, ρ = {rho}"] = 1e-9 - growths[-1]
    if min(rhos) > 1:
        rotation = 1.2 * jax.scipy.linalg.expm(1.3 * (jnp.eye(N, k=1) - jnp.eye(N, k=-1)))
        f = Partial(jnp.matmul, jnp.broadcast_to(rotation, (len(nets.output), N, N))) if turned else nets
        for rho in rhos:
            last, stationary, size = (np.asarray(v) for v in _ended_many(data, f, jnp.asarray(rho), jnp.ones(N)))
            left = np.where(np.isfinite(last) & (size < 1e6), np.maximum(last, stationary), np.inf)
            slack[f"random, ρ = {rho}"] = 1e-8 - min(float(left.max()), 1e9)
        if not turned:
            slack["digits, ρ = 1.05"] = 1e-4 - _on_digits(free_denoiser(0) if ctx.pick(False, free=True) else None)
    return ctx.cases(
        slack,
        note="last relative change and gradient below 1e-8; largest growth of the augmented Lagrangian in a step, over its size: "
        f"{max(growths):.1e}",
    )


def _on_digits(free: FreeDenoiser | None) -> float:
    """The largest relative change of 16 digits with half of their pixels after 400 steps of ADMM; with the shipped network if
    None."""
    shape, network = (1, 8, 8), weights.load("digits8x8")
    seen = imaging.inpainting(jnp.asarray(np.random.default_rng(0).random(shape) < 0.5))
    images = jnp.asarray(test_images()[:16], jnp.float32)
    noise = 0.05 * jax.random.normal(jax.random.key(1), images.shape, jnp.float32)

    def denoise(y: jax.Array) -> jax.Array:
        return network(y) if free is None else free(y.reshape(-1)).reshape(shape)

    def one(b: jax.Array) -> jax.Array:
        _, info = plug_and_play.admm(
            imaging.LeastSquares(seen, b), denoise, b, rho=1.05, tolerance=1e-12, max_steps=400
        )
        last = info.changes[info.steps - 1]
        return jnp.where(jnp.isfinite(last), last, 1e9)

    return float(jax.jit(jax.vmap(one))(jax.vmap(seen)(images + noise)).max())


# -- T3b: proximal gradient descent -----------------------------------------------------------------------------------------


def _soft(width: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - width, 0)


def _descent(data: Quadratic, f: Any, eta: Any, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, info = plug_and_play.pgd(data, f, x0, eta=eta, tolerance=1e-12, max_steps=40_000)
    return info.changes[info.steps - 1], jnp.abs(f(x - eta * data.grad(x)) - x).max()


_descent_once = compiled(_descent)
_descent_many = compiled(jax.vmap(_descent, (0, 0, None, None)))


@claim(
    PAPER,
    "T3b",
    r"PnP-PGD with $0<\eta<1/\|A^\top A\|$ converges to a critical point of $h+\eta^{-1}R_\theta$; for a convex $R$ the range is "
    r"$(0,2/\|A^\top A\|)$.",
    title="PnP-PGD converges",
    kind="bound",
    controls={
        "convex_range": r"$\eta\in(1/L_h,2/L_h)$ for a prior that is not convex: $\eta=1.25$, $1.5$",
        "beyond": r"$\eta=2.1/L_h$ for a convex prior",
    },
    regime="random networks with slopes up to ten on 5 entries and the one of slope 4.1, η = .5 and .95; an absolute value as "
    "the convex prior, η = 1.9",
    source="Appendix (the theorem of the first submission), after a reviewer's summary.",
)
def descent_converges(ctx: Context) -> Outcome:
    etas, far = ctx.pick((0.5, 0.95), convex_range=(1.25, 1.5)), ctx.pick(1.9, beyond=2.1)
    nets, data = denoisers(ctx), problems(ctx)
    slack: dict[str, float] = {}

    def left(values: Any) -> float:
        worst = np.nan_to_num(np.maximum(*(np.asarray(v) for v in values)), nan=np.inf)
        return 1e-9 - min(float(worst.max()), 1e9)

    for eta in etas:
        line = _descent_once(on_the_line(0.0), steep(), jnp.asarray(eta), jnp.full(1, 0.4))
        slack[f"slope 4.1, η = {eta}"] = left(line)
        if eta < 1:
            many = _descent_many(data, nets, jnp.asarray(eta), jnp.ones(N))
            slack[f"random, η = {eta}"] = left(many)

    width = jnp.full(len(nets.output), 0.1)
    slack[f"convex, η = {far}"] = left(_descent_many(data, Partial(_soft, width), jnp.asarray(far), jnp.ones(N)))
    return ctx.cases(slack, note="last relative change and distance from a fixed point below 1e-9")


# -- T3c: half-quadratic splitting ------------------------------------------------------------------------------------------


def _scaled(factor: jax.Array, v: jax.Array) -> jax.Array:
    return factor * v


def _split(data: Quadratic, f: Any, rho: Any, x0: jax.Array) -> jax.Array:
    z, info = plug_and_play.hqs(data, f, x0, rho=rho, tolerance=1e-12, max_steps=40_000)
    last = jnp.maximum(info.changes[info.steps - 1], jnp.abs(f(data.prox(z, 1 / rho)) - z).max())
    return jnp.where(jnp.isfinite(last), last, 1e9)


_split_once = compiled(_split)
_split_many = compiled(jax.vmap(_split, (0, 0, None, None)))


@claim(
    PAPER,
    "T3c",
    r"PnP-HQS converges for every $\rho>0$: it is proximal gradient descent with step 1 on the envelope of $h$, whose gradient "
    r"has the constant $L_h/(L_h+\rho)<1$.",
    title="PnP-HQS converges for every weight",
    kind="bound",
    controls={"not_proximal": "the opposite of an expansion, $f(y)=-2y$, for the network", "alpha": r"$\alpha=1.5$"},
    regime="random networks with slopes up to ten on 5 entries, and the one of slope 4.1; ρ = .05, .3, 1, 5",
    source="Derived.",
)
def splitting_converges(ctx: Context) -> Outcome:
    opposite, alpha = ctx.pick(False, not_proximal=True), ctx.pick(0.1, alpha=1.5)
    nets, data = denoisers(ctx, alpha), problems(ctx)
    slack: dict[str, float] = {}

    f = Partial(_scaled, jnp.full(len(nets.output), -2.0)) if opposite else nets
    for rho in (0.05, 0.3, 1.0, 5.0):
        at = jnp.asarray(rho)
        slack[f"slope 4.1, ρ = {rho}"] = 1e-9 - float(_split_once(on_the_line(0.2), steep(), at, jnp.full(1, 0.4)))
        slack[f"random, ρ = {rho}"] = 1e-9 - float(_split_many(data, f, at, jnp.ones(N)).max())
    return ctx.cases(slack, note="last relative change and distance from a fixed point below 1e-9")


# -- T3d: the local law -----------------------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T3d",
    r"Where $A^\top A$ and $J_f$ share an eigenvector with eigenvalues $\ell$ and $d$, the multiplier of ADMM and DRS is "
    r"$\frac{\ell+d(\rho-\ell)}{\rho+\ell}$, of PGD $d(1-\eta\ell)$, of HQS $\frac{d\rho}{\rho+\ell}$.  For $\rho<\ell$ ADMM "
    r"oscillates iff $d>\frac{2\ell+\rho}{\ell-\rho}$, which is above 2; PGD with $\eta\ell>1$ iff $d>\frac1{\eta\ell-1}$.",
    title="The exact local law, and where it breaks",
    kind="exact",
    controls={
        "firm": r"$\frac{\ell+d(\rho-\ell)}{\rho}$ for ADMM",
        "threshold": r"ADMM oscillating from $d>\frac{2\ell}{\ell-\rho}$ on",
    },
    regime="the network of slope 4.1 on the line with A = 1: Jacobians of one step, and runs on both sides of the thresholds "
    "ρ = .4118 and η = 1.2439",
    source="Derived.",
)
def local_law(ctx: Context) -> Outcome:
    wrong, early = ctx.pick(False, firm=True), ctx.pick(False, threshold=True)
    net, slack = steep(), {}
    d = 4.1
    for ell in (0.5, 1.0, 2.0):
        data = Quadratic(math.sqrt(ell) * jnp.eye(1), jnp.zeros(1))
        for rho in (0.2, 0.9, 3.0):

            def step(s: jax.Array, data: Quadratic = data, rho: float = rho) -> jax.Array:
                p = data.prox(s, 1 / rho)
                return s + net(2 * p - s) - p

            def both(state: jax.Array, data: Quadratic = data, rho: float = rho) -> jax.Array:
                z, u = state[:1], state[1:]
                x = data.prox(z - u, 1 / rho)
                u = u + x - z
                return jnp.concatenate([net(u + x), u])

            claimed = (ell + d * (rho - ell)) / (rho if wrong else rho + ell)
            drs = float(jax.jacfwd(step)(jnp.zeros(1))[0, 0])
            admm = np.linalg.eigvals(np.asarray(jax.jacfwd(both)(jnp.zeros(2))))
            admm_main = float(np.real(admm[np.argmax(np.abs(admm))]))
            hqs = float(jax.jacfwd(lambda z, data=data, rho=rho: net(data.prox(z, 1 / rho)))(jnp.zeros(1))[0, 0])
            slack[f"DRS, ℓ = {ell}, ρ = {rho}"] = -abs(drs - claimed)
            slack[f"ADMM, ℓ = {ell}, ρ = {rho}"] = -abs(admm_main - claimed)
            slack[f"HQS, ℓ = {ell}, ρ = {rho}"] = -abs(hqs - d * rho / (rho + ell))
        pgd = float(jax.jacfwd(lambda x, data=data: net(x - 0.7 * data.grad(x)))(jnp.zeros(1))[0, 0])
        slack[f"PGD, ℓ = {ell}"] = -abs(pgd - d * (1 - 0.7 * ell))
    # d = 2ℓ + ρ over ℓ - ρ, solved for ρ at ℓ = 1; and 1/(η - 1) for η.
    rho, eta = sp.symbols("rho eta", positive=True)
    exact = float(sp.solve(sp.Eq(sp.Rational(41, 10) * (1 - rho), 2 + (0 if early else rho)), rho)[0])
    steps = float(sp.solve(sp.Eq(sp.Rational(41, 10) * (eta - 1), 1), eta)[0])
    run = eqx.filter_jit(
        lambda rho: plug_and_play.admm(on_the_line(0.0), net, jnp.full(1, 0.01), rho=rho, max_steps=4000)[1]
    )
    down = eqx.filter_jit(
        lambda eta: plug_and_play.pgd(on_the_line(0.0), net, jnp.full(1, 0.01), eta=eta, max_steps=4000)[1]
    )
    for name, info, converges in (
        (f"ADMM at ρ = {exact + 0.01:.4f}", run(jnp.asarray(exact + 0.01)), True),
        (f"ADMM at ρ = {exact - 0.01:.4f}", run(jnp.asarray(exact - 0.01)), False),
        (f"PGD at η = {steps - 0.005:.4f}", down(jnp.asarray(steps - 0.005)), True),
        (f"PGD at η = {steps + 0.005:.4f}", down(jnp.asarray(steps + 0.005)), False),
    ):
        slack[name] = 0.0 if (int(info.status) == Status.CONVERGED) == converges else -1.0
    return ctx.cases(
        slack,
        tolerance=1e-9,
        tolerance_reason="Jacobians in 64 bits",
        note=f"thresholds ρ = {exact:.4f}, η = {steps:.4f}",
    )
