"""Where chains stand, with all they need to go on: in memory, and in files that hold numbers and text alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from probgen.core import Count, DamagedFile, InputError, NonNegativeInt, check_fields, describe
from probgen.files import PathLike, read_tensors, write_tensors

_FORMAT = "probgen chain state 1"
_DIGITS = 0.5  # how many of a dtype's digits of a density must agree

Record = TypeVar("Record", bound=Any)


@dataclass(frozen=True)
class ChainState:
    """Markov chains between two transitions; `infer(..., state=posterior.state)` goes on as if never stopped.

    Args:
        engine: the engine with its settings, as printed.
        step: transitions made so far, warm-up included.
        num_chains: chains, of each data set.
        kernel: the tensors of the kernel's state, by field, each `(..., n)`.
        tuning: step size, scale of the coordinates, trajectory length.
    """

    engine: str
    step: NonNegativeInt
    num_chains: Count
    kernel: dict[str, Tensor]
    tuning: dict[str, Tensor]

    def __post_init__(self) -> None:
        check_fields(self)

    def save(self, path: PathLike) -> None:
        """Write it to a safetensors file, which appears whole or not at all; `FileError` where it cannot be."""
        tensors = {f"kernel.{name}": value for name, value in self.kernel.items()}
        tensors |= {f"tuning.{name}": value for name, value in self.tuning.items()}
        facts = {"format": _FORMAT, "engine": self.engine, "step": self.step, "num_chains": self.num_chains}
        write_tensors(path, tensors, facts)

    @staticmethod
    def load(path: PathLike) -> ChainState:
        """Read what `save` wrote; `FileError` where there is nothing, `DamagedFile` for anything else."""
        tensors, facts = read_tensors(path)
        if facts.get("format") != _FORMAT:
            raise DamagedFile(f"{str(path)!r} is no chain state: it lacks {_FORMAT!r}.")
        kernel, tuning = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("kernel.", "tuning.")
        )
        return ChainState(facts["engine"], facts["step"], facts["num_chains"], kernel, tuning)


# --- going on from a state -------------------------------------------------------------------------------------------


def check_fits(saved: Any, engine: Any, num_chains: int) -> None:
    """Raise `InputError` unless `saved` is a state of this engine with this number of chains."""
    if not isinstance(saved, ChainState):
        raise InputError(
            f"{describe(engine)} goes on from a ChainState (posterior.state, or ChainState.load(path)), "
            f"got {describe(saved)}."
        )
    if saved.engine.partition("(")[0] != describe(engine):
        raise InputError(
            f"The state is that of {saved.engine}; {describe(engine)} cannot go on from it. To start from its draws: "
            "infer(..., init=posterior)."
        )
    if saved.num_chains != num_chains:
        raise InputError(
            f"The state holds {saved.num_chains} chains, asked for are {num_chains}: they must agree."
        )


def check_same_density(saved: Tensor, found: Tensor) -> None:
    """Raise `InputError` where log densities `(n,)` at the saved positions are not what they were; NaN says nothing."""
    off = (found - saved).abs() > torch.finfo(saved.dtype).eps ** _DIGITS * (1 + saved.abs())
    if bool(off.any()):
        first = int(off.nonzero()[0, 0])
        raise InputError(
            f"The state belongs to another program or other observations: where chain {first} stood the log density "
            f"was {float(saved[first]):.8g} and is {float(found[first]):.8g}. To start from its draws: "
            "infer(..., init=posterior)."
        )


def tensors_of(record: Any) -> dict[str, Tensor]:
    """The tensors of a NamedTuple by field, those of NamedTuples inside by dotted names."""
    return dict(_walk(record))


def _walk(record: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in record._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        else:
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _walk(value))


def restored(tensors: dict[str, Tensor], like: Record, shapes: bool = True) -> Record:
    """A NamedTuple as `like`, of saved tensors; `InputError` where names, or shapes if asked for, differ."""
    expected = {name: tuple(value.shape) if shapes else () for name, value in _walk(like)}
    got = {name: tuple(value.shape) if shapes else () for name, value in tensors.items()}
    if expected != got:
        raise InputError(
            f"The state to go on from does not fit: expected {expected}, got {got}. It must come from the same engine, "
            "program, observations and number of chains."
        )
    return _filled(like, tensors, "")


def _filled(like: Record, tensors: dict[str, Tensor], prefix: str) -> Record:
    def fill(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensors[prefix + name].to(value)
        return _filled(value, tensors, f"{prefix}{name}.")

    return type(like)(**{name: fill(name, value) for name, value in like._asdict().items()})
