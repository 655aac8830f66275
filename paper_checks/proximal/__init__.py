"""What's in a Prior? Learned Proximal Networks for Inverse Problems (Fang, Buchanan, Sulam; ICLR 2024): its claims.

P1 to P14 are about the network and the function of which it is the proximal map (`networks`, `regularity`, `priors`), T1 and T2
about the loss that it is trained with and what that aims at (`matching`, `schedules`, `targets`), T3 and T4 about the iterations
that it is used in (`splitting`, `fixed_points`), E about the paper's experiments (`experiments`).
"""

from paper_checks.proximal.common import PAPER
from paper_checks.proximal.experiments import digits, faces, laplace, tomography
from paper_checks.proximal.fixed_points import released, weight
from paper_checks.proximal.matching import (
    exact_bias,
    finite_width,
    large_widths,
    limit,
    prior_bias,
    small_widths,
    stays_proximal,
)
from paper_checks.proximal.networks import exactly_proximal, formula, gradients, inexact
from paper_checks.proximal.priors import added, envelope, expressivity, floor, inequalities, patches, scaled
from paper_checks.proximal.regularity import coercivity, constants, smoothness, weak_convexity
from paper_checks.proximal.schedules import matched_prior, published_widths, warm_start
from paper_checks.proximal.splitting import admm_converges, descent_converges, local_law, splitting_converges
from paper_checks.proximal.targets import exact_targets, gaussian, other_losses

__all__ = [
    "PAPER",
    "added",
    "admm_converges",
    "coercivity",
    "constants",
    "descent_converges",
    "digits",
    "envelope",
    "exact_bias",
    "exact_targets",
    "exactly_proximal",
    "expressivity",
    "faces",
    "finite_width",
    "floor",
    "formula",
    "gaussian",
    "gradients",
    "inequalities",
    "inexact",
    "laplace",
    "large_widths",
    "limit",
    "local_law",
    "matched_prior",
    "other_losses",
    "patches",
    "prior_bias",
    "published_widths",
    "released",
    "scaled",
    "small_widths",
    "smoothness",
    "splitting_converges",
    "stays_proximal",
    "tomography",
    "warm_start",
    "weak_convexity",
    "weight",
]
