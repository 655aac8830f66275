"""The benchmarks of `vi`: their data, their references, and that each runs from end to end.

Where draws are compared with an exact value the bound is 5 standard errors: below 1e-6 for each figure by chance.
"""

import importlib
import io
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.integrate
import scipy.ndimage
import scipy.stats
from rich.console import Console

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIGMAS = 5.0


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """A script imports its neighbours by their own names, as Python does for a script that is run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def module(name: str):
    return importlib.import_module(name)


@pytest.fixture
def quick_compilation():
    """Without most optimisations, for a test that compiles much and computes little; others here compute more."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# ---- canvases ----------------------------------------------------------------------------------------------------------


def digits(n: int = 7, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.9, (n, side, side))


def test_resize_keeps_the_mean_and_changes_nothing_at_the_same_size():
    resize, images = module("air_data").resize, digits()
    np.testing.assert_allclose(resize(images, 8), images, atol=1e-12)
    for side in (3, 4, 11):
        # A pixel is the mean of the area it covers, so that the mean over all of them is that of the image.
        np.testing.assert_allclose(resize(images, side).mean((1, 2)), images.mean((1, 2)), atol=1e-12)
    np.testing.assert_allclose(resize(images, 4), images.reshape(-1, 4, 2, 4, 2).mean((2, 4)), atol=1e-12)


def test_canvases_hold_as_many_digits_as_they_say():
    constant = np.full((1, 4, 4), 0.6)  # two of these overlap in no pixel, or the canvas would exceed 1
    made = module("air_data").compose(constant, np.random.default_rng(1), 600, size=12, digit_sizes=(3, 4), most=2)
    assert made.images.shape == (600, 12, 12) and made.images.max() <= 1
    counts = made.counts
    assert set(counts) == {0, 1, 2} and scipy.stats.chisquare(np.bincount(counts)).pvalue > 1e-6
    pixels = (made.images > 0).sum((1, 2))
    possible = {k: {sum(c) for c in itertools.combinations_with_replacement((9, 16), k)} for k in range(3)}
    assert all(pixels[i] in possible[int(counts[i])] for i in range(600))
    assert {int(p) for p in pixels} == set.union(*possible.values())


def test_a_digit_larger_than_its_canvas_is_refused():
    with pytest.raises(ValueError, match=r"digit_sizes is \(3, 9\)"):
        module("air_data").compose(digits(), np.random.default_rng(0), 3, size=8, digit_sizes=(3, 9))


# ---- attend, infer, repeat ---------------------------------------------------------------------------------------------


def test_the_identity_transform_changes_nothing():
    air, image = module("air_model"), jnp.asarray(digits(1)[0])
    still = jnp.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(air.paste(image, still, 8), image, atol=1e-6)
    np.testing.assert_allclose(air.glimpse(image, still, 8), image, atol=1e-6)


def test_a_glimpse_undoes_the_pasting():
    air, window = module("air_model"), jnp.asarray(digits(1, 6)[0])
    # Scale 2 makes the window half the canvas's side, and shifts by thirds put its 6 pixels exactly on pixels of the 12.
    where = jnp.array([2.0, 1 / 3, -2 / 3])
    canvas = air.paste(window, where, 12)
    np.testing.assert_allclose(air.glimpse(canvas, where, 6), window, atol=1e-5)
    # The window is at u = (±1 - shift)/scale: its centre is 1/6 to the left and 1/3 below, that is 1 and 2 pixels.
    np.testing.assert_allclose(canvas[5:11, 2:8], window, atol=1e-5)
    assert int((canvas > 1e-5).sum()) == 36


def test_pasting_agrees_with_scipys_interpolation():
    air, window, size = module("air_model"), digits(1, 6)[0], 11
    s, x, y = 1.7, 0.31, -0.23
    u = (2 * np.arange(size) + 1) / size - 1
    rows, columns = (((s * u + shift + 1) * 6 - 1) / 2 for shift in (y, x))
    expected = scipy.ndimage.map_coordinates(
        window, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="grid-constant"
    )
    np.testing.assert_allclose(air.paste(jnp.asarray(window), jnp.array([s, x, y]), size), expected, atol=1e-5)


def tiny():
    return module("air_model").QUICK._replace(
        canvas=6, window=3, what=2, hidden=4, layer=4, pres=(0.3, 0.2), pres_bias=0.3, noise=1.0
    )


@pytest.mark.slow
def test_the_programs_gradient_is_that_of_the_sum_by_hand(key, monkeypatch):
    air = module("air_model")
    monkeypatch.setitem(air.METHODS, "mixed", ("mvd", "enum"))
    setting = tiny()
    params = air.init(setting, jax.random.key(0))
    image = jnp.asarray(digits(1, 6)[0], jnp.float32)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.unflatten(structure, [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])

    def draws(name):
        value = air.objective(setting, name)

        def one(key):
            y, g = jax.value_and_grad(lambda p: value(key, p, image))(params)
            bias = g[1].predict.bias[0]  # the logit of z_pres
            return jnp.stack([y, bias, sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g, direction)))])

        # Little to run and much to compile: without LLVM's costly passes it takes a fraction of the time.
        keys, options = jax.random.split(key, 2000), {"xla_llvm_disable_expensive_passes": True}
        run = jax.jit(jax.vmap(one)).lower(keys).compile(compiler_options=options)
        return np.asarray(run(keys), np.float64)

    expected, found = draws("hand"), draws("mixed")
    error = np.sqrt((found.var(0) + expected.var(0)) / len(found))
    assert np.all(np.abs(found.mean(0) - expected.mean(0)) < SIGMAS * error)
    assert abs(expected.mean(0)[1]) > SIGMAS * error[1]  # or the test would pass without a gradient


def test_an_unknown_method_is_named():
    air = module("air_model")
    with pytest.raises(ValueError, match="method is 'iw3-mvd'"):
        air.objective(air.QUICK, "iw3-mvd")


@pytest.mark.slow
def test_air_runs_from_end_to_end(tmp_path, monkeypatch, quick_compilation):
    monkeypatch.delenv("PROOFSTONE_DATA", raising=False)  # reading MNIST takes seconds
    monkeypatch.setattr(module("vi_air"), "QUICK", tiny()._replace(digit_sizes=(3, 4)))
    module("vi_air").main(["--quick", "--methods", "mvd", "--seeds", "0", "--steps", "4", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "vi_air.json").read_text())
    (run,) = result["runs"]
    assert (run["method"], run["seed"], [point["step"] for point in run["curve"]]) == ("mvd", 0, [2, 4])
    assert {p.name for p in tmp_path.iterdir()} == {"vi_air.json", "vi_air.png", "vi_air.svg"}
    assert np.isfinite([point[q] for point in run["curve"] for q in ("loss", "elbo")]).all()


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it: a job in the background is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """Ends a run where it is raised, with the files as they are, as SIGKILL does."""


def test_a_run_that_was_killed_and_interrupted_ends_as_an_undisturbed_one(tmp_path, interruptible, quick_compilation):
    air = module("vi_air")
    setting = tiny()._replace(steps=10, batch=4)
    images = jnp.asarray(np.random.default_rng(0).integers(256, size=(10, 6, 6)), jnp.uint8)
    data = air.Data(images, images, jnp.zeros(10, jnp.int32), "noise")
    loss, optimizer = air.loss_of(setting, "hand"), optax.adam(1e-2)

    def run(folder, event=None, number=0):
        """Judged every 2 steps; the event comes when it is about to be judged for this time, the step being saved."""
        calls = itertools.count(1)

        def judged(params, key):
            if next(calls) == number:
                event()
            return jax.random.uniform(key, (7,)) < 0.5, sum(x.sum() for x in jax.tree.leaves(params))

        return air.train(setting, "hand", loss, optimizer, 0, data, judged, 2, tmp_path / folder, Console(quiet=True))

    def kill():
        raise Killed

    whole, expected = run("whole")
    with pytest.raises(Killed):
        run("part", kill, 2)  # step 4 is saved and not judged
    with pytest.raises(SystemExit, match="interrupted after 8 of 10"):
        run("part", lambda: os.kill(os.getpid(), signal.SIGINT), 2)  # at step 6, which is held back for a chunk
    continued, found = run("part")

    def figures(curve):
        return [[point[name] for name in ("step", "loss", "elbo", "accuracy")] for point in curve]

    assert [point["step"] for point in continued] == [2, 4, 6, 8, 10]
    assert figures(continued) == figures(whole)  # to the bit
    assert [point["first"] for point in continued] == [True, True, False, False, True]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))


def test_the_times_of_a_run_leave_out_compilation_wherever_it_was_done():
    point = {"loss": 0.0, "elbo": 0.0}
    rows = [(9.0, True, 0.2), (2.0, False, 0.5), (7.0, True, 0.9), (2.2, False, 0.95), (1.8, False, 0.97)]
    curve = [
        point | {"step": 10 * n, "chunk_seconds": seconds, "first": first, "accuracy": accuracy}
        for n, (seconds, first, accuracy) in enumerate(rows, 1)
    ]
    right, counts = jnp.array([True, False, True, True]), jnp.array([0, 0, 1, 2])
    found = module("vi_air").summary("mvd", 0, curve, right, counts)
    assert [p["seconds"] for p in found["curve"]] == pytest.approx([2.0, 4.0, 6.0, 8.2, 10.0])
    assert (found["step_seconds"], found["compile_seconds"]) == pytest.approx((0.2, 7.0))
    assert found["seconds_to_target"] == pytest.approx(6.0)
    assert (found["accuracy"], found["by_count"]) == (0.75, [0.5, 1.0, 1.0])


# ---- noisy cone --------------------------------------------------------------------------------------------------------


def test_the_evidence_of_the_cone():
    expected, _ = scipy.integrate.quad(
        lambda r: scipy.stats.expon.pdf(r, scale=200) * scipy.stats.norm.pdf(5, r, 0.1 + r / 100),
        0,
        20,
        points=[4, 5, 6],
    )
    assert module("vi_cone").log_evidence() == pytest.approx(np.log(expected), abs=1e-9)


@pytest.mark.parametrize(("name", "optimum"), [("elbo", -8.07454), ("hvi", -9.74814)])
def test_the_exact_optima_of_the_cone(name, optimum, x64):
    cone = module("vi_cone")
    found = cone.reference(name, 8)
    assert found["value"] == pytest.approx(optimum, abs=1e-5)  # the digits given
    assert found["value"] < cone.log_evidence()
    value, error = cone.average(name, np.array(found["params"]), 10)
    assert abs(value - found["value"]) < SIGMAS * error + 1e-9


@pytest.mark.parametrize("name", ["elbo", "iwelbo", "hvi", "iwhvi", "diwhvi"])
def test_the_cones_objectives_are_what_the_references_say(name, x64, key):
    cone = module("vi_cone")
    params = np.array([-1.0, -0.7]) if cone.PARTICLES[name].angles else np.array([1.9, 0.3, -1.0, -0.5])
    expected, error = cone.average(name, params, 10)
    objective = cone.programmed(name)
    keys = jax.random.split(key, 20_000)
    values = np.asarray(jax.jit(jax.vmap(lambda k: objective(k, None, jnp.asarray(params))))(keys))
    assert abs(values.mean() - expected) < SIGMAS * np.hypot(error, values.std() / len(values) ** 0.5)


def test_the_cone_runs_from_end_to_end(x64):
    cone = module("vi_cone")
    params, _ = cone.train("hvi", 3, 0)
    assert np.all(params != cone.START["hvi"])
    best = {"value": -9.748, "standard_error": 0.0}
    row = {"name": "hvi", "optimum": best, "params": params.tolist(), "value": -9.9, "standard_error": 0.004}
    row |= {"same_without_vi": (-9.9, 0.01), "seconds": 1.0, "passed": False}
    result = {"rows": [row], "log_evidence": -5.32, "steps": 3}
    assert "FAIL" in text(cone.show(result))
    assert len(cone.figure(result, draws=10).axes) == 1


# ---- overhead ----------------------------------------------------------------------------------------------------------


def text(*tables) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(*tables)
    return console.export_text()


def test_the_exact_gradient_of_the_coupled_choices(x64):
    a, w = jnp.array([-0.7, 0.4, 1.1]), jnp.array([1.0, -2.0, 0.5])

    def loss(a):
        bits = jnp.array(list(itertools.product((0.0, 1.0), repeat=3)))
        return (jnp.exp(dist.Bernoulli(jax.nn.sigmoid(a)).log_prob(bits).sum(1)) * (bits @ w) ** 2).sum()

    found = module("vi_overhead").exact_gradient(np.asarray(a), np.asarray(w))
    np.testing.assert_allclose(found, jax.grad(loss)(a), rtol=1e-12)


def test_the_elbo_by_hand_is_the_one_of_the_distributions(key):
    vae = module("vae_programs")
    decoder, encoder = vae.init(key)
    x = jax.random.uniform(key, (3, vae.PIXELS))
    noise = jax.random.normal(key, (3, vae.LATENT))
    loc, scale = vae.encode(encoder, x)
    z = loc + scale * noise
    pixels = dist.Bernoulli(logits=vae.dense(decoder, z), validate_args=False)  # grey ones are no error here
    log_p = dist.Normal(0, 1).log_prob(z).sum(1) + pixels.log_prob(x).sum(1)
    expected = log_p - dist.Normal(loc, scale).log_prob(z).sum(1)
    np.testing.assert_allclose(vae.elbo_by_hand(decoder, encoder, x, noise), expected, rtol=1e-5)  # float32 sums of 784


@pytest.mark.parametrize(
    ("analysis", "expected"), [([{"flops": 3.0}], 3.0), ({"flops": 4.0}, 4.0), ([], None), (None, None)]
)
def test_flops_in_the_forms_that_jax_has_had(analysis, expected):
    class Program:
        def cost_analysis(self):
            return analysis

    assert module("measure").flops(Program()) == expected


def test_the_interval_of_a_median():
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    middle, low, high = module("measure").median_interval(values)
    assert middle == np.median(values) and low < middle < high
    assert high - low == pytest.approx(
        2 * 1.96 * 1.2533 / 20, rel=0.5
    )  # normal theory: s.d. of a median is 1.2533 σ/√n


@pytest.mark.slow
def test_overhead_runs_from_end_to_end(tmp_path, quick_compilation):
    overhead, console = module("vi_overhead"), Console(quiet=True)
    result = {
        "vae": overhead.measure_vae([2], 2, 1, 200, console, ("hand", "vi")),
        "sites": overhead.measure_sites(
            [("straight", "mvd", 2), ("branches", "enum", 2), ("loop", "reinforce", 2)], 2, 1, 500, console
        ),
    }
    for row in result["sites"]:
        # The second term is for enumeration, exact but for rounding.
        assert row["error"] <= SIGMAS * row["standard_error"] + 1e-5
    # The noise of 200 draws leaves 0.98; a gradient without the entropy term, say, points elsewhere.
    assert all(found["cosine"] > 0.9 for found in result["vae"]["cosine"].values())
    shown = text(*overhead.show(result))
    assert "branches" in shown
    module("measure").write_result(tmp_path / "x.json", result, overhead.figure(result))
    assert json.loads((tmp_path / "x.json").read_text())["vae"]["rows"][0]["program"] == "hand"
