"""Oracle: a finite data set as a law, exact at every noise level: what a network that memorises would learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.core import Batch, InputError, UnsupportedError, check_finite
from probgen.processes import VP, Process
from probgen.recorded import Recorded

_CELLS = 2**22  # pairs of a noisy point and a datum that are looked at together


class Empirical(Recorded):
    """p(x_0) = 1/n sum_i delta(x_0 - x^i), the law of a data set's rows. Site "x" `(*event)`.

    Noised by a process it is p_t(x) = 1/n sum_i N(x; alpha x^i, sigma^2), whose denoiser and score are averages over
    the data by their posterior weights w_i = P(x_0 = x^i | x_t): E[x_0 | x_t] = sum_i w_i x^i and
    grad log p_t(x) = sum_i w_i grad log q(x | x^i). It minimises every denoising objective on these data, and engines
    that follow it give the data back: the optimum that a network must miss to generalise. A diffusion with an exact
    denoiser and no weights; calculations are in float64, in chunks.

    Args:
        data: rows x^i, `(n, *event)`, floating point.
        process: any noising law.

    Raises:
        InputError: no rows, integers, NaN or Inf.
        UnsupportedError: by every method, at a t where sigma(t) = 0.

    Source: Karras et al. (2022), arXiv 2206.00364, appendix B.3.

    >>> oracle = Empirical(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    >>> oracle.denoise(torch.tensor([[0.9, 1.9]]), torch.tensor([0.01]))
    tensor([[1., 2.]])
    """

    paper: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364"
    offers: ClassVar[str] = "the exact score of noised data, whatever they are; no fit"
    gives_up: ClassVar[str] = "anything new: its draws are the data; a call reads all of them"
    data: Tensor

    def __init__(self, data: Tensor, process: Process = VP()) -> None:  # noqa: B008 - frozen
        super().__init__()
        if data.ndim == 0 or len(data) == 0 or not data.is_floating_point():
            raise InputError(
                f"Empirical: data must be floating point rows (n, *event), n >= 1, got {data.dtype} of shape "
                f"{tuple(data.shape)}."
            )
        check_finite("Empirical's data", data)
        self.register_buffer("data", data)
        self.event_shape = tuple(data.shape[1:])
        self._process = process

    def model(self, batch: Batch) -> Tensor:
        """A row for each row of the batch, all of them equally likely."""
        logits = torch.zeros(len(self.data), device=self.data.device)
        with batch.plate():
            row = pyro.sample("row", dist.Categorical(logits=logits))
            return pyro.sample("x", dist.Delta(self.data[row], event_dim=len(self.event_shape)))

    def process(self) -> Process:
        """The noising law."""
        return self._process

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] = sum_i w_i x^i: x_t `(batch, *event)`, t `(batch,)` or `(1,)` -> `(batch, *event)`."""
        rows = self._rows()
        means = [log_joint.softmax(1) @ rows for _, _, _, log_joint in self._chunks(x_t, t)]
        return torch.cat(means).reshape(x_t.shape).to(x_t)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = (alpha E[x_0 | x_t] - x_t)/sigma^2, `(batch, *event)`."""
        rows = self._rows()
        scores = [
            (alpha * (log_joint.softmax(1) @ rows) - x) / sigma.square()
            for x, alpha, sigma, log_joint in self._chunks(x_t, t)
        ]
        return torch.cat(scores).reshape(x_t.shape).to(x_t)

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """log p_t(x) in nats: x `(batch, *event)`, t `(batch,)` or `(1,)` -> `(batch,)`.

        Raises `UnsupportedError` without t: points have no density.
        """
        if t is None:
            raise UnsupportedError("A data set has no density of its own: ask for log_prob(x, t) at a t > 0.")
        return torch.cat([log_joint.logsumexp(1) for *_, log_joint in self._chunks(x, t)]).to(x)

    def _rows(self) -> Tensor:
        return self.data.reshape(len(self.data), -1).double()

    def _chunks(self, x: Tensor, t: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows of x flat, alpha and sigma `(rows, d)`, and log 1/n N(x; alpha x^i, sigma^2) `(rows, n)`, float64."""
        rows = self._rows()
        squares, flat = rows.square(), x.reshape(len(x), -1).double()
        alpha, sigma = (_flat(value, flat) for value in (self._process.alpha(t), self._process.sigma(t)))
        if not bool((sigma > 0).all()):
            raise UnsupportedError(
                "Empirical: where sigma(t) = 0 the law is points, which have neither a density nor a score. What can "
                f"be asked for is any t with noise, such as t >= {self._process.t_min:g}."
            )
        size = max(1, _CELLS // len(rows))
        for x_c, a, s in zip(flat.split(size), alpha.split(size), sigma.split(size), strict=True):
            precision = s.square().reciprocal()
            on_pairs = (x_c * a * precision) @ rows.mT - 0.5 * (a.square() * precision) @ squares.mT
            alone = (0.5 * x_c.square() * precision + s.log()).sum(1, keepdim=True)
            constant = 0.5 * math.log(2 * math.pi) * rows.shape[1] + math.log(len(rows))
            yield x_c, a, s, on_pairs - alone - constant


def _flat(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient `(batch or 1,)` or `(batch or 1, *event)` as `(batch, d)`."""
    return value.reshape(len(value), -1).to(x).expand_as(x)


def example() -> Empirical:
    """Five points of the plane."""
    return Empirical(torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, -1.0], [-1.5, 1.0], [0.3, 0.0]]))
