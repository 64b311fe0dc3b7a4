"""Maximum likelihood of energies with draws of a short Markov chain for draws of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from probgen.conditioning import drop
from probgen.core import (
    Batch,
    Count,
    Energetic,
    InputError,
    NonNegative,
    Pairwise,
    UnsupportedError,
    Within,
    check_fields,
    describe,
    given,
)
from probgen.couplings import Couplings
from probgen.moves import GibbsMoves, Moves, State
from probgen.noising import admitted
from probgen.recorded import Recorded

_ONE_SWEEP = GibbsMoves()
_HELD_SWEEPS = 20  # of hidden units that are coupled to one another, x held
# Times the distance of the farthest datum from the mean of the data: chains beyond have left for good.
_FAR = 100


@dataclass(frozen=True)
class ContrastiveDivergence:
    """E_data[E(x)] - E_k[E(x)]: its gradient is that of -log p(x), with x after k moves from the data for model draws.

    For hidden units the energy is averaged over p(h | x), or over the mean field of a deep machine. The number itself
    says little: it is near zero throughout. Where it falls far below, draws have more energy than data: the moves are
    too few, or steps too long for an energy that has grown steep.

    Args:
        moves: what moves x, e.g. `GibbsMoves(1)` (CD-1) or `LangevinMoves(20)`.
        penalty: weight >= 0 of the mean squared energy of data and draws, which keeps energies of networks bounded.

    Where there are conditions, each row's draw is made at its own.

    Raises:
        InputError: by `loss`, where the moves run away from the data: the energy falls without end.

    Source: Hinton (2002), Neural Computation 14; the penalty: Du & Mordatch (2019), arXiv 1903.08689.

    >>> from probgen.models.rbm import example
    >>> ContrastiveDivergence().loss(example(), Batch({"x": torch.ones(3, 4)})).shape
    torch.Size([])
    """

    moves: Moves = _ONE_SWEEP
    penalty: NonNegative = 0.0
    needs: ClassVar[tuple[type, ...]] = ()  # an energy, or couplings
    paper: ClassVar[str] = "Hinton 2002, Neural Computation 14"
    offers: ClassVar[str] = "fits an energy without its normaliser, k moves a step"
    gives_up: ClassVar[str] = "the likelihood's own gradient: biased as long as k moves do not mix"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The difference of energies per row; see `Objective.loss`."""
        program, x = _admitted(self, program, batch)
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

    Chains are buffers of this module, and saved with a run. Where there are labels each keeps that of the row which it
    began at, until it starts anew, and is set against data of the same label; data whose label no chain has begin one.

    Source: Tieleman (2008), ICML; Younes (1999); the replay buffer: Du & Mordatch (2019), arXiv 1903.08689.

    >>> from probgen.models.rbm import example
    >>> PersistentContrastiveDivergence(num_chains=5).loss(example(), Batch({"x": torch.ones(3, 4)})).shape
    torch.Size([])
    """

    needs: ClassVar[tuple[type, ...]] = ()  # an energy, or couplings
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
        at, x = _admitted(self, program, batch)
        with torch.no_grad():
            drawn, held = self._chains(program, batch)
            if program.training:  # a look at the validation data leaves the chains where they are
                drawn = self.moves.move(_undropped(program, held), drawn)
            self._keep(drawn, held)
        if batch.condition is None or held is None:
            return contrast(at, x, drawn, self.penalty)
        c = _dropped(program, batch.condition)
        rows, chains = _pairs(c, held)
        return contrast(_undropped(program, c[rows]), x[rows], {"x": drawn["x"][chains]}, self.penalty)

    def _chains(self, program: Any, batch: Batch) -> tuple[State, Tensor | None]:
        """Where the chains are, and at which conditions."""
        x, found = batch.data["x"], dict(self.named_buffers())
        held = found.pop("condition", None)
        state = {name.removeprefix("chains_"): value for name, value in found.items()}
        if not state:
            rows = torch.randint(len(x), (self.num_chains,), device=x.device)
            c = None if batch.condition is None else _dropped(program, batch.condition[rows])
            return self.moves.start(program, x[rows]), c
        if program.training and held is not None and batch.condition is not None:
            rows = (~torch.isin(batch.condition, held)).nonzero().squeeze(1)[: self.num_chains]
            fresh = self.moves.start(program, x[rows])
            places = torch.randperm(self.num_chains, device=x.device)[: len(rows)]
            state, held = _replaced(state, fresh, places), held.index_copy(0, places, batch.condition[rows])
        if program.training and self.restart:
            places = (torch.rand(self.num_chains) < self.restart).nonzero().squeeze(1).to(x.device)
            state = _replaced(state, self.moves.start(program, _noise_like(program, x, len(places))), places)
            if held is not None and batch.condition is not None:
                rows = torch.randint(len(x), (len(places),), device=x.device)
                held = held.index_copy(0, places, _dropped(program, batch.condition[rows]))
        return state, held

    def _keep(self, state: State, c: Tensor | None) -> None:
        for site, value in state.items():
            self.register_buffer(f"chains_{site}", value)
        if c is not None:
            self.register_buffer("condition", c)


def _admitted(objective: Any, program: Any, batch: Batch) -> tuple[Any, Tensor]:
    """The program at the conditions of the data, and the data; `UnsupportedError` where it has no energy."""
    if not isinstance(program, Energetic | Pairwise):
        raise UnsupportedError(f"Contrastive divergence needs an energy; {describe(program)} has none.")
    return admitted(objective, program, batch)


def _replaced(state: State, fresh: State, places: Tensor) -> State:
    """Other chains in some places."""
    return {site: value.index_copy(0, places, fresh[site]) for site, value in state.items()}


def _dropped(program: Any, c: Tensor) -> Tensor:
    """Conditions, missing as often as they are while the program learns."""
    return drop(program.condition, c, program.condition_dropout) if program.training else c


def _undropped(program: Any, c: Tensor | None) -> Any:
    """The program at the conditions of chains, none of them dropped once more."""
    training, program.training = program.training, False
    try:
        return given(program, c)
    finally:
        program.training = training


def _pairs(c: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of data, and for each a chain that is held at the same label; the chains of a label take turns.

    Were there more chains at a label than data, that would be taken for evidence on E(x, c), without end: a function of
    c alone has no bearing on p(x | c).
    """
    if c.ndim > 1:
        raise UnsupportedError(
            "PersistentContrastiveDivergence keeps chains at labels, which recur; for conditions that are arrays take "
            "ContrastiveDivergence, whose draws are made at those of the data."
        )
    found = []
    for label in c.unique():
        rows, chains = ((each == label).nonzero().squeeze(1) for each in (c, held))
        if len(chains):
            turns = torch.arange(len(rows), device=c.device) % len(chains)
            found.append((rows, chains[torch.randperm(len(chains), device=c.device)[turns]]))
    if not found:
        raise InputError(
            f"None of {len(held)} chains is held at a label of this batch: take more, num_chains=..., or restart=0.05."
        )
    rows, chains = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, chains


def contrast(program: Any, x: Tensor, drawn: State, penalty: float) -> Tensor:
    """Mean energy of data minus mean energy of draws, differentiable in the weights."""
    if isinstance(program, Pairwise):
        couplings = program.couplings()
        couplings.check("x", x.flatten(1))
        with torch.no_grad():
            sizes = len(x), len(drawn["x"])
            share = torch.cat(
                [x.new_full((size,), sign / size) for size, sign in zip(sizes, (-1, 1), strict=True)]
            )
            difference = couplings.statistics(_seen_and_drawn(program, couplings, x, drawn), share)
        return couplings.dot(difference)
    _check_near(program, x, drawn["x"])
    energy, other = program.energy(x), program.energy(drawn["x"])
    loss = energy.mean() - other.mean()
    return loss + penalty * (energy.square().mean() + other.square().mean()) if penalty else loss


def _check_near(program: Any, x: Tensor, drawn: Tensor) -> None:
    """Raise `InputError` where draws are not finite, or far beyond all data."""
    centre = x.flatten(1).mean(0)
    reach, far = ((value.flatten(1) - centre).norm(dim=1) for value in (x, drawn))
    lost = ~far.isfinite() | ((far > _FAR * reach.max()) & (reach.max() > 0))
    if bool(lost.any()):
        raise InputError(
            f"{int(lost.sum())} of {len(drawn)} chains of {describe(program)} ran away, the farthest {far.max():.3g} "
            f"from the mean of the data, where no datum is beyond {reach.max():.3g}: the energy falls without end, or "
            "the moves are too long for it. Give it a well, EBM(..., base_scale=2.0), a penalty on energies, "
            "penalty=0.1, or shorter moves, LangevinMoves(step_size=..., clip=...)."
        )


def _seen_and_drawn(program: Any, couplings: Couplings, x: Tensor, drawn: State) -> State:
    """Rows of the data, hidden units at their means, above those of the draws: few large products are cheaper."""
    if couplings.independent(couplings.sites[1:]):
        rows = torch.cat((x.flatten(1), drawn["x"]))
        return {"x": rows, **hidden_means(program, couplings, rows)}
    seen = {"x": x.flatten(1), **hidden_means(program, couplings, x)}
    dreamt = _rao_blackwell(couplings, drawn)
    return {site: torch.cat((seen[site], dreamt[site])) for site in couplings.sites}


def hidden_means(program: Any, couplings: Couplings, x: Tensor) -> State:
    """E[h | x] by layer: exact where layers are independent given x, the mean field elsewhere."""
    if hasattr(program, "mean_field"):
        return dict(program.mean_field(x))
    state = {"x": x.flatten(1)}
    if ("h", "h") in couplings.weights:
        return {"h": couplings.settled(state["x"], _HELD_SWEEPS)["h"]}
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
