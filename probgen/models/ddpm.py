"""The denoising diffusion chain as a hierarchical model/guide pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.core import Batch, InputError, ReverseChain, check_count, did_you_mean
from probgen.nets import TimeMLP
from probgen.processes import PREDICTIONS, VP, Prediction, Process, denoiser_coefficients, over_event

ReverseVariance = Literal["posterior", "beta", "analytic"]
LastStep = Literal["x1", "x0hat"]
_VARIANCES: tuple[ReverseVariance, ...] = ("posterior", "beta", "analytic")
_LAST_STEPS: tuple[LastStep, ...] = ("x1", "x0hat")
_CALIBRATION_ROWS = 8192  # noisy copies of data for the analytic variance, and at least so many a step:
_CALIBRATION_ROWS_PER_STEP = 32
_CHUNK = 1024


class DDPM(nn.Module):
    """Denoising diffusion probabilistic model: p(x_T) prod_k p(x_{k-1} | x_k) p(x_0 | x_1), guide q(x_{1:T} | x_0).

    Both run in reverse order, so that every site meets its twin. With abar_k = alpha(k/T)^2,

        ELBO = E log p(x_0 | x_1) - sum_{k=2..T} E KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k))
               - KL(q(x_T | x_0) || N(0, I)),

    where p(x_{k-1} | x_k) has the mean of q(x_{k-1} | x_k, x_0) at x_0 = x0hat(x_k).

    Args:
        network: `net(x, t)`, x `(batch, *event)`, t `(batch,)` in (0, 1] -> `(batch, *event)`; any nn.Module.
        process: variance-preserving noising law, e.g. `VP()`, `CosineVP()`.
        num_steps: T >= 2.
        event_shape: shape of one datum; None takes `network.event_shape`.
        prediction: what the network's output is: "eps", "x0" or "v".
        reverse_variance: "posterior" (beta~_k), "beta" (beta_k), or "analytic", beta~_k + c_0^2 Var[x_0 | x_k]
            (Bao et al. 2022, arXiv 2201.06503), its variance set from data after fitting; the best bound, so default.
        last_step: mean of p(x_0 | x_1) = N(., s^2 I): x_1 itself ("x1") or the network's "x0hat". s is learned, and
            set to its optimum, s^2 = E|x_0 - mean|^2/d, after fitting.

    Raises `InputError` for unknown options, T < 2 or a missing event shape.

    Source: Sohl-Dickstein et al. (2015), arXiv 1503.03585; Ho et al. (2020), arXiv 2006.11239.

    >>> ddpm = DDPM(TimeMLP((2,), width=8, num_blocks=1), num_steps=10)
    >>> from probgen import Ancestral, infer
    >>> infer(ddpm, Ancestral(), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "density bounded (ELBO term by term); very flexible"
    gives_up: ClassVar[str] = "one network call a step to draw; no low-dimensional latent"

    def __init__(
        self,
        network: nn.Module,
        process: Process = VP(),  # noqa: B008 - frozen
        num_steps: int = 1000,
        *,
        event_shape: tuple[int, ...] | None = None,
        prediction: Prediction = "eps",
        reverse_variance: ReverseVariance = "analytic",
        last_step: LastStep = "x1",
    ) -> None:
        super().__init__()
        check_count("num_steps", num_steps, 2)
        for name, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("reverse_variance", reverse_variance, _VARIANCES),
            ("last_step", last_step, _LAST_STEPS),
        ):
            if value not in known:
                raise InputError(f"Unknown {name} {value!r}; {did_you_mean(str(value), known)}")
        event_shape = event_shape if event_shape is not None else getattr(network, "event_shape", None)
        if event_shape is None:
            raise InputError(
                f"DDPM needs the shape of one datum: {type(network).__name__} has no event_shape; "
                "pass DDPM(..., event_shape=(1, 28, 28))."
            )
        self.network = network
        self.event_shape = tuple(event_shape)
        self.num_steps = num_steps
        self.prediction: Prediction = prediction
        self.reverse_variance: ReverseVariance = reverse_variance
        self.last_step: LastStep = last_step
        # At times below 1/T the network was never trained: continuous engines stop there.
        self._process = replace(process, t_min=1 / num_steps)
        self._tables = _Tables(self._process, prediction, num_steps)
        self._step_probabilities = self._proportional_to_kl()
        self.x0_variance: Tensor
        self.register_buffer("x0_variance", torch.zeros(num_steps))
        self.log_last_scale = nn.Parameter(self._initial_last_scale().log())

    # --- the pair ------------------------------------------------------------------------------------------------

    def model(self, batch: Batch, t: Tensor | None = None, weight: Tensor | None = None) -> None:
        """The chain from noise to data; with `t`, the bound with step t of each row counted `weight` times for all."""
        with batch.plate():
            if t is not None:
                self._collapsed(batch.data["x"], t, weight)
                return
            chain = self.reverse_chain()
            noise = torch.zeros(self.event_shape).to(self.log_last_scale)
            x = pyro.sample(f"x_{self.num_steps}", self._normal(noise, torch.ones_like(noise), batch.size))
            for row, k in enumerate(range(self.num_steps, 0, -1)):
                output = self._predict_any(x, chain.times[row])
                loc = chain.on_x[row].to(x) * x + chain.on_output[row].to(x) * output
                x = pyro.sample(f"x_{k - 1}" if k > 1 else "x", self._normal(loc, chain.scale[row].to(x)))

    def guide(self, batch: Batch, t: Tensor | None = None, weight: Tensor | None = None) -> None:
        """q(x_T | x_0), then q(x_{k-1} | x_k, x_0) down to x_1; no sites with `t`, where the model has whole terms."""
        if t is not None:
            return
        x_0 = _observed(batch)
        with batch.plate():
            table = self._tables
            x = pyro.sample(
                f"x_{self.num_steps}", self._normal(table.alpha[-1].to(x_0) * x_0, table.sigma[-1].to(x_0))
            )
            for k in range(self.num_steps, 1, -1):
                loc = table.on_x_t[k - 1].to(x) * x + table.on_x_0[k - 1].to(x) * x_0
                x = pyro.sample(f"x_{k - 1}", self._normal(loc, table.posterior_variance[k - 1].to(x).sqrt()))

    def _normal(self, loc: Tensor, scale: Tensor, size: int | None = None) -> Any:
        loc = loc if size is None else loc.expand(size, *self.event_shape)
        return dist.Normal(loc, scale.expand_as(loc)).to_event(len(self.event_shape))

    def _collapsed(self, x_0: Tensor, k: Tensor, weight: Tensor | None) -> None:
        """All terms as one factor, each in closed form given x_k, which is drawn outside Pyro's accounting."""
        lost = self.step_term(x_0, k) * (len(self.steps()) if weight is None else weight)
        for term in self.end_terms(x_0).values():
            lost = lost + term
        pyro.factor("bound", -lost)

    # --- the terms of the bound ----------------------------------------------------------------------------------

    def steps(self) -> range:
        """2..T; from 1 where the last step needs the network too."""
        return range(1 if self.last_step == "x0hat" else 2, self.num_steps + 1)

    def step_probabilities(self) -> Tensor:
        """Proportional to (SNR_{k-1} - SNR_k) sigma_k^2: the KL's weight where |v - vhat|^2 is alike at every step.

        Drawn uniformly, the last few steps carry nearly all of the bound and of its gradient's variance.
        """
        return self._step_probabilities

    def _proportional_to_kl(self) -> Tensor:
        process, times = self._process, self._tables.times
        snr = process.snr(times).flatten(1).mean(1) if self._tables.alpha.ndim > 1 else process.snr(times)
        sigma2 = 1 / (1 + snr)
        weight = (snr[:-1] - snr[1:]) * sigma2[1:]
        if self.last_step == "x0hat":
            weight = torch.cat((weight[:1], weight))
        return weight / weight.sum()

    def step_term(self, x_0: Tensor, k: Tensor) -> Tensor:
        """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) for k >= 2 and -log p(x_0 | x_1) for k = 1, at one x_k ~ q."""
        at = self._tables.at(k, x_0)
        x_k = at.alpha * x_0 + at.sigma * torch.randn_like(x_0)
        error = (x_0 - at.on_x * x_k - at.on_output * self.predict(x_k, k.to(x_0) / self.num_steps)).square()
        variance = self._variance(at, over_event(self.x0_variance[k - 1], x_0))
        ratio = at.posterior_variance / variance
        constant = ratio - 1 - ratio.log()
        if (
            self.last_step == "x0hat"
        ):  # at k = 1 the bridge ends in x_0 itself: on_x_0 = 1, and p's scale is s
            first = over_event(k, x_0) == 1
            last = torch.exp(2 * self.log_last_scale)
            variance = torch.where(first, last, variance)
            constant = torch.where(first, torch.log(2 * math.pi * last), constant)
        return 0.5 * (constant + at.on_x_0.square() / variance * error).flatten(1).sum(1)

    def end_terms(self, x_0: Tensor) -> Mapping[str, Tensor]:
        """KL(q(x_T | x_0) || N(0, I)), and -E log p(x_0 | x_1) where x_1 itself is the mean."""
        alpha, sigma = self._tables.alpha.to(x_0), self._tables.sigma.to(x_0)
        variance = sigma[-1].square()
        prior = 0.5 * ((alpha[-1] * x_0).square() + variance - 1 - variance.log())
        terms = {f"x_{self.num_steps}": prior.flatten(1).sum(1)}
        if self.last_step == "x1":
            error = ((1 - alpha[0]) * x_0).square() + sigma[0].square()
            last = torch.exp(2 * self.log_last_scale)
            terms["x"] = 0.5 * (torch.log(2 * math.pi * last) + error / last).flatten(1).sum(1)
        return terms

    def _variance(self, at: Any, x0_variance: Tensor) -> Tensor:
        """The variance of p(x_{k-1} | x_k)."""
        if self.reverse_variance == "beta":
            return at.step_variance
        if self.reverse_variance == "posterior":
            return at.posterior_variance
        return at.posterior_variance + at.on_x_0.square() * x0_variance

    # --- what engines use ----------------------------------------------------------------------------------------

    def process(self) -> Process:
        """The noising law, clamped at 1/T."""
        return self._process

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's own output at x_t `(batch, *event)`, t `(batch,)` or `(1,)`."""
        return self.network(x_t, t.expand(len(x_t)))

    def _predict_any(self, x_t: Tensor, t: Tensor) -> Tensor:
        flat = x_t.reshape(-1, *self.event_shape)
        return self.predict(flat, t.to(flat).reshape(1)).reshape(x_t.shape)

    def denoiser_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, b with x0hat = a x_t + b predict(x_t, t)."""
        return denoiser_coefficients(self._process, self.prediction, t)

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] as the network has it, `(batch, *event)`."""
        on_x, on_output = (over_event(value, x_t) for value in self.denoiser_coefficients(t))
        return on_x * x_t + on_output * self.predict(x_t, t)

    def reverse_chain(self) -> ReverseChain:
        """Coefficients of x_{k-1} = A x_k + B output + S z for k = T..1, float64."""
        table = self._tables
        x0_variance = self.x0_variance.double().cpu()
        variance = self._variance(
            table, x0_variance.reshape(x0_variance.shape + (1,) * (table.alpha.ndim - 1))
        )
        on_x = table.on_x_t + table.on_x_0 * table.on_x
        on_output = table.on_x_0 * table.on_output
        scale = variance.sqrt().clone()
        scale[0] = self.log_last_scale.double().exp().item()
        if self.last_step == "x1":
            on_x[0], on_output[0] = 1.0, 0.0
        return ReverseChain(table.times.flip(0), on_x.flip(0), on_output.flip(0), scale.flip(0))

    # --- constants set from data ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set Var[x_0 | x_k] = E|x_0 - x0hat|^2/d of every step and the optimal s, from data x `(n, *event)`."""
        copies = max(_CALIBRATION_ROWS_PER_STEP, _CALIBRATION_ROWS // self.num_steps)
        k = torch.arange(self.num_steps * copies, device=x.device) // copies + 1
        x_0 = x[torch.randint(len(x), k.shape, device=x.device)]
        error = torch.cat(
            [self._denoising_error(*part) for part in zip(x_0.split(_CHUNK), k.split(_CHUNK), strict=True)]
        )
        self.x0_variance.copy_(error.reshape(self.num_steps, copies).mean(1))
        if self.last_step == "x1":
            alpha, sigma = self._tables.alpha[0].to(x), self._tables.sigma[0].to(x)
            last = (((1 - alpha) * x).square() + sigma.square()).mean()
        else:
            last = self._denoising_error(x, torch.ones(len(x), dtype=torch.long, device=x.device)).mean()
        self.log_last_scale.copy_(0.5 * last.log())

    def _denoising_error(self, x_0: Tensor, k: Tensor) -> Tensor:
        """|x_0 - x0hat(x_k)|^2/d at one x_k ~ q(x_k | x_0)."""
        at = self._tables.at(k, x_0)
        x_k = at.alpha * x_0 + at.sigma * torch.randn_like(x_0)
        return (x_0 - self.denoise(x_k, k.to(x_0) / self.num_steps)).square().flatten(1).mean(1)

    def _initial_last_scale(self) -> Tensor:
        """s for data of unit second moment."""
        alpha, sigma = self._tables.alpha[0], self._tables.sigma[0]
        return ((1 - alpha).square() + sigma.square()).mean().sqrt().to(torch.get_default_dtype())


class _Tables:
    """The chain's constants for k = 1..T in float64, and rows of them for a batch."""

    names = ("alpha", "sigma", "on_x", "on_output", "on_x_t", "on_x_0", "posterior_variance", "step_variance")

    def __init__(self, process: Process, prediction: Prediction, num_steps: int) -> None:
        k = torch.arange(1, num_steps + 1, dtype=torch.float64)
        self.times, earlier = k / num_steps, (k - 1) / num_steps
        self.alpha, self.sigma = process.alpha(self.times), process.sigma(self.times)
        self.on_x, self.on_output = denoiser_coefficients(process, prediction, self.times)
        self.on_x_t, self.on_x_0, self.posterior_variance = process.bridge_coefficients(earlier, self.times)
        ratio = self.alpha / process.alpha(earlier)
        self.step_variance = self.sigma.square() - ratio.square() * process.sigma(earlier).square()
        self._cast: dict[Any, list[Tensor]] = {}

    def at(self, k: Tensor, x: Tensor) -> _Row:
        """Rows k `(batch,)`, shaped to broadcast over x `(batch, *event)`, on its device and in its dtype."""
        key = (x.device, x.dtype)
        if key not in self._cast:
            self._cast[key] = [getattr(self, name).to(x) for name in self.names]
        return _Row(*(over_event(column[k - 1], x) for column in self._cast[key]))


class _Row:
    def __init__(self, *columns: Tensor) -> None:
        for name, column in zip(_Tables.names, columns, strict=True):
            setattr(self, name, column)

    alpha: Tensor
    sigma: Tensor
    on_x: Tensor
    on_output: Tensor
    on_x_t: Tensor
    on_x_0: Tensor
    posterior_variance: Tensor
    step_variance: Tensor


def _observed(batch: Batch) -> Tensor:
    if "x" not in batch.data:
        raise InputError("The guide q(x_1..x_T | x_0) of DDPM needs the site 'x' observed: data={'x': ...}.")
    return batch.data["x"]


def example() -> DDPM:
    """A small chain on the plane."""
    return DDPM(TimeMLP((2,), width=16, num_blocks=1), num_steps=8)
