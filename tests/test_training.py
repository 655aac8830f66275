"""Minibatch SGD: steps by hand, clipping, sweeps, stopping, and resuming bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory import training

pytestmark = pytest.mark.usefixtures("x64")


def linear(params, x):
    return params["w"] @ x + params["b"]


def problem(seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 3))
    return {"w": jnp.asarray(rng.standard_normal(3)), "b": jnp.asarray(0.3)}, x, x @ np.array([1.0, -2.0, 0.5])


def by_hand(params, x, y, rate, batches, clip=np.inf):
    w, b = np.asarray(params["w"]), float(params["b"])
    for index in batches:
        e = x[index] @ w + b - y[index]
        gw, gb = x[index].T @ e / len(index), e.mean()
        factor = rate * min(1.0, clip / np.sqrt((gw**2).sum() + gb**2))
        w, b = w - factor * gw, b - factor * gb
    return w, b


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_by_hand(key, batch, clip):
    params, x, y = problem()
    found = training.run_steps(linear, params, x, y, key, 0.05, steps=40, batch=batch, clip=clip)
    drawn = jax.random.randint(key, (40, batch or 1), 0, 12)
    batches = np.asarray(drawn) if batch else [np.arange(12)] * 40
    w, b = by_hand(params, x, y, 0.05, batches, np.inf if clip is None else clip)
    np.testing.assert_allclose(found["w"], w, rtol=1e-12)
    np.testing.assert_allclose(found["b"], b, rtol=1e-12)


def test_train_reports_what_happened(key):
    params, x, y = problem()
    found, info = training.train(linear, params, x, y, key=key, learning_rate=0.1, steps=250, batch=None, chunk=100)
    w, b = by_hand(params, x, y, 0.1, [np.arange(12)] * 250)
    np.testing.assert_allclose(found["w"], w, rtol=1e-9)
    assert info.steps == 250
    assert info.stopped == "steps"
    assert info.risk_steps.tolist() == [0, 100, 200, 250]
    assert info.risks[0] == pytest.approx(((x @ params["w"] + params["b"] - y) ** 2).mean() / 2)
    assert info.risks[-1] == pytest.approx(((x @ w + b - y) ** 2).mean() / 2, rel=1e-6)


def test_early_stop_callback_and_divergence(key):
    params, x, y = problem()
    common = {"key": key, "steps": 2000, "chunk": 50}
    _, low = training.train(linear, params, x, y, learning_rate=0.1, stop_risk=1e-6, **common)
    assert low.stopped == "risk_below"
    assert low.risks[-1] < 1e-6 <= low.risks[-2]
    seen = []
    _, told = training.train(
        linear, params, x, y, learning_rate=0.1, callback=lambda s, r: seen.append((s, r)) or s == 150, **common
    )
    assert told.stopped == "callback"
    assert seen == list(zip(told.risk_steps[1:].tolist(), told.risks[1:].tolist(), strict=True))
    assert told.steps == 150
    _, wild = training.train(linear, params, x, y, learning_rate=50.0, **common)
    assert wild.stopped == "diverged"
    assert not np.isfinite(wild.risks[-1])
    assert wild.steps < 2000
    _, still = training.train(linear, params, x, y, learning_rate=0.1, key=key, steps=0)
    assert (still.steps, still.stopped) == (0, "steps")


@pytest.mark.parametrize("batch", [2, None])
def test_a_resumed_run_is_bit_identical(key, tmp_path, batch):
    params, x, y = problem()
    settings = {"key": key, "learning_rate": 0.02, "steps": 330, "chunk": 100, "batch": batch, "clip": 1.0}
    whole, info = training.train(linear, params, x, y, **settings)

    def interrupt(step, _):
        if step == 200:
            raise KeyboardInterrupt

    path = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        training.train(linear, params, x, y, callback=interrupt, checkpoint=path, **settings)
    steps = []
    resumed, again = training.train(
        linear, params, x, y, callback=lambda s, _: steps.append(s), checkpoint=path, **settings
    )
    assert steps == [300, 330]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, whole, resumed))
    assert again.risks.tolist() == info.risks.tolist()
    assert again.risk_steps.tolist() == info.risk_steps.tolist()
    finished, third = training.train(linear, params, x, y, checkpoint=path, **settings)
    assert third.stopped == "steps"
    assert (finished["w"] == whole["w"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_checkpoint_of_another_run_is_refused(key, tmp_path):
    params, x, y = problem()
    path = tmp_path / "run.npz"
    settings = {"key": key, "learning_rate": 0.02, "steps": 20, "checkpoint": path}
    training.train(linear, params, x, y, **settings)
    for change, name in (({"learning_rate": 0.03}, "learning_rate"), ({"key": jax.random.key(7)}, "key")):
        with pytest.raises(ValueError, match=f"other {name}"):
            training.train(linear, params, x, y, **(settings | change))
    with pytest.raises(ValueError, match="other data"):
        training.train(linear, params, x, y + 1, **settings)
    with pytest.raises(ValueError, match="other start"):
        training.train(linear, params | {"b": jnp.asarray(0.0)}, x, y, **settings)
    np.savez(path, something=np.ones(2))
    with pytest.raises(ValueError, match="not a checkpoint"):
        training.train(linear, params, x, y, **settings)


def test_a_half_precision_checkpoint_keeps_its_type(key, tmp_path):
    params, x, y = problem()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    path = tmp_path / "run.npz"
    settings = {"key": key, "learning_rate": 0.02, "steps": 20, "checkpoint": path}
    first, _ = training.train(linear, half, x, y, **settings)
    again, _ = training.train(linear, half, x, y, **settings)
    assert again["w"].dtype == jnp.bfloat16
    assert (first["w"] == again["w"]).all()
    with pytest.raises(ValueError, match="existing folder"):
        training.train(linear, half, x, y, **(settings | {"checkpoint": tmp_path / "absent" / "run.npz"}))


def test_sweep_over_rates_and_seeds_is_one_vmapped_call():
    params, x, y = problem()
    rates = jnp.asarray([0.01, 0.05])
    keys = jax.random.split(jax.random.key(3), 2)
    swept = jax.vmap(lambda k, r: training.run_steps(linear, params, x, y, k, r, steps=30, batch=2))(keys, rates)
    for i in range(2):
        alone = training.run_steps(linear, params, x, y, keys[i], rates[i], steps=30, batch=2)
        np.testing.assert_allclose(swept["w"][i], alone["w"], rtol=1e-12)


def test_rates_keys_and_clips_share_one_compilation(key):
    traces = []

    def counted(params, x):
        traces.append(None)
        return params["w"] @ x + params["b"]

    params, x, y = problem()
    training.train(counted, params, x, y, key=key, learning_rate=0.1, steps=40, chunk=20, clip=5.0)
    first = len(traces)
    training.train(counted, params, x, y, key=jax.random.key(9), learning_rate=0.2, steps=60, chunk=20, clip=3.0)
    # The starting risk is not compiled and traces the network once per run.
    assert len(traces) - first <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"batch": 0}, "batch is 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"chunk": 0}, "chunk 0"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, r"x has shape \(0, 3\) and y \(0,\)"),
    ],
)
def test_bad_input_is_named(key, change, message):
    params, x, y = problem()
    arguments = {"x": x, "y": y, "key": key, "learning_rate": 0.1, "steps": 10} | change
    with pytest.raises(ValueError, match=message):
        training.train(linear, params, **arguments)


def test_an_output_that_is_not_a_scalar_is_named(key):
    params, x, y = problem()
    with pytest.raises(ValueError, match="one scalar per sample"):
        training.risk(lambda p, v: p["w"] * v, params, x, y)
