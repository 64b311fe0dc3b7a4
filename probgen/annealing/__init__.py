"""Paths of laws along which runs are annealed: their ends, their moves, and the journey.

`MachinePath` serves Boltzmann machines, `HamiltonianPath` all that has a density over real coordinates: energies, and
the latents of programs with a guide.
"""

from probgen.annealing.bracket import Bracket, collapse, effective_runs, log_mean, log_mean_error
from probgen.annealing.ends import GaussianToEnergy, PriorToPosterior, Start, fitted
from probgen.annealing.hamiltonian import Ends, HamiltonianMoves, HamiltonianPath, Pilot, pilot
from probgen.annealing.machines import MachinePath, Weighed, clamped, near_data, summed_out
from probgen.annealing.path import Journey, Path, resampled, travel

__all__ = [
    "Bracket",
    "Ends",
    "GaussianToEnergy",
    "HamiltonianMoves",
    "HamiltonianPath",
    "Journey",
    "MachinePath",
    "Path",
    "Pilot",
    "PriorToPosterior",
    "Start",
    "Weighed",
    "clamped",
    "collapse",
    "effective_runs",
    "fitted",
    "log_mean",
    "log_mean_error",
    "near_data",
    "pilot",
    "resampled",
    "summed_out",
    "travel",
]
