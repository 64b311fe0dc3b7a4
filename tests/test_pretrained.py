"""Networks trained elsewhere: schedules by hand, and outputs against their own library where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probgen import EDM, VP, GaussianMixture, InputError, ProbabilityFlowODE, infer, load_network
from probgen.models.pretrained import OfSigma
from probgen.tabulated import Tabulated

FIRST, LAST, STEPS = 0.0001, 0.02, 1000
LINEAR = torch.cumprod(1 - torch.linspace(FIRST, LAST, STEPS, dtype=torch.float64), 0)


class StepsAndSamples(nn.Module):
    """A perfect network in the calling convention of diffusers: (x, step) -> an object with `.sample`."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.config = SimpleNamespace(in_channels=2, sample_size=())
        self.steps: list[Tensor] = []

    def forward(self, x: Tensor, step: Tensor) -> Any:
        self.steps.append(step)
        alpha, sigma = LINEAR[step.long()].sqrt(), (1 - LINEAR[step.long()]).sqrt()
        x0hat = self.mixture.denoise(x, (step + 1) / STEPS)
        return SimpleNamespace(sample=(x - alpha[:, None] * x0hat) / sigma[:, None])


def on_the_table() -> GaussianMixture:
    return GaussianMixture.example(process=Tabulated.of(LINEAR))


def test_steps_and_predictions_of_diffusers_are_understood() -> None:
    """At every step of the table E[x_0 | x_t] is what the network's eps says; steps are whole numbers there."""
    mixture = on_the_table()
    network = StepsAndSamples(mixture)
    scheduler = SimpleNamespace(alphas_cumprod=LINEAR, config={"prediction_type": "epsilon"})
    program = load_network(network, scheduler=scheduler, event_shape=(2,))
    x = torch.randn(5, 2, dtype=torch.float64)
    for k in (0, 10, 500, STEPS - 1):
        t = torch.full((5,), (k + 1) / STEPS, dtype=torch.float64)
        torch.testing.assert_close(program.denoise(x, t), mixture.denoise(x, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(network.steps[-1], torch.full((5,), float(k), dtype=torch.float64))


def test_the_law_of_a_loaded_network_is_that_of_the_data() -> None:
    """Draws have the mean of the mixture within 4.5 standard errors; eps taken for v would be off by more."""
    mixture = GaussianMixture.example(process=Tabulated.of(LINEAR))

    class Eps(nn.Module):
        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            t = (step + 1) / STEPS
            alpha, sigma = mixture.process().alpha(t), mixture.process().sigma(t)
            return (x - alpha[:, None] * mixture.denoise(x, t)) / sigma[:, None]

    def worst_z(prediction: str) -> float:
        scheduler = SimpleNamespace(alphas_cumprod=LINEAR, config={"prediction_type": prediction})
        network = Eps()
        network.register_buffer("like", torch.zeros(1, dtype=torch.float64))
        program = load_network(network, scheduler=scheduler, event_shape=(2,))
        x = infer(program, ProbabilityFlowODE(steps=20), num_draws=4000, seed=0)["x"][0]
        return float(((x.mean(0) - mixture.mean) / (x.std(0) / math.sqrt(len(x)))).abs().max())

    assert worst_z("epsilon") < 4.5
    assert worst_z("v_prediction") > 10


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_interpolate_smoothly(schedule: str, tmp_path: Path) -> None:
    """alpha^2 + sigma^2 = 1, rates are derivatives (to 1e-5), and alpha^2 is the table at its steps."""
    from probgen.models.pretrained import _alphas_cumprod

    table = _alphas_cumprod({"beta_schedule": schedule, "num_train_timesteps": 100})
    process = Tabulated.of(table)
    t = (torch.arange(100, dtype=torch.float64) + 1) / 100
    torch.testing.assert_close(process.alpha(t).square(), torch.tensor(table, dtype=torch.float64))
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64) + 0.003
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))
    h = 1e-6
    slope = (process.alpha(t + h) - process.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(process.alpha_rate(t), slope, rtol=1e-5, atol=1e-6)
    slope = (process.sigma(t + h).square() - process.sigma(t - h).square()) / (2 * h)
    torch.testing.assert_close(process.variance_rate(t), slope, rtol=1e-5, atol=1e-6)


def test_denoisers_that_carry_their_schedule() -> None:
    """As azula's: schedule(t) -> (alpha, sigma), denoiser(x_t, t).mean."""
    mixture = GaussianMixture.example(process=VP())

    class Denoiser(nn.Module):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return VP().alpha(t), VP().sigma(t)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return SimpleNamespace(mean=mixture.denoise(x, t))

    program = load_network(Denoiser(), event_shape=(2,))
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(program.denoise(x, t), mixture.denoise(x, t))
    torch.testing.assert_close(program.process().diffusion2(t), VP().diffusion2(t))


def test_denoisers_of_sigma() -> None:
    """As Karras's: net(x, sigma) = E[x_0 | x_0 + sigma z]."""
    process = EDM()
    mixture = GaussianMixture.example(process=process)

    class OfNoise(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return mixture.denoise(x, process.time_at(sigma.double()))

    program = load_network(OfSigma(OfNoise(), process), process, "x0", event_shape=(2,))
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(program.denoise(x, t), mixture.denoise(x, t), rtol=1e-6, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


def folder(path: Path, unet: Any = None, scheduler: Any = None) -> Path:
    for name, file, content in (
        ("unet", "config.json", unet or {"_class_name": "UNet2DModel"}),
        ("scheduler", "scheduler_config.json", scheduler or {"num_train_timesteps": 10}),
    ):
        (path / name).mkdir()
        (path / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        load_network(tmp_path / "nowhere")
    for name in "abcd":
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_network(folder(tmp_path / "a", scheduler="{not json"))
    with pytest.raises(InputError, match="holds a VQModel"):
        load_network(folder(tmp_path / "b", unet={"_class_name": "VQModel"}))
    pickled = folder(tmp_path / "c")
    (pickled / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="not read, because reading executes"):
        load_network(pickled)
    with pytest.raises(InputError, match="JSON object"):
        load_network(folder(tmp_path / "d", scheduler=[1]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.9], "two or more"),
        ([0.5, 0.6], "at step 1"),
        ([1.5, 0.2], "at its ends"),
        ([0.9, math.nan], "step 1"),
    ],
)
def test_tables_that_are_no_schedule_are_refused(table: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tabulated.of(table)


def test_tables_that_end_without_signal_stop_before() -> None:
    process = Tabulated.of([0.9, 0.5, 0.0])
    assert process.t_max == pytest.approx(2 / 3)


def test_modules_that_say_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="neither how its data were noised"):
        load_network(nn.Identity())
    with pytest.raises(InputError, match="event_shape"):
        load_network(nn.Identity(), VP(), "eps")
    with pytest.raises(InputError, match="no alphas_cumprod"):
        load_network(nn.Identity(), scheduler=object())
    odd = SimpleNamespace(alphas_cumprod=LINEAR, config={"prediction_type": "flow"})
    with pytest.raises(InputError, match="prediction_type 'flow'"):
        load_network(nn.Identity(), scheduler=odd)


# --- against the libraries themselves -----------------------------------------------------------------------------


def test_diffusers_folders(tmp_path: Path) -> None:
    """A step of its DDPM scheduler says the same x_0 as `denoise`; through files, for each kind of prediction."""
    diffusers = pytest.importorskip("diffusers")
    kinds = {"epsilon": "linear", "v_prediction": "squaredcos_cap_v2", "sample": "scaled_linear"}
    for kind, schedule in kinds.items():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=100, beta_schedule=schedule, prediction_type=kind, clip_sample=False
        )
        unet.save_pretrained(tmp_path / kind / "unet")
        scheduler.save_pretrained(tmp_path / kind / "scheduler")
        program = load_network(tmp_path / kind)
        assert program.event_shape == (1, 8, 8)
        x = torch.randn(3, 1, 8, 8)
        for step in (0, 40, 98):
            with torch.no_grad():
                output = unet.eval()(x, step).sample
                found = program.denoise(x, torch.full((3,), (step + 1) / 100))
            expected = scheduler.step(output, step, x).pred_original_sample
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_azula_denoisers() -> None:
    """The same mean and the same schedule as azula's preconditioned denoiser says."""
    denoise, noise = pytest.importorskip("azula.denoise"), pytest.importorskip("azula.noise")

    class Backbone(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x) * t.reshape(-1, *[1] * (x.ndim - 1)).cos()

    denoiser = denoise.KarrasDenoiser(Backbone(), noise.VPSchedule())
    program = load_network(denoiser, event_shape=(2,))
    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(program.denoise(x, t), denoiser(x, t).mean, rtol=1e-4, atol=1e-4)
    alpha, sigma = denoiser.schedule(t)
    torch.testing.assert_close(program.process().alpha(t), alpha)
    torch.testing.assert_close(program.process().sigma(t), sigma)
