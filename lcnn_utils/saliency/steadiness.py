"""Two maps of each sample, compared; and what such numbers say over many samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.balls import Box, _direction, _folded, _moved
from ..curvature import evaluating, scalar_of
from .attribution import explain

MEASURES = ("relative_change", "cosine", "spearman", "top_overlap", "ssim")
TOP = 0.1  # share of pixels whose overlap is measured
WINDOW = 7  # of SSIM, in pixels
BY_INPUT = ("input_x_gradient", "integrated_gradients", "deeplift", "occlusion")  # they weigh pixels by their value


def compare(before: Tensor, after: Tensor) -> dict[str, np.ndarray]:
    """How alike two maps of each sample are, both (N, …): :data:`MEASURES` → (N,), computed in float64.

    ``relative_change``: ‖after − before‖/‖before‖, the paper's; infinite where ``before`` is 0, nan where both are.
    ``cosine``: of the signed maps. ``spearman``: rank correlation of the signed values, nan where a map is constant.
    ``top_overlap``: of the tenth of the pixels that are largest in size (summed over channels), less those as large as
    the first beyond the tenth, the share that both maps have, of the larger set where ties make one smaller. Chance
    gives 0.1, and an empty set, as of a constant map, nan. ``ssim``: mean structural similarity (Z. Wang et al., IEEE
    TIP 2004) of the 7 × 7 windows inside the image, both maps divided by the largest size in ``before`` and raised by
    1, as it takes positive images; nan for what isn't an image of at least 7 × 7 pixels. Where a map is 0 everywhere
    all but the first are nan, where one holds NaN or infinity all are.

    Raises:
        ValueError: the shapes differ, or are not (N, …) with at least one entry a map.
    """
    if before.shape != after.shape or before.dim() < 2 or 0 in before.shape[1:]:
        raise ValueError(f"maps of shapes {tuple(before.shape)} and {tuple(after.shape)} can't be compared")
    from scipy.stats import rankdata  # here: it takes a while to import

    a, b = (m.detach().cpu().double().flatten(1) for m in (before, after))  # in this order: Apple's GPU has no float64
    a, b = (m.masked_fill(~(a + b).isfinite().all(1, keepdim=True), torch.nan) for m in (a, b))
    ranks = [torch.from_numpy(rankdata(m, axis=1) - (m.shape[1] + 1) / 2) for m in (a, b)]  # less their mean
    sizes = [m.abs().unflatten(1, (before.shape[1] if before.dim() == 4 else 1, -1)).sum(1) for m in (a, b)]
    k = min(max(1, round(TOP * sizes[0].shape[1])), sizes[0].shape[1] - 1)
    first, second = (s > s.topk(k + 1).values[:, -1:] for s in sizes)
    shared = (first & second).sum(1).double()
    scale = a.abs().amax(1, keepdim=True)
    a, b = (m / torch.where(scale > 0, scale, 1) for m in (a, b))
    values = {
        "relative_change": (b - a).norm(dim=1) / a.norm(dim=1),
        "cosine": F.cosine_similarity(a, b, eps=0),
        "spearman": F.cosine_similarity(ranks[0], ranks[1], eps=0),
        "top_overlap": torch.minimum(shared / first.sum(1), shared / second.sum(1)),
        "ssim": _ssim(a.view(before.shape), b.view(before.shape)),
    }
    return {name: value.numpy() for name, value in values.items()}


def _ssim(before: Tensor, after: Tensor) -> Tensor:
    if before.dim() != 4 or min(before.shape[-2:]) < WINDOW:
        return before.new_full((len(before),), torch.nan)
    from skimage.metrics import structural_similarity as ssim

    options = dict(win_size=WINDOW, data_range=2.0, channel_axis=0)
    pairs = zip(before.numpy(), after.numpy(), strict=True)
    return before.new_tensor([ssim(p + 1, q + 1, **options) if p.any() and q.any() else np.nan for p, q in pairs])


def captum_scores(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str,
    eps: float,
    n: int,
    maps: Tensor,
    box: Box = (0.0, 1.0),
    **options,
) -> dict[str, np.ndarray]:
    """Captum's ``sensitivity_max`` and ``infidelity`` under ``n`` random steps of length ε, each (N,).

    The first is the largest relative change of the map among the n. The second asks whether the map, times the step,
    foretells the change of the scalar: here the share of the mean squared change that it leaves unexplained when
    scaled as well as can be; 0 is a perfect map, 1 one that says nothing.

    Args:
        maps: of x, by this method and these ``options`` of :func:`maps.explain`.
    """
    from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max

    scalar, seed = options.get("scalar", "logit"), options.get("seed", 0)
    base = options.get("baseline") or None if method in BY_INPUT else None
    one_by_one = len(x)  # perturbations are evaluated one after another, all samples at once

    def perturbed(inputs: Tensor | tuple[Tensor, ...], *_: object) -> Tensor:
        at = inputs[0] if isinstance(inputs, tuple) else inputs
        drawn = torch.randn(at.shape, generator=generator, dtype=at.dtype).to(at.device)
        return _moved(at, _folded(at, eps * _direction(drawn, "l2"), box), box)

    def f(at: Tensor) -> Tensor:
        return scalar_of(model(at), y, scalar)

    def mapped(at: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:  # given a plain tensor, Captum 0.9 compares all maps
        with torch.enable_grad():  # with that of the first sample
            return (explain(model, at[0] if isinstance(at, tuple) else at, y, method, **options),)

    generator = torch.Generator().manual_seed(seed + 1)
    with evaluating(model):
        largest = sensitivity_max(mapped, x, perturbed, eps, n, max_examples_per_batch=one_by_one)
        wrap = infidelity_perturb_func_decorator(multiply_by_inputs=method in BY_INPUT)
        parts = []
        for map_ in (maps.expand_as(x), torch.zeros_like(x)):  # the second gives the mean squared change itself
            generator = torch.Generator().manual_seed(seed + 2)
            parts.append(infidelity(f, wrap(perturbed), x, map_, baselines=base, n_perturb_samples=n, normalize=True,
                                    max_examples_per_batch=one_by_one))  # fmt: skip
    return {"sensitivity_max": largest.cpu().numpy(), "infidelity": (parts[0] / parts[1]).clamp(0, 1).cpu().numpy()}


def summary(
    frame: pd.DataFrame,
    measure: str = "relative_change",
    by: str | Sequence[str] = ("method", "weights", "noise", "eps"),
    *,
    statistic: str = "mean",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """A measure over images, with 95 % bootstrap intervals (percentiles): columns ``by``, n, value, low, high.

    Args:
        frame: of :func:`saliency.stability`, more columns allowed. Rows whose measure is nan or infinite are left out,
            and n says how many were not.
        by: columns, or one of them: an interval for each combination of their values, nan being a value too.
        statistic: ``mean`` or ``median``.

    Raises:
        ValueError: another statistic, a column that the frame lacks, no column to go by, a measure that isn't numbers.
    """
    from scipy.stats import bootstrap

    from ..lab import check_choice

    check_choice(statistic, ("mean", "median"), "statistic")
    by = [by] if isinstance(by, str) else list(by)
    if not by:
        raise ValueError("by=() names no column: give at least one, such as by='method'")
    for name in (measure, *by):
        check_choice(name, tuple(map(str, frame.columns)), "column")
    rows = []
    for key, part in frame.groupby(by, sort=False, dropna=False, observed=True):
        values = part[measure].to_numpy(float, na_value=np.nan)
        values = values[np.isfinite(values)]
        of = getattr(np, statistic)
        low = high = value = of(values) if len(values) else np.nan
        if len(values) > 1 and np.ptp(values) > 0:
            found = bootstrap((values,), of, n_resamples=resamples, method="percentile", rng=seed, vectorized=True)
            low, high = found.confidence_interval
        rows.append((*key, len(values), value, low, high))  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*by, "n", "value", "low", "high"])
