"""Noise that depends on (seed, chain, draw, key), not on how many draws are made beside it.

Each draw owns a fixed range of the counter of a Philox generator (Salmon et al. 2011) keyed by (seed, key); one call
fills a whole batch, and a batch that starts at draw 7 gets what draw 7 gets in any other batch.
"""

from __future__ import annotations

import contextlib
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError, check_count

_WORDS_PER_BLOCK = 4  # one Philox counter step yields four 64-bit words, each word two normals
# Between two calls of a network the processor forgets this code: noise of several steps costs little more than of one.
_KEYS_AHEAD, _NORMALS_AHEAD = 16, 2**17
_MAX_LEVEL, _SLACK = 40, 1e-3  # halvings of a Brownian path; how far rounding may take a time, in steps


@dataclass(frozen=True)
class Noise:
    """Standard normal noise for draws `first .. first + num_draws - 1` of each of `num_chains` chains.

    Args:
        seed: an integer in [0, 2^63).
        num_chains, num_draws: how many; rows are ordered chain-major.
        shape: shape of the noise of one draw.
        dtype, device: of what is returned; the numbers agree across dtypes up to rounding.
        first: index of the first draw.
        rows: independent rows of `shape` that each draw owns, as where a program is asked at several conditions.

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
    rows: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def num_rows(self) -> int:
        """Rows of what a call returns: chain by chain, draw by draw."""
        return self.num_chains * self.num_draws * self.rows

    def __call__(self, key: int) -> Tensor:
        """N(0, I) of shape `(num_rows, *shape)` for an integer key in [0, 2^64)."""
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
        size = self.num_rows * math.prod(self.shape)
        return max(1, min(_KEYS_AHEAD, _NORMALS_AHEAD // size))

    def _block(self, keys: Sequence[int]) -> tuple[Tensor, ...]:
        size = self.rows * math.prod(self.shape)
        blocks = -(-size // (2 * _WORDS_PER_BLOCK))
        count = self.num_draws * blocks * _WORDS_PER_BLOCK
        words = np.concatenate(
            [
                self._generator(key, chain, self.first * blocks).random_raw(count)
                for key in keys
                for chain in range(self.num_chains)
            ]
        )
        draws = len(keys) * self.num_chains * self.num_draws
        normals = _box_muller(words.reshape(draws, -1), self.dtype)[:, :size]
        return normals.reshape(len(keys), self.num_rows, *self.shape).to(self.device).unbind()

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
        noise: where z comes from.
        end: the time at which the last step ends; no noise is worked out for steps beyond it.
    """

    def __init__(self, noise: Noise, end: float = math.inf) -> None:
        self.noise, self.end = noise, end
        self._last = (-math.inf, -math.inf)
        self._increments: dict[int, Tensor] = {}
        self._bulges: dict[int, Tensor] = {}

    def increment(self, a: float, b: float) -> Tensor:
        """W(b) - W(a), `(rows, *shape)`, kept for the next time it is asked for: not to be written into."""
        if (a, b) != self._last and a < self._last[1]:
            raise InputError(
                f"Brownian step {a}..{b} overlaps {self._last[0]}..{self._last[1]}: only disjoint, increasing steps "
                "have independent increments. Use a fixed-step method."
            )
        self._last = (a, b)
        key = time_key(a, b)
        if key not in self._increments:
            self._increments = self._look_ahead(a, b, time_key, math.sqrt(b - a))
        return self._increments[key]

    def increment_and_area(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        """W(b) - W(a) and its space-time area, the integral of W(s) - W(a) over s in [a, b], with their joint law.

        The area is (b - a) ((W(b) - W(a))/2 + H) with H ~ N(0, (b - a)/12) independent of the increment (Foster, Lyons
        & Oberhauser 2020, arXiv 1904.06998); H is keyed by the step turned round.
        """
        increment, key = self.increment(a, b), time_key(b, a)
        if key not in self._bulges:
            self._bulges = self._look_ahead(a, b, lambda a, b: time_key(b, a), math.sqrt((b - a) / 12))
        return increment, (b - a) * (0.5 * increment + self._bulges[key])

    def _look_ahead(
        self, a: float, b: float, key_of: Callable[[float, float], int], scale: float
    ) -> dict[int, Tensor]:
        """Scaled noise of this step and of those that follow if steps stay as long as it is."""
        step = b - a
        count = max(1, int(min(self.noise.keys_ahead, (self.end - a) / step + 0.5)))
        keys = [key_of(a + i * step, b + i * step) for i in range(count)]
        noises = self.noise.each(keys)
        return {key: z if scale == 1 else z.mul_(scale) for key, z in zip(keys, noises, strict=True)}


class BrownianPath:
    """One Brownian motion on [start, end] that can be asked for at any halving of its steps: always the same path.

    A step of length h knows its increment W ~ N(0, h) and its bulge H ~ N(0, h/12), the average distance of the path
    from its chord. Given both, its halves have the increments W/2 +- (3/2 H + Z) and the bulges H/4 - Z/2 +- N/2 with
    fresh Z ~ N(0, h/16) and N ~ N(0, h/12), keyed by (level, index): nothing is stored but the way down from the top.

    Args:
        noise: where Z and N come from.
        start, end: the ends, start < end.
        num_steps: number of equal steps at level 0, >= 1; level l has num_steps 2^l.

    Raises:
        InputError: a step that is no such step.

    Source: Levy (1948); with the area Foster, Lyons & Oberhauser (2020), arXiv 1904.06998.

    >>> path = BrownianPath(Noise(seed=0, num_chains=1, num_draws=2, shape=(3,), dtype=torch.float64))
    >>> halves = path.increment(0.0, 0.5) + path.increment(0.5, 1.0)
    >>> torch.allclose(path.increment(0.0, 1.0), halves)
    True
    """

    def __init__(self, noise: Noise, start: float = 0.0, end: float = 1.0, num_steps: int = 1) -> None:
        check_count("num_steps", num_steps)
        if not start < end:
            raise InputError(f"A Brownian path needs start < end, got {start!r} and {end!r}.")
        self.noise, self.start, self.end, self.num_steps = noise, start, end, num_steps
        self._halves: dict[int, tuple[int, tuple[_Step, _Step]]] = {}

    def increment(self, a: float, b: float) -> Tensor:
        """W(b) - W(a), `(rows, *shape)`, of a step of any level: not to be written into."""
        return self._step(*self._place(a, b)).increment

    def increment_and_area(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        """W(b) - W(a) and the integral of W(s) - W(a) over s in [a, b], of a step of any level."""
        increment, bulge = self._step(*self._place(a, b))
        return increment, (b - a) * (0.5 * increment + bulge)

    def value(self, t: float) -> Tensor:
        """W(t) - W(start) at an end of a step of any level."""
        total = torch.zeros((), dtype=self.noise.dtype, device=self.noise.device)
        level, index, left = 0, 0, (t - self.start) / (self.end - self.start) * self.num_steps
        while left > _SLACK:
            if level > _MAX_LEVEL:
                raise InputError(f"t = {t!r} is the end of no step of this path: {self._steps()}.")
            if left > 1 - _SLACK:
                total, index, left = total + self._step(level, index).increment, index + 1, left - 1
            else:
                level, index, left = level + 1, 2 * index, 2 * left
        return total.expand(self.noise.num_rows, *self.noise.shape)

    def _steps(self) -> str:
        return (
            f"they are {self.num_steps} 2^l equal parts of [{self.start:g}, {self.end:g}], l <= {_MAX_LEVEL}"
        )

    def _place(self, a: float, b: float) -> tuple[int, int]:
        """Level and index of a step."""
        top = self._length(0)
        level = round(math.log2(top / (b - a))) if self.start - top < a < b < self.end + top else -1
        if 0 <= level <= _MAX_LEVEL:
            step = self._length(level)
            index = round((a - self.start) / step)
            ends = (self.start + index * step, self.start + (index + 1) * step)
            fits = max(abs(a - ends[0]), abs(b - ends[1])) < _SLACK * step
            if fits and 0 <= index < self.num_steps * 2**level:
                return level, index
        raise InputError(f"{a!r}..{b!r} is no step of this path: {self._steps()}.")

    def _step(self, level: int, index: int) -> _Step:
        if level == 0:
            return self._top(index)
        parent = index // 2
        if level not in self._halves or self._halves[level][0] != parent:
            self._halves[level] = parent, self._split(self._step(level - 1, parent), level, parent)
        return self._halves[level][1][index % 2]

    def _top(self, index: int) -> _Step:
        h, (first, second) = self._length(0), self._normals(0, index)
        return _Step(first * math.sqrt(h), second * math.sqrt(h / 12))

    def _split(self, whole: _Step, level: int, parent: int) -> tuple[_Step, _Step]:
        h, (first, second) = self._length(level - 1), self._normals(level, parent)
        z, n = first * math.sqrt(h / 16), second * math.sqrt(h / 12)
        apart, middle = 1.5 * whole.bulge + z, 0.25 * whole.bulge - 0.5 * z
        half = 0.5 * whole.increment
        return _Step(half + apart, middle + 0.5 * n), _Step(half - apart, middle - 0.5 * n)

    def _length(self, level: int) -> float:
        return (self.end - self.start) / self.num_steps / 2.0**level

    def _normals(self, level: int, index: int) -> tuple[Tensor, Tensor]:
        keys = (time_key(-1.0 - level, 2.0 * index + i) for i in (0, 1))
        first, second = (self.noise(key) for key in keys)
        return first, second


class _Step(NamedTuple):
    """W(b) - W(a) and the average of W over [a, b] above its chord."""

    increment: Tensor
    bulge: Tensor


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
    """Seed torch, NumPy and Python inside the block; outside, their streams go on as if nothing had happened.

    >>> before = torch.random.get_rng_state()
    >>> with forked_rng(0):
    ...     _ = torch.randn(3)
    >>> torch.equal(before, torch.random.get_rng_state())
    True
    """
    check_seed(seed)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # NumPy's and Python's streams too: programs and data sets of users may draw from them.
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


def streams() -> dict[str, Tensor]:
    """Where the global random streams of torch, of the GPUs in use, of NumPy and of Python stand.

    >>> here = streams()
    >>> first = torch.rand(1)
    >>> set_streams(here)
    >>> torch.equal(torch.rand(1), first)
    True
    """
    numpys: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    keys = numpys["state"]["key"].astype(np.float64)
    place = (numpys["state"]["pos"], numpys["has_gauss"], numpys["gauss"])
    _, words, spare = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(keys, place)),
        "python": torch.from_numpy(np.array([*words, math.nan if spare is None else spare])),
    }
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return states | {f"cuda:{gpu}": state for gpu, state in enumerate(gpus)}


def set_streams(states: Mapping[str, Tensor]) -> None:
    """Have the random streams go on from where `streams` found them."""
    torch.set_rng_state(states["torch"])
    *keys, place, has_spare, spare = states["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), int(place), int(has_spare), spare)
    np.random.set_state(state)  # noqa: NPY002
    *words, spare = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if math.isnan(spare) else spare))
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if f"cuda:{gpu}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{gpu}"], gpu)
