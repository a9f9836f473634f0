"""The measurements of notebook 03 against closed forms, plain torch functions and torch.func, in float64."""

import copy
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.curvature import bounds
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d
from lcnn_utils.measurements import bound as measurements
from lcnn_utils.measurements.curvature import moons_grid

LOG2 = math.log(2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(model, x, beta=None, factor=None):
    """The logits of an MLP at x (d,), by torch's own functions; β and factors of the slope before, by layer name."""
    named, x = list(model.named_children()), x.flatten()
    for (name, layer), (following, _) in zip(named, [*named[1:], ("", None)], strict=True):
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight, layer.bias)
        elif isinstance(layer, LipschitzBatchNorm2d):
            slope = (layer.running_var + layer.eps).rsqrt().clamp(max=layer.log_gamma.exp())
            x = (x - layer.running_mean) * slope * (factor or {}).get(following, 1.0)
        elif isinstance(layer, CenteredSoftplus):
            b = (beta or {}).get(name, layer.log_beta.exp().item())
            x = F.softplus(x, b, threshold=300) - LOG2 / b
        else:
            assert isinstance(layer, nn.Flatten)
    return x


def plain_scalar(model, y, scalar, **changes):
    def f(x):
        z = plain(model, x, **changes)
        rest = torch.cat([z[:y], z[y + 1 :]])
        return {"logit": z[y], "margin": z[y] - rest.max(), "loss": z.logsumexp(0) - z[y]}[scalar]

    return f


def norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, 2).item()


def truths(model, x, y, scalar, **changes) -> tuple[np.ndarray, np.ndarray]:
    """‖∇f‖ and ‖∇²f‖ of each sample, by torch.func on the plain functions."""
    found = []
    for point, label in zip(x, y.tolist(), strict=True):
        f = plain_scalar(model, label, scalar, **changes)
        hessian = torch.func.hessian(f)(point.flatten())
        found.append((torch.func.grad(f)(point.flatten()).norm().item(), norm(hessian)))
    gradients, hessians = np.array(found).T
    return gradients, hessians


def lcnn(seed: int = 1, sizes=(2, 6, 5, 2)) -> nn.Sequential:
    torch.manual_seed(seed)
    return measurements.scramble(models.mlp(sizes, lcnn=True), seed)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- random nets -------------------------------------------------------------------------------------------------


def all_kinds() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, affine=False), CenteredSoftplus(), LipschitzBatchNorm2d(3, affine=True),
        nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), CenteredSoftplus(), nn.Linear(4, 2),
    )  # fmt: skip


def test_scramble_leaves_nothing_at_its_default():
    model = all_kinds()
    fresh = copy.deepcopy(model)
    assert measurements.scramble(model, 3) is model
    assert not any(module.training for module in model.modules())
    changed, default = model.state_dict(), fresh.state_dict()
    checked = 0
    for name, value in changed.items():
        if name.endswith("num_batches_tracked"):
            continue
        assert value.dtype == torch.float64
        assert (value != default[name].double()).all(), name
        assert len(value.unique()) == value.numel(), "no two entries alike"
        checked += name.endswith(("running_var", "running_mean", "log_beta", "log_gamma"))
        if name.endswith("running_var"):
            assert (value >= 0.1).all()
    assert checked == 9
    # weights are divided by the root of the number of inputs
    assert 0.5 < model[5].weight.norm(dim=1).pow(2).mean().item() < 2


def test_scramble_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = measurements.scramble(all_kinds(), 3)
    torch.manual_seed(2)
    other = all_kinds()
    other(torch.rand(8, 1, 3, 3))  # moves its statistics on
    other[1].num_batches_tracked.zero_()
    other[6].num_batches_tracked.zero_()
    other[3].get_buffer("num_batches_tracked").zero_()
    assert same(first, measurements.scramble(other, 3))
    again = measurements.scramble(all_kinds(), 4)
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_random_mlps_are_varied():
    nets = [measurements.random_mlp(seed) for seed in range(30)]
    depths, widths, outputs, betas, kinds = set(), set(), set(), set(), set()
    for net in nets:
        assert not any(module.training for module in net.modules())
        assert all(p.dtype == torch.float64 for p in net.parameters())
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        hidden = [layer for layer in net if isinstance(layer, CenteredSoftplus)]
        assert len(hidden) == len(linear) - 1
        depths.add(len(hidden))
        widths |= {layer.in_features for layer in linear}
        outputs.add(linear[-1].out_features)
        betas |= {round(layer.beta.item(), 4) for layer in hidden if not isinstance(layer.log_beta, nn.Parameter)}
        kinds.add(any(isinstance(layer, LipschitzBatchNorm2d) for layer in net))
        logits = net(draw(3, net[1].in_features))
        assert logits.isfinite().all()
        assert logits.dtype == torch.float64
    assert depths == {2, 3, 4}
    assert widths == {1, 2, 3, 4, 5}
    assert outputs == {2, 3}
    assert {0.1, 1.0, 10.0, 100.0} <= {round(beta, 3) for beta in betas}
    assert max(betas) == pytest.approx(1000, rel=1e-5)
    assert kinds == {False, True}


@pytest.mark.parametrize("make", [lambda: measurements.random_mlp(3), lambda: measurements.random_cnn(1)[0]])
def test_random_lcnns_depend_on_the_seed_alone(make):
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    second = make()
    weights = [[m.weight for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)] for net in (first, second)]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


def test_random_cnns_are_varied():
    shapes, kinds = set(), set()
    for seed in range(8):
        model, shape = measurements.random_cnn(seed)
        assert not any(module.training for module in model.modules())
        logits = model(torch.rand((2, *shape), dtype=torch.float64))
        assert logits.shape == (2, 3)
        assert logits.isfinite().all()
        shapes.add(shape)
        kinds.add((len(list(model.modules())), any(isinstance(m, LipschitzBatchNorm2d) for m in model.modules())))
        types = {type(module).__name__ for module in model.modules()}
        assert ("AveragedBlock" in types) == (seed % 4 in (0, 1))
        assert ("ZeroPad2d" in types) == (seed % 4 == 3)
    assert {channels for channels, _, _ in shapes} == {1, 2}
    assert {size for _, size, _ in shapes} == {2, 3, 4}
    assert len(kinds) >= 4


# ---- audit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar", bounds.SCALARS)
@pytest.mark.parametrize("seed", [0, 2, 5])
def test_audit_against_torch_func_and_the_public_functions(seed, scalar):
    model = measurements.random_mlp(seed)
    d, classes = model[1].in_features, model[-1].out_features
    x, y = draw(3, d, seed=seed), torch.arange(3) % classes
    frame = measurements.audit(model, x, y, scalar)
    assert set(frame) == {
        "gradient", "hessian", "curvature", "normalised", "local", "kappa", "data_free", "published", "published_widths"
    }  # fmt: skip
    assert len(frame) == 3
    gradient, hessian = truths(model, x, y, scalar)
    np.testing.assert_allclose(frame.gradient, gradient, rtol=1e-8)
    np.testing.assert_allclose(frame.hessian, hessian, rtol=1e-6, atol=1e-9 * hessian.max())
    np.testing.assert_allclose(frame.curvature, frame.hessian / frame.gradient)
    np.testing.assert_allclose(frame.local, bounds.local_bound(model, x, y, scalar=scalar))
    c = bounds.normalised_bound(model, x, y, scalar=scalar)
    np.testing.assert_allclose(frame.normalised, c.bound)
    np.testing.assert_array_equal(frame.kappa, c.kappa.max(1).values)
    assert (frame.data_free == bounds.curvature_bound(model, (d,), scalar=scalar)).all()
    lip, published, widths, weight = 1.0, 0.0, 0.0, None  # the chain by hand
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight
        if isinstance(layer, LipschitzBatchNorm2d):
            weight = (layer.running_var + layer.eps).rsqrt().clamp(max=layer.gamma)[:, None] * weight
        if isinstance(layer, CenteredSoftplus):
            lip *= norm(weight)
            published += layer.beta.item() * lip
            widths += layer.beta.item() * lip * len(weight)
    np.testing.assert_allclose(frame.published, published)
    np.testing.assert_allclose(frame.published_widths, widths)


def test_audit_frame_takes_margins_and_logits_in_turn():
    frame = measurements.audit_frame([2, 5], points=3)
    assert frame.net.tolist() == [2, 2, 2, 5, 5, 5]
    assert list(frame.index) == list(range(6))
    for seed, scalar in ((2, "margin"), (5, "logit")):
        model, part = measurements.random_mlp(seed), frame[frame.net == seed]
        assert (part.data_free == bounds.curvature_bound(model, (model[1].in_features,), scalar=scalar)).all()
        assert part.gradient.nunique() == 3, "different points"


# ---- cancelling slopes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 5.0, 40.0])
def test_cancelling_slopes_at_zero(beta):
    model = measurements.Cancelling(beta).double()
    f = lambda x: model(x.reshape(1, 1))[0, 0]
    zero = torch.zeros((), dtype=torch.float64)
    assert abs(torch.func.grad(f)(zero).item()) < 1e-15
    assert torch.func.grad(torch.func.grad(f))(zero).item() == pytest.approx(beta / 2, rel=1e-6)
    x = torch.tensor(0.3, dtype=torch.float64)
    assert f(x).item() == pytest.approx(math.log(math.cosh(beta * 0.3 / 2)) * 2 / beta, rel=1e-6)
    assert model(torch.ones(3, 1, dtype=torch.float64))[:, 1].tolist() == [0, 0, 0]


def test_cancellation_frame_in_closed_form():
    """f′ = tanh(βx/2), f″ = (β/2)/cosh²(βx/2), so C = β/sinh(βx); d = (σ(βx), −σ(−βx)), ‖A‖² = 2."""
    beta, x = 5.0, [1e-3, 0.1, 0.5, 2.0]
    frame = measurements.cancellation_frame(beta, x)
    assert frame.x.tolist() == x
    t = beta * np.array(x)
    sigma, slope = 1 / (1 + np.exp(-t)), np.tanh(t / 2)
    close = dict(rtol=1e-6)
    np.testing.assert_allclose(frame.gradient, slope, **close)
    np.testing.assert_allclose(frame.hessian, beta / 2 / np.cosh(t / 2) ** 2, **close)
    np.testing.assert_allclose(frame.curvature, beta / np.sinh(t), **close)
    np.testing.assert_allclose(frame.local, 2 * beta * sigma, **close)
    np.testing.assert_allclose(frame.kappa, sigma * math.sqrt(2) / slope, **close)
    np.testing.assert_allclose(frame.normalised, 2 * beta * sigma / slope, **close)
    np.testing.assert_allclose(frame.data_free, beta / 2, **close)
    np.testing.assert_allclose(frame.published, beta * math.sqrt(2), **close)
    np.testing.assert_allclose(frame.published_widths, 2 * beta * math.sqrt(2), **close)


# ---- depth -------------------------------------------------------------------------------------------------------


def test_depth_frame():
    frame = measurements.depth_frame((1, 3, 5), range(2), width=6, points=3)
    assert list(frame.columns) == ["depth", "seed", "quantity", "value"]
    assert len(frame) == 3 * 2 * 3
    table = frame.pivot(index=["depth", "seed"], columns="quantity", values="value")
    truth, local, free = "largest ‖∇²f‖ of the points", "(A), its largest", "(B), at every x"
    assert list(frame.quantity.unique()) == [truth, local, free]
    assert (table[truth] <= table[local] * (1 + 1e-9)).all()
    assert (table[truth] <= table[free] * (1 + 1e-9)).all()
    growth = table[free].unstack("depth")
    assert (growth[1] < growth[3]).all()
    assert (growth[3] < growth[5]).all()


def test_depth_frame_for_one_layer_in_closed_form():
    """f = w·s₀(Wx): ∇²f = Wᵀ diag(w φ″) W, and (B) = β/4 ‖W‖² max_k |w_k|."""
    beta, width, points = 5.0, 6, 7
    table = measurements.depth_frame((1,), (4,), width=width, points=points).set_index("quantity").value
    generator = torch.Generator().manual_seed(4)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    first, _, last, _ = normal(width, 2) * 2 / 2**0.5, normal(width), normal(2, width) * 2 / width**0.5, normal(2)
    w = last[0] - last[1]
    p = torch.sigmoid(beta * normal(points, 2) @ first.T)
    hessians = first.T @ torch.diag_embed(w * beta * p * (1 - p)) @ first
    assert table["largest ‖∇²f‖ of the points"] == pytest.approx(max(map(norm, hessians)), rel=1e-6)
    assert table["(B), at every x"] == pytest.approx(beta / 4 * norm(first) ** 2 * w.abs().max().item(), rel=1e-6)


# ---- the parts of the loss's Hessian -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_loss_parts_by_another_route(shape):
    model = lcnn(5, (4, 6, 5, 3)).train()
    x, y = torch.rand((5, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5) % 3
    before = state(model)
    frame = measurements.loss_parts(model, x, y)
    assert same(model, before)
    assert all(module.training for module in model.modules())
    assert list(frame.columns) == ["sample", "total", "softmax", "activations", "gradient"]
    assert frame["sample"].tolist() == list(range(5))
    gradient, hessian = truths(model.eval(), x, y, "loss")
    np.testing.assert_allclose(frame.gradient, gradient, rtol=1e-9)
    np.testing.assert_allclose(frame.total, hessian, rtol=1e-8)
    for point, label, row in zip(x, y, frame.itertuples(), strict=True):
        logits = lambda v: plain(model, v)
        jacobian = torch.func.jacrev(logits)(point.flatten())
        p = logits(point).softmax(0)
        softmax = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        bends = torch.func.hessian(logits)(point.flatten())  # (K, d, d)
        activations = torch.einsum("k,kij->ij", p - F.one_hot(label, 3), bends)
        assert row.softmax == pytest.approx(norm(softmax), rel=1e-9)
        assert row.activations == pytest.approx(norm(activations), rel=1e-8)
        assert row.activations > 1e-3 * row.total, "both parts count here"


def test_loss_parts_of_a_linear_model():
    """Two classes: p(1 − p)‖w₁ − w₀‖² is the whole, and the softmax's part."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = draw(6, 3)
    frame = measurements.loss_parts(model, x, torch.arange(6) % 2)
    p = model(x).softmax(1)[:, 0]
    expected = (p * (1 - p) * (model[0].weight[1] - model[0].weight[0]).square().sum()).detach()
    np.testing.assert_allclose(frame.total, expected, rtol=1e-9)
    np.testing.assert_allclose(frame.softmax, expected, rtol=1e-9)
    assert (frame.activations <= 1e-14).all()


# ---- certificates ------------------------------------------------------------------------------------------------


def half_plane(*weight: float, bias: float = 0.0) -> nn.Module:
    """Logits (0, w·x + b)."""
    model = nn.Sequential(nn.Linear(2, 2)).double()
    model[0].weight.data = torch.tensor([[0.0, 0.0], weight], dtype=torch.float64)
    model[0].bias.data = torch.tensor([0.0, bias], dtype=torch.float64)
    return model


class Never(nn.Module):
    """Logit₀ − logit₁ = 5 + s₀(x₁) + s₀(−x₁) > 0 everywhere: no step changes the class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.net = nn.Linear(2, 1, bias=False), measurements.Cancelling(2.0)
        self.start.weight.data = torch.tensor([[1.0, 0.0]])
        self.net.outer = nn.Linear(2, 2)
        self.net.outer.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        self.net.outer.bias.data = torch.tensor([5.0, 0.0])

    def forward(self, x):
        return self.net(self.start(x))


def test_certificates():
    x = torch.tensor([[0.5, 0.5], [0.9, 0.5], [0.2, 0.1], [0.4, 0.9]], dtype=torch.float64)
    y = torch.tensor([1, 1, 0, 0])  # the last is wrong in the first net
    nets = {"line": half_plane(3.0, 4.0, bias=-2.5), "never": Never().double()}
    frame = measurements.certificates(nets, x, y, steps=12, restarts=1)
    assert list(frame.columns) == ["net", "sample", "certified", "attacked"]
    assert frame.net.tolist() == ["line"] * 4 + ["never"] * 4
    assert frame["sample"].tolist() == [0, 1, 2, 3] * 2
    line, never = frame[frame.net == "line"], frame[frame.net == "never"]
    distance = [0.2, 0.44, 0.3, 0.0]  # |3x₁ + 4x₂ − 2.5|/5, 0 where wrong
    np.testing.assert_allclose(line.certified, distance, rtol=1e-6)
    np.testing.assert_allclose(line.attacked, distance, rtol=5e-3)
    assert (line.attacked >= line.certified).all()
    assert (never.certified[:6] == 0).tolist() == [True, True, False, False]
    assert never.attacked.tolist() == [0, 0, math.inf, math.inf]
    assert never.certified[6:].between(0.1, 100).all()


def test_certificates_stay_in_the_box():
    """From (0.5, 0.9), the nearest of the line 2x₂ = 2.2 is out of reach; without a box it is 0.2 away."""
    x, y = torch.tensor([[0.5, 0.9]], dtype=torch.float64), torch.tensor([0])
    nets = {"line": half_plane(1.0, 2.0, bias=-2.7)}
    boxed, free = (measurements.certificates(nets, x, y, steps=20, restarts=1, box=box) for box in ((0.0, 1.0), None))
    assert free.attacked[0] == pytest.approx(0.4 / 5**0.5, rel=5e-3)
    assert boxed.attacked[0] == pytest.approx(math.hypot(0.2, 0.1), rel=5e-3)
    assert boxed.certified[0] == free.certified[0] == pytest.approx(0.4 / 5**0.5, rel=1e-6)


def test_robust_accuracy_by_hand():
    frame = pd.DataFrame(
        dict(net=list("bbbbaaaa"), seed=[0, 0, 1, 1] * 2, certified=[0, 0.1, 0.3, 0.4, 0, 0, 0.2, 0],
             attacked=[0, 0.2, math.inf, 0.5, 0, 0.3, 0.3, math.inf])
    )  # fmt: skip
    shares = measurements.robust_accuracy(frame, (e for e in (0, 0.2, 1.0)))
    assert set(shares) == {"net", "seed", "eps", "certified", "attacked"}
    assert shares.net.unique().tolist() == ["b", "a"], "in the order given"
    shares = shares.set_index(["net", "seed", "eps"]).sort_index()
    expected = {  # strictly longer than ε
        ("b", 0): [(0.5, 0.5), (0, 0), (0, 0)], ("b", 1): [(1, 1), (1, 1), (0, 0.5)],
        ("a", 0): [(0, 0.5), (0, 0.5), (0, 0)], ("a", 1): [(0.5, 1), (0, 1), (0, 0.5)],
    }  # fmt: skip
    assert len(shares) == 12
    for (net, seed), rows in expected.items():
        np.testing.assert_array_equal(shares.loc[(net, seed), ["certified", "attacked"]], rows)
    pooled = measurements.robust_accuracy(frame.drop(columns="seed"), [0.2])
    assert "seed" not in pooled
    assert pooled.set_index("net").certified.to_dict() == {"b": 0.5, "a": 0.0}
    assert pooled.set_index("net").attacked.to_dict() == {"b": 0.5, "a": 0.75}


def test_certified_table_by_hand():
    frame = pd.DataFrame(
        dict(net=list("bbbbaa"), seed=[0, 0, 1, 1, 0, 0], certified=[0, 0.1, 0.3, 0.4, 0, 0.2],
             attacked=[0, 0.3, math.inf, 0.5, 0.1, 0.3])
    )  # fmt: skip
    table = measurements.certified_table(frame, [0.2])
    assert list(table.columns) == ["net", "accuracy %", "certified at 0.2 (PGD leaves)"]
    assert table.to_numpy().tolist() == [
        ["b", "75.0 ± 35.4", "50.0 ± 70.7 (75.0 ± 35.4)"],  # shares 0.5 and 1, 0 and 1, 0.5 and 1
        ["a", "100.0", "0.0 (50.0)"],  # one seed: no deviation
    ]


def test_moons_balls(monkeypatch):
    monkeypatch.setattr(studies, "minimal_radius", partial(measurements.minimal_radius, steps=10, restarts=1))
    x = torch.tensor([[0.5, 0.5], [1.0, 0.0], [-0.5, 0.25]])
    y = torch.tensor([1, 0, 0])  # the second is wrong in the first net
    line, never = half_plane(3.0, 4.0, bias=-2.5).float(), Never()
    points, fields = measurements.moons_balls({"line": line, "never": never}, x, y, resolution=4)
    assert set(points) == {
        "net", "sample", "x1", "x2", "label", "certified", "attacked", "found1", "found2"
    }  # fmt: skip
    assert points.net.tolist() == ["line"] * 3 + ["never"] * 3
    assert points["sample"].tolist() == [0, 1, 2] * 2
    np.testing.assert_array_equal(points[["x1", "x2"]], torch.cat([x, x]))
    assert points.label.tolist() == [1, 0, 0] * 2
    part = points[points.net == "line"]
    np.testing.assert_allclose(part.certified, [0.2, 0, 0.6], rtol=1e-5)
    np.testing.assert_allclose(part.attacked, [0.2, 0, 0.6], rtol=5e-3)
    near = x + torch.tensor([-0.2, 0.0, 0.6])[:, None] * torch.tensor([0.6, 0.8])  # the foot on the line
    np.testing.assert_allclose(part[["found1", "found2"]], near, atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(part[["found1", "found2"]] - x.numpy(), axis=1), part.attacked, atol=1e-6)
    rest = points[points.net == "never"]
    assert rest.attacked.tolist() == [0, math.inf, math.inf]
    assert rest.found1.isna().tolist() == rest.found2.isna().tolist() == [False, True, True]
    assert (rest.certified > 0).tolist() == [False, True, True]
    assert fields.columns.tolist() == ["net", "x1", "x2", "margin"]
    assert fields.net.value_counts().to_dict() == {"line": 16, "never": 16}
    np.testing.assert_array_equal(fields[fields.net == "line"][["x1", "x2"]], moons_grid(4))
    margin = 3 * fields.x1 + 4 * fields.x2 - 2.5
    np.testing.assert_allclose(fields.margin[:16], margin[:16], rtol=1e-5, atol=1e-5)
    assert (fields.margin[16:] < 0).all(), "class 0 everywhere"


def test_certificate_recipe():
    recipe = measurements.certificate_recipe("lcnn", 3, penalty=0.25, epochs=2)
    assert (recipe.dataset, recipe.method, recipe.model, recipe.width) == ("digits", "lcnn", "mlp", 64)
    assert (recipe.seed, recipe.epochs, recipe.lambda_beta, recipe.lambda_gamma) == (3, 2, 0.25, 0.25)
    with pytest.raises(ValueError, match="unknown method"):
        measurements.certificate_recipe("lcn")


# ---- one layer's β and slope -------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    found = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    model(x)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("factor", [0.1, 7.0])
@pytest.mark.parametrize("layer", ["3", "6"])
def test_the_slope_before_a_layer_is_scaled(layer, factor):
    model = lcnn(8)
    for norm_layer in (model[2], model[5]):  # in each, γ cuts off some channels and not others
        norm_layer.gamma = 1.0
        cut = (norm_layer.running_var + norm_layer.eps).rsqrt() > norm_layer.gamma
        assert cut.any()
        assert not cut.all()
    before, x = state(model), draw(6, 2)
    changed = measurements.slope_scaled(model, layer, 0.37, factor)
    assert same(model, before)
    np.testing.assert_allclose(inputs_of(changed, layer, x), factor * inputs_of(model, layer, x), rtol=1e-6)
    assert changed.get_submodule(layer).beta.item() == pytest.approx(0.37, rel=1e-6)
    rest = {name for name, value in changed.state_dict().items() if not torch.equal(value, before[name])}
    norm_name = str(int(layer) - 1)
    allowed = {f"{layer}.log_beta", f"{norm_name}.log_gamma", f"{norm_name}.running_var"}
    assert rest <= allowed
    assert f"{layer}.log_beta" in rest
    assert changed.get_submodule(norm_name).lipschitz_constant().item() == pytest.approx(
        factor * model.get_submodule(norm_name).lipschitz_constant().item()
    )


def test_the_slope_in_a_block_of_a_resnet():
    torch.manual_seed(0)
    model = measurements.scramble(models.resnet(10, num_classes=2, width=2, in_channels=1, image_size=4, lcnn=True), 0)
    names = [name for name, module in model.named_modules() if isinstance(module, CenteredSoftplus)]
    layer = next(name for name in names if "branch" in name)
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    changed = measurements.slope_scaled(model, layer, 2.0, 3.0)
    torch.testing.assert_close(inputs_of(changed, layer, x), 3 * inputs_of(model, layer, x))
    sum_of_branches = next(name for name in names if name.endswith("activation"))
    with pytest.raises(ValueError, match=f"{sum_of_branches} is no centered softplus that follows a γ-BatchNorm"):
        measurements.slope_scaled(model, sum_of_branches, 2.0, 3.0)


@pytest.mark.parametrize("layer", ["0", "1", "2", "4"])
def test_a_layer_that_follows_no_batchnorm(layer):
    with pytest.raises(ValueError, match=f"{layer} is no centered softplus that follows a γ-BatchNorm"):
        measurements.slope_scaled(lcnn(), layer, 2.0, 3.0)
    standard = models.mlp([2, 3, 3, 2])
    with pytest.raises(ValueError, match="2 is no centered softplus that follows a γ-BatchNorm"):
        measurements.slope_scaled(standard, "2", 2.0, 3.0)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_slice_of_a_net_keeps_its_names(start):
    """``net[1:]`` calls its first layer "1"."""
    model = lcnn()[start:]
    x, layer = draw(4, model[0].in_features if start == 1 else 6), "6"
    changed = measurements.slope_scaled(model, layer, 2.0, 3.0)
    torch.testing.assert_close(inputs_of(changed, layer, x), 3 * inputs_of(model, layer, x))


def points_of(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Five points, of which the net gets three right."""
    x = draw(5, 2, seed=5)
    y = model(x).argmax(1)
    y[[1, 4]] = 1 - y[[1, 4]]
    return x, y


def test_layer_numbers():
    model = lcnn()
    x, y = points_of(model)
    numbers = measurements.layer_numbers(model, x, y)
    assert list(numbers) == ["bound", "local", "truth", "accuracy"]
    assert all(type(value) is float for value in numbers.values())
    assert numbers["bound"] == bounds.curvature_bound(model, (2,))
    assert numbers["local"] == max(bounds.local_bound(model, x, y).tolist())
    assert numbers["truth"] == pytest.approx(truths(model, x, y, "margin")[1].max(), rel=1e-8)
    assert numbers["accuracy"] == pytest.approx(0.6)


def test_layer_numbers_are_those_of_eval_mode_and_change_nothing():
    model = lcnn()
    x, y = points_of(model)
    expected = measurements.layer_numbers(model, x, y)
    model.train()
    before = state(model)
    assert measurements.layer_numbers(model, x, y) == expected
    assert same(model, before)
    assert all(module.training for module in model.modules())


def test_knobs_frame():
    model = lcnn()
    x, y = points_of(model)
    before = state(model)
    frame = measurements.knobs_frame(model, x, y, (30.0,), (0.25, 1.0, 4.0))
    assert same(model, before)
    assert list(frame.columns) == ["knob", "layer", "value", "trained", "bound", "local", "truth", "accuracy"]
    for (knob, layer), part in frame.groupby(["knob", "layer"]):
        expected = model.get_submodule(layer).beta.item() if "β" in knob else 1.0
        assert (part.trained == expected).all()
    knobs = [("sharpness β", 30.0)] + [("slope before it, times", v) for v in (0.25, 1.0, 4.0)]
    expected = [(knob, layer, value) for layer in ("3", "6") for knob, value in knobs]
    assert list(frame[["knob", "layer", "value"]].itertuples(index=False, name=None)) == expected
    trained = measurements.layer_numbers(model, x, y)
    for row in frame.itertuples():
        is_beta = row.knob == "sharpness β"
        change = {"beta": {row.layer: row.value}} if is_beta else {"factor": {row.layer: row.value}}
        assert row.truth == pytest.approx(truths(model, x, y, "margin", **change)[1].max(), rel=1e-5)
        right = torch.stack([plain(model, point, **change) for point in x]).argmax(1) == y
        assert row.accuracy == pytest.approx(right.double().mean().item())
        assert row.truth <= min(row.local, row.bound)
        if row.value == 1.0:
            for name, value in trained.items():
                assert getattr(row, name) == pytest.approx(value, rel=1e-6), name
    bound = frame.set_index(["knob", "layer", "value"]).bound
    slope = bound["slope before it, times"]
    # Both terms have the first slope in them, squared in the second: t₁s² + t₂s². Of the second's slope, t₁s + t₂s².
    assert slope["3", 4.0] == pytest.approx(16 * slope["3", 1.0], rel=1e-5)
    terms = bounds.layer_terms(model, input_shape=(2,)).set_index("layer").contribution
    assert slope["6", 0.25] == pytest.approx(terms["3"] / 4 + terms["6"] / 16, rel=1e-5)
    sharp = bound["sharpness β"]
    assert sharp["3", 30.0] == pytest.approx(terms["3"] * 30 / model[3].beta.item() + terms["6"], rel=1e-5)
