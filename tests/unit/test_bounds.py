"""The bounds hold, on many random nets and against exact Hessians; what breaks when an assumption is dropped does."""

import itertools
import threading

import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.curvature import bound_graph as walk
from lcnn_utils.curvature import bounds, geometry, gradient_and_hvp
from lcnn_utils.nn import CenteredSoftplus, conv_norm
from lcnn_utils.studies import bounds as studies

SLACK = 1 + 1e-9


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_all_hold(frame: pd.DataFrame) -> int:
    """(A), (B), (C) and their order, in an audit; returns at how many points the published form fails."""
    assert (frame.hessian <= frame.local * SLACK + 1e-300).all()
    assert (frame.hessian <= frame.data_free * SLACK).all()
    fine = frame[frame.gradient > 0]
    assert (fine.curvature <= fine.normalised * SLACK).all()
    assert (fine.local <= fine.normalised * fine.gradient * SLACK + 1e-300).all()  # (C) is (A) with Lip for ‖A_i‖
    broken = fine[fine.curvature > fine.published * SLACK]
    assert (broken.kappa > 1).all()  # it can only fail where some κ_i > 1
    return len(broken)


def test_the_bounds_hold_for_random_mlps():
    """Margins and logits in turn, two points each; ``benchmarks/bounds.py`` audits ten thousand."""
    frame = studies.audit_frame(range(500))
    assert frame.net.nunique() > 450  # points with next to no gradient are left out
    failed = assert_all_hold(frame)
    assert 0 < failed < 50, "the published form fails now and then"
    assert (frame.published_widths >= frame.published).all()


def test_the_bounds_hold_for_random_cnns():
    for seed in range(40):
        model, shape = studies.random_cnn(seed)
        x = torch.rand((2, *shape), generator=generator(seed + 1), dtype=torch.float64)
        assert_all_hold(studies.audit(model, x, torch.tensor([0, 2]), bounds.SCALARS[seed // 4 % 2]))


def test_the_chain_rule_of_the_docstring():
    model = studies.random_mlp(7)
    x = torch.randn((1, model[1].in_features), dtype=torch.float64, generator=generator(0))
    hvp = gradient_and_hvp(model, x, torch.tensor([0]), "logit")[1]
    exact = torch.cat([hvp(e[None]) for e in torch.eye(x.shape[1], dtype=x.dtype)])
    total, z, jacobian = torch.zeros_like(exact), x[0], torch.eye(x.shape[1], dtype=x.dtype)
    layers = list(model)[1:]
    for i, layer in enumerate(layers):
        if isinstance(layer, CenteredSoftplus):
            u = z.detach().requires_grad_()
            value = layer(u)
            (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), u)
            rest = value.detach().requires_grad_()
            (g,) = torch.autograd.grad(nn.Sequential(*layers[i + 1 :])(rest[None])[0, 0], rest)
            total += jacobian.mT @ torch.diag(g * bend) @ jacobian
            jacobian, z = slope.detach()[:, None] * jacobian, value.detach()
        else:
            jacobian = (
                torch.stack([layer((z + e)[None])[0] - layer(z[None])[0] for e in torch.eye(len(z)).to(z)], 1)
                @ jacobian
            )
            z = layer(z[None])[0].detach()
    torch.testing.assert_close(total, exact)


# ---------------------------------------------------------------------------------------- the published form
def test_the_published_form_fails_where_gradients_cancel():
    model, x = studies.Cancelling(5.0).double(), torch.tensor([[0.0], [0.01], [1.0]], dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.long)
    g = geometry(model, x, y, scalar="logit", method="exact", eps=0.0)
    torch.testing.assert_close(g.hessian_norm[0].item(), 2 * 5 / 4, rtol=1e-6, atol=0)
    assert g.grad_norm[0] < 1e-12
    assert g.curvature[1] > 50 > 2**0.5 * 5 * 2
    published = bounds.published_bound(model, (1,))
    assert published == pytest.approx(5 * 2**0.5, rel=1e-6)  # β‖W‖
    assert bounds.published_bound(model, (1,), widths=True) == pytest.approx(2 * 5 * 2**0.5, rel=1e-6)
    assert (g.curvature[:2] > published).all()
    assert g.curvature[2] < published
    normalised = bounds.normalised_bound(model, x, y, scalar="logit")
    assert normalised.bound[0] > 1e12
    assert (g.curvature[1:] <= normalised.bound[1:] * SLACK).all()
    assert (normalised.kappa[:2] > 1).all()


def test_a_chain_of_single_units_obeys_the_published_form():
    for seed in range(200):
        model = studies.scramble(models.mlp([1, 1, 1, 1, 2], beta=float(1 + seed % 7)), seed)
        x = torch.randn((8, 1), generator=generator(seed), dtype=torch.float64)
        g = geometry(model, x, torch.zeros(8, dtype=torch.long), scalar="logit", method="exact", eps=0.0)
        assert (g.curvature <= bounds.published_bound(model, (1,)) * SLACK).all()


# ------------------------------------------------------------------------------------------ single layers
@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 7), kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 1),
       ceil=st.booleans(), include=st.booleans(), out=st.integers(1, 7))  # fmt: skip
def test_pooling_norms_are_those_of_the_dense_matrix(size, kernel, stride, padding, ceil, include, out):
    pools = [nn.AdaptiveAvgPool2d((out, 1))]
    if kernel <= size and padding <= kernel // 2:
        pools.append(nn.AvgPool2d((kernel, min(kernel + 1, size)), stride, (padding, 0), ceil, include))
    for pool in pools:
        basis = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
        matrix = pool(basis).flatten(1).mT
        slope, column = walk._slopes(pool, "pool", (3, size, size), True)
        assert slope == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-12)
        assert column == pytest.approx(matrix.norm(dim=0).max().item(), rel=1e-12)


@pytest.mark.parametrize(("stride", "groups", "size"), list(itertools.product((1, 2), (1, 2), (3, 6))))
def test_convolution_slopes_and_columns(stride, groups, size):
    conv = nn.Conv2d(4, 6, 3, stride, 1, groups=groups, bias=False).double()
    basis = torch.eye(4 * size**2, dtype=torch.float64).view(-1, 4, size, size)
    matrix = conv(basis).detach().flatten(1).mT
    norm, largest = torch.linalg.matrix_norm(matrix, 2).item(), matrix.norm(dim=0).max().item()
    slope, column = walk._slopes(conv, "conv", (4, size, size), True)
    assert norm <= slope * SLACK <= 1.3 * norm
    assert largest <= column * SLACK
    assert walk._slopes(conv, "conv", (4, size, size), False)[0] <= norm * SLACK


@pytest.mark.parametrize("stride", [1, 2])
def test_certified_convolution_norm_is_within_one_per_cent_at_32(stride):
    conv = nn.Conv2d(1, 1, 3, stride, 1, bias=False)
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator(stride))
    exact, bound = (conv_norm(conv, (1, 32, 32), method).item() for method in ("exact", "bound"))
    assert exact <= bound <= 1.01 * exact


def test_a_batchnorm_is_bounded_together_with_its_linear_layer():
    net = studies.scramble(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), CenteredSoftplus(2.0), nn.Linear(5, 2)), 0)
    frame = bounds.layer_terms(net, input_shape=(4,))
    scale = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    fused = torch.linalg.matrix_norm(scale[:, None] * net[0].weight, 2).item()
    apart = torch.linalg.matrix_norm(net[0].weight, 2).item() * scale.abs().max().item()
    assert frame.before[2] == pytest.approx(fused, rel=1e-12)
    assert fused < apart
    assert frame.slope[1] == pytest.approx(fused / frame.slope[0], rel=1e-12)


# ----------------------------------------------------------------------------------------- walks of other nets
class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.s = nn.Linear(3, 4), nn.Linear(4, 4), CenteredSoftplus(3.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.s(self.a(x.view(x.size(0), -1)))
        y = torch.cat([self.s(self.b(x)) / 2, 3 * x - self.b(x)], 1)
        return self.head(y.reshape(x.shape[0], -1) + 1)


def test_sums_concatenations_and_a_shared_activation():
    for seed in range(50):
        model = studies.scramble(Functional(), seed)
        x = torch.randn((2, 3), generator=generator(seed), dtype=torch.float64)
        assert_all_hold(studies.audit(model, x, torch.tensor([0, 1])))
    assert list(bounds.layer_terms(model, x, torch.tensor([0, 1])).layer) == ["s"] * 4


@pytest.mark.filterwarnings("ignore:to_low_curvature left something")
def test_a_converted_torchvision_resnet():
    net = torchvision.models.resnet18(num_classes=4)
    net.maxpool = nn.AvgPool2d(2)
    torch.manual_seed(0)
    converted = models.to_low_curvature(net.eval(), torch.rand(1, 3, 16, 16)).eval()
    frame = bounds.layer_terms(converted, input_shape=(3, 16, 16), certified=False)
    assert (frame.kind == "CenteredSoftplus").sum() == 17
    assert (frame.contribution[frame.kind == "CenteredSoftplus"] > 0).all()
    x, y = torch.rand(2, 3, 16, 16, generator=generator(0)), torch.tensor([0, 3])
    assert (geometry(converted, x, y, scalar="margin").hessian_norm <= frame.contribution.sum()).all()


def test_terms_add_up():
    model = studies.random_mlp(3)
    d = model[1].in_features
    x, y = torch.randn((5, d), generator=generator(0), dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    frame = bounds.layer_terms(model, input_shape=(d,))
    assert frame.contribution.sum() == pytest.approx(bounds.curvature_bound(model, (d,)), rel=1e-12)
    assert list(frame.layer) == [str(i) for i in range(len(model))]
    local = bounds.layer_terms(model, x, y)
    sums = torch.tensor(local.groupby("sample").contribution.sum().to_numpy())
    torch.testing.assert_close(sums, bounds.local_bound(model, x, y))
    kappa = torch.tensor(local.pivot(index="sample", columns="layer", values="kappa").to_numpy())
    torch.testing.assert_close(kappa, bounds.normalised_bound(model, x, y).kappa)


def test_it_is_never_looser_than_the_product_of_norms():
    for seed in range(100):
        model = studies.scramble(models.mlp([3, 4, 5, 2], beta=2.0), seed)
        w = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in model if isinstance(layer, nn.Linear)]
        pair = (model[-1].weight[0] - model[-1].weight[1]).norm().item()
        textbook = 0.5 * w[0] ** 2 * w[1] * pair + 0.5 * (w[0] * w[1]) ** 2 * pair
        assert bounds.curvature_bound(model, (3,)) <= textbook * SLACK


# ------------------------------------------------------------------------------------------------ certificates
def test_the_radius_in_closed_form():
    """A linear margin: distance to the line. The parabola that (B) allows: the root of m − gr − Kr²/2."""
    linear = nn.Sequential(nn.Linear(3, 2)).double()
    x = torch.randn((20, 3), generator=generator(0), dtype=torch.float64)
    y = linear(x).argmax(1)
    w = (linear[0].weight[0] - linear[0].weight[1]).norm()
    torch.testing.assert_close(bounds.certified_radius(linear, x, y), (linear(x)[:, 0] - linear(x)[:, 1]).abs() / w)
    assert (bounds.certified_radius(linear, x, 1 - y) == 0).all()
    model = studies.scramble(models.mlp([3, 4, 2], beta=2.0), 1)
    y = model(x).argmax(1)
    r, k = bounds.certified_radius(model, x, y), bounds.curvature_bound(model, (3,))
    g = geometry(model, x, y, scalar="margin", method="exact").grad_norm
    m = (model(x)[:, 0] - model(x)[:, 1]).abs()
    torch.testing.assert_close(m, g * r + k * r**2 / 2, rtol=1e-6, atol=1e-12)


def test_no_walk_out_of_the_ball_changes_the_class():
    """Random nets, steps straight at each other class and into random directions, right up to the radius."""
    for seed in range(300):
        model = studies.scramble(models.mlp([2, 6, 5, 3], lcnn=bool(seed % 2), beta=2.0), seed)
        x = torch.randn((40, 2), generator=generator(seed), dtype=torch.float64)
        y = model(x).argmax(1)
        radius = bounds.certified_radius(model, x, y)
        assert (radius > 0).all()
        turns = torch.linspace(0, 2 * torch.pi, 33, dtype=torch.float64)[:-1]
        steps = torch.stack([turns.cos(), turns.sin()], 1)
        for share in (0.3, 0.9, 0.999):
            around = x[:, None] + share * radius[:, None, None] * steps
            assert (model(around.flatten(0, 1)).argmax(1).view(len(x), -1) == y[:, None]).all()


def test_dtype_device_and_mode_come_back_as_they_were():
    model = models.mlp([2, 4, 2], lcnn=True).train()
    x, y = torch.randn((3, 2), generator=generator(0)), torch.tensor([0, 1, 0])
    for value in (bounds.certified_radius(model, x, y), bounds.local_bound(model, x, y)):
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert all(module.training for module in model.modules())
    assert next(model.parameters()).dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ errors
class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), r"no bound is known for 1 = ReLU\(\).*to_low"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2)), Branching()), "no bound is known for 1 = Branching"),
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(Calls(torch.tanh))), r"no bound is known for 1.0 = Calls"),
        (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), "no bound is known for 0 = BatchNorm1d"),
        (nn.Sequential(nn.Linear(2, 1)), "K >= 2"),
        (nn.Sequential(nn.Linear(3, 2)), r"does not take inputs of shape \(2,\)"),
    ],
)
def test_what_cannot_be_bounded_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        bounds.curvature_bound(model, (2,))


class Direct(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(2, 2), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [(torch.relu, "relu"), (lambda z: z.relu(), "the method relu"), (lambda z: z * z, "mul"),
     (lambda z: torch.add(z, z, alpha=3), "add"), (lambda z: 1 / z, "truediv")],
)  # fmt: skip
def test_functions_called_in_a_forward_are_named(function, message):
    with pytest.raises(ValueError, match=f"no bound is known for {message}"):
        bounds.curvature_bound(Direct(function), (2,))


def test_bad_arguments(monkeypatch):
    model, x = models.mlp([2, 3, 2], lcnn=True).eval(), torch.zeros(2, 2)
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="did you mean"):
        bounds.curvature_bound(model, (2,), scalar="margins")
    with pytest.raises(ValueError, match="margin"):
        bounds.local_bound(model, x, y, scalar="loss")
    with pytest.raises(ValueError, match="labels"):
        bounds.certified_radius(model, x, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="NaN"):
        bounds.local_bound(model, x * torch.nan, y)
    with pytest.raises(ValueError, match="give input_shape"):
        bounds.layer_terms(model)
    with pytest.raises(ValueError, match="labels y are needed"):
        bounds.layer_terms(model, x)
    with pytest.raises(ValueError, match="no curved activation"):
        bounds.local_bound(nn.Sequential(nn.Linear(2, 2)), x, y)
    monkeypatch.setattr(bounds, "LARGEST", 5)
    with pytest.raises(ValueError, match="3 units by 2 inputs are too large: use curvature_bound"):
        bounds.local_bound(model, x, y)
    assert bounds.curvature_bound(nn.Sequential(nn.Linear(2, 2)), (2,)) == 0


# ---------------------------------------------------------------------------------- what only looks like a known layer
class Forward(nn.Module):
    """A net given by its forward: a function of (self, x), with layers l1 … and an activation s."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.function, self.s = forward, CenteredSoftplus(3.0)
        for i, layer in enumerate(layers, 1):
            setattr(self, f"l{i}", layer)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "model",
    [
        Forward(lambda s, x: s.l3(s.s(s.l1(x) * 1e-3 + s.l2(x))), nn.Linear(3, 20), nn.Linear(3, 1), nn.Linear(20, 2)),
        Forward(lambda s, x: s.l2(s.s(s.l1(x) * torch.ones(20))), nn.Linear(3, 1), nn.Linear(20, 2)),
        Forward(lambda s, x: s.l2(s.s(s.l1(x)) + torch.ones(20)), nn.Linear(3, 1), nn.Linear(20, 2)),
        Forward(lambda s, x: s.l3(s.l2(s.s(s.l1(x)))), nn.Linear(3, 4), nn.Sequential(), nn.Linear(4, 2)),
    ],
)
def test_broadcasting_and_empty_sequences(model):
    """A value copied to n places has √n times the norm."""
    for seed in range(20):
        studies.scramble(model, seed)
        with torch.no_grad():
            for layer in (model.l1, model.l2):
                if isinstance(layer, nn.Linear) and layer.out_features == 2:
                    layer.weight.copy_(torch.stack([torch.ones(20), -torch.ones(20)]))
        x = torch.randn((3, 3), generator=generator(seed), dtype=torch.float64)
        assert_all_hold(studies.audit(model, x, torch.tensor([0, 1, 0])))


def hooked(model):
    model[0].register_forward_hook(lambda module, inputs, output: 10 * output)
    return model


def hooked_root(model):
    model.register_forward_hook(lambda module, inputs, output: 10 * output)
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


def added_in_place(s, x):
    z = s.l1(x)
    w = z
    w += s.l2(x)
    return s.l3(s.s(z))


def plain():
    return nn.Sequential(nn.Linear(3, 4), CenteredSoftplus(2.0), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hooked(plain()), "no bound is known for 0 = .* it has hooks"),
        (hooked_root(plain()), "does something else than its trace"),
        (nn.Sequential(Scaled(3, 4), CenteredSoftplus(2.0), nn.Linear(4, 2)), "has a forward of its own"),
        (
            Forward(added_in_place, nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)),
            "does something else than its trace",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.Softplus(-3.0), nn.Linear(4, 2)), "beta > 0 and threshold >= 20"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Softplus(1.0, threshold=0.5), nn.Linear(4, 2)),
            "beta > 0 and threshold >= 20",
        ),
        (Forward(lambda s, x: s.l1(x).view(-1, 2), nn.Linear(3, 4)), "logits of shape"),
        (Forward(lambda s, x: s.l1(x).reshape(1, -1), nn.Linear(3, 4)), "logits of shape"),
        (Forward(lambda s, x: s.l2(torch.stack([s.l1(x), x]).sum(0)), nn.Linear(3, 3), nn.Linear(3, 2)), "stack"),
        (Forward(lambda s, x: (s.l1(x), x), nn.Linear(3, 4)), "got a tuple"),
        (nn.Sequential(Scaled(3, 2)), "a forward of its own"),
        (Forward(lambda s, x: s.l1(x) if x.sum() > 0 else -s.l1(x), nn.Linear(3, 2)), "depends on its data"),
    ],
)
def test_what_is_not_what_it_seems_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        bounds.curvature_bound(model, (3,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value):
    model = plain()
    model[2].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"2 = Linear.* holds NaN or infinity"):
        bounds.curvature_bound(model, (3,))
    with pytest.raises(ValueError, match="input_shape"):
        bounds.curvature_bound(plain(), (-3,))


def test_large_kernels_and_bare_layers_and_constants_leave_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 2, 32, 32), nn.Flatten())
    norm = torch.linalg.matrix_norm(net[0].weight.flatten(1), 2).item()
    assert bounds.layer_terms(net, input_shape=(3, 32, 32)).slope[0] == pytest.approx(norm, rel=1e-2)
    assert bounds.curvature_bound(nn.Linear(3, 2), (3,)) == 0
    model = Forward(lambda s, x: s.l1(x) * torch.tensor([1.0, 2.0]), nn.Linear(3, 2))
    before = set(vars(model))
    bounds.curvature_bound(model, (3,))
    assert set(vars(model)) == before


def test_nets_may_be_walked_and_used_in_several_threads_at_once():
    """As in JupyterLab, where a widget's callback runs beside the cells: torch.fx swaps nn.Module.__call__ for all."""
    one, other = models.mlp((2, 8, 8, 2), lcnn=True).eval(), models.mlp((2, 8, 2), lcnn=True).eval()
    x, call = torch.rand(3, 2), nn.Module.__call__
    expected, bound = [one(x), other(x)], bounds.curvature_bound(one, (2,))
    faults, ended = list[Exception](), threading.Event()

    def repeat(work):
        try:
            while not ended.is_set():
                work()
        except Exception as error:
            faults.append(error)

    def use():
        for net, logits in zip((one, other), expected, strict=True):
            torch.testing.assert_close(net(x), logits)

    threads = [
        threading.Thread(target=repeat, args=(work,), daemon=True)
        for work in (use, lambda: bounds.layer_terms(other, input_shape=(2,)))
    ]
    for thread in threads:
        thread.start()
    found = [bounds.curvature_bound(one, (2,)) for _ in range(30)]
    ended.set()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert set(found) == {bound}
    assert nn.Module.__call__ is call
