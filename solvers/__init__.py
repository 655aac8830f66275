"""Solvers learned from data or guided by them: Poisson problems, conjugate directions, proximal networks.

Solvers take arrays and return `(solution, info)`.  Nothing public lives here yet.
"""
