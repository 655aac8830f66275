"""Dale meets Langevin: A Multiplicative Denoising Diffusion Model (Shetty, Prasath, Seelamantula; 2025): its claims.

T1, T2 and T7 are about the equation and its kernel (`kernel`), T5, T6 and T8 about the losses (`losses`), T4, T14 and T15 about
signs (`signs`), T9, T10 and T16 about what the score gives (`flow`), T2b, T3, T11 to T13 and T17 about the discretisations
(`steps`), P about the released code (`released`), E about its experiments (`experiments`).
"""

from paper_checks.gbm_diffusion.common import PAPER
from paper_checks.gbm_diffusion.experiments import digits
from paper_checks.gbm_diffusion.flow import denoisers, flow, terminal
from paper_checks.gbm_diffusion.kernel import kernel, log_space_loss, reverse
from paper_checks.gbm_diffusion.losses import closed_form, denoising, implicit
from paper_checks.gbm_diffusion.released import off_by_one, recipe, start
from paper_checks.gbm_diffusion.signs import mirrored, positive, three_names
from paper_checks.gbm_diffusion.steps import dls_strong, inner_loop, log_drift, reverse_simulated, ums_strong, weak

__all__ = [
    "PAPER",
    "closed_form",
    "denoisers",
    "denoising",
    "digits",
    "dls_strong",
    "flow",
    "implicit",
    "inner_loop",
    "kernel",
    "log_drift",
    "log_space_loss",
    "mirrored",
    "off_by_one",
    "positive",
    "recipe",
    "reverse",
    "reverse_simulated",
    "start",
    "terminal",
    "three_names",
    "ums_strong",
    "weak",
]
