"""Gaussian data, whose probability flow is known in closed form whatever the noising law, even one a coordinate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probgen.processes import VP, Process, over_event

MEAN, SD = 0.7, 0.5


class GaussianData(nn.Module):
    """x_0 ~ N(MEAN, SD^2) in each coordinate: a diffusion with its exact denoiser."""

    def __init__(self, law: Process, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones((), dtype=torch.float64))
        self.law, self.event_shape = law, (size,)

    def model(self, batch: Any) -> None:
        raise NotImplementedError

    def process(self) -> Process:
        return self.law

    def variance(self, t: Tensor) -> Tensor:
        return self.law.alpha(t).square() * SD**2 + self.law.sigma(t).square()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.law.alpha(t)
        gain = over_event(alpha * SD**2 / self.variance(t), x)
        return MEAN + gain * (x - over_event(alpha, x) * MEAN)

    def flow(self, x: Tensor, t_from: float, t_to: float) -> Tensor:
        """Where the probability flow takes x: standardised values stay what they are."""
        first, last = (torch.tensor([t], dtype=torch.float64) for t in (t_from, t_to))
        standard = (x - over_event(self.law.alpha(first), x) * MEAN) / over_event(
            self.variance(first).sqrt(), x
        )
        return (
            over_event(self.law.alpha(last), x) * MEAN + over_event(self.variance(last).sqrt(), x) * standard
        )


@dataclass(frozen=True)
class PerCoordinate(VP):
    """Two coordinates, noised at different speeds."""

    speeds = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def _at_speed(self, t: Tensor) -> Tensor:
        return t[:, None] * self.speeds.to(t)

    def alpha(self, t: Tensor) -> Tensor:
        return VP().alpha(self._at_speed(t))

    def sigma(self, t: Tensor) -> Tensor:
        return VP().sigma(self._at_speed(t))

    def alpha_rate(self, t: Tensor) -> Tensor:
        return VP().alpha_rate(self._at_speed(t)) * self.speeds.to(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return VP().variance_rate(self._at_speed(t)) * self.speeds.to(t)

    def drift(self, t: Tensor) -> Tensor:
        return VP().drift(self._at_speed(t)) * self.speeds.to(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        return VP().diffusion2(self._at_speed(t)) * self.speeds.to(t)
