"""Does the density of a diffusion move as its equation says? In one and two dimensions, on a mesh and by particles.

A process dx = f x dt + g dW moves its density by the Fokker-Planck equation, which the score turns into a continuity
equation, and any a >= 0 into a stochastic equation of the same marginals, forwards and backwards:

    dp/dt = -div(f x p) + g^2/2 Lap p = -div(v p),    v = f x - g^2/2 score.

For f = 0 the first is the heat equation, which cannot be run backwards; the family can, because it knows the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import (
    Count,
    InputError,
    NonNegativeInt,
    Positive,
    Scored,
    Within,
    check_arguments,
    describe,
)
from probgen.diagnostics.chi_square import chi_square
from probgen.diagnostics.densities import Density, box, coordinates, density_of, law_at, on_mesh
from probgen.diagnostics.lipschitz import Lipschitz, lipschitz
from probgen.diagnostics.mesh import Mesh, Motion
from probgen.dynamics import Velocity
from probgen.dynamics.fields import Steps
from probgen.dynamics.paths import trajectories
from probgen.processes import Process, Time
from probgen.randomness import Noise

_NUM_POINTS = {1: 512, 2: 128}


# --- the equations ------------------------------------------------------------------------------------------------


class Balance(NamedTuple):
    """How well one equation holds at one time.

    Args:
        equation: which one.
        time: t.
        residual: integral of |left - right| over the integral of the sizes of all terms: 0 where it holds, and never
            above 1.
        mesh_error: by how much that changes from a mesh to one of half the spacing and half the step in time, on
            which the residual was taken.
    """

    equation: str
    time: float
    residual: float
    mesh_error: float


class _Imbalance(NamedTuple):
    """Left minus right on a mesh, and the integral of the sizes of all terms."""

    value: Tensor
    scale: float


def balance_of_motion(
    equation: str, mesh: Mesh, density: Density, motion: Callable[[Mesh, float], Motion], t: float
) -> Balance:
    """Put a density into dp/dt = -div(drift p) + sum_i diffusion_i d^2p/dx_i^2 at time t.

    Args:
        equation: what to call it.
        mesh: the coarser of the two meshes that are used.
        density: p, as a function of the mesh and the time.
        motion: drift and diffusion, as functions of the mesh and the time.
        t: a time in (0, 1); p is asked for at neighbouring times too.

    >>> from probgen.diagnostics.densities import noised_density
    >>> from probgen.processes import VE
    >>> process, mesh = VE(sigma_max=5.0), Mesh((-12.0,), (12.0,), 256)
    >>> p = noised_density(torch.randn(50, 1), process)
    >>> balance_of_motion("heat", mesh, p, lambda mesh, t: noising(process, mesh, t), t=0.7).residual < 1e-6
    True
    """

    def imbalance(mesh: Mesh, step: float) -> _Imbalance:
        p, at = density(mesh, t), motion(mesh, t)
        rate = _time_derivative(lambda s: density(mesh, s), t, step)
        carried, spread = mesh.divergence(at.drift * p[..., None]), mesh.laplacian(p, at.diffusion)
        scale = sum(mesh.integral(term.abs()) for term in (rate, carried, spread))
        return _Imbalance(rate + carried - spread, scale)

    return _balance(equation, mesh, imbalance, t)


def balance_of_score(
    mesh: Mesh, density: Density, score: Callable[[Mesh, float], Tensor], t: float
) -> Balance:
    """Put a density and a score, `(*mesh.shape, d)`, into score p = grad p at time t; see `balance_of_motion`.

    Args:
        mesh: the coarser of the two meshes that are used.
        density: p, as a function of the mesh and the time.
        score: as a function of the mesh and the time.
        t: the time.
    """

    def imbalance(mesh: Mesh, _step: float) -> _Imbalance:
        p = density(mesh, t)
        slope = torch.stack([mesh.derivative(p, axis) for axis in range(p.ndim)], -1)
        claimed = score(mesh, t) * p[..., None]
        return _Imbalance(
            (claimed - slope).norm(dim=-1),
            mesh.integral(claimed.norm(dim=-1)) + mesh.integral(slope.norm(dim=-1)),
        )

    return _balance("score", mesh, imbalance, t)


def _balance(equation: str, mesh: Mesh, imbalance: Callable[[Mesh, float], _Imbalance], t: float) -> Balance:
    """The residual on a mesh of half the spacing, and its distance from that on this one at the points of both."""
    finer, step = mesh.refined(), min(t, 1 - t) / 256
    coarse, fine = imbalance(mesh, step), imbalance(finer, 0.5 * step)
    shared = fine.value[(slice(None, None, 2),) * fine.value.ndim]
    scale = max(fine.scale, 1e-300)
    return Balance(
        equation,
        t,
        finer.integral(fine.value.abs()) / scale,
        mesh.integral((coarse.value - shared).abs()) / scale,
    )


def _time_derivative(value: Callable[[float], Tensor], t: float, step: float) -> Tensor:
    """Central differences of fourth order."""
    near = value(t + step) - value(t - step)
    far = value(t + 2 * step) - value(t - 2 * step)
    return (8 * near - far) / (12 * step)


# --- the verdict --------------------------------------------------------------------------------------------------


class Marginal(NamedTuple):
    """Particles of one member of the family beside the density, at one time.

    Args:
        direction: "forward" (from the first time on) or "backward" (from the last).
        stochasticity: a.
        time: t.
        z: of Pearson's chi-square over the cells of the mesh, as a standard normal.
        detectable: the root mean square relative error of a cell's probability that is found 9 times of 10.
    """

    direction: str
    stochasticity: float
    time: float
    z: float
    detectable: float


@dataclass(frozen=True)
class FokkerPlanck:
    """What `fokker_planck` found; printed, it says what holds and what does not.

    Args:
        program: its name.
        balances: every equation at every time.
        marginals: every member of the family, in both directions, at several times.
        lipschitz: the steepness of the velocity.
        mass: the integral of the density over the mesh, `(times,)`.
        tolerance: the largest residual, and the largest error of the mesh, that passes.
        limit: the largest |z| that passes.
    """

    program: str
    balances: tuple[Balance, ...]
    marginals: tuple[Marginal, ...]
    lipschitz: Lipschitz
    mass: tuple[float, ...]
    tolerance: float
    limit: float

    @property
    def ok(self) -> bool:
        """True where nothing is complained about."""
        return not self.complaints()

    def complaints(self) -> list[str]:
        """What does not hold, one sentence each."""
        found = []
        lost = max((abs(1 - mass) for mass in self.mass), default=0.0)
        if not lost <= self.tolerance:
            found.append(f"The mesh misses {lost:.2g} of the mass: give more data, or wider bounds.")
        for worst in self._worst_balances():
            if not worst.mesh_error <= self.tolerance:
                found.append(
                    f"The mesh is too coarse for the {worst.equation} equation: its error is {worst.mesh_error:.2g} at "
                    f"t = {worst.time:.3g}. Use more num_points, or later times."
                )
            elif not worst.residual <= self.tolerance:
                found.append(
                    f"The {worst.equation} equation fails: residual {worst.residual:.2g} at t = {worst.time:.3g}, "
                    f"and the mesh errs by {worst.mesh_error:.1g} only."
                )
        if (odd := self._oddest()) is not None and not odd.z <= self.limit:
            found.append(
                f"Particles leave the density: a = {odd.stochasticity:g} {odd.direction} at t = {odd.time:.3g}, "
                f"z = {odd.z:.1f}. Either the score is wrong, or num_steps too few."
            )
        return found

    def __str__(self) -> str:
        """The worst of each kind, a line each."""
        lines = [f"Fokker-Planck diagnostics of {self.program}: {'holds' if self.ok else 'FAILS'}"]
        lines += [
            f"  {worst.equation:<14} {_EQUATIONS[worst.equation]:<43} residual <= {worst.residual:.1e} "
            f"(mesh error {worst.mesh_error:.0e}), worst at t = {worst.time:.3g}"
            for worst in self._worst_balances()
        ]
        if (odd := self._oddest()) is not None:
            members = ", ".join(f"{a:g}" for a in dict.fromkeys(m.stochasticity for m in self.marginals))
            detectable = max(m.detectable for m in self.marginals)
            lines.append(
                f"  same marginals for a = {members}, forward and backward: {len(self.marginals)} chi-square tests, "
                f"largest z = {odd.z:.1f} (a = {odd.stochasticity:g} {odd.direction}, t = {odd.time:.3g});\n"
                f"  errors of {100 * detectable:.2g} % in the probabilities of cells would be seen 9 times of 10"
            )
        return "\n".join([*lines, f"  {self.lipschitz}", *(f"  ! {text}" for text in self.complaints())])

    def _worst_balances(self) -> Iterator[Balance]:
        for equation in dict.fromkeys(balance.equation for balance in self.balances):
            mine = [balance for balance in self.balances if balance.equation == equation]
            yield max(mine, key=lambda balance: _or_infinite(max(balance.residual, balance.mesh_error)))

    def _oddest(self) -> Marginal | None:
        return max(self.marginals, key=lambda marginal: _or_infinite(marginal.z), default=None)


_EQUATIONS = {
    "Fokker-Planck": "dp/dt = -div(f x p) + g^2/2 Lap p",
    "heat": "dp/dt = g^2/2 Lap p",
    "continuity": "dp/dt = -div(v p)",
    "score": "score p = grad p",
}


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


# --- the verb -----------------------------------------------------------------------------------------------------


def fokker_planck(
    program: Any,
    data: Tensor,
    *,
    density: Density | None = None,
    times: Sequence[Time] | None = None,
    stochasticities: Sequence[Annotated[float, Within(0, 1000)]] = (0.0, 0.5, 1.0, 2.0),
    num_points: Count | None = None,
    num_steps: Steps = 120,
    tolerance: Positive = 1e-3,
    limit: Positive = 4.5,
    seed: NonNegativeInt = 0,
) -> FokkerPlanck:
    """Check that a program of one or two dimensions, its process and its score move one and the same density.

    Three questions. Does the density fulfil the Fokker-Planck (for f = 0: heat) equation of the process, the
    continuity equation of the program's velocity, and, of an oracle, score p = grad p? Do particles of the family with
    the same marginals, forward from the first time and backward from the last, stay with it? How steep is the velocity?

    Args:
        program: a diffusion; or a flow, whose continuity alone is checked, given its density.
        data: draws from the law at t = 0, `(n, *event)` of one or two coordinates. They say how wide the mesh must be,
            and one particle starts at each.
        density: p(mesh, t) on a mesh, `exact_density` or `noised_density` for instance. By default the program's own
            where it is an oracle, else that of the noised data: the score of a *fitted* program may then differ from
            that of the density because there are few data.
        times: in (t_min, t_max); five of them by default.
        stochasticities: members a >= 0 of the family.
        num_points: of the coarser mesh, along each axis; 512 for the line and 128 for the plane by default.
        num_steps: of the solver, from the first time to the last.
        tolerance: the largest residual that passes, and the largest error of the mesh; 1e-3 finds a score that is 1 %
            off.
        limit: the largest z of a chi-square test that passes.
        seed: of the particles.

    Returns a `FokkerPlanck`. Raises `InputError` for other shapes, times out of range, or a density that is not known.

    Source: Risken (1996), doi 10.1007/978-3-642-61544-3; Song et al. (2021), arXiv 2011.13456, appendix D.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen import Ancestral, infer
    >>> mixture = GaussianMixture.example(dim=1)
    >>> fokker_planck(mixture, infer(mixture, Ancestral(), num_draws=2000).flat("x"), num_steps=30).ok
    True
    """
    check_arguments(fokker_planck, locals())
    question = _Question(
        program, Velocity.of(program), coordinates(program, data), num_points, num_steps, limit, seed
    )
    density = density_of(program, question.data, question.velocity.process, density)
    at = _times(question.velocity, times)
    marginals = [
        marginal
        for t_from, t_to in ((at[0], at[-1]), (at[-1], at[0]))
        for a in stochasticities
        for marginal in question.marginals(density, a, t_from, t_to)
    ]
    return FokkerPlanck(
        describe(program),
        tuple(balance for t in at for balance in question.balances(density, t)),
        tuple(marginals),
        lipschitz(program, num_steps=num_steps, every=-(-num_steps // 4), seed=seed),
        tuple((mesh := question.mesh(t)).integral(density(mesh, t)) for t in at),
        tolerance,
        limit,
    )


@dataclass(frozen=True)
class _Question:
    """A program and what it takes to ask about it."""

    program: Any
    velocity: Velocity
    data: Tensor
    num_points: int | None
    num_steps: int
    limit: float
    seed: int

    def mesh(self, t: float) -> Mesh:
        num_points = self.num_points or _NUM_POINTS[self.data.shape[1]]
        if self.velocity.process is None:
            return Mesh.around(self._carried(t), num_points, widen=2.5)
        return box(self.velocity.process, self.data, t, num_points)

    def balances(self, density: Density, t: float) -> Iterator[Balance]:
        """Every equation that the program claims."""
        mesh = self.mesh(t)
        process = self.velocity.process
        if process is not None:
            name = "heat" if bool((process.drift(_at(t)) == 0).all()) else "Fokker-Planck"
            yield balance_of_motion(name, mesh, density, lambda mesh, t: noising(process, mesh, t), t)
        yield balance_of_motion("continuity", mesh, density, self._flow, t)
        if isinstance(self.program, Scored):
            yield balance_of_score(mesh, density, self._score, t)

    def marginals(
        self, density: Density, stochasticity: float, t_from: float, t_to: float
    ) -> Iterator[Marginal]:
        """Particles that start in the law of t_from, a third, two thirds and all of the way to t_to."""
        if self.velocity.process is None:
            return
        times, states = trajectories(
            self.program,
            self._noised(self.velocity.process, t_from),
            t_from=t_from,
            t_to=t_to,
            num_steps=self.num_steps,
            stochasticity=stochasticity,
            seed=self.seed + 1,
            every=-(-self.num_steps // 3),
        )
        direction = "forward" if t_to > t_from else "backward"
        for t, x in zip(times.tolist()[1:], states[1:], strict=True):
            mesh = self.mesh(t)
            found = chi_square(mesh, density(mesh, t), x.flatten(1), self.limit)
            yield Marginal(direction, stochasticity, t, *found)

    def _noised(self, process: Process, t: float) -> Tensor:
        """One draw of x_t for each row of data."""
        law = law_at(process, self.data, t)
        unit = Noise(self.seed, 1, len(self.data), tuple(self.data.shape[1:]), torch.float64)(0)
        return (law.loc + law.scale * unit).reshape(-1, *self.program.event_shape)

    def _carried(self, t: float) -> Tensor:
        """The data carried to t by the flow itself."""
        start, t_from = self.data.reshape(-1, *self.program.event_shape), self.velocity.t_min
        _, states = trajectories(self.program, start, t_from=t_from, t_to=t, num_steps=self.num_steps)
        return states[-1].flatten(1)

    def _flow(self, mesh: Mesh, t: float) -> Motion:
        return Motion(on_mesh(self.program, self.velocity, mesh, t), torch.zeros((), dtype=torch.float64))

    def _score(self, mesh: Mesh, t: float) -> Tensor:
        return on_mesh(self.program, self.program.score, mesh, t)


def noising(process: Process, mesh: Mesh, t: float) -> Motion:
    """dp/dt = -div(f x p) + g^2/2 Lap p on a mesh."""
    points = mesh.points.reshape(*mesh.shape, -1)
    return Motion(points * process.drift(_at(t))[0], 0.5 * process.diffusion2(_at(t))[0])


def _at(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def _times(velocity: Velocity, times: Sequence[float] | None) -> list[float]:
    low, high = velocity.t_min, velocity.t_max
    if times is None:
        return [low + (high - low) * part for part in (0.1, 0.3, 0.5, 0.7, 0.9)]
    if len(times) < 2 or not all(low < t < high for t in times) or sorted(set(times)) != list(times):
        raise InputError(
            f"times must be two or more, increasing, inside ({low:g}, {high:g}), got {list(times)}."
        )
    return list(times)


def example() -> FokkerPlanck:
    """A made-up finding of a score that fails."""
    balances = (
        Balance("Fokker-Planck", 0.5, 2e-9, 1e-9),
        Balance("continuity", 0.5, 0.21, 1e-9),
    )
    steep = Lipschitz(torch.tensor([1.0, 0.001]).double(), torch.tensor([0.7, 81.0]).double())
    return FokkerPlanck("Example", balances, (), steep, (1.0,), 1e-3, 4.5)
