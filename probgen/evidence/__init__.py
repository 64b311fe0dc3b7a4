"""Estimators of log p(x), one a file, each with its error."""

from probgen.evidence.elbo import ELBOEstimate
from probgen.evidence.importance import ImportanceWeighted

__all__ = ["ELBOEstimate", "ImportanceWeighted"]
