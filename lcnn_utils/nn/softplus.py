"""Softplus, centred so that 0 stays 0: the activation of low-curvature networks (paper §3.3).

    s₀(x; β) = (log(1 + e^{βx}) − log 2) / β        s₀' = σ(βx)        s₀'' = β σ(βx) σ(−βx) ≤ β/4

It is 1-Lipschitz, s₀(0) = 0, and it runs from x/2 (β → 0) to ReLU (β → ∞).
Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

BETA_RANGE = (1e-8, 1e8)  # of a layer: in float32 these are x/2 and the ReLU
FUSED_FROM = 0.05  # smallest β of the fused form, which cancels where β is small
CUT = 40.0  # e^−40 is 0 beside 1 in float64


def check_beta(beta: float | Tensor) -> float:
    """Return ``beta`` if it is a finite positive number, otherwise raise a ValueError that says what to do."""
    number = beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 < number < math.inf:
        raise ValueError(f"beta must be a finite number > 0, got {beta}: use e.g. 1e-3 for nearly linear, 1e3 for ReLU")
    return float(number)


def check_cap(cap: float | None) -> float | None:
    """Return ``cap`` if it is None or a finite positive number, otherwise raise a ValueError."""
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"cap must be a finite number > 0, or None for no cap, got {cap}: ReLU6 has 6.0")
    return cap


def _centered(x: Tensor, beta: Tensor) -> Tensor:
    """s₀ in two forms of the same function, each with derivatives of every order that neither overflow nor cancel.

    With t = βx: where |t| < 2, x/2 + log cosh(t/2)/β = x/2 − log(1 − tanh²(t/2))/2β; beyond, the ReLU plus a bend.
    """
    t = beta * x
    h = torch.tanh(t.clamp(-2, 2) / 2)
    near = x / 2 - torch.log1p(-h * h) / (2 * beta)
    far = torch.where(t > 0, x, 0) + torch.log((1 + torch.exp(-t.abs())) / 2) / beta
    return torch.where(t.abs() < 2, near, far)


def centered_softplus(x: Tensor, beta: float | Tensor, cap: float | None = None) -> Tensor:
    """s₀(x; β) = (log(1 + e^{βx}) − log 2)/β, elementwise, in the shape and dtype of ``x``.

    For β from 1e-4 to 1e4 and |x| to 1e4 the value and its first derivative in β are exact to a few units in the last
    place of the dtype, the first and second derivatives in x to a few times 1 + |βx| units: the rounding of βx alone
    moves e^{−|βx|} by that much. float16 and bfloat16 are computed in float32 and rounded once. Derivatives may be
    nested, in every mode.

    Args:
        x: any shape, floating.
        beta: sharpness β > 0, unit 1/x: a number, or a tensor that broadcasts against ``x`` (where it is not
            positive the result is NaN, so that no GPU synchronisation is needed to check it).
        cap: None, or the ceiling c > 0 of a ReLU6-like unit, s₀(x) − s₀(x − c) + s₀(−c), which is exact to a few units
            in the last place of 40/β + c and has slope 0 from there on.

    Raises:
        ValueError: β or the cap is a number and not finite and positive.
        TypeError: ``x`` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"centered_softplus needs a floating tensor, got {x.dtype}: call x.float() first")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(beta, Tensor):
        beta = torch.where(beta > 0, beta, torch.nan).to(wide.dtype)
    else:
        beta = torch.tensor(check_beta(beta), dtype=wide.dtype, device=x.device)
    if check_cap(cap) is None:
        return _centered(wide, beta).to(x.dtype)
    reach = CUT / beta.detach()
    wide = torch.clamp(wide, -reach, cap + reach)
    return (_centered(wide, beta) - _centered(wide - cap, beta) + _centered(wide.new_tensor(-cap), beta)).to(x.dtype)


def beta_of(log_beta: Tensor) -> Tensor:
    """β = e^{log β}, kept within ``BETA_RANGE``; at its ends the gradient goes on, so that β can come back."""
    log_beta = log_beta.to(torch.promote_types(log_beta.dtype, torch.float32))
    low, high = (math.log(end) for end in BETA_RANGE)
    return (log_beta.detach().clamp(low, high) + (log_beta - log_beta.detach())).exp()


def eager() -> bool:
    """Whether nothing is at work that needs every operation written out: compiler, tracer, torch.func, forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _OneBeta(torch.autograd.Function):
    """s₀ as a layer computes it: x in float32 or wider, one β, which it keeps in memory instead of ten steps between.

    The gradient in log β, Σ g (x σ(βx) − s₀), is exact to a few units in the last place of Σ |g| (1/β + |x|); from
    ``FUSED_FROM`` on, on a CPU, by torch's own softplus, the value is to those of 1/β + |x|.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_beta: Tensor) -> Tensor:
        beta = beta_of(log_beta).to(x.dtype)
        ctx.beta = beta.item() if x.is_cpu else 0.0  # a number costs no time there
        if ctx.beta >= FUSED_FROM:
            near = _near(x, ctx.beta)
            y = F.softplus(near, ctx.beta, CUT + 1).sub_(math.log(2) / ctx.beta)
            y = y if near is x else y.add_((x - near).relu_())
        else:
            y = _centered(x, beta)
        ctx.save_for_backward(x, log_beta, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, log_beta, y = ctx.saved_tensors
        if ctx.beta >= FUSED_FROM and not torch.is_grad_enabled():
            by_x = torch.ops.aten.softplus_backward(grad, _near(x, ctx.beta), ctx.beta, CUT + 1)
        else:  # has derivatives itself
            by_x = grad * torch.sigmoid(beta_of(log_beta).to(x.dtype) * x)
        by_log_beta = (_dot(by_x, x) - _dot(grad, y)).to(log_beta.dtype) if ctx.needs_input_grad[1] else None
        return by_x, by_log_beta


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ ab, in one pass where both lie in memory alike."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


def _near(x: Tensor, beta: float) -> Tensor:
    """x for torch's softplus: where β is large, without |βx| > CUT, which takes a processor ten times as long."""
    return x.clamp(-CUT / beta, CUT / beta) if beta > 10 else x


@fx.wrap
def _activation(x: Tensor, log_beta: Tensor, cap: float | None) -> Tensor:
    """What :class:`CenteredSoftplus` computes: one node of a graph that torch.fx traces."""
    if cap is None and eager():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return _OneBeta.apply(wide, log_beta).to(x.dtype)
    beta = beta_of(log_beta)
    if torch.compiler.is_compiling() and x.ndim == 4:
        beta = beta.expand(1, x.shape[1], 1, 1)  # so its gradient is summed along with BatchNorm's
    return centered_softplus(x, beta, cap)


class CenteredSoftplus(nn.Module):
    """Centered softplus with one β for the layer, kept positive as e^{log β} (paper §3.3; start β = 5).

    β stays within ``BETA_RANGE``, whatever training does to log β.

    Args:
        beta: starting sharpness.
        trainable: whether β is learned (LCNN) or fixed (β = 1000 is the paper's "Standard", nearly a ReLU).
        cap: None, or the ceiling of a ReLU6-like unit: see :func:`centered_softplus`.

    Raises:
        ValueError: β is outside ``BETA_RANGE``, or the cap is not finite and positive.
    """

    log_beta: Tensor

    def __init__(self, beta: float = 5.0, trainable: bool = True, cap: float | None = None) -> None:
        super().__init__()
        log_beta = torch.tensor(_log_of(beta))
        if trainable:
            self.log_beta = nn.Parameter(log_beta)
        else:
            self.register_buffer("log_beta", log_beta)
        self.cap = check_cap(cap)

    @property
    def beta(self) -> Tensor:
        """The sharpness β, a scalar tensor; assign a number to change it."""
        return beta_of(self.log_beta)

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        with torch.no_grad():
            self.log_beta.fill_(_log_of(value))

    def forward(self, x: Tensor) -> Tensor:
        return _activation(x, self.log_beta, self.cap)

    def extra_repr(self) -> str:
        trainable = isinstance(self.log_beta, nn.Parameter)
        return f"beta={self.beta.item():.4g}, trainable={trainable}" + (f", cap={self.cap}" if self.cap else "")


def _log_of(beta: float | Tensor) -> float:
    low, high = BETA_RANGE
    if not low <= check_beta(beta) <= high:
        raise ValueError(f"beta={beta}: a layer keeps its β from {low:g} (x/2 in float32) to {high:g} (ReLU)")
    return math.log(beta)
