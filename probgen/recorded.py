"""What something was made with, as plain values: how a file says what to make again, and what it may name.

A file names classes and functions that were put up for it here, and nothing else: no import, no attribute look-up, no
code comes from a file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probgen.core import check_arguments
from probgen.randomness import forked_rng

T = TypeVar("T")

_WIDEST, _ROOM = 8, 2**26  # bytes to make a value in: as float64 where a file holds int8, and beside it
_BUSIEST, _SPARE = 20, 1000  # tensors: for each one in the file, and beside it
# What a class without arguments seems to take: nn.Module's constructor refuses whatever it is given.
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NAMEABLE: dict[str, Any] = {}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.SiLU, nn.Softplus, nn.Tanh)
}


def nameable(thing: T) -> T:
    """Let files name this class or function of probgen; those of others are left as they are.

    >>> nameable(print) is print, "print" in _NAMEABLE
    (True, False)
    """
    described = cast(Any, thing)
    if described.__module__.startswith("probgen."):
        _NAMEABLE[described.__name__] = thing
    return thing


class Recorded(nn.Module):
    """An `nn.Module` that keeps what it was made with, so that a file can say how to make it again.

    What it is made with is held to the annotations of its constructor.

    Copies keep it too. Classes of probgen that derive from it are `nameable`.

    >>> from probgen.nets import MLP
    >>> recorded_arguments(MLP((2,), (1,), widths=[8]))["widths"]
    [8]
    """

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        given = inspect.signature(cls).bind_partial(*args, **kwargs).arguments  # copies are given nothing
        check_arguments(cls.__init__, given, cls.__name__)
        self = super().__new__(cls)
        object.__setattr__(self, "_made_with", (args, kwargs))
        return self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        signature = inspect.signature(cls.__init__)
        # Without it `inspect` and `help` would show the arguments of __new__.
        type.__setattr__(
            cls, "__signature__", signature.replace(parameters=list(signature.parameters.values())[1:])
        )
        nameable(cls)


def recorded_arguments(module: Recorded) -> dict[str, Any]:
    """The constructor's arguments by name, defaults included; parts that were replaced since as they are now."""
    args, kwargs = module._made_with
    bound = inspect.signature(type(module)).bind(*args, **kwargs)
    bound.apply_defaults()
    parts = dict(module.named_children())
    return {
        name: parts.get(name, value)
        for name, value in bound.arguments.items()
        if bound.signature.parameters[name].kind not in _VARIADIC
    }


# --- values to JSON and back -----------------------------------------------------------------------------------------


class NotPlainError(Exception):
    """A value that no file can hold; the text says which."""


def to_plain(value: Any, keep: Callable[[Tensor], str]) -> Any:
    """A value as JSON: numbers, texts and lists as they are, everything else as `{kind: content}`.

    Args:
        value: None, bool, int, float, str, lists, tuples, dictionaries, torch dtypes, tensors, what is `nameable`
            (functions, frozen dataclasses, recorded modules) and activations of `torch.nn`, in any nesting.
        keep: puts a tensor away and says by which name `from_plain` will find it.

    Raises `NotPlainError` for anything else.

    >>> from probgen.processes import VP
    >>> to_plain((1, math.inf, VP()), keep=lambda tensor: "")["tuple"][:2]
    [1, {'float': 'inf'}]
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple | Mapping):
        return _container_to_plain(value, keep)
    return _named_to_plain(value, keep)


def _container_to_plain(value: Any, keep: Callable[[Tensor], str]) -> Any:
    if isinstance(value, Mapping):
        return {"dict": [[to_plain(key, keep), to_plain(item, keep)] for key, item in value.items()]}
    items = [to_plain(item, keep) for item in value]
    return {"tuple": items} if isinstance(value, tuple) else items


def _named_to_plain(value: Any, keep: Callable[[Tensor], str]) -> Any:
    kind = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    if _ACTIVATIONS.get(kind.__name__) is value:
        return {"activation": kind.__name__}
    if _NAMEABLE.get(kind.__name__) is not kind:
        raise NotPlainError(f"{kind.__module__}.{kind.__qualname__} is not one of probgen's own")
    if kind is value:
        return {"named": kind.__name__}
    if isinstance(value, Recorded):
        arguments = recorded_arguments(value)
    else:
        arguments = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
    return {"made": [kind.__name__, {name: to_plain(item, keep) for name, item in arguments.items()}]}


def from_plain(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `to_plain` turned into JSON, made of these tensors on the CPU; the random stream stays as it is.

    Raises `NotPlainError` for what is not of its making, and for a value far larger than `tensors`.

    >>> from_plain({"made": ["VP", {"t_min": 0.01}]}, {}).t_min
    0.01
    """
    room = _ROOM + _WIDEST * sum(value.nbytes for value in tensors.values())
    with torch.device("cpu"), forked_rng(0), _Allowance(room, _SPARE + _BUSIEST * len(tensors)):
        try:
            return _read(plain, tensors)
        except Exception as error:  # whatever a constructor makes of arguments that are not its own
            raise NotPlainError(f"{type(error).__name__}: {error}") from error


def _read(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_read(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    return _READERS[kind](content, tensors)


def _made(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    name, arguments = content
    kind = _NAMEABLE[name]
    if not (isinstance(kind, type) and (issubclass(kind, Recorded) or is_dataclass(kind))):
        raise NotPlainError(f"{name} is nothing that can be made")
    return kind(**{str(key): _read(item, tensors) for key, item in arguments.items()})


def _named(content: Any, _: Mapping[str, Tensor]) -> Any:
    if not inspect.isfunction(_NAMEABLE[content]):
        raise NotPlainError(f"{content} is no function")
    return _NAMEABLE[content]


def _dtype(content: Any, _: Mapping[str, Tensor]) -> torch.dtype:
    found = vars(torch)[content]
    if not isinstance(found, torch.dtype):
        raise NotPlainError(f"{content} is no dtype")
    return found


_READERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "activation": lambda content, _: _ACTIVATIONS[content],
    "dict": lambda content, tensors: {_read(key, tensors): _read(item, tensors) for key, item in content},
    "dtype": _dtype,
    "float": lambda content, _: float(content),
    "made": _made,
    "named": _named,
    "tensor": lambda content, tensors: tensors[content],
    "tuple": lambda content, tensors: tuple(_read(item, tensors) for item in content),
}


class _Allowance(TorchDispatchMode):
    """Refuses to make new tensors once they would take more than a file of this size can be about.

    Args:
        num_bytes: in all new tensors together.
        num_tensors: new ones.
    """

    def __init__(self, num_bytes: int, num_tensors: int) -> None:
        super().__init__()
        self.num_bytes, self.num_tensors = num_bytes, num_tensors

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_new = not any(isinstance(item, Tensor) for item in tree_leaves((args, kwargs)))
        if is_new and any(argument.name == "device" for argument in func._schema.arguments):
            self.num_bytes -= func(*args, **kwargs | {"device": torch.device("meta")}).nbytes
            self.num_tensors -= 1
            if min(self.num_bytes, self.num_tensors) < 0:
                raise NotPlainError("it asks for far more numbers than the file holds")
        return func(*args, **kwargs)
