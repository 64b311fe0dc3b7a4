"""What every engine that carries noise to data does: batches, conditions, cost, progress, draws that turn NaN."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from probgen.core import (
    Cost,
    Count,
    Diffusion,
    Engine,
    Guarantee,
    NonFiniteWarning,
    Posterior,
    PosteriorKind,
    ProbgenError,
    Target,
    describe,
    given,
)
from probgen.dynamics.fields import AffineDenoiser, Output
from probgen.dynamics.steppers import SolverError, listed
from probgen.progress import ticker
from probgen.randomness import Noise

Wrap = Callable[[Output], Output]


class Field(Protocol):
    """What a solver sees of a program: `of(program)` makes it, `through` wraps its network."""

    @staticmethod
    def of(program: Any) -> Any:
        """The field of a program."""

    def through(self, wrap: Wrap) -> Any:
        """The same with its network wrapped."""


@dataclass(frozen=True, kw_only=True)
class FlowEngine(Engine):
    """An engine that carries noise to data: a subclass says how one batch is drawn, in `draw`.

    Args:
        batch_size: draws made side by side, to bound memory; None makes all at once. Noise belongs to the draw, not to
            the batch, so that it changes nothing else.
        compile: compile the network first (4 to 30 s), its convolutions with channels last; worth it for long runs.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.verbs import infer
    >>> @dataclass(frozen=True)
    ... class OneCall(FlowEngine):  # a new engine: E[x_0 | x_1] of unit noise
    ...     def draw(self, field, noise):
    ...         return field(noise(0), field.process.t_max)
    >>> infer(GaussianMixture.example(), OneCall(), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    batch_size: Count | None = None
    compile: bool = False
    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    kind: ClassVar[PosteriorKind] = "iid"
    guarantee: ClassVar[Guarantee] = "discretised"
    shares = "draws"
    numbered = True
    field: ClassVar[type[Field]] = AffineDenoiser

    def draw(self, field: Any, noise: Noise) -> Tensor:
        """One batch of draws `(noise.num_rows, *event)`; all randomness comes from `noise`."""
        raise NotImplementedError

    def num_calls(self) -> int:
        """Network calls of one batch, for the progress bar; 0 where it is not known beforehand."""
        return 0

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
        first: int = 0,
    ) -> Posterior:
        """Draw from the program; see `Engine.run`."""
        started = time.perf_counter()
        batches = list(_batches(target, seed, num_chains, range(first, first + num_draws), self.batch_size))
        bar = ticker(describe(self), self.num_calls() * len(batches), progress)
        layout = channels_last(target.program) if self.compile else contextlib.nullcontext()
        with torch.no_grad(), layout, bar as update:
            counter = _Counter(update)
            parts = [self._batch(target, counter, *batch) for batch in batches]
        draws = torch.cat([x.reshape(num_chains, -1, *x.shape[1:]) for x in parts], dim=1)
        cost = Cost(network_calls=counter.calls, seconds=time.perf_counter() - started)
        rows = () if target.batch.condition is None else (target.batch.size,)
        draws = draws.reshape(num_chains, num_draws, *rows, *draws.shape[2:])
        dims: dict[str, tuple[str, ...]] = {"x": ("data",)} if rows else {}
        return Posterior({"x": draws}, self.kind, self.guarantee, str(self), cost, dims=dims, target=target)

    def _batch(self, target: Target, counter: _Counter, noise: Noise, condition: Tensor | None) -> Tensor:
        field = self.field_of(target.program, condition)

        def solve(wrap: Wrap) -> Tensor:
            return self.draw(field.through(wrap), noise)

        def named(rows: Iterable[int]) -> str:
            draws = {noise.first + row // noise.rows % noise.num_draws for row in rows}
            return f"draws {listed(sorted(draws))}"

        return self.solved(solve, counter.around, named)

    def field_of(self, program: Any, condition: Tensor | None) -> Any:
        """What the solver sees of a program at a condition, one row for each row of x."""
        return self.field.of(given(program, condition))

    def solved(
        self, solve: Callable[[Wrap], Tensor], wrap: Wrap, named: Callable[[Iterable[int]], str]
    ) -> Tensor:
        """What `solve` gives, its network compiled if this engine compiles; where it fails is said in words.

        Args:
            solve: takes what wraps the network and returns `(rows, *event)`.
            wrap: what else wraps it.
            named: what rows are called in messages.
        """
        try:
            x = solve(lambda output: wrap(self._compiled(output)))
        except SolverError as error:
            raise SolverError(f"{self}, {named(error.rows)}: {error}", error.rows) from error
        bad = ~torch.isfinite(x).reshape(len(x), -1).all(1)
        if bool(bad.any()):
            self._report(solve, bad, named(bad.nonzero().flatten().tolist()))
        return x

    def _compiled(self, output: Output) -> Output:
        if not self.compile:
            return output
        compiled: Output = torch.compile(output, dynamic=False)
        return compiled

    def _report(self, solve: Callable[[Wrap], Tensor], bad: Tensor, names: str) -> None:
        """Solve once more, looking at every call, to say when which rows turned NaN; the others stand."""
        watch = _Watch()
        solve(watch.around)
        when = "in the solver's own arithmetic" if watch.t is None else f"at t = {watch.t:.4g}"
        message = f"{self}: the network's output turned NaN or infinite {when}, in {names}"
        if bool(bad.all()):
            raise ProbgenError(
                f"{message}: all of them. Check the weights and the scale of the data, or stop earlier: a process with "
                "a larger t_min."
            )
        warnings.warn(
            f"{message} ({int(bad.sum())} of {len(bad)}). They are NaN in the result, the others are unaffected. "
            "More steps, or a process with a larger t_min, may help.",
            NonFiniteWarning,
            stacklevel=2,
        )


def _batches(
    target: Target, seed: int, num_chains: int, draws: range, batch_size: int | None
) -> Iterator[tuple[Noise, Tensor | None]]:
    """Noise in the program's dtype and on its device, and the condition repeated for each draw."""
    like = floating_weight(target.program)
    condition = target.batch.condition
    rows = 1 if condition is None else len(condition)
    shape = tuple(target.program.event_shape)
    size = batch_size or len(draws)
    for first in draws[::size]:
        count = min(size, draws.stop - first)
        repeated = None
        if condition is not None:
            repeated = condition.repeat(num_chains * count, *[1] * (condition.ndim - 1))
        yield Noise(seed, num_chains, count, shape, like.dtype, like.device, first, rows), repeated


@contextlib.contextmanager
def channels_last(program: Any) -> Iterator[None]:
    """The weights of two-dimensional convolutions with channels last inside the block, and as they were after it.

    >>> network = torch.nn.Conv2d(4, 4, 3)
    >>> with channels_last(network):
    ...     network.weight.stride()
    (36, 1, 12, 4)
    >>> network.weight.stride()
    (36, 9, 3, 1)
    """
    weights = program.parameters() if isinstance(program, torch.nn.Module) else ()
    found = [(weight, weight.data) for weight in weights if weight.ndim == 4]
    try:
        for weight, data in found:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in found:
            weight.data = data


def floating_weight(program: Any) -> Tensor:
    """A weight or buffer of the program, for its dtype and device; a default one where it has none."""
    weights = (*program.parameters(), *program.buffers()) if isinstance(program, torch.nn.Module) else ()
    return next((weight for weight in weights if weight.is_floating_point()), torch.zeros(()))


class _Counter:
    """Counts the calls of a network and shows them."""

    def __init__(self, update: Callable[..., None]) -> None:
        self.calls, self.update = 0, update

    def around(self, output: Output) -> Output:
        def counted(x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            self.update(self.calls)
            return output(x, t)

        return counted


class _Watch:
    """Remembers the time at which a network was first anything but finite."""

    t: float | None = None

    def around(self, output: Output) -> Output:
        def watched(x: Tensor, t: Tensor) -> Tensor:
            value = output(x, t)
            bad = ~torch.isfinite(value).reshape(len(value), -1).all(1)
            if self.t is None and bool(bad.any()):
                self.t = t.expand(len(bad))[bad][0].item()
            return value

        return watched
