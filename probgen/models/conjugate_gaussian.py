"""Oracle: a linear-Gaussian latent variable model, whose posterior and evidence are exact."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.core import Batch, InputError, check_alike, check_covariance
from probgen.recorded import Recorded


class ConjugateGaussian(Recorded):
    """z ~ N(m, P), x | z ~ N(A z + b, S), one z for each datum; the guide is the exact posterior.

    log p(x) = log N(x; A m + b, A P A' + S), and p(z | x) = N(m + K (x - A m - b), P - K A P) with
    K = P A' (A P A' + S)^-1. Sites "z" `(latent_dim,)` and "x" `(d,)`.

    Args:
        prior_loc: m, `(latent_dim,)`.
        prior_covariance: P, `(latent_dim, latent_dim)`, positive definite.
        weight: A, `(d, latent_dim)`.
        bias: b, `(d,)`.
        noise_covariance: S, `(d, d)`, positive definite.

    Raises:
        InputError: shapes that do not fit together.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, section 2.3.3.

    >>> program = ConjugateGaussian.example()
    >>> x = program.model(Batch(num_rows=5))
    >>> program.posterior(x).mean.shape, program.log_prob(x).shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    paper: ClassVar[str] = "Bishop 2006, section 2.3.3"
    offers: ClassVar[str] = "exact density, exact posterior, exact draws"
    gives_up: ClassVar[str] = "anything that is not linear and Gaussian"
    prior_loc: Tensor
    prior_scale_tril: Tensor
    weight: Tensor
    bias: Tensor
    noise_scale_tril: Tensor
    gain: Tensor
    posterior_scale_tril: Tensor
    marginal_scale_tril: Tensor

    def __init__(
        self,
        prior_loc: Tensor,
        prior_covariance: Tensor,
        weight: Tensor,
        bias: Tensor,
        noise_covariance: Tensor,
    ) -> None:
        super().__init__()
        if weight.ndim != 2 or 0 in weight.shape:
            raise InputError(
                f"ConjugateGaussian: weight must be `(d, latent)`, got shape {tuple(weight.shape)}."
            )
        d, latent_dim = weight.shape
        expected = [(latent_dim,), (latent_dim, latent_dim), (d,), (d, d)]
        got = [tuple(value.shape) for value in (prior_loc, prior_covariance, bias, noise_covariance)]
        if got != expected:
            raise InputError(
                f"ConjugateGaussian: a weight of shape {(d, latent_dim)} needs prior_loc, prior_covariance, bias and "
                f"noise_covariance of shapes {expected}, got {got}."
            )
        given = {"prior_loc": prior_loc, "weight": weight, "bias": bias}
        covariances = {"prior_covariance": prior_covariance, "noise_covariance": noise_covariance}
        check_alike("ConjugateGaussian", given | covariances)
        for name, value in covariances.items():
            check_covariance(f"ConjugateGaussian: {name}", value)
        self.event_shape, self.latent_dim = (d,), latent_dim
        marginal = weight @ prior_covariance @ weight.mT + noise_covariance
        check_covariance("ConjugateGaussian: weight prior_covariance weight' + noise_covariance", marginal)
        gain = torch.linalg.solve(marginal, weight @ prior_covariance).mT
        tensors = {
            "prior_loc": prior_loc,
            "prior_scale_tril": torch.linalg.cholesky(prior_covariance),
            "weight": weight,
            "bias": bias,
            "noise_scale_tril": torch.linalg.cholesky(noise_covariance),
            "gain": gain,
            "posterior_scale_tril": torch.linalg.cholesky(
                updated_covariance(prior_covariance, gain, weight, noise_covariance)
            ),
            "marginal_scale_tril": torch.linalg.cholesky(marginal),
        }
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @classmethod
    def example(cls) -> ConjugateGaussian:
        """Two correlated latents seen through three noisy, correlated coordinates, float64; nothing symmetric."""
        as_tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731
        return cls(
            prior_loc=as_tensor([1.0, -0.5]),
            prior_covariance=as_tensor([[1.5, 0.6], [0.6, 0.8]]),
            weight=as_tensor([[1.0, 0.3], [-0.7, 1.2], [0.4, 0.1]]),
            bias=as_tensor([0.2, -1.0, 0.5]),
            noise_covariance=as_tensor([[0.5, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.9]]),
        )

    def model(self, batch: Batch) -> Tensor:
        """z ~ N(m, P), x ~ N(A z + b, S) for each row."""
        with batch.plate():
            z = pyro.sample("z", dist.MultivariateNormal(self.prior_loc, scale_tril=self.prior_scale_tril))
            law = dist.MultivariateNormal(self.decode(z), scale_tril=self.noise_scale_tril)
            return pyro.sample("x", law)

    def guide(self, batch: Batch) -> Tensor:
        """z ~ p(z | x), exactly."""
        with batch.plate():
            return pyro.sample("z", self.posterior(batch.data["x"]))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] = A z + b: z `(..., latent_dim)` -> `(..., d)`."""
        return z @ self.weight.mT + self.bias

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z | x): x `(..., d)`."""
        loc = self.prior_loc + (x - self.decode(self.prior_loc)) @ self.gain.mT
        return dist.MultivariateNormal(loc, scale_tril=self.posterior_scale_tril)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats: x `(..., d)` -> `(...)`."""
        law = dist.MultivariateNormal(self.decode(self.prior_loc), scale_tril=self.marginal_scale_tril)
        return law.log_prob(x)


def updated_covariance(
    covariance: Tensor, gain: Tensor, operator: Tensor, noise_covariance: Tensor
) -> Tensor:
    """(I - K A) P (I - K A)' + K S K', which rounding leaves positive definite where P - K A P may not be.

    Args:
        covariance: P, `(..., d, d)`.
        gain: K = P A' (A P A' + S)^-1, `(..., d, m)`.
        operator: A, `(m, d)`.
        noise_covariance: S, `(m, m)`.

    Source: Bucy & Joseph (1968), Filtering for Stochastic Processes.
    """
    rest = torch.eye(covariance.shape[-1]).to(covariance) - gain @ operator
    return rest @ covariance @ rest.mT + gain @ noise_covariance @ gain.mT


def example() -> ConjugateGaussian:
    """Two latents seen through three coordinates."""
    return ConjugateGaussian.example()
