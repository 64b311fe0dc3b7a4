"""Hierarchical chains of Gaussian steps from noise to data, as Pyro pairs, with their bound term by term."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.conditioning import Condition
from probgen.core import Batch, InputError, ReverseChain, describe, did_you_mean
from probgen.denoising import DenoisingProgram
from probgen.processes import Prediction, Process, over_event

LastStep = Literal["x1", "x0hat"]
LAST_STEPS: tuple[LastStep, ...] = ("x1", "x0hat")


class ChainTable(NamedTuple):
    """A chain's constants for k = 1..T, rows in that order, float64, each `(T,)` or `(T, *event)`.

    Args:
        times: t_k, what the network is told, `(T,)`.
        alpha, sigma: q(x_k | x_0) = N(alpha x_0, sigma^2).
        on_x_t, on_x_0, guide_variance: q(x_{k-1} | x_k, x_0) = N(on_x_t x_k + on_x_0 x_0, guide_variance); at k = 1
            it is x_0 itself: 0, 1 and 0.
        model_variance: that of p(x_{k-1} | x_k), whose mean is q's at x_0 = x0hat.
        on_x, on_output: x0hat = on_x x_k + on_output predict(x_k, t_k).
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    on_x_t: Tensor
    on_x_0: Tensor
    guide_variance: Tensor
    model_variance: Tensor
    on_x: Tensor
    on_output: Tensor


class ChainedProgram(DenoisingProgram):
    """p(x_T) prod_k p(x_{k-1} | x_k) p(x_0 | x_1) with guide q(x_{1:T} | x_0), every step Gaussian.

    Model and guide run in the same, reverse order, so that every site meets its twin:

        ELBO = E log p(x_0 | x_1) - sum_{k=2..T} E KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k))
               - KL(q(x_T | x_0) || p(x_T)),

    where p(x_{k-1} | x_k) has the mean of q(x_{k-1} | x_k, x_0) at x_0 = x0hat(x_k), and each KL is
    1/2 [on_x_0^2 |x_0 - x0hat|^2 / v + d (r - 1 - log r)], v the model's variance and r the ratio of the guide's to it.

    Args:
        network: `net(x, t)`, or `net(x, t, c)` with a condition; any nn.Module.
        process: the noising law.
        table: the chain's constants.
        start_scale: standard deviation of p(x_T) = N(0, .), `()` or of the shape of one event, float64.
        prediction: what the network's output is; None where a subclass has its own `denoiser_coefficients`.
        last_step: mean of p(x_0 | x_1) = N(., s^2 I): x_1 itself ("x1") or the network's "x0hat". s is learned, and
            set to its optimum, s^2 = E|x_0 - mean|^2/d, after fitting.
        event_shape, condition, condition_dropout: as for `DenoisingProgram`.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        table: ChainTable,
        start_scale: Tensor,
        prediction: Prediction | None,
        last_step: LastStep,
        *,
        event_shape: Sequence[int] | None = None,
        condition: Condition | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            network,
            process,
            prediction,
            event_shape=event_shape,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        if last_step not in LAST_STEPS:
            raise InputError(f"Unknown last_step {last_step!r}; {did_you_mean(str(last_step), LAST_STEPS)}")
        self.num_steps = len(table.times)
        self.last_step: LastStep = last_step
        self._table, self._start_scale = table, start_scale
        self._cast: dict[Any, tuple[Tensor, Tensor]] = {}
        self._step_probabilities = self._proportional_to_kl()
        self.log_last_scale = nn.Parameter(self._initial_last_scale().log())

    # --- the pair ------------------------------------------------------------------------------------------------

    def model(self, batch: Batch, t: Tensor | None = None, weight: Tensor | None = None) -> None:
        """The chain from noise to data; with `t`, the bound with step t of each row counted `weight` times for all."""
        program = self.for_rows(batch)
        with batch.plate():
            if t is not None:
                program._collapsed(batch.data["x"], t, weight)
                return
            chain = self.reverse_chain()
            start = self._start_scale.to(self.log_last_scale).expand(batch.size, *self.event_shape)
            x = pyro.sample(f"x_{self.num_steps}", self._normal(torch.zeros_like(start), start))
            for row, k in enumerate(range(self.num_steps, 0, -1)):
                output = program._predict_any(x, chain.times[row])
                loc = chain.on_x[row].to(x) * x + chain.on_output[row].to(x) * output
                x = pyro.sample(f"x_{k - 1}" if k > 1 else "x", self._normal(loc, chain.scale[row].to(x)))

    def guide(self, batch: Batch, t: Tensor | None = None, weight: Tensor | None = None) -> None:
        """q(x_T | x_0), then q(x_{k-1} | x_k, x_0) down to x_1; no sites with `t`, where the model has whole terms."""
        if t is not None:
            return
        x_0, table = self._observed(batch), self._table
        with batch.plate():
            x = pyro.sample(
                f"x_{self.num_steps}", self._normal(table.alpha[-1].to(x_0) * x_0, table.sigma[-1].to(x_0))
            )
            for k in range(self.num_steps, 1, -1):
                loc = table.on_x_t[k - 1].to(x) * x + table.on_x_0[k - 1].to(x) * x_0
                x = pyro.sample(f"x_{k - 1}", self._normal(loc, table.guide_variance[k - 1].to(x).sqrt()))

    def _normal(self, loc: Tensor, scale: Tensor) -> Any:
        return dist.Normal(loc, scale.expand_as(loc)).to_event(len(self.event_shape))

    def _collapsed(self, x_0: Tensor, k: Tensor, weight: Tensor | None) -> None:
        """All terms as one factor, each in closed form given x_k, which is drawn outside Pyro's accounting."""
        lost = self.step_term(x_0, k) * (len(self.steps()) if weight is None else weight)
        for term in self.end_terms(x_0).values():
            lost = lost + term
        pyro.factor("bound", -lost)

    def _observed(self, batch: Batch) -> Tensor:
        if "x" not in batch.data:
            raise InputError(
                f"The guide q(x_1..x_T | x_0) of {describe(self)} needs the site 'x' observed: data={{'x': ...}}."
            )
        return batch.data["x"]

    # --- the terms of the bound ----------------------------------------------------------------------------------

    def steps(self) -> range:
        """2..T; from 1 where the last step needs the network too."""
        return range(1 if self.last_step == "x0hat" else 2, self.num_steps + 1)

    def step_probabilities(self) -> Tensor:
        """Proportional to the KL's factor on |x_0 - x0hat|^2 times the error of data of unit variance, 1/(1 + SNR).

        Drawn uniformly, the last few steps carry nearly all of the bound and of its gradient's variance.
        """
        return self._step_probabilities

    def _proportional_to_kl(self) -> Tensor:
        table = self._table
        error = table.sigma.square() / (table.alpha.square() + table.sigma.square())
        weight = (
            (table.on_x_0.square() / table.model_variance * error).reshape(self.num_steps, -1).mean(1)[1:]
        )
        if self.last_step == "x0hat":
            weight = torch.cat((weight[:1], weight))
        return weight / weight.sum()

    def step_term(self, x_0: Tensor, k: Tensor) -> Tensor:
        """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) for k >= 2 and -log p(x_0 | x_1) for k = 1, at one x_k ~ q."""
        at = self._rows(k, x_0)
        x_k = at.alpha * x_0 + at.sigma * torch.randn_like(x_0)
        error = (x_0 - at.on_x * x_k - at.on_output * self.predict(x_k, at.times)).square()
        variance = self._variance(at, k)
        ratio = at.guide_variance / variance
        constant = ratio - 1 - ratio.log()
        if self.last_step == "x0hat":  # at k = 1 q is x_0 itself, on_x_0 = 1, and p's scale is s
            first = over_event(k, x_0) == 1
            last = torch.exp(2 * self.log_last_scale)
            variance = torch.where(first, last, variance)
            constant = torch.where(first, torch.log(2 * math.pi * last), constant)
        return 0.5 * (constant + at.on_x_0.square() / variance * error).flatten(1).sum(1)

    def end_terms(self, x_0: Tensor) -> Mapping[str, Tensor]:
        """KL(q(x_T | x_0) || p(x_T)), and -E log p(x_0 | x_1) where x_1 itself is the mean."""
        alpha, sigma = self._table.alpha.to(x_0), self._table.sigma.to(x_0)
        start = self._start_scale.to(x_0)
        variance = (sigma[-1] / start).square()
        prior = 0.5 * ((alpha[-1] / start * x_0).square() + variance - 1 - variance.log())
        terms = {f"x_{self.num_steps}": prior.flatten(1).sum(1)}
        if self.last_step == "x1":
            error = ((1 - alpha[0]) * x_0).square() + sigma[0].square()
            last = torch.exp(2 * self.log_last_scale)
            terms["x"] = 0.5 * (torch.log(2 * math.pi * last) + error / last).flatten(1).sum(1)
        return terms

    def _variance(self, at: ChainTable, k: Tensor) -> Tensor:
        """The variance of p(x_{k-1} | x_k) at the steps k of these rows."""
        return at.model_variance

    def _rows(self, k: Tensor, x: Tensor) -> ChainTable:
        """Rows k `(batch,)`, shaped to broadcast over x `(batch, *event)`, on its device and in its dtype."""
        key = (x.device, x.dtype)
        if (
            key not in self._cast
        ):  # side by side, so that all are looked up at once: many small look-ups cost more
            self._cast[key] = self._table.times.to(x), torch.stack(self._table[1:], dim=1).to(x)
        times, columns = self._cast[key]
        return ChainTable(times[k - 1], *(over_event(column, x) for column in columns[k - 1].unbind(1)))

    # --- what engines use ----------------------------------------------------------------------------------------

    def _predict_any(self, x_t: Tensor, t: Tensor) -> Tensor:
        flat = x_t.reshape(-1, *self.event_shape)
        return self.predict(flat, t.to(flat).reshape(1)).reshape(x_t.shape)

    def reverse_chain(self) -> ReverseChain:
        """Coefficients of x_{k-1} = A x_k + B output + S z for k = T..1, float64."""
        table = self._table
        on_x = table.on_x_t + table.on_x_0 * table.on_x
        on_output = table.on_x_0 * table.on_output
        scale = self._variance(table, torch.arange(1, self.num_steps + 1)).sqrt()
        scale[0] = self.log_last_scale.double().exp().item()
        if self.last_step == "x1":
            on_x[0], on_output[0] = 1.0, 0.0
        return ReverseChain(
            table.times.flip(0), on_x.flip(0), on_output.flip(0), scale.flip(0), self._start_scale
        )

    # --- constants set from data ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set s to its optimum from data x `(n, *event)`."""
        if self.last_step == "x1":
            alpha, sigma = self._table.alpha[0].to(x), self._table.sigma[0].to(x)
            last = (((1 - alpha) * x).square() + sigma.square()).mean()
        else:
            last = self._denoising_error(x, torch.ones(len(x), dtype=torch.long, device=x.device)).mean()
        self.log_last_scale.copy_(0.5 * last.log())

    def _denoising_error(self, x_0: Tensor, k: Tensor) -> Tensor:
        """|x_0 - x0hat(x_k)|^2/d at one x_k ~ q(x_k | x_0)."""
        at = self._rows(k, x_0)
        x_k = at.alpha * x_0 + at.sigma * torch.randn_like(x_0)
        return (x_0 - self.denoise(x_k, at.times)).square().flatten(1).mean(1)

    def _initial_last_scale(self) -> Tensor:
        """s for data of unit second moment."""
        alpha, sigma = self._table.alpha[0], self._table.sigma[0]
        return ((1 - alpha).square() + sigma.square()).mean().sqrt().to(torch.get_default_dtype())
