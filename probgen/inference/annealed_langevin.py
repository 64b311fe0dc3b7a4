"""Annealed Langevin dynamics: Langevin steps on the data noised less and less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.core import Count, Diffusion, Levelled, Within, check
from probgen.dynamics import AffineDenoiser, FlowEngine, GaussianInitial
from probgen.dynamics.chains import Moves, chain_of, langevin_moves, run_chain
from probgen.dynamics.fields import Output, Steps
from probgen.processes import Process
from probgen.randomness import Noise


@dataclass(frozen=True)
class _LevelledField:
    """A denoiser, and the times of its levels where it has its own."""

    denoiser: AffineDenoiser
    levels: Tensor | None

    @staticmethod
    def of(program: Diffusion) -> _LevelledField:
        levels = program.levels().double() if isinstance(program, Levelled) else None
        return _LevelledField(AffineDenoiser.of(program), levels)

    def through(self, wrap: Callable[[Output], Output]) -> _LevelledField:
        return replace(self, denoiser=self.denoiser.through(wrap))


@dataclass(frozen=True)
class AnnealedLangevin(FlowEngine):
    """At noise levels sigma_1 > ... > sigma_L, T steps each: x <- x + (alpha_i/2) score + sqrt(alpha_i) z.

    alpha_i = eps sigma_i^2: Song & Ermon's alpha_i = eps' sigma_i^2/sigma_L^2 with eps' = eps sigma_L^2. Their alpha_i
    is twice the step h of Langevin's x + h score + sqrt(2 h) z. Where alpha(t) is not 1 the chain runs on x_t/alpha(t),
    which is x_0 with noise of scale sigma(t)/alpha(t). At the end stands E[x_0 | x].

    The noise of one level has to go at the next: in a direction in which the data vary by s^2, about
    s^2 (2/T eps) (1 - sigma_{i+1}^2/sigma_i^2) of surplus variance is left over.

    Args:
        num_levels: L >= 2, spaced geometrically in sigma/alpha from t_max to t_min; not used for programs that have
            levels of their own, as `NCSN`.
        steps_per_level: T >= 1.
        eps: alpha_i/sigma_i^2, in (0, 4): the steps of pure noise diverge from 4 on; 0.2 in the paper.
        denoise: whether to end in E[x_0 | x] (Jolicoeur-Martineau et al. 2020) or in x, with the last level's noise.
        batch_size, compile: as for every `FlowEngine`.

    Raises:
        InputError: a setting out of range.

    Source: Song & Ermon (2019), arXiv 1907.05600, algorithm 1; Song & Ermon (2020), arXiv 2006.09011;
    Jolicoeur-Martineau et al. (2020), arXiv 2009.05475.

    >>> str(AnnealedLangevin(steps_per_level=3))
    'AnnealedLangevin(steps_per_level=3)'
    """

    num_levels: Annotated[int, Within(2)] = 200
    steps_per_level: Count = 5
    eps: Annotated[float, Within(0, 4, "()", "Langevin steps diverge from 4 on")] = 0.5
    denoise: bool = True
    field = _LevelledField
    paper: ClassVar[str] = "Song & Ermon 2019, arXiv 1907.05600"
    offers: ClassVar[str] = "draws from scores at a few levels of noise, no process between them"
    gives_up: ClassVar[str] = "many network calls; the density"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("num_levels * steps_per_level", self.num_levels * self.steps_per_level, Steps)

    def draw(self, field: _LevelledField, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        denoiser = field.denoiser
        levels = geometric_levels(denoiser.process, self.num_levels) if field.levels is None else field.levels
        moves = annealed_moves(denoiser.process, levels, self.steps_per_level, 0.5 * self.eps)
        scale = denoiser.process.sigma(levels[:1])[0]
        x = run_chain(chain_of(moves, denoiser), denoiser.output, GaussianInitial(scale).draw(noise), noise)
        return denoiser(x, levels[-1].item()) if self.denoise else x


def annealed_moves(process: Process, levels: Tensor, repeats: int, step: float) -> Moves:
    """Langevin at each level, `repeats` times; the last step of a level also rescales x to the next, by alpha."""
    moves = langevin_moves(process, levels.repeat_interleave(repeats), step)
    alpha = process.alpha(levels)
    rescale = torch.ones_like(moves.scale)
    rescale[repeats - 1 : -1 : repeats] *= alpha[1:] / alpha[:-1]
    return Moves(moves.times, *(rescale * factor for factor in moves[1:]))


def geometric_levels(process: Process, num_levels: int) -> Tensor:
    """Times `(num_levels,)` from t_max to t_min between which sigma/alpha, averaged over x, falls by equal factors."""

    def log_ratio(t: Tensor) -> Tensor:
        return (process.sigma(t) / process.alpha(t)).log().reshape(len(t), -1).mean(1)

    first, last = log_ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64))
    wanted = torch.linspace(first.item(), last.item(), num_levels, dtype=torch.float64)
    low, high = (torch.full_like(wanted, t) for t in (process.t_min, process.t_max))
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = log_ratio(middle) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def example() -> AnnealedLangevin:
    """A few steps."""
    return AnnealedLangevin(num_levels=10, steps_per_level=2)
