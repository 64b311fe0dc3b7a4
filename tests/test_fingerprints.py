"""Fingerprints: the same for the same, another for anything else, in every process."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probgen import models
from probgen.data import digits
from probgen.fingerprints import fingerprint, recipe
from probgen.processes import VE, VP


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    steps: int
    scale: Tensor


class Rows:
    """A data set that reads what it needs, and keeps some of it."""

    def __init__(self, values: Tensor, names: list[str]) -> None:
        self._values, self.names, self._cache = values, names, {}

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Tensor) -> Tensor:
        self._cache[len(self._cache)] = index
        return self._values[index]


def scaled_by(factor: Tensor | float, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A function that remembers two values."""
    return lambda x: x * factor + shift


def twice(x: Tensor) -> Tensor:
    """A function of this file that others refer to."""
    return 2 * x


def net(width: int = 3, seed: int = 0) -> nn.Module:
    """A small network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))


DIFFERENT: list[list[Any]] = [
    [0, 0.0, "0", None, False, b"0", [0], (0,), {0}, {0: None}, torch.zeros(()), torch.zeros(1)],
    [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3).double(), torch.ones(2, 3)],
    [np.zeros(3), np.zeros(3, dtype=np.float32), np.ones(3), torch.zeros(3)],
    [[1, [2, 3]], [1, 2, 3], [[1, 2], 3], [1, 2, [3]]],
    [Settings(1, torch.zeros(1)), Settings(2, torch.zeros(1)), Settings(1, torch.ones(1))],
    [VP(), VP(beta_max=10.0), VE()],
    [net(), net(4), net(seed=1), nn.Sequential(*list(net().children())[:2])],
    [
        scaled_by(2.0),
        scaled_by(3.0),
        scaled_by(torch.tensor(2.0)),
        scaled_by(2.0, 1.0),
        twice,
        lambda x: twice(x) + 1,
    ],
    [partial(twice, 1), partial(twice, 2), partial(twice, x=1)],
    [Rows(torch.zeros(3), ["a"]), Rows(torch.ones(3), ["a"]), Rows(torch.zeros(3), ["b"])],
    list(digits()),
]


@pytest.mark.parametrize("values", DIFFERENT, ids=lambda values: type(values[0]).__name__)
def test_what_differs_has_another_fingerprint(values: list[Any]) -> None:
    found = [fingerprint(value) for value in values]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"b": 1, "a": torch.arange(3)},
        lambda: {"a": torch.arange(3), "b": 1},
        lambda: dict(reversed({"a": torch.arange(6)[::2] // 2, "b": 1}.items())),
    ],
)
def test_order_of_keys_and_of_memory_do_not_matter(make: Callable[[], Any]) -> None:
    assert fingerprint(make()) == fingerprint({"a": torch.tensor([0, 1, 2]), "b": 1})


def test_a_data_set_that_was_read_is_the_same() -> None:
    rows = Rows(torch.arange(3), ["a"])
    before = fingerprint(rows)
    _ = rows[torch.tensor([1])]
    assert fingerprint(rows) == before


def test_a_list_that_holds_itself_has_one() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) != fingerprint([1, [1]])


def test_recipes_leave_weights_out_and_nothing_else() -> None:
    assert recipe(net()) == recipe(net(seed=1))
    assert len({recipe(net()), recipe(net(4)), recipe(net().double())}) == 3
    assert recipe(net()).startswith("Sequential with 13 weights, ")
    assert recipe(scaled_by(torch.zeros(2))) == recipe(scaled_by(torch.ones(2))) != recipe(scaled_by(2.0))


def test_training_and_frozen_weights_do_not_matter() -> None:
    program = net()
    before = recipe(program), fingerprint(program)
    program.eval().requires_grad_(requires_grad=False)
    assert (recipe(program), fingerprint(program)) == before


def test_names_survive_the_process() -> None:
    """Nothing depends on addresses, nor on the order in which a set happens to lie."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_fingerprints as t; print(t.all_of_them())"
    ended = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert set(ended) == {all_of_them()}


def all_of_them() -> str:
    """The fingerprint of the fingerprints above, and of the recipes of all programs."""
    modules = (
        importlib.import_module(f"probgen.models.{m.name}") for m in pkgutil.iter_modules(models.__path__)
    )
    recipes = [recipe(module.example()) for module in modules if hasattr(module, "example")]
    many = {"abc", "def", "ghi", 3.5}
    return fingerprint([[fingerprint(value) for value in values] for values in DIFFERENT] + recipes + [many])
