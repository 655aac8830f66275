"""A Deep Conjugate Direction Method for Iteratively Solving Linear Systems (Kaneda et al., ICML 2023): its claims.

D1 to D14 are what follows from the algorithm for any direction, so that they are checked with random, nonlinear and
adversarial ones: the energy error and conjugacy (`energy`), the gain of one step and its absence (`bounds`), short memory,
locality and 32 bits (`practice`).  P and E are the paper's statements about its trained networks, which are not available:
hand-made directions (`practice`) and networks trained here (`trained`) stand in where that checks a statement.
"""

from paper_checks.conjugate_direction.bounds import (
    contraction,
    loss_bound,
    span_safeguard,
    stagnation,
    switching,
    varying_preconditioner,
)
from paper_checks.conjugate_direction.common import PAPER
from paper_checks.conjugate_direction.energy import (
    conjugate_gradients,
    energy_identity,
    orthogonality,
    residual_rises,
    scale_invariance,
    termination,
)
from paper_checks.conjugate_direction.practice import (
    convergence,
    doubling,
    locality,
    orthogonalisation_helps,
    short_memory,
    single_precision,
)
from paper_checks.conjugate_direction.trained import (
    faster,
    generalisation,
    our_comparison,
    our_domains,
    our_sizes,
    small_and_size_independent,
)

__all__ = [
    "PAPER",
    "conjugate_gradients",
    "contraction",
    "convergence",
    "doubling",
    "energy_identity",
    "faster",
    "generalisation",
    "locality",
    "loss_bound",
    "orthogonalisation_helps",
    "orthogonality",
    "our_comparison",
    "our_domains",
    "our_sizes",
    "residual_rises",
    "scale_invariance",
    "short_memory",
    "single_precision",
    "small_and_size_independent",
    "span_safeguard",
    "stagnation",
    "switching",
    "termination",
    "varying_preconditioner",
]
