"""The oracle: eta* and whole violations in 40 digits, sharing no code with `theory.sgd_stability`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from paper_checks.sgd_stability.inputs import BERNOULLI, WITHOUT_REPLACEMENT, Problem

DIGITS = 40


def in_digits(violation: Callable[..., Any]) -> Callable[..., float]:
    """Evaluate a violation in 40 digits: arrays and constants arrive as mpmath numbers, the result leaves as a float.

    The wrapped function takes (a, mean, noise, batch, *constants) with a (n, d) an object array.
    """

    @functools.wraps(violation)
    def high(problem: Problem, *constants: Any) -> float:
        import mpmath as mp

        with mp.workdps(DIGITS):
            mean, noise = exact_sampling(problem)
            exact = [c if isinstance(c, bool) else mp.mpf(float(c)) for c in constants]
            return float(violation(to_digits(problem.features), mean, noise, int(problem.batch), *exact))

    return high


def to_digits(a: Any) -> np.ndarray:
    import mpmath as mp

    return np.vectorize(mp.mpf, otypes=[object])(np.asarray(a, float))


def exact_sampling(problem: Problem) -> tuple[Any, Any]:
    """(mean, noise) of the scheme by the formulas of the sheet, as exact fractions in 40 digits."""
    import mpmath as mp

    n, batch = len(problem.features), mp.mpf(int(problem.batch))
    if int(problem.scheme) == BERNOULLI:
        return mp.mpf(1), 1 / batch - mp.mpf(1) / n
    noise = (n - batch) / (batch * max(n - 1, 1)) if int(problem.scheme) == WITHOUT_REPLACEMENT else 1 / batch
    return 1 - noise, noise


def spectrum(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric object array."""
    import mpmath as mp

    values, vectors = mp.eigsy(mp.matrix(matrix.tolist()))
    size = len(values)
    return (
        np.array([values[i] for i in range(size)], object),
        np.array([[vectors[i, j] for j in range(size)] for i in range(size)], object),
    )


def smaller_gram(a: np.ndarray) -> np.ndarray:
    """H or K, whichever is smaller; both have the same non-zero spectrum."""
    n, d = a.shape
    return (a.T @ a if d <= n else a @ a.T) / n


def top(a: np.ndarray) -> Any:
    """lambda_max(H)."""
    return spectrum(smaller_gram(a))[0][-1]


def threshold(a: np.ndarray, mean: Any, noise: Any) -> Any:
    """eta*: power iteration for C^{-1} D, started from a dense solution in 64 bits.

    The value is the quotient 2 Tr(S H S) / (mean Tr(H S H S) + noise/n sum (a_i' S a_i)^2), whose error is the square of that
    of S.  Needs mpmath's precision to be set by the caller (`in_digits`).
    """
    import mpmath as mp

    n, d = a.shape
    lam, basis = spectrum(smaller_gram(a))
    keep = [i for i, v in enumerate(lam) if v > lam[-1] * mp.mpf(10) ** (-DIGITS // 2)]
    lam, basis = lam[keep], basis[:, keep]
    b = a @ basis if d <= n else basis * np.array([mp.sqrt(n * v) for v in lam], object)
    c = (lam[:, None] + lam[None]) / 2
    hh = lam[:, None] * lam[None]

    def d_of(s: np.ndarray) -> np.ndarray:
        forms = ((b @ s) * b).sum(1)
        return mean * hh * s + noise * (b.T * forms) @ b / n

    s = to_digits(_dense_minimiser(b.astype(float), lam.astype(float), float(mean), float(noise)))
    for _ in range(12):
        s = d_of(s) / c
        s = s / np.abs(s).max()
    return 2 * (s * s * c).sum() / (s * d_of(s)).sum()


def _dense_minimiser(b: np.ndarray, lam: np.ndarray, mean: float, noise: float) -> np.ndarray:
    """The worst second moment S in eigen-coordinates, by a dense symmetric eigenproblem of size r^2 in 64 bits."""
    n, r = b.shape
    c = ((lam[:, None] + lam[None]) / 2).ravel()
    outer = (b[:, :, None] * b[:, None, :]).reshape(n, r * r)
    dense = np.diag(mean * np.outer(lam, lam).ravel()) + noise / n * outer.T @ outer
    _, vectors = np.linalg.eigh(dense / np.sqrt(np.outer(c, c)))
    return (vectors[:, -1] / np.sqrt(c)).reshape(r, r)
