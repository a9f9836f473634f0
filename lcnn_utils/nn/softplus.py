"""Softplus, centred so that 0 stays 0: the activation of low-curvature networks (paper §3.3).

    s₀(x; β) = (log(1 + e^{βx}) − log 2) / β        s₀' = σ(βx)        s₀'' = β σ(βx) σ(−βx) ≤ β/4

It is 1-Lipschitz, s₀(0) = 0, and it runs from x/2 (β → 0) to ReLU (β → ∞).
Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

BETA_RANGE = (1e-8, 1e8)  # of a layer: in float32 these are x/2 and the ReLU
FUSED_FROM = {torch.float32: 0.05, torch.bfloat16: 0.5}  # smallest β of the fused form, which cancels below
STEEP = 10.0  # above, |βx| is cut off: for subnormal and infinite numbers a processor takes longer


def check_positive(value: float | Tensor | None, name: str) -> float:
    """``value`` as a number if it is finite and positive, otherwise a ValueError that says what ``name`` should be."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return float(number)


def wide(t: Tensor) -> Tensor:
    """t in float32 or wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _centered(x: Tensor, beta: Tensor) -> Tensor:
    """s₀ in two forms whose derivatives neither overflow nor cancel: with t = βx, x/2 + log cosh(t/2)/β =
    x/2 − log(1 − tanh²(t/2))/2β where |t| < 2, and beyond, the ReLU plus a bend."""
    t = beta * x
    h = torch.tanh(t.clamp(-2, 2) / 2)
    near = x / 2 - torch.log1p(-h * h) / (2 * beta)
    far = torch.where(t > 0, x, 0) + torch.log((1 + torch.exp(-t.abs())) / 2) / beta
    return torch.where(t.abs() < 2, near, far)


def centered_softplus(x: Tensor, beta: float | Tensor, cap: float | None = None) -> Tensor:
    """s₀(x; β) = (log(1 + e^{βx}) − log 2)/β, elementwise, in the shape and dtype of ``x`` (any shape, floating).

    Exact to a few units in the last place for β from 1e-4 to 1e4 and |x| to 1e4, so are its derivatives; they may be
    nested in every mode. ``beta`` (unit 1/x) is a number or a tensor that broadcasts against ``x``, NaN where not
    positive. ``cap`` is the ceiling c > 0 of a ReLU6-like unit, s₀(x) − s₀(x − c) + s₀(−c), flat beyond 40/β.
    Raises ValueError: β or the cap is a number and not finite and positive. TypeError: ``x`` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"centered_softplus needs a floating tensor, got {x.dtype}: call x.float() first")
    z = wide(x)
    if isinstance(beta, Tensor):
        beta = torch.where(beta > 0, beta, torch.nan).to(z.dtype)
    else:
        beta = z.new_tensor(check_positive(beta, "beta"))
    soft = lambda z: _centered(z, beta)
    return (soft(z) if cap is None else _capped(soft, z, beta, cap)).to(x.dtype)


def _capped(soft: Callable[[Tensor], Tensor], z: Tensor, beta: Tensor, cap: float) -> Tensor:
    """s₀(z) − s₀(z − c) + s₀(−c), of a cap c."""
    reach = 40 / beta.detach()
    z = torch.clamp(z, -reach, check_positive(cap, "cap") + reach)  # beyond, the slope is 0, and infinities give NaN
    return soft(z) - soft(z - cap) + soft(z.new_tensor(-cap))


def beta_of(log_beta: Tensor) -> Tensor:
    """β = e^{log β}, kept within ``BETA_RANGE``; at its ends the gradient goes on, so that β can come back."""
    log_beta = wide(log_beta)
    low, high = (math.log(end) for end in BETA_RANGE)
    return (log_beta.detach().clamp(low, high) + (log_beta - log_beta.detach())).exp()


def eager() -> bool:
    """Whether nothing is at work that needs every operation written out: compiler, tracer, torch.func, forward mode."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ ab, in one pass where both lie in memory alike."""
    a, b = wide(a), wide(b)
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


def _bounded(x: Tensor, beta: float, reach: float = 30.0) -> Tensor:
    """x with |βx| cut off at ``reach`` where β is ``STEEP``."""
    return x.clamp(-reach / beta, reach / beta) if beta > STEEP else x


class _OneBeta(torch.autograd.Function):
    """s₀ as a layer computes it, with one β; keeps x and, of a trained β, one tensor more, not the ten steps between.

    On a CPU in float32 or bfloat16, for β ≥ ``FUSED_FROM``, it takes fewer operations, exact to a few units in the last
    place of 1/β + |x|. The gradient in log β is Σ g (x σ(βx) − s₀). Half precision keeps for it what s₀ was rounded
    from: where x is large, the rounding of x − log 2/β is no chance, but always the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_beta: Tensor) -> Tensor:
        ctx.beta = ctx.offset = 0.0
        if x.is_cpu and x.dtype in FUSED_FROM:  # there a number costs no time
            beta = math.exp(min(max(log_beta.item(), math.log(BETA_RANGE[0])), math.log(BETA_RANGE[1])))
            ctx.beta = beta if beta >= FUSED_FROM[x.dtype] else 0.0
        if ctx.beta:
            soft = F.softplus(_bounded(x, ctx.beta, 18), ctx.beta)  # e^{−18} is lost beside 1
            soft = torch.maximum(soft, x) if ctx.beta > STEEP else soft
            if x.dtype == torch.bfloat16:
                ctx.offset = math.log(2) / ctx.beta
            else:
                soft -= F.softplus(x.new_zeros(()), ctx.beta)  # rounded alike, so that 0 stays 0
        else:
            soft = _centered(wide(x), beta_of(log_beta).to(wide(x).dtype))
        ctx.save_for_backward(x, log_beta, soft if ctx.needs_input_grad[1] else None)
        return soft - ctx.offset if ctx.offset else soft.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        (x, log_beta, soft), offset = ctx.saved_tensors, ctx.offset
        near, graph = _bounded(x, ctx.beta), torch.is_grad_enabled()  # a graph of the gradient may be asked for
        if ctx.beta and not graph:
            by_x = torch.ops.aten.softplus_backward(grad, near, ctx.beta, 20)
        else:
            by_x = (grad * torch.sigmoid(beta_of(log_beta).to(wide(x).dtype) * wide(near))).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return by_x, None
        if graph and x.dtype != wide(x).dtype:  # what was kept is not the output, and has no graph
            soft, offset = _centered(wide(x), beta_of(log_beta).to(wide(x).dtype)), 0.0
        if ctx.offset and ctx.beta <= STEEP and not graph:  # beyond, the products' rounding is all that is left
            by_log_beta = torch.addcmul(by_x * x, grad, soft, value=-1).sum(dtype=torch.float32)
        else:
            by_log_beta = _dot(by_x, x) - _dot(grad, soft)
        if offset:
            by_log_beta += offset * grad.sum(dtype=wide(grad).dtype)
        return by_x, by_log_beta.to(log_beta.dtype)


@fx.wrap
def _activation(x: Tensor, log_beta: Tensor, cap: float | None) -> Tensor:
    """What :class:`CenteredSoftplus` computes: one node of a graph that torch.fx traces."""
    if eager():
        soft = lambda z: _OneBeta.apply(z, log_beta)
        return soft(x) if cap is None else _capped(soft, wide(x), beta_of(log_beta), cap).to(x.dtype)
    beta = beta_of(log_beta)
    if torch.compiler.is_compiling() and x.ndim == 4:
        beta = beta.expand(1, x.shape[1], 1, 1)  # so its gradient is summed along with BatchNorm's
    return centered_softplus(x, beta, cap)


class CenteredSoftplus(nn.Module):
    """Centered softplus with one β for the layer, stored as log β and kept within ``BETA_RANGE`` (paper §3.3).

    ``trainable``: β is learned (LCNN) or fixed (1000 is the paper's "Standard", nearly a ReLU). ``cap`` as in
    :func:`centered_softplus`. Raises ValueError: β outside ``BETA_RANGE``, or a cap that is not finite and positive.
    """

    log_beta: Tensor

    def __init__(self, beta: float = 5.0, trainable: bool = True, cap: float | None = None) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(torch.zeros(())) if trainable else nn.Buffer(torch.zeros(()))
        self.beta = beta
        self.cap = None if cap is None else check_positive(cap, "cap")

    @property
    def beta(self) -> Tensor:
        """The sharpness β, a scalar tensor; assign a number to change it."""
        return beta_of(self.log_beta)

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        low, high = BETA_RANGE
        if not low <= (number := check_positive(value, "beta")) <= high:
            raise ValueError(f"beta={value}: a layer keeps its β from {low:g} (x/2 in float32) to {high:g} (ReLU)")
        self.log_beta.data.fill_(math.log(number))

    def forward(self, x: Tensor) -> Tensor:
        return _activation(x, self.log_beta, self.cap)

    def extra_repr(self) -> str:
        return f"beta={self.beta.item():.4g}, trainable={isinstance(self.log_beta, nn.Parameter)}, cap={self.cap}"
