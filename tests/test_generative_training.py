"""Training: Adam and the average by hand, resuming bit by bit, what is refused, pictures; and that a score is learned."""

import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from generative import images, losses, nets, training
from generative.gbm_diffusion import geometric


class Line(eqx.Module):
    slope: jax.Array
    offset: jax.Array


def line():
    return Line(jnp.array([0.5, -0.2, 0.1], jnp.float32), jnp.zeros((), jnp.float32))


def squares(key, model, x, y):
    return ((x @ model.slope + model.offset - y) ** 2).mean()


def noisy_squares(key, model, x, y):
    return squares(key, model, x, y + 0.1 * jax.random.normal(key, y.shape))


def rows(n=20):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 3)).astype(np.float32)
    return x, (x @ np.array([1.0, -2.0, 0.5]) + 0.3).astype(np.float32)


def leaves(model):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(model)])


def test_steps_and_average_by_hand(key):
    """Plain gradient steps of all rows, and the average with its rising decay."""
    x, y = rows()
    seen, average = [line()], line()
    for step in range(12):
        gradient = jax.grad(squares, argnums=1)(key, seen[-1], x, y)
        seen.append(jax.tree.map(lambda p, g: p - 0.1 * g, seen[-1], gradient))
        decay = min(0.9, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, seen[-1])
    found, info = training.train(
        key, line(), squares, rows(), steps=12, batch=20, optimizer=optax.sgd(0.1), ema=0.9, chunk=5
    )
    np.testing.assert_allclose(leaves(found), leaves(average), rtol=1e-5)
    np.testing.assert_allclose(info.losses, [squares(key, m, x, y) for m in seen[:-1]], rtol=1e-5)
    assert (info.steps, info.stopped, info.checkpoint) == (12, "steps", None)
    last, _ = training.train(key, line(), squares, rows(), steps=12, batch=20, optimizer=optax.sgd(0.1), ema=0.0)
    np.testing.assert_allclose(leaves(last), leaves(seen[-1]), rtol=1e-5)


def test_gradients_are_clipped_and_rates_follow_a_schedule(key):
    """Adam's first step is the rate in each entry, whatever the gradient; with a rate of zero nothing moves."""
    found, _ = training.train(key, line(), squares, rows(), steps=1, batch=20, rate=0.01, ema=0.0)
    np.testing.assert_allclose(np.abs(leaves(found) - leaves(line())), 0.01, rtol=1e-3)
    still, _ = training.train(key, line(), squares, rows(), steps=3, batch=20, rate=lambda step: 0.0 * step, ema=0.0)
    np.testing.assert_array_equal(leaves(still), leaves(line()))
    rates = training.warm_cosine(0.1, 100, warm=10)
    assert [float(rates(s)) for s in (0, 10, 100)] == pytest.approx([0, 0.1, 0], abs=1e-6)
    assert float(rates(5)) == pytest.approx(0.05)


def test_an_epoch_takes_each_row_once(key):
    table = np.asarray(training._batches(key, 20, 6, 0, 7))
    assert table.shape == (7, 6)
    for epoch in (table[:3], table[3:6]):
        assert len(np.unique(epoch)) == 18
    assert (np.sort(table[:3].reshape(-1)) != table[:3].reshape(-1)).any()
    assert (table[:3] != table[3:6]).any()
    np.testing.assert_array_equal(training._batches(key, 20, 6, 4, 7), table[4:])


def test_only_the_network_is_trained(key):
    model = losses.Parametrised(
        nets.MLP((2,), width=4, depth=1, key=key), geometric(0.1, 5.0), jnp.ones(()), jnp.ones(())
    )
    x0 = jnp.exp(jax.random.normal(key, (16, 2)))
    found, _ = training.train(
        key, model, lambda k, m, x: losses.denoising(k, m, m.process, x), (x0,), steps=2, batch=8, ema=0.0
    )
    assert float(found.location) == 1 and float(found.deviation) == 1
    assert found.process == model.process
    assert not np.array_equal(leaves(found.network), leaves(model.network))


SETTINGS = {"steps": 23, "batch": 6, "rate": 0.05, "ema": 0.9, "chunk": 5}


def test_a_resumed_run_is_bit_identical(key, tmp_path):
    whole, info = training.train(key, line(), noisy_squares, rows(), **SETTINGS)

    def interrupt(step, *_):
        if step == 10:
            raise KeyboardInterrupt

    path = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        training.train(key, line(), noisy_squares, rows(), checkpoint=path, callback=interrupt, **SETTINGS)
    steps = []
    resumed, again = training.train(
        key, line(), noisy_squares, rows(), checkpoint=path, callback=lambda s, *_: steps.append(s), **SETTINGS
    )
    assert steps == [15, 20, 23]
    np.testing.assert_array_equal(leaves(resumed), leaves(whole))
    np.testing.assert_array_equal(again.losses, info.losses)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    longer, _ = training.train(key, line(), noisy_squares, rows(), checkpoint=path, **(SETTINGS | {"steps": 30}))
    direct, _ = training.train(key, line(), noisy_squares, rows(), **(SETTINGS | {"steps": 30}))
    np.testing.assert_array_equal(leaves(longer), leaves(direct))
    with pytest.raises(ValueError, match=r"holds 30 steps; expected at most steps = 23"):
        training.train(key, line(), noisy_squares, rows(), checkpoint=path, **SETTINGS)


def test_a_checkpoint_of_another_run_is_refused(key, tmp_path):
    path = tmp_path / "run.npz"
    training.train(key, line(), noisy_squares, rows(), checkpoint=path, **SETTINGS)
    x, y = rows()
    changes = {
        "key": lambda: training.train(jax.random.key(7), line(), noisy_squares, rows(), checkpoint=path, **SETTINGS),
        "data": lambda: training.train(key, line(), noisy_squares, (x, y + 1), checkpoint=path, **SETTINGS),
        "program": lambda: training.train(key, line(), squares, rows(), checkpoint=path, **SETTINGS),
        "batch": lambda: training.train(
            key, line(), noisy_squares, rows(), checkpoint=path, **(SETTINGS | {"batch": 5})
        ),
        "ema": lambda: training.train(key, line(), noisy_squares, rows(), checkpoint=path, **(SETTINGS | {"ema": 0.5})),
        "start": lambda: training.train(
            key, Line(jnp.ones(3), jnp.zeros(())), noisy_squares, rows(), checkpoint=path, **SETTINGS
        ),
    }
    for name, run in changes.items():
        with pytest.raises(ValueError, match=rf"other (batch, )?{name}"):
            run()
    np.savez(path, something=np.ones(2))
    with pytest.raises(ValueError, match=r"not a checkpoint"):
        training.train(key, line(), noisy_squares, rows(), checkpoint=path, **SETTINGS)


def test_a_step_that_is_not_finite_stops(key):
    def breaks(key, model, x):
        return (model.slope**2).sum() + jnp.where(x.max() > 5, jnp.nan, 0.0)

    x = np.zeros((12, 1), np.float32)
    x[3] = 9
    with pytest.warns(RuntimeWarning, match=r"not finite at step (\d+), counted from 0"):
        found, info = training.train(key, line(), breaks, (x,), steps=12, batch=1, ema=0.0)
    assert info.stopped == "not finite" and info.steps < 12
    place = int(np.argmax(np.asarray(training._batches(key, 12, 1, 0, 12))[:, 0] == 3))
    assert info.steps == place and np.isfinite(info.losses).all()
    before, _ = training.train(key, line(), breaks, (x,), steps=place, batch=1, ema=0.0)
    np.testing.assert_array_equal(leaves(found), leaves(before))


def test_a_callback_may_stop(key):
    _, info = training.train(
        key, line(), squares, rows(), steps=50, batch=5, chunk=5, callback=lambda s, loss, model: s >= 15
    )
    assert (info.steps, info.stopped) == (15, "callback")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, r"steps is -1"),
        ({"batch": 21}, r"batch is 21; expected 1 to 20"),
        ({"ema": 1.0}, r"ema 1.0; expected"),
        ({"clip": 0.0}, r"clip is 0.0"),
        ({"checkpoint": "no/such/folder/run.npz"}, r"expected a file in an existing folder"),
    ],
)
def test_wrong_settings_are_refused(change, message, key):
    with pytest.raises(ValueError, match=message):
        training.train(key, line(), squares, rows(), **({"steps": 5, "batch": 5} | change))


def test_arrays_of_different_length_are_refused(key):
    with pytest.raises(ValueError, match=r"shapes \[\(3, 1\), \(2,\)\]; expected equally many rows"):
        training.train(key, line(), squares, (np.ones((3, 1)), np.ones(2)), steps=1)


# ---- pictures -------------------------------------------------------------------------------------------------------------


def decoded(content):
    """The pixels of a grey PNG without filters, by its specification."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, []
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        body = content[place + 4 : place + 8 + size]
        assert int.from_bytes(content[place + 8 + size : place + 12 + size], "big") == zlib.crc32(body)
        parts.append((body[:4], body[4:]))
        place += 12 + size
    assert [name for name, _ in parts] == [b"IHDR", b"IDAT", b"IEND"]
    width, height = (int.from_bytes(parts[0][1][i : i + 4], "big") for i in (0, 4))
    return np.frombuffer(zlib.decompress(parts[1][1]), np.uint8).reshape(height, width + 1)[:, 1:]


def test_a_grid_of_images():
    x = np.stack([np.full((2, 3), v) for v in (0.0, 0.5, 1.0, -2.0, 3.0)])
    out = images.grid(x, columns=2)
    assert out.shape == (8, 7)
    np.testing.assert_array_equal(out[:2, :3], 0)
    np.testing.assert_array_equal(out[:2, 4:], 128)
    np.testing.assert_array_equal(out[3:5, :3], 255)
    np.testing.assert_array_equal(out[3:5, 4:], 0)  # cut off
    np.testing.assert_array_equal(out[6:, :3], 255)
    np.testing.assert_array_equal(out[:, 3], 128)  # between
    assert images.grid(x, columns=2, magnified=3).shape == (24, 21)
    with pytest.raises(ValueError, match=r"6 entries of images are not finite"):
        images.grid(np.full((1, 2, 3), np.nan))


def test_a_png_file_holds_the_grid(tmp_path):
    x = np.random.default_rng(0).uniform(size=(7, 4, 4))
    images.write_png(tmp_path / "a.png", x, columns=3, magnified=2)
    np.testing.assert_array_equal(decoded((tmp_path / "a.png").read_bytes()), images.grid(x, columns=3, magnified=2))
    colour = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    images.write_png(tmp_path / "b.png", colour)
    read = pytest.importorskip("matplotlib.image").imread(tmp_path / "b.png")
    np.testing.assert_allclose(read * 255, images.grid(colour, magnified=2), atol=0.5)
    with pytest.raises(ValueError, match=r"2 colours, expected 1 or 3"):
        images.write_png(tmp_path / "c.png", colour[..., :2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_pictures_on_the_way(key, tmp_path):
    folder = tmp_path / "pictures"
    drawn = []

    def draw(model):
        drawn.append(float(model.offset))
        return jnp.full((4, 2, 2), 0.5)

    training.train(
        key,
        line(),
        squares,
        rows(),
        steps=25,
        batch=5,
        chunk=5,
        pictures=training.Pictures(folder, draw, every=10),
    )
    assert sorted(p.name for p in folder.iterdir()) == ["step_000010.png", "step_000020.png", "step_000025.png"]
    assert len(set(drawn)) == 3


# ---- learning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_score_is_learned(key):
    """Two log-normal parts in one dimension, whose score is known; the relative Fisher error of the learned one."""
    means, spread, process = jnp.array([-1.0, 1.0]), 0.2, geometric(0.2, 10.0)
    first, second = jax.random.split(key)
    logs = means[jax.random.randint(first, (4000, 1), 0, 2)] + spread * jax.random.normal(second, (4000, 1))
    x0 = jnp.exp(logs)
    model = losses.parametrised(nets.MLP((1,), width=48, depth=2, key=key), process, x0)
    times, weight = losses.lognormal(process, float(model.deviation)), losses.edm(model.deviation)
    trained, info = training.train(
        key,
        model,
        lambda k, m, x: losses.denoising(k, m, process, x, times=times, weight=weight),
        (x0,),
        steps=600,
        batch=256,
        rate=training.warm_cosine(5e-3, 600),
        ema=0.99,
        chunk=200,
    )
    assert info.losses[-50:].mean() < info.losses[:50].mean()

    def exact(y, t):
        def log_density(y):
            return jax.nn.logsumexp(-((y - means) ** 2) / (2 * (spread**2 + process.variance(t))))

        return jax.vmap(jax.grad(log_density))(y[:, 0])[:, None]

    for level, bound in ((0.2, 0.1), (0.5, 0.05), (2.0, 0.05)):
        t = process.time(jnp.asarray(level))
        y = logs[:1000] + level * jax.random.normal(key, (1000, 1))
        error = ((trained(y, t) - exact(y, t)) ** 2).mean() / (exact(y, t) ** 2).mean()
        before = ((model(y, t) - exact(y, t)) ** 2).mean() / (exact(y, t) ** 2).mean()
        assert float(error) < bound, level
        # A new network's score is that of one normal law, which at much noise is right already.
        assert float(before) > (4 if level < 1 else 1) * float(error)
