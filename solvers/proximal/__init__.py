"""Learned proximal networks (Fang, Buchanan, Sulam; ICLR 2024): networks, their priors, their training; and what to compare."""

from solvers.proximal import baselines, denoisers, distributions, matching
from solvers.proximal.bounds import certified
from solvers.proximal.functional import Regularizer
from solvers.proximal.network import LearnedProximal, convolutional, image128, mlp, mnist, projected
from solvers.proximal.prior import Evaluation, LearnedRegularizer, regularizer
from solvers.proximal.training import train
from solvers.proximal.weights import load

__all__ = [
    "Evaluation",
    "LearnedProximal",
    "LearnedRegularizer",
    "Regularizer",
    "baselines",
    "certified",
    "convolutional",
    "denoisers",
    "distributions",
    "image128",
    "load",
    "matching",
    "mlp",
    "mnist",
    "projected",
    "regularizer",
    "train",
]
