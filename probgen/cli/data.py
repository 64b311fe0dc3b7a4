"""The options that say which data, and data as `fit`, `infer` and `evidence` take them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from probgen.core import InputError, check_count
from probgen.data import Binarised, Quantised
from probgen.data_files import Data, Part, Table, read_data
from probgen.randomness import forked_rng

FAR = 10.0  # times unit size


@dataclass(frozen=True)
class DataOptions:
    """Which data.

    Args:
        data: digits, mnist:FOLDER, a .csv, .tsv, .npy or .npz file, or a folder of images.
        columns: of a table, the columns to take, apart by commas; all by default.
        rows: the first so many rows; all by default.
        binarise: make pixels on or off, by chance as bright as they are: what Boltzmann machines take.
    """

    data: str
    columns: tuple[str, ...] | None = None
    rows: int | None = None
    binarise: bool = False

    def read(self, part: Part) -> Data | Binarised:
        """The rows and columns that were asked for."""
        data = read_data(self.data, part)
        if self.columns is not None:
            if not isinstance(data, Table):
                raise InputError(f"--columns picks columns of a table, and {self.data} is none.")
            data = data.select(self.columns)
        if self.rows is not None:
            check_count("--rows", self.rows)
            data = _head(data, self.rows)
        return _binarised(self.data, data) if self.binarise else data


def _binarised(name: str, data: Data) -> Binarised:
    if not isinstance(data, Quantised):
        raise InputError(f"--binarise takes images of integer levels, and {name} holds none.")
    return Binarised(data)


def _head(data: Data, rows: int) -> Data:
    if isinstance(data, Quantised):
        labels = None if data.labels is None else data.labels[:rows]
        return replace(data, levels=data.levels[:rows], labels=labels)
    if isinstance(data, Table):
        return replace(data, values=data.values[:rows])
    return {name: value[:rows] for name, value in data.items()}


def event_shape(data: Data | Binarised) -> tuple[int, ...] | None:
    """Shape of one datum at site "x"; None where there is no such site."""
    if isinstance(data, Mapping):
        return tuple(data["x"].shape[1:]) if "x" in data else None
    return data.event_shape


def labels_for(program: Any, data: Data | Binarised) -> Tensor | None:
    """The condition of each row: the class labels of the data, for a program that is conditioned on something."""
    if getattr(program, "condition", None) is None:
        return None
    if isinstance(data, Quantised | Binarised) and data.labels is not None:
        return data.labels
    raise InputError("The program is conditioned on labels, and these data have none.")


def warn_of_scale(data: Data | Binarised) -> None:
    """Warn where numbers are far from unit size, which noising laws and the weights at the start take for granted."""
    if isinstance(data, Quantised | Binarised):
        return
    values = data.sites() if isinstance(data, Table) else data
    for name, value in values.items():
        if value.is_floating_point():
            mean, sd = float(value.double().mean()), float(value.double().std(correction=0))
            if abs(mean) > FAR or not 1 / FAR < sd < FAR:
                warnings.warn(
                    f"{name!r} has mean {mean:.3g} and standard deviation {sd:.3g}. Programs take data of about unit "
                    "size for granted: subtract the mean and divide by the standard deviation, or change the unit.",
                    stacklevel=2,
                )


def observations(data: Data | Binarised, seed: int) -> dict[str, Tensor]:
    """Values by site name; integer levels are dequantised or binarised by that seed, a table is one site of vectors."""
    if isinstance(data, Mapping):
        return dict(data)
    with forked_rng(seed):
        return {"x": data.all()}


def arguments_and_observations(
    program: Any, data: Data | Binarised, seed: int
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """What a program is called with, and what is observed.

    A Pyro function is given the columns (or arrays) that have the names of its arguments; the others are observations.
    Programs of an `event_shape` observe whole rows at site "x".
    """
    if hasattr(program, "event_shape") or isinstance(data, Quantised | Binarised):
        return (), observations(data, seed)
    values = data.sites() if isinstance(data, Table) else dict(data)
    if not inspect.isroutine(program):
        return (), values
    wanted = inspect.signature(program).parameters.values()
    missing = [
        p.name
        for p in wanted
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in values
    ]
    if missing:
        raise InputError(
            f"{program.__name__} is called with {', '.join(missing)}, and the data have {', '.join(values)}: "
            "name columns or arrays like its arguments."
        )
    names = [p.name for p in wanted if p.name in values]
    return tuple(values.pop(name) for name in names), values
