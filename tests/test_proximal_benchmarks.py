"""The scripts around learned proximal networks: their samples, their references, reduced trainings, and that they run."""

import importlib
import io
import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from rich.console import Console

from solvers.proximal import matching as pm
from solvers.proximal import weights
from solvers.proximal.network import constrained

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def script(name):
    return importlib.import_module(name)


# --- samples ---


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_a_lattice_fills_the_cube_evenly(key, dimensions):
    points = np.asarray(script("proximal_priors").lattice(key, 1024, dimensions))
    assert points.shape == (1024, dimensions) and (points > 0).all() and (points < 1).all()
    # A product of functions of mean 1: independent samples would be off by 1/32 times its deviation.
    value = np.prod(1 + np.sin(2 * np.pi * points), 1).mean()
    assert abs(value - 1) < 0.3 * np.sqrt(1.5**dimensions - 1) / 32


def test_pairs_have_the_conditional_distribution_of_laplace(key):
    y, x = (np.asarray(v)[:, 0] for v in script("proximal_priors").laplace_pairs(key, 60_000))
    assert np.isfinite(x).all()
    assert scipy.stats.kstest(y, scipy.stats.uniform(-5, 10).cdf).statistic < 0.01  # a lattice: far below 1/√n
    for centre in (-3.0, -0.5, 0.0, 1.5):
        near = x[np.abs(y - centre) < 0.1]

        def density(v, centre=centre):
            return np.exp(-abs(v) - (v - centre) ** 2 / 2)

        total = scipy.integrate.quad(density, -12, 12, points=[0])[0]
        cdf = np.vectorize(lambda v: scipy.integrate.quad(density, -12, v, points=[0] if v > 0 else None)[0] / total)  # noqa: B023
        grid = np.linspace(-4, 4, 17) + centre / 2
        seen = (near[:, None] <= grid).mean(0)
        # 1200 samples: 4.5 standard errors of a share, and what y ± 0.1 changes in it, at most 0.1 · 0.5 · 0.1
        assert np.abs(seen - cdf(grid)).max() < 4.5 * 0.5 / np.sqrt(len(near)) + 0.005


def brute_force(log_density, y, sigma, gamma, near, half=0.25, n=11):
    """argmax_c of the integral of p(x) exp(-|y - x|²/2σ² - |c - x|²/γ²), on grids, around a point."""
    axis = np.linspace(-6, 6, 121)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log = log_density(x) - ((y - x) ** 2).sum(1) / (2 * sigma**2)
    steps = np.linspace(-half, half, n)
    c = near + np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    values = [np.exp(log - ((x - point) ** 2).sum(1) / gamma**2).sum() for point in c]
    return c[int(np.argmax(values))]


@pytest.mark.parametrize("name", ["rotated Laplace", "three normals", "ring"])
def test_minimisers_in_the_plane_are_the_best_of_a_grid(name):
    prior = script("proximal_priors").planes()[name]

    def log_density(x):
        if name == "rotated Laplace":
            return -np.abs(x @ np.asarray(prior.turn).T).sum(1)
        far = ((x[:, None] - np.asarray(prior.means)) ** 2).sum(-1)
        return np.log(np.exp(-far / (2 * prior.scale**2)).sum(1) + 1e-300)

    for y in ([1.4, -0.6], [-0.7, 1.9]):
        y = np.asarray(y)
        found = np.asarray(prior.matched(jnp.asarray(y[None], jnp.float32)))[0]
        best = brute_force(log_density, y, prior.sigma, prior.gamma, found)
        assert (
            np.abs(best - found).max() <= 0.05 + 1e-6
        )  # the step of the grid: its middle is the answer, or next to it


@pytest.mark.parametrize("name", ["rotated Laplace", "three normals"])
def test_the_prior_in_the_plane_has_the_gradient_of_its_map(name):
    """R_γ(f(y)) changes along y as ⟨y - f(y), df⟩: by differences."""
    prior = script("proximal_priors").planes()[name]
    y = jnp.asarray([[1.4, -0.6], [-0.7, 1.9], [0.4, 1.0]], jnp.float32)
    step = jnp.asarray([0.05, 0.08], jnp.float32)
    change = prior.value(y + step) - prior.value(y - step)
    f = prior.matched(y)
    expected = jnp.sum((y - f) * (prior.matched(y + step) - prior.matched(y - step)), 1)
    np.testing.assert_allclose(change, expected, rtol=0.05, atol=2e-4)


def test_images_to_train_on_are_images(key):
    images = script("proximal_images")
    for draw in (images.Leaves(16), images.Phantoms(16)):
        x = np.asarray(draw(key, 3))
        assert x.shape == (3, 1, 16, 16) and x.min() >= 0 and x.max() <= 1
        assert x.std() > 0.05 and np.abs(x[0] - x[1]).max() > 0.1
    assert images.photographs(16) is None or images.photographs(16).shape[1:] == (1, 16, 16)


# --- what ships ---


def test_shipped_networks_say_how_they_were_made_and_are_proximal():
    names = ["laplace", "digits8x8", "mnist", "laplace_squared", "laplace_absolute"]
    names += [f"laplace_{g}" for g in ("0.5", "0.4", "0.3", "0.2")]
    for name in names:
        network, facts = weights.load(name), weights.facts(name)["facts"]
        assert facts["command"].startswith("python benchmarks/proximal_")
        assert {"seed", "sigma", "schedule", "batch", "final_loss", "data", "range"} <= set(facts)
        assert min(float(w.min()) for w in constrained(network)) >= 0 and 0 < network.alpha < 1
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(network))


def test_the_shipped_laplace_network_is_near_its_exact_minimiser():
    """The table of exact minimisers of the Laplace distribution: f(1) and f(-1) at γ = 0.1, and of the mean and the median."""
    y = jnp.asarray([[1.0], [-1.0]])
    for name, exact in (
        ("laplace", 0.1110),
        ("laplace_squared", 0.5032),
        ("laplace_absolute", 0.4288),
        ("laplace_0.5", 0.3106),
    ):
        f = jax.vmap(weights.load(name))(y)[:, 0]
        np.testing.assert_allclose(f, [exact, -exact], atol=0.03)


@pytest.mark.slow
def test_shipped_digits_denoise():
    digits = script("proximal_digits")
    _, test = digits.digits()
    assert len(test) == 297
    seen = digits.noisy(test, 0.1)
    assert abs(digits.psnr(seen, test).mean() - 20.1) < 0.1
    found = jax.vmap(weights.load("digits8x8"))(jnp.asarray(seen))
    assert digits.psnr(found, test).mean() > 24.7


@pytest.mark.slow
def test_shipped_digits_deblur():
    """With the step that is not certified: a fourth of the evaluations, and the same fixed points."""
    from solvers import imaging

    digits = script("proximal_digits")
    _, test = digits.digits()
    blur = imaging.blur(imaging.gaussian_kernel(3, 0.8, jnp.float32), (1, 8, 8))
    b = digits.noisy(np.asarray(jax.vmap(blur)(jnp.asarray(test))), digits.BLUR_NOISE, 1)
    ran = digits.restore(weights.load("digits8x8"), blur, b, digits.WEIGHT, most=40)
    assert digits.psnr(ran.images, test).mean() > 21.95  # 21.99; three seeds of noise have 22.07 in the mean


# --- trainings, reduced ---


@pytest.mark.slow
def test_digits_are_learned():
    """The training of the shipped network with a fiftieth of its steps."""
    network, info = script("proximal_digits").train(0, steps=64)
    assert info.stopped == "steps" and [r.mean for r in info.regimes[1:]] == [True] * 4
    first = info.losses[:40]
    assert first[-5:].mean() < 0.5 * first[:3].mean()
    assert min(float(w.min()) for w in constrained(network)) >= 0


@pytest.mark.slow
def test_laplace_networks_are_written(tmp_path, monkeypatch):
    priors = script("proximal_priors")
    monkeypatch.setattr(sys, "argv", ["x", "--train", "FOLDER"])
    monkeypatch.setattr(priors, "GAMMAS", (0.1,))
    schedules = {"0.1": (pm.Stage(pm.matching(0.5), 60, 5e-3),)}
    monkeypatch.setattr(priors, "laplace_schedules", lambda share: schedules)
    priors.train_laplace(tmp_path, seed=1, share=0.001, batch=64)
    assert [p.name for p in tmp_path.iterdir()] == ["proximal_laplace.npz"]
    facts = weights.facts(tmp_path / "proximal_laplace.npz")["facts"]
    assert facts["command"] == "python benchmarks/proximal_priors.py --train FOLDER"
    assert facts["distance"]["sup"] > 0 and facts["range"] == [-4.0, 4.0]


# --- evaluations ---


@pytest.mark.slow
def test_digits_are_deblurred_as_by_the_library():
    """The loop of the host and `plug_and_play.admm`, the scaled proximal map included, come to the same images."""
    from solvers import imaging, plug_and_play
    from solvers.proximal import mlp, regularizer

    digits = script("proximal_digits")
    network = mlp(jax.random.key(3), (1, 8, 8), hidden=8, layers=1, beta=2.0, alpha=0.3)
    blur = imaging.blur(imaging.gaussian_kernel(3, 0.8, jnp.float32), (1, 8, 8))
    b = digits.digits()[1][:2]
    ran = digits.restore(network, blur, b, 1.05, 0.5)
    assert (ran.steps < digits.MOST).all() and ran.residual < 1e-3
    for image, measured in zip(ran.images, b, strict=True):
        term = imaging.LeastSquares(blur, jnp.asarray(measured))
        x, info = plug_and_play.admm(
            term, regularizer(network), jnp.asarray(measured), rho=1.05, lam=0.5, tolerance=1e-5
        )
        assert bool(info.converged)
        assert np.abs(np.asarray(x) - image).max() < 5e-3


def test_priors_of_images_are_summed_up():
    mnist = script("proximal_mnist")
    levels = np.arange(5.0)[:, None]
    values = {
        "noise": dict(enumerate(levels * [1, 1, 1, -1] + 1)),
        "blur": dict(enumerate(levels + np.arange(4))),
        "mixing": dict(enumerate(np.stack([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, -1, -1], [1, 1, 1, 1], [0, 0, 0, 0]]))),
    }
    found = mnist.summary(values)
    assert (found["rises with noise"], found["rises with blur"], found["above the chord"]) == (0.75, 1.0, 0.5)
    assert found["growth with noise"] == 3.0
    assert len(mnist.figure(values).axes) == 3


@pytest.mark.slow
def test_images_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    images = script("proximal_images")
    monkeypatch.delenv("PROOFSTONE_DATA", raising=False)
    tasks = images.tasks_of("leaves", (1, 16, 16))
    assert len(tasks) == 4
    first = dict(list(tasks.items())[:1])
    monkeypatch.setattr(images, "tasks_of", lambda name, shape: first | {"again": next(iter(first.values()))})
    images.main(["--images", "leaves", "--smoke", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "proximal_images_leaves.json").read_text())
    assert len(result["restored"]) == 16 and result["size"]["side"] == 16
    certified = {k: v["certified"] for k, v in result["restored"].items()}
    assert any(certified.values()) and not all(certified.values())
    assert all("learned" in k or "variation" in k for k, v in certified.items() if v)
    assert all(v["certified"] for v in result["restored"].values() if v["lam"] != 1)
    sizes = [v["weights"] for v in result["training"].values()]
    assert max(sizes) < 6 * min(sizes)  # as near as the widths of so small a network allow
    found = {(t["images"], t["target"]): t for t in result["targets"]}
    assert len(found) == 5
    lost = found["leaves", "runs of the learned network that diverged, none"]
    assert lost["met"] == (lost["value"] == 0)
    assert weights.load(tmp_path / "proximal_images_leaves.npz").shape == (1, 16, 16)


def test_targets_are_of_the_best_setting_of_each_prior():
    images = script("proximal_images")

    def row(prior, psnr, certified, diverged=0):
        return {
            "images": "a",
            "task": "t",
            "prior": prior,
            "PSNR": psnr,
            "certified": certified,
            "diverged": diverged,
        }

    rows = [
        row("learned proximal", 30.0, False, 2),
        row("learned proximal", 29.0, True),
        row("gradient step", 30.1, False),
    ]
    rows += [row("gradient step", None, False, 9), row("total variation", 28.5, True)]
    found = images.targets(dict(enumerate(rows)), Console(file=io.StringIO()))
    assert [round(t["value"], 6) for t in found] == [-0.1, -1.1, 1.5, 0.5, 2]
    assert [t["met"] for t in found] == [True, False, True, False, False]


def test_networks_to_compare_have_as_many_weights():
    images = script("proximal_images")
    size = images.FULL._replace(side=32)
    sizes = [images.nets.parameters(n) for n in images.networks_of("leaves", size, jax.random.key(0)).values()]
    assert max(sizes) < 1.15 * min(sizes) and sizes[1] == sizes[2]


def test_a_gradient_step_of_a_unet_has_a_gradient_to_learn_by(key):
    images = script("proximal_images")
    size = images.SMOKE._replace(channels=3)
    denoiser = images.networks_of("leaves", size, key)[images.STEP]
    x = jax.random.uniform(key, (2, 3, 16, 16))

    def loss(d):
        return jnp.mean((jax.vmap(d)(x + 0.1) - x) ** 2)

    slopes = jax.tree.leaves(eqx.filter_grad(loss)(denoiser))
    assert max(float(jnp.abs(g).max()) for g in slopes) > 0


def test_leaves_in_colour(key):
    x = np.asarray(script("proximal_images").Leaves(16, 3)(key, 2))
    assert x.shape == (2, 3, 16, 16) and np.abs(x[:, 0] - x[:, 1]).max() > 0.1


def test_data_that_is_absent_is_asked_for(monkeypatch):
    monkeypatch.delenv("PROOFSTONE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="PROOFSTONE_DATA"):
        script("proximal_mnist").images("test", 3)


@pytest.mark.slow
def test_evaluation_of_digits_runs(tmp_path):
    digits = script("proximal_digits")
    console = Console(file=io.StringIO())
    result = digits.evaluate(weights.load("digits8x8"), 0.1, 2, tmp_path, console, seeds=2)
    assert result["images"] == 2 and len(result["denoising"]["learned"]["of each seed"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"proximal_digits.{s}" for s in ("json", "png", "svg")]


@pytest.mark.slow
def test_baselines_are_trained_and_fill_in(tmp_path):
    """Two steps of the denoisers; and total variation on half of the pixels, which stays within what is known."""
    baselines = script("proximal_baselines")
    console = Console(file=io.StringIO())
    networks = baselines.trained(2, 4, tmp_path, console)
    assert set(networks) == {"gradient step", "free"}
    task = baselines.tasks()["half of the pixels"]
    clean = script("proximal_digits").digits()[1][:3]
    b = task.measured(clean, 1)
    known = np.asarray(task.operator.mask)
    assert (
        known.sum() == 32 and (task.start(b)[:, ~known] == 0.5).all() and (task.start(b)[:, known] == b[:, known]).all()
    )
    ran = task.restored(baselines.Denoiser(baselines.CLASSICAL["total variation"](0.04)), b, 0.1, most=400)
    assert ran.converged.all()
    # What is known stays near what was measured, whose noise is 0.05; what is not, lies within the range of its neighbours.
    assert np.abs(ran.images - b)[:, known].max() < 0.2
    assert ran.images.min() > b[:, known].min() - 1e-3 and ran.images.max() < b[:, known].max() + 1e-3


def test_the_best_of_what_is_tried():
    baselines = script("proximal_baselines")
    assert baselines.best(lambda v: -((v - 0.2) ** 2), (0.1, 0.25, 0.5)) == 0.25
    assert baselines.best(lambda v: np.nan if v < 0.2 else -v, (0.1, 0.25, 0.5)) == 0.25
