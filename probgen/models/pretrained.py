"""Networks trained elsewhere, with the schedule and the scaling they were trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pyro
import torch
from torch import Tensor, nn

from probgen.core import Batch, InputError, Size, check_arguments, did_you_mean
from probgen.denoising import DenoisingProgram
from probgen.distributions import FlowLaw
from probgen.processes import VP, Prediction, Process
from probgen.recorded import Recorded
from probgen.tabulated import Scheduled, Tabulated

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class Pretrained(DenoisingProgram):
    """x0hat = a(t) x_t + b(t) net(x_t, t), the network taken as it is: no input is scaled.

    As a Pyro program it has one site, "x", whose law is that of the probability-flow ODE, `FlowLaw`. `load_network`
    makes it of files and of networks with calling conventions of their own.

    Args:
        network: `net(x, t)`, x `(batch, *event)`, t `(batch,)` in [0, 1] -> `(batch, *event)`.
        process: the noising law it was trained with.
        prediction: what its output is: "x0", "eps", "v", "score", "velocity" or "edm".
        event_shape: shape of one datum; None takes `network.event_shape`.

    Raises:
        InputError: an unknown prediction, or no event shape.

    Source: Song et al. (2021), arXiv 2011.13456.

    >>> Pretrained(nn.Identity(), VP(), "eps", event_shape=(2,)).event_shape
    (2,)
    """

    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "a network trained elsewhere, with its own schedule and scaling"
    gives_up: ClassVar[str] = "nothing is learnt here: its training data and errors are what they are"

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        prediction: Prediction,
        *,
        event_shape: Sequence[Size] | None = None,
    ) -> None:
        super().__init__(network, process, prediction, event_shape=event_shape)

    def model(self, batch: Batch) -> Tensor:
        """x ~ p(x) for each row, by the probability-flow ODE."""
        with batch.plate():
            return pyro.sample("x", FlowLaw(self, batch.condition))


def load_network(
    source: str | Path | nn.Module,
    process: Process | None = None,
    prediction: Prediction | None = None,
    *,
    event_shape: tuple[int, ...] | None = None,
    scheduler: Any = None,
) -> Pretrained:
    """A network trained elsewhere as a program, to draw from, to take likelihoods of, and to use as a `Prior`.

    Args:
        source: a folder as diffusers saves pipelines, with `unet/` and `scheduler/` (`UNet2DModel`, weights as
            safetensors; diffusers must be installed); a diffusers network, with its `scheduler`; a denoiser with a
            `schedule(t) -> (alpha, sigma)` whose `denoiser(x_t, t).mean` is E[x_0 | x_t], as azula's are; or any module
            `net(x, t)`, t in [0, 1], with `process` and `prediction`.
        process: the noising law, for a plain module. `net(x, sigma)` of Karras's kind is
            `load_network(OfSigma(net, process), process, "x0")`.
        prediction: what the output of a plain module is; see `probgen.processes.PREDICTIONS`.
        event_shape: shape of one datum; None where the source says it.
        scheduler: of a diffusers network: an object with `alphas_cumprod` and `config.prediction_type`.

    Step k = 0..T-1 of a diffusers scheduler is t = (k + 1)/T; between steps log(alpha/sigma) is interpolated by a
    monotone cubic. `clip_sample` and `thresholding` are no part of the law, and are left to their schedulers.

    Returns a `Pretrained` program. Nothing in a file is executed. Raises `InputError` for files that are missing or of
    another kind, and where process, prediction or event shape cannot be known.

    >>> class Halved(nn.Module):
    ...     def forward(self, x, t):
    ...         return 0.5 * x
    >>> program = load_network(Halved(), VP(), "x0", event_shape=(2,))
    >>> program.denoise(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[0.5000, 0.5000]])
    """
    check_arguments(load_network, locals())
    if isinstance(source, str | Path):
        network, config = _read_folder(Path(source))
        return _of_diffusers(network, config, event_shape)
    if scheduler is not None:
        return _of_diffusers(source, _config_of(scheduler), event_shape)
    if callable(getattr(source, "schedule", None)):
        return Pretrained(_Mean(source), Scheduled(schedule=source.schedule), "x0", event_shape=event_shape)
    if process is None or prediction is None:
        raise InputError(
            f"{type(source).__name__} says neither how its data were noised nor what its output is: "
            "load_network(net, VP(), 'eps', event_shape=...), or pass the scheduler of a diffusers network."
        )
    return Pretrained(source, process, prediction, event_shape=event_shape)


# --- calling conventions ------------------------------------------------------------------------------------------


class OfSigma(Recorded):
    """A network `net(x, sigma)` as one of (x, t): sigma = sigma(t) of a process with alpha = 1.

    Args:
        network: x `(batch, *event)`, sigma `(batch,)` -> `(batch, *event)`, such as Karras's preconditioned denoisers.
        process: `EDM(sigma_min, sigma_max)` or `VE(...)`.

    >>> from probgen.processes import EDM
    >>> class Scaled(nn.Module):
    ...     def forward(self, x, sigma):
    ...         return x / (1 + sigma[:, None] ** 2)
    >>> net = OfSigma(Scaled(), EDM(sigma_max=1.0))
    >>> net(torch.ones(1, 2), torch.ones(1))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, network: nn.Module, process: Process) -> None:
        super().__init__()
        self.network, self.process = network, process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, self.network(x, self.process.sigma(t.double()).to(x)))


class _OfStep(nn.Module):
    """A diffusers network, asked at step t T - 1."""

    def __init__(self, network: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.network, self.num_steps = network, num_steps

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.network(x, t * self.num_steps - 1)
        return cast(Tensor, getattr(output, "sample", output))


class _Mean(nn.Module):
    """A denoiser whose output has the mean E[x_0 | x_t]."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, self.denoiser(x, t).mean)


# --- diffusers ----------------------------------------------------------------------------------------------------


def _of_diffusers(
    network: nn.Module, config: Mapping[str, Any], event_shape: tuple[int, ...] | None
) -> Pretrained:
    prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in _PREDICTIONS:
        raise InputError(f"Unknown prediction_type {prediction!r}; {did_you_mean(prediction, _PREDICTIONS)}")
    table = config["alphas_cumprod"] if "alphas_cumprod" in config else _alphas_cumprod(config)
    process = Tabulated.of(table)
    shape = event_shape or _shape_of(getattr(network, "config", None))
    return Pretrained(
        _OfStep(network, len(process.alphas_cumprod)), process, _PREDICTIONS[prediction], event_shape=shape
    )


def _shape_of(config: Any) -> tuple[int, ...] | None:
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        return None
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    return (int(channels), *sizes)


def _config_of(scheduler: Any) -> dict[str, Any]:
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise InputError(
            f"{type(scheduler).__name__} has no alphas_cumprod: pass a scheduler of the DDPM kind, or give the noising "
            "law yourself: load_network(net, process, prediction)."
        )
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "epsilon") if isinstance(config, Mapping) else config.prediction_type
    return {"alphas_cumprod": torch.as_tensor(table).double().tolist(), "prediction_type": kind}


def _alphas_cumprod(config: Mapping[str, Any]) -> list[float]:
    """prod (1 - beta_k) of a scheduler's configuration."""
    num_steps = config.get("num_train_timesteps", 1000)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 2 <= num_steps <= 1_000_000:
        raise InputError(f"num_train_timesteps must be an integer in 2..1,000,000, got {num_steps!r}.")
    if config.get("trained_betas") is not None:
        betas = torch.tensor([float(beta) for beta in config["trained_betas"]], dtype=torch.float64)
    else:
        betas = _betas(config, num_steps)
    table = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):
        root = table.sqrt()
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return cast(list[float], table.tolist())


def _betas(config: Mapping[str, Any], num_steps: int) -> Tensor:
    kind = str(config.get("beta_schedule", "linear"))
    first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return torch.linspace(first, last, num_steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        bar = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise InputError(f"Unknown beta_schedule {kind!r}; {did_you_mean(kind, _BETA_SCHEDULES)}")


def _read_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the scheduler's configuration of a folder as diffusers saves it."""
    config = _json(folder / "scheduler" / "scheduler_config.json")
    kind = _json(folder / "unet" / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise InputError(
            f"{folder / 'unet'} holds a {kind}, expected a UNet2DModel; load it yourself and pass it on."
        )
    if not list((folder / "unet").glob("*.safetensors")):
        raise InputError(
            f"{folder / 'unet'} holds no weights in safetensors; pickled ones (.bin) are not read, because reading "
            "executes them. Save them anew: unet.save_pretrained(folder, safe_serialization=True)."
        )
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise InputError(
            f"{folder} is read by diffusers, which is missing: pip install diffusers."
        ) from error
    try:
        network = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers raises for files that do not fit each other
        raise InputError(
            f"diffusers could not read {folder / 'unet'}: {str(error).splitlines()[0]}"
        ) from error
    return network, config


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: load_network reads folders with unet/ and scheduler/, as diffusers saves them."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(found).__name__}.")
    return found


def example() -> Pretrained:
    """A small network that predicts eps."""
    from probgen.nets import TimeMLP

    return Pretrained(TimeMLP((2,), width=16, num_blocks=1), VP(), "eps")
