"""Programmable variational inference: objectives as programs, with unbiased gradients derived from the program."""

from vi.errors import AddressError, StrategyError, SupportError
from vi.expectation import Expectation, batch, continuous, expectation, random_key, sample, vmap
from vi.strategies import enum, implicit, mvd, reinforce, reparam

__all__ = [
    "AddressError",
    "Expectation",
    "StrategyError",
    "SupportError",
    "batch",
    "continuous",
    "enum",
    "expectation",
    "implicit",
    "mvd",
    "random_key",
    "reinforce",
    "reparam",
    "sample",
    "vmap",
]
