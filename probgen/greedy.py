"""Greedy pretraining: a deep machine is fitted layer by layer, each to what the layers below make of the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from probgen.core import (
    Count,
    InputError,
    NonNegativeInt,
    Objective,
    Program,
    UnsupportedError,
    check_arguments,
    shown,
)
from probgen.files import PathLike
from probgen.fitting import fit
from probgen.randomness import forked_rng
from probgen.targets import check_event
from probgen.training import History, Optim, Rows

_ROWS_FOR_RATES = 4096


@runtime_checkable
class Layer(Program, Protocol):
    """Two neighbouring layers as a machine of their own, whose hidden units are data for the next."""

    event_shape: tuple[int, ...]

    def set_rates(self, x: Tensor) -> None:
        """Begin with units that are on as often as in data x `(n, *event)`."""

    def ascend(self, x: Tensor) -> Tensor:
        """A draw of the hidden units given x `(batch, *event)`: `(batch, num_hidden)`."""


@runtime_checkable
class Stacked(Program, Protocol):
    """A machine of several layers that can be fitted one after another."""

    def stack(self) -> list[Any]:
        """A `Layer` for each pair of neighbours, from the data upwards."""

    def assemble(self, stack: Sequence[Any], /) -> None:
        """Make its own weights of those of the stack."""


def pretrain(
    machine: Any,
    data: Any,
    objective: Objective,
    *,
    num_steps: Count = 1000,
    batch_size: Count = 128,
    optim: Optim = Optim(),  # noqa: B008 -- frozen
    seed: NonNegativeInt = 0,
    run: PathLike | None = None,
    progress: bool = True,
) -> list[History]:
    """Fit a deep machine layer by layer, from the data upwards: the hidden units of one are the data of the next.

    Hidden units are drawn anew for every step. Each layer begins at the rates of its data.

    Args:
        machine: e.g. a `DeepBeliefNet`, which is then fitted, or a `DeepBoltzmannMachine`, which `fit` goes on with.
        data: as for `fit`, of site "x".
        objective: of one layer, e.g. `ContrastiveDivergence()`; each is fitted by a copy of its own.
        num_steps, batch_size, optim, seed, progress: of the fit of each layer, see `fit`.
        run: a folder that keeps the fits, one folder a layer; see `fit`.

    Returns the `History` of each layer. Raises `UnsupportedError` for machines that are no stack; otherwise as `fit`.

    Source: Hinton, Osindero & Teh (2006), Neural Computation 18; Salakhutdinov & Hinton (2009), AISTATS.

    >>> from probgen.models.deep_belief_net import example
    >>> from probgen.objectives.contrastive_divergence import ContrastiveDivergence
    >>> x = torch.ones(20, 4)
    >>> [len(h.loss) for h in pretrain(example(), x, ContrastiveDivergence(), num_steps=3, progress=False)]
    [3, 3]
    """
    check_arguments(pretrain, locals())
    _check(machine, Rows(data).batch(torch.arange(1)).data)
    with forked_rng(seed):
        stack, histories = machine.stack(), []
        for level, layer in enumerate(stack):
            seen = Lifted(data, stack[:level], layer)
            with torch.no_grad():
                layer.set_rates(seen[torch.arange(min(len(seen), _ROWS_FOR_RATES))])
            history = fit(
                layer,
                seen,
                copy.deepcopy(objective),
                num_steps=num_steps,
                batch_size=batch_size,
                optim=optim,
                seed=seed,
                run=None if run is None else Path(run) / f"layer_{level + 1}",
                progress=progress,
            )
            histories.append(history)
        machine.assemble(stack)
    return histories


def _check(machine: Any, first: Mapping[str, Tensor]) -> None:
    if isinstance(machine, type) or not isinstance(machine, Stacked):
        raise UnsupportedError(
            f"machine must be a stack of layers, with stack() and assemble(), as DeepBeliefNet and "
            f"DeepBoltzmannMachine are; got {shown(machine)}. What is none is fitted by fit()."
        )
    if "x" not in first:
        raise InputError(f"pretrain needs data for site 'x', got {sorted(first) or 'none'}.")
    check_event(machine, first)


class Lifted:
    """Data as a layer of a stack sees them: hidden units of the layers below, drawn anew whenever they are asked for.

    Args:
        data: as for `fit`, of site "x".
        below: the layers below, from the data upwards.
        layer: the layer that is to be fitted.

    >>> from probgen.models.deep_belief_net import example
    >>> first, second = example().stack()
    >>> Lifted(torch.ones(20, 4), [first], second)[torch.arange(5)].shape
    torch.Size([5, 3])
    """

    def __init__(self, data: Any, below: Sequence[Any], layer: Any) -> None:
        self.data, self.below, self.event_shape = data, below, layer.event_shape
        self._rows, self._like = Rows(data), next(iter(layer.parameters())).new_zeros(())

    def __len__(self) -> int:
        return self._rows.total

    def __getitem__(self, index: Tensor) -> Tensor:
        x = self._rows.batch(index, self._like).data["x"]
        with torch.no_grad():
            for layer in self.below:
                x = layer.ascend(_copied(x, layer.event_shape))
        return _copied(x, self.event_shape)


def _copied(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """x `(batch, *event)` as often as a layer of this shape, `(*event)` or `(copies, *event)`, has copies of it."""
    copies = event_shape[: len(event_shape) - x.ndim + 1]
    return x[:, None].expand(-1, *copies, *x.shape[1:]) if copies else x
