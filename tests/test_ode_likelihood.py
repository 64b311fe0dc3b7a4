"""log p by the instantaneous change of variables: right to its own error bar, and wrong where a mutant makes it so.

The oracle is the asymmetric mixture: with the exact law of x_1 as terminal law, nothing but the solver's error stands
between the estimate and the mixture's own log density, and in float64 at a tolerance of 1e-10 that is below 1e-6 nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from global_state import SETTINGS, STREAMS, unchanged
from probgen import (
    DDPM,
    VAE,
    Batch,
    GaussianMixture,
    InputError,
    ODELikelihood,
    ProbgenError,
    Quantised,
    TimeMLP,
    UNet,
    UnsupportedError,
    evidence,
)
from probgen.core import Estimate, NonFiniteWarning
from probgen.dynamics import GaussianInitial, Likelihood, likelihood
from probgen.processes import EDM, OU, VE, VP, CosineVP, OTPath, Process, SubVP
from probgen.randomness import forked_rng
from statistics_tools import ALLOWED_Z

PROCESSES: tuple[Process, ...] = (VP(), VE(), OTPath(), SubVP(), EDM(), OU(), CosineVP())


def name_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, Process) else f"{value:g}"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def at(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def draws(mixture: GaussianMixture, rows: int, t: float = 0.0) -> Tensor:
    """x_t of the mixture."""
    process = mixture.process()
    with forked_rng(rows):
        x = mixture.model(Batch(num_rows=rows))
        return process.alpha(at(t)) * x + process.sigma(at(t)) * torch.randn_like(x)


def exact_end(mixture: GaussianMixture) -> Callable[[Tensor], Tensor]:
    return lambda x_1: mixture.log_prob(x_1, at(mixture.process().t_max))


def estimate_of(mixture: GaussianMixture, x: Tensor, **settings: object) -> Estimate:
    return evidence(mixture, ODELikelihood(terminal=exact_end(mixture), **settings), x)


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process", [VP(), OTPath(), *map(slow, (VE(), SubVP(), EDM(), OU(), CosineVP()))], ids=name_of
)
def test_it_meets_the_exact_density(process: Process) -> None:
    """Down to t = 0, where the oracle knows its score; VE and EDM leave sigma_min of noise there."""
    mixture = GaussianMixture.example(2, process)
    x = draws(mixture, 5)
    estimate = estimate_of(mixture, x, **TIGHT)
    assert float((estimate.value - mixture.log_prob(x, at(0.0))).abs().max()) < 1e-9
    assert estimate.kind == "exact"
    assert float(estimate.standard_error.max()) == 0.0
    assert estimate.trusted


@pytest.mark.parametrize(
    ("process", "tolerance"),
    [
        *((process, 1e-5) for process in PROCESSES),
        (VP(), 1e-9),
        *(slow(process, 1e-9) for process in PROCESSES[1:]),
    ],
    ids=name_of,
)
def test_the_solvers_error_is_honest(process: Process, tolerance: float) -> None:
    """Over 200 points it covers the actual error in 95 %, and its median is at most 10 times the actual one."""
    mixture = GaussianMixture.example(2, process)
    x = draws(mixture, 200)
    estimate = estimate_of(mixture, x, rtol=tolerance, atol=tolerance)
    actual = (estimate.value - mixture.log_prob(x, at(0.0))).abs()
    assert float((estimate.solver_error >= actual).double().mean()) >= 0.95
    assert float(estimate.solver_error.median()) <= 10.5 * float(actual.median())


@pytest.mark.parametrize("dim", [1, 8])
def test_the_solvers_error_in_other_dimensions(dim: int) -> None:
    mixture = GaussianMixture.example(dim)
    x = draws(mixture, 200)
    estimate = estimate_of(mixture, x)
    actual = (estimate.value - mixture.log_prob(x)).abs()
    assert float((estimate.solver_error >= actual).double().mean()) >= 0.95
    assert float(estimate.solver_error.median()) <= 10 * float(actual.median())


def test_in_float32_the_error_holds_rounding_too() -> None:
    mixture = GaussianMixture.example(2).float()
    x = draws(mixture, 200).float()
    estimate = evidence(mixture, ODELikelihood(terminal=lambda x: mixture.log_prob(x, torch.ones(1))), x)
    actual = (estimate.value - GaussianMixture.example(2).log_prob(x.double())).abs()
    assert estimate.value.dtype == torch.float32
    assert float((estimate.solver_error >= actual).double().mean()) >= 0.95


class Shaped(nn.Module):
    """The mixture over 1 x 2 x 2 images, seen through its denoiser alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = GaussianMixture.example(4)
        self.event_shape = (1, 2, 2)

    def model(self, batch: Batch) -> Tensor:
        import pyro
        import pyro.distributions as dist

        with batch.plate():
            return pyro.sample("x", dist.Normal(0.0, 1.0).expand([batch.size, 1, 2, 2]).to_event(3))

    def process(self) -> Process:
        return self.mixture.process()

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mixture.denoise(x_t.flatten(1), t).reshape(x_t.shape)


def test_event_shapes_and_the_start_at_t_min() -> None:
    """Without a score the path starts at the process's t_min, in any event shape."""
    program = Shaped()
    x = draws(program.mixture, 10, 1e-3)
    end = exact_end(program.mixture)
    estimator = ODELikelihood(terminal=lambda x_1: end(x_1.flatten(1)), rtol=1e-7, atol=1e-7)
    estimate = evidence(program, estimator, x.reshape(-1, 1, 2, 2))
    torch.testing.assert_close(estimate.value, program.mixture.log_prob(x, at(1e-3)), rtol=0, atol=1e-6)
    assert "data noised to 0.99995 x_0 + 0.01" in estimate.convention


def test_batch_mates_change_nothing() -> None:
    """Neither values nor error bars beyond 1e-10; nor does the memory, which says how many are solved for together."""
    mixture = GaussianMixture.example(2)
    x = draws(mixture, 8)
    x[0] *= 4  # a hard one
    together = estimate_of(mixture, x)
    for rows in ([0], [7, 3, 0]):
        alone = estimate_of(mixture, x[rows])
        torch.testing.assert_close(alone.value, together.value[rows], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.solver_error, together.solver_error[rows], rtol=0, atol=1e-10)
    small = estimate_of(mixture, x, memory=10_000)
    assert small.cost.network_calls > together.cost.network_calls
    torch.testing.assert_close(small.value, together.value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t_min", [0.0, 1e-3])
def test_its_gradient_is_the_score(t_min: float) -> None:
    mixture = GaussianMixture.example(2)
    x = draws(mixture, 6, t_min).requires_grad_()
    solver = Likelihood(mixture, t_min=t_min, terminal=exact_end(mixture), rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(solver.log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, mixture.score(x.detach(), at(t_min)), rtol=1e-5, atol=1e-5)


# --- mutants --------------------------------------------------------------------------------------------------------


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is wrong by far more than the error that is reported."""
    mixture = GaussianMixture.example(2)
    x = draws(mixture, 20)
    exact = mixture.log_prob(x)

    def off(estimate: Estimate) -> float:
        return float(((estimate.value - exact).abs() / estimate.solver_error).median())

    def wrong_trace(factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
        def mutant(*args: object) -> tuple[Tensor, Tensor]:
            v, trace = true_trace(*args)
            return v, factor * trace

        return mutant

    def wrong_velocity(self: Likelihood, rows: Tensor | None = None) -> object:
        process = mixture.process()
        return replace(
            true_velocity(self, rows), coefficients=lambda t: (process.drift(t), -process.diffusion2(t))
        )

    true_trace, true_velocity = likelihood.exact_divergence, Likelihood.velocity
    assert off(estimate_of(mixture, x)) < 1
    for factor in (-1.0, 0.5, 0.999):  # the sign of the integral, one coordinate of two, a slip
        monkeypatch.setattr(likelihood, "exact_divergence", wrong_trace(factor))
        assert off(estimate_of(mixture, x)) > 10
    monkeypatch.setattr(likelihood, "exact_divergence", true_trace)
    monkeypatch.setattr(Likelihood, "velocity", wrong_velocity)  # without the 1/2 of the ODE
    assert off(estimate_of(mixture, x)) > 10
    monkeypatch.setattr(Likelihood, "velocity", true_velocity)
    forgotten = ODELikelihood(terminal=lambda x_1: torch.zeros_like(x_1[:, 0]))
    assert off(evidence(mixture, forgotten, x)) > 10


# --- Hutchinson -----------------------------------------------------------------------------------------------------


def test_probes_are_unbiased_with_an_honest_error() -> None:
    """z over 300 data has mean 0 and the spread of a t law: a bias of 0.3 standard errors is seen nine times of ten."""
    mixture = GaussianMixture.example(4)
    x = draws(mixture, 300)
    estimate = estimate_of(mixture, x, trace="hutchinson", num_probes=16)
    exact = mixture.log_prob(x)
    z = (estimate.value - exact) / estimate.standard_error
    assert estimate.kind == "unbiased"
    assert abs(float(z.mean())) * math.sqrt(len(z)) < ALLOWED_Z * float(z.std())
    assert 0.9 < float(z.std()) < 1.3  # a t law of 15 degrees of freedom: 1.07
    biased = (estimate.value + 0.3 * estimate.standard_error - exact) / estimate.standard_error
    assert abs(float(biased.mean())) * math.sqrt(len(z)) > ALLOWED_Z * float(biased.std())
    assert estimate.monte_carlo_error > 100 * float(estimate.solver_error.max())


def test_probes_belong_to_their_row() -> None:
    mixture = GaussianMixture.example(4)
    x = draws(mixture, 5)
    settings = {"trace": "hutchinson", "num_probes": 3}
    whole, chunks = (estimate_of(mixture, x, memory=memory, **settings) for memory in (2**30, 20_000))
    assert chunks.cost.network_calls > whole.cost.network_calls
    torch.testing.assert_close(chunks.value, whole.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        estimate_of(mixture, x[:2], **settings).value, whole.value[:2], rtol=0, atol=1e-10
    )
    more = evidence(mixture, ODELikelihood("hutchinson", num_probes=3), x, seed=1)
    assert not torch.allclose(more.value, whole.value)


# --- one verb, networks, units ----------------------------------------------------------------------------------------


def network_program() -> DDPM:
    torch.manual_seed(0)
    program = DDPM(TimeMLP((1, 4, 4), width=16, num_blocks=1), VP(), num_steps=20)
    for weight in program.network.parameters():
        nn.init.normal_(weight, std=0.1)
    return program


def test_units_and_words() -> None:
    """bits/dim by hand: -(log p + d log(2/K)) / (d log 2)."""
    program = network_program()
    levels = torch.randint(0, 17, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    estimate = evidence(program, ODELikelihood(), Quantised(levels, 17))
    by_hand = -(float(estimate.value.double().mean()) + 16 * math.log(2 / 17)) / (16 * math.log(2))
    bits, error = estimate.bits_per_dim()
    assert bits == pytest.approx(by_hand, rel=1e-6)
    assert bits != pytest.approx(
        -float(estimate.value.double().mean()) / (16 * math.log(2)), rel=0.01
    )  # forgotten
    assert error > 0
    text = str(estimate)
    for words in (
        "exact; Monte Carlo error 0; solver error",
        "17 levels",
        "at t = 0.05",
        "N(0, 1^2 I) at t = 1",
    ):
        assert words in text


def test_what_is_compiled_is_the_same_in_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a solve for velocity and divergence; the compiler itself, which takes long, is left out."""
    graphs: list[object] = []

    def compile_(graph: Callable[..., object], *, dynamic: bool) -> Callable[..., object]:
        graphs.append(graph)
        shapes = set()

        def compiled(x: Tensor, t: Tensor) -> object:
            shapes.add((x.shape, t.shape))
            assert len(shapes) == 1
            return graph(x, t)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    program, x = (
        network_program(),
        torch.randn(3, 1, 4, 4) * torch.tensor([0.1, 1.0, 9.0]).reshape(3, 1, 1, 1),
    )
    for trace in ("exact", "hutchinson"):
        plain, compiled = (
            evidence(program, ODELikelihood(trace, rtol=1e-4, atol=1e-4, compile=on), x)
            for on in (False, True)
        )
        torch.testing.assert_close(compiled.value, plain.value, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2


class Straight(nn.Module):
    """A flow that shrinks N(0, 4 I) at t = 1 to N(0, 1) at t = 0, wherever the condition shifts it."""

    def __init__(self, shift: Tensor | None = None) -> None:
        super().__init__()
        self.event_shape = (3,)
        self.shift = shift

    def model(self, batch: Batch) -> Tensor:
        import pyro
        import pyro.distributions as dist

        with batch.plate():
            return pyro.sample("x", dist.Normal(0.0, 1.0).expand([batch.size, 3]).to_event(1))

    def given(self, condition: Tensor | None) -> Straight:
        return Straight(condition)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:  # x_t = (1 + t) z + (1 - t) shift
        shift = torch.zeros_like(x_t) if self.shift is None else self.shift
        z = (x_t - (1 - t)[:, None] * shift) / (1 + t)[:, None]
        return z - shift

    def span(self) -> tuple[float, float]:
        return 0.0, 1.0

    def initial(self) -> GaussianInitial:
        return GaussianInitial(torch.tensor(2.0))


def test_flows_and_conditions() -> None:
    """Rows keep their own condition, also when others have arrived or are solved for apart."""
    generator = torch.Generator().manual_seed(0)
    x, shift = (torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    shift[0] *= 100
    estimator = ODELikelihood(rtol=1e-9, atol=1e-9)
    for memory in (2**30, 1):
        estimate = evidence(Straight(), replace(estimator, memory=memory), x, args=(shift,))
        exact = torch.distributions.Normal(shift, 1.0).log_prob(x).sum(1)
        torch.testing.assert_close(estimate.value, exact, rtol=1e-9, atol=1e-6)
    assert estimate.convention.startswith("density of x itself, at t = 0; terminal law N(0, 2^2 I) at t = 1")


def test_images_through_a_convolutional_network() -> None:
    torch.manual_seed(0)
    network = UNet((1, 3, 3), widths=(4,))
    nn.init.normal_(network.out[-1].weight, std=0.1)
    program, x = DDPM(network, VP(), num_steps=10), torch.randn(2, 1, 3, 3)
    exact = evidence(program, ODELikelihood(rtol=1e-2, atol=1e-2), x)
    guessed = evidence(program, ODELikelihood("hutchinson", num_probes=12, rtol=1e-2, atol=1e-2), x)
    z = (guessed.value - exact.value) / guessed.standard_error
    assert float(z.abs().max()) < 6  # p = 9e-5 of a t law of 11 degrees of freedom


def test_estimating_leaves_the_world_as_it_was() -> None:
    program, x = network_program(), torch.randn(2, 1, 4, 4)
    with unchanged(SETTINGS), unchanged(STREAMS):
        first, again = (evidence(program, ODELikelihood("hutchinson", 2, 1e-3, 1e-3), x) for _ in range(2))
        assert torch.equal(first.value, again.value)
    assert program.training


# --- bad input ------------------------------------------------------------------------------------------------------


def test_data_whose_velocity_turns_nan_are_named_and_the_others_kept() -> None:
    class Broken(Straight):
        def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
            lost = (x_t[:, :1] > 50) & (t[:, None] > 0.25)
            return torch.where(lost, torch.nan, super().velocity(x_t, t))

    x = torch.zeros(4, 3, dtype=torch.float64)
    x[2] = 100
    with pytest.warns(NonFiniteWarning, match=r"NaN or infinite at t = 0\.25.* for data 2 \(1 of 4\)"):
        estimate = evidence(Broken(), ODELikelihood(), x)
    assert not estimate.trusted
    assert estimate.value.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(estimate.value[:2], evidence(Straight(), ODELikelihood(), x[:2]).value)
    with pytest.raises(ProbgenError, match="Check the weights"):
        evidence(Broken(), ODELikelihood(), x[2:3])


def test_bad_input_is_refused() -> None:
    mixture = GaussianMixture.example(2)
    x = draws(mixture, 3)
    with pytest.raises(
        UnsupportedError, match="ODELikelihood cannot serve VAE.*What can: AIS, ELBOEstimate, Importance"
    ):
        evidence(VAE.mlp((6,), 2, widths=(16,)), ODELikelihood(), torch.randn(2, 6))
    with pytest.raises(InputError, match="rtol must be > 0"):
        ODELikelihood(rtol=0.0)
    with pytest.raises(InputError, match="num_probes must be an integer >= 2"):
        ODELikelihood("hutchinson", num_probes=1)
    with pytest.raises(InputError, match="did you mean 'hutchinson'"):
        ODELikelihood("hutchison")
    with pytest.raises(InputError, match=r"t_min must lie in \[0, 1\)"):
        evidence(mixture, ODELikelihood(t_min=1.0), x)
    with pytest.raises(InputError, match="computes in torch.float64 and the data are torch.float32"):
        evidence(mixture, ODELikelihood(), x.float())
    with pytest.raises(InputError, match="below the precision of torch.float32"):
        evidence(network_program(), ODELikelihood(**TIGHT), torch.randn(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"one log density a row: expected shape \(1,\)"):
        evidence(mixture, ODELikelihood(terminal=lambda x_1: x_1), x)
