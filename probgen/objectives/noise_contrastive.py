"""Noise-contrastive estimation: an energy, its normaliser included, by telling data from noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from probgen.core import (
    Batch,
    Count,
    Energetic,
    InputError,
    Within,
    check_fields,
    given,
)
from probgen.noising import admitted


@dataclass(frozen=True)
class NoiseContrastive:
    """-E_data[log sigma(r(x))] - nu E_noise[log sigma(-r(x))] with r(x) = -E(x) - log p_noise(x) - log nu.

    Its minimum over all functions E has exp(-E) = p_data, normalised: a network with a free constant learns log Z too.

    Args:
        noise: the noise's law, any Pyro distribution of the event's shape; None is a Gaussian with the mean and the
            covariance of each batch's data, widened by `widen`.
        ratio: nu, draws of noise a datum, >= 1.
        widen: factor >= 1 on the standard deviations of the Gaussian.

    Source: Gutmann & Hyvärinen (2010), AISTATS.

    >>> from probgen.models.ebm import example
    >>> NoiseContrastive().loss(example(), Batch({"x": torch.randn(50, 2)})).shape
    torch.Size([])
    """

    noise: torch.distributions.Distribution | None = None
    ratio: Count = 1
    widen: Annotated[float, Within(1, 1000)] = 1.2
    needs: ClassVar[tuple[type, ...]] = (Energetic,)
    paper: ClassVar[str] = "Gutmann & Hyvärinen 2010, AISTATS"
    offers: ClassVar[str] = "a normalised energy, without a Markov chain"
    gives_up: ClassVar[str] = "data far from any noise one can write down, images among them"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The logistic loss per row; see `Objective.loss`."""
        seeing, x = admitted(self, program, batch)
        law = self.noise or self._gaussian(x)
        if tuple(law.event_shape) != x.shape[1:]:
            raise InputError(
                f"noise: expected a law of events {tuple(x.shape[1:])}, got {tuple(law.event_shape)}."
            )
        noise = law.sample((len(x) * self.ratio,))
        c = batch.condition
        seen = self._log_odds(seeing, law, x)
        repeated = None if c is None else c.repeat(self.ratio, *[1] * (c.ndim - 1))
        dreamt = self._log_odds(given(program, repeated), law, noise)
        return F.softplus(-seen).mean() + self.ratio * F.softplus(dreamt).mean()

    def _log_odds(self, program: Any, law: Any, x: Tensor) -> Tensor:
        return -program.energy(x) - law.log_prob(x) - math.log(self.ratio)

    def _gaussian(self, x: Tensor) -> Any:
        flat = x.flatten(1)
        centred = flat - flat.mean(0)
        ridge = 1e-3 * flat.var() * torch.eye(flat.shape[1], dtype=x.dtype, device=x.device)
        covariance = self.widen**2 * (centred.mT @ centred / max(len(x) - 1, 1) + ridge)
        law = torch.distributions.MultivariateNormal(flat.mean(0), covariance)
        shape = torch.distributions.transforms.ReshapeTransform(flat.shape[1:], x.shape[1:])
        return torch.distributions.TransformedDistribution(law, [shape])


def example() -> NoiseContrastive:
    """Against a Gaussian like the data."""
    return NoiseContrastive()
