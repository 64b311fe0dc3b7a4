"""Fingerprints: short names by which a run folder knows its program, its settings and its data again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial, singledispatch
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from probgen.core import describe

_DIGITS = 16
_PLAIN = (str, int, float, complex, bool, bytes, type(None), torch.dtype, torch.device, PurePath, Enum)


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of a SHA-256 over a value: types, shapes and every bit.

    Args:
        value: numbers, text, tensors, arrays and containers of them; dataclasses; modules, with their weights;
            functions: their code, and the values it refers to. Of other objects, data sets among them, the public
            attributes and private tensors.

    Equal values have equal fingerprints in every process of the same version of Python.

    >>> fingerprint({"x": torch.zeros(2)}) == fingerprint({"x": torch.zeros(2)})
    True
    >>> fingerprint({"x": torch.zeros(2)}) == fingerprint({"x": torch.ones(2)})
    False
    """
    return _Digest(numbers=True).of(value)


def recipe(program: Any) -> str:
    """A program in a line: its name, its weights, and a fingerprint of all but the numbers in its tensors.

    The same before and after fitting.

    >>> net = nn.Linear(2, 1)
    >>> before = recipe(net)
    >>> _ = nn.init.zeros_(net.weight)
    >>> recipe(net) == before, before.partition(", ")[0]
    (True, 'Linear with 3 weights')
    """
    count = sum(weight.numel() for weight in program.parameters()) if isinstance(program, nn.Module) else 0
    weights = f" with {count:,} weights" if count else ""
    return f"{describe(program)}{weights}, {_Digest(numbers=False).of(program)}"


class _Digest:
    """A SHA-256 that is fed with values.

    Args:
        numbers: whether the numbers in tensors count, or only their shapes and dtypes.
    """

    def __init__(self, numbers: bool) -> None:
        self.numbers = numbers
        self._sha = hashlib.sha256()
        self._seen: dict[
            int, tuple[int, Any]
        ] = {}  # for what holds itself; held, so that no id is given out again

    def of(self, value: Any) -> str:
        """The fingerprint of one value."""
        self._add(value)
        return self._sha.hexdigest()[:_DIGITS]

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, _PLAIN):
            self._text(f"{type(value).__name__} {value!r}")
        elif id(value) in self._seen:
            self._text(f"seen {self._seen[id(value)][0]}")
        else:
            self._seen[id(value)] = len(self._seen), value
            self._text(f"{type(value).__name__} {getattr(value, '__qualname__', '')}")
            for part in _parts(value):
                self._add(part)
            self._text("end")

    def _tensor(self, value: Tensor) -> None:
        self._text(f"Tensor {value.dtype} {tuple(value.shape)}")
        if self.numbers:
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._sha.update(bits.numpy().data)

    def _text(self, text: str) -> None:
        self._sha.update(f"{len(text)} {text}".encode(errors="surrogateescape"))


@singledispatch
def _parts(value: Any) -> Iterator[Any]:
    """What a value is made of, in an order that is always the same."""
    if hasattr(value, "__array__") and hasattr(value, "tobytes"):
        yield from (str(value.dtype), tuple(value.shape), value.tobytes())
    elif is_dataclass(value):
        yield from (getattr(value, item.name) for item in fields(value))
    else:
        yield from (len(value) if hasattr(value, "__len__") else None, _public(value))


@_parts.register(type)
@_parts.register(ModuleType)
def _of_name(_value: Any) -> Iterator[Any]:
    yield from ()  # the name says enough


@_parts.register
def _of_module(value: nn.Module) -> Iterator[Any]:
    yield _public(value)
    yield dict(value.named_parameters(recurse=False))
    yield dict(value.named_buffers(recurse=False))
    yield dict(value.named_children())


@_parts.register(Mapping)
def _of_mapping(value: Mapping[Any, Any]) -> Iterator[Any]:
    for key in sorted(value, key=repr):
        yield from (key, value[key])


@_parts.register(list)
@_parts.register(tuple)
def _of_sequence(value: Sequence[Any]) -> Iterator[Any]:
    yield from value


@_parts.register(set)
@_parts.register(frozenset)
def _of_set(value: Collection[Any]) -> Iterator[Any]:
    yield from sorted(map(fingerprint, value))


@_parts.register
def _of_function(value: FunctionType) -> Iterator[Any]:
    yield from (value.__code__, value.__defaults__, value.__kwdefaults__, dict(_referred(value)))


@_parts.register
def _of_code(value: CodeType) -> Iterator[Any]:
    yield from (value.co_code, value.co_consts, value.co_names, value.co_varnames)


@_parts.register
def _of_method(value: MethodType) -> Iterator[Any]:
    yield from (value.__self__, value.__func__)


@_parts.register(partial)
def _of_partial(value: partial[Any]) -> Iterator[Any]:
    yield from (value.func, value.args, value.keywords)


def _public(value: Any) -> dict[str, Any]:
    """Attributes that were set; of private ones tensors alone, of cached ones none: they come and go."""
    module = isinstance(value, nn.Module)
    return {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if not hasattr(getattr(type(value), name, None), "__get__")
        and (not name.startswith("_") or (isinstance(item, Tensor) and not module))
        and not (module and name == "training")
    }


def _referred(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Values that a function refers to by name; of functions and classes of other files the name alone."""
    scope = {
        name: function.__globals__[name] for name in _names(function.__code__) & set(function.__globals__)
    }
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        scope[name] = _content(cell)
    for name, value in scope.items():
        foreign = isinstance(value, FunctionType) and value.__module__ != function.__module__
        yield name, value.__qualname__ if foreign else value


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put into it yet
        return None
