"""Programmable variational inference (Becker, Lew et al., PLDI 2024): its claims.

Objectives, guides and models are programs in the public language of `vi`.  What their values and gradients should be comes
from enumeration, quadrature and closed forms (`models`, `common`), which use nothing of `vi`; a negative control is a
tempting mistake, in a program of that language, in a few lines of JAX, or in another library that makes it.
"""

from paper_checks.harness.claim import not_checkable
from paper_checks.programmable_vi.bounds import cone, order_of_bounds, wake_bias, wake_order
from paper_checks.programmable_vi.common import PAPER
from paper_checks.programmable_vi.densities import (
    density_contract,
    density_correct,
    reciprocal_contract,
    sim_correct,
    sim_law,
    sir_contract,
    sir_density,
)
from paper_checks.programmable_vi.gradients import (
    discrete_guide,
    elbo_identity,
    entropy_and_noise,
    exact_at_posterior,
    wake_fixed,
    worked_example,
)
from paper_checks.programmable_vi.grid import hybrid, supported_grid
from paper_checks.programmable_vi.overhead import operations, timing

signal_to_noise = not_checkable(
    PAPER,
    "V14",
    r"The signal-to-noise ratio of the reparameterised IWELBO gradient in $\phi$ falls like $1/\sqrt N$.",
    title="Signal to noise of IWELBO gradients",
    kind="rate",
    reason="recalled from the literature around the paper (Rainforth et al. 2018), with unverified conditions; not checked",
    source="Recalled.",
)

attend_infer_repeat = not_checkable(
    PAPER,
    "E1",
    "Attend, infer, repeat on 50 x 50 images of up to two digits: ENUM, MVD and the hybrid reach a count accuracy of .95 to "
    ".98 after 40 epochs, REINFORCE stays at .28.",
    title="Attend, infer, repeat",
    kind="trained",
    reason="hours of a GPU and 60 000 composed images for every seed and strategy",
    source="The authors' artifact, Table 2 and Figure 7; not run.",
)

__all__ = [
    "PAPER",
    "attend_infer_repeat",
    "cone",
    "density_contract",
    "density_correct",
    "discrete_guide",
    "elbo_identity",
    "entropy_and_noise",
    "exact_at_posterior",
    "hybrid",
    "operations",
    "order_of_bounds",
    "reciprocal_contract",
    "signal_to_noise",
    "sim_correct",
    "sim_law",
    "sir_contract",
    "sir_density",
    "supported_grid",
    "timing",
    "wake_bias",
    "wake_fixed",
    "wake_order",
    "worked_example",
]
