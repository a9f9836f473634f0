"""The checks of notebook 04; see :mod:`lcnn_utils.exercises.engine`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .engine import randn, verdict

__all__ = ["batchnorm_slopes", "block_bound", "power_step"]


def _conv(seed: int, c_in: int, c_out: int, kernel: int, stride: int, bias: bool = False) -> nn.Conv2d:
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, kernel, stride, kernel // 2, bias=bias, dtype=torch.float64)
    conv.weight.data = randn(seed, *conv.weight.shape)
    if conv.bias is not None:
        conv.bias.data = randn(seed + 1, c_out)
    return conv.requires_grad_(False)


def power_step(f: Callable) -> bool | None:
    """f(conv, x) → one step of power iteration, AᵀAx / ‖AᵀAx‖₂, with x and the result of shape (1, C, H, W). A is the
    linear map of the nn.Conv2d without its bias; any stride. Solution: ``lcnn_utils.nn.spectral_norm._iterate``."""
    unit = lambda x: x / x.norm()
    forward = lambda conv, x: F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    adjoint = lambda conv, y, x: conv2d_input(x.shape, conv.weight, y, conv.stride, conv.padding)
    transposed = lambda conv, y: F.conv_transpose2d(y, conv.weight, None, conv.stride, conv.padding)
    truth = lambda conv, x: unit(adjoint(conv, forward(conv, x), x))
    fits = lambda conv: conv.stride == (1, 1) and conv.in_channels == conv.out_channels
    mistakes = {
        "the bias belongs to no linear map: F.conv2d(x, conv.weight, …) leaves it out": lambda c, x: unit(
            adjoint(c, c(x), x)
        ),
        "not normalised: divide by the norm": lambda conv, x: adjoint(conv, forward(conv, x), x),
        "this is Ax: the adjoint, Aᵀ, has to follow": lambda conv, x: forward(conv, x),
        "this is Ax, normalised: the adjoint, Aᵀ, has to follow": lambda conv, x: unit(forward(conv, x)),
        "this is A twice: its adjoint, Aᵀ, is another map": lambda conv, x: (
            unit(forward(conv, forward(conv, x))) if fits(conv) else x[:0]
        ),
        "each sample is not one vector per pixel: take the norm of everything": lambda conv, x: F.normalize(
            adjoint(conv, forward(conv, x), x)
        ),
        "conv_transpose2d can't know how large the input was at a stride: give it output_padding, or use "
        "torch.nn.grad.conv2d_input": lambda conv, x: unit(transposed(conv, forward(conv, x))),
    }
    settings = [(2, 2, 3, 1, 5), (1, 3, 3, 1, 4), (2, 3, 3, 2, 6), (3, 2, 3, 2, 5), (2, 4, 1, 2, 4), (2, 2, 5, 1, 7)]
    inputs = [(_conv(i, *s[:4]), randn(i + 50, 1, s[0], s[4], s[4])) for i, s in enumerate(settings)]
    inputs.append((_conv(9, 2, 3, 3, 1, bias=True), randn(8, 1, 2, 5, 4)))
    return verdict(power_step, f, inputs, truth, mistakes)


def batchnorm_slopes(f: Callable) -> bool | None:
    """f(var, gamma, eps) → slopes (C,) of a γ-BatchNorm without weights: var (C,) are the channels' variances.
    Each channel is multiplied by 1/σ_c, σ_c² = var_c + eps, but by no more than γ.
    Solution: ``lcnn_utils.nn.batchnorm._slope``."""
    inverse = lambda var, eps: 1 / (var + eps).sqrt()
    truth = lambda var, gamma, eps: inverse(var, eps).clamp(max=gamma)
    mistakes = {
        "this is BatchNorm itself, 1/σ: γ is not used": lambda var, gamma, eps: inverse(var, eps),
        "this is the published rule, where the smallest σ scales down every channel: clip each channel by itself": (
            lambda var, gamma, eps: inverse(var, eps) * min(1.0, gamma / float(inverse(var, eps).max()))
        ),
        "γ limits the slope 1/σ, not σ": lambda var, gamma, eps: 1 / (var + eps).sqrt().clamp(max=gamma),
        "this is σ, cut off at γ: the slope is 1/σ": lambda var, gamma, eps: (var + eps).sqrt().clamp(max=gamma),
        "the other way round: no slope may be *above* γ": lambda var, gamma, eps: inverse(var, eps).clamp(min=gamma),
        "σ is the square root of the variance": lambda var, gamma, eps: (1 / (var + eps)).clamp(max=gamma),
        "eps is added to the variance: without it a dead channel divides by 0": lambda var, gamma, eps: inverse(
            var, 0
        ).clamp(max=gamma),
        "eps is added to the variance, under the root": lambda var, gamma, eps: (1 / (var.sqrt() + eps)).clamp(
            max=gamma
        ),
    }
    variances = [torch.tensor([16, 1, 0.25, 1e-4, 1e-8]).double(), (2 * randn(0, 16)).exp(), (3 * randn(1, 7)).exp()]
    inputs = [(var, gamma, eps) for var in variances for gamma, eps in ((1e4, 1e-2), (3.0, 1e-5), (0.5, 1e-3))]
    return verdict(batchnorm_slopes, f, inputs, truth, mistakes)


def block_bound(f: Callable) -> bool | None:
    """f(branch, shortcut, averaged) → a number no smaller than the block's slope, and attained for some layers.
    branch (n,), shortcut (m,): slopes of the layers, one after another (none at all: the identity). The block is F(x) +
    S(x), or if ``averaged`` (F(x/√2) + S(x/√2))/2. Solution: ``lcnn_utils.nn.AveragedBlock``, its docstring."""
    # of each path the product of its slopes; ``halved`` is what averaging does to their sum
    halved = lambda slope, averaged: slope / (2 * math.sqrt(2) if averaged else 1)
    truth = lambda branch, shortcut, averaged: halved(branch.prod() + shortcut.prod(), averaged)
    total = lambda t: t.sum() if len(t) else torch.ones_like(t.sum())
    mistakes: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {
        "slopes of layers one after another are multiplied": lambda b, s, a: halved(total(b) + total(s), a),
        "an average divides by 2": lambda b, s, a: (b.prod() + s.prod()) / (math.sqrt(2) if a else 1),
        "the input is divided by √2 too": lambda b, s, a: (b.prod() + s.prod()) / (2 if a else 1),
        "both branches see the same x/√2: a factor √2 once, not twice": lambda b, s, a: (
            (b.prod() + s.prod()) / (4 if a else 1)
        ),
        "the shortcut is a path of its own, also when it is the identity (slope 1)": lambda b, s, a: halved(
            b.prod() + (s.prod() if len(s) else 0), a
        ),
        "branches side by side add their slopes": lambda b, s, a: halved(b.prod() * s.prod(), a),
        "true, but not tight: the average of two slopes is at most their larger one": lambda b, s, a: (
            torch.maximum(b.prod(), s.prod()) / math.sqrt(2) if a else b.prod() + s.prod()
        ),
        "too small: two branches may pull the same way, and then their slopes add up": lambda b, s, a: halved(
            torch.maximum(b.prod(), s.prod()), a
        ),
        "orthogonal branches would give this: the bound must hold for all": lambda b, s, a: halved(
            torch.hypot(b.prod(), s.prod()), a
        ),
        "averaged is not used: its block is smaller": lambda b, s, a: b.prod() + s.prod(),
    }
    slopes = [(randn(n, n).exp(), randn(9 + n, m).exp()) for n, m in ((2, 1), (3, 0), (4, 2), (1, 0))]
    inputs = [(b, s, averaged) for averaged in (False, True) for b, s in slopes]
    return verdict(block_bound, f, inputs, truth, mistakes)
