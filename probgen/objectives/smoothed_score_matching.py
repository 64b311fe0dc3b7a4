"""Denoising score matching of an energy, or of a score, at one noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from probgen.core import (
    Batch,
    Energetic,
    ScoreOnly,
    UnsupportedError,
    Within,
    check_fields,
    describe,
)
from probgen.noising import admitted
from probgen.unnoised import score_of


@dataclass(frozen=True)
class SmoothedScoreMatching:
    """1/2 E |sigma s(x + sigma eps) + eps|^2 with s = -grad E and eps ~ N(0, I): s becomes that of x + sigma eps.

    Neither Z nor a second derivative in x is needed. What is learnt is the law of the data smoothed with N(0, sigma^2
    I), wider by sigma in every direction; where data lie on a thin set, that is what makes the score exist.

    Args:
        noise_scale: sigma in [1e-6, 1e6], in units of x.

    Raises:
        InputError: sigma out of its range, no data for site "x".
        UnsupportedError: by `loss`, for programs without an energy or a score; diffusions have many noise levels, and
            `DenoisingScoreMatching`.

    Source: Vincent (2011), Neural Computation 23; for energies: Li, Chen & Sommer (2019), arXiv 1910.07762.

    >>> from probgen.models.ebm import example
    >>> SmoothedScoreMatching(0.3).loss(example(), Batch({"x": torch.randn(50, 2)})).shape
    torch.Size([])
    """

    noise_scale: Annotated[float, Within(1e-6, 1e6)] = 0.1
    needs: ClassVar[tuple[type, ...]] = ()  # an energy, or a score
    paper: ClassVar[str] = "Vincent 2011, Neural Computation 23"
    offers: ClassVar[str] = "an energy from first derivatives alone, without Z and without a chain"
    gives_up: ClassVar[str] = (
        "the clean data: their law comes out wider by the noise; weights of modes far apart"
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """Half the squared error, summed over coordinates: a differentiable scalar."""
        if not isinstance(program, Energetic | ScoreOnly):
            raise UnsupportedError(
                f"SmoothedScoreMatching needs an energy or a score of real x; {describe(program)} has neither. "
                "A diffusion is fitted by DenoisingScoreMatching()."
            )
        program, x = admitted(self, program, batch)
        eps = torch.randn_like(x)
        score = score_of(program, x + self.noise_scale * eps)
        return 0.5 * (self.noise_scale * score + eps).square().sum() / len(x)


def example() -> SmoothedScoreMatching:
    """Noise of a tenth."""
    return SmoothedScoreMatching()
