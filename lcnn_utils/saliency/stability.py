"""How stable are a network's explanations when the input hardly moves (the paper's figure on gradient robustness)?

Maps at x and at x + η are compared, with η random or the worst that ascent finds, at the lengths of the paper's figure.
For the gradient of a scalar f and a short step the relative change is at most about ‖η‖·C_f(x), with C_f the normalised
curvature; a random η among d dimensions meets far less of it.

References: S. Srinivas et al., NeurIPS 2022; J. Adebayo et al., NeurIPS 2018 (random weights as a control); A. Ghorbani
et al., AAAI 2019 (top-k overlap, worst noise); C.-K. Yeh et al., NeurIPS 2019 (infidelity, written out here).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..attacks import direction, mirror, move, project
from ..attacks.pgd import UNIT, Box, check, scale
from ..curvature import evaluating, geometry, length, measuring, prepare, scalar_of
from ..data import Images, floats
from ..lab import check_choice
from ..nn import refresh_norms, refresh_statistics
from .attribution import explain

LENGTHS = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1)  # ‖η‖₂ of the paper's figure
NOISE = ("random", "worst")
MEASURES = ("relative_change", "cosine", "spearman", "top_overlap")
TOP = 0.1  # share of pixels whose overlap is measured
BY_INPUT = ("input_x_gradient", "integrated_gradients", "deeplift", "occlusion")  # they weigh pixels by their value


def compare(before: Tensor, after: Tensor) -> dict[str, np.ndarray]:
    """How alike two maps of each sample are, both (N, …): one of MEASURES → (N,), computed in float64.

    ``relative_change``: ‖after − before‖/‖before‖, the paper's; infinite where ``before`` is 0, nan where both are.
    ``cosine``: of the signed maps. ``spearman``: rank correlation of the signed values, nan where a map is constant.
    ``top_overlap``: of the tenth of the pixels, k of d, that are largest in size (summed over channels; less those
    that tie with the next), the share that both maps have, of the larger set; chance gives k/d, a constant map nan.
    Where a map is 0 everywhere all but the first are nan, where one holds NaN or infinity all are. ValueError: the
    shapes differ or aren't (N, …).
    """
    if before.shape != after.shape or before.dim() < 2 or 0 in before.shape[1:]:
        raise ValueError(f"maps of shapes {tuple(before.shape)} and {tuple(after.shape)} can't be compared")
    a, b = (m.detach().cpu().double().flatten(1) for m in (before, after))  # in this order: Apple's GPU has no float64
    a, b = (m.masked_fill(~(a + b).isfinite().all(1, keepdim=True), torch.nan) for m in (a, b))
    sizes = [m.abs().unflatten(1, (before.shape[1] if before.dim() == 4 else 1, -1)).sum(1) for m in (a, b)]
    k = min(max(1, round(TOP * sizes[0].shape[1])), sizes[0].shape[1] - 1)
    first, second = (s > s.topk(k + 1).values[:, -1:] for s in sizes)
    shared = (first & second).sum(1).double()
    scale = a.abs().amax(1, keepdim=True)
    a, b = (m / torch.where(scale > 0, scale, 1) for m in (a, b))
    values = {
        "relative_change": (b - a).norm(dim=1) / a.norm(dim=1),
        "cosine": F.cosine_similarity(a, b, eps=0),
        "spearman": _spearman(a, b),
        "top_overlap": torch.minimum(shared / first.sum(1), shared / second.sum(1)),
    }
    return {name: value.numpy() for name, value in values.items()}


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    from scipy.stats import rankdata  # here: it takes a while to import

    ranks = [torch.from_numpy(rankdata(m, axis=1) - (m.shape[1] + 1) / 2) for m in (a, b)]  # less their mean
    return F.cosine_similarity(ranks[0], ranks[1], eps=0)


def _infidelity(model, x, y, method, maps, eps, n, box, scalar, seed, baseline) -> np.ndarray:
    """Infidelity of maps (like x, by this method) under ``n`` random steps of length ε, (N,).

    It asks whether the map, times the step, predicts the change of the scalar: here the share of the mean squared
    change that it leaves unexplained when scaled as well as can be; 0 is a perfect map, 1 one that says nothing.
    """
    if method in BY_INPUT:
        weight = x - baseline
        maps = maps / torch.where(weight == 0, 1, weight)
    generator = torch.Generator().manual_seed(seed + 2)
    predicted, change = [], []
    with evaluating(model), torch.no_grad():
        before = scalar_of(model(x), y, scalar)
        for _ in range(n):
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            moved = move(x, mirror(x, eps * direction(drawn, "l2"), box), box)
            predicted.append((maps * (moved - x)).flatten(1).sum(1).cpu().double())
            change.append((scalar_of(model(moved), y, scalar) - before).cpu().double())
    cosine = F.cosine_similarity(torch.stack(predicted), torch.stack(change), dim=0, eps=1e-30)
    return (1 - cosine.square()).numpy()  # least squares: min over b of ‖change − b·foretold‖² / ‖change‖²


def summary(frame: pd.DataFrame, measure: str, by: Sequence[str], statistic: str = "mean") -> pd.DataFrame:
    """Mean or median of a measure over images, with 95 % bootstrap intervals: columns ``by``, n, value, low, high.

    A row for each combination of the values of the columns ``by``; n counts the finite values, which alone are used.
    """
    from scipy.stats import bootstrap

    rows = []
    function = getattr(np, statistic)
    for key, part in frame.groupby(list(by), sort=False, dropna=False, observed=True):
        values = part[measure].to_numpy(float, na_value=np.nan)
        values = values[np.isfinite(values)]
        low = high = value = function(values) if len(values) else np.nan
        if len(values) > 1 and np.ptp(values) > 0:
            drawn = bootstrap((values,), function, n_resamples=1000, method="percentile", rng=0, vectorized=True)
            low, high = drawn.confidence_interval
        rows.append((*key, len(values), value, low, high))  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*by, "n", "value", "low", "high"])


def worst_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    eps: float,
    scalar: str = "loss",
    steps: int = 10,
    box: Box = UNIT,
    starts: Iterable[Tensor] | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Projected ascent on ‖∇f(x + η) − ∇f(x)‖ over ‖η‖₂ ≤ ε → (η like x, that change (N,)), the best seen.

    It begins at the best of the ``starts``, which are scaled to length ε (default: ± the top eigenvector of each
    sample's Hessian). What is found is a lower bound of the true worst case. Else as :func:`attacks.pgd`.
    """
    with measuring(model):
        x, y = prepare(model, x, y, precise=True)
        radius = check(x, eps, "l2", box, steps=steps, batch_size=batch_size)
        starts = _curved_ways(model, x, y, scalar, batch_size) if starts is None else starts
        starts = [scale(direction(start, "l2"), radius) for start in starts]
        parts = []
        for index in torch.arange(len(x), device=x.device).split(batch_size):
            parts.append(
                _climb(model, x[index], y[index], radius[index], [s[index] for s in starts], scalar, steps, box)
            )
    eta, change = (torch.cat(part) for part in zip(*parts, strict=True))
    return eta, change


def _climb(model, x, y, eps, starts, scalar, steps, box) -> tuple[Tensor, Tensor]:
    """The best step found, like x, and the change of the gradient, (N,). The box cuts points off, not the ascent."""
    best, top = torch.zeros_like(x), torch.zeros_like(eps)

    def gradient(x_noisy: Tensor, graph: bool = False) -> Tensor:
        f = scalar_of(model(x_noisy.requires_grad_()), y, scalar).sum()
        return torch.autograd.grad(f, x_noisy, create_graph=graph, materialize_grads=True)[0]

    before = gradient(x.clone())

    def look(eta: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        x_noisy = move(x, eta, box)
        change = length(gradient(x_noisy, graph) - before, "l2")
        better = change > top
        best[better], top[better] = (x_noisy.detach() - x)[better], change.detach()[better]
        return x_noisy, change

    for start in starts:
        look(start)
    eta = best.clone()
    for step in range(steps):
        x_noisy, change = look(eta, graph=True)
        uphill = torch.zeros_like(x_noisy)  # where the gradient is the same all around: a ReLU network's margin
        if change.requires_grad:
            (uphill,) = torch.autograd.grad(change.sum(), x_noisy, materialize_grads=True)
        far = 0.5 * (1 + math.cos(math.pi * step / steps)) * eps
        eta = project(eta + scale(direction(uphill, "l2"), far), eps, "l2")
    look(eta)
    return best, top


def _curved_ways(model: nn.Module, x: Tensor, y: Tensor, scalar: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """± the top eigenvector of each sample's Hessian, like x: the worst steps in the limit ε → 0."""
    v = geometry(model, x, y, scalar=scalar, tol=0.1, batch_size=batch_size).direction
    return v, -v


def stability(
    model: nn.Module,
    images: Images | tuple[Tensor, Tensor],
    eps_grid: Iterable[float] = LENGTHS,
    methods: Sequence[str] = ("gradient",),
    *,
    scalar: str = "loss",
    noise: Sequence[str] = NOISE,
    control: bool = False,
    perturbations: int = 0,
    batch_size: int = 256,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """How much maps change between x and x + η: a row an image, method, kind of noise and length.

    Only images that the network gets right are used, and the same ones for the control. The random η of an image points
    in the same direction at every length, for every method and every network; entries that would leave [0, 1] change
    their sign. The worst η is sought for the *gradient* of the scalar and transferred to every method: for the others
    it is a lower bound of their own worst, which can be far worse (notebook 06, for SmoothGrad).

    Args:
        images: a split as ``data.load`` gives it, on the model's device, or (x, y).
        eps_grid: lengths ‖η‖₂ in units of x.
        methods, scalar, **options: of :func:`explain`; ``loss`` as in the paper.
        noise: ``random``, uniform among the directions, and ``worst``, of :func:`worst_step`.
        control: measure also a copy with shuffled weights (:func:`randomized`), which has learnt nothing.
        perturbations: random η a length for the infidelity; 0 leaves it out.

    Columns: image (its index in ``images``), weights (``trained``, ``random``), noise, eps, method, MEASURES (and
    infidelity, of the random η). ValueError: bad input; too few images are classified rightly.
    """
    lengths = sorted({float(e) for e in eps_grid})
    if not lengths or not all(0 < e < np.inf for e in lengths):
        raise ValueError(f"eps_grid must hold lengths, finite and above 0, in units of x; got {lengths}")
    for kind in noise:
        check_choice(kind, NOISE, "kind of noise")
    with measuring(model):
        x, y = prepare(model, *floats(images), precise=True)
        with torch.no_grad():
            right = (torch.cat([model(part) for part in x.split(batch_size)]).argmax(1) == y).nonzero().squeeze(1)
    if len(right) < 1 + control:
        raise ValueError(f"the network is right about {len(right)} of these images: {1 + control} at least are needed")
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    x, y, box = x[right], y[right], UNIT if x.dim() == 4 else None
    options |= {"scalar": scalar, "batch_size": batch_size, "seed": seed}
    nets = {"trained": model} | ({"random": randomized(model, x, seed)} if control else {})
    unit = mirror(x, lengths[-1] * direction(drawn[right.cpu()].to(x), "l2"), box) / lengths[-1]
    parts = []
    for weights, net in nets.items():
        start = {method: explain(net, x, y, method, **options) for method in methods}
        ways = _curved_ways(net, x, y, scalar, batch_size) if "worst" in noise else ()
        worst = torch.zeros_like(x)
        for eps in lengths:
            steps = {"random": eps * unit} if "random" in noise else {}
            if "worst" in noise:
                worst, _ = worst_step(net, x, y, eps, scalar, 3, box, (*ways, worst), batch_size)  # in 3 steps
                steps["worst"] = worst
            for kind, step in steps.items():
                moved = move(x, step, box)
                for method in methods:
                    about = dict(image=right.cpu(), weights=weights, noise=kind, eps=eps, method=method)
                    values = compare(start[method], explain(net, moved, y, method, **options))
                    if perturbations and kind == "random":
                        settings = eps, perturbations, box, scalar, seed, options.get("baseline", 0.0)
                        values["infidelity"] = _infidelity(net, x, y, method, start[method], *settings)
                    parts.append(pd.DataFrame(about | values))
    return pd.concat(parts, ignore_index=True)


def randomized(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """A copy in eval mode that has learnt nothing: the entries of every weight shuffled, BatchNorm's statistics taken
    again from x. Sizes, β and γ stay, so that only what the weights had learnt is lost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):  # which would make weights that have no gradients
        copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in copied.parameters():
            if p.dim() > 1:
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p))
        refresh_norms(copied)
        for module in copied.modules():
            if isinstance(module, parametrize.ParametrizationList):
                module.train()
        refresh_statistics(copied, x)
    return copied.eval()
