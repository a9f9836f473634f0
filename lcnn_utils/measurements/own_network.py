"""What notebook 09 measures: all that can be said of any classifier, and of what can't be, why."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from ..attacks import first_success, wilson
from ..attacks.pgd import UNIT
from ..curvature import certified_radius, curvature_bound, geometry, measuring, prepare
from ..lab import track
from ..nn import refresh_statistics, softened
from ..nn.convert import RELUS
from ..saliency import stability, summary
from .lipschitz import STATISTICS

SHARP = 1000.0  # β of the softplus that stands in for a ReLU, whose kinks no Hessian sees: the paper's Standard
PRODUCTS, TOLERANCE = 10, 0.1  # Hessian-vector products at most, relative error of C: small beside its interval
STEPS = 10  # of PGD
BETAS = (1000, 100, 30, 10, 5, 3, 2, 1, 0.5, 0.3)  # of softening
KINKED = re.compile(
    r"(Leaky|[PR])?[Rr]elu\w*|(Adaptive)?MaxPool\w*|Hard\w+|A?max|A?min|Maximum|Minimum|Threshold|Abs|Sort"
)
FLAT = 1e-4  # ‖∇ℓ‖ below which ε = 1e-6 of the definition decides C of the loss, not the network
# (measure, ε or None) → a number an image, NaN where it has none, or whether the image passes: (N,)
Values = dict[tuple[str, float | None], Tensor]


def report(
    nets: nn.Module | Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Iterable[float] = (0.1, 0.25, 0.5),
    images: int = 100,
    curvature_images: int = 25,
    batch_size: int = 25,
    certify: bool = True,
) -> pd.DataFrame:
    """What can be measured of classifiers: a row a network, measure and ε (L2, in units of x).

    ``accuracy`` of all x. Of ``images`` of them: ``robust_accuracy``, left by PGD (0 is among its ε);
    ``relative_change`` of the loss's gradient under a random step of length ε, where the net is right;
    ``certified_radius``, 0 where it is wrong, and ``certified_accuracy``, the share of radii above ε. Of
    ``curvature_images`` (C costs ten times as much): ``curvature``, C of the loss, and ``margin_curvature``; for them
    an nn.ReLU is read as centered softplus with β = 1000. All nets see the same images, one from each of so many equal
    parts of x, which may be sorted by class.

    Args:
        nets: of logits (N, K); or several, by name. Used in eval mode, left as they were.
        x, y: images (N, C, H, W) in [0, 1] or points (N, d), floating; labels (N,), int64.
        batch_size: images measured at once (memory).
        certify: whether certified radii are computed.

    Columns: network, measure, eps (NaN: none), value, low, high, n (images), p, note. Shares have 95 % Wilson
    intervals, all else is medians with bootstrap intervals. p: of the exact sign test that an image's value is as often
    above as below the first network's (of shares: McNemar's test); NaN where there are no two. What could not be
    measured has n = 0, and a note why. ValueError: bad x, y or ε; a network that nothing is measured of (``prepare``).
    """
    nets = nets if isinstance(nets, Mapping) else {"network": nets}
    lengths = sorted({float(e) for e in ((eps,) if isinstance(eps, int | float) else eps)})
    if not lengths or not all(0 < e < math.inf for e in lengths):
        raise ValueError(f"eps must hold lengths, finite and above 0, in units of x; got {lengths}")
    if min(images, curvature_images, batch_size) < 1:
        raise ValueError("images, curvature_images and batch_size must be 1 or more")
    for name, net in nets.items():
        try:
            with measuring(net):
                x, y = (part.to(next(net.parameters(), x).device) for part in (x, y))
                prepare(net, x, y, precise=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    plan: dict[tuple[str, ...], tuple[Callable, int]] = {
        ("accuracy",): (_accuracy, len(x)),
        ("robust_accuracy",): (_robust_accuracy, images),
        ("certified_radius", "certified_accuracy"): (_certificates, images),
        ("relative_change",): (_relative_change, images),
        ("curvature", "margin_curvature"): (_curvature, curvature_images),
    }
    if not certify:
        del plan["certified_radius", "certified_accuracy"]
    rows, first = list[tuple](), Values()
    for network, net in nets.items():
        for names, (measure, wanted) in track(plan.items(), f"measuring {network}"):
            index = _spread(len(x), wanted)
            reason = "no image has a finite value"
            try:
                values, note = measure(net, x[index], y[index], lengths, batch_size)
            except Exception as error:  # whatever a network raises
                values, note = {(name, None): torch.empty(0) for name in names}, ""
                reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")
            for key, of_images in values.items():
                value, low, high, n = _value_and_interval(of_images)
                p = _sign_test(of_images, first[key]) if key in first else math.nan
                rows.append((network, *key, value, low, high, n, p, note if n else f"not measured: {reason}"))
            if network == next(iter(nets)):
                first |= values
    return pd.DataFrame(rows, columns=["network", "measure", "eps", "value", "low", "high", "n", "p", "note"])


def softening(
    net: nn.Module, x: Tensor, y: Tensor, betas: Iterable[float] = BETAS, *, train: Tensor | None = None,
    eps: float = 0.25, **options: int,
) -> pd.DataFrame:  # fmt: skip
    """:func:`report` (``options``) of a net that is :func:`nn.softened` to each β, the largest first, and not trained.

    ``train``: images (N, C, H, W) on which BatchNorm's running statistics are measured again, as a second series:
    softer activations send other values. Columns beta and statistics (of ``STATISTICS``) are added. ValueError: nothing
    to soften, and as of :func:`report`.
    """
    parts = []
    for beta in track(sorted(betas, reverse=True), "β"):
        soft = {STATISTICS[0]: softened(net, beta).eval()}
        if train is not None:
            soft[STATISTICS[1]] = refresh_statistics(softened(net, beta).eval(), train)
        frame = report(soft, x, y, eps=(eps,), certify=False, **options)
        parts.append(frame[frame.eps != 0].assign(beta=beta).rename(columns={"network": "statistics"}))
    return pd.concat(parts, ignore_index=True)


def _spread(n: int, wanted: int) -> Tensor:
    """Indices of ``wanted`` of n images, at most all: one drawn from each of so many equal parts."""
    wanted = min(wanted, n)
    drawn = torch.rand(wanted, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(wanted) + drawn) * n / wanted).long()


def _accuracy(net: nn.Module, x: Tensor, y: Tensor, lengths: list[float], batch_size: int) -> tuple[Values, str]:
    with measuring(net), torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in x.split(batch_size)])
    return {("accuracy", None): predicted == y}, ""


def _robust_accuracy(net: nn.Module, x: Tensor, y: Tensor, lengths: list[float], batch_size: int) -> tuple[Values, str]:
    box = UNIT if x.dim() == 4 else None
    fell = first_success(net, x, y, lengths, steps=STEPS, box=box, batch_size=batch_size)
    return {("robust_accuracy", e): fell > e for e in (0.0, *lengths)}, f"upper bound: PGD, {STEPS} steps"


def _certificates(net: nn.Module, x: Tensor, y: Tensor, lengths: list[float], batch_size: int) -> tuple[Values, str]:
    curvature_bound(net, x.shape[1:], certified=False)  # refuses at once; the gradients of all logits take minutes
    radius = certified_radius(net, x, y)
    values: Values = {("certified_radius", None): radius}
    return values | {("certified_accuracy", e): radius > e for e in lengths}, "lower bound"


def _relative_change(net: nn.Module, x: Tensor, y: Tensor, lengths: list[float], batch_size: int) -> tuple[Values, str]:
    frame = stability(net, (x, y), lengths, noise=("random",), batch_size=batch_size)
    wide = frame.pivot(index="image", columns="eps", values="relative_change").reindex(range(len(x)))
    return {("relative_change", e): torch.tensor(wide[e].to_list()) for e in lengths}, "random step"


def _curvature(net: nn.Module, x: Tensor, y: Tensor, lengths: list[float], batch_size: int) -> tuple[Values, str]:
    """C of both scalars, and what was read as something else, isn't seen, or isn't exact."""
    values, notes = Values(), []
    if any(type(layer) in RELUS for layer in net.modules()):
        net = softened(net, SHARP, only_relus=True)
        notes.append(f"ReLUs read as softplus, β = {SHARP:g}")
    if kinks := _kinks(net, x):
        notes.append(f"too small: a Hessian does not see the kinks of {', '.join(kinks)}")
    for name, scalar in (("curvature", "loss"), ("margin_curvature", "margin")):
        g = geometry(net, x, y, scalar=scalar, tol=TOLERANCE, max_iter=PRODUCTS, batch_size=batch_size)
        values[name, None] = g.curvature
        if scalar == "loss" and (flat := g.grad_norm < FLAT).any():
            values[name, None] = g.curvature.masked_fill(flat, math.nan)
            notes.append(f"{int(flat.sum())} images without C of the loss, which is too sure of them (‖∇ℓ‖ < {FLAT:g})")
        if inexact := int((g.residual > TOLERANCE).sum()):
            notes.append(f"of the {scalar}, {inexact} images may have {TOLERANCE:.0%} more")
    return values, "; ".join(notes)


def _kinks(net: nn.Module, x: Tensor) -> list[str]:
    """Operations with a kink on the way from x to the logits, as autograd calls them."""
    with measuring(net):
        seen, nodes = set(), {net(x[:1].clone().requires_grad_()).grad_fn}
    while nodes:
        seen |= nodes
        nodes = {before for node in nodes for before, _ in node.next_functions if before} - seen
    return sorted({name for node in seen if KINKED.fullmatch(name := re.sub(r"(\dD.*)?Backward\d*$", "", node.name()))})


def _value_and_interval(of_images: Tensor) -> tuple[float, float, float, int]:
    """Value, low, high, n: of a share (Wilson), or of the median of what is finite (bootstrap)."""
    if of_images.dtype == torch.bool:
        passed, n = int(of_images.sum()), len(of_images)
        return passed / n, *wilson(passed, n), n
    frame = pd.DataFrame({"value": [math.nan, *of_images.tolist()], "by": 0})
    _, n, value, low, high = summary(frame, "value", ["by"], "median").iloc[0]
    return value, low, high, int(n)


def _sign_test(of: Tensor, over: Tensor) -> float:
    """p of the two-sided sign test; NaN where either was not measured. Ties and NaNs count for neither side."""
    if 0 in (len(of), len(over)):
        return math.nan
    above, below = int((of > over).sum()), int((of < over).sum())
    return binomtest(above, above + below).pvalue if above + below else 1.0
