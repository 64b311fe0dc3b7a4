"""Which sites of a program have the law of a fitted one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine

from probgen.bounds import sample_sites, validation
from probgen.core import Energetic, ScoreOnly, Target
from probgen.priors.prior import Prior
from probgen.randomness import forked_rng
from probgen.targets import frozen, restored_store
from probgen.targets.reading import FlatStart, innermost, with_flat_dtype


def sites_and_laws(target: Target, seed: int = 0) -> dict[str, tuple[dict[str, Any], Any]]:
    """Every sample site as Pyro met it, with its innermost law; other latents are drawn, no `Prior` is."""

    def run(dtype: torch.dtype) -> Any:
        return poutine.trace(FlatStart(dtype)(target.model)).get_trace(*target.args)

    with forked_rng(seed), torch.no_grad(), restored_store(), validation(False):
        trace = with_flat_dtype(target, run)
    return {name: (node, innermost(node["fn"])) for name, node in sample_sites(trace).items()}


def priors_of(target: Target) -> dict[str, Prior]:
    """The laws of fitted programs in a program, by site, those of observed sites too.

    >>> import pyro
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.targets import read
    >>> priors_of(read(lambda: pyro.sample("x", Prior(GaussianMixture.example()))))
    {'x': Prior(GaussianMixture)}
    """
    if isinstance(target.program, (Energetic, ScoreOnly)) and not target.data:
        return {}  # a density, and no program to run
    _ = target.sites  # says what is wrong, where the program fails
    return {name: law for name, (_, law) in sites_and_laws(target).items() if isinstance(law, Prior)}


@contextlib.contextmanager
def frozen_priors(target: Target) -> Iterator[None]:
    """Weights of the fitted programs in a program need no gradients and their layers are in evaluation mode inside."""
    with contextlib.ExitStack() as stack:
        for prior in priors_of(target).values():
            stack.enter_context(frozen(prior.program))
        yield
