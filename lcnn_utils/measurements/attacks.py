"""The measurements of notebook 07: PGD step by step, what it leaves of each method's accuracy, and whether it is to be
believed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks import PAPER_EPS as PAPER_EPS
from ..attacks import Headed, curve_of, first_success, masking_checks, robustness_curve, wilson
from ..attacks.pgd import ascend, check, fooling, random_steps
from ..curvature import evaluating, measuring, prepare, scalar_of
from ..experiments import published, run
from ..figures.style import METHOD
from ..training import Recipe, samples
from .training import plus_minus

DIGITS_EPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
LINF_EPS = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)
DIGITS_LINF = (4 / 255, 8 / 255, 16 / 255, 24 / 255, 32 / 255, 48 / 255)


def path(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: str = "l2",
    steps: int = 20,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The points that :func:`attacks.pgd` visits on its way from one sample, x first: (steps taken + 2, …). It ends
    where the network is wrong, at x itself if it is wrong there. x is (1, …), y (1,); points may lie anywhere."""
    seen: list[Tensor] = []
    with measuring(model):
        x, y = prepare(model, x, y)
        margin, radius = fooling(model, y), check(x, eps, norm, None)

        def objective(at: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(at.detach().clone())
            return margin(at, index)

        starts = random_steps(x, radius, norm, 1, generator)
        ascend(objective, x, radius, starts, norm, steps, None, step_size)
    return torch.cat(seen)


def step_size_frame(
    model: nn.Module, x: Tensor, y: Tensor, eps_grid: Sequence[float], steps: int = 20, fixed: float = 0.01
) -> pd.DataFrame:
    """What PGD leaves with four rules for the length of a step, at ε > 0: columns rule, eps, accuracy (each ε anew)."""
    rules = {
        "2ε, falling to 0": lambda eps: None,
        f"2.5ε/{steps}": lambda eps: 2.5 * eps / steps,
        f"ε/{steps}": lambda eps: eps / steps,
        f"always {fixed:g}": lambda eps: fixed,
    }
    rows = []
    for rule, length in rules.items():
        for eps in eps_grid:
            fell = first_success(model, x, y, [eps], steps=steps, step_size=length(eps))
            rows.append((rule, eps, (fell > eps).float().mean().item()))
    return pd.DataFrame(rows, columns=["rule", "eps", "accuracy"])


def logit_scale_frame(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, scales: Sequence[float], **attack
) -> pd.DataFrame:
    """What PGD leaves when the logits are multiplied by a number: columns loss, scale, accuracy, low, high."""
    parts = []
    for loss in ("ce", "margin"):
        for scale in scales:
            scaled = Headed(model, partial(torch.mul, scale))
            curve = curve_of(first_success(scaled, x, y, [eps], loss=loss, **attack), [eps])
            parts.append(curve[curve.eps > 0].assign(loss=loss, scale=scale))
    return pd.concat(parts, ignore_index=True)


def linear_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """margin/‖∇margin‖₂ of each sample, (N,): where a network without curvature would have its boundary."""
    with evaluating(model), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        margin = scalar_of(model(at), y, "margin")
        (gradient,) = torch.autograd.grad(margin.sum(), at)
    return margin.detach() / gradient.flatten(1).norm(dim=1)


def curves_frame(
    recipes: Iterable[Recipe],
    eps_grid: Sequence[float],
    *,
    images: int = 1000,
    device: torch.device | None = None,
    **attack,
) -> pd.DataFrame:
    """:func:`attacks.robustness_curve` of stored runs on their first test images: columns method, label, seed added."""
    parts = []
    for one in recipes:
        model = run(one, device=device, progress=False).model
        assert model is not None
        x, y = samples(one, "test", next(model.parameters()).device)
        curve = robustness_curve(model, (x[:images], y[:images]), eps_grid, **attack)
        parts.append(curve.assign(dataset=one.dataset, method=one.method, label=METHOD[one.method][0], seed=one.seed))
    return pd.concat(parts, ignore_index=True)


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """A point a method and ε: columns dataset, method, label, norm, eps, accuracy, low, high, seeds.
    The mean over seeds, with the Wilson interval of all their images together; where the spread over seeds is larger
    (mean ± 2 standard errors), that."""
    rows = []
    for key, part in frame.groupby(["dataset", "method", "label", "norm", "eps"], sort=False):
        values = part.accuracy.to_numpy(float)
        mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        low, high = wilson(int(part.correct.sum()), int(part.n.sum()))
        rows.append((*key, mean, min(low, mean - 2 * error), max(high, mean + 2 * error), len(part)))  # type: ignore[misc]
    names = ["dataset", "method", "label", "norm", "eps", "accuracy", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=names).assign(low=lambda f: f.low.clip(0), high=lambda f: f.high.clip(upper=1))


def table(frame: pd.DataFrame, eps_grid: Sequence[float] = (0, 0.05, 0.1, 0.15, 0.2)) -> pd.DataFrame:
    """Accuracies in % at each ε (L2), mean ± standard deviation over seeds; in brackets those of the paper's Table 2.
    ``frame``: of :func:`curves_frame`."""
    paper = paper_table().set_index(["label", "eps"]).accuracy
    rows = []
    for label, part in frame[frame.norm == "l2"].groupby("label", sort=False):
        row = {"net": str(label)}
        for eps in eps_grid:
            at = part[(part.eps - eps).abs() < 1e-9].accuracy * 100
            theirs = f"{paper[label, eps]:.1f}" if (label, eps) in paper.index else "–"
            row["clean" if eps == 0 else f"ε = {eps:g}"] = f"{plus_minus(at)} ({theirs})"
        rows.append(row)
    return pd.DataFrame(rows)


def paper_table() -> pd.DataFrame:
    """The paper's Table 2: columns label, eps, accuracy, spread (both in %)."""
    rows = published("paper table 2")
    columns = {"label": rows.method, "eps": rows.epsilon.fillna(0), "accuracy": rows["mean"], "spread": rows.spread}
    return pd.DataFrame(columns)


def masking_frame(nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, eps: float, **options) -> pd.DataFrame:
    """:func:`attacks.masking_checks` of each net, points of the first other net being tried on it: column net added."""
    parts = []
    for method, net in nets.items():
        name, other = next((n, o) for n, o in nets.items() if n != method)
        checks = masking_checks(net, (x, y), eps, others={"another net": other}, **options)
        parts.append(checks.assign(net=METHOD[method][0], method=method, other=METHOD[name][0]))
    return pd.concat(parts, ignore_index=True)


def masking_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a check, a column a net: the other attack's accuracy or the share, in %, and ✓ or ✗."""
    frame = frame.assign(check=frame.check.str.removeprefix("share of "))  # pandas shows 50 characters
    mark = lambda passed: "" if pd.isna(passed) else " ✓" if passed else " ✗"
    shown = [f"{100 * v:.1f}{mark(passed)}" for v, passed in zip(frame.value, frame.passed, strict=True)]
    wide = frame.assign(shown=shown).pivot(index="check", columns="net", values="shown")
    wide = wide.loc[frame.check.unique(), frame.net.unique()]
    first = frame.groupby("net", sort=False).standard.first().to_dict()
    accuracies = [f"{100 * first[str(net)]:.1f}" for net in wide]
    head = pd.DataFrame([accuracies], ["PGD, 20 steps (what is checked)"], wide.columns)
    return pd.concat([head, wide]).rename_axis(columns=None).reset_index(names="accuracy left, or share, in %")
