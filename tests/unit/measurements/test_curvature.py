"""Curvature on two moons and on digits, and its estimators, against numpy, autograd and closed forms."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_utils.curvature import geometry
from lcnn_utils.measurements import curvature as measurements
from lcnn_utils.nn import CenteredSoftplus, mlp
from lcnn_utils.training import Recipe, fit_recipe, recipe, samples

pytestmark = pytest.mark.usefixtures("store")


def net(sizes=(2, 8, 8, 2), seed: int = 0, beta: float = 4.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(sizes, beta=beta)


def test_the_grid_against_numpy():
    left, right, low, high = measurements.MOONS_BOX
    x1, x2 = np.meshgrid(np.linspace(left, right, 5), np.linspace(low, high, 5))
    np.testing.assert_allclose(measurements.moons_grid(5), np.stack([x1.ravel(), x2.ravel()], 1), rtol=1e-6)


def fields_by_autograd(model: nn.Module, grid: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    model = copy.deepcopy(model).double()
    margin = lambda point: model(point[None])[0, 1] - model(point[None])[0, 0]
    values, curvatures = [], []
    for point in grid.double():
        gradient = torch.autograd.functional.jacobian(margin, point)
        hessian = torch.autograd.functional.hessian(margin, point)
        values.append(margin(point).item())
        curvatures.append((torch.linalg.svdvals(hessian)[0] / (gradient.norm() + 1e-6)).item())
    return np.array(values), np.array(curvatures)


def test_each_field_stands_at_its_point():
    models = {"standard": net(seed=0).train(), "lcnn": net(seed=1)}
    frame, points = measurements.moons_study(models, resolution=3)
    assert models["standard"].training, "left as it was"
    x, y = samples(recipe("moons", "standard"), "test")
    for method, part in frame.groupby("method"):
        margin, curvature = fields_by_autograd(models[method], torch.tensor(part[["x1", "x2"]].to_numpy()))
        np.testing.assert_allclose(part.margin, margin, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.curvature, curvature, rtol=1e-3)
        hits = models[method](x).argmax(1) == y
        assert part.accuracy.unique() == pytest.approx([hits.float().mean().item()])
    x, y = samples(recipe("moons", "standard"), "train")
    np.testing.assert_array_equal(points[["x1", "x2"]].to_numpy(np.float32), x)
    np.testing.assert_array_equal(points.label, y)


def test_calls_of_layers():
    model, x = net().train(), torch.randn(5, 2)
    calls = measurements.layer_calls(model, x, CenteredSoftplus)
    assert [layer for layer, _, _ in calls] == [model[2], model[4]]
    for (_, inputs, output), layers in zip(calls, (2, 4), strict=True):
        torch.testing.assert_close(inputs, model[:layers](x))
        torch.testing.assert_close(output, model[: layers + 1](x))
    assert model.training
    assert not any(layer._forward_hooks for layer in model)


def test_digits_study(monkeypatch):
    def tiny(method, seed=0, *, epochs=1):
        return Recipe(
            dataset="digits", method=method, model="resnet10", width=2, seed=seed, epochs=epochs, batch_size=512
        )

    monkeypatch.setattr(measurements, "digits_recipe", tiny)
    frame = measurements.digits_study((0,), epochs=1, device="cpu", images=8, progress=False)
    assert frame.groupby("method", sort=False).size().to_dict() == {"standard": 8, "relu_reading": 8, "lcnn": 8}
    np.testing.assert_allclose(frame.curvature, frame.hessian_norm / (frame.grad_norm + 1e-6), rtol=1e-5)
    model, _ = fit_recipe(tiny("standard"), device="cpu", progress=False)
    x, y = (part[:8] for part in samples(tiny("standard"), "test"))
    part = frame[frame.method == "standard"]
    np.testing.assert_array_equal(part.correct, model(x).argmax(1) == y)
    assert part.accuracy.unique() == pytest.approx([part.correct.mean()])
    loss = lambda x, y: F.cross_entropy(model(x[None]), y[None])
    gradient = torch.func.vmap(torch.func.grad(loss))(x, y)
    np.testing.assert_allclose(part.grad_norm, gradient.flatten(1).norm(dim=1).detach(), rtol=1e-3, atol=1e-6)
    exact = geometry(model, x[:3], y[:3], scalar="margin", method="exact").curvature
    np.testing.assert_allclose(part.margin_curvature[:3], exact, rtol=1e-2, atol=1e-6)


def test_geometry_table_by_hand():
    """Means over images first: ‖∇f‖ 3 and 2, ‖∇²f‖ 5 and 2, C 16 and 3; medians of C 5 and 2."""
    rows = [(0, 1.0, 2.0, 3.0), (0, 3.0, 4.0, 5.0), (0, 5.0, 9.0, 40.0), (1, 2.0, 2.0, 2.0), (1, 2.0, 2.0, 2.0)]
    frame = pd.DataFrame([*rows, (1, 2.0, 2.0, 5.0)], columns=["seed", "grad_norm", "hessian_norm", "curvature"])
    frame = frame.assign(label="net", margin_curvature=2 * frame.curvature, accuracy=0.5 + 0.2 * frame.seed)
    (row,) = measurements.geometry_table(frame).set_index("net").to_dict("records")
    numbers = {name: [float(number) for number in text.split(" ± ")] for name, text in row.items()}
    expected = {"‖∇f‖": (3, 2), "‖∇²f‖": (5, 2), "C": (16, 3), "C of the margin": (32, 6)}
    expected |= {"accuracy %": (50, 70), "median C": (5, 2)}
    for name, pair in expected.items():
        assert numbers[name] == pytest.approx([np.mean(pair), np.std(pair, ddof=1)], rel=0.1), name  # rounded


def test_three_estimators_against_dense_hessians():
    model = net((6, 16, 16, 3), beta=5.0).double().train()
    x, y = torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    frame = measurements.convergence_frame(model, x, y, products=12)
    assert model.training, "left as it was"
    loss = lambda x, y: F.cross_entropy(model(x[None]), y[None])
    hessians = torch.stack([torch.func.hessian(loss)(point, label) for point, label in zip(x, y, strict=True)])
    norms = torch.linalg.matrix_norm(hessians.detach(), 2).numpy()
    np.testing.assert_allclose(frame.exact, norms[frame["sample"]], rtol=1e-9)
    np.testing.assert_allclose(frame.error, (frame.estimate / frame.exact - 1).abs().clip(lower=1e-7), rtol=1e-6)
    estimates = frame.set_index(["estimator", "products", "sample"]).estimate.unstack("sample")
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for k in range(1, 13):  # power iteration on the matrices
        u = F.normalize(u)
        product = (hessians @ u[:, :, None])[:, :, 0].detach()
        np.testing.assert_allclose(estimates.loc["power iteration, ‖Hu‖", k], product.norm(dim=1), rtol=1e-8)
        quotient = (u * product).sum(1).abs()
        np.testing.assert_allclose(estimates.loc["power iteration, |uᵀHu| (published)", k], quotient, rtol=1e-7)
        u = product
    for k in range(6, 13):  # as many products as dimensions give everything
        np.testing.assert_allclose(estimates.loc["Lanczos", k], norms, rtol=1e-7)
