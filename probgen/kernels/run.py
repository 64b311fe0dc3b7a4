"""The one loop of all Markov chains: starts, warm-up, draws, and what they cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from probgen.core import Cost, InputError, NonFiniteWarning, Posterior, Target, UnsupportedError, describe
from probgen.kernels.adaptation import find_step_size
from probgen.kernels.compiling import Compiled
from probgen.kernels.coordinates import Coordinates, InCoordinates
from probgen.kernels.core import Adapter, Evaluate, Kernel, MarkovEngine, Stats, Tuning
from probgen.kernels.keeping import Draws, Keeper, keeping, unpacked
from probgen.kernels.noise import Normals
from probgen.kernels.schedule import gatherings
from probgen.kernels.starts import left_behind, starting_points
from probgen.kernels.state import ChainState, check_fits, check_same_density, restored, tensors_of
from probgen.progress import Update, ticker
from probgen.runs import Checkpoint, Run
from probgen.targets import Density

_BLOCK = 4  # transitions at once, and between looks at the clock
_OPERATIONS = 600  # about as many are compiled together where that is more than one transition,
_MOST_OPERATIONS = 1500  # and no more where it is one: compilers take longer and longer
_STORED_AT_ONCE = 16  # blocks: few enough to be near the processor still
_UNKNOWN = 100  # operations of a density that was not recorded
_SHOW_EVERY = 0.1  # seconds


def run_chains(
    engine: MarkovEngine,
    target: Target,
    *,
    num_draws: int,
    num_chains: int,
    seed: int,
    init: Posterior | None = None,
    state: ChainState | None = None,
    progress: bool = False,
    first_chain: int = 0,
    run: Run | None = None,
) -> Posterior:
    """Run `num_chains` chains of the engine's kernel for each data set; see `MarkovEngine.run`."""
    chains = Chains(engine, target, num_chains, seed, first_chain)
    stages = {"warm-up": engine.warmup if state is None else 0, "drawing": num_draws * engine.thin}
    with (
        torch.no_grad(),
        keeping(run, describe(engine)) as keeper,
        ticker(describe(engine), stages, progress, rates=("gradients",)) as update,
    ):
        chains.show, chains.keeper, chains.draws = update, keeper, Draws(num_draws)
        found = keeper.recover(chains.draws)
        if found is not None:
            chains.resume(found)
        elif state is not None:
            chains.go_on(state)
        else:
            chains.begin(init)
        chains.warm_up()
        chains.draw()
    return chains.posterior()


@dataclass
class _Clock:
    """Seconds and gradients, warm-up and compilation apart."""

    seconds: float = 0.0
    warmup_seconds: float = 0.0
    compile_seconds: float = 0.0
    gradients: int = 0
    warmup_gradients: int = 0

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Add the seconds inside to a field; those of compiling are counted there alone."""
        started, compiling = time.perf_counter(), self.compile_seconds
        yield
        compiling = self.compile_seconds - compiling
        setattr(self, name, getattr(self, name) + time.perf_counter() - started - compiling)

    def cost(self) -> Cost:
        return Cost(
            gradients=self.gradients,
            seconds=self.seconds,
            warmup_gradients=self.warmup_gradients,
            warmup_seconds=self.warmup_seconds,
            compile_seconds=self.compile_seconds,
        )


class Chains:
    """The chains of one run: their state, their tuning, and how far they are.

    Args:
        engine: makes the kernel and the adapters.
        target: what is drawn from.
        num_chains: of each data set.
        seed: of starts and transitions.
        first_chain: index of the first chain, where these are a part of more.
        like: chains of the same engine and target, whose density and compiled transitions serve for these too.
    """

    def __init__(
        self,
        engine: MarkovEngine,
        target: Target,
        num_chains: int,
        seed: int,
        first_chain: int = 0,
        like: Chains | None = None,
    ) -> None:
        self.engine, self.target, self.seed, self.like = engine, target, seed, like
        self.density: Density = like.density if like else engine.density(target)
        if engine.needs_log_prob and not self.density.has_log_prob:
            raise UnsupportedError(
                f"{describe(engine)} accepts or rejects by the density, and {describe(target.program)} has a score "
                "alone, which may be the gradient of nothing. Engines that need no density: ULA, SGLD, "
                "UnderdampedLangevin."
            )
        self.num_chains, self.num_sets = num_chains, self.density.num_sets
        # Columns of one chain: replica by replica, data sets innermost.
        self.groups = engine.replicas * self.num_sets
        self.columns, self.first_column = num_chains * self.groups, first_chain * self.groups
        self.kernel: Kernel = like.kernel if like else engine.kernel()
        self.clock, self.step = _Clock(), 0
        self.origin = self.first = 0  # transitions before this run, and before the first draw
        self.warm, self.adapters = False, list[Adapter]()
        self.show: Update = _unseen
        self.keeper, self.draws = Keeper(), Draws(0)
        self.block: int = self.kernel.at_once if isinstance(self.kernel, Asynchronous) else _BLOCK
        if like:
            self.block = like.block
        self._advance: Callable[..., Any] = like._advance if like else advance
        self._made: set[int] = like._made if like else set()  # numbers of transitions that are compiled
        self._shown = 0.0
        self._gradients = self._divergences = torch.zeros((), dtype=torch.float64)  # read when they are shown

    # --- beginning ---

    def begin(self, init: Posterior | None = None) -> None:
        """Find starts, a step size, and the kernel's state there."""
        with self.clock.counting("warmup_seconds"):
            u = starting_points(self.density, self.columns, self.seed, init, self.first_column)
            self._prepare(u)
            coordinates = Coordinates.identity(self.density.dim, u)
            evaluate = InCoordinates(coordinates, self.function)
            self.state = self._start(coordinates, self.function, u)
            self.tuning = self._untuned(u, self._first_step(evaluate, u))
            self._begin_adapting()
        self.first = self.engine.warmup
        self._prime()

    def go_on(self, saved: ChainState) -> None:
        """Continue where a saved state stopped."""
        check_fits(saved, self.engine, self.num_chains)
        u, like = self._blank()
        self.state = restored(saved.kernel, like)
        tuning = restored(saved.tuning, _Saved(u[0], u[:, :1], u[0, 0], u[0]), shapes=False)
        self.tuning = Tuning(tuning.step_size, Coordinates(tuning.scale), tuning.length, tuning.beta)
        self._check_density()
        self.step = self.origin = self.first = saved.step
        self.warm = True
        self._prime()

    def resume(self, found: Checkpoint) -> None:
        """Be what a `snapshot` was taken of."""
        u, self.state = self._blank()
        self.tuning = self._untuned(u, 1.0)
        if not found.facts["warm"]:
            self._begin_adapting()
        snapshot = unpacked(found.tensors, found.facts, like=self.snapshot())
        for adapter, values in zip(self.adapters, snapshot.pop("adapters"), strict=True):
            vars(adapter).update(values)
        vars(self.clock).update(snapshot.pop("clock"))
        vars(self).update(snapshot)
        self._check_density()
        self._prime()

    def snapshot(self) -> dict[str, Any]:
        """All that moves: what chains that were begun alike need to be where these are."""
        return {name: getattr(self, name) for name in _MOVING} | {
            "adapters": [vars(adapter) for adapter in self.adapters],
            "clock": vars(self.clock),
        }

    def _blank(self) -> tuple[Tensor, Any]:
        """Positions and a state of the right shapes, to be filled."""
        u = torch.zeros(self.density.dim, self.columns, dtype=self.density.dtype, device=self.density.device)
        self._prepare(u)
        return u, self._start(Coordinates.identity(len(u), u), _nowhere, u)

    def _check_density(self) -> None:
        """Where chains stand the density must be what it was."""
        if self.density.has_log_prob and not self.density.num_normals:
            evaluate = InCoordinates(self.tuning.coordinates, self.function)
            check_same_density(self.state.log_prob, evaluate(self.state.position)[0])

    def _untuned(self, u: Tensor, step_size: Tensor | float) -> Tuning:
        one = torch.ones(self.columns, dtype=u.dtype, device=u.device)
        return Tuning(one * step_size, Coordinates.identity(self.density.dim, u), one[0])

    def _begin_adapting(self) -> None:
        self.adapters = self.engine.adapters()
        for adapter in self.adapters:
            self.tuning = adapter.begin(self.tuning, self.groups)

    def _prepare(self, u: Tensor) -> None:
        with self.clock.counting("compile_seconds"):
            self.function = self._function_at(u)
        rows = self.kernel.normals(self.density.dim) + self.density.num_normals
        self.noise = Normals(self.seed, rows, self.columns, u, self.engine.independent, self.first_column)
        if self.engine.compile and self.kernel.static and not self._made:
            self._compile()

    def _function_at(self, u: Tensor) -> Callable[..., Any]:
        """The density for points of the shape of u: recorded once for chains that are alike."""
        if self.like and self.like.columns == self.columns:
            return self.like.function
        return self.density.function(u)

    def _compile(self) -> None:
        """Compile transitions, several together where they are short, but long ones step by step."""
        nodes = len(self.function.graph.nodes) if isinstance(self.function, GraphModule) else _UNKNOWN
        operations = nodes * self.kernel.num_steps if isinstance(self.kernel, Trajectory) else nodes
        if isinstance(self.kernel, Trajectory) and operations > _MOST_OPERATIONS:
            self.kernel = self.kernel.in_steps()
        else:
            self.block = max(1, min(_BLOCK, _OPERATIONS // operations))
            self._advance = Compiled(advance)

    def _start(self, coordinates: Coordinates, function: Callable[..., Any], u: Tensor) -> Any:
        """The kernel's state at u; what is random about it has a noise of its own."""
        own = self.kernel.normals(self.density.dim)
        rows = own + self.density.num_normals
        normals = Normals(self.seed ^ 2, rows, self.columns, u, self.engine.independent, self.first_column)
        noise = normals.of(0, 1)[0]
        return self.kernel.start(InCoordinates(coordinates, _given(function, noise[own:])), u, noise[:own])

    def _first_step(self, evaluate: InCoordinates, u: Tensor) -> Tensor | float:
        if self.engine.first_step_size is not None:
            return self.engine.first_step_size
        momenta = Normals(self.seed ^ 1, self.density.dim, self.columns, u).of(0, 1)[0]
        return find_step_size(evaluate, self.state, momenta, self.columns)

    def _prime(self) -> None:
        """Have everything compiled: transitions that are thrown away."""
        if self.engine.compile:
            self._ready(self.block)
            if self.engine.warmup:
                self._ready(1)

    def _ready(self, count: int) -> None:
        """Have `count` transitions compiled, if they are not."""
        new = count not in self._made if isinstance(self._advance, Compiled) else not self._made
        if self.engine.compile and new:
            self._made.add(count)
            with self.clock.counting("compile_seconds"):
                self._transitions(count)

    # --- moving ---

    def warm_up(self) -> None:
        """Make the transitions of warm-up, tuning after each."""
        if self.warm:
            return
        while self.step < self.first:
            with self.clock.counting("warmup_seconds"):
                self._warm_up_for_a_while()
            if self.step < self.first:
                self.keeper.keep(self)
        for adapter in self.adapters:
            self.tuning = adapter.finish(self.tuning)
        self._report()
        self.clock.warmup_gradients = int(self._gradients)
        self._gradients, self._divergences = self._gradients * 0, self._divergences * 0
        self.warm, self.adapters = True, []
        self.keeper.keep(self)

    def _warm_up_for_a_while(self) -> None:
        gathered_after = gatherings(self.first)
        while self.step < self.first:
            _, stats = self._move(1)
            if self.adapters and self.step in gathered_after:
                self._gather()
            self._tune({name: value[0] for name, value in stats.items()})
            if self.keeper.due:
                return

    def _gather(self) -> None:
        """Chains that are lost go on from where others of their data set are."""
        if self.engine.replicas > 1:
            return
        behind, follows = left_behind(self.state.log_prob, self.density.dim, self.num_sets)
        if bool(behind.any()):
            self.state = tree_map(lambda value: value[..., follows], self.state)

    def _tune(self, stats: Stats) -> None:
        before = self.tuning.coordinates
        for adapter in self.adapters:
            self.tuning = adapter.update(self.step - 1, self.state, stats, self.tuning)
        after = self.tuning.coordinates
        if after is not before:
            position, grad = self.state.position, self.state.grad
            self.state = self.state._replace(
                position=after.to_x(before.to_u(position)), grad=after.pull(before.push(grad))
            )
            for adapter in self.adapters:
                self.tuning = adapter.restart(self.tuning)

    def draw(self) -> None:
        """Fill `draws`: positions u and statistics of every `thin`-th transition."""
        while self.draws.missing:
            with self.clock.counting("seconds"):
                self._draw_for_a_while()
            self.keeper.keep(self)
        self._report()

    def _draw_for_a_while(self) -> None:
        waiting: list[dict[str, Tensor]] = []
        for part in self.blocks(self.draws.num_draws * self.engine.thin):
            waiting.append(part)
            if self.keeper.due:
                break
            if len(waiting) == _STORED_AT_ONCE:
                self.draws.add(waiting)
                waiting.clear()
        self.draws.add(waiting)

    def blocks(self, num_transitions: int) -> Iterator[dict[str, Tensor]]:
        """The draws of what is left of a number of transitions, a few at a time: u and the statistics by name."""
        thin = self.engine.thin
        while (made := self.step - self.first) < num_transitions:
            count = min(self.block, num_transitions - made)
            if count < self.block and isinstance(self._advance, Compiled):
                count = 1  # for which it may be compiled already
            u, stats = self._move(count)
            first = (-1 - made) % thin
            part = {"u": self._drawn(u), **stats}
            yield {name: value[first::thin] for name, value in part.items()} if thin > 1 else part

    def _move(self, count: int) -> tuple[Tensor, Stats]:
        self._ready(count)
        self.state, u, stats = self._transitions(count)
        self.step += count
        self._gradients = self._gradients + stats["n_steps"].sum(dtype=torch.float64)
        if "diverging" in stats:
            self._divergences = self._divergences + stats["diverging"].sum()
        if time.perf_counter() - self._shown > _SHOW_EVERY:
            self._report()
        return u, stats

    def _transitions(self, count: int) -> tuple[Any, Tensor, Stats]:
        noise = self.noise.of(self.step, count)
        state, u, stats = self._advance(self.kernel, self.function, self.state, self.tuning, noise)
        return state, u, stats

    def _report(self) -> None:
        self._shown = time.perf_counter()
        self.show(self.step - self.origin, **self.progress())

    def progress(self) -> dict[str, float]:
        """How far they are, in numbers."""
        return {
            "chains": self.num_chains * self.num_sets,
            "divergences": int(self._divergences),
            "step_size": float(self.tuning.step_size.median()),
            "gradients": int(self._gradients) + self.clock.warmup_gradients,
        }

    # --- results ---

    def cost(self) -> Cost:
        """What was paid so far."""
        self.clock.gradients = int(self._gradients)
        every = (self.clock.gradients + self.clock.warmup_gradients) / self.columns  # chains share a call
        return replace(self.clock.cost(), network_calls=round(every * self.density.network_calls))

    def saved(self) -> ChainState:
        """All that is needed to go on."""
        tuning = _Saved(
            self.tuning.step_size, self.tuning.coordinates.scale, self.tuning.length, self.tuning.beta
        )
        return ChainState(
            str(self.engine), self.step, self.num_chains, tensors_of(self.state), tensors_of(tuning)
        )

    def posterior(self) -> Posterior:
        """The draws at the program's own sites, with what they cost."""
        stats = dict(self.draws.values)
        u = stats.pop("u")
        with self.clock.counting("seconds"):
            self._check(u)
            sites = self._sites(u)
        return Posterior(
            sites,
            self.engine.kind,
            self.engine.guarantee,
            str(self.engine),
            self.cost(),
            dims=dict(self.density.dims),
            stats={name: self._by_chain(self._drawn(value)) for name, value in stats.items()},
            run_stats={
                name: self._of_replicas(value)
                for name, value in self.engine.run_stats(self.tuning, stats).items()
            },
            state=self.saved(),
            target=self.target,
        )

    def _sites(self, draws: Tensor) -> dict[str, Tensor]:
        """Draws u `(num_draws, dim, n)` as values of the sites, each `(chains, draws, *shape)`."""
        # Columns chain by chain, draw by draw, data sets innermost.
        columns = draws.unflatten(2, (-1, self.num_sets)).permute(1, 2, 0, 3).flatten(1)
        front = (self.num_chains, len(draws)) + ((self.num_sets,) if self.density.sets_shown else ())
        sites = self.density.constrain(columns)
        return {name: value.reshape(*front, *value.shape[1:]) for name, value in sites.items()}

    def _drawn(self, value: Tensor) -> Tensor:
        """The columns of the first replica of each chain."""
        if self.groups == self.num_sets:
            return value
        return value.unflatten(-1, (self.num_chains, -1, self.num_sets))[..., 0, :].flatten(-2)

    def _of_replicas(self, value: Tensor) -> Tensor:
        """`(n,)` -> `(chains,)`, replicas next where there are several, data sets last where there are several."""
        split = value.unflatten(0, (self.num_chains, -1, self.num_sets))
        split = split if self.density.sets_shown else split[..., 0]
        return split[:, 0] if self.engine.replicas == 1 else split

    def _by_chain(self, value: Tensor) -> Tensor:
        """`(draws, n)` -> `(chains, draws)`, data sets last where there are several."""
        split = value.unflatten(1, (-1, self.num_sets)).transpose(0, 1)
        return split if self.density.sets_shown else split[..., 0]

    def _check(self, draws: Tensor) -> None:
        least, most = draws.amin(0), draws.amax(0)  # not a number where one draw is none
        lost = ~(torch.isfinite(least) & torch.isfinite(most)).all(0)
        if bool(lost.all()):
            raise InputError(
                f"All {self.columns} chains of {describe(self.engine)} ran away to infinity: the step size is too long "
                "for this density, or it does not fall off in some direction (an improper posterior). Take a "
                "smaller step, or proper priors."
            )
        if bool(lost.any()):
            warnings.warn(
                f"{int(lost.sum())} of {self.columns} chains ran away to infinity, the first is chain "
                f"{int(lost.nonzero()[0, 0]) // self.num_sets}; the others are unaffected. Take a smaller step.",
                NonFiniteWarning,
                stacklevel=2,
            )
        if len(draws) > 1 and bool((least == most).all()):
            raise InputError(
                f"All {self.columns} chains of {describe(self.engine)} are stuck: not one proposal was accepted. The "
                f"step size is {float(self.tuning.step_size.mean()):.3g}; take a smaller one, or leave it to warm-up "
                "(step_size=None, num_warmup=500)."
            )


_MOVING = ("state", "tuning", "step", "origin", "first", "warm", "_gradients", "_divergences")


class _Saved(NamedTuple):
    """A tuning as it is saved."""

    step_size: Tensor
    scale: Tensor
    length: Tensor
    beta: Tensor


@runtime_checkable
class Trajectory(Kernel, Protocol):
    """A static kernel of many steps, which may be too long to be compiled whole."""

    num_steps: int

    def in_steps(self) -> Kernel:
        """The same, with its steps compiled one by one."""


@runtime_checkable
class Asynchronous(Kernel, Protocol):
    """A kernel whose chains need not wait for one another between transitions."""

    at_once: ClassVar[int]
    """How many transitions are best made together."""

    def transitions(
        self, evaluate: Evaluate, state: Any, tuning: Tuning, noise: Tensor
    ) -> tuple[Any, Tensor, Stats]:
        """As many as there is noise for, `(count, normals, n)`: the state, positions x, statistics."""


def advance(
    kernel: Kernel, function: Callable[..., Any], state: Any, tuning: Tuning, noise: Tensor
) -> tuple[Any, Tensor, Stats]:
    """As many transitions as there is noise for, `(count, normals, n)`: the state, positions u, statistics."""
    if isinstance(kernel, Asynchronous):
        state, x, found = kernel.transitions(
            InCoordinates(tuning.coordinates, function), state, tuning, noise
        )
        return state, torch.stack([tuning.coordinates.to_u(part) for part in x]), found
    own = kernel.normals(len(state.position))
    positions, every = [], []
    for z in noise.unbind():
        evaluate = InCoordinates(tuning.coordinates, _given(function, z[own:]))
        state, stats = kernel.step(evaluate, state, tuning, z[:own])
        positions.append(tuning.coordinates.to_u(state.position))
        every.append(stats | {"lp": state.log_prob})
    draws = torch.cat(positions).unflatten(0, (len(positions), -1))
    return state, draws, {name: torch.stack([s[name] for s in every]) for name in every[0]}


def _given(function: Callable[..., Any], normals: Tensor) -> Callable[..., Any]:
    """The density as estimated with these normals, where it is random."""
    return partial(function, normals=normals) if len(normals) else function


def _nowhere(u: Tensor, normals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A density that is never looked at."""
    del normals
    return u[0] * 0, u * 0


def _unseen(_done: int, **_values: float) -> None:
    """Progress that nobody watches."""
