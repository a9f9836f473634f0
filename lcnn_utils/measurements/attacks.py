"""What notebook 07 measures: PGD step by step, what it leaves of each method's accuracy, and whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks import PAPER_EPS, masking_checks
from ..attacks.pgd import ascend, check, fooling, random_steps
from ..curvature import measuring, prepare
from ..experiments import held_images, mean_interval, plus_minus, published
from ..lab import LABEL


def path(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, norm: str = "l2", steps: int, step_size: float | None = None
) -> Tensor:
    """The points that :func:`attacks.pgd` visits on its way from one sample, x first: (steps taken + 2, …). It ends
    where the network is wrong, at x itself if it is wrong there. x is (1, …), y (1,); points may lie anywhere."""
    visited: list[Tensor] = []
    with measuring(model):
        x, y = prepare(model, x, y)
        margin, radius = fooling(model, x, y), check(x, eps, norm, None)

        def objective(x_adv: Tensor, *which) -> tuple[Tensor, Tensor]:
            visited.append(x_adv.detach().clone())
            return margin(x_adv, *which)

        starts = random_steps(x, radius, norm, 1, None)
        ascend(objective, x, radius, starts, norm, steps, None, step_size)
    return torch.cat(visited)


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """A point a method and ε: columns dataset, method, label, norm, eps, accuracy, low, high, seeds. Means over seeds,
    with :func:`experiments.mean_interval` (none of one network), cut to [0, 1]."""
    by = ["dataset", "method", "label", "norm", "eps"]
    rows = []
    for key, part in frame.groupby(by, sort=False):
        interval = mean_interval(part.accuracy.to_numpy(), held_images(part).mean(0))
        rows.append((*key, *np.clip(interval, 0, 1), len(part)))  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*by, "accuracy", "low", "high", "seeds"])


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in % at the ε (L2) of the paper's Table 2, mean ± standard deviation over seeds.
    ``frame``: a table of curves."""
    rows = []
    for label, part in frame[frame.norm == "l2"].groupby("label", sort=False):
        row = {"net": str(label)}
        for eps in (0, *PAPER_EPS):
            accuracy = 100 * part.accuracy[(part.eps - eps).abs() < 1e-9]
            row["clean" if eps == 0 else f"ε = {eps:g}"] = plus_minus(accuracy.mean(), accuracy.std())
        rows.append(row)
    return pd.DataFrame(rows)


def paper_table() -> pd.DataFrame:
    """The paper's Table 2: columns label, eps, accuracy, sd (its standard deviation; both in %)."""
    rows = published("paper table 2").rename(columns={"method": "label", "epsilon": "eps", "mean": "accuracy"})
    return rows[["label", "eps", "accuracy", "sd"]].fillna({"eps": 0})


def masking_frame(
    nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, eps: float, of: Sequence[str] = (), **options
) -> pd.DataFrame:
    """:func:`attacks.masking_checks` of each net, or of those named in ``of``, points of the first other net being
    tried on it: columns net, method, other added."""
    parts = []
    for method in of or nets:
        other = next(name for name in nets if name != method)
        checks = masking_checks(nets[method], (x, y), eps, others={"another net": nets[other]}, **options)
        parts.append(checks.assign(net=LABEL[method], method=method, other=LABEL[other]))
    return pd.concat(parts, ignore_index=True)


def masking_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a check, a column a net: the other attack's accuracy or the share, in %, and ✓ or ✗."""
    frame = frame.assign(check=frame.check.str.removeprefix("share of "))  # the heading says it
    percent = lambda shares: (100 * shares).map("{:.1f}".format)
    frame["shown"] = percent(frame.value) + frame.passed.map({True: " ✓", False: " ✗"}).fillna("")
    table = frame.pivot(index="check", columns="net", values="shown").loc[frame.check.unique(), frame.net.unique()]
    checked = percent(frame.groupby("net").standard.first()).to_frame("PGD, 20 steps (what is checked)").T
    table = pd.concat([checked[table.columns], table]).rename_axis(columns=None)
    return table.reset_index(names="accuracy left, or share, in %")
