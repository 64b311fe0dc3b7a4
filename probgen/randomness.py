"""Noise that depends on (seed, chain, draw, key), not on how many draws are made beside it.

Each draw owns a fixed range of the counter of a Philox generator (Salmon et al. 2011) keyed by (seed, key); one call
fills a whole batch, and a batch that starts at draw 7 gets what draw 7 gets in any other batch.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError

_WORDS_PER_BLOCK = 4  # one Philox counter step yields four 64-bit words, each word two normals
# Between two calls of a network the processor forgets this code: noise of several steps costs little more than of one.
_KEYS_AHEAD, _NORMALS_AHEAD = 16, 2**17


@dataclass(frozen=True)
class Noise:
    """Standard normal noise for draws `first .. first + num_draws - 1` of each of `num_chains` chains.

    Args:
        seed: an integer in [0, 2^63).
        num_chains, num_draws: how many; rows are ordered chain-major.
        shape: shape of the noise of one draw.
        dtype, device: of what is returned; the numbers agree across dtypes up to rounding.
        first: index of the first draw.

    >>> full = Noise(seed=0, num_chains=1, num_draws=8, shape=(3,))(key=5)
    >>> part = Noise(seed=0, num_chains=1, num_draws=2, shape=(3,), first=4)(key=5)
    >>> torch.equal(full[4:6], part)
    True
    """

    seed: int
    num_chains: int
    num_draws: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    first: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def __call__(self, key: int) -> Tensor:
        """N(0, I) of shape `(num_chains * num_draws, *shape)` for an integer key in [0, 2^64)."""
        return self._block([key])[0]

    def each(self, keys: Sequence[int]) -> Iterator[Tensor]:
        """What a call gives for each key in turn, worked out several keys at a time.

        >>> noise = Noise(seed=0, num_chains=1, num_draws=2, shape=(3,))
        >>> all(torch.equal(z, noise(key)) for key, z in enumerate(noise.each(range(20))))
        True
        """
        for first in range(0, len(keys), self.keys_ahead):
            yield from self._block(keys[first : first + self.keys_ahead])

    @property
    def keys_ahead(self) -> int:
        """How many keys are worked out at a time: fewer where the noise of one is large."""
        size = self.num_chains * self.num_draws * math.prod(self.shape)
        return max(1, min(_KEYS_AHEAD, _NORMALS_AHEAD // size))

    def _block(self, keys: Sequence[int]) -> tuple[Tensor, ...]:
        size = math.prod(self.shape)
        blocks = -(-size // (2 * _WORDS_PER_BLOCK))
        count = self.num_draws * blocks * _WORDS_PER_BLOCK
        words = np.concatenate(
            [
                self._generator(key, chain, self.first * blocks).random_raw(count)
                for key in keys
                for chain in range(self.num_chains)
            ]
        )
        rows = self.num_chains * self.num_draws
        normals = _box_muller(words.reshape(len(keys) * rows, -1), self.dtype)[:, :size]
        return normals.reshape(len(keys), rows, *self.shape).to(self.device).unbind()

    def _generator(self, key: int, chain: int, block: int) -> np.random.Philox:
        # As a plain list, NumPy would round a seed below 2^63 and a key above it to floats.
        pair = np.array([self.seed, key], dtype=np.uint64)
        return np.random.Philox(key=pair, counter=[block, chain, 0, 0])


def _box_muller(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Two standard normals from each 64-bit word of a row (Box & Muller 1958): `(rows, n)` -> `(rows, 2 n)`.

    31 bits make the radius, so that |z| reaches 6.5, and 32 the angle; float32 and float64 see the same bits.
    """
    working = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = torch.from_numpy(words.view(np.int32)).chunk(2, dim=1)
    radius = (first & 0x7FFFFFFF).to(working).add_(1).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = second.to(working).mul_(math.pi * 2.0**-31)
    return torch.cat((radius * angle.cos(), radius * angle.sin_()), dim=1).to(dtype)


class BrownianSteps:
    """Increments of Brownian motion over disjoint steps, the same for the same step however often it is asked for.

    W(b) - W(a) = sqrt(b - a) z with z keyed by (a, b). Overlapping steps would be given independent increments,
    which is wrong, so they are refused.

    Args:
        noise: where z comes from; rows are flattened to `(rows, size)`.
    """

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self._last = (-math.inf, -math.inf)
        self._ahead: dict[int, Tensor] = {}

    def increment(self, a: float, b: float) -> Tensor:
        """W(b) - W(a), shape `(rows, size)`, kept for the next time it is asked for: not to be written into."""
        if (a, b) != self._last and a < self._last[1]:
            raise InputError(
                f"Brownian step {a}..{b} overlaps {self._last[0]}..{self._last[1]}: only disjoint, increasing steps "
                "have independent increments. Use a fixed-step method."
            )
        self._last = (a, b)
        key = time_key(a, b)
        if key not in self._ahead:
            self._look_ahead(a, b)
        return self._ahead[key]

    def _look_ahead(self, a: float, b: float) -> None:
        """Work out this step and those that follow if steps stay as long as it is."""
        step = b - a
        keys = [time_key(a + i * step, b + i * step) for i in range(self.noise.keys_ahead)]
        self._ahead = {
            key: z.flatten(1).mul_(math.sqrt(step))
            for key, z in zip(keys, self.noise.each(keys), strict=True)
        }


def time_key(a: float, b: float = 0.0) -> int:
    """A 64-bit key for one or two times (SplitMix64 over their bits)."""
    key = 0
    for (bits,) in (struct.unpack("<Q", struct.pack("<d", float(time))) for time in (a, b)):
        key = (key + bits + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return key


def check_seed(seed: int) -> None:
    """Raise `InputError` unless the seed is an integer in [0, 2^63)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be an integer in [0, 2^63), got {seed!r}.")


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed torch inside the block; outside, every random stream goes on as if nothing had happened.

    >>> before = torch.random.get_rng_state()
    >>> with forked_rng(0):
    ...     _ = torch.randn(3)
    >>> torch.equal(before, torch.random.get_rng_state())
    True
    """
    check_seed(seed)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
