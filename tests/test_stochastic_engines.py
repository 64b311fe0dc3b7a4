"""The stochastic engines draw from the right law: against their papers' loops, and against an exact mixture.

The *coarse* check compares a few steps of an engine with the loop of its paper, written out below on noise of its own:
20,000 draws of each know the difference of two averages to 0.01 standard deviations of their statistic, so that 0.06 is
seen nine times of ten, whatever the discretisation does. The *fine* check compares many steps with the exact means,
covariances and weights of an asymmetric mixture, within 4.5 standard errors and the bias that `MEASURED` grants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probgen import AnnealedLangevin, FlowSDE, InputError, PredictorCorrector, ReverseSDE, infer
from probgen.core import Batch, Engine, NonFiniteWarning, ProbgenError
from probgen.dynamics import chains, fields
from probgen.inference import annealed_langevin, predictor_corrector
from probgen.inference.annealed_langevin import geometric_levels
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import VE, VP, OTPath, Process
from probgen.randomness import forked_rng
from statistics_tools import (
    ALLOWED_Z,
    Summary,
    largest_z,
    mixture_statistics,
    summarise,
    two_sample_z,
)

COARSE_DRAWS = 20_000
BATCH = 5000  # fits the cache
PROCESSES: dict[str, Process] = {"VP": VP(), "VE": VE(sigma_min=0.02, sigma_max=10.0), "OTPath": OTPath()}
Unit = Callable[[], Tensor]


@cache
def mixture(process: str) -> GaussianMixture:
    return GaussianMixture.example(2, PROCESSES[process])


def single(process: str) -> GaussianMixture:
    """In float32."""
    return GaussianMixture.example(2, PROCESSES[process]).float()


def summary_of(x: Tensor) -> Summary:
    return summarise(partial(mixture_statistics, mixture("VP")), x)


@cache
def exact_law() -> Summary:
    with forked_rng(0):
        return summary_of(mixture("VP").model(Batch(num_rows=100_000)))


def drawn(engine: Engine, program: Any, num_draws: int) -> Summary:
    return summary_of(infer(program, engine, num_draws=num_draws).flat("x"))


# --- the papers' loops, as plain as they are printed --------------------------------------------------------------


def grid(process: Process, steps: int, exponent: float = 1.0) -> Tensor:
    ends = [end ** (1 / exponent) for end in (process.t_max, process.t_min)]
    return torch.linspace(*ends, steps + 1, dtype=torch.float64) ** exponent


def song_predictor_corrector(m: GaussianMixture, z: Unit, steps: int, snr: float, ancestral: bool) -> Tensor:
    """Song et al. (2021), algorithms 2 and 3; the corrector's norms at their expected size."""
    p, times = m.process(), grid(m.process(), steps, 2.0)
    x = p.sigma(times[:1]) * z()
    for t, s in zip(times[:-1, None], times[1:, None], strict=True):
        beta = 1 - (p.alpha(t) / p.alpha(s)) ** 2  # 0 for VE
        increase = p.sigma(t) ** 2 - (1 - beta) * p.sigma(s) ** 2
        score = m.score(x, t)
        if ancestral:
            x0hat = (x + p.sigma(t) ** 2 * score) / p.alpha(t)
            mean = ((1 - beta).sqrt() * p.sigma(s) ** 2 * x + p.alpha(s) * increase * x0hat) / p.sigma(t) ** 2
            x = mean + (increase * p.sigma(s) ** 2 / p.sigma(t) ** 2).sqrt() * z()
        else:
            x = (2 - (1 - beta).sqrt()) * x + increase * score + increase.sqrt() * z()
        eps = 2 * (snr * p.sigma(s)) ** 2
        x = x + eps * m.score(x, s) + (2 * eps).sqrt() * z()
    return m.denoise(x, times[-1:])


def annealed_langevin_loop(m: GaussianMixture, z: Unit, levels: int, repeats: int, eps: float) -> Tensor:
    """Song & Ermon (2019), algorithm 1, on y = x/alpha, whose score is alpha times that of x."""
    p = m.process()
    times = geometric_levels(p, levels)
    ratio = p.sigma(times) / p.alpha(times)
    y = ratio[0] * z()
    for t, level in zip(times[:, None], ratio, strict=True):
        step = (eps * ratio[-1] ** 2) * level**2 / ratio[-1] ** 2
        for _ in range(repeats):
            y = y + step / 2 * p.alpha(t) * m.score(p.alpha(t) * y, t) + step.sqrt() * z()
    return m.denoise(p.alpha(times[-1:]) * y, times[-1:])


def euler_maruyama(m: GaussianMixture, z: Unit, steps: int, w2: Callable[[Tensor], Tensor]) -> Tensor:
    """dx = (u - w^2/2 score) dt + w dW with u = alpha' x0hat + sigma' eps, by differences of alpha and sigma."""
    p, times = m.process(), grid(m.process(), steps)
    x = p.sigma(times[:1]) * z()
    for t, dt in zip(times[:-1, None], times.diff(), strict=True):
        score, x0hat, h = m.score(x, t), m.denoise(x, t), 1e-6
        rates = [
            (f(t + h / 2) - f(t - h / 2)) / h if t < 1 else (f(t) - f(t - h)) / h for f in (p.alpha, p.sigma)
        ]
        u = rates[0] * x0hat - rates[1] * p.sigma(t) * score
        x = x + (u - 0.5 * w2(t) * score) * dt + (w2(t) * dt.abs()).sqrt() * z()
    return m.denoise(x, times[-1:])


def unit_noise(process: str) -> Unit:
    generator = torch.Generator().manual_seed(len(process))
    return lambda: torch.randn(COARSE_DRAWS, 2, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Case:
    """An engine at few steps beside the loop of its paper."""

    engine: Any
    loop: Callable[[GaussianMixture, Unit], Tensor]


def some_noise(process: str) -> Callable[[Tensor], Tensor]:
    return lambda t: (0.7 * PROCESSES[process].variance_rate(t)).sqrt()


def cases(process: str) -> dict[str, Case]:
    p = PROCESSES[process]
    return {
        "PredictorCorrector": Case(
            PredictorCorrector(8, 1, 0.3, batch_size=BATCH),
            partial(song_predictor_corrector, steps=8, snr=0.3, ancestral=False),
        ),
        "PredictorCorrector, ancestral": Case(
            PredictorCorrector(8, 1, 0.3, "ancestral", batch_size=BATCH),
            partial(song_predictor_corrector, steps=8, snr=0.3, ancestral=True),
        ),
        "AnnealedLangevin": Case(
            AnnealedLangevin(20, 2, 0.7, batch_size=BATCH),
            partial(annealed_langevin_loop, levels=20, repeats=2, eps=0.7),
        ),
        "FlowSDE": Case(
            FlowSDE(15, some_noise(process), "euler", "uniform", batch_size=BATCH),
            partial(euler_maruyama, steps=15, w2=lambda t: some_noise(process)(t) ** 2),
        ),
        "FlowSDE, default": Case(
            FlowSDE(15, None, "euler", "uniform", batch_size=BATCH),
            partial(euler_maruyama, steps=15, w2=p.variance_rate),
        ),
        "ReverseSDE, a = 1/2": Case(
            ReverseSDE(15, stochasticity=0.5, batch_size=BATCH),
            partial(euler_maruyama, steps=15, w2=lambda t: 0.5 * p.diffusion2(t)),
        ),
    }


NAMES = tuple(cases("VP"))


@cache
def loop_summary(name: str, process: str) -> Summary:
    return summary_of(cases(process)[name].loop(mixture(process), unit_noise(process)))


def coarse_z(name: str, process: str) -> float:
    found = drawn(cases(process)[name].engine, mixture(process), COARSE_DRAWS)
    return two_sample_z(found, loop_summary(name, process), COARSE_DRAWS).size


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_few_steps_follow_the_published_loop(name, process):
    assert coarse_z(name, process) < ALLOWED_Z


# --- mutants ------------------------------------------------------------------------------------------------------

Mutant = Callable[[pytest.MonkeyPatch], None]


def score_sign(patch: pytest.MonkeyPatch) -> None:
    """alpha x0hat - x becomes x - alpha x0hat."""
    denoise = GaussianMixture.denoise

    def flipped(m: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
        return 2 * x / m.process().alpha(t) - denoise(m, x, t)

    patch.setattr(GaussianMixture, "denoise", flipped)


def moves_changed(module: Any, name: str, change: Callable[[chains.Moves], chains.Moves]) -> Mutant:
    def mutant(patch: pytest.MonkeyPatch) -> None:
        made = getattr(module, name)
        patch.setattr(module, name, lambda *args: change(made(*args)))

    return mutant


def quieter(moves: chains.Moves) -> chains.Moves:
    return moves._replace(scale=moves.scale / math.sqrt(2))


def half_the_drift(moves: chains.Moves) -> chains.Moves:
    """Song & Ermon's alpha for Langevin's h: sqrt(alpha) of noise belongs to alpha/2 of drift, not to alpha/4."""
    return moves._replace(on_x=(1 + moves.on_x) / 2, on_x0hat=moves.on_x0hat / 2)


def turned(moves: chains.Moves) -> chains.Moves:
    return moves._replace(on_x=2 - moves.on_x, on_x0hat=-moves.on_x0hat)


def no_noise(patch: pytest.MonkeyPatch) -> None:
    """The diffusion in the drift only."""
    drift = fields.reverse_drift

    def silent(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        on_x, on_output, noise2 = drift(*args)
        return on_x, on_output, 0 * noise2

    patch.setattr(fields, "reverse_drift", silent)


def surplus_noise(patch: pytest.MonkeyPatch) -> None:
    """sqrt 2 too much."""
    drift = fields.reverse_drift

    def loud(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        on_x, on_output, noise2 = drift(*args)
        return on_x, on_output, 2 * noise2

    patch.setattr(fields, "reverse_drift", loud)


def wrong_direction(patch: pytest.MonkeyPatch) -> None:
    """u + w^2/2 score for dt < 0."""
    drift = fields.reverse_drift
    patch.setattr(fields, "reverse_drift", lambda d, t, noise2, direction: drift(d, t, noise2, -direction))


def predictor_quieter(patch: pytest.MonkeyPatch) -> None:
    made = predictor_corrector._MOVES["reverse_diffusion"]
    patch.setitem(predictor_corrector._MOVES, "reverse_diffusion", lambda *args: quieter(made(*args)))


SOLVED = {"no noise": no_noise, "surplus sqrt 2": surplus_noise, "direction": wrong_direction}
MUTANTS: dict[str, dict[str, Mutant]] = {
    "PredictorCorrector": {
        "predictor's noise": predictor_quieter,
        "corrector's noise": moves_changed(predictor_corrector, "langevin_moves", quieter),
        "corrector's sign": moves_changed(predictor_corrector, "langevin_moves", turned),
    },
    "AnnealedLangevin": {
        "alpha for h": moves_changed(annealed_langevin, "langevin_moves", half_the_drift),
        "noise": moves_changed(annealed_langevin, "langevin_moves", quieter),
        "sign": moves_changed(annealed_langevin, "langevin_moves", turned),
    },
    "FlowSDE": SOLVED,
    "ReverseSDE, a = 1/2": SOLVED,
}


@pytest.mark.parametrize("process", ["VP", "OTPath"])
@pytest.mark.parametrize(
    ("name", "mutant"),
    [(name, mutant) for name, found in MUTANTS.items() for mutant in ("score sign", *found)],
)
def test_mutants_fail(name, mutant, process, monkeypatch):
    loop_summary(name, process)  # before anything is broken
    (score_sign if mutant == "score sign" else MUTANTS[name][mutant])(monkeypatch)
    assert coarse_z(name, process) > ALLOWED_Z


# --- the exact mixture --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """An engine, good settings, and the bias it is allowed, in standard deviations of each statistic."""

    engine: Any
    process: str
    bound: float

    def __str__(self) -> str:
        return f"{self.engine}-{self.process}"


MEASURED = [
    *(Setting(FlowSDE(batch_size=BATCH), name, 0.01) for name in PROCESSES),
    *(Setting(ReverseSDE(150, "quadratic", "heun", batch_size=BATCH), name, 0.01) for name in PROCESSES),
    *(
        Setting(ReverseSDE(150, "quadratic", "srk", stochasticity=a, batch_size=BATCH), "VP", 0.01)
        for a in (0.5, 1.0, 2.0)
    ),
    Setting(ReverseSDE(100, "quadratic", "heun", stochasticity=0.0, batch_size=BATCH), "VP", 0.01),
    *(
        Setting(
            PredictorCorrector(300, grid="uniform" if name == "VE" else "quadratic", batch_size=BATCH),
            name,
            0.02,
        )
        for name in PROCESSES
    ),
]


@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_draws_meet_the_exact_moments(setting):
    """5,000 draws know an average to 0.014 sd: 0.08 sd beyond the bound are seen; the slow twin sees 0.026."""
    found = drawn(setting.engine, single(setting.process), 5000)
    z, name = largest_z(found, exact_law(), 5000, setting.bound)
    assert z < ALLOWED_Z, name


@pytest.mark.slow
@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_many_draws_meet_the_exact_moments(setting):
    found = drawn(setting.engine, single(setting.process), 50_000)
    z, name = largest_z(found, exact_law(), 50_000, setting.bound)
    assert z < ALLOWED_Z, name


ANNEALED = AnnealedLangevin(600, 5, 0.5, batch_size=BATCH)


@pytest.mark.slow
def test_annealed_langevin_comes_close_to_the_exact_moments():
    """3,000 calls: the weights of the modes, frozen once the noise no longer bridges them, are what takes so many."""
    found = drawn(ANNEALED, single("VE"), 20_000)
    z, name = largest_z(found, exact_law(), 20_000, 0.03)
    assert z < ALLOWED_Z, name


def test_more_annealed_langevin_comes_closer():
    """500 calls beside 50; the surplus of variance falls from 0.4 to 0.06 standard deviations of its statistic."""
    few, many = (
        drawn(AnnealedLangevin(levels, 5, 0.5, batch_size=BATCH), single("VE"), 5000) for levels in (10, 100)
    )
    assert largest_z(few, exact_law(), 5000, 0.15).size > ALLOWED_Z
    assert largest_z(many, exact_law(), 5000, 0.1).size < ALLOWED_Z


# --- laws that differ by coordinate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoRates(VP):
    """The second coordinate is noised at half the rate of the first."""

    def _beta(self, t: Tensor) -> Tensor:
        return super()._beta(t)[..., None] * torch.tensor([1.0, 0.5], dtype=t.dtype)

    def _integral(self, t: Tensor) -> Tensor:
        return super()._integral(t)[..., None] * torch.tensor([1.0, 0.5], dtype=t.dtype)


LOCS, SCALES = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)


class TwoGaussians(nn.Module):
    """x ~ N(LOCS, SCALES^2) with its exact denoiser; remembers the times it was asked at."""

    event_shape = (2,)

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.asked: list[float] = []
        self._process = process

    def model(self, batch: Any) -> None:
        raise NotImplementedError

    def process(self) -> Process:
        return self._process

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t[0].item())
        p = self._process
        alpha, sigma2 = (v if v.ndim > 1 else v[:, None] for v in (p.alpha(t), p.sigma(t).square()))
        return LOCS + alpha * SCALES**2 / (alpha.square() * SCALES**2 + sigma2) * (x - alpha * LOCS)


EVERY_ENGINE = {
    "ReverseSDE, srk": ReverseSDE(60, "quadratic", "srk"),
    "ReverseSDE, heun": ReverseSDE(60, "quadratic", "heun"),
    "PredictorCorrector": PredictorCorrector(200),
    "PredictorCorrector, ancestral": PredictorCorrector(200, predictor="ancestral"),
    "FlowSDE": FlowSDE(60),
    "FlowSDE, number": FlowSDE(100, 0.3),
    "FlowSDE, function": FlowSDE(100, lambda t: 0.2 + t),
    "AnnealedLangevin": AnnealedLangevin(150, 4, 0.5),
}


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_laws_that_differ_by_coordinate(name):
    """4,000 draws know mean and variance to 0.016 sd: 0.07 beyond a bound of 0.05 is seen; rates exchanged are."""
    assert_moments(TwoGaussians(TwoRates()), EVERY_ENGINE[name])


def test_a_diffusion_that_differs_by_coordinate():
    w = torch.tensor([0.2, 1.0], dtype=torch.float64)
    assert_moments(TwoGaussians(TwoRates()), FlowSDE(100, lambda t: t[:, None] * w))


def assert_moments(program: TwoGaussians, engine: Engine) -> None:
    x = infer(program, engine, num_draws=4000).flat("x")
    white = (x - LOCS) / SCALES
    for value in (*white.T, *((white.square() - 1) / math.sqrt(2)).T):
        assert abs(value.mean().item()) < 0.05 + 4.5 / math.sqrt(4000)


# --- calls, levels, batch mates -----------------------------------------------------------------------------------

CALLS = {
    ReverseSDE(7, method="heun"): 15,
    ReverseSDE(7, method="srk"): 15,
    PredictorCorrector(7): 15,
    PredictorCorrector(7, corrector_steps=0): 8,
    PredictorCorrector(7, corrector_steps=3): 29,
    FlowSDE(7): 15,
    FlowSDE(7, method="euler"): 8,
    FlowSDE(7, method="srk"): 15,
    AnnealedLangevin(7, 3): 22,
    AnnealedLangevin(7, 3, denoise=False): 21,
}


@pytest.mark.parametrize("engine", CALLS, ids=str)
def test_calls_are_those_asked_for(engine):
    program = TwoGaussians(VP())
    assert infer(program, engine, num_draws=2).cost.network_calls == len(program.asked) == CALLS[engine]
    assert engine.num_calls() in (0, CALLS[engine])


class Levelled(TwoGaussians):
    def levels(self) -> Tensor:
        return torch.tensor([1.0, 0.7, 0.3, 0.0])


def test_levels_of_a_program_are_its_own():
    program = Levelled(VE())
    infer(program, AnnealedLangevin(steps_per_level=2), num_draws=2)
    assert program.asked == pytest.approx([1.0, 1.0, 0.7, 0.7, 0.3, 0.3, 0.0, 0.0, 0.0])


def test_levels_are_geometric():
    times = geometric_levels(VP(), 50)
    ratio = (VP().sigma(times) / VP().alpha(times)).log().diff()
    torch.testing.assert_close(ratio, ratio.mean().expand(49), rtol=1e-6, atol=0)
    assert (times[0].item(), times[-1].item()) == pytest.approx((1.0, 1e-3))


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_a_draw_depends_on_neither_batch_nor_mates(name):
    engine = replace(
        EVERY_ENGINE[name], **({"num_levels": 5} if name == "AnnealedLangevin" else {"steps": 5})
    )
    program = TwoGaussians(VP())
    whole = infer(program, engine, num_draws=7, num_chains=2)["x"]
    parts = infer(program, replace(engine, batch_size=3), num_draws=7, num_chains=2)["x"]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(infer(program, engine, num_draws=2)["x"], whole[:1, :2], rtol=0, atol=1e-10)
    assert whole.flatten(0, 1).unique(dim=0).shape[0] == 14


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReverseSDE(steps=0), "steps"),
        (lambda: ReverseSDE(steps=1_000_001), "1,000,000"),
        (lambda: ReverseSDE(stochasticity=-0.1), "stochasticity"),
        (lambda: ReverseSDE(stochasticity=math.nan), "stochasticity"),
        (lambda: PredictorCorrector(steps=0), "steps"),
        (lambda: PredictorCorrector(steps=2_000_000), "1,000,000"),
        (lambda: PredictorCorrector(corrector_steps=-1), "corrector_steps"),
        (lambda: PredictorCorrector(snr=0.0), "snr"),
        (lambda: PredictorCorrector(snr=1.0), "diverge"),
        (lambda: PredictorCorrector(snr=math.nan), "snr"),
        (lambda: PredictorCorrector(predictor="ancestrall"), "did you mean 'ancestral'"),
        (lambda: PredictorCorrector(grid="quadratik"), "did you mean 'quadratic'"),
        (lambda: AnnealedLangevin(num_levels=1), "num_levels"),
        (lambda: AnnealedLangevin(steps_per_level=0), "steps_per_level"),
        (lambda: AnnealedLangevin(1001, 1000), "1,000,000"),
        (lambda: AnnealedLangevin(eps=0.0), "eps"),
        (lambda: AnnealedLangevin(eps=-1.0), "eps"),
        (lambda: AnnealedLangevin(eps=4.0), "diverge"),
        (lambda: FlowSDE(steps=0), "steps"),
        (lambda: FlowSDE(steps=1_000_001), "1,000,000"),
        (lambda: FlowSDE(diffusion=-1.0), "diffusion"),
        (lambda: FlowSDE(diffusion=math.nan), "diffusion"),
        (lambda: FlowSDE(diffusion=1e30), "its square must fit float32"),
        (lambda: FlowSDE(batch_size=0), "batch_size"),
        (lambda: FlowSDE(method="huen"), "did you mean 'heun'"),
        (lambda: ReverseSDE(method="milstein"), "Unknown method .milstein."),
    ],
)
def test_bad_settings_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (FlowSDE(5, lambda t: t - 0.5), "at t = .* it is"),
        (FlowSDE(5, lambda t: t / 0), "finite"),
        (FlowSDE(5, lambda t: t[:1]), "shape"),
        (FlowSDE(5, lambda t: t + math.inf), "finite"),
    ],
)
def test_bad_functions_are_refused_when_used(engine, message):
    with pytest.raises(InputError, match=message):
        infer(TwoGaussians(VP()), engine, num_draws=2)


class Breaking(TwoGaussians):
    """NaN below t = 0.05 where the first coordinate is above its `limit`."""

    limit = 1.3

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        broken = (x[:, :1] > self.limit) & (t[0] < 0.05)
        return torch.where(broken, math.nan, super().denoise(x, t))


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_draws_that_turn_nan_are_named_and_the_others_stand(name):
    program = Breaking(VP())
    with pytest.warns(NonFiniteWarning, match="at t = 0[.]0.* in draws"):
        x = infer(program, EVERY_ENGINE[name], num_draws=30).flat("x")
    assert 0 < int(x.isnan().any(1).sum()) < 30


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_a_network_that_is_nan_everywhere_is_an_error(name):
    program = Breaking(VP())
    program.limit = -math.inf
    with pytest.raises(ProbgenError, match="all of them"):
        infer(program, EVERY_ENGINE[name], num_draws=3)
