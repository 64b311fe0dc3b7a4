"""Noise: it belongs to the draw, its keys are independent, it is normal; and checks that broken noise fails."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from probgen.core import InputError
from probgen.randomness import BrownianSteps, Noise, check_seed, forked_rng, time_key

MIN_P = 1e-4
SHAPES = [(), (1,), (3,), (8,), (9,), (2, 5)]


def chunks(count: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, size) of consecutive chunks."""
    starts = itertools.accumulate(sizes, initial=0)
    found = [(first, size) for first, size in zip(starts, sizes, strict=False)]
    assert sum(sizes) == count
    return found


# --- whose noise it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_gets_the_same_noise_in_any_chunk(shape, dtype):
    full = Noise(3, 2, 12, shape, dtype)(7).reshape(2, 12, *shape)
    for first, size in chunks(12, (1, 4, 5, 2)):
        part = Noise(3, 2, size, shape, dtype, first=first)(7).reshape(2, size, *shape)
        assert torch.equal(part, full[:, first : first + size])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_draw_gets_the_same_noise_beside_any_number_of_draws_and_chains(shape):
    few = Noise(3, 2, 3, shape)(7).reshape(2, 3, *shape)
    many = Noise(3, 5, 11, shape)(7).reshape(5, 11, *shape)
    assert torch.equal(few, many[:2, :3])


def test_noise_ahead_is_the_noise_of_each_key():
    noise = Noise(1, 2, 3, (5,))
    for key, ahead in zip([9, 2, *range(40)], noise.each([9, 2, *range(40)]), strict=True):
        assert torch.equal(ahead, noise(key))


def test_precisions_agree():
    """Near radius 0 single precision resolves u = exp(-r^2/2) to 6e-8, that is r to 4e-4; elsewhere to 1e-6."""
    single, double = (Noise(0, 1, 10_000, (4,), dtype)(1) for dtype in (torch.float32, torch.float64))
    difference = (single.double() - double).abs()
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert difference.max() < 5e-4
    assert difference.median() < 1e-6


def test_half_precision_is_the_single_one_rounded():
    half, single = (Noise(0, 1, 100, (4,), dtype)(1) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(half, single.to(torch.bfloat16))


def test_keys_of_times_differ():
    steps = [(float(u), float(u + 1)) for u in range(2000)] + [(u / 7, (u + 1) / 7) for u in range(2000)]
    keys = {time_key(a, b) for a, b in steps} | {time_key(b, a) for a, b in steps}
    assert len(keys) == len({*steps, *[(b, a) for a, b in steps]})
    assert all(0 <= key < 2**64 for key in keys)


# --- its law ------------------------------------------------------------------------------------------------------


def normality(z: Tensor) -> dict[str, float]:
    """p-values: Kolmogorov-Smirnov, the first four moments, the number beyond 3 and beyond 4 standard deviations."""
    values = z.double().flatten().numpy()
    n = values.size
    found = {"Kolmogorov-Smirnov": stats.kstest(values, "norm").pvalue}
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found[f"moment {power}"] = 2 * stats.norm.sf(
            abs((values**power).mean() - mean) * math.sqrt(n / variance)
        )
    for threshold in (3, 4):
        beyond, p = int((np.abs(values) > threshold).sum()), 2 * stats.norm.sf(threshold)
        found[f"beyond {threshold}"] = stats.binomtest(beyond, n, p).pvalue
    return found


def independence(one: Tensor, other: Tensor) -> float:
    """p-value of the correlation of two streams and of their squares, Bonferroni."""
    pairs = ((one, other), (one.square(), other.square()))
    return min(
        1.0, 2 * min(stats.pearsonr(a.flatten().numpy(), b.flatten().numpy()).pvalue for a, b in pairs)
    )


def repeats(*streams: Tensor) -> int:
    """Numbers that occur more than once; of 53-bit radii and angles about none should."""
    values = torch.cat([stream.flatten() for stream in streams])
    return values.numel() - values.unique().numel()


def million(noise_class: type[Noise] = Noise, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise_class(11, 1, 125_000, (8,), dtype)(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_are_normal(dtype):
    """Detects, nine times of ten, a mean off by 0.0052, a variance by 0.0073, a distribution function by 0.0025."""
    found = normality(million(dtype=dtype))
    assert min(found.values()) > MIN_P, found


def test_tails_reach_far_but_stay_finite():
    largest = max(Noise(5, 1, 125_000, (8,))(key).abs().max().item() for key in range(8))
    assert 4.7 < largest < 6.6  # of 8 million normals the largest lies there but for one time in a thousand


def test_keys_seeds_chains_draws_and_coordinates_are_independent():
    """100,000 pairs each: a correlation of 0.017 is seen nine times of ten."""

    def stream(seed: int = 0, key: int = 0) -> Tensor:
        return Noise(seed, 2, 50_000, (8,), torch.float64)(key).reshape(2, 50_000, 8)

    one = stream()
    others = {
        "next key": (one, stream(key=1)),
        "far key": (one, stream(key=2**63)),
        "next seed": (one, stream(seed=1)),
        "far seed": (one, stream(seed=2**62)),
        "seed and key exchanged": (stream(seed=1, key=2), stream(seed=2, key=1)),
        "chains": (one[0], one[1]),
        "neighbouring draws": (one[:, :-1], one[:, 1:]),
        "neighbouring coordinates": (one[..., :-1], one[..., 1:]),
        "the two normals of a word": (one[..., :4], one[..., 4:]),
    }
    found = {name: independence(*pair) for name, pair in others.items()}
    assert min(found.values()) > MIN_P, found


def test_no_number_comes_twice():
    """Blocks shared by two draws, chains or keys would repeat whole rows."""
    streams = [Noise(0, 3, 2000, (9,), torch.float64)(key) for key in range(5)]
    assert repeats(*streams) == 0


# --- broken noise is found out ------------------------------------------------------------------------------------


class KeyIgnored(Noise):
    def _block(self, keys):
        return super()._block([0] * len(keys))


class BlocksOverlap(Noise):
    """Each draw starts one coordinate after the one before it."""

    def _block(self, keys):
        size = math.prod(self.shape)
        long = Noise(self.seed, 1, 1, (self.num_chains * self.num_draws + size,), self.dtype)
        return tuple(long(key)[0].unfold(0, size, 1)[: self.num_chains * self.num_draws] for key in keys)


class ChainsShared(Noise):
    def _block(self, keys):
        one = Noise(self.seed, 1, self.num_draws, self.shape, self.dtype)
        return tuple(one(key).repeat(self.num_chains, *[1] * len(self.shape)) for key in keys)


class AngleFolded(Noise):
    """Box-Muller with a sine that is never negative."""

    def _block(self, keys):
        return tuple(z.abs() for z in super()._block(keys))


class TooWide(Noise):
    """By 1 %."""

    def _block(self, keys):
        return tuple(1.01 * z for z in super()._block(keys))


class Clipped(Noise):
    """No tails beyond 4."""

    def _block(self, keys):
        return tuple(z.clamp(-4, 4) for z in super()._block(keys))


def test_ignored_keys_are_found_out():
    noise = KeyIgnored(0, 1, 10_000, (8,), torch.float64)
    assert independence(noise(0), noise(1)) < MIN_P
    assert repeats(noise(0), noise(1)) > 0


@pytest.mark.parametrize("broken", [BlocksOverlap, ChainsShared])
def test_shared_blocks_are_found_out(broken):
    assert repeats(broken(0, 3, 2000, (9,), torch.float64)(0)) > 0


@pytest.mark.parametrize("broken", [AngleFolded, TooWide, Clipped])
def test_wrong_laws_are_found_out(broken):
    assert min(normality(million(broken)).values()) < MIN_P


# --- Brownian motion ----------------------------------------------------------------------------------------------


def test_brownian_increments_scale_with_the_root_of_the_step():
    """The variance of 400,000 increments is known to 0.22 %: 1 % is seen."""
    steps = BrownianSteps(Noise(2, 1, 50_000, (8,), torch.float64))
    for a, b in ((0.0, 1.0), (1.0, 1.25), (1.25, 5.25)):
        found = normality(steps.increment(a, b) / math.sqrt(b - a))
        assert min(found.values()) > MIN_P, (a, b, found)


def test_brownian_step_is_the_same_however_often_and_beside_whatever_it_is_asked_for():
    noise = Noise(2, 1, 10, (3,))
    one, other = BrownianSteps(noise), BrownianSteps(noise)
    first = one.increment(4.0, 5.0).clone()
    assert torch.equal(first, one.increment(4.0, 5.0))
    for u in range(4):
        other.increment(float(u), u + 1.0)
    assert torch.equal(first, other.increment(4.0, 5.0))
    assert first.shape == (10, 3)


def test_brownian_steps_are_independent_of_one_another():
    steps = BrownianSteps(Noise(2, 1, 50_000, (2,), torch.float64))
    increments = [steps.increment(float(u), u + 1.0).clone() for u in range(4)]
    assert min(independence(a, b) for a, b in itertools.combinations(increments, 2)) > MIN_P


@pytest.mark.parametrize("again", [(0.5, 1.5), (0.0, 0.5), (0.0, 2.0), (-1.0, 0.0)])
def test_brownian_steps_that_overlap_are_refused(again):
    steps = BrownianSteps(Noise(2, 1, 10, (3,)))
    steps.increment(0.0, 1.0)
    with pytest.raises(InputError, match="overlaps"):
        steps.increment(*again)


# --- seeds and the global streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "0", None])
def test_bad_seeds_are_refused(seed):
    for use in (check_seed, lambda s: Noise(s, 1, 1, (1,)), lambda s: forked_rng(s).__enter__()):
        with pytest.raises(InputError, match="seed"):
            use(seed)


@pytest.mark.parametrize(("seed", "key"), [(0, 2**63), (2**62, 1), (2**62, 2**63 + 1)])
def test_every_bit_of_seed_and_key_counts(seed, key):
    """Rounded to floats, neighbours among large numbers would be one."""
    one = Noise(seed, 1, 2, (3,))(key)
    assert not torch.equal(one, Noise(seed, 1, 2, (3,))(key + 1))
    assert not torch.equal(one, Noise(seed + 1, 1, 2, (3,))(key))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_ends_of_the_range_are_seeds(seed):
    with forked_rng(seed):
        assert torch.isfinite(Noise(seed, 1, 2, (3,))(2**64 - 1)).all()


def test_forked_rng_is_seeded_inside_and_leaves_no_trace_even_after_an_error():
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002

    def fail() -> None:
        with forked_rng(5):
            drawn.append(torch.randn(3))
            raise ZeroDivisionError

    drawn: list[Tensor] = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert torch.equal(*drawn)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_noise_leaves_the_global_streams_alone():
    before = torch.get_rng_state()
    Noise(0, 1, 10, (3,))(1)
    assert torch.equal(before, torch.get_rng_state())
