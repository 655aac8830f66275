"""What programs are made of: traces of their random choices, and programs whose density is an estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from vi.errors import AddressError

Strategy = Callable[[dist.Distribution], dist.Distribution]  # reparam, mvd, ...


class Trace(Mapping[str, Any]):
    """The random choices of one run: a flat, immutable mapping from address to value; a pytree.

    Indices of subsampled plates are included under the plate's name, and so are, stacked along leading axes, the values of
    sites in `numpyro.contrib.control_flow.scan`.  `trace | {"x": x}` adds addresses or replaces them.  A trace made by
    `sim` remembers the support that each value was drawn from, for `log_density` to check.
    """

    __slots__ = ("_supports", "_values")

    def __init__(self, values: Mapping[str, Any], supports: Mapping[str, constraints.Constraint] | None = None) -> None:
        self._values = dict(values)
        self._supports = {a: s for a, s in (supports or {}).items() if a in self._values}

    @property
    def supports(self) -> Mapping[str, constraints.Constraint]:
        """The supports that are known, by address."""
        return dict(self._supports)

    def __getitem__(self, address: str) -> Any:
        return self._values[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __or__(self, other: Mapping[str, Any]) -> Trace:
        if not isinstance(other, Mapping):
            return NotImplemented
        kept = {a: s for a, s in self._supports.items() if a not in other}
        return Trace({**self._values, **other}, {**kept, **known_supports(other)})

    def __ror__(self, other: Mapping[str, Any]) -> Trace:
        return Trace(other, known_supports(other)) | self if isinstance(other, Mapping) else NotImplemented

    def __repr__(self) -> str:
        return f"Trace({self._values!r})"

    def select(self, keep: Callable[[str], bool]) -> Trace:
        """The part of the trace at the addresses that `keep` accepts."""
        return Trace({a: v for a, v in self._values.items() if keep(a)}, self._supports)


def known_supports(values: Mapping[str, Any]) -> Mapping[str, constraints.Constraint]:
    return values.supports if isinstance(values, Trace) else {}


class _Aside:
    """Static data that takes no part in comparisons of pytree structures: two branches may differ in it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aside)

    def __hash__(self) -> int:
        return 0


def _flatten(trace: Trace) -> tuple[list[tuple[Any, Any]], Any]:
    addresses = tuple(sorted(trace))
    return [(jax.tree_util.DictKey(a), trace[a]) for a in addresses], (addresses, _Aside(trace.supports))


def _unflatten(static: Any, values: Any) -> Trace:
    addresses, supports = static
    return Trace(dict(zip(addresses, values, strict=True)), supports.value)


jax.tree_util.register_pytree_with_keys(Trace, _flatten, _unflatten)


class Site(NamedTuple):
    """One site of a run.  log_prob: summed over its batch, scaled and masked; is_observed: data or a factor."""

    distribution: dist.Distribution | None  # None where only its density is known
    value: Any
    scale: Any
    log_prob: Float[Array, ""]
    is_observed: bool


class WeightedProgram:
    """A program whose density is known up to an unbiased estimate (section 3.2 of the paper).

    `simulate` returns (trace, log w) with E[1/w | trace] = 1/density, `estimate` of a trace returns log w with
    E[w] = density.  Called with arguments, it is a distribution that a NumPyro program can sample from.
    """

    def simulate(self, params: Mapping[str, Any] | None, *args: Any) -> tuple[Trace, Float[Array, ""]]:
        raise NotImplementedError

    def estimate(self, params: Mapping[str, Any] | None, trace: Mapping[str, Any], *args: Any) -> Float[Array, ""]:
        raise NotImplementedError

    def addresses(self, params: Mapping[str, Any] | None, *args: Any) -> tuple[str, ...]:
        """The addresses of its traces."""
        return tuple(jax.eval_shape(lambda: self.simulate(params, *args)[0]))

    def __call__(self, *args: Any) -> WeightedSite:
        return WeightedSite(self, args)


class WeightedSite(dist.Distribution):
    """A WeightedProgram with its arguments, for numpyro.sample.

    If the program has one address, the site's value is the value there, at the site's own address; otherwise the value
    is a dict, and the addresses are "site/address".
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("args", "weight_mask")
    pytree_aux_fields = ("program",)

    def __init__(self, program: WeightedProgram, args: tuple[Any, ...], weight_mask: Any = True) -> None:
        self.program = program
        self.args = args
        self.weight_mask = weight_mask
        super().__init__((), ())

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        raise AddressError("a site with an estimated density can only be drawn by vi.sim")

    def log_prob(self, value: Any) -> Any:
        raise AddressError("a site with an estimated density can only be scored by vi.sim and vi.log_density")

    def expand(self, batch_shape: tuple[int, ...]) -> WeightedSite:
        if batch_shape:
            raise AddressError(
                f"a site with an estimated density has no batch, but a plate or sample_shape asks for {batch_shape}; "
                "put the plate into its program"
            )
        return self

    def mask(self, mask: Any) -> WeightedSite:
        if jnp.shape(mask):
            raise AddressError(
                f"a site with an estimated density takes a scalar mask, not one of shape {jnp.shape(mask)}"
            )
        return WeightedSite(self.program, self.args, self.weight_mask & mask)
