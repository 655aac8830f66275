"""Every verdict is reached as documented, nothing that went wrong is green, and finished runs are kept."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from paper_checks.harness import environment, report, runner, store
from paper_checks.harness.claim import Claim, Outcome, Verdict, not_checkable
from paper_checks.harness.numerics import DeviceError, enable_x64
from paper_checks.harness.runner import Result, Run, Settings, Store, conclude, replay, run, run_claim, run_item

QUICK = Settings()
NO_GPU = all(d.platform == "cpu" for d in jax.devices())


def margin(ctx: Any) -> Outcome:
    return Outcome(margin=ctx.pick(1.0, wrong=-1.0))


def checked(check: Any, kind: str = "bound", settings: Settings = QUICK, **fields: Any) -> Result:
    return run_claim(planted.plant(check, kind, **fields), settings)


def summary(result: Result) -> tuple[str, bool]:
    return str(result.verdict), result.ok


# -- each verdict -----------------------------------------------------------------------------------------------------


def samples(ctx: Any, shift: float) -> np.ndarray:
    return np.asarray(jax.random.uniform(ctx.key, (ctx.n(400),)) < 0.5 + shift)


def coin(ctx: Any) -> Outcome:
    return ctx.mean(samples(ctx, ctx.pick(0.0, wrong=0.3)), 0.5, low=0, high=1)


def trained(shift: float) -> Any:
    def check(ctx: Any) -> Outcome:
        seeds = np.asarray(jax.random.normal(ctx.key, (8,)))
        return ctx.better(seeds + ctx.pick(shift, wrong=-2.0), seeds + 0.01 * np.arange(8))

    return check


def euler_like(ctx: Any) -> Outcome:
    steps = 2.0 ** -np.arange(3, 9)
    noise = np.exp(0.02 * np.asarray(jax.random.normal(ctx.key, (10, 6))))
    return ctx.order(steps, steps ** ctx.pick(0.5, wrong=1.0) * noise, 0.5)


@pytest.mark.parametrize(
    ("check", "kind", "verdict", "ok"),
    [
        (margin, "bound", "holds", True),
        (lambda ctx: Outcome(margin=ctx.pick(-0.1, wrong=-1.0)), "bound", "refuted", False),
        (lambda ctx: ctx.proved(ctx.pick(0, wrong=1)), "symbolic", "proved", True),
        (coin, "statistical", "consistent", True),
        (euler_like, "rate", "consistent", True),
        (trained(2.0), "trained", "reproduced", True),
        (trained(-1.0), "trained", "not reproduced", False),
        (trained(0.03), "trained", "inconclusive", False),
    ],
    ids=["holds", "refuted", "proved", "consistent", "order", "reproduced", "not reproduced", "inconclusive"],
)
def test_verdicts(check: Any, kind: str, verdict: str, ok: bool):
    result = checked(check, kind)
    assert summary(result) == (verdict, ok), result.reason
    assert result.controls["wrong"].caught
    own = result.runs[0]
    assert (own.role, own.name, own.caught, own.dtype) == ("claim", None, None, "float64")
    assert own.device.startswith("cpu" if NO_GPU else "")
    assert own.seconds > 0


def test_a_statistical_claim_that_is_too_coarse_is_inconclusive():
    result = checked(coin, "statistical", resolution=1e-3)
    assert summary(result) == ("inconclusive", False)
    assert "coarser than the 0.001 asked for" in result.reason
    assert summary(checked(coin, "statistical", resolution=0.5)) == ("consistent", True)


def test_a_claim_that_cannot_be_checked_says_why_and_is_no_failure():
    c = not_checkable(planted.PAPER, "P2", "s", title="t", kind="trained", source="s", reason="its data is not public")
    result = run_claim(c, QUICK)
    assert (*summary(result), result.reason) == ("not checkable", True, "its data is not public")
    with pytest.raises(ValueError, match="planted:P2 is not checkable: its data is not public"):
        replay(c, None)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let the runner find none of the packages, whether or not they are installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else found(name))


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (("genjax",), "needs the package genjax, which is not here"),
        (("hypothesis", "genjax", "pyamg"), "needs the package genjax and the package pyamg, which"),
        pytest.param(
            ("gpu",), "needs a GPU, which is not here", marks=pytest.mark.skipif(not NO_GPU, reason="has one")
        ),
    ],
)
def test_what_is_missing_is_named_and_is_no_failure(
    needs: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
):
    without(monkeypatch, "genjax", "pyamg")
    result = checked(margin, needs=needs)
    assert summary(result) == ("not checkable", True)
    assert reason in result.reason
    assert {r.outcome for r in result.runs} == {None}


def test_a_budget_declared_too_small_is_no_failure():
    result = checked(margin, budget="standard")
    assert (*summary(result), result.reason) == ("inconclusive", True, "needs --budget standard")
    assert summary(checked(margin, budget="standard", settings=Settings("standard"))) == ("holds", True)


# -- what must never be green -----------------------------------------------------------------------------------------


def test_a_check_that_ignores_its_controls_is_an_error():
    result = checked(lambda ctx: Outcome(margin=1.0))
    assert summary(result) == ("error", False)
    assert "control 'wrong'" in result.reason and "never asks ctx.pick for 'wrong'" in result.reason


def test_a_check_that_picks_a_control_that_does_not_exist_is_an_error():
    result = checked(lambda ctx: Outcome(margin=ctx.pick(1.0, wrnog=-1.0)))
    assert summary(result) == ("error", False)
    assert "ctx.pick names ['wrnog']" in result.reason


def test_a_control_that_slips_through_makes_the_claim_inconclusive():
    def blunt(ctx: Any) -> Outcome:
        return Outcome(margin=ctx.pick(1.0, wrong=-1.0, subtle=0.5))

    result = checked(blunt, controls={"wrong": "far off", "subtle": "a little off"})
    assert summary(result) == ("inconclusive", False)
    assert result.reason.startswith("negative control not caught: subtle (holds:")
    assert {name: r.caught for name, r in result.controls.items()} == {"wrong": True, "subtle": False}


@pytest.mark.parametrize(("size", "expected"), [(0.9e-5, "inconclusive"), (1.1e-5, "holds")])
def test_a_tolerance_near_the_violation_of_a_control_is_too_coarse(size: float, expected: str):
    # The control must violate by ten times the tolerance.
    result = checked(lambda ctx: Outcome(margin=ctx.pick(0.0, wrong=-size), tolerance=1e-6))
    assert summary(result) == (expected, expected == "holds")
    if expected == "inconclusive":
        assert "tolerance 1e-06 is not well below the violation 9e-06 of the control 'wrong'" in result.reason


def test_an_exception_is_reported_with_its_place():
    def crash(ctx: Any) -> Outcome:
        raise IndexError(f"no entry {ctx.pick(7, wrong=8)}")

    result = checked(crash)
    assert summary(result) == ("error", False)
    assert result.reason == "IndexError: no entry 7 (seed 0)"
    assert result.runs[0].error is not None and "in crash" in result.runs[0].error


def test_a_crash_of_a_control_alone_is_an_error_too():
    result = checked(lambda ctx: Outcome(margin=1 / ctx.pick(1, wrong=0)))
    assert summary(result) == ("error", False)
    assert result.reason == "ZeroDivisionError: division by zero (control 'wrong', seed 0)"


@pytest.mark.parametrize("stop", [SystemExit(0), SystemExit("enough")], ids=repr)
def test_a_check_that_ends_the_program_is_an_error(stop: SystemExit):
    def leave(ctx: Any) -> Outcome:
        raise stop

    result = checked(leave)
    assert summary(result) == ("error", False)
    assert result.reason.startswith("SystemExit:")


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"n": 2.5}, "Outcome.n is 2.5 (float); expected a whole number"),
        ({"n": -1}, "Outcome.n is -1"),
        ({"n": "many"}, "Outcome.n is 'many' (str); expected a number"),
        ({"witness": (i for i in range(3))}, "Outcome.witness is <generator"),
        ({"witness": {"x": [1, {2, 3}]}}, "Outcome.witness['x'][1] is {2, 3} (set); expected numbers, text"),
        ({"margin": None}, "Outcome.margin is None (NoneType); expected a number"),
        ({"margin": np.zeros(2)}, "Outcome.margin is array([0., 0.]) (ndarray); expected a number"),
        ({"tightness": "tight"}, "Outcome.tightness is 'tight' (str); expected a number"),
        ({"note": 3}, "Outcome.note is 3 (int); expected text"),
        ({"search": [1]}, "Outcome.search is [1] (list); expected None or a dict"),
        ({"search": {"structures": "few"}}, "the outcome does not fit a report: outcome.search.structures"),
        ({"figure": {"title": "t", "lines": [{"x": [1.0], "y": ["high"]}]}}, "outcome.figure.lines[0].y[0]"),
    ],
)
def test_an_odd_field_costs_its_own_claim_only(odd: dict[str, Any], reason: str):
    result = checked(lambda ctx: Outcome(**{"margin": ctx.pick(1.0, wrong=-1.0), **odd}))
    assert summary(result) == ("error", False)
    assert reason in result.reason, result.reason
    report.check(whole(result))


def whole(result: Result) -> dict[str, Any]:
    """A document of one result, as plain data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "load", lambda stem: (planted.PAPER, []))
        made = report.sanitize(runner.document([result], QUICK))
    assert isinstance(made, dict)
    return made


def test_scalars_and_arrays_of_any_library_become_plain():
    def check(ctx: Any) -> Outcome:
        return Outcome(
            margin=jnp.asarray(ctx.pick(1.0, wrong=-1.0)),  # type: ignore[arg-type]
            n=2e4,  # type: ignore[arg-type]
            tightness=np.float32(0.5),  # type: ignore[arg-type]
            our_value=jnp.asarray(3),  # type: ignore[arg-type]
            witness={"x": np.arange(3), "y": (jnp.ones(1), np.int64(4), np.bool_(True))},
            search={"structures": np.int32(2)},
            figure={"title": "t", "lines": [{"x": np.arange(2.0), "y": jnp.arange(2.0)}], "hlines": [], "bars": None},
        )

    result = checked(check)
    assert summary(result) == ("holds", True), result.reason
    o = result.outcome
    assert o is not None
    assert [type(v) for v in (o.margin, o.n, o.tightness, o.our_value)] == [float, int, float, float]
    assert (o.n, o.witness) == (20000, {"x": [0, 1, 2], "y": [[1.0], 4, True]})
    assert json.loads(json.dumps(dataclasses.asdict(o))) == dataclasses.asdict(o)


@pytest.mark.parametrize(("size", "expected"), [(0.9e-9, "inconclusive"), (1.1e-9, "holds")])
def test_a_control_that_violates_by_rounding_noise_is_not_caught(size: float, expected: str):
    result = checked(lambda ctx: Outcome(margin=ctx.pick(0.0, wrong=-size)))
    assert summary(result) == (expected, expected == "holds")
    if expected == "inconclusive":
        assert result.reason.startswith("negative control not caught: wrong (refuted: violated by 9e-10")
        assert "violations below 1e-09 show nothing" in result.reason


def test_nan_inside_a_search_is_reported_with_its_input():
    def check(ctx: Any) -> Outcome:
        return ctx.worst(
            lambda x, c: jnp.sqrt(x - 1) - c,
            lambda key: jax.random.uniform(key),
            constants=(ctx.pick(2.0, wrong=-1.0),),
            corners=[np.float64(0.25)],
        )

    result = checked(check)
    assert summary(result) == ("error", False)
    assert "the violation is nan at the input 0.25" in result.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_is_an_error(value: float):
    result = checked(lambda ctx: Outcome(margin=ctx.pick(value, wrong=-1.0), witness={"x": 3}))
    assert summary(result) == ("error", False)
    assert "not finite" in result.reason
    assert result.outcome is not None and result.outcome.witness == {"x": 3}


@pytest.mark.parametrize("returned", [None, True, 1.0, (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("kind", ["bound", "statistical"])
def test_a_check_that_returns_no_outcome_is_an_error(returned: Any, kind: str):
    result = checked(lambda ctx: (ctx.pick(0, wrong=1), returned)[1], kind)
    assert summary(result) == ("error", False)
    assert f"the check returned {type(returned).__name__}, not an Outcome" in result.reason


# -- recorded as false ------------------------------------------------------------------------------------------------


def erratum(own: float, wrong: float, mended: float) -> Result:
    return checked(
        lambda ctx: Outcome(margin=ctx.pick(own, wrong=wrong, mended=mended)),
        repairs={"mended": "a right constant"},
        expect="refuted",
    )


def test_what_is_recorded_as_false_must_stay_refuted_and_its_repair_accepted():
    good = erratum(-1.0, -2.0, 1.0)
    assert summary(good) == ("refuted", True) and good.reason.startswith("false as printed, as recorded")
    healed = erratum(1.0, -2.0, 1.0)
    assert summary(healed) == ("holds", False) and "recorded as false, but no longer refuted" in healed.reason
    unmended = erratum(-1.0, -2.0, -0.5)
    assert summary(unmended) == ("inconclusive", False)
    assert unmended.reason.startswith("repaired version rejected: mended (refuted")
    assert summary(erratum(-1.0, 0.5, 1.0)) == ("inconclusive", False)


# -- parts of a claim -------------------------------------------------------------------------------------------------


def test_parts_of_a_claim_do_not_make_a_verdict():
    c = planted.plant(margin, "bound")
    own, control = run_claim(c, QUICK).runs
    verdict, ok, reason = conclude(c, [own])
    assert (verdict, ok, reason) == (Verdict.INCONCLUSIVE, True, "holds, but not run: wrong")
    assert conclude(c, [control]) == (Verdict.INCONCLUSIVE, True, "only controls were run")
    assert conclude(c, [dataclasses.replace(control, caught=False)])[:2] == (Verdict.INCONCLUSIVE, False)
    assert conclude(c, [dataclasses.replace(own, verdict=Verdict.REFUTED)])[:2] == (Verdict.INCONCLUSIVE, False)


# -- repetition of statistical refutations ----------------------------------------------------------------------------


def scripted(outcomes: list[dict[str, Any]], kind: str) -> tuple[Run, list[Any]]:
    """A claim whose runs return the outcomes in order, and its keys; outcomes differ in a number that decides nothing."""
    keys: list[Any] = []

    def check(ctx: Any) -> Outcome:
        ctx.pick(0, wrong=1)
        keys.append((data(ctx.key), data(ctx.paper_key)))
        return Outcome(
            **{"margin": -1.0, "resolution": 0.1, "n": 10, "our_value": len(keys), **outcomes[len(keys) - 1]}
        )

    return run_item(planted.plant(check, kind), "claim", None, Settings(suite_alpha=0.01)), keys


@pytest.mark.parametrize(
    ("kind", "outcomes", "verdict"),
    [
        ("statistical", [{"p": 0.02}], "consistent"),
        ("statistical", [{"p": 0.009}, {"p": 0.009}], "refuted"),
        ("statistical", [{"p": 1e-9}, {"p": 0.01}], "consistent"),
        ("statistical", [{"log_e": 4.6}], "consistent"),  # log 100 = 4.605
        ("statistical", [{"log_e": 5.0}, {"log_e": -0.3}], "refuted"),
        ("statistical", [{"log_e": 5.0}, {"log_e": -0.5}], "consistent"),
        ("statistical", [{"p": 1e-9}, {"p": math.nan}], "error"),
        ("statistical", [{"p": 1e-9}, {"p": 0.5, "margin": math.nan}], "error"),
        ("statistical", [{"p": 1e-9}, {"p": 0.5, "undecided": "too few"}], "inconclusive"),
        ("statistical", [{"p": 1e-9}, {"p": 0.5, "resolution": 1.1}], "inconclusive"),
        ("statistical", [{"p": 1e-9}, {"p": 0.5, "resolution": None}], "error"),
        ("statistical", [{"p": 1e-9}, {"log_e": 50.0}], "error"),
        ("statistical", [{"log_e": 50.0}, {"p": 1e-9}], "error"),
        ("statistical", [{"log_e": 50.0}, {"log_e": math.nan}], "error"),
        ("statistical", [{"log_e": 50.0}, {"log_e": 1.0, "undecided": "too few"}], "inconclusive"),
        ("rate", [{}, {"margin": math.nan}], "error"),
        ("rate", [{}, {}], "refuted"),
        ("rate", [{}, {"margin": 0.1}], "consistent"),
        ("rate", [{}, {"undecided": "too noisy"}], "inconclusive"),
        ("bound", [{}], "refuted"),
        ("trained", [{}], "not reproduced"),
    ],
)
def test_a_refutation_by_chance_is_repeated_on_fresh_randomness(kind: str, outcomes: list[Any], verdict: str):
    done, keys = scripted(outcomes, kind)
    assert str(done.verdict) == verdict, done.reason
    # Both streams are fresh: that of the claim and that of the paper.
    assert len(keys) == len({k for k, _ in keys}) == len({k for _, k in keys}) == len(outcomes)


def data(key: Any) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def fixed_sample(ctx: Any) -> Outcome:
    x = np.random.default_rng(0).random(400) < 0.9
    return ctx.mean(x, ctx.pick(0.5, wrong=0.4), low=0, high=1)


def test_evidence_that_ignores_the_keys_is_an_error():
    result = checked(fixed_sample, "statistical")
    assert summary(result) == ("error", False)
    assert "the evidence is the same with 6 fresh keys" in result.reason


def test_evidence_from_the_stream_of_the_paper_is_fresh_too():
    def check(ctx: Any) -> Outcome:
        x = np.asarray(jax.random.uniform(ctx.paper_key, (400,))) < 0.9
        return ctx.mean(x, ctx.pick(0.5, wrong=0.4), low=0, high=1)

    result = checked(check, "statistical")
    assert str(result.verdict) == "refuted", result.reason
    assert "a fresh sample gave" in result.reason


def test_counts_that_coincide_once_are_no_error():
    done, _ = scripted(
        [{"p": 1e-9, "our_value": 7}, {"p": 1e-9, "our_value": 7}, {"p": 1e-9, "our_value": 8}], "statistical"
    )
    assert str(done.verdict) == "refuted", done.reason


def test_evidence_of_both_samples_is_added():
    done, _ = scripted([{"log_e": 5.0}, {"log_e": 7.5}], "statistical")
    assert done.outcome is not None
    assert (done.outcome.log_e, done.outcome.n) == (12.5, 20)


# -- randomness -------------------------------------------------------------------------------------------------------


def drawn(ctx: Any) -> Outcome:
    ctx.pick(0, wrong=1)
    return Outcome(margin=float(jax.random.uniform(ctx.key)), p=0.5, resolution=0.1, witness=ctx.alpha)


def draws(c: Claim, settings: Settings) -> float:
    outcome = run_item(c, "claim", None, settings).outcome
    assert outcome is not None
    return outcome.margin


def test_streams_depend_on_seed_and_claim_only():
    one, two = (planted.plant(drawn, "statistical", number=number) for number in ("P1", "P2"))
    forward = [draws(c, QUICK) for c in (one, two)]
    backward = [draws(c, QUICK) for c in (two, one)]
    assert forward == backward[::-1]
    assert forward[0] != forward[1]
    assert draws(one, Settings(seed=1)) != forward[0]
    # Selection changes the share of the false-alarm budget and nothing else.
    alone, among_four = (run_item(one, "claim", None, Settings(items=n)) for n in (1, 4))
    assert alone.alpha == 4 * among_four.alpha == 1e-3
    assert alone.outcome is not None and among_four.outcome is not None
    assert alone.outcome.witness == 4 * among_four.outcome.witness
    assert alone.outcome.margin == among_four.outcome.margin
    # The control sees the very same randomness, so that only the falsified value differs.
    control = run_item(one, "control", "wrong", QUICK).outcome
    assert control is not None and control.margin == forward[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": "huge"}, "budget is 'huge'; expected one of quick, standard, deep"),
        ({"suite_alpha": 0.0}, "suite_alpha is 0.0; expected a probability strictly between 0 and 1"),
        ({"suite_alpha": 1.0}, "suite_alpha is 1.0"),
        ({"suite_alpha": math.nan}, "suite_alpha is nan"),
        ({"seed": -1}, "seed is -1; expected a non-negative integer"),
    ],
)
def test_settings_refuse(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


# -- numerical environment --------------------------------------------------------------------------------------------


def test_checks_run_in_64_bits_and_leave_everything_as_it_was():
    inside = []

    def check(ctx: Any) -> Outcome:
        inside.append((jnp.asarray(1.0).dtype, jax.config.jax_default_matmul_precision))
        if ctx.control:
            raise RuntimeError(ctx.pick(0, wrong=1))
        return Outcome(margin=1.0)

    with enable_x64(False):
        before = jax.config.jax_default_matmul_precision
        checked(check)
        assert (jnp.asarray(1.0).dtype, jax.config.jax_default_matmul_precision) == (jnp.float32, before)
    assert inside == [(jnp.float64, "highest")] * 2


@pytest.mark.skipif(not NO_GPU, reason="a GPU is here")
def test_a_device_that_is_not_here_is_named():
    with pytest.raises(DeviceError, match="--device gpu: JAX sees no such device here"):
        run(planted.plant(margin, "bound"), device="gpu")


def test_a_machine_without_any_device_is_told_so():
    """As with JAX_PLATFORMS=cuda where there is no GPU: JAX cannot even say what is present."""
    script = (
        "from paper_checks.harness.numerics import DeviceError, find_device\n"
        "for platform in (None, 'cpu', 'gpu'):\n"
        "    try:\n"
        "        find_device(platform)\n"
        "    except DeviceError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "JAX_PLATFORMS": "tpu", "PYTHONPATH": str(Path(runner.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(
        "JAX can start no device at all here, being told to use 'tpu' only" in x for x in lines
    )


# -- results ----------------------------------------------------------------------------------------------------------


def searched(ctx: Any) -> Outcome:
    def slope(x: jax.Array, c: Any) -> jax.Array:
        return jnp.tanh(x[0]) / c - 1

    return ctx.worst(slope, lambda key: jax.random.normal(key, (1,)), constants=(ctx.pick(1.0, wrong=0.5),), steps=20)


def all_kinds_of_results() -> list[Result]:
    return [
        checked(searched),
        checked(coin, "statistical"),
        checked(lambda ctx: Outcome(margin=ctx.pick(math.nan, wrong=-1.0))),
        checked(lambda ctx: None),
        run_claim(
            not_checkable(planted.PAPER, "P1", "s", title="t", kind="bound", source="s", reason="no data"), QUICK
        ),
        erratum(-1.0, -2.0, 1.0),
    ]


def test_records_fit_the_published_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(report.__file__).parent / "report_schema_v1.json").read_text(encoding="utf-8"))
    planted.install(monkeypatch, tmp_path, "")
    for result in all_kinds_of_results():
        made = report.sanitize(runner.document([result], QUICK))
        assert list(jsonschema.Draft202012Validator(schema).iter_errors(made)) == []
        report.check(made)
        entry = made["claims"][0]
        assert (entry["verdict"], entry["ok"]) == summary(result)
        assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_a_run_survives_a_round_trip_through_json():
    for result in all_kinds_of_results():
        for one in result.runs:
            plain = json.loads(json.dumps(report.sanitize(dataclasses.asdict(one))))
            back = runner.run_from(plain)
            assert (back.role, back.name, back.verdict, back.caught) == (one.role, one.name, one.verdict, one.caught)
            assert report.sanitize(dataclasses.asdict(back)) == plain
        restored = Result(
            result.claim, tuple(runner.run_from(report.sanitize(dataclasses.asdict(r))) for r in result.runs)
        )
        assert summary(restored) == summary(result)


def test_a_result_shows_itself(monkeypatch: pytest.MonkeyPatch):
    result = checked(searched)
    shown = result._repr_html_()
    html.parser.HTMLParser().feed(shown)
    assert "planted:P1" in shown and "a planted statement" in shown and "holds" in shown
    assert result.seconds == sum(r.seconds for r in result.runs)
    pytest.importorskip("matplotlib")
    for control in (None, "wrong"):
        drawn_figure = result.figure(control)
        assert drawn_figure is not None and drawn_figure.axes
    assert checked(margin).figure() is None


# -- finished runs are kept -------------------------------------------------------------------------------------------


class Counting:
    """A check that counts its executions and can be interrupted at one of them."""

    def __init__(self, interrupt_at: int | None = None):
        self.runs: list[str | None] = []
        self.interrupt_at = interrupt_at

    def __call__(self, ctx: Any) -> Outcome:
        if len(self.runs) == self.interrupt_at:
            raise KeyboardInterrupt
        self.runs.append(ctx.control)
        return Outcome(margin=ctx.pick(1.0, wrong=-1.0), witness=(1, 2))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_rerun_reuses_what_is_there_only_on_request_and_with_the_same_settings(tmp_path: Path):
    check = Counting()
    c = planted.plant(check, "bound")
    first = run_claim(c, QUICK, Store(tmp_path, QUICK), resume=True)
    assert check.runs == [None, "wrong"]
    assert files(tmp_path) == ["runs/planted/P1--wrong.json", "runs/planted/P1.json"]
    steps: list[int] = []
    again = run_claim(c, QUICK, Store(tmp_path, QUICK), resume=True, step=lambda: steps.append(1))
    assert len(check.runs) == 2 and len(steps) == 2
    assert report.sanitize(again.record()) == report.sanitize(first.record())
    run_claim(c, QUICK, Store(tmp_path, QUICK))
    assert len(check.runs) == 4
    for i, other in enumerate([Settings(seed=1), Settings("standard"), Settings(device="cpu")]):
        assert Store(tmp_path, other).get(c, None) is None, f"settings {i}"


@pytest.mark.parametrize(("kind", "reused"), [("bound", True), ("symbolic", True), ("rate", False), ("trained", False)])
def test_what_else_is_selected_matters_to_claims_with_a_share_of_the_budget_only(
    kind: str, reused: bool, tmp_path: Path
):
    c = planted.plant(margin, kind)
    run_claim(c, QUICK, Store(tmp_path, QUICK))
    for other in (Settings(items=2), Settings(suite_alpha=0.01)):
        kept = Store(tmp_path, other).get(c, None)
        assert (kept is not None) is reused
        assert kept is None or kept.alpha == other.alpha


def test_results_of_other_code_are_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    c = planted.plant(margin, "bound")
    run_claim(c, QUICK, Store(tmp_path, QUICK))
    assert Store(tmp_path, QUICK).get(c, None) is not None
    monkeypatch.setattr(store, "_code", lambda: "other sources")
    assert Store(tmp_path, QUICK).get(c, None) is None


def test_an_interrupted_run_keeps_what_it_finished(tmp_path: Path):
    check = Counting(interrupt_at=1)
    c = planted.plant(check, "bound")
    with pytest.raises(KeyboardInterrupt):
        run_claim(c, QUICK, Store(tmp_path, QUICK))
    assert files(tmp_path) == ["runs/planted/P1.json"]
    check.interrupt_at = None
    result = run_claim(c, QUICK, Store(tmp_path, QUICK), resume=True)
    assert summary(result) == ("holds", True)
    assert check.runs == [None, "wrong"]


def test_errors_and_what_was_skipped_are_tried_again(tmp_path: Path):
    c = planted.plant(margin, "bound", needs=("hypothesis",))
    with pytest.MonkeyPatch.context() as patch:
        without(patch, "hypothesis")
        assert run_claim(c, QUICK, Store(tmp_path, QUICK)).verdict == "not checkable"
    assert summary(run_claim(c, QUICK, Store(tmp_path, QUICK), resume=True)) == ("holds", True)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '"text"', "{}", '{"stamp": 3}', b"\xff\xfe\x00"], ids=repr)
def test_a_damaged_file_is_ignored(tmp_path: Path, content: str | bytes):
    check = Counting()
    c = planted.plant(check, "bound")
    run_claim(c, QUICK, Store(tmp_path, QUICK))
    path = tmp_path / "runs" / "planted" / "P1.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert summary(run_claim(c, QUICK, Store(tmp_path, QUICK), resume=True)) == ("holds", True)
    assert check.runs == [None, "wrong", None]
    assert json.loads(path.read_text())["run"]["verdict"] == "holds"


def test_trouble_while_writing_leaves_the_earlier_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    c = planted.plant(margin, "bound")
    run_claim(c, QUICK, Store(tmp_path, QUICK))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run_claim(c, QUICK, Store(tmp_path, QUICK))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


# -- replay -----------------------------------------------------------------------------------------------------------


def test_replay_of_symbolic_claims_runs_them_anew():
    c = planted.plant(lambda ctx: ctx.proved(ctx.pick(0, wrong=3)), "symbolic")
    assert replay(c, None) == 0
    assert replay(c, None, control="wrong") == 3


def test_replay_of_cases_takes_the_named_one_with_its_budget_and_seed():
    def check(ctx: Any) -> Outcome:
        by = float(jax.random.uniform(ctx.key)) + ctx.n(1)
        return ctx.cases({"easy": 5.0, "hard": ctx.pick(1.0, wrong=-by)})

    c = planted.plant(check, "bound")
    assert replay(c, "easy") == replay(c, {"case": "easy"}, control="wrong") == -5
    with pytest.raises(ValueError, match="the witness is 'hrad'; expected one of the cases easy, hard"):
        replay(c, "hrad")
    far = run_claim(c, Settings("standard", seed=4)).controls["wrong"].outcome
    assert far is not None and far.counterexample is not None
    assert "budget='standard', seed=4" in far.counterexample
    assert (
        replay(c, far.witness, control="wrong", budget="standard", seed=4)
        == -far.margin
        != replay(c, far.witness, control="wrong")
    )


@pytest.mark.parametrize("kind", ["statistical", "trained", "rate"])
def test_the_code_of_a_random_refutation_repeats_it(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source = """
import jax
import numpy as np


@claim(PAPER, "P1", "s", title="t", kind="statistical", resolution=1.0, **WORDS)
def coin(ctx):
    return ctx.mean(jax.random.uniform(ctx.key, (400,)) < ctx.pick(0.5, wrong=0.9), 0.5, low=0, high=1)


@claim(PAPER, "P2", "s", title="t", kind="trained", **WORDS)
def trained(ctx):
    x = np.asarray(jax.random.normal(ctx.key, (2, 8)))
    return ctx.better(x[0] + ctx.pick(9.0, wrong=-9.0), x[1])


@claim(PAPER, "P3", "s", title="t", kind="rate", **WORDS)
def rate(ctx):
    h = 2.0 ** -np.arange(3, 9)
    return ctx.order(h, h ** ctx.pick(0.5, wrong=1.0) * np.exp(0.02 * jax.random.normal(ctx.key, (10, 6))), 0.5)
"""
    planted.install(monkeypatch, tmp_path, source)
    result = run(f"planted:{ {'statistical': 'P1', 'trained': 'P2', 'rate': 'P3'}[kind] }", seed=5)
    assert result.ok, result.reason
    assert result.outcome is not None and result.outcome.counterexample is None
    wrong = result.controls["wrong"].outcome
    assert wrong is not None and wrong.counterexample is not None
    with pytest.raises(AssertionError, match=r"against the claim|violated by"):
        exec(compile(wrong.counterexample, "counterexample", "exec"), {})
