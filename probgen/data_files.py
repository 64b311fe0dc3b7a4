"""Data of one's own: tables, arrays and folders of images, checked where they come in."""

from __future__ import annotations

import csv
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from probgen.core import FileError, InputError, check_arguments, check_fields, check_finite, did_you_mean
from probgen.data import Quantised, digits, mnist, read_idx, read_npz

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = get_args(Part)
IMAGES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = (
    2**20
)  # of one image: a network for more is not fitted on one machine, and a small file can claim any size
MAX_BYTES = 2**32  # of all images
_LEVELS = 256
_GREY, _COLOUR = ("1", "L"), ("RGB", "RGBA", "P")
KINDS = "'digits', 'mnist:FOLDER', a .csv, .tsv, .npy, .npz or idx file, or a folder of images or of MNIST"


@dataclass(frozen=True, eq=False)
class Table:
    """A table of numbers: as a data set its rows are vectors, `table[index]` is `(len(index), num_columns)`.

    Args:
        columns: their names, all different.
        values: `(n, num_columns)`, finite.

    >>> table = Table(("dose", "response"), torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    >>> table.event_shape, table[torch.tensor([1])]
    ((2,), tensor([[3., 5.]]))
    >>> table.sites()["response"]
    tensor([2., 5.])
    """

    columns: tuple[str, ...]
    values: Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        expected = (len(self.values) if self.values.ndim else 0, len(set(self.columns)))
        if self.values.shape != expected or 0 in expected or len(self.columns) != expected[1]:
            raise InputError(
                f"Table: values must be `(n, num_columns)`, n > 0, columns all of other names; got values "
                f"{tuple(self.values.shape)} and columns {self.columns}."
            )
        check_finite("Table: values", self.values)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return (len(self.columns),)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.values[index]

    def all(self) -> Tensor:
        """Every row in order, `(n, num_columns)`."""
        return self.values

    def select(self, columns: Sequence[str]) -> Table:
        """The table of these columns, in this order; `InputError` for one that is not there."""
        for name in columns:
            if name not in self.columns:
                raise InputError(f"The table has no column {name!r}; {did_you_mean(name, self.columns)}")
        return Table(tuple(columns), self.values[:, [self.columns.index(name) for name in columns]])

    def sites(self) -> dict[str, Tensor]:
        """Each column by its name, `(n,)`: observations of a program with sites of these names."""
        return dict(zip(self.columns, self.values.unbind(1), strict=True))


Data = Quantised | Table | dict[str, Tensor]


def read_data(spec: str | os.PathLike[str], part: Part = "train") -> Data:
    """Read a data set by its name or from its file, ready for `fit`.

    ==================  ==============================================  ==================================
    digits              the digits of scikit-learn                      `Quantised`, 17 levels
    mnist:FOLDER        MNIST or Fashion-MNIST, idx or npz files        `Quantised`, 256 levels
    FOLDER              png or jpg files of one size, grey or colour    `Quantised`, 256 levels
    FILE.csv, .tsv      a header of names, then numbers                 `Table`
    FILE.npy            an array, rows first                            site "x"; bytes are `Quantised`
    FILE.npz            arrays by site name, rows first                 tensors by site name
    an idx file         bytes, gzipped or not                           `Quantised`, 256 levels
    ==================  ==============================================  ==================================

    Args:
        spec: the name or path.
        part: "train" or "held_out" of data that come in two parts, as digits and MNIST do; others are whole.

    Raises `InputError` for an unknown kind and `FileError` for a file that cannot be read or holds anything but finite
    numbers, naming the file, the row and the column. Pickles are never opened.

    >>> len(read_data("digits")), len(read_data("digits", "held_out"))
    (1437, 360)
    """
    check_arguments(read_data, locals())
    if part not in PARTS:
        raise InputError(f"Unknown part {part!r}; {did_you_mean(str(part), PARTS)}")
    name = os.fspath(spec)
    if name == "digits":
        return digits()[PARTS.index(part)]
    if name == "mnist" or name.startswith("mnist:"):
        return mnist(name.partition(":")[2] or None)[PARTS.index(part)]
    return _read_path(Path(name), part)


def comes_in_parts(spec: str | os.PathLike[str]) -> bool:
    """Whether data come as train and held out, as digits and MNIST do.

    >>> comes_in_parts("digits"), comes_in_parts("heights.csv")
    (True, False)
    """
    name = os.fspath(spec)
    if name in ("digits", "mnist") or name.startswith("mnist:"):
        return True
    path = Path(name)
    return path.is_dir() and not _image_files(path)


def _read_path(path: Path, part: Part) -> Data:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null in it
        is_folder = is_file = False
    if is_folder:
        return read_images(path) if _image_files(path) else mnist(path)[PARTS.index(part)]
    if not is_file:
        raise FileError(f"There are no data {str(path)!r}: no such file or folder. Data are {KINDS}.")
    if path.suffix in (".csv", ".tsv"):
        return read_table(path)
    if path.suffix == ".npy":
        return _as_data({"x": _read_npy(path)}, path)
    if path.suffix == ".npz":
        return _as_data(read_npz(path), path)
    if "idx" in path.name:
        return _as_data({"x": read_idx(path)}, path)
    if path.suffix.lower() in IMAGES:
        raise InputError(f"{str(path)!r} is one image: name the folder of many, all of one size.")
    raise InputError(f"{str(path)!r} is of no kind that is read here. Data are {KINDS}.")


# --- tables --------------------------------------------------------------------------------------------------------


def read_table(path: str | os.PathLike[str]) -> Table:
    r"""Read a csv file (tsv: columns apart by tabs): a header, then finite numbers; `FileError` names any other cell.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.csv").write_text("dose,response\n1,2.5\n2,3.5\n")
    ...     read_table(Path(folder, "a.csv"))
    Table(columns=('dose', 'response'), values=tensor([[1.0000, 2.5000],
            [2.0000, 3.5000]]))
    """
    path = Path(path)
    lines = _lines(path)
    _, header = next(lines, (1, []))
    columns = _header(path, header)
    rows = [_row(path, number, columns, cells) for number, cells in lines]
    if not rows:
        raise FileError(
            f"{str(path)!r} holds no rows: expected numbers below the header {','.join(columns)!r}."
        )
    return Table(columns, torch.tensor(rows, dtype=torch.get_default_dtype()))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells, empty lines left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{str(path)!r} is no text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Save it as "
            "CSV UTF-8; a spreadsheet (.xlsx) is not read."
        ) from error
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise FileError(
            f"{str(path)!r}, line {reader.line_num}: {error}. Expected cells apart by commas."
        ) from error


def _header(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(cell.strip() for cell in cells)
    place = f"{str(path)!r}, line 1"
    if not columns:
        raise FileError(f"{str(path)!r} is empty: expected a line of column names, then numbers.")
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        raise FileError(
            f"{place}: expected names apart by commas, got {columns[0][:60]!r}. Save it with commas."
        )
    if all(_number(cell) is not None for cell in columns):
        raise FileError(
            f"{place}: expected column names, got numbers ({', '.join(columns[:4])}). Put a line of names above them."
        )
    for position, name in enumerate(columns):
        if not name:
            raise FileError(
                f"{place}: column {position + 1} of {len(columns)} has no name. Name it, or remove it."
            )
        if name in columns[:position]:
            raise FileError(f"{place}: two columns are called {name!r}. Rename one.")
    return columns


def _row(path: Path, number: int, columns: Sequence[str], cells: Sequence[str]) -> list[float]:
    place = f"{str(path)!r}, line {number}"
    if len(cells) != len(columns):
        raise FileError(f"{place}: expected {len(columns)} cells, as the header has, got {len(cells)}.")
    row, largest = [], torch.finfo(torch.get_default_dtype()).max
    for name, cell in zip(columns, cells, strict=True):
        value = _number(cell)
        if value is None or not abs(value) <= largest:
            way_out = (
                "Fill it in, or remove the row"
                if value is not None or not cell.strip()
                else "Code it as a number"
            )
            raise FileError(
                f"{place}, column {name!r}: expected a finite number, got {cell[:40]!r}. {way_out} or the column."
            )
        row.append(value)
    return row


def _number(text: str) -> float | None:
    """The number that is written there; None where there is none. Python's own 1_000 is no number in a table."""
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


# --- arrays --------------------------------------------------------------------------------------------------------


def _read_npy(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            return torch.as_tensor(np.lib.format.read_array(file, allow_pickle=False))
    except (ValueError, TypeError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise FileError(f"{str(path)!r} is not an npy file of a plain numeric array: {error}") from error


def _as_data(arrays: dict[str, Tensor], path: Path) -> Data:
    """Arrays by site name, or levels where the only site is one of bytes."""
    if not arrays:
        raise FileError(f"{str(path)!r} holds no arrays.")
    for name, array in arrays.items():
        if array.ndim == 0 or array.numel() == 0:
            raise FileError(f"{str(path)!r}: {name!r} has shape {tuple(array.shape)}: expected rows of data.")
        if array.is_complex():
            raise FileError(f"{str(path)!r}: {name!r} holds complex numbers; expected real ones.")
        check_finite(f"{str(path)!r}: {name!r}", array)
    x = arrays.get("x")
    if x is not None and x.dtype == torch.uint8 and arrays.keys() <= {"x", "labels"}:
        labels = arrays.get("labels")
        return Quantised(
            x.unsqueeze(1) if x.ndim == 3 else x, _LEVELS, None if labels is None else labels.long()
        )
    return arrays


# --- images --------------------------------------------------------------------------------------------------------


def read_images(folder: str | os.PathLike[str]) -> Quantised:
    """Read the png and jpg files of a folder, in the order of their names: levels 0..255.

    All must have one size, at most 2^20 pixels, and be grey (one channel) or in colour (three); the event shape is
    (channels, height, width).

    Raises `FileError` for a file that is no such image, naming it.
    """
    paths = _image_files(Path(folder))
    if not paths:
        raise FileError(f"There are no {', '.join(IMAGES)} files in {str(folder)!r}.")
    first = _read_image(paths[0])
    if first.numel() * len(paths) > MAX_BYTES:
        raise FileError(
            f"{len(paths):,} images of {_told(first)} are more than {MAX_BYTES >> 30} GiB. Shrink them."
        )
    levels = torch.empty((len(paths), *first.shape), dtype=torch.uint8)
    for i, path in enumerate(paths):
        image = _read_image(path)
        if image.shape != first.shape:
            raise FileError(
                f"All images must be of one size and kind: {str(paths[0])!r} is {_told(first)}, {str(path)!r} is "
                f"{_told(image)}. Resize or convert them, or move them apart."
            )
        levels[i] = image
    return Quantised(levels, _LEVELS)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.is_file())


def _read_image(path: Path) -> Tensor:
    """`(channels, height, width)`, uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise FileError(
                    f"{str(path)!r} is {image.width} x {image.height}: expected at most {MAX_PIXELS:,} pixels. "
                    "Shrink it."
                )
            if image.mode not in _GREY + _COLOUR:
                raise FileError(
                    f"{str(path)!r} is of kind {image.mode!r}: expected grey or colour of 8 bits. Convert it."
                )
            pixels: Any = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        told = "no image" if isinstance(error, UnidentifiedImageError) else f"damaged: {error}"
        raise FileError(f"{str(path)!r} is {told}. Remove it, or take another copy.") from error
    return torch.as_tensor(pixels)[None] if pixels.ndim == 2 else torch.as_tensor(pixels).permute(2, 0, 1)


def _told(image: Tensor) -> str:
    channels, height, width = image.shape
    return f"{width} x {height} in {'grey' if channels == 1 else 'colour'}"
