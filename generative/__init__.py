"""Diffusion models, distillation and optimal probability paths, and the data they are tried on.

Public so far: `generative.data.load`, the one loader of image data.
"""
