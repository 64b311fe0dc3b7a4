"""Images from strokes: noise a guide up to some time, then follow the reverse SDE from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.core import Guarantee, InputError, PosteriorKind, Within, check_finite
from probgen.dynamics import AffineDenoiser, FlowEngine, family_field, solve_sde
from probgen.dynamics.fields import Steps
from probgen.processes import Grid, as_grid
from probgen.randomness import BrownianSteps, Noise


@dataclass(frozen=True, eq=False)
class SDEdit(FlowEngine):
    """x_{t_0} = alpha guide + sigma z, then the reverse SDE from t_0 down to t_min, then E[x_0 | x].

    A small t_0 keeps the guide, a large one makes it more like the data: the guide is forgotten where sigma(t_0) drowns
    it. What comes out is no posterior given the guide; for that, write down how the guide was made of x as a site below
    a `Prior`.

    Args:
        guide: what to start from, a stroke painting say: `(*event)`, the same for every draw.
        start: t_0 in (t_min, t_max].
        steps: number of solver steps, 1..1,000,000.
        grid: how they are spread over time: "uniform", "quadratic", "karras", "logsnr" or a `Grid`.
        batch_size, compile: as for every `FlowEngine`.

    Raises:
        InputError: a guide of another shape, or one that is not finite; a start beyond the process's times.

    Source: Meng et al. (2022), arXiv 2108.01073.

    >>> from probgen import GaussianMixture, infer
    >>> draws = infer(GaussianMixture.example(), SDEdit(torch.ones(2), start=0.1, steps=20), num_draws=4)
    >>> draws["x"].shape
    torch.Size([1, 4, 2])
    """

    guide: Tensor
    start: Annotated[float, Within(0, 1, "(]")] = 0.5
    steps: Steps = 250
    grid: Grid | str = "uniform"
    guarantee: ClassVar[Guarantee] = "approximate"
    kind: ClassVar[PosteriorKind] = "approximate"
    paper: ClassVar[str] = "Meng et al. 2022, arXiv 2108.01073"
    offers: ClassVar[str] = "images like a rough guide, from any fitted diffusion"
    gives_up: ClassVar[str] = "a posterior: how much of the guide is kept is set by hand"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)
        check_finite("guide", self.guide)

    def __str__(self) -> str:
        return f"SDEdit(start={self.start}, steps={self.steps})"

    def num_calls(self) -> int:
        """One a step and one to finish."""
        return self.steps + 1

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        process, shape = field.process, tuple(noise.shape)
        if tuple(self.guide.shape) != shape:
            raise InputError(
                f"guide: expected the shape of one datum, {shape}, got {tuple(self.guide.shape)}."
            )
        if not process.t_min < self.start <= process.t_max:
            raise InputError(
                f"start must lie in ({process.t_min:g}, {process.t_max:g}], the times of the process, got "
                f"{self.start!r}."
            )
        fresh = noise(0)
        law = process.marginal(self.guide.to(fresh)[None], torch.tensor([self.start], dtype=torch.float64))
        schedule = as_grid(self.grid).between(self.start, process.t_min, process)
        clocked = family_field(field, schedule, self.steps, process.diffusion2)
        x = law.loc + law.scale * fresh
        return field(solve_sde(clocked, x, BrownianSteps(noise, self.steps), "euler"), process.t_min)


def example() -> SDEdit:
    """A few steps from the origin of the plane."""
    return SDEdit(torch.zeros(2), start=0.3, steps=20)
