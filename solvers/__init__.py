"""Solvers learned from data or guided by them: Poisson problems, conjugate directions, proximal networks.

    from solvers import poisson, conjugate_direction, multigrid

Solvers take arrays and return `(solution, info)`.
"""
