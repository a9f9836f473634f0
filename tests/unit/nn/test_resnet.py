"""The nets: shapes, what LCNN layers promise, torchvision's ResNet-18 as reference, graphs and ensembles of them."""

import math

import pytest
import torch
import torchvision
from torch import nn

from lcnn_utils.nn import (
    AveragedBlock,
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    conv_norm,
    mlp,
    refresh_norms,
    relu_reading,
    resnet,
)


def test_lcnn_layers_are_what_they_are_called():
    torch.manual_seed(0)
    net = resnet(18, num_classes=10, width=4, image_size=8, lcnn=True)
    refresh_norms(net, 200)
    shapes = {}
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_pre_hook(lambda m, inputs: shapes.update({m: tuple(inputs[0].shape[1:])}))
    net.eval()(torch.rand(1, 3, 8, 8))
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


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_block_averages_or_adds(ordinary):
    torch.manual_seed(0)
    net = resnet(18, num_classes=2, width=3, in_channels=1, image_size=8, ordinary=ordinary).eval()
    x, blocks = torch.rand(4, 3, 8, 8), [m for m in net.modules() if isinstance(m, AveragedBlock)]
    for block in blocks[:3]:  # the third has another size and number of channels
        f, s = block.branch, block.shortcut
        before = f(x) + s(x) if ordinary else (f(x / math.sqrt(2)) + s(x / math.sqrt(2))) / 2
        torch.testing.assert_close(block(x), block.activation(before))


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


def test_relu_reading():
    torch.manual_seed(0)
    net = mlp([4, 32, 3])
    x = torch.randn(64, 4)
    relu = relu_reading(net)
    assert not [m for m in relu.modules() if isinstance(m, CenteredSoftplus)]
    torch.testing.assert_close(relu(x), net(x), atol=2e-3, rtol=0)  # β = 1000 is ReLU to log2/1000 a unit
    assert isinstance(relu_reading(CenteredSoftplus()), nn.ReLU), "of an activation alone too"
    assert relu_reading(CenteredSoftplus(cap=6.0))(torch.tensor([-1.0, 3.0, 9.0])).tolist() == [0, 3, 6]
