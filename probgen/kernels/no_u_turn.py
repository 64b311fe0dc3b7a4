"""The no-U-turn transition of many chains at once, each at its own leaf of its own tree.

A trajectory doubles, forwards or backwards in time, until it begins to return. Its states form the leaves of a binary
tree, and it must not turn across any aligned block of 2^j leaves of a doubling. Blocks are watched while leaves come
one after another: all that is kept of one is where it began.

One `tick` is one leapfrog step of every chain. Chains share no clock: one that has finished a trajectory begins the
next at once, so that short trees never wait for long ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from probgen.kernels.compiling import Compiled
from probgen.kernels.core import Evaluate, Point, Stats, Tuning
from probgen.kernels.leapfrog import MAX_ENERGY_ERROR, kinetic_energy, leapfrog

_STATS = ("lp", "acceptance_rate", "diverging", "energy", "n_steps", "tree_depth")

Nested = TypeVar("Nested", bound=Any)


class End(NamedTuple):
    """One end of a trajectory."""

    point: Point
    momentum: Tensor


class Blocks(NamedTuple):
    """How the running block of 2^j leaves began, for each level j: `(levels, dim, n)` each.

    Args:
        momentum: of its first leaf.
        previous: momentum of the leaf before that.
        total: momenta of this doubling summed up to there, the first leaf left out.
    """

    momentum: Tensor
    previous: Tensor
    total: Tensor


class Tree(NamedTuple):
    """The trajectory of each chain, and the doubling that it is in.

    Args:
        made: transitions finished, `(n,)`.
        depth, leaf: doublings finished, and leaves of the running one, `(n,)`.
        chosen: a leaf of the finished doublings, which will be the draw.
        front, back: the end that grows, and the other.
        direction: of time at the front, 1 or -1, `(n,)`.
        momentum: sum over the leaves of the finished doublings.
        log_weight: log sum exp(H_0 - H) over them, `(n,)`.
        energy: H_0, of the start, `(n,)`.
        acceptance: sum of min(1, exp(H_0 - H)) over all leaves, `(n,)`.
        candidate, total, candidate_log_weight: the same as `chosen`, `momentum`, `log_weight` in the running doubling.
        uniform: in (0, 1], float64, what is left of the random number of this doubling.
        blocks: of the running doubling.
    """

    made: Tensor
    depth: Tensor
    leaf: Tensor
    chosen: Point
    front: End
    back: End
    direction: Tensor
    momentum: Tensor
    log_weight: Tensor
    energy: Tensor
    acceptance: Tensor
    candidate: Point
    total: Tensor
    candidate_log_weight: Tensor
    uniform: Tensor
    blocks: Blocks


@dataclass(frozen=True)
class NUTSKernel:
    """p ~ N(0, I); the trajectory through (x, p) doubles until it turns; a leaf is drawn with weight exp(-H).

    Args:
        max_tree_depth: doublings at most.
        compile: compile the ticks.

    Source: Hoffman & Gelman (2014), arXiv 1111.4246; Betancourt (2017), arXiv 1701.02434, appendix A.
    """

    max_tree_depth: int
    compile: bool = False
    static: ClassVar[bool] = False
    at_once: ClassVar[int] = 16
    """Transitions: the more there are, the less chains with short trees wait for the others."""

    def normals(self, dim: int) -> int:
        """A momentum, and two for each doubling."""
        return dim + 2 * self.max_tree_depth

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        """The density where chains begin."""
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        """One trajectory of every chain."""
        state, _, stats = self.transitions(evaluate, state, tuning, noise[None])
        return state, {name: value[0] for name, value in stats.items() if name != "lp"}

    def transitions(
        self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor
    ) -> tuple[Point, Tensor, Stats]:
        """As many trajectories of every chain as there is noise for, `(count, normals, n)`; chains do not wait.

        Returns the state, positions `(count, dim, n)` and statistics `(count, n)`, log density `lp` included.
        """
        count, dim, n = len(noise), *state.position.shape
        # Compiled code is made for one number of transitions: fewer stand at the end.
        idle = max(0, self.at_once - count) if self.compile else 0
        noise = torch.cat([noise.new_zeros(idle, *noise.shape[1:]), noise])
        tree = planted(state, self.max_tree_depth, idle)
        # One row more, for what chains do while they wait for the last.
        record = noise.new_zeros(len(noise) + 1, n, dim + len(_STATS))
        tree = self._repeat(partial(_unfinished, len(noise)), tree, evaluate, tuning.step_size, noise, record)
        record = record[idle:-1].mT
        return tree.chosen, record[:, :dim], self._stats(record[:, dim:])

    @cached_property
    def _repeat(self) -> Callable[..., Tree]:
        return Compiled(tick).repeat if self.compile else partial(_repeat, tick)

    def _stats(self, rows: Tensor) -> Stats:
        stats = dict(zip(_STATS, rows.unbind(1), strict=True))
        stats["diverging"] = stats["diverging"] > 0
        stats["reached_max_tree_depth"] = stats["tree_depth"] == self.max_tree_depth
        return stats


def planted(state: Point, max_depth: int, made: int = 0) -> Tree:
    """No trajectory yet, after `made` transitions."""
    position, zero = state.position, torch.zeros_like(state.log_prob)
    nothing, none = torch.zeros_like(position), torch.zeros_like(zero, dtype=torch.int64)
    end, level = End(state, nothing), nothing.repeat(max_depth, 1, 1)
    return Tree(
        made=none + made,
        depth=none,
        leaf=none,
        chosen=state,
        front=end,
        back=end,
        direction=zero,
        momentum=nothing,
        log_weight=zero,
        energy=zero,
        acceptance=zero,
        candidate=state,
        total=nothing,
        candidate_log_weight=zero,
        uniform=zero.double(),
        blocks=Blocks(level, level, level),
    )


def _repeat(function: Callable[..., Tree], going: Callable[[Tensor], bool], tree: Tree, *args: Any) -> Tree:
    while going(tree.made):
        tree = function(tree, *args)
    return tree


def _unfinished(count: int, made: Tensor) -> bool:
    return bool((made < count).any())


def tick(tree: Tree, evaluate: Evaluate, step_size: Tensor, noise: Tensor, record: Tensor) -> Tree:
    """One leaf more in every chain, and what follows from it.

    Args:
        tree: of every chain.
        evaluate: the density.
        step_size: `()` or `(n,)`.
        noise: `(count, dim + 2 max_depth, n)`.
        record: draws and statistics of each transition, `(count + 1, n, dim + statistics)`, written in place. What is
            written before a transition ends is written over.
    """
    tree = _begin_trajectory(tree, noise)
    tree = _begin_doubling(tree, noise)
    tree, change = _leaf(evaluate, step_size, tree)
    tree = _weigh(tree, change)
    block_turns, all_turns = _turning(tree)
    diverging = ~(change < MAX_ENERGY_ERROR)
    stops = diverging | block_turns
    doubled = ~stops & (tree.leaf == 1 << tree.depth)
    num_steps = (1 << tree.depth) - 1 + tree.leaf
    tree = _join(tree, doubled, len(noise))
    stops = stops | (doubled & (all_turns | (tree.depth == len(tree.blocks.total))))
    _write(tree, diverging, num_steps, record)
    return tree._replace(
        made=tree.made + (stops & (tree.made < len(noise))),
        depth=torch.where(stops, 0, tree.depth),
        leaf=torch.where(stops | doubled, 0, tree.leaf),
    )


# --- beginnings ---------------------------------------------------------------------------------------------------


def _begin_trajectory(tree: Tree, noise: Tensor) -> Tree:
    """Where nothing has grown: a fresh momentum."""
    dim, zero = len(tree.total), torch.zeros_like(tree.energy)
    momentum = _normals(tree, noise, torch.arange(dim, device=noise.device)[:, None])
    end = End(tree.chosen, momentum)
    begun = tree._replace(
        front=end,
        back=end,
        momentum=momentum,
        log_weight=zero,
        energy=kinetic_energy(momentum) - tree.chosen.log_prob,
        acceptance=zero,
    )
    return _where((tree.leaf == 0) & (tree.depth == 0), begun, tree)


def _begin_doubling(tree: Tree, noise: Tensor) -> Tree:
    """Where the doubling has no leaf: a direction, and one random number for all choices in it."""
    rows = len(tree.total) + 2 * tree.depth + torch.arange(2, device=noise.device)[:, None]
    z = _normals(tree, noise, rows)
    direction = torch.where(z[0] < 0, -1.0, 1.0).to(tree.direction)
    other_way = direction != tree.direction
    begun = tree._replace(
        direction=direction,
        front=_where(other_way, tree.back, tree.front),
        back=_where(other_way, tree.front, tree.back),
        total=torch.zeros_like(tree.total),
        candidate_log_weight=torch.full_like(tree.log_weight, -torch.inf),
        # |z|^2/2 is exponential, and independent of the sign of z[0].
        uniform=(-0.5 * z.double().square().sum(0)).exp(),
    )
    return _where(tree.leaf == 0, begun, tree)


def _normals(tree: Tree, noise: Tensor, rows: Tensor) -> Tensor:
    """Rows `(m, 1)` or `(m, n)` of the noise of the transition that each chain makes: `(m, n)`."""
    count, per_transition, n = noise.shape
    index = tree.made.clamp(max=count - 1) * per_transition + rows
    return noise.flatten(0, 1).gather(0, index.expand(len(rows), n))


# --- leaves -------------------------------------------------------------------------------------------------------


def _leaf(evaluate: Evaluate, step_size: Tensor, tree: Tree) -> tuple[Tree, Tensor]:
    """One leapfrog step at the front; the tree and H - H_0 `(n,)`."""
    before = tree.front.momentum
    point, momentum = leapfrog(evaluate, tree.front.point, before, tree.direction * step_size)
    begins = tree.leaf & _last_of_blocks(tree) == 0
    grown = tree._replace(
        leaf=tree.leaf + 1,
        front=End(point, momentum),
        total=tree.total + momentum,
        blocks=_where(begins[:, None], Blocks(momentum, before, tree.total), tree.blocks),
    )
    return grown, kinetic_energy(momentum) - point.log_prob - tree.energy


def _weigh(tree: Tree, change: Tensor) -> Tree:
    """Let the new leaf become the candidate with probability exp(-H) over that of all leaves of the doubling."""
    log_ratio = -change.nan_to_num(nan=torch.inf)
    log_weight = torch.logaddexp(tree.candidate_log_weight, log_ratio)
    share = (log_ratio - log_weight).double().exp()
    taken = tree.uniform <= share
    return tree._replace(
        candidate=_where(taken, tree.front.point, tree.candidate),
        candidate_log_weight=log_weight,
        # What is left of a uniform number after a decision is uniform again.
        uniform=torch.where(taken, tree.uniform / share, (tree.uniform - share) / (1 - share)),
        acceptance=tree.acceptance + log_ratio.clamp(max=0).exp(),
    )


def _join(tree: Tree, doubled: Tensor, count: int) -> Tree:
    """Where a doubling is whole: take its candidate with probability min(1, its weight over that of all before)."""
    better = tree.uniform.log() < tree.candidate_log_weight - tree.log_weight
    joined = tree._replace(
        depth=tree.depth + 1,
        momentum=tree.momentum + tree.total,
        log_weight=torch.logaddexp(tree.log_weight, tree.candidate_log_weight),
    )
    tree = _where(doubled, joined, tree)
    return tree._replace(chosen=_where(doubled & better & (tree.made < count), tree.candidate, tree.chosen))


# --- turning ------------------------------------------------------------------------------------------------------


def _turning(tree: Tree) -> tuple[Tensor, Tensor]:
    """Whether a block that ends with the newest leaf turns, and whether the whole trajectory does: `(n,)` each.

    A stretch with end momenta p, p' and sum of momenta r turns where r.p <= 0 or r.p' <= 0 (Betancourt 2017, appendix
    A.4.2). A block turns where it does, or its first half with one more leaf, or its second half with one more leaf;
    the trajectory's halves are what was there before this doubling, and the doubling.
    """
    newest, total, blocks = tree.front.momentum, tree.total, tree.blocks
    # Of each block, and of the trajectory last: the momentum it begins with, and the sum before it. Its second half is
    # the block one level below, the doubling for the trajectory.
    first = torch.cat([blocks.momentum[1:], tree.back.momentum[None]])
    before = torch.cat([blocks.total[1:], -tree.momentum[None]])
    turning = (
        _returns(total - before, first, newest)
        | _returns(blocks.total - before + blocks.momentum, first, blocks.momentum)
        | _returns(total - blocks.total + blocks.previous, blocks.previous, newest)
    )
    complete = tree.leaf & _last_of_blocks(tree)[1:] == 0
    return (turning[:-1] & complete).any(0), turning[-1]


def _returns(total: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """`(levels, dim, n)` -> `(levels, n)`."""
    return ~(((total * first).sum(-2) > 0) & ((total * last).sum(-2) > 0))


# --- small things -------------------------------------------------------------------------------------------------


def _last_of_blocks(tree: Tree) -> Tensor:
    """0, 1, 3, ..., 2^j - 1, `(levels, 1)`: i & (2^j - 1) is i mod 2^j, and fast."""
    levels = torch.arange(len(tree.blocks.total), device=tree.leaf.device)
    return (1 << levels[:, None]) - 1


def _write(tree: Tree, diverging: Tensor, num_steps: Tensor, record: Tensor) -> None:
    """Write the draws, and statistics in the order of `_STATS`."""
    chosen = tree.chosen
    stats = (chosen.log_prob, tree.acceptance / num_steps, diverging, tree.energy, num_steps, tree.depth)
    rows = torch.cat([chosen.position, torch.stack([value.to(chosen.log_prob) for value in stats])])
    columns = torch.arange(len(tree.made), device=record.device)
    record.index_put_((tree.made, columns), rows.mT)


def _where(mask: Tensor, new: Nested, old: Nested) -> Nested:
    """`torch.where` over nested tuples of tensors; chains are the last axis of each."""
    if new is old:
        return old
    if isinstance(new, Tensor):
        chosen: Any = torch.where(mask, new, old)
        return chosen
    return type(new)(*(_where(mask, a, b) for a, b in zip(new, old, strict=True)))
