"""The exercises of notebook 04; :mod:`lcnn_utils.exercises.engine` checks them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.grad import conv2d_input

from .engine import choice_of, exercise, randn


def convolution(seed: int, c_in: int, c_out: int, stride: int, bias: bool = False) -> nn.Conv2d:
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, 3, stride, 1, bias=bias, dtype=torch.float64)
    for parameter in conv.parameters():
        parameter.data = randn(seed, *parameter.shape)
    return conv.requires_grad_(False)


unit = lambda x: x / x.norm()
forward = lambda conv, x: F.conv2d(x, conv.weight, None, conv.stride, conv.padding)  # Ax
back = lambda conv, y, shape: conv2d_input(shape, conv.weight, y, conv.stride, conv.padding)  # Aᵀy
step = lambda conv, x: back(conv, forward(conv, x), x.shape)  # AᵀAx
beside = lambda y, weight: F.conv2d(y, weight, None, 1, 1)  # a convolution that keeps the image's size
flipped = lambda conv: conv.weight.flip(2, 3)


@exercise(
    inputs=[
        (convolution(5, 2, 2, 1), randn(55, 1, 2, 2, 2), [1, 2, 2, 2]),
        (convolution(1, 2, 3, 2, bias=True), randn(57, 1, 3, 3, 3), [1, 2, 6, 6]),
        (convolution(2, 3, 2, 2), randn(58, 1, 2, 3, 3), [1, 3, 5, 5]),
    ],
    mistakes={
        "this is A once more: its adjoint is another map": lambda c, y, s: forward(c, y),
        "of which number is Aᵀy the gradient?": lambda c, y, s: grad(lambda x: forward(c, x).sum())(y.new_zeros(s)),
        "channels: the way back leads from outputs to inputs": lambda c, y, s: beside(y, flipped(c)),
        "the way back runs through the kernel upside down": lambda c, y, s: beside(y, c.weight.transpose(0, 1)),
        "at stride 2, y belongs to every other pixel only": lambda c, y, s: beside(y, flipped(c).transpose(0, 1)),
        "two sizes fit y: shape says which": lambda c, y, s: F.conv_transpose2d(y, c.weight, None, c.stride, c.padding),
    },
)
def adjoint(conv: nn.Conv2d, y: Tensor, shape: list[int]) -> Tensor:
    """f(conv, y, shape) → Aᵀy, the image of this shape (1, C, H, W) with ⟨Ax, y⟩ = ⟨x, Aᵀy⟩ for all x. A is the linear
    map of the nn.Conv2d ``conv`` without its bias, of any stride. Solution: ``torch.nn.grad.conv2d_input``."""
    return back(conv, y, shape)


@exercise(
    inputs=[
        (convolution(6, 2, 2, 1, bias=True), randn(49, 1, 2, 2, 2)),
        (convolution(1, 2, 3, 2), randn(51, 1, 2, 6, 6)),
        (convolution(2, 3, 2, 2), randn(52, 1, 3, 5, 5)),
    ],
    mistakes={
        "a linear map has no bias: leave conv's out": lambda c, x: unit(back(c, c(x), x.shape)),
        "how long is x after a step? It has to be 1": step,
        "this is Ax at length 1: the adjoint has to follow": lambda c, x: unit(forward(c, x)),
        "this is A twice: its adjoint is another map": lambda c, x: unit(forward(c, forward(c, x))),
        "all of x is one vector: one length for channels and pixels": lambda c, x: F.normalize(step(c, x)),
    },
)
def power_step(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """f(conv, x) → one step of power iteration, AᵀAx / ‖AᵀAx‖₂, with x and the result of shape (1, C, H, W). A is the
    linear map of the nn.Conv2d ``conv`` without its bias. Solution: ``lcnn_utils.nn.spectral_norm._iterate``."""
    return unit(step(conv, x))


def after(conv: nn.Conv2d, x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = unit(step(conv, x))
    return x


@exercise(
    inputs=[
        (convolution(7, 2, 2, 1), randn(60, 1, 2, 5, 5), 3),
        (convolution(9, 3, 2, 2, bias=True), randn(62, 1, 3, 5, 5), 40),
    ],
    mistakes={
        "this is the direction: how much does A stretch it?": after,
        "the length of AᵀAx tends to the slope's square": lambda c, x, n: step(c, after(c, x, n)).norm(),
        "this is the stretch of the start: let x move": lambda c, x, n: forward(c, unit(x)).norm(),
        "does x go into the next step?": lambda c, x, n: forward(c, after(c, x, 1)).norm(),
        "a step too few": lambda c, x, n: forward(c, after(c, x, n - 1)).norm(),
        "a step too many": lambda c, x, n: forward(c, after(c, x, n + 1)).norm(),
        "a linear map has no bias: leave conv's out": lambda c, x, n: c(after(c, x, n)).norm(),
    },
)
def conv_slope(conv: nn.Conv2d, x: Tensor, steps: int) -> Tensor:
    """f(conv, x, steps) → ‖Ax‖₂ for the x of length 1 that ``steps`` power steps (one at least) make of the start x
    (1, C, H, W): a number, the slope of ``conv`` as far as it is found. Solution: ``lcnn_utils.nn.conv_norm``."""
    return forward(conv, after(conv, x, steps)).norm()


sigma = lambda var, eps: (var + eps).sqrt()
published = lambda var, gamma, eps: (gamma * sigma(var, eps).min()).clamp(max=1) / sigma(var, eps)


@exercise(
    inputs=[
        (torch.tensor([100, 1, 0.25, 1e-4, 1e-8]).double(), 8.0, 1e-2),
        ((2 * randn(0, 16)).exp(), 0.5, 1e-3),
        ((3 * randn(1, 7)).exp(), 1e4, 1e-5),
    ],
    mistakes={
        "this is BatchNorm itself, 1/σ: gamma is not used": lambda var, gamma, eps: 1 / sigma(var, eps),
        "this is the published rule: clip each channel by itself": published,
        "gamma limits the slope 1/σ, not σ": lambda var, gamma, eps: 1 / sigma(var, eps).clamp(max=gamma),
        "no slope is *above* gamma": lambda var, gamma, eps: (1 / sigma(var, eps)).clamp(min=gamma),
        "var is σ², not σ": lambda var, gamma, eps: (1 / (var + eps)).clamp(max=gamma),
        "eps is not used: a dead channel would divide by 0": lambda var, gamma, eps: (1 / var.sqrt()).clamp(max=gamma),
        "eps is added to the variance, not to σ": lambda var, gamma, eps: (1 / (var.sqrt() + eps)).clamp(max=gamma),
    },
)
def batchnorm_slopes(var: Tensor, gamma: float, eps: float) -> Tensor:
    """f(var, gamma, eps) → slopes (C,) of a γ-BatchNorm without weights: var (C,) are the channels' variances.
    Each channel is multiplied by 1/σ_c, σ_c² = var_c + eps, but by no more than γ.
    Solution: ``lcnn_utils.nn.batchnorm._slope``."""
    return (1 / sigma(var, eps)).clamp(max=gamma)


both = lambda branch, shortcut: branch.prod() + shortcut.prod()  # slopes of the paths side by side
halved = lambda slope, averaged, by=8**0.5: slope / by if averaged else slope


@exercise(
    inputs=[
        (randn(n, n).exp(), randn(9 + n, m).exp(), averaged)
        for averaged in (False, True)
        for n, m in [(2, 1), (3, 0), (4, 2)]
    ],
    mistakes={
        "slopes of layers one after another are multiplied": lambda b, s, avg: halved(b.sum() + s.sum(), avg),
        "what is the slope of the identity?": lambda b, s, avg: halved(both(b, s) if len(s) else b.prod(), avg),
        "branches side by side add their slopes": lambda b, s, avg: halved(b.prod() * s.prod(), avg),
        "averaged is not used: its block is smaller": lambda b, s, avg: both(b, s),
        "an average of two divides by 2": lambda b, s, avg: halved(both(b, s), avg, math.sqrt(2)),
        "the input is divided by √2, too": lambda b, s, avg: halved(both(b, s), avg, 2),
        "both branches see the same x/√2: once, not twice": lambda b, s, avg: halved(both(b, s), avg, 4),
    },
)
def block_bound(branch: Tensor, shortcut: Tensor, averaged: bool) -> Tensor:
    """f(branch, shortcut, averaged) → a number no smaller than the block's slope, and attained for some layers.
    branch (n,), shortcut (m,): slopes of the layers, one after another (none at all: the identity). The block is F(x) +
    S(x), or if ``averaged`` (F(x/√2) + S(x/√2))/2. Solution: ``lcnn_utils.nn.AveragedBlock``, its docstring."""
    return halved(both(branch, shortcut), averaged)


use = choice_of(adjoint, power_step, conv_slope, batchnorm_slopes, block_bound)
