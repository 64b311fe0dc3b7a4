"""The training loop: what it minimises, what it leaves behind, and how it refuses."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from global_state import SETTINGS, STREAMS, unchanged
from probgen import (
    ELBO,
    NUTS,
    VAE,
    Batch,
    InputError,
    Optim,
    Pair,
    ProbgenError,
    Quantised,
    SemiSupervisedVAE,
    fit,
    infer,
)

QUIET = {"progress": False}


def regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 2, generator=generator)
    noise = 0.5 * torch.randn(400, generator=generator)
    return inputs, inputs @ torch.tensor([1.5, -0.7]) + noise


def regression(batch: Batch) -> None:
    """Global weights, local observations."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with batch.plate():
        pyro.sample("y", dist.Normal(batch.condition @ w, 0.5))


class NormalGuide(nn.Module):
    """q(w) with a full covariance, so that the exact posterior is among its members."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.root = nn.Parameter(torch.eye(2))

    def forward(self, batch: Batch) -> None:
        pyro.sample("w", dist.MultivariateNormal(self.loc, scale_tril=self.root.tril()))


def exact_posterior(inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    precision = inputs.T @ inputs / 0.25 + torch.eye(2)
    covariance = torch.linalg.inv(precision)
    return covariance @ (inputs.T @ y) / 0.25, covariance


def fit_regression(model: Any = regression, batch_size: int = 100) -> NormalGuide:
    inputs, y = regression_data()
    guide = NormalGuide()
    fit(
        Pair(model, guide),
        {"y": y},
        ELBO(num_particles=4),
        condition=inputs,
        num_steps=2500,
        batch_size=batch_size,
        optim=Optim(lr=0.01, schedule="cosine", ema_decay=0.98),
        **QUIET,
    )
    return guide


def distance(guide: NormalGuide) -> tuple[float, float]:
    """Of the mean, in posterior sds, and of the sds, as a ratio."""
    mean, covariance = exact_posterior(*regression_data())
    root = guide.root.detach().tril()
    sd = covariance.diagonal().sqrt()
    ratio = (root @ root.T).diagonal().sqrt() / sd
    return float(((guide.loc.detach() - mean) / sd).abs().max()), float((ratio.log()).abs().max())


def test_minibatches_meet_the_full_batch_posterior() -> None:
    """Global latents counted once, rows N/B times: mean within 0.3 sd, sds within 10 %."""
    shift, ratio = distance(fit_regression())
    assert shift < 0.3
    assert ratio < 0.1


def test_a_plate_that_does_not_scale_is_seen() -> None:
    """Counting a minibatch's rows once makes the posterior twice too wide."""

    def unscaled(batch: Batch) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", batch.size):
            pyro.sample("y", dist.Normal(batch.condition @ w, 0.5))

    assert distance(fit_regression(unscaled))[1] > 0.5


def test_nuts_agrees_on_the_same_program() -> None:
    inputs, y = regression_data()
    mean, covariance = exact_posterior(inputs, y)
    posterior = infer(
        regression,
        NUTS(num_warmup=100),
        data={"y": y},
        args=(Batch(condition=inputs),),
        num_draws=200,
        num_chains=2,
    )
    w = posterior.flat("w")
    assert float(((w.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 0.3


def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE.mlp((6,), 2, widths=(16,))


def weights(program: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in program.parameters()]


def test_the_same_seed_is_bit_identical_and_the_world_unchanged() -> None:
    x = torch.randn(64, 6)
    a, b, c = small_vae(), small_vae(), small_vae()
    with unchanged(SETTINGS), unchanged(STREAMS):
        first = fit(a, x, ELBO(), num_steps=20, batch_size=16, seed=1, validation=x[:10], **QUIET)
        second = fit(b, x, ELBO(), num_steps=20, batch_size=16, seed=1, **QUIET)
        other = fit(c, x, ELBO(), num_steps=20, batch_size=16, seed=2, **QUIET)
    assert first.loss == second.loss  # following validation changes nothing
    assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))
    assert first.loss != other.loss


def test_the_average_is_left_in_the_program() -> None:
    """With ema_decay the weights are the recursion's average of the optimiser's own path."""
    x, decay = torch.randn(32, 6), 0.9
    paths: list[list[Tensor]] = []

    class Recording(ELBO):
        def loss(self, program: Any, batch: Batch) -> Tensor:
            paths.append(weights(program))
            return super().loss(program, batch)

    plain = small_vae()
    fit(plain, x, Recording(), num_steps=6, **QUIET)
    path = [
        *paths[2:],
        weights(plain),
    ]  # the first is a look at the parameters; the second, weights before step 1
    expected = path[0]
    for step in path[1:]:
        expected = [decay * mean + (1 - decay) * new for mean, new in zip(expected, step, strict=True)]
    averaged = small_vae()
    fit(averaged, x, ELBO(), num_steps=6, optim=Optim(ema_decay=decay), **QUIET)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(weights(averaged), expected, strict=True))
    assert not all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(weights(averaged), weights(plain), strict=True)
    )


def test_the_schedule_rises_then_falls() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup=4)
    factors = [optim.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.25)
    assert max(factors) == factors[3] == pytest.approx(1.0, abs=0.01)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-9)
    assert Optim(schedule="constant").factor(77, 100) == 1.0


def test_clipping_bounds_the_gradient() -> None:
    seen: list[float] = []

    class Watching(ELBO):
        def loss(self, program: Any, batch: Batch) -> Tensor:
            norms = [p.grad.norm() for p in program.parameters() if p.grad is not None]
            seen.extend([float(torch.stack(norms).norm())] if norms else [])
            return 1e4 * super().loss(program, batch)

    class Holding(Optim):
        def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
            optimiser = super().build(parameters)
            optimiser.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
            optimiser.register_step_post_hook(
                lambda *_: seen.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
            )
            return optimiser

    fit(small_vae(), torch.randn(32, 6), Watching(), num_steps=2, optim=Holding(clip_norm=1.0), **QUIET)
    assert seen
    assert max(seen) == pytest.approx(1.0, abs=1e-3)


def test_ctrl_c_returns_what_there_is() -> None:
    calls = 0

    class Interrupting(ELBO):
        def loss(self, program: Any, batch: Batch) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise KeyboardInterrupt
            return super().loss(program, batch)

    program = small_vae()
    before = weights(program)
    history = fit(
        program, torch.randn(32, 6), Interrupting(), num_steps=100, optim=Optim(ema_decay=0.5), **QUIET
    )
    assert history.interrupted
    assert len(history.loss) == 6
    assert "interrupted after" in str(history)
    assert not all(torch.equal(p, q) for p, q in zip(weights(program), before, strict=True))


def test_a_loss_that_is_not_finite_stops_the_fit() -> None:
    class Exploding(ELBO):
        calls = 0

        def loss(self, program: Any, batch: Batch) -> Tensor:
            Exploding.calls += 1
            return super().loss(program, batch) * (math.nan if Exploding.calls > 4 else 1.0)

    program = small_vae()
    with pytest.raises(ProbgenError, match=r"became nan at step 4 of 10.*Lower the learning rate"):
        fit(program, torch.randn(8, 6), Exploding(), num_steps=10, **QUIET)
    assert all(bool(torch.isfinite(p).all()) for p in program.parameters())


def test_dtype_follows_the_program() -> None:
    program = small_vae().double()
    fit(program, torch.randn(16, 6), ELBO(), num_steps=3, **QUIET)
    assert all(p.dtype == torch.float64 for p in program.parameters())


def test_programs_of_pyro_params_are_fitted_in_the_store() -> None:
    def model(batch: Batch) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with batch.plate():
            pyro.sample("x", dist.Normal(loc, 1.0))

    store = pyro.get_param_store()
    with store.scope():
        x = torch.randn(200) + 3
        fit(
            Pair(model, lambda batch: None),
            x,
            ELBO(),
            num_steps=400,
            optim=Optim(lr=0.05, schedule="cosine"),
            **QUIET,
        )
        assert float(pyro.param("loc").detach()) == pytest.approx(float(x.mean()), abs=0.05)


def test_validation_of_a_semi_supervised_program() -> None:
    program = SemiSupervisedVAE.mlp((6,), 2, 3, widths=(16,))
    x, c = torch.randn(40, 6), torch.randint(-1, 3, (40,))
    data = {"x": x, "c": c}
    history = fit(program, data, ELBO(), num_steps=4, batch_size=20, validation=data, **QUIET)
    assert len(history.validation) == 4
    assert all(math.isfinite(value) for _, value in history.validation)


def test_quantised_data_report_bits() -> None:
    levels = torch.randint(0, 17, (50, 6))
    history = fit(small_vae(), Quantised(levels, 17), ELBO(), num_steps=3, **QUIET)
    nats = history.loss[0]
    assert history.bits_per_dim(nats) == pytest.approx((nats / 6 - math.log(2 / 17)) / math.log(2))
    assert "bits/dim" in str(history)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            torch.full((4, 6), math.nan),
            r"Site 'x' holds 24 NaN or Inf of 24 values, the first at index \(0, 0\)",
        ),
        (
            torch.tensor([[0.0] * 6, [0, 0, math.inf, 0, 0, 0]]),
            r"1 NaN or Inf of 12 values, the first at index \(1, 2\)",
        ),
        (torch.zeros(4, 5), r"expected shape \(n, 6\), got \(4, 5\)"),
        (torch.zeros(6), r"expected shape \(n, 6\), got \(6,\); add the row dimension: x\[None\]"),
        (torch.zeros(4, 6, dtype=torch.long), "expected floating point data, got torch.int64 in 0..0"),
        (torch.zeros(0, 6), "No data: 0 rows"),
        ({"x": torch.zeros(4, 6), "c": torch.zeros(3)}, "same number of rows"),
        ([1.0, 2.0], "torch.as_tensor"),
    ],
)
def test_bad_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(small_vae(), data, ELBO(), num_steps=2, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"batch_size": -3}, "batch_size must be an integer >= 1, got -3"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(small_vae(), torch.zeros(4, 6), ELBO(), **options, **QUIET)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"schedule": "cosin"},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"warmup": -1},
        {"betas": (0.9, 1.0)},
    ],
)
def test_bad_optimisers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Optim(**options)


def test_nothing_to_fit_is_said() -> None:
    def model(batch: Batch) -> None:
        with batch.plate():
            pyro.sample("x", dist.Normal(torch.zeros(batch.size), 1.0))

    with pytest.raises(InputError, match="no weights to fit"):
        fit(Pair(model, lambda batch: None), torch.zeros(3), ELBO(), **QUIET)
