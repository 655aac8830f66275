"""Losses, schedules and the training loop of proximal networks, and the files of trained ones."""

import dataclasses
import io
import json
import math
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from solvers import array_files
from solvers.proximal import matching as pm
from solvers.proximal import training, weights
from solvers.proximal.network import constrained, convolutional, mlp


class Scaled(eqx.Module):
    """y -> w y + b."""

    w: jax.Array
    b: jax.Array

    def __call__(self, y):
        return self.w * y + self.b


def line(w=0.3, b=0.0):
    return Scaled(jnp.float32(w), jnp.float32(b))


def same(a, b):
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- losses ---


@settings(max_examples=15)  # each shape compiles
@given(st.integers(1, 5), st.lists(st.integers(1, 3), min_size=0, max_size=3), st.floats(0.1, 10))
def test_losses_are_their_formulas(batch, shape, gamma):
    rng = np.random.default_rng([batch, *shape])
    y, x = rng.normal(size=(2, batch, *shape)).astype(np.float32)
    net = line(0.7, 0.1)
    error = np.float64(0.7) * y + 0.1 - x
    distances = [np.linalg.norm(e.ravel()) for e in error]
    expected = np.mean([1 - math.exp(-((t / gamma) ** 2)) for t in distances])
    given_ = net, jnp.asarray(y), jnp.asarray(x)
    np.testing.assert_allclose(pm.matching(gamma)(*given_), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pm.squared(*given_), (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(pm.absolute(*given_), np.abs(error).mean(), rtol=1e-5)


def test_matching_has_a_gradient_at_the_target_and_digits_near_it():
    y = jnp.ones((3, 4))
    loss = pm.matching(1.0)
    slope = jax.grad(lambda net: loss(net, y, y))(line(1.0))
    assert slope.w == 0 and slope.b == 0
    # 1 - exp(-t²/γ²) itself would be rounded to zero: t² = 4e-10
    np.testing.assert_allclose(loss(line(1.0), y, y + 1e-5), 4e-10, rtol=2e-2)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_matching_names_a_bad_width(gamma):
    with pytest.raises(ValueError, match="gamma is"):
        pm.matching(gamma)


# --- schedules ---


def test_the_papers_schedules():
    laplace = pm.paper_laplace()
    assert [s.steps for s in laplace] == [10_000, 10_000, 2000, 2000, 4000, 4000, 4000, 4000, 4000]
    assert [s.loss.gamma for s in laplace[2:]] == [0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    digits = pm.paper_images((1, 28, 28))
    assert sum(s.steps for s in digits) == 40_000
    np.testing.assert_allclose([s.loss.gamma for s in digits[1:]], [17.92, 8.96, 4.48, 2.24])
    colour = pm.paper_images((3, 128, 128))
    np.testing.assert_allclose([s.loss.gamma for s in colour[1:]], [141.9, 70.9, 35.5, 17.7], atol=0.06)
    assert [s.rate for s in digits] == [1e-3, 1e-4, 1e-4, 1e-4, 1e-4]
    with pytest.raises(ValueError, match="steps is 12"):
        pm.paper_images((1, 8, 8), steps=12)


def test_our_schedule_for_images():
    stages = pm.our_images((1, 8, 8), steps=3200)
    assert sum(s.steps for s in stages) == 3200 and [s.steps for s in stages[1:]] == [300] * 4
    np.testing.assert_allclose([s.loss.gamma for s in stages[1:]], [5.12, 2.56, 1.28, 0.64])
    rates = np.concatenate([s.rates(0, s.steps) for s in stages])
    assert rates[0] == 1e-2 and rates[-1] < 1e-6
    with pytest.raises(ValueError, match="steps is 31"):
        pm.our_images((1, 8, 8), steps=31)


def test_annealed_ends_at_rate_zero():
    stages = pm.annealed([0.5, 0.2, 0.1], steps=50, rate=1e-2, each=10, last=40, low=1e-3)
    assert [s.steps for s in stages] == [50, 10, 10, 40]
    assert stages[0].loss is pm.squared and [s.loss.gamma for s in stages[1:]] == [0.5, 0.2, 0.1]
    rates = np.concatenate([s.rates(0, s.steps) for s in stages])
    assert rates[0] == 1e-2 and rates[-1] < 1e-5 and (np.diff(rates) <= 0).all()
    with pytest.raises(ValueError, match="gammas is empty"):
        pm.annealed([], steps=1, rate=1.0, each=1, last=1, low=1.0)


@given(st.integers(1, 200), st.floats(1e-6, 1), st.floats(0, 1e-6))
def test_rates_of_a_stage_do_not_depend_on_where_it_is_cut(steps, start, end):
    for rate in (start, pm.Cosine(start, end)):
        stage = pm.Stage(pm.squared, steps, rate)
        whole, cut = stage.rates(0, steps), steps // 3
        assert np.array_equal(np.concatenate([stage.rates(0, cut), stage.rates(cut, steps)]), whole)
        assert whole[0] == start
        assert (whole <= start * (1 + 1e-14)).all() and (whole >= min(start, end) * (1 - 1e-14)).all()


def test_stages_can_be_written_as_json():
    stages = (*pm.paper_laplace()[1:3], pm.Stage(pm.squared, 3, pm.Cosine(1e-2)))
    assert json.loads(json.dumps([pm.described(s) for s in stages])) == [
        {"loss": "absolute", "steps": 10_000, "rate": 1e-4},
        {"loss": "matching", "gamma": 0.5, "steps": 2000, "rate": 1e-3},
        {"loss": "squared", "steps": 3, "rate": [1e-2, 0.0]},
    ]


# --- diagnostics ---


def test_regimes_of_the_papers_schedules():
    image = pm.regime(2.24, 0.1)
    assert round(image.kappa) == 252 and image.mean
    assert pm.regime(2.24, 0.1, slope=20.0).mean and not pm.regime(2.24, 0.1, slope=50.0).mean
    assert not any(pm.regime(g, 1.0).mean for g in (0.5, 0.4, 0.3, 0.2, 0.1))
    assert pm.regime(0.01, 1.0).share == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="sigma 0"):
        pm.regime(1.0, 0.0)


def test_distances():
    y = jnp.asarray([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = pm.distance(line(1.5), lambda y: y, y)
    np.testing.assert_allclose(found, (1.0, math.sqrt(1.25 / 3), 0.5), rtol=1e-6)


def test_zero_fraction_counts_constrained_weights_only(key):
    network = mlp(key, 2, hidden=4, layers=1)
    assert pm.zero_fraction(network) == 0
    dead = eqx.tree_at(
        lambda n: (n.layers[1].weight, n.layers[0].weight), network, (jnp.zeros((4, 4)), jnp.zeros((4, 2)))
    )
    assert pm.zero_fraction(dead) == 16 / 20
    assert pm.zero_fraction(mlp(key, 2, kept="softplus")) is None
    assert pm.zero_fraction(line()) is None


# --- training ---


def adam(loss_gradient, w, rates, ema=None):
    """Adam on one number, as its authors write it; with the average of the weights."""
    m = v = 0.0
    average = w
    for k, rate in enumerate(rates):
        g = loss_gradient(w, k)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9 ** (k + 1))) / (math.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
        decay = min(ema or 0, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * w
    return w if ema is None else average


@pytest.mark.parametrize("ema", [None, 0.9])
def test_steps_are_those_of_adam_across_stages(x64, ema):
    """y = 2, x = 1: the gradients of the losses in w are known.  The state of Adam goes on where the loss changes."""

    class One(eqx.Module):
        w: jax.Array

        def __call__(self, y):
            return self.w * y

    pair = lambda key, count: (jnp.full((count, 1), 2.0), jnp.ones((count, 1)))  # noqa: E731
    stages = [
        pm.Stage(pm.squared, 7, 0.05),
        pm.Stage(pm.matching(0.8), 9, pm.Cosine(0.05, 0.01)),
        pm.Stage(pm.absolute, 3, 0.01),
    ]

    def gradient(w, k):
        error = 2 * w - 1
        if k < 7:
            return 4 * error
        if k < 16:
            return 4 * error / 0.64 * math.exp(-(error**2) / 0.64)
        return 2 * math.copysign(1, error)

    rates = np.concatenate([np.float32(s.rates(0, s.steps)) for s in stages])
    start = One(jnp.asarray(0.1))
    found, info = training.train(jax.random.key(0), start, pair, stages, sigma=None, batch=3, ema=ema, chunk=4)
    assert (info.steps, info.stopped) == (19, "steps")
    np.testing.assert_allclose(found.w, adam(gradient, 0.1, rates, ema), rtol=1e-6)
    assert info.losses[0] == pytest.approx(0.64)
    assert info.regimes == (None, None, None) and info.zeros is None and info.distance is None


@pytest.mark.parametrize("loss", [pm.squared, pm.absolute, pm.matching(2.0)], ids=["squared", "absolute", "matching"])
def test_of_a_gaussian_all_losses_learn_the_posterior_mean(loss):
    """x ~ N(1, 0.25), σ = 1/2: f(y) = (y + 1)/2, for every loss."""
    draw = lambda key, count: 1 + 0.5 * jax.random.normal(key, (count, 1))  # noqa: E731
    stages = [pm.Stage(loss, 400, pm.Cosine(3e-2))]
    found, _ = training.train(jax.random.key(1), line(), draw, stages, sigma=0.5, batch=512)
    # The sum of 512 x 400 samples with falling weights; deviations seen over ten seeds are below 0.01.
    np.testing.assert_allclose((found.w, found.b), (0.5, 0.5), atol=0.03)


@pytest.mark.slow
def test_a_learned_proximal_stays_one_and_so_does_its_average(key, monkeypatch):
    stages = [pm.Stage(pm.absolute, 30, 3e-2)]
    draw = lambda key, count: jax.random.normal(key, (count, 2))  # noqa: E731
    run = partial(training.train, key, draw=draw, schedule=stages, sigma=1.0, batch=8)
    for ema in (None, 0.95):
        found, info = run(mlp(key, 2, hidden=6, layers=2), ema=ema)
        assert min(float(w.min()) for w in constrained(found)) >= 0
        assert info.zeros == pm.zero_fraction(found)
    free, info = run(mlp(key, 2, hidden=6, layers=2, kept="softplus"))
    assert info.zeros is None and min(float(w.min()) for w in constrained(free)) < 0  # of what is stored
    # Without the projection the same steps leave the class.
    monkeypatch.setattr(training, "projected", lambda network: network)
    outside, _ = run(mlp(key, 2, hidden=5, layers=2))
    assert min(float(w.min()) for w in constrained(outside)) < 0


def test_an_epoch_takes_every_row_once_with_new_noise():
    rows = jnp.arange(10.0)[:, None]

    def loss(network, y, x):
        return x.mean() + 0 * network.w

    def noise(network, y, x):
        return (y - x).mean() + 0 * network.w

    run = partial(training.train, jax.random.key(3), line(), rows, sigma=0.5, batch=1, chunk=7)
    _, info = run([pm.Stage(loss, 25, 0.0)])
    epochs = info.losses[:20].astype(int).reshape(2, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()
    _, info = run([pm.Stage(noise, 400, 0.0)])
    assert len(set(info.losses)) == 400
    # 400 numbers N(0, 1/4): the mean is within 4.5 standard errors, the deviation within 4.5/√800 of itself, but for one in 1e5
    assert abs(info.losses.mean()) < 4.5 * 0.5 / 20
    assert abs(info.losses.std() / 0.5 - 1) < 4.5 / math.sqrt(800)


def test_another_width_is_no_other_program(key):
    draw = lambda key, count: jax.random.normal(key, (count, 1))  # noqa: E731
    before = training._step._cached._cache_size() if hasattr(training._step, "_cached") else None
    stages = [pm.Stage(pm.matching(g), 2, 10.0**-k) for k, g in enumerate((3.0, 2.0, 1.0), 2)]
    training.train(key, line(), draw, stages, sigma=0.7, batch=4)
    if before is not None:
        assert training._step._cached._cache_size() == before + 1


class Interrupt(Exception):
    pass


def test_a_resumed_run_is_bit_identical(key, tmp_path):
    network = mlp(key, 3, hidden=5, layers=1)
    rows = jax.random.normal(jax.random.key(2), (20, 3))
    stages = [pm.Stage(pm.squared, 7, 1e-2), pm.Stage(pm.matching(2.0), 10, pm.Cosine(1e-2))]
    run = partial(training.train, jax.random.key(5), network, rows, stages, sigma=0.3, batch=6, ema=0.8, chunk=4)
    whole, info = run()
    path = tmp_path / "run.npz"

    def interrupt(step, loss, network):
        if step == 11:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(checkpoint=path, callback=interrupt)
    steps = []
    resumed, again = run(checkpoint=path, callback=lambda step, loss, network: steps.append(step))
    assert steps == [15, 17]
    assert same(whole, resumed)
    assert again.losses.tolist() == info.losses.tolist()
    finished, third = run(checkpoint=path)
    assert same(whole, finished) and third.steps == 17
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    for change, name in (
        ({"key": jax.random.key(6)}, "key"),
        ({"batch": 5}, "batch"),
        ({"sigma": 0.4}, "sigma and average"),
        ({"ema": 0.9}, "sigma and average"),
        ({"schedule": stages[:1]}, "schedule"),
        ({"schedule": [stages[0], pm.Stage(pm.matching(1.9), 10, pm.Cosine(1e-2))]}, "schedule"),
        ({"draw": -rows}, "data"),
        ({"network": mlp(jax.random.key(7), 3, hidden=5, layers=1)}, "start"),
    ):
        given = {"key": jax.random.key(5), "network": network, "draw": rows, "schedule": stages} | change
        with pytest.raises(ValueError, match=f"another .*{name}"):
            training.train(
                given.pop("key"), given.pop("network"), given.pop("draw"), given.pop("schedule"), checkpoint=path,
                **(run.keywords | given),
            )  # fmt: skip
    with pytest.raises(ValueError, match="existing folder"):
        run(checkpoint=tmp_path / "absent" / "run.npz")


def test_a_step_that_is_not_finite_stops():
    rows = jnp.ones((12, 2)).at[7].set(jnp.nan)
    stages = [pm.Stage(pm.squared, 24, 1e-2)]
    settings = {"sigma": 0.1, "batch": 1, "chunk": 5}
    with pytest.warns(RuntimeWarning, match=r"not finite at step \d+, counted from 0"):
        found, info = training.train(jax.random.key(4), line(), rows, stages, **settings)
    assert info.stopped == "not finite"
    assert info.steps == len(info.losses) < 12
    assert np.isfinite(info.losses).all() and np.isfinite(found.w)
    kept, _ = training.train(
        jax.random.key(4), line(), jnp.ones((12, 2)), [pm.Stage(pm.squared, info.steps, 1e-2)], **settings
    )
    assert same(found, kept)


def test_callback_and_progress(key):
    draw = lambda key, count: jax.random.normal(key, (count, 1))  # noqa: E731
    stages = [pm.Stage(pm.squared, 4, 1e-2), pm.Stage(pm.absolute, 5, 1e-2)]
    seen = []
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    found, info = training.train(
        key,
        line(),
        draw,
        stages,
        sigma=1.0,
        batch=2,
        chunk=3,
        progress=console,
        callback=lambda *now: seen.append(now) or now[0] == 7,
    )
    assert (info.steps, info.stopped) == (7, "callback")
    assert [step for step, _, _ in seen] == [3, 4, 7]  # a chunk ends with its stage
    assert same(seen[-1][2], found)
    assert "7/9" in console.export_text()


def test_a_prior_is_the_yardstick(key):
    """A stand-in whose estimators say which one was asked."""
    prior = SimpleNamespace(
        mean=lambda y, sigma: y + 1, median=lambda y, sigma: y + 2, matched=lambda y, sigma, gamma: y + gamma + sigma
    )
    for loss, offset in ((pm.squared, 1), (pm.absolute, 2), (pm.matching(3.0), 3.5)):
        target = pm.minimiser(prior, loss, 0.5)
        np.testing.assert_allclose(target(jnp.zeros((2, 1))), offset)
    with pytest.raises(ValueError, match="expected squared, absolute or matching"):
        pm.minimiser(prior, lambda network, y, x: y, 0.5)
    with pytest.raises(ValueError, match="expected squared, absolute or matching"):
        pm.minimiser(prior, Weighted(jnp.ones(2)), 0.5)


class Weighted(eqx.Module):
    """A loss with arrays, which has no hash."""

    weights: jax.Array

    def __call__(self, network, y, x):
        return jnp.mean(self.weights * (jax.vmap(network)(y) - x) ** 2)


def test_a_loss_without_a_yardstick_is_refused_before_the_training(key, no_shape_checks):
    prior = SimpleNamespace(
        mean=lambda y, sigma: y, median=lambda y, sigma: y, matched=lambda y, sigma, gamma: pytest.fail("not asked yet")
    )
    steps, unknown = [], pm.Stage(Weighted(jnp.ones(1)), 3, 1e-3)
    given = {"sigma": 1.0, "batch": 2, "callback": lambda step, loss, network: steps.append(step)}

    def run(schedule, prior):
        return training.train(key, line(), jnp.ones((12, 1)), schedule, prior=prior, **given)[1]

    with pytest.raises(ValueError, match=r"train: the last stage has the loss Weighted.*; or give no prior"):
        run([pm.Stage(pm.squared, 3, 1e-3), unknown], prior)
    with pytest.raises(ValueError, match="train: prior is of type SimpleNamespace, expected a distribution"):
        run([pm.Stage(pm.squared, 3, 1e-3)], SimpleNamespace(mean=prior.mean))
    assert not steps
    assert run([unknown, pm.Stage(pm.squared, 3, 1e-3)], prior).distance is not None
    assert run([unknown], None).distance is None and steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": []}, "schedule is empty"),
        ({"schedule": [pm.Stage(pm.squared, 3, -1.0)]}, r"stage 0 has 3 steps at -1.0"),
        ({"schedule": [pm.Stage(pm.squared, -3, 1.0)]}, r"stage 0 has -3 steps"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 13}, "12 rows and batch is 13"),
        ({"chunk": 0}, "chunk 0"),
        ({"sigma": None}, "sigma is None and draw gives one array"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
    ],
)
def test_training_names_bad_input(key, change, message):
    given = {"schedule": [pm.Stage(pm.squared, 3, 1e-3)], "sigma": 1.0, "batch": 2} | change
    with pytest.raises(ValueError, match=message):
        training.train(key, line(), jnp.ones((12, 1)), **given)


# --- files ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        partial(mlp, shape=3, hidden=5, layers=2, alpha=0.1),
        partial(mlp, shape=(2, 2), hidden=3, kept="softplus"),
        partial(convolutional, shape=(1, 6, 6), hidden=3, last=4),
        partial(convolutional, shape=(2, 8, 8), hidden=3, last=4, head="convolution", beta=100.0),
    ],
)
def test_a_file_gives_back_the_network(key, tmp_path, make):
    network, path = dataclasses.replace(make(key), box=(0.0, 1.0)), tmp_path / "n.npz"
    weights.save(path, network, command="c", seed=3, range=[0, 1])
    again = weights.load(path)
    assert same(network, again)
    assert jax.tree.structure(network) == jax.tree.structure(again)
    assert weights.facts(str(path))["facts"] == {"command": "c", "seed": 3, "range": [0, 1]}
    y = jax.random.normal(key, network.shape)
    assert (network(y) == again(y)).all()


def test_a_file_keeps_the_range_of_the_training_signals(key, tmp_path):
    network, path = mlp(key, 2, hidden=3, layers=1), tmp_path / "n.npz"
    weights.save(path, network)
    assert weights.load(path).box is None and "range" not in weights.facts(path)["facts"]
    weights.save(path, network, range=[-1, 2])
    again = weights.load(path)
    assert again.box == (-1.0, 2.0)
    weights.save(path, again)  # without a word of it
    assert weights.load(path).box == (-1.0, 2.0)
    for wrong in ([0, 0], [0, 1, 2], "0 to 1", 3):
        with pytest.raises(ValueError, match=r"save: range is .*, expected \[least, largest\]"):
            weights.save(path, network, range=wrong)
    header, arrays = array_files.read(path, "test", "proximal network")
    leaves = [arrays[f"leaf_{i}"] for i in range(len(arrays))]
    array_files.write(path, header | {"facts": {"range": [1, 0]}}, leaves)
    with pytest.raises(ValueError, match=r"n\.npz has another range of signals than two numbers: \[1, 0\]"):
        weights.load(path)


def test_files_that_are_none_are_refused(key, tmp_path):
    path = tmp_path / "n.npz"
    weights.save(path, mlp(key, 2, hidden=3, layers=1))
    header, arrays = array_files.read(path, "test", "proximal network")
    leaves = [arrays[f"leaf_{i}"] for i in range(len(arrays))]
    for change in ({"output": 7}, {"layers": [{}]}, {"dtype": "none"}):
        array_files.write(path, header | {"proximal network": header["proximal network"] | change}, leaves)
        with pytest.raises(ValueError, match=r"n\.npz"):
            weights.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a file of load"):
        weights.load(path)
    with pytest.raises(ValueError, match="no network is called 'cats'; there are"):
        weights.load("cats")
