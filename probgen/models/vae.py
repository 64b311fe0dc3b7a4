"""Variational autoencoder: p(z) p(x | z) with an amortised guide q(z | x).

The networks only compute numbers; small replaceable *heads* make laws of them: a likelihood turns the decoder's output
into p(x | z), a posterior turns the encoder's output into q(z | x), a prior gives p(z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.core import Batch, InputError, Positive, Size, shown
from probgen.distributions import DiagonalNormal
from probgen.nets import MLP, GaussianMLP
from probgen.priors.prior import Prior
from probgen.recorded import Recorded, nameable

Law = dist.TorchDistribution


# --- likelihoods: the decoder's output -> p(x | z) ----------------------------------------------------------------


class GaussianLikelihood(Recorded):
    """p(x | z) = N(output, sigma^2), sigma learned with the rest.

    Args:
        scale: sigma before fitting, > 0, in units of the data.
        shape: () for one sigma; the event shape for one of each coordinate, which suits data with constant pixels.

    Source: Rybkin et al. (2021), arXiv 2006.13202.

    >>> GaussianLikelihood(0.5)(torch.zeros(3)).stddev
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<SqrtBackward0>)
    """

    def __init__(self, scale: Positive = 0.5, shape: Sequence[Size] = ()) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full(tuple(shape), float(scale)).log())

    def forward(self, output: Tensor) -> Law:
        return DiagonalNormal(output, self.log_scale.exp())


class BernoulliLikelihood(Recorded):
    """p(x | z) = Bernoulli(sigmoid(output)), for data that are 0 or 1.

    >>> BernoulliLikelihood()(torch.zeros(2)).mean
    tensor([0.5000, 0.5000])
    """

    def forward(self, output: Tensor) -> Law:
        return dist.Bernoulli(logits=output)


# --- posteriors: the encoder's output -> q(z | x) -----------------------------------------------------------------


@nameable
def gaussian_posterior(loc: Tensor, scale: Tensor) -> Law:
    """q(z | x) = N(loc, scale^2), independent over the latent: loc, scale `(rows, latent)`."""
    return dist.Normal(loc, scale).to_event(1)


@nameable
def point_posterior(loc: Tensor, scale: Tensor) -> Law:  # noqa: ARG001 - the signature of every posterior
    """q(z | x) = Delta(loc), the scale unused: with a bound whose beta is 0, an autoencoder."""
    return dist.Delta(loc, event_dim=1)


# --- priors: () -> p(z) -------------------------------------------------------------------------------------------


class StandardNormalPrior(Recorded):
    """p(z) = N(0, I).

    Args:
        latent_dim: length of z.
    """

    zeros: Tensor

    def __init__(self, latent_dim: Size) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> Law:
        return dist.Normal(self.zeros, 1.0).to_event(1)


class MixturePrior(Recorded):
    """p(z) = sum_k w_k N(z; m_k, diag s_k^2), all of it learned.

    Args:
        latent_dim: length of z.
        num_components: number of components.

    Source: Dilokthanakul et al. (2016), arXiv 1611.02648; Tomczak & Welling (2018), arXiv 1705.07120.

    >>> MixturePrior(2, num_components=5)().event_shape
    torch.Size([2])
    """

    def __init__(self, latent_dim: Size, num_components: Size = 10) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self) -> Law:
        components = dist.Normal(self.locs, self.log_scales.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


class FittedPrior(Recorded):
    """p(z) of another program: with a diffusion, latent diffusion.

    Its density must be exact, as that of a diffusion, a flow or a mixture is; then its weights are fitted with the rest
    by the ELBO. Cheaper, and the usual way: fit the VAE first, the program to draws of q(z | x), and set `vae.prior`.

    Args:
        program: of one site "x" with event shape `(latent_dim,)`.

    Source: Vahdat, Kreis & Kautz (2021), arXiv 2106.05931; Rombach et al. (2022), arXiv 2112.10752.

    >>> from probgen.models.score_sde import ScoreSDE
    >>> from probgen.nets import TimeMLP
    >>> prior = FittedPrior(ScoreSDE(TimeMLP((2,), width=8, num_blocks=1)))
    >>> vae = VAE.mlp(event_shape=(3,), latent_dim=2, prior=prior)
    >>> vae.model(Batch(num_rows=5)).shape
    torch.Size([5, 3])
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self) -> Law:
        return Prior(self.program)


# --- programs -----------------------------------------------------------------------------------------------------


def over_rows(net: Callable[..., Any], inputs: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """The outputs of a network that knows one batch dimension, for inputs with any number of them.

    Args:
        net: maps tensors `(rows, *event)` to one such tensor or a tuple of them.
        inputs: each a tensor `(*batch, *event)` with its number of event dimensions; batch shapes broadcast.

    >>> over_rows(nn.Linear(3, 2), [(torch.zeros(7, 5, 3), 1)])[0].shape
    torch.Size([7, 5, 2])
    """
    split = [(x, x.shape[: x.ndim - ndim], x.shape[x.ndim - ndim :]) for x, ndim in inputs]
    shapes = [batch for _, batch, _ in split]
    batch_shape = (
        shapes[0] if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    )  # which costs as much as a layer
    rows = batch_shape.numel()
    outputs = net(*(x.expand(batch_shape + event).reshape((rows, *event)) for x, _, event in split))
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output.reshape(batch_shape + output.shape[1:]) for output in outputs]


def _batch_ndim(inputs: Sequence[tuple[Tensor, int]]) -> int:
    """Number of batch dimensions of what `over_rows` gives for these inputs."""
    return max(x.ndim - ndim for x, ndim in inputs)


class LatentModel(Recorded):
    """What variational autoencoders share: two networks, three heads, and the laws of z and x they make.

    Args:
        event_shape: of one datum.
        latent_dim: length of z.
        encoder: x, and what q(z | x, ...) is conditioned on -> (loc, scale), each `(rows, latent_dim)`.
        decoder: z, and what p(x | z, ...) is conditioned on -> the likelihood's parameter, `(rows, *event_shape)`.
        likelihood: that parameter -> p(x | z); `GaussianLikelihood()` by default.
        prior: () -> p(z), a Pyro distribution of event shape `(latent_dim,)`; N(0, I) by default.
        posterior: (loc, scale) -> q(z | x), `gaussian_posterior` or `point_posterior`.

    Raises:
        InputError: sizes < 1, or a prior of another event shape.
    """

    def __init__(
        self,
        event_shape: Sequence[Size],
        latent_dim: Size,
        encoder: Callable[..., Any],
        decoder: Callable[..., Any],
        *,
        likelihood: Callable[[Tensor], Law] | None = None,
        prior: Callable[[], Law] | None = None,
        posterior: Callable[[Tensor, Tensor], Law] = gaussian_posterior,
    ) -> None:
        super().__init__()
        self.event_shape, self.latent_dim = tuple(event_shape), latent_dim
        self.encoder, self.decoder = encoder, decoder
        self.likelihood = likelihood or GaussianLikelihood()
        self.prior = prior or StandardNormalPrior(latent_dim)
        self.posterior = posterior
        law = self.prior()
        if not hasattr(law, "event_shape"):
            raise InputError(
                f"{type(self).__name__}: prior must be a function () -> law of z; it gave {shown(law)}."
            )
        self._check_shape("prior", "a law of z", tuple(law.event_shape), (latent_dim,))

    def law_of_z(self, x: Tensor, *conditions: Tensor) -> Law:
        """q(z | x, conditions): x `(*batch, *event_shape)`, conditions `(*batch, size)`."""
        self._check_shape("guide", "data at site 'x'", tuple(x.shape), self.event_shape)
        inputs = [(x, len(self.event_shape)), *((c.to(x), 1) for c in conditions)]
        loc, scale = over_rows(self.encoder, inputs)
        self._check_shape("encoder", "a loc", tuple(loc.shape), (self.latent_dim,), _batch_ndim(inputs))
        return self.posterior(loc, scale)

    def law_of_x(self, z: Tensor, *conditions: Tensor) -> Law:
        """p(x | z, conditions): z `(*batch, latent_dim)`, conditions `(*batch, size)`."""
        inputs = [(z, 1), *((c.to(z), 1) for c in conditions)]
        (output,) = over_rows(self.decoder, inputs)
        self._check_shape("decoder", "an output", tuple(output.shape), self.event_shape, _batch_ndim(inputs))
        law = self.likelihood(output)
        if not hasattr(law, "event_shape"):
            raise InputError(
                f"{type(self).__name__}: likelihood must be a function of the decoder's output -> law of x; it gave "
                f"{shown(law)}."
            )
        return law.to_event(len(self.event_shape) - law.event_dim)

    def _check_shape(
        self,
        part: str,
        what: str,
        got: tuple[int, ...],
        event: tuple[int, ...],
        batch_ndim: int | None = None,
    ) -> None:
        """`InputError` unless the event's dimensions, which follow those of the batch where it is known, are these."""
        if got[max(0, len(got) - len(event)) if batch_ndim is None else batch_ndim :] != event:
            raise InputError(
                f"{type(self).__name__}: its {part} has {what} of the wrong shape: expected (..., *{event}), "
                f"got {got}. Reshape the data, or build the networks for event_shape={self.event_shape} "
                f"and latent_dim={self.latent_dim}."
            )


def observed(batch: Batch, site: str, owner: object) -> Tensor:
    """The data at a site that a guide is conditioned on; `InputError` if it was not observed."""
    if site not in batch.data:
        raise InputError(
            f"The guide of {type(owner).__name__} needs site {site!r} observed, got {sorted(batch.data)}. "
            f"Pass data={{{site!r}: ...}}; to simulate, run the model alone."
        )
    return batch.data[site]


class VAE(LatentModel):
    """Variational autoencoder: z ~ p(z), x ~ p(x | decoder(z)); guide q(z | x) from encoder(x).

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)), sites "z" `(latent_dim,)` and "x" `(*event_shape)`.

    Its parts are those of `LatentModel`: `VAE(event_shape, latent_dim, encoder, decoder, likelihood=..., prior=...,
    posterior=...)`; `VAE.mlp` builds the two networks. With `posterior=point_posterior` and a bound whose beta is 0 it
    is an autoencoder.

    Raises:
        InputError: sizes < 1; a prior, network output or datum of another shape.

    Source: Kingma & Welling (2014), arXiv 1312.6114.

    >>> vae = VAE.mlp(event_shape=(1, 8, 8), latent_dim=3)
    >>> vae.decode(torch.zeros(5, 3)).shape
    torch.Size([5, 1, 8, 8])
    """

    paper: ClassVar[str] = "Kingma & Welling 2014, arXiv 1312.6114"
    offers: ClassVar[str] = "one-pass draws, a decoder, and a bound on the density"
    gives_up: ClassVar[str] = "the density itself; draws are as blurred as p(x | z) is factorised"

    @classmethod
    def mlp(
        cls,
        event_shape: Sequence[int],
        latent_dim: int,
        widths: Sequence[int] = (256, 256),
        *,
        likelihood: Callable[[Tensor], Law] | None = None,
        prior: Callable[[], Law] | None = None,
        posterior: Callable[[Tensor, Tensor], Law] = gaussian_posterior,
    ) -> VAE:
        """A VAE of two MLPs with hidden layers of these widths, the decoder's in reverse order."""
        encoder = GaussianMLP(event_shape, (latent_dim,), widths)
        decoder = MLP((latent_dim,), event_shape, widths[::-1])
        heads: dict[str, Any] = {"likelihood": likelihood, "prior": prior, "posterior": posterior}
        return cls(event_shape, latent_dim, encoder, decoder, **heads)

    @classmethod
    def of_shape(
        cls, event_shape: Sequence[int], latent_dim: int = 8, widths: tuple[int, ...] = (256, 256)
    ) -> VAE:
        """A VAE of two MLPs with a Gaussian likelihood, whose scale is learned.

        Args:
            event_shape: shape of one datum.
            latent_dim: length of z.
            widths: hidden layers of the encoder; the decoder has them in reverse order.
        """
        return cls.mlp(event_shape, latent_dim, widths)

    def model(self, batch: Batch) -> Tensor:
        """z ~ p(z), x ~ p(x | z) for each row."""
        with batch.plate():
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.law_of_x(z))

    def guide(self, batch: Batch) -> Tensor:
        """z ~ q(z | x) for each row of `batch.data["x"]`."""
        x = observed(batch, "x", self)
        with batch.plate():
            return pyro.sample("z", self.law_of_z(x))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z]: z `(..., latent_dim)` -> `(..., *event_shape)`."""
        return self.law_of_x(z).mean


def example() -> VAE:
    """A small VAE of data with event shape (4,)."""
    return VAE.mlp(event_shape=(4,), latent_dim=2, widths=(16,))
