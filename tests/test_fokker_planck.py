"""Densities move as their equations say; what carries a wrong score, sign or half is found.

What is measured against what: residuals against zero, with the error of the mesh known from one of half the spacing;
densities evolved on the mesh and particles against the exact density of a mixture; growth rates and Lipschitz constants
against theory. A broken twin stands beside each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probgen import DDPM, Batch, GaussianMixture, InputError, ProbgenError
from probgen.core import NonFiniteWarning
from probgen.diagnostics.backward_heat import backward_heat
from probgen.diagnostics.chi_square import chi_square
from probgen.diagnostics.densities import box, exact_density, noised_density
from probgen.diagnostics.flow_plots import example as flow_example
from probgen.diagnostics.flow_plots import plot_flow
from probgen.diagnostics.fokker_planck import FokkerPlanck, fokker_planck, noising
from probgen.diagnostics.lipschitz import lipschitz
from probgen.diagnostics.mesh import Mesh, Motion, evolve
from probgen.dynamics import GaussianInitial
from probgen.processes import EDM, OU, VE, VP, CosineVP, OTPath, Process, SubVP, over_event
from probgen.randomness import forked_rng

PROCESSES = (VP(), SubVP(), CosineVP(), VE(), EDM(), OU(), OTPath())
FAMILY = (0.0, 0.5, 1.0, 2.0)


@cache
def draws(dim: int, count: int = 4000) -> Tensor:
    with forked_rng(dim):
        return GaussianMixture.example(dim).model(Batch(num_rows=count))


def equations(program: Any, dim: int = 1, **options: Any) -> FokkerPlanck:
    """The equations alone, without particles: quick."""
    return fokker_planck(
        program, draws(dim), stochasticities=(), **{"num_steps": 4, "times": (0.1, 0.4, 0.8)} | options
    )


# --- the equations hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("dim", [1, 2])
def test_every_process_moves_the_exact_density(process: Process, dim: int) -> None:
    """To a millionth, on a mesh whose own error is known to be as small; a score 1 % off is 5,000 times that."""
    found = equations(GaussianMixture.example(dim, process), dim)
    assert found.ok, str(found)
    for balance in found.balances:
        assert balance.residual < 1e-6
        assert balance.mesh_error < 2e-6
    names = {balance.equation for balance in found.balances}
    assert names == {"heat" if isinstance(process, VE) else "Fokker-Planck", "continuity", "score"}


def test_noised_data_are_exact_for_themselves() -> None:
    """Any process, no oracle: 500 kernels fulfil its equation."""

    class Denoiser(torch.nn.Module):
        event_shape = (1,)

        def model(self, batch: Batch) -> None:
            raise NotImplementedError

        def process(self) -> Process:
            return SubVP()

        def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
            return x_t

    found = fokker_planck(Denoiser(), draws(1)[:500], times=(0.4, 0.8), stochasticities=(), num_steps=4)
    residuals = {balance.equation: balance.residual for balance in found.balances}
    assert residuals["Fokker-Planck"] < 1e-6
    assert residuals["continuity"] > 0.1  # its denoiser knows nothing


@dataclass(frozen=True)
class PerCoordinate(Process):
    """Two coordinates that are noised at two rates."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-torch.stack([t, 3 * t], -1))

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - torch.exp(-2 * torch.stack([t, 3 * t], -1))).sqrt()


def test_a_law_that_differs_by_coordinate() -> None:
    x, process = draws(2)[:200], PerCoordinate()
    density, t = noised_density(x, process), 0.4
    mesh = box(process, x, t, 128)
    at = noising(process, mesh, t)
    assert at.diffusion.shape == (2,)
    step = 1e-3
    rate = (density(mesh, t + step) - density(mesh, t - step)) / (2 * step)
    assert mesh.integral((at.rate(mesh, density(mesh, t)) - rate).abs()) < 1e-4 * mesh.integral(rate.abs())


class StraightFlow:
    """A flow without a noising law: N(3 t, 1) at t, moved with velocity 3."""

    event_shape = (1,)

    def model(self, batch: Batch) -> None:
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.speed + 0 * x_t

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def span(self) -> tuple[float, float]:
        return 0.0, 1.0

    def initial(self) -> GaussianInitial:
        return GaussianInitial(torch.tensor(1.0))


def test_a_flow_fulfils_its_continuity_equation() -> None:
    def density(mesh: Mesh, t: float) -> Tensor:
        return torch.distributions.Normal(3 * t, 1.0).log_prob(mesh.points[:, 0]).exp()

    with forked_rng(0):
        x = torch.randn(2000, 1)
    right, wrong = (fokker_planck(StraightFlow(v), x, density=density, num_steps=4) for v in (3.0, 2.9))
    assert right.ok, str(right)
    assert {balance.equation for balance in right.balances} == {"continuity"}
    assert not right.marginals
    assert "continuity equation fails" in str(wrong)
    with pytest.raises(InputError, match="give density="):
        fokker_planck(StraightFlow(3.0), x)


def test_a_network_in_single_precision_is_asked_as_it_is() -> None:
    """The mixture as the network of a chain: its velocity fulfils the equation of the mixture's density to 1e-4."""
    mixture = GaussianMixture.example(1).float()
    chain = DDPM(mixture, VP(), num_steps=100, event_shape=(1,), prediction="x0")
    found = fokker_planck(chain, draws(1), density=exact_density(GaussianMixture.example(1)), num_steps=30)
    assert found.ok, str(found)
    assert {balance.equation for balance in found.balances} == {"Fokker-Planck", "continuity"}
    assert max(balance.residual for balance in found.balances) < 1e-4


# --- what is wrong is found ---------------------------------------------------------------------------------------


class Wrong(GaussianMixture):
    """The mixture with a slip in its denoiser's score: `slip` maps the right score."""

    slip: Callable[[Tensor], Tensor]

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (over_event(value(t), x_t) for value in (self.process().alpha, self.process().sigma))
        return (x_t + sigma**2 * type(self).slip(super().score(x_t, t))) / alpha


class WrongSign(Wrong):
    slip = staticmethod(torch.neg)


class NoHalf(Wrong):
    """v = f x - g^2 score."""

    slip = staticmethod(lambda score: 2 * score)


class OnePercent(Wrong):
    slip = staticmethod(lambda score: 1.01 * score)


class NoScore(Wrong):
    slip = staticmethod(torch.zeros_like)


class WrongScoreMethod(GaussianMixture):
    """Its denoiser is right, its score is not."""

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        return -super().score(x_t, t)


@dataclass(frozen=True)
class NoHalfInDiffusion(VP):
    def diffusion2(self, t: Tensor) -> Tensor:
        return 2 * super().diffusion2(t)


@dataclass(frozen=True)
class WrongDrift(VP):
    def drift(self, t: Tensor) -> Tensor:
        return -super().drift(t)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(
    ("program", "process", "equation"),
    [
        (WrongSign, VP(), "continuity"),
        (NoHalf, VP(), "continuity"),
        (OnePercent, VP(), "continuity"),
        (NoScore, VP(), "continuity"),
        (WrongSign, VE(), "continuity"),
        (NoHalf, OTPath(), "continuity"),
        (WrongScoreMethod, VP(), "score"),
        (GaussianMixture, NoHalfInDiffusion(), "Fokker-Planck"),
        (GaussianMixture, WrongDrift(), "Fokker-Planck"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_a_slip_fails_its_equation_and_no_other(
    program: type[GaussianMixture], process: Process, equation: str, dim: int
) -> None:
    found = equations(program.example(dim, process), dim)
    assert not found.ok
    (complaint,) = found.complaints()
    assert complaint.startswith(f"The {equation} equation fails")
    assert "FAILS" in str(found)


def test_a_coarse_mesh_is_said_to_be_coarse() -> None:
    found = equations(GaussianMixture.example(1), num_points=32)
    assert any("too coarse" in complaint for complaint in found.complaints())
    assert not any("equation fails" in complaint for complaint in found.complaints())


def test_mass_outside_of_the_mesh_is_missed() -> None:
    found = fokker_planck(
        GaussianMixture.example(1), 0.1 * draws(1), times=(0.01, 0.02), stochasticities=(), num_steps=4
    )
    assert any("mass" in complaint for complaint in found.complaints())


def test_nan_does_not_pass() -> None:
    class Broken(Wrong):
        slip = staticmethod(lambda score: score * math.nan)

    with pytest.warns(NonFiniteWarning, match="NaN"):
        found = equations(Broken.example(1))
    assert not found.ok
    assert "continuity" in found.complaints()[0]


# --- the same marginals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_the_family_keeps_the_marginals_in_both_directions(dim: int) -> None:
    """24 chi-square tests of 4,000 particles: nine times of ten, one finds an error of 14 % in the cells.

    With a score that is 20 % too large they fail in both directions.
    """
    options: dict[str, Any] = {"times": (0.1, 0.8), "num_steps": 60, "num_points": 128}
    found = fokker_planck(GaussianMixture.example(dim), draws(dim), **options)
    assert found.ok, str(found)
    assert {(m.direction, m.stochasticity) for m in found.marginals} == {
        (direction, a) for direction in ("forward", "backward") for a in FAMILY
    }
    assert len(found.marginals) == 24
    assert all(m.detectable < 0.16 for m in found.marginals)
    assert "would be seen 9 times of 10" in str(found)

    class TooLarge(Wrong):
        slip = staticmethod(lambda score: 1.2 * score)

    wrong = fokker_planck(TooLarge.example(dim), draws(dim), **options, stochasticities=(0.5, 2.0))
    worst = {d: max(m.z for m in wrong.marginals if m.direction == d) for d in ("forward", "backward")}
    assert min(worst.values()) > 6
    assert any("Particles leave the density" in complaint for complaint in wrong.complaints())


def test_chi_square_is_calibrated_and_finds_what_it_says() -> None:
    """z of 200 samples of the law is standard normal; beside a density off by `detectable` 9 of 10 are over the limit.

    200 samples know the mean of z to 0.07 and the share to 0.02.
    """
    mesh = Mesh((-8.0,), (8.0,), 512)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(mesh.axes[0]).exp()
    with forked_rng(0):
        samples = torch.randn(200, 5000, 1)
    found = [chi_square(mesh, density, x) for x in samples]
    z = torch.tensor([one.z for one in found])
    assert abs(z.mean()) < 0.3
    assert 0.85 < z.std() < 1.15
    sign = torch.where(
        mesh.axes[0].abs() < 0.6745, 1.0, -1.0
    )  # one half of the mass too likely, the other too rare

    def share_found(error: float) -> float:
        off = density * (1 + error * sign)
        return sum(chi_square(mesh, off, x).z > 4.5 for x in samples) / len(samples)

    assert 0.8 < share_found(found[0].detectable) < 0.98
    assert share_found(0.5 * found[0].detectable) < 0.2


# --- on the mesh --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_a_density_evolves_forwards_by_any_member_of_the_family(dim: int) -> None:
    """The equations of a = 0, 1 and 2 carry the density of t = 0.15 to that of t = 0.3, to 1e-4 of its mass."""
    mixture = GaussianMixture.example(dim, OTPath())
    process, density = mixture.process(), exact_density(mixture)
    mesh = box(process, draws(dim), 0.3, 64)

    def motion(a: float, t: float) -> Motion:
        at = torch.tensor([t], dtype=torch.float64)
        noise, score = process.diffusion2(at), mixture.score(mesh.points, at).reshape(*mesh.shape, dim)
        drift = noising(process, mesh, t).drift - 0.5 * (1 - a) * noise * score
        return Motion(drift, 0.5 * a * noise[0])

    for a in (0.0, 1.0, 2.0):
        arrived = evolve(mesh, density(mesh, 0.15), lambda t, a=a: motion(a, t), 0.15, 0.3)
        assert mesh.integral((arrived - density(mesh, 0.3)).abs()) < (1e-4 if dim == 1 else 2e-3)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_backward_heat_equation_blows_up_and_the_family_does_not(dim: int) -> None:
    """The growth of the finest wave is that of theory, k^2/2 times the time, to 1 % (the scheme errs by 0.4 %)."""
    options: dict[str, Any] = {"t_from": 0.4, "t_to": 0.3, "num_points": 64}
    mixture = GaussianMixture.example(dim, OTPath())
    found = backward_heat(mixture, draws(dim), **options)
    assert found.theory > (14 if dim == 1 else 30)
    assert found.heat_growth == pytest.approx(found.theory, rel=0.01)
    assert found.family_growth < 0.5
    assert found.family_error < 0.02
    assert "the heat equation multiplies the finest wave" in str(found)
    with pytest.raises(InputError, match="t_to < t_from"):
        backward_heat(mixture, draws(dim), t_from=0.3, t_to=0.4)
    with pytest.raises(InputError, match="stochasticity"):
        backward_heat(mixture, draws(dim), **options, stochasticity=-1.0)


def test_far_enough_back_the_heat_equation_loses_the_density() -> None:
    """Rounding errors of 1e-16 grow by e^60; the family returns the density to a millionth."""
    found = backward_heat(
        GaussianMixture.example(1, OTPath()), draws(1), t_from=0.4, t_to=0.3, num_points=128
    )
    assert found.heat_error > 1e3
    assert found.family_error < 1e-6
    wrong = backward_heat(NoHalf.example(1, OTPath()), draws(1), t_from=0.4, t_to=0.3, num_points=64)
    assert wrong.family_error > 0.05


def test_derivatives_and_cells_of_a_mesh() -> None:
    mesh = Mesh((-8.0, -6.0), (8.0, 7.0), 64)
    x, y = mesh.points.reshape(64, 64, 2).unbind(-1)
    p = (-0.5 * (x - 1) ** 2 - 0.7 * y**2).exp()
    torch.testing.assert_close(mesh.derivative(p, 0), -(x - 1) * p, atol=1e-9, rtol=0)
    torch.testing.assert_close(mesh.derivative(p, 1), -1.4 * y * p, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        mesh.laplacian(p, torch.tensor([2.0, 3.0])),
        (2 * ((x - 1) ** 2 - 1) + 3 * (1.96 * y**2 - 1.4)) * p,
        atol=1e-8,
        rtol=0,
    )
    torch.testing.assert_close(
        mesh.divergence(torch.stack([p, y * p], -1)), (2 - x - 1.4 * y**2) * p, atol=1e-8, rtol=0
    )
    assert mesh.integral(p) == pytest.approx(2 * math.pi / math.sqrt(1.4), abs=1e-9)
    points = mesh.points + torch.tensor(mesh.spacing).double() * 0.49
    assert (mesh.count(points, 8) == 64).all()
    assert mesh.count(torch.tensor([[9.0, 0.0], [math.nan, 0.0]]), 8).sum() == 0
    assert mesh.cells(torch.ones(64, 64), 8).shape == (8, 8)
    torch.testing.assert_close(
        mesh.refined().points.reshape(128, 128, 2)[::2, ::2], mesh.points.reshape(64, 64, 2)
    )


# --- steepness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP(), VE(), OTPath()], ids=lambda process: type(process).__name__)
def test_lipschitz_constant_of_gaussian_data_is_known(process: Process) -> None:
    """dv/dx = d log sd(t)/dt on each axis, sd^2 = alpha^2 s^2 + sigma^2; the largest is what is found."""
    scales = torch.tensor([0.05, 0.7], dtype=torch.float64)
    mixture = GaussianMixture(
        torch.ones(1).double(), torch.zeros(1, 2).double(), torch.diag(scales**2)[None], process
    )
    found = lipschitz(mixture, num_paths=5, num_steps=8, every=2)
    t = found.times[:, None]
    variance = process.alpha(t).square() * scales**2 + process.sigma(t).square()
    rate = 2 * process.alpha(t) * process.alpha_rate(t) * scales**2 + process.variance_rate(t)
    torch.testing.assert_close(found.largest, (rate / (2 * variance)).abs().amax(1), rtol=1e-6, atol=1e-8)


def test_lipschitz_constant_explains_the_clamp() -> None:
    """For data on two points and straight paths it is 1/t or more, at t_min a thousand; for spread data it is small."""
    two = GaussianMixture(
        torch.tensor([0.3, 0.7]).double(),
        torch.tensor([[-1.0], [1.0]]).double(),
        torch.full((2, 1, 1), 1e-10).double(),
        OTPath(),
    )
    sharp = lipschitz(two, num_paths=50, num_steps=20, every=5)
    assert (sharp.largest[1:] > 0.9 / sharp.times[1:]).all()
    assert sharp.largest[-1] > 900
    spread = lipschitz(GaussianMixture.example(1, OTPath()), num_paths=50, num_steps=20, every=5)
    assert spread.largest.max() < 30
    assert "at t = 0.001" in str(spread)


# --- bad input, and what is drawn ---------------------------------------------------------------------------------


def nothing(mesh: Mesh, t: float) -> Any:
    """No density."""


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: Mesh((0.0,), (0.0,), 64), "low must lie below high"),
        (lambda: Mesh((0.0,), (1.0,), 60), "power of two"),
        (lambda: Mesh((0.0,) * 3, (1.0,) * 3, 64), "one axis or two"),
        (lambda: Mesh.around(torch.full((4, 1), math.nan), 64), "NaN"),
        (lambda: Mesh.around(torch.zeros(4), 64), r"\(n, 1\)"),
        (lambda: equations(GaussianMixture.example(1), times=(0.5, 0.2)), "increasing"),
        (lambda: equations(GaussianMixture.example(1), times=(0.5, 1.0)), "inside"),
        (lambda: fokker_planck(GaussianMixture.example(1), draws(2)), r"must be draws of GaussianMixture"),
        (lambda: fokker_planck(GaussianMixture.example(3), torch.randn(50, 3)), "3 coordinates"),
        (lambda: fokker_planck(GaussianMixture.example(1), torch.full((50, 1), math.inf)), "Inf"),
        (lambda: fokker_planck(GaussianMixture.example(1), draws(1), density=nothing), "density.*got None"),
        (
            lambda: backward_heat(
                GaussianMixture.example(1), draws(1), t_from=0.3, t_to=0.2, density=nothing
            ),
            "density.*got None",
        ),
        (
            lambda: backward_heat(
                GaussianMixture.example(1), torch.tensor([1e9, *[0.0] * 20])[:, None], t_from=0.3, t_to=0.2
            ),
            "mass 0 at t = 0.3",
        ),
        (lambda: chi_square(Mesh((-9.0,), (9.0,), 512), torch.ones(512) / 18, torch.zeros(20, 1)), "too few"),
        (
            lambda: chi_square(Mesh((-9.0,), (9.0,), 512), torch.ones(2), torch.zeros(20, 1)),
            r"of shape \(512,\)",
        ),
        (
            lambda: chi_square(Mesh((-9.0,), (9.0,), 8), torch.ones(8) / 18, torch.zeros(20)),
            r"x must be \(n, 1\)",
        ),
        (lambda: plot_flow(nothing, *flow_example()[1:], "nowhere.png"), "density.*got None"),
        (lambda: plot_flow(*flow_example()[:2], {}, "nowhere.png"), "no runs"),
        (
            lambda: plot_flow(
                flow_example()[0], Mesh((0.0,) * 2, (1.0,) * 2, 8), flow_example()[2], "nowhere.png"
            ),
            "2",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call()


def test_endless_evolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probgen.diagnostics.mesh.MAX_STEPS", 5)
    mesh = Mesh((-1.0,), (1.0,), 64)
    fast = Motion(torch.zeros(64, 1), torch.tensor(1.0))
    with pytest.raises(ProbgenError, match="coarser mesh"):
        evolve(mesh, torch.ones(64), lambda t: fast, 0.0, 1.0)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_picture_of_a_flow(dim: int, tmp_path: Path) -> None:
    density = exact_density(GaussianMixture.example(dim))
    times = torch.linspace(1.0, 0.1, 7).double()
    runs = {name: (times, torch.randn(7, 30, dim)) for name in ("ODE", "SDE")}
    path = plot_flow(
        density, Mesh((-4.0,) * dim, (4.0,) * dim, 32), runs, tmp_path / "new" / "flow.png", unit="m"
    )
    assert path.stat().st_size > 5000


def test_verdict_speaks() -> None:
    found = equations(GaussianMixture.example(1))
    text = str(found)
    for words in ("holds", "dp/dt = -div(v p)", "mesh error", "Lipschitz"):
        assert words in text
    assert not replace(found, tolerance=1e-20).ok
