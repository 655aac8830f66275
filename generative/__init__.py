"""Diffusion models, distillation and optimal probability paths, and the data they are tried on.

    from generative import GeometricBrownianMotion, sample, log_likelihood, train

`gbm_diffusion` is a paper's method and the first module to open; `samplers`, `likelihood`, `lognormal`, `losses`, `nets`,
`training`, `guidance`, `positive`, `exponentiated`, `fidelity` and `weights` go with it.  `data.load` is the one loader.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generative.gbm_diffusion import GeometricBrownianMotion
    from generative.likelihood import log_likelihood
    from generative.samplers import sample
    from generative.training import train

__all__ = ["GeometricBrownianMotion", "log_likelihood", "sample", "train"]

_HOMES = {
    "GeometricBrownianMotion": "gbm_diffusion",
    "log_likelihood": "likelihood",
    "sample": "samplers",
    "train": "training",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that this function knows

    def __getattr__(name: str) -> Any:
        """Imported where it is used first: who wants the data alone does not wait for the solvers of differential equations."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
