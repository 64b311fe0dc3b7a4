"""Inference engines: how to draw from a program, one a file."""

from probgen.inference.ancestral import Ancestral
from probgen.inference.annealed_langevin import AnnealedLangevin
from probgen.inference.chees import ChEES
from probgen.inference.constant_sgd import ConstantSGD
from probgen.inference.ddim import DDIM
from probgen.inference.dpm_solver import DPMSolver
from probgen.inference.flow_sde import FlowSDE
from probgen.inference.gibbs import Gibbs
from probgen.inference.guide import Guide
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.predictor_corrector import PredictorCorrector
from probgen.inference.probability_flow_ode import ProbabilityFlowODE
from probgen.inference.reverse_sde import ReverseSDE
from probgen.inference.sdedit import SDEdit
from probgen.inference.sgld import SGLD
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.svi import SVI
from probgen.inference.twisted_smc import TwistedSMC
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin

__all__ = [
    "DDIM",
    "HMC",
    "MALA",
    "NUTS",
    "SGLD",
    "SVI",
    "ULA",
    "Ancestral",
    "AnnealedLangevin",
    "ChEES",
    "ConstantSGD",
    "DPMSolver",
    "FlowSDE",
    "Gibbs",
    "Guide",
    "GuidedODE",
    "GuidedSDE",
    "ParallelTempering",
    "PredictorCorrector",
    "ProbabilityFlowODE",
    "ReverseSDE",
    "SDEdit",
    "SplitGibbs",
    "TwistedSMC",
    "UnderdampedLangevin",
]
