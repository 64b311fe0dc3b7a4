"""Inference engines: how to draw from a program, one a file."""

from probgen.inference.ancestral import Ancestral
from probgen.inference.guide import Guide
from probgen.inference.nuts import NUTS
from probgen.inference.probability_flow_ode import ProbabilityFlowODE
from probgen.inference.reverse_sde import ReverseSDE
from probgen.inference.svi import SVI

__all__ = ["NUTS", "SVI", "Ancestral", "Guide", "ProbabilityFlowODE", "ReverseSDE"]
