"""The measurements of notebook 06: how much maps jump, by network and by method, and whether steady means right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import data
from ..curvature import evaluating, geometry, gradient_and_hvp
from ..experiments import SHIPPED, published, run
from ..figures.style import METHOD
from ..saliency import MAPS, compare, explain, randomized, stability, summary
from ..training import Recipe, recipe, run_name, samples

PAPER_NETS = ("standard", "gradreg", "lcnn", "lcnn_gradreg")  # of the paper's gradient-robustness figure


@dataclass(frozen=True, eq=False)
class Scene:
    """Networks by method, and test images (N, C, H, W) in [0, 1] with labels (N,) and names of the classes."""

    dataset: str
    scale: str
    nets: dict[str, nn.Module]
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def first(self, n: int) -> Scene:
        """The same with the first n images."""
        return replace(self, x=self.x[:n], y=self.y[:n])

    def __str__(self) -> str:
        names = ", ".join(METHOD[method][0] for method in self.nets)
        return f"{len(self.x)} test images of {self.dataset}; networks of scale {self.scale!r}: {names}"


def shipped(recipes: Iterable[Recipe]) -> bool:
    """Whether the weights of all these runs are shipped."""
    return all((SHIPPED / f"{run_name(one)}.safetensors").exists() for one in recipes)


def scene(
    device: torch.device, methods: Sequence[str] = PAPER_NETS, seed: int = 0, dataset: str | None = None
) -> Scene:
    """CIFAR-10 where it is on the disk and its networks are shipped, else digits: nothing is trained or downloaded.
    ``dataset``: ``digits`` or ``cifar10`` asks for just that (another: ValueError)."""
    scale = {"digits": "lab", "cifar10": "tiny"}
    if dataset is None:
        here = data.available()["cifar10"] != "missing"
        dataset = "cifar10" if here and shipped(recipe("cifar10", m, seed, "tiny") for m in methods) else "digits"
    if dataset not in scale:
        raise ValueError(f"there are no networks to look at for {dataset!r}: use {' or '.join(map(repr, scale))}")
    recipes = [recipe(dataset, method, seed, scale[dataset]) for method in methods]
    nets = {one.method: run(one, device=device, progress=False).model for one in recipes}
    x, y = samples(recipes[0], "test", device)
    names = data.load(dataset, "test").classes
    return Scene(dataset, scale[dataset], {m: net for m, net in nets.items() if net is not None}, x, y, names)


def stability_frame(recipes: Iterable[Recipe], *, images: int = 100, device: torch.device | None = None, **options):
    """:func:`saliency.stability` of stored runs on their first test images, with each image's C of the same scalar.
    Columns added: dataset, net (the method of training), label, seed, curvature."""
    parts = []
    for one in recipes:
        model = run(one, device=device, progress=False).model
        assert model is not None
        x, y = samples(one, "test", next(model.parameters()).device)
        frame = net_frame(model, x[:images], y[:images], **options)
        parts.append(frame.assign(dataset=one.dataset, net=one.method, label=METHOD[one.method][0], seed=one.seed))
    return pd.concat(parts, ignore_index=True)


def net_frame(model: nn.Module, x: Tensor, y: Tensor, **options) -> pd.DataFrame:
    """:func:`saliency.stability` with each image's C of the same scalar, column curvature (of the trained weights)."""
    frame = stability(model, (x, y), **options)
    curvature = geometry(model, x, y, scalar=options.get("scalar", "loss")).curvature.cpu().numpy()
    return frame.assign(curvature=curvature[frame.image])


def nets_frame(nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, **options) -> pd.DataFrame:
    """:func:`net_frame` of several nets, by method of training: columns net, label added."""
    parts = [net_frame(net, x, y, **options).assign(net=name, label=METHOD[name][0]) for name, net in nets.items()]
    return pd.concat(parts, ignore_index=True)


def lines(frame: pd.DataFrame, measure: str = "relative_change") -> pd.DataFrame:
    """A point a net, kind of noise and ε: :func:`saliency.summary`, with ``theory``, ε times the mean C.
    Means over seeds first, so that n counts images. Takes gradient maps of trained weights."""
    frame = frame[(frame.method == "gradient") & (frame.weights == "trained")]
    seeds = ["net", "label", "method", "weights", "noise", "eps", "image"]
    frame = frame.groupby(seeds, sort=False)[[measure, "curvature"]].mean().reset_index()
    points = summary(frame, measure, by=("net", "label", "noise", "eps"))
    mean = frame.groupby("net").curvature.mean()
    return points.assign(theory=points.eps * points.net.map(mean))


def paper_lines(dataset: str) -> pd.DataFrame:
    """The paper's figure, digitised (± 5 %): columns label, eps, value."""
    rows = published("paper gradient-robustness figure")
    rows = rows[rows.dataset == dataset]
    return pd.DataFrame({"label": rows.method, "eps": rows.epsilon, "value": rows["mean"]}).reset_index(drop=True)


def random_meets(model: nn.Module, x: Tensor, y: Tensor, directions: int = 64, scalar: str = "loss") -> pd.DataFrame:
    """What a random direction meets of the Hessian H of each image: columns sample, spectral ‖H‖₂, frobenius ‖H‖_F/√d,
    measured (root mean square of ‖Hu‖ over random unit u)."""
    d, generator = x[0].numel(), torch.Generator().manual_seed(0)
    with evaluating(model):
        hvp = gradient_and_hvp(model, x, y, scalar)[1]
        basis = torch.eye(d, dtype=x.dtype, device=x.device).view(d, 1, *x.shape[1:])
        hessian = torch.stack([hvp(e.expand_as(x)).flatten(1) for e in basis], 2)
        squares = []
        for _ in range(directions):
            u = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            u = u / u.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
            squares.append(hvp(u).flatten(1).square().sum(1))
    columns = {"spectral": torch.linalg.matrix_norm(hessian, 2), "frobenius": hessian.flatten(1).norm(dim=1) / d**0.5}
    columns |= {"measured": torch.stack(squares).mean(0).sqrt()}
    return pd.DataFrame({"sample": range(len(x))} | {name: value.cpu().numpy() for name, value in columns.items()})


def by_map(frame: pd.DataFrame, measures: Sequence[str], eps: float) -> pd.DataFrame:
    """Several measures at one ε: columns net, label, method, map, weights, noise, measure, n, value, low, high."""
    frame = frame[(frame.eps - eps).abs() < 1e-9]
    by = ("net", "label", "method", "weights", "noise")
    parts = [summary(frame, m, by=by, statistic="median").assign(measure=m) for m in measures if m in frame]
    found = pd.concat(parts, ignore_index=True).dropna(subset="value")
    return found.assign(map=found.method.map(MAPS))


def weights_matter(nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, methods: Sequence[str]) -> pd.DataFrame:
    """How alike the maps of a net and of its copy with shuffled weights are (they should not be): a row an image.
    Columns net, label, method, map, and the measures of :func:`saliency.compare`."""
    parts = []
    for name, net in nets.items():
        for method in methods:
            values = compare(explain(net, x, y, method), explain(randomized(net, x), x, y, method))
            about = {"net": name, "label": METHOD[name][0], "method": method, "map": MAPS[method]}
            parts.append(pd.DataFrame(about | values))
    return pd.concat(parts, ignore_index=True)


def steadier(frame: pd.DataFrame, eps: float, seed: int = 0, resamples: int = 1000) -> pd.DataFrame:
    """How much steadier each net's gradient is than Standard's: the ratio of mean relative changes at ε, random η.
    Means over seeds, then over the images that all nets got right at least once. Columns net, label, change, ratio,
    low, high; intervals of 95 % by resampling images, the same ones for all nets. ValueError: there is no Standard net,
    or nothing was measured at ε."""
    frame = frame[(frame.method == "gradient") & (frame.weights == "trained") & (frame.noise == "random")]
    frame = frame[(frame.eps - eps).abs() < 1e-9]
    by_image = frame.pivot_table(index="image", columns="net", values="relative_change", sort=False).dropna()
    if "standard" not in by_image or not len(by_image):
        raise ValueError(f"no gradients of a Standard net were measured under random noise of length {eps:g}")
    drawn = np.random.default_rng(seed).integers(len(by_image), size=(resamples, len(by_image)))
    base = by_image["standard"].to_numpy()
    rows = []
    for name in by_image:
        values = by_image[name].to_numpy()
        low, high = np.quantile(base[drawn].mean(1) / values[drawn].mean(1), (0.025, 0.975))
        rows.append((name, METHOD[str(name)][0], values.mean(), base.mean() / values.mean(), low, high))
    return pd.DataFrame(rows, columns=["net", "label", "change", "ratio", "low", "high"])


def promises_table(stable: pd.DataFrame, curves: pd.DataFrame, eps: float = 0.1) -> pd.DataFrame:
    """For each method what survives PGD at ε (L2), and how much steadier its gradients are than Standard's.
    ``stable``: of :func:`stability_frame`. ``curves``: of ``measurements.attacks.over_seeds``."""
    steady = steadier(stable, eps).set_index("net")
    at = {(m, e): part.iloc[0] for (m, e), part in curves[curves.norm == "l2"].groupby(["method", "eps"])}
    worst = lines(stable)
    worst = worst[(worst.noise == "worst") & ((worst.eps - eps).abs() < 1e-9)].set_index("net")
    rows = []
    for net, row in steady.iterrows():
        clean, hit = at[net, 0.0], at[net, eps]
        entry = {"net": row.label, "accuracy %": f"{100 * clean.accuracy:.1f}"}
        entry[f"survives ε = {eps:g}, %"] = f"{100 * hit.accuracy:.1f} ({100 * hit.low:.1f} – {100 * hit.high:.1f})"
        entry["change of ∇ℓ, random η"] = f"{row.change:.3g}"
        ratio = "1" if net == "standard" else f"{row.ratio:.2f} ({row.low:.2f} – {row.high:.2f})"
        entry["steadier than Standard, times"] = ratio
        if net in worst.index:
            w = worst.loc[str(net)]
            entry["change, worst η"] = f"{w.value:.3g} ({w.low:.3g} – {w.high:.3g})"
        rows.append(entry)
    return pd.DataFrame(rows)
