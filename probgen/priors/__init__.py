"""A fitted program as a prior: its law as a site, what was observed of it, and how observations guide its draws.

`prior` is the Pyro distribution, `conditioned` reads a program around it, `guidance` approximates p(y | x_t).
"""
