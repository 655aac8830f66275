"""T8 to T13: what sharpness says of the predictor, for diagonal linear and two-layer ReLU networks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

from paper_checks.harness.claim import Outcome, claim
from paper_checks.harness.context import Context
from paper_checks.sgd_stability.inputs import PAPER, converged, effort, top_eigenvalue
from theory import sgd_stability as ss

ROUNDING = (1e-7, "the eigenvalue iteration stops at a relative residual of 1.5e-8; values are accurate to about 1e-14")


def cube(d: int) -> jax.Array:
    """All 2^d points of {-1, 1}^d: a symmetric law with E xx' = I and |x|^2 = d, summed exactly."""
    return 1.0 - 2.0 * ((jnp.arange(2**d)[:, None] >> jnp.arange(d)) & 1)


# -- T8, T9: diagonal linear networks --------------------------------------------------------------------------------------


@claim(
    PAPER,
    "T8",
    r"For the diagonal linear network $f(x)=\langle a\odot b,x\rangle$ with $\mathbb{E}xx^\top=I$: "
    r"$\operatorname{Tr}G=\sum_j(a_j^2+b_j^2)$, $\|G\|_F^2=\sum_j(a_j^2+b_j^2)^2$, "
    r"$\lambda_{\max}(G)=\max_j(a_j^2+b_j^2)$; over all factorisations of $\beta=a\odot b$ their smallest values are "
    r"$2\|\beta\|_1$, $2\|\beta\|_2$, $2\|\beta\|_\infty$, at the balanced point.",
    title="Diagonal linear network: sharpness is a norm of the predictor",
    kind="symbolic",
    controls={"constant": "2 |beta|_1 replaced by 2.2 |beta|_1"},
    regime="population with identity covariance; three coordinates, which decouple; positive factors, since only squares and "
    "products enter",
    source="The trace and l1 norm equivalence is the paper's; constants derived.",
    blind_spot="In the empirical version lambda_max is not the maximum when n < d.",
)
def diagonal_equivalence(ctx: Context) -> Outcome:
    import sympy as sp

    d = 3
    a, b, t = (sp.symbols(f"{name}1:{d + 1}", positive=True) for name in "abt")
    x = sp.symbols(f"x1:{d + 1}", real=True)
    gradient = sp.Matrix([b[j] * x[j] for j in range(d)] + [a[j] * x[j] for j in range(d)])
    products = gradient * gradient.T
    # E x_i x_j = delta_ij, entry by entry
    g = products.applyfunc(lambda e: sum(sp.Poly(e, *x).coeff_monomial(x[j] ** 2) for j in range(d)))
    block = [a[j] ** 2 + b[j] ** 2 for j in range(d)]
    residuals = [g.trace() - sum(block), (g * g).trace() - sum(v**2 for v in block)]
    # Eigenvectors (b_j, a_j) with eigenvalue a_j^2 + b_j^2, and (a_j, -b_j) with 0: the whole spectrum.
    for j in range(d):
        top, null = sp.zeros(2 * d, 1), sp.zeros(2 * d, 1)
        top[j], top[d + j] = b[j], a[j]
        null[j], null[d + j] = a[j], -b[j]
        residuals += list(g * top - block[j] * top) + list(g * null)
    # Rescaling a -> t a, b -> b / t: every term is 2 a b plus a square that vanishes at balance.
    constant = ctx.pick(sp.Integer(2), constant=sp.Rational(11, 5))
    for j in range(d):
        rescaled = (t[j] * a[j]) ** 2 + (b[j] / t[j]) ** 2
        residuals.append(rescaled - constant * a[j] * b[j] - (t[j] * a[j] - b[j] / t[j]) ** 2)
        balanced = sp.sqrt(a[j] * b[j])
        residuals.append(2 * balanced**2 - constant * a[j] * b[j])
    return ctx.proved(*residuals)


class Factors(NamedTuple):
    """Factors a, b (d,) of a diagonal linear network."""

    a: Any
    b: Any


def draw_factors(key: jax.Array, d: int) -> Factors:
    return Factors(*jax.random.normal(key, (2, d)))


def _sharpness_difference(net: Factors, few: jax.Array) -> jax.Array:
    """The library's closed forms against the Gram matrix of all sign vectors (or, as a control, of few of them)."""
    d = net.a.shape[0]
    x = cube(d)
    keep = jnp.where(few, jnp.arange(len(x)) < 2, True)
    gram = ss.gram_matrix(ss.diagonal_linear, tuple(net), x * keep[:, None]) * len(x) / keep.sum()
    measured, closed = ss.sharpness(gram), ss.diagonal_sharpness(*net)
    beta = net.a * net.b
    balanced = ss.diagonal_sharpness(*ss.balanced_factors(beta))
    norms = ss.Sharpness(jnp.abs(beta).sum(), jnp.linalg.norm(beta), jnp.abs(beta).max())
    pairs = [abs(m / c - 1) for m, c in zip(measured, closed, strict=True)]
    pairs += [abs(b / (2 * n) - 1) for b, n in zip(balanced, norms, strict=True)]
    pairs += [b / c - 1 for b, c in zip(balanced, closed, strict=True)]  # balance minimises
    return jnp.maximum(jnp.max(jnp.stack(pairs)), 0)


@claim(
    PAPER,
    "T8b",
    r"The closed forms of T8 are the sharpness of the network: for $x$ uniform on $\{-1,1\}^d$ (where $\mathbb{E}xx^\top=I$) "
    r"they equal trace, Frobenius norm and largest eigenvalue of $G$, and balanced factors attain the norms of $\beta$.",
    title="Diagonal linear network: closed forms against the network",
    kind="exact",
    controls={
        "few": "the same for two inputs only (n < d), where the largest eigenvalue is no maximum over coordinates"
    },
    regime="any factors, signs included; d up to 6, all 2^d inputs",
    source="Derived.",
)
def diagonal_closed_forms(ctx: Context) -> Outcome:
    return ctx.equal(
        _sharpness_difference,
        draw_factors,
        constants=(ctx.pick(False, few=True),),
        structures=[(3,), (6,)],
        tolerance=(1e-10, "sums over 64 inputs and an eigenvalue in 64 bits"),
    )


class Diagonal(NamedTuple):
    """A diagonal linear network at a minimum: factors a, b (d,) and inputs x (n, d)."""

    a: Any
    b: Any
    x: Any


def draw_diagonal(key: jax.Array, size: tuple[int, int], balanced: bool) -> Diagonal:
    n, d = size
    k_a, k_b, k_sign, k_x = jax.random.split(key, 4)
    a = jax.random.normal(k_a, (d,))
    b = a if balanced else jax.random.normal(k_b, (d,))
    return Diagonal(a, b, jax.random.rademacher(k_sign, (n, d), float) + 0.1 * jax.random.normal(k_x, (n, d)))


def _l1_violation(net: Diagonal, constant: jax.Array, gd_constant: jax.Array, gd: jax.Array) -> jax.Array:
    """eta* sum_j m_j |beta_j| <= 1 for SGD, eta_GD max_j m_j |beta_j| <= 1 for GD; m_j the empirical second moments."""
    features = jnp.concatenate([net.b * net.x, net.a * net.x], axis=1)
    eta_sgd, eta_gd = converged(ss.stability_threshold(features, ss.with_replacement(1))), 2 / top_eigenvalue(features)
    weighted = jnp.mean(net.x**2, axis=0) * jnp.abs(net.a * net.b)
    l1 = jnp.where(gd, eta_gd, eta_sgd) * weighted.sum() / constant
    return jnp.maximum(l1, eta_gd * weighted.max() / gd_constant) - 1


@claim(
    PAPER,
    "T9",
    r"A minimum of a diagonal linear network that is stable for SGD with batch size 1 has "
    r"$\|\beta\|_1 \le \frac{1}{m_2\eta}$, $m_2=\mathbb{E}x_j^2$ (empirically: $\eta\sum_j\hat m_j|\beta_j| \le 1$); stability "
    r"for gradient descent gives only $\|\beta\|_\infty \le \frac{1}{m_2\eta}$.",
    title="Diagonal linear network: SGD-stable minima have a small l1 norm",
    kind="bound",
    controls={
        "gd": "the l1 bound claimed for gradient descent",
        "constant": "1 replaced by 0.9 in the l1 bound",
        "gd_constant": "1 replaced by 0.9 in gradient descent's bound",
    },
    regime="any factors and inputs, batch size 1; empirical second moments",
    source="Qualitatively in the abstract; constants derived.",
    blind_spot="The step from empirical to population moments needs n of the order of log d.",
)
def l1_bound(ctx: Context) -> Outcome:
    return ctx.worst(
        _l1_violation,
        draw_diagonal,
        constants=(ctx.pick(1.0, constant=0.9), ctx.pick(1.0, gd_constant=0.9), ctx.pick(False, gd=True)),
        structures=st.tuples(st.sampled_from(((2, 2), (3, 5), (6, 4))), st.booleans()),
        tolerance=ROUNDING,
        **effort(ctx),
    )


# -- T10, T11: two-layer ReLU networks ---------------------------------------------------------------------------------


class Relu(NamedTuple):
    """A two-layer ReLU network: a (m,), w (m, d)."""

    a: Any
    w: Any


def draw_relu(key: jax.Array, m: int, d: int) -> Relu:
    k_a, k_w, k_scale = jax.random.split(key, 3)
    return Relu(jax.random.normal(k_a, (m,)) * jnp.exp(jax.random.normal(k_scale)), jax.random.normal(k_w, (m, d)))


def _trace_difference(net: Relu, constant: jax.Array, factor: jax.Array) -> jax.Array:
    """The library's population trace against the Gram matrix of all sign vectors, and against the path norm."""
    d = net.w.shape[1]
    trace = jnp.trace(ss.gram_matrix(ss.two_layer_relu, tuple(net), cube(d)))
    closed = factor * ss.relu_trace_population(*net)
    bound = constant * math.sqrt(d) * ss.path_norm(*net)
    level = net._replace(a=jnp.linalg.norm(net.w, axis=1) / math.sqrt(d))  # |w_j| = sqrt(d) |a_j|
    attained = constant * math.sqrt(d) * ss.path_norm(*level) / ss.relu_trace_population(*level)
    return jnp.maximum(jnp.maximum(jnp.abs(closed / trace - 1), bound / trace - 1), jnp.abs(attained - 1))


@claim(
    PAPER,
    "T10",
    r"For a two-layer ReLU network and inputs with a symmetric law, $\mathbb{E}xx^\top=I$ and $P(w_j^\top x=0)=0$: "
    r"$\operatorname{Tr}G = \frac12\sum_j(\|w_j\|^2+d\,a_j^2) \ge \sqrt d\,\|\theta\|_{\mathcal P}$, with equality when "
    r"$\|w_j\| = \sqrt d\,|a_j|$.",
    title="Two-layer ReLU network: the trace is at least the path norm",
    kind="exact",
    controls={
        "constant": "sqrt(d) replaced by 1.05 sqrt(d)",
        "factor": "the factor 1/2 dropped (no half of the space inactive)",
    },
    regime="x uniform on the 2^d sign vectors, summed exactly, and any weights; the sphere and Gaussians have the same moments",
    source="Equivalence in the abstract; constants derived.",
    blind_spot="Finite samples: the empirical trace is within a few per cent only when every neuron is active on about half "
    "of the data.",
)
def path_norm_equivalence(ctx: Context) -> Outcome:
    return ctx.equal(
        _trace_difference,
        draw_relu,
        constants=(ctx.pick(1.0, constant=1.05), ctx.pick(1.0, factor=2.0)),
        structures=[(1, 3), (5, 6)],
        tolerance=(1e-10, "sums over 64 inputs in 64 bits"),
    )


class ReluMinimum(NamedTuple):
    """A two-layer ReLU network and its training inputs: a (m,), w (m, d), x (n, d)."""

    a: Any
    w: Any
    x: Any


def draw_minimum(key: jax.Array, size: tuple[int, int, int]) -> ReluMinimum:
    n, m, d = size
    k_net, k_x = jax.random.split(key)
    return ReluMinimum(*draw_relu(k_net, m, d), jax.random.normal(k_x, (n, d)))


def _path_violation(net: ReluMinimum, gd: jax.Array) -> jax.Array:
    """eta* sqrt(d) path norm (empirical trace / population trace) / 2 - 1, inputs on the sphere of radius sqrt(d)."""
    d = net.x.shape[1]
    x = net.x / jnp.linalg.norm(net.x, axis=1, keepdims=True) * math.sqrt(d)
    params = (net.a, net.w)
    gram = ss.gram_matrix(ss.two_layer_relu, params, x)
    eta = converged(ss.stability_threshold_from_gram(gram, ss.with_replacement(1)))
    eta = jnp.where(gd, 2 / jnp.linalg.eigvalsh(gram)[-1], eta)
    ratio = jnp.trace(gram) / ss.relu_trace_population(*params)
    active = ratio > 1e-9  # a network that is off on every sample has no threshold
    return jnp.where(active, eta * math.sqrt(d) * ss.path_norm(*params) * ratio / 2 - 1, -1.0)


@claim(
    PAPER,
    "T11",
    r"A minimum of a two-layer ReLU network that is stable for SGD (batch size 1) has "
    r"$\|\theta\|_{\mathcal P} \le \frac{2}{\sqrt d\,\eta}$, up to the ratio of the empirical to the population trace.",
    title="Two-layer ReLU network: SGD-stable minima have a small path norm",
    kind="bound",
    controls={"gd": "the same bound claimed for gradient descent"},
    regime="any weights; inputs on the sphere of radius sqrt(d)",
    source="Scaling consistent with the paper's plots; constants derived.",
)
def path_norm_bound(ctx: Context) -> Outcome:
    return ctx.worst(
        _path_violation,
        draw_minimum,
        constants=(ctx.pick(False, gd=True),),
        structures=st.tuples(st.sampled_from(((3, 1, 2), (12, 6, 5)))),
        tolerance=ROUNDING,
        **effort(ctx),
    )


def _block_violation(net: Relu, outer_constant: jax.Array, inner_constant: jax.Array) -> jax.Array:
    """Both lower bounds against eigenvalues of compressions of the population G, which are below lambda_max(G)."""
    norms = jnp.linalg.norm(net.w, axis=1)
    cosine = jnp.clip(net.w @ net.w.T / jnp.outer(norms, norms), -1 + 1e-12, 1 - 1e-12)
    angle = jnp.arccos(cosine)
    # E sigma(w_i'x) sigma(w_j'x): the block of the outer weights.
    outer = jnp.outer(norms, norms) * (jnp.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
    # E 1(w_i'x > 0) 1(w_j'x > 0) a_i a_j: the block of the inner weights, averaged over input directions.
    inner = jnp.outer(net.a, net.a) * (math.pi - angle) / (2 * math.pi)
    first, second = jnp.sum(norms**2) / outer_constant, jnp.sum(net.a**2) / inner_constant
    return jnp.maximum(first / jnp.linalg.eigvalsh(outer)[-1], second / jnp.linalg.eigvalsh(inner)[-1]) - 1


@claim(
    PAPER,
    "T11b",
    r"For Gaussian inputs $\lambda_{\max}(G) \ge \max\{\frac{1}{2\pi}\sum_j\|w_j\|^2,\ \frac14\sum_j a_j^2\}$.",
    title="Two-layer ReLU network: the largest eigenvalue from below",
    kind="bound",
    controls={"outer": "1/(2 pi) replaced by 1/pi", "inner": "1/4 replaced by 1/2"},
    regime="any weights, up to 12 neurons; population, Gaussian inputs (on the sphere up to 1/d)",
    source="Derived; with T11c it leaves gradient descent a bound weaker by sqrt(d).",
)
def largest_eigenvalue_bound(ctx: Context) -> Outcome:
    return ctx.worst(
        _block_violation,
        draw_relu,
        constants=(ctx.pick(2 * math.pi, outer=math.pi), ctx.pick(4.0, inner=2.0)),
        structures=[(2, 3), (12, 20)],
        tolerance=(1e-9, "arccos near 1 in 64 bits loses half of the digits of an angle, which enters squared"),
        **effort(ctx),
    )


def _constant_violation(net: Relu, factor: jax.Array) -> jax.Array:
    return factor * ss.PATH_NORM_CONSTANT * ss.path_norm(*net) / ss.relu_lambda_max_lower(*net) - 1


@claim(
    PAPER,
    "T11c",
    r"$\max\{\frac{1}{2\pi}\sum_j\|w_j\|^2,\ \frac14\sum_j a_j^2\} \ge c\,\|\theta\|_{\mathcal P}$ with "
    r"$c=\frac{1}{2\sqrt{2\pi}}$; so stability for gradient descent gives only $\|\theta\|_{\mathcal P} \le \frac{2}{c\,\eta}$.",
    title="Gradient descent's bound on the path norm",
    kind="bound",
    controls={"constant": "c replaced by 1.02 c"},
    regime="any weights",
    source="Derived.",
)
def gd_path_norm_constant(ctx: Context) -> Outcome:
    return ctx.worst(
        _constant_violation,
        draw_relu,
        constants=(ctx.pick(1.0, constant=1.02),),
        structures=[(1, 3), (6, 5)],
        **{**effort(ctx), "steps": 300},
    )


# -- T12: generalisation through Rademacher averages ------------------------------------------------------------------


@claim(
    PAPER,
    "T12",
    r"$\mathcal R_n(\{\|\beta\|_1\le Q\}) \le Q\,\max|x_{ij}|\sqrt{2\ln(2d)/n}$ (T9 supplies $Q=1/(m_2\eta)$).",
    title="Rademacher average of the l1 ball",
    kind="statistical",
    controls={"no_log": "the factor sqrt(2 ln 2d) dropped", "half": "the 2 under the root dropped"},
    regime="Q = 1 (both sides are linear in it), n = 300, d = 1000, inputs +-1; the supremum over the ball is exact by duality",
    source="Standard; the constants of the paper's own theorem were not available and stay unverified.",
    resolution=0.1,
)
def l1_rademacher(ctx: Context) -> Outcome:
    n, d = 300, 1000
    k_x, k_sign = jax.random.split(ctx.key)
    x = jax.random.rademacher(k_x, (n, d), float)
    bound = ss.rademacher_bound_l1(x, 1.0) * ctx.pick(
        1.0, no_log=1 / math.sqrt(2 * math.log(2 * d)), half=math.sqrt(0.5)
    )
    suprema = ss.rademacher_l1_draws(k_sign, x, 1.0, ctx.n(2000))
    return ctx.at_most(suprema / bound, 1.0, low=0.0, high=float(jnp.abs(x).max() / bound))


@claim(
    PAPER,
    "T12b",
    r"$\mathcal R_n(\{\|\theta\|_{\mathcal P}\le Q\}) \le 2Q\max_i\|x_i\|/\sqrt n$ (T11 supplies "
    r"$Q=2/(\sqrt d\,\eta)$, hence $4/(\eta\sqrt n)$ whatever the dimension).",
    title="Rademacher average of the path-norm ball",
    kind="statistical",
    controls={"constant": "2 replaced by 1/2"},
    regime="Q = 1 (both sides are linear in it), n = 300, d = 100, inputs on the sphere of radius sqrt(d)",
    source="Standard; the constants of the paper's own theorem were not available and stay unverified.",
    blind_spot="The supremum over neurons is found by projected ascent, hence from below; the bound is loose here by a factor "
    "of almost 3, so that smaller errors of its constant pass.",
    resolution=0.2,
)
def path_rademacher(ctx: Context) -> Outcome:
    n, d = 300, 100
    k_x, k_sign = jax.random.split(ctx.key)
    x = jax.random.normal(k_x, (n, d))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True) * math.sqrt(d)
    bound = ss.rademacher_bound_path(x, 1.0) * ctx.pick(1.0, constant=0.25)
    suprema = ss.rademacher_path_draws(k_sign, x, 1.0, ctx.n(320), starts=2, steps=40)
    largest = float(jnp.linalg.norm(x, 2)) / math.sqrt(n)  # no choice of signs and neuron exceeds it (Cauchy-Schwarz)
    return ctx.at_most(suprema / bound, 1.0, low=0.0, high=largest / float(bound))


# -- T13: the stability of gradient descent is too weak -------------------------------------------------------------------


@jax.jit
def _thresholds(beta: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """eta* of SGD (batch 1) and 2 / lambda_max of GD at the balanced diagonal network of predictor beta."""
    gram = 2 * (x * jnp.abs(beta)) @ x.T / x.shape[0]  # a_j^2 + b_j^2 = 2 |beta_j|
    return converged(ss.stability_threshold_from_gram(gram, ss.with_replacement(1))), 2 / jnp.linalg.eigvalsh(gram)[-1]


@claim(
    PAPER,
    "T13",
    r"Stability for gradient descent does not exclude bad minima: with $n<d$ there are interpolators with a small "
    r"$\|\beta\|_\infty$ and a large test error that gradient descent accepts and SGD rejects, at learning rates at which both "
    r"accept the truth.",
    title="Gradient descent's stability is too weak to generalise",
    kind="bound",
    controls={"overdetermined": "n > d, where the interpolator is unique and the separation must vanish"},
    regime="d = 1000, n = 300, inputs uniform on [-1, 1], truth (1, 1, 1, 0, ...); balanced min-l2 interpolator",
    source="Stated in the abstract; instance derived.",
    blind_spot="One instance per draw of the data: an existence statement.",
)
def gd_is_too_weak(ctx: Context) -> Outcome:
    n, d = ctx.pick((300, 1000), overdetermined=(300, 100))
    slacks: dict[str, float] = {}
    for draw in range(ctx.n(2)):
        x = jax.random.uniform(jax.random.fold_in(ctx.key, draw), (n, d), minval=-1.0, maxval=1.0)
        truth = jnp.zeros(d).at[:3].set(1.0)
        # The smallest l2 norm among all interpolators; with n > d the only one.
        y = x @ truth
        interpolator = x.T @ jnp.linalg.solve(x @ x.T, y) if n < d else jnp.linalg.solve(x.T @ x, x.T @ y)
        sgd_truth, _ = _thresholds(truth, x)
        sgd_bad, gd_bad = _thresholds(interpolator, x)
        risk = jnp.sum((interpolator - truth) ** 2) / 3  # E x_j^2 = 1/3
        slacks |= {
            f"SGD rejects the bad minimum where it accepts the truth ({draw})": float(sgd_truth / sgd_bad - 2),
            f"GD accepts the bad minimum there ({draw})": float(gd_bad / sgd_truth - 1),
            f"the bad minimum is bad: test error over variance above 0.3 ({draw})": float(risk - 0.3),
            f"it interpolates ({draw})": float(1 - jnp.linalg.norm(x @ interpolator - y) / (1e-9 * jnp.linalg.norm(y))),
            f"its largest coefficient is half of the truth's or less ({draw})": float(
                0.5 - jnp.abs(interpolator).max()
            ),
        }
    return ctx.cases(
        slacks,
        note=f"last draw: eta* of SGD {sgd_bad:.4f} at the bad minimum and {sgd_truth:.3f} at the truth, GD's threshold "
        f"{gd_bad:.2f}, test error {risk:.3f}",
        our_value=float(sgd_bad),
        paper_value=None,
    )
