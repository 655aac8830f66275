"""Grids that are split over several devices: the same answer as on one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from solvers import gallery, poisson

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
from solvers import gallery, multigrid, poisson
domain = gallery.random_blobs(16, seed=3)
rhs = jnp.asarray(gallery.plume(domain))
alone, one = poisson.solve(domain, rhs, rtol=1e-8)
for shape, names, axes in (((8,), ("x",), ("x", None, None)), ((2, 4), ("x", "y"), ("x", "y", None))):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)
    there, right = (poisson.sharded(v, mesh, axes) for v in (domain, rhs))
    pressure, info = poisson.solve(there, right, rtol=1e-8)
    assert len(pressure.sharding.device_set) == 8 and not pressure.is_fully_replicated
    assert int(info.steps) == int(one.steps) and bool(info.converged)
    print(float(jnp.abs(pressure - alone).max() / jnp.abs(alone).max()))
try:
    poisson.sharded(jnp.zeros((8, 6)), mesh, ("x", "y"))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_eight_devices_give_the_answer_of_one() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *differences, uneven = done.stdout.splitlines()
    assert len(differences) == 2
    # Sums in another order, in a float32 cycle whose errors the float64 iteration corrects to 1e-8.
    assert max(map(float, differences)) < 1e-7
    assert uneven == "x: 6 cells do not split evenly over the 4 devices of 'y'"


def test_what_cannot_be_split_is_said() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    domain = gallery.box(4)
    assert poisson.sharded(domain, mesh, ("x", None, None)).spacing == domain.spacing
    with pytest.raises(ValueError, match=r"axis_names: are \['x'\], expected one for each axis"):
        poisson.sharded(domain, mesh, ("x",))
