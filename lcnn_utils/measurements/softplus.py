"""The measurements of notebook 01: activations, their derivatives and their compositions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..nn import centered_softplus


def activation_frame(betas: Iterable[float], x: Tensor) -> pd.DataFrame:
    """ReLU and both softplus, with derivatives: columns x, activation, beta, value, slope, curvature."""
    x = x.double()
    step, zero = (x > 0).double(), torch.zeros_like(x)
    rows = [dict(activation="relu", beta=np.nan, value=x.relu(), slope=step, curvature=zero)]
    for beta in betas:
        centered = centered_softplus(x, beta)
        slope = torch.sigmoid(beta * x)
        shared = dict(beta=beta, slope=slope, curvature=beta * slope * torch.sigmoid(-beta * x))
        rows.append(dict(activation="centered", value=centered, **shared))
        rows.append(dict(activation="softplus", value=centered + np.log(2) / beta, **shared))
    return pd.concat([pd.DataFrame({"x": x} | row) for row in rows], ignore_index=True)


def composition(x: Tensor, beta: float, depth: int) -> tuple[Tensor, Tensor]:
    """Softplus and centered softplus composed ``depth`` times; notebook 01 has their closed forms."""
    plain = centered = x.double()
    for _ in range(depth):
        plain = centered_softplus(plain, beta) + np.log(2) / beta
        centered = centered_softplus(centered, beta)
    return plain, centered


def composition_frame(betas: Iterable[float], depths: Iterable[int], x: Tensor) -> pd.DataFrame:
    """Columns x, activation, beta, depth, value; see :func:`composition`."""
    parts = []
    for beta, depth in itertools.product(betas, depths):
        for name, value in zip(("softplus", "centered"), composition(x, beta, depth), strict=True):
            parts.append(pd.DataFrame({"x": x, "activation": name, "beta": beta, "depth": depth, "value": value}))
    return pd.concat(parts, ignore_index=True)


def normalised_curvature_frame(betas: Iterable[float], points: Sequence[float]) -> pd.DataFrame:
    """s₀″/s₀′ = β(1 − σ(βx)): columns x, beta, normalised."""
    rows = [(x, beta, beta * torch.sigmoid(torch.tensor(-beta * x)).item()) for x in points for beta in betas]
    return pd.DataFrame(rows, columns=["x", "beta", "normalised"])
