"""Markov chains that leave in a run folder all they need to go on, and the draws made so far."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from probgen.core import Cost, DamagedFile, DamagedFileWarning, InputError
from probgen.interrupts import Stop, stopping
from probgen.runs import Checkpoint, Checkpoints, Run

_DRAWS = "draws."


class Draws:
    """What is drawn, by name, as it comes: positions u `(num_draws, dim, n)` and statistics `(num_draws, n)`.

    Args:
        num_draws: how many there will be.

    >>> draws = Draws(3)
    >>> draws.add([{"u": torch.zeros(2, 4)}])
    >>> draws.num_made, draws.since(1)["u"].shape
    (2, torch.Size([1, 4]))
    """

    def __init__(self, num_draws: int) -> None:
        self.num_draws, self.num_made = num_draws, 0
        self.values: dict[str, Tensor] = {}

    def add(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in some more."""
        if not parts:
            return
        if not self.values:
            self.values = {
                name: value.new_empty(self.num_draws, *value.shape[1:]) for name, value in parts[0].items()
            }
        stop = self.num_made + sum(len(part["u"]) for part in parts)
        for name, values in self.values.items():
            torch.cat([part[name] for part in parts], out=values[self.num_made : stop])
        self.num_made = stop

    @property
    def missing(self) -> int:
        """How many are to be made yet."""
        return self.num_draws - self.num_made

    def since(self, first: int) -> dict[str, Tensor]:
        """Those from the `first`-th on."""
        return {name: value[first : self.num_made] for name, value in self.values.items()}


class Moving(Protocol):
    """Chains that can be kept: see `Chains`."""

    step: int
    warm: bool
    draws: Draws

    def snapshot(self) -> Any:
        """All that moves, as `packed` takes it."""

    def progress(self) -> dict[str, float]:
        """How far they are, in numbers."""

    def cost(self) -> Cost:
        """What was paid so far."""


class Keeper:
    """Keeps nothing: for chains that have no run folder."""

    @property
    def due(self) -> bool:
        """Whether to stop between two transitions and call `keep`."""
        return False

    def recover(self, draws: Draws) -> Checkpoint | None:
        """The newest state there is to go on from, draws made until then filled in."""
        return None

    def keep(self, chains: Moving) -> None:
        """Keep the state, and the draws made since the last time."""


class RunKeeper(Keeper):
    """Keeps chains in a run folder: in warm-up the last few states; then with each state the draws that led to it.

    Draws are written once. Where a file is damaged, chains go on from the last before it, and make the same draws.

    Args:
        run: the folder, held by this process.
        stop: whether the process was asked to stop.
        name: what runs, for messages.
    """

    def __init__(self, run: Run, stop: Stop, name: str) -> None:
        self.run, self.stop, self.name = run, stop, name
        self.checkpoints = run.checkpoints
        self._of_draws = Checkpoints(run.checkpoints.folder, keep=sys.maxsize)
        self._num_kept = 0  # draws

    @property
    def due(self) -> bool:
        """After half a minute, or at once where the process is to stop."""
        return self.stop.requested or self.checkpoints.due

    def recover(self, draws: Draws) -> Checkpoint | None:
        """See `Keeper`; damaged files are passed over with a warning."""
        last, damaged = None, []
        for step in self.checkpoints.steps():
            try:
                found = self.checkpoints.read(step)
            except DamagedFile as error:
                damaged.append(str(error))
                continue
            if found.facts["first_draw"] == draws.num_made:
                draws.add(_drawn(found))
                last = found
        for message in damaged:
            where = f"Going on from step {last.step:,}." if last else "Beginning anew."
            warnings.warn(f"{message} {where}", DamagedFileWarning, stacklevel=2)
        self._forget_after(last.step if last else -1)
        self._num_kept = draws.num_made
        return last

    def keep(self, chains: Moving) -> None:
        """See `Keeper`. Raises `KeyboardInterrupt` where the process is to stop, `FileError` where there is no room."""
        draws = chains.draws
        tensors, facts = packed(chains.snapshot())
        new = {f"{_DRAWS}{name}": value for name, value in draws.since(self._num_kept).items()}
        if draws.num_made:
            self.checkpoints = self._of_draws
        facts |= {"warm": chains.warm, "first_draw": self._num_kept}
        self.checkpoints.write(chains.step, tensors | new, facts)
        self._num_kept = draws.num_made
        cost = chains.cost()
        seconds = round(cost.seconds + cost.warmup_seconds, 3)
        self.run.log(step=chains.step, draws=draws.num_made, seconds=seconds, **chains.progress())
        if self.stop.requested:
            self._leave(chains)

    def _leave(self, chains: Moving) -> NoReturn:
        draws = chains.draws
        stage = f"after {draws.num_made:,} of {draws.num_draws:,} draws" if chains.warm else "in warm-up"
        saved = f"All is saved in {str(self.run.path)!r}: make the same call again to go on."
        self.stop.message = f"{self.name} stopped {stage}. {saved}"
        raise KeyboardInterrupt

    def _forget_after(self, step: int) -> None:
        """What comes after is made again."""
        for later in self.checkpoints.steps():
            if later > step:
                self.checkpoints.path(later).unlink(missing_ok=True)
        if self.run.resumed:
            self.run.rewind(step)


@contextmanager
def keeping(run: Run | None, name: str) -> Iterator[Keeper]:
    """The keeper of a run; inside, Ctrl-C and SIGTERM wait until all is saved."""
    if run is None:
        yield Keeper()
    else:
        with stopping() as stop:
            yield RunKeeper(run, stop, name)


def _drawn(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    found = {
        name.removeprefix(_DRAWS): value
        for name, value in checkpoint.tensors.items()
        if name.startswith(_DRAWS)
    }
    return [found] if found else []


# --- nested values as tensors and facts ------------------------------------------------------------------------------


def packed(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested tuples and dictionaries as tensors by name, and facts: what else there is, and how tensors lie in memory.

    Sums depend on the order of memory in their last bit: it is kept too. Raises `InputError` for what is no tensor, no
    number and no text.

    >>> tensors, facts = packed({"a": torch.ones(2), "b": 3})
    >>> unpacked(tensors, facts, like={"a": torch.zeros(2), "b": 0})
    {'a': tensor([1., 1.]), 'b': 3}
    """
    leaves = {keystr(path): leaf for path, leaf in tree_flatten_with_path(value)[0]}
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    plain = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    for name, leaf in plain.items():
        if not isinstance(leaf, int | float | str | None):
            raise InputError(
                f"{name} is a {type(leaf).__name__}, which a run folder cannot hold: tensors, numbers and text it can."
            )
    return tensors, {"plain": plain, "strides": {name: leaf.stride() for name, leaf in tensors.items()}}


def unpacked(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], like: Any) -> Any:
    """What was `packed`, in the structure of `like`; `InputError` where that is another."""
    paths, structure = tree_flatten_with_path(like)
    names = [keystr(path) for path, _ in paths]
    plain, strides = facts["plain"], facts["strides"]
    missing = [name for name in names if name not in plain and name not in strides]
    if missing or len(names) != len(plain) + len(strides):
        raise InputError(
            f"The run folder holds chains of another kind: {missing or 'more'} than expected. Choose another folder."
        )
    leaves = [
        plain[name] if name in plain else _laid_out(tensors[name], tuple(strides[name]), leaf)
        for name, (_, leaf) in zip(names, paths, strict=True)
    ]
    return tree_unflatten(leaves, structure)


def _laid_out(value: Tensor, strides: tuple[int, ...], like: Tensor) -> Tensor:
    """The same values where `like` is, lying in fresh memory as these strides say."""
    once = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    laid = torch.empty_strided(once.shape, strides, dtype=value.dtype, device=like.device)
    return laid.copy_(once).expand(value.shape)
