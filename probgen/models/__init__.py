"""Programs: one generative model a file, each a joint density p(x, z)."""

from probgen.models.conditional_vae import ConditionalVAE, SemiSupervisedVAE
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.ddpm import DDPM
from probgen.models.empirical import Empirical
from probgen.models.energy import Energy
from probgen.models.flow_matching import FlowMatching
from probgen.models.gaussian_chain import GaussianChain
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.ncsn import NCSN
from probgen.models.neural_sde import NeuralSDE
from probgen.models.pretrained import Pretrained, load_network
from probgen.models.score import Score
from probgen.models.score_sde import ScoreSDE
from probgen.models.vae import (
    VAE,
    BernoulliLikelihood,
    GaussianLikelihood,
    MixturePrior,
    StandardNormalPrior,
    gaussian_posterior,
    point_posterior,
)

__all__ = [
    "DDPM",
    "NCSN",
    "VAE",
    "BernoulliLikelihood",
    "ConditionalVAE",
    "ConjugateGaussian",
    "Empirical",
    "Energy",
    "FlowMatching",
    "GaussianChain",
    "GaussianLikelihood",
    "GaussianMixture",
    "MixturePrior",
    "NeuralSDE",
    "Pretrained",
    "Score",
    "ScoreSDE",
    "SemiSupervisedVAE",
    "StandardNormalPrior",
    "gaussian_posterior",
    "load_network",
    "point_posterior",
]
