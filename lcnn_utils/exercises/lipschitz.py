"""The exercises of notebook 04; :mod:`lcnn_utils.exercises.engine` checks them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .engine import choice_of, exercise, randn


def convolution(seed: int, c_in: int, c_out: int, kernel: int, stride: int, bias: bool = False) -> nn.Conv2d:
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, kernel, stride, kernel // 2, bias=bias, dtype=torch.float64)
    for parameter in conv.parameters():
        parameter.data = randn(seed, *parameter.shape)
    return conv.requires_grad_(False)


unit = lambda x: x / x.norm()
forward = lambda conv, x: F.conv2d(x, conv.weight, None, conv.stride, conv.padding)  # Ax
adjoint = lambda conv, y, x: conv2d_input(x.shape, conv.weight, y, conv.stride, conv.padding)  # Aᵀy, like x
transposed = lambda conv, y: F.conv_transpose2d(y, conv.weight, None, conv.stride, conv.padding)  # at a stride smaller


@exercise(
    inputs=[
        (convolution(0, 2, 2, 3, 1), randn(50, 1, 2, 5, 5)),
        (convolution(1, 2, 3, 3, 2), randn(51, 1, 2, 6, 6)),
        (convolution(2, 3, 2, 3, 2), randn(52, 1, 3, 5, 5)),
        (convolution(3, 2, 4, 1, 2), randn(53, 1, 2, 4, 4)),
        (convolution(4, 2, 3, 5, 1, bias=True), randn(54, 1, 2, 7, 4)),
    ],
    mistakes={
        "the bias belongs to no linear map: use F.conv2d(x, conv.weight, …)": lambda c, x: unit(adjoint(c, c(x), x)),
        "not normalised: divide by the norm": lambda c, x: adjoint(c, forward(c, x), x),
        "this is Ax: the adjoint, Aᵀ, has to follow": forward,
        "this is Ax, normalised: the adjoint, Aᵀ, has to follow": lambda c, x: unit(forward(c, x)),
        "this is A twice: its adjoint, Aᵀ, is another map": lambda c, x: unit(forward(c, forward(c, x))),
        "the norm is over everything: x is one vector": lambda c, x: F.normalize(adjoint(c, forward(c, x), x)),
        "conv_transpose2d can't know how large the input was at a stride: give it output_padding, or use "
        "torch.nn.grad.conv2d_input": lambda c, x: unit(transposed(c, forward(c, x))),
    },
)
def power_step(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """f(conv, x) → one step of power iteration, AᵀAx / ‖AᵀAx‖₂, with x and the result of shape (1, C, H, W). A is the
    linear map of the nn.Conv2d without its bias; any stride. Solution: ``lcnn_utils.nn.spectral_norm._iterate``."""
    return unit(adjoint(conv, forward(conv, x), x))


VARIANCES = [torch.tensor([16, 1, 0.25, 1e-4, 1e-8]).double(), (2 * randn(0, 16)).exp(), (3 * randn(1, 7)).exp()]
PUBLISHED = "this is the published rule, where the smallest σ scales down every channel: clip each channel by itself"
sigma = lambda var, eps: (var + eps).sqrt()


@exercise(
    inputs=[(var, gamma, eps) for var in VARIANCES for gamma, eps in [(1e4, 1e-2), (3.0, 1e-5), (0.5, 1e-3)]],
    mistakes={
        "this is BatchNorm itself, 1/σ: γ is not used": lambda var, gamma, eps: 1 / sigma(var, eps),
        PUBLISHED: lambda var, gamma, eps: (gamma * sigma(var, eps).min()).clamp(max=1) / sigma(var, eps),
        "γ limits the slope 1/σ, not σ": lambda var, gamma, eps: 1 / sigma(var, eps).clamp(max=gamma),
        "this is σ, cut off at γ: the slope is 1/σ": lambda var, gamma, eps: sigma(var, eps).clamp(max=gamma),
        "the other way round: no slope is *above* γ": lambda var, gamma, eps: (1 / sigma(var, eps)).clamp(min=gamma),
        "σ is the square root of the variance": lambda var, gamma, eps: (1 / (var + eps)).clamp(max=gamma),
        "without eps a dead channel divides by 0": lambda var, gamma, eps: (1 / sigma(var, 0)).clamp(max=gamma),
        "eps is under the root": lambda var, gamma, eps: (1 / (sigma(var, 0) + eps)).clamp(max=gamma),
    },
)
def batchnorm_slopes(var: Tensor, gamma: float, eps: float) -> Tensor:
    """f(var, gamma, eps) → slopes (C,) of a γ-BatchNorm without weights: var (C,) are the channels' variances.
    Each channel is multiplied by 1/σ_c, σ_c² = var_c + eps, but by no more than γ.
    Solution: ``lcnn_utils.nn.batchnorm._slope``."""
    return (1 / sigma(var, eps)).clamp(max=gamma)


both = lambda branch, shortcut: branch.prod() + shortcut.prod()  # slopes of the paths side by side
larger = lambda branch, shortcut: torch.maximum(branch.prod(), shortcut.prod())
halved = lambda slope, averaged, by=8**0.5: slope / by if averaged else slope


@exercise(
    inputs=[
        (randn(n, n).exp(), randn(9 + n, m).exp(), averaged)
        for averaged in (False, True)
        for n, m in [(2, 1), (3, 0), (4, 2), (1, 0)]
    ],
    mistakes={
        "slopes of layers one after another are multiplied": lambda b, s, avg: halved(b.sum() + s.sum(), avg),
        "the identity is a path, too (slope 1)": lambda b, s, avg: halved(both(b, s) if len(s) else b.prod(), avg),
        "branches side by side add their slopes": lambda b, s, avg: halved(b.prod() * s.prod(), avg),
        "two branches may pull the same way: their slopes add up": lambda b, s, avg: halved(larger(b, s), avg),
        "orthogonal branches would give this": lambda b, s, avg: halved(torch.hypot(b.prod(), s.prod()), avg),
        "averaged is not used: its block is smaller": lambda b, s, avg: both(b, s),
        "an average divides by 2": lambda b, s, avg: halved(both(b, s), avg, math.sqrt(2)),
        "the input is divided by √2, too": lambda b, s, avg: halved(both(b, s), avg, 2),
        "both branches see the same x/√2: a factor √2 once, not twice": lambda b, s, avg: halved(both(b, s), avg, 4),
        "true, but not tight": lambda b, s, avg: larger(b, s) / math.sqrt(2) if avg else both(b, s),
    },
)
def block_bound(branch: Tensor, shortcut: Tensor, averaged: bool) -> Tensor:
    """f(branch, shortcut, averaged) → a number no smaller than the block's slope, and attained for some layers.
    branch (n,), shortcut (m,): slopes of the layers, one after another (none at all: the identity). The block is F(x) +
    S(x), or if ``averaged`` (F(x/√2) + S(x/√2))/2. Solution: ``lcnn_utils.nn.AveragedBlock``, its docstring."""
    return halved(both(branch, shortcut), averaged)


use = choice_of(power_step, batchnorm_slopes, block_bound)
