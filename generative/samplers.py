"""Samplers of a multiplicative diffusion: from noise x_T to data x_0, by a score of log x.

By the name of the method, with the number of evaluations of the score a step, in terms of û_0 = E[log x_0 | x_t] and of the
level L = sqrt(V)/a:

    "dls"                  Dale-Langevin: Euler-Maruyama of the reverse equation of log x                    noise, 1 evaluation
    "ums"                  unconstrained multiplicative: Euler-Maruyama of that of x, which can cross zero   noise, 1
    "milstein"             the same with Milstein's term                                                     noise, 1
    "ancestral"            the step of Ho et al. 2020: x_t' given x_t as if û_0 were x_0                     noise, 1
    "ddim"                 Song, Meng, Ermon 2021: the exponential integrator of the probability flow        1
    "heun"                 Karras et al. 2022, algorithm 1                                                   2
    "dpm2m"                DPM-Solver++(2M), Lu et al. 2022: û_0 linear in log L, from two steps             1
    "multistep3"           the same of order three: û_0 quadratic in sqrt(L² + d²), from three steps         1
    "predictor_corrector"  ancestral, then one Langevin step at the new level with half of the score         noise, 2

The last evaluation of all is one.  The first three are the paper's (with Milstein's term for comparison) and need a = 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from generative.gbm_diffusion import LogScore, Process
from generative.positive import exponent_limit
from generative.sampler_steps import METHODS, Interval, Method, Place, Step

Loop = Literal["scan", "host"]


class SamplingInfo(NamedTuple):
    """evaluations  calls of log_score, each with the whole batch
    negative     the part of the entries that crossed zero at some step; only "ums" and "milstein" do
    overflowed   entries that at some step, or whose E[log x_0 | x_t], were too large or too small for their dtype: their
                 exponent was clipped
    nonfinite    values of the score that were NaN or infinite, over all evaluations
    """

    evaluations: int | Array
    negative: Float[Array, ""]
    overflowed: Array
    nonfinite: Array


def sample(
    key: Key[Array, ""],
    log_score: LogScore,
    process: Process,
    x_T: Float[Array, " batch *event"],
    times: Float[Array | np.ndarray, " points"],
    *,
    method: str = "multistep3",
    last: Literal["denoise", "step"] = "denoise",
    corrector: float | Float[Array, ""] = 0.1,
    width: float | Float[Array, ""] = 0.2,
    loop: Loop = "scan",
    throw: bool = True,
) -> tuple[Float[Array, " batch *event"], SamplingInfo]:
    """x_0 and what was noticed on the way.  Rows of the batch are independent chains.

    log_score  (y, t) -> s_Y: y of shape (batch, *event), t a scalar array
    x_T        where to start, at times[0].  Negative entries stay negative: their mirror image is sampled
    times      decreasing, in [0, 1], as from `sinh_times`, `edm_times` or `uniform_times`; there is one step less
    method     one of METHODS
    last       "denoise": the last step goes to t = 0, whatever times[-1] is, and without noise: it returns exp E[log x_0 | x_t],
               which "multistep3" extrapolates from its last values.  "step": it is a step of the method to times[-1], with noise
               where the method has noise
    corrector  of "predictor_corrector": the step of Langevin's equation is this multiple of L²
    width      of "multistep3": about the standard deviation of the modes of log x_0.  The order of magnitude is enough
    loop       "scan" is one program.  "host" is one program a step, which jit would unroll: for convolutions on a CPU, which
               XLA runs slowly inside of loops

    Compiled once for each shape, dtype, method and log_score: an equinox module is known again, a new closure is not.

    Raises ValueError for an unknown method, times that do not decrease in [0, 1], entries of x_T that are zero or not finite, a
    score of another shape, and the paper's samplers where a is not 1; FloatingPointError, if `throw`, for a score that is NaN or
    infinite.  Inside jit values are not known and only info tells.
    """
    chosen = _method(method, process)
    if last not in ("denoise", "step"):
        raise ValueError(f"sample: last is {last!r}, expected 'denoise' or 'step'")
    times = jnp.asarray(times, x_T.dtype)
    _check_times(times)
    _check_start("sample", x_T)
    _check_loop("sample", loop)
    grid = _grid(process, times, chosen, jnp.asarray(width, x_T.dtype), last == "denoise")
    keys = jax.random.split(key, len(times) - 1)
    start = _started(x_T, grid, chosen)
    given = jnp.asarray(corrector, x_T.dtype), chosen, last == "denoise"
    if loop == "scan":
        state = _scanned(log_score, x_T, start, (keys, grid), *given)
    else:
        state = start
        for k in range(len(times) - 1):
            state = _compiled_body(log_score, x_T, state, jax.tree.map(lambda v, k=k: v[k], (keys, grid)), *given)
    if chosen.ambient:
        x = state.at
    else:
        end = jax.tree.map(lambda v: v[-1], grid.then)
        x = jnp.where(x_T < 0, -1, 1) * jnp.exp(end.a * state.at + end.shift)
    evaluations = (len(times) - 1) * (1 if chosen.correct is None else 2) - (chosen.correct is not None)
    return x, _noticed("sample", x, state, evaluations, throw)


# ---- the loop -----------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """at: u in log space, or x; before: the û_0 of as many steps as the method needs; then what has been noticed, by entries."""

    at: Array
    before: tuple[Array, ...]
    crossed: Array
    clipped: Array
    nonfinite: Array


def _body(
    log_score: LogScore,
    x_T: Array,
    state: State,
    inputs: tuple[Array, Interval],
    corrector: Array,
    method: Method,
    denoise_last: bool,
) -> State:
    """One step of a method, and what there is to notice about it."""
    key, interval = inputs
    limit = exponent_limit(x_T.dtype)

    def denoise(u: Array, place: Place) -> tuple[Array, Array, Array]:
        """û_0, clipped as what it estimates would be; where it was; and how many values of the score are not finite."""
        y = jnp.clip(place.a * u + place.shift, -limit, limit)
        score = _evaluated(log_score, y, place.t)
        found = u + place.a * place.level**2 * score
        return jnp.clip(found, -limit, limit), jnp.abs(found) > limit, (~jnp.isfinite(score)).sum()

    now, then, end = interval.now, interval.then, interval.end
    u = (jnp.log(jnp.abs(state.at)) - now.shift) / now.a if method.ambient else state.at
    denoised, over, bad = denoise(u, now)
    step = Step(interval, denoised, state.before, jax.random.normal(key, (method.draws, *x_T.shape), x_T.dtype))
    at = method.advance(state.at, step)
    if method.correct is not None:
        # There is no score at level 0, where the last step ends: under vmap both branches run.
        place = jax.tree.map(lambda a, b: jnp.where(end, a, b), now, then)
        nothing = denoised, jnp.zeros_like(over), jnp.zeros_like(bad)
        there, more, worse = jax.lax.cond(end, lambda: nothing, lambda: denoise(at, place))
        safe = step._replace(interval=interval._replace(then=place))
        at, over, bad = jnp.where(end, at, method.correct(u, at, there, safe, corrector)), over | more, bad + worse
    if denoise_last and method.weights is None:
        goal = jnp.where(state.at < 0, -1, 1) * jnp.exp(denoised) if method.ambient else denoised
        at = jnp.where(end, goal, at)
    at, clipped = _inside(at, then, limit, method.ambient)
    crossed = state.crossed | ((at < 0) != (x_T < 0)) if method.ambient else state.crossed
    before = (denoised, *state.before)[: len(state.before)]
    return State(at, before, crossed, state.clipped | over | clipped, state.nonfinite + bad)


def _inside(at: Array, place: Place, limit: float, ambient: bool) -> tuple[Array, Array]:
    """The state moved to where x is a positive, finite number of its dtype, and which entries had to be."""
    if ambient:
        size = jnp.abs(at)
        clipped = (size > math.exp(limit)) | (size < math.exp(-limit))
        return jnp.where(clipped, jnp.copysign(_clip(size, limit), at), at), clipped
    y = place.a * at + place.shift
    clipped = jnp.abs(y) > limit
    return jnp.where(clipped, (jnp.clip(y, -limit, limit) - place.shift) / place.a, at), clipped


def _clip(size: Array, limit: float) -> Array:
    return jnp.clip(size, math.exp(-limit), math.exp(limit))


def _evaluated(log_score: LogScore, y: Array, t: Array) -> Array:
    score = log_score(y, t)
    if score.shape != y.shape:
        raise ValueError(f"log_score returned shape {score.shape} for y of shape {y.shape}, expected the same")
    return score.astype(y.dtype)


_compiled_body = eqx.filter_jit(_body)


@eqx.filter_jit
def _scanned(log_score: LogScore, x_T: Array, start: State, inputs: Any, *given: Any) -> State:
    def body(state: State, now: Any) -> tuple[State, None]:
        return _body(log_score, x_T, state, now, *given), None

    return jax.lax.scan(body, start, inputs)[0]


def _grid(process: Process, times: Array, method: Method, width: Array, denoise_last: bool) -> Interval:
    each = times, process.scale(times), process.shift(times), process.level(times)
    places = Place(*(v.astype(times.dtype) for v in each))
    if denoise_last:
        places = Place(*(v.at[-1].set(end) for v, end in zip(places, (0, 1, 0, 0), strict=True)))
    now, then = jax.tree.map(lambda v: v[:-1], places), jax.tree.map(lambda v: v[1:], places)
    steps = len(times) - 1
    weights = jnp.zeros((steps, 3), times.dtype) if method.weights is None else method.weights(places.level, width)
    return Interval(now, then, weights, jnp.arange(steps) == steps - 1)


def _started(x_T: Array, grid: Interval, method: Method) -> State:
    first = jax.tree.map(lambda v: v[0], grid.now)
    u = (jnp.log(jnp.abs(x_T)) - first.shift) / first.a
    no = jnp.zeros(x_T.shape, bool)
    # Their weights are 0 until they are known.
    before = () if method.weights is None else (u, u)
    return State(x_T if method.ambient else u, before, no, no, jnp.zeros((), int))


def _noticed(owner: str, x: Array, state: State, evaluations: int, throw: bool) -> SamplingInfo:
    info = SamplingInfo(evaluations, state.crossed.astype(x.dtype).mean(), state.clipped.sum(), state.nonfinite)
    if throw and not isinstance(info.nonfinite, jax.core.Tracer) and int(info.nonfinite):
        raise FloatingPointError(
            f"{owner}: {int(info.nonfinite)} values of log_score are NaN or infinite; expected finite ones (throw=False returns "
            "what there is)"
        )
    return info


def _method(name: str, process: Process) -> Method:
    if name not in METHODS:
        raise ValueError(f"sample: method is {name!r}, expected one of {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    if method.unit_scale and process.reverting:
        raise ValueError(
            f"sample: method is {name!r}, which needs a = 1, and process is {type(process).__name__}, whose a(t) falls; "
            f"expected one of {', '.join(repr(n) for n, m in METHODS.items() if not m.unit_scale)}"
        )
    return method


def _check_times(times: Array) -> None:
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"sample: times has shape {times.shape}, expected (steps + 1,) with at least one step")
    if isinstance(times, jax.core.Tracer):
        return
    t = np.asarray(times)
    if not ((np.diff(t) < 0).all() and t[0] <= 1 and t[-1] >= 0):
        raise ValueError(
            f"sample: times run from {t[0]:g} to {t[-1]:g}, expected them to decrease strictly within [0, 1]"
        )


def _check_start(owner: str, x_T: Array) -> None:
    if isinstance(x_T, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # inside jit an array that is known would be traced by what is done with it
        bad = int((~(jnp.isfinite(x_T) & (x_T != 0))).sum())
    if bad:
        raise ValueError(f"{owner}: x_T holds {bad} entries that are zero or not finite, expected numbers x_T ≠ 0")


def _check_loop(owner: str, loop: str) -> None:
    if loop not in ("scan", "host"):
        raise ValueError(f"{owner}: loop is {loop!r}, expected 'scan' or 'host'")


# ---- the released recipe ------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """So many levels, each with `inner` steps of size delta; after each level the noise is multiplied by the factor."""

    levels: int
    delta: float
    inner: int = 1
    factor: float = 1.0


class Recipe(NamedTuple):
    """sampler  "dls" or "ums"
    stages   from the highest level to level 0; their levels add up to the number of levels
    quiet    steps of the last stage at level 0 that follow, without noise
    """

    sampler: str
    stages: tuple[Stage, ...]
    quiet: int = 0


_STAGED = (Stage(899, 1e-3), Stage(50, 5e-4, 2, 0.9995), Stage(25, 6e-4, 3, 0.9993), Stage(26, 5e-4, 3, 0.999))
RECIPES: dict[str, Recipe] = {
    "mnist dls": Recipe("dls", (Stage(1000, 6.1655e-4, 1, 0.995),)),
    "mnist ums": Recipe("ums", (Stage(1000, 1.43845e-4, 4, 0.995),)),
    "fashion-mnist dls": Recipe("dls", (Stage(1000, 5.8627e-4, 1, 0.995),)),
    "fashion-mnist ums": Recipe("ums", (Stage(1000, 1.4678e-3, 3, 0.9995),)),
    "fashion-mnist ums from class means": Recipe("ums", (Stage(1000, 2.5929e-4, 3, 0.9995),)),
    "kmnist dls": Recipe("dls", (Stage(1000, 2.1132e-4, 3, 0.995),)),
    "kmnist ums": Recipe("ums", (Stage(1000, 2.1132e-4, 3, 1.0),)),
    "kmnist ums from class means": Recipe("ums", (Stage(1000, 3.3598e-4, 2, 0.995),)),
    "cifar-10 dls": Recipe("dls", (Stage(1000, 1.1421e-4, 6, 0.9995),), 25),
    "cifar-10 ums": Recipe("ums", (Stage(1000, 1.43845e-4, 5, 0.9995),), 25),
    "staged dls": Recipe("dls", _STAGED),
    "staged ums": Recipe("ums", _STAGED),
}


def paper_annealed(
    key: Key[Array, ""],
    log_score: LogScore,
    process: Process,
    x_T: Float[Array, " batch *event"],
    recipe: Recipe | str,
    *,
    loop: Loop = "scan",
    throw: bool = True,
) -> tuple[Float[Array, " batch *event"], SamplingInfo]:
    """What the released code samples with: several small steps at each level, and noise that fades from level to level.

        x ← x exp(δ (3/2 + ξ) σ² - δ μ + f sqrt(δ) σ z)            "dls"
        x ← x (1 + δ (2 + ξ) σ² - δ μ + f sqrt(δ) σ z)             "ums"

    at the levels k = levels - 1, ..., 0 with t = k / levels, and at k = 0 with t = 1 / levels: level 0 is never trained there.
    recipe  one of RECIPES by its name, or a Recipe

    A heuristic: the steps do not add up to the time that the process takes, and what it samples is not p_0 but something more
    concentrated.  For comparison; `sample` is faster and right.  Raises as `sample` does.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"paper_annealed: recipe is {recipe!r}, expected one of {', '.join(map(repr, RECIPES))}")
        recipe = RECIPES[recipe]
    if recipe.sampler not in ("dls", "ums"):
        raise ValueError(f"paper_annealed: the sampler of recipe is {recipe.sampler!r}, expected 'dls' or 'ums'")
    _method(recipe.sampler, process)
    _check_start("paper_annealed", x_T)
    _check_loop("paper_annealed", loop)
    rows = schedule(recipe)
    t, delta, fade = (jnp.asarray(v, x_T.dtype) for v in rows.T)
    mu, sigma = (f(t).astype(x_T.dtype) for f in (process.drift, process.volatility))
    inputs = (jax.random.split(key, len(rows)), (t, delta, fade, mu, sigma))
    ambient = recipe.sampler == "ums"
    no = jnp.zeros(x_T.shape, bool)
    state = State(x_T if ambient else jnp.log(jnp.abs(x_T)), (), no, no, jnp.zeros((), int))
    if loop == "scan":
        state = _scanned_annealed(log_score, x_T, state, inputs, ambient)
    else:
        for k in range(len(rows)):
            now = jax.tree.map(lambda v, k=k: v[k], inputs)
            state = _compiled_annealed(log_score, x_T, state, now, ambient)
    x = state.at if ambient else jnp.where(x_T < 0, -1, 1) * jnp.exp(state.at)
    return x, _noticed("paper_annealed", x, state, len(rows), throw)


def schedule(recipe: Recipe) -> Float[np.ndarray, "steps 3"]:
    """t, δ and the factor of the noise of every step of a recipe, in their order."""
    levels = sum(stage.levels for stage in recipe.stages)
    rows, k, fade = [], levels - 1, 1.0
    for stage in recipe.stages:
        for _ in range(stage.levels):
            rows += [(max(k, 1) / levels, stage.delta, fade)] * stage.inner
            k, fade = k - 1, fade * stage.factor
    rows += [(1 / levels, recipe.stages[-1].delta, 0.0)] * recipe.quiet
    return np.array(rows)


def _annealed_body(log_score: LogScore, x_T: Array, state: State, inputs: Any, ambient: bool) -> State:
    key, (t, delta, fade, mu, sigma) = inputs
    limit = exponent_limit(x_T.dtype)
    y = jnp.log(jnp.abs(state.at)) if ambient else state.at
    score = _evaluated(log_score, y, t)
    z = jax.random.normal(key, x_T.shape, x_T.dtype)
    change = delta * ((0.5 + score) * sigma**2 - mu) + fade * jnp.sqrt(delta) * sigma * z
    at = state.at * (1 + change + delta * sigma**2 / 2) if ambient else state.at + change
    one = jnp.ones((), x_T.dtype)
    at, clipped = _inside(at, Place(t, one, 0 * one, one), limit, ambient)
    crossed = state.crossed | ((at < 0) != (x_T < 0)) if ambient else state.crossed
    bad = (~jnp.isfinite(score)).sum()
    return State(at, (), crossed, state.clipped | clipped, state.nonfinite + bad)


_compiled_annealed = eqx.filter_jit(_annealed_body)


@eqx.filter_jit
def _scanned_annealed(log_score: LogScore, x_T: Array, start: State, inputs: Any, ambient: bool) -> State:
    def body(state: State, now: Any) -> tuple[State, None]:
        return _annealed_body(log_score, x_T, state, now, ambient), None

    return jax.lax.scan(body, start, inputs)[0]
