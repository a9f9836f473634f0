"""Conversion keeps the function where it should, and names what stays."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, softened, to_low_curvature


def warm(model: nn.Module, size: int) -> nn.Module:
    """Random weights, scale and shift, and statistics of random images, as a trained network would have."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.uniform_(-0.5, 0.5)
            m.momentum = None  # plain average
    model.train()
    for _ in range(2):
        with torch.no_grad():
            model(torch.rand(8, 3, size, size).to(next(model.parameters())))
    return model.eval()


TORCHVISION = {
    "resnet18": (torchvision.models.resnet18, 32, "maxpool"),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32, None),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_conversion_keeps_the_function_when_the_constraints_are_slack(name):
    build, size, named = TORCHVISION[name]
    model = warm(build(num_classes=7).double(), size)
    x = torch.rand(4, 3, size, size).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = to_low_curvature(model, x, beta=1e8, gamma=1e6, iterations=2)
    assert [named in str(w.message) for w in caught] == ([] if named is None else [True])
    want, got = model(x), converted(x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    floating = [v for v in (*converted.parameters(), *converted.buffers()) if v.is_floating_point()]
    assert {v.dtype for v in floating} == {torch.float64}
    constants = [m.beta for m in converted.modules() if isinstance(m, CenteredSoftplus)]
    constants += [m.gamma * 100 for m in converted.modules() if isinstance(m, LipschitzBatchNorm2d)]
    assert torch.stack(constants).tolist() == pytest.approx([1e8] * len(constants), rel=1e-12)
    left = [type(m).__name__ for m in converted.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.BatchNorm2d)]
    assert not left
    assert {m.momentum for m in converted.modules() if isinstance(m, LipschitzBatchNorm2d)} == {None}, "as before"
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], "the original was changed"


class Net(nn.Module):
    """``f(self, x)``, with a convolution, a BatchNorm with statistics, a ReLU and more layers to call."""

    def __init__(self, f, **layers):
        super().__init__()
        self.f, self.conv, self.bn, self.relu = f, conv(), bn(), nn.ReLU()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.f(self, x)


def conv(c_in=2, c_out=2, kernel=3, **options):
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": 1} | options)


def bn(**options):
    layer = nn.BatchNorm2d(2, **options)
    for value, low in ((layer.running_mean, -1), (layer.running_var, 0.5), (layer.weight, 0.5), (layer.bias, -1)):
        if value is not None:
            value.data.uniform_(low, 1.5)
    return layer


def usual(net, x):
    return net.relu(net.bn(net.conv(x)))


def with_conv(change):
    net = Net(usual)
    change(net.conv)
    return net


def on_both(net, x):
    h = net.conv(x)
    return net.relu(net.bn(h)) + net.other(h)


KEPT = {
    "one call, two BatchNorms": lambda: Net(on_both, other=bn()),
    "grouped, dilated": lambda: Net(usual, conv=conv(padding=2, dilation=2, groups=2)),
    "zero kernel": lambda: with_conv(lambda conv: conv.weight.data.zero_()),
    "no affine": lambda: Net(usual, bn=bn(affine=False)),
    "checkpoint": lambda: Net(lambda net, x: checkpoint(lambda y: usual(net, y), x, use_reentrant=False)),
    "linear": lambda: Net(lambda net, x: (usual(net, x) / 3 @ torch.ones(8, 3) - 1).mean((2, 3))),
    "in place": lambda: Net(lambda net, x: usual(net, x) + x, relu=nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("case", KEPT)
def test_conversion_is_silent_where_it_keeps_the_function(case):
    torch.manual_seed(0)
    net = KEPT[case]().eval()
    x = torch.randn(2, 2, 8, 8).to(next(net.parameters(), torch.zeros(())).dtype)
    state = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = to_low_curvature(net, x, beta=1e8, gamma=1e6)
    torch.testing.assert_close(converted(x), net(x), rtol=1e-4, atol=1e-5)
    assert not [m for m in converted.modules() if isinstance(m, nn.ReLU | nn.BatchNorm2d)]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    for layer in converted.modules():
        if isinstance(layer, nn.Conv2d):
            assert conv_norm(layer, (2, 8, 8), "exact").item() == pytest.approx(float(case != "zero kernel"), abs=0.03)


class Flatten(nn.Module):
    """A layer of somebody's own, not what its name says."""

    def forward(self, x):
        return torch.where(x > 0, x, -1.0) if x.sum() > 0 else x


NAMED = {
    "output": (lambda net, x: (usual(net, x), net.conv(x)), {}, ["conv"]),
    "padding": (usual, dict(conv=conv(padding_mode="circular")), ["conv"]),
    "no statistics": (usual, dict(bn=bn(track_running_stats=False)), ["conv", "bn"]),
    "custom": (lambda net, x: net.other(usual(net, x)), dict(other=Flatten()), ["other (Flatten)"]),
    "square": (lambda net, x: (h := usual(net, x), h * h)[1], {}, ["mul"]),
}


KINKS = {
    "where": lambda x: torch.where(x > 0, x, x / 2), "leaky_relu": F.leaky_relu_, "relu": F.relu, "relu_": torch.relu_,
    "max_pool2d": nn.MaxPool2d(2), "gelu": nn.GELU(), "norm": lambda x: x / x.norm(), "layer_norm": nn.LayerNorm(8),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}  # fmt: skip
NAMED |= {name: (lambda net, x: net.g(usual(net, x)), dict(g=g), [name.strip("_")]) for name, g in KINKS.items()}


@pytest.mark.parametrize("case", NAMED)
def test_conversion_names_what_stays(case):
    torch.manual_seed(0)
    f, layers, names = NAMED[case]
    with pytest.warns(UserWarning, match="to_low_curvature left something") as caught:
        to_low_curvature(Net(f, **layers).eval(), torch.rand(2, 2, 8, 8))
    text = str(caught[-1].message).partition(": ")[2]
    assert all(name.replace("_", "") in text.replace("_", "").lower() for name in map(str.lower, names))


def test_new_parameters_and_training_follow_the_layers_they_stand_in_for():
    """A frozen part stays frozen; a BatchNorm in eval mode stays there."""
    backbone = nn.Sequential(conv(), bn(), nn.ReLU()).requires_grad_(False)
    net = nn.Sequential(backbone, conv(bias=False), bn(), nn.ReLU()).bfloat16().train()
    backbone[1].eval()
    converted = to_low_curvature(net, torch.rand(2, 2, 8, 8).bfloat16())
    assert {p.requires_grad for p in converted[0].parameters()} == {False}
    assert {p.requires_grad for p in converted[1:].parameters()} == {True}
    assert {v.dtype for v in converted.state_dict().values() if v.is_floating_point()} == {torch.bfloat16}
    frozen = {name for name, m in converted.named_modules() if not m.training}
    assert frozen == {"0.1"}


def listed():
    net = Net(lambda net, x: net.held[2](net.held[1](net.held[0](x))))
    net.held = [conv(), bn(), nn.ReLU()]
    return net


def overwritten(net, x):
    h = net.bn(net.conv(x))
    return net.relu(h) + h


REFUSED = {
    "weight norm by hooks": (lambda: with_conv(torch.nn.utils.weight_norm), "conv.*remove_weight_norm"),
    "converted": (lambda: to_low_curvature(Net(usual), torch.rand(1, 2, 8, 8)), "conv.*a converted net"),
    "branch": (lambda: Net(lambda net, x: usual(net, x) if x.sum() > 0 else x), "forward of Net depends on its data"),
    "chance": (lambda: Net(lambda net, x: usual(net, x + torch.randn_like(x))), "chance"),
    "a list of layers": (listed, "Net .*nn.ModuleList"),
    "read elsewhere": (lambda: Net(overwritten, relu=nn.ReLU(inplace=True)), "set inplace=False"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_conversion_refuses_with_a_way_out(case):
    torch.manual_seed(0)
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        to_low_curvature(build(), torch.randn(2, 2, 8, 8))  # both signs reach the ReLU


# ---------------------------------------------------------------- activations alone


def by_hand(x, beta, cap=None):
    """Centered softplus by torch's."""
    s = lambda z: F.softplus(z, beta, threshold=1e9) - F.softplus(torch.zeros(()).to(z), beta)
    return s(x) if cap is None else s(x) - s(x - cap) + s(torch.tensor(-float(cap)).to(x))


@pytest.mark.parametrize("beta", [0.3, 20.0])
def test_softened_changes_the_activations_alone(beta):
    """Against the same net by hand; a shared layer stays shared, and every layer in its mode."""
    torch.manual_seed(0)
    shared = nn.ReLU(inplace=True)
    net = nn.Sequential(conv(), bn(), shared, conv(), nn.ReLU6(), conv(), shared, CenteredSoftplus(9.0, cap=2.0))
    net = net.double().train()
    net[1].eval()
    state = copy.deepcopy(net.state_dict())
    x = 4 * torch.randn(2, 2, 8, 8).double()
    soft = softened(net, beta)
    hidden = by_hand(net[1](net[0](x)), beta)
    hidden = by_hand(net[5](by_hand(net[3](hidden), beta, cap=6)), beta)
    torch.testing.assert_close(soft(x), by_hand(hidden, beta, cap=2))
    assert soft[2] is soft[6]
    assert [layer.training for layer in soft] == [layer.training for layer in net] == [True, False] + 6 * [True]
    assert soft[2].log_beta.dtype == torch.float64
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert isinstance(net[2], nn.ReLU)
    torch.testing.assert_close(softened(nn.ReLU(), beta)(x.float()), by_hand(x, beta).float(), rtol=1e-5, atol=1e-5)


def test_softened_trains_beta_only_where_it_is_asked_to_and_nothing_is_frozen():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    net[0].requires_grad_(False)
    assert len(list(softened(net, 2.0).parameters())) == len(list(net.parameters()))
    trained = softened(net, 2.0, trainable=True)
    assert [trained[i].log_beta.requires_grad for i in (1, 3)] == [False, True]


def test_a_sharp_net_is_the_relu_net():
    model = warm(torchvision.models.mobilenet_v2(num_classes=7), 32)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(softened(model, 1e7)(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "beta", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), 1.0, "Sequential has nothing to soften.*F.relu"),
        (nn.Sequential(nn.ReLU()), 0.0, "beta .* got 0.0"),
        (nn.Sequential(nn.ReLU()), 1e9, "beta=1000000000.0"),
    ],
)
def test_softened_refuses(model, beta, message):
    with pytest.raises(ValueError, match=message):
        softened(model, beta)
