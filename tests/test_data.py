"""Data: dequantisation and its inverse, bits per dimension, the digits, MNIST from files, bad files."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probgen.core import InputError
from probgen.data import (
    Quantised,
    binarise_stochastic,
    binarise_threshold,
    dequantise,
    digits,
    mnist,
    quantise,
    read_idx,
    read_npz,
)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_quantise_inverts_dequantise(num_levels):
    levels = torch.arange(num_levels).repeat(100, 1)
    x = dequantise(levels, num_levels)
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(quantise(x, num_levels), levels)


def test_dequantisation_is_uniform_within_a_level():
    """Kolmogorov-Smirnov at n = 20,000: false alarm with probability 1e-4, detects a shift of 2 %."""
    num_rows = 20_000
    u = ((dequantise(torch.full((num_rows,), 3), 17) + 1) * 17 / 2 - 3).sort().values
    bound = math.sqrt(math.log(2 / 1e-4) / 2 / num_rows)

    def distance(u: Tensor) -> float:
        return float((u - (torch.arange(num_rows) + 0.5) / num_rows).abs().max())

    assert distance(u) < bound
    assert distance(u + 0.02) > bound  # the broken twin


def test_noise_is_new_at_every_call_and_repeats_with_the_seed():
    data = Quantised(torch.zeros(3, 2, dtype=torch.int64), 17)
    index = torch.tensor([0, 2])
    torch.manual_seed(1)
    first, second = data[index], data[index]
    torch.manual_seed(1)
    assert torch.equal(data[index], first)
    assert not torch.equal(first, second)


def test_rows_are_those_asked_for():
    levels = torch.arange(12).reshape(6, 2)
    data = Quantised(levels, 12)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(quantise(data[index], 12), levels[index])
    assert torch.equal(quantise(data.all(), 12), levels)
    assert (len(data), data.event_shape) == (6, (2,))


def test_bits_per_dim_of_a_known_law():
    """Three levels of known probabilities: the dequantised density costs their surprise exactly."""
    probs = torch.tensor([0.5, 0.25, 0.25])
    levels = torch.tensor([0, 0, 1, 2])[:, None].repeat(1, 5)
    data = Quantised(levels, 3)
    log_density = (probs[levels] / (2 / 3)).log().sum(1)  # each level is 2/K wide on [-1, 1]
    torch.testing.assert_close(data.bits_per_dim(log_density), torch.tensor([1.0, 1.0, 2.0, 2.0]))
    without_jacobian = -log_density / (5 * math.log(2))
    assert not torch.allclose(without_jacobian, data.bits_per_dim(log_density))


def test_binarisation_says_which_it_is():
    levels = torch.arange(17).repeat(4000, 1)
    assert torch.equal(binarise_threshold(levels, 17)[0], (torch.arange(17) > 8).float())
    means = binarise_stochastic(levels, 17).mean(0)
    wanted = torch.arange(17) / 16
    standard_error = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((means - wanted).abs() <= 4.5 * standard_error).all()  # detects an error of 0.036 at the middle
    assert ((means - torch.arange(17) / 17).abs() > 4.5 * standard_error).any()  # the broken twin


def test_digits_are_split_once_and_for_all():
    train, held_out = digits()
    assert (len(train), len(held_out), train.event_shape, train.num_levels) == (1437, 360, (1, 8, 8), 17)
    assert torch.equal(train.levels, digits()[0].levels)
    assert train.levels.max() == 16
    assert train.labels is not None
    assert held_out.labels is not None
    share = [torch.bincount(labels) / len(labels) for labels in (train.labels, held_out.labels)]
    assert (share[0] - share[1]).abs().max() < 0.002
    rows = {tuple(row) for row in train.levels.flatten(1).tolist()}
    assert not any(tuple(row) in rows for row in held_out.levels.flatten(1).tolist())


@pytest.mark.parametrize(
    ("levels", "num_levels", "labels", "told"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), 17, None, "need rows"),
        (torch.tensor(3), 17, None, "need rows"),
        (torch.zeros(3, 2), 17, None, "must be integers, got torch.float32"),
        (torch.tensor([[17]]), 17, None, "0..16 (num_levels - 1), got 17..17"),
        (torch.tensor([[-1]]), 17, None, "got -1..-1"),
        (torch.tensor([[0]]), 1, None, "num_levels must be an integer >= 2"),
        (torch.tensor([[0], [1]]), 17, torch.zeros(3), "of shape (2,), got (3,)"),
    ],
)
def test_bad_levels_are_refused_in_words(levels, num_levels, labels, told):
    with pytest.raises(InputError) as error:
        Quantised(levels, num_levels, labels)
    assert told in str(error.value)


# --- files ------------------------------------------------------------------------------------------------------

PARTS = {"train": ("train", 4), "test": ("t10k", 3)}


def images_and_labels(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    return rng.integers(0, 256, (num_rows, 5, 6), dtype=np.uint8), np.arange(num_rows, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_npz(folder: Path) -> None:
    for part, (_, num_rows) in PARTS.items():
        images, labels = images_and_labels(num_rows)
        np.savez(folder / f"mnist_{part}.npz", images=images, labels=labels)


def write_idx(folder: Path) -> None:
    for name, num_rows in PARTS.values():
        images, labels = images_and_labels(num_rows)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def write_gzipped_idx(folder: Path) -> None:
    write_idx(folder)
    for path in list(folder.iterdir()):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("write", [write_npz, write_idx, write_gzipped_idx])
def test_mnist_is_read_from_either_format(tmp_path, write):
    write(tmp_path)
    for data, (_, num_rows) in zip(mnist(tmp_path), PARTS.values(), strict=True):
        images, labels = images_and_labels(num_rows)
        assert data.labels is not None
        assert data.labels.tolist() == labels.tolist()
        assert data.levels.tolist() == images[:, None].tolist()
        assert torch.equal(quantise(data.all(), 256), data.levels)


def test_mnist_finds_the_folder_in_the_environment(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    write_npz(tmp_path / "mnist")
    monkeypatch.setenv("PROBGEN_DATA", str(tmp_path))
    assert [len(data) for data in mnist()] == [4, 3]


def test_mnist_without_a_folder_says_how_to_give_one(tmp_path, monkeypatch):
    monkeypatch.delenv("PROBGEN_DATA", raising=False)
    with pytest.raises(InputError, match=r"PROBGEN_DATA.*digits\(\)"):
        mnist()
    with pytest.raises(InputError, match=r"mnist_train\.npz"):
        mnist(tmp_path)


def test_images_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "mnist_train.npz", images=images_and_labels(3)[0])
    with pytest.raises(InputError, match="and `labels`"):
        mnist(tmp_path)


def test_a_pickle_inside_an_npz_file_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([{"b": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="plain numeric arrays"):
        read_npz(path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not an npz file"):
        read_npz(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0",
        b"\0\0\x08\x01\0\0\0\x05abc",
        b"\0\0\x08\x02\0\0\0\x05",
    ],
    ids=["empty", "header cut", "floats", "too short", "sizes cut"],
)
def test_a_file_that_is_no_idx_is_refused(tmp_path, content):
    path = tmp_path / "a-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not an idx file"):
        read_idx(path)


def test_missing_and_damaged_files_are_told(tmp_path):
    for read in (read_npz, read_idx):
        with pytest.raises(InputError, match="There is no file"):
            read(tmp_path / "absent")
    (tmp_path / "a.gz").write_bytes(b"not zipped")
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path / "a.gz")
