"""Small operators that the tests of the learned direction share."""

import jax
import jax.numpy as jnp
import numpy as np


def path_laplacian(v):
    """The chain of cells with a wall at both ends: singular, the constants are its null space."""
    steps = jnp.diff(v)
    return jnp.pad(steps, (1, 0)) - jnp.pad(steps, (0, 1))


def open_laplacian(v):
    """The chain with zero pressure beyond both ends."""
    padded = jnp.pad(v, 1)
    return 2 * v - padded[2:] - padded[:-2]


def dense(operator, n):
    return np.asarray(jax.vmap(operator)(jnp.eye(n)))


def positive(seed, n, condition=50.0):
    """A random symmetric matrix with eigenvalues from 1 to `condition`."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    a = (q * np.geomspace(1, condition, n)) @ q.T
    return (a + a.T) / 2
