"""Training of the learned direction: loss, epochs, checkpoints, the command that makes the shipped weights."""

import io
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import dense, open_laplacian, path_laplacian
from rich.console import Console

from solvers import direction_data as dd
from solvers import direction_network as dn
from solvers import direction_training as dt
from solvers.poisson import AIR, SOLID

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

TINY = {"dimensions": 1, "blocks": (1, 1, 1), "channels": 4}


def exact_ritz(operator, n):
    values, vectors = np.linalg.eigh(dense(operator, n))
    return dd.Ritz(jnp.asarray(values), jnp.asarray(vectors.T))


@pytest.fixture
def problem():
    network = dn.DirectionNetwork(**TINY, key=jax.random.key(1))
    data = dd.training_pairs(jax.random.key(2), 12, exact_ritz(open_laplacian, 16), open_laplacian)
    return network, dd.Examples(*(rows.astype(jnp.float32) for rows in data))


def same(a, b):
    return bool(eqx.tree_equal(a, b))


@pytest.mark.parametrize("loss", [dn.energy_loss, dn.residual_loss])
def test_training_reduces_the_loss(problem, loss):
    network, data = problem
    settings = {"loss": loss, "steps": 50, "batch": 12, "optimizer": optax.adam(1e-2)}
    found, info = dt.train(network, open_laplacian, data, key=jax.random.key(0), **settings)

    @eqx.filter_jit
    def mean(network):
        return jax.vmap(lambda r, x: loss(open_laplacian, network(r), r, x))(*data).mean()

    assert (info.steps, info.stopped, info.losses.shape) == (50, "steps", (50,))
    np.testing.assert_allclose(info.losses[0], mean(network), rtol=1e-5)  # single precision
    assert info.losses[-1] < 0.7 * info.losses[0]
    assert mean(found) < 0.7 * info.losses[0]
    assert network.weights[0].dtype == found.weights[0].dtype


def test_a_batch_in_parts_is_the_same_batch(problem):
    network, data = problem
    settings = {"key": jax.random.key(0), "steps": 5, "batch": 6}
    whole, info = dt.train(network, open_laplacian, data, **settings)
    parts, again = dt.train(network, open_laplacian, data, at_once=2, **settings)
    np.testing.assert_allclose(again.losses, info.losses, rtol=1e-5)  # sums in single precision, in another order
    # Adam divides by the size of the gradient: its rounding counts where that is small.  Five steps of 1e-4 each.
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_epoch_takes_every_row_once(problem):
    network, _ = problem
    rows = jnp.arange(10.0)[:, None] * jnp.ones(16)
    loss = lambda operator, d, r: r.mean() + 0 * d.sum()  # noqa: E731
    settings = {"loss": loss, "steps": 25, "batch": 1, "chunk": 7}
    _, info = dt.train(network, open_laplacian, rows, key=jax.random.key(3), **settings)
    epochs = info.losses[:20].astype(int).reshape(2, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()
    assert len(set(info.losses[20:])) == 5


def test_data_can_be_made_at_every_step(problem):
    network, _ = problem
    ritz = exact_ritz(open_laplacian, 16)
    make = eqx.Partial(dd.training_pairs, ritz=ritz, operator=open_laplacian)
    loss = lambda operator, d, r, x: r[0] + 0 * d.sum()  # noqa: E731
    _, info = dt.train(network, open_laplacian, make, key=jax.random.key(3), loss=loss, steps=4, batch=2)
    assert len(set(info.losses)) == 4
    only = partial(dd.training_set, ritz=ritz)
    loss = lambda operator, d, r: r[0] + 0 * d.sum()  # noqa: E731
    _, alone = dt.train(network, open_laplacian, only, key=jax.random.key(3), loss=loss, steps=4, batch=2)
    np.testing.assert_allclose(alone.losses, info.losses, rtol=1e-10)  # the same coefficients of exact eigenvectors


def test_a_step_that_is_not_finite_stops(problem):
    network, data = problem
    poisoned = dd.Examples(data.r.at[7].set(jnp.nan), data.x)
    settings = {"key": jax.random.key(4), "batch": 1, "chunk": 5}
    with pytest.warns(RuntimeWarning, match="not finite at step"):
        found, info = dt.train(network, open_laplacian, poisoned, steps=24, **settings)
    assert info.stopped == "not finite"
    assert info.steps == len(info.losses) < 12
    assert np.isfinite(info.losses).all()
    kept, _ = dt.train(network, open_laplacian, data, steps=info.steps, **settings)
    assert same(found, kept)


class Interrupt(Exception):
    pass


def test_a_resumed_run_is_bit_identical(problem, tmp_path):
    network, data = problem
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 17))
    run = partial(
        dt.train, network, open_laplacian, data, key=jax.random.key(5), steps=17, batch=5, chunk=4, optimizer=optimizer
    )
    whole, info = run()
    path = tmp_path / "run.npz"

    def interrupt(step, loss, network):
        if step == 8:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(checkpoint=path, callback=interrupt)
    steps = []
    resumed, again = run(checkpoint=path, callback=lambda step, loss, network: steps.append(step))
    assert steps == [12, 16, 17]
    assert same(whole, resumed)
    assert again.losses.tolist() == info.losses.tolist()
    finished, third = run(checkpoint=path)
    assert same(whole, finished)
    assert third.steps == 17
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    with pytest.raises(ValueError, match="holds 17 steps"):
        run(checkpoint=path, steps=16)
    for change, name in (
        ({"key": jax.random.key(6)}, "key"),
        ({"batch": 4}, "batch"),
        ({"optimizer": optax.adam(1e-2)}, "program"),
        ({"loss": dn.residual_loss}, "program"),
    ):
        with pytest.raises(ValueError, match=f"another .*{name}"):
            run(checkpoint=path, **change)
    for arguments, name in (
        ((network, path_laplacian, data), "program"),
        ((network, open_laplacian, dd.Examples(data.r, -data.x)), "data"),
        ((dn.DirectionNetwork(**TINY, key=jax.random.key(7)), open_laplacian, data), "start"),
    ):
        with pytest.raises(ValueError, match=f"another .*{name}"):
            dt.train(*arguments, checkpoint=path, **run.keywords)
    with pytest.raises(ValueError, match="existing folder"):
        run(checkpoint=tmp_path / "absent" / "run.npz")


def test_half_precision_trains_and_resumes(problem, tmp_path):
    _, data = problem
    network = dn.DirectionNetwork(**TINY, dtype=jnp.bfloat16, key=jax.random.key(8))
    run = partial(dt.train, network, open_laplacian, data, key=jax.random.key(5), checkpoint=tmp_path / "run.npz")
    first, _ = run(steps=3)
    again, info = run(steps=3)
    assert first.weights[1].dtype == jnp.bfloat16
    assert same(first, again)
    assert np.isfinite(info.losses).all()


def test_callback_and_progress(problem):
    network, data = problem
    seen = []
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    settings = {"key": jax.random.key(9), "steps": 9, "chunk": 3, "progress": console}
    found, info = dt.train(
        network, open_laplacian, data, callback=lambda *now: seen.append(now) or now[0] == 6, **settings
    )
    assert (info.steps, info.stopped) == (6, "callback")
    assert [(step, loss) for step, loss, _ in seen] == [(3, info.losses[2]), (6, info.losses[5])]
    assert same(seen[-1][2], found)
    assert "6/9" in console.export_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"chunk": 0}, "chunk 0"),
        ({"batch": 13}, "batch is 13"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 4, "at_once": 3}, "at_once is 3; expected a divisor of batch = 4"),
        ({"data": (jnp.ones((3, 16)), jnp.ones((4, 16)))}, r"shapes \[\(3, 16\), \(4, 16\)\]"),
    ],
)
def test_training_names_bad_input(problem, change, message):
    network, data = problem
    arguments = {"data": data, "key": jax.random.key(0), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        dt.train(network, open_laplacian, **arguments)


# --- the shipped weights ---


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_training_domain_is_one_shape_at_all_sizes(dimensions):
    coarse, fine = dt.training_domain(8, dimensions), dt.training_domain(32, dimensions)
    assert coarse.edges == fine.edges == ((SOLID, SOLID),) * (dimensions - 1) + ((SOLID, AIR),)
    assert coarse.closed == fine.closed == 0
    solid = np.asarray(fine.cells) == SOLID
    assert 0.005 < solid.mean() < 0.3
    coarse_solid = np.asarray(coarse.cells) == SOLID
    blocks = solid.reshape([part for _ in range(dimensions) for part in (8, 4)])
    blocks = blocks.mean(tuple(range(1, 2 * dimensions, 2)))
    assert coarse_solid[blocks == 1].all()  # its centre lies between those of the fine cells
    assert ((blocks > 0.5) == coarse_solid).mean() > 0.9
    assert (dt.training_domain(32, dimensions, seed=1).cells != fine.cells).any()


@pytest.mark.slow
def test_stages_learn_and_resume(tmp_path):
    """A small version of the command that made the shipped weights: the loss falls, and an interrupted run ends the same."""
    stages = [dt.Stage(8, 40, 4, 5e-3), dt.Stage(12, 2, 2, 1e-3)]
    run = partial(dt.train_stages, 2, vectors=40, checkpoint=tmp_path / "run", seed=3)
    whole, infos = run(stages)
    assert [info.steps for info in infos] == [40, 2]
    assert infos[0].losses[-10:].mean() < 0.8 * infos[0].losses[:3].mean()
    assert whole.rescaled
    (tmp_path / "run.stage1").unlink()
    again, _ = run(stages)
    assert same(whole, again)


def test_the_command_writes_weights_that_say_how(tmp_path, capsys):
    out = tmp_path / "weights.npz"
    arguments = ["--name", "poisson2d", "--stage", "8", "3", "2", "1e-3", "--loss", "residual", "--unit-norm"]
    dt.main([*arguments, "--vectors", "20", "--seed", "5", "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
    assert str(out) in capsys.readouterr().out
    network = dn.load(out)
    assert (network.dimensions, network.rescaled) == (2, False)
    facts = dn.facts(out)["facts"]
    assert facts["command"].startswith("python -m solvers.direction_training --name poisson2d --stage 8 3 2 1e-3")
    assert facts["stages"] == [{"cells": 8, "steps": 3, "batch": 2, "rate": 1e-3}]
    assert (facts["loss"], facts["seed"], len(facts["final_loss"])) == ("residual", 5, 1)
    alone, infos = dt.train_stages(
        2, [dt.Stage(8, 3, 2, 1e-3)], loss=dn.residual_loss, vectors=20, rescaled=False, seed=5
    )
    assert same(network, alone)
    np.testing.assert_allclose(facts["final_loss"], [infos[0].losses[-1]])
