"""What's in a Prior? Learned Proximal Networks for Inverse Problems (Fang, Buchanan, Sulam; ICLR 2024): its claims.

P1 to P14 are about the network and the function of which it is the proximal map (`networks`, `priors`), T1 and T2 about the loss
that it is trained with (`matching`), T3 and T4 about the iterations that it is used in (`splitting`), E about the paper's
experiments (`experiments`).
"""

from paper_checks.proximal.common import PAPER
from paper_checks.proximal.networks import (
    coercivity,
    constants,
    exactly_proximal,
    formula,
    gradients,
    inexact,
    smoothness,
    weak_convexity,
)
from paper_checks.proximal.priors import added, envelope, expressivity, floor, inequalities, patches, scaled
from paper_checks.proximal.splitting import (
    admm_converges,
    descent_converges,
    local_law,
    released,
    splitting_converges,
    weight,
)

__all__ = [
    "PAPER",
    "added",
    "admm_converges",
    "coercivity",
    "constants",
    "descent_converges",
    "envelope",
    "exactly_proximal",
    "expressivity",
    "floor",
    "formula",
    "gradients",
    "inequalities",
    "inexact",
    "local_law",
    "patches",
    "released",
    "scaled",
    "smoothness",
    "splitting_converges",
    "weak_convexity",
    "weight",
]
