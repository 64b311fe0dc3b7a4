"""Standard normals for the transitions of many chains, the same for the same seed, transition and number of chains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probgen.randomness import Noise, time_key

_NORMALS_AHEAD = 2**18  # a block holds about as many: they are used while still near the processor
_MOST_AHEAD = 64
_NORMALS_AT_ONCE = 8  # that a counter gives


class Normals:
    """N(0, I) of shape `(rows, n)` for each transition k >= 0, drawn several transitions ahead.

    Args:
        seed: in [0, 2^63).
        rows, columns: normals of a chain in one transition, and chains.
        like: dtype and device.
        independent: the noise of chain i does not depend on the number of chains, nor on `first_column`; slower.
        first_column: index of the first chain, where the chains are a part of more.

    >>> normals = Normals(0, rows=2, columns=3, like=torch.zeros(()))
    >>> torch.equal(normals.of(70, 2)[1], normals.of(71, 1)[0])
    True
    """

    def __init__(
        self,
        seed: int,
        rows: int,
        columns: int,
        like: Tensor,
        independent: bool = False,
        first_column: int = 0,
    ) -> None:
        self.seed, self.rows, self.columns = seed, rows, columns
        self.dtype, self.device = like.dtype, like.device
        self.first_column, self.ahead = first_column, _ahead(rows, columns, independent)
        shape = (self.ahead, rows)
        self._noise = (
            Noise(seed, 1, columns, shape, like.dtype, like.device, first=first_column)
            if independent
            else None
        )
        self._generator = torch.Generator(like.device)
        self._block = (-1, torch.empty(0))

    def of(self, first: int, count: int) -> Tensor:
        """The noise of transitions first .. first + count - 1: `(count, rows, n)`."""
        parts = []
        while count:
            block, offset = divmod(first, self.ahead)
            here = min(count, self.ahead - offset)
            parts.append(self._draw(block)[offset : offset + here])
            first, count = first + here, count - here
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draw(self, block: int) -> Tensor:
        if self._block[0] != block:
            self._block = (block, self._independent(block) if self._noise else self._together(block))
        return self._block[1]

    def _together(self, block: int) -> Tensor:
        part = time_key(float(block), float(self.first_column))
        self._generator.manual_seed(time_key(float(self.seed), float(part % 2**53)) % 2**63)
        return torch.randn(
            self.ahead,
            self.rows,
            self.columns,
            generator=self._generator,
            dtype=self.dtype,
            device=self.device,
        )

    def _independent(self, block: int) -> Tensor:
        assert self._noise is not None
        return self._noise(block).permute(1, 2, 0).contiguous()


def _ahead(rows: int, columns: int, independent: bool) -> int:
    """Transitions in a block: independent of the number of chains where their noise is to be."""
    if independent:
        return _NORMALS_AT_ONCE // math.gcd(_NORMALS_AT_ONCE, rows)
    return max(1, min(_MOST_AHEAD, _NORMALS_AHEAD // max(1, rows * columns)))
