"""Diffusion models, distillation and optimal probability paths, and the data they are tried on.

`gbm_diffusion` is a paper's method and the first module to open; `samplers`, `likelihood`, `lognormal`, `losses`, `nets`,
`training`, `guidance`, `positive`, `exponentiated`, `fidelity` and `weights` go with it.  `data.load` is the one loader.
"""
