"""Programs with their observations: read once, and seen by engines as a density over unconstrained space.

`reading` puts observations into programs, `point` runs a program at a point of unconstrained space, `density` is what
Markov chains move in, by one of the `routes` that take a program from one chain to many.
"""

from probgen.targets.density import Density, density
from probgen.targets.reading import (
    Pair,
    check_event,
    dims,
    frozen,
    named,
    read,
    read_sites,
    restored_store,
    site_dims,
)

__all__ = [
    "Density",
    "Pair",
    "check_event",
    "density",
    "dims",
    "frozen",
    "named",
    "read",
    "read_sites",
    "restored_store",
    "site_dims",
]
