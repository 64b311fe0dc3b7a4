"""Densities known from a few rows of the data at a time: rows drawn with replacement, anew for every evaluation.

With N rows, m of them drawn, log p(z) + (N/m) sum_i log p(x_i | z) and its gradient are unbiased. Rows come from
outside, as standard normals of which row = floor(Phi(normal) N): each chain has rows of its own, the same whatever runs
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from probgen.core import InputError, Target, UnsupportedError, check_count, describe
from probgen.targets.density import Density, ProgramDensity, density
from probgen.targets.graphs import recorded
from probgen.targets.point import first_point
from probgen.targets.routes import Vmap


class Rows(NamedTuple):
    """Where rows are drawn.

    Args:
        name: of the plate.
        size: N, rows there are.
        drawn: m, rows that are drawn.
    """

    name: str
    size: int
    drawn: int


class Subsampled(Protocol):
    """A program that can be run on some of its rows."""

    rows: tuple[Rows, ...]

    def at(self, index: Tensor) -> Target:
        """The program on the rows of an index `(m,)`, those of several plates one after another."""


def minibatch_density(target: Target, batch_size: int | None) -> Density:
    """The density of a target by minibatches; by all rows where the program draws none and `batch_size` is None.

    Args:
        target: a program of a `Batch`, or a function with `pyro.plate(..., subsample_size=...)`.
        batch_size: rows of a `Batch` to draw; None for functions, which say it themselves, or for all rows.

    Raises `InputError` for a batch size out of range or out of place, `UnsupportedError` for latents of single rows.
    """
    if target.per_row:
        return (
            density(target) if batch_size is None else MinibatchDensity(target, _OfBatch(target, batch_size))
        )
    if batch_size is not None:
        raise InputError(
            f"batch_size={batch_size}, but {describe(target.program)} is no program of a Batch: a function says itself "
            'how many rows it draws, by pyro.plate("data", N, subsample_size=...). Leave batch_size out.'
        )
    plates = _subsampling_plates(target)
    return MinibatchDensity(target, _OfPlates(target, plates)) if plates else density(target)


class MinibatchDensity(ProgramDensity):
    """An unbiased estimate of log p(u), and of its gradient, from rows that normals choose.

    `function(u)` takes these as `normals` `(num_normals, n)`; whatever else a density is asked, as whether a start is
    finite, is answered by a fixed minibatch of evenly spaced rows.
    """

    def __init__(self, target: Target, subsampled: Subsampled) -> None:
        if target.sets:
            raise UnsupportedError(
                "Minibatches of several data sets side by side are not supported: pass one data set at a time, or take "
                "an engine that sees all rows."
            )
        self.subsampled = subsampled
        self.num_normals = sum(rows.drawn for rows in subsampled.rows)
        super().__init__(subsampled.at(_evenly(subsampled.rows)))

    def function(self, u: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        return partial(_split, self._recorded(u), self.value_and_grad)

    def _recorded(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Of points with their normals below them, `(dim + num_normals, n)`."""
        each = torch.func.vmap(self._value_and_grad, in_dims=(-1, -1), out_dims=(0, -1))

        def all_chains(both: Tensor) -> tuple[Tensor, Tensor]:
            return each(both[: self.dim], chosen_rows(both[self.dim :], self.subsampled.rows))

        with torch.enable_grad():
            return recorded(all_chains, torch.cat([u, u.new_zeros(self.num_normals, u.shape[1])]))

    def _value_and_grad(self, u: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        grad, value = torch.func.grad_and_value(lambda u: self._on_rows(index, u))(u)
        return value, grad

    def _on_rows(self, index: Tensor, u: Tensor) -> Tensor:
        layout = _OnRows(self, self.subsampled.at(index))
        return Vmap(layout).at(u, {}).log_prob().to(u.dtype)


def chosen_rows(normals: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    """floor(Phi(z) N), in 0..N-1: normals `(num_normals, n)` -> `(num_normals, n)` of int64.

    >>> chosen_rows(torch.tensor([[-9.0, 0.0, 9.0]]), (Rows("data", 10, 1),))
    tensor([[0, 5, 9]])
    """
    uniform = torch.special.ndtr(normals.double())
    parts = uniform.split([part.drawn for part in rows])
    return torch.cat(
        [(u * part.size).long().clamp(max=part.size - 1) for u, part in zip(parts, rows, strict=True)]
    )


class _OnRows:
    """The layout of a program, its rows exchanged."""

    def __init__(self, layout: ProgramDensity, target: Target) -> None:
        self.target, self.latents, self.nesting = target, layout.latents, layout.nesting
        self.summed_out, self.deterministic = layout.summed_out, layout.deterministic
        self.dim, self.dtype, self.device = layout.dim, layout.dtype, layout.device
        self.sets: dict[str, Tensor] = {}
        self.num_sets = 1


def _split(
    recorded: Callable[[Tensor], tuple[Tensor, Tensor]],
    fixed: Callable[[Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    normals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return fixed(u) if normals is None else recorded(torch.cat([u, normals]))


def _evenly(rows: tuple[Rows, ...]) -> Tensor:
    return torch.cat([torch.arange(part.drawn) * part.size // part.drawn for part in rows])


# --- programs of a Batch ------------------------------------------------------------------------------------------


class _OfBatch:
    """Some rows of a `Batch`, each counted N/m times."""

    def __init__(self, target: Target, batch_size: int) -> None:
        check_count("batch_size", batch_size)
        self.target, size = target, target.batch.size
        if batch_size > size:
            raise InputError(f"batch_size={batch_size}, but there are {size} rows of data.")
        if not target.data:
            raise InputError(
                f"Nothing was observed of {describe(target.program)}: there are no rows to draw."
            )
        self.rows: tuple[Rows, ...] = (Rows("data", size, batch_size),)
        self._refuse_local_latents()

    def at(self, index: Tensor) -> Target:
        whole = self.target.batch
        batch = replace(
            whole,
            data={name: value[index] for name, value in whole.data.items()},
            condition=None if whole.condition is None else whole.condition[index],
            index=index if whole.index is None else whole.index[index],
            total=whole.total,
            num_rows=len(index),
        )
        args = (batch, *self.target.args[1:])
        model = pyro.condition(self.target.program.model, data=batch.data)
        return replace(self.target, model=model, args=args, data=batch.data)

    def _refuse_local_latents(self) -> None:
        """Latents of single rows change their number with the rows."""
        few, fewer = (first_point(self.at(torch.zeros(n, dtype=torch.int64))).latents for n in (3, 2))
        for latent, other in zip(few, fewer, strict=True):
            if latent.shape != other.shape:
                raise UnsupportedError(_local(latent.name))


# --- plates that draw rows ----------------------------------------------------------------------------------------


class _OfPlates:
    """The rows that plates with a `subsample_size` draw, and the observations at these rows."""

    def __init__(self, target: Target, rows: tuple[Rows, ...]) -> None:
        self.target, self.rows = target, rows
        plates, few = {part.name for part in rows}, self.at(_evenly(rows))
        for latent in first_point(few).latents:
            if plates & set(few.sites[latent.name].plates):
                raise UnsupportedError(_local(latent.name))

    def at(self, index: Tensor) -> Target:
        split = dict(
            zip((part.name for part in self.rows), index.split([r.drawn for r in self.rows]), strict=True)
        )
        return replace(self.target, model=GivenRows(split)(self.target.model))


def _local(name: str) -> str:
    return (
        f"Site {name!r} stands in the plate whose rows are drawn: each row has a latent of its own, which a minibatch "
        "would leave where it is. Minibatches are for latents that all rows share; sum the others out, or take an "
        "engine that sees all rows."
    )


def _subsampling_plates(target: Target) -> tuple[Rows, ...]:
    found = _Plates()
    first_point(replace(target, model=found(target.model)))
    return tuple(found.rows)


class _Plates(Messenger):
    """Writes down plates that draw some of their rows, and hides this from handlers further out."""

    def __enter__(self) -> Any:
        self.rows: list[Rows] = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            size, drawn = msg["fn"].size, msg["fn"].subsample_size
            if drawn is not None and drawn < size:
                self.rows.append(Rows(msg["name"], size, drawn))
                msg["stop"] = True


class GivenRows(Messenger):
    """Plates draw these rows; handlers further out are not asked.

    Args:
        index: rows by name of the plate.
    """

    def __init__(self, index: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.index = dict(index)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.index:
            msg["value"], msg["done"], msg["stop"] = self.index[msg["name"]], True, True
