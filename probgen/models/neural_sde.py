"""A latent SDE: the drift learned, the diffusion chosen, as a chain of Euler-Maruyama steps with its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from probgen.chained import ChainedProgram, ChainTable, LastStep
from probgen.conditioning import Condition
from probgen.core import InputError, NonNegative, Probability, Size, Within, shown
from probgen.dynamics import AffineDenoiser, reverse_drift
from probgen.nets import TimeMLP
from probgen.processes import VP, Grid, Prediction, Process, as_grid, denoiser_coefficients

Diffusion = NonNegative | Callable[[Tensor], Tensor]


class NeuralSDE(ChainedProgram):
    """dx = b(x, t) dt + w(t) dW from N(0, sigma(1)^2) at t = 1 back to data at t = 0, b learned and w chosen.

    The guide is the member with the same w of the family that noises x_0 by the process,

        b(x | x_0) = v(x | x_0) - w^2/2 score(x | x_0),    score = (alpha x_0 - x)/sigma^2,
        v = alpha' x_0 + sigma' (x - alpha x_0)/sigma,

    so that by Girsanov's theorem a step costs E |b(x | x_0) - b(x)|^2 dt/(2 w^2) nats, in closed form given x, and its
    weight on |x_0 - x0hat|^2 is alpha^2 (g^2 + w^2)^2/(8 w^2 sigma^4), least at w = g. Both are run as chains of T - 1
    Euler-Maruyama steps from t_max to t_min, x_T to x_1; the bound is one on the law of that chain, and x_k is drawn
    from the chain's own q(x_k | x_0). As b is affine in E[x_0 | x], it is a diffusion as well.

    Args:
        network: b, `net(x, t)`, x `(batch, *event)`, t `(batch,)` -> dx/dt `(batch, *event)`, any nn.Module; with a
            condition `net(x, t, c)`.
        process: the noising law that the guide follows.
        diffusion: w > 0, a number or a function of float64 times `(n,)` -> `(n,)` or `(n, *event)`; None is the
            process's g, for which the guide is the noising law itself, turned round.
        num_steps: T >= 2.
        prediction: "drift" where the network is b itself, or what it predicts instead, b following from it.
        last_step: mean of p(x_0 | x_1) = N(., s^2 I): x_1 itself ("x1") or the network's "x0hat". s is learned, and
            set to its optimum after fitting.
        grid: how steps are spread over time: "uniform", "quadratic", "karras", or a `Grid`.
        event_shape: shape of one datum; None takes `network.event_shape`.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`; None takes `network.condition`, if it has one.
        condition_dropout: probability with which a row's condition is dropped in training mode.

    Raises:
        InputError: a diffusion that is not > 0, steps too long for Euler-Maruyama, T < 2, or unknown options.

    Source: Li et al. (2020), arXiv 2001.01328; Tzen & Raginsky (2019), arXiv 1905.09883; Huang et al. (2021),
    arXiv 2106.02808, for the bound.

    >>> sde = NeuralSDE(TimeMLP((2,), width=8, num_blocks=1), diffusion=lambda t: 2 * t, num_steps=20)
    >>> from probgen import Ancestral, infer
    >>> infer(sde, Ancestral(), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    paper: ClassVar[str] = "Li et al. 2020, arXiv 2001.01328"
    offers: ClassVar[str] = "density bounded step by step (Girsanov); any diffusion; very flexible"
    gives_up: ClassVar[str] = "one network call a step to draw; a looser bound where w differs from g"

    def __init__(
        self,
        network: nn.Module,
        process: Process = VP(),  # noqa: B008 - frozen
        diffusion: Diffusion | None = None,
        num_steps: Annotated[int, Within(2, 1_000_000)] = 100,
        *,
        prediction: Prediction | Literal["drift"] = "drift",
        last_step: LastStep = "x1",
        grid: Grid | str = "quadratic",
        event_shape: Sequence[Size] | None = None,
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        self_predicted = None if prediction == "drift" else prediction
        family = _Family(process, diffusion, self_predicted)
        schedule = as_grid(grid).between(process.t_max, process.t_min, process)
        times = schedule.time(torch.linspace(1, 0, num_steps, dtype=torch.float64))
        super().__init__(
            network,
            process,
            _euler_maruyama(family, times),
            process.terminal_scale(),
            self_predicted,
            last_step,
            event_shape=event_shape,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        self._family = family

    def denoiser_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, b with x0hat = a x_t + b predict(x_t, t), at times `(n,)`."""
        return self._family.denoiser_coefficients(t)


class _Family:
    """The SDEs dx = (A x + B x_0) dt + w dW, dt < 0, that noise x_0 by a process, one for each w."""

    def __init__(self, process: Process, diffusion: Diffusion | None, prediction: Prediction | None) -> None:
        self.process, self.diffusion, self.prediction = process, diffusion, prediction

    def noise2(self, t: Tensor) -> Tensor:
        """w^2 at times `(n,)`."""
        if self.diffusion is None:
            return self.process.diffusion2(t)
        if callable(self.diffusion):
            noise = self.diffusion(t)
            if not isinstance(noise, Tensor | float | int):
                raise InputError(
                    f"NeuralSDE: diffusion must give w at each time, numbers `(n,)`; it gave {shown(noise)}."
                )
            return torch.as_tensor(noise).to(t).square()
        return torch.full_like(t, float(self.diffusion) ** 2)

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and w^2 at times `(n,)`."""
        knows_x_0 = AffineDenoiser(
            lambda x, _: x, lambda s: denoiser_coefficients(self.process, "x0", s), self.process
        )
        return reverse_drift(knows_x_0, t, self.noise2(t))

    def denoiser_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0hat = (b - A x)/B where the network is the drift b, or as its prediction says."""
        if self.prediction is not None:
            return denoiser_coefficients(self.process, self.prediction, t)
        on_x, on_x_0, _ = self.drift(t.double())
        return (-on_x / on_x_0).to(t), (1 / on_x_0).to(t)


def _euler_maruyama(family: _Family, times: Tensor) -> ChainTable:
    """x_{k-1} = x_k - (A x_k + B x_0) dt + w sqrt(dt) z, and the law of x_k given x_0 that follows."""
    drift_on_x, drift_on_x_0, noise2 = family.drift(times)
    if not bool(((noise2 > 0) & noise2.isfinite()).all()):
        raise InputError(
            f"The diffusion of NeuralSDE must be > 0 and finite at all times: its square lies in "
            f"{noise2.min().item():.3g}..{noise2.max().item():.3g} between t = {times[0]:.3g} and {times[-1]:.3g}."
        )
    dt = times.diff(prepend=times[:1]).reshape(-1, *[1] * (noise2.ndim - 1))
    on_x_t, on_x_0, variance = 1 - drift_on_x * dt, -drift_on_x_0 * dt, noise2 * dt
    _check_stable(on_x_t, times)
    on_x_t[0], on_x_0[0], variance[0] = 0.0, 1.0, 0.0  # x_1 is followed by x_0 itself
    alpha, sigma2 = [family.process.alpha(times[-1:])[0]], [family.process.sigma(times[-1:])[0].square()]
    for k in range(len(times) - 1, 0, -1):
        alpha.append(on_x_t[k] * alpha[-1] + on_x_0[k])
        sigma2.append(on_x_t[k].square() * sigma2[-1] + variance[k])
    on_x, on_output = family.denoiser_coefficients(times)
    return ChainTable(
        times,
        torch.stack(alpha[::-1]),
        torch.stack(sigma2[::-1]).sqrt(),
        on_x_t,
        on_x_0,
        guide_variance=variance,
        model_variance=variance,
        on_x=on_x,
        on_output=on_output,
    )


def _check_stable(on_x_t: Tensor, times: Tensor) -> None:
    worst = on_x_t.reshape(len(times), -1).min(1).values
    unstable = (worst < -1).nonzero()
    if unstable.numel():
        k = int(unstable[0])
        raise InputError(
            f"NeuralSDE: its Euler-Maruyama step from t = {times[k]:.4g} to {times[k - 1]:.4g} multiplies x by "
            f"{worst[k].item():.3g}, beyond -1: the chain would blow up. Take more steps, a smaller diffusion there, "
            "or a process whose t_min is larger or whose t_max is smaller."
        )


def example() -> NeuralSDE:
    """A small chain on the plane."""
    return NeuralSDE(TimeMLP((2,), width=16, num_blocks=1), num_steps=12)
