"""Programs: one generative model a file, each a joint density p(x, z)."""

from probgen.models.boltzmann_machine import BoltzmannMachine
from probgen.models.conditional_vae import ConditionalVAE, SemiSupervisedVAE
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.ddpm import DDPM
from probgen.models.deep_belief_net import DeepBeliefNet
from probgen.models.deep_boltzmann_machine import DeepBoltzmannMachine
from probgen.models.ebm import EBM
from probgen.models.empirical import Empirical
from probgen.models.energy import Energy
from probgen.models.flow_matching import FlowMatching
from probgen.models.gaussian_chain import GaussianChain
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.ncsn import NCSN
from probgen.models.neural_sde import NeuralSDE
from probgen.models.pretrained import Pretrained, load_network
from probgen.models.rbm import RBM, GaussianRBM, TwinRBM
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
    "EBM",
    "NCSN",
    "RBM",
    "VAE",
    "BernoulliLikelihood",
    "BoltzmannMachine",
    "ConditionalVAE",
    "ConjugateGaussian",
    "DeepBeliefNet",
    "DeepBoltzmannMachine",
    "Empirical",
    "Energy",
    "FlowMatching",
    "GaussianChain",
    "GaussianLikelihood",
    "GaussianMixture",
    "GaussianRBM",
    "MixturePrior",
    "NeuralSDE",
    "Pretrained",
    "Score",
    "ScoreSDE",
    "SemiSupervisedVAE",
    "StandardNormalPrior",
    "TwinRBM",
    "gaussian_posterior",
    "load_network",
    "point_posterior",
]
