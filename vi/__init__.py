"""Programmable variational inference: objectives as programs, with unbiased gradients derived from the program.

Models and guides are NumPyro programs.  Nothing public lives here yet.
"""
