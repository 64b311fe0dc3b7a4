"""Oracle: the diffusion chain of Gaussian data, whose likelihood and bound follow by recursion."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.chained import LastStep
from probgen.core import Batch, InputError, did_you_mean
from probgen.dynamics.fields import Steps
from probgen.models.ddpm import ReverseVariance
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import VP, Process
from probgen.recorded import Recorded


class GaussianChain(Recorded):
    """p_theta(x_0) of a T-step diffusion chain whose network is the exact denoiser of data N(m, S).

    Every step is linear and Gaussian, so in the eigenbasis of S each coordinate follows a scalar recursion:
    p_theta(x_0) is a Gaussian known exactly, and so are the ELBO of each datum, its terms, and both gaps in

        E[log q(x_0)] - E[ELBO] = model_gap + inference_gap,    under the data's law q(x_0) = N(m, S),
        model_gap = KL(q(x_0) || p_theta(x_0)),   inference_gap = E[KL(q(x_{1:T} | x_0) || p_theta(x_{1:T} | x_0))].

    With data of variance 1/4, `VP()`, T = 1000 and the last step at x_1 their sum is 0.4434, 0.0013, 0.0002 nats a
    dimension for the three variances; with "posterior" it tends to gamma/2 = 0.2886 as T grows. Site "x" `(d,)`, of
    law p_theta; called as `chain(x_t, t)` it is a network that predicts x_0.

    Args:
        loc: m, `(d,)`.
        covariance: S, `(d, d)`, positive definite.
        process: variance-preserving noising law; p(x_T) = N(0, I).
        num_steps: T >= 1, t_k = k/T.
        reverse_variance: of p(x_{k-1} | x_k): "posterior" beta~_k, "beta" beta_k, or "analytic",
            beta~_k + c_0^2 tr Cov[x_0 | x_k]/d, with c_0 the factor on x_0 in the mean of q(x_{k-1} | x_k, x_0).
        last_step: mean of p(x_0 | x_1) = N(., s^2 I), x_1 ("x1") or E[x_0 | x_1] ("x0hat"); s^2 = E|x_0 - mean|^2/d.

    Raises:
        InputError: unknown options, T < 1, or a loc and covariance of other shapes.

    Source: Ho et al. (2020), arXiv 2006.11239; Bao et al. (2022), arXiv 2201.06503.

    >>> chain = GaussianChain.example(num_steps=10)
    >>> x = chain.model(Batch(num_rows=4))
    >>> bool((chain.log_prob(x) > chain.elbo(x)).all())
    True
    """

    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "exact density and exact bound of a diffusion chain, and what each loses"
    gives_up: ClassVar[str] = "anything but Gaussian data"
    takes_one_time: ClassVar[bool] = True  # as a network
    axes: Tensor
    x0_variance: Tensor
    mean_in_axes: Tensor
    variance_in_axes: Tensor
    constant: Tensor
    linear: Tensor
    quadratic: Tensor

    def __init__(
        self,
        loc: Tensor,
        covariance: Tensor,
        process: Process = VP(),  # noqa: B008 - frozen
        num_steps: Steps = 1000,
        *,
        reverse_variance: ReverseVariance = "analytic",
        last_step: LastStep = "x1",
    ) -> None:
        super().__init__()
        if loc.ndim != 1 or covariance.shape != 2 * loc.shape:
            raise InputError(
                f"GaussianChain needs loc `(d,)` and covariance `(d, d)`, got {tuple(loc.shape)} and "
                f"{tuple(covariance.shape)}."
            )
        self.num_steps, self.event_shape = num_steps, tuple(loc.shape)
        self.data = GaussianMixture(loc.new_ones(1), loc[None], covariance[None], process)
        steps = _Steps(
            self.data.centres[0].double(),
            self.data.eigenvalues[0].double(),
            process,
            num_steps,
            reverse_variance,
            last_step,
        )
        tensors = dict(zip(("mean_in_axes", "variance_in_axes"), steps.marginal(), strict=True))
        tensors["x0_variance"] = steps.x0_variance.squeeze(1)  # tr Cov[x_0 | x_k]/d, `(T,)`
        tensors |= dict(zip(("constant", "linear", "quadratic"), steps.terms(), strict=True))
        for name, value in tensors.items():
            self.register_buffer(name, value.to(loc))
        self.register_buffer("axes", self.data.axes)

    @classmethod
    def example(
        cls,
        process: Process = VP(),  # noqa: B008 - frozen
        num_steps: int = 100,
        *,
        reverse_variance: ReverseVariance = "analytic",
        last_step: LastStep = "x1",
    ) -> GaussianChain:
        """Correlated data in three dimensions, float64; nothing symmetric."""
        loc = torch.tensor([0.7, -0.3, 0.2], dtype=torch.float64)
        root = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.2, 0.3, 0.6]], dtype=torch.float64)
        return cls(
            loc, root @ root.mT, process, num_steps, reverse_variance=reverse_variance, last_step=last_step
        )

    # --- the law of what the chain draws ------------------------------------------------------------------------

    def model(self, batch: Batch) -> Tensor:
        """x ~ p_theta(x_0) for each row, in one draw."""
        law = dist.MultivariateNormal(self.mean, self.covariance)
        with batch.plate():
            return pyro.sample("x", law)

    @property
    def mean(self) -> Tensor:
        """Mean of p_theta(x_0), `(d,)`."""
        return self.axes @ self.mean_in_axes

    @property
    def covariance(self) -> Tensor:
        """Covariance of p_theta(x_0), `(d, d)`."""
        return (self.axes * self.variance_in_axes) @ self.axes.mT

    def log_prob(self, x_0: Tensor) -> Tensor:
        """log p_theta(x_0) in nats: `(batch, d)` -> `(batch,)`."""
        law = dist.Normal(self.mean_in_axes, self.variance_in_axes.sqrt())
        return law.log_prob(x_0 @ self.axes).sum(-1)

    # --- the bound ----------------------------------------------------------------------------------------------

    def terms(self, x_0: Tensor) -> Tensor:
        """Nats lost at each step for each datum, `(batch, T + 1)`; ELBO = -sum of the row.

        Column 0 is KL(q(x_T | x_0) || N(0, I)), column 1 -E log p(x_0 | x_1), column k >= 2
        E KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)), expectations over q(x_k | x_0).
        """
        coordinates = x_0 @ self.axes
        return self._terms(coordinates, coordinates.square())

    def elbo(self, x_0: Tensor) -> Tensor:
        """The evidence lower bound on log p_theta(x_0) in nats: `(batch, d)` -> `(batch,)`."""
        return -self.terms(x_0).sum(-1)

    def expected_terms(self) -> Tensor:
        """`terms` averaged over the data's law, `(T + 1,)`."""
        loc, variance = self._data_in_axes()
        return self._terms(loc, loc.square() + variance)

    def expected_elbo(self) -> float:
        """E[ELBO] over the data's law, nats a datum."""
        return -float(self.expected_terms().sum())

    def expected_log_prob(self) -> float:
        """E[log p_theta(x_0)] over the data's law, nats a datum."""
        return -self._entropy() - self.model_gap

    @property
    def model_gap(self) -> float:
        """E[log q(x_0) - log p_theta(x_0)] = KL(q(x_0) || p_theta(x_0)), nats a datum."""
        loc, variance = self._data_in_axes()
        ratio = variance / self.variance_in_axes
        shift = (loc - self.mean_in_axes).square() / self.variance_in_axes
        return float(0.5 * (ratio - 1 - ratio.log() + shift).sum())

    @property
    def inference_gap(self) -> float:
        """E[log p_theta(x_0) - ELBO] over the data's law, nats a datum."""
        return self.expected_log_prob() - self.expected_elbo()

    def _terms(self, first: Tensor, second: Tensor) -> Tensor:
        """The terms, which are linear in first and second moments `(..., d)` of the coordinates."""
        return self.constant + first @ self.linear.mT + second @ self.quadratic.mT

    def _data_in_axes(self) -> tuple[Tensor, Tensor]:
        return self.data.centres[0], self.data.eigenvalues[0]

    def _entropy(self) -> float:
        variance = self.data.eigenvalues[0]
        return float(0.5 * (2 * math.pi * math.e * variance).log().sum())

    # --- diffusion ----------------------------------------------------------------------------------------------

    def process(self) -> Process:
        """The noising law."""
        return self.data.process()

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] for data N(m, S): x_t `(batch, d)`, t `(batch,)` or `(1,)`."""
        return self.data.denoise(x_t, t)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The same as `denoise`: a network that predicts x_0."""
        return self.denoise(x_t, t)


class _Steps:
    """The chain in one eigenbasis, float64: row k - 1 is step k, columns are coordinates.

    x0hat = on_x x_k + offset, and p(x_{k-1} | x_k) = N(c_x x_k + c_0 x0hat, variance); at k = 1 the mean is the
    last step's own, which has the same form.
    """

    def __init__(
        self,
        loc: Tensor,
        data_variance: Tensor,
        process: Process,
        num_steps: int,
        reverse_variance: ReverseVariance,
        last_step: LastStep,
    ) -> None:
        t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha, sigma2 = process.alpha(t)[:, None], process.sigma(t)[:, None].square()
        self.alpha, self.sigma2 = alpha[1:], sigma2[1:]
        on_x = self.alpha * data_variance / (self.alpha.square() * data_variance + self.sigma2)
        self.x0_variance = ((1 - on_x * self.alpha) * data_variance).mean(1, keepdim=True)
        c_x, c_0, bridge_variance = (c[:, None] for c in process.bridge_coefficients(t[:-1], t[1:]))
        variances = {
            "posterior": bridge_variance,
            "beta": self.sigma2 - (self.alpha / alpha[:-1]).square() * sigma2[:-1],
            "analytic": bridge_variance + c_0.square() * self.x0_variance,
        }
        if reverse_variance not in variances:
            raise InputError(
                f"Unknown reverse_variance {reverse_variance!r}; {did_you_mean(reverse_variance, variances)}"
            )
        self.on_x, self.offset = on_x, loc * (1 - on_x * self.alpha)
        self.c_x, self.c_0, self.bridge_variance = c_x, c_0, bridge_variance
        self.variance = variances[reverse_variance].clone()
        self._set_last_step(last_step, loc, data_variance)

    def _set_last_step(self, last_step: LastStep, loc: Tensor, data_variance: Tensor) -> None:
        if last_step not in ("x1", "x0hat"):
            raise InputError(f"Unknown last_step {last_step!r}; {did_you_mean(last_step, ('x1', 'x0hat'))}")
        if last_step == "x1":
            self.on_x[0], self.offset[0] = 1.0, 0.0
        self.c_x[0], self.c_0[0] = 0.0, 1.0
        constant, linear, quadratic = (row[0] for row in self._squared_error())
        error = constant + linear * loc + quadratic * (loc.square() + data_variance)
        self.variance[0] = error.mean()

    def _squared_error(self) -> tuple[Tensor, Tensor, Tensor]:
        """E_q(x_k | x_0) (x_0 - x0hat)^2 as constant, linear and quadratic coefficients in x_0."""
        slope = 1 - self.on_x * self.alpha
        constant = self.offset.square() + self.on_x.square() * self.sigma2
        return constant, -2 * slope * self.offset, slope.square()

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """What each step loses, as constant `(T + 1,)`, linear and quadratic `(T + 1, d)` coefficients in x_0."""
        per_error = 0.5 * self.c_0.square() / self.variance
        constant, linear, quadratic = (per_error * part for part in self._squared_error())
        ratio = self.bridge_variance / self.variance
        spread = 0.5 * (ratio - 1 - ratio.log())
        spread[0] = 0.5 * (2 * math.pi * self.variance[0]).log()
        alpha2, sigma2 = self.alpha[-1].square(), self.sigma2[-1]
        prior = 0.5 * (sigma2 - 1 - sigma2.log())
        d = constant.shape[1]
        return (
            torch.cat((d * prior, (spread + constant).sum(1))),
            torch.cat((torch.zeros_like(linear[:1]), linear)),
            torch.cat(((0.5 * alpha2).expand(1, d), quadratic)),
        )

    def marginal(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of p_theta(x_0), from N(0, 1) down the chain."""
        factors, shifts = self.c_x + self.c_0 * self.on_x, self.c_0 * self.offset
        passed = torch.cat(
            (torch.ones_like(factors[:1]), factors.cumprod(0))
        )  # what step k adds reaches x_0 so scaled
        mean = (shifts * passed[:-1]).sum(0)
        return mean, passed[-1].square() + (self.variance * passed[:-1].square()).sum(0)


def example() -> GaussianChain:
    """A hundred steps on correlated data in three dimensions."""
    return GaussianChain.example()
