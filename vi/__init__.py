"""Programmable variational inference: objectives as programs, with unbiased gradients derived from the program.

expectation, sample, vmap, batch, continuous, random_key    a function's expectation, and random choices inside it
reparam, implicit, reinforce, enum, mvd                     the gradient estimator of a choice
sim, log_density                                            NumPyro programs: drawn with their density, and scored
marginal, normalize, importance, log_normalizer             programs whose density is estimated without bias
elbo, iwelbo, ...                                           objectives, each a few lines of the above
fit, gradient_report                                        optimisation; which estimator to choose
"""

from vi.errors import AddressError, StrategyError, SupportError
from vi.expectation import Expectation, batch, continuous, expectation, random_key, sample, vmap
from vi.fit import FitInfo, fit
from vi.gradient_report import GradientReport, gradient_report
from vi.inference import importance, log_normalizer, marginal, normalize
from vi.objectives import (
    diwhvi,
    dreg_iwelbo,
    elbo,
    forward_kl,
    hvi,
    iwelbo,
    iwhvi,
    renyi,
    sleep,
    symmetric_kl,
    vimco,
    wake_phi,
    wake_theta,
)
from vi.programs import log_density, sim
from vi.strategies import enum, implicit, mvd, reinforce, reparam
from vi.traces import Trace

__all__ = [
    "AddressError",
    "Expectation",
    "FitInfo",
    "GradientReport",
    "StrategyError",
    "SupportError",
    "Trace",
    "batch",
    "continuous",
    "diwhvi",
    "dreg_iwelbo",
    "elbo",
    "enum",
    "expectation",
    "fit",
    "forward_kl",
    "gradient_report",
    "hvi",
    "implicit",
    "importance",
    "iwelbo",
    "iwhvi",
    "log_density",
    "log_normalizer",
    "marginal",
    "mvd",
    "normalize",
    "random_key",
    "reinforce",
    "renyi",
    "reparam",
    "sample",
    "sim",
    "sleep",
    "symmetric_kl",
    "vimco",
    "vmap",
    "wake_phi",
    "wake_theta",
]
