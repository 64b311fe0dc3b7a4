"""Score programs: one network read in every way at every noise; conditions; the law of the ODE as a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from probgen import (
    NCSN,
    VP,
    Ancestral,
    Batch,
    CosineVP,
    FlowLaw,
    GaussianMixture,
    InputError,
    Labels,
    ReverseSDE,
    ScoreSDE,
    TimeMLP,
    Vector,
    infer,
)
from probgen.core import given
from probgen.distributions import apart
from probgen.dynamics import GaussianInitial
from probgen.processes import (
    EDM,
    OU,
    PREDICTIONS,
    VE,
    OTPath,
    Process,
    SubVP,
    output_from_denoised,
    over_event,
)
from probgen.randomness import forked_rng
from statistics_tools import ALLOWED_Z, z_of_mean

DIM = 2


@dataclass(frozen=True)
class TwoSpeeds(Process):
    """A process of others: coordinates lose their data at different speeds."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-t[:, None] * torch.tensor([1.0, 3.0], dtype=t.dtype))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.tensor([2.0, 0.5], dtype=t.dtype) * t[:, None]


PROCESSES = (VP(), SubVP(), CosineVP(), VE(), EDM(), OU(), OTPath(), TwoSpeeds())


class PerfectNetwork(nn.Module):
    """The oracle's denoiser said in any of six ways, for inputs that were scaled to unit size."""

    event_shape = (DIM,)

    def __init__(self, process: Process, prediction: Any) -> None:
        super().__init__()
        self.process, self.prediction = process, prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        size = (self.process.alpha(t).square() + self.process.sigma(t).square()).sqrt()
        x_t = x * over_event(size, x)
        return output_from_denoised(self.process, self.prediction, x_t, denoised(self.process, x_t, t), t)


def denoised(process: Process, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] for independent x_0 ~ N(0.5, 0.3^2)."""
    alpha, sigma = (over_event(value, x_t) for value in (process.alpha(t), process.sigma(t)))
    gain = alpha * 0.09 / (alpha.square() * 0.09 + sigma.square())
    return 0.5 + gain * (x_t - alpha * 0.5)


# --- one network, many readings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_every_prediction_reads_the_same_denoiser(process: Process) -> None:
    """A scale of the input or a coefficient wrong by 1e-6 fails."""
    t = torch.tensor([process.t_min, 0.1, 0.5, process.t_max], dtype=torch.float64)
    x_t = torch.randn(4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for prediction in PREDICTIONS:
        sde = ScoreSDE(PerfectNetwork(process, prediction), process, prediction=prediction)
        expected = denoised(process, x_t, t)
        torch.testing.assert_close(sde.denoise(x_t, t), expected, rtol=1e-6, atol=1e-6, msg=prediction)


class Spy(nn.Module):
    event_shape = (DIM,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return x


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_the_network_sees_inputs_of_unit_size(process: Process) -> None:
    """Data of unit size, noised; where alpha^2 + sigma^2 = 1 the network is given x itself, at no cost."""
    generator = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(4000, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    spy = Spy()
    sde = ScoreSDE(spy, process)
    for time in (process.t_min, 0.4, process.t_max):
        t = torch.full((1,), time, dtype=torch.float64)
        x_t = over_event(process.alpha(t), x_0) * x_0 + over_event(process.sigma(t), x_0) * eps
        sde.predict(x_t, t)
        sizes = spy.x.square()
        assert abs(z_of_mean(sizes, 1.0)) < ALLOWED_Z
        assert (spy.x is x_t) == (type(process) in (VP, CosineVP, OU))
        assert spy.t.shape == (4000,)


def test_a_network_that_takes_one_time_is_given_one() -> None:
    sde = ScoreSDE(Spy())
    for takes, shape in ((False, (5,)), (True, (1,))):
        sde.network.takes_one_time = takes
        again = ScoreSDE(sde.network)
        again.predict(torch.zeros(5, DIM), torch.ones(1))
        assert again.network.t.shape == shape


def test_what_the_network_predicts_by_default() -> None:
    assert ScoreSDE(Spy(), VP()).prediction == ScoreSDE(Spy(), CosineVP()).prediction == "eps"
    assert ScoreSDE(Spy(), OU()).prediction == "eps"  # theta = 1, s = sqrt 2 keeps the variance
    assert ScoreSDE(Spy(), OU(s=1.0)).prediction == ScoreSDE(Spy(), VE()).prediction == "edm"


def test_levels_run_from_the_noisiest_to_the_least_noisy() -> None:
    ncsn = NCSN(TimeMLP((DIM,), width=8), num_levels=4, sigma_max=8.0, sigma_min=1.0)
    torch.testing.assert_close(ncsn.process().sigma(ncsn.levels()), torch.tensor([8.0, 4.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ScoreSDE(nn.Linear(2, 2)), "event_shape"),
        (lambda: ScoreSDE(Spy(), prediction="noise"), "Unknown prediction 'noise'"),
        (lambda: ScoreSDE(Spy(), condition_dropout=1.5), "condition_dropout"),
        (lambda: NCSN(Spy(), num_levels=1), "num_levels"),
        (lambda: NCSN(Spy(), sigma_max=0.1, sigma_min=1.0), "sigma_min < sigma_max"),
        (lambda: Labels(0), "num_classes"),
        (lambda: Vector((3, 0)), r"shape\[1\] must be an integer >= 1, got 0"),
        (lambda: FlowLaw(ScoreSDE(Spy()), num_steps=0), "num_steps"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


# --- conditions ---------------------------------------------------------------------------------------------------


class ShiftedByLabel(nn.Module):
    """A network of others, net(x, t, c), that says c back."""

    event_shape = (DIM,)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * 0 + c.to(x)[:, None]


def conditional(**options: Any) -> ScoreSDE:
    return ScoreSDE(ShiftedByLabel(), prediction="x0", condition=Labels(5), **options)


def test_each_row_is_asked_at_its_own_condition() -> None:
    sde, x, t = conditional().eval(), torch.zeros(3, DIM), torch.ones(1)
    at = given(sde, torch.tensor([4, -1, 2]))
    torch.testing.assert_close(at.predict(x, t)[:, 0], torch.tensor([4.0, -1.0, 2.0]))
    torch.testing.assert_close(at.denoise(x, t)[:, 0], torch.tensor([4.0, -1.0, 2.0]))
    copies = at.predict(torch.zeros(6, DIM), t)[:, 0]
    torch.testing.assert_close(copies, torch.tensor([4.0, -1.0, 2.0] * 2))
    assert bool((sde.predict(x, t) == -1).all()), "the program itself is as it was: nothing is given"
    assert bool((at.given(None).predict(x, t) == -1).all())


def test_conditions_are_dropped_at_random_in_training_alone() -> None:
    """4000 rows: a rate off by 0.03 fails."""
    c, (x, t) = torch.full((4000,), 3), (torch.zeros(4000, DIM), torch.ones(1))
    sde = conditional(condition_dropout=0.25)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = (sde.train().given(c).predict(x, t)[:, 0] == -1).double()
        assert abs(z_of_mean(dropped, 0.25)) < ALLOWED_Z
        assert abs(z_of_mean(dropped, 0.22)) > ALLOWED_Z / 1.5
        assert not bool((sde.eval().given(c).predict(x, t) == -1).any())


@pytest.mark.parametrize(
    ("kind", "c", "message"),
    [
        (Labels(3), torch.tensor([0.0, 1.0]), "int64 labels"),
        (Labels(3), torch.tensor([0, 3]), "got 3 among 1 wrong"),
        (Vector(2), torch.zeros(2, 3), r"floats `\(rows, 2\)`"),
        (Vector(2), torch.tensor([[math.nan, 1.0]]), "NaN throughout"),
    ],
)
def test_bad_conditions_are_refused(kind: Any, c: Tensor, message: str) -> None:
    sde = ScoreSDE(TimeMLP((DIM,), width=8, condition=kind))
    with pytest.raises(InputError, match=message):
        sde.given(c)


def test_conditions_that_fit_no_rows_or_no_network_are_refused() -> None:
    with pytest.raises(InputError, match="takes no condition"):
        ScoreSDE(Spy()).given(torch.tensor([1]))
    with pytest.raises(InputError, match="3 rows of a condition for 4 rows of x"):
        conditional().given(torch.tensor([0, 1, 2])).predict(torch.zeros(4, DIM), torch.ones(1))


@pytest.mark.parametrize("kind", [Labels(3), Vector(4), Vector((2, 3))], ids=str)
def test_conditional_programs_are_drawn_row_by_row(kind: Any) -> None:
    sde = ScoreSDE(TimeMLP((DIM,), width=8, num_blocks=1, condition=kind)).eval()
    for parameter in sde.parameters():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    c = torch.cat((kind.draw(2), kind.missing(1, torch.zeros(()))))
    draws = infer(sde, ReverseSDE(steps=5), args=(c,), num_draws=2)["x"]
    assert draws.shape == (1, 2, 3, DIM)
    assert infer(sde, Ancestral(), args=(c,), num_draws=2)["x"].shape == (1, 2, 3, DIM)
    x, t = torch.zeros(3, DIM), torch.full((1,), 0.5)
    torch.testing.assert_close(sde.given(c).predict(x, t)[2], sde.predict(x, t)[2])


# --- the law of the ODE -------------------------------------------------------------------------------------------


class Line(nn.Module):
    """A flow whose law is known: velocity A x for t in (0, 1) carries N(0, I) to N(0, e^-A (e^-A)')."""

    event_shape = (DIM,)

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.7, -0.4], [0.2, -0.3]], dtype=torch.float64))

    def model(self, batch: Batch) -> Tensor:
        with batch.plate():
            return pyro.sample("x", FlowLaw(self))

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t @ self.matrix.mT

    def span(self) -> tuple[float, float]:
        return 0.0, 1.0

    def initial(self) -> GaussianInitial:
        return GaussianInitial(torch.ones((), dtype=torch.float64))


def exact(line: Line) -> dist.MultivariateNormal:
    root = torch.linalg.matrix_exp(-line.matrix)
    return dist.MultivariateNormal(torch.zeros(DIM, dtype=torch.float64), root @ root.mT)


def points(rows: int = 20) -> Tensor:
    return torch.randn(rows, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_density_is_that_of_the_flow_and_differentiable() -> None:
    """Exact to the solver's 1e-6, in value, in x and in the weights; without the trace it is off by 0.4."""
    line, x = Line(), points().requires_grad_()
    found, expected = FlowLaw(line).log_prob(x), exact(line).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wanted = (x, line.matrix)
    for one, other in zip(
        torch.autograd.grad(found.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    without_trace = line.initial().log_prob(x @ torch.linalg.matrix_exp(line.matrix).mT)
    assert bool(((without_trace - expected).abs() > 0.39).all())


def test_draws_follow_the_law() -> None:
    """Means and covariances of 20,000 draws within 4.5 errors: 5 % in a standard deviation fails."""
    line = Line()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        x = FlowLaw(line).rsample((20_000,))
    white = x @ torch.linalg.inv(torch.linalg.cholesky(exact(line).covariance_matrix)).mT.detach()
    moments = torch.stack((white[:, 0], white[:, 1], white[:, 0] * white[:, 1], *(white**2 - 1).T))
    assert max(abs(z_of_mean(values)) for values in moments) < ALLOWED_Z
    assert abs(z_of_mean((1.05 * white) ** 2, 1.0)) > ALLOWED_Z


def test_the_density_of_a_mixture_under_a_process() -> None:
    """Against the exact p_{t_min}; what is left is KL between the terminal laws, 4e-4 a coordinate for this path."""
    mixture = GaussianMixture.example(DIM, OTPath())
    t = torch.full((1,), OTPath().t_min, dtype=torch.float64)
    with forked_rng(5):
        x = mixture.model(Batch(num_rows=30))
    found = FlowLaw(mixture).log_prob(x)
    torch.testing.assert_close(found, mixture.log_prob(x, t), rtol=0, atol=5e-3)


def test_a_law_has_rows_for_conditions_and_more_on_the_left() -> None:
    sde = conditional().eval()
    law = FlowLaw(sde, torch.tensor([0, 1, 2]), num_steps=2)
    assert (law.batch_shape, law.event_shape) == ((3,), (DIM,))
    wide = law.expand([4, 3])
    x = wide.rsample((5,))
    assert x.shape == (5, 4, 3, DIM)
    assert wide.log_prob(x).shape == (5, 4, 3)
    torch.testing.assert_close(wide.log_prob(x)[1, 2], law.log_prob(x[1, 2]))
    x = torch.ones(3, DIM)
    assert law.log_prob(x)[0] != law.log_prob(x)[1], "each row has its own condition"
    torch.testing.assert_close(law.log_prob(torch.ones(DIM)), law.log_prob(x))


def test_a_program_is_conditioned_and_is_a_site_of_a_larger_one() -> None:
    line, y = Line(), torch.tensor(0.3, dtype=torch.float64)

    def seen() -> Tensor:
        x = pyro.sample("x", FlowLaw(line, num_steps=5))
        return pyro.sample("y", dist.Normal(x[..., 0], 0.5))

    x = points(3)
    trace = poutine.trace(pyro.condition(line.model, data={"x": x})).get_trace(Batch({"x": x}))
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], exact(line).log_prob(x), rtol=0, atol=1e-6)

    def log_joint(at: Tensor) -> Tensor:
        model = pyro.condition(seen, data={"x": at, "y": y})
        return poutine.trace(model).get_trace().log_prob_sum()

    expected = [exact(line).log_prob(at) + dist.Normal(at[0], 0.5).log_prob(y) for at in x]
    torch.testing.assert_close(
        torch.stack([log_joint(at) for at in x]), torch.stack(expected), rtol=0, atol=1e-4
    )
    assert infer(seen, Ancestral(), num_draws=3)["x"].shape == (1, 3, DIM)


def test_the_density_maps_over_chains() -> None:
    """Gradients of many chains at once, as Markov chains take them."""
    line, x = Line(), points(4)
    law = FlowLaw(line, num_steps=5, validate_args=False)
    together = torch.func.vmap(torch.func.grad(law.log_prob))(x)
    torch.testing.assert_close(together, -x @ exact(line).precision_matrix, rtol=0, atol=1e-3)


def test_a_program_drawn_inside_a_site_is_alone() -> None:
    def inner() -> Tensor:
        with pyro.plate("data", 5):
            return pyro.sample("x", dist.Normal(0.0, 1.0))

    def outer() -> None:
        with pyro.plate("data", 3):
            with apart():
                assert inner().shape == (5,)
            pyro.sample("y", dist.Normal(0.0, 1.0))

    trace = poutine.trace(outer).get_trace()
    assert trace.nodes["y"]["value"].shape == (3,)
    assert "x" not in trace.nodes
