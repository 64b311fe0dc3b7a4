"""Oracle: a Gaussian mixture, exact at every noise level: density, score, denoiser, posterior and evidence."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.core import Batch, InputError, check_alike, check_covariance
from probgen.models.conjugate_gaussian import updated_covariance
from probgen.processes import VP, Process
from probgen.recorded import Recorded


class GaussianMixture(Recorded):
    """p(x) = sum_k w_k N(x; m_k, S_k), known at every noise level.

    Noised by a process it is p_t(x) = sum_k w_k N(x; alpha m_k, alpha^2 S_k + sigma^2 I): a diffusion with a perfect
    denoiser. Called as `mixture(x_t, t)` it is a network that predicts x_0. In the eigenbasis of S_k, found once, the
    law of each component is diagonal at any t. Site "x" `(d,)`.

    Args:
        weights: w, `(K,)`, positive, summing to 1.
        locs: m, `(K, d)`.
        covariances: S, `(K, d, d)`, symmetric, positive definite.
        process: the noising law, with alpha and sigma one number a time.

    Raises:
        InputError: shapes or values out of range.

    Source: Robbins (1956) and Efron (2011), doi 10.1198/jasa.2011.tm11181, for the denoiser (Tweedie's formula).

    >>> mixture = GaussianMixture.example(dim=2)
    >>> x = mixture.model(Batch(num_rows=5))
    >>> mixture.score(x, torch.tensor([0.3])).shape, mixture.log_prob(x).shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    paper: ClassVar[str] = "Efron 2011, doi 10.1198/jasa.2011.tm11181"
    offers: ClassVar[str] = "exact density, score, denoiser, posterior and draws"
    gives_up: ClassVar[str] = "flexibility: the number of components grows fast with the dimension"
    takes_one_time: ClassVar[bool] = True  # as a network
    weights: Tensor
    locs: Tensor
    covariances: Tensor
    scale_trils: Tensor
    eigenvalues: Tensor
    axes: Tensor
    centres: Tensor

    def __init__(
        self,
        weights: Tensor,
        locs: Tensor,
        covariances: Tensor,
        process: Process = VP(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        _check(weights, locs, covariances)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        tensors = {
            "weights": weights,
            "locs": locs,
            "covariances": covariances,
            "scale_trils": torch.linalg.cholesky(covariances),
            "eigenvalues": eigenvalues,
            # The eigenvectors of all components side by side: one matmul takes x to every eigenbasis.
            "axes": eigenvectors.permute(1, 0, 2).flatten(1).contiguous(),
            "centres": torch.einsum("kd,kde->ke", locs, eigenvectors),
        }
        for name, value in tensors.items():
            self.register_buffer(name, value)
        self.event_shape = (locs.shape[1],)
        self._process = process

    @classmethod
    def example(cls, dim: int = 2, process: Process = VP()) -> GaussianMixture:  # noqa: B008 - frozen
        """Three unequal components with full covariances, about unit scale, float64; nothing symmetric."""
        generator = torch.Generator().manual_seed(dim)
        roots = torch.randn(3, dim, dim, dtype=torch.float64, generator=generator) / math.sqrt(dim)
        widths = torch.tensor([0.06, 0.15, 0.3], dtype=torch.float64)[:, None, None]
        covariances = widths * (roots @ roots.mT + 0.3 * torch.eye(dim, dtype=torch.float64))
        directions = torch.randn(3, dim, dtype=torch.float64, generator=generator)
        radii = torch.tensor([1.6, 1.2, 2.0], dtype=torch.float64)[:, None]
        locs = radii * directions / directions.norm(dim=1, keepdim=True) + 0.3
        return cls(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), locs, covariances, process)

    # --- the law of the data ------------------------------------------------------------------------------------

    def model(self, batch: Batch) -> Tensor:
        """x ~ p for each row."""
        components = dist.MultivariateNormal(self.locs, scale_tril=self.scale_trils)
        with batch.plate():
            return pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(self.weights), components))

    @property
    def mean(self) -> Tensor:
        """E[x], `(d,)`."""
        return self.weights @ self.locs

    @property
    def covariance(self) -> Tensor:
        """Cov[x], `(d, d)`."""
        centred = self.locs - self.mean
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + (self.weights[:, None] * centred).mT @ centred

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """log p_t(x) in nats: x `(batch, d)`, t `(batch,)` or `(1,)`, None for the data -> `(batch,)`."""
        return self._in_eigenbases(x, t).log_joint.logsumexp(0)

    def responsibilities(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """P(component | x_t = x): `(batch, K)`."""
        return self._in_eigenbases(x, t).log_joint.softmax(0).mT

    # --- diffusion ----------------------------------------------------------------------------------------------

    def process(self) -> Process:
        """The noising law."""
        return self._process

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] = sum_k r_k (m_k + alpha S_k (alpha^2 S_k + sigma^2 I)^-1 (x_t - alpha m_k))."""
        at = self._in_eigenbases(x_t, t)
        weights = at.log_joint.softmax(0)
        gain = at.alpha * self.eigenvalues[..., None] * at.inverse_scale
        return weights.mT @ self.locs + self._from_eigenbases(gain, at.whitened * weights[:, None])

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The same as `denoise`: a network that predicts x_0."""
        return self.denoise(x_t, t)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t): x_t `(batch, d)`, t `(batch,)` or `(1,)` -> `(batch, d)`."""
        at = self._in_eigenbases(x_t, t)
        weights = at.log_joint.softmax(0)
        return -self._from_eigenbases(at.inverse_scale, at.whitened * weights[:, None])

    # Inside, the batch comes last, (K, d, batch): sums over components and coordinates then run along the memory.

    def _in_eigenbases(self, x: Tensor, t: Tensor | None) -> _InEigenbases:
        alpha, sigma2 = self._noise(x, t)
        inverse_scale = (alpha.square() * self.eigenvalues[..., None] + sigma2).rsqrt()
        whitened = self._to_eigenbases(x, inverse_scale, alpha * self.centres[..., None])
        log_norm = self.weights.log()[:, None] + (inverse_scale.log() - 0.5 * math.log(2 * math.pi)).sum(1)
        return _InEigenbases(alpha, inverse_scale, whitened, log_norm - 0.5 * whitened.square().sum(1))

    def _to_eigenbases(self, x: Tensor, factor: Tensor, centre: Tensor) -> Tensor:
        """factor_k (U_k' x - centre_k): x `(batch, d)`, the others `(K, d, batch or 1)` -> `(K, d, batch)`."""
        if factor.shape[-1] == 1:  # one time for all: scale the matrix instead of the batch
            flat = torch.addmm(-(factor * centre).flatten(0, 1), self.axes.mT * factor.flatten(0, 1), x.mT)
            return flat.unflatten(0, self.eigenvalues.shape)
        return factor * ((self.axes.mT @ x.mT).unflatten(0, self.eigenvalues.shape) - centre)

    def _from_eigenbases(self, factor: Tensor, offset: Tensor) -> Tensor:
        """sum_k U_k (factor_k offset_k): factor `(K, d, batch or 1)`, offset `(K, d, batch)` -> `(batch, d)`."""
        if factor.shape[-1] == 1:
            return offset.flatten(0, 1).mT @ (self.axes.mT * factor.flatten(0, 1))
        return (offset * factor).flatten(0, 1).mT @ self.axes.mT

    def _noise(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha and sigma^2 at t, `(batch,)` or `(1,)`."""
        if t is None:
            return x.new_ones(1), x.new_zeros(1)
        alpha, sigma2 = self._process.alpha(t), self._process.sigma(t).square()
        if alpha.ndim != 1:
            raise InputError(
                f"GaussianMixture needs a process with one alpha a time, got alpha of shape {tuple(alpha.shape)} at t "
                f"of shape {tuple(t.shape)}: t must be (batch,) or (1,), and laws that differ by coordinate have no "
                "eigenbasis here."
            )
        return alpha, sigma2

    # --- inverse problems ---------------------------------------------------------------------------------------

    def posterior(self, y: Tensor, operator: Tensor, noise_scale: float | Tensor) -> GaussianMixture:
        """p(x | y) where y = A x + noise, noise ~ N(0, noise_scale^2): again a mixture, with the same process.

        Args:
            y: the observation, `(m,)`.
            operator: A, `(m, d)`.
            noise_scale: standard deviation of the noise, > 0, a number or `(m,)`.

        >>> mixture = GaussianMixture.example()
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> sharp = mixture.posterior(mixture.mean, eye, noise_scale=1e-6)
        >>> bool(torch.allclose(sharp.mean, mixture.mean, atol=1e-5))
        True
        """
        cross, noise, observed = self._observed(operator, noise_scale)
        log_joint = self.weights.log() + observed.log_prob(y)
        gain = torch.linalg.solve(observed.covariance_matrix, cross.mT).mT
        locs = self.locs + (gain @ (y - observed.loc)[..., None]).squeeze(-1)
        covariances = updated_covariance(self.covariances, gain, operator, noise)
        return GaussianMixture(log_joint.softmax(-1), locs, covariances, self._process)

    def evidence(self, y: Tensor, operator: Tensor, noise_scale: float | Tensor) -> Tensor:
        """log p(y) in nats, y `(..., m)` -> `(...)`; arguments as for `posterior`."""
        _, _, observed = self._observed(operator, noise_scale)
        return (self.weights.log() + observed.log_prob(y[..., None, :])).logsumexp(-1)

    def _observed(
        self, operator: Tensor, noise_scale: float | Tensor
    ) -> tuple[Tensor, Tensor, dist.MultivariateNormal]:
        """S_k A', the covariance of the noise, and the law of y under each component."""
        if operator.ndim != 2 or operator.shape[1] != self.event_shape[0]:
            raise InputError(f"operator must be (m, {self.event_shape[0]}), got {tuple(operator.shape)}.")
        scale = torch.as_tensor(noise_scale).to(operator).expand(len(operator))
        if not bool((scale > 0).all()):
            raise InputError(f"noise_scale must be > 0, got {noise_scale!r}.")
        noise, cross = scale.square().diag(), self.covariances @ operator.mT
        return cross, noise, dist.MultivariateNormal(self.locs @ operator.mT, operator @ cross + noise)


class _InEigenbases(NamedTuple):
    """x in the eigenbasis of each component's law at t, in its standard deviations; log w_k N_k(x), `(K, batch)`."""

    alpha: Tensor
    inverse_scale: Tensor
    whitened: Tensor
    log_joint: Tensor


def _check(weights: Tensor, locs: Tensor, covariances: Tensor) -> None:
    if (
        locs.ndim != 2
        or 0 in locs.shape
        or weights.shape != locs.shape[:1]
        or covariances.shape != (*locs.shape, locs.shape[1])
    ):
        raise InputError(
            "GaussianMixture needs weights (K,), locs (K, d) and covariances (K, d, d), got "
            f"{tuple(weights.shape)}, {tuple(locs.shape)} and {tuple(covariances.shape)}."
        )
    check_alike("GaussianMixture", {"weights": weights, "locs": locs, "covariances": covariances})
    if not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-4:
        raise InputError(f"GaussianMixture: weights must be positive and sum to 1, got {weights.tolist()}.")
    check_covariance("GaussianMixture: covariances", covariances)


def example() -> GaussianMixture:
    """Three unequal components on the plane."""
    return GaussianMixture.example()
