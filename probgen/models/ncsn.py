"""Noise-conditional score network: one network for the scores at many levels of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from probgen.conditioning import Condition, Labels
from probgen.core import InputError, Positive, Probability, Size, Within
from probgen.models.score_sde import ScoreSDE
from probgen.nets import TimeMLP
from probgen.processes import VE, Prediction


class NCSN(ScoreSDE):
    """Scores of p_sigma = p * N(0, sigma^2 I) at L levels sigma_max = sigma_1 > ... > sigma_L = sigma_min, geometric.

    The levels are times of a variance-exploding process, t_i = (L - i)/(L - 1): continuous engines serve it too.

    Args:
        network: as for `ScoreSDE`.
        num_levels: L >= 2.
        sigma_max: the largest noise, about the largest distance between two data (Song & Ermon 2020, technique 1).
        sigma_min: the smallest noise, in (0, sigma_max), in units of the data.
        event_shape, prediction, condition, condition_dropout: as for `ScoreSDE`.

    Raises:
        InputError: fewer than two levels, or noise out of its range; otherwise as `ScoreSDE`.

    Source: Song & Ermon (2019), arXiv 1907.05600; Song & Ermon (2020), arXiv 2006.09011.

    >>> ncsn = NCSN(TimeMLP((2,), width=8), num_levels=3, sigma_max=10.0, sigma_min=0.1)
    >>> ncsn.process().sigma(ncsn.levels())
    tensor([10.0000,  1.0000,  0.1000])
    """

    paper: ClassVar[str] = "Song & Ermon 2019, arXiv 1907.05600"
    offers: ClassVar[str] = "scores at every level of noise; very flexible"
    gives_up: ClassVar[str] = "many network calls a draw; no low-dimensional latent"

    def __init__(
        self,
        network: nn.Module,
        num_levels: Annotated[int, Within(2, 1_000_000)] = 10,
        sigma_max: Annotated[float, Within(0, 1e6, "(]")] = 10.0,
        sigma_min: Positive = 0.01,
        *,
        event_shape: Sequence[Size] | None = None,
        prediction: Prediction | None = None,
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise InputError(
                f"NCSN needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}."
            )
        super().__init__(
            network,
            VE(sigma_min=sigma_min, sigma_max=sigma_max),
            event_shape=event_shape,
            prediction=prediction,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        self.num_levels = num_levels

    def levels(self) -> Tensor:
        """Times of the levels from the noisiest to the least noisy, `(num_levels,)`."""
        return torch.linspace(1.0, 0.0, self.num_levels)


def example() -> NCSN:
    """Five levels on the plane, of three classes."""
    return NCSN(TimeMLP((2,), width=16, num_blocks=1, condition=Labels(3)), num_levels=5)
