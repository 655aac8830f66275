"""The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent (Wu and Su, ICML 2023): its claims.

Statements about stability are attacked through the exact threshold eta* of the linearised dynamics, the largest learning
rate that is stable in mean square: a bound "stable at eta implies S <= g(eta)" is true exactly when it holds at eta*.
Inputs are feature matrices A (n, d), one gradient a_i a row, from five families, and gradient ascent moves A
itself.  Worst points of T2, T3, T6, T7 and T16 are re-evaluated by an oracle in 40 digits that shares no code with
`theory.sgd_stability`.
"""

from paper_checks.sgd_stability.alignment import (
    frobenius_bound,
    gaussian_alignment,
    gaussian_range,
)
from paper_checks.sgd_stability.bounds import (
    batch_bound,
    batch_free_trace_bound,
    divergence_criterion,
    exact_threshold,
    gradient_descent,
    order_of_bounds,
    sgd_stable_implies_gd_stable,
    sharpness_of_trace_bound,
    trace_bound,
)
from paper_checks.sgd_stability.experiments import (
    balancing_experiment,
    diagonal_experiment,
    relu_experiment,
    sgd_balances,
    trace_follows_learning_rate,
)
from paper_checks.sgd_stability.inputs import PAPER
from paper_checks.sgd_stability.networks import (
    diagonal_closed_forms,
    diagonal_equivalence,
    gd_is_too_weak,
    gd_path_norm_constant,
    l1_bound,
    l1_rademacher,
    largest_eigenvalue_bound,
    path_norm_bound,
    path_norm_equivalence,
    path_rademacher,
)

__all__ = [
    "PAPER",
    "balancing_experiment",
    "batch_bound",
    "batch_free_trace_bound",
    "diagonal_closed_forms",
    "diagonal_equivalence",
    "diagonal_experiment",
    "divergence_criterion",
    "exact_threshold",
    "frobenius_bound",
    "gaussian_alignment",
    "gaussian_range",
    "gd_is_too_weak",
    "gd_path_norm_constant",
    "gradient_descent",
    "l1_bound",
    "l1_rademacher",
    "largest_eigenvalue_bound",
    "order_of_bounds",
    "path_norm_bound",
    "path_norm_equivalence",
    "path_rademacher",
    "relu_experiment",
    "sgd_balances",
    "sgd_stable_implies_gd_stable",
    "sharpness_of_trace_bound",
    "trace_bound",
    "trace_follows_learning_rate",
]
