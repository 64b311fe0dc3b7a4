"""Functions of tensors, compiled once for each combination of shapes."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from probgen.core import UnsupportedError
from probgen.kernels.parts import in_parts
from probgen.targets.graphs import recorded

_A_TENSOR = torch.empty(0)


class Compiled:
    """A function whose operations are recorded, simplified and compiled where it meets shapes that are new to it.

    Nothing of Python runs in later calls, and nothing but shapes is looked at: what is no tensor among the arguments
    must be the same object or an equal one for the same shapes to mean the same function.

    Args:
        function: of tensors, tuples of tensors and other objects; gives tuples and dictionaries of tensors.

    Raises:
        UnsupportedError: the operations cannot be recorded, as where they depend on values.

    >>> double = Compiled(lambda x, factor: (x * factor,))
    >>> double(torch.ones(2), 2)
    (tensor([2., 2.]),)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._made: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        function, result, tensors = self._made_for(args)
        return _filled_in(result, iter(function(*tensors)))

    def repeat(self, going: Callable[[Tensor], bool], state: Any, *args: Any) -> Any:
        """state = function(state, *args) for as long as `going` says so of the first tensor of the state.

        Shapes stay, and are looked at once: a call costs half of what it does otherwise.
        """
        function, _, tensors = self._made_for((state, *args))
        count = len(_taken_apart(state)[0])
        while going(tensors[0]):
            tensors[:count] = [x.contiguous() for x in function(*tensors)]
        return _filled_in(state, iter(tensors))

    def _made_for(self, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any, list[Tensor]]:
        """The compiled function for arguments like these, what it gives, and the tensors to give to it."""
        tensors, others = _taken_apart(args)
        key = (others, *[(x.shape, x.dtype, x.device) for x in tensors])
        if key not in self._made:
            self._made[key] = self._make(args, tensors)
        return (*self._made[key], tensors)

    def _make(self, args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Callable[..., Any], Any]:
        """The compiled function from tensors to tensors, and what is to be built from these."""
        result: list[Any] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            result[:] = [self.function(*_filled_in(args, iter(tensors)))]
            return _taken_apart(result[0])[0]

        try:
            apart = in_parts(recorded(flat, *tensors))
            function = _compile(recorded(apart, *tensors), tensors)
        except Exception as error:  # whatever the recorder or the compiler raises
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnsupportedError(
                f"The transitions could not be compiled: {type(error).__name__}: {first} Take compile=False."
            ) from error
        return function, _filled_in(result[0], itertools.repeat(_A_TENSOR))


def _compile(graph: fx.GraphModule, tensors: list[Tensor]) -> Callable[..., Any]:
    with warnings.catch_warnings(), _environment_kept():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch against itself, where it is imported
        from torch import _inductor

        # There is one file to compile: no pool is started. Shapes were looked at: no second look at every call.
        with _inductor.config.patch(compile_threads=1, size_asserts=False):
            return _inductor.compile(graph, list(tensors))


@contextmanager
def _environment_kept() -> Iterator[None]:
    """The compiler writes an address into the environment."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def _taken_apart(values: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors in nested tuples and dictionaries, contiguous, and whatever else is there."""
    tensors: list[Tensor] = []
    others: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value.contiguous())
        elif isinstance(value, tuple):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        else:
            others.append(value)

    visit(values)
    return tensors, tuple(others)


def _filled_in(values: Any, tensors: Iterator[Any]) -> Any:
    """The same nested tuples and dictionaries with other tensors."""
    if isinstance(values, Tensor):
        return next(tensors)
    if isinstance(values, tuple):
        parts: Iterable[Any] = [_filled_in(part, tensors) for part in values]
        return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
    if isinstance(values, dict):
        return {name: _filled_in(value, tensors) for name, value in values.items()}
    return values
