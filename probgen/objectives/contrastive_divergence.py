"""Maximum likelihood of energies with draws of a short Markov chain for draws of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from probgen.core import (
    Batch,
    Count,
    Energetic,
    NonNegative,
    UnsupportedError,
    Within,
    check_fields,
    describe,
)
from probgen.couplings import Couplings, Pairwise
from probgen.moves import GibbsMoves, Moves, State
from probgen.recorded import Recorded

_ONE_SWEEP = GibbsMoves()
_HELD_SWEEPS = 20  # of hidden units that are coupled to one another, x held


@dataclass(frozen=True)
class ContrastiveDivergence:
    """E_data[E(x)] - E_k[E(x)]: its gradient is that of -log p(x), with x after k moves from the data for model draws.

    For hidden units the energy is averaged over p(h | x), or over the mean field of a deep machine. The number itself
    says little: it is near zero throughout.

    Args:
        moves: what moves x, e.g. `GibbsMoves(1)` (CD-1) or `LangevinMoves(20)`.
        penalty: weight >= 0 of the mean squared energy of data and draws, which keeps energies of networks bounded.

    Source: Hinton (2002), Neural Computation 14; the penalty: Du & Mordatch (2019), arXiv 1903.08689.

    >>> from probgen.models.rbm import example
    >>> ContrastiveDivergence().loss(example(), Batch({"x": torch.ones(3, 4)})).shape
    torch.Size([])
    """

    moves: Moves = _ONE_SWEEP
    penalty: NonNegative = 0.0
    paper: ClassVar[str] = "Hinton 2002, Neural Computation 14"
    offers: ClassVar[str] = "fits an energy without its normaliser, k moves a step"
    gives_up: ClassVar[str] = "the likelihood's own gradient: biased as long as k moves do not mix"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The difference of energies per row; see `Objective.loss`."""
        x = batch.data["x"]
        with torch.no_grad():
            drawn = self.moves.move(program, self.moves.start(program, x))
        return contrast(program, x, drawn, self.penalty)


class PersistentContrastiveDivergence(Recorded):
    """The same with chains that go on from step to step, instead of starting at the data.

    Args:
        moves: what moves the chains between two steps of the optimiser.
        num_chains: chains, >= 1; each step's batch moves all of them.
        restart: share of chains in [0, 1) that start anew from noise at each step, as replay buffers do.
        penalty: as for `ContrastiveDivergence`.

    Chains are buffers of this module, and saved with a run.

    Source: Tieleman (2008), ICML; Younes (1999); the replay buffer: Du & Mordatch (2019), arXiv 1903.08689.

    >>> from probgen.models.rbm import example
    >>> PersistentContrastiveDivergence(num_chains=5).loss(example(), Batch({"x": torch.ones(3, 4)})).shape
    torch.Size([])
    """

    paper: ClassVar[str] = "Tieleman 2008, ICML"
    offers: ClassVar[str] = "negative examples of chains that have run as long as the fit"
    gives_up: ClassVar[str] = "chains lag behind where weights move fast"

    def __init__(
        self,
        moves: Moves = _ONE_SWEEP,
        num_chains: Count = 128,
        restart: Annotated[float, Within(0, 1, "[)")] = 0.0,
        penalty: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        self.moves, self.num_chains, self.restart, self.penalty = moves, num_chains, restart, penalty

    def extra_repr(self) -> str:
        """The settings: what a run folder knows this objective by."""
        return f"{self.moves}, num_chains={self.num_chains}, restart={self.restart}, penalty={self.penalty}"

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The difference of energies per row, the chains moved once; see `Objective.loss`."""
        x = batch.data["x"]
        with torch.no_grad():
            drawn = self._chains(program, x)
            if program.training:  # a look at the validation data leaves the chains where they are
                drawn = self.moves.move(program, drawn)
            for site, value in drawn.items():
                self.register_buffer(f"chains_{site}", value)
        return contrast(program, x, drawn, self.penalty)

    def _chains(self, program: Any, x: Tensor) -> State:
        found = {name.removeprefix("chains_"): value for name, value in self.named_buffers()}
        if not found:
            rows = torch.randint(len(x), (self.num_chains,))
            return self.moves.start(program, x[rows])
        if self.restart:
            anew = torch.rand(self.num_chains) < self.restart
            fresh = self.moves.start(program, _noise_like(program, x, int(anew.sum())))
            for site, value in fresh.items():
                found[site] = found[site].clone()
                found[site][anew] = value
        return found


def contrast(program: Any, x: Tensor, drawn: State, penalty: float) -> Tensor:
    """Mean energy of data minus mean energy of draws, differentiable in the weights."""
    if isinstance(program, Pairwise):
        couplings = program.couplings()
        with torch.no_grad():
            seen = couplings.statistics({"x": x.flatten(1), **hidden_means(program, couplings, x)})
            dreamt = couplings.statistics(_rao_blackwell(couplings, drawn))
        return couplings.dot(dreamt) - couplings.dot(seen)
    if not isinstance(program, Energetic):
        raise UnsupportedError(f"Contrastive divergence needs an energy; {describe(program)} has none.")
    energy, other = program.energy(x), program.energy(drawn["x"])
    loss = energy.mean() - other.mean()
    return loss + penalty * (energy.square().mean() + other.square().mean()) if penalty else loss


def hidden_means(program: Any, couplings: Couplings, x: Tensor) -> State:
    """E[h | x] by layer: exact where layers are independent given x, the mean field elsewhere."""
    if hasattr(program, "mean_field"):
        return dict(program.mean_field(x))
    state = {"x": x.flatten(1)}
    if ("h", "h") in couplings.weights:
        full = couplings.zeros(len(x)) | state
        for _ in range(_HELD_SWEEPS):
            full["h"] = couplings.draw("h", full)
        return {"h": full["h"]}
    return {site: couplings.mean(site, state) for site in couplings.sites[1:]}


def _rao_blackwell(couplings: Couplings, drawn: State) -> State:
    """Draws with the highest layer replaced by its mean given the one below, where it has no couplings inside."""
    last = couplings.sites[-1]
    if last == "x" or (last, last) in couplings.weights:
        return drawn
    return drawn | {last: couplings.mean(last, drawn)}


def _noise_like(program: Any, x: Tensor, rows: int) -> Tensor:
    if isinstance(program, Pairwise) and "x" not in program.couplings().scales:
        return torch.rand(rows, *x.shape[1:]).round().to(x)
    return x.mean(0) + x.std(0) * torch.randn(rows, *x.shape[1:], dtype=x.dtype, device=x.device)


def example() -> ContrastiveDivergence:
    """CD-1."""
    return ContrastiveDivergence()
