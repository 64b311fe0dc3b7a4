"""The denoising diffusion chain as a hierarchical model/guide pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from probgen.chained import ChainedProgram, ChainTable, LastStep
from probgen.conditioning import Condition
from probgen.core import InputError, Probability, Size, Within, did_you_mean
from probgen.nets import TimeMLP
from probgen.processes import VP, Prediction, Process, denoiser_coefficients, over_event

ReverseVariance = Literal["posterior", "beta", "analytic"]
_VARIANCES: tuple[ReverseVariance, ...] = ("posterior", "beta", "analytic")
_CALIBRATION_ROWS = 8192  # noisy copies of data for the analytic variance, and at least so many a step:
_CALIBRATION_ROWS_PER_STEP = 32
_CHUNK = 1024


class DDPM(ChainedProgram):
    """Denoising diffusion probabilistic model: p(x_T) prod_k p(x_{k-1} | x_k) p(x_0 | x_1), guide q(x_{1:T} | x_0).

    Both run in reverse order, so that every site meets its twin. With abar_k = alpha(k/T)^2,

        ELBO = E log p(x_0 | x_1) - sum_{k=2..T} E KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k))
               - KL(q(x_T | x_0) || N(0, I)),

    where p(x_{k-1} | x_k) has the mean of q(x_{k-1} | x_k, x_0) at x_0 = x0hat(x_k).

    Args:
        network: `net(x, t)`, x `(batch, *event)`, t `(batch,)` in (0, 1] -> `(batch, *event)`; any nn.Module.
        process: variance-preserving noising law, e.g. `VP()`, `CosineVP()`.
        num_steps: T >= 2.
        event_shape: shape of one datum; None takes `network.event_shape`.
        prediction: what the network's output is: "eps", "x0" or "v".
        reverse_variance: "posterior" (beta~_k), "beta" (beta_k), or "analytic", beta~_k + c_0^2 Var[x_0 | x_k]
            (Bao et al. 2022, arXiv 2201.06503), its variance set from data after fitting; the best bound, so default.
        last_step: mean of p(x_0 | x_1) = N(., s^2 I): x_1 itself ("x1") or the network's "x0hat". s is learned, and
            set to its optimum, s^2 = E|x_0 - mean|^2/d, after fitting.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`, for `net(x, t, c)`; None takes
            `network.condition`, if it has one.
        condition_dropout: probability with which a row's condition is dropped in training mode.

    Raises `InputError` for unknown options, T < 2 or a missing event shape.

    Source: Sohl-Dickstein et al. (2015), arXiv 1503.03585; Ho et al. (2020), arXiv 2006.11239.

    >>> ddpm = DDPM(TimeMLP((2,), width=8, num_blocks=1), num_steps=10)
    >>> from probgen import Ancestral, infer
    >>> infer(ddpm, Ancestral(), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "density bounded (ELBO term by term); very flexible"
    gives_up: ClassVar[str] = "one network call a step to draw; no low-dimensional latent"

    def __init__(
        self,
        network: nn.Module,
        process: Process = VP(),  # noqa: B008 - frozen
        num_steps: Annotated[int, Within(2, 1_000_000)] = 1000,
        *,
        event_shape: Sequence[Size] | None = None,
        prediction: Prediction = "eps",
        reverse_variance: ReverseVariance = "analytic",
        last_step: LastStep = "x1",
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        if reverse_variance not in _VARIANCES:
            raise InputError(
                f"Unknown reverse_variance {reverse_variance!r}; {did_you_mean(str(reverse_variance), _VARIANCES)}"
            )
        # At times below 1/T the network was never trained: continuous engines stop there.
        process = replace(process, t_min=1 / num_steps)
        super().__init__(
            network,
            process,
            _table(process, prediction, num_steps, reverse_variance),
            torch.ones((), dtype=torch.float64),
            prediction,
            last_step,
            event_shape=event_shape,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        self.reverse_variance: ReverseVariance = reverse_variance
        self.x0_variance: Tensor
        self.register_buffer("x0_variance", torch.zeros(num_steps))

    def _variance(self, at: ChainTable, k: Tensor) -> Tensor:
        if self.reverse_variance != "analytic":
            return at.model_variance
        x0_variance = self.x0_variance[k.to(self.x0_variance.device) - 1].to(at.on_x_0)
        return at.model_variance + at.on_x_0.square() * over_event(x0_variance, at.on_x_0)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set Var[x_0 | x_k] = E|x_0 - x0hat|^2/d of every step and the optimal s, from data x `(n, *event)`."""
        copies = max(_CALIBRATION_ROWS_PER_STEP, _CALIBRATION_ROWS // self.num_steps)
        k = torch.arange(self.num_steps * copies, device=x.device) // copies + 1
        x_0 = x[torch.randint(len(x), k.shape, device=x.device)]
        error = torch.cat(
            [self._denoising_error(*part) for part in zip(x_0.split(_CHUNK), k.split(_CHUNK), strict=True)]
        )
        self.x0_variance.copy_(error.reshape(self.num_steps, copies).mean(1))
        super().calibrate(x)


def _table(
    process: Process, prediction: Prediction, num_steps: int, reverse_variance: ReverseVariance
) -> ChainTable:
    """q(x_{k-1} | x_k, x_0) is the process's own bridge between t = k/T and (k - 1)/T."""
    k = torch.arange(1, num_steps + 1, dtype=torch.float64)
    times, earlier = k / num_steps, (k - 1) / num_steps
    on_x_t, on_x_0, posterior = process.bridge_coefficients(earlier, times)
    ratio = process.alpha(times) / process.alpha(earlier)
    beta = process.sigma(times).square() - ratio.square() * process.sigma(earlier).square()
    return ChainTable(
        times,
        process.alpha(times),
        process.sigma(times),
        on_x_t,
        on_x_0,
        guide_variance=posterior,
        model_variance=beta if reverse_variance == "beta" else posterior,
        **dict(zip(("on_x", "on_output"), denoiser_coefficients(process, prediction, times), strict=True)),
    )


def example() -> DDPM:
    """A small chain on the plane."""
    return DDPM(TimeMLP((2,), width=16, num_blocks=1), num_steps=8)
