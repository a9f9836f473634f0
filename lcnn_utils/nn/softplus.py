"""Softplus, centred so that 0 stays 0: the activation of low-curvature networks (paper §3.3).

    s₀(x; β) = (log(1 + e^{βx}) − log 2) / β        s₀' = σ(βx)        s₀'' = β σ(βx) σ(−βx) ≤ β/4

It is 1-Lipschitz, s₀(0) = 0, and it runs from x/2 (β → 0) to ReLU (β → ∞).
Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

BETA_RANGE = (1e-8, 1e8)  # of a layer: in float32 these are x/2 and the ReLU
FAR = 1e20  # the capped unit is constant there
FAST_FROM = 0.05  # smallest β of the fast form, which cancels where β is small
PIECE = 2**16  # numbers of a tensor that a thread works on at a time: 256 KiB, which fit into its cache
LOG_HALF = torch.tensor(0.5).log()
# Above this β the fast form cuts |βx| off at 30. e^−30 is 0 to its precision, and the subnormal numbers that come of
# smaller ones take a processor a hundred times as long.
STEEP, CUT = 10.0, 30.0


def eager_cpu(x: Tensor) -> bool:
    """Whether fused CPU kernels with one derivative may compute with x: no compiler, tracer, torch.func or forward
    mode is at work, which need every operation written out."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and not traced and forward_ad._current_level < 0


def _bend(x: Tensor, beta: Tensor) -> Tensor:
    """s₀ less the ReLU, log((1 + e^{−β|x|})/2)/β, in a form that neither overflows nor cancels."""
    return torch.log1p(torch.expm1(-beta * x.abs()) / 2) / beta


def _value(x: Tensor, beta: Tensor, cap: float | None) -> Tensor:
    """s₀(x), or s₀(x) − s₀(x − cap) + s₀(−cap) with the ReLUs of its three terms put together."""
    if cap is None:
        return x.relu() + _bend(x, beta)
    return x.clamp(0, cap) + (_bend(x, beta) - _bend(x - cap, beta) + _bend(x.new_tensor(cap), beta))


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


@contextlib.contextmanager
def _tangents_of_outer_levels(ctx: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The saved (x, β) within a ``jvp``: torch stops all forward-mode derivatives there, this one's level only here.

    Without that a derivative of the derivative, as in jacfwd(jacfwd(f)), would silently be 0.
    """
    x, beta = (forward_ad.unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors)
    with forward_ad._set_fwd_grad_enabled(True):
        yield x, beta


class _Closed(torch.autograd.Function):
    """A function of (x, β) whose two partial derivatives are given in closed form (β may broadcast against x).

    torch.compile traces this class; the forward-mode derivative, which it can't trace, is added by a subclass.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.cap = inputs[2] if len(inputs) > 2 else None


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
        with _tangents_of_outer_levels(ctx) as (x, beta):
            return _bump(x, beta) * (beta * dx + x * dbeta)


def _slope(x: Tensor, beta: Tensor) -> Tensor:
    return (_Slope if torch.compiler.is_compiling() else _SlopeForwardMode).apply(x, beta)


def _slope_in_x(x: Tensor, beta: Tensor, cap: float | None) -> Tensor:
    return _slope(x, beta) if cap is None else _slope(x, beta) - _slope(x - cap, beta)


def _slope_in_beta(x: Tensor, beta: Tensor, cap: float | None) -> Tensor:
    own = _beta_slope(x, beta)
    return own if cap is None else own - _beta_slope(x - cap, beta) + _beta_slope(x.new_tensor(cap), beta)


class _CenteredSoftplus(_Closed):
    @staticmethod
    def forward(x: Tensor, beta: Tensor, cap: float | None) -> Tensor:
        return _value(x, beta, cap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, beta = ctx.saved_tensors
        return (
            (grad * _slope_in_x(x, beta, ctx.cap)).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None,
            (grad * _slope_in_beta(x, beta, ctx.cap)).sum_to_size(beta.shape) if ctx.needs_input_grad[1] else None,
            None,
        )


class _CenteredSoftplusForwardMode(_CenteredSoftplus):
    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dbeta: Tensor, _: None) -> Tensor:
        with _tangents_of_outer_levels(ctx) as (x, beta):
            return _slope_in_x(x, beta, ctx.cap) * dx + _slope_in_beta(x, beta, ctx.cap) * dbeta


def _pieces(*tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """Matching pieces of tensors of one shape and layout, as views of one dimension: several passes over a piece that
    is in the cache cost hardly more than one over the whole."""
    last = not tensors[0].is_contiguous()
    rows = [(t.permute(0, 2, 3, 1) if last else t).view(-1) for t in tensors]
    size = PIECE * torch.get_num_threads()
    return [rows] if len(rows[0]) <= size else zip(*(row.split(size) for row in rows), strict=True)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the layout of the first: NHWC if it is that, else contiguous."""
    last = tensors[0].is_contiguous(memory_format=torch.channels_last)
    return [t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) for t in tensors]


class _FastSlope(torch.autograd.Function):
    """(g, x, log β) ↦ g σ(βx) with its own first derivatives, for penalties on gradients."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, log_beta: Tensor, beta: float) -> Tensor:
        near = x.clamp(-CUT / beta, CUT / beta) if beta > STEEP else x
        ctx.save_for_backward(grad, near)
        ctx.beta = beta
        return torch.ops.aten.softplus_backward(grad, near, beta, 20)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        grad, x = ctx.saved_tensors
        slope = (ctx.beta * x).sigmoid_()
        by_x = torch.ops.aten.sigmoid_backward(h * grad, slope).mul_(ctx.beta)  # h g βσ(1 − σ)
        return slope * h, by_x, (by_x * x).sum() if ctx.needs_input_grad[2] else None, None


class _FastCenteredSoftplus(torch.autograd.Function):
    """s₀ as a layer of an LCNN is trained: float32 on a CPU, β ≥ ``FAST_FROM`` as a number too.

    Off by a few units in the last place, the value of 1/β + |x|, the slope in x of 1, its own slope of β, and the
    gradient in log β, which is Σ g (x σ(βx) − s₀) over the layer, of Σ |g| (1/β + |x|), its parts before they cancel.
    Third derivatives are refused: ``centered_softplus`` has them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_beta: Tensor, beta: float) -> Tensor:
        (dense,) = _laid_out(x)
        y = torch.empty_like(dense)
        for a, out in _pieces(dense, y):  # relu(x) + log((1 + e^{−β|x|})/2)/β
            torch.sub(LOG_HALF, torch.abs(a, out=out), alpha=beta, out=out)
            (out.clamp_(-CUT) if beta > STEEP else out).exp_().add_(0.5).log_()
            torch.add(a.relu(), out, alpha=1 / beta, out=out)
        ctx.save_for_backward(x, log_beta, y)
        ctx.beta = beta
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, log_beta, y = ctx.saved_tensors
        batched = torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)
        if batched or torch.is_grad_enabled():  # many at once (a vectorised jacobian), or a graph is asked for
            if batched:
                by_x = grad * torch.sigmoid(beta_of(log_beta) * x)
            else:
                by_x = _FastSlope.apply(grad, x, log_beta, ctx.beta)
            return by_x, (by_x * x - grad * y).sum() if ctx.needs_input_grad[1] else None, None
        x, grad, y = _laid_out(x, grad, y)
        by_x, by_log_beta, far = torch.empty_like(x), None, CUT / ctx.beta
        for a, g, value, out in _pieces(x, grad, y, by_x):
            near = torch.clamp(a, -far, far, out=out) if ctx.beta > STEEP else a
            torch.ops.aten.softplus_backward.grad_input(g, near, ctx.beta, 20, grad_input=out)  # g σ(βx)
            if ctx.needs_input_grad[1]:
                part = torch.dot(out, a).sub_(torch.dot(g, value))
                by_log_beta = part if by_log_beta is None else by_log_beta.add_(part)
        return by_x, by_log_beta, None


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


def centered_softplus(x: Tensor, beta: float | Tensor, cap: float | None = None) -> Tensor:
    """s₀(x; β) = (log(1 + e^{βx}) − log 2)/β, elementwise, in the shape and dtype of ``x``.

    For β from 1e-4 to 1e4 and |x| to 1e4 the value and its first derivative in β are exact to a few units in the last
    place of the dtype, the first and second derivatives in x to a few times 1 + |βx| units: the rounding of βx alone
    moves e^{−|βx|} by that much. Where σ(−|βx|) is below the smallest normal number (|βx| > 87 in float32) it may count
    as 0. float16 and bfloat16 are computed in float32 and rounded once. Derivatives may be nested, in every mode.

    Args:
        x: any shape, floating.
        beta: sharpness β > 0, unit 1/x: a number, or a tensor that broadcasts against ``x`` (where it is not
            positive the result is NaN, so that no GPU synchronisation is needed to check it).
        cap: None, or the ceiling c > 0 of a ReLU6-like unit, s₀(x) − s₀(x − c) + s₀(−c), which is exact to a few units
            in the last place of 1/β + c.

    Raises:
        ValueError: β or the cap is a number and not finite and positive.
        TypeError: ``x`` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"centered_softplus needs a floating tensor, got {x.dtype}: call x.float() first")
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if isinstance(beta, Tensor):
        beta = torch.where(beta > 0, beta, torch.nan).to(dtype)
    else:
        beta = torch.tensor(check_beta(beta), dtype=dtype, device=x.device)
    if torch.compiler.is_compiling() and beta.ndim == 0 and x.ndim == 4:
        beta = beta.expand(1, x.shape[1], 1, 1)  # so its gradient is summed along with BatchNorm's
    wide = x.to(dtype) if check_cap(cap) is None else x.to(dtype).clamp(-FAR, FAR)
    function = _CenteredSoftplus if torch.compiler.is_compiling() else _CenteredSoftplusForwardMode
    return function.apply(wide, beta, cap).to(x.dtype)


def beta_of(log_beta: Tensor) -> Tensor:
    """β = e^{log β}, kept within ``BETA_RANGE``; at its ends the gradient goes on, so that β can come back."""
    log_beta = log_beta.to(torch.promote_types(log_beta.dtype, torch.float32))
    low, high = (math.log(end) for end in BETA_RANGE)
    return (log_beta.detach().clamp(low, high) + (log_beta - log_beta.detach())).exp()


@fx.wrap
def _activation(x: Tensor, log_beta: Tensor, cap: float | None) -> Tensor:
    """What :class:`CenteredSoftplus` computes: one node of a graph that torch.fx traces."""
    if cap is None and x.dtype == log_beta.dtype == torch.float32 and eager_cpu(x):
        beta = min(max(math.exp(min(log_beta.item(), 99.0)), BETA_RANGE[0]), BETA_RANGE[1])
        if beta >= FAST_FROM:
            return _FastCenteredSoftplus.apply(x, log_beta, beta)
    return centered_softplus(x, beta_of(log_beta), cap)


class CenteredSoftplus(nn.Module):
    """Centered softplus with one β for the layer, kept positive as e^{log β} (paper §3.3; start β = 5).

    β stays within ``BETA_RANGE``, whatever training does to log β.

    Args:
        beta: starting sharpness.
        trainable: whether β is learned (LCNN) or fixed (β = 1000 is the paper's "Standard", nearly a ReLU).
        cap: ``None``, or the ceiling of a ReLU6-like unit: s₀(x) − s₀(x − cap) + s₀(−cap), which has the same three
            properties (0 stays 0, 1-Lipschitz, curvature ≤ β/4) and tends to min(max(x, 0), cap).

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
        return f"beta={self.beta.item():.4g}, trainable={isinstance(self.log_beta, nn.Parameter)}" + (
            "" if self.cap is None else f", cap={self.cap}"
        )


def _log_of(beta: float | Tensor) -> float:
    low, high = BETA_RANGE
    if not low <= check_beta(beta) <= high:
        raise ValueError(f"beta={beta}: a layer keeps its β from {low:g} (x/2 in float32) to {high:g} (ReLU)")
    return math.log(beta)
