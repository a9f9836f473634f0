"""Networks: shapes, what LCNN layers promise, and conversion that keeps the function."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from lcnn_utils.curvature import curvature_bound
from lcnn_utils.nn import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    conv_norm,
    mlp,
    refresh_norms,
    relu_reading,
    resnet,
    set_beta,
    to_low_curvature,
    vgg11,
)
from lcnn_utils.nn.resnet import AveragedBlock, OrdinaryBlock

NETS = {
    "resnet10": lambda lcnn: resnet(10, num_classes=5, width=4, in_channels=1, image_size=8, lcnn=lcnn),
    "resnet18": lambda lcnn: resnet(18, num_classes=10, width=4, image_size=16, lcnn=lcnn),
    "resnet34": lambda lcnn: resnet(34, num_classes=10, width=2, image_size=32, lcnn=lcnn),
    "vgg11": lambda lcnn: vgg11(num_classes=10, width=2, image_size=32, lcnn=lcnn),
}


@pytest.mark.parametrize("lcnn", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_networks_give_finite_logits_and_gradients_to_every_parameter(name, lcnn):
    torch.manual_seed(0)
    net = NETS[name](lcnn)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    side = {"resnet10": 8, "resnet18": 16}.get(name, 32)
    x = torch.rand(4, first.in_channels, side, side)
    logits = net(x)
    assert logits.shape == (4, 5 if name == "resnet10" else 10)
    logits.logsumexp(1).sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_lcnn_layers_are_what_they_are_called():
    torch.manual_seed(0)
    net = resnet(18, num_classes=10, width=4, image_size=16, lcnn=True)
    refresh_norms(net, 200)
    shapes = {}
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_pre_hook(lambda m, inputs: shapes.update({m: tuple(inputs[0].shape[1:])}))
    net.eval()(torch.rand(1, 3, 16, 16))
    assert len(shapes) == 20
    for conv, shape in shapes.items():  # normalised at the size that really arrives
        assert conv_norm(conv, shape, "exact").item() == pytest.approx(1, abs=0.02)
    assert torch.linalg.matrix_norm(net[-1].weight, 2).item() == pytest.approx(1, abs=1e-3)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    betas = [m for m in net.modules() if isinstance(m, CenteredSoftplus)]
    assert len(betas) == 17
    assert all(m.beta.item() == pytest.approx(5) and m.log_beta.requires_grad for m in betas)
    standard = resnet(18, num_classes=10, width=4, image_size=16)
    fixed = [m.beta.item() for m in standard.modules() if isinstance(m, CenteredSoftplus)]
    assert fixed == pytest.approx([1000] * 17, rel=1e-5)
    assert not [n for n, _ in standard.named_parameters() if "beta" in n]


def test_averaged_block_has_the_slope_its_docstring_claims():
    """max(slope F, slope S)/√2 against the Jacobian's norm, with F and S of known slope."""
    torch.manual_seed(0)
    net = resnet(10, num_classes=2, width=3, in_channels=1, image_size=5, lcnn=True, gamma=1.5).double()
    block = next(m for m in net.modules() if isinstance(m, AveragedBlock))
    refresh_norms(block, 300)
    block.eval()
    norms = [m.lipschitz_constant() for m in block.branch if isinstance(m, LipschitzBatchNorm2d)]
    bound = max(math.prod(n.item() for n in norms), 1.0) / math.sqrt(2)
    for _ in range(5):
        jacobian = torch.func.jacrev(lambda z: block(z[None])[0])(torch.randn(3, 5, 5).double()).reshape(75, 75)
        assert torch.linalg.matrix_norm(jacobian, 2) <= bound * (1 + 1e-3)


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_block_averages_or_adds(ordinary):
    torch.manual_seed(0)
    net = resnet(18, num_classes=2, width=3, in_channels=1, image_size=8, ordinary=ordinary).eval()
    blocks = [m for m in net.modules() if isinstance(m, AveragedBlock)]
    assert {type(block) for block in blocks} == {OrdinaryBlock if ordinary else AveragedBlock}
    x = torch.rand(4, 3, 8, 8)
    for block in blocks[:3]:  # the third has another size and number of channels
        f, s = block.branch, block.shortcut
        assert isinstance(s, nn.Sequential if block is blocks[2] else nn.Identity)
        before = f(x) + s(x) if ordinary else (f(x / math.sqrt(2)) + s(x / math.sqrt(2))) / 2
        torch.testing.assert_close(block(x), block.activation(before))


@pytest.mark.parametrize("make", [lambda **k: resnet(18, **k), vgg11], ids=["resnet18", "vgg11"])
def test_an_ordinary_net_is_everybodys(make):
    """Scale and shift in each BatchNorm, the given activation everywhere, no spectral norm anywhere."""
    torch.manual_seed(0)
    net = make(num_classes=7, width=2, image_size=16, activation=nn.ReLU, ordinary=True)
    assert [m for m in net.modules() if isinstance(m, CenteredSoftplus | LipschitzBatchNorm2d)] == []
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in net.modules())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == len(convolutions) == (20 if make is not vgg11 else 8)
    assert all(m.weight.requires_grad and m.bias.requires_grad for m in norms)
    assert all(m.bias is None for m in convolutions)
    assert len([m for m in net.modules() if isinstance(m, nn.ReLU)]) == (17 if make is not vgg11 else 8)
    logits = net(torch.rand(4, 3, 16, 16))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_our_ordinary_resnet18_is_torchvisions():
    """With their parameters, in their order, it computes what theirs does without the stem's stride and pooling."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = resnet(18, num_classes=10, ordinary=True, activation=nn.ReLU)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.shape == other.shape
        mine.data.copy_(other.data)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda make: mlp([4, 5, 5, 3], activation=make),
        lambda make: resnet(10, num_classes=2, width=2, activation=make, lcnn=True),
        lambda make: vgg11(num_classes=2, width=2, activation=make),
    ],
    ids=["mlp", "resnet", "vgg"],
)
def test_each_activation_is_made_anew(build):
    made = []

    def make():
        made.append(nn.Softplus(3.0))
        return made[-1]

    net = build(make)
    assert made
    assert {m for m in net.modules() if isinstance(m, nn.Softplus)} == set(made)
    assert not [m for m in net.modules() if isinstance(m, CenteredSoftplus)]


def test_mlp_takes_images_or_points():
    assert mlp([2, 8, 3])(torch.randn(5, 2)).shape == (5, 3)
    net = mlp([64, 16, 16, 10], lcnn=True)
    refresh_norms(net)
    assert net(torch.rand(5, 1, 8, 8)).shape == (5, 10)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    norms = [torch.linalg.matrix_norm(m.weight, 2).item() for m in linears]
    assert norms[:2] == pytest.approx([1, 1], abs=1e-3)


def test_set_beta_and_relu_reading():
    torch.manual_seed(0)
    net = mlp([4, 32, 3])
    x = torch.randn(64, 4)
    relu = relu_reading(net)
    assert not [m for m in relu.modules() if isinstance(m, CenteredSoftplus)]
    torch.testing.assert_close(relu(x), net(x), atol=2e-3, rtol=0)  # β = 1000 is ReLU to log2/1000 a unit
    assert isinstance(relu_reading(CenteredSoftplus()), nn.ReLU), "of an activation alone too"
    assert relu_reading(CenteredSoftplus(cap=6.0))(torch.tensor([-1.0, 3.0, 9.0])).tolist() == [0, 3, 6]
    set_beta(net, 1e-4)
    affine = net(x) - net(torch.zeros(1, 4))
    torch.testing.assert_close(affine, 2 * (net(x / 2) - net(torch.zeros(1, 4))), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="CenteredSoftplus"):
        set_beta(nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match="beta"):
        set_beta(net, -1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet(19, num_classes=2), "10, 18, 34, got 19"),
        (lambda: resnet(18, num_classes=0), "num_classes"),
        (lambda: resnet(18, num_classes=2, lcnn=True, gamma=-1), "gamma"),
        (lambda: mlp([3]), "sizes"),
        (lambda: mlp([3, 0, 2]), r"sizes\[1\]"),
        (lambda: vgg11(num_classes=2, beta=math.nan), "beta"),
        (lambda: mlp([3, 4, 2], beta=0.0), "beta"),
        (lambda: resnet(10, num_classes=2, lcnn=True, ordinary=True), "ordinary=True with lcnn=False"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
    "resnet50": (torchvision.models.resnet50, 32, "maxpool"),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, 32, "maxpool"),
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


@pytest.mark.parametrize("training", [False, True])
def test_graphs_of_our_nets(training):
    """torch.fx, torchvision's feature extractor and torch.export see each layer, in training and in eval."""
    net = NETS["resnet10"](True).train(training)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, traced = copy.deepcopy(net), fx.symbolic_trace(copy.deepcopy(net))
    torch.testing.assert_close(traced(x), ours(x), rtol=0, atol=0)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value, rtol=0, atol=0)
    other = copy.deepcopy(net)
    wanted = [other[3].activation, other[5]]
    hooks = {}
    for module in wanted:
        module.register_forward_hook(lambda m, _, out: hooks.update({m: out}))
    other(x)
    found = create_feature_extractor(net, {"3": "block", "5": "last"})(x)
    torch.testing.assert_close(found["block"], hooks[wanted[0]], rtol=0, atol=0)
    torch.testing.assert_close(found["last"], hooks[wanted[1]], rtol=0, atol=0)
    if not training:
        exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), net(x))
        each = torch.func.vmap(lambda one: net(one[None])[0])(x)
        torch.testing.assert_close(each, net(x))


def test_an_ensemble_by_vmap():
    """β, weights and statistics of two nets at once."""
    nets = [NETS["resnet10"](True).eval() for _ in range(2)]
    set_beta(nets[1], 2.0)
    x = torch.rand(3, 1, 8, 8)
    both = torch.func.vmap(lambda *state: torch.func.functional_call(nets[0], state, (x,)))(
        *torch.func.stack_module_state(nets)
    )
    for out, net in zip(both, nets, strict=True):
        torch.testing.assert_close(out, net(x), rtol=1e-4, atol=1e-5)


def small_vit(**options):
    return torchvision.models.VisionTransformer(32, 16, num_layers=12, num_heads=2, hidden_dim=8, mlp_dim=8, **options)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (torchvision.models.densenet121, ["denseblock1.denselayer1.conv2", "features.pool0", "the model (relu)"]),
        (torchvision.models.mobilenet_v3_small, ["fc1 (Conv2d)", "block.1 (mul)", "Hardswish"]),
        (small_vit, ["conv_proj", "LayerNorm", "MultiheadAttention"]),
    ],
    ids=["densenet", "mobilenet_v3", "vit"],
)
def test_conversion_says_in_one_paragraph_what_large_nets_hide(build, names):
    torch.manual_seed(0)
    model = build(num_classes=7).eval()
    with pytest.warns(UserWarning, match="to_low_curvature left something") as caught:
        converted = to_low_curvature(model, torch.rand(2, 3, 32, 32), iterations=2)
    text = str(caught[0].message)
    assert [name for name in names if name not in text] == []
    assert len(text) < 600
    assert converted(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_converted_convolutions_have_norm_one_and_slopes_stay_below_gamma():
    model = warm(torchvision.models.resnet18(num_classes=5), 32)
    with pytest.warns(UserWarning, match="maxpool"):
        converted = to_low_curvature(model, torch.rand(1, 3, 32, 32), gamma=2.0, iterations=50)
    conv = converted.layer4[1].conv2
    assert conv_norm(conv, (512, 1, 1), "exact").item() == pytest.approx(1, abs=0.02)
    slopes = [m.lipschitz_constant() for m in converted.modules() if isinstance(m, LipschitzBatchNorm2d)]
    assert len(slopes) == 20
    assert max(slopes) <= 2.0 + 1e-5


def test_conversion_of_an_mlp_and_of_what_cannot_be():
    plain = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3), nn.GELU())
    with pytest.warns(UserWarning, match=r"3 \(GELU\)"):
        converted = to_low_curvature(plain, torch.randn(2, 6), beta=1e4)
    x = torch.randn(10, 6)
    torch.testing.assert_close(converted(x), plain(x), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="nothing to convert"):
        to_low_curvature(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="does not run on an input of shape"):
        to_low_curvature(plain, torch.randn(1, 5))
    with pytest.raises(ValueError, match="beta"):
        to_low_curvature(plain, torch.randn(1, 6), beta=0)


def test_shared_relu_becomes_one_shared_unit():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.also = self.relu

        def forward(self, x):
            return self.also(self.relu(x) - 1)

    converted = to_low_curvature(Twice(), torch.randn(1, 2))
    assert converted.relu is converted.also


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


def small(net, x):
    return usual(net, F.avg_pool2d(x, 2))


def with_conv(change):
    net = Net(usual)
    change(net.conv)
    return net


def zeroed(layer):
    layer.weight.data.zero_()


def with_sizes(net, x):
    h = usual(net, x)
    n, c, height, width = h.shape
    return h.view(n, c, -1)[:, :, : height * width // 2]


def on_both(net, x):
    h = net.conv(x)
    return net.relu(net.bn(h)) + net.other(h)


def hooked(layer):
    layer.register_forward_hook(lambda _, __, out: out * 2)
    return layer


KEPT = {
    "two image sizes": lambda: Net(lambda net, x: small(net, x).sum() + usual(net, x)),
    "two calls, two BatchNorms": lambda: Net(lambda net, x: usual(net, x) + net.other(net.conv(x)), other=bn()),
    "one call, two BatchNorms": lambda: Net(on_both, other=bn()),
    "sizes and slices": lambda: Net(with_sizes),
    "grouped, dilated": lambda: Net(usual, conv=conv(padding=2, dilation=2, groups=2)),
    "no padding, strided": lambda: Net(usual, conv=conv(padding="valid", stride=2)),
    "zero kernel": lambda: with_conv(zeroed),
    "no affine": lambda: Net(usual, bn=bn(affine=False)),
    "root ReLU": nn.ReLU,
    "root BatchNorm": bn,
    "checkpoint": lambda: Net(lambda net, x: checkpoint(lambda y: usual(net, y), x, use_reentrant=False)),
    "another trace": lambda: fx.symbolic_trace(Net(usual)),
    "no input": lambda: Net(lambda net, x: usual(net, x) * net.a.relu(), a=nn.Parameter(torch.ones(()))),
    "linear": lambda: Net(lambda net, x: (usual(net, x) / 3 @ torch.ones(8, 3) - 1).mean((2, 3))),
    "float64": lambda: Net(usual).double(),
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
    assert not [name for m in converted.modules() for name in vars(m) if "constant" in name], "tracing left something"
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    for layer in converted.modules():
        if isinstance(layer, nn.Conv2d):
            assert conv_norm(layer, (2, 8, 8), "exact").item() == pytest.approx(float(case != "zero kernel"), abs=0.03)


class OwnConv(nn.Conv2d):
    """Weights of mean 0, as in weight standardisation."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Shifted(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, -1.0) if x.sum() > 0 else x


NAMED = {
    "output": (lambda net, x: (usual(net, x), net.conv(x)), {}, ["conv"]),
    "read twice": (on_both, dict(other=nn.Identity()), ["conv"]),
    "read in place": (lambda net, x: (h := net.conv(x), h.relu_(), net.bn(h))[2], {}, ["conv", "relu"]),
    "ReLU in place": (lambda net, x: (h := net.bn(net.conv(x)), net.g(h) + h)[1], dict(g=nn.ReLU(True)), ["g (ReLU)"]),
    "one BatchNorm": (lambda net, x: usual(net, x) + net.bn(net.other(x)), dict(other=conv()), ["conv", "other"]),
    "no BatchNorm": (lambda net, x: net.conv(x), {}, ["conv"]),
    "padding": (usual, dict(conv=conv(padding_mode="circular")), ["conv"]),
    "lopsided": (usual, dict(conv=conv(kernel=2, padding="same")), ["conv"]),
    "transposed": (usual, dict(conv=nn.ConvTranspose2d(2, 2, 3)), ["conv"]),
    "one dimension": (lambda net, x: net.c(usual(net, x)[0]), dict(c=nn.Conv1d(8, 2, 3)), ["c (Conv1d)"]),
    "no statistics": (usual, dict(bn=bn(track_running_stats=False)), ["conv", "bn"]),
    "BatchNorm1d": (lambda net, x: net.b(usual(net, x).flatten(1)), dict(b=nn.BatchNorm1d(128)), ["b (BatchNorm1d)"]),
    "unused": (usual, dict(other=conv()), ["other"]),
    "functional": (lambda net, x: usual(net, F.conv2d(x, net.other.weight)), dict(other=conv()), ["conv2d", "other"]),
    "custom": (lambda net, x: net.other(usual(net, x)), dict(other=Shifted()), ["other (Shifted)"]),
    "squeeze": (lambda net, x: usual(net, x) * usual(net, x).mean(), {}, ["mul"]),
    "square": (lambda net, x: (h := usual(net, x), h * h)[1], {}, ["mul"]),
    "read by a value": (lambda net, x: usual(net, x) * x.mean().item(), {}, ["item"]),
    "own layer": (usual, dict(conv=OwnConv(2, 2, 3)), ["conv"]),
}
KINKS = {
    "threshold": lambda x: F.threshold(x, 0.1, 0.0), "where": lambda x: torch.where(x > 0, x, x / 2), "celu": F.celu,
    "leaky_relu": F.leaky_relu_, "elu": lambda x: F.elu(x, inplace=True), "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "sort": lambda x: x.sort(-1)[0], "topk": lambda x: x.topk(2).values, "clamp": lambda x: x.clamp(0, 1), "abs": abs,
    "maximum": lambda x: torch.maximum(x, -x), "relu": F.relu, "relu_": lambda x: x.relu_(), "sign": torch.sign,
    "max_pool2d": nn.MaxPool2d(2), "adaptive_max_pool2d": nn.AdaptiveMaxPool2d(2), "hardswish": nn.Hardswish(),
    "norm": lambda x: x / x.norm(), "prelu": nn.PReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(), "tanh": torch.tanh, "softmax": nn.Softmax(-1), "layer_norm": nn.LayerNorm(8),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x), "truediv": lambda x: 1 / (x + 9),
}  # fmt: skip
CURVES = {"squeeze", "square", "silu", "gelu", "mish", "sigmoid", "tanh", "softmax", "layer_norm", "truediv"}
CURVES |= {"scaled_dot_product_attention", "norm"}  # smooth, the others may have kinks
NAMED |= {name: (lambda net, x: net.g(usual(net, x)), dict(g=g), [name.strip("_")]) for name, g in KINKS.items()}


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conversion_names_what_stays(case):
    torch.manual_seed(0)
    f, layers, names = NAMED[case]
    with pytest.warns(UserWarning, match="to_low_curvature left something") as caught:
        to_low_curvature(Net(f, **layers).eval(), torch.rand(2, 2, 8, 8))
    text = str(caught[-1].message).partition(": ")[2]
    assert all(name.replace("_", "") in text.replace("_", "").lower() for name in map(str.lower, names))
    assert ("no β bounds" in text) == (case in CURVES)
    assert len(text) < 600


def test_a_net_in_data_parallel_is_converted_and_bounded_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(conv(), bn(), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = torch.rand(2, 2, 4, 4)
    converted = to_low_curvature(nn.DataParallel(net), x)
    torch.testing.assert_close(converted(x), to_low_curvature(net, x)(x))
    assert curvature_bound(nn.DataParallel(converted), (2, 4, 4)) == curvature_bound(converted, (2, 4, 4))


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


class Keeps(nn.Sequential):
    def __init__(self):
        super().__init__(conv(), bn())
        self.list = [self[1]]


def one_by_one(net, x):
    return torch.cat([usual(net, image[None]) for image in x])


REFUSED = {
    "weight norm by hooks": (lambda: with_conv(torch.nn.utils.weight_norm), "conv.*remove_weight_norm"),
    "spectral norm by hooks": (lambda: with_conv(torch.nn.utils.spectral_norm), "conv.*remove_spectral_norm"),
    "weight norm": (lambda: with_conv(parametrizations.weight_norm), "conv.*remove_parametrizations"),
    "spectral norm": (lambda: with_conv(parametrizations.spectral_norm), "conv.*remove_parametrizations"),
    "converted": (lambda: to_low_curvature(Net(usual), torch.rand(1, 2, 8, 8)), "conv.*a converted net"),
    "hook": (lambda: Net(usual, conv=hooked(conv())), "conv has hooks"),
    "branch": (lambda: Net(lambda net, x: usual(net, x) if x.sum() > 0 else x), "forward of Net depends on its data"),
    "loop": (lambda: Net(one_by_one), "forward of Net depends on its data"),
    "type": (lambda: Net(lambda net, x: usual(net, x) if isinstance(x, torch.Tensor) else x), "type of a tensor"),
    "chance": (lambda: Net(lambda net, x: usual(net, x + torch.randn_like(x))), "chance"),
    "shape": (lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "does not run"),
    "a list of layers": (Keeps, "ModuleList"),
    "functions only": (lambda: nn.Sequential(Shifted()), "nothing to convert"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_conversion_refuses_with_a_way_out(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        to_low_curvature(build(), torch.rand(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [([[1.0]], {}, "list"), (None, dict(beta=math.nan), "beta"), (None, dict(gamma=-1.0), "gamma"),
     (None, dict(iterations=0), "iterations")],
)  # fmt: skip
def test_conversion_refuses_bad_arguments(example, options, message):
    with pytest.raises(ValueError, match=message):
        to_low_curvature(Net(usual), torch.rand(1, 2, 8, 8) if example is None else example, **options)


def test_our_standard_net_converts_silently_and_keeps_its_function():
    """Its spectrally normalised classifier is no layer to warn of."""
    torch.manual_seed(0)
    net = resnet(10, num_classes=3, width=4, in_channels=1, image_size=8)
    x = torch.rand(8, 1, 8, 8)
    net(x)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = to_low_curvature(net, x, gamma=1e4)
    torch.testing.assert_close(converted(x), net(x), rtol=1e-4, atol=1e-5)
