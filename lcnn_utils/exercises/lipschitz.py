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
back = lambda conv, y, shape: conv2d_input(shape, conv.weight, y, conv.stride, conv.padding)  # Aᵀy
step = lambda conv, x: back(conv, forward(conv, x), x.shape)  # AᵀAx
transposed = lambda conv, y: F.conv_transpose2d(y, conv.weight, None, conv.stride, conv.padding)  # at a stride smaller
flipped = lambda weight: weight.flip(2, 3)
exchanged = lambda weight: weight.transpose(0, 1)


def inverse(conv: nn.Conv2d, y: Tensor, shape: list[int]) -> Tensor:
    pixels = torch.eye(math.prod(shape), dtype=y.dtype).view(-1, *shape[1:])
    return (torch.linalg.pinv(forward(conv, pixels).flatten(1).mT) @ y.flatten()).view(shape)


def gradient(conv: nn.Conv2d, shape: list[int], dtype: torch.dtype, y: Tensor | None = None) -> Tensor:
    """By autograd, of ⟨Ax, y⟩ or of the sum of Ax."""
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    ax = forward(conv, x)
    return torch.autograd.grad(ax.sum() if y is None else (ax * y).sum(), x)[0]


@exercise(
    inputs=[
        (convolution(5, 2, 2, 3, 1), randn(55, 1, 2, 2, 2), [1, 2, 2, 2]),
        (convolution(0, 2, 2, 3, 1), randn(56, 1, 2, 5, 5), [1, 2, 5, 5]),
        (convolution(1, 2, 3, 3, 2), randn(57, 1, 3, 3, 3), [1, 2, 6, 6]),
        (convolution(2, 3, 2, 3, 2), randn(58, 1, 2, 3, 3), [1, 3, 5, 5]),
        (convolution(4, 2, 3, 5, 1, bias=True), randn(59, 1, 3, 7, 4), [1, 2, 7, 4]),
    ],
    mistakes={
        "this is A once more: its adjoint is another map, with ⟨Ax, y⟩ = ⟨x, Aᵀy⟩": lambda c, y, s: forward(c, y),
        "this is the (pseudo-)inverse: the adjoint does not undo A": inverse,
        "y is not used: of which number is Aᵀy the gradient?": lambda c, y, s: gradient(c, s, y.dtype),
        "x needs the precision (dtype) of y and of conv's weight": lambda c, y, s: gradient(c, s, torch.float32, y),
        "the adjoint itself has no length 1: that comes in the next step": lambda c, y, s: unit(back(c, y, s)),
        "channels: what went from input i to output o goes back from o to i": lambda c, y, s: F.conv2d(
            y, flipped(c.weight), None, 1, c.padding
        ),
        "the way back runs through the kernel upside down": lambda c, y, s: F.conv2d(
            y, exchanged(c.weight), None, 1, c.padding
        ),
        "right at stride 1; at stride 2, y belongs to every other pixel only": lambda c, y, s: F.conv2d(
            y, exchanged(flipped(c.weight)), None, 1, c.padding
        ),
        "right at stride 1; at stride 2, Aᵀ has to make the image larger, not smaller": lambda c, y, s: F.conv2d(
            y, exchanged(flipped(c.weight)), None, c.stride, c.padding
        ),
        "conv's stride is missing": lambda c, y, s: conv2d_input(s, c.weight, y, 1, c.padding),
        "conv's padding is missing": lambda c, y, s: conv2d_input(s, c.weight, y, c.stride),
        "at stride 2, images of two sizes have an output of y's size: shape says which": lambda c, y, s: transposed(
            c, y
        ),
    },
)
def adjoint(conv: nn.Conv2d, y: Tensor, shape: list[int]) -> Tensor:
    """f(conv, y, shape) → Aᵀy, the image of this shape (1, C, H, W) with ⟨Ax, y⟩ = ⟨x, Aᵀy⟩ for all x. A is the linear
    map of the nn.Conv2d ``conv`` without its bias, of any stride. Solution: ``torch.nn.grad.conv2d_input``."""
    return back(conv, y, shape)


@exercise(
    inputs=[
        (convolution(6, 2, 2, 3, 1, bias=True), randn(49, 1, 2, 2, 2)),
        (convolution(0, 2, 2, 3, 1), randn(50, 1, 2, 5, 5)),
        (convolution(1, 2, 3, 3, 2), randn(51, 1, 2, 6, 6)),
        (convolution(2, 3, 2, 3, 2), randn(52, 1, 3, 5, 5)),
        (convolution(3, 2, 4, 1, 2), randn(53, 1, 2, 4, 4)),
    ],
    mistakes={
        "a linear map has no bias: leave conv's out": lambda c, x: unit(back(c, c(x), x.shape)),
        "how long is x after a step? It has to be 1": step,
        "how long is x after a step? Divide by its length, not by the square of that": lambda c, x: (
            step(c, x) / step(c, x).square().sum()
        ),
        "how long is x after a step? Its largest pixel is another norm": lambda c, x: (
            step(c, x) / step(c, x).abs().max()
        ),
        "this is Ax: the adjoint has to follow": forward,
        "this is Ax at length 1: the adjoint has to follow": lambda c, x: unit(forward(c, x)),
        "this is A twice: its adjoint is another map": lambda c, x: unit(forward(c, forward(c, x))),
        "the adjoint comes second: x lies on the side that A takes": lambda c, x: unit(forward(c, back(c, x, x.shape))),
        "all of x is one vector: one length for its channels and pixels": lambda c, x: F.normalize(step(c, x)),
        "conv's stride is missing in Ax": lambda c, x: unit(
            back(c, F.conv2d(x, c.weight, None, 1, c.padding), x.shape)
        ),
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
        (convolution(7, 2, 2, 3, 1), randn(60, 1, 2, 5, 5), 3),
        (convolution(8, 2, 3, 3, 2), randn(61, 1, 2, 6, 6), 1),
        (convolution(9, 3, 2, 3, 2, bias=True), randn(62, 1, 3, 5, 5), 40),
    ],
    mistakes={
        "this is the direction: how much does A stretch it?": after,
        "x has length 1 after a step: how long is Ax?": lambda c, x, n: after(c, x, n).norm(),
        "the length of AᵀAx tends to the square of the slope": lambda c, x, n: step(c, after(c, x, n)).norm(),
        "this is the square of the stretch": lambda c, x, n: forward(c, after(c, x, n)).square().sum(),
        "that estimates the slope, too (why?), but asked is the length of Ax": lambda c, x, n: (
            step(c, after(c, x, n)).norm().sqrt()
        ),
        "this is the stretch of the start: let x move": lambda c, x, n: forward(c, x).norm() / x.norm(),
        "x has length 1 only after a step: this one is the start": lambda c, x, n: forward(c, x).norm(),
        "one step, whatever steps says: does x go into the next step?": lambda c, x, n: forward(
            c, after(c, x, 1)
        ).norm(),
        "a step too few": lambda c, x, n: forward(c, after(c, x, n - 1)).norm(),
        "a step too many": lambda c, x, n: forward(c, after(c, x, n + 1)).norm(),
        "a linear map has no bias: leave conv's out": lambda c, x, n: c(after(c, x, n)).norm(),
    },
)
def conv_slope(conv: nn.Conv2d, x: Tensor, steps: int) -> Tensor:
    """f(conv, x, steps) → ‖Ax‖₂ for the x of length 1 that ``steps`` power steps (one at least) make of the start x
    (1, C, H, W): a number, the slope of ``conv`` as far as it is found. Solution: ``lcnn_utils.nn.conv_norm``."""
    return forward(conv, after(conv, x, steps)).norm()


VARIANCES = [torch.tensor([16, 1, 0.25, 1e-4, 1e-8]).double(), (2 * randn(0, 16)).exp(), (3 * randn(1, 7)).exp()]
PUBLISHED = "this is the published rule, where the smallest σ scales down every channel: clip each channel by itself"
sigma = lambda var, eps: (var + eps).sqrt()


@exercise(
    inputs=[(var, gamma, eps) for var in VARIANCES for gamma, eps in [(1e4, 1e-2), (3.0, 1e-5), (0.5, 1e-3)]],
    mistakes={
        "Python's min compares whole objects: each channel has to be cut off by itself": lambda var, gamma, eps: min(
            1 / sigma(var, eps), gamma
        ),
        "gamma is a number, and this function compares tensors": lambda var, gamma, eps: torch.minimum(
            1 / sigma(var, eps), gamma
        ),
        "this is the slope of the whole layer: asked is one for each channel": lambda var, gamma, eps: (
            (1 / sigma(var, eps)).clamp(max=gamma).max()
        ),
        "this is BatchNorm itself, 1/σ: gamma is not used": lambda var, gamma, eps: 1 / sigma(var, eps),
        PUBLISHED: lambda var, gamma, eps: (gamma * sigma(var, eps).min()).clamp(max=1) / sigma(var, eps),
        "gamma limits the slope 1/σ, not σ": lambda var, gamma, eps: 1 / sigma(var, eps).clamp(max=gamma),
        "this is σ, cut off at gamma: the slope is 1/σ": lambda var, gamma, eps: sigma(var, eps).clamp(max=gamma),
        "the other way round: no slope is *above* gamma": lambda var, gamma, eps: (1 / sigma(var, eps)).clamp(
            min=gamma
        ),
        "var is σ², not σ": lambda var, gamma, eps: (1 / (var + eps)).clamp(max=gamma),
        "eps is not used: a dead channel would divide by 0": lambda var, gamma, eps: (1 / sigma(var, 0)).clamp(
            max=gamma
        ),
        "eps is added to the variance, not to σ": lambda var, gamma, eps: (1 / (sigma(var, 0) + eps)).clamp(max=gamma),
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
        "without layers the shortcut is the identity: what is its slope?": lambda b, s, avg: halved(
            both(b, s) if len(s) else b.prod(), avg
        ),
        "branches side by side add their slopes": lambda b, s, avg: halved(b.prod() * s.prod(), avg),
        "two branches may pull the same way: their slopes add up": lambda b, s, avg: halved(larger(b, s), avg),
        "orthogonal branches would give this": lambda b, s, avg: halved(torch.hypot(b.prod(), s.prod()), avg),
        "averaged is not used: its block is smaller": lambda b, s, avg: both(b, s),
        "an average of two divides by 2": lambda b, s, avg: halved(both(b, s), avg, math.sqrt(2)),
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


use = choice_of(adjoint, power_step, conv_slope, batchnorm_slopes, block_bound)
