"""Objectives: what fitting minimises, one a file."""

from probgen.objectives.elbo import ELBO
from probgen.objectives.iwae import IWAE
from probgen.objectives.simple import SimpleLoss

__all__ = ["ELBO", "IWAE", "SimpleLoss"]
