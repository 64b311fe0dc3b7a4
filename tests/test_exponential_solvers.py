"""`DDIM` and `DPMSolver`: the published formula, orders of convergence, exact moments; and mutants that fail.

The check of moments knows an average to 1/sqrt(20,000) = 0.007 standard deviations of its statistic: it sees, nine
times of ten, what shifts one by 0.04 + bound, the bound being 0.02.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from probgen import DDIM, VP, Batch, DPMSolver, infer
from probgen.core import InputError
from probgen.dynamics import AffineDenoiser, multistep
from probgen.dynamics.multistep import exponential_weights, take_steps
from probgen.inference import ddim
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import EDM, OU, VE, CosineVP, OTPath, Process, SubVP, denoiser_coefficients
from probgen.randomness import Noise, forked_rng
from statistics_tools import ALLOWED_Z, Summary, Worst, largest_z, mixture_statistics, summarise

NUM_DRAWS = 20_000
BOUND = 0.02
PROCESSES = {
    "VP": VP(),
    "CosineVP": CosineVP(),
    "VE": VE(),
    "EDM": EDM(),
    "SubVP": SubVP(),
    "OU": OU(t_min=1e-5),  # at 1e-3 a tenth of its noise is left
    "OTPath": OTPath(),
}


# --- DDIM is the published formula --------------------------------------------------------------------------------


def published_ddim(mixture: GaussianMixture, steps: int, eta: float, num_draws: int) -> Tensor:
    """Song et al. (2020), eq. 12 with eq. 16, in their letters: alpha there is alpha^2 here."""
    process = mixture.process()
    noise = Noise(0, 1, num_draws, mixture.event_shape, torch.float64)
    times = 1 - (1 - process.t_min) * torch.arange(steps, dtype=torch.float64) / steps
    alphas = [*process.alpha(times).square().tolist(), 1.0]
    x = noise(0) * process.terminal_scale()
    for k, t in enumerate(times):
        a, b = alphas[k], alphas[k + 1]
        x0hat = mixture.denoise(x, t[None])
        eps = (x - math.sqrt(a) * x0hat) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * x0hat + math.sqrt(1 - b - sigma**2) * eps
        x = x + sigma * noise(k + 1)
    return x


def ddim_error(eta: float) -> float:
    mixture = GaussianMixture.example()
    x = infer(mixture, DDIM(12, eta=eta), num_draws=30).flat("x")
    return (x - published_ddim(mixture, 12, eta, 30)).abs().max().item()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_published_formula(eta):
    assert ddim_error(eta) < 1e-9


def test_ignored_eta_fails_the_published_formula(monkeypatch):
    weights = ddim.DDIM._weights
    monkeypatch.setattr(ddim.DDIM, "_weights", lambda engine, *args: weights(replace(engine, eta=0.0), *args))
    assert ddim_error(0.0) < 1e-9
    assert ddim_error(0.4) > 1e-3


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_first_order_is_ddim(process):
    mixture = GaussianMixture.example(2, process)
    first_order = DPMSolver(6, order=1, corrector=False, grid="karras")
    x, expected = (
        infer(mixture, engine, num_draws=20).flat("x") for engine in (first_order, DDIM(6, grid="karras"))
    )
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_stochastic_first_order_is_ddim_with_eta_1(process):
    mixture = GaussianMixture.example(2, process)
    engines = DPMSolver(6, order=1, stochasticity=1.0, corrector=False, grid="karras"), DDIM(6, 1.0, "karras")
    x, expected = (infer(mixture, engine, num_draws=20).flat("x") for engine in engines)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


# --- orders -------------------------------------------------------------------------------------------------------


class Middle(VP):
    """Between times at which the path is smooth."""

    def zigzag(self, pairs: int) -> Tensor:
        """Times whose steps in lambda are of lengths 1, 2, 1, 2, .. in turn: a ratio that no refinement evens out."""
        lengths = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(pairs)
        progress = torch.cat((torch.zeros(1, dtype=torch.float64), lengths.cumsum(0))) / lengths.sum()
        ends = torch.tensor([self.t_max, self.t_min], dtype=torch.float64)
        first, last = self.sigma(ends) / self.alpha(ends)
        return self.time_at(first * (last / first) ** progress)


def carried(engine: DPMSolver, pairs: int) -> Tensor:
    process = Middle(t_min=0.2, t_max=0.6)
    mixture = GaussianMixture.example(2, process)
    field = AffineDenoiser.of(mixture)
    x = process.terminal_scale() * Noise(0, 1, 20, (2,), torch.float64)(0)
    return take_steps(field.output, engine.plan(field, process.zigzag(pairs))[:-1], x, ())


@cache
def accurate() -> Tensor:
    return carried(DPMSolver(), 1000)


def order_of(engine: DPMSolver) -> float:
    """The slope of log error against log steps, between 48 and 96 steps."""
    errors = [(carried(engine, pairs) - accurate()).norm() for pairs in (24, 48)]
    return math.log2(errors[0] / errors[1])


def order_of_one_step(count: int) -> float:
    """That of a step by `count` exact values of x0hat, on x_0 ~ N(0, 0.3), where x_t is in proportion to its scale."""
    process, variance = VP(), 0.3

    def scale(t: Tensor) -> Tensor:
        return (process.alpha(t).square() * variance + process.sigma(t).square()).sqrt()

    def error(h: float) -> float:
        known = 0.5 + h * torch.tensor([[0.0], [1.0], [1.7]], dtype=torch.float64)[:count]
        end = torch.tensor([0.5 - 1.3 * h], dtype=torch.float64)
        (step,) = exponential_weights(process, known[0], end, known, 0.0, 0.0)
        x0hat = process.alpha(known[:, 0]) * variance / scale(known[:, 0])
        x = step.on_x * scale(known[0]) + (torch.stack(step.on_x0) * x0hat).sum()
        return (x - scale(end)).abs().item()

    return math.log2(error(0.02) / error(0.01))


FIRST = DPMSolver(order=1, corrector=False)
SECOND = DPMSolver(order=2, corrector=False)


@pytest.mark.parametrize("exponent", [0.0, 1 / 3])
@pytest.mark.parametrize("engine", [FIRST, SECOND], ids=["first", "second"])
def test_order_of_convergence(engine, exponent):
    assert order_of(replace(engine, exponent=exponent)) == pytest.approx(engine.order, abs=0.15)


@pytest.mark.parametrize("exponent", [0.0, 1 / 3])
@pytest.mark.parametrize("order", [2, 3])
def test_corrected_steps_converge_at_least_as_fast(order, exponent):
    assert order_of(DPMSolver(order=order, exponent=exponent)) > order - 0.15


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_step_from_the_exact_path_is_one_order_better(count):
    assert order_of_one_step(count) == pytest.approx(count + 1, abs=0.15)


def lambda_of_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    half_log_snr = multistep._half_log_snr
    patch.setattr(multistep, "_half_log_snr", lambda *args: -half_log_snr(*args))


def stale_output(patch: pytest.MonkeyPatch) -> None:
    """The weight of the newest x0hat goes to the one before."""
    plus = multistep._plus
    patch.setattr(multistep, "_plus", lambda x, w, known: plus(x, w, [*known[1:], known[0]]))


def ratio_inverted(patch: pytest.MonkeyPatch) -> None:
    """h_last/h where h/h_last belongs: the older value is taken to lie at the wrong distance."""
    lagrange = multistep._lagrange

    def inverted(nodes: Tensor, at: Tensor) -> list[Tensor]:
        if len(nodes) == 1:
            return lagrange(nodes, at)
        h = (at - nodes[0]).abs().max(0).values
        older = [nodes[0] - h.square() / (nodes[0] - node) for node in nodes[1:]]
        return lagrange(torch.stack([nodes[0], *older]), at)

    patch.setattr(multistep, "_lagrange", inverted)


@pytest.mark.parametrize("mutate", [lambda_of_wrong_sign, stale_output])
def test_mutants_lose_the_order_of_convergence(mutate, monkeypatch):
    accurate()  # before anything is mutated
    mutate(monkeypatch)
    assert not order_of(SECOND) > 1.5


def test_inverted_ratio_loses_the_order_of_a_step(monkeypatch):
    """Over many steps its errors, in proportion to h_last^2 - h^2, cancel one another."""
    ratio_inverted(monkeypatch)
    assert not order_of_one_step(2) > 2.5


# --- the right law ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """An engine on the mixture in the plane, noised by one process."""

    process: str
    engine: Any

    def __str__(self) -> str:
        return f"{self.process}, {self.engine}, {self.engine.steps}"

    def draw(self) -> Tensor:
        mixture = GaussianMixture.example(2, PROCESSES[self.process]).float()
        return infer(mixture, self.engine, num_draws=NUM_DRAWS, progress=False).flat("x")


ODE = DPMSolver(30, batch_size=5000)
SDE = DPMSolver(80, order=2, stochasticity=1.0, batch_size=5000)
SMOOTH = DDIM(400, grid="karras", batch_size=5000)
ROUGH = DDIM(800, eta=1.0, grid="karras", batch_size=5000)
SETTINGS = [
    pytest.param(Setting(name, engine), id=f"{name}-{label}", marks=[pytest.mark.slow] if slow else [])
    for label, engine in (("ode", ODE), ("sde", SDE), ("ddim", SMOOTH), ("ancestral", ROUGH))
    for name in PROCESSES
    for slow in [label == "ancestral" or (label == "ddim" and name not in ("VP", "VE"))]
]


@cache
def exact_law() -> Summary:
    with forked_rng(2):
        x = GaussianMixture.example(2).model(Batch(num_rows=NUM_DRAWS))
    return summary_of(x)


def summary_of(x: Tensor) -> Summary:
    return summarise(partial(mixture_statistics, GaussianMixture.example(2)), x)


def check(setting: Setting) -> Worst:
    return largest_z(summary_of(setting.draw()), exact_law(), NUM_DRAWS, BOUND)


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_meet_the_exact_moments(setting):
    z, name = check(setting)
    assert z < ALLOWED_Z, name


def noise_too_small(patch: pytest.MonkeyPatch) -> None:
    weights = multistep.exponential_weights
    quiet = lambda *args: [w._replace(scale=w.scale / 2**0.5) for w in weights(*args)]  # noqa: E731
    patch.setattr("probgen.inference.dpm_solver.exponential_weights", quiet)


@pytest.mark.parametrize("mutate", [noise_too_small, stale_output])
def test_mutants_miss_the_moments(mutate, monkeypatch):
    exact_law()
    mutate(monkeypatch)
    assert check(Setting("VP", SDE)).size > ALLOWED_Z


# --- laws that differ by coordinate -------------------------------------------------------------------------------


class ByCoordinate(Process):
    """Coordinate i is noised by process i."""

    def __init__(self, parts: tuple[Process, ...]) -> None:
        super().__init__(t_min=1e-3)
        object.__setattr__(self, "parts", parts)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.stack([part.alpha(t) for part in self.parts], dim=1)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.stack([part.sigma(t) for part in self.parts], dim=1)


@pytest.mark.parametrize(
    "engine", [DPMSolver(7, grid="uniform"), DPMSolver(7, order=2, grid="quadratic", exponent=0), DDIM(7)]
)
def test_each_coordinate_is_solved_as_if_alone(engine):
    """Independent coordinates x_i ~ N(0, 1/4) with eps-prediction, against one process at a time."""
    parts = (VP(), CosineVP(), SubVP(beta_max=12.0))

    def field(process: Process) -> AffineDenoiser:
        def eps(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = process.alpha(t), process.sigma(t)
            value = sigma / (0.25 * alpha.square() + sigma.square())
            return x * (value if value.ndim > 1 else value[:, None])

        return AffineDenoiser(eps, lambda t: denoiser_coefficients(process, "eps", t), process)

    noise = Noise(0, 1, 5, (3,), torch.float64)
    together = engine.draw(field(ByCoordinate(parts)), noise)
    alone = [engine.draw(field(part), noise)[:, i] for i, part in enumerate(parts)]
    torch.testing.assert_close(together, torch.stack(alone, dim=1))


# --- calls and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "build", [DDIM, DPMSolver, partial(DDIM, eta=1.0), partial(DPMSolver, stochasticity=1.0)]
)
def test_n_steps_cost_n_calls(build, steps):
    posterior = infer(GaussianMixture.example(), build(steps), num_draws=4)
    assert posterior.cost.network_calls == build(steps).num_calls() == steps
    assert bool(torch.isfinite(posterior["x"]).all())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DDIM(0), "steps"),
        (lambda: DDIM(5, eta=1.5), "eta must lie in"),
        (lambda: DDIM(5, eta=math.nan), "eta must lie in"),
        (lambda: DDIM(5, grid="karas"), "karras"),
        (lambda: DPMSolver(0), "steps"),
        (lambda: DPMSolver(5, order=4), "Unknown order .*known: 1, 2, 3"),
        (lambda: DPMSolver(5, stochasticity=-1.0), "stochasticity"),
        (lambda: DPMSolver(5, exponent=math.inf), "exponent"),
        (lambda: DPMSolver(5, grid="logsnrr"), "logsnr"),
        (lambda: DPMSolver(5, batch_size=0), "batch_size"),
    ],
)
def test_bad_input_is_refused(build, words):
    with pytest.raises(InputError, match=words):
        build()


def test_log_snr_of_a_law_by_coordinate_is_refused():
    process = ByCoordinate((VP(), CosineVP()))
    field = AffineDenoiser(lambda x, t: x, lambda t: denoiser_coefficients(process, "x0", t), process)
    with pytest.raises(InputError, match="quadratic"):
        DPMSolver(5).draw(field, Noise(0, 1, 2, (2,)))
