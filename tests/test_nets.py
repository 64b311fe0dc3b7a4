"""Networks: shapes, time, independence of rows, a gradient for every parameter, and that they learn."""

import pytest
import torch
from torch import Tensor, nn

from probgen.conditioning import Labels, Vector
from probgen.core import InputError
from probgen.nets import MLP, Classifier, GaussianMLP, TimeEmbedding, TimeMLP, UNet

DENOISERS = [
    pytest.param(lambda: TimeMLP((3,), width=16), (3,), id="mlp, vector"),
    pytest.param(lambda: TimeMLP((2, 4, 1), width=16, num_blocks=1), (2, 4, 1), id="mlp, any shape"),
    pytest.param(lambda: TimeMLP((), width=16), (), id="mlp, scalar"),
    pytest.param(lambda: UNet((1, 8, 8), widths=(8, 16)), (1, 8, 8), id="unet 8x8"),
    pytest.param(lambda: UNet((3, 7, 5), widths=(4, 6, 8), num_blocks=2), (3, 7, 5), id="unet, odd sizes"),
    pytest.param(lambda: UNet((1, 28, 28), widths=(4, 8, 8)), (1, 28, 28), id="unet 28x28"),
    pytest.param(lambda: UNet((1, 4, 4), widths=(5,)), (1, 4, 4), id="unet, one level"),
]


def awake(net: nn.Module) -> nn.Module:
    """The same network with no parameter left at zero, so that every path carries something; float64."""
    for parameter in net.parameters():
        parameter.data.normal_(std=0.3)
    return net.double()


def random_inputs(event_shape: tuple[int, ...], size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *event_shape, dtype=torch.float64), torch.rand(size, dtype=torch.float64)


@pytest.mark.parametrize(("build", "event_shape"), DENOISERS)
def test_denoiser_is_zero_before_training_and_keeps_the_shape(build, event_shape):
    out = build()(torch.randn(5, *event_shape), torch.rand(5))
    assert out.shape == (5, *event_shape)
    assert not out.any()


@pytest.mark.parametrize(("build", "event_shape"), DENOISERS)
def test_rows_depend_on_their_own_data_and_time_alone(build, event_shape):
    net, (x, t) = awake(build()), random_inputs(event_shape)
    out = net(x, t)
    torch.testing.assert_close(net(x[2:3], t[2:3]), out[2:3])
    changed = net(x, torch.cat([t[:4], 1 - t[4:]]))
    torch.testing.assert_close(changed[:4], out[:4])
    assert not torch.allclose(changed[4:], out[4:])


@pytest.mark.parametrize(("build", "event_shape"), DENOISERS)
def test_one_time_serves_all_rows(build, event_shape):
    net, (x, _) = awake(build()), random_inputs(event_shape)
    t = torch.tensor([0.3], dtype=torch.float64)
    torch.testing.assert_close(net(x, t), net(x, t.expand(len(x))))


@pytest.mark.parametrize(("build", "event_shape"), DENOISERS)
def test_every_parameter_of_a_denoiser_gets_a_gradient(build, event_shape):
    net, (x, t) = awake(build()), random_inputs(event_shape)
    net(x, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    "build", [lambda: TimeMLP((1, 4, 4), width=16), lambda: UNet((1, 4, 4), widths=(4, 8))]
)
def test_vmap_meets_the_batched_call(build):
    net, (x, t) = awake(build()), random_inputs((1, 4, 4))
    rows = torch.func.vmap(lambda row, time: net(row[None], time[None])[0])(x, t)
    torch.testing.assert_close(rows, net(x, t))


@pytest.mark.parametrize(
    "build", [lambda: TimeMLP((1, 4, 4), width=64), lambda: UNet((1, 4, 4), widths=(8, 16))]
)
def test_denoiser_learns_a_function_of_data_and_time(build):
    """x cos(3 t) has power 1/2 |x|^2 or so; 300 steps must explain 90 % of it, which needs both inputs."""
    net = build()
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(300):
        x, t = torch.randn(64, 1, 4, 4), torch.rand(64)
        wanted = x * torch.cos(3 * t)[:, None, None, None]
        loss = (net(x, t) - wanted).square().mean() / wanted.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.1


def test_time_embedding_tells_neighbouring_steps_apart():
    """Neighbours of a chain of 1,000 steps differ by at least 1 % of the spread between random times."""
    t = torch.arange(1001) / 1000
    features = TimeEmbedding(32)(t)
    neighbours = (features[1:] - features[:-1]).norm(dim=1)
    assert neighbours.min() > 0.01 * torch.pdist(features[::10]).mean()


@pytest.mark.parametrize("batch_shape", [(), (5,), (4, 5)])
def test_mlp_keeps_batch_dimensions_and_maps_events(batch_shape):
    assert MLP((2, 3), (4, 1), widths=(8,))(torch.randn(*batch_shape, 2, 3)).shape == (*batch_shape, 4, 1)
    assert MLP((), (2,))(torch.randn(batch_shape)).shape == (*batch_shape, 2)
    loc, scale = GaussianMLP((2, 3), (4, 1), widths=(8,))(torch.randn(*batch_shape, 2, 3))
    assert loc.shape == scale.shape == (*batch_shape, 4, 1)


def test_mlp_without_widths_is_affine():
    mlp = MLP((3,), (2,), widths=()).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(mlp(x.mean(0)), mlp(x).mean(0))
    assert len(list(mlp.parameters())) == 2


def test_mlp_uses_the_activation_it_is_given():
    bounded = MLP((1,), (1,), widths=(4,), activation=nn.Tanh)
    far = bounded(torch.tensor([[1e6], [1e7]]))
    assert far[0] == far[1]


def test_gaussian_scale_is_above_its_minimum_and_heads_differ():
    encoder = GaussianMLP((3,), (2,), widths=(8,), min_scale=0.01)
    loc, scale = encoder(1e6 * torch.randn(100, 3))
    assert scale.min() >= 0.01
    assert scale.isfinite().all()
    assert not torch.allclose(loc, scale)


def test_classifier_is_its_head_on_its_features():
    net = Classifier((1, 8, 8), num_classes=3, width=4, num_features=6).eval()
    x = torch.randn(5, 1, 8, 8)
    assert net.features(x).shape == (5, 6)
    torch.testing.assert_close(net.head(net.features(x)), net(x))
    assert net(x).shape == (5, 3)


def test_classifier_takes_any_image():
    assert Classifier((3, 7, 10), width=4)(torch.randn(2, 3, 7, 10)).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: TimeMLP((2,), width=0), "TimeMLP: width must be an integer >= 1"),
        (lambda: TimeMLP((2,), num_blocks=-1), "TimeMLP: num_blocks must be an integer"),
        (lambda: TimeEmbedding(8, num_frequencies=1), "num_frequencies must be an integer in [2, 10,000]"),
        (lambda: MLP((0,), (2,)), "MLP: in_shape[0] must be an integer"),
        (lambda: UNet((8, 8)), "expected an event shape (channels, height, width), got (8, 8)"),
        (lambda: UNet((1, 8, 8), widths=()), "UNet's number of widths"),
        (lambda: UNet((1, 8, 8), widths=(8, 0)), "UNet: widths[1] must be an integer"),
        (lambda: Classifier((64,)), "Classifier works on images"),
        (lambda: MLP((3,), (2,))(torch.zeros(5, 4)), "got (5, 4)"),
        (lambda: MLP((1, 3), (2,))(torch.zeros(3)), "got (3,)"),
        (lambda: TimeMLP((3,))(torch.zeros(5, 4), torch.zeros(5)), "got (5, 4)"),
        (lambda: TimeMLP((3,))(torch.zeros(5, 3), torch.tensor(0.5)), "expected (batch,), got ()"),
        (lambda: UNet((1, 8, 8))(torch.zeros(5, 1, 9, 9), torch.zeros(5)), "got (5, 1, 9, 9)"),
        (lambda: Classifier((1, 8, 8))(torch.zeros(5, 64)), "got (5, 64)"),
    ],
)
def test_misuse_is_told_in_words(call, told):
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)


CONDITIONAL = [
    pytest.param(lambda c: TimeMLP((3,), width=16, condition=c), (3,), id="mlp"),
    pytest.param(lambda c: UNet((1, 5, 7), widths=(8, 16), condition=c), (1, 5, 7), id="unet"),
]
CONDITIONS = [
    pytest.param(Labels(3), torch.tensor([0, 2, -1, 1, 0]), id="labels"),
    pytest.param(Vector((2, 2)), torch.arange(20.0, dtype=torch.float64).reshape(5, 2, 2) / 10, id="arrays"),
]


@pytest.mark.parametrize(("build", "event_shape"), CONDITIONAL)
@pytest.mark.parametrize(("kind", "c"), CONDITIONS)
def test_rows_depend_on_their_own_condition(build, event_shape, kind, c):
    net, (x, t) = awake(build(kind)), random_inputs(event_shape)
    out = net(x, t, c)
    torch.testing.assert_close(net(x[1:2], t[1:2], c[1:2]), out[1:2])
    changed = net(x, t, torch.cat([c[:4], c[1:2]]))
    torch.testing.assert_close(changed[:4], out[:4])
    assert not torch.allclose(changed[4:], out[4:])


@pytest.mark.parametrize(("build", "event_shape"), CONDITIONAL)
@pytest.mark.parametrize(("kind", "c"), CONDITIONS)
def test_a_missing_condition_has_features_of_its_own(build, event_shape, kind, c):
    net, (x, t) = awake(build(kind)), random_inputs(event_shape)
    missing = kind.missing(len(x), x)
    torch.testing.assert_close(net(x, t), net(x, t, missing))
    assert not torch.allclose(net(x, t)[0], net(x, t, c)[0])
    c = torch.cat((c[:3], missing[:2]))
    net(x, t, c).square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any())


@pytest.mark.parametrize(("build", "event_shape"), CONDITIONAL)
def test_networks_without_a_condition_are_what_they_were(build, event_shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = build(None)
        torch.manual_seed(0)
        conditional = build(Labels(3))
    assert not any("condition" in name for name in plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, conditional.state_dict()[name])
    x, t = torch.randn(2, *event_shape), torch.rand(2)
    with pytest.raises(InputError, match="without a condition"):
        plain(x, t, torch.zeros(2, dtype=torch.int64))
