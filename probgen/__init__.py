"""probgen: deep generative models as Pyro programs, inference engines swapped by one argument.

A *program* is a joint density with its guide; *fitting* minimises an *objective*; an *engine* draws from a program
given what was observed; a *posterior* is those draws, judged through ArviZ; an *estimate* is a log-likelihood with
its error. Names are loaded when first used, so that importing probgen costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "core": [
        "Batch",
        "DamagedFile",
        "DataSets",
        "Estimate",
        "FileError",
        "InputError",
        "Posterior",
        "ProbgenError",
        "UnsupportedError",
    ],
    "fitting": ["History", "Optim", "fit"],
    "targets": ["Pair"],
    "verbs": ["infer"],
    "kernels.state": ["ChainState"],
    "kernels.streaming": ["moments"],
    "processes": ["EDM", "OU", "VE", "VP", "CosineVP", "Karras", "OTPath", "Power", "SubVP"],
    "nets": ["MLP", "TimeMLP", "UNet"],
    "data": ["Quantised", "digits"],
    "data_files": ["Table", "read_data"],
    "devices": ["Devices"],
    "saving": ["load", "save"],
    "arviz_io": ["to_arviz"],
    "conditioning": ["Labels", "Vector"],
    "distributions": ["FlowLaw"],
    "priors.prior": ["Prior"],
    "priors.guidance": ["Jensen", "PiGDM"],
    "priors.dps": ["DPS"],
    "priors.moment_matching": ["MomentMatching"],
    "priors.classifier": ["ClassifierGuidance"],
    "priors.classifier_free": ["ClassifierFree"],
    "priors.noise_space": ["NoiseSpace"],
    "priors.noise_aware": ["NoiseAware"],
    "greedy": ["pretrain"],
    "annealing": ["HamiltonianMoves"],
    "moves": ["GibbsMoves", "LangevinMoves"],
    "models": [
        "DDPM",
        "EBM",
        "RBM",
        "VAE",
        "BoltzmannMachine",
        "ConditionalVAE",
        "ConjugateGaussian",
        "DeepBeliefNet",
        "DeepBoltzmannMachine",
        "Empirical",
        "GaussianChain",
        "Energy",
        "GaussianMixture",
        "GaussianRBM",
        "TwinRBM",
        "Score",
        "SemiSupervisedVAE",
        "FlowMatching",
        "NCSN",
        "NeuralSDE",
        "Pretrained",
        "ScoreSDE",
        "load_network",
    ],
    "objectives": [
        "ELBO",
        "IWAE",
        "ConditionalFlowMatching",
        "ContrastiveDivergence",
        "DenoisingScoreMatching",
        "ExplicitScoreMatching",
        "ImplicitScoreMatching",
        "NoiseContrastive",
        "PersistentContrastiveDivergence",
        "SimpleLoss",
        "SlicedScoreMatching",
        "SmoothedScoreMatching",
    ],
    "inference": [
        "DDIM",
        "NUTS",
        "SVI",
        "Ancestral",
        "DPMSolver",
        "Gibbs",
        "Guide",
        "GuidedODE",
        "GuidedSDE",
        "SplitGibbs",
        "TwistedSMC",
        "ProbabilityFlowODE",
        "ReverseSDE",
        "SDEdit",
        "AnnealedLangevin",
        "FlowSDE",
        "PredictorCorrector",
        "HMC",
        "MALA",
        "SGLD",
        "ULA",
        "ChEES",
        "ConstantSGD",
        "ParallelTempering",
        "UnderdampedLangevin",
    ],
    "evidence": ["AIS", "ELBOEstimate", "Enumeration", "ImportanceWeighted", "ODELikelihood", "SMCEvidence"],
    "diagnostics": [
        "agree",
        "c2st",
        "coverage",
        "fokker_planck",
        "frechet_distance",
        "lipschitz",
        "loo",
        "predict",
        "roc",
        "sbc",
        "summary",
        "tarp",
    ],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
_FOLDERS = ("evidence",)  # a folder that is also a verb

__all__ = sorted([*_MODULE, *_FOLDERS])  # noqa: PLE0605

if TYPE_CHECKING:
    from probgen.annealing import HamiltonianMoves as HamiltonianMoves
    from probgen.arviz_io import to_arviz as to_arviz
    from probgen.conditioning import Labels as Labels
    from probgen.conditioning import Vector as Vector
    from probgen.core import (
        Batch as Batch,
    )
    from probgen.core import DamagedFile as DamagedFile
    from probgen.core import DataSets as DataSets
    from probgen.core import (
        Estimate as Estimate,
    )
    from probgen.core import FileError as FileError
    from probgen.core import (
        InputError as InputError,
    )
    from probgen.core import (
        Posterior as Posterior,
    )
    from probgen.core import (
        ProbgenError as ProbgenError,
    )
    from probgen.core import (
        UnsupportedError as UnsupportedError,
    )
    from probgen.data import Quantised as Quantised
    from probgen.data import digits as digits
    from probgen.data_files import Table as Table
    from probgen.data_files import read_data as read_data
    from probgen.devices import Devices as Devices
    from probgen.diagnostics import (
        agree as agree,
    )
    from probgen.diagnostics import c2st as c2st
    from probgen.diagnostics import coverage as coverage
    from probgen.diagnostics import (
        fokker_planck as fokker_planck,
    )
    from probgen.diagnostics import (
        frechet_distance as frechet_distance,
    )
    from probgen.diagnostics import (
        lipschitz as lipschitz,
    )
    from probgen.diagnostics import (
        loo as loo,
    )
    from probgen.diagnostics import (
        predict as predict,
    )
    from probgen.diagnostics import roc as roc
    from probgen.diagnostics import sbc as sbc
    from probgen.diagnostics import (
        summary as summary,
    )
    from probgen.diagnostics import tarp as tarp
    from probgen.distributions import FlowLaw as FlowLaw
    from probgen.evidence import AIS as AIS
    from probgen.evidence import ELBOEstimate as ELBOEstimate
    from probgen.evidence import Enumeration as Enumeration
    from probgen.evidence import ImportanceWeighted as ImportanceWeighted
    from probgen.evidence import ODELikelihood as ODELikelihood
    from probgen.evidence import SMCEvidence as SMCEvidence
    from probgen.fitting import History as History
    from probgen.fitting import Optim as Optim
    from probgen.fitting import fit as fit
    from probgen.greedy import pretrain as pretrain
    from probgen.inference import (
        DDIM as DDIM,
    )
    from probgen.inference import HMC as HMC
    from probgen.inference import MALA as MALA
    from probgen.inference import (
        NUTS as NUTS,
    )
    from probgen.inference import SGLD as SGLD
    from probgen.inference import (
        SVI as SVI,
    )
    from probgen.inference import ULA as ULA
    from probgen.inference import (
        Ancestral as Ancestral,
    )
    from probgen.inference import AnnealedLangevin as AnnealedLangevin
    from probgen.inference import ChEES as ChEES
    from probgen.inference import ConstantSGD as ConstantSGD
    from probgen.inference import (
        DPMSolver as DPMSolver,
    )
    from probgen.inference import FlowSDE as FlowSDE
    from probgen.inference import Gibbs as Gibbs
    from probgen.inference import (
        Guide as Guide,
    )
    from probgen.inference import GuidedODE as GuidedODE
    from probgen.inference import GuidedSDE as GuidedSDE
    from probgen.inference import ParallelTempering as ParallelTempering
    from probgen.inference import PredictorCorrector as PredictorCorrector
    from probgen.inference import (
        ProbabilityFlowODE as ProbabilityFlowODE,
    )
    from probgen.inference import (
        ReverseSDE as ReverseSDE,
    )
    from probgen.inference import SDEdit as SDEdit
    from probgen.inference import SplitGibbs as SplitGibbs
    from probgen.inference import TwistedSMC as TwistedSMC
    from probgen.inference import UnderdampedLangevin as UnderdampedLangevin
    from probgen.kernels.state import ChainState as ChainState
    from probgen.kernels.streaming import moments as moments
    from probgen.models import (
        DDPM as DDPM,
    )
    from probgen.models import EBM as EBM
    from probgen.models import NCSN as NCSN
    from probgen.models import RBM as RBM
    from probgen.models import (
        VAE as VAE,
    )
    from probgen.models import BoltzmannMachine as BoltzmannMachine
    from probgen.models import (
        ConditionalVAE as ConditionalVAE,
    )
    from probgen.models import (
        ConjugateGaussian as ConjugateGaussian,
    )
    from probgen.models import DeepBeliefNet as DeepBeliefNet
    from probgen.models import DeepBoltzmannMachine as DeepBoltzmannMachine
    from probgen.models import (
        Empirical as Empirical,
    )
    from probgen.models import Energy as Energy
    from probgen.models import FlowMatching as FlowMatching
    from probgen.models import (
        GaussianChain as GaussianChain,
    )
    from probgen.models import (
        GaussianMixture as GaussianMixture,
    )
    from probgen.models import GaussianRBM as GaussianRBM
    from probgen.models import NeuralSDE as NeuralSDE
    from probgen.models import Pretrained as Pretrained
    from probgen.models import Score as Score
    from probgen.models import ScoreSDE as ScoreSDE
    from probgen.models import (
        SemiSupervisedVAE as SemiSupervisedVAE,
    )
    from probgen.models import TwinRBM as TwinRBM
    from probgen.models import load_network as load_network
    from probgen.moves import GibbsMoves as GibbsMoves
    from probgen.moves import LangevinMoves as LangevinMoves
    from probgen.nets import MLP as MLP
    from probgen.nets import TimeMLP as TimeMLP
    from probgen.nets import UNet as UNet
    from probgen.objectives import ELBO as ELBO
    from probgen.objectives import IWAE as IWAE
    from probgen.objectives import ConditionalFlowMatching as ConditionalFlowMatching
    from probgen.objectives import ContrastiveDivergence as ContrastiveDivergence
    from probgen.objectives import DenoisingScoreMatching as DenoisingScoreMatching
    from probgen.objectives import ExplicitScoreMatching as ExplicitScoreMatching
    from probgen.objectives import ImplicitScoreMatching as ImplicitScoreMatching
    from probgen.objectives import NoiseContrastive as NoiseContrastive
    from probgen.objectives import PersistentContrastiveDivergence as PersistentContrastiveDivergence
    from probgen.objectives import SimpleLoss as SimpleLoss
    from probgen.objectives import SlicedScoreMatching as SlicedScoreMatching
    from probgen.objectives import SmoothedScoreMatching as SmoothedScoreMatching
    from probgen.priors.classifier import ClassifierGuidance as ClassifierGuidance
    from probgen.priors.classifier_free import ClassifierFree as ClassifierFree
    from probgen.priors.dps import DPS as DPS
    from probgen.priors.guidance import Jensen as Jensen
    from probgen.priors.guidance import PiGDM as PiGDM
    from probgen.priors.moment_matching import MomentMatching as MomentMatching
    from probgen.priors.noise_aware import NoiseAware as NoiseAware
    from probgen.priors.noise_space import NoiseSpace as NoiseSpace
    from probgen.priors.prior import Prior as Prior
    from probgen.processes import EDM as EDM
    from probgen.processes import OU as OU
    from probgen.processes import VE as VE
    from probgen.processes import VP as VP
    from probgen.processes import CosineVP as CosineVP
    from probgen.processes import Karras as Karras
    from probgen.processes import OTPath as OTPath
    from probgen.processes import Power as Power
    from probgen.processes import SubVP as SubVP
    from probgen.saving import load as load
    from probgen.saving import save as save
    from probgen.targets import Pair as Pair
    from probgen.verbs import evidence as evidence
    from probgen.verbs import infer as infer


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"probgen.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module 'probgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"probgen.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
