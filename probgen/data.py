"""Data and their conventions: integer levels 0..K-1, dequantised uniformly and scaled to [-1, 1].

A data set here is indexed by a tensor of rows and answers with a tensor of data: a minibatch is one call. Noise
comes from torch's random stream: seed it to repeat it.
"""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from probgen.core import InputError, Within, check_arguments, check_fields


def dequantise(levels: Tensor, num_levels: Annotated[int, Within(2)]) -> Tensor:
    """x = 2 (k + u) / K - 1 with fresh u ~ Uniform[0, 1): a density of x is then one of the levels.

    Args:
        levels: k, integers in 0..K-1, any shape.
        num_levels: K.

    Returns:
        x in [-1, 1], shaped as `levels`, of the default dtype.

    Source: Theis 2016 (arXiv 1511.01844), section 3.1.

    >>> levels = torch.tensor([0, 16])
    >>> quantise(dequantise(levels, 17), 17)
    tensor([ 0, 16])
    """
    check_arguments(dequantise, locals())
    _check_levels(levels, num_levels)
    noise = torch.rand(levels.shape, device=levels.device)
    return 2 * (levels + noise) / num_levels - 1


def quantise(x: Tensor, num_levels: Annotated[int, Within(2)]) -> Tensor:
    """k = floor(K (x + 1) / 2), clamped to 0..K-1: the inverse of `dequantise`, whatever u was.

    Args:
        x: data on the scale [-1, 1], any shape; what lies outside goes to the nearest level.
        num_levels: K.

    Returns:
        The levels, int64, shaped as `x`.

    >>> quantise(torch.tensor([-1.2, 0.0, 1.0]), 17)
    tensor([ 0,  8, 16])
    """
    check_arguments(quantise, locals())
    return (num_levels * (x + 1) / 2).floor().clamp(0, num_levels - 1).long()


def binarise_threshold(levels: Tensor, num_levels: Annotated[int, Within(2)]) -> Tensor:
    """1 where k is in the upper half of 0..K-1, else 0: one fixed binary data set, for Bernoulli likelihoods.

    Nats of binary data are no density of the levels: never put them in a column with bits/dim.

    >>> binarise_threshold(torch.tensor([0, 8, 9, 16]), 17)
    tensor([0., 0., 1., 1.])
    """
    check_arguments(binarise_threshold, locals())
    _check_levels(levels, num_levels)
    return (2 * levels > num_levels - 1).to(torch.get_default_dtype())


def binarise_stochastic(levels: Tensor, num_levels: Annotated[int, Within(2)]) -> Tensor:
    """1 with probability k / (K - 1), drawn anew at every call: another likelihood than the threshold's.

    Source: Salakhutdinov and Murray 2008, ICML, section 4.

    >>> binarise_stochastic(torch.tensor([0, 0, 16, 16]), 17)
    tensor([0., 0., 1., 1.])
    """
    check_arguments(binarise_stochastic, locals())
    _check_levels(levels, num_levels)
    return torch.bernoulli(levels / (num_levels - 1))


@dataclass(frozen=True, eq=False)
class Quantised:
    """Integer data, served dequantised: `data[index]` is x = 2 (k + u)/K - 1 of those rows, u new every time.

    Args:
        levels: k, integers in 0..K-1, of shape (n, *event), n > 0.
        num_levels: K, at least 2 (digits of scikit-learn: 17; bytes: 256).
        labels: the class of each row, integers of shape (n,), where there are any.

    Raises:
        InputError: no rows, levels that are not integers in 0..K-1, or labels of another length.

    Source: Theis 2016 (arXiv 1511.01844), section 3.1.

    >>> data = Quantised(torch.randint(17, (100, 1, 8, 8)), num_levels=17)
    >>> len(data), data.event_shape, data[torch.tensor([3, 1, 4])].shape
    (100, (1, 8, 8), torch.Size([3, 1, 8, 8]))
    """

    levels: Tensor
    num_levels: Annotated[int, Within(2)]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.levels.dim() == 0 or len(self.levels) == 0:
            raise InputError(f"Quantised data need rows: got levels of shape {tuple(self.levels.shape)}.")
        _check_levels(self.levels, self.num_levels)
        if self.labels is not None and self.labels.shape != self.levels.shape[:1]:
            raise InputError(
                f"labels must be one a row, of shape ({len(self.levels)},), got {tuple(self.labels.shape)}."
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.levels.shape[1:])

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: Tensor) -> Tensor:
        return dequantise(self.levels[index], self.num_levels)

    def all(self) -> Tensor:
        """Every row in order, dequantised anew."""
        return dequantise(self.levels, self.num_levels)

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """-(log p(x) + d log(2/K)) / (d ln 2), the cost of one *level* in bits; log2 K for a uniform law.

        Args:
            log_prob: log p(x) in nats of dequantised data on [-1, 1], or a bound or mean of it; any shape.

        Returns:
            Bits per dimension, shaped as `log_prob`.

        >>> data = Quantised(torch.zeros(1, 64, dtype=torch.int64), num_levels=16)
        >>> data.bits_per_dim(torch.tensor(-64 * math.log(2)))            # uniform on [-1, 1]
        tensor(4.)
        """
        num_dims = math.prod(self.event_shape)
        return -(log_prob / num_dims + math.log(2 / self.num_levels)) / math.log(2)


@dataclass(frozen=True, eq=False)
class Binarised:
    """Integer data, served as pixels that are on or off: `data[index]` are those rows, drawn anew every time.

    Nats of binary data are no density of the levels: they never share a column with bits/dim.

    Args:
        quantised: levels k in 0..K-1; a pixel is on with probability k/(K - 1).

    Source: Salakhutdinov & Murray (2008), ICML, section 4.

    >>> Binarised(Quantised(torch.tensor([[0, 16, 16]]), num_levels=17)).all()
    tensor([[0., 1., 1.]])
    """

    quantised: Quantised

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return self.quantised.event_shape

    @property
    def labels(self) -> Tensor | None:
        """The class of each row, where there are any."""
        return self.quantised.labels

    def __len__(self) -> int:
        return len(self.quantised)

    def __getitem__(self, index: Tensor) -> Tensor:
        return binarise_stochastic(self.quantised.levels[index], self.quantised.num_levels)

    def all(self) -> Tensor:
        """Every row in order, drawn anew."""
        return binarise_stochastic(self.quantised.levels, self.quantised.num_levels)


def _check_levels(levels: Tensor, num_levels: int) -> None:
    if levels.is_floating_point():
        raise InputError(f"levels must be integers, got {levels.dtype}; `quantise` makes them from [-1, 1].")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < num_levels:
        raise InputError(
            f"levels must lie in 0..{num_levels - 1} (num_levels - 1), got {int(levels.min())}..{int(levels.max())}."
        )


def digits() -> tuple[Quantised, Quantised]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 of levels 0..16 (K = 17): (train, held out).

    Always the same 1,437 and 360 rows, classes in the same proportions in both; event shape (1, 8, 8).

    Source: Alpaydin and Kaynak 1998, UCI repository, optical recognition of handwritten digits.

    >>> train, held_out = digits()
    >>> len(train), len(held_out), train.num_levels
    (1437, 360, 17)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    levels = torch.as_tensor(bunch.images, dtype=torch.int64).unsqueeze(1)
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    train, held_out = (Quantised(levels[rows], 17, labels[rows]) for rows in map(torch.tensor, parts))
    return train, held_out


def mnist(folder: str | os.PathLike[str] | None = None) -> tuple[Quantised, Quantised]:
    """Full MNIST, 28 x 28 of levels 0..255 (K = 256), event shape (1, 28, 28): 60,000 and 10,000 held out.

    Args:
        folder: holds `mnist_train.npz` and `mnist_test.npz` (arrays `images`, `labels`), or the four idx files
            of the original distribution, gzipped or not (Fashion-MNIST's have the same names). By default,
            `mnist` in the folder that the environment variable PROBGEN_DATA names.

    Raises:
        InputError: no such folder or file, or a file that does not hold n images with n labels.

    Source: LeCun 1998, Proceedings of the IEEE 86(11).
    """
    check_arguments(mnist, locals())
    if folder is None:
        folder = Path(_data_folder(), "mnist")
    train, held_out = (_read_images(Path(folder), *names) for names in (("train", "train"), ("test", "t10k")))
    return train, held_out


def read_npz(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The arrays of an npz file by name; a file that holds pickles is refused.

    Raises:
        InputError: no such file, or one that is no npz file of plain arrays.
    """
    check_arguments(read_npz, locals())
    import zipfile

    import numpy as np

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an npz file of plain numeric arrays: {error}") from error


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The bytes of an idx file (gzipped when its name ends in .gz), uint8, in the shape its header tells.

    Raises:
        InputError: no such file, or one whose header or length is not that of an idx file of bytes.
    """
    check_arguments(read_idx, locals())
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, EOFError) as error:
        raise InputError(f"The file {path} cannot be read: {error}") from error
    num_dims = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * num_dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not num_dims or len(content) != start + math.prod(shape):
        raise InputError(
            f"{path} is not an idx file of bytes: expected the header 00 00 08 (number of dimensions), the sizes, "
            f"and as many bytes as they say, got {content[:4].hex(' ')} and {len(content)} bytes."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def _data_folder() -> str:
    folder = os.environ.get("PROBGEN_DATA")
    if not folder:
        raise InputError(
            "MNIST is not part of probgen: set the environment variable PROBGEN_DATA to the folder that "
            "holds mnist/, or give mnist() a folder. The digits of scikit-learn need neither: digits()."
        )
    return folder


def _read_images(folder: Path, npz_name: str, idx_name: str) -> Quantised:
    """One part of MNIST: `mnist_<npz_name>.npz`, or `<idx_name>-images-idx3-ubyte[.gz]` and its labels."""
    npz = folder / f"mnist_{npz_name}.npz"
    idx = [folder / f"{idx_name}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
    zipped = [path.with_name(f"{path.name}.gz") for path in idx]
    if npz.exists():
        arrays = read_npz(npz)
        images, labels = arrays.get("images"), arrays.get("labels")
    elif found := [paths for paths in (idx, zipped) if paths[0].exists()]:
        images, labels = map(read_idx, found[0])
    else:
        raise InputError(
            f"There are no images in {folder}: expected {npz.name}, {idx[0].name} or {zipped[0].name}."
        )
    if images is None or labels is None or images.dim() != 3 or images.dtype != torch.uint8:
        raise InputError(
            f"The files of {folder} do not hold `images`, bytes of shape (n, height, width), and `labels`."
        )
    return Quantised(images.unsqueeze(1), 256, labels.long())
