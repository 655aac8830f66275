"""The effect handler that runs a NumPyro program for `vi.programs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.primitives import _PYRO_STACK, Messenger

from vi.errors import AddressError
from vi.expectation import continuous, random_key, sample
from vi.families import density, innermost
from vi.jaxpr import trace_state
from vi.strategies import reparam, split
from vi.supports import check_support, static_support
from vi.traces import Site, Strategy, Trace, WeightedSite, known_supports


class Runner(Messenger):
    """The effect handler: decides every site's value and records its density.

    Messages stop here.  `places` holds JAX's tracing state where the program, and each loop body or branch that is being
    traced, began: a site met in any other state is inside a transformation that would lose its value.  `steps` holds
    (number of the step, number of steps) of the loops around, outermost first.
    """

    def __init__(
        self, program: str, params: Mapping[str, Any], given: Mapping[str, Any], draw: bool, strategy: Strategy | None
    ) -> None:
        super().__init__()
        self.program, self.params, self.given, self.draw, self.strategy = program, params, given, draw, strategy
        self.places = [trace_state()]
        self.steps: list[tuple[Any, int]] = []
        self.sites: dict[str, Site] = {}
        self.plates: dict[str, Any] = {}
        self.supports: dict[str, constraints.Constraint] = {}
        self.used: set[str] = set()
        self.missing: dict[str, None] = {}  # an ordered set
        self.observed_and_given: dict[str, None] = {}

    # -- results

    def trace(self) -> Trace:
        latent = {a: site.value for a, site in self.sites.items() if not site.is_observed}
        return Trace({**self.plates, **_flat(latent)}, self.supports)

    def log_prob(self, keep: Callable[[str], bool] = lambda _: True) -> Float[Array, ""]:
        terms = [site.log_prob for a, site in self.sites.items() if keep(a)]
        return sum(terms[1:], start=terms[0]) if terms else jnp.zeros(())

    def mismatch(self) -> AddressError | None:
        """The error that lists how addresses of the program and of the trace differ; None if they agree."""
        extra = [a for a in self.given if a not in self.used and a not in self.observed_and_given]
        parts = []
        if self.missing:
            parts.append(
                f"drawn by the program but missing from the trace: {_listed(self.missing)} (is its observation missing?)"
            )
        if extra:
            parts.append(f"in the trace but not drawn by the program: {_listed(extra)}")
        if self.observed_and_given:
            parts.append(
                f"in the trace although the program has a value for it: {_listed(self.observed_and_given)} "
                "(observe it, or leave it in the trace, not both)"
            )
        return AddressError(f"{self.program}: " + "; ".join(parts)) if parts else None

    # -- messages

    def process_message(self, msg: dict[str, Any]) -> None:
        msg["stop"] = True
        match msg["type"]:
            case "sample":
                self._site(msg)
            case "param":
                self._param(msg)
            case "plate":
                self._plate(msg)
            case "prng_key" if msg["value"] is None:
                self.check_visible(self)
                msg["value"] = random_key()
            case "control_flow":
                self._control_flow(msg)

    def _site(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        self.check_place(name)
        if name in self.sites or name in self.missing or name in self.plates:
            raise AddressError(f"{self.program}: address '{name}' is used twice")
        inner = msg["fn"]
        while isinstance(inner, dist.MaskedDistribution):
            inner = inner.base_dist
        if isinstance(inner, _Scored):  # from a loop or branch, where `choose_inside` has seen to its value
            plain, log_prob = None, msg["fn"].log_prob(msg["value"])
        else:
            plain, log_prob = self._decide(name, msg)
        if name not in self.missing:
            total = _scaled(log_prob, msg["scale"]).sum()
            self.sites[name] = Site(plain, msg["value"], msg["scale"], total, msg["is_observed"])

    def choose_inside(self, msg: dict[str, Any]) -> Any:
        """A site in a body of NumPyro's scan or cond: decide its value here, and let only its density travel outside."""
        if msg["type"] != "sample":
            return None
        name = _scoped(msg["name"], self)
        had_value = msg["value"] is not None
        fn = msg["fn"]
        _, log_prob = self._decide(name, msg)
        if isinstance(msg["value"], dict):
            raise AddressError(f"{self.program}: '{name}' has several addresses, which a loop or branch cannot hold")
        event_shape = jnp.shape(msg["value"]) if isinstance(fn, WeightedSite) else fn.event_shape
        msg["fn"] = _Scored(_scaled(log_prob, msg["scale"]), event_shape)
        msg["scale"] = None
        msg["kwargs"]["sample_shape"] = ()
        return None if had_value else msg["value"]

    def _decide(self, name: str, msg: dict[str, Any]) -> tuple[dist.Distribution | None, Any]:
        """Set the value of a site; returns its plain distribution and its log density by element."""
        fn, shape = msg["fn"], msg["kwargs"].get("sample_shape", ())
        fn = fn.expand((*shape, *fn.batch_shape)) if shape else fn
        if isinstance(fn, WeightedSite):
            return None, self._decide_weighted(name, fn, msg)
        plain = split(fn)[0]
        if msg["value"] is not None:
            if name in self.given:
                self.observed_and_given[name] = None
            return plain, _log_prob(plain, msg["value"])
        if name in self.given:
            self.used.add(name)
            msg["value"] = self._read(name, plain)
            return plain, _log_prob(plain, msg["value"])
        if not self.draw:
            self.missing[name] = None
            msg["value"] = _placeholder(plain)
            return plain, jnp.zeros(())
        if (support := static_support(plain)) is not None:
            self.supports[name] = support
        msg["value"], log_prob = _draw(fn if self.strategy is None else self.strategy(plain), name)
        return plain, log_prob

    def _read(self, name: str, plain: dist.Distribution) -> Any:
        value, expected = self.given[name], tuple(plain.shape())
        full = (*(length for _, length in self.steps), *expected)
        if jnp.shape(value) != full:
            raise AddressError(
                f"{self.program}: the trace has a value of shape {jnp.shape(value)} at '{name}', expected {full}"
            )
        if (support := known_supports(self.given).get(name)) is not None:
            check_support(name, support, plain, expected)
        return self._at_step(name)

    def _decide_weighted(self, name: str, fn: WeightedSite, msg: dict[str, Any]) -> Any:
        inner = fn.program.addresses(self.params, *fn.args)
        names = {a: name if len(inner) == 1 else f"{name}/{a}" for a in inner}
        have = [n for n in names.values() if n in self.given]
        value = msg["value"]
        if value is not None:
            self.observed_and_given.update(dict.fromkeys(have))
            choices = Trace(value if isinstance(value, Mapping) else {inner[0]: value})
            weight = fn.program.estimate(self.params, choices, *fn.args)
        elif have or not self.draw:
            self.used.update(have)
            lacking = [n for n in names.values() if n not in self.given]
            if lacking:
                self.missing.update(dict.fromkeys(lacking))
                self.missing[name] = None
                shapes = jax.eval_shape(lambda: fn.program.simulate(self.params, *fn.args)[0])
                choices, weight = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), jnp.zeros(())
            else:
                known = known_supports(self.given)
                choices = Trace(
                    {a: self._at_step(n) for a, n in names.items()},
                    {a: known[n] for a, n in names.items() if n in known},
                )
                weight = fn.program.estimate(self.params, choices, *fn.args)
        else:
            choices, weight = fn.program.simulate(self.params, *fn.args)
            self.supports.update({names[a]: s for a, s in choices.supports.items()})
        msg["value"] = choices[inner[0]] if len(inner) == 1 else {a: choices[a] for a in inner}
        return jnp.where(fn.weight_mask, weight, 0.0)

    def _at_step(self, name: str) -> Any:
        value = self.given[name]
        for step, _ in self.steps:
            value = jnp.asarray(value)[step]
        return value

    def _param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if msg["value"] is None:
            if name not in self.params:
                known = f"given are {_listed(self.params)}" if self.params else "none are given"
                raise AddressError(f"{self.program}: params has no value for parameter '{name}'; {known}")
            msg["value"] = self.params[name]
        constraint = msg["kwargs"].get("constraint", constraints.real)
        leaves = jax.tree.leaves((msg["value"], constraint))
        if constraint is not constraints.real and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            with jax.ensure_compile_time_eval():
                inside = bool(jnp.all(constraint(msg["value"])))
            if not inside:
                raise ValueError(
                    f"{self.program}: parameter '{name}' is {msg['value']}, outside its constraint {constraint}; "
                    "params holds constrained values"
                )

    def _plate(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if msg["value"] is not None:  # not subsampled
            return
        self.check_place(name)
        size, subsample_size = msg["args"]
        if name in self.given:
            self.used.add(name)
            if jnp.shape(self.given[name]) != (subsample_size,):
                raise AddressError(
                    f"{self.program}: the trace has {jnp.shape(self.given[name])} indices of plate '{name}', "
                    f"expected {(subsample_size,)}"
                )
            self.plates.setdefault(name, self.given[name])
        if name not in self.plates:
            key = msg["kwargs"].get("rng_key")
            self.plates[name] = msg["fn"](size, subsample_size, rng_key=random_key() if key is None else key)
        if jnp.shape(self.plates[name]) != (subsample_size,):
            raise AddressError(f"{self.program}: plate '{name}' is used twice with different subsample sizes")
        msg["value"] = self.plates[name]

    def _control_flow(self, msg: dict[str, Any]) -> None:
        """Let NumPyro run its scan or cond; the bodies report to us, and sites without a value ask us for one."""
        msg["kwargs"]["substitute_stack"].append(("substitute", self.choose_inside))
        bodies = _enter_bodies(msg, self)
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        except TypeError as error:
            first, *others = [body.addresses for body in bodies]
            if any(other != first for other in others):
                listed = " and ".join(f"({_shaped(body.addresses)})" for body in bodies)
                raise AddressError(
                    f"{self.program}: the branches of a cond must have the same addresses, in the same order, with equal "
                    f"shapes; they have {listed}"
                ) from error
            raise

    # -- checks

    def check_place(self, name: str) -> None:
        if trace_state() != self.places[-1]:
            raise AddressError(
                f"{self.program}: site '{name}' is inside a JAX transformation (lax.scan, vmap, jit, ...) that would lose it; "
                "use numpyro.plate, scan or cond of numpyro.contrib.control_flow, or transform a function that calls vi.sim"
            )

    def check_visible(self, handler: Messenger) -> None:
        """A request for a key from below numpyro.handlers.block most likely comes from a latent site that it hides."""
        for other in reversed(_PYRO_STACK):
            if other is handler:
                return
            if isinstance(other, handlers.block):
                raise AddressError(
                    f"{self.program}: a random choice inside numpyro.handlers.block is missing from the density; observe it, "
                    "remove it with vi.marginal, or draw a key with numpyro.prng_key() before the block"
                )


class _Body(Messenger):
    """Around the body of a loop or branch, inside of NumPyro's own handlers there."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner
        self.addresses: dict[str, tuple[int, ...]] = {}

    def enter(self, body: Callable[..., Any], steps: list[tuple[Any, int]], *args: Any) -> Any:
        runner = self.runner
        self.addresses = {}
        runner.places.append(trace_state())
        runner.steps.extend(steps)
        try:
            with self:
                return body(*args)
        finally:
            runner.places.pop()
            del runner.steps[len(runner.steps) - len(steps) :]

    def process_message(self, msg: dict[str, Any]) -> None:
        match msg["type"]:
            case "sample":
                self.runner.check_place(msg["name"])
                if msg["name"] in self.addresses:
                    raise AddressError(
                        f"{self.runner.program}: address '{msg['name']}' is used twice in a loop or branch"
                    )
                self.addresses[msg["name"]] = (*msg["kwargs"].get("sample_shape", ()), *msg["fn"].shape())
            case "plate" if msg["value"] is None:
                raise AddressError(
                    f"{self.runner.program}: plate '{msg['name']}' is subsampled inside a loop or branch, which would lose "
                    "its indices; subsample outside and pass the data in"
                )
            case "prng_key" if msg["value"] is None:
                self.runner.check_visible(self)
                msg["value"] = random_key()
            case "control_flow":
                # NumPyro's block handler would ask for a key; no site uses it, as all get their values from us.
                msg["kwargs"]["rng_key"] = jax.random.key(0)
                _enter_bodies(msg, self.runner)


def _enter_bodies(msg: dict[str, Any], runner: Runner) -> list[_Body]:
    """Put a _Body around the function or functions of a message of NumPyro's scan or cond."""
    if msg["fn"].__name__ == "scan_wrapper":
        f, init, xs, length, reverse = msg["args"]
        n = jnp.shape(jax.tree.leaves(xs)[0])[0] if length is None else length
        body = _Body(runner)

        def step(carry: Any, numbered: Any) -> Any:
            number, x = numbered
            return body.enter(f, [(number, n)], carry, x)

        msg["args"] = (step, init, (jnp.arange(n), xs), n, reverse)
        return [body]
    pred, true_fun, false_fun, operand = msg["args"]
    bodies = [_Body(runner), _Body(runner)]
    branches = [
        lambda operand, body=body, f=f: body.enter(f, [], operand)
        for body, f in zip(bodies, (true_fun, false_fun), strict=True)
    ]
    msg["args"] = (pred, *branches, operand)
    return bodies


class _Scored(dist.Distribution):
    """What remains of a site's distribution outside the loop or branch that it was in: its log density by element."""

    arg_constraints: ClassVar[dict[str, Any]] = {"log_factor": constraints.real}
    support = constraints.real

    def __init__(self, log_factor: Any, event_shape: tuple[int, ...]) -> None:
        self.log_factor = log_factor
        super().__init__(jnp.shape(log_factor), event_shape, validate_args=False)

    def log_prob(self, value: Any) -> Any:
        return self.log_factor


def _draw(fn: dist.Distribution, name: str) -> tuple[Any, Any]:
    """A value drawn from `fn`, and its log density by element.

    A transformed distribution is drawn through its base where that is the same choice (reparameterised, or transforms that no
    parameter enters), so that its density needs no inverse, which for a flow may be slow, inexact or unknown.
    """
    plain, strategy, _ = split(fn)
    flow = plain.base_dist if isinstance(plain, dist.ExpandedDistribution) else plain
    fixed = strategy is None and not any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(getattr(flow, "transforms", ()))
    )
    if (
        not isinstance(flow, dist.TransformedDistribution)
        or not (fixed or (strategy is not None and strategy.name == "reparam"))
        or flow.base_dist.batch_shape != flow.batch_shape
    ):
        value = sample(fn, name=name)
        return value, _log_prob(plain, value)
    base = flow.base_dist.expand(plain.batch_shape) if plain is not flow else flow.base_dist
    flow = dist.TransformedDistribution(base, list(flow.transforms))
    value = sample(base if fixed else reparam(base), name=name)
    intermediates = []
    for transform in flow.transforms:
        before = value
        value, extra = transform.call_with_intermediates(value)
        intermediates.append([before, extra])
    return value, _log_prob(flow, value, intermediates)


def _log_prob(d: dist.Distribution, *args: Any) -> Any:
    """The log density by element.

    NumPyro's densities are continuous in their parameters, and in the value inside the support, however they are
    computed (in several pieces, some of them); a density of the user's own is looked into.
    """
    if not type(innermost(d)).__module__.startswith("numpyro."):
        return d.log_prob(*args)
    return continuous(lambda *args: density(d, *args))(*args)


def _placeholder(fn: dist.Distribution) -> Any:
    """Some value of the right shape, to run a program to its end after its trace was found to lack one."""
    zeros = jnp.zeros(fn.shape())
    try:
        return fn.support.feasible_like(zeros)
    except NotImplementedError:
        return zeros


def _scoped(name: str, runner: Runner) -> str:
    """A name as the runner will see it, with the prefixes of numpyro.handlers.scope around the innermost loop or branch."""
    body = max(i for i, handler in enumerate(_PYRO_STACK) if isinstance(handler, _Body))
    for handler in reversed(_PYRO_STACK[_PYRO_STACK.index(runner) : body]):
        if isinstance(handler, handlers.scope) and "sample" not in handler.hide_types:
            name = f"{handler.prefix}{handler.divider}{name}"
    return name


def _scaled(log_prob: Any, scale: Any) -> Any:
    return jnp.asarray(log_prob if scale is None else scale * log_prob)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values of sites with several addresses under those addresses."""
    flat = {}
    for name, value in values.items():
        flat.update({f"{name}/{a}": v for a, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _shaped(addresses: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"'{a}' of shape {shape}" for a, shape in addresses.items())
