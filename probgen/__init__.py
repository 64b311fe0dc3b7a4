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
    "core": ["Batch", "Estimate", "InputError", "Posterior", "ProbgenError", "UnsupportedError"],
    "fitting": ["History", "Optim", "fit"],
    "targets": ["Pair"],
    "verbs": ["infer"],
    "processes": ["VP", "CosineVP"],
    "nets": ["MLP", "TimeMLP", "UNet"],
    "data": ["Quantised", "digits"],
    "arviz_io": ["to_arviz"],
    "models": ["DDPM", "VAE", "ConditionalVAE", "ConjugateGaussian", "GaussianChain", "GaussianMixture", "SemiSupervisedVAE"],
    "objectives": ["ELBO", "IWAE", "SimpleLoss"],
    "inference": ["NUTS", "SVI", "Ancestral", "Guide", "ProbabilityFlowODE", "ReverseSDE"],
    "evidence": ["ELBOEstimate", "ImportanceWeighted"],
    "diagnostics": ["agree", "frechet_distance", "loo", "predict", "summary"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
_FOLDERS = ("evidence",)  # a folder that is also a verb

__all__ = sorted([*_MODULE, *_FOLDERS])  # noqa: PLE0605

if TYPE_CHECKING:
    from probgen.arviz_io import to_arviz as to_arviz
    from probgen.core import (
        Batch as Batch,
        Estimate as Estimate,
        InputError as InputError,
        Posterior as Posterior,
        ProbgenError as ProbgenError,
        UnsupportedError as UnsupportedError,
    )
    from probgen.data import Quantised as Quantised, digits as digits
    from probgen.diagnostics import (
        agree as agree,
        frechet_distance as frechet_distance,
        loo as loo,
        predict as predict,
        summary as summary,
    )
    from probgen.evidence import ELBOEstimate as ELBOEstimate, ImportanceWeighted as ImportanceWeighted
    from probgen.fitting import History as History, Optim as Optim, fit as fit
    from probgen.inference import (
        Ancestral as Ancestral,
        Guide as Guide,
        NUTS as NUTS,
        ProbabilityFlowODE as ProbabilityFlowODE,
        ReverseSDE as ReverseSDE,
        SVI as SVI,
    )
    from probgen.models import (
        ConditionalVAE as ConditionalVAE,
        ConjugateGaussian as ConjugateGaussian,
        DDPM as DDPM,
        GaussianChain as GaussianChain,
        GaussianMixture as GaussianMixture,
        SemiSupervisedVAE as SemiSupervisedVAE,
        VAE as VAE,
    )
    from probgen.nets import MLP as MLP, TimeMLP as TimeMLP, UNet as UNet
    from probgen.objectives import ELBO as ELBO, IWAE as IWAE, SimpleLoss as SimpleLoss
    from probgen.processes import CosineVP as CosineVP, VP as VP
    from probgen.targets import Pair as Pair
    from probgen.verbs import infer as infer
    from probgen.verbs import evidence as evidence


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
