"""Networks: shapes, what LCNN layers promise, and conversion that keeps the function."""

import copy
import math
import warnings

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from lcnn_utils.activations import CenteredSoftplus
from lcnn_utils.lipschitz import LipschitzBatchNorm2d, conv_norm, refresh_norms
from lcnn_utils.models import AveragedBlock, OrdinaryBlock, mlp, relu_reading, resnet, set_beta, to_low_curvature, vgg11

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
    "resnet18": (torchvision.models.resnet18, 32, {"maxpool (MaxPool2d) is kept"}),
    "resnet50": (torchvision.models.resnet50, 32, {"maxpool (MaxPool2d) is kept"}),
    "vgg11_bn": (torchvision.models.vgg11_bn, 32, {"features.3 (MaxPool2d) is kept"}),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32, set()),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_conversion_keeps_the_function_when_the_constraints_are_slack(name):
    build, size, expected = TORCHVISION[name]
    model = warm(build(num_classes=7).double(), size)
    x = torch.rand(4, 3, size, size).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = to_low_curvature(model, x, beta=1e8, gamma=1e6, iterations=2)
    said = {note for w in caught for note in str(w.message).partition(": ")[2].split("; ")} - {""}
    assert expected <= said
    assert not [note for note in said if "loses its scale" in note]
    want, got = model(x), converted(x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    floating = [v for v in (*converted.parameters(), *converted.buffers()) if v.is_floating_point()]
    assert {v.dtype for v in floating} == {torch.float64}
    constants = [m.beta for m in converted.modules() if isinstance(m, CenteredSoftplus)]
    constants += [m.gamma * 100 for m in converted.modules() if isinstance(m, LipschitzBatchNorm2d)]
    assert torch.stack(constants).tolist() == pytest.approx([1e8] * len(constants), rel=1e-12)
    left = [type(m).__name__ for m in converted.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.BatchNorm2d)]
    assert not left
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


def test_conversion_names_what_densenet_hides():
    model = warm(torchvision.models.densenet121(num_classes=7), 32)
    with pytest.warns(UserWarning, match="the model.forward calls relu itself") as caught:
        converted = to_low_curvature(model, torch.rand(2, 3, 32, 32), iterations=2)
    text = str(caught[0].message)
    assert "features.pool0 (MaxPool2d) is kept" in text
    assert "features.denseblock1.denselayer1.conv2 loses its scale" in text
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
    with pytest.warns(UserWarning, match=r"3 \(GELU\) is kept"):
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


class Reads(nn.Module):
    """A convolution whose output is read by its BatchNorm and, if told so, by something else or through a clamp."""

    def __init__(self, also=False, clamp=False):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()
        self.also, self.clamp = also, clamp

    def forward(self, x):
        h = self.conv(x)
        y = self.bn(h) + h if self.also else self.bn(h)
        return self.relu(y.clamp(max=1.0) if self.clamp else y)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(also=True), "conv is read by more than its BatchNorm"), (dict(clamp=True), "forward calls clamp itself")],
)
def test_conversion_names_hidden_readers_and_functions(options, message):
    with pytest.warns(UserWarning, match=message):
        to_low_curvature(Reads(**options).eval(), torch.rand(1, 2, 6, 6))


def test_conversion_of_a_zero_kernel_and_bad_constants():
    plain = Reads().eval()
    plain.conv.weight.data.zero_()
    x = torch.rand(1, 2, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = to_low_curvature(plain, x, beta=1e4, gamma=1e6)
    torch.testing.assert_close(converted(x), plain(x), atol=1e-3, rtol=0)
    for bad in (dict(beta=math.nan), dict(gamma=-1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            to_low_curvature(nn.Sequential(nn.Conv2d(2, 2, 3)), x, **bad)


def test_a_batch_norm_used_twice_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.a(x)) + self.bn(self.b(x))

    with pytest.warns(UserWarning, match="bn is used more than once"):
        to_low_curvature(Twice().eval(), torch.rand(1, 2, 4, 4))


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
