"""Slopes of layers against dense matrices; walks of nets written in Python; what has no bound is named."""

import pytest
import torch
from torch import nn

from lcnn_utils.curvature import bound_graph, curvature_bound, geometry, layer_terms, local_bound
from lcnn_utils.curvature.bounds import _local
from lcnn_utils.nn import CenteredSoftplus

SLACK = 1 + 1e-9


def dense(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return layer(basis).detach().flatten(1).mT


def conv(stride: int, groups: int) -> nn.Module:
    return nn.Conv2d(4, 6, 3, stride, 1, groups=groups, bias=False).double()


POOLS = [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((1, 2), 2, 0, True), nn.AvgPool2d(3, 1, 1, False, False)]
POOLS += [nn.AdaptiveAvgPool2d((2, 1)), nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2, divisor_override=3)]


@pytest.mark.parametrize("layer", [*POOLS, conv(1, 1), conv(2, 1), conv(1, 2), conv(2, 2)])
def test_slopes_and_columns_against_the_dense_matrix(layer):
    shape = (4, 5, 4)
    matrix = dense(layer, shape)
    norm, largest = torch.linalg.matrix_norm(matrix, 2).item(), matrix.norm(dim=0).max().item()
    slope, column = bound_graph._slopes(layer, "layer", shape, True)
    assert norm <= slope * SLACK <= norm * (1 + 1e-6)
    assert largest <= column * SLACK
    assert bound_graph._slopes(layer, "layer", shape, False)[0] <= norm * SLACK


def test_a_batchnorm_is_bounded_together_with_its_linear_layer():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), CenteredSoftplus(2.0), nn.Linear(5, 2)).double()
    net(torch.randn(30, 4).double() * 3)  # moves the running statistics
    net[1].weight.data = torch.randn(5).double()
    frame = layer_terms(net, (4,))
    scale = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    fused = torch.linalg.matrix_norm(scale[:, None] * net[0].weight, 2).item()
    assert frame.before[2] == pytest.approx(fused, rel=1e-12)
    assert fused < torch.linalg.matrix_norm(net[0].weight, 2).item() * scale.abs().max().item()
    assert frame.slope[1] == pytest.approx(fused / frame.slope[0], rel=1e-12)


class Forward(nn.Module):
    """A net given by its forward: a function of (self, x), with linear layers l1, l2 … and an activation s."""

    def __init__(self, forward, *sizes):
        super().__init__()
        self.function, self.s = forward, CenteredSoftplus(3.0)
        for i, size in enumerate(sizes, 1):
            setattr(self, f"l{i}", nn.Linear(*size))

    def forward(self, x):
        return self.function(self, x)


def written_out(s, x):
    x = s.s(s.l1(x.view(x.size(0), -1)))
    y = torch.cat([s.s(s.l2(x)) / 2, 3 * x - s.l2(x)], 1)
    return s.l3(y.reshape(x.shape[0], -1) * torch.tensor([1.0, -2.0] * 4) + 1)


def test_sums_multiples_concatenations_and_a_shared_activation():
    for seed in range(4):
        net = Forward(written_out, (3, 4), (4, 4), (8, 2)).double()
        x, y = torch.randn((20, 3), generator=torch.Generator().manual_seed(seed)).double(), torch.arange(20) % 2
        truth = geometry(net, x, y, scalar="margin", method="exact").hessian_norm
        assert (truth <= local_bound(net, x, y) * SLACK).all()
        assert (truth <= curvature_bound(net, (3,)) * SLACK).all()
        rows, _, _, norms, _ = _local(net, x, y, "margin")
        assert (norms <= norms.new_tensor([row["before"] for row in rows]) * SLACK).all()
    assert [row["layer"] for row in rows] == ["s"] * 2


def test_the_largest_multiple_counts():
    net = Forward(lambda s, x: s.l2(s.s(s.l1(x) * torch.tensor([1.0, -2.0]) / 0.5)), (3, 2), (2, 2)).double()
    want = 4 * torch.linalg.matrix_norm(net.l1.weight, 2).item()
    assert layer_terms(net, (3,)).before[1] == pytest.approx(want, rel=1e-12)


def test_a_walk_leaves_no_trace():
    net = Forward(lambda s, x: s.l1(x) * torch.tensor([1.0, 2.0]), (3, 2)).train()
    before = set(vars(net))
    assert curvature_bound(net, (3,)) == curvature_bound(nn.Linear(3, 2), (3,)) == 0
    assert set(vars(net)) == before
    assert net.training
    assert net.l1.training


class Scaled(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


def hooked(net, module):
    module.register_forward_hook(lambda module, inputs, output: 10 * output)
    return net


def plain(activation=None):
    return nn.Sequential(nn.Linear(3, 4), activation or CenteredSoftplus(2.0), nn.Linear(4, 2))


def added_in_place(s, x):
    z = s.l1(x)
    w = z
    w += s.l2(x)
    return s.l3(s.s(z))


THREE = ((3, 4), (3, 4), (4, 2))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (plain(nn.ReLU()), r"no bound is known for 1 = ReLU\(\).*to_low"),
        (hooked(net := plain(), net[0]), "no bound is known for 0 = .*hooks"),
        (nn.Sequential(Scaled(3, 4), CenteredSoftplus(2.0), nn.Linear(4, 2)), "a forward of their own"),
        (Forward(added_in_place, *THREE), "does something else than its trace"),
        (Forward(lambda s, x: s.l1(x) if x.sum() > 0 else -s.l1(x), *THREE), "depends on its data"),
        (Forward(lambda s, x: s.l1(x) * s.l2(x), *THREE), "no bound is known for mul"),
        (Forward(lambda s, x: s.l1(x) + s.l2(x), (3, 4), (3, 1)), "no bound is known for add"),  # it broadcasts
        (plain(nn.Linear(4, 4).requires_grad_(False).apply(lambda m: m.weight.fill_(torch.nan))), "not finite"),
    ],
)
def test_what_cannot_be_bounded_is_named(net, message):
    with pytest.raises(ValueError, match=message):
        curvature_bound(net, (3,))
