"""Layers divided by their spectral norm: the real operator of a layer and power iteration on it.

References: Y. Yoshida, T. Miyato, arXiv:1705.10941 (power iteration in training).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

Shape = tuple[int, int, int]  # (C, H, W)
Layer = nn.Conv2d | nn.Linear


def _geometry(conv: nn.Module, input_shape: Shape | None) -> dict[str, Any]:
    """Stride, padding, dilation, groups of ``conv`` as keywords of ``F.conv2d``, or a ValueError with the way out."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"expected an nn.Conv2d, got {type(conv).__name__}: see torch.linalg.matrix_norm for Linear")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} is not supported: use padding_mode='zeros'")
    shape, padding = tuple(input_shape or ()), conv.padding
    if len(shape) != 3 or min(shape) < 1 or shape[0] != conv.in_channels:
        raise ValueError(f"input_shape={shape}: give (C, H, W) of this layer's input, with C = {conv.in_channels}")
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if padding == "same" and any(r % 2 for r in reach):
        raise ValueError("padding='same' is lopsided with this kernel: put nn.ZeroPad2d before and use padding=0")
    if isinstance(padding, str):
        padding = (reach[0] // 2, reach[1] // 2) if padding == "same" else (0, 0)
    if any(n + 2 * p <= r for n, p, r in zip(shape[1:], padding, reach, strict=True)):
        raise ValueError(f"the kernel spans {[r + 1 for r in reach]} pixels: too many for input_shape={shape}, padded")
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def _apply(weight: Tensor, x: Tensor, geometry: dict[str, Any] | None) -> Tensor:
    """A x, the layer without its bias: a convolution, or a linear map when ``geometry`` is None."""
    return F.linear(x, weight) if geometry is None else F.conv2d(x, weight, **geometry)


def _gradients(
    weight: Tensor, x: Tensor, y: Tensor, geometry: dict[str, Any] | None, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Those of ⟨y, A x⟩ that are ``wanted``: in x, which is Aᵀy, and in the weight."""
    if geometry is None:
        return y @ weight, y.mT @ x
    stride, padding, dilation, groups = geometry.values()
    return torch.ops.aten.convolution_backward(
        y, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False)
    )[:2]


def _length(t: Tensor) -> Tensor:
    """‖t‖₂; t may have any scale."""
    largest = t.detach().abs().max().clamp(min=torch.finfo(t.dtype).tiny)
    return largest * torch.linalg.vector_norm(t / largest)


def _to_unit_length(ts: list[Tensor], otherwise: list[Tensor] | None = None) -> None:
    """Divide each tensor by its length, in place; one that is 0 or not finite becomes its unit vector ``otherwise``."""
    tiny = torch.finfo(ts[0].dtype).tiny
    sizes = torch._foreach_norm(ts, 1)  # these first: they have room where squares would overflow or vanish
    torch._foreach_div_(ts, torch._foreach_clamp_min(sizes, tiny))
    if otherwise is not None:
        for t in ts:
            t.nan_to_num_(0.0)
        torch._foreach_add_(ts, otherwise, alpha=1e-15)  # which is all that 0 is left with
    torch._foreach_div_(ts, torch._foreach_clamp_min(torch._foreach_norm(ts), tiny))


@torch.no_grad()
def _power(weight: Tensor, v: Tensor, geometry: dict[str, Any] | None, iterations: int) -> Tensor:
    """``iterations`` times v ← AᵀAv / ‖AᵀAv‖, in float32 or wider. A zero or broken weight leaves v as it was."""
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    v = v.to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(iterations):
            u = _apply(weight, v, geometry)
            _to_unit_length([u])
            back = _gradients(weight, v, u, geometry, (True, False))[0]
            _to_unit_length([back], [v])
            v = back
    return v


def _random_unit(shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """A random direction in float64, always the same one unless a generator is given."""
    generator = generator or Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return v / torch.linalg.vector_norm(v)


def _or_one(sigma: Tensor) -> Tensor:
    """σ, or 1 where it is 0: a zero weight stays zero."""
    return torch.where(sigma > 0, sigma, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ ab, in one pass where both lie in memory alike."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


class _Normalised(torch.autograd.Function):
    """Weights W ↦ W/σ with σ = Σ W ∂σ/∂W (Euler's theorem: σ is homogeneous in W), all layers at once.

    ``apply(n, W_1, …, W_n, ∂σ_1/∂W_1, …, ∂σ_n/∂W_n)``, the latter as constants.
    """

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, ctx.slopes = tensors[:n], tensors[n:]
        ctx.sigmas = _or_one(torch.stack(list(map(_dot, weights, ctx.slopes)))).unbind()
        normalised = torch._foreach_div(weights, ctx.sigmas)
        ctx.normalised = [w.detach() for w in normalised]  # kept, as a step may have several backward passes
        return tuple(normalised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        along = map(_dot, grads, ctx.normalised)
        by_weight = [torch.addcmul(g, s, a, value=-1) for g, s, a in zip(grads, ctx.slopes, along, strict=True)]
        torch._foreach_div_(by_weight, ctx.sigmas)
        return None, *by_weight, *[None] * len(grads)


class SpectralNorm(nn.Module):
    """Parametrisation W ↦ W/σ, with σ = ‖W v‖ and v kept near the top singular direction: see ``spectral_normalize``.

    Each use of the weight in training moves v one power iteration on; in eval v rests and σ still follows the weight.
    Inside :func:`norms_once_a_step` both are as its last call left them.
    σ is differentiable in W with v fixed: its true gradient once v has converged.
    """

    v: Tensor

    def __init__(self, layer: Layer, input_shape: Shape | None, iterations: int) -> None:
        super().__init__()
        self.geometry = None if isinstance(layer, nn.Linear) else _geometry(layer, input_shape)
        self.input_shape = (layer.in_features,) if isinstance(layer, nn.Linear) else tuple(input_shape or ())
        v = _power(layer.weight, _random_unit((1, *self.input_shape)), self.geometry, iterations)
        self.register_buffer("v", v.to(layer.weight))
        self.now: list[Tensor] = []  # weight and W/σ, inside norms_once_a_step

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"now": []}  # a copy made there is a layer like any other

    def forward(self, weight: Tensor) -> Tensor:
        if self.now and self.now[0] is weight:
            return self.now[1]
        with torch.autocast(weight.device.type, enabled=False):
            w = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.training:
                self.v.copy_(_power(w, self.v, self.geometry, 1))
            v = self.v.to(w.dtype, copy=True)  # a copy: the buffer may move before the backward pass
            return (w / _or_one(_length(_apply(w, v, self.geometry)))).to(weight.dtype)


def _normalised(model: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Every spectral norm of a model, and the weight that it divides."""
    lists = (module for module in model.modules() if isinstance(module, parametrize.ParametrizationList))
    return [(entry[0], entry.original) for entry in lists if isinstance(entry[0], SpectralNorm)]


def _advance(layers: list[tuple[SpectralNorm, Tensor]]) -> None:
    """One power iteration each, u = Av/‖Av‖ and v ← Aᵀu/‖Aᵀu‖; and W/σ with σ = uᵀAv = ‖Aᵀu‖, u and v held."""
    geometries = [norm.geometry for norm, _ in layers]
    for norm, _ in layers:  # let go of the last step's graph: a CUDA graph must not find its nodes on another stream
        norm.now.clear()
    with torch.autocast(layers[0][1].device.type, enabled=False):
        weights = [w.to(torch.promote_types(w.dtype, torch.float32)) for _, w in layers]
        with torch.no_grad():
            vs = [norm.v.to(w.dtype) for (norm, _), w in zip(layers, weights, strict=True)]
            us = list(map(_apply, weights, vs, geometries))
            _to_unit_length(us)
            backs = [_gradients(*layer, (True, False))[0] for layer in zip(weights, vs, us, geometries, strict=True)]
            _to_unit_length(backs, vs)
            found = zip(weights, backs, us, geometries, strict=True)
            slopes = [_gradients(*layer, (False, True))[1] for layer in found]
            torch._foreach_copy_([norm.v for norm, _ in layers], backs)
        normalised = _Normalised.apply(len(layers), *weights, *slopes)
    for (norm, weight), now in zip(layers, normalised, strict=True):
        norm.now[:] = weight, now.to(weight.dtype)


@contextlib.contextmanager
def norms_once_a_step(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Take power iteration out of the forward passes: yields the function that moves every layer one iteration on.

    To be called once before each step's forward passes, however many there are, and again whenever weights have
    changed. σ and its gradient then cost an elementwise product instead of a convolution.
    """
    layers = _normalised(model)
    try:
        yield lambda: _advance(layers) if layers else None
    finally:
        for norm, _ in layers:
            norm.now.clear()


def spectral_normalize(module: Layer, input_shape: Shape | None = None, iterations: int = 15) -> nn.Module:
    """Divide the weight of an ``nn.Conv2d`` or ``nn.Linear`` by its operator norm, in place; returns ``module``.

    ``input_shape`` (C, H, W) is a convolution's input; a linear layer needs none. Starts with ``iterations`` power
    iterations, then one each training pass: an estimate from below. Call :func:`refresh_norms` before measuring;
    ``conv_norm(…, "bound")`` is certain. Raises ValueError: another kind of layer or geometry, a layer done already.
    """
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError("the weight is parametrised already: see torch.nn.utils.parametrize.remove_parametrizations")
    return parametrize.register_parametrization(module, "weight", SpectralNorm(module, input_shape, iterations))


def refresh_norms(model: nn.Module, iterations: int = 100) -> None:
    """Run power iterations for every spectrally normalised layer of ``model``: do so before evaluating or measuring."""
    for norm, weight in _normalised(model):
        norm.v.copy_(_power(weight, norm.v, norm.geometry, iterations))


@torch.no_grad()
def sigma_error(model: nn.Module, iterations: int = 20) -> float:
    """How far the worst layer's σ = ‖W v‖ falls short of its norm, as a share of it (0 where there is none).

    The norm is what ``iterations`` more power iterations find, so this errs a little on the small side; v stays.
    """
    worst = []
    for norm, weight in _normalised(model):
        directions = (norm.v, _power(weight, norm.v, norm.geometry, iterations))
        now, then = (_length(_apply(weight.float(), v.float(), norm.geometry)) for v in directions)
        worst.append(torch.where(then > 0, 1 - now / then, 0))
    return torch.stack(worst).max().clamp(min=0).item() if worst else 0.0
