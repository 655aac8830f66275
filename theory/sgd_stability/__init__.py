"""Mean-square stability of SGD at an interpolating minimum: the sharp threshold and the bounds below it.

Lei Wu, Weijie J. Su: The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent,
ICML 2023, arXiv 2305.17490.

Notation.  A (n, p) holds one feature a_i = ∇_θ f(x_i; θ*) per row.  The risk is (1/2n) Σ (f_i - y_i)²; the
factor 1/2 matters: without it every threshold halves.  At an interpolating minimum the Hessian is
H = AᵀA/n (p, p), with the non-zero spectrum of the Gram matrix K = AAᵀ/n (n, n).  Linearised SGD moves the
deviation u = θ - θ* by u ← (I - η A_I) u, where A_I is the mean of a_i a_iᵀ over a random batch.

One line carries the module.  With M(Σ) = (1/n) Σ (a_iᵀΣa_i) a_i a_iᵀ the sampling scheme enters only through
two numbers, E[A_I Σ A_I] = mean·HΣH + noise·M(Σ) =: D(Σ).  With C(Σ) = (HΣ + ΣH)/2, the second moment
Σ = E[uuᵀ] moves by

    T(Σ) = Σ - 2η C(Σ) + η² D(Σ).

T is self-adjoint (Frobenius) and keeps the cone of positive semi-definite matrices, so its spectral radius
is its largest eigenvalue, and ρ(T) ≤ 1 exactly when <Σ, TΣ> ≤ <Σ, Σ> for all symmetric Σ, that is η ≤ η* with

    η* = min over symmetric Σ of  2 Tr(ΣHΣ) / ( mean·Tr(HΣHΣ) + (noise/n) Σ_i (a_iᵀΣa_i)² ).        (*)

Every Σ gives an upper bound of η*: Σ = I the trace and Frobenius bounds, Σ = vvᵀ the bound of gradient
descent.  Everything lives on range(H); in the kernel of H nothing moves.

Where the equations are:

    E[A_I Σ A_I], q of section 4             Sampling, with_replacement, without_replacement, bernoulli
    T(Σ)                                      second_moment_step, spectral_radius
    quotient (*) and its minimiser            stability_quotient, worst_second_moment
    η* = 2 / λmax(C^{+1/2} D C^{+1/2})        threshold_vec (dense oracle), stability_threshold (matrix-free)
    N(η), λmax(N) ≤ 1                         n_form
    μ_0 of the loss alignment                 alignment_infimum
    T1, T2, T3, T4, T6, T7 as bounds of η*    threshold_bounds
    T16, a competing divergence criterion     dexter_threshold
    a_i, K, ∇²R, loss alignment μ(θ)          per_sample_gradients, gram_matrix, hessian_product, loss_alignment
    Tr, |.|_F, λmax; section 7                sharpness, stability_report
    T8, T15 diagonal linear networks          diagonal_linear, diagonal_sharpness, balancedness, balanced_factors
    T10, T11 two-layer ReLU networks          two_layer_relu, path_norm, relu_trace_population, relu_lambda_max_lower
    T12 Rademacher averages                   rademacher_bound_l1, rademacher_l1_draws, and the same with path
    E1, E2, E3, starting points               init_diagonal_linear, init_two_layer_relu, init_unbalanced

Networks are trained by `theory.training`.
"""

from theory.sgd_stability.bounds import (
    ThresholdBounds,
    alignment_infimum,
    alignment_infimum_from_gram,
    dexter_threshold,
    threshold_bounds,
)
from theory.sgd_stability.models import (
    PATH_NORM_CONSTANT,
    balanced_factors,
    balancedness,
    diagonal_linear,
    diagonal_sharpness,
    init_diagonal_linear,
    init_two_layer_relu,
    init_unbalanced,
    path_norm,
    rademacher_bound_l1,
    rademacher_bound_path,
    rademacher_l1_draws,
    rademacher_path_draws,
    relu_lambda_max_lower,
    relu_trace_population,
    two_layer_relu,
)
from theory.sgd_stability.networks import (
    INTERPOLATION_RISK,
    Alignment,
    Sharpness,
    StabilityReport,
    gram_matrix,
    hessian_product,
    loss_alignment,
    per_sample_gradients,
    sharpness,
    stability_report,
)
from theory.sgd_stability.operator import (
    Sampling,
    bernoulli,
    full_batch,
    n_form,
    second_moment_step,
    spectral_radius,
    stability_quotient,
    threshold_vec,
    with_replacement,
    without_replacement,
)
from theory.sgd_stability.threshold import (
    Threshold,
    stability_threshold,
    stability_threshold_from_gram,
    worst_second_moment,
)

__all__ = [
    "INTERPOLATION_RISK",
    "PATH_NORM_CONSTANT",
    "Alignment",
    "Sampling",
    "Sharpness",
    "StabilityReport",
    "Threshold",
    "ThresholdBounds",
    "alignment_infimum",
    "alignment_infimum_from_gram",
    "balanced_factors",
    "balancedness",
    "bernoulli",
    "dexter_threshold",
    "diagonal_linear",
    "diagonal_sharpness",
    "full_batch",
    "gram_matrix",
    "hessian_product",
    "init_diagonal_linear",
    "init_two_layer_relu",
    "init_unbalanced",
    "loss_alignment",
    "n_form",
    "path_norm",
    "per_sample_gradients",
    "rademacher_bound_l1",
    "rademacher_bound_path",
    "rademacher_l1_draws",
    "rademacher_path_draws",
    "relu_lambda_max_lower",
    "relu_trace_population",
    "second_moment_step",
    "sharpness",
    "spectral_radius",
    "stability_quotient",
    "stability_report",
    "stability_threshold",
    "stability_threshold_from_gram",
    "threshold_bounds",
    "threshold_vec",
    "two_layer_relu",
    "with_replacement",
    "without_replacement",
    "worst_second_moment",
]
