"""The training loop: known optima, resuming bit by bit, stops that say why, minibatches, one compilation."""

import functools
import io
import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from rich.console import Console

from vi import expectation, reinforce, reparam, sample
from vi.fit import fit

pytestmark = pytest.mark.usefixtures("quick_compilation")


def noisy_square(key, params):
    """E = |w - 3|² + |b + 1|² + constant, with noise in the gradient."""
    noise = 0.1 * jax.random.normal(key, params["w"].shape)
    return ((params["w"] - 3 + noise) ** 2).sum() + (params["b"] + 1) ** 2


def start():
    return {"w": jnp.zeros(2), "b": jnp.asarray(0.5)}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs
    )


ADAM = optax.adam(0.05)


def test_steps_by_hand(key):
    found, info = fit(noisy_square, start(), optax.sgd(0.1), key, steps=7, chunk=3)
    params, losses = start(), []
    for s in range(7):
        value, gradient = jax.value_and_grad(noisy_square, argnums=1)(jax.random.fold_in(key, s), params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        losses.append(float(value))
    # One step rounds a few times; seven steps of a contraction stay within 1e-5 of numbers of order 1.
    np.testing.assert_allclose(found["w"], params["w"], rtol=1e-5)
    np.testing.assert_allclose(found["b"], params["b"], rtol=1e-5)
    np.testing.assert_allclose(info.losses, losses, rtol=1e-5)
    assert (info.steps, info.stopped, info.checkpoint, info.averaged) == (7, "steps", None, 0)


def test_the_optimum_of_a_conjugate_elbo(key):
    """z ~ N(0, 1), x | z ~ N(z, ½): the posterior is N(4x/5, 1/5), and at it every draw's ELBO is log p(x)."""
    x = 1.5

    @expectation
    def elbo(params):
        guide = dist.Normal(params["loc"], jnp.exp(params["log_scale"]))
        z = sample(reparam(guide))
        # Without the score of the guide, whose mean is zero, no noise is left at the optimum.
        log_q = jax.tree.map(jax.lax.stop_gradient, guide).log_prob(z)
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - log_q

    params = {"loc": jnp.asarray(-1.0), "log_scale": jnp.asarray(0.0)}
    found, info = fit(lambda k, p: -elbo(k, p), params, optax.sgd(0.02), key, steps=1000, chunk=300)
    # The curvatures are 5 and 2: a step leaves 0.96 of the error, 1000 steps 1e-18 of it.  What remains is rounding: float32
    # gradients are off by about 1e-6, the parameters as much.
    np.testing.assert_allclose(found["loc"], 0.8 * x, atol=1e-5)
    np.testing.assert_allclose(np.exp(found["log_scale"]), np.sqrt(0.2), atol=1e-5)
    evidence = float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(x))
    np.testing.assert_allclose(-info.losses[-100:], evidence, atol=1e-5)


def test_an_expectation_is_a_loss_and_a_baseline_is_learned_beside_it(key):
    """E (10 + b) = 10 + p falls with p; the baseline's own term makes it the mean cost, about 10."""

    @expectation
    def cost(params):
        p = jax.nn.sigmoid(params["logit"])
        return 10 + sample(reinforce(dist.Bernoulli(probs=p), baseline=params["baseline"])).astype(float)

    def loss(key, params):
        value = cost(key, params)
        return value + (jax.lax.stop_gradient(value) - params["baseline"]) ** 2 / 2

    params = {"logit": jnp.asarray(0.0), "baseline": jnp.asarray(0.0)}
    found, info = fit(loss, params, optax.sgd(0.05), key, steps=1000, average=0.2)
    # The exponent of a constant rate forgets the start: 0.95^800 < 1e-17.  The cost is 10 + p with 0 <= p <= 1.
    assert info.averaged == 200
    assert 9.99 < found["baseline"] < 11
    # An exact gradient would end below -1.6 (d logit = -0.05 p (1 - p)), the noise left by a fitted baseline is small.
    assert found["logit"] < -1
    alone, _ = fit(cost, {"logit": params["logit"], "baseline": jnp.asarray(10.0)}, ADAM, key, steps=50)
    assert alone["logit"] < 0 and alone["baseline"] == 10


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("average", [0.0, 0.6])
def test_a_resumed_run_is_bit_identical(key, tmp_path, batch_size, average):
    data = {"x": np.random.default_rng(0).standard_normal((11, 2)).astype(np.float32)}

    def loss(key, params, batch):
        return noisy_square(key, params) + ((batch["x"] - params["w"]) ** 2).mean()

    settings = {"steps": 38, "chunk": 8, "data": data, "batch_size": batch_size, "average": average}
    whole, info = fit(loss, start(), ADAM, key, **settings)

    def interrupt(step, loss, params):
        if step == 24:
            raise KeyboardInterrupt

    path = tmp_path / "run.npz"
    part, halted = fit(loss, start(), ADAM, key, checkpoint=path, callback=interrupt, **settings)
    assert (halted.steps, halted.stopped) == (24, "interrupted")
    assert np.array_equal(halted.losses, info.losses[:24])
    assert not same(part, whole)
    seen = []
    resumed, again = fit(
        loss, start(), ADAM, key, checkpoint=path, callback=lambda s, loss, p: seen.append((s, loss)), **settings
    )
    assert same(resumed, whole)
    assert np.array_equal(again.losses, info.losses)
    assert [s for s, _ in seen] == [32, 38]
    assert [x for _, x in seen] == [info.losses[31], info.losses[37]]
    assert again.averaged == info.averaged == round(38 * average)
    finished, third = fit(loss, start(), ADAM, key, checkpoint=path, **settings)
    assert same(finished, whole) and third.stopped == "steps" and third.checkpoint == path
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_run_can_be_made_longer(key, tmp_path):
    path = tmp_path / "run.npz"
    fit(noisy_square, start(), ADAM, key, steps=13, chunk=5, checkpoint=path)
    longer, info = fit(noisy_square, start(), ADAM, key, steps=30, chunk=5, checkpoint=path)
    whole, other = fit(noisy_square, start(), ADAM, key, steps=30, chunk=5)
    assert same(longer, whole) and np.array_equal(info.losses, other.losses)
    with pytest.raises(ValueError, match="holds 30 steps; expected at most steps = 20"):
        fit(noisy_square, start(), ADAM, key, steps=20, chunk=5, checkpoint=path)


def test_the_average_is_that_of_the_last_parameters(key):
    kept = []
    settings = {"steps": 20, "chunk": 1}
    fit(noisy_square, start(), ADAM, key, callback=lambda s, _, p: kept.append(p), **settings)
    mean, info = fit(noisy_square, start(), ADAM, key, average=0.25, **settings)
    assert info.averaged == 5
    # Float32, five additions.
    np.testing.assert_allclose(mean["w"], np.mean([p["w"] for p in kept[-5:]], axis=0), rtol=1e-6)
    # Parameters handed to the callback stay as they were: they moved at every step.
    assert len({float(p["b"]) for p in kept}) == 20


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it: a job in the background is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_chunk_and_keeps_it(key, tmp_path, interruptible):
    path = tmp_path / "run.npz"
    before = signal.getsignal(signal.SIGINT)

    def press(step, loss, params):
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    params, info = fit(noisy_square, start(), ADAM, key, steps=100, chunk=10, checkpoint=path, callback=press)
    assert (info.stopped, info.steps) == ("interrupted", 30)
    assert "30 of 100" in info.message
    expected, _ = fit(noisy_square, start(), ADAM, key, steps=30, chunk=10, checkpoint=path)
    assert same(params, expected)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_callback_stops(key):
    _, info = fit(noisy_square, start(), ADAM, key, steps=100, chunk=10, callback=lambda s, _, p: s >= 25)
    assert (info.stopped, info.steps, len(info.losses)) == ("callback", 30, 30)


@pytest.mark.parametrize("average", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_and_is_named(key, average):
    """√b has an infinite slope at 0, which the third step reaches exactly; the loss itself is finite there."""

    def loss(key, params):
        return params["w"].sum() + jnp.sqrt(jnp.abs(params["net"]["b"])) * 0 + params["net"]["b"]

    params = {"w": jnp.ones(2), "net": {"b": jnp.asarray(0.75)}}
    with pytest.warns(RuntimeWarning, match=r"at step 3, .*the gradient of params\['net'\]\['b'\] is not finite"):
        found, info = fit(loss, params, optax.sgd(0.25), key, steps=50, chunk=20, average=average)
    assert info.stopped == "not finite"
    assert info.steps == 3 and info.losses.tolist() == [2.75, 2.0, 1.25]
    assert "params['w']" not in info.message
    assert found["net"]["b"] == (0.25 if average else 0.0)  # the mean of 0.5, 0.25 and 0, or the last
    assert jnp.isfinite(found["w"]).all()


def test_a_loss_or_an_update_that_is_not_finite_is_named(key, tmp_path):
    path = tmp_path / "run.npz"
    with pytest.warns(RuntimeWarning, match=r"at step 0, counted from 0, the loss, the gradient of params\['b'\], "):
        found, info = fit(lambda k, p: noisy_square(k, p) * jnp.nan, start(), ADAM, key, steps=9, checkpoint=path)
    assert same(found, start()) and info.steps == 0 and info.losses.shape == (0,)
    with pytest.warns(RuntimeWarning, match=r"the update of params\['b'\], the update of params\['w'\] are not"):
        found, _ = fit(noisy_square, start(), optax.sgd(3e38), key, steps=9)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), found))


class Net(eqx.Module):
    layers: list
    activation: object
    dropout: eqx.nn.Dropout
    count: jax.Array

    def __call__(self, x, key):
        hidden = self.dropout(self.activation(self.layers[0](x)), key=key)
        return self.layers[1](hidden)[0] + 0.0 * self.count


def test_an_equinox_module_trains_and_keeps_what_is_not_trained(key):
    first, second = jax.random.split(key)
    layers = [eqx.nn.Linear(2, 8, key=first), eqx.nn.Linear(8, 1, key=second)]
    net = Net(layers, jax.nn.tanh, eqx.nn.Dropout(0.1), jnp.asarray(3))
    x = np.random.default_rng(1).standard_normal((32, 2)).astype(np.float32)

    def loss(key, net, x, y):
        return jnp.mean((jax.vmap(net)(x, jax.random.split(key, len(x))) - y) ** 2)

    found, info = fit(loss, net, ADAM, key, steps=200, data=(x, x[:, 0]), batch_size=16)
    # Least squares of x₀ starts at about its variance; a tenth of that is far outside the noise of minibatches.
    assert info.losses[-20:].mean() < 0.1 * info.losses[:3].mean()
    assert found.activation is net.activation and found.dropout.p == 0.1
    assert found.count is net.count
    assert not (found.layers[0].weight == net.layers[0].weight).any()
    nothing = jax.tree.map(lambda _: False, net)
    last = eqx.tree_at(lambda n: n.layers[1], nothing, True)
    only_last, _ = fit(loss, net, ADAM, key, steps=5, data=(x, x[:, 0]), batch_size=16, trainable=last)
    assert (only_last.layers[0].weight == net.layers[0].weight).all()
    assert not (only_last.layers[1].weight == net.layers[1].weight).any()


def test_the_users_arrays_survive(key):
    params = start()
    fit(noisy_square, params, ADAM, key, steps=30, chunk=10)
    assert not params["w"].is_deleted() and (params["w"] == 0).all()


def test_integer_parameters_are_named(key):
    def loss(key, params):
        return (params["w"] - params["n"]) ** 2

    params = {"w": jnp.asarray(0.0), "n": jnp.asarray(3), "rate": 2.0}
    found, _ = fit(loss, params, ADAM, key, steps=3)
    assert found["n"] is params["n"] and found["rate"] is params["rate"]
    with pytest.raises(TypeError, match=r"params\['n'\] is int32\[\]; only real floating arrays"):
        fit(loss, params, ADAM, key, steps=3, trainable={"w": True, "n": True, "rate": False})
    with pytest.raises(TypeError, match=r"params\['rate'\] is 2.0, a Python float"):
        fit(loss, params, ADAM, key, steps=3, trainable={"w": True, "n": False, "rate": True})
    with pytest.raises(TypeError, match=r"params is int32\[2\]"):
        fit(lambda k, p: p.sum() * 1.0, jnp.arange(2, dtype=jnp.int32), ADAM, key, steps=3)
    with pytest.raises(
        TypeError, match=r"nothing to train: params\['b'\] is 1.5, a Python float, params\['n'\] is int32\[\]"
    ):
        fit(loss, {"n": params["n"], "b": 1.5}, ADAM, key, steps=3)
    with pytest.raises(ValueError, match="trainable is not a prefix of params"):
        fit(loss, params, ADAM, key, steps=3, trainable={"w": True})
    with pytest.raises(TypeError, match=r"trainable is 'yes' for params\['w'\]"):
        fit(loss, params, ADAM, key, steps=3, trainable={"w": "yes", "n": False, "rate": False})


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_every_row_comes_once_an_epoch(key, batch_size):
    """Row i moves coordinate i alone, so that the parameters count the visits of every row."""
    rows, epochs = 12, 3

    def loss(key, visits, x):
        return -(x * visits).sum()

    data = np.eye(rows, dtype=np.float32)
    counts = []
    settings = {"data": data, "batch_size": batch_size, "chunk": rows // batch_size}
    fit(
        loss,
        jnp.zeros(rows),
        optax.sgd(1.0),
        key,
        steps=epochs * rows // batch_size,
        callback=lambda s, _, p: counts.append(p),
        **settings,
    )
    for epoch, visits in enumerate(counts, 1):
        assert (visits == epoch).all()


def test_batches_that_do_not_divide_the_data_run_on_into_the_next_epoch(key):
    """Batches of 5 of 7 rows: seven steps are five epochs, and every epoch has an order of its own."""

    def loss(key, order, x):
        return -(x * order).sum()

    visits = []
    total, _ = fit(
        loss, jnp.zeros(7), optax.sgd(1.0), key, steps=14, chunk=1, data=np.eye(7, dtype=np.float32), batch_size=5,
        callback=lambda s, _, p: visits.append(np.asarray(p)),
    )  # fmt: skip
    assert (total == 10).all() and (visits[6] == 5).all()
    drawn = np.diff([np.zeros(7), *visits], axis=0)
    assert (drawn.sum(1) == 5).all()
    # The first five rows of an epoch are one of 21 sets; ten equal ones by chance would be 21^-9.
    assert len({tuple(row) for row in drawn}) > 1


def test_one_compilation_serves_all_chunks_and_runs(key, tmp_path):
    traces = []

    def loss(key, params):
        traces.append(None)
        return noisy_square(key, params)

    fit(loss, start(), ADAM, key, steps=25, chunk=10, checkpoint=tmp_path / "run.npz")
    assert len(traces) == 1
    fit(loss, start(), ADAM, jax.random.key(5), steps=47, chunk=10)
    assert len(traces) == 1


def test_a_checkpoint_of_another_run_is_refused(key, tmp_path):
    path = tmp_path / "run.npz"
    data = np.arange(6.0, dtype=np.float32)

    def loss(key, params, x):
        return noisy_square(key, params) + x.mean()

    run = functools.partial(fit, steps=4, chunk=2, data=data, batch_size=2, checkpoint=path)
    run(loss, start(), ADAM, key)
    other_start = start() | {"b": jnp.asarray(7.0)}
    for call, name in (
        (lambda: run(loss, start(), ADAM, jax.random.key(7)), "other key"),
        (lambda: run(loss, other_start, ADAM, key), "other start"),
        (lambda: run(loss, start(), ADAM, key, data=data + 1), "other data"),
        (lambda: run(loss, start(), ADAM, key, batch_size=3), "other batch_size"),
        (lambda: run(loss, start(), ADAM, key, average=0.5), "other start of the average"),
        (lambda: run(loss, start(), optax.adam(0.01), key), "another loss or optimizer"),
        (lambda: run(loss, start(), optax.sgd(0.01), key), "another loss or optimizer"),
        (lambda: run(lambda k, p, x: 2 * loss(k, p, x), start(), ADAM, key), "another loss or optimizer"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    # The same program from new objects is the same run.
    run(lambda k, p, x: loss(k, p, x), start(), optax.adam(0.05), key)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a checkpoint of fit"):
        run(loss, start(), ADAM, key)
    np.savez(path, x=np.ones(2))
    with pytest.raises(ValueError, match="not a checkpoint of fit"):
        run(loss, start(), ADAM, key)


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(key, tmp_path):
    called = []
    for path, reason in (
        (tmp_path / "absent" / "run.npz", "No such file or directory"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "run.npz", "Not a directory"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=f"checkpoint .* cannot be written: .*{reason}"):
            fit(lambda k, p: called.append(None), start(), ADAM, key, steps=2, checkpoint=path)
    assert not called


def test_a_full_disk_does_not_cost_the_run(key, tmp_path, monkeypatch):
    from theory import checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.warns(RuntimeWarning, match="run.npz was not written .*No space left.*the run goes on"):
        _, info = fit(noisy_square, start(), ADAM, key, steps=5, checkpoint=tmp_path / "run.npz")
    assert info.stopped == "steps"


def test_half_precision_keeps_its_type(key, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start())
    settings = {"steps": 20, "average": 0.5, "checkpoint": tmp_path / "run.npz"}
    first, _ = fit(noisy_square, half, ADAM, key, **settings)
    again, _ = fit(noisy_square, half, ADAM, key, **settings)
    assert first["w"].dtype == jnp.bfloat16 and same(first, again)


def test_an_optimiser_may_need_the_value_and_may_hold_a_key(key, tmp_path):
    optimizer = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), ADAM, optax.contrib.reduce_on_plateau())
    settings = {"chunk": 4, "checkpoint": tmp_path / "run.npz"}
    whole, _ = fit(noisy_square, start(), optimizer, key, steps=12, chunk=4)
    fit(noisy_square, start(), optimizer, key, steps=8, **settings)
    resumed, _ = fit(noisy_square, start(), optimizer, key, steps=12, **settings)
    assert same(resumed, whole)


def test_the_bar_is_off_and_says_rate_loss_and_checkpoint_when_on(key, tmp_path, capsys):
    fit(noisy_square, start(), ADAM, key, steps=20, chunk=5)
    assert capsys.readouterr() == ("", "")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    path = tmp_path / "run.npz"
    _, info = fit(noisy_square, start(), ADAM, key, steps=20, chunk=5, checkpoint=path, progress=console)
    shown = screen.getvalue().replace("\n", "")
    assert "20/20" in shown and "steps/s" in shown
    assert f"{info.losses[-1]:.6g}" in shown
    assert str(path)[:20] in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"chunk": 0}, "chunk 0"),
        ({"average": 1.5}, "average is 1.5"),
        ({"batch_size": 2}, "batch_size is 2, but there is no data"),
        ({"data": np.ones(3), "batch_size": 4}, "batch_size is 4; expected 1 to 3"),
        ({"data": (np.ones(3), np.ones(4))}, "expected one number of rows"),
        ({"data": (np.ones(3), np.ones(()))}, "expected one number of rows"),
        ({"loss": lambda k, p: p["w"]}, r"loss returns float32\[2\]; expected one real scalar"),
        ({"loss": lambda k, p: jnp.asarray(1)}, r"loss returns int32\[\]"),
    ],
)
def test_bad_input_is_named(key, change, message):
    arguments = {"loss": noisy_square, "params": start(), "optimizer": ADAM, "key": key, "steps": 3} | change
    with pytest.raises(ValueError, match=message):
        fit(**arguments)
