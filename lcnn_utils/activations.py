"""Softplus, centred so that 0 stays 0: the activation of low-curvature networks (paper §3.1).

    s₀(x; β) = (log(1 + e^{βx}) − log 2) / β        s₀' = σ(βx)        s₀'' = β σ(βx) σ(−βx) ≤ β/4

It is 1-Lipschitz, s₀(0) = 0, and it runs from x/2 (β → 0) to ReLU (β → ∞).
Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn


def _value(x: Tensor, beta: Tensor) -> Tensor:
    """The one expression: with u = −β|x| ≤ 0, log((1+eᵘ)/2) = log1p(expm1(u)/2) neither overflows nor cancels."""
    return x.relu() + torch.log1p(torch.expm1(-beta * x.abs()) / 2) / beta


def _bump(x: Tensor, beta: Tensor) -> Tensor:
    """σ(t)σ(−t) with t = βx; autograd's σ(1−σ) would round to 0 for t > 17 in float32."""
    return torch.sigmoid(beta * x) * torch.sigmoid(-beta * x)


def _beta_slope(x: Tensor, beta: Tensor) -> Tensor:
    """∂s₀/∂β = (t σ(t) − log((1+eᵗ)/2))/β², even in t = βx; near 0, where that cancels, as (t h + log(1 − h²))/2β²."""
    t = (beta * x).abs()
    h = torch.tanh(t.clamp(max=2) / 2)
    near = (t * h + torch.log1p(-h * h)) / 2
    far = -t * torch.sigmoid(-t) - torch.log1p(torch.expm1(-t) / 2)
    return torch.where(t < 2, near, far) / beta**2


class _Closed(torch.autograd.Function):
    """A function of (x, β) whose two partial derivatives are given in closed form (β may broadcast against x).

    torch.compile traces this class; the forward-mode derivative, which it can't trace, is added by ``_forward_mode``.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Slope(_Closed):
    """σ(βx), the slope of s₀."""

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, beta = ctx.saved_tensors
        bump = grad * _bump(x, beta)
        return (
            (bump * beta).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None,
            (bump * x).sum_to_size(beta.shape) if ctx.needs_input_grad[1] else None,
        )


class _SlopeForwardMode(_Slope):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dbeta: Tensor) -> Tensor:
        x, beta = ctx.saved_tensors
        return _bump(x, beta) * (beta * dx + x * dbeta)


class _CenteredSoftplus(_Closed):
    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return _value(x, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, beta = ctx.saved_tensors
        return (
            (grad * _slope(x, beta)).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None,
            (grad * _beta_slope(x, beta)).sum_to_size(beta.shape) if ctx.needs_input_grad[1] else None,
        )


class _CenteredSoftplusForwardMode(_CenteredSoftplus):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dbeta: Tensor) -> Tensor:
        x, beta = ctx.saved_tensors
        return _slope(x, beta) * dx + _beta_slope(x, beta) * dbeta


def _slope(x: Tensor, beta: Tensor) -> Tensor:
    return (_Slope if torch.compiler.is_compiling() else _SlopeForwardMode).apply(x, beta)


def check_beta(beta: float) -> float:
    """Return ``beta`` if it is a finite positive number, otherwise raise a ValueError that says what to do."""
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta must be a finite number > 0, got {beta}: use e.g. 1e-3 for nearly linear, 1e3 for ReLU")
    return float(beta)


def centered_softplus(x: Tensor, beta: float | Tensor) -> Tensor:
    """s₀(x; β) = (log(1 + e^{βx}) − log 2)/β, elementwise, in the shape and dtype of ``x``.

    Exact to a few units in the last place for β from 1e-4 to 1e4 and |x| to 1e4, in every floating dtype (float16 and
    bfloat16 are computed in float32), and so are its first and second derivatives in x and the first in β.

    Args:
        x: any shape, floating.
        beta: sharpness β > 0, unit 1/x: a number, or a tensor that broadcasts against ``x`` (where it is not
            positive the result is NaN, so that no GPU synchronisation is needed to check it).

    Raises:
        ValueError: β is a number and not finite and positive.
        TypeError: ``x`` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"centered_softplus needs a floating tensor, got {x.dtype}: call x.float() first")
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if isinstance(beta, Tensor):
        beta = torch.where(beta > 0, beta, torch.nan).to(dtype)
    else:
        beta = torch.tensor(check_beta(beta), dtype=dtype, device=x.device)
    function = _CenteredSoftplus if torch.compiler.is_compiling() else _CenteredSoftplusForwardMode
    return function.apply(x.to(dtype), beta).to(x.dtype)


class CenteredSoftplus(nn.Module):
    """Centered softplus with one β for the layer, kept positive as e^{log β} (paper §3.1; start β = 5).

    Args:
        beta: starting sharpness.
        trainable: whether β is learned (LCNN) or fixed (β = 1000 is the paper's "Standard", nearly a ReLU).
        cap: ``None``, or the ceiling of a ReLU6-like unit: s₀(x) − s₀(x − cap) + s₀(−cap), which has the same three
            properties (0 stays 0, 1-Lipschitz, curvature ≤ β/4) and tends to min(max(x, 0), cap).

    Raises:
        ValueError: β is not finite and positive.
    """

    log_beta: Tensor

    def __init__(self, beta: float = 5.0, trainable: bool = True, cap: float | None = None) -> None:
        super().__init__()
        log_beta = torch.tensor(math.log(check_beta(beta)))
        if trainable:
            self.log_beta = nn.Parameter(log_beta)
        else:
            self.register_buffer("log_beta", log_beta)
        self.cap = cap

    @property
    def beta(self) -> Tensor:
        """The sharpness β, a scalar tensor; assign a number to change it."""
        return self.log_beta.exp()

    @beta.setter
    def beta(self, value: float) -> None:
        with torch.no_grad():
            self.log_beta.fill_(math.log(check_beta(value)))

    def forward(self, x: Tensor) -> Tensor:
        beta = self.beta
        if self.cap is None:
            return centered_softplus(x, beta)
        cap = torch.full((), -self.cap, dtype=x.dtype, device=x.device)
        return centered_softplus(x, beta) - centered_softplus(x - self.cap, beta) + centered_softplus(cap, beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta.item():.4g}, trainable={isinstance(self.log_beta, nn.Parameter)}" + (
            "" if self.cap is None else f", cap={self.cap}"
        )
