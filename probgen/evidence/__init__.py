"""Estimators of log p(x), one a file, each with its error.

The folder and the verb share a name: the module can be called, so that `probgen.evidence(program, ELBOEstimate(), x)`
works whether or not an estimator was imported from here before.
"""

import sys
from types import ModuleType
from typing import Any

from probgen.core import Estimate
from probgen.evidence.ais import AIS
from probgen.evidence.elbo import ELBOEstimate
from probgen.evidence.enumeration import Enumeration
from probgen.evidence.importance import ImportanceWeighted
from probgen.evidence.ode import ODELikelihood
from probgen.evidence.smc import SMCEvidence
from probgen.verbs import evidence

__all__ = ["AIS", "ELBOEstimate", "Enumeration", "ImportanceWeighted", "ODELikelihood", "SMCEvidence"]


class _Verb(ModuleType):
    """This module, called as `probgen.verbs.evidence`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Estimate:
        return evidence(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
