"""Where chains stand, with all they need to go on: in memory, and in files that hold numbers and text alone."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from probgen.core import InputError, describe

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
    step: int
    num_chains: int
    kernel: dict[str, Tensor]
    tuning: dict[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, which appears whole or not at all; `InputError` where it cannot be."""
        from safetensors.torch import save

        tensors = {f"kernel.{name}": value for name, value in self.kernel.items()}
        tensors |= {f"tuning.{name}": value for name, value in self.tuning.items()}
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        facts = {"format": _FORMAT, "engine": self.engine, "step": self.step, "num_chains": self.num_chains}
        sealed = facts | {"digest": _digest(facts, tensors)}
        _replace(Path(path), save(tensors, metadata={"probgen": json.dumps(sealed)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ChainState:
        """Read what `save` wrote; `InputError` for anything else, damaged files included."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("probgen", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path} is not a saved chain state: {str(error).splitlines()[0]}.") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise InputError(f"{path} is a safetensors file, but not a chain state: it lacks {_FORMAT!r}.")
        if facts.pop("digest", "") != _digest(facts, tensors):
            raise InputError(
                f"{path} is damaged: its checksum does not fit. Take another copy, or run the chains anew."
            )
        groups: dict[str, dict[str, Tensor]] = {"kernel": {}, "tuning": {}}
        for name, value in tensors.items():
            group, _, field = name.partition(".")
            groups[group][field] = value
        return ChainState(facts["engine"], facts["step"], facts["num_chains"], **groups)


def _digest(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all that a file holds."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file next to `path`, then put it in its place in one move."""
    try:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a name, or with a null in it
        raise InputError(f"The chain state could not be written to {str(path)!r}: {error}.") from error


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
