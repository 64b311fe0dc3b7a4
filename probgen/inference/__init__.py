"""Inference engines: how to draw from a program, one a file."""

from probgen.inference.ancestral import Ancestral
from probgen.inference.annealed_langevin import AnnealedLangevin
from probgen.inference.ddim import DDIM
from probgen.inference.dpm_solver import DPMSolver
from probgen.inference.flow_sde import FlowSDE
from probgen.inference.guide import Guide
from probgen.inference.nuts import NUTS
from probgen.inference.predictor_corrector import PredictorCorrector
from probgen.inference.probability_flow_ode import ProbabilityFlowODE
from probgen.inference.reverse_sde import ReverseSDE
from probgen.inference.svi import SVI

__all__ = [
    "DDIM",
    "NUTS",
    "SVI",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "FlowSDE",
    "Guide",
    "PredictorCorrector",
    "ProbabilityFlowODE",
    "ReverseSDE",
]
