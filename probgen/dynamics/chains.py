"""Chains x <- A x + B output + S z, one network call a row: the tables of engines that step from level to level.

A row is first written in terms of the denoiser, on (x, x0hat), where ancestral, reverse-diffusion and Langevin steps
are a line each, and then in terms of what the network itself puts out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import ReverseChain
from probgen.dynamics.fields import AffineDenoiser, Output
from probgen.processes import Process
from probgen.randomness import Noise


class Moves(NamedTuple):
    """x <- on_x x + on_x0hat x0hat + scale z at times `(n,)`; the factors `(n,)` or `(n, *event)`, float64."""

    times: Tensor
    on_x: Tensor
    on_x0hat: Tensor
    scale: Tensor


def ancestral_moves(process: Process, t: Tensor, s: Tensor) -> Moves:
    """From t to s < t by q(x_s | x_t, x_0 = x0hat) (Ho et al. 2020, arXiv 2006.11239)."""
    on_x, on_x0hat, variance = process.bridge_coefficients(s, t)
    return Moves(t, on_x, on_x0hat, variance.sqrt())


def reverse_diffusion_moves(process: Process, t: Tensor, s: Tensor) -> Moves:
    """From t to s < t by x_s = (2 - r) x_t + v score + sqrt(v) z, where q(x_t | x_s) = N(r x_s, v).

    The step of the forward chain turned round (Song et al. 2021, arXiv 2011.13456, eq. 46).
    """
    ratio, sigma2 = process.alpha(t) / process.alpha(s), process.sigma(t).square()
    variance = (sigma2 - ratio.square() * process.sigma(s).square()).clamp_min(0)
    return Moves(t, 2 - ratio - variance / sigma2, variance / sigma2 * process.alpha(t), variance.sqrt())


def langevin_moves(process: Process, t: Tensor, step: float) -> Moves:
    """Langevin on p_t: x <- x + h score + sqrt(2 h) z with h = step sigma(t)^2, stable for step < 2."""
    scale = process.sigma(t)
    ones = torch.ones_like(scale)
    return Moves(t, (1 - step) * ones, step * process.alpha(t) * ones, (2 * step) ** 0.5 * scale)


def in_turn(first: Moves, then: Moves, repeats: int) -> Moves:
    """Row k of `first` followed by row k of `then`, `repeats` times."""
    return Moves(
        *(
            torch.cat((one[:, None], other[:, None].expand(-1, repeats, *other.shape[1:])), 1).flatten(0, 1)
            for one, other in zip(first, then, strict=True)
        )
    )


def chain_of(moves: Moves, denoiser: AffineDenoiser) -> ReverseChain:
    """The moves in terms of the network's output, by x0hat = a x + b output."""
    on_x, on_output = denoiser.coefficients(moves.times)
    return ReverseChain(
        moves.times, moves.on_x + moves.on_x0hat * on_x, moves.on_x0hat * on_output, moves.scale
    )


def run_chain(chain: ReverseChain, output: Output, x: Tensor, noise: Noise) -> Tensor:
    """Follow a chain from x `(noise.num_rows, *event)`, which is overwritten; row k has the noise of key k."""

    def rows(factor: Tensor) -> list[Any]:
        return factor.tolist() if factor.ndim == 1 else list(factor.to(x))

    times = list(chain.times.to(x)[:, None])
    noises = noise.each(range(1, len(times) + 1))
    columns = zip(times, rows(chain.on_x), rows(chain.on_output), rows(chain.scale), noises, strict=True)
    for t, on_x, on_output, scale, z in columns:
        predicted = output(x, t) * on_output
        x = x.mul_(on_x).add_(predicted).add_(z.mul_(scale))
    return x
