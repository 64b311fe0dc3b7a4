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
    "verbs": ["evidence", "infer"],
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

__all__ = sorted(_MODULE)  # noqa: PLE0605

if TYPE_CHECKING:
    from probgen.arviz_io import to_arviz as to_arviz
    from probgen.core import Batch as Batch


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'probgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"probgen.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
