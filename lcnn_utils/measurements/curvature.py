"""The measurements of notebook 02: curvature on two moons and on digits, and how well it is estimated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import evaluating, geometry, gradient_and_hvp
from ..experiments import plus_minus
from ..lab import LABEL
from ..nn import relu_reading
from ..training import Recipe, accuracy, fit_recipe, recipe, samples

MOONS_BOX = (-2.0, 3.0, -1.5, 2.0)  # x₁ from, to; x₂ from, to


def digits_recipe(method: str, seed: int = 0, **changes: Any) -> Recipe:
    """Digits with a ResNet-10 of width 8, of the authors' blocks: scale ``lab`` with the authors' λ = 1e-3.
    At so short a schedule this penalty hardly moves β and γ; notebook 05 takes ``lab``'s own λ, 1e-2."""
    return recipe("digits", method, seed, **{"lambda_beta": 1e-3, "lambda_gamma": 1e-3} | changes)


def moons_grid(resolution: int) -> Tensor:
    """The points of a square grid over the two moons, (resolution², 2), row by row from below."""
    x1, x2 = (torch.linspace(*ends, resolution) for ends in (MOONS_BOX[:2], MOONS_BOX[2:]))
    return torch.cartesian_prod(x2, x1).flip(1)


def moons_fields(model: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Margin logit₁ − logit₀ and curvature C of that margin at each grid point, each (n,)."""
    ones = torch.ones(len(grid), dtype=torch.long)
    curvature = geometry(model, grid, ones, scalar="margin", method="exact", batch_size=len(grid)).curvature
    with torch.no_grad(), evaluating(model):
        logits = model(grid)
    return logits[:, 1] - logits[:, 0], curvature


def fields_frame(models: Mapping[Any, nn.Module], resolution: int, column: str = "method") -> pd.DataFrame:
    """Margin and curvature of nets on a grid over the moons: columns x1, x2, margin, curvature, accuracy (on the test
    points), and the net's key in ``models`` under the name ``column``."""
    grid = moons_grid(resolution)
    x, y = samples(recipe("moons", "standard"), "test")
    parts = []
    for key, model in models.items():
        margin, curvature = moons_fields(model, grid)
        columns = {"x1": grid[:, 0], "x2": grid[:, 1], "margin": margin, "curvature": curvature}
        parts.append(pd.DataFrame(columns | {column: key, "accuracy": accuracy(model, x, y)}))
    return pd.concat(parts, ignore_index=True)


def moons_study(models: dict[str, nn.Module], resolution: int = 150) -> tuple[pd.DataFrame, pd.DataFrame]:
    """:func:`fields_frame` of each method's net, and the training points: columns x1, x2, label."""
    x, y = samples(recipe("moons", "standard"), "train")
    return fields_frame(models, resolution), pd.DataFrame({"x1": x[:, 0], "x2": x[:, 1], "label": y})


def layer_calls(
    model: nn.Module, x: Tensor, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> list[tuple[Any, Tensor, Tensor]]:
    """Every layer of some kinds with its input and output for x, in order of use; ``model`` runs once, in eval mode."""
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, inputs[0], output))

    hooks = [layer.register_forward_hook(record) for layer in model.modules() if isinstance(layer, kinds)]
    with evaluating(model), torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls


def net_frame(net: nn.Module, x: Tensor, y: Tensor, chunk: int = 100) -> pd.DataFrame:
    """A row an image: grad_norm, hessian_norm, curvature (of the true label's loss), margin_curvature, correct.
    ``x, y``: images (N, C, H, W) in [0, 1], labels (N,). ``chunk``: images measured at a time."""
    parts = []
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        g, margin = (geometry(net, xs, ys, scalar=scalar) for scalar in ("loss", "margin"))
        with torch.no_grad():
            correct = net(xs).argmax(1) == ys
        values = dict(grad_norm=g.grad_norm, hessian_norm=g.hessian_norm, curvature=g.curvature)
        values |= dict(margin_curvature=margin.curvature, correct=correct)
        parts.append(pd.DataFrame({k: v.cpu().numpy() for k, v in values.items()}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(image=range(len(frame)))


def digits_nets(
    seeds: Iterable[int], *, epochs: int = 8, device: str | None = None, progress: bool = True
) -> Iterator[tuple[str, int, nn.Module, Tensor, Tensor]]:
    """Of each seed Standard, its weights read as ReLU, and LCNN: method, seed, net, test images and labels."""
    for seed, method in itertools.product(seeds, ("standard", "lcnn")):
        this_recipe = digits_recipe(method, seed, epochs=epochs)
        net, _ = fit_recipe(this_recipe, device=device, progress=progress)
        x, y = samples(this_recipe, "test", next(net.parameters()).device)
        yield method, seed, net, x, y
        if method == "standard":
            yield "relu_reading", seed, relu_reading(net), x, y


def digits_study(seeds: Iterable[int], *, images: int = 360, **training: Any) -> pd.DataFrame:
    """Geometry of the first ``images`` test images (of 360) under :func:`digits_nets`, which takes the other options.
    Columns: those of :func:`net_frame`, and label, method, seed, accuracy."""
    parts = []
    for method, seed, net, x, y in digits_nets(seeds, **training):
        frame = net_frame(net, x[:images], y[:images], chunk=images)
        parts.append(frame.assign(label=LABEL[method], method=method, seed=seed, accuracy=frame.correct.mean()))
    return pd.concat(parts, ignore_index=True)


def means_table(frame: pd.DataFrame, by: str, columns: dict[str, str]) -> pd.DataFrame:
    """A row for each value of the column ``by``: mean ± standard deviation over the frame's rows.
    ``columns``: title → column of the frame; accuracies are shown in %."""
    rows = []
    for name, part in frame.groupby(by, sort=False):
        row = {by: str(name)}
        for title, column in columns.items():
            values = part[column] * (100 if column == "accuracy" else 1)
            row[title] = plus_minus(values.mean(), values.std())
        rows.append(row)
    return pd.DataFrame(rows)


def geometry_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a method, as in the paper's Table 1: mean over images, then mean ± standard deviation over seeds."""
    columns = {"‖∇f‖": "grad_norm", "‖∇²f‖": "hessian_norm", "C": "curvature", "C of the margin": "margin_curvature"}
    columns |= {"accuracy %": "accuracy", "median C": "median"}
    images = frame.groupby(["label", "seed"], sort=False)
    runs = images[["grad_norm", "hessian_norm", "curvature", "margin_curvature", "accuracy"]].mean()
    runs = runs.assign(median=images.curvature.median()).reset_index()
    return means_table(runs, "label", columns).rename(columns={"label": "net"})


def convergence_frame(model: nn.Module, x: Tensor, y: Tensor, products: int) -> pd.DataFrame:
    """Error of three estimators of the loss's ‖∇²f‖ after 1, 2, … products, for each sample against the exact Hessian.
    Columns: estimator, products, sample, estimate, exact, error. Two read the same power iteration: ‖Hu‖, and the
    authors' |uᵀHu|, which can pass through 0 where two eigenvalues of opposite sign are nearly tied."""
    exact = geometry(model, x, y, method="exact").hessian_norm
    parts = []
    with evaluating(model):
        _, hvp = gradient_and_hvp(model, x, y)
        u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
        for k in range(1, products + 1):
            u = F.normalize(u.flatten(1)).view_as(x)
            product = hvp(u)
            estimates = {
                "power iteration, ‖Hu‖": product.flatten(1).norm(dim=1),
                "Lanczos": geometry(model, x, y, tol=1e-12, max_iter=k).hessian_norm,
                "power iteration, |uᵀHu| (published)": (u * product).flatten(1).sum(1).abs(),
            }
            for name, estimate in estimates.items():
                columns = {"estimator": name, "products": k, "sample": range(len(x)), "estimate": estimate.cpu()}
                parts.append(pd.DataFrame(columns | {"exact": exact.cpu()}))
            u = product
    frame = pd.concat(parts, ignore_index=True)
    frame["error"] = ((frame.estimate - frame.exact) / frame.exact).abs().clip(lower=1e-7)
    return frame
