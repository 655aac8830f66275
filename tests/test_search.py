"""The worst-case search: finds what is false, lets pass what is true, and tells rounding from mathematics."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from hypothesis import strategies as st

from paper_checks.harness import search
from paper_checks.harness.runner import replay, run

pytestmark = pytest.mark.usefixtures("x64")

SEEDS = range(10)


def find(violation: Any, draw: Any, seed: int = 0, **options: Any) -> search.Found:
    return search.worst(violation, draw, jax.random.key(seed), **options)


# -- planted truths and lies ------------------------------------------------------------------------------------------


def attack(q: planted.Inequality, constant: float) -> list[search.Found]:
    """One search a seed; the constant is traced, so that truth and lie share their compilations."""
    return [
        find(q.violation, q.draw, seed, constants=(constant,), structures=[q.structure], high=q.high) for seed in SEEDS
    ]


@pytest.mark.parametrize("q", planted.INEQUALITIES, ids=lambda q: q.name)
def test_a_sharp_inequality_is_never_refuted_and_one_that_is_1_percent_wrong_always(q: planted.Inequality):
    # Over all inequalities 200 lies of 200: a search that misses 2 % of such lies passes with probability 0.02 only.
    true, false = attack(q, 1.0), attack(q, 0.99)
    assert [f.violation for f in true if f.violation > f.tolerance] == []
    assert [f.violation for f in false if not 10 * f.tolerance < f.violation <= 1 / 0.99 - 1 + 1e-9] == []
    # No allowance may hide the lie; all inequalities are attained, and the search comes close to equality.
    assert max(f.tolerance for f in true) < 1e-7
    assert max(f.violation for f in true) > -1e-3


def draw_almost_equal(key: jax.Array, k: int) -> dict[str, jax.Array]:
    """Distributions as in the planted inequality, half of them a thousand times closer."""
    x = planted.logits_near_and_far(key, k)
    closer = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), 1e-3, 1.0)
    return {"p": x["p"], "q": x["p"] + closer * (x["q"] - x["p"])}


@pytest.mark.parametrize("high", [planted.pinsker_in_60_digits, None], ids=["60 digits", "32 bits"])
def test_rounding_is_not_taken_for_a_violation_and_does_not_hide_one(high: Any):
    """Pinsker's inequality for two categories: where p is close to q, rounding alone breaks it visibly."""
    violation = planted.pinsker
    apparent = 0
    for seed in SEEDS:
        options: dict[str, Any] = {"structures": [(2,)], "high": high}
        true = find(violation, draw_almost_equal, seed, constants=(1.0,), **options)
        assert true.violation <= true.tolerance
        told = "were rounding" if high else "could not be told from rounding"
        apparent += told in true.confirmation
        assert high is not None or "were rounding" not in true.confirmation
        false = find(violation, draw_almost_equal, seed, constants=(0.99,), **options)
        assert false.violation > false.tolerance
        assert planted.pinsker_in_60_digits(false.x, 0.99) > 0
    assert apparent >= 5  # the trap was there


def unstable(x: jax.Array) -> jax.Array:
    """Zero for exact numbers, pure rounding in floating point."""
    return jnp.sum((x + 100) ** 3 - (x**3 + 300 * x**2 + 3e4 * x + 1e6))


def test_what_cannot_be_told_from_rounding_asks_for_higher_precision():
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (3,))

    with pytest.raises(FloatingPointError, match="cannot be told from rounding; give the check a `high` function"):
        find(lambda x: 1e-3 + unstable(x), draw, steps=0)
    stated = find(unstable, draw, tolerance=(1e-8, "the terms are of size 1e6"), steps=0)
    assert 0 < stated.violation <= stated.tolerance == 1e-8
    assert stated.tolerance_reason == "the terms are of size 1e6"


def slightly_false(x: jax.Array, c: Any) -> jax.Array:
    """1 / (1 + x^2) <= 1 / (1 + c): false by c, which vanishes in 32 bits beside the 1."""
    return (1 + c) / (1 + x[0] ** 2) - 1


def draw_near_zero(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (1,)) * 1e-3


def test_a_violation_that_cannot_be_settled_raises_the_tolerance():
    found = find(slightly_false, draw_near_zero, constants=(1e-8,))
    assert found.violation <= found.tolerance
    assert found.tolerance == pytest.approx(1e-8, rel=0.1)
    assert "could not be told from rounding" in found.tolerance_reason
    assert "apparent violations could not be told from rounding or were not examined" in found.confirmation
    assert "were rounding" not in found.confirmation
    settled = find(
        slightly_false, draw_near_zero, constants=(1e-8,), high=lambda x, c: (c - x[0] ** 2) / (1 + x[0] ** 2)
    )
    assert settled.tolerance < 1e-15 and settled.violation == pytest.approx(1e-8, rel=0.1)


def test_a_claim_with_an_unsettled_violation_must_have_stronger_controls():
    def check(ctx: Any) -> Any:
        # Of 64 inputs the better 32 are kept, some of which are far enough from 0 to be settled.
        constants, few = (ctx.pick(1e-8, wrong=5e-8),), {"points": 64, "steps": 0}
        return ctx.worst(slightly_false, draw_near_zero, constants=constants, **few)

    def strong(ctx: Any) -> Any:
        return ctx.worst(slightly_false, draw_near_zero, constants=(ctx.pick(1e-8, wrong=1e-2),))

    weak = run(planted.plant(check, "bound"))
    assert (weak.verdict, weak.ok) == ("inconclusive", False)
    assert "is not well below the violation" in weak.reason or "negative control not caught" in weak.reason, weak.reason
    held = run(planted.plant(strong, "bound"))
    assert held.verdict == "holds" and held.outcome is not None
    assert held.outcome.tolerance == pytest.approx(1e-8, rel=0.1) and held.outcome.validity == "searched"


def by_size(x: jax.Array) -> jax.Array:
    return jnp.where(x.size == 1, 2e-8, 1e-8) + 0 * x[0]


def test_in_higher_precision_what_is_not_examined_raises_the_tolerance_and_other_structures_are_asked():
    options: dict[str, Any] = {"structures": [(1,), (2,)], "steps": 0}
    rounding = find(by_size, draw_normal, high=lambda x: -1e-3, **options)
    assert (rounding.violation, rounding.tolerance) == (-1e-3, 2e-8)
    assert "6 apparent violations were rounding; " in rounding.confirmation
    assert "could not be told from rounding or were not examined" in rounding.confirmation
    real = find(by_size, draw_normal, high=lambda x: -1e-3 if x.size == 1 else 1e-8, **options)
    assert (real.violation, real.x.size) == (1e-8, 2)
    assert real.tolerance < 1e-15


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_high_function_that_is_not_finite_is_an_error(value: float):
    with pytest.raises(FloatingPointError, match=rf"`high`.* is {value} at the input \["):
        find(steep, draw_normal, structures=[(2,)], constants=(1.0,), high=lambda x, c: value)


# -- witnesses --------------------------------------------------------------------------------------------------------


def draw_normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape)


def steep(x: jax.Array, c: Any) -> jax.Array:
    """(x_0 / |x|)^2 <= c: coordinates other than the first only get in the way."""
    return x[0] ** 2 / (c * jnp.sum(x**2)) - 1


def test_the_witness_is_simple_and_still_violates():
    found = find(steep, draw_normal, constants=(0.9,), structures=[(5,)])
    x = np.asarray(found.x)
    assert x[0] != 0 and x[0] == float(f"{x[0]:.1e}")
    assert list(x[1:]) == [0, 0, 0, 0]
    assert found.violation == pytest.approx(1 / 0.9 - 1, rel=1e-12)
    assert found.confirmation.endswith("simplified")


def first_is_large(x: jax.Array) -> jax.Array:
    return jnp.tanh(x[0]) - 0.2


def test_coordinates_that_do_not_matter_become_zero_and_others_whole():
    corner = np.array([1.7, 2.6, -3.4])
    found = find(first_is_large, draw_normal, structures=[], corners=[corner])
    assert found.x.tolist() == [2.0, 0.0, 0.0]


def test_a_witness_keeps_the_digits_that_its_violation_needs():
    def narrow(x: jax.Array) -> jax.Array:
        return 1e-3 - jnp.abs(x[0] - 0.1234)

    found = find(narrow, draw_normal, structures=[(1,)])
    assert 2.5e-4 <= found.violation <= 1e-3
    assert abs(float(found.x[0]) - 0.1234) < 1e-3


def large_is_violated(x: jax.Array) -> jax.Array:
    return jnp.where(x.size >= 4, 1.0, -1.0) * (1 + 0.01 * jnp.tanh(x[0]))


def test_hypothesis_shrinks_the_structure_to_the_smallest_violated_one():
    sizes = st.tuples(st.integers(1, 12))
    assert find(large_is_violated, draw_normal, structures=sizes, points=16, examples=20).x.shape == (4,)


def test_of_listed_structures_the_smallest_that_is_clearly_violated_is_shown():
    found = find(large_is_violated, draw_normal, structures=[(9,), (5,), (3,), (7,)], points=16)
    assert found.x.shape == (5,)
    assert found.structures == 4


class Counted(NamedTuple):
    value: Any
    count: Any


def test_integers_stay_fixed():
    def draw(key: jax.Array, count: int) -> Counted:
        return Counted(jax.random.normal(key, (2,)), jnp.asarray(count))

    def below(x: Counted) -> jax.Array:
        # Rises with `count` as well: an ascent that moved it would end above -1/(1 + 3).
        return -1 / (1 + x.count) - jnp.sum((x.value - x.count) ** 2)

    found = find(below, draw, structures=[(1,), (3,)])
    assert np.issubdtype(np.asarray(found.x.count).dtype, np.integer)
    assert int(found.x.count) == 3
    assert found.violation == pytest.approx(-0.25, abs=1e-6)


def test_where_there_is_no_derivative_the_pattern_search_climbs():
    target = jnp.asarray([0.3, -0.7, 1.1])

    def peak(x: jax.Array) -> jax.Array:
        return 1e-3 - jnp.sum(jnp.abs(jax.lax.stop_gradient(x) - target))

    options: dict[str, Any] = {"structures": [(3,)], "tolerance": (1e-12, "three subtractions")}
    # Without it: three coordinates within 1e-3 of the target have probability 1e-10 a point.
    assert find(peak, draw_normal, steps=0, **options).violation < -1e-2
    assert find(peak, draw_normal, **options).violation > 2.5e-4


def test_a_kink_is_reached_by_ascent_and_polish():
    def kinked(x: jax.Array) -> jax.Array:
        return -jnp.max(jnp.abs(x - 0.3))

    assert find(kinked, draw_normal, structures=[(3,)]).violation > -1e-5


def test_corners_are_looked_at_first_and_can_be_the_whole_search():
    def at_zero(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == 0), 1.0, -1.0)

    assert find(at_zero, draw_normal, structures=[(3,)]).violation == -1
    with_corner = find(at_zero, draw_normal, structures=[(3,)], corners=[np.zeros(3)])
    assert with_corner.violation == 1
    assert find(at_zero, draw_normal, structures=[], corners=[np.zeros(2)], steps=0).evaluations == 1


# -- legal inputs ---------------------------------------------------------------------------------------------------


def inside(x: jax.Array) -> jax.Array:
    return jnp.all((x > 0.2) & (x < 0.8))


def slope(x: jax.Array, c: Any) -> jax.Array:
    return jnp.sqrt(x[0]) - c


def draw_uniform(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (2,))


def test_no_illegal_input_is_looked_at_climbed_to_or_shown():
    free = find(slope, draw_uniform, constants=(1.01,))
    assert free.violation > 0  # the ascent leaves the unit square
    kept = find(slope, draw_uniform, constants=(1.01,), valid=inside)
    assert np.sqrt(0.8) - 1.01 - 1e-3 < kept.violation < np.sqrt(0.8) - 1.01
    assert inside(kept.x)
    # A violation is simplified within the domain: neither 0 nor 1 is legal.
    wrong = find(
        slope, draw_uniform, constants=(0.6,), valid=inside, corners=[np.array([-1.0, 0.5]), np.array([9.0, 0.5])]
    )
    assert 0 < wrong.violation < np.sqrt(0.8) - 0.6 and inside(wrong.x)


def test_a_domain_that_no_input_meets_is_an_error():
    with pytest.raises(ValueError, match="`valid` is false at every input that was drawn"):
        find(slope, draw_uniform, constants=(1.0,), valid=lambda x: jnp.all(x > 2))


def test_replay_refuses_an_illegal_witness():
    def check(ctx: Any) -> Any:
        return ctx.worst(slope, draw_uniform, constants=(ctx.pick(1.0, wrong=0.6),), valid=inside, ratio=False)

    c = planted.plant(check, "bound")
    assert run(c).verdict == "holds"
    assert replay(c, [0.25, 0.5]) == -0.5
    with pytest.raises(ValueError, match=r"the witness \[0.9, 0.5\] is no legal input: `valid` is false there"):
        replay(c, [0.9, 0.5])


# -- bad values -------------------------------------------------------------------------------------------------------


def test_nan_raises_and_names_the_input():
    def root(x: jax.Array) -> jax.Array:
        return jnp.sqrt(x[0]) - 10

    with pytest.raises(FloatingPointError, match=r"the violation is nan at the input \[-2\.0, 0\.5\]"):
        find(root, lambda key: jax.random.uniform(key, (2,)), corners=[np.array([-2.0, 0.5])])
    with pytest.raises(FloatingPointError, match="the violation is nan at the input"):
        find(root, draw_normal, structures=[(2,)])


def test_a_bound_of_zero_that_is_exceeded_is_not_passed_over():
    def ratio(x: dict[str, jax.Array]) -> jax.Array:
        return x["left"] / x["right"] - 1

    corner = {"left": np.float64(1.0), "right": np.float64(0.0)}
    with pytest.raises(FloatingPointError, match=r"violation is inf at the input \{'left': 1\.0, 'right': 0\.0\}"):
        find(ratio, lambda key: {"left": jnp.zeros(()), "right": jnp.ones(())}, corners=[corner])


def test_minus_infinity_is_an_input_that_satisfies_the_bound():
    def log_ratio(x: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(x[0], 0))

    found = find(log_ratio, lambda key: jax.random.uniform(key, (1,), minval=-1.0), steps=0)
    assert -0.5 < found.violation < 0
    with pytest.raises(FloatingPointError, match="finite at none of the inputs"):
        find(log_ratio, lambda key: -jnp.ones(1), steps=0)


def test_nothing_to_look_at_is_an_error():
    with pytest.raises(ValueError, match="no input to look at"):
        find(steep, draw_normal, structures=[])


# -- reproducibility --------------------------------------------------------------------------------------------------


def test_a_seed_determines_the_search_and_the_order_of_structures_does_not():
    first, second = (find(steep, draw_normal, constants=(1.0,), structures=[(2,), (3,)]) for _ in range(2))
    assert first.violation == second.violation and np.array_equal(first.x, second.x)
    assert first.trace == second.trace

    def looked_at(sizes: list[tuple[int]], seed: int) -> float:
        return find(lambda x: -jnp.sum(x**2), draw_normal, seed, structures=sizes, steps=0).violation

    assert looked_at([(2,), (3,)], 0) == looked_at([(3,), (2,)], 0) != looked_at([(2,), (3,)], 1)


def test_strategies_are_explored_the_same_way_every_time():
    sizes = st.tuples(st.integers(1, 6))
    options: dict[str, Any] = {"structures": sizes, "points": 16, "examples": 8, "steps": 0}
    first, second = (find(lambda x: -jnp.sum(x**2), draw_normal, **options) for _ in range(2))
    assert (first.violation, first.structures, first.evaluations) == (
        second.violation,
        second.structures,
        second.evaluations,
    )


def test_counts_are_what_was_done():
    found = find(steep, draw_normal, constants=(1.0,), structures=[(2,)], points=100, restarts=8, steps=40)
    assert (found.structures, found.restarts) == (1, 8)
    # 100 inputs and 8 ascents of 40 steps; the ascent is counted in twenty strides.
    assert found.evaluations == 100 + 8 * 40
    assert 1 <= found.agreeing <= 8
    assert [n for n, _ in found.trace] == sorted(n for n, _ in found.trace)
    assert [v for _, v in found.trace] == sorted(v for _, v in found.trace)


# -- counterexamples that run -----------------------------------------------------------------------------------------

BOUNDS = """
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pair(NamedTuple):
    a: Any
    b: Any


def draw(key, n):
    a, b = jax.random.normal(key, (2, n))
    return Pair(a, b)


def draw_array(key, n):
    return jax.random.normal(key, (n,))


def violation(x, c):
    return x.a @ x.b / (c * jnp.linalg.norm(x.a) * jnp.linalg.norm(x.b)) - 1


def norms(x, c):
    return jnp.sum(jnp.abs(x)) / (c * jnp.sqrt(x.size) * jnp.linalg.norm(x)) - 1


def paste(x, c):
    return (
        "import numpy as np\\n"
        f"a, b = np.array({x.a.tolist()}), np.array({x.b.tolist()})\\n"
        f"assert a @ b <= {c!r} * np.linalg.norm(a) * np.linalg.norm(b), 'pasted'\\n"
    )


@claim(PAPER, "P1", "s", title="replayed", kind="bound", **WORDS)
def replayed(ctx):
    return ctx.worst(violation, draw, constants=(ctx.pick(1.0, wrong=0.9),), structures=[(3,), (2,)])


@claim(PAPER, "P2", "s", title="pasted", kind="bound", **WORDS)
def pasted(ctx):
    return ctx.worst(violation, draw, constants=(ctx.pick(1.0, wrong=0.9),), structures=[(3,)], paste=paste)


@claim(PAPER, "P3", "s", title="one array", kind="bound", **WORDS)
def one_array(ctx):
    from hypothesis import strategies as st

    return ctx.worst(norms, draw_array, constants=(ctx.pick(1.0, wrong=0.9),), structures=st.tuples(st.integers(2, 4)))


@claim(PAPER, "P4", "s", title="cases", kind="bound", **WORDS)
def cases(ctx):
    return ctx.cases({"easy": 1.0, "hard": ctx.pick(0.1, wrong=-0.2)})
"""


@pytest.mark.parametrize("number", ["P1", "P2", "P3", "P4"])
def test_the_code_of_a_counterexample_runs_by_itself_and_its_assert_fails(number: str, monkeypatch, tmp_path):
    planted.install(monkeypatch, tmp_path, BOUNDS)
    result = run(f"planted:{number}")
    assert result.verdict == "holds", result.reason
    assert result.outcome is not None and result.outcome.counterexample is None
    wrong = result.controls["wrong"].outcome
    assert wrong is not None and wrong.counterexample is not None
    with pytest.raises(AssertionError, match="pasted" if number == "P2" else "violated by 0"):
        exec(compile(wrong.counterexample, "counterexample", "exec"), {})


def test_replay_gives_the_margin_back(monkeypatch, tmp_path):
    module = planted.install(monkeypatch, tmp_path, BOUNDS)
    for number in ("P1", "P3", "P4"):
        result = run(f"planted:{number}")
        for control, outcome in ((None, result.outcome), ("wrong", result.controls["wrong"].outcome)):
            assert outcome is not None
            again = replay(f"planted:{number}", outcome.witness, control=control)
            assert again == pytest.approx(-outcome.margin, abs=1e-15)
    # The input itself is as good as its printed form, and a wrong form is named.
    assert replay("planted:P1", module.Pair(np.array([1.0, 0.0]), np.array([1.0, 1.0]))) == pytest.approx(0.5**0.5 - 1)
    with pytest.raises(ValueError, match="expected a dict with the keys a, b"):
        replay("planted:P1", [1.0, 2.0])
    with pytest.raises(ValueError, match="planted:P1 has no control 'right'; it has wrong"):
        replay("planted:P1", {"a": [1.0], "b": [1.0]}, control="right")
