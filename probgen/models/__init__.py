"""Programs: one generative model a file, each a joint density p(x, z)."""

from probgen.models.conditional_vae import ConditionalVAE, SemiSupervisedVAE
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.ddpm import DDPM
from probgen.models.gaussian_chain import GaussianChain
from probgen.models.gaussian_mixture import GaussianMixture
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
    "VAE",
    "BernoulliLikelihood",
    "ConditionalVAE",
    "ConjugateGaussian",
    "GaussianChain",
    "GaussianLikelihood",
    "GaussianMixture",
    "MixturePrior",
    "SemiSupervisedVAE",
    "StandardNormalPrior",
    "gaussian_posterior",
    "point_posterior",
]
