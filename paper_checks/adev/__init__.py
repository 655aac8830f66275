"""ADEV (Lew, Huot, Staton and Mansinghka, POPL 2023): its claims about unbiased derivatives of programs.

Every program is written in the public language of `vi` and differentiated by it; what it should give on average comes from
enumeration, Gauss-Hermite quadrature or a closed form.  A negative control is the same program with a tempting mistake
in it, or one of the paper's rules written out by hand with a wrong constant (`rules`).
"""

from paper_checks.adev.common import PAPER
from paper_checks.adev.control_flow import control_flow
from paper_checks.adev.examples import (
    firing_squad,
    indicator,
    recursion,
    rejection_time,
    running_descent,
    running_example,
)
from paper_checks.adev.finite import baseline, enumeration, leave_one_out, mvd_flip, reinforce_variance, terminal_flip
from paper_checks.adev.programs import (
    domination,
    exponential,
    independence,
    main_theorem,
    second_derivatives,
    value_channel,
)
from paper_checks.adev.strategies import (
    implicit,
    mvd_normal,
    reinforce,
    reparam,
    smoothness,
)

__all__ = [
    "PAPER",
    "baseline",
    "control_flow",
    "domination",
    "enumeration",
    "exponential",
    "firing_squad",
    "implicit",
    "independence",
    "indicator",
    "leave_one_out",
    "main_theorem",
    "mvd_flip",
    "mvd_normal",
    "recursion",
    "reinforce",
    "reinforce_variance",
    "rejection_time",
    "reparam",
    "running_descent",
    "running_example",
    "second_derivatives",
    "smoothness",
    "terminal_flip",
    "value_channel",
]
