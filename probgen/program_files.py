"""Files of programs: weights, constants, and how to make the program that they belong to."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probgen.core import DamagedFile, InputError, describe
from probgen.discovery import methods
from probgen.files import PathLike, read_tensors, write_tensors
from probgen.recorded import NotPlainError, from_plain, to_plain

FORMAT = "probgen program 1"
_NO_WEIGHT = "."  # begins names of tensors that a program was made with, and of no weight


def write_program(program: nn.Module, path: PathLike) -> None:
    """Write weights, constants and, where there is one, the recipe of a program; see `probgen.save`."""
    tensors = _state(program)
    unusable = [name for name, value in tensors.items() if nn.parameter.is_lazy(value) or value.is_meta]
    if unusable:
        raise InputError(
            f"{describe(program)} has no values yet at {', '.join(unusable)}: run it once first."
        )
    facts = {"format": FORMAT, "program": describe(program), "training": program.training}
    made_of: dict[str, Tensor] = {}
    try:
        recipe = _recipe(program, tensors, made_of)
    except NotPlainError as reason:
        write_tensors(path, tensors, facts | {"recipe": None, "reason": str(reason)})
    else:
        write_tensors(path, tensors | made_of, facts | {"recipe": recipe})


def _recipe(program: nn.Module, tensors: Mapping[str, Tensor], made_of: dict[str, Tensor]) -> Any:
    """How to make the program again, tried out; `NotPlainError` where that gives another one.

    Tensors that it was made with and that are none of its own are put into `made_of`.
    """
    names = {id(value): name for name, value in tensors.items()}
    used: set[str] = set()

    def keep(tensor: Tensor) -> str:
        name = names.setdefault(id(tensor), f"{_NO_WEIGHT}{len(made_of)}")
        used.add(name)
        if name not in tensors:
            made_of[name] = tensor
        return name

    recipe = to_plain(program, keep)
    everything = {**tensors, **made_of}
    again = _make(recipe, {n: v.detach().cpu().clone() if n in used else v for n, v in everything.items()})
    _take_dtypes(again, tensors)
    if differences := _differences(_state(again), tensors):
        raise NotPlainError(f"it was changed after it was made ({'; '.join(differences)})")
    if (changed := _settings(program)) != _settings(again):
        found = dict(_settings(again))
        names_changed = [name for name, value in changed if name not in found or found[name] != value]
        raise NotPlainError(f"it was changed after it was made ({', '.join(names_changed)})")
    return recipe


def read_program(path: PathLike, into: nn.Module | None = None) -> nn.Module:
    """Make the program of a file, or fill `into` with its weights; see `probgen.load`."""
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        raise DamagedFile(f"{str(path)!r} is no program: it lacks {FORMAT!r}.")
    state = {name: value for name, value in tensors.items() if not name.startswith(_NO_WEIGHT)}
    if into is not None:
        if not isinstance(into, nn.Module):
            raise InputError(f"into= takes a program that is an nn.Module, got {describe(into)}.")
        _check_fits(path, facts, into, state)
        return _filled(into, state)
    if facts.get("recipe") is None:
        raise InputError(
            f"{str(path)!r} holds the weights of {facts.get('program')}, but not how to make it: "
            f"{facts.get('reason')}. Make it yourself and call load(path, into=program)."
        )
    try:
        program = _make(facts["recipe"], tensors)
    except NotPlainError as reason:
        raise DamagedFile(f"{str(path)!r} asks for a program that cannot be made: {reason}.") from reason
    _take_dtypes(program, state)
    if differences := _differences(_state(program), state):
        raise DamagedFile(
            f"{str(path)!r} holds other weights than its program has: {'; '.join(differences)}."
        )
    return _filled(program, state).train(bool(facts.get("training")))


def _check_fits(
    path: PathLike, facts: Mapping[str, Any], program: nn.Module, found: Mapping[str, Tensor]
) -> None:
    if differences := _differences(_state(program), found):
        raise InputError(
            f"{str(path)!r} holds the weights of {facts.get('program')}, which do not fit {describe(program)}; nothing "
            f"was changed: {'; '.join(differences)}."
        )


def _state(program: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that are shared under each of their names."""
    named = itertools.chain(
        program.named_parameters(remove_duplicate=False), program.named_buffers(remove_duplicate=False)
    )
    return dict(named)


def _settings(program: nn.Module) -> list[tuple[str, Any]]:
    """Plain attributes of all parts, and which weights are shared: what a recipe must bring back beside tensors."""
    found = []
    for prefix, part in program.named_modules(remove_duplicate=False):
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "training":
                with contextlib.suppress(NotPlainError):
                    found.append((f"{prefix}.{name}".lstrip("."), to_plain(value, keep=lambda _: "")))
    return [*found, *((name, "") for name, _ in program.named_parameters())]


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How the tensors of a file differ from those of a program, in names, shapes and dtypes."""
    lines = []
    if missing := expected.keys() - found.keys():
        lines.append(f"missing in the file: {', '.join(sorted(missing))}")
    if unexpected := found.keys() - expected.keys():
        lines.append(f"unknown to the program: {', '.join(sorted(unexpected))}")
    for name, value in expected.items():
        if name in found and (value.shape, value.dtype) != (found[name].shape, found[name].dtype):
            lines.append(f"{name} is {_kind_of(value)} in the program, {_kind_of(found[name])} in the file")
    return lines


def _kind_of(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _take_dtypes(program: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Have floating point weights in the dtypes they were saved in."""
    for name, value in _state(program).items():
        if name in found and value.is_floating_point() and found[name].is_floating_point():
            value.data = value.data.to(found[name].dtype)


def _filled(program: nn.Module, found: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, value in _state(program).items():
            value.copy_(found[name])
    return program


def _make(recipe: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The program of a recipe, on the CPU; `NotPlainError` where nothing comes of it."""
    methods("models")  # so that all of them are known
    program = from_plain(recipe, tensors)
    if not isinstance(program, nn.Module):
        raise NotPlainError(f"{describe(program)} is no program")
    return program
