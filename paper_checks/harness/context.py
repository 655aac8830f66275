"""What a check function receives: its randomness, its budget, the falsified values, and the ways to measure."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paper_checks.harness import confirm, proof, search, statistics
from paper_checks.harness.claim import EFFORT, Budget, Claim, ClaimError, Outcome, shortened


class Replayed(Exception):
    """Carries the violation at a given input out of a check; see `runner.replay`."""

    def __init__(self, violation: float):
        self.violation = violation


@dataclass(frozen=True)
class Context:
    """One run of one check.  `control` names the falsified (or repaired) version; None is the paper's own."""

    claim: Claim
    key: jax.Array
    """The claim's own stream."""
    paper_key: jax.Array
    """The paper's stream, for results that several of its claims look at."""
    budget: Budget
    alpha: float
    control: str | None = None
    replay: Any = None
    seed: int = 0
    """The seed that the keys were made of, for the code that repeats this run."""
    picked: set[str] = field(default_factory=set, compare=False)

    @property
    def effort(self) -> int:
        return EFFORT[self.budget]

    def n(self, quick: int) -> int:
        """A sample size that grows with the budget: `quick` times 1, 8 or 64."""
        return quick * self.effort

    def pick(self, value: Any, **falsified: Any) -> Any:
        """`value` as the paper says, or the named falsified value when this run is that control."""
        known = {*self.claim.controls, *self.claim.repairs}
        if unknown := set(falsified) - known:
            raise ClaimError(
                f"{self.claim.id}: ctx.pick names {sorted(unknown)}, which are no controls: {sorted(known)}"
            )
        self.picked.update(falsified)
        return falsified.get(self.control, value) if self.control is not None else value

    # -- exact and bound ------------------------------------------------------------------------------------

    def worst(
        self,
        violation: Callable[..., jax.Array],
        draw: Callable[..., Any],
        *,
        constants: tuple[Any, ...] = (),
        structures: Any = None,
        corners: Iterable[Any] = (),
        points: int = 256,
        examples: int = 12,
        high: Callable[..., float] | None = None,
        tolerance: tuple[float, str] | None = None,
        valid: Callable[[Any], jax.Array] | None = None,
        paste: Callable[..., str] | None = None,
        ratio: bool = True,
        **options: Any,
    ) -> Outcome:
        """Search for the worst input of a bound; see `search.worst` for the arguments.

        `violation` is left side / right side - 1 (then tightness is 1 + violation), or any dimensionless violation with
        `ratio=False`.  Every real value of the floating leaves of an input must be legal, or `valid(x)` must say which are.
        `paste(x, *constants)` returns Python code, ending in an assert that fails, for the report.
        """
        if self.replay is not None:
            x = confirm.restored(self.replay, draw, structures)
            if valid is not None and not bool(valid(jax.tree.map(jnp.asarray, x))):
                raise ValueError(f"the witness {shortened(self.replay)} is no legal input: `valid` is false there")
            if high is not None:
                raise Replayed(confirm.in_high(high, x, constants))
            raise Replayed(float(violation(jax.tree.map(jnp.asarray, x), *constants)))
        found = search.worst(
            violation,
            draw,
            self.key,
            constants=constants,
            structures=structures,
            corners=corners,
            points=points * self.effort,
            examples=examples * min(self.effort, 8),
            restarts=32 * min(self.effort, 8),
            high=high,
            tolerance=tolerance,
            valid=valid,
            **options,
        )
        witness = confirm.printable(found.x)
        code = None
        if found.violation > found.tolerance:
            code = paste(found.x, *constants) if paste else self._replay_code(witness)
        quantity = "left side / right side" if ratio else "violation"
        shift = 1.0 if ratio else 0.0
        return Outcome(
            margin=-found.violation,
            tolerance=found.tolerance,
            tolerance_reason=found.tolerance_reason,
            tightness=1 + found.violation if ratio else None,
            n=found.evaluations,
            validity="searched",
            search={
                "structures": found.structures,
                "evaluations": found.evaluations,
                "restarts": found.restarts,
                "agreeing": found.agreeing,
                "confirmation": found.confirmation,
            },
            witness=witness,
            counterexample=code,
            figure={
                "title": "Search for the worst case",
                "x_label": "inputs looked at",
                "y_label": quantity,
                "x_scale": "log",
                "y_scale": "linear",
                "lines": [
                    {
                        "label": "worst so far",
                        "x": [n for n, _ in found.trace],
                        "y": [v + shift for _, v in found.trace],
                        "style": "step",
                    }
                ],
                "hlines": [{"label": "violated above", "y": shift}],
                "bars": None,
            },
        )

    def equal(
        self,
        difference: Callable[..., jax.Array],
        draw: Callable[..., Any],
        *,
        tolerance: tuple[float, str],
        points: int = 64,
        **options: Any,
    ) -> Outcome:
        """Two ways to compute the same thing: `difference(x, *constants)` is their relative difference.

        `tolerance` is the allowance for rounding with its reason; a control must differ by ten times as much.
        """
        return self.worst(
            _absolute(difference), draw, tolerance=tolerance, points=points, ratio=False, steps=0, **options
        )

    def cases(
        self,
        slacks: Mapping[str, float],
        *,
        tolerance: float = 0.0,
        tolerance_reason: str = "",
        **fields: Any,
    ) -> Outcome:
        """A finite list of named slacks that must all be non-negative; the smallest is the margin.

        A tolerance needs its reason.  The evidence is called "exact" for kinds exact and symbolic and "searched" for the
        others, whose cases are samples of more; `validity="exact"` says that the list is complete and nothing random.
        """
        if not slacks:
            raise ClaimError(f"{self.claim.id}: ctx.cases needs at least one case")
        if tolerance > 0 and not tolerance_reason.strip():
            raise ClaimError(f"{self.claim.id}: ctx.cases has the tolerance {tolerance:g} without a tolerance_reason")
        values = {name: float(v) for name, v in slacks.items()}
        nan = [name for name, v in values.items() if math.isnan(v)]
        if nan:
            raise FloatingPointError(f"slack is NaN in the case {nan[0]!r}")
        name = min(values, key=values.__getitem__)
        if self.replay is not None:
            asked = self.replay.get("case") if isinstance(self.replay, Mapping) else self.replay
            if asked not in values:
                raise ValueError(
                    f"the witness is {shortened(self.replay)}; expected one of the cases {', '.join(values)}"
                )
            raise Replayed(-values[asked])
        validity = "exact" if self.claim.kind in ("exact", "symbolic") else "searched"
        fields = {"n": len(values), "validity": validity, **fields}
        if values[name] < -tolerance and "counterexample" not in fields:
            fields["counterexample"] = self._replay_code({"case": name})
        return Outcome(
            margin=values[name],
            tolerance=tolerance,
            tolerance_reason=tolerance_reason,
            witness={"case": name, "slack": values[name]},
            **fields,
        )

    # -- symbolic ---------------------------------------------------------------------------------------------

    def proved(self, *residuals: Any, note: str = "") -> Outcome:
        """Each sympy expression must be identically zero."""
        if not residuals:
            raise ClaimError(f"{self.claim.id}: ctx.proved needs at least one residual")
        result = proof.all_vanish(residuals)
        if self.replay is not None:
            raise Replayed(result.size)
        if not result.zero:
            found = "a residual is not zero"
        elif result.proved:
            found = f"{len(residuals)} residuals reduced to zero"
        else:
            found = f"{len(residuals)} residuals vanish at all points tried, which is no proof"
        witness = {"residual": result.shown}
        return Outcome(
            margin=0.0 if result.zero else -max(result.size, 1e-300),
            n=len(residuals),
            validity="proof" if result.proved else "searched",
            note=f"{found}; {note}" if note else found,
            witness=None if result.zero else witness,
            counterexample=None if result.zero else self._replay_code(witness),
        )

    # -- statistical, rate, trained ------------------------------------------------------------------------------

    def mean(self, x: Any, expected: float, *, low: float, high: float) -> Outcome:
        """E[x] = expected for samples bounded in [low, high]; exact."""
        return self._evidence(statistics.mean(x, expected, low=low, high=high, alpha=self.alpha))

    def at_most(self, x: Any, bound: float, *, low: float, high: float) -> Outcome:
        """E[x] <= bound for samples bounded in [low, high]; exact, one-sided."""
        e = statistics.mean(x, bound, low=low, high=high, alpha=self.alpha, one_sided=True)
        tightness = e.statistic / bound if bound > 0 else None
        return dataclasses.replace(self._evidence(e), margin=bound - e.statistic, tightness=tightness)

    def proportion(self, successes: int, n: int, expected: float) -> Outcome:
        """P(success) = expected; exact binomial test."""
        return self._evidence(statistics.proportion(successes, n, expected, alpha=self.alpha))

    def law(self, x: Any, cdf: Callable[[np.ndarray], np.ndarray]) -> Outcome:
        """x follows the continuous distribution function `cdf`; exact."""
        outcome = self._evidence(statistics.law(x, cdf, alpha=self.alpha))
        a = np.sort(np.asarray(x, float).ravel())
        a = a[:: max(1, a.size // 200)]
        grid = np.arange(1, a.size + 1) / a.size
        figure = {
            "title": "Distribution function",
            "x_label": "x",
            "y_label": "P(X <= x)",
            "x_scale": "linear",
            "y_scale": "linear",
            "lines": [
                {"label": "samples", "x": a.tolist(), "y": grid.tolist(), "style": "step"},
                {"label": "claimed", "x": a.tolist(), "y": np.asarray(cdf(a), float).tolist(), "style": "dashed"},
            ],
            "hlines": [],
            "bars": None,
        }
        return dataclasses.replace(outcome, figure=figure)

    def same_law(self, x: Any, y: Any) -> Outcome:
        """Two samples have one distribution; exact."""
        k = jax.random.fold_in(self.key, 0x5A3E)
        return self._evidence(statistics.same_law(x, y, key=k, alpha=self.alpha))

    def order(
        self, steps: Sequence[float], errors: Any, claimed: float, rivals: Sequence[float] | None = None
    ) -> Outcome:
        """Errors (replicates, levels) fall with the claimed order of the step, and not with a neighbouring one."""
        slope = statistics.order(steps, errors, claimed=claimed, alpha=self.alpha, rivals=rivals)
        e = np.exp(np.log(np.asarray(errors, float)).mean(0))
        h = np.asarray(steps, float)
        fine = int(np.argmin(h))
        lines = [{"label": "measured", "x": h.tolist(), "y": e.tolist(), "style": "points"}]
        for name, q in [("claimed", claimed)] + [("rival", r) for r in (rivals or (claimed - 0.5, claimed + 0.5))]:
            y = e[fine] * (h / h[fine]) ** q
            style = "line" if name == "claimed" else "dashed"
            lines.append({"label": f"{name} order {q:g}", "x": h.tolist(), "y": y.tolist(), "style": style})
        return Outcome(
            margin=slope.reach - abs(slope.order - claimed)
            if slope.verdict != "rival"
            else -abs(slope.order - claimed),
            n=int(np.size(errors)),
            resolution=slope.resolution,
            validity="asymptotic",
            our_value=slope.order,
            paper_value=claimed,
            note=slope.reason,
            undecided=slope.reason if slope.verdict == "undecided" else "",
            witness={"local slopes": list(slope.local)},
            figure={
                "title": "Order of convergence",
                "x_label": "step",
                "y_label": "error",
                "x_scale": "log",
                "y_scale": "log",
                "lines": lines,
                "hlines": [],
                "bars": None,
            },
        )

    def better(self, ours: Sequence[float], baseline: Sequence[float], *, by: float = 0.0, **fields: Any) -> Outcome:
        """Ours exceeds the baseline by more than `by`, paired over at least five seeds."""
        a = statistics.paired(ours, baseline, alpha=self.alpha)
        straddles = a.lower < by <= a.upper
        return Outcome(
            margin=a.lower - by if not straddles else a.mean - by,
            n=a.n,
            resolution=a.resolution,
            validity="asymptotic",
            our_value=a.mean,
            note=f"mean paired difference {a.mean:.3g}, interval [{a.lower:.3g}, {a.upper:.3g}] at level {self.alpha:.1g}",
            undecided=f"the interval [{a.lower:.3g}, {a.upper:.3g}] contains {by:g}" if straddles else "",
            **fields,
        )

    def _evidence(self, e: statistics.Evidence) -> Outcome:
        if self.replay is not None:
            raise Replayed(abs(e.statistic - e.expected))
        return Outcome(
            margin=-abs(e.statistic - e.expected),
            n=e.n,
            log_e=e.log_e,
            p=e.p,
            resolution=e.resolution,
            validity=e.validity,
            note=e.note,
            our_value=e.statistic,
            paper_value=e.expected,
            witness={"statistic": e.statistic, "expected": e.expected},
        )

    # -- code for the reader -----------------------------------------------------------------------------------

    def _replay_code(self, witness: Any) -> str:
        """Code that shows the violation at `witness`; what a check computes may depend on its budget and seed."""
        given = {"control": self.control, "budget": self.budget, "seed": self.seed}
        usual = {"control": None, "budget": "quick", "seed": 0}
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])
        return (
            "from paper_checks import replay\n\n"
            f"witness = {witness!r}\n"
            f"violation = replay({self.claim.id!r}, witness{options})\n"
            'assert violation <= 0, f"violated by {violation:.3g}"\n'
        )

    def run_code(self) -> str:
        """Code that repeats the whole run, for evidence that no single input shows."""
        chosen = f".controls[{self.control!r}]" if self.control in self.claim.controls else ".runs[0]"
        if self.control in self.claim.repairs:
            chosen = f".runs[{[name for _, name in self.claim.items()].index(self.control)}]"
        return (
            "from paper_checks import run\n\n"
            f"result = run({self.claim.id!r}, budget={self.budget!r}, seed={self.seed}, suite_alpha={self.alpha!r})\n"
            f"found = result{chosen}\n"
            'assert found.verdict not in ("refuted", "not reproduced"), found.reason\n'
        )


@functools.lru_cache(maxsize=256)
def _absolute(difference: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """|difference|, the same function object every time so that compilations are shared."""
    return lambda x, *constants: jnp.abs(difference(x, *constants))
