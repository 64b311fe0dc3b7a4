"""Small networks, each replaceable by any `nn.Module` of the same signature.

A denoiser is called `net(x, t)` with t in [0, 1] of shape (batch,), or `net(x, t, c)` with a condition; those that say
`takes_one_time` may be given a t of shape (1,) for all rows, which saves embedding it once a row. Its output layer
starts at zero. None holds running statistics: an output depends on its own row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from probgen.conditioning import Condition
from probgen.core import InputError, Positive, Size, Within, check_arguments, check_count, shown
from probgen.recorded import Recorded

Activation = Callable[[], nn.Module]
Layer = TypeVar("Layer", bound=nn.Module)
_SMALLEST_IMAGE, _UNET_WIDTH, _MLP_WIDTH = 4, 32, 128


class TimeEmbedding(Recorded):
    """Features of time: t -> MLP([sin(w_i t), cos(w_i t)]), w_i geometric from 1 to `max_frequency`.

    Args:
        width: length of the embedding, > 0.
        num_frequencies: number of w_i, >= 2.
        max_frequency: largest w_i, in radians per unit of time: steps closer than its inverse look alike.

    Returns:
        For t of shape (batch,), a tensor of shape (batch, width).

    Raises:
        InputError: a size out of its range, or t of another shape than (batch,).

    Source: Vaswani 2017 (arXiv 1706.03762), section 3.5; Ho 2020 (arXiv 2006.11239), appendix B.

    >>> TimeEmbedding(16)(torch.rand(5)).shape
    torch.Size([5, 16])
    """

    frequencies: Tensor

    def __init__(
        self,
        width: Size,
        num_frequencies: Annotated[int, Within(2, 10_000)] = 32,
        max_frequency: Positive = 1000.0,
    ) -> None:
        super().__init__()
        powers = torch.arange(num_frequencies) / (num_frequencies - 1)
        self.register_buffer("frequencies", max_frequency**powers)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        if t.dim() != 1:
            raise InputError(
                f"A network was given a time t of the wrong shape: expected (batch,), got {tuple(t.shape)}. "
                "One time for all is `t.expand(len(x))`."
            )
        angles = t[:, None] * self.frequencies
        features: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return features


class MLP(Recorded):
    """Feed-forward network between any two event shapes: flatten, (linear, activation)*, linear, unflatten.

    Args:
        in_shape, out_shape: event shapes; () is a scalar.
        widths: width of each hidden layer; none makes the map affine.
        activation: called without arguments, gives one activation module.

    Returns:
        For x of shape (*batch, *in_shape), a tensor of shape (*batch, *out_shape).

    Raises:
        InputError: a size <= 0, or an x whose last dimensions are not `in_shape`.

    Source: Rumelhart, Hinton and Williams 1986, Nature 323.

    >>> MLP((2, 3), (4,), widths=(16,))(torch.randn(7, 5, 2, 3)).shape
    torch.Size([7, 5, 4])
    """

    def __init__(
        self,
        in_shape: Sequence[Size],
        out_shape: Sequence[Size],
        widths: Sequence[Size] = (256, 256),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        sizes = [math.prod(self.in_shape), *widths, math.prod(self.out_shape)]
        if not isinstance(activation(), nn.Module):
            raise InputError(
                f"MLP: activation must make an nn.Module, as nn.SiLU does, got {shown(activation)}."
            )
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        flat, batch_shape = _flatten(x, self.in_shape)
        out: Tensor = self.layers(flat)
        return out.reshape(batch_shape + self.out_shape)


class GaussianMLP(Recorded):
    """An `MLP` with two heads, the law N(loc, scale^2): the usual encoder x -> (loc, scale) of a VAE.

    scale = softplus(raw) + `min_scale`; the two heads share every hidden layer.

    Args:
        in_shape, out_shape, widths, activation: as for `MLP`.
        min_scale: lower end of the scale, > 0, which keeps densities finite.

    Returns:
        For x of shape (*batch, *in_shape), the pair (loc, scale), both of shape (*batch, *out_shape).

    Raises:
        InputError: as for `MLP`.

    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.2.

    >>> loc, scale = GaussianMLP((1, 8, 8), (10,))(torch.randn(5, 1, 8, 8))
    >>> loc.shape, bool((scale > 0).all())
    (torch.Size([5, 10]), True)
    """

    def __init__(
        self,
        in_shape: Sequence[Size],
        out_shape: Sequence[Size],
        widths: Sequence[Size] = (256, 256),
        activation: Activation = nn.SiLU,
        min_scale: Positive = 1e-4,
    ) -> None:
        super().__init__()
        self.min_scale = min_scale
        self.mlp = MLP(in_shape, (2, *out_shape), widths, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.mlp(x).unbind(dim=-len(self.mlp.out_shape))
        return loc, softplus(raw) + self.min_scale


class TimeMLP(Recorded):
    """Residual MLP net(x, t) for any event shape: h <- h + W_2 silu(W_1 norm(h) + V e(t)), e embeds time.

    Args:
        event_shape: shape of one datum and of one output.
        width: width of the residual stream, > 0.
        num_blocks: number of residual blocks, > 0.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`, for net(x, t, c), its features added to those
            of time; None for net(x, t).

    Returns:
        For x of shape (batch, *event_shape) and t in [0, 1] of shape (batch,) or (1,), a tensor shaped as x;
        zero before training. c None is missing in every row.

    Raises:
        InputError: a size <= 0, x or t of another shape, or a c where there is no condition.

    Source: He 2016 (arXiv 1603.05027), the blocks; Ho 2020 (arXiv 2006.11239), time added inside each.

    >>> TimeMLP((2,), width=32)(torch.randn(5, 2), torch.rand(5)).abs().max().item()
    0.0
    """

    takes_one_time: ClassVar[bool] = True

    def __init__(
        self,
        event_shape: Sequence[Size],
        width: Size = 256,
        num_blocks: Size = 3,
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.condition = tuple(event_shape), condition
        size = math.prod(self.event_shape)
        self.embed_time = TimeEmbedding(width)
        self.embed = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_ResidualMLP(width) for _ in range(num_blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, size)))
        self.embed_condition = None if condition is None else condition.embedding(width)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        flat, _ = _flatten(x, self.event_shape)
        h, time = self.embed(flat), _features(self, x, t, c)
        for block in self.blocks:
            h = block(h, time)
        out: Tensor = self.out(h)
        return out.reshape(x.shape)


class UNet(Recorded):
    """Small convolutional U-Net net(x, t) for images (channels, height, width) of any height and width.

    One level for each of `widths`; the image is halved (rounded up) between levels, and each level's features
    on the way down are concatenated to those on the way up. Group normalisation, scaled and shifted by time; no
    attention.

    Args:
        event_shape: (channels, height, width) of one image and of one output.
        widths: channels at each level, from full resolution to the coarsest.
        num_blocks: residual blocks at each level and in each direction, > 0.
        condition: as for `TimeMLP`.

    Returns:
        For x of shape (batch, channels, height, width) and t in [0, 1] of shape (batch,) or (1,), a tensor
        shaped as x; zero before training. c None is missing in every row.

    Raises:
        InputError: an event shape that is no image, no widths, a size <= 0, x or t of another shape, or a c where there
            is no condition.

    Source: Ronneberger 2015 (arXiv 1505.04597); Dhariwal and Nichol 2021 (arXiv 2105.05233), section 3.

    >>> UNet((1, 7, 9), widths=(8, 16))(torch.randn(5, 1, 7, 9), torch.rand(5)).shape
    torch.Size([5, 1, 7, 9])
    """

    takes_one_time: ClassVar[bool] = True

    def __init__(
        self,
        event_shape: Sequence[Size],
        widths: Sequence[Size] = (32, 64),
        num_blocks: Size = 1,
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        _check_image("UNet", event_shape)
        check_count("UNet's number of widths", len(widths))
        self.event_shape, self.condition = tuple(event_shape), condition
        channels, time_width = event_shape[0], 4 * widths[0]
        self.embed_time = TimeEmbedding(time_width)
        self.embed = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_Level(w, w, time_width, num_blocks) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(w, v, 3, stride=2, padding=1) for w, v in pairwise(widths))
        self.grow = nn.ModuleList(nn.Conv2d(v, w, 3, padding=1) for w, v in pairwise(widths))
        self.up = nn.ModuleList(_Level(2 * w, w, time_width, num_blocks) for w in widths[:-1])
        self.out = nn.Sequential(
            _group_norm(widths[0]), nn.SiLU(), zeroed(nn.Conv2d(widths[0], channels, 3, padding=1))
        )
        self.embed_condition = None if condition is None else condition.embedding(time_width)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        _check_event(x, self.event_shape)
        time = _features(self, x, t, c)
        h, skips = self.embed(x), []
        for level, shrink in zip(self.down, self.shrink, strict=False):
            skips.append(level(h, time))
            h = shrink(skips[-1])
        h = self.down[-1](h, time)
        for level, grow, skip in reversed(list(zip(self.up, self.grow, skips, strict=True))):
            h = grow(interpolate(h, size=skip.shape[-2:]))
            h = level(torch.cat([h, skip], dim=1), time)
        out: Tensor = self.out(h)
        return out


def usual_denoiser(
    event_shape: Sequence[Size], width: Size | None = None, condition: Condition | None = None
) -> TimeMLP | UNet:
    """A network net(x, t) to begin with: `UNet` for images of at least 4 x 4, else `TimeMLP`.

    Args:
        event_shape: shape of one datum.
        width: channels at full resolution, 32 by default, or width of the residual stream, 128 by default.
        condition: as for `TimeMLP`.

    >>> type(usual_denoiser((1, 8, 8))).__name__, type(usual_denoiser((3,))).__name__
    ('UNet', 'TimeMLP')
    """
    check_arguments(usual_denoiser, locals())
    if len(event_shape) == 3 and min(event_shape[1:]) >= _SMALLEST_IMAGE:
        width = _UNET_WIDTH if width is None else width
        return UNet(event_shape, widths=(width, 2 * width), condition=condition)
    return TimeMLP(event_shape, _MLP_WIDTH if width is None else width, condition=condition)


class Classifier(Recorded):
    """Small convolutional classifier of images, p(class | x) = softmax(W features(x) + b).

    Args:
        event_shape: (channels, height, width) of one image.
        num_classes: number of classes, > 0.
        width: channels of the first layer; the others have twice as many.
        num_features: length of the penultimate layer, where a Fréchet distance is taken.
        dropout: probability of dropping a feature in training mode, in [0, 1).

    Returns:
        For x of shape (batch, channels, height, width), the logits, of shape (batch, num_classes).

    Raises:
        InputError: an event shape that is no image, a size <= 0, or an x of another shape.

    Source: LeCun 1998, Proceedings of the IEEE 86(11).

    >>> net = Classifier((1, 8, 8))
    >>> net(torch.randn(5, 1, 8, 8)).shape, net.features(torch.randn(5, 1, 8, 8)).shape
    (torch.Size([5, 10]), torch.Size([5, 64]))
    """

    def __init__(
        self,
        event_shape: Sequence[Size],
        num_classes: Size = 10,
        width: Size = 32,
        num_features: Size = 64,
        dropout: Annotated[float, Within(0, 1, "[)")] = 0.2,
    ) -> None:
        super().__init__()
        _check_image("Classifier", event_shape)
        self.event_shape = tuple(event_shape)
        channels, height, breadth = event_shape
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        num_pixels = math.ceil(height / 4) * math.ceil(breadth / 4)
        self.penultimate = nn.Linear(2 * width * num_pixels, num_features)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, of shape (batch, num_features), after its activation."""
        _check_event(x, self.event_shape)
        return nn.functional.silu(self.penultimate(self.convolutions(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def zeroed(layer: Layer) -> Layer:
    """The same layer with every parameter set to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _ResidualMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.time, self.second = (nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        inner = nn.functional.silu(self.first(self.norm(h)) + self.time(time))
        return h + self.second(inner)


class _ResidualConv(nn.Module):
    def __init__(self, width_in: int, width: int, time_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_group_norm(width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1))
        self.norm = _group_norm(width)
        self.time = nn.Linear(time_width, 2 * width)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        # Time acts behind the norm: before it, a norm with one channel a group would take it out again.
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        inner = self.norm(self.first(h)) * (1 + scale) + shift
        out: Tensor = self.skip(h) + self.second(inner)
        return out


class _Level(nn.Module):
    """Residual blocks at one resolution of a `UNet`."""

    def __init__(self, width_in: int, width: int, time_width: int, num_blocks: int) -> None:
        super().__init__()
        widths_in = [width_in] + [width] * (num_blocks - 1)
        self.blocks = nn.ModuleList(_ResidualConv(w, width, time_width) for w in widths_in)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, time)
        return h


def _features(net: TimeMLP | UNet, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
    """Features of the time and, where the network has one, of the condition: `(batch, width)` or `(1, width)`."""
    time: Tensor = net.embed_time(t)
    if net.embed_condition is not None and net.condition is not None:
        return time + net.embed_condition(net.condition.missing(1, x) if c is None else c)
    if c is not None:
        raise InputError(
            f"A {type(net).__name__} without a condition was given one; build it with condition=Labels(num_classes) or "
            "condition=Vector(shape)."
        )
    return time


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _flatten(x: Tensor, event_shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """x with its event made one dimension, and its batch shape."""
    _check_event(x, event_shape)
    batch_shape = tuple(x.shape[: x.dim() - len(event_shape)])
    return x.reshape(*batch_shape, math.prod(event_shape)), batch_shape


def _check_event(x: Tensor, event_shape: tuple[int, ...]) -> None:
    if tuple(x.shape[x.dim() - len(event_shape) :]) != event_shape or x.dim() < len(event_shape):
        raise InputError(
            f"A network was given data of the wrong shape: expected (batch, *{event_shape}), "
            f"got {tuple(x.shape)}. Reshape the data, or build the network for their event shape."
        )


def _check_image(name: str, event_shape: Sequence[int]) -> None:
    if len(event_shape) != 3:
        raise InputError(
            f"{name} works on images: expected an event shape (channels, height, width), "
            f"got {tuple(event_shape)}. For other data use TimeMLP (with time) or MLP (without)."
        )
