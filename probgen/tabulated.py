"""Noising laws as others wrote them down: a function of time, or a table of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from probgen.core import InputError
from probgen.processes import Process


@dataclass(frozen=True)
class Scheduled(Process):
    """alpha and sigma as a function says: schedule(t) -> (alpha, sigma), t `(n,)` float64.

    Args:
        schedule: smooth in t, alpha/sigma falling.

    >>> Scheduled(schedule=lambda t: (1 - t, t), t_max=0.999).sigma(torch.tensor([0.5]))
    tensor([0.5000])
    """

    schedule: Any = None
    paper: ClassVar[str] = "Kingma et al. 2021, arXiv 2107.00630"

    def alpha(self, t: Tensor) -> Tensor:
        return cast(Tensor, self.schedule(t)[0]).expand_as(t)

    def sigma(self, t: Tensor) -> Tensor:
        return cast(Tensor, self.schedule(t)[1]).expand_as(t)


@dataclass(frozen=True)
class Tabulated(Process):
    """Variance preserving, alpha^2 = alphas_cumprod[k] at t = (k + 1)/T; a monotone cubic of log(alpha/sigma) between.

    Args:
        alphas_cumprod: T >= 2 falling values in (0, 1).

    Source: Fritsch & Carlson (1980), doi 10.1137/0717021, for the cubic.

    >>> process = Tabulated.of([0.9, 0.5, 0.1])
    >>> process.alpha(torch.tensor([1 / 3, 1.0], dtype=torch.float64)) ** 2
    tensor([0.9000, 0.1000], dtype=torch.float64)
    """

    alphas_cumprod: tuple[float, ...] = ()
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"

    @staticmethod
    def of(alphas_cumprod: Any) -> Tabulated:
        """The process of a table; values of 0 at its end, which leave no signal, are left out."""
        table = [float(value) for value in alphas_cumprod]
        num_steps = len(table)
        while table and table[-1] <= 0:
            table.pop()
        rising = [k for k in range(1, len(table)) if not table[k] < table[k - 1]]
        if len(table) < 2 or rising or not 0 < table[0] < 1:
            where = f"at step {rising[0]}" if rising else "at its ends"
            raise InputError(
                f"alphas_cumprod must be two or more falling numbers in (0, 1); it is not {where}."
            )
        padded = tuple(table) + (0.0,) * (num_steps - len(table))
        return Tabulated(t_min=1 / num_steps, t_max=len(table) / num_steps, alphas_cumprod=padded)

    def _half_log_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log(alpha/sigma) and its derivative in t."""
        coefficients = self._cubics.to(t.device, torch.float64)
        u = t.double() * len(self.alphas_cumprod) - 1
        k = u.floor().clamp(0, coefficients.shape[1] - 1).long()
        a, b, c, d = coefficients[:, k]
        h = u - k
        value = ((a * h + b) * h + c) * h + d
        return value, ((3 * a * h + 2 * b) * h + c) * len(self.alphas_cumprod)

    @property
    def _cubics(self) -> Tensor:
        """Coefficients of each piece, highest power first, `(4, T - 1)`."""
        found: Tensor | None = self.__dict__.get("_table")
        if found is None:
            from scipy.interpolate import PchipInterpolator

            kept = [value for value in self.alphas_cumprod if value > 0]
            half = [0.5 * (math.log(value) - math.log1p(-value)) for value in kept]
            found = torch.from_numpy(PchipInterpolator(range(len(half)), half).c)
            object.__setattr__(self, "_table", found)
        return found

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._half_log_snr(t)[0]).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._half_log_snr(t)[0]).sqrt().to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        half, rate = self._half_log_snr(t)
        return (torch.sigmoid(2 * half).sqrt() * torch.sigmoid(-2 * half) * rate).to(t.dtype)

    def variance_rate(self, t: Tensor) -> Tensor:
        half, rate = self._half_log_snr(t)
        return (-2 * torch.sigmoid(2 * half) * torch.sigmoid(-2 * half) * rate).to(t.dtype)
