"""What a network of a multiplicative diffusion is trained for, and what its output means.

All losses are means over the batch of sums over the coordinates, with ξ = s_Y - 1 the Hyvarinen score:

    explicit    ½ λ ‖ξ_θ - ξ‖²                 needs the true score                                          M-ESM
    denoising   ½ λ ‖ξ_θ - ξ(x_t | x_0)‖²      equal up to a constant that does not depend on θ              M-DSM
    implicit    Σ ½ ξ² + ξ + x ∂ξ/∂x           equal up to another, if p x² s -> 0 at 0 and ∞: Hyvarinen (2007) for positive data,
                                               which is score matching of log x (Hyvarinen 2005) less dimensions / 2

The denoising loss has a constant that grows like 1/V, so the weight λ decides what is learned:

    "paper"     V²            the authors' code (when its two time indices agree); starves small t
    "noise"     V             uniform on the noise ε
    `edm`       V + a²σ⁴/d²   uniform on the network's output under EDM preconditioning: Karras et al. 2022, with σ² = V/a²
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from generative.gbm_diffusion import LogScore, Process, column, entries, jacobian_diagonal
from generative.nets import NO_CLASS, check_labels, classes_of
from generative.positive import check_positive

Form = Literal["denoiser", "noise", "hyvarinen"]
Weight = Literal["paper", "noise", "none"] | Callable[[Process, Array], Array]
Times = Callable[[Key[Array, ""], int], Float[Array, " batch"]]


# ---- what the output of a network means ---------------------------------------------------------------------------------


class Parametrised(eqx.Module):
    """A network as a log-score; with `label`, of a class.

    The network sees u = ((y - M)/a - location) / sqrt(σ² + d²), with σ² = V/a², so that its input has variance one at all t,
    and ¼ log σ; with F for its output,

        "denoiser"    E[log x_0 | x_t] = location + (d² u' + σ d sqrt(σ² + d²) F) / (σ² + d²),  u' = (y - M)/a - location
        "noise"       ε = F,  s_Y = -F / sqrt(V)
        "hyvarinen"   ξ = F,  s_Y = F + 1

    The first is the preconditioning of Karras et al. 2022 (EDM), table 1, of log x: it asks of the network a target of variance
    one at all t.  It depends on t through σ alone, so that one trained network serves every process.

    network    (u, ¼ log σ, label) -> F, of the shape of u = (batch, *event); ¼ log σ is (batch,); label is int32 (batch,), -1 for
               no class, or None
    location   the mean of log x_0, which broadcasts to an event
    deviation  d, the standard deviation of log x_0 around it
    """

    network: Any
    process: Process
    location: Float[Array, "*_"]
    deviation: Float[Array, ""]
    form: Form = eqx.field(static=True, default="denoiser")

    def __check_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(
                f"Parametrised: form is {self.form!r}, expected one of {', '.join(map(repr, get_args(Form)))}"
            )

    def __call__(
        self,
        y: Float[Array, " batch *event"],
        t: Float[Array, ""] | Float[Array, " batch"],
        label: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch *event"]:
        """s_Y(y, t), for one t > 0 or for one to each of the batch."""
        t = jnp.broadcast_to(jnp.asarray(t, y.dtype), y.shape[:1])
        a, shift, v = (column(f(t), y) for f in (self.process.scale, self.process.shift, self.process.variance))
        d = self.deviation.astype(y.dtype)
        sigma = jnp.sqrt(v) / a
        centred = (y - shift) / a - self.location.astype(y.dtype)
        width = jnp.sqrt(sigma**2 + d**2)
        out = self.network(centred / width, (jnp.log(sigma) / 4).reshape(-1), label)
        if self.form == "noise":
            return -out / jnp.sqrt(v)
        if self.form == "hyvarinen":
            return out + 1
        # (a D + M - y) / V with D = location + (d² centred + σ d width F) / width², without the difference of large numbers.
        return (d / sigma * out - centred / width) / (a * width)


def parametrised(
    network: Any,
    process: Process,
    x0: Float[Array, " n *event"],
    *,
    form: Form = "denoiser",
    per: Literal["all", "entry"] = "all",
) -> Parametrised:
    """`Parametrised` with the mean and the deviation of the log of data x0.

    per  "all" for one mean, "entry" for one to each entry of an event.  Raises ValueError for x0 that is not positive.
    """
    check_positive("parametrised: x0", x0)
    logs = jnp.log(x0)
    location = logs.mean(0) if per == "entry" else logs.mean()
    return Parametrised(network, process, location, jnp.sqrt(((logs - location) ** 2).mean()), form)


# ---- times ------------------------------------------------------------------------------------------------------------


def uniform(smallest: float = 1e-3) -> Times:
    """Times uniform in [smallest, 1]; the paper draws from 1/1000 .. 999/1000."""
    return lambda key, n: jax.random.uniform(key, (n,), minval=smallest, maxval=1.0)


def lognormal(process: Process, deviation: float | Array, *, centre: float = -0.5, width: float = 1.2) -> Times:
    """Times at which log(σ/d) ~ N(centre, width²), σ = sqrt(V)/a: where a denoiser has something to learn.

    deviation  d of the data.  Karras et al. 2022 have centre -1.2 and width 1.2 for σ itself, with d = ½
    Levels beyond those of the process are moved to its last one, t = 1.
    """

    def draw(key: Array, n: int) -> Array:
        return process.time(deviation * jnp.exp(centre + width * jax.random.normal(key, (n,))))

    return draw


# ---- losses -----------------------------------------------------------------------------------------------------------


def denoising(
    key: Key[Array, ""],
    log_score: Callable[..., Array],
    process: Process,
    x0: Float[Array, " batch *event"],
    *,
    times: Times | None = None,
    weight: Weight = "noise",
    label: Int[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """E ½ λ(t) ‖ξ_θ(x_t, t) - ξ(x_t | x_0)‖² with one draw of t and of x_t for each x_0.

    log_score  (y, t, label) -> s_Y with t of shape (batch,); (y, t) where label is None
    times      `uniform()` by default
    The conditional score is s_Y(y | y_0) = -z / sqrt(V); the residual is taken as sqrt(λ/V) (sqrt(V) s_θ + z), which stays of
    order one at small t.  Raises ValueError for x0 that is not positive, a label that is no class of the model, as far as
    `nets.classes_of` knows them, or an unknown weight.
    """
    check_positive("denoising: x0", x0)
    if label is not None:
        check_labels("denoising: label", label, classes_of(log_score))
    first, second = jax.random.split(key)
    t = (uniform() if times is None else times)(first, len(x0)).astype(x0.dtype)
    z = jax.random.normal(second, x0.shape, x0.dtype)
    v = process.variance(t)
    a, shift, deviation = (column(f, z) for f in (process.scale(t), process.shift(t), jnp.sqrt(v)))
    y = a * jnp.log(x0) + shift + deviation * z
    score = log_score(y, t) if label is None else log_score(y, t, label)
    squares = entries((deviation * score + z) ** 2).sum(1)
    return (_weight("denoising", weight, process, t) / v * squares).mean() / 2


def explicit(
    log_score: LogScore,
    true_log_score: LogScore,
    process: Process,
    x: Float[Array, " batch *event"],
    t: Float[Array, ""],
    *,
    weight: Weight = "none",
) -> Float[Array, ""]:
    """E ½ λ(t) ‖ξ_θ(x, t) - ξ(x, t)‖² over samples x of p_t.  Raises ValueError as `denoising`."""
    check_positive("explicit: x", x)
    y = jnp.log(x)
    squares = entries((log_score(y, t) - true_log_score(y, t)) ** 2).sum(1)
    return _weight("explicit", weight, process, t) * squares.mean() / 2


def implicit(
    log_score: LogScore,
    x: Float[Array, " batch *event"],
    t: Float[Array, ""],
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """E Σ_i [½ ξ_i² + ξ_i + x_i ∂ξ_i/∂x_i] over samples x of p_t: Hyvarinen's loss of 2007, for positive data.

    key  None for the exact divergence, one derivative to each coordinate; a key for Hutchinson's estimate with one random sign
         vector to each sample.  Raises ValueError for x that is not positive.
    """
    check_positive("implicit: x", x)
    y = jnp.log(x)
    score, divergence = _divergence(lambda y: log_score(y, t), y, key)
    xi = entries(score - 1)
    return (xi**2 / 2 + xi).sum(1).mean() + divergence.mean()


def edm(deviation: float | Array) -> Callable[[Process, Array], Array]:
    """The weight λ = V (1 + σ²/d²) of Karras et al. 2022, with σ² = V/a² and d = deviation."""

    def weight(process: Process, t: Array) -> Array:
        v = process.variance(t)
        return v * (1 + v / (process.scale(t) * deviation) ** 2)

    return weight


def without_class(key: Key[Array, ""], label: Int[Array, " batch"], *, share: float = 0.1) -> Int[Array, " batch"]:
    """The labels with this share of them, by chance, replaced by -1, no class: what classifier-free guidance is trained on."""
    return jnp.where(jax.random.bernoulli(key, share, label.shape), NO_CLASS, label)


WEIGHTS: dict[str, Callable[[Process, Array], Array]] = {
    "paper": lambda process, t: process.variance(t) ** 2,
    "noise": lambda process, t: process.variance(t),
    "none": lambda process, t: jnp.ones_like(t),
}


def _weight(owner: str, weight: Weight, process: Process, t: Array) -> Array:
    if callable(weight):
        return weight(process, t)
    if weight not in WEIGHTS:
        raise ValueError(
            f"{owner}: weight is {weight!r}, expected {', '.join(map(repr, WEIGHTS))} or a function of (process, t)"
        )
    return WEIGHTS[weight](process, jnp.asarray(t))


def _divergence(f: Callable[[Array], Array], y: Array, key: Array | None) -> tuple[Array, Array]:
    """f(y) and (batch,) Σ_i ∂f_i/∂y_i, of a function that treats the batch row by row."""
    if key is None:
        return f(y), entries(jacobian_diagonal(f, y)).sum(1)
    signs = jax.random.rademacher(key, y.shape, y.dtype)
    value, slope = jax.jvp(f, (y,), (signs,))
    return value, entries(slope * signs).sum(1)
