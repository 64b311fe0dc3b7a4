"""Objectives: what fitting minimises, one a file."""

from probgen.objectives.conditional_flow_matching import ConditionalFlowMatching
from probgen.objectives.contrastive_divergence import ContrastiveDivergence, PersistentContrastiveDivergence
from probgen.objectives.denoising_score_matching import DenoisingScoreMatching
from probgen.objectives.elbo import ELBO
from probgen.objectives.explicit_score_matching import ExplicitScoreMatching
from probgen.objectives.implicit_score_matching import ImplicitScoreMatching
from probgen.objectives.iwae import IWAE
from probgen.objectives.noise_contrastive import NoiseContrastive
from probgen.objectives.simple import SimpleLoss
from probgen.objectives.sliced_score_matching import SlicedScoreMatching
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching

__all__ = [
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
]
