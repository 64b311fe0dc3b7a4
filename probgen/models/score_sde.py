"""Score-based diffusion in continuous time, with any process and any of six predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pyro
import torch
from torch import Tensor, nn

from probgen.conditioning import Condition
from probgen.core import Batch, Probability, Size
from probgen.denoising import DenoisingProgram
from probgen.distributions import FlowLaw
from probgen.nets import TimeMLP
from probgen.processes import VP, Prediction, Process, over_event


class ScoreSDE(DenoisingProgram):
    """dx = f x dt + g dW from data to noise, drawn backwards with the score of one network.

    The network sees x_t / sqrt(alpha^2 + sigma^2), which has unit size where the data have. As a Pyro program it has
    one site, "x", whose law is that of the probability-flow ODE, `FlowLaw`.

    Args:
        network: `net(x, t)`, x `(batch, *event)`, t `(batch,)` in [0, 1] -> `(batch, *event)`, any nn.Module; with a
            condition `net(x, t, c)`.
        process: any noising law.
        event_shape: shape of one datum; None takes `network.event_shape`.
        prediction: what the network's output is, one of `probgen.processes.PREDICTIONS`. None is "eps" where alpha^2 +
            sigma^2 = 1, and elsewhere "edm", whose errors in x_0 stay of unit size at every noise level.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`; None takes `network.condition`, if it has one.
        condition_dropout: probability with which a row's condition is dropped in training mode.

    Raises:
        InputError: an unknown prediction, no event shape, or a probability out of range.

    Source: Song et al. (2021), arXiv 2011.13456; Karras et al. (2022), arXiv 2206.00364, for the scaling.

    >>> sde = ScoreSDE(TimeMLP((2,), width=8, num_blocks=1))
    >>> from probgen import ReverseSDE, infer
    >>> infer(sde, ReverseSDE(steps=10), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "density by an ODE; very flexible; one fit serves every continuous engine"
    gives_up: ClassVar[str] = "many network calls a draw; no low-dimensional latent"

    def __init__(
        self,
        network: nn.Module,
        process: Process = VP(),  # noqa: B008 - frozen
        *,
        event_shape: Sequence[Size] | None = None,
        prediction: Prediction | None = None,
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        self_scaled = _has_unit_size(process)
        super().__init__(
            network,
            process,
            prediction or ("eps" if self_scaled else "edm"),
            event_shape=event_shape,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        self._scales_input = not self_scaled

    def model(self, batch: Batch) -> Tensor:
        """x ~ p(x | c) for each row, by the probability-flow ODE."""
        with batch.plate():
            return pyro.sample("x", FlowLaw(self, batch.condition))

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's own output: x_t `(batch, *event)`, t `(batch,)` or `(1,)` -> `(batch, *event)`."""
        return super().predict(x_t * self._input_scale(x_t, t) if self._scales_input else x_t, t)

    def _input_scale(self, x_t: Tensor, t: Tensor) -> Tensor:
        variance = self._process.alpha(t).square() + self._process.sigma(t).square()
        return over_event(variance.rsqrt(), x_t)


def _has_unit_size(process: Process) -> bool:
    """Whether alpha^2 + sigma^2 = 1 at all times, looked up and not declared: processes of others need not know."""
    t = torch.linspace(process.t_min, process.t_max, 65, dtype=torch.float64)
    variance = process.alpha(t).square() + process.sigma(t).square()
    return bool((variance - 1).abs().max() < 1e-6)


def example() -> ScoreSDE:
    """A small one on the plane."""
    return ScoreSDE(TimeMLP((2,), width=16, num_blocks=1))
