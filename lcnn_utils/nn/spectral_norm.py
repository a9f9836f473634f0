"""Norms of linear layers and of real, zero-padded convolutions, and layers divided by their norm.

References: Y. Yoshida, T. Miyato, arXiv:1705.10941 (power iteration in training); H. Sedghi, V. Gupta, P. Long,
ICLR 2019, arXiv:1805.10408 (circular convolutions by the DFT).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils import parametrize

from ..lab import check_choice, double
from .softplus import _dot, wide

Shape = tuple[int, int, int]  # (C, H, W)
Layer = nn.Conv2d | nn.Linear
Geometry = dict[str, Any] | None  # keywords of F.conv2d; None for a linear layer


def _geometry(conv: nn.Module, input_shape: Shape | None) -> dict[str, Any]:
    """Stride, padding, dilation, groups of ``conv`` as keywords of ``F.conv2d``, or a ValueError with the way out."""
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        raise ValueError(f"expected an nn.Conv2d with padding_mode='zeros', got {conv} (see torch.linalg.matrix_norm)")
    shape = tuple(input_shape or ())
    if len(shape) != 3 or min(shape) < 1 or shape[0] != conv.in_channels:
        raise ValueError(f"input_shape={shape}: give (C, H, W) of this layer's input, with C = {conv.in_channels}")
    left, right, top, bottom = conv._reversed_padding_repeated_twice  # in numbers, where padding="same" too
    if left != right or top != bottom:
        raise ValueError("padding='same' is lopsided with this kernel: put nn.ZeroPad2d before and use padding=0")
    return {"stride": conv.stride, "padding": (top, left), "dilation": conv.dilation, "groups": conv.groups}


def _apply(weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """A x, the layer without its bias, never in half precision."""
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(x, weight) if geometry is None else F.conv2d(x, weight, **geometry)


def _length(t: Tensor) -> Tensor:
    """‖t‖₂; t may have any scale."""
    largest = t.detach().abs().max().clamp(min=torch.finfo(t.dtype).tiny)
    return largest * torch.linalg.vector_norm(t / largest)


def _to_unit_length(ts: list[Tensor]) -> None:
    """Divide each tensor by its length, in place, whatever its scale; 0 stays 0."""
    tiny = torch.finfo(ts[0].dtype).tiny
    torch._foreach_div_(ts, torch._foreach_clamp_min(torch._foreach_norm(ts, 1), tiny))
    torch._foreach_div_(ts, torch._foreach_clamp_min(torch._foreach_norm(ts), tiny))


def _iterate(weights: list[Tensor], vs: list[Tensor], geometries: list[Geometry]) -> tuple[list[Tensor], list[Tensor]]:
    """One power iteration of each layer: u = Av/‖Av‖ and then v = Aᵀu/‖Aᵀu‖; a zero weight leaves v."""
    us = list(map(_apply, weights, vs, geometries))
    _to_unit_length(us)
    backs = [
        _apply(weight.mT, u, None) if geometry is None else conv2d_input(v.shape, weight, u, **geometry)
        for weight, v, u, geometry in zip(weights, vs, us, geometries, strict=True)
    ]
    torch._foreach_add_(backs, vs, alpha=1e-30)  # which is all that a zero weight leaves
    _to_unit_length(backs)
    return us, backs


@torch.no_grad()
def _power(weight: Tensor, v: Tensor, geometry: Geometry, iterations: int) -> Tensor:
    """v after ``iterations`` power iterations, in float32 or wider."""
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    weight = wide(weight)
    v = v.to(weight)
    for _ in range(iterations):
        v = _iterate([weight], [v], [geometry])[1][0]
    return v


def _random_unit(shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """A random direction in float64, always the same one unless a generator is given."""
    generator = generator or Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return v / torch.linalg.vector_norm(v)


def _torus_norm(weight: Tensor, size: tuple[int, ...], geometry: dict[str, Any]) -> Tensor:
    """Norm ‖T‖ of the same kernel on a torus (weight in float64, image of ``size`` (H, W)): an upper bound of ‖A‖.

    Lay each side n of the image, then zeros, on a circle of L = s·⌈(n+p)/s⌉ points, with stride s, padding p, dilation
    d. Windows read positions −p … n−1+p; on the circle −p … −1 fall on L−p … L−1 ≥ n: zeros, as the padding. So the
    circular convolution T gets every output right (outputs from L/s on see only padding): A = S T E with an isometry E
    and a selection S, hence ‖A‖ ≤ ‖T‖. In Fourier space keeping every s-th output folds the s frequencies
    f = m + a·L/s, a < s, onto m: T has one block [Ŵ(f) for the s_h·s_w folded f] / √(s_h·s_w) for each m, where
    Ŵ(f) = Σ_j W_j e^(−2πi f·j·d/L). The blocks of −m are conjugate to those of m: half of one side's m suffice.
    """
    phases = []
    stride, padding, dilation, groups = geometry.values()
    for side, taps, s, p, d in zip(size, weight.shape[2:], stride, padding, dilation, strict=True):
        length = s * math.ceil((side + p) / s)
        f = torch.arange(length, device=weight.device).view(s, -1).mT  # (L/s, s): each m with its folded frequencies
        turns = f[..., None] * d * torch.arange(taps, device=weight.device) % length
        phases.append(torch.exp(turns.to(weight.dtype) * (-2j * math.pi / length)))
    rows, columns = phases[0], phases[1][: len(phases[1]) // 2 + 1]
    kernel = weight.unflatten(0, (groups, -1)).to(rows.dtype)  # (groups, C_out, C_in, kh, kw)
    partial = torch.einsum("goikl,nbl->gnokbi", kernel, columns)
    largest = weight.new_zeros(())
    for row in rows:  # one row of frequencies at a time bounds the memory
        block = torch.einsum("ak,gnokbi->gnoabi", row, partial).flatten(3)  # (groups, m′, C_out, s_h·s_w·C_in)
        tall = block.shape[-2] > block.shape[-1]
        gram = (block.mH @ block if tall else block @ block.mH).flatten(0, 1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        failed = torch.linalg.cholesky_ex(eye * largest - gram).info > 0
        if bool(failed.any()):  # Cholesky is cheaper: only a block not below the largest so far needs eigenvalues
            largest = torch.maximum(largest, torch.linalg.eigvalsh(gram[failed])[:, -1].max())
    return (largest / math.prod(stride)).sqrt()


def conv_norm(
    conv: nn.Conv2d, input_shape: Shape, method: str = "power", iterations: int = 50, generator: Generator | None = None
) -> Tensor:
    """Operator norm of the real, zero-padded convolution: the largest ‖A x‖₂ / ‖x‖₂ over x of shape (C, H, W).

    ``"power"`` makes ``iterations`` power iterations, a *lower* estimate, differentiable in ``conv.weight``; its start
    is always the same unless a ``generator`` draws it. ``"exact"`` takes the SVD of the dense matrix, for small sizes.
    ``"bound"`` is a certified *upper* bound, within 1 % at 32×32 (3×3 kernels), looser on small images.
    ``input_shape`` is that of this layer's input: the norm grows with it. Scalar like the weight, computed in float64.
    Raises ValueError: not a zero-padded Conv2d, a shape that does not fit, NaN or infinite weights, a matrix too large.
    """
    check_choice(method, ("power", "exact", "bound"), "method")
    geometry, original = _geometry(conv, input_shape), conv.weight
    if not original.isfinite().all():
        raise ValueError("the weight contains NaN or infinity: training diverged, or the checkpoint is broken")
    weight = double(original)
    if method == "power":
        v = _power(weight, _random_unit((1, *input_shape), generator), geometry, iterations)
        return _length(_apply(weight, v, geometry)).to(original)
    with torch.no_grad():
        if method == "bound":
            sigma = _torus_norm(weight.cpu(), input_shape[1:], geometry)  # a GPU is slow at many small matrices
            limits = torch.finfo(original.dtype)  # round outward, past float64's errors and the final cast
            return (sigma * (1 + 1e-10 + limits.eps) + (sigma > 0) * limits.tiny * limits.eps).to(original)
        outputs, inputs = _apply(weight, weight.new_zeros(1, *input_shape), geometry).numel(), math.prod(input_shape)
        if inputs * max(inputs, outputs) > 2**24:  # 128 MiB
            raise ValueError(f"a {outputs} × {inputs} matrix is too large for 'exact': use method='bound' or 'power'")
        basis = torch.eye(inputs, dtype=weight.dtype, device=weight.device).view(inputs, *input_shape)
        return torch.linalg.matrix_norm(_apply(weight, basis, geometry).flatten(1), 2).to(original)


class _Normalise(torch.autograd.Function):
    """(W, ∂σ/∂W) ↦ W/σ with σ = ⟨W, ∂σ/∂W⟩, as σ is homogeneous in W; the second as a constant.

    What backward needs is kept on ``ctx``: a step may have several backward passes.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, slope: Tensor) -> Tensor:
        sigma = _dot(weight, slope)
        sigma = torch.where(sigma > 0, sigma, 1)  # a zero weight stays zero
        normalised = weight / sigma
        ctx.kept = normalised.detach(), slope, sigma
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        normalised, slope, sigma = ctx.kept
        return torch.addcmul(grad, slope, _dot(grad, normalised), value=-1) / sigma, None


class SpectralNorm(nn.Module):
    """Parametrisation W ↦ W/σ, with σ = ‖W v‖ and v kept near the top singular direction: see ``spectral_normalize``.

    Each use of the weight in training moves v one power iteration on; in eval v rests and σ still follows the weight;
    inside :func:`norms_once_a_step` both are as its last call left them. σ has its true gradient once v has converged.
    """

    v: Tensor

    def __init__(self, layer: Layer, input_shape: Shape | None, iterations: int) -> None:
        super().__init__()
        linear = isinstance(layer, nn.Linear)
        self.geometry = None if linear else _geometry(layer, input_shape)
        self.input_shape = (layer.in_features,) if linear else tuple(input_shape or ())
        v = _power(layer.weight, _random_unit((1, *self.input_shape)), self.geometry, iterations)
        self.register_buffer("v", v.to(layer.weight))
        self.now: tuple[Tensor, Tensor] | None = None  # weight and W/σ, inside norms_once_a_step

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"now": None}  # a copy made there is a layer like any other

    def sigma(self, weight: Tensor, v: Tensor | None = None) -> Tensor:
        """‖W v‖ for the layer's v or another, in float32 or wider; 1 for a zero weight, which stays zero."""
        weight = wide(weight)
        v = (self.v if v is None else v).to(weight.dtype)
        length = _length(_apply(weight, v, self.geometry))
        return torch.where(length > 0, length, 1)

    def forward(self, weight: Tensor) -> Tensor:
        if self.now and self.now[0] is weight:
            return self.now[1]
        if self.training:
            self.v.copy_(_power(weight, self.v, self.geometry, 1))
        v = self.v.clone()  # the buffer may move before the backward pass
        return (wide(weight) / self.sigma(weight, v)).to(weight.dtype)


def _normalised(model: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Every spectral norm of a model, and the weight that it divides."""
    lists = (module for module in model.modules() if isinstance(module, parametrize.ParametrizationList))
    return [(entry[0], entry.original) for entry in lists if isinstance(entry[0], SpectralNorm)]


def _advance(layers: list[tuple[SpectralNorm, Tensor]]) -> None:
    """One power iteration of all layers together, and each one's W/σ with σ = uᵀAv, u and v held."""
    norms = [norm for norm, _ in layers]
    weights = [wide(weight) for _, weight in layers]
    with torch.no_grad():
        before = [norm.v.to(weight.dtype) for norm, weight in zip(norms, weights, strict=True)]
        us, vs = _iterate(weights, before, [norm.geometry for norm in norms])
        torch._foreach_copy_([norm.v for norm in norms], vs)
    for (norm, original), weight, u, v in zip(layers, weights, us, vs, strict=True):
        slope = u.mT * v if norm.geometry is None else conv2d_weight(v, weight.shape, u, **norm.geometry)
        norm.now = original, _Normalise.apply(weight, slope).to(original.dtype)


@contextlib.contextmanager
def norms_once_a_step(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Take power iteration out of the forward passes: yields the function that moves every layer one iteration on.

    To be called before each step's forward passes, and again whenever weights have changed. σ and its gradient then
    cost an elementwise product instead of a convolution.
    """
    layers = _normalised(model)
    try:
        yield lambda: _advance(layers) if layers else None
    finally:
        for norm, _ in layers:
            norm.now = None


def spectral_normalize(module: Layer, input_shape: Shape | None = None, iterations: int = 15) -> nn.Module:
    """Divide the weight of an ``nn.Conv2d`` or ``nn.Linear`` by its operator norm, in place; returns ``module``.

    ``input_shape`` (C, H, W) is a convolution's input. Starts with ``iterations`` power iterations, then one each
    training pass: an estimate from below. Call :func:`refresh_norms` before measuring; ``conv_norm(…, "bound")`` is
    certain. Raises ValueError: another kind of layer or geometry, a layer done already.
    """
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError("the weight is parametrised already: see torch.nn.utils.parametrize.remove_parametrizations")
    return parametrize.register_parametrization(module, "weight", SpectralNorm(module, input_shape, iterations))


def refresh_norms(model: nn.Module, iterations: int = 100) -> None:
    """Run power iterations for every spectrally normalised layer of ``model``: do so before evaluating or measuring."""
    for norm, weight in _normalised(model):
        norm.v.copy_(_power(weight, norm.v, norm.geometry, iterations))
